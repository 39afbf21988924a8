// SPDX-License-Identifier: GPL-2.0-or-later
//! From RAM to the log: background work in batches, and data that requests wait for.

use std::ops::Range;
use std::sync::Arc;

use crate::engine::{Engine, wake};
use crate::log::Full;
use crate::places::Location;
use crate::ram::Taken;
use crate::range::{ByteRange, REGION_GRANULES};
use crate::sync::Ordering;
use crate::watch::What;
use crate::write::Job;
use crate::{Errno, Io};

/// About this much is written to the log at once.
const BATCH_BYTES: u64 = 256 << 10;
/// So many flushers at most.
pub(crate) const MAX_FLUSHERS: u32 = 8;
/// A write to the log is tried so often.
const WRITE_TRIES: u32 = 3;

/// One granule of a batch.
#[derive(Debug)]
struct Item {
    granule: u64,
    extent: u32,
}

/// A piece of a block.
type Part<B> = (Arc<B>, Range<usize>);

/// One sequential write to the log, for [`Engine::flush`].
#[must_use]
pub struct Batch<B>(Work<B>);

enum Work<B> {
    /// The oldest data in RAM.
    Oldest(Oldest<B>),
    /// Data for which a guest request waits.
    Through(u64, Job<B>),
}

struct Oldest<B> {
    /// The extents it is made of.
    extents: Vec<u32>,
    /// Its granules, extent by extent: those of one extent can lie between those of another.
    items: Vec<Item>,
    /// The data of all but the odd tail, in that order.
    parts: Vec<Part<B>>,
    /// The data of the odd tail, which has a place of its own.
    tail: Option<Part<B>>,
    placed: Placed,
}

impl<B> std::fmt::Debug for Batch<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Batch").finish_non_exhaustive()
    }
}

/// Space of the log for granules; each is used or given back.
#[derive(Debug)]
#[must_use]
pub(crate) struct Placed {
    first: u64,
    count: u64,
    /// Granule and position, in the order in which they were given.
    places: Vec<(u64, u64)>,
    next: usize,
    unused: Vec<u64>,
}

impl Placed {
    /// Where its space begins in the image.
    pub(crate) const fn offset(&self, granule_bytes: u64) -> u64 {
        self.first * granule_bytes
    }

    /// The position of a granule. Asked for in the same order; what is passed over is not needed any
    /// more.
    pub(crate) fn take(&mut self, granule: u64) -> u64 {
        while let Some(&(place, position)) = self.places.get(self.next) {
            self.next += 1;
            if place == granule {
                return position;
            }
            self.unused.push(position);
        }
        unreachable!("only granules that were placed are asked for, in order")
    }
}

impl<T: Send, B: AsRef<[u8]> + AsMut<[u8]> + Send + Sync> Engine<T, B> {
    /// Starts a flusher if there is work for one more, and lets guest requests go on for which
    /// there is room now.
    pub fn kick(&self, io: &impl Io<Task = T, Block = B>) {
        let (woken, spawn) = {
            let mut ram = self.ram.lock();
            let woken = ram.grant();
            let spawn = ram.flushers < ram.flushers_wanted(self.is_quiesced(), MAX_FLUSHERS);
            ram.flushers += u32::from(spawn);
            (woken, spawn)
        };
        wake(io, woken);
        if spawn {
            io.spawn_flusher();
        }
    }

    /// Lets background work go on, once somebody calls [`Engine::kick`]; whether that is due.
    pub fn resume(&self) -> bool {
        self.end_quiesce();
        let ram = self.ram.lock();
        ram.flushers < ram.flushers_wanted(false, MAX_FLUSHERS)
    }

    /// A flusher's next batch, to be given to [`Engine::flush`]; none ends the flusher. Called in
    /// a loop by each [`Io::spawn_flusher`].
    pub fn next_batch(&self, io: &impl Io<Task = T, Block = B>) -> Option<Batch<B>> {
        loop {
            let taken = {
                let mut ram = self.ram.lock();
                if let Some((ticket, job)) = ram.take_job() {
                    return Some(Batch(Work::Through(ticket, job)));
                }
                let wanted = ram.flushers_wanted(self.is_quiesced(), MAX_FLUSHERS);
                let taken =
                    if ram.flushers <= wanted { ram.take_oldest(BATCH_BYTES) } else { Vec::new() };
                if taken.is_empty() {
                    // Counted down under the same lock, so that no kick is lost.
                    ram.flushers = ram.flushers.saturating_sub(1);
                    return None;
                }
                taken
            };
            match self.assemble(taken) {
                Ok(Some(batch)) => return Some(Batch(Work::Oldest(batch))),
                // All of it was released meanwhile.
                Ok(None) => self.kick(io),
                Err(full) => {
                    self.flusher_died();
                    self.log_full(io, full);
                    return None;
                }
            }
        }
    }

    /// A flusher ends although nobody told it to.
    pub fn flusher_died(&self) {
        let mut ram = self.ram.lock();
        ram.flushers = ram.flushers.saturating_sub(1);
    }

    /// Makes a batch of what is still needed of some extents.
    fn assemble(&self, mut taken: Vec<Taken<B>>) -> Result<Option<Oldest<B>>, Full> {
        // So that readers find neighbours side by side.
        taken.sort_unstable_by_key(|extent| extent.first);
        let granule_bytes = self.geometry.granule() as usize;
        let tail = self.geometry.odd_tail();
        let mut batch = Oldest {
            extents: taken.iter().map(|extent| extent.id).collect(),
            items: Vec::new(),
            parts: Vec::new(),
            tail: None,
            placed: Placed { first: 0, count: 0, places: Vec::new(), next: 0, unused: Vec::new() },
        };
        for extent in &taken {
            let len = extent.block.as_ref().as_ref().len();
            let index = (extent.first / REGION_GRANULES) as usize;
            let Some(region) = self.table.region(index) else { continue };
            let state = region.lock();
            for (nth, begin) in (0..len).step_by(granule_bytes).enumerate() {
                let granule = extent.first + nth as u64;
                let local = (granule % REGION_GRANULES) as u32;
                if state.places.get(local) != Some(Location::Ram(extent.id)) {
                    continue;
                }
                batch.items.push(Item { granule, extent: extent.id });
                let piece = begin..(begin + granule_bytes).min(len);
                if tail == Some(granule) {
                    batch.tail = Some((Arc::clone(&extent.block), piece));
                } else {
                    push_part(&mut batch.parts, &extent.block, piece);
                }
            }
        }
        if batch.items.is_empty() {
            self.ram.lock().finish(batch.extents);
            return Ok(None);
        }
        batch.placed = self.place(batch.items.iter().map(|item| item.granule))?;
        Ok(Some(batch))
    }

    /// Takes space of the log for granules, in the order in which they are given. The odd tail may be anywhere among them:
    /// it has its own place, and the others follow each other without it.
    pub(crate) fn place(&self, granules: impl Iterator<Item = u64>) -> Result<Placed, Full> {
        let tail = self.geometry.odd_tail();
        let is_tail = |granule: u64| tail == Some(granule);
        let mut places: Vec<(u64, u64)> = granules.map(|granule| (granule, 0)).collect();
        let count = places.iter().filter(|&&(granule, _)| !is_tail(granule)).count() as u64;
        let mut log = self.log.lock();
        let first = if count > 0 { log.take(count)? } else { 0 };
        let mut next = first;
        for (granule, position) in &mut places {
            if is_tail(*granule)
                && let Some(place) = log.tail_position()
            {
                *position = place;
                log.add_tail();
            } else {
                *position = next;
                next += 1;
            }
        }
        Ok(Placed { first, count, places, next: 0, unused: Vec::new() })
    }

    /// Ends a use of the log: what was not used is free, and segments with nothing in them are
    /// given back.
    pub(crate) fn finish_placed(&self, io: &impl Io<Task = T, Block = B>, placed: Placed) {
        let mut back = Vec::new();
        {
            let mut log = self.log.lock();
            let rest = placed.places[placed.next..].iter().map(|&(_, position)| position);
            placed.unused.into_iter().chain(rest).for_each(|position| log.remove(position));
            if placed.count > 0 {
                log.give_back(placed.first, placed.count, &mut back);
            }
        }
        self.discard_segments(io, back);
    }

    /// Gives segments of the image back, as (position, count).
    pub(crate) fn discard_segments(
        &self,
        io: &impl Io<Task = T, Block = B>,
        segments: Vec<(u64, u64)>,
    ) {
        let granule = self.geometry.granule();
        for (position, count) in segments {
            let range = ByteRange::at(position * granule, count * granule);
            self.watched(io, What::DiscardLog, range.start, || {
                io.discard_log(range.start, range.len());
            });
        }
    }

    /// Writes a batch to the log.
    pub fn flush(&self, io: &impl Io<Task = T, Block = B>, batch: Batch<B>) {
        match batch.0 {
            Work::Oldest(batch) => self.flush_oldest(io, batch),
            Work::Through(ticket, job) => self.carry_out(io, ticket, job),
        }
    }

    fn flush_oldest(&self, io: &impl Io<Task = T, Block = B>, batch: Oldest<B>) {
        let Oldest { extents, items, parts, tail, mut placed } = batch;
        let slices: Vec<&[u8]> = parts.iter().map(slice).collect();
        let rest =
            if slices.is_empty() { Ok(()) } else { self.write_log(io, placed.first, &slices) };
        let written = rest.and_then(|()| match &tail {
            Some(part) => self.write_tail(io, slice(part)),
            None => Ok(()),
        });
        if written.is_ok() {
            for item in &items {
                self.move_to_log(item, &mut placed);
            }
        }
        let woken = {
            let mut ram = self.ram.lock();
            if written.is_ok() {
                ram.finish(extents);
            }
            ram.grant()
        };
        wake(io, woken);
        self.finish_placed(io, placed);
        if let Err(errno) = written {
            let text = "write to the fleecing image failed".to_owned();
            self.break_snapshot(io, text, errno);
        }
    }

    /// The saved data of a granule is in the log now, unless it was released meanwhile.
    fn move_to_log(&self, item: &Item, placed: &mut Placed) {
        let Some(region) = self.table.region((item.granule / REGION_GRANULES) as usize) else {
            return;
        };
        let local = (item.granule % REGION_GRANULES) as u32;
        let mut state = region.lock();
        if state.places.get(local) == Some(Location::Ram(item.extent)) {
            let position = placed.take(item.granule);
            state.places.replace(local, Location::Log(position));
        }
    }

    /// Writes granules, given with their place in `data` and in the order of the disk, to the log
    /// at once. An error of the log itself breaks the snapshot.
    ///
    /// # Errors
    /// The image's error; nothing is kept.
    pub(crate) fn write_now(
        &self,
        io: &impl Io<Task = T, Block = B>,
        granules: impl Iterator<Item = (u64, usize)>,
        data: &[u8],
    ) -> Result<Placed, Errno> {
        let granules: Vec<(u64, usize)> = granules.collect();
        let placed = self.place(granules.iter().map(|&(granule, _)| granule)).map_err(|full| {
            self.log_full(io, full);
            Errno::ENOSPC
        })?;
        let size = self.geometry.granule() as usize;
        let mut parts: Vec<&[u8]> = Vec::new();
        let mut run = 0..0;
        for &(_, at) in &granules[..placed.count as usize] {
            if run.end != at {
                parts.extend(data.get(run).filter(|part| !part.is_empty()));
                run = at..at;
            }
            run.end = at + size;
        }
        parts.extend(data.get(run).filter(|part| !part.is_empty()));
        let rest = if parts.is_empty() { Ok(()) } else { self.write_log(io, placed.first, &parts) };
        let written = rest.and_then(|()| match granules.get(placed.count as usize) {
            Some(&(_, at)) => self.write_tail(io, &data[at..]),
            None => Ok(()),
        });
        match written {
            Ok(()) => Ok(placed),
            Err(errno) => {
                self.finish_placed(io, placed);
                Err(errno)
            }
        }
    }

    fn write_tail(&self, io: &impl Io<Task = T, Block = B>, data: &[u8]) -> Result<(), Errno> {
        let position = self.log.lock().tail_position().unwrap_or_default();
        self.write_log(io, position, &[data])
    }

    /// A failed write is tried again in the same place: the log has no second one for it.
    fn write_log(
        &self,
        io: &impl Io<Task = T, Block = B>,
        position: u64,
        parts: &[&[u8]],
    ) -> Result<(), Errno> {
        let offset = position * self.geometry.granule();
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        let mut result = Ok(());
        for _ in 0..WRITE_TRIES {
            result = self.watched(io, What::WriteLog, offset, || io.write_log(offset, parts));
            self.counters.written_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
            if result.is_ok() || !self.is_capturing() {
                break;
            }
        }
        result
    }
}

/// The data of a piece.
fn slice<B: AsRef<[u8]>>((block, piece): &Part<B>) -> &[u8] {
    &block.as_ref().as_ref()[piece.clone()]
}

/// Adds a piece of a block to the data of a batch, in one part with its neighbour if it has one.
fn push_part<B>(parts: &mut Vec<Part<B>>, block: &Arc<B>, piece: Range<usize>) {
    match parts.last_mut() {
        Some((last, range)) if Arc::ptr_eq(last, block) && range.end == piece.start => {
            range.end = piece.end;
        }
        _ => parts.push((Arc::clone(block), piece)),
    }
}
