// SPDX-License-Identifier: MIT OR Apache-2.0
//! The file tree of a container: as one compressed tar archive, or as files, see `tree`.
//!
//! ```text
//!  tar (as the container's root, by the host's runner) ─► pipe ─► entries counted ─► zstd ─► hash, file
//!   └ read ahead by the kernel, where this process asks for it ([`ahead`])                  └ [`durable`]
//! ```
//!
//! `tar` reads the tree: this process never reads a file of a container. What comes out of it is looked at
//! on the way ([`entries`]), so an archive that is cut short or has no entries is noticed whatever the
//! command says of itself.

mod ahead;
mod durable;
mod entries;
mod listing;
mod restore;
mod times;
mod tree;
mod words;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, PipeReader, Read as _, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use provider_api::{
    Call, CommandEnd, ContainerBackup, ContainerCommand, ContainerMount, ContainerTransferred,
    Error, Identity, Kind, Progress, Result, Selection,
};

use crate::call::{blocking, corrupt, invalid};
use crate::files;
use crate::limits::{
    COMPRESSION_LEVEL, COMPRESSION_THREADS_MAX, MOUNTS_MAX, PIPE_BYTES, PIPE_END_WAIT,
    REPORT_INTERVAL,
};
use crate::manifest::{ContainerFormat, TREE_DIRECTORY, TREE_FILE, TREE_LIST_FILE, Tree};

use ahead::{EndOnDrop, Position, read_ahead};
use durable::Durable;
use entries::Counter;
pub(crate) use listing::Witness;
pub(crate) use restore::DirectoryContainerRestore;
use words::{Listener, SOCKET, Words};

/// What `tar` says besides the reason why it failed.
const NO_REASONS: [&str; 4] =
    ["Removing leading", "Exiting with failure status", "Error is not recoverable", SOCKET];
/// How the disk is called in reports of progress.
const DEVICE: &str = "rootfs";
/// How a command ends whose output is not taken any more, and how `tar` says that of its archive, if it lives on.
const ENDED_BY_SIGPIPE: i32 = 128 + 13;
const NOT_TAKEN: &str = "tar: -: ";

/// Stores a container's tree in `directory`.
pub(crate) async fn store(
    backup: &ContainerBackup,
    (directory, format): (&Path, ContainerFormat),
    progress: &dyn Progress,
    call: &Call,
) -> Result<(Tree, ContainerTransferred)> {
    if backup.mounts.is_empty() || backup.mounts.len() > MOUNTS_MAX {
        return Err(invalid(format!(
            "A container with {} volumes cannot be stored.",
            backup.mounts.len()
        )));
    }
    let (host_tree, mounts) = (backup.host_tree.clone(), backup.mounts.clone());
    let (walks, used_bytes) = blocking(move || look(&host_tree, &mounts)).await?;
    let used_bytes = backup.expected_bytes.unwrap_or(used_bytes);
    let passing = Arc::new(Passing::default());
    let position = Arc::clone(&passing.position);
    let ending = EndOnDrop(Arc::clone(&position));
    let (host_tree, ahead) = (backup.host_tree.clone(), walks.clone());
    let reading = tokio::task::spawn_blocking(move || read_ahead(&host_tree, &ahead, &position));
    let to = (directory, format);
    let packed = pack(backup, &walks, to, (progress, used_bytes), &passing, call).await;
    drop(ending);
    // The volumes are in use as long as it has them open.
    let _ = reading.await;
    let (stored, words) = packed?;
    if stored.entries == 0 {
        return Err(Error::new(Kind::Other, "The archive of the container has no entries."));
    }
    progress.report(DEVICE, stored.read_bytes, stored.read_bytes, 0);
    words.check(backup.skip_unreadable)?;
    let (ignored, ignored_count) = words.ignored();
    let transferred = ContainerTransferred {
        entries: stored.entries,
        read_bytes: stored.read_bytes,
        written_bytes: stored.tree.size_bytes(),
        ignored,
        ignored_count,
    };
    Ok((stored.tree, transferred))
}

/// Runs `tar`, and stores what comes out of it.
async fn pack(
    backup: &ContainerBackup,
    walks: &[PathBuf],
    (directory, format): (&Path, ContainerFormat),
    (progress, used_bytes): (&dyn Progress, u64),
    passing: &Arc<Passing>,
    call: &Call,
) -> Result<(Stored, Words)> {
    let (reader, writer) =
        io::pipe().map_err(|e| Error::io("Cannot make a pipe for a container's files.", e))?;
    // Fewer turns of the two; a kernel that refuses it has a small one.
    let _ = rustix::pipe::fcntl_setpipe_size(&reader, PIPE_BYTES);
    let listener = Listener::default();
    let command = ContainerCommand {
        argv: arguments(backup),
        identity: Identity::MappedRoot,
        env: Vec::new(),
        paths: Vec::new(),
        stdin: None,
        stdout: Some(writer.into()),
        stderr: Some(listener.copy()),
    };
    let stop = StopOnDrop::default();
    let storing = {
        let (passing, is_stopped) = (Arc::clone(passing), Arc::clone(&stop.0));
        let (directory, walks) = (directory.to_owned(), walks.len());
        blocking(move || match format {
            ContainerFormat::Tar => compress(reader, &directory.join(TREE_FILE), &passing),
            ContainerFormat::Tree => tree::fill(reader, &directory, walks, &passing, &is_stopped),
        })
    };
    let mut storing = std::pin::pin!(storing);
    let running = backup.runner.command(command, call);
    let mut running = std::pin::pin!(running);
    let mut tick = tokio::time::interval(REPORT_INTERVAL);
    let mut stored = None;
    let end = loop {
        tokio::select! {
            end = &mut running => break end?,
            result = &mut storing, if stored.is_none() => stored = Some(result),
            _ = tick.tick() => {
                let done = passing.data_bytes.load(Ordering::Relaxed);
                progress.report(DEVICE, done, used_bytes.max(done), 0);
            }
        }
    };
    let stored = match stored {
        Some(stored) => stored,
        // A tree is read once more, which takes as long as it takes.
        None if format == ContainerFormat::Tree => storing.await,
        // The pipe has ended with the command; what is in it is soon stored.
        None => wait_for_rest(storing.as_mut()).await?,
    };
    // The command's words first: they say why its output is of no use. Unless it is the other way round.
    if stored.is_ok() || !was_not_taken(&end) {
        check_end(&end)?;
    }
    Ok((stored?, listener.finish()))
}

async fn wait_for_rest<T>(storing: impl Future<Output = Result<T>>) -> Result<Result<T>> {
    let rest = tokio::time::timeout(PIPE_END_WAIT, storing).await;
    rest.map_err(|_| {
        Error::new(Kind::Io, "The storage did not take the rest of a container's files in time.")
    })
}

/// Whether it ended because of what became of its output. The names of files do not begin so.
fn was_not_taken(end: &CommandEnd) -> bool {
    let says_so = || end.stderr_tail.lines().any(|line| line.starts_with(NOT_TAKEN));
    end.exit_code == ENDED_BY_SIGPIPE || says_so()
}

fn check_end(end: &CommandEnd) -> Result<()> {
    if end.exit_code == 0 {
        return Ok(());
    }
    let tells =
        |line: &&str| !line.trim().is_empty() && !NO_REASONS.iter().any(|no| line.contains(no));
    let last = end.stderr_tail.lines().rev().find(tells);
    Err(Error::new(
        Kind::Io,
        format!(
            "tar ended with {} while it read the container's files: {}",
            end.exit_code,
            last.unwrap_or("it did not say why")
        ),
    ))
}

/// Which volumes are walked, and how many bytes their file systems use. One on the same file system as the
/// volume around it is part of that one's walk, and would be there twice.
fn look(host_tree: &Path, mounts: &[ContainerMount]) -> Result<(Vec<PathBuf>, u64)> {
    let mut mounts: Vec<&Path> = mounts.iter().map(|mount| mount.mount_point.as_path()).collect();
    mounts.sort();
    mounts.dedup();
    let mut walks: Vec<(PathBuf, u64)> = Vec::new();
    let mut used_bytes: u64 = 0;
    for mount in mounts {
        let inner = inner_path(mount)?;
        let place = host_tree.join(&inner);
        let failed = |e| Error::io(format!("Cannot look at the volume {}.", mount.display()), e);
        let device = fs::symlink_metadata(&place).map_err(failed)?.dev();
        let around = walks.iter().rev().find(|(outer, _)| inner.starts_with(outer));
        if around.is_some_and(|(_, outer)| *outer == device) {
            continue;
        }
        if let Ok(stat) = rustix::fs::statvfs(&place) {
            let blocks = stat.f_blocks.saturating_sub(stat.f_bfree);
            used_bytes = used_bytes.saturating_add(blocks.saturating_mul(stat.f_frsize));
        }
        walks.push((inner, device));
    }
    Ok((walks.into_iter().map(|(inner, _)| inner).collect(), used_bytes))
}

/// A mount point as a path within the tree.
fn inner_path(mount: &Path) -> Result<PathBuf> {
    let plain = mount.is_absolute()
        && mount.components().all(|part| {
            matches!(part, std::path::Component::RootDir | std::path::Component::Normal(_))
        });
    if !plain {
        return Err(invalid(format!("The mount point {} is not plain.", mount.display())));
    }
    Ok(mount.strip_prefix("/").unwrap_or(mount).to_owned())
}

fn arguments(backup: &ContainerBackup) -> Vec<OsString> {
    let mut argv: Vec<OsString> = [
        "tar",
        "--create",
        "--file=-",
        "--format=posix",
        // In pieces of 256 KiB: fewer turns of the two.
        "--blocking-factor=512",
        "--numeric-owner",
        "--sparse",
        "--acls",
        "--xattrs",
        "--xattrs-include=user.*",
        "--xattrs-include=security.capability",
        // Into each volume on its own, and into nothing that is not one.
        "--one-file-system",
        // What an archive of the same tree would have, too.
        "--sort=name",
    ]
    .map(OsString::from)
    .to_vec();
    if backup.skip_unreadable {
        argv.push("--ignore-failed-read".into());
    }
    argv.push("--directory".into());
    argv.push(backup.tree.clone().into());
    // The host has listed what is read, the volumes with it.
    let mut selected = OsString::from("--files-from=");
    selected.push(backup.lists.join(Selection::SELECTED));
    // Without its own idea of what a backslash in a name means.
    let names = ["--null", "--no-verbatim-files-from", "--no-unquote"].map(OsString::from);
    argv.extend(names.into_iter().chain([selected]));
    argv
}

/// Tells the thread that stores a container's files that nobody waits for it.
#[derive(Default)]
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What is known of an archive while it passes.
#[derive(Debug, Default)]
struct Passing {
    data_bytes: AtomicU64,
    position: Arc<Position>,
}

impl Passing {
    fn note(&self, counter: &Counter) {
        self.data_bytes.store(counter.data_bytes(), Ordering::Relaxed);
        self.position.reach(counter.last_name());
    }
}

struct Stored {
    tree: Tree,
    entries: u64,
    read_bytes: u64,
}

/// Takes all that comes out of the pipe into a new file.
fn compress(mut pipe: PipeReader, path: &Path, passing: &Passing) -> Result<Stored> {
    let failed = |e| Error::io(format!("Cannot write {}.", path.display()), e);
    let target = Durable::new(files::create(path)?).map_err(failed)?;
    let mut encoder = zstd::Encoder::new(target, COMPRESSION_LEVEL).map_err(failed)?;
    // So that a restore notices damage by itself.
    encoder.include_checksum(true).map_err(failed)?;
    // Beside this thread, which only reads, counts and writes.
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = u32::try_from(threads)
        .map_or(COMPRESSION_THREADS_MAX, |count| count.min(COMPRESSION_THREADS_MAX));
    encoder.multithread(threads).map_err(failed)?;
    let mut counter = Counter::default();
    let mut buffer = vec![0; PIPE_BYTES];
    loop {
        let count = pipe
            .read(&mut buffer)
            .map_err(|e| Error::io("Cannot read what tar says of a container's files.", e))?;
        if count == 0 {
            break;
        }
        counter.take(&buffer[..count]).map_err(corrupt)?;
        passing.note(&counter);
        encoder.write_all(&buffer[..count]).map_err(failed)?;
    }
    counter.finish().map_err(corrupt)?;
    let (blake3, size_bytes) = encoder.finish().and_then(Durable::finish).map_err(failed)?;
    let (entries, read_bytes) = (counter.entries(), counter.data_bytes());
    let tree = Tree {
        format: ContainerFormat::Tar,
        file_size_bytes: size_bytes,
        blake3,
        entries,
        data_bytes: read_bytes,
    };
    Ok(Stored { tree, entries, read_bytes })
}

/// A file whose content is hashed as it is written.
struct Hashing {
    file: File,
    hasher: blake3::Hasher,
    size_bytes: u64,
}

impl Hashing {
    fn new(file: File) -> Self {
        Self { file, hasher: blake3::Hasher::new(), size_bytes: 0 }
    }

    /// The file, the hash of all that was written, and how much that was.
    fn finish(self) -> (File, String, u64) {
        (self.file, self.hasher.finalize().to_hex().to_string(), self.size_bytes)
    }
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        self.size_bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Compares a tree of files with its list, which was checked.
pub(crate) fn check_files(archive: &Path, witness: &mut dyn Witness) -> Result<()> {
    listing::compare(&archive.join(TREE_DIRECTORY), &archive.join(TREE_LIST_FILE), witness)
}

/// Compares the file of a stored tree with what the manifest says of it. `read` is told of each piece, and ends
/// the comparison by an error.
pub(crate) fn check(
    path: &Path,
    tree: &Tree,
    mut read: impl FnMut(u64) -> Result<()>,
) -> Result<()> {
    let failed = |e| Error::io(format!("Cannot read {}.", path.display()), e);
    let mut file = files::open_regular(path)?;
    let length = file.metadata().map_err(failed)?.len();
    if length != tree.file_size_bytes {
        return Err(corrupt(format!(
            "{} has {length} bytes, its manifest says {}.",
            path.display(),
            tree.file_size_bytes
        )));
    }
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; PIPE_BYTES];
    loop {
        let count = file.read(&mut buffer).map_err(failed)?;
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
        read(count as u64)?;
    }
    if hasher.finalize().to_hex().to_string() == tree.blake3 {
        return Ok(());
    }
    Err(corrupt(format!("{} does not match its checksum.", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_that_would_leave_the_tree_are_refused() {
        assert_eq!(inner_path(Path::new("/")).unwrap(), Path::new(""));
        assert_eq!(inner_path(Path::new("/mnt/a")).unwrap(), Path::new("mnt/a"));
        for bad in ["mnt", "/mnt/../etc", ""] {
            assert!(inner_path(Path::new(bad)).is_err(), "{bad:?}");
        }
    }
}
