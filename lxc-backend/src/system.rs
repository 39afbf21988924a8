// SPDX-License-Identifier: MIT OR Apache-2.0
//! The one system call that no library offers in a safe form: `mount_setattr(2)`. The only module with
//! `unsafe` code outside QEMU.

#![expect(unsafe_code, reason = "mount_setattr has no safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// What a mount of a container's files is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MountAttributes {
    /// Nobody can write through it.
    pub(crate) read_only: bool,
    /// Device files in it cannot be opened, programs not run and set-user-id bits do not count.
    pub(crate) inert: bool,
}

/// Changes one mount, which nobody can see yet, and with a user namespace the ids that are seen in it: an id
/// on disk is looked up in the namespace and shown as what it is outside.
pub(crate) fn set_mount_attributes(
    mount: BorrowedFd<'_>,
    attributes: MountAttributes,
    ids: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    change(mount, attributes, ids, libc::AT_EMPTY_PATH)
}

/// Changes one mount, which nobody can see yet, and all that are below it.
pub(crate) fn set_nested_attributes(
    mount: BorrowedFd<'_>,
    attributes: MountAttributes,
) -> io::Result<()> {
    change(mount, attributes, None, libc::AT_EMPTY_PATH | libc::AT_RECURSIVE)
}

fn change(
    mount: BorrowedFd<'_>,
    attributes: MountAttributes,
    ids: Option<BorrowedFd<'_>>,
    flags: libc::c_int,
) -> io::Result<()> {
    let mut set = 0;
    if attributes.read_only {
        set |= libc::MOUNT_ATTR_RDONLY;
    }
    if attributes.inert {
        set |= libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
    }
    let mut userns_fd = 0;
    if let Some(ids) = ids {
        set |= libc::MOUNT_ATTR_IDMAP;
        userns_fd = u64::try_from(ids.as_raw_fd()).map_err(io::Error::other)?;
    }
    let attr = libc::mount_attr { attr_set: set, attr_clr: 0, propagation: 0, userns_fd };
    // SAFETY: the path is an empty string that ends with a zero byte, `attr` lives across the call and
    // its size is given; both descriptors are open as long as they are borrowed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
