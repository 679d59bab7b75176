#!/usr/bin/env bash
# Runs Lineside on a Kubernetes on this machine, for demonstration.
#
#   demo.sh up FOLDER     starts a cluster with one edge node, and installs Lineside
#   demo.sh show FOLDER   the same with the samples of edge-manifests; prints results and the output of kubectl
#
# `lab.sh down FOLDER` stops it.
set -euo pipefail
verb=${1:-}
folder=${2:-}
[ -n "$folder" ] || { sed -n '2,7s/^# \?//p' "$0"; exit 64; }
cd "$(dirname "$0")/../.."
lab=tests/lab/lab.sh
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
kubectl() { "$lab" exec "$folder" center kubectl "$@"; }
if [ ! -f "$folder/pids/kube-apiserver" ]; then
	"$lab" up "$folder"
	"$lab" node "$folder" edge-1 1
	"$lab" image "$folder" edge-1 target/lab/lineside.oci.tar
	printf 'listener 1883 10.98.1.1\nallow_anonymous true\n' >"$folder/mosquitto.conf"
	"$lab" daemon "$folder" broker edge-1 mosquitto -c "$folder/mosquitto.conf"
	mkdir -p "$folder/edge-1/data/quickstart"
	cp -r examples/surface-defects/surface-defects.onnx examples/surface-defects/frames "$folder/edge-1/data/quickstart/"
fi
mkdir -p target/lab/demo-site
sed 's/site: default/site: demo/' edge-manifests/base/agent-config.yaml >target/lab/demo-site/agent-config.yaml
cat >target/lab/demo-site/kustomization.yaml <<'YAML'
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [../../../edge-manifests/overlays/k3s-amd64]
configMapGenerator:
  - name: lineside-agent
    namespace: lineside
    behavior: merge
    files: [agent-config.yaml]
YAML
kubectl apply -k target/lab/demo-site
kubectl label node edge-1 --overwrite lineside.dev/edge=true lineside.dev/line=a
kubectl rollout status daemonset/lineside-agent deployment/lineside-controller -n lineside --timeout=120s
if [ "$verb" = show ]; then
	kubectl apply -k edge-manifests/samples
	"$lab" exec "$folder" edge-1 mosquitto_sub -h 10.98.1.1 -t 'lineside/v1/demo/+/+/result' -C 10 -W 120
	kubectl wait -n lineside em/surface-defects cam/line-1 --for=condition=Ready --timeout=60s
	kubectl get em,cam,en -n lineside
	kubectl get events -n lineside
fi
cat <<END

  kubectl    $lab exec $folder center kubectl -n lineside get em,cam,en
  results    $lab exec $folder edge-1 mosquitto_sub -h 10.98.1.1 -t 'lineside/#' -v
  disconnect $lab wan $folder edge-1 down
  stop       make lab-down
END
