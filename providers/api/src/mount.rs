// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether a disk that is to hold something is there at all.

use std::io;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
use rustix::io::Errno;

/// Whether `path` is where a file system is mounted; what is not there is not.
///
/// # Errors
/// It cannot be looked at, or the kernel does not tell (before Linux 5.8).
pub fn is_mount_point(path: &Path) -> io::Result<bool> {
    match statx(CWD, path, AtFlags::empty(), StatxFlags::empty()) {
        Ok(found) if found.stx_attributes_mask.contains(StatxAttributes::MOUNT_ROOT) => {
            Ok(found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
        }
        Ok(_) => Err(Errno::OPNOTSUPP.into()),
        Err(Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_not_a_mount_point() {
        let dir = tempfile::tempdir().unwrap();
        assert!(is_mount_point(Path::new("/proc")).unwrap());
        assert!(!is_mount_point(dir.path()).unwrap());
        assert!(!is_mount_point(&dir.path().join("none")).unwrap());
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(is_mount_point(&dir.path().join("file/below")).is_err());
    }
}
