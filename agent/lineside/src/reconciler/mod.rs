//! The node's reconcile loop: from the desired state to running models and streams.
//!
//! ```text
//! desired state ──┐                       ┌──> load tasks ──> deployments
//! commands ───────┼──> Core ──actions──> driver
//! load outcomes ──┘  (state machine)      └──> streams
//!                       └──snapshot──> StatePublisher ──> status, probes, metrics, events
//! ```
//!
//! One task owns all of it. The state machine ([`core`]) is synchronous and decides; this driver waits for inputs, carries out
//! the actions, and publishes the snapshot. Loading a version takes from milliseconds to hours, so it runs in a task of its
//! own, at most one for each model, whose outcome comes back as a message.

mod commands;
mod core;
#[cfg(test)]
mod core_tests;
mod load_task;
mod memory_budget;
mod plan;
mod publish;
mod snapshot;
mod status_builder;
mod worker_factory;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lineside_common::digest::Digest;
use lineside_models::last_good::LastGoodVersions;
use lineside_mqtt::command::CommandRequest;
use lineside_scheduler::{DecodeBudget, Deployment, SchedulerMetrics};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use self::core::{Action, Core, LoadOutcome};
pub use self::load_task::{LoadContext, LoadFailure, LoadFuture, LoadRequest, LoadedVersion, VersionLoader};
pub use self::memory_budget::MemoryBudget;
pub use self::publish::{ModelMetrics, Published, StatePublisher};
use crate::desired::{DesiredState, Node};
use crate::stream_runner::StreamRunner;

/// How often the loop runs when nothing happens: retries become due, and the status is refreshed.
const TICK: Duration = Duration::from_millis(500);

/// What the reconciler is made of.
pub struct ReconcilerParts<S> {
    /// This node, with the labels of its own configuration.
    pub node: Node,
    /// The desired state; `None` until it is known.
    pub desired: watch::Receiver<Option<Arc<DesiredState>>>,
    /// Asks the source of the desired state to read it again.
    pub relist: Arc<Notify>,
    /// Versions that served last.
    pub last_good: LastGoodVersions,
    /// Whether the store has a file.
    pub has_blob: Box<dyn Fn(&Digest) -> bool + Send>,
    /// Loads versions.
    pub loader: Arc<dyn VersionLoader>,
    /// Runs streams.
    pub streams: S,
    /// What the deployments count.
    pub scheduler_metrics: SchedulerMetrics,
    /// Commands of operators.
    pub commands: mpsc::Receiver<CommandRequest>,
    /// The memory for decoding, which snapshots share with the streams.
    pub decode_budget: DecodeBudget,
    /// Publishes the state.
    pub publisher: StatePublisher,
}

/// The reconciler.
pub struct Reconciler<S> {
    core: Core,
    desired: watch::Receiver<Option<Arc<DesiredState>>>,
    relist: Arc<Notify>,
    loader: Arc<dyn VersionLoader>,
    streams: S,
    scheduler_metrics: SchedulerMetrics,
    commands: mpsc::Receiver<CommandRequest>,
    decode_budget: DecodeBudget,
    publisher: StatePublisher,
    deployments: HashMap<String, Arc<Deployment>>,
    /// Bounded by the number of models: each has at most one load.
    outcomes: (mpsc::UnboundedSender<LoadOutcome>, mpsc::UnboundedReceiver<LoadOutcome>),
}

impl<S: StreamRunner> Reconciler<S> {
    /// A reconciler that has not seen a desired state.
    pub fn new(parts: ReconcilerParts<S>) -> Self {
        Self {
            core: Core::new(parts.node, parts.last_good, parts.has_blob),
            desired: parts.desired,
            relist: parts.relist,
            loader: parts.loader,
            streams: parts.streams,
            scheduler_metrics: parts.scheduler_metrics,
            commands: parts.commands,
            decode_budget: parts.decode_budget,
            publisher: parts.publisher,
            deployments: HashMap::new(),
            outcomes: mpsc::unbounded_channel(),
        }
    }

    /// Runs until stopped; then streams stop, and deployments finish the frames they hold.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                _ = ticks.tick() => self.check_deployments(),
                Ok(()) = self.desired.changed() => self.on_desired(),
                Some(outcome) = self.outcomes.1.recv() => self.on_load_finished(outcome),
                Some(request) = self.commands.recv() => self.on_command(request),
            }
            self.reconcile().await;
            self.publisher.publish(&self.core.snapshot());
        }
        self.core.cancel_loads();
        self.streams.stop_all().await;
        let deployments = std::mem::take(&mut self.deployments);
        let stops = deployments.into_values().map(|deployment| blocking("deployment", move || deployment.stop()));
        futures_util::future::join_all(stops).await;
    }

    fn on_desired(&mut self) {
        let desired = self.desired.borrow_and_update().clone();
        if let Some(desired) = desired {
            self.core.on_desired(desired);
        }
    }

    fn on_load_finished(&mut self, outcome: LoadOutcome) {
        let deployment = self.deployments.get(&outcome.manifest.name);
        let still_serves = deployment.is_some_and(|deployment| deployment.serving().is_some());
        self.core.on_load_finished(outcome, still_serves, Instant::now());
    }

    /// Notices versions that the scheduler gave up.
    fn check_deployments(&mut self) {
        for (name, id) in self.core.serving_ids() {
            let failure = self.deployments.get(&name).and_then(|deployment| deployment.failure(id));
            if let Some(reason) = failure {
                self.core.on_given_up(&name, &reason, Instant::now());
            }
        }
    }

    async fn reconcile(&mut self) {
        for action in self.core.poll(Instant::now()) {
            match action {
                Action::Load(request) => self.start_load(*request),
                Action::Unload(name) => {
                    if let Some(deployment) = self.deployments.get(&name).cloned()
                        && deployment.serving().is_some()
                    {
                        blocking("deployment", move || deployment.stop()).await;
                        tracing::info!(event = "model_unloaded", model = name, "Model unloaded");
                    }
                }
                Action::StartStream(manifest) => {
                    if let Some(deployment) = self.deployment(&manifest.model) {
                        self.streams.start(*manifest, deployment);
                    }
                }
                Action::StopStream(name) => self.streams.stop(&name).await,
            }
        }
        let core = &self.core;
        self.deployments.retain(|name, _| core.needs_deployment(name));
    }

    /// The deployment of a model; `None` when its thread cannot be started, which is logged.
    fn deployment(&mut self, model: &str) -> Option<Arc<Deployment>> {
        if let Some(known) = self.deployments.get(model) {
            return Some(known.clone());
        }
        match Deployment::new(model, &self.scheduler_metrics, &self.publisher.supervisor) {
            Ok(new) => {
                let new = Arc::new(new);
                self.deployments.insert(model.to_owned(), new.clone());
                Some(new)
            }
            Err(error) => {
                tracing::error!(event = "deployment_not_started", model, %error, "The dispatcher thread cannot be started");
                None
            }
        }
    }

    fn start_load(&mut self, request: LoadRequest) {
        let (manifest, is_restored) = (request.manifest.clone(), request.is_restored);
        let finished = self.outcomes.0.clone();
        let Some(deployment) = self.deployment(&manifest.name) else {
            let result = Err(LoadFailure::from("its dispatcher thread cannot be started".to_owned()));
            finished.send(LoadOutcome { manifest, is_restored, result }).ok();
            return;
        };
        let load = self.loader.load(request, deployment);
        tokio::spawn(async move {
            // In a task of its own, so that a panic comes back as a failure.
            let result = tokio::spawn(load).await;
            let result = result.unwrap_or_else(|error| Err(format!("loading panicked: {error}").into()));
            // When the receiver is gone the agent is stopping.
            finished.send(LoadOutcome { manifest, is_restored, result }).ok();
        });
    }
}

/// Runs what blocks off the async threads.
async fn blocking(what: &str, work: impl FnOnce() + Send + 'static) {
    if let Err(error) = tokio::task::spawn_blocking(work).await {
        tracing::error!(event = "stop_failed", what, %error, "Stopping panicked");
    }
}
