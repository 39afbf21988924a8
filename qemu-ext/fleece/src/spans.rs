// SPDX-License-Identifier: GPL-2.0-or-later
//! Short lists of granule ranges of one region: postponed discards, and those being done.

use std::ops::Range;

/// So many ranges at most: what does not fit is forgotten, which costs space, never data.
const MAX_SPANS: usize = 128;

/// Disjoint ranges in order, none empty, no two of them touching.
#[derive(Debug, Default)]
pub(crate) struct Spans(Vec<Range<u32>>);

/// What a list takes in memory.
fn bytes(ranges: &Vec<Range<u32>>) -> u64 {
    (ranges.capacity() * size_of::<Range<u32>>()) as u64
}

/// Whether one of the ranges has a granule in common with `range`.
fn overlap(ranges: &[Range<u32>], range: &Range<u32>) -> bool {
    ranges.iter().any(|other| other.start < range.end && range.start < other.end)
}

impl Spans {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn bytes(&self) -> u64 {
        bytes(&self.0)
    }

    pub(crate) fn overlaps(&self, range: &Range<u32>) -> bool {
        overlap(&self.0, range)
    }

    /// Granules in all ranges.
    pub(crate) fn count(&self) -> u64 {
        self.0.iter().map(|span| u64::from(span.end - span.start)).sum()
    }

    /// Adds a range; whether there was room for it.
    pub(crate) fn add(&mut self, mut range: Range<u32>) -> bool {
        if range.is_empty() {
            return true;
        }
        let first = self.0.partition_point(|span| span.end < range.start);
        let last = self.0.partition_point(|span| span.start <= range.end);
        if first == last {
            if self.0.len() >= MAX_SPANS || self.0.try_reserve(1).is_err() {
                return false;
            }
            self.0.insert(first, range);
            return true;
        }
        range.start = range.start.min(self.0[first].start);
        range.end = range.end.max(self.0[last - 1].end);
        self.0[first] = range;
        self.0.drain(first + 1..last);
        true
    }

    /// Takes `range` out; what of it was in the list. Where a range would be cut in two and there
    /// is no room for both parts, the shorter one is forgotten.
    pub(crate) fn take(&mut self, range: &Range<u32>) -> Vec<Range<u32>> {
        let mut taken = Vec::new();
        let mut index = self.0.partition_point(|span| span.end <= range.start);
        while index < self.0.len() && self.0[index].start < range.end {
            let span = self.0[index].clone();
            taken.push(span.start.max(range.start)..span.end.min(range.end));
            let before = span.start..range.start.max(span.start);
            let after = range.end.min(span.end)..span.end;
            match (before.is_empty(), after.is_empty()) {
                (true, true) => {
                    self.0.remove(index);
                }
                (false, true) => {
                    self.0[index] = before;
                    index += 1;
                }
                (true, false) => self.0[index] = after,
                (false, false) => {
                    let fits = self.0.len() < MAX_SPANS && self.0.try_reserve(1).is_ok();
                    if fits {
                        self.0[index] = before;
                        self.0.insert(index + 1, after);
                    } else {
                        let before_is_longer = before.len() >= after.len();
                        self.0[index] = if before_is_longer { before } else { after };
                    }
                    break;
                }
            }
        }
        taken
    }

    /// Takes `range` out and says how many granules of the list went with it.
    pub(crate) fn forget(&mut self, range: &Range<u32>) -> u64 {
        if !self.overlaps(range) {
            return 0;
        }
        let before = self.count();
        drop(self.take(range));
        before - self.count()
    }

    /// The first range.
    pub(crate) fn first(&self) -> Option<Range<u32>> {
        self.0.first().cloned()
    }

    /// Gives back memory that it does not need.
    pub(crate) fn shrink(&mut self) {
        self.0.shrink_to_fit();
    }
}

/// Ranges that do not overlap, each taken out as it was put in: nothing is joined, cut or forgotten.
#[derive(Debug, Default)]
pub(crate) struct Separate(Vec<Range<u32>>);

impl Separate {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn bytes(&self) -> u64 {
        bytes(&self.0)
    }

    pub(crate) fn overlaps(&self, range: &Range<u32>) -> bool {
        overlap(&self.0, range)
    }

    pub(crate) fn contains(&self, granule: u32) -> bool {
        self.overlaps(&(granule..granule + 1))
    }

    /// Puts a range in; whether there was room for it.
    pub(crate) fn add(&mut self, range: Range<u32>) -> bool {
        let fits = self.0.len() < MAX_SPANS && self.0.try_reserve(1).is_ok();
        if fits {
            self.0.push(range);
        }
        fits
    }

    pub(crate) fn remove(&mut self, range: &Range<u32>) {
        if let Some(at) = self.0.iter().position(|other| other == range) {
            self.0.swap_remove(at);
        }
    }
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use super::{MAX_SPANS, Separate, Spans};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use std::collections::BTreeSet;

    fn has(spans: &Spans, granule: u32) -> bool {
        spans.overlaps(&(granule..granule + 1))
    }

    #[test]
    fn separate_ranges_end_on_their_own_however_many_there_are() {
        let mut ranges = Separate::default();
        let all = MAX_SPANS as u32;
        // They touch each other.
        assert!((0..all).all(|n| ranges.add(n * 4..n * 4 + 4)));
        assert!(!ranges.add(all * 4..all * 4 + 1));
        ranges.remove(&(8..12));
        ranges.remove(&(13..14));
        for n in 0..all {
            assert_eq!(ranges.contains(n * 4 + 3), n != 2, "{n}");
            assert_eq!(ranges.overlaps(&(n * 4..n * 4 + 1)), n != 2, "{n}");
        }
        assert!(ranges.add(8..12) && !ranges.is_empty());
    }

    #[test]
    fn behaves_like_a_set() {
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..200 {
            let mut spans = Spans::default();
            let mut model = BTreeSet::new();
            for _ in 0..60 {
                let start = rng.random_range(0..200);
                let range = start..start + rng.random_range(0..40);
                if rng.random() {
                    assert!(spans.add(range.clone()));
                    model.extend(range);
                } else {
                    let taken: Vec<u32> = spans.take(&range).into_iter().flatten().collect();
                    let expected: Vec<u32> = model.range(range.clone()).copied().collect();
                    assert_eq!(taken, expected);
                    model.retain(|granule| !range.contains(granule));
                }
                assert_eq!(spans.count(), model.len() as u64);
                for granule in 0..240 {
                    assert_eq!(has(&spans, granule), model.contains(&granule));
                    let one = granule..granule + 1;
                    assert_eq!(spans.overlaps(&one), model.contains(&granule));
                }
            }
        }
    }

    #[test]
    fn is_bounded_and_forgets_rather_than_inventing() {
        let mut spans = Spans::default();
        for index in 0..MAX_SPANS as u32 {
            assert!(spans.add(index * 10..index * 10 + 5));
        }
        assert!(!spans.add(5000..5001));
        let taken = spans.take(&(1..2));
        assert!(taken.len() == 1 && taken[0] == (1..2));
        assert!(!has(&spans, 0) && has(&spans, 2) && has(&spans, 4));
        assert_eq!(spans.forget(&(0..20)), 3 + 5);
    }
}
