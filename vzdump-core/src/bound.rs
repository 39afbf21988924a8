// SPDX-License-Identifier: MIT OR Apache-2.0
//! Programs that write for long and end when we are killed: one that lived on would write into what a
//! recovery has removed, or has given to somebody else, or onto a block device that is used again.

use std::io;
use std::path::Path;
use std::process::Output;
use std::sync::mpsc;

use tokio::process::{Child, Command};
use tokio::sync::oneshot;

/// A program that was started by [`start`]. Dropping it kills the program.
#[derive(Debug)]
pub(crate) struct Bound {
    // Dropped first.
    pub(crate) child: Child,
    _thread: mpsc::Sender<()>,
}

impl Bound {
    /// Waits for its end; what it said.
    pub(crate) async fn output(self) -> io::Result<Output> {
        self.child.wait_with_output().await
    }
}

/// How `program` is started so that it ends with the thread that starts it; its arguments follow.
pub(crate) fn command(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// Starts what [`command`] made, in a thread that lives as long as what is returned: the kernel's signal comes
/// with the end of the thread that started a program, and threads of the runtime end when they are idle.
///
/// # Errors
/// No thread, or no `setpriv`. A program that is not there ends with code 127.
pub(crate) async fn start(mut command: Command) -> io::Result<Bound> {
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
    let child = start.await.map_err(io::Error::other)??;
    Ok(Bound { child, _thread: alive })
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
        let mut command = command(Path::new("sleep"));
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
        let mut victim = std::process::Command::new(std::env::current_exe().unwrap())
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
