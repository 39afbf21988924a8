// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a file has besides its content: owner, permissions, times, extended attributes and access control lists.
//! Set by descriptor, so that it is that very file which gets them.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use rustix::fs::CWD;
use rustix::fs::{
    AtFlags, Gid, Mode, Stat, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags, chmod, chownat,
    fchmod, fsetxattr, fstat, futimens, setxattr, utimensat,
};
use rustix::io::Errno;

/// Times that every file system has, in seconds.
const SAFE_SECONDS: std::ops::Range<i64> = 0..1 << 31;
/// The attributes that hold access control lists.
pub(crate) const ACCESS_ACL: &[u8] = b"system.posix_acl_access";
pub(crate) const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";

/// What a file has besides its content.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Metadata {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Permissions with set-user-id, set-group-id and sticky bit; a symbolic link has none.
    pub(crate) mode: u32,
    /// Seconds and nanoseconds; without a time it stays as it is.
    pub(crate) mtime: Option<(i64, u32)>,
    pub(crate) atime: Option<(i64, u32)>,
    /// Extended attributes with their whole names, access control lists among them.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// How a file is held.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Held<'a> {
    /// Opened for reading or writing.
    Open(BorrowedFd<'a>),
    /// By an `O_PATH` descriptor, because opening it would do something: a FIFO, a device.
    Named(BorrowedFd<'a>),
    /// The same of a symbolic link.
    Link(BorrowedFd<'a>),
}

/// What could not be set.
#[derive(Debug, thiserror::Error)]
#[error("cannot set its {what}: {source}")]
pub(crate) struct MetadataError {
    what: String,
    source: io::Error,
}

impl Metadata {
    /// Sets all of it: the owner first, because that takes set-user-id bits and capabilities away, the
    /// times last.
    /// Tells whether the file system has its times; else it has the nearest ones.
    pub(crate) fn apply(&self, file: Held<'_>) -> Result<bool, MetadataError> {
        let at = |what: &str| {
            let what = what.to_owned();
            move |errno: Errno| MetadataError { what, source: errno.into() }
        };
        self.set_owner(file).map_err(|errno| {
            let ids = format!("owner {}:{}", self.uid, self.gid);
            // In a user namespace these are the ids that it does not have.
            let ids = match errno {
                Errno::INVAL => format!("{ids}, which the container's ids do not include"),
                _ => ids,
            };
            at(&ids)(errno)
        })?;
        self.set_mode(file).map_err(at("permissions"))?;
        for (name, value) in &self.xattrs {
            set_xattr(file, name, value).map_err(|errno| {
                at(&format!("attribute '{}'", String::from_utf8_lossy(name)))(errno)
            })?;
        }
        self.set_times(file).and_then(|()| self.has_times(file)).map_err(at("times"))
    }

    fn set_owner(&self, file: Held<'_>) -> rustix::io::Result<()> {
        let (Held::Open(fd) | Held::Named(fd) | Held::Link(fd)) = file;
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        chownat(fd, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW)
    }

    fn set_mode(&self, file: Held<'_>) -> rustix::io::Result<()> {
        let mode = Mode::from_raw_mode(self.mode & 0o7777);
        match file {
            Held::Open(fd) => fchmod(fd, mode),
            Held::Named(fd) => chmod(place_of(fd), mode),
            Held::Link(_) => Ok(()),
        }
    }

    fn set_times(&self, file: Held<'_>) -> rustix::io::Result<()> {
        let time = |time: Option<(i64, u32)>| match time {
            Some((tv_sec, nanos)) => Timespec { tv_sec, tv_nsec: nanos.into() },
            None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        };
        let times =
            Timestamps { last_access: time(self.atime), last_modification: time(self.mtime) };
        match file {
            Held::Open(fd) => futimens(fd, &times),
            Held::Named(fd) | Held::Link(fd) => {
                utimensat(CWD, place_of(fd), &times, AtFlags::empty())
            }
        }
    }

    fn has_times(&self, file: Held<'_>) -> rustix::io::Result<bool> {
        let (Held::Open(fd) | Held::Named(fd) | Held::Link(fd)) = file;
        has_times([self.atime, self.mtime], || fstat(fd))
    }
}

/// Whether a file has got the times of its last access and its last change, of which a file system that does not have
/// them makes the nearest ones, without an error. `look` is called only if some file system may do so.
pub(crate) fn has_times(
    wanted: [Option<(i64, u32)>; 2],
    look: impl FnOnce() -> rustix::io::Result<Stat>,
) -> rustix::io::Result<bool> {
    if wanted.iter().flatten().all(|(seconds, _)| SAFE_SECONDS.contains(seconds)) {
        return Ok(true);
    }
    let stat = look()?;
    // With its parts: the first and the last second that a file system has are whole ones.
    let has = [(stat.st_atime, stat.st_atime_nsec), (stat.st_mtime, stat.st_mtime_nsec)];
    let is = |(wanted, has): (Option<(i64, u32)>, (i64, u64))| {
        wanted.is_none_or(|(seconds, nanos)| (seconds, u64::from(nanos)) == has)
    };
    Ok(wanted.into_iter().zip(has).all(is))
}

fn set_xattr(file: Held<'_>, name: &[u8], value: &[u8]) -> rustix::io::Result<()> {
    match file {
        Held::Open(fd) => fsetxattr(fd, name, value, XattrFlags::empty()),
        Held::Named(fd) | Held::Link(fd) => {
            setxattr(place_of(fd), name, value, XattrFlags::empty())
        }
    }
}

/// Leads to the very file, also if that is a link: the kernel does not look further.
fn place_of(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::fd::AsFd as _;
    use std::os::unix::fs::{MetadataExt as _, symlink};

    use rustix::fs::{OFlags, openat};

    use super::*;

    #[test]
    fn a_file_gets_all_and_a_link_s_target_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("file"), dir.path().join("link"));
        let file = File::create(&path).unwrap();
        symlink("file", &link).unwrap();
        let own = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let metadata = Metadata {
            uid: own.0,
            gid: own.1,
            mode: 0o4751,
            mtime: Some((-5, 123_456_789)),
            atime: Some((1, 2)),
            xattrs: Vec::new(),
        };
        assert!(metadata.apply(Held::Open(file.as_fd())).unwrap());
        let meta = fs::metadata(&path).unwrap();
        assert_eq!(meta.mode() & 0o7777, 0o4751);
        assert_eq!((meta.mtime(), meta.mtime_nsec()), (-5, 123_456_789));
        assert_eq!((meta.atime(), meta.atime_nsec()), (1, 2));
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let held = openat(CWD, &link, flags, Mode::empty()).unwrap();
        // No file system of Linux has it.
        let late = Metadata { mtime: Some((i64::MAX, 0)), xattrs: Vec::new(), ..metadata };
        assert!(!late.apply(Held::Open(file.as_fd())).unwrap());
        // The last second that it has has no parts.
        let last = fs::metadata(&path).unwrap().mtime();
        for (nanos, is_there) in [(0, true), (5, false)] {
            let late = Metadata { mtime: Some((last, nanos)), xattrs: Vec::new(), ..metadata };
            assert_eq!(late.apply(Held::Open(file.as_fd())).unwrap(), is_there);
        }
        metadata.apply(Held::Open(file.as_fd())).unwrap();
        let other = Metadata { mode: 0, mtime: Some((9, 0)), atime: None, ..metadata };
        other.apply(Held::Link(held.as_fd())).unwrap();
        assert_eq!(fs::symlink_metadata(&link).unwrap().mtime(), 9);
        assert_eq!(fs::metadata(&path).unwrap().mtime(), -5);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o4751);
        let held = openat(CWD, &path, flags, Mode::empty()).unwrap();
        Metadata { mode: 0o600, ..other }.apply(Held::Named(held.as_fd())).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
    }
}
