// SPDX-License-Identifier: MIT OR Apache-2.0
//! Puts the parts together and offers one function per task.
//!
//! The program `vzdump` calls these functions, and a service will call the same ones: they return
//! typed results, write log lines and progress to a [`TaskSink`], and never print.
//!
//! ```text
//! vzdump.conf, storage.cfg ─► Host ─► vm_*      vzdump_core::vm
//! jobs.cfg, user.cfg ──► plan ──┤  ├──► backup    vzdump_core::job
//!                              │  ├──► restore   vzdump_core::restore
//!                              │  └──► doctor    vzdump_core::journal
//!                              └────► providers  one per backup storage
//! ```

#![forbid(unsafe_code)]

mod archives;
mod boot;
mod containers;
mod doctor;
mod images;
mod ionice;
mod kit;
mod nodes;
mod plan;
mod provider_call;
mod providers;
mod real;
mod results;
mod retention;
mod tasks;
mod template;
mod verify;
mod vms;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vzdump_core::config::guest::VmConfig;
use vzdump_core::config::storage::StorageConfig;
use vzdump_core::config::{ConfigError, read_text};
use vzdump_core::job::JobContext;
use vzdump_core::layout::Layout;
use vzdump_core::storage::StorageSet;
use vzdump_core::tools::Tools;
use vzdump_core::vm::create::{self, CreateError};
use vzdump_core::vm::destroy::DestroyError;
use vzdump_core::vm::freeze_guard::GuardCommand;
use vzdump_core::vm::runner::{self, RunnerError};

pub use archives::{ArchiveInfo, ArchiveList, ArchiveName, StorageProblem, utc};
pub use boot::{BootRequest, Booted};
pub use containers::run_hidden;
pub use doctor::{Check, DoctorReport, Pending};
pub use images::{ImageInfo, ImageUse, StorageState};
pub use kit::{KitRequest, OpenHost, check_provider};
pub use lxc_backend::create::{CtCreateOptions, CtCreated, NewMount};
pub use lxc_backend::runtime::{
    CtStatus, Started as CtStarted, State as CtState, Stopped as CtStopped,
};
pub use plan::{BackupPlan, BackupRequest};
pub use provider_api::{Damage, GuestKind, Verified, VerifyExtent};
pub use provider_kit::{
    CheckResult, Counts, Grade, Outcome, Report as KitReport, SIZE_BYTES_MAX as KIT_SIZE_BYTES_MAX,
    SIZE_BYTES_MIN as KIT_SIZE_BYTES_MIN, check_names,
};
pub use providers::{StorageInfo, StorageUse};
pub use retention::{PruneReport, PruneRequest, PrunedArchive};
pub use tasks::{FileRestoreRequest, RestoreRequest};
pub use template::{Language, new_provider};
pub use tokio_util::sync::CancellationToken;
pub use verify::{VerifiedArchive, VerifyRequest, VerifyResult, VerifySummary, random_seed};
pub use vms::VmState;
pub use vzdump_core::config::backup::{
    BackupSettings, IONICE_MAX, STOP_WAIT_MAX_MINUTES, Selection, WAIT_MAX_MINUTES, without_meaning,
};
pub use vzdump_core::guest::BackupMode;
pub use vzdump_core::job::report::{GuestReport, GuestResult, JobReport};
pub use vzdump_core::job::{JOBS_MAX, chain};
pub use vzdump_core::prune::Fate;
pub use vzdump_core::restore::{
    BootReport, DiskChoice, DiskToFile, FileReport, PlannedSpace, PlannedVolume, RestorePlan,
    RestoreReport, RestoredFile, RestoredVolume,
};
pub use vzdump_core::retention::{KeepCounts, Retention};
pub use vzdump_core::storage::ImageFormat;
pub use vzdump_core::task_log::{Level, Progress, TaskSink, clean, duration, size};
pub use vzdump_core::vm::backup::FleecingOptions;
pub use vzdump_core::vm::create::{CreateOptions, Created, DiskContent, parse_size};
pub use vzdump_core::vm::destroy::Destroyed;
pub use vzdump_core::vm::freeze_guard::{SUBCOMMAND as GUARD_SUBCOMMAND, run_guard};
pub use vzdump_core::vm::runner::{StartOptions, Started, StopOptions, Stopped, VmStatus};

use providers::{Plugins, StorageProviders};

/// Why a task could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A configuration file.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A VM could not be made.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// A VM could not be removed.
    #[error(transparent)]
    Destroy(#[from] DestroyError),
    /// A container.
    #[error(transparent)]
    Container(#[from] lxc_backend::CtError),
    /// A VM could not be started, stopped or asked.
    #[error(transparent)]
    Runner(#[from] RunnerError),
    /// An option of a backup makes no sense.
    #[error("{0}")]
    Settings(String),
    /// The storage is none for backups.
    #[error("{0}")]
    Storage(String),
    /// An archive's name.
    #[error("{0}")]
    Archive(String),
    /// An archive may not be changed in this way.
    #[error("{0}")]
    Denied(String),
    /// A restore would be refused.
    #[error("It would not be restored: {0}")]
    Refused(String),
    /// A live restore that cannot be given up.
    #[error("The live restore of VM {id} is not given up: {why}.")]
    Unfinished {
        /// The VM.
        id: u32,
        /// Why.
        why: String,
    },
    /// The provider failed.
    #[error("The storage '{storage}' failed.")]
    Provider {
        /// The storage.
        storage: String,
        /// Why.
        source: provider_api::Error,
    },
    /// The journals of earlier tasks.
    #[error(transparent)]
    Journal(#[from] vzdump_core::journal::JournalError),
    /// The guest is being worked on.
    #[error(transparent)]
    Lock(#[from] vzdump_core::lock::LockError),
    /// A file of a new provider could not be written.
    #[error("Cannot write {path}.")]
    Template {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The program does not know its own path.
    #[error("Cannot find out where this program is.")]
    OwnProgram(#[source] std::io::Error),
}

impl HostError {
    /// What the user can do about it, where that is known and not said in the message.
    #[must_use]
    pub fn advice(&self) -> Option<String> {
        match self {
            Self::Runner(RunnerError::AlreadyRunning { id, .. }) => {
                Some(format!("`vzdump vm status {id}` shows what it is doing."))
            }
            Self::Runner(RunnerError::NoConfig { .. }) => {
                Some("`vzdump vm status` lists all VMs.".to_owned())
            }
            Self::Archive(_) => Some("`vzdump list` shows all archives.".to_owned()),
            Self::Provider { .. } => Some("`vzdump doctor` checks all storages.".to_owned()),
            _ => None,
        }
    }
}

/// Key of `vzdump.conf`: the directory of the QEMU programs.
pub(crate) const QEMU_BIN_KEY: &str = "qemu-bin";
/// Key of `vzdump.conf`: the directory of the providers' executables.
pub(crate) const PROVIDER_DIR_KEY: &str = "provider-dir";

/// The name of this host, without its domain.
pub(crate) fn own_name() -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    name.split('.').next().unwrap_or_default().to_owned()
}

/// What overrides the configuration.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// Directory of the QEMU programs.
    pub qemu_bin: Option<PathBuf>,
}

/// This host: its configuration and everything built from it.
pub struct Host {
    layout: Layout,
    tools: Tools,
    storages: StorageSet,
    providers: Arc<StorageProviders>,
}

impl Host {
    /// Reads the configuration below `root`, or the system's.
    ///
    /// # Errors
    /// [`HostError::Config`].
    pub fn open(root: Option<PathBuf>, overrides: &Overrides) -> Result<Self, HostError> {
        let layout = Layout::new(root);
        let settings = read_text(&layout.settings_path())?.unwrap_or_default();
        // The same form as a guest's configuration: `key: value` lines and comments.
        let settings = VmConfig::parse(&settings);
        let setting = settings.get(QEMU_BIN_KEY).map(Path::new);
        let tools = Tools::find(overrides.qemu_bin.as_deref(), setting);
        let storages = StorageConfig::read(&layout.storage_config_path())?;
        let storages = nodes::switch_off_others(&storages, &own_name())?;
        let storages = StorageSet::new(&storages, &layout);
        let provider_dir = settings.get(PROVIDER_DIR_KEY).map(PathBuf::from);
        let provider_dir = provider_dir.unwrap_or_else(|| layout.provider_dir());
        let plugins = Plugins { layout: &layout, dir: provider_dir };
        let providers = Arc::new(StorageProviders::new(&storages, &tools, &plugins));
        Ok(Self { layout, tools, storages, providers })
    }

    /// `vzdump.conf`, whose lines must all be understood: what is not, as one that begins with a blank, might have been what
    /// keeps archives.
    fn read_settings(&self) -> Result<VmConfig, HostError> {
        let config = VmConfig::parse(&read_text(&self.layout.settings_path())?.unwrap_or_default());
        let other = config.not_understood().map(|line| format!("the line '{line}'"));
        let odd =
            other.chain(config.sections().map(|name| format!("the section '[{name}]'"))).next();
        match odd {
            None => Ok(config),
            Some(what) => Err(HostError::Settings(format!(
                "vzdump.conf: {what} is not understood; a line is 'key: value', without blanks before it, or a \
                 comment that begins with '#'."
            ))),
        }
    }

    /// Where everything is.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// All storages and what they are used for.
    #[must_use]
    pub fn storages(&self) -> Vec<StorageInfo> {
        self.providers.infos()
    }

    fn context(&self) -> Result<JobContext, HostError> {
        Ok(JobContext {
            layout: self.layout.clone(),
            tools: self.tools.clone(),
            storages: self.storages.clone(),
            providers: self.providers.clone(),
            containers: Arc::new(lxc_backend::LxcContainers),
            guard: GuardCommand::own_program().map_err(HostError::OwnProgram)?,
            limits: vzdump_core::job::Limits::default(),
        })
    }

    /// Makes a VM. Should be awaited to its end; cancel it by the token.
    ///
    /// # Errors
    /// [`HostError::Create`]; nothing is left behind then.
    pub async fn vm_create(
        &self,
        id: u32,
        options: &CreateOptions,
        sink: &dyn TaskSink,
        cancel: &CancellationToken,
    ) -> Result<Created, HostError> {
        Ok(Box::pin(create::create(&self.context()?, id, options, sink, cancel)).await?)
    }

    /// Starts a VM.
    ///
    /// # Errors
    /// [`HostError::Runner`]; no QEMU is left running then.
    pub async fn vm_start(&self, id: u32, options: StartOptions) -> Result<Started, HostError> {
        Ok(runner::start(&self.layout, &self.tools, &self.storages, id, options).await?)
    }

    /// Stops a VM.
    ///
    /// # Errors
    /// [`HostError::Runner`].
    pub async fn vm_stop(&self, id: u32, options: StopOptions) -> Result<Stopped, HostError> {
        Ok(runner::stop(&self.layout, id, options).await?)
    }
}

#[cfg(test)]
mod tests;
