//! Supervision of long-running tasks.
//!
//! A supervised task runs until it is stopped. One that ends earlier, or panics, is logged with its name and counted in
//! `lineside_task_restarts_total{task}`. What follows depends on its state:
//!
//! - [`OnFailure::Restart`]: it is started again after a backoff. For tasks whose state can be rebuilt.
//! - [`OnFailure::Exit`]: [`Supervisor::failed`] resolves, and the process ends with an error, so that systemd or the kubelet
//!   starts it again. For tasks whose state would be lost.
//!
//! A thread that is not a task, such as the spool's writer, reports its end through a [`FailureReporter`].

use std::any::Any;
use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use prometheus::IntCounterVec;
use tokio::sync::{Notify, watch};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;

const RESTART_FIRST: Duration = Duration::from_millis(250);
const RESTART_CAP: Duration = Duration::from_secs(30);
/// A task that ran for this long was healthy: its next restart is quick again.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);

/// What follows when a task ends without being stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnFailure {
    /// The task is started again after a backoff.
    Restart,
    /// The process ends with an error.
    Exit,
}

/// A task that failed and cannot be restarted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the task {task} {reason}")]
pub struct TaskFailure {
    /// The task's name.
    pub task: String,
    /// `ended unexpectedly`, or `panicked: ...`.
    pub reason: String,
}

/// Starts tasks and watches over them. Clones watch over the same tasks.
#[derive(Clone)]
pub struct Supervisor(Arc<Inner>);

struct Inner {
    restarts: IntCounterVec,
    failed: watch::Sender<Option<TaskFailure>>,
    /// When each task failed last, and why.
    failures: Mutex<BTreeMap<String, (Instant, TaskFailure)>>,
    /// By task: makes it fail.
    injections: Mutex<BTreeMap<String, Arc<Injection>>>,
}

/// Failures of a task that tests cause.
#[derive(Default)]
struct Injection {
    panic: Notify,
    stall: Notify,
}

/// A supervised task.
pub struct SupervisedTask {
    name: String,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl SupervisedTask {
    /// Stops the task and waits until it has ended.
    pub async fn stop(mut self) {
        self.stop.cancel();
        if let Err(error) = (&mut self.task).await {
            tracing::error!(event = "task_failed", task = self.name, %error, "Supervision of a task failed");
        }
    }
}

/// A task whose owner no longer exists, for example after a panic of the owner, is stopped.
impl Drop for SupervisedTask {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Reports the end of a thread to the supervisor. Dropping it without [`FailureReporter::done`], as a panic does, is a
/// failure.
pub struct FailureReporter {
    supervisor: Supervisor,
    task: String,
    is_done: bool,
}

impl FailureReporter {
    /// Reports that the thread ended as intended.
    pub fn done(mut self) {
        self.is_done = true;
    }
}

impl Drop for FailureReporter {
    fn drop(&mut self) {
        if !self.is_done {
            let reason = if std::thread::panicking() { "panicked" } else { "ended unexpectedly" };
            self.supervisor.exit(&self.task, reason);
        }
    }
}

impl Supervisor {
    /// A supervisor that counts in `restarts`, a counter with the label `task`.
    pub fn new(restarts: IntCounterVec) -> Self {
        Self(Arc::new(Inner {
            restarts,
            failed: watch::Sender::new(None),
            failures: Mutex::default(),
            injections: Mutex::default(),
        }))
    }

    /// Starts a task. `start` is called for every start and given the token that stops the task.
    pub fn spawn<F, T>(&self, name: &str, on_failure: OnFailure, start: F) -> SupervisedTask
    where
        F: FnMut(CancellationToken) -> T + Send + 'static,
        T: Future<Output = ()> + Send + 'static,
    {
        let stop = CancellationToken::new();
        let injection = self.0.injections.lock().entry(name.to_owned()).or_default().clone();
        self.0.restarts.with_label_values(&[name]);
        let run =
            TaskRun { supervisor: self.clone(), name: name.to_owned(), on_failure, stop: stop.clone(), injection };
        let task = tokio::spawn(run.supervise(start));
        SupervisedTask { name: name.to_owned(), stop, task }
    }

    /// A reporter for a thread of this name.
    pub fn reporter(&self, name: &str) -> FailureReporter {
        self.0.restarts.with_label_values(&[name]);
        FailureReporter { supervisor: self.clone(), task: name.to_owned(), is_done: false }
    }

    /// Waits until a task has failed that cannot be restarted.
    pub async fn failed(&self) -> TaskFailure {
        let mut failed = self.0.failed.subscribe();
        match failed.wait_for(Option::is_some).await {
            Ok(failure) => {
                failure.clone().unwrap_or_else(|| TaskFailure { task: String::new(), reason: String::new() })
            }
            // `self` holds the sender, so the channel is never closed.
            Err(_) => std::future::pending().await,
        }
    }

    /// The failure that ends the process, if there is one.
    pub fn failure(&self) -> Option<TaskFailure> {
        self.0.failed.borrow().clone()
    }

    /// The tasks that failed within the last minute.
    pub fn recent_failures(&self) -> Vec<TaskFailure> {
        let failures = self.0.failures.lock();
        let recent = failures.values().filter(|(at, _)| at.elapsed() < HEALTHY_AFTER);
        recent.map(|(_, failure)| failure.clone()).collect()
    }

    fn note_failure(&self, task: &str, reason: &str) {
        let failure = TaskFailure { task: task.to_owned(), reason: reason.to_owned() };
        self.0.failures.lock().insert(task.to_owned(), (Instant::now(), failure));
    }

    /// The names of all tasks that were started.
    pub fn tasks(&self) -> Vec<String> {
        self.0.injections.lock().keys().cloned().collect()
    }

    /// Makes a task panic, for tests of the consequences. `false` when no task has this name.
    pub fn inject_panic(&self, name: &str) -> bool {
        let injection = self.0.injections.lock().get(name).cloned();
        injection.as_ref().inspect(|injection| injection.panic.notify_one()).is_some()
    }

    /// Makes a task stop working without ending, until it is stopped, for tests of the consequences. `false` when no task has
    /// this name.
    pub fn inject_stall(&self, name: &str) -> bool {
        let injection = self.0.injections.lock().get(name).cloned();
        injection.as_ref().inspect(|injection| injection.stall.notify_one()).is_some()
    }

    fn exit(&self, task: &str, reason: &str) {
        self.0.restarts.with_label_values(&[task]).inc();
        tracing::error!(event = "task_failed", task, reason, "Task failed and cannot be restarted; the process ends");
        let failure = TaskFailure { task: task.to_owned(), reason: reason.to_owned() };
        self.0.failed.send_if_modified(|first| {
            let is_first = first.is_none();
            first.get_or_insert(failure);
            is_first
        });
    }
}

/// One supervised task, through all its restarts.
struct TaskRun {
    supervisor: Supervisor,
    name: String,
    on_failure: OnFailure,
    stop: CancellationToken,
    injection: Arc<Injection>,
}

impl TaskRun {
    /// Runs the task until it is stopped, or has failed and is not restarted.
    async fn supervise<F, T>(self, mut start: F)
    where
        F: FnMut(CancellationToken) -> T + Send + 'static,
        T: Future<Output = ()> + Send + 'static,
    {
        let Self { supervisor, name, on_failure, stop, injection } = self;
        let mut backoff = Backoff::new(RESTART_FIRST, RESTART_CAP);
        loop {
            let started = Instant::now();
            let (work, injection, stopped) = (start(stop.clone()), injection.clone(), stop.clone());
            let ended = tokio::spawn(async move {
                tokio::pin!(work);
                tokio::select! {
                    () = &mut work => {}
                    () = injection.panic.notified() => injected(),
                    // The work is kept, and not polled.
                    () = injection.stall.notified() => stopped.cancelled().await,
                }
            })
            .await;
            if stop.is_cancelled() && ended.is_ok() {
                return;
            }
            let reason = match ended {
                Ok(()) => "ended unexpectedly".to_owned(),
                Err(error) => describe(error),
            };
            if on_failure == OnFailure::Exit {
                return supervisor.exit(&name, &reason);
            }
            if stop.is_cancelled() {
                tracing::error!(event = "task_failed", task = name, reason, "Task failed while it was being stopped");
                return;
            }
            if started.elapsed() >= HEALTHY_AFTER {
                backoff.reset();
            }
            let delay = backoff.next_delay();
            supervisor.0.restarts.with_label_values(&[&name]).inc();
            supervisor.note_failure(&name, &reason);
            tracing::error!(event = "task_failed", task = name, reason, ?delay, "Task failed and is restarted");
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = stop.cancelled() => return,
            }
        }
    }
}

#[allow(clippy::panic, reason = "this is the injected fault")]
fn injected() {
    panic!("injected for a test");
}

fn describe(error: JoinError) -> String {
    if !error.is_panic() {
        return "was aborted".to_owned();
    }
    format!("panicked: {}", panic_message(&*error.into_panic()))
}

/// The message of a panic, from its payload.
pub fn panic_message(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn supervisor() -> (Supervisor, IntCounterVec) {
        let restarts = IntCounterVec::new(prometheus::Opts::new("restarts", "restarts"), &["task"]).unwrap();
        (Supervisor::new(restarts.clone()), restarts)
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_panics_or_ends_is_restarted_and_counted() {
        let (supervisor, restarts) = supervisor();
        let starts = Arc::new(AtomicU32::new(0));
        let counted = starts.clone();
        let task = supervisor.spawn("worker", OnFailure::Restart, move |stop| {
            let start = counted.fetch_add(1, Ordering::Relaxed);
            async move {
                assert_ne!(start, 0, "the first start panics");
                if start > 1 {
                    stop.cancelled().await;
                }
            }
        });
        while starts.load(Ordering::Relaxed) < 3 {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        assert_eq!(restarts.with_label_values(&["worker"]).get(), 2);
        assert_eq!(supervisor.failure(), None);
        assert_eq!(supervisor.recent_failures().len(), 1);
        task.stop().await;
        assert_eq!(restarts.with_label_values(&["worker"]).get(), 2, "stopping a task is not a failure");
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_cannot_be_restarted_ends_the_process() {
        let (supervisor, restarts) = supervisor();
        let task = supervisor.spawn("reconciler", OnFailure::Exit, |stop| async move { stop.cancelled().await });
        assert!(supervisor.inject_panic("reconciler") && !supervisor.inject_panic("unknown"));
        let failure = supervisor.failed().await;
        assert_eq!(failure.to_string(), "the task reconciler panicked: injected for a test");
        assert_eq!(restarts.with_label_values(&["reconciler"]).get(), 1);
        task.stop().await;
    }

    #[tokio::test(start_paused = true)]
    async fn restarts_are_spaced_by_a_growing_delay() {
        let (supervisor, restarts) = supervisor();
        let task = supervisor.spawn("flapping", OnFailure::Restart, |_| async {});
        tokio::time::sleep(Duration::from_secs(60)).await;
        let count = restarts.with_label_values(&["flapping"]).get();
        assert!((4..20).contains(&count), "{count} restarts in a minute");
        task.stop().await;
    }

    #[tokio::test]
    async fn a_thread_that_panics_ends_the_process_and_one_that_is_done_does_not() {
        let (supervisor, _) = supervisor();
        supervisor.reporter("done").done();
        assert_eq!(supervisor.failure(), None);
        let reporter = supervisor.reporter("spool-writer");
        let thread = std::thread::spawn(move || {
            let _reporter = reporter;
            injected();
        });
        assert!(thread.join().is_err());
        assert_eq!(supervisor.failed().await.to_string(), "the task spool-writer panicked");
    }
}
