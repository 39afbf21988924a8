// SPDX-License-Identifier: MIT OR Apache-2.0
//! The storage daemon of one machine, with a private directory.
//!
//! It dies with this process: it is started through `setpriv --pdeathsig`, whose signal belongs to the
//! *thread* that starts a process; so a thread of its own starts it, waits for it and removes the
//! directory. After `kill -9` the directory stays, with sockets and a log but no disk, because files of
//! disks are unlinked once they are open; the next check removes it ([`remove_left`]).

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use qmp_client::{Options, Session};
use tempfile::TempDir;
use vzdump_core::vm::process::VmProcess;

use crate::clean;

/// Until it answers; it takes milliseconds unless the host is very busy.
const START_LIMIT: Duration = Duration::from_secs(30);
const START_POLL: Duration = Duration::from_millis(10);
/// How often the thread looks whether the daemon has ended.
const LOOK: Duration = Duration::from_millis(200);
/// A killed process is gone at once unless it hangs in the kernel.
const END_LIMIT: Duration = Duration::from_secs(10);
const END_POLL: Duration = Duration::from_millis(2);
/// How much of the daemon's words is shown.
const SAID_BYTES_MAX: u64 = 2048;
/// Names of directories begin so; process and time of its start follow.
const PREFIX: &str = "vzdump-real-";
const LOG: &str = "log";

/// A running daemon; dropping it ends it and removes its directory.
#[derive(Debug)]
pub(super) struct Daemon {
    dir: PathBuf,
    session: Session,
    _thread: Guard,
}

/// Ends the thread, and by that the daemon.
#[derive(Debug)]
struct Guard {
    stop: Option<Sender<()>>,
    thread: JoinHandle<()>,
    ended: Arc<OnceLock<String>>,
}

impl Daemon {
    /// Starts a daemon that has nothing but a monitor.
    pub(super) async fn start(program: &Path) -> Result<Self, String> {
        let temp = make_dir().map_err(|error| format!("no directory for a QEMU: {error}"))?;
        let dir = temp.path().to_owned();
        let command = command(program, &dir).map_err(|error| error.to_string())?;
        let ended = Arc::new(OnceLock::new());
        let (stop, stopped) = channel();
        let says = Arc::clone(&ended);
        let thread = std::thread::Builder::new()
            .name("storage-daemon".to_owned())
            .spawn(move || run(command, &temp, &stopped, &says))
            .map_err(|error| format!("no thread for a QEMU: {error}"))?;
        // From here on a drop of this future ends the daemon again.
        let guard = Guard { stop: Some(stop), thread, ended };
        let session = connect(&dir.join("qmp"), &guard.ended).await?;
        Ok(Self { dir, session, _thread: guard })
    }

    pub(super) fn session(&self) -> &Session {
        &self.session
    }

    /// A file in its directory.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.stop = None;
        let deadline = Instant::now() + END_LIMIT;
        while !self.thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(END_POLL);
        }
    }
}

/// The process, ended when this is dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if it is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run(mut command: Command, dir: &TempDir, stopped: &Receiver<()>, ended: &OnceLock<String>) {
    let mut process = match command.spawn() {
        Ok(child) => Process(child),
        Err(error) => {
            let _ = ended.set(format!("'setpriv' cannot be run: {error}"));
            return;
        }
    };
    loop {
        match stopped.recv_timeout(LOOK) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
        }
        let status = match process.0.try_wait() {
            Ok(None) => continue,
            Ok(Some(status)) => status.to_string(),
            Err(error) => error.to_string(),
        };
        let said = said(&dir.path().join(LOG)).unwrap_or_default();
        // Set once: nobody else sets it.
        let _ = ended.set(format!("it ended ({status}): {said}"));
        return;
    }
}

fn command(program: &Path, dir: &Path) -> io::Result<Command> {
    let log = File::create_new(dir.join(LOG))?;
    // A comma ends a value unless it is doubled.
    let socket = dir.join("qmp").display().to_string().replace(',', ",,");
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command.arg("--chardev").arg(format!("socket,id=qmp,path={socket},server=on,wait=off"));
    command.args(["--monitor", "chardev=qmp"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    // Keys pressed at the terminal are for this program: it ends the daemon itself.
    command.process_group(0);
    Ok(command)
}

async fn connect(socket: &Path, ended: &OnceLock<String>) -> Result<Session, String> {
    let deadline = Instant::now() + START_LIMIT;
    loop {
        let error = match Session::connect(socket, Options::default()).await {
            Ok(session) => return Ok(session),
            Err(error) => error,
        };
        if let Some(why) = ended.get() {
            return Err(why.clone());
        }
        if Instant::now() >= deadline {
            return Err(format!("it does not answer: {error}"));
        }
        tokio::time::sleep(START_POLL).await;
    }
}

/// The end of what the daemon said, for people.
fn said(log: &Path) -> io::Result<String> {
    let mut file = File::open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(SAID_BYTES_MAX)))?;
    let mut bytes = Vec::new();
    file.take(SAID_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(clean(String::from_utf8_lossy(&bytes).trim()))
}

/// Short, because the path of a socket is limited to 107 bytes.
fn make_dir() -> io::Result<TempDir> {
    let pid = i32::try_from(std::process::id()).map_err(io::Error::other)?;
    let this = VmProcess::of_pid(pid)?.ok_or_else(|| io::Error::other("no /proc"))?;
    let prefix = format!("{PREFIX}{pid}-{}-", this.start_time_ticks);
    tempfile::Builder::new().prefix(&prefix).tempdir()
}

/// Removes directories of our user whose process does not live any more.
pub(super) fn remove_left() -> io::Result<()> {
    remove_left_in(&std::env::temp_dir())
}

fn remove_left_in(parent: &Path) -> io::Result<()> {
    let us = rustix::process::geteuid().as_raw();
    for entry in std::fs::read_dir(parent)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(owner) = name.to_str().and_then(owner_of) else { continue };
        // Another check may have removed it a moment ago. Never through a link.
        let Ok(meta) = entry.metadata() else { continue };
        if !meta.is_dir() || meta.uid() != us || VmProcess::of_pid(owner.pid)? == Some(owner) {
            continue;
        }
        // A daemon that was killed leaves the mounts of its files.
        for file in std::fs::read_dir(entry.path()).into_iter().flatten().flatten() {
            super::files::unmount_file(&file.path());
        }
        match std::fs::remove_dir_all(entry.path()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// The process that made a directory of this name; none for another's directory.
fn owner_of(name: &str) -> Option<VmProcess> {
    let mut parts = name.strip_prefix(PREFIX)?.split('-');
    let pid = parts.next()?.parse().ok()?;
    let start_time_ticks = parts.next()?.parse().ok()?;
    parts.next()?;
    Some(VmProcess { pid, start_time_ticks })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_directories_of_dead_processes_are_removed() {
        let parent = tempfile::tempdir().unwrap();
        let own = make_dir().unwrap();
        let own = own.path().file_name().unwrap().to_str().unwrap();
        let pid = std::process::id();
        let dead = format!("{PREFIX}{pid}-1-abc");
        let names = [own, dead.as_str(), "vzdump-real-x", "vzdump-real-1", "other"];
        for name in names {
            std::fs::create_dir(parent.path().join(name)).unwrap();
            std::fs::write(parent.path().join(name).join("qmp"), "").unwrap();
        }
        remove_left_in(parent.path()).unwrap();
        for name in names {
            assert_eq!(parent.path().join(name).exists(), name != dead, "{name}");
        }
    }

    #[tokio::test]
    async fn a_program_that_ends_is_told_with_its_words() {
        let error = Daemon::start(Path::new("/bin/false")).await.unwrap_err();
        assert!(error.starts_with("it ended (exit status: 1)"), "{error}");
        let error = Daemon::start(Path::new("/nowhere/daemon")).await.unwrap_err();
        assert!(error.contains("/nowhere/daemon"), "{error}");
    }
}
