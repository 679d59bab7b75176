//! The connections to a cluster, by one of its contexts.
//!
//! They are made when they are first needed: a program that the kubeconfig names for credentials may fail, or hang, while
//! the network does, and an agent has to start all the same. Such a program has a thread to itself, none of those that load
//! models, and is not started anew for a while. A context that has given nothing but failures for a while makes room for
//! the next that can be had.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::events::{Recorder, Reporter};
use kube::{Client, Config};
use tokio::sync::oneshot;

use super::{ClusterError, ClusterErrorKind, DEADLINE};
use crate::ClusterConfig;

/// Connections are made anew this far apart at least.
const RENEW_EVERY: Duration = Duration::from_secs(3);
/// A context that has failed for this long makes room for the next.
const CONTEXT_PATIENCE: Duration = Duration::from_secs(20);
/// A program for credentials that has not ended after this is started anew.
const HANGS_AFTER: Duration = Duration::from_secs(600);

/// The connections.
pub(super) struct Connection {
    access: ClusterConfig,
    reporter: Reporter,
    state: tokio::sync::Mutex<State>,
    context: AtomicUsize,
    era: AtomicU64,
    hearing: Mutex<Hearing>,
}

/// Connections by one context.
struct LoadContext {
    client: Client,
    recorder: Recorder,
}

struct State {
    way: Option<LoadContext>,
    /// Connections that are still being made, by context, and since when.
    pending: HashMap<usize, (Instant, oneshot::Receiver<kube::Result<Client>>)>,
    renewed: Instant,
    /// What was said last about why there is no connection.
    trouble: Option<String>,
}

struct Hearing {
    /// When the server answered last; at first, when this began.
    answered: Instant,
    /// Since when nothing but failures has come of the present context.
    failing_since: Option<Instant>,
}

impl Connection {
    /// Nothing is sent yet. `reporter` is who says Events.
    pub(super) fn new(access: ClusterConfig, reporter: Reporter) -> Self {
        let now = Instant::now();
        Self {
            access,
            reporter,
            state: tokio::sync::Mutex::new(State { way: None, pending: HashMap::new(), renewed: now, trouble: None }),
            context: AtomicUsize::new(0),
            era: AtomicU64::new(0),
            hearing: Mutex::new(Hearing { answered: now, failing_since: None }),
        }
    }

    /// Counts how often another context was taken.
    pub(super) fn era(&self) -> u64 {
        self.era.load(Ordering::Acquire)
    }

    /// How long ago the server answered last.
    pub(super) fn time_since_response(&self) -> Duration {
        self.hearing().answered.elapsed()
    }

    /// The server has answered.
    pub(super) fn answered(&self) {
        *self.hearing() = Hearing { answered: Instant::now(), failing_since: None };
    }

    /// There was no answer, or none that helps.
    pub(super) fn failed(&self) {
        self.hearing().failing_since.get_or_insert_with(Instant::now);
    }

    fn hearing(&self) -> MutexGuard<'_, Hearing> {
        self.hearing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`ClusterClient::renew`](super::ClusterClient::renew).
    pub(super) async fn renew(&self) {
        let mut state = self.state.lock().await;
        if state.renewed.elapsed() < RENEW_EVERY {
            return;
        }
        let contexts = self.access.contexts.len().max(1);
        let present = self.context.load(Ordering::Relaxed);
        let failing_since = self.hearing().failing_since;
        let candidates: Vec<usize> = match failing_since.is_some_and(|since| since.elapsed() >= CONTEXT_PATIENCE) {
            true => (1..=contexts).map(|step| (present + step) % contexts).collect(),
            false => vec![present],
        };
        for context in candidates {
            match self.open(&mut state, context).await {
                Ok(way) => {
                    self.take(way, context, &mut state);
                    break;
                }
                Err(trouble) if trouble.is_news(&mut state.trouble) => {
                    tracing::warn!(%trouble, "the way into the cluster cannot be made anew");
                }
                Err(_) => {}
            }
        }
        // Counted from now: who has waited meanwhile wants nothing else.
        state.renewed = Instant::now();
    }

    /// Goes back to the first context where that `answers` again.
    pub(super) async fn try_preferred_context(&self, answers: impl AsyncFnOnce(Client) -> bool) {
        if self.context.load(Ordering::Relaxed) == 0 {
            return;
        }
        let opened = self.open(&mut *self.state.lock().await, 0).await;
        let Ok(way) = opened else { return };
        if answers(way.client.clone()).await {
            self.take(way, 0, &mut *self.state.lock().await);
        }
    }

    /// Makes connections by a context. The caller holds the state, so that this is done once at a time.
    async fn open(&self, state: &mut State, context: usize) -> Result<LoadContext, ClusterError> {
        if state.pending.get(&context).is_none_or(|(since, _)| since.elapsed() >= HANGS_AFTER) {
            let config = configuration(&self.access, context).await?;
            state.pending.insert(context, (Instant::now(), in_thread(config)?));
        }
        let Some((_, making)) = state.pending.get_mut(&context) else {
            return Err(ClusterError::unreachable("there is no connection"));
        };
        let made = tokio::time::timeout(DEADLINE, making).await;
        if made.is_ok() {
            state.pending.remove(&context);
        }
        match made {
            Ok(Ok(Ok(client))) => {
                Ok(LoadContext { recorder: Recorder::new(client.clone(), self.reporter.clone()), client })
            }
            Ok(Ok(Err(error))) => Err(ClusterError::new(error)),
            Ok(Err(_)) => Err(ClusterError::unreachable("making the connection panicked")),
            Err(_) => {
                // The connections there are would start the program too, once their token has run out.
                if context == self.context.load(Ordering::Relaxed) {
                    state.way = None;
                }
                Err(ClusterError::unreachable(format!("no credentials within {} s", DEADLINE.as_secs())))
            }
        }
    }

    fn take(&self, way: LoadContext, context: usize, state: &mut State) {
        if self.context.swap(context, Ordering::Relaxed) != context {
            tracing::warn!(
                event = "cluster_context_switched",
                context = self.access.contexts.get(context),
                "another context of the kubeconfig is taken"
            );
            self.hearing().failing_since = None;
            self.era.fetch_add(1, Ordering::Release);
        }
        state.trouble = None;
        state.way = Some(way);
    }

    /// The connections there are; where there are none yet, they are made.
    async fn way<'a>(&self, state: &'a mut State) -> Result<&'a mut LoadContext, ClusterError> {
        if state.way.is_none() {
            let context = self.context.load(Ordering::Relaxed);
            let way = self.open(state, context).await.inspect_err(|_| self.failed())?;
            self.take(way, context, state);
        }
        state.way.as_mut().ok_or_else(|| ClusterError::unreachable("there is no connection"))
    }

    /// What calls are made with.
    pub(super) async fn client(&self) -> Result<Client, ClusterError> {
        Ok(self.way(&mut *self.state.lock().await).await?.client.clone())
    }

    /// What Events are said with: the one there is, or one `afresh` that remembers nothing.
    pub(super) async fn recorder(&self, afresh: bool) -> Result<Recorder, ClusterError> {
        let mut state = self.state.lock().await;
        let way = self.way(&mut state).await?;
        if afresh {
            way.recorder = Recorder::new(way.client.clone(), self.reporter.clone());
        }
        Ok(way.recorder.clone())
    }
}

/// How to reach the cluster by one of its contexts.
pub(super) async fn configuration(access: &ClusterConfig, context: usize) -> Result<Config, ClusterError> {
    let refused = |message: String| ClusterError { kind: ClusterErrorKind::Refused, message };
    let mut config = match &access.kubeconfig {
        None => {
            Config::incluster().map_err(|error| refused(format!("this is no pod with a service account: {error}")))?
        }
        Some(path) => {
            let named = |error: String| refused(format!("--kubeconfig {}: {error}", Path::new(path).display()));
            let kubeconfig = Kubeconfig::read_from(path).map_err(|error| named(error.to_string()))?;
            let options = KubeConfigOptions { context: access.contexts.get(context).cloned(), ..Default::default() };
            Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(|error| named(error.to_string()))?
        }
    };
    config.connect_timeout = Some(Duration::from_secs(5));
    config.write_timeout = Some(DEADLINE);
    // When to try again is decided by whoever asks.
    config.default_retry = false;
    Ok(config)
}

/// Makes connections in a thread of their own.
fn in_thread(config: Config) -> Result<oneshot::Receiver<kube::Result<Client>>, ClusterError> {
    let (done, making) = oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    std::thread::Builder::new()
        .name("credentials".to_owned())
        .spawn(move || {
            let _inside = runtime.enter();
            // Nobody may wait for it any more.
            drop(done.send(Client::try_from(config)));
        })
        .map_err(|error| ClusterError::unreachable(format!("no thread can be had: {error}")))?;
    Ok(making)
}
