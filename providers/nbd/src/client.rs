// SPDX-License-Identifier: MIT OR Apache-2.0
//! The client: one export, one or several connections, any number of callers.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::future::{join_all, try_join_all};
use tokio::net::UnixStream;

use crate::connection::{Connection, Draft};
use crate::negotiate::{self, Context, DEFAULT_LIMIT, Export};
use crate::pending::{Answer, Body, ReadBody, StatusBody};
use crate::wire::{Mode, command, command_flag};
use crate::{BlockSize, Error, Extent, Extents, Flags, Result, ZeroOptions};

/// Most connections one client opens.
const MAX_CONNECTIONS: usize = 16;
/// Longest trim, write-zeroes or block status with 32-bit lengths. Below 4 GiB, so that it stays a
/// multiple of every block size.
const MAX_COMPACT_LEN: u64 = 1 << 30;
/// Longest read: the caller's length may come from what a server said.
const MAX_READ: usize = 1 << 30;
/// Pause before a connection is tried again while the server's backlog is full.
const BACKLOG_PAUSE: Duration = Duration::from_millis(10);

/// How to connect.
#[derive(Debug, Clone)]
pub struct Options {
    /// Metadata contexts to negotiate; one that the server does not offer is an error.
    pub contexts: Vec<String>,
    /// Connections to open, at most 16. Only one is opened if the server does not promise that
    /// several see the same content.
    pub connections: usize,
    /// Ask for each read's answer in one piece where the server can. QEMU ends the connection when
    /// a read fails that it answers in fragments; in one piece its error is answered as such, and
    /// it asks for no block status first. Holes are then sent as zeroes: for callers that skip them.
    /// A server may refuse large answers in one piece with `EOVERFLOW`; QEMU and nbdkit do not.
    pub whole_reads: bool,
    /// Time for each request, and for the negotiation. Without it requests wait as long as it
    /// takes, and the negotiation 30 seconds.
    pub timeout: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Self { contexts: Vec::new(), connections: 1, whole_reads: false, timeout: None }
    }
}

/// An export of an NBD server.
///
/// Clones share the connections. All methods can be called by many tasks at once, and their
/// futures can be dropped at any point; the server may then still carry the request out. When
/// the last clone goes, the connections are closed in the background, see
/// [`Client::disconnect`].
#[derive(Debug, Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    connections: Vec<Connection>,
    export: Export,
    names: Vec<String>,
    whole_reads: bool,
    timeout: Option<Duration>,
}

/// A part of a range that is one request.
#[derive(Debug, Clone, Copy)]
struct Piece {
    offset: u64,
    len: u64,
}

/// Cuts a range into pieces of at most `max` bytes.
fn pieces(offset: u64, len: u64, max: u64) -> impl Iterator<Item = Piece> {
    (0..len.div_ceil(max)).map(move |n| {
        let begin = n * max;
        Piece { offset: offset + begin, len: max.min(len - begin) }
    })
}

pub(crate) async fn connect_socket(path: &Path) -> Result<UnixStream> {
    loop {
        match UnixStream::connect(path).await {
            Ok(stream) => return Ok(stream),
            // A full backlog; the caller's limit ends this.
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                tokio::time::sleep(BACKLOG_PAUSE).await;
            }
            Err(error) => {
                return Err(Error::Connect { path: path.to_owned(), source: Arc::new(error) });
            }
        }
    }
}

impl Client {
    /// Connects to an export at a Unix socket.
    ///
    /// # Errors
    /// If there is no server, it is of no use, or it lacks the export or a context.
    pub async fn connect_unix(
        path: impl AsRef<Path>,
        export: &str,
        options: Options,
    ) -> Result<Self> {
        let limit = options.timeout.unwrap_or(DEFAULT_LIMIT);
        let connect = Self::connect(path.as_ref(), export, options);
        tokio::time::timeout(limit, connect).await.map_err(|_| Error::Timeout)?
    }

    async fn connect(path: &Path, name: &str, options: Options) -> Result<Self> {
        let open = async || {
            let mut stream = connect_socket(path).await?;
            let export = negotiate::negotiate(&mut stream, name, &options.contexts).await?;
            Ok::<_, Error>((stream, export))
        };
        let (stream, export) = open().await?;
        let mut connections = vec![Connection::start(stream, export.mode)];
        let wanted = if export.flags.can_multi_conn {
            options.connections.clamp(1, MAX_CONNECTIONS)
        } else {
            1
        };
        while connections.len() < wanted {
            let (stream, other) = open().await?;
            if other != export {
                return Err(Error::Protocol(
                    "two connections see different facts about one export".to_owned(),
                ));
            }
            connections.push(Connection::start(stream, export.mode));
        }
        tracing::debug!(
            path = %path.display(),
            export = name,
            connections = connections.len(),
            size_bytes = export.size_bytes,
            mode = ?export.mode,
            "connected to an NBD export"
        );
        let names = export.contexts.iter().map(|context| context.name.clone()).collect();
        let Options { whole_reads, timeout, .. } = options;
        Ok(Self { inner: Arc::new(Inner { connections, export, names, whole_reads, timeout }) })
    }

    /// Size of the export in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.inner.export.size_bytes
    }

    /// What the export can do.
    #[must_use]
    pub fn flags(&self) -> Flags {
        self.inner.export.flags
    }

    /// Sizes that requests must have; larger ones are split by this client.
    #[must_use]
    pub fn block_size(&self) -> BlockSize {
        self.inner.export.block
    }

    /// The negotiated metadata contexts, in the order they were asked for.
    #[must_use]
    pub fn contexts(&self) -> &[String] {
        &self.inner.names
    }

    /// How requests and replies are framed.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.inner.export.mode
    }

    /// Number of connections in use.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.inner.connections.len()
    }

    /// Reads `len` bytes, at most 1 GiB.
    ///
    /// # Errors
    /// If `len` is too large, the range is outside of the export, the server fails the read, or the connection ends.
    pub async fn read(&self, offset: u64, len: usize) -> Result<BytesMut> {
        self.read_into(offset, len, BytesMut::new()).await
    }

    /// Reads `len` bytes and appends them to `buf`, whose spare capacity is used.
    ///
    /// The data goes from the socket straight into the buffer, except when the range is not a
    /// multiple of the minimum block size: then the blocks around it are read and it is copied.
    ///
    /// # Errors
    /// As [`Client::read`]; the buffer is lost.
    pub async fn read_into(&self, offset: u64, len: usize, mut buf: BytesMut) -> Result<BytesMut> {
        if len > MAX_READ {
            return Err(Error::Invalid(format!("NBD read of {len} bytes: at most 1 GiB at once")));
        }
        self.check_range("read", offset, len as u64)?;
        let wide = self.widen(offset, len as u64);
        if len == 0 {
            return Ok(buf);
        }
        if wide.offset != offset || wide.len != len as u64 {
            let data = self.read_aligned(wide, BytesMut::new()).await?;
            let skip = (offset - wide.offset) as usize;
            buf.extend_from_slice(&data[skip..skip + len]);
            return Ok(buf);
        }
        self.read_aligned(wide, buf).await
    }

    async fn read_aligned(&self, range: Piece, mut buf: BytesMut) -> Result<BytesMut> {
        let max = u64::from(self.block_size().max);
        if range.len <= max {
            return self.within(self.read_piece(range, buf)).await;
        }
        // Each piece gets its own part of one allocation, so joining them again costs nothing.
        buf.reserve(range.len as usize);
        let mut rest = buf.split_off(buf.len());
        let reads = pieces(range.offset, range.len, max).map(|piece| {
            let tail = rest.split_off(piece.len as usize);
            self.read_piece(piece, std::mem::replace(&mut rest, tail))
        });
        for part in self.within(try_join_all(reads)).await? {
            buf.unsplit(part);
        }
        Ok(buf)
    }

    async fn read_piece(&self, piece: Piece, buf: BytesMut) -> Result<BytesMut> {
        let whole = self.inner.whole_reads && self.flags().can_read_whole;
        let flags = if whole { command_flag::DF } else { 0 };
        let body = Body::Read(ReadBody::new(buf, piece.len as usize));
        match self.send(draft(command::READ, flags, piece, body)).await? {
            Answer::Data(data) => Ok(data),
            Answer::Done | Answer::Status(_) => Err(mixed_up()),
        }
    }

    /// Writes `data`. With `fua` it is durable when this returns; on a server without that flag
    /// by a flush.
    ///
    /// # Errors
    /// If the range is outside of the export or not a multiple of the minimum block size, the
    /// export is read-only, `fua` is not possible, or the server fails the write; pieces of a
    /// write larger than the maximum block size may then have been written.
    pub async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<()> {
        let range = Piece { offset, len: data.len() as u64 };
        self.check_change("write", range, true)?;
        let flags = self.fua_flag("write", fua)?;
        let max = u64::from(self.block_size().max);
        let writes = pieces(offset, range.len, max).map(|piece| {
            let begin = (piece.offset - offset) as usize;
            let payload = data.slice(begin..begin + piece.len as usize);
            let draft = draft(command::WRITE, flags | self.payload_flag(), piece, Body::Plain);
            self.send(Draft { payload: Some(payload), ..draft })
        });
        // All of them, so that after an error none is left that could still change the export.
        let all = async { join_all(writes).await.into_iter().try_for_each(|done| done.map(drop)) };
        self.within(all).await?;
        self.flush_instead_of_fua(fua).await
    }

    /// Makes all completed writes durable.
    ///
    /// # Errors
    /// If the server does not offer it, or fails it.
    pub async fn flush(&self) -> Result<()> {
        if !self.flags().can_flush {
            return Err(Error::Invalid("The NBD export does not offer flush".to_owned()));
        }
        let all = Piece { offset: 0, len: 0 };
        self.within(self.send(draft(command::FLUSH, 0, all, Body::Plain))).await.map(drop)
    }

    /// Tells the server that the content of a range is no longer needed.
    ///
    /// # Errors
    /// As [`Client::write`], and if the server does not offer it.
    pub async fn trim(&self, offset: u64, len: u64) -> Result<()> {
        let range = Piece { offset, len };
        self.check_change("trim", range, self.flags().can_trim)?;
        self.each_long(range, command::TRIM, 0).await
    }

    /// Writes zeroes without sending them.
    ///
    /// # Errors
    /// As [`Client::write`], and if the server does not offer it; with
    /// [`ZeroOptions::fast_only`], [`crate::Errno::ENOTSUP`] if it would be slow.
    pub async fn write_zeroes(&self, offset: u64, len: u64, options: ZeroOptions) -> Result<()> {
        let range = Piece { offset, len };
        self.check_change("write-zeroes", range, self.flags().can_write_zeroes)?;
        let mut flags = self.fua_flag("write-zeroes", options.fua)?;
        if options.no_hole {
            flags |= command_flag::NO_HOLE;
        }
        if options.fast_only {
            if !self.flags().can_fast_zero {
                return Err(Error::Invalid(
                    "The NBD export cannot tell whether writing zeroes is fast".to_owned(),
                ));
            }
            flags |= command_flag::FAST_ZERO;
        }
        self.each_long(range, command::WRITE_ZEROES, flags).await?;
        self.flush_instead_of_fua(options.fua).await
    }

    /// Asks once for the extents of a range. The answer begins at `offset`, has at least one
    /// extent and no gaps, stays within the range, and may end before it does.
    ///
    /// # Errors
    /// If the context was not negotiated, the range is empty or outside of the export, the server
    /// fails the query, or the connection ends.
    pub async fn block_status(&self, context: &str, offset: u64, len: u64) -> Result<Vec<Extent>> {
        self.check_range("block-status", offset, len)?;
        if len == 0 {
            return Err(Error::Invalid("Block status of an empty range was asked for".to_owned()));
        }
        let export = &self.inner.export;
        let Some(context) = export.contexts.iter().find(|known| known.name == context) else {
            return Err(Error::Invalid(format!(
                "The metadata context '{context}' was not negotiated; name it in Options::contexts"
            )));
        };
        let wide = self.widen(offset, len);
        let wide = Piece { len: wide.len.min(self.max_long()), ..wide };
        let draft = self.status_draft(wide, context);
        let Answer::Status(mut extents) = self.within(self.send(draft)).await? else {
            return Err(mixed_up());
        };
        clip(&mut extents, offset, offset + len);
        if extents.is_empty() {
            // The server answered for the part before `offset` only, which rounding added.
            return Err(Error::Protocol(
                "a block status answer ends within one minimum block".to_owned(),
            ));
        }
        Ok(extents)
    }

    fn status_draft(&self, range: Piece, context: &Context) -> Draft {
        let export = &self.inner.export;
        let select = export.mode == Mode::Extended
            && export.flags.can_select_contexts
            && export.contexts.len() > 1;
        let expected = if select {
            vec![context.id]
        } else {
            export.contexts.iter().map(|context| context.id).collect()
        };
        let body = Body::Status(StatusBody::new(range.offset, range.len, context.id, expected));
        let mut draft = draft(command::BLOCK_STATUS, 0, range, body);
        if select {
            let mut payload = BytesMut::with_capacity(12);
            payload.put_u64(range.len);
            payload.put_u32(context.id);
            draft.flags = command_flag::PAYLOAD_LEN;
            draft.wire_length = Some(payload.len() as u64);
            draft.payload = Some(payload.freeze());
        }
        draft
    }

    /// All extents of a range, by as many queries as it takes.
    #[must_use]
    pub fn extents(&self, context: &str, offset: u64, len: u64) -> Extents {
        Extents::new(self.clone(), context, offset, len)
    }

    /// Ends all connections: no new requests from any clone, those in flight are waited for, then
    /// the server is told and given time to close. Takes the timeout of the options, or ten
    /// seconds.
    ///
    /// # Errors
    /// [`Error::Timeout`] if requests were still in flight or the server did not close; the
    /// connections are closed all the same.
    pub async fn disconnect(self) -> Result<()> {
        let limit = self.inner.timeout.unwrap_or(Duration::from_secs(10));
        let all = self.inner.connections.iter().map(|connection| connection.disconnect(limit));
        let results = join_all(all).await;
        results.into_iter().collect()
    }

    /// Whether every connection has ended, so that no request can succeed any more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        !self.inner.connections.iter().any(Connection::is_open)
    }

    async fn send(&self, draft: Draft) -> Result<Answer> {
        let connections = &self.inner.connections;
        // The first, when all are closed: it tells why.
        let best = connections
            .iter()
            .filter(|connection| connection.is_open())
            .max_by_key(|connection| connection.free_slots())
            .unwrap_or(&connections[0]);
        best.request(draft).await
    }

    async fn within<T>(&self, request: impl Future<Output = Result<T>>) -> Result<T> {
        match self.inner.timeout {
            Some(limit) => {
                tokio::time::timeout(limit, request).await.map_err(|_| Error::Timeout)?
            }
            None => request.await,
        }
    }

    /// Sends a request without data for a range of any length, in order.
    async fn each_long(&self, range: Piece, command: u16, flags: u16) -> Result<()> {
        for piece in pieces(range.offset, range.len, self.max_long()) {
            self.within(self.send(draft(command, flags, piece, Body::Plain))).await?;
        }
        Ok(())
    }

    fn max_long(&self) -> u64 {
        if self.inner.export.mode == Mode::Extended { i64::MAX as u64 } else { MAX_COMPACT_LEN }
    }

    fn payload_flag(&self) -> u16 {
        if self.inner.export.mode == Mode::Extended { command_flag::PAYLOAD_LEN } else { 0 }
    }

    fn fua_flag(&self, what: &str, fua: bool) -> Result<u16> {
        let flags = self.flags();
        match fua {
            false => Ok(0),
            true if flags.can_fua => Ok(command_flag::FUA),
            true if flags.can_flush => Ok(0),
            true => Err(Error::Invalid(format!(
                "The NBD export cannot make a {what} durable: it offers neither FUA nor flush"
            ))),
        }
    }

    async fn flush_instead_of_fua(&self, fua: bool) -> Result<()> {
        if fua && !self.flags().can_fua { self.flush().await } else { Ok(()) }
    }

    fn check_range(&self, what: &str, offset: u64, len: u64) -> Result<()> {
        let size = self.size_bytes();
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(()),
            _ => Err(Error::Invalid(format!(
                "NBD {what} of {len} bytes at offset {offset} is outside of the export of {size} bytes"
            ))),
        }
    }

    fn check_change(&self, what: &str, range: Piece, offered: bool) -> Result<()> {
        if self.flags().read_only {
            return Err(Error::Invalid(format!(
                "NBD {what} is not possible: the export is read-only"
            )));
        }
        if !offered {
            return Err(Error::Invalid(format!("The NBD export does not offer {what}")));
        }
        self.check_range(what, range.offset, range.len)?;
        let min = u64::from(self.block_size().min);
        if !range.offset.is_multiple_of(min) || !range.len.is_multiple_of(min) {
            return Err(Error::Invalid(format!(
                "NBD {what} of {} bytes at offset {} is not a multiple of the export's block size of {min} bytes",
                range.len, range.offset
            )));
        }
        Ok(())
    }

    /// The minimum blocks that a range lies in.
    fn widen(&self, offset: u64, len: u64) -> Piece {
        let min = u64::from(self.block_size().min);
        let begin = offset - offset % min;
        // The size is at most `i64::MAX`, so this cannot overflow.
        let end = (offset + len).next_multiple_of(min).min(self.size_bytes());
        Piece { offset: begin, len: end - begin }
    }
}

fn draft(command: u16, flags: u16, piece: Piece, body: Body) -> Draft {
    Draft {
        command,
        flags,
        offset: piece.offset,
        len: piece.len,
        payload: None,
        body,
        wire_length: None,
    }
}

/// Cuts a list of extents to a range.
fn clip(extents: &mut Vec<Extent>, begin: u64, end: u64) {
    extents.retain_mut(|extent| {
        let (from, to) = (extent.offset.max(begin), extent.end().min(end));
        extent.offset = from;
        extent.len = to.saturating_sub(from);
        extent.len > 0
    });
}

/// The reader answers in the kind of the request's body.
fn mixed_up() -> Error {
    Error::Protocol("an answer is of another kind than its request".to_owned())
}
