// SPDX-License-Identifier: MIT OR Apache-2.0
//! Lines and messages: what is read from an untrusted program, with a bound on everything.

use std::fmt::Display;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use tokio::io::{AsyncBufRead, AsyncBufReadExt};

/// Longest message of either side, in bytes, without its line break.
pub const LINE_BYTES_MAX: usize = 1 << 20;

/// What a line turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line {
    /// A whole line.
    Whole(Vec<u8>),
    /// More than the limit; this is its beginning.
    TooLong(Vec<u8>),
}

/// Reads lines of a limited length.
pub(crate) struct LineReader<R> {
    inner: R,
    max_bytes: usize,
    /// Whether the rest of a long line is skipped; else it is reported as soon as it is too long.
    skip_rest: bool,
    /// The beginning of a line that never ended.
    rest: Vec<u8>,
}

impl<R: AsyncBufRead + Unpin> LineReader<R> {
    pub(crate) fn new(inner: R, max_bytes: usize, skip_rest: bool) -> Self {
        Self { inner, max_bytes, skip_rest, rest: Vec::new() }
    }

    /// The next line; none at the end. A last line without its line break is none: whoever wrote it
    /// died over it. It is what [`Self::rest`] gives.
    pub(crate) async fn next(&mut self) -> std::io::Result<Option<Line>> {
        let mut line = Vec::new();
        let mut is_cut = false;
        loop {
            let chunk = self.inner.fill_buf().await?;
            if chunk.is_empty() {
                self.rest = line;
                return Ok(None);
            }
            let end = chunk.iter().position(|byte| *byte == b'\n');
            let content = end.unwrap_or(chunk.len());
            let fits = content.min(self.max_bytes - line.len());
            line.extend_from_slice(&chunk[..fits]);
            is_cut |= fits < content;
            let used = end.map_or(content, |end| end + 1);
            self.inner.consume(used);
            if is_cut && (end.is_some() || !self.skip_rest) {
                return Ok(Some(Line::TooLong(line)));
            }
            if end.is_some() {
                return Ok(Some(Line::Whole(line)));
            }
        }
    }

    /// What there was of a line at the end, without its line break.
    pub(crate) fn rest(&self) -> &[u8] {
        &self.rest
    }

    /// The same, once.
    pub(crate) fn take_rest(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.rest)
    }

    /// Reads and forgets everything to the end.
    pub(crate) async fn drain(&mut self) {
        while let Ok(chunk) = self.inner.fill_buf().await {
            let bytes = chunk.len();
            if bytes == 0 {
                return;
            }
            self.inner.consume(bytes);
        }
    }
}

/// Any message of a plugin.
#[derive(Debug, Deserialize)]
pub(crate) struct Incoming {
    pub(crate) jsonrpc: String,
    #[serde(default)]
    pub(crate) id: Option<Value>,
    #[serde(default)]
    pub(crate) method: Option<String>,
    #[serde(default)]
    pub(crate) params: Option<Value>,
    /// `null` is a result, too.
    #[serde(default, deserialize_with = "present")]
    pub(crate) result: Option<Value>,
    #[serde(default)]
    pub(crate) error: Option<WireError>,
}

fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

/// The `error` member of a reply.
#[derive(Debug, Deserialize)]
pub(crate) struct WireError {
    pub(crate) code: i64,
    #[serde(default)]
    pub(crate) message: String,
    #[serde(default)]
    pub(crate) data: Option<WireErrorData>,
}

#[derive(Debug, Default, Deserialize)]
pub(crate) struct WireErrorData {
    #[serde(default)]
    pub(crate) kind: Option<String>,
    #[serde(default)]
    pub(crate) dependents: Vec<String>,
}

/// The plugin does not know the method.
pub(crate) const METHOD_NOT_FOUND: i64 = -32601;
/// The parameters make no sense.
pub(crate) const INVALID_PARAMS: i64 = -32602;
/// What an error of the contract has as its code; `data.kind` says which one it is.
pub(crate) const CONTRACT_ERROR: i64 = -32000;

/// A 64-bit number; on the wire it is a text, because many JSON libraries keep 53 bits only.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Dec<T>(pub(crate) T);

impl<T: Display> Serialize for Dec<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de, T: FromStr> Deserialize<'de> for Dec<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = deserializer.deserialize_str(Text("a text of decimal digits"))?;
        let is_plain = text.bytes().all(|b| b.is_ascii_digit() || b == b'-');
        match text.parse() {
            Ok(number) if is_plain => Ok(Self(number)),
            _ => Err(serde::de::Error::custom(format!(
                "the text {:?} is no decimal number of 64 bits",
                shorten(&text, 40)
            ))),
        }
    }
}

/// A text, and what it has to be in words.
struct Text(&'static str);

impl serde::de::Visitor<'_> for Text {
    type Value = String;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.0)
    }

    fn visit_str<E>(self, text: &str) -> Result<String, E> {
        Ok(text.to_owned())
    }
}

/// Bytes; on the wire they are Base64.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Base64(pub(crate) Vec<u8>);

impl Serialize for Base64 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Base64 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = deserializer.deserialize_str(Text("a text of Base64"))?;
        let fault = |error| serde::de::Error::custom(format!("the text is no Base64: {error}"));
        STANDARD.decode(text.as_bytes()).map(Self).map_err(fault)
    }
}

/// The beginning of a text, as one line without control characters.
pub(crate) fn shorten(text: &str, max_bytes: usize) -> String {
    let cut = text.floor_char_boundary(max_bytes);
    let mut short: String =
        text[..cut].chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if cut < text.len() {
        short.push('…');
    }
    short
}

/// The same for bytes.
pub(crate) fn shorten_bytes(bytes: &[u8], max_bytes: usize) -> String {
    // Four bytes more, so that what is cut off shows as such.
    let part = &bytes[..bytes.len().min(max_bytes + 4)];
    shorten(&String::from_utf8_lossy(part), max_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn lines(text: &[u8], skip_rest: bool) -> Vec<Line> {
        // Small pieces, so that lines are put together.
        let inner = tokio::io::BufReader::with_capacity(3, text);
        let mut reader = LineReader::new(inner, 5, skip_rest);
        let mut all = Vec::new();
        while let Some(line) = reader.next().await.unwrap() {
            let stop = !skip_rest && matches!(line, Line::TooLong(_));
            all.push(line);
            if stop {
                break;
            }
        }
        all
    }

    fn whole(text: &str) -> Line {
        Line::Whole(text.into())
    }

    #[tokio::test]
    async fn lines_have_a_limit() {
        let text = b"\none\nfives\nsix666\nend\nhalf";
        let long = || Line::TooLong(b"six66".to_vec());
        let all = lines(text, true).await;
        assert_eq!(all, [whole(""), whole("one"), whole("fives"), long(), whole("end")]);
        let mut reader = LineReader::new(&text[text.len() - 4..], 5, true);
        assert_eq!(reader.next().await.unwrap(), None);
        assert_eq!(reader.rest(), b"half");
        assert_eq!(lines(text, false).await, [whole(""), whole("one"), whole("fives"), long()]);
    }

    #[test]
    fn numbers_are_texts() {
        let text = serde_json::to_string(&Dec(u64::MAX)).unwrap();
        assert_eq!(text, "\"18446744073709551615\"");
        assert_eq!(serde_json::from_str::<Dec<u64>>(&text).unwrap().0, u64::MAX);
        assert_eq!(serde_json::from_str::<Dec<i64>>("\"-5\"").unwrap().0, -5);
        for bad in ["5", "\"+5\"", "\"\"", "\"-5\"", "\"1e3\"", "\"18446744073709551616\"", "null"]
        {
            assert!(serde_json::from_str::<Dec<u64>>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_null_result_is_one() {
        let read = |text: &str| serde_json::from_str::<Incoming>(text).unwrap();
        assert_eq!(read(r#"{"jsonrpc":"2.0","id":1,"result":null}"#).result, Some(Value::Null));
        assert_eq!(read(r#"{"jsonrpc":"2.0","id":1}"#).result, None);
    }

    #[test]
    fn quotes_are_short_and_plain() {
        assert_eq!(shorten("a\u{1b}b", 10), "a b");
        assert_eq!(shorten("ää", 3), "ä…");
        assert_eq!(shorten_bytes(b"\xff\xffabcdefg", 4), "\u{fffd}…");
    }
}
