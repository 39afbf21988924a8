// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which areas of a disk are looked at, and how they are cut into pieces of work. Pure.
//!
//! ```text
//! areas   |####################|        |####|        what the bitmap marks, or all of the disk
//! zeroes        |------|                              what block status says reads as zero
//! runs    |##########|#########|        |####|        areas cut at multiples of 4 MiB
//! pieces  |#####|----|-|#######|        |####|        runs cut where zeroes begin and end
//! ```
//!
//! Runs of one 4 MiB block are one piece of work: then no two threads write into one cluster.

use crate::limits::BLOCK_BYTES;

/// A half-open range of bytes of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Area {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

/// A part of a run: data to be read, or known zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) area: Area,
    pub(crate) is_zero: bool,
}

/// Contiguous bytes that the archive will hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) area: Area,
    pub(crate) pieces: Vec<Piece>,
}

/// What one step reads, writes and releases.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Work {
    pub(crate) runs: Vec<Run>,
}

impl Area {
    pub(crate) fn new(start: u64, end: u64) -> Self {
        Self { start, end }
    }

    pub(crate) fn length_bytes(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    fn intersection(self, other: Self) -> Option<Self> {
        let both = Self::new(self.start.max(other.start), self.end.min(other.end));
        (both.start < both.end).then_some(both)
    }

    /// Cuts at multiples of `unit_bytes`.
    pub(crate) fn split(self, unit_bytes: u64) -> impl Iterator<Item = Self> {
        let mut at = self.start;
        std::iter::from_fn(move || {
            if at >= self.end {
                return None;
            }
            let next = (at / unit_bytes).saturating_add(1).saturating_mul(unit_bytes);
            let part = Self::new(at, next.min(self.end));
            at = part.end;
            Some(part)
        })
    }
}

impl Run {
    fn new(area: Area, zeroes: &[Area]) -> Self {
        let mut pieces = Vec::new();
        let mut at = area.start;
        let first = zeroes.partition_point(|zero| zero.end <= area.start);
        for zero in &zeroes[first..] {
            let Some(zero) = zero.intersection(area) else { break };
            if at < zero.start {
                pieces.push(Piece { area: Area::new(at, zero.start), is_zero: false });
            }
            pieces.push(Piece { area: zero, is_zero: true });
            at = zero.end;
        }
        if at < area.end {
            pieces.push(Piece { area: Area::new(at, area.end), is_zero: false });
        }
        Self { area, pieces }
    }

    pub(crate) fn is_zero(&self) -> bool {
        self.pieces.iter().all(|piece| piece.is_zero)
    }
}

impl Work {
    /// Bytes that must be read.
    pub(crate) fn data_bytes(&self) -> u64 {
        let pieces = self.runs.iter().flat_map(|run| &run.pieces);
        pieces.filter(|piece| !piece.is_zero).map(|piece| piece.area.length_bytes()).sum()
    }

    fn is_zero(&self) -> bool {
        self.runs.iter().all(Run::is_zero)
    }

    fn append_zeroes(&mut self, next: Self) {
        for run in next.runs {
            match self.runs.last_mut() {
                Some(last) if last.area.end == run.area.start => {
                    last.area.end = run.area.end;
                    last.pieces = vec![Piece { area: last.area, is_zero: true }];
                }
                _ => self.runs.push(run),
            }
        }
    }
}

/// Cuts areas into work. Both lists are in order and do not overlap; touching areas are joined.
pub(crate) fn plan(areas: &[Area], zeroes: &[Area]) -> Vec<Work> {
    let mut blocks: Vec<Work> = Vec::new();
    for area in join(areas) {
        for part in area.split(BLOCK_BYTES) {
            let run = Run::new(part, zeroes);
            let block = part.start / BLOCK_BYTES;
            match blocks.last_mut() {
                Some(last) if last.runs[0].area.start / BLOCK_BYTES == block => {
                    last.runs.push(run);
                }
                _ => blocks.push(Work { runs: vec![run] }),
            }
        }
    }
    let mut works: Vec<Work> = Vec::new();
    for block in blocks {
        match works.last_mut() {
            Some(last) if last.is_zero() && block.is_zero() => last.append_zeroes(block),
            _ => works.push(block),
        }
    }
    works
}

/// Joins touching areas.
fn join(areas: &[Area]) -> Vec<Area> {
    let mut joined: Vec<Area> = Vec::new();
    for area in areas {
        match joined.last_mut() {
            Some(last) if last.end == area.start => last.end = area.end,
            _ => joined.push(*area),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::{Area, Work, plan};
    use crate::limits::BLOCK_BYTES;

    fn covered(works: &[Work]) -> Vec<(u64, u64, bool)> {
        works
            .iter()
            .flat_map(|w| &w.runs)
            .flat_map(|r| &r.pieces)
            .map(|p| (p.area.start, p.area.end, p.is_zero))
            .collect()
    }

    #[test]
    fn runs_end_at_block_boundaries_and_pieces_where_zeroes_do() {
        let areas = [Area::new(0, 100), Area::new(100, BLOCK_BYTES + 10)];
        let zeroes = [Area::new(50, 60), Area::new(BLOCK_BYTES - 5, BLOCK_BYTES + 5)];
        let works = plan(&areas, &zeroes);
        assert_eq!(works.len(), 2);
        assert_eq!(
            covered(&works),
            [
                (0, 50, false),
                (50, 60, true),
                (60, BLOCK_BYTES - 5, false),
                (BLOCK_BYTES - 5, BLOCK_BYTES, true),
                (BLOCK_BYTES, BLOCK_BYTES + 5, true),
                (BLOCK_BYTES + 5, BLOCK_BYTES + 10, false),
            ]
        );
        assert_eq!(works[1].data_bytes(), 5);
    }

    #[test]
    fn zero_blocks_in_a_row_are_one_work() {
        let all = [Area::new(0, 100 * BLOCK_BYTES + 512)];
        let works = plan(&all, &all);
        assert_eq!(covered(&works), [(0, 100 * BLOCK_BYTES + 512, true)]);
    }

    #[test]
    fn a_zero_run_stays_with_the_data_of_its_block() {
        // Else two threads could write into one cluster.
        let works = plan(&[Area::new(0, 4096), Area::new(8192, 12288)], &[Area::new(0, 4096)]);
        assert_eq!(works.len(), 1);
        assert_eq!(works[0].runs.len(), 2);
    }
}
