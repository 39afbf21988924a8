// SPDX-License-Identifier: MIT OR Apache-2.0
//! The file of checksums of one disk: what a later verify compares with.
//!
//! One line per area that the archive holds: offset, length, and the blake3 hash of the disk's
//! content there, or `zero`. Areas are in order, disjoint, and do not cross a multiple of 4 MiB
//! unless they are zero. A full backup covers the disk; an increment covers what was dirty.
//!
//! ```text
//! 0 4194304 7f3a…
//! 4194304 1069547520 zero
//! ```

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::path::Path;

use provider_api::{Error, Result};

use crate::areas::Area;
use crate::call::{blocking, corrupt};
use crate::files;
use crate::limits::BLOCK_BYTES;
use crate::manifest::Checksums;

/// Text held back before it is written, or read at once.
const BUFFER_BYTES: usize = 256 << 10;
/// What areas begin and end at, unless it is the end of the disk.
const SECTOR_BYTES: u64 = 512;
/// More than the longest line: two numbers and a hash.
const LINE_BYTES_MAX: u64 = 128;

/// Checksum of one area; no hash for zeroes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) offset: u64,
    pub(crate) length_bytes: u64,
    pub(crate) hash: Option<blake3::Hash>,
}

impl Line {
    pub(crate) fn area(&self) -> Area {
        Area::new(self.offset, self.offset + self.length_bytes)
    }
}

/// Writes the file.
#[derive(Debug)]
pub(crate) struct ChecksumWriter {
    file: File,
    path: String,
    text: Vec<u8>,
    /// A zero area that the next line may continue.
    zero: Option<Line>,
    hasher: blake3::Hasher,
    written_bytes: u64,
}

impl ChecksumWriter {
    /// Makes the file.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        Ok(Self {
            file: files::create(path)?,
            path: path.display().to_string(),
            text: Vec::new(),
            zero: None,
            hasher: blake3::Hasher::new(),
            written_bytes: 0,
        })
    }

    /// Adds the next area; gives the writer back.
    pub(crate) async fn add(mut self, lines: Vec<Line>) -> Result<Self> {
        for line in lines {
            self.add_one(line);
        }
        if self.text.len() < BUFFER_BYTES {
            return Ok(self);
        }
        blocking(move || {
            self.write_text()?;
            Ok(self)
        })
        .await
    }

    /// As [`ChecksumWriter::add`], on a blocking thread.
    pub(crate) fn add_blocking(&mut self, line: Line) -> Result<()> {
        self.add_one(line);
        if self.text.len() < BUFFER_BYTES { Ok(()) } else { self.write_text() }
    }

    fn add_one(&mut self, line: Line) {
        if line.hash.is_some() {
            self.end_zero();
            self.format(&line);
            return;
        }
        match &mut self.zero {
            Some(zero) if zero.offset + zero.length_bytes == line.offset => {
                zero.length_bytes += line.length_bytes;
            }
            _ => {
                self.end_zero();
                self.zero = Some(line);
            }
        }
    }

    fn end_zero(&mut self) {
        if let Some(zero) = self.zero.take() {
            self.format(&zero);
        }
    }

    fn format(&mut self, line: &Line) {
        let Line { offset, length_bytes, hash } = line;
        let text = match hash {
            Some(hash) => format!("{offset} {length_bytes} {}\n", hash.to_hex()),
            None => format!("{offset} {length_bytes} zero\n"),
        };
        self.text.extend_from_slice(text.as_bytes());
    }

    fn write_text(&mut self) -> Result<()> {
        self.hasher.update(&self.text);
        self.written_bytes += self.text.len() as u64;
        self.file
            .write_all(&self.text)
            .map_err(|e| Error::io(format!("Cannot write {}.", self.path), e))?;
        self.text.clear();
        Ok(())
    }

    /// Makes the file durable.
    pub(crate) fn finish(mut self) -> Result<Checksums> {
        self.end_zero();
        self.write_text()?;
        self.file.sync_all().map_err(|e| Error::io(format!("Cannot sync {}.", self.path), e))?;
        Ok(Checksums {
            block_size_bytes: BLOCK_BYTES,
            file_size_bytes: self.written_bytes,
            blake3: self.hasher.finalize().to_hex().to_string(),
        })
    }
}

/// Reads the file, line by line; each line is checked.
#[derive(Debug)]
pub(crate) struct ChecksumReader {
    text: BufReader<File>,
    path: String,
    size_bytes: u64,
    /// Where the last area ended.
    end: u64,
}

impl ChecksumReader {
    /// Opens the file of a disk with `size_bytes` bytes; refused unless it is what the manifest says.
    pub(crate) fn open(path: &Path, expected: &Checksums, size_bytes: u64) -> Result<Self> {
        let shown = path.display().to_string();
        let failed = |e| Error::io(format!("Cannot read {shown}."), e);
        let file = files::open_regular(path)?;
        let mut hasher = blake3::Hasher::new();
        let mut text = BufReader::with_capacity(BUFFER_BYTES, file);
        let length_bytes = std::io::copy(
            &mut (&mut text).take(expected.file_size_bytes.saturating_add(1)),
            &mut hasher,
        )
        .map_err(failed)?;
        if length_bytes != expected.file_size_bytes
            || hasher.finalize().to_hex().as_str() != expected.blake3
        {
            return Err(corrupt(format!("{shown} does not match its checksum.")));
        }
        text.rewind().map_err(failed)?;
        Ok(Self { text, path: shown, size_bytes, end: 0 })
    }

    /// The next line.
    pub(crate) fn next(&mut self) -> Result<Option<Line>> {
        let mut text = String::new();
        (&mut self.text)
            .take(LINE_BYTES_MAX)
            .read_line(&mut text)
            .map_err(|e| Error::io(format!("Cannot read {}.", self.path), e))?;
        if text.is_empty() {
            return Ok(None);
        }
        let line = parse(&text).filter(|line| self.fits(line));
        let line = line.ok_or_else(|| {
            corrupt(format!("{} has a wrong line behind {}.", self.path, self.end))
        })?;
        self.end = line.area().end;
        Ok(Some(line))
    }

    fn fits(&self, line: &Line) -> bool {
        let Some(end) = line.offset.checked_add(line.length_bytes) else { return false };
        let is_whole = |line: &Line| {
            line.hash.is_none() || line.offset / BLOCK_BYTES == (end - 1) / BLOCK_BYTES
        };
        // Else a block could have millions of them.
        let is_aligned = line.offset.is_multiple_of(SECTOR_BYTES)
            && (end.is_multiple_of(SECTOR_BYTES) || end == self.size_bytes);
        line.length_bytes > 0
            && line.offset >= self.end
            && end <= self.size_bytes
            && is_aligned
            && is_whole(line)
    }
}

/// The lines of one file of checksums, which can be cut.
pub(crate) struct Lines {
    reader: ChecksumReader,
    next: Option<Line>,
}

impl Lines {
    pub(crate) fn new(mut reader: ChecksumReader) -> Result<Self> {
        let next = reader.next()?;
        Ok(Self { reader, next })
    }

    pub(crate) fn peek(&self) -> Option<&Line> {
        self.next.as_ref()
    }

    /// The next line as far as it lies before `end`. Only zeroes are ever cut.
    pub(crate) fn before(&mut self, end: u64) -> Result<Option<Line>> {
        let Some(line) = self.next.take_if(|line| line.offset < end) else { return Ok(None) };
        if line.area().end <= end {
            self.next = self.reader.next()?;
            return Ok(Some(line));
        }
        self.next =
            Some(Line { offset: end, length_bytes: line.area().end - end, hash: line.hash });
        Ok(Some(Line { length_bytes: end - line.offset, ..line }))
    }
}

fn parse(text: &str) -> Option<Line> {
    let mut words = text.strip_suffix('\n')?.split(' ');
    let (offset, length_bytes) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let hash = match words.next()? {
        "zero" => None,
        hash => Some(blake3::Hash::from_hex(hash).ok()?),
    };
    words.next().is_none().then_some(Line { offset, length_bytes, hash })
}

#[cfg(test)]
mod tests {
    use provider_api::Kind;

    use super::{ChecksumReader, ChecksumWriter, Line};
    use crate::limits::BLOCK_BYTES;

    #[test]
    fn what_is_written_is_read_and_damage_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("scsi0.blake3");
        let mut writer = ChecksumWriter::create(&path).unwrap();
        let line = |offset, length_bytes, hash| Line { offset, length_bytes, hash };
        let hash = Some(blake3::hash(b"x"));
        let lines = [line(512, 1024, hash), line(BLOCK_BYTES, 9 * BLOCK_BYTES, None)];
        lines.iter().for_each(|line| writer.add_blocking(line.clone()).unwrap());
        let sums = writer.finish().unwrap();
        let size_bytes = 10 * BLOCK_BYTES;
        let mut reader = ChecksumReader::open(&path, &sums, size_bytes).unwrap();
        assert_eq!(reader.next().unwrap().as_ref(), Some(&lines[0]));
        assert_eq!(reader.next().unwrap().as_ref(), Some(&lines[1]));
        assert_eq!(reader.next().unwrap(), None);
        // Beyond the end of a smaller disk.
        let mut reader = ChecksumReader::open(&path, &sums, size_bytes - 512).unwrap();
        reader.next().unwrap();
        assert_eq!(reader.next().unwrap_err().kind, Kind::Corrupt);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[0] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert!(ChecksumReader::open(&path, &sums, size_bytes).is_err());
    }

    #[test]
    fn lines_that_cannot_be_are_refused() {
        let hash = blake3::hash(b"x").to_hex();
        let crossing = format!("{} 1024 {hash}\n", BLOCK_BYTES - 512);
        for text in [
            "",
            "0 1024",
            "0 1024 zero",
            "0 0 zero\n",
            "0 1024 zero x\n",
            "0 1024 beef\n",
            "-1 1024 zero\n",
            "18446744073709551615 1024 zero\n",
            &crossing,
            "0 1024 zero\n512 1024 zero\n",
            "0 100 zero\n",
            "1 511 zero\n",
        ] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("x");
            std::fs::write(&path, text).unwrap();
            let sums = super::Checksums {
                block_size_bytes: BLOCK_BYTES,
                file_size_bytes: text.len() as u64,
                blake3: blake3::hash(text.as_bytes()).to_hex().to_string(),
            };
            let mut reader = ChecksumReader::open(&path, &sums, 1 << 40).unwrap();
            let all: Result<Vec<_>, _> = std::iter::from_fn(|| reader.next().transpose()).collect();
            assert_eq!(all.is_ok(), text.is_empty(), "{text:?}");
        }
    }
}
