//! Tests of the dispatcher: properties over random orders of events, and single decisions.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use lineside_api::prediction::{Inspection, Prediction, Timings};
use lineside_ipc::frame::Frame;
use parking_lot::Mutex;

use super::*;

fn info(version: u64) -> Arc<ModelInfo> {
    Arc::new(ModelInfo {
        name: "m".into(),
        version,
        digest: String::new(),
        engine: "test".into(),
        device: "cpu".into(),
    })
}

/// How each job ended, by its name.
type Log = Arc<Mutex<HashMap<String, Vec<String>>>>;

fn job(name: &str, priority: Priority, deadline: Option<Instant>, log: &Log) -> Job {
    let (log, own) = (log.clone(), name.to_owned());
    let sink = Box::new(move |outcome| {
        let text = match outcome {
            JobOutcome::Answered(answer) => {
                // The worker of the test answers with the name of the frame that it was given.
                let Prediction::Anomaly { score, .. } = answer.inspection.prediction else { unreachable!() };
                format!("answered {score} by {}", answer.model.version)
            }
            JobOutcome::Failed(info, error) => format!("failed by {}: {error}", info.version),
            JobOutcome::Expired => "expired".to_owned(),
            JobOutcome::Cancelled => "cancelled".to_owned(),
        };
        log.lock().entry(own).or_default().push(text);
    });
    Job::new(Frame::encoded(Bytes::new(), Some(name.to_owned()), false), priority, deadline, sink)
}

/// The answer of a worker that predicts the number in the frame's name.
fn reply(batch: BatchId, items: &[WorkItem]) -> BatchReply {
    let results = items.iter().map(|item| {
        let score = item.frame.name.as_deref().unwrap().parse().unwrap();
        let prediction = Prediction::Anomaly { score, map: None };
        Ok(Inspection { prediction, width: 1, height: 1, timings: Timings::default(), rule: None })
    });
    BatchReply { batch, results: results.collect() }
}

/// A worker of one instance.
fn size(capacity: usize) -> WorkerSize {
    WorkerSize { capacity, instances: 1 }
}

fn end(ended: Vec<(Job, JobOutcome)>) {
    ended.into_iter().for_each(|(job, outcome)| job.end(outcome));
}

/// Random submissions, polls, replies, weights, versions that come and go, workers that hang: whatever happens, every job
/// ends exactly once, answers go to their own jobs, and a batch holds jobs of one version.
#[test]
fn every_job_ends_exactly_once_whatever_happens() {
    for seed in 0..300 {
        let random = &mut fastrand::Rng::with_seed(seed);
        let log = Log::default();
        let start = Instant::now();
        let mut now = start;
        let mut dispatcher = Dispatcher::new(40);
        let mut executing: Vec<(VersionId, BatchId, Vec<WorkItem>)> = Vec::new();
        let (mut submitted, mut refused) = (0u32, BTreeSet::new());
        for step in 0..400 {
            now += Duration::from_millis(random.u64(0..30));
            match random.u8(0..20) {
                0 => {
                    let id = dispatcher.reserve();
                    let policy = BatchPolicy {
                        max_batch_size: random.usize(1..6),
                        max_queue_delay: Duration::from_millis(random.u64(0..40)),
                        execution_limit: Duration::from_millis(200),
                    };
                    dispatcher.add(id, info(id), random.u32(0..4), policy, size(random.usize(1..4)));
                }
                1 => {
                    let versions = dispatcher.versions();
                    if !versions.is_empty() {
                        let id = versions[random.usize(0..versions.len())];
                        end(dispatcher.remove(id));
                    }
                }
                2 => {
                    let versions = dispatcher.versions();
                    if !versions.is_empty() {
                        let id = versions[random.usize(0..versions.len())];
                        dispatcher.set_weight(id, random.u32(0..4));
                        end(dispatcher.move_waiting(id));
                    }
                }
                3..=10 => {
                    submitted += 1;
                    let deadline = random.bool().then(|| now + Duration::from_millis(random.u64(0..150)));
                    let priority = Priority::ALL[random.usize(0..5)];
                    match dispatcher.submit(job(&submitted.to_string(), priority, deadline, &log)) {
                        Ok(None) => {}
                        Ok(Some(evicted)) => evicted.end(JobOutcome::Cancelled),
                        Err((job, _)) => {
                            refused.insert(job.frame.name.clone().unwrap());
                            job.end(JobOutcome::Cancelled);
                        }
                    }
                }
                _ if random.u8(0..4) > 0 && !executing.is_empty() => {
                    let (id, batch, items) = executing.swap_remove(random.usize(0..executing.len()));
                    end(dispatcher.on_reply(id, reply(batch, &items), now));
                    // A worker that replies twice changes nothing.
                    end(dispatcher.on_reply(id, reply(batch, &items), now));
                }
                _ => {}
            }
            let actions = dispatcher.poll(now);
            for (id, batch, items) in actions.batches {
                assert!(!items.is_empty(), "seed {seed}, step {step}");
                executing.push((id, batch, items));
            }
            end(actions.ended);
            for (id, _) in actions.overdue {
                if random.bool() {
                    dispatcher.extend_limit(id, now);
                    continue;
                }
                // What the worker holds in truth, some of it, or nonsense.
                let mut held = Vec::new();
                for (_, batch, items) in executing.iter().filter(|(version, ..)| *version == id) {
                    if random.bool() {
                        let stage = [Stage::Decode, Stage::Infer, Stage::Rule][random.usize(0..3)];
                        held.push(Activity { batch: *batch, item: random.usize(0..items.len()), stage });
                    }
                }
                end(dispatcher.on_worker_ended(id, &held, random.u8(0..4) == 0, "hung").0);
                executing.retain(|(version, ..)| *version != id || random.u8(0..4) == 0);
                if random.bool() {
                    dispatcher.on_worker_started(id, size(random.usize(1..4)));
                }
            }
            assert!(dispatcher.waiting() <= 40, "seed {seed}");
        }
        for id in dispatcher.versions() {
            end(dispatcher.remove(id));
        }
        let log = log.lock();
        assert_eq!(log.len() as u32, submitted, "seed {seed}");
        for (name, outcomes) in log.iter() {
            assert_eq!(outcomes.len(), 1, "seed {seed}, job {name}: {outcomes:?}");
            if let Some(answer) = outcomes[0].strip_prefix("answered ") {
                assert!(answer.starts_with(&format!("{name} ")), "seed {seed}, job {name}: {outcomes:?}");
            }
            assert!(!refused.contains(name) || outcomes == &["cancelled"], "seed {seed}, job {name}");
        }
    }
}

#[test]
fn weights_hold_within_one_percent_over_ten_thousand_jobs() {
    let (log, now) = (Log::default(), Instant::now());
    let mut dispatcher = Dispatcher::new(10);
    let weights = [90, 7, 3];
    let mut ids = Vec::new();
    for weight in weights {
        let id = dispatcher.reserve();
        dispatcher.add(id, info(id), weight, BatchPolicy::default(), size(1));
        ids.push(id);
    }
    let mut counts: HashMap<VersionId, u32> = HashMap::new();
    for number in 0..10_000 {
        assert!(dispatcher.submit(job(&number.to_string(), Priority::Stream, None, &log)).is_ok());
        for (id, batch, items) in dispatcher.poll(now).batches {
            *counts.entry(id).or_default() += items.len() as u32;
            end(dispatcher.on_reply(id, reply(batch, &items), now));
        }
    }
    for (id, weight) in ids.iter().zip(weights) {
        let share = f64::from(counts[id]) / 100.0;
        assert!((share - f64::from(weight)).abs() <= 1.0, "{share} % instead of {weight} %");
    }
}

#[test]
fn a_batch_is_sent_when_it_is_full_or_its_oldest_job_has_waited() {
    let (log, start) = (Log::default(), Instant::now());
    let mut dispatcher = Dispatcher::new(100);
    let id = dispatcher.reserve();
    let delay = Duration::from_secs(5);
    let policy = BatchPolicy { max_batch_size: 3, max_queue_delay: delay, ..BatchPolicy::default() };
    dispatcher.add(id, info(1), 1, policy, size(10));
    let submit = |dispatcher: &mut Dispatcher, name: &str| {
        assert!(dispatcher.submit(job(name, Priority::Stream, None, &log)).is_ok());
    };
    submit(&mut dispatcher, "1");
    submit(&mut dispatcher, "2");
    let early = dispatcher.poll(start);
    assert!(early.batches.is_empty() && early.wake_at.is_some_and(|at| at >= start + delay));
    submit(&mut dispatcher, "3");
    assert_eq!(dispatcher.poll(start).batches[0].2.len(), 3, "full");
    submit(&mut dispatcher, "4");
    assert!(dispatcher.poll(start).batches.is_empty());
    assert_eq!(dispatcher.poll(start + 2 * delay).batches[0].2.len(), 1, "waited long enough");
}

/// A version with three jobs, of which the worker holds two.
fn with_worker_that_holds_two(log: &Log) -> (Dispatcher, VersionId, Vec<BatchId>) {
    let mut dispatcher = Dispatcher::new(100);
    let id = dispatcher.reserve();
    dispatcher.add(id, info(1), 1, BatchPolicy::default(), size(2));
    for name in ["1", "2", "3"] {
        let job = job(name, Priority::Stream, None, log).with_rule(Some("rule".into()));
        assert!(dispatcher.submit(job).is_ok());
    }
    let batches = dispatcher.poll(Instant::now()).batches.into_iter().map(|(_, batch, _)| batch).collect();
    (dispatcher, id, batches)
}

fn answer_all(dispatcher: &mut Dispatcher, now: Instant) {
    loop {
        let batches = dispatcher.poll(now).batches;
        if batches.is_empty() {
            return;
        }
        for (id, batch, items) in batches {
            end(dispatcher.on_reply(id, reply(batch, &items), now));
        }
    }
}

#[test]
fn an_ended_worker_loses_the_job_that_it_executed_and_no_other() {
    let (log, now) = (Log::default(), Instant::now());
    let (mut dispatcher, id, batches) = with_worker_that_holds_two(&log);
    let activity = Activity { batch: batches[0], item: 0, stage: Stage::Infer };
    let (ended, fault) = dispatcher.on_worker_ended(id, &[activity], false, "signal 6");
    assert_eq!(fault, Fault::Model);
    end(ended);
    assert!(dispatcher.poll(now).batches.is_empty(), "it has no worker");
    dispatcher.on_worker_started(id, size(2));
    answer_all(&mut dispatcher, now);
    let log = log.lock();
    assert_eq!(log["1"], ["failed by 1: inference ended the worker: signal 6"]);
    assert_eq!((&log["2"], &log["3"]), (&vec!["answered 2 by 1".into()], &vec!["answered 3 by 1".into()]));
}

#[test]
fn suspects_are_executed_alone_until_the_cause_is_known() {
    let (log, now) = (Log::default(), Instant::now());
    let (mut dispatcher, id, batches) = with_worker_that_holds_two(&log);
    let activity = [
        Activity { batch: batches[0], item: 0, stage: Stage::Infer },
        Activity { batch: batches[1], item: 0, stage: Stage::Decode },
    ];
    let (ended, fault) = dispatcher.on_worker_ended(id, &activity, false, "signal 11");
    assert_eq!((ended.len(), fault), (0, Fault::Unknown));
    dispatcher.on_worker_started(id, size(2));
    let first = dispatcher.poll(now).batches;
    assert_eq!(first.len(), 1, "alone");
    assert!(dispatcher.poll(now).batches.is_empty(), "alone");
    end(dispatcher.on_reply(id, reply(first[0].1, &first[0].2), now));
    let second = dispatcher.poll(now).batches;
    assert_eq!(second.len(), 1);
    let activity = [Activity { batch: second[0].1, item: 0, stage: Stage::Decode }];
    let (ended, fault) = dispatcher.on_worker_ended(id, &activity, false, "signal 11");
    assert_eq!(fault, Fault::Frame);
    end(ended);
    dispatcher.on_worker_started(id, size(2));
    answer_all(&mut dispatcher, now);
    let log = log.lock();
    assert_eq!(log["2"], ["failed by 1: decoding the frame ended the worker: signal 11"]);
    assert_eq!((&log["1"], &log["3"]), (&vec!["answered 1 by 1".into()], &vec!["answered 3 by 1".into()]));
}

#[test]
fn a_rule_that_ends_a_worker_is_not_evaluated_any_more() {
    let (log, now) = (Log::default(), Instant::now());
    let (mut dispatcher, id, batches) = with_worker_that_holds_two(&log);
    let activity = [Activity { batch: batches[0], item: 0, stage: Stage::Rule }];
    let (ended, fault) = dispatcher.on_worker_ended(id, &activity, false, "the execution limit was exceeded");
    assert_eq!((ended.len(), fault), (0, Fault::Rule("rule".into())));
    dispatcher.on_worker_started(id, size(1));
    let (_, batch, items) = dispatcher.poll(now).batches.remove(0);
    assert_eq!(items[0].rule, None);
    let ended = dispatcher.on_reply(id, reply(batch, &items), now);
    assert!(
        matches!(&ended[0].1, JobOutcome::Answered(Answer { inspection: Inspection { rule: Some(RuleOutcome::Failed(reason)), .. }, .. }) if reason == BARRED_RULE)
    );
    end(ended);
    answer_all(&mut dispatcher, now);
    assert_eq!(log.lock().len(), 3);
}

#[test]
fn the_execution_limit_begins_when_a_batch_is_executed() {
    let (log, start) = (Log::default(), Instant::now());
    let (mut dispatcher, id, batches) = with_worker_that_holds_two(&log);
    let limit = BatchPolicy::default().execution_limit;
    let half = limit / 2 + Duration::from_secs(1);
    let items = |name: &str| {
        vec![WorkItem { frame: Frame::encoded(Bytes::new(), Some(name.into()), false), deadline: None, rule: None }]
    };
    end(dispatcher.on_reply(id, reply(batches[0], &items("1")), start + half));
    assert!(dispatcher.poll(start + 2 * half).overdue.is_empty(), "the second batch waited for the first");
    assert_eq!(dispatcher.poll(start + 3 * half).overdue, [(id, batches[1])]);
    dispatcher.extend_limit(id, start + 3 * half);
    assert!(dispatcher.poll(start + 4 * half).overdue.is_empty());
    assert_eq!(dispatcher.poll(start + 6 * half).overdue, [(id, batches[1])]);
    end(dispatcher.remove(id));
}

#[test]
fn jobs_of_a_version_that_leaves_are_answered_by_those_that_stay() {
    let (log, now) = (Log::default(), Instant::now());
    let mut dispatcher = Dispatcher::new(100);
    let old = dispatcher.reserve();
    dispatcher.add(old, info(1), 1, BatchPolicy::default(), size(1));
    for name in ["1", "2"] {
        assert!(dispatcher.submit(job(name, Priority::Stream, None, &log)).is_ok());
    }
    let executing = dispatcher.poll(now).batches.remove(0);
    let new = dispatcher.reserve();
    dispatcher.add(new, info(2), 1, BatchPolicy::default(), size(1));
    dispatcher.set_weight(old, 0);
    end(dispatcher.move_waiting(old));
    assert!(!dispatcher.is_idle(old), "it still executes a job");
    end(dispatcher.on_reply(old, reply(executing.1, &executing.2), now));
    assert!(dispatcher.is_idle(old));
    end(dispatcher.remove(old));
    for (id, batch, items) in dispatcher.poll(now).batches {
        end(dispatcher.on_reply(id, reply(batch, &items), now));
    }
    let log = log.lock();
    assert_eq!((log["1"][0].as_str(), log["2"][0].as_str()), ("answered 1 by 1", "answered 2 by 2"));
}

#[test]
fn a_full_queue_refuses_jobs_that_are_not_more_urgent() {
    let log = Log::default();
    let mut dispatcher = Dispatcher::new(1);
    assert!(matches!(dispatcher.submit(job("0", Priority::Stream, None, &log)), Err((_, SubmitErrorKind::NotServing))));
    let id = dispatcher.reserve();
    dispatcher.add(id, info(1), 1, BatchPolicy::default(), size(1));
    assert!(matches!(dispatcher.submit(job("1", Priority::Batch, None, &log)), Ok(None)));
    let refused = dispatcher.submit(job("2", Priority::Batch, None, &log));
    assert!(matches!(refused, Err((_, SubmitErrorKind::QueueFull))));
    assert!(matches!(dispatcher.submit(job("3", Priority::Trigger, None, &log)), Ok(Some(_))));
    assert_eq!(dispatcher.waiting(), 1);
}

#[test]
fn a_job_that_is_dropped_is_cancelled() {
    let ended = Arc::new(AtomicU64::new(0));
    let counted = ended.clone();
    let sink = Box::new(move |outcome| {
        assert!(matches!(outcome, JobOutcome::Cancelled));
        counted.fetch_add(1, Ordering::Relaxed);
    });
    drop(Job::new(Frame::encoded(Bytes::new(), None, false), Priority::Stream, None, sink));
    assert_eq!(ended.load(Ordering::Relaxed), 1);
}
