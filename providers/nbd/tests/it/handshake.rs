// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a server can do wrong before there is an export.

use std::time::Duration;

use bytes::BytesMut;
use provider_nbd::wire::{
    BlockSizes, Greeting, Info, Mode, OptionReply, handshake_flag, option, reply,
};
use provider_nbd::{Client, Error, Options, Result, list_unix};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::fake::{Fake, Listener, Setup, TEST_LIMIT, put_reply, read_option};

/// Connects while `serve` plays the server.
async fn attempt(contexts: &[&str], serve: impl AsyncFnOnce(UnixStream) -> ()) -> Result<Client> {
    let listener = Listener::new();
    let options = Options {
        contexts: contexts.iter().map(|&name| name.to_owned()).collect(),
        timeout: Some(Duration::from_secs(2)),
        ..Options::default()
    };
    let connect = Client::connect_unix(&listener.path, "disk", options);
    let both = async { tokio::join!(connect, async { serve(listener.accept().await).await }).0 };
    tokio::time::timeout(TEST_LIMIT, both).await.expect("it ends in time")
}

/// Kinds and data of option replies.
type Replies<'a> = Vec<(u32, &'a [u8])>;

async fn greet(stream: &mut UnixStream) {
    let mut out = BytesMut::new();
    Greeting { flags: handshake_flag::FIXED_NEWSTYLE }.put(&mut out);
    stream.write_all(&out).await.expect("greeting");
    stream.read_u32().await.expect("client flags");
}

/// Negotiates as a server with the context `a:b` would, but answers one option with these replies.
async fn answer(mut stream: UnixStream, special: u32, replies: &[(u32, &[u8])]) {
    greet(&mut stream).await;
    loop {
        let (asked, _) = read_option(&mut stream).await;
        let mut out = BytesMut::new();
        if asked == special {
            for &(kind, data) in replies {
                put_reply(&mut out, asked, kind, data);
            }
            let _ = stream.write_all(&out).await;
            // Until the client hangs up.
            let _ = stream.read_u8().await;
            return;
        }
        if asked == option::SET_META_CONTEXT {
            put_reply(&mut out, asked, reply::META_CONTEXT, b"\0\0\0\0a:b");
        }
        put_reply(&mut out, asked, reply::ACK, b"");
        stream.write_all(&out).await.expect("consent");
    }
}

fn info(info: &Info) -> Vec<u8> {
    let mut out = BytesMut::new();
    info.put(&mut out);
    out.to_vec()
}

#[tokio::test]
async fn a_peer_that_is_no_server_is_named_so() {
    let oldstyle = [&b"NBDMAGIC"[..], &0x0000_4202_8186_1253u64.to_be_bytes(), &[0; 136]].concat();
    let no_options = [&b"NBDMAGICIHAVEOPT"[..], &[0, 0]].concat();
    let peers: [(&[u8], &str); 4] = [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "NBDMAGIC"),
        (b"", "ends before its greeting"),
        (&oldstyle, "oldstyle"),
        (&no_options, "fixed newstyle"),
    ];
    for (greeting, expected) in peers {
        let result =
            attempt(&[], async |mut stream| stream.write_all(greeting).await.unwrap()).await;
        match result {
            Err(Error::NotNbd(what)) => assert!(what.contains(expected), "{what}"),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_silent_peer_is_a_timeout() {
    let result = attempt(&[], async |mut stream| {
        let _ = stream.read_u8().await;
    })
    .await;
    assert!(matches!(result, Err(Error::Timeout)), "{result:?}");
}

#[tokio::test]
async fn a_missing_socket_is_named() {
    let error =
        Client::connect_unix("/nonexistent/socket", "", Options::default()).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("/nonexistent/socket") && text.contains("No such file"), "{text}");
}

#[tokio::test]
async fn refusals_become_their_errors() {
    let tls = attempt(&[], async |stream| {
        answer(stream, option::EXTENDED_HEADERS, &[(reply::ERR_TLS_REQD, b"use \x07TLS")]).await;
    })
    .await
    .unwrap_err();
    assert!(
        tls.to_string().contains("requires TLS") && tls.to_string().contains("use  TLS"),
        "{tls}"
    );

    let unknown = attempt(&[], async |stream| {
        answer(stream, option::GO, &[(reply::ERR_UNKNOWN, b"")]).await;
    })
    .await;
    assert!(matches!(unknown, Err(Error::NoSuchExport { export }) if export == "disk"));

    let unknown = attempt(&["a:b"], async |stream| {
        answer(stream, option::SET_META_CONTEXT, &[(reply::ERR_UNKNOWN, b"")]).await;
    })
    .await;
    assert!(matches!(unknown, Err(Error::NoSuchExport { export }) if export == "disk"));

    let missing = attempt(&["a:b", "c:d"], async |stream| {
        let offered = [(reply::META_CONTEXT, &b"\0\0\0\x05a:b"[..]), (reply::ACK, b"")];
        answer(stream, option::SET_META_CONTEXT, &offered).await;
    })
    .await;
    assert!(matches!(missing, Err(Error::ContextMissing { context }) if context == "c:d"));
}

#[tokio::test]
async fn wrong_replies_are_protocol_errors() {
    let export = info(&Info::Export { size_bytes: 1 << 20, flags: 1 });
    let huge = info(&Info::Export { size_bytes: u64::MAX, flags: 1 });
    let sizes = |min, max| info(&Info::BlockSize(BlockSizes { min, preferred: 4096, max }));
    let (no_min, odd, crossed) = (sizes(0, 4096), sizes(3, 4096), sizes(4096, 512));
    let ack = (reply::ACK, &b""[..]);
    let context = (reply::META_CONTEXT, &b"\0\0\0\0a:b"[..]);
    let go: Vec<(&str, Replies<'_>)> = vec![
        ("does not tell the size", vec![ack]),
        ("out of range", vec![(reply::INFO, &huge), ack]),
        ("minimum block size", vec![(reply::INFO, &export), (reply::INFO, &no_min), ack]),
        ("minimum block size", vec![(reply::INFO, &export), (reply::INFO, &odd), ack]),
        ("below the minimum", vec![(reply::INFO, &export), (reply::INFO, &crossed), ack]),
        ("wrong length", vec![(reply::INFO, &export[..9]), ack]),
        ("without end", vec![(reply::INFO, &export); 100]),
        ("unexpected kind", vec![(77, b"")]),
    ];
    let meta: Vec<(&str, Replies<'_>)> = vec![
        ("twice", vec![context, context, ack]),
        ("nobody asked for", vec![(reply::META_CONTEXT, b"\0\0\0\0x:y"), ack]),
        ("too short", vec![(reply::META_CONTEXT, b"\0"), ack]),
        ("not UTF-8", vec![(reply::META_CONTEXT, b"\0\0\0\0\xff"), ack]),
    ];
    let cases = go
        .iter()
        .map(|case| (option::GO, case))
        .chain(meta.iter().map(|case| (option::SET_META_CONTEXT, case)));
    for (special, (expected, replies)) in cases {
        let result = attempt(&["a:b"], async |stream| {
            answer(stream, special, replies).await;
        })
        .await;
        match result {
            Err(Error::Protocol(what)) => assert!(what.contains(expected), "{what} / {expected}"),
            other => panic!("{expected}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn heads_of_option_replies_are_checked() {
    let head = |option, length| {
        let mut out = BytesMut::new();
        OptionReply { option, kind: reply::ACK, length }.put(&mut out);
        out.to_vec()
    };
    let cases = [
        ("longer than 64 KiB", head(option::EXTENDED_HEADERS, u32::MAX)),
        ("answers another option", head(option::LIST, 0)),
        ("wrong magic", vec![0; OptionReply::LEN]),
    ];
    for (expected, bytes) in cases {
        let result = attempt(&[], async |mut stream| {
            greet(&mut stream).await;
            read_option(&mut stream).await;
            stream.write_all(&bytes).await.unwrap();
            let _ = stream.read_u8().await;
        })
        .await;
        match result {
            Err(Error::Protocol(what)) => assert!(what.contains(expected), "{what}"),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn contexts_need_a_server_that_has_structured_replies() {
    let listener = Listener::new();
    let setup = Setup { mode: Mode::Simple, ..Setup::default() };
    let options = Options { contexts: vec!["a:b".to_owned()], ..Options::default() };
    let connect = async {
        let result = Client::connect_unix(&listener.path, "", options).await;
        assert!(matches!(result, Err(Error::ContextMissing { .. })), "{result:?}");
    };
    let serve = async { Fake::negotiate(listener.accept().await, &setup).await };
    tokio::select! { () = connect => {}, _ = serve => panic!("the client must give up") }
}

#[tokio::test]
async fn an_endless_list_is_ended() {
    let listener = Listener::new();
    let serve = async {
        let mut stream = listener.accept().await;
        greet(&mut stream).await;
        read_option(&mut stream).await;
        let mut out = BytesMut::new();
        for _ in 0..100 {
            put_reply(&mut out, option::LIST, reply::SERVER, b"\0\0\0\x01xdescription");
        }
        while stream.write_all(&out).await.is_ok() {}
    };
    let (result, ()) = tokio::join!(list_unix(&listener.path), serve);
    assert!(matches!(result, Err(Error::Protocol(what)) if what.contains("10000")));
}
