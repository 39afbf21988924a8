// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which disks of a VM are backed up, and how they are called in QEMU.

use std::collections::HashMap;

use qmp_client::Session;
use qmp_client::commands::QueryNamedBlockNodes;

use crate::config::ConfigError;
use crate::config::guest::{DiskEntry, VmConfig};
use crate::guest::GuestError;
use crate::task_log::{TaskSink, clean, size_config};

/// A disk that is backed up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Disk {
    /// Its key in the configuration, `scsi0`; the provider's name for it.
    pub(super) key: String,
    /// Its volume as the configuration names it.
    pub(super) volume: String,
    /// Its size in QEMU.
    pub(super) size_bytes: u64,
}

impl Disk {
    /// Its node in QEMU.
    pub(super) fn node(&self) -> String {
        node_of(&self.key)
    }

    /// The id of its NBD export.
    pub(super) fn export_id(&self) -> String {
        format!("vzdump-{}", self.key)
    }
}

fn node_of(key: &str) -> String {
    format!("drive-{key}")
}

/// What is done with one disk of the configuration.
#[derive(Debug, PartialEq, Eq)]
enum Choice {
    Include,
    /// Never backed up, and nobody expects it.
    Silent,
    Exclude(&'static str),
}

fn choose(disk: &DiskEntry, config: &VmConfig) -> Choice {
    if disk.is_cdrom {
        Choice::Silent
    } else if !disk.backup {
        Choice::Exclude("backup=no")
    } else if disk.key.starts_with("efidisk") && config.get("bios") != Some("ovmf") {
        Choice::Exclude("efidisk but no OVMF BIOS")
    } else {
        Choice::Include
    }
}

/// Says in the log what of the configuration is not backed up.
pub(super) fn log_left_out(config: &VmConfig, sink: &dyn TaskSink) {
    for (_, volume) in config.unused() {
        let volume = clean(volume);
        sink.info(&format!("skip unused drive '{volume}' (not included into backup)"));
    }
    let is_snapshot = |name: &str| name != "PENDING" && !name.starts_with("special:");
    if config.sections().any(is_snapshot) {
        sink.info("snapshots found (not included into backup)");
    }
    if config.sections().any(|name| name == "PENDING") {
        sink.info("pending configuration changes found (not included into backup)");
    }
}

/// Chooses the disks and says so in the log.
pub(super) fn choose_disks(
    config: &VmConfig,
    sink: &dyn TaskSink,
) -> Result<Vec<DiskEntry>, ConfigError> {
    let mut chosen = Vec::new();
    for disk in config.disks()? {
        match choose(&disk, config) {
            Choice::Include => chosen.push(disk),
            Choice::Silent => {}
            Choice::Exclude(why) => {
                let volume = clean(&disk.volume);
                sink.info(&format!("exclude disk '{}' '{volume}' ({why})", disk.key));
            }
        }
    }
    Ok(chosen)
}

/// Asks QEMU for the sizes of the chosen disks.
pub(super) async fn measure(
    session: &Session,
    chosen: Vec<DiskEntry>,
    sink: &dyn TaskSink,
) -> Result<Vec<Disk>, GuestError> {
    let nodes = session
        .execute(QueryNamedBlockNodes { flat: true })
        .await
        .map_err(GuestError::at("ask QEMU for its block nodes"))?;
    let sizes: HashMap<String, u64> = nodes
        .into_iter()
        .filter_map(|node| Some((node.node_name?, node.image.virtual_size_bytes)))
        .collect();
    let mut disks = Vec::new();
    for DiskEntry { key, volume, .. } in chosen {
        let Some(&size_bytes) = sizes.get(&node_of(&key)) else {
            return Err(GuestError::Refused(format!(
                "The disk '{key}' is in the configuration, but the running QEMU has no node \
                 '{}': restart the VM, or exclude the disk with backup=0.",
                node_of(&key)
            )));
        };
        let shown = clean(&volume);
        sink.info(&format!("include disk '{key}' '{shown}' {}", size_config(size_bytes)));
        disks.push(Disk { key, volume, size_bytes });
    }
    Ok(disks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task_log::testing::MemoryLog;

    #[test]
    fn the_choice_is_logged_as_vzdump_does() {
        let config = VmConfig::parse(
            "ide2: local:iso/x.iso,media=cdrom\nefidisk0: local:100/e.raw\n\
             scsi0: local:100/a.raw\nscsi1: local:100/b.raw,backup=0\n",
        );
        let sink = MemoryLog::default();
        let chosen = choose_disks(&config, &sink).unwrap();
        assert_eq!(chosen.len(), 1);
        assert_eq!(
            sink.text(),
            "INFO: exclude disk 'efidisk0' 'local:100/e.raw' (efidisk but no OVMF BIOS)\n\
             INFO: exclude disk 'scsi1' 'local:100/b.raw' (backup=no)"
        );
    }
}
