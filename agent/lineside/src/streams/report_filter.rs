//! Report by exception: of a line that runs well, only what is news is said, and a sign of life.
//!
//! A result is said when its verdict is `reject`, when it differs from the last one that was said (another verdict, other
//! labels, another number of detections, another model version, a score that moved by more than the deadband), or when
//! the heartbeat is over. What is not said is counted, and uses no number.

use std::time::Instant;

use lineside_api::prediction::Prediction;

use lineside_api::kinds::Report;
use lineside_api::verdict::Verdict;

/// What was said last of one stream.
#[derive(Debug)]
pub struct ReportFilter {
    report: Report,
    last: Option<(ReportKey, Instant)>,
}

/// What of a result is compared.
#[derive(Debug, Clone, PartialEq)]
struct ReportKey {
    verdict: Verdict,
    version: u64,
    classes: Vec<u32>,
    scores: Vec<f32>,
}

impl ReportKey {
    fn of(prediction: &Prediction, verdict: Verdict, version: u64) -> Option<Self> {
        let (classes, scores) = match prediction {
            // The best class; the order of those behind it is noise.
            Prediction::Classes(classes) => classes.iter().take(1).map(|class| (class.class, class.score)).unzip(),
            Prediction::Detections(found) => {
                let mut found: Vec<(u32, f32)> =
                    found.iter().map(|found| (found.class.class, found.class.score)).collect();
                found.sort_by(|one, other| one.0.cmp(&other.0).then(other.1.total_cmp(&one.1)));
                found.into_iter().unzip()
            }
            Prediction::Anomaly { score, .. } => (Vec::new(), vec![*score]),
            // Raw tensors have no gist: every one is said.
            Prediction::Tensors(_) => return None,
        };
        Some(Self { verdict, version, classes, scores })
    }

    fn is_like(&self, other: &Self, deadband: f32) -> bool {
        let near = |(one, other): (&f32, &f32)| (one - other).abs() <= deadband;
        (self.verdict, self.version) == (other.verdict, other.version)
            && self.classes == other.classes
            && self.scores.len() == other.scores.len()
            && self.scores.iter().zip(&other.scores).all(near)
    }
}

impl ReportFilter {
    /// Nothing was said yet.
    pub fn new(report: Report) -> Self {
        Self { report, last: None }
    }

    /// Whether this result is to be said; if so, it is the last one that was.
    pub fn should_report(&mut self, prediction: &Prediction, verdict: Verdict, version: u64, now: Instant) -> bool {
        let Some(gist) = ReportKey::of(prediction, verdict, version) else { return true };
        let is_old_news = verdict != Verdict::Reject
            && self.last.as_ref().is_some_and(|(last, at)| {
                now.saturating_duration_since(*at) < self.report.heartbeat && gist.is_like(last, self.report.deadband)
            });
        if !is_old_news {
            self.last = Some((gist, now));
        }
        !is_old_news
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use lineside_api::prediction::{Class, Detection};

    use super::*;

    fn classes(class: u32, score: f32) -> Prediction {
        Prediction::Classes(vec![Class { label: "l".into(), class, score }])
    }

    fn detections(found: &[(u32, f32)]) -> Prediction {
        let one = |(class, score): &(u32, f32)| Detection {
            class: Class { label: "l".into(), class: *class, score: *score },
            bbox: [0.0; 4],
        };
        Prediction::Detections(found.iter().map(one).collect())
    }

    #[test]
    fn only_news_rejects_and_the_heartbeat_are_said() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut stream = ReportFilter::new(Report { deadband: 0.1, heartbeat: Duration::from_secs(60) });
        let mut says = |prediction: &Prediction, verdict, version, seconds| {
            stream.should_report(prediction, verdict, version, at(seconds))
        };
        assert!(says(&classes(0, 0.9), Verdict::Pass, 1, 0), "the first");
        assert!(!says(&classes(0, 0.85), Verdict::Pass, 1, 1));
        assert!(says(&classes(0, 0.75), Verdict::Pass, 1, 2), "it moved");
        assert!(!says(&classes(0, 0.82), Verdict::Pass, 1, 3), "compared with what was said last");
        assert!(says(&classes(1, 0.75), Verdict::Pass, 1, 4), "another class");
        assert!(says(&classes(1, 0.75), Verdict::None, 1, 5), "another verdict");
        assert!(says(&classes(1, 0.75), Verdict::None, 2, 6), "another version");
        assert!(!says(&classes(1, 0.75), Verdict::None, 2, 65));
        assert!(says(&classes(1, 0.75), Verdict::None, 2, 66), "the heartbeat");
        assert!(says(&classes(1, 0.75), Verdict::Reject, 2, 67));
        assert!(says(&classes(1, 0.75), Verdict::Reject, 2, 68), "every reject is said");
        assert!(says(&detections(&[(0, 0.5), (1, 0.9)]), Verdict::Pass, 2, 69));
        assert!(!says(&detections(&[(1, 0.9), (0, 0.5)]), Verdict::Pass, 2, 70), "in another order");
        assert!(says(&detections(&[(1, 0.9)]), Verdict::Pass, 2, 71), "one less");
    }
}
