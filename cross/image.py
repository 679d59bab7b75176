#!/usr/bin/env python3
"""Writes an OCI image archive from files, without a container daemon and reproducibly.

The archive has one layer. It contains nothing that differs between two builds of the same input: no times, no owner
names, and a fixed order of the files. `ctr images import`, the image folder of K3s, `docker load` and `skopeo` accept
it.

Format: OCI image-spec 1.1, image layout. Annotations of the index name the image for containerd and Docker.
"""

import argparse
import gzip
import hashlib
import io
import json
import pathlib
import sys
import tarfile


def blob(blobs: dict, content: bytes, media_type: str) -> dict:
    """Adds a blob and returns its descriptor."""
    digest = hashlib.sha256(content).hexdigest()
    blobs[digest] = content
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}


def entry(name: str, mode: int, size: int = 0) -> tarfile.TarInfo:
    """An archive member without time and owner names."""
    info = tarfile.TarInfo(name)
    info.mode, info.size, info.mtime, info.uid, info.gid, info.uname, info.gname = mode, size, 0, 0, 0, "", ""
    return info


def layer(files: list, folders: list) -> bytes:
    """The layer as a tar archive: all files with their parent folders."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        parents = {parent for path, _, _ in files for parent in pathlib.PurePosixPath(path).parents}
        parents |= {pathlib.PurePosixPath(folder) for folder in folders}
        for parent in sorted(str(parent) for parent in parents if str(parent) not in (".", "/")):
            info = entry(parent.lstrip("/") + "/", 0o755)
            info.type = tarfile.DIRTYPE
            archive.addfile(info)
        for path, source, mode in sorted(files):
            data = pathlib.Path(source).read_bytes()
            archive.addfile(entry(path.lstrip("/"), mode, len(data)), io.BytesIO(data))
    return content.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="path of the archive")
    parser.add_argument("--name", required=True, help="image name with tag, for example localhost/lineside:0.1.0")
    parser.add_argument("--arch", required=True, choices=["amd64", "arm64"])
    parser.add_argument("--file", action="append", default=[], metavar="PATH=SOURCE", help="a file, readable by all users")
    parser.add_argument("--program", action="append", default=[], metavar="PATH=SOURCE", help="an executable file")
    parser.add_argument("--folder", action="append", default=[], metavar="PATH", help="an empty folder")
    parser.add_argument("--entrypoint", required=True)
    parser.add_argument("--user", default="65532:65532")
    parser.add_argument("--label", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--max-mib", type=float, help="fail if the archive is larger")
    arguments = parser.parse_args()
    files = [(*pair.split("=", 1), mode) for pairs, mode in ((arguments.file, 0o644), (arguments.program, 0o755)) for pair in pairs]
    tar = layer(files, arguments.folder)
    compressed = gzip.compress(tar, compresslevel=9, mtime=0)
    blobs = {}
    config = {
        "architecture": arguments.arch,
        "os": "linux",
        "config": {
            "User": arguments.user,
            "Entrypoint": [arguments.entrypoint],
            "WorkingDir": "/",
            "Labels": dict(label.split("=", 1) for label in arguments.label),
        },
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(tar).hexdigest()]},
        "history": [{"created_by": "cross/image.py"}],
    }
    as_json = lambda value: json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob(blobs, as_json(config), "application/vnd.oci.image.config.v1+json"),
        "layers": [blob(blobs, compressed, "application/vnd.oci.image.layer.v1.tar+gzip")],
    }
    descriptor = blob(blobs, as_json(manifest), manifest["mediaType"])
    descriptor["annotations"] = {
        "io.containerd.image.name": arguments.name,
        "org.opencontainers.image.ref.name": arguments.name,
    }
    descriptor["platform"] = {"architecture": arguments.arch, "os": "linux"}
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [descriptor]}
    members = {"oci-layout": as_json({"imageLayoutVersion": "1.0.0"}), "index.json": as_json(index)}
    members |= {f"blobs/sha256/{digest}": content for digest, content in blobs.items()}
    output = pathlib.Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    with tarfile.open(partial, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in sorted(members):
            archive.addfile(entry(name, 0o644, len(members[name])), io.BytesIO(members[name]))
    size = partial.stat().st_size / 2**20
    if arguments.max_mib and size > arguments.max_mib:
        print(f"image.py: the archive has {size:.1f} MiB, more than the maximum of {arguments.max_mib:g} MiB", file=sys.stderr)
        return 1
    partial.replace(output)
    print(f"{output}  {size:.1f} MiB  {descriptor['digest']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
