// SPDX-License-Identifier: MIT OR Apache-2.0
//! The container that a restore replaces: whether that may be, and what becomes of its volumes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use vzdump_core::config::container::{CtConfig, MountEntry};
use vzdump_core::config::parse_bool;
use vzdump_core::job::JobContext;
use vzdump_core::storage::VolumeId;

use crate::CtError;
use crate::lxc::{Lxc, State};
use crate::runtime::{beside, refuse_locked};

/// What becomes of the volumes of a container that is replaced.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Fates {
    /// Removed, once nothing names them any more: their files came back.
    pub(super) frees: BTreeSet<VolumeId>,
    /// Mounts that stay as they are: the archive has the same ones, and no files of them.
    pub(super) stays: BTreeMap<String, String>,
    /// Kept as unused volumes.
    pub(super) unused: BTreeSet<String>,
}

impl Fates {
    /// Keeps the volumes at mount points that have got no files: as unused ones, because the new volumes have their
    /// places. The archive names them, but patterns may have left them out. Tells them.
    pub(super) fn keep_without_files(
        &mut self,
        id: u32,
        old: &CtConfig,
        empty: &[&Path],
    ) -> Result<Vec<VolumeId>, CtError> {
        let mut kept = Vec::new();
        for entry in old.mounts()? {
            if !empty.contains(&entry.mount_point.as_path()) {
                continue;
            }
            let own = own_volume(id, &entry.volume);
            kept.extend(own.filter(|volume| self.frees.remove(volume)));
        }
        self.unused.extend(kept.iter().map(ToString::to_string));
        Ok(kept)
    }
}

/// The configuration of the container that is there, if it may be replaced.
pub(super) async fn find(
    ctx: &JobContext,
    id: u32,
    force: bool,
) -> Result<Option<CtConfig>, CtError> {
    let refuse = |why: String| Err(CtError::Invalid(why));
    let path = ctx.layout.vm_config_path(id);
    if path.exists() {
        return refuse(format!("There is a VM {id} already; choose another number."));
    }
    let Some(config) = CtConfig::read(&ctx.layout.ct_config_path(id))? else { return Ok(None) };
    if !force {
        return refuse(format!(
            "The container {id} exists already; choose another number, or replace it with --force."
        ));
    }
    let lxc_path = ctx.layout.lxc_path();
    let state = beside(move || Lxc::new(&lxc_path, id).state()).await?;
    if state != State::Stopped {
        return refuse(format!("The container {id} is running; stop it first."));
    }
    refuse_locked(&config, id)?;
    if config.lines().get("protection").and_then(parse_bool) == Some(true) {
        return refuse(format!(
            "The container {id} is protected; remove the key 'protection' from its configuration \
             first."
        ));
    }
    Ok(Some(config))
}

/// What becomes of the volumes of `old`, when of the archive's mounts those come back that are in it.
pub(super) fn fates(id: u32, old: &CtConfig, archived: &[MountEntry]) -> Result<Fates, CtError> {
    let mut fates = Fates::default();
    for entry in old.mounts()? {
        let own = own_volume(id, &entry.volume);
        let comes_back = |other: &MountEntry| other.mount_point == entry.mount_point;
        let is_the_same = |other: &MountEntry| {
            other.key == entry.key && other.volume == entry.volume && comes_back(other)
        };
        if archived.iter().filter(|other| other.backup()).any(comes_back) {
            fates.frees.extend(own);
        } else if archived.iter().any(is_the_same) {
            fates.stays.insert(entry.key.clone(), entry.to_value());
        } else {
            fates.unused.extend(own.map(|volume| volume.to_string()));
        }
    }
    // Those of snapshots, and unused ones: nobody has said that they may go.
    let attached: BTreeSet<VolumeId> =
        fates.stays.values().filter_map(|value| own_volume(id, value.split(',').next()?)).collect();
    let others = old.lines().words().filter_map(|word| own_volume(id, word));
    let others = others.filter(|volume| !fates.frees.contains(volume));
    let others: Vec<String> = others.map(|volume| volume.to_string()).collect();
    fates.unused.extend(others);
    fates.frees.retain(|volume| !attached.contains(volume));
    fates.unused.retain(|text| !attached.iter().any(|volume| volume.to_string() == *text));
    Ok(fates)
}

/// A volume of this container; others are not ours to remove.
fn own_volume(id: u32, text: &str) -> Option<VolumeId> {
    text.parse::<VolumeId>().ok().filter(|volume| volume.guest_id() == id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_volumes_whose_files_come_back_are_removed() {
        let old = CtConfig::parse(
            "rootfs: local:200/vm-200-disk-0.raw,size=1G\n\
             mp0: local:200/vm-200-disk-1.raw,mp=/srv,backup=1\n\
             mp1: local:200/vm-200-disk-2.raw,mp=/cache\n\
             mp2: local:200/vm-200-disk-3.raw,mp=/new\n\
             mp3: local:201/vm-201-disk-0.raw,mp=/other\n\
             mp4: /data,mp=/data\n\
             unused0: local:200/vm-200-disk-5.raw\n\
             \n[before]\nrootfs: local:200/vm-200-disk-6.raw\n",
        );
        let archived = CtConfig::parse(
            "rootfs: gone:7/x.raw,size=1G\nmp5: gone:7/y.raw,mp=/srv,backup=1\n\
             mp1: local:200/vm-200-disk-2.raw,mp=/cache\nmp4: /data,mp=/data\n",
        );
        let mut fates = fates(200, &old, &archived.mounts().unwrap()).unwrap();
        let frees: Vec<String> = fates.frees.iter().map(ToString::to_string).collect();
        assert_eq!(frees, ["local:200/vm-200-disk-0.raw", "local:200/vm-200-disk-1.raw"]);
        assert_eq!(fates.stays.keys().collect::<Vec<_>>(), ["mp1", "mp4"]);
        let unused = [3, 5, 6].map(|n| format!("local:200/vm-200-disk-{n}.raw"));
        assert_eq!(fates.unused.iter().collect::<Vec<_>>(), unused.iter().collect::<Vec<_>>());
        // What came back without files has not come back.
        let kept = fates.keep_without_files(200, &old, &[Path::new("/srv")]).unwrap();
        assert_eq!(kept, ["local:200/vm-200-disk-1.raw".parse().unwrap()]);
        assert!(!fates.frees.contains(&kept[0]) && fates.unused.contains(&kept[0].to_string()));
        assert_eq!(fates.frees.len(), 1, "{fates:?}");
    }
}
