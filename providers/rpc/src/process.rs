// SPDX-License-Identifier: MIT OR Apache-2.0
//! The plugin's process: started in a group of its own beside a guard that outlives us.
//!
//! The guard is a shell that waits for the end of its standard input, which comes when we close it or die
//! in whatever way, gives the group some seconds to end by itself, and kills it. It leads the group, so the
//! group's number stays taken as long as we have not waited for it.
//!
//! What leaves the group (`setsid`, a daemon) is known by a mark in its environment, which is another one for
//! each start of a plugin, and is killed when the group is.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use command_fds::CommandFdExt;
use command_fds::FdMapping;
use provider_api::{Error, Kind, Result, Uuid};
use rustix::fs::OFlags;
use rustix::process::{
    Pid, PidfdFlags, Signal, geteuid, kill_process_group, pidfd_open, pidfd_send_signal,
};
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

/// The variable whose value is a plugin's mark.
const MARK_VARIABLE: &str = "VZDUMP_PROVIDER_PROCESS";
/// How often is looked for processes with the mark: one that is found takes a moment to end, and may just
/// have started another one.
const LOOKS: u32 = 50;
const LOOK_STEP: Duration = Duration::from_millis(20);

/// The plugin and all that it started, as long as that keeps its group or its mark.
pub(crate) struct Process {
    plugin: Child,
    guard: Child,
    group: Pid,
    mark: String,
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
    let mark = Uuid::new_v4().simple().to_string();
    let guard = start_guard(&mark)?;
    let raw = guard.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    let group = raw.ok_or_else(|| std::io::Error::other("the guard ended at once"))?;
    let started = start_plugin(program, group, &mark, secrets_in);
    let mut plugin = match started {
        Ok(plugin) => plugin,
        Err(error) => {
            // Nothing else is in the group; the runtime waits for it.
            let _ = kill_process_group(group, Signal::KILL);
            return Err(error);
        }
    };
    let pipes = (plugin.stdin.take(), plugin.stdout.take(), plugin.stderr.take());
    let process = Process { plugin, guard, group, mark };
    let (Some(stdin), Some(stdout), Some(stderr)) = pipes else {
        process.kill();
        return Err(std::io::Error::other("no pipes"));
    };
    let secrets = SecretsPipe(File::from(secrets_out));
    Ok(Started { process, stdin, stdout, stderr, secrets })
}

fn start_guard(mark: &str) -> std::io::Result<Child> {
    // Without the mark in its own environment, so that it finds the others, and itself not.
    let script = format!(
        "read -r line; sleep {}; for look in 1 2 3; do for file in /proc/[0-9]*/environ; do \
         if grep -qsF {MARK_VARIABLE}={mark} \"$file\"; then file=${{file#/proc/}}; \
         kill -s KILL \"${{file%/environ}}\"; fi; done; sleep 0.1; done; kill -s KILL 0",
        END_GRACE.as_secs()
    );
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &script]).current_dir("/").process_group(0).env_remove(MARK_VARIABLE);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn()
}

fn start_plugin(
    program: &PathBuf,
    group: Pid,
    mark: &str,
    secrets: OwnedFd,
) -> std::io::Result<Child> {
    let mut command = Command::new(program);
    command.env(MARK_VARIABLE, mark);
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

    /// Kills all of it and waits for both.
    pub(crate) async fn end(mut self) {
        self.kill();
        let mark = format!("{MARK_VARIABLE}={}", self.mark);
        let killed = tokio::task::spawn_blocking(move || kill_marked(mark.as_bytes())).await;
        match killed {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!("what a provider started may live on: {error}"),
            // The program ends, and with it its end of the guard's pipe: the guard does the same then.
            Err(error) if error.is_cancelled() => {}
            Err(error) => tracing::warn!("what a provider started may live on: {error}"),
        }
        let both = async { tokio::join!(self.plugin.wait(), self.guard.wait()) };
        if tokio::time::timeout(REAP_WAIT, both).await.is_err() {
            tracing::warn!(group = self.group.as_raw_nonzero().get(), "a killed provider lives on");
        }
    }
}

/// Kills all processes with this line in their environment, until none is left.
fn kill_marked(mark: &[u8]) -> std::io::Result<()> {
    for _ in 0..LOOKS {
        let mut found = false;
        for entry in std::fs::read_dir("/proc")?.flatten() {
            let name = entry.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
            found |= kill_if_marked(pid, mark);
        }
        if !found {
            return Ok(());
        }
        std::thread::sleep(LOOK_STEP);
    }
    Err(std::io::Error::other("a killed process does not end"))
}

/// Whether the process has the mark and was killed. It may end at any moment.
fn kill_if_marked(pid: i32, mark: &[u8]) -> bool {
    let environment = || std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let is_marked = || environment().split(|byte| *byte == 0).any(|line| line == mark);
    if !is_marked() {
        return false;
    }
    let Some(pid) = Pid::from_raw(pid) else { return false };
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return false };
    // What is held now is the process that was looked at, unless another one has its number.
    is_marked() && pidfd_send_signal(process, Signal::KILL).is_ok()
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
