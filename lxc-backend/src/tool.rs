// SPDX-License-Identifier: MIT OR Apache-2.0
//! Programs of the system that end soon: LXC's, and those that mount and make file systems.

use std::ffi::OsStr;
use std::io::{self, Read};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How much of what a program says is read.
const OUTPUT_MAX_BYTES: u64 = 1 << 20;
const POLL: Duration = Duration::from_millis(2);
const POLL_MAX: Duration = Duration::from_millis(50);

/// Runs a program to its end, in this thread and its namespaces, but not longer than the limit. It is
/// killed then, or if this process dies.
///
/// # Errors
/// What it said, as a sentence without its point.
pub(crate) fn run(command: &Command, limit: Duration) -> Result<String, String> {
    let output = output(command, limit)
        .map_err(|error| format!("'{}': {error}", command.get_program().display()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let last = said.lines().last().unwrap_or_default();
    let program = command.get_program().display();
    Err(match last {
        "" => format!("'{program}' failed ({})", output.status),
        text => format!("'{program}': {text}"),
    })
}

/// The same, with what it printed and how it ended.
fn output(command: &Command, limit: Duration) -> io::Result<Output> {
    let mut child = ends_with_us(command)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let listen = |pipe: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            // What cannot be read is not shown; the exit code decides.
            let _ = pipe.map(|pipe| pipe.take(OUTPUT_MAX_BYTES).read_to_end(&mut bytes));
            bytes
        })
    };
    let stdout = listen(child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let stderr = listen(child.stderr.take().map(|pipe| Box::new(pipe) as _));
    let status = wait(&mut child, limit)?;
    // A program that stays behind as a service may keep the pipes open.
    let read = |thread: std::thread::JoinHandle<Vec<u8>>| {
        let deadline = Instant::now() + POLL_MAX;
        while !thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
        if thread.is_finished() { thread.join().unwrap_or_default() } else { Vec::new() }
    };
    Ok(Output { status, stdout: read(stdout), stderr: read(stderr) })
}

/// Waits for a child, and kills it when the limit is over.
fn wait(child: &mut Child, limit: Duration) -> io::Result<std::process::ExitStatus> {
    let deadline = Instant::now() + limit;
    let mut pause = POLL;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            child.kill()?;
            // Not waited for: it may hang in the kernel.
            let text = format!("no answer after {} s", limit.as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(POLL_MAX);
    }
}

/// The same program, to be killed when the thread ends that starts it.
pub(crate) fn ends_with_us(command: &Command) -> Command {
    let mut bound = Command::new("setpriv");
    bound.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
    if let Some(dir) = command.get_current_dir() {
        bound.current_dir(dir);
    }
    bound
}

/// A command with arguments.
pub(crate) fn command<I: IntoIterator<Item = A>, A: AsRef<OsStr>>(
    program: &str,
    args: I,
) -> Command {
    let mut command = Command::new(program);
    command.args(args);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_fails_or_hangs_is_told() {
        let limit = Duration::from_secs(20);
        let failing = command("sh", ["-c", "echo first >&2; echo why >&2; exit 3"]);
        assert_eq!(run(&failing, limit).unwrap_err(), "'sh': why");
        assert_eq!(run(&command("echo", ["a"]), limit).unwrap(), "a");
        let hanging = command("sleep", ["60"]);
        let error = run(&hanging, Duration::from_millis(50)).unwrap_err();
        assert!(error.contains("no answer"), "{error}");
    }
}
