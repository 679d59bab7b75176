//! The interface through which the reconciler starts and stops streams. It is a trait, so that the tests of the reconciler run
//! without cameras.

use std::sync::Arc;

use lineside_api::kinds::StreamManifest;
use lineside_ipc::frame::Frame;
use lineside_scheduler::Deployment;
use tokio::sync::oneshot;

/// Starts and stops streams.
pub trait StreamRunner: Send {
    /// Starts a stream whose frames go to a deployment.
    fn start(&mut self, manifest: StreamManifest, deployment: Arc<Deployment>);

    /// Stops a stream and waits until it has stopped.
    fn stop(&mut self, name: &str) -> impl Future<Output = ()> + Send;

    /// Stops all streams.
    fn stop_all(&mut self) -> impl Future<Output = ()> + Send;

    /// A copy of the next frame of a stream; `None` when it does not run.
    fn next_frame(&self, name: &str) -> Option<oneshot::Receiver<Frame>>;
}
