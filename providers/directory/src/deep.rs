// SPDX-License-Identifier: MIT OR Apache-2.0
//! Trees of a container's files in an archive: opened below their root alone, and removed however deep they
//! are. Nobody vouches for what is in them.

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RawDir, ResolveFlags, chmodat, fchmod, openat, openat2,
    statat, unlinkat,
};
use rustix::io::Errno;

/// For the names of a directory.
const NAMES_BYTES: usize = 64 << 10;
/// Names of one directory that are held in memory.
const NAMES_MAX: usize = 8 << 20;

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Opens the root of a tree.
pub(crate) fn open_root(path: &Path) -> io::Result<OwnedFd> {
    Ok(openat(CWD, path, DIRECTORY, Mode::empty())?)
}

/// Opens a directory by its path below `root`, through no link and into no other mount.
pub(crate) fn open_directory(root: impl AsFd, path: &[u8]) -> rustix::io::Result<OwnedFd> {
    let path = if path.is_empty() { b"." } else { path };
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    let open = |flags| openat2(&root, OsStr::from_bytes(path), flags, Mode::empty(), resolve);
    // A look at an archive must not change the times that it keeps; only the owner may ask for that.
    match open(DIRECTORY | OFlags::NOATIME) {
        Err(Errno::PERM) => open(DIRECTORY),
        other => other,
    }
}

/// The names in a directory, in no order.
pub(crate) fn names(dir: impl AsFd) -> io::Result<Vec<CString>> {
    let mut buffer = Vec::with_capacity(NAMES_BYTES);
    let mut entries = RawDir::new(dir, buffer.spare_capacity_mut());
    let mut found = Vec::new();
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

/// A path and one name more.
pub(crate) fn join(path: &[u8], name: &CStr) -> Vec<u8> {
    let mut joined = path.to_vec();
    if !path.is_empty() {
        joined.push(b'/');
    }
    joined.extend(name.to_bytes());
    joined
}

/// How many files and directories a tree has, its root included. Looks at directories alone, so it is quick.
/// `check` ends it between two of them.
pub(crate) fn count<E: From<io::Error>>(
    path: &Path,
    check: impl Fn() -> Result<(), E>,
) -> Result<u64, E> {
    let root = open_root(path)?;
    let mut open = vec![Vec::new()];
    let mut found = 1;
    while let Some(path) = open.pop() {
        check()?;
        let dir = open_directory(&root, &path).map_err(io::Error::from)?;
        let mut buffer = Vec::with_capacity(NAMES_BYTES);
        let mut entries = RawDir::new(&dir, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(io::Error::from)?;
            let name = entry.file_name();
            if [c".", c".."].contains(&name) {
                continue;
            }
            found += 1;
            if is_directory(&dir, name, entry.file_type()).map_err(io::Error::from)? {
                open.push(join(&path, name));
            }
        }
    }
    Ok(found)
}

/// Some file systems say nothing of the kind of an entry.
fn is_directory(dir: &OwnedFd, name: &CStr, kind: FileType) -> rustix::io::Result<bool> {
    if kind != FileType::Unknown {
        return Ok(kind == FileType::Directory);
    }
    let stat = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

/// Removes a directory with all it holds. Holds two descriptors, however deep it is, and copes with others
/// that do the same.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    empty(path, c"")?;
    std::fs::remove_dir(path)
}

/// As [`remove`], but leaves the directory itself, and in it the file called `keep`.
pub(crate) fn empty(path: &Path, keep: &CStr) -> io::Result<()> {
    let root = open_root(path)?;
    let mut open = vec![(Vec::new(), take_files(&root, keep)?)];
    while let Some((path, directories)) = open.last_mut() {
        if let Some(name) = directories.pop() {
            let below = join(path, &name);
            let inside = match open_to_empty(&root, path, &name) {
                Err(Errno::NOENT) => continue,
                other => take_files(&other?, c"")?,
            };
            open.push((below, inside));
            continue;
        }
        let done = open.pop();
        if let (Some((path, _)), Some((parent, _))) = (done, open.last()) {
            let name = &path[path.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1)..];
            let parent = open_directory(&root, parent)?;
            match unlinkat(&parent, OsStr::from_bytes(name), AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    Ok(())
}

fn open_to_empty(root: &OwnedFd, path: &[u8], name: &CStr) -> rustix::io::Result<OwnedFd> {
    match open_directory(root, &join(path, name)) {
        Err(Errno::ACCESS) => {
            // Its owner, who is not root, may give it to himself.
            chmodat(open_directory(root, path)?, name, Mode::RWXU, AtFlags::empty())?;
            open_directory(root, &join(path, name))
        }
        other => other,
    }
}

/// Removes the files of a directory but the one called `keep`; its directories are returned.
fn take_files(dir: &OwnedFd, keep: &CStr) -> io::Result<Vec<CString>> {
    let mut directories = Vec::new();
    for name in names(dir)?.into_iter().filter(|name| name.as_c_str() != keep) {
        let mut removed = unlinkat(dir, &name, AtFlags::empty());
        if removed == Err(Errno::ACCESS) {
            fchmod(dir, Mode::RWXU)?;
            removed = unlinkat(dir, &name, AtFlags::empty());
        }
        match removed {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::ISDIR) => directories.push(name),
            Err(errno) => return Err(errno.into()),
        }
    }
    if !directories.is_empty() {
        // As removing a directory needs the same rights as removing a file.
        let mode = rustix::fs::fstat(dir)?.st_mode;
        if mode & 0o700 != 0o700 {
            fchmod(dir, Mode::RWXU)?;
        }
    }
    Ok(directories)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("root/in")).unwrap();
        symlink("in", dir.path().join("root/link")).unwrap();
        let root = open_root(&dir.path().join("root")).unwrap();
        assert!(open_directory(&root, b"in").is_ok() && open_directory(&root, b"").is_ok());
        for bad in ["link", "..", "in/../..", "/"] {
            assert!(open_directory(&root, bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(open_root(&dir.path().join("root/link")).is_err());
    }

    #[test]
    fn a_tree_that_is_deeper_than_there_are_descriptors_is_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::write(dir.path().join("other"), "stays").unwrap();
        let deep = tree.join("d/".repeat(1500));
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("file"), "x").unwrap();
        symlink("../other", tree.join("link")).unwrap();
        symlink("..", tree.join("d/up")).unwrap();
        for (name, mode) in [("none", 0), ("read-only", 0o500)] {
            fs::create_dir_all(tree.join(name).join("inner")).unwrap();
            fs::write(tree.join(name).join("file"), "x").unwrap();
            fs::set_permissions(tree.join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        assert_eq!(count(&tree, || io::Result::Ok(())).unwrap(), 1 + 1500 + 1 + 2 + 3 + 3);
        remove(&tree).unwrap();
        assert!(!tree.exists());
        assert_eq!(fs::read(dir.path().join("other")).unwrap(), b"stays");
        assert_eq!(remove(&tree).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
