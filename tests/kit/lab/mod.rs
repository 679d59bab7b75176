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

mod operations;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

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
        let unset = ["LINESIDE_UNREACHABLE_AFTER_SECONDS-", "LINESIDE_REMOVE_AFTER_SECONDS-"];
        drop(self.kubectl(&[&["set", "env", "deployment/lineside-controller", "-n", NAMESPACE], &unset[..]].concat()));
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
