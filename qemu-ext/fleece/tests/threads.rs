// SPDX-License-Identifier: GPL-2.0-or-later
//! Real threads on one engine: guest writes, zeroes and discards, snapshot reads, releases,
//! flushers and drained sections all at once, as the queues of a disk call it. The oracle is that of
//! `schedule.rs`; here the machine decides who runs, so a failing seed says what was done, not in
//! which order. `THREADS_SECONDS` makes it longer.

#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use fleece::{
    ByteRange, Device, Discard, Engine, Errno, Fetch, Geometry, Io, OnError, Settings, State,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const SECTOR: u64 = 512;
/// 3 MiB and an odd tail.
const SIZE: u64 = (3 << 20) + 3 * SECTOR;
/// Who sleeps for longer was forgotten.
const FORGOTTEN: Duration = Duration::from_secs(60);
/// Operations of each thread in one round.
const OPERATIONS: u32 = 60;

type TestEngine = Engine<Arc<Token>, Vec<u8>>;

/// Where a thread sleeps.
#[derive(Default)]
struct Token {
    woken: Mutex<bool>,
    changed: Condvar,
}

/// What the guest does now, and what it must find.
struct Guest {
    /// A byte for each sector; nothing where it discarded last.
    disk: Vec<Option<u8>>,
    /// No two requests of the guest meet in a sector.
    requests: Vec<Range<u64>>,
    /// Those of them that write and were submitted.
    writes: Vec<Range<u64>>,
    /// What the fleecing image writes now.
    image_writes: Vec<Range<u64>>,
    released: Vec<bool>,
}

struct World {
    engine: TestEngine,
    original: Vec<u8>,
    source: Vec<AtomicU64>,
    image: Vec<AtomicU64>,
    guest: Mutex<Guest>,
    guest_changed: Condvar,
    flushers: Mutex<Vec<thread::JoinHandle<()>>>,
    ended: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn overlaps(ranges: &[Range<u64>], range: &Range<u64>) -> bool {
    ranges.iter().any(|other| other.start < range.end && range.start < other.end)
}

fn remove(ranges: &mut Vec<Range<u64>>, range: &Range<u64>) {
    let index = ranges.iter().position(|other| other == range).unwrap();
    ranges.swap_remove(index);
}

/// Sectors of a range of bytes.
fn sectors(range: &Range<u64>) -> Range<usize> {
    (range.start / SECTOR) as usize..(range.end / SECTOR) as usize
}

// ---- the engine's world ----------------------------------------------------------------------

/// The world as one thread sees it. Disks hold all bytes, in words without any order.
struct ThreadIo {
    world: Arc<World>,
    token: Arc<Token>,
}

impl ThreadIo {
    fn new(world: &Arc<World>) -> Self {
        Self { world: Arc::clone(world), token: Arc::default() }
    }
}

fn load(disk: &[AtomicU64], offset: u64, into: &mut [u8]) {
    for (bytes, word) in into.chunks_exact_mut(8).zip(&disk[offset as usize / 8..]) {
        bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
    }
}

fn fill(disk: &[AtomicU64], range: &Range<u64>, value: u8) {
    for word in &disk[range.start as usize / 8..range.end as usize / 8] {
        word.store(u64::from_ne_bytes([value; 8]), Ordering::Relaxed);
    }
}

impl Io for ThreadIo {
    type Task = Arc<Token>;
    type Block = Vec<u8>;
    type Buf = [u8];

    fn now_ns(&self) -> u64 {
        0
    }

    fn current(&self) -> Arc<Token> {
        Arc::clone(&self.token)
    }

    fn park(&self) {
        let mut woken = lock(&self.token.woken);
        while !*woken {
            let (guard, timeout) = self.token.changed.wait_timeout(woken, FORGOTTEN).unwrap();
            woken = guard;
            assert!(*woken || !timeout.timed_out(), "nobody wakes a task that waits");
        }
        *woken = false;
    }

    fn unpark(&self, task: Arc<Token>) {
        let mut woken = lock(&task.woken);
        assert!(!*woken, "a task is woken once for each time it waits");
        *woken = true;
        task.changed.notify_one();
    }

    fn spawn_flusher(&self) {
        let io = Self::new(&self.world);
        let flusher = thread::spawn(move || {
            while let Some(batch) = io.world.engine.next_batch(&io) {
                thread::yield_now();
                io.world.engine.flush(&io, batch);
            }
        });
        lock(&self.world.flushers).push(flusher);
    }

    fn notify(&self) {}

    fn alloc(&self, len: usize) -> Option<Vec<u8>> {
        Some(vec![0xAA; len])
    }

    fn read_source(
        &self,
        offset: u64,
        block: &mut Vec<u8>,
        at: usize,
        len: usize,
    ) -> Result<(), Errno> {
        load(&self.world.source, offset, &mut block[at..at + len]);
        Ok(())
    }

    fn fetch(&self, parts: &[Fetch], buf: &mut [u8]) -> Result<(), Errno> {
        for part in parts {
            let disk = match part.device {
                Device::Source => &self.world.source,
                Device::Log => &self.world.image,
            };
            load(disk, part.offset, &mut buf[part.at..part.at + part.len]);
        }
        Ok(())
    }

    fn source_is_zero(&self, offset: u64, len: u64) -> Result<(u64, bool), Errno> {
        let words = &self.world.source[offset as usize / 8..(offset + len) as usize / 8];
        let is_zero = |word: &AtomicU64| word.load(Ordering::Relaxed) == 0;
        let zero = is_zero(&words[0]);
        let same = words[1..].iter().take_while(|word| is_zero(word) == zero).count();
        Ok((8 * (1 + same as u64), zero))
    }

    fn discard_source(&self, offset: u64, len: u64) {
        let range = offset..offset + len;
        let check = || {
            let guest = lock(&self.world.guest);
            assert!(!overlaps(&guest.writes, &range), "{range:?} is discarded under a write");
            let kept = guest.disk[sectors(&range)].iter().any(Option::is_some);
            assert!(!kept, "a postponed discard of {range:?} destroys what the guest wrote later");
        };
        check();
        fill(&self.world.source, &range, 0);
        check();
    }

    fn write_log(&self, offset: u64, parts: &[&[u8]]) -> Result<(), Errno> {
        let data = parts.concat();
        let range = offset..offset + data.len() as u64;
        assert!(range.end <= SIZE, "{range:?} is beyond the image");
        lock(&self.world.guest).image_writes.push(range.clone());
        for (bytes, to) in data.chunks_exact(8).zip(&self.world.image[offset as usize / 8..]) {
            to.store(u64::from_ne_bytes(bytes.try_into().unwrap()), Ordering::Relaxed);
        }
        remove(&mut lock(&self.world.guest).image_writes, &range);
        Ok(())
    }

    fn share_source(&self, offset: u64, log_offset: u64, len: u64) -> Result<(), Errno> {
        let mut data = vec![0; len as usize];
        load(&self.world.source, offset, &mut data);
        self.write_log(log_offset, &[&data])
    }

    fn discard_log(&self, offset: u64, len: u64) {
        let range = offset..(offset + len).min(SIZE);
        let busy = || overlaps(&lock(&self.world.guest).image_writes, &range);
        assert!(!busy(), "a discard of {range:?} in the image meets a write in flight");
        fill(&self.world.image, &range, 0xDD);
        assert!(!busy(), "a write to {range:?} in the image meets a discard in flight");
    }

    fn copy_into(&self, buf: &mut [u8], at: usize, data: &[u8]) {
        buf[at..at + data.len()].copy_from_slice(data);
    }

    fn zero_into(&self, buf: &mut [u8], at: usize, len: usize) {
        buf[at..at + len].fill(0);
    }
}

// ---- what the threads do ---------------------------------------------------------------------

fn random_range(rng: &mut StdRng) -> Range<u64> {
    let most = if rng.random_ratio(1, 12) { 1200 } else { 40 };
    let start = rng.random_range(0..SIZE / SECTOR);
    let count = rng.random_range(1..=most.min(SIZE / SECTOR - start));
    start * SECTOR..(start + count) * SECTOR
}

fn bytes(range: &Range<u64>) -> ByteRange {
    ByteRange { start: range.start, end: range.end }
}

impl ThreadIo {
    /// Begins a guest request; waits while another one is in its sectors.
    fn begin(&self, range: &Range<u64>) {
        let mut guest = lock(&self.world.guest);
        while overlaps(&guest.requests, range) {
            guest = self.world.guest_changed.wait(guest).unwrap();
        }
        guest.requests.push(range.clone());
    }

    fn end(&self, range: &Range<u64>) {
        remove(&mut lock(&self.world.guest).requests, range);
        self.world.guest_changed.notify_all();
    }

    fn submit(&self, range: &Range<u64>, value: Option<u8>) {
        if value.is_some() {
            lock(&self.world.guest).writes.push(range.clone());
        }
        fill(&self.world.source, range, value.unwrap_or(0));
        let mut guest = lock(&self.world.guest);
        guest.disk[sectors(range)].fill(value);
        if value.is_some() {
            remove(&mut guest.writes, range);
        }
    }

    fn guest(&self, seed: u64) {
        let mut rng = StdRng::seed_from_u64(seed);
        let engine = &self.world.engine;
        for _ in 0..OPERATIONS {
            let range = random_range(&mut rng);
            self.begin(&range);
            match rng.random_range(0..6) {
                0 => self.discard(&range),
                1 => {
                    engine.before_write_zeroes(self, bytes(&range)).unwrap();
                    self.submit(&range, Some(0));
                }
                _ => {
                    engine.before_write(self, bytes(&range)).unwrap();
                    self.submit(&range, Some(rng.random_range(1..=255)));
                }
            }
            self.end(&range);
        }
    }

    fn discard(&self, range: &Range<u64>) {
        // From now on it may be done at any time.
        lock(&self.world.guest).disk[sectors(range)].fill(None);
        let mut rest = bytes(range);
        while !rest.is_empty() {
            let whole = range.end - range.start;
            let (len, what) = self.world.engine.next_discard(rest, whole).unwrap();
            if what == Discard::Pass {
                self.submit(&(rest.start..rest.start + len), None);
            }
            rest.start += len;
        }
    }

    fn read(&self, range: &Range<u64>) {
        let mut buf = vec![0xEE; (range.end - range.start) as usize];
        match self.world.engine.read(self, bytes(range), &mut buf) {
            Ok(()) => {
                let original = &self.world.original[range.start as usize..range.end as usize];
                assert!(buf == original, "wrong data in a read of {range:?}");
            }
            Err(Errno::EPERM) => {
                let guest = lock(&self.world.guest);
                // Of a granule that is released nothing can be read.
                let first = range.start / 4096 * 4096;
                let end = (range.end.div_ceil(4096) * 4096).min(SIZE);
                assert!(guest.released[sectors(&(first..end))].contains(&true), "EPERM: {range:?}");
            }
            Err(errno) => {
                assert!(self.world.ended.load(Ordering::SeqCst), "{errno:?} without a fault");
            }
        }
    }

    fn status(&self, range: &Range<u64>) {
        if let Ok((len, zero)) = self.world.engine.is_zero(self, bytes(range)) {
            assert!(len > 0 && len <= range.end - range.start);
            let original = &self.world.original[range.start as usize..][..len as usize];
            let truth = !zero || original.iter().all(|&byte| byte == 0);
            assert!(truth, "data reported as zero: {range:?}");
        }
    }

    fn reader(&self, seed: u64) {
        let mut rng = StdRng::seed_from_u64(seed);
        for _ in 0..OPERATIONS {
            let range = random_range(&mut rng);
            match rng.random_range(0..8) {
                0 => {
                    lock(&self.world.guest).released[sectors(&range)].fill(true);
                    self.world.engine.release(self, bytes(&range));
                }
                1 => self.status(&range),
                _ => self.read(&range),
            }
        }
    }

    fn drains(&self) {
        for _ in 0..OPERATIONS / 4 {
            self.world.engine.quiesce();
            thread::yield_now();
            if self.world.engine.resume() {
                self.world.engine.kick(self);
            }
            thread::yield_now();
        }
    }

    fn ends(&self, seed: u64) {
        let mut rng = StdRng::seed_from_u64(seed);
        thread::sleep(Duration::from_micros(rng.random_range(0..4000)));
        self.world.ended.store(true, Ordering::SeqCst);
        if rng.random() {
            self.world.engine.break_snapshot(self, "full".to_owned(), Errno::ENOSPC);
        } else {
            self.world.engine.close(self);
            self.world.engine.do_postponed(self);
        }
    }
}

// ---- a round ---------------------------------------------------------------------------------

fn world(rng: &mut StdRng) -> Arc<World> {
    let mut original = vec![0; SIZE as usize];
    for chunk in original.chunks_mut(4 * SECTOR as usize) {
        chunk.fill(if rng.random_ratio(1, 3) { 0 } else { rng.random_range(1..=255) });
    }
    let engine = Engine::new(Settings {
        geometry: Geometry::new(SIZE, SECTOR).unwrap(),
        // A piece always fits, little more does.
        buffer_bytes: if rng.random_ratio(1, 4) { 0 } else { 1 << 20 },
        timeout_ns: 1,
        image_bytes: SIZE,
        segment_bytes: 4096 * rng.random_range(1..20),
        fleecing_limit_bytes: None,
        share_from_bytes: rng.random_ratio(1, 4).then(|| 4096 * rng.random_range(1..5)),
        metadata_limit_bytes: u64::MAX,
        on_error: OnError::BreakSnapshot,
        group: None,
        need: None,
    })
    .unwrap();
    engine.activate();
    let word = |byte| AtomicU64::new(u64::from_ne_bytes([byte; 8]));
    Arc::new(World {
        engine,
        source: original.iter().step_by(8).map(|&byte| word(byte)).collect(),
        image: (0..SIZE / 8).map(|_| word(0xCC)).collect(),
        guest: Mutex::new(Guest {
            disk: original.iter().step_by(SECTOR as usize).copied().map(Some).collect(),
            requests: Vec::new(),
            writes: Vec::new(),
            image_writes: Vec::new(),
            released: vec![false; (SIZE / SECTOR) as usize],
        }),
        guest_changed: Condvar::new(),
        flushers: Mutex::new(Vec::new()),
        ended: AtomicBool::new(false),
        original,
    })
}

fn join_flushers(world: &World) {
    loop {
        let Some(flusher) = lock(&world.flushers).pop() else { return };
        flusher.join().unwrap();
    }
}

fn round(seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let world = world(&mut rng);
    let ends = rng.random_ratio(1, 4);
    thread::scope(|scope| {
        let mut start = |body: fn(&ThreadIo, u64)| {
            let (io, seed) = (ThreadIo::new(&world), rng.random());
            scope.spawn(move || body(&io, seed));
        };
        (0..4).for_each(|_| start(ThreadIo::guest));
        (0..3).for_each(|_| start(ThreadIo::reader));
        start(|io, _| io.drains());
        if ends {
            start(ThreadIo::ends);
        }
    });
    join_flushers(&world);
    settle(&world);
    join_flushers(&world);
}

/// What must hold when all threads have come to their end.
fn settle(world: &Arc<World>) {
    let engine = &world.engine;
    let io = ThreadIo::new(world);
    if !world.ended.load(Ordering::SeqCst) {
        assert_eq!(engine.stats().state, State::Active, "{:?}", engine.stats().error);
        assert!(!engine.resume(), "nobody flushes what should be flushed");
        engine.kick(&io);
        assert!(lock(&world.flushers).is_empty(), "nobody was told to go on flushing");
        for start in (0..SIZE).step_by(4096) {
            io.read(&(start..(start + 4096).min(SIZE)));
        }
        engine.release(&io, ByteRange { start: 0, end: SIZE });
        let stats = engine.stats();
        assert_eq!((stats.ram_bytes, stats.log_bytes), (0, 0), "left after the release");
    }
    engine.close(&io);
    engine.do_postponed(&io);
    let stats = engine.stats();
    assert_eq!((stats.ram_bytes, stats.postponed_bytes), (0, 0), "left after the end");
    assert!(!engine.has_postponed() && engine.io_in_flight() == 0);
    let guest = lock(&world.guest);
    for (sector, want) in guest.disk.iter().enumerate() {
        let mut is = [0; SECTOR as usize];
        load(&world.source, sector as u64 * SECTOR, &mut is);
        let right = want.is_none_or(|want| is.iter().all(|&byte| byte == want));
        assert!(right, "the guest's disk is wrong in sector {sector}");
    }
}

#[test]
fn many_threads_never_break_the_snapshot_or_the_guest() {
    let seconds = std::env::var("THREADS_SECONDS").ok().and_then(|text| text.parse().ok());
    let limit = Duration::from_secs(seconds.unwrap_or(3));
    let start = Instant::now();
    let mut seed = 0;
    while start.elapsed() < limit {
        println!("round {seed}");
        round(seed);
        seed += 1;
    }
    println!("{seed} rounds");
}
