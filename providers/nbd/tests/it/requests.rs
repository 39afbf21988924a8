// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the client puts on the wire, and answers in unusual but right forms.

use bytes::{Bytes, BytesMut};
use provider_nbd::wire::{BlockSizes, Mode, Reply, chunk, command, command_flag, flag, put_hole};
use provider_nbd::{Client, Error, Extent, Options, ZeroOptions};

use crate::fake::{Fake, Listener, Setup, TEST_LIMIT, play};

#[tokio::test]
async fn chunks_may_come_in_any_order() {
    let check = async |client: Client| {
        let mut expected = vec![1; 300];
        expected[100..200].fill(0);
        expected[200..].fill(3);
        assert_eq!(client.read(5000, 300).await.unwrap(), expected);
    };
    play(Setup::default(), check, async |mut fake| {
        let request = fake.request().await;
        fake.data(&request, 200, &[3; 100], 0).await;
        fake.data(&request, 0, &[1; 100], 0).await;
        let mut payload = BytesMut::new();
        put_hole(&mut payload, request.offset + 100, 100);
        fake.chunk(&request, chunk::OFFSET_HOLE, 0, &payload).await;
        fake.done(&request).await;
    })
    .await;
}

#[tokio::test]
async fn large_requests_are_split_at_the_maximum() {
    let block = Some(BlockSizes { min: 512, preferred: 4096, max: 10_000 });
    let setup = Setup { block, ..Setup::default() };
    let check = async |client: Client| {
        assert_eq!(client.block_size().max, 9728, "rounded down to the minimum");
        let prefix = BytesMut::from(&b"head"[..]);
        let data = client.read_into(1024, 20_480, prefix).await.unwrap();
        assert_eq!(data.len(), 4 + 20_480);
        assert_eq!(&data[..4], b"head");
        for (n, block) in data[4..].chunks(512).enumerate() {
            assert!(block.iter().all(|&byte| byte == n as u8 + 2), "block {n}");
        }
        let data = Bytes::from((0..20_480u32).map(|n| (n / 512) as u8).collect::<Vec<_>>());
        client.write(512, data, true).await.unwrap();
    };
    play(setup, check, async |mut fake| {
        let mut lengths = Vec::new();
        for _ in 0..3 {
            let request = fake.request().await;
            assert_eq!((request.command, request.flags), (command::READ, 0));
            let first = request.offset / 512;
            let data: Vec<u8> = (0..request.length).map(|n| (first + n / 512) as u8).collect();
            fake.data(&request, 0, &data, chunk::DONE).await;
            lengths.push(request.length);
        }
        assert_eq!(lengths, [9728, 9728, 1024]);
        for _ in 0..3 {
            let (request, payload) = fake.next().await.unwrap();
            assert_eq!((request.command, request.flags), (command::WRITE, command_flag::FUA));
            let expected = (0..request.length).map(|n| ((request.offset - 512 + n) / 512) as u8);
            assert!(payload.into_iter().eq(expected));
            fake.done(&request).await;
        }
    })
    .await;
}

#[tokio::test]
async fn the_minimum_block_size_is_respected() {
    let block = Some(BlockSizes { min: 4096, preferred: 4096, max: 1 << 20 });
    let contexts = vec!["a:b".to_owned()];
    let setup = Setup { block, contexts, size_bytes: 10_000, ..Setup::default() };
    let check = async |client: Client| {
        let data = client.read_into(5000, 4000, BytesMut::from(&b"ab"[..])).await.unwrap();
        assert_eq!(&data[..2], b"ab");
        assert_eq!(data[2..], [7; 4000]);
        let extents = client.block_status("a:b", 5000, 3500).await.unwrap();
        assert_eq!(
            extents,
            [
                Extent { offset: 5000, len: 3192, flags: 1 },
                Extent { offset: 8192, len: 308, flags: 0 }
            ]
        );
        for result in [
            client.write(5000, Bytes::from(vec![0; 4096]), false).await,
            client.trim(0, 100).await,
            client.write_zeroes(4096, 1, ZeroOptions::default()).await,
        ] {
            let error = result.unwrap_err();
            assert!(error.to_string().contains("block size of 4096"), "{error}");
        }
    };
    play(setup, check, async |mut fake| {
        let request = fake.request().await;
        assert_eq!((request.offset, request.length), (4096, 5904), "up to the end of the export");
        fake.data(&request, 0, &[7; 5904], chunk::DONE).await;
        let request = fake.request().await;
        assert_eq!((request.offset, request.length), (4096, 5904));
        fake.status(&request, 0, &[(4096, 1), (8192, 0)], chunk::DONE).await;
    })
    .await;
}

#[tokio::test]
async fn long_lengths_depend_on_the_headers() {
    for (mode, expected) in [(Mode::Structured, 10), (Mode::Extended, 1)] {
        let setup = Setup { mode, ..Setup::default() };
        let options = ZeroOptions { no_hole: true, fua: true, fast_only: false };
        let check = async |client: Client| {
            client.trim(0, 10 << 30).await.unwrap();
            client.write_zeroes(1 << 30, 10 << 30, options).await.unwrap();
        };
        play(setup, check, async |mut fake| {
            for (command, flags) in [
                (command::TRIM, 0),
                (command::WRITE_ZEROES, command_flag::FUA | command_flag::NO_HOLE),
            ] {
                let mut total = 0;
                for _ in 0..expected {
                    let request = fake.request().await;
                    assert_eq!((request.command, request.flags), (command, flags));
                    total += request.length;
                    fake.done(&request).await;
                }
                assert_eq!(total, 10 << 30);
            }
        })
        .await;
    }
}

#[tokio::test]
async fn one_of_several_contexts_is_selected_where_the_server_can() {
    let contexts = vec!["a:b".to_owned(), "c:d".to_owned()];
    let flags = Setup::default().flags | flag::BLOCK_STATUS_PAYLOAD;
    let setup = Setup { mode: Mode::Extended, flags, contexts, ..Setup::default() };
    let check = async |client: Client| {
        assert_eq!(client.contexts(), ["a:b", "c:d"]);
        let extents = client.block_status("c:d", 512, 1 << 39).await.unwrap();
        assert_eq!(extents, [Extent { offset: 512, len: 1 << 39, flags: 1 << 40 }]);
        let unknown = client.block_status("e:f", 0, 512).await;
        assert!(matches!(unknown, Err(Error::Invalid(_))), "{unknown:?}");
    };
    play(setup, check, async |mut fake| {
        let (request, payload) = fake.next().await.unwrap();
        assert_eq!(request.flags, command_flag::PAYLOAD_LEN);
        assert_eq!((request.offset, request.length), (512, 12));
        assert_eq!(payload, [&(1u64 << 39).to_be_bytes()[..], &1u32.to_be_bytes()].concat());
        fake.status(&request, 1, &[(1 << 39, 1 << 40)], chunk::DONE).await;
    })
    .await;
}

#[tokio::test]
async fn extents_are_joined_over_queries_and_cover_the_range() {
    let setup = Setup { contexts: vec!["a:b".to_owned()], ..Setup::default() };
    let check = async |client: Client| {
        let mut extents = client.extents("a:b", 1000, 5000);
        let mut all = Vec::new();
        while let Some(extent) = extents.next().await.unwrap() {
            all.push(extent);
        }
        let expected = [(1000, 1500, 1), (2500, 500, 0), (3000, 3000, 1)];
        assert_eq!(all, expected.map(|(offset, len, flags)| Extent { offset, len, flags }));
        let mut outside = client.extents("a:b", u64::MAX - 5, 10);
        assert!(matches!(outside.next().await, Err(Error::Invalid(_))));
        assert_eq!(client.extents("a:b", 7, 0).next().await.unwrap(), None);
    };
    play(setup, check, async |mut fake| {
        let answers: [&[(u64, u64)]; 4] =
            [&[(1000, 1)], &[(500, 1)], &[(500, 0), (1000, 1)], &[(1 << 20, 1)]];
        for answer in answers {
            let request = fake.request().await;
            assert_eq!(request.offset + request.length, 6000);
            fake.status(&request, 0, answer, chunk::DONE).await;
        }
    })
    .await;
}

#[tokio::test]
async fn what_the_export_cannot_do_is_refused_before_it_is_sent() {
    let setup = Setup { flags: flag::HAS_FLAGS, size_bytes: 1000, ..Setup::default() };
    let check = async |client: Client| {
        let data = Bytes::from_static(b"data");
        let results = [
            client.flush().await,
            client.trim(0, 10).await,
            client.write_zeroes(0, 10, ZeroOptions::default()).await,
            client.write(0, data.clone(), true).await,
            client.write(998, data, false).await,
            client.read(999, 2).await.map(drop),
            client.read(u64::MAX, 2).await.map(drop),
            client.block_status("a:b", 0, 1).await.map(drop),
        ];
        for result in results {
            assert!(matches!(result, Err(Error::Invalid(_))), "{result:?}");
        }
        assert_eq!(client.read(1000, 0).await.unwrap(), b""[..]);
        client.disconnect().await.unwrap();
    };
    play(setup, check, async |mut fake| {
        assert_eq!(fake.request().await.command, command::DISC);
    })
    .await;
}

#[tokio::test]
async fn fua_becomes_a_flush_where_the_server_has_only_that() {
    let flags = flag::HAS_FLAGS | flag::SEND_FLUSH;
    let check = async |client: Client| {
        client.write(0, Bytes::from_static(b"data"), true).await.unwrap();
    };
    play(Setup { flags, ..Setup::default() }, check, async |mut fake| {
        let request = fake.request().await;
        assert_eq!((request.command, request.flags), (command::WRITE, 0));
        // Nothing but a read must be answered in structure.
        let mut out = BytesMut::new();
        Reply::Simple { error: 0, cookie: request.cookie }.put(&mut out, Mode::Simple);
        fake.send(&out).await;
        let request = fake.request().await;
        assert_eq!(request.command, command::FLUSH);
        fake.done(&request).await;
    })
    .await;
}

#[tokio::test]
async fn the_last_clone_says_goodbye_in_the_background() {
    let check = async |client: Client| {
        let clone = client.clone();
        drop(client);
        assert_eq!(clone.read(0, 4).await.unwrap(), b"data"[..]);
    };
    play(Setup::default(), check, async |mut fake| {
        let request = fake.request().await;
        fake.data(&request, 0, b"data", chunk::DONE).await;
        assert_eq!(fake.request().await.command, command::DISC);
        assert!(fake.next().await.is_none(), "the client has closed");
    })
    .await;
}

async fn connect_many(setup: &Setup, expected: usize) -> (Client, Vec<Fake>) {
    let listener = Listener::new();
    let serve = async {
        let mut fakes = Vec::new();
        for _ in 0..expected {
            fakes.push(Fake::negotiate(listener.accept().await, setup).await);
        }
        fakes
    };
    let options = Options { connections: 4, ..Options::default() };
    let connect = Client::connect_unix(&listener.path, "", options);
    let (client, fakes) = tokio::join!(connect, serve);
    let client = client.expect("the client connects");
    assert_eq!(client.connections(), expected);
    (client, fakes)
}

#[tokio::test]
async fn connections_are_as_many_as_the_server_allows() {
    for (extra, expected) in [(0, 1), (flag::CAN_MULTI_CONN, 4)] {
        let setup = Setup { flags: Setup::default().flags | extra, ..Setup::default() };
        let (client, mut fakes) = connect_many(&setup, expected).await;
        let reads = (0..expected as u64).map(|n| client.read(n, 1));
        let answer = async {
            // One request on each: they are spread.
            for fake in &mut fakes {
                let request = fake.request().await;
                fake.data(&request, 0, &[request.offset as u8], chunk::DONE).await;
            }
        };
        let all = async { tokio::join!(futures_util::future::join_all(reads), answer) };
        let (results, ()) = tokio::time::timeout(TEST_LIMIT, all).await.unwrap();
        for (n, result) in results.into_iter().enumerate() {
            assert_eq!(result.unwrap()[..], [n as u8]);
        }
    }
}

#[tokio::test]
async fn the_other_connections_survive_the_loss_of_some() {
    let flags = Setup::default().flags | flag::CAN_MULTI_CONN;
    let (client, mut fakes) = connect_many(&Setup { flags, ..Setup::default() }, 4).await;
    let mut last = fakes.pop().unwrap();
    drop(fakes);
    let answer = async {
        let request = last.request().await;
        last.data(&request, 0, b"x", chunk::DONE).await;
    };
    let read = async {
        loop {
            // The loss of a connection is noticed when it is used, or before.
            match client.read(0, 1).await {
                Ok(data) => break data,
                Err(error) => assert!(matches!(error, Error::Disconnected), "{error:?}"),
            }
        }
    };
    let both = async { tokio::join!(read, answer) };
    let (data, ()) = tokio::time::timeout(TEST_LIMIT, both).await.unwrap();
    assert_eq!(data, b"x"[..]);
}
