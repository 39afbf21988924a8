// SPDX-License-Identifier: MIT OR Apache-2.0
//! Stops a VM's swtpm for a moment, by a signal, and has it go on whatever becomes of the task that asked for it.
//!
//! A small child process does both, like the freeze guard: it sends SIGCONT when it is asked to, when its standard
//! input closes (the task ended, however), when it gets a signal, and when its deadline passes. Should the guard
//! itself die, the task sends it; should both, the recovery.
//!
//! ```text
//!  task                      guard                         swtpm
//!   │ spawn ───────────────────►│                             │
//!   │◄────────────────── "ready"│                             │
//!   │ "stop" ──────────────────►│ SIGSTOP ───────────────────►│
//!   │◄──────────────── "stopped"│ (every thread stands still) │
//!   │ (copy, point in time)     │                             │
//!   │ "cont" ──────────────────►│ SIGCONT ───────────────────►│
//!   │◄──────────── "continued 8"│                             │
//! ```

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::unix::pipe;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use super::freeze_guard::{Guard, GuardCommand};
use super::process::{ProcessHandle, VmProcess};

/// Tells this guard from the freeze guard, which has the same subcommand.
pub(crate) const WORD: &str = "--swtpm";
/// A process stands still within a moment of the signal, unless the kernel has it wait for a disk.
const STOP_WITHIN: Duration = Duration::from_secs(2);
const STOP_POLL: Duration = Duration::from_millis(1);
/// What the guard may take beside that.
const MARGIN: Duration = Duration::from_secs(10);
/// Begins the guard's lines, so that nothing else on its output is taken for one.
const PREFIX: &str = "tpm-guard: ";

/// What the guard tells the task.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Report {
    Ready,
    Stopped,
    /// It goes on, after so many milliseconds.
    Continued {
        held_ms: u64,
    },
    /// It is not stopped, or not any more.
    Failed {
        why: String,
    },
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ready => write!(f, "{PREFIX}ready"),
            Self::Stopped => write!(f, "{PREFIX}stopped"),
            Self::Continued { held_ms } => write!(f, "{PREFIX}continued {held_ms}"),
            Self::Failed { why } => write!(f, "{PREFIX}failed {why}"),
        }
    }
}

impl Report {
    fn parse(line: &str) -> Option<Self> {
        let text = line.strip_prefix(PREFIX)?;
        Some(match text.split_once(' ').unwrap_or((text, "")) {
            ("ready", "") => Self::Ready,
            ("stopped", "") => Self::Stopped,
            ("continued", held_ms) => Self::Continued { held_ms: held_ms.parse().ok()? },
            ("failed", why) => Self::Failed { why: why.to_owned() },
            _ => return None,
        })
    }
}

/// A guard that is ready to stop a swtpm. Dropping it has the swtpm go on.
#[derive(Debug)]
pub struct TpmGuard {
    process: VmProcess,
    guard: Guard,
}

impl TpmGuard {
    /// Starts the guard of a process; it changes nothing yet.
    ///
    /// # Errors
    /// In words: it does not start.
    pub async fn start(
        command: &GuardCommand,
        process: VmProcess,
        hold: Duration,
    ) -> Result<Self, String> {
        let args = [
            WORD.to_owned(),
            process.pid.to_string(),
            process.start_time_ticks.to_string(),
            hold.as_millis().to_string(),
        ];
        let guard = Guard::spawn(command, args)
            .map_err(|error| format!("cannot start its guard: {error}"))?;
        let mut guard = Self { process, guard };
        match guard.report().await {
            Some(Report::Ready) => Ok(guard),
            Some(Report::Failed { why }) => Err(why),
            _ => Err("its guard did not begin".to_owned()),
        }
    }

    /// Stops the process.
    ///
    /// # Errors
    /// In words: it is not stopped.
    pub async fn stop(&mut self) -> Result<(), String> {
        match self.ask("stop\n").await {
            Some(Report::Stopped) => Ok(()),
            other => {
                // A guard that died may have stopped it before.
                let went_on = go_on(self.process);
                let why = match other {
                    Some(Report::Failed { why }) => why,
                    _ => "its guard ended".to_owned(),
                };
                went_on.map_err(|error| format!("{why}, and it cannot go on: {error}"))?;
                Err(why)
            }
        }
    }

    /// Has the process go on that was stopped; tells for how long it was.
    ///
    /// # Errors
    /// In words: it was not stopped all the time, or may still be stopped.
    pub async fn go_on(&mut self) -> Result<Duration, String> {
        match self.ask("cont\n").await {
            Some(Report::Continued { held_ms }) => Ok(Duration::from_millis(held_ms)),
            other => {
                let why = match other {
                    Some(Report::Failed { why }) => why,
                    _ => "its guard ended".to_owned(),
                };
                go_on(self.process)
                    .map_err(|error| format!("{why}, and it cannot go on: {error}"))?;
                Err(why)
            }
        }
    }

    async fn ask(&mut self, word: &str) -> Option<Report> {
        // A guard that is gone shows below.
        let _ = self.guard.stdin.as_mut()?.write_all(word.as_bytes()).await;
        self.report().await
    }

    /// The next report; `None` if the guard ended or hangs.
    async fn report(&mut self) -> Option<Report> {
        timeout(STOP_WITHIN + MARGIN, self.guard.report(Report::parse)).await.ok().flatten()
    }

    /// Ends the guard.
    pub async fn end(mut self) {
        drop(self.guard.stdin.take());
        let _ = timeout(MARGIN, self.guard.child.wait()).await;
    }
}

/// Has a process go on that may be stopped; one that is gone is no error.
///
/// # Errors
/// The signal is not allowed.
pub(crate) fn go_on(process: VmProcess) -> io::Result<()> {
    match process.open()? {
        Some(handle) => handle.signal(Signal::CONT),
        None => Ok(()),
    }
}

/// Runs the guard: `args` are the process, its start time, and the longest time that it may be stopped in
/// milliseconds.
pub(crate) async fn run(args: &[OsString]) -> ExitCode {
    let number = |at: usize| args.get(at)?.to_str()?.parse::<u64>().ok();
    let parsed = (|| {
        let process =
            VmProcess { pid: i32::try_from(number(0)?).ok()?, start_time_ticks: number(1)? };
        Some((process, Duration::from_millis(number(2)?)))
    })();
    let Some((process, hold)) = parsed.filter(|_| args.len() == 3) else {
        return ExitCode::from(2);
    };
    match serve(process, hold).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&Report::Failed { why: error.to_string() });
            ExitCode::FAILURE
        }
    }
}

async fn serve(process: VmProcess, hold: Duration) -> io::Result<()> {
    let handle = process.open()?.ok_or_else(|| io::Error::other("swtpm has ended"))?;
    // Set up before anything is stopped, so that no signal can end the guard from then on.
    let mut signals = [
        signal(SignalKind::terminate())?,
        signal(SignalKind::hangup())?,
        signal(SignalKind::interrupt())?,
    ];
    let [term, hup, int] = &mut signals;
    let stdin = pipe::Receiver::from_owned_fd(io::stdin().as_fd().try_clone_to_owned()?)?;
    let mut orders = BufReader::new(stdin).lines();
    let mut since: Option<Instant> = None;
    say(&Report::Ready);
    loop {
        let held_too_long = async {
            match since {
                Some(since) => tokio::time::sleep(hold.saturating_sub(since.elapsed())).await,
                // The task may take its time; its end closes the input.
                None => std::future::pending().await,
            }
        };
        let order = tokio::select! {
            line = orders.next_line() => line.ok().flatten(),
            _ = term.recv() => None,
            _ = hup.recv() => None,
            _ = int.recv() => None,
            () = held_too_long => None,
        };
        match (order.as_deref(), since) {
            (Some("stop"), None) => {
                since = Some(Instant::now());
                if let Err(error) = stop(process, &handle).await {
                    handle.signal(Signal::CONT)?;
                    return Err(error);
                }
                say(&Report::Stopped);
            }
            (Some("cont"), Some(begin)) => {
                handle.signal(Signal::CONT)?;
                let held_ms = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
                say(&Report::Continued { held_ms });
                since = None;
            }
            (_, None) => return Ok(()),
            (_, Some(_)) => {
                handle.signal(Signal::CONT)?;
                return Err(io::Error::other("swtpm went on before the point in time"));
            }
        }
    }
}

/// Stops a process and waits until all of its threads stand still.
async fn stop(process: VmProcess, handle: &ProcessHandle) -> io::Result<()> {
    handle.signal(Signal::STOP)?;
    let deadline = Instant::now() + STOP_WITHIN;
    while !stands_still(process.pid)? {
        if handle.has_ended()? {
            return Err(io::Error::other("swtpm has ended"));
        }
        if Instant::now() >= deadline {
            return Err(io::Error::other("swtpm does not stand still"));
        }
        tokio::time::sleep(STOP_POLL).await;
    }
    Ok(())
}

fn stands_still(pid: i32) -> io::Result<bool> {
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = match std::fs::read_to_string(thread?.path().join("stat")) {
            Ok(text) => text,
            // A thread that has ended.
            Err(_) => continue,
        };
        // The name before the state, in parentheses, may contain anything.
        let state = text.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
        if state != Some('T') {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether anybody still reads it does not matter. A line fits into the pipe, so it cannot block.
fn say(report: &Report) {
    let mut stdout = io::stdout();
    let _ = writeln!(stdout, "{report}").and_then(|()| stdout.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_read_back() {
        for report in [
            Report::Ready,
            Report::Stopped,
            Report::Continued { held_ms: 8 },
            Report::Failed { why: "swtpm has ended".to_owned() },
        ] {
            assert_eq!(Report::parse(&report.to_string()), Some(report));
        }
        for bad in ["", "ready", "tpm-guard: readyy", "tpm-guard: continued x"] {
            assert_eq!(Report::parse(bad), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn a_process_is_stopped_and_goes_on() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = VmProcess::of_pid(i32::try_from(child.id()).unwrap()).unwrap().unwrap();
        let handle = process.open().unwrap().unwrap();
        assert!(!stands_still(process.pid).unwrap());
        stop(process, &handle).await.unwrap();
        assert!(stands_still(process.pid).unwrap());
        go_on(process).unwrap();
        let deadline = Instant::now() + MARGIN;
        while stands_still(process.pid).unwrap() {
            assert!(Instant::now() < deadline, "it stays stopped");
            tokio::time::sleep(STOP_POLL).await;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(stop(process, &handle).await.is_err());
        go_on(process).unwrap();
    }
}
