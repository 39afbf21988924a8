// SPDX-License-Identifier: GPL-2.0-or-later
//! The world of the interleaving models: two tiny disks of one byte a granule, tasks that sleep on
//! a token, the oracle, and the roles that threads play.
//!
//! Disks are linearizable and order nothing but a read after the write that it sees: every other
//! order that the engine needs it must make itself. What must never be in flight at the same time
//! (guest requests to a granule, and the capture or a postponed discard of it) also goes through
//! checked cells, so that a missing order fails even where it does not change a byte.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex as Plain, MutexGuard, PoisonError};

use fleece::{
    ByteRange, Device, Discard, Engine, Errno, Fetch, Geometry, Group, Io, OnError, Settings, State,
};
use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::sync::{Condvar, Mutex};

/// Content of a block beside the first byte of a granule, where its content is not zero.
const FILLER: u8 = 0xAA;
const GARBAGE: usize = 0xDD;

/// What a model begins with.
#[derive(Clone)]
pub(crate) struct Setup {
    /// The disk, a byte for each granule.
    pub(crate) original: Vec<u8>,
    pub(crate) granule: u64,
    /// 0 lets each write go through to the log.
    pub(crate) buffer_bytes: u64,
    pub(crate) segment_granules: u64,
    /// A cap that makes room scarce, in granules.
    pub(crate) group_granules: Option<u64>,
    pub(crate) on_error: OnError,
    /// Old data is saved by sharing.
    pub(crate) shares: bool,
    /// So many requests to read old data fail, and to write it.
    pub(crate) failing_reads: u32,
    pub(crate) failing_writes: u32,
    /// Requests for old data and to the log hang until all other threads are done.
    pub(crate) hanging: bool,
    /// What happened before, one after the other.
    pub(crate) before: Vec<Role>,
}

impl Setup {
    /// Room for everything: nothing is ever flushed.
    pub(crate) fn roomy(original: &[u8]) -> Self {
        Self {
            original: original.to_vec(),
            granule: 4096,
            buffer_bytes: 1 << 20,
            segment_granules: 1,
            group_granules: None,
            on_error: OnError::BreakSnapshot,
            shares: false,
            failing_reads: 0,
            failing_writes: 0,
            hanging: false,
            before: Vec::new(),
        }
    }

    /// Every write writes its old data through to the log.
    pub(crate) fn through(original: &[u8]) -> Self {
        Self { buffer_bytes: 0, ..Self::roomy(original) }
    }

    /// Granules so large that two of them take all room of those that are written through.
    pub(crate) fn through_pressed(original: &[u8]) -> Self {
        Self { granule: 512 << 10, ..Self::through(original) }
    }

    /// The log shares the old data of every write.
    pub(crate) fn shared(original: &[u8]) -> Self {
        Self { shares: true, ..Self::roomy(original) }
    }

    /// As [`Setup::shared`], but the first attempt fails.
    pub(crate) fn failing_share(original: &[u8]) -> Self {
        Self { failing_writes: 1, ..Self::shared(original) }
    }

    /// Granules so large that already the first one in RAM should be flushed.
    pub(crate) fn pressed(original: &[u8]) -> Self {
        Self { granule: 512 << 10, ..Self::roomy(original) }
    }

    /// Granules so large that each is a batch of its own, and the third one asks for a second
    /// flusher.
    pub(crate) fn batches(original: &[u8]) -> Self {
        Self { granule: 256 << 10, ..Self::roomy(original) }
    }

    /// Granules of which seven fill the buffer.
    pub(crate) fn full(original: &[u8]) -> Self {
        Self { granule: 128 << 10, ..Self::roomy(original) }
    }

    pub(crate) fn segments(mut self, granules: u64) -> Self {
        self.segment_granules = granules;
        self
    }

    /// Room for `granules` granules in RAM.
    pub(crate) fn scarce(original: &[u8], granules: u64) -> Self {
        Self { group_granules: Some(granules), ..Self::roomy(original) }
    }

    /// One capture of one granule fails: it is tried as a whole, then by granules.
    pub(crate) fn failing_capture(mut self, on_error: OnError) -> Self {
        (self.failing_reads, self.on_error) = (2, on_error);
        self
    }

    /// One write to the log fails, each time that it is tried.
    pub(crate) fn failing_log(mut self, on_error: OnError) -> Self {
        (self.failing_writes, self.on_error) = (3, on_error);
        self
    }

    pub(crate) fn hanging(mut self) -> Self {
        self.hanging = true;
        self
    }

    pub(crate) fn after(mut self, before: &[Role]) -> Self {
        self.before = before.to_vec();
        self
    }
}

/// What one thread does. Ranges are of granules.
#[derive(Debug, Clone)]
pub(crate) enum Role {
    Write(Range<u64>, u8),
    /// A write of zeroes that asks where the disk is zero already.
    Zeroes(Range<u64>),
    Discard(Range<u64>),
    Read(Range<u64>),
    Status(Range<u64>),
    Release(Range<u64>),
    /// All flushers that are asked for until the other threads are done.
    Flush,
    Break,
    /// The end of the backup, and the discards that waited for it.
    Close,
    /// A drained section.
    Drain,
}

/// Where a task sleeps. Woken exactly once for each time that it was published.
#[derive(Default)]
pub(crate) struct Token {
    woken: Mutex<bool>,
    changed: Condvar,
}

struct Guest {
    /// What the guest must find; nothing where it discarded last.
    disk: Vec<Option<u8>>,
    released: Vec<bool>,
    /// Positions of the image that are being written, and that ever were.
    writing: Vec<bool>,
    written: Vec<bool>,
    ended: bool,
    /// Old data may be lost.
    faulty: bool,
    failing_reads: u32,
    failing_writes: u32,
}

/// A block of old data; most are used again.
pub(crate) struct Block(Vec<u8>);

static SPARE: Plain<Vec<Vec<u8>>> = Plain::new(Vec::new());

impl AsRef<[u8]> for Block {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl AsMut<[u8]> for Block {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if self.0.get(1) == Some(&FILLER) {
            plain(&SPARE).push(std::mem::take(&mut self.0));
        }
    }
}

fn plain<T>(mutex: &Plain<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

type ModelEngine = Engine<Arc<Token>, Block>;

/// Everything that the threads of a model share.
pub(crate) struct World {
    engine: ModelEngine,
    granule: u64,
    segment_bytes: u64,
    /// An error breaks the snapshot, not the guest's write.
    breaks: bool,
    hanging: bool,
    /// A thread that waits carries out the flushers that were asked for, as coroutines of one
    /// thread do.
    flushes_itself: bool,
    original: Vec<u8>,
    source: Vec<AtomicUsize>,
    image: Vec<AtomicUsize>,
    /// Exclusive for captures, shared for guest requests.
    captures: Vec<UnsafeCell<()>>,
    /// Exclusive for postponed discards, shared for guest writes.
    discards: Vec<UnsafeCell<()>>,
    /// Not visible to loom: only changed in one step with something that is.
    guest: Plain<Guest>,
    flushers: Mutex<Flushers>,
    flusher_wanted: Condvar,
}

#[derive(Default)]
struct Flushers {
    wanted: u32,
    /// Threads that may still ask for one.
    working: usize,
}

/// The engine's world as one thread sees it.
pub(crate) struct TaskIo {
    world: Arc<World>,
    token: Arc<Token>,
}

impl TaskIo {
    fn granules(&self, offset: u64, len: u64) -> Range<usize> {
        let granule = self.world.granule;
        assert!(offset.is_multiple_of(granule) && len.is_multiple_of(granule));
        (offset / granule) as usize..((offset + len) / granule) as usize
    }

    /// A read sees the last write, and is ordered after it.
    fn see(disk: &[AtomicUsize], at: usize) -> u8 {
        disk[at].fetch_or(0, Ordering::Acquire) as u8
    }

    /// Hangs until at most `left` threads are at work.
    fn hang(&self, left: usize) {
        if self.world.hanging {
            let mut flushers = self.world.flushers.lock().unwrap();
            while flushers.working > left {
                flushers = self.world.flusher_wanted.wait(flushers).unwrap();
            }
        }
    }

    /// Positions of the image are written once.
    fn begin_writing(&self, positions: Range<usize>) {
        for position in positions {
            let mut guest = plain(&self.world.guest);
            guest.writing[position] = true;
            assert!(!guest.written[position], "log position {position} is used again");
            guest.written[position] = true;
        }
    }

    fn change(disk: &[AtomicUsize], at: usize, value: usize) {
        disk[at].swap(value, Ordering::Release);
    }
}

impl Io for TaskIo {
    type Task = Arc<Token>;
    type Block = Block;
    /// A byte for each granule.
    type Buf = [u8];

    fn now_ns(&self) -> u64 {
        0
    }

    fn current(&self) -> Arc<Token> {
        Arc::clone(&self.token)
    }

    fn park(&self) {
        while self.world.flushes_itself && self.flush_once() {}
        let mut woken = self.token.woken.lock().unwrap();
        while !*woken {
            woken = self.token.changed.wait(woken).unwrap();
        }
        *woken = false;
    }

    fn unpark(&self, task: Arc<Token>) {
        let mut woken = task.woken.lock().unwrap();
        assert!(!*woken, "a task is woken once for each time it waits");
        *woken = true;
        task.changed.notify_one();
    }

    fn spawn_flusher(&self) {
        self.world.flushers.lock().unwrap().wanted += 1;
        self.world.flusher_wanted.notify_one();
    }

    fn notify(&self) {}

    fn alloc(&self, len: usize) -> Option<Block> {
        let mut spare = plain(&SPARE);
        let old = spare.iter().position(|block| block.len() == len);
        Some(Block(old.map_or_else(|| vec![FILLER; len], |index| spare.swap_remove(index))))
    }

    fn read_source(
        &self,
        offset: u64,
        block: &mut Block,
        at: usize,
        len: usize,
    ) -> Result<(), Errno> {
        // The guest's own request is at work.
        self.hang(1);
        let granule = self.world.granule as usize;
        for (nth, index) in self.granules(offset, len as u64).enumerate() {
            let byte = Self::see(&self.world.source, index);
            self.world.captures[index].with_mut(|_| ());
            let mut guest = plain(&self.world.guest);
            if guest.failing_reads > 0 {
                guest.failing_reads -= 1;
                guest.faulty = true;
                return Err(Errno::EIO);
            }
            let begin = at + nth * granule;
            if byte == 0 {
                block.0[begin..begin + granule].fill(0);
            } else {
                block.0[begin] = byte;
            }
        }
        Ok(())
    }

    fn fetch(&self, parts: &[Fetch], buf: &mut [u8]) -> Result<(), Errno> {
        let granule = self.world.granule as usize;
        for part in parts {
            let disk = match part.device {
                Device::Source => &self.world.source,
                Device::Log => &self.world.image,
            };
            for (nth, index) in self.granules(part.offset, part.len as u64).enumerate() {
                buf[part.at / granule + nth] = Self::see(disk, index);
            }
        }
        Ok(())
    }

    fn source_is_zero(&self, offset: u64, _len: u64) -> Result<(u64, bool), Errno> {
        let index = (offset / self.world.granule) as usize;
        Ok((self.world.granule, Self::see(&self.world.source, index) == 0))
    }

    fn discard_source(&self, offset: u64, len: u64) {
        for index in self.granules(offset, len) {
            Self::change(&self.world.source, index, 0);
            self.world.discards[index].with_mut(|_| ());
            let kept = plain(&self.world.guest).disk[index];
            assert_eq!(kept, None, "a postponed discard destroys what the guest wrote later");
        }
    }

    fn write_log(&self, offset: u64, parts: &[&[u8]]) -> Result<(), Errno> {
        let granule = self.world.granule as usize;
        // A flusher does not count.
        self.hang(0);
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        let positions = self.granules(offset, bytes as u64);
        {
            let mut guest = plain(&self.world.guest);
            if guest.failing_writes > 0 {
                guest.failing_writes -= 1;
                // The last try.
                guest.ended |= guest.failing_writes == 0 && self.world.breaks;
                return Err(Errno::EIO);
            }
        }
        self.begin_writing(positions.clone());
        let bytes = parts.iter().flat_map(|part| part.chunks(granule)).map(|chunk| chunk[0]);
        for (position, byte) in positions.zip(bytes) {
            Self::change(&self.world.image, position, byte.into());
            plain(&self.world.guest).writing[position] = false;
        }
        Ok(())
    }

    fn share_source(&self, offset: u64, log_offset: u64, len: u64) -> Result<(), Errno> {
        {
            let mut guest = plain(&self.world.guest);
            if guest.failing_writes > 0 {
                guest.failing_writes -= 1;
                return Err(Errno::EIO);
            }
        }
        let positions = self.granules(log_offset, len);
        self.begin_writing(positions.clone());
        for (index, position) in self.granules(offset, len).zip(positions) {
            let byte = Self::see(&self.world.source, index);
            self.world.captures[index].with_mut(|_| ());
            Self::change(&self.world.image, position, byte.into());
            plain(&self.world.guest).writing[position] = false;
        }
        Ok(())
    }

    fn discard_log(&self, offset: u64, len: u64) {
        for position in self.granules(offset, len) {
            Self::change(&self.world.image, position, GARBAGE);
            let busy = plain(&self.world.guest).writing[position];
            assert!(!busy, "a discard of log position {position} meets a write in flight");
        }
    }

    fn copy_into(&self, buf: &mut [u8], at: usize, data: &[u8]) {
        let granule = self.world.granule as usize;
        for (nth, chunk) in data.chunks(granule).enumerate() {
            buf[at / granule + nth] = chunk[0];
        }
    }

    fn zero_into(&self, buf: &mut [u8], at: usize, len: usize) {
        let granule = self.world.granule as usize;
        buf[at / granule..(at + len) / granule].fill(0);
    }
}

// ---- roles -----------------------------------------------------------------------------------

impl TaskIo {
    fn new(world: &Arc<World>) -> Self {
        Self { world: Arc::clone(world), token: Arc::default() }
    }

    fn bytes(&self, granules: &Range<u64>) -> ByteRange {
        let granule = self.world.granule;
        ByteRange { start: granules.start * granule, end: granules.end * granule }
    }

    fn play(&self, role: &Role) {
        let engine = &self.world.engine;
        match role {
            Role::Write(granules, fill) => match engine.before_write(self, self.bytes(granules)) {
                Ok(()) => self.submit(granules, Some(*fill)),
                Err(_) => assert!(!self.world.breaks, "an error reaches the guest"),
            },
            Role::Zeroes(granules) => {
                engine.before_write_zeroes(self, self.bytes(granules)).unwrap();
                self.submit(granules, Some(0));
            }
            Role::Discard(granules) => self.discard(granules),
            Role::Read(granules) => self.read(granules),
            Role::Status(granules) => self.status(granules),
            Role::Release(granules) => {
                for granule in granules.clone() {
                    plain(&self.world.guest).released[granule as usize] = true;
                }
                engine.release(self, self.bytes(granules));
            }
            Role::Flush => self.run_flushers(),
            Role::Break => {
                plain(&self.world.guest).ended = true;
                engine.break_snapshot(self, "broken by the model".to_owned(), Errno::ENOSPC);
            }
            Role::Close => {
                plain(&self.world.guest).ended = true;
                engine.close(self);
                engine.do_postponed(self);
            }
            Role::Drain => {
                engine.quiesce();
                if engine.resume() {
                    engine.kick(self);
                }
            }
        }
    }

    /// Carries a guest request out; with a fill of none it is a discard.
    fn submit(&self, granules: &Range<u64>, fill: Option<u8>) {
        for index in granules.start as usize..granules.end as usize {
            Self::change(&self.world.source, index, fill.unwrap_or(0).into());
            let mut guest = plain(&self.world.guest);
            // Captures of what is not needed any more are thrown away.
            if !guest.ended && !guest.released[index] {
                self.world.captures[index].with(|_| ());
            }
            if fill.is_some() {
                self.world.discards[index].with(|_| ());
            }
            guest.disk[index] = fill;
        }
    }

    fn discard(&self, granules: &Range<u64>) {
        // From now on it may be done at any time.
        for index in granules.clone() {
            plain(&self.world.guest).disk[index as usize] = None;
        }
        let whole = self.bytes(granules);
        let mut rest = whole;
        while !rest.is_empty() {
            let (len, what) = self.world.engine.next_discard(rest, whole.len()).unwrap();
            let part = ByteRange::at(rest.start, len);
            let part = part.start / self.world.granule..part.end / self.world.granule;
            if what == Discard::Pass {
                self.submit(&part, None);
            }
            rest.start += len;
        }
    }

    fn read(&self, granules: &Range<u64>) {
        let mut buf = vec![0xEE; (granules.end - granules.start) as usize];
        let result = self.world.engine.read(self, self.bytes(granules), &mut buf);
        let span = granules.start as usize..granules.end as usize;
        let guest = plain(&self.world.guest);
        match result {
            Ok(()) => assert_eq!(buf, self.world.original[span], "wrong data in a read"),
            Err(Errno::EPERM) => {
                assert!(guest.released[span].contains(&true), "EPERM, but nothing was released");
            }
            Err(errno) => assert!(guest.ended || guest.faulty, "{errno:?} without a fault"),
        }
    }

    fn status(&self, granules: &Range<u64>) {
        let range = self.bytes(granules);
        match self.world.engine.is_zero(self, range) {
            Ok((len, zero)) => {
                assert!(len > 0 && len <= range.len());
                let count = (len / self.world.granule) as usize;
                let known = &self.world.original[granules.start as usize..][..count];
                assert!(!zero || known.iter().all(|&byte| byte == 0), "data reported as zero");
            }
            Err(errno) => assert!(plain(&self.world.guest).ended, "{errno:?} without a fault"),
        }
    }

    fn run_flushers(&self) {
        loop {
            {
                let mut flushers = self.world.flushers.lock().unwrap();
                while flushers.wanted == 0 && flushers.working > 0 {
                    flushers = self.world.flusher_wanted.wait(flushers).unwrap();
                }
                if flushers.wanted == 0 {
                    return;
                }
            }
            self.flush_once();
        }
    }

    /// Carries one flusher out, if one was asked for.
    fn flush_once(&self) -> bool {
        {
            let mut flushers = self.world.flushers.lock().unwrap();
            if flushers.wanted == 0 {
                return false;
            }
            flushers.wanted -= 1;
        }
        while let Some(batch) = self.world.engine.next_batch(self) {
            self.world.engine.flush(self, batch);
        }
        true
    }

    /// Plays a role in a thread beside others.
    fn play_beside(&self, role: &Role) {
        self.play(role);
        if !matches!(role, Role::Flush) {
            self.world.flushers.lock().unwrap().working -= 1;
            self.world.flusher_wanted.notify_all();
        }
    }
}

// ---- a model ---------------------------------------------------------------------------------

#[expect(clippy::arc_with_non_send_sync, reason = "loom's threads take turns in one thread")]
fn world(setup: &Setup, roles: &[Role]) -> Arc<World> {
    let count = setup.original.len();
    let group = setup.group_granules.map(|granules| {
        let limit = granules * (setup.granule + 128);
        Arc::new(Group::new(limit)).join(Box::new(|| {}))
    });
    let size = count as u64 * setup.granule;
    let engine = Engine::new(Settings {
        geometry: Geometry::new(size, setup.granule).unwrap(),
        buffer_bytes: setup.buffer_bytes,
        timeout_ns: 1,
        image_bytes: size,
        segment_bytes: setup.segment_granules * setup.granule,
        fleecing_limit_bytes: None,
        share_from_bytes: setup.shares.then_some(setup.granule),
        metadata_limit_bytes: u64::MAX,
        on_error: setup.on_error,
        group,
        need: None,
    })
    .unwrap();
    engine.activate();
    Arc::new(World {
        engine,
        granule: setup.granule,
        segment_bytes: setup.segment_granules * setup.granule,
        breaks: setup.on_error == OnError::BreakSnapshot,
        hanging: setup.hanging,
        flushes_itself: !setup.hanging && !roles.iter().any(|role| matches!(role, Role::Flush)),
        original: setup.original.clone(),
        source: setup.original.iter().map(|&byte| AtomicUsize::new(byte.into())).collect(),
        image: (0..count).map(|_| AtomicUsize::new(0xCC)).collect(),
        captures: (0..count).map(|_| UnsafeCell::new(())).collect(),
        discards: (0..count).map(|_| UnsafeCell::new(())).collect(),
        guest: Plain::new(Guest {
            disk: setup.original.iter().copied().map(Some).collect(),
            released: vec![false; count],
            writing: vec![false; count],
            written: vec![false; count],
            ended: false,
            faulty: false,
            failing_reads: setup.failing_reads,
            failing_writes: setup.failing_writes,
        }),
        flushers: Mutex::default(),
        flusher_wanted: Condvar::new(),
    })
}

/// What must hold when all threads have come to their end.
fn settle(io: &TaskIo) {
    let world = &io.world;
    let engine = &world.engine;
    io.run_flushers();
    let all = 0..world.original.len() as u64;
    let (ended, faulty) = {
        let mut guest = plain(&world.guest);
        let lost = guest.faulty && world.breaks;
        guest.faulty = lost;
        (guest.ended, lost)
    };
    if !ended {
        let state = if faulty { State::Degraded } else { State::Active };
        assert_eq!(engine.stats().state, state);
        assert!(!engine.resume(), "nobody flushes what should be flushed");
        engine.kick(io);
        assert_eq!(world.flushers.lock().unwrap().wanted, 0, "nobody was told to go on flushing");
        for granule in all.clone() {
            io.read(&(granule..granule + 1));
        }
        io.play(&Role::Release(all));
        let stats = engine.stats();
        assert_eq!((stats.ram_bytes, stats.log_bytes), (0, 0), "left after the release");
        // A segment at the head may still be filled.
        assert!(stats.log_allocated_bytes <= world.segment_bytes, "{stats:?}");
    }
    io.play(&Role::Close);
    let stats = engine.stats();
    assert_eq!((stats.ram_bytes, stats.postponed_bytes), (0, 0), "left after the end");
    assert!(!engine.has_postponed() && engine.io_in_flight() == 0);
    for (index, want) in plain(&world.guest).disk.iter().enumerate() {
        let is = TaskIo::see(&world.source, index);
        assert!(want.is_none_or(|want| want == is), "the guest's disk is wrong at {index}");
    }
}

/// With more preemptions than a model's bound, a few models of three threads have more interleavings than a night
/// is long.
const MORE_WITHIN: std::time::Duration = std::time::Duration::from_secs(600);

/// Explores the interleavings of `roles`, one thread each, with at most `bound` preemptions, or
/// `LOOM_MORE_PREEMPTIONS` more: of those as many as there is time for.
pub(crate) fn explore(name: &str, bound: usize, setup: Setup, roles: &[Role]) {
    assert!(roles.len() <= 3);
    let more = std::env::var("LOOM_MORE_PREEMPTIONS").ok();
    let more = more.and_then(|more| more.parse().ok()).unwrap_or(0);
    let bound = bound + more;
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(bound);
    builder.expect_explicit_explore = true;
    builder.max_branches = 20_000;
    builder.max_duration = (more > 0).then_some(MORE_WITHIN);
    let roles = roles.to_vec();
    let count = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&count);
    let start = std::time::Instant::now();
    builder.check(move || {
        counted.fetch_add(1, Relaxed);
        let world = world(&setup, &roles);
        let main = TaskIo::new(&world);
        setup.before.iter().for_each(|role| main.play(role));
        let working = roles.iter().filter(|role| !matches!(role, Role::Flush)).count();
        main.world.flushers.lock().unwrap().working = working;
        loom::explore();
        let (mine, others) = roles.split_first().unwrap();
        let threads: Vec<_> = others
            .iter()
            .map(|role| {
                let (io, role) = (TaskIo::new(&world), role.clone());
                loom::thread::spawn(move || io.play_beside(&role))
            })
            .collect();
        main.play_beside(mine);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        loom::stop_exploring();
        settle(&main);
    });
    let time = start.elapsed();
    println!(
        "{name}: {} interleavings{}, preemption bound {bound}, {:.1} s",
        count.load(Relaxed),
        if more > 0 && time >= MORE_WITHIN { " and not all" } else { "" },
        time.as_secs_f64()
    );
}
