// SPDX-License-Identifier: GPL-2.0-or-later
//! Byte ranges, granules, and the conversions between them. All ranges are half-open.

/// Smallest unit of tracking in bytes.
pub const MIN_GRANULE_BYTES: u64 = 4096;
/// Largest unit of tracking in bytes; devices that need more are refused.
pub const MAX_GRANULE_BYTES: u64 = 1 << 20;
/// Largest piece of a request that is captured or read at once, in bytes.
pub const PIECE_BYTES: u64 = 1 << 20;
/// Most granules in one piece.
pub(crate) const PIECE_GRANULES: usize = (PIECE_BYTES / MIN_GRANULE_BYTES) as usize;
/// Granules whose states are kept and locked together: 64 MiB of disk with 4 KiB granules. The
/// interleaving models use small ones, where they run the same code with fewer atomics.
pub(crate) const REGION_GRANULES: u64 = if cfg!(loom) { 256 } else { 16384 };

const _: () = assert!(MAX_GRANULE_BYTES <= PIECE_BYTES && MIN_GRANULE_BYTES.is_power_of_two());
const _: () = assert!(REGION_GRANULES.is_multiple_of(PIECE_GRANULES as u64));

/// 4 KiB granules up to 32 TiB of disk: the root of their table has 8 MiB then.
const MAX_GRANULES: u64 = 1 << 33;

/// A half-open range of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
}

impl ByteRange {
    /// The range of `len` bytes from `start`.
    #[must_use]
    pub const fn at(start: u64, len: u64) -> Self {
        Self { start, end: start + len }
    }

    /// Length in bytes.
    #[must_use]
    pub const fn len(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether it has no bytes.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.end <= self.start
    }

    /// The common part of both ranges; empty if there is none.
    #[must_use]
    pub fn intersect(self, other: Self) -> Self {
        let start = self.start.max(other.start);
        Self { start, end: self.end.min(other.end).max(start) }
    }

    /// Cuts the range at multiples of `step` bytes.
    pub fn pieces(self, step: u64) -> impl Iterator<Item = Self> {
        let mut at = self.start;
        std::iter::from_fn(move || {
            if at >= self.end {
                return None;
            }
            let end = ((at / step + 1) * step).min(self.end);
            let piece = Self { start: at, end };
            at = end;
            Some(piece)
        })
    }
}

/// Size of the disk and of its granules.
#[derive(Debug, Clone, Copy)]
pub struct Geometry {
    size: u64,
    shift: u32,
}

impl Geometry {
    /// For a disk of `size` bytes on devices that need requests aligned to `alignment` bytes.
    ///
    /// # Errors
    /// A sentence when no granule size fits.
    pub fn new(size: u64, alignment: u64) -> Result<Self, String> {
        let mut granule = alignment.next_power_of_two().max(MIN_GRANULE_BYTES);
        while size.div_ceil(granule) > MAX_GRANULES {
            granule *= 2;
        }
        if granule > MAX_GRANULE_BYTES {
            return Err(format!(
                "a disk of {size} bytes with request alignment {alignment} needs granules of \
                 {granule} bytes, more than the supported {MAX_GRANULE_BYTES}"
            ));
        }
        Ok(Self { size, shift: granule.trailing_zeros() })
    }

    /// Size of the disk in bytes.
    #[must_use]
    pub const fn size(self) -> u64 {
        self.size
    }

    /// Size of a granule in bytes.
    #[must_use]
    pub const fn granule(self) -> u64 {
        1 << self.shift
    }

    /// Number of granules, the odd tail included.
    #[must_use]
    pub const fn count(self) -> u64 {
        self.size.div_ceil(self.granule())
    }

    /// The last granule, if it is shorter than the others.
    #[must_use]
    pub fn odd_tail(self) -> Option<u64> {
        (!self.size.is_multiple_of(self.granule())).then(|| self.count() - 1)
    }

    /// The granules that `range` touches (rounded outward), clamped to the disk.
    #[must_use]
    pub fn cover(self, range: ByteRange) -> std::ops::Range<u64> {
        let end = range.end.min(self.size).div_ceil(self.granule());
        (range.start >> self.shift).min(end)..end
    }

    /// The granules that lie wholly within `range` (rounded inward); the odd tail counts as whole
    /// when `range` reaches the end of the disk.
    #[must_use]
    pub fn within(self, range: ByteRange) -> std::ops::Range<u64> {
        let start = range.start.div_ceil(self.granule());
        let end = if range.end >= self.size { self.count() } else { range.end >> self.shift };
        start.min(end)..end
    }

    /// Cuts granules at the borders of their regions: the region's index, and the granules in it
    /// counted from its first.
    pub(crate) fn by_region(
        self,
        granules: std::ops::Range<u64>,
    ) -> impl Iterator<Item = (usize, std::ops::Range<u32>)> {
        let mut at = granules.start;
        std::iter::from_fn(move || {
            if at >= granules.end {
                return None;
            }
            let region = at / REGION_GRANULES;
            let end = ((region + 1) * REGION_GRANULES).min(granules.end);
            let local = (at % REGION_GRANULES) as u32..(end - region * REGION_GRANULES) as u32;
            at = end;
            Some((region as usize, local))
        })
    }

    /// The bytes of a range of granules, clamped to the disk.
    #[must_use]
    pub fn bytes(self, granules: std::ops::Range<u64>) -> ByteRange {
        ByteRange {
            start: granules.start << self.shift,
            end: (granules.end << self.shift).min(self.size),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{ByteRange, Geometry, MIN_GRANULE_BYTES};

    #[test]
    fn the_odd_tail_is_covered_and_can_be_released() {
        let geometry = Geometry::new(3 * 4096 + 512, 512).unwrap();
        assert_eq!(geometry.granule(), MIN_GRANULE_BYTES);
        assert_eq!(geometry.count(), 4);
        assert_eq!(geometry.odd_tail(), Some(3));
        assert_eq!(geometry.cover(ByteRange::at(4095, 2)), 0..2);
        assert_eq!(geometry.within(ByteRange::at(4095, 4098)), 1..2);
        assert_eq!(geometry.within(ByteRange::at(3 * 4096, 512)), 3..4);
        assert_eq!(geometry.within(ByteRange::at(3 * 4096, 511)), 3..3);
        assert_eq!(geometry.bytes(3..4), ByteRange::at(3 * 4096, 512));
    }

    #[test]
    fn a_huge_disk_gets_larger_granules() {
        let geometry = Geometry::new(64 << 40, 512).unwrap();
        assert_eq!(geometry.granule(), 8192);
        assert_eq!(Geometry::new(32 << 40, 512).unwrap().granule(), 4096);
        assert!(Geometry::new(1 << 30, 2 << 20).is_err());
    }

    #[test]
    fn pieces_are_cut_at_multiples() {
        let pieces: Vec<_> = ByteRange { start: 5, end: 21 }.pieces(8).collect();
        assert_eq!(pieces.len(), 3);
        assert_eq!(pieces[0], ByteRange { start: 5, end: 8 });
        assert_eq!(pieces[2], ByteRange { start: 16, end: 21 });
    }
}
