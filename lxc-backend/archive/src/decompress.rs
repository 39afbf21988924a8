// SPDX-License-Identifier: MIT OR Apache-2.0
//! The compressions of tar archives, with bounded memory.

use std::io::{self, BufRead, BufReader, Read};

use crate::error::{ArchiveError, Result};

const BUFFER_BYTES: usize = 256 << 10;
/// `zstd --long=31` is the most that the program itself takes; this is `--long=27`, its limit unless told
/// otherwise.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// `xz -9` needs 65 MiB.
const XZ_MEMORY_KIB_MAX: u32 = 256 << 10;

/// A compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// None.
    None,
    /// gzip, also of several members.
    Gz,
    /// bzip2, also of several streams.
    Bz2,
    /// xz, also of several streams.
    Xz,
    /// zstd, also of several frames.
    Zst,
}

impl Codec {
    /// What the first bytes say it is.
    const MAGICS: [(Self, &'static [u8]); 4] = [
        (Self::Gz, b"\x1f\x8b"),
        (Self::Bz2, b"BZh"),
        (Self::Xz, b"\xfd7zXZ\0"),
        (Self::Zst, b"\x28\xb5\x2f\xfd"),
    ];
}

/// The tar archive in a file.
///
/// # Errors
/// It cannot be read, or is compressed otherwise than said.
pub fn decompress<'a>(
    inner: impl Read + Send + 'a,
    codec: Codec,
) -> Result<Box<dyn Read + Send + 'a>> {
    let mut inner = BufReader::with_capacity(BUFFER_BYTES, inner);
    let first = inner.fill_buf().map_err(ArchiveError::Read)?;
    let magic = Codec::MAGICS.iter().find(|(other, _)| *other == codec);
    let is_as_said = magic.is_none_or(|(_, magic)| {
        let len = magic.len().min(first.len());
        len > 0 && first[..len] == magic[..len]
    });
    if !is_as_said {
        let why = format!("it is not compressed with {codec:?}, as was said").to_lowercase();
        return Err(ArchiveError::Damaged { at: 0, why });
    }
    Ok(match codec {
        Codec::None => Box::new(inner),
        Codec::Gz => Box::new(buffered(flate2::bufread::MultiGzDecoder::new(inner))),
        Codec::Bz2 => Box::new(buffered(bzip2::bufread::MultiBzDecoder::new(inner))),
        Codec::Xz => {
            Box::new(buffered(lzma_rust2::XzReader::new_mem_limit(inner, true, XZ_MEMORY_KIB_MAX)))
        }
        Codec::Zst => {
            let mut decoder = zstd::Decoder::with_buffer(inner).map_err(ArchiveError::Read)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG_MAX).map_err(ArchiveError::Read)?;
            Box::new(buffered(decoder))
        }
    })
}

fn buffered<R: Read>(inner: R) -> impl Read {
    BufReader::with_capacity(BUFFER_BYTES, Checked(inner))
}

/// Says of a decoder's faults that they are the archive's.
struct Checked<R>(R);

impl<R: Read> Read for Checked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer).map_err(|error| {
            let kind = error.kind();
            io::Error::new(kind, format!("it cannot be decompressed: {error}"))
        })
    }
}
