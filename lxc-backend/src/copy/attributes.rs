// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a file has besides its content: owner, mode, times, extended attributes with ACLs and capabilities.

use std::ffi::{CStr, CString};
use std::os::fd::BorrowedFd;

use rustix::fs::{
    AtFlags, Gid, Mode, Stat, Timespec, Timestamps, Uid, XattrFlags, chmodat, chownat, fchmod,
    fchown, fgetxattr, flistxattr, fsetxattr, fstat, futimens, lgetxattr, llistxattr, lsetxattr,
    statat, utimensat,
};
use rustix::io::Errno;

use super::{Buffers, Fault};
use crate::metadata::has_times;

/// What a backup keeps of extended attributes; others belong to one file system or one host.
const KEPT: [&[u8]; 4] = [b"user.", b"trusted.", b"security.capability", b"system.posix_acl_"];

/// An extended attribute.
pub(super) type Attribute = (CString, Vec<u8>);

/// Owner, mode and times of a file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Looks {
    uid: u32,
    gid: u32,
    /// With the kind of the file.
    mode: u32,
    /// Seconds and nanoseconds of the last access and the last change.
    times: [(i64, u32); 2],
}

impl Looks {
    pub(super) fn of(stat: &Stat) -> Self {
        let nanos = |nanos| u32::try_from(nanos).unwrap_or_default();
        Self {
            uid: stat.st_uid,
            gid: stat.st_gid,
            mode: stat.st_mode,
            times: [
                (stat.st_atime, nanos(stat.st_atime_nsec)),
                (stat.st_mtime, nanos(stat.st_mtime_nsec)),
            ],
        }
    }
}

/// A file by a descriptor, or by a path for what cannot be opened.
#[derive(Debug, Clone, Copy)]
pub(super) enum At<'a> {
    Open(BorrowedFd<'a>),
    /// Its directory and its name.
    Named(BorrowedFd<'a>, &'a CStr),
}

impl At<'_> {
    /// The path that calls take which know no descriptors of directories.
    fn path(dir: BorrowedFd<'_>, name: &CStr) -> Vec<u8> {
        use std::os::fd::AsRawFd as _;
        let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
        path.extend(name.to_bytes());
        path
    }

    fn list(self, list: &mut Vec<u8>) -> rustix::io::Result<()> {
        list.clear();
        let room = rustix::buffer::spare_capacity(list);
        match self {
            Self::Open(fd) => flistxattr(fd, room)?,
            Self::Named(dir, name) => llistxattr(Self::path(dir, name), room)?,
        };
        Ok(())
    }

    fn get(self, attribute: &CStr, value: &mut Vec<u8>) -> rustix::io::Result<()> {
        value.clear();
        let room = rustix::buffer::spare_capacity(value);
        match self {
            Self::Open(fd) => fgetxattr(fd, attribute, room)?,
            Self::Named(dir, name) => lgetxattr(Self::path(dir, name), attribute, room)?,
        };
        Ok(())
    }

    fn set(self, attribute: &CStr, value: &[u8]) -> rustix::io::Result<()> {
        let flags = XattrFlags::empty();
        match self {
            Self::Open(fd) => fsetxattr(fd, attribute, value, flags),
            Self::Named(dir, name) => lsetxattr(Self::path(dir, name), attribute, value, flags),
        }
    }
}

/// Reads the extended attributes that a backup keeps.
pub(super) fn read(source: At<'_>, buffers: &mut Buffers) -> Result<Vec<Attribute>, Fault> {
    match source.list(&mut buffers.list) {
        Err(Errno::NOTSUP | Errno::NODATA) => return Ok(Vec::new()),
        other => other.map_err(Fault::source)?,
    }
    let mut found = Vec::new();
    for name in buffers.list.split_inclusive(|byte| *byte == 0) {
        let Ok(name) = CStr::from_bytes_with_nul(name) else { continue };
        if !KEPT.iter().any(|kept| name.to_bytes().starts_with(kept)) {
            continue;
        }
        match source.get(name, &mut buffers.value) {
            // Removed since it was listed.
            Err(Errno::NODATA) => continue,
            other => other.map_err(Fault::source)?,
        }
        found.push((name.to_owned(), buffers.value.clone()));
    }
    Ok(found)
}

/// Gives a new file what the other one has. The order matters: a new owner takes bits and capabilities away.
pub(super) fn give(target: At<'_>, looks: Looks, attributes: &[Attribute]) -> Result<(), Fault> {
    let (uid, gid) = (Some(Uid::from_raw(looks.uid)), Some(Gid::from_raw(looks.gid)));
    let mode = Mode::from_raw_mode(looks.mode & 0o7777);
    let is_link = rustix::fs::FileType::from_raw_mode(looks.mode) == rustix::fs::FileType::Symlink;
    match target {
        At::Open(fd) => fchown(fd, uid, gid).and_then(|()| fchmod(fd, mode)),
        At::Named(dir, name) => {
            chownat(dir, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW).and_then(|()| {
                // A link has no mode; nothing else is followed.
                if is_link { Ok(()) } else { chmodat(dir, name, mode, AtFlags::empty()) }
            })
        }
    }
    .map_err(|errno| Fault::target("give a file its owner and mode", errno))?;
    for (name, value) in attributes {
        target.set(name, value).map_err(|errno| {
            let what =
                format!("keep the extended attribute '{}' of a file", name.to_string_lossy());
            match errno {
                // For a large one also in a file system that is not full.
                Errno::NOSPC => {
                    let error = std::io::Error::other("there is no room for it in one file");
                    Fault::Target { doing: what, error }
                }
                errno => Fault::target(what, errno),
            }
        })?;
    }
    set_times(target, looks.times).map_err(|errno| Fault::target("keep the times of a file", errno))
}

/// An error if the file system does not have these times.
fn set_times(target: At<'_>, [accessed, changed]: [(i64, u32); 2]) -> rustix::io::Result<()> {
    let time = |(tv_sec, nanos): (i64, u32)| Timespec { tv_sec, tv_nsec: nanos.into() };
    let times = Timestamps { last_access: time(accessed), last_modification: time(changed) };
    match target {
        At::Open(fd) => futimens(fd, &times),
        At::Named(dir, name) => utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW),
    }?;
    let has = has_times([Some(accessed), Some(changed)], || match target {
        At::Open(fd) => fstat(fd),
        At::Named(dir, name) => statat(dir, name, AtFlags::SYMLINK_NOFOLLOW),
    })?;
    if has { Ok(()) } else { Err(Errno::RANGE) }
}
