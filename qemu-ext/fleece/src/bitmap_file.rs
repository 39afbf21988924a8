// SPDX-License-Identifier: GPL-2.0-or-later
//! The file in which the dirty bitmap of a raw disk outlives QEMU.
//!
//! While QEMU has the disk, the file says *in use* and holds nothing else; when the disk is closed
//! cleanly it is *sealed*: it holds the bitmap, and how to recognize that the disk was not changed
//! since. Numbers are little-endian:
//!
//! ```text
//!   0   8  "ba-bmap\n"
//!   8   4  version: 1
//!  12   4  state: 0 in use, 1 sealed
//!  16  32  hash of the target, hexadecimal
//!  48   8  size of the disk in bytes                 \
//!  56   4  storage: 0 unknown, 1 file, 2 block device |
//!  60   4  ctime of the file, nanoseconds             |
//!  64   8  ctime of the file, seconds                 | zero while in use; what is about
//!  72   8  device number of the file                  | the file is zero without one
//!  80   8  inode number of the file                   |
//!  88   8  size of the file in bytes                  |
//!  96   4  granularity of the bitmap in bytes         |
//! 100   4  length of the bitmap's name, 0: no bitmap  |
//! 104   8  length of the bitmap                      /
//! 112      name, bitmap (a bit for each granule, in words of 64)
//!       8  CRC-64 (as of XZ) of everything before
//! ```

use std::fmt;

use crate::OutOfMemory;
use crate::bitmap_name::{BitmapName, HASH_LEN, belongs_to, is_hash};

const MAGIC: &[u8; 8] = b"ba-bmap\n";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 112;
const CRC_BYTES: usize = 8;
const MAX_NAME_BYTES: usize = 255;
/// The finest granularity of a bitmap that is stored.
const MIN_GRANULARITY_BYTES: u32 = 4096;

/// How a disk is stored, as far as that tells whether it was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// Nothing is known.
    Unknown,
    /// A regular file.
    File {
        /// Number of the device with its file system.
        device: u64,
        /// Its inode.
        inode: u64,
        /// Its size.
        size_bytes: u64,
        /// When it or its inode was changed last: seconds and nanoseconds.
        ctime: (i64, u32),
    },
    /// A block device, which does not tell.
    BlockDevice,
}

/// A bitmap as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBitmap {
    /// Its name with the generations.
    pub name: String,
    /// Bytes per bit.
    pub granularity_bytes: u32,
    /// A bit for each granule, least significant first, in words of 64.
    pub bits: Vec<u8>,
}

/// What a sealed file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seal {
    /// Size of the disk.
    pub size_bytes: u64,
    /// How it is stored.
    pub storage: Storage,
    /// Its bitmap, if it has one.
    pub bitmap: Option<StoredBitmap>,
}

/// A file's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapFile {
    /// Hash of the target.
    pub target_hash: String,
    /// None while the disk is in use.
    pub seal: Option<Seal>,
}

/// Why a file cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// It does not begin as one of ours.
    Foreign,
    /// Another version wrote it.
    Version(u32),
    /// It is too short or too long.
    Length,
    /// Its checksum is wrong.
    Checksum,
    /// What it says cannot be.
    Nonsense,
    /// There is no memory for its bitmap.
    Memory,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign => f.write_str("is no bitmap file"),
            Self::Version(version) => write!(f, "has the unknown version {version}"),
            Self::Length => f.write_str("is truncated or too long"),
            Self::Checksum => f.write_str("is damaged: its checksum is wrong"),
            Self::Nonsense => f.write_str("is damaged: its members do not fit together"),
            Self::Memory => f.write_str("holds a bitmap that there is no memory for"),
        }
    }
}

/// Bytes of a bitmap of a disk.
fn bits_len(size_bytes: u64, granularity_bytes: u32) -> u64 {
    size_bytes.div_ceil(u64::from(granularity_bytes.max(1))).div_ceil(64) * 8
}

/// The longest file of a disk of this size.
pub fn max_file_bytes(size_bytes: u64) -> u64 {
    (HEADER_BYTES + MAX_NAME_BYTES + CRC_BYTES) as u64 + bits_len(size_bytes, MIN_GRANULARITY_BYTES)
}

impl StoredBitmap {
    /// Whether it is a settled bitmap of this target and of a disk of this size.
    fn fits(&self, target_hash: &str, size_bytes: u64) -> bool {
        let granularity = self.granularity_bytes;
        let bits = size_bytes.div_ceil(u64::from(granularity.max(1)));
        granularity.is_power_of_two()
            && granularity >= MIN_GRANULARITY_BYTES
            && self.bits.len() as u64 == bits_len(size_bytes, granularity)
            && self.clear_from(bits)
            && belongs_to(&self.name, target_hash)
            && BitmapName::parse(&self.name).is_some_and(|name| name.is_settled())
    }

    /// Whether no bit is set from this one on.
    fn clear_from(&self, bit: u64) -> bool {
        let first = usize::try_from(bit / 8).unwrap_or(usize::MAX);
        let Some(rest) = self.bits.get(first..) else { return true };
        let kept = (1_u8 << (bit % 8)) - 1;
        rest.iter().enumerate().all(|(at, &byte)| if at == 0 { byte & !kept } else { byte } == 0)
    }
}

impl BitmapFile {
    /// The bytes of the file.
    ///
    /// # Errors
    /// There is no memory for them.
    pub fn encode(&self) -> Result<Vec<u8>, OutOfMemory> {
        let bitmap = self.seal.as_ref().and_then(|seal| seal.bitmap.as_ref());
        let (name, bits) = bitmap.map_or(("", &[][..]), |b| (b.name.as_str(), &b.bits));
        let mut bytes = Vec::new();
        bytes
            .try_reserve_exact(HEADER_BYTES + name.len() + bits.len() + CRC_BYTES)
            .map_err(|_| OutOfMemory)?;
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(u32::from(self.seal.is_some()).to_le_bytes());
        bytes.extend(self.target_hash.as_bytes());
        bytes.resize(48, 0);
        let storage = self.seal.as_ref().map_or(Storage::Unknown, |seal| seal.storage);
        let (kind, device, inode, file_bytes, (seconds, nanoseconds)) = match storage {
            Storage::Unknown => (0_u32, 0, 0, 0, (0, 0)),
            Storage::File { device, inode, size_bytes, ctime } => {
                (1, device, inode, size_bytes, ctime)
            }
            Storage::BlockDevice => (2, 0, 0, 0, (0, 0)),
        };
        bytes.extend(self.seal.as_ref().map_or(0, |seal| seal.size_bytes).to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend(nanoseconds.to_le_bytes());
        bytes.extend(seconds.to_le_bytes());
        for number in [device, inode, file_bytes] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(bitmap.map_or(0, |b| b.granularity_bytes).to_le_bytes());
        bytes.extend((name.len() as u32).to_le_bytes());
        bytes.extend((bits.len() as u64).to_le_bytes());
        bytes.extend(name.as_bytes());
        bytes.extend(bits);
        bytes.extend(crc64(&bytes).to_le_bytes());
        Ok(bytes)
    }

    /// Reads a file's bytes.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn decode(bytes: &[u8]) -> Result<Self, Damage> {
        if !bytes.starts_with(MAGIC) {
            return Err(Damage::Foreign);
        }
        let (body, crc) = bytes.split_last_chunk::<CRC_BYTES>().ok_or(Damage::Length)?;
        let (header, rest) = body.split_at_checked(HEADER_BYTES).ok_or(Damage::Length)?;
        let fields = Fields(header);
        if fields.u32(8) != VERSION {
            return Err(Damage::Version(fields.u32(8)));
        }
        if crc64(body) != u64::from_le_bytes(*crc) {
            return Err(Damage::Checksum);
        }
        let name_len = usize::try_from(fields.u32(100)).map_err(|_| Damage::Length)?;
        let (name, bits) = rest.split_at_checked(name_len).ok_or(Damage::Length)?;
        if bits.len() as u64 != fields.u64(104) {
            return Err(Damage::Length);
        }
        let mut this = fields.file(name).ok_or(Damage::Nonsense)?;
        match this.seal.as_mut().and_then(|seal| seal.bitmap.as_mut()) {
            Some(bitmap) => {
                bitmap.bits.try_reserve_exact(bits.len()).map_err(|_| Damage::Memory)?;
                bitmap.bits.extend(bits);
            }
            None if name.is_empty() && bits.is_empty() => {}
            None => return Err(Damage::Nonsense),
        }
        if this.is_sound() { Ok(this) } else { Err(Damage::Nonsense) }
    }

    fn is_sound(&self) -> bool {
        is_hash(&self.target_hash)
            && self.seal.as_ref().is_none_or(|seal| {
                let bitmap = seal.bitmap.as_ref();
                bitmap.is_none_or(|bitmap| bitmap.fits(&self.target_hash, seal.size_bytes))
            })
    }
}

/// The header of a file.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }

    /// The file without the bits of its bitmap.
    fn file(&self, name: &[u8]) -> Option<BitmapFile> {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
        let target_hash = text(self.0.get(16..16 + HASH_LEN)?)?;
        let storage = match self.u32(56) {
            0 => Storage::Unknown,
            1 => Storage::File {
                device: self.u64(72),
                inode: self.u64(80),
                size_bytes: self.u64(88),
                ctime: (i64::from_le_bytes(self.array(64)), self.u32(60)),
            },
            2 => Storage::BlockDevice,
            _ => return None,
        };
        let bitmap = match name {
            [] => None,
            name => Some(StoredBitmap {
                name: text(name)?,
                granularity_bytes: self.u32(96),
                bits: Vec::new(),
            }),
        };
        let seal = match self.u32(12) {
            0 => None,
            1 => Some(Seal { size_bytes: self.u64(48), storage, bitmap }),
            _ => return None,
        };
        Some(BitmapFile { target_hash, seal })
    }
}

const CRC_TABLE: [u64; 256] = {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut value = index as u64;
        let mut bit = 0;
        while bit < 8 {
            value = (value >> 1) ^ if value & 1 == 1 { 0xC96C_5795_D787_0F42 } else { 0 };
            bit += 1;
        }
        table[index] = value;
        index += 1;
    }
    table
};

fn crc64(bytes: &[u8]) -> u64 {
    !bytes
        .iter()
        .fold(!0, |crc, &byte| CRC_TABLE[usize::from(byte ^ crc.to_le_bytes()[0])] ^ (crc >> 8))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;
    use crate::bitmap_name::{Ending, Id};

    const HASH: &str = "0123456789abcdef0123456789abcdef";

    fn name(size_bytes: u64, ending: Ending) -> String {
        BitmapName::new(HASH, size_bytes, ending, vec![Id::from_random([3; 10])]).to_string()
    }

    fn storage() -> impl Strategy<Value = Storage> {
        let file = any::<(u64, u64, u64, i64, u32)>();
        prop_oneof![
            Just(Storage::Unknown),
            Just(Storage::BlockDevice),
            file.prop_map(|(device, inode, size_bytes, seconds, nanoseconds)| Storage::File {
                device,
                inode,
                size_bytes,
                ctime: (seconds, nanoseconds),
            }),
        ]
    }

    /// A disk of up to 4 MiB, so that whole files can be looked at byte by byte.
    fn seal() -> impl Strategy<Value = Seal> {
        (1..8192_u64, storage(), 12..17_u32, any::<bool>(), any::<u64>()).prop_map(
            |(sectors, storage, shift, with_bitmap, seed)| {
                let (size_bytes, granularity_bytes) = (sectors * 512, 1 << shift);
                let count = size_bytes.div_ceil(u64::from(granularity_bytes));
                let mut bits = vec![0; bits_len(size_bytes, granularity_bytes) as usize];
                for bit in (0..count).filter(|bit| seed.rotate_left(*bit as u32) & 1 == 1) {
                    bits[bit as usize / 8] |= 1 << (bit % 8);
                }
                let name = name(size_bytes, Ending::Success);
                let bitmap = StoredBitmap { name, granularity_bytes, bits };
                Seal { size_bytes, storage, bitmap: with_bitmap.then_some(bitmap) }
            },
        )
    }

    fn file() -> impl Strategy<Value = BitmapFile> {
        proptest::option::of(seal())
            .prop_map(|seal| BitmapFile { target_hash: HASH.to_owned(), seal })
    }

    #[test]
    fn the_checksum_is_that_of_xz() {
        assert_eq!(crc64(b"123456789"), 0x995D_C9BB_DF19_39FA);
    }

    #[test]
    fn other_files_are_told_apart() {
        let none = BitmapFile { target_hash: HASH.to_owned(), seal: None };
        let mut newer = none.encode().unwrap();
        newer[8] = 2;
        assert_eq!(BitmapFile::decode(&newer), Err(Damage::Version(2)));
        for foreign in [&b""[..], b"ba-bmap", b"QFI\xfb", &[0; 4096]] {
            assert_eq!(BitmapFile::decode(foreign), Err(Damage::Foreign));
        }
        assert_eq!(BitmapFile::decode(b"ba-bmap\n"), Err(Damage::Length));
    }

    #[test]
    fn a_bitmap_that_does_not_fit_its_disk_is_refused() {
        let size_bytes = 100 * 4096;
        let good = StoredBitmap {
            name: name(size_bytes, Ending::Failure),
            granularity_bytes: 4096,
            bits: vec![0xff; 12].into_iter().chain([0xf, 0, 0, 0]).collect(),
        };
        let decoded = |bitmap: &StoredBitmap| {
            let (bitmap, storage) = (Some(bitmap.clone()), Storage::Unknown);
            let seal = Some(Seal { size_bytes, storage, bitmap });
            let file = BitmapFile { target_hash: HASH.to_owned(), seal };
            BitmapFile::decode(&file.encode().unwrap())
        };
        assert!(decoded(&good).is_ok());
        let mut beyond = good.clone();
        beyond.bits[12] = 0x1f;
        for bad in [
            beyond,
            StoredBitmap { granularity_bytes: 2048, ..good.clone() },
            StoredBitmap { granularity_bytes: 12288, ..good.clone() },
            StoredBitmap { bits: vec![0; 24], ..good.clone() },
            StoredBitmap { name: name(size_bytes, Ending::Pending), ..good.clone() },
            StoredBitmap { name: good.name.replace("0123", "4567"), ..good.clone() },
            StoredBitmap { name: "bitmap0".to_owned(), ..good.clone() },
        ] {
            assert_eq!(decoded(&bad), Err(Damage::Nonsense), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn a_file_is_read_back(file in file()) {
            let bytes = file.encode().unwrap();
            let size = file.seal.as_ref().map_or(0, |seal| seal.size_bytes);
            prop_assert!(bytes.len() as u64 <= max_file_bytes(size));
            prop_assert_eq!(BitmapFile::decode(&bytes), Ok(file));
        }

        #[test]
        fn every_changed_byte_is_detected(file in file(), change in 1..=u8::MAX) {
            let mut bytes = file.encode().unwrap();
            for at in 0..bytes.len() {
                bytes[at] ^= change;
                prop_assert!(BitmapFile::decode(&bytes).is_err(), "byte {}", at);
                bytes[at] ^= change;
            }
        }

        #[test]
        fn every_truncation_and_any_addition_is_detected(file in file(), more in any::<u8>()) {
            let mut bytes = file.encode().unwrap();
            for len in 0..bytes.len() {
                prop_assert!(BitmapFile::decode(&bytes[..len]).is_err(), "{} bytes", len);
            }
            bytes.push(more);
            prop_assert!(BitmapFile::decode(&bytes).is_err());
        }

        #[test]
        fn reading_never_panics(mut bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = BitmapFile::decode(&bytes);
            // Past the magic, and past the checksum.
            for (at, byte) in (0..).zip(MAGIC.iter().chain(&VERSION.to_le_bytes())) {
                if let Some(place) = bytes.get_mut(at) {
                    *place = *byte;
                }
            }
            let _ = BitmapFile::decode(&bytes);
            let crc = crc64(&bytes);
            bytes.extend(crc.to_le_bytes());
            let _ = BitmapFile::decode(&bytes);
        }
    }
}
