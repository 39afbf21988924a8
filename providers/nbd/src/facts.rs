// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a server tells about an export.

use crate::wire::flag;

/// An export in a server's list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its name, to connect with.
    pub name: String,
    /// The server's description of it, or empty.
    pub description: String,
}

/// What an export can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Flags {
    /// It cannot be written.
    pub read_only: bool,
    /// It can be flushed.
    pub can_flush: bool,
    /// Writes can be made durable one by one.
    pub can_fua: bool,
    /// Ranges can be trimmed.
    pub can_trim: bool,
    /// Zeroes can be written without sending them.
    pub can_write_zeroes: bool,
    /// Writing zeroes can be refused when it would be slow.
    pub can_fast_zero: bool,
    /// Several connections see the same content.
    pub can_multi_conn: bool,
    /// Block status can be asked for one of several contexts.
    pub can_select_contexts: bool,
    /// Reads can be answered in one piece.
    pub can_read_whole: bool,
    /// It is a rotating disk.
    pub rotational: bool,
}

impl Flags {
    /// From the number on the wire.
    #[must_use]
    pub const fn from_wire(wire: u16) -> Self {
        // Without HAS_FLAGS the others mean nothing.
        let wire = if wire & flag::HAS_FLAGS == 0 { 0 } else { wire };
        Self {
            read_only: wire & flag::READ_ONLY != 0,
            can_flush: wire & flag::SEND_FLUSH != 0,
            can_fua: wire & flag::SEND_FUA != 0,
            can_trim: wire & flag::SEND_TRIM != 0,
            can_write_zeroes: wire & flag::SEND_WRITE_ZEROES != 0,
            can_fast_zero: wire & flag::SEND_FAST_ZERO != 0,
            can_multi_conn: wire & flag::CAN_MULTI_CONN != 0,
            can_select_contexts: wire & flag::BLOCK_STATUS_PAYLOAD != 0,
            can_read_whole: wire & flag::SEND_DF != 0,
            rotational: wire & flag::ROTATIONAL != 0,
        }
    }
}

/// Sizes of an export's requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSize {
    /// Unit of offsets and lengths, a power of two.
    pub min: u32,
    /// Size that works best.
    pub preferred: u32,
    /// Largest read or write in one request, a multiple of `min`.
    pub max: u32,
}

/// How zeroes are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ZeroOptions {
    /// The range must stay allocated.
    pub no_hole: bool,
    /// It must be durable before the call returns.
    pub fua: bool,
    /// Fail rather than write zeroes as slowly as data.
    pub fast_only: bool,
}
