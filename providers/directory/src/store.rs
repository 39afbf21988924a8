// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a blocking thread does with the data of one piece of work: find zeroes, hash, write.

use provider_api::Result;

use crate::areas::{Area, Run, Work};
use crate::checksums::Line;
use crate::image::Image;
use crate::limits::CLUSTER_BYTES;

/// Data read from the disk.
#[derive(Debug)]
pub(crate) struct Chunk<B> {
    pub(crate) offset: u64,
    pub(crate) data: B,
}

/// What became of one piece of work.
#[derive(Debug, Default)]
pub(crate) struct Stored {
    pub(crate) lines: Vec<Line>,
    pub(crate) zero_bytes: u64,
    pub(crate) written_bytes: u64,
}

/// Stores one piece of work. `chunks` hold the data of all its non-zero pieces, in order.
pub(crate) fn store<B: AsRef<[u8]>>(
    image: &Image,
    work: &Work,
    chunks: &[Chunk<B>],
) -> Result<Stored> {
    let mut stored = Stored::default();
    let mut chunks = chunks.iter();
    for run in &work.runs {
        store_run(image, run, &mut chunks, &mut stored)?;
    }
    Ok(stored)
}

fn store_run<'a, B: AsRef<[u8]> + 'a>(
    image: &Image,
    run: &Run,
    chunks: &mut impl Iterator<Item = &'a Chunk<B>>,
    stored: &mut Stored,
) -> Result<()> {
    let mut line =
        Line { offset: run.area.start, length_bytes: run.area.length_bytes(), hash: None };
    if run.is_zero() {
        image.write_zeroes(run.area.start, run.area.length_bytes())?;
        stored.zero_bytes += run.area.length_bytes();
        stored.lines.push(line);
        return Ok(());
    }
    let mut hasher = blake3::Hasher::new();
    for piece in &run.pieces {
        if piece.is_zero {
            image.write_zeroes(piece.area.start, piece.area.length_bytes())?;
            stored.zero_bytes += piece.area.length_bytes();
            hash_zeroes(&mut hasher, piece.area.length_bytes());
            continue;
        }
        let mut at = piece.area.start;
        while at < piece.area.end {
            let chunk = chunks.next().filter(|chunk| chunk.offset == at).ok_or_else(|| {
                crate::call::corrupt(format!("No data was read at {at}; this is a program error."))
            })?;
            let data = chunk.data.as_ref();
            hasher.update(data);
            store_chunk(image, at, data, stored)?;
            at += data.len() as u64;
        }
    }
    line.hash = Some(hasher.finalize());
    stored.lines.push(line);
    Ok(())
}

fn hash_zeroes(hasher: &mut blake3::Hasher, length_bytes: u64) {
    const ZEROES: [u8; 16 << 10] = [0; 16 << 10];
    let mut left = length_bytes;
    while left > 0 {
        let part = left.min(ZEROES.len() as u64);
        hasher.update(&ZEROES[..usize::try_from(part).expect("at most 16 KiB")]);
        left -= part;
    }
}

/// Writes a chunk's clusters; neighbours of a kind in one request.
fn store_chunk(image: &Image, offset: u64, data: &[u8], stored: &mut Stored) -> Result<()> {
    let all = Area::new(offset, offset + data.len() as u64);
    let slice = |area: Area| {
        let index = |at: u64| usize::try_from(at - offset).expect("inside of the chunk");
        &data[index(area.start)..index(area.end)]
    };
    let mut same: Option<(Area, bool)> = None;
    let write = |area: Area, zero: bool, stored: &mut Stored| {
        if zero {
            stored.zero_bytes += area.length_bytes();
            image.write_zeroes(area.start, area.length_bytes())
        } else {
            stored.written_bytes += area.length_bytes();
            image.write(area.start, slice(area))
        }
    };
    for cluster in all.split(CLUSTER_BYTES) {
        let zero = is_zero(slice(cluster));
        same = match same {
            Some((area, kind)) if kind == zero => Some((Area::new(area.start, cluster.end), zero)),
            Some((area, kind)) => {
                write(area, kind, stored)?;
                Some((cluster, zero))
            }
            None => Some((cluster, zero)),
        };
    }
    if let Some((area, kind)) = same {
        write(area, kind, stored)?;
    }
    Ok(())
}

/// Whether all bytes are zero. Folding whole chunks lets the compiler use vector instructions,
/// stopping between them ends the common non-zero case early.
pub(crate) fn is_zero(data: &[u8]) -> bool {
    let mut chunks = data.chunks_exact(256);
    let remainder = chunks.remainder();
    chunks.all(|chunk| chunk.iter().fold(0, |seen, byte| seen | byte) == 0)
        && remainder.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::is_zero;

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        let mut data = vec![0u8; 1031];
        assert!(is_zero(&data));
        for position in [0, 255, 256, 1023, 1024, 1030] {
            data[position] = 1;
            assert!(!is_zero(&data));
            data[position] = 0;
        }
        assert!(is_zero(&[]));
    }
}
