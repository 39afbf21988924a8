// SPDX-License-Identifier: MIT OR Apache-2.0
//! Archives made byte by byte, for what no honest program writes.

use std::io::Read;

use ct_archive::{ArchiveError, Entry, Kind, Limits, Reader};

/// An archive under construction.
#[derive(Debug, Default, Clone)]
pub(crate) struct Tar(pub(crate) Vec<u8>);

impl Tar {
    /// An entry with a ustar header; `size` is what the header says.
    pub(crate) fn header(self, path: &str, kind: u8, size: u64) -> Self {
        self.linked(path, kind, size, "")
    }

    pub(crate) fn linked(mut self, path: &str, kind: u8, size: u64, link: &str) -> Self {
        let mut header = [0_u8; 512];
        header[..path.len()].copy_from_slice(path.as_bytes());
        header[100..108].copy_from_slice(b"0000644\0");
        header[108..116].copy_from_slice(b"0000000\0");
        header[116..124].copy_from_slice(b"0000000\0");
        header[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
        header[136..148].copy_from_slice(b"00000000000\0");
        header[156] = kind;
        header[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header[257..265].copy_from_slice(b"ustar\x0000");
        self.0.extend(header);
        self.sum()
    }

    /// Changes bytes of the last header.
    pub(crate) fn patch(mut self, at: usize, bytes: &[u8]) -> Self {
        let start = self.0.len() - 512 + at;
        self.0[start..start + bytes.len()].copy_from_slice(bytes);
        self.sum()
    }

    fn sum(mut self) -> Self {
        let start = self.0.len() - 512;
        let header = &mut self.0[start..];
        header[148..156].copy_from_slice(b"        ");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self
    }

    /// Data, padded.
    pub(crate) fn data(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn file(self, path: &str, bytes: &[u8]) -> Self {
        self.header(path, b'0', bytes.len() as u64).data(bytes)
    }

    /// An extended header of this type with records.
    pub(crate) fn pax(self, kind: u8, records: &[(&str, &str)]) -> Self {
        let bytes: Vec<u8> = records.iter().flat_map(|(key, value)| record(key, value)).collect();
        self.header("x", kind, bytes.len() as u64).data(&bytes)
    }

    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }
}

fn record(key: &str, value: &str) -> Vec<u8> {
    let body = key.len() + value.len() + 3;
    let mut len = body + 1;
    while len != body + len.to_string().len() {
        len += 1;
    }
    format!("{len} {key}={value}\n").into_bytes()
}

/// All entries with their data, holes filled.
pub(crate) fn read_all(
    archive: impl Read,
    limits: Limits,
) -> Result<Vec<(Entry, Vec<u8>)>, ArchiveError> {
    let mut reader = Reader::new(archive, limits);
    let mut entries = Vec::new();
    while let Some(entry) = reader.next_entry()? {
        let mut content = Vec::new();
        if let Kind::File { size, regions } = &entry.kind {
            content.resize(usize::try_from(*size).unwrap().min(64 << 20), 0);
            reader.copy_data(regions, |offset, bytes| {
                let start = usize::try_from(offset).unwrap();
                content[start..start + bytes.len()].copy_from_slice(bytes);
                Ok(())
            })?;
        }
        entries.push((entry, content));
    }
    Ok(entries)
}
