// SPDX-License-Identifier: MIT OR Apache-2.0
//! Merges one disk of an archive into that of an archive which builds upon it.
//!
//! ```text
//! lower   |aaaaaaaaaaaaaaaa|        |aaaa|        the archive that goes: its image is copied as a file
//! upper        |bbbb|  |0000|                     what the other one holds: written over the copy
//! merged  |aaaa|bbbb|aa|0000|       |aaaa|        builds upon what the lower one built upon
//! ```
//!
//! Both originals stay untouched. What the upper one holds is said by its checksums; everything that
//! is read is compared with them, so a damaged archive stops the merge instead of getting new,
//! matching checksums. Memory is bounded by one block.

use std::path::Path;

use provider_api::{Call, Result};

use crate::areas::Area;
use crate::call::{check, corrupt};
use crate::chain::Chain;
use crate::checksums::{ChecksumReader, ChecksumWriter, Line, Lines};
use crate::files;
use crate::image::{Image, ImageReader};
use crate::kill_point::step;
use crate::limits::{BLOCK_BYTES, WINDOW_BYTES};
use crate::manifest::{Disk, Manifest, checksums_file, image_file};
use crate::storage::Storage;
use crate::store::is_zero;

/// One side of a merge.
struct Side {
    lines: Lines,
    image: ImageReader,
    archive: String,
}

/// The merge of one disk under way.
struct Merge<'a> {
    lower: Side,
    upper: Side,
    merged: Image,
    checksums: ChecksumWriter,
    size_bytes: u64,
    device: &'a str,
    call: &'a Call,
}

/// Merges a disk of `lower` into the one of `upper`, which builds upon it, and stores the result in
/// `directory`. Returns how the manifest describes it.
pub(crate) fn merge_disk(
    storage: &Storage,
    lower: &Manifest,
    upper: &Manifest,
    device: &str,
    directory: &Path,
    call: &Call,
) -> Result<Disk> {
    let missing = || corrupt(format!("Archive {} has no disk {device}.", lower.archive));
    let lower_disk = lower.disk(device).ok_or_else(missing)?;
    let upper_disk = upper.disk(device).ok_or_else(missing)?;
    let upper_chain = Chain::load(storage, upper, device)?;
    let lower_chain = upper_chain.below().ok_or_else(missing)?;
    let side = |manifest: &Manifest, disk: &Disk, chain: &Chain| {
        let sums = storage.archive_path(&manifest.archive).join(checksums_file(device));
        let reader = ChecksumReader::open(&sums, &disk.checksums, disk.size_bytes)?;
        Ok(Side {
            lines: Lines::new(reader)?,
            image: ImageReader::open(chain)?,
            archive: manifest.archive.clone(),
        })
    };
    let image_path = directory.join(image_file(device));
    let original = storage.archive_path(&lower.archive).join(image_file(device));
    let (lower, upper) =
        (side(lower, lower_disk, &lower_chain)?, side(upper, upper_disk, &upper_chain)?);
    files::copy(&original, &image_path, || check(call, "The removal"))?;
    step();
    let mut merge = Merge {
        lower,
        upper,
        merged: Image::reopen(&image_path, &lower_chain)?,
        checksums: ChecksumWriter::create(&directory.join(checksums_file(device)))?,
        size_bytes: upper_disk.size_bytes,
        device,
        call,
    };
    merge.run()?;
    step();
    Ok(Disk {
        base: lower_disk.base.clone(),
        file_size_bytes: merge.merged.finish()?,
        checksums: merge.checksums.finish()?,
        ..upper_disk.clone()
    })
}

impl Side {
    /// Reads an area and compares it with its checksum.
    fn read(&self, line: &Line, device: &str, data: &mut [u8]) -> Result<()> {
        self.image.read(line.offset, data)?;
        if line.hash.is_none_or(|hash| blake3::hash(data) == hash) {
            return Ok(());
        }
        Err(corrupt(format!(
            "Disk {device} of archive {} is damaged at {}; it is neither merged nor merged into.",
            self.archive, line.offset
        )))
    }
}

impl Merge<'_> {
    fn run(&mut self) -> Result<()> {
        while let Some(next) = self.upper.lines.peek() {
            check(self.call, "The removal")?;
            let start = next.offset / BLOCK_BYTES * BLOCK_BYTES;
            let end = start.saturating_add(BLOCK_BYTES).min(self.size_bytes);
            let whole = next.area().end / BLOCK_BYTES * BLOCK_BYTES;
            if next.hash.is_none() && next.offset == start && whole > start {
                self.zero(start, whole)?;
                continue;
            }
            self.keep_lower(start)?;
            self.merge_block(Area::new(start, end))?;
        }
        self.keep_lower(self.size_bytes)
    }

    /// Takes over what only the lower one holds, up to `end`.
    fn keep_lower(&mut self, end: u64) -> Result<()> {
        while let Some(line) = self.lower.lines.before(end)? {
            self.checksums.add_blocking(line)?;
        }
        Ok(())
    }

    /// Whole blocks that the upper one has as zeroes.
    fn zero(&mut self, start: u64, end: u64) -> Result<()> {
        self.keep_lower(start)?;
        while self.lower.lines.before(end)?.is_some() {}
        let Some(line) = self.upper.lines.before(end)? else { return Ok(()) };
        for part in line.area().split(WINDOW_BYTES) {
            check(self.call, "The removal")?;
            self.merged.discard_to_zero(part.start, part.length_bytes())?;
        }
        self.checksums.add_blocking(line)
    }

    fn merge_block(&mut self, block: Area) -> Result<()> {
        let collect = |side: &mut Side| {
            let lines = std::iter::from_fn(|| side.lines.before(block.end).transpose());
            lines.collect::<Result<Vec<_>>>()
        };
        let (lower, upper) = (collect(&mut self.lower)?, collect(&mut self.upper)?);
        let mut data = vec![0u8; length(block)];
        let slice = |area: Area| {
            length(Area::new(block.start, area.start))..length(Area::new(block.start, area.end))
        };
        for line in lower.iter().filter(|line| line.hash.is_some()) {
            let above = upper.partition_point(|above| above.offset <= line.offset).checked_sub(1);
            let is_hidden = above.is_some_and(|at| line.area().end <= upper[at].area().end);
            // What nobody can read any more need not be whole.
            if !is_hidden {
                self.lower.read(line, self.device, &mut data[slice(line.area())])?;
            }
        }
        for line in &upper {
            let part = &mut data[slice(line.area())];
            if line.hash.is_some() {
                self.upper.read(line, self.device, part)?;
                self.merged.write(line.offset, part)?;
            } else {
                part.fill(0);
                self.merged.discard_to_zero(line.offset, line.length_bytes)?;
            }
        }
        for area in unite(&lower, &upper) {
            let part = &data[slice(area)];
            let hash = (!is_zero(part)).then(|| blake3::hash(part));
            let line = Line { offset: area.start, length_bytes: area.length_bytes(), hash };
            self.checksums.add_blocking(line)?;
        }
        Ok(())
    }
}

fn length(area: Area) -> usize {
    usize::try_from(area.length_bytes()).expect("at most one block")
}

/// The areas of both lists, joined where they touch.
fn unite(lower: &[Line], upper: &[Line]) -> Vec<Area> {
    let mut parts: Vec<Area> = lower.iter().chain(upper).map(Line::area).collect();
    parts.sort_by_key(|area| area.start);
    let mut united: Vec<Area> = Vec::new();
    for area in parts {
        match united.last_mut() {
            Some(last) if area.start <= last.end => last.end = last.end.max(area.end),
            _ => united.push(area),
        }
    }
    united
}
