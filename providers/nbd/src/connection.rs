// SPDX-License-Identifier: MIT OR Apache-2.0
//! One connection in its transmission phase: a task that writes, a task that reads, and the table
//! of requests in flight between them.
//!
//! Callers never touch the socket, so a caller's future can be dropped at any point without
//! leaving half a request in the stream.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::pending::{Answer, Body, MAX_IN_FLIGHT, Pending, Table};
use crate::reader::Reader;
use crate::wire::{Mode, Request, command};
use crate::{Error, Result};

/// Enough for many heads at once; data reads bypass it when it is empty.
const READ_BUFFER: usize = 8 * 1024;
/// Requests taken from the queue at once, so that small ones share a system call.
const WRITE_BATCH: usize = 32;
/// How long the writer may take to send its last words after everyone has gone.
const GRACE: Duration = Duration::from_secs(2);

/// A request as the client describes it.
#[derive(Debug)]
pub(crate) struct Draft {
    pub(crate) command: u16,
    pub(crate) flags: u16,
    pub(crate) offset: u64,
    /// Bytes it concerns.
    pub(crate) len: u64,
    pub(crate) payload: Option<Bytes>,
    pub(crate) body: Body,
    /// The head's length field, where it is not `len`.
    pub(crate) wire_length: Option<u64>,
}

#[derive(Debug)]
struct Outgoing {
    request: Request,
    payload: Option<Bytes>,
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Connection {
    table: Arc<Table>,
    queue: mpsc::Sender<Outgoing>,
    /// Cancelled when nobody wants the connection any more.
    leaving: CancellationToken,
    /// Cancelled when both tasks must stop at once.
    stop: CancellationToken,
    /// Cancelled when the reader has ended.
    ended: CancellationToken,
}

impl Connection {
    /// Starts the tasks on a stream whose negotiation is done.
    pub(crate) fn start(stream: UnixStream, mode: Mode) -> Self {
        let table = Arc::new(Table::new());
        // One place more than slots, for the farewell: so the queue is never full.
        let (queue, requests) = mpsc::channel(MAX_IN_FLIGHT + 1);
        let (leaving, stop, ended) =
            (CancellationToken::new(), CancellationToken::new(), CancellationToken::new());
        let (read_half, write_half) = stream.into_split();
        tokio::spawn(write_task(write_half, requests, mode, leaving.clone(), stop.clone()));
        tokio::spawn(read_task(read_half, Arc::clone(&table), mode, stop.clone(), ended.clone()));
        Self { table, queue, leaving, stop, ended }
    }

    /// Whether it takes requests.
    pub(crate) fn is_open(&self) -> bool {
        !self.table.is_closed()
    }

    /// Slots that are free right now.
    pub(crate) fn free_slots(&self) -> usize {
        self.table.slots.available_permits()
    }

    /// Sends one request and waits for its answer.
    pub(crate) async fn request(&self, draft: Draft) -> Result<Answer> {
        let slot =
            Arc::clone(&self.table.slots).acquire_owned().await.map_err(|_| self.table.reason())?;
        let (sender, answer) = oneshot::channel();
        // From here to the queue there is no await: a request in the table is always sent.
        let cookie = self.table.insert(Pending {
            command: draft.command,
            offset: draft.offset,
            len: draft.len,
            body: draft.body,
            error: None,
            answer: sender,
            _slot: slot,
        })?;
        let request = Request {
            flags: draft.flags,
            command: draft.command,
            cookie,
            offset: draft.offset,
            length: draft.wire_length.unwrap_or(draft.len),
        };
        if self.queue.try_send(Outgoing { request, payload: draft.payload }).is_err() {
            // The writer has ended, so the reader will too; it may already have cleared the table.
            let _ = self.table.take(cookie);
            return Err(self.table.reason());
        }
        answer.await.unwrap_or_else(|_| Err(self.table.reason()))
    }

    /// Takes no more requests, waits for those in flight, says goodbye and waits for the server
    /// to close, all within `limit`.
    pub(crate) async fn disconnect(&self, limit: Duration) -> Result<()> {
        self.table.close_to_new();
        let farewell = async {
            // An error means that the connection has ended already.
            if let Ok(all) = self.table.slots.acquire_many(MAX_IN_FLIGHT as u32).await {
                self.say_goodbye();
                self.ended.cancelled().await;
                drop(all);
            }
        };
        let result = tokio::time::timeout(limit, farewell).await;
        self.stop.cancel();
        result.map_err(|_| Error::Timeout)
    }

    fn say_goodbye(&self) {
        let request = Request { flags: 0, command: command::DISC, cookie: 0, offset: 0, length: 0 };
        // It fails when the writer has ended; then there is nobody to say it to.
        let _ = self.queue.try_send(Outgoing { request, payload: None });
        self.leaving.cancel();
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.table.close_to_new();
        if !self.leaving.is_cancelled() && !self.stop.is_cancelled() {
            self.say_goodbye();
        }
        // The queue ends with this value, the writer with the queue, the reader with the writer.
    }
}

async fn write_task(
    mut socket: OwnedWriteHalf,
    mut requests: mpsc::Receiver<Outgoing>,
    mode: Mode,
    leaving: CancellationToken,
    stop: CancellationToken,
) {
    let too_long = async {
        leaving.cancelled().await;
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        result = write_requests(&mut socket, &mut requests, mode) => match result {
            // The handle was dropped: nobody is left to read answers.
            Ok(()) => stop.cancel(),
            Err(error) => {
                tracing::debug!(%error, "writing to the NBD server failed");
                requests.close();
                // What the server sent before may still hold answers.
                tokio::select! {
                    () = tokio::time::sleep(GRACE) => stop.cancel(),
                    () = stop.cancelled() => {}
                }
            }
        },
        () = too_long => stop.cancel(),
        () = stop.cancelled() => {}
    }
}

async fn write_requests(
    socket: &mut OwnedWriteHalf,
    requests: &mut mpsc::Receiver<Outgoing>,
    mode: Mode,
) -> std::io::Result<()> {
    let mut batch = Vec::with_capacity(WRITE_BATCH);
    let mut heads = BytesMut::with_capacity(WRITE_BATCH * Request::LEN_EXTENDED);
    while requests.recv_many(&mut batch, WRITE_BATCH).await > 0 {
        for Outgoing { request, payload } in batch.drain(..) {
            request.put(&mut heads, mode);
            if let Some(mut payload) = payload {
                socket.write_all_buf(&mut (&mut heads).chain(&mut payload)).await?;
            }
        }
        socket.write_all_buf(&mut heads).await?;
    }
    Ok(())
}

async fn read_task(
    socket: OwnedReadHalf,
    table: Arc<Table>,
    mode: Mode,
    stop: CancellationToken,
    ended: CancellationToken,
) {
    let mut reader =
        Reader::new(BufReader::with_capacity(READ_BUFFER, socket), Arc::clone(&table), mode);
    let reason = tokio::select! {
        reason = reader.run() => reason,
        () = stop.cancelled() => Error::Disconnected,
    };
    if let Error::Protocol(what) = &reason {
        tracing::warn!(what, "the NBD server broke the protocol; closing the connection");
    }
    table.close(reason);
    // Ends the writer too, and with it the socket.
    stop.cancel();
    ended.cancel();
}
