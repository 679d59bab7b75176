//! One task per stream: it plays the stream's source into the queue of the stream's model.

use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::inspector::StreamContext;
use crate::streams::registry::StreamRegistry;
use lineside_api::kinds::StreamManifest;
use lineside_capture::SourceMetrics;
use lineside_common::metrics::Metrics;
use lineside_scheduler::frames::{CapturedFrame, FrameTap};
use lineside_scheduler::slot::Deployment;

/// A stream that is being played.
pub struct Capture {
    onlooker: FrameTap<StreamContext>,
    stop: CancellationToken,
    task: JoinHandle<()>,
    name: String,
}

impl Capture {
    /// Starts playing a stream into the slot of its model.
    pub fn start(
        manifest: StreamManifest,
        slot: &Deployment<StreamContext>,
        metrics: &Metrics,
        registry: &Arc<StreamRegistry>,
    ) -> Self {
        let name = manifest.name.clone();
        let source = SourceMetrics {
            presence: registry.begin(&name, &manifest.model, metrics.stream_up.with_label_values(&[&name])),
            reconnects: metrics.stream_reconnects.with_label_values(&[&name]),
            failed: metrics.frames.with_label_values(&[&name, "failed"]),
        };
        let context = Arc::new(StreamContext::new(&manifest, metrics));
        let mailbox = slot.queue().attach(context, metrics.frames.with_label_values(&[&name, "skipped"]));
        let onlooker = mailbox.onlooker();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            tracing::info!(event = "stream_started", stream = manifest.name, source = %manifest.source, model = manifest.model, "stream starts");
            // Whatever the source waits for, the stop ends the wait: nothing in it needs an orderly end of its own.
            tokio::select! {
                () = lineside_capture::play(&manifest, &mailbox, &source) => {}
                () = stopped.cancelled() => {}
            }
        });
        Self { onlooker, stop, task, name }
    }

    /// The next frame that comes.
    pub fn next_frame(&self) -> oneshot::Receiver<CapturedFrame> {
        self.onlooker.next_frame()
    }

    /// Stops the stream. A frame that still waits is dropped.
    pub async fn stop(self, metrics: &Metrics) {
        self.stop.cancel();
        if let Err(error) = self.task.await {
            tracing::error!(stream = self.name, %error, "the stream's task had panicked");
        }
        // A stream that is not there is neither up nor down. The series may be missing already; that is as good.
        drop(metrics.stream_up.remove_label_values(&[&self.name]));
        tracing::info!(event = "stream_stopped", stream = self.name, "stream stopped");
    }
}
