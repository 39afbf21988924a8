// SPDX-License-Identifier: MIT OR Apache-2.0
//! Targets of `qmp-client`: the codec, and the two clients with a peer that says anything.

use qmp_client::{
    Error, Options, Session,
    agent::{Agent, AgentOptions},
    backup::{self, BrokenEvent},
    codec::{self, Frame, Framer, IdSpace, Message},
    events::{ExportDeleted, JobStatusChanged, ShutDown},
};
use serde_json::{Value, value::RawValue};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
};

use crate::ends::run;

/// Bytes that a framer keeps of each end of a line that is too long.
const END_BYTES: usize = 512;
/// Where the bytes of a target hold this, its scripted peer puts the id or number it was asked by.
const PLACEHOLDER: &[u8] = b"@ID@";

/// The first byte is the limit of lines, in units of 64, the second the size of the pieces that
/// the stream arrives in, less one; the rest is the stream.
pub fn codec(data: &[u8]) {
    let [limit, piece, stream @ ..] = data else { return };
    let max_line_bytes = usize::from(*limit) * 64;
    let mut framer = Framer::new(max_line_bytes);
    let mut frames = Vec::new();
    for bytes in stream.chunks(usize::from(*piece) + 1) {
        framer.push(bytes);
        while let Some(frame) = framer.next_frame() {
            frames.push(frame);
        }
        assert!(framer.incomplete().len() <= max_line_bytes.max(END_BYTES), "too much is kept");
    }
    let mut lines: Vec<&[u8]> = stream.split(|&byte| byte == b'\n').collect();
    lines.pop();
    assert_eq!(frames.len(), lines.len());
    for (frame, line) in frames.iter().zip(lines) {
        check_frame(frame, line, max_line_bytes);
        message(line);
    }
    message(stream);
}

fn check_frame(frame: &Frame, line: &[u8], max_line_bytes: usize) {
    match frame {
        Frame::Line(seen) => {
            assert!(line.len() <= max_line_bytes);
            assert_eq!(seen, line.strip_suffix(b"\r").unwrap_or(line));
        }
        Frame::Oversize { length_bytes, head, tail } => {
            assert!(line.len() > max_line_bytes);
            assert_eq!(*length_bytes, line.len() as u64);
            assert!(head.len() <= END_BYTES && tail.len() <= END_BYTES);
            assert!(line.starts_with(head) && line.ends_with(tail));
        }
    }
}

/// Everything that is done with one line.
fn message(line: &[u8]) {
    let ids = IdSpace::new(7);
    let _ = ids.find(line);
    let shown = codec::excerpt(line);
    assert!(shown.chars().count() <= 60 && !shown.contains(char::is_control));
    match codec::parse(line) {
        Ok(Message::Return { id, value }) => {
            let _ = id.map(|id| ids.number(&id));
            encoded(&value);
        }
        Ok(Message::Event(event)) => {
            let _ = BrokenEvent::from_event(&event);
            let _ = event.read::<ExportDeleted>();
            let _ = event.read::<JobStatusChanged>();
            let _ = event.read::<ShutDown>();
        }
        Ok(Message::Greeting(greeting)) => assert!(!greeting.version.to_string().is_empty()),
        Ok(Message::Error { .. }) | Err(_) => {}
    }
}

/// A value that can be read goes out as one line and is read back the same. Not so one with
/// fractions, which `serde_json` reads to the last bit but one; no command of ours has them.
fn encoded(value: &RawValue) {
    let Ok(value) = serde_json::from_str::<Value>(value.get()) else { return };
    if has_fractions(&value) {
        return;
    }
    let line = codec::encode("x", &value, Some("i"));
    assert_eq!(line.iter().position(|&byte| byte == b'\n'), Some(line.len() - 1));
    let back: Value = serde_json::from_slice(&line).expect("what we write is JSON");
    let sent = back.get("arguments").unwrap_or(&Value::Null);
    assert_eq!(sent, &value);
}

/// Whether there are numbers that are no integers of 64 bits.
fn has_fractions(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.is_f64(),
        Value::Array(values) => values.iter().any(has_fractions),
        Value::Object(members) => members.values().any(has_fractions),
        _ => false,
    }
}

/// A monitor. With an even first byte the rest is all that it says; else it greets properly, and
/// the rest answers the first command. `@ID@` stands for the id of what it was asked.
pub fn session(data: &[u8]) {
    let [kind, bytes @ ..] = data else { return };
    let options = Options { max_line_bytes: 1 << 16, event_capacity: 4, ..Options::default() };
    run(async {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        let client = async {
            let session = Session::from_stream(ours, options).await?;
            let mut events = session.events();
            let query = backup::query(&session).await;
            session.closed().await;
            // Whatever came before the end is still there, and then the stream ends.
            while events.next().await.is_some() {}
            assert!(matches!(backup::query(&session).await, Err(Error::Disconnected)));
            query
        };
        let (_outcome, ()) = tokio::join!(client, monitor(theirs, kind % 2 == 1, bytes));
    });
}

async fn monitor(stream: UnixStream, greets: bool, bytes: &[u8]) {
    const GREETING: &[u8] = b"{\"QMP\": {\"version\": {\"qemu\": {\"major\": 10}}}}\r\n";
    const DONE: &[u8] = b"{\"return\": {}, \"id\": \"@ID@\"}\r\n";
    let mut peer = Peer::new(stream);
    if greets {
        peer.say(GREETING, "").await;
        let id = peer.asked("id").await;
        peer.say(DONE, &id).await;
        let id = peer.asked("id").await;
        peer.say(bytes, &id).await;
    } else {
        peer.say(bytes, "").await;
    }
    peer.leave().await;
}

/// A guest agent, whose every word is from inside the guest. The bytes are all that it says;
/// `@ID@` stands for the number of the synchronisation.
pub fn agent(data: &[u8]) {
    run(async {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        let options = AgentOptions { max_line_bytes: 1 << 16, ..AgentOptions::default() };
        let guest = async {
            let mut peer = Peer::new(theirs);
            let number = peer.asked("arguments").await;
            peer.say(data, &number).await;
            peer.leave().await;
        };
        let client = async {
            let agent = Agent::from_stream(ours, options);
            let _ = agent.fsfreeze_status().await;
            let _ = agent.info().await;
            let _ = agent.fsfreeze_thaw().await;
        };
        tokio::join!(client, guest);
    });
}

/// The scripted end of a connection.
struct Peer {
    stream: BufReader<UnixStream>,
}

impl Peer {
    fn new(stream: UnixStream) -> Self {
        Self { stream: BufReader::new(stream) }
    }

    /// Reads a command; its id, or the number in its arguments.
    async fn asked(&mut self, member: &str) -> String {
        let mut line = Vec::new();
        let _ = self.stream.read_until(b'\n', &mut line).await;
        let json = line.iter().position(|&byte| byte == b'{').unwrap_or(line.len());
        let command: Value = serde_json::from_slice(&line[json..]).unwrap_or_default();
        match &command[member] {
            Value::String(id) => id.clone(),
            arguments => arguments["id"].to_string(),
        }
    }

    /// Says this, as far as somebody listens.
    async fn say(&mut self, bytes: &[u8], id: &str) {
        let mut rest = bytes;
        let mut said = Vec::with_capacity(bytes.len());
        while let Some(at) = rest.windows(PLACEHOLDER.len()).position(|word| word == PLACEHOLDER) {
            said.extend_from_slice(&rest[..at]);
            said.extend_from_slice(id.as_bytes());
            rest = &rest[at + PLACEHOLDER.len()..];
        }
        said.extend_from_slice(rest);
        let _ = self.stream.get_mut().write_all(&said).await;
    }

    /// Says no more, and listens until the other end has nothing more to say.
    async fn leave(mut self) {
        let _ = self.stream.get_mut().shutdown().await;
        let mut rest = [0; 4096];
        while self.stream.read(&mut rest).await.is_ok_and(|length| length > 0) {}
    }
}
