// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest agent: a program inside the guest, reached through a Unix socket.
//!
//! The agent has no greeting, no events and, when it is old, no command ids; replies that were
//! late for an earlier client may still be in the channel. Before its first command, and whenever
//! an earlier one did not end properly, a client therefore resynchronises: it sends the byte 0xFF,
//! which makes the agent drop half a line, and `guest-sync-delimited` with a random number, and
//! then drops everything up to the 0xFF in front of that number.
//!
//! Everything the agent says comes from inside the guest and is untrusted: length and time are
//! bounded, numbers are checked.

use std::{
    hash::{BuildHasher as _, RandomState},
    path::Path,
    time::Duration,
};

use qapi_qga as qga;
use serde::de::DeserializeOwned;
use serde_json::{Value, json, value::RawValue};
use tokio::{sync::Mutex, time::timeout};
use tracing::debug;

use crate::{
    Error, Result, Stream,
    codec::{self, Frame, Framer, Message},
    error::millis,
    handshake,
    open_enum::open_enum,
};

const SYNC: &str = "guest-sync-delimited";
/// Ends whatever the agent's parser has, and marks the reply to [`SYNC`].
const DELIMITER: u8 = 0xff;
const CHUNK_BYTES: usize = 16 << 10;

/// Limits of an [`Agent`].
#[derive(Debug, Clone)]
pub struct AgentOptions {
    /// How long to wait for a place in the socket's queue. Default: 5 s.
    pub connect_timeout: Duration,
    /// How long a command may take, with the resynchronisation before it. Default: 10 s.
    pub command_timeout: Duration,
    /// How long freezing may take; it runs the guest's hooks. Default: 60 s.
    pub freeze_timeout: Duration,
    /// How long thawing may take. Default: 60 s.
    pub thaw_timeout: Duration,
    /// Longest line that is read. Default: 64 MiB.
    pub max_line_bytes: usize,
}

impl Default for AgentOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(5),
            command_timeout: Duration::from_secs(10),
            freeze_timeout: Duration::from_secs(60),
            thaw_timeout: Duration::from_secs(60),
            max_line_bytes: 64 << 20,
        }
    }
}

open_enum! {
    /// Whether the guest's file systems are frozen.
    pub enum FreezeStatus {
        /// They work normally.
        Thawed = "thawed",
        /// They are frozen.
        Frozen = "frozen",
    }
}

/// What the agent says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentInfo {
    /// Its version.
    pub version: String,
    /// The commands that are enabled.
    pub commands: Vec<String>,
}

impl AgentInfo {
    /// Whether a command exists and is enabled.
    #[must_use]
    pub fn supports(&self, command: &str) -> bool {
        self.commands.iter().any(|name| name == command)
    }
}

/// A connection to a guest agent. One command runs at a time; further callers wait, which counts
/// towards their time limit. All calls may be cancelled.
#[derive(Debug)]
pub struct Agent {
    path: String,
    options: AgentOptions,
    line: Mutex<Line>,
}

#[derive(Debug)]
struct Line {
    stream: Stream,
    framer: Framer,
    /// The next bytes that come are the reply to the next command.
    in_sync: bool,
}

impl Agent {
    /// Connects to the agent's socket. Whether an agent runs in the guest shows at the first
    /// command only.
    ///
    /// # Errors
    /// [`Error::Connect`] or [`Error::Busy`].
    pub async fn connect(path: impl AsRef<Path>, options: AgentOptions) -> Result<Self> {
        let path = path.as_ref();
        let stream = handshake::connect_unix(path, options.connect_timeout).await?;
        Ok(Self::start(stream.into(), path.display().to_string(), options))
    }

    /// Uses a connected socket.
    #[must_use]
    pub fn from_stream(stream: impl Into<Stream>, options: AgentOptions) -> Self {
        Self::start(stream.into(), "the given socket".to_owned(), options)
    }

    fn start(stream: Stream, path: String, options: AgentOptions) -> Self {
        let framer = Framer::new(options.max_line_bytes);
        Self { path, options, line: Mutex::new(Line { stream, framer, in_sync: false }) }
    }

    /// Asks for a sign of life.
    ///
    /// # Errors
    /// [`Error::AgentSilent`] if nothing answers at all, and those of [`Self::execute_raw`].
    pub async fn ping(&self) -> Result<()> {
        self.execute(qga::guest_ping {}).await.map(|_empty| ())
    }

    /// Version and commands.
    ///
    /// # Errors
    /// As [`Self::ping`].
    pub async fn info(&self) -> Result<AgentInfo> {
        let info = self.execute(qga::guest_info {}).await?;
        let enabled = info.supported_commands.into_iter().filter(|command| command.enabled);
        let commands = enabled.map(|command| command.name).collect();
        Ok(AgentInfo { version: info.version, commands })
    }

    /// Whether the guest's file systems are frozen.
    ///
    /// # Errors
    /// As [`Self::ping`].
    pub async fn fsfreeze_status(&self) -> Result<FreezeStatus> {
        const STATUS: &str = "guest-fsfreeze-status";
        // Not the typed command: its enum is closed.
        let limit = self.options.command_timeout;
        let value = self.call(STATUS, &Value::Null, limit).await?;
        from_result(STATUS, &value)
    }

    /// Freezes the guest's file systems; returns how many.
    ///
    /// After any error the guest may be frozen, or be frozen a moment later: call
    /// [`Self::fsfreeze_thaw`].
    ///
    /// # Errors
    /// As [`Self::ping`].
    pub async fn fsfreeze_freeze(&self) -> Result<u32> {
        let limit = self.options.freeze_timeout;
        let count = self.execute_with_timeout(qga::guest_fsfreeze_freeze {}, limit).await?;
        as_count("guest-fsfreeze-freeze", count)
    }

    /// Thaws the guest's file systems; returns how many. No error if none is frozen.
    ///
    /// # Errors
    /// As [`Self::ping`].
    pub async fn fsfreeze_thaw(&self) -> Result<u32> {
        let limit = self.options.thaw_timeout;
        let count = self.execute_with_timeout(qga::guest_fsfreeze_thaw {}, limit).await?;
        as_count("guest-fsfreeze-thaw", count)
    }

    /// Executes a command of `qapi-qga`.
    ///
    /// # Errors
    /// As [`Self::execute_raw`].
    pub async fn execute<C: qga::QgaCommand>(&self, command: C) -> Result<C::Ok> {
        self.execute_with_timeout(command, self.options.command_timeout).await
    }

    /// Executes a command of `qapi-qga` with its own time limit.
    ///
    /// # Errors
    /// As [`Self::execute_raw`].
    pub async fn execute_with_timeout<C: qga::QgaCommand>(
        &self,
        command: C,
        limit: Duration,
    ) -> Result<C::Ok> {
        let arguments = serde_json::to_value(&command).map_err(|e| Error::protocol(C::NAME, e))?;
        drop(command);
        let value = self.call(C::NAME, &arguments, limit).await?;
        from_result(C::NAME, &value)
    }

    /// Executes a command by name; the limit defaults to the options'.
    ///
    /// # Errors
    /// [`Error::AgentSilent`], [`Error::Timeout`] (the agent works but this command takes longer),
    /// [`Error::Qmp`] if the agent refuses or fails it, [`Error::Disconnected`],
    /// [`Error::Protocol`].
    pub async fn execute_raw(
        &self,
        name: &str,
        arguments: Value,
        limit: Option<Duration>,
    ) -> Result<Value> {
        let limit = limit.unwrap_or(self.options.command_timeout);
        let value = self.call(name, &arguments, limit).await?;
        from_result(name, &value)
    }

    async fn call(&self, name: &str, arguments: &Value, limit: Duration) -> Result<Box<RawValue>> {
        // Tells apart a silent agent from a slow command.
        let mut answered = false;
        let outcome = timeout(limit, self.exchange(name, arguments, &mut answered)).await;
        outcome.unwrap_or_else(|_elapsed| {
            if answered {
                Err(Error::timeout(name, limit))
            } else {
                Err(Error::AgentSilent { path: self.path.clone(), after_ms: millis(limit) })
            }
        })
    }

    async fn exchange(
        &self,
        name: &str,
        arguments: &Value,
        answered: &mut bool,
    ) -> Result<Box<RawValue>> {
        let mut line = match self.line.try_lock() {
            Ok(line) => line,
            Err(_) => {
                // Another command runs, so a timeout here says nothing about the agent.
                *answered = true;
                self.line.lock().await
            }
        };
        if !line.in_sync {
            *answered = false;
            line.resynchronise().await?;
        }
        *answered = true;
        // Stays so if we are cancelled from here on or the reply makes no sense.
        line.in_sync = false;
        line.send(&codec::encode(name, arguments, None)).await?;
        let reply = line.reply(name).await?;
        line.in_sync = true;
        match reply {
            Message::Return { value, .. } => Ok(value),
            Message::Error { class, desc, .. } => {
                Err(Error::Qmp { command: name.to_owned(), class, desc })
            }
            Message::Greeting(_) | Message::Event(_) => {
                line.in_sync = false;
                Err(Error::protocol(name, "this is a QMP monitor, not a guest agent"))
            }
        }
    }
}

impl Line {
    async fn resynchronise(&mut self) -> Result<()> {
        // Positive and exact in every JSON implementation.
        let token = RandomState::new().hash_one(SYNC) >> 32;
        let mut request = vec![DELIMITER];
        request.extend(codec::encode(SYNC, &json!({ "id": token }), None));
        self.send(&request).await?;
        loop {
            let (Frame::Line(line) | Frame::Oversize { tail: line, .. }) =
                self.next_frame().await?;
            if answers_sync(&line, token) {
                return Ok(());
            }
            debug!(begin = %codec::excerpt(&line), "dropped before resynchronisation");
        }
    }

    async fn reply(&mut self, name: &str) -> Result<Message> {
        match self.next_frame().await? {
            Frame::Line(line) => codec::parse(&line).map_err(|e| Error::protocol(name, e)),
            Frame::Oversize { length_bytes, .. } => {
                Err(Error::protocol(name, format!("a reply of {length_bytes} bytes is too long")))
            }
        }
    }

    async fn next_frame(&mut self) -> Result<Frame> {
        loop {
            if let Some(frame) = self.framer.next_frame() {
                return Ok(frame);
            }
            let mut chunk = vec![0; CHUNK_BYTES];
            let length = self.stream.read(&mut chunk).await.map_err(disconnected)?;
            if length == 0 {
                return Err(Error::Disconnected);
            }
            self.framer.push(&chunk[..length]);
        }
    }

    async fn send(&self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).await.map_err(disconnected)
    }
}

fn disconnected(error: std::io::Error) -> Error {
    debug!(%error, "the guest agent's socket failed");
    Error::Disconnected
}

/// Whether a line ends with the delimiter and the reply with our number; there may be the rest of
/// another line in front of it.
fn answers_sync(line: &[u8], token: u64) -> bool {
    let Some(at) = line.iter().rposition(|&byte| byte == DELIMITER) else { return false };
    let Ok(Message::Return { value, .. }) = codec::parse(&line[at + 1..]) else { return false };
    serde_json::from_str::<u64>(value.get()).is_ok_and(|number| number == token)
}

fn from_result<T: DeserializeOwned>(name: &str, value: &RawValue) -> Result<T> {
    serde_json::from_str(value.get())
        .map_err(|e| Error::protocol(name, format!("the result has an unexpected form: {e}")))
}

fn as_count(name: &str, count: i64) -> Result<u32> {
    u32::try_from(count).map_err(|_| Error::protocol(name, format!("{count} is not a count")))
}
