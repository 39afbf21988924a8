// SPDX-License-Identifier: GPL-2.0-or-later
//! States and transitions. Methods decide and book; they do no I/O, do not wait and read no clock.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use crate::OutOfMemory;
use crate::log::Log;
use crate::range::{ByteRange, Geometry, PIECE_BYTES, PIECE_GRANULES};
use crate::stats::{State, Stats};
use crate::table::{Granule, Table};
use crate::{Errno, NeedMap};

/// A set of granules within one piece.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Mask([u64; PIECE_GRANULES / 64]);

impl Mask {
    /// Adds granule `index` of the piece.
    pub(crate) fn insert(&mut self, index: usize) {
        self.0[index / 64] |= 1 << (index % 64);
    }
    /// Whether granule `index` of the piece is in the set.
    #[must_use]
    pub(crate) fn contains(&self, index: usize) -> bool {
        self.0[index / 64] & (1 << (index % 64)) != 0
    }
}

/// What a guest request must do before it may go on to the source.
#[derive(Debug)]
#[must_use]
pub(crate) enum Plan {
    /// Nothing: it may be submitted.
    Pass,
    /// Wait until another request's capture is published, then ask again.
    Busy,
    /// Wait until the RAM buffer has room, then ask again.
    NoRoom,
    /// Read and publish these granules, then ask again.
    Capture(Capture),
}

/// The duty to read and publish granules; ended by [`Core::publish`].
#[derive(Debug)]
#[must_use]
pub(crate) struct Capture {
    /// First granule of the span.
    pub(crate) first: u64,
    /// The bytes to read with one request; granules between may not be ours.
    pub(crate) bytes: ByteRange,
    mine: Mask,
}

/// What a capture found, granule by granule of its span.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// Zero granules: nothing is kept.
    pub(crate) zero: Mask,
    /// Granules that could not be read, and the first error.
    pub(crate) lost: Mask,
    /// The first read error.
    pub(crate) error: Option<Errno>,
}

/// Old data of one capture in RAM.
#[derive(Debug)]
struct Extent<B> {
    first: u64,
    block: Arc<B>,
    bytes: u64,
    live: u32,
    flushing: bool,
}

/// One sequential write to the log.
#[derive(Debug)]
#[must_use]
pub struct Batch<B> {
    /// First position in the log, in granules.
    pub(crate) position: u32,
    /// Byte offset in the fleecing image.
    pub(crate) offset: u64,
    /// The data, in order.
    pub(crate) parts: Vec<(Arc<B>, Range<usize>)>,
    /// The odd tail, if it is among the data: its byte offset and data. It has its own place.
    pub(crate) tail: Option<(u64, Arc<B>, Range<usize>)>,
    granules: Vec<(u64, u32)>,
    tail_extent: u32,
    extents: Vec<u32>,
}

/// What a snapshot read must fetch from the devices for one piece.
#[derive(Debug, Default)]
pub(crate) struct Fetch {
    /// From the source, at its own offset.
    pub(crate) source: Vec<ByteRange>,
    /// From the log: bytes of the disk, and the byte offset in the image.
    pub(crate) log: Vec<(ByteRange, u64)>,
}

/// How a run of the snapshot is stored, for block status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    /// Only the source knows.
    Source,
    /// Known to be zero.
    Zero,
    /// Data, or an area whose reads fail.
    Data,
}

/// The states of one disk's snapshot.
#[derive(Debug)]
pub(crate) struct Core<B> {
    geometry: Geometry,
    table: Option<Table>,
    extents: Vec<Option<Extent<B>>>,
    free_extents: Vec<u32>,
    queue: VecDeque<u32>,
    log: Log,
    ram_limit: u64,
    ram_used: u64,
    stats: Stats,
}

impl<B: AsRef<[u8]>> Core<B> {
    /// A snapshot in which nothing is captured. At least one piece of RAM is used.
    ///
    /// # Errors
    /// No memory for the table.
    pub(crate) fn new(
        geometry: Geometry,
        ram_limit: u64,
        segment_bytes: u64,
        need: Option<Box<dyn NeedMap>>,
    ) -> Result<Self, OutOfMemory> {
        Ok(Self {
            geometry,
            table: Some(Table::new(geometry, need)?),
            extents: Vec::new(),
            free_extents: Vec::new(),
            queue: VecDeque::new(),
            log: Log::new(geometry, segment_bytes),
            ram_limit: ram_limit.max(PIECE_BYTES),
            ram_used: 0,
            stats: Stats::default(),
        })
    }

    /// The counters now.
    pub(crate) fn stats(&self) -> Stats {
        let granule = self.geometry.granule();
        let mut stats = self.stats.clone();
        stats.ram_bytes = self.ram_used;
        stats.log_bytes = self.log.live() * granule;
        stats.metadata_bytes = self.log.metadata_bytes()
            + (self.extents.capacity() * size_of::<Option<Extent<B>>>()) as u64
            + self.table.as_ref().map_or(0, Table::metadata_bytes);
        stats
    }

    /// The counters that the engine keeps.
    pub(crate) fn stats_mut(&mut self) -> &mut Stats {
        &mut self.stats
    }

    /// Whether old data is still being saved.
    pub(crate) fn is_capturing(&self) -> bool {
        self.table.is_some()
    }

    /// Old data in RAM, in bytes.
    pub(crate) fn ram_used(&self) -> u64 {
        self.ram_used
    }

    /// Whether something waits to be written to the log.
    pub(crate) fn has_unflushed(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Ends the snapshot: nothing is captured any more, all that was saved is dropped. The first
    /// error is kept.
    pub(crate) fn end(&mut self, state: State, error: Option<(String, Errno)>) {
        if matches!(self.stats.state, State::Active | State::Degraded) || state == State::Closing {
            self.stats.state = state;
        }
        if self.stats.error.is_none() {
            self.stats.error = error;
        }
        self.table = None;
        self.extents = Vec::new();
        self.free_extents = Vec::new();
        self.queue = VecDeque::new();
        self.ram_used = 0;
    }

    // ---- guest requests ----------------------------------------------------------------------

    /// What a guest request on `piece` (at most [`PIECE_BYTES`], not across such a boundary) must
    /// do first.
    ///
    /// # Errors
    /// No memory for a table; the caller ends the snapshot.
    pub(crate) fn plan(&mut self, piece: ByteRange) -> Result<Plan, OutOfMemory> {
        let Some(table) = &mut self.table else { return Ok(Plan::Pass) };
        let granules = self.geometry.cover(piece);
        let mut span: Option<Range<u64>> = None;
        let mut busy = false;
        for granule in granules {
            match table.get(granule) {
                Granule::Needed => {
                    let first = span.map_or(granule, |span| span.start);
                    span = Some(first..granule + 1);
                }
                Granule::Reading => busy = true,
                Granule::Ram(_)
                | Granule::Log(_)
                | Granule::Zero
                | Granule::Clean
                | Granule::Released
                | Granule::Lost => {}
            }
        }
        let Some(span) = span else {
            return Ok(if busy { Plan::Busy } else { Plan::Pass });
        };
        let bytes = self.geometry.bytes(span.clone());
        if self.ram_used + bytes.len() > self.ram_limit {
            return Ok(Plan::NoRoom);
        }
        let mut mine = Mask::default();
        for granule in span.clone() {
            if table.get(granule) == Granule::Needed {
                table.set(granule, Granule::Reading)?;
                mine.insert((granule - span.start) as usize);
            }
        }
        self.ram_used += bytes.len();
        Ok(Plan::Capture(Capture { first: span.start, bytes, mine }))
    }

    /// Whether a guest request on `range` may pass at once; asked for large discards.
    pub(crate) fn needs_nothing(&self, range: ByteRange) -> bool {
        let Some(table) = &self.table else { return true };
        let granules = self.geometry.cover(range);
        let mut at = granules.start;
        while at < granules.end {
            if matches!(table.get(at), Granule::Needed | Granule::Reading) {
                return false;
            }
            at += table.uniform_run(at, granules.end - at);
        }
        true
    }

    /// Ends a capture: from here on its granules are saved (or known lost), and the guest request
    /// may be submitted. Granules the reader released meanwhile are dropped.
    ///
    /// # Errors
    /// No memory; the caller ends the snapshot.
    pub(crate) fn publish(
        &mut self,
        capture: Capture,
        block: Option<B>,
        found: &Found,
    ) -> Result<(), OutOfMemory> {
        // After the end of the snapshot nobody counts its RAM any more.
        let Some(table) = &mut self.table else { return Ok(()) };
        let granule_bytes = self.geometry.granule();
        // Places of extents that were released before they were flushed.
        while let Some(&id) = self.queue.front()
            && self.extents[id as usize].is_none()
        {
            self.queue.pop_front();
            self.free_extents.push(id);
        }
        let id = match self.free_extents.pop() {
            Some(id) => id,
            None => {
                self.extents.try_reserve(1).map_err(|_| OutOfMemory)?;
                self.queue.try_reserve(1).map_err(|_| OutOfMemory)?;
                self.extents.push(None);
                (self.extents.len() - 1) as u32
            }
        };
        let mut live = 0;
        for granule in self.geometry.cover(capture.bytes) {
            let index = (granule - capture.first) as usize;
            if !capture.mine.contains(index) || table.get(granule) != Granule::Reading {
                continue;
            }
            let state = if block.is_none() || found.lost.contains(index) {
                self.stats.state = State::Degraded;
                Granule::Lost
            } else if found.zero.contains(index) {
                self.stats.zero_bytes += granule_bytes;
                Granule::Zero
            } else {
                self.stats.captured_bytes += granule_bytes;
                live += 1;
                Granule::Ram(id)
            };
            table.set(granule, state)?;
        }
        match block {
            Some(block) if live > 0 => {
                let bytes = capture.bytes.len();
                self.extents[id as usize] = Some(Extent {
                    first: capture.first,
                    block: Arc::new(block),
                    bytes,
                    live,
                    flushing: false,
                });
                self.queue.push_back(id);
            }
            _ => {
                self.ram_used -= capture.bytes.len();
                self.free_extents.push(id);
            }
        }
        if let (Some(errno), None) = (found.error, &self.stats.error) {
            let text = format!("read of old data at {} failed", capture.bytes.start);
            self.stats.error = Some((text, errno));
        }
        Ok(())
    }

    /// Whether no granule of `range` is in RAM any more.
    pub(crate) fn none_in_ram(&self, range: ByteRange) -> bool {
        self.table.as_ref().is_none_or(|table| {
            !self.geometry.cover(range).any(|granule| matches!(table.get(granule), Granule::Ram(_)))
        })
    }

    // ---- flusher -----------------------------------------------------------------------------

    /// Takes the oldest old data, about `max_bytes`, for one sequential write.
    ///
    /// # Errors
    /// No memory; the caller ends the snapshot.
    pub(crate) fn take_batch(&mut self, max_bytes: u64) -> Result<Option<Batch<B>>, OutOfMemory> {
        let Some(table) = &self.table else { return Ok(None) };
        let granule_bytes = self.geometry.granule();
        let odd_tail = self.geometry.has_odd_tail().then(|| self.geometry.count() - 1);
        let mut batch = Batch {
            position: 0,
            offset: 0,
            parts: Vec::new(),
            tail: None,
            granules: Vec::new(),
            tail_extent: 0,
            extents: Vec::new(),
        };
        while (batch.granules.len() as u64) * granule_bytes < max_bytes {
            let Some(id) = self.queue.pop_front() else { break };
            let Some(extent) = self.extents[id as usize].as_mut() else {
                // Released as a whole before it was flushed.
                self.free_extents.push(id);
                continue;
            };
            extent.flushing = true;
            batch.extents.push(id);
            let area = ByteRange::at(extent.first * granule_bytes, extent.bytes);
            for at in self.geometry.cover(area) {
                if table.get(at) != Granule::Ram(id) {
                    continue;
                }
                let begin = ((at - extent.first) * granule_bytes) as usize;
                let stop = (begin as u64 + granule_bytes).min(extent.bytes) as usize;
                if odd_tail == Some(at) {
                    batch.tail = Some((at * granule_bytes, Arc::clone(&extent.block), begin..stop));
                    batch.tail_extent = id;
                } else {
                    push_part(&mut batch.parts, &extent.block, begin..stop);
                    batch.granules.push((at, id));
                }
            }
        }
        if batch.granules.is_empty() && batch.tail.is_none() {
            return Ok(None);
        }
        if !batch.granules.is_empty() {
            let count = batch.granules.len() as u32;
            batch.position = self.log.begin_write(count).ok_or(OutOfMemory)?;
            batch.offset = u64::from(batch.position) * granule_bytes;
        }
        Ok(Some(batch))
    }

    /// Ends a batch that was written: its granules live in the log now. Returns the byte ranges of
    /// the image that can be given back.
    ///
    /// # Errors
    /// No memory; the caller ends the snapshot.
    pub(crate) fn complete_batch(
        &mut self,
        batch: Batch<B>,
    ) -> Result<Vec<ByteRange>, OutOfMemory> {
        let Some(table) = &mut self.table else { return Ok(Vec::new()) };
        let placed = batch
            .granules
            .iter()
            .enumerate()
            .map(|(index, &(granule, id))| (granule, id, batch.position + index as u32));
        let tail = batch.tail.as_ref().map(|_| {
            let granule = self.geometry.count() - 1;
            (granule, batch.tail_extent, granule as u32)
        });
        for (granule, id, position) in placed.chain(tail) {
            // The reader may have released it while it was being written.
            if table.get(granule) == Granule::Ram(id) {
                table.set(granule, Granule::Log(position))?;
                self.log.add(position);
            }
        }
        for id in batch.extents {
            if let Some(extent) = self.extents[id as usize].take() {
                self.ram_used -= extent.bytes;
                self.free_extents.push(id);
            }
        }
        let count = batch.granules.len() as u32;
        if count == 0 {
            return Ok(Vec::new());
        }
        self.log.end_write(batch.position, count);
        Ok(self.give_back(batch.position, count))
    }

    fn give_back(&mut self, position: u32, count: u32) -> Vec<ByteRange> {
        let mut segments = Vec::new();
        self.log.give_back(position, count, &mut segments);
        let granule = self.geometry.granule();
        segments
            .into_iter()
            .map(|(at, n)| ByteRange::at(u64::from(at) * granule, u64::from(n) * granule))
            .collect()
    }

    // ---- reader ------------------------------------------------------------------------------

    fn readable(&self) -> Result<&Table, Errno> {
        self.table.as_ref().ok_or(Errno::EIO)
    }

    /// What a read of `piece` must fetch from the devices.
    ///
    /// # Errors
    /// `EPERM` when a part is clean or released, `EIO` when a part is lost or the snapshot is.
    pub(crate) fn fetch(&self, piece: ByteRange) -> Result<Fetch, Errno> {
        let table = self.readable()?;
        let mut fetch = Fetch::default();
        for granule in self.geometry.cover(piece) {
            let bytes = self.geometry.bytes(granule..granule + 1).intersect(piece);
            match table.get(granule) {
                Granule::Needed | Granule::Reading => match fetch.source.last_mut() {
                    // Reading over a gap is cheaper than another request; what lies in the gap
                    // is overwritten by its saved copy afterwards.
                    Some(run) if bytes.start - run.end <= SOURCE_GAP_BYTES => run.end = bytes.end,
                    _ => fetch.source.push(bytes),
                },
                Granule::Log(position) => self.fetch_log(&mut fetch.log, bytes, position),
                Granule::Ram(_) | Granule::Zero => {}
                Granule::Clean | Granule::Released => return Err(Errno::EPERM),
                Granule::Lost => return Err(Errno::EIO),
            }
        }
        Ok(fetch)
    }

    fn fetch_log(&self, runs: &mut Vec<(ByteRange, u64)>, bytes: ByteRange, position: u32) {
        let granule = self.geometry.granule();
        let offset = u64::from(position) * granule + bytes.start % granule;
        match runs.last_mut() {
            Some((run, at)) if run.end == bytes.start && *at + run.len() == offset => {
                run.end = bytes.end;
            }
            _ => runs.push((bytes, offset)),
        }
    }

    /// Looks at `piece` again after `fetched` was read: calls `patch` with what must replace it
    /// (the saved bytes, or none for zeroes), and returns what must still be read from the log.
    ///
    /// # Errors
    /// As [`Core::fetch`]; a released part means that what was read may be wrong.
    pub(crate) fn settle(
        &self,
        piece: ByteRange,
        fetched: &Fetch,
        mut patch: impl FnMut(ByteRange, Option<&[u8]>),
    ) -> Result<Fetch, Errno> {
        let table = self.readable()?;
        let granule_bytes = self.geometry.granule();
        let mut more = Fetch::default();
        for granule in self.geometry.cover(piece) {
            let whole = self.geometry.bytes(granule..granule + 1);
            let bytes = whole.intersect(piece);
            match table.get(granule) {
                // Not captured, so no guest request to it was submitted before this look.
                Granule::Needed | Granule::Reading => {}
                Granule::Ram(id) => {
                    let extent = self.extents[id as usize].as_ref().ok_or(Errno::EIO)?;
                    let at = ((granule - extent.first) * granule_bytes
                        + (bytes.start - whole.start)) as usize;
                    patch(
                        bytes,
                        Some(&extent.block.as_ref().as_ref()[at..at + bytes.len() as usize]),
                    );
                }
                Granule::Zero => patch(bytes, None),
                Granule::Log(position) => {
                    let offset = u64::from(position) * granule_bytes + (bytes.start - whole.start);
                    let read = fetched.log.iter().any(|(run, at)| {
                        run.start <= bytes.start
                            && bytes.end <= run.end
                            && at + (bytes.start - run.start) == offset
                    });
                    if !read {
                        self.fetch_log(&mut more.log, bytes, position);
                    }
                }
                Granule::Clean | Granule::Released => return Err(Errno::EPERM),
                Granule::Lost => return Err(Errno::EIO),
            }
        }
        Ok(more)
    }

    /// How the snapshot is stored from `range.start` on, and for how many bytes that holds.
    ///
    /// # Errors
    /// `EIO` when the snapshot is lost.
    pub(crate) fn stored(&self, range: ByteRange) -> Result<(u64, Stored), Errno> {
        let table = self.readable()?;
        let granules = self.geometry.cover(range);
        let mut at = granules.start;
        let mut kind = None;
        while at < granules.end {
            let this = match table.get(at) {
                Granule::Needed | Granule::Reading => Stored::Source,
                Granule::Zero => Stored::Zero,
                Granule::Ram(_) | Granule::Log(_) => Stored::Data,
                // A hole there could be taken for zeroes by a client that merges an increment.
                Granule::Clean | Granule::Released | Granule::Lost => Stored::Data,
            };
            if *kind.get_or_insert(this) != this {
                break;
            }
            at += table.uniform_run(at, granules.end - at);
        }
        let end = self.geometry.bytes(granules.start..at).end.min(range.end);
        Ok((end - range.start, kind.unwrap_or(Stored::Data)))
    }

    /// Releases the granules wholly within `range`. Returns the byte ranges of the image that can
    /// be given back, and whether RAM became free.
    ///
    /// # Errors
    /// No memory; the caller ends the snapshot.
    pub(crate) fn release(
        &mut self,
        range: ByteRange,
    ) -> Result<(Vec<ByteRange>, bool), OutOfMemory> {
        let granules = self.geometry.within(range);
        let mut freed = false;
        let mut positions: Vec<u32> = Vec::new();
        let Some(table) = &mut self.table else { return Ok((Vec::new(), false)) };
        let mut at = granules.start;
        while at < granules.end {
            if let Some(end) = table.release_region(&granules, at) {
                self.stats.released_bytes += self.geometry.bytes(at..end).len();
                at = end;
                continue;
            }
            let old = table.get(at);
            match old {
                Granule::Clean | Granule::Released => {
                    at += table.uniform_run(at, granules.end - at);
                    continue;
                }
                Granule::Ram(id) => freed |= release_ram(&mut self.extents, &mut self.ram_used, id),
                Granule::Log(position) => {
                    self.log.remove(position);
                    positions.push(position);
                }
                Granule::Needed | Granule::Reading | Granule::Zero | Granule::Lost => {}
            }
            table.set(at, Granule::Released)?;
            self.stats.released_bytes += self.geometry.bytes(at..at + 1).len();
            at += 1;
        }
        let mut back = Vec::new();
        for position in positions {
            back.append(&mut self.give_back(position, 1));
        }
        Ok((back, freed))
    }
}

/// Gaps of at most this many bytes are read over.
const SOURCE_GAP_BYTES: u64 = 64 << 10;

/// Adds a piece of a block to the data of a batch, in one part with its neighbour if it has one.
fn push_part<B>(parts: &mut Vec<(Arc<B>, Range<usize>)>, block: &Arc<B>, piece: Range<usize>) {
    match parts.last_mut() {
        Some((last, range)) if Arc::ptr_eq(last, block) && range.end == piece.start => {
            range.end = piece.end;
        }
        _ => parts.push((Arc::clone(block), piece)),
    }
}

/// One granule of an extent is not needed any more. The block of an extent that is being flushed
/// stays until the write is over; a queued one leaves an empty place that `take_batch` removes.
fn release_ram<B>(extents: &mut [Option<Extent<B>>], ram_used: &mut u64, id: u32) -> bool {
    let Some(slot) = extents.get_mut(id as usize) else { return false };
    let Some(extent) = slot.as_mut() else { return false };
    extent.live -= 1;
    if extent.live > 0 || extent.flushing {
        return false;
    }
    *ram_used -= extent.bytes;
    *slot = None;
    true
}
