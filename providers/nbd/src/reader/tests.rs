// SPDX-License-Identifier: MIT OR Apache-2.0
//! Streams of arbitrary and of nearly right replies: the reader never panics and always ends.

use bytes::{Bytes, BytesMut};
use proptest::collection::vec;
use proptest::prelude::*;
use tokio::sync::oneshot;

use super::*;
use crate::pending::{Answer, StatusBody};
use crate::wire::put_data_offset;

type Waiting = oneshot::Receiver<Result<Answer>>;

/// A table with a read, a flush and a block status query, with cookies 1, 2 and 3.
fn table() -> (Arc<Table>, Vec<Waiting>) {
    let table = Arc::new(Table::new());
    let bodies = [
        (command::READ, Body::Read(ReadBody::new(BytesMut::new(), 512))),
        (command::FLUSH, Body::Plain),
        (command::BLOCK_STATUS, Body::Status(StatusBody::new(4096, 512, 9, vec![8, 9]))),
    ];
    let waiting = bodies.into_iter().map(|(command, body)| {
        let slot = Arc::clone(&table.slots).try_acquire_owned().unwrap();
        let (answer, receiver) = oneshot::channel();
        let pending =
            Pending { command, offset: 4096, len: 512, body, error: None, answer, _slot: slot };
        table.insert(pending).unwrap();
        receiver
    });
    let waiting = waiting.collect();
    (table, waiting)
}

/// Feeds a whole stream and returns why the reader ended and what the requests got.
fn feed(bytes: &[u8], mode: Mode) -> (Error, Vec<Result<Answer>>) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let (table, waiting) = table();
        let reason = Reader::new(bytes, Arc::clone(&table), mode).run().await;
        table.close(reason.clone());
        let mut answers = Vec::new();
        for receiver in waiting {
            answers.push(receiver.await.expect("every request gets an answer"));
        }
        (reason, answers)
    })
}

/// A chunk whose fields are plausible: near the requests, with payloads of every kind.
fn plausible(mode: Mode) -> impl Strategy<Value = Bytes> {
    let kinds = prop_oneof![
        Just(chunk::NONE),
        Just(chunk::OFFSET_DATA),
        Just(chunk::OFFSET_HOLE),
        Just(chunk::BLOCK_STATUS),
        Just(chunk::BLOCK_STATUS_EXT),
        Just(chunk::ERROR),
        Just(chunk::ERROR_OFFSET),
        any::<u16>(),
    ];
    let numbers = vec(prop_oneof![0u32..12, 4090u32..4620, any::<u32>()], 0..6);
    (kinds, 0u64..5, 0u16..3, numbers, 0usize..600, any::<Option<u32>>()).prop_map(
        move |(kind, cookie, flags, numbers, zeroes, lie)| {
            let mut payload = BytesMut::new();
            for number in numbers {
                payload.put_u32(number);
            }
            if kind == chunk::OFFSET_DATA {
                payload.clear();
                put_data_offset(&mut payload, 4096 + u64::from(flags) * 100);
                payload.put_bytes(7, zeroes);
            }
            let length = lie.filter(|n| n % 8 == 0).map_or(payload.len() as u64, u64::from);
            let mut out = BytesMut::new();
            Reply::Chunk(Chunk { flags, kind, cookie, offset: 4096, length }).put(&mut out, mode);
            out.extend_from_slice(&payload);
            out.freeze()
        },
    )
}

proptest! {
    #[test]
    fn arbitrary_streams_end_cleanly(bytes in vec(any::<u8>(), 0..300)) {
        for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
            let (reason, _) = feed(&bytes, mode);
            prop_assert!(reason.is_fatal());
        }
    }

    #[test]
    fn plausible_streams_end_cleanly(
        structured in vec(plausible(Mode::Structured), 0..8),
        extended in vec(plausible(Mode::Extended), 0..8),
    ) {
        for (chunks, mode) in [(structured, Mode::Structured), (extended, Mode::Extended)] {
            let (reason, answers) = feed(&chunks.concat(), mode);
            prop_assert!(reason.is_fatal());
            for answer in answers.into_iter().flatten() {
                match answer {
                    Answer::Data(data) => prop_assert_eq!(data.len(), 512),
                    Answer::Status(extents) => {
                        prop_assert!(!extents.is_empty());
                        prop_assert!(extents.iter().all(|e| e.len > 0 && e.end() <= 4608));
                    }
                    Answer::Done => {}
                }
            }
        }
    }
}

#[test]
fn simple_replies_carry_data_only_in_simple_mode() {
    let mut bytes = BytesMut::new();
    Reply::Simple { error: 0, cookie: 2 }.put(&mut bytes, Mode::Simple);
    Reply::Simple { error: 0, cookie: 1 }.put(&mut bytes, Mode::Simple);
    bytes.put_bytes(3, 512);
    let (reason, answers) = feed(&bytes, Mode::Simple);
    assert!(matches!(reason, Error::Disconnected), "{reason:?}");
    assert!(matches!(&answers[0], Ok(Answer::Data(data)) if data[..] == [3; 512]));
    assert!(matches!(answers[1], Ok(Answer::Done)));
    let (reason, answers) = feed(&bytes, Mode::Structured);
    assert!(matches!(reason, Error::Protocol(_)), "{reason:?}");
    assert!(matches!(answers[0], Err(Error::Protocol(_))));
    assert!(matches!(answers[1], Ok(Answer::Done)));
}
