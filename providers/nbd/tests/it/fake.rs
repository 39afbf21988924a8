// SPDX-License-Identifier: MIT OR Apache-2.0
//! A scripted server: it negotiates properly, and then each test decides what it says.

use std::future::Future;
use std::path::PathBuf;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use provider_nbd::wire::{
    BlockSizes, Chunk, Greeting, Info, MetaQuery, Mode, OptionReply, OptionRequest, Reply, Request,
    StatusPayload, chunk, command, command_flag, flag, handshake_flag, option, put_data_offset,
    reply,
};
use provider_nbd::{Client, Options, Result};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

/// No test takes longer than this, whatever goes wrong.
pub(crate) const TEST_LIMIT: Duration = Duration::from_secs(30);

/// What the server negotiates.
#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) mode: Mode,
    pub(crate) size_bytes: u64,
    pub(crate) flags: u16,
    pub(crate) block: Option<BlockSizes>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) contexts: Vec<String>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            mode: Mode::Structured,
            size_bytes: 1 << 40,
            flags: flag::HAS_FLAGS
                | flag::SEND_FLUSH
                | flag::SEND_FUA
                | flag::SEND_TRIM
                | flag::SEND_WRITE_ZEROES,
            block: None,
            timeout: None,
            contexts: Vec::new(),
        }
    }
}

/// The server's end of one connection.
pub(crate) struct Fake {
    stream: UnixStream,
    mode: Mode,
}

/// A listener in its own directory.
pub(crate) struct Listener {
    _dir: TempDir,
    pub(crate) path: PathBuf,
    listener: UnixListener,
}

impl Listener {
    pub(crate) fn new() -> Self {
        let dir = TempDir::with_prefix("nbd-fake-").expect("a temporary directory");
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).expect("a socket");
        Self { _dir: dir, path, listener }
    }

    pub(crate) async fn accept(&self) -> UnixStream {
        self.listener.accept().await.expect("a client").0
    }

    pub(crate) async fn connect(&self, setup: &Setup) -> Result<Client> {
        let options = Options {
            contexts: setup.contexts.clone(),
            timeout: setup.timeout,
            ..Options::default()
        };
        Client::connect_unix(&self.path, "", options).await
    }
}

/// Runs a client and a script against each other.
pub(crate) async fn play<C, S>(
    setup: Setup,
    client: impl FnOnce(Client) -> C,
    script: impl FnOnce(Fake) -> S,
) where
    C: Future<Output = ()>,
    S: Future<Output = ()>,
{
    let listener = Listener::new();
    let both = async {
        tokio::join!(
            async {
                let connected = listener.connect(&setup).await.expect("the client connects");
                client(connected).await;
            },
            async {
                let fake = Fake::negotiate(listener.accept().await, &setup).await;
                script(fake).await;
            },
        );
    };
    tokio::time::timeout(TEST_LIMIT, both).await.expect("client and script end in time");
}

impl Fake {
    pub(crate) async fn negotiate(mut stream: UnixStream, setup: &Setup) -> Self {
        let mut out = BytesMut::new();
        let flags = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
        Greeting { flags }.put(&mut out);
        stream.write_all(&out).await.expect("greeting");
        stream.read_u32().await.expect("client flags");
        let mut contexts = Vec::new();
        loop {
            let (asked, data) = read_option(&mut stream).await;
            let mut out = BytesMut::new();
            match asked {
                option::EXTENDED_HEADERS if setup.mode == Mode::Extended => {}
                option::STRUCTURED_REPLY if setup.mode == Mode::Structured => {}
                option::SET_META_CONTEXT => {
                    contexts = MetaQuery::parse(&data).expect("a query").queries;
                }
                option::GO => {}
                _ => {
                    put_reply(&mut out, asked, reply::ERR_UNSUP, b"");
                    stream.write_all(&out).await.expect("refusal");
                    continue;
                }
            }
            for (id, name) in contexts.drain(..).enumerate() {
                let data = [&(id as u32).to_be_bytes()[..], name.as_bytes()].concat();
                put_reply(&mut out, asked, reply::META_CONTEXT, &data);
            }
            if asked == option::GO {
                put_info(
                    &mut out,
                    &Info::Export { size_bytes: setup.size_bytes, flags: setup.flags },
                );
                if let Some(sizes) = setup.block {
                    put_info(&mut out, &Info::BlockSize(sizes));
                }
            }
            put_reply(&mut out, asked, reply::ACK, b"");
            stream.write_all(&out).await.expect("consent");
            if asked == option::GO {
                return Self { stream, mode: setup.mode };
            }
        }
    }

    /// The next request and its payload; `None` when the client has closed.
    pub(crate) async fn next(&mut self) -> Option<(Request, Vec<u8>)> {
        let extended = self.mode == Mode::Extended;
        let mut head = vec![0; if extended { Request::LEN_EXTENDED } else { Request::LEN }];
        self.stream.read_exact(&mut head).await.ok()?;
        let request = Request::parse(&head, self.mode).expect("a request");
        let has_payload = if extended {
            request.flags & command_flag::PAYLOAD_LEN != 0
        } else {
            request.command == command::WRITE
        };
        let mut payload = vec![0; if has_payload { request.length as usize } else { 0 }];
        self.stream.read_exact(&mut payload).await.ok()?;
        Some((request, payload))
    }

    pub(crate) async fn request(&mut self) -> Request {
        self.next().await.expect("the client sends a request").0
    }

    /// Sends bytes; a client that has closed is not the script's concern.
    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes).await;
    }

    pub(crate) async fn chunk(&mut self, request: &Request, kind: u16, flags: u16, payload: &[u8]) {
        let bytes = chunk_bytes(self.mode, request.cookie, kind, flags, payload);
        self.send(&bytes).await;
    }

    pub(crate) async fn data(&mut self, request: &Request, at: u64, data: &[u8], flags: u16) {
        let payload = data_payload(request.offset + at, data);
        self.chunk(request, chunk::OFFSET_DATA, flags, &payload).await;
    }

    pub(crate) async fn done(&mut self, request: &Request) {
        self.chunk(request, chunk::NONE, chunk::DONE, b"").await;
    }

    pub(crate) async fn status(
        &mut self,
        request: &Request,
        context: u32,
        extents: &[(u64, u64)],
        flags: u16,
    ) {
        let wide = self.mode == Mode::Extended;
        let kind = if wide { chunk::BLOCK_STATUS_EXT } else { chunk::BLOCK_STATUS };
        let mut payload = BytesMut::new();
        StatusPayload { context, extents: extents.to_vec() }.put(&mut payload, wide);
        self.chunk(request, kind, flags, &payload).await;
    }
}

pub(crate) fn data_payload(offset: u64, data: &[u8]) -> Bytes {
    let mut payload = BytesMut::new();
    put_data_offset(&mut payload, offset);
    payload.put_slice(data);
    payload.freeze()
}

pub(crate) fn chunk_bytes(mode: Mode, cookie: u64, kind: u16, flags: u16, payload: &[u8]) -> Bytes {
    let mut out = BytesMut::new();
    let length = payload.len() as u64;
    Reply::Chunk(Chunk { flags, kind, cookie, offset: 0, length }).put(&mut out, mode);
    out.put_slice(payload);
    out.freeze()
}

pub(crate) async fn read_option(stream: &mut UnixStream) -> (u32, Vec<u8>) {
    let mut head = [0; OptionRequest::LEN];
    stream.read_exact(&mut head).await.expect("an option");
    let head = OptionRequest::parse(&head).expect("an option");
    let mut data = vec![0; head.length as usize];
    stream.read_exact(&mut data).await.expect("the option's data");
    (head.option, data)
}

pub(crate) fn put_reply(out: &mut BytesMut, option: u32, kind: u32, data: &[u8]) {
    OptionReply { option, kind, length: data.len() as u32 }.put(out);
    out.put_slice(data);
}

fn put_info(out: &mut BytesMut, info: &Info) {
    let mut data = BytesMut::new();
    info.put(&mut data);
    put_reply(out, option::GO, reply::INFO, &data);
}
