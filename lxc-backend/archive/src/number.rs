// SPDX-License-Identifier: MIT OR Apache-2.0
//! Numbers as tar writes them: octal and binary ones in headers, decimal ones in extended headers.

use crate::entry::Time;

const NANOS_DIGITS: usize = 9;

/// A number of a header; none if it is none. Blank fields are 0.
pub(crate) fn field(bytes: &[u8]) -> Option<i128> {
    match bytes.first()? {
        0x80 | 0xff => Some(binary(bytes)),
        first if first & 0x80 != 0 => None,
        _ => octal(bytes),
    }
}

/// Big-endian two's complement; the top bit of the first byte only says that it is binary. At most 12 bytes.
fn binary(bytes: &[u8]) -> i128 {
    let start = if bytes[0] == 0xff { -1 } else { 0 };
    bytes[1..].iter().fold(start, |value: i128, byte| (value << 8) | i128::from(*byte))
}

fn octal(bytes: &[u8]) -> Option<i128> {
    let is_blank = |byte: &u8| matches!(byte, b' ' | 0);
    let start = bytes.iter().position(|byte| !is_blank(byte)).unwrap_or(bytes.len());
    let digits = &bytes[start..];
    let end = digits.iter().position(is_blank).unwrap_or(digits.len());
    if !digits[end..].iter().all(is_blank) {
        return None;
    }
    digits[..end].iter().try_fold(0, |value: i128, byte| match byte {
        b'0'..=b'7' => Some(value * 8 + i128::from(byte - b'0')),
        _ => None,
    })
}

/// A decimal number without a sign.
pub(crate) fn decimal(bytes: &[u8]) -> Option<u64> {
    if bytes.is_empty() {
        return None;
    }
    bytes.iter().try_fold(0_u64, |value, byte| match byte {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(u64::from(byte - b'0')),
        _ => None,
    })
}

/// An id of a user or group. The last one means "none" to the kernel.
pub(crate) fn id(value: impl TryInto<u32>) -> Option<u32> {
    value.try_into().ok().filter(|id| *id != u32::MAX)
}

/// A time such as `-1.25`: seconds with a fraction, more than nine digits of it cut off.
pub(crate) fn time(bytes: &[u8]) -> Option<Time> {
    let (is_negative, bytes) = match bytes {
        [b'-', rest @ ..] => (true, rest),
        _ => (false, bytes),
    };
    let mut parts = bytes.splitn(2, |byte| *byte == b'.');
    let whole = i64::try_from(decimal(parts.next()?)?).ok()?;
    let nanos = match parts.next() {
        None | Some([]) => 0,
        Some(fraction) => nanos(fraction)?,
    };
    if !is_negative {
        return Some(Time { secs: whole, nanos });
    }
    Some(match nanos {
        0 => Time { secs: -whole, nanos },
        _ => Time { secs: -whole - 1, nanos: 1_000_000_000 - nanos },
    })
}

fn nanos(fraction: &[u8]) -> Option<u32> {
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digits = fraction.iter().chain(std::iter::repeat(&b'0')).take(NANOS_DIGITS);
    Some(digits.fold(0, |value, digit| value * 10 + u32::from(digit - b'0')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_have_octal_and_binary_numbers() {
        assert_eq!(field(b"0000644\0"), Some(0o644));
        assert_eq!(field(b"  12 \0\0\0"), Some(0o12));
        assert_eq!(field(b"77777777777\0"), Some(0o77_777_777_777));
        assert_eq!(field(&[0; 8]), Some(0));
        assert_eq!(field(&[0x80, 0, 0, 0, 1, 0, 0, 0]), Some(1 << 24));
        assert_eq!(field(&[0xff; 12]), Some(-1));
        let mut largest = [0xff; 12];
        largest[0] = 0x80;
        assert_eq!(field(&largest), Some((1 << 88) - 1));
        for bad in [&b"12 3\0"[..], b"8", b"-1", b"0x1", &[0x81, 0], &[0xfe, 0]] {
            assert_eq!(field(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn times_before_1970_round_down() {
        let is = |text: &[u8], secs, nanos| assert_eq!(time(text), Some(Time { secs, nanos }));
        is(b"12", 12, 0);
        is(b"12.", 12, 0);
        is(b"12.5", 12, 500_000_000);
        is(b"1.1234567899", 1, 123_456_789);
        is(b"-1.25", -2, 750_000_000);
        is(b"-3", -3, 0);
        for bad in [&b""[..], b"-", b"1.x", b"1.5.5", b"+1", b"9223372036854775808", b".5", b"1 "] {
            assert_eq!(time(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn decimal_numbers_have_no_sign_and_fit() {
        assert_eq!(decimal(b"18446744073709551615"), Some(u64::MAX));
        for bad in [&b""[..], b"-1", b"+1", b" 1", b"18446744073709551616"] {
            assert_eq!(decimal(bad), None, "{bad:?}");
        }
        assert_eq!(id(u64::from(u32::MAX) - 1), Some(u32::MAX - 1));
        assert_eq!(id(u64::from(u32::MAX)), None);
        assert_eq!(id(-1_i128), None);
    }
}
