// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the second pass knows of the first: which names led to which files, and how these looked.
//!
//! A file counts as unchanged only if its status has not changed since a moment before the first pass began.
//! All that was written before that moment was written out then, so whoever writes afterwards, be it through
//! a mapping that is old, changes the times; and a file system with times in whole seconds cannot hide a change.

use std::collections::HashMap;
use std::ffi::CStr;
use std::hash::{BuildHasher as _, RandomState};

use rustix::fs::Stat;
use rustix::time::{ClockId, clock_gettime};

/// How many names are remembered, 25 bytes each. More than that are copied again.
pub(super) const NAMES_MAX: usize = 16 << 20;
/// The coarsest times of a file system, in seconds.
const TIMES_GRANULARITY_S: i64 = 1;

/// A name of a directory, as a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key(u64);

/// What was found at a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Known {
    /// The file itself.
    file: u64,
    /// How it looked; none if it may have changed while the copy was made.
    state: Option<std::num::NonZeroU64>,
}

/// What the first pass has copied.
#[derive(Debug, Default)]
pub(super) struct Memory {
    names: HashMap<Key, Known, NoHash>,
    hasher: RandomState,
    /// Changes from here on may have been missed.
    since_s: i64,
}

impl Memory {
    /// Begins to remember: what changes from now on counts as changed.
    pub(super) fn begin() -> Self {
        let now = clock_gettime(ClockId::RealtimeCoarse).tv_sec;
        Self { since_s: now - TIMES_GRANULARITY_S, ..Self::default() }
    }

    /// A name in a directory with this number.
    pub(super) fn key(&self, parent: u64, name: &CStr) -> Key {
        Key(self.hasher.hash_one((parent, name)))
    }

    /// A file as it looks.
    pub(super) fn known(&self, stat: &Stat) -> Known {
        let file = self.hasher.hash_one((stat.st_ino, stat.st_mode & 0o170_000));
        if stat.st_ctime >= self.since_s {
            return Known { file, state: None };
        }
        let state = self.hasher.hash_one((
            (stat.st_ino, stat.st_mode, stat.st_uid, stat.st_gid, stat.st_rdev, stat.st_nlink),
            (stat.st_size, stat.st_mtime, stat.st_mtime_nsec, stat.st_ctime, stat.st_ctime_nsec),
        ));
        Known { file, state: std::num::NonZeroU64::new(state) }
    }

    /// Remembers what a worker has copied.
    pub(super) fn add(&mut self, found: Vec<(Key, Known)>) {
        let room = NAMES_MAX.saturating_sub(self.names.len());
        self.names.extend(found.into_iter().take(room));
    }

    /// Whether the same file is at this name, changed or not.
    pub(super) fn is_same_file(&self, key: Key, now: Known) -> bool {
        self.names.get(&key).is_some_and(|then| then.file == now.file)
    }

    /// Whether nothing has changed at this name.
    pub(super) fn is_unchanged(&self, key: Key, now: Known) -> bool {
        now.state.is_some() && self.names.get(&key) == Some(&now)
    }
}

/// Keys are as good as random already.
#[derive(Debug, Clone, Copy, Default)]
struct NoHash;

impl std::hash::BuildHasher for NoHash {
    type Hasher = Taken;

    fn build_hasher(&self) -> Taken {
        Taken(0)
    }
}

/// Takes a number as it is.
#[derive(Debug)]
struct Taken(u64);

impl std::hash::Hasher for Taken {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = number;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat_of(path: &std::path::Path) -> Stat {
        rustix::fs::stat(path).unwrap()
    }

    #[test]
    fn what_changed_lately_counts_as_changed_and_what_is_old_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "a").unwrap();
        let stat = stat_of(&path);
        let mut memory = Memory::begin();
        let key = memory.key(1, c"file");
        memory.add(vec![(key, memory.known(&stat))]);
        assert!(memory.is_same_file(key, memory.known(&stat)));
        assert!(!memory.is_unchanged(key, memory.known(&stat)), "changed a moment ago");
        memory.since_s = stat.st_ctime + 1;
        memory.add(vec![(key, memory.known(&stat))]);
        assert!(memory.is_unchanged(key, memory.known(&stat)));
        assert!(!memory.is_unchanged(memory.key(2, c"file"), memory.known(&stat)), "elsewhere");
        let mut other = stat;
        other.st_ctime_nsec ^= 1;
        assert!(!memory.is_unchanged(key, memory.known(&other)));
        assert!(memory.is_same_file(key, memory.known(&other)));
        other.st_ino += 1;
        assert!(!memory.is_same_file(key, memory.known(&other)));
    }
}
