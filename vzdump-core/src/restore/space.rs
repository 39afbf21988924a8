// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether the storages that disks are to be made on can be written and have the space.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Access, access};
use serde::Serialize;

use super::plan::PlannedDisk;
use crate::job::chain;
use crate::storage::{Storage, StorageSet, VolumeId};
use crate::task_log::size;

/// Space of storages that share it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlannedSpace {
    /// The storages.
    pub storages: BTreeSet<String>,
    /// What the new disks can take at most.
    pub needed_bytes: u64,
    /// What is free.
    pub available_bytes: u64,
    /// What becomes free before the new disks are made.
    pub freed_bytes: u64,
}

impl PlannedSpace {
    fn is_enough(&self) -> bool {
        self.needed_bytes <= self.available_bytes.saturating_add(self.freed_bytes)
    }
}

/// Compares what the disks can take with what is free, per storage that has its own space. `freed`
/// are volumes that go before the disks are made.
pub async fn measure(
    needs: impl Iterator<Item = (Arc<dyn Storage>, u64)>,
    freed: &BTreeSet<VolumeId>,
    storages: &StorageSet,
) -> Vec<PlannedSpace> {
    let mut pools: BTreeMap<u64, PlannedSpace> = BTreeMap::new();
    for (storage, size_bytes) in needs {
        // What does not tell its space may still have enough.
        let Ok(status) = storage.status().await else { continue };
        let pool = pools.entry(status.pool_id).or_insert_with(|| PlannedSpace {
            storages: BTreeSet::new(),
            needed_bytes: 0,
            available_bytes: status.available_bytes,
            freed_bytes: 0,
        });
        pool.storages.insert(storage.id().to_owned());
        pool.needed_bytes = pool.needed_bytes.saturating_add(size_bytes);
    }
    for volume in freed {
        let Ok(storage) = storages.images(volume.storage()) else { continue };
        let Ok(status) = storage.status().await else { continue };
        let Some(pool) = pools.get_mut(&status.pool_id) else { continue };
        let stored = storage.list(Some(volume.guest_id())).await.unwrap_or_default();
        let found = stored.iter().find(|stored| stored.volume == *volume);
        let used_bytes = found.map_or(0, |stored| stored.used_bytes);
        pool.freed_bytes = pool.freed_bytes.saturating_add(used_bytes);
    }
    pools.into_values().collect()
}

/// Refuses disks that could outgrow their storage.
///
/// # Errors
/// In words.
pub fn check(space: &[PlannedSpace]) -> Result<(), String> {
    let Some(pool) = space.iter().find(|pool| !pool.is_enough()) else { return Ok(()) };
    let storages: Vec<&str> = pool.storages.iter().map(String::as_str).collect();
    Err(format!(
        "the disks need up to {}, but the storage '{}' has {} free; use --overcommit if they are \
         mostly empty",
        size(pool.needed_bytes),
        storages.join("', '"),
        size(pool.available_bytes.saturating_add(pool.freed_bytes))
    ))
}

/// Refuses storages that nothing can be written to. May block.
pub(super) fn check_writable(id: u32, disks: &[(String, PathBuf)]) -> Result<(), String> {
    for (storage, path) in disks {
        check_dir(path.parent().unwrap_or(path)).map_err(|error| {
            format!("no disk of VM {id} can be made on the storage '{storage}': {error}")
        })?;
    }
    Ok(())
}

/// Refuses a directory in which no file can be made, or the nearest parent that exists. May block.
///
/// # Errors
/// In words.
pub fn check_dir(path: &Path) -> Result<(), String> {
    let existing = path.ancestors().find(|path| path.exists()).unwrap_or(path);
    if !existing.is_dir() {
        return Err(format!("'{}' is not a directory", existing.display()));
    }
    let allowed = access(existing, Access::WRITE_OK | Access::EXEC_OK).map_err(io::Error::from);
    allowed.map_err(|error| format!("'{}' cannot be written ({error})", existing.display()))
}

/// The files of the disks, with their storages, whatever names they will get.
pub(super) fn places(id: u32, disks: &[PlannedDisk]) -> Result<Vec<(String, PathBuf)>, String> {
    let place = |disk: &PlannedDisk| {
        let storage = disk.storage.as_ref();
        let volume = VolumeId::new(storage.id(), id, "any", disk.format)?;
        Ok((storage.id().to_owned(), storage.volume_path(&volume)?))
    };
    let places: Result<Vec<_>, crate::storage::StorageError> = disks.iter().map(place).collect();
    places.map_err(|error| chain(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(needed_bytes: u64, available_bytes: u64, freed_bytes: u64) -> PlannedSpace {
        let storages = ["fast".to_owned()].into();
        PlannedSpace { storages, needed_bytes, available_bytes, freed_bytes }
    }

    #[test]
    fn what_becomes_free_counts() {
        assert_eq!(check(&[pool(10, 10, 0), pool(10, 4, 6)]), Ok(()));
        let error = check(&[pool(10, 10, 0), pool(10, 4, 5)]).unwrap_err();
        assert!(error.contains("'fast'") && error.contains("--overcommit"), "{error}");
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(check_dir(&dir.path().join("not/yet/there")), Ok(()));
        // Where not even root can make files.
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let place = ("slow".to_owned(), file.join("100/vm-100-disk-0.raw"));
        let error = check_writable(100, &[place]).unwrap_err();
        assert!(error.contains("'slow'") && error.contains("not a directory"), "{error}");
    }
}
