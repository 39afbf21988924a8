// SPDX-License-Identifier: MIT OR Apache-2.0
//! `qemu-nbd` as the server, with `nbdinfo` as a second opinion on maps.

use std::path::Path;

use bytes::{Bytes, BytesMut};
use provider_nbd::wire::Mode;
use provider_nbd::{Client, Error, Options, ZeroOptions, context, list_unix};

use crate::peer::{Peer, pattern, run, temp_dir};

const MIB: u64 = 1 << 20;

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

fn qemu_nbd(extra: &[&str], prepare: impl FnOnce(&Path)) -> Peer {
    Peer::start("qemu-nbd", temp_dir(), |dir, socket| {
        let image = dir.join("image");
        prepare(&image);
        let mut args = vec!["-t".to_owned(), "-e".into(), "8".into(), "-k".into(), socket];
        args.extend(extra.iter().map(|&arg| arg.to_owned()));
        args.push(text(&image).to_owned());
        args
    })
}

fn raw(size_bytes: u64, extra: &[&str]) -> Peer {
    qemu_nbd(&[&["-f", "raw"], extra].concat(), |image| {
        run("qemu-img", ["create", "-q", "-f", "raw", text(image), &size_bytes.to_string()]);
    })
}

/// A qcow2 image with a backing file, data before the bitmap `b0` was made and data after it.
fn qcow2_with_bitmap(image: &Path) {
    let base = image.with_extension("base");
    run("qemu-img", ["create", "-q", "-f", "qcow2", text(&base), "64M"]);
    run("qemu-io", ["-f", "qcow2", "-c", "write -P 1 40M 3M", text(&base)]);
    let backing = ["-b", text(&base), "-F", "qcow2"];
    let create = ["create", "-q", "-f", "qcow2"];
    run("qemu-img", create.iter().chain(&backing).chain(&[text(image), "64M"]));
    run("qemu-io", ["-f", "qcow2", "-c", "write -P 2 1M 1M", text(image)]);
    run("qemu-img", ["bitmap", "--add", "-g", "65536", text(image), "b0"]);
    for command in ["write -P 3 8M 192k", "write -z 20M 1M", "write -P 4 63M 1M", "write -P 5 3 9"]
    {
        run("qemu-io", ["-f", "qcow2", "-c", command, text(image)]);
    }
}

/// What `nbdinfo --map` says: offset, length and flags.
fn nbdinfo_map(peer: &Peer, context: &str) -> Vec<(u64, u64, u64)> {
    let map = run("nbdinfo", [format!("--map={context}"), peer.uri("")]);
    map.lines()
        .map(|line| {
            let mut numbers = line.split_whitespace().map(|word| word.parse().expect("a number"));
            let mut next = || numbers.next().expect("three numbers");
            (next(), next(), next())
        })
        .collect()
}

async fn map(client: &Client, context: &str, offset: u64, len: u64) -> Vec<(u64, u64, u64)> {
    let mut extents = client.extents(context, offset, len);
    let mut all: Vec<(u64, u64, u64)> = Vec::new();
    while let Some(extent) = extents.next().await.expect("extents") {
        let expected = all.last().map_or(offset, |last| last.0 + last.1);
        assert_eq!(extent.offset, expected, "no gap");
        all.push((extent.offset, extent.len, extent.flags));
    }
    assert_eq!(all.last().map(|last| last.0 + last.1), Some(offset + len));
    all
}

#[tokio::test]
async fn a_raw_image_is_written_and_read() {
    let peer = raw(256 * MIB, &[]);
    let client = peer.connect("", &[context::BASE_ALLOCATION]).await;
    assert_eq!(client.size_bytes(), 256 * MIB);
    let flags = client.flags();
    assert!(!flags.read_only && flags.can_trim && flags.can_write_zeroes && flags.can_multi_conn);
    assert_eq!(client.connections(), 4);
    assert_eq!(client.block_size().max, 32 << 20);

    // Larger than one request, and odd.
    let data = Bytes::from(pattern(1, (70 << 20) + 333));
    client.write(MIB + 7, data.clone(), true).await.unwrap();
    let read = client.read(MIB + 7, data.len()).await.unwrap();
    assert!(read == data, "content");
    // In parallel, out of order, with a buffer that is used again.
    let mut tasks = tokio::task::JoinSet::new();
    for n in (0..200usize).rev() {
        let (client, data) = (client.clone(), data.clone());
        tasks.spawn(async move {
            let (mut buf, len) = (BytesMut::with_capacity(300_000), 1000 + n * 997);
            for _ in 0..3 {
                buf.clear();
                buf = client.read_into(MIB + 7 + n as u64 * 300_001, len, buf).await.unwrap();
                assert!(buf == data[n * 300_001..][..len], "part {n}");
            }
        });
    }
    tasks.join_all().await;

    client
        .write_zeroes(10 * MIB, MIB, ZeroOptions { fua: true, ..ZeroOptions::default() })
        .await
        .unwrap();
    client.trim(20 * MIB, MIB).await.unwrap();
    client.flush().await.unwrap();
    assert!(client.read(10 * MIB, 1 << 20).await.unwrap().iter().all(|&byte| byte == 0));
    let ours = map(&client, context::BASE_ALLOCATION, 0, 256 * MIB).await;
    assert_eq!(ours, nbdinfo_map(&peer, context::BASE_ALLOCATION));
    client.disconnect().await.unwrap();
}

#[tokio::test]
async fn a_bitmap_and_two_more_contexts_are_read() {
    let peer = qemu_nbd(&["-r", "-f", "qcow2", "-B", "b0", "-A"], qcow2_with_bitmap);
    let bitmap = context::dirty_bitmap("b0");
    let contexts = [&bitmap, context::BASE_ALLOCATION, context::ALLOCATION_DEPTH];
    let client = peer.connect("", &contexts).await;
    assert!(client.flags().read_only);
    for name in contexts {
        assert_eq!(map(&client, name, 0, 64 * MIB).await, nbdinfo_map(&peer, name), "{name}");
    }
    let dirty: Vec<_> = map(&client, &bitmap, 0, 64 * MIB)
        .await
        .into_iter()
        .filter(|&(_, _, flags)| flags & context::DIRTY != 0)
        .map(|(offset, len, _)| (offset, len))
        .collect();
    let expected = [(0, 64 << 10), (8 * MIB, 192 << 10), (20 * MIB, MIB), (63 * MIB, MIB)];
    assert_eq!(dirty, expected);
    // Parts, at odd places.
    let part = map(&client, &bitmap, 8 * MIB + 1, 100).await;
    assert_eq!(part, [(8 * MIB + 1, 100, context::DIRTY)]);
    for (offset, byte) in [(8 * MIB, 3), (40 * MIB, 1), (MIB, 2), (20 * MIB, 0)] {
        assert!(client.read(offset, 65_536).await.unwrap().iter().all(|&b| b == byte));
    }
    assert!(matches!(client.trim(0, MIB).await, Err(Error::Invalid(_))));
    client.disconnect().await.unwrap();
}

#[tokio::test]
async fn headers_are_extended_where_qemu_can() {
    // In qcow2 zeroes cost a little metadata; in a raw file some file systems allocate all of it.
    let peer = qemu_nbd(&["-f", "qcow2"], |image| {
        let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M"];
        run("qemu-img", create.iter().chain(&[text(image), "64G"]));
    });
    let client = peer.connect("", &[context::BASE_ALLOCATION]).await;
    let version = run("qemu-nbd", ["--version"]);
    let major: u32 = version
        .split_whitespace()
        .find_map(|word| word.split('.').next()?.parse().ok())
        .expect("a version");
    assert_eq!(client.mode() == Mode::Extended, major >= 9, "{version}");
    // Larger than 4 GiB, in one answer if lengths have 64 bits.
    let extents = client.block_status(context::BASE_ALLOCATION, 0, 64 << 30).await.unwrap();
    let hole = extents.last().unwrap();
    assert_eq!(hole.flags, context::HOLE | context::ZERO);
    if client.mode() == Mode::Extended {
        assert_eq!(hole.end(), 64 << 30);
        assert!(hole.len > 4 << 30, "{hole:?}");
    }
    client.write_zeroes(0, 64 << 30, ZeroOptions::default()).await.unwrap();
    client.trim(0, 64 << 30).await.unwrap();
    client.disconnect().await.unwrap();
}

#[tokio::test]
async fn names_that_do_not_exist_are_named() {
    let peer = raw(MIB, &["-x", "disk", "-D", "a small one"]);
    let options = |contexts: &[&str]| Options {
        contexts: contexts.iter().map(|&name| name.to_owned()).collect(),
        ..Options::default()
    };
    for contexts in [&[][..], &[context::BASE_ALLOCATION]] {
        let result = Client::connect_unix(peer.socket(), "disc", options(contexts)).await;
        assert!(
            matches!(&result, Err(Error::NoSuchExport { export }) if export == "disc"),
            "{result:?}"
        );
    }
    let result = Client::connect_unix(
        peer.socket(),
        "disk",
        options(&[context::BASE_ALLOCATION, "qemu:dirty-bitmap:none"]),
    )
    .await;
    assert!(
        matches!(&result, Err(Error::ContextMissing { context }) if context.ends_with("none")),
        "{result:?}"
    );
    let exports = list_unix(peer.socket()).await.unwrap();
    assert_eq!(exports.len(), 1);
    assert_eq!(
        (exports[0].name.as_str(), exports[0].description.as_str()),
        ("disk", "a small one")
    );
}

#[tokio::test]
async fn a_killed_server_ends_requests() {
    let peer = raw(MIB, &[]);
    let client = peer.connect("", &[]).await;
    assert_eq!(client.read(0, 512).await.unwrap(), [0; 512][..]);
    drop(peer);
    let error = client.read(0, 512).await.unwrap_err();
    assert!(matches!(error, Error::Disconnected), "{error:?}");
}
