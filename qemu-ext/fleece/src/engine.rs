// SPDX-License-Identifier: GPL-2.0-or-later
//! The protocol: the order of lock, wait and I/O for guest requests, reader and flusher.
//!
//! No lock is held across a call of [`Io`] that may yield, and tasks are woken after the lock is
//! dropped. Whoever waits publishes itself in a list under the lock and is taken out of it by
//! exactly one waker.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::core::{Batch, Capture, Core, Found, Plan, Stored};
use crate::range::{ByteRange, Geometry, PIECE_BYTES};
use crate::stats::{State, Stats};
use crate::{Errno, Io, NeedMap, OutOfMemory};

/// About this much is written to the log at once.
const BATCH_BYTES: u64 = 256 << 10;
/// So many flushers at most.
const MAX_FLUSHERS: u32 = 4;
/// The states of at most this much of the disk are looked at in one hold of the lock.
const LOOK_BYTES: u64 = 64 << 20;
/// A write to the log is tried so often.
const WRITE_TRIES: u32 = 3;

/// How an engine is set up.
pub struct Settings {
    /// Size and granules of the disk.
    pub geometry: Geometry,
    /// RAM for old data; 0 makes each guest request wait until its old data is in the log.
    pub buffer_bytes: u64,
    /// Without progress of one piece for so long the snapshot breaks.
    pub timeout_ns: u64,
    /// The image's space is given back in such segments; a multiple of its cluster size.
    pub segment_bytes: u64,
    /// What the reader needs; none means all.
    pub need: Option<Box<dyn NeedMap>>,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settings").field("geometry", &self.geometry).finish_non_exhaustive()
    }
}

/// An I/O of ours in flight.
#[derive(Debug, Clone, Copy)]
struct Operation {
    started_ns: u64,
    what: What,
    at: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    ReadSource,
    ReadLog,
    WriteLog,
    Discard,
}

impl What {
    const fn sentence(self) -> &'static str {
        match self {
            Self::ReadSource => "read of old data from the disk",
            Self::ReadLog => "read from the fleecing image",
            Self::WriteLog => "write to the fleecing image",
            Self::Discard => "discard in the fleecing image",
        }
    }
}

struct Inner<T, B> {
    core: Core<B>,
    capture_waiters: Vec<T>,
    room_waiters: Vec<T>,
    flushers: u32,
    operations: BTreeMap<u64, Operation>,
    next_operation: u64,
}

/// The engine of one disk; `T` is a waiting task and `B` a buffer, see [`Io`].
pub struct Engine<T, B> {
    inner: Mutex<Inner<T, B>>,
    /// Whether guest requests must ask at all. Set before the snapshot's point in time, cleared
    /// after its end is recorded under the lock.
    capturing: AtomicBool,
    /// Background work stops at the next batch unless guest requests wait for it.
    quiesced: AtomicBool,
    geometry: Geometry,
    write_through: bool,
    low_watermark: u64,
    timeout_ns: u64,
}

impl<T, B> std::fmt::Debug for Engine<T, B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("geometry", &self.geometry).finish_non_exhaustive()
    }
}

impl<T: Send, B: AsRef<[u8]> + AsMut<[u8]> + Send + Sync> Engine<T, B> {
    /// An engine that captures nothing until [`Engine::activate`].
    ///
    /// # Errors
    /// No memory.
    pub fn new(settings: Settings) -> Result<Self, OutOfMemory> {
        let core = Core::new(
            settings.geometry,
            settings.buffer_bytes,
            settings.segment_bytes,
            settings.need,
        )?;
        Ok(Self {
            inner: Mutex::new(Inner {
                core,
                capture_waiters: Vec::new(),
                room_waiters: Vec::new(),
                flushers: 0,
                operations: BTreeMap::new(),
                next_operation: 0,
            }),
            capturing: AtomicBool::new(false),
            quiesced: AtomicBool::new(false),
            geometry: settings.geometry,
            write_through: settings.buffer_bytes == 0,
            low_watermark: settings.buffer_bytes / 2,
            timeout_ns: settings.timeout_ns,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner<T, B>> {
        // A panic under the lock ends the snapshot (see `break_snapshot`); the guest goes on.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Size and granules of the disk.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The counters now.
    pub fn stats(&self) -> Stats {
        self.lock().core.stats()
    }

    /// Starts capturing: the point in time. No guest request may be in flight.
    pub fn activate(&self) {
        self.capturing.store(true, Ordering::Release);
    }

    /// Undoes [`Engine::activate`] before any guest request came.
    pub fn deactivate(&self) {
        self.capturing.store(false, Ordering::Release);
    }

    /// Begins the teardown: nothing is captured any more, reads fail, background work ends.
    pub fn close(&self, io: &impl Io<Task = T, Block = B>) {
        self.end(io, State::Closing, None);
    }

    /// Breaks the snapshot, never the guest.
    pub fn break_snapshot(&self, io: &impl Io<Task = T, Block = B>, text: String, errno: Errno) {
        self.end(io, State::Broken, Some((text, errno)));
        io.notify();
    }

    fn end(&self, io: &impl Io<Task = T, Block = B>, state: State, error: Option<(String, Errno)>) {
        let mut inner = self.lock();
        inner.core.end(state, error);
        let mut waiters = std::mem::take(&mut inner.capture_waiters);
        waiters.append(&mut inner.room_waiters);
        // After the record, so that a reader whose guest request passed without capture sees it.
        self.capturing.store(false, Ordering::Release);
        drop(inner);
        wake(io, waiters);
    }

    fn out_of_memory(&self, io: &impl Io<Task = T, Block = B>, _: OutOfMemory) {
        self.break_snapshot(io, "no memory for the states of granules".into(), Errno::ENOMEM);
    }

    /// Fleecing-image requests in flight.
    pub fn log_io_in_flight(&self) -> u64 {
        let inner = self.lock();
        inner.operations.values().filter(|operation| operation.what != What::ReadSource).count()
            as u64
    }

    /// Breaks the snapshot when one of its requests makes no progress.
    pub fn check_timeout(&self, io: &impl Io<Task = T, Block = B>) {
        let now = io.now_ns();
        let late = {
            let inner = self.lock();
            if !inner.core.is_capturing() {
                return;
            }
            inner
                .operations
                .values()
                .find(|operation| now.saturating_sub(operation.started_ns) > self.timeout_ns)
                .copied()
        };
        if let Some(late) = late {
            let text = format!(
                "{} at offset {} made no progress for {} s",
                late.what.sentence(),
                late.at,
                self.timeout_ns / 1_000_000_000
            );
            self.break_snapshot(io, text, Errno::ETIMEDOUT);
        }
    }

    /// Runs `f` as an operation that time-outs and teardown can see.
    fn operation<R>(
        &self,
        io: &impl Io<Task = T, Block = B>,
        what: What,
        at: u64,
        f: impl FnOnce() -> R,
    ) -> R {
        let started_ns = io.now_ns();
        let id = {
            let mut inner = self.lock();
            let id = inner.next_operation;
            inner.next_operation += 1;
            inner.operations.insert(id, Operation { started_ns, what, at });
            id
        };
        let _ended = Ended { inner: &self.inner, id };
        f()
    }

    // ---- guest requests ----------------------------------------------------------------------

    /// Saves the old data of every granule that a guest request on `range` touches. When it
    /// returns, the request may be submitted; it never fails the guest.
    pub fn before_write(&self, io: &impl Io<Task = T, Block = B>, range: ByteRange) {
        if !self.capturing.load(Ordering::Acquire) {
            return;
        }
        let started_ns = io.now_ns();
        let mut delayed = false;
        for piece in range.pieces(PIECE_BYTES) {
            delayed |= self.before_write_piece(io, piece);
        }
        if delayed {
            self.note_delay(io.now_ns().saturating_sub(started_ns));
        }
    }

    /// How many bytes from `range.start` a discard or write-zeroes may take at once, and whether
    /// they need [`Engine::before_write`] first. Cut at multiples of `unit`, which is at least
    /// what the source can discard as a whole.
    pub fn next_part(&self, range: ByteRange, unit: u64) -> (u64, bool) {
        let mut pass = 0;
        for part in range.pieces(unit.max(PIECE_BYTES)) {
            if !self.may_pass(part) {
                return if pass > 0 { (pass, false) } else { (part.len(), true) };
            }
            pass += part.len();
        }
        (pass, false)
    }

    fn may_pass(&self, range: ByteRange) -> bool {
        range.pieces(LOOK_BYTES).all(|look| {
            !self.capturing.load(Ordering::Acquire) || self.lock().core.needs_nothing(look)
        })
    }

    fn note_delay(&self, delay_ns: u64) {
        let mut inner = self.lock();
        let stats = inner.core.stats_mut();
        stats.writes_delayed += 1;
        stats.delay_total_ns += delay_ns;
        stats.delay_max_ns = stats.delay_max_ns.max(delay_ns);
    }

    /// Whether the request was delayed.
    fn before_write_piece(&self, io: &impl Io<Task = T, Block = B>, piece: ByteRange) -> bool {
        let mut delayed = false;
        let mut captured = false;
        loop {
            let mut inner = self.lock();
            let plan = match inner.core.plan(piece) {
                Ok(plan) => plan,
                Err(error) => {
                    drop(inner);
                    self.out_of_memory(io, error);
                    return true;
                }
            };
            match plan {
                Plan::Pass => break,
                Plan::Busy => {
                    inner.capture_waiters.push(io.current());
                    drop(inner);
                    io.park();
                }
                Plan::NoRoom => {
                    inner.core.stats_mut().overflows += 1;
                    inner.room_waiters.push(io.current());
                    drop(inner);
                    self.kick(io);
                    io.park();
                }
                Plan::Capture(capture) => {
                    drop(inner);
                    self.capture(io, capture);
                    captured = true;
                }
            }
            delayed = true;
        }
        if captured && self.write_through {
            self.wait_for_log(io, piece);
        }
        delayed
    }

    fn capture(&self, io: &impl Io<Task = T, Block = B>, capture: Capture) {
        let mut found = Found::default();
        let block = self.read_old(io, &capture, &mut found);
        let degraded = found.error.is_some();
        let mut inner = self.lock();
        let used = inner.core.ram_used();
        let published = inner.core.publish(capture, block, &found);
        let mut waiters = std::mem::take(&mut inner.capture_waiters);
        if inner.core.ram_used() < used {
            // Nothing of it had to be kept: there is room again.
            waiters.append(&mut inner.room_waiters);
        }
        drop(inner);
        wake(io, waiters);
        match published {
            Err(error) => self.out_of_memory(io, error),
            Ok(()) if degraded => io.notify(),
            Ok(()) => {}
        }
        self.kick(io);
    }

    /// Reads the span with one request; after an error granule by granule, so that only what
    /// really cannot be read is lost.
    fn read_old(
        &self,
        io: &impl Io<Task = T, Block = B>,
        capture: &Capture,
        found: &mut Found,
    ) -> Option<B> {
        let bytes = capture.bytes;
        let len = bytes.len() as usize;
        let Some(mut block) = io.alloc(len) else {
            found.error = Some(Errno::ENOMEM);
            return None;
        };
        let whole = self.operation(io, What::ReadSource, bytes.start, || {
            io.read_source(bytes.start, &mut block, 0, len)
        });
        let granule = self.geometry.granule() as usize;
        for (index, at) in (0..len).step_by(granule).enumerate() {
            let part = granule.min(len - at);
            if whole.is_err() {
                let offset = bytes.start + at as u64;
                let read = self.operation(io, What::ReadSource, offset, || {
                    io.read_source(offset, &mut block, at, part)
                });
                if let Err(errno) = read {
                    found.lost.insert(index);
                    found.error.get_or_insert(errno);
                    continue;
                }
            }
            if is_zero(&block.as_ref()[at..at + part]) {
                found.zero.insert(index);
            }
        }
        Some(block)
    }

    fn wait_for_log(&self, io: &impl Io<Task = T, Block = B>, range: ByteRange) {
        loop {
            let mut inner = self.lock();
            if inner.core.none_in_ram(range) {
                return;
            }
            inner.room_waiters.push(io.current());
            drop(inner);
            self.kick(io);
            io.park();
        }
    }

    // ---- flusher -----------------------------------------------------------------------------

    /// Whether a flusher has something to do now.
    fn should_flush(&self, inner: &Inner<T, B>) -> bool {
        if !inner.core.has_unflushed() {
            return false;
        }
        // Guest requests that wait must be served even in a drained section: it waits for them.
        !inner.room_waiters.is_empty()
            || (inner.core.ram_used() > self.low_watermark
                && !self.quiesced.load(Ordering::Acquire))
    }

    /// Starts a flusher if there is work for one more.
    pub fn kick(&self, io: &impl Io<Task = T, Block = B>) {
        {
            let mut inner = self.lock();
            if inner.flushers >= MAX_FLUSHERS || !self.should_flush(&inner) {
                return;
            }
            inner.flushers += 1;
        }
        io.spawn_flusher();
    }

    /// Stops background work as far as no guest request waits for it.
    pub fn quiesce(&self) {
        self.quiesced.store(true, Ordering::Release);
    }

    /// Lets background work go on, once somebody calls [`Engine::kick`]; whether that is due.
    pub fn resume(&self) -> bool {
        self.quiesced.store(false, Ordering::Release);
        let inner = self.lock();
        inner.flushers < MAX_FLUSHERS && self.should_flush(&inner)
    }

    /// A flusher's next batch, to be given to [`Engine::flush`]; none ends the flusher. Called in
    /// a loop by each [`Io::spawn_flusher`].
    pub fn next_batch(&self, io: &impl Io<Task = T, Block = B>) -> Option<Batch<B>> {
        let batch = {
            let mut inner = self.lock();
            let batch = if self.should_flush(&inner) {
                inner.core.take_batch(BATCH_BYTES)
            } else {
                Ok(None)
            };
            if !matches!(batch, Ok(Some(_))) {
                // Counted down under the same lock, so that no kick is lost.
                inner.flushers -= 1;
            }
            batch
        };
        batch.unwrap_or_else(|error| {
            self.out_of_memory(io, error);
            None
        })
    }

    /// A flusher died (panicked) before it counted itself down.
    pub fn flusher_died(&self) {
        let mut inner = self.lock();
        inner.flushers = inner.flushers.saturating_sub(1);
    }

    /// Writes a batch to the log.
    pub fn flush(&self, io: &impl Io<Task = T, Block = B>, batch: Batch<B>) {
        let written = self.write_batch(io, &batch);
        let mut inner = self.lock();
        let completed = match written {
            Ok(()) => inner.core.complete_batch(batch),
            Err(_) => Ok(Vec::new()),
        };
        let waiters = std::mem::take(&mut inner.room_waiters);
        drop(inner);
        wake(io, waiters);
        match (written, completed) {
            (Err(errno), _) => {
                let text = "write to the fleecing image failed".to_owned();
                self.break_snapshot(io, text, errno);
            }
            (Ok(()), Err(error)) => self.out_of_memory(io, error),
            (Ok(()), Ok(back)) => self.give_back(io, back),
        }
    }

    /// A failed write is tried again in the same place: the log has no second one for it.
    fn write_batch(
        &self,
        io: &impl Io<Task = T, Block = B>,
        batch: &Batch<B>,
    ) -> Result<(), Errno> {
        let parts: Vec<&[u8]> = batch
            .parts
            .iter()
            .map(|(block, range)| &block.as_ref().as_ref()[range.clone()])
            .collect();
        if !parts.is_empty() {
            self.write_log(io, batch.offset, &parts)?;
        }
        match &batch.tail {
            Some((offset, block, range)) => {
                self.write_log(io, *offset, &[&block.as_ref().as_ref()[range.clone()]])
            }
            None => Ok(()),
        }
    }

    fn write_log(
        &self,
        io: &impl Io<Task = T, Block = B>,
        offset: u64,
        parts: &[&[u8]],
    ) -> Result<(), Errno> {
        let mut result = Ok(());
        for _ in 0..WRITE_TRIES {
            result = self.operation(io, What::WriteLog, offset, || io.write_log(offset, parts));
            if result.is_ok() || !self.capturing.load(Ordering::Acquire) {
                break;
            }
        }
        result
    }

    fn give_back(&self, io: &impl Io<Task = T, Block = B>, ranges: Vec<ByteRange>) {
        for range in ranges {
            self.operation(io, What::Discard, range.start, || {
                io.discard_log(range.start, range.len());
            });
        }
    }

    // ---- reader ------------------------------------------------------------------------------

    /// Reads the snapshot.
    ///
    /// # Errors
    /// `EPERM` for clean or released areas, `EIO` for lost ones and a lost snapshot; else the
    /// devices' errors.
    pub fn read<I: Io<Task = T, Block = B>>(
        &self,
        io: &I,
        range: ByteRange,
        buf: &mut I::Buf,
    ) -> Result<(), Errno> {
        for piece in range.pieces(PIECE_BYTES) {
            self.read_piece(io, range.start, piece, buf)?;
        }
        Ok(())
    }

    fn read_piece<I: Io<Task = T, Block = B>>(
        &self,
        io: &I,
        base: u64,
        piece: ByteRange,
        buf: &mut I::Buf,
    ) -> Result<(), Errno> {
        let mut fetch = self.lock().core.fetch(piece)?;
        // A granule goes from the source to RAM to the log and stays there: three looks suffice.
        loop {
            for run in &fetch.source {
                io.read_source_into(
                    run.start,
                    run.len() as usize,
                    buf,
                    (run.start - base) as usize,
                )?;
            }
            for (run, offset) in &fetch.log {
                self.operation(io, What::ReadLog, *offset, || {
                    let at = (run.start - base) as usize;
                    io.read_log_into(*offset, run.len() as usize, buf, at)
                })?;
            }
            let inner = self.lock();
            let more = inner.core.settle(piece, &fetch, |bytes, data| {
                let at = (bytes.start - base) as usize;
                match data {
                    Some(data) => io.copy_into(buf, at, data),
                    None => io.zero_into(buf, at, bytes.len() as usize),
                }
            })?;
            drop(inner);
            if more.log.is_empty() {
                return Ok(());
            }
            fetch.source.clear();
            fetch.log.extend(more.log.iter().copied());
            // What was read before is read again: rare, and simpler than remembering both.
        }
    }

    /// Whether the snapshot is known to be zero from `range.start`, and for how many bytes the
    /// answer holds. Clean, released and lost areas are data.
    ///
    /// # Errors
    /// `EIO` when the snapshot is lost; else the source's error.
    pub fn is_zero(
        &self,
        io: &impl Io<Task = T, Block = B>,
        range: ByteRange,
    ) -> Result<(u64, bool), Errno> {
        let range = range.intersect(ByteRange::at(range.start, LOOK_BYTES));
        loop {
            let (len, stored) = self.lock().core.stored(range)?;
            match stored {
                Stored::Zero => return Ok((len, true)),
                Stored::Data => return Ok((len, false)),
                Stored::Source => {}
            }
            let (known, zero) = io.source_is_zero(range.start, len)?;
            // The guest may have written or discarded meanwhile: only what is still not captured
            // can be believed. Each turn of the loop means that more of it was captured.
            let (still, stored) = self.lock().core.stored(ByteRange::at(range.start, known))?;
            if stored == Stored::Source {
                return Ok((still, zero));
            }
        }
    }

    /// Releases what lies wholly within `range`: it is never read again and need not be saved.
    pub fn release(&self, io: &impl Io<Task = T, Block = B>, range: ByteRange) {
        // Cut at multiples of the largest granule: none is split.
        for look in range.pieces(LOOK_BYTES) {
            self.release_part(io, look);
        }
    }

    fn release_part(&self, io: &impl Io<Task = T, Block = B>, range: ByteRange) {
        let mut inner = self.lock();
        let released = inner.core.release(range);
        let freed = matches!(released, Ok((_, true)));
        let waiters = if freed { std::mem::take(&mut inner.room_waiters) } else { Vec::new() };
        drop(inner);
        wake(io, waiters);
        match released {
            Ok((back, _)) => self.give_back(io, back),
            Err(error) => self.out_of_memory(io, error),
        }
    }
}

/// Forgets an operation when it is over, however it ends.
struct Ended<'a, T, B> {
    inner: &'a Mutex<Inner<T, B>>,
    id: u64,
}

impl<T, B> Drop for Ended<'_, T, B> {
    fn drop(&mut self) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.operations.remove(&self.id);
    }
}

fn wake<I: Io>(io: &I, tasks: Vec<I::Task>) {
    for task in tasks {
        io.unpark(task);
    }
}

/// Whether all bytes are zero; compares words, which the compiler turns into vector code.
fn is_zero(data: &[u8]) -> bool {
    let (words, rest) = data.as_chunks::<64>();
    words.iter().all(|word| word.iter().fold(0, |or, byte| or | byte) == 0)
        && rest.iter().all(|&byte| byte == 0)
}
