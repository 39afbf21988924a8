// SPDX-License-Identifier: MIT OR Apache-2.0
//! Small file operations that are durable, bounded and follow no symbolic links.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use provider_api::{Error, Kind, Result};
use rustix::fs::{OFlags, ioctl_ficlone, syncfs};

use crate::call::corrupt;
use crate::deep;

/// Archives hold guests' data: only their owner may look.
const DIRECTORY_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;
/// Copied between two looks whether to go on.
const COPY_BYTES: u64 = 64 << 20;

fn no_follow() -> i32 {
    // The bits of open flags fit: the C interface takes an int.
    OFlags::NOFOLLOW.bits().cast_signed()
}

/// Makes a directory; it must not exist.
pub(crate) fn make_directory(path: &Path) -> std::io::Result<()> {
    fs::DirBuilder::new().mode(DIRECTORY_MODE).create(path)
}

/// Makes a directory and its parents; it may exist.
pub(crate) fn ensure_directory(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .mode(DIRECTORY_MODE)
        .recursive(true)
        .create(path)
        .map_err(|e| Error::io(format!("Cannot make directory {}.", path.display()), e))
}

/// Makes a file for writing (and reading back); it must not exist.
pub(crate) fn create(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(FILE_MODE)
        .custom_flags(no_follow())
        .open(path)
        .map_err(|e| Error::io(format!("Cannot create {}.", path.display()), e))
}

/// Opens a file that serves as a lock, making it if needed.
pub(crate) fn open_lock(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(FILE_MODE)
        .custom_flags(no_follow())
        .open(path)
        .map_err(|e| Error::io(format!("Cannot open lock file {}.", path.display()), e))
}

/// Opens a lock file that somebody else has made; `None` if it is not there.
pub(crate) fn open_lock_if_exists(path: &Path) -> Result<Option<File>> {
    match OpenOptions::new().read(true).write(true).custom_flags(no_follow()).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(format!("Cannot open lock file {}.", path.display()), e)),
    }
}

/// Opens a regular file for reading; a symbolic link or anything else is refused.
pub(crate) fn open_regular(path: &Path) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        // Without O_NONBLOCK the open of a named pipe put there would wait for ever.
        .custom_flags(no_follow() | OFlags::NONBLOCK.bits().cast_signed())
        .open(path)
        .map_err(|e| Error::io(format!("Cannot open {}.", path.display()), e))?;
    let meta =
        file.metadata().map_err(|e| Error::io(format!("Cannot look at {}.", path.display()), e))?;
    if !meta.is_file() {
        return Err(corrupt(format!("{} is not a regular file.", path.display())));
    }
    Ok(file)
}

/// Reads a whole regular file of at most `max_bytes`.
pub(crate) fn read(path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    let file = open_regular(path)?;
    let mut content = Vec::new();
    file.take(max_bytes + 1)
        .read_to_end(&mut content)
        .map_err(|e| Error::io(format!("Cannot read {}.", path.display()), e))?;
    if content.len() as u64 > max_bytes {
        return Err(corrupt(format!("{} is larger than {max_bytes} bytes.", path.display())));
    }
    Ok(content)
}

/// As [`read`], and `None` if there is no such file.
pub(crate) fn read_if_exists(path: &Path, max_bytes: u64) -> Result<Option<Vec<u8>>> {
    match read(path, max_bytes) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind == Kind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes a new file and syncs it. The directory is synced by the caller.
pub(crate) fn write_new(path: &Path, content: &[u8]) -> Result<()> {
    let mut file = create(path)?;
    file.write_all(content)
        .and_then(|()| file.sync_all())
        .map_err(|e| Error::io(format!("Cannot write {}.", path.display()), e))
}

/// Replaces a file's content in one step that a crash cannot split, and syncs it all. One writer
/// at a time.
pub(crate) fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let Some(parent) = path.parent() else {
        return Err(crate::call::invalid(format!("{} has no parent.", path.display())));
    };
    let next = path.with_extension("next");
    remove_if_exists(&next)?;
    write_new(&next, content)?;
    fs::rename(&next, path)
        .map_err(|e| Error::io(format!("Cannot replace {}.", path.display()), e))?;
    sync_directory(parent)
}

/// Copies a file of an archive to a new one, sharing its blocks where the file system can. `check`
/// ends it between two pieces. Not synced.
pub(crate) fn copy(from: &Path, to: &Path, check: impl Fn() -> Result<()>) -> Result<()> {
    let failed = |e| Error::io(format!("Cannot copy {} to {}.", from.display(), to.display()), e);
    let source = open_regular(from)?;
    let mut target = create(to)?;
    if ioctl_ficlone(&target, &source).is_ok() {
        return Ok(());
    }
    let size_bytes = source.metadata().map_err(failed)?.len();
    let free_bytes = free_bytes(to)?;
    if free_bytes < size_bytes {
        return Err(Error::new(
            Kind::NoSpace,
            format!(
                "Copying {} needs {size_bytes} bytes, of which {free_bytes} are free.",
                from.display()
            ),
        ));
    }
    let mut left = size_bytes;
    while left > 0 {
        check()?;
        // The standard library uses copy_file_range(2) for this, and copes with its gaps.
        let copied = std::io::copy(&mut (&source).take(left.min(COPY_BYTES)), &mut target)
            .map_err(failed)?;
        if copied == 0 {
            return Err(corrupt(format!("{} became shorter while it was copied.", from.display())));
        }
        left -= copied;
    }
    Ok(())
}

/// Gives a file of an archive a second name, or copies it where that cannot be.
pub(crate) fn link_or_copy(from: &Path, to: &Path, check: impl Fn() -> Result<()>) -> Result<()> {
    // Nothing else than a regular file, and no symbolic link.
    drop(open_regular(from)?);
    match fs::hard_link(from, to) {
        Ok(()) => Ok(()),
        Err(_) => {
            copy(from, to, check)?;
            sync(to)
        }
    }
}

/// Makes a file's content durable.
pub(crate) fn sync(path: &Path) -> Result<()> {
    open_regular(path)?
        .sync_all()
        .map_err(|e| Error::io(format!("Cannot sync {}.", path.display()), e))
}

/// Makes all of a file system durable: for many files the quicker way.
pub(crate) fn sync_file_system(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|dir| Ok(syncfs(&dir)?))
        .map_err(|e| Error::io(format!("Cannot sync the file system of {}.", path.display()), e))
}

/// Bytes that can be written to the file system that a file is in.
fn free_bytes(path: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(path).map_err(|e| {
        Error::io(format!("Cannot ask for the space of {}.", path.display()), e.into())
    })?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Makes a directory's entries durable.
pub(crate) fn sync_directory(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(|e| Error::io(format!("Cannot sync directory {}.", path.display()), e))
}

/// Removes a file if it is there.
pub(crate) fn remove_if_exists(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io(format!("Cannot remove {}.", path.display()), e)),
    }
}

/// Removes the files of a directory but the one called `keep`, as far as that is possible.
pub(crate) fn empty_directory(path: &Path, keep: &str) -> Result<()> {
    let failed = |e| Error::io(format!("Cannot list {}.", path.display()), e);
    for entry in fs::read_dir(path).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_name() != keep {
            // What stays is removed with the directory.
            let _ = fs::remove_file(entry.path());
        }
    }
    Ok(())
}

/// Removes a directory with all it holds, if it is there.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    // A write that was under way when its backup was given up may add one more file meanwhile.
    const TRIES: u32 = 5;
    const PAUSE: Duration = Duration::from_millis(50);
    let mut left = TRIES;
    loop {
        left -= 1;
        match deep::remove(path) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == ErrorKind::NotFound && !path.exists() => return Ok(()),
            Err(e) if left == 0 => {
                return Err(Error::io(format!("Cannot remove {}.", path.display()), e));
            }
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

/// Whether `path` is a directory itself, not a link to one.
pub(crate) fn is_directory(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir())
}

/// As [`is_directory`], and an error if that cannot be told.
pub(crate) fn has_directory(path: &Path) -> Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(meta) => Ok(meta.is_dir()),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(Error::io(format!("Cannot look at {}.", path.display()), e)),
    }
}
