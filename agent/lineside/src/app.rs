//! The agent, assembled: every part is created, started under supervision, and stopped in order.
//!
//! The order of the stop matters. The sources of the desired state stop first, then the reconciler with the streams and models,
//! so that nothing more is appended to the spool; then the publisher delivers what is left and disconnects; HTTP answers until
//! the end.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use lineside_api::message::Topics;
use lineside_common::metrics::Registrar;
use lineside_common::supervisor::{OnFailure, SupervisedTask, Supervisor, TaskFailure};
use lineside_common::{child_process, error_chain, files};
use lineside_kube::{ClusterClient, ClusterStatePublisher, ClusterStateReader, KubeMetrics};
use lineside_models::admission::AdmissionLimits;
use lineside_models::fetch::Fetcher;
use lineside_models::last_good::LastGoodVersions;
use lineside_models::signing::Keyring;
use lineside_models::store::{Index, IndexState, Store};
use lineside_models::{AdmissionMetrics, FetchMetrics, StoreMetrics};
use lineside_mqtt::command::SetLevel;
use lineside_mqtt::metrics::MqttMetrics;
use lineside_mqtt::publisher::{Publisher, PublisherContext};
use lineside_scheduler::{DecodeBudget, SchedulerMetrics};
use lineside_spool::{Options, RECORD_BYTES_MAX, Spool, SpoolMetrics};
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, mpsc, watch};

use crate::config::settings::{Config, DATA_FOLDER_ENTRIES, DesiredSource};
use crate::data_folder::{DataFolder, FolderIdentity};
use crate::desired::cluster::ClusterSync;
use crate::desired::folder_watcher::{FolderMetrics, FolderWatcher};
use crate::desired::{DesiredState, Node};
use crate::http::health::Health;
use crate::http::routes::{HttpState, probe_router, router};
use crate::http::server::{HttpMetrics, Server};
use crate::http::status_store::StatusStore;
use crate::message_writer::MessageWriter;
use crate::metrics_publisher::publish_metrics;
use crate::reconciler::{
    LoadContext, MemoryBudget, ModelMetrics, Published, Reconciler, ReconcilerParts, StatePublisher, VersionLoader,
};
use crate::rules_child::RuleChecker;
use crate::streams::{RunningStreams, StreamContext, StreamMetrics, StreamRegistry};

/// The model store's folder in the data folder.
pub const STORE_FOLDER: &str = "store";
/// Commands that wait for the reconciler.
const COMMANDS_MAX: usize = 16;
/// The hidden subcommand that tries to open the store's index.
pub const INDEX_SUBCOMMAND: &str = "index-child";
/// Longest time to open the store's index.
const INDEX_DEADLINE: Duration = Duration::from_secs(3);

/// A running agent.
pub struct App {
    http: SocketAddr,
    probes: Option<SocketAddr>,
    supervisor: Supervisor,
    /// In the order in which they are stopped.
    tasks: Vec<SupervisedTask>,
    spool: Arc<Spool>,
    /// The lock is held until everything has stopped.
    _data_folder: DataFolder,
}

/// What the parts of the agent share.
struct Shared {
    registrar: Registrar,
    supervisor: Supervisor,
    spool: Arc<Spool>,
    store: Arc<Store>,
    messages: Arc<MessageWriter>,
    registry: Arc<StreamRegistry>,
    status: Arc<StatusStore>,
    health: Arc<Health>,
    relist: Arc<Notify>,
    topics: Topics,
}

impl App {
    /// Starts everything.
    ///
    /// # Errors
    /// When the data folder cannot be used, the HTTP address cannot be bound, or the trusted keys or the cluster's
    /// configuration cannot be read.
    pub async fn start(config: Config, set_level: SetLevel) -> anyhow::Result<Self> {
        // Before anything in the folder is touched: another agent may be using it.
        let data_folder = DataFolder::open(&config.data_dir, &config.node)
            .with_context(|| format!("--data-dir {} cannot be used", config.data_dir.display()))?;
        let FolderIdentity { folder, epoch } = data_folder.identity().clone();
        make_data_folder_private(&config.data_dir);
        let registrar = Registrar::default();
        let supervisor = supervisor(&registrar)?;
        let server = Server::bind(config.http)?;
        let http = server.address();
        let probe_server = Server::bind_probes(config.probes)?;
        let probes = probe_server.as_ref().map(Server::address);
        let keys = config.models.trusted_keys.as_ref();
        let keys = keys.map(|path| Keyring::read(path, config.models.signature_threshold).context("--trusted-keys"));
        let keys = keys.transpose()?;
        let store_metrics = StoreMetrics::register(&registrar)?;
        let store = Arc::new(open_store(&config, &store_metrics)?);
        let spool = open_spool(&config, &registrar, &supervisor)?;
        let topics = Topics::new(&config.prefix, &config.site, &config.node);
        let messages = Arc::new(MessageWriter::new(&config, data_folder.identity(), topics.clone(), spool.clone()));
        let stream_metrics = StreamMetrics::register(&registrar)?;
        let shared = Shared {
            registry: StreamRegistry::new(messages.clone(), stream_metrics.up.clone()),
            status: Arc::new(StatusStore::new(&config.node, &config.site, epoch, store.clone())),
            health: Arc::new(Health::new(config.readiness, Instant::now())),
            relist: Arc::new(Notify::new()),
            registrar,
            supervisor,
            spool,
            store,
            messages,
            topics,
        };
        tracing::info!(
            event = "agent_started",
            version = env!("CARGO_PKG_VERSION"),
            node = config.node,
            site = config.site,
            folder_id = folder,
            epoch,
            %http,
            probes = probes.map(|address| address.to_string()),
            brokers = ?config.mqtt.brokers,
            desired_state = %config.desired_state,
            waiting = shared.spool.stats().records,
            "Lineside started"
        );
        let serve = shared.serve(&config, server, probe_server, store_metrics.clone())?;
        let (command_sender, commands) = mpsc::channel(COMMANDS_MAX);
        let metrics_task = shared.publish_metrics(&config, store_metrics.clone());
        let publisher = Arc::new(Publisher::new(PublisherContext {
            mqtt: config.mqtt.clone(),
            topics: shared.topics.clone(),
            node: config.node.clone(),
            site: config.site.clone(),
            folder,
            epoch,
            data_dir: config.data_dir.clone(),
            spool: shared.spool.clone(),
            streams: shared.registry.subscribe(),
            commands: command_sender,
            set_level,
            metrics: MqttMetrics::register(&shared.registrar)?,
        }));
        let (broker, node_clash) = (publisher.broker_state(), publisher.node_clash());
        broker.register_gauge(&shared.registrar)?;
        let publish = shared.supervisor.spawn("publisher", OnFailure::Restart, move |stop| {
            let publisher = publisher.clone();
            async move { publisher.run(stop).await }
        });
        let (desired_sender, desired) = watch::channel(None);
        let (mut tasks, cluster) = shared.follow_desired_state(&config, desired_sender).await?;
        let node = Node { name: config.node.clone(), labels: config.labels.clone() };
        let memory = MemoryBudget::of_node();
        tasks.extend(memory.enforce(&shared.supervisor));
        let loader: Arc<dyn VersionLoader> = Arc::new(Arc::new(LoadContext {
            fetcher: Fetcher::new(
                shared.store.clone(),
                config.models.clone(),
                FetchMetrics::register(&shared.registrar)?,
                store_metrics,
            ),
            store: shared.store.clone(),
            keys,
            limits: AdmissionLimits {
                memory_bytes: config.models.admission_memory_bytes,
                seconds: config.models.admission_seconds,
                result_bytes: RECORD_BYTES_MAX,
            },
            metrics: AdmissionMetrics::register(&shared.registrar)?,
            memory,
            decode_bytes: config.sources.decode_bytes,
            turn: Arc::new(Semaphore::new(1)),
        }));
        let blobs = shared.store.clone();
        let decode_budget = DecodeBudget::new(config.sources.decode_bytes);
        let context = StreamContext {
            supervisor: shared.supervisor.clone(),
            registry: shared.registry.clone(),
            messages: shared.messages.clone(),
            sources: Arc::new(config.sources.policy.clone()),
            decode_budget: decode_budget.clone(),
            metrics: stream_metrics,
        };
        let reconciler = Reconciler::new(ReconcilerParts {
            node,
            desired,
            relist: shared.relist.clone(),
            last_good: LastGoodVersions::read(&config.data_dir),
            has_blob: Box::new(move |digest| blobs.open_blob(digest).is_some()),
            loader,
            streams: RunningStreams::new(context),
            scheduler_metrics: SchedulerMetrics::register(&shared.registrar)?,
            commands,
            decode_budget,
            publisher: StatePublisher {
                status: shared.status.clone(),
                health: shared.health.clone(),
                metrics: ModelMetrics::register(&shared.registrar)?,
                events: shared.messages.clone(),
                spool: shared.spool.clone(),
                supervisor: shared.supervisor.clone(),
                streams: shared.registry.clone(),
                broker,
                node_clash,
                data_folder_problem: data_folder.refused_write().map(str::to_owned),
                cluster,
                published: Published::default(),
            },
        });
        // Its state cannot be rebuilt: which versions run, and which loads are on the way.
        let reconciler = Mutex::new(Some(reconciler));
        tasks.push(shared.supervisor.spawn("reconciler", OnFailure::Exit, move |stop| {
            let reconciler = reconciler.lock().take();
            async move {
                if let Some(reconciler) = reconciler {
                    reconciler.run(stop).await;
                }
            }
        }));
        tasks.extend(metrics_task);
        tasks.push(publish);
        tasks.extend(serve);
        Ok(Self { http, probes, supervisor: shared.supervisor, tasks, spool: shared.spool, _data_folder: data_folder })
    }

    /// The address of the HTTP server.
    pub fn http(&self) -> SocketAddr {
        self.http
    }

    /// The address of the probe server, where there is one.
    pub fn probes(&self) -> Option<SocketAddr> {
        self.probes
    }

    /// The supervisor of all tasks.
    pub fn supervisor(&self) -> &Supervisor {
        &self.supervisor
    }

    /// Waits until a task fails that cannot be restarted. The process has to end then.
    pub async fn failed(&self) -> TaskFailure {
        self.supervisor.failed().await
    }

    /// Stops everything, in order.
    pub async fn stop(self) {
        for task in self.tasks {
            task.stop().await;
        }
        let spool = self.spool;
        if let Err(error) = tokio::task::spawn_blocking(move || spool.close()).await {
            tracing::error!(event = "spool_not_closed", %error, "Closing the spool panicked");
        }
        tracing::info!(event = "agent_stopped", "Lineside stopped");
    }
}

impl Shared {
    /// Starts the HTTP server, and the probe server where there is one.
    fn serve(
        &self,
        config: &Config,
        server: Server,
        probe_server: Option<Server>,
        store_metrics: StoreMetrics,
    ) -> anyhow::Result<Vec<SupervisedTask>> {
        let state = HttpState {
            health: self.health.clone(),
            registrar: self.registrar.clone(),
            spool: self.spool.clone(),
            status: self.status.clone(),
            store: self.store.clone(),
            store_metrics,
            streams: self.registry.clone(),
            peer_token: config.models.peer_token.clone(),
        };
        let metrics = HttpMetrics::register(&self.registrar)?;
        let probes = probe_server.map(|server| ("probes", server, probe_router(state.clone())));
        let servers = probes.into_iter().chain([("http", server, router(state))]);
        Ok(servers
            .map(|(name, server, router)| {
                let (server, metrics) = (Arc::new(server), metrics.clone());
                self.supervisor.spawn(name, OnFailure::Restart, move |stop| {
                    let (server, router, metrics) = (server.clone(), router.clone(), metrics.clone());
                    async move { server.run(router, metrics, stop).await }
                })
            })
            .collect())
    }

    /// Starts publishing metrics over MQTT, where that is configured.
    fn publish_metrics(&self, config: &Config, store_metrics: StoreMetrics) -> Option<SupervisedTask> {
        let every = config.mqtt.metrics_every?;
        let (registrar, messages) = (self.registrar.clone(), self.messages.clone());
        let (spool, store, streams) = (self.spool.clone(), self.store.clone(), self.registry.clone());
        Some(self.supervisor.spawn("metrics-publisher", OnFailure::Restart, move |stop| {
            let (spool, store, store_metrics) = (spool.clone(), store.clone(), store_metrics.clone());
            let streams = streams.clone();
            let refresh = move || crate::http::routes::refresh(&spool, &store, &store_metrics, &streams);
            publish_metrics(registrar.clone(), messages.clone(), every, refresh, stop)
        }))
    }

    /// Starts what follows the desired state: a folder of manifests, or a cluster. Returns the state of the cluster's
    /// connection where there is one.
    async fn follow_desired_state(
        &self,
        config: &Config,
        desired: watch::Sender<Option<Arc<DesiredState>>>,
    ) -> anyhow::Result<(Vec<SupervisedTask>, Option<ClusterStateReader>)> {
        match &config.desired_state {
            DesiredSource::Folder(folder) => {
                let metrics = FolderMetrics::register(&self.registrar)?;
                let rules = Arc::new(RuleChecker::of_this_program());
                let watcher =
                    Arc::new(FolderWatcher::new(folder.clone(), desired, self.relist.clone(), metrics, rules));
                let task = self.supervisor.spawn("manifest-watcher", OnFailure::Restart, move |stop| {
                    let watcher = watcher.clone();
                    async move { watcher.run(stop).await }
                });
                Ok((vec![task], None))
            }
            DesiredSource::Cluster(access) => {
                let metrics = KubeMetrics::register(&self.registrar)?;
                let client = ClusterClient::new(access.clone(), "lineside-agent", &config.node).await?;
                let sync = ClusterSync {
                    cluster: Arc::new(client),
                    node: Node { name: config.node.clone(), labels: config.labels.clone() },
                    data_dir: config.data_dir.clone(),
                    desired,
                    reread: self.relist.clone(),
                    status: self.status.clone(),
                    watch_failures: metrics.cluster_watch_failures,
                    state: ClusterStatePublisher::new(Instant::now()),
                    rules: Arc::new(RuleChecker::of_this_program()),
                };
                let state = sync.state.reader();
                state.register_gauges(&self.registrar)?;
                Ok((sync.start(&self.supervisor), Some(state)))
            }
        }
    }
}

fn supervisor(registrar: &Registrar) -> anyhow::Result<Supervisor> {
    let restarts = registrar.counters("task_restarts_total", "Tasks that failed, by name.", &["task"])?;
    let build = registrar.gauges("build_info", "Always 1; the labels state the version.", &["version"])?;
    build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
    Ok(Supervisor::new(restarts))
}

/// Restricts the data folder of an earlier version to the user of the agent: the folder and the agent's own entries. Other
/// entries, such as models that were copied into it, keep their rights. Where another user owns the folder the agent cannot
/// restrict it and continues; what it creates is private all the same.
fn make_data_folder_private(folder: &Path) {
    if !folder.exists() {
        return;
    }
    let entries = DATA_FOLDER_ENTRIES.iter().map(|name| files::make_private(&folder.join(name)));
    for outcome in std::iter::once(files::make_folder_private(folder)).chain(entries) {
        if let Err(error) = outcome {
            tracing::warn!(
                event = "data_folder_not_private",
                folder = %folder.display(),
                %error,
                "The rights of the data folder cannot be restricted to the user of the agent"
            );
        }
    }
}

/// Opens the spool. Records of earlier runs are delivered first.
fn open_spool(config: &Config, registrar: &Registrar, supervisor: &Supervisor) -> anyhow::Result<Arc<Spool>> {
    let metrics = SpoolMetrics::register(registrar)?;
    let mut options = Options::new(&config.spool, metrics);
    options.failure_reporter = Some(supervisor.reporter("spool-writer"));
    let folder = lineside_spool::folder(&config.data_dir);
    Spool::open(&folder, options).with_context(|| format!("the spool in {} cannot be opened", folder.display()))
}

/// Opens the model store. A child process tries to open its index first: sled may never return from a damaged file.
fn open_store(config: &Config, metrics: &StoreMetrics) -> anyhow::Result<Store> {
    let root = config.data_dir.join(STORE_FOLDER);
    files::create_private_folder(&root)
        .with_context(|| format!("--data-dir {} cannot be used", config.data_dir.display()))?;
    let (index, failure) = Index::open(&Store::index_folder(&root), |folder| {
        let mut command = child_process::own_command(INDEX_SUBCOMMAND);
        command.arg(folder);
        let output = child_process::run(command, &[], INDEX_DEADLINE, || false).map_err(|error| error.to_string())?;
        match output.status {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(format!("it cannot be opened ({status})")),
            None => Err(format!("it cannot be opened within {INDEX_DEADLINE:?}")),
        }
    });
    let store = Store::open(&root, config.models.store_bytes_max, index).context("the store cannot be opened")?;
    // Stale files cost space and nothing else. They stay on a disk that accepts no writes.
    if let Err(error) = store.remove_stale_files() {
        let reason = error_chain(&error);
        tracing::warn!(event = "store_not_cleaned", reason, "Stale files of the store cannot be removed");
    }
    match (store.index_state(), failure) {
        (IndexState::Rebuilt, Some(error)) => {
            metrics.index_rebuilt.inc();
            let reason = error_chain(&error);
            tracing::warn!(event = "store_index_rebuilt", reason, "The store's index was rebuilt");
        }
        (_, Some(error)) => {
            let reason = error_chain(&error);
            tracing::warn!(event = "store_index_off", reason, "The store works without its index");
        }
        (_, None) => {}
    }
    Ok(store)
}
