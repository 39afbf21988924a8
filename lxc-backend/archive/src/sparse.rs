// SPDX-License-Identifier: MIT OR Apache-2.0
//! Maps of sparse files: which pieces of them have data.

use std::io::Read;

use crate::entry::Region;
use crate::error::{ArchiveError, Result};
use crate::header::{BLOCK, Header};
use crate::number::{decimal, field};
use crate::source::Source;

/// Places of the map in a header and in blocks that go on with it (old GNU format).
const FIRST_AT: usize = 386;
const FIRST_COUNT: usize = 4;
const MORE_COUNT: usize = 21;
const PIECE: usize = 24;
/// A number in the map of the format 1.0 has no more digits.
const DIGITS_MAX: usize = 20;

/// Appends a piece, in order and without overlap. Errors are words.
pub(crate) fn push(
    regions: &mut Vec<Region>,
    region: Region,
    regions_max: usize,
) -> std::result::Result<(), String> {
    if regions.len() >= regions_max {
        return Err(format!("has more than {regions_max} pieces"));
    }
    let end = region.offset.checked_add(region.len).ok_or("ends beyond all files")?;
    let is_ordered = regions.last().is_none_or(|last| last.offset + last.len <= region.offset);
    if !is_ordered || end > i64::MAX as u64 {
        return Err("has pieces that overlap".to_owned());
    }
    regions.push(region);
    Ok(())
}

/// The map of the format 0.1: offsets and lengths with commas.
pub(crate) fn parse_map(
    text: &[u8],
    regions_max: usize,
) -> std::result::Result<Vec<Region>, String> {
    let mut regions = Vec::new();
    if text.is_empty() {
        return Ok(regions);
    }
    let mut numbers = text.split(|byte| *byte == b',').map(decimal);
    while let Some(offset) = numbers.next() {
        let len = numbers.next().ok_or("has an offset without a length")?;
        let (offset, len) = offset.zip(len).ok_or("has something that is no number")?;
        push(&mut regions, Region { offset, len }, regions_max)?;
    }
    Ok(regions)
}

/// That the pieces are within the file, and their data all that is stored of it.
pub(crate) fn check(
    regions: &[Region],
    size: u64,
    stored: u64,
) -> std::result::Result<(), &'static str> {
    // In order, so the last one ends last.
    if regions.last().is_some_and(|last| last.offset + last.len > size) {
        return Err("a piece of the sparse file is behind its end");
    }
    let sum: u64 = regions.iter().map(|region| region.len).sum();
    if sum == stored { Ok(()) } else { Err("the pieces of the sparse file are not what is stored") }
}

/// Size and map of an old GNU header, with the blocks that go on with it.
pub(crate) fn read_old_gnu<R: Read>(
    source: &mut Source<R>,
    header: &Header,
    regions_max: usize,
) -> Result<(u64, Vec<Region>)> {
    let size = field(&header.0[483..495]).and_then(|size| u64::try_from(size).ok());
    let Some(size) = size else { return source.damaged("the size of a sparse file is none") };
    let mut regions = Vec::new();
    let map = &header.0[FIRST_AT..FIRST_AT + FIRST_COUNT * PIECE];
    let mut is_open = take_pieces(source, map, &mut regions, regions_max)?;
    let mut goes_on = header.0[482] != 0;
    while goes_on {
        let block = source.block()?;
        if !is_open {
            return source.damaged("the map of a sparse file goes on behind its end");
        }
        is_open = take_pieces(source, &block[..MORE_COUNT * PIECE], &mut regions, regions_max)?;
        goes_on = block[504] != 0;
    }
    Ok((size, regions))
}

/// Takes pieces up to the first that is not used; whether all were used.
fn take_pieces<R: Read>(
    source: &Source<R>,
    map: &[u8],
    regions: &mut Vec<Region>,
    regions_max: usize,
) -> Result<bool> {
    for piece in map.chunks_exact(PIECE) {
        if piece[12] == 0 {
            return Ok(false);
        }
        let number = |bytes: &[u8]| u64::try_from(field(bytes)?).ok();
        let Some((offset, len)) = number(&piece[..12]).zip(number(&piece[12..])) else {
            return source.damaged("the map of a sparse file has something that is no number");
        };
        if let Err(why) = push(regions, Region { offset, len }, regions_max) {
            return source.damaged(format!("the map of a sparse file {why}"));
        }
    }
    Ok(true)
}

/// The map of the format 1.0, which is before the data. Returns it and how many bytes it took.
pub(crate) fn read_map<R: Read>(
    source: &mut Source<R>,
    stored: u64,
    regions_max: usize,
) -> Result<(Vec<Region>, u64)> {
    let mut lines = Lines { source, left: stored, taken: 0, block: [0; BLOCK], at: BLOCK };
    let count = lines.number()?;
    if count > regions_max as u64 {
        let why = format!("a sparse file has more than {regions_max} pieces");
        return Err(ArchiveError::TooMuch(why));
    }
    let mut regions = Vec::new();
    for _ in 0..count {
        let region = Region { offset: lines.number()?, len: lines.number()? };
        if let Err(why) = push(&mut regions, region, regions_max) {
            return lines.source.damaged(format!("the map of a sparse file {why}"));
        }
    }
    Ok((regions, lines.taken))
}

/// Lines of digits in whole blocks.
struct Lines<'a, R> {
    source: &'a mut Source<R>,
    left: u64,
    taken: u64,
    block: [u8; BLOCK],
    at: usize,
}

impl<R: Read> Lines<'_, R> {
    fn byte(&mut self) -> Result<u8> {
        if self.at == BLOCK {
            if self.left < BLOCK as u64 {
                return self.source.damaged("the map of a sparse file is cut off");
            }
            self.block = self.source.block()?;
            self.left -= BLOCK as u64;
            self.taken += BLOCK as u64;
            self.at = 0;
        }
        self.at += 1;
        Ok(self.block[self.at - 1])
    }

    fn number(&mut self) -> Result<u64> {
        let mut digits = Vec::with_capacity(DIGITS_MAX);
        loop {
            match self.byte()? {
                b'\n' => break,
                _ if digits.len() == DIGITS_MAX => break digits.clear(),
                byte => digits.push(byte),
            }
        }
        match decimal(&digits) {
            Some(number) => Ok(number),
            None => self.source.damaged("the map of a sparse file has something that is no number"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_in_order_and_within_their_file() {
        let map = |text: &str| parse_map(text.as_bytes(), 10);
        let regions = map("0,10,20,5,30,0").unwrap();
        assert_eq!(regions.len(), 3);
        assert_eq!(check(&regions, 30, 15), Ok(()));
        assert!(check(&regions, 29, 15).is_err());
        assert!(check(&regions, 30, 14).is_err());
        assert_eq!(map("").unwrap(), []);
        for bad in ["0", "0,", "0,10,5,1", "a,1", "18446744073709551615,1", "9223372036854775807,1"]
        {
            assert!(map(bad).is_err(), "{bad}");
        }
    }
}
