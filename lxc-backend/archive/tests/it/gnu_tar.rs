// SPDX-License-Identifier: MIT OR Apache-2.0
//! What GNU tar writes, in all of its formats and compressions, is read as what was there.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use ct_archive::{Codec, Entry, Kind, Limits, decompress};

use crate::common::read_all;

/// A tree with what headers have no room for.
fn make_tree(top: &Path, long_names: bool) -> PathBuf {
    let tree = top.join("tree");
    fs::create_dir_all(tree.join("dir/empty")).unwrap();
    fs::write(tree.join("dir/file"), "some text").unwrap();
    fs::write(tree.join("dir/large"), vec![0x5a; 300_000]).unwrap();
    fs::hard_link(tree.join("dir/file"), tree.join("other name")).unwrap();
    symlink("../anywhere", tree.join("link")).unwrap();
    let fifo = Command::new("mkfifo").arg(tree.join("fifo")).status().unwrap();
    assert!(fifo.success());
    fs::set_permissions(tree.join("dir/large"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::set_permissions(tree.join("dir/empty"), fs::Permissions::from_mode(0o1777)).unwrap();
    let sparse = File::create(tree.join("sparse")).unwrap();
    for island in 0..40 {
        sparse.write_all_at(&[island + 1; 4096], u64::from(island) * (1 << 20)).unwrap();
    }
    sparse.set_len(41 << 20).unwrap();
    File::create(tree.join("hole")).unwrap().set_len(1 << 20).unwrap();
    if long_names {
        let odd = std::ffi::OsString::from_vec(b"no \xff UTF-8\n".to_vec());
        fs::write(tree.join(odd), "odd").unwrap();
        let name = "n".repeat(255);
        let deep = tree.join(&name).join(&name);
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("file"), "deep").unwrap();
        symlink("t".repeat(1000), tree.join("long link")).unwrap();
    }
    tree
}

fn pack(tree: &Path, archive: &Path, options: &[&str]) {
    let mut tar = Command::new("tar");
    tar.args(["--create", "--numeric-owner", "--file"]).arg(archive).args(options);
    let output = tar.arg("--directory").arg(tree).arg(".").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn names_of(tree: &Path, below: &Path, found: &mut Vec<Vec<u8>>) {
    found.push(below.as_os_str().as_bytes().to_vec());
    if tree.join(below).symlink_metadata().unwrap().is_dir() {
        for entry in fs::read_dir(tree.join(below)).unwrap() {
            names_of(tree, &below.join(entry.unwrap().file_name()), found);
        }
    }
}

fn check(tree: &Path, what: &str, has_nanos: bool, read: Vec<(Entry, Vec<u8>)>) {
    let entries: BTreeMap<Vec<u8>, (Entry, Vec<u8>)> =
        read.into_iter().map(|(entry, content)| (entry.path.clone(), (entry, content))).collect();
    let mut names = Vec::new();
    names_of(tree, Path::new(""), &mut names);
    names.sort();
    assert_eq!(entries.keys().cloned().collect::<Vec<_>>(), names, "{what}");
    for (path, (entry, content)) in &entries {
        let shown = format!("{what}: {}", ct_archive::shown(path));
        let file = tree.join(std::ffi::OsStr::from_bytes(path));
        let meta = fs::symlink_metadata(&file).unwrap();
        match &entry.kind {
            Kind::File { size, .. } => {
                assert_eq!(*size, meta.len(), "{shown}");
                assert!(fs::read(&file).unwrap() == *content, "{shown}: content");
            }
            Kind::HardLink(target) => {
                let target = tree.join(std::ffi::OsStr::from_bytes(target));
                assert_eq!(fs::metadata(target).unwrap().ino(), meta.ino(), "{shown}");
                continue;
            }
            Kind::Symlink(target) => {
                assert_eq!(fs::read_link(&file).unwrap().as_os_str().as_bytes(), target, "{shown}");
            }
            Kind::Directory => assert!(meta.is_dir(), "{shown}"),
            kind => assert_eq!((kind, meta.is_file()), (&Kind::Fifo, false), "{shown}"),
        }
        assert_eq!((entry.uid, entry.gid), (meta.uid(), meta.gid()), "{shown}");
        assert_eq!(entry.mode, meta.mode() & 0o7777, "{shown}");
        assert_eq!(entry.mtime.secs, meta.mtime(), "{shown}");
        let nanos = if has_nanos { meta.mtime_nsec() } else { 0 };
        assert_eq!(i64::from(entry.mtime.nanos), nanos, "{shown}");
    }
}

#[test]
fn every_format_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, odd) = (dir.path().join("plain"), dir.path().join("odd"));
    let (plain, odd) = (make_tree(&plain, false), make_tree(&odd, true));
    let archive = dir.path().join("archive.tar");
    let cases: [(&Path, bool, &[&str]); 9] = [
        (&plain, false, &["--format=v7", "--exclude=fifo"]),
        (&plain, false, &["--format=oldgnu", "--sparse"]),
        (&plain, false, &["--format=ustar"]),
        (&odd, false, &["--format=gnu", "--sparse"]),
        (&odd, false, &["--format=gnu", "--label=a label"]),
        (&odd, true, &["--format=posix"]),
        (&odd, true, &["--format=posix", "--sparse", "--sparse-version=0.0"]),
        (&odd, true, &["--format=posix", "--sparse", "--sparse-version=0.1"]),
        (&odd, true, &["--format=posix", "--sparse", "--sparse-version=1.0"]),
    ];
    for (tree, has_nanos, options) in cases {
        let fifo = tree.join("fifo");
        if options.contains(&"--exclude=fifo") {
            fs::remove_file(&fifo).unwrap();
        } else if !fifo.exists() {
            assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        }
        pack(tree, &archive, options);
        let read = read_all(File::open(&archive).unwrap(), Limits::default()).unwrap();
        let is_sparse = |name: &[u8], read: &[(Entry, Vec<u8>)]| {
            let entry = read.iter().find(|(entry, _)| entry.path == name).unwrap();
            let Kind::File { regions, .. } = &entry.0.kind else { panic!("{entry:?}") };
            regions.iter().map(|region| region.len).sum::<u64>() < 1 << 20
        };
        let sparse = options.contains(&"--sparse");
        assert_eq!(is_sparse(b"sparse", &read), sparse, "{options:?}");
        check(tree, &options.join(" "), has_nanos, read);
    }
}

#[test]
fn every_compression_is_read_also_in_several_parts() {
    let dir = tempfile::tempdir().unwrap();
    let tree = make_tree(dir.path(), true);
    let archive = dir.path().join("archive.tar");
    pack(&tree, &archive, &["--format=posix", "--sparse"]);
    let whole = fs::read(&archive).unwrap();
    let parts = whole.split_at(whole.len() / 3);
    for (program, codec) in
        [("gzip", Codec::Gz), ("bzip2", Codec::Bz2), ("xz", Codec::Xz), ("zstd", Codec::Zst)]
    {
        let packed: Vec<Vec<u8>> = [parts.0, parts.1].map(|part| compress(program, part)).into();
        let packed = packed.concat();
        let read = |bytes: &[u8]| {
            let stream = decompress(std::io::Cursor::new(bytes.to_vec()), codec)?;
            read_all(stream, Limits::default())
        };
        check(&tree, program, true, read(&packed).unwrap());
        assert!(read(&packed[..packed.len() - 20]).is_err(), "{program}: cut off");
    }
}

fn compress(program: &str, bytes: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .arg("-c")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let bytes = bytes.to_vec();
    let writer = std::thread::spawn(move || std::io::Write::write_all(&mut stdin, &bytes));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.status.success());
    output.stdout
}
