//! The agent, put together: every part made, started, and ended in order.
//!
//! The order of the end matters. First the streams stop and the models finish the frames they hold, so that nothing more
//! is appended; then the publisher gets what is left across and says goodbye; health and metrics answer to the last.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::base::metrics::Metrics;
use crate::base::{child, files};
use crate::config::agent::Config;
use crate::fetch::Fetcher;
use crate::message::Topics;
use crate::plan::desired::Node;
use crate::serve::health::Health;
use crate::serve::http::{Served, Server};
use crate::serve::status::Board;
use crate::spool::{MemorySpool, Spool};
use crate::store::{Index, IndexState, Store};
use crate::tasks::deploy::{Deploy, Parts};
use crate::tasks::infer::Inspector;
use crate::tasks::publish::Publisher;
use crate::trust::Keyring;
use crate::vet::Limits;

/// The file in the data folder that counts how often the agent was started.
const EPOCH_FILE: &str = "boot-epoch";

/// The store's folder in the data folder.
pub const STORE_FOLDER: &str = "store";
/// The hidden subcommand that looks at the store's index.
pub const INDEX_SUBCOMMAND: &str = "index-child";
/// How long the index may take to open.
const INDEX_DEADLINE: Duration = Duration::from_secs(3);

/// A running agent.
pub struct App {
    http: SocketAddr,
    deploy: Part,
    publish: Part,
    serve: Part,
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
    pub async fn start(config: Config) -> anyhow::Result<Self> {
        let epoch = next_epoch(&config)?;
        let metrics = Metrics::new().context("the metrics cannot be set up")?;
        let server = Server::bind(config.http).await?;
        let keys = match &config.models.trusted_keys {
            Some(path) => Some(
                Keyring::read(path, config.models.signature_threshold)
                    .map_err(|reason| anyhow::anyhow!("--trusted-keys: {reason}"))?,
            ),
            None => None,
        };
        let store = Arc::new(open_store(&config, &metrics)?);
        let http = server.address();
        let spool: Arc<dyn Spool> = Arc::new(MemorySpool::new(config.spool_bytes_max));
        let topics = Topics::new(&config.prefix, &config.site, &config.node);
        let health = Arc::new(Health::new(Instant::now()));
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            node = config.node,
            site = config.site,
            epoch,
            %http,
            broker = %config.broker,
            manifests = %config.manifests.display(),
            "lineside starts"
        );
        let board = Arc::new(Board::new(&config.node, &config.site, epoch));
        let served = Served {
            health: health.clone(),
            metrics: metrics.clone(),
            spool: spool.clone(),
            board: board.clone(),
            store: store.clone(),
            peer_token: config.models.peer_token.clone(),
        };
        let serve = Part::start("serve", |stop| server.run(served, stop));
        let publisher = Publisher {
            broker: config.broker,
            topics: topics.clone(),
            node: config.node.clone(),
            site: config.site.clone(),
            epoch,
            spool: spool.clone(),
            metrics: metrics.clone(),
        };
        let publish = Part::start("publish", |stop| publisher.run(stop));
        let inspector = Inspector::new(&config.node, &config.site, epoch, topics, spool, metrics.clone());
        let node = Node { name: config.node, labels: config.labels };
        let models = config.models;
        let limits = Limits { memory_bytes: models.vet_memory_bytes, seconds: models.vet_seconds };
        let fetcher = Fetcher::new(store.clone(), models, metrics.clone());
        let (manifests, data_dir) = (config.manifests, config.data_dir);
        let deploy = Deploy::new(Parts {
            node,
            manifests,
            data_dir,
            inspector,
            metrics,
            health,
            board,
            store,
            fetcher,
            keys,
            limits,
        });
        let deploy = Part::start("deploy", |stop| deploy.run(stop));
        Ok(Self { http, deploy, publish, serve })
    }

    /// Where health and metrics are served.
    pub fn http(&self) -> SocketAddr {
        self.http
    }

    /// Ends everything, in order.
    pub async fn end(self) {
        self.deploy.end().await;
        self.publish.end().await;
        self.serve.end().await;
        tracing::info!("lineside ended");
    }
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
        let ended = child::run(command, &[], INDEX_DEADLINE, || false).map_err(|error| error.to_string())?;
        match ended.status {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(format!("it cannot be opened ({status})")),
            None => Err(format!("it cannot be opened within {INDEX_DEADLINE:?}")),
        }
    });
    let store = Store::open(&root, config.models.store_bytes_max, index).context("the store cannot be opened")?;
    store.tidy().context("the store cannot be tidied")?;
    match (store.index_state(), reason) {
        (IndexState::Rebuilt, Some(reason)) => {
            metrics.store_index_rebuilt.inc();
            tracing::warn!(reason, "the store's index was rebuilt");
        }
        (_, Some(reason)) => tracing::warn!(reason, "the store goes without its index"),
        (_, None) => {}
    }
    Ok(store)
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
