// SPDX-License-Identifier: MIT OR Apache-2.0
//! LXC's programs. All of this may block; each call has a limit.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::CtError;
use crate::freezer::Freezer;
use crate::tool::{command, run};

/// For what LXC's monitor answers at once.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// For ending a container by force.
const KILL_LIMIT: Duration = Duration::from_secs(60);

/// What a container is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It does not run.
    Stopped,
    /// It runs.
    Running,
    /// Its processes are frozen.
    Frozen,
    /// It starts, stops or freezes.
    Changing,
}

/// A container as LXC knows it: a name below a path.
#[derive(Debug, Clone)]
pub(crate) struct Lxc {
    pub(crate) path: PathBuf,
    pub(crate) name: String,
}

impl Lxc {
    pub(crate) fn new(path: &Path, id: u32) -> Self {
        Self { path: path.to_owned(), name: id.to_string() }
    }

    /// Where LXC finds its configuration.
    pub(crate) fn config_path(&self) -> PathBuf {
        self.path.join(&self.name).join("config")
    }

    pub(crate) fn log_path(&self) -> PathBuf {
        self.path.join(&self.name).join("lxc.log")
    }

    pub(crate) fn command(&self, program: &str, more: &[&str]) -> std::process::Command {
        let mut command = command(program, ["-P"]);
        command.arg(&self.path).args(["-n", &self.name]).args(more);
        command
    }

    fn run(&self, program: &str, more: &[&str], limit: Duration) -> Result<String, CtError> {
        run(&self.command(program, more), limit)
            .map_err(CtError::at(format!("work on the container {} (`{program}`)", self.name)))
    }

    pub(crate) fn state(&self) -> Result<State, CtError> {
        if !self.config_path().exists() {
            return Ok(State::Stopped);
        }
        let said = self.run("lxc-info", &["-s", "-H"], ANSWER_LIMIT)?;
        match said.as_str() {
            "STOPPED" => Ok(State::Stopped),
            "RUNNING" => Ok(State::Running),
            "FROZEN" => Ok(State::Frozen),
            "STARTING" | "STOPPING" | "ABORTING" | "FREEZING" | "THAWED" => Ok(State::Changing),
            // No answer is none: what is believed here decides whether a container is started again.
            other => Err(CtError::at(format!("ask LXC what the container {} does", self.name))(
                format!("'lxc-info' says '{other}'"),
            )),
        }
    }

    /// The container's first process; none if it does not run.
    pub(crate) fn init_pid(&self) -> Result<Option<i32>, CtError> {
        if !self.config_path().exists() {
            return Ok(None);
        }
        let text = self.run("lxc-info", &["-p", "-H"], ANSWER_LIMIT)?;
        Ok(text.parse().ok())
    }

    /// Asks the container to shut down; tells whether it did in time. If not it may still do so.
    pub(crate) fn shut_down(&self, wait: Duration) -> Result<bool, CtError> {
        let wait = Duration::from_secs(wait.as_secs().max(1));
        let seconds = wait.as_secs().to_string();
        let asked = Instant::now();
        let said = self.run("lxc-stop", &["--nokill", "-t", &seconds], wait + ANSWER_LIMIT);
        let Err(error) = said else { return Ok(true) };
        if self.state()? == State::Stopped {
            return Ok(true);
        }
        // It says nothing of a container that goes on.
        if asked.elapsed() >= wait { Ok(false) } else { Err(error) }
    }

    pub(crate) fn kill(&self) -> Result<(), CtError> {
        self.run("lxc-stop", &["-k"], KILL_LIMIT).map(drop)
    }

    /// Also of one that is not frozen.
    pub(crate) fn thaw(&self) -> Result<(), CtError> {
        let thawed = match self.freezer()? {
            Some(freezer) => freezer.thaw(),
            None if self.state()? == State::Stopped => return Ok(()),
            None => Err("LXC does not know its first process".to_owned()),
        };
        thawed.map_err(CtError::at(format!("thaw the container {}", self.name)))?;
        self.tell_thawed();
        Ok(())
    }

    /// What somebody's `lxc-freeze` has frozen and is thawed LXC thaws, too, for its own record. The cgroup decides,
    /// whatever comes of that.
    pub(crate) fn tell_thawed(&self) {
        if matches!(self.state(), Ok(State::Frozen)) {
            let _ = self.run("lxc-unfreeze", &[], ANSWER_LIMIT);
        }
    }

    /// Whether it is known that all of its processes are, also by others than LXC. This is its first process.
    pub(crate) fn is_frozen(&self, pid: i32) -> bool {
        let freezer = self.freezer_of(pid);
        matches!(freezer, Ok(Some(freezer)) if freezer.is_frozen().unwrap_or(false))
    }

    /// None if it does not run.
    pub(crate) fn freezer(&self) -> Result<Option<Freezer>, CtError> {
        self.init_pid()?.map_or(Ok(None), |pid| self.freezer_of(pid))
    }

    fn freezer_of(&self, pid: i32) -> Result<Option<Freezer>, CtError> {
        let doing = format!("find the freezer of the container {}", self.name);
        Freezer::of(&self.name, pid).map_err(CtError::at(doing))
    }
}
