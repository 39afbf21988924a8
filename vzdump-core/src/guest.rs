// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a job needs of a guest's kind, so that it treats virtual machines and containers alike.
//!
//! ```text
//!  prepare ─► enter_mode ─► acquire ─► point_in_time ─► resume ─► open_source ─► (watch) ─► [drop_data] ┐
//!  cleanup ◄─ leave_mode ◄─ release ◄─ close_source ◄─ teardown(success) ◄─────────────────────────────┘
//! ```
//!
//! The job calls each at most once and the lower row in this order for every one of the upper row
//! that was begun (why the teardown comes first is said in [`crate::job::state`]), also when that one failed or was dropped at an await point. So a driver
//! notes (and journals) a name before it acquires the thing, and undoing what is not there is no
//! error. The lower row is never cancelled, nor is `resume`; the job bounds their time. After a failure
//! between `enter_mode` and `resume`, `resume` is called before the lower row, and for a guest that [`GuestDriver::is_held`]
//! once more before `leave_mode`.

use provider_api::{
    BitmapRequest, BoxFuture, ContainerBackup, GuestKind, IgnoredEntry, VmBackup, VolumeInfo,
};

use crate::job::hooks::GuestHooks;
use crate::job::{BackupOptions, JobContext};
use crate::journal::{Journal, JournalError, Record};
use crate::task_log::TaskSink;

/// Why a step of a guest's backup failed.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The request cannot be met; nothing is wrong with the system.
    #[error("{0}")]
    Refused(String),
    /// A step failed.
    #[error("Cannot {doing}.")]
    Step {
        /// What was being done, and to what.
        doing: String,
        /// Why it failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The point in time is lost.
    #[error("The snapshot of '{device}' is lost: {reason}")]
    Broken {
        /// The disk.
        device: String,
        /// Why, as QEMU says.
        reason: String,
    },
    /// The guest's process is gone.
    #[error("{0} ended while it was being backed up.")]
    Gone(String),
    /// The journal cannot be written.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

impl GuestError {
    /// A step that failed.
    pub fn step(
        doing: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Step { doing: doing.into(), source: source.into() }
    }

    /// For `map_err`: a step that failed.
    pub fn at<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        doing: impl Into<String>,
    ) -> impl FnOnce(E) -> Self {
        move |source| Self::step(doing, source)
    }
}

/// What a job needs of the containers of a host. The crate `lxc-backend` has it.
pub trait Containers: Send + Sync {
    /// Opens the driver of one container's backup. Changes nothing.
    ///
    /// # Errors
    /// [`GuestError`]; there is no such container, or its configuration makes no sense.
    fn open(
        &self,
        ctx: &JobContext,
        id: u32,
        options: &BackupOptions,
    ) -> Result<Box<dyn GuestDriver>, GuestError>;

    /// Lets a container go on that an interrupted backup has frozen or stopped. Doing so twice is no
    /// error.
    fn run_again<'a>(
        &'a self,
        ctx: &'a JobContext,
        record: &'a Record,
        sink: &'a dyn TaskSink,
    ) -> BoxFuture<'a, Result<(), String>>;
}

/// For hosts without containers.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoContainers;

impl Containers for NoContainers {
    fn open(
        &self,
        _: &JobContext,
        id: u32,
        _: &BackupOptions,
    ) -> Result<Box<dyn GuestDriver>, GuestError> {
        Err(GuestError::Refused(format!("Container {id}: this program has no containers.")))
    }

    fn run_again<'a>(
        &'a self,
        _: &'a JobContext,
        record: &'a Record,
        _: &'a dyn TaskSink,
    ) -> BoxFuture<'a, Result<(), String>> {
        let why =
            format!("the container {} belongs to a program with containers", record.begin.guest_id);
        Box::pin(std::future::ready(Err(why)))
    }
}

/// What a provider is given of a guest.
#[derive(Debug, Clone)]
pub enum GuestSource {
    /// A virtual machine's configuration and disks.
    Vm(VmBackup),
    /// A container's configuration and file tree.
    Container(ContainerBackup),
}

/// What happens to a running guest for the point in time of its backup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum BackupMode {
    /// Nothing: it runs on, its file systems frozen for a moment if it has an agent.
    #[default]
    Snapshot,
    /// It is paused for a moment.
    Suspend,
    /// It is shut down and starts again.
    Stop,
}

impl BackupMode {
    /// As it is written in options and told to hook scripts.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Suspend => "suspend",
            Self::Stop => "stop",
        }
    }
}

impl std::fmt::Display for BackupMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for BackupMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "snapshot" => Ok(Self::Snapshot),
            "suspend" => Ok(Self::Suspend),
            "stop" => Ok(Self::Stop),
            other => Err(format!("'{other}' is not one of snapshot, suspend, stop")),
        }
    }
}

/// What a step may use of its task.
#[derive(Clone, Copy)]
pub struct Task<'a> {
    /// The task's journal.
    pub journal: &'a Journal,
    /// The task's log.
    pub sink: &'a dyn TaskSink,
    /// The hook script, for a driver that stops its guest.
    pub hooks: &'a GuestHooks<'a>,
}

/// What the point in time cost the guest, as measured.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct PointInTime {
    /// How long the guest's file systems were frozen, in milliseconds; none if they were not.
    pub freeze_ms: Option<u64>,
    /// What became of the freeze, in words.
    pub freeze: String,
    /// How long all guest I/O was held for the common point in time, in nanoseconds.
    pub drained_ns: Option<u64>,
    /// How long the guest did not run, paused or shut down, in milliseconds; none if it ran all the
    /// time, or did not run before either.
    pub downtime_ms: Option<u64>,
}

/// What the backup cost the guest while it ran, read at its end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct AccessStats {
    /// Guest writes that had to wait.
    pub writes_delayed: u64,
    /// The longest such wait in nanoseconds.
    pub delay_max_ns: u64,
    /// The wait that half of them did not exceed, over all disks, in nanoseconds.
    pub delay_p50_ns: u64,
    /// The wait that 99 percent of them did not exceed, over all disks, in nanoseconds.
    pub delay_p99_ns: u64,
    /// Bytes of old data saved.
    pub captured_bytes: u64,
    /// Bytes released by the provider.
    pub released_bytes: u64,
}

/// One disk of a report.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct VolumeReport {
    /// Device name.
    pub device: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// QEMU's word for what it did with the bitmap.
    pub bitmap_action: String,
    /// Bytes the bitmap marked.
    pub dirty_bytes: Option<u64>,
}

/// The backup of one guest, as its kind does it. See the module's description for the order.
pub trait GuestDriver: Send {
    /// Kind of the guest.
    fn kind(&self) -> GuestKind;
    /// Number of the guest.
    fn id(&self) -> u32;
    /// Name of the guest, if it has one.
    fn name(&self) -> Option<String>;

    /// Chooses the disks by the configuration; tells whether there are any. Changes nothing.
    fn prepare<'a>(&'a mut self, task: Task<'a>) -> BoxFuture<'a, Result<bool, GuestError>>;

    /// Brings the guest into the state that the mode of the backup needs, connects to it, and says
    /// which disks are backed up. Bounds itself.
    fn enter_mode<'a>(
        &'a mut self,
        task: Task<'a>,
    ) -> BoxFuture<'a, Result<Vec<VolumeInfo>, GuestError>>;

    /// Acquires what the point in time needs.
    fn acquire<'a>(&'a mut self, task: Task<'a>) -> BoxFuture<'a, Result<(), GuestError>>;

    /// Takes the point in time of all disks, with one bitmap request for each disk of
    /// `enter_mode`.
    fn point_in_time<'a>(
        &'a mut self,
        requests: &'a [BitmapRequest],
        task: Task<'a>,
    ) -> BoxFuture<'a, Result<PointInTime, GuestError>>;

    /// Lets the guest go on that did not run because of `enter_mode` or `point_in_time`; returns how
    /// long that was, in milliseconds.
    fn resume<'a>(&'a mut self, task: Task<'a>) -> BoxFuture<'a, Result<Option<u64>, GuestError>>;

    /// Whether the guest stays down after a successful `resume`, because its data is read as it is: then `resume` is
    /// called once more, after `release`.
    fn is_held(&self) -> bool {
        false
    }

    /// Offers the frozen disks.
    fn open_source<'a>(&'a mut self, task: Task<'a>) -> BoxFuture<'a, Result<(), GuestError>>;

    /// What the provider is given: configuration and, once the source is open, the disks or the tree.
    fn source(&self) -> GuestSource;

    /// Ends only when the point in time is lost, and says why.
    fn watch<'a>(&'a mut self, task: Task<'a>) -> BoxFuture<'a, GuestError>;

    /// Withdraws the frozen disks and drops the old data that is kept for them, because the provider
    /// has read everything and its commit will take long. Whether the backup is durable is not known
    /// yet, so [`GuestDriver::teardown`] still follows. Drivers for which waiting costs nothing do nothing.
    fn drop_data<'a>(&'a mut self, task: Task<'a>) -> BoxFuture<'a, Result<(), GuestError>> {
        let _ = task;
        Box::pin(std::future::ready(Ok(())))
    }

    /// Withdraws the frozen disks.
    fn close_source<'a>(&'a mut self, task: Task<'a>) -> BoxFuture<'a, Result<(), GuestError>>;

    /// Ends the point in time; `success` only if the backup is durable.
    fn teardown<'a>(
        &'a mut self,
        success: bool,
        task: Task<'a>,
    ) -> BoxFuture<'a, Result<(), GuestError>>;

    /// Gives back what `acquire` acquired.
    fn release<'a>(&'a mut self, task: Task<'a>) -> BoxFuture<'a, Result<(), GuestError>>;

    /// Disconnects from the guest, and leaves it as it would be without the backup.
    fn leave_mode<'a>(&'a mut self, task: Task<'a>) -> BoxFuture<'a, Result<(), GuestError>>;

    /// Undoes `prepare`.
    fn cleanup<'a>(&'a mut self, task: Task<'a>) -> BoxFuture<'a, Result<(), GuestError>>;

    /// What the backup cost the guest, once it is torn down.
    fn stats(&self) -> Option<AccessStats>;

    /// Why what a provider has read of a container is not all there is, whatever it says itself.
    fn cut_short(&self) -> Option<String> {
        None
    }

    /// How many files of a container the host itself could not read and left out as it may, and the first of them. They
    /// have been told in the log, and the provider does not know of them.
    fn unreadable(&self) -> (u64, Vec<IgnoredEntry>) {
        (0, Vec::new())
    }

    /// The disks and their bitmaps, once the point in time is taken.
    fn volumes(&self) -> Vec<VolumeReport>;
}
