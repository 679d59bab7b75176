#!/usr/bin/env bash
# Runs a real Kubernetes on this machine: API server, controllers, and nodes with kubelet, containerd and pods.
#
#   lab.sh up FOLDER                              starts the control plane
#   lab.sh node FOLDER NAME NUMBER [LABELS]       adds a node with kubelet, containerd and kube-proxy (NUMBER 1 to 99)
#   lab.sh exec FOLDER NETWORK COMMAND...         runs a command in a network: `center` or the name of a node
#   lab.sh daemon FOLDER NAME NETWORK COMMAND...  the same in the background, until `down`
#   lab.sh image FOLDER NODE ARCHIVE              imports an OCI archive on a node
#   lab.sh wan FOLDER NODE up|down                connects or disconnects a node and the control plane
#   lab.sh restart FOLDER api                     restarts the API server
#   lab.sh down FOLDER                            stops everything, and deletes everything except the logs
#   lab.sh guard FOLDER                           waits for the end of its input, then runs `down` and deletes the logs
#
# All files are below FOLDER, and all processes run in separate network namespaces, so that several labs do not conflict and
# the network of the machine is not changed. The network of the control plane has the address 10.99.0.1. Each node N has its
# own network, which the link `wan` (10.99.N.1 to 10.99.N.2) connects to the control plane. The bridge `plant` of the node is
# the plant network 10.98.N.0/24, in which brokers and cameras of a test listen on 10.98.N.1; pods are in 10.97.N.0/24, and
# Services in 10.96.0.0/16. A node also has its own mount namespace: its /var/lib/lineside is FOLDER/NAME/data, so that nodes
# do not share it. The DNS of the plant, which the pods use, resolves every name of `plant.local` to 10.98.N.1.
#
# Requirements: root, the Debian packages containerd runc containernetworking-plugins nftables conntrack iproute2 dnsmasq-base,
# and the program `lab` of this folder (make lab-tools). The lab also runs on machines with restricted privileges: containerd
# does not change oom_score_adj, and etcd does not sync to disk.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
lab=${LINESIDE_LAB_PROGRAM:-$here/../../target/lab/lab}
verb=${1:-}
folder=${2:-}
[ -n "$folder" ] || { sed -n '2,12s/^# \?//p' "$0" >&2; exit 64; }
case $verb in up | node) mkdir -p "$folder" ;; esac
folder=$(cd "$folder" && pwd)
# Namespaces and control groups are global to the machine. The id is derived from the folder, whose path would be too long.
id=ls$(printf %s "$folder" | cksum | cut -d' ' -f1)

log() { echo "lab: $*" >&2; }

# within NETWORK COMMAND...: runs a command in a network, with the mounts of the machine.
within() { local network=$1; shift; nsenter --net="/run/netns/$id-$network" "$@"; }

# start NAME NETWORK COMMAND...: starts a background process, and records its process id and log.
start() {
	local name=$1 network=$2
	shift 2
	mkdir -p "$folder/logs" "$folder/pids"
	setsid nsenter --net="/run/netns/$id-$network" "$@" >>"$folder/logs/$name.log" 2>&1 </dev/null &
	echo $! >"$folder/pids/$name"
}

# stop NAME...: stops processes in the given order, with SIGTERM and after five seconds with SIGKILL.
stop() {
	local name pid
	for name in "$@"; do
		[ -f "$folder/pids/$name" ] || continue
		pid=$(cat "$folder/pids/$name")
		kill "$pid" 2>/dev/null || true
		for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.05; done
		kill -9 "$pid" 2>/dev/null || true
		rm -f "$folder/pids/$name"
	done
}

# on_node NAME COMMAND...: runs a command in the network and mount namespace of a node.
on_node() {
	local name=$1
	shift
	nsenter --net="/run/netns/$id-$name" --mount="/proc/$(cat "$folder/pids/$name-mounts")/ns/mnt" "$@"
}

has_own_mounts() { [ "$(readlink /proc/self/ns/mnt)" != "$(readlink "/proc/$(cat "$folder/pids/$1-mounts")/ns/mnt")" ]; }

# start_on_node COMPONENT NAME COMMAND...: starts a background process on a node.
start_on_node() {
	local component=$1 name=$2
	shift 2
	start "$name-$component" "$name" nsenter --mount="/proc/$(cat "$folder/pids/$name-mounts")/ns/mnt" "$@"
}

# until_true SECONDS WHAT COMMAND...: waits until a command succeeds.
until_true() {
	local seconds=$1 what=$2 end
	shift 2
	end=$((SECONDS + seconds))
	until "$@" >/dev/null 2>&1; do
		if [ $SECONDS -ge $end ]; then
			log "timed out after $seconds s waiting for $what; the logs are in $folder/logs and end with:"
			tail -qn 3 "$folder"/logs/*.log | cut -c1-400 >&2
			return 1
		fi
		sleep 0.2
	done
}

kubectl() { KUBECONFIG=$folder/admin.kubeconfig within center "$folder/bin/kubectl" "$@"; }

# kubeconfig FILE TOKEN: writes a kubeconfig with a token.
kubeconfig() {
	cat >"$1" <<-CONFIG
	apiVersion: v1
	kind: Config
	clusters: [{name: lab, cluster: {server: "https://10.99.0.1:6443", certificate-authority: $folder/certificates/apiserver.crt}}]
	users: [{name: lab, user: {token: $2}}]
	contexts: [{name: lab, context: {cluster: lab, user: lab}}]
	current-context: lab
	CONFIG
	chmod 600 "$1"
}

start_api() {
	start kube-apiserver center "$folder/bin/kube-apiserver" \
		--etcd-servers=http://127.0.0.1:2379 --bind-address=10.99.0.1 --advertise-address=10.99.0.1 --secure-port=6443 \
		--cert-dir="$folder/certificates" --service-cluster-ip-range=10.96.0.0/16 \
		--authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --token-auth-file="$folder/tokens.csv" \
		--service-account-issuer=https://kubernetes.default.svc --service-account-key-file="$folder/certificates/sa.pub" \
		--service-account-signing-key-file="$folder/certificates/sa.key" \
		--kubelet-preferred-address-types=InternalIP --allow-privileged=true --endpoint-reconciler-type=master-count \
		--event-ttl=1h --v=1
}

up() {
	local component
	mkdir -p "$folder"/{bin,certificates,etcd,logs,pids}
	for component in kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet kubectl; do
		ln -sf "$(realpath "$lab")" "$folder/bin/$component"
	done
	ip netns add "$id-center"
	within center ip link set lo up
	within center ip link add center type bridge
	within center ip addr add 10.99.0.1/24 dev center
	within center ip link set center up
	within center sysctl -qw net.ipv4.ip_forward=1
	openssl genrsa -out "$folder/certificates/sa.key" 2048 2>/dev/null
	openssl rsa -in "$folder/certificates/sa.key" -pubout -out "$folder/certificates/sa.pub" 2>/dev/null
	(
		umask 077
		echo "lab-admin,admin,admin,system:masters" >"$folder/tokens.csv"
		for number in $(seq 9); do echo "lab-edge-$number,system:node:edge-$number,edge-$number,system:nodes"; done >>"$folder/tokens.csv"
	)
	start etcd center "$lab" etcd "$folder/etcd"
	until_true 30 'etcd' within center curl -sf http://127.0.0.1:2379/health
	start_api
	kubeconfig "$folder/admin.kubeconfig" lab-admin
	until_true 90 'the API server' kubectl get --raw /readyz
	start kube-controller-manager center "$folder/bin/kube-controller-manager" --kubeconfig="$folder/admin.kubeconfig" \
		--root-ca-file="$folder/certificates/apiserver.crt" --service-account-private-key-file="$folder/certificates/sa.key" \
		--use-service-account-credentials=true --leader-elect=false --bind-address=127.0.0.1 \
		--node-monitor-grace-period=20s --v=1
	start kube-scheduler center "$folder/bin/kube-scheduler" --kubeconfig="$folder/admin.kubeconfig" --leader-elect=false \
		--bind-address=127.0.0.1 --v=1
	until_true 30 'the default service account' kubectl get serviceaccount default
	log "the control plane is ready: KUBECONFIG=$folder/admin.kubeconfig"
}

node() {
	local name=$1 number=$2 labels=${3:-} own
	own=$folder/$name
	mkdir -p "$own"/{cni,containerd,run,kubelet,logs,data} /var/lib/lineside
	ip netns add "$id-$name"
	within "$name" ip link set lo up
	ip link add "w$number" netns "$id-center" type veth peer name wan netns "$id-$name"
	within center ip addr add "10.99.$number.1/24" dev "w$number"
	within center ip link set "w$number" up
	within "$name" ip addr add "10.99.$number.2/24" dev wan
	within "$name" ip link set wan up
	within "$name" ip link add plant type bridge
	within "$name" ip addr add "10.98.$number.1/24" dev plant
	within "$name" ip link set plant up
	within "$name" ip route add default via "10.99.$number.1"
	within "$name" sysctl -qw net.ipv4.ip_forward=1
	within center ip route add "10.97.$number.0/24" via "10.99.$number.2"
	start "$name-mounts" "$name" unshare --mount --propagation private sleep infinity
	until_true 5 "the mount namespace of $name" has_own_mounts "$name"
	on_node "$name" mount --bind "$own/data" /var/lib/lineside
	on_node "$name" mount -t tmpfs lab /run/netns
	chown 65532:65532 "$own/data"
	cat >"$own/cni/10-lab.conflist" <<-CNI
	{"cniVersion": "0.4.0", "name": "lab", "plugins": [
	  {"type": "ptp", "ipMasq": true, "ipam": {"type": "host-local", "dataDir": "$own/ipam", "subnet": "10.97.$number.0/24",
	   "routes": [{"dst": "0.0.0.0/0"}]}}, {"type": "portmap", "capabilities": {"portMappings": true}}]}
	CNI
	cat >"$own/containerd.toml" <<-TOML
	version = 2
	root = "$own/containerd"
	state = "$own/run/containerd"
	[grpc]
	  address = "$own/run/containerd.sock"
	[plugins."io.containerd.internal.v1.opt"]
	  path = "$own/opt"
	[plugins."io.containerd.grpc.v1.cri"]
	  sandbox_image = "localhost/pause:lab"
	  restrict_oom_score_adj = true
	  disable_apparmor = true
	  [plugins."io.containerd.grpc.v1.cri".cni]
	    bin_dir = "/usr/lib/cni"
	    conf_dir = "$own/cni"
	  [plugins."io.containerd.grpc.v1.cri".containerd]
	    default_runtime_name = "runc"
	    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
	      runtime_type = "io.containerd.runc.v2"
	      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
	        SystemdCgroup = false
	TOML
	echo "nameserver 10.98.$number.1" >"$own/resolv.conf"
	start "$name-dns" "$name" dnsmasq --keep-in-foreground --conf-file=/dev/null --pid-file= --user=root --no-resolv --no-hosts \
		--bind-interfaces --listen-address="10.98.$number.1" --address="/plant.local/10.98.$number.1"
	# Each kubelet has its own subtree of control groups, because it kills all unknown processes in its subtree.
	if [ -f /sys/fs/cgroup/cgroup.controllers ]; then
		# Cgroups v2: written from the documentation and not tested, as the machines of this project have v1.
		for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
			echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control || true
		done
		mkdir -p "/sys/fs/cgroup/$id-$name"
	else
		for controller in /sys/fs/cgroup/*/; do
			case $controller in */unified/) ;; *) mkdir -p "$controller/$id-$name" ;; esac
		done
	fi
	if [ -f /sys/fs/cgroup/cpuset/cpuset.cpus ]; then
		cat /sys/fs/cgroup/cpuset/cpuset.cpus >"/sys/fs/cgroup/cpuset/$id-$name/cpuset.cpus"
		cat /sys/fs/cgroup/cpuset/cpuset.mems >"/sys/fs/cgroup/cpuset/$id-$name/cpuset.mems"
	fi
	cat >"$own/kubelet.yaml" <<-YAML
	apiVersion: kubelet.config.k8s.io/v1beta1
	kind: KubeletConfiguration
	failCgroupV1: false
	cgroupDriver: cgroupfs
	cgroupRoot: /$id-$name
	failSwapOn: false
	authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
	authorization: {mode: AlwaysAllow}
	evictionHard: {memory.available: "16Mi", nodefs.available: "1%", imagefs.available: "1%", nodefs.inodesFree: "1%"}
	imageGCHighThresholdPercent: 100
	imageGCLowThresholdPercent: 99
	containerRuntimeEndpoint: unix://$own/run/containerd.sock
	podLogsDir: $own/logs
	resolvConf: $own/resolv.conf
	clusterDomain: cluster.local
	nodeStatusUpdateFrequency: 5s
	nodeStatusReportFrequency: 30s
	syncFrequency: 10s
	volumePluginDir: $own/volume-plugins
	registerNode: true
	YAML
	kubeconfig "$own/kubeconfig" "lab-$name"
	start_on_node containerd "$name" containerd --config "$own/containerd.toml"
	until_true 30 "containerd of $name" ctr --address "$own/run/containerd.sock" version
	[ -f "$folder/pause.oci.tar" ] || pause
	image "$name" "$folder/pause.oci.tar"
	start_on_node kubelet "$name" "$folder/bin/kubelet" --config="$own/kubelet.yaml" --root-dir="$own/kubelet" \
		--kubeconfig="$own/kubeconfig" --hostname-override="$name" --node-ip="10.99.$number.2" --node-labels="$labels" --v=1
	# kube-proxy uses the administrator's credentials; the tests only need pods to reach Service addresses.
	cat >"$own/proxy.yaml" <<-YAML
	apiVersion: kubeproxy.config.k8s.io/v1alpha1
	kind: KubeProxyConfiguration
	mode: nftables
	bindAddress: 10.99.$number.2
	hostnameOverride: $name
	healthzBindAddress: ""
	metricsBindAddress: ""
	clientConnection: {kubeconfig: $folder/admin.kubeconfig}
	conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
	YAML
	start "$name-proxy" "$name" "$folder/bin/kube-proxy" --config="$own/proxy.yaml"
	until_true 60 "the node $name" kubectl wait --for=condition=Ready "node/$name" --timeout=1s
	log "the node $name is ready"
}

# The pause image: a program that does nothing and holds the namespaces of a pod.
pause() {
	printf '#include <unistd.h>\n#include <signal.h>\nstatic void end(int s) { (void)s; _exit(0); }\nint main(void) { signal(SIGTERM, end); signal(SIGINT, end); for (;;) pause(); }\n' \
		>"$folder/pause.c"
	cc -O1 -static -o "$folder/pause" "$folder/pause.c"
	python3 "$here/../../cross/image.py" --output "$folder/pause.oci.tar" --name localhost/pause:lab --arch amd64 \
		--program "/pause=$folder/pause" --entrypoint /pause >/dev/null
}

image() { ctr --address "$folder/$1/run/containerd.sock" --namespace k8s.io images import "$2" >/dev/null; }

down() {
	local name socket task shim pids
	if [ -f "$folder/pids/kube-apiserver" ]; then
		timeout 30 "$0" exec "$folder" center "$folder/bin/kubectl" --kubeconfig "$folder/admin.kubeconfig" \
			delete daemonsets,deployments,jobs,pods --all --all-namespaces --grace-period=1 --timeout=25s >/dev/null 2>&1 || true
	fi
	for name in "$folder"/pids/*-kubelet "$folder"/pids/*-proxy; do [ -f "$name" ] && stop "$(basename "$name")"; done
	stop kube-scheduler kube-controller-manager kube-apiserver etcd
	for socket in "$folder"/*/run/containerd.sock; do
		[ -S "$socket" ] || continue
		for task in $(timeout 10 ctr --address "$socket" --namespace k8s.io tasks list -q 2>/dev/null); do
			timeout 10 ctr --address "$socket" --namespace k8s.io tasks kill --signal SIGKILL --all "$task" 2>/dev/null || true
		done
	done
	# A shim outlives containerd. Its command line contains the socket, which is in the folder of this lab.
	for shim in $(pgrep -f "containerd-shim.* -address $folder/" || true); do
		pids=$(pgrep -P "$shim" || true)
		kill -9 $pids "$shim" 2>/dev/null || true
	done
	for name in "$folder"/pids/*; do [ -f "$name" ] && stop "$(basename "$name")"; done
	awk -v folder="$folder/" 'index($2, folder) == 1 { print $2 }' /proc/mounts | sort -r | while read -r mounted; do
		umount -l "$mounted" 2>/dev/null || true
	done
	# Other processes in the networks are killed as well, such as a command of `exec` that outlived its caller.
	for name in $(ip netns list 2>/dev/null | awk '{print $1}' | grep "^$id-" || true); do
		pids=$(ip netns pids "$name" || true)
		[ -z "$pids" ] || kill -9 $pids 2>/dev/null || true
		ip netns delete "$name" || true
	done
	# /var/lib/lineside stays, because other labs may have mounted folders on it.
	for controller in /sys/fs/cgroup/*/; do
		find "$controller" -maxdepth 1 -name "$id-*" -type d 2>/dev/null | while read -r group; do
			find "$group" -depth -type d -exec rmdir {} \; 2>/dev/null || true
		done
	done
	find "$folder" -mindepth 1 -maxdepth 1 ! -name logs -exec rm -rf {} + 2>/dev/null || true
	log 'all processes are stopped'
}

case $verb in
up) up ;;
node) shift 2; node "$@" ;;
exec) shift 2; export KUBECONFIG=${KUBECONFIG:-$folder/admin.kubeconfig}; network=$1; shift
	# exec: a signal to this process reaches the command.
	PATH=$folder/bin:$PATH exec nsenter --net="/run/netns/$id-$network" "$@" ;;
daemon) shift 2; start "$@" ;;
image) image "$3" "$4" ;;
wan) number=$(within "$3" ip -4 -br addr show wan | sed -E 's/.*10\.99\.([0-9]+)\.2.*/\1/'); within center ip link set "w$number" "$4"
	[ "$4" = down ] || within center ip route replace "10.97.$number.0/24" via "10.99.$number.2" ;;
restart) stop kube-apiserver; start_api; until_true 60 'the API server' kubectl get --raw /readyz ;;
down) down ;;
guard) trap '' INT TERM HUP; cat >/dev/null; down 2>/dev/null; rm -rf "$folder" ;;
*) log "unknown command $verb"; exit 64 ;;
esac
