// SPDX-License-Identifier: MIT OR Apache-2.0
//! The parts of a qcow2 header that decide whether an image may be opened.
//!
//! Only what this provider itself writes is let through: version 3, no feature that changes how
//! the image is read, no snapshots, no encryption, no external data file, and exactly the backing
//! name that the manifest calls for.

use std::io::{Read, Seek, SeekFrom};

use crate::limits::CLUSTER_BYTES;

/// Header and extensions fit in the first cluster; this is more than they ever need.
const PREFIX_BYTES: u64 = 64 << 10;
const MAGIC: u32 = 0x5146_49fb;
const HEADER_V3_BYTES: usize = 104;
const BACKING_NAME_BYTES_MAX: usize = 1023;

/// 16 bits.
const REFCOUNT_ORDER: u32 = 4;
/// The largest table of reference counts that QEMU opens.
const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
/// Extensions of an image; more than exist.
const EXTENSIONS_MAX: usize = 16;

/// What a header says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Header {
    backing_name: Option<Vec<u8>>,
    backing_format: Option<Vec<u8>>,
    size_bytes: u64,
    crypt_method: u32,
    snapshots: u32,
    snapshots_offset: u64,
    incompatible_features: u64,
    autoclear_features: u64,
    cluster_bits: u32,
    refcount_order: u32,
    refcount_table_offset: u64,
    refcount_table_clusters: u32,
    unknown_extension: Option<u32>,
}

/// Reads numbers from the header's bytes; `None` beyond their end.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn slice(&self, offset: usize, length: usize) -> Option<&[u8]> {
        self.0.get(offset..offset.checked_add(length)?)
    }

    fn u32(&self, offset: usize) -> Option<u32> {
        Some(u32::from_be_bytes(self.slice(offset, 4)?.try_into().ok()?))
    }

    fn u64(&self, offset: usize) -> Option<u64> {
        Some(u64::from_be_bytes(self.slice(offset, 8)?.try_into().ok()?))
    }
}

impl Header {
    /// Reads a header. The inner error says what is wrong with it.
    pub(crate) fn read(file: &mut (impl Read + Seek)) -> std::io::Result<Result<Self, String>> {
        let mut prefix = Vec::new();
        file.seek(SeekFrom::Start(0))?;
        file.take(PREFIX_BYTES).read_to_end(&mut prefix)?;
        Ok(Self::parse(&prefix).unwrap_or_else(|| Err("its header is cut off".to_owned())))
    }

    fn parse(prefix: &[u8]) -> Option<Result<Self, String>> {
        let bytes = Bytes(prefix);
        if bytes.u32(0)? != MAGIC {
            return Some(Err("it is not a qcow2 image".to_owned()));
        }
        let version = bytes.u32(4)?;
        if version != 3 {
            return Some(Err(format!("it has qcow2 version {version}, not 3")));
        }
        let header_length = usize::try_from(bytes.u32(100)?).ok()?;
        if header_length < HEADER_V3_BYTES || !header_length.is_multiple_of(8) {
            return Some(Err(format!("its header has {header_length} bytes")));
        }
        let mut header = Self {
            backing_name: backing_name(&bytes)?,
            backing_format: None,
            size_bytes: bytes.u64(24)?,
            crypt_method: bytes.u32(32)?,
            snapshots: bytes.u32(60)?,
            snapshots_offset: bytes.u64(64)?,
            incompatible_features: bytes.u64(72)?,
            autoclear_features: bytes.u64(88)?,
            cluster_bits: bytes.u32(20)?,
            refcount_order: bytes.u32(96)?,
            refcount_table_offset: bytes.u64(48)?,
            refcount_table_clusters: bytes.u32(56)?,
            unknown_extension: None,
        };
        header.parse_extensions(&bytes, header_length)?;
        Some(Ok(header))
    }

    fn parse_extensions(&mut self, bytes: &Bytes<'_>, mut offset: usize) -> Option<()> {
        for _ in 0..EXTENSIONS_MAX {
            let kind = bytes.u32(offset)?;
            let length = usize::try_from(bytes.u32(offset + 4)?).ok()?;
            let content = bytes.slice(offset + 8, length)?;
            match kind {
                EXTENSION_END => return Some(()),
                EXTENSION_BACKING_FORMAT => self.backing_format = Some(content.to_vec()),
                EXTENSION_FEATURE_NAMES => {}
                other => self.unknown_extension = Some(other),
            }
            offset = offset.checked_add(8)?.checked_add(length.checked_next_multiple_of(8)?)?;
        }
        None
    }

    /// Whether the backing file is in the directory of this archive.
    pub(crate) fn builds_upon(&self, archive: &str) -> bool {
        let prefix = format!("../{archive}/");
        self.backing_name.as_ref().is_some_and(|name| name.starts_with(prefix.as_bytes()))
    }

    /// Checks the header against what the manifest says of the disk and of the image's file.
    pub(crate) fn check(
        &self,
        size_bytes: u64,
        file_size_bytes: u64,
        backing_name: Option<&str>,
    ) -> Result<(), String> {
        self.check_form(file_size_bytes)?;
        if self.size_bytes != size_bytes {
            return Err(format!(
                "its disk has {} bytes, the manifest says {size_bytes}",
                self.size_bytes
            ));
        }
        if self.crypt_method != 0 {
            return Err("it is encrypted".to_owned());
        }
        if self.incompatible_features != 0 || self.autoclear_features != 0 {
            return Err(format!(
                "it has features this program does not write (incompatible {:#x}, autoclear \
                 {:#x}), perhaps an external data file",
                self.incompatible_features, self.autoclear_features
            ));
        }
        if self.snapshots != 0 || self.snapshots_offset != 0 {
            return Err("it has internal snapshots".to_owned());
        }
        if let Some(kind) = self.unknown_extension {
            return Err(format!("it has the header extension {kind:#x}"));
        }
        if self.backing_name.as_deref() != backing_name.map(str::as_bytes) {
            return Err(format!(
                "its backing file is {:?}, the manifest calls for {backing_name:?}",
                self.backing_name.as_deref().map(String::from_utf8_lossy)
            ));
        }
        let format = backing_name.map(|_| b"qcow2".as_slice());
        if self.backing_format.as_deref() != format {
            return Err(format!(
                "its backing format is {:?}",
                self.backing_format.as_deref().map(String::from_utf8_lossy)
            ));
        }
        Ok(())
    }
}

impl Header {
    /// What every image of this provider has. QEMU wants it right even where it only reads.
    fn check_form(&self, file_size_bytes: u64) -> Result<(), String> {
        if 1_u64.checked_shl(self.cluster_bits) != Some(CLUSTER_BYTES) {
            return Err(format!("its clusters have 2^{} bytes", self.cluster_bits));
        }
        if self.refcount_order != REFCOUNT_ORDER {
            return Err(format!("its reference counts have 2^{} bits", self.refcount_order));
        }
        let table_bytes = u64::from(self.refcount_table_clusters) * CLUSTER_BYTES;
        let end = self.refcount_table_offset.checked_add(table_bytes);
        let is_inside = self.refcount_table_offset >= CLUSTER_BYTES
            && self.refcount_table_offset.is_multiple_of(CLUSTER_BYTES)
            && (1..=REFCOUNT_TABLE_BYTES_MAX).contains(&table_bytes)
            && end.is_some_and(|end| end <= file_size_bytes);
        if is_inside {
            Ok(())
        } else {
            Err("its table of reference counts is elsewhere".to_owned())
        }
    }
}

fn backing_name(bytes: &Bytes<'_>) -> Option<Option<Vec<u8>>> {
    let offset = usize::try_from(bytes.u64(8)?).ok()?;
    let length = usize::try_from(bytes.u32(16)?).ok()?;
    if offset == 0 {
        return Some(None);
    }
    if length > BACKING_NAME_BYTES_MAX {
        return None;
    }
    Some(Some(bytes.slice(offset, length)?.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::Header;

    #[test]
    fn any_bytes_are_read_without_a_panic() {
        let mut bytes = vec![0u8; 4096];
        bytes[..4].copy_from_slice(&0x5146_49fb_u32.to_be_bytes());
        bytes[7] = 3;
        bytes[103] = 104;
        // Every header byte in turn at its extremes, and every length of the file.
        for position in 0..200 {
            for value in [0xff, 0x7f, 0x80, 1] {
                let mut changed = bytes.clone();
                changed[position] = value;
                let _ = Header::parse(&changed);
            }
        }
        for length in 0..200 {
            let _ = Header::parse(&bytes[..length]);
        }
        assert!(matches!(Header::parse(&bytes), Some(Ok(_))));
        assert!(matches!(Header::parse(b"\x7fELF1234567890"), Some(Err(_))));
    }
}
