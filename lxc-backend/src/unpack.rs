// SPDX-License-Identifier: MIT OR Apache-2.0
//! Makes the files of an archive in the new volumes of a container. Runs as the only thing in a sandbox
//! ([`crate::sandbox`]); what it may do there is all that an archive could make it do.
//!
//! Every path is looked up below the root of its volume, and never through a link or into another mount. What
//! is made is new: an entry that would replace something is refused. Directories get what the archive
//! says of them when all else is done, so that nothing that is made in them changes it or is changed by it; only
//! attributes that mean nothing to the kernel they get at once.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ct_archive::{Entry, Kind, Limits, NAME_BYTES_MAX, Reader, Region, shown};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, XattrFlags, flistxattr, fremovexattr,
    fsetxattr, linkat, makedev, mkdirat, mknodat, openat, openat2, symlinkat, syncfs,
};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use vzdump_core::bandwidth::Pace;

use crate::metadata::{ACCESS_ACL, DEFAULT_ACL, Held, Metadata, MetadataError};

/// Bytes of a path that the kernel is given at once; longer ones are walked in parts.
const PATH_PIECE_BYTES: usize = 2048;
/// What is kept of directories until the end, at most.
const DIRECTORIES_BYTES_MAX: usize = 1 << 30;
const DIRECTORY_BYTES: usize = size_of::<Directory>();
/// Kinds of things that were left out, which are told at most.
const LEFT_OUT_MAX: usize = 100;
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// The attribute that gives a program rights.
const CAPABILITY: &[u8] = b"security.capability";
/// Permissions of a directory until it gets its own.
const NEW_DIRECTORY: Mode = Mode::RWXU;

/// What is to be made, and where.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct UnpackSpec {
    /// How the archive is compressed.
    pub(crate) codec: Codec,
    /// Where volumes are mounted in the tree.
    pub(crate) mounts: Vec<PathBuf>,
    /// Whether device files are made: only for a privileged container.
    pub(crate) makes_devices: bool,
    /// How much it may be, and how fast.
    pub(crate) bounds: Bounds,
}

/// What bounds an unpacking.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Bounds {
    /// The most bytes of data.
    pub(crate) data_bytes: u64,
    /// The most bytes of the archive, uncompressed, per second.
    pub(crate) bytes_per_s: Option<u64>,
}

/// A stream that is not read faster than it may be.
struct Paced<R> {
    stream: R,
    pace: Option<Pace>,
}

impl<R: io::Read> io::Read for Paced<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.stream.read(into)?;
        if let Some(pace) = &mut self.pace {
            pace.wait_for(count as u64);
        }
        Ok(count)
    }
}

/// A compression, to be passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Codec {
    None,
    Gz,
    Bz2,
    Xz,
    Zst,
}

impl From<Codec> for ct_archive::Codec {
    fn from(codec: Codec) -> Self {
        match codec {
            Codec::None => Self::None,
            Codec::Gz => Self::Gz,
            Codec::Bz2 => Self::Bz2,
            Codec::Xz => Self::Xz,
            Codec::Zst => Self::Zst,
        }
    }
}

/// What was made, so far or in all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Unpacked {
    /// Entries.
    pub(crate) entries: u64,
    /// The volumes that have got anything, by their numbers in [`UnpackSpec::mounts`].
    pub(crate) filled: BTreeSet<usize>,
    /// Bytes of data.
    pub(crate) data_bytes: u64,
    /// What was left out, in words, and how often.
    pub(crate) left_out: BTreeMap<String, u64>,
    /// Whether all is done.
    pub(crate) is_complete: bool,
}

/// Makes the files of `archive` below `tree`, and says from time to time how far it is.
pub(crate) fn unpack(
    archive: impl io::Read + Send,
    tree: &Path,
    spec: &UnpackSpec,
    mut report: impl FnMut(&Unpacked),
) -> Result<Unpacked, String> {
    let limits = Limits { data_bytes: spec.bounds.data_bytes, ..Limits::default() };
    let stream = ct_archive::decompress(archive, spec.codec.into()).map_err(words)?;
    let stream = Paced { stream, pace: spec.bounds.bytes_per_s.map(Pace::new) };
    let mut reader = Reader::new(stream, limits);
    let mut unpacking = Unpacking::new(tree, spec)?;
    let mut reported = Instant::now();
    while let Some(entry) = reader.next_entry().map_err(words)? {
        let path = entry.path.clone();
        let at = |why: String| format!("'{}': {why}", shown(&path));
        unpacking.take(entry, &mut reader).map_err(at)?;
        unpacking.done.entries += 1;
        unpacking.done.filled.extend(unpacking.volumes.number_of_the_one_with(&path));
        if reported.elapsed() >= REPORT_INTERVAL {
            report(&unpacking.done);
            reported = Instant::now();
        }
    }
    unpacking.finish()
}

fn words(error: impl std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// A directory whose metadata are set at the end.
struct Directory {
    /// How much of its path is that of the directory before it, and what follows: a path may be much longer
    /// than a name.
    shared: usize,
    rest: Vec<u8>,
    metadata: Metadata,
    /// It was there, so it may have attributes of an earlier entry.
    was_there: bool,
}

struct Unpacking {
    volumes: Volumes,
    makes_devices: bool,
    directories: Vec<Directory>,
    directories_bytes: usize,
    /// Where the last of them is.
    last_path: Vec<u8>,
    /// The directory in which something was made last.
    parent: Option<(Vec<u8>, OwnedFd)>,
    done: Unpacked,
}

impl Unpacking {
    fn new(tree: &Path, spec: &UnpackSpec) -> Result<Self, String> {
        Ok(Self {
            volumes: Volumes::open(tree, &spec.mounts)?,
            makes_devices: spec.makes_devices,
            directories: Vec::new(),
            directories_bytes: 0,
            last_path: Vec::new(),
            parent: None,
            done: Unpacked::default(),
        })
    }

    fn take<R: io::Read>(
        &mut self,
        mut entry: Entry,
        reader: &mut Reader<R>,
    ) -> Result<(), String> {
        if entry.kind == Kind::Directory {
            return self.directory(entry);
        }
        if self.volumes.is_root(&entry.path) {
            return Err("a volume is mounted there, so it must be a directory".to_owned());
        }
        let (parent, name) = split(&entry.path);
        let (parent, name) = (parent.to_vec(), name.to_vec());
        self.enter(&parent)?;
        match &mut entry.kind {
            Kind::File { size, regions } => {
                let (size, regions) = (*size, std::mem::take(regions));
                self.file(&name, size, &regions, entry, reader)
            }
            Kind::HardLink(target) => self.hard_link(target, &name),
            Kind::Symlink(target) => {
                symlinkat(target.as_slice(), self.parent()?, name.as_slice()).map_err(new_words)?;
                self.describe(&name, entry)
            }
            Kind::Fifo => self.node(&name, FileType::Fifo, (0, 0), entry),
            Kind::CharDevice { major, minor } => {
                let numbers = (*major, *minor);
                self.device(&name, FileType::CharacterDevice, numbers, entry)
            }
            Kind::BlockDevice { major, minor } => {
                let numbers = (*major, *minor);
                self.device(&name, FileType::BlockDevice, numbers, entry)
            }
            Kind::Directory => Ok(()),
        }
    }

    fn parent(&self) -> Result<&OwnedFd, String> {
        let parent = self.parent.as_ref().map(|(_, fd)| fd);
        parent.ok_or_else(|| "no directory is open".to_owned())
    }

    /// Makes the directory the one in which things are made; what is missing of it is made, too.
    fn enter(&mut self, path: &[u8]) -> Result<(), String> {
        if self.parent.as_ref().is_some_and(|(open, _)| open == path) {
            return Ok(());
        }
        let opened = match self.volumes.open_directory(path) {
            Err(Errno::NOENT) => self.make_directories(path)?,
            other => other.map_err(path_words)?,
        };
        self.parent = Some((path.to_vec(), opened));
        Ok(())
    }

    /// Directories that the archive has not described, at least not yet: root's, as usual.
    fn make_directories(&mut self, path: &[u8]) -> Result<OwnedFd, String> {
        let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
        let ends: Vec<usize> = ends.chain([path.len()]).collect();
        for end in ends {
            let part = &path[..end];
            if self.volumes.is_root(part) || !self.make_directory(part)? {
                continue;
            }
            let metadata = Metadata { mode: 0o755, ..Metadata::default() };
            self.keep(part, metadata, false)?;
        }
        self.volumes.open_directory(path).map_err(path_words)
    }

    /// Whether it was made now, or else is a directory.
    fn make_directory(&self, path: &[u8]) -> Result<bool, String> {
        let (parent, name) = split(path);
        let parent = self.volumes.open_directory(parent).map_err(path_words)?;
        match mkdirat(&parent, name, NEW_DIRECTORY) {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) => {
                self.volumes.open_directory(path).map_err(path_words)?;
                Ok(false)
            }
            Err(errno) => Err(new_words(errno)),
        }
    }

    fn directory(&mut self, entry: Entry) -> Result<(), String> {
        let is_new = if self.volumes.is_root(&entry.path) {
            false
        } else {
            let (parent, _) = split(&entry.path);
            let parent = parent.to_vec();
            self.enter(&parent)?;
            self.make_directory(&entry.path)?
        };
        let path = entry.path.clone();
        let mut metadata = self.metadata(entry);
        let (now, later): (Vec<_>, Vec<_>) =
            metadata.xattrs.into_iter().partition(|(name, _)| is_free(name));
        metadata.xattrs = later;
        if !is_new || !now.is_empty() {
            self.set_free(&path, &now)?;
        }
        self.keep(&path, metadata, !is_new)
    }

    /// Attributes of a directory that change nothing that is made in it are set at once, in place of those that it
    /// has: all of them together could be more than memory has room for.
    fn set_free(&self, path: &[u8], xattrs: &[(Vec<u8>, Vec<u8>)]) -> Result<(), String> {
        let opened = self.open_readable(path)?;
        remove_xattrs(&opened, is_free)?;
        for (name, value) in xattrs {
            fsetxattr(&opened, name.as_slice(), value, XattrFlags::empty()).map_err(|errno| {
                format!("cannot set its attribute '{}': {}", shown(name), io::Error::from(errno))
            })?;
        }
        Ok(())
    }

    fn keep(&mut self, path: &[u8], metadata: Metadata, was_there: bool) -> Result<(), String> {
        let shared = self.last_path.iter().zip(path).take_while(|(a, b)| a == b).count();
        let rest = path[shared..].to_vec();
        let xattrs = metadata.xattrs.iter();
        let xattrs: usize = xattrs.map(|(name, value)| name.len() + value.len() + 64).sum();
        self.directories_bytes += DIRECTORY_BYTES + rest.len() + xattrs;
        if self.directories_bytes > DIRECTORIES_BYTES_MAX {
            return Err("the archive has too many directories".to_owned());
        }
        self.last_path.truncate(shared);
        self.last_path.extend_from_slice(&rest);
        self.directories.push(Directory { shared, rest, metadata, was_there });
        Ok(())
    }

    fn file<R: io::Read>(
        &mut self,
        name: &[u8],
        size: u64,
        regions: &[Region],
        entry: Entry,
        reader: &mut Reader<R>,
    ) -> Result<(), String> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let file: File = openat(self.parent()?, name, flags, mode).map_err(new_words)?.into();
        let mut end = 0;
        let done = &mut self.done;
        let copied = reader.copy_data(regions, |offset, bytes| {
            file.write_all_at(bytes, offset)?;
            end = offset + bytes.len() as u64;
            done.data_bytes += bytes.len() as u64;
            Ok(())
        });
        copied.map_err(words)?;
        if size != end {
            file.set_len(size).map_err(|error| format!("cannot make it {size} bytes: {error}"))?;
        }
        let metadata = self.metadata(entry);
        let applied = metadata.apply(Held::Open(file.as_fd()));
        self.applied(applied)
    }

    fn applied(&mut self, applied: Result<bool, MetadataError>) -> Result<(), String> {
        if !applied.map_err(|error| error.to_string())? {
            self.leave_out("times that the file system does not have; the nearest ones are set");
        }
        Ok(())
    }

    fn hard_link(&mut self, target: &[u8], name: &[u8]) -> Result<(), String> {
        let words = |errno: Errno| match errno {
            Errno::NOENT => format!("its other name '{}' is not there yet", shown(target)),
            errno => format!("cannot link it to '{}': {}", shown(target), new_words(errno)),
        };
        if self.volumes.is_root(target) {
            return Err("it is a hard link to a directory".to_owned());
        }
        let (target_parent, target_name) = split(target);
        let from = self.volumes.open_directory(target_parent).map_err(words)?;
        linkat(&from, target_name, self.parent()?, name, AtFlags::empty()).map_err(words)
    }

    fn device(
        &mut self,
        name: &[u8],
        kind: FileType,
        numbers: (u32, u32),
        entry: Entry,
    ) -> Result<(), String> {
        // Which says that something of a lower layer is gone: no device at all.
        let is_whiteout = kind == FileType::CharacterDevice && numbers == (0, 0);
        if !is_whiteout && !self.makes_devices {
            if entry.path.starts_with(b"dev/") {
                self.leave_out("device files in /dev, which are made when the container starts");
                return Ok(());
            }
            let (major, minor) = numbers;
            return Err(format!(
                "it is the device {major}:{minor} of the host, which an unprivileged container \
                 must not have"
            ));
        }
        self.node(name, kind, numbers, entry)
    }

    fn node(
        &mut self,
        name: &[u8],
        kind: FileType,
        (major, minor): (u32, u32),
        entry: Entry,
    ) -> Result<(), String> {
        let mode = Mode::RUSR | Mode::WUSR;
        mknodat(self.parent()?, name, kind, mode, makedev(major, minor)).map_err(new_words)?;
        self.describe(name, entry)
    }

    /// Sets what the archive says of something that cannot be opened.
    fn describe(&mut self, name: &[u8], entry: Entry) -> Result<(), String> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let held = openat(self.parent()?, name, flags, Mode::empty()).map_err(path_words)?;
        let is_link = matches!(entry.kind, Kind::Symlink(_));
        let metadata = self.metadata(entry);
        let held = if is_link { Held::Link(held.as_fd()) } else { Held::Named(held.as_fd()) };
        let applied = metadata.apply(held);
        self.applied(applied)
    }

    fn metadata(&mut self, entry: Entry) -> Metadata {
        let Entry { mode, uid, gid, mtime, atime, access_acl, default_acl, .. } = entry;
        let mut xattrs = Vec::new();
        for (name, value) in entry.xattrs {
            if is_free(&name) || name == CAPABILITY {
                xattrs.push((name, value));
            } else {
                let space = name.split(|byte| *byte == b'.').next().unwrap_or_default();
                let what = format!("attributes '{}.*', which are the host's matter", shown(space));
                self.leave_out(&what);
            }
        }
        if entry.is_acl_cut {
            self.leave_out(
                "lines of access control lists for ids that the container does not have",
            );
        }
        xattrs.extend(access_acl.map(|value| (ACCESS_ACL.to_vec(), value)));
        xattrs.extend(default_acl.map(|value| (DEFAULT_ACL.to_vec(), value)));
        let time = |time: ct_archive::Time| (time.secs, time.nanos);
        Metadata { uid, gid, mode, mtime: Some(time(mtime)), atime: atime.map(time), xattrs }
    }

    fn leave_out(&mut self, what: &str) {
        let left_out = &mut self.done.left_out;
        if let Some(count) = left_out.get_mut(what) {
            *count += 1;
        } else if left_out.len() < LEFT_OUT_MAX {
            left_out.insert(what.to_owned(), 1);
        }
    }

    /// The directories, and all of it to disk.
    fn finish(mut self) -> Result<Unpacked, String> {
        self.parent = None;
        let mut path = Vec::new();
        for directory in std::mem::take(&mut self.directories) {
            path.truncate(directory.shared);
            path.extend_from_slice(&directory.rest);
            let at = |why: String| format!("'{}': {why}", shown(&path));
            self.describe_directory(&path, &directory).map_err(at)?;
        }
        for (_, root) in &self.volumes.roots {
            let root = openat(root, ".", readable(), Mode::empty()).map_err(path_words)?;
            syncfs(&root).map_err(|errno| {
                format!("cannot write the files to disk: {}", io::Error::from(errno))
            })?;
        }
        self.done.is_complete = true;
        Ok(self.done)
    }

    fn open_readable(&self, path: &[u8]) -> Result<OwnedFd, String> {
        let named = self.volumes.open_directory(path).map_err(path_words)?;
        openat(&named, ".", readable(), Mode::empty()).map_err(path_words)
    }

    fn describe_directory(&mut self, path: &[u8], directory: &Directory) -> Result<(), String> {
        let opened = self.open_readable(path)?;
        if directory.was_there {
            let is_late = |name: &[u8]| [ACCESS_ACL, DEFAULT_ACL, CAPABILITY].contains(&name);
            remove_xattrs(&opened, is_late)?;
        }
        let applied = directory.metadata.apply(Held::Open(opened.as_fd()));
        self.applied(applied)
    }
}

fn readable() -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC
}

/// Whether an attribute means nothing to the kernel.
fn is_free(name: &[u8]) -> bool {
    name.starts_with(b"user.")
}

/// Removes attributes that an earlier entry of the same directory has set.
fn remove_xattrs(directory: &OwnedFd, which: impl Fn(&[u8]) -> bool) -> Result<(), String> {
    let words =
        |errno: Errno| format!("cannot remove its earlier attributes: {}", io::Error::from(errno));
    let mut names = vec![0; 64 << 10];
    let len = match flistxattr(directory, &mut names[..]) {
        Err(Errno::NOTSUP) => return Ok(()),
        other => other.map_err(words)?,
    };
    for name in names[..len].split(|byte| *byte == 0).filter(|name| which(name)) {
        fremovexattr(directory, name).map_err(words)?;
    }
    Ok(())
}

/// The directory of a path and its last name. The root has neither.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

/// Why something was not made.
fn new_words(errno: Errno) -> String {
    match errno {
        Errno::EXIST => "it is there twice".to_owned(),
        errno => path_words(errno),
    }
}

fn path_words(errno: Errno) -> String {
    match errno {
        Errno::LOOP | Errno::NOTDIR => "its path leads through something that is no directory, \
                                        but a link or a file"
            .to_owned(),
        Errno::XDEV => "its path leads out of its volume".to_owned(),
        errno => io::Error::from(errno).to_string(),
    }
}

/// The volumes of the tree.
struct Volumes {
    /// Where each is mounted and its root, the longest path first.
    roots: Vec<(Vec<u8>, OwnedFd)>,
    /// The same, as they were named.
    named: Vec<Vec<u8>>,
}

impl Volumes {
    fn open(tree: &Path, mounts: &[PathBuf]) -> Result<Self, String> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat2(CWD, tree, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)
            .map_err(path_words)?;
        let (mut roots, mut named) = (Vec::new(), Vec::new());
        for mount in mounts {
            let below = mount.strip_prefix("/").unwrap_or(mount);
            if below.as_os_str().is_empty() {
                named.push(Vec::new());
                continue;
            }
            let path = ct_archive::clean(below.as_os_str().as_bytes(), PATH_PIECE_BYTES);
            let path = path.map_err(words)?;
            named.push(path.clone());
            // Into the mount, which is the only one it may lead to.
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
            let opened = openat2(&root, path.as_slice(), flags, Mode::empty(), resolve);
            let opened = opened.map_err(|errno| {
                format!("the volume at '{}': {}", mount.display(), path_words(errno))
            })?;
            roots.push((path, opened));
        }
        roots.push((Vec::new(), root));
        roots.sort_by_key(|(path, _)| std::cmp::Reverse(path.len()));
        Ok(Self { roots, named })
    }

    /// In which volume something is; none for the root of one, which is there without the archive.
    fn number_of_the_one_with(&self, path: &[u8]) -> Option<usize> {
        let (root, _) = self.roots.iter().find(|(root, _)| below(path, root).is_some())?;
        if root == path { None } else { self.named.iter().position(|named| named == root) }
    }

    fn is_root(&self, path: &[u8]) -> bool {
        self.roots.iter().any(|(root, _)| root == path)
    }

    /// Opens a directory by its path in the tree, as a place only.
    fn open_directory(&self, path: &[u8]) -> rustix::io::Result<OwnedFd> {
        let found = self.roots.iter().find_map(|(root, fd)| Some((fd, below(path, root)?)));
        let (root, mut rest) = found.ok_or(Errno::NOENT)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let mut at: Option<OwnedFd> = None;
        loop {
            let (piece, more) = first_piece(rest);
            let from = at.as_ref().unwrap_or(root);
            let piece = if piece.is_empty() { b"." } else { piece };
            let opened = openat2(from, piece, flags, Mode::empty(), resolve)?;
            if more.is_empty() {
                return Ok(opened);
            }
            (at, rest) = (Some(opened), more);
        }
    }
}

/// The path as seen from `root`, if it is below it.
fn below<'a>(path: &'a [u8], root: &[u8]) -> Option<&'a [u8]> {
    if root.is_empty() {
        return Some(path);
    }
    match path.strip_prefix(root)? {
        [] => Some(b""),
        [b'/', rest @ ..] => Some(rest),
        _ => None,
    }
}

/// As many whole names as the kernel takes at once, and the rest.
fn first_piece(path: &[u8]) -> (&[u8], &[u8]) {
    if path.len() <= PATH_PIECE_BYTES {
        return (path, b"");
    }
    let end = path[..PATH_PIECE_BYTES].iter().rposition(|byte| *byte == b'/');
    // A name is much shorter than a piece.
    let end = end.unwrap_or(NAME_BYTES_MAX.min(path.len()));
    (&path[..end], path.get(end + 1..).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    /// An entry with what pax records say of it.
    fn entry(kind: u8, path: &[u8], records: &[(&[u8], &[u8])], data: &[u8]) -> Vec<u8> {
        let mut extended = Vec::new();
        for (key, value) in [(&b"path"[..], path)].iter().chain(records) {
            let rest = [&b" "[..], key, b"=", value, b"\n"].concat();
            let mut len = rest.len() + 1;
            while len != rest.len() + len.to_string().len() {
                len += 1;
            }
            extended.extend(len.to_string().into_bytes());
            extended.extend(rest);
        }
        [block(b'x', &extended), block(kind, data)].concat()
    }

    fn block(kind: u8, data: &[u8]) -> Vec<u8> {
        let mut block = vec![0_u8; 512];
        block[..1].copy_from_slice(b"x");
        for (at, text) in [(100, "0000755\0"), (108, "0000000\0"), (116, "0000000\0")] {
            block[at..at + 8].copy_from_slice(text.as_bytes());
        }
        block[124..136].copy_from_slice(format!("{:011o}\0", data.len()).as_bytes());
        block[136..148].copy_from_slice(b"00000000000\0");
        block[148..156].copy_from_slice(b"        ");
        block[156] = kind;
        block[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block.extend(data);
        block.resize(block.len().next_multiple_of(512), 0);
        block
    }

    fn unpack_here(tree: &Path, entries: &[Vec<u8>]) -> Unpacked {
        let archive = [entries.concat(), vec![0; 1024]].concat();
        let spec = UnpackSpec {
            codec: Codec::None,
            mounts: Vec::new(),
            makes_devices: false,
            bounds: Bounds { data_bytes: 1 << 20, bytes_per_s: None },
        };
        unpack(archive.as_slice(), tree, &spec, |_| {}).unwrap()
    }

    fn attribute(tree: &Path, name: &str) -> Option<Vec<u8>> {
        let mut value = vec![0; 64];
        let len = rustix::fs::getxattr(tree.join("twice"), name, &mut value[..]).ok()?;
        value.truncate(len);
        Some(value)
    }

    #[test]
    fn deep_directories_are_made_and_each_gets_what_is_its_own() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        std::fs::create_dir(&tree).unwrap();
        let deep = ["d".repeat(250).as_str()].repeat(260).join("/").into_bytes();
        let file = [&deep[..], b"/file"].concat();
        let mut entries = vec![entry(b'0', &file, &[], b"deep")];
        for (path, mtime) in [("dd", "7"), ("dd/e", "8"), ("d", "9"), ("dd/e2", "10")] {
            entries.push(entry(b'5', path.as_bytes(), &[(b"mtime", mtime.as_bytes())], b""));
        }
        let done = unpack_here(&tree, &entries);
        assert!(done.is_complete && done.data_bytes == 4);
        let volumes = Volumes::open(&tree, &[]).unwrap();
        let parent = volumes.open_directory(&deep).unwrap();
        let made = openat(&parent, "file", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        assert_eq!(io::read_to_string(File::from(made.unwrap())).unwrap(), "deep");
        for (path, mtime) in [("dd", 7), ("dd/e", 8), ("d", 9), ("dd/e2", 10)] {
            assert_eq!(std::fs::metadata(tree.join(path)).unwrap().mtime(), mtime, "{path}");
        }
        vzdump_core::temp_tree::remove(&tree).unwrap();
    }

    #[test]
    fn a_directory_that_is_there_twice_has_the_attributes_of_the_second() {
        let dir = tempfile::tempdir().unwrap();
        let probe = rustix::fs::setxattr(dir.path(), "user.probe", b"1", XattrFlags::empty());
        if !rustix::process::geteuid().is_root() || probe.is_err() {
            eprintln!("skipped: needs root, and attributes of files");
            return;
        }
        let with = |records: &[(&[u8], &[u8])]| entry(b'5', b"twice", records, b"");
        let first = with(&[
            (b"SCHILY.xattr.user.a", b"1"),
            (b"SCHILY.xattr.user.b", b"1"),
            (b"SCHILY.acl.default", b"user::rwx,user:7:rwx,group::r-x,mask::rwx,other::---"),
        ]);
        let second = with(&[(b"SCHILY.xattr.user.b", b"2")]);
        unpack_here(dir.path(), &[first, entry(b'0', b"twice/file", &[], b""), second]);
        assert_eq!(attribute(dir.path(), "user.a"), None);
        assert_eq!(attribute(dir.path(), "user.b").unwrap(), b"2");
        assert_eq!(attribute(dir.path(), "system.posix_acl_default"), None);
    }
}
