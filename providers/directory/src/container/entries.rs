// SPDX-License-Identifier: MIT OR Apache-2.0
//! Looks at a tar archive as it passes: how many entries it has, how much data, and whether it is whole.
//! Pure; keeps one block.

/// Unit of a tar archive.
const BLOCK_BYTES: usize = 512;
/// Where a header has its fields.
const NAME: std::ops::Range<usize> = 0..100;
const SIZE: std::ops::Range<usize> = 124..136;
const CHECKSUM: std::ops::Range<usize> = 148..156;
const TYPE: usize = 156;

/// Counts the entries of a stream.
#[derive(Debug)]
pub(super) struct Counter {
    /// What there is of the next header.
    header: [u8; BLOCK_BYTES],
    filled: usize,
    /// Bytes of data and padding that come before it.
    skip_bytes: u64,
    /// Blocks of zeroes in a row: two end an archive.
    zero_blocks: u32,
    entries: u64,
    data_bytes: u64,
    /// The begin of the last entry's name.
    name: [u8; NAME.end],
}

impl Default for Counter {
    fn default() -> Self {
        Self {
            header: [0; BLOCK_BYTES],
            filled: 0,
            skip_bytes: 0,
            zero_blocks: 0,
            entries: 0,
            data_bytes: 0,
            name: [0; NAME.end],
        }
    }
}

impl Counter {
    /// Takes the next bytes.
    pub(super) fn take(&mut self, mut bytes: &[u8]) -> Result<(), String> {
        while !bytes.is_empty() {
            if self.skip_bytes > 0 {
                let skipped = self.skip_bytes.min(bytes.len() as u64);
                self.skip_bytes -= skipped;
                bytes = &bytes[skipped as usize..];
                continue;
            }
            let count = bytes.len().min(BLOCK_BYTES - self.filled);
            self.header[self.filled..self.filled + count].copy_from_slice(&bytes[..count]);
            self.filled += count;
            bytes = &bytes[count..];
            if self.filled == BLOCK_BYTES {
                self.filled = 0;
                self.take_header()?;
            }
        }
        Ok(())
    }

    fn take_header(&mut self) -> Result<(), String> {
        if self.header.iter().all(|byte| *byte == 0) {
            self.zero_blocks = self.zero_blocks.saturating_add(1);
            return Ok(());
        }
        if self.zero_blocks > 0 {
            return Err("The tar archive of the container goes on after its end.".to_owned());
        }
        if number(&self.header[CHECKSUM]) != Some(self.sum()) {
            return Err("The tar archive of the container has a damaged header.".to_owned());
        }
        let size_bytes = number(&self.header[SIZE])
            .filter(|size| *size <= i64::MAX as u64)
            .ok_or("The tar archive of the container has an entry without a size.")?;
        self.skip_bytes = size_bytes.next_multiple_of(BLOCK_BYTES as u64);
        // What only describes the next entry is none.
        if !matches!(self.header[TYPE], b'x' | b'g' | b'L' | b'K') {
            self.entries += 1;
            self.name.copy_from_slice(&self.header[NAME]);
            self.data_bytes = self.data_bytes.saturating_add(size_bytes);
        }
        Ok(())
    }

    /// The sum of all bytes, those of the checksum itself counted as spaces.
    fn sum(&self) -> u64 {
        let bytes = self.header.iter().enumerate();
        bytes.map(|(at, byte)| if CHECKSUM.contains(&at) { 32 } else { u64::from(*byte) }).sum()
    }

    /// Whether the archive is whole.
    pub(super) fn finish(&self) -> Result<(), String> {
        if self.filled == 0 && self.skip_bytes == 0 && self.zero_blocks >= 2 {
            return Ok(());
        }
        Err("The tar archive of the container ends too early.".to_owned())
    }

    /// The name of the last entry as far as its header holds it: a hint of where the archive is, no more.
    pub(super) fn last_name(&self) -> &[u8] {
        self.name.split(|byte| *byte == 0).next().unwrap_or_default()
    }

    pub(super) fn entries(&self) -> u64 {
        self.entries
    }

    pub(super) fn data_bytes(&self) -> u64 {
        self.data_bytes
    }
}

/// A number in octal digits, or in binary with the first bit set.
fn number(field: &[u8]) -> Option<u64> {
    let (&first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        let zeroes = rest.len().checked_sub(8)?;
        if first != 0x80 || rest[..zeroes].iter().any(|byte| *byte != 0) {
            return None;
        }
        return Some(rest[zeroes..].iter().fold(0, |all, byte| all << 8 | u64::from(*byte)));
    }
    let text = std::str::from_utf8(field).ok()?;
    let text = text.trim_matches(|c: char| c == ' ' || c == '\0');
    if text.is_empty() { Some(0) } else { u64::from_str_radix(text, 8).ok() }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn count(archive: &[u8], piece: usize) -> Result<(u64, u64), String> {
        let mut counter = Counter::default();
        archive.chunks(piece).try_for_each(|bytes| counter.take(bytes))?;
        counter.finish()?;
        Ok((counter.entries(), counter.data_bytes()))
    }

    #[test]
    fn entries_of_real_archives_are_counted_however_they_come() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        let long = tree.join("x".repeat(200)).join("y".repeat(200));
        std::fs::create_dir_all(&long).unwrap();
        std::fs::write(long.join("file"), [7; 1000]).unwrap();
        std::os::unix::fs::symlink("a", tree.join("link")).unwrap();
        for format in ["posix", "gnu"] {
            let mut command = Command::new("tar");
            let format = format!("--format={format}");
            let output = command.args(["-c", &format, "-C"]).arg(&tree).arg(".").output().unwrap();
            let archive = output.stdout;
            for piece in [1, 511, 513, 1 << 20] {
                // Three directories, a file and a link.
                assert_eq!(count(&archive, piece), Ok((5, 1000)), "{format} {piece}");
            }
            let mut counter = Counter::default();
            counter.take(&archive).unwrap();
            let name = counter.last_name();
            assert!(name == b"./link" || name.starts_with(b"./xxx"), "{format} {name:?}");
            assert!(count(&archive[..archive.len() / 20 * 4], 512).is_err(), "{format}");
            let mut damaged = archive.clone();
            damaged[100] ^= 1;
            assert!(count(&damaged, 512).is_err());
            assert!(count(&[&archive[..], &archive].concat(), 512).is_err());
        }
        assert_eq!(count(&[0; 1024], 512), Ok((0, 0)));
        assert!(count(&[], 512).is_err());
    }

    #[test]
    fn numbers_are_octal_or_binary() {
        assert_eq!(number(b"00000001750\0"), Some(1000));
        assert_eq!(number(b"0001234\0"), Some(0o1234));
        let mut large = [0; 12];
        (large[0], large[6]) = (0x80, 1);
        assert_eq!(number(&large), Some(1 << 40));
        large[1] = 1;
        assert_eq!(number(&large), None);
        assert_eq!(number(b"9"), None);
    }
}
