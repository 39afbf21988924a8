// SPDX-License-Identifier: GPL-2.0-or-later
//! What the reader gives up: it is never read again and need not be saved. A guest's discards that
//! were postponed for the reader's sake are done then.

use std::ops::Range;

use crate::engine::{Engine, Partial, wake};
use crate::mask::{bits, words};
use crate::places::Location;
use crate::range::{ByteRange, PIECE_BYTES};
use crate::sync::Ordering;
use crate::table::Locked;
use crate::watch::{InFlight, What};
use crate::{Io, OutOfMemory};

/// Granules with released parts that are remembered. What is forgotten costs space, never data.
const MAX_PARTIAL: usize = 4096;

/// Discards being done; guest requests to these granules wait until this is dropped.
struct Discarding<'a, I: Io<Task = T, Block = B>, T: 'static, B>
where
    T: Send,
    B: AsRef<[u8]> + AsMut<[u8]> + Send + Sync,
{
    engine: &'a Engine<T, B>,
    io: &'a I,
    region: usize,
    local: Range<u32>,
}

impl<I: Io<Task = T, Block = B>, T, B> Discarding<'_, I, T, B>
where
    T: Send,
    B: AsRef<[u8]> + AsMut<[u8]> + Send + Sync,
{
    /// Does it.
    fn run(self) {
        let bytes = self.engine.bytes_of(self.region, self.local.clone());
        self.engine.watched(self.io, What::DiscardSource, bytes.start, || {
            self.io.discard_source(bytes.start, bytes.len());
        });
    }
}

impl<I: Io<Task = T, Block = B>, T, B> Drop for Discarding<'_, I, T, B>
where
    T: Send,
    B: AsRef<[u8]> + AsMut<[u8]> + Send + Sync,
{
    fn drop(&mut self) {
        let Some(region) = self.engine.table.region(self.region) else { return };
        let woken = {
            let mut state = region.lock();
            state.discarding.remove(&self.local);
            for (word, bits) in words(self.local.clone()) {
                state.finish_gone(word, bits);
            }
            self.engine.count_released(self.local.len() as u64);
            std::mem::take(&mut state.waiters)
        };
        wake(self.io, woken);
    }
}

/// After the end of the snapshot postponed discards are done for so long at most, so that they do
/// not hold up the teardown.
const MAX_POSTPONED_NS: u64 = 5_000_000_000;

/// Postponed discards that are about to be done.
pub struct Announced<'a> {
    _in_flight: InFlight<'a>,
}

impl std::fmt::Debug for Announced<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Announced").finish_non_exhaustive()
    }
}

impl<T: Send, B: AsRef<[u8]> + AsMut<[u8]> + Send + Sync> Engine<T, B> {
    /// Releases `range`. Granules of which only a part is released are released when the rest is.
    pub fn release(&self, io: &impl Io<Task = T, Block = B>, range: ByteRange) {
        let range = range.intersect(ByteRange { start: 0, end: self.geometry.size() });
        let whole = self.geometry.within(range);
        self.release_granules(io, whole.clone());
        let cover = self.geometry.cover(range);
        for edge in [cover.start, cover.end.saturating_sub(1)] {
            if cover.contains(&edge) && !whole.contains(&edge) && self.complete(edge, range) {
                self.release_granules(io, edge..edge + 1);
            }
        }
    }

    /// Notes the part of a granule that `range` releases; whether all of it is released now.
    fn complete(&self, granule: u64, range: ByteRange) -> bool {
        let bytes = self.geometry.bytes(granule..granule + 1);
        let part = bytes.intersect(range);
        let unit = self.geometry.granule() / 64;
        let first = (part.start - bytes.start).div_ceil(unit);
        let end = if part.end == bytes.end { 64 } else { (part.end - bytes.start) / unit };
        let bits = (first..end).fold(0_u64, |bits, bit| bits | 1 << bit);
        let mut partial = self.partial.lock();
        let entry = partial.entry(granule).or_default();
        *entry |= bits;
        if *entry == u64::MAX {
            partial.remove(&granule);
            return true;
        }
        trim(&mut partial, granule);
        false
    }

    fn release_granules(&self, io: &impl Io<Task = T, Block = B>, granules: Range<u64>) {
        // In pieces: each holds the locks only for a short time.
        let step = (PIECE_BYTES >> self.geometry.granule().trailing_zeros()).max(1);
        let mut at = granules.start;
        while at < granules.end {
            let end = ((at / step + 1) * step).min(granules.end);
            for (index, local) in self.geometry.by_region(at..end) {
                self.release_local(io, index, local);
            }
            at = end;
        }
    }

    fn release_local(&self, io: &impl Io<Task = T, Block = B>, index: usize, local: Range<u32>) {
        if !self.is_capturing() {
            return;
        }
        // Without room for its state the area just stays needed.
        let Some(region) = self.table.touch_spare(index) else { return };
        let mut woken = Vec::new();
        let (discards, segments) = {
            let mut state = region.lock();
            let before = state.variable_bytes();
            let discards = self.begin_discards(&mut state, &local);
            let segments = self.release_locked(&mut state, local, &mut woken);
            let _shrinks: Result<(), OutOfMemory> = self.table.book(before, state.variable_bytes());
            (discards, segments)
        };
        let discards = self.guarded(io, index, discards);
        wake(io, woken);
        discards.into_iter().for_each(Discarding::run);
        self.discard_segments(io, segments);
    }

    /// Takes the postponed discards among these granules, and makes guest requests to them wait. To be
    /// [guarded](Self::guarded) once the lock is free.
    fn begin_discards(&self, state: &mut Locked<'_, T>, local: &Range<u32>) -> Vec<Range<u32>> {
        if !state.postponed.overlaps(local) {
            return Vec::new();
        }
        let before = state.postponed.count();
        let mut discards = state.postponed.take(local);
        self.count_postponed(before, state.postponed.count());
        let is_void = self.discards_are_void.load(Ordering::Acquire);
        discards.retain(|range| !is_void && state.discarding.add(range.clone()));
        for (word, bits) in discards.iter().cloned().flat_map(words) {
            state.begin_reading(word, bits);
        }
        discards
    }

    /// Discards that were begun. Guest requests wait for each until it is done or dropped: a panic in one of them
    /// must not leave the others closed for ever.
    fn guarded<'a, I: Io<Task = T, Block = B>>(
        &'a self,
        io: &'a I,
        region: usize,
        discards: Vec<Range<u32>>,
    ) -> Vec<Discarding<'a, I, T, B>> {
        let guard = |local| Discarding { engine: self, io, region, local };
        discards.into_iter().map(guard).collect()
    }

    /// Drops all postponed discards, also those that are yet to come: after an internal error a write may have passed
    /// without making earlier discards of its granules void.
    pub fn void_discards(&self) {
        self.discards_are_void.store(true, Ordering::Release);
    }

    fn count_released(&self, granules: u64) {
        let bytes = granules * self.geometry.granule();
        self.counters.released_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Everything of a release but the I/O; segments of the image to give back. Granules that are being discarded stay
    /// closed until that is over.
    fn release_locked(
        &self,
        state: &mut Locked<'_, T>,
        local: Range<u32>,
        woken: &mut Vec<T>,
    ) -> Vec<(u64, u64)> {
        let mut extents = Vec::new();
        let mut positions = Vec::new();
        let mut count = 0;
        for (word, mask) in words(local) {
            let (done, kept) = (state.done(word), state.kept(word));
            for bit in bits(mask & done & kept) {
                match state.places.remove(word as u32 * 64 + bit) {
                    Some(Location::Ram(id)) => extents.push(id),
                    Some(Location::Log(position)) => positions.push(position),
                    Some(Location::Lost) | None => {}
                }
            }
            let mut gone = mask & !(done & !kept);
            if !state.discarding.is_empty() {
                for bit in bits(gone & !done) {
                    if state.discarding.contains(word as u32 * 64 + bit) {
                        gone &= !(1 << bit);
                    }
                }
            }
            count += u64::from(gone.count_ones());
            state.finish_gone(word, gone);
        }
        self.count_released(count);
        if !extents.is_empty() {
            let mut ram = self.ram.lock();
            let blocks: Vec<_> = extents.into_iter().filter_map(|id| ram.release(id)).collect();
            if !blocks.is_empty() {
                woken.append(&mut ram.grant());
            }
            drop(ram);
        }
        let mut segments = Vec::new();
        if !positions.is_empty() {
            let mut log = self.log.lock();
            positions.iter().for_each(|&position| log.remove(position));
            for position in positions {
                if log.tail_position() != Some(position) {
                    log.give_back(position, 1, &mut segments);
                }
            }
        }
        segments
    }

    /// Counts the guest's postponed discards as a request in flight, if there are any. Whoever does
    /// them in a task that begins later holds this until then, so that a teardown waits for it.
    pub fn announce_postponed(&self, io: &impl Io<Task = T, Block = B>) -> Option<Announced<'_>> {
        let begin =
            || Announced { _in_flight: self.watch.begin(What::DiscardSource, 0, io.now_ns()) };
        self.has_postponed().then(begin)
    }

    /// Whether guest discards may still be postponed.
    pub fn has_postponed(&self) -> bool {
        self.gate() & crate::engine::DISCARDS != 0
    }

    /// After the end of the snapshot: does the guest's discards that were postponed, for a few
    /// seconds at most and until it is told to be quiet. What is left then is forgotten: a discard
    /// is a wish.
    pub fn do_postponed(&self, io: &impl Io<Task = T, Block = B>) {
        // One for the whole, so that a teardown waits for the end.
        let begun_ns = io.now_ns();
        let _in_flight = self.watch.begin(What::DiscardSource, 0, begun_ns);
        for (index, region) in self.table.touched() {
            loop {
                let discards = {
                    let mut state = region.lock();
                    let Some(first) = state.postponed.first() else { break };
                    let late = io.now_ns().saturating_sub(begun_ns) > MAX_POSTPONED_NS;
                    if late || self.is_quiesced() {
                        let forgotten = state.postponed.forget(&(0..u32::MAX));
                        self.count_postponed(forgotten, 0);
                        break;
                    }
                    self.begin_discards(&mut state, &first)
                };
                let discards = self.guarded(io, index, discards);
                discards.into_iter().for_each(Discarding::run);
            }
        }
        let is_over = self.table.touched().all(|(_, region)| {
            let state = region.lock();
            state.postponed.is_empty() && state.discarding.is_empty()
        });
        if is_over && !self.is_capturing() {
            self.forget_discards();
        }
    }
}

/// Keeps the notes about parts small; the one about `granule` stays.
fn trim(partial: &mut Partial, granule: u64) {
    if partial.len() <= MAX_PARTIAL {
        return;
    }
    let other = partial.keys().copied().find(|&other| other != granule);
    if let Some(other) = other {
        partial.remove(&other);
    }
}
