// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest that a restore replaces, or whose disks it replaces: whether that may be, and what
//! becomes of its volumes.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::RestoreOptions;
use crate::config::guest::{VmConfig, split_numbered};
use crate::config::parse_bool;
use crate::job::{JobContext, chain};
use crate::storage::VolumeId;
use crate::vm::runner::{self, LIVE_LOCK, live_advice};

/// What a guest is locked with whose disks a restore has removed.
pub(super) const LOCK: &str = runner::RESTORE_LOCK;
/// Unused disks a configuration can name.
const UNUSED_MAX: u32 = 256;

/// What becomes of the volumes of a guest that is replaced.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Fates {
    /// Removed, once nothing names them any more.
    pub(super) frees: BTreeSet<VolumeId>,
    /// Values of drives that stay as they are: the archive has the same ones, and no data of them.
    pub(super) stays: BTreeMap<String, String>,
    /// Kept as unused disks.
    pub(super) unused: BTreeSet<String>,
}

/// The configuration of the guest that is there already, if it may be replaced or changed and does not run.
pub(super) fn find(
    ctx: &JobContext,
    id: u32,
    options: &RestoreOptions,
) -> Result<Option<VmConfig>, String> {
    let Some(config) = read(ctx, id, options)? else { return Ok(None) };
    if let Some(process) = runner::find_process(&ctx.layout, id).map_err(|error| chain(&error))? {
        // Stopped, it would still not be complete.
        return Err(match config.get("lock") {
            Some(LIVE_LOCK) => live_advice(id),
            _ => format!("VM {id} is running (process {}); stop it first", process.pid),
        });
    }
    check_keys(id, &config, options)?;
    Ok(Some(config))
}

/// The same before the recovery of earlier tasks, which may end what runs, and may remove the guest of a live restore:
/// of that one nothing is said.
pub(super) fn check(
    ctx: &JobContext,
    id: u32,
    options: &RestoreOptions,
) -> Result<Option<VmConfig>, String> {
    let config = VmConfig::read(&ctx.layout.vm_config_path(id)).map_err(|error| chain(&error))?;
    if config.is_some_and(|config| config.get("lock") == Some(LIVE_LOCK)) {
        return Ok(None);
    }
    let Some(config) = read(ctx, id, options)? else { return Ok(None) };
    check_keys(id, &config, options)?;
    Ok(Some(config))
}

fn read(ctx: &JobContext, id: u32, options: &RestoreOptions) -> Result<Option<VmConfig>, String> {
    let layout = &ctx.layout;
    if layout.etc().join("lxc").join(format!("{id}.conf")).exists() {
        return Err(format!("there is a container {id} already; choose another number"));
    }
    let path = layout.vm_config_path(id);
    let Some(config) = VmConfig::read(&path).map_err(|error| chain(&error))? else {
        return match options.disks.is_empty() {
            true => Ok(None),
            false => Err(format!("VM {id}, whose disks are to be restored, does not exist")),
        };
    };
    if options.disks.is_empty() && !options.force {
        return Err(format!(
            "VM {id} exists already; choose another number, or replace it with --force"
        ));
    }
    Ok(Some(config))
}

fn check_keys(id: u32, config: &VmConfig, options: &RestoreOptions) -> Result<(), String> {
    match config.get("lock") {
        None => {}
        // Only a restore can bring back what a restore has removed.
        Some(LOCK) if options.disks.is_empty() => {}
        Some(lock) => {
            return Err(format!(
                "VM {id} is locked ({lock}); remove the key 'lock' if that is left over"
            ));
        }
    }
    if options.force && config.get("protection").and_then(parse_bool) == Some(true) {
        return Err(format!(
            "VM {id} is protected; remove the key 'protection' from its configuration first"
        ));
    }
    Ok(())
}

/// What becomes of the volumes of `old` when it is replaced by what an archive has.
pub(super) fn fates_of_all(
    id: u32,
    old: &VmConfig,
    archived: &VmConfig,
    restored: &HashSet<&str>,
) -> Result<Fates, String> {
    let words = |error| chain(&error);
    let mut fates = Fates::default();
    let archived = archived.disks().map_err(words)?;
    for disk in old.disks().map_err(words)? {
        let own = own_volume(id, &disk.volume);
        let is_the_same =
            archived.iter().any(|other| other.key == disk.key && other.volume == disk.volume);
        if restored.contains(disk.key.as_str()) && !disk.is_cdrom {
            fates.frees.extend(own);
        } else if is_the_same {
            fates.stays.insert(disk.key.clone(), disk.to_value());
        } else {
            fates.unused.extend(own.map(|volume| volume.to_string()));
        }
    }
    // Those of snapshots, and unused ones: nobody has said that they may go.
    let others = old.volumes().filter_map(|text| own_volume(id, &text));
    let others = others.filter(|volume| !fates.frees.contains(volume));
    fates.unused.extend(others.map(|volume| volume.to_string()));
    // What stays attached is neither removed nor unused.
    let attached: HashSet<String> = fates.stays.values().filter_map(|v| volume_of(v)).collect();
    fates.frees.retain(|volume| !attached.contains(&volume.to_string()));
    fates.unused.retain(|volume| !attached.contains(volume));
    Ok(fates)
}

/// What becomes of the volumes of drives that get restored ones: kept as unused disks, or removed
/// when that is asked for. What a snapshot names stays as it is.
pub(super) fn fates_of_disks(
    id: u32,
    old: &VmConfig,
    keys: &HashSet<&str>,
    removes: bool,
) -> Result<Fates, String> {
    let mut fates = Fates::default();
    for disk in old.disks().map_err(|error| chain(&error))? {
        if !keys.contains(disk.key.as_str()) || disk.is_cdrom {
            continue;
        }
        let Some(volume) = own_volume(id, &disk.volume) else { continue };
        let text = volume.to_string();
        let named = old.words().filter(|word| *word == text).count();
        match (removes, named) {
            (_, 2..) => {}
            (true, _) => drop(fates.frees.insert(volume)),
            (false, _) => drop(fates.unused.insert(text)),
        }
    }
    Ok(fates)
}

/// A volume of this guest; others are not ours to remove.
fn own_volume(id: u32, text: &str) -> Option<VolumeId> {
    text.parse::<VolumeId>().ok().filter(|volume| volume.guest_id() == id)
}

fn volume_of(value: &str) -> Option<String> {
    let list = crate::config::OptionList::parse(value).ok()?;
    list.first.clone().or_else(|| list.get("file").map(str::to_owned))
}

/// Names volumes as unused disks, unless something names them already.
///
/// # Errors
/// In words.
pub fn add_unused(config: &mut VmConfig, volumes: &BTreeSet<String>) -> Result<(), String> {
    for volume in volumes {
        if config.names_volume(volume) {
            continue;
        }
        let is_free = |n: &u32| config.get(&format!("unused{n}")).is_none();
        let Some(n) = (0..UNUSED_MAX).find(is_free) else {
            return Err(format!("there are more than {UNUSED_MAX} unused disks"));
        };
        config.set(&format!("unused{n}"), volume).map_err(|error| chain(&error))?;
    }
    Ok(())
}

/// What is left of a guest whose disks are removed before the new ones are there: it cannot be
/// started, and another restore may replace it.
pub(super) fn stub(old: &VmConfig, fates: &Fates) -> Result<VmConfig, String> {
    let words = |error| chain(&error);
    let mut config = old.for_backup();
    for disk in old.disks().map_err(words)? {
        if own_volume_is(&fates.frees, &disk.volume) {
            config.remove(&disk.key);
        }
    }
    let keys: Vec<String> = config.pairs().map(|(key, _)| key.to_owned()).collect();
    for key in keys.iter().filter(|key| matches!(split_numbered(key), Some(("unused", _)))) {
        config.remove(key);
    }
    add_unused(&mut config, &fates.unused)?;
    config.set("lock", LOCK).map_err(words)?;
    Ok(config)
}

fn own_volume_is(frees: &BTreeSet<VolumeId>, text: &str) -> bool {
    text.parse::<VolumeId>().is_ok_and(|volume| frees.contains(&volume))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "args: -x\n\
        efidisk0: local:100/vm-100-disk-9.raw\n\
        ide2: local:100/vm-100-cloudinit.raw,media=cdrom\n\
        scsi0: local:100/vm-100-disk-0.raw\n\
        scsi1: local:100/vm-100-disk-1.raw,backup=0\n\
        scsi2: local:100/vm-100-disk-2.raw\n\
        scsi3: local:101/vm-101-disk-0.raw\n\
        scsi4: /dev/sdx\n\
        unused0: local:100/vm-100-disk-5.raw\n\
        \n[snap]\n\
        scsi0: local:100/vm-100-disk-0.raw\n\
        scsi9: local:100/vm-100-disk-6.raw\n\
        vmstate: local:100/vm-100-state.raw\n";

    fn texts(volumes: &BTreeSet<VolumeId>) -> Vec<String> {
        volumes.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn only_disks_whose_data_comes_back_are_removed() {
        let old = VmConfig::parse(OLD);
        let archived = VmConfig::parse(
            "efidisk0: local:100/vm-100-disk-9.raw\nscsi0: local:100/old.raw\n\
             scsi1: local:100/vm-100-disk-1.raw,backup=0\nscsi2: local:100/other.raw\n\
             ide2: local:100/vm-100-cloudinit.raw,media=cdrom\n",
        );
        let restored = HashSet::from(["scsi0", "scsi3"]);
        let fates = fates_of_all(100, &old, &archived, &restored).unwrap();
        assert_eq!(texts(&fates.frees), ["local:100/vm-100-disk-0.raw"]);
        let stays: Vec<_> = fates.stays.keys().map(String::as_str).collect();
        assert_eq!(stays, ["efidisk0", "ide2", "scsi1"]);
        let unused = ["disk-2.raw", "disk-5.raw", "disk-6.raw", "state.raw"];
        let unused = unused.map(|name| format!("local:100/vm-100-{name}"));
        assert_eq!(fates.unused.iter().cloned().collect::<Vec<_>>(), unused);

        let stub = stub(&old, &fates).unwrap();
        assert_eq!(stub.get("lock"), Some(LOCK));
        assert!(!stub.names_volume("local:100/vm-100-disk-0.raw"), "{stub}");
        assert!(fates.unused.iter().all(|volume| stub.names_volume(volume)), "{stub}");
    }

    #[test]
    fn a_disk_that_gets_another_volume_keeps_its_old_one_unless_told_otherwise() {
        let old = VmConfig::parse(OLD);
        let keys = HashSet::from(["scsi0", "scsi2", "scsi3", "scsi8"]);
        let fates = fates_of_disks(100, &old, &keys, false).unwrap();
        assert!(fates.frees.is_empty());
        // Of scsi0 a snapshot needs the volume, of scsi3 another guest owns it.
        assert_eq!(fates.unused, BTreeSet::from(["local:100/vm-100-disk-2.raw".to_owned()]));
        let fates = fates_of_disks(100, &old, &keys, true).unwrap();
        assert_eq!(texts(&fates.frees), ["local:100/vm-100-disk-2.raw"]);
    }
}
