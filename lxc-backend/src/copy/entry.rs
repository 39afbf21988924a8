// SPDX-License-Identifier: MIT OR Apache-2.0
//! Copies one file that is no directory.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;

use rustix::fs::{
    CWD, FileType, Mode, OFlags, SeekFrom, Stat, fstat, mknodat, openat, readlinkat, seek,
    symlinkat,
};
use rustix::io::Errno;

use super::attributes::{At, Looks, give, read};
use super::{Buffers, Control, DATA_BYTES, Fault};

/// A name in a directory of the container, and in the copy of this directory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) source: BorrowedFd<'a>,
    pub(super) target: BorrowedFd<'a>,
    pub(super) name: &'a CStr,
}

/// A file whose copy has been made, but is empty yet.
#[derive(Debug)]
pub(super) enum Begun {
    /// Its content is to be copied.
    Content { source: File, target: File },
    /// There is nothing more to do.
    Complete,
}

/// Makes the copy of a file; of a regular file an empty one.
pub(super) fn begin(place: Place<'_>, stat: &Stat, buffers: &mut Buffers) -> Result<Begun, Fault> {
    let kind = FileType::from_raw_mode(stat.st_mode);
    if kind == FileType::RegularFile {
        let source = open_source(place, stat)?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let target = openat(place.target, place.name, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|errno| Fault::making("make a file", errno))?;
        return Ok(Begun::Content { source, target: target.into() });
    }
    let attributes = read(At::Named(place.source, place.name), buffers)?;
    if kind == FileType::Symlink {
        let text = readlinkat(place.source, place.name, Vec::new()).map_err(Fault::source)?;
        symlinkat(text.as_c_str(), place.target, place.name)
            .map_err(|errno| Fault::making("make a symbolic link", errno))?;
    } else {
        // The directory around the copy keeps everybody else from using them.
        mknodat(place.target, place.name, kind, Mode::RUSR | Mode::WUSR, stat.st_rdev)
            .map_err(|errno| Fault::making("make a device file, pipe or socket", errno))?;
    }
    give(At::Named(place.target, place.name), Looks::of(stat), &attributes)?;
    Ok(Begun::Complete)
}

/// Opens a regular file. By way of a descriptor that opens nothing, because meanwhile a device may have its name.
fn open_source(place: Place<'_>, stat: &Stat) -> Result<File, Fault> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = openat(place.source, place.name, flags, Mode::empty()).map_err(Fault::source)?;
    let now = fstat(&found).map_err(Fault::source)?;
    if (now.st_ino, now.st_mode) != (stat.st_ino, stat.st_mode) {
        return Err(Fault::Vanished);
    }
    let path = format!("/proc/self/fd/{}", found.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOATIME | OFlags::NONBLOCK;
    let opened: OwnedFd = openat(CWD, path, flags, Mode::empty()).map_err(Fault::source)?;
    Ok(opened.into())
}

/// Copies content, then what else a file has. `bytes` counts what was read.
pub(super) fn fill(
    source: &File,
    target: &File,
    stat: &Stat,
    control: &Control,
    buffers: &mut Buffers,
    bytes: &mut u64,
) -> Result<(), Fault> {
    let size = u64::try_from(stat.st_size).unwrap_or_default();
    let allocated = u64::try_from(stat.st_blocks).unwrap_or_default().saturating_mul(512);
    if size > 0 && allocated >= size {
        copy_range(source, target, 0..size, control, buffers, bytes)?;
    } else if size > 0 {
        copy_sparse(source, target, size, control, buffers, bytes)?;
    }
    let attributes = read(At::Open(source.as_fd()), buffers)?;
    give(At::Open(target.as_fd()), Looks::of(stat), &attributes)
}

fn copy_sparse(
    source: &File,
    target: &File,
    size: u64,
    control: &Control,
    buffers: &mut Buffers,
    bytes: &mut u64,
) -> Result<(), Fault> {
    let mut at = 0;
    while at < size {
        let data = match seek(source, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => break,
            other => other.map_err(Fault::source)?,
        };
        let hole = seek(source, SeekFrom::Hole(data)).map_err(Fault::source)?.min(size);
        if data >= hole {
            break;
        }
        copy_range(source, target, data..hole, control, buffers, bytes)?;
        at = hole;
    }
    target.set_len(size).map_err(|error| Fault::writing(&error))
}

fn copy_range(
    source: &File,
    target: &File,
    range: std::ops::Range<u64>,
    control: &Control,
    buffers: &mut Buffers,
    bytes: &mut u64,
) -> Result<(), Fault> {
    let mut at = range.start;
    while at < range.end {
        control.go_on()?;
        let wanted = (range.end - at).min(DATA_BYTES as u64);
        let buffer = &mut buffers.data[..usize::try_from(wanted).unwrap_or(DATA_BYTES)];
        let count = match source.read_at(buffer, at) {
            // It has become shorter.
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Fault::Source(error)),
        };
        target.write_all_at(&buffer[..count], at).map_err(|error| Fault::writing(&error))?;
        at += count as u64;
        *bytes += count as u64;
        control.passed(count as u64);
    }
    Ok(())
}
