//! The health of a stream, from the times of its frames and results and the share of frames that fail. Time is an argument.
//!
//! A stream whose camera delivers frames is unhealthy when most of its frames fail, when none of them has a result, or when no more
//! frames arrive although its source reports no error.

use std::collections::VecDeque;
use std::fmt;
use std::time::{Duration, Instant};

/// Inspected frames that the share of failed ones is computed from.
const WINDOW: usize = 20;
/// Inspected frames before the share of failed ones counts.
const WINDOW_MIN: usize = 5;
/// Frames fail from this share on, in percent of the window.
const FAILING_PERCENT: usize = 50;
/// Frames are good again up to this share, in percent of the window.
const RECOVERED_PERCENT: usize = 20;
/// Time without a result although frames arrive, and time without a frame, after which a stream is unhealthy.
const SILENT_AFTER: Duration = Duration::from_secs(30);
/// A stream with few frames is silent after this many intervals without one.
const SILENT_INTERVALS: u32 = 3;

/// Why a stream is unhealthy. The text is the same as long as the reason is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum StreamProblem {
    /// Most frames fail.
    FramesFail {
        /// Why one of them failed.
        reason: String,
    },
    /// Frames arrive, but none of them has a result: no version serves, the queue is full, or the frames are too old.
    NoResults,
    /// No frames arrive.
    NoFrames,
}

impl fmt::Display for StreamProblem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FramesFail { reason } => {
                write!(formatter, "most of the last {WINDOW} frames failed, such as: {reason}")
            }
            Self::NoResults => {
                write!(formatter, "frames arrive, and none was inspected for more than {} s", SILENT_AFTER.as_secs())
            }
            Self::NoFrames => write!(formatter, "no more frames arrive, and the source reports no error"),
        }
    }
}

/// What is known of the frames of one stream.
#[derive(Debug)]
pub(super) struct StreamHealth {
    silent_after: Duration,
    last_frame: Option<Instant>,
    /// The arrival of the first frame after the last one that was inspected.
    waiting_since: Option<Instant>,
    /// Whether each of the last inspected frames failed.
    window: VecDeque<bool>,
    /// Why a frame failed when most frames began to fail.
    failing: Option<String>,
}

impl StreamHealth {
    /// The health of a stream that has received no frame. `interval` is the shortest time between two frames, if it is limited.
    pub(super) fn new(interval: Option<Duration>) -> Self {
        Self {
            silent_after: SILENT_AFTER.max(interval.unwrap_or_default().saturating_mul(SILENT_INTERVALS)),
            last_frame: None,
            waiting_since: None,
            window: VecDeque::with_capacity(WINDOW),
            failing: None,
        }
    }

    /// A frame has arrived.
    pub(super) fn on_frame(&mut self, now: Instant) {
        self.last_frame = Some(now);
        self.waiting_since.get_or_insert(now);
    }

    /// The source reports an error, or its end. The time without frames is not counted.
    pub(super) fn on_source_down(&mut self) {
        (self.last_frame, self.waiting_since) = (None, None);
    }

    /// A frame was inspected and has a result, also one that is not reported.
    pub(super) fn on_result(&mut self) {
        self.on_outcome(false);
        if self.failed() * 100 <= self.window.len() * RECOVERED_PERCENT {
            self.failing = None;
        }
    }

    /// A frame could not be inspected.
    pub(super) fn on_failure(&mut self, reason: &str) {
        self.on_outcome(true);
        if self.window.len() >= WINDOW_MIN && self.failed() * 100 >= self.window.len() * FAILING_PERCENT {
            self.failing.get_or_insert_with(|| reason.to_owned());
        }
    }

    fn on_outcome(&mut self, has_failed: bool) {
        self.waiting_since = None;
        if self.window.len() == WINDOW {
            self.window.pop_front();
        }
        self.window.push_back(has_failed);
    }

    fn failed(&self) -> usize {
        self.window.iter().filter(|has_failed| **has_failed).count()
    }

    /// Why the stream is unhealthy at `now`; `None` when it is healthy. Meaningful while its source reports no error.
    pub(super) fn problem(&self, now: Instant) -> Option<StreamProblem> {
        let is_past =
            |time: Option<Instant>, limit| time.is_some_and(|time| now.saturating_duration_since(time) > limit);
        if let Some(reason) = &self.failing {
            Some(StreamProblem::FramesFail { reason: reason.clone() })
        } else if is_past(self.waiting_since, SILENT_AFTER) {
            Some(StreamProblem::NoResults)
        } else if is_past(self.last_frame, self.silent_after) {
            Some(StreamProblem::NoFrames)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream with a clock that is set by hand.
    struct Bench {
        health: StreamHealth,
        now: Instant,
    }

    impl Bench {
        fn new(interval: Option<Duration>) -> Self {
            Self { health: StreamHealth::new(interval), now: Instant::now() }
        }

        fn after(&mut self, seconds: u64) -> Option<StreamProblem> {
            self.now += Duration::from_secs(seconds);
            self.health.problem(self.now)
        }

        fn frames(&mut self, count: usize, has_failed: bool) -> Option<StreamProblem> {
            for _ in 0..count {
                self.health.on_frame(self.now);
                if has_failed {
                    self.health.on_failure("not a picture");
                } else {
                    self.health.on_result();
                }
                self.now += Duration::from_millis(100);
            }
            self.health.problem(self.now)
        }
    }

    fn failing() -> Option<StreamProblem> {
        Some(StreamProblem::FramesFail { reason: "not a picture".to_owned() })
    }

    #[test]
    fn a_stream_whose_frames_all_fail_is_unhealthy_until_most_are_good() {
        let mut bench = Bench::new(None);
        assert_eq!(bench.frames(4, true), None, "a few failures at the start");
        assert_eq!(bench.frames(148, true), failing());
        assert_eq!(bench.frames(15, false), failing());
        assert_eq!(bench.frames(1, false), None, "4 of the last 20 frames failed");
        assert_eq!(bench.frames(200, false), None);
    }

    #[test]
    fn a_share_between_the_bounds_changes_nothing() {
        let mut bench = Bench::new(None);
        let third = |bench: &mut Bench| (0..60).map(|n| bench.frames(1, n % 3 == 0)).collect::<Vec<_>>();
        bench.frames(20, false);
        assert!(third(&mut bench).iter().all(Option::is_none), "a third fails, and did not before");
        assert_eq!(bench.frames(20, true), failing());
        assert!(third(&mut bench).iter().all(|problem| *problem == failing()), "a third fails, and more did before");
    }

    #[test]
    fn frames_without_results_are_unhealthy_although_they_arrive() {
        let mut bench = Bench::new(None);
        bench.frames(5, false);
        for _ in 0..30 {
            bench.health.on_frame(bench.now);
            assert_eq!(bench.after(1), None);
        }
        bench.health.on_frame(bench.now);
        assert_eq!(bench.after(1), Some(StreamProblem::NoResults));
        assert_eq!(bench.frames(1, false), None);
    }

    #[test]
    fn a_source_that_falls_silent_without_an_error_is_unhealthy() {
        let mut bench = Bench::new(None);
        assert_eq!(bench.after(100), None, "no frame yet: the source reports why");
        bench.frames(1, false);
        assert_eq!(bench.after(29), None);
        assert_eq!(bench.after(2), Some(StreamProblem::NoFrames));
        bench.health.on_source_down();
        assert_eq!(bench.after(100), None, "the source reports an error");
        let mut slow = Bench::new(Some(Duration::from_secs(60)));
        slow.frames(1, false);
        assert_eq!(slow.after(170), None, "one frame in a minute");
        assert_eq!(slow.after(20), Some(StreamProblem::NoFrames));
    }
}
