// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a restore is going to do, checked before anything is made.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use provider_api::RestoreDevice;

use super::old::{self, Fates};
use super::{DiskChoice, RestoreOptions};
use crate::config::guest::{DiskEntry, VmConfig, is_disk_key, split_numbered};
use crate::job::chain;
use crate::storage::{DEFAULT_STORAGE, ImageFormat, Storage, StorageSet, VolumeId};
use crate::task_log::clean;
use crate::vm::ovmf::EfiOptions;
use crate::vm::tpm;

/// The most disks a VM can have.
const DISKS_MAX: usize = 128;
/// Largest disk.
const SIZE_MAX_BYTES: u64 = 1 << 50;

/// One disk to be made.
#[derive(Debug, Clone)]
pub(super) struct PlannedDisk {
    /// Its name in the archive.
    pub(super) device: String,
    /// Its key in the new configuration.
    pub(super) key: String,
    /// Its size.
    pub(super) size_bytes: u64,
    /// Where it goes.
    pub(super) storage: Arc<dyn Storage>,
    /// In which format.
    pub(super) format: ImageFormat,
}

/// What is going to be done.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// The disks to be made.
    pub(super) disks: Vec<PlannedDisk>,
    /// What becomes of the volumes of a guest that is there already.
    pub(super) fates: Fates,
    /// What is odd.
    pub(super) warnings: Vec<String>,
}

/// Matches the archive's devices with its configuration, and with the guest that is there.
pub(super) fn plan(
    id: u32,
    archived: &VmConfig,
    old: Option<&VmConfig>,
    devices: &[RestoreDevice],
    storages: &StorageSet,
    options: &RestoreOptions,
) -> Result<Plan, String> {
    let sizes = check_devices(devices)?;
    match old {
        Some(old) if !options.disks.is_empty() => {
            plan_disks(id, archived, old, &sizes, storages, options)
        }
        _ => plan_guest(id, archived, old, &sizes, storages, options),
    }
}

fn plan_guest(
    id: u32,
    archived: &VmConfig,
    old: Option<&VmConfig>,
    sizes: &BTreeMap<&str, u64>,
    storages: &StorageSet,
    options: &RestoreOptions,
) -> Result<Plan, String> {
    let mut disks: Vec<PlannedDisk> = Vec::new();
    let mut warnings = Vec::new();
    for disk in archived.disks().map_err(|error| chain(&error))? {
        if disk.is_cdrom {
            continue;
        }
        let Some(&size_bytes) = sizes.get(disk.key.as_str()) else {
            let is_without_efi =
                disk.key.starts_with("efidisk") && archived.get("bios") != Some("ovmf");
            // Archives of before the TPM's state was backed up have none.
            let is_left_out = !disk.backup || is_without_efi || disk.key.starts_with("tpmstate");
            if is_left_out {
                continue;
            }
            return Err(format!(
                "the archive does not contain data for the drive '{}' of its configuration",
                disk.key
            ));
        };
        let (storage, format) =
            place(&disk.key, &[&disk.volume], storages, options, &mut warnings)?;
        let (device, key) = (disk.key.clone(), disk.key);
        let format = format_of(&key, format);
        disks.push(PlannedDisk { device, key, size_bytes, storage, format });
    }
    let known: HashSet<&str> = disks.iter().map(|disk| disk.device.as_str()).collect();
    for device in sizes.keys().filter(|device| !known.contains(*device)) {
        warnings.push(format!(
            "the data of '{device}' is not restored: the configuration has no such disk"
        ));
    }
    let fates = match old {
        Some(old) => old::fates_of_all(id, old, archived, &known)?,
        None => Fates::default(),
    };
    Ok(Plan { disks, fates, warnings })
}

fn plan_disks(
    id: u32,
    archived: &VmConfig,
    old: &VmConfig,
    sizes: &BTreeMap<&str, u64>,
    storages: &StorageSet,
    options: &RestoreOptions,
) -> Result<Plan, String> {
    let words = |error| chain(&error);
    let (archived, drives) = (archived.disks().map_err(words)?, old.disks().map_err(words)?);
    let mut disks: Vec<PlannedDisk> = Vec::new();
    let mut warnings = Vec::new();
    for DiskChoice { device, target } in &options.disks {
        let Some(&size_bytes) = sizes.get(device.as_str()) else {
            let has = sizes.keys().copied().collect::<Vec<_>>().join(", ");
            return Err(format!("the archive has no disk '{}'; it has {has}", clean(device)));
        };
        let key = target_key(id, target.as_ref().unwrap_or(device), &drives)?;
        if disks.iter().any(|disk| disk.key == key) {
            return Err(format!("two disks are to be restored to '{key}'"));
        }
        if disks.iter().any(|disk| disk.device == *device) {
            return Err(format!(
                "the disk '{device}' is to be restored twice, which takes two restores"
            ));
        }
        let now = drives.iter().find(|drive| drive.key == key);
        if now.is_some_and(|drive| drive.is_cdrom) {
            return Err(format!("'{key}' of VM {id} is a CD-ROM drive"));
        }
        let was = archived.iter().find(|drive| drive.key == *device);
        let volumes: Vec<&str> =
            [now, was].into_iter().flatten().map(|drive| drive.volume.as_str()).collect();
        let (storage, format) = place(&key, &volumes, storages, options, &mut warnings)?;
        let format = format_of(&key, format);
        check_special(device, &key, size_bytes, format, now.or(was))?;
        disks.push(PlannedDisk { device: device.clone(), key, size_bytes, storage, format });
    }
    let keys: HashSet<&str> = disks.iter().map(|disk| disk.key.as_str()).collect();
    let fates = old::fates_of_disks(id, old, &keys, options.force)?;
    Ok(Plan { disks, fates, warnings })
}

/// The drive that is meant: a key, or the volume that it has now.
fn target_key(id: u32, target: &str, drives: &[DiskEntry]) -> Result<String, String> {
    if is_disk_key(target) {
        return Ok(target.to_owned());
    }
    let drive = drives.iter().find(|drive| drive.volume == target);
    drive.map(|drive| drive.key.clone()).ok_or_else(|| {
        format!("'{}' is no drive of VM {id}: name one, or the volume it has", clean(target))
    })
}

/// The provider's list is untrusted.
fn check_devices(devices: &[RestoreDevice]) -> Result<BTreeMap<&str, u64>, String> {
    if devices.len() > DISKS_MAX {
        return Err(format!("the archive claims to have {} disks", devices.len()));
    }
    let mut sizes = BTreeMap::new();
    for entry in devices {
        check_device(entry)?;
        let RestoreDevice { device, size_bytes } = entry;
        if sizes.insert(device.as_str(), *size_bytes).is_some() {
            return Err(format!("the archive has the disk '{device}' twice"));
        }
    }
    Ok(sizes)
}

/// Refuses a name or a size that no disk has.
pub(super) fn check_device(entry: &RestoreDevice) -> Result<(), String> {
    let RestoreDevice { device, size_bytes } = entry;
    if !is_disk_key(device) {
        return Err(format!("the archive has a disk with the bad name '{}'", clean(device)));
    }
    if *size_bytes == 0 || *size_bytes > SIZE_MAX_BYTES || size_bytes % 512 != 0 {
        return Err(format!("the disk '{device}' has the bad size of {size_bytes} bytes"));
    }
    Ok(())
}

/// The state of a TPM is raw whatever is asked for: swtpm knows nothing else.
fn format_of(key: &str, wanted: ImageFormat) -> ImageFormat {
    if key == tpm::KEY { ImageFormat::Raw } else { wanted }
}

/// What the firmware and the TPM keep can be told from a disk's data, and has a size of its own: a VM could not be
/// started with anything else in its place.
fn check_special(
    device: &str,
    key: &str,
    size_bytes: u64,
    format: ImageFormat,
    model: Option<&DiskEntry>,
) -> Result<(), String> {
    let kind = |key| split_numbered(key).map_or("", |(kind, _)| kind);
    let wanted = kind(key);
    if ["efidisk", "tpmstate"].contains(&wanted) && wanted != kind(device) {
        return Err(format!("'{device}' cannot be restored to '{key}', which is no disk of data"));
    }
    let Some(model) = model.filter(|_| wanted == "efidisk") else { return Ok(()) };
    let vars_bytes = EfiOptions::parse(&model.options)?.kind.vars_bytes();
    // Of a raw volume QEMU may be shown the beginning only.
    if size_bytes == vars_bytes || (size_bytes > vars_bytes && format == ImageFormat::Raw) {
        return Ok(());
    }
    Err(format!(
        "'{device}' has {size_bytes} bytes, and the firmware of '{key}' needs {vars_bytes}: is it of another 'efitype'?"
    ))
}

/// Storage and format: as asked for, else as the first volume has them that is one, else the default.
fn place(
    key: &str,
    volumes: &[&str],
    storages: &StorageSet,
    options: &RestoreOptions,
    warnings: &mut Vec<String>,
) -> Result<(Arc<dyn Storage>, ImageFormat), String> {
    let old = volumes.iter().find_map(|volume| volume.parse::<VolumeId>().ok());
    let format = options.format.or(old.as_ref().map(VolumeId::format)).unwrap_or(ImageFormat::Raw);
    let words = |error| chain(&error);
    if let Some(id) = &options.storage {
        return Ok((storages.images(id).map_err(words)?, format));
    }
    if old.is_none() {
        let was = volumes.first().map_or("nothing is known of it".to_owned(), |volume| {
            format!("'{}' is no volume of a storage", clean(volume))
        });
        warnings.push(format!("using the storage '{DEFAULT_STORAGE}' for '{key}': {was}"));
    }
    if let Some(old) = &old {
        match storages.images(old.storage()) {
            Ok(storage) => return Ok((storage, format)),
            Err(error) => {
                let error = chain(&error);
                warnings
                    .push(format!("using the storage '{DEFAULT_STORAGE}' for '{key}': {error}"));
            }
        }
    }
    Ok((storages.images(DEFAULT_STORAGE).map_err(words)?, format))
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
        let Plan { disks: planned, warnings, .. } =
            plan(200, &config, None, &devices, &storages, &options).unwrap();
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
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(warnings[1].contains("for 'scsi2': '/dev/sdx' is no volume"), "{warnings:?}");
        let options = RestoreOptions { storage: Some("none".into()), ..options };
        assert!(plan(200, &config, None, &devices, &storages, &options).is_err());
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
            assert!(plan(200, &config, None, &bad, &storages, &options).is_err(), "{bad:?}");
        }
        let devices = [device("scsi0", 512), device("scsi9", 512)];
        let plan = plan(200, &config, None, &devices, &storages, &options).unwrap();
        assert_eq!((plan.disks.len(), plan.warnings.len()), (1, 1));
    }

    #[test]
    fn single_disks_find_the_drive_they_are_meant_for() {
        let (_root, storages) = storages();
        let archived = VmConfig::parse("scsi0: local:100/a.raw\nscsi1: fast:100/b.qcow2\n");
        let old = VmConfig::parse("scsi0: fast:200/x.qcow2\nide2: none,media=cdrom\n");
        let devices = [device("scsi0", 512), device("scsi1", 1024)];
        let plan = |choices: &[(&str, Option<&str>)]| {
            let disks = choices.iter().map(|(device, target)| DiskChoice {
                device: (*device).to_owned(),
                target: target.map(str::to_owned),
            });
            let options = RestoreOptions { disks: disks.collect(), ..RestoreOptions::default() };
            plan(200, &archived, Some(&old), &devices, &storages, &options)
        };
        let found = |choices: &[(&str, Option<&str>)]| {
            let disks = plan(choices).unwrap().disks;
            let disk = &disks[0];
            (disk.key.clone(), disk.storage.id().to_owned(), disk.format, disk.size_bytes)
        };
        let qcow2 = ImageFormat::Qcow2;
        assert_eq!(found(&[("scsi0", None)]), ("scsi0".into(), "fast".into(), qcow2, 512));
        let by_volume = [("scsi1", Some("fast:200/x.qcow2"))];
        assert_eq!(found(&by_volume), ("scsi0".into(), "fast".into(), qcow2, 1024));
        assert_eq!(found(&[("scsi1", Some("scsi7"))]).0, "scsi7");
        for (bad, words) in [
            (vec![("scsi5", None)], "no disk 'scsi5'; it has scsi0, scsi1"),
            (vec![("scsi0", Some("ide2"))], "CD-ROM"),
            (vec![("scsi0", Some("local:200/other.raw"))], "no drive of VM 200"),
            (vec![("scsi0", None), ("scsi1", Some("scsi0"))], "two disks"),
            (vec![("scsi0", None), ("scsi0", Some("scsi7"))], "'scsi0' is to be restored twice"),
        ] {
            let error = plan(&bad).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn what_the_firmware_and_the_tpm_keep_is_not_replaced_by_something_else() {
        let (_root, storages) = storages();
        let archived = VmConfig::parse(
            "virtio0: local:100/a.raw\nefidisk0: local:100/b.raw\ntpmstate0: local:100/c.raw\n",
        );
        let devices = [
            device("virtio0", 10 << 20),
            device("efidisk0", 128 << 10),
            device("tpmstate0", tpm::STATE_BYTES),
        ];
        let plan = |old: &str, disk: &str, target: &str| {
            let choice = DiskChoice { device: disk.to_owned(), target: Some(target.to_owned()) };
            let options = RestoreOptions { disks: vec![choice], ..RestoreOptions::default() };
            plan(200, &archived, Some(&VmConfig::parse(old)), &devices, &storages, &options)
        };
        let large = "efidisk0: local:200/a.raw,efitype=4m\n";
        for (old, disk, target) in [
            ("", "virtio0", "efidisk0"),
            ("", "virtio0", "tpmstate0"),
            (large, "tpmstate0", "efidisk0"),
            (large, "efidisk0", "efidisk0"),
        ] {
            plan(old, disk, target).unwrap_err();
        }
        for (disk, target) in
            [("efidisk0", "efidisk0"), ("tpmstate0", "tpmstate0"), ("efidisk0", "scsi1")]
        {
            plan("", disk, target).unwrap();
        }
    }
}
