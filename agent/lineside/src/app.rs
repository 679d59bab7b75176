//! The agent, put together: every part made, started, and ended in order.
//!
//! The order of the end matters. First the streams stop and the models finish the frames they hold, so that nothing more
//! is appended; then the publisher gets what is left across and says goodbye; health and metrics answer to the last.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::config::settings::{Config, DesiredSource};
use crate::desired::Node;
use crate::http::health::Health;
use crate::http::server;
use crate::http::server::{HttpState, Server};
use crate::http::status_store::StatusStore;
use crate::message_writer::MessageWriter;
use crate::streams::registry::StreamRegistry;
use lineside_api::message::Topics;
use lineside_common::metrics::Metrics;
use lineside_common::{child_process, error_chain, files};
use lineside_kube::ClusterClient;
use lineside_models::fetch::Fetcher;
use lineside_models::{FetchMetrics, StoreMetrics};

use crate::desired::cluster::ClusterSync;
use crate::desired::folder_watcher::follow;
use crate::metrics_publisher::measure;
use crate::reconciler::{Parts, Reconciler};
use crate::streams::inspector::Inspector;
use lineside_models::admission::AdmissionLimits;
use lineside_models::signing::Keyring;
use lineside_models::store::{Index, IndexState, Store};
use lineside_mqtt::publisher::{Publisher, SetLevel};
use lineside_spool::{Options, Spool, WhenFull};

/// The file in the data folder that counts how often the agent was started.
const EPOCH_FILE: &str = "boot-epoch";

/// The store's folder in the data folder.
pub const STORE_FOLDER: &str = "store";
/// Orders of operators that wait at most.
const COMMANDS_MAX: usize = 16;
/// The hidden subcommand that looks at the store's index.
pub const INDEX_SUBCOMMAND: &str = "index-child";
/// How long the index may take to open.
const INDEX_DEADLINE: Duration = Duration::from_secs(3);

/// A running agent.
pub struct App {
    http: SocketAddr,
    follow: Part,
    deploy: Part,
    measure: Option<Part>,
    publish: Part,
    serve: Part,
    spool: Arc<Spool>,
}

/// A task with a stop of its own.
struct Part {
    stop: CancellationToken,
    task: JoinHandle<()>,
    name: &'static str,
}

impl Part {
    fn start<F: Future<Output = ()> + Send + 'static>(
        name: &'static str,
        task: impl FnOnce(CancellationToken) -> F,
    ) -> Self {
        let stop = CancellationToken::new();
        Self { task: tokio::spawn(task(stop.clone())), stop, name }
    }

    async fn end(self) {
        self.stop.cancel();
        if let Err(error) = self.task.await {
            tracing::error!(part = self.name, %error, "a part of the agent had panicked");
        }
    }
}

impl App {
    /// Starts everything.
    ///
    /// # Errors
    /// When the data folder cannot be written or the HTTP address cannot be had.
    pub async fn start(config: Config, set_level: SetLevel) -> anyhow::Result<Self> {
        let epoch = next_epoch(&config)?;
        let metrics = Metrics::new().context("the metrics cannot be set up")?;
        let server = Server::bind(config.http).await?;
        let keys = match &config.models.trusted_keys {
            Some(path) => Some(Keyring::read(path, config.models.signature_threshold).context("--trusted-keys")?),
            None => None,
        };
        let store = Arc::new(open_store(&config, &metrics)?);
        let http = server.address();
        let spool = open_spool(&config, &metrics)?;
        let topics = Topics::new(&config.prefix, &config.site, &config.node);
        let when_full = if config.spool.drops_newest { WhenFull::DropNewest } else { WhenFull::DropOldest };
        let (node, site) = (&config.node, &config.site);
        let message_writer = Arc::new(MessageWriter::new(node, site, epoch, topics.clone(), spool.clone(), when_full));
        let registry = StreamRegistry::new(message_writer.clone());
        let (command_sender, commands) = mpsc::channel(COMMANDS_MAX);
        let health = Arc::new(Health::new(Instant::now()));
        tracing::info!(
            event = "agent_started", version = env!("CARGO_PKG_VERSION"),
            node = config.node,
            site = config.site,
            epoch,
            %http,
            brokers = ?config.mqtt.brokers,
            desired_state = %config.desired_state,
            waiting = spool.stats().records,
            "lineside starts"
        );
        let board = Arc::new(StatusStore::new(&config.node, &config.site, epoch, store.clone()));
        let served = HttpState {
            health: health.clone(),
            metrics: metrics.clone(),
            spool: spool.clone(),
            board: board.clone(),
            store: store.clone(),
            peer_token: config.models.peer_token.clone(),
        };
        let refused = metrics.http_refused.clone();
        let serve = Part::start("serve", |stop| server.run(server::router(served), refused, stop));
        let measure = config.mqtt.metrics_every.map(|every| {
            let (counted, looked_at, stored) = (metrics.clone(), spool.clone(), store.clone());
            let refresh = move || server::refresh(&counted, &looked_at, &stored);
            Part::start("measure", |stop| measure(metrics.clone(), message_writer.clone(), every, refresh, stop))
        });
        let publisher = Publisher {
            mqtt: config.mqtt,
            topics,
            node: config.node.clone(),
            site: config.site.clone(),
            epoch,
            data_dir: config.data_dir.clone(),
            spool: spool.clone(),
            registry: registry.follow(),
            commands: command_sender,
            set_level,
            metrics: metrics.clone(),
        };
        let publish = Part::start("publish", |stop| publisher.run(stop));
        let inspector = Inspector::new(message_writer.clone(), metrics.clone());
        let node = Node { name: config.node, labels: config.labels };
        let models = config.models;
        let limits = AdmissionLimits { memory_bytes: models.admission_memory_bytes, seconds: models.admission_seconds };
        let fetcher = Fetcher::new(store.clone(), models, fetch_metrics(&metrics), store_metrics(&metrics));
        let (say, desired_state) = watch::channel(None);
        let again = Arc::new(Notify::new());
        let has_cluster = matches!(config.desired_state, DesiredSource::ClusterClient(_));
        let (look_again, counted) = (again.clone(), metrics.clone());
        let follow = match config.desired_state {
            DesiredSource::Folder(folder) => {
                Part::start("follow", |stop| async move { follow(&folder, say, look_again, counted, stop).await })
            }
            DesiredSource::ClusterClient(access) => {
                let sync = ClusterSync {
                    cluster: Arc::new(ClusterClient::new(access, "lineside-agent", &node.name).await?),
                    node: node.clone(),
                    data_dir: config.data_dir.clone(),
                    desired_state: say,
                    again: look_again,
                    board: board.clone(),
                    metrics: counted,
                };
                Part::start("sync", |stop| sync.run(stop))
            }
        };
        let deploy = Reconciler::new(Parts {
            node,
            desired_state,
            again,
            has_cluster,
            data_dir: config.data_dir,
            inspector,
            metrics,
            commands,
            registry,
            message_writer,
            spool: spool.clone(),
            health,
            board,
            store,
            fetcher,
            keys,
            limits,
        });
        let deploy = Part::start("deploy", |stop| deploy.run(stop));
        Ok(Self { http, follow, deploy, measure, publish, serve, spool })
    }

    /// Where health and metrics are served.
    pub fn http(&self) -> SocketAddr {
        self.http
    }

    /// Ends everything, in order.
    pub async fn end(self) {
        self.follow.end().await;
        self.deploy.end().await;
        if let Some(measure) = self.measure {
            measure.end().await;
        }
        self.publish.end().await;
        self.serve.end().await;
        let spool = self.spool;
        if let Err(error) = tokio::task::spawn_blocking(move || spool.close()).await {
            tracing::error!(%error, "the spool could not be closed in order");
        }
        tracing::info!(event = "agent_stopped", "lineside ended");
    }
}

/// Opens the spool. What the last run left in it is sent first.
fn open_spool(config: &Config, metrics: &Metrics) -> anyhow::Result<Arc<Spool>> {
    let settings = config.spool;
    let counters = (metrics.spool_dropped.clone(), metrics.spool_written_bytes.clone(), metrics.spool_syncs.clone());
    let options = Options {
        age_max_seconds: settings.age_max_seconds,
        sync_interval: settings.sync_interval,
        ..Options::new(settings.bytes_max, counters.0, counters.1, counters.2)
    };
    let folder = lineside_spool::folder(&config.data_dir);
    Spool::open(&folder, options).with_context(|| format!("the spool in {} cannot be opened", folder.display()))
}

/// Opens the store with its index, which a child process looks at first: sled may never come back from a damaged file.
fn open_store(config: &Config, metrics: &Metrics) -> anyhow::Result<Store> {
    let root = config.data_dir.join(STORE_FOLDER);
    std::fs::create_dir_all(&root)
        .with_context(|| format!("--data-dir {} cannot be used", config.data_dir.display()))?;
    let (index, reason) = Index::open(&Store::index_folder(&root), |folder| {
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        let mut command = std::process::Command::new(program);
        command.arg(INDEX_SUBCOMMAND).arg(folder);
        let ended = child_process::run(command, &[], INDEX_DEADLINE, || false).map_err(|error| error.to_string())?;
        match ended.status {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(format!("it cannot be opened ({status})")),
            None => Err(format!("it cannot be opened within {INDEX_DEADLINE:?}")),
        }
    });
    let store = Store::open(&root, config.models.store_bytes_max, index).context("the store cannot be opened")?;
    store.remove_stale_files().context("stale files of the store cannot be removed")?;
    match (store.index_state(), reason) {
        (IndexState::Rebuilt, Some(error)) => {
            metrics.store_index_rebuilt.inc();
            tracing::warn!(
                event = "store_index_rebuilt",
                reason = error_chain(&error),
                "the store's index was rebuilt"
            );
        }
        (_, Some(error)) => {
            let reason = error_chain(&error);
            tracing::warn!(event = "store_index_off", reason, "The store works without its index");
        }
        (_, None) => {}
    }
    Ok(store)
}

/// The metrics of fetching, in the registry of today's `Metrics`.
fn fetch_metrics(metrics: &Metrics) -> FetchMetrics {
    FetchMetrics {
        peer_bytes: metrics.fetch_bytes.with_label_values(&["peer"]),
        source_bytes: metrics.fetch_bytes.with_label_values(&["source"]),
        failures: metrics.fetch_failures.clone(),
    }
}

/// The metrics of the store, in the registry of today's `Metrics`.
fn store_metrics(metrics: &Metrics) -> StoreMetrics {
    StoreMetrics {
        bytes: metrics.store_bytes.clone(),
        quota_bytes: metrics.store_quota_bytes.clone(),
        evictions: metrics.store_evictions.clone(),
        index_rebuilt: metrics.store_index_rebuilt.clone(),
    }
}

/// Counts this start. The number goes into every result's id, so that no id is ever given twice, and is on disk before
/// the first result is made.
fn next_epoch(config: &Config) -> anyhow::Result<u64> {
    let folder = &config.data_dir;
    let advice = || format!("--data-dir {} cannot be used", folder.display());
    std::fs::create_dir_all(folder).with_context(advice)?;
    let path = folder.join(EPOCH_FILE);
    let last = match std::fs::read_to_string(&path) {
        Ok(text) => text.trim().parse::<u64>().with_context(|| {
            format!("{} holds no number; write one into it that is higher than any epoch used before", path.display())
        })?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error).with_context(advice),
    };
    let epoch = last.checked_add(1).context("the boot epoch has come to its end")?;
    files::replace(&path, format!("{epoch}\n").as_bytes()).with_context(advice)?;
    Ok(epoch)
}
