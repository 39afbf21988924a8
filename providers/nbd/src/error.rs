// SPDX-License-Identifier: MIT OR Apache-2.0
//! What can go wrong between this client and a server.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::wire::{Malformed, command};

/// Result of an NBD operation.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of the client or of its server.
///
/// It can be cloned, because the end of one connection is told to everyone who waits on it.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No connection to the socket.
    #[error("Cannot connect to the NBD socket '{}': {source}", path.display())]
    Connect {
        /// Path of the socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: Arc<io::Error>,
    },
    /// The peer is no NBD server, or one too old to be used.
    #[error("The peer is not a usable NBD server: {0}")]
    NotNbd(String),
    /// The server has no export of that name.
    #[error("The NBD server has no export named '{export}'")]
    NoSuchExport {
        /// The name.
        export: String,
    },
    /// The server does not offer a metadata context that was asked for.
    #[error("The NBD server does not offer the metadata context '{context}' for this export")]
    ContextMissing {
        /// The context.
        context: String,
    },
    /// The server refused an option of the negotiation.
    #[error("The NBD server refused {what}: {message}")]
    Refused {
        /// What was asked for.
        what: &'static str,
        /// The server's words, or ours for its error number.
        message: String,
    },
    /// The caller asked for something this export cannot do; nothing was sent.
    #[error("{0}")]
    Invalid(String),
    /// The server carried a request out with an error. The connection lives on.
    #[error("NBD {} of {len} bytes at offset {offset} failed: {errno}{}", command::name(*command), in_brackets(message))]
    Server {
        /// The request's command, see [`crate::wire::command`].
        command: u16,
        /// The error number.
        errno: Errno,
        /// The server's words, printable; may be empty.
        message: String,
        /// Where: the request's offset, or a closer one when the server gave it.
        offset: u64,
        /// Length of the request in bytes.
        len: u64,
    },
    /// The server broke the protocol; the connection is closed.
    #[error("The NBD server broke the protocol: {0}")]
    Protocol(String),
    /// No answer in time. The request may still be carried out by the server.
    #[error("The NBD server did not answer in time")]
    Timeout,
    /// The connection ended.
    #[error("The NBD server closed the connection")]
    Disconnected,
}

impl Error {
    /// The error number of the server, if it is the server that failed the request.
    #[must_use]
    pub const fn errno(&self) -> Option<Errno> {
        match self {
            Self::Server { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// Whether the connection is of no further use.
    #[must_use]
    pub const fn is_fatal(&self) -> bool {
        matches!(self, Self::Protocol(_) | Self::Disconnected)
    }
}

impl From<Malformed> for Error {
    fn from(bad: Malformed) -> Self {
        Self::Protocol(bad.0.to_owned())
    }
}

fn in_brackets(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" ({message})") }
}

/// Error numbers of the protocol; they are the same on all platforms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Errno {
    /// Not permitted.
    EPERM,
    /// Input or output failed.
    EIO,
    /// Out of memory.
    ENOMEM,
    /// Invalid argument.
    EINVAL,
    /// No space left.
    ENOSPC,
    /// The answer does not fit.
    EOVERFLOW,
    /// Not supported.
    ENOTSUP,
    /// The server is shutting down.
    ESHUTDOWN,
    /// A number the protocol does not define.
    Other(u32),
}

impl Errno {
    /// From the number on the wire.
    #[must_use]
    pub const fn from_wire(number: u32) -> Self {
        match number {
            1 => Self::EPERM,
            5 => Self::EIO,
            12 => Self::ENOMEM,
            22 => Self::EINVAL,
            28 => Self::ENOSPC,
            75 => Self::EOVERFLOW,
            95 => Self::ENOTSUP,
            108 => Self::ESHUTDOWN,
            other => Self::Other(other),
        }
    }

    /// The number on the wire.
    #[must_use]
    pub const fn to_wire(self) -> u32 {
        match self {
            Self::EPERM => 1,
            Self::EIO => 5,
            Self::ENOMEM => 12,
            Self::EINVAL => 22,
            Self::ENOSPC => 28,
            Self::EOVERFLOW => 75,
            Self::ENOTSUP => 95,
            Self::ESHUTDOWN => 108,
            Self::Other(other) => other,
        }
    }
}

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::EPERM => "EPERM, not permitted",
            Self::EIO => "EIO, input/output error",
            Self::ENOMEM => "ENOMEM, out of memory",
            Self::EINVAL => "EINVAL, invalid argument",
            Self::ENOSPC => "ENOSPC, no space left",
            Self::EOVERFLOW => "EOVERFLOW, too large",
            Self::ENOTSUP => "ENOTSUP, not supported",
            Self::ESHUTDOWN => "ESHUTDOWN, the server is shutting down",
            Self::Other(number) => return write!(f, "error number {number}"),
        })
    }
}
