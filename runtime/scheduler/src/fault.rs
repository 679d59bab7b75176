//! Attributes the end of a worker to what it was doing: a frame, a verdict rule, or the model.
//!
//! A worker has several threads, so more than one job may have been executing when it ended. Only where a single job was, the
//! fault is attributed. Otherwise each of these jobs becomes a *suspect* and is executed again, alone: nothing else is in the
//! worker then, and a second end names the cause. Jobs that only waited in the worker are executed again with the others.
//!
//! ```text
//! decode                -> the frame fails; the model is not at fault
//! rule                  -> the frame is executed again without the rule, which is not evaluated any more
//! preprocess, inference -> the frame fails, and the fault counts against the model
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;

use lineside_worker::{Activity, BatchId, Stage};

use crate::job::Job;

/// Times that a job is executed again because its worker ended.
const RETRIES_MAX: u32 = 2;

/// What made a worker end or hang.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It is not known: nothing or more than one job was being executed, or the process was killed from outside.
    Unknown,
    /// The frame of a stream.
    Frame,
    /// A verdict rule.
    Rule(Arc<str>),
    /// The model.
    Model,
}

impl Fault {
    /// The name in logs.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Frame => "frame",
            Self::Rule(_) => "rule",
            Self::Model => "model",
        }
    }
}

/// What becomes of a job whose worker has ended.
pub(crate) enum Fate {
    /// It is executed again with others.
    Retry,
    /// It is executed again, alone.
    RetryAlone,
    /// It has failed, in this stage.
    Failed(Option<Stage>),
}

/// Attributes the end of a worker that held these batches. `is_external` states that the process was killed from outside.
pub(crate) fn attribute(
    batches: BTreeMap<BatchId, Vec<Job>>,
    activity: &[Activity],
    is_external: bool,
) -> (Fault, Vec<(Job, Fate)>) {
    let stage_of = |batch: BatchId, index: usize| {
        let is_of = |activity: &&Activity| {
            activity.batch == batch && (activity.stage == Stage::Infer || activity.item == index)
        };
        activity.iter().find(is_of).map(|activity| activity.stage)
    };
    let jobs: Vec<(Job, Option<Stage>)> = batches
        .into_iter()
        .flat_map(|(batch, jobs)| jobs.into_iter().enumerate().map(move |(index, job)| (batch, index, job)))
        .map(|(batch, index, job)| (job, stage_of(batch, index)))
        .collect();
    let is_certain = !is_external && jobs.iter().filter(|(_, stage)| stage.is_some()).count() == 1;
    let mut fault = Fault::Unknown;
    let fates = jobs.into_iter().map(|(mut job, stage)| {
        let is_last = job.retries >= RETRIES_MAX;
        job.retries += 1;
        let fate = match stage {
            Some(Stage::Rule) if is_certain => {
                if let Some(rule) = job.rule.clone() {
                    fault = Fault::Rule(rule);
                }
                Fate::Retry
            }
            Some(stage) if is_certain => {
                fault = if stage == Stage::Decode { Fault::Frame } else { Fault::Model };
                Fate::Failed(Some(stage))
            }
            _ if is_last => Fate::Failed(None),
            Some(_) => Fate::RetryAlone,
            None => Fate::Retry,
        };
        (job, fate)
    });
    let fates = fates.collect();
    (fault, fates)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use lineside_ipc::frame::Frame;

    use super::*;
    use crate::job::Priority;

    fn batches(sizes: &[usize]) -> BTreeMap<BatchId, Vec<Job>> {
        let job = || {
            let frame = Frame::encoded(Bytes::new(), None, false);
            Job::new(frame, Priority::Stream, None, Box::new(drop)).with_rule(Some("true".into()))
        };
        sizes.iter().enumerate().map(|(id, size)| (id as u64, (0..*size).map(|_| job()).collect())).collect()
    }

    fn activity(batch: BatchId, item: usize, stage: Stage) -> Activity {
        Activity { batch, item, stage }
    }

    fn fates(result: &[(Job, Fate)]) -> String {
        let name = |fate: &Fate| match fate {
            Fate::Retry => 'r',
            Fate::RetryAlone => 'a',
            Fate::Failed(_) => 'f',
        };
        result.iter().map(|(_, fate)| name(fate)).collect()
    }

    #[test]
    fn a_single_executing_job_is_the_cause() {
        for (stage, expected, fate) in [
            (Stage::Decode, Fault::Frame, "fr"),
            (Stage::Preprocess, Fault::Model, "fr"),
            (Stage::Infer, Fault::Model, "fr"),
            (Stage::Rule, Fault::Rule("true".into()), "rr"),
        ] {
            let (fault, jobs) = attribute(batches(&[1, 1]), &[activity(0, 0, stage)], false);
            assert_eq!((fault, fates(&jobs).as_str()), (expected, fate));
        }
    }

    #[test]
    fn several_executing_jobs_are_executed_again_alone() {
        let both = [activity(0, 0, Stage::Infer), activity(1, 1, Stage::Decode)];
        let (fault, jobs) = attribute(batches(&[2, 3, 1]), &both, false);
        assert_eq!((fault, fates(&jobs).as_str()), (Fault::Unknown, "aararr"));
    }

    #[test]
    fn nothing_is_attributed_to_a_process_that_was_killed_from_outside_or_was_idle() {
        let (fault, jobs) = attribute(batches(&[1, 1]), &[activity(0, 0, Stage::Infer)], true);
        assert_eq!((fault, fates(&jobs).as_str()), (Fault::Unknown, "ar"));
        let (fault, jobs) = attribute(batches(&[1]), &[activity(99, 0, Stage::Infer)], false);
        assert_eq!((fault, fates(&jobs).as_str()), (Fault::Unknown, "r"));
    }

    #[test]
    fn a_job_is_not_executed_for_ever() {
        let mut held = batches(&[1]);
        for _ in 0..RETRIES_MAX {
            let (_, jobs) = attribute(held, &[], false);
            assert_eq!(fates(&jobs), "r");
            held = BTreeMap::from([(0, jobs.into_iter().map(|(job, _)| job).collect())]);
        }
        assert_eq!(fates(&attribute(held, &[], false).1), "f");
    }
}
