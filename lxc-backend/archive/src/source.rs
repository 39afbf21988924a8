// SPDX-License-Identifier: MIT OR Apache-2.0
//! The bytes of an archive, with a position for messages.

use std::io::{self, Read};

use crate::error::{ArchiveError, Result};
use crate::header::BLOCK;

/// What may follow the end of an archive at most: padding.
const PADDING_BYTES_MAX: u64 = 64 << 20;

/// The bytes of an archive.
#[derive(Debug)]
pub(crate) struct Source<R> {
    inner: R,
    at: u64,
}

impl<R: Read> Source<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self { inner, at: 0 }
    }

    pub(crate) fn damaged<T>(&self, why: impl Into<String>) -> Result<T> {
        Err(ArchiveError::Damaged { at: self.at, why: why.into() })
    }

    /// Some bytes; 0 at the end.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        loop {
            match self.inner.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return self.damaged("it is cut off");
                }
                Err(error) => return Err(ArchiveError::Read(error)),
                Ok(count) => {
                    self.at = self.at.saturating_add(count as u64);
                    return Ok(count);
                }
            }
        }
    }

    /// Fills the whole buffer.
    pub(crate) fn exact(&mut self, mut buffer: &mut [u8]) -> Result<()> {
        while !buffer.is_empty() {
            match self.read(buffer)? {
                0 => return self.damaged("it is cut off"),
                count => buffer = &mut buffer[count..],
            }
        }
        Ok(())
    }

    pub(crate) fn block(&mut self) -> Result<[u8; BLOCK]> {
        let mut block = [0; BLOCK];
        self.exact(&mut block)?;
        Ok(block)
    }

    /// Exactly so many bytes, memory being taken only as they come.
    pub(crate) fn bytes(&mut self, len: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            let start = bytes.len();
            bytes.resize((start + (64 << 10)).min(len), 0);
            self.exact(&mut bytes[start..])?;
        }
        Ok(bytes)
    }

    pub(crate) fn skip(&mut self, mut len: u64) -> Result<()> {
        let mut buffer = [0; 16 << 10];
        while len > 0 {
            let piece = usize::try_from(len).unwrap_or(usize::MAX).min(buffer.len());
            self.exact(&mut buffer[..piece])?;
            len -= piece as u64;
        }
        Ok(())
    }

    /// Reads what is behind the end: nothing but padding, bounded. Checksums of the compression are at its end.
    pub(crate) fn drain(&mut self) -> Result<()> {
        let mut buffer = [0; 16 << 10];
        let start = self.at;
        loop {
            let count = self.read(&mut buffer)?;
            if count == 0 {
                return Ok(());
            }
            if buffer[..count].iter().any(|byte| *byte != 0) {
                return self.damaged("something follows its end");
            }
            if self.at - start > PADDING_BYTES_MAX {
                return self.damaged("its padding does not end");
            }
        }
    }
}
