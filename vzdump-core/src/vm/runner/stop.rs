// SPDX-License-Identifier: MIT OR Apache-2.0
//! Stops a VM, or its guest alone.
//!
//! A QEMU may stay when its guest has switched off: during a backup, which needs it to the end, or
//! because the administrator wants that (`-no-shutdown`).
//!
//! A guest with an agent is asked through it, which works also where nobody listens to the power button
//! (a desktop that asks its user, a locked screen); else, and if that does not help, its button is pressed.

use std::io;
use std::time::{Duration, Instant};

use provider_api::GuestKind;
use qmp_client::agent::{Agent, AgentOptions};
use qmp_client::commands::{QueryStatus, RunState, StatusInfo, SystemPowerdown};
use qmp_client::{Error, Session};
use rustix::process::Signal;
use serde_json::json;

use super::{
    KILL_TIMEOUT, RunnerError, connect, find_process, power_lock, power_lock_within, read_config,
    sockets,
};
use crate::job::backup_lock_path;
use crate::journal::by_hand;
use crate::layout::{self, Layout};
use crate::lock::{FileLock, LockError};
use crate::vm::process::{ProcessHandle, VmProcess};
use crate::vm::tpm;

/// Closing images may have to write caches out.
const QUIT_TIMEOUT: Duration = Duration::from_secs(30);
/// The same for a backup, which must leave the VM as it found it; a stop takes a minute or more.
const LONG_LOCK_TIMEOUT: Duration = Duration::from_secs(90);
/// How often a guest that shuts down is looked at.
const SHUTDOWN_POLL: Duration = Duration::from_millis(500);

/// How long a monitor that is not free is waited for, to ask a guest to shut down. The power lock is held for it.
const ASK_TIMEOUT: Duration = Duration::from_secs(60);
/// An agent that works answers at once, but says nothing of a shutdown that begins.
const AGENT_TIMEOUT: Duration = Duration::from_secs(3);

/// How to stop a VM.
#[derive(Debug, Clone, Copy)]
pub struct StopOptions {
    /// How long the guest may take to shut down; zero does not ask it.
    pub timeout: Duration,
}

impl Default for StopOptions {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(60) }
    }
}

/// How a VM came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stopped {
    /// It was not running.
    NotRunning,
    /// The guest shut down by itself.
    Shutdown,
    /// The guest shut down by itself; its QEMU ends with the backup or the live restore that uses it.
    ShutdownInBackup,
    /// QEMU was asked to end.
    Quit,
    /// QEMU was killed.
    Killed,
}

/// Stops a VM: asks the guest to shut down, then ends QEMU, then kills it.
///
/// # Errors
/// [`RunnerError`].
pub async fn stop(layout: &Layout, id: u32, options: StopOptions) -> Result<Stopped, RunnerError> {
    layout::check_guest_id(id)?;
    let _lock = power_lock(layout, id).await?;
    let fault = |source| RunnerError::Io { what: "end the QEMU", id, source };
    let Some(process) = find_process(layout, id)? else {
        // A wrong number is an error, a VM that is off is not.
        read_config(layout, id)?;
        tidy(layout, id).await;
        by_hand::settled(layout, GuestKind::Qemu, id).await;
        return Ok(Stopped::NotRunning);
    };
    let Some(handle) = process.open().map_err(fault)? else { return Ok(Stopped::NotRunning) };
    let stopped = end(layout, id, &handle, options).await.map_err(fault)?;
    if stopped.is_some_and(|stopped| stopped != Stopped::ShutdownInBackup) {
        tidy(layout, id).await;
        by_hand::settled(layout, GuestKind::Qemu, id).await;
    }
    stopped.ok_or(RunnerError::Unkillable { id, pid: process.pid, after_s: KILL_TIMEOUT.as_secs() })
}

async fn end(
    layout: &Layout,
    id: u32,
    handle: &ProcessHandle,
    options: StopOptions,
) -> io::Result<Option<Stopped>> {
    let asked = if options.timeout.is_zero() {
        Asked::Runs
    } else {
        ask_guest(layout, id, handle, options.timeout).await?
    };
    if let Asked::Not(error) = &asked {
        tracing::warn!(vm = id, %error, "cannot ask the guest to shut down");
    }
    let is_off = matches!(asked, Asked::Off);
    match asked {
        Asked::Ended => return Ok(Some(Stopped::Shutdown)),
        Asked::Off if is_backed_up(layout, id) => return Ok(Some(Stopped::ShutdownInBackup)),
        Asked::Off | Asked::Runs | Asked::Not(_) => {}
    }
    let killed = quit(handle).await?;
    Ok(if is_off { killed.map(|_| Stopped::Shutdown) } else { killed })
}

/// Ends a QEMU that is not asked any more.
async fn quit(handle: &ProcessHandle) -> io::Result<Option<Stopped>> {
    // QEMU closes its images on this signal as it does on `quit`; no monitor is needed for it.
    handle.signal(Signal::TERM)?;
    if handle.wait(QUIT_TIMEOUT).await? {
        return Ok(Some(Stopped::Quit));
    }
    handle.signal(Signal::KILL)?;
    Ok(handle.wait(KILL_TIMEOUT).await?.then_some(Stopped::Killed))
}

/// Whether a backup of the VM is under way.
fn is_backed_up(layout: &Layout, id: u32) -> bool {
    let path = backup_lock_path(layout, GuestKind::Qemu, id);
    let lock = FileLock::try_acquire(&path, &format!("VM {id}"));
    matches!(lock, Err(LockError::Busy { .. }))
}

/// What became of a guest that was asked to shut down.
#[derive(Debug)]
enum Asked {
    /// QEMU has ended with it.
    Ended,
    /// It is off, QEMU stays.
    Off,
    /// It runs.
    Runs,
    /// QEMU's monitor was not free, or refused, so nobody has asked it.
    Not(Error),
}

/// Asks the guest's agent to shut the guest down. False if there is none, or it does not want to.
async fn ask_agent(layout: &Layout, id: u32) -> bool {
    if !read_config(layout, id).is_ok_and(|config| config.agent_enabled()) {
        return false;
    }
    let options = AgentOptions {
        connect_timeout: AGENT_TIMEOUT,
        command_timeout: AGENT_TIMEOUT,
        ..AgentOptions::default()
    };
    let ask = async {
        let agent = Agent::connect(layout.agent_socket(id), options).await?;
        agent.execute_raw("guest-shutdown", json!({ "mode": "powerdown" }), None).await
    };
    match ask.await {
        // It worked a moment ago, when the connection was made, and says nothing of success.
        Ok(_) | Err(Error::Timeout { .. } | Error::Disconnected) => true,
        Err(error) => {
            tracing::debug!(vm = id, %error, "the agent does not shut the guest down");
            false
        }
    }
}

async fn status_of(layout: &Layout, id: u32) -> qmp_client::Result<StatusInfo> {
    connect(layout, id).await?.execute(QueryStatus).await
}

async fn press_button(layout: &Layout, id: u32) -> qmp_client::Result<()> {
    connect(layout, id).await?.execute(SystemPowerdown).await.map(drop)
}

/// Asks the guest to shut down and waits for what it does.
async fn ask_guest(
    layout: &Layout,
    id: u32,
    handle: &ProcessHandle,
    timeout: Duration,
) -> io::Result<Asked> {
    let begin = Instant::now();
    let deadline = begin + timeout;
    let mut is_pressed = false;
    loop {
        let error = match status_of(layout, id).await {
            Ok(StatusInfo { status: RunState::Shutdown, .. }) => return Ok(Asked::Off),
            Ok(StatusInfo { running: false, .. }) => return Ok(Asked::Runs),
            Ok(_) if ask_agent(layout, id).await => break,
            Ok(_) => match press_button(layout, id).await {
                Ok(()) => {
                    is_pressed = true;
                    break;
                }
                // It may have been pressed.
                Err(Error::Timeout { .. } | Error::Disconnected) => break,
                Err(error) => error,
            },
            Err(error) => error,
        };
        // Another client may have the monitor for a moment.
        let left = timeout.min(ASK_TIMEOUT).saturating_sub(begin.elapsed());
        if handle.wait(left.min(SHUTDOWN_POLL)).await? {
            return Ok(Asked::Ended);
        }
        if left.is_zero() {
            return Ok(Asked::Not(error));
        }
    }
    loop {
        if !is_pressed && begin.elapsed() > timeout / 2 {
            // Said before only by the agent; a QEMU that cannot be asked now ends, or hangs.
            let _ = press_button(layout, id).await;
            is_pressed = true;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if handle.wait(left.min(SHUTDOWN_POLL)).await? {
            return Ok(Asked::Ended);
        }
        // The monitor is left free between, for whoever wants to know the VM's status. Of a QEMU
        // that ends in this moment the next round tells.
        if let Ok(status) = status_of(layout, id).await
            && status.status == RunState::Shutdown
        {
            return Ok(Asked::Off);
        }
        if left.is_zero() {
            return Ok(Asked::Runs);
        }
    }
}

/// Asks the guest of a running VM to shut down and waits for that, so that its QEMU ends. Tells
/// whether it has; QEMU is not ended under a guest that runs on.
///
/// # Errors
/// [`RunnerError`]; with [`RunnerError::Qmp`] and [`RunnerError::Lock`] nobody has asked the guest.
pub async fn shut_down(layout: &Layout, id: u32, timeout: Duration) -> Result<bool, RunnerError> {
    let _lock = power_lock(layout, id).await?;
    let fault = |source| RunnerError::Io { what: "end the QEMU", id, source };
    let Some(process) = find_process(layout, id)? else { return Ok(true) };
    let Some(handle) = process.open().map_err(fault)? else { return Ok(true) };
    match ask_guest(layout, id, &handle, timeout).await.map_err(fault)? {
        Asked::Ended => {}
        Asked::Runs => return Ok(false),
        Asked::Not(source) => {
            return Err(RunnerError::Qmp {
                what: "ask for a shutdown of the guest of",
                id,
                source,
            });
        }
        Asked::Off => end_process(id, &process, &handle).await?,
    }
    tidy(layout, id).await;
    Ok(true)
}

async fn end_process(
    id: u32,
    process: &VmProcess,
    handle: &ProcessHandle,
) -> Result<(), RunnerError> {
    let ended = quit(handle).await;
    let ended = ended.map_err(|source| RunnerError::Io { what: "end the QEMU", id, source })?;
    let (pid, after_s) = (process.pid, KILL_TIMEOUT.as_secs());
    ended.map(drop).ok_or(RunnerError::Unkillable { id, pid, after_s })
}

/// Ends a QEMU whose guest is in one of these states, in which it does not run; returns the state,
/// and whether QEMU was ended. No [`start`](super::start) lets the guest run meanwhile.
///
/// # Errors
/// [`RunnerError`].
pub async fn end_if(
    layout: &Layout,
    id: u32,
    process: &VmProcess,
    session: &Session,
    states: &[RunState],
) -> Result<(RunState, bool), RunnerError> {
    let _lock = power_lock_within(layout, id, LONG_LOCK_TIMEOUT).await?;
    let status = session.execute(QueryStatus).await;
    let status =
        status.map_err(|source| RunnerError::Qmp { what: "ask for the state of", id, source })?;
    if !states.contains(&status.status) {
        return Ok((status.status, false));
    }
    let opened = process.open();
    let opened = opened.map_err(|source| RunnerError::Io { what: "end the QEMU", id, source })?;
    if let Some(handle) = opened {
        end_process(id, process, &handle).await?;
        tidy(layout, id).await;
    }
    Ok((status.status, true))
}

/// Removes what a QEMU that has ended leaves.
async fn tidy(layout: &Layout, id: u32) {
    if let Err(error) = tpm::end(layout, id).await {
        // The next start ends it, or refuses.
        tracing::warn!(vm = id, %error, "the TPM is left");
    }
    for socket in sockets(layout, id) {
        let _ = std::fs::remove_file(socket);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
    use tokio::net::UnixListener;

    use super::*;
    use crate::config::guest::VmConfig;

    /// Asks the agent of a VM with this configuration, which answers to a shutdown with this.
    async fn asked(config: &str, answer: Option<&'static str>) -> bool {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(Some(dir.path().to_owned()));
        VmConfig::parse(config).write(&layout.vm_config_path(100)).unwrap();
        layout.make_vm_run_dir(100).unwrap();
        let listener = UnixListener::bind(layout.agent_socket(100)).unwrap();
        let agent = tokio::spawn(async move {
            let (reader, mut writer) = listener.accept().await.unwrap().0.into_split();
            let mut lines = BufReader::new(reader).split(b'\n');
            while let Ok(Some(line)) = lines.next_segment().await {
                let line: Vec<u8> = line.into_iter().filter(|byte| *byte != 0xff).collect();
                let Ok(request) = serde_json::from_slice::<Value>(&line) else { continue };
                let reply = if request["execute"] == "guest-shutdown" {
                    assert_eq!(request["arguments"]["mode"], "powerdown");
                    answer.map(str::to_owned)
                } else {
                    Some(format!("\u{0}{}", json!({ "return": request["arguments"]["id"] })))
                };
                let Some(reply) = reply else { continue };
                let bytes: Vec<u8> =
                    reply.bytes().map(|byte| if byte == 0 { 0xff } else { byte }).collect();
                writer.write_all(&bytes).await.unwrap();
                writer.write_all(b"\n").await.unwrap();
            }
        });
        let is_asked = ask_agent(&layout, 100).await;
        agent.abort();
        is_asked
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_with_an_agent_is_asked_through_it() {
        let refusal = r#"{"error": {"class": "GenericError", "desc": "no shutdown here"}}"#;
        assert!(asked("agent: 1\n", None).await, "it says nothing of success");
        assert!(asked("agent: enabled=1\n", Some(r#"{"return": {}}"#)).await);
        assert!(!asked("agent: 1\n", Some(refusal)).await, "its refusal was not noticed");
        assert!(!asked("name: x\n", None).await, "there is none");
        let nobody = Layout::new(Some("/nonexistent".into()));
        assert!(!ask_agent(&nobody, 100).await);
    }
}
