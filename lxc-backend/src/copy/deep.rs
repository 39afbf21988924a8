// SPDX-License-Identifier: MIT OR Apache-2.0
//! Opening directories of a tree that somebody else may be changing, by paths of any length.

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, RawDir, ResolveFlags, openat2};

/// The longest path that the kernel takes at once, and some more for its end.
const PIECE_BYTES_MAX: usize = 4000;
/// The longest path that is followed at all.
pub(super) const PATH_BYTES_MAX: usize = 64 << 10;

/// Names of one directory that are held in memory.
const NAMES_MAX: usize = 16 << 20;

/// Opens a directory below `root`, through no link and into no other mount.
pub(crate) fn open_directory(root: impl AsFd, path: &Path) -> io::Result<OwnedFd> {
    let mut rest = path.as_os_str().as_bytes();
    let mut at = open_piece(root, rest_or_dot(cut(&mut rest)))?;
    while !rest.is_empty() {
        at = open_piece(&at, cut(&mut rest))?;
    }
    Ok(at)
}

fn open_piece(from: impl AsFd, piece: &[u8]) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    Ok(openat2(from, OsStr::from_bytes(piece), flags | OFlags::NOATIME, Mode::empty(), resolve)?)
}

fn rest_or_dot(piece: &[u8]) -> &[u8] {
    if piece.is_empty() { b"." } else { piece }
}

/// Takes as many components from the front as can be followed at once.
fn cut<'a>(rest: &mut &'a [u8]) -> &'a [u8] {
    if rest.len() <= PIECE_BYTES_MAX {
        return std::mem::take(rest);
    }
    // Names are shorter than a piece, so there is one.
    let end = rest[..PIECE_BYTES_MAX].iter().rposition(|b| *b == b'/').unwrap_or(rest.len());
    let piece = &rest[..end];
    *rest = rest.get(end + 1..).unwrap_or_default();
    piece
}

/// A path and one name more.
pub(crate) fn join(path: &Path, name: &CStr) -> PathBuf {
    path.join(OsStr::from_bytes(name.to_bytes()))
}

/// The names in a directory.
pub(super) fn names(dir: impl AsFd, buffer: &mut Vec<u8>) -> io::Result<Vec<CString>> {
    buffer.clear();
    let mut found = Vec::new();
    let mut entries = RawDir::new(dir, buffer.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name();
        if ![c".", c".."].contains(&name) {
            found.push(name.to_owned());
        }
        if found.len() > NAMES_MAX {
            let text = format!("a directory has more than {NAMES_MAX} entries");
            return Err(io::Error::other(text));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_paths_are_cut_between_names() {
        let path = ["d".repeat(250).as_str()].repeat(100).join("/");
        let mut rest = path.as_bytes();
        let mut pieces = Vec::new();
        while !rest.is_empty() {
            pieces.push(cut(&mut rest));
        }
        assert!(pieces.len() > 5 && pieces.iter().all(|piece| piece.len() <= PIECE_BYTES_MAX));
        assert_eq!(pieces.join(&b'/'), path.as_bytes());
    }

    #[test]
    fn links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("root/in")).unwrap();
        std::os::unix::fs::symlink("in", dir.path().join("root/link")).unwrap();
        let root = std::fs::File::open(dir.path().join("root")).unwrap();
        assert!(open_directory(&root, Path::new("in")).is_ok());
        assert!(open_directory(&root, Path::new("")).is_ok());
        for bad in ["link", "..", "in/../..", "/"] {
            assert!(open_directory(&root, Path::new(bad)).is_err(), "{bad}");
        }
    }
}
