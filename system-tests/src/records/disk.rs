// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk of the pair: a block device (past the page cache) or an image file, and its first filling.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::content::{Header, SECTOR_LEN, Side};
use super::layout::{BLOCK_BYTES, Holds, Layout, SECTOR_BYTES};

/// `O_DIRECT` of Linux on `x86_64`.
const O_DIRECT: i32 = 0o40000;
const ALIGNMENT: usize = 4096;
/// How much is written at once when a disk is filled.
const FILL_CHUNK_BYTES: u64 = 1 << 20;

/// A byte buffer at an address that `O_DIRECT` accepts.
pub struct AlignedBuffer {
    storage: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    /// A buffer of `len` zeroes.
    #[must_use]
    pub fn new(len: usize) -> Self {
        let storage = vec![0; len + ALIGNMENT];
        let start = storage.as_ptr().align_offset(ALIGNMENT);
        Self { storage, start, len }
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.storage[self.start..self.start + self.len]
    }
}

/// An open disk with its header and layout.
pub struct Disk {
    /// Where the disk is.
    pub path: PathBuf,
    /// The disk itself.
    pub file: File,
    /// What its first sector says.
    pub header: Header,
    /// Where records go.
    pub layout: Layout,
}

impl Disk {
    /// Opens a disk that was filled before.
    ///
    /// # Errors
    /// It cannot be opened or read, or has no valid header for its size.
    pub fn open(path: &Path, writable: bool) -> Result<Self, String> {
        let file = open_direct(path, writable).map_err(|error| explain(path, "open", &error))?;
        let mut block = AlignedBuffer::new(ALIGNMENT);
        file.read_exact_at(block.bytes(), 0).map_err(|error| explain(path, "read", &error))?;
        let header = Header::decode(block.bytes())
            .ok_or_else(|| format!("{} has no header of a record disk", path.display()))?;
        let size = size_of(&file).map_err(|error| explain(path, "measure", &error))?;
        if size != header.disk_bytes {
            let expected = header.disk_bytes;
            return Err(format!("{} is {size} bytes, not {expected}", path.display()));
        }
        let layout = Layout::new(size)?;
        Ok(Self { path: path.to_owned(), file, header, layout })
    }

    /// Reads a range in full.
    ///
    /// # Errors
    /// As the read fails; the text names disk and offset.
    pub fn read(&self, buffer: &mut [u8], offset_bytes: u64) -> Result<(), String> {
        self.file
            .read_exact_at(buffer, offset_bytes)
            .map_err(|error| format!("disk {} at {offset_bytes}: {error}", self.header.side))
    }

    /// Writes sector `at_sector` of a buffer as the record (or first filling) it must hold.
    pub fn fill_sector(&self, holds: Holds, at_sector: u64, sector: &mut [u8]) {
        fill_sector(&self.header, holds, at_sector, sector);
    }
}

/// Puts what a sector must hold into a buffer.
fn fill_sector(header: &Header, holds: Holds, at_sector: u64, sector: &mut [u8]) {
    match holds {
        Holds::Zero => sector.fill(0),
        Holds::Prefill => header.fill(None, at_sector, sector),
        Holds::Record(number) => header.fill(Some(number), at_sector, sector),
        Holds::Header if at_sector == 0 => sector.copy_from_slice(&header.encode()),
        Holds::Header => sector.fill(0),
    }
}

/// Makes a pair of raw image files with header and first filling, both sparse where empty.
///
/// # Errors
/// A file cannot be made or written, or the size is too small or no multiple of 4 KiB.
pub fn create_pair(paths: [&Path; 2], disk_bytes: u64, pair: u64) -> Result<(), String> {
    if !disk_bytes.is_multiple_of(BLOCK_BYTES) {
        return Err(format!("{disk_bytes} is no multiple of {BLOCK_BYTES}"));
    }
    let layout = Layout::new(disk_bytes)?;
    for (path, side) in paths.into_iter().zip([Side::A, Side::B]) {
        let header = Header { side, pair, disk_bytes };
        create_one(path, &header, &layout).map_err(|error| explain(path, "write", &error))?;
    }
    Ok(())
}

fn create_one(path: &Path, header: &Header, layout: &Layout) -> io::Result<()> {
    let file = File::create_new(path)?;
    file.set_len(header.disk_bytes)?;
    let mut buffer = vec![0; FILL_CHUNK_BYTES as usize];
    let mut offset = 0;
    while offset < header.disk_bytes {
        let len = FILL_CHUNK_BYTES.min(header.disk_bytes - offset) as usize;
        let mut any = false;
        for (index, sector) in buffer[..len].chunks_exact_mut(SECTOR_LEN).enumerate() {
            let at_sector = offset / SECTOR_BYTES + index as u64;
            let holds = layout.holds(0, at_sector);
            any |= holds != Holds::Zero;
            fill_sector(header, holds, at_sector, sector);
        }
        if any {
            file.write_all_at(&buffer[..len], offset)?;
        }
        offset += len as u64;
    }
    file.sync_all()
}

pub(super) fn open_direct(path: &Path, writable: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(writable);
    if path.metadata()?.file_type().is_block_device() {
        options.custom_flags(O_DIRECT);
    }
    options.open(path)
}

pub(super) fn size_of(mut file: &File) -> io::Result<u64> {
    io::Seek::seek(&mut file, io::SeekFrom::End(0))
}

fn explain(path: &Path, verb: &str, error: &io::Error) -> String {
    format!("cannot {verb} {}: {error}", path.display())
}
