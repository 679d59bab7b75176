//! Greedy non-maximum suppression, class by class.

/// A box before suppression: where, which class, how certain. Boxes are left, top, right, bottom.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    pub(super) bbox: [f32; 4],
    pub(super) class: u32,
    pub(super) score: f32,
}

/// Keeps the best boxes: of two boxes of one class whose intersection over union exceeds `iou`, the better one stays.
/// The answer is sorted by score, best first, and holds at most `kept_max`, so the work is bounded by
/// `candidates * kept_max`.
pub(super) fn suppress(mut candidates: Vec<Candidate>, iou: f32, kept_max: usize) -> Vec<Candidate> {
    candidates.sort_by(|left, right| right.score.total_cmp(&left.score));
    let mut kept: Vec<Candidate> = Vec::new();
    for candidate in candidates {
        if kept.len() == kept_max {
            break;
        }
        let covered =
            kept.iter().any(|better| better.class == candidate.class && overlap(better.bbox, candidate.bbox) > iou);
        if !covered {
            kept.push(candidate);
        }
    }
    kept
}

/// Intersection over union of two boxes; 0 where both are empty.
pub(super) fn overlap(one: [f32; 4], other: [f32; 4]) -> f32 {
    let area = |bbox: [f32; 4]| (bbox[2] - bbox[0]).max(0.0) * (bbox[3] - bbox[1]).max(0.0);
    let shared = area([one[0].max(other[0]), one[1].max(other[1]), one[2].min(other[2]), one[3].min(other[3])]);
    let union = area(one) + area(other) - shared;
    if union > 0.0 { shared / union } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(left: f32, class: u32, score: f32) -> Candidate {
        Candidate { bbox: [left, 0.0, left + 10.0, 10.0], class, score }
    }

    #[test]
    fn only_boxes_of_the_same_class_suppress_each_other() {
        let found = [candidate(0.0, 0, 0.5), candidate(1.0, 0, 0.9), candidate(1.0, 1, 0.6), candidate(30.0, 0, 0.4)];
        let kept = suppress(found.to_vec(), 0.5, 10);
        assert_eq!(kept, [found[1], found[2], found[3]]);
        assert_eq!(suppress(found.to_vec(), 0.9, 10).len(), 4);
        assert_eq!(suppress(found.to_vec(), 0.9, 2).len(), 2);
    }

    #[test]
    fn overlap_is_the_ratio_of_areas() {
        let unit = [0.0, 0.0, 2.0, 2.0];
        assert_eq!(overlap(unit, unit), 1.0);
        assert!((overlap(unit, [1.0, 0.0, 3.0, 2.0]) - 1.0 / 3.0).abs() < 1e-6);
        assert_eq!(overlap(unit, [2.0, 2.0, 3.0, 3.0]), 0.0);
        assert_eq!(overlap([1.0; 4], [1.0; 4]), 0.0, "empty boxes");
        assert_eq!(overlap([3.0, 3.0, 1.0, 1.0], unit), 0.0, "a box turned inside out is empty");
    }
}
