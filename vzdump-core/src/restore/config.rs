// SPDX-License-Identifier: MIT OR Apache-2.0
//! The configuration of a restored VM. What an archive says is untrusted: a configuration can name
//! programs and files of the host.

use std::collections::BTreeMap;

use provider_api::Uuid;

use super::identity;
use super::old::{self, Fates};
use crate::config::guest::{DiskEntry, VmConfig, is_disk_key, split_numbered};
use crate::config::{ConfigError, OptionList};
use crate::task_log::size_config;

/// Keys that run something on the host.
const CODE_KEYS: [&str; 2] = ["args", "hookscript"];
/// Numbered keys that hand a device or a directory of the host to the guest.
const HOST_KEYS: [&str; 3] = ["hostpci", "parallel", "virtiofs"];

/// The volume that a disk was restored to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NewVolume {
    /// Volume id.
    pub(super) volume: String,
    /// Size in bytes.
    pub(super) size_bytes: u64,
}

/// How the configuration of an archive becomes that of a guest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Merge<'a> {
    /// The disks that are restored, by their keys.
    pub(super) volumes: &'a BTreeMap<String, NewVolume>,
    /// Keep lines that reach the host.
    pub(super) allow_raw_config: bool,
    /// Give the guest an identity of its own.
    pub(super) unique: bool,
    /// The guest that is replaced.
    pub(super) old: Option<(&'a VmConfig, &'a Fates)>,
}

/// Makes the new VM's configuration from the archive's; returns what was changed, in words.
pub(super) fn rewrite(
    archived: &VmConfig,
    merge: Merge<'_>,
) -> Result<(VmConfig, Vec<String>), ConfigError> {
    let mut config = archived.for_backup();
    let mut warnings = Vec::new();
    drop_doubles(&mut config)?;
    let pairs: Vec<(String, String)> =
        config.pairs().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    for disk in archived.for_backup().disks()? {
        let change = new_disk(&disk, merge);
        match change.value {
            Some(value) => config.set(&disk.key, &value)?,
            None => drop(config.remove(&disk.key)),
        }
        warnings.extend(change.warning);
    }
    for (key, value) in pairs.iter().filter(|(key, _)| !is_disk_key(key)) {
        // What the guest that is replaced has today the administrator of this host has allowed.
        let is_known = merge.old.is_some_and(|(old, _)| old.get(key) == Some(value));
        if !merge.allow_raw_config && !is_known && reaches_the_host(key, value) {
            config.remove(key);
            warnings.push(format!(
                "dropped '{key}: {value}': it gives the guest access to the host; use \
                 --allow-raw-config to keep it"
            ));
        }
    }
    if config.get("vmgenid").is_some() {
        config.set("vmgenid", &Uuid::new_v4().to_string())?;
    }
    if merge.unique {
        identity::renew(&mut config)?;
    }
    if config.remove("template") {
        warnings.push("dropped 'template': the restored VM is none".to_owned());
    }
    if let Some((_, fates)) = merge.old {
        old::add_unused(&mut config, &fates.unused).map_err(ConfigError::Invalid)?;
    }
    Ok((config, warnings))
}

/// Gives drives of a guest other volumes; the rest of its configuration stays as it is. A drive that it
/// does not have is taken from the archive.
pub(super) fn attach(
    old: &VmConfig,
    archived: &VmConfig,
    disks: &[(String, String)],
    volumes: &BTreeMap<String, NewVolume>,
    fates: &Fates,
) -> Result<VmConfig, ConfigError> {
    let mut config = old.clone();
    let (old_disks, archived_disks) = (old.disks()?, archived.disks()?);
    for (device, key) in disks {
        let Some(new) = volumes.get(key) else { continue };
        let same = old_disks.iter().find(|disk| disk.key == *key && !disk.is_cdrom);
        let model = same.or_else(|| archived_disks.iter().find(|disk| disk.key == *device));
        let value = match model {
            Some(disk) => restored(disk, new),
            None => format!("{},size={}", new.volume, size_config(new.size_bytes)),
        };
        config.set(key, &value)?;
    }
    old::add_unused(&mut config, &fates.unused).map_err(ConfigError::Invalid)?;
    Ok(config)
}

/// Of a key that is there more than once the last counts; the others could hide something.
fn drop_doubles(config: &mut VmConfig) -> Result<(), ConfigError> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for (key, _) in config.pairs() {
        *counts.entry(key.to_owned()).or_default() += 1;
    }
    for key in counts.into_iter().filter(|(_, count)| *count > 1).map(|(key, _)| key) {
        if let Some(value) = config.get(&key).map(str::to_owned) {
            config.remove(&key);
            config.set(&key, &value)?;
        }
    }
    Ok(())
}

struct Change {
    /// The new value; none drops the disk.
    value: Option<String>,
    warning: Option<String>,
}

/// The value of a drive with another volume in it.
fn restored(disk: &DiskEntry, new: &NewVolume) -> String {
    let mut disk = disk.clone();
    disk.volume.clone_from(&new.volume);
    disk.options.remove("format");
    disk.options.set("size", &size_config(new.size_bytes));
    disk.to_value()
}

fn new_disk(disk: &DiskEntry, merge: Merge<'_>) -> Change {
    let key = &disk.key;
    let allow_raw_config = merge.allow_raw_config;
    if let Some(new) = merge.volumes.get(key) {
        return Change { value: Some(restored(disk, new)), warning: None };
    }
    if let Some(value) = merge.old.and_then(|(_, fates)| fates.stays.get(key)) {
        return Change { value: Some(value.clone()), warning: None };
    }
    if disk.is_cdrom {
        let is_old_image = disk.volume.parse::<crate::storage::VolumeId>().is_ok();
        let is_path = disk.volume.starts_with('/') || disk.volume == "cdrom";
        if is_old_image || (is_path && !allow_raw_config) {
            let mut empty = disk.clone();
            "none".clone_into(&mut empty.volume);
            empty.options.remove("size");
            let warning = format!("took '{}' out of the drive '{key}'", disk.volume);
            return Change { value: Some(empty.to_value()), warning: Some(warning) };
        }
        return Change { value: Some(disk.to_value()), warning: None };
    }
    let warning = format!("dropped the disk '{key}': the archive has no data of it");
    Change { value: None, warning: Some(warning) }
}

/// Whether a line runs something on the host, or names one of its devices or files.
fn reaches_the_host(key: &str, value: &str) -> bool {
    let prefix = split_numbered(key).map_or(key, |(prefix, _)| prefix);
    let names_a_file = value
        .split([',', '=', ';', ' ', ':'])
        .any(|item| item.trim_start_matches(['"', '\'']).starts_with('/'));
    let is_text = matches!(key, "description" | "name" | "tags");
    CODE_KEYS.contains(&key)
        || HOST_KEYS.contains(&prefix)
        || (prefix == "usb" && !is_spice(value))
        || (names_a_file && !is_text)
}

/// Whether a USB port takes what a display's client plugs in; all else is a device of the host,
/// whose key `host` may be left out.
fn is_spice(value: &str) -> bool {
    let Ok(options) = OptionList::parse(value) else {
        return false;
    };
    let named = options.named.iter().filter(|(name, _)| name == "host").map(|(_, value)| value);
    let hosts: Vec<&String> = options.first.iter().chain(named).collect();
    hosts == ["spice"] && options.get("mapping").is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volumes() -> BTreeMap<String, NewVolume> {
        let new = NewVolume { volume: "fast:200/vm-200-disk-0.raw".into(), size_bytes: 1 << 30 };
        BTreeMap::from([("scsi0".to_owned(), new)])
    }

    fn merge(volumes: &BTreeMap<String, NewVolume>, allow_raw_config: bool) -> Merge<'_> {
        Merge { volumes, allow_raw_config, unique: false, old: None }
    }

    const OLD: &str = "#what it is for\n\
        args: -drive file=/etc/shadow\n\
        args: -x\n\
        boot: order=scsi0\n\
        hookscript: local:snippets/x.pl\n\
        hostpci0: 01:00.0\n\
        ide0: local:iso/a.iso,media=cdrom\n\
        ide1: /etc/shadow,media=cdrom\n\
        ide2: local:100/vm-100-cloudinit.qcow2,media=cdrom,size=4M\n\
        lock: backup\n\
        rng0: source=/dev/urandom\n\
        scsi0: local:100/evil.raw\n\
        scsi0: local:100/vm-100-disk-0.qcow2,format=qcow2,size=1G,iothread=1\n\
        scsi1: local:100/b.raw,backup=0\n\
        scsi2: /dev/sda\n\
        serial0: /dev/ttyS0\n\
        serial1: socket\n\
        template: 1\n\
        unused0: local:100/c.raw\n\
        usb0: host=1234:5678\n\
        vmgenid: 11111111-1111-4111-8111-111111111111\n\
        \n[snap]\nargs: -y\n";

    #[test]
    fn nothing_of_the_host_is_reachable_after_a_restore() {
        let (config, warnings) = rewrite(&VmConfig::parse(OLD), merge(&volumes(), false)).unwrap();
        let vmgenid = config.get("vmgenid").unwrap().to_owned();
        assert_ne!(vmgenid, "11111111-1111-4111-8111-111111111111");
        assert_eq!(
            config.to_string(),
            format!(
                "#what it is for\nboot: order=scsi0\nide0: local:iso/a.iso,media=cdrom\n\
                 ide1: none,media=cdrom\nide2: none,media=cdrom\nserial1: socket\n\
                 vmgenid: {vmgenid}\nscsi0: fast:200/vm-200-disk-0.raw,size=1G,iothread=1\n"
            )
        );
        for dropped in
            ["args", "hookscript", "hostpci0", "rng0", "scsi1", "scsi2", "serial0", "usb0"]
        {
            assert!(warnings.iter().any(|w| w.contains(dropped)), "{dropped}: {warnings:?}");
        }
    }

    #[test]
    fn usb_devices_of_the_host_are_dropped() {
        for (value, stays) in [
            ("spice", true),
            ("spice,usb3=1", true),
            ("host=spice", true),
            ("046d:c52b", false),
            ("host=046d:c52b,usb3=1", false),
            ("2-1.4", false),
            ("mapping=stick", false),
            ("spice,mapping=stick", false),
            ("spice,host=046d:c52b", false),
            ("host=046d:c52b,host=spice", false),
            ("usb3=1", false),
            ("", false),
        ] {
            let old = VmConfig::parse(&format!("name: x\nusb1: {value}\n"));
            let (config, _) = rewrite(&old, merge(&BTreeMap::new(), false)).unwrap();
            assert_eq!(config.get("usb1").is_some(), stays, "{value:?}");
        }
    }

    #[test]
    fn raw_lines_can_be_kept_on_purpose() {
        let (config, _) = rewrite(&VmConfig::parse(OLD), merge(&volumes(), true)).unwrap();
        assert_eq!(config.get("args"), Some("-x"));
        assert_eq!(config.get("hookscript"), Some("local:snippets/x.pl"));
        // Still no disk without data, and not the old guest's images.
        assert_eq!(config.get("scsi2"), None);
        assert_eq!(config.get("ide2"), Some("none,media=cdrom"));
    }

    #[test]
    fn a_guest_that_is_replaced_keeps_what_its_administrator_allowed() {
        let archived = VmConfig::parse(
            "args: -x\nhostpci0: 01:00.0\nscsi0: local:100/vm-100-disk-0.raw\n\
             scsi1: local:100/vm-100-disk-1.raw,backup=0\n",
        );
        let old = VmConfig::parse("args: -x\nhostpci0: 02:00.0\n");
        let fates = Fates {
            stays: [("scsi1".to_owned(), "local:100/vm-100-disk-1.raw,backup=0".to_owned())].into(),
            unused: ["local:100/vm-100-disk-7.raw".to_owned()].into(),
            ..Fates::default()
        };
        let volumes = volumes();
        let merge = Merge { old: Some((&old, &fates)), ..merge(&volumes, false) };
        let (config, warnings) = rewrite(&archived, merge).unwrap();
        assert_eq!(
            config.to_string(),
            "args: -x\nscsi0: fast:200/vm-200-disk-0.raw,size=1G\n\
             scsi1: local:100/vm-100-disk-1.raw,backup=0\nunused0: local:100/vm-100-disk-7.raw\n"
        );
        assert_eq!(warnings.len(), 1, "{warnings:?}");
    }

    #[test]
    fn a_drive_gets_its_new_volume_and_nothing_else_changes() {
        let old = VmConfig::parse(
            "args: -x\nscsi0: local:200/a.raw,cache=none,size=512\n\n[snap]\nname: old\n",
        );
        let archived = VmConfig::parse("args: -evil\nscsi4: local:100/b.raw,iothread=1\n");
        let new = |volume: &str| NewVolume { volume: volume.to_owned(), size_bytes: 1 << 20 };
        let volumes = [("scsi0", "local:200/n0.raw"), ("scsi9", "local:200/n1.raw")];
        let volumes = volumes.map(|(key, volume)| (key.to_owned(), new(volume))).into();
        let fates = Fates { unused: ["local:200/a.raw".to_owned()].into(), ..Fates::default() };
        let disks = [("scsi0", "scsi0"), ("scsi4", "scsi9")];
        let disks = disks.map(|(device, key)| (device.to_owned(), key.to_owned()));
        let config = attach(&old, &archived, &disks, &volumes, &fates).unwrap();
        assert_eq!(
            config.to_string(),
            "args: -x\nscsi0: local:200/n0.raw,cache=none,size=1M\n\
             scsi9: local:200/n1.raw,iothread=1,size=1M\nunused0: local:200/a.raw\n\n[snap]\nname: old\n"
        );
    }
}
