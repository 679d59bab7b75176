#!/usr/bin/env python3
"""Writes the packages that install Lineside in a cluster: dist/lineside-install.yaml and dist/lineside-VERSION.tgz.

The first is all objects in one file. The second is a Helm chart. Both are rendered from edge-manifests with `kubectl
kustomize`, so the base is their one source: the chart takes the base's text, moves the values of a site out of it into
values.yaml, and puts template actions in their place. Every place must exist exactly once, otherwise this program fails; a
change of the base never leads to a chart that ignores a value.
"""

import argparse
import gzip
import io
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap

ROOT = pathlib.Path(__file__).resolve().parent.parent
IMAGE = "localhost/lineside"
NAMESPACE = "{{ .Release.Namespace }}"


class Missing(Exception):
    """A place of the base that the chart changes does not exist exactly once."""


def kubectl() -> str:
    """The kubectl of the environment variable KUBECTL, of the lab, or of PATH."""
    lab = ROOT / "target/lab/bin/kubectl"
    found = os.environ.get("KUBECTL") or (str(lab) if lab.exists() else shutil.which("kubectl"))
    if not found:
        raise SystemExit("dist.py: kubectl is missing; install it, or run `make lab-tools`")
    return found


def render(folder: str) -> list:
    """The objects of a kustomization, each as its text."""
    text = subprocess.run(
        [kubectl(), "kustomize", str(ROOT / "edge-manifests" / folder)], check=True, capture_output=True, text=True
    ).stdout
    return [document.strip("\n") + "\n" for document in re.split(r"^---\n", text, flags=re.MULTILINE)]


def kind_and_name(document: str) -> tuple:
    kind = re.search(r"^kind: (\S+)$", document, re.MULTILINE).group(1)
    return kind, re.search(r"^metadata:\n(?:  .*\n)*?  name: (\S+)$", document, re.MULTILINE).group(1)


def replace(text: str, old: str, new: str, count: int = 1) -> str:
    """Replaces a text that must occur `count` times."""
    if text.count(old) != count:
        raise Missing(f"{old!r} occurs {text.count(old)} times and not {count}")
    return text.replace(old, new)


def take_block(text: str, key: str, new: str) -> tuple:
    """Replaces the lines below the only line `key`, which includes its indentation, by `new`; returns them too."""
    lines = text.splitlines(keepends=True)
    places = [number for number, line in enumerate(lines) if line.rstrip("\n") == key]
    if len(places) != 1:
        raise Missing(f"{key!r} occurs {len(places)} times")
    start = places[0] + 1
    indent = len(key) - len(key.lstrip())
    end = start
    while end < len(lines) and (len(lines[end]) - len(lines[end].lstrip()) > indent or
                                (lines[end].startswith(" " * indent + "- ") and not key.lstrip().startswith("- "))):
        end += 1
    block = textwrap.dedent("".join(lines[start:end]))
    return "".join(lines[:start]) + textwrap.indent(new, " " * (indent + 2)) + "".join(lines[end:]), block


def values_of(path: str) -> str:
    """The template action that writes a value as YAML, to be put below a key."""
    return "{{- toYaml " + path + " | nindent %d }}\n"


def pod(document: str, prefix: str) -> tuple:
    """The pods of a DaemonSet or Deployment with values for their image, node selector and resources."""
    document = re.sub(rf"image: {IMAGE}:\S+", 'image: "{{ .Values.image.repository }}:{{ .Values.image.tag }}"', document)
    document = replace(document, "imagePullPolicy: Never", "imagePullPolicy: {{ .Values.image.pullPolicy }}")
    document, resources = take_block(document, "        resources:", values_of(f".Values.{prefix}.resources") % 10)
    document, selector = take_block(document, "      nodeSelector:", values_of(f".Values.{prefix}.nodeSelector") % 8)
    secrets = "      {{- with .Values.imagePullSecrets }}\n      imagePullSecrets:\n        {{- toYaml . | nindent 8 }}\n      {{- end }}\n"
    return replace(document, "      nodeSelector:\n", secrets + "      nodeSelector:\n"), resources, selector


def agent(document: str, config_name: str, values: dict) -> str:
    document, values["agent.resources"], values["agent.nodeSelector"] = pod(document, "agent")
    document, values["agent.tolerations"] = take_block(
        document, "      tolerations:", values_of(".Values.agent.tolerations") % 8)
    maximum = re.search(r"maxUnavailable: (\S+)\n", document).group(1)
    values["agent.maxUnavailable"] = maximum + "\n"
    document = replace(document, f"maxUnavailable: {maximum}", "maxUnavailable: {{ .Values.agent.maxUnavailable }}")
    document = replace(document, f"name: {config_name}\n", "name: lineside-agent\n")
    # Changed settings restart the agents, as the hash in the name of the base's ConfigMap does.
    annotation = "      annotations:\n        checksum/config: {{ toYaml .Values.config | sha256sum }}\n"
    return replace(document, "    metadata:\n      labels:\n", f"    metadata:\n{annotation}      labels:\n")


def controller(document: str, values: dict) -> str:
    document, values["controller.resources"], values["controller.nodeSelector"] = pod(document, "controller")
    replicas = re.search(r"^  replicas: (\d+)\n", document, re.MULTILINE).group(1)
    values["controller.replicas"] = replicas + "\n"
    return replace(document, f"  replicas: {replicas}\n", "  replicas: {{ .Values.controller.replicas }}\n")


def template(document: str, config_name: str, values: dict) -> str:
    """One object of the base as a template."""
    kind, name = kind_and_name(document)
    if "{{" in document:
        raise Missing(f"{kind} {name} contains template actions already")
    if kind == "ConfigMap":
        document, settings = take_block(document, "  agent-config.yaml: |", "{{- toYaml .Values.config | nindent 4 }}\n")
        values["config"] = settings
        document = replace(document, f"name: {config_name}\n", "name: lineside-agent\n")
    elif kind == "DaemonSet" and name == "lineside-agent":
        document = agent(document, config_name, values)
    elif kind == "Deployment":
        document = controller(document, values)
    elif kind == "DaemonSet":
        document, _, _ = pod(document, "agent")
        document, _ = take_block(document, "        resources:", "limits: {cpu: 100m, memory: 64Mi, ephemeral-storage: 8Mi}\n")
        document, _ = take_block(document, "      tolerations:", values_of(".Values.agent.tolerations") % 8)
    elif kind == "NetworkPolicy" and name == "lineside-plant":
        document, values["network.plantPorts"] = take_block(
            document, "  - ports:", values_of(".Values.network.plantPorts") % 4)
    elif kind == "ValidatingAdmissionPolicy" and name == "lineside-followed-namespace":
        document = replace(document, "''lineside''", "''" + NAMESPACE + "''")
    return re.sub(r"namespace: lineside$", f"namespace: {NAMESPACE}", document, flags=re.MULTILINE)


def values_file(version: str, values: dict) -> str:
    """values.yaml: what the site chooses, with the values of the base."""
    def block(name: str, indent: int) -> str:
        return textwrap.indent(values[name], " " * indent).rstrip("\n")

    def scalar(name: str) -> str:
        return values[name].strip()

    return f"""# Values of the chart. The defaults are those of edge-manifests/base.
image:
  # Imported into every node by default. For a registry: its name here, and the policy IfNotPresent.
  repository: {IMAGE}
  tag: "{version}"
  pullPolicy: Never
# For instance [{{name: lineside-registry}}]
imagePullSecrets: []
crds:
  # Helm keeps the definitions at `helm uninstall`, because deleting them would delete every EdgeModel and CameraStream.
  install: true
prepareNodes:
  # Creates the data folder on every edge node, in the namespace lineside-prepare.
  enabled: true
agent:
  maxUnavailable: {scalar("agent.maxUnavailable")}
  nodeSelector:
{block("agent.nodeSelector", 4)}
  tolerations:
{block("agent.tolerations", 4)}
  resources:
{block("agent.resources", 4)}
controller:
  replicas: {scalar("controller.replicas")}
  nodeSelector:
{block("controller.nodeSelector", 4)}
  resources:
{block("controller.resources", 4)}
network:
  # Ports of brokers, cameras and model sources.
  plantPorts:
{block("network.plantPorts", 4)}
# The settings of the agents: every key of docs/configuration.md, such as site, mqtt, sourceHosts and cameraHosts.
config:
{block("config", 2)}
"""


NOTES = """Lineside {{ .Chart.AppVersion }} is installed in the namespace {{ .Release.Namespace }}.

- The namespace should enforce the profile that all pods of the chart meet:
    kubectl label namespace {{ .Release.Namespace }} pod-security.kubernetes.io/enforce=restricted
- An agent runs on every node with the label lineside.dev/edge=true:
    kubectl label node NAME lineside.dev/edge=true
- Create EdgeModels and CameraStreams in this namespace; in others they are refused.
"""


def guarded(condition: str, text: str) -> str:
    return "{{- if " + condition + " }}\n" + text + "{{- end }}\n"


def chart_files(version: str) -> dict:
    """The files of the chart by their path."""
    values = {}
    base = render("base")
    config_name = next(name for kind, name in map(kind_and_name, base) if kind == "ConfigMap")
    files = {"lineside/Chart.yaml": f"""apiVersion: v2
name: lineside
description: Edge inference agent for factory-line cameras
type: application
version: {version}
appVersion: "{version}"
kubeVersion: ">=1.30.0-0"
"""}
    definitions, templates = [], {}
    for document in base:
        kind, name = kind_and_name(document)
        if kind == "CustomResourceDefinition":
            definitions.append(replace(document, "metadata:\n", "metadata:\n  annotations:\n    helm.sh/resource-policy: keep\n"))
        elif kind != "Namespace":
            # Helm creates the namespace of a release, and a chart that contains it as well fails.
            templates.setdefault(kind.lower(), []).append(template(document, config_name, values))
    for kind, documents in templates.items():
        files[f"lineside/templates/{kind}.yaml"] = "---\n".join(documents)
    # From a file, so that Helm interprets nothing in it.
    files["lineside/files/crds.yaml"] = "---\n".join(definitions)
    files["lineside/templates/crds.yaml"] = guarded(".Values.crds.install", '{{ .Files.Get "files/crds.yaml" }}\n')
    prepare = [template(document, config_name, {}) for document in render("overlays/k3s-install")
               if "lineside-prepare" in document]
    files["lineside/templates/prepare-nodes.yaml"] = guarded(".Values.prepareNodes.enabled", "---\n".join(prepare))
    files["lineside/templates/NOTES.txt"] = NOTES
    files["lineside/values.yaml"] = values_file(version, values)
    return files


def write_chart(path: pathlib.Path, files: dict) -> None:
    """Writes the chart as an archive without times and owners, so that the same input gives the same bytes."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        # Helm expects Chart.yaml first.
        for name in sorted(files, key=lambda name: (name != "lineside/Chart.yaml", name)):
            data = files[name].encode()
            info = tarfile.TarInfo(name)
            info.mode, info.size = 0o644, len(data)
            archive.addfile(info, io.BytesIO(data))
    path.write_bytes(gzip.compress(content.getvalue(), mtime=0))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=str(ROOT / "dist"), help="folder of the packages; default: dist")
    output = pathlib.Path(parser.parse_args().output)
    output.mkdir(parents=True, exist_ok=True)
    version = re.search(r'^version = "(.*)"', (ROOT / "Cargo.toml").read_text(), re.MULTILINE).group(1)
    install = output / "lineside-install.yaml"
    head = "# Lineside %s: all objects. Set `site` and `mqtt` in the ConfigMap lineside-agent-... before you apply this file.\n"
    install.write_text(head % version + "---\n".join(render("overlays/k3s-install")))
    chart = output / f"lineside-{version}.tgz"
    write_chart(chart, chart_files(version))
    print(install, chart, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
