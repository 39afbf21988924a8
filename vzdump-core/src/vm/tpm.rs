// SPDX-License-Identifier: MIT OR Apache-2.0
//! The emulator of a VM's TPM: a process `swtpm` beside QEMU that keeps the TPM's state in a volume.
//!
//! It is started before its QEMU and ends by itself when QEMU closes the connection, also when QEMU is
//! killed. One that no QEMU ever connected to, or that somebody has stopped by a signal, is found by the
//! socket in its command line, and ended by the next start or stop of its VM, or the doctor.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tokio::process::{Child, Command};

use super::process::VmProcess;
use super::runner;
use crate::blocking;
use crate::config::guest::DiskEntry;
use crate::layout::{Layout, LayoutError, check_socket_path};
use crate::lock::FileLock;

/// The key of the TPM's state.
pub(crate) const KEY: &str = "tpmstate0";
/// The size of the volume, and the most that is believed of one.
pub(crate) const STATE_BYTES: u64 = 4 << 20;
/// What begins a state file that is in use.
const MAGIC_BYTES: usize = 8;
/// Making keys and certificates of a new TPM takes a second; a busy host has others to do first.
const SETUP_WITHIN: Duration = Duration::from_secs(60);
const START_WITHIN: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);
/// It ends with its QEMU, within a moment.
const END_WITHIN: Duration = Duration::from_secs(5);
const KILL_WITHIN: Duration = Duration::from_secs(10);
/// How much of its words is shown.
const SAID_CHARS: usize = 1000;
/// Where programs are looked for, beside `PATH`.
const SYSTEM_DIRS: &str = "/usr/bin:/usr/local/bin:/bin";

/// Why a TPM is not there.
#[derive(Debug, thiserror::Error)]
pub enum TpmError {
    /// A program is missing.
    #[error("The program '{0}' was not found: install Debian's package {0} for a VM with a TPM.")]
    Missing(&'static str),
    /// The path of its state.
    #[error("The path '{0}' cannot be given to swtpm: it must be text without a comma.")]
    Path(PathBuf),
    /// Its socket.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// It did not start.
    #[error("swtpm did not start: {0}")]
    Start(String),
    /// An older one is in the way.
    #[error("The process {0}, a swtpm that was left over, does not end.")]
    Unkillable(i32),
    /// Its process or files.
    #[error("Cannot {what}.")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// A VM's TPM, as its configuration says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TpmState {
    /// The file of its state.
    pub path: PathBuf,
    /// Version 2.0; else 1.2.
    pub is_version_2: bool,
}

/// Reads the version of a TPM from its volume's options.
pub(crate) fn is_version_2(disk: &DiskEntry) -> Result<bool, String> {
    match disk.options.get("version") {
        Some("v2.0") => Ok(true),
        // What Proxmox VE means when nothing is said.
        None | Some("v1.2") => Ok(false),
        Some(_) => Err("'version' is not one of v1.2, v2.0.".to_owned()),
    }
}

/// What the command line of a VM's swtpm has, and nobody else's.
fn control(layout: &Layout, id: u32) -> Result<String, TpmError> {
    let socket = layout.tpm_socket(id);
    check_socket_path(&socket)?;
    Ok(format!("type=unixio,path={},mode=0600", plain(&socket)?))
}

/// A path that is one word for swtpm.
fn plain(path: &Path) -> Result<&str, TpmError> {
    let text = path.to_str().filter(|text| !text.contains(','));
    text.ok_or_else(|| TpmError::Path(path.to_owned()))
}

/// The swtpm of a VM, if it runs or is stopped by a signal.
///
/// # Errors
/// `/proc` cannot be listed.
pub fn find(layout: &Layout, id: u32) -> Result<Option<VmProcess>, TpmError> {
    let words = ["--ctrl".to_owned(), control(layout, id)?];
    let fault = |source| TpmError::Io { what: "look for the VM's swtpm", source };
    VmProcess::of_arguments(&words).map_err(fault)
}

/// Starts the TPM of a VM, whose QEMU connects to it next. Dropping what is returned leaves it running.
///
/// # Errors
/// [`TpmError`]; it does not run then, also when the future is dropped.
pub(super) async fn start(layout: &Layout, id: u32, state: &TpmState) -> Result<Child, TpmError> {
    end(layout, id).await?;
    let program = program("swtpm")?;
    if is_new(&state.path)? {
        set_up(state).await?;
    }
    let log = layout.tpm_log(id);
    let fault = |what| move |source| TpmError::Io { what, source };
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let said = options.open(&log).map_err(fault("make the log of swtpm"))?;
    let mut command = Command::new(program);
    command.arg("socket").arg("--tpmstate");
    command.arg(format!("backend-uri=file://{},mode=0600", plain(&state.path)?));
    command.arg("--ctrl").arg(control(layout, id)?);
    command.arg("--terminate");
    if state.is_version_2 {
        command.arg("--tpm2");
    }
    let also = said.try_clone().map_err(fault("make the log of swtpm"))?;
    command.stdin(Stdio::null()).stdout(also).stderr(said).current_dir("/");
    // Out of reach of a Ctrl-C in the terminal of whoever starts the VM.
    let child = command.process_group(0).spawn().map_err(fault("start swtpm"))?;
    let mut starting = Starting { child: Some(child), socket: layout.tpm_socket(id), log };
    starting.ready().await?;
    starting.child.take().ok_or_else(|| TpmError::Start("it is gone".to_owned()))
}

/// One that does not listen yet; ended when dropped.
struct Starting {
    child: Option<Child>,
    socket: PathBuf,
    log: PathBuf,
}

impl Starting {
    async fn ready(&mut self) -> Result<(), TpmError> {
        let deadline = Instant::now() + START_WITHIN;
        loop {
            let Some(child) = &mut self.child else { return Ok(()) };
            let fault = |source| TpmError::Io { what: "watch swtpm", source };
            if let Some(status) = child.try_wait().map_err(fault)? {
                return Err(TpmError::Start(format!("it ended ({status}): {}", said(&self.log))));
            }
            if self.socket.exists() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let seconds = START_WITHIN.as_secs();
                let said = said(&self.log);
                let why = format!("it does not listen within {seconds} s: {said}");
                return Err(TpmError::Start(why));
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.start_kill();
            let _ = fs::remove_file(&self.socket);
        }
    }
}

/// Whether nothing was ever stored in a state.
fn is_new(path: &Path) -> Result<bool, TpmError> {
    let mut begin = [0; MAGIC_BYTES];
    let read = File::open(path).and_then(|mut file| file.read(&mut begin));
    let read = read.map_err(|source| TpmError::Io { what: "read the state of the TPM", source })?;
    Ok(begin[..read].iter().all(|byte| *byte == 0))
}

/// Has a new TPM made with the keys and certificates that a bought one has.
async fn set_up(state: &TpmState) -> Result<(), TpmError> {
    let program = match program("swtpm_setup") {
        Err(TpmError::Missing(_)) => return Err(TpmError::Missing("swtpm-tools")),
        other => other?,
    };
    let mut command = Command::new(program);
    command.arg("--tpmstate").arg(format!("file://{}", plain(&state.path)?));
    command.args(["--createek", "--create-ek-cert", "--create-platform-cert", "--lock-nvram"]);
    command.arg("--not-overwrite");
    if rustix::process::geteuid().is_root() {
        // Else it becomes a user who cannot reach the volume.
        command.args(["--runas", "0"]);
    }
    if state.is_version_2 {
        command.arg("--tpm2");
    }
    command.stdin(Stdio::null()).kill_on_drop(true).process_group(0);
    let output = tokio::time::timeout(SETUP_WITHIN, command.output()).await;
    let seconds = SETUP_WITHIN.as_secs();
    let output = output
        .map_err(|_| TpmError::Start(format!("swtpm_setup did not end within {seconds} s")))?
        .map_err(|source| TpmError::Io { what: "start swtpm_setup", source })?;
    if output.status.success() {
        // What is in it is secret, and swtpm_setup lets a group read it.
        let mode = fs::Permissions::from_mode(0o600);
        let set = fs::set_permissions(&state.path, mode);
        return set.map_err(|source| TpmError::Io { what: "protect the state of the TPM", source });
    }
    let text = [output.stdout, output.stderr].concat();
    let last = last_words(&String::from_utf8_lossy(&text));
    Err(TpmError::Start(format!("swtpm_setup ended ({}): {last}", output.status)))
}

/// Ends the swtpm of a VM whose QEMU does not run, and removes its socket.
///
/// # Errors
/// [`TpmError`].
pub(crate) async fn end(layout: &Layout, id: u32) -> Result<(), TpmError> {
    let socket = layout.tpm_socket(id);
    // A VM without a TPM costs no look at all processes.
    if !socket.exists() && !layout.tpm_log(id).exists() {
        return Ok(());
    }
    let fault = |source| TpmError::Io { what: "end swtpm", source };
    if let Some(process) = find(layout, id)?
        && let Some(handle) = process.open().map_err(fault)?
    {
        // A process that is stopped by a signal does not notice that its QEMU has ended.
        handle.signal(Signal::CONT).map_err(fault)?;
        let is_alone = runner::find_process(layout, id).is_ok_and(|qemu| qemu.is_none());
        if !(is_alone && handle.wait(END_WITHIN).await.map_err(fault)?) {
            handle.signal(Signal::TERM).map_err(fault)?;
            if !handle.wait(END_WITHIN).await.map_err(fault)? {
                handle.signal(Signal::KILL).map_err(fault)?;
                if !handle.wait(KILL_WITHIN).await.map_err(fault)? {
                    return Err(TpmError::Unkillable(process.pid));
                }
            }
        }
    }
    let _ = fs::remove_file(socket);
    Ok(())
}

/// Ends the swtpm of every VM whose QEMU does not run (`doctor --fix`); what went wrong, in words.
pub async fn sweep(layout: &Layout) -> Vec<String> {
    let dir = layout.vm_runs_dir();
    let listed = blocking::run(move || {
        let names =
            fs::read_dir(dir)?.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        Ok(names.filter_map(|name| name.parse().ok()).collect::<Vec<u32>>())
    });
    let mut problems = Vec::new();
    // Without the directory no VM was ever started.
    for id in listed.await.unwrap_or_default() {
        let path = layout.vm_power_lock_path(id);
        // A VM that is being started or stopped is left alone.
        let Ok(_held) = FileLock::try_acquire(&path, "The power state of a VM") else { continue };
        if !matches!(runner::find_process(layout, id), Ok(None)) {
            continue;
        }
        if let Err(error) = end(layout, id).await {
            problems.push(format!("the TPM of VM {id}: {}", crate::job::chain(&error)));
        }
    }
    problems
}

fn program(name: &'static str) -> Result<PathBuf, TpmError> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&paths).chain(std::env::split_paths(SYSTEM_DIRS));
    let found = dirs.filter(|dir| dir.is_absolute()).map(|dir| dir.join(name));
    found.into_iter().find(|path| path.is_file()).ok_or(TpmError::Missing(name))
}

fn said(log: &Path) -> String {
    last_words(&fs::read_to_string(log).unwrap_or_default())
}

fn last_words(text: &str) -> String {
    let text = text.trim();
    let skipped = text.chars().count().saturating_sub(SAID_CHARS);
    match text.chars().skip(skipped).collect::<String>() {
        said if said.is_empty() => "it said nothing".to_owned(),
        said => crate::task_log::clean(&said),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_could_bring_options_is_refused() {
        assert!(plain(Path::new("/a/b,mode=0666")).is_err());
        assert_eq!(plain(Path::new("/a/b")).unwrap(), "/a/b");
    }

    #[test]
    fn a_state_is_new_until_something_is_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        for (content, new) in [(&b""[..], true), (&[0; 32], true), (b"\0\0swtpm", false)] {
            fs::write(&path, content).unwrap();
            assert_eq!(is_new(&path).unwrap(), new, "{content:?}");
        }
        assert!(is_new(&dir.path().join("gone")).is_err());
    }

    #[tokio::test]
    async fn a_tpm_is_found_and_ended_even_when_it_is_stopped_by_a_signal() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(Some(dir.path().to_owned()));
        layout.make_vm_run_dir(100).unwrap();
        let path = dir.path().join("state.raw");
        File::create(&path).unwrap().set_len(STATE_BYTES).unwrap();
        let state = TpmState { path: path.clone(), is_version_2: true };
        let child = start(&layout, 100, &state).await.unwrap();
        assert!(!is_new(&path).unwrap(), "nothing was made");
        let found = find(&layout, 100).unwrap().unwrap();
        assert_eq!(u32::try_from(found.pid).ok(), child.id());
        assert_eq!(find(&layout, 101).unwrap(), None);
        found.open().unwrap().unwrap().signal(Signal::STOP).unwrap();
        assert_eq!(sweep(&layout).await, Vec::<String>::new());
        assert_eq!(find(&layout, 100).unwrap(), None);
        assert!(!layout.tpm_socket(100).exists());
        drop(child);
        // A second start uses what the first one made.
        let before = fs::read(&path).unwrap();
        let mut child = start(&layout, 100, &state).await.unwrap();
        assert!(fs::read(&path).unwrap()[..MAGIC_BYTES] == before[..MAGIC_BYTES]);
        child.kill().await.unwrap();
        end(&layout, 100).await.unwrap();
    }
}
