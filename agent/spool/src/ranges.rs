//! A set of positions, kept as ranges: acknowledgements come nearly in order, so a few ranges hold millions of them.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// Positions, as ranges that neither touch nor overlap.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// Adds a range. An empty one adds nothing.
    pub(super) fn insert(&mut self, range: RangeInclusive<u64>) {
        let (mut first, mut last) = range.into_inner();
        if first > last {
            return;
        }
        // Everything that overlaps or touches the new range becomes part of it. Ranges do not overlap, so the candidates
        // are the ones that begin at or before the new end, from behind.
        let touching: Vec<(u64, u64)> = self
            .0
            .range(..=last.saturating_add(1))
            .rev()
            .take_while(|(_, end)| end.saturating_add(1) >= first)
            .map(|(start, end)| (*start, *end))
            .collect();
        for (start, end) in touching {
            self.0.remove(&start);
            (first, last) = (first.min(start), last.max(end));
        }
        self.0.insert(first, last);
    }

    /// Whether a position is in.
    pub(super) fn contains(&self, position: u64) -> bool {
        self.end_of(position).is_some()
    }

    /// The end of the range a position is in.
    pub(super) fn end_of(&self, position: u64) -> Option<u64> {
        self.0.range(..=position).next_back().map(|(_, end)| *end).filter(|end| *end >= position)
    }

    /// How many positions of a range are in.
    pub(super) fn count_within(&self, range: RangeInclusive<u64>) -> u64 {
        let (first, last) = range.into_inner();
        let ranges = self.0.range(..=last).rev().take_while(|(_, end)| **end >= first);
        ranges.map(|(start, end)| last.min(*end) - first.max(*start) + 1).sum()
    }

    /// The last position of a range that is not in.
    pub(super) fn last_outside(&self, range: RangeInclusive<u64>) -> Option<u64> {
        let (first, last) = range.into_inner();
        let outside = match self.0.range(..=last).next_back() {
            Some((start, end)) if *end >= last => start.checked_sub(1)?,
            _ => last,
        };
        (outside >= first).then_some(outside)
    }

    /// Forgets every position below `floor`.
    pub(super) fn forget_below(&mut self, floor: u64) {
        if self.0.first_key_value().is_none_or(|(first, _)| *first >= floor) {
            return;
        }
        let kept = self.0.split_off(&floor);
        let before = std::mem::replace(&mut self.0, kept);
        if let Some((_, end)) = before.last_key_value()
            && *end >= floor
        {
            self.0.insert(floor, *end);
        }
    }

    /// The ranges, lowest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().map(|(first, last)| (*first, *last))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn ranges_are_a_set() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..200 {
            let (mut ranges, mut set) = (Ranges::default(), BTreeSet::new());
            for _ in 0..60 {
                let first = random.u64(0..100);
                let last = first + random.u64(0..6);
                match random.u8(0..8) {
                    0 => {
                        ranges.forget_below(first);
                        set = set.split_off(&first);
                    }
                    _ => {
                        ranges.insert(first..=last);
                        set.extend(first..=last);
                    }
                }
                let listed: Vec<u64> = ranges.iter().flat_map(|(first, last)| first..=last).collect();
                assert_eq!(listed, Vec::from_iter(set.iter().copied()));
                let touching = ranges.iter().zip(ranges.iter().skip(1)).any(|(one, next)| one.1 + 1 >= next.0);
                assert!(!touching, "{ranges:?}");
                let (from, to) = (random.u64(0..100), random.u64(0..110));
                let within = set.iter().filter(|position| (from..=to).contains(*position)).count() as u64;
                assert_eq!(if from <= to { ranges.count_within(from..=to) } else { 0 }, within);
                assert_eq!(ranges.contains(from), set.contains(&from));
                let outside = (from..=to).rev().find(|position| !set.contains(position));
                assert_eq!(if from <= to { ranges.last_outside(from..=to) } else { None }, outside);
            }
        }
        let mut edge = Ranges::default();
        edge.insert(u64::MAX..=u64::MAX);
        edge.insert(0..=3);
        edge.insert(RangeInclusive::new(5, 4));
        assert_eq!(edge.iter().collect::<Vec<_>>(), [(0, 3), (u64::MAX, u64::MAX)]);
    }
}
