//! A real Kubernetes cluster on this machine with one edge node, and the operations that tests perform on it. The script
//! `tests/lab/lab.sh` starts it.
//!
//! **One lab per test process.** The first test that needs the lab starts it; it ends with the test process, even if that is
//! killed (`lab.sh guard`). If the machine lacks the privileges or programs, the tests report that they are skipped; with
//! `LINESIDE_LAB=required` they fail instead.
//!
//! **Exclusive and shared use.** Starting a lab takes a minute or more, and a second one would compete for the processors, so
//! the tests share the lab with a readers-writer lock:
//!
//! - [`Lab::exclusive`] (and [`Lab::exclusive_local`] for tests that cut links or kill processes) gives a test the lab alone.
//!   A test needs this if it changes what all tests see: node labels, pods of the agent or controller, the controller's
//!   settings, the network, or results of a stream that it counts. The lab is reset before: no EdgeModels and CameraStreams
//!   exist, the node is schedulable, and the link is up.
//! - [`Lab::shared`] gives the lab to several tests at the same time. Such a test only reads, or creates objects under names
//!   that no other shared test uses, and does not depend on the absence of other objects. It may call [`Lab::install`], which
//!   has the same effect for all. After an exclusive test the lab is reset once before the next shared test.
//!
//! **External clusters.** With `LINESIDE_LAB=given` the tests use the cluster of `KUBECONFIG` instead, for example a K3s.
//! `LINESIDE_LAB_NODE` is its edge node, prepared as docs/install-k3s.md describes up to the folder of the samples, and
//! `LINESIDE_LAB_BROKER` a broker on port 1883 that the node and this machine reach. Tests that cut links or kill processes
//! are skipped. The others delete all EdgeModels and CameraStreams of the namespace `lineside`, and label the node.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use serde_json::Value;

use crate::broker::ConnectOptions;
use crate::paho::Paho;
use crate::process::output_text;
use crate::utf8;
use crate::wait::until_within;

/// The edge node of the local lab.
pub const NODE: &str = "edge-1";
/// The namespace of Lineside.
pub const NAMESPACE: &str = "lineside";
/// The address of the broker, which runs next to the node and outside the cluster.
const BROKER: &str = "10.98.1.1";
/// The limit for waits that involve the start or end of pods.
const POD_TIMEOUT: Duration = Duration::from_secs(120);

/// The kubectl for an external cluster.
const KUBECTL: &str = "target/lab/bin/kubectl";

static LAB: RwLock<Slot> = RwLock::new(Slot { lab: None, is_used: false, start_failure: None });

/// The lab of this test process.
struct Slot {
    lab: Option<Lab>,
    /// Whether an exclusive test has used the lab since the last reset.
    is_used: bool,
    /// Why the lab did not start; it is not tried again.
    start_failure: Option<String>,
}

/// The use of the lab, until this is dropped.
pub struct Lease(Guard);

enum Guard {
    Exclusive(RwLockWriteGuard<'static, Slot>),
    Shared(RwLockReadGuard<'static, Slot>),
}

impl std::ops::Deref for Lease {
    type Target = Lab;

    fn deref(&self) -> &Lab {
        let slot: &Slot = match &self.0 {
            Guard::Exclusive(slot) => slot,
            Guard::Shared(slot) => slot,
        };
        slot.lab.as_ref().expect("a lease refers to a started lab")
    }
}

/// A cluster with one edge node and a broker next to it.
pub struct Lab {
    node: String,
    broker: String,
    /// `None` for an external cluster.
    local: Option<LocalLab>,
}

/// The part of a lab that exists only on this machine.
struct LocalLab {
    folder: PathBuf,
    /// Stops the lab when its standard input is closed, which happens when this process ends.
    _guard: Child,
}

/// The value of `LINESIDE_LAB`.
fn mode() -> String {
    std::env::var("LINESIDE_LAB").unwrap_or_default()
}

/// Why this machine cannot run a lab; `None` if it can.
fn unavailable() -> Option<String> {
    if mode() == "given" {
        return (!crate::root().join(KUBECTL).exists()).then(|| "kubectl is missing; run `make lab-tools`".to_owned());
    }
    let is_root = Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.starts_with(b"0\n"));
    if !is_root {
        return Some("root privileges are required".to_owned());
    }
    for program in ["containerd", "runc", "ip", "nft", "conntrack", "nsenter", "ctr", "cc", "faketime", "dnsmasq"] {
        let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output();
        if !found.is_ok_and(|output| output.status.success()) {
            return Some(format!("{program} is missing; run `make lab-tools`"));
        }
    }
    let may = Command::new("unshare").args(["--net", "--mount", "true"]).stderr(Stdio::null()).status();
    if !may.is_ok_and(|status| status.success()) {
        return Some("this machine does not permit network and mount namespaces".to_owned());
    }
    ["target/lab/lab", "target/lab/lineside.oci.tar"]
        .into_iter()
        .find(|file| !crate::root().join(file).exists())
        .map(|file| format!("{file} is missing; run `make lab-tools`"))
}

impl Lab {
    /// The lab for one test alone, after a reset. `None` if this machine cannot run a lab.
    ///
    /// # Panics
    /// If the lab does not start; also if `LINESIDE_LAB` requires one and this machine cannot run it.
    pub fn exclusive() -> Option<Lease> {
        let mut slot = Self::prepared(true)?;
        slot.is_used = true;
        Some(Lease(Guard::Exclusive(slot)))
    }

    /// Like [`Lab::exclusive`], for a test that cuts links or kills processes; `None` for an external cluster.
    ///
    /// # Panics
    /// As [`Lab::exclusive`].
    pub fn exclusive_local() -> Option<Lease> {
        if mode() == "given" {
            skip("the test cuts links or kills processes, which is not possible on an external cluster");
            return None;
        }
        Self::exclusive()
    }

    /// The lab together with other shared tests. `None` if this machine cannot run a lab.
    ///
    /// # Panics
    /// As [`Lab::exclusive`].
    pub fn shared() -> Option<Lease> {
        let slot = LAB.read().unwrap_or_else(PoisonError::into_inner);
        if slot.lab.is_some() && !slot.is_used {
            return Some(Lease(Guard::Shared(slot)));
        }
        drop(slot);
        let slot = Self::prepared(false)?;
        // Without a gap in which an exclusive test could take the lab.
        Some(Lease(Guard::Shared(RwLockWriteGuard::downgrade(slot))))
    }

    /// Locks the lab exclusively, starts it if it does not run yet, and resets it if `reset` is set or an exclusive test
    /// has used it.
    fn prepared(reset: bool) -> Option<RwLockWriteGuard<'static, Slot>> {
        if let Some(reason) = unavailable() {
            assert!(mode().is_empty(), "no lab: {reason}");
            skip(&reason);
            return None;
        }
        let mut slot = LAB.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(lab) = &slot.lab {
            if reset || slot.is_used {
                lab.reset();
            }
        } else if slot.start_failure.is_none() {
            // A machine may have all programs and still not permit a kubelet; this is reported and tried only once.
            match std::panic::catch_unwind(Self::start) {
                Ok(lab) => slot.lab = Some(lab),
                Err(_) => slot.start_failure = Some("it does not start on this machine; see above".to_owned()),
            }
        }
        if let Some(reason) = &slot.start_failure {
            assert!(mode().is_empty(), "no lab: {reason}");
            skip(reason);
            return None;
        }
        slot.is_used = false;
        Some(slot)
    }

    fn start() -> Self {
        if mode() == "given" {
            let variable =
                |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("LINESIDE_LAB=given requires {name}"));
            drop(variable("KUBECONFIG"));
            let lab =
                Self { node: variable("LINESIDE_LAB_NODE"), broker: variable("LINESIDE_LAB_BROKER"), local: None };
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
            .expect("the folder is writable");
        run(script_at(&folder, "daemon", &["broker", NODE, "mosquitto", "-c", utf8(&broker)]));
        let lab =
            Self { node: NODE.to_owned(), broker: BROKER.to_owned(), local: Some(LocalLab { folder, _guard: guard }) };
        let data = lab.data();
        let quickstart = data.join("quickstart/frames");
        std::fs::create_dir_all(&quickstart).expect("the folder is writable");
        std::fs::copy(crate::example("surface-defects.onnx"), data.join("quickstart/surface-defects.onnx"))
            .expect("the example is committed");
        for frame in std::fs::read_dir(crate::example("frames")).expect("the example is committed").flatten() {
            std::fs::copy(frame.path(), quickstart.join(frame.file_name())).expect("the folder is writable");
        }
        lab
    }

    /// Restores the initial state after a test, whether it passed or failed.
    fn reset(&self) {
        if self.local.is_some() {
            self.wan("up");
        }
        until_within(POD_TIMEOUT, "the API server to answer", || {
            self.kubectl(&["get", "--raw", "/readyz"]).status.success().then_some(())
        });
        if self.kubectl(&["get", "crd", "edgemodels.lineside.dev"]).status.success() {
            self.kubectl_ok(&["delete", "edgemodels,camerastreams", "--all", "-n", NAMESPACE]);
        }
        self.kubectl_ok(&["uncordon", &self.node]);
        // A failed test may have left these settings of the controller.
        let unset = ["LINESIDE_SILENT_AFTER_SECONDS-", "LINESIDE_GONE_AFTER_SECONDS-"];
        drop(self.kubectl(&[&["set", "env", "deployment/lineside-controller", "-n", NAMESPACE], &unset[..]].concat()));
    }

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

/// Reports that a test is skipped. It writes to stderr directly, as the test runner hides the output of a passed test.
fn skip(reason: &str) {
    drop(writeln!(std::io::stderr(), "skipped, the test needs a lab: {reason}"));
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
    assert!(output.status.success(), "{command:?}: {}", output_text(&output));
}
