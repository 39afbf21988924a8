// SPDX-License-Identifier: GPL-2.0-or-later
//! Bitmap files on their way from and to a file system, and what a disk's own storage tells.
//!
//! A file is always replaced in one step, and is on its device when that has returned.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fleece::bitmap_file::Storage;

use crate::qemu::cached::count_open;
use crate::qemu::error::Error;
use crate::qemu::graph::Bds;
use crate::qemu::main_loop::MainLoop;

/// Longer than a file system may take to give a change another time than the one before.
const CTIME_STEP: Duration = Duration::from_millis(20);
/// A disk's storage is so many nodes below it at most.
const MAX_DEPTH: usize = 32;

/// The bytes of a file; none if it does not exist.
///
/// # Errors
/// It cannot be read, is no regular file, or is longer than it may be.
pub(super) fn read(path: &Path, max_bytes: u64) -> Result<Option<Vec<u8>>, Error> {
    let cannot = |error: &io::Error| Error::new(format!("cannot be read: {error}"));
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(cannot(&error)),
    };
    if !found.is_file() {
        return Err(Error::new("is no regular file"));
    }
    let too_long = || Error::new("is no bitmap file of this disk: it is too long");
    let mut bytes = Vec::new();
    let expected = usize::try_from(found.len().min(max_bytes)).unwrap_or(usize::MAX);
    bytes
        .try_reserve_exact(expected.saturating_add(1))
        .map_err(|_| Error::new("cannot be read: there is no memory"))?;
    let file = File::open(path).map_err(|error| cannot(&error))?;
    file.take(max_bytes + 1).read_to_end(&mut bytes).map_err(|error| cannot(&error))?;
    if bytes.len() as u64 > max_bytes { Err(too_long()) } else { Ok(Some(bytes)) }
}

/// Replaces a file, or makes it.
///
/// # Errors
/// It cannot be written; the old one is still there, unless only its folder could not be synced.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let folder = path.parent().ok_or_else(|| Error::new("has no folder"))?;
    let temporary = folder.join(format!(".ba-bitmap-{}.tmp", std::process::id()));
    let written = write_new(&temporary, bytes)
        .and_then(|()| fs::rename(&temporary, path))
        .and_then(|()| File::open(folder)?.sync_all());
    written.map_err(|error| {
        drop(fs::remove_file(&temporary));
        Error::new(format!("cannot be written: {error}"))
    })
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // What an earlier process of the same number left.
    drop(fs::remove_file(path));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// How a raw disk is stored.
///
/// # Errors
/// It is no raw disk.
pub(super) fn storage_of(main_loop: MainLoop, source: Bds) -> Result<Storage, Error> {
    let mut node = source;
    for _ in 0..MAX_DEPTH {
        let driver = node.driver(main_loop);
        match (driver.as_str(), node.below(main_loop)) {
            ("file" | "host_device", _) => {
                return Ok(storage_of_file(&node.file_name(main_loop)));
            }
            ("raw", Some(below)) => node = below.skip_filters(main_loop),
            (_, None) => return Ok(Storage::Unknown),
            (format, Some(_)) => {
                return Err(Error::new(format!(
                    "it is no raw disk: node '{}' has the format '{format}'",
                    node.node_name(main_loop)
                )));
            }
        }
    }
    Ok(Storage::Unknown)
}

fn storage_of_file(name: &str) -> Storage {
    if !name.starts_with('/') {
        return Storage::Unknown;
    }
    match fs::metadata(name) {
        Ok(found) if found.file_type().is_block_device() => Storage::BlockDevice,
        // The name may stand for another file by now than the one that QEMU has open.
        Ok(found) if found.is_file() && count_open(&found) > 0 => Storage::File {
            device: found.dev(),
            inode: found.ino(),
            size_bytes: found.len(),
            ctime: (found.ctime(), u32::try_from(found.ctime_nsec()).unwrap_or(0)),
        },
        _ => Storage::Unknown,
    }
}

/// Waits until any later change of the disk's file will show: file systems count in steps, and a
/// change in the same step as the last one would not.
pub(super) fn wait_for_next_ctime(storage: Storage) {
    let Storage::File { ctime: (seconds, nanoseconds), .. } = storage else { return };
    let seconds = u64::try_from(seconds).unwrap_or(0);
    let changed = UNIX_EPOCH + Duration::new(seconds, nanoseconds);
    let age = SystemTime::now().duration_since(changed).unwrap_or_default();
    std::thread::sleep(CTIME_STEP.saturating_sub(age));
}
