// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a backup cost the guest, over all of its disks.

use std::collections::BTreeMap;

use qmp_client::backup::AccessStatus;

use crate::guest::AccessStats;

/// Adds up what QEMU counted for each disk. Percentiles cannot be added, so they come from the
/// histograms.
pub(super) fn stats_of(status: &AccessStatus) -> AccessStats {
    let mut sum = AccessStats::default();
    let mut waits = BTreeMap::<u64, u64>::new();
    for device in &status.devices {
        sum.writes_delayed = sum.writes_delayed.saturating_add(device.writes_delayed);
        sum.delay_max_ns = sum.delay_max_ns.max(device.delay_max_ns);
        sum.captured_bytes = sum.captured_bytes.saturating_add(device.captured_bytes);
        sum.released_bytes = sum.released_bytes.saturating_add(device.released_bytes);
        for bucket in &device.delay_histogram {
            let count = waits.entry(bucket.le_ns).or_default();
            *count = count.saturating_add(bucket.count);
        }
    }
    sum.delay_p50_ns = percentile(&waits, 50).min(sum.delay_max_ns);
    sum.delay_p99_ns = percentile(&waits, 99).min(sum.delay_max_ns);
    sum
}

/// The wait that this part of all did not exceed; 0 without any.
fn percentile(waits: &BTreeMap<u64, u64>, percent: u128) -> u64 {
    let all: u128 = waits.values().map(|&count| u128::from(count)).sum();
    let wanted = (all * percent).div_ceil(100);
    let mut seen = 0;
    for (&le_ns, &count) in waits {
        seen += u128::from(count);
        if seen >= wanted && seen > 0 {
            return le_ns;
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_all_disks_together() {
        let waits = BTreeMap::from([(10, 98), (20, 1), (1000, 1)]);
        assert_eq!(percentile(&waits, 50), 10);
        assert_eq!(percentile(&waits, 98), 10);
        assert_eq!(percentile(&waits, 99), 20);
        assert_eq!(percentile(&waits, 100), 1000);
        assert_eq!(percentile(&BTreeMap::from([(5, 1)]), 1), 5);
        assert_eq!(percentile(&BTreeMap::new(), 99), 0);
    }
}
