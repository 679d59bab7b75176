//! The loop that follows the folder of manifests and says what it asks for.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::desired::manifest_folder::{Finding, Folder};
use crate::desired::{DesiredObject, DesiredState, Identity};
use lineside_common::metrics::Metrics;

/// How often the manifests are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Looks at the folder until stopped, twice a second and whenever `again` asks for it, off this task: the folder may lie on
/// a network that hangs.
pub async fn follow(
    folder: &Path,
    desired_state: watch::Sender<Option<Arc<DesiredState>>>,
    again: Arc<Notify>,
    metrics: Metrics,
    stop: CancellationToken,
) {
    let mut folder = Folder::new(folder);
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
            () = again.notified() => {}
        }
        let looking = tokio::task::spawn_blocking(move || {
            let findings = folder.look();
            (folder, findings)
        });
        let looked = tokio::select! {
            () = stop.cancelled() => return,
            looked = looking => looked,
        };
        let findings;
        (folder, findings) = match looked {
            Ok(looked) => looked,
            Err(error) => {
                return tracing::error!(%error, "looking at the manifests panicked; they are not followed any more");
            }
        };
        for finding in &findings {
            tell(finding, &metrics);
        }
        if !findings.is_empty() || desired_state.borrow().is_none() {
            desired_state.send_replace(Some(Arc::new(asked_for(&folder))));
        }
    }
}

fn asked_for(folder: &Folder) -> DesiredState {
    let wish = |(path, object): (&Path, &lineside_api::kinds::manifest::Object)| DesiredObject {
        object: object.clone(),
        place: path.display().to_string(),
        identity: Identity::default(),
    };
    DesiredState {
        objects: folder.objects().map(wish).collect(),
        is_complete: folder.is_complete(),
        ..DesiredState::default()
    }
}

fn tell(finding: &Finding, metrics: &Metrics) {
    let rejected = |path: &Path| metrics.manifest_rejected.with_label_values(&[&file_name(path)]);
    match finding {
        Finding::Accepted(path, objects) => {
            rejected(path).set(0);
            tracing::info!(file = %path.display(), objects, "manifest read");
        }
        Finding::Rejected(path, reasons) => {
            rejected(path).set(1);
            for reason in reasons {
                tracing::error!(event = "manifest_rejected", file = %path.display(), reason, "manifest refused, its last good content stays in force");
            }
        }
        Finding::Removed(path) => {
            drop(metrics.manifest_rejected.remove_label_values(&[&file_name(path)]));
            tracing::info!(file = %path.display(), "manifest removed");
        }
        Finding::Unreadable(reason) => {
            tracing::error!(reason, "the manifests cannot be read, everything stays as it is");
        }
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}
