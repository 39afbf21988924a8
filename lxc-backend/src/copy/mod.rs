// SPDX-License-Identifier: MIT OR Apache-2.0
//! Copies a container's volume in two passes: all of it while the container runs, and then, frozen, what has
//! changed since.
//!
//! ```text
//!  first    walk ─► entry, attributes ─► copy      what was seen is kept in `stamp`
//!  second   walk ─► unchanged? ─► nothing          else the copy is removed and made again
//!  finish   owners, times and attributes of directories, when nothing is frozen any more
//! ```
//!
//! Only directories are opened by path, each from the volume's root, through no link and into no other mount
//! (`deep`): a container that changes its tree meanwhile leads nowhere else. What cannot be read is noticed in
//! the second pass, because in the first one it may just have gone.

mod attributes;
pub(crate) mod deep;
mod entry;
mod links;
mod paths;
mod stamp;
#[cfg(test)]
mod tests;
mod walk;

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use provider_api::Reached;
use rustix::fs::{AtFlags, Mode, OFlags, fstat, mkdirat, openat, syncfs, unlinkat};
use rustix::io::Errno;
use vzdump_core::bandwidth::DiskShare;

use attributes::{At, Attribute, Looks, give};
use paths::{Dir, Paths};
use stamp::Memory;
use walk::Pass;

/// How much is read at once.
const DATA_BYTES: usize = 256 << 10;
/// The kernel's bounds of extended attributes and their names.
const ATTRIBUTE_BYTES_MAX: usize = 64 << 10;
/// For the names of a directory.
const NAMES_BYTES: usize = 64 << 10;
/// What a pass over all volumes keeps in memory of directories and of files with several names.
const KEPT_BYTES_MAX: usize = 1 << 30;
/// How many files that cannot be read are listed; all are counted.
const SKIPPED_MAX: usize = 1000;
/// What cannot be while nothing runs, unless the file system is damaged or the host changes it.
const VANISHED: &str = "it is not there any more, or twice, although the container is frozen";
/// What was a directory of the copy and is none any more is moved here, which takes no time.
const GONE: &str = "gone";

/// Why a copy failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    /// Nobody waits for it any more.
    #[error("the copy was cancelled")]
    Cancelled,
    /// The time that it had is over.
    #[error("the copy took too long")]
    TooLong,
    /// What is to be kept in memory of the container would be too much.
    #[error("too many directories, attributes of directories, or files with several names")]
    TooMany,
    /// A file of the container cannot be read.
    #[error("cannot read '{path}' of the container: {error}")]
    Source {
        /// Within the volume.
        path: PathBuf,
        error: io::Error,
    },
    /// The copy cannot be made.
    #[error("cannot {doing} ('{path}' of the container): {error}")]
    Target { path: PathBuf, doing: String, error: io::Error },
}

impl CopyError {
    /// Whether the copy found no room.
    pub(crate) fn is_full(&self) -> bool {
        let kinds = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
        matches!(self, Self::Target { error, .. } if kinds.contains(&error.kind()))
    }
}

/// Why one file could not be copied.
#[derive(Debug)]
enum Fault {
    Cancelled,
    TooLong,
    TooMany,
    /// It is not there any more, or is another one.
    Vanished,
    Source(io::Error),
    Target {
        doing: String,
        error: io::Error,
    },
}

impl Fault {
    fn source(errno: Errno) -> Self {
        match errno {
            Errno::NOENT | Errno::STALE | Errno::LOOP | Errno::NOTDIR => Self::Vanished,
            other => Self::Source(other.into()),
        }
    }

    fn target(doing: impl Into<String>, errno: Errno) -> Self {
        Self::Target { doing: doing.into(), error: errno.into() }
    }

    /// For a name that a directory which is being changed may give twice.
    fn making(doing: &str, errno: Errno) -> Self {
        if errno == Errno::EXIST { Self::Vanished } else { Self::target(doing, errno) }
    }

    fn writing(error: &io::Error) -> Self {
        let error = error.raw_os_error().map_or_else(
            || io::Error::new(error.kind(), error.to_string()),
            io::Error::from_raw_os_error,
        );
        Self::Target { doing: "write to a file".to_owned(), error }
    }

    fn at(self, path: &Path) -> CopyError {
        let path = Path::new("/").join(path);
        match self {
            Self::Cancelled => CopyError::Cancelled,
            Self::TooLong => CopyError::TooLong,
            Self::TooMany => CopyError::TooMany,
            Self::Vanished => CopyError::Source { path, error: io::Error::other(VANISHED) },
            Self::Source(error) => CopyError::Source { path, error },
            Self::Target { doing, error } => CopyError::Target { path, doing, error },
        }
    }
}

/// What a copy shares with those who wait for it.
#[derive(Default)]
pub(crate) struct Control {
    is_cancelled: AtomicBool,
    /// Files and directories that were looked at.
    entries: AtomicU64,
    /// Bytes that were read.
    bytes: AtomicU64,
    /// Bytes of memory that are kept until the end.
    kept: AtomicUsize,
    /// When it must be complete.
    deadline: Option<Instant>,
    /// What may be read in a second.
    limit: Option<(tokio::runtime::Handle, DiskShare)>,
    /// Called before a directory is opened.
    #[cfg(test)]
    at_directory: tests::AtDirectory,
}

impl Control {
    /// With a limit of what is read, which is only kept while nothing is frozen.
    pub(crate) fn with_limit(share: DiskShare) -> Self {
        Self { limit: Some((tokio::runtime::Handle::current(), share)), ..Self::default() }
    }

    /// With a time at which it must be complete.
    pub(crate) fn until(deadline: Instant) -> Self {
        Self { deadline: Some(deadline), ..Self::default() }
    }

    /// Ends the copy soon.
    pub(crate) fn cancel(&self) {
        self.is_cancelled.store(true, Ordering::Relaxed);
    }

    /// How many entries were looked at and bytes read, for signs of life.
    pub(crate) fn progress(&self) -> (u64, u64) {
        (self.entries.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }

    fn go_on(&self) -> Result<(), Fault> {
        if self.is_cancelled.load(Ordering::Relaxed) {
            return Err(Fault::Cancelled);
        }
        if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(Fault::TooLong);
        }
        Ok(())
    }

    /// Counts memory that is kept until the end: how much is the container's choice.
    fn keep(&self, bytes: usize) -> Result<(), Fault> {
        let before = self.kept.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) > KEPT_BYTES_MAX { Err(Fault::TooMany) } else { Ok(()) }
    }

    fn passed(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        if let Some((runtime, share)) = &self.limit {
            runtime.block_on(share.pass(bytes));
        }
    }
}

/// A file that was not copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Skipped {
    /// As the container sees it.
    pub(crate) path: PathBuf,
    pub(crate) why: String,
}

/// What a pass did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct PassReport {
    /// Files and directories that were looked at.
    pub(crate) entries: u64,
    /// Files that were copied.
    pub(crate) copied: u64,
    /// Bytes of them that were read.
    pub(crate) copied_bytes: u64,
    /// Files and directories of the copy that were removed.
    pub(crate) removed: u64,
    /// Files and directories that patterns left out.
    pub(crate) excluded: u64,
    /// Files that could not be read, in number.
    pub(crate) skipped_count: u64,
    /// The first of them.
    pub(crate) skipped: Vec<Skipped>,
    /// Directories that belong to other file systems; they are empty in the copy.
    pub(crate) foreign: Vec<PathBuf>,
}

impl PassReport {
    pub(crate) fn add(&mut self, other: Self) {
        self.entries += other.entries;
        self.copied += other.copied;
        self.copied_bytes += other.copied_bytes;
        self.removed += other.removed;
        self.excluded += other.excluded;
        self.skipped_count += other.skipped_count;
        self.skipped.extend(other.skipped);
        self.skipped.truncate(SKIPPED_MAX);
        self.foreign.extend(other.foreign);
        self.foreign.truncate(SKIPPED_MAX);
    }
}

/// Space of one worker.
#[derive(Debug)]
struct Buffers {
    list: Vec<u8>,
    value: Vec<u8>,
    data: Vec<u8>,
    names: Vec<u8>,
}

impl Buffers {
    fn new() -> Self {
        Self {
            list: Vec::with_capacity(ATTRIBUTE_BYTES_MAX),
            value: Vec::with_capacity(ATTRIBUTE_BYTES_MAX),
            data: vec![0; DATA_BYTES],
            names: Vec::with_capacity(NAMES_BYTES),
        }
    }
}

/// What a directory is to get in the end.
struct DirectoryEnd {
    dir: Dir,
    /// The number of its copy.
    copy: u64,
    looks: Looks,
    attributes: Vec<Attribute>,
}

impl DirectoryEnd {
    /// About what it takes of the memory.
    fn bytes(&self) -> usize {
        let attributes = self.attributes.iter();
        let attributes: usize =
            attributes.map(|(name, value)| name.count_bytes() + value.len() + 96).sum();
        size_of::<Self>() + attributes
    }
}

/// The copy of one volume.
pub(crate) struct TreeCopy {
    /// Where the container has it; reports name files by that.
    pub(crate) mount_point: PathBuf,
    source: OwnedFd,
    target: OwnedFd,
    gone: OwnedFd,
    /// What is left out, as it holds in the root of the volume.
    reached: Reached,
    memory: Memory,
    /// Files with several names whose copy the first pass could not complete.
    broken: Vec<u64>,
    /// Of each pass.
    ends: Vec<(Paths, Vec<DirectoryEnd>)>,
}

impl TreeCopy {
    /// The copy of the directory `source`, without what is left out, at `<place>/<name>`, which is made. Finds out whether attributes can be
    /// kept there. May block, as all of this.
    pub(crate) fn new(
        source: OwnedFd,
        place: &OwnedFd,
        name: &str,
        reached: Reached,
    ) -> Result<Self, CopyError> {
        let make = |name: &str| {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            mkdirat(place, name, Mode::RWXU)?;
            openat(place, name, flags, Mode::empty())
        };
        let at_root = |fault: Fault| fault.at(Path::new(""));
        let target =
            make(name).map_err(|errno| at_root(Fault::target("make a directory", errno)))?;
        let gone = make(&format!("{name}.{GONE}"))
            .map_err(|errno| at_root(Fault::target("make a directory", errno)))?;
        probe_attributes(&target).map_err(at_root)?;
        Ok(Self {
            mount_point: PathBuf::from("/"),
            source,
            target,
            gone,
            reached,
            memory: Memory::default(),
            broken: Vec::new(),
            ends: Vec::new(),
        })
    }

    /// Copies everything, while the container runs.
    pub(crate) fn first(&mut self, control: &Control) -> Result<PassReport, CopyError> {
        self.memory = Memory::begin();
        syncfs(&self.source).map_err(|errno| Fault::source(errno).at(Path::new("")))?;
        let outcome = Pass::run(self, control, None)?;
        for names in outcome.names {
            self.memory.add(names);
        }
        self.broken = outcome.broken;
        self.ends = vec![(outcome.paths, outcome.ends)];
        Ok(outcome.report)
    }

    /// Copies what has changed since, while the container is frozen. Files that cannot be read are an error, or
    /// skipped.
    pub(crate) fn second(
        &mut self,
        control: &Control,
        skips_unreadable: bool,
    ) -> Result<PassReport, CopyError> {
        let outcome = Pass::run(self, control, Some(skips_unreadable))?;
        self.ends.push((outcome.paths, outcome.ends));
        Ok(outcome.report)
    }

    /// Completes the directories, when the container runs again.
    pub(crate) fn finish(self) -> Result<(), CopyError> {
        // What the second pass says of a directory comes last and is all it is to have.
        let mut done = std::collections::HashSet::new();
        let all = self.ends.iter().rev();
        for (paths, end) in all.flat_map(|(paths, ends)| ends.iter().map(move |end| (paths, end))) {
            if !done.insert(end.copy) {
                continue;
            }
            let path = paths.path(end.dir);
            let opened = match deep::open_directory(&self.target, &path) {
                // Removed by the second pass.
                Err(error) if is_no_directory(&error) => continue,
                other => other.map_err(|error| Fault::writing(&error).at(&path))?,
            };
            let stat = fstat(&opened)
                .map_err(|errno| Fault::target("look at a directory", errno).at(&path))?;
            // Else another one has its place.
            if stat.st_ino == end.copy {
                give(At::Open(opened.as_fd()), end.looks, &end.attributes)
                    .map_err(|fault| fault.at(&path))?;
            }
        }
        Ok(())
    }
}

fn is_no_directory(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
        || error.raw_os_error() == Some(Errno::LOOP.raw_os_error())
}

/// Fails on file systems that have no extended attributes at all.
fn probe_attributes(target: &OwnedFd) -> Result<(), Fault> {
    for name in [c"trusted.vzdump", c"user.vzdump"] {
        rustix::fs::fsetxattr(target, name, b"1", rustix::fs::XattrFlags::empty())
            .and_then(|()| rustix::fs::fremovexattr(target, name))
            .map_err(|errno| {
                let what = format!("keep extended attributes such as '{}'", name.to_string_lossy());
                Fault::target(what, errno)
            })?;
    }
    Ok(())
}

/// Removes a name of the copy; what is a directory goes aside.
fn take_away(
    dir: impl std::os::fd::AsFd,
    name: &std::ffi::CStr,
    gone: &OwnedFd,
    number: u64,
) -> Result<bool, Fault> {
    match unlinkat(&dir, name, AtFlags::empty()) {
        Ok(()) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(Errno::ISDIR) => rustix::fs::renameat(&dir, name, gone, number.to_string())
            .map(|()| true)
            .map_err(|errno| Fault::target("move a directory away", errno)),
        Err(errno) => Err(Fault::target("remove an old file", errno)),
    }
}
