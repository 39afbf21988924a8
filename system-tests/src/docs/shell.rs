// SPDX-License-Identifier: MIT OR Apache-2.0
//! One shell for all commands of a document, so that folders and variables last.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};

/// How long one command may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);
/// Printed after each command, with its exit status.
const MARK: &str = "--8<-- end of output, status";
/// Lines between the reader and whoever waits for them.
const QUEUE_LINES: usize = 1024;

/// A shell; it and what it runs in the foreground are killed when it is dropped.
#[derive(Debug)]
pub(super) struct Shell {
    child: Child,
    lines: Receiver<String>,
}

/// What a command printed, and how it ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Output {
    pub(super) text: String,
    pub(super) status: i32,
}

impl Shell {
    /// Starts it in a folder.
    pub(super) fn start(folder: &Path) -> Result<Self> {
        let mut child = Command::new("bash")
            .args(["--norc", "--noprofile"])
            .current_dir(folder)
            .env("LC_ALL", "C.UTF-8")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .context("bash cannot be started")?;
        let output = child.stdout.take().context("bash has no output")?;
        let (sender, lines) = sync_channel(QUEUE_LINES);
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, lines })
    }

    /// Runs a command in it.
    pub(super) fn run(&mut self, command: &str) -> Result<Output> {
        let stdin = self.child.stdin.as_mut().context("bash has no input")?;
        // Without input of their own commands would read what the shell is to run next.
        writeln!(stdin, "{{ {command}\n}} </dev/null 2>&1; printf '\\n{MARK} %d\\n' $?")
            .context("bash has ended")?;
        let deadline = Instant::now() + LIMIT;
        let mut lines: Vec<String> = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = match self.lines.recv_timeout(left) {
                Ok(line) => line,
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the shell ended with it: {}", lines.join("\n"))
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!("it did not end within {} s: {}", LIMIT.as_secs(), lines.join("\n"))
                }
            };
            let Some(status) = line.strip_prefix(MARK) else {
                lines.push(line);
                continue;
            };
            // The line end in front of the mark.
            if lines.last().is_some_and(String::is_empty) {
                lines.pop();
            }
            let status = status.trim().parse().context("an odd exit status")?;
            return Ok(Output { text: lines.join("\n"), status });
        }
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        // All of this fails only when it has ended already.
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_and_variables_last_and_errors_are_output() {
        let mut shell = Shell::start(Path::new("/")).unwrap();
        let mut run = |command: &str| {
            let Output { text, status } = shell.run(command).unwrap();
            (text, status)
        };
        assert_eq!(run("cd /usr && x='a b'"), (String::new(), 0));
        assert_eq!(run("pwd; echo \"$x\""), ("/usr\na b".to_owned(), 0));
        assert_eq!(run("printf 'no line end'"), ("no line end".to_owned(), 0));
        assert_eq!(run("for n in 1 2; do\n  echo $n\ndone"), ("1\n2".to_owned(), 0));
        assert_eq!(run("cat; false"), (String::new(), 1));
        let (text, status) = run("ls /nonexistent");
        assert!(text.contains("/nonexistent") && status != 0, "{text}");
        assert!(shell.run("exit 3").is_err());
    }
}
