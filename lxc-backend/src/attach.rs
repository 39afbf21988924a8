// SPDX-License-Identifier: MIT OR Apache-2.0
//! Mounting a container's volumes at its own paths, which the container chose: a link in it must not lead
//! to a place of the host.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, openat2};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::system::{MountAttributes, set_mount_attributes, set_nested_attributes};

/// A mount of what is at `source`, without what is mounted below it, that nobody can see yet.
pub(crate) fn detached(
    source: &Path,
    attributes: MountAttributes,
    ids: Option<BorrowedFd<'_>>,
) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, source, flags)?;
    set_mount_attributes(tree.as_fd(), attributes, ids)?;
    Ok(tree)
}

/// The same with what is mounted below it.
pub(crate) fn detached_with_nested(
    source: &Path,
    attributes: MountAttributes,
) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, source, flags)?;
    set_nested_attributes(tree.as_fd(), attributes)?;
    Ok(tree)
}

/// Makes a detached mount appear at a directory.
pub(crate) fn attach(tree: &OwnedFd, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(tree, "", target, "", flags)?)
}

/// Opens a directory below `root` as a process would whose root it is.
pub(crate) fn open_below(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    let below = path.strip_prefix("/").unwrap_or(path);
    let below = if below.as_os_str().is_empty() { Path::new(".") } else { below };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    Ok(openat2(root, below, flags, Mode::empty(), resolve)?)
}

/// The same; makes what is missing, for this owner.
pub(crate) fn open_or_make_below(
    root: BorrowedFd<'_>,
    path: &Path,
    owner: (u32, u32),
) -> io::Result<OwnedFd> {
    let mut so_far = Path::new("/").to_path_buf();
    let mut at = open_below(root, &so_far)?;
    for part in path.components() {
        let Component::Normal(name) = part else { continue };
        so_far.push(name);
        at = match open_below(root, &so_far) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                mkdirat(&at, name, Mode::from_raw_mode(0o755))?;
                let made = open_below(root, &so_far)?;
                let (uid, gid) = owner;
                std::os::unix::fs::fchown(File::from(readable(&made)?), Some(uid), Some(gid))?;
                made
            }
            other => other?,
        };
    }
    Ok(at)
}

/// A descriptor that only names a directory cannot change it.
fn readable(dir: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(dir, ".", flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_in_a_container_do_not_lead_out_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("etc/inner")).unwrap();
        std::fs::create_dir(dir.path().join("inner")).unwrap();
        symlink("/etc", root.join("absolute")).unwrap();
        symlink("../..", root.join("upwards")).unwrap();
        let opened = File::open(&root).unwrap();
        let name = |fd: OwnedFd| {
            use std::os::fd::AsRawFd as _;
            std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap()
        };
        let open = |path: &str| open_below(opened.as_fd(), Path::new(path)).map(name);
        assert_eq!(open("/absolute/inner").unwrap(), root.join("etc/inner"));
        assert_eq!(open("/upwards").unwrap(), root);
        assert!(open("/upwards/inner").is_err());
        let own = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let made = open_or_make_below(opened.as_fd(), Path::new("/absolute/a/b"), own);
        assert_eq!(name(made.unwrap()), root.join("etc/a/b"));
        assert!(!Path::new("/etc/a/b").exists());
    }
}
