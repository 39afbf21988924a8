// SPDX-License-Identifier: MIT OR Apache-2.0
//! Targets of `provider-nbd`: the wire module, and the client with a server that says anything.

use std::{
    fmt::Debug,
    os::unix::net::UnixListener as StdListener,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use bytes::BytesMut;
use provider_nbd::{
    Client, Extent, Options, Result,
    context::{self, BASE_ALLOCATION},
    wire::{
        ErrorPayload, ExportQuery, Greeting, Info, Malformed, MetaQuery, Mode, OptionReply,
        OptionRequest, Reply, Request, ServerEntry, StatusPayload, export_name_reply,
        parse_data_offset, parse_export_name_reply, parse_hole, parse_meta_context, printable,
        put_data_offset, put_hole,
    },
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixListener,
};

use crate::ends::run;

/// What the client asks for at once.
const PIECE_BYTES: u64 = 4 << 10;

/// The first byte chooses a message, the second how it is framed; the rest is the message.
pub fn wire(data: &[u8]) {
    let [message, framing, bytes @ ..] = data else { return };
    let mode = match framing % 3 {
        0 => Mode::Simple,
        1 => Mode::Structured,
        _ => Mode::Extended,
    };
    match message % 15 {
        0 => same(bytes, Greeting::parse, Greeting::put),
        1 => same(bytes, OptionRequest::parse, OptionRequest::put),
        2 => same(bytes, OptionReply::parse, OptionReply::put),
        3 => same(bytes, ExportQuery::parse, ExportQuery::put),
        4 => same(bytes, MetaQuery::parse, MetaQuery::put),
        5 => same(bytes, ServerEntry::parse, ServerEntry::put),
        6 => same(bytes, Info::parse, Info::put),
        7 => same(bytes, |b| Request::parse(b, mode), |request, out| request.put(out, mode)),
        8 => same(bytes, |b| Reply::parse(b, mode), |reply, out| reply.put(out, mode)),
        9 => {
            let kind = u16::from(*framing) | 1 << 15;
            same(bytes, |b| ErrorPayload::parse(b, kind), ErrorPayload::put);
        }
        10 | 11 => {
            let wide = message % 15 == 11;
            let put = |payload: &StatusPayload, out: &mut BytesMut| payload.put(out, wide);
            same(bytes, |b| StatusPayload::parse(b, wide), put);
        }
        12 => same(bytes, parse_data_offset, |offset, out| put_data_offset(out, *offset)),
        13 => same(bytes, parse_hole, |&(offset, length), out| put_hole(out, offset, length)),
        _ => {
            same(bytes, parse_export_name_reply, |&(size_bytes, flags), out| {
                out.extend_from_slice(&export_name_reply(size_bytes, flags));
            });
            let _ = parse_meta_context(bytes);
            let shown = printable(bytes);
            assert!(shown.chars().count() <= 512 && !shown.contains(char::is_control));
        }
    }
}

/// What could be read is the same after it was written and read again, and is not longer then.
fn same<T: PartialEq + Debug>(
    bytes: &[u8],
    parse: impl Fn(&[u8]) -> std::result::Result<T, Malformed>,
    put: impl Fn(&T, &mut BytesMut),
) {
    let Ok(message) = parse(bytes) else { return };
    let mut out = BytesMut::new();
    put(&message, &mut out);
    assert_eq!(parse(&out).as_ref(), Ok(&message));
}

/// The first byte says what the client asks for; the rest is all that the server says. The requests
/// come one after the other, so that their cookies are 1, 2, 3 and so on.
pub fn client(data: &[u8]) {
    let [asks, bytes @ ..] = data else { return };
    let bitmap = context::dirty_bitmap("dirty");
    let contexts = [BASE_ALLOCATION.to_owned(), bitmap];
    let options = Options {
        contexts: contexts[..usize::from(asks % 3)].to_vec(),
        whole_reads: asks & 0x80 != 0,
        ..Options::default()
    };
    let (listener, path) = listener();
    run(async {
        let listener = UnixListener::from_std(listener).expect("a runtime");
        let server = async {
            let (mut stream, _) = listener.accept().await.expect("a client");
            // It may have hung up.
            let _ = stream.write_all(bytes).await;
            let _ = stream.shutdown().await;
            let mut heard = [0; 4096];
            while stream.read(&mut heard).await.is_ok_and(|length| length > 0) {}
        };
        let (_outcome, ()) = tokio::join!(requests(path, options), server);
    });
}

async fn requests(path: &Path, options: Options) -> Result<()> {
    let client = Client::connect_unix(path, "", options).await?;
    let len = client.size_bytes().min(PIECE_BYTES);
    let wanted = usize::try_from(len).expect("at most 4 KiB");
    if let Ok(data) = client.read(0, wanted).await {
        assert_eq!(data.len(), wanted);
    }
    for context in client.contexts().to_vec() {
        if let Ok(extents) = client.block_status(&context, 0, len).await {
            check(&extents, len);
        }
    }
    let _ = client.trim(0, len).await;
    if let Ok(data) = client.read(client.size_bytes() - len, wanted).await {
        assert_eq!(data.len(), wanted);
    }
    let _ = client.flush().await;
    client.disconnect().await
}

fn check(extents: &[Extent], len: u64) {
    assert!(!extents.is_empty());
    let mut position = 0;
    for extent in extents {
        assert_eq!(extent.offset, position);
        assert!(extent.len > 0);
        position = extent.end();
    }
    assert!(position <= len);
}

/// One socket for all runs: making one each time is slower than all the rest.
fn listener() -> (StdListener, &'static Path) {
    static LISTENER: OnceLock<(TempDir, StdListener, PathBuf)> = OnceLock::new();
    let (_folder, listener, path) = LISTENER.get_or_init(|| {
        let folder = TempDir::with_prefix("nbd-fuzz-").expect("a temporary folder");
        let path = folder.path().join("socket");
        let listener = StdListener::bind(&path).expect("a socket");
        listener.set_nonblocking(true).expect("a socket that does not block");
        (folder, listener, path)
    });
    (listener.try_clone().expect("a second descriptor"), path)
}
