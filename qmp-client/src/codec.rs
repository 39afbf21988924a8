// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bytes to messages and back, without any I/O.
//!
//! QMP is one JSON object per line. [`Framer`] cuts a byte stream into lines of bounded length,
//! [`parse`] reads one line, [`encode`] writes a command. Nothing here trusts its input: any bytes
//! give a message or an error, and members that are not known are skipped.

use std::{borrow::Cow, fmt};

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, value::RawValue};

/// How many bytes at each end of an oversize line are kept, to find the `id` there.
const END_BYTES: usize = 512;
/// A buffer that grew beyond this is given back once it is empty.
const KEEP_CAPACITY_BYTES: usize = 1 << 20;

/// One line, or what is left of one that was too long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// A line without its line end.
    Line(Vec<u8>),
    /// A line beyond the limit; it was dropped while it came in.
    Oversize {
        /// Its length.
        length_bytes: u64,
        /// Its first bytes.
        head: Vec<u8>,
        /// Its last bytes, as far as they are not in `head`.
        tail: Vec<u8>,
    },
}

/// Cuts a byte stream into lines; holds at most the limit plus what was pushed last.
#[derive(Debug)]
pub struct Framer {
    buffer: Vec<u8>,
    /// Where the unread part of `buffer` begins.
    start: usize,
    /// Up to where `buffer` was searched for a line end.
    scanned: usize,
    max_line_bytes: usize,
    /// Bytes of the present line that are not in `buffer` any more.
    dropped_bytes: u64,
    /// The first of them.
    head: Vec<u8>,
}

impl Framer {
    /// A framer for lines of up to `max_line_bytes` (without the line end).
    #[must_use]
    pub fn new(max_line_bytes: usize) -> Self {
        Self {
            buffer: Vec::new(),
            start: 0,
            scanned: 0,
            max_line_bytes,
            dropped_bytes: 0,
            head: Vec::new(),
        }
    }

    /// Takes bytes in. Call [`Self::next_frame`] until it returns `None` before the next push.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.scanned -= self.start;
            self.start = 0;
        }
        if self.buffer.is_empty() && self.buffer.capacity() > KEEP_CAPACITY_BYTES {
            self.buffer = Vec::new();
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole line, if there is one.
    pub fn next_frame(&mut self) -> Option<Frame> {
        let found = self.buffer[self.scanned..].iter().position(|&byte| byte == b'\n');
        let Some(end) = found.map(|at| self.scanned + at) else {
            self.scanned = self.buffer.len();
            self.drop_excess();
            return None;
        };
        let line = &self.buffer[self.start..end];
        let frame = if self.dropped_bytes > 0 {
            let tail = line[line.len().saturating_sub(END_BYTES)..].to_vec();
            let head = std::mem::take(&mut self.head);
            Frame::Oversize { length_bytes: self.dropped_bytes + line.len() as u64, head, tail }
        } else if line.len() > self.max_line_bytes {
            let (head, rest) = line.split_at(line.len().min(END_BYTES));
            let tail = &rest[rest.len().saturating_sub(END_BYTES)..];
            let length_bytes = line.len() as u64;
            Frame::Oversize { length_bytes, head: head.to_vec(), tail: tail.to_vec() }
        } else {
            Frame::Line(line.strip_suffix(b"\r").unwrap_or(line).to_vec())
        };
        self.dropped_bytes = 0;
        self.start = end + 1;
        self.scanned = end + 1;
        Some(frame)
    }

    /// The bytes of the line that is not complete yet; only its end if it is beyond the limit.
    #[must_use]
    pub fn incomplete(&self) -> &[u8] {
        &self.buffer[self.start..]
    }

    /// Whether the line that is not complete yet is beyond the limit already.
    #[must_use]
    pub fn is_oversize(&self) -> bool {
        self.dropped_bytes > 0
    }

    /// Shortens an incomplete line beyond the limit to its ends.
    fn drop_excess(&mut self) {
        let length = self.buffer.len() - self.start;
        if self.dropped_bytes == 0 {
            if length <= self.max_line_bytes {
                return;
            }
            let head = length.min(END_BYTES);
            self.head = self.buffer[self.start..self.start + head].to_vec();
            self.start += head;
            self.dropped_bytes = head as u64;
        }
        let excess = (self.buffer.len() - self.start).saturating_sub(END_BYTES);
        self.start += excess;
        self.dropped_bytes += excess as u64;
    }
}

/// What QEMU says about itself when a client connects.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Greeting {
    /// QEMU's version.
    #[serde(default)]
    pub version: Version,
}

/// QEMU's version.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Version {
    /// The three numbers.
    #[serde(default)]
    pub qemu: VersionTriple,
    /// The packager's addition, for example `Debian 1:10.0.2+ds-2`.
    #[serde(default)]
    pub package: String,
}

/// Major, minor and micro number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct VersionTriple {
    /// Changes once a year.
    #[serde(default)]
    pub major: u32,
    /// Changes with each release.
    #[serde(default)]
    pub minor: u32,
    /// Changes with each stable update.
    #[serde(default)]
    pub micro: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let VersionTriple { major, minor, micro } = self.qemu;
        write!(f, "{major}.{minor}.{micro}")
    }
}

/// When QEMU emitted an event; both are -1 if its clock failed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub struct Timestamp {
    /// Seconds since the epoch.
    pub seconds: i64,
    /// Microseconds within the second.
    pub microseconds: i64,
}

/// An event, known to this client or not.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name, for example `JOB_STATUS_CHANGE`.
    pub name: String,
    /// All its members as they were sent; `Null` if it has none.
    pub data: Value,
    /// When it was emitted.
    pub timestamp: Timestamp,
}

/// One message of the peer.
#[derive(Debug)]
pub enum Message {
    /// The first line of a monitor.
    Greeting(Greeting),
    /// Something happened.
    Event(Event),
    /// A command succeeded.
    Return {
        /// The command's id, if the peer echoed one.
        id: Option<String>,
        /// Its result, still as text.
        value: Box<RawValue>,
    },
    /// A command failed.
    Error {
        /// The command's id, if the peer echoed one.
        id: Option<String>,
        /// The class, mostly `GenericError`.
        class: String,
        /// The sentence.
        desc: String,
    },
}

/// A line that is not a message.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ParseError(String);

#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(rename = "QMP", default)]
    greeting: Option<Greeting>,
    #[serde(rename = "return", default, borrow, deserialize_with = "present")]
    value: Option<&'a RawValue>,
    #[serde(default)]
    error: Option<ErrorBody>,
    #[serde(default)]
    event: Option<String>,
    #[serde(default)]
    data: Value,
    #[serde(default)]
    timestamp: Timestamp,
    #[serde(default, borrow, deserialize_with = "present")]
    id: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct ErrorBody {
    #[serde(default)]
    class: String,
    #[serde(default)]
    desc: String,
}

/// A member that is there, even if it is `null`.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

/// Reads one line.
///
/// # Errors
/// The line is not JSON, not an object, or none of the four kinds of message.
pub fn parse(line: &[u8]) -> Result<Message, ParseError> {
    let envelope: Envelope<'_> =
        serde_json::from_slice(line).map_err(|e| ParseError(e.to_string()))?;
    let id = envelope.id.map(id_text);
    if let Some(value) = envelope.value {
        return Ok(Message::Return { id, value: value.to_owned() });
    }
    if let Some(ErrorBody { class, desc }) = envelope.error {
        return Ok(Message::Error { id, class, desc });
    }
    if let Some(name) = envelope.event {
        let (data, timestamp) = (envelope.data, envelope.timestamp);
        return Ok(Message::Event(Event { name, data, timestamp }));
    }
    envelope
        .greeting
        .map(Message::Greeting)
        .ok_or_else(|| ParseError("neither greeting, event, return nor error".to_owned()))
}

/// Ids of ours are strings; a foreign one of another type is kept as its JSON text.
fn id_text(raw: &RawValue) -> String {
    serde_json::from_str(raw.get()).unwrap_or_else(|_| raw.get().to_owned())
}

#[derive(Serialize)]
struct Request<'a> {
    execute: &'a str,
    #[serde(skip_serializing_if = "Value::is_null")]
    arguments: &'a Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
}

/// Writes a command as one line. Arguments `null` are left out.
#[must_use]
pub fn encode(command: &str, arguments: &Value, id: Option<&str>) -> Vec<u8> {
    let request = Request { execute: command, arguments, id };
    let mut line = serde_json::to_vec(&request).expect("strings and JSON values always serialise");
    line.push(b'\n');
    line
}

/// Ids of one session: no other session of any program uses the same ones.
///
/// A monitor answers a command even if its client has gone meanwhile, and sends that reply to the
/// next client; plain numbers would let it pass for the reply of another command.
#[derive(Debug, Clone)]
pub struct IdSpace {
    prefix: String,
}

impl IdSpace {
    /// Ids that begin with `token`.
    #[must_use]
    pub fn new(token: u64) -> Self {
        Self { prefix: format!("qc-{token:016x}-") }
    }

    /// The text of an id.
    #[must_use]
    pub fn text(&self, number: u64) -> String {
        format!("{}{number}", self.prefix)
    }

    /// The number of an id, if it is one of ours.
    #[must_use]
    pub fn number(&self, text: &str) -> Option<u64> {
        text.strip_prefix(self.prefix.as_str())?.parse().ok()
    }

    /// Looks for one of our ids in a line that cannot be read as a whole.
    #[must_use]
    pub fn find(&self, bytes: &[u8]) -> Option<u64> {
        let text = String::from_utf8_lossy(bytes);
        let at = text.rfind(self.prefix.as_str())?;
        let digits: String =
            text[at + self.prefix.len()..].chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    }
}

/// The beginning of a line for an error message, without control characters.
#[must_use]
pub fn excerpt(bytes: &[u8]) -> Cow<'_, str> {
    const SHOWN_BYTES: usize = 60;
    let shown = &bytes[..bytes.len().min(SHOWN_BYTES)];
    let clean = |c: char| !c.is_control() && c != char::REPLACEMENT_CHARACTER;
    match String::from_utf8_lossy(shown) {
        Cow::Borrowed(text) if text.chars().all(clean) => Cow::Borrowed(text),
        text => Cow::Owned(text.chars().map(|c| if clean(c) { c } else { '?' }).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(framer: &mut Framer, bytes: &[u8]) -> Vec<Frame> {
        framer.push(bytes);
        std::iter::from_fn(|| framer.next_frame()).collect()
    }

    #[test]
    fn a_line_split_at_any_byte_is_put_together() {
        let whole = b"{\"a\": 1}\r\n{\"b\": 2}\n";
        for cut in 0..=whole.len() {
            let mut framer = Framer::new(100);
            let mut seen = frames(&mut framer, &whole[..cut]);
            seen.extend(frames(&mut framer, &whole[cut..]));
            let expected =
                vec![Frame::Line(b"{\"a\": 1}".to_vec()), Frame::Line(b"{\"b\": 2}".to_vec())];
            assert_eq!(seen, expected, "cut at {cut}");
        }
    }

    #[test]
    fn an_oversize_line_is_dropped_in_bounded_memory_and_the_next_one_is_read() {
        let mut framer = Framer::new(1000);
        assert!(frames(&mut framer, b"the begin").is_empty());
        for _ in 0..10_000 {
            assert!(frames(&mut framer, &[b'x'; 100]).is_empty());
            assert!(framer.incomplete().len() <= 1000);
            assert!(framer.buffer.capacity() <= 4096, "must not grow with the line");
        }
        let seen = frames(&mut framer, b" the end\n{}\n");
        assert_eq!(seen.len(), 2);
        let Frame::Oversize { length_bytes, head, tail } = &seen[0] else { panic!("{seen:?}") };
        assert_eq!(*length_bytes, 1_000_017);
        assert!(head.starts_with(b"the begin"));
        assert!(tail.ends_with(b"the end"));
        assert_eq!(seen[1], Frame::Line(b"{}".to_vec()));
    }

    #[test]
    fn a_line_of_exactly_the_limit_is_read() {
        let mut framer = Framer::new(4);
        assert_eq!(frames(&mut framer, b"abcd\n"), [Frame::Line(b"abcd".to_vec())]);
        let over = frames(&mut framer, b"abcde\n");
        assert_eq!(
            over,
            [Frame::Oversize { length_bytes: 5, head: b"abcde".to_vec(), tail: Vec::new() }]
        );
    }

    #[test]
    fn unknown_members_and_events_are_kept_or_skipped() {
        let line = br#"{"event": "X_NEW", "data": {"a": [1]}, "future": {"b": null}}"#;
        let Ok(Message::Event(event)) = parse(line) else { panic!("not an event") };
        assert_eq!((event.name.as_str(), &event.data["a"][0]), ("X_NEW", &Value::from(1)));
        let greeting = br#"{"QMP": {"version": {"qemu": {"major": 12}, "x": 1}, "capabilities": [{"new": 1}]}}"#;
        let Ok(Message::Greeting(greeting)) = parse(greeting) else { panic!("not a greeting") };
        assert_eq!(greeting.version.to_string(), "12.0.0");
    }

    #[test]
    fn a_result_of_null_is_a_result() {
        let parsed = parse(br#"{"return": null, "id": 7}"#);
        let Ok(Message::Return { id, value }) = parsed else { panic!("{parsed:?}") };
        assert_eq!((id.as_deref(), value.get()), (Some("7"), "null"));
    }

    #[test]
    fn lines_that_are_no_message_are_errors() {
        for line in
            ["", "null", "[]", "{}", "{\"return\"", "{\"error\": 5}", "NBDMAGIC", "\u{fffd}"]
        {
            assert!(parse(line.as_bytes()).is_err(), "{line}");
        }
    }

    #[test]
    fn only_ids_of_this_session_count() {
        let ids = IdSpace::new(5);
        assert_eq!(ids.number(&ids.text(42)), Some(42));
        assert_eq!(ids.number(&IdSpace::new(6).text(42)), None);
        assert_eq!(ids.number("42"), None);
        let garbled = format!("{{\"return\": [[[, \"id\": \"{}\"}}", ids.text(9));
        assert_eq!(ids.find(garbled.as_bytes()), Some(9));
    }

    #[test]
    fn arguments_and_id_are_optional_on_the_wire() {
        assert_eq!(encode("stop", &Value::Null, None), b"{\"execute\":\"stop\"}\n");
        let line = encode("x", &serde_json::json!({"a": "\n"}), Some("i"));
        assert_eq!(line, b"{\"execute\":\"x\",\"arguments\":{\"a\":\"\\n\"},\"id\":\"i\"}\n");
    }
}
