// SPDX-License-Identifier: MIT OR Apache-2.0
//! How much all guests of a host may read together, and who is next.
//!
//! ```text
//!  host    one rate: the ledger knows when the next byte may pass
//!   └ guest    one turn each: guests share the rate equally, whatever they have of disks
//!      └ disk      one turn each: disks share their guest's part equally
//! ```
//!
//! Nobody is assigned a part: who wants to read takes a turn, and turns are given in the order in
//! which they were asked for. So what one disk does not use, or has no use for any more, goes to the
//! others at once, and a new one gets its share with its first turn. With a rate for the host, too
//! ([`HostRate`]), each turn waits for both; a guest has one turn at a time in it, so guests of
//! different processes get the same of it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::host_budget::HostRate;

/// The smallest rate for each of the guests that are worked on at the same time. A provider may have
/// 64 MiB of one guest in flight and gives up a request that takes five minutes.
pub const MIN_BYTES_PER_S: u64 = 512 << 10;

/// How much of an unused rate may be used later: sleeping is not exact, and what was slept too long
/// must not be lost.
const BURST: Duration = Duration::from_millis(100);

/// When bytes may pass, by a clock that starts at zero. Pure.
#[derive(Debug)]
pub(crate) struct Ledger {
    rate_bytes_per_s: u64,
    /// Until when the rate is promised away.
    booked: Duration,
}

impl Ledger {
    pub(crate) fn new(rate_bytes_per_s: u64, booked: Duration) -> Self {
        Self { rate_bytes_per_s, booked }
    }

    /// Books bytes, and says when they may pass.
    pub(crate) fn book(&mut self, now: Duration, bytes: u64) -> Duration {
        let start = self.booked.max(now.saturating_sub(BURST));
        let ns = u128::from(bytes) * 1_000_000_000 / u128::from(self.rate_bytes_per_s.max(1));
        let takes = Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX));
        self.booked = start.saturating_add(takes);
        self.booked
    }
}

/// A rate for one thread, which may block.
#[derive(Debug)]
pub struct Pace {
    ledger: Ledger,
    start: std::time::Instant,
}

impl Pace {
    /// A pace of this rate in bytes per second.
    #[must_use]
    pub fn new(rate_bytes_per_s: u64) -> Self {
        let ledger = Ledger::new(rate_bytes_per_s, Duration::ZERO);
        Self { ledger, start: std::time::Instant::now() }
    }

    /// Sleeps until so many bytes more may have passed.
    pub fn wait_for(&mut self, bytes: u64) {
        let now = self.start.elapsed();
        let until = self.ledger.book(now, bytes);
        std::thread::sleep(until.saturating_sub(now));
    }
}

/// The budget of a job. Clones are the same budget.
#[derive(Debug, Clone)]
pub struct Budget {
    ledger: Arc<Mutex<Ledger>>,
    start: Instant,
    host: Option<Arc<HostRate>>,
}

impl Budget {
    /// A budget of this rate in bytes per second.
    #[must_use]
    pub fn new(rate_bytes_per_s: u64) -> Self {
        let ledger = Ledger::new(rate_bytes_per_s, Duration::ZERO);
        Self { ledger: Arc::new(Mutex::new(ledger)), start: Instant::now(), host: None }
    }

    /// The same, within what all tasks of the host may read together.
    #[must_use]
    pub fn within(self, host: HostRate) -> Self {
        Self { host: Some(Arc::new(host)), ..self }
    }

    /// The rate in bytes per second.
    #[must_use]
    pub fn rate_bytes_per_s(&self) -> u64 {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner).rate_bytes_per_s
    }

    /// Changes the rate from the next turn on.
    pub fn set_rate(&self, rate_bytes_per_s: u64) {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner).rate_bytes_per_s =
            rate_bytes_per_s;
    }

    /// The part of one guest.
    #[must_use]
    pub fn guest(&self) -> GuestShare {
        GuestShare { budget: self.clone(), turn: Arc::default() }
    }

    async fn book(&self, bytes: u64) -> Instant {
        let own = {
            let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
            self.start + ledger.book(self.start.elapsed(), bytes)
        };
        let Some(host) = &self.host else { return own };
        match host.book(bytes).await {
            Ok(wait) => own.max(Instant::now() + wait),
            Err(error) => {
                // A backup must not fail for it; the job's own limit holds.
                tracing::warn!(error, "the host's bandwidth limit is not kept");
                own
            }
        }
    }
}

/// The part of one guest in a host's budget.
#[derive(Debug, Clone)]
pub struct GuestShare {
    budget: Budget,
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl GuestShare {
    /// The part of one of the guest's disks.
    #[must_use]
    pub fn disk(&self) -> DiskShare {
        DiskShare { guest: self.clone(), turn: Arc::default() }
    }
}

/// The part of one disk in its guest's part.
#[derive(Debug, Clone)]
pub struct DiskShare {
    guest: GuestShare,
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl DiskShare {
    /// Waits until this many bytes may pass. They are used up even if the caller gives up meanwhile.
    pub async fn pass(&self, bytes: u64) {
        // Both queues are in the order of asking.
        let _of_the_disk = self.turn.lock().await;
        let _of_the_guest = self.guest.turn.lock().await;
        tokio::time::sleep_until(self.guest.budget.book(bytes).await).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    const CHUNK_BYTES: u64 = 64 << 10;

    #[test]
    fn bytes_pass_at_the_rate_and_a_pause_is_not_saved_up() {
        let mut ledger = Ledger::new(1000, Duration::ZERO);
        let second = Duration::from_secs(1);
        assert_eq!(ledger.book(Duration::ZERO, 1000), second);
        assert_eq!(ledger.book(Duration::ZERO, 500), second * 3 / 2);
        // After a long pause only the burst is left of it.
        assert_eq!(ledger.book(second * 10, 1000), second * 11 - BURST);
        // Nothing overflows.
        ledger.rate_bytes_per_s = 0;
        ledger.book(second, u64::MAX);
        assert!(ledger.book(second, u64::MAX) > second);
    }

    #[test]
    fn a_pace_is_kept_by_sleeping() {
        let start = std::time::Instant::now();
        let mut pace = Pace::new(1 << 20);
        (0..4).for_each(|_| pace.wait_for(64 << 10));
        // A quarter of a second, of which the burst may have been saved up.
        assert!(start.elapsed() >= Duration::from_millis(250) - BURST, "{:?}", start.elapsed());
    }

    /// A disk that reads as fast as it may, until it is dropped.
    struct Reader(Arc<AtomicU64>, tokio::task::JoinHandle<()>);

    impl Reader {
        fn start(share: DiskShare, connections: usize) -> Self {
            let count = Arc::new(AtomicU64::new(0));
            let counter = Arc::clone(&count);
            let task = tokio::spawn(async move {
                let read = || async {
                    loop {
                        share.pass(CHUNK_BYTES).await;
                        counter.fetch_add(CHUNK_BYTES, Ordering::Relaxed);
                    }
                };
                futures_util::future::join_all((0..connections).map(|_| read())).await;
            });
            Self(count, task)
        }

        fn take(&self) -> u64 {
            self.0.swap(0, Ordering::Relaxed)
        }
    }

    impl Drop for Reader {
        fn drop(&mut self) {
            self.1.abort();
        }
    }

    fn assert_near(bytes: u64, expected: u64) {
        let difference = bytes.abs_diff(expected);
        assert!(difference * 20 <= expected, "{bytes} is not near {expected}");
    }

    /// Guests with one disk and with three, disks with one connection and with four: the rate is
    /// kept, guests get the same, disks of a guest get the same, and what is left over is used.
    #[tokio::test(start_paused = true)]
    async fn the_budget_is_split_anew_whenever_a_disk_begins_or_ends() {
        const RATE: u64 = 64 << 20;
        let budget = Budget::new(RATE);
        let (one, two) = (budget.guest(), budget.guest());
        let a = Reader::start(one.disk(), 4);
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_near(a.take(), 10 * RATE);

        let others: Vec<_> = [1, 1, 4].into_iter().map(|n| Reader::start(two.disk(), n)).collect();
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_near(a.take(), 5 * RATE);
        let parts: Vec<u64> = others.iter().map(Reader::take).collect();
        parts.iter().for_each(|&part| assert_near(part, 5 * RATE / 3));

        drop(a);
        budget.set_rate(RATE / 2);
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_near(others.iter().map(Reader::take).sum(), 5 * RATE);
    }
}
