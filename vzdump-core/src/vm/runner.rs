// SPDX-License-Identifier: MIT OR Apache-2.0
//! Starts and watches the QEMU process of a VM; `stop` ends it.
//!
//! QEMU is spawned in a process group of its own, so it outlives this program and its terminal. It
//! keeps its standard error in `qemu.log`, and writes and locks its pid file, which is how later
//! processes find it. A start is complete only when QEMU answers over QMP; everything that goes
//! wrong before ends QEMU again and shows what it said.

mod foreign;
mod live;
mod stop;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use provider_api::GuestKind;
use qmp_client::commands::{Cont, QueryStatus, RunState, SystemReset};
use qmp_client::{Options as QmpOptions, Session};
use rustix::fs::{Mode, OFlags};
use tokio::process::{Child, Command};

use super::process::VmProcess;
use super::qemu_cmdline::{self, CmdlineError, CommandLine, DiskFile, Input};
use super::tpm::{self, TpmError};
use crate::config::ConfigError;
use crate::config::guest::{DiskEntry, VmConfig};
use crate::job::chain;
use crate::journal::by_hand;
use crate::layout::{self, Layout, LayoutError, Monitor};
use crate::lock::{FileLock, LockError};
use crate::storage::{ImageFormat, StorageError, StorageSet, VolumeId, image_size};
use crate::tools::{MissingTool, Tools};

pub use live::{LIVE_LOCK, RESTORE_LOCK, check_config, live_advice, start_live};
pub use stop::{StopOptions, Stopped, end_if, shut_down, stop};

/// Longest start until QMP answers; loading a large firmware on a busy host takes seconds.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How often the monitor of a starting QEMU is tried; it cannot announce itself.
const START_POLL: Duration = Duration::from_millis(20);
/// How long another start or stop of the same VM is waited for.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
/// A monitor that does not greet in this time is used by somebody else.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);
/// A killed process is gone at once unless it hangs in the kernel.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// The largest block that requests past the page cache are a multiple of.
const BLOCK_BYTES_MAX: u64 = 4096;
/// What QEMU says of a disk that ends within such a block, between words about permissions.
const UNALIGNED: &str = "not a multiple of request alignment";
/// How much of QEMU's last words is shown.
const MESSAGE_MAX_BYTES: u64 = 4096;

/// Why a VM was not started, stopped or asked.
#[derive(Debug, thiserror::Error)]
pub enum RunnerError {
    /// There is no such VM.
    #[error("The VM {id} does not exist: there is no '{path}'.")]
    NoConfig {
        /// The number.
        id: u32,
        /// The file that is missing.
        path: PathBuf,
    },
    /// It is running.
    #[error("The VM {id} is already running (process {pid}).")]
    AlreadyRunning {
        /// The number.
        id: u32,
        /// Its QEMU.
        pid: i32,
    },
    /// Its configuration says that something else is being done with it.
    #[error("The VM {id} is locked ({lock}); {}.", lock_advice(.lock))]
    Locked {
        /// The number.
        id: u32,
        /// What locked it.
        lock: String,
    },
    /// Its disks are not complete.
    #[error("{}.", live_advice(*.id))]
    Incomplete {
        /// The number.
        id: u32,
    },
    /// Its QEMU was started for a backup, and no guest can run in it.
    #[error(
        "The VM {id} is being backed up by a QEMU that has nothing but its disks (process {pid}); \
         start it when the backup has ended."
    )]
    OnlyDisks {
        /// The number.
        id: u32,
        /// Its QEMU.
        pid: i32,
    },
    /// QEMU's monitor refused or did not answer.
    #[error("Cannot {what} the VM {id}.")]
    Qmp {
        /// What was being done.
        what: &'static str,
        /// The number.
        id: u32,
        /// Why.
        source: qmp_client::Error,
    },
    /// QEMU ended or did not answer.
    #[error("QEMU did not start the VM {id}: {message}")]
    Start {
        /// The number.
        id: u32,
        /// What QEMU said.
        message: String,
    },
    /// QEMU cannot be ended.
    #[error(
        "The QEMU of the VM {id} (process {pid}) did not end within {after_s} s of being killed."
    )]
    Unkillable {
        /// The number.
        id: u32,
        /// Its QEMU.
        pid: i32,
        /// How long was waited.
        after_s: u64,
    },
    /// The configuration gives no command line.
    #[error("The VM {id} cannot be started as it is configured.")]
    Cmdline {
        /// The number.
        id: u32,
        /// Why.
        source: CmdlineError,
    },
    /// Whether the bitmaps of a disk can be believed is not known.
    #[error(
        "It is not known whether a disk of the VM {id} was written while its QEMU did not run."
    )]
    Bitmaps {
        /// The number.
        id: u32,
        /// Why.
        source: StorageError,
    },
    /// The configuration could not be read.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A directory or socket.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Another task works on the VM.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A program is missing.
    #[error(transparent)]
    Tool(#[from] MissingTool),
    /// Its TPM.
    #[error("The TPM of the VM {id} does not run.")]
    Tpm {
        /// The number.
        id: u32,
        /// Why.
        source: TpmError,
    },
    /// QEMU's process or its files.
    #[error("Cannot {what} of the VM {id}.")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The number.
        id: u32,
        /// Why.
        source: io::Error,
    },
}

/// How to start a VM.
#[derive(Debug, Clone, Copy, Default)]
pub struct StartOptions {
    /// Do not let the guest run yet.
    pub paused: bool,
}

/// How to start a VM whose disks are to be backed up.
#[derive(Debug, Clone, Copy)]
pub struct BackupStart<'a> {
    /// What its process is found by, see [`VmProcess::of_mark`].
    pub mark: &'a str,
    /// The guest is to run in it; else it need only have the disks.
    pub is_to_run: bool,
    /// The disks that are backed up.
    pub disks: &'a [String],
}

/// A VM that was started.
#[derive(Debug, Clone)]
pub struct Started {
    /// Its QEMU.
    pub process: VmProcess,
    /// What the administrator should know, one sentence each.
    pub notices: Vec<String>,
}

/// What a VM is doing.
#[derive(Debug, Clone, serde::Serialize)]
pub struct VmStatus {
    /// Its number.
    pub id: u32,
    /// Its name.
    pub name: Option<String>,
    /// Whether its QEMU runs.
    pub running: bool,
    /// Its QEMU.
    #[serde(flatten)]
    pub process: Option<VmProcess>,
    /// QEMU's word for the guest's state, when its monitor was free.
    pub qmp_status: Option<String>,
    /// QEMU's version, when its monitor was free.
    pub qemu_version: Option<String>,
}

/// The QEMU process of a VM, if it runs.
///
/// # Errors
/// [`RunnerError::Io`].
pub fn find_process(layout: &Layout, id: u32) -> Result<Option<VmProcess>, RunnerError> {
    VmProcess::of_pid_file(&layout.pid_file(id)).map_err(|source| RunnerError::Io {
        what: "read the pid file",
        id,
        source,
    })
}

/// Reads the configuration of a VM that must exist.
///
/// # Errors
/// [`RunnerError::NoConfig`], [`RunnerError::Config`].
pub fn read_config(layout: &Layout, id: u32) -> Result<VmConfig, RunnerError> {
    let path = layout.vm_config_path(id);
    VmConfig::read(&path)?.ok_or(RunnerError::NoConfig { id, path })
}

/// Starts a VM. If its QEMU is there and only waits to be let run (it was started paused, for a
/// backup or by hand, or the guest has switched off during a backup), the guest runs from now on.
///
/// # Errors
/// [`RunnerError`]; nothing of a new QEMU is left running then, also when the future is dropped.
pub async fn start(
    layout: &Layout,
    tools: &Tools,
    storages: &StorageSet,
    id: u32,
    options: StartOptions,
) -> Result<Started, RunnerError> {
    layout::check_guest_id(id)?;
    let _lock = power_lock(layout, id).await?;
    let config = read_config(layout, id)?;
    refuse_locked(&config, id)?;
    if let Some(process) = find_process(layout, id)? {
        if options.paused {
            return Err(RunnerError::AlreadyRunning { id, pid: process.pid });
        }
        let started = let_run(layout, id, process).await?;
        by_hand::settled(layout, GuestKind::Qemu, id).await;
        return Ok(started);
    }
    let find = |disk: &DiskEntry| find_file(storages, disk);
    let input = Input { layout, id, find: &find, paused: options.paused, mark: None, live: &[] };
    let line = qemu_cmdline::build(&config, &input)
        .map_err(|source| RunnerError::Cmdline { id, source })?;
    let written = foreign::distrust_written(tools, storages, id, &config, None).await?;
    let started = launch(layout, tools, id, line.with_notices(&written)).await?;
    by_hand::settled(layout, GuestKind::Qemu, id).await;
    Ok(started)
}

/// Starts a VM that is off for its backup, without letting its guest run.
///
/// The QEMU is one in which the guest can run, because somebody may want it to. A VM for which
/// there is no such QEMU gets one with nothing but the disks, unless it `is_to_run`; the notices
/// say why. A lock in the configuration is ignored.
///
/// # Errors
/// As [`start`].
pub async fn start_for_backup(
    layout: &Layout,
    tools: &Tools,
    storages: &StorageSet,
    id: u32,
    options: BackupStart<'_>,
) -> Result<Started, RunnerError> {
    let _lock = power_lock(layout, id).await?;
    let config = read_config(layout, id)?;
    if let Some(VmProcess { pid, .. }) = find_process(layout, id)? {
        return Err(RunnerError::AlreadyRunning { id, pid });
    }
    let find = |disk: &DiskEntry| find_file(storages, disk);
    let input =
        Input { layout, id, find: &find, paused: true, mark: Some(options.mark), live: &[] };
    let fault = |source| RunnerError::Cmdline { id, source };
    let (mut written, error) =
        match foreign::distrust_written(tools, storages, id, &config, None).await {
            Ok(written) => match qemu_cmdline::build(&config, &input).map_err(fault) {
                Ok(line) => match launch(layout, tools, id, line.with_notices(&written)).await {
                    // It does not work on this host, as little as one with a wrong configuration.
                    Err(error @ RunnerError::Start { .. }) => (written, error),
                    other => return other,
                },
                Err(error) => (written, error),
            },
            // Perhaps of a disk that is not backed up.
            Err(error) => (Vec::new(), error),
        };
    if options.is_to_run {
        return Err(error);
    }
    if matches!(error, RunnerError::Bitmaps { .. }) {
        let disks = Some(options.disks);
        written = foreign::distrust_written(tools, storages, id, &config, disks).await?;
    }
    let is_template = config.is_template();
    let mut line = qemu_cmdline::build_disks_only(&config, &input, options.disks, is_template)
        .map_err(fault)?;
    line.notices.extend(if is_template { Vec::new() } else { notices_of(&error) });
    launch(layout, tools, id, line.with_notices(&written)).await
}

/// Why a QEMU has nothing but disks.
fn notices_of(error: &RunnerError) -> Vec<String> {
    match error {
        RunnerError::Cmdline { source: CmdlineError::Unknown { unknown }, .. } => {
            unknown.iter().map(|key| format!("ignoring the unknown key {key}")).collect()
        }
        error => vec![format!("starting QEMU with nothing but the disks: {}", chain(error))],
    }
}

/// Checks that a VM could be started as it is configured now.
///
/// # Errors
/// [`RunnerError`].
pub fn check_startable(
    layout: &Layout,
    tools: &Tools,
    storages: &StorageSet,
    id: u32,
) -> Result<(), RunnerError> {
    let config = read_config(layout, id)?;
    refuse_locked(&config, id)?;
    let find = |disk: &DiskEntry| find_file(storages, disk);
    let input = Input { layout, id, find: &find, paused: true, mark: None, live: &[] };
    qemu_cmdline::build(&config, &input).map_err(|source| RunnerError::Cmdline { id, source })?;
    tools.qemu_system()?;
    Ok(())
}

/// Refuses a VM of which its configuration says that something else is being done with it.
pub(super) fn refuse_locked(config: &VmConfig, id: u32) -> Result<(), RunnerError> {
    match config.get("lock") {
        Some(LIVE_LOCK) => Err(RunnerError::Incomplete { id }),
        Some(lock) => Err(RunnerError::Locked { id, lock: lock.to_owned() }),
        None => Ok(()),
    }
}

fn lock_advice(lock: &str) -> &'static str {
    match lock {
        RESTORE_LOCK => {
            "a restore that did not end has removed its disks, and another `vzdump restore --force` \
             brings it back"
        }
        _ => "remove the key 'lock' if that is left over",
    }
}

async fn launch(
    layout: &Layout,
    tools: &Tools,
    id: u32,
    line: CommandLine,
) -> Result<Started, RunnerError> {
    for socket in sockets(layout, id) {
        layout::check_socket_path(&socket)?;
    }
    let qemu = tools.qemu_system()?;
    layout.make_vm_run_dir(id)?;
    let tpm = match &line.tpm {
        Some(state) => {
            let tpm = tpm::start(layout, id, state).await;
            let tpm = Tpm(Some(tpm.map_err(|source| RunnerError::Tpm { id, source })?));
            #[cfg(debug_assertions)]
            crate::job::kill_point::at("tpm:started");
            Some(tpm)
        }
        None => None,
    };
    let mut starting = Starting::spawn(layout, &qemu, id, &line)?;
    match starting.ready().await {
        Ok(process) => {
            starting.child = None;
            // From now on it ends with QEMU.
            tpm.into_iter().for_each(|mut tpm| drop(tpm.0.take()));
            let mut notices = line.notices;
            notices.extend(tail(&starting.log).lines().map(str::to_owned));
            Ok(Started { process, notices })
        }
        Err(error) => {
            starting.end().await;
            Err(error)
        }
    }
}

/// Lets the guest of a QEMU run that has not run it yet, or whose guest has switched off.
async fn let_run(layout: &Layout, id: u32, process: VmProcess) -> Result<Started, RunnerError> {
    let already = RunnerError::AlreadyRunning { id, pid: process.pid };
    let Ok(session) = connect(layout, id).await else { return Err(already) };
    let fault = |what| move |source| RunnerError::Qmp { what, id, source };
    let status = session.execute(QueryStatus).await.map_err(fault("ask for the state of"))?.status;
    let notice = match status {
        RunState::Prelaunch => "its QEMU had been started before; the guest runs from now on",
        RunState::Shutdown => "its guest had switched off; it is started again in the same QEMU",
        _ => return Err(already),
    };
    let arguments = process.arguments().map_err(|source| RunnerError::Io {
        what: "look at the QEMU",
        id,
        source,
    })?;
    if qemu_cmdline::is_disks_only(&arguments) {
        return Err(RunnerError::OnlyDisks { id, pid: process.pid });
    }
    if status == RunState::Shutdown {
        session.execute(SystemReset).await.map_err(fault("reset"))?;
        let deadline = Instant::now() + STATUS_TIMEOUT;
        // The reset comes after its reply, and until then the guest cannot go on.
        while session.execute(QueryStatus).await.map_err(fault("reset"))?.status
            == RunState::Shutdown
            && Instant::now() < deadline
        {
            tokio::time::sleep(START_POLL).await;
        }
    }
    session.execute(Cont).await.map_err(fault("let run"))?;
    Ok(Started { process, notices: vec![notice.to_owned()] })
}

async fn power_lock(layout: &Layout, id: u32) -> Result<FileLock, LockError> {
    power_lock_within(layout, id, LOCK_TIMEOUT).await
}

async fn power_lock_within(
    layout: &Layout,
    id: u32,
    limit: Duration,
) -> Result<FileLock, LockError> {
    let path = layout.vm_power_lock_path(id);
    FileLock::acquire(&path, &format!("The power state of VM {id}"), limit).await
}

fn sockets(layout: &Layout, id: u32) -> Vec<PathBuf> {
    let monitors = Monitor::ALL.map(|monitor| layout.qmp_socket(id, monitor));
    let others = [layout.agent_socket(id), layout.serial_socket(id)];
    monitors.into_iter().chain(others).collect()
}

/// The file of a disk: that it exists, what it is, and whether it can bypass the page cache.
fn find_file(storages: &StorageSet, disk: &DiskEntry) -> Result<DiskFile, StorageError> {
    let path = storages.resolve(&disk.volume)?;
    let data = storages.resolve_data(&disk.volume)?;
    let fault = |path: &Path, source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => {
            StorageError::NotFound { volume: disk.volume.clone(), path: path.to_owned() }
        }
        _ => StorageError::Io { what: "open", path: path.to_owned(), source },
    };
    let meta = fs::metadata(&path).map_err(|error| fault(&path, error))?;
    let bytes = data.as_ref().unwrap_or(&path);
    let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    let direct = match rustix::fs::open(bytes, flags, Mode::empty()) {
        Ok(_) => true,
        Err(rustix::io::Errno::INVAL) => false,
        Err(errno) => return Err(fault(bytes, errno.into())),
    };
    let is_device = meta.file_type().is_block_device();
    let is_aligned = is_device || meta.len().is_multiple_of(BLOCK_BYTES_MAX);
    let size_bytes = if disk.key.starts_with("efidisk") {
        let volume = disk.volume.parse::<VolumeId>();
        let format = volume.map_or(ImageFormat::Raw, |volume| volume.format());
        Some(image_size(&path, format)?)
    } else {
        None
    };
    Ok(DiskFile { is_device, direct, is_aligned, size_bytes, path, data })
}

/// The TPM of a QEMU that has not answered yet; ended when dropped.
struct Tpm(Option<Child>);

impl Drop for Tpm {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.start_kill();
        }
    }
}

/// A QEMU that has not answered yet; ended when dropped.
struct Starting {
    id: u32,
    child: Option<Child>,
    log: PathBuf,
    monitor: PathBuf,
    sockets: Vec<PathBuf>,
}

impl Starting {
    fn spawn(
        layout: &Layout,
        qemu: &Path,
        id: u32,
        line: &CommandLine,
    ) -> Result<Self, RunnerError> {
        let fault = |what| move |source| RunnerError::Io { what, id, source };
        let log = layout.qemu_log(id);
        let stderr = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&log)
            .map_err(fault("make the log file"))?;
        let stdout = stderr.try_clone().map_err(fault("make the log file"))?;
        let sockets = sockets(layout, id);
        // Left over from a QEMU that was killed. Gone now, so that no client connects to it.
        for socket in &sockets {
            let _ = fs::remove_file(socket);
        }
        let child = Command::new(qemu)
            .args(&line.args)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr)
            .current_dir("/")
            .process_group(0)
            .spawn()
            .map_err(fault("start the QEMU"))?;
        let monitor = layout.qmp_socket(id, Monitor::Runner);
        Ok(Self { id, child: Some(child), log, monitor, sockets })
    }

    fn error(&self, why: &str) -> RunnerError {
        let said = tail(&self.log);
        let advice = if said.contains(UNALIGNED) {
            " The size of this disk does not fit its cache mode: use cache=writeback for it."
        } else {
            ""
        };
        let said = if said.is_empty() { "it said nothing." } else { &said };
        RunnerError::Start { id: self.id, message: format!("{why}: {said}{advice}") }
    }

    /// Waits until QEMU answers over QMP.
    async fn ready(&mut self) -> Result<VmProcess, RunnerError> {
        let deadline = Instant::now() + START_TIMEOUT;
        let io = |source| RunnerError::Io { what: "watch the QEMU", id: self.id, source };
        loop {
            let child = self.child.as_mut().expect("it is there until it was waited for");
            if let Some(status) = child.try_wait().map_err(io)? {
                return Err(self.error(&exit_text(status)));
            }
            let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
            if self.monitor.exists()
                && let Ok(session) = Session::connect(&self.monitor, QmpOptions::default()).await
                && session.execute(QueryStatus).await.is_ok()
                && let Some(process) = pid.map(VmProcess::of_pid).transpose().map_err(io)?.flatten()
            {
                return Ok(process);
            }
            if Instant::now() >= deadline {
                let why = format!("no answer within {} s", START_TIMEOUT.as_secs());
                return Err(self.error(&why));
            }
            tokio::time::sleep(START_POLL).await;
        }
    }

    /// Ends QEMU and waits for its end.
    async fn end(mut self) {
        if let Some(mut child) = self.child.take() {
            // Fails only for a process that has already ended.
            let _ = child.start_kill();
            let _ = tokio::time::timeout(KILL_TIMEOUT, child.wait()).await;
        }
        self.remove_sockets();
    }

    fn remove_sockets(&self) {
        for socket in &self.sockets {
            let _ = fs::remove_file(socket);
        }
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.start_kill();
            self.remove_sockets();
        }
    }
}

fn exit_text(status: ExitStatus) -> String {
    match status.code() {
        Some(code) => format!("it ended with code {code}"),
        None => format!("it was ended ({status})"),
    }
}

/// The end of a log file as one readable text.
fn tail(path: &Path) -> String {
    let read = || {
        let mut file = File::open(path)?;
        let begin = file.metadata()?.len().saturating_sub(MESSAGE_MAX_BYTES);
        file.seek(SeekFrom::Start(begin))?;
        let mut bytes = Vec::new();
        file.take(MESSAGE_MAX_BYTES).read_to_end(&mut bytes)?;
        Ok::<_, io::Error>(bytes)
    };
    // The text only helps people; without it the error still stands.
    String::from_utf8_lossy(&read().unwrap_or_default()).trim().to_owned()
}

async fn connect(layout: &Layout, id: u32) -> qmp_client::Result<Session> {
    let options = QmpOptions {
        greeting_timeout: STATUS_TIMEOUT,
        command_timeout: STATUS_TIMEOUT,
        ..QmpOptions::default()
    };
    Session::connect(layout.qmp_socket(id, Monitor::Runner), options).await
}

/// Tells what a VM is doing.
///
/// # Errors
/// [`RunnerError`].
pub async fn status(layout: &Layout, id: u32) -> Result<VmStatus, RunnerError> {
    layout::check_guest_id(id)?;
    let config = read_config(layout, id)?;
    let process = find_process(layout, id)?;
    let mut status = VmStatus {
        id,
        name: config.name().map(str::to_owned),
        running: process.is_some(),
        process,
        qmp_status: None,
        qemu_version: None,
    };
    if process.is_some() {
        match connect(layout, id).await {
            Ok(session) => {
                status.qemu_version = Some(session.version().to_string());
                let reply = session.execute(QueryStatus).await.ok();
                status.qmp_status = reply.map(|reply| reply.status.as_str().to_owned());
            }
            Err(error) => tracing::debug!(vm = id, %error, "the monitor does not answer"),
        }
    }
    Ok(status)
}

/// The numbers of all VMs with a configuration.
///
/// # Errors
/// [`ConfigError::Read`].
pub fn list_ids(layout: &Layout) -> Result<Vec<u32>, ConfigError> {
    let dir = layout.vm_config_dir();
    let fault = |source| ConfigError::Read { path: dir.clone(), source };
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(fault(error)),
    };
    let mut ids = Vec::new();
    for entry in entries {
        let name = entry.map_err(fault)?.file_name();
        let id = name.to_str().and_then(|name| name.strip_suffix(".conf")?.parse().ok());
        ids.extend(id.filter(|id| layout::check_guest_id(*id).is_ok()));
    }
    ids.sort_unstable();
    Ok(ids)
}

#[cfg(test)]
mod tests;
