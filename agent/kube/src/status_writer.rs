//! The status writer: writes the node's status to its `EdgeNode`, and publishes Events.
//!
//! The status is written when it has changed, at most once in [`WRITE_EVERY_MIN`], and in any case once in
//! [`WRITE_EVERY`], so that the controller can distinguish an unreachable agent from one without changes. The first
//! write after a start waits for at most [`SETTLE_MAX`] until the models are [settled](is_settled). The Events are
//! those of the changes between two successful writes ([`status_events`]); a token bucket limits them to a burst of 20,
//! then one in ten seconds.
//!
//! `tests/suite/cluster` tests this loop against a scripted API server; unit tests cover the Events and the token
//! bucket in their modules.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::client::ClusterClient;
use crate::error::ClusterErrorKind;
use crate::event::ClusterEvent;
use crate::resource::ResourceKind;
use crate::status_events::{EventSubject, StatusEvent, is_settled, status_events};
use lineside_api::status::NodeStatus;
use lineside_common::backoff::jitter;
use lineside_common::{LogOnChange, TokenBucket, clock, error_chain};

/// The shortest time between two writes.
const WRITE_EVERY_MIN: Duration = Duration::from_secs(10);
/// The longest time between two writes.
const WRITE_EVERY: Duration = Duration::from_secs(60);
/// The longest time that the first write waits for the models.
const SETTLE_MAX: Duration = Duration::from_secs(10);
/// The most Events in a burst. What an Event that is dropped reports is in the status too.
const EVENTS_BURST: u32 = 20;
/// The time between two Events after a burst.
const EVENT_EVERY: Duration = Duration::from_secs(10);

/// The source of a node's status.
pub trait StatusSource: Send + Sync {
    /// A receiver that is notified when the status has changed.
    fn subscribe(&self) -> watch::Receiver<()>;
    /// The current status. The call may block.
    fn get(&self) -> NodeStatus;
}

/// The uids of the node's desired objects by kind and name, for the Events about them.
pub type Uids = Arc<Mutex<BTreeMap<(&'static str, String), String>>>;

/// Writes the status of one node.
pub struct StatusWriter {
    /// The client of the cluster.
    pub cluster: Arc<ClusterClient>,
    /// The node's name, which is the name of its `EdgeNode`.
    pub node: String,
    /// The source of the status.
    pub source: Arc<dyn StatusSource>,
    /// The uids of the objects that Events are about.
    pub uids: Uids,
    /// The uid of the Kubernetes `Node`, once it is known.
    pub node_uid: Arc<Mutex<Option<String>>>,
}

/// Writes the status until stopped, or until the source of the status is gone.
pub async fn write_status(writer: StatusWriter, stop: CancellationToken) {
    tokio::select! {
        () = stop.cancelled() => {}
        () = writer.run() => {}
    }
}

impl StatusWriter {
    async fn run(self) {
        let mut changed = self.source.subscribe();
        // Before this, a model that is about to be loaded would be reported as not ready after every start.
        drop(tokio::time::timeout(SETTLE_MAX, settled(&*self.source)).await);
        changed.mark_changed();
        let mut last_written: Option<NodeStatus> = None;
        let mut logged_error = LogOnChange::default();
        let mut events_budget = TokenBucket::new(EVENTS_BURST, EVENT_EVERY, std::time::Instant::now());
        loop {
            // The shortest time since the last write has passed already.
            let longest = (WRITE_EVERY - WRITE_EVERY_MIN).mul_f64(0.9);
            tokio::select! {
                changed = changed.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(longest + jitter(longest / 9)) => {}
            }
            let started = Instant::now();
            let status = self.status();
            match self.cluster.apply_node_status(&self.node, &status).await {
                Ok(uid) => {
                    if logged_error.clear() {
                        tracing::info!(
                            event = "status_write_recovered",
                            "Status of the node is written to the cluster again"
                        );
                    }
                    let events = status_events(&self.node, last_written.as_ref(), &status);
                    last_written = Some(status);
                    let events = events.into_iter().filter(|_| events_budget.take(std::time::Instant::now()));
                    self.publish(uid.as_deref(), events).await;
                }
                Err(error) => {
                    let message = error_chain(&error);
                    if logged_error.set(message.clone()) {
                        tracing::warn!(
                            event = "status_write_failed",
                            error = message,
                            "Status of the node cannot be written to the cluster"
                        );
                    }
                    if error.kind() == ClusterErrorKind::Unreachable {
                        self.cluster.reconnect().await;
                    }
                    changed.mark_changed();
                }
            }
            let pause = WRITE_EVERY_MIN.saturating_sub(started.elapsed());
            tokio::time::sleep(pause + jitter(WRITE_EVERY_MIN / 10)).await;
        }
    }

    fn status(&self) -> NodeStatus {
        let mut status = tokio::task::block_in_place(|| self.source.get());
        status.agent.node_uid = self.node_uid.lock().clone();
        status.agent.last_heartbeat_time = Some(clock::rfc3339(SystemTime::now()));
        status
    }

    /// Publishes the Events until the API server does not answer: their content is in the status too, and the next
    /// status must not wait for a dead connection. `uid` is that of the `EdgeNode`.
    async fn publish(&self, uid: Option<&str>, events: impl Iterator<Item = StatusEvent>) {
        for event in events {
            let event = self.cluster_event(uid, event);
            let Err(error) = self.cluster.publish_event(&event).await else { continue };
            tracing::debug!(error = error_chain(&error), reason = %event.reason, "Event cannot be published");
            if matches!(error.kind(), ClusterErrorKind::Unreachable | ClusterErrorKind::Busy(_)) {
                return;
            }
        }
    }

    fn cluster_event(&self, uid: Option<&str>, event: StatusEvent) -> ClusterEvent {
        let StatusEvent { is_warning, reason, note, subject } = event;
        let known_uid = |kind: ResourceKind, name: &String| self.uids.lock().get(&(kind.name(), name.clone())).cloned();
        let (kind, name, uid) = match subject {
            EventSubject::Node => (ResourceKind::EdgeNode, self.node.clone(), uid.map(str::to_owned)),
            EventSubject::Model(name) => {
                let uid = known_uid(ResourceKind::EdgeModel, &name);
                (ResourceKind::EdgeModel, name, uid)
            }
            EventSubject::Stream(name) => {
                let uid = known_uid(ResourceKind::CameraStream, &name);
                (ResourceKind::CameraStream, name, uid)
            }
        };
        ClusterEvent { is_warning, reason, note, kind, name, uid }
    }
}

/// Waits until the status is settled, or its source is gone.
async fn settled(source: &dyn StatusSource) {
    let mut changed = source.subscribe();
    while !tokio::task::block_in_place(|| is_settled(&source.get())) {
        if changed.changed().await.is_err() {
            return;
        }
    }
}
