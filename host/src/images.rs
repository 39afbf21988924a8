// SPDX-License-Identifier: MIT OR Apache-2.0
//! Storages of images: their space, and which volumes they hold.

use std::collections::HashSet;
use std::time::Duration;

use serde::Serialize;
use vzdump_core::config::ConfigError;
use vzdump_core::config::guest::VmConfig;
use vzdump_core::journal;
use vzdump_core::storage::VolumeId;
use vzdump_core::vm::destroy::{self, Destroyed};

use crate::{CancellationToken, Host, HostError, StorageInfo, StorageUse, TaskSink, chain};

/// A storage that does not answer in this time does not work.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// A storage and its space.
#[derive(Debug, Clone, Serialize)]
pub struct StorageState {
    /// The storage.
    #[serde(flatten)]
    pub info: StorageInfo,
    /// Its space in bytes, if it was told.
    pub total_bytes: Option<u64>,
    /// What is in use.
    pub used_bytes: Option<u64>,
    /// What can be used yet.
    pub available_bytes: Option<u64>,
    /// Why its space is not known.
    pub problem: Option<String>,
}

/// A volume of a storage of images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ImageInfo {
    /// Its name.
    pub volid: String,
    /// Its guest.
    pub vmid: u32,
    /// The format.
    pub format: String,
    /// The size of the disk; none if the image is half made or damaged.
    pub size_bytes: Option<u64>,
    /// What it takes on the storage.
    pub used_bytes: u64,
    /// What it is for.
    pub used_as: ImageUse,
}

/// What a volume is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageUse {
    /// The configuration of its guest names it.
    Disk,
    /// It keeps old data of a backup.
    Fleecing,
    /// It belongs to a task that has not ended, or that died.
    Task,
    /// Nobody names it.
    Unused,
}

impl Host {
    /// All storages with their space.
    pub async fn storage_states(&self) -> Vec<StorageState> {
        let mut states = Vec::new();
        for info in self.storages() {
            let mut state = StorageState {
                total_bytes: None,
                used_bytes: None,
                available_bytes: None,
                problem: None,
                info,
            };
            if !state.info.disabled {
                self.ask_space(&mut state).await;
            }
            states.push(state);
        }
        states
    }

    async fn ask_space(&self, state: &mut StorageState) {
        let id = &state.info.id;
        let asked = match state.info.used_for {
            StorageUse::Unsupported => return,
            StorageUse::Images => match self.storages.images(id) {
                Err(error) => Err(chain(&error)),
                Ok(storage) => {
                    within(async move {
                        let status = storage.status().await.map_err(|error| chain(&error))?;
                        let (used, available) = (status.used_bytes, status.available_bytes);
                        // As providers tell it: what is reserved for root is counted as not there.
                        let total = status.total_bytes.min(used.saturating_add(available));
                        Ok((total, used, available))
                    })
                    .await
                }
            },
            StorageUse::Backups => match self.providers.get(id).await {
                Err(error) => Err(error),
                Ok(provider) => {
                    within(async move {
                        let call =
                            provider_api::Call { cancel: CancellationToken::new(), deadline: None };
                        let status = provider.status(&call).await.map_err(|error| chain(&error))?;
                        let free_bytes = status.total_bytes.saturating_sub(status.used_bytes);
                        Ok((status.total_bytes, status.used_bytes, free_bytes))
                    })
                    .await
                }
            },
        };
        match asked {
            Ok((total, used, available)) => {
                state.total_bytes = Some(total);
                state.used_bytes = Some(used);
                state.available_bytes = Some(available);
            }
            Err(problem) => state.problem = Some(problem),
        }
    }

    /// The volumes of a storage of images.
    ///
    /// # Errors
    /// [`HostError::Storage`], [`HostError::Config`], [`HostError::Journal`].
    pub async fn images(&self, storage: &str) -> Result<Vec<ImageInfo>, HostError> {
        let words = |error| HostError::Storage(chain(&error));
        let images = self.storages.images(storage).map_err(words)?;
        let listed = tokio::time::timeout(ANSWER_TIMEOUT, images.list(None)).await;
        let listed = listed.map_err(|_| HostError::Storage(no_answer()))?.map_err(words)?;
        let named = self.named_volumes()?;
        let journals = journal::list(&self.layout, None)?;
        let records = journals.iter().filter_map(|path| journal::read(path).ok());
        let volumes = records.flat_map(|record| record.volumes);
        // Without the ending, which a half-made one may not have yet.
        let stem = |volume: &VolumeId| (volume.guest_id(), volume.name().to_owned());
        let of_tasks: HashSet<_> = volumes
            .filter_map(|text| text.parse::<VolumeId>().ok())
            .filter(|volume| volume.storage() == storage)
            .map(|volume| stem(&volume))
            .collect();
        let info = |stored: vzdump_core::storage::StoredVolume| {
            let volume = stored.volume;
            let volid = volume.to_string();
            let used_as = match () {
                () if volume.is_fleecing() => ImageUse::Fleecing,
                () if named.contains(&volid) => ImageUse::Disk,
                () if of_tasks.contains(&stem(&volume)) => ImageUse::Task,
                () => ImageUse::Unused,
            };
            ImageInfo {
                volid,
                vmid: volume.guest_id(),
                format: volume.format().to_string(),
                size_bytes: stored.size_bytes,
                used_bytes: stored.used_bytes,
                used_as,
            }
        };
        Ok(listed.into_iter().map(info).collect())
    }

    /// Everything that a configuration of a VM or a container names, volumes among it. One that cannot be
    /// read is an error: what only it names would be called unused.
    fn named_volumes(&self) -> Result<HashSet<String>, HostError> {
        let mut named = HashSet::new();
        for dir in [self.layout.vm_config_dir(), self.layout.etc().join("lxc")] {
            let fault = |source| ConfigError::Read { path: dir.clone(), source };
            let entries = match std::fs::read_dir(&dir) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                other => other.map_err(fault)?,
            };
            for entry in entries {
                let path = entry.map_err(fault)?.path();
                if path.extension().is_some_and(|end| end == "conf")
                    && let Some(config) = VmConfig::read(&path)?
                {
                    named.extend(config.words().map(str::to_owned));
                }
            }
        }
        Ok(named)
    }

    /// Removes a VM that does not run, with its volumes.
    ///
    /// # Errors
    /// [`HostError::Destroy`]; doing it again goes on where it stopped.
    pub async fn vm_destroy(&self, id: u32, sink: &dyn TaskSink) -> Result<Destroyed, HostError> {
        Ok(Box::pin(destroy::destroy(&self.context()?, id, sink)).await?)
    }
}

fn no_answer() -> String {
    format!("it does not answer within {} s", ANSWER_TIMEOUT.as_secs())
}

async fn within<T>(work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    tokio::time::timeout(ANSWER_TIMEOUT, work).await.unwrap_or_else(|_| Err(no_answer()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::Overrides;

    #[tokio::test]
    async fn leftover_fleecing_images_from_a_crash_are_not_shown_as_unused() {
        let dir = tempfile::tempdir().unwrap();
        let images = dir.path().join("state/storage/images/100");
        fs::create_dir_all(&images).unwrap();
        fs::create_dir_all(dir.path().join("etc/qemu-server")).unwrap();
        for name in ["vm-100-disk-0.raw", "vm-100-disk-1.raw", "vm-100-fleece-scsi0-1234abcd.raw"] {
            fs::write(images.join(name), [0; 512]).unwrap();
        }
        // A container's disk is none of a VM, and in use all the same.
        fs::create_dir_all(dir.path().join("etc/lxc")).unwrap();
        fs::create_dir_all(images.with_file_name("101")).unwrap();
        fs::write(images.with_file_name("101").join("vm-101-disk-0.raw"), [0; 512]).unwrap();
        let container = "rootfs: local:101/vm-101-disk-0.raw,size=8G\n";
        fs::write(dir.path().join("etc/lxc/101.conf"), container).unwrap();
        let config = "scsi0: local:100/vm-100-disk-0.raw\n";
        fs::write(dir.path().join("etc/qemu-server/100.conf"), config).unwrap();
        let host = Host::open(Some(dir.path().into()), &Overrides::default()).unwrap();
        let uses = host.images("local").await.unwrap().into_iter().map(|image| image.used_as);
        let expected = [ImageUse::Disk, ImageUse::Unused, ImageUse::Fleecing, ImageUse::Disk];
        assert_eq!(uses.collect::<Vec<_>>(), expected);

        struct Silent;
        impl TaskSink for Silent {
            fn line(&self, _: crate::Level, _: &str) {}
            fn progress(&self, _: &crate::Progress) {}
        }
        let report = host.doctor(false, &Silent).await.unwrap();
        let check = report.checks.iter().find(|check| check.name == "fleecing images").unwrap();
        assert!(!check.ok && check.found.contains("vm-100-fleece-scsi0-1234abcd"), "{check:?}");
        let fixed = host.doctor(true, &Silent).await.unwrap();
        assert_eq!(fixed.swept.unwrap().removed.len(), 1);
        let check = fixed.checks.iter().find(|check| check.name == "fleecing images").unwrap();
        assert!(check.ok, "{check:?}");
        assert_eq!(host.images("local").await.unwrap().len(), 3);

        let destroyed = host.vm_destroy(100, &Silent).await.unwrap();
        assert_eq!(destroyed.volumes, ["local:100/vm-100-disk-0.raw"]);
        assert!(!dir.path().join("etc/qemu-server/100.conf").exists());
        assert!(images.join("vm-100-disk-1.raw").exists(), "what it does not name is not its own");
        assert!(host.vm_destroy(100, &Silent).await.is_err());
    }

    #[tokio::test]
    async fn a_configuration_that_is_not_text_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("etc/qemu-server")).unwrap();
        fs::write(dir.path().join("etc/qemu-server/105.conf"), b"name: caf\xe9\n").unwrap();
        let host = Host::open(Some(dir.path().into()), &Overrides::default()).unwrap();
        let error = host.images("local").await.unwrap_err().to_string();
        assert!(error.contains("qemu-server/105.conf' is not text"), "{error}");
    }
}
