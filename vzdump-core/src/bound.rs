// SPDX-License-Identifier: MIT OR Apache-2.0
//! Programs that write for long and end when we are killed: one that lived on would write into what a
//! recovery has removed, or has given to somebody else, or onto a block device that is used again.

use std::ffi::{OsStr, OsString};
use std::io;
use std::process::{Command, ExitStatus, Output};
use std::sync::mpsc;

use tokio::process::Child;
use tokio::sync::oneshot;

/// Starts a program that is to end with the thread that starts it.
const WRAPPER: &str = "setpriv";
const PDEATHSIG: [&str; 3] = ["--pdeathsig", "KILL", "--"];
/// The exit code of that for a program that is not there.
const NOT_EXECUTED: i32 = 127;

/// A program that was started by [`start`]. Dropping it kills the program.
#[derive(Debug)]
pub(crate) struct Bound {
    // Dropped first.
    pub(crate) child: Child,
    program: OsString,
    _thread: mpsc::Sender<()>,
}

impl Bound {
    /// Waits for its end; what it said.
    pub(crate) async fn output(self) -> io::Result<Output> {
        let Self { child, program, _thread } = self;
        let output = child.wait_with_output().await?;
        check_executed(&program, output.status)?;
        Ok(output)
    }

    /// Waits for its end.
    pub(crate) async fn wait(&mut self) -> io::Result<ExitStatus> {
        let status = self.child.wait().await?;
        check_executed(&self.program, status)?;
        Ok(status)
    }
}

/// How `program` is started so that it ends with the thread that starts it; its arguments follow.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(WRAPPER);
    command.args(PDEATHSIG).arg(program);
    command
}

/// What it means that what [`command`] made could not be started.
pub(crate) fn not_started(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::NotFound => missing(OsStr::new(WRAPPER)),
        _ => error,
    }
}

/// # Errors
/// The program that [`command`] was given is not there.
pub(crate) fn check_executed(program: &OsStr, status: ExitStatus) -> io::Result<()> {
    if status.code() == Some(NOT_EXECUTED) { Err(missing(program)) } else { Ok(()) }
}

fn missing(program: &OsStr) -> io::Error {
    let text = format!("the program '{}' is not installed", program.display());
    io::Error::new(io::ErrorKind::NotFound, text)
}

/// Starts what [`command`] made, in a thread that lives as long as what is returned: the kernel's signal comes
/// with the end of the thread that started a program, and threads of the runtime end when they are idle.
///
/// # Errors
/// No thread, or no `setpriv`. Of a program that is not there the end is an error.
pub(crate) async fn start(command: Command) -> io::Result<Bound> {
    let program = command.get_args().nth(PDEATHSIG.len()).unwrap_or_default().to_owned();
    let mut command = tokio::process::Command::from(command);
    command.kill_on_drop(true);
    let runtime = tokio::runtime::Handle::current();
    let (started, start) = oneshot::channel();
    let (alive, dropped) = mpsc::channel::<()>();
    std::thread::Builder::new().name("bound".to_owned()).spawn(move || {
        let child = {
            let _context = runtime.enter();
            command.spawn()
        };
        // If nobody waits for it any more, it is dropped here, and ends.
        if started.send(child).is_ok() {
            // Nothing is ever sent.
            let _ = dropped.recv();
        }
    })?;
    let child = start.await.map_err(io::Error::other)?.map_err(not_started)?;
    Ok(Bound { child, program, _thread: alive })
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;
    use std::time::{Duration, Instant};

    use super::*;

    const VARIABLE: &str = "VZDUMP_TEST_BOUND";

    fn is_there(pid: &str) -> bool {
        // A zombie has ended.
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
    }

    async fn sleeper() -> Bound {
        let mut command = command("sleep");
        command.arg("1000").stdin(Stdio::null()).stdout(Stdio::null());
        start(command).await.unwrap()
    }

    /// Runs this test once more, which is the one that gets killed.
    #[tokio::test]
    async fn a_program_ends_when_its_starter_is_killed() {
        if std::env::var_os(VARIABLE).is_some() {
            let bound = sleeper().await;
            println!("pid {} of", bound.child.id().unwrap());
            std::future::pending::<()>().await;
        }
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "bound::tests::a_program_ends_when_its_starter_is_killed"])
            .arg("--nocapture")
            .env(VARIABLE, "1")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = io::BufReader::new(victim.stdout.take().unwrap());
        let mut lines = io::BufRead::lines(output).map(Result::unwrap);
        let line = lines.find(|line| line.contains("pid ")).unwrap();
        let pid = line.split_whitespace().skip_while(|word| *word != "pid").nth(1).unwrap();
        // Time for the thread that started it to end, if it would.
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(is_there(pid));
        victim.kill().unwrap();
        victim.wait().unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        while is_there(pid) {
            assert!(Instant::now() < end, "it lives on");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn a_program_that_is_missing_is_told() {
        let started = async || start(command("/nonexistent/program")).await.unwrap();
        let errors = [
            started().await.output().await.unwrap_err(),
            started().await.wait().await.unwrap_err(),
        ];
        for error in errors {
            assert_eq!(error.to_string(), "the program '/nonexistent/program' is not installed");
        }
    }

    #[tokio::test]
    async fn a_program_ends_when_it_is_dropped() {
        let bound = sleeper().await;
        let pid = bound.child.id().unwrap().to_string();
        assert!(is_there(&pid));
        drop(bound);
        let end = Instant::now() + Duration::from_secs(10);
        while is_there(&pid) {
            assert!(Instant::now() < end, "it lives on");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}
