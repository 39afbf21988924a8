// SPDX-License-Identifier: MIT OR Apache-2.0
//! The storages of `storage.cfg` that hold images.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::{BTRFS_KIND, BtrfsStorage, DIR_KIND, DirStorage, Storage, StorageError, VolumeId};
use crate::config::storage::{StorageConfig, StorageSection};
use crate::job::chain;
use crate::layout::Layout;

/// The storage that exists without being configured.
pub const DEFAULT_STORAGE: &str = "local";

/// Makes a storage of its section in `storage.cfg`.
type Open = fn(&StorageSection, &Path) -> Result<Arc<dyn Storage>, String>;

/// The types of storages that hold images. Each has a `path`.
pub const KINDS: [(&str, Open); 2] = [(DIR_KIND, open_dir), (BTRFS_KIND, open_btrfs)];

fn open_dir(section: &StorageSection, path: &Path) -> Result<Arc<dyn Storage>, String> {
    let mount_point = section.mount_point(path)?;
    Ok(Arc::new(DirStorage::new(&section.id, path).with_mount_point(mount_point)))
}

fn open_btrfs(section: &StorageSection, path: &Path) -> Result<Arc<dyn Storage>, String> {
    let nocow = section.switch("nocow")?.unwrap_or(false);
    let mount_point = section.mount_point(path)?;
    let storage = BtrfsStorage::new(&section.id, path, nocow);
    Ok(Arc::new(storage.with_mount_point(mount_point)))
}

/// Whether storages of a type hold images.
fn opener(kind: &str) -> Option<Open> {
    KINDS.iter().find(|(name, _)| *name == kind).map(|(_, open)| *open)
}

/// All storages of `storage.cfg`, and the implicit `local`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StorageSet {
    sections: Vec<StorageSection>,
}

impl StorageSet {
    /// The storages of a list. A `local` for images, in the state directory, is added when the list
    /// has none.
    #[must_use]
    pub fn new(config: &StorageConfig, layout: &Layout) -> Self {
        let mut sections = config.sections();
        if !sections.iter().any(|section| section.id == DEFAULT_STORAGE) {
            let path = layout.state().join("storage").display().to_string();
            sections.push(StorageSection {
                id: DEFAULT_STORAGE.into(),
                kind: DIR_KIND.into(),
                properties: vec![("path".into(), path), ("content".into(), "images".into())],
            });
        }
        Self { sections }
    }

    /// All storages, those for backups included.
    #[must_use]
    pub fn sections(&self) -> &[StorageSection] {
        &self.sections
    }

    /// Whether storages of this type hold images.
    #[must_use]
    pub fn is_image_kind(kind: &str) -> bool {
        opener(kind).is_some()
    }

    /// The storage for images of this name.
    ///
    /// # Errors
    /// [`StorageError::Storage`].
    pub fn images(&self, id: &str) -> Result<Arc<dyn Storage>, StorageError> {
        let section = self.sections.iter().find(|section| section.id == id).ok_or_else(|| {
            StorageError::Storage { id: id.to_owned(), why: "is not in storage.cfg.".into() }
        })?;
        let fault = |why: String| StorageError::Storage { id: section.id.clone(), why };
        let Some(open) = opener(&section.kind) else {
            return Err(fault(format!("has the type '{}', which holds no images.", section.kind)));
        };
        if section.is_disabled() {
            return Err(fault("is disabled in storage.cfg.".into()));
        }
        if !section.allows("images") {
            return Err(fault("does not have 'images' in its 'content'.".into()));
        }
        let path = section.get("path").map(Path::new).filter(|path| path.is_absolute());
        let path = path.ok_or_else(|| fault("needs a 'path' that is absolute.".into()))?;
        open(section, path).map_err(fault)
    }

    /// Names of the storages that can hold images now.
    #[must_use]
    pub fn image_ids(&self) -> Vec<&str> {
        let ids = self.sections.iter().map(|section| section.id.as_str());
        ids.filter(|id| self.images(id).is_ok()).collect()
    }

    /// Fleecing images of one guest, or of all, on any storage; and, in words, what could not be looked
    /// into, of which a storage that does not answer in time is one.
    pub async fn fleecing_images(
        &self,
        guest_id: Option<u32>,
        limit: Duration,
    ) -> (Vec<VolumeId>, Vec<String>) {
        let storages = self.image_ids().into_iter().filter_map(|id| self.images(id).ok());
        // At once, so that one that hangs does not hide what is on the others.
        let looks = storages.map(|storage| async move {
            match tokio::time::timeout(limit, storage.list(guest_id)).await {
                Ok(listed) => listed.map_err(|error| chain(&error)),
                Err(_) => Err(format!(
                    "the storage '{}' did not answer within {} seconds",
                    storage.id(),
                    limit.as_secs()
                )),
            }
        });
        let (mut found, mut faults) = (Vec::new(), Vec::new());
        for looked in futures_util::future::join_all(looks).await {
            match looked {
                Ok(stored) => found.extend(stored.into_iter().map(|stored| stored.volume)),
                Err(fault) => faults.push(fault),
            }
        }
        found.retain(VolumeId::is_fleecing);
        (found, faults)
    }

    /// The file of a volume as a configuration names it: `local:100/…` or an absolute path.
    ///
    /// # Errors
    /// [`StorageError`].
    pub fn resolve(&self, volume: &str) -> Result<PathBuf, StorageError> {
        if volume.starts_with('/') {
            return Ok(volume.into());
        }
        let volume: VolumeId = volume.parse()?;
        self.images(volume.storage())?.volume_path(&volume)
    }

    /// The file of a volume's data, where that is not in the file of [`StorageSet::resolve`].
    ///
    /// # Errors
    /// [`StorageError`].
    pub fn resolve_data(&self, volume: &str) -> Result<Option<PathBuf>, StorageError> {
        if volume.starts_with('/') {
            return Ok(None);
        }
        let volume: VolumeId = volume.parse()?;
        self.images(volume.storage())?.data_path(&volume)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_storages_for_images_hold_images() {
        let text = "dir: isos\n\tpath /i\n\tcontent iso\ndirectory: backups\n\tpath /b\n\
                    dir: off\n\tpath /o\n\tdisable\ndir: rel\n\tpath x\n\
                    dir: where\n\tpath /w\n\tis_mountpoint mnt\n\
                    btrfs: odd\n\tpath /b\n\tnocow maybe\nbtrfs: tree\n\tpath /t\n\tnocow 1\n\
                    zfspool: tank\n\tpool rpool/data\n";
        let config = StorageConfig::parse(text).unwrap();
        let set = StorageSet::new(&config, &Layout::new(Some("/r".into())));
        for (id, fault) in [
            ("isos", "'images'"),
            ("backups", "'directory'"),
            ("off", "disabled"),
            ("rel", "absolute"),
            ("odd", "nocow maybe"),
            ("where", "is_mountpoint mnt"),
            ("tank", "'zfspool', which holds no images"),
            ("none", "not in storage.cfg"),
        ] {
            let error = set.images(id).unwrap_err().to_string();
            assert!(error.contains(fault), "{error}");
        }
        assert_eq!(set.image_ids(), ["tree", "local"]);
        assert_eq!(set.images("tree").unwrap().kind(), BTRFS_KIND);
        assert_eq!(
            set.resolve("local:100/a.raw").unwrap(),
            Path::new("/r/state/storage/images/100/a.raw")
        );
        assert_eq!(set.resolve("tree:100/a.raw").unwrap(), Path::new("/t/images/100/a/disk.raw"));
        assert_eq!(
            set.resolve_data("local:100/a.raw.qcow2").unwrap().unwrap(),
            Path::new("/r/state/storage/images/100/a.raw.data")
        );
        assert_eq!(set.resolve_data("local:100/a.qcow2").unwrap(), None);
        assert_eq!(set.resolve("/dev/sdx").unwrap(), Path::new("/dev/sdx"));
        assert_eq!(config.to_string(), text, "a type that nobody knows is kept");
    }
}
