// SPDX-License-Identifier: MIT OR Apache-2.0
//! Medians with a confidence that assumes nothing about the distribution.

use serde::{Deserialize, Serialize};

/// What an interval should at least cover.
const WANTED: f64 = 0.95;

/// A median and an interval that contains the true one with the given confidence.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The median of the values.
    pub median: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
    /// Probability that the interval contains the true median; few values cannot give 0.95.
    pub confidence: f64,
    /// Number of values.
    pub count: usize,
}

/// The median of `values` and the narrowest interval between two of them, symmetric in rank, that
/// covers the true median with 95 %; else the whole range. Values that are not numbers are left out.
#[must_use]
pub fn estimate(values: &[f64]) -> Option<Estimate> {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    let count = sorted.len();
    let (first, last) = (*sorted.first()?, *sorted.last()?);
    let median = f64::midpoint(sorted[(count - 1) / 2], sorted[count / 2]);
    // Leaving out the `out` smallest and largest values misses the median when at most `out`
    // values lie on one side of it.
    let mut best =
        Estimate { median, low: first, high: last, confidence: covered(count, 0), count };
    for out in 1..count.div_ceil(2) {
        let confidence = covered(count, out);
        if confidence < WANTED {
            break;
        }
        best = Estimate { low: sorted[out], high: sorted[count - 1 - out], confidence, ..best };
    }
    Some(best)
}

/// Coverage of the interval without the `out` smallest and largest of `count` values.
fn covered(count: usize, out: usize) -> f64 {
    let n = count as f64;
    let (mut ways, mut sum) = (1.0, 1.0);
    for i in 1..=out {
        ways *= (n - i as f64 + 1.0) / i as f64;
        sum += ways;
    }
    (1.0 - 2.0 * sum / n.exp2()).max(0.0)
}

/// The ratio `a / b`, paired by round: what disturbed a whole round disturbed both.
#[must_use]
pub fn ratio(a: &[Option<f64>], b: &[Option<f64>]) -> Option<Estimate> {
    let pairs = a.iter().zip(b);
    let ratios: Vec<f64> = pairs
        .filter_map(|(a, b)| Some((*a)? / (*b).filter(|b| *b > 0.0)?))
        .filter(|ratio| ratio.is_finite())
        .collect();
    estimate(&ratios)
}

/// The value below which `part` of the sorted values lie.
#[must_use]
pub fn percentile(sorted: &[u64], part: f64) -> Option<u64> {
    let last = sorted.len().checked_sub(1)?;
    let rank = (part * sorted.len() as f64).ceil() as usize;
    Some(sorted[rank.saturating_sub(1).min(last)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_few_values_has_their_range_as_interval() {
        let three = estimate(&[3.0, 1.0, 2.0]).unwrap();
        assert_eq!((three.median, three.low, three.high), (2.0, 1.0, 3.0));
        assert_eq!(three.confidence, 0.75);
        let five = estimate(&[5.0, 1.0, 4.0, 2.0, 3.0]).unwrap();
        assert_eq!((five.median, five.low, five.high, five.confidence), (3.0, 1.0, 5.0, 0.9375));
        assert_eq!(estimate(&[1.0, 2.0]).unwrap().median, 1.5);
        assert_eq!(estimate(&[7.0]).unwrap().confidence, 0.0);
        assert_eq!(estimate(&[f64::NAN]), None);
    }

    #[test]
    fn more_values_narrow_the_interval() {
        let values: Vec<f64> = (1..=20).map(f64::from).collect();
        let all = estimate(&values).unwrap();
        // Known from tables: ranks 6 and 15 cover 95.9 % for n = 20.
        assert_eq!((all.low, all.high, all.median), (6.0, 15.0, 10.5));
        assert!((all.confidence - 0.9586).abs() < 1e-4);
    }

    #[test]
    fn ratios_pair_the_rounds() {
        let (a, b) = ([Some(2.0), None, Some(30.0)], [Some(1.0), Some(5.0), Some(10.0)]);
        let found = ratio(&a, &b).unwrap();
        assert_eq!((found.count, found.low, found.high), (2, 2.0, 3.0));
        assert_eq!(ratio(&[Some(1.0)], &[Some(0.0)]), None);
    }

    #[test]
    fn percentiles_take_the_nearest_rank() {
        let values: Vec<u64> = (1..=1000).collect();
        assert_eq!(percentile(&values, 0.99), Some(990));
        assert_eq!(percentile(&values, 0.999), Some(999));
        assert_eq!(percentile(&[5], 0.5), Some(5));
        assert_eq!(percentile(&[], 0.5), None);
    }
}
