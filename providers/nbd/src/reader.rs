// SPDX-License-Identifier: MIT OR Apache-2.0
//! The one task of a connection that reads: it takes replies off the stream, checks them against
//! the requests in flight and hands the answers out.
//!
//! Every reply is untrusted. Whatever does not fit the request it names ends the connection,
//! because after it nobody knows where the next reply begins.

use std::io;
use std::sync::Arc;

use bytes::{BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::pending::{Body, Pending, Place, ReadBody, Table};
use crate::wire::{
    Chunk, ErrorPayload, Malformed, Mode, Reply, StatusPayload, chunk, command, parse_data_offset,
    parse_hole, reply_len,
};
use crate::{Errno, Error, Result};

/// Longest error chunk: head, message of 64 KiB - 1 and offset.
const MAX_ERROR_PAYLOAD: u64 = 6 + 0xffff + 8;
/// Longest block status chunk: a million extents with 64-bit lengths.
const MAX_STATUS_PAYLOAD: u64 = 8 + 16 * 1024 * 1024;

/// Reads the replies of one connection.
pub(crate) struct Reader<R> {
    io: R,
    table: Arc<Table>,
    mode: Mode,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    pub(crate) fn new(io: R, table: Arc<Table>, mode: Mode) -> Self {
        Self { io, table, mode }
    }

    /// Reads replies until the connection ends, and says why it did.
    pub(crate) async fn run(&mut self) -> Error {
        loop {
            if let Err(error) = self.one_reply().await {
                return error;
            }
        }
    }

    async fn one_reply(&mut self) -> Result<()> {
        match self.head().await? {
            Reply::Simple { error, cookie } => {
                let mut pending = self.table.take(cookie)?;
                let result = self.simple(error, &mut pending).await;
                self.settle(result, cookie, true, pending)
            }
            Reply::Chunk(chunk) => {
                // The offset of an extended head only repeats the request's; the cookie decides.
                let mut pending = self.table.take(chunk.cookie)?;
                let result = self.payload(&chunk, &mut pending).await;
                self.settle(result, chunk.cookie, chunk.flags & chunk::DONE != 0, pending)
            }
        }
    }

    fn settle(&self, result: Result<()>, cookie: u64, done: bool, pending: Pending) -> Result<()> {
        match result {
            Ok(()) if done => pending.complete(),
            Ok(()) => {
                self.table.put_back(cookie, pending);
                Ok(())
            }
            Err(reason) => {
                pending.give_up(&reason);
                Err(reason)
            }
        }
    }

    async fn head(&mut self) -> Result<Reply> {
        let mut head = [0; Reply::LEN_EXTENDED];
        self.exact(&mut head[..Reply::LEN_SIMPLE]).await?;
        let magic = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
        let len = reply_len(magic, self.mode)?;
        if len > Reply::LEN_SIMPLE {
            self.exact(&mut head[Reply::LEN_SIMPLE..len]).await?;
        }
        Ok(Reply::parse(&head[..len], self.mode)?)
    }

    async fn simple(&mut self, error: u32, pending: &mut Pending) -> Result<()> {
        if error != 0 {
            // Also where the protocol wants a structured reply: nothing follows it in either
            // reading, so there is no doubt about what the server means.
            let failed = server_error(pending, error, String::new(), None);
            pending.fail(failed);
            return Ok(());
        }
        match &mut pending.body {
            Body::Plain => Ok(()),
            Body::Read(body) if self.mode == Mode::Simple => self.data(body, 0, pending.len).await,
            Body::Read(_) | Body::Status(_) => {
                Err(Malformed("a simple reply answers a request that needs a structured one")
                    .into())
            }
        }
    }

    /// Reads the payload of one chunk into the request it belongs to.
    async fn payload(&mut self, head: &Chunk, pending: &mut Pending) -> Result<()> {
        match head.kind {
            chunk::NONE => {
                if head.length != 0 {
                    return Err(Malformed("an empty chunk has a payload").into());
                }
                if head.flags & chunk::DONE == 0 {
                    return Err(Malformed("an empty chunk is not the last one").into());
                }
                Ok(())
            }
            chunk::OFFSET_DATA => self.data_chunk(head, pending).await,
            chunk::OFFSET_HOLE => self.hole_chunk(head, pending).await,
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => self.status_chunk(head, pending).await,
            kind if kind & chunk::ERROR_BIT != 0 => {
                let payload = self.bounded(head.length, MAX_ERROR_PAYLOAD).await?;
                let told = ErrorPayload::parse(&payload, kind)?;
                let error = server_error(pending, told.error, told.message, told.offset);
                pending.fail(error);
                Ok(())
            }
            _ => Err(Malformed("a reply chunk is of an unknown kind").into()),
        }
    }

    async fn data_chunk(&mut self, head: &Chunk, pending: &mut Pending) -> Result<()> {
        let Body::Read(body) = &mut pending.body else {
            return Err(Malformed("a data chunk answers a request that is not a read").into());
        };
        let Some(len) = head.length.checked_sub(8) else {
            return Err(Malformed("a data chunk is too short").into());
        };
        let mut offset = [0; 8];
        self.exact(&mut offset).await?;
        let offset = parse_data_offset(&offset)?;
        let at = relative(offset, pending.offset)?;
        self.data(body, at, len).await
    }

    async fn hole_chunk(&mut self, head: &Chunk, pending: &mut Pending) -> Result<()> {
        let Body::Read(body) = &mut pending.body else {
            return Err(Malformed("a hole chunk answers a request that is not a read").into());
        };
        let payload = self.bounded(head.length, 12).await?;
        let (offset, len) = parse_hole(&payload)?;
        Ok(body.hole(relative(offset, pending.offset)?, u64::from(len))?)
    }

    async fn status_chunk(&mut self, head: &Chunk, pending: &mut Pending) -> Result<()> {
        let Body::Status(body) = &mut pending.body else {
            return Err(Malformed("a block status chunk answers a request of another kind").into());
        };
        let payload = self.bounded(head.length, MAX_STATUS_PAYLOAD).await?;
        let wide = head.kind == chunk::BLOCK_STATUS_EXT;
        Ok(body.take(&StatusPayload::parse(&payload, wide)?)?)
    }

    /// Reads `len` bytes of data straight into the request's buffer.
    async fn data(&mut self, body: &mut ReadBody, at: u64, len: u64) -> Result<()> {
        match body.claim(at, len)? {
            // `claim` has checked that `len` fits the request, hence memory.
            Place::Append => self.append(&mut body.buf, len as usize).await,
            Place::At(index) => self.exact(&mut body.buf[index..index + len as usize]).await,
        }
    }

    /// Reads a small payload, unless it is longer than `max`.
    async fn bounded(&mut self, len: u64, max: u64) -> Result<BytesMut> {
        if len > max {
            return Err(Malformed("a reply chunk is longer than any of its kind").into());
        }
        // Not more at once than a server has to send to get it.
        let mut buf = BytesMut::with_capacity((len as usize).min(64 * 1024));
        while buf.len() < len as usize {
            let step = (len as usize - buf.len()).min(64 * 1024);
            buf.reserve(step);
            self.append(&mut buf, step).await?;
        }
        Ok(buf)
    }

    /// Appends exactly `len` bytes, without writing zeroes first.
    async fn append(&mut self, buf: &mut BytesMut, len: usize) -> Result<()> {
        let mut limited = buf.limit(len);
        while limited.has_remaining_mut() {
            match self.io.read_buf(&mut limited).await {
                Ok(0) => return Err(Error::Disconnected),
                Ok(_) => {}
                Err(error) => return Err(lost(&error)),
            }
        }
        Ok(())
    }

    async fn exact(&mut self, buf: &mut [u8]) -> Result<()> {
        self.io.read_exact(buf).await.map(drop).map_err(|error| lost(&error))
    }
}

fn relative(offset: u64, base: u64) -> std::result::Result<u64, Malformed> {
    offset.checked_sub(base).ok_or(Malformed("a chunk of a read lies outside of the request"))
}

fn lost(error: &io::Error) -> Error {
    tracing::debug!(%error, "reading from the NBD server failed");
    Error::Disconnected
}

fn server_error(pending: &Pending, number: u32, message: String, offset: Option<u64>) -> Error {
    let end = pending.offset.saturating_add(pending.len);
    let offset = offset.filter(|at| (pending.offset..end).contains(at));
    tracing::debug!(
        command = command::name(pending.command),
        offset = pending.offset,
        len = pending.len,
        number,
        message,
        "the NBD server failed a request"
    );
    Error::Server {
        command: pending.command,
        errno: Errno::from_wire(number),
        message,
        offset: offset.unwrap_or(pending.offset),
        len: pending.len,
    }
}

#[cfg(test)]
mod tests;
