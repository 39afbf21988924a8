// SPDX-License-Identifier: MIT OR Apache-2.0
//! Removes the archives that a retention does not keep, one guest at a time.
//!
//! The caller holds the guest's lock of the storage (see [`crate::job::target_lock_path`]), so the
//! list that is decided upon cannot miss a backup of this host. A provider refuses what is protected,
//! read or built upon meanwhile. Those made last go first: a chain is then merged from its small end.

use std::time::Duration;

use jiff::tz::TimeZone;
use provider_api::{Archive, CancellationToken, GuestKind, Kind, Provider, check_archive_name};
use serde::Serialize;

use crate::job::{Limits, call_within, chain};
use crate::retention::{Mark, Retention, Rule, by_age, plan};
use crate::task_log::{TaskSink, clean};

/// What a prune has done with an archive, or would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "mark")]
pub enum Fate {
    /// Kept.
    Keep {
        /// The rule that keeps it.
        rule: Rule,
    },
    /// Kept, because it is protected.
    Protected,
    /// Kept, because its time cannot be.
    Undated,
    /// Kept, because it was made just now: its time must be wrong.
    New,
    /// To be removed, or not yet.
    Remove,
    /// Removed.
    Removed,
    /// No rule keeps it, but other archives need it and cannot do without.
    Needed {
        /// These.
        by: Vec<String>,
    },
    /// It could not be removed.
    Failed {
        /// Why.
        error: String,
    },
}

/// One archive and what becomes of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PruneEntry {
    /// Name of the archive within the storage.
    pub archive: String,
    /// Kind of the guest.
    pub subtype: GuestKind,
    /// Number of the guest.
    pub vmid: u32,
    /// Start of the backup, seconds since the epoch.
    pub time_s: i64,
    /// What becomes of it.
    #[serde(flatten)]
    pub fate: Fate,
}

/// Prunes one storage.
pub struct Pruner<'a> {
    /// The storage's provider, activated.
    pub provider: &'a dyn Provider,
    /// Name of the storage, for messages.
    pub storage: &'a str,
    /// What is kept.
    pub retention: Retention,
    /// Where hours and days begin.
    pub zone: TimeZone,
    /// Bounds of all waits.
    pub limits: &'a Limits,
    /// Gets a line for each removal.
    pub sink: &'a dyn TaskSink,
    /// Ends the pruning.
    pub cancel: &'a CancellationToken,
}

impl Pruner<'_> {
    /// Says what becomes of all archives of the storage, by guest and time; removes nothing.
    ///
    /// # Errors
    /// The storage cannot be listed, in words.
    pub async fn plan(&self) -> Result<Vec<PruneEntry>, String> {
        Ok(self.decide(self.list().await?))
    }

    /// Prunes one guest's archives. `new` is the archive that was made just now, if there is one; it
    /// stays whatever its time.
    ///
    /// # Errors
    /// The storage cannot be listed, or its provider cannot remove archives, in words. What became of
    /// single archives is in the result.
    pub async fn prune_guest(
        &self,
        kind: GuestKind,
        id: u32,
        new: Option<&str>,
    ) -> Result<Vec<PruneEntry>, String> {
        let mut archives = self.list().await?;
        archives.retain(|archive| archive.subtype == kind && archive.guest_id == id);
        let mut entries = self.decide(archives);
        if !self.provider.describe().capabilities.remove {
            if entries.iter().any(|entry| entry.fate == Fate::Remove) {
                return Err(format!(
                    "the provider of the storage '{}' cannot remove archives",
                    self.storage
                ));
            }
            return Ok(entries);
        }
        // From the newest to the oldest.
        for entry in entries.iter_mut().rev().filter(|entry| entry.fate == Fate::Remove) {
            if new == Some(entry.archive.as_str()) {
                self.sink.warn(&format!(
                    "'{}' was made just now and is kept, but no rule keeps it: are there archives \
                     from the future?",
                    self.volid(&entry.archive)
                ));
                entry.fate = Fate::New;
                continue;
            }
            if self.cancel.is_cancelled() {
                entry.fate = Fate::Failed { error: "the task was cancelled".to_owned() };
                continue;
            }
            entry.fate = self.remove(&entry.archive).await;
        }
        let is_removed = |entry: &&PruneEntry| entry.fate == Fate::Removed;
        if let Some(latest_s) = entries.iter().filter(is_removed).map(|entry| entry.time_s).max() {
            wait_until_after(latest_s).await;
        }
        Ok(entries)
    }

    fn volid(&self, archive: &str) -> String {
        format!("{}:backup/{archive}", self.storage)
    }

    async fn remove(&self, archive: &str) -> Fate {
        let volid = self.volid(archive);
        self.sink.info(&format!("removing backup '{volid}'"));
        match remove(self.provider, archive, self.limits.removal, self.cancel).await {
            Ok(()) => Fate::Removed,
            // Somebody else was faster.
            Err(error) if error.kind == Kind::NotFound && self.is_gone(archive).await => {
                Fate::Removed
            }
            Err(error) if error.kind == Kind::Protected => Fate::Protected,
            Err(error) if error.kind == Kind::HasDependents => {
                let by: Vec<String> = error.dependents.iter().map(|name| clean(name)).collect();
                self.sink.info(&format!("'{volid}' stays: {} cannot do without", by.join(", ")));
                Fate::Needed { by }
            }
            Err(error) => {
                let error = chain(&error);
                self.sink.warn(&format!("cannot remove backup '{volid}': {error}"));
                Fate::Failed { error }
            }
        }
    }

    /// Whether an archive is listed no more: something else than the archive may be missing.
    async fn is_gone(&self, archive: &str) -> bool {
        let list = list(self.provider, self.limits, self.cancel).await;
        list.is_ok_and(|archives| archives.iter().all(|other| other.name != archive))
    }

    /// Lists what a rule can speak about: a bad name becomes part of no command.
    async fn list(&self) -> Result<Vec<Archive>, String> {
        let mut archives = list(self.provider, self.limits, self.cancel).await?;
        archives.retain(|archive| match check_archive_name(&archive.name) {
            Ok(()) => true,
            Err(fault) => {
                self.sink.warn(&format!("an archive is left alone: {}", clean(&fault)));
                false
            }
        });
        // One that counts twice would be kept once and removed once.
        let mut names: Vec<&str> = archives.iter().map(|archive| archive.name.as_str()).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("the storage lists the archive '{}' twice", twice[0]));
        }
        sort_by_guest(&mut archives);
        Ok(archives)
    }

    fn decide(&self, archives: Vec<Archive>) -> Vec<PruneEntry> {
        let marks = plan(&archives, &self.retention, &self.zone);
        let entries = archives.into_iter().zip(marks).map(|(archive, mark)| PruneEntry {
            archive: archive.name,
            subtype: archive.subtype,
            vmid: archive.guest_id,
            time_s: archive.time_s,
            fate: match mark {
                Mark::Keep(rule) => Fate::Keep { rule },
                Mark::Protected => Fate::Protected,
                Mark::Undated => Fate::Undated,
                Mark::Remove => Fate::Remove,
            },
        });
        entries.collect()
    }
}

/// Waits until this second is over, if it is still under way. The guest's next archive cannot get a name then that has
/// just become free, and among the names of one second would make it look older than it is.
async fn wait_until_after(second_s: i64) {
    let now = jiff::Timestamp::now();
    if now.as_second() == second_s {
        let left_ns = 1_000_000_000 - now.subsec_nanosecond().unsigned_abs();
        tokio::time::sleep(Duration::from_nanos(left_ns.into())).await;
    }
}

/// Puts archives in order: those of a guest together, the oldest first.
pub fn sort_by_guest(archives: &mut [Archive]) {
    archives.sort_by(|a, b| {
        let guests = (a.guest_id, a.subtype.to_string()).cmp(&(b.guest_id, b.subtype.to_string()));
        guests.then_with(|| by_age(a, b))
    });
}

/// Lists a provider's archives in bounded time.
pub(crate) async fn list(
    provider: &dyn Provider,
    limits: &Limits,
    cancel: &CancellationToken,
) -> Result<Vec<Archive>, String> {
    let call = call_within(cancel, limits.provider_call);
    match tokio::time::timeout(limits.provider_call, provider.list(&call)).await {
        Ok(list) => list.map_err(|error| chain(&error)),
        Err(_) => Err("the storage did not list its archives in time".to_owned()),
    }
}

/// Removes an archive in bounded time.
///
/// # Errors
/// Those of [`Provider::remove`]. After one of the kind [`Kind::Cancelled`] the archive may be gone.
pub async fn remove(
    provider: &dyn Provider,
    archive: &str,
    limit: Duration,
    cancel: &CancellationToken,
) -> provider_api::Result<()> {
    // It obeys its deadline; the second one is for a provider that does not.
    const GRACE: Duration = Duration::from_secs(120);
    let call = call_within(cancel, limit);
    let impatient = async {
        tokio::select! {
            () = cancel.cancelled() => {}
            () = tokio::time::sleep(limit) => {}
        }
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        biased;
        result = provider.remove(archive, &call) => result,
        () = impatient => Err(provider_api::Error::new(
            Kind::Cancelled,
            format!("The removal of {archive} does not end; whether it is gone is not known."),
        )),
    }
}
