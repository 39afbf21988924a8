// SPDX-License-Identifier: GPL-2.0-or-later
//! What the engine's notes may cost, however large the disk: about nothing where nobody wrote, 68
//! MiB for each TiB written or released everywhere, 3 MiB for each GiB of live log beside it, and
//! never more than `metadata-limit`.

#![cfg(not(loom))]

mod free_io;

use std::collections::BTreeSet;

use fleece::{ByteRange, Discard, Errno, State};
use free_io::{EMPTY, FULL, FreeEngine, FreeIo, drain, engine};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const GRANULE: u64 = 4 * KIB;
/// The states of so much of the disk are kept together.
const REGION: u64 = 64 * MIB;
/// Of a TiB of which each region was touched.
const PER_TIB: u64 = 68 * MIB;
/// Of a GiB of live log, beside its regions.
const PER_GIB_OF_LOG: u64 = 3 * MIB;

fn active(size: u64, metadata_limit: u64) -> FreeEngine {
    let engine = engine(size, metadata_limit);
    engine.activate();
    engine
}

fn metadata(engine: &FreeEngine) -> u64 {
    engine.stats().metadata_bytes
}

/// Guest writes of a granule each. Flushed so often that the notes about data in RAM, which are a
/// part of the buffer's price, stay small.
fn write(io: FreeIo, engine: &FreeEngine, starts: impl IntoIterator<Item = u64>) {
    for (nth, start) in starts.into_iter().enumerate() {
        assert_eq!(engine.before_write(&io, ByteRange::at(start, GRANULE)), Ok(()));
        if nth % 64 == 63 {
            drain(engine);
        }
    }
    drain(engine);
    assert_eq!(engine.stats().ram_bytes, 0);
}

/// So many bytes of different granules, anywhere in the first `area` bytes of a disk.
fn random_granules(bytes: u64, area: u64) -> BTreeSet<u64> {
    let mut rng = StdRng::seed_from_u64(7);
    let mut starts = BTreeSet::new();
    while (starts.len() as u64) < bytes / GRANULE {
        starts.insert(rng.random_range(0..area / GRANULE) * GRANULE);
    }
    starts
}

/// In an order that is not that of the disk.
fn shuffled(starts: &BTreeSet<u64>) -> Vec<u64> {
    let key = |start: &u64| (start / GRANULE).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut starts: Vec<u64> = starts.iter().copied().collect();
    starts.sort_unstable_by_key(key);
    starts
}

#[test]
fn what_nobody_touches_costs_about_nothing() {
    for (size, most) in [(GIB, KIB), (TIB, 256 * KIB + KIB), (16 * TIB, 4 * MIB)] {
        let engine = active(size, u64::MAX);
        assert!(metadata(&engine) <= most, "{size}: {}", metadata(&engine));
        let before = metadata(&engine);
        for start in (0..size).step_by(REGION as usize) {
            assert_eq!(engine.read(&FULL, ByteRange::at(start, GRANULE), &mut ()), Ok(()));
            assert_eq!(engine.is_zero(&FULL, ByteRange::at(start, REGION)), Ok((REGION, false)));
        }
        assert_eq!(metadata(&engine), before, "readers leave no trace");
    }
}

#[test]
fn a_tebibyte_released_everywhere_costs_at_most_68_mib() {
    let engine = active(TIB, u64::MAX);
    (ByteRange { start: 0, end: TIB }).pieces(GIB).for_each(|part| engine.release(&FULL, part));
    assert_eq!(engine.stats().released_bytes, TIB);
    assert!(metadata(&engine) <= PER_TIB, "{}", metadata(&engine));
}

#[test]
fn a_write_in_every_region_of_a_tebibyte_costs_at_most_68_mib() {
    for io in [FULL, EMPTY] {
        let engine = active(TIB, u64::MAX);
        write(io, &engine, (0..TIB).step_by(REGION as usize));
        let stats = engine.stats();
        assert_eq!(stats.log_bytes + stats.zero_bytes, TIB / REGION * GRANULE);
        assert!(stats.metadata_bytes <= PER_TIB, "{}", stats.metadata_bytes);
    }
}

#[test]
fn large_writes_over_zeroes_cost_only_their_regions() {
    let engine = active(TIB, u64::MAX);
    for start in (0..TIB).step_by(REGION as usize) {
        assert_eq!(engine.before_write(&EMPTY, ByteRange::at(start, MIB)), Ok(()));
    }
    assert_eq!(engine.stats().zero_bytes, TIB / REGION * MIB);
    assert!(metadata(&engine) <= PER_TIB, "{}", metadata(&engine));
}

#[test]
fn a_gibibyte_of_live_log_costs_at_most_3_mib() {
    let live = 64 * MIB;
    for area in [live, 2 * live, GIB, 16 * GIB] {
        let starts = random_granules(live, area);
        // What only the regions cost: the same granules, of which nothing is kept.
        let regions = active(TIB, u64::MAX);
        starts.iter().for_each(|&at| regions.release(&FULL, ByteRange::at(at, GRANULE)));
        let engine = active(TIB, u64::MAX);
        write(FULL, &engine, shuffled(&starts));
        assert_eq!(engine.stats().log_bytes, live);
        let log = metadata(&engine) - metadata(&regions);
        assert!(log <= live / KIB * PER_GIB_OF_LOG / MIB, "in {area}: {log}");
        // What is released is forgotten.
        starts.iter().for_each(|&at| engine.release(&FULL, ByteRange::at(at, GRANULE)));
        assert_eq!(engine.stats().log_bytes, 0);
        let left = metadata(&engine) - metadata(&regions);
        assert!(left <= 8 * KIB, "in {area}: {left}");
    }
}

#[test]
fn a_live_log_scattered_over_a_tebibyte_keeps_both_bounds() {
    let live = 64 * MIB;
    let starts = random_granules(live, TIB);
    let regions: BTreeSet<u64> = starts.iter().map(|start| start / REGION).collect();
    let engine = active(TIB, u64::MAX);
    write(FULL, &engine, shuffled(&starts));
    assert_eq!(engine.stats().log_bytes, live);
    // A region's smallest table of places is in its own price: there are few granules in each.
    let most =
        regions.len() as u64 * (PER_TIB / (TIB / REGION)) + live / KIB * PER_GIB_OF_LOG / MIB;
    assert!(metadata(&engine) <= most, "{} of {most}", metadata(&engine));
}

#[test]
fn releases_leave_room_for_what_the_guest_writes() {
    // Sixteen regions, and room for the notes of eight.
    let engine = active(GIB, 36 * KIB);
    engine.release(&FULL, ByteRange { start: 0, end: GIB });
    let released = engine.stats().released_bytes;
    assert!((3 * REGION..6 * REGION).contains(&released), "{released}");
    // From the end, where nothing is noted: what it writes is captured all the same.
    let last = (0..GIB / REGION).rev().take(3).map(|region| region * REGION);
    write(FULL, &engine, last);
    assert_eq!(engine.stats().state, State::Active);
    assert_eq!(engine.stats().captured_bytes, 3 * GRANULE);
}

#[test]
fn discards_leave_room_for_what_the_guest_writes() {
    let engine = active(GIB, 36 * KIB);
    for start in (0..GIB).step_by(MIB as usize) {
        let discard = ByteRange::at(start, MIB);
        assert_eq!(engine.next_discard(discard, MIB), Ok((MIB, Discard::Skip)));
    }
    assert!(metadata(&engine) < 30 * KIB, "{}", metadata(&engine));
    write(FULL, &engine, (0..GIB / REGION).rev().take(2).map(|region| region * REGION));
    assert_eq!(engine.stats().state, State::Active);
}

#[test]
fn postponed_discards_are_counted_and_bounded() {
    // A region, and room for few notes in it.
    let engine = active(GIB, 6 * KIB);
    let before = metadata(&engine);
    for start in (0..MIB).step_by(2 * GRANULE as usize) {
        let discard = ByteRange::at(start, GRANULE);
        assert_eq!(engine.next_discard(discard, GRANULE), Ok((GRANULE, Discard::Skip)));
        assert!(metadata(&engine) <= 6 * KIB);
    }
    assert!(metadata(&engine) >= before + 5 * KIB, "{}", metadata(&engine));
    let postponed = engine.stats().postponed_bytes / GRANULE;
    assert!((64..=128).contains(&postponed), "{postponed}");
    engine.release(&FULL, ByteRange { start: 0, end: MIB });
    assert_eq!(engine.stats().postponed_bytes, 0);
}

/// Writes granules until the snapshot is lost; the guest's requests go on. The error's text.
fn write_until_lost(engine: &FreeEngine, step: u64) -> String {
    for start in (0..GIB).step_by(step as usize) {
        assert_eq!(engine.before_write(&FULL, ByteRange::at(start, GRANULE)), Ok(()));
        let stats = engine.stats();
        if stats.state == State::Broken {
            assert_eq!(engine.before_write(&FULL, ByteRange::at(0, GIB)), Ok(()));
            let read = engine.read(&FULL, ByteRange::at(GIB - GRANULE, GRANULE), &mut ());
            assert_eq!(read, Err(Errno::EIO));
            let (text, errno) = stats.error.expect("a snapshot that is lost says why");
            assert_eq!(errno, Errno::ENOMEM);
            return text;
        }
    }
    panic!("the snapshot survived: {:?}", engine.stats());
}

#[test]
fn the_metadata_limit_ends_the_snapshot_at_a_region() {
    // Four regions and a little: the fifth is too much.
    let engine = active(GIB, 18 * KIB);
    let text = write_until_lost(&engine, REGION);
    assert_eq!(engine.stats().captured_bytes, 4 * GRANULE);
    assert!(text.contains("metadata-limit (18432)"), "{text}");
}

#[test]
fn the_metadata_limit_ends_the_snapshot_at_the_places_of_old_data() {
    // One region, and room for the places of about a thousand granules.
    let engine = active(GIB, 16 * KIB);
    let text = write_until_lost(&engine, GRANULE);
    let captured = engine.stats().captured_bytes / GRANULE;
    assert!((900..1400).contains(&captured), "{captured}");
    assert!(text.contains("metadata-limit (16384)"), "{text}");
}
