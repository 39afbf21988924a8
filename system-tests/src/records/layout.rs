// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where each record goes, and which record a sector must hold.
//!
//! ```text
//! 0        64 KiB      320 KiB            4 MiB                              end
//! | header | hot ring  | big ring         | main area: extents of 64 KiB     |
//! ```
//!
//! Of 32 records in a row 4 go to the hot ring (the same 256 KiB again and again), 1 is a big one
//! of 96 KiB at an odd sector, and 27 are 4 KiB blocks of the main area. There 16 in a row fill one
//! extent (so that an increment grows with what was written, not with the bitmap's granularity),
//! and the extents follow each other in a pseudo-random order. Every second chunk of 4 MiB is
//! filled with data from the start, the others are empty.

/// Size of a sector, the unit of checking, in bytes.
pub const SECTOR_BYTES: u64 = 512;
/// Size of a small record in bytes.
pub const BLOCK_BYTES: u64 = 4096;
/// Size of a big record in bytes.
pub const BIG_BYTES: u64 = 96 * 1024;
/// Smallest disk this layout works on.
pub const MIN_DISK_BYTES: u64 = 16 << 20;

const HOT_START: u64 = 64 << 10;
const HOT_SLOTS: u64 = 64;
const BIG_START: u64 = (320 << 10) + 3 * SECTOR_BYTES;
const BIG_STRIDE: u64 = 104 << 10;
const BIG_SLOTS: u64 = 32;
const MAIN_START: u64 = 4 << 20;
const EXTENT_BLOCKS: u64 = 16;
const PREFILL_CHUNK: u64 = 4 << 20;

const CYCLE: u64 = 32;
const HOT_PER_CYCLE: u64 = 4;
const SMALL_PER_CYCLE: u64 = 27;

const _: () = assert!(HOT_START + HOT_SLOTS * BLOCK_BYTES <= BIG_START);
const _: () = assert!(BIG_START + BIG_SLOTS * BIG_STRIDE <= MAIN_START);
const _: () = assert!(BIG_BYTES <= BIG_STRIDE);
const _: () = assert!(HOT_PER_CYCLE + SMALL_PER_CYCLE + 1 == CYCLE);

/// The place of one record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// First byte on the disk.
    pub offset_bytes: u64,
    /// Length in bytes.
    pub size_bytes: u64,
}

/// What a sector must hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holds {
    /// The sector belongs to the header block, which no record touches.
    Header,
    /// Zeroes: never written.
    Zero,
    /// The data the disk was filled with before the first record.
    Prefill,
    /// The record of this number.
    Record(u64),
}

/// The layout of a disk of one size.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    extents: u64,
    step: u64,
    step_inverse: u64,
}

impl Layout {
    /// The layout of a disk of this size.
    ///
    /// # Errors
    /// The disk is too small.
    pub fn new(disk_bytes: u64) -> Result<Self, String> {
        if disk_bytes < MIN_DISK_BYTES {
            return Err(format!("a disk of {disk_bytes} bytes is below {MIN_DISK_BYTES} bytes"));
        }
        let extents = (disk_bytes - MAIN_START) / (EXTENT_BLOCKS * BLOCK_BYTES);
        // Near the golden section of the number of extents neighbours in time lie far apart.
        let mut step = extents * 618 / 1000;
        loop {
            if let Some(step_inverse) = inverse(step, extents) {
                return Ok(Self { extents, step, step_inverse });
            }
            step += 1;
        }
    }

    fn main_blocks(&self) -> u64 {
        self.extents * EXTENT_BLOCKS
    }

    /// Where record `number` (1, 2, …) goes.
    #[must_use]
    pub fn place(&self, number: u64) -> Place {
        let index = number - 1;
        let (cycle, at) = (index / CYCLE, index % CYCLE);
        if at == CYCLE - 1 {
            let offset_bytes = BIG_START + cycle % BIG_SLOTS * BIG_STRIDE;
            return Place { offset_bytes, size_bytes: BIG_BYTES };
        }
        if at.is_multiple_of(8) {
            let slot = (cycle * HOT_PER_CYCLE + at / 8) % HOT_SLOTS;
            let offset_bytes = HOT_START + slot * BLOCK_BYTES;
            return Place { offset_bytes, size_bytes: BLOCK_BYTES };
        }
        let small = (cycle * SMALL_PER_CYCLE + at - 1 - at / 8) % self.main_blocks();
        let extent = (small / EXTENT_BLOCKS * self.step + 17) % self.extents;
        let block = extent * EXTENT_BLOCKS + (small % EXTENT_BLOCKS * 7 + 3) % EXTENT_BLOCKS;
        Place { offset_bytes: MAIN_START + block * BLOCK_BYTES, size_bytes: BLOCK_BYTES }
    }

    /// What a sector must hold once records 1 to `last` are written.
    #[must_use]
    pub fn holds(&self, last: u64, sector: u64) -> Holds {
        let offset = sector * SECTOR_BYTES;
        if offset < BLOCK_BYTES {
            return Holds::Header;
        }
        self.record_at(last, offset).map_or_else(|| prefill_at(offset), Holds::Record)
    }

    fn record_at(&self, last: u64, offset: u64) -> Option<u64> {
        let (cycles, rest) = (last / CYCLE, last % CYCLE);
        let hot_in_rest = rest.div_ceil(8);
        if offset >= MAIN_START {
            let slot = self.small_slot((offset - MAIN_START) / BLOCK_BYTES)?;
            let count = cycles * SMALL_PER_CYCLE + rest - hot_in_rest;
            let small = newest(count, slot, self.main_blocks())?;
            let rank = small % SMALL_PER_CYCLE;
            return Some(small / SMALL_PER_CYCLE * CYCLE + rank / 7 * 8 + rank % 7 + 2);
        }
        if (BIG_START..BIG_START + BIG_SLOTS * BIG_STRIDE).contains(&offset) {
            let from_start = offset - BIG_START;
            if from_start % BIG_STRIDE >= BIG_BYTES {
                return None;
            }
            let big = newest(cycles, from_start / BIG_STRIDE, BIG_SLOTS)?;
            return Some(big * CYCLE + CYCLE);
        }
        if (HOT_START..HOT_START + HOT_SLOTS * BLOCK_BYTES).contains(&offset) {
            let count = cycles * HOT_PER_CYCLE + hot_in_rest;
            let hot = newest(count, (offset - HOT_START) / BLOCK_BYTES, HOT_SLOTS)?;
            return Some(hot / HOT_PER_CYCLE * CYCLE + hot % HOT_PER_CYCLE * 8 + 1);
        }
        None
    }

    /// The position in time of a block of the main area; `None` for the odd tail of the disk.
    fn small_slot(&self, block: u64) -> Option<u64> {
        let (extent, within) = (block / EXTENT_BLOCKS, block % EXTENT_BLOCKS);
        if extent >= self.extents {
            return None;
        }
        let shifted = (extent + self.extents - 17 % self.extents) % self.extents;
        let turn = shifted * self.step_inverse % self.extents;
        // 7 is its own inverse modulo 16.
        Some(turn * EXTENT_BLOCKS + (within + EXTENT_BLOCKS - 3) * 7 % EXTENT_BLOCKS)
    }

    /// The places of the hot ring, which hold the newest of every eight records.
    pub fn hot_places(&self) -> impl Iterator<Item = Place> + use<> {
        (0..HOT_SLOTS).map(|slot| Place {
            offset_bytes: HOT_START + slot * BLOCK_BYTES,
            size_bytes: BLOCK_BYTES,
        })
    }
}

/// Whether a byte belongs to a chunk that is filled before the first record.
fn prefill_at(offset: u64) -> Holds {
    if (offset / PREFILL_CHUNK).is_multiple_of(2) { Holds::Prefill } else { Holds::Zero }
}

/// The newest of `count` things numbered from 0 that went to `slot` of a ring of `slots`.
fn newest(count: u64, slot: u64, slots: u64) -> Option<u64> {
    let last = count.checked_sub(slot + 1)?;
    Some(slot + last / slots * slots)
}

/// The inverse of `value` modulo `modulus`, by the extended Euclidean algorithm.
fn inverse(value: u64, modulus: u64) -> Option<u64> {
    let wide = i128::from(modulus);
    let (mut old_r, mut r) = (i128::from(value), wide);
    let (mut old_s, mut s) = (1_i128, 0_i128);
    while r != 0 {
        let quotient = old_r / r;
        (old_r, r) = (r, old_r - quotient * r);
        (old_s, s) = (s, old_s - quotient * s);
    }
    (old_r == 1).then(|| u64::try_from(old_s.rem_euclid(wide)).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn replay(disk_bytes: u64, last: u64) {
        let layout = Layout::new(disk_bytes).unwrap();
        let mut written = HashMap::new();
        for number in 1..=last {
            let place = layout.place(number);
            assert!(place.offset_bytes + place.size_bytes <= disk_bytes);
            let first = place.offset_bytes / SECTOR_BYTES;
            for sector in first..first + place.size_bytes / SECTOR_BYTES {
                written.insert(sector, number);
            }
        }
        for sector in 0..disk_bytes / SECTOR_BYTES {
            match (layout.holds(last, sector), written.get(&sector)) {
                (Holds::Record(expected), Some(found)) => assert_eq!(expected, *found),
                (Holds::Header | Holds::Zero | Holds::Prefill, None) => {}
                (expected, found) => panic!("sector {sector}: {expected:?} but {found:?}"),
            }
        }
    }

    #[test]
    fn the_oracle_agrees_with_writing_the_records_one_by_one() {
        for last in [0, 1, 2, 8, 9, 31, 32, 33, 63, 64, 1000, 2048, 2049, 3000, 9001] {
            replay(MIN_DISK_BYTES, last);
            replay(MIN_DISK_BYTES + 5 * 65536 + 1536, last);
        }
    }

    #[test]
    fn neighbours_in_time_share_a_cluster_so_that_increments_stay_small() {
        let layout = Layout::new(512 << 20).unwrap();
        let clusters: std::collections::HashSet<u64> =
            (1..=3200).map(|n| layout.place(n).offset_bytes >> 16).collect();
        assert!(clusters.len() < 3200 / 12, "{}", clusters.len());
    }

    #[test]
    fn a_tiny_disk_is_refused() {
        assert!(Layout::new(MIN_DISK_BYTES - 1).is_err());
    }
}
