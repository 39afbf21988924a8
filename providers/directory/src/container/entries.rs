// SPDX-License-Identifier: MIT OR Apache-2.0
//! Looks at a tar archive as it passes: how many entries it has, how much data, and whether it is whole.
//! Pure; keeps one block and the begin of one record.

use super::times::{Time, Times};

/// Unit of a tar archive.
const BLOCK_BYTES: usize = 512;
/// Where a header has its fields.
const NAME: std::ops::Range<usize> = 0..100;
const SIZE: std::ops::Range<usize> = 124..136;
const CHANGED: std::ops::Range<usize> = 136..148;
const CHECKSUM: std::ops::Range<usize> = 148..156;
const TYPE: usize = 156;
/// The record of an extended header that says how long the next entry's data is: with 8 GiB and more its own header cannot.
const SIZE_RECORD: &[u8] = b"size=";
/// The record that says that the data begins with a map of a sparse file: in its first line, how many pieces there are.
const MAP_RECORD: &[u8] = b"GNU.sparse.major=1\n";
/// The record that says when a file was changed, if its own header cannot, or not to the nanosecond.
const TIME_RECORD: &[u8] = b"mtime=";
/// Enough for these records with any number.
const RECORD_BYTES: usize = 48;
/// What `tar` puts into the name of a sparse file.
const SPARSE_NAME: &str = "GNUSparseFile.";
/// Those with paths, which are not restored if they are longer; an extended header and a sparse file that are not. What
/// cannot be brought back is no backup. The bounds are those of the archives' reader.
const PATH_RECORDS: [&[u8]; 2] = [b"path=", b"linkpath="];
const PATH_BYTES_MAX: u64 = 72 << 10;
const EXTENDED_BYTES_MAX: u64 = 64 << 20;
const PIECES_MAX: u64 = 64 << 20;

/// Counts the entries of a stream.
#[derive(Debug)]
pub(super) struct Counter {
    /// What there is of the next header.
    header: [u8; BLOCK_BYTES],
    filled: usize,
    /// Bytes of an extended header that come before it, and what its records say.
    extended_bytes: u64,
    records: Records,
    /// Bytes of data and padding that come before it, then.
    skip_bytes: u64,
    /// The pieces of a sparse file as far as their number was read.
    pieces: Option<u64>,
    /// Blocks of zeroes in a row: two end an archive.
    zero_blocks: u32,
    entries: u64,
    data_bytes: u64,
    /// The begin of the last entry's name.
    name: [u8; NAME.end],
    /// Those that what is stored can have; all of them without.
    times: Option<Times>,
}

impl Default for Counter {
    fn default() -> Self {
        Self {
            header: [0; BLOCK_BYTES],
            filled: 0,
            extended_bytes: 0,
            records: Records::default(),
            skip_bytes: 0,
            pieces: None,
            zero_blocks: 0,
            entries: 0,
            data_bytes: 0,
            name: [0; NAME.end],
            times: None,
        }
    }
}

impl Counter {
    /// One that refuses entries with other times than these.
    pub(super) fn with_times(times: Times) -> Self {
        Self { times: Some(times), ..Self::default() }
    }

    /// Takes the next bytes.
    pub(super) fn take(&mut self, mut bytes: &[u8]) -> Result<(), String> {
        while !bytes.is_empty() {
            if self.extended_bytes > 0 {
                let count = self.extended_bytes.min(bytes.len() as u64);
                self.extended_bytes -= count;
                let (records, rest) = bytes.split_at(count as usize);
                self.records.take(records)?;
                bytes = rest;
                continue;
            }
            if self.skip_bytes > 0 {
                let skipped = self.skip_bytes.min(bytes.len() as u64);
                self.skip_bytes -= skipped;
                let (data, rest) = bytes.split_at(skipped as usize);
                self.count_pieces(data)?;
                bytes = rest;
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
        // What only describes the next entry is none.
        let is_entry = !matches!(self.header[TYPE], b'x' | b'g' | b'L' | b'K');
        let said = if is_entry { self.records.size_bytes.take() } else { None };
        let size_bytes = said
            .or_else(|| number(&self.header[SIZE]))
            .filter(|size| *size <= i64::MAX as u64)
            .ok_or("The tar archive of the container has an entry without a size.")?;
        self.skip_bytes = size_bytes.next_multiple_of(BLOCK_BYTES as u64);
        if self.header[TYPE] == b'x' {
            if size_bytes > EXTENDED_BYTES_MAX {
                let name = shown(&self.header[NAME]);
                return Err(format!("A file has more attributes than can be restored: {name}."));
            }
            self.extended_bytes = size_bytes;
            self.skip_bytes -= size_bytes;
            self.records = Records::default();
        }
        if is_entry {
            self.pieces = std::mem::take(&mut self.records.has_map).then_some(0);
            self.entries += 1;
            self.name.copy_from_slice(&self.header[NAME]);
            self.data_bytes = self.data_bytes.saturating_add(size_bytes);
            self.check_time()?;
        }
        Ok(())
    }

    fn check_time(&mut self) -> Result<(), String> {
        let said = self.records.changed.take();
        let Some(times) = self.times else { return Ok(()) };
        let own = || Some((i64::try_from(number(&self.header[CHANGED])?).ok()?, 0));
        let (secs, nanos) = said
            .or_else(own)
            .ok_or("The tar archive of the container has an entry without a time.")?;
        if times.include((secs, nanos)) {
            return Ok(());
        }
        Err(format!(
            "The time of a file cannot be stored as it is: {} was changed {secs} s and {nanos} ns after 1970, the \
             storage's file system has times {}. Change it (touch), or use 'container-format tar'.",
            self.shown_name(),
            times.shown()
        ))
    }

    /// The last entry's name as far as it is there.
    fn shown_name(&self) -> String {
        let name = shown(&self.name);
        let parts: Vec<_> = name.split('/').filter(|part| !part.starts_with(SPARSE_NAME)).collect();
        parts.join("/")
    }

    /// Reads the first line of a map that the data begins with.
    fn count_pieces(&mut self, data: &[u8]) -> Result<(), String> {
        for byte in data {
            let Some(pieces) = self.pieces else { break };
            self.pieces = match byte {
                b'0'..=b'9' => Some(pieces * 10 + u64::from(byte - b'0')),
                _ => None,
            };
            if self.pieces.is_some_and(|pieces| pieces > PIECES_MAX) {
                return Err(format!(
                    "A sparse file has more pieces of data than can be restored: {}. Exclude it, or fill its holes \
                     (cp --sparse=never).",
                    self.shown_name()
                ));
            }
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
        let is_between = self.filled == 0 && self.extended_bytes == 0 && self.skip_bytes == 0;
        if is_between && self.zero_blocks >= 2 {
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

#[derive(Debug)]
struct Text([u8; RECORD_BYTES]);

impl Default for Text {
    fn default() -> Self {
        Self([0; RECORD_BYTES])
    }
}

/// Looks for the size, the time, and for a map, among the records of an extended header: `26 size=12345678901234\n`, one after the
/// other.
#[derive(Debug, Default)]
struct Records {
    /// The length of the record as far as it was read, with how many digits.
    length: u64,
    digits: u64,
    /// What it has behind that, once its length is known, and what is left of it.
    bytes: u64,
    left: Option<u64>,
    text: Text,
    filled: usize,
    /// What the entry behind the header is said to have.
    size_bytes: Option<u64>,
    changed: Option<Time>,
    has_map: bool,
}

impl Records {
    fn take(&mut self, mut bytes: &[u8]) -> Result<(), String> {
        let damaged =
            || "The tar archive of the container has a damaged extended header.".to_owned();
        while let Some((&first, rest)) = bytes.split_first() {
            let Some(left) = self.left else {
                bytes = rest;
                self.digits += 1;
                match first {
                    b'0'..=b'9' if self.digits < 20 => {
                        self.length = self.length * 10 + u64::from(first - b'0');
                    }
                    b' ' => {
                        let left = self.length.checked_sub(self.digits).filter(|left| *left > 0);
                        self.bytes = left.ok_or_else(damaged)?;
                        self.left = Some(self.bytes);
                    }
                    _ => return Err(damaged()),
                }
                continue;
            };
            let count = left.min(bytes.len() as u64) as usize;
            let kept = count.min(RECORD_BYTES - self.filled);
            self.text.0[self.filled..self.filled + kept].copy_from_slice(&bytes[..kept]);
            self.filled += kept;
            bytes = &bytes[count..];
            self.left = Some(left - count as u64);
            if self.left == Some(0) {
                self.check_path()?;
                self.end_record().ok_or_else(damaged)?;
            }
        }
        Ok(())
    }

    fn check_path(&self) -> Result<(), String> {
        let text = &self.text.0[..self.filled];
        let Some(key) = PATH_RECORDS.into_iter().find(|key| text.starts_with(key)) else {
            return Ok(());
        };
        if self.bytes <= PATH_BYTES_MAX + key.len() as u64 + 1 {
            return Ok(());
        }
        Err(format!(
            "A path of {} bytes is too long to be restored; it begins with '{}'.",
            self.bytes - key.len() as u64 - 1,
            String::from_utf8_lossy(&text[key.len()..]).escape_debug()
        ))
    }

    /// Takes what the record says; nothing if a size or a time is no number.
    fn end_record(&mut self) -> Option<()> {
        let text = &self.text.0[..self.filled];
        if let Some(value) = text.strip_prefix(SIZE_RECORD) {
            let value = std::str::from_utf8(value.strip_suffix(b"\n")?).ok()?;
            self.size_bytes = Some(value.parse().ok()?);
        }
        if let Some(value) = text.strip_prefix(TIME_RECORD) {
            let value = std::str::from_utf8(value.strip_suffix(b"\n")?).ok()?;
            self.changed = Some(time(value)?);
        }
        let has_map = self.has_map || text == MAP_RECORD;
        let Self { size_bytes, changed, .. } = *self;
        *self = Self { size_bytes, changed, has_map, ..Self::default() };
        Some(())
    }
}

/// A name of a header as far as it is there.
fn shown(field: &[u8]) -> String {
    let name = field.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(name).escape_debug().to_string()
}

/// A time in decimal digits: `1700000000.25`, or `-0.5` for half a second before 1970.
fn time(text: &str) -> Option<Time> {
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let nanos: u32 = format!("{part:0<9}").parse().ok().filter(|_| part.len() <= 9)?;
    let secs: i64 = whole.parse().ok()?;
    if nanos > 0 && whole.starts_with('-') {
        return Some((secs.checked_sub(1)?, 1_000_000_000 - nanos));
    }
    Some((secs, nanos))
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
    fn what_could_not_be_restored_is_refused() {
        let path = |bytes: usize| {
            let value = "d/".repeat(bytes / 2);
            format!("{} path={value}\n", value.len() + 12)
        };
        for (bytes, is_right) in [(72 << 10, true), ((72 << 10) + 2, false)] {
            let records = path(bytes);
            assert_eq!(records.len(), bytes + 12);
            let extended = [header(b'x', records.len()), padded(records.as_bytes())];
            let archive = [extended.concat(), header(b'0', 0), vec![0; 1024]].concat();
            let counted = count(&archive, 1000);
            assert_eq!(counted.is_ok(), is_right, "{counted:?}");
        }
        let refused = count(&header(b'x', (64 << 20) + 1), 512).unwrap_err();
        assert!(refused.contains("more attributes than can be restored: ./big."), "{refused}");
        let sparse = |map: &[u8]| {
            let records = "22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n";
            let map = padded(map);
            let extended = [header(b'x', records.len()), padded(records.as_bytes())].concat();
            [
                extended,
                header(b'0', map.len()),
                map,
                header(b'0', 5),
                padded(b"99999"),
                vec![0; 1024],
            ]
            .concat()
        };
        for piece in [1, 512, 1 << 20] {
            assert_eq!(count(&sparse(b"67108864\n0\n999999999\n"), piece), Ok((2, 517)));
            let refused = count(&sparse(b"67108865\n"), piece).unwrap_err();
            assert!(refused.contains("can be restored: ./big. Exclude it"), "{refused}");
        }
    }

    /// A header as `tar` writes it.
    fn header(kind: u8, size_bytes: usize) -> Vec<u8> {
        let mut header = vec![0; BLOCK_BYTES];
        header[..5].copy_from_slice(b"./big");
        header[SIZE].copy_from_slice(format!("{size_bytes:011o}\0").as_bytes());
        header[CHECKSUM].fill(b' ');
        header[TYPE] = kind;
        let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
        header[CHECKSUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        header
    }

    fn padded(bytes: &[u8]) -> Vec<u8> {
        let mut all = bytes.to_vec();
        all.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
        all
    }

    #[test]
    fn a_size_that_is_too_large_for_a_header_is_in_a_record() {
        let long = format!("1014 SCHILY.xattr.user.a={}\n", "z".repeat(984));
        let long = format!("{} {}", long.len(), long.split_once(' ').unwrap().1);
        for records in ["13 size=1000\n".to_owned(), format!("{long}13 size=1000\n{long}")] {
            // A file of that size, which its own header does not know.
            let archive = [
                header(b'x', records.len()),
                padded(records.as_bytes()),
                header(b'0', 0),
                padded(&[7; 1000]),
                header(b'0', 600),
                padded(&[7; 600]),
                vec![0; 1024],
            ]
            .concat();
            for piece in [1, 7, 512, 1 << 20] {
                assert_eq!(count(&archive, piece), Ok((2, 1600)), "{piece}");
            }
        }
        for bad in ["13 size=10x0\n", "x size=1000\n", "2 size=1000\n", "99999999999999999999 a=b"]
        {
            let archive = [header(b'x', bad.len()), padded(bad.as_bytes()), vec![0; 1024]].concat();
            assert!(count(&archive, 512).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_have_parts_of_a_second_also_before_1970() {
        assert_eq!(time("1700000000.25"), Some((1_700_000_000, 250_000_000)));
        assert_eq!(time("-5.25"), Some((-6, 750_000_000)));
        assert_eq!(time("-0.5"), Some((-1, 500_000_000)));
        assert_eq!(time("-7"), Some((-7, 0)));
        assert_eq!(time("9223372036854775807.000000001"), Some((i64::MAX, 1)));
        for bad in ["", "x", "1.x", "1.0000000001", "9223372036854775808", "1.-5"] {
            assert_eq!(time(bad), None, "{bad}");
        }
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
