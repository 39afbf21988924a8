// SPDX-License-Identifier: MIT OR Apache-2.0
//! Encodings inside values: shell words, base64, percent signs.

/// Splits text into words as a shell does, with quotes and backslashes and nothing else.
pub(crate) fn split(text: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            ' ' | '\t' => words.extend(word.take()),
            '\'' => quoted(&mut chars, '\'', word.get_or_insert_default())?,
            '"' => quoted(&mut chars, '"', word.get_or_insert_default())?,
            '\\' => {
                let next = chars.next().ok_or("it ends with a backslash.")?;
                word.get_or_insert_default().push(next);
            }
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    Ok(words)
}

fn quoted(chars: &mut std::str::Chars<'_>, end: char, word: &mut String) -> Result<(), String> {
    while let Some(c) = chars.next() {
        match c {
            c if c == end => return Ok(()),
            '\\' if end == '"' => match chars.next() {
                Some(c @ ('"' | '\\')) => word.push(c),
                Some(c) => word.extend(['\\', c]),
                None => break,
            },
            c => word.push(c),
        }
    }
    Err(format!("a quote {end} is not closed."))
}

/// Decodes base64 (standard alphabet) into text.
pub(super) fn decode_base64(text: &str) -> Result<String, String> {
    let wrong = || format!("'{text}' is not text in base64.");
    let digits = text.trim_end_matches('=');
    let mut bytes = Vec::with_capacity(digits.len() * 3 / 4);
    let (mut bits, mut count) = (0_u32, 0);
    for b in digits.bytes() {
        let digit = match b {
            b'A'..=b'Z' => b - b'A',
            b'a'..=b'z' => b - b'a' + 26,
            b'0'..=b'9' => b - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return Err(wrong()),
        };
        bits = (bits << 6 | u32::from(digit)) & 0xffff;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count & 0xff) as u8);
        }
    }
    if count == 6 {
        return Err(wrong());
    }
    String::from_utf8(bytes).map_err(|_| wrong())
}

/// Decodes `%XX`; other percent signs stay.
pub(super) fn decode_percent(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut result = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let [first, tail @ ..] = rest {
        let code = (*first == b'%').then(|| tail.get(..2)).flatten();
        let code = code.and_then(|hex| std::str::from_utf8(hex).ok());
        match code.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                result.push(byte);
                rest = &tail[2..];
            }
            None => {
                result.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&result).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_split_like_in_a_shell() {
        let words = split(r#"-append "console=ttyS0 a=\"b\"" -x 'y z'w \  "" "#).unwrap();
        assert_eq!(words, ["-append", r#"console=ttyS0 a="b""#, "-x", "y zw", " ", ""]);
        for bad in ["'a", "\"a", "a\\", "\"a\\"] {
            assert!(split(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn base64_is_decoded() {
        assert_eq!(decode_base64("UUVNVSwgdGVzdA==").unwrap(), "QEMU, test");
        assert_eq!(decode_base64("").unwrap(), "");
        assert!(decode_base64("!").is_err() && decode_base64("A").is_err());
    }

    #[test]
    fn percent_signs_are_decoded() {
        assert_eq!(decode_percent("a%20b%2G%"), "a b%2G%");
    }
}
