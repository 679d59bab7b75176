//! The operations of tests on the lab: kubectl, the samples, the link, and the state of the node.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

use super::{KUBECTL, Lab, NAMESPACE, NODE, POD_TIMEOUT, run, script_at};
use crate::broker::ConnectOptions;
use crate::paho::Paho;
use crate::process::output_text;
use crate::utf8;
use crate::wait::until_within;

impl Lab {
    /// The folder that the node sees as `/var/lib/lineside`.
    pub fn data(&self) -> PathBuf {
        self.folder().join(NODE).join("data")
    }

    /// The kubeconfig of the administrator.
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder().join("admin.kubeconfig")
    }

    /// A command for a program in the network namespace of the node, or in that of the control plane (`center`). For an
    /// external cluster the program runs without a namespace.
    pub fn command_in(&self, namespace: &str, program: &[&str]) -> Command {
        let Some(local) = &self.local else {
            let kubectl = crate::root().join(KUBECTL);
            let mut command = Command::new(if program[0] == "kubectl" { utf8(&kubectl) } else { program[0] });
            command.args(&program[1..]);
            return command;
        };
        script_at(&local.folder, "exec", &[&[namespace], program].concat())
    }

    /// Runs kubectl.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn kubectl(&self, arguments: &[&str]) -> Output {
        self.command_in("center", &[&["kubectl"], arguments].concat()).output().expect("kubectl starts")
    }

    /// Runs kubectl, which must succeed, and returns its standard output.
    ///
    /// # Panics
    /// If it fails.
    pub fn kubectl_ok(&self, arguments: &[&str]) -> String {
        let output = self.kubectl(arguments);
        assert!(output.status.success(), "kubectl {arguments:?}: {}", output_text(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// An object as JSON; null if it does not exist.
    ///
    /// # Panics
    /// If kubectl does not print JSON.
    pub fn get(&self, arguments: &[&str]) -> Value {
        let output = self.kubectl(&[&["get"], arguments, &["-o", "json", "--ignore-not-found"]].concat());
        if output.stdout.is_empty() {
            return Value::Null;
        }
        serde_json::from_slice(&output.stdout).expect("kubectl prints JSON")
    }

    /// Applies a manifest. The API server may reject it; the output contains its message.
    ///
    /// # Panics
    /// If kubectl cannot be started.
    pub fn apply(&self, text: &str) -> Output {
        let mut kubectl = self.command_in("center", &["kubectl", "apply", "-f", "-"]);
        let mut child = kubectl
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kubectl starts");
        child.stdin.take().expect("stdin is piped").write_all(text.as_bytes()).expect("kubectl reads");
        child.wait_with_output().expect("kubectl ends")
    }

    /// Patches the spec of an object. The API server may reject it; the output contains its message.
    ///
    /// # Panics
    /// If kubectl cannot be started.
    pub fn patch(&self, kind: &str, name: &str, spec: &Value) -> Output {
        let patch = serde_json::json!({ "spec": spec }).to_string();
        self.kubectl(&["patch", kind, name, "-n", NAMESPACE, "--type=merge", "--patch", &patch])
    }

    /// Patches the spec of an object, which must succeed.
    ///
    /// # Panics
    /// If the API server rejects it.
    pub fn patch_ok(&self, kind: &str, name: &str, spec: &Value) {
        let output = self.patch(kind, name, spec);
        assert!(output.status.success(), "{kind} {name} {spec}: {}", output_text(&output));
    }

    /// Applies a manifest, which must succeed.
    ///
    /// # Panics
    /// If the API server rejects it.
    pub fn apply_ok(&self, text: &str) {
        let output = self.apply(text);
        assert!(output.status.success(), "{}", output_text(&output));
    }

    /// Installs Lineside: applies the overlay with the settings of the lab, labels the node, and waits until the pods
    /// are ready.
    ///
    /// # Panics
    /// If the pods do not become ready in time.
    pub fn install(&self) {
        // Two concurrent `kubectl apply` would both try to create the same objects.
        static INSTALL: Mutex<()> = Mutex::new(());
        let _turn = INSTALL.lock().unwrap_or_else(PoisonError::into_inner);
        self.apply_overlay(&[]);
        self.kubectl_ok(&["label", "node", &self.node, "--overwrite", "lineside.dev/edge=true", "lineside.dev/line=a"]);
        self.wait_for_rollouts();
    }

    /// Waits until the agent's DaemonSet and the controller's Deployment are rolled out.
    ///
    /// # Panics
    /// If a rollout does not complete in time.
    pub fn wait_for_rollouts(&self) {
        for what in ["daemonset/lineside-agent", "deployment/lineside-controller"] {
            let output = self.kubectl(&["rollout", "status", what, "-n", NAMESPACE, "--timeout=120s"]);
            if !output.status.success() {
                let pods = self.kubectl(&["describe", "pods", "-n", NAMESPACE]);
                let logs = self.kubectl(&["logs", what, "-n", NAMESPACE, "--tail=40"]);
                panic!(
                    "{what} is not rolled out: {}{}{}",
                    output_text(&output),
                    output_text(&pods),
                    output_text(&logs)
                );
            }
        }
    }

    /// Applies the overlay `k3s-amd64` with the broker of the lab; `more` are additional lines of the kustomization.
    ///
    /// # Panics
    /// If the API server rejects it.
    pub fn apply_overlay(&self, more: &[&str]) -> String {
        // Kustomize does not accept absolute paths, so the overlay of the site is created inside the repository.
        let folder = tempfile::Builder::new()
            .prefix("site-")
            .tempdir_in(crate::root().join("target/lab"))
            .expect("the folder is writable");
        let mut config = std::fs::read_to_string(crate::root().join("edge-manifests/base/agent-config.yaml"))
            .expect("the base is committed")
            .replace("site: default", "site: plant");
        // In the local lab, DNS resolves the broker's name.
        if !self.is_local() {
            config = config.replace("mqtt.plant.local", &self.broker);
        }
        std::fs::write(folder.path().join("agent-config.yaml"), config).expect("the folder is writable");
        let kustomization = format!(
            "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n\
             resources: [../../../edge-manifests/overlays/k3s-amd64]\n\
             configMapGenerator:\n  - name: lineside-agent\n    namespace: lineside\n    behavior: merge\n    files: [agent-config.yaml]\n{}\n",
            more.join("\n")
        );
        std::fs::write(folder.path().join("kustomization.yaml"), kustomization).expect("the folder is writable");
        self.kubectl_ok(&["apply", "-k", utf8(folder.path())])
    }

    /// Applies the samples of `edge-manifests/samples` and returns the version of the model, which no other test has
    /// used: a node remembers the highest version that it has seen, and the tests share the node. The ten versions from
    /// it on are reserved for the caller.
    ///
    /// # Panics
    /// If the API server rejects them.
    pub fn apply_samples(&self) -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let version = NEXT.fetch_add(10, Ordering::Relaxed);
        let samples = crate::root().join("edge-manifests/samples");
        let read = |name: &str| std::fs::read_to_string(samples.join(name)).expect("the samples are committed");
        let model = read("edgemodel.yaml").replace("\n  version: 1\n", &format!("\n  version: {version}\n"));
        let stream = read("camerastream.yaml").replace("nodeName: edge-1", &format!("nodeName: {}", self.node));
        self.apply_ok(&format!("{model}---\n{stream}"));
        version
    }

    /// Sets the node's link to the control plane to `up` or `down`.
    pub fn wan(&self, state: &str) {
        run(script_at(self.folder(), "wan", &[NODE, state]));
    }

    /// Restarts the API server.
    pub fn restart_api(&self) {
        run(script_at(self.folder(), "restart", &["api"]));
    }

    /// A subscriber with a persistent session to all topics of the node. It runs next to the node, outside the cluster.
    pub fn subscribe(&self, session: &str) -> Paho {
        let options = ConnectOptions { host: self.broker.clone(), ..ConnectOptions::at(1883) };
        Paho::start_with(
            self.command_in(NODE, &[utf8(&crate::python())]),
            &options,
            "lineside/v1/plant/#",
            Some(session),
        )
    }

    /// The name of the edge node.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The URL of the API server.
    ///
    /// # Panics
    /// If the kubeconfig does not contain it.
    pub fn server(&self) -> String {
        self.kubectl_ok(&["config", "view", "--minify", "-o", "jsonpath={.clusters[0].cluster.server}"])
    }

    /// The folder of the local lab.
    ///
    /// # Panics
    /// If the cluster is external.
    pub fn folder(&self) -> &Path {
        &self.local.as_ref().expect("the lab is local").folder
    }

    /// Whether the cluster runs on this machine.
    pub fn is_local(&self) -> bool {
        self.local.is_some()
    }

    /// The host of the broker, for a client on the node.
    pub fn broker_host(&self) -> &str {
        &self.broker
    }

    /// The URL of the broker, for an agent on the node.
    pub fn broker(&self) -> String {
        format!("mqtt://{}:1883", self.broker)
    }

    /// The pod of the node's agent; null if there is none.
    pub fn agent_pod(&self) -> Value {
        let pods = self.get(&["pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/name=lineside-agent"]);
        let mut pods = pods["items"].as_array().into_iter().flatten();
        pods.find(|pod| pod["metadata"]["deletionTimestamp"].is_null()).cloned().unwrap_or_default()
    }

    /// The process id of a pod's only container, and the containerd id of the container.
    ///
    /// # Panics
    /// If the container does not run.
    pub fn process(&self, pod: &Value) -> (u32, String) {
        let id = pod["status"]["containerStatuses"][0]["containerID"].as_str().unwrap_or_default();
        let id = id.trim_start_matches("containerd://").to_owned();
        let tasks = self.ctr(&["tasks", "list"]);
        let pid = tasks.lines().find(|line| line.starts_with(&id)).and_then(|line| line.split_whitespace().nth(1));
        (
            pid.and_then(|pid| pid.parse().ok()).unwrap_or_else(|| panic!("container {id} has no process in\n{tasks}")),
            id,
        )
    }

    /// Runs `ctr`, the command-line client of containerd, on the node.
    ///
    /// # Panics
    /// If it fails.
    pub fn ctr(&self, arguments: &[&str]) -> String {
        let socket = self.folder().join(NODE).join("run/containerd.sock");
        let output = Command::new("ctr")
            .args(["--address", utf8(&socket), "--namespace", "k8s.io"])
            .args(arguments)
            .output()
            .expect("ctr starts");
        assert!(output.status.success(), "ctr {arguments:?}: {}", output_text(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The memory control group of a process.
    ///
    /// # Panics
    /// If it has none.
    pub fn memory_cgroup(&self, pid: u32) -> PathBuf {
        let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("the process runs");
        let path_of =
            |controller: &str| groups.lines().find_map(|line| Some(line.split_once(controller)?.1.to_owned()));
        // Cgroups v2 has a single hierarchy.
        let (root, path) = match path_of(":memory:") {
            Some(path) => ("/sys/fs/cgroup/memory", path),
            None => ("/sys/fs/cgroup", path_of("0::").expect("the process has a control group")),
        };
        Path::new(root).join(path.trim_start_matches('/'))
    }

    /// Evaluates a condition until it returns a value, with a limit that suits pods.
    ///
    /// # Panics
    /// If the limit expires.
    pub fn until<T>(&self, what: &str, condition: impl FnMut() -> Option<T>) -> T {
        until_within(POD_TIMEOUT, what, condition)
    }

    /// Creates the account of an agent outside the cluster, as docs/install-k3s.md describes, and returns its token.
    ///
    /// # Panics
    /// If the API server rejects it.
    pub fn external_account_token(&self, node: &str) -> String {
        let account = std::fs::read_to_string(crate::root().join("edge-manifests/outside/account.yaml"))
            .expect("the account is committed");
        self.apply_ok(&account.replace("NODE", node));
        let name = format!("lineside-node-{node}");
        let token = ["get", "secret", &name, "-n", NAMESPACE, "-o", "go-template={{.data.token | base64decode}}"];
        self.until("the token of the account", || Some(self.kubectl_ok(&token)).filter(|token| token.contains('.')))
    }

    /// The status of the node's `EdgeNode`.
    pub fn edge_node(&self) -> Value {
        self.get(&["edgenodes", &self.node, "-n", NAMESPACE])["status"].take()
    }

    /// Whether the node's agent reports no models and, if `streams` is set, no streams.
    pub fn is_idle(&self, streams: bool) -> bool {
        let status = self.edge_node();
        // Empty lists are omitted.
        let is_empty = |field: &str| status[field].as_array().is_none_or(Vec::is_empty);
        status["agent"].is_object() && is_empty("models") && (!streams || is_empty("streams"))
    }

    /// Status and reason of an object's `Ready` condition.
    pub fn ready_condition(&self, kind: &str, name: &str) -> (String, String) {
        let object = self.get(&[kind, name, "-n", NAMESPACE]);
        let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let ready = conditions.iter().find(|condition| condition["type"] == "Ready").cloned().unwrap_or_default();
        let text = |field: &str| ready[field].as_str().unwrap_or_default().to_owned();
        (text("status"), text("reason"))
    }
}
