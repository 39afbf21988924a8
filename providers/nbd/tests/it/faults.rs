// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a server can do wrong after the negotiation: each fault gives its own error, and never a
//! panic, a hang or wrong data.

use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use provider_nbd::wire::{
    Chunk, ErrorPayload, Mode, Reply, Request, StatusPayload, chunk, put_hole,
};
use provider_nbd::{Errno, Error, ZeroOptions};

use crate::fake::{Setup, chunk_bytes, data_payload, play};

/// One wrong answer to a read of 1000 bytes at 5000.
type Fault = (&'static str, fn(&Request) -> Bytes);

/// One wrong answer to a block status query: what is said of it, context id, extents.
type StatusFault = (&'static str, u32, &'static [(u64, u64)]);

fn head(request: &Request, kind: u16, flags: u16, length: u64) -> Bytes {
    let mut out = BytesMut::new();
    let chunk = Chunk { flags, kind, cookie: request.cookie, offset: 0, length };
    Reply::Chunk(chunk).put(&mut out, Mode::Structured);
    out.freeze()
}

fn reply(request: &Request, kind: u16, flags: u16, payload: &[u8]) -> Bytes {
    chunk_bytes(Mode::Structured, request.cookie, kind, flags, payload)
}

fn data(request: &Request, offset: u64, len: usize, flags: u16) -> Bytes {
    reply(request, chunk::OFFSET_DATA, flags, &data_payload(offset, &vec![1; len]))
}

fn hole(request: &Request, offset: u64, len: u32) -> Bytes {
    let mut payload = BytesMut::new();
    put_hole(&mut payload, offset, len);
    reply(request, chunk::OFFSET_HOLE, chunk::DONE, &payload)
}

const READ_FAULTS: &[Fault] = &[
    ("not in flight", |r| {
        chunk_bytes(Mode::Structured, r.cookie + 77, chunk::NONE, chunk::DONE, b"")
    }),
    ("shorter than the request", |r| reply(r, chunk::NONE, chunk::DONE, b"")),
    ("shorter than the request", |r| data(r, 5000, 999, chunk::DONE)),
    ("shorter than the request", |r| data(r, 5001, 999, chunk::DONE)),
    ("outside of the request", |r| data(r, 4999, 10, 0)),
    ("outside of the request", |r| data(r, 5995, 6, 0)),
    ("outside of the request", |r| data(r, u64::MAX, 6, 0)),
    ("outside of the request", |r| {
        head(r, chunk::OFFSET_DATA, 0, u64::from(u32::MAX))
            .into_iter()
            .chain(5000u64.to_be_bytes())
            .collect()
    }),
    ("outside of the request", |r| hole(r, 5000, 1001)),
    ("outside of the request", |r| hole(r, 0, u32::MAX)),
    ("is empty", |r| data(r, 5000, 0, 0)),
    ("is empty", |r| hole(r, 5000, 0)),
    ("too short", |r| reply(r, chunk::OFFSET_DATA, 0, &[0; 7])),
    ("overlap", |r| [data(r, 5000, 10, 0), data(r, 5009, 10, 0)].concat().into()),
    ("overlap", |r| [data(r, 5500, 10, 0), hole(r, 5491, 10)].concat().into()),
    ("hole chunk has the wrong length", |r| reply(r, chunk::OFFSET_HOLE, 0, &[0; 11])),
    ("longer than any of its kind", |r| head(r, chunk::OFFSET_HOLE, 0, u64::from(u32::MAX))),
    ("longer than any of its kind", |r| head(r, chunk::ERROR, 0, u64::from(u32::MAX))),
    ("too short", |r| reply(r, chunk::ERROR, chunk::DONE, &[0, 0, 0, 5, 0])),
    ("longer than the chunk", |r| reply(r, chunk::ERROR, 0, &[0, 0, 0, 5, 0, 9, b'x'])),
    ("there was no error", |r| reply(r, chunk::ERROR, 0, &[0; 6])),
    ("unknown kind", |r| reply(r, 99, chunk::DONE, b"")),
    ("has a payload", |r| reply(r, chunk::NONE, chunk::DONE, b"x")),
    ("not the last one", |r| reply(r, chunk::NONE, 0, b"")),
    ("of another kind", |r| {
        let mut payload = BytesMut::new();
        StatusPayload { context: 0, extents: vec![(1, 0)] }.put(&mut payload, false);
        reply(r, chunk::BLOCK_STATUS, chunk::DONE, &payload)
    }),
    ("needs a structured one", |r| {
        let mut out = BytesMut::new();
        Reply::Simple { error: 0, cookie: r.cookie }.put(&mut out, Mode::Simple);
        out.freeze()
    }),
    ("not negotiated", |r| chunk_bytes(Mode::Extended, r.cookie, chunk::NONE, chunk::DONE, b"")),
    ("unknown magic", |_| Bytes::from_static(&[0x55; 32])),
];

#[tokio::test]
async fn a_wrong_answer_ends_the_connection_for_everyone() {
    for &(expected, fault) in READ_FAULTS {
        let check = async |client: provider_nbd::Client| {
            let (read, flush) = tokio::join!(client.read(5000, 1000), client.flush());
            for error in [read.map(drop).unwrap_err(), flush.unwrap_err()] {
                let Error::Protocol(what) = &error else {
                    panic!("expected a protocol error about '{expected}', not {error:?}")
                };
                assert!(what.contains(expected), "'{what}' lacks '{expected}'");
            }
            assert!(client.is_closed());
            assert!(matches!(client.read(0, 1).await, Err(Error::Protocol(_))), "remembered");
        };
        play(Setup::default(), check, async |mut fake| {
            let read = fake.request().await;
            fake.request().await;
            fake.send(&fault(&read)).await;
            // The client hangs up without waiting for more.
            while fake.next().await.is_some() {}
        })
        .await;
    }
}

#[tokio::test]
async fn wrong_block_status_ends_the_connection() {
    let faults: &[StatusFault] = &[
        ("is empty", 0, &[(0, 0)]),
        ("not expected", 7, &[(100, 0)]),
        ("lacks the context", 1, &[(100, 0)]),
        ("after the end", 0, &[(0xffff_ffff, 0), (1, 0)]),
    ];
    for mode in [Mode::Structured, Mode::Extended] {
        for &(expected, context, extents) in faults {
            let contexts = vec!["a:b".to_owned(), "c:d".to_owned()];
            let setup = Setup { mode, contexts, ..Setup::default() };
            let check = async |client: provider_nbd::Client| {
                let error = client.block_status("a:b", 0, 100).await.unwrap_err();
                assert!(
                    matches!(&error, Error::Protocol(what) if what.contains(expected)),
                    "{error:?}"
                );
            };
            play(setup, check, async |mut fake| {
                let request = fake.request().await;
                fake.status(&request, context, extents, chunk::DONE).await;
                while fake.next().await.is_some() {}
            })
            .await;
        }
    }
}

#[tokio::test]
async fn an_error_chunk_fails_one_request_with_the_servers_words() {
    let check = async |client: provider_nbd::Client| {
        let error = client.read(5000, 1000).await.unwrap_err();
        assert_eq!(error.errno(), Some(Errno::EPERM));
        let text = error.to_string();
        assert!(text.contains("read of 1000 bytes at offset 5010"), "{text}");
        assert!(text.contains("EPERM") && text.contains("area was  [1mreleased"), "{text}");
        // A simple reply may carry an error too.
        let error = client.flush().await.unwrap_err();
        assert_eq!(error.errno(), Some(Errno::Other(4711)));
        assert_eq!(&client.read(0, 4).await.unwrap()[..], b"good");
    };
    play(Setup::default(), check, async |mut fake| {
        let request = fake.request().await;
        fake.data(&request, 0, &[1; 10], 0).await;
        let mut payload = BytesMut::new();
        let message = "area was \x1b[1mreleased".to_owned();
        ErrorPayload { error: 1, message, offset: Some(5010) }.put(&mut payload);
        fake.chunk(&request, chunk::ERROR_OFFSET, 0, &payload).await;
        fake.done(&request).await;
        let request = fake.request().await;
        let mut out = BytesMut::new();
        Reply::Simple { error: 4711, cookie: request.cookie }.put(&mut out, Mode::Simple);
        fake.send(&out).await;
        let request = fake.request().await;
        fake.data(&request, 0, b"good", chunk::DONE).await;
    })
    .await;
}

#[tokio::test]
async fn a_lost_connection_ends_all_requests_in_flight() {
    let check = async |client: provider_nbd::Client| {
        let reads = (0..100u64).map(|n| client.read(n * 4096, 4096));
        for result in futures_util::future::join_all(reads).await {
            assert!(matches!(result, Err(Error::Disconnected)), "{result:?}");
        }
        let refused = client.write(0, Bytes::from_static(b"x"), false).await;
        assert!(matches!(refused, Err(Error::Disconnected)), "{refused:?}");
    };
    play(Setup::default(), check, async |mut fake| {
        for _ in 0..10 {
            fake.request().await;
        }
        // In the middle of a head.
        fake.send(&[0x66, 0x8e]).await;
    })
    .await;
}

#[tokio::test]
async fn a_reply_that_never_comes_is_a_timeout_and_may_come_late() {
    let setup = Setup { timeout: Some(Duration::from_millis(1500)), ..Setup::default() };
    let check = async |client: provider_nbd::Client| {
        let begin = Instant::now();
        assert!(matches!(client.read(0, 100).await, Err(Error::Timeout)));
        assert!(begin.elapsed() >= Duration::from_millis(1500));
        // The connection is still good, and the late reply goes nowhere.
        assert_eq!(&client.read(4096, 100).await.unwrap()[..], [2; 100]);
    };
    play(setup, check, async |mut fake| {
        let late = fake.request().await;
        let next = fake.request().await;
        assert_eq!(next.offset, 4096);
        fake.data(&late, 0, &[1; 100], chunk::DONE).await;
        fake.data(&next, 0, &[2; 100], chunk::DONE).await;
    })
    .await;
}

#[tokio::test]
async fn requests_without_answers_are_bounded() {
    let setup = Setup { timeout: Some(Duration::from_secs(1)), ..Setup::default() };
    let check = async |client: provider_nbd::Client| {
        let reads = (0..1000u64).map(|n| client.read(n * 512, 512));
        for result in futures_util::future::join_all(reads).await {
            assert!(matches!(result, Err(Error::Timeout)), "{result:?}");
        }
        assert!(matches!(client.disconnect().await, Err(Error::Timeout)));
    };
    play(setup, check, async |mut fake| {
        let mut seen = 0;
        while fake.next().await.is_some() {
            seen += 1;
        }
        assert_eq!(seen, 64, "requests on the wire");
    })
    .await;
}

#[tokio::test]
async fn a_server_that_does_not_read_cannot_hold_a_caller() {
    let setup = Setup { timeout: Some(Duration::from_millis(200)), ..Setup::default() };
    let check = async |client: provider_nbd::Client| {
        let data = Bytes::from(vec![1; 8 << 20]);
        assert!(matches!(client.write(0, data, false).await, Err(Error::Timeout)));
        assert!(matches!(client.disconnect().await, Err(Error::Timeout)));
    };
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let check = async |client| {
        check(client).await;
        sender.send(()).unwrap();
    };
    play(setup, check, async |fake| {
        receiver.await.unwrap();
        drop(fake);
    })
    .await;
}

#[tokio::test]
async fn a_dropped_future_leaves_the_connection_in_order() {
    let check = async |client: provider_nbd::Client| {
        for n in 0..20u64 {
            let abandoned = client.read(n * 4096, 4096);
            let never = std::future::ready(());
            // Polled once, so the request is on its way, then dropped.
            tokio::select! { biased; _ = abandoned => panic!("no answer yet"), () = never => {} }
        }
        client.write_zeroes(0, 512, ZeroOptions::default()).await.unwrap();
    };
    play(Setup::default(), check, async |mut fake| {
        let mut requests = Vec::new();
        for _ in 0..21 {
            requests.push(fake.request().await);
        }
        for request in &requests[..20] {
            fake.data(request, 0, &[9; 4096], chunk::DONE).await;
        }
        fake.done(&requests[20]).await;
    })
    .await;
}

#[tokio::test]
async fn an_endless_error_reply_keeps_nothing() {
    let check = async |client: provider_nbd::Client| {
        let error = client.flush().await.unwrap_err();
        assert_eq!(error.errno(), Some(Errno::EIO), "the first error counts");
    };
    play(Setup::default(), check, async |mut fake| {
        let request = fake.request().await;
        let mut payload = BytesMut::new();
        payload.put_u32(5);
        payload.put_u16(u16::MAX);
        payload.put_bytes(b'y', usize::from(u16::MAX));
        fake.chunk(&request, chunk::ERROR, 0, &payload).await;
        payload[3] = 22;
        for _ in 0..100 {
            fake.chunk(&request, chunk::ERROR, 0, &payload).await;
        }
        fake.done(&request).await;
    })
    .await;
}
