// SPDX-License-Identifier: MIT OR Apache-2.0
//! The freeze guard of containers: a small child process that thaws a container and its file systems when
//! the task that froze them dies, or takes too long.
//!
//! ```text
//!  task                           guard
//!   │ spawn ────────────────────────►│ opens the file systems
//!   │◄──────────────────── "ready"   │ waits
//!   │ freeze, snapshot, thaw         │
//!   │ "done" ───────────────────────►│ ends            … or, without it, thaws
//! ```

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::CtError;
use crate::lxc::Lxc;
use crate::tool::{command, run};

/// The hidden subcommand that runs [`run_guard`].
pub const SUBCOMMAND: &str = "__ct-thaw-guard";
const READY: &str = "ready";
const DONE: &[u8] = b"done\n";
/// For one file system: all that is to be written is written out first.
const FREEZE_LIMIT: Duration = Duration::from_secs(30);
const THAW_LIMIT: Duration = Duration::from_secs(20);

/// What is frozen.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) lxc: Lxc,
    /// Whether the container's processes are, too.
    pub(crate) with_processes: bool,
    /// Mount points of file systems, none of them named by the container.
    pub(crate) file_systems: Vec<PathBuf>,
}

/// A frozen container. Dropping it thaws, and should that fail the guard does.
#[derive(Debug)]
pub(crate) struct Frozen {
    target: Target,
    opened: Vec<File>,
    guard: Child,
    stdin: Option<ChildStdin>,
    deadline: Instant,
}

impl Frozen {
    /// Freezes the processes, then the file systems. May block.
    pub(crate) fn freeze(
        program: &Path,
        target: Target,
        limit: Duration,
        hold: Duration,
    ) -> Result<Self, CtError> {
        let opened = open_all(&target.file_systems)?;
        let spawn = |error: io::Error| CtError::at("start the freeze guard")(error);
        let mut guard = Command::new(program)
            .arg(SUBCOMMAND)
            .arg(hold.as_millis().to_string())
            .arg(&target.lxc.path)
            .arg(&target.lxc.name)
            .args(&target.file_systems)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // Out of reach of a Ctrl-C in the task's terminal.
            .process_group(0)
            .spawn()
            .map_err(spawn)?;
        let stdin = guard.stdin.take();
        let mut line = String::new();
        let stdout = guard.stdout.take().map(|stdout| stdout.take(64));
        let read = stdout.map(|stdout| BufReader::new(stdout).read_line(&mut line));
        let deadline = Instant::now() + hold;
        let frozen = Self { target, opened, guard, stdin, deadline };
        if !matches!(read, Some(Ok(_))) || line.trim() != READY {
            return Err(spawn(io::Error::other("it does not answer")));
        }
        if frozen.target.with_processes {
            frozen.target.lxc.freeze(limit)?;
        }
        for (file, path) in frozen.opened.iter().zip(&frozen.target.file_systems) {
            fsfreeze("-f", file, FREEZE_LIMIT)
                .map_err(CtError::at(format!("freeze the file system at '{}'", path.display())))?;
        }
        Ok(frozen)
    }

    /// Thaws; an error if it was thawed before, because then there is no one point in time.
    pub(crate) fn thaw(mut self) -> Result<(), CtError> {
        let in_time = Instant::now() < self.deadline && matches!(self.guard.try_wait(), Ok(None));
        self.thaw_now()?;
        if in_time {
            return Ok(());
        }
        Err(CtError::Invalid(
            "The container was thawed before its point in time was complete: it took too long."
                .into(),
        ))
    }

    fn thaw_now(&mut self) -> Result<(), CtError> {
        let Some(mut stdin) = self.stdin.take() else { return Ok(()) };
        let thawed = thaw_all(&self.target.lxc, self.target.with_processes, &self.opened);
        if thawed.is_ok() {
            // A guard that is gone has thawed, too.
            let _ = stdin.write_all(DONE);
        }
        drop(stdin);
        let _ = self.guard.wait();
        thawed
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Err(error) = self.thaw_now() {
            tracing::error!("a container may still be frozen: {}", error.words());
        }
    }
}

fn open_all(paths: &[PathBuf]) -> Result<Vec<File>, CtError> {
    let open = |path: &PathBuf| {
        File::open(path).map_err(CtError::at(format!("open '{}' of the container", path.display())))
    };
    paths.iter().map(open).collect()
}

fn fsfreeze(change: &str, file: &File, limit: Duration) -> Result<(), String> {
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    run(&command("fsfreeze", [change, path.as_str()]), limit).map(drop)
}

/// File systems first: a process that is thawed would wait for them.
fn thaw_all(lxc: &Lxc, with_processes: bool, opened: &[File]) -> Result<(), CtError> {
    for file in opened {
        // One that is not frozen says so, which is right.
        if let Err(why) = fsfreeze("-u", file, THAW_LIMIT) {
            tracing::debug!(why, "not thawed");
        }
    }
    if with_processes { lxc.thaw() } else { Ok(()) }
}

/// Runs the guard: the longest time in milliseconds, LXC's path, the container's name and the file systems.
#[must_use]
pub fn run_guard(args: &[OsString]) -> ExitCode {
    let parsed = match args {
        [hold, path, name, file_systems @ ..] => hold.to_str().and_then(|hold| {
            let hold = Duration::from_millis(hold.parse().ok()?);
            let lxc = Lxc { path: path.into(), name: name.to_str()?.to_owned() };
            Some((hold, lxc, file_systems.iter().map(PathBuf::from).collect::<Vec<_>>()))
        }),
        _ => None,
    };
    let Some((hold, lxc, file_systems)) = parsed else { return ExitCode::from(2) };
    let Ok(opened) = open_all(&file_systems) else { return ExitCode::FAILURE };
    // A task that is gone has frozen nothing: then the wait ends at once.
    let _ = writeln!(io::stdout(), "{READY}").and_then(|()| io::stdout().flush());
    if is_done(hold) {
        return ExitCode::SUCCESS;
    }
    // What was not frozen is thawed, too: that changes nothing.
    match thaw_all(&lxc, true, &opened) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Waits for the task's word; false when the task has ended without it, or the time is over.
fn is_done(hold: Duration) -> bool {
    let deadline = Instant::now() + hold;
    let stdin = io::stdin();
    let mut said: Vec<u8> = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        let mut fds = [PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => continue,
            Ok(0) | Err(_) => return false,
            Ok(_) => {}
        }
        let mut bytes = [0; 16];
        match rustix::io::read(stdin.as_fd(), &mut bytes) {
            Ok(0) | Err(_) => return said == DONE,
            Ok(count) => said.extend(&bytes[..count]),
        }
        if said == DONE || said.len() > DONE.len() {
            return said == DONE;
        }
    }
}
