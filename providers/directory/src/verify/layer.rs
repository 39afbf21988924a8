// SPDX-License-Identifier: MIT OR Apache-2.0
//! What one archive adds to a disk, compared with its checksums.
//!
//! ```text
//! checksums   |aaaa|      |bbbb|zzzzzz|        has a hash, or is zero
//! image       |aaaa|    |xbbbbx|zzzzzz|        whole clusters: x was copied from below
//! below     |..............................|
//! ```
//!
//! Areas with a hash are read and hashed, zero ones must be zero. Everywhere else the archive must
//! give what is below it: where its image has nothing, it does; where it has something, both are
//! read and compared. So all that an archive gives is right if all that is below it is: also a wrong
//! entry of an image's tables is found, which no checksum would see. Memory: two blocks.

use provider_api::{Call, Result, VerifyExtent};

use super::{Findings, News};
use crate::areas::Area;
use crate::call::{check, corrupt};
use crate::chain::Chain;
use crate::checksums::{ChecksumReader, Line, Lines};
use crate::image::{ImageReader, Kept};
use crate::limits::BLOCK_BYTES;
use crate::manifest::{Disk, checksums_file};
use crate::storage::Storage;
use crate::store::is_zero;

const WHAT: &str = "The verification";

/// Which blocks are looked at.
pub(super) struct Choice {
    pub(super) extent: VerifyExtent,
}

impl Choice {
    /// Whether the block with this offset is. The same for each archive of a chain, so that one stays
    /// in the cache until the next one is compared with it.
    fn takes(&self, device: &str, offset: u64) -> bool {
        let VerifyExtent::Sample { percent, seed } = self.extent else { return true };
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes()).update(&(offset / BLOCK_BYTES).to_le_bytes());
        let hash = hasher.update(device.as_bytes()).finalize();
        let number = hash.as_bytes().first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        number % 100 < u32::from(percent)
    }
}

/// One disk of one archive.
pub(super) struct Layer {
    pub(super) archive: String,
    /// Its own image on top.
    pub(super) chain: Chain,
    pub(super) disk: Disk,
}

impl Layer {
    fn lines(&self, storage: &Storage) -> Result<Lines> {
        let path = storage.archive_path(&self.archive).join(checksums_file(&self.disk.device));
        Lines::new(ChecksumReader::open(&path, &self.disk.checksums, self.disk.size_bytes)?)
    }

    /// Bytes that have a hash, of the blocks that are looked at. Reads all checksums.
    pub(super) fn data_bytes(
        &self,
        storage: &Storage,
        choice: &Choice,
        call: &Call,
    ) -> Result<u64> {
        let mut lines = self.lines(storage)?;
        let mut sum = 0;
        while let Some(line) = lines.before(self.disk.size_bytes)? {
            check(call, WHAT)?;
            if line.hash.is_some() && choice.takes(&self.disk.device, line.offset) {
                sum += line.length_bytes;
            }
        }
        Ok(sum)
    }

    /// Reads and compares. `told` makes of the bytes done what is reported.
    pub(super) fn check(
        &self,
        storage: &Storage,
        choice: &Choice,
        call: &Call,
        findings: &mut Findings,
        mut told: impl FnMut(u64) -> News,
    ) -> Result<()> {
        let device = Some(self.disk.device.as_str());
        let opened = self.lines(storage).and_then(|lines| {
            let below = self.chain.below();
            let below = below.as_ref().map(ImageReader::open).transpose()?;
            Ok((lines, Pass { layer: self, image: ImageReader::open(&self.chain)?, below }))
        });
        let (mut lines, pass) = match opened {
            Ok(opened) => opened,
            Err(error) => return findings.fault(&self.archive, device, None, error),
        };
        for block in Area::new(0, self.disk.size_bytes).split(BLOCK_BYTES) {
            check(call, WHAT)?;
            let found: Result<Vec<Line>> =
                std::iter::from_fn(|| lines.before(block.end).transpose()).collect();
            let found = match found {
                Ok(found) => found,
                Err(error) => return findings.fault(&self.archive, device, Some(block), error),
            };
            if !choice.takes(&self.disk.device, block.start) {
                continue;
            }
            pass.block(block, &found, findings)?;
            let hashed = found.iter().filter(|line| line.hash.is_some());
            let bytes = hashed.map(|line| line.length_bytes).sum();
            if bytes > 0 {
                findings.tell(told(bytes));
            }
        }
        Ok(())
    }
}

/// One way through a layer.
struct Pass<'a> {
    layer: &'a Layer,
    image: ImageReader,
    below: Option<ImageReader>,
}

impl Pass<'_> {
    fn block(&self, block: Area, lines: &[Line], findings: &mut Findings) -> Result<()> {
        findings.report.blocks += 1;
        let mut at = block.start;
        for line in lines {
            self.judge(Area::new(at, line.offset), findings, Self::gap)?;
            match line.hash {
                Some(hash) => self.judge(line.area(), findings, |pass, area, findings| {
                    let data = pass.read(&pass.image, area, findings)?;
                    same(blake3::hash(&data) == hash, "its data does not match its checksum")
                })?,
                None => self.judge(line.area(), findings, Self::zeroes)?,
            }
            at = line.area().end;
        }
        self.judge(Area::new(at, block.end), findings, Self::gap)
    }

    /// Checks one area; what is wrong with it is damage.
    fn judge(
        &self,
        area: Area,
        findings: &mut Findings,
        work: impl FnOnce(&Self, Area, &mut Findings) -> Result<()>,
    ) -> Result<()> {
        if area.length_bytes() == 0 {
            return Ok(());
        }
        work(self, area, findings).or_else(|error| {
            let Layer { archive, disk, .. } = self.layer;
            findings.fault(archive, Some(&disk.device), Some(area), error)
        })
    }

    fn read(&self, image: &ImageReader, area: Area, findings: &mut Findings) -> Result<Vec<u8>> {
        let length = usize::try_from(area.length_bytes()).expect("at most one block");
        let mut data = vec![0; length];
        image.read(area.start, &mut data)?;
        findings.report.read_bytes += area.length_bytes();
        Ok(data)
    }

    /// An area that must be zero.
    fn zeroes(&self, area: Area, findings: &mut Findings) -> Result<()> {
        self.image.each_kept(area, |part, kept| {
            if kept == Kept::Zero {
                return Ok(());
            }
            let data = self.read(&self.image, part, findings)?;
            same(is_zero(&data), "it should be zero, and is not")
        })
    }

    /// An area without checksum, which must be as it is below.
    fn gap(&self, area: Area, findings: &mut Findings) -> Result<()> {
        let Some(below) = &self.below else {
            return same(false, "it has no checksum, although it builds upon nothing");
        };
        self.image.each_kept(area, |part, kept| {
            if kept == Kept::Below {
                return Ok(());
            }
            let own = self.read(&self.image, part, findings)?;
            let what =
                "its image holds other data than the one below, which its backup did not write";
            same(own == self.read(below, part, findings)?, what)
        })
    }
}

fn same(is_same: bool, problem: &str) -> Result<()> {
    if is_same { Ok(()) } else { Err(corrupt(problem)) }
}
