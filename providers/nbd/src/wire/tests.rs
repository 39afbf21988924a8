// SPDX-License-Identifier: MIT OR Apache-2.0
//! Arbitrary bytes never panic, and what is written is read back the same.

use bytes::BytesMut;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

fn written(put: impl FnOnce(&mut BytesMut)) -> BytesMut {
    let mut out = BytesMut::new();
    put(&mut out);
    out
}

/// Lengths that the form of the mode can carry.
fn fitting(length: u64, mode: Mode) -> u64 {
    if mode == Mode::Extended { length } else { length & u64::from(u32::MAX) }
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..200), kind in any::<u16>()) {
        let _ = Greeting::parse(&bytes);
        let _ = OptionRequest::parse(&bytes);
        let _ = OptionReply::parse(&bytes);
        let _ = ExportQuery::parse(&bytes);
        let _ = MetaQuery::parse(&bytes);
        let _ = parse_meta_context(&bytes);
        let _ = ServerEntry::parse(&bytes);
        let _ = Info::parse(&bytes);
        let _ = parse_export_name_reply(&bytes);
        let _ = parse_data_offset(&bytes);
        let _ = parse_hole(&bytes);
        let _ = ErrorPayload::parse(&bytes, kind);
        let _ = StatusPayload::parse(&bytes, false);
        let _ = StatusPayload::parse(&bytes, true);
        for mode in MODES {
            let _ = Request::parse(&bytes, mode);
            let _ = Reply::parse(&bytes, mode);
        }
        prop_assert!(!printable(&bytes).contains(char::is_control));
    }

    #[test]
    fn bytes_after_a_right_magic_never_panic(bytes in vec(any::<u8>(), 0..60)) {
        for magic in [MAGIC_REPLY_SIMPLE, MAGIC_REPLY_STRUCTURED, MAGIC_REPLY_EXTENDED] {
            let all = [&magic.to_be_bytes()[..], &bytes].concat();
            for mode in MODES {
                let parsed = Reply::parse(&all, mode);
                let enough = reply_len(magic, mode).is_ok_and(|len| all.len() >= len);
                prop_assert_eq!(parsed.is_ok(), enough);
            }
        }
    }

    #[test]
    fn requests_round_trip(
        flags in any::<u16>(), command in any::<u16>(), cookie in any::<u64>(),
        offset in any::<u64>(), length in any::<u64>(),
    ) {
        for mode in MODES {
            let request = Request { flags, command, cookie, offset, length: fitting(length, mode) };
            let bytes = written(|out| request.put(out, mode));
            let len = if mode == Mode::Extended { Request::LEN_EXTENDED } else { Request::LEN };
            prop_assert_eq!(bytes.len(), len);
            prop_assert_eq!(Request::parse(&bytes, mode), Ok(request));
            prop_assert!(Request::parse(&bytes[..len - 1], mode).is_err());
        }
    }

    #[test]
    fn replies_round_trip(
        flags in any::<u16>(), kind in any::<u16>(), cookie in any::<u64>(),
        offset in any::<u64>(), length in any::<u64>(), error in any::<u32>(),
    ) {
        for mode in [Mode::Structured, Mode::Extended] {
            let offset = if mode == Mode::Extended { offset } else { 0 };
            let length = fitting(length, mode);
            let reply = Reply::Chunk(Chunk { flags, kind, cookie, offset, length });
            let bytes = written(|out| reply.put(out, mode));
            prop_assert_eq!(Reply::parse(&bytes, mode), Ok(reply));
        }
        let reply = Reply::Simple { error, cookie };
        let bytes = written(|out| reply.put(out, Mode::Simple));
        prop_assert_eq!(Reply::parse(&bytes, Mode::Simple), Ok(reply));
        prop_assert_eq!(Reply::parse(&bytes, Mode::Structured), Ok(reply));
        prop_assert!(Reply::parse(&bytes, Mode::Extended).is_err());
    }

    #[test]
    fn status_round_trips(context in any::<u32>(), extents in vec(any::<(u32, u32)>(), 1..40)) {
        let extents = extents.into_iter().map(|(l, f)| (u64::from(l), u64::from(f))).collect();
        let payload = StatusPayload { context, extents };
        for wide in [false, true] {
            let bytes = written(|out| payload.put(out, wide));
            prop_assert_eq!(StatusPayload::parse(&bytes, wide), Ok(payload.clone()));
            prop_assert!(StatusPayload::parse(&bytes[..bytes.len() - 1], wide).is_err());
        }
    }

    #[test]
    fn errors_round_trip(
        error in 1..u32::MAX, message in "[a-zA-Z0-9 äß]{0,100}", offset in any::<Option<u64>>(),
    ) {
        let payload = ErrorPayload { error, message, offset };
        let kind = if offset.is_some() { chunk::ERROR_OFFSET } else { chunk::ERROR };
        let bytes = written(|out| payload.put(out));
        prop_assert_eq!(ErrorPayload::parse(&bytes, kind), Ok(payload));
    }

    #[test]
    fn options_round_trip(
        export in "[a-z0-9/:]{0,50}", queries in vec("[a-z:]{0,30}", 0..10),
        infos in vec(any::<u16>(), 0..10), description in "[a-zA-Z ]{0,50}",
        option in any::<u32>(), kind in any::<u32>(), length in 0..=MAX_OPTION_REPLY,
        size_bytes in any::<u64>(), flags in any::<u16>(),
    ) {
        let query = MetaQuery { export: export.clone(), queries };
        prop_assert_eq!(MetaQuery::parse(&written(|out| query.put(out))), Ok(query));
        let query = ExportQuery { export: export.clone(), infos };
        prop_assert_eq!(ExportQuery::parse(&written(|out| query.put(out))), Ok(query));
        let entry = ServerEntry { name: export, description };
        prop_assert_eq!(ServerEntry::parse(&written(|out| entry.put(out))), Ok(entry));
        let head = OptionRequest { option, length };
        prop_assert_eq!(OptionRequest::parse(&written(|out| head.put(out))), Ok(head));
        let head = OptionReply { option, kind, length };
        prop_assert_eq!(OptionReply::parse(&written(|out| head.put(out))), Ok(head));
        let facts = Info::Export { size_bytes, flags };
        prop_assert_eq!(Info::parse(&written(|out| facts.put(out))), Ok(facts));
        let sizes = Info::BlockSize(BlockSizes { min: option, preferred: kind, max: length });
        prop_assert_eq!(Info::parse(&written(|out| sizes.put(out))), Ok(sizes));
        let greeting = Greeting { flags };
        prop_assert_eq!(Greeting::parse(&written(|out| greeting.put(out))), Ok(greeting));
        let answer = export_name_reply(size_bytes, flags);
        prop_assert_eq!(parse_export_name_reply(&answer), Ok((size_bytes, flags)));
    }
}

#[test]
fn counts_are_checked_against_the_data() {
    // A query that promises four thousand million strings.
    let bytes = [&0u32.to_be_bytes()[..], &u32::MAX.to_be_bytes()].concat();
    assert!(MetaQuery::parse(&bytes).is_err());
    // A message longer than its chunk: a client written against the same server once died of it.
    let bytes = [&5u32.to_be_bytes()[..], &9u16.to_be_bytes(), b"short"].concat();
    assert!(ErrorPayload::parse(&bytes, chunk::ERROR).is_err());
    assert!(ErrorPayload::parse(&5u32.to_be_bytes(), chunk::ERROR).is_err());
    assert!(ErrorPayload::parse(&[0; 6], chunk::ERROR).is_err());
    let long = OptionReply { option: 7, kind: 1, length: MAX_OPTION_REPLY + 1 };
    assert!(OptionReply::parse(&written(|out| long.put(out))).is_err());
}

#[test]
fn untrusted_text_is_made_printable_and_short() {
    assert_eq!(printable(b"a\x1b[31mb\nc"), "a [31mb c");
    assert_eq!(printable(&[b'x'; 100_000]).len(), 512);
    assert_eq!(printable(&[0xff, b'a']), "\u{fffd}a");
}
