// SPDX-License-Identifier: MIT OR Apache-2.0
//! Programs of the system that end soon: LXC's, and those that mount and make file systems.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

/// How much of what a program says is kept.
const OUTPUT_MAX_BYTES: usize = 1 << 20;

/// The pauses between looks at what is most often done at once, each longer than the one before up to a limit.
pub(crate) struct Pauses(Duration);

impl Pauses {
    const MAX: Duration = Duration::from_millis(50);

    pub(crate) const fn new() -> Self {
        Self(Duration::from_millis(2))
    }

    pub(crate) fn next_pause(&mut self) -> Duration {
        let pause = self.0;
        self.0 = (pause * 2).min(Self::MAX);
        pause
    }
}

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
    let program = command.get_program().display();
    Err(match last_message(&said).as_str() {
        "" => format!("'{program}' failed ({})", output.status),
        text => format!("'{program}': {text}"),
    })
}

/// The last line, with the one before it that it goes on from if it is indented.
fn last_message(said: &str) -> String {
    let lines: Vec<&str> = said.lines().collect();
    let is_begin = |line: &&str| !line.starts_with(char::is_whitespace);
    let from = lines.iter().rposition(is_begin).unwrap_or(0);
    lines[from..].iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ")
}

/// The same, with what it printed and how it ended.
fn output(command: &Command, limit: Duration) -> io::Result<Output> {
    let mut child = ends_with_us(command)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut said = [Said::of(child.stdout.take())?, Said::of(child.stderr.take())?];
    let status = wait(&mut child, &mut said, limit)?;
    // All that it wrote is in the pipes. A service that it left behind may keep them open, which is not waited for.
    for pipe in &mut said {
        pipe.read_on();
    }
    let [stdout, stderr] = said.map(|pipe| pipe.bytes);
    Ok(Output { status, stdout, stderr })
}

/// Waits for a child, and kills it when the limit is over.
fn wait(child: &mut Child, said: &mut [Said], limit: Duration) -> io::Result<ExitStatus> {
    // Else one that says much waits for us.
    let read_on = || said.iter_mut().for_each(Said::read_on);
    if let Some(status) = ended_within(child, limit, read_on)? {
        return Ok(status);
    }
    child.kill()?;
    // Not waited for: it may hang in the kernel.
    let text = format!("no answer after {} s", limit.as_secs());
    Err(io::Error::new(io::ErrorKind::TimedOut, text))
}

/// Waits for a child, and does something now and then; none if it lives on when the limit is over.
pub(crate) fn ended_within(
    child: &mut Child,
    limit: Duration,
    mut meanwhile: impl FnMut(),
) -> io::Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    let mut pauses = Pauses::new();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        meanwhile();
        if Instant::now() >= deadline {
            return Ok(None);
        }
        std::thread::sleep(pauses.next_pause());
    }
}

/// What comes through a pipe, up to a limit; the rest is read and forgotten.
struct Said {
    pipe: File,
    bytes: Vec<u8>,
}

impl Said {
    fn of(pipe: Option<impl Into<OwnedFd>>) -> io::Result<Self> {
        let pipe = File::from(pipe.ok_or_else(|| io::Error::other("no pipe"))?.into());
        rustix::fs::fcntl_setfl(&pipe, OFlags::NONBLOCK)?;
        Ok(Self { pipe, bytes: Vec::new() })
    }

    /// Takes what is there, but not for ever from one that does not stop.
    fn read_on(&mut self) {
        let mut chunk = [0; 1 << 13];
        for _ in 0..OUTPUT_MAX_BYTES / chunk.len() {
            match self.pipe.read(&mut chunk) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // What cannot be read is not shown; the exit code decides.
                Ok(0) | Err(_) => return,
                Ok(count) => {
                    let room = OUTPUT_MAX_BYTES - self.bytes.len();
                    self.bytes.extend_from_slice(&chunk[..count.min(room)]);
                }
            }
        }
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
        let words = "echo first; echo 'no room for'; printf '\\tit, make\\n  more'";
        let indented = command("sh", ["-c", &format!("({words}) >&2; exit 1")]);
        assert_eq!(run(&indented, limit).unwrap_err(), "'sh': no room for it, make more");
        assert_eq!(run(&command("echo", ["a"]), limit).unwrap(), "a");
        let hanging = command("sleep", ["60"]);
        let error = run(&hanging, Duration::from_millis(50)).unwrap_err();
        assert!(error.contains("no answer"), "{error}");
    }

    #[test]
    fn all_that_a_program_said_is_read_but_not_what_its_services_say_later() {
        let limit = Duration::from_secs(20);
        let many = command("sh", ["-c", "head -c 3000000 /dev/zero | tr '\\0' x; echo y >&2"]);
        let said = output(&many, limit).unwrap();
        assert_eq!((said.stdout.len(), said.stderr.as_slice()), (OUTPUT_MAX_BYTES, &b"y\n"[..]));
        let serving = command("sh", ["-c", "echo first; (sleep 30; echo later) &"]);
        let started = Instant::now();
        assert_eq!(run(&serving, limit).unwrap(), "first");
        assert!(started.elapsed() < limit);
        // Nothing that was said may be missing, however busy the machine is.
        for number in 0..200 {
            assert_eq!(
                run(&command("echo", [number.to_string()]), limit).unwrap(),
                number.to_string()
            );
        }
    }
}
