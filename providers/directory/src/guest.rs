// SPDX-License-Identifier: MIT OR Apache-2.0
//! One job, and the backup of one guest within it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use futures_util::future::try_join_all;
use provider_api::{
    BitmapRequest, BoxFuture, Call, Committed, ContainerBackup, ContainerTransferred, GuestBackup,
    GuestInfo, GuestKind, Job, Progress, Readable, Result, Transferred, Uuid, VmBackup, Volume,
    VolumeInfo,
};
use tracing::{info, warn};

use crate::attributes;
use crate::call::{blocking, invalid, limited};
use crate::chain::Chain;
use crate::commit::{self, Gate};
use crate::container;
use crate::copy::{Budget, copy_disk};
use crate::files;
use crate::limits::{CHAIN_ARCHIVES_MAX, CONFIG_BYTES_MAX, DISK_BYTES_MAX, DISKS_MAX, LOCK_WAIT};
use crate::manifest::{
    ContainerFormat, Disk, Manifest, SmallFile, check_device, config_file, firewall_file,
};
use crate::storage::{RunDirectory, Storage, StorageLock};
use crate::usage::{Guest, GuestLock};

/// One job.
#[derive(Debug)]
pub(crate) struct DirectoryJob {
    pub(crate) storage: Storage,
    pub(crate) container_format: ContainerFormat,
}

impl Job for DirectoryJob {
    fn start_guest<'a>(
        &'a mut self,
        guest: GuestInfo,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<Box<dyn GuestBackup>>> {
        Box::pin(limited(
            call,
            "Starting a guest's backup",
            start_guest(&self.storage, self.container_format, guest, call),
        ))
    }

    fn finish<'a>(self: Box<Self>, _call: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a,
    {
        Box::pin(async { Ok(()) })
    }
}

async fn start_guest(
    storage: &Storage,
    container_format: ContainerFormat,
    guest: GuestInfo,
    call: &Call,
) -> Result<Box<dyn GuestBackup>> {
    let wanted = archive_name(&guest)?;
    let held = Guest::new(storage, guest.kind, guest.id).begin_use(call, LOCK_WAIT).await?;
    let lock = storage.must_lock(call, LOCK_WAIT).await?;
    let shared = storage.clone();
    let run = blocking(move || shared.begin(&wanted, &lock)).await?;
    let backup = DirectoryBackup {
        storage: storage.clone(),
        archive: run.archive().to_owned(),
        run: Arc::new(run),
        guest,
        container_format,
        plans: HashMap::new(),
        manifest: None,
        _use: held,
    };
    Ok(Box::new(backup))
}

fn archive_name(guest: &GuestInfo) -> Result<String> {
    let time = jiff::Timestamp::from_second(guest.start_time_s)
        .map_err(|e| invalid(format!("Start time {} cannot be used: {e}.", guest.start_time_s)))?;
    Ok(format!("vzdump-{}-{}-{}", guest.kind, guest.id, time.strftime("%Y_%m_%d-%H_%M_%S")))
}

/// Whose an archive is by its name, if that has the form above: for one that does not say it itself any more.
#[must_use]
pub fn guest_in_name(archive: &str) -> Option<(GuestKind, u32)> {
    let (kind, rest) = archive.strip_prefix("vzdump-")?.split_once('-')?;
    let kind = [GuestKind::Qemu, GuestKind::Lxc].into_iter().find(|k| k.to_string() == kind)?;
    let (id, time) = rest.split_once('-')?;
    let is_number = id.bytes().all(|byte| byte.is_ascii_digit()) && !id.starts_with('0');
    let is_time = time.starts_with(|first: char| first.is_ascii_digit());
    if is_number && is_time { Some((kind, id.parse().ok()?)) } else { None }
}

/// The backup of one guest.
#[derive(Debug)]
struct DirectoryBackup {
    storage: Storage,
    archive: String,
    run: Arc<RunDirectory>,
    guest: GuestInfo,
    container_format: ContainerFormat,
    /// For each disk that may become an increment, what it would build upon.
    plans: HashMap<String, Chain>,
    /// Set once all data is durable.
    manifest: Option<Manifest>,
    /// Keeps what increments build upon where it is, up to the commit.
    _use: GuestLock,
}

impl DirectoryBackup {
    async fn plan(&mut self, volumes: &[VolumeInfo]) -> Result<Vec<BitmapRequest>> {
        check_devices(volumes.iter().map(|v| (v.device.as_str(), v.size_bytes)))?;
        let storage = self.storage.clone();
        let (kind, id) = (self.guest.kind, self.guest.id);
        let wanted = volumes.to_vec();
        let found = blocking(move || {
            let mut archives = storage.manifests()?;
            archives.retain(|m| m.subtype == kind && m.guest_id == id);
            archives.sort_by_key(|m| std::cmp::Reverse(m.sequence));
            Ok(wanted.iter().map(|v| find_base(&storage, &archives, v)).collect::<Vec<_>>())
        })
        .await?;
        self.plans.clear();
        let mut requests = Vec::new();
        for (volume, base) in volumes.iter().zip(found) {
            requests.push(match base {
                Some((generation, chain)) => {
                    self.plans.insert(volume.device.clone(), chain);
                    BitmapRequest::Use { generation, readable: Readable::Dirty }
                }
                None => BitmapRequest::New,
            });
        }
        Ok(requests)
    }

    async fn backup(&mut self, backup: VmBackup, progress: &dyn Progress) -> Result<Transferred> {
        if self.manifest.is_some() {
            return Err(invalid(format!("Archive {} is complete already.", self.archive)));
        }
        self.check_kind(GuestKind::Qemu)?;
        let volumes = &backup.volumes;
        check_devices(volumes.iter().map(|v| (v.device.as_str(), v.size_bytes)))?;
        let mut manifest = Manifest::new(self.archive.clone(), &self.guest);
        (manifest.config, manifest.firewall) =
            self.store_config(backup.config, backup.firewall).await?;

        let budget = Budget::new();
        let copies = volumes.iter().map(|volume| self.copy(volume, budget.clone(), progress));
        manifest.disks = try_join_all(copies).await?;
        manifest.transferred = sum(&manifest.disks);
        let run = Arc::clone(&self.run);
        blocking(move || files::sync_directory(run.path())).await?;
        let transferred = manifest.transferred;
        self.manifest = Some(manifest);
        Ok(transferred)
    }

    async fn backup_tree(
        &mut self,
        backup: ContainerBackup,
        progress: &dyn Progress,
        call: &Call,
    ) -> Result<ContainerTransferred> {
        if self.manifest.is_some() {
            return Err(invalid(format!("Archive {} is complete already.", self.archive)));
        }
        self.check_kind(GuestKind::Lxc)?;
        let mut manifest = Manifest::new(self.archive.clone(), &self.guest);
        (manifest.config, manifest.firewall) =
            self.store_config(backup.config.clone(), backup.firewall.clone()).await?;
        let target = (self.run.path(), self.container_format);
        let (tree, moved) = container::store(&backup, target, progress, call).await?;
        manifest.set_tree(tree);
        manifest.transferred = Transferred {
            total_bytes: moved.read_bytes,
            read_bytes: moved.read_bytes,
            zero_bytes: 0,
            written_bytes: moved.written_bytes,
        };
        let run = Arc::clone(&self.run);
        blocking(move || files::sync_directory(run.path())).await?;
        self.manifest = Some(manifest);
        Ok(moved)
    }

    fn check_kind(&self, kind: GuestKind) -> Result<()> {
        if self.guest.kind == kind {
            return Ok(());
        }
        Err(invalid(format!(
            "The backup of guest {} began as one of kind {}, not {kind}.",
            self.guest.id, self.guest.kind
        )))
    }

    async fn store_config(
        &self,
        config: Vec<u8>,
        firewall: Option<Vec<u8>>,
    ) -> Result<(SmallFile, Option<SmallFile>)> {
        let size_bytes = config.len().max(firewall.as_ref().map_or(0, Vec::len)) as u64;
        if size_bytes > CONFIG_BYTES_MAX {
            return Err(invalid(format!(
                "A configuration of {size_bytes} bytes is larger than {CONFIG_BYTES_MAX}."
            )));
        }
        let run = Arc::clone(&self.run);
        let kind = self.guest.kind;
        blocking(move || {
            files::write_new(&run.path().join(config_file(kind)), &config)?;
            if let Some(firewall) = &firewall {
                files::write_new(&run.path().join(firewall_file(kind)), firewall)?;
            }
            Ok((SmallFile::of(&config), firewall.as_deref().map(SmallFile::of)))
        })
        .await
    }

    async fn copy(&self, volume: &Volume, budget: Budget, progress: &dyn Progress) -> Result<Disk> {
        let base = self.plans.get(&volume.device);
        let base = base.filter(|chain| chain.size_bytes() == volume.size_bytes).cloned();
        // Boxed: a disk's future is large, and a guest may have many.
        Box::pin(copy_disk(volume, self.run.path(), base, budget, progress)).await
    }
}

fn check_devices<'a>(devices: impl Iterator<Item = (&'a str, u64)>) -> Result<()> {
    let mut seen = HashSet::new();
    for (device, size_bytes) in devices {
        check_device(device).map_err(invalid)?;
        if size_bytes > DISK_BYTES_MAX {
            return Err(invalid(format!("Disk {device} has {size_bytes} bytes.")));
        }
        if !seen.insert(device) {
            return Err(invalid(format!("Disk {device} is listed twice.")));
        }
        if seen.len() > DISKS_MAX {
            return Err(invalid(format!("More than {DISKS_MAX} disks are not supported.")));
        }
    }
    Ok(())
}

/// The newest archive that this disk can build upon; `archives` begin with the newest.
fn find_base(
    storage: &Storage,
    archives: &[Manifest],
    volume: &VolumeInfo,
) -> Option<(String, Chain)> {
    for manifest in archives {
        let Some(disk) = manifest.disk(&volume.device) else { continue };
        let Some(generation) = &disk.generation else { continue };
        if disk.size_bytes != volume.size_bytes {
            continue;
        }
        match Chain::load(storage, manifest, &volume.device) {
            Ok(chain) if chain.links().len() < CHAIN_ARCHIVES_MAX => {
                let damaged = chain.links().iter().find(|link| is_damaged(storage, &link.archive));
                let Some(link) = damaged else { return Some((generation.clone(), chain)) };
                warn!(
                    "Archive {} is not built upon: a verification found damage in {}.",
                    manifest.archive, link.archive
                );
            }
            Ok(_) => {
                info!("Disk {} has a chain of {CHAIN_ARCHIVES_MAX} archives.", volume.device);
                return None;
            }
            Err(error) => warn!("Archive {} is not built upon: {error}", manifest.archive),
        }
    }
    None
}

/// Whether the last verification says so.
fn is_damaged(storage: &Storage, archive: &str) -> bool {
    attributes::verified(storage, archive).is_some_and(|verified| verified.damage_count > 0)
}

fn sum(disks: &[Disk]) -> Transferred {
    disks.iter().fold(Transferred::default(), |all, disk| Transferred {
        total_bytes: all.total_bytes + disk.transferred.total_bytes,
        read_bytes: all.read_bytes + disk.transferred.read_bytes,
        zero_bytes: all.zero_bytes + disk.transferred.zero_bytes,
        written_bytes: all.written_bytes + disk.transferred.written_bytes,
    })
}

/// Shuts the gate when the caller stops waiting.
struct ShutOnDrop(Arc<Gate>);

impl Drop for ShutOnDrop {
    fn drop(&mut self) {
        self.0.shut();
    }
}

impl GuestBackup for DirectoryBackup {
    fn archive_name(&self) -> &str {
        &self.archive
    }

    fn plan_volumes<'a>(
        &'a mut self,
        volumes: &'a [VolumeInfo],
        call: &'a Call,
    ) -> BoxFuture<'a, Result<Vec<BitmapRequest>>> {
        Box::pin(limited(call, "Planning a backup", self.plan(volumes)))
    }

    fn backup_vm<'a>(
        &'a mut self,
        backup: VmBackup,
        progress: &'a dyn Progress,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<Transferred>> {
        Box::pin(limited(call, "The backup", self.backup(backup, progress)))
    }

    fn backup_container<'a>(
        &'a mut self,
        backup: ContainerBackup,
        progress: &'a dyn Progress,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<ContainerTransferred>> {
        Box::pin(limited(call, "The backup", self.backup_tree(backup, progress, call)))
    }

    fn commit<'a>(self: Box<Self>, id: Uuid, call: &'a Call) -> BoxFuture<'a, Result<Committed>>
    where
        Self: 'a,
    {
        Box::pin(async move {
            let gate = Arc::new(Gate::default());
            // Also when this future is dropped.
            let _shut = ShutOnDrop(Arc::clone(&gate));
            let run = Arc::clone(&self.run);
            let work = commit_run(*self, id, call, Arc::clone(&gate));
            let result = limited(call, "The commit", work).await;
            if result.is_err() && gate.shut() {
                let removed = blocking(move || run.remove()).await;
                if let Err(error) = removed {
                    warn!("What a failed commit left could not be removed: {error}");
                }
            }
            result
        })
    }

    fn abort<'a>(self: Box<Self>, why: &'a str, _call: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a,
    {
        // Giving up must also work when the reason is a cancelled call.
        Box::pin(async move {
            info!("Archive {} is given up: {why}", self.archive);
            let run = Arc::clone(&self.run);
            blocking(move || run.remove()).await
        })
    }
}

async fn commit_run(
    backup: DirectoryBackup,
    id: Uuid,
    call: &Call,
    gate: Arc<Gate>,
) -> Result<Committed> {
    let DirectoryBackup { storage, run, manifest, archive, .. } = backup;
    let manifest = manifest.ok_or_else(|| {
        invalid(format!("Archive {archive} cannot be committed: its backup is not complete."))
    })?;
    let noted = Arc::clone(&run);
    blocking(move || noted.note_commit(id)).await?;
    let lock: StorageLock = storage.must_lock(call, LOCK_WAIT).await?;
    blocking(move || commit::commit(&storage, &run, manifest, id, &gate, &lock)).await
}

#[cfg(test)]
mod tests {
    use provider_api::{GuestInfo, GuestKind};

    #[test]
    fn archives_are_named_in_utc() {
        let guest =
            GuestInfo { kind: GuestKind::Qemu, id: 100, name: None, start_time_s: 1_767_322_984 };
        assert_eq!(super::archive_name(&guest).unwrap(), "vzdump-qemu-100-2026_01_02-03_03_04");
        assert!(super::archive_name(&GuestInfo { start_time_s: i64::MAX, ..guest }).is_err());
        let found = |name| super::guest_in_name(name);
        assert_eq!(found("vzdump-qemu-100-2026_01_02-03_03_04"), Some((GuestKind::Qemu, 100)));
        assert_eq!(found("vzdump-lxc-7-2026_01_02-03_03_04-2"), Some((GuestKind::Lxc, 7)));
        for other in
            ["vzdump-qemu-100", "vzdump-qemu-x-2026", "vzdump-vm-100-2026", "qemu-100-2026"]
        {
            assert_eq!(found(other), None, "{other}");
        }
    }
}
