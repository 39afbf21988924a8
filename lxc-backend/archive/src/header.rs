// SPDX-License-Identifier: MIT OR Apache-2.0
//! One block of 512 bytes that begins an entry.

use crate::number::field;

/// All of an archive is in blocks of this size.
pub(crate) const BLOCK: usize = 512;

/// A block, seen as a header.
#[derive(Clone)]
pub(crate) struct Header(pub(crate) [u8; BLOCK]);

/// Which of the formats a header has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    V7,
    Ustar,
    Star,
    Gnu,
}

impl Header {
    /// Whether the sum of its bytes is the one it names. Old programs summed them up with a sign.
    pub(crate) fn has_its_checksum(&self) -> bool {
        let Some(named) = field(&self.0[148..156]) else { return false };
        let bytes = || {
            let is_sum = |at: usize| (148..156).contains(&at);
            self.0.iter().enumerate().map(move |(at, b)| if is_sum(at) { b' ' } else { *b })
        };
        let unsigned: i128 = bytes().map(i128::from).sum();
        let signed: i128 = bytes().map(|byte| i128::from(byte.cast_signed())).sum();
        named == unsigned || named == signed
    }

    pub(crate) fn format(&self) -> Format {
        match &self.0[257..265] {
            b"ustar  \0" => Format::Gnu,
            [b'u', b's', b't', b'a', b'r', 0, ..] if &self.0[508..512] == b"tar\0" => Format::Star,
            [b'u', b's', b't', b'a', b'r', 0, ..] => Format::Ustar,
            _ => Format::V7,
        }
    }

    pub(crate) fn typeflag(&self) -> u8 {
        self.0[156]
    }

    /// The path; ustar has more of it in a second field.
    pub(crate) fn path(&self) -> Vec<u8> {
        let name = text(&self.0[..100]);
        let prefix = match self.format() {
            Format::Ustar => text(&self.0[345..500]),
            Format::Star => text(&self.0[345..476]),
            Format::V7 | Format::Gnu => &[],
        };
        match prefix {
            [] => name.to_vec(),
            _ => [prefix, b"/", name].concat(),
        }
    }

    pub(crate) fn link(&self) -> &[u8] {
        text(&self.0[157..257])
    }

    pub(crate) fn mode(&self) -> Option<i128> {
        field(&self.0[100..108])
    }

    pub(crate) fn uid(&self) -> Option<i128> {
        field(&self.0[108..116])
    }

    pub(crate) fn gid(&self) -> Option<i128> {
        field(&self.0[116..124])
    }

    pub(crate) fn size(&self) -> Option<i128> {
        field(&self.0[124..136])
    }

    pub(crate) fn mtime(&self) -> Option<i128> {
        field(&self.0[136..148])
    }

    /// The numbers of a device.
    pub(crate) fn device(&self) -> Option<(u32, u32)> {
        let number = |range: std::ops::Range<usize>| u32::try_from(field(&self.0[range])?).ok();
        Some((number(329..337)?, number(337..345)?))
    }
}

/// Up to the first zero byte.
fn text(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    &bytes[..end]
}
