// SPDX-License-Identifier: GPL-2.0-or-later
//! Before a guest's request: the old data of every granule it touches is saved first.

use std::ops::Range;

use crate::engine::{CAPTURING, Engine, LOOK_BYTES, OnError, wake};
use crate::flush::{MAX_FLUSHERS, Placed};
use crate::mask::{Mask, bits, words};
use crate::places::Location;
use crate::ram::Room;
use crate::range::{ByteRange, PIECE_BYTES, REGION_GRANULES};
use crate::sync::Ordering;
use crate::table::{Locked, Region};
use crate::watch::What;
use crate::{Errno, Io, OutOfMemory};

/// Data of this size that finds no room in RAM is written to the log before its request goes on:
/// that costs one request, as a flusher's would, and does not hold up small ones.
const LARGE_BYTES: u64 = 256 << 10;
/// Sharing takes no room in RAM.
const SHARED: Room = Room::Through(0);
/// Words of a region that one piece can touch.
const PIECE_WORDS: usize = crate::range::PIECE_GRANULES / 64;

/// What a guest request must do before it may go on to the source.
#[must_use]
enum Plan {
    /// Nothing: it may be submitted.
    Pass,
    /// Wait until a capture or discard of another request is over, then ask again.
    Wait,
    /// Wait for room in RAM, then ask again with it.
    NoRoom(u64),
    /// Read and save these granules, then ask again.
    Capture(Capture),
    /// Save these granules by sharing their blocks, then ask again.
    Share(Capture),
    /// There is no memory for the states.
    OutOfMemory,
}

/// The duty to read and save granules.
#[derive(Debug)]
struct Capture {
    region: usize,
    /// The span to read with one request; granules between may not be ours.
    local: Range<u32>,
    /// Ours, by words from that of the span's begin.
    mine: [u64; PIECE_WORDS],
    room: Room,
}

impl Capture {
    fn first_word(&self) -> usize {
        self.local.start as usize / 64
    }

    /// Our granules that were not released meanwhile, by word.
    fn still_reading<T>(&self, state: &Locked<'_, T>) -> [u64; PIECE_WORDS] {
        let mut still = self.mine;
        for (index, bits) in still.iter_mut().enumerate().filter(|(_, bits)| **bits != 0) {
            let word = self.first_word() + index;
            *bits &= !state.done(word) & state.kept(word);
        }
        still
    }

    /// The granules in `set`, in order: within the region.
    fn granules(&self, set: [u64; PIECE_WORDS]) -> impl Iterator<Item = u32> {
        let first = self.first_word() as u32;
        set.into_iter().enumerate().flat_map(move |(index, word)| {
            bits(word).map(move |bit| (first + index as u32) * 64 + bit)
        })
    }

    /// A granule of the region as one of the disk.
    fn on_disk(&self, local: u32) -> u64 {
        self.region as u64 * REGION_GRANULES + u64::from(local)
    }

    /// Index of a granule in the span.
    fn index(&self, local: u32) -> usize {
        (local - self.local.start) as usize
    }
}

/// What a capture found, granule by granule of its span.
#[derive(Debug, Default)]
struct Found {
    /// Zero granules: nothing is kept.
    zero: Mask,
    /// Granules that could not be read.
    lost: Mask,
    /// The first read error, and where.
    error: Option<(u64, Errno)>,
}

/// Old data that is written to the log before its request goes on. Not by the request itself: that
/// waits no longer than until the snapshot breaks, whatever becomes of the image.
#[derive(Debug)]
pub(crate) struct Job<B> {
    capture: Capture,
    found: Found,
    block: B,
}

impl<T: Send, B: AsRef<[u8]> + AsMut<[u8]> + Send + Sync> Engine<T, B> {
    /// Saves the old data of every granule that a guest request on `range` touches. When it
    /// returns, the request may be submitted.
    ///
    /// # Errors
    /// With [`OnError::BreakGuestWrite`] the request must fail with this error instead.
    pub fn before_write(
        &self,
        io: &impl Io<Task = T, Block = B>,
        range: ByteRange,
    ) -> Result<(), Errno> {
        if self.gate() == 0 {
            return Ok(());
        }
        let mut since_ns = None;
        let mut delayed = false;
        for piece in range.pieces(PIECE_BYTES) {
            let granules = self.geometry.cover(piece);
            if self.table.passes(&granules) {
                continue;
            }
            since_ns.get_or_insert_with(|| io.now_ns());
            delayed |= self.save_piece(io, granules)?;
        }
        if let Some(since_ns) = since_ns.filter(|_| delayed) {
            self.note_delay(io.now_ns().saturating_sub(since_ns));
        }
        Ok(())
    }

    fn note_delay(&self, delay_ns: u64) {
        self.delays.record(delay_ns);
        self.counters.delay_total_ns.fetch_add(delay_ns, Ordering::Relaxed);
        self.counters.delay_max_ns.fetch_max(delay_ns, Ordering::Relaxed);
    }

    /// As [`Engine::before_write`] for a write of zeroes, which may be long: where the source is
    /// known to be zero already, nothing is read.
    ///
    /// # Errors
    /// As [`Engine::before_write`].
    pub fn before_write_zeroes(
        &self,
        io: &impl Io<Task = T, Block = B>,
        range: ByteRange,
    ) -> Result<(), Errno> {
        if range.len() >= PIECE_BYTES && self.is_capturing() {
            for look in range.pieces(LOOK_BYTES) {
                self.note_known_zeroes(io, look);
            }
        }
        self.before_write(io, range)
    }

    fn note_known_zeroes(&self, io: &impl Io<Task = T, Block = B>, range: ByteRange) {
        let mut rest = range;
        while rest.len() >= PIECE_BYTES {
            let Ok((len, zero)) = io.source_is_zero(rest.start, rest.len()) else { return };
            let area = ByteRange::at(rest.start, len).intersect(rest);
            if zero {
                self.mark_zero(area);
            }
            rest.start = area.end.max(rest.start + 1);
        }
    }

    /// What is still needed now was not overwritten since somebody found it to be zero.
    fn mark_zero(&self, area: ByteRange) {
        for (index, local) in self.geometry.by_region(self.geometry.within(area)) {
            let Ok(region) = self.table.touch(index) else { return };
            let mut state = region.lock();
            if !self.is_capturing() {
                return;
            }
            let forgotten = state.postponed.forget(&local);
            self.counters.postponed_granules.fetch_sub(forgotten, Ordering::Relaxed);
            let mut count = 0;
            for (word, bits) in words(local) {
                let zero = bits & !state.done(word) & !state.kept(word);
                state.begin_reading(word, zero);
                state.finish_reading(word, zero);
                count += u64::from(zero.count_ones());
            }
            let bytes = count * self.geometry.granule();
            self.counters.zero_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// How many bytes from `range.start` a write of zeroes may take at once, and whether they need
    /// [`Engine::before_write_zeroes`] first. Cut at multiples of `unit`, which is at least what
    /// the source can zero as a whole.
    pub fn next_part(&self, range: ByteRange, unit: u64) -> (u64, bool) {
        if self.gate() == 0 {
            return (range.len(), false);
        }
        let mut pass = 0;
        for part in range.pieces(unit.max(PIECE_BYTES)) {
            let passes = |piece: ByteRange| self.table.passes(&self.geometry.cover(piece));
            if !part.pieces(PIECE_BYTES).all(passes) {
                return if pass > 0 { (pass, false) } else { (part.len(), true) };
            }
            pass += part.len();
        }
        (pass, false)
    }

    /// Whether the request was delayed.
    fn save_piece(
        &self,
        io: &impl Io<Task = T, Block = B>,
        granules: Range<u64>,
    ) -> Result<bool, Errno> {
        let mut room = None;
        let mut delayed = false;
        loop {
            match self.plan(io, &granules, &mut room) {
                Plan::Pass => break,
                Plan::Wait => io.park(),
                Plan::NoRoom(ticket) => {
                    self.counters.overflows.fetch_add(1, Ordering::Relaxed);
                    self.kick(io);
                    io.park();
                    room = self.ram.lock().claim(ticket);
                }
                Plan::Capture(capture) => self.capture(io, capture)?,
                Plan::Share(capture) => self.share(io, &capture),
                Plan::OutOfMemory => self.out_of_memory(io),
            }
            delayed = true;
        }
        self.give_room_back(io, room);
        Ok(delayed)
    }

    fn give_room_back(&self, io: &impl Io<Task = T, Block = B>, room: Option<Room>) {
        let Some(room) = room else { return };
        let woken = {
            let mut ram = self.ram.lock();
            ram.free(room);
            ram.grant()
        };
        wake(io, woken);
    }

    /// What to do for the granules of one piece now.
    fn plan(
        &self,
        io: &impl Io<Task = T, Block = B>,
        granules: &Range<u64>,
        room: &mut Option<Room>,
    ) -> Plan {
        let Some((index, local)) = self.geometry.by_region(granules.clone()).next() else {
            return Plan::Pass;
        };
        let region = if self.is_capturing() {
            match self.table.touch(index) {
                Ok(region) => region,
                Err(OutOfMemory) => return Plan::OutOfMemory,
            }
        } else {
            let Some(region) = self.table.region(index) else { return Plan::Pass };
            region
        };
        let mut state = region.lock();
        // Under the lock: the end takes the waiters under it.
        let gate = self.gate();
        if gate == 0 {
            return Plan::Pass;
        }
        if state.discarding.overlaps(&local) {
            // A discard of the guest's own, done late: a write must not be lost in it.
            state.waiters.push(io.current());
            return Plan::Wait;
        }
        if gate & CAPTURING == 0 {
            self.forget_postponed(&mut state, &local);
            return Plan::Pass;
        }
        let (span, busy) = needed_span(&state, local.clone());
        match span {
            Some(span) => {
                let plan = self.begin_capture(io, &mut state, index, span, room);
                if matches!(plan, Plan::Pass) {
                    // The snapshot ends just now.
                    self.forget_postponed(&mut state, &local);
                }
                plan
            }
            None if busy => {
                state.waiters.push(io.current());
                Plan::Wait
            }
            None => Plan::Pass,
        }
    }

    /// A write makes an earlier discard of the same granules void.
    fn forget_postponed(&self, state: &mut Locked<'_, T>, local: &Range<u32>) {
        let forgotten = state.postponed.forget(local);
        self.counters.postponed_granules.fetch_sub(forgotten, Ordering::Relaxed);
    }

    fn begin_capture(
        &self,
        io: &impl Io<Task = T, Block = B>,
        state: &mut Locked<'_, T>,
        region: usize,
        span: Range<u32>,
        granted: &mut Option<Room>,
    ) -> Plan {
        let bytes = self.bytes_of(region, span.clone());
        if granted.is_none() && self.may_share(state, &span, bytes) {
            return Plan::Share(self.claim(state, region, span, SHARED));
        }
        let (span, room) = match granted.take() {
            // Enough for all that was needed when it was asked for; more only if another guest
            // request failed meanwhile, and then that comes next.
            Some(room) => (self.clip(span, room), room),
            None => {
                let mut ram = self.ram.lock();
                match ram.try_reserve(bytes.len(), LARGE_BYTES) {
                    Some(room) => (span, room),
                    None => {
                        return match ram.wait(bytes.len(), io.current()) {
                            Some(ticket) => Plan::NoRoom(ticket),
                            None => Plan::Pass,
                        };
                    }
                }
            }
        };
        Plan::Capture(self.claim(state, region, span, room))
    }

    /// Takes over what is needed of a span: it is ours to save.
    fn claim(
        &self,
        state: &mut Locked<'_, T>,
        region: usize,
        span: Range<u32>,
        room: Room,
    ) -> Capture {
        let mut mine = [0; PIECE_WORDS];
        let first_word = span.start as usize / 64;
        for (word, bits) in words(span.clone()) {
            let needed = bits & !state.done(word) & !state.kept(word);
            state.begin_reading(word, needed);
            mine[word - first_word] = needed;
        }
        self.forget_postponed(state, &span);
        Capture { region, local: span, mine, room }
    }

    /// Whether a span may be shared: all of it is needed, it is large, and has no odd end.
    fn may_share(&self, state: &Locked<'_, T>, span: &Range<u32>, bytes: ByteRange) -> bool {
        bytes.len() >= self.share_from_bytes.load(Ordering::Relaxed)
            && bytes.len().is_multiple_of(self.geometry.granule())
            && words(span.clone())
                .all(|(word, bits)| bits & (state.done(word) | state.kept(word)) == 0)
    }

    /// The part of a span for which there is room.
    fn clip(&self, span: Range<u32>, room: Room) -> Range<u32> {
        let granules = room.bytes().div_ceil(self.geometry.granule()).max(1);
        span.start..span.end.min(span.start.saturating_add(granules as u32))
    }

    /// Reads and saves.
    fn capture(&self, io: &impl Io<Task = T, Block = B>, capture: Capture) -> Result<(), Errno> {
        let bytes = self.bytes_of(capture.region, capture.local.clone());
        let Some(mut block) = io.alloc(bytes.len() as usize) else {
            return self.no_block(io, &capture);
        };
        let mut found = Found::default();
        self.read_old(io, bytes, &mut block, &mut found);
        if let Some((_, errno)) = found.error
            && self.on_error == OnError::BreakGuestWrite
        {
            self.abandon(io, &capture);
            return Err(errno);
        }
        let lost = found.error;
        let result = match capture.room {
            Room::Buffer(_) => {
                self.keep_in_ram(io, &capture, block, &found);
                Ok(())
            }
            Room::Through(_) => self.hand_over(io, Job { capture, found, block }),
        };
        if let Some((at, errno)) = lost {
            self.degrade(io, at, errno);
        }
        result
    }

    /// Saves old data by letting the log share its blocks. Where that fails data is copied, this
    /// and all that comes later. The guest waits for the filesystem that its own disk is on.
    fn share(&self, io: &impl Io<Task = T, Block = B>, capture: &Capture) {
        let bytes = self.bytes_of(capture.region, capture.local.clone());
        let granules = capture.granules(capture.mine).map(|local| capture.on_disk(local));
        if let Ok(placed) = self.place(granules) {
            let at = placed.offset(self.geometry.granule());
            let shared = self
                .watched(io, What::ShareLog, at, || io.share_source(bytes.start, at, bytes.len()));
            if shared.is_ok() {
                self.counters.shared_bytes.fetch_add(bytes.len(), Ordering::Relaxed);
                return self.publish_placed(io, capture, &Found::default(), placed);
            }
            self.finish_placed(io, placed);
        }
        self.share_from_bytes.store(u64::MAX, Ordering::Relaxed);
        self.abandon(io, capture);
    }

    /// Lets a flusher write old data through, and waits for that or for the end of the snapshot.
    fn hand_over(&self, io: &impl Io<Task = T, Block = B>, job: Job<B>) -> Result<(), Errno> {
        let Some(region) = self.region_of(&job.capture) else { return Ok(()) };
        let ticket = self.ram.lock().add_job(job);
        self.kick(io);
        loop {
            let mut state = region.lock();
            if let Some(result) = self.ram.lock().through_result(ticket) {
                return result;
            }
            // Under the region's lock: the end takes the waiters under it.
            if !self.is_capturing() {
                return Ok(());
            }
            state.waiters.push(io.current());
            drop(state);
            io.park();
        }
    }

    /// Writes old data through for a request that waits.
    pub(crate) fn carry_out(&self, io: &impl Io<Task = T, Block = B>, ticket: u64, job: Job<B>) {
        let Job { capture, found, block } = job;
        let placed = self.write_through(io, &capture, &block, &found);
        let result = match &placed {
            Err(errno) if self.on_error == OnError::BreakGuestWrite && self.is_capturing() => {
                Err(*errno)
            }
            // If the snapshot is to break, it does so before anybody goes on.
            Err(errno) => {
                let text = "write to the fleecing image failed".to_owned();
                self.break_snapshot(io, text, *errno);
                Ok(())
            }
            Ok(_) => Ok(()),
        };
        // Before the waiters are taken: they ask for it.
        self.ram.lock().finish_job(ticket, result);
        match placed {
            Ok(placed) => self.publish_placed(io, &capture, &found, placed),
            Err(_) => self.abandon(io, &capture),
        }
    }

    fn no_block(&self, io: &impl Io<Task = T, Block = B>, capture: &Capture) -> Result<(), Errno> {
        self.abandon(io, capture);
        if self.on_error == OnError::BreakGuestWrite {
            return Err(Errno::ENOMEM);
        }
        self.break_snapshot(io, "no memory for old data".to_owned(), Errno::ENOMEM);
        Ok(())
    }

    /// Reads the span with one request; after an error granule by granule, so that only what
    /// really cannot be read is lost.
    fn read_old(
        &self,
        io: &impl Io<Task = T, Block = B>,
        bytes: ByteRange,
        block: &mut B,
        found: &mut Found,
    ) {
        let len = bytes.len() as usize;
        let granule = self.geometry.granule() as usize;
        let whole = self.watched(io, What::ReadSource, bytes.start, || {
            io.read_source(bytes.start, block, 0, len)
        });
        for (index, at) in (0..len).step_by(granule).enumerate() {
            let part = granule.min(len - at);
            if whole.is_err() {
                let offset = bytes.start + at as u64;
                let read = self.watched(io, What::ReadSource, offset, || {
                    io.read_source(offset, block, at, part)
                });
                if let Err(errno) = read {
                    found.lost.insert(index);
                    found.error.get_or_insert((offset, errno));
                    continue;
                }
            }
            if is_zero(&block.as_ref()[at..at + part]) {
                found.zero.insert(index);
            }
        }
    }

    fn region_of(&self, capture: &Capture) -> Option<&Region<T>> {
        self.table.region(capture.region)
    }

    /// Gives a capture up: its granules are needed as before.
    fn abandon(&self, io: &impl Io<Task = T, Block = B>, capture: &Capture) {
        let mut woken = Vec::new();
        if let Some(region) = self.region_of(capture) {
            let mut state = region.lock();
            for (index, bits) in capture.still_reading(&state).into_iter().enumerate() {
                state.abandon_reading(capture.first_word() + index, bits);
            }
            woken = std::mem::take(&mut state.waiters);
        }
        wake(io, woken);
        self.give_room_back(io, Some(capture.room));
    }

    /// Publishes a capture whose data stays in RAM.
    fn keep_in_ram(
        &self,
        io: &impl Io<Task = T, Block = B>,
        capture: &Capture,
        block: B,
        found: &Found,
    ) {
        let Some(region) = self.region_of(capture) else { return };
        let Room::Buffer(cost) = capture.room else { return };
        let first = capture.on_disk(capture.local.start);
        let mut state = region.lock();
        let still = capture.still_reading(&state);
        let has_data = |local: &u32| {
            let index = capture.index(*local);
            !found.zero.contains(index) && !found.lost.contains(index)
        };
        let live = capture.granules(still).filter(has_data).count() as u32;
        let mut woken = Vec::new();
        let mut flush = false;
        let result = {
            let mut ram = self.ram.lock();
            let prepared = if live > 0 { ram.prepare_insert() } else { Ok(()) };
            let result = prepared.and_then(|()| {
                let id = if live > 0 { ram.insert(first, block, live, cost) } else { 0 };
                self.publish(&mut state, capture, still, found, |_| Location::Ram(id))
            });
            if live == 0 || result.is_err() {
                ram.free(capture.room);
                woken = ram.grant();
            }
            flush |= ram.flushers_wanted(self.is_quiesced(), MAX_FLUSHERS) > ram.flushers;
            result
        };
        woken.append(&mut state.waiters);
        drop(state);
        wake(io, woken);
        if result.is_err() {
            self.out_of_memory(io);
        } else if flush {
            self.kick(io);
        }
    }

    /// Publishes granules of a capture as saved at `locate`, as zero, or as lost.
    fn publish(
        &self,
        state: &mut Locked<'_, T>,
        capture: &Capture,
        still: [u64; PIECE_WORDS],
        found: &Found,
        mut locate: impl FnMut(u32) -> Location,
    ) -> Result<(), OutOfMemory> {
        let before = state.variable_bytes();
        let is_zero = |local: &u32| found.zero.contains(capture.index(*local));
        let entries = capture.granules(still).filter(|local| !is_zero(local)).count();
        state.places.reserve(entries)?;
        let (mut zero, mut data) = (0, 0);
        for local in capture.granules(still) {
            let index = capture.index(local);
            if found.lost.contains(index) {
                state.places.insert(local, Location::Lost);
            } else if found.zero.contains(index) {
                zero += 1;
            } else {
                data += 1;
                let location = locate(local);
                state.places.insert(local, location);
            }
        }
        for (index, bits) in still.into_iter().enumerate() {
            if bits != 0 {
                state.finish_reading(capture.first_word() + index, bits);
            }
        }
        let granule = self.geometry.granule();
        self.counters.zero_bytes.fetch_add(zero * granule, Ordering::Relaxed);
        self.counters.captured_bytes.fetch_add(data * granule, Ordering::Relaxed);
        self.table.book(before, state.variable_bytes())
    }

    /// Writes the data of a capture to the log.
    fn write_through(
        &self,
        io: &impl Io<Task = T, Block = B>,
        capture: &Capture,
        block: &B,
        found: &Found,
    ) -> Result<Placed, Errno> {
        let granules = capture.granules(capture.mine).filter_map(|local| {
            let index = capture.index(local);
            let has_data = !found.zero.contains(index) && !found.lost.contains(index);
            let at = index * self.geometry.granule() as usize;
            has_data.then_some((capture.on_disk(local), at))
        });
        self.write_now(io, granules, block.as_ref())
    }

    /// Publishes a capture whose data is in the log.
    fn publish_placed(
        &self,
        io: &impl Io<Task = T, Block = B>,
        capture: &Capture,
        found: &Found,
        mut placed: Placed,
    ) {
        let Some(region) = self.region_of(capture) else { return };
        let mut state = region.lock();
        let still = capture.still_reading(&state);
        let result = self.publish(&mut state, capture, still, found, |local| {
            Location::Log(placed.take(capture.on_disk(local)))
        });
        let woken = std::mem::take(&mut state.waiters);
        drop(state);
        wake(io, woken);
        self.give_room_back(io, Some(capture.room));
        // What was released while it was being written is not used.
        self.finish_placed(io, placed);
        if result.is_err() {
            self.out_of_memory(io);
        }
    }
}

/// The granules of `local` from the first to the last that is needed, and whether others are being
/// read.
fn needed_span<T>(state: &Locked<'_, T>, local: Range<u32>) -> (Option<Range<u32>>, bool) {
    let mut span: Option<Range<u32>> = None;
    let mut busy = false;
    for (word, bits) in words(local) {
        let open = bits & !state.done(word);
        let needed = open & !state.kept(word);
        busy |= open & state.kept(word) != 0;
        if needed != 0 {
            let base = word as u32 * 64;
            let first = span.map_or(base + needed.trailing_zeros(), |span| span.start);
            span = Some(first..base + 64 - needed.leading_zeros());
        }
    }
    (span, busy)
}

/// Whether all bytes are zero; compares words, which the compiler turns into vector code.
fn is_zero(data: &[u8]) -> bool {
    let (words, rest) = data.as_chunks::<64>();
    words.iter().all(|word| word.iter().fold(0, |or, byte| or | byte) == 0)
        && rest.iter().all(|&byte| byte == 0)
}
