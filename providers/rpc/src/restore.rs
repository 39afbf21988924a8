// SPDX-License-Identifier: MIT OR Apache-2.0
//! Restores: each belongs to the process that began it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use provider_api::{
    BoxFuture, Call, Compression, ContainerData, ContainerRestore, RestoreDevice, Result,
    VmRestore, VolumeSource,
};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::json;

use crate::connection::Connection;
use crate::wire::Dec;

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct WireVm {
    restore: String,
    devices: Vec<WireDevice>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct WireDevice {
    device: String,
    size_bytes: Dec<u64>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct WireContainer {
    restore: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", expecting = "an object")]
enum WireSource {
    Path { path: PathBuf },
    NbdUnix { socket: PathBuf, export: String },
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", expecting = "an object")]
enum WireData {
    Directory { path: PathBuf },
    Tar { path: PathBuf, compression: Compression },
}

struct RpcRestore {
    connection: Arc<Connection>,
    handle: String,
}

impl RpcRestore {
    async fn cleanup(&self, call: &Call) -> Result<()> {
        // A dead process holds nothing any more.
        if !self.connection.is_alive() {
            return Ok(());
        }
        let params = json!({"restore": self.handle});
        self.connection.request::<IgnoredAny>("restore_cleanup", params, call).await.map(|_| ())
    }
}

struct RpcVmRestore {
    restore: RpcRestore,
    devices: Vec<RestoreDevice>,
}

/// Begins the restore of a VM.
pub(crate) async fn vm(
    connection: Arc<Connection>,
    archive: &str,
    call: &Call,
) -> Result<Box<dyn VmRestore>> {
    let params = json!({"archive": archive});
    let begun: WireVm = connection.request("restore_vm", params, call).await?;
    let restore = RpcRestore { connection, handle: begun.restore };
    let devices = begun
        .devices
        .into_iter()
        .map(|wire| RestoreDevice { device: wire.device, size_bytes: wire.size_bytes.0 })
        .collect();
    Ok(Box::new(RpcVmRestore { restore, devices }))
}

/// Begins the restore of a container.
pub(crate) async fn container(
    connection: Arc<Connection>,
    archive: &str,
    call: &Call,
) -> Result<Box<dyn ContainerRestore>> {
    let params = json!({"archive": archive});
    let begun: WireContainer = connection.request("restore_container", params, call).await?;
    Ok(Box::new(RpcContainerRestore(RpcRestore { connection, handle: begun.restore })))
}

impl VmRestore for RpcVmRestore {
    fn devices(&self) -> &[RestoreDevice] {
        &self.devices
    }

    fn volume_init<'a>(
        &'a mut self,
        device: &'a str,
        private_dir: &'a Path,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<VolumeSource>> {
        Box::pin(async move {
            let RpcRestore { connection, handle } = &self.restore;
            let params = json!({"restore": handle, "device": device, "private_dir": private_dir});
            Ok(match connection.request("volume_init", params, call).await? {
                WireSource::Path { path } => VolumeSource::Path(path),
                WireSource::NbdUnix { socket, export } => VolumeSource::NbdUnix { socket, export },
            })
        })
    }

    fn volume_cleanup<'a>(
        &'a mut self,
        device: &'a str,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let RpcRestore { connection, handle } = &self.restore;
            if !connection.is_alive() {
                return Ok(());
            }
            let params = json!({"restore": handle, "device": device});
            connection.request::<IgnoredAny>("volume_cleanup", params, call).await.map(|_| ())
        })
    }

    fn cleanup<'a>(self: Box<Self>, call: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a,
    {
        Box::pin(async move { self.restore.cleanup(call).await })
    }
}

struct RpcContainerRestore(RpcRestore);

impl ContainerRestore for RpcContainerRestore {
    fn data<'a>(
        &'a mut self,
        private_dir: &'a Path,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<ContainerData>> {
        Box::pin(async move {
            let RpcRestore { connection, handle } = &self.0;
            let params = json!({"restore": handle, "private_dir": private_dir});
            Ok(match connection.request("container_data", params, call).await? {
                WireData::Directory { path } => ContainerData::Directory(path),
                WireData::Tar { path, compression } => ContainerData::Tar { path, compression },
            })
        })
    }

    fn cleanup<'a>(self: Box<Self>, call: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a,
    {
        Box::pin(async move { self.0.cleanup(call).await })
    }
}
