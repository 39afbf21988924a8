// SPDX-License-Identifier: GPL-2.0-or-later
//! Which of the engine's own requests are in flight, and since when: for the time-out and for the
//! teardown.

use crate::sync::Mutex;

/// What a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    ReadSource,
    ReadLog,
    WriteLog,
    ShareLog,
    DiscardLog,
    DiscardSource,
}

impl What {
    const fn sentence(self) -> &'static str {
        match self {
            Self::ReadSource => "read of old data from the disk",
            Self::ReadLog => "read from the fleecing image",
            Self::WriteLog => "write to the fleecing image",
            Self::ShareLog => "sharing of blocks with the fleecing image",
            Self::DiscardLog => "discard in the fleecing image",
            Self::DiscardSource => "discard on the disk",
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Operation {
    started_ns: u64,
    what: What,
    at: u64,
}

#[derive(Default)]
struct Slots {
    /// As many as were ever in flight at once.
    operations: Vec<Option<Operation>>,
    free: Vec<u32>,
}

pub(crate) struct Watch(Mutex<Slots>);

/// A request in flight; ends when dropped, however that comes.
pub(crate) struct InFlight<'a> {
    watch: &'a Watch,
    slot: u32,
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        let mut slots = self.watch.0.lock();
        slots.operations[self.slot as usize] = None;
        slots.free.push(self.slot);
    }
}

impl Watch {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Slots::default()))
    }

    /// Notes a request on the bytes at `at`.
    pub(crate) fn begin(&self, what: What, at: u64, now_ns: u64) -> InFlight<'_> {
        let mut slots = self.0.lock();
        let operation = Some(Operation { started_ns: now_ns, what, at });
        let slot = match slots.free.pop() {
            Some(slot) => {
                slots.operations[slot as usize] = operation;
                slot
            }
            None => {
                slots.operations.push(operation);
                (slots.operations.len() - 1) as u32
            }
        };
        drop(slots);
        InFlight { watch: self, slot }
    }

    /// Requests that the teardown waits for: all but reads of old data, which end with the guest's
    /// own request.
    pub(crate) fn count_own(&self) -> u64 {
        let slots = self.0.lock();
        let own = |operation: &&Operation| operation.what != What::ReadSource;
        slots.operations.iter().flatten().filter(own).count() as u64
    }

    /// How long the oldest of those has been in flight.
    pub(crate) fn oldest_own_ns(&self, now_ns: u64) -> Option<u64> {
        let slots = self.0.lock();
        let own = |operation: &&Operation| operation.what != What::ReadSource;
        let started_ns = slots.operations.iter().flatten().filter(own).map(|o| o.started_ns).min();
        Some(now_ns.saturating_sub(started_ns?))
    }

    /// A sentence about a request that has been in flight for more than `limit_ns`.
    pub(crate) fn late(&self, now_ns: u64, limit_ns: u64) -> Option<String> {
        let slots = self.0.lock();
        let late = slots
            .operations
            .iter()
            .flatten()
            .find(|operation| now_ns.saturating_sub(operation.started_ns) > limit_ns)?;
        Some(format!(
            "{} at offset {} made no progress for {} s",
            late.what.sentence(),
            late.at,
            limit_ns / 1_000_000_000
        ))
    }
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use super::{Watch, What};

    #[test]
    fn late_requests_are_named_and_ended_ones_forgotten() {
        let watch = Watch::new();
        let read = watch.begin(What::ReadSource, 4096, 0);
        let write = watch.begin(What::WriteLog, 8192, 5_000_000_000);
        assert_eq!(watch.count_own(), 1);
        assert_eq!(watch.oldest_own_ns(7_000_000_000), Some(2_000_000_000));
        let late = watch.late(3_000_000_000, 2_000_000_000).unwrap();
        assert_eq!(late, "read of old data from the disk at offset 4096 made no progress for 2 s");
        drop(read);
        assert_eq!(watch.late(6_000_000_000, 2_000_000_000), None);
        drop(write);
        assert_eq!((watch.count_own(), watch.oldest_own_ns(u64::MAX)), (0, None));
    }
}
