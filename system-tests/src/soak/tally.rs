// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the soak has done, and where each of its actors is right now.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Names what is counted, in the order of the closing table.
macro_rules! counted {
    ($($name:ident = $text:literal,)*) => {
        $(pub(super) const $name: &str = $text;)*
        pub(super) const COUNTED: &[&str] = &[$($name),*];
    };
}

counted! {
    EPISODES = "episodes",
    SETUPS = "setups",
    USED = "increments (bitmap used)",
    HELD_UP = "setups given again (in flight)",
    REFUSED = "setups refused as they must be",
    ENDS = "accesses that ended",
    AGAIN = "teardowns given again (in flight)",
    UNKNOWN = "teardowns of no access",
    RENEWED = "leases renewed",
    EXPIRED = "leases that ended an access",
    REMOVED = "removals of bitmaps",
    BROKEN = "snapshots broken as expected",
    DEGRADED = "snapshots degraded as expected",
    CLIENTS_KILLED = "QMP clients killed in a command",
    READERS_KILLED = "readers killed in a request",
    STALLS = "stalls of fleecing images",
    JOBS = "block jobs",
    DRAINS = "drained sections of the monitor",
    QUERIES = "queries",
    COPIES = "copies of whole disks compared",
    QUITS = "processes quit during accesses",
    KILLS = "processes killed during accesses",
    REQUESTS = "guest requests",
    COMPARED = "bytes compared",
    RELEASED = "bytes released by readers",
}

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
