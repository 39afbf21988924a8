// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a restore is going to do, checked before anything is made.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use provider_api::RestoreDevice;

use super::RestoreOptions;
use crate::config::guest::{VmConfig, is_disk_key};
use crate::storage::{DEFAULT_STORAGE, ImageFormat, Storage, StorageSet, VolumeId};
use crate::task_log::{clean, size};

/// The most disks a VM can have.
const DISKS_MAX: usize = 128;
/// Largest disk.
const SIZE_MAX_BYTES: u64 = 1 << 50;

/// One disk to be made.
#[derive(Debug, Clone)]
pub(super) struct PlannedDisk {
    /// Its key in the configuration and its name in the archive.
    pub(super) key: String,
    /// Its size.
    pub(super) size_bytes: u64,
    /// Where it goes.
    pub(super) storage: Arc<dyn Storage>,
    /// In which format.
    pub(super) format: ImageFormat,
}

/// Matches the archive's devices with its configuration.
pub(super) fn plan(
    config: &VmConfig,
    devices: &[RestoreDevice],
    storages: &StorageSet,
    options: &RestoreOptions,
) -> Result<(Vec<PlannedDisk>, Vec<String>), String> {
    let sizes = check_devices(devices)?;
    let mut planned = Vec::new();
    let mut warnings = Vec::new();
    for disk in config.disks().map_err(|error| crate::job::chain(&error))? {
        if disk.is_cdrom {
            continue;
        }
        let Some(&size_bytes) = sizes.get(disk.key.as_str()) else {
            let is_left_out =
                !disk.backup || disk.key.starts_with("efidisk") || disk.key.starts_with("tpmstate");
            if is_left_out {
                continue;
            }
            return Err(format!(
                "the archive does not contain data for the drive '{}' of its configuration",
                disk.key
            ));
        };
        let (storage, format) = place(&disk.volume, storages, options, &mut warnings)?;
        planned.push(PlannedDisk { key: disk.key, size_bytes, storage, format });
    }
    let known: HashSet<&str> = planned.iter().map(|disk| disk.key.as_str()).collect();
    for device in devices.iter().filter(|device| !known.contains(device.device.as_str())) {
        warnings.push(format!(
            "the data of '{}' is not restored: the configuration has no such disk",
            device.device
        ));
    }
    Ok((planned, warnings))
}

/// The provider's list is untrusted.
fn check_devices(devices: &[RestoreDevice]) -> Result<BTreeMap<&str, u64>, String> {
    if devices.len() > DISKS_MAX {
        return Err(format!("the archive claims to have {} disks", devices.len()));
    }
    let mut sizes = BTreeMap::new();
    for RestoreDevice { device, size_bytes } in devices {
        if !is_disk_key(device) {
            return Err(format!("the archive has a disk with the bad name '{}'", clean(device)));
        }
        if *size_bytes == 0 || *size_bytes > SIZE_MAX_BYTES || size_bytes % 512 != 0 {
            return Err(format!("the disk '{device}' has the bad size of {size_bytes} bytes"));
        }
        if sizes.insert(device.as_str(), *size_bytes).is_some() {
            return Err(format!("the archive has the disk '{device}' twice"));
        }
    }
    Ok(sizes)
}

/// Storage and format: as asked for, else as before, else the default.
fn place(
    volume: &str,
    storages: &StorageSet,
    options: &RestoreOptions,
    warnings: &mut Vec<String>,
) -> Result<(Arc<dyn Storage>, ImageFormat), String> {
    let old = volume.parse::<VolumeId>().ok();
    let format = options.format.or(old.as_ref().map(VolumeId::format)).unwrap_or(ImageFormat::Raw);
    let words = |error| crate::job::chain(&error);
    if let Some(id) = &options.storage {
        return Ok((storages.images(id).map_err(words)?, format));
    }
    if let Some(old) = &old {
        match storages.images(old.storage()) {
            Ok(storage) => return Ok((storage, format)),
            Err(error) => {
                let error = crate::job::chain(&error);
                warnings.push(format!("using the storage '{DEFAULT_STORAGE}': {error}"));
            }
        }
    }
    Ok((storages.images(DEFAULT_STORAGE).map_err(words)?, format))
}

/// Compares what the disks can take with what is free, per storage that has its own space.
pub(super) async fn check_space(
    planned: &[PlannedDisk],
    options: &RestoreOptions,
) -> Result<(), String> {
    let mut needed: BTreeMap<u64, (u64, u64, &str)> = BTreeMap::new();
    for disk in planned {
        // What does not tell its space may still have enough.
        let Ok(status) = disk.storage.status().await else { continue };
        let entry =
            needed.entry(status.pool_id).or_insert((0, status.available_bytes, disk.storage.id()));
        entry.0 = entry.0.saturating_add(disk.size_bytes);
    }
    for (needed_bytes, free_bytes, storage) in needed.into_values() {
        if needed_bytes > free_bytes && !options.overcommit {
            return Err(format!(
                "the disks need up to {}, but the storage '{storage}' has {} free; use \
                 --overcommit if they are mostly empty",
                size(needed_bytes),
                size(free_bytes)
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::storage::StorageConfig;
    use crate::layout::Layout;

    fn storages() -> (tempfile::TempDir, StorageSet) {
        let root = tempfile::tempdir().unwrap();
        let layout = Layout::new(Some(root.path().to_owned()));
        let config = StorageConfig::parse("dir: fast\n\tpath /nonexistent/fast\n").unwrap();
        (root, StorageSet::new(&config, &layout))
    }

    fn device(name: &str, size_bytes: u64) -> RestoreDevice {
        RestoreDevice { device: name.to_owned(), size_bytes }
    }

    #[test]
    fn disks_keep_their_format_and_find_a_storage() {
        let (_root, storages) = storages();
        let config = VmConfig::parse(
            "scsi0: fast:100/a.qcow2\nscsi1: gone:100/b.raw\nscsi2: /dev/sdx\n\
             scsi3: local:100/c.raw,backup=0\nide2: none,media=cdrom\n",
        );
        let devices = [device("scsi0", 512), device("scsi1", 1024), device("scsi2", 512)];
        let options = RestoreOptions { overcommit: true, ..RestoreOptions::default() };
        let (planned, warnings) = plan(&config, &devices, &storages, &options).unwrap();
        let found: Vec<_> = planned
            .iter()
            .map(|disk| (disk.key.as_str(), disk.storage.id(), disk.format))
            .collect();
        assert_eq!(
            found,
            [
                ("scsi0", "fast", ImageFormat::Qcow2),
                ("scsi1", "local", ImageFormat::Raw),
                ("scsi2", "local", ImageFormat::Raw),
            ]
        );
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        let options = RestoreOptions { storage: Some("none".into()), ..options };
        assert!(plan(&config, &devices, &storages, &options).is_err());
    }

    #[test]
    fn an_archive_that_makes_no_sense_is_refused() {
        let (_root, storages) = storages();
        let config = VmConfig::parse("scsi0: local:100/a.raw\n");
        let options = RestoreOptions::default();
        for bad in [
            vec![],
            vec![device("scsi0", 0)],
            vec![device("scsi0", 513)],
            vec![device("scsi0", u64::MAX - 511)],
            vec![device("../x", 512), device("scsi0", 512)],
            vec![device("scsi0", 512), device("scsi0", 512)],
        ] {
            assert!(plan(&config, &bad, &storages, &options).is_err(), "{bad:?}");
        }
        let (planned, warnings) =
            plan(&config, &[device("scsi0", 512), device("scsi9", 512)], &storages, &options)
                .unwrap();
        assert_eq!((planned.len(), warnings.len()), (1, 1));
    }

    #[tokio::test]
    async fn space_is_checked_beforehand() {
        let (_root, storages) = storages();
        let config = VmConfig::parse("scsi0: local:100/a.raw\n");
        let options = RestoreOptions::default();
        let (planned, _) = plan(&config, &[device("scsi0", 1 << 50)], &storages, &options).unwrap();
        let error = check_space(&planned, &options).await.unwrap_err();
        assert!(error.contains("--overcommit"), "{error}");
    }
}
