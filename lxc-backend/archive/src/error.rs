// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why an archive cannot be read.

use std::io;

/// The most characters of a path in a message.
const SHOWN_MAX: usize = 200;

/// A result with an [`ArchiveError`].
pub type Result<T> = std::result::Result<T, ArchiveError>;

/// Why an archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// It could not be read, or not decompressed.
    #[error("cannot read the archive")]
    Read(#[source] io::Error),
    /// It is no archive, or no whole one.
    #[error("the archive is damaged at byte {at}: {why}")]
    Damaged {
        /// Where, counted in bytes of the tar stream.
        at: u64,
        /// What is wrong.
        why: String,
    },
    /// An entry that is not taken.
    #[error("'{path}' in the archive: {why}")]
    Refused {
        /// Its path, as it can be shown.
        path: String,
        /// Why.
        why: String,
    },
    /// More than the limits allow.
    #[error("the archive has too much: {0}")]
    TooMuch(String),
    /// More bytes of data than the limit allows.
    #[error("the archive has too much: more than {limit_bytes} bytes of data with '{path}'")]
    TooMuchData {
        /// The file that is too much, as it can be shown.
        path: String,
        /// The limit.
        limit_bytes: u64,
    },
    /// The caller could not write what was read.
    #[error("cannot write a file of the archive")]
    Write(#[source] io::Error),
}

/// A path for people: short, in one line, without what a terminal would obey.
#[must_use]
pub fn shown(path: &[u8]) -> String {
    let text = String::from_utf8_lossy(path);
    let clean = |c: char| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
    let mut short: String = text.chars().take(SHOWN_MAX).map(clean).collect();
    if text.chars().nth(SHOWN_MAX).is_some() {
        short.push('…');
    }
    short
}

/// A fault of one entry.
pub(crate) fn refused<T>(path: &[u8], why: impl Into<String>) -> Result<T> {
    Err(ArchiveError::Refused { path: shown(path), why: why.into() })
}
