// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`Storage`] for kinds whose work blocks: each call is done beside the tasks.

use std::fmt::Debug;
use std::path::PathBuf;

use provider_api::BoxFuture;

use super::image::{ImageFiles, check_size};
use super::volume::check_snapshot_name;
use super::{
    ImageFormat, Storage, StorageError, StorageStatus, StoredVolume, Unfinished, VolumeId, beside,
};
use crate::tools::Tools;

/// A kind of storage that keeps a volume in files. What each does is said at [`Storage`]; sizes and
/// names of snapshots are checked already.
pub(super) trait Images: Clone + Debug + Send + Sync + 'static {
    const KIND: &'static str;

    fn storage_id(&self) -> &str;

    /// That the disk that the volumes are on is there.
    fn check_mounted(&self) -> Result<(), StorageError>;

    /// The files of a volume, whether they exist or not.
    fn files(&self, volume: &VolumeId) -> Result<ImageFiles, StorageError>;

    /// The files of a volume that must exist.
    fn existing(&self, volume: &VolumeId) -> Result<ImageFiles, StorageError> {
        let files = self.files(volume)?;
        if let Some(path) = files.all().find(|path| !path.is_file()) {
            let (volume, path) = (volume.to_string(), path.clone());
            return Err(StorageError::NotFound { volume, path });
        }
        Ok(files)
    }

    fn allocate_now(
        &self,
        tools: &Tools,
        volume: &VolumeId,
        size_bytes: u64,
    ) -> Result<Unfinished, StorageError>;

    fn free_now(&self, volume: &VolumeId) -> Result<bool, StorageError>;

    fn list_now(&self, guest_id: Option<u32>) -> Result<Vec<StoredVolume>, StorageError>;

    fn snapshot_now(
        &self,
        tools: &Tools,
        volume: &VolumeId,
        name: &str,
    ) -> Result<(), StorageError>;

    fn delete_snapshot_now(
        &self,
        tools: &Tools,
        volume: &VolumeId,
        name: &str,
    ) -> Result<bool, StorageError>;

    fn snapshots_now(&self, tools: &Tools, volume: &VolumeId) -> Result<Vec<String>, StorageError>;

    fn status_now(&self) -> Result<StorageStatus, StorageError>;
}

/// Does something beside the tasks, if the disk that the volumes are on is there.
async fn on<S: Images, T: Send + 'static>(
    storage: &S,
    work: impl FnOnce(S) -> Result<T, StorageError> + Send + 'static,
) -> Result<T, StorageError> {
    let storage = storage.clone();
    beside(move || {
        storage.check_mounted()?;
        work(storage)
    })
    .await
}

impl<S: Images> Storage for S {
    fn id(&self) -> &str {
        self.storage_id()
    }

    fn kind(&self) -> &'static str {
        S::KIND
    }

    fn volume_path(&self, volume: &VolumeId) -> Result<PathBuf, StorageError> {
        Ok(self.files(volume)?.image)
    }

    fn data_path(&self, volume: &VolumeId) -> Result<Option<PathBuf>, StorageError> {
        Ok(self.files(volume)?.data)
    }

    fn allocate<'a>(
        &'a self,
        tools: &'a Tools,
        guest_id: u32,
        name: &'a str,
        format: ImageFormat,
        size_bytes: u64,
    ) -> BoxFuture<'a, Result<VolumeId, StorageError>> {
        let tools = tools.clone();
        Box::pin(async move {
            // A subvolume is as large as what is in it.
            if format != ImageFormat::Subvol {
                check_size(size_bytes)?;
            }
            let volume = VolumeId::new(self.storage_id(), guest_id, name, format)?;
            let new = volume.clone();
            on(self, move |this| this.allocate_now(&tools, &new, size_bytes)).await?.keep();
            Ok(volume)
        })
    }

    fn resize<'a>(
        &'a self,
        tools: &'a Tools,
        volume: &'a VolumeId,
        size_bytes: u64,
    ) -> BoxFuture<'a, Result<(), StorageError>> {
        let (tools, volume) = (tools.clone(), volume.clone());
        Box::pin(on(self, move |this| {
            this.existing(&volume)?.resize(&tools, &volume.to_string(), size_bytes)
        }))
    }

    fn free<'a>(&'a self, volume: &'a VolumeId) -> BoxFuture<'a, Result<bool, StorageError>> {
        let volume = volume.clone();
        Box::pin(on(self, move |this| this.free_now(&volume)))
    }

    fn list(
        &self,
        guest_id: Option<u32>,
    ) -> BoxFuture<'_, Result<Vec<StoredVolume>, StorageError>> {
        Box::pin(on(self, move |this| this.list_now(guest_id)))
    }

    fn snapshot<'a>(
        &'a self,
        tools: &'a Tools,
        volume: &'a VolumeId,
        name: &'a str,
    ) -> BoxFuture<'a, Result<(), StorageError>> {
        let (tools, volume, name) = (tools.clone(), volume.clone(), name.to_owned());
        Box::pin(on(self, move |this| {
            check_snapshot_name(&name)?;
            this.snapshot_now(&tools, &volume, &name)
        }))
    }

    fn delete_snapshot<'a>(
        &'a self,
        tools: &'a Tools,
        volume: &'a VolumeId,
        name: &'a str,
    ) -> BoxFuture<'a, Result<bool, StorageError>> {
        let (tools, volume, name) = (tools.clone(), volume.clone(), name.to_owned());
        Box::pin(on(self, move |this| {
            check_snapshot_name(&name)?;
            this.delete_snapshot_now(&tools, &volume, &name)
        }))
    }

    fn snapshots<'a>(
        &'a self,
        tools: &'a Tools,
        volume: &'a VolumeId,
    ) -> BoxFuture<'a, Result<Vec<String>, StorageError>> {
        let (tools, volume) = (tools.clone(), volume.clone());
        Box::pin(on(self, move |this| this.snapshots_now(&tools, &volume)))
    }

    fn status(&self) -> BoxFuture<'_, Result<StorageStatus, StorageError>> {
        Box::pin(on(self, move |this| this.status_now()))
    }
}
