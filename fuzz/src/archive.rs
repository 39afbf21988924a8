// SPDX-License-Identifier: MIT OR Apache-2.0
//! Target of `ct-archive`: an archive of a container's files, which may be anything.

use ct_archive::{Codec, Entry, Kind, Limits, NAME_BYTES_MAX, Reader, decompress};

const LIMITS: Limits = Limits {
    entries: 1000,
    data_bytes: 1 << 20,
    file_bytes: 1 << 40,
    path_bytes: 4096,
    header_bytes: 64 << 10,
    regions: 1000,
};

/// The first byte says how the rest is compressed.
pub fn archive(data: &[u8]) {
    let [codec, bytes @ ..] = data else { return };
    let codec = match codec % 8 {
        1 => Codec::Gz,
        2 => Codec::Bz2,
        3 => Codec::Xz,
        4 => Codec::Zst,
        _ => Codec::None,
    };
    let Ok(stream) = decompress(bytes, codec) else { return };
    let mut reader = Reader::new(stream, LIMITS);
    let mut sum: u64 = 0;
    while let Ok(Some(entry)) = reader.next_entry() {
        check(&entry);
        let Kind::File { size, regions } = &entry.kind else { continue };
        let mut end = 0;
        let copied = reader.copy_data(regions, |offset, piece| {
            assert!(offset >= end, "data are in order");
            end = offset + piece.len() as u64;
            assert!(end <= *size, "data are within the file");
            sum += piece.len() as u64;
            Ok(())
        });
        assert!(sum <= LIMITS.data_bytes);
        if codec == Codec::None {
            assert!(sum <= bytes.len() as u64, "nothing is made up");
        }
        if copied.is_err() {
            break;
        }
    }
    assert!(reader.entries() <= LIMITS.entries + 1);
}

fn check(entry: &Entry) {
    check_path(&entry.path);
    assert!(entry.mode <= 0o7777 && entry.uid != u32::MAX && entry.gid != u32::MAX);
    assert!(entry.mtime.nanos < 1_000_000_000);
    match &entry.kind {
        Kind::File { size, regions } => {
            let mut end = 0;
            for region in regions {
                assert!(region.offset >= end);
                end = region.offset + region.len;
            }
            assert!(end <= *size && *size <= LIMITS.file_bytes);
        }
        Kind::HardLink(target) => check_path(target),
        Kind::Symlink(target) => assert!(!target.is_empty() && !target.contains(&0)),
        _ => {}
    }
    assert!(entry.kind == Kind::Directory || !entry.path.is_empty(), "the root is a directory");
    for acl in entry.access_acl.iter().chain(&entry.default_acl) {
        assert!(acl.len() >= 4 + 3 * 8 && acl.len() % 8 == 4);
    }
    for (number, (name, _)) in entry.xattrs.iter().enumerate() {
        assert!(!name.is_empty() && !name.contains(&0));
        assert!(entry.xattrs[..number].iter().all(|(other, _)| other != name));
    }
}

fn check_path(path: &[u8]) {
    assert!(path.len() <= LIMITS.path_bytes && !path.contains(&0));
    if !path.is_empty() {
        for name in path.split(|byte| *byte == b'/') {
            assert!(!matches!(name, b"" | b"." | b"..") && name.len() <= NAME_BYTES_MAX);
        }
    }
}
