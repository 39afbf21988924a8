// SPDX-License-Identifier: MIT OR Apache-2.0
//! The plugin's process: started in a group of its own beside a guard that outlives us.
//!
//! The guard is a shell that waits for the end of its standard input, which comes when we close it or die
//! in whatever way, gives the group some seconds to end by itself, and kills it. It leads the group, so the
//! group's number stays taken as long as we have not waited for it.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use command_fds::CommandFdExt;
use command_fds::FdMapping;
use provider_api::{Error, Kind, Result};
use rustix::fs::OFlags;
use rustix::process::{Pid, Signal, geteuid, kill_process_group};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};

/// How long a plugin may take to end once its standard input has ended.
pub const END_GRACE: Duration = Duration::from_secs(5);
/// The descriptor on which a plugin finds its secrets.
const SECRETS_FD: i32 = 3;
/// What is waited for a process that was killed.
const REAP_WAIT: Duration = Duration::from_secs(10);

/// What a started plugin is talked to with.
pub(crate) struct Started {
    pub(crate) process: Process,
    pub(crate) stdin: ChildStdin,
    pub(crate) stdout: ChildStdout,
    pub(crate) stderr: ChildStderr,
    pub(crate) secrets: SecretsPipe,
}

/// The plugin and all that it started and did not move to another group.
pub(crate) struct Process {
    plugin: Child,
    guard: Child,
    group: Pid,
}

/// The writing end of descriptor 3; the plugin reads it to its end.
pub(crate) struct SecretsPipe(File);

impl SecretsPipe {
    /// Hands the secrets over. They fit into the pipe, so this does not wait.
    pub(crate) fn send(mut self, json: &str) -> std::io::Result<()> {
        match self.0.write(json.as_bytes()) {
            Ok(bytes) if bytes == json.len() => Ok(()),
            Ok(_) => Err(std::io::ErrorKind::StorageFull.into()),
            // A plugin without secrets may have closed it.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Checks that a plugin is a program that only root and we can change.
pub(crate) fn check_program(program: &Path) -> Result<()> {
    let fault = |why: &str| {
        Err(Error::new(Kind::Invalid, format!("The provider {} {why}.", program.display())))
    };
    let meta = std::fs::metadata(program).map_err(|error| {
        Error::io(format!("Cannot find the provider {}.", program.display()), error)
    })?;
    let mode = meta.permissions().mode();
    if !meta.is_file() {
        return fault("is no file");
    }
    if mode & 0o111 == 0 {
        return fault("is not executable (chmod +x)");
    }
    if mode & 0o022 != 0 {
        return fault("can be changed by others; take their right to write away (chmod go-w)");
    }
    if meta.uid() != 0 && meta.uid() != geteuid().as_raw() {
        return fault("belongs neither to root nor to the user that runs this program");
    }
    Ok(())
}

/// Starts a plugin; nothing is left of it after an error.
pub(crate) fn start(program: &PathBuf) -> Result<Started> {
    check_program(program)?;
    let words = || format!("Cannot start the provider {}.", program.display());
    start_both(program).map_err(|error| Error::io(words(), error))
}

fn start_both(program: &PathBuf) -> std::io::Result<Started> {
    let (secrets_in, secrets_out) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    // A write that does not fit must fail, not wait.
    rustix::fs::fcntl_setfl(secrets_out.as_fd(), OFlags::NONBLOCK)?;
    let guard = start_guard()?;
    let raw = guard.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    let group = raw.ok_or_else(|| std::io::Error::other("the guard ended at once"))?;
    let started = start_plugin(program, group, secrets_in);
    let mut plugin = match started {
        Ok(plugin) => plugin,
        Err(error) => {
            // Nothing else is in the group; the runtime waits for it.
            let _ = kill_process_group(group, Signal::KILL);
            return Err(error);
        }
    };
    let pipes = (plugin.stdin.take(), plugin.stdout.take(), plugin.stderr.take());
    let process = Process { plugin, guard, group };
    let (Some(stdin), Some(stdout), Some(stderr)) = pipes else {
        process.kill();
        return Err(std::io::Error::other("no pipes"));
    };
    let secrets = SecretsPipe(File::from(secrets_out));
    Ok(Started { process, stdin, stdout, stderr, secrets })
}

fn start_guard() -> std::io::Result<Child> {
    let script = format!("read -r line; sleep {}; kill -s KILL 0", END_GRACE.as_secs());
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &script]).current_dir("/").process_group(0);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn()
}

fn start_plugin(program: &PathBuf, group: Pid, secrets: OwnedFd) -> std::io::Result<Child> {
    let mut command = Command::new(program);
    command.current_dir("/").process_group(group.as_raw_nonzero().get());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mapping = FdMapping { parent_fd: secrets, child_fd: SECRETS_FD };
    command.fd_mappings(vec![mapping]).map_err(std::io::Error::other)?;
    command.spawn()
}

impl Process {
    /// Waits for the plugin itself; the rest of its group may live on.
    pub(crate) async fn wait(&mut self) -> std::io::Result<ExitStatus> {
        self.plugin.wait().await
    }

    /// Kills the whole group.
    pub(crate) fn kill(&self) {
        // Not waited for yet, so the number is still the group's.
        if self.guard.id().is_some() {
            let _ = kill_process_group(self.group, Signal::KILL);
        }
    }

    /// Kills the whole group and waits for both.
    pub(crate) async fn end(mut self) {
        self.kill();
        let both = async { tokio::join!(self.plugin.wait(), self.guard.wait()) };
        if tokio::time::timeout(REAP_WAIT, both).await.is_err() {
            tracing::warn!(group = self.group.as_raw_nonzero().get(), "a killed provider lives on");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_that_others_can_change_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plugin");
        assert_eq!(check_program(&path).unwrap_err().kind, Kind::NotFound);
        std::fs::write(&path, "#!/bin/sh\n").unwrap();
        for (mode, fault) in [(0o644, "not executable"), (0o775, "by others"), (0o757, "by others")]
        {
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
            let error = check_program(&path).unwrap_err().to_string();
            assert!(error.contains(fault), "{error}");
        }
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        check_program(&path).unwrap();
        assert!(check_program(dir.path()).unwrap_err().to_string().contains("no file"));
    }
}
