// SPDX-License-Identifier: GPL-2.0-or-later
//! What the engine itself costs, without any I/O: `cargo bench -p fleece`, about two minutes.
//!
//! Each benchmark runs on two disks, of 1 GiB and of 16 TiB, so that what grows with the disk can be
//! seen. All requests go to 16 areas of 64 MiB that are spread over the disk, so that a disk's size
//! is all that differs.

#[path = "../tests/free_io/mod.rs"]
mod free_io;

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{
    BatchSize, BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main,
};
use fleece::ByteRange;
use free_io::{EMPTY, FULL, FreeEngine, FreeIo, drain};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const DISKS: [(&str, u64); 2] = [("1GiB", 1 << 30), ("16TiB", 16 << 40)];
const AREAS: u64 = 16;
const AREA_BYTES: u64 = 64 * MIB;
/// So much old data is made before it is flushed; that is what bounds the memory.
const ROUND_BYTES: u64 = 64 * MIB;

/// The place of the `nth` request of those that are `step` bytes apart, area by area in turn.
fn place(size: u64, step: u64, nth: u64) -> u64 {
    let nth = nth % places(step);
    (nth % AREAS) * (size / AREAS) + nth / AREAS * step
}

/// How many places there are.
fn places(step: u64) -> u64 {
    AREAS * (AREA_BYTES / step)
}

/// The place of the `nth` request in an order that nobody can foresee.
fn any_place(size: u64, step: u64, nth: u64) -> u64 {
    place(size, step, nth.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20)
}

fn active(size: u64) -> FreeEngine {
    let engine = free_io::engine(size, u64::MAX);
    engine.activate();
    engine
}

fn write(engine: &FreeEngine, io: FreeIo, range: ByteRange) {
    assert!(black_box(engine).before_write(&io, range).is_ok());
}

/// An engine whose areas are in the log.
fn captured(size: u64) -> FreeEngine {
    let engine = active(size);
    for nth in 0..places(MIB) {
        write(&engine, FULL, ByteRange::at(place(size, MIB, nth), MIB));
        drain(&engine);
    }
    engine
}

/// An engine, and the places of it that no request went to yet.
struct Fresh {
    size: u64,
    engine: FreeEngine,
    next: u64,
}

impl Fresh {
    fn new(size: u64) -> Self {
        Self { size, engine: active(size), next: 0 }
    }

    /// A whole number of granules that has room for `len` bytes.
    fn step(&self, len: u64) -> u64 {
        len.max(self.engine.geometry().granule())
    }

    /// `count` untouched places.
    fn take(&mut self, step: u64, count: u64) -> Vec<u64> {
        if self.next + count > places(step) {
            *self = Self::new(self.size);
        }
        let first = self.next;
        self.next += count;
        (first..self.next).map(|nth| place(self.size, step, nth)).collect()
    }
}

/// Runs `round` for `count` things in all, at most `most` at once; the sum of what it measured.
fn rounds(count: u64, most: u64, mut round: impl FnMut(u64) -> Duration) -> Duration {
    let mut rest = count;
    let mut sum = Duration::ZERO;
    while rest > 0 {
        let now = rest.min(most);
        sum += round(now);
        rest -= now;
    }
    sum
}

fn time(f: impl FnOnce()) -> Duration {
    let begin = Instant::now();
    f();
    begin.elapsed()
}

fn group<'a>(c: &'a mut Criterion, what: &str, bytes: u64) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(what);
    group.throughput(Throughput::Bytes(bytes));
    group
}

const LENGTHS: [(&str, u64); 3] = [("4KiB", 4 * KIB), ("64KiB", 64 * KIB), ("1MiB", MIB)];

/// A guest's write that needs nothing.
fn pass(c: &mut Criterion) {
    for (disk, size) in DISKS {
        let engine = captured(size);
        for (name, len) in LENGTHS {
            let mut nth = 0;
            group(c, &format!("pass/{name}"), len).bench_function(disk, |b| {
                b.iter(|| {
                    nth += 1;
                    write(&engine, FULL, ByteRange::at(any_place(size, len, nth), len));
                });
            });
        }
        let closed = free_io::engine(size, u64::MAX);
        let mut nth = 0;
        group(c, "pass/gate-closed", 4 * KIB).bench_function(disk, |b| {
            b.iter(|| {
                nth += 1;
                write(&closed, FULL, ByteRange::at(any_place(size, 4 * KIB, nth), 4 * KIB));
            });
        });
    }
}

/// The same from several threads, each in areas of its own: the time for one request of each.
fn pass_threads(c: &mut Criterion) {
    for (disk, size) in DISKS {
        let engine = captured(size);
        for threads in [1, 2, 4] {
            let mut group = c.benchmark_group(format!("pass-threads/{threads}"));
            group.throughput(Throughput::Elements(threads));
            group.bench_function(disk, |b| {
                b.iter_custom(|iters| threads_pass(&engine, threads, iters));
            });
        }
    }
}

fn threads_pass(engine: &FreeEngine, threads: u64, count: u64) -> Duration {
    let size = engine.geometry().size();
    let start = Barrier::new(threads as usize + 1);
    let one = |thread: u64| {
        start.wait();
        for nth in 0..count {
            let area = nth % (AREAS / threads) * threads + thread;
            let at = nth.wrapping_mul(7919 * 4 * KIB) % AREA_BYTES;
            write(engine, FULL, ByteRange::at(area * (size / AREAS) + at, 4 * KIB));
        }
    };
    let begin = std::thread::scope(|scope| {
        for thread in 0..threads {
            let one = &one;
            scope.spawn(move || one(thread));
        }
        start.wait();
        Instant::now()
    });
    begin.elapsed()
}

/// A guest's write that must be captured: the first to its granules.
fn capture(c: &mut Criterion) {
    for (disk, size) in DISKS {
        for (kind, io) in [("data", FULL), ("zero", EMPTY)] {
            for (name, len) in LENGTHS {
                let mut fresh = Fresh::new(size);
                let step = fresh.step(len);
                group(c, &format!("capture/{kind}/{name}"), len).bench_function(disk, |b| {
                    b.iter_custom(|iters| {
                        rounds(iters, ROUND_BYTES / step, |count| {
                            let places = fresh.take(step, count);
                            let engine = &fresh.engine;
                            let spent = time(|| {
                                places.iter().for_each(|&at| {
                                    write(engine, io, ByteRange::at(at, len));
                                });
                            });
                            drain(engine);
                            spent
                        })
                    });
                });
            }
        }
    }
}

/// The first write to a part of the disk whose states are not in memory yet.
fn capture_region(c: &mut Criterion) {
    const ROUND: u64 = 1024;
    let (disk, size) = DISKS[1];
    group(c, "capture/new-region/4KiB", 4 * KIB).bench_function(disk, |b| {
        b.iter_custom(|iters| {
            rounds(iters, ROUND, |count| {
                let engine = active(size);
                time(|| {
                    for nth in 0..count {
                        write(&engine, FULL, ByteRange::at(size / ROUND * nth, 4 * KIB));
                    }
                })
            })
        });
    });
}

fn read(engine: &FreeEngine, range: ByteRange) {
    assert!(black_box(engine).read(&FULL, range, &mut ()).is_ok());
}

/// A reader's request. Neither devices nor copies take time.
fn lookup(c: &mut Criterion) {
    for (disk, size) in DISKS {
        let granule = active(size).geometry().granule();
        let in_ram = active(size);
        let ram_places = ROUND_BYTES / granule;
        for nth in 0..ram_places {
            write(&in_ram, FULL, ByteRange::at(place(size, granule, nth), granule));
        }
        let engines =
            [("log", captured(size), places(granule)), ("untouched", active(size), 1 << 20)];
        for (name, engine, count) in std::iter::once(("ram", in_ram, ram_places)).chain(engines) {
            let mut nth: u64 = 0;
            group(c, &format!("read/{name}/4KiB"), 4 * KIB).bench_function(disk, |b| {
                b.iter(|| {
                    nth = nth.wrapping_add(7919);
                    read(&engine, ByteRange::at(place(size, granule, nth % count), 4 * KIB));
                });
            });
        }
        let engine = mixed(size, granule);
        let mut nth = 0;
        group(c, "read/mixed/256KiB", 256 * KIB).bench_function(disk, |b| {
            b.iter(|| {
                nth = (nth + 1) % MIXED;
                read(&engine, ByteRange::at(place(size, 256 * KIB, nth), 256 * KIB));
            });
        });
    }
}

/// Places of 256 KiB that are mixed.
const MIXED: u64 = 256;

/// An engine in which one granule is in the log, the next was zero, the next is in RAM and the next
/// still in the source.
fn mixed(size: u64, granule: u64) -> FreeEngine {
    let engine = active(size);
    for (first, io, flush) in [(0, FULL, true), (1, EMPTY, false), (2, FULL, false)] {
        for nth in 0..MIXED {
            let begin = place(size, 256 * KIB, nth);
            for at in (first * granule..256 * KIB).step_by(4 * granule as usize) {
                write(&engine, io, ByteRange::at(begin + at, granule));
            }
        }
        if flush {
            drain(&engine);
        }
    }
    engine
}

/// Asks for the block status of 64 MiB until all of it is known.
fn status(engine: &FreeEngine) {
    let mut rest = ByteRange::at(0, AREA_BYTES);
    while !rest.is_empty() {
        let (len, _) = engine.is_zero(&FULL, rest).expect("a snapshot that is not lost");
        rest.start += len;
    }
}

fn block_status(c: &mut Criterion) {
    for (disk, size) in DISKS {
        let striped = active(size);
        for at in (0..AREA_BYTES).step_by(128 << 10) {
            write(&striped, FULL, ByteRange::at(at, 64 * KIB));
        }
        drain(&striped);
        let engines =
            [("untouched", active(size)), ("log", captured(size)), ("striped-64KiB", striped)];
        for (name, engine) in engines {
            group(c, &format!("status/{name}/64MiB"), AREA_BYTES)
                .bench_function(disk, |b| b.iter(|| status(black_box(&engine))));
        }
    }
}

/// What is released, and how it was saved before.
#[derive(Clone, Copy)]
struct Release {
    name: &'static str,
    /// Bytes; one granule if it is less.
    len: u64,
    /// Writes of so many bytes go before it.
    captured: Option<u64>,
    flushed: bool,
}

fn release(c: &mut Criterion) {
    let one = |name, captured, flushed| Release { name, len: 0, captured, flushed };
    let large = |name, len, captured| Release { name, len, captured, flushed: true };
    for (disk, size) in DISKS {
        for what in [
            one("granule-in-ram", Some(0), false),
            one("granule-in-log", Some(0), true),
            large("1MiB-untouched", MIB, None),
            large("64MiB-untouched", AREA_BYTES, None),
            large("64MiB-in-log", AREA_BYTES, Some(MIB)),
        ] {
            let mut fresh = Fresh::new(size);
            let len = fresh.step(what.len);
            group(c, &format!("release/{}", what.name), len).bench_function(disk, |b| {
                b.iter_custom(|iters| {
                    rounds(iters, ROUND_BYTES / len, |count| release_round(&mut fresh, what, count))
                });
            });
        }
    }
}

fn release_round(fresh: &mut Fresh, what: Release, count: u64) -> Duration {
    let len = fresh.step(what.len);
    let places = fresh.take(len, count);
    let engine = &fresh.engine;
    if let Some(captured) = what.captured {
        let by = fresh.step(captured);
        for part in places.iter().flat_map(|&at| ByteRange::at(at, len).pieces(by)) {
            write(engine, FULL, part);
        }
    }
    if what.flushed {
        drain(engine);
    }
    let spent = time(|| {
        places.iter().for_each(|&at| black_box(engine).release(&FULL, ByteRange::at(at, len)));
    });
    drain(engine);
    spent
}

/// A batch of 256 KiB from RAM to the log.
fn flush(c: &mut Criterion) {
    const BATCH: u64 = 256 * KIB;
    for (disk, size) in DISKS {
        for (name, len) in [("granules", 0), ("64KiB", 64 * KIB)] {
            let mut fresh = Fresh::new(size);
            let step = fresh.step(len);
            group(c, &format!("flush/256KiB-of-{name}"), BATCH).bench_function(disk, |b| {
                b.iter_custom(|iters| {
                    rounds(iters, ROUND_BYTES / BATCH, |count| {
                        let places = fresh.take(step, count * (BATCH / step));
                        let engine = &fresh.engine;
                        places.iter().for_each(|&at| write(engine, FULL, ByteRange::at(at, step)));
                        let mut batches = 0;
                        let spent = time(|| {
                            while let Some(batch) = engine.next_batch(&FULL) {
                                engine.flush(&FULL, batch);
                                batches += 1;
                            }
                        });
                        assert_eq!(batches, count);
                        spent
                    })
                });
            });
        }
    }
}

/// The begin and the end of a snapshot in which nothing happened.
fn setup(c: &mut Criterion) {
    for (disk, size) in DISKS {
        c.benchmark_group("setup/new-and-activate").bench_function(disk, |b| {
            b.iter_batched(|| (), |()| active(size), BatchSize::PerIteration);
        });
        c.benchmark_group("setup/close").bench_function(disk, |b| {
            b.iter_batched_ref(
                || active(size),
                |engine| engine.close(&FULL),
                BatchSize::PerIteration,
            );
        });
        c.benchmark_group("setup/drop").bench_function(disk, |b| {
            b.iter_batched(|| active(size), drop, BatchSize::PerIteration);
        });
    }
}

fn short() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600))
        .nresamples(1000)
}

criterion_group! {
    name = core;
    config = short();
    targets = pass, pass_threads, capture, capture_region, lookup, block_status, release, flush, setup
}
criterion_main!(core);
