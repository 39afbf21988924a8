// SPDX-License-Identifier: MIT OR Apache-2.0
//! Messages of the negotiation: greeting, options and their replies.

use bytes::{Buf, BufMut, BytesMut};

use super::{
    MAGIC_INIT, MAGIC_OLDSTYLE, MAGIC_OPTION, MAGIC_OPTION_REPLY, MAX_OPTION_REPLY, MAX_STRING,
    Malformed, info,
};

const SHORT: Malformed = Malformed("the message is too short");

/// Takes a length-prefixed string.
fn take_string(buf: &mut &[u8]) -> Result<String, Malformed> {
    let len = buf.try_get_u32().map_err(|_| SHORT)? as usize;
    if len > MAX_STRING {
        return Err(Malformed("a string is longer than 4096 bytes"));
    }
    let (head, tail) = buf.split_at_checked(len).ok_or(SHORT)?;
    *buf = tail;
    text(head)
}

fn text(bytes: &[u8]) -> Result<String, Malformed> {
    if bytes.len() > MAX_STRING {
        return Err(Malformed("a string is longer than 4096 bytes"));
    }
    String::from_utf8(bytes.to_vec()).map_err(|_| Malformed("a string is not UTF-8"))
}

fn put_string(out: &mut BytesMut, string: &str) {
    debug_assert!(string.len() <= MAX_STRING);
    out.put_u32(string.len() as u32);
    out.put_slice(string.as_bytes());
}

/// What a server says first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// See [`super::handshake_flag`].
    pub flags: u16,
}

impl Greeting {
    /// Length in bytes.
    pub const LEN: usize = 18;

    /// Reads it.
    ///
    /// # Errors
    /// If this is not the greeting of a newstyle server.
    pub fn parse(mut buf: &[u8]) -> Result<Self, Malformed> {
        if buf.try_get_u64().map_err(|_| SHORT)? != MAGIC_INIT {
            return Err(Malformed("it does not greet with NBDMAGIC"));
        }
        match buf.try_get_u64().map_err(|_| SHORT)? {
            MAGIC_OPTION => {}
            MAGIC_OLDSTYLE => {
                return Err(Malformed("it speaks the oldstyle protocol, which has no options"));
            }
            _ => return Err(Malformed("its greeting has an unknown second magic")),
        }
        Ok(Self { flags: buf.try_get_u16().map_err(|_| SHORT)? })
    }

    /// Writes it.
    pub fn put(&self, out: &mut BytesMut) {
        out.put_u64(MAGIC_INIT);
        out.put_u64(MAGIC_OPTION);
        out.put_u16(self.flags);
    }
}

/// Head of an option request; `length` bytes of data follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionRequest {
    /// See [`super::option`].
    pub option: u32,
    /// Bytes that follow.
    pub length: u32,
}

impl OptionRequest {
    /// Length in bytes.
    pub const LEN: usize = 16;

    /// Reads it.
    ///
    /// # Errors
    /// If the magic is wrong.
    pub fn parse(mut buf: &[u8]) -> Result<Self, Malformed> {
        if buf.try_get_u64().map_err(|_| SHORT)? != MAGIC_OPTION {
            return Err(Malformed("an option request has the wrong magic"));
        }
        let option = buf.try_get_u32().map_err(|_| SHORT)?;
        Ok(Self { option, length: buf.try_get_u32().map_err(|_| SHORT)? })
    }

    /// Writes it.
    pub fn put(&self, out: &mut BytesMut) {
        out.put_u64(MAGIC_OPTION);
        out.put_u32(self.option);
        out.put_u32(self.length);
    }
}

/// Head of an option reply; `length` bytes of data follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReply {
    /// The option it answers.
    pub option: u32,
    /// See [`super::reply`].
    pub kind: u32,
    /// Bytes that follow, at most [`MAX_OPTION_REPLY`].
    pub length: u32,
}

impl OptionReply {
    /// Length in bytes.
    pub const LEN: usize = 20;

    /// Reads it.
    ///
    /// # Errors
    /// If the magic is wrong or the length is out of range.
    pub fn parse(mut buf: &[u8]) -> Result<Self, Malformed> {
        if buf.try_get_u64().map_err(|_| SHORT)? != MAGIC_OPTION_REPLY {
            return Err(Malformed("an option reply has the wrong magic"));
        }
        let option = buf.try_get_u32().map_err(|_| SHORT)?;
        let kind = buf.try_get_u32().map_err(|_| SHORT)?;
        let length = buf.try_get_u32().map_err(|_| SHORT)?;
        if length > MAX_OPTION_REPLY {
            return Err(Malformed("an option reply is longer than 64 KiB"));
        }
        Ok(Self { option, kind, length })
    }

    /// Writes it.
    pub fn put(&self, out: &mut BytesMut) {
        out.put_u64(MAGIC_OPTION_REPLY);
        out.put_u32(self.option);
        out.put_u32(self.kind);
        out.put_u32(self.length);
    }
}

/// Data of the options `GO` and `INFO`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportQuery {
    /// Name of the export.
    pub export: String,
    /// Facts asked for, see [`super::info`].
    pub infos: Vec<u16>,
}

impl ExportQuery {
    /// Reads it.
    ///
    /// # Errors
    /// If lengths and counts do not fit the data.
    pub fn parse(mut buf: &[u8]) -> Result<Self, Malformed> {
        let export = take_string(&mut buf)?;
        let count = usize::from(buf.try_get_u16().map_err(|_| SHORT)?);
        if buf.len() != count * 2 {
            return Err(Malformed("the number of information requests does not fit"));
        }
        let infos = buf.chunks_exact(2).map(|b| u16::from_be_bytes([b[0], b[1]])).collect();
        Ok(Self { export, infos })
    }

    /// Writes it.
    pub fn put(&self, out: &mut BytesMut) {
        put_string(out, &self.export);
        out.put_u16(self.infos.len() as u16);
        for &info in &self.infos {
            out.put_u16(info);
        }
    }
}

/// Data of the options `SET_META_CONTEXT` and `LIST_META_CONTEXT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaQuery {
    /// Name of the export.
    pub export: String,
    /// Names of contexts, or patterns.
    pub queries: Vec<String>,
}

impl MetaQuery {
    /// Reads it.
    ///
    /// # Errors
    /// If lengths and counts do not fit the data.
    pub fn parse(mut buf: &[u8]) -> Result<Self, Malformed> {
        let export = take_string(&mut buf)?;
        let count = buf.try_get_u32().map_err(|_| SHORT)? as usize;
        // Each query takes four bytes at least, so the data bounds the memory.
        if count > buf.len() / 4 {
            return Err(SHORT);
        }
        let queries =
            (0..count).map(|_| take_string(&mut buf)).collect::<Result<Vec<_>, Malformed>>()?;
        if !buf.is_empty() {
            return Err(Malformed("bytes follow the last query"));
        }
        Ok(Self { export, queries })
    }

    /// Writes it.
    pub fn put(&self, out: &mut BytesMut) {
        put_string(out, &self.export);
        out.put_u32(self.queries.len() as u32);
        for query in &self.queries {
            put_string(out, query);
        }
    }
}

/// Reads a `META_CONTEXT` reply: id and name of a context.
///
/// # Errors
/// If it is too short or the name is not text.
pub fn parse_meta_context(mut buf: &[u8]) -> Result<(u32, String), Malformed> {
    let id = buf.try_get_u32().map_err(|_| SHORT)?;
    Ok((id, text(buf)?))
}

/// A `SERVER` reply: one export of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerEntry {
    /// Name of the export.
    pub name: String,
    /// Its description, or empty.
    pub description: String,
}

impl ServerEntry {
    /// Reads it.
    ///
    /// # Errors
    /// If lengths do not fit the data.
    pub fn parse(mut buf: &[u8]) -> Result<Self, Malformed> {
        let name = take_string(&mut buf)?;
        Ok(Self { name, description: text(buf)? })
    }

    /// Writes it.
    pub fn put(&self, out: &mut BytesMut) {
        put_string(out, &self.name);
        out.put_slice(self.description.as_bytes());
    }
}

/// Block sizes as a server states them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Unit of offsets and lengths.
    pub min: u32,
    /// Size that works best.
    pub preferred: u32,
    /// Largest read or write.
    pub max: u32,
}

/// An `INFO` reply: one fact about an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Info {
    /// Size and flags.
    Export {
        /// Size in bytes.
        size_bytes: u64,
        /// See [`super::flag`].
        flags: u16,
    },
    /// Block sizes.
    BlockSize(BlockSizes),
    /// A fact that nobody here needs.
    Other(u16),
}

impl Info {
    /// Reads it.
    ///
    /// # Errors
    /// If the length does not fit the kind.
    pub fn parse(mut buf: &[u8]) -> Result<Self, Malformed> {
        let kind = buf.try_get_u16().map_err(|_| SHORT)?;
        match kind {
            info::EXPORT if buf.len() == 10 => {
                let size_bytes = buf.try_get_u64().map_err(|_| SHORT)?;
                Ok(Self::Export { size_bytes, flags: buf.try_get_u16().map_err(|_| SHORT)? })
            }
            info::BLOCK_SIZE if buf.len() == 12 => Ok(Self::BlockSize(BlockSizes {
                min: buf.try_get_u32().map_err(|_| SHORT)?,
                preferred: buf.try_get_u32().map_err(|_| SHORT)?,
                max: buf.try_get_u32().map_err(|_| SHORT)?,
            })),
            info::EXPORT | info::BLOCK_SIZE => {
                Err(Malformed("an information reply has the wrong length"))
            }
            other => Ok(Self::Other(other)),
        }
    }

    /// Writes it.
    pub fn put(&self, out: &mut BytesMut) {
        match *self {
            Self::Export { size_bytes, flags } => {
                out.put_u16(info::EXPORT);
                out.put_u64(size_bytes);
                out.put_u16(flags);
            }
            Self::BlockSize(BlockSizes { min, preferred, max }) => {
                out.put_u16(info::BLOCK_SIZE);
                out.put_u32(min);
                out.put_u32(preferred);
                out.put_u32(max);
            }
            Self::Other(kind) => out.put_u16(kind),
        }
    }
}

/// Length of the answer to `EXPORT_NAME`, without the padding of 124 zero bytes.
const EXPORT_NAME_REPLY_LEN: usize = 10;

/// Reads the answer to `EXPORT_NAME`: size and flags.
///
/// # Errors
/// If it is too short.
pub fn parse_export_name_reply(mut buf: &[u8]) -> Result<(u64, u16), Malformed> {
    let size_bytes = buf.try_get_u64().map_err(|_| SHORT)?;
    Ok((size_bytes, buf.try_get_u16().map_err(|_| SHORT)?))
}

/// Writes the answer to `EXPORT_NAME`, without padding.
#[must_use]
pub fn export_name_reply(size_bytes: u64, flags: u16) -> [u8; EXPORT_NAME_REPLY_LEN] {
    let mut out = [0; EXPORT_NAME_REPLY_LEN];
    out[..8].copy_from_slice(&size_bytes.to_be_bytes());
    out[8..].copy_from_slice(&flags.to_be_bytes());
    out
}
