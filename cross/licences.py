#!/usr/bin/env python3
"""Writes the licences of all packages that are linked into the program: the licence expressions, and the texts as the authors
publish them. Reads `cargo metadata --format-version 1 --filter-platform TARGET` from standard input."""

import json
import pathlib
import sys


def main() -> int:
    metadata = json.load(sys.stdin)
    packages = {package["id"]: package for package in metadata["packages"]}
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    program = next(package["id"] for package in metadata["packages"] if package["name"] == "lineside")
    # Build and development dependencies are not part of the program.
    linked, pending = set(), [program]
    while pending:
        package = pending.pop()
        if package in linked:
            continue
        linked.add(package)
        for dependency in nodes[package]["deps"]:
            if any(kind["kind"] is None for kind in dependency["dep_kinds"]):
                pending.append(dependency["pkg"])
    print("Lineside contains the following packages of the Rust ecosystem under these licences.\n")
    chosen = sorted((packages[package] for package in linked if packages[package]["source"]), key=lambda package: (package["name"], package["version"]))
    texts = {}
    for package in chosen:
        print(f"{package['name']} {package['version']}: {package['license'] or 'see the text'}")
        folder = pathlib.Path(package["manifest_path"]).parent
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE", "UNLICENSE")):
                text = file.read_text(encoding="utf-8", errors="replace").strip()
                texts.setdefault(text, []).append(f"{package['name']} {package['version']}")
    for text, names in sorted(texts.items(), key=lambda entry: entry[1]):
        print(f"\n{'=' * 100}\n{', '.join(names)}\n{'=' * 100}\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
