//! Watches a folder of manifests: scans it periodically, reports its changes, and publishes the desired state.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lineside_common::metrics::Registrar;
use parking_lot::Mutex;
use prometheus::{IntGauge, IntGaugeVec};
use tokio::sync::{Notify, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::manifest_folder::{Finding, ManifestFolder};
use super::{DesiredObject, DesiredState, Identity, file_name};
use crate::rules_child::RuleChecker;

/// Interval of the scans.
const SCAN_INTERVAL: Duration = Duration::from_millis(500);

/// The metrics of the folder of manifests.
pub struct FolderMetrics {
    rejected: IntGaugeVec,
    unreadable: IntGauge,
}

impl FolderMetrics {
    /// Registers the metrics.
    ///
    /// # Errors
    /// When a metric with the same name is already registered.
    pub fn register(registrar: &Registrar) -> Result<Self, prometheus::Error> {
        let rejected = registrar.gauges(
            "manifest_rejected",
            "Whether a manifest file is rejected; its last valid content applies.",
            &["file"],
        )?;
        let unreadable = registrar.gauge(
            "manifests_unreadable",
            "Whether the folder of manifests cannot be read; the last desired state applies.",
        )?;
        Ok(Self { rejected, unreadable })
    }
}

/// Watches one folder and publishes its desired state.
pub struct FolderWatcher {
    /// The last valid contents outlive the task: after a failure the next one continues with them.
    folder: Arc<Mutex<ManifestFolder>>,
    desired: watch::Sender<Option<Arc<DesiredState>>>,
    reread: Arc<Notify>,
    metrics: FolderMetrics,
    /// Checks verdict rules.
    rules: Arc<RuleChecker>,
}

impl FolderWatcher {
    /// A watcher of the folder at `path`. It sends the desired state to `desired`, and scans at once when it is notified by
    /// `reread`.
    pub fn new(
        path: PathBuf,
        desired: watch::Sender<Option<Arc<DesiredState>>>,
        reread: Arc<Notify>,
        metrics: FolderMetrics,
        rules: Arc<RuleChecker>,
    ) -> Self {
        Self { folder: Arc::new(Mutex::new(ManifestFolder::new(&path))), desired, reread, metrics, rules }
    }

    /// Scans the folder until `stop`. Each scan runs on a blocking thread, because a network file system can hang.
    pub async fn run(&self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(SCAN_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut is_first = true;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
                () = self.reread.notified() => {}
            }
            let (folder, rules) = (self.folder.clone(), self.rules.clone());
            let scan = tokio::task::spawn_blocking(move || {
                let mut folder = folder.lock();
                let findings = folder.scan(&|rule| rules.check_rule(rule));
                rules.release();
                // A restarted watcher publishes all the same: the findings of the last scan can be lost with its task.
                let desired = (is_first || !findings.is_empty()).then(|| desired_state(&folder));
                (findings, desired)
            });
            let scanned = tokio::select! {
                () = stop.cancelled() => return,
                scanned = scan => scanned,
            };
            let (findings, desired) = match scanned {
                Ok(scanned) => scanned,
                // The supervisor logs it and starts the watcher again.
                Err(error) => {
                    return tracing::error!(event = "manifest_scan_failed", %error, "The scan of the manifests panicked");
                }
            };
            findings.iter().for_each(|finding| self.report(finding));
            if let Some(desired) = desired {
                is_first = false;
                self.metrics.unreadable.set(desired.unreadable.is_some().into());
                self.desired.send_replace(Some(Arc::new(desired)));
            }
        }
    }

    fn report(&self, finding: &Finding) {
        let rejected = |path: &Path| self.metrics.rejected.with_label_values(&[&file_name(path)]);
        match finding {
            Finding::Accepted(path, objects) => {
                rejected(path).set(0);
                tracing::info!(event = "manifest_accepted", file = %path.display(), objects, "Manifest accepted");
            }
            Finding::Rejected(path, error) => {
                rejected(path).set(1);
                tracing::error!(
                    event = "manifest_rejected",
                    file = %path.display(),
                    reason = %error,
                    "Manifest rejected; its last valid content remains in effect"
                );
            }
            Finding::Removed(path) => {
                // The series does not exist if the file was never accepted or rejected.
                self.metrics.rejected.remove_label_values(&[&file_name(path)]).ok();
                tracing::info!(event = "manifest_removed", file = %path.display(), "Manifest removed");
            }
            Finding::Unreadable(reason) => {
                tracing::error!(
                    event = "manifests_unreadable",
                    reason,
                    "The folder of manifests cannot be read; the last desired state remains in effect"
                );
            }
            Finding::Readable => {
                tracing::info!(event = "manifests_readable", "The folder of manifests can be read again");
            }
        }
    }
}

fn desired_state(folder: &ManifestFolder) -> DesiredState {
    let unreadable = folder.unreadable().map(|reason| format!("the folder of manifests cannot be read: {reason}"));
    if !folder.is_known() {
        return DesiredState::pending(unreadable);
    }
    let object = |(path, object): (&Path, &lineside_api::kinds::manifest::Object)| DesiredObject {
        object: object.clone(),
        place: path.display().to_string(),
        identity: Identity::default(),
    };
    DesiredState {
        objects: folder.objects().map(object).collect(),
        is_complete: folder.is_complete(),
        unreadable,
        rejected_files: folder.rejected(),
        ..DesiredState::default()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[tokio::test]
    async fn the_desired_state_is_pending_until_the_folder_was_read_once() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("manifests");
        let (sender, mut desired) = watch::channel(None);
        let metrics = FolderMetrics::register(&Registrar::default()).unwrap();
        let unreadable = metrics.unreadable.clone();
        // No manifest of the test has a rule.
        let rules = Arc::new(RuleChecker::of_this_program());
        let watcher = Arc::new(FolderWatcher::new(path.clone(), sender, Arc::new(Notify::new()), metrics, rules));
        let stop = CancellationToken::new();
        let start = || {
            let (watcher, stop) = (watcher.clone(), stop.clone());
            tokio::spawn(async move { watcher.run(stop).await })
        };
        let task = start();
        let state = desired.wait_for(Option::is_some).await.unwrap().clone().unwrap();
        assert!(state.is_pending && state.unreadable.as_deref().unwrap().contains("No such file"), "{state:?}");
        assert_eq!(unreadable.get(), 1);

        fs::create_dir(&path).unwrap();
        let text = "apiVersion: lineside.dev/v1alpha1\nkind: CameraStream\nmetadata: {name: s}\n\
                    spec: {source: {uri: 'dir:f'}, model: m}\n";
        fs::write(path.join("a.yaml"), text).unwrap();
        fs::write(path.join("b.yaml"), "kind: Pod").unwrap();
        let is_known = |state: &Option<Arc<DesiredState>>| state.as_ref().is_some_and(|state| !state.is_pending);
        let state = desired.wait_for(is_known).await.unwrap().clone().unwrap();
        assert_eq!((state.objects.len(), state.rejected_files.count, state.unreadable.as_ref()), (1, 1, None));

        // A watcher that is restarted while a file is invalid still knows the last valid content of the file.
        task.abort();
        fs::write(path.join("a.yaml"), "kind: Pod").unwrap();
        let task = start();
        let both =
            |state: &Option<Arc<DesiredState>>| state.as_ref().is_some_and(|state| state.rejected_files.count == 2);
        let state = desired.wait_for(both).await.unwrap().clone().unwrap();
        assert_eq!((state.objects.len(), state.is_complete), (1, false));
        stop.cancel();
        task.await.unwrap();
    }
}
