// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the soak has done, and where each of its actors is right now.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What is counted, in the order of the closing table.
pub(super) const COUNTED: [&str; 22] = [
    EPISODES,
    SETUPS,
    USED,
    REFUSED,
    TEARDOWNS,
    AGAIN,
    UNKNOWN,
    EXPIRED,
    BROKEN,
    DEGRADED,
    CLIENTS_KILLED,
    READERS_KILLED,
    STALLS,
    JOBS,
    DRAINS,
    QUERIES,
    COPIES,
    QUITS,
    KILLS,
    REQUESTS,
    COMPARED,
    RELEASED,
];
pub(super) const EPISODES: &str = "episodes";
pub(super) const SETUPS: &str = "setups";
pub(super) const USED: &str = "increments (bitmap used)";
pub(super) const REFUSED: &str = "setups refused as they must be";
pub(super) const TEARDOWNS: &str = "teardowns";
pub(super) const AGAIN: &str = "teardowns given again (in flight)";
pub(super) const UNKNOWN: &str = "teardowns of no access";
pub(super) const EXPIRED: &str = "leases that ended an access";
pub(super) const BROKEN: &str = "snapshots broken as expected";
pub(super) const DEGRADED: &str = "snapshots degraded as expected";
pub(super) const CLIENTS_KILLED: &str = "QMP clients killed in a command";
pub(super) const READERS_KILLED: &str = "readers killed in a request";
pub(super) const STALLS: &str = "stalls of fleecing images";
pub(super) const JOBS: &str = "block jobs";
pub(super) const DRAINS: &str = "drained sections of the monitor";
pub(super) const QUERIES: &str = "queries";
pub(super) const COPIES: &str = "copies of whole disks compared";
pub(super) const QUITS: &str = "processes quit during accesses";
pub(super) const KILLS: &str = "processes killed during accesses";
pub(super) const REQUESTS: &str = "guest requests";
pub(super) const COMPARED: &str = "bytes compared";
pub(super) const RELEASED: &str = "bytes released by readers";

/// Counts by name; clones share them.
#[derive(Debug, Clone, Default)]
pub(super) struct Tally(Arc<Mutex<BTreeMap<&'static str, u64>>>);

impl Tally {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(&self, what: &'static str, count: u64) {
        *self.lock().entry(what).or_default() += count;
    }

    pub(super) fn get(&self, what: &str) -> u64 {
        self.lock().get(what).copied().unwrap_or_default()
    }
}

/// Where each actor is, for the report of a failure or a hang; clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct Places(Arc<Mutex<BTreeMap<String, (String, Instant)>>>);

impl Places {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, (String, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The actor begins something else.
    pub(super) fn at(&self, who: &str, what: impl Into<String>) {
        self.lock().insert(who.to_owned(), (what.into(), Instant::now()));
    }

    /// A new episode.
    pub(super) fn clear(&self) {
        self.lock().clear();
    }

    /// One line for each actor.
    pub(super) fn show(&self) -> String {
        let mut text = String::new();
        for (who, (what, since)) in &*self.lock() {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "  {who}, for {:.1} s: {what}", since.elapsed().as_secs_f64());
        }
        text
    }
}
