// SPDX-License-Identifier: MIT OR Apache-2.0
//! A server for exports that this process makes up: what a test simulates, or what a provider
//! restores from.
//!
//! ```text
//! listener ─► connection ─► negotiation ─► reader ──► one task per request ──► writer
//!                                             ╰── memory of replies bounded ──╯
//! ```

mod negotiation;
mod transmission;

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};

use crate::Errno;
use crate::wire::{BlockSizes, DEFAULT_MAX_BLOCK, Malformed, flag};

/// Connections served at once; further ones wait.
const CONNECTIONS_MAX: usize = 64;

/// A future of an export.
pub type ExportFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, Refusal>> + Send + 'a>>;

/// Why an export does not do what a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The client gets this error.
    Error {
        /// Its number.
        errno: Errno,
        /// Words for people.
        message: String,
    },
    /// The connection is closed without an answer, as by a server that dies.
    HangUp,
}

impl Refusal {
    /// An error with words for people.
    pub fn new(errno: Errno, message: impl Into<String>) -> Self {
        Self::Error { errno, message: message.into() }
    }
}

/// A disk that is served. Ranges were checked against its size and its block sizes.
pub trait Export: Send + Sync + 'static {
    /// Its size in bytes; must not change.
    fn size_bytes(&self) -> u64;

    /// Its transmission flags, see [`flag`]. By default it can only be read.
    fn flags(&self) -> u16 {
        flag::HAS_FLAGS | flag::READ_ONLY | flag::CAN_MULTI_CONN | flag::SEND_DF
    }

    /// Sizes of its requests; `max` is at most [`DEFAULT_MAX_BLOCK`].
    fn block_sizes(&self) -> BlockSizes {
        BlockSizes { min: 1, preferred: 64 << 10, max: DEFAULT_MAX_BLOCK }
    }

    /// Names of its metadata contexts.
    fn contexts(&self) -> Vec<String> {
        Vec::new()
    }

    /// Reads exactly `len` bytes.
    fn read(&self, offset: u64, len: usize) -> ExportFuture<'_, Bytes>;

    /// Extents of one of [`Export::contexts`] from `offset` on, as length and flags: at least one, none of
    /// them empty. They may end early or exceed the range.
    fn block_status<'a>(
        &'a self,
        context: &'a str,
        offset: u64,
        len: u64,
    ) -> ExportFuture<'a, Vec<(u64, u64)>> {
        let _ = (context, offset, len);
        refuse("block status")
    }

    /// Writes.
    fn write(&self, offset: u64, data: Bytes) -> ExportFuture<'_, ()> {
        let _ = (offset, data);
        refuse("writes")
    }

    /// Trims.
    fn trim(&self, offset: u64, len: u64) -> ExportFuture<'_, ()> {
        let _ = (offset, len);
        refuse("trims")
    }

    /// Writes zeroes; they need not stay allocated if `may_trim`.
    fn write_zeroes(&self, offset: u64, len: u64, may_trim: bool) -> ExportFuture<'_, ()> {
        let _ = (offset, len, may_trim);
        refuse("zeroes")
    }

    /// Makes everything written durable.
    fn flush(&self) -> ExportFuture<'_, ()> {
        refuse("flushes")
    }
}

fn refuse<'a, T: Send + 'a>(what: &str) -> ExportFuture<'a, T> {
    let refusal = Refusal::new(Errno::ENOTSUP, format!("{what} are not supported"));
    Box::pin(std::future::ready(Err(refusal)))
}

/// The exports of a server, by name.
type Exports = Arc<BTreeMap<String, Arc<dyn Export>>>;

/// A server on a Unix socket. Dropping it ends it with all its connections and removes the socket.
#[derive(Debug)]
pub struct Server {
    socket: PathBuf,
    task: JoinHandle<()>,
}

impl Server {
    /// Listens at `socket`, which must not exist, and serves the exports. Must be called within a runtime.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn listen<N: Into<String>>(
        socket: impl AsRef<Path>,
        exports: impl IntoIterator<Item = (N, Arc<dyn Export>)>,
    ) -> io::Result<Self> {
        let listener = UnixListener::bind(socket.as_ref())?;
        let exports = exports.into_iter().map(|(name, export)| (name.into(), export)).collect();
        let task = tokio::spawn(accept(listener, Arc::new(exports)));
        Ok(Self { socket: socket.as_ref().to_owned(), task })
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
        if let Err(error) = std::fs::remove_file(&self.socket)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("Cannot remove socket {}: {error}", self.socket.display());
        }
    }
}

async fn accept(listener: UnixListener, exports: Exports) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // Ends its tasks when this one ends.
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let exports = Arc::clone(&exports);
                connections.spawn(async move {
                    if let Err(error) = serve(stream, &exports).await {
                        tracing::debug!("A connection ended: {error}");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!("Cannot accept a connection: {error}");
                // Too many open files, say: others may close theirs.
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

/// What a client says against the rules; its connection ends.
fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl From<Malformed> for io::Error {
    fn from(bad: Malformed) -> Self {
        broken(bad.0)
    }
}

/// One connection, to its end.
async fn serve(mut stream: UnixStream, exports: &Exports) -> io::Result<()> {
    let limit = crate::negotiate::DEFAULT_LIMIT;
    let negotiated = tokio::time::timeout(limit, negotiation::negotiate(&mut stream, exports));
    match negotiated.await?? {
        Some(chosen) => transmission::serve(stream, chosen).await,
        None => Ok(()),
    }
}
