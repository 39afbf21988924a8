// SPDX-License-Identifier: MIT OR Apache-2.0
//! Device files of an unprivileged container, of which its archive could not be restored. It cannot make them itself, so
//! there are seldom any; who has put them there is told when it is backed up, not when it is restored.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use provider_api::{Excludes, Reached};
use rustix::fs::{AtFlags, FileType, RawDir, fstat, statat};

use crate::copy::deep::{join, open_directory};

/// Device files below this are made when a container starts: a restore leaves them out.
const DEV: &str = "/dev";
/// How many of them are named.
pub(crate) const NAMED_MAX: usize = 20;
/// For the names of a directory.
const NAMES_BYTES: usize = 64 << 10;

/// The device files of a container that a restore would refuse.
#[derive(Debug, Default)]
pub(crate) struct Devices {
    /// The first of them, as the container sees them.
    pub(crate) named: Vec<PathBuf>,
    pub(crate) count: u64,
}

/// What is still to be looked at of a directory: directories in it.
type Rest = Vec<(CString, Reached)>;

impl Devices {
    /// Looks at a volume, without what is mounted in it, where nothing is left out. `root` is its tree, which is at
    /// `mount_point` in the container. What cannot be read is the provider's to find. `watch` is called before each name.
    pub(crate) fn look(
        &mut self,
        root: &Path,
        mount_point: &Path,
        excludes: &Excludes,
        watch: &mut dyn FnMut() -> io::Result<()>,
    ) -> io::Result<()> {
        let root: OwnedFd = File::open(root)?.into();
        let device = fstat(&root)?.st_dev;
        let Some(reached) = excludes.directory(mount_point) else { return Ok(()) };
        let mut path = PathBuf::new();
        let mut stack = vec![self.enter(&root, (mount_point, &path), &reached, watch)?];
        while let Some(rest) = stack.last_mut() {
            let Some((name, reached)) = rest.pop() else {
                stack.pop();
                path.pop();
                continue;
            };
            path = join(&path, &name);
            let opened = open_directory(&root, &path);
            let is_own = |dir: &OwnedFd| fstat(dir).is_ok_and(|stat| stat.st_dev == device);
            let rest = match opened.ok().filter(is_own) {
                Some(dir) => self.enter(&dir, (mount_point, &path), &reached, watch)?,
                None => Rest::new(),
            };
            stack.push(rest);
        }
        Ok(())
    }

    fn enter(
        &mut self,
        dir: impl AsFd,
        (mount_point, path): (&Path, &Path),
        reached: &Reached,
        watch: &mut dyn FnMut() -> io::Result<()>,
    ) -> io::Result<Rest> {
        let mut rest = Rest::new();
        let mut buffer = Vec::with_capacity(NAMES_BYTES);
        let mut entries = RawDir::new(&dir, buffer.spare_capacity_mut());
        while let Some(Ok(entry)) = entries.next() {
            watch()?;
            let name = entry.file_name();
            if [c".", c".."].contains(&name) {
                continue;
            }
            // Some file systems do not tell it here.
            let kind = match entry.file_type() {
                FileType::Unknown => None,
                kind => Some(kind),
            };
            let is_of_interest =
                kind.is_none_or(|kind| kind == FileType::Directory || is_device(kind));
            if !is_of_interest {
                continue;
            }
            let Ok(stat) = statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            let kind = FileType::from_raw_mode(stat.st_mode);
            let Some(reached) = reached.enter(name.to_bytes(), kind == FileType::Directory) else {
                continue;
            };
            // Which says that something of a lower layer is gone: no device at all.
            let is_whiteout = kind == FileType::CharacterDevice && stat.st_rdev == 0;
            if kind == FileType::Directory {
                rest.push((name.to_owned(), reached));
            } else if is_device(kind) && !is_whiteout {
                self.note(join(&mount_point.join(path), name));
            }
        }
        Ok(rest)
    }

    fn note(&mut self, path: PathBuf) {
        if path.starts_with(DEV) {
            return;
        }
        self.count += 1;
        if self.named.len() < NAMED_MAX {
            self.named.push(path);
        }
    }
}

fn is_device(kind: FileType) -> bool {
    matches!(kind, FileType::CharacterDevice | FileType::BlockDevice)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn devices_outside_dev_are_found_where_nothing_is_left_out() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let tree = tempfile::tempdir().unwrap();
        for name in ["dev", "a/b", "left/out", "srv"] {
            std::fs::create_dir_all(tree.path().join(name)).unwrap();
        }
        for (name, numbers) in
            [("dev/null", "1 3"), ("a/b/null", "1 3"), ("left/out/null", "1 3"), ("a/gone", "0 0")]
        {
            let mut mknod = Command::new("mknod");
            mknod.arg(tree.path().join(name)).arg("c").args(numbers.split(' '));
            assert!(mknod.status().unwrap().success());
        }
        std::fs::write(tree.path().join("srv/file"), "x").unwrap();
        std::os::unix::fs::symlink("/", tree.path().join("srv/link")).unwrap();
        let excludes = Excludes::parse(&["/left"]).unwrap();
        let look = |place: &str| {
            let mut found = Devices::default();
            let watch = &mut || Ok(());
            found.look(tree.path(), Path::new(place), &excludes, watch).unwrap();
            found.named
        };
        assert_eq!(look("/"), [Path::new("/a/b/null")]);
        let mut below = look("/mnt");
        below.sort();
        let all = ["/mnt/a/b/null", "/mnt/dev/null", "/mnt/left/out/null"];
        assert_eq!(below, all.map(Path::new));
        let mut names = 0;
        let mut ended = || {
            names += 1;
            if names > 3 { Err(io::Error::other("ended")) } else { Ok(()) }
        };
        let looked = Devices::default().look(tree.path(), Path::new("/"), &excludes, &mut ended);
        assert!(looked.is_err());
    }
}
