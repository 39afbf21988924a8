// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a sector holds: a tag that names record, disk and place, and data that follows from it.

use super::layout::SECTOR_BYTES;

/// A sector's size as an index.
pub const SECTOR_LEN: usize = SECTOR_BYTES as usize;

const RECORD_MAGIC: u64 = u64::from_le_bytes(*b"VZRECORD");
const HEADER_MAGIC: u64 = u64::from_le_bytes(*b"VZHEADER");
const TAG_LEN: usize = 32;
/// The number in the tag of a sector that was filled before the first record.
const PREFILL_NUMBER: u64 = 0;

/// Which disk of the pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Written first.
    A,
    /// Written second.
    B,
}

impl Side {
    fn id(self) -> u64 {
        match self {
            Self::A => 0xa,
            Self::B => 0xb,
        }
    }

    fn from_id(id: u64) -> Option<Self> {
        match id {
            0xa => Some(Self::A),
            0xb => Some(Self::B),
            _ => None,
        }
    }
}

impl std::fmt::Display for Side {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Self::A => "a",
            Self::B => "b",
        })
    }
}

/// What the first sector of a disk says about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Which disk of the pair.
    pub side: Side,
    /// Number of the pair; both disks of a pair have the same.
    pub pair: u64,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
}

impl Header {
    /// The header's sector.
    #[must_use]
    pub fn encode(&self) -> [u8; SECTOR_LEN] {
        let mut sector = [0; SECTOR_LEN];
        let words = [HEADER_MAGIC, self.side.id(), self.pair, self.disk_bytes, self.checksum()];
        for (word, place) in words.iter().zip(sector.chunks_exact_mut(8)) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        sector
    }

    /// Reads a header's sector; `None` when it is none or is damaged.
    #[must_use]
    pub fn decode(sector: &[u8]) -> Option<Self> {
        if word(sector, 0)? != HEADER_MAGIC {
            return None;
        }
        let header = Self {
            side: Side::from_id(word(sector, 1)?)?,
            pair: word(sector, 2)?,
            disk_bytes: word(sector, 3)?,
        };
        (word(sector, 4)? == header.checksum()).then_some(header)
    }

    fn checksum(&self) -> u64 {
        mix(mix(mix(self.pair) ^ self.side.id()) ^ self.disk_bytes)
    }

    /// Fills `sector` with what a record (or, without number, the first filling) puts there.
    pub fn fill(&self, number: Option<u64>, at_sector: u64, sector: &mut [u8]) {
        let number = number.unwrap_or(PREFILL_NUMBER);
        let place = self.side.id() << 56 | at_sector;
        let check = self.tag_check(number, place);
        let tag = [RECORD_MAGIC, number, place, check];
        let mut state = check;
        for (index, bytes) in sector.chunks_exact_mut(8).enumerate() {
            let value = tag.get(index).copied().unwrap_or_else(|| {
                state = state.wrapping_add(GOLDEN);
                mix(state)
            });
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    }

    fn tag_check(&self, number: u64, place: u64) -> u64 {
        mix(mix(mix(self.pair) ^ number) ^ place)
    }

    /// The number of the record a sector says to hold; `None` when it holds none of this place.
    #[must_use]
    pub fn number_in(&self, at_sector: u64, sector: &[u8]) -> Option<u64> {
        let place = self.side.id() << 56 | at_sector;
        let number = word(sector, 1)?;
        let tagged = word(sector, 0)? == RECORD_MAGIC
            && word(sector, 2)? == place
            && word(sector, 3)? == self.tag_check(number, place);
        tagged.then_some(number)
    }

    /// Says in words what a sector holds, for the report of a failed check.
    #[must_use]
    pub fn describe(&self, at_sector: u64, sector: &[u8]) -> String {
        if sector.iter().all(|byte| *byte == 0) {
            return "zeroes".into();
        }
        let Some(number) = self.number_in(at_sector, sector) else {
            return match (word(sector, 0), word(sector, 1), word(sector, 2)) {
                (Some(RECORD_MAGIC), Some(number), Some(place)) => {
                    let (id, from) = (place >> 56, place & ((1 << 56) - 1));
                    format!("record {number} of sector {from} on disk {id:x}")
                }
                _ => "data of no record".into(),
            };
        };
        let mut whole = [0; SECTOR_LEN];
        self.fill((number != PREFILL_NUMBER).then_some(number), at_sector, &mut whole);
        let damaged = if whole[TAG_LEN..] == sector[TAG_LEN..] { "" } else { " with damaged data" };
        match number {
            PREFILL_NUMBER => format!("its first filling{damaged}"),
            _ => format!("record {number}{damaged}"),
        }
    }
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// A full avalanche of 64 bits: each input bit changes half of the output bits.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(GOLDEN);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn word(sector: &[u8], index: usize) -> Option<u64> {
    let bytes = sector.get(index * 8..index * 8 + 8)?;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: Header = Header { side: Side::B, pair: 77, disk_bytes: 1 << 30 };

    #[test]
    fn a_header_survives_and_a_damaged_one_is_refused() {
        let mut sector = HEADER.encode();
        assert_eq!(Header::decode(&sector), Some(HEADER));
        sector[17] ^= 1;
        assert_eq!(Header::decode(&sector), None);
        assert_eq!(Header::decode(&sector[..20]), None);
    }

    #[test]
    fn a_sector_knows_its_record_and_its_place() {
        let mut sector = [0; SECTOR_LEN];
        HEADER.fill(Some(5), 99, &mut sector);
        assert_eq!(HEADER.number_in(99, &sector), Some(5));
        assert_eq!(HEADER.number_in(98, &sector), None);
        assert_eq!(Header { pair: 78, ..HEADER }.number_in(99, &sector), None);
        assert_eq!(HEADER.describe(99, &sector), "record 5");
        assert_eq!(HEADER.describe(98, &sector), "record 5 of sector 99 on disk b");
        sector[400] ^= 1;
        assert_eq!(HEADER.describe(99, &sector), "record 5 with damaged data");
    }
}
