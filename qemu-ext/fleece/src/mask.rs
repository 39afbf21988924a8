// SPDX-License-Identifier: GPL-2.0-or-later
//! Sets of granules: words of 64 bits within a region, and the granules of one piece.

use std::ops::Range;

use crate::range::PIECE_GRANULES;

/// The words that `local` touches, each with the bits of `local` in it.
pub(crate) fn words(local: Range<u32>) -> impl Iterator<Item = (usize, u64)> {
    let mut at = local.start;
    std::iter::from_fn(move || {
        if at >= local.end {
            return None;
        }
        let word = at / 64;
        let end = ((word + 1) * 64).min(local.end);
        let count = end - at;
        let ones = if count == 64 { u64::MAX } else { (1 << count) - 1 };
        let bits = ones << (at % 64);
        at = end;
        Some((word as usize, bits))
    })
}

/// The positions of the bits of a word.
pub(crate) fn bits(mut word: u64) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        if word == 0 {
            return None;
        }
        let bit = word.trailing_zeros();
        word &= word - 1;
        Some(bit)
    })
}

/// A set of granules within one piece.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Mask([u64; PIECE_GRANULES / 64]);

impl Mask {
    /// Adds granule `index` of the piece.
    pub(crate) fn insert(&mut self, index: usize) {
        self.0[index / 64] |= 1 << (index % 64);
    }

    /// Whether granule `index` of the piece is in the set.
    pub(crate) fn contains(&self, index: usize) -> bool {
        self.0[index / 64] & (1 << (index % 64)) != 0
    }
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use super::{bits, words};

    #[test]
    fn words_cover_exactly_the_range() {
        for range in [0..1, 3..64, 63..65, 64..128, 5..200, 7..7] {
            let found: Vec<u32> = words(range.clone())
                .flat_map(|(word, mask)| bits(mask).map(move |bit| word as u32 * 64 + bit))
                .collect();
            assert_eq!(found, range.collect::<Vec<_>>());
        }
    }
}
