// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs programs as named steps: output into a log, progress on the terminal, a time limit, and a
//! failure that says which step and which log.

use std::collections::{HashMap, VecDeque};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

/// Lines of the log that a failure shows.
const TAIL_LINES: usize = 40;
/// Lines between the reader and the terminal.
const QUEUE_LINES: usize = 1024;
/// Silence after which a step is asked whether it still runs.
const QUIET: Duration = Duration::from_secs(2);

/// What becomes of a step's output, beside the log.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Show {
    /// Only ninja's `[done/total]`, now and then.
    Progress,
    /// Every line.
    All,
}

/// One program run as a step.
pub(crate) struct Step<'a> {
    pub(crate) name: &'a str,
    pub(crate) log: PathBuf,
    pub(crate) show: Show,
    pub(crate) limit: Duration,
}

/// How a step ended.
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) timed_out: bool,
    tail: VecDeque<String>,
}

impl Ended {
    pub(crate) fn ok(&self) -> bool {
        self.status.success() && !self.timed_out
    }
}

impl Step<'_> {
    /// Runs `command`; failure is an error with the end of the log.
    pub(crate) fn run(&self, command: Command) -> Result<()> {
        let start = Instant::now();
        eprintln!("==> {}", self.name);
        let ended = self.watch(command, |_| ())?;
        if ended.ok() {
            eprintln!("    done in {:.1} s", start.elapsed().as_secs_f64());
            return Ok(());
        }
        if self.show != Show::All {
            eprintln!("---- end of {}", self.log.display());
            for line in &ended.tail {
                eprintln!("{line}");
            }
            eprintln!("----");
        }
        let how = if ended.timed_out {
            format!("took longer than {} s", self.limit.as_secs())
        } else {
            format!("failed ({})", ended.status)
        };
        bail!("step \"{}\" {how}; full log: {}", self.name, self.log.display());
    }

    /// Runs `command`, giving `each` every line of its output.
    pub(crate) fn watch(&self, mut command: Command, mut each: impl FnMut(&str)) -> Result<Ended> {
        if let Some(dir) = self.log.parent() {
            fs::create_dir_all(dir).with_context(|| format!("{}: cannot create", dir.display()))?;
        }
        let mut log = File::create(&self.log)
            .with_context(|| format!("{}: cannot create", self.log.display()))?;
        writeln!(log, "{command:?}").with_context(|| log_error(&self.log))?;
        let (reader, writer) = std::io::pipe().context("no pipe")?;
        command
            .stdin(Stdio::null())
            .stdout(writer.try_clone().context("no second pipe end")?)
            .stderr(writer);
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child = command.spawn().with_context(|| format!("{program}: cannot start"))?;
        // The pipe's write ends live in `command`: the reader sees the end only without them.
        drop(command);

        let (sender, lines) = mpsc::sync_channel::<String>(QUEUE_LINES);
        let pump = thread::spawn(move || {
            let mut reader = BufReader::new(reader);
            let mut bytes = Vec::new();
            while reader.read_until(b'\n', &mut bytes).is_ok_and(|n| n > 0) {
                let line = String::from_utf8_lossy(&bytes).trim_end_matches('\n').to_string();
                bytes.clear();
                if sender.send(line).is_err() {
                    break;
                }
            }
        });

        let deadline = Instant::now() + self.limit;
        let mut view = Progress::new(self.show);
        let mut tail = VecDeque::with_capacity(TAIL_LINES);
        let (mut timed_out, mut left_behind) = (false, false);
        loop {
            let wait = deadline.saturating_duration_since(Instant::now()).min(QUIET);
            match lines.recv_timeout(wait) {
                Ok(line) => {
                    writeln!(log, "{line}").with_context(|| log_error(&self.log))?;
                    view.line(&line);
                    each(&line);
                    if tail.len() == TAIL_LINES {
                        tail.pop_front();
                    }
                    tail.push_back(line);
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) if Instant::now() >= deadline => {
                    timed_out = true;
                    kill_tree(&child);
                    break;
                }
                // Something it left behind may keep the pipe open: the program's end counts.
                Err(RecvTimeoutError::Timeout) => {
                    if child.try_wait().context("cannot wait for a child")?.is_some() {
                        left_behind = true;
                        break;
                    }
                }
            }
        }
        drop(lines);
        let status = wait_bounded(&mut child, deadline, &mut timed_out)?;
        if !timed_out && !left_behind {
            // Only a finished program's pipe is sure to have an end.
            let _ = pump.join();
        }
        Ok(Ended { status, timed_out, tail })
    }
}

fn log_error(log: &Path) -> String {
    format!("{}: cannot write", log.display())
}

/// Waits for a child whose output has ended, until the step's deadline.
fn wait_bounded(child: &mut Child, deadline: Instant, timed_out: &mut bool) -> Result<ExitStatus> {
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for a child")? {
            return Ok(status);
        }
        if Instant::now() >= deadline && !*timed_out {
            *timed_out = true;
            kill_tree(child);
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Kills a child and everything it started, as far as /proc still shows the relation. Children stay
/// in our process group so that Ctrl-C reaches them; a group of their own would make this easier.
fn kill_tree(child: &Child) {
    let Ok(root) = i32::try_from(child.id()) else { return };
    let mut doomed = vec![root];
    let parents = parents();
    let mut next = 0;
    while let Some(&pid) = doomed.get(next) {
        doomed.extend(parents.iter().filter(|(_, parent)| **parent == pid).map(|(pid, _)| *pid));
        next += 1;
    }
    for pid in doomed.into_iter().filter_map(Pid::from_raw) {
        // It may be gone already.
        let _ = kill_process(pid, Signal::KILL);
    }
}

/// Parent of every process.
fn parents() -> HashMap<i32, i32> {
    let Ok(entries) = fs::read_dir("/proc") else { return HashMap::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            Some((pid, parent_of(&stat)?))
        })
        .collect()
}

/// The parent in a line of /proc/PID/stat; the program's name in it may contain anything.
fn parent_of(stat: &str) -> Option<i32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// The terminal's side of a step.
struct Progress {
    show: Show,
    every: Duration,
    last: Instant,
}

impl Progress {
    fn new(show: Show) -> Self {
        // A person wants to see life, a log of a gate wants to stay short.
        let seconds = if std::io::stderr().is_terminal() { 3 } else { 15 };
        Self { show, every: Duration::from_secs(seconds), last: Instant::now() }
    }

    fn line(&mut self, line: &str) {
        match self.show {
            Show::All => eprintln!("{line}"),
            Show::Progress => {
                if self.last.elapsed() >= self.every
                    && let Some((done, total)) = ninja_progress(line)
                {
                    eprintln!("    {done} of {total}");
                    self.last = Instant::now();
                }
            }
        }
    }
}

/// `[done/total]` at the start of a line of ninja.
fn ninja_progress(line: &str) -> Option<(u32, u32)> {
    let (done, total) = line.strip_prefix('[')?.split_once(']')?.0.split_once('/')?;
    Some((done.parse().ok()?, total.parse().ok()?))
}

/// Runs a short program and returns what it prints; failure is an error with its complaint.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{program}: cannot start"))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        bail!("{program} failed ({}): {}", output.status, complaint.trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("{program} printed no text"))
}

/// Whether PATH has a program of this name.
pub(crate) fn in_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(dir: &tempfile::TempDir, limit: Duration) -> Step<'static> {
        Step { name: "a step", log: dir.path().join("log"), show: Show::Progress, limit }
    }

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_failure_names_step_and_log() {
        let dir = tempfile::tempdir().unwrap();
        let error = step(&dir, Duration::from_secs(60)).run(sh("echo why; exit 3")).unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains("a step") && text.contains(&dir.path().display().to_string()),
            "{text}"
        );
        assert!(fs::read_to_string(dir.path().join("log")).unwrap().contains("\nwhy\n"));
    }

    #[test]
    fn both_streams_arrive_as_lines() {
        let dir = tempfile::tempdir().unwrap();
        let mut seen = Vec::new();
        let ended = step(&dir, Duration::from_secs(60))
            .watch(sh("echo one; echo two >&2; printf three"), |line| seen.push(line.to_string()))
            .unwrap();
        assert!(ended.ok());
        assert_eq!(seen, ["one", "two", "three"]);
    }

    #[test]
    fn a_step_over_its_limit_is_killed_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let start = Instant::now();
        let mut pid = 0;
        let ended = step(&dir, Duration::from_millis(500))
            .watch(sh("sleep 600 & echo $!; wait"), |line| pid = line.parse().unwrap())
            .unwrap();
        assert!(ended.timed_out && !ended.ok());
        assert!(start.elapsed() < Duration::from_secs(30));
        let gone = || {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.is_empty() || stat.contains(") Z ") || stat.contains(") X ")
        };
        while !gone() {
            assert!(start.elapsed() < Duration::from_secs(30), "child {pid} lives on");
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_program_that_leaves_the_pipe_open_does_not_hold_the_step() {
        let dir = tempfile::tempdir().unwrap();
        let start = Instant::now();
        let mut pid = String::new();
        let ended = step(&dir, Duration::from_secs(60))
            .watch(sh("sleep 100 & echo $!"), |line| pid = line.to_string())
            .unwrap();
        assert!(ended.ok() && start.elapsed() < Duration::from_secs(30));
        output(Command::new("kill").arg(pid)).unwrap();
    }

    #[test]
    fn reads_progress_and_parents() {
        assert_eq!(ninja_progress("[636/1408] Compiling C object"), Some((636, 1408)));
        assert_eq!(ninja_progress("[x] Compiling"), None);
        assert_eq!(parent_of("12 (a) b) c) S 7 12 12 0"), Some(7));
    }
}
