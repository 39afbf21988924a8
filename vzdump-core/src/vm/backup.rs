// SPDX-License-Identifier: MIT OR Apache-2.0
//! The backup of a VM, as [`GuestDriver`] asks for it.
//!
//! ```text
//!  prepare        status, disks                   cleanup       –
//!  enter_mode     QEMU as the mode needs it,      leave_mode    session closed, QEMU as it was
//!                 session, sizes (`power`)
//!  acquire        images, blockdev-add            release       blockdev-del, images freed
//!  point_in_time  freeze or pause, setup, thaw    teardown      query, backup-access-teardown,
//!  resume         guest runs again                              which ends the exports
//!  open_source    nbd-server-start, exports,      close_source  files withdrawn, nbd-server-stop,
//!                 files if they are wanted                      after teardown
//! ```
//!
//! What was begun is noted here and in the journal before it is done, so that the right column
//! undoes it wherever the left one stopped. When QEMU is gone, so is everything within it, and
//! only files are left to be removed.

mod disks;
pub(crate) mod file;
mod fleecing;
pub(crate) mod ops;
pub(crate) mod power;
mod regions;
mod relay;
mod source;
mod stats;
mod tpm;
mod watch;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use provider_api::{BitmapRequest, BoxFuture, Capabilities, GuestKind, Uuid, VolumeInfo};
use qmp_client::backup::{
    self, AccessInfo, BackupAccess, BitmapMode, Device, Readable, SetupRequest,
};
use qmp_client::commands::{QueryStatus, RunState};
use qmp_client::{Error, EventStream, Session};

use self::disks::Disk;
use self::file::FileDisk;
use self::fleecing::Fleecing;
pub use self::fleecing::FleecingOptions;
pub(crate) use self::fleecing::is_ours as is_our_fleecing_image;
use self::power::Power;
pub use self::regions::ExportRegions;
use self::relay::Relay;
use self::tpm::Tpm;
use super::freeze_guard::{self, FreezeLimits, Frozen, GuardCommand, NotFrozen};
use super::runner;
use crate::config::guest::{DiskEntry, VmConfig};
use crate::guest::{
    AccessStats, BackupMode, GuestDriver, GuestError, GuestSource, PointInTime, Task, VolumeReport,
};
use crate::host_budget::RamShare;
use crate::job::{BackupOptions, JobContext, chain};
use crate::journal::{Entry, FileExport, ProcessStamp};
use crate::layout::{Layout, Monitor};
use crate::storage::{StorageSet, VolumeId};
use crate::task_log::{TaskSink, bitmap_status, clean, size};
use crate::tools::Tools;

/// The command all of this stands on.
const SETUP_COMMAND: &str = "backup-access-setup";

/// QEMU's RAM for old data of a disk, if nothing is said of it.
const BUFFER_BYTES_DEFAULT: u64 = 64 << 20;

/// A guest's part of the host's RAM that is too small to be of use.
const RAM_BYTES_MIN: u64 = 1 << 20;

/// How long QEMU keeps the access of a job that does not live any more.
const LEASE_S: u32 = 60;

/// How long the end of a QEMU that has closed its monitor is waited for.
const END_WAIT: Duration = Duration::from_secs(10);

/// Between two tries to thaw a guest.
const THAW_POLL: Duration = Duration::from_secs(1);

/// For one request of our own to the NBD server.
const NBD_TIMEOUT: Duration = Duration::from_secs(300);

/// How a provider reads the disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mechanism {
    /// NBD exports.
    Nbd,
    /// Files.
    File,
}

impl Mechanism {
    /// The one to use with a provider; none if it backs up no VMs.
    #[must_use]
    pub fn of(capabilities: &Capabilities) -> Option<Self> {
        match (capabilities.vm_nbd, capabilities.vm_file) {
            (true, _) => Some(Self::Nbd),
            (false, true) => Some(Self::File),
            (false, false) => None,
        }
    }
}

/// The target id of a storage.
pub fn target_id(storage: &str) -> String {
    format!("vzdump:{storage}")
}

/// The NBD server in QEMU, which has only one.
#[derive(Debug)]
struct Server {
    socket: PathBuf,
    /// QEMU said that it started; else only the socket tells whose server it is.
    is_started: bool,
}

/// A disk as the NBD server offers it.
#[derive(Debug)]
pub struct Offered {
    /// The disk, for people.
    pub device: String,
    /// Name of the export.
    pub export: String,
    /// Its size.
    pub size_bytes: u64,
    /// The bitmap that tells what changed; none if all of the disk is wanted.
    pub reused_bitmap: Option<String>,
    /// How much is wanted, as QEMU said when the point in time was taken.
    pub wanted_bytes: u64,
}

/// The backup of one VM.
pub struct VmDriver {
    layout: Layout,
    tools: Tools,
    storages: StorageSet,
    guard: GuardCommand,
    freeze_limits: FreezeLimits,
    undo_limit: Duration,
    options: BackupOptions,
    mechanism: Mechanism,
    id: u32,
    config: VmConfig,
    firewall: Option<Vec<u8>>,
    /// QEMU, if there is one: that which ran when the backup began, or was started for it.
    process: Option<ProcessStamp>,
    power: Power,
    session: Option<Session>,
    /// What is to be backed up, until it is measured.
    chosen: Vec<DiskEntry>,
    disks: Vec<Disk>,
    /// The TPM's state, which is backed up beside the disks.
    tpm: Option<Tpm>,
    fleecing: Vec<Fleecing>,
    /// It is not certain that nothing is frozen.
    may_be_frozen: bool,
    /// The setup was begun.
    access_begun: bool,
    access: Option<BackupAccess>,
    infos: Vec<AccessInfo>,
    events: Option<EventStream>,
    run_dir: Option<PathBuf>,
    /// The NBD server was begun.
    server: Option<Server>,
    /// Exports and server are ready.
    is_open: bool,
    /// Where the host's RAM is shared out: this guest's part.
    ram: Option<RamShare>,
    /// With a bandwidth limit, or for files: the way to each disk's export.
    relays: Vec<Relay>,
    /// Files that were begun.
    file_exports: Vec<FileExport>,
    files: Vec<FileDisk>,
    /// For files: what is to be read of each disk.
    regions: Vec<Arc<ExportRegions>>,
    stats: Option<AccessStats>,
}

impl VmDriver {
    /// Reads the configuration of a VM.
    ///
    /// # Errors
    /// [`GuestError::Refused`] for a VM that is not there or locked; the configuration cannot be read.
    pub fn open(
        ctx: &JobContext,
        id: u32,
        options: &BackupOptions,
        mechanism: Mechanism,
    ) -> Result<Self, GuestError> {
        let layout = &ctx.layout;
        let path = layout.vm_config_path(id);
        let config = VmConfig::read(&path)
            .map_err(GuestError::at(format!("read the configuration of VM {id}")))?
            .ok_or_else(|| GuestError::Refused(format!("VM {id} does not exist.")))?;
        // Its archive would look like a backup, and good ones would be pruned for it.
        if config.pairs().next().is_none() {
            return Err(GuestError::Refused(format!(
                "The configuration of VM {id} is empty ('{}'); `vzdump restore --force` brings back \
                 that of an archive.",
                path.display()
            )));
        }
        runner::refuse_locked(&config, id).map_err(|error| GuestError::Refused(chain(&error)))?;
        let firewall = read_optional(&layout.firewall_path(id))
            .map_err(GuestError::at(format!("read the firewall configuration of VM {id}")))?;
        Ok(Self {
            layout: layout.clone(),
            tools: ctx.tools.clone(),
            storages: ctx.storages.clone(),
            guard: ctx.guard.clone(),
            freeze_limits: ctx.limits.freeze,
            undo_limit: ctx.limits.undo,
            options: options.clone(),
            mechanism,
            id,
            config,
            firewall,
            process: None,
            power: Power::default(),
            session: None,
            chosen: Vec::new(),
            disks: Vec::new(),
            tpm: None,
            fleecing: Vec::new(),
            may_be_frozen: false,
            access_begun: false,
            access: None,
            infos: Vec::new(),
            events: None,
            run_dir: None,
            server: None,
            is_open: false,
            ram: None,
            relays: Vec::new(),
            file_exports: Vec::new(),
            files: Vec::new(),
            regions: Vec::new(),
            stats: None,
        })
    }

    fn session(&self) -> Result<&Session, GuestError> {
        self.session.as_ref().ok_or_else(|| self.gone())
    }

    fn gone(&self) -> GuestError {
        GuestError::Gone(format!("VM {}", self.id))
    }

    /// The session for undoing: connected anew if need be; `None` if QEMU is gone.
    async fn session_if_alive(&mut self) -> Result<Option<Session>, GuestError> {
        if !self.process.as_ref().is_some_and(ProcessStamp::is_alive) {
            return Ok(None);
        }
        if let Some(session) = self.session.as_ref().filter(|session| !session.is_closed()) {
            return Ok(Some(session.clone()));
        }
        self.session = None;
        match ops::connect(&self.layout.qmp_socket(self.id, Monitor::Backup)).await {
            Ok(session) => {
                self.session = Some(session.clone());
                Ok(Some(session))
            }
            Err(_) if self.is_ending().await => Ok(None),
            Err(error) => Err(GuestError::step("connect to QEMU's monitor again", error)),
        }
    }

    /// Whether QEMU has ended, or does within a moment: its sockets close before its process ends.
    async fn is_ending(&self) -> bool {
        let Some(process) = &self.process else { return true };
        match process.process.open() {
            Ok(Some(handle)) => handle.wait(END_WAIT).await.unwrap_or(false),
            Ok(None) => true,
            Err(_) => !process.is_alive(),
        }
    }

    fn do_prepare(&mut self, task: Task<'_>) -> Result<bool, GuestError> {
        let sink = task.sink;
        self.process = running_process(&self.layout, self.id)?;
        let status = if self.process.is_some() { "running" } else { "stopped" };
        sink.info(&format!("status = {status}"));
        if let Some(name) = self.config.name() {
            sink.info(&format!("VM Name: {}", clean(name)));
        }
        self.chosen =
            disks::choose_disks(&self.config, sink).map_err(GuestError::at("choose the disks"))?;
        self.take_tpm(sink)?;
        disks::log_left_out(&self.config, sink);
        sink.info(&format!("backup mode: {}", self.effective_mode()));
        if self.chosen.is_empty() {
            sink.info("the VM has no disk to back up; only its configuration is kept");
        }
        Ok(!self.chosen.is_empty())
    }

    async fn do_point_in_time(
        &mut self,
        requests: &[BitmapRequest],
        task: Task<'_>,
    ) -> Result<PointInTime, GuestError> {
        let session = self.session()?.clone();
        let target_id = target_id(&self.options.storage);
        // Before the freeze: nothing slow may happen while the guest waits.
        task.journal.append(Entry::Access { target_id: target_id.clone() }).await?;
        let request = self.setup_request(target_id, requests);
        self.warn_if_run(&session, task).await?;
        let guard = self.guard_tpm(task).await?;
        let is_paused =
            self.options.mode == BackupMode::Suspend && self.pause(&session, task).await?;
        let (frozen, mut words) = if is_paused {
            (None, "not frozen: the guest was paused".to_owned())
        } else {
            self.freeze(&session, task).await?
        };
        // What goes wrong from here on is told when nothing is frozen any more.
        let still = self.stop_tpm(guard).await;
        let setup = match &still {
            Ok(_) => {
                self.events = Some(session.events());
                self.access_begun = true;
                Some(BackupAccess::setup(session, request).await)
            }
            Err(_) => None,
        };
        let tpm = match still {
            Ok(still) => self.continue_tpm(still).await,
            Err(error) => Err(error),
        };
        let mut freeze_ms = None;
        if let Some(frozen) = frozen {
            // Not a line before it is thawed: a terminal that is stopped would keep it frozen.
            let thawed = frozen.thaw(&self.layout.agent_socket(self.id)).await;
            task.sink.info("issuing guest-agent 'fs-thaw' command");
            freeze_ms = thawed.held_ms;
            if let Some(held_ms) = freeze_ms {
                task.sink.info(&format!("guest file systems were frozen for {held_ms} ms"));
            }
            if let Some(trouble) = &thawed.trouble {
                task.sink.warn(trouble);
                words = format!("{words}; {trouble}");
            }
            if thawed.is_thawed {
                self.may_be_frozen = false;
                task.journal.append(Entry::Thawed).await?;
            }
        }
        let doing = format!("set up the backup access of VM {}", self.id);
        let setup = setup.transpose().map_err(GuestError::at(doing))?;
        // Kept even if the TPM has spoilt the point in time: it must be torn down.
        self.access = setup;
        if let Some(words) = tpm? {
            task.sink.info(&words);
        }
        let access = self.access.as_ref().ok_or_else(|| self.gone())?;
        self.infos = access.infos().to_vec();
        self.check_infos(requests)?;
        let drained_ns = self.infos.first().map(|info| info.drained_ns);
        Ok(PointInTime { freeze_ms, freeze: words, drained_ns, downtime_ms: None })
    }

    fn setup_request(&self, target_id: String, requests: &[BitmapRequest]) -> SetupRequest {
        let with_images = self.disks.iter().zip(&self.fleecing);
        let devices = with_images.zip(requests).map(|((disk, image), request)| {
            let mut device = Device::new(disk.node());
            device.fleecing = Some(image.node.clone());
            device.reflink_size_bytes = image.reflink_bytes;
            device.bitmap_mode = Some(match request {
                BitmapRequest::None => BitmapMode::None,
                BitmapRequest::New => BitmapMode::New,
                BitmapRequest::Use { generation, readable } => {
                    device.generation = Some(generation.clone());
                    device.readable = Some(match readable {
                        provider_api::Readable::Dirty => Readable::Dirty,
                        provider_api::Readable::All => Readable::All,
                    });
                    BitmapMode::Use
                }
            });
            device
        });
        let mut setup = SetupRequest::new(target_id, devices.collect());
        setup.buffer_size_bytes = self.options.buffer_size_bytes;
        setup.buffer_total_bytes = self.buffer_total_bytes();
        match &self.ram {
            // Without a buffer at all, as that of a few KiB would only cost time.
            Some(share) if share.bytes < RAM_BYTES_MIN => setup.buffer_size_bytes = Some(0),
            Some(share) => setup.buffer_total_bytes = Some(share.bytes),
            None => {}
        }
        setup.fleecing_limit_bytes = self.options.fleecing.limit_bytes;
        setup.granularity_bytes = self.options.granularity_bytes;
        setup.lease_s = Some(LEASE_S);
        setup
    }

    /// This guest's part of what the guests of the job may have together: those that run at the same
    /// time cannot lend each other RAM.
    fn buffer_total_bytes(&self) -> Option<u64> {
        let guests = self.options.jobs.max(1) as u64;
        self.options.buffer_total_bytes.map(|total| total / guests)
    }

    /// Takes this guest's part of the host's RAM for old data, if that is shared out.
    async fn take_ram(&mut self, sink: &dyn TaskSink) -> Result<(), GuestError> {
        let Some(host) = &self.options.host_ram else { return Ok(()) };
        let each = self.options.buffer_size_bytes.unwrap_or(BUFFER_BYTES_DEFAULT);
        let all = each.saturating_mul(self.disks.len() as u64);
        let wanted = self.buffer_total_bytes().map_or(all, |total| total.min(all));
        let share = host.take(wanted).await;
        let share = share.map_err(GuestError::at("take RAM of the host's budget"))?;
        if share.bytes < wanted {
            sink.info(&format!(
                "other backups have the RAM of 'host-buffer-total': {} for old data, not {}",
                size(share.bytes),
                size(wanted)
            ));
        }
        self.ram = Some(share);
        Ok(())
    }

    /// Freezes the guest's file systems if that is wanted and possible. That it is not never fails
    /// the backup; it is then as after a power cut.
    async fn freeze(
        &mut self,
        session: &Session,
        task: Task<'_>,
    ) -> Result<(Option<Frozen>, String), GuestError> {
        let skip = |why: &str| {
            task.sink.info(&format!("skipping guest-agent 'fs-freeze', {why}"));
            Ok((None, format!("not frozen: {why}")))
        };
        if !self.options.freeze {
            return skip("it is disabled");
        }
        if !self.config.agent_enabled() {
            return skip("agent not configured in VM options");
        }
        if !self.config.freeze_enabled() {
            return skip("disabled in VM options");
        }
        let status = session
            .execute(QueryStatus)
            .await
            .map_err(GuestError::at("ask QEMU whether the guest runs"))?;
        if status.status != RunState::Running {
            return skip("the guest is not running");
        }
        task.journal.append(Entry::Freeze).await?;
        self.may_be_frozen = true;
        task.sink.info("issuing guest-agent 'fs-freeze' command");
        let socket = self.layout.agent_socket(self.id);
        match freeze_guard::freeze(&self.guard, &socket, self.freeze_limits).await {
            Ok(frozen) => {
                #[cfg(debug_assertions)]
                crate::job::kill_point::at("frozen");
                let words = format!("{} file systems frozen", frozen.file_systems());
                Ok((Some(frozen), words))
            }
            Err(NotFrozen { is_thawed, why }) => {
                self.may_be_frozen = !is_thawed;
                let state = if is_thawed { "not frozen" } else { "THE GUEST MAY BE FROZEN" };
                let words = format!("{state}: {why}");
                task.sink.warn(&format!("guest-agent 'fs-freeze' failed: {words}"));
                Ok((None, words))
            }
        }
    }

    /// The last look at a freeze of which it is not known how it ended. A guard that is still at it
    /// has the agent for itself.
    async fn thaw_at_last(&mut self, task: Task<'_>) -> Result<(), GuestError> {
        if !self.may_be_frozen {
            return Ok(());
        }
        let socket = self.layout.agent_socket(self.id);
        let deadline = Instant::now() + self.freeze_limits.freeze;
        // With QEMU the freeze is gone, too.
        while self.process.as_ref().is_some_and(ProcessStamp::is_alive) {
            match freeze_guard::thaw_directly(&socket, self.freeze_limits).await {
                Ok(()) => break,
                Err(why) if Instant::now() >= deadline => {
                    return Err(GuestError::Refused(format!(
                        "VM {} may be frozen, and its agent does not thaw it: {why}. If it hangs, \
                         restart its agent, or the VM.",
                        self.id
                    )));
                }
                Err(_) => tokio::time::sleep(THAW_POLL).await,
            }
        }
        self.may_be_frozen = false;
        task.journal.append(Entry::Thawed).await?;
        Ok(())
    }

    /// Checks QEMU's answer against the request. Logs nothing, because the guest may still be held.
    fn check_infos(&self, requests: &[BitmapRequest]) -> Result<(), GuestError> {
        for ((disk, info), request) in self.disks.iter().zip(&self.infos).zip(requests) {
            if info.size_bytes != disk.size_bytes {
                return Err(GuestError::Refused(format!(
                    "The disk '{}' was resized from {} to {} bytes while its backup began; try \
                     again.",
                    disk.key, disk.size_bytes, info.size_bytes
                )));
            }
            let is_wanted = *request != BitmapRequest::None;
            let is_there = info.bitmap_name.is_some() && info.bitmap_node_name.is_some();
            if is_wanted != is_there {
                return Err(GuestError::Refused(format!(
                    "QEMU answered for the disk '{}' as if another bitmap mode was asked for.",
                    disk.key
                )));
            }
        }
        Ok(())
    }

    fn log_infos(&self, task: Task<'_>) {
        for (disk, info) in self.disks.iter().zip(&self.infos) {
            let status =
                bitmap_status(info.bitmap_action.as_str(), info.dirty_bytes, info.size_bytes);
            task.sink.info(&format!("{}: dirty-bitmap status: {status}", disk.key));
        }
    }

    async fn do_teardown(&mut self, success: bool, task: Task<'_>) -> Result<(), GuestError> {
        if !self.access_begun {
            return Ok(());
        }
        let access = self.access.take();
        let Some(session) = self.session_if_alive().await? else {
            if let Some(access) = access {
                // It went with QEMU: only the guard has to know.
                let _ = access.abort().await;
            }
            if success {
                task.sink.warn("QEMU ended before the bitmaps were settled");
            }
            return Ok(());
        };
        let target = target_id(&self.options.storage);
        match backup::query(&session).await {
            Ok(all) => {
                let ours = all.iter().find(|status| status.target_id == target);
                self.stats = ours.map(stats::stats_of);
            }
            Err(error) => {
                let error = chain(&error);
                task.sink.warn(&format!("what the backup cost the guest is not known: {error}"));
            }
        }
        let result = match access {
            Some(access) if !access.session().is_closed() => {
                if success {
                    access.commit().await
                } else {
                    access.abort().await
                }
            }
            _ => backup::teardown(&session, &target, success).await,
        };
        let result = match result {
            Ok(result) => result,
            Err(Error::Disconnected) if self.is_ending().await => return Ok(()),
            Err(error) => {
                let doing = format!("end the backup access of VM {}", self.id);
                return Err(GuestError::step(doing, error));
            }
        };
        self.access_begun = false;
        if let Some(reason) = result.reason {
            task.sink.warn(&format!("backup access: {}", clean(&reason)));
        }
        Ok(())
    }
}

/// Frees a volume; one that is not there is no error.
pub(crate) async fn free_volume(
    storages: &StorageSet,
    volume: &VolumeId,
) -> Result<(), GuestError> {
    let freed = match storages.images(volume.storage()) {
        Ok(images) => images.free(volume).await,
        Err(error) => Err(error),
    };
    freed.map(|_| ()).map_err(GuestError::at(format!("remove the volume '{volume}'")))
}

/// Eight random hexadecimal digits.
pub(crate) fn short_id() -> String {
    let mut text = Uuid::new_v4().simple().to_string();
    text.truncate(8);
    text
}

/// The QEMU process of a VM, if it runs.
pub(crate) fn running_process(
    layout: &Layout,
    id: u32,
) -> Result<Option<ProcessStamp>, GuestError> {
    let doing = || format!("find out whether VM {id} runs");
    let process = runner::find_process(layout, id).map_err(GuestError::at(doing()))?;
    process.map(ProcessStamp::of).transpose().map_err(GuestError::at(doing()))
}

fn read_optional(path: &Path) -> std::io::Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

impl GuestDriver for VmDriver {
    fn kind(&self) -> GuestKind {
        GuestKind::Qemu
    }

    fn id(&self) -> u32 {
        self.id
    }

    fn name(&self) -> Option<String> {
        self.config.name().map(str::to_owned)
    }

    fn prepare<'a>(&'a mut self, task: Task<'a>) -> BoxFuture<'a, Result<bool, GuestError>> {
        Box::pin(std::future::ready(self.do_prepare(task)))
    }

    fn enter_mode<'a>(
        &'a mut self,
        task: Task<'a>,
    ) -> BoxFuture<'a, Result<Vec<VolumeInfo>, GuestError>> {
        Box::pin(self.do_enter_mode(task))
    }

    fn acquire<'a>(&'a mut self, task: Task<'a>) -> BoxFuture<'a, Result<(), GuestError>> {
        Box::pin(self.do_acquire(task))
    }

    fn point_in_time<'a>(
        &'a mut self,
        requests: &'a [BitmapRequest],
        task: Task<'a>,
    ) -> BoxFuture<'a, Result<PointInTime, GuestError>> {
        Box::pin(self.do_point_in_time(requests, task))
    }

    fn resume<'a>(&'a mut self, task: Task<'a>) -> BoxFuture<'a, Result<Option<u64>, GuestError>> {
        Box::pin(self.do_resume(task))
    }

    fn open_source<'a>(&'a mut self, task: Task<'a>) -> BoxFuture<'a, Result<(), GuestError>> {
        Box::pin(self.do_open_source(task))
    }

    fn source(&self) -> GuestSource {
        GuestSource::Vm(self.make_source())
    }

    fn watch<'a>(&'a mut self, task: Task<'a>) -> BoxFuture<'a, GuestError> {
        Box::pin(self.do_watch(task))
    }

    fn drop_data<'a>(&'a mut self, task: Task<'a>) -> BoxFuture<'a, Result<(), GuestError>> {
        Box::pin(self.do_drop_data(task))
    }

    fn close_source<'a>(&'a mut self, _task: Task<'a>) -> BoxFuture<'a, Result<(), GuestError>> {
        Box::pin(self.do_close_source())
    }

    fn teardown<'a>(
        &'a mut self,
        success: bool,
        task: Task<'a>,
    ) -> BoxFuture<'a, Result<(), GuestError>> {
        Box::pin(self.do_teardown(success, task))
    }

    fn release<'a>(&'a mut self, task: Task<'a>) -> BoxFuture<'a, Result<(), GuestError>> {
        Box::pin(self.do_release(task))
    }

    fn leave_mode<'a>(&'a mut self, task: Task<'a>) -> BoxFuture<'a, Result<(), GuestError>> {
        Box::pin(self.do_leave_mode(task))
    }

    fn cleanup<'a>(&'a mut self, _task: Task<'a>) -> BoxFuture<'a, Result<(), GuestError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn stats(&self) -> Option<AccessStats> {
        self.stats
    }

    fn volumes(&self) -> Vec<VolumeReport> {
        let report = |(disk, info): (&Disk, &AccessInfo)| VolumeReport {
            device: disk.key.clone(),
            size_bytes: disk.size_bytes,
            bitmap_action: info.bitmap_action.as_str().to_owned(),
            dirty_bytes: info.dirty_bytes,
        };
        let disks = self.disks.iter().zip(&self.infos).map(report);
        disks.chain(self.tpm.as_ref().map(Tpm::report)).collect()
    }
}
