// SPDX-License-Identifier: MIT OR Apache-2.0
//! From what a backup is asked to do, through `jobs.cfg` and `vzdump.conf`, to what is done.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use provider_api::GuestKind;
use vzdump_core::bandwidth::{Budget, MIN_BYTES_PER_S};
use vzdump_core::config::backup::{BackupSettings, Selection};
use vzdump_core::config::jobs::{read_job, read_pool};
use vzdump_core::host_budget::{HostRam, HostRate};
use vzdump_core::job::{BackupOptions, STOP_WAIT, chain};
use vzdump_core::task_log::size_config;
use vzdump_core::vm::backup::FleecingOptions;
use vzdump_core::vm::create::parse_size;
use vzdump_core::vm::runner;

use crate::{Host, HostError};

/// How long a busy guest is waited for, as with vzdump.
const LOCKWAIT_MINUTES: u32 = 180;
/// The lowest priority that is not idle, as with vzdump.
const IONICE: u8 = 7;
/// Keys of `vzdump.conf` alone: what all tasks of the host may read, in KiB/s, ...
const HOST_BWLIMIT_KEY: &str = "host-bwlimit";
/// ... and what they may have of RAM for old data.
const HOST_BUFFER_KEY: &str = "host-buffer-total";

// QEMU's ranges, as in `qemu-ext/src/access/limits.rs`. It is asked late: when a guest has been shut down for the
// mode stop already.
const GRANULARITY_BYTES: RangeInclusive<u64> = 4096..=4 << 20;
const BUFFER_BYTES: RangeInclusive<u64> = 0..=64 << 30;
const BUFFER_TOTAL_BYTES: RangeInclusive<u64> = 0..=1 << 40;

/// What to back up, and how, as far as the caller says it.
#[derive(Debug, Clone)]
pub struct BackupRequest {
    /// Options that go before those of the job and of `vzdump.conf`.
    pub settings: BackupSettings,
    /// A job of `jobs.cfg`.
    pub job: Option<String>,
    /// Whether the guest agent freezes the file systems.
    pub freeze: bool,
    /// RAM for old data per disk in bytes; by default QEMU's.
    pub buffer_size_bytes: Option<u64>,
    /// Granularity of new bitmaps in bytes; by default QEMU's.
    pub granularity_bytes: Option<u64>,
    /// RAM for old data of all guests together in bytes; by default only that of a disk is bounded.
    pub buffer_total_bytes: Option<u64>,
}

/// A backup job that is ready to be run.
#[derive(Debug, Clone)]
pub struct BackupPlan {
    /// The guests.
    pub ids: Vec<u32>,
    /// Options without effect, to be told.
    pub notices: Vec<String>,
    /// Whether only warnings and errors are to be shown.
    pub quiet: bool,
    pub(crate) options: BackupOptions,
    pub(crate) ionice: u8,
}

impl Host {
    /// Finds out what a backup is to do. Changes nothing.
    ///
    /// # Errors
    /// An option, a job or a configuration file makes no sense, or there is nowhere to store
    /// anything.
    pub fn plan_backup(&self, request: BackupRequest) -> Result<BackupPlan, HostError> {
        check_numbers(&request)?;
        let (settings, mut notices) = self.settings(request.settings, request.job.as_deref())?;
        check_node(settings.node.as_deref())?;
        let ids = self.select(settings.selection.as_ref(), &mut notices)?;
        let exclude = provider_api::Excludes::parse(&settings.excludes())
            .map_err(|error| HostError::Settings(error.message))?;
        let fleecing = settings.fleecing.unwrap_or_default();
        self.check_fleecing_storages(&fleecing, &ids)?;
        let storage = match settings.storage {
            Some(storage) => storage,
            None => self.default_backup_storage()?,
        };
        // More than there are guests would only make each one's part of the RAM smaller.
        let jobs = usize::from(settings.jobs.unwrap_or(1)).min(ids.len()).max(1);
        let limits = self.host_limits()?;
        let bandwidth =
            self.bandwidth(settings.bwlimit_kib_per_s, limits.bwlimit_kib_per_s, jobs)?;
        let prune = match settings.remove {
            Some(false) => None,
            _ => self.retention(&storage, settings.prune_backups)?,
        };
        let options = BackupOptions {
            fleecing,
            freeze: request.freeze,
            buffer_size_bytes: request.buffer_size_bytes,
            granularity_bytes: request.granularity_bytes,
            buffer_total_bytes: request.buffer_total_bytes,
            lock_wait: minutes(settings.lockwait_minutes.unwrap_or(LOCKWAIT_MINUTES)),
            jobs,
            bandwidth,
            host_ram: limits.buffer_total_bytes.map(|total| HostRam::new(&self.layout, total)),
            exclude,
            skip_unreadable: settings.skip_unreadable.unwrap_or(false),
            temp_dir: settings.tmpdir.map(absolute),
            script: settings.script.map(absolute),
            notes: settings.notes_template,
            protected: settings.protected.unwrap_or(false),
            max_protected: self.max_protected(&storage)?,
            prune,
            mode: settings.mode.unwrap_or_default(),
            stop_wait: settings.stopwait_minutes.map_or(STOP_WAIT, minutes),
            ..BackupOptions::new(storage)
        };
        let quiet = settings.quiet.unwrap_or(false);
        let ionice = settings.ionice.unwrap_or(IONICE);
        Ok(BackupPlan { ids, notices, quiet, options, ionice })
    }

    /// The options of all layers, and what has no effect.
    pub(crate) fn settings(
        &self,
        upper: BackupSettings,
        job: Option<&str>,
    ) -> Result<(BackupSettings, Vec<String>), HostError> {
        let mut notices = Vec::new();
        let mut all = upper;
        if let Some(id) = job {
            let job = read_job(&self.layout.jobs_config_path(), id)?;
            let pairs = job.pairs.iter().map(|(key, value)| (key.as_str(), value.as_str()));
            let (settings, more) = BackupSettings::parse(pairs, &format!("job '{id}'"))?;
            notices.extend(more);
            let chooses = settings.selection.is_some();
            all = all.or(settings);
            if chooses && all.selection.is_none() {
                return Err(HostError::Settings(format!(
                    "All guests that the job '{id}' names are excluded: exclude fewer, or do not run it."
                )));
            }
        }
        let config = self.read_settings()?;
        let of_host =
            [crate::QEMU_BIN_KEY, crate::PROVIDER_DIR_KEY, HOST_BWLIMIT_KEY, HOST_BUFFER_KEY];
        let ours = config.pairs().filter(|(key, _)| !of_host.contains(key));
        let (mut defaults, more) = BackupSettings::parse(ours, "vzdump.conf")?;
        notices.extend(more);
        if defaults.selection.take().is_some() {
            notices.push("vzdump.conf: which guests are backed up is not chosen there".to_owned());
        }
        // Asked for again by `Host::retention`: what storage.cfg says of the storage goes before it.
        defaults.prune_backups = None;
        Ok((all.or(defaults), notices))
    }

    /// What `vzdump.conf` says of the host. 0 is no limit.
    fn host_limits(&self) -> Result<HostLimits, HostError> {
        let config = self.read_settings()?;
        let invalid =
            |key, why: String| HostError::Settings(format!("vzdump.conf: '{key}': {why}"));
        let bwlimit = config.get(HOST_BWLIMIT_KEY).map(|text| {
            text.parse().map_err(|_| invalid(HOST_BWLIMIT_KEY, format!("'{text}' is no number.")))
        });
        let buffer = config.get(HOST_BUFFER_KEY);
        let buffer =
            buffer.map(|text| parse_size(text).map_err(|why| invalid(HOST_BUFFER_KEY, why)));
        Ok(HostLimits {
            bwlimit_kib_per_s: bwlimit.transpose()?.filter(|&limit| limit > 0),
            buffer_total_bytes: buffer.transpose()?.filter(|&total| total > 0),
        })
    }

    /// The budget of a job for its own limit and the host's, both in KiB/s.
    fn bandwidth(
        &self,
        own: Option<u64>,
        host: Option<u64>,
        guests: usize,
    ) -> Result<Option<Budget>, HostError> {
        let own = own.filter(|&limit| limit > 0).map(|limit| rate("bwlimit", limit, guests));
        let host = host.map(|limit| rate(HOST_BWLIMIT_KEY, limit, guests)).transpose()?;
        let own = own.transpose()?;
        let Some(host) = host else { return Ok(own.map(Budget::new)) };
        let shared = HostRate::open(&self.layout, host).map_err(HostError::Settings)?;
        Ok(Some(Budget::new(own.map_or(host, |own| own.min(host))).within(shared)))
    }

    /// Checks that the storages that are to hold old data can, those for disks that no guest has included:
    /// which disks there are is not looked up here.
    fn check_fleecing_storages(
        &self,
        fleecing: &FleecingOptions,
        ids: &[u32],
    ) -> Result<(), HostError> {
        // Containers have no old data, and what is refused chooses no storage.
        let has_vms = ids.iter().any(|id| self.layout.guest_kind(*id) == GuestKind::Qemu);
        if fleecing.is_refused || !has_vms {
            return Ok(());
        }
        let of_all = fleecing.storage.iter().map(|storage| ("storage", storage));
        let of_disks = fleecing.disks.iter().map(|(disk, storage)| (disk.as_str(), storage));
        for (key, storage) in of_all.chain(of_disks) {
            self.storages.images(storage).map_err(|error| {
                HostError::Settings(format!(
                    "'fleecing': '{key}={storage}' is no place for old data: {} Storages for images: \
                     {}.",
                    chain(&error),
                    self.storages.image_ids().join(", ")
                ))
            })?;
        }
        Ok(())
    }

    /// The numbers of all VMs and containers, in order.
    fn guest_ids(&self) -> Result<Vec<u32>, HostError> {
        let mut ids = runner::list_ids(&self.layout)?;
        ids.extend(lxc_backend::runtime::list_ids(&self.layout)?);
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    /// The numbers of the chosen guests, each once.
    fn select(
        &self,
        selection: Option<&Selection>,
        notices: &mut Vec<String>,
    ) -> Result<Vec<u32>, HostError> {
        let (mut ids, excluded) = match selection {
            None => {
                return Err(HostError::Settings(
                    "No guest is chosen: give numbers, --all, --exclude, --pool, or a job that \
                     says so."
                        .to_owned(),
                ));
            }
            Some(Selection::Guests(ids)) => (ids.clone(), [].as_slice()),
            Some(Selection::All { exclude }) => (self.guest_ids()?, exclude.as_slice()),
            Some(Selection::Pool { pool, exclude }) => {
                let members = read_pool(&self.layout.user_config_path(), pool)?;
                // Pools may span hosts.
                let here = self.guest_ids()?;
                let ids = members.into_iter().filter(|id| here.contains(id)).collect();
                (ids, exclude.as_slice())
            }
        };
        ids.retain(|id| !excluded.contains(id));
        let mut seen = std::collections::HashSet::new();
        ids.retain(|id| seen.insert(*id));
        if ids.is_empty() {
            notices.push("there is no guest to back up".to_owned());
        }
        Ok(ids)
    }
}

fn check_node(node: Option<&str>) -> Result<(), HostError> {
    let Some(node) = node else {
        return Ok(());
    };
    let own = crate::own_name();
    if node == own {
        return Ok(());
    }
    Err(HostError::Settings(format!("The job is for the host '{node}', but this is '{own}'.")))
}

fn check_numbers(request: &BackupRequest) -> Result<(), HostError> {
    let is_power = request.granularity_bytes.is_none_or(u64::is_power_of_two);
    for (option, bytes, range, is_form, form) in [
        ("granularity", request.granularity_bytes, GRANULARITY_BYTES, is_power, "a power of two "),
        ("buffer-size", request.buffer_size_bytes, BUFFER_BYTES, true, ""),
        ("buffer-total", request.buffer_total_bytes, BUFFER_TOTAL_BYTES, true, ""),
    ] {
        if let Some(bytes) = bytes.filter(|bytes| !is_form || !range.contains(bytes)) {
            let [bytes, min, max] = [bytes, *range.start(), *range.end()].map(size_config);
            return Err(HostError::Settings(format!(
                "'{option}': {bytes} is not {form}from {min} to {max}."
            )));
        }
    }
    Ok(())
}

/// What all tasks of a host may use together.
struct HostLimits {
    bwlimit_kib_per_s: Option<u64>,
    buffer_total_bytes: Option<u64>,
}

/// A limit in KiB/s as bytes per second, if it is enough for so many guests.
fn rate(key: &str, kib_per_s: u64, guests: usize) -> Result<u64, HostError> {
    let too_much = || HostError::Settings(format!("'{key}': {kib_per_s} KiB/s is too much."));
    let rate = kib_per_s.checked_mul(1024).ok_or_else(too_much)?;
    let least = MIN_BYTES_PER_S.saturating_mul(guests as u64);
    if rate < least {
        return Err(HostError::Settings(format!(
            "'{key}': {kib_per_s} KiB/s is too little for {guests} guests at the same time; at least \
             {} KiB/s are needed, or 0 for no limit.",
            least >> 10
        )));
    }
    Ok(rate)
}

fn minutes(count: u32) -> Duration {
    Duration::from_secs(u64::from(count) * 60)
}

/// A relative path is meant from where the program was started.
fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}
