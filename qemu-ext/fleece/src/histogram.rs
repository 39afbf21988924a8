// SPDX-License-Identifier: GPL-2.0-or-later
//! A histogram of waiting times: eight buckets for each power of two, so a percentile is at most an
//! eighth too high. Recording is one atomic addition and no allocation.

use crate::sync::{AtomicU64, Ordering};

/// Buckets for each power of two.
const SUB: u64 = 8;
const SUB_BITS: u32 = SUB.trailing_zeros();
/// Everything from about 18 minutes on is in the last bucket. In the interleaving models time
/// stands still.
const MAX_BITS: u32 = if cfg!(loom) { SUB_BITS } else { 40 };
const BUCKETS: usize = ((MAX_BITS - SUB_BITS + 1) as u64 * SUB) as usize;

pub(crate) struct Histogram {
    buckets: Box<[AtomicU64]>,
}

fn bucket(ns: u64) -> usize {
    if ns < SUB {
        return ns as usize;
    }
    let shift = ns.ilog2() - SUB_BITS;
    let index = u64::from(shift) * SUB + (ns >> shift);
    (index as usize).min(BUCKETS - 1)
}

/// The largest value in a bucket.
fn upper_bound(index: usize) -> u64 {
    let index = index as u64;
    if index < SUB {
        return index;
    }
    let shift = index / SUB - 1;
    ((index % SUB + SUB + 1) << shift) - 1
}

impl Histogram {
    pub(crate) fn new() -> Self {
        Self { buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect() }
    }

    pub(crate) fn record(&self, ns: u64) {
        self.buckets[bucket(ns)].fetch_add(1, Ordering::Relaxed);
    }

    /// The buckets that are not empty: upper bound in nanoseconds, and how many.
    pub(crate) fn counts(&self) -> Vec<(u64, u64)> {
        self.buckets
            .iter()
            .enumerate()
            .map(|(index, count)| (upper_bound(index), count.load(Ordering::Relaxed)))
            .filter(|&(_, count)| count > 0)
            .collect()
    }
}

/// The bound below which `per_mille` of all values are.
pub(crate) fn percentile(counts: &[(u64, u64)], per_mille: u64) -> u64 {
    let total: u64 = counts.iter().map(|&(_, count)| count).sum();
    let wanted = (total * per_mille).div_ceil(1000);
    let mut seen = 0;
    for &(bound, count) in counts {
        seen += count;
        if seen >= wanted {
            return bound;
        }
    }
    0
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use super::{BUCKETS, Histogram, bucket, percentile, upper_bound};

    #[test]
    fn each_value_is_below_its_bound_and_not_far() {
        for ns in (0..200).chain((3..40).map(|bits| (1 << bits) - 1)).chain([12_345, 999_999]) {
            let bound = upper_bound(bucket(ns));
            assert!(bound >= ns && bound <= ns + ns / 8 + 1, "{ns} -> {bound}");
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_of_a_known_series() {
        let histogram = Histogram::new();
        for value in 1..=1000 {
            histogram.record(value * 1000);
        }
        let counts = histogram.counts();
        let near = |got: u64, want: u64| got >= want && got <= want + want / 8 + 1;
        assert!(near(percentile(&counts, 500), 500_000));
        assert!(near(percentile(&counts, 990), 990_000));
        assert!(near(percentile(&counts, 999), 999_000));
        assert_eq!(percentile(&[], 500), 0);
    }
}
