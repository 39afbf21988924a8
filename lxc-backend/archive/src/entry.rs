// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an archive says of one file.

/// A point in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Time {
    /// Seconds since 1970, rounded down.
    pub secs: i64,
    /// Nanoseconds on top of them.
    pub nanos: u32,
}

/// A piece of a file that has data; the rest reads as zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Where it begins.
    pub offset: u64,
    /// How long it is; may be 0.
    pub len: u64,
}

/// What kind of file it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File {
        /// Its size with holes.
        size: u64,
        /// Its data, in order, which follow in the archive.
        regions: Vec<Region>,
    },
    /// One more name of an earlier entry, by that one's path.
    HardLink(Vec<u8>),
    /// A symbolic link with any target of 1 to 4095 bytes.
    Symlink(Vec<u8>),
    /// A directory.
    Directory,
    /// A FIFO.
    Fifo,
    /// A character device.
    CharDevice {
        /// Its numbers.
        major: u32,
        /// Its numbers.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Its numbers.
        major: u32,
        /// Its numbers.
        minor: u32,
    },
}

/// What an archive says of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Names joined by single slashes, none of them `.` or `..`; empty for the root itself.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permissions with set-user-id, set-group-id and sticky bit.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// When its content was changed.
    pub mtime: Time,
    /// When it was read, if the archive tells.
    pub atime: Option<Time>,
    /// Extended attributes, other than access control lists; each name once.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// The value of `system.posix_acl_access`.
    pub access_acl: Option<Vec<u8>>,
    /// The value of `system.posix_acl_default`.
    pub default_acl: Option<Vec<u8>>,
    /// Whether lines of these lists were dropped that are for nobody, see [`crate::acl::List::is_cut`].
    pub is_acl_cut: bool,
}
