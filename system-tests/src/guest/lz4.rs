// SPDX-License-Identifier: MIT OR Apache-2.0
//! Unpacks the LZ4 "legacy" stream that Linux kernels are packed with.
//!
//! A magic number, then blocks: a 32-bit length and that many bytes. A block is a row of sequences:
//! a token (length of literals, length of the match), literals, 16-bit distance back.

use anyhow::{Context, Result, bail};

/// The first bytes of a stream.
pub(super) const MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
const MIN_MATCH: usize = 4;

/// Unpacks a stream to exactly `size` bytes; what follows in `packed` is ignored.
pub(super) fn unpack(packed: &[u8], size: usize) -> Result<Vec<u8>> {
    let mut input = packed.strip_prefix(&MAGIC).context("no LZ4 stream")?;
    let mut output = Vec::with_capacity(size);
    while output.len() < size {
        let (length, rest) = input.split_first_chunk::<4>().context("LZ4 stream ends early")?;
        let length = u32::from_le_bytes(*length) as usize;
        let block = rest.get(..length).context("LZ4 block goes beyond its stream")?;
        unpack_block(block, &mut output, size)?;
        input = &rest[length..];
    }
    Ok(output)
}

fn unpack_block(mut input: &[u8], output: &mut Vec<u8>, limit: usize) -> Result<()> {
    let begin = output.len();
    loop {
        let token = usize::from(take(&mut input, 1)?[0]);
        let literals = length(token >> 4, &mut input)?;
        output.extend_from_slice(take(&mut input, literals)?);
        if input.is_empty() {
            break;
        }
        let distance = take(&mut input, 2)?;
        let distance = usize::from(u16::from_le_bytes([distance[0], distance[1]]));
        let count = length(token & 15, &mut input)? + MIN_MATCH;
        if distance == 0 || distance > output.len() - begin || output.len() + count > limit {
            bail!("damaged LZ4 block");
        }
        // Byte by byte, because a match may reach into what it produces.
        for _ in 0..count {
            output.push(output[output.len() - distance]);
        }
    }
    if output.len() > limit {
        bail!("LZ4 stream is longer than it says");
    }
    Ok(())
}

fn length(start: usize, input: &mut &[u8]) -> Result<usize> {
    let mut length = start;
    if start == 15 {
        loop {
            let more = take(input, 1)?[0];
            length += usize::from(more);
            if more != 255 {
                break;
            }
        }
    }
    Ok(length)
}

fn take<'a>(input: &mut &'a [u8], count: usize) -> Result<&'a [u8]> {
    let (taken, rest) = input.split_at_checked(count).context("LZ4 block ends early")?;
    *input = rest;
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(block: &[u8]) -> Vec<u8> {
        let mut stream = MAGIC.to_vec();
        stream.extend_from_slice(&u32::try_from(block.len()).unwrap().to_le_bytes());
        stream.extend_from_slice(block);
        stream
    }

    #[test]
    fn literals_and_overlapping_matches_unpack() {
        // "ab", then 4 + 15 + 1 bytes from 2 back, then the literal "!".
        let packed = stream(&[0x2f, b'a', b'b', 2, 0, 1, 0x10, b'!']);
        let mut expected = b"ab".repeat(11);
        expected.push(b'!');
        assert_eq!(unpack(&packed, 23).unwrap(), expected);
        let mut trailing = packed;
        trailing.extend_from_slice(b"signature");
        assert_eq!(unpack(&trailing, 23).unwrap(), expected);
    }

    #[test]
    fn damage_is_an_error_and_no_panic() {
        for block in [&[][..], &[0xf0], &[0x10], &[0x04, 0, 0], &[0x14, b'a', 2, 0], &[0x0f, 1, 0]]
        {
            assert!(unpack(&stream(block), 100).is_err(), "{block:?}");
        }
        assert!(unpack(&MAGIC, 1).is_err());
        assert!(unpack(b"elf", 1).is_err());
    }
}
