// SPDX-License-Identifier: MIT OR Apache-2.0
//! A backup provider that keeps archives in a directory: one subdirectory per guest and time, one
//! qcow2 image per disk, increments backed by the archive before; of containers a compressed tar archive, or
//! their files.
//!
//! ```text
//! <path>/vzdump-qemu-100-2026_01_02-03_04_05/    full
//! <path>/vzdump-qemu-100-2026_01_03-03_04_05/    increment: images backed by ../vzdump-…-02-…/
//! <path>/vzdump-lxc-101-2026_01_02-03_04_05/     a container: a compressed tar archive, or a tree
//! <path>/.tmp-vzdump-qemu-100-…/                 a backup under way, never listed
//! <path>/.tmp-dead-…/                            what an unfinished backup left, being removed
//! <path>/.tmp-merge-…/                           what will replace an archive whose base is removed
//! <path>/.vzdump/                                locks and commit records
//! ```
//!
//! An archive needs nothing but `qemu-img` to be read: its images form an ordinary backing chain.
//! The storage's directory may be moved or copied as a whole, because backing names are relative.
//!
//! | what must hold | where |
//! |---|---|
//! | an archive is listed only when all of it is durable | `commit` |
//! | whether a commit happened can be told from any process | `commit` |
//! | a removal changes no byte of what other archives give, wherever it ends | `remove`, `merge` |
//! | what is read or built upon is not removed | `usage` |
//! | a changed byte of what an archive gives is found | `verify` |
//! | what dead runs left goes away, what live runs make does not | `storage` |
//! | an increment covers exactly what its bitmap marks | `copy` |
//! | the archive of a container is a whole one, or none | `container` |
//! | zeroes of an increment hide the base's data | `image`, `store` |
//! | no file outside of the storage is opened, whatever a manifest or image says | `chain`, `server` |
//!
//! The file system must have flock(2) and rename within a directory; a storage used by several
//! hosts needs one whose locks work between them.

#![forbid(unsafe_code)]

mod areas;
mod attributes;
mod call;
mod chain;
mod checksums;
mod commit;
mod container;
mod copy;
mod deep;
mod files;
mod guest;
mod header;
mod image;
#[cfg(debug_assertions)]
mod kill_point;
mod leftovers;
mod limits;
mod manifest;
mod merge;
mod remove;
mod restore;
mod server;
mod source;
mod storage;
mod store;
mod usage;
mod verify;

/// Tests alone can stop a removal half way, see the module of debug builds.
#[cfg(not(debug_assertions))]
mod kill_point {
    pub(crate) fn step() {}
    pub(crate) fn is_without_exchange() -> bool {
        false
    }
}

use std::path::PathBuf;
use std::time::Instant;

use provider_api::{
    API_VERSION, Archive, BoxFuture, Call, Capabilities, CommitOutcome, ContainerRestore,
    Description, Error, GuestConfig, Job, JobInfo, Kind, Progress, Property, PropertyKind,
    Provider, Result, Status, Uuid, VerifyOptions, VerifyReport, VmRestore,
};

use call::{blocking, corrupt, limited};
use container::DirectoryContainerRestore;
use guest::DirectoryJob;
pub use guest::guest_in_name;
use leftovers::Remover;
use limits::{CONFIG_BYTES_MAX, LOCK_WAIT, OUTCOME_LOCK_WAIT, RECORD_KEEP, STATUS_WAIT};
pub use manifest::ContainerFormat;
use manifest::{Manifest, SmallFile, config_file, firewall_file};
use restore::DirectoryRestore;
use storage::{Place, Storage, StorageLock};

/// QEMU's tools.
#[derive(Debug, Clone)]
pub struct ToolPaths {
    /// Path of `qemu-img`, or its name if it is in `PATH`.
    pub qemu_img: PathBuf,
    /// Path of `qemu-nbd`, or its name if it is in `PATH`. It serves disks to a restore.
    pub qemu_nbd: PathBuf,
}

impl Default for ToolPaths {
    /// The tools in `PATH`.
    fn default() -> Self {
        Self { qemu_img: "qemu-img".into(), qemu_nbd: "qemu-nbd".into() }
    }
}

/// How to make the provider.
#[derive(Debug, Clone)]
pub struct DirectoryOptions {
    /// The storage's directory (property `path` of `storage.cfg`); made if needed.
    pub path: PathBuf,
    /// QEMU's tools.
    pub tools: ToolPaths,
}

/// The provider of one storage.
#[derive(Debug)]
pub struct DirectoryProvider {
    storage: Storage,
    tools: ToolPaths,
    container_format: ContainerFormat,
    remover: Remover,
}

impl DirectoryProvider {
    /// A provider for the storage at `options.path`. Nothing is looked at yet.
    #[must_use]
    pub fn new(options: DirectoryOptions) -> Self {
        let DirectoryOptions { path, tools } = options;
        // Images name their files from any working directory.
        let path = std::path::absolute(&path).unwrap_or(path);
        let container_format = ContainerFormat::default();
        let remover = Remover::default();
        Self { storage: Storage::new(path), tools, container_format, remover }
    }

    /// The provider that uses its directory only while a file system is mounted at `mount_point`, if that is
    /// given, and makes it only if it `may_make_path`. What is within it is made if needed.
    #[must_use]
    pub fn with_place(self, mount_point: Option<PathBuf>, may_make_path: bool) -> Self {
        let place = Place { mount_point, must_exist: !may_make_path };
        Self { storage: self.storage.in_place(place), ..self }
    }

    /// The provider that stores containers in this format. What is stored already is read whatever it has.
    #[must_use]
    pub fn with_container_format(self, container_format: ContainerFormat) -> Self {
        Self { container_format, ..self }
    }

    async fn make_ready(&self, call: &Call) -> Result<()> {
        let storage = self.storage.clone();
        blocking(move || storage.prepare()).await?;
        let lock = self.storage.must_lock(call, LOCK_WAIT).await?;
        let storage = self.storage.clone();
        let leftovers = blocking(move || {
            let dead = commit::look_for_dead_runs(&storage, &lock)?;
            // Removing may take long.
            drop(lock);
            if let Err(error) = commit::drop_old_records(&storage, RECORD_KEEP) {
                tracing::warn!("Old commit records are kept: {error}");
            }
            let Some(error) = dead.unfinished else { return Ok(dead.leftovers) };
            // What it replaces may be among the rest.
            tracing::warn!("A removal that was interrupted is not finished yet: {error}");
            Ok(Vec::new())
        });
        self.remover.remove(leftovers.await?, call).await;
        Ok(())
    }

    /// Does something short under the storage's lock.
    async fn locked<T: Send + 'static>(
        &self,
        call: &Call,
        work: impl FnOnce(&Storage, &StorageLock) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let lock = self.storage.must_lock(call, LOCK_WAIT).await?;
        let storage = self.storage.clone();
        blocking(move || work(&storage, &lock)).await
    }

    async fn outcome(&self, id: Uuid, call: &Call) -> Result<CommitOutcome> {
        // Nothing is made here: in a mount point without its file system the answer would be wrong.
        // "Pending" is an answer; running into the deadline is none.
        let left = call.deadline.map(|at| at.saturating_duration_since(Instant::now()) / 2);
        let wait = left.map_or(OUTCOME_LOCK_WAIT, |left| left.min(OUTCOME_LOCK_WAIT));
        let Some(lock) = self.storage.lock(call, wait).await? else {
            return Ok(CommitOutcome::Pending);
        };
        let storage = self.storage.clone();
        let (outcome, leftover) = blocking(move || commit::outcome(&storage, id, &lock)).await?;
        self.remover.remove(leftover.into_iter().collect(), call).await;
        Ok(outcome)
    }
}

fn archive_of(storage: &Storage, manifest: &Manifest) -> Archive {
    Archive {
        name: manifest.archive.clone(),
        subtype: manifest.subtype,
        guest_id: manifest.guest_id,
        time_s: manifest.time_s,
        size_bytes: manifest.size_bytes(),
        base: manifest.base().cloned(),
        commit_id: Some(manifest.commit_id),
        protected: attributes::is_protected(storage, &manifest.archive),
        notes: attributes::shown_notes(storage, &manifest.archive),
        verified: attributes::verified(storage, &manifest.archive),
    }
}

fn read_config(storage: &Storage, archive: &str) -> Result<GuestConfig> {
    let manifest = storage.manifest(archive)?;
    let read = |file: &str, expected: &SmallFile| {
        let content = files::read(&storage.archive_path(archive).join(file), CONFIG_BYTES_MAX)?;
        if SmallFile::of(&content) == *expected {
            Ok(content)
        } else {
            Err(corrupt(format!("{file} of archive {archive} does not match its checksum.")))
        }
    };
    Ok(GuestConfig {
        config: read(config_file(manifest.subtype), &manifest.config)?,
        firewall: manifest
            .firewall
            .as_ref()
            .map(|f| read(firewall_file(manifest.subtype), f))
            .transpose()?,
    })
}

fn read_status(storage: &Storage) -> Result<Status> {
    // Else it would be the space of the file system below.
    storage.check_place()?;
    let stat = rustix::fs::statvfs(storage.path()).map_err(|e| {
        Error::io(format!("Cannot ask for the space of {}.", storage.path().display()), e.into())
    })?;
    let free_blocks = stat.f_bavail;
    let total_bytes = stat.f_blocks.saturating_mul(stat.f_frsize);
    let used_bytes = stat.f_blocks.saturating_sub(stat.f_bfree).saturating_mul(stat.f_frsize);
    // What is reserved for root is neither used nor available: count it as not there.
    let reserved = stat.f_bfree.saturating_sub(free_blocks).saturating_mul(stat.f_frsize);
    Ok(Status { total_bytes: total_bytes.saturating_sub(reserved), used_bytes })
}

impl Provider for DirectoryProvider {
    fn describe(&self) -> Description {
        Description {
            name: "directory".to_owned(),
            api_version: API_VERSION,
            capabilities: Capabilities {
                vm_nbd: true,
                vm_restore: true,
                vm_incremental: true,
                notes: true,
                protect: true,
                remove: true,
                verify: true,
                random_read: true,
                container: true,
                container_restore: true,
                log: true,
                ..Capabilities::default()
            },
        }
    }

    fn properties(&self) -> Vec<Property> {
        let property = |name: &str, kind, required, description: &str| Property {
            name: name.to_owned(),
            kind,
            required,
            sensitive: false,
            description: description.to_owned(),
        };
        let path = "The directory of the archives; it is made if needed.";
        let format =
            "How containers are stored: 'tar' (compressed, the default) or 'tree' (as files).";
        vec![
            property("path", PropertyKind::Path, true, path),
            property("container-format", PropertyKind::Text, false, format),
        ]
    }

    fn activate<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<()>> {
        Box::pin(limited(call, "Activating the directory storage", self.make_ready(call)))
    }

    fn status<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<Status>> {
        let storage = self.storage.clone();
        let ask = async move {
            let answer = blocking(move || read_status(&storage));
            tokio::time::timeout(STATUS_WAIT, answer).await.map_err(|e| {
                Error::with_source(Kind::Io, "The directory storage does not answer.", e)
            })?
        };
        Box::pin(limited(call, "Asking for the storage's space", ask))
    }

    fn list<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<Vec<Archive>>> {
        let storage = self.storage.clone();
        let list = blocking(move || {
            let manifests = storage.manifests()?;
            Ok(manifests.iter().map(|m| archive_of(&storage, m)).collect::<Vec<_>>())
        });
        Box::pin(limited(call, "Listing archives", list))
    }

    fn notes<'a>(&'a self, archive: &'a str, call: &'a Call) -> BoxFuture<'a, Result<String>> {
        let storage = self.storage.clone();
        let archive = archive.to_owned();
        let read = blocking(move || {
            storage.manifest(&archive)?;
            attributes::notes(&storage, &archive)
        });
        Box::pin(limited(call, "Reading notes", read))
    }

    fn set_notes<'a>(
        &'a self,
        archive: &'a str,
        notes: &'a str,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<()>> {
        let (archive, notes) = (archive.to_owned(), notes.to_owned());
        let set = self.locked(call, move |storage, lock| {
            attributes::set_notes(storage, &archive, &notes, lock)
        });
        Box::pin(limited(call, "Changing notes", set))
    }

    fn set_protected<'a>(
        &'a self,
        archive: &'a str,
        protected: bool,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<()>> {
        let archive = archive.to_owned();
        let set = self.locked(call, move |storage, lock| {
            attributes::set_protected(storage, &archive, protected, lock)
        });
        Box::pin(limited(call, "Changing an archive's protection", set))
    }

    fn keep_log<'a>(
        &'a self,
        archive: &'a str,
        log: &'a str,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<()>> {
        let (archive, log) = (archive.to_owned(), log.to_owned());
        let keep = self
            .locked(call, move |storage, lock| attributes::set_log(storage, &archive, &log, lock));
        Box::pin(limited(call, "Keeping a log", keep))
    }

    fn log<'a>(&'a self, archive: &'a str, call: &'a Call) -> BoxFuture<'a, Result<String>> {
        let storage = self.storage.clone();
        let archive = archive.to_owned();
        let read = blocking(move || {
            storage.manifest(&archive)?;
            attributes::log(&storage, &archive)
        });
        Box::pin(limited(call, "Reading a log", read))
    }

    fn remove<'a>(&'a self, archive: &'a str, call: &'a Call) -> BoxFuture<'a, Result<()>> {
        let (storage, archive) = (self.storage.clone(), archive.to_owned());
        Box::pin(remove::remove(storage, archive, &self.remover, call))
    }

    fn verify<'a>(
        &'a self,
        archive: &'a str,
        options: &'a VerifyOptions,
        progress: &'a dyn Progress,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<VerifyReport>> {
        Box::pin(verify::verify(self.storage.clone(), archive, options, progress, call))
    }

    fn unreadable<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<Vec<String>>> {
        let storage = self.storage.clone();
        let find = blocking(move || storage.unreadable());
        Box::pin(limited(call, "Looking for damaged archives", find))
    }

    fn guest_config<'a>(
        &'a self,
        archive: &'a str,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<GuestConfig>> {
        let storage = self.storage.clone();
        let archive = archive.to_owned();
        let read = blocking(move || read_config(&storage, &archive));
        Box::pin(limited(call, "Reading a configuration", read))
    }

    fn commit_outcome<'a>(
        &'a self,
        id: Uuid,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<CommitOutcome>> {
        Box::pin(limited(call, "Asking for a commit's outcome", self.outcome(id, call)))
    }

    fn start_job<'a>(
        &'a self,
        _job: JobInfo,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<Box<dyn Job>>> {
        let job: Box<dyn Job> = Box::new(DirectoryJob {
            storage: self.storage.clone(),
            container_format: self.container_format,
        });
        Box::pin(limited(call, "Starting a job", async move { Ok(job) }))
    }

    fn restore_vm_init<'a>(
        &'a self,
        archive: &'a str,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<Box<dyn VmRestore>>> {
        let storage = self.storage.clone();
        let archive = archive.to_owned();
        let qemu_nbd = self.tools.qemu_nbd.clone();
        let limits = call.clone();
        let begin = blocking(move || {
            let restore = DirectoryRestore::begin(&storage, &archive, qemu_nbd, &limits)?;
            let restore: Box<dyn VmRestore> = Box::new(restore);
            Ok(restore)
        });
        Box::pin(limited(call, "Beginning a restore", begin))
    }

    fn restore_container_init<'a>(
        &'a self,
        archive: &'a str,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<Box<dyn ContainerRestore>>> {
        let storage = self.storage.clone();
        let archive = archive.to_owned();
        let limits = call.clone();
        let begin = blocking(move || {
            let restore = DirectoryContainerRestore::begin(&storage, &archive, &limits)?;
            let restore: Box<dyn ContainerRestore> = Box::new(restore);
            Ok(restore)
        });
        Box::pin(limited(call, "Beginning a restore", begin))
    }
}
