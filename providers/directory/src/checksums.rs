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
use std::io::Write;
use std::path::Path;

use provider_api::{Error, Result};

use crate::call::blocking;
use crate::files;
use crate::limits::BLOCK_BYTES;
use crate::manifest::Checksums;

/// Text held back before it is written.
const BUFFER_BYTES: usize = 256 << 10;

/// Checksum of one area; no hash for zeroes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) offset: u64,
    pub(crate) length_bytes: u64,
    pub(crate) hash: Option<blake3::Hash>,
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
