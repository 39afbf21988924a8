// SPDX-License-Identifier: MIT OR Apache-2.0
//! From a connected socket to a monitor that accepts commands: greeting, then capabilities.

use std::{io, path::Path, time::Duration};

use serde_json::Value;
use tokio::{
    net::UnixStream,
    time::{Instant, sleep, timeout, timeout_at},
};

use crate::{
    Error, Greeting, Options, Result, Stream,
    codec::{self, Frame, Framer, IdSpace, Message},
    error::millis,
};

const NEGOTIATE: &str = "qmp_capabilities";
/// A greeting is a few hundred bytes; what is longer is no greeting.
const MAX_GREETING_BYTES: usize = 64 << 10;
/// How often a connection is made when the monitor closes it without a word.
const CLOSED_ATTEMPTS: u32 = 10;
/// While a monitor's queue of connections is full, and between those attempts.
const CONNECT_RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// Connects to a Unix socket. A full connection queue means that other clients wait already.
pub(crate) async fn connect_unix(path: &Path, limit: Duration) -> Result<UnixStream> {
    let deadline = Instant::now() + limit;
    loop {
        match UnixStream::connect(path).await {
            Ok(stream) => return Ok(stream),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if Instant::now() >= deadline {
                    return Err(Error::Busy {
                        peer: path.display().to_string(),
                        after_ms: millis(limit),
                    });
                }
                sleep(CONNECT_RETRY_INTERVAL).await;
            }
            Err(source) => return Err(Error::Connect { path: path.display().to_string(), source }),
        }
    }
}

/// A monitor in command mode, and a framer with what it has sent since.
pub(crate) type Ready = (Greeting, Framer);

/// Connects and shakes hands. QEMU can close a new connection at once while it is still busy with
/// the end of an earlier one, so that is tried again a few times.
pub(crate) async fn connect(
    path: &Path,
    ids: &IdSpace,
    options: &Options,
) -> Result<(Stream, Ready)> {
    let peer = path.display().to_string();
    let deadline = Instant::now() + options.greeting_timeout;
    for _ in 1..CLOSED_ATTEMPTS {
        let stream = connect_unix(path, options.greeting_timeout).await?.into();
        if let Some(ready) = shake_hands(&stream, &peer, ids, options, deadline).await? {
            return Ok((stream, ready));
        }
        sleep(CONNECT_RETRY_INTERVAL).await;
    }
    let stream = connect_unix(path, options.greeting_timeout).await?.into();
    let ready = shake_hands_once(&stream, &peer, ids, options).await?;
    Ok((stream, ready))
}

/// Shakes hands on a connection that cannot be made anew.
pub(crate) async fn shake_hands_once(
    stream: &Stream,
    peer: &str,
    ids: &IdSpace,
    options: &Options,
) -> Result<Ready> {
    let deadline = Instant::now() + options.greeting_timeout;
    shake_hands(stream, peer, ids, options, deadline).await?.ok_or_else(|| Error::NotQemu {
        peer: peer.to_owned(),
        detail: "it closed the connection without a greeting".to_owned(),
    })
}

/// Brings a monitor into command mode; `None` if it closed the connection without a word.
async fn shake_hands(
    stream: &Stream,
    peer: &str,
    ids: &IdSpace,
    options: &Options,
    deadline: Instant,
) -> Result<Option<Ready>> {
    let mut reader = LineReader { stream, framer: Framer::new(MAX_GREETING_BYTES) };
    let greeting =
        timeout_at(deadline, read_greeting(&mut reader, peer)).await.map_err(|_elapsed| {
            Error::Busy { peer: peer.to_owned(), after_ms: millis(options.greeting_timeout) }
        })??;
    let Some(greeting) = greeting else { return Ok(None) };

    let limit = options.command_timeout;
    timeout(limit, negotiate(&mut reader, peer, ids))
        .await
        .map_err(|_elapsed| Error::timeout(NEGOTIATE, limit))??;

    let mut framer = Framer::new(options.max_line_bytes);
    framer.push(reader.framer.incomplete());
    Ok(Some((greeting, framer)))
}

struct LineReader<'a> {
    stream: &'a Stream,
    framer: Framer,
}

impl LineReader<'_> {
    /// Reads once; false at the end of the stream.
    async fn fill(&mut self) -> io::Result<bool> {
        let mut chunk = vec![0; 4096];
        let length = self.stream.read(&mut chunk).await?;
        self.framer.push(&chunk[..length]);
        Ok(length > 0)
    }
}

async fn read_greeting(reader: &mut LineReader<'_>, peer: &str) -> Result<Option<Greeting>> {
    let not_qemu = |detail: String| Error::NotQemu { peer: peer.to_owned(), detail };
    loop {
        match reader.framer.next_frame() {
            Some(Frame::Line(line)) if line.trim_ascii().is_empty() => {}
            // A monitor sends to the next client what an earlier one did not wait for, even before it
            // greets.
            Some(Frame::Line(line)) if is_for_another_client(&line) => {}
            Some(Frame::Line(line)) => {
                return parse_greeting(&line).map(Some).map_err(not_qemu);
            }
            Some(Frame::Oversize { .. }) => {
                return Err(not_qemu("its first line is too long for a greeting".to_owned()));
            }
            None => {
                if reader.framer.is_oversize() {
                    return Err(not_qemu("its first line is too long for a greeting".to_owned()));
                }
                // Other protocols need not send line ends: decide by the first byte.
                let begun = reader.framer.incomplete().trim_ascii_start();
                if begun.first().is_some_and(|&byte| byte != b'{') {
                    return Err(not_qemu(format!("it sent \"{}\"", codec::excerpt(begun))));
                }
                let silent = begun.is_empty();
                match reader.fill().await {
                    Ok(true) => {}
                    Ok(false) | Err(_) if silent => return Ok(None),
                    Ok(false) => {
                        let detail = "it closed the connection in the middle of its first line";
                        return Err(not_qemu(detail.to_owned()));
                    }
                    Err(e) => return Err(not_qemu(format!("{e}"))),
                }
            }
        }
    }
}

fn is_for_another_client(line: &[u8]) -> bool {
    matches!(
        codec::parse(line),
        Ok(Message::Return { .. } | Message::Error { .. } | Message::Event(_))
    )
}

fn parse_greeting(line: &[u8]) -> std::result::Result<Greeting, String> {
    match codec::parse(line) {
        Ok(Message::Greeting(greeting)) => Ok(greeting),
        _ if line.trim_ascii() == b"{" => {
            Err("it prints one message over several lines (monitor option pretty=on)".to_owned())
        }
        _ => Err(format!("it sent \"{}\"", codec::excerpt(line))),
    }
}

async fn negotiate(reader: &mut LineReader<'_>, peer: &str, ids: &IdSpace) -> Result<()> {
    const ID: u64 = 0;
    let closed = |_e: io::Error| Error::Disconnected;
    let line = codec::encode(NEGOTIATE, &Value::Null, Some(&ids.text(ID)));
    reader.stream.write_all(&line).await.map_err(closed)?;
    loop {
        let Some(frame) = reader.framer.next_frame() else {
            if !reader.fill().await.map_err(closed)? {
                return Err(Error::Disconnected);
            }
            continue;
        };
        let Frame::Line(line) = frame else { continue };
        // Anything else here is a reply to an earlier client or an event.
        match codec::parse(&line) {
            Ok(Message::Return { id: Some(id), .. }) if ids.number(&id) == Some(ID) => {
                return Ok(());
            }
            Ok(Message::Error { id: Some(id), class, desc }) if ids.number(&id) == Some(ID) => {
                return Err(Error::Qmp { command: NEGOTIATE.to_owned(), class, desc });
            }
            Ok(_) => {}
            Err(e) => return Err(Error::protocol(peer, e)),
        }
    }
}
