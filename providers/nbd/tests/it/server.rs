// SPDX-License-Identifier: MIT OR Apache-2.0
//! Our own server: against our client in all modes, against other people's clients, and against
//! clients that break the rules.

#![allow(clippy::unwrap_used, reason = "a failed helper fails its test")]

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use provider_nbd::server::{Export, ExportFuture, Refusal, Server};
use provider_nbd::wire::{
    BlockSizes, DEFAULT_MAX_BLOCK, ExportQuery, Greeting, MetaQuery, Mode, OptionRequest, Request,
    command, flag, option, reply,
};
use provider_nbd::{Client, Errno, Error, Options, ZeroOptions, context, list_unix};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::fake::TEST_LIMIT;
use crate::peer::{run, temp_dir};

const SIZE: usize = 3 << 20;
const BITMAP: &str = "qemu:dirty-bitmap:b";
/// A read here is refused.
const FORBIDDEN: u64 = 1 << 20;
/// A read here hangs up.
const FATAL: u64 = 2 << 20;

/// A disk in memory: every other 64 KiB are dirty.
struct Memory(Mutex<Vec<u8>>);

impl Memory {
    fn change(&self, offset: u64, data: &[u8]) {
        let at = offset as usize;
        self.0.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
    }
}

fn ready<'a, T: Send + 'a>(result: Result<T, Refusal>) -> ExportFuture<'a, T> {
    Box::pin(std::future::ready(result))
}

impl Export for Memory {
    fn size_bytes(&self) -> u64 {
        SIZE as u64
    }
    fn flags(&self) -> u16 {
        flag::HAS_FLAGS
            | flag::SEND_FLUSH
            | flag::SEND_FUA
            | flag::SEND_TRIM
            | flag::SEND_WRITE_ZEROES
            | flag::SEND_DF
            | flag::CAN_MULTI_CONN
    }
    fn block_sizes(&self) -> BlockSizes {
        BlockSizes { min: 512, preferred: 4096, max: DEFAULT_MAX_BLOCK }
    }
    fn contexts(&self) -> Vec<String> {
        vec![context::BASE_ALLOCATION.to_owned(), BITMAP.to_owned()]
    }
    fn read(&self, offset: u64, len: usize) -> ExportFuture<'_, Bytes> {
        let at = offset as usize;
        ready(match offset {
            FORBIDDEN => Err(Refusal::new(Errno::EPERM, "released")),
            FATAL => Err(Refusal::HangUp),
            _ => Ok(Bytes::copy_from_slice(&self.0.lock().unwrap()[at..at + len])),
        })
    }
    fn block_status<'a>(
        &'a self,
        context: &'a str,
        offset: u64,
        len: u64,
    ) -> ExportFuture<'a, Vec<(u64, u64)>> {
        if context != BITMAP {
            return ready(Ok(vec![(len, 0)]));
        }
        let unit = 64 << 10;
        let first = (offset / unit + 1) * unit - offset;
        let count = len.div_ceil(unit);
        let rest = (1..count).map(|n| (unit, (offset / unit + n) % 2));
        ready(Ok(std::iter::once((first, offset / unit % 2)).chain(rest).collect()))
    }
    fn write(&self, offset: u64, data: Bytes) -> ExportFuture<'_, ()> {
        self.change(offset, &data);
        ready(Ok(()))
    }
    fn trim(&self, offset: u64, len: u64) -> ExportFuture<'_, ()> {
        self.change(offset, &vec![0; len as usize]);
        ready(Ok(()))
    }
    fn write_zeroes(&self, offset: u64, len: u64, _may_trim: bool) -> ExportFuture<'_, ()> {
        self.trim(offset, len)
    }
    fn flush(&self) -> ExportFuture<'_, ()> {
        ready(Ok(()))
    }
}

fn content() -> Vec<u8> {
    (0..SIZE).map(|at| (at / 512 % 251) as u8).collect()
}

struct Served {
    _dir: tempfile::TempDir,
    server: Server,
}

impl Served {
    fn new() -> Self {
        let dir = temp_dir();
        let disk: Arc<dyn Export> = Arc::new(Memory(Mutex::new(content())));
        let server = Server::listen(dir.path().join("s"), [("disk", disk)]).expect("a server");
        Self { _dir: dir, server }
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.server.socket().display())
    }

    async fn client(&self, contexts: &[&str]) -> provider_nbd::Result<Client> {
        let options = Options {
            contexts: contexts.iter().map(|&name| name.to_owned()).collect(),
            connections: 2,
            timeout: Some(TEST_LIMIT),
            ..Options::default()
        };
        Client::connect_unix(self.server.socket(), "disk", options).await
    }
}

#[tokio::test]
async fn our_client_does_everything() {
    let served = Served::new();
    let exports = list_unix(served.server.socket()).await.unwrap();
    assert_eq!(exports.len(), 1);
    assert_eq!(exports[0].name, "disk");
    let client = served.client(&[context::BASE_ALLOCATION, BITMAP]).await.unwrap();
    assert_eq!(client.mode(), Mode::Extended);
    assert_eq!(client.connections(), 2);
    assert_eq!(client.size_bytes(), SIZE as u64);
    let mut truth = content();
    client.write(4096, Bytes::from(vec![9; 8192]), true).await.unwrap();
    truth[4096..12288].fill(9);
    client.trim(0, 4096).await.unwrap();
    client.write_zeroes(8192, 1024, ZeroOptions::default()).await.unwrap();
    truth[..4096].fill(0);
    truth[8192..9216].fill(0);
    client.flush().await.unwrap();
    let reads = (1..16).map(|n| client.read(n * 512, 64 << 10));
    for (n, data) in futures_util::future::join_all(reads).await.into_iter().enumerate() {
        let at = (n + 1) * 512;
        assert!(data.unwrap()[..] == truth[at..at + (64 << 10)], "read {n}");
    }
    let mut extents = client.extents(BITMAP, 0, SIZE as u64);
    let mut dirty = 0;
    while let Some(extent) = extents.next().await.unwrap() {
        dirty += if extent.flags & context::DIRTY != 0 { extent.len } else { 0 };
    }
    assert_eq!(dirty, SIZE as u64 / 2);
    client.disconnect().await.unwrap();
}

#[tokio::test]
async fn errors_reach_the_client_and_a_hang_up_ends_it() {
    let served = Served::new();
    let client = served.client(&[]).await.unwrap();
    let error = client.read(FORBIDDEN, 512).await.unwrap_err();
    assert_eq!(error.errno(), Some(Errno::EPERM), "{error}");
    assert!(error.to_string().contains("released"), "{error}");
    assert_eq!(client.read(512, 512).await.unwrap().len(), 512);
    let error = client.read(FATAL, 512).await.unwrap_err();
    assert!(error.is_fatal(), "{error}");
    // Others are served as before.
    let other = served.client(&[]).await.unwrap();
    assert!(other.read(0, 512).await.is_ok());
    let missing = Client::connect_unix(served.server.socket(), "no", Options::default()).await;
    assert!(missing.is_err());
    let missing = served.client(&["qemu:dirty-bitmap:other"]).await;
    assert!(matches!(missing, Err(Error::ContextMissing { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn other_clients_agree() {
    let served = Served::new();
    let uri = served.uri();
    let info = tokio::task::spawn_blocking(move || {
        let info = run("nbdinfo", ["--json", &uri]);
        let map = run("nbdinfo", [&format!("--map={BITMAP}"), "--totals", &uri]);
        (info, map)
    });
    let (info, map) = info.await.unwrap();
    assert!(info.contains(&format!("\"export-size\": {SIZE}")), "{info}");
    assert!(info.contains("\"base:allocation\"") && info.contains(BITMAP), "{info}");
    assert!(map.contains(&(SIZE / 2).to_string()) && map.contains("50.0%"), "{map}");
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_img_copies_it() {
    struct Plain;
    impl Export for Plain {
        fn size_bytes(&self) -> u64 {
            SIZE as u64
        }
        fn read(&self, offset: u64, len: usize) -> ExportFuture<'_, Bytes> {
            let at = offset as usize;
            ready(Ok(Bytes::copy_from_slice(&content()[at..at + len])))
        }
    }
    let dir = temp_dir();
    let export: Arc<dyn Export> = Arc::new(Plain);
    let server = Server::listen(dir.path().join("s"), [("", export)]).unwrap();
    let uri = format!("nbd+unix:///?socket={}", server.socket().display());
    let copy: PathBuf = dir.path().join("copy");
    let target = copy.to_str().unwrap().to_owned();
    let copied = tokio::task::spawn_blocking(move || {
        run("qemu-img", ["convert", "-f", "raw", "-O", "raw", &uri, &target])
    });
    copied.await.unwrap();
    assert!(std::fs::read(&copy).unwrap() == content());
    let socket = server.socket().to_owned();
    drop(server);
    assert!(!socket.exists());
}

/// A client that says what it likes.
struct Raw(UnixStream);

impl Raw {
    async fn connect(served: &Served) -> Self {
        let mut stream = UnixStream::connect(served.server.socket()).await.unwrap();
        let mut greeting = [0; Greeting::LEN];
        stream.read_exact(&mut greeting).await.unwrap();
        Greeting::parse(&greeting).unwrap();
        stream.write_all(&3_u32.to_be_bytes()).await.unwrap();
        Self(stream)
    }

    async fn option(&mut self, option: u32, data: &[u8]) {
        let mut out = BytesMut::new();
        OptionRequest { option, length: data.len() as u32 }.put(&mut out);
        out.extend_from_slice(data);
        self.0.write_all(&out).await.unwrap();
    }

    /// The kind of the next reply to an option.
    async fn reply(&mut self) -> u32 {
        let mut head = [0; 20];
        self.0.read_exact(&mut head).await.unwrap();
        let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
        let mut data = vec![0; number(16) as usize];
        self.0.read_exact(&mut data).await.unwrap();
        number(12)
    }

    /// Whether the server closes the connection, whatever it says before.
    async fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        tokio::time::timeout(Duration::from_secs(20), self.0.read_to_end(&mut rest)).await.is_ok()
    }

    async fn go(&mut self) {
        let mut data = BytesMut::new();
        ExportQuery { export: "disk".to_owned(), infos: Vec::new() }.put(&mut data);
        self.option(option::GO, &data).await;
        while self.reply().await != reply::ACK {}
    }

    /// Error number of the simple reply to a request, without data.
    async fn error(&mut self, command: u16, offset: u64, length: u64) -> u32 {
        let mut out = BytesMut::new();
        Request { flags: 0, command, cookie: 7, offset, length }.put(&mut out, Mode::Simple);
        self.0.write_all(&out).await.unwrap();
        let mut head = [0; 16];
        self.0.read_exact(&mut head).await.unwrap();
        u32::from_be_bytes(head[4..8].try_into().unwrap())
    }
}

#[tokio::test]
async fn requests_that_make_no_sense_get_errors() {
    let served = Served::new();
    let mut raw = Raw::connect(&served).await;
    raw.option(99, b"abc").await;
    assert_eq!(raw.reply().await, reply::ERR_UNSUP);
    raw.option(option::GO, b"x").await;
    assert_eq!(raw.reply().await, reply::ERR_INVALID);
    // Contexts need structured replies.
    let mut query = BytesMut::new();
    MetaQuery { export: "disk".to_owned(), queries: vec![BITMAP.to_owned()] }.put(&mut query);
    raw.option(option::SET_META_CONTEXT, &query).await;
    assert_eq!(raw.reply().await, reply::ERR_INVALID);
    raw.go().await;
    let einval = Errno::EINVAL.to_wire();
    let size = SIZE as u64;
    for (command, offset, length) in [
        (command::READ, size, 512),
        (command::READ, 0, 0),
        (command::READ, 1, 512),
        (command::READ, u64::MAX - 511, 512),
        (command::READ, 0, size + 512),
        (command::TRIM, size - 512, 1024),
        (command::BLOCK_STATUS, 0, 512),
        (77, 0, 512),
    ] {
        assert_eq!(raw.error(command, offset, length).await, einval, "{command} {offset} {length}");
    }
    assert_eq!(raw.error(command::FLUSH, 0, 0).await, 0);
}

#[tokio::test]
async fn clients_that_break_the_rules_are_cut_off() {
    let served = Served::new();
    let mut raw = Raw::connect(&served).await;
    raw.0.write_all(&[0x55; 16]).await.unwrap();
    assert!(raw.is_closed().await, "wrong magic");

    let mut raw = Raw::connect(&served).await;
    let mut out = BytesMut::new();
    OptionRequest { option: option::LIST, length: u32::MAX }.put(&mut out);
    raw.0.write_all(&out).await.unwrap();
    assert!(raw.is_closed().await, "an endless option");

    let mut raw = Raw::connect(&served).await;
    for _ in 0..200 {
        let mut out = BytesMut::new();
        OptionRequest { option: option::LIST, length: 0 }.put(&mut out);
        if raw.0.write_all(&out).await.is_err() {
            break;
        }
    }
    assert!(raw.is_closed().await, "endless options");

    let mut raw = Raw::connect(&served).await;
    raw.go().await;
    let mut out = BytesMut::new();
    let request =
        Request { flags: 0, command: command::WRITE, cookie: 1, offset: 0, length: 1 << 31 };
    request.put(&mut out, Mode::Simple);
    raw.0.write_all(&out).await.unwrap();
    assert!(raw.is_closed().await, "a huge write");

    // The server lives.
    assert!(served.client(&[]).await.unwrap().read(0, 512).await.is_ok());
}
