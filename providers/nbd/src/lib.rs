// SPDX-License-Identifier: MIT OR Apache-2.0
//! An asynchronous NBD client and server over Unix sockets.
//!
//! ```no_run
//! # async fn example() -> provider_nbd::Result<()> {
//! use provider_nbd::{Client, Options, context};
//!
//! let bitmap = context::dirty_bitmap("b0");
//! let options = Options { contexts: vec![bitmap.clone()], ..Options::default() };
//! let client = Client::connect_unix("/run/vm/nbd.sock", "drive0", options).await?;
//! let mut extents = client.extents(&bitmap, 0, client.size_bytes());
//! while let Some(extent) = extents.next().await? {
//!     if extent.flags & context::DIRTY != 0 {
//!         let data = client.read(extent.offset, 4096).await?;
//!         println!("{} bytes at {}", data.len(), extent.offset);
//!     }
//! }
//! client.disconnect().await
//! # }
//! ```
//!
//! It negotiates the fixed newstyle protocol with extended headers, else structured replies, else
//! simple ones, and as many metadata contexts as asked for. Many requests are in flight at once
//! over one or several connections; larger ones are split at the server's maximum. Futures can be
//! dropped at any point.
//!
//! The server is not trusted: whatever it sends is checked and bounded, and a reply that does not
//! fit a request ends the connection with [`Error::Protocol`].
//!
//! [`server`] serves disks that the process makes up, and [`wire`] has the messages of the protocol
//! in both directions, which both share.

#![forbid(unsafe_code)]

mod client;
mod connection;
mod error;
mod extents;
mod facts;
mod negotiate;
mod pending;
mod reader;
pub mod server;
pub mod wire;

pub use client::{Client, Options};
pub use error::{Errno, Error, Result};
pub use extents::{Extent, Extents, context};
pub use facts::{BlockSize, ExportInfo, Flags, ZeroOptions};

use std::path::Path;

/// Lists the exports of the server at a Unix socket, within 30 seconds.
///
/// # Errors
/// If there is no server, it is of no use, or its rules forbid listing.
pub async fn list_unix(path: impl AsRef<Path>) -> Result<Vec<ExportInfo>> {
    let list = async {
        let mut stream = client::connect_socket(path.as_ref()).await?;
        negotiate::list(&mut stream).await
    };
    tokio::time::timeout(negotiate::DEFAULT_LIMIT, list).await.map_err(|_| Error::Timeout)?
}
