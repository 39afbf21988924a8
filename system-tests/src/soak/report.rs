// SPDX-License-Identifier: MIT OR Apache-2.0
//! The end of a soak: the table, and the verdict on memory.

use std::fmt;
use std::time::Duration;

use super::proc::Memory;
use super::tally::{COMPARED, COUNTED, HELD_UP, RELEASED, Tally};
use crate::table::bytes;

/// Growth that is no leak.
const FLAT_PERCENT: u64 = 5;
/// With fewer samples after the warm-up there is no verdict.
const ENOUGH: usize = 12;

/// What a soak did.
#[derive(Debug, Clone)]
pub struct Summary {
    tally: Tally,
    took: Duration,
    memory: Vec<Memory>,
    /// What this QEMU cannot do.
    optional: Vec<&'static str>,
}

/// The medians of the first and the last third of the samples after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Trend {
    pub(super) first_bytes: u64,
    pub(super) last_bytes: u64,
}

impl Trend {
    /// Without the first fifth of the samples: caches and pools fill then.
    pub(super) fn of(samples: &[u64]) -> Option<Self> {
        let warm = &samples[samples.len() / 5..];
        if warm.len() < ENOUGH {
            return None;
        }
        let third = warm.len() / 3;
        Some(Self {
            first_bytes: median(&warm[..third]),
            last_bytes: median(&warm[warm.len() - third..]),
        })
    }

    pub(super) fn is_flat(self) -> bool {
        self.last_bytes * 100 <= self.first_bytes * (100 + FLAT_PERCENT)
    }
}

impl fmt::Display for Trend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let change = (self.last_bytes as f64 / self.first_bytes as f64 - 1.0) * 100.0;
        let (first, last) = (bytes(self.first_bytes), bytes(self.last_bytes));
        write!(f, "{first} -> {last} ({change:+.1} %)")
    }
}

fn median(samples: &[u64]) -> u64 {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

impl Summary {
    pub(super) fn new(
        tally: Tally,
        took: Duration,
        memory: Vec<Memory>,
        optional: Vec<&'static str>,
    ) -> Self {
        Self { tally, took, memory, optional }
    }

    /// How often something was done, by its name in the table.
    #[must_use]
    pub fn count(&self, what: &str) -> u64 {
        self.tally.get(what)
    }

    fn trend(&self, part: fn(&Memory) -> u64) -> Option<Trend> {
        Trend::of(&self.memory.iter().map(part).collect::<Vec<_>>())
    }

    /// Whether memory grew; a soak that is too short says nothing.
    ///
    /// # Errors
    /// It grew by more than 5 %.
    pub fn check_memory(&self) -> anyhow::Result<()> {
        match self.trend(|memory| memory.resident_bytes) {
            Some(trend) if !trend.is_flat() => anyhow::bail!("RSS grew: {trend}"),
            _ => Ok(()),
        }
    }

    /// What a long soak must have met did not happen.
    ///
    /// # Errors
    /// Names what is missing.
    pub fn check_variety(&self) -> anyhow::Result<()> {
        let mut missing: Vec<&str> =
            COUNTED.iter().copied().filter(|&what| self.count(what) == 0).collect();
        // That a setup comes while another target's image is stuck is a matter of milliseconds.
        missing.retain(|what| *what != HELD_UP && !self.optional.contains(what));
        anyhow::ensure!(missing.is_empty(), "it never came to: {}", missing.join(", "));
        Ok(())
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<40} {:>12}", "soak", format!("{:.0} s", self.took.as_secs_f64()))?;
        writeln!(f, "{}", "-".repeat(53))?;
        for &what in COUNTED {
            let count = self.count(what);
            let shown = match what {
                COMPARED | RELEASED => bytes(count),
                _ => count.to_string(),
            };
            writeln!(f, "{what:<40} {shown:>12}")?;
        }
        let rows = [
            ("RSS, first to last third", self.trend(|memory| memory.resident_bytes)),
            ("of it anonymous", self.trend(|memory| memory.anonymous_bytes)),
        ];
        for (name, trend) in rows {
            match trend {
                Some(trend) => writeln!(f, "{name:<28} {trend}")?,
                None => writeln!(f, "{name:<28} too few samples: {}", self.memory.len())?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Trend;

    #[test]
    fn a_slow_leak_is_found_and_noise_is_not() {
        let noisy = |base: u64, n: u64| base + (n * 7919) % 2000;
        let flat: Vec<u64> = (0..100).map(|n| noisy(100_000, n)).collect();
        assert!(Trend::of(&flat).unwrap().is_flat());
        let leak: Vec<u64> = (0..100).map(|n| noisy(100_000, n) + n * 150).collect();
        assert!(!Trend::of(&leak).unwrap().is_flat());
        // What grows at the beginning only is a cache.
        let warm: Vec<u64> = (0..100).map(|n| noisy(100_000, n) + n.min(15) * 5000).collect();
        assert!(Trend::of(&warm).unwrap().is_flat());
        assert_eq!(Trend::of(&flat[..10]), None);
    }
}
