//! How this node stands, told to the cluster: the status of its `EdgeNode`, and Events.
//!
//! The status is written when it has changed, at most every ten seconds, and once a minute in any case, so that a silent
//! agent can be told from one with nothing to say. The first after a start waits a moment for the models. Events are made of what changed between two writes, by
//! [`status_events`](crate::status_events), and are few: a burst of twenty, then one in ten seconds.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::status_events::{EventSubject, StatusEvent, is_settled, status_events};
use crate::{ClusterClient, ClusterErrorKind, ClusterEvent, ResourceKind};
use lineside_api::status::NodeStatus;
use lineside_common::clock;
use std::collections::BTreeMap;

/// Two writes are this far apart at least.
const WRITE_EVERY_MIN: Duration = Duration::from_secs(10);
/// And at most this far.
const WRITE_EVERY: Duration = Duration::from_secs(60);
/// The first word waits so long for the models to stand at most.
const SETTLE_MAX: Duration = Duration::from_secs(10);
/// Events said at once at most; what is over is in the status all the same.
const EVENTS_BURST: f64 = 20.0;
/// Time in which another Event may be said.
const EVENT_EVERY: Duration = Duration::from_secs(10);

/// How a node stands, for whoever tells others of it.
pub trait StatusSource: Send + Sync {
    /// Tells when something stands otherwise than before.
    fn follow(&self) -> watch::Receiver<()>;
    /// As it stands. It may block.
    fn get(&self) -> NodeStatus;
}

/// Uids of the objects that a node follows, by kind and name, for the Events about them.
pub type Uids = Arc<Mutex<BTreeMap<(&'static str, String), String>>>;

/// Tells until stopped.
pub async fn tell(
    cluster: Arc<ClusterClient>,
    node: String,
    board: Arc<dyn StatusSource>,
    uids: Uids,
    node_uid: Arc<Mutex<Option<String>>>,
    stop: CancellationToken,
) {
    let mut changed = board.follow();
    tokio::select! {
        () = stop.cancelled() => return,
        () = settled(&*board) => {}
        () = tokio::time::sleep(SETTLE_MAX) => {}
    }
    changed.mark_changed();
    let mut written: Option<NodeStatus> = None;
    let mut refused: Option<String> = None;
    let mut events_budget = TokenBucket { coins: EVENTS_BURST, at: Instant::now() };
    loop {
        // A pause has gone by since the last write already.
        let rest = (WRITE_EVERY - WRITE_EVERY_MIN).mul_f64(0.9 + fastrand::f64() / 10.0);
        tokio::select! {
            () = stop.cancelled() => return,
            changed = changed.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(rest) => {}
        }
        let began = Instant::now();
        let mut status = tokio::task::block_in_place(|| board.get());
        status.agent.node_uid = node_uid.lock().unwrap_or_else(PoisonError::into_inner).clone();
        status.agent.last_heartbeat_time = Some(clock::rfc3339(SystemTime::now()));
        let outcome = tokio::select! {
            () = stop.cancelled() => return,
            outcome = cluster.report(&node, &status) => outcome,
        };
        match outcome {
            Ok(uid) => {
                if refused.take().is_some() {
                    tracing::info!("the node's status is told to the cluster again");
                }
                let said = status_events(&node, written.as_ref(), &status);
                written = Some(status);
                for notice in said.into_iter().filter(|_| events_budget.take()) {
                    let was_said = tokio::select! {
                        () = stop.cancelled() => return,
                        was_said = say(&cluster, &node, uid.as_deref(), &uids, notice) => was_said,
                    };
                    // The rest is in the status all the same, and the next status must not wait for a dead link.
                    if !was_said {
                        break;
                    }
                }
            }
            Err(trouble) => {
                if trouble.is_news(&mut refused) {
                    tracing::warn!(%trouble, "the node's status could not be told to the cluster");
                }
                if trouble.kind == ClusterErrorKind::Unreachable {
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = cluster.renew() => {}
                    }
                }
                changed.mark_changed();
            }
        }
        let pause = WRITE_EVERY_MIN.saturating_sub(began.elapsed()) + WRITE_EVERY_MIN.mul_f64(fastrand::f64() / 10.0);
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Waits until the node stands as it will: a model that is still on its way in the first second after a start is no news.
async fn settled(board: &dyn StatusSource) {
    let mut changed = board.follow();
    while !tokio::task::block_in_place(|| is_settled(&board.get())) {
        if changed.changed().await.is_err() {
            return;
        }
    }
}

/// Says one. `false` when the cluster does not answer.
async fn say(cluster: &ClusterClient, node: &str, uid: Option<&str>, uids: &Uids, notice: StatusEvent) -> bool {
    let (kind, name) = match notice.subject {
        EventSubject::Node => (ResourceKind::EdgeNode, node.to_owned()),
        EventSubject::Model(name) => (ResourceKind::EdgeModel, name),
        EventSubject::Stream(name) => (ResourceKind::CameraStream, name),
    };
    let uid = match kind {
        ResourceKind::EdgeNode => uid.map(str::to_owned),
        _ => uids.lock().unwrap_or_else(PoisonError::into_inner).get(&(kind.name(), name.clone())).cloned(),
    };
    let saying =
        ClusterEvent { is_warning: notice.is_warning, reason: notice.reason, note: notice.note, kind, name, uid };
    match cluster.say(&saying).await {
        Ok(()) => true,
        Err(trouble) => {
            tracing::debug!(%trouble, reason = %saying.reason, "an Event could not be said");
            !matches!(trouble.kind, ClusterErrorKind::Unreachable | ClusterErrorKind::Busy(_))
        }
    }
}

/// What may be said: it fills with time.
struct TokenBucket {
    coins: f64,
    at: Instant,
}

impl TokenBucket {
    fn take(&mut self) -> bool {
        let now = Instant::now();
        let earned = now.duration_since(self.at).as_secs_f64() / EVENT_EVERY.as_secs_f64();
        (self.coins, self.at) = ((self.coins + earned).min(EVENTS_BURST), now);
        let has_one = self.coins >= 1.0;
        if has_one {
            self.coins -= 1.0;
        }
        has_one
    }
}
