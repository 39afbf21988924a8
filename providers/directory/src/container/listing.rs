// SPDX-License-Identifier: MIT OR Apache-2.0
//! The list of what a tree of files in an archive holds: made when it is stored, compared when it is verified.
//!
//! ```text
//! / d 0755 0:0 1700000000.000000000 -
//! /etc d 0755 0:0 1700000000.000000000 -
//! /etc/hosts f 0644 0:0 1700000000.123456789 21:6f0d…
//! /etc/hosts\x20too = /etc/hosts
//! /usr/bin/ping f 0755 0:0 1700000000.000000000 90568:92ab… security.capability=0100…
//! ```
//!
//! Path, kind, permissions, owner (as the container sees it), time of change, content, attributes. Of a file
//! with several names the others refer to the first. A content is its size and a hash of its blocks that are not
//! zero, each with its offset, so that holes need not be read and may be filled. The order is that of a
//! walk in which names are sorted; so two lists of one tree are the same byte by byte.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use provider_api::{Error, Result};
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, SeekFrom, Stat, fstat, lgetxattr, llistxattr, major, minor,
    openat, readlinkat, seek, statat,
};
use rustix::io::Errno;

use super::Hashing;
use crate::call::{corrupt, invalid};
use crate::deep::{join, names, open_directory, open_root};
use crate::files;
use crate::store::is_zero;

/// What is read, hashed and taken for a hole at once.
const BLOCK_BYTES: usize = 64 << 10;
/// The kernel's bound of extended attributes and of their names.
const ATTRIBUTE_BYTES_MAX: usize = 64 << 10;
/// Values of attributes that are longer are there as hashes.
const VALUE_BYTES: usize = 64;
/// The longest line that is read: a path whose bytes are all escaped, and its attributes.
const LINE_BYTES_MAX: u64 = 1 << 20;
/// Memory for the first names of files that have several.
const LINKS_BYTES_MAX: usize = 256 << 20;
/// What a backup keeps of extended attributes.
const KEPT: [&[u8]; 3] = [b"user.", b"security.capability", b"system.posix_acl_"];
/// What the words of a line are, behind the path.
const FIELDS: [&str; 6] = ["kind", "permissions", "owner", "time", "content", "attributes"];

/// Told of each piece that is read; ends the work by an error.
type GoOn<'a> = dyn FnMut(u64) -> Result<()> + 'a;

/// What a walk has found at a path.
struct Found {
    /// The path, escaped.
    path: String,
    /// What follows it in its line.
    rest: Result<String>,
}

/// A directory whose entries are not all visited.
struct Open {
    path: Vec<u8>,
    shown: String,
    /// The last one comes first.
    names: Vec<(String, CString)>,
}

/// A walk through a tree.
struct Walk {
    root: OwnedFd,
    open: Vec<Open>,
    /// The directory that was used last.
    current: Option<(Vec<u8>, OwnedFd)>,
    is_begun: bool,
    /// First names of files that have several.
    links: HashMap<u64, String>,
    links_bytes: usize,
    buffer: Vec<u8>,
}

impl Walk {
    fn new(tree: &Path) -> Result<Self> {
        let root = open_root(tree)
            .map_err(|e| Error::io(format!("Cannot open {}.", tree.display()), e))?;
        Ok(Self {
            root,
            open: Vec::new(),
            current: None,
            is_begun: false,
            links: HashMap::new(),
            links_bytes: 0,
            buffer: vec![0; BLOCK_BYTES],
        })
    }

    /// What comes next. An error is one of `go_on`.
    fn next(&mut self, go_on: &mut GoOn<'_>) -> Result<Option<Found>> {
        go_on(0)?;
        if !self.is_begun {
            self.is_begun = true;
            let rest = self.visit(Vec::new(), "/", &[], c".", go_on)?;
            return Ok(Some(Found { path: "/".to_owned(), rest }));
        }
        while let Some(dir) = self.open.last_mut() {
            let Some((shown, name)) = dir.names.pop() else {
                self.open.pop();
                continue;
            };
            let slash = if dir.shown == "/" { "" } else { "/" };
            let path = format!("{}{slash}{shown}", dir.shown);
            let (parent, own) = (dir.path.clone(), join(&dir.path, &name));
            let rest = self.visit(own, &path, &parent, &name, go_on)?;
            return Ok(Some(Found { path, rest }));
        }
        Ok(None)
    }

    /// One entry: what there is to say of it, or why that cannot be said.
    fn visit(
        &mut self,
        own: Vec<u8>,
        shown: &str,
        parent: &[u8],
        name: &CStr,
        go_on: &mut GoOn<'_>,
    ) -> Result<Result<String>> {
        let mut stopped = None;
        let described = {
            let mut go_on = |bytes| {
                go_on(bytes).map_err(|error| {
                    let kind = error.kind;
                    stopped = Some(error);
                    Error::new(kind, "stopped")
                })
            };
            self.describe(own, shown, parent, name, &mut go_on)
        };
        stopped.map_or(Ok(described), Err)
    }

    fn describe(
        &mut self,
        own: Vec<u8>,
        shown: &str,
        parent: &[u8],
        name: &CStr,
        go_on: &mut GoOn<'_>,
    ) -> Result<String> {
        let failed = |errno: Errno| Error::io(format!("Cannot read {shown}."), errno.into());
        let current = self.current.take().filter(|(path, _)| path == parent);
        let dir = match current {
            Some((_, dir)) => dir,
            None => open_directory(&self.root, parent).map_err(failed)?,
        };
        let stat = statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let rest = if kind == FileType::Directory {
            let line = line("d", &stat, "-", &attributes(&dir, name).map_err(failed)?);
            let below = open_directory(&self.root, &own).map_err(failed)?;
            self.enter(&below, own, shown)?;
            line
        } else if let Some(first) = self.links.get(&stat.st_ino).filter(|_| stat.st_nlink > 1) {
            format!("= {first}")
        } else {
            let (letter, content) = self.content(&dir, name, &stat, shown, go_on)?;
            self.remember(&stat, shown)?;
            line(letter, &stat, &content, &attributes(&dir, name).map_err(failed)?)
        };
        self.current = Some((parent.to_vec(), dir));
        Ok(rest)
    }

    /// Has the entries of a directory visited next.
    fn enter(&mut self, dir: &OwnedFd, path: Vec<u8>, shown: &str) -> Result<()> {
        let found = names(dir).map_err(|e| Error::io(format!("Cannot list {shown}."), e))?;
        let mut names: Vec<(String, CString)> =
            found.into_iter().map(|name| (escaped(name.to_bytes()), name)).collect();
        names.sort_unstable_by(|a, b| b.cmp(a));
        self.open.push(Open { path, shown: shown.to_owned(), names });
        Ok(())
    }

    fn remember(&mut self, stat: &Stat, shown: &str) -> Result<()> {
        if stat.st_nlink < 2 {
            return Ok(());
        }
        self.links_bytes += shown.len() + 64;
        if self.links_bytes > LINKS_BYTES_MAX {
            return Err(invalid(
                "The container has too many files with several names to be stored as a tree; use \
                 'container-format tar'.",
            ));
        }
        self.links.insert(stat.st_ino, shown.to_owned());
        Ok(())
    }

    /// What is in something that is no directory.
    fn content(
        &mut self,
        dir: &OwnedFd,
        name: &CStr,
        stat: &Stat,
        shown: &str,
        go_on: &mut GoOn<'_>,
    ) -> Result<(&'static str, String)> {
        let failed = |errno: Errno| Error::io(format!("Cannot read {shown}."), errno.into());
        let device = || format!("{}:{}", major(stat.st_rdev), minor(stat.st_rdev));
        Ok(match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                let file = open_file(dir, name).map_err(failed)?;
                ("f", self.hash(&file, shown, go_on)?)
            }
            FileType::Symlink => {
                let target = readlinkat(dir, name, Vec::new()).map_err(failed)?;
                ("l", escaped(target.to_bytes()))
            }
            FileType::Fifo => ("p", "-".to_owned()),
            FileType::CharacterDevice => ("c", device()),
            FileType::BlockDevice => ("b", device()),
            _ => ("?", "-".to_owned()),
        })
    }

    fn hash(&mut self, file: &File, shown: &str, go_on: &mut GoOn<'_>) -> Result<String> {
        let failed = |e| Error::io(format!("Cannot read {shown}."), e);
        let stat = fstat(file).map_err(|errno| failed(errno.into()))?;
        let size_bytes = u64::try_from(stat.st_size).unwrap_or(0);
        let has_holes = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512) < size_bytes;
        let mut hasher = blake3::Hasher::new();
        let mut at = 0;
        while at < size_bytes {
            let mut end = size_bytes;
            if has_holes {
                (at, end) = match seek(file, SeekFrom::Data(at)) {
                    Ok(data) => (data, seek(file, SeekFrom::Hole(data)).unwrap_or(size_bytes)),
                    Err(Errno::NXIO) => break,
                    // A file system that tells nothing of holes.
                    Err(Errno::INVAL | Errno::NOTSUP) => (at, size_bytes),
                    Err(errno) => return Err(failed(errno.into())),
                };
                at -= at % BLOCK_BYTES as u64;
            }
            while at < end {
                let count = read_block(file, &mut self.buffer, at).map_err(failed)?;
                if count == 0 {
                    return Err(corrupt(format!("{shown} became shorter while it was read.")));
                }
                if !is_zero(&self.buffer[..count]) {
                    hasher.update(&at.to_le_bytes());
                    hasher.update(&self.buffer[..count]);
                }
                go_on(count as u64)?;
                at += BLOCK_BYTES as u64;
            }
        }
        Ok(format!("{size_bytes}:{}", hasher.finalize().to_hex()))
    }
}

/// Opens what is a regular file, and changes no time of it.
fn open_file(dir: &OwnedFd, name: &CStr) -> rustix::io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = match openat(dir, name, flags | OFlags::NOATIME, Mode::empty()) {
        Err(Errno::PERM) => openat(dir, name, flags, Mode::empty()),
        other => other,
    };
    Ok(File::from(opened?))
}

/// Reads a whole block, or up to the end of the file.
fn read_block(file: &File, buffer: &mut [u8], at: u64) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], at + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// The extended attributes of a file, each as a word, sorted. A link or device cannot be opened, so they are
/// asked for by name.
fn attributes(dir: &OwnedFd, name: &CStr) -> rustix::io::Result<Vec<String>> {
    let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
    path.extend(name.to_bytes());
    let mut list = vec![0; ATTRIBUTE_BYTES_MAX];
    let count = match llistxattr(path.as_slice(), &mut list[..]) {
        Err(Errno::NOTSUP | Errno::NODATA) => 0,
        other => other?,
    };
    let mut found = Vec::new();
    for attribute in list[..count].split_inclusive(|byte| *byte == 0) {
        let Ok(attribute) = CStr::from_bytes_with_nul(attribute) else { continue };
        if !KEPT.iter().any(|kept| attribute.to_bytes().starts_with(kept)) {
            continue;
        }
        let mut value = vec![0; ATTRIBUTE_BYTES_MAX];
        let count = lgetxattr(path.as_slice(), attribute, &mut value[..])?;
        let value = &value[..count];
        let value = if value.len() > VALUE_BYTES {
            format!("{}:{}", value.len(), blake3::hash(value).to_hex())
        } else {
            value.iter().map(|byte| format!("{byte:02x}")).collect()
        };
        found.push(format!("{}={value}", escaped(attribute.to_bytes())));
    }
    found.sort();
    Ok(found)
}

fn line(kind: &str, stat: &Stat, content: &str, attributes: &[String]) -> String {
    let mode = stat.st_mode & 0o7777;
    let (uid, gid) = (stat.st_uid, stat.st_gid);
    let (secs, nanos) = (stat.st_mtime, stat.st_mtime_nsec);
    let mut line = format!("{kind} {mode:04o} {uid}:{gid} {secs}.{nanos:09} {content}");
    for attribute in attributes {
        line.push(' ');
        line.push_str(attribute);
    }
    line
}

/// Text for any bytes, without spaces and ends of lines.
fn escaped(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for byte in bytes {
        if byte.is_ascii_graphic() && *byte != b'\\' {
            text.push(char::from(*byte));
        } else {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

/// The order of a walk.
fn order(a: &str, b: &str) -> Ordering {
    a.split('/').cmp(b.split('/'))
}

/// A list as it was written.
pub(super) struct Written {
    pub(super) entries: u64,
    pub(super) size_bytes: u64,
    pub(super) blake3: String,
}

/// Writes the list of a tree to a new file. All of the tree must be readable.
pub(super) fn write(tree: &Path, path: &Path, go_on: &mut GoOn<'_>) -> Result<Written> {
    let failed = |e| Error::io(format!("Cannot write {}.", path.display()), e);
    let mut walk = Walk::new(tree)?;
    let mut list = BufWriter::new(Hashing::new(files::create(path)?));
    let mut entries = 0;
    while let Some(Found { path, rest }) = walk.next(go_on)? {
        writeln!(list, "{path} {}", rest?).map_err(failed)?;
        entries += 1;
    }
    let (file, blake3, size_bytes) =
        list.into_inner().map_err(|e| failed(e.into_error()))?.finish();
    file.sync_all().map_err(failed)?;
    Ok(Written { entries, size_bytes, blake3 })
}

/// Whoever compares a tree with its list.
pub(crate) trait Witness {
    /// This much was read; an error ends the comparison.
    fn read(&mut self, bytes: u64) -> Result<()>;
    /// Something is not as it was.
    fn differs(&mut self, problem: String);
    /// Something cannot be read: damage, unless an error is returned.
    fn fails(&mut self, error: Error) -> Result<()>;
}

/// Compares a tree with its list, which must have been compared with its checksum.
pub(super) fn compare(tree: &Path, list: &Path, witness: &mut dyn Witness) -> Result<()> {
    let mut walk = Walk::new(tree)?;
    let mut lines = Lines::open(list)?;
    let mut expected = lines.next()?;
    while let Some(Found { path, rest }) = walk.next(&mut |bytes| witness.read(bytes))? {
        while let Some((missing, _)) =
            expected.take_if(|(next, _)| order(next, &path) == Ordering::Less)
        {
            witness.differs(format!("{missing} is missing."));
            expected = lines.next()?;
        }
        let Some((_, was)) = expected.take_if(|(next, _)| *next == path) else {
            witness.differs(format!("{path} was not stored there."));
            continue;
        };
        match rest {
            Ok(is) if is == was => {}
            Ok(is) => witness.differs(difference(&path, &was, &is)),
            Err(error) => witness.fails(error)?,
        }
        expected = lines.next()?;
    }
    while let Some((missing, _)) = expected {
        witness.differs(format!("{missing} is missing."));
        expected = lines.next()?;
    }
    Ok(())
}

/// What of an entry is not as it was.
fn difference(path: &str, was: &str, is: &str) -> String {
    let words =
        |text: &str| -> Vec<String> { text.splitn(FIELDS.len(), ' ').map(str::to_owned).collect() };
    let (was, is) = (words(was), words(is));
    let at = was.iter().zip(&is).position(|(was, is)| was != is).unwrap_or(was.len().min(is.len()));
    let word = |words: &[String]| words.get(at).cloned().unwrap_or_else(|| "none".to_owned());
    let field = FIELDS.get(at).unwrap_or(&"description");
    format!("The {field} of {path} is {}, not {}.", word(&is), word(&was))
}

/// The lines of a list, each as a path and the rest.
struct Lines {
    list: BufReader<File>,
    shown: String,
}

impl Lines {
    fn open(path: &Path) -> Result<Self> {
        let shown = path.display().to_string();
        Ok(Self { list: BufReader::new(files::open_regular(path)?), shown })
    }

    fn next(&mut self) -> Result<Option<(String, String)>> {
        let mut line = Vec::new();
        (&mut self.list)
            .take(LINE_BYTES_MAX)
            .read_until(b'\n', &mut line)
            .map_err(|e| Error::io(format!("Cannot read {}.", self.shown), e))?;
        if line.is_empty() {
            return Ok(None);
        }
        let line = String::from_utf8(line).ok();
        let pair = line.as_ref().and_then(|line| line.strip_suffix('\n')?.split_once(' '));
        match pair {
            Some((path, rest)) => Ok(Some((path.to_owned(), rest.to_owned()))),
            None => Err(corrupt(format!("{} has a line that is none.", self.shown))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[derive(Default)]
    struct Notes(Vec<String>);

    impl Witness for Notes {
        fn read(&mut self, _bytes: u64) -> Result<()> {
            Ok(())
        }
        fn differs(&mut self, problem: String) {
            self.0.push(problem);
        }
        fn fails(&mut self, error: Error) -> Result<()> {
            self.0.push(error.message);
            Ok(())
        }
    }

    struct Place(tempfile::TempDir);

    impl Place {
        fn new() -> Self {
            let place = Self(tempfile::tempdir().unwrap());
            let tree = place.tree();
            fs::create_dir_all(tree.join("a/b")).unwrap();
            // Sorted as names, and as paths, in another way.
            fs::create_dir_all(tree.join("a-b")).unwrap();
            for name in ["a/b/one", "a/two words", "a-b/three", "zz"] {
                fs::write(tree.join(name), name).unwrap();
            }
            fs::hard_link(tree.join("a/b/one"), tree.join("other")).unwrap();
            symlink("/etc/shadow", tree.join("link")).unwrap();
            let sparse = File::create(tree.join("sparse")).unwrap();
            sparse.set_len(1 << 40).unwrap();
            sparse.write_all_at(b"island", 300_000_000_000).unwrap();
            place
        }

        fn tree(&self) -> std::path::PathBuf {
            self.0.path().join("tree")
        }

        fn list(&self, name: &str) -> String {
            let path = self.0.path().join(name);
            write(&self.tree(), &path, &mut |_| Ok(())).unwrap();
            fs::read_to_string(path).unwrap()
        }

        fn differences(&self) -> Vec<String> {
            let mut notes = Notes::default();
            compare(&self.tree(), &self.0.path().join("list"), &mut notes).unwrap();
            notes.0
        }
    }

    #[test]
    fn a_list_is_in_order_and_two_lists_of_one_tree_are_the_same() {
        let place = Place::new();
        let list = place.list("list");
        assert_eq!(list, place.list("again"));
        let paths: Vec<_> = list.lines().map(|line| line.split(' ').next().unwrap()).collect();
        let expected = [
            "/",
            "/a",
            "/a/b",
            "/a/b/one",
            "/a/two\\x20words",
            "/a-b",
            "/a-b/three",
            "/link",
            "/other",
            "/sparse",
            "/zz",
        ];
        assert_eq!(paths, expected);
        assert!(paths.windows(2).all(|pair| order(pair[0], pair[1]) == Ordering::Less));
        assert!(list.contains("\n/other = /a/b/one\n"), "{list}");
        assert_eq!(place.differences(), [""; 0]);
    }

    #[test]
    fn zeroes_may_be_written_into_holes_and_nothing_else_may_change() {
        type Change = fn(&Path);
        let changes: [(Change, &[&str]); 10] = [
            (|tree| fs::write(tree.join("new"), "").unwrap(), &["/new was not stored there."]),
            (|tree| fs::remove_file(tree.join("zz")).unwrap(), &["/zz is missing."]),
            (
                |tree| fs::remove_dir_all(tree.join("a-b")).unwrap(),
                &["/a-b is missing.", "/a-b/three is missing."],
            ),
            (
                |tree| {
                    let mode = fs::Permissions::from_mode(0o640);
                    fs::set_permissions(tree.join("zz"), mode).unwrap();
                },
                &["The permissions of /zz"],
            ),
            (
                |tree| {
                    fs::remove_file(tree.join("link")).unwrap();
                    fs::write(tree.join("link"), "").unwrap();
                },
                &["The kind of /link"],
            ),
            (
                |tree| {
                    let file = File::options().write(true).open(tree.join("sparse")).unwrap();
                    file.write_all_at(b"x", 900_000_000_000).unwrap();
                },
                &["The content of /sparse"],
            ),
            (
                |tree| {
                    let file = File::options().write(true).open(tree.join("sparse")).unwrap();
                    file.set_len((1 << 40) - 1).unwrap();
                },
                &["The content of /sparse"],
            ),
            (
                |tree| {
                    let file = File::options().write(true).open(tree.join("sparse")).unwrap();
                    file.write_all_at(&[0; 200_000], 1_000_000).unwrap();
                },
                &[],
            ),
            (
                |tree| {
                    fs::remove_file(tree.join("other")).unwrap();
                    fs::copy(tree.join("a/b/one"), tree.join("other")).unwrap();
                },
                &["The kind of /other"],
            ),
            (
                |tree| {
                    let time = std::time::UNIX_EPOCH + std::time::Duration::from_nanos(5);
                    File::open(tree.join("zz")).unwrap().set_modified(time).unwrap();
                },
                &["The time of /zz is 0.000000005"],
            ),
        ];
        for (change, expected) in changes {
            let place = Place::new();
            // Whatever else changes with a change of these.
            let keep = |path: &Path| path.symlink_metadata().unwrap().modified().unwrap();
            let (tree, file) = (place.tree(), place.tree().join("sparse"));
            let times = (keep(&tree), keep(&file));
            place.list("list");
            change(&tree);
            File::open(&tree).unwrap().set_modified(times.0).unwrap();
            File::open(&file).unwrap().set_modified(times.1).unwrap();
            let found = place.differences();
            assert_eq!(found.len(), expected.len(), "{found:?}");
            for (found, expected) in found.iter().zip(expected) {
                assert!(found.starts_with(expected), "{found}");
            }
        }
    }

    #[test]
    fn a_comparison_ends_when_it_is_told_to() {
        struct Impatient;
        impl Witness for Impatient {
            fn read(&mut self, bytes: u64) -> Result<()> {
                if bytes == 0 { Ok(()) } else { Err(invalid("enough")) }
            }
            fn differs(&mut self, problem: String) {
                panic!("{problem}");
            }
            fn fails(&mut self, error: Error) -> Result<()> {
                panic!("{error}");
            }
        }
        let place = Place::new();
        place.list("list");
        let list = place.0.path().join("list");
        let error = compare(&place.tree(), &list, &mut Impatient).unwrap_err();
        assert_eq!(error.message, "enough");
    }
}
