// SPDX-License-Identifier: GPL-2.0-or-later
//! The engine of one disk: how it is set up, starts, ends, and what it reports.

use crate::group::Membership;
use crate::histogram::{Histogram, percentile};
use crate::log::{Full, Log};
use crate::ram::Ram;
use crate::range::{ByteRange, Geometry};
use crate::stats::{Counters, State, Stats};
use crate::sync::{AtomicBool, AtomicU32, AtomicU64, Mutex, Ordering};
use crate::table::Table;
use crate::watch::{Watch, What};
use crate::{Errno, Io, NeedMap, OutOfMemory};

/// The states of at most this much of the disk are looked at in one hold of a lock.
pub(crate) const LOOK_BYTES: u64 = 64 << 20;

/// Guest requests are captured.
pub(crate) const CAPTURING: u32 = 1;
/// Guest discards are postponed or being done; guest requests to them must ask.
pub(crate) const DISCARDS: u32 = 2;

/// What an error before the end of a guest request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnError {
    /// The snapshot loses the granule, or breaks; the guest goes on.
    #[default]
    BreakSnapshot,
    /// The guest request fails; the snapshot stays complete.
    BreakGuestWrite,
}

/// How an engine is set up.
pub struct Settings {
    /// Size and granules of the disk.
    pub geometry: Geometry,
    /// RAM for old data; 0 makes each guest request write its old data to the log itself.
    pub buffer_bytes: u64,
    /// Without progress of one piece for so long the snapshot breaks.
    pub timeout_ns: u64,
    /// Size of the fleecing image.
    pub image_bytes: u64,
    /// The image's space is given back in such segments; a multiple of its cluster size.
    pub segment_bytes: u64,
    /// Segments of the image in use at most; none means as many as it has.
    pub fleecing_limit_bytes: Option<u64>,
    /// Captures of at least so many bytes share the source's blocks with the log instead of being
    /// copied, as long as that works; none means never.
    pub share_from_bytes: Option<u64>,
    /// RAM for states of granules at most.
    pub metadata_limit_bytes: u64,
    /// What an error before the end of a guest request does.
    pub on_error: OnError,
    /// A cap on the RAM of several disks.
    pub group: Option<Membership>,
    /// What the reader needs; none means all.
    pub need: Option<Box<dyn NeedMap>>,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settings").field("geometry", &self.geometry).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Health {
    state: State,
    error: Option<(String, Errno)>,
}

/// Trims of parts of granules, by granule: a bit for each 64th of it.
pub(crate) type Partial = std::collections::BTreeMap<u64, u64>;

/// The engine of one disk; `T` is a waiting task and `B` a buffer, see [`Io`].
pub struct Engine<T: 'static, B> {
    pub(crate) geometry: Geometry,
    pub(crate) table: Table<T>,
    pub(crate) ram: Mutex<Ram<T, B>>,
    pub(crate) log: Mutex<Log>,
    pub(crate) partial: Mutex<Partial>,
    pub(crate) watch: Watch,
    pub(crate) counters: Counters,
    pub(crate) delays: Histogram,
    pub(crate) on_error: OnError,
    health: Mutex<Health>,
    /// [`CAPTURING`] and [`DISCARDS`]. Changed at the point in time and when the end is recorded.
    gate: AtomicU32,
    /// Background work stops at the next batch unless guest requests wait for it.
    quiesced: AtomicBool,
    /// Postponed discards are not done any more.
    pub(crate) discards_are_void: AtomicBool,
    /// Captures of at least so many bytes are shared; the maximum after one that failed.
    pub(crate) share_from_bytes: AtomicU64,
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
        let geometry = settings.geometry;
        Ok(Self {
            geometry,
            table: Table::new(geometry, settings.need, settings.metadata_limit_bytes)?,
            ram: Mutex::new(Ram::new(settings.buffer_bytes, settings.group)),
            log: Mutex::new(Log::new(
                geometry,
                settings.image_bytes,
                settings.segment_bytes,
                settings.fleecing_limit_bytes,
            )),
            partial: Mutex::new(Partial::new()),
            watch: Watch::new(),
            counters: Counters::new(),
            delays: Histogram::new(),
            on_error: settings.on_error,
            health: Mutex::new(Health::default()),
            gate: AtomicU32::new(0),
            quiesced: AtomicBool::new(false),
            discards_are_void: AtomicBool::new(false),
            share_from_bytes: AtomicU64::new(settings.share_from_bytes.unwrap_or(u64::MAX)),
            timeout_ns: settings.timeout_ns,
        })
    }

    /// Size and granules of the disk.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Starts capturing: the point in time. No guest request may be in flight.
    pub fn activate(&self) {
        self.gate.fetch_or(CAPTURING, Ordering::SeqCst);
    }

    /// Undoes [`Engine::activate`] before any guest request came.
    pub fn deactivate(&self) {
        self.gate.fetch_and(!CAPTURING, Ordering::SeqCst);
    }

    pub(crate) fn gate(&self) -> u32 {
        self.gate.load(Ordering::SeqCst)
    }

    pub(crate) fn is_capturing(&self) -> bool {
        self.gate() & CAPTURING != 0
    }

    /// Lets guest requests ask about discards from now on; false after the end of the snapshot. In
    /// one step, so that no request finds the gate open in between.
    pub(crate) fn note_discards(&self) -> bool {
        let add = |gate: u32| (gate & CAPTURING != 0).then_some(gate | DISCARDS);
        self.gate.fetch_update(Ordering::SeqCst, Ordering::SeqCst, add).is_ok()
    }

    pub(crate) fn forget_discards(&self) {
        self.gate.fetch_and(!DISCARDS, Ordering::SeqCst);
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
        {
            let mut health = self.health.lock();
            let open = matches!(health.state, State::Active | State::Degraded);
            if open || state == State::Closing {
                health.state = state;
            }
            if health.error.is_none() {
                health.error = error;
            }
        }
        // A reader whose data a passing guest request has overwritten sees this in its last check.
        self.deactivate();
        let (mut waiters, data) = self.ram.lock().end();
        drop(data);
        // Whoever waits for a capture has looked at the gate under its region's lock.
        for (_, region) in self.table.touched() {
            waiters.append(&mut region.lock().waiters);
        }
        wake(io, waiters);
    }

    /// Breaks the snapshot because its states have no more room.
    pub(crate) fn out_of_memory(&self, io: &impl Io<Task = T, Block = B>) {
        let text = match self.table.hit_limit() {
            Some(limit) => {
                format!("the states of granules need more than metadata-limit ({limit})")
            }
            None => "no memory for the states of granules".to_owned(),
        };
        self.break_snapshot(io, text, Errno::ENOMEM);
    }

    /// Breaks the snapshot because the log has no more room.
    pub(crate) fn log_full(&self, io: &impl Io<Task = T, Block = B>, full: Full) {
        let text = match full {
            Full::Image => "the fleecing image is full",
            Full::Limit => "the fleecing image has reached fleecing-limit",
            Full::Memory => return self.out_of_memory(io),
        };
        self.break_snapshot(io, text.to_owned(), Errno::ENOSPC);
    }

    /// Old data was lost to a read error.
    pub(crate) fn degrade(&self, io: &impl Io<Task = T, Block = B>, at: u64, errno: Errno) {
        {
            let mut health = self.health.lock();
            if health.state == State::Active {
                health.state = State::Degraded;
            }
            if health.error.is_none() {
                health.error = Some((format!("read of old data at {at} failed"), errno));
            }
        }
        io.notify();
    }

    /// Requests of our own in flight, reads for guest requests not counted.
    pub fn io_in_flight(&self) -> u64 {
        self.watch.count_own()
    }

    /// How long the oldest of those has been in flight.
    pub fn oldest_io_ns(&self, io: &impl Io<Task = T, Block = B>) -> Option<u64> {
        self.watch.oldest_own_ns(io.now_ns())
    }

    /// Breaks the snapshot when one of its requests makes no progress.
    pub fn check_timeout(&self, io: &impl Io<Task = T, Block = B>) {
        if !self.is_capturing() {
            return;
        }
        if let Some(text) = self.watch.late(io.now_ns(), self.timeout_ns) {
            self.break_snapshot(io, text, Errno::ETIMEDOUT);
        }
    }

    /// Runs `f` as a request that time-outs and teardown can see.
    pub(crate) fn watched<R>(
        &self,
        io: &impl Io<Task = T, Block = B>,
        what: What,
        at: u64,
        f: impl FnOnce() -> R,
    ) -> R {
        let _in_flight = self.watch.begin(what, at, io.now_ns());
        f()
    }

    /// Stops background work as far as no guest request waits for it.
    pub fn quiesce(&self) {
        self.quiesced.store(true, Ordering::Release);
    }

    pub(crate) fn is_quiesced(&self) -> bool {
        self.quiesced.load(Ordering::Acquire)
    }

    pub(crate) fn end_quiesce(&self) {
        self.quiesced.store(false, Ordering::Release);
    }

    /// The bytes of granules of a region.
    pub(crate) fn bytes_of(&self, region: usize, local: std::ops::Range<u32>) -> ByteRange {
        let first = region as u64 * crate::range::REGION_GRANULES;
        self.geometry.bytes(first + u64::from(local.start)..first + u64::from(local.end))
    }

    /// The counters now.
    pub fn stats(&self) -> Stats {
        let counts = self.delays.counts();
        let (state, error) = {
            let health = self.health.lock();
            (health.state, health.error.clone())
        };
        let (ram_bytes, ram_tables) = {
            let ram = self.ram.lock();
            (ram.used(), ram.bytes_of_tables())
        };
        let granule = self.geometry.granule();
        let (log_bytes, log_allocated_bytes, log_tables) = {
            let log = self.log.lock();
            (log.live() * granule, log.allocated_bytes(), log.metadata_bytes())
        };
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        Stats {
            state,
            error,
            captured_bytes: get(&counters.captured_bytes),
            ram_bytes,
            log_bytes,
            zero_bytes: get(&counters.zero_bytes),
            released_bytes: get(&counters.released_bytes),
            metadata_bytes: self.table.metadata_bytes() + ram_tables + log_tables,
            writes_delayed: counts.iter().map(|&(_, count)| count).sum(),
            delay_total_ns: get(&counters.delay_total_ns),
            delay_max_ns: get(&counters.delay_max_ns),
            delay_p50_ns: percentile(&counts, 500),
            delay_p99_ns: percentile(&counts, 990),
            delay_p999_ns: percentile(&counts, 999),
            delay_histogram: counts,
            overflows: get(&counters.overflows),
            written_bytes: get(&counters.written_bytes),
            shared_bytes: get(&counters.shared_bytes),
            log_allocated_bytes,
            postponed_bytes: get(&counters.postponed_granules) * granule,
        }
    }
}

pub(crate) fn wake<I: Io>(io: &I, tasks: Vec<I::Task>) {
    for task in tasks {
        io.unpark(task);
    }
}
