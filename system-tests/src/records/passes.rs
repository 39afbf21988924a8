// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk that several threads write at once, each its own section, from the beginning to the end
//! and again. A request lies across the borders of 4 KiB granules, so neighbours share granules.
//!
//! In one point in time each section holds blocks of one pass, followed by blocks of the pass
//! before it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::disk::{AlignedBuffer, open_direct};
use super::layout::SECTOR_BYTES;

/// Bytes of one request; no divisor or multiple of a granule.
pub const BLOCK_BYTES: u64 = 3 * SECTOR_BYTES;
/// Passes between two lines on the console.
const REPORT_EVERY: u64 = 4;

/// How a disk is divided.
#[derive(Debug, Clone, Copy)]
pub struct Sections {
    /// How many there are.
    pub count: u64,
    /// Blocks of each; what is left of the disk is not used.
    pub blocks: u64,
}

impl Sections {
    /// Divides a disk.
    ///
    /// # Errors
    /// It is too small.
    pub fn new(disk_bytes: u64, count: u64) -> Result<Self, String> {
        let blocks = disk_bytes / BLOCK_BYTES / count.max(1);
        if blocks == 0 {
            return Err(format!("{disk_bytes} bytes are too few for {count} sections"));
        }
        Ok(Self { count, blocks })
    }

    fn offset_bytes(self, section: u64, block: u64) -> u64 {
        (section * self.blocks + block) * BLOCK_BYTES
    }
}

fn fill(pass: u64, offset_bytes: u64, block: &mut [u8]) {
    let words = block.chunks_exact_mut(8);
    for (word, at) in words.zip((offset_bytes..).step_by(8)) {
        word.copy_from_slice(&(pass << 40 | at).to_le_bytes());
    }
}

/// Makes the image file of such a disk; it holds pass 0.
///
/// # Errors
/// It cannot be written.
pub fn create(path: &Path, disk_bytes: u64, sections: Sections) -> std::io::Result<()> {
    let file = File::create_new(path)?;
    file.set_len(disk_bytes)?;
    let mut block = [0; BLOCK_BYTES as usize];
    for number in 0..sections.count * sections.blocks {
        fill(0, number * BLOCK_BYTES, &mut block);
        file.write_all_at(&block, number * BLOCK_BYTES)?;
    }
    Ok(())
}

/// Writes passes until `last` (0: for ever), one thread for each section.
///
/// # Errors
/// A write fails.
pub fn write(path: &Path, sections: Sections, last: u64) -> Result<(), String> {
    let done = Arc::new(AtomicU64::new(0));
    let threads: Vec<_> = (0..sections.count)
        .map(|section| {
            let file = open_direct(path, true).map_err(|error| error.to_string())?;
            let done = Arc::clone(&done);
            Ok(std::thread::spawn(move || write_section(&file, sections, section, last, &done)))
        })
        .collect::<Result<_, String>>()?;
    for thread in threads {
        thread.join().map_err(|_| "a writer panicked".to_owned())??;
    }
    Ok(())
}

fn write_section(
    file: &File,
    sections: Sections,
    section: u64,
    last: u64,
    done: &AtomicU64,
) -> Result<(), String> {
    let mut buffer = AlignedBuffer::new(BLOCK_BYTES as usize);
    let mut pass = 0;
    while last == 0 || pass < last {
        pass += 1;
        for block in 0..sections.blocks {
            let offset_bytes = sections.offset_bytes(section, block);
            fill(pass, offset_bytes, buffer.bytes());
            file.write_all_at(buffer.bytes(), offset_bytes)
                .map_err(|error| format!("section {section}, block {block}: {error}"))?;
        }
        let all = done.fetch_add(1, Ordering::Relaxed) + 1;
        if all.is_multiple_of(REPORT_EVERY) {
            println!("PASSES {all}");
        }
    }
    Ok(())
}

/// Checks the content of a point in time; the pass of each section's first block.
///
/// # Errors
/// The content was never that of the disk.
pub fn check(bytes: &[u8], sections: Sections) -> Result<Vec<u64>, String> {
    let mut passes = Vec::new();
    let mut wanted = [0; BLOCK_BYTES as usize];
    for section in 0..sections.count {
        let mut first = None;
        let mut current = 0;
        for block in 0..sections.blocks {
            let offset_bytes = sections.offset_bytes(section, block);
            let start = offset_bytes as usize;
            let found = bytes.get(start..start + wanted.len()).ok_or("the disk is too short")?;
            let word = u64::from_le_bytes(found[..8].try_into().unwrap_or_default());
            let pass = word >> 40;
            fill(pass, offset_bytes, &mut wanted);
            let at = format!("section {section}, block {block} of {}", sections.blocks);
            if found != wanted {
                return Err(format!("{at}: torn or foreign, it begins with pass {pass}"));
            }
            let newest = *first.get_or_insert(pass);
            if block > 0 && pass != current && (pass + 1 != newest || current != newest) {
                return Err(format!("{at}: pass {pass} after {current}; the first is {newest}"));
            }
            current = pass;
        }
        passes.extend(first);
    }
    Ok(passes)
}

#[cfg(test)]
mod tests {
    use super::{BLOCK_BYTES, Sections, check, create, fill, write};

    #[test]
    fn only_what_was_there_in_one_point_in_time_passes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let sections = Sections::new(100_000, 3).unwrap();
        create(&path, 100_000, sections).unwrap();
        assert_eq!(check(&std::fs::read(&path).unwrap(), sections).unwrap(), [0, 0, 0]);
        write(&path, sections, 2).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        assert_eq!(check(&bytes, sections).unwrap(), [2, 2, 2]);
        let mut put = |block: u64, pass: u64| {
            let start = block * BLOCK_BYTES;
            fill(pass, start, &mut bytes[start as usize..(start + BLOCK_BYTES) as usize]);
            check(&bytes, sections)
        };
        assert_eq!(put(0, 3).unwrap(), [3, 2, 2]);
        assert!(put(2, 3).unwrap_err().contains("block 2"), "a block too early");
        assert!(put(1, 3).is_ok());
        assert!(put(4, 1).is_err(), "a block of an older pass");
        assert!(put(4, 2).is_ok());
        bytes[700] ^= 1;
        assert!(check(&bytes, sections).unwrap_err().contains("torn"));
    }
}
