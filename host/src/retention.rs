// SPDX-License-Identifier: MIT OR Apache-2.0
//! Archives after their backup: which are kept, notes, protection, removal.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::tz::TimeZone;
use provider_api::{Archive, Call, Capabilities, GuestKind, Provider, check_notes};
use provider_directory::guest_in_name;
use serde::Serialize;
use vzdump_core::config::backup::BackupSettings;
use vzdump_core::job::{Limits, target_lock_path};
use vzdump_core::journal;
use vzdump_core::lock::FileLock;
use vzdump_core::prune::{self, Fate, PruneEntry, Pruner};
use vzdump_core::retention::Retention;

use crate::archives::utc;
use crate::provider_call::{call, fault, in_time};
use crate::{ArchiveName, CancellationToken, Host, HostError, TaskSink};

/// The property of `storage.cfg` and `vzdump.conf` that says what is kept.
const PRUNE_KEY: &str = "prune-backups";
/// The property of `storage.cfg` that limits the protected archives of a guest.
const MAX_PROTECTED_KEY: &str = "max-protected-backups";
/// A guest that is being backed up is not waited for.
const LOCK_WAIT: Duration = Duration::from_secs(1);
/// What a provider may be unable to do, and its name in words.
pub(crate) type Ability = (fn(&Capabilities) -> bool, &'static str);
const NOTES: Ability = (|abilities| abilities.notes, "keep notes");
const LOG: Ability = (|abilities| abilities.log, "keep logs");
const PROTECT: Ability = (|abilities| abilities.protect, "protect archives");
const REMOVE: Ability = (|abilities| abilities.remove, "remove archives");

/// What to prune.
#[derive(Debug, Clone, Default)]
pub struct PruneRequest {
    /// The guests; none means all.
    pub ids: Vec<u32>,
    /// Only guests of this kind.
    pub kind: Option<GuestKind>,
    /// The storage; by default as for a backup.
    pub storage: Option<String>,
    /// What is kept; by default what `storage.cfg`, else `vzdump.conf` says.
    pub retention: Option<Retention>,
    /// Only say what would be done.
    pub dry_run: bool,
}

/// One archive and what became of it.
#[derive(Debug, Clone, Serialize)]
pub struct PrunedArchive {
    /// Its volume id.
    pub volid: String,
    /// Kind of the guest.
    pub subtype: GuestKind,
    /// Number of the guest.
    pub vmid: u32,
    /// Start of the backup, seconds since the epoch.
    pub time_s: i64,
    /// The same in words, UTC; empty for a time that cannot be.
    pub time: String,
    /// What became of it.
    #[serde(flatten)]
    pub fate: Fate,
}

/// What a prune did.
#[derive(Debug, Clone, Serialize)]
pub struct PruneReport {
    /// The storage.
    pub storage: String,
    /// What is kept, as a property string.
    pub retention: String,
    /// Whether nothing was to be done.
    pub dry_run: bool,
    /// All archives of the guests, by guest and time.
    pub archives: Vec<PrunedArchive>,
    /// Guests whose archives were left alone, and why.
    pub problems: Vec<String>,
}

impl PruneReport {
    /// Whether everything that had to go is gone.
    #[must_use]
    pub fn is_success(&self) -> bool {
        let failed = |archive: &PrunedArchive| matches!(archive.fate, Fate::Failed { .. });
        self.problems.is_empty() && !self.archives.iter().any(failed)
    }
}

impl Host {
    /// What a backup to this storage keeps of a guest's archives: what was asked for, else what
    /// `storage.cfg` says of the storage, else what `vzdump.conf` says; none if nobody says anything.
    ///
    /// # Errors
    /// [`HostError::Storage`] names the setting that makes no sense.
    pub fn retention(
        &self,
        storage: &str,
        asked: Option<Retention>,
    ) -> Result<Option<Retention>, HostError> {
        if asked.is_some() {
            return Ok(asked);
        }
        let (place, text) = match self.storage_property(storage, PRUNE_KEY) {
            Some(text) => (format!("storage.cfg, storage '{storage}'"), text),
            None => {
                let settings = self.read_settings()?;
                let Some(text) = settings.get(PRUNE_KEY) else { return Ok(None) };
                ("vzdump.conf".to_owned(), text.to_owned())
            }
        };
        let retention = text.parse();
        retention
            .map(Some)
            .map_err(|fault| HostError::Storage(format!("{place}, {PRUNE_KEY}: {fault}")))
    }

    /// How many protected archives of one guest a storage may hold; none means any number.
    ///
    /// # Errors
    /// [`HostError::Storage`] for a setting that makes no sense.
    pub fn max_protected(&self, storage: &str) -> Result<Option<u32>, HostError> {
        let Some(text) = self.storage_property(storage, MAX_PROTECTED_KEY) else { return Ok(None) };
        match text.parse::<i64>() {
            Ok(-1) => Ok(None),
            Ok(limit) if u32::try_from(limit).is_ok() => Ok(u32::try_from(limit).ok()),
            _ => Err(HostError::Storage(format!(
                "storage.cfg, storage '{storage}', {MAX_PROTECTED_KEY}: '{text}' is neither a number \
                 of archives nor -1."
            ))),
        }
    }

    fn storage_property(&self, storage: &str, key: &str) -> Option<String> {
        let section = self.storages.sections().iter().find(|section| section.id == storage)?;
        section.get(key).map(str::to_owned)
    }

    /// Removes the archives that no rule keeps, guest by guest. Must be awaited to its end; cancel
    /// it by the token.
    ///
    /// # Errors
    /// [`HostError::Storage`] without a storage or a retention, [`HostError::Provider`],
    /// [`HostError::Archive`] when the storage cannot be listed. What goes wrong with a guest or an
    /// archive is in the report.
    pub async fn prune(
        &self,
        request: PruneRequest,
        sink: &dyn TaskSink,
        cancel: &CancellationToken,
    ) -> Result<PruneReport, HostError> {
        let storage = match request.storage {
            Some(storage) => storage,
            None => match self.settings(BackupSettings::default(), None)?.0.storage {
                Some(storage) => storage,
                None => self.default_backup_storage()?,
            },
        };
        let provider = self.providers.get_for_task(&storage, cancel).await?;
        let retention = self.retention(&storage, request.retention)?.ok_or_else(|| {
            HostError::Storage(format!(
                "Nothing says what to keep in the storage '{storage}': use --keep-last and the like, \
                 or set '{PRUNE_KEY}' in storage.cfg."
            ))
        })?;
        activate(provider.as_ref(), &storage, cancel).await?;
        let pruner = Pruner {
            provider: provider.as_ref(),
            storage: &storage,
            retention,
            zone: TimeZone::system(),
            limits: &Limits::default(),
            sink,
            cancel,
        };
        let unlisted =
            |why| HostError::Storage(format!("The storage '{storage}' cannot be listed: {why}"));
        let mut entries = pruner.plan().await.map_err(unlisted)?;
        entries.retain(|entry| {
            (request.ids.is_empty() || request.ids.contains(&entry.vmid))
                && request.kind.is_none_or(|kind| kind == entry.subtype)
        });
        let mut problems = Vec::new();
        if !request.dry_run {
            entries = self.prune_guests(&pruner, entries, &mut problems).await;
        }
        let archives = entries.into_iter().map(|entry| PrunedArchive {
            volid: ArchiveName { storage: storage.clone(), name: entry.archive }.to_string(),
            subtype: entry.subtype,
            vmid: entry.vmid,
            time_s: entry.time_s,
            time: utc(entry.time_s).unwrap_or_default(),
            fate: entry.fate,
        });
        Ok(PruneReport {
            archives: archives.collect(),
            retention: retention.to_string(),
            dry_run: request.dry_run,
            storage,
            problems,
        })
    }

    /// Prunes each guest of which something has to go, under its lock and by a new list.
    async fn prune_guests(
        &self,
        pruner: &Pruner<'_>,
        planned: Vec<PruneEntry>,
        problems: &mut Vec<String>,
    ) -> Vec<PruneEntry> {
        let mut done: Vec<PruneEntry> = Vec::new();
        let same = |a: &PruneEntry, b: &PruneEntry| (a.vmid, a.subtype) == (b.vmid, b.subtype);
        for group in planned.chunk_by(same) {
            let (kind, id) = (group[0].subtype, group[0].vmid);
            if !group.iter().any(|entry| entry.fate == Fate::Remove) {
                done.extend_from_slice(group);
                continue;
            }
            let pruned = match self.lock_target(kind, id, pruner.storage).await {
                Ok(_lock) => pruner.prune_guest(kind, id, None).await,
                Err(error) => Err(crate::chain(&error)),
            };
            match pruned {
                Ok(entries) => done.extend(entries),
                Err(problem) => {
                    problems.push(format!("{kind} {id}: {problem}"));
                    done.extend_from_slice(group);
                }
            }
        }
        done
    }

    async fn lock_target(
        &self,
        kind: GuestKind,
        id: u32,
        storage: &str,
    ) -> Result<FileLock, HostError> {
        let path = target_lock_path(&self.layout, kind, id, storage);
        Ok(FileLock::acquire(&path, &format!("The guest {id}"), LOCK_WAIT).await?)
    }

    /// Removes an archive. Must be awaited to its end; cancel it by the token.
    ///
    /// # Errors
    /// [`HostError::Archive`] for one that is not there, [`HostError::Denied`] for one that is protected or needed, or
    /// whose guest is not known, [`HostError::Storage`],
    /// [`HostError::Lock`] while its guest is backed up, [`HostError::Provider`].
    pub async fn remove_archive(
        &self,
        archive: &str,
        cancel: &CancellationToken,
    ) -> Result<ArchiveName, HostError> {
        let (name, provider) = self.open_archive(archive, REMOVE).await?;
        self.refuse_needed(&name)?;
        activate(provider.as_ref(), &name.storage, cancel).await?;
        let archives = in_time(provider.list(&call())).await.map_err(fault(&name.storage))?;
        let (kind, id) = match in_list(&archives, &name) {
            Ok(found) if found.protected => {
                return Err(HostError::Denied(format!(
                    "The archive '{name}' is protected; `vzdump unprotect {name}` ends that."
                )));
            }
            Ok(found) => (found.subtype, found.guest_id),
            Err(missing) => {
                self.guest_of_unreadable(&name, provider.as_ref()).await?.ok_or(missing)?
            }
        };
        let _lock = self.lock_target(kind, id, &name.storage).await?;
        let limit = Limits::default().removal;
        let removed = prune::remove(provider.as_ref(), &name.name, limit, cancel).await;
        removed.map_err(fault(&name.storage))?;
        Ok(name)
    }

    /// Refuses an archive without which a live restore could not go on.
    fn refuse_needed(&self, name: &ArchiveName) -> Result<(), HostError> {
        let journals = journal::list(&self.layout, None)?;
        let mut records = journals.iter().filter_map(|path| journal::read(path).ok());
        let needs = records.find(|record| {
            record.live.is_some()
                && record.runs
                && !record.complete
                && !record.given_up
                && record.begin.storage == name.storage
                && record.archive.as_ref() == Some(&name.name)
        });
        let Some(record) = needs else { return Ok(()) };
        let id = record.begin.guest_id;
        Err(HostError::Denied(format!(
            "The archive '{name}' is needed by the live restore of VM {id}: `vzdump restore --resume {id}` completes \
             it, `vzdump restore --give-up {id}` ends it."
        )))
    }

    /// The guest of an archive that cannot be read, by its name; none for an archive that is not there.
    async fn guest_of_unreadable(
        &self,
        name: &ArchiveName,
        provider: &dyn Provider,
    ) -> Result<Option<(GuestKind, u32)>, HostError> {
        if !self.unreadable(&name.storage, provider).await?.contains(name) {
            return Ok(None);
        }
        let whose = guest_in_name(&name.name);
        whose.map(Some).ok_or_else(|| HostError::Denied(format!(
            "The archive '{name}' cannot be read, and its name does not say whose it is: it is not removed. Remove it \
             from its storage by hand."
        )))
    }

    /// All notes of an archive.
    ///
    /// # Errors
    /// [`HostError::Archive`], [`HostError::Storage`], [`HostError::Provider`].
    pub async fn notes(&self, archive: &str) -> Result<String, HostError> {
        let (name, provider) = self.open_archive(archive, NOTES).await?;
        let notes = in_time(provider.notes(&name.name, &call())).await;
        notes.map_err(fault(&name.storage))
    }

    /// The log of the backup that made an archive.
    ///
    /// # Errors
    /// As [`Host::notes`].
    pub async fn log(&self, archive: &str) -> Result<String, HostError> {
        let (name, provider) = self.open_archive(archive, LOG).await?;
        let log = in_time(provider.log(&name.name, &call())).await;
        log.map_err(fault(&name.storage))
    }

    /// Replaces the notes of an archive; empty ones are removed.
    ///
    /// # Errors
    /// As [`Host::notes`], and [`HostError::Denied`] for text that cannot be notes.
    pub async fn set_notes(&self, archive: &str, notes: &str) -> Result<ArchiveName, HostError> {
        check_notes(notes).map_err(HostError::Denied)?;
        let (name, provider) = self.open_archive(archive, NOTES).await?;
        let set = in_time(provider.set_notes(&name.name, notes, &call())).await;
        set.map_err(fault(&name.storage))?;
        Ok(name)
    }

    /// Protects an archive from removal, or no longer.
    ///
    /// # Errors
    /// As [`Host::notes`], and [`HostError::Denied`] when the storage holds as many protected
    /// archives of the guest as it may.
    pub async fn set_protected(
        &self,
        archive: &str,
        protected: bool,
    ) -> Result<ArchiveName, HostError> {
        let (name, provider) = self.open_archive(archive, PROTECT).await?;
        if protected && let Some(limit) = self.max_protected(&name.storage)? {
            let archives = in_time(provider.list(&call())).await.map_err(fault(&name.storage))?;
            let found = in_list(&archives, &name)?;
            let of_guest = archives
                .iter()
                .filter(|other| other.subtype == found.subtype && other.guest_id == found.guest_id);
            let others = of_guest.filter(|other| other.protected && other.name != name.name);
            if others.count() as u64 >= u64::from(limit) {
                return Err(HostError::Denied(format!(
                    "The storage '{}' may hold {limit} protected archives of a guest; unprotect \
                     another one of guest {}, or raise '{MAX_PROTECTED_KEY}'.",
                    name.storage, found.guest_id
                )));
            }
        }
        let set = in_time(provider.set_protected(&name.name, protected, &call())).await;
        set.map_err(fault(&name.storage))?;
        Ok(name)
    }

    /// An archive and its provider, if that can do what is wanted.
    pub(crate) async fn open_archive(
        &self,
        archive: &str,
        ability: Ability,
    ) -> Result<(ArchiveName, Arc<dyn Provider>), HostError> {
        let name = self.resolve_archive(archive).await?;
        let provider = self.able_provider(&name.storage, ability).await?;
        Ok((name, provider))
    }

    /// The provider of a storage, if it can do what is wanted.
    pub(crate) async fn able_provider(
        &self,
        storage: &str,
        (is_able, what): Ability,
    ) -> Result<Arc<dyn Provider>, HostError> {
        let provider = self.providers.get(storage).await.map_err(HostError::Storage)?;
        if is_able(&provider.describe().capabilities) {
            return Ok(provider);
        }
        Err(HostError::Storage(format!("The provider of the storage '{storage}' cannot {what}.")))
    }
}

/// Lets the provider clean up first, so that nothing is removed or merged on top of a half removal.
pub(crate) async fn activate(
    provider: &dyn Provider,
    storage: &str,
    cancel: &CancellationToken,
) -> Result<(), HostError> {
    let limit = Limits::default().activate;
    let call = Call { cancel: cancel.child_token(), deadline: Instant::now().checked_add(limit) };
    let activated = tokio::time::timeout(limit, provider.activate(&call)).await;
    match activated {
        Ok(result) => result.map_err(fault(storage)),
        Err(_) => Err(HostError::Storage(format!(
            "The storage '{storage}' did not become ready in time."
        ))),
    }
}

fn in_list<'a>(archives: &'a [Archive], name: &ArchiveName) -> Result<&'a Archive, HostError> {
    let found = archives.iter().find(|archive| archive.name == name.name);
    found.ok_or_else(|| HostError::Archive(format!("There is no archive '{name}'.")))
}
