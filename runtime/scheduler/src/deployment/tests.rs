//! Tests of deployments, with workers that the tests play.

use std::sync::mpsc::{Receiver, Sender, channel};

use bytes::Bytes;
use lineside_api::prediction::{Inspection, Prediction, Timings};
use lineside_common::metrics::Registrar;
use lineside_ipc::frame::Frame;
use lineside_worker::{Activity, BatchId, BatchReply, Stage, WorkError, WorkItem};

use super::*;
use crate::job::Priority;

/// A worker that the test plays: batches come out of a channel, and replies are given by hand.
struct ManualWorker(Sender<(BatchId, usize)>, Arc<Mutex<Vec<Activity>>>);

impl Worker for ManualWorker {
    fn submit(&self, batch: BatchId, items: Vec<WorkItem>) -> Result<(), WorkError> {
        self.0
            .send((batch, items.len()))
            .map_err(|_| WorkError::new(lineside_worker::WorkErrorKind::Worker, "the worker has ended"))
    }

    fn capacity(&self) -> usize {
        2
    }

    fn instances(&self) -> usize {
        1
    }

    fn engine(&self) -> &str {
        "test"
    }

    fn activity(&self) -> Vec<Activity> {
        self.1.lock().clone()
    }

    fn cpu_time(&self) -> Option<Duration> {
        None
    }
}

/// The batches of a version, and the sinks of its workers, the newest last.
struct Played {
    batches: Receiver<(BatchId, usize)>,
    sinks: Arc<Mutex<Vec<EventSink>>>,
    activity: Arc<Mutex<Vec<Activity>>>,
}

impl Played {
    fn next(&self) -> (BatchId, usize) {
        self.batches.recv_timeout(Duration::from_secs(60)).unwrap()
    }

    fn reply(&self, (batch, size): (BatchId, usize)) {
        let inspection = || Inspection {
            prediction: Prediction::Anomaly { score: 0.0, map: None },
            width: 1,
            height: 1,
            timings: Timings::default(),
            rule: None,
        };
        let results = (0..size).map(|_| Ok(inspection())).collect();
        self.sinks.lock().last().unwrap()(WorkerEvent::Reply(BatchReply { batch, results }));
    }
}

fn version(number: u64, execution_limit: Duration) -> (VersionSpec, Played) {
    let (send, batches) = channel();
    let sinks: Arc<Mutex<Vec<EventSink>>> = Arc::default();
    let activity: Arc<Mutex<Vec<Activity>>> = Arc::default();
    let (kept, stated) = (sinks.clone(), activity.clone());
    let worker: WorkerFactory = Box::new(move |sink| {
        kept.lock().push(sink);
        Ok(Box::new(ManualWorker(send.clone(), stated.clone())))
    });
    let info = ModelInfo {
        name: "m".into(),
        version: number,
        digest: String::new(),
        engine: String::new(),
        device: "cpu".into(),
    };
    let policy = BatchPolicy { execution_limit, ..BatchPolicy::default() };
    let faults = Mutex::new(0);
    let on_fault: FaultRecorder = Box::new(move |why| {
        let mut faults = faults.lock();
        *faults += 1;
        (*faults >= 3).then(|| format!("{why}, {faults} times"))
    });
    (VersionSpec { info, weight: 1, policy, worker, on_fault }, Played { batches, sinks, activity })
}

fn deployment() -> (Arc<Deployment>, Registrar) {
    let registrar = Registrar::default();
    let metrics = SchedulerMetrics::register(&registrar).unwrap();
    let supervisor = Supervisor::new(registrar.counters("task_restarts_total", "Failed tasks.", &["task"]).unwrap());
    (Arc::new(Deployment::new("m", &metrics, &supervisor).unwrap()), registrar)
}

fn submit(deployment: &Deployment, outcomes: &Sender<String>) {
    let outcomes = outcomes.clone();
    let sink = Box::new(move |outcome| {
        let text = match outcome {
            JobOutcome::Answered(answer) => format!("answered by {}", answer.model.version),
            JobOutcome::Failed(_, error) => format!("failed: {error}"),
            other => format!("{other:?}"),
        };
        drop(outcomes.send(text));
    });
    let job = Job::new(Frame::encoded(Bytes::new(), None, false), Priority::Stream, None, sink);
    assert!(deployment.submit(job).is_ok());
}

const LONG: Duration = Duration::from_secs(3600);

#[test]
fn a_version_takes_over_after_the_one_before_has_finished_its_jobs() {
    let (deployment, registrar) = deployment();
    let (first, one) = version(1, LONG);
    deployment.add(first).unwrap();
    assert_eq!(deployment.serving().map(|info| info.version), Some(1));
    let (outcome, outcomes) = channel();
    submit(&deployment, &outcome);
    let executing = one.next();
    let (second, two) = version(2, LONG);
    let replacing = deployment.clone();
    let replaced = std::thread::spawn(move || replacing.replace(second).unwrap());
    let mut stable = deployment.stable();
    while stable.borrow_and_update().as_ref().is_none_or(|info| info.version != 2) {
        std::thread::yield_now();
    }
    submit(&deployment, &outcome);
    two.reply(two.next());
    assert_eq!(outcomes.recv().unwrap(), "answered by 2");
    assert!(!replaced.is_finished(), "version 1 still executes a job");
    one.reply(executing);
    assert_eq!(outcomes.recv().unwrap(), "answered by 1");
    replaced.join().unwrap();
    let text = registrar.encode().unwrap();
    assert!(text.contains("lineside_inference_requests_total{model=\"m\",outcome=\"ok\",version=\"2\"} 1"), "{text}");
}

#[test]
fn a_worker_that_exceeds_its_limit_is_replaced_and_given_up_after_a_while() {
    let (deployment, _) = deployment();
    let (spec, played) = version(1, Duration::from_millis(1));
    let id = deployment.add(spec).unwrap();
    let (outcome, outcomes) = channel();
    for replacement in 1..=3 {
        submit(&deployment, &outcome);
        let mut held = played.next();
        loop {
            // The limit of a millisecond may pass before the activity is stated: then the job is executed again.
            *played.activity.lock() = vec![Activity { batch: held.0, item: 0, stage: Stage::Infer }];
            match outcomes.recv_timeout(Duration::from_millis(50)) {
                Ok(text) => {
                    assert_eq!(
                        text, "failed: inference ended the worker: the execution limit was exceeded",
                        "{replacement}"
                    );
                    break;
                }
                Err(_) => held = played.batches.try_recv().unwrap_or(held),
            }
        }
    }
    let mut stable = deployment.stable();
    while stable.borrow_and_update().is_some() {
        std::thread::yield_now();
    }
    assert!(deployment.failure(id).is_some_and(|reason| reason.contains("execution limit")));
}

#[test]
fn the_jobs_of_a_worker_that_ends_are_executed_by_the_next_one() {
    let (deployment, _) = deployment();
    let (spec, played) = version(1, LONG);
    deployment.add(spec).unwrap();
    let (outcome, outcomes) = channel();
    (0..3).for_each(|_| submit(&deployment, &outcome));
    let (first, _second) = (played.next(), played.next());
    *played.activity.lock() = vec![Activity { batch: first.0, item: 0, stage: Stage::Decode }];
    let ended = || WorkerEvent::Ended { reason: "signal 11".to_owned(), is_external: false };
    played.sinks.lock()[0](ended());
    assert_eq!(outcomes.recv().unwrap(), "failed: decoding the frame ended the worker: signal 11");
    for _ in 0..2 {
        let batch = played.next();
        played.reply(batch);
        assert_eq!(outcomes.recv().unwrap(), "answered by 1");
    }
    // The end of a worker that was replaced already changes nothing.
    played.sinks.lock()[0](ended());
    submit(&deployment, &outcome);
    played.reply(played.next());
    assert_eq!(outcomes.recv().unwrap(), "answered by 1");
    assert_eq!(played.sinks.lock().len(), 2);
}

#[test]
fn stopping_cancels_what_waits_and_finishes_what_is_executed() {
    let (deployment, _) = deployment();
    let (spec, played) = version(1, LONG);
    deployment.add(spec).unwrap();
    let (outcome, outcomes) = channel();
    (0..3).for_each(|_| submit(&deployment, &outcome));
    let executing = [played.next(), played.next()];
    let stopping = deployment.clone();
    let stopped = std::thread::spawn(move || stopping.stop());
    assert_eq!(outcomes.recv().unwrap(), "Cancelled");
    executing.into_iter().for_each(|batch| played.reply(batch));
    stopped.join().unwrap();
    drop(outcome);
    assert_eq!(outcomes.iter().collect::<Vec<_>>(), ["answered by 1", "answered by 1"]);
    assert!(deployment.serving().is_none());
}

#[test]
fn a_client_that_panics_harms_no_other_job() {
    let (deployment, _) = deployment();
    let (spec, played) = version(1, LONG);
    deployment.add(spec).unwrap();
    let panics = Job::new(
        Frame::encoded(Bytes::new(), None, false),
        Priority::Stream,
        None,
        Box::new(|_| panic!("the client panics")),
    );
    assert!(deployment.submit(panics).is_ok());
    played.reply(played.next());
    let (outcome, outcomes) = channel();
    submit(&deployment, &outcome);
    played.reply(played.next());
    assert_eq!(outcomes.recv().unwrap(), "answered by 1");
}
