// SPDX-License-Identifier: MIT OR Apache-2.0
//! The client's side of the negotiation: from a fresh socket to an export that can be read.

use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::wire::{
    BlockSizes, DEFAULT_MAX_BLOCK, ExportQuery, Greeting, Info, MAX_STRING, MetaQuery, Mode,
    OptionReply, OptionRequest, ServerEntry, handshake_flag, info, option, parse_export_name_reply,
    parse_meta_context, printable, reply,
};
use crate::{BlockSize, Error, ExportInfo, Flags, Result};

/// Time for a whole negotiation when the caller sets none.
pub(crate) const DEFAULT_LIMIT: Duration = Duration::from_secs(30);
/// Exports a server may list.
const MAX_EXPORTS: usize = 10_000;
/// Replies to one option that are not lists.
const MAX_REPLIES: usize = 64;
/// Metadata contexts that can be asked for.
const MAX_CONTEXTS: usize = 32;

/// A metadata context both sides agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Context {
    pub(crate) name: String,
    pub(crate) id: u32,
}

/// What the negotiation found out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Export {
    pub(crate) size_bytes: u64,
    pub(crate) flags: Flags,
    pub(crate) block: BlockSize,
    pub(crate) mode: Mode,
    pub(crate) contexts: Vec<Context>,
}

/// Negotiates an export.
pub(crate) async fn negotiate(
    stream: &mut UnixStream,
    export: &str,
    contexts: &[String],
) -> Result<Export> {
    check_names(export, contexts)?;
    let mut talk = Talk::begin(stream).await?;
    let mode = talk.mode().await?;
    let contexts = talk.contexts(mode, export, contexts).await?;
    let (size_bytes, flags, sizes) = talk.go(export).await?;
    if size_bytes > i64::MAX as u64 {
        return Err(protocol("the size of the export is out of range"));
    }
    Ok(Export {
        size_bytes,
        flags: Flags::from_wire(flags),
        block: block_size(sizes)?,
        mode,
        contexts,
    })
}

/// Lists the exports of a server.
pub(crate) async fn list(stream: &mut UnixStream) -> Result<Vec<ExportInfo>> {
    let mut talk = Talk::begin(stream).await?;
    talk.request(option::LIST, &[]).await?;
    let mut exports = Vec::new();
    loop {
        let (kind, data) = talk.reply(option::LIST).await?;
        match kind {
            reply::SERVER if exports.len() < MAX_EXPORTS => {
                let entry = ServerEntry::parse(&data)?;
                exports.push(ExportInfo { name: entry.name, description: entry.description });
            }
            reply::SERVER => return Err(protocol("it lists more than 10000 exports")),
            reply::ACK => break,
            kind => return Err(refused("the list of exports", kind, &data)),
        }
    }
    // A farewell; the answer, if there is one, says nothing.
    let _ = talk.request(option::ABORT, &[]).await;
    Ok(exports)
}

fn check_names(export: &str, contexts: &[String]) -> Result<()> {
    if export.len() > MAX_STRING || contexts.iter().any(|name| name.len() > MAX_STRING) {
        return Err(Error::Invalid(
            "Names of exports and metadata contexts have at most 4096 bytes".to_owned(),
        ));
    }
    if contexts.len() > MAX_CONTEXTS {
        return Err(Error::Invalid(format!(
            "At most {MAX_CONTEXTS} metadata contexts can be used, not {}",
            contexts.len()
        )));
    }
    if contexts.iter().enumerate().any(|(n, name)| contexts[..n].contains(name)) {
        return Err(Error::Invalid("A metadata context is asked for twice".to_owned()));
    }
    Ok(())
}

/// Checks the sizes a server states and fills in what it leaves out.
fn block_size(sizes: Option<BlockSizes>) -> Result<BlockSize> {
    let sizes = sizes.unwrap_or(BlockSizes { min: 1, preferred: 4096, max: DEFAULT_MAX_BLOCK });
    if !sizes.min.is_power_of_two() || sizes.min > DEFAULT_MAX_BLOCK {
        return Err(protocol("its minimum block size is not a power of two up to 32 MiB"));
    }
    // More than this in one request has no use, and many servers would refuse it.
    let max = sizes.max.min(DEFAULT_MAX_BLOCK) / sizes.min * sizes.min;
    if max == 0 {
        return Err(protocol("its maximum block size is below the minimum"));
    }
    let preferred = sizes.preferred.clamp(sizes.min, max);
    Ok(BlockSize { min: sizes.min, preferred, max })
}

fn protocol(what: &str) -> Error {
    Error::Protocol(what.to_owned())
}

fn refused(what: &'static str, kind: u32, data: &[u8]) -> Error {
    let ours = match kind {
        reply::ERR_UNSUP => "it does not support that",
        reply::ERR_POLICY => "its rules forbid it",
        reply::ERR_INVALID => "it takes the request as invalid",
        reply::ERR_PLATFORM => "it cannot do that on its platform",
        reply::ERR_TLS_REQD => "it requires TLS, which this client does not speak",
        reply::ERR_UNKNOWN => "it does not know the export",
        reply::ERR_SHUTDOWN => "it is shutting down",
        reply::ERR_BLOCK_SIZE_REQD => "it requires block sizes to be negotiated",
        reply::ERR_TOO_BIG => "it takes the request as too large",
        reply::ERR_EXT_HEADER_REQD => "it requires extended headers",
        kind if kind & reply::ERROR != 0 => "it gives an error of an unknown kind",
        _ => return protocol("an option reply is of an unexpected kind"),
    };
    let theirs = printable(data);
    let message = if theirs.is_empty() { ours.to_owned() } else { format!("{ours} ({theirs})") };
    Error::Refused { what, message }
}

/// A negotiation under way.
struct Talk<'a> {
    stream: &'a mut UnixStream,
    no_zeroes: bool,
}

impl<'a> Talk<'a> {
    async fn begin(stream: &'a mut UnixStream) -> Result<Self> {
        let mut greeting = [0; Greeting::LEN];
        stream
            .read_exact(&mut greeting)
            .await
            .map_err(|error| Error::NotNbd(format!("it ends before its greeting ({error})")))?;
        let greeting = Greeting::parse(&greeting).map_err(|bad| Error::NotNbd(bad.0.to_owned()))?;
        if greeting.flags & handshake_flag::FIXED_NEWSTYLE == 0 {
            return Err(Error::NotNbd("it does not speak the fixed newstyle protocol".to_owned()));
        }
        let known = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
        let mut talk = Self { stream, no_zeroes: greeting.flags & handshake_flag::NO_ZEROES != 0 };
        talk.send(&u32::from(greeting.flags & known).to_be_bytes()).await?;
        Ok(talk)
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).await.map_err(|_| Error::Disconnected)
    }

    async fn receive(&mut self, buf: &mut [u8]) -> Result<()> {
        self.stream.read_exact(buf).await.map(drop).map_err(|_| Error::Disconnected)
    }

    async fn request(&mut self, option: u32, data: &[u8]) -> Result<()> {
        let mut out = BytesMut::with_capacity(OptionRequest::LEN + data.len());
        OptionRequest { option, length: data.len() as u32 }.put(&mut out);
        out.extend_from_slice(data);
        self.send(&out).await
    }

    /// One reply to `option`: its kind and its data.
    async fn reply(&mut self, option: u32) -> Result<(u32, Vec<u8>)> {
        let mut head = [0; OptionReply::LEN];
        self.receive(&mut head).await?;
        let head = OptionReply::parse(&head)?;
        if head.option != option {
            return Err(protocol("an option reply answers another option"));
        }
        let mut data = vec![0; head.length as usize];
        self.receive(&mut data).await?;
        Ok((head.kind, data))
    }

    /// Turns an ability on, if the server has it.
    async fn enable(&mut self, option: u32, what: &'static str) -> Result<bool> {
        self.request(option, &[]).await?;
        let (kind, data) = self.reply(option).await?;
        match kind {
            reply::ACK => Ok(true),
            reply::ERR_TLS_REQD | reply::ERR_SHUTDOWN => Err(refused(what, kind, &data)),
            kind if kind & reply::ERROR != 0 => Ok(false),
            _ => Err(protocol("an option reply is of an unexpected kind")),
        }
    }

    async fn mode(&mut self) -> Result<Mode> {
        if self.enable(option::EXTENDED_HEADERS, "extended headers").await? {
            return Ok(Mode::Extended);
        }
        let structured = self.enable(option::STRUCTURED_REPLY, "structured replies").await?;
        Ok(if structured { Mode::Structured } else { Mode::Simple })
    }

    /// Agrees on the metadata contexts; in the order of `names`.
    async fn contexts(
        &mut self,
        mode: Mode,
        export: &str,
        names: &[String],
    ) -> Result<Vec<Context>> {
        let Some(first) = names.first() else { return Ok(Vec::new()) };
        let missing = |name: &String| Error::ContextMissing { context: name.clone() };
        if mode == Mode::Simple {
            return Err(missing(first));
        }
        let mut data = BytesMut::new();
        MetaQuery { export: export.to_owned(), queries: names.to_vec() }.put(&mut data);
        self.request(option::SET_META_CONTEXT, &data).await?;
        let mut offered: Vec<Context> = Vec::new();
        for _ in 0..MAX_REPLIES {
            let (kind, data) = self.reply(option::SET_META_CONTEXT).await?;
            match kind {
                reply::META_CONTEXT => {
                    let (id, name) = parse_meta_context(&data)?;
                    if !names.contains(&name) {
                        return Err(protocol("it chose a metadata context nobody asked for"));
                    }
                    if offered.iter().any(|other| other.id == id || other.name == name) {
                        return Err(protocol("it names a metadata context twice"));
                    }
                    offered.push(Context { name, id });
                }
                reply::ACK => {
                    return names
                        .iter()
                        .map(|name| {
                            let found = offered.iter().find(|context| context.name == *name);
                            found.cloned().ok_or_else(|| missing(name))
                        })
                        .collect();
                }
                reply::ERR_UNKNOWN => {
                    return Err(Error::NoSuchExport { export: export.to_owned() });
                }
                reply::ERR_UNSUP => return Err(missing(first)),
                kind => return Err(refused("the metadata contexts", kind, &data)),
            }
        }
        Err(protocol("it names metadata contexts without end"))
    }

    /// Enters the transmission phase: size, flags and block sizes of the export.
    async fn go(&mut self, export: &str) -> Result<(u64, u16, Option<BlockSizes>)> {
        let mut data = BytesMut::new();
        ExportQuery { export: export.to_owned(), infos: vec![info::BLOCK_SIZE] }.put(&mut data);
        self.request(option::GO, &data).await?;
        let (mut facts, mut sizes) = (None, None);
        for _ in 0..MAX_REPLIES {
            let (kind, data) = self.reply(option::GO).await?;
            match kind {
                reply::INFO => match Info::parse(&data)? {
                    Info::Export { size_bytes, flags } => facts = Some((size_bytes, flags)),
                    Info::BlockSize(stated) => sizes = Some(stated),
                    Info::Other(_) => {}
                },
                reply::ACK => {
                    let (size_bytes, flags) =
                        facts.ok_or_else(|| protocol("it does not tell the size of the export"))?;
                    return Ok((size_bytes, flags, sizes));
                }
                reply::ERR_UNKNOWN => {
                    return Err(Error::NoSuchExport { export: export.to_owned() });
                }
                reply::ERR_UNSUP => return self.export_name(export).await,
                kind => return Err(refused("the export", kind, &data)),
            }
        }
        Err(protocol("it tells facts about the export without end"))
    }

    /// The old way to choose an export, for servers without `GO`.
    async fn export_name(&mut self, export: &str) -> Result<(u64, u16, Option<BlockSizes>)> {
        self.request(option::EXPORT_NAME, export.as_bytes()).await?;
        let mut answer = [0; 10 + 124];
        let len = if self.no_zeroes { 10 } else { answer.len() };
        // The only way such a server can say no is to hang up.
        self.receive(&mut answer[..len])
            .await
            .map_err(|_| Error::NoSuchExport { export: export.to_owned() })?;
        let (size_bytes, flags) = parse_export_name_reply(&answer)?;
        Ok((size_bytes, flags, None))
    }
}
