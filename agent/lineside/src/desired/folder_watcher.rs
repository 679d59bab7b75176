//! Watches a folder of manifests: scans it periodically, reports its changes, and publishes the desired state.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lineside_common::metrics::Registrar;
use prometheus::IntGaugeVec;
use tokio::sync::{Notify, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::manifest_folder::{Finding, ManifestFolder};
use super::{DesiredObject, DesiredState, Identity};
use crate::rules_child::RuleChecker;

/// Interval of the scans.
const SCAN_INTERVAL: Duration = Duration::from_millis(500);

/// The metrics of the folder of manifests.
pub struct FolderMetrics {
    rejected: IntGaugeVec,
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
        Ok(Self { rejected })
    }
}

/// Watches one folder and publishes its desired state.
pub struct FolderWatcher {
    /// Path of the folder.
    pub folder: PathBuf,
    /// Receives the desired state.
    pub desired: watch::Sender<Option<Arc<DesiredState>>>,
    /// Requests an immediate scan.
    pub reread: Arc<Notify>,
    /// The metrics of the folder.
    pub metrics: FolderMetrics,
    /// Checks verdict rules.
    pub rules: Arc<RuleChecker>,
}

impl FolderWatcher {
    /// Scans the folder until `stop`. Each scan runs on a blocking thread, because a network file system can hang. A restarted
    /// watcher reads all files again.
    pub async fn run(&self, stop: CancellationToken) {
        let mut folder = ManifestFolder::new(&self.folder);
        let mut ticks = tokio::time::interval(SCAN_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut is_first = true;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
                () = self.reread.notified() => {}
            }
            let rules = self.rules.clone();
            let scan = tokio::task::spawn_blocking(move || {
                let findings = folder.scan(&|rule| rules.check_rule(rule));
                rules.release();
                (folder, findings)
            });
            let scanned = tokio::select! {
                () = stop.cancelled() => return,
                scanned = scan => scanned,
            };
            let findings;
            (folder, findings) = match scanned {
                Ok(scanned) => scanned,
                // The supervisor logs it and starts the watcher again.
                Err(error) => {
                    return tracing::error!(event = "manifest_scan_failed", %error, "The scan of the manifests panicked");
                }
            };
            findings.iter().for_each(|finding| self.report(finding));
            if !findings.is_empty() || is_first {
                is_first = false;
                self.desired.send_replace(Some(Arc::new(desired_state(&folder))));
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
            Finding::Rejected(path, reasons) => {
                rejected(path).set(1);
                for reason in reasons {
                    tracing::error!(
                        event = "manifest_rejected",
                        file = %path.display(),
                        reason,
                        "Manifest rejected; its last valid content remains in effect"
                    );
                }
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
        }
    }
}

fn desired_state(folder: &ManifestFolder) -> DesiredState {
    let object = |(path, object): (&Path, &lineside_api::kinds::manifest::Object)| DesiredObject {
        object: object.clone(),
        place: path.display().to_string(),
        identity: Identity::default(),
    };
    DesiredState {
        objects: folder.objects().map(object).collect(),
        is_complete: folder.is_complete(),
        ..DesiredState::default()
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}
