//! A set of positions, stored as ranges: acknowledgements arrive nearly in order, so a few ranges represent millions of
//! positions.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// A set of positions: ranges, first to last, that neither touch nor overlap.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct PositionSet(BTreeMap<u64, u64>);

impl PositionSet {
    /// Adds a range of positions. An empty range adds nothing.
    pub(crate) fn insert(&mut self, range: RangeInclusive<u64>) {
        let (mut first, mut last) = range.into_inner();
        if first > last {
            return;
        }
        // Ranges that overlap or touch the new range are merged with it. Ranges do not overlap, so the candidates are those
        // that start at or before the new end, in descending order.
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

    /// Whether the set contains a position.
    pub(crate) fn contains(&self, position: u64) -> bool {
        self.end_of(position).is_some()
    }

    /// The last position of the range that contains a position.
    pub(crate) fn end_of(&self, position: u64) -> Option<u64> {
        self.0.range(..=position).next_back().map(|(_, end)| *end).filter(|end| *end >= position)
    }

    /// The number of positions of `range` that the set contains.
    pub(crate) fn count_within(&self, range: RangeInclusive<u64>) -> u64 {
        let (first, last) = range.into_inner();
        let ranges = self.0.range(..=last).rev().take_while(|(_, end)| **end >= first);
        ranges.map(|(start, end)| last.min(*end) - first.max(*start) + 1).sum()
    }

    /// The last position of `range` that the set does not contain.
    pub(crate) fn last_outside(&self, range: RangeInclusive<u64>) -> Option<u64> {
        let (first, last) = range.into_inner();
        let outside = match self.0.range(..=last).next_back() {
            Some((start, end)) if *end >= last => start.checked_sub(1)?,
            _ => last,
        };
        (outside >= first).then_some(outside)
    }

    /// Removes every position below `floor`.
    pub(crate) fn remove_below(&mut self, floor: u64) {
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

    /// The ranges in ascending order.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().map(|(first, last)| (*first, *last))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_position_set_behaves_as_a_set_of_numbers() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..200 {
            let (mut positions, mut expected) = (PositionSet::default(), BTreeSet::new());
            for _ in 0..60 {
                let first = random.u64(0..100);
                let last = first + random.u64(0..6);
                match random.u8(0..8) {
                    0 => {
                        positions.remove_below(first);
                        expected = expected.split_off(&first);
                    }
                    _ => {
                        positions.insert(first..=last);
                        expected.extend(first..=last);
                    }
                }
                let listed: Vec<u64> = positions.ranges().flat_map(|(first, last)| first..=last).collect();
                assert_eq!(listed, Vec::from_iter(expected.iter().copied()));
                let touching =
                    positions.ranges().zip(positions.ranges().skip(1)).any(|(one, next)| one.1 + 1 >= next.0);
                assert!(!touching, "{positions:?}");
                let (from, to) = (random.u64(0..100), random.u64(0..110));
                let within = expected.iter().filter(|position| (from..=to).contains(*position)).count() as u64;
                assert_eq!(if from <= to { positions.count_within(from..=to) } else { 0 }, within);
                assert_eq!(positions.contains(from), expected.contains(&from));
                let outside = (from..=to).rev().find(|position| !expected.contains(position));
                assert_eq!(if from <= to { positions.last_outside(from..=to) } else { None }, outside);
            }
        }
        let mut edge = PositionSet::default();
        edge.insert(u64::MAX..=u64::MAX);
        edge.insert(0..=3);
        edge.insert(RangeInclusive::new(5, 4));
        assert_eq!(edge.ranges().collect::<Vec<_>>(), [(0, 3), (u64::MAX, u64::MAX)]);
    }
}
