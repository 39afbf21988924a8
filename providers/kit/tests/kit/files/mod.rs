// SPDX-License-Identifier: MIT OR Apache-2.0
//! A small provider that keeps each disk as a raw file, and that can be told to be wrong in one way.
//!
//! ```text
//! <dir>/archives/<name>/   manifest, config, firewall, notes, <device>.raw, …
//! <dir>/tmp/<name>/        a backup under way
//! <dir>/refused/<id>       a commit that was told to be none, and so never may be one
//! ```

mod backup;
mod container;
mod restore;
mod store;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use provider_api::{
    API_VERSION, Archive, BoxFuture, Call, Capabilities, CommitOutcome, ContainerRestore,
    Description, Error, GuestConfig, Job, JobInfo, Kind, Progress, Property, PropertyKind,
    Provider, Result, Status, Uuid, VerifyOptions, VerifyReport, VmRestore,
};
use provider_kit::{Factory, factory};

use backup::FileJob;
use container::TarRestore;
use restore::FileRestore;
use store::Store;

/// One way to be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    AbortLeavesArchive,
    AclsLost,
    ActivateTakesAll,
    ActivatesOnce,
    AsksForOldGeneration,
    AttributesLost,
    BaseIsUnlisted,
    BlindVerify,
    ChunkRestZeroed,
    CommitsAnyway,
    ConfigIsText,
    ContainerErrorsIgnored,
    ContainerFirewallLost,
    ContainerIsEmpty,
    CrashLeavesArchive,
    DeafExport,
    DirtySumIgnored,
    DuplicateInList,
    EndlessBackup,
    EndlessNotes,
    EndlessTar,
    ExitCodesIgnored,
    FalseAlarm,
    FirewallLost,
    ForgetsCommits,
    HardLinksLost,
    HolesLost,
    HugeFile,
    HugeGeneration,
    IgnoresBitmap,
    IgnoresCancel,
    IgnoresExcludes,
    KeepsProtectedNot,
    KilledIsNoError,
    ListedEarly,
    LogCut,
    MountPointsAreLines,
    NameOfGuest,
    NeverAnswers,
    NoDisksFail,
    NoIncrement,
    NoTombstone,
    NotesCut,
    OneTemporaryPlace,
    OwnersLost,
    Panics,
    PathForRandomRead,
    PendingForEver,
    ProgressPastEnd,
    ReadsClean,
    ReadsInCommit,
    ReleasesUnread,
    RemoveIsRefused,
    RemoveTakesNext,
    RemoveTakesRestored,
    RestoreNeverAnswers,
    SameBytesAgain,
    ShortFile,
    SilentProgress,
    SilentTar,
    SizeIgnored,
    SizeRounded,
    SkipsLastArea,
    SlowStatus,
    SocketElsewhere,
    SwallowsErrors,
    SweepTakesUnderWay,
    SymbolicLink,
    TooFewRequests,
    UnknownIsIo,
    UsedAboveTotal,
    VerifiesFirstDisk,
    WrongKind,
    WrongPropertyName,
    WrongTime,
    WrongTotal,
    ZeroesLost,
}

/// How a provider is made.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) dir: PathBuf,
    pub(crate) fault: Option<Fault>,
    /// Backs up from files, not over NBD.
    pub(crate) from_files: bool,
    /// Asks for increments in which all of a disk can be read, and makes full backups of them.
    pub(crate) reads_all: bool,
    /// In place of a lock of the storage, and of those of the archives that are being restored.
    pub(crate) lock: Arc<Mutex<Vec<String>>>,
}

impl Setup {
    pub(crate) fn new(dir: PathBuf, fault: Option<Fault>) -> Self {
        Self { dir, fault, from_files: false, reads_all: false, lock: Arc::default() }
    }

    pub(crate) fn has(&self, fault: Fault) -> bool {
        self.fault == Some(fault)
    }

    pub(crate) fn factory(self) -> Factory {
        factory(move || {
            let provider: Arc<dyn Provider> = Arc::new(FileProvider::new(self.clone()));
            Ok(provider)
        })
    }
}

/// The provider.
pub(crate) struct FileProvider {
    store: Store,
    activations: Mutex<u32>,
}

pub(crate) fn other(message: impl Into<String>) -> Error {
    Error::new(Kind::Other, message)
}

/// The answer of something that does not wait.
fn now<'a, T: Send + 'a>(result: Result<T>) -> BoxFuture<'a, Result<T>> {
    Box::pin(std::future::ready(result))
}

impl FileProvider {
    pub(crate) fn new(setup: Setup) -> Self {
        Self { store: Store::new(setup), activations: Mutex::default() }
    }

    fn has(&self, fault: Fault) -> bool {
        self.store.setup.has(fault)
    }
}

impl Provider for FileProvider {
    fn describe(&self) -> Description {
        let mut capabilities = Capabilities {
            vm_file: true,
            vm_restore: true,
            vm_incremental: true,
            notes: true,
            protect: true,
            remove: true,
            verify: true,
            log: true,
            slow_commit: true,
            random_read: true,
            container: true,
            container_restore: true,
            ..Capabilities::default()
        };
        capabilities.vm_nbd = !self.store.setup.from_files;
        Description { name: "files".to_owned(), api_version: API_VERSION, capabilities }
    }

    fn properties(&self) -> Vec<Property> {
        let name = if self.has(Fault::WrongPropertyName) { "Base Dir" } else { "path" };
        vec![Property {
            name: name.to_owned(),
            kind: PropertyKind::Path,
            required: true,
            sensitive: false,
            description: "Where the archives are.".to_owned(),
        }]
    }

    fn activate<'a>(&'a self, _call: &'a Call) -> BoxFuture<'a, Result<()>> {
        let mut activations = self.activations.lock().unwrap();
        *activations += 1;
        if self.has(Fault::ActivatesOnce) && *activations > 1 {
            return now(Err(other("It is active already.")));
        }
        now(self.store.prepare())
    }

    fn status<'a>(&'a self, _call: &'a Call) -> BoxFuture<'a, Result<Status>> {
        Box::pin(async {
            if self.has(Fault::NeverAnswers) {
                std::future::pending::<()>().await;
            }
            if self.has(Fault::SlowStatus) {
                tokio::time::sleep(std::time::Duration::from_millis(1200)).await;
            }
            let used_bytes = if self.has(Fault::UsedAboveTotal) { 1 << 41 } else { 1 << 30 };
            Ok(Status { total_bytes: 1 << 40, used_bytes })
        })
    }

    fn list<'a>(&'a self, _call: &'a Call) -> BoxFuture<'a, Result<Vec<Archive>>> {
        now(self.store.list())
    }

    fn notes<'a>(&'a self, archive: &'a str, _call: &'a Call) -> BoxFuture<'a, Result<String>> {
        now(self.store.text(archive, "notes"))
    }

    fn set_notes<'a>(
        &'a self,
        archive: &'a str,
        notes: &'a str,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<()>> {
        let notes = match self.store.setup.fault {
            Some(Fault::NotesCut) => notes.lines().next().unwrap_or_default().to_owned(),
            Some(Fault::EndlessNotes) => notes.repeat(3),
            _ => notes.to_owned(),
        };
        now(self.store.set(archive, "notes", notes.as_bytes()))
    }

    fn set_protected<'a>(
        &'a self,
        archive: &'a str,
        protected: bool,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<()>> {
        let mark: &[u8] = if protected { b"1" } else { b"" };
        now(self.store.set(archive, "protected", mark))
    }

    fn keep_log<'a>(
        &'a self,
        archive: &'a str,
        log: &'a str,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<()>> {
        let length = if self.has(Fault::LogCut) { log.len().min(1 << 16) } else { log.len() };
        now(self.store.set(archive, "log", &log.as_bytes()[..length]))
    }

    fn log<'a>(&'a self, archive: &'a str, _call: &'a Call) -> BoxFuture<'a, Result<String>> {
        now(self.store.text(archive, "log"))
    }

    fn remove<'a>(&'a self, archive: &'a str, _call: &'a Call) -> BoxFuture<'a, Result<()>> {
        now(self.store.remove(archive))
    }

    fn verify<'a>(
        &'a self,
        archive: &'a str,
        options: &'a VerifyOptions,
        _progress: &'a dyn Progress,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<VerifyReport>> {
        now(self.store.verify(archive, options))
    }

    fn guest_config<'a>(
        &'a self,
        archive: &'a str,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<GuestConfig>> {
        now(self.store.guest_config(archive))
    }

    fn commit_outcome<'a>(
        &'a self,
        id: Uuid,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<CommitOutcome>> {
        now(self.store.outcome(id))
    }

    fn start_job<'a>(
        &'a self,
        _job: JobInfo,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<Box<dyn Job>>> {
        now(Ok(Box::new(FileJob(self.store.clone()))))
    }

    fn restore_vm_init<'a>(
        &'a self,
        archive: &'a str,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<Box<dyn VmRestore>>> {
        now(FileRestore::begin(&self.store, archive).map(|restore| {
            let restore: Box<dyn VmRestore> = Box::new(restore);
            restore
        }))
    }

    fn restore_container_init<'a>(
        &'a self,
        archive: &'a str,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<Box<dyn ContainerRestore>>> {
        let fault = self.store.setup.fault;
        now(self.store.path(archive).map(|path| {
            let restore = TarRestore { archive: path.join("files.tar"), fault };
            let restore: Box<dyn ContainerRestore> = Box::new(restore);
            restore
        }))
    }
}
