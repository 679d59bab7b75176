//! A bounded queue with priorities and deadlines.
//!
//! Jobs of one priority leave in the order in which they came. The most urgent priority goes first, with a floor so that no
//! priority starves: after [`FLOOR`] jobs in a row that overtook a waiting job of a lower priority, the job that waits longest
//! among the overtaken ones goes next.

use std::collections::VecDeque;
use std::time::Instant;

use crate::job::{Job, Priority};

/// Jobs of more urgent priorities that may overtake a waiting job before it is served.
const FLOOR: u32 = 8;

/// Waiting jobs.
#[derive(Default)]
pub(crate) struct JobQueue {
    levels: [VecDeque<Job>; Priority::ALL.len()],
    overtakes: u32,
}

impl JobQueue {
    /// Jobs that wait.
    pub(crate) fn len(&self) -> usize {
        self.levels.iter().map(VecDeque::len).sum()
    }

    /// Appends a job behind those of its priority.
    pub(crate) fn push(&mut self, job: Job) {
        self.levels[job.priority.index()].push_back(job);
    }

    /// Takes the next job.
    pub(crate) fn pop(&mut self) -> Option<Job> {
        let first = self.levels.iter().position(|level| !level.is_empty())?;
        let overtaken = (first + 1..self.levels.len()).filter(|level| !self.levels[*level].is_empty());
        let longest = overtaken.min_by_key(|level| self.levels[*level].front().map(|job| job.submitted));
        let level = match longest {
            None => {
                self.overtakes = 0;
                first
            }
            Some(longest) if self.overtakes >= FLOOR => {
                self.overtakes = 0;
                longest
            }
            Some(_) => {
                self.overtakes += 1;
                first
            }
        };
        self.levels[level].pop_front()
    }

    /// Drops the least urgent job that is less urgent than `priority`, the newest of its level, to make room.
    pub(crate) fn evict_below(&mut self, priority: Priority) -> Option<Job> {
        self.levels.iter_mut().skip(priority.index() + 1).rev().find_map(VecDeque::pop_back)
    }

    /// Removes the jobs whose deadline has passed.
    pub(crate) fn take_expired(&mut self, now: Instant) -> Vec<Job> {
        let mut expired = Vec::new();
        for level in &mut self.levels {
            if level.iter().any(|job| job.is_expired(now)) {
                let (late, kept): (Vec<Job>, Vec<Job>) = level.drain(..).partition(|job| job.is_expired(now));
                expired.extend(late);
                level.extend(kept);
            }
        }
        expired
    }

    /// The earliest deadline of all waiting jobs.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.levels.iter().flatten().filter_map(|job| job.deadline).min()
    }

    /// The time of submission of the job that waits longest.
    pub(crate) fn oldest(&self) -> Option<Instant> {
        self.levels.iter().filter_map(|level| level.front().map(|job| job.submitted)).min()
    }

    /// Removes all jobs, most urgent first.
    pub(crate) fn drain(&mut self) -> Vec<Job> {
        self.levels.iter_mut().flat_map(|level| level.drain(..)).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use lineside_ipc::frame::Frame;

    use super::*;

    fn job(name: &str, priority: Priority, deadline: Option<Instant>) -> Job {
        Job::new(Frame::encoded(Bytes::new(), Some(name.to_owned()), false), priority, deadline, Box::new(drop))
    }

    fn name(job: Option<Job>) -> Option<String> {
        job.and_then(|job| job.frame.name)
    }

    #[test]
    fn jobs_of_one_priority_keep_their_order_and_urgent_jobs_go_first() {
        let mut queue = JobQueue::default();
        for (name, priority) in [("a", Priority::Batch), ("b", Priority::Stream), ("c", Priority::Stream)] {
            queue.push(job(name, priority, None));
        }
        let order: Vec<Option<String>> = (0..4).map(|_| name(queue.pop())).collect();
        assert_eq!(order, [Some("b".into()), Some("c".into()), Some("a".into()), None]);
    }

    #[test]
    fn no_priority_starves() {
        let mut queue = JobQueue::default();
        queue.push(job("shadow", Priority::Shadow, None));
        queue.push(job("batch", Priority::Batch, None));
        let mut served = Vec::new();
        for number in 0..100 {
            queue.push(job(&number.to_string(), Priority::Trigger, None));
            served.push(name(queue.pop()).unwrap());
        }
        let at = |wanted: &str| served.iter().position(|name| name == wanted).unwrap();
        assert_eq!((at("shadow"), at("batch")), (FLOOR as usize, 2 * FLOOR as usize + 1));
    }

    #[test]
    fn expired_jobs_are_removed_and_the_next_deadline_is_known() {
        let now = Instant::now();
        let later = now + Duration::from_secs(9);
        let mut queue = JobQueue::default();
        queue.push(job("late", Priority::Stream, Some(now)));
        queue.push(job("soon", Priority::Stream, Some(later)));
        queue.push(job("never", Priority::Batch, None));
        assert_eq!(queue.next_deadline(), Some(now));
        let expired = queue.take_expired(now + Duration::from_secs(1));
        assert_eq!((expired.len(), queue.len(), queue.next_deadline()), (1, 2, Some(later)));
    }

    #[test]
    fn room_is_made_by_the_least_urgent_job_only() {
        let mut queue = JobQueue::default();
        for priority in [Priority::Shadow, Priority::Batch, Priority::Request] {
            queue.push(job(&format!("{priority:?}"), priority, None));
        }
        assert_eq!(name(queue.evict_below(Priority::Stream)), Some("Shadow".into()));
        assert_eq!(name(queue.evict_below(Priority::Request)), Some("Batch".into()));
        assert_eq!(name(queue.evict_below(Priority::Request)), None);
    }
}
