// SPDX-License-Identifier: GPL-2.0-or-later
//! Old data in RAM: extents in the order of their age, the room they take, and who waits for room.
//!
//! Whoever finds no room waits in one line, so that small and large requests are served alike: the
//! first of the line gets room as soon as there is enough for it, and nobody overtakes it.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::group::Membership;
use crate::range::PIECE_BYTES;
use crate::write::Job;
use crate::{Errno, OutOfMemory};

/// What an extent costs beside its data: its entry here, its counters, its place in the table.
const EXTENT_OVERHEAD: u64 = 128;
/// RAM of requests whose old data goes to the image before they go on.
const THROUGH_BYTES: u64 = if cfg!(loom) { 1 << 20 } else { 8 << 20 };
const NONE: u32 = u32::MAX;

/// Old data of one capture.
struct Extent<B> {
    first: u64,
    block: Arc<B>,
    cost: u64,
    live: u32,
    flushing: bool,
    older: u32,
    newer: u32,
}

/// Room for old data; given back exactly once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub(crate) enum Room {
    /// In the buffer, until the data is in the log.
    Buffer(u64),
    /// For as long as the request itself takes.
    Through(u64),
}

impl Room {
    /// The data it is for, in bytes.
    pub(crate) const fn bytes(self) -> u64 {
        match self {
            Self::Buffer(cost) => cost.saturating_sub(EXTENT_OVERHEAD),
            Self::Through(bytes) => bytes,
        }
    }
}

/// An extent taken for the log.
pub(crate) struct Taken<B> {
    pub(crate) id: u32,
    pub(crate) first: u64,
    pub(crate) block: Arc<B>,
}

pub(crate) struct Ram<T, B> {
    extents: Vec<Option<Extent<B>>>,
    free: Vec<u32>,
    oldest: u32,
    newest: u32,
    used: u64,
    limit: u64,
    through_used: u64,
    /// Every request writes through.
    always_through: bool,
    /// What is to be written through, and what came of it.
    jobs: VecDeque<(u64, Job<B>)>,
    results: Vec<(u64, Result<(), Errno>)>,
    waiters: VecDeque<(u64, T)>,
    next_ticket: u64,
    next_job: u64,
    granted: Vec<(u64, Room)>,
    group: Option<Membership>,
    ended: bool,
    /// Coroutines that write old data to the log.
    pub(crate) flushers: u32,
}

/// What a request of `bytes` costs.
const fn cost_of(bytes: u64) -> u64 {
    bytes + EXTENT_OVERHEAD
}

impl<T, B> Ram<T, B> {
    /// At least one piece fits; a limit of 0 lets every request write through.
    pub(crate) fn new(limit_bytes: u64, group: Option<Membership>) -> Self {
        Self {
            extents: Vec::new(),
            free: Vec::new(),
            oldest: NONE,
            newest: NONE,
            used: 0,
            limit: limit_bytes.max(cost_of(PIECE_BYTES)),
            through_used: 0,
            always_through: limit_bytes == 0,
            jobs: VecDeque::new(),
            results: Vec::new(),
            waiters: VecDeque::new(),
            next_ticket: 0,
            next_job: 0,
            granted: Vec::new(),
            group,
            ended: false,
            flushers: 0,
        }
    }

    pub(crate) fn used(&self) -> u64 {
        self.used
    }

    pub(crate) fn bytes_of_tables(&self) -> u64 {
        (self.extents.capacity() * size_of::<Option<Extent<B>>>() + self.free.capacity() * 4) as u64
    }

    // ---- room --------------------------------------------------------------------------------

    /// Room for `bytes`, unless others wait for it already. Where large data finds none in the
    /// buffer it may be written through at once.
    pub(crate) fn try_reserve(&mut self, bytes: u64, large_bytes: u64) -> Option<Room> {
        if self.waiters.is_empty()
            && let Some(room) = self.find_room(bytes)
        {
            return Some(room);
        }
        if bytes >= large_bytes { self.find_through(bytes) } else { None }
    }

    fn find_room(&mut self, bytes: u64) -> Option<Room> {
        if self.always_through {
            return self.find_through(bytes);
        }
        let cost = cost_of(bytes);
        if self.used + cost > self.limit {
            return None;
        }
        match &self.group {
            Some(group) if !group.try_reserve(cost) => {
                // All room is with other disks. Nothing here will become free, so write through.
                if self.oldest == NONE { self.find_through(bytes) } else { None }
            }
            _ => {
                self.used += cost;
                Some(Room::Buffer(cost))
            }
        }
    }

    fn find_through(&mut self, bytes: u64) -> Option<Room> {
        (self.through_used + bytes <= THROUGH_BYTES).then(|| {
            self.through_used += bytes;
            Room::Through(bytes)
        })
    }

    /// Gets in line for room; the ticket is for [`Ram::claim`] after the wake-up. None after the
    /// end of the snapshot.
    pub(crate) fn wait(&mut self, bytes: u64, task: T) -> Option<u64> {
        if self.ended {
            return None;
        }
        self.waiters.push_back((bytes, task));
        self.next_ticket += 1;
        Some(self.next_ticket - 1)
    }

    /// The room that a waiter was woken with; none when it was woken by the end of the snapshot.
    pub(crate) fn claim(&mut self, ticket: u64) -> Option<Room> {
        let index = self.granted.iter().position(|(granted, _)| *granted == ticket)?;
        Some(self.granted.swap_remove(index).1)
    }

    pub(crate) fn has_waiters(&self) -> bool {
        !self.waiters.is_empty()
    }

    /// Gives room to those first in line as far as it reaches; they are to be woken.
    #[must_use]
    pub(crate) fn grant(&mut self) -> Vec<T> {
        let mut woken = Vec::new();
        while let Some(&(bytes, _)) = self.waiters.front() {
            let Some(room) = self.find_room(bytes) else { break };
            let ticket = self.next_ticket - self.waiters.len() as u64;
            let Some((_, task)) = self.waiters.pop_front() else { break };
            self.granted.push((ticket, room));
            woken.push(task);
        }
        woken
    }

    /// Gives room back.
    pub(crate) fn free(&mut self, room: Room) {
        match room {
            Room::Through(bytes) => self.through_used = self.through_used.saturating_sub(bytes),
            Room::Buffer(_) if self.ended => {}
            Room::Buffer(cost) => {
                self.used = self.used.saturating_sub(cost);
                if let Some(group) = &self.group {
                    group.release(cost);
                }
            }
        }
    }

    // ---- written through ---------------------------------------------------------------------

    /// Hands old data over to be written to the log; the ticket is for [`Ram::through_result`].
    pub(crate) fn add_job(&mut self, job: Job<B>) -> u64 {
        let ticket = self.next_job;
        self.next_job += 1;
        if !self.ended {
            self.jobs.push_back((ticket, job));
        }
        ticket
    }

    /// The next data to be written through.
    pub(crate) fn take_job(&mut self) -> Option<(u64, Job<B>)> {
        self.jobs.pop_front()
    }

    pub(crate) fn finish_job(&mut self, ticket: u64, result: Result<(), Errno>) {
        if !self.ended {
            self.results.push((ticket, result));
        }
    }

    /// What came of a job; none as long as it is not over, and after the end.
    pub(crate) fn through_result(&mut self, ticket: u64) -> Option<Result<(), Errno>> {
        let index = self.results.iter().position(|(other, _)| *other == ticket)?;
        Some(self.results.swap_remove(index).1)
    }

    // ---- extents -----------------------------------------------------------------------------

    /// Makes sure that [`Ram::insert`] needs no memory.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn prepare_insert(&mut self) -> Result<(), OutOfMemory> {
        if self.free.is_empty() {
            self.extents.try_reserve(1).map_err(|_| OutOfMemory)?;
            self.free.try_reserve(self.extents.capacity()).map_err(|_| OutOfMemory)?;
        }
        Ok(())
    }

    /// Keeps a block of which `live` granules are needed, as the newest; its id. After the end of
    /// the snapshot nothing is kept.
    pub(crate) fn insert(&mut self, first: u64, block: B, live: u32, cost: u64) -> u32 {
        let id = self.free.pop().unwrap_or_else(|| {
            self.extents.push(None);
            (self.extents.len() - 1) as u32
        });
        if self.ended {
            self.free.push(id);
            return id;
        }
        let older = self.newest;
        self.extents[id as usize] = Some(Extent {
            first,
            block: Arc::new(block),
            cost,
            live,
            flushing: false,
            older,
            newer: NONE,
        });
        match self.extents.get_mut(older as usize) {
            Some(Some(other)) => other.newer = id,
            _ => self.oldest = id,
        }
        self.newest = id;
        id
    }

    /// The block of an extent, and its first granule.
    pub(crate) fn block(&self, id: u32) -> Option<(Arc<B>, u64)> {
        let extent = self.extents.get(id as usize)?.as_ref()?;
        Some((Arc::clone(&extent.block), extent.first))
    }

    fn unlink(&mut self, id: u32) {
        let Some(Some(extent)) = self.extents.get(id as usize) else { return };
        let (older, newer) = (extent.older, extent.newer);
        match self.extents.get_mut(older as usize) {
            Some(Some(other)) => other.newer = newer,
            _ => self.oldest = newer,
        }
        match self.extents.get_mut(newer as usize) {
            Some(Some(other)) => other.older = older,
            _ => self.newest = older,
        }
    }

    /// Forgets an extent that is in the line; its block.
    fn drop_extent(&mut self, id: u32) -> Option<Arc<B>> {
        let extent = self.extents.get_mut(id as usize)?.take()?;
        self.free.push(id);
        self.free(Room::Buffer(extent.cost));
        Some(extent.block)
    }

    /// One granule of an extent is not needed any more. The block, once none is and it is not
    /// being written.
    pub(crate) fn release(&mut self, id: u32) -> Option<Arc<B>> {
        let extent = self.extents.get_mut(id as usize)?.as_mut()?;
        extent.live = extent.live.saturating_sub(1);
        if extent.live > 0 || extent.flushing {
            return None;
        }
        self.unlink(id);
        self.drop_extent(id)
    }

    /// Whether something waits to be written to the log.
    pub(crate) fn has_unflushed(&self) -> bool {
        self.oldest != NONE
    }

    /// How many flushers there should be: the fuller the buffer, the more.
    pub(crate) fn flushers_wanted(&self, quiesced: bool, most: u32) -> u32 {
        // Guest requests that wait must be served even in a drained section: it waits for them.
        if !self.jobs.is_empty() || (self.has_waiters() && self.has_unflushed()) {
            return most;
        }
        if !self.has_unflushed() {
            return 0;
        }
        if quiesced {
            return 0;
        }
        let low = self.limit / 2;
        if self.used > low {
            let fill = (self.used - low) * u64::from(most) / (self.limit - low);
            return (fill as u32 + 1).min(most);
        }
        u32::from(self.group.as_ref().is_some_and(Membership::is_urged)) * 2
    }

    /// Takes the oldest extents, about `max_bytes` of them, for the log.
    pub(crate) fn take_oldest(&mut self, max_bytes: u64) -> Vec<Taken<B>> {
        let mut taken = Vec::new();
        let mut bytes = 0;
        while bytes < max_bytes && self.oldest != NONE {
            let id = self.oldest;
            self.unlink(id);
            let Some(Some(extent)) = self.extents.get_mut(id as usize) else { break };
            extent.flushing = true;
            bytes += extent.cost - EXTENT_OVERHEAD;
            taken.push(Taken { id, first: extent.first, block: Arc::clone(&extent.block) });
        }
        taken
    }

    /// Extents that were taken are in the log, or not needed any more.
    pub(crate) fn finish(&mut self, ids: impl IntoIterator<Item = u32>) {
        for id in ids {
            // The batch still has the block.
            drop(self.drop_extent(id));
        }
    }

    /// Ends everything: all room is free, and those who wait are to be woken.
    pub(crate) fn end(&mut self) -> (Vec<T>, impl Sized + use<T, B>) {
        self.ended = true;
        self.results = Vec::new();
        let jobs = std::mem::take(&mut self.jobs);
        let used = std::mem::take(&mut self.used);
        if let Some(group) = self.group.take() {
            group.release(used);
        }
        self.free = Vec::new();
        (self.oldest, self.newest) = (NONE, NONE);
        let extents = std::mem::take(&mut self.extents);
        (self.waiters.drain(..).map(|(_, task)| task).collect(), (extents, jobs))
    }
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use super::{Ram, Room};

    fn buffer(room: Option<Room>) -> u64 {
        match room {
            Some(Room::Buffer(cost)) => cost,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn nobody_overtakes_a_large_request() {
        let mut ram: Ram<&str, Vec<u8>> = Ram::new(2 << 20, None);
        let first = buffer(ram.try_reserve(1 << 20, u64::MAX));
        let rest = buffer(ram.try_reserve(900 << 10, u64::MAX));
        assert_eq!(ram.try_reserve(1 << 20, u64::MAX), None);
        let large = ram.wait(1 << 20, "large").unwrap();
        assert_eq!(ram.try_reserve(4096, u64::MAX), None, "there is room, but a line too");
        let small = ram.wait(4096, "small").unwrap();
        ram.free(Room::Buffer(rest));
        assert!(ram.grant().is_empty());
        ram.free(Room::Buffer(first));
        assert_eq!(ram.grant(), ["large", "small"]);
        assert!(ram.claim(large).is_some() && ram.claim(small).is_some());
        assert_eq!(ram.claim(small), None);
    }

    #[test]
    fn released_extents_leave_no_trace() {
        let mut ram: Ram<(), Vec<u8>> = Ram::new(2 << 20, None);
        let pinned = ram.insert(0, vec![1], 1, 200);
        for _ in 0..1000 {
            let cost = buffer(ram.try_reserve(4096, u64::MAX));
            ram.prepare_insert().unwrap();
            let id = ram.insert(7, vec![2], 2, cost);
            assert!(ram.release(id).is_none());
            assert!(ram.release(id).is_some());
        }
        assert_eq!(ram.used(), 0);
        assert!(ram.extents.len() <= 2);
        let taken = ram.take_oldest(1 << 20);
        assert_eq!(taken.iter().map(|taken| taken.id).collect::<Vec<_>>(), [pinned]);
        assert!(ram.release(pinned).is_none(), "it is being written");
        ram.finish([pinned]);
        assert!(!ram.has_unflushed());
    }

    #[test]
    fn large_data_is_written_through_when_the_buffer_is_full() {
        let mut ram: Ram<(), Vec<u8>> = Ram::new(1 << 20, None);
        let _ = buffer(ram.try_reserve(1 << 20, 256 << 10));
        assert_eq!(ram.try_reserve(4096, 256 << 10), None);
        let through = ram.try_reserve(1 << 20, 256 << 10);
        assert_eq!(through, Some(Room::Through(1 << 20)));
        for _ in 0..7 {
            assert!(ram.try_reserve(1 << 20, 256 << 10).is_some());
        }
        assert_eq!(ram.try_reserve(1 << 20, 256 << 10), None, "that has a bound too");
    }

    #[test]
    fn the_end_wakes_all_and_frees_all() {
        let mut ram: Ram<u32, Vec<u8>> = Ram::new(1 << 20, None);
        let cost = buffer(ram.try_reserve(1 << 20, u64::MAX));
        let ticket = ram.wait(4096, 5).unwrap();
        let (woken, data) = ram.end();
        drop(data);
        assert_eq!(woken, [5]);
        assert_eq!(ram.claim(ticket), None);
        ram.free(Room::Buffer(cost));
        assert_eq!(ram.used(), 0);
        assert_eq!(ram.wait(1, 6), None);
    }
}
