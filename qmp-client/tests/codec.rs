// SPDX-License-Identifier: MIT OR Apache-2.0
//! The codec under arbitrary bytes.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support;

use proptest::{collection::vec, prelude::*};
use qmp_client::codec::{self, Frame, Framer, IdSpace};
use serde_json::{Value, json};
use support::{pair, soon};

/// Bytes that come near to messages more often than uniform ones do.
fn hostile_bytes() -> impl Strategy<Value = Vec<u8>> {
    let pieces = prop_oneof![
        vec(any::<u8>(), 0..40),
        Just(b"\n".to_vec()),
        Just(b"\r\n".to_vec()),
        Just(b"{\"return\": {}, \"id\": \"qc-0000000000000007-1\"}\n".to_vec()),
        Just(b"{\"error\": {\"class\": 1}}\n".to_vec()),
        Just(b"{\"event\": \"A\", \"data\": [[[[".to_vec()),
        Just(b"{\"QMP\": {\"version\": {\"qemu\": {\"major\": -1}}}}\n".to_vec()),
        Just(b"\"id\": \"qc-0000000000000007-99999999999999999999\"".to_vec()),
        Just(b"\xff\xf0\x90\\ud800".to_vec()),
        Just(b"1e999999,".to_vec()),
    ];
    vec(pieces, 0..30).prop_map(|pieces| pieces.concat())
}

/// What the framer must give: lines by `split`, those too long only by their length.
fn expected_frames(bytes: &[u8], max: usize) -> Vec<Result<Vec<u8>, u64>> {
    let mut lines: Vec<&[u8]> = bytes.split(|&byte| byte == b'\n').collect();
    lines.pop();
    let one = |line: &[u8]| {
        if line.len() > max {
            return Err(line.len() as u64);
        }
        Ok(line.strip_suffix(b"\r").unwrap_or(line).to_vec())
    };
    lines.into_iter().map(one).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 500, ..Default::default() })]

    #[test]
    fn lines_do_not_depend_on_how_the_bytes_arrive(
        bytes in hostile_bytes(),
        cuts in vec(1_usize..700, 1..40),
        max in prop_oneof![0_usize..40, 500_usize..1200],
    ) {
        let mut framer = Framer::new(max);
        let mut seen = Vec::new();
        let mut rest = bytes.as_slice();
        for cut in cuts.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at((*cut).min(rest.len()));
            rest = later;
            framer.push(now);
            while let Some(frame) = framer.next_frame() {
                seen.push(match frame {
                    Frame::Line(line) => Ok(line),
                    Frame::Oversize { length_bytes, head, tail } => {
                        prop_assert!(head.len() <= 512 && tail.len() <= 512);
                        Err(length_bytes)
                    }
                });
            }
            prop_assert!(framer.incomplete().len() <= max.max(512));
        }
        prop_assert_eq!(seen, expected_frames(&bytes, max));
    }

    #[test]
    fn no_bytes_make_the_parser_panic(bytes in hostile_bytes()) {
        let ids = IdSpace::new(7);
        let _ = ids.find(&bytes);
        let _ = codec::excerpt(&bytes);
        let _ = codec::parse(&bytes);
        for line in bytes.split(|&byte| byte == b'\n') {
            let _ = codec::parse(line);
        }
    }

    #[test]
    fn a_command_is_one_line_that_reads_back(name in ".*", text in ".*", id in ".*") {
        let arguments = json!({ "text": text });
        let line = codec::encode(&name, &arguments, Some(&id));
        prop_assert_eq!(line.iter().filter(|&&byte| byte == b'\n').count(), 1);
        let back: Value = serde_json::from_slice(&line).unwrap();
        prop_assert_eq!(back, json!({"execute": name, "arguments": arguments, "id": id}));
    }
}

#[test]
fn a_session_survives_hostile_bytes_or_closes() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let config = ProptestConfig { failure_persistence: None, cases: 100, ..Default::default() };
    proptest!(config, |(bytes in hostile_bytes())| {
        runtime.block_on(async {
            let (session, mut peer) = pair().await;
            peer.send_raw(&bytes).await;
            peer.send_raw(b"\n").await;
            let script = async {
                if let Some(command) = peer.try_read().await {
                    peer.reply(&command, json!("ok")).await;
                }
            };
            let call = session.execute_raw("x", Value::Null, None);
            let (result, ()) = soon(async { tokio::join!(call, script) }).await;
            assert!(session.is_closed() || result.unwrap() == "ok");
        });
    });
}
