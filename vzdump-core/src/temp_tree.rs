// SPDX-License-Identifier: MIT OR Apache-2.0
//! The temporary directory into which a container's files are copied: how it is called, made and removed. Other
//! directories of a task are removed as it is: somebody may have left something mounted in them.
//!
//! What is in it was made by a container's processes: names of any kind, and directories deeper than a path
//! can be long or a process can have files open. So it is never walked from the top down.

use std::ffi::{CStr, CString, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, openat, openat2, renameat, statat,
    unlinkat,
};
use rustix::io::Errno;

/// Begins the name of every such directory.
const PREFIX: &str = "vzdump-ct-";
/// Begins the names that directories get in order to be removed.
const GOING: &str = "going-";

/// Chooses a name for the copy of a container; makes nothing.
#[must_use]
pub fn plan(temp_dir: &Path, id: u32) -> PathBuf {
    temp_dir.join(format!("{PREFIX}{id}-{}", uuid::Uuid::new_v4().simple()))
}

/// Whether a path is one that [`plan`] has chosen for this container: others are never removed.
#[must_use]
pub fn is_planned(path: &Path, id: u32) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let unique = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_prefix(&format!("{id}-")));
    path.is_absolute()
        && unique
            .is_some_and(|text| text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Makes the directory, for root alone.
///
/// # Errors
/// It is there already, or the directory around it is not.
pub fn create(path: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().mode(0o700).create(path)
}

/// Removes the directory with all that is in it; one that is gone is no error.
///
/// Directories within are moved to the top before they are emptied, so that depth does not matter. Should this be
/// interrupted, the rest can be removed by doing it again. What is mounted in it is not touched.
///
/// # Errors
/// What could not be removed.
pub fn remove(path: &Path) -> io::Result<()> {
    let (Some(around), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::INVAL.into());
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = openat(CWD, around, flags, Mode::empty())
        .map_err(io::Error::from)
        .and_then(|around| open_here(&around, &CString::new(name.as_bytes())?));
    let top = match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let mut moved: u64 = 0;
    let mut waiting = directories_of(&top, &top, &mut moved, true)?;
    while let Some(name) = waiting.pop() {
        let dir = match open_here(&top, &name) {
            // Somebody else removes it, too.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        waiting.extend(directories_of(&dir, &top, &mut moved, false)?);
        gone(unlinkat(&top, name.as_c_str(), AtFlags::REMOVEDIR), &name)?;
    }
    match std::fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Opens a directory unless something is mounted there.
fn open_here(around: &OwnedFd, name: &CStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    openat2(around, name, flags, Mode::empty(), resolve).map_err(|errno| mounted(errno, name))
}

/// The kernel says so in these ways.
fn mounted(errno: Errno, name: &CStr) -> io::Error {
    match errno {
        Errno::XDEV | Errno::BUSY => {
            let name = name.to_string_lossy();
            let text = format!("something is mounted at '{name}' in it: unmount that");
            io::Error::new(io::Error::from(errno).kind(), text)
        }
        other => other.into(),
    }
}

/// Empties a directory: removes its files, and moves its directories to `top`, where they have new names. Those
/// that are at the top already keep theirs.
fn directories_of(
    dir: &OwnedFd,
    top: &OwnedFd,
    moved: &mut u64,
    is_top: bool,
) -> io::Result<Vec<CString>> {
    let mut found = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if [c".", c".."].contains(&name) {
            continue;
        }
        if !is_directory(dir, name, entry.file_type())? {
            gone(unlinkat(dir, name, AtFlags::empty()), name)?;
        } else if is_top {
            found.push(name.to_owned());
        } else {
            found.push(move_to_top(dir, name, top, moved)?);
        }
    }
    Ok(found)
}

fn is_directory(dir: &OwnedFd, name: &CStr, known: FileType) -> io::Result<bool> {
    if known != FileType::Unknown {
        return Ok(known == FileType::Directory);
    }
    let stat = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

fn move_to_top(dir: impl AsFd, name: &CStr, top: &OwnedFd, moved: &mut u64) -> io::Result<CString> {
    // A name may be taken by an interrupted removal: each attempt has another one.
    loop {
        let new = CString::new(OsString::from(format!("{GOING}{moved}")).into_encoded_bytes())?;
        *moved += 1;
        match renameat(dir.as_fd(), name, top, new.as_c_str()) {
            Err(Errno::EXIST | Errno::NOTEMPTY) => {}
            Err(errno) => return Err(mounted(errno, name)),
            Ok(()) => return Ok(new),
        }
    }
}

fn gone(result: rustix::io::Result<()>, name: &CStr) -> io::Result<()> {
    match result {
        Err(Errno::NOENT) => Ok(()),
        other => other.map_err(|errno| mounted(errno, name)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_what_was_planned_for_the_container_is_recognised() {
        let path = plan(Path::new("/var/tmp"), 200);
        assert!(is_planned(&path, 200));
        assert!(!is_planned(&path, 20) && !is_planned(&path, 2000));
        for other in ["/", "/var/tmp", "/etc/vzdump-ct-200-", "vzdump-ct-200-x", "/vzdump-ct-200-x"]
        {
            assert!(!is_planned(Path::new(other), 200), "{other}");
        }
    }

    #[test]
    fn a_tree_deeper_than_paths_can_be_long_is_removed_and_links_are_not_followed() {
        let outer = tempfile::tempdir().unwrap();
        let outside = outer.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("kept"), "").unwrap();
        let top = plan(outer.path(), 200);
        create(&top).unwrap();
        symlink(&outside, top.join("link")).unwrap();
        std::fs::create_dir(top.join("going-0")).unwrap();
        let mut dir = OwnedFd::from(std::fs::File::open(&top).unwrap());
        let name = "d".repeat(200);
        for depth in 0..400 {
            rustix::fs::mkdirat(&dir, name.as_str(), Mode::RWXU).unwrap();
            rustix::fs::symlinkat(&outside, &dir, "link2").unwrap();
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            dir = openat(&dir, name.as_str(), flags, Mode::empty())
                .unwrap_or_else(|error| panic!("{depth}: {error}"));
        }
        drop(dir);
        remove(&top).unwrap();
        assert!(!top.exists() && outside.join("kept").exists());
        remove(&top).unwrap();
    }

    #[test]
    fn what_is_mounted_in_it_stays() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let outer = tempfile::tempdir().unwrap();
        let outside = outer.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("kept"), "").unwrap();
        let top = plan(outer.path(), 200);
        let run = |program: &str, arguments: &[&Path]| {
            let status = std::process::Command::new(program).args(arguments).status().unwrap();
            assert!(status.success(), "{program}");
        };
        for place in ["", "here", "deeper/there", "file"] {
            std::fs::create_dir_all(top.join("deeper/there")).unwrap();
            std::fs::create_dir_all(top.join("here")).unwrap();
            std::fs::write(top.join("file"), "").unwrap();
            let is_file = place == "file";
            let source = if is_file { outside.join("kept") } else { outside.clone() };
            let place = if place.is_empty() { top.clone() } else { top.join(place) };
            run("mount", &[Path::new("--bind"), &source, &place]);
            let removed = remove(&top);
            // Those that are deep were moved to the top.
            run("umount", &[&place]);
            let error = removed.unwrap_err().to_string();
            assert!(error.contains("something is mounted at"), "{}: {error}", place.display());
            assert!(outside.join("kept").exists(), "{}", place.display());
            remove(&top).unwrap();
        }
    }
}
