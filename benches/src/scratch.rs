// SPDX-License-Identifier: MIT OR Apache-2.0
//! Folders that go away with their run, and what killed runs have left of them.
//!
//! A file in each says whose it is, and is locked as long as its process lives. So a folder of somebody
//! else is never taken for a left-over, whatever its name is, and one of a run elsewhere neither.

use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::TempDir;

const MARK: &str = ".vzdump-bench";
const MARK_TO_BE: &str = ".vzdump-bench.new";

/// A new folder, removed when dropped.
#[derive(Debug)]
pub struct Scratch {
    // Goes first: the lock is held until nothing is left.
    folder: TempDir,
    _mark: File,
}

impl Scratch {
    /// Makes one in `parent`, with a name that begins with `prefix`.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn new(parent: &Path, prefix: &str) -> Result<Self> {
        let failed = || format!("cannot create a folder in {}", parent.display());
        let folder = tempfile::Builder::new().prefix(prefix).tempdir_in(parent);
        let folder = folder.with_context(failed)?;
        let mark = mark(folder.path()).with_context(failed)?;
        Ok(Self { folder, _mark: mark })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

/// Locked before it gets its name: nobody ever finds one of a living run that is not.
fn mark(folder: &Path) -> io::Result<File> {
    let to_be = folder.join(MARK_TO_BE);
    let file = File::create_new(&to_be)?;
    file.lock()?;
    fs::rename(&to_be, folder.join(MARK))?;
    Ok(file)
}

/// Removes what killed runs have left in a folder. What something still uses stays, and is told of.
pub fn sweep(parent: &Path) {
    // As /proc names files.
    let Ok(entries) = parent.canonicalize().and_then(fs::read_dir) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        // Until it is removed, so that nobody else tries to.
        let Some(_lock) = left_over(&path) else { continue };
        let name = path.display();
        if let Some(user) = user(&path) {
            eprintln!(
                "{name} is left of a run that was killed, but {user}; a later run removes it"
            );
            continue;
        }
        match fs::remove_dir_all(&path) {
            Ok(()) => eprintln!("removed {name}, left of a run that was killed"),
            Err(error) => eprintln!("cannot remove {name}, left of a run that was killed: {error}"),
        }
    }
}

/// The lock of a folder that was a run's; none if it is not, or the run lives.
fn left_over(folder: &Path) -> Option<File> {
    let own = |path: &Path| {
        // Not what a link points to, and nothing that another user may have put there.
        let meta = path.symlink_metadata().ok()?;
        (meta.uid() == rustix::process::geteuid().as_raw()).then_some(meta)
    };
    let path = folder.join(MARK);
    let is_marked = own(folder)?.is_dir() && own(&path)?.is_file();
    let mark = is_marked.then(|| File::open(path).ok()).flatten()?;
    mark.try_lock().is_ok().then_some(mark)
}

/// What uses something in a folder, and what to do about it.
fn user(folder: &Path) -> Option<String> {
    let known =
        fs::read_to_string("/proc/self/mountinfo").and_then(|m| Ok((m, fs::read_dir("/proc")?)));
    let Ok((mounts, entries)) = known else {
        return Some("/proc does not tell whether something uses it: remove it by hand".to_owned());
    };
    if is_mounted(&mounts, folder) {
        return Some("something is mounted in it: unmount that".to_owned());
    }
    let own = std::process::id();
    let mut pids =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let pid = pids.find(|pid| *pid != own && uses(*pid, folder))?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some(format!("process {pid} ({}) uses it: end that", name.trim()))
}

/// Whether `mountinfo` has a folder, or one in it.
fn is_mounted(mountinfo: &str, folder: &Path) -> bool {
    let escaped = folder.display().to_string().replace('\\', "\\134").replace(' ', "\\040");
    ["/", " "].iter().any(|end| mountinfo.contains(&format!(" {escaped}{end}")))
}

/// Whether a process was started with the name of something in a folder, or has a file in it open: sockets
/// show only in the first way, images that a daemon was told of later only in the second.
fn uses(pid: u32, folder: &Path) -> bool {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let bytes = folder.as_os_str().as_bytes();
    let arguments = fs::read(process.join("cmdline")).unwrap_or_default();
    arguments.windows(bytes.len()).any(|part| part == bytes)
        || process.join("fd").read_dir().is_ok_and(|descriptors| {
            let mut open = descriptors.flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
            open.any(|path| path.starts_with(folder))
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    /// A folder as a killed run leaves it.
    fn left(parent: &Path, name: &str) -> PathBuf {
        let folder = parent.join(name);
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("image"), "x").unwrap();
        drop(mark(&folder).unwrap());
        folder
    }

    #[test]
    fn only_left_overs_of_runs_are_removed() {
        let parent = tempfile::tempdir().unwrap();
        let alive = Scratch::new(parent.path(), "run-").unwrap();
        let dead = left(parent.path(), "vm-123456");
        let foreign = parent.path().join("vm-images");
        fs::create_dir(&foreign).unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let target = left(elsewhere.path(), "run-654321");
        std::os::unix::fs::symlink(&target, parent.path().join("run-654321")).unwrap();
        sweep(parent.path());
        assert!(alive.path().exists() && foreign.exists() && target.exists());
        assert!(!dead.exists());
        let path = alive.path().to_owned();
        drop(alive);
        assert!(!path.exists());
    }

    #[test]
    fn what_a_process_still_uses_stays() {
        let parent = tempfile::tempdir().unwrap();
        let folder = left(&parent.path().canonicalize().unwrap(), "fleecing-123456");
        let image = folder.join("image");
        let mut by_name = Command::new("tail").arg("-f").arg(&image).spawn().unwrap();
        sweep(parent.path());
        by_name.kill().unwrap();
        by_name.wait().unwrap();
        assert!(folder.exists());
        let file = File::open(&image).unwrap();
        let mut by_file = Command::new("sleep").arg("60").stdin(Stdio::from(file)).spawn().unwrap();
        sweep(parent.path());
        by_file.kill().unwrap();
        by_file.wait().unwrap();
        assert!(folder.exists());
        sweep(parent.path());
        assert!(!folder.exists());
    }

    #[test]
    fn mounts_in_a_folder_are_found() {
        let info = "36 35 98:0 / /srv/a\\040b/ct-123456/mounted ro - ext4 /dev/loop0 ro\n\
            37 35 98:0 / /srv/ct-123456 ro - ext4 /dev/loop1 ro\n";
        assert!(is_mounted(info, Path::new("/srv/a b/ct-123456")));
        assert!(is_mounted(info, Path::new("/srv/ct-123456")));
        assert!(!is_mounted(info, Path::new("/srv/ct-12345")));
    }
}
