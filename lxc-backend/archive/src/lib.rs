// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reads tar archives of file trees that nobody vouches for.
//!
//! What comes out of a [`Reader`] has been checked: paths stay below the root, numbers are in range, maps of sparse
//! files fit their data, and memory is bounded whatever the archive says. What two readers could understand
//! differently (sizes that contradict each other, data behind something that has none, two descriptions
//! of one entry) is refused. Nothing is written here: that is up to the caller.
//!
//! ```text
//!  bytes ─► decompress ─► header ─► pax / GNU long names ─► sparse ─► Entry, then its data
//! ```
//!
//! Formats: V7, ustar, pax with GNU's and star's keywords, GNU with long names; sparse files as GNU tar writes
//! them (old GNU, pax 0.0, 0.1 and 1.0); compressed with gzip, bzip2, xz or zstd.
#![forbid(unsafe_code)]

pub mod acl;
mod decompress;
mod entry;
mod error;
mod header;
mod number;
mod path;
mod pax;
mod reader;
mod source;
mod sparse;

pub use decompress::{Codec, decompress};
pub use entry::{Entry, Kind, Region, Time};
pub use error::{ArchiveError, Result, shown};
pub use path::{NAME_BYTES_MAX, clean};
pub use reader::Reader;

/// What an archive may have at most. The default is more than what a backup stores of a container's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Entries.
    pub entries: u64,
    /// Bytes of all files together, as far as they are in the archive.
    pub data_bytes: u64,
    /// Size of one file with its holes.
    pub file_bytes: u64,
    /// Bytes of one path.
    pub path_bytes: usize,
    /// Bytes of one extended header.
    pub header_bytes: usize,
    /// Pieces of one sparse file.
    pub regions: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries: 100_000_000,
            data_bytes: i64::MAX as u64,
            file_bytes: i64::MAX as u64,
            // In a volume 64 KiB are followed; before them is its mount point, and behind them a name.
            path_bytes: 72 << 10,
            // On XFS one file can have more than memory has room for.
            header_bytes: 64 << 20,
            // 16 bytes of memory each, once the archive has them.
            regions: 64 << 20,
        }
    }
}
