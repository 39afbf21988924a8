// SPDX-License-Identifier: MIT OR Apache-2.0
//! `nbdkit` as the server: its filters make faults, delays and odd block sizes.

use std::time::{Duration, Instant};

use bytes::Bytes;
use provider_nbd::wire::Mode;
use provider_nbd::{Client, Errno, Error, Options, Result, ZeroOptions, context};

use crate::peer::{Peer, pattern, temp_dir};

fn nbdkit(args: &[&str]) -> Peer {
    Peer::start("nbdkit", temp_dir(), |_, socket| {
        let mut all = vec!["-f".to_owned(), "--exit-with-parent".into(), "-U".into(), socket];
        all.extend(args.iter().map(|&arg| arg.to_owned()));
        all
    })
}

async fn round_trip(client: &Client) -> Result<()> {
    let data = Bytes::from(pattern(2, 3 << 20));
    client.write(1 << 20, data.clone(), false).await?;
    assert!(client.read(1 << 20, data.len()).await? == data, "content");
    client.write_zeroes(2 << 20, 1 << 20, ZeroOptions::default()).await?;
    client.trim(3 << 20, 1 << 20).await?;
    let read = client.read(1 << 20, 3 << 20).await?;
    assert!(read[..1 << 20] == data[..1 << 20] && read[1 << 20..].iter().all(|&byte| byte == 0));
    Ok(())
}

#[tokio::test]
async fn memory_is_written_and_read() {
    let peer = nbdkit(&["memory", "64M"]);
    let client = peer.connect("", &[context::BASE_ALLOCATION]).await;
    assert_eq!(client.connections(), 4);
    round_trip(&client).await.unwrap();
    let mut extents = client.extents(context::BASE_ALLOCATION, 0, client.size_bytes());
    let mut data_bytes = 0;
    while let Some(extent) = extents.next().await.unwrap() {
        data_bytes += if extent.flags & context::ZERO == 0 { extent.len } else { 0 };
    }
    assert_eq!(data_bytes, 1 << 20);
    client.disconnect().await.unwrap();
}

#[tokio::test]
async fn simple_replies_are_enough() {
    let peer = nbdkit(&["--no-sr", "memory", "64M"]);
    let client = peer.connect("", &[]).await;
    assert_eq!(client.mode(), Mode::Simple);
    round_trip(&client).await.unwrap();
}

#[tokio::test]
async fn errors_carry_their_number() {
    let peer = nbdkit(&[
        "--filter=error",
        "memory",
        "64M",
        "error-pread=ENOSPC",
        "error-pread-rate=100%",
        "error-zero=EPERM",
        "error-zero-rate=1",
    ]);
    let client = peer.connect("", &[]).await;
    let error = client.read(512, 1024).await.unwrap_err();
    assert_eq!(error.errno(), Some(Errno::ENOSPC), "{error:?}");
    assert!(error.to_string().contains("read of 1024 bytes at offset 512"), "{error}");
    let error = client.write_zeroes(0, 512, ZeroOptions::default()).await.unwrap_err();
    assert_eq!(error.errno(), Some(Errno::EPERM), "{error:?}");
    client.write(0, Bytes::from_static(b"still alive"), false).await.unwrap();
    client.disconnect().await.unwrap();
}

#[tokio::test]
async fn some_of_many_requests_fail_and_the_others_do_not() {
    let peer = nbdkit(&["--filter=error", "pattern", "1G", "error=EIO", "error-rate=20%"]);
    let client = peer.connect("", &[]).await;
    let (mut good, mut bad) = (0, 0);
    let reads = (0..400u64).map(|n| client.read(n << 20, 4096));
    for (n, result) in futures_util::future::join_all(reads).await.into_iter().enumerate() {
        match result {
            Ok(data) => {
                for (word, bytes) in data.chunks(8).enumerate() {
                    let offset = ((n as u64) << 20) + 8 * word as u64;
                    assert_eq!(bytes, offset.to_be_bytes());
                }
                good += 1;
            }
            Err(error) => {
                assert_eq!(error.errno(), Some(Errno::EIO), "{error:?}");
                bad += 1;
            }
        }
    }
    assert!(good > 0 && bad > 0, "{good} good, {bad} bad");
}

#[tokio::test]
async fn a_slow_server_answers_many_at_once_and_a_stuck_one_times_out() {
    let peer = nbdkit(&["--filter=delay", "memory", "64M", "delay-read=500ms", "delay-write=20"]);
    let client = peer.connect("", &[]).await;
    let begin = Instant::now();
    let reads = (0..32u64).map(|n| client.read(n * 4096, 4096));
    for result in futures_util::future::join_all(reads).await {
        result.unwrap();
    }
    assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());

    let options = Options { timeout: Some(Duration::from_millis(500)), ..Options::default() };
    let client = Client::connect_unix(peer.socket(), "", options).await.unwrap();
    let error = client.write(0, Bytes::from_static(b"never"), false).await.unwrap_err();
    assert!(matches!(error, Error::Timeout), "{error:?}");
    let begin = Instant::now();
    assert!(matches!(client.disconnect().await, Err(Error::Timeout)));
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn block_sizes_are_respected() {
    let peer = nbdkit(&[
        "--filter=blocksize-policy",
        "memory",
        "64M",
        "blocksize-minimum=4K",
        "blocksize-preferred=64K",
        "blocksize-maximum=128K",
        "blocksize-error-policy=error",
    ]);
    let client = peer.connect("", &[]).await;
    let block = client.block_size();
    assert_eq!((block.min, block.preferred, block.max), (4096, 65_536, 131_072));
    // Large ones are split, odd reads are widened; the policy would fail anything else.
    round_trip(&client).await.unwrap();
    let data = client.read(1 << 20, 3 << 20).await.unwrap();
    let odd = client.read((1 << 20) + 1, 300_000).await.unwrap();
    assert!(odd == data[1..300_001], "odd range");
    let error = client.write(1, Bytes::from_static(b"x"), false).await.unwrap_err();
    assert!(error.to_string().contains("block size of 4096"), "{error}");
}

#[tokio::test]
async fn one_connection_where_the_server_does_not_promise_more() {
    let peer = nbdkit(&["--filter=multi-conn", "memory", "1M", "multi-conn-mode=disable"]);
    assert_eq!(peer.connect("", &[]).await.connections(), 1);
}

#[tokio::test]
async fn a_read_only_export_is_one() {
    let peer = nbdkit(&["-r", "memory", "1M"]);
    let client = peer.connect("", &[]).await;
    let error = client.write(0, Bytes::from_static(b"x"), false).await.unwrap_err();
    assert!(error.to_string().contains("read-only"), "{error}");
}
