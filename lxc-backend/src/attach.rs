// SPDX-License-Identifier: MIT OR Apache-2.0
//! Mounting a container's volumes at its own paths, which the container chose: a link in it must not lead
//! to a place of the host.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, openat2};
use rustix::io::Errno;
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
    Ok(open_in(root, path, ResolveFlags::NO_MAGICLINKS)?)
}

fn open_in(root: BorrowedFd<'_>, path: &Path, how: ResolveFlags) -> rustix::io::Result<OwnedFd> {
    let below = path.strip_prefix("/").unwrap_or(path);
    let below = if below.as_os_str().is_empty() { Path::new(".") } else { below };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat2(root, below, flags, Mode::empty(), ResolveFlags::IN_ROOT | how)
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

/// Opens the mount point of a volume for a backup. `root` is what is mounted at `top`, and `around` is the volume
/// that has the mount point. A link may not lead there: whoever looks for the volume by its path finds the link.
pub(crate) fn open_place(
    root: BorrowedFd<'_>,
    (around, top): (&str, &Path),
    mount_point: &Path,
) -> io::Result<OwnedFd> {
    let below = mount_point.strip_prefix(top).unwrap_or(mount_point);
    open_in(root, below, ResolveFlags::NO_SYMLINKS).map_err(|errno| match errno {
        Errno::LOOP => io::Error::other(match real_path(root, below) {
            Some(real) => format!(
                "a link leads from there to '{0}', where a backup does not look for it: write \
                 'mp={0}' into the container's configuration",
                top.join(real).display()
            ),
            None => {
                "a link leads from there to another place, where a backup does not look for it: \
                     write the path without links into the container's configuration"
                    .to_owned()
            }
        }),
        Errno::NOENT => io::Error::other(format!(
            "the volume '{around}' has no such directory: stop and start the container, which \
             makes it, or make the directory '{}' in the volume '{around}'",
            mount_point.display()
        )),
        errno => errno.into(),
    })
}

/// Where links lead to, as seen from `root`.
fn real_path(root: BorrowedFd<'_>, path: &Path) -> Option<PathBuf> {
    let name =
        |fd: BorrowedFd<'_>| std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok();
    let found = name(open_below(root, path).ok()?.as_fd())?;
    Some(found.strip_prefix(name(root)?).ok()?.to_owned())
}

/// The one of `all` that is mounted nearest above a mount point.
pub(crate) fn nearest_above<'a, T>(
    all: impl IntoIterator<Item = &'a T>,
    place_of: impl Fn(&T) -> &Path,
    mount_point: &Path,
) -> Option<&'a T> {
    let is_above = |one: &T| place_of(one) != mount_point && mount_point.starts_with(place_of(one));
    let above = all.into_iter().filter(|one| is_above(one));
    above.max_by_key(|one| place_of(one).components().count())
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
        let name =
            |fd: OwnedFd| std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
        let open = |path: &str| open_below(opened.as_fd(), Path::new(path)).map(name);
        assert_eq!(open("/absolute/inner").unwrap(), root.join("etc/inner"));
        assert_eq!(open("/upwards").unwrap(), root);
        assert!(open("/upwards/inner").is_err());
        let own = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let made = open_or_make_below(opened.as_fd(), Path::new("/absolute/a/b"), own);
        assert_eq!(name(made.unwrap()), root.join("etc/a/b"));
        assert!(!Path::new("/etc/a/b").exists());
    }

    #[test]
    fn a_mount_point_is_a_directory_and_no_link_leads_there() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("spool/plain")).unwrap();
        std::fs::create_dir(root.join("mail")).unwrap();
        symlink("../mail", root.join("spool/mail")).unwrap();
        symlink("/mail/absolute", root.join("spool/nowhere")).unwrap();
        let opened = File::open(&root).unwrap();
        let open = |path: &str| {
            let around = ("rootfs", Path::new("/var"));
            open_place(opened.as_fd(), around, Path::new(path)).map_err(|error| error.to_string())
        };
        assert!(open("/var/spool/plain").is_ok());
        assert!(open("/var").is_ok());
        for (place, real) in
            [("/var/spool/mail", "write 'mp=/var/mail'"), ("/var/spool/nowhere", "without links")]
        {
            let error = open(place).unwrap_err();
            assert!(error.contains("a link leads") && error.contains(real), "{error}");
        }
        let error = open("/var/spool/missing").unwrap_err();
        let says = |words: &str| error.contains(words);
        assert!(says("'rootfs'") && says("directory '/var/spool/missing'"), "{error}");
    }

    #[test]
    fn a_mount_point_is_in_the_volume_nearest_above_it() {
        let all = ["/", "/srv", "/srv/data", "/srv/database"].map(PathBuf::from);
        for (inner, above) in [
            ("/", None),
            ("/srv", Some("/")),
            ("/srv/data", Some("/srv")),
            ("/srv/data/a/b", Some("/srv/data")),
            ("/var", Some("/")),
        ] {
            let found = nearest_above(&all, PathBuf::as_path, Path::new(inner));
            assert_eq!(found.map(PathBuf::as_path), above.map(Path::new), "{inner}");
        }
    }
}
