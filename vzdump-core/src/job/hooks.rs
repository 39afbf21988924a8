// SPDX-License-Identifier: MIT OR Apache-2.0
//! The hook script of a job, called as vzdump calls it.
//!
//! | phase | arguments | also in the environment |
//! |---|---|---|
//! | `job-init`, `job-start`, `job-end`, `job-abort` | phase | `STOREID` |
//! | `backup-start`, `backup-abort`, `pre-stop`, `pre-restart`, `post-restart` | phase, mode, number of the guest | `STOREID`, `VMTYPE`, `HOSTNAME` |
//! | `backup-end` | the same | and `TARGET`, the archive |
//! | `log-end` | the same | and `LOGFILE` |
//!
//! What it prints goes to the log. A script that fails, fails the job (`job-init`, `job-start`,
//! `job-end`) or the guest's backup (`backup-start`, `backup-end`, `pre-stop`, `pre-restart`,
//! `post-restart`); in the other phases it is only warned of. `backup-end` is called for an archive
//! that is durable, and that stays so.

use std::ffi::OsString;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use provider_api::{CancellationToken, GuestKind};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;

use super::{JobContext, Limits};
use crate::guest::GuestError;
use crate::task_log::TaskSink;

/// How long a script that is told to end may take before it is killed.
const TERM_WAIT: Duration = Duration::from_secs(5);
/// How long output is read after the script has ended: what it left running may keep the pipe.
const DRAIN: Duration = Duration::from_secs(1);
/// The longest line of output that is kept in one piece, in bytes.
const LINE_BYTES_MAX: usize = 4096;
/// The most lines of one call that go to the log.
const LINES_MAX: usize = 10_000;
/// What the script may find in its environment, and nothing that was there by chance.
const VARIABLES: [&str; 6] = ["STOREID", "DUMPDIR", "VMTYPE", "HOSTNAME", "TARGET", "LOGFILE"];

/// When the script is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    JobInit,
    JobStart,
    JobEnd,
    JobAbort,
    BackupStart,
    BackupEnd,
    BackupAbort,
    LogEnd,
    PreStop,
    PreRestart,
    PostRestart,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::JobInit => "job-init",
            Self::JobStart => "job-start",
            Self::JobEnd => "job-end",
            Self::JobAbort => "job-abort",
            Self::BackupStart => "backup-start",
            Self::BackupEnd => "backup-end",
            Self::BackupAbort => "backup-abort",
            Self::LogEnd => "log-end",
            Self::PreStop => "pre-stop",
            Self::PreRestart => "pre-restart",
            Self::PostRestart => "post-restart",
        }
    }

    /// Whether the phase is a part of ending in order, and so gets some time after a cancellation.
    fn is_ending(self) -> bool {
        matches!(
            self,
            Self::JobEnd
                | Self::JobAbort
                | Self::BackupEnd
                | Self::BackupAbort
                | Self::LogEnd
                | Self::PreRestart
                | Self::PostRestart
        )
    }
}

/// The hook script of one job; without a script every call succeeds.
#[derive(Clone, Copy)]
pub(crate) struct Hooks<'a> {
    script: Option<&'a Path>,
    storage: &'a str,
    limits: &'a Limits,
    cancel: &'a CancellationToken,
}

impl<'a> Hooks<'a> {
    pub(crate) fn new(
        ctx: &'a JobContext,
        script: Option<&'a Path>,
        storage: &'a str,
        cancel: &'a CancellationToken,
    ) -> Self {
        Self { script, storage, limits: &ctx.limits, cancel }
    }

    /// Calls the script for the job.
    pub(crate) async fn job(&self, phase: Phase, sink: &dyn TaskSink) -> Result<(), String> {
        self.call(phase, Vec::new(), Vec::new(), sink).await
    }

    /// The calls for one guest.
    pub(crate) fn guest(self, kind: GuestKind, id: u32, mode: &'static str) -> GuestHooks<'a> {
        GuestHooks { hooks: self, kind, id, mode, name: None }
    }

    async fn call(
        &self,
        phase: Phase,
        arguments: Vec<OsString>,
        mut variables: Vec<(&str, OsString)>,
        sink: &dyn TaskSink,
    ) -> Result<(), String> {
        let Some(script) = self.script else {
            return Ok(());
        };
        let failed = |why: String| {
            format!(
                "the hook script '{}' failed in phase {}: {why}",
                script.display(),
                phase.name()
            )
        };
        variables.push(("STOREID", self.storage.into()));
        let mut command = Command::new(script);
        command.arg(phase.name()).args(arguments);
        for name in VARIABLES {
            command.env_remove(name);
        }
        command.envs(variables);
        let end = self.end_of_patience(phase);
        run(command, end, sink).await.map_err(failed)
    }

    /// Ends when the script has had its time, and says so.
    async fn end_of_patience(&self, phase: Phase) -> String {
        let limit = self.limits.hook;
        let cancelled = async {
            self.cancel.cancelled().await;
            if phase.is_ending() {
                tokio::time::sleep(self.limits.hook_grace).await;
            }
        };
        tokio::select! {
            () = cancelled => "the job was cancelled".to_owned(),
            () = tokio::time::sleep(limit) =>
                format!("it did not end within {} seconds", limit.as_secs()),
        }
    }
}

/// The calls of the hook script for one guest.
#[derive(Clone)]
pub struct GuestHooks<'a> {
    hooks: Hooks<'a>,
    kind: GuestKind,
    id: u32,
    mode: &'static str,
    name: Option<String>,
}

impl GuestHooks<'_> {
    /// Sets the guest's name, once it is known.
    pub(crate) fn set_name(&mut self, name: Option<String>) {
        self.name = name;
    }

    /// To be called before a running guest is stopped or paused for its backup.
    ///
    /// # Errors
    /// The script failed: the guest is not to be stopped.
    pub async fn pre_stop(&self, sink: &dyn TaskSink) -> Result<(), GuestError> {
        self.call(Phase::PreStop, Vec::new(), sink).await.map_err(GuestError::Refused)
    }

    /// To be called before a guest that was stopped or paused goes on. It must go on also if the
    /// script fails.
    ///
    /// # Errors
    /// The script failed.
    pub async fn pre_restart(&self, sink: &dyn TaskSink) -> Result<(), GuestError> {
        self.call(Phase::PreRestart, Vec::new(), sink).await.map_err(GuestError::Refused)
    }

    /// To be called when such a guest goes on.
    ///
    /// # Errors
    /// The script failed.
    pub async fn post_restart(&self, sink: &dyn TaskSink) -> Result<(), GuestError> {
        self.call(Phase::PostRestart, Vec::new(), sink).await.map_err(GuestError::Refused)
    }

    pub(crate) async fn call(
        &self,
        phase: Phase,
        more: Vec<(&str, OsString)>,
        sink: &dyn TaskSink,
    ) -> Result<(), String> {
        let arguments = vec![self.mode.into(), self.id.to_string().into()];
        let mut variables = more;
        variables.push(("VMTYPE", self.kind.to_string().into()));
        if let Some(name) = &self.name {
            variables.push(("HOSTNAME", name.into()));
        }
        self.hooks.call(phase, arguments, variables, sink).await
    }
}

/// Checks that a hook script can be called.
///
/// # Errors
/// A sentence that says why not.
pub(crate) fn check_script(script: &Path) -> Result<(), String> {
    use std::os::unix::fs::PermissionsExt as _;
    let shown = script.display();
    match std::fs::metadata(script) {
        Ok(data) if !data.is_file() => Err(format!("the hook script '{shown}' is no file")),
        Ok(data) if data.permissions().mode() & 0o111 == 0 => {
            Err(format!("the hook script '{shown}' is not executable"))
        }
        Ok(_) => Ok(()),
        Err(error) => Err(format!("the hook script '{shown}' cannot be used: {error}")),
    }
}

/// Ends what belongs to a script, also when its caller gives up.
struct Group(Option<Pid>);

impl Group {
    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.0 {
            // It fails only if nobody is left.
            let _ = kill_process_group(pid, signal);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// Runs a command until it ends or patience does, which says why.
async fn run(
    mut command: Command,
    end_of_patience: impl Future<Output = String>,
    sink: &dyn TaskSink,
) -> Result<(), String> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // A group of its own: a signal from the terminal is for us, and we end all of it.
    command.process_group(0);
    let mut child = command.spawn().map_err(|error| format!("it cannot be started: {error}"))?;
    let pid = child.id().and_then(|id| Pid::from_raw(id.try_into().ok()?));
    let mut group = Group(pid);
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let ended = CancellationToken::new();
    let work = async {
        let wait = async {
            let status = child.wait().await;
            ended.cancel();
            status
        };
        tokio::join!(wait, pump(stdout, &ended, sink), pump(stderr, &ended, sink)).0
    };
    tokio::pin!(work);
    let status = tokio::select! {
        status = &mut work => status,
        why = end_of_patience => {
            group.signal(Signal::TERM);
            if tokio::time::timeout(TERM_WAIT, &mut work).await.is_err() {
                group.signal(Signal::KILL);
                // What cannot even be killed is left to the system.
                let _ = tokio::time::timeout(TERM_WAIT, &mut work).await;
            }
            return Err(format!("{why}; it was ended"));
        }
    };
    // What a script leaves running on purpose goes on.
    group.0 = None;
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(status.to_string()),
        Err(error) => Err(format!("how it ended is not known: {error}")),
    }
}

/// Logs the lines of one output until it ends, or a moment after the script has ended.
async fn pump(
    output: Option<impl AsyncRead + Unpin>,
    ended: &CancellationToken,
    sink: &dyn TaskSink,
) {
    let Some(mut output) = output else { return };
    let patience = async {
        ended.cancelled().await;
        tokio::time::sleep(DRAIN).await;
    };
    let mut lines = LineLog { sink, pending: Vec::new(), count: 0 };
    let read = async {
        let mut buffer = vec![0; LINE_BYTES_MAX];
        // An output that cannot be read has ended.
        while let Ok(count @ 1..) = output.read(&mut buffer).await {
            lines.take(&buffer[..count]);
        }
    };
    tokio::select! {
        () = read => {}
        () = patience => {}
    }
    lines.flush();
}

/// Cuts output into lines of bounded length and number.
struct LineLog<'a> {
    sink: &'a dyn TaskSink,
    pending: Vec<u8>,
    count: usize,
}

impl LineLog<'_> {
    fn take(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte != b'\n' {
                self.pending.push(byte);
            }
            if byte == b'\n' || self.pending.len() >= LINE_BYTES_MAX {
                self.line();
            }
        }
    }

    fn line(&mut self) {
        self.count += 1;
        if self.count <= LINES_MAX {
            self.sink.info(&String::from_utf8_lossy(&self.pending));
        } else if self.count == LINES_MAX + 1 {
            self.sink.warn("the hook script prints too many lines; the others are left out");
        }
        self.pending.clear();
    }

    fn flush(&mut self) {
        if !self.pending.is_empty() {
            self.line();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::task_log::testing::MemoryLog;

    async fn shell(script: &str, patience: Duration) -> (Result<(), String>, MemoryLog) {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        let sink = MemoryLog::default();
        let end = async {
            tokio::time::sleep(patience).await;
            "patience ended".to_owned()
        };
        let result = run(command, end, &sink).await;
        (result, sink)
    }

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn output_goes_to_the_log_and_a_status_is_an_error() {
        let (result, sink) = shell("echo one; printf 'two\\nthree' >&2; exit 3", LONG).await;
        assert_eq!(result.unwrap_err(), "exit status: 3");
        let mut lines: Vec<_> = sink.text().lines().map(str::to_owned).collect();
        lines.sort();
        assert_eq!(lines, ["INFO: one", "INFO: three", "INFO: two"]);
    }

    #[tokio::test]
    async fn what_it_leaves_running_does_not_hold_us_up() {
        let start = Instant::now();
        let (result, sink) = shell("sleep 30 & echo $!", LONG).await;
        assert_eq!(result, Ok(()));
        assert!(start.elapsed() < Duration::from_secs(20));
        let pid = sink.text().trim_start_matches("INFO: ").parse().unwrap();
        let pid = Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, Signal::KILL).expect("it was ended with the script");
    }

    #[tokio::test]
    async fn a_script_that_does_not_end_is_ended_with_its_children() {
        let patience = Duration::from_millis(300);
        let script =
            "trap '' TERM; sh -c 'trap \"\" TERM; while :; do sleep 1; done' & echo $!; wait";
        let (result, sink) = shell(script, patience).await;
        assert_eq!(result.unwrap_err(), "patience ended; it was ended");
        let pid: u32 = sink.text().trim_start_matches("INFO: ").parse().unwrap();
        for _ in 0..1000 {
            let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            if state.is_empty() || state.contains(") Z") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the child {pid} of the script lives on");
    }

    #[tokio::test]
    async fn endless_output_without_a_line_break_is_cut() {
        let (result, sink) = shell("head -c 100000000 /dev/zero | tr '\\0' x", LONG).await;
        assert_eq!(result, Ok(()));
        let text = sink.text();
        assert!(
            text.ends_with("WARN: the hook script prints too many lines; the others are left out")
        );
        assert_eq!(text.lines().count(), LINES_MAX + 1);
    }

    #[tokio::test]
    async fn the_calls_around_a_stop_have_mode_and_guest_and_their_failure_is_an_error() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("hook");
        std::fs::write(&script, "#!/bin/sh\necho $* $HOSTNAME; [ $1 != post-restart ]\n").unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        let (limits, cancel) = (Limits::default(), CancellationToken::new());
        let hooks =
            Hooks { script: Some(&script), storage: "store", limits: &limits, cancel: &cancel };
        let mut guest = hooks.guest(GuestKind::Qemu, 100, "stop");
        guest.set_name(Some("web".to_owned()));
        let sink = MemoryLog::default();
        guest.pre_stop(&sink).await.unwrap();
        guest.pre_restart(&sink).await.unwrap();
        let error = guest.post_restart(&sink).await.unwrap_err().to_string();
        assert!(error.ends_with("failed in phase post-restart: exit status: 1"), "{error}");
        assert_eq!(
            sink.text(),
            "INFO: pre-stop stop 100 web\nINFO: pre-restart stop 100 web\n\
             INFO: post-restart stop 100 web"
        );
        // A guest that was stopped is started again also when the job is cancelled.
        cancel.cancel();
        guest.pre_restart(&sink).await.unwrap();
        assert!(guest.pre_stop(&sink).await.is_err());
    }

    #[test]
    fn a_script_that_cannot_be_called_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("hook");
        std::fs::write(&file, "").unwrap();
        assert!(check_script(&file).unwrap_err().contains("is not executable"));
        assert!(check_script(dir.path()).unwrap_err().contains("is no file"));
        assert!(check_script(&dir.path().join("none")).unwrap_err().contains("No such file"));
        check_script(Path::new("/bin/sh")).unwrap();
    }
}
