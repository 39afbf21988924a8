// SPDX-License-Identifier: MIT OR Apache-2.0
//! The NBD protocol as bytes: constants, and for every message a way to write it and a way to
//! read it.
//!
//! Nothing here does I/O or keeps state, and both directions of every message are present, so
//! that client, server and tests share one description of the protocol. Readers take untrusted
//! bytes: they return [`Malformed`] and never panic.

mod handshake;
mod transmission;

#[cfg(test)]
mod tests;

pub use handshake::{
    BlockSizes, ExportQuery, Greeting, Info, MetaQuery, OptionReply, OptionRequest, ServerEntry,
    export_name_reply, parse_export_name_reply, parse_meta_context,
};
pub use transmission::{
    Chunk, ErrorPayload, Reply, Request, StatusPayload, parse_data_offset, parse_hole,
    put_data_offset, put_hole, reply_len,
};

/// Bytes that do not follow the protocol, with what is wrong about them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub &'static str);

/// How requests and replies are framed, in growing order of ability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// Simple replies only.
    Simple,
    /// Structured replies with 32-bit lengths.
    Structured,
    /// Extended headers with 64-bit lengths.
    Extended,
}

/// First eight bytes a server sends.
pub const MAGIC_INIT: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// Second eight bytes of a newstyle server, and start of every option request.
pub const MAGIC_OPTION: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// Second eight bytes of an oldstyle server, which cannot negotiate anything.
pub const MAGIC_OLDSTYLE: u64 = 0x0000_4202_8186_1253;
/// Start of every option reply.
pub const MAGIC_OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
/// Start of a compact request.
pub const MAGIC_REQUEST: u32 = 0x2560_9513;
/// Start of an extended request.
pub const MAGIC_REQUEST_EXTENDED: u32 = 0x21e4_1c71;
/// Start of a simple reply.
pub const MAGIC_REPLY_SIMPLE: u32 = 0x6744_6698;
/// Start of a structured reply chunk.
pub const MAGIC_REPLY_STRUCTURED: u32 = 0x668e_33ef;
/// Start of an extended reply chunk.
pub const MAGIC_REPLY_EXTENDED: u32 = 0x6e8a_278c;

/// Longest name of an export or a metadata context.
pub const MAX_STRING: usize = 4096;
/// Longest payload of an option reply that is accepted.
pub const MAX_OPTION_REPLY: u32 = 64 * 1024;
/// Largest read or write when a server states no limit.
pub const DEFAULT_MAX_BLOCK: u32 = 32 * 1024 * 1024;

/// Handshake flags; the server's and the client's have the same bits.
pub mod handshake_flag {
    /// Errors to unknown options instead of a closed connection.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// No 124 bytes of padding after `EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Options a client can request.
pub mod option {
    /// Choose an export, without a way to report an error.
    pub const EXPORT_NAME: u32 = 1;
    /// End the negotiation.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Begin TLS.
    pub const STARTTLS: u32 = 5;
    /// Ask about an export.
    pub const INFO: u32 = 6;
    /// Choose an export.
    pub const GO: u32 = 7;
    /// Use structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// List metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Use extended headers.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Kinds of option replies.
pub mod reply {
    /// The option is done.
    pub const ACK: u32 = 1;
    /// One export of a list.
    pub const SERVER: u32 = 2;
    /// One fact about an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Set in all error replies.
    pub const ERROR: u32 = 1 << 31;
    /// The option is not known.
    pub const ERR_UNSUP: u32 = ERROR | 1;
    /// Forbidden by the server's rules.
    pub const ERR_POLICY: u32 = ERROR | 2;
    /// The request makes no sense.
    pub const ERR_INVALID: u32 = ERROR | 3;
    /// Not possible on the server's platform.
    pub const ERR_PLATFORM: u32 = ERROR | 4;
    /// TLS is required.
    pub const ERR_TLS_REQD: u32 = ERROR | 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR | 6;
    /// The server is shutting down.
    pub const ERR_SHUTDOWN: u32 = ERROR | 7;
    /// The client must ask for block sizes.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR | 8;
    /// The request is too large.
    pub const ERR_TOO_BIG: u32 = ERROR | 9;
    /// Extended headers are required.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR | 10;
}

/// Facts about an export.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// Its name.
    pub const NAME: u16 = 1;
    /// A description.
    pub const DESCRIPTION: u16 = 2;
    /// Block sizes.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags of an export.
pub mod flag {
    /// The other flags are valid.
    pub const HAS_FLAGS: u16 = 1;
    /// Cannot be written.
    pub const READ_ONLY: u16 = 1 << 1;
    /// Can flush.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// Can write through.
    pub const SEND_FUA: u16 = 1 << 3;
    /// Is a rotating disk.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// Can trim.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// Can write zeroes.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// Can answer a read in one piece.
    pub const SEND_DF: u16 = 1 << 7;
    /// Several connections see one content.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// Can resize.
    pub const SEND_RESIZE: u16 = 1 << 9;
    /// Can prefetch.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// Can refuse to write zeroes when that would be slow.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// Block status can be asked for some of the contexts.
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Commands of the transmission phase.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// Disconnect; has no reply.
    pub const DISC: u16 = 2;
    /// Flush.
    pub const FLUSH: u16 = 3;
    /// Trim.
    pub const TRIM: u16 = 4;
    /// Prefetch.
    pub const CACHE: u16 = 5;
    /// Write zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Block status.
    pub const BLOCK_STATUS: u16 = 7;

    /// A word for a command, for messages.
    #[must_use]
    pub const fn name(command: u16) -> &'static str {
        match command {
            READ => "read",
            WRITE => "write",
            DISC => "disconnect",
            FLUSH => "flush",
            TRIM => "trim",
            CACHE => "cache",
            WRITE_ZEROES => "write-zeroes",
            BLOCK_STATUS => "block-status",
            _ => "unknown command",
        }
    }
}

/// Flags of a request.
pub mod command_flag {
    /// Write through.
    pub const FUA: u16 = 1;
    /// Zeroes must stay allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// Do not fragment the answer of a read.
    pub const DF: u16 = 1 << 2;
    /// One extent per context only.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Fail rather than write zeroes slowly.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// The length is that of the payload.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Kinds and flags of reply chunks.
pub mod chunk {
    /// Flag: the last chunk of the reply.
    pub const DONE: u16 = 1;
    /// Nothing.
    pub const NONE: u16 = 0;
    /// Data of a read.
    pub const OFFSET_DATA: u16 = 1;
    /// A hole in a read.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents with 32-bit lengths.
    pub const BLOCK_STATUS: u16 = 5;
    /// Extents with 64-bit lengths.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// Set in all errors.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// An error.
    pub const ERROR: u16 = ERROR_BIT | 1;
    /// An error at an offset.
    pub const ERROR_OFFSET: u16 = ERROR_BIT | 2;
}

/// Turns untrusted bytes into text that is safe to print and not too long.
#[must_use]
pub fn printable(bytes: &[u8]) -> String {
    const MAX_CHARS: usize = 512;
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(4 * MAX_CHARS)]);
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_CHARS).collect()
}
