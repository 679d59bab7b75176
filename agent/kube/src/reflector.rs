//! Following all objects of one kind: a list, then a watch from there, for ever.
//!
//! ```text
//!        ┌── no version to go on from, or the last list is 10 min old ──┐
//!        v                                                              │
//!      LIST ──> All ──> WATCH ──> Put, Removed ... ── ended by the server┤
//!        ^               │  └── trouble: back off, WATCH from where we were
//!        └── expired ────┘
//! ```
//!
//! A list costs the server much and a watch little, so there is at most one list in ten seconds whatever the server
//! answers, and a watch that broke goes on from the version it had. A watch that breaks three times in a row before
//! anything came is not believed to get over it, and a list is made. A list that is refused takes nothing away: where there
//! is a version, the watch goes on from it.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use crate::{ClusterClient, ClusterError, ClusterErrorKind, Resource, ResourceKind, WatchChange};
use lineside_common::backoff::Backoff;

/// Lists are this far apart at least.
const LIST_EVERY_MIN: Duration = Duration::from_secs(10);
/// A list is made after this even when all seems well: a watch that has lost something would never tell.
const LIST_EVERY: Duration = Duration::from_secs(600);
/// And when one was refused, while a watch can go on.
const LIST_AGAIN: Duration = Duration::from_secs(60);
/// A server that is busy is not believed to be so for longer.
const BUSY_MAX: Duration = Duration::from_secs(60);
/// Watches that break at once, one after the other, until a list is made.
const BROKEN_MAX: u32 = 3;

/// What was heard of a kind.
#[derive(Debug)]
pub enum WatchEvent {
    /// These are all objects there are.
    Listed(ResourceKind, Vec<Resource>),
    /// An object is new or not as it was.
    Updated(ResourceKind, Resource),
    /// An object is gone.
    Deleted(ResourceKind, String),
    /// The cluster cannot be listened to at present.
    Failed(ResourceKind, ClusterError),
    /// Nothing is new, and the cluster is listened to.
    Bookmark(ResourceKind),
}

/// Follows a kind until nobody listens. `doubt` asks for a new connection: the one there is may be dead without knowing.
pub async fn mirror(
    cluster: Arc<ClusterClient>,
    kind: ResourceKind,
    heard: mpsc::Sender<WatchEvent>,
    doubt: Arc<Notify>,
) {
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(15));
    let mut version: Option<String> = None;
    let mut broken = 0;
    let mut era = cluster.era();
    let mut listed: Option<Instant> = None;
    let mut list_again = Instant::now();
    while !heard.is_closed() {
        if cluster.era() != era {
            (version, era) = (None, cluster.era());
        }
        let may_watch = Instant::now() < list_again && broken < BROKEN_MAX;
        let outcome = match version.clone().filter(|_| may_watch) {
            None => {
                if let Some(listed) = listed {
                    tokio::time::sleep_until(listed + LIST_EVERY_MIN + jitter(LIST_EVERY_MIN / 5)).await;
                }
                listed = Some(Instant::now());
                broken = 0;
                match cluster.list(kind).await {
                    Ok((items, from)) => {
                        version = Some(from);
                        list_again = Instant::now() + LIST_EVERY - jitter(LIST_EVERY / 5);
                        heard.send(WatchEvent::Listed(kind, items)).await.map_err(drop).map_or(Ok(true), |()| Ok(false))
                    }
                    Err(trouble) => {
                        // A server that has no time for a list may have some for a watch, which goes on from where it was.
                        list_again = Instant::now() + LIST_AGAIN + jitter(LIST_AGAIN / 5);
                        if trouble.kind == ClusterErrorKind::Expired {
                            version = None;
                        }
                        Err(trouble)
                    }
                }
            }
            Some(from) => {
                let before = Some(from);
                let mut from = before.clone();
                let watched = tokio::select! {
                    watched = watch(&cluster, kind, &mut from, &heard) => watched,
                    () = doubt.notified() => Ok(true),
                    () = tokio::time::sleep_until(list_again) => Ok(true),
                };
                if from != before {
                    broken = 0;
                }
                version = from;
                match watched {
                    Ok(came) => Ok(!came),
                    Err(trouble) if trouble.kind == ClusterErrorKind::Expired => {
                        version = None;
                        Ok(false)
                    }
                    Err(trouble) => Err(trouble),
                }
            }
        };
        match outcome {
            Ok(is_empty_handed) => {
                // A server that ends every watch at once must not be asked in a tight loop.
                if is_empty_handed {
                    tokio::time::sleep(backoff.next_delay()).await;
                } else {
                    backoff.reset();
                    broken = 0;
                }
            }
            Err(trouble) => {
                broken += 1;
                let rest = match trouble.kind {
                    ClusterErrorKind::Busy(asked) => asked.min(BUSY_MAX),
                    ClusterErrorKind::Unreachable => {
                        cluster.renew().await;
                        Duration::ZERO
                    }
                    _ => Duration::ZERO,
                };
                if heard.send(WatchEvent::Failed(kind, trouble)).await.is_err() {
                    return;
                }
                tokio::time::sleep(backoff.next_delay().max(rest)).await;
            }
        }
    }
}

/// Watches from a version on, and keeps the version. `true` when the watch lasted or something came.
async fn watch(
    cluster: &ClusterClient,
    kind: ResourceKind,
    version: &mut Option<String>,
    heard: &mpsc::Sender<WatchEvent>,
) -> Result<bool, ClusterError> {
    let begun = Instant::now();
    let mut changes = cluster.watch(kind, version.as_deref().unwrap_or_default()).await?;
    let mut came = false;
    if heard.send(WatchEvent::Bookmark(kind)).await.is_err() {
        return Ok(true);
    }
    while let Some(change) = changes.next().await {
        let (change, next) = change?;
        let said = match change {
            WatchChange::Updated(item) => WatchEvent::Updated(kind, item),
            WatchChange::Deleted(name) => WatchEvent::Deleted(kind, name),
            WatchChange::Bookmark => {
                *version = next.or(version.take());
                continue;
            }
        };
        came = true;
        if heard.send(said).await.is_err() {
            return Ok(true);
        }
        *version = next.or(version.take());
    }
    Ok(came || begun.elapsed() > Duration::from_secs(5))
}

fn jitter(most: Duration) -> Duration {
    most.mul_f64(fastrand::f64())
}
