// SPDX-License-Identifier: MIT OR Apache-2.0
//! The configuration of a restored VM. What an archive says is untrusted: a configuration can name
//! programs and files of the host.

use std::collections::BTreeMap;

use provider_api::Uuid;

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

/// Makes the new VM's configuration from the archive's; returns what was changed, in words.
pub(super) fn rewrite(
    old: &VmConfig,
    volumes: &BTreeMap<String, NewVolume>,
    allow_raw_config: bool,
) -> Result<(VmConfig, Vec<String>), ConfigError> {
    let mut config = old.for_backup();
    let mut warnings = Vec::new();
    drop_doubles(&mut config)?;
    let pairs: Vec<(String, String)> =
        config.pairs().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    for disk in old.for_backup().disks()? {
        let change = new_disk(&disk, volumes.get(&disk.key), allow_raw_config);
        match change.value {
            Some(value) => config.set(&disk.key, &value)?,
            None => drop(config.remove(&disk.key)),
        }
        warnings.extend(change.warning);
    }
    for (key, value) in pairs.iter().filter(|(key, _)| !is_disk_key(key)) {
        if !allow_raw_config && reaches_the_host(key, value) {
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
    if config.remove("template") {
        warnings.push("dropped 'template': the restored VM is none".to_owned());
    }
    Ok((config, warnings))
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

fn new_disk(disk: &DiskEntry, new: Option<&NewVolume>, allow_raw_config: bool) -> Change {
    let key = &disk.key;
    if let Some(NewVolume { volume, size_bytes }) = new {
        let mut disk = disk.clone();
        disk.volume.clone_from(volume);
        disk.options.remove("format");
        disk.options.set("size", &size_config(*size_bytes));
        return Change { value: Some(disk.to_value()), warning: None };
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
        let (config, warnings) = rewrite(&VmConfig::parse(OLD), &volumes(), false).unwrap();
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
            let (config, _) = rewrite(&old, &BTreeMap::new(), false).unwrap();
            assert_eq!(config.get("usb1").is_some(), stays, "{value:?}");
        }
    }

    #[test]
    fn raw_lines_can_be_kept_on_purpose() {
        let (config, _) = rewrite(&VmConfig::parse(OLD), &volumes(), true).unwrap();
        assert_eq!(config.get("args"), Some("-x"));
        assert_eq!(config.get("hookscript"), Some("local:snippets/x.pl"));
        // Still no disk without data, and not the old guest's images.
        assert_eq!(config.get("scsi2"), None);
        assert_eq!(config.get("ide2"), Some("none,media=cdrom"));
    }
}
