// SPDX-License-Identifier: MIT OR Apache-2.0
//! The two tasks below a session: one reads and hands out messages, one writes commands.
//!
//! They end, and close everything that waits, when the peer goes away, when the stream cannot be
//! understood any more, or when the last [`crate::Session`] is dropped.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, broadcast, mpsc},
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::{
    Event, Stream,
    codec::{self, Frame, Framer, IdSpace, Message},
    pending::{Reply, Table},
};

/// Bytes read at once.
const CHUNK_BYTES: usize = 64 << 10;
/// After this many lines that cannot be read the stream is given up.
const MAX_BAD_LINES: u32 = 100;
/// How long a command that is being written may take to finish once nobody holds the session.
const CLOSE_GRACE: Duration = Duration::from_secs(2);

/// What both tasks and all sessions of a connection share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) peer: String,
    pub(crate) ids: IdSpace,
    pub(crate) pending: Arc<Table>,
    events: Mutex<Option<broadcast::Sender<Event>>>,
    /// The connection is gone.
    pub(crate) closed: CancellationToken,
    /// No session is left.
    pub(crate) unused: CancellationToken,
}

impl Shared {
    pub(crate) fn new(peer: String, ids: IdSpace, event_capacity: usize) -> Self {
        let events = broadcast::Sender::new(event_capacity.max(1));
        Self {
            peer,
            ids,
            pending: Table::new(),
            events: Mutex::new(Some(events)),
            closed: CancellationToken::new(),
            unused: CancellationToken::new(),
        }
    }

    pub(crate) fn subscribe(&self) -> Option<broadcast::Receiver<Event>> {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.as_ref().map(broadcast::Sender::subscribe)
    }

    fn publish(&self, event: Event) {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = events.as_ref() {
            // Fails only when nobody listens.
            let _ = sender.send(event);
        }
    }

    fn close(&self) {
        self.pending.close();
        drop(self.events.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.closed.cancel();
    }
}

/// Closes also when a task is dropped in the middle, for example with its runtime.
struct CloseOnDrop(Arc<Shared>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// One command on its way out.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) id: u64,
    pub(crate) line: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
    /// Bounds the queue; given back once the command is written.
    pub(crate) permit: Option<OwnedSemaphorePermit>,
}

/// Writes commands one after the other, so that a cancelled caller never leaves half a line.
pub(crate) async fn write_commands(
    shared: Arc<Shared>,
    stream: Arc<Stream>,
    mut queue: mpsc::UnboundedReceiver<Outgoing>,
) {
    let shared = CloseOnDrop(shared);
    loop {
        let next = tokio::select! {
            biased;
            () = shared.0.closed.cancelled() => None,
            next = queue.recv() => next,
        };
        let Some(Outgoing { id, line, fds, permit }) = next else { return };
        if !shared.0.pending.is_wanted(id) {
            continue;
        }
        let grace = async {
            shared.0.unused.cancelled().await;
            sleep(CLOSE_GRACE).await;
        };
        tokio::select! {
            written = stream.write_all_with_fds(&line, &fds) => if let Err(e) = written {
                debug!(peer = shared.0.peer, error = %e, "writing a command failed");
                return;
            },
            () = shared.0.closed.cancelled() => return,
            () = grace => return,
        }
        drop(permit);
    }
}

/// Reads messages until the end.
pub(crate) async fn read_messages(shared: Arc<Shared>, stream: Arc<Stream>, framer: Framer) {
    let shared = CloseOnDrop(shared);
    let mut reader = Reader { shared: &shared.0, framer, bad_lines: 0 };
    let mut chunk = vec![0; CHUNK_BYTES];
    while reader.handle_lines() {
        let read = tokio::select! {
            biased;
            () = shared.0.closed.cancelled() => return,
            read = stream.read(&mut chunk) => read,
        };
        match read {
            Ok(0) => {
                debug!(peer = shared.0.peer, "the peer closed the connection");
                return;
            }
            Ok(length) => reader.framer.push(&chunk[..length]),
            Err(e) => {
                debug!(peer = shared.0.peer, error = %e, "reading failed");
                return;
            }
        }
    }
}

struct Reader<'a> {
    shared: &'a Shared,
    framer: Framer,
    bad_lines: u32,
}

impl Reader<'_> {
    /// Handles all whole lines; false if the stream makes no sense any more.
    fn handle_lines(&mut self) -> bool {
        while let Some(frame) = self.framer.next_frame() {
            match frame {
                Frame::Line(line) => self.handle_line(&line),
                Frame::Oversize { length_bytes, head, tail } => {
                    let ends = [head, tail].concat();
                    self.unreadable(&ends, format!("a line of {length_bytes} bytes is too long"));
                }
            }
        }
        if self.bad_lines > MAX_BAD_LINES {
            warn!(peer = self.shared.peer, "too many unreadable lines, closing the connection");
            return false;
        }
        true
    }

    fn handle_line(&mut self, line: &[u8]) {
        if line.trim_ascii().is_empty() {
            return;
        }
        match codec::parse(line) {
            Ok(Message::Event(event)) => self.shared.publish(event),
            Ok(Message::Return { id, value }) => self.complete(id.as_deref(), Reply::Return(value)),
            Ok(Message::Error { id, class, desc }) => {
                if id.is_none() {
                    warn!(peer = self.shared.peer, class, desc, "an error without an id");
                }
                self.complete(id.as_deref(), Reply::Error { class, desc });
            }
            Ok(Message::Greeting(_)) => {
                self.unreadable(line, "a second greeting".to_owned());
            }
            Err(e) => self.unreadable(line, format!("a line is not a QMP message: {e}")),
        }
    }

    fn complete(&self, id: Option<&str>, reply: Reply) {
        let number = id.and_then(|id| self.shared.ids.number(id));
        let known = number.is_some_and(|number| self.shared.pending.complete(number, reply));
        if !known {
            // The command timed out or was cancelled, or an earlier client of the monitor sent it.
            debug!(peer = self.shared.peer, id, "a reply nobody waits for");
        }
    }

    /// One bad line costs the command it belongs to, not the connection.
    fn unreadable(&mut self, line: &[u8], detail: String) {
        self.bad_lines += 1;
        warn!(peer = self.shared.peer, detail, begin = %codec::excerpt(line), "unreadable line");
        if let Some(number) = self.shared.ids.find(line) {
            self.shared.pending.complete(number, Reply::Unreadable(detail));
        }
    }
}
