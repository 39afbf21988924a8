// SPDX-License-Identifier: MIT OR Apache-2.0
//! Restores: each disk is served over NBD from its file.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use provider_api::{BoxFuture, Call, Error, Kind, RestoreDevice, Result, VmRestore, VolumeSource};
use provider_nbd::Errno;
use provider_nbd::server::{Export, ExportFuture, Refusal, Server};

use super::store::Store;
use super::{Fault, now};

/// A raw file as an export.
struct RawFile {
    file: File,
    size_bytes: u64,
}

impl Export for RawFile {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read(&self, offset: u64, len: usize) -> ExportFuture<'_, Bytes> {
        let mut data = vec![0; len];
        let read = self.file.read_exact_at(&mut data, offset);
        let failed = |error: std::io::Error| Refusal::new(Errno::EIO, error.to_string());
        Box::pin(std::future::ready(read.map(|()| data.into()).map_err(failed)))
    }
}

pub(crate) struct FileRestore {
    store: Store,
    archive: String,
    path: PathBuf,
    devices: Vec<RestoreDevice>,
    server: Option<Server>,
    deaf: Option<std::os::unix::net::UnixListener>,
}

impl FileRestore {
    pub(crate) fn begin(store: &Store, archive: &str) -> Result<Self> {
        let mut restored = store.setup.lock.lock().unwrap();
        let path = store.path(archive)?;
        let disks = Store::manifest(&path)?.disks.into_iter();
        let device =
            |d: super::store::Disk| RestoreDevice { device: d.device, size_bytes: d.size_bytes };
        let devices = disks.map(device).collect();
        // From here on it cannot be removed.
        restored.push(archive.to_owned());
        let (store, archive) = (store.clone(), archive.to_owned());
        Ok(Self { store, archive, path, devices, server: None, deaf: None })
    }

    fn offer(&mut self, device: &str, private_dir: &Path) -> Result<VolumeSource> {
        if !self.devices.iter().any(|known| known.device == device) {
            return Err(Error::new(Kind::NotFound, format!("There is no disk {device}.")));
        }
        let path = self.path.join(format!("{device}.raw"));
        let failed = |error| Error::io("Offering a disk failed.", error);
        match self.store.setup.fault {
            Some(Fault::SymbolicLink) => {
                let link = private_dir.join("link");
                std::os::unix::fs::symlink(&path, &link).map_err(failed)?;
                return Ok(VolumeSource::Path(link));
            }
            Some(Fault::DeafExport) => {
                let socket = private_dir.join("deaf");
                // Whoever connects waits in line.
                self.deaf = Some(std::os::unix::net::UnixListener::bind(&socket).map_err(failed)?);
                return Ok(VolumeSource::NbdUnix { socket, export: "disk".to_owned() });
            }
            Some(Fault::PathForRandomRead) => return Ok(VolumeSource::Path(path)),
            _ => {}
        }
        let file = File::open(&path).map_err(failed)?;
        let size_bytes = file.metadata().map_err(failed)?.len();
        let export: Arc<dyn Export> = Arc::new(RawFile { file, size_bytes });
        let mut socket = private_dir.join(format!("{device}.sock"));
        if self.store.setup.has(Fault::SocketElsewhere) {
            socket = self.store.setup.dir.join(format!("{device}.sock"));
            let _ = fs::remove_file(&socket);
        }
        self.server = Some(Server::listen(&socket, [("disk", export)]).map_err(failed)?);
        Ok(VolumeSource::NbdUnix { socket, export: "disk".to_owned() })
    }
}

impl Drop for FileRestore {
    fn drop(&mut self) {
        let mut restored = self.store.setup.lock.lock().unwrap();
        // One of those of this archive.
        if let Some(at) = restored.iter().position(|name| *name == self.archive) {
            restored.swap_remove(at);
        }
    }
}

impl VmRestore for FileRestore {
    fn devices(&self) -> &[RestoreDevice] {
        &self.devices
    }

    fn volume_init<'a>(
        &'a mut self,
        device: &'a str,
        private_dir: &'a Path,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<VolumeSource>> {
        // Within the runtime, as the server needs it.
        Box::pin(async move {
            if self.store.setup.has(Fault::RestoreNeverAnswers) {
                std::future::pending::<()>().await;
            }
            self.offer(device, private_dir)
        })
    }

    fn volume_cleanup<'a>(
        &'a mut self,
        _device: &'a str,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<()>> {
        self.server = None;
        now(Ok(()))
    }

    fn cleanup<'a>(self: Box<Self>, _call: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a,
    {
        now(Ok(()))
    }
}
