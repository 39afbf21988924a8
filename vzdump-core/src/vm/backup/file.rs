// SPDX-License-Identifier: MIT OR Apache-2.0
//! One frozen disk as a file: a storage daemon that reads QEMU's export and offers it by FUSE, in the
//! private directory of the backup.
//!
//! ```text
//!  provider ─ read, punch hole ─► file (FUSE) ─► storage daemon ─► socket of ours ─► QEMU's export
//! ```
//!
//! Why through a socket of ours, and why a process for each disk, is in `docs/design/0020`. What must go
//! again whatever happens are the process and the mount. The journal knows both by names that are chosen
//! before: the process by a mark in its command line, the mount by its path.

use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;
use serde_json::json;
use tokio::process::{Child, Command};

use crate::blocking;
use crate::guest::GuestError;
use crate::journal::FileExport;
use crate::task_log::clean;
use crate::tools::Tools;
use crate::vm::process::{DAEMON_MARK_OPTION, VmProcess, mark_argument};

/// Until the daemon has made the file; it takes milliseconds unless the host is very busy.
const START_WAIT: Duration = Duration::from_secs(60);
const START_POLL: Duration = Duration::from_millis(10);
/// A daemon ends when its requests have; those to an export that was withdrawn fail at once.
const END_WAIT: Duration = Duration::from_secs(10);
/// A killed process is gone at once unless it hangs in the kernel.
const KILL_WAIT: Duration = Duration::from_secs(10);
/// The first look at the file goes through the daemon.
const LOOK_WAIT: Duration = Duration::from_secs(30);
/// More mounts than this were never made at one place.
const MOUNTS_MAX: usize = 8;
/// How much of the daemon's words is shown.
const SAID_BYTES_MAX: u64 = 2048;
const NODE: &str = "disk";

/// A disk that is offered as a file. Dropping it kills the daemon, but the mount stays until
/// [`withdraw`].
#[derive(Debug)]
pub(super) struct FileDisk {
    export: FileExport,
    daemon: Child,
}

impl FileDisk {
    /// Has a daemon make the file. What it makes must be withdrawn also when this fails.
    pub(super) async fn open(
        tools: &Tools,
        export: FileExport,
        socket: &Path,
        name: &str,
        size_bytes: u64,
    ) -> Result<Self, GuestError> {
        let doing = format!("offer the disk '{name}' as a file");
        let program = tools.qemu_storage_daemon().map_err(GuestError::at(doing.clone()))?;
        let open = async {
            let mut disk = Self::start(&program, export, socket, name)?;
            disk.wait_until_ready().await?;
            disk.check_size(size_bytes).await?;
            Ok::<_, io::Error>(disk)
        };
        open.await.map_err(GuestError::at(doing))
    }

    fn start(program: &Path, export: FileExport, socket: &Path, name: &str) -> io::Result<Self> {
        let create = |path: &Path| {
            let mut options = std::fs::File::options();
            options.write(true).create_new(true).mode(0o600).open(path)
        };
        create(&export.path)?;
        let said = create(&beside(&export.path, "log"))?;
        let node = json!({
            "driver": "nbd",
            "node-name": NODE,
            // Without it a hole would be asked for as zeroes that take space.
            "discard": "unmap",
            "server": { "type": "unix", "path": utf8(socket)? },
            "export": name,
        });
        let file = json!({
            "type": "fuse",
            "id": "file",
            "node-name": NODE,
            "mountpoint": utf8(&export.path)?,
            "writable": true,
            "growable": false,
            "allow-other": "off",
        });
        let mut command = Command::new(program);
        command.args(["--blockdev", &node.to_string(), "--export", &file.to_string()]);
        command.args([DAEMON_MARK_OPTION, &mark_argument(&export.mark)]);
        command.arg("--pidfile").arg(beside(&export.path, "pid"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::from(said));
        // Keys pressed at the terminal are for this program: it ends the daemon itself.
        let daemon = command.process_group(0).kill_on_drop(true).spawn()?;
        Ok(Self { export, daemon })
    }

    /// The daemon writes its pid file when the file is there.
    async fn wait_until_ready(&mut self) -> io::Result<()> {
        let deadline = Instant::now() + START_WAIT;
        let pid_file = beside(&self.export.path, "pid");
        while VmProcess::of_pid_file(&pid_file)?.is_none() {
            if let Some(status) = self.daemon.try_wait()? {
                let said = self.said();
                return Err(io::Error::other(format!(
                    "qemu-storage-daemon ended with {status}: {said}"
                )));
            }
            if Instant::now() >= deadline {
                let text = format!("qemu-storage-daemon did not begin: {}", self.said());
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            tokio::time::sleep(START_POLL).await;
        }
        Ok(())
    }

    /// The end of what the daemon said, for people.
    fn said(&self) -> String {
        let read = || {
            let mut file = std::fs::File::open(beside(&self.export.path, "log"))?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(SAID_BYTES_MAX)))?;
            let mut bytes = Vec::new();
            file.take(SAID_BYTES_MAX).read_to_end(&mut bytes)?;
            Ok::<_, io::Error>(bytes)
        };
        clean(String::from_utf8_lossy(&read().unwrap_or_default()).trim())
    }

    async fn check_size(&self, size_bytes: u64) -> io::Result<()> {
        let path = self.export.path.clone();
        let look = blocking::run(move || std::fs::metadata(path));
        let found = tokio::time::timeout(LOOK_WAIT, look).await;
        let found = found.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??.len();
        if found == size_bytes {
            return Ok(());
        }
        Err(io::Error::other(format!("the file has {found} bytes, the disk {size_bytes}")))
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.export.path
    }
}

/// Ends the daemon and removes the mount, whichever of them are there, by their names alone.
pub(crate) async fn withdraw(export: &FileExport) -> io::Result<()> {
    let mark = export.mark.clone();
    let found = blocking::run(move || VmProcess::of_daemon_mark(&mark)).await?;
    if let Some(process) = found.map(|process| process.open()).transpose()?.flatten() {
        process.signal(Signal::TERM)?;
        if !process.wait(END_WAIT).await? {
            process.signal(Signal::KILL)?;
            if !process.wait(KILL_WAIT).await? {
                let text = "the killed storage daemon does not end";
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
        }
    }
    // A daemon that was killed leaves its mount.
    let path = export.path.clone();
    blocking::run(move || unmount_all(&path)).await
}

fn unmount_all(path: &Path) -> io::Result<()> {
    for _ in 0..MOUNTS_MAX {
        // Lazily: somebody may have it open, for whom it is dead anyhow.
        match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(Errno::PERM) => return unmount_as_user(path),
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(io::Error::other(format!("'{}' is mounted over and over", path.display())))
}

/// Without rights of its own the program that mounted it must be asked.
fn unmount_as_user(path: &Path) -> io::Result<()> {
    if !is_mounted(path)? {
        return Ok(());
    }
    let mut command = std::process::Command::new("fusermount3");
    command.args(["-u", "-z", "-q"]).arg(path).stdin(Stdio::null()).stdout(Stdio::null());
    let status = command.stderr(Stdio::null()).status()?;
    if status.success() || !is_mounted(path)? {
        return Ok(());
    }
    Err(io::Error::other(format!("fusermount3 ended with {status}")))
}

fn is_mounted(path: &Path) -> io::Result<bool> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    let wanted = path.to_string_lossy();
    Ok(table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .any(|place| unescape(place) == wanted))
}

/// The kernel writes some characters of a path as a backslash and three octal digits.
fn unescape(place: &str) -> String {
    let mut rest = place;
    let mut bytes = Vec::new();
    while let Some(at) = rest.find('\\') {
        let code = rest.get(at + 1..at + 4).and_then(|code| u8::from_str_radix(code, 8).ok());
        let Some(code) = code else { break };
        bytes.extend_from_slice(&rest.as_bytes()[..at]);
        bytes.push(code);
        rest = &rest[at + 4..];
    }
    bytes.extend_from_slice(rest.as_bytes());
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A file of the same name with another ending.
fn beside(path: &Path, ending: &str) -> PathBuf {
    path.with_extension(ending)
}

fn utf8(path: &Path) -> io::Result<&str> {
    path.to_str().ok_or_else(|| io::Error::other(format!("'{}' is not UTF-8", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_their_paths() {
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        for place in table.lines().filter_map(|line| line.split(' ').nth(4)) {
            assert!(is_mounted(Path::new(&unescape(place))).unwrap(), "{place}");
        }
        assert!(!is_mounted(Path::new("/proc/self")).unwrap());
        assert_eq!(unescape("/a\\040b\\134c"), "/a b\\c");
        assert_eq!(unescape("/\u{e9}\\9"), "/\u{e9}\\9");
    }

    #[tokio::test]
    async fn what_is_not_there_is_withdrawn_without_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let mark = format!("mark-{}", uuid::Uuid::new_v4().simple());
        let path = dir.path().join("f");
        withdraw(&FileExport { mark: mark.clone(), path: path.clone() }).await.unwrap();
        std::fs::write(&path, "").unwrap();
        withdraw(&FileExport { mark, path: path.clone() }).await.unwrap();
        assert!(path.exists());
    }
}
