//! One running stream: its source, its mailbox, and its client of the scheduler, each a supervised task.
//!
//! ```text
//! camera ──> source task ──mailbox (1 frame)──> client task ──job──> deployment ──outcome──> inspector ──> spool
//! ```

use std::collections::HashMap;
use std::sync::Arc;

use lineside_api::kinds::StreamManifest;
use lineside_capture::{Mailbox, SourceMetrics, SourcePolicy, StreamReporter, mailbox};
use lineside_common::supervisor::{OnFailure, SupervisedTask, Supervisor};
use lineside_ipc::frame::Frame;
use lineside_scheduler::{DecodeBudget, Deployment};
use tokio::sync::{Mutex as AsyncMutex, oneshot};

use super::client::StreamClient;
use super::inspector::Inspector;
use super::metrics::StreamMetrics;
use super::registry::StreamRegistry;
use crate::message_writer::MessageWriter;
use crate::stream_runner::StreamRunner;

/// What all streams share.
#[derive(Clone)]
pub struct StreamContext {
    /// Watches over the tasks.
    pub supervisor: Supervisor,
    /// The states of the streams.
    pub registry: Arc<StreamRegistry>,
    /// Where results go.
    pub messages: Arc<MessageWriter>,
    /// What sources may read.
    pub sources: Arc<SourcePolicy>,
    /// The memory for decoding, which all streams share.
    pub decode_budget: DecodeBudget,
    /// What is counted.
    pub metrics: StreamMetrics,
}

/// A stream that runs. It is stopped by [`RunningStream::stop`].
pub(super) struct RunningStream {
    name: String,
    mailbox: Mailbox,
    source: SupervisedTask,
    client: SupervisedTask,
}

impl RunningStream {
    /// Starts a stream whose frames go to a deployment.
    pub(super) fn start(manifest: StreamManifest, deployment: Arc<Deployment>, context: &StreamContext) -> Self {
        let name = manifest.name.clone();
        tracing::info!(
            event = "stream_started",
            stream = name,
            source = %manifest.source,
            model = manifest.model,
            "Stream started"
        );
        let children = context.metrics.of_stream(&name);
        let handle = context.registry.register(&name, &manifest.model, manifest.frame_interval);
        let monitor = handle.monitor();
        let inspector = Arc::new(Inspector::new(&manifest, children.clone(), context.messages.clone(), monitor));
        let (mailbox, receiver) = mailbox(children.skipped.clone());
        let reporter: Arc<dyn StreamReporter> = Arc::new(handle);
        let metrics =
            SourceMetrics { reporter: reporter.clone(), reconnects: children.reconnects, failed: children.failed };
        // The client outlives its task: a restarted task continues with the frames in flight and their order.
        let client = Arc::new(AsyncMutex::new(StreamClient::new(
            receiver,
            deployment,
            inspector,
            context.decode_budget.clone(),
            manifest.pixels_max,
        )));
        let client = context.supervisor.spawn(&format!("stream-client/{name}"), OnFailure::Restart, move |stop| {
            let client = client.clone();
            async move { client.lock().await.run(stop).await }
        });
        let (manifest, policy, left) = (Arc::new(manifest), context.sources.clone(), mailbox.clone());
        let mut is_restart = false;
        let source = context.supervisor.spawn(&format!("stream-source/{name}"), OnFailure::Restart, move |stop| {
            if std::mem::replace(&mut is_restart, true) {
                metrics.reporter.down(Some("its source failed and was restarted"));
            }
            let (manifest, policy) = (manifest.clone(), policy.clone());
            let (mailbox, metrics) = (left.clone(), metrics.clone());
            let work = async move {
                lineside_capture::play(&manifest, &policy, &mailbox, &metrics).await;
                // A source that has an end has reached it. The stream stays, without frames, until it is stopped.
                std::future::pending::<()>().await;
            };
            async move {
                stop.run_until_cancelled(work).await;
            }
        });
        Self { name, mailbox, source, client }
    }

    /// Stops the stream. A frame that still waits is dropped; frames in flight are finished.
    pub(super) async fn stop(self) {
        self.source.stop().await;
        self.client.stop().await;
        tracing::info!(event = "stream_stopped", stream = self.name, "Stream stopped");
    }
}

/// The streams that run on this node.
pub struct RunningStreams {
    context: StreamContext,
    streams: HashMap<String, RunningStream>,
}

impl RunningStreams {
    /// No streams.
    pub fn new(context: StreamContext) -> Self {
        Self { context, streams: HashMap::new() }
    }
}

impl StreamRunner for RunningStreams {
    fn start(&mut self, manifest: StreamManifest, deployment: Arc<Deployment>) {
        let name = manifest.name.clone();
        self.streams.insert(name, RunningStream::start(manifest, deployment, &self.context));
    }

    async fn stop(&mut self, name: &str) {
        if let Some(stream) = self.streams.remove(name) {
            stream.stop().await;
        }
    }

    async fn stop_all(&mut self) {
        futures_util::future::join_all(self.streams.drain().map(|(_, stream)| stream.stop())).await;
    }

    fn next_frame(&self, name: &str) -> Option<oneshot::Receiver<Frame>> {
        self.streams.get(name).map(|stream| stream.mailbox.next_frame())
    }
}
