// SPDX-License-Identifier: MIT OR Apache-2.0
//! Archives: what there is, and the configurations in them.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use provider_api::{
    Archive, GuestConfig, GuestKind, Provider, Verified, check_archive_name, notes_line,
};
use serde::Serialize;
use vzdump_core::config::storage::is_storage_id;

use crate::boot::Booted;
use crate::provider_call::{call, fault, in_time};
use crate::results::last_verified;
use crate::{Host, HostError, clean};

/// Between storage and name in a volume id.
const MARK: &str = ":backup/";

/// The volume id of an archive, `<storage>:backup/<name>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchiveName {
    /// The storage.
    pub storage: String,
    /// The name within it.
    pub name: String,
}

impl fmt::Display for ArchiveName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{MARK}{}", self.storage, self.name)
    }
}

impl FromStr for ArchiveName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (storage, name) =
            text.split_once(MARK).filter(|(storage, _)| is_storage_id(storage)).ok_or_else(
                || format!("'{text}' is not an archive: '<storage>:backup/<name>' is expected."),
            )?;
        check_archive_name(name)?;
        Ok(Self { storage: storage.to_owned(), name: name.to_owned() })
    }
}

/// One archive.
#[derive(Debug, Clone, Serialize)]
pub struct ArchiveInfo {
    /// Its volume id.
    pub volid: String,
    /// Kind of the guest.
    pub subtype: GuestKind,
    /// Number of the guest.
    pub vmid: u32,
    /// Start of the backup, seconds since the epoch.
    pub time_s: i64,
    /// The same in words, UTC.
    pub time: String,
    /// Bytes it takes in the storage, without the archives it builds upon.
    pub size_bytes: u64,
    /// The archive it builds upon.
    pub base: Option<String>,
    /// Whether it is protected from removal.
    pub protected: bool,
    /// The first line of its notes.
    pub notes: Option<String>,
    /// The last verification that came to its end.
    pub verified: Option<Verified>,
    /// The last test of this host whether it boots.
    pub booted: Option<Booted>,
}

/// A storage that could not be listed, or an archive that is not shown.
#[derive(Debug, Clone, Serialize)]
pub struct StorageProblem {
    /// The storage.
    pub storage: String,
    /// The archive, if it is one that cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volid: Option<String>,
    /// What is wrong.
    pub problem: String,
}

impl StorageProblem {
    fn new(storage: &str, problem: String) -> Self {
        Self { storage: storage.to_owned(), volid: None, problem }
    }

    fn unreadable(archive: &ArchiveName) -> Self {
        let problem = format!(
            "'{archive}' cannot be read; `vzdump verify {archive}` says why, and `vzdump remove {archive}` removes \
             it if nothing builds upon it."
        );
        Self { volid: Some(archive.to_string()), ..Self::new(&archive.storage, problem) }
    }
}

/// All archives of one storage or of all.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ArchiveList {
    /// The archives, by guest and time.
    pub archives: Vec<ArchiveInfo>,
    /// What could not be shown.
    pub problems: Vec<StorageProblem>,
}

impl Host {
    /// Lists the archives of one storage, or of all. A storage that fails is a problem in the list,
    /// unless it is the one that was asked for.
    ///
    /// # Errors
    /// [`HostError::Storage`], [`HostError::Provider`].
    pub async fn list(&self, storage: Option<&str>) -> Result<ArchiveList, HostError> {
        let mut list = ArchiveList::default();
        if let Some(storage) = storage {
            self.list_storage(storage, &mut list).await?;
        } else {
            for storage in self.providers.backup_ids() {
                if let Err(error) = self.list_storage(&storage, &mut list).await {
                    list.problems.push(StorageProblem::new(&storage, crate::chain(&error)));
                }
            }
        }
        let mut booted = self.results::<Booted>();
        let verified = self.results::<Verified>();
        for archive in &mut list.archives {
            // What was found before the archive was made is about another one of its name.
            let tested = booted.remove(&archive.volid);
            archive.booted = tested.filter(|booted| booted.time_s >= archive.time_s);
            let kept = verified.get(&archive.volid).copied();
            archive.verified = last_verified(archive.time_s, archive.verified, kept);
        }
        list.archives.sort_by(|a, b| {
            (a.vmid, a.time_s, a.volid.as_str()).cmp(&(b.vmid, b.time_s, b.volid.as_str()))
        });
        Ok(list)
    }

    async fn list_storage(&self, storage: &str, list: &mut ArchiveList) -> Result<(), HostError> {
        let provider = self.providers.get(storage).await.map_err(HostError::Storage)?;
        let mut archives = in_time(provider.list(&call())).await.map_err(fault(storage))?;
        for problem in keep_once(&mut archives) {
            list.problems.push(StorageProblem::new(storage, problem));
        }
        for archive in archives {
            match info(storage, archive) {
                Ok(info) => list.archives.push(info),
                Err(problem) => list.problems.push(StorageProblem::new(storage, problem)),
            }
        }
        match self.unreadable(storage, provider.as_ref()).await {
            Ok(names) => list.problems.extend(names.iter().map(StorageProblem::unreadable)),
            Err(error) => {
                list.problems.push(StorageProblem::new(storage, crate::chain(&error)));
            }
        }
        Ok(())
    }

    /// The archives that a storage does not list because they are too damaged.
    pub(crate) async fn unreadable(
        &self,
        storage: &str,
        provider: &dyn Provider,
    ) -> Result<Vec<ArchiveName>, HostError> {
        if !provider.describe().capabilities.verify {
            return Ok(Vec::new());
        }
        let mut names = in_time(provider.unreadable(&call())).await.map_err(fault(storage))?;
        // A bad name becomes part of no line and no call.
        names.retain(|name| check_archive_name(name).is_ok());
        names.sort();
        let archive = |name| ArchiveName { storage: storage.to_owned(), name };
        Ok(names.into_iter().map(archive).collect())
    }

    /// The guest's configuration files in an archive.
    ///
    /// # Errors
    /// [`HostError::Archive`], [`HostError::Storage`], [`HostError::Provider`].
    pub async fn show_config(&self, archive: &str) -> Result<GuestConfig, HostError> {
        let archive = self.resolve_archive(archive).await?;
        let provider = self.providers.get(&archive.storage).await.map_err(HostError::Storage)?;
        let config = in_time(provider.guest_config(&archive.name, &call())).await;
        config.map_err(fault(&archive.storage))
    }

    /// The archive of a volume id, or of a name that only one storage has.
    ///
    /// # Errors
    /// [`HostError::Archive`].
    pub async fn resolve_archive(&self, text: &str) -> Result<ArchiveName, HostError> {
        if text.contains(MARK) {
            return text.parse().map_err(HostError::Archive);
        }
        let list = self.list(None).await?;
        // One that cannot be read is verified and removed by its name, too.
        let unreadable = list.problems.iter().filter_map(|problem| problem.volid.as_deref());
        let all = list.archives.iter().map(|info| info.volid.as_str()).chain(unreadable);
        let found = all.filter_map(|volid| volid.parse::<ArchiveName>().ok());
        let mut found: Vec<_> = found.filter(|archive| archive.name == text).collect();
        match (found.pop(), found.is_empty()) {
            (Some(archive), true) => Ok(archive),
            (None, _) => Err(HostError::Archive(not_found(text, &list.problems))),
            (Some(_), false) => Err(HostError::Archive(format!(
                "Several storages have an archive '{text}'; give '<storage>:backup/{text}'."
            ))),
        }
    }
}

/// That an archive was not found, and where it may be all the same.
fn not_found(name: &str, problems: &[StorageProblem]) -> String {
    let mut first_of_storages: Vec<_> =
        problems.iter().filter(|problem| problem.volid.is_none()).collect();
    // A provider may have many, and one is enough to go and look.
    first_of_storages.dedup_by(|later, first| later.storage == first.storage);
    let words = |problem: &&StorageProblem| format!("{}: {}", problem.storage, problem.problem);
    let words: Vec<_> = first_of_storages.iter().map(words).collect();
    if words.is_empty() {
        return format!("There is no archive '{name}'.");
    }
    format!(
        "There is no archive '{name}' among those that could be listed; others could not: {}",
        clean(&words.join("; "))
    )
}

/// A time in words; none if it cannot be.
#[must_use]
pub fn utc(time_s: i64) -> Option<String> {
    jiff::Timestamp::from_second(time_s).ok().map(|time| time.to_string())
}

/// Leaves one archive of each name, the first, and says of which names there were more: each names one archive
/// in every command.
pub(crate) fn keep_once(archives: &mut Vec<Archive>) -> Vec<String> {
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    archives.retain(|archive| {
        let count = counts.entry(archive.name.clone()).or_default();
        *count += 1;
        *count == 1
    });
    let more = counts.into_iter().filter(|(_, count)| *count > 1);
    let problem = |(name, count)| {
        format!(
            "The provider lists the archive '{name}' {count} times, which is a fault of the provider; the \
             first one is taken."
        )
    };
    more.map(problem).collect()
}

/// Everything a provider says is checked: it becomes part of command lines and terminals.
fn info(storage: &str, archive: Archive) -> Result<ArchiveInfo, String> {
    check_archive_name(&archive.name)?;
    let volid = |name| format!("{storage}{MARK}{name}");
    let base = match archive.base {
        Some(base) => {
            check_archive_name(&base)?;
            Some(volid(base))
        }
        None => None,
    };
    let time = utc(archive.time_s)
        .ok_or_else(|| format!("Archive '{}' has an impossible time.", archive.name))?;
    Ok(ArchiveInfo {
        volid: volid(archive.name),
        subtype: archive.subtype,
        vmid: archive.guest_id,
        time_s: archive.time_s,
        time,
        size_bytes: archive.size_bytes,
        base,
        protected: archive.protected,
        // Cut here as well: who sends more than a line could send anything.
        notes: archive.notes.as_deref().and_then(notes_line).map(|line| clean(&line)),
        verified: archive.verified,
        booted: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_names_are_taken_apart() {
        let name: ArchiveName = "store:backup/a/b:c".parse().unwrap();
        assert_eq!((name.storage.as_str(), name.name.as_str()), ("store", "a/b:c"));
        assert_eq!(name.to_string(), "store:backup/a/b:c");
        for bad in ["a", "store:a", "../x:backup/a", "store:backup/../a", "store:backup/"] {
            assert!(bad.parse::<ArchiveName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn what_a_provider_says_is_checked() {
        let archive = |name: &str, time_s| Archive {
            name: name.to_owned(),
            subtype: GuestKind::Qemu,
            guest_id: 100,
            time_s,
            size_bytes: 1,
            base: None,
            commit_id: None,
            protected: true,
            notes: Some("one\u{1b}\ntwo".to_owned()),
            verified: None,
        };
        let good = info("store", archive("a", 0)).unwrap();
        assert_eq!(
            (good.volid.as_str(), good.time.as_str()),
            ("store:backup/a", "1970-01-01T00:00:00Z")
        );
        assert!(
            good.protected && good.notes.is_some_and(|notes| !notes.contains(char::is_control))
        );
        assert!(info("store", archive("\u{1b}[2J", 0)).is_err());
        assert!(info("store", archive("a", i64::MAX)).is_err());
        let base = Archive { base: Some("../x".into()), ..archive("a", 0) };
        assert!(info("store", base).is_err());
    }
}
