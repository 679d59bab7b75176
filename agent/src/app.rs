//! The agent, put together: every part made, started, and ended in order.
//!
//! The order of the end matters. First the streams stop and the models finish the frames they hold, so that nothing more
//! is appended; then the publisher gets what is left across and says goodbye; health and metrics answer to the last.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::base::files;
use crate::base::metrics::Metrics;
use crate::config::agent::Config;
use crate::message::Topics;
use crate::plan::desired::Node;
use crate::serve::health::Health;
use crate::serve::http::{Served, Server};
use crate::spool::{MemorySpool, Spool};
use crate::tasks::deploy::Deploy;
use crate::tasks::infer::Inspector;
use crate::tasks::publish::Publisher;

/// The file in the data folder that counts how often the agent was started.
const EPOCH_FILE: &str = "boot-epoch";

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
        let served = Served { health: health.clone(), metrics: metrics.clone(), spool: spool.clone() };
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
        let deploy = Deploy::new(node, &config.manifests, inspector, metrics, health);
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
