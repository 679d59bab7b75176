//! Publishes the spool's records to a broker. One task owns the connection.
//!
//! ```text
//!         first available broker            accepted: publishes the status,
//!                                           resends what was unacknowledged
//! (start) ---------------------> Connecting -------------------------------> Session
//!                    ^                |                                       |   |  PUBACK: deletes the record
//!                    |                v                                       |   |  append: sends the record
//!                    +-- delay per broker; after a refusal half a minute <----+   |
//!                    |      lost, no progress, or no answer to a keep-alive       |
//!                    +------------------------------------------------------------+
//!                       closed in order: preferred broker available,
//!                       credentials changed, Sparkplug host offline
//! ```
//!
//! A record is deleted from the spool on its PUBACK and not before. A record that the broker does not take is set aside
//! (`suspects`), so that it does not stop the others.
//!
//! [`Publisher::run`] may be called again after it has panicked: everything that outlives it is in the spool. A guard makes sure
//! that [`BrokerState`](crate::broker_state::BrokerState) is `Disconnected`, and the spool informed, whenever `run` is not running.

mod broker_selector;
mod commands;
mod context;
mod encoder;
mod send_window;
mod session;
#[cfg(test)]
mod simulation;
mod stream_health;
mod suspects;

use std::time::SystemTime;

use lineside_common::heartbeat::HEARTBEAT_INTERVAL;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use self::broker_selector::{BrokerSelector, Selection};
use self::commands::Commands;
pub use self::context::PublisherContext;
use self::encoder::{Encoder, SessionSender};
use self::session::{CREDENTIALS_CHECK_INTERVAL, Session, SessionEnd, SessionInputs};
use self::suspects::Suspects;
use crate::broker_state::{BrokerStateReader, BrokerStateWriter};
use crate::connection;
use crate::connection::{ConnectionEvent, ConnectionLoss, MqttReceiver};
use crate::credentials::{BrokerCredentials, fingerprint};
use crate::node_clash::{ClashDetector, NodeClash};

/// Publishes records to one broker at a time, and owns the connection and its state.
pub struct Publisher {
    context: PublisherContext,
    state: BrokerStateWriter,
    clash: watch::Sender<Option<NodeClash>>,
}

/// What a session, or the attempt to open one, leads to.
struct SessionReport {
    end: SessionEnd,
    was_connected: bool,
    results_published: u64,
}

impl SessionReport {
    fn not_connected(end: SessionEnd) -> Self {
        Self { end, was_connected: false, results_published: 0 }
    }
}

/// Ends the connection's state with the future of [`Publisher::run`], also when it panics or is dropped.
struct RunGuard<'a>(&'a Publisher);

impl Drop for RunGuard<'_> {
    fn drop(&mut self) {
        let reason = std::thread::panicking().then(|| "the publisher panicked".to_owned());
        self.0.disconnected(reason);
    }
}

impl Publisher {
    /// A publisher that is not connected. [`Self::run`] starts it.
    pub fn new(context: PublisherContext) -> Self {
        let state = BrokerStateWriter::new(context.metrics.clone());
        Self { context, state, clash: watch::Sender::new(None) }
    }

    /// Reads the state of the broker connection.
    pub fn broker_state(&self) -> BrokerStateReader {
        self.state.reader()
    }

    /// Another agent with the same site and node name on the broker, while there is one. Not detected in Sparkplug mode, in which
    /// no presence is published.
    pub fn node_clash(&self) -> watch::Receiver<Option<NodeClash>> {
        self.clash.subscribe()
    }

    /// Publishes until `stop` is cancelled; then waits up to three seconds for acknowledgements and disconnects in order. It
    /// can be called again after it has ended or panicked, but must not run twice at the same time.
    pub async fn run(&self, stop: CancellationToken) {
        // An earlier run may have panicked with records in flight.
        self.context.spool.disconnected();
        let _guard = RunGuard(self);
        tokio::select! {
            () = self.publish(stop) => {}
            () = self.send_heartbeats() => {}
        }
    }

    /// Sends heartbeats as long as the task of the publisher is polled.
    async fn send_heartbeats(&self) {
        let mut ticks = tokio::time::interval(HEARTBEAT_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.state.beat(std::time::Instant::now());
        }
    }

    async fn publish(&self, stop: CancellationToken) {
        let mut inputs = SessionInputs {
            commands: Commands::new(&self.context),
            streams: self.context.streams.clone(),
            clash: ClashDetector::new(&self.context.folder, self.clash.clone()),
            suspects: Suspects::load(&self.context.data_dir),
            stop,
        };
        let mut selector = BrokerSelector::new(&self.context.mqtt.brokers);
        let mut credentials = self.credentials_fingerprint();
        loop {
            let index = match selector.select(Instant::now()) {
                Selection::Connect(index) => index,
                Selection::Wait(until) => {
                    tokio::select! {
                        () = tokio::time::sleep_until(until.min(Instant::now() + CREDENTIALS_CHECK_INTERVAL)) => {}
                        () = inputs.stop.cancelled() => return self.context.log_remaining_records(),
                    }
                    let current = self.credentials_fingerprint();
                    if current != credentials {
                        // The new credentials may be accepted.
                        credentials = current;
                        selector.reset();
                    }
                    continue;
                }
            };
            let report = self.run_session(&selector, index, &mut inputs).await;
            credentials = self.credentials_fingerprint();
            if self.finish_session(&mut selector, index, report) {
                return;
            }
        }
    }

    /// Updates state and selector after a session. Returns whether the publisher stops.
    fn finish_session(&self, selector: &mut BrokerSelector, index: usize, report: SessionReport) -> bool {
        // Only a session that delivered results resets the retry delay. The status message does not count: two agents with
        // the same node name would disconnect each other at full speed.
        if report.results_published > 0 {
            selector.record_success(index);
        }
        match report.end {
            SessionEnd::Stopped | SessionEnd::Reconnect => self.disconnected(None),
            SessionEnd::Lost(ref loss) => {
                let reason = loss.reason();
                if selector.record_failure(index, loss, report.was_connected, Instant::now()) {
                    let broker = selector.broker(index);
                    tracing::warn!(
                        event = "broker_disconnected",
                        %broker,
                        reason,
                        "Broker is not connected; records wait in the spool"
                    );
                }
                self.disconnected(Some(reason));
            }
        }
        matches!(report.end, SessionEnd::Stopped)
    }

    /// Publishes that no connection is open.
    fn disconnected(&self, reason: Option<String>) {
        self.context.spool.disconnected();
        self.state.set_disconnected(reason);
    }

    fn credentials_fingerprint(&self) -> Option<lineside_common::digest::Digest> {
        fingerprint(self.context.mqtt.secret.as_deref())
    }

    /// Connects to a broker and runs a session until it ends.
    async fn run_session(&self, selector: &BrokerSelector, index: usize, inputs: &mut SessionInputs) -> SessionReport {
        let (sender, receiver, encoder) = match self.connect(selector, index, &inputs.stop).await {
            Ok(connected) => connected,
            Err(end) => return SessionReport::not_connected(end),
        };
        let (broker, waiting) = (selector.broker(index), self.context.spool.stats().records);
        self.state.set_connected(index, broker);
        tracing::info!(event = "broker_connected", %broker, waiting, "Broker is connected");
        let mut session = Session::new(&self.context, sender, encoder, selector, index);
        let end = session.run(receiver, inputs).await;
        SessionReport { end, was_connected: true, results_published: session.results_published() }
    }

    /// Opens a connection and waits until the broker accepts it.
    async fn connect(
        &self,
        selector: &BrokerSelector,
        index: usize,
        stop: &CancellationToken,
    ) -> Result<(SessionSender, MqttReceiver, Encoder), SessionEnd> {
        let (context, broker) = (&self.context, selector.broker(index));
        let credentials = BrokerCredentials::read(broker, context.mqtt.secret.as_deref())
            .map_err(|error| SessionEnd::Lost(error.into()))?;
        let expires = credentials.expires.and_then(|expires| expires.duration_since(SystemTime::UNIX_EPOCH).ok());
        let expires = expires.and_then(|expires| i64::try_from(expires.as_secs()).ok());
        context.metrics.certificate_expiry.set(expires.unwrap_or(0));
        let encoder = Encoder::new(context).map_err(|error| {
            let loss = ConnectionLoss::unreachable("the Sparkplug birth-death number cannot be stored");
            SessionEnd::Lost(loss.with_source(error))
        })?;
        // The client id is the same for every connection of the node, so that the broker closes the old one.
        let client_id = format!("lineside/{}/{}", context.site, context.node);
        let will = Some(encoder.will(context));
        let (mut sender, mut receiver) =
            connection::prepare(broker, &credentials, &client_id, context.mqtt.keep_alive, will);
        loop {
            let event = tokio::select! {
                event = receiver.next() => event,
                () = stop.cancelled() => {
                    context.log_remaining_records();
                    return Err(SessionEnd::Stopped);
                }
            };
            match sender.interpret(event) {
                ConnectionEvent::Connected => return Ok((sender, receiver, encoder)),
                ConnectionEvent::Lost(loss) => return Err(SessionEnd::Lost(loss)),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;
    use std::time::Duration;

    use bytes::Bytes;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::{Notify, mpsc, watch};

    use super::*;
    use crate::broker_state::BrokerState;
    use crate::config::{Broker, MqttConfig};
    use crate::loopback::LoopbackBroker;
    use crate::metrics::MqttMetrics;
    use lineside_api::message::Topics;
    use lineside_api::state::StreamStates;
    use lineside_common::metrics::Registrar;
    use lineside_spool::simulation::options;
    use lineside_spool::{AppendOutcome, NewRecord, RecordKind, Spool, WhenFull};

    /// A publisher with what it is connected to.
    struct Fixture {
        publisher: Arc<Publisher>,
        spool: Arc<Spool>,
        metrics: MqttMetrics,
    }

    impl Fixture {
        fn new(folder: &Path, port: u16) -> Self {
            let spool = Spool::open(&folder.join("spool"), options(1 << 20)).unwrap();
            let metrics = MqttMetrics::register(&Registrar::default()).unwrap();
            let broker = Broker { host: "127.0.0.1".to_owned(), port, tls: false, credentials: None };
            let publisher = Arc::new(Publisher::new(PublisherContext {
                mqtt: MqttConfig::new(broker),
                topics: Topics::new("lineside", "plant", "edge-1"),
                node: "edge-1".to_owned(),
                site: "plant".to_owned(),
                folder: "aaaaaaaa".to_owned(),
                epoch: 1,
                data_dir: folder.to_owned(),
                spool: spool.clone(),
                streams: watch::channel(StreamStates::new()).1,
                commands: mpsc::channel(1).0,
                set_level: Arc::new(|level: &str| Ok(level.to_owned())),
                metrics: metrics.clone(),
            }));
            Self { publisher, spool, metrics }
        }

        fn append(&self) {
            let outcome = self.spool.append(NewRecord {
                kind: RecordKind::Result,
                topic: "lineside/v1/plant/edge-1/cam/result".into(),
                ttl_seconds: 0,
                when_full: WhenFull::DropNewest,
                build_payload: |_| Bytes::from_static(b"{}"),
            });
            assert!(matches!(outcome, AppendOutcome::Appended(_)));
        }

        async fn wait_until_connected(&self) {
            let mut state = self.publisher.state.subscribe();
            let connected = state.wait_for(BrokerState::is_connected);
            drop(tokio::time::timeout(Duration::from_secs(10), connected).await.unwrap().unwrap());
        }

        async fn wait_until_published(&self, results: u64) {
            wait_until(|| self.metrics.results_published.get() == results).await;
            assert_eq!(self.spool.stats().records, 0);
        }

        fn is_connected(&self) -> bool {
            self.publisher.broker_state().at(std::time::Instant::now()).is_connected()
        }

        fn reason(&self) -> Option<String> {
            match &*self.publisher.state.subscribe().borrow() {
                BrokerState::Disconnected { reason, .. } => reason.clone(),
                BrokerState::Connected { .. } => panic!("the publisher is connected"),
            }
        }

        /// Runs the publisher until it panics, which happens when `panic` is notified.
        async fn run_until_panic(&self, panic: &Arc<Notify>) -> tokio::task::JoinError {
            let (publisher, panic) = (self.publisher.clone(), panic.clone());
            let run = async move {
                tokio::select! {
                    () = publisher.run(CancellationToken::new()) => {}
                    () = async {
                        panic.notified().await;
                        panic!("injected for a test");
                    } => {}
                }
            };
            tokio::spawn(run).await.unwrap_err()
        }

        async fn stop(&self, stop: CancellationToken, task: tokio::task::JoinHandle<()>) {
            stop.cancel();
            task.await.unwrap();
            assert_eq!(self.reason(), None);
            assert!(!self.is_connected());
        }

        fn start(&self) -> (CancellationToken, tokio::task::JoinHandle<()>) {
            let (publisher, stop) = (self.publisher.clone(), CancellationToken::new());
            let token = stop.clone();
            (stop, tokio::spawn(async move { publisher.run(token).await }))
        }
    }

    async fn wait_until(condition: impl Fn() -> bool) {
        let poll = async {
            while !condition() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), poll).await.unwrap();
    }

    #[tokio::test]
    async fn a_panic_disconnects_and_a_second_run_publishes_again() {
        let folder = tempfile::tempdir().unwrap();
        let fixture = Fixture::new(folder.path(), LoopbackBroker::start().await.unwrap().address().port());
        fixture.append();
        let panic = Arc::new(Notify::new());
        let until_published = async {
            fixture.wait_until_connected().await;
            assert!(fixture.is_connected());
            fixture.wait_until_published(1).await;
            panic.notify_one();
        };
        let (error, ()) = tokio::join!(fixture.run_until_panic(&panic), until_published);
        assert!(error.is_panic());
        assert!(!fixture.is_connected());
        assert_eq!(fixture.reason().as_deref(), Some("the publisher panicked"));

        fixture.append();
        let (stop, task) = fixture.start();
        fixture.wait_until_connected().await;
        fixture.wait_until_published(2).await;
        fixture.stop(stop, task).await;
    }

    /// Accepts connections on a port. The first one is accepted, and no message on it is acknowledged; `received` is notified
    /// after this many results. The others are relayed to the broker.
    async fn first_connection_is_silent(broker: LoopbackBroker, results: usize, received: Arc<Notify>) -> u16 {
        const CONNACK: [u8; 4] = [0x20, 2, 0, 0];
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (mut first, _) = listener.accept().await.unwrap();
            first.write_all(&CONNACK).await.unwrap();
            let mut bytes = Vec::new();
            while String::from_utf8_lossy(&bytes).matches("/cam/result").count() < results {
                assert_ne!(first.read_buf(&mut bytes).await.unwrap(), 0);
            }
            received.notify_one();
            while let Ok((mut client, _)) = listener.accept().await {
                let mut server = TcpStream::connect(broker.address()).await.unwrap();
                tokio::spawn(async move { tokio::io::copy_bidirectional(&mut client, &mut server).await });
            }
        });
        port
    }

    #[tokio::test]
    async fn records_in_flight_at_a_panic_are_published_by_the_next_run() {
        let (folder, panic) = (tempfile::tempdir().unwrap(), Arc::new(Notify::new()));
        let broker = LoopbackBroker::start().await.unwrap();
        let fixture = Fixture::new(folder.path(), first_connection_is_silent(broker, 3, panic.clone()).await);
        (0..3).for_each(|_| fixture.append());
        assert!(fixture.run_until_panic(&panic).await.is_panic());
        assert_eq!((fixture.spool.stats().records, fixture.metrics.results_published.get()), (3, 0));

        let (stop, task) = fixture.start();
        fixture.wait_until_published(3).await;
        fixture.stop(stop, task).await;
    }

    #[tokio::test]
    async fn an_unreachable_broker_is_stated_as_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let fixture = Fixture::new(folder.path(), 1);
        let mut state = fixture.publisher.state.subscribe();
        let (stop, task) = fixture.start();
        tokio::time::timeout(Duration::from_secs(10), state.changed()).await.unwrap().unwrap();
        let reason = fixture.reason().unwrap();
        assert!(reason.starts_with("the network connection failed: "), "{reason}");
        fixture.stop(stop, task).await;
    }
}
