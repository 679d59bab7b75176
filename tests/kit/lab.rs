//! A real Kubernetes on this machine, with one edge node, and what the tests do with it. `tests/lab/lab.sh` makes it.
//!
//! With `LINESIDE_LAB=given` it is the cluster of `KUBECONFIG` instead, such as a K3s: `LINESIDE_LAB_NODE` is its edge node,
//! prepared as docs/install-k3s.md says up to the samples' folder, and `LINESIDE_LAB_BROKER` a broker at port 1883 that both
//! the node and this machine reach. Tests that pull links and end processes do nothing there. The others remove all
//! EdgeModels and CameraStreams of the namespace `lineside`, and label the node.
//!
//! All tests of a run share one lab and take turns: whoever holds it has it alone. It is started when it is first asked for
//! and ends with the test process, however that ends. Where the machine lacks the rights or the programs, there is no lab,
//! and the test says so and does nothing.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use serde_json::Value;

use crate::broker::Access;
use crate::paho::Paho;
use crate::plant::utf8;
use crate::wait::until_within;

/// The edge node of the lab.
pub const NODE: &str = "edge-1";
/// Our namespace.
pub const NAMESPACE: &str = "lineside";
/// Where the broker listens, beside the node and outside of the cluster.
const BROKER: &str = "10.98.1.1";
/// Long enough for a pod to come or go on a busy machine.
const POD_BOUND: Duration = Duration::from_secs(120);

/// What a cluster that was given is asked with.
const KUBECTL: &str = "target/lab/bin/kubectl";

static LAB: Mutex<Option<Lab>> = Mutex::new(None);

/// The lab, for as long as this is held.
pub struct Lease(MutexGuard<'static, Option<Lab>>);

impl std::ops::Deref for Lease {
    type Target = Lab;

    fn deref(&self) -> &Lab {
        self.0.as_ref().expect("a lease is of a lab")
    }
}

/// A cluster with one edge node and a broker beside it.
pub struct Lab {
    node: String,
    broker: String,
    /// `None` is a cluster that was given.
    own: Option<Own>,
}

/// What there is of a lab on this machine.
struct Own {
    folder: PathBuf,
    /// Ends the lab when its input ends, which it does with this process.
    _guard: Child,
}

fn mode() -> String {
    std::env::var("LINESIDE_LAB").unwrap_or_default()
}

/// Why there is no lab on this machine; `None` where there can be one.
fn missing() -> Option<String> {
    if mode() == "given" {
        return (!crate::root().join(KUBECTL).exists()).then(|| "there is no kubectl; run `make lab-tools`".to_owned());
    }
    let is_root = Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.starts_with(b"0\n"));
    if !is_root {
        return Some("it takes root".to_owned());
    }
    for program in ["containerd", "runc", "ip", "nft", "conntrack", "nsenter", "ctr", "cc", "faketime", "dnsmasq"] {
        let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output();
        if !found.is_ok_and(|output| output.status.success()) {
            return Some(format!("{program} is missing; run `make lab-tools`"));
        }
    }
    let may = Command::new("unshare").args(["--net", "--mount", "true"]).stderr(Stdio::null()).status();
    if !may.is_ok_and(|status| status.success()) {
        return Some("this machine does not permit namespaces".to_owned());
    }
    ["target/lab/lab", "target/lab/lineside.oci.tar"]
        .into_iter()
        .find(|file| !crate::root().join(file).exists())
        .map(|file| format!("{file} is missing; run `make lab-tools`"))
}

impl Lab {
    /// The lab, in turn, with nothing of ours in it but what a test before has left applied on purpose: objects are gone
    /// and the link is up. `None` where this machine can have none.
    ///
    /// # Panics
    /// When it does not come up; also when `LINESIDE_LAB` asks for one and there can be none.
    pub fn take() -> Option<Lease> {
        if let Some(reason) = missing() {
            assert!(mode().is_empty(), "there is no lab: {reason}");
            skip(&reason);
            return None;
        }
        let mut place = LAB.lock().unwrap_or_else(PoisonError::into_inner);
        match place.as_ref() {
            None => {
                // A machine may have all the programs and still not let a kubelet be; that is said, and tried once.
                static FAILED: OnceLock<String> = OnceLock::new();
                if FAILED.get().is_none() {
                    match std::panic::catch_unwind(Self::start) {
                        Ok(lab) => *place = Some(lab),
                        Err(_) => drop(FAILED.set("it does not come up here; see above".to_owned())),
                    }
                }
                if let Some(reason) = FAILED.get() {
                    assert!(mode().is_empty(), "there is no lab: {reason}");
                    skip(reason);
                    return None;
                }
            }
            Some(lab) => lab.reset(),
        }
        Some(Lease(place))
    }

    /// The same for a test that lays hands on the node and its links.
    ///
    /// # Panics
    /// As [`Lab::take`].
    pub fn take_own() -> Option<Lease> {
        if mode() == "given" {
            skip("the cluster was given, and this test pulls links and ends processes");
            return None;
        }
        Self::take()
    }

    fn start() -> Self {
        if mode() == "given" {
            let told = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("LINESIDE_LAB=given needs {name}"));
            drop(told("KUBECONFIG"));
            let lab = Self { node: told("LINESIDE_LAB_NODE"), broker: told("LINESIDE_LAB_BROKER"), own: None };
            lab.reset();
            return lab;
        }
        let folder = tempfile::Builder::new().prefix("ll-").tempdir().expect("a temporary folder").keep();
        let guard = script(&folder, &["guard"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the script starts");
        run(script(&folder, &["up"]));
        run(script_at(&folder, "node", &[NODE, "1"]));
        run(script_at(&folder, "image", &[NODE, utf8(&crate::root().join("target/lab/lineside.oci.tar"))]));
        let broker = folder.join("mosquitto.conf");
        std::fs::write(&broker, format!("listener 1883 {BROKER}\nallow_anonymous true\nmax_queued_messages 0\n"))
            .expect("the folder is ours");
        run(script_at(&folder, "daemon", &["broker", NODE, "mosquitto", "-c", utf8(&broker)]));
        let lab = Self { node: NODE.to_owned(), broker: BROKER.to_owned(), own: Some(Own { folder, _guard: guard }) };
        let data = lab.data();
        let quickstart = data.join("quickstart/frames");
        std::fs::create_dir_all(&quickstart).expect("the folder is ours");
        std::fs::copy(crate::example("surface-defects.onnx"), data.join("quickstart/surface-defects.onnx"))
            .expect("the example is committed");
        for frame in std::fs::read_dir(crate::example("frames")).expect("the example is committed").flatten() {
            std::fs::copy(frame.path(), quickstart.join(frame.file_name())).expect("the folder is ours");
        }
        lab
    }

    /// After a test, however it ended.
    fn reset(&self) {
        if self.own.is_some() {
            self.wan("up");
        }
        until_within(POD_BOUND, "the API server to answer", || {
            self.kubectl(&["get", "--raw", "/readyz"]).status.success().then_some(())
        });
        if self.kubectl(&["get", "crd", "edgemodels.lineside.dev"]).status.success() {
            self.done(&["delete", "edgemodels,camerastreams", "--all", "-n", NAMESPACE]);
        }
        self.done(&["uncordon", &self.node]);
        // A test that failed half-way may have left these.
        let patience = ["LINESIDE_SILENT_AFTER_SECONDS-", "LINESIDE_GONE_AFTER_SECONDS-"];
        drop(
            self.kubectl(&[&["set", "env", "deployment/lineside-controller", "-n", NAMESPACE], &patience[..]].concat()),
        );
    }

    /// The node's folder `/var/lib/lineside`.
    pub fn data(&self) -> PathBuf {
        self.folder().join(NODE).join("data")
    }

    /// A kubeconfig of the administrator.
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder().join("admin.kubeconfig")
    }

    /// A program that runs where the node's network is, or that of the `center`; of a cluster that was given, here.
    pub fn within(&self, place: &str, program: &[&str]) -> Command {
        let Some(own) = &self.own else {
            let kubectl = crate::root().join(KUBECTL);
            let mut command = Command::new(if program[0] == "kubectl" { utf8(&kubectl) } else { program[0] });
            command.args(&program[1..]);
            return command;
        };
        script_at(&own.folder, "exec", &[&[place], program].concat())
    }

    /// Runs kubectl.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn kubectl(&self, arguments: &[&str]) -> Output {
        self.within("center", &[&["kubectl"], arguments].concat()).output().expect("kubectl starts")
    }

    /// Runs kubectl for what must succeed, and returns what it prints.
    ///
    /// # Panics
    /// When it fails.
    pub fn done(&self, arguments: &[&str]) -> String {
        let output = self.kubectl(arguments);
        assert!(output.status.success(), "kubectl {arguments:?}: {}", said(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// An object as JSON; null where there is none.
    ///
    /// # Panics
    /// When kubectl prints no JSON.
    pub fn get(&self, arguments: &[&str]) -> Value {
        let output = self.kubectl(&[&["get"], arguments, &["-o", "json", "--ignore-not-found"]].concat());
        match output.stdout.is_empty() {
            true => Value::Null,
            false => serde_json::from_slice(&output.stdout).expect("kubectl prints JSON"),
        }
    }

    /// Applies a text, which may be refused; the output says how.
    ///
    /// # Panics
    /// When kubectl cannot be started.
    pub fn apply(&self, text: &str) -> Output {
        let mut kubectl = self.within("center", &["kubectl", "apply", "-f", "-"]);
        let mut child = kubectl
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kubectl starts");
        child.stdin.take().expect("stdin is piped").write_all(text.as_bytes()).expect("kubectl reads");
        child.wait_with_output().expect("kubectl ends")
    }

    /// Changes fields of an object's spec; it may be refused, and the output says how.
    ///
    /// # Panics
    /// When kubectl cannot be started.
    pub fn patch(&self, kind: &str, name: &str, spec: &Value) -> Output {
        let patch = serde_json::json!({ "spec": spec }).to_string();
        self.kubectl(&["patch", kind, name, "-n", NAMESPACE, "--type=merge", "--patch", &patch])
    }

    /// The same for what must be taken.
    ///
    /// # Panics
    /// When it is refused.
    pub fn patched(&self, kind: &str, name: &str, spec: &Value) {
        let output = self.patch(kind, name, spec);
        assert!(output.status.success(), "{kind} {name} {spec}: {}", said(&output));
    }

    /// Applies a text that must be taken.
    ///
    /// # Panics
    /// When it is refused.
    pub fn applied(&self, text: &str) {
        let output = self.apply(text);
        assert!(output.status.success(), "{}", said(&output));
    }

    /// Applies the overlay with this site's settings, on the labelled node, and waits until its pods are ready.
    ///
    /// # Panics
    /// When they do not become ready.
    pub fn install(&self) {
        self.apply_overlay(&[]);
        self.done(&["label", "node", &self.node, "--overwrite", "lineside.dev/edge=true", "lineside.dev/line=a"]);
        self.settled();
    }

    /// Waits until the agent's DaemonSet and the controllers are as asked.
    ///
    /// # Panics
    /// When they do not become so.
    pub fn settled(&self) {
        for what in ["daemonset/lineside-agent", "deployment/lineside-controller"] {
            let output = self.kubectl(&["rollout", "status", what, "-n", NAMESPACE, "--timeout=120s"]);
            if !output.status.success() {
                let pods = self.kubectl(&["describe", "pods", "-n", NAMESPACE]);
                let logs = self.kubectl(&["logs", what, "-n", NAMESPACE, "--tail=40"]);
                panic!("{what} does not settle: {}{}{}", said(&output), said(&pods), said(&logs));
            }
        }
    }

    /// Applies the overlay `k3s-amd64` with the lab's broker; `more` are further lines of the kustomization.
    ///
    /// # Panics
    /// When it is refused.
    pub fn apply_overlay(&self, more: &[&str]) -> String {
        // Kustomize reads nothing by absolute paths, so the site's overlay lies beside ours.
        let folder = tempfile::Builder::new()
            .prefix("site-")
            .tempdir_in(crate::root().join("target/lab"))
            .expect("the folder is ours");
        let mut config = std::fs::read_to_string(crate::root().join("edge-manifests/base/agent-config.yaml"))
            .expect("the base is committed")
            .replace("site: default", "site: plant");
        // The lab's own plant has a DNS that knows the name.
        if !self.is_own() {
            config = config.replace("mqtt.plant.local", &self.broker);
        }
        std::fs::write(folder.path().join("agent-config.yaml"), config).expect("the folder is ours");
        let kustomization = format!(
            "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n\
             resources: [../../../edge-manifests/overlays/k3s-amd64]\n\
             configMapGenerator:\n  - name: lineside-agent\n    namespace: lineside\n    behavior: merge\n    files: [agent-config.yaml]\n{}\n",
            more.join("\n")
        );
        std::fs::write(folder.path().join("kustomization.yaml"), kustomization).expect("the folder is ours");
        self.done(&["apply", "-k", utf8(folder.path())])
    }

    /// Applies the samples of `edge-manifests/samples`, the model with a version that no test before has used, which is
    /// returned: a node remembers the highest version it has seen, and the tests share the node. Ten above it are free.
    ///
    /// # Panics
    /// When they are refused.
    pub fn apply_samples(&self) -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let version = NEXT.fetch_add(10, Ordering::Relaxed);
        let samples = crate::root().join("edge-manifests/samples");
        let read = |name: &str| std::fs::read_to_string(samples.join(name)).expect("the samples are committed");
        let model = read("edgemodel.yaml").replace("\n  version: 1\n", &format!("\n  version: {version}\n"));
        let stream = read("camerastream.yaml").replace("nodeName: edge-1", &format!("nodeName: {}", self.node));
        self.applied(&format!("{model}---\n{stream}"));
        version
    }

    /// Plugs or pulls (`up` or `down`) the node's link to the control plane.
    pub fn wan(&self, way: &str) {
        run(script_at(self.folder(), "wan", &[NODE, way]));
    }

    /// Ends the API server and starts it again.
    pub fn restart_api(&self) {
        run(script_at(self.folder(), "restart", &["api"]));
    }

    /// A subscriber to everything of the node, beside the node and outside of the cluster, with a session.
    pub fn subscribe(&self, session: &str) -> Paho {
        let access = Access { host: self.broker.clone(), ..Access::at(1883) };
        Paho::start_by(self.within(NODE, &[utf8(&crate::python())]), &access, "lineside/v1/plant/#", Some(session))
    }

    /// The edge node's name.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The API server's address.
    ///
    /// # Panics
    /// When kubectl does not know it.
    pub fn server(&self) -> String {
        self.done(&["config", "view", "--minify", "-o", "jsonpath={.clusters[0].cluster.server}"])
    }

    /// Where all of it lies.
    ///
    /// # Panics
    /// When the cluster was given.
    pub fn folder(&self) -> &Path {
        &self.own.as_ref().expect("the test takes a lab of its own").folder
    }

    /// Whether it runs on this machine.
    pub fn is_own(&self) -> bool {
        self.own.is_some()
    }

    /// The broker's host, for a client on the node.
    pub fn broker_host(&self) -> &str {
        &self.broker
    }

    /// The broker's address, for an agent.
    pub fn broker(&self) -> String {
        format!("mqtt://{}:1883", self.broker)
    }

    /// The node's agent's pod; null where there is none.
    pub fn agent_pod(&self) -> Value {
        let pods = self.get(&["pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/name=lineside-agent"]);
        let mut pods = pods["items"].as_array().into_iter().flatten();
        pods.find(|pod| pod["metadata"]["deletionTimestamp"].is_null()).cloned().unwrap_or_default()
    }

    /// The process of a pod's only container, and its containerd id.
    ///
    /// # Panics
    /// When the pod runs none.
    pub fn process(&self, pod: &Value) -> (u32, String) {
        let id = pod["status"]["containerStatuses"][0]["containerID"].as_str().unwrap_or_default();
        let id = id.trim_start_matches("containerd://").to_owned();
        let tasks = self.ctr(&["tasks", "list"]);
        let pid = tasks.lines().find(|line| line.starts_with(&id)).and_then(|line| line.split_whitespace().nth(1));
        (pid.and_then(|pid| pid.parse().ok()).unwrap_or_else(|| panic!("no process of {id} in\n{tasks}")), id)
    }

    /// Runs containerd's own client on the node.
    ///
    /// # Panics
    /// When it fails.
    pub fn ctr(&self, arguments: &[&str]) -> String {
        let socket = self.folder().join(NODE).join("run/containerd.sock");
        let output = Command::new("ctr")
            .args(["--address", utf8(&socket), "--namespace", "k8s.io"])
            .args(arguments)
            .output()
            .expect("ctr starts");
        assert!(output.status.success(), "ctr {arguments:?}: {}", said(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The control group of a container's memory.
    ///
    /// # Panics
    /// When it has none.
    pub fn memory_group(&self, pid: u32) -> PathBuf {
        let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("the process is there");
        let of = |controller: &str| groups.lines().find_map(|line| Some(line.split_once(controller)?.1.to_owned()));
        // The second is cgroups v2, which has one tree.
        let (root, path) = match of(":memory:") {
            Some(path) => ("/sys/fs/cgroup/memory", path),
            None => ("/sys/fs/cgroup", of("0::").expect("the process is in a control group")),
        };
        Path::new(root).join(path.trim_start_matches('/'))
    }

    /// Looks until there is something, for what takes pods.
    ///
    /// # Panics
    /// When a generous bound is over.
    pub fn until<T>(&self, what: &str, look: impl FnMut() -> Option<T>) -> T {
        until_within(POD_BOUND, what, look)
    }

    /// Makes the account of an agent that is in no pod, as docs/install-k3s.md does, and returns a token of it.
    ///
    /// # Panics
    /// When it is refused.
    pub fn outsider(&self, node: &str) -> String {
        let account = std::fs::read_to_string(crate::root().join("edge-manifests/outside/account.yaml"))
            .expect("the account is committed");
        self.applied(&account.replace("NODE", node));
        let name = format!("lineside-node-{node}");
        let token = ["get", "secret", &name, "-n", NAMESPACE, "-o", "go-template={{.data.token | base64decode}}"];
        self.until("the account's token", || Some(self.done(&token)).filter(|token| token.contains('.')))
    }

    /// The status of the node's `EdgeNode`.
    pub fn edge_node(&self) -> Value {
        self.get(&["edgenodes", &self.node, "-n", NAMESPACE])["status"].take()
    }

    /// Whether the node's agent says that it runs no models and, with `streams`, no streams.
    pub fn runs_nothing(&self, streams: bool) -> bool {
        let status = self.edge_node();
        // What is empty is left out.
        let is_empty = |field: &str| status[field].as_array().is_none_or(Vec::is_empty);
        status["agent"].is_object() && is_empty("models") && (!streams || is_empty("streams"))
    }

    /// The condition `Ready` of an object: status and reason.
    pub fn ready(&self, kind: &str, name: &str) -> (String, String) {
        let object = self.get(&[kind, name, "-n", NAMESPACE]);
        let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let ready = conditions.iter().find(|condition| condition["type"] == "Ready").cloned().unwrap_or_default();
        let text = |field: &str| ready[field].as_str().unwrap_or_default().to_owned();
        (text("status"), text("reason"))
    }
}

/// Says that a test does nothing here; past the test runner, which keeps for itself what a test that passes prints.
fn skip(reason: &str) {
    drop(writeln!(std::io::stderr(), "skipped, for there is no lab of this machine: {reason}"));
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn script(folder: &Path, verb: &[&str]) -> Command {
    script_at(folder, verb[0], &verb[1..])
}

fn script_at(folder: &Path, verb: &str, rest: &[&str]) -> Command {
    let mut command = Command::new(crate::root().join("tests/lab/lab.sh"));
    command.arg(verb).arg(folder).args(rest).env("LINESIDE_LAB_PROGRAM", crate::root().join("target/lab/lab"));
    command
}

fn run(mut command: Command) {
    let output = command.stdin(Stdio::null()).output().expect("the script starts");
    assert!(output.status.success(), "{command:?}: {}", said(&output));
}
