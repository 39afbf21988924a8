// SPDX-License-Identifier: MIT OR Apache-2.0
//! Archives that mean harm, or that two readers would understand differently.

use std::io::{Read, Write as _};

use ct_archive::{Codec, Kind, Limits, Region, decompress};

use crate::common::{Tar, read_all};

fn error_of(archive: &[u8]) -> String {
    let error = match read_all(archive, Limits::default()) {
        Err(error) => error,
        Ok(entries) => panic!("taken: {entries:?}"),
    };
    match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

fn refused(what: &str, tar: Tar, why: &str) {
    let error = error_of(&tar.end());
    assert!(error.contains(why), "{what}: {error}");
}

#[test]
fn paths_that_lead_out_are_refused() {
    let new = Tar::default;
    refused("upwards", new().file("a/../../etc/shadow", b"x"), "leads upwards");
    refused("pax path", new().pax(b'x', &[("path", "../x")]).file("a", b""), "leads upwards");
    let long = new().header("././@LongLink", b'L', 5).data(b"../x\0").file("a", b"");
    refused("long name", long, "leads upwards");
    refused("hard link", new().linked("a", b'1', 0, "../../etc/shadow"), "leads upwards");
    let sparse = [
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.minor", "0"),
        ("GNU.sparse.name", "../x"),
        ("GNU.sparse.realsize", "0"),
    ];
    refused("sparse name", new().pax(b'x', &sparse).file("a", b""), "leads upwards");
    refused("no name", new().header("", b'0', 0), "no name");
    refused("zero byte", new().pax(b'x', &[("path", "a\0b")]).file("a", b""), "zero byte");
    refused("the root", new().file("./", b"x"), "has a size");
    refused("the root as a link", new().linked(".", b'2', 0, "/etc"), "root is no directory");
    let read = read_all(&new().file("/etc/passwd", b"x").end()[..], Limits::default()).unwrap();
    assert_eq!(read[0].0.path, b"etc/passwd", "meant from the tree's root");
}

#[test]
fn what_could_be_read_in_two_ways_is_refused() {
    let new = Tar::default;
    let hidden = Tar::default().file("hidden", b"x").0;
    let two = new().pax(b'x', &[("size", "1024")]).header("a", b'0', 512).data(&hidden);
    refused("two sizes", two, "two sizes");
    for kind in *b"12345 6" {
        if kind != b' ' {
            let tar = new().linked("a", kind, 512, "b").data(&[1; 512]);
            refused("data of what has none", tar, "has no data has a size");
        }
    }
    let twice = new().pax(b'x', &[("path", "a")]).pax(b'x', &[("path", "b")]).file("c", b"");
    refused("two extended headers", twice, "two extended headers");
    let both = new().header("L", b'L', 2).data(b"a\0").pax(b'x', &[("path", "b")]).file("c", b"");
    refused("two paths", both, "two paths");
    refused("global path", new().pax(b'g', &[("path", "a")]).file("b", b""), "for all entries");
    refused("global size", new().pax(b'g', &[("size", "0")]).file("b", b"x"), "for all entries");
    refused("dangling", new().file("a", b"").pax(b'x', &[("path", "b")]), "describes nothing");
    refused("unknown type", new().header("a", b'Z', 0), "is not known");
    refused("dumpdir", new().header("a", b'D', 0), "incremental");
    refused("multi-volume", new().header("a", b'M', 0), "another archive");
    refused("multi-volume", new().header("a", b'M', 700), "another archive");
    let mut lone = new().file("a", b"").0;
    lone.extend([0; 512]);
    lone.extend(new().file("b", b"").end());
    assert!(error_of(&lone).contains("is followed by something"));
    let mut after = new().file("a", b"").end();
    after.extend(new().file("b", b"").end());
    assert!(error_of(&after).contains("follows its end"));
}

#[test]
fn numbers_out_of_range_are_refused() {
    let new = Tar::default;
    let binary = |first: u8, rest: &[u8]| [&[first], rest].concat();
    let file = || new().header("a", b'0', 0);
    refused("negative size", file().patch(124, &[0xff; 12]), "size is no number");
    refused("huge size", file().patch(124, &binary(0x80, &[0xff; 11])), "size is no number");
    let large = binary(0x80, &[0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    refused("u64::MAX", file().patch(124, &large), "larger than any file");
    refused(
        "pax",
        new().pax(b'x', &[("size", "9223372036854775808")]).header("a", b'0', 0),
        "any file",
    );
    refused("negative uid", file().patch(108, &[0xff; 8]), "is no number that");
    refused("uid -1", new().pax(b'x', &[("uid", "4294967295")]).file("a", b""), "is no id");
    refused("a letter", file().patch(108, b"000x000\0"), "is no number that");
    refused("a device", new().header("a", b'3', 0).patch(329, &[0xff; 8]), "device numbers");
    let mut wrong = new().file("a", b"").end();
    wrong[0] = b'b';
    assert!(error_of(&wrong).contains("checksum"));
    let old = file().patch(136, &[0xff; 12]);
    let read = read_all(&old.end()[..], Limits::default()).unwrap();
    assert_eq!(read[0].0.mtime.secs, -1, "a time before 1970 is none of these");
}

#[test]
fn an_archive_that_ends_early_is_no_archive() {
    let whole =
        Tar::default().file("a", &[7; 1000]).pax(b'x', &[("path", "c")]).file("b", b"x").end();
    for len in 0..whole.len() {
        let error = error_of(&whole[..len]);
        assert!(error.contains("cut off"), "{len}: {error}");
    }
    read_all(&whole[..], Limits::default()).unwrap();
}

fn sparse(records: &[(&str, &str)], stored: &[u8]) -> Tar {
    Tar::default().pax(b'x', records).file("a", stored)
}

#[test]
fn maps_of_sparse_files_must_fit() {
    let map = |size: &str, map: &str, stored: &[u8]| {
        sparse(&[("GNU.sparse.size", size), ("GNU.sparse.map", map)], stored)
    };
    let read = read_all(&map("100", "10,4,90,0", b"data").end()[..], Limits::default()).unwrap();
    let Kind::File { size, regions } = &read[0].0.kind else { panic!("{read:?}") };
    assert_eq!(*size, 100);
    assert_eq!(regions[..], [Region { offset: 10, len: 4 }, Region { offset: 90, len: 0 }]);
    assert_eq!(read[0].1[10..14], *b"data");
    refused("behind the end", map("12", "10,4", b"data"), "behind its end");
    refused("more than stored", map("100", "10,5", b"data"), "not what is stored");
    refused("less than stored", map("100", "10,3", b"data"), "not what is stored");
    refused("overlap", map("100", "10,3,12,1", b"data"), "overlap");
    refused("overflow", map("100", "18446744073709551615,4", b"data"), "ends beyond");
    refused(
        "count",
        sparse(&[("GNU.sparse.size", "9"), ("GNU.sparse.numblocks", "7")], b""),
        "complete",
    );
    refused("no size", sparse(&[("GNU.sparse.map", "0,4")], b"data"), "has no size");
    refused(
        "a directory",
        Tar::default().pax(b'x', &[("GNU.sparse.size", "9")]).header("a", b'5', 0),
        "is sparse",
    );
    let one = [("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "9")];
    let mut lines = b"99999999999\n".to_vec();
    lines.resize(512, 0);
    refused("a map without end", sparse(&one, &lines), "too much");
    refused("no map", sparse(&one, b""), "cut off");
    lines[..11].copy_from_slice(b"2\n0\n1\n0\n1\n\0");
    refused("overlap in lines", sparse(&one, &lines), "overlap");
    refused("not digits", sparse(&one, &[b'x'; 512]), "no number");
    let two = [("GNU.sparse.major", "2"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "9")];
    refused("a later format", sparse(&two, b""), "not known");
}

#[test]
fn bombs_hit_a_limit() {
    let limits = Limits {
        entries: 2,
        data_bytes: 10,
        file_bytes: 1 << 20,
        path_bytes: 50,
        header_bytes: 2048,
        regions: 2,
    };
    let fails = |tar: Tar, why: &str| {
        let error = read_all(&tar.end()[..], limits).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    };
    let new = Tar::default;
    fails(new().file("a", b"").file("b", b"").file("c", b""), "more than 2 entries");
    fails(new().file("a", b"123456").file("b", b"123456"), "bytes of data");
    fails(sparse(&[("GNU.sparse.size", "1048577"), ("GNU.sparse.map", "")], b""), "a file of");
    fails(new().pax(b'x', &[("path", &"a/".repeat(60))]).file("a", b""), "more than 50 bytes");
    fails(new().pax(b'x', &[("comment", &"a".repeat(3000))]).file("a", b""), "extended header");
    fails(sparse(&[("GNU.sparse.size", "9"), ("GNU.sparse.map", "0,1,2,1,4,1")], b"123"), "pieces");
    // A header that only claims to be large takes no memory.
    let claims = new().header("x", b'x', 4 << 30);
    let error = read_all(&claims.0[..], Limits::default()).unwrap_err().to_string();
    assert!(error.contains("too much"), "{error}");
}

/// What any user in a container can make.
#[test]
fn deep_directories_and_thousands_of_attributes_are_no_bombs() {
    let file = |records: &[(&str, &str)]| Tar::default().pax(b'x', records).file("a", b"x");
    let path = format!("{}file", "d/".repeat(32 << 10));
    let names: Vec<String> = (0..9000).map(|name| format!("SCHILY.xattr.user.{name}")).collect();
    let many: Vec<_> = names.iter().map(|name| (name.as_str(), "v")).collect();
    let value = "v".repeat(64 << 10);
    let large: Vec<_> = names[..300].iter().map(|name| (name.as_str(), value.as_str())).collect();
    for records in [[&[("path", path.as_str())][..], &many].concat(), large] {
        let read = read_all(&file(&records).end()[..], Limits::default()).unwrap();
        let entry = &read[0].0;
        let is_deep = records[0].0 == "path";
        assert_eq!(entry.path, if is_deep { path.as_bytes() } else { b"a" });
        assert_eq!(entry.xattrs.len(), records.len() - usize::from(is_deep));
    }
    let deeper = "d/".repeat(40 << 10);
    refused("deeper", file(&[("path", deeper.as_str())]), "its path has more than");
    let more: Vec<String> = (0..9500).map(|name| format!("SCHILY.xattr.user.{name}")).collect();
    let more: Vec<_> = more.iter().map(|name| (name.as_str(), "v")).collect();
    refused("more", file(&more), "attributes");
    refused("twice", file(&[&many[..], &many[..1]].concat()), "'user.0' is there twice");
}

#[test]
fn damage_of_the_compression_is_found_wherever_it_is() {
    let tar = Tar::default().file("a", &[7; 100_000]).end();
    let mut packed = zstd::Encoder::new(Vec::new(), 1).unwrap();
    packed.include_checksum(true).unwrap();
    packed.write_all(&tar).unwrap();
    let packed = packed.finish().unwrap();
    let read = |bytes: Vec<u8>| {
        let stream = decompress(std::io::Cursor::new(bytes), Codec::Zst)?;
        read_all(stream, Limits::default())
    };
    read(packed.clone()).unwrap();
    // The last bytes are the checksum, behind the end of the archive.
    let mut changed = packed.clone();
    *changed.last_mut().unwrap() ^= 1;
    assert!(read(changed).is_err());
    for len in 0..packed.len() {
        assert!(read(packed[..len].to_vec()).is_err(), "{len}");
    }
    let error = decompress(&tar[..], Codec::Gz).err().unwrap().to_string();
    assert!(error.contains("not compressed with gz"), "{error}");
}

#[test]
fn padding_that_never_ends_is_given_up() {
    let tar = Tar::default().file("a", b"").end();
    let endless = tar.chain(std::io::repeat(0));
    let error = read_all(endless, Limits::default()).unwrap_err().to_string();
    assert!(error.contains("padding does not end"), "{error}");
}
