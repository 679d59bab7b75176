//! The connection to the API server through one context of a kubeconfig, or through the pod's service account.
//!
//! The connection is opened on first use: a credential plugin that the kubeconfig names may fail or hang while the
//! network is down, and the agent has to start all the same. A credential plugin runs in a thread of its own, so that
//! it blocks none of the threads that load models. While it hangs it is not started again until [`HANGS_AFTER`] has
//! passed.
//!
//! A context that has only failed for [`SWITCH_CONTEXT_AFTER`] is replaced by the next context that can be opened.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::events::{Recorder, Reporter};
use kube::{Client, Config};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::config::ClusterConfig;
use crate::error::ClusterError;
use lineside_common::{LogOnChange, error_chain};

/// The time limit of every call except lists and watches, and of opening a connection.
pub(crate) const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// The shortest time between two reconnects.
const RECONNECT_EVERY: Duration = Duration::from_secs(3);
/// A context that has only failed for this long is replaced by the next.
const SWITCH_CONTEXT_AFTER: Duration = Duration::from_secs(20);
/// A credential plugin that has not ended after this long is started again.
const HANGS_AFTER: Duration = Duration::from_secs(600);
/// The time limit of a TCP and TLS handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The connection, which is opened on first use and replaced by [`reconnect`](Self::reconnect).
pub(crate) struct Connection {
    config: ClusterConfig,
    reporter: Reporter,
    state: tokio::sync::Mutex<ConnectionState>,
    /// The index of the context in use.
    context: AtomicUsize,
    context_generation: AtomicU64,
    liveness: Mutex<Liveness>,
}

struct ConnectionState {
    clients: Option<ContextClients>,
    /// Connections that are being opened, by context.
    pending: HashMap<usize, PendingClient>,
    last_reconnect: Instant,
    logged_error: LogOnChange<String>,
}

/// The clients of one context.
struct ContextClients {
    client: Client,
    recorder: Recorder,
}

/// A connection that a thread is opening.
struct PendingClient {
    since: Instant,
    outcome: oneshot::Receiver<kube::Result<Client>>,
}

/// When the API server answered last, and since when the context in use has only failed.
#[derive(Debug, Clone, Copy)]
struct Liveness {
    last_response: Instant,
    failing_since: Option<Instant>,
}

impl Liveness {
    fn new(now: Instant) -> Self {
        Self { last_response: now, failing_since: None }
    }

    fn record_response(&mut self, now: Instant) {
        *self = Self::new(now);
    }

    fn record_failure(&mut self, now: Instant) {
        self.failing_since.get_or_insert(now);
    }

    fn record_context_switch(&mut self) {
        self.failing_since = None;
    }

    fn needs_another_context(&self, now: Instant) -> bool {
        self.failing_since.is_some_and(|since| now.saturating_duration_since(since) >= SWITCH_CONTEXT_AFTER)
    }
}

impl Connection {
    /// A connection that is not open yet. `reporter` is the source of Events.
    pub(crate) fn new(config: ClusterConfig, reporter: Reporter) -> Self {
        let now = Instant::now();
        let state = ConnectionState {
            clients: None,
            pending: HashMap::new(),
            last_reconnect: now,
            logged_error: LogOnChange::default(),
        };
        Self {
            config,
            reporter,
            state: tokio::sync::Mutex::new(state),
            context: AtomicUsize::new(0),
            context_generation: AtomicU64::new(0),
            liveness: Mutex::new(Liveness::new(now)),
        }
    }

    /// The number of context switches so far.
    pub(crate) fn context_generation(&self) -> u64 {
        self.context_generation.load(Ordering::Acquire)
    }

    /// When the API server answered last; before the first answer, when the connection was created.
    pub(crate) fn last_response(&self) -> Instant {
        self.liveness.lock().last_response
    }

    /// Records that the API server answered.
    pub(crate) fn record_response(&self) {
        self.liveness.lock().record_response(Instant::now());
    }

    /// Records that the API server did not answer, or was too busy to.
    pub(crate) fn record_failure(&self) {
        self.liveness.lock().record_failure(Instant::now());
    }

    /// See [`ClusterClient::reconnect`](crate::ClusterClient::reconnect).
    pub(crate) async fn reconnect(&self) {
        let mut state = self.state.lock().await;
        if state.last_reconnect.elapsed() < RECONNECT_EVERY {
            return;
        }
        let contexts = self.config.contexts.len().max(1);
        let current = self.context.load(Ordering::Relaxed);
        let needs_another = self.liveness.lock().needs_another_context(Instant::now());
        let candidates: Vec<usize> = if needs_another {
            (1..=contexts).map(|step| (current + step) % contexts).collect()
        } else {
            vec![current]
        };
        for context in candidates {
            match self.open(&mut state, context).await {
                Ok(clients) => {
                    self.use_clients(clients, context, &mut state);
                    break;
                }
                Err(error) => {
                    let error = error_chain(&error);
                    if state.logged_error.set(error.clone()) {
                        tracing::warn!(
                            event = "cluster_reconnect_failed",
                            error,
                            "Connection to the cluster cannot be opened"
                        );
                    }
                }
            }
        }
        // The interval counts from the end, so that callers that waited for the lock do not reconnect once more.
        state.last_reconnect = Instant::now();
    }

    /// Switches back to the first context when another one is in use and `is_answering` holds for the first.
    pub(crate) async fn try_preferred_context(&self, is_answering: impl AsyncFnOnce(Client) -> bool) {
        if self.context.load(Ordering::Relaxed) == 0 {
            return;
        }
        let opened = self.open(&mut *self.state.lock().await, 0).await;
        let Ok(clients) = opened else { return };
        if is_answering(clients.client.clone()).await {
            self.use_clients(clients, 0, &mut *self.state.lock().await);
        }
    }

    /// Opens a connection through a context. The caller holds the state's lock, so that at most one connection is
    /// opened at a time.
    async fn open(&self, state: &mut ConnectionState, context: usize) -> Result<ContextClients, ClusterError> {
        if state.pending.get(&context).is_none_or(|pending| pending.since.elapsed() >= HANGS_AFTER) {
            let config = client_config(&self.config, context).await?;
            let outcome = open_in_thread(config)?;
            state.pending.insert(context, PendingClient { since: Instant::now(), outcome });
        }
        let Some(pending) = state.pending.get_mut(&context) else {
            return Err(ClusterError::unreachable("there is no connection"));
        };
        let outcome = tokio::time::timeout(CALL_TIMEOUT, &mut pending.outcome).await;
        if outcome.is_ok() {
            state.pending.remove(&context);
        }
        match outcome {
            Ok(Ok(Ok(client))) => {
                Ok(ContextClients { recorder: Recorder::new(client.clone(), self.reporter.clone()), client })
            }
            Ok(Ok(Err(error))) => Err(error.into()),
            Ok(Err(_)) => Err(ClusterError::unreachable("the thread that opens the connection panicked")),
            Err(_) => {
                // The current clients would start the credential plugin too once their token has expired.
                if context == self.context.load(Ordering::Relaxed) {
                    state.clients = None;
                }
                let seconds = CALL_TIMEOUT.as_secs();
                Err(ClusterError::unreachable(format!("the credential plugin has not ended within {seconds} s")))
            }
        }
    }

    fn use_clients(&self, clients: ContextClients, context: usize, state: &mut ConnectionState) {
        if self.context.swap(context, Ordering::Relaxed) != context {
            tracing::warn!(
                event = "cluster_context_switched",
                context = self.config.contexts.get(context),
                "Another context of the kubeconfig is in use"
            );
            self.liveness.lock().record_context_switch();
            self.context_generation.fetch_add(1, Ordering::Release);
        }
        state.logged_error.clear();
        state.clients = Some(clients);
    }

    /// The clients of the current context, which are opened if there are none.
    async fn clients<'a>(&self, state: &'a mut ConnectionState) -> Result<&'a mut ContextClients, ClusterError> {
        if state.clients.is_none() {
            let context = self.context.load(Ordering::Relaxed);
            let clients = self.open(state, context).await.inspect_err(|_| self.record_failure())?;
            self.use_clients(clients, context, state);
        }
        state.clients.as_mut().ok_or_else(|| ClusterError::unreachable("there is no connection"))
    }

    /// The client for calls.
    pub(crate) async fn client(&self) -> Result<Client, ClusterError> {
        Ok(self.clients(&mut *self.state.lock().await).await?.client.clone())
    }

    /// The recorder for Events. `replace` installs a new one, which remembers no earlier Event.
    pub(crate) async fn recorder(&self, replace: bool) -> Result<Recorder, ClusterError> {
        let mut state = self.state.lock().await;
        let clients = self.clients(&mut state).await?;
        if replace {
            clients.recorder = Recorder::new(clients.client.clone(), self.reporter.clone());
        }
        Ok(clients.recorder.clone())
    }
}

/// The client configuration for a context, read from disk now.
pub(crate) async fn client_config(config: &ClusterConfig, context: usize) -> Result<Config, ClusterError> {
    let mut client_config = match &config.kubeconfig {
        None => Config::incluster().map_err(|error| {
            let message = "the process does not run in a pod with a service account; set --kubeconfig outside of one";
            ClusterError::configuration(message, error)
        })?,
        Some(path) => {
            let unusable =
                |error| ClusterError::configuration(format!("--kubeconfig {} cannot be used", path.display()), error);
            let kubeconfig = Kubeconfig::read_from(path).map_err(unusable)?;
            let options = KubeConfigOptions { context: config.contexts.get(context).cloned(), ..Default::default() };
            Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(unusable)?
        }
    };
    client_config.connect_timeout = Some(CONNECT_TIMEOUT);
    client_config.write_timeout = Some(CALL_TIMEOUT);
    // The callers decide when to retry.
    client_config.default_retry = false;
    Ok(client_config)
}

/// Opens a connection in a thread of its own, since a credential plugin blocks.
fn open_in_thread(config: Config) -> Result<oneshot::Receiver<kube::Result<Client>>, ClusterError> {
    let (sender, outcome) = oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    std::thread::Builder::new().name("credentials".to_owned()).spawn(move || {
        let _guard = runtime.enter();
        // The receiver is gone when the connection was given up meanwhile.
        drop(sender.send(Client::try_from(config)));
    })?;
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ClusterErrorKind;

    fn kubeconfig(contexts: &[&str]) -> (tempfile::NamedTempFile, ClusterConfig) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = r#"{"current-context": "a", "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
            "contexts": [{"name": "a", "context": {"cluster": "c", "user": "u"}},
                         {"name": "b", "context": {"cluster": "c", "user": "u"}}], "users": [{"name": "u", "user": {}}]}"#;
        std::fs::write(file.path(), text).unwrap();
        let contexts = contexts.iter().map(|name| (*name).to_owned()).collect();
        let config = ClusterConfig { kubeconfig: Some(file.path().to_owned()), contexts, namespace: None };
        (file, config)
    }

    fn connection(config: ClusterConfig) -> Connection {
        Connection::new(config, Reporter { controller: "test".to_owned(), instance: None })
    }

    #[test]
    fn a_context_is_replaced_after_it_has_only_failed_for_a_while() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut liveness = Liveness::new(start);
        assert!(!liveness.needs_another_context(after(100)), "silence alone is not a failure");
        liveness.record_failure(after(100));
        liveness.record_failure(after(119));
        assert!(!liveness.needs_another_context(after(119)) && liveness.needs_another_context(after(120)));
        liveness.record_response(after(121));
        assert_eq!(liveness.last_response, after(121));
        assert!(!liveness.needs_another_context(after(200)));
        liveness.record_failure(after(200));
        liveness.record_context_switch();
        assert!(!liveness.needs_another_context(after(300)));
    }

    #[tokio::test]
    async fn a_reconnect_switches_to_the_next_context_and_counts_it() {
        let (_file, config) = kubeconfig(&["a", "b"]);
        let connection = connection(config);
        connection.client().await.unwrap();
        let long_ago = Instant::now().checked_sub(SWITCH_CONTEXT_AFTER).unwrap();
        connection.state.lock().await.last_reconnect = long_ago;
        connection.reconnect().await;
        assert_eq!(connection.context_generation(), 0, "the context has not failed");
        connection.liveness.lock().record_failure(long_ago);
        connection.reconnect().await;
        assert_eq!(connection.context_generation(), 0, "two reconnects in a row");
        connection.state.lock().await.last_reconnect = long_ago;
        connection.reconnect().await;
        assert_eq!((connection.context_generation(), connection.context.load(Ordering::Relaxed)), (1, 1));
        connection.try_preferred_context(async |_| false).await;
        assert_eq!(connection.context_generation(), 1, "the first context does not answer");
        connection.try_preferred_context(async |_| true).await;
        assert_eq!((connection.context_generation(), connection.context.load(Ordering::Relaxed)), (2, 0));
    }

    #[tokio::test]
    async fn a_configuration_error_names_the_file() {
        let (_file, config) = kubeconfig(&["missing"]);
        let error = client_config(&config, 0).await.unwrap_err();
        assert_eq!(error.kind(), ClusterErrorKind::Refused);
        assert!(error.to_string().starts_with("--kubeconfig "), "{error}");
        assert!(error_chain(&error).contains("missing"), "{}", error_chain(&error));
    }
}
