// SPDX-License-Identifier: MIT OR Apache-2.0
//! Messages of the transmission phase: requests, replies and the payloads of reply chunks.

use bytes::{Buf, BufMut, BytesMut};

use super::{
    MAGIC_REPLY_EXTENDED, MAGIC_REPLY_SIMPLE, MAGIC_REPLY_STRUCTURED, MAGIC_REQUEST,
    MAGIC_REQUEST_EXTENDED, Malformed, Mode, printable,
};

const SHORT: Malformed = Malformed("the message is too short");

/// Head of a request; the data of a write follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// See [`super::command_flag`].
    pub flags: u16,
    /// See [`super::command`].
    pub command: u16,
    /// The client's name for the request.
    pub cookie: u64,
    /// Where it begins.
    pub offset: u64,
    /// How long it is; 32 bits unless headers are extended.
    pub length: u64,
}

impl Request {
    /// Length of a compact request.
    pub const LEN: usize = 28;
    /// Length of an extended request.
    pub const LEN_EXTENDED: usize = 32;

    /// Reads it, in the form that `mode` prescribes.
    ///
    /// # Errors
    /// If it is too short or the magic is wrong.
    pub fn parse(mut buf: &[u8], mode: Mode) -> Result<Self, Malformed> {
        let extended = mode == Mode::Extended;
        let magic = if extended { MAGIC_REQUEST_EXTENDED } else { MAGIC_REQUEST };
        if buf.try_get_u32().map_err(|_| SHORT)? != magic {
            return Err(Malformed("a request has the wrong magic"));
        }
        let flags = buf.try_get_u16().map_err(|_| SHORT)?;
        let command = buf.try_get_u16().map_err(|_| SHORT)?;
        let cookie = buf.try_get_u64().map_err(|_| SHORT)?;
        let offset = buf.try_get_u64().map_err(|_| SHORT)?;
        let length = if extended {
            buf.try_get_u64().map_err(|_| SHORT)?
        } else {
            u64::from(buf.try_get_u32().map_err(|_| SHORT)?)
        };
        Ok(Self { flags, command, cookie, offset, length })
    }

    /// Writes it in the form that `mode` prescribes.
    pub fn put(&self, out: &mut BytesMut, mode: Mode) {
        let extended = mode == Mode::Extended;
        debug_assert!(extended || self.length <= u64::from(u32::MAX));
        out.put_u32(if extended { MAGIC_REQUEST_EXTENDED } else { MAGIC_REQUEST });
        out.put_u16(self.flags);
        out.put_u16(self.command);
        out.put_u64(self.cookie);
        out.put_u64(self.offset);
        if extended {
            out.put_u64(self.length);
        } else {
            out.put_u32(self.length as u32);
        }
    }
}

/// Head of a reply chunk; `length` bytes of payload follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// See [`super::chunk::DONE`].
    pub flags: u16,
    /// See [`super::chunk`].
    pub kind: u16,
    /// The request it answers.
    pub cookie: u64,
    /// Offset of that request; extended headers only, else 0.
    pub offset: u64,
    /// Bytes that follow.
    pub length: u64,
}

/// Head of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// A simple reply; the data of a successful read follows.
    Simple {
        /// Zero, or an error number.
        error: u32,
        /// The request it answers.
        cookie: u64,
    },
    /// A structured or extended chunk.
    Chunk(Chunk),
}

/// Length of a reply's head, from its magic.
///
/// # Errors
/// If no reply in this mode begins so.
pub fn reply_len(magic: u32, mode: Mode) -> Result<usize, Malformed> {
    match (magic, mode) {
        (MAGIC_REPLY_SIMPLE, Mode::Simple | Mode::Structured) => Ok(Reply::LEN_SIMPLE),
        (MAGIC_REPLY_STRUCTURED, Mode::Structured) => Ok(Reply::LEN_STRUCTURED),
        (MAGIC_REPLY_EXTENDED, Mode::Extended) => Ok(Reply::LEN_EXTENDED),
        (MAGIC_REPLY_SIMPLE | MAGIC_REPLY_STRUCTURED | MAGIC_REPLY_EXTENDED, _) => {
            Err(Malformed("a reply has a form that was not negotiated"))
        }
        _ => Err(Malformed("a reply has an unknown magic")),
    }
}

impl Reply {
    /// Length of a simple reply, the shortest.
    pub const LEN_SIMPLE: usize = 16;
    /// Length of a structured chunk's head.
    pub const LEN_STRUCTURED: usize = 20;
    /// Length of an extended chunk's head.
    pub const LEN_EXTENDED: usize = 32;

    /// Reads it.
    ///
    /// # Errors
    /// If it is too short, or of a form that `mode` does not allow.
    pub fn parse(mut buf: &[u8], mode: Mode) -> Result<Self, Malformed> {
        let magic = buf.try_get_u32().map_err(|_| SHORT)?;
        let len = reply_len(magic, mode)?;
        if buf.len() + 4 < len {
            return Err(SHORT);
        }
        if len == Self::LEN_SIMPLE {
            let error = buf.try_get_u32().map_err(|_| SHORT)?;
            return Ok(Self::Simple { error, cookie: buf.try_get_u64().map_err(|_| SHORT)? });
        }
        let flags = buf.try_get_u16().map_err(|_| SHORT)?;
        let kind = buf.try_get_u16().map_err(|_| SHORT)?;
        let cookie = buf.try_get_u64().map_err(|_| SHORT)?;
        let (offset, length) = if len == Self::LEN_EXTENDED {
            let offset = buf.try_get_u64().map_err(|_| SHORT)?;
            (offset, buf.try_get_u64().map_err(|_| SHORT)?)
        } else {
            (0, u64::from(buf.try_get_u32().map_err(|_| SHORT)?))
        };
        Ok(Self::Chunk(Chunk { flags, kind, cookie, offset, length }))
    }

    /// Writes it in the form that `mode` prescribes.
    pub fn put(&self, out: &mut BytesMut, mode: Mode) {
        match *self {
            Self::Simple { error, cookie } => {
                out.put_u32(MAGIC_REPLY_SIMPLE);
                out.put_u32(error);
                out.put_u64(cookie);
            }
            Self::Chunk(chunk) => {
                let extended = mode == Mode::Extended;
                debug_assert!(extended || chunk.length <= u64::from(u32::MAX));
                out.put_u32(if extended { MAGIC_REPLY_EXTENDED } else { MAGIC_REPLY_STRUCTURED });
                out.put_u16(chunk.flags);
                out.put_u16(chunk.kind);
                out.put_u64(chunk.cookie);
                if extended {
                    out.put_u64(chunk.offset);
                    out.put_u64(chunk.length);
                } else {
                    out.put_u32(chunk.length as u32);
                }
            }
        }
    }
}

/// Reads the head of an `OFFSET_DATA` payload; the data follows.
///
/// # Errors
/// If it is too short.
pub fn parse_data_offset(mut buf: &[u8]) -> Result<u64, Malformed> {
    buf.try_get_u64().map_err(|_| SHORT)
}

/// Writes the head of an `OFFSET_DATA` payload.
pub fn put_data_offset(out: &mut BytesMut, offset: u64) {
    out.put_u64(offset);
}

/// Reads an `OFFSET_HOLE` payload: offset and length.
///
/// # Errors
/// If its size is not 12 bytes.
pub fn parse_hole(mut buf: &[u8]) -> Result<(u64, u32), Malformed> {
    if buf.len() != 12 {
        return Err(Malformed("a hole chunk has the wrong length"));
    }
    let offset = buf.try_get_u64().map_err(|_| SHORT)?;
    Ok((offset, buf.try_get_u32().map_err(|_| SHORT)?))
}

/// Writes an `OFFSET_HOLE` payload.
pub fn put_hole(out: &mut BytesMut, offset: u64, length: u32) {
    out.put_u64(offset);
    out.put_u32(length);
}

/// Payload of an error chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErrorPayload {
    /// The error number, never 0.
    pub error: u32,
    /// The server's words, made printable; may be empty.
    pub message: String,
    /// Where it happened, when the server says so.
    pub offset: Option<u64>,
}

impl ErrorPayload {
    /// Reads it. `kind` is the chunk's.
    ///
    /// # Errors
    /// If lengths do not fit, or the error number is 0.
    pub fn parse(mut buf: &[u8], kind: u16) -> Result<Self, Malformed> {
        let error = buf.try_get_u32().map_err(|_| SHORT)?;
        if error == 0 {
            return Err(Malformed("an error chunk says that there was no error"));
        }
        let len = usize::from(buf.try_get_u16().map_err(|_| SHORT)?);
        let (message, mut tail) = buf
            .split_at_checked(len)
            .ok_or(Malformed("the message of an error chunk is longer than the chunk"))?;
        let offset = if kind == super::chunk::ERROR_OFFSET {
            Some(tail.try_get_u64().map_err(|_| SHORT)?)
        } else {
            None
        };
        Ok(Self { error, message: printable(message), offset })
    }

    /// Writes it; `ERROR_OFFSET` is its kind if it has an offset, else `ERROR`.
    pub fn put(&self, out: &mut BytesMut) {
        let message = &self.message.as_bytes()[..self.message.len().min(super::MAX_STRING)];
        out.put_u32(self.error);
        out.put_u16(message.len() as u16);
        out.put_slice(message);
        if let Some(offset) = self.offset {
            out.put_u64(offset);
        }
    }
}

/// Payload of a block status chunk: extents of one context, as length and flags.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatusPayload {
    /// The context's id.
    pub context: u32,
    /// Length and flags of each extent, in order.
    pub extents: Vec<(u64, u64)>,
}

impl StatusPayload {
    /// Reads it; `wide` for `BLOCK_STATUS_EXT`.
    ///
    /// # Errors
    /// If lengths do not fit or there is no extent.
    pub fn parse(mut buf: &[u8], wide: bool) -> Result<Self, Malformed> {
        let context = buf.try_get_u32().map_err(|_| SHORT)?;
        let unit = if wide { 16 } else { 8 };
        if wide {
            let count = buf.try_get_u32().map_err(|_| SHORT)? as usize;
            if buf.len() / unit != count {
                return Err(Malformed("a block status chunk miscounts its extents"));
            }
        }
        if buf.is_empty() || !buf.len().is_multiple_of(unit) {
            return Err(Malformed("a block status chunk has the wrong length"));
        }
        let mut extents = Vec::with_capacity(buf.len() / unit);
        while !buf.is_empty() {
            extents.push(if wide {
                let length = buf.try_get_u64().map_err(|_| SHORT)?;
                (length, buf.try_get_u64().map_err(|_| SHORT)?)
            } else {
                let length = buf.try_get_u32().map_err(|_| SHORT)?;
                (u64::from(length), u64::from(buf.try_get_u32().map_err(|_| SHORT)?))
            });
        }
        Ok(Self { context, extents })
    }

    /// Writes it; `wide` for `BLOCK_STATUS_EXT`. Without it, lengths and flags must fit 32 bits.
    pub fn put(&self, out: &mut BytesMut, wide: bool) {
        out.put_u32(self.context);
        if wide {
            out.put_u32(self.extents.len() as u32);
        }
        for &(length, flags) in &self.extents {
            if wide {
                out.put_u64(length);
                out.put_u64(flags);
            } else {
                out.put_u32(length as u32);
                out.put_u32(flags as u32);
            }
        }
    }
}
