// SPDX-License-Identifier: MIT OR Apache-2.0
//! The server's side of the negotiation.

use std::io;
use std::sync::Arc;

use bytes::{BufMut, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::{Export, Exports, broken};
use crate::wire::{
    ExportQuery, Greeting, Info, MAX_OPTION_REPLY, MetaQuery, Mode, OptionReply, OptionRequest,
    export_name_reply, handshake_flag, option, reply,
};

/// Options of one negotiation.
const OPTIONS_MAX: usize = 128;
/// Contexts of one connection.
const CONTEXTS_MAX: usize = 32;

/// What a client has chosen.
pub(super) struct Chosen {
    pub(super) export: Arc<dyn Export>,
    pub(super) mode: Mode,
    /// The contexts, by their id.
    pub(super) contexts: Vec<String>,
}

/// The negotiation of one connection.
struct Talk<'a> {
    stream: &'a mut UnixStream,
    exports: &'a Exports,
    mode: Mode,
    /// The export that contexts were chosen for, and they.
    contexts: Option<(String, Vec<String>)>,
    out: BytesMut,
}

/// Negotiates until an export is chosen; `None` if the client said goodbye.
pub(super) async fn negotiate(
    stream: &mut UnixStream,
    exports: &Exports,
) -> io::Result<Option<Chosen>> {
    let mut out = BytesMut::new();
    let flags = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
    Greeting { flags }.put(&mut out);
    stream.write_all(&out).await?;
    let client = stream.read_u32().await?;
    if client & !u32::from(flags) != 0 {
        return Err(broken("the client sets unknown handshake flags"));
    }
    let pads = client & u32::from(handshake_flag::NO_ZEROES) == 0;
    let out = BytesMut::new();
    let mut talk = Talk { stream, exports, mode: Mode::Simple, contexts: None, out };
    for _ in 0..OPTIONS_MAX {
        let (asked, data) = talk.request().await?;
        match asked {
            option::ABORT => {
                talk.reply(asked, reply::ACK, b"");
                talk.send().await?;
                return Ok(None);
            }
            option::EXPORT_NAME => return talk.export_name(&data, pads).await,
            option::GO | option::INFO => {
                let chosen = talk.go(asked, &data);
                talk.send().await?;
                if let (Some(chosen), option::GO) = (chosen, asked) {
                    return Ok(Some(chosen));
                }
            }
            _ => {
                talk.option(asked, &data);
                talk.send().await?;
            }
        }
    }
    Err(broken("the client sends too many options"))
}

impl Talk<'_> {
    async fn request(&mut self) -> io::Result<(u32, Vec<u8>)> {
        let mut head = [0; OptionRequest::LEN];
        self.stream.read_exact(&mut head).await?;
        let head = OptionRequest::parse(&head)?;
        if head.length > MAX_OPTION_REPLY {
            return Err(broken("an option of the client is too long"));
        }
        let mut data = vec![0; head.length as usize];
        self.stream.read_exact(&mut data).await?;
        Ok((head.option, data))
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) {
        OptionReply { option, kind, length: data.len() as u32 }.put(&mut self.out);
        self.out.put_slice(data);
    }

    async fn send(&mut self) -> io::Result<()> {
        let out = self.out.split();
        self.stream.write_all(&out).await
    }

    /// Options that choose no export.
    fn option(&mut self, asked: u32, data: &[u8]) {
        match asked {
            option::STRUCTURED_REPLY | option::EXTENDED_HEADERS if !data.is_empty() => {
                self.reply(asked, reply::ERR_INVALID, b"");
            }
            option::STRUCTURED_REPLY => {
                // Extended headers are the stronger promise.
                self.mode = self.mode.max(Mode::Structured);
                self.reply(asked, reply::ACK, b"");
            }
            option::EXTENDED_HEADERS => {
                self.mode = Mode::Extended;
                self.reply(asked, reply::ACK, b"");
            }
            option::LIST => self.list(),
            option::SET_META_CONTEXT | option::LIST_META_CONTEXT => self.meta(asked, data),
            _ => self.reply(asked, reply::ERR_UNSUP, b""),
        }
    }

    fn list(&mut self) {
        let exports = Arc::clone(self.exports);
        for name in exports.keys() {
            let mut data = BytesMut::new();
            data.put_u32(name.len() as u32);
            data.put_slice(name.as_bytes());
            self.reply(option::LIST, reply::SERVER, &data);
        }
        self.reply(option::LIST, reply::ACK, b"");
    }

    fn meta(&mut self, asked: u32, data: &[u8]) {
        let chooses = asked == option::SET_META_CONTEXT;
        if chooses {
            self.contexts = None;
        }
        let Ok(query) = MetaQuery::parse(data) else {
            return self.reply(asked, reply::ERR_INVALID, b"");
        };
        if self.mode == Mode::Simple && chooses {
            return self.reply(asked, reply::ERR_INVALID, b"");
        }
        let Some(export) = self.exports.get(&query.export) else {
            return self.reply(asked, reply::ERR_UNKNOWN, b"");
        };
        let mut all = export.contexts();
        all.truncate(CONTEXTS_MAX);
        let is_wanted = |name: &String| {
            let names = query.queries.iter();
            // "base:" asks a list for everything that begins so.
            query.queries.is_empty() && !chooses
                || names.into_iter().any(|q| {
                    q == name || !chooses && q.ends_with(':') && name.starts_with(q.as_str())
                })
        };
        let chosen: Vec<String> = all.into_iter().filter(is_wanted).collect();
        for (id, name) in chosen.iter().enumerate() {
            let data = [&(id as u32).to_be_bytes()[..], name.as_bytes()].concat();
            self.reply(asked, reply::META_CONTEXT, &data);
        }
        self.reply(asked, reply::ACK, b"");
        if chooses {
            self.contexts = Some((query.export, chosen));
        }
    }

    fn choose(&self, name: &str) -> Option<Chosen> {
        let export = Arc::clone(self.exports.get(name)?);
        // Contexts that were chosen for another export mean nothing here.
        let contexts = self.contexts.as_ref().filter(|(export, _)| export == name);
        let contexts = contexts.map(|(_, names)| names.clone()).unwrap_or_default();
        Some(Chosen { export, mode: self.mode, contexts })
    }

    fn go(&mut self, asked: u32, data: &[u8]) -> Option<Chosen> {
        let Ok(query) = ExportQuery::parse(data) else {
            self.reply(asked, reply::ERR_INVALID, b"");
            return None;
        };
        let Some(chosen) = self.choose(&query.export) else {
            self.reply(asked, reply::ERR_UNKNOWN, b"there is no such export");
            return None;
        };
        let export = &chosen.export;
        let facts = [
            Info::Export { size_bytes: export.size_bytes(), flags: export.flags() },
            Info::BlockSize(export.block_sizes()),
        ];
        for fact in facts {
            let mut data = BytesMut::new();
            fact.put(&mut data);
            self.reply(asked, reply::INFO, &data);
        }
        self.reply(asked, reply::ACK, b"");
        Some(chosen)
    }

    /// The old way to choose, whose only error is the end of the connection.
    async fn export_name(&mut self, data: &[u8], pads: bool) -> io::Result<Option<Chosen>> {
        let name = std::str::from_utf8(data).unwrap_or_default();
        let Some(chosen) = self.choose(name) else {
            return Err(broken("the client asks for an unknown export"));
        };
        let (size_bytes, flags) = (chosen.export.size_bytes(), chosen.export.flags());
        self.out.put_slice(&export_name_reply(size_bytes, flags));
        if pads {
            self.out.put_bytes(0, 124);
        }
        self.send().await?;
        Ok(Some(chosen))
    }
}
