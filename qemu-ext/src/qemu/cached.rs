// SPDX-License-Identifier: GPL-2.0-or-later
//! Old data that is in the host's page cache already, read without going through the block layer.
//!
//! With cache=writeback a 4 KiB read costs QEMU a trip to a worker thread or an io_uring round,
//! much more than copying the page. Where the disk is a plain file, its pages can be had at once
//! from a descriptor of our own: `RWF_NOWAIT` fails instead of waiting for the device, and then the
//! read goes its usual way. Both see the same page cache, so they see the same data.

use std::fs::{File, Metadata, OpenOptions};
use std::io::IoSliceMut;
use std::os::unix::fs::MetadataExt;

use qemu_ext_sys as sys;
use rustix::io::{ReadWriteFlags, preadv2};

use super::graph::Bds;
use super::main_loop::MainLoop;

/// Larger reads would hold up everything else in their thread for too long.
const MAX_BYTES: usize = 128 << 10;

/// A second descriptor of the file that holds a disk's data, byte for byte.
#[derive(Debug)]
pub struct CachedFile(File);

impl CachedFile {
    /// The file of a node, if the node is a plain file that uses the page cache.
    pub fn of(main_loop: MainLoop, node: Bds) -> Option<Self> {
        let storage = storage_of(main_loop, node)?;
        // SAFETY: the node is alive; flags are fixed while it is used like this.
        let flags = unsafe { (*storage.as_ptr()).open_flags as u32 };
        if flags & sys::BDRV_O_NOCACHE != 0 {
            return None;
        }
        open_again(main_loop, storage, OpenOptions::new().read(true)).map(Self)
    }

    /// Fills `buf` from the page cache; false when not all of it is there.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> bool {
        let len = buf.len();
        len <= MAX_BYTES
            && preadv2(&self.0, &mut [IoSliceMut::new(buf)], offset, ReadWriteFlags::NOWAIT)
                .is_ok_and(|read| read == len)
    }
}

/// A second descriptor of the plain file that holds a node's data, byte for byte, at the same
/// offsets; none if there is no such file.
pub(super) fn plain_file(main_loop: MainLoop, node: Bds, options: &OpenOptions) -> Option<File> {
    open_again(main_loop, storage_of(main_loop, node)?, options)
}

fn open_again(main_loop: MainLoop, storage: Bds, options: &OpenOptions) -> Option<File> {
    let name = storage.file_name(main_loop);
    if !name.starts_with('/') {
        return None;
    }
    let file = options.open(&name).ok()?;
    let opened = file.metadata().ok()?;
    // The name may stand for another file by now: it must be one that QEMU has open as well,
    // beside us.
    (opened.is_file() && count_open(&opened) >= 2).then_some(file)
}

/// How many descriptors this process has of a file.
pub fn count_open(file: &Metadata) -> usize {
    let entries = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let same = |other: Metadata| (other.dev(), other.ino()) == (file.dev(), file.ino());
    entries.filter(|entry| std::fs::metadata(entry.path()).is_ok_and(same)).count()
}

/// The `file` node that has the node's bytes at their own offsets: the node itself, or below `raw`.
fn storage_of(main_loop: MainLoop, node: Bds) -> Option<Bds> {
    match node.driver(main_loop).as_str() {
        "file" => Some(node),
        "raw" => {
            let (mut known, mut offset) = (0, 0);
            let mut file = core::ptr::null_mut();
            // SAFETY: main loop, outside of coroutines; the node is alive.
            let status = unsafe {
                sys::bdrv_block_status(
                    node.as_ptr(),
                    0,
                    i64::from(sys::BDRV_SECTOR_SIZE),
                    &raw mut known,
                    &raw mut offset,
                    &raw mut file,
                )
            };
            let valid = status >= 0 && status as u32 & sys::BDRV_BLOCK_OFFSET_VALID != 0;
            // Directly below: block status looks through filters, whose users want them to be asked.
            let below = node.below(main_loop);
            Bds::from_ptr(file).filter(|file| {
                valid && offset == 0 && below == Some(*file) && file.driver(main_loop) == "file"
            })
        }
        _ => None,
    }
}
