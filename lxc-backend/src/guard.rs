// SPDX-License-Identifier: MIT OR Apache-2.0
//! The freeze guard of containers: a small child process that thaws a container and its file systems when
//! the task that froze them dies, or takes too long.
//!
//! ```text
//!  task                           guard
//!   │ spawn ────────────────────────►│ opens the file systems
//!   │◄──────────────────── "ready"   │ waits
//!   │ freezes the processes          │
//!   │ "freeze" ─────────────────────►│ freezes the file systems
//!   │◄─────────────────── "frozen"   │
//!   │ snapshot, thaw                 │
//!   │ "done" ───────────────────────►│ ends            … or, without it, thaws
//! ```
//!
//! The guard freezes the file systems, because that cannot be called off: the kernel waits for each write that is under way
//! and freezes then, also if whoever asked for it was killed. So the guard waits, too, and thaws what nobody needs any more.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::CtError;
use crate::freezer::Freezer;
use crate::lxc::Lxc;
use crate::tool::{command, ended_within, run};

/// The hidden subcommand that runs [`run_guard`].
pub const SUBCOMMAND: &str = "__ct-thaw-guard";
const READY: &str = "ready";
const FREEZE: &str = "freeze";
const FROZEN: &str = "frozen";
const DONE: &str = "done";
const WORD_BYTES_MAX: usize = 64;
/// What is read of the guard's answers, and of what a program says.
const ANSWER_BYTES: u64 = 8 << 10;
/// For one file system: all that is to be written is written out first.
const FREEZE_LIMIT: Duration = Duration::from_secs(30);
const THAW_LIMIT: Duration = Duration::from_secs(20);

/// Runs a program that these signals, sent to all of a service, do not end: it ends with its task.
const UNDETERRED: &str = "trap '' TERM HUP INT; exec \"$@\"";
/// Of the time for which a container may be frozen, what is left when its processes are.
const HOLD_MARGIN: Duration = Duration::from_secs(5);
/// How often, and how often at most, the guard tries to thaw.
const AGAIN: Duration = Duration::from_secs(1);
const TRIES_MAX: usize = 24 * 3600;

/// What is frozen.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) lxc: Lxc,
    /// Whether the container's processes are, too.
    pub(crate) with_processes: bool,
    /// Mount points of file systems, none of them named by the container.
    pub(crate) file_systems: Vec<PathBuf>,
}

/// The freezer of a container that may be frozen: also for those who do not wait for the thread that thaws it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Owed(Arc<Mutex<Option<Freezer>>>);

impl Owed {
    fn set(&self, freezer: Option<Freezer>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = freezer;
    }

    /// Thaws what was not thawed. May block.
    pub(crate) fn thaw(&self) -> Result<(), CtError> {
        let mut owed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(freezer) = owed.as_ref() {
            freezer.thaw().map_err(CtError::at("thaw the container"))?;
        }
        *owed = None;
        Ok(())
    }
}

/// A frozen container. Dropping it thaws, and should that fail the guard does.
#[derive(Debug)]
pub(crate) struct Frozen {
    target: Target,
    /// Of its processes, if they are frozen, too: found before, because nobody need answer then.
    freezer: Option<Freezer>,
    owed: Owed,
    opened: Vec<File>,
    guard: Child,
    stdin: Option<ChildStdin>,
    answers: BufReader<io::Take<ChildStdout>>,
    /// A file system may still freeze; the guard waits for that.
    is_pending: bool,
    deadline: Instant,
}

impl Frozen {
    /// Freezes the processes, then the file systems. May block.
    pub(crate) fn freeze(
        program: &Path,
        target: Target,
        limit: Duration,
        hold: Duration,
        owed: &Owed,
    ) -> Result<Self, CtError> {
        let opened = open_all(&target.file_systems)?;
        let name = &target.lxc.name;
        let fault = CtError::at(format!("freeze the container {name}"));
        let freezer = if target.with_processes { Some(target.lxc.freezer()?) } else { None };
        let freezer = match freezer {
            Some(None) => return Err(fault("it does not run".to_owned())),
            other => other.flatten(),
        };
        let spawn = |error: io::Error| CtError::at("start the freeze guard")(error);
        let mut guard = Command::new("sh")
            .args(["-c", UNDETERRED, "sh"])
            .arg(program)
            .arg(SUBCOMMAND)
            .arg(hold.as_millis().to_string())
            .args(freezer.as_ref().map_or([OsString::new(), OsString::new()], Freezer::to_args))
            .args(&target.file_systems)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // Out of reach of a Ctrl-C in the task's terminal.
            .process_group(0)
            .spawn()
            .map_err(spawn)?;
        let stdin = guard.stdin.take();
        let stdout = guard.stdout.take().ok_or_else(|| spawn(io::Error::other("no pipe")))?;
        let answers = BufReader::new(stdout.take(ANSWER_BYTES));
        let deadline = Instant::now() + hold;
        let owed = owed.clone();
        let is_pending = false;
        let mut frozen =
            Self { target, freezer, owed, opened, guard, stdin, answers, is_pending, deadline };
        if frozen.answer() != READY {
            return Err(spawn(io::Error::other("it does not answer")));
        }
        if let Some(freezer) = &frozen.freezer {
            frozen.owed.set(Some(freezer.clone()));
            // What the guard thaws must not be frozen again, nor anything when it is gone.
            let limit = limit.min(hold.saturating_sub(HOLD_MARGIN).max(hold / 2));
            let guard = &mut frozen.guard;
            let check = || match guard.try_wait() {
                Ok(None) => Ok(()),
                _ => Err("the freeze guard ended".to_owned()),
            };
            freezer.freeze(limit, check).map_err(fault)?;
        }
        if !frozen.opened.is_empty() {
            frozen.is_pending = true;
            // A guard that is gone does not answer.
            let _ = frozen.stdin.as_mut().map(|stdin| writeln!(stdin, "{FREEZE}"));
            let answer = frozen.answer();
            if answer != FROZEN {
                let why =
                    if answer.is_empty() { "the freeze guard ended".to_owned() } else { answer };
                return Err(CtError::at("freeze the container's file systems")(why));
            }
            frozen.is_pending = false;
        }
        Ok(frozen)
    }

    /// The next word of the guard, which bounds its work; none if it is gone.
    fn answer(&mut self) -> String {
        let mut line = String::new();
        let _ = self.answers.read_line(&mut line);
        line.trim_end().to_owned()
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
        let mut thawed = thaw_all(self.freezer.as_ref(), &self.opened);
        if thawed.is_ok() && !self.is_pending {
            // A guard that is gone has thawed, too.
            let _ = writeln!(stdin, "{DONE}");
        }
        drop(stdin);
        // One that waits for the kernel may do so for long; it needs nobody.
        if !self.is_pending {
            let ended = ended_within(&mut self.guard, THAW_LIMIT, || ());
            if matches!(ended, Ok(Some(status)) if status.success()) {
                thawed = Ok(());
            }
        }
        thawed.map_err(CtError::at(format!("thaw the container {}", self.target.lxc.name)))?;
        if self.freezer.is_some() {
            self.owed.set(None);
            self.target.lxc.tell_thawed();
        }
        Ok(())
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

fn fsfreeze(change: &str, file: &File) -> Command {
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    command("fsfreeze", [change, path.as_str()])
}

/// File systems first: a process that is thawed would wait for them.
fn thaw_all(freezer: Option<&Freezer>, opened: &[File]) -> Result<(), String> {
    for file in opened {
        // One that is not frozen says so, which is right.
        if let Err(why) = run(&fsfreeze("-u", file), THAW_LIMIT) {
            tracing::debug!(why, "not thawed");
        }
    }
    freezer.map_or(Ok(()), Freezer::thaw)
}

/// Runs the guard: the longest time in milliseconds, the kind and the path of the freezer, and the file systems.
#[must_use]
pub fn run_guard(args: &[OsString]) -> ExitCode {
    let parsed = match args {
        [hold, kind, dir, file_systems @ ..] => hold.to_str().and_then(|hold| {
            let hold = Duration::from_millis(hold.parse().ok()?);
            let freezer = Freezer::parse(kind, dir);
            if freezer.is_none() && !kind.is_empty() {
                return None;
            }
            Some((hold, freezer, file_systems.iter().map(PathBuf::from).collect::<Vec<_>>()))
        }),
        _ => None,
    };
    let Some((hold, freezer, file_systems)) = parsed else { return ExitCode::from(2) };
    let Ok(opened) = open_all(&file_systems) else { return ExitCode::FAILURE };
    // A task that is gone has frozen nothing: then the wait ends at once.
    say(READY);
    let deadline = Instant::now() + hold;
    let mut words = Words::default();
    let mut word = words.next(deadline);
    let mut pending = None;
    if word.as_deref() == Some(FREEZE) {
        match freeze_all(&opened, &file_systems) {
            Ok(()) => {
                say(FROZEN);
                word = words.next(deadline);
            }
            Err((why, child)) => {
                say(&why);
                (word, pending) = (None, child);
            }
        }
    }
    if word.as_deref() == Some(DONE) {
        return ExitCode::SUCCESS;
    }
    // What was not frozen is thawed, too: that changes nothing.
    let mut thawed = thaw_all(freezer.as_ref(), &opened);
    if let Some(mut child) = pending {
        let _ = child.wait();
        thawed = thaw_all(None, &opened).and(thawed);
    }
    // Nobody else is there to do it.
    for _ in 0..TRIES_MAX {
        if thawed.is_ok() {
            return ExitCode::SUCCESS;
        }
        std::thread::sleep(AGAIN);
        thawed = thaw_all(freezer.as_ref(), &opened);
    }
    ExitCode::FAILURE
}

/// Freezes all of them. One that does not freeze in time is an error, with what still tries to: a signal does not end it.
fn freeze_all(opened: &[File], paths: &[PathBuf]) -> Result<(), (String, Option<Child>)> {
    for (file, path) in opened.iter().zip(paths) {
        let words = |why: &str| format!("the file system at '{}': {why}", path.display());
        let mut freeze = fsfreeze("-f", file);
        freeze.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = freeze.spawn().map_err(|error| (words(&error.to_string()), None))?;
        let status = match ended_within(&mut child, FREEZE_LIMIT, || ()) {
            Ok(Some(status)) => status,
            Ok(None) => {
                let why = words(&format!("not frozen in {} s", FREEZE_LIMIT.as_secs()));
                return Err((why, Some(child)));
            }
            Err(error) => return Err((words(&error.to_string()), Some(child))),
        };
        if !status.success() {
            let mut said = String::new();
            let _ =
                child.stderr.take().map(|pipe| pipe.take(ANSWER_BYTES).read_to_string(&mut said));
            return Err((words(said.lines().last().unwrap_or("fsfreeze failed")), None));
        }
    }
    Ok(())
}

fn say(word: &str) {
    // A task that is gone needs no answer.
    let _ = writeln!(io::stdout(), "{word}").and_then(|()| io::stdout().flush());
}

/// What the task says, word by word.
#[derive(Default)]
struct Words(Vec<u8>);

impl Words {
    /// None when the task has ended, or the time is over.
    fn next(&mut self, deadline: Instant) -> Option<String> {
        let stdin = io::stdin();
        loop {
            if let Some(end) = self.0.iter().position(|byte| *byte == b'\n') {
                let word: Vec<u8> = self.0.drain(..=end).collect();
                return Some(String::from_utf8_lossy(&word).trim_end().to_owned());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let mut fds = [PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Err(rustix::io::Errno::INTR) => continue,
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
            let mut bytes = [0; 16];
            match rustix::io::read(stdin.as_fd(), &mut bytes) {
                Ok(count) if count > 0 && self.0.len() < WORD_BYTES_MAX => {
                    self.0.extend(&bytes[..count]);
                }
                _ => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use rustix::process::{Pid, Signal, kill_process};

    use super::*;

    /// So the journal is kept, from which it is thawed later.
    #[test]
    fn a_thaw_is_owed_until_it_succeeds() {
        let dir = tempfile::tempdir().unwrap();
        let freezer = Freezer::parse("unified".as_ref(), dir.path().as_os_str());
        let owed = Owed::default();
        owed.thaw().unwrap();
        owed.set(freezer);
        let file = dir.path().join("cgroup.freeze");
        std::fs::create_dir(&file).unwrap();
        for _ in 0..2 {
            owed.thaw().unwrap_err();
        }
        std::fs::remove_dir(&file).unwrap();
        std::fs::write(&file, "1").unwrap();
        owed.thaw().unwrap();
        assert_eq!(std::fs::read_to_string(file).unwrap(), "0");
    }

    /// As `systemctl stop` sends them to the task and the guard.
    #[test]
    fn signals_to_all_of_a_service_do_not_end_the_guard() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("guard");
        std::fs::write(&program, "#!/bin/sh\necho ready\nread word\n[ \"$word\" = done ]\n")
            .unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let lxc = Lxc::new(dir.path(), 200);
        let target = Target { lxc, with_processes: false, file_systems: Vec::new() };
        let limit = Duration::from_secs(60);
        let frozen = Frozen::freeze(&program, target, limit, limit, &Owed::default()).unwrap();
        let pid = Pid::from_child(&frozen.guard);
        for signal in [Signal::TERM, Signal::HUP, Signal::INT] {
            kill_process(pid, signal).unwrap();
        }
        std::thread::sleep(Duration::from_millis(200));
        frozen.thaw().unwrap();
    }
}
