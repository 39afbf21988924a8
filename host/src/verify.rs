// SPDX-License-Identifier: MIT OR Apache-2.0
//! Verifies archives, those first that others build upon: each then needs to be read once only.

use std::collections::BTreeMap;
use std::sync::Arc;

use provider_api::{
    Archive, Damage, GuestKind, Kind, Provider, Uuid, Verified, VerifyExtent, VerifyOptions,
    VerifyReport, check_archive_name,
};
use provider_directory::guest_in_name;
use serde::Serialize;
use vzdump_core::job::Limits;
use vzdump_core::prune::sort_by_guest;
use vzdump_core::verify::verify;

use crate::archives::keep_once;
use crate::provider_call::{call, fault, in_time};
use crate::providers::interrupted;
use crate::results::last_verified;
use crate::retention::{Ability, activate};
use crate::{ArchiveName, CancellationToken, Host, HostError, TaskSink, chain, clean, size};

const VERIFY: Ability = (|abilities| abilities.verify, "verify archives");
const DAY_S: i64 = 86_400;

/// What to verify.
#[derive(Debug, Clone)]
pub struct VerifyRequest {
    /// The archives: volume ids, or names that only one storage has. None means all of the storage.
    pub archives: Vec<String>,
    /// The storage, if no archives are given.
    pub storage: Option<String>,
    /// Only archives of these guests; none means all.
    pub guests: Vec<u32>,
    /// How much is read.
    pub extent: VerifyExtent,
    /// Archives are left out that were found sound, by reading at least this much, within so many days.
    pub not_since_days: Option<u32>,
}

/// What became of an archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "result")]
pub enum VerifyResult {
    /// Nothing is damaged, as far as was looked.
    Sound,
    /// Something is.
    Damaged {
        /// In how many places.
        damage_count: u64,
        /// The first of them.
        damage: Vec<Damage>,
    },
    /// It was verified lately.
    Skipped,
    /// It was removed meanwhile.
    Gone,
    /// It could not be verified.
    Failed {
        /// Why.
        error: String,
    },
}

/// One archive and what became of it.
#[derive(Debug, Clone, Serialize)]
pub struct VerifiedArchive {
    /// Its volume id.
    pub volid: String,
    /// Kind of the guest; of an archive too damaged to tell by its name, if that tells.
    pub subtype: Option<GuestKind>,
    /// Number of the guest; of an archive too damaged to tell by its name, if that tells.
    pub vmid: Option<u32>,
    /// Bytes of its disks that were read.
    pub read_bytes: u64,
    /// Blocks of its disks that were looked at.
    pub blocks: u64,
    /// What became of it.
    #[serde(flatten)]
    pub result: VerifyResult,
}

/// What a verification found.
#[derive(Debug, Clone, Serialize)]
pub struct VerifySummary {
    /// How much was read.
    #[serde(flatten)]
    pub extent: VerifyExtent,
    /// The archives, in the order in which they were looked at.
    pub archives: Vec<VerifiedArchive>,
}

impl VerifySummary {
    /// Whether everything could be verified and nothing is damaged.
    #[must_use]
    pub fn is_success(&self) -> bool {
        let is_bad = |archive: &VerifiedArchive| {
            matches!(archive.result, VerifyResult::Damaged { .. } | VerifyResult::Failed { .. })
        };
        !self.archives.iter().any(is_bad)
    }
}

/// An archive to be verified; of one that is too damaged only the name is known.
struct Wanted {
    name: String,
    known: Option<Archive>,
}

impl Host {
    /// Verifies archives. What is damaged is in the summary. Must be awaited to its end; cancel it by
    /// the token.
    ///
    /// # Errors
    /// [`HostError::Archive`], [`HostError::Storage`] for what is not there or cannot be verified,
    /// [`HostError::Provider`] for a storage that cannot be listed.
    pub async fn verify(
        &self,
        request: VerifyRequest,
        sink: &dyn TaskSink,
        cancel: &CancellationToken,
    ) -> Result<VerifySummary, HostError> {
        let mut names: Vec<ArchiveName> = Vec::new();
        for text in &request.archives {
            let name = self.resolve_archive(text).await?;
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let mut storages: Vec<String> = request.storage.iter().cloned().collect();
        for name in &names {
            if !storages.contains(&name.storage) {
                storages.push(name.storage.clone());
            }
        }
        let mut work = Vec::new();
        // All that may be wrong with the request, before hours of reading.
        for storage in storages {
            let provider = cancel.run_until_cancelled(self.able_provider(&storage, VERIFY)).await;
            let provider = provider.ok_or_else(|| interrupted(&storage))??;
            activate(provider.as_ref(), &storage, cancel).await?;
            let of_storage = names.iter().filter(|name| name.storage == storage);
            let of_storage: Vec<_> = of_storage.map(|name| name.name.as_str()).collect();
            let wanted =
                choose(provider.as_ref(), &storage, &of_storage, &request.guests, sink).await?;
            work.push((storage, provider, wanted));
        }
        let begin_s = now_s();
        let mut summary = VerifySummary { extent: request.extent, archives: Vec::new() };
        let kept = self.results::<Verified>();
        for (storage, provider, wanted) in work {
            let request = &request;
            let task = Task { storage, provider, request, begin_s, kept: &kept, sink, cancel };
            let begin = summary.archives.len();
            task.run(wanted, &mut summary.archives).await;
            let found = task.not_remembered(&summary.archives[begin..]).await;
            if let Err(error) = self.keep(found).await {
                sink.warn(&format!("what was found is not kept: {}", chain(&error)));
            }
        }
        Ok(summary)
    }
}

impl VerifyResult {
    /// How many places were found to be damaged; none if it did not come to its end.
    fn damage_count(&self) -> Option<u64> {
        match self {
            Self::Sound => Some(0),
            Self::Damaged { damage_count, .. } => Some(*damage_count),
            Self::Skipped | Self::Gone | Self::Failed { .. } => None,
        }
    }
}

/// The archives that are wanted, those first that were made first.
async fn choose(
    provider: &dyn Provider,
    storage: &str,
    names: &[&str],
    guests: &[u32],
    sink: &dyn TaskSink,
) -> Result<Vec<Wanted>, HostError> {
    let mut archives = in_time(provider.list(&call())).await.map_err(fault(storage))?;
    let mut unreadable = in_time(provider.unreadable(&call())).await.map_err(fault(storage))?;
    // A bad name becomes part of no line and no call.
    let is_good = |name: &str| {
        let checked = check_archive_name(name);
        if let Err(fault) = &checked {
            sink.error(&format!("an archive of '{storage}' is left out: {}", clean(fault)));
        }
        checked.is_ok()
    };
    archives.retain(|archive| is_good(&archive.name));
    unreadable.retain(|name| is_good(name));
    // One is read once.
    for problem in keep_once(&mut archives) {
        sink.error(&format!("{storage}: {problem}"));
    }
    if !names.is_empty() {
        let is_there = |name: &&str| {
            archives.iter().map(|archive| &archive.name).chain(&unreadable).any(|n| n == name)
        };
        if let Some(missing) = names.iter().find(|name| !is_there(name)) {
            return Err(HostError::Archive(format!(
                "There is no archive '{}'.",
                ArchiveName { storage: storage.to_owned(), name: (*missing).to_owned() }
            )));
        }
        archives.retain(|archive| names.contains(&archive.name.as_str()));
        unreadable.retain(|name| names.contains(&name.as_str()));
    }
    if !guests.is_empty() {
        archives.retain(|archive| guests.contains(&archive.guest_id));
        // Its name says whose it is, or it may be anybody's.
        let may_be_meant =
            |name: &str| guest_in_name(name).is_none_or(|(_, id)| guests.contains(&id));
        unreadable.retain(|name| may_be_meant(name));
    }
    sort_by_guest(&mut archives);
    let known = archives.into_iter().map(|a| Wanted { name: a.name.clone(), known: Some(a) });
    let unknown = unreadable.into_iter().map(|name| Wanted { name, known: None });
    Ok(known.chain(unknown).collect())
}

/// The verification of one storage's archives.
struct Task<'a> {
    storage: String,
    provider: Arc<dyn Provider>,
    request: &'a VerifyRequest,
    /// When it began.
    begin_s: i64,
    /// What this host has kept of earlier ones.
    kept: &'a BTreeMap<String, Verified>,
    sink: &'a dyn TaskSink,
    cancel: &'a CancellationToken,
}

impl Task<'_> {
    async fn run(&self, wanted: Vec<Wanted>, done: &mut Vec<VerifiedArchive>) {
        let mut options = VerifyOptions { extent: self.request.extent, known_sound: Vec::new() };
        for Wanted { name, known } in wanted {
            let volid = ArchiveName { storage: self.storage.clone(), name: name.clone() };
            let guest = known.as_ref().map(|known| (known.subtype, known.guest_id));
            let guest = guest.or_else(|| guest_in_name(&name));
            let mut archive = VerifiedArchive {
                volid: volid.to_string(),
                subtype: guest.map(|(kind, _)| kind),
                vmid: guest.map(|(_, id)| id),
                read_bytes: 0,
                blocks: 0,
                result: VerifyResult::Skipped,
            };
            if !known.as_ref().is_some_and(|known| self.is_fresh(known)) {
                self.one(&name, &options, &mut archive).await;
            }
            if archive.result == VerifyResult::Sound {
                options.known_sound.push(name);
            }
            done.push(archive);
        }
    }

    /// Whether an archive was found sound lately, by reading at least as much as now.
    fn is_fresh(&self, archive: &Archive) -> bool {
        let volid = ArchiveName { storage: self.storage.clone(), name: archive.name.clone() };
        let kept = self.kept.get(&volid.to_string()).copied();
        let verified = last_verified(archive.time_s, archive.verified, kept);
        let (Some(days), Some(verified)) = (self.request.not_since_days, verified) else {
            return false;
        };
        let percent = |extent| match extent {
            VerifyExtent::All => 101,
            VerifyExtent::Sample { percent, .. } => percent,
        };
        let age_s = now_s().saturating_sub(verified.time_s);
        verified.damage_count == 0
            && (0..i64::from(days) * DAY_S).contains(&age_s)
            && percent(verified.extent) >= percent(self.request.extent)
    }

    /// What was found just now of archives with which their provider does not remember it, by volume id.
    async fn not_remembered(&self, done: &[VerifiedArchive]) -> Vec<(String, Verified)> {
        let found = done.iter().filter_map(|archive| {
            let damage_count = archive.result.damage_count()?;
            let extent = self.request.extent;
            Some((archive.volid.clone(), Verified { time_s: now_s(), extent, damage_count }))
        });
        let mut found: Vec<_> = found.collect();
        if found.is_empty() {
            return found;
        }
        let Ok(archives) = in_time(self.provider.list(&call())).await else { return found };
        // An older record is of another verification: the storage may be full since.
        let is_of_now = |verified: Verified| verified.time_s >= self.begin_s;
        let remembers = |volid: &str| {
            let mut all = archives.iter().filter(|archive| archive.verified.is_some_and(is_of_now));
            all.any(|archive| volid.split_once(":backup/").is_some_and(|(_, n)| n == archive.name))
        };
        found.retain(|(volid, _)| !remembers(volid));
        found
    }

    async fn one(&self, name: &str, options: &VerifyOptions, archive: &mut VerifiedArchive) {
        if self.cancel.is_cancelled() {
            archive.result = VerifyResult::Failed { error: "the task was cancelled".to_owned() };
            return;
        }
        let (sink, volid) = (self.sink, &archive.volid);
        sink.info(&format!("verifying '{volid}'"));
        let guest_id = archive.vmid.unwrap_or(0);
        let provider = self.provider.as_ref();
        let limits = Limits::default();
        let verified = verify(provider, name, guest_id, options, &limits, sink, self.cancel).await;
        archive.result = match verified {
            Ok(report) => {
                archive.read_bytes = report.read_bytes;
                archive.blocks = report.blocks;
                self.judge(volid, report)
            }
            Err(error) if error.kind == Kind::NotFound && self.is_gone(name).await => {
                sink.info(&format!("'{volid}' was removed meanwhile"));
                VerifyResult::Gone
            }
            Err(error) => {
                let error = chain(&error);
                sink.error(&format!("'{volid}' cannot be verified: {error}"));
                VerifyResult::Failed { error }
            }
        };
    }

    /// Whether an archive is listed no more: something else than the archive may be missing.
    async fn is_gone(&self, name: &str) -> bool {
        let list = in_time(self.provider.list(&call())).await;
        list.is_ok_and(|archives| archives.iter().all(|archive| archive.name != name))
    }

    /// Tells what a provider found. Its texts are untrusted.
    fn judge(&self, volid: &str, report: VerifyReport) -> VerifyResult {
        let VerifyReport { read_bytes, mut damage, damage_count, .. } = report;
        if damage_count == 0 && damage.is_empty() {
            self.sink.info(&format!("'{volid}' is sound, {} were read", size(read_bytes)));
            return VerifyResult::Sound;
        }
        damage.truncate(provider_api::DAMAGE_MAX);
        for place in &mut damage {
            place.archive = clean(&place.archive);
            place.device = place.device.as_deref().map(clean);
            place.problem = clean(&place.problem);
            self.sink.error(&format!("'{volid}' is damaged: {}", words(place)));
        }
        let listed = damage.len() as u64;
        let damage_count = damage_count.max(listed);
        if damage_count > listed {
            self.sink
                .error(&format!("'{volid}' is damaged in {} more places", damage_count - listed));
        }
        VerifyResult::Damaged { damage_count, damage }
    }
}

fn words(damage: &Damage) -> String {
    let mut place = damage.archive.clone();
    if let Some(device) = &damage.device {
        place.push_str(&format!(", disk {device}"));
    }
    if let Some(area) = damage.area {
        place.push_str(&format!(", {} bytes at {}", area.length_bytes, area.offset));
    }
    format!("{place}: {}", damage.problem)
}

/// A number for [`VerifyExtent::Sample`] that was never used before, as far as chance goes.
#[must_use]
pub fn random_seed() -> u32 {
    let [a, b, c, d, ..] = *Uuid::new_v4().as_bytes();
    u32::from_le_bytes([a, b, c, d])
}

fn now_s() -> i64 {
    jiff::Timestamp::now().as_second()
}
