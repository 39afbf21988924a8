// SPDX-License-Identifier: GPL-2.0-or-later
//! Random schedules of writers, readers and flushers against a one-sentence oracle: a successful
//! snapshot read returns the content at the point in time. Beside it, the guest's own disk: what it
//! wrote stays, whatever becomes of its discards.
//!
//! Each task is a thread, but only one runs at a time: at every I/O, every wait and every wake-up
//! the seeded scheduler decides who goes on, so a failing seed repeats exactly:
//! `SCHEDULE_SEED=<seed> cargo test -p fleece --test schedule`. I/O is done in two halves, with
//! other tasks in between.

#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::collections::BTreeSet;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use fleece::{
    ByteRange, Device, Discard, Engine, Errno, Fetch, Geometry, Group, Io, NeedMap, OnError,
    Settings, State,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const GRANULE: u64 = 4096;

// ---- scheduler -------------------------------------------------------------------------------

/// Who runs, who may run, who waits.
struct Turns {
    running: Option<usize>,
    ready: BTreeSet<usize>,
    parked: BTreeSet<usize>,
    tokens: BTreeSet<usize>,
    next_task: usize,
    unfinished: usize,
    rng: StdRng,
    failed: Option<String>,
}

struct World {
    turns: Mutex<Turns>,
    changed: Condvar,
    disks: Mutex<Disks>,
    engine: Mutex<Option<Arc<SimEngine>>>,
    faults: Faults,
    threads: Mutex<Vec<thread::JoinHandle<()>>>,
}

type SimEngine = Engine<usize, Vec<u8>>;

#[derive(Debug, Clone, Copy, Default)]
struct Faults {
    log_write: bool,
    source_read: bool,
    alloc: bool,
    share: bool,
}

impl Faults {
    fn any(self) -> bool {
        self.log_write || self.source_read || self.alloc
    }
}

struct Disks {
    original: Vec<u8>,
    source: Vec<u8>,
    image: Vec<u8>,
    image_writes: Vec<Range<u64>>,
    /// Guest requests that were submitted and are not complete.
    guest_writes: Vec<Range<usize>>,
    /// What the guest must find on its disk; nothing where it discarded last.
    guest: Vec<Option<u8>>,
    released: Vec<ByteRange>,
    rng: StdRng,
    faults_hit: u32,
}

thread_local! {
    static ME: std::cell::Cell<usize> = const { std::cell::Cell::new(usize::MAX) };
}

impl World {
    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn disks(&self) -> MutexGuard<'_, Disks> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a task; it waits for its turn.
    fn start(self: &Arc<Self>, body: impl FnOnce(SimIo) + Send + 'static) {
        let id = {
            let mut turns = self.turns();
            let id = turns.next_task;
            turns.next_task += 1;
            turns.unfinished += 1;
            turns.ready.insert(id);
            id
        };
        let world = Arc::clone(self);
        let handle = thread::spawn(move || {
            ME.with(|me| me.set(id));
            world.wait_for_turn(id);
            let io = SimIo { world: Arc::clone(&world) };
            let outcome = catch_unwind(AssertUnwindSafe(|| body(io)));
            let mut turns = world.turns();
            turns.unfinished -= 1;
            turns.running = None;
            if let Err(panic) = outcome {
                let text = panic
                    .downcast_ref::<String>()
                    .cloned()
                    .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                turns.failed.get_or_insert(text.unwrap_or_default());
            }
            Self::pass_on(&mut turns);
            drop(turns);
            world.changed.notify_all();
        });
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(handle);
    }

    fn wait_for_turn(&self, id: usize) {
        let mut turns = self.turns();
        while turns.running != Some(id) {
            if turns.failed.is_some() {
                drop(turns);
                resume_unwind(Box::new("another task failed"));
            }
            turns = self.changed.wait(turns).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Chooses who runs next.
    fn pass_on(turns: &mut Turns) {
        if turns.ready.is_empty() {
            if turns.unfinished > 0 && turns.failed.is_none() {
                turns.failed = Some(format!("deadlock: {:?} wait for ever", turns.parked));
            }
            return;
        }
        let index = turns.rng.random_range(0..turns.ready.len());
        let next = turns.ready.iter().nth(index).copied().unwrap();
        turns.ready.remove(&next);
        turns.running = Some(next);
    }

    fn switch(&self, park: bool) {
        let id = ME.with(std::cell::Cell::get);
        {
            let mut turns = self.turns();
            assert_eq!(turns.running, Some(id), "only the running task may act");
            turns.running = None;
            if park && !turns.tokens.remove(&id) {
                turns.parked.insert(id);
            } else {
                turns.ready.insert(id);
            }
            Self::pass_on(&mut turns);
        }
        self.changed.notify_all();
        self.wait_for_turn(id);
    }
}

// ---- the engine's world ----------------------------------------------------------------------

struct SimIo {
    world: Arc<World>,
}

impl SimIo {
    fn pause(&self) {
        self.world.switch(false);
    }

    fn fault(&self, enabled: bool, one_in: u32) -> Result<(), Errno> {
        let mut disks = self.world.disks();
        if enabled && disks.rng.random_ratio(1, one_in) {
            disks.faults_hit += 1;
            return Err(Errno::EIO);
        }
        Ok(())
    }

    /// Runs `f` on both halves of a range, with other tasks before, between and after.
    fn in_halves(&self, len: usize, mut f: impl FnMut(&mut Disks, Range<usize>)) {
        let middle = len / 2;
        self.pause();
        f(&mut self.world.disks(), 0..middle);
        self.pause();
        f(&mut self.world.disks(), middle..len);
        self.pause();
    }
}

impl Io for SimIo {
    type Task = usize;
    type Block = Vec<u8>;
    type Buf = [u8];

    fn now_ns(&self) -> u64 {
        0
    }
    fn current(&self) -> usize {
        ME.with(std::cell::Cell::get)
    }
    fn park(&self) {
        self.world.switch(true);
    }
    fn unpark(&self, task: usize) {
        let mut turns = self.world.turns();
        if turns.parked.remove(&task) {
            turns.ready.insert(task);
        } else {
            assert!(turns.tokens.insert(task), "a task is woken once for each time it waits");
        }
    }
    fn spawn_flusher(&self) {
        let engine = self.world.engine.lock().unwrap().clone().unwrap();
        self.world.start(move |io| {
            while let Some(batch) = engine.next_batch(&io) {
                io.pause();
                engine.flush(&io, batch);
            }
        });
    }
    fn notify(&self) {}
    fn alloc(&self, len: usize) -> Option<Vec<u8>> {
        self.fault(self.world.faults.alloc, 12).ok()?;
        Some(vec![0xAA; len])
    }

    fn read_source(
        &self,
        offset: u64,
        block: &mut Vec<u8>,
        at: usize,
        len: usize,
    ) -> Result<(), Errno> {
        self.fault(self.world.faults.source_read, 6)?;
        self.fetch(&[Fetch { device: Device::Source, offset, len, at }], block)
    }

    fn fetch(&self, parts: &[Fetch], buf: &mut [u8]) -> Result<(), Errno> {
        // In any order.
        let first = self.world.disks().rng.random_range(0..parts.len().max(1));
        let (later, earlier) = parts.split_at(first);
        for part in earlier.iter().chain(later) {
            let start = part.offset as usize;
            self.in_halves(part.len, |disks, half| {
                let from = start + half.start..start + half.end;
                let device = match part.device {
                    Device::Source => &disks.source,
                    Device::Log => &disks.image,
                };
                buf[part.at + half.start..part.at + half.end].copy_from_slice(&device[from]);
            });
        }
        Ok(())
    }

    fn source_is_zero(&self, offset: u64, len: u64) -> Result<(u64, bool), Errno> {
        self.pause();
        let answer = {
            let disks = self.world.disks();
            let bytes = &disks.source[offset as usize..(offset + len) as usize];
            let zero = bytes[0] == 0;
            let same = bytes.iter().take_while(|&&byte| (byte == 0) == zero).count();
            (same as u64, zero)
        };
        self.pause();
        Ok(answer)
    }

    fn discard_source(&self, offset: u64, len: u64) {
        let range = offset as usize..(offset + len) as usize;
        self.in_halves(range.len(), |disks, half| {
            let part = range.start + half.start..range.start + half.end;
            let busy =
                disks.guest_writes.iter().any(|w| w.start < range.end && range.start < w.end);
            assert!(!busy, "a postponed discard of {range:?} meets a guest request");
            let kept = disks.guest[part.clone()].iter().any(Option::is_some);
            assert!(!kept, "a postponed discard of {range:?} destroys what the guest wrote later");
            disks.source[part].fill(0);
        });
    }

    fn write_log(&self, offset: u64, parts: &[&[u8]]) -> Result<(), Errno> {
        let data: Vec<u8> = parts.concat();
        let range = offset..offset + data.len() as u64;
        {
            let mut disks = self.world.disks();
            assert!(range.end <= disks.image.len() as u64, "{range:?} is beyond the image");
            disks.image_writes.push(range.clone());
        }
        let start = offset as usize;
        self.in_halves(data.len(), |disks, part| {
            disks.image[start + part.start..start + part.end].copy_from_slice(&data[part]);
        });
        self.world.disks().image_writes.retain(|other| *other != range);
        self.fault(self.world.faults.log_write, 10)
    }

    fn share_source(&self, offset: u64, log_offset: u64, len: u64) -> Result<(), Errno> {
        self.fault(self.world.faults.share, 6)?;
        let range = log_offset..log_offset + len;
        let (from, to) = (offset as usize, log_offset as usize);
        {
            let mut disks = self.world.disks();
            assert!(range.end <= disks.image.len() as u64, "{range:?} is beyond the image");
            assert!(disks.image[to..to + len as usize].iter().all(|&byte| byte == 0xCC), "used");
            disks.image_writes.push(range.clone());
        }
        self.in_halves(len as usize, |disks, half| {
            let part = from + half.start..from + half.end;
            disks.image[to + half.start..to + half.end].copy_from_slice(&disks.source[part]);
        });
        self.world.disks().image_writes.retain(|other| *other != range);
        Ok(())
    }

    fn discard_log(&self, offset: u64, len: u64) {
        self.pause();
        let mut disks = self.world.disks();
        let end = (offset + len).min(disks.image.len() as u64);
        let busy = disks.image_writes.iter().any(|write| write.start < end && offset < write.end);
        assert!(!busy, "a discard meets a write in flight");
        // Garbage, so that a read of it cannot go unnoticed.
        disks.image[offset as usize..end as usize].fill(0xDD);
    }

    fn copy_into(&self, buf: &mut [u8], at: usize, data: &[u8]) {
        buf[at..at + data.len()].copy_from_slice(data);
    }
    fn zero_into(&self, buf: &mut [u8], at: usize, len: usize) {
        buf[at..at + len].fill(0);
    }
}

// ---- a schedule ------------------------------------------------------------------------------

/// A bitmap of 8 KiB areas.
#[derive(Clone)]
struct Areas(Vec<bool>);

impl NeedMap for Areas {
    fn next_needed(&self, start: u64, end: u64) -> Option<Range<u64>> {
        let mut areas = (start / 8192)..end.div_ceil(8192);
        let first = areas.find(|&area| self.0[area as usize])?;
        let stop = areas.find(|&area| !self.0[area as usize]).unwrap_or(end.div_ceil(8192));
        Some((first * 8192).max(start)..(stop * 8192).min(end))
    }
}

fn random_range(rng: &mut StdRng, size: u64) -> ByteRange {
    let start = rng.random_range(0..size / 512) * 512;
    let large = if size > 1 << 20 { 4096 } else { 64 };
    let most = ((size - start) / 512).min(if rng.random_ratio(1, 4) { large } else { 12 });
    ByteRange::at(start, rng.random_range(1..=most) * 512)
}

/// Carries a guest request out; with a fill of none it is a discard.
fn submit(io: &SimIo, range: ByteRange, fill: Option<u8>) {
    let bytes = range.start as usize..range.end as usize;
    // Two discards may meet.
    let noted = if fill.is_some() { bytes.clone() } else { 0..0 };
    io.world.disks().guest_writes.push(noted.clone());
    io.in_halves(bytes.len(), |disks, half| {
        let part = bytes.start + half.start..bytes.start + half.end;
        disks.source[part.clone()].fill(fill.unwrap_or(0));
        disks.guest[part].fill(fill);
    });
    let mut disks = io.world.disks();
    let index = disks.guest_writes.iter().position(|other| *other == noted).unwrap();
    disks.guest_writes.swap_remove(index);
}

fn writer(io: &SimIo, engine: &SimEngine, seed: u64, size: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    for _ in 0..rng.random_range(2..6) {
        let range = random_range(&mut rng, size);
        match rng.random_range(0..4) {
            0 => write_zeroes(io, engine, range, 1 << rng.random_range(20..24)),
            1 => discard(io, engine, range),
            _ => {
                let fill = rng.random_range(1..=255);
                if engine.before_write(io, range).is_ok() {
                    submit(io, range, Some(fill));
                }
            }
        }
    }
}

fn write_zeroes(io: &SimIo, engine: &SimEngine, range: ByteRange, unit: u64) {
    let mut rest = range;
    while !rest.is_empty() {
        let (len, due) = engine.next_part(rest, unit);
        let part = ByteRange::at(rest.start, len);
        if due && engine.before_write_zeroes(io, part).is_err() {
            return;
        }
        submit(io, part, Some(0));
        rest.start = part.end;
    }
}

fn discard(io: &SimIo, engine: &SimEngine, range: ByteRange) {
    let mut rest = range;
    while !rest.is_empty() {
        let (len, what) = engine.next_discard(rest, range.len()).unwrap();
        assert!(len > 0 && len <= rest.len());
        let part = ByteRange::at(rest.start, len);
        match what {
            Discard::Pass => submit(io, part, None),
            Discard::Skip => {
                io.world.disks().guest[part.start as usize..part.end as usize].fill(None);
                io.pause();
            }
        }
        rest.start = part.end;
    }
}

/// What a reader may meet beside the truth.
struct Allowed {
    need: Option<Areas>,
    ended: bool,
    may_break: bool,
}

fn check_read(io: &SimIo, engine: &SimEngine, allowed: &Allowed, range: ByteRange) {
    let mut buf = vec![0xEE; range.len() as usize];
    let result = engine.read(io, range, &mut buf);
    let disks = io.world.disks();
    match result {
        Ok(()) => {
            let original = &disks.original[range.start as usize..range.end as usize];
            let wrong = buf.iter().zip(original).position(|(a, b)| a != b);
            assert_eq!(wrong, None, "wrong data in a read of {range:?}");
        }
        Err(Errno::EPERM) => {
            let overlaps = |other: &ByteRange| !other.intersect(range).is_empty();
            let clean = allowed.need.as_ref().is_some_and(|need| {
                (range.start..range.end).step_by(512).any(|at| !need.0[(at / 8192) as usize])
            });
            assert!(
                clean || disks.released.iter().any(overlaps),
                "EPERM for {range:?}, which is neither clean nor released"
            );
        }
        Err(Errno::EIO) => {
            let may = allowed.ended || allowed.may_break || disks.faults_hit > 0;
            assert!(may, "EIO for {range:?} without a fault");
        }
        Err(other) => panic!("unexpected {other:?} for {range:?}"),
    }
}

fn check_status(io: &SimIo, engine: &SimEngine, range: ByteRange) {
    if let Ok((len, zero)) = engine.is_zero(io, range) {
        assert!(len > 0 && len <= range.len(), "a block status of {len} bytes for {range:?}");
        let disks = io.world.disks();
        let original = &disks.original[range.start as usize..(range.start + len) as usize];
        assert!(
            !zero || original.iter().all(|&byte| byte == 0),
            "data reported as zero: {range:?}"
        );
    }
}

fn reader(io: &SimIo, engine: &SimEngine, seed: u64, size: u64, allowed: &Allowed) {
    let mut rng = StdRng::seed_from_u64(seed);
    for _ in 0..rng.random_range(2..8) {
        let range = random_range(&mut rng, size);
        match rng.random_range(0..6) {
            0 => {
                io.world.disks().released.push(range);
                engine.release(io, range);
            }
            1 => check_status(io, engine, range),
            _ => check_read(io, engine, allowed, range),
        }
    }
}

fn world(
    rng: &mut StdRng,
    original: Vec<u8>,
    image_bytes: u64,
    engine: Arc<SimEngine>,
    faults: Faults,
) -> Arc<World> {
    Arc::new(World {
        turns: Mutex::new(Turns {
            running: None,
            ready: BTreeSet::new(),
            parked: BTreeSet::new(),
            tokens: BTreeSet::new(),
            next_task: 0,
            unfinished: 0,
            rng: StdRng::seed_from_u64(rng.random()),
            failed: None,
        }),
        changed: Condvar::new(),
        disks: Mutex::new(Disks {
            image: vec![0xCC; image_bytes as usize],
            source: original.clone(),
            guest: original.iter().copied().map(Some).collect(),
            guest_writes: Vec::new(),
            original,
            image_writes: Vec::new(),
            released: Vec::new(),
            rng: StdRng::seed_from_u64(rng.random()),
            faults_hit: 0,
        }),
        engine: Mutex::new(Some(engine)),
        faults,
        threads: Mutex::new(Vec::new()),
    })
}

fn run(seed: u64) -> Result<(), String> {
    let mut rng = StdRng::seed_from_u64(seed);
    // Large disks are slow here, but only they fill the RAM buffer.
    let sectors = if rng.random_ratio(1, 12) { 2100..7000_u64 } else { 1..250 };
    let size = 512 * rng.random_range(sectors);
    let mut original = vec![0; size as usize];
    for chunk in original.chunks_mut(512) {
        chunk.fill(if rng.random_ratio(1, 3) { 0 } else { rng.random_range(1..=255) });
    }
    let need = rng
        .random_ratio(1, 3)
        .then(|| Areas((0..=size / 8192).map(|_| rng.random_ratio(1, 2)).collect()));
    let faults = Faults {
        log_write: rng.random_ratio(1, 5),
        source_read: rng.random_ratio(1, 5),
        alloc: rng.random_ratio(1, 10),
        share: rng.random_ratio(1, 10),
    };
    let closes = rng.random_ratio(1, 6);
    // A small image breaks the snapshot when it is full.
    let small = rng.random_ratio(1, 8);
    let image_bytes = if small { (size / 2).max(2 * GRANULE) } else { size };
    let on_error =
        if rng.random_ratio(1, 4) { OnError::BreakGuestWrite } else { OnError::BreakSnapshot };
    let group = rng.random_ratio(1, 6).then(|| Arc::new(Group::new(rng.random_range(0..3) << 20)));
    let engine: Arc<SimEngine> = Arc::new(
        Engine::new(Settings {
            geometry: Geometry::new(size, 512).unwrap(),
            // From "always through" to "never full"; a piece of 1 MiB always fits.
            buffer_bytes: if rng.random_ratio(1, 2) { 0 } else { rng.random_range(1..4) << 20 },
            timeout_ns: 1,
            image_bytes,
            segment_bytes: GRANULE * rng.random_range(1..5),
            fleecing_limit_bytes: rng.random_ratio(1, 12).then_some(4 * GRANULE),
            share_from_bytes: rng
                .random_ratio(1, 4)
                .then(|| GRANULE * u64::from(rng.random_range(1..5_u32))),
            metadata_limit_bytes: if rng.random_ratio(1, 20) { 4600 } else { u64::MAX },
            on_error,
            // Nothing arranges for a kick: there is no other disk that gives room back.
            group: group.map(|group| group.join(Box::new(|| {}))),
            need: need.clone().map(|need| Box::new(need) as Box<dyn NeedMap>),
        })
        .unwrap(),
    );
    engine.activate();
    let world = world(&mut rng, original, image_bytes, Arc::clone(&engine), faults);
    let allowed = || Allowed { need: need.clone(), ended: closes, may_break: true };
    start_tasks(&mut rng, &world, &engine, size, closes, &allowed);
    finish(&world);
    let broken = engine.stats().state == State::Broken;
    // Once more, alone and over everything: what was saved is still there.
    {
        let engine = Arc::clone(&engine);
        let allowed = Allowed { may_break: broken, ..allowed() };
        world.start(move |io| {
            for piece in (ByteRange { start: 0, end: size }).pieces(512) {
                check_read(&io, &engine, &allowed, piece);
            }
            engine.close(&io);
            engine.do_postponed(&io);
        });
    }
    finish(&world);
    if let Some(failed) = world.turns().failed.take() {
        return Err(failed);
    }
    let stats = engine.stats();
    if stats.postponed_bytes != 0 || engine.has_postponed() || engine.io_in_flight() != 0 {
        return Err(format!("left at the end: {stats:?}"));
    }
    if let Some((error, _)) = &stats.error
        && !faults.any()
        && !error.contains("full")
        && !error.contains("limit")
    {
        return Err(format!("{error} without a fault"));
    }
    let disks = world.disks();
    let wrong =
        disks.guest.iter().zip(&disks.source).position(|(want, is)| want.is_some_and(|w| w != *is));
    drop(disks);
    *world.engine.lock().unwrap() = None;
    wrong.map_or(Ok(()), |at| Err(format!("the guest's disk is wrong at {at}")))
}

fn start_tasks(
    rng: &mut StdRng,
    world: &Arc<World>,
    engine: &Arc<SimEngine>,
    size: u64,
    closes: bool,
    allowed: &dyn Fn() -> Allowed,
) {
    for _ in 0..rng.random_range(1..4) {
        let (engine, seed) = (Arc::clone(engine), rng.random());
        world.start(move |io| writer(&io, &engine, seed, size));
    }
    for _ in 0..rng.random_range(1..3) {
        let (engine, seed) = (Arc::clone(engine), rng.random());
        let allowed = allowed();
        world.start(move |io| reader(&io, &engine, seed, size, &allowed));
    }
    if closes {
        let engine = Arc::clone(engine);
        world.start(move |io| {
            engine.close(&io);
            io.pause();
            engine.do_postponed(&io);
        });
    }
    if rng.random_ratio(1, 4) {
        let engine = Arc::clone(engine);
        world.start(move |io| {
            engine.quiesce();
            io.pause();
            if engine.resume() {
                io.pause();
                engine.kick(&io);
            }
        });
    }
}

/// Lets the tasks run to their end.
fn finish(world: &World) {
    {
        let mut turns = world.turns();
        if turns.running.is_none() && turns.failed.is_none() {
            World::pass_on(&mut turns);
        }
    }
    world.changed.notify_all();
    loop {
        let handle = world.threads.lock().unwrap_or_else(PoisonError::into_inner).pop();
        match handle {
            Some(handle) => drop(handle.join()),
            None => return,
        }
    }
}

#[test]
fn a_successful_read_returns_the_content_at_the_point_in_time() {
    // Failures are reported with their seed below; the panics of the tasks would only be noise.
    std::panic::set_hook(Box::new(|_| {}));
    let one = std::env::var("SCHEDULE_SEED").ok().and_then(|seed| seed.parse().ok());
    let count = std::env::var("SCHEDULES").ok().and_then(|n| n.parse().ok()).unwrap_or(20_000);
    let seeds = one.map_or(0..count, |seed: u64| seed..seed + 1);
    for seed in seeds {
        if let Err(why) = run(seed) {
            drop(std::panic::take_hook());
            panic!("{why}\nrepeat with: SCHEDULE_SEED={seed} cargo test -p fleece --test schedule");
        }
    }
}
