//! A model's live instances: the threads that look at its streams' frames, and the way one version follows another.
//!
//! The engine runs on threads of its own, never on the async runtime. A new version's instances are made ready beside the
//! old ones; then the queue begins a new epoch, the old instances finish the frame they hold and end, and the new ones
//! take the next. No frame is lost, and every result bears the version that made it.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use lineside_inference::pipeline::Pipeline;

use crate::frames::{FrameQueue, Taken};
use lineside_api::message::ModelInfo;

/// A model that is ready to serve: one warm pipeline per instance.
pub struct Ready {
    /// What results say of it.
    pub info: Arc<ModelInfo>,
    /// One for each thread.
    pub pipelines: Vec<Pipeline>,
}

/// A model's place on this node. It outlives the versions that serve in it.
pub struct Deployment<S> {
    name: String,
    queue: Arc<FrameQueue<S>>,
    serving: Mutex<Serving>,
}

#[derive(Default)]
struct Serving {
    info: Option<Arc<ModelInfo>>,
    threads: Vec<JoinHandle<()>>,
}

impl<S: Send + Sync + 'static> Deployment<S> {
    /// An empty slot.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), queue: Arc::default(), serving: Mutex::default() }
    }

    /// Where this model's streams leave their frames.
    pub fn queue(&self) -> &Arc<FrameQueue<S>> {
        &self.queue
    }

    /// The version that serves.
    pub fn serving(&self) -> Option<Arc<ModelInfo>> {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner).info.clone()
    }

    /// Lets a version take over from whatever served. `work` is called for every frame, on the instance's own thread.
    /// The threads of the version before are joined before this returns, so call it where blocking is allowed.
    ///
    /// # Errors
    /// When a thread cannot be started; then the version before serves on.
    pub fn serve(
        &self,
        ready: Ready,
        work: impl Fn(&mut Pipeline, &ModelInfo, Taken<S>) + Send + Sync + 'static,
    ) -> std::io::Result<()> {
        let work = Arc::new(work);
        // The threads are started behind a gate, so that the version before serves on when one of them cannot be.
        let mut threads = Vec::new();
        let mut gates = Vec::new();
        for (index, mut pipeline) in ready.pipelines.into_iter().enumerate() {
            let (queue, info, work) = (self.queue.clone(), ready.info.clone(), work.clone());
            let (gate, opened) = std::sync::mpsc::channel::<u64>();
            let thread = std::thread::Builder::new().name(thread_name(&self.name, index)).spawn(move || {
                let Ok(epoch) = opened.recv() else { return };
                while let Some(taken) = queue.take(epoch) {
                    work(&mut pipeline, &info, taken);
                }
            })?;
            threads.push(thread);
            gates.push(gate);
        }
        let mut serving = self.serving.lock().unwrap_or_else(PoisonError::into_inner);
        let epoch = self.queue.begin_epoch();
        for gate in gates {
            if gate.send(epoch).is_err() {
                tracing::error!(model = self.name, "an inference thread is gone before it began");
            }
        }
        let before = std::mem::replace(&mut *serving, Serving { info: Some(ready.info), threads });
        drop(serving);
        join(before.threads);
        Ok(())
    }

    /// Stops serving and joins the threads. Frames go on being replaced by newer ones until a version serves again.
    pub fn stop(&self) {
        let mut serving = self.serving.lock().unwrap_or_else(PoisonError::into_inner);
        self.queue.begin_epoch();
        let before = std::mem::take(&mut *serving);
        drop(serving);
        join(before.threads);
    }
}

/// Threads of a slot that nobody stopped end at their next frame.
impl<S> Drop for Deployment<S> {
    fn drop(&mut self) {
        self.queue.begin_epoch();
    }
}

fn join(threads: Vec<JoinHandle<()>>) {
    for thread in threads {
        if thread.join().is_err() {
            tracing::error!("an inference thread had panicked");
        }
    }
}

/// Linux shows the first 15 bytes of a thread's name.
fn thread_name(model: &str, index: usize) -> String {
    format!("i{index}-{model}")
}
