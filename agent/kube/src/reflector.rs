//! The reflector: lists all objects of one kind, then watches them from the resource version of the list, until
//! stopped.
//!
//! ```text
//!        ┌── no resource version, or the last list is 10 min old ───────┐
//!        v                                                              │
//!      LIST ──> Listed ──> WATCH ──> Updated, Deleted ── ended by server┤
//!        ^                   │  └── error: back off, WATCH again ────────┘
//!        └── 410 Expired ────┘
//! ```
//!
//! A list is expensive for the API server and a watch is cheap. The invariant is therefore: **at most one list in
//! [`LIST_EVERY_MIN`], whatever the server answers.** A watch that broke continues from the resource version that it
//! had reached. After [`FAILED_WATCHES_MAX`] watches in a row that broke without a change, a list is made, since
//! the resource version may be the cause. A list that fails discards nothing: if there is a resource version, the watch
//! continues from it.
//!
//! # Why not `kube::runtime::watcher`
//! Its state machine (version 5.0) does not keep this invariant, and a caller cannot add it from outside:
//! - It reopens a watch that the server ended without an error within the same poll. A server or proxy that ends every
//!   watch at once is called in a loop without a pause; there is no event between two calls that a backoff could delay.
//! - A 410 leads to a list as soon as the caller's backoff allows: 0.8 s to 30 s by default, starting over after two
//!   minutes without an error. A server that expires every watch costs a full list for every node of the fleet each
//!   time.
//! - An HTTP 410 in answer to the watch request itself, unlike one inside the stream, leads to no list.
//! - It keeps one client. Here the connection, its credentials and its context are replaced between calls, and another
//!   context invalidates the resource version.
//! - It never lists again while the watch seems healthy. Here a list every [`LIST_EVERY`] repairs what a watch lost.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, sleep_until};

use crate::client::ClusterClient;
use crate::error::{ClusterError, ClusterErrorKind};
use crate::resource::{Resource, ResourceKind, WatchChange, WatchChanges};
use lineside_common::backoff::{Backoff, jitter};

/// The shortest time between two lists.
const LIST_EVERY_MIN: Duration = Duration::from_secs(10);
/// The longest time between two lists: a watch does not report what it lost.
const LIST_EVERY: Duration = Duration::from_secs(600);
/// The time until the next list after a failed one, while a watch can continue.
const LIST_RETRY: Duration = Duration::from_secs(60);
/// The longest pause for which a busy server is left alone, whatever its `Retry-After`.
const BUSY_MAX: Duration = Duration::from_secs(60);
/// The number of failed watches in a row that leads to a list.
const FAILED_WATCHES_MAX: u32 = 3;
/// A watch that lasted for longer was healthy.
const WATCH_HEALTHY_AFTER: Duration = Duration::from_secs(5);
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
const BACKOFF_CAP: Duration = Duration::from_secs(15);

/// What a reflector reports about its kind.
#[derive(Debug)]
pub enum WatchEvent {
    /// All objects of the kind; objects that are not in the list do not exist any more.
    Listed(ResourceKind, Vec<Resource>),
    /// An object was created or modified.
    Updated(ResourceKind, Resource),
    /// The object of this name was deleted.
    Deleted(ResourceKind, String),
    /// A list or watch failed and is retried.
    Failed(ResourceKind, ClusterError),
    /// A watch was opened: the objects are being followed, and none changed.
    Bookmark(ResourceKind),
}

/// What a reflector needs of a client. Tests implement it with scripted answers.
pub trait ListWatch: Send + Sync + 'static {
    /// See [`ClusterClient::context_generation`].
    fn context_generation(&self) -> u64;
    /// See [`ClusterClient::list`].
    fn list(&self, kind: ResourceKind) -> impl Future<Output = Result<(Vec<Resource>, String), ClusterError>> + Send;
    /// See [`ClusterClient::watch`].
    fn watch(
        &self,
        kind: ResourceKind,
        resource_version: &str,
    ) -> impl Future<Output = Result<WatchChanges, ClusterError>> + Send;
    /// See [`ClusterClient::reconnect`].
    fn reconnect(&self) -> impl Future<Output = ()> + Send;
}

impl ListWatch for ClusterClient {
    fn context_generation(&self) -> u64 {
        self.context_generation()
    }

    async fn list(&self, kind: ResourceKind) -> Result<(Vec<Resource>, String), ClusterError> {
        self.list(kind).await
    }

    async fn watch(&self, kind: ResourceKind, resource_version: &str) -> Result<WatchChanges, ClusterError> {
        self.watch(kind, resource_version).await
    }

    async fn reconnect(&self) {
        self.reconnect().await;
    }
}

/// Lists and watches a kind until the receiver of `events` is dropped. A notification of `rewatch` ends the current
/// watch and opens a new one from the same resource version: for when the connection was replaced, or may be dead
/// without an error.
pub async fn reflect(
    client: Arc<impl ListWatch>,
    kind: ResourceKind,
    events: mpsc::Sender<WatchEvent>,
    rewatch: Arc<Notify>,
) {
    let mut reflector = Reflector {
        context_generation: client.context_generation(),
        client,
        kind,
        events,
        rewatch,
        backoff: Backoff::new(BACKOFF_FIRST, BACKOFF_CAP),
        resource_version: None,
        failed_watches: 0,
        last_list: None,
        next_list: Instant::now(),
    };
    while !reflector.events.is_closed() {
        reflector.step().await;
    }
}

/// The outcome of a list or watch that did not fail.
#[derive(Clone, Copy, PartialEq, Eq)]
enum StepOutcome {
    /// A list was made, or the watch lasted for a while.
    Healthy,
    /// The watch delivered something and ended soon after it was opened.
    Brief,
    /// The watch ended soon and delivered nothing.
    Empty,
}

struct Reflector<C> {
    client: Arc<C>,
    kind: ResourceKind,
    events: mpsc::Sender<WatchEvent>,
    rewatch: Arc<Notify>,
    backoff: Backoff,
    /// Where the next watch continues. `None`: a list is needed.
    resource_version: Option<String>,
    context_generation: u64,
    /// Failed watches since the last list or change.
    failed_watches: u32,
    last_list: Option<Instant>,
    /// When the next list is due even if the watch is healthy.
    next_list: Instant,
}

impl<C: ListWatch> Reflector<C> {
    /// One list or watch, and the pause after it.
    async fn step(&mut self) {
        let context_generation = self.client.context_generation();
        if context_generation != self.context_generation {
            (self.resource_version, self.context_generation) = (None, context_generation);
        }
        let may_watch = Instant::now() < self.next_list && self.failed_watches < FAILED_WATCHES_MAX;
        let outcome = match self.resource_version.clone().filter(|_| may_watch) {
            None => self.list().await,
            Some(resource_version) => self.watch(resource_version).await,
        };
        match outcome {
            Ok(StepOutcome::Healthy) => {
                self.backoff.reset();
                self.failed_watches = 0;
            }
            // A server that ends every watch at once must not be called in a loop without a pause, even if it delivers
            // something.
            Ok(StepOutcome::Brief) => {
                self.backoff.reset();
                self.failed_watches = 0;
                sleep(self.backoff.next_delay()).await;
            }
            Ok(StepOutcome::Empty) => sleep(self.backoff.next_delay()).await,
            Err(error) => self.back_off(error).await,
        }
    }

    async fn list(&mut self) -> Result<StepOutcome, ClusterError> {
        if let Some(last_list) = self.last_list {
            sleep_until(last_list + LIST_EVERY_MIN + jitter(LIST_EVERY_MIN / 5)).await;
        }
        self.last_list = Some(Instant::now());
        self.failed_watches = 0;
        match self.client.list(self.kind).await {
            Ok((items, resource_version)) => {
                self.resource_version = Some(resource_version);
                self.next_list = Instant::now() + LIST_EVERY - jitter(LIST_EVERY / 5);
                self.send(WatchEvent::Listed(self.kind, items)).await;
                Ok(StepOutcome::Healthy)
            }
            Err(error) => {
                // A server that is too busy for a list may accept a watch, which continues from where it was.
                self.next_list = Instant::now() + LIST_RETRY + jitter(LIST_RETRY / 5);
                if error.kind() == ClusterErrorKind::Expired {
                    self.resource_version = None;
                }
                Err(error)
            }
        }
    }

    async fn watch(&mut self, from: String) -> Result<StepOutcome, ClusterError> {
        let mut reached = from.clone();
        let outcome = tokio::select! {
            outcome = self.watch_changes(&mut reached) => outcome,
            () = self.rewatch.notified() => Ok(StepOutcome::Healthy),
            () = sleep_until(self.next_list) => Ok(StepOutcome::Healthy),
            () = self.events.closed() => Ok(StepOutcome::Healthy),
        };
        if reached != from {
            self.failed_watches = 0;
        }
        self.resource_version = Some(reached);
        match outcome {
            Err(error) if error.kind() == ClusterErrorKind::Expired => {
                self.resource_version = None;
                Ok(StepOutcome::Healthy)
            }
            outcome => outcome,
        }
    }

    /// Watches from a resource version on, and advances it with every change.
    async fn watch_changes(&self, resource_version: &mut String) -> Result<StepOutcome, ClusterError> {
        let started = Instant::now();
        let mut changes = self.client.watch(self.kind, resource_version).await?;
        self.send(WatchEvent::Bookmark(self.kind)).await;
        let mut has_changes = false;
        while let Some(change) = changes.next().await {
            let (change, version) = change?;
            let event = match change {
                WatchChange::Updated(resource) => Some(WatchEvent::Updated(self.kind, resource)),
                WatchChange::Deleted(name) => Some(WatchEvent::Deleted(self.kind, name)),
                WatchChange::Bookmark => None,
            };
            if let Some(event) = event {
                has_changes = true;
                self.send(event).await;
            }
            if let Some(version) = version {
                *resource_version = version;
            }
        }
        Ok(if started.elapsed() > WATCH_HEALTHY_AFTER {
            StepOutcome::Healthy
        } else if has_changes {
            StepOutcome::Brief
        } else {
            StepOutcome::Empty
        })
    }

    async fn back_off(&mut self, error: ClusterError) {
        self.failed_watches += 1;
        let pause = match error.kind() {
            ClusterErrorKind::Busy(retry_after) => retry_after.min(BUSY_MAX),
            ClusterErrorKind::Unreachable => {
                self.client.reconnect().await;
                Duration::ZERO
            }
            _ => Duration::ZERO,
        };
        self.send(WatchEvent::Failed(self.kind, error)).await;
        if !self.events.is_closed() {
            sleep(self.backoff.next_delay().max(pause)).await;
        }
    }

    /// Waits for room in the queue, which holds the watch back. An event without a receiver is dropped; the loop of
    /// [`reflect`] then ends.
    async fn send(&self, event: WatchEvent) {
        drop(self.events.send(event).await);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use parking_lot::Mutex;
    use serde_json::Value;

    use super::*;

    /// A scripted answer to a list or a watch.
    #[derive(Debug, Clone, Copy)]
    enum Answer {
        /// An error.
        Error(ClusterErrorKind),
        /// A list of one object; a watch that ends at once.
        Empty,
        /// A watch with one change, which then ends.
        Change(&'static str),
        /// A watch with one change, which then breaks with an error.
        ChangeThenError(&'static str, ClusterErrorKind),
        /// A watch that stays open and delivers nothing.
        Open,
    }

    #[derive(Debug, Clone, PartialEq, Eq)]
    enum Call {
        List,
        Watch(String),
        Reconnect,
    }

    /// A client that answers from scripts; the last answer of a script is repeated.
    struct ScriptedClient {
        lists: Mutex<VecDeque<Answer>>,
        watches: Mutex<VecDeque<Answer>>,
        calls: Mutex<Vec<(Instant, Call)>>,
        context_generation: Mutex<u64>,
    }

    fn next(script: &Mutex<VecDeque<Answer>>) -> Answer {
        let mut script = script.lock();
        if script.len() > 1 { script.pop_front().unwrap() } else { script[0] }
    }

    impl ScriptedClient {
        fn new(lists: &[Answer], watches: &[Answer]) -> Arc<Self> {
            Arc::new(Self {
                lists: Mutex::new(lists.iter().copied().collect()),
                watches: Mutex::new(watches.iter().copied().collect()),
                calls: Mutex::default(),
                context_generation: Mutex::new(0),
            })
        }

        fn record(&self, call: Call) {
            self.calls.lock().push((Instant::now(), call));
        }

        fn times(&self, is: impl Fn(&Call) -> bool) -> Vec<Instant> {
            self.calls.lock().iter().filter(|(_, call)| is(call)).map(|(time, _)| *time).collect()
        }

        fn calls(&self) -> Vec<Call> {
            self.calls.lock().iter().map(|(_, call)| call.clone()).collect()
        }
    }

    fn error(kind: ClusterErrorKind) -> ClusterError {
        ClusterError::new(kind, "scripted")
    }

    fn object(name: &str) -> Resource {
        Resource { name: name.into(), uid: "u".into(), generation: None, document: Value::Null, status: Value::Null }
    }

    impl ListWatch for ScriptedClient {
        fn context_generation(&self) -> u64 {
            *self.context_generation.lock()
        }

        async fn list(&self, _: ResourceKind) -> Result<(Vec<Resource>, String), ClusterError> {
            self.record(Call::List);
            match next(&self.lists) {
                Answer::Error(kind) => Err(error(kind)),
                _ => Ok((vec![object("a")], "1".to_owned())),
            }
        }

        async fn watch(&self, _: ResourceKind, resource_version: &str) -> Result<WatchChanges, ClusterError> {
            self.record(Call::Watch(resource_version.to_owned()));
            let change = |version: &str| Ok((WatchChange::Updated(object("b")), Some(version.to_owned())));
            Ok(match next(&self.watches) {
                Answer::Error(kind) => return Err(error(kind)),
                Answer::Empty => Box::pin(futures_util::stream::empty()),
                Answer::Change(version) => Box::pin(futures_util::stream::iter([change(version)])),
                Answer::ChangeThenError(version, kind) => {
                    Box::pin(futures_util::stream::iter([change(version), Err(error(kind))]))
                }
                Answer::Open => Box::pin(futures_util::stream::pending()),
            })
        }

        async fn reconnect(&self) {
            self.record(Call::Reconnect);
        }
    }

    /// Runs a reflector for `seconds` of simulated time and returns its events.
    async fn run(client: &Arc<ScriptedClient>, rewatch: &Arc<Notify>, seconds: u64) -> Vec<WatchEvent> {
        let (sender, mut receiver) = mpsc::channel(16);
        let reflector = tokio::spawn(reflect(client.clone(), ResourceKind::EdgeModel, sender, rewatch.clone()));
        let mut events = Vec::new();
        let end = Instant::now() + Duration::from_secs(seconds);
        while let Ok(Some(event)) = tokio::time::timeout_at(end, receiver.recv()).await {
            events.push(event);
        }
        reflector.abort();
        events
    }

    #[tokio::test(start_paused = true)]
    async fn there_is_at_most_one_list_in_ten_seconds_whatever_the_server_answers() {
        use ClusterErrorKind::{Busy, Conflict, Expired, NotFound, Refused, Unreachable};
        let kinds = [Expired, NotFound, Conflict, Refused, Busy(Duration::ZERO), Unreachable];
        let lists = kinds.into_iter().map(Answer::Error).chain([Answer::Empty]);
        let lists: Vec<Answer> = lists.collect();
        let breaking = kinds.map(|kind| Answer::ChangeThenError("2", kind));
        let watches = lists.iter().copied().chain(breaking).chain([Answer::Change("2"), Answer::Open]);
        for watch in watches.collect::<Vec<_>>() {
            for list in &lists {
                let client = ScriptedClient::new(&[*list], &[watch]);
                run(&client, &Arc::default(), 1200).await;
                let times = client.times(|call| *call == Call::List);
                let closest = times.windows(2).map(|pair| pair[1] - pair[0]).min();
                assert!(closest >= Some(LIST_EVERY_MIN), "{list:?}, {watch:?}: lists {closest:?} apart");
                assert!(times.len() >= 2, "{list:?}, {watch:?}: nothing is ever repaired");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_expires_every_watch_is_listed_again_and_again_but_slowly() {
        let client = ScriptedClient::new(&[Answer::Empty], &[Answer::Error(ClusterErrorKind::Expired)]);
        let events = run(&client, &Arc::default(), 600).await;
        let lists = client.times(|call| *call == Call::List).len();
        assert!((45..=60).contains(&lists), "{lists} lists in 10 min");
        assert!(!events.iter().any(|event| matches!(event, WatchEvent::Failed(..))), "410 is not a failure");
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_ends_every_watch_at_once_is_not_called_in_a_tight_loop() {
        for (answer, most) in
            [(Answer::Empty, 120), (Answer::Error(ClusterErrorKind::Unreachable), 250), (Answer::Change("2"), 1200)]
        {
            let client = ScriptedClient::new(&[Answer::Empty], &[answer]);
            run(&client, &Arc::default(), 600).await;
            let watches = client.times(|call| matches!(call, Call::Watch(_))).len();
            assert!((40..=most).contains(&watches), "{answer:?}: {watches} watches in 10 min");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_that_broke_continues_from_the_version_that_it_had_reached() {
        let broken = Answer::ChangeThenError("7", ClusterErrorKind::Unreachable);
        let client = ScriptedClient::new(&[Answer::Empty], &[broken, Answer::Change("8"), Answer::Open]);
        let events = run(&client, &Arc::default(), 300).await;
        let watch = |version: &str| Call::Watch(version.to_owned());
        assert_eq!(client.calls(), [Call::List, watch("1"), Call::Reconnect, watch("7"), watch("8")]);
        let names = |event: &WatchEvent| matches!(event, WatchEvent::Updated(_, resource) if resource.name == "b");
        assert_eq!(events.iter().filter(|event| names(event)).count(), 2);
        assert!(matches!(events[0], WatchEvent::Listed(_, ref items) if items.len() == 1));
    }

    #[tokio::test(start_paused = true)]
    async fn watches_that_break_before_a_change_lead_to_a_list() {
        let client = ScriptedClient::new(&[Answer::Empty], &[Answer::Error(ClusterErrorKind::Refused)]);
        run(&client, &Arc::default(), 30).await;
        let watch = || Call::Watch("1".to_owned());
        assert_eq!(client.calls()[..5], [Call::List, watch(), watch(), watch(), Call::List]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_list_discards_no_resource_version() {
        let failed = Answer::Error(ClusterErrorKind::Busy(Duration::from_secs(1)));
        let client = ScriptedClient::new(&[Answer::Empty, failed], &[Answer::Open]);
        run(&client, &Arc::default(), 700).await;
        let calls = client.calls();
        let watch = || Call::Watch("1".to_owned());
        assert_eq!(calls[..4], [Call::List, watch(), Call::List, watch()], "{calls:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_busy_server_is_left_alone_for_as_long_as_it_demands_up_to_a_minute() {
        let busy = Answer::Error(ClusterErrorKind::Busy(Duration::from_secs(3600)));
        let client = ScriptedClient::new(&[Answer::Empty], &[busy]);
        run(&client, &Arc::default(), 300).await;
        let watches = client.times(|call| matches!(call, Call::Watch(_)));
        assert!(watches[1] - watches[0] >= BUSY_MAX, "{:?}", watches[1] - watches[0]);
    }

    #[tokio::test(start_paused = true)]
    async fn another_context_leads_to_a_list_and_a_notification_to_a_new_watch() {
        let client = ScriptedClient::new(&[Answer::Empty], &[Answer::Open]);
        let rewatch = Arc::new(Notify::new());
        let (other, notify) = (client.clone(), rewatch.clone());
        let script = tokio::spawn(async move {
            sleep(Duration::from_secs(60)).await;
            notify.notify_waiters();
            sleep(Duration::from_secs(60)).await;
            *other.context_generation.lock() = 1;
            notify.notify_waiters();
        });
        run(&client, &rewatch, 200).await;
        script.await.unwrap();
        let watch = || Call::Watch("1".to_owned());
        assert_eq!(client.calls(), [Call::List, watch(), watch(), Call::List, watch()]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reflector_ends_when_its_receiver_is_dropped() {
        for watch in [Answer::Open, Answer::Empty, Answer::Error(ClusterErrorKind::Unreachable)] {
            let client = ScriptedClient::new(&[Answer::Empty], &[watch]);
            let (sender, receiver) = mpsc::channel(16);
            let reflector = tokio::spawn(reflect(client, ResourceKind::EdgeModel, sender, Arc::default()));
            sleep(Duration::from_secs(5)).await;
            drop(receiver);
            tokio::time::timeout(BACKOFF_CAP, reflector).await.unwrap().unwrap();
        }
    }
}
