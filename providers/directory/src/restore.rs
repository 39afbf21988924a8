// SPDX-License-Identifier: MIT OR Apache-2.0
//! The restore of one archive: its disks, checked, each served by a `qemu-nbd` of its own.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use provider_api::{
    BoxFuture, Call, Error, GuestKind, Kind, RestoreDevice, Result, VmRestore, VolumeSource,
};

use crate::call::{blocking, invalid, limited};
use crate::chain::Chain;
use crate::limits::LOCK_WAIT;
use crate::manifest::Manifest;
use crate::server::Server;
use crate::storage::Storage;
use crate::usage::{Guest, GuestLock};

/// The restore of one archive.
#[derive(Debug)]
pub(crate) struct DirectoryRestore {
    archive: String,
    devices: Vec<RestoreDevice>,
    chains: HashMap<String, Chain>,
    servers: HashMap<String, Server>,
    qemu_nbd: PathBuf,
    /// Keeps all that is read where it is.
    _use: GuestLock,
}

impl DirectoryRestore {
    /// Reads the manifest and checks the chains of all disks.
    pub(crate) fn begin(
        storage: &Storage,
        archive: &str,
        qemu_nbd: PathBuf,
        call: &Call,
    ) -> Result<Self> {
        let Manifest { subtype, guest_id, .. } = storage.manifest(archive)?;
        if subtype != GuestKind::Qemu {
            return Err(invalid(format!("Archive {archive} is not that of a VM.")));
        }
        let held = Guest::new(storage, subtype, guest_id).begin_use_blocking(call, LOCK_WAIT)?;
        // Again: before the lock a removal may have replaced it.
        let manifest = storage.manifest(archive)?;
        let mut devices = Vec::new();
        let mut chains = HashMap::new();
        for disk in &manifest.disks {
            let chain = Chain::load(storage, &manifest, &disk.device)?;
            devices.push(RestoreDevice {
                device: disk.device.clone(),
                size_bytes: chain.size_bytes(),
            });
            chains.insert(disk.device.clone(), chain);
        }
        Ok(Self {
            archive: archive.to_owned(),
            devices,
            chains,
            servers: HashMap::new(),
            qemu_nbd,
            _use: held,
        })
    }

    async fn serve(&mut self, device: &str, private_dir: &Path) -> Result<VolumeSource> {
        let chain = self.chains.get(device).ok_or_else(|| {
            Error::new(Kind::NotFound, format!("Archive {} has no disk {device}.", self.archive))
        })?;
        if self.servers.contains_key(device) {
            return Err(invalid(format!("Disk {device} is being restored already.")));
        }
        let socket = private_dir.join(format!("{device}.sock"));
        let server = Server::start(&self.qemu_nbd, chain, socket, device).await?;
        let socket = server.socket().to_owned();
        self.servers.insert(device.to_owned(), server);
        Ok(VolumeSource::NbdUnix { socket, export: device.to_owned() })
    }
}

impl VmRestore for DirectoryRestore {
    fn devices(&self) -> &[RestoreDevice] {
        &self.devices
    }

    fn volume_init<'a>(
        &'a mut self,
        device: &'a str,
        private_dir: &'a Path,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<VolumeSource>> {
        Box::pin(limited(call, "Serving a disk", self.serve(device, private_dir)))
    }

    fn volume_cleanup<'a>(
        &'a mut self,
        device: &'a str,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<()>> {
        // Cleaning up takes milliseconds and goes on when the job is being cancelled.
        Box::pin(async move {
            let Some(server) = self.servers.remove(device) else { return Ok(()) };
            blocking(move || {
                server.stop();
                Ok(())
            })
            .await
        })
    }

    fn cleanup<'a>(mut self: Box<Self>, _call: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a,
    {
        Box::pin(async move {
            let servers = std::mem::take(&mut self.servers);
            blocking(move || {
                servers.into_values().for_each(Server::stop);
                Ok(())
            })
            .await
        })
    }
}
