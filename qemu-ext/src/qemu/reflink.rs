// SPDX-License-Identifier: GPL-2.0-or-later
//! Old data saved without copying it: the fleecing image shares blocks of the disk's file (a
//! reflink, `FICLONERANGE` of ioctl_ficlonerange(2)), which XFS and btrfs can.
//!
//! The kernel writes dirty pages of the range back first and drops cached ones of the image, so all
//! descriptors of the two files see the same data before and after.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

use rustix::ioctl::{Setter, ioctl, opcode};

use super::cached::plain_file;
use super::graph::Bds;
use super::main_loop::MainLoop;

/// `struct file_clone_range` of linux/fs.h.
#[repr(C)]
struct FileCloneRange {
    src_fd: i64,
    src_offset: u64,
    src_length: u64,
    dest_offset: u64,
}

/// The files of a disk and of its fleecing image, opened once more.
#[derive(Debug)]
pub struct SharedFiles {
    source: File,
    image: File,
}

impl SharedFiles {
    /// The files of two nodes, if both are plain files that can share `unit_bytes` at their begin.
    /// The image's content there is overwritten.
    ///
    /// # Errors
    /// Why they cannot.
    pub fn of(
        main_loop: MainLoop,
        source: Bds,
        image: Bds,
        unit_bytes: u64,
    ) -> Result<Self, String> {
        let no_file = |what: &str| format!("{what} is not a raw image in a plain file");
        let source = plain_file(main_loop, source, OpenOptions::new().read(true))
            .ok_or_else(|| no_file("the disk"))?;
        let image = plain_file(main_loop, image, OpenOptions::new().write(true))
            .ok_or_else(|| no_file("the fleecing image"))?;
        let files = Self { source, image };
        files.share(0, 0, unit_bytes).map_err(|error| error.to_string())?;
        Ok(files)
    }

    /// Lets `len` bytes of the image at `image_offset` share the disk's blocks at `offset`. Blocks
    /// until the filesystem is done.
    ///
    /// # Errors
    /// The filesystem's error; what is there in the image is undefined then.
    pub fn share(&self, offset: u64, image_offset: u64, len: u64) -> io::Result<()> {
        const OPCODE: u32 = opcode::write::<FileCloneRange>(0x94, 13);
        let range = FileCloneRange {
            src_fd: self.source.as_raw_fd().into(),
            src_offset: offset,
            src_length: len,
            dest_offset: image_offset,
        };
        // SAFETY: the request's number and structure belong together; both descriptors are open.
        unsafe { ioctl(&self.image, Setter::<OPCODE, _>::new(range)) }?;
        Ok(())
    }
}
