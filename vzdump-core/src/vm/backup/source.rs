// SPDX-License-Identifier: MIT OR Apache-2.0
//! The frozen disks, offered over NBD on a socket that only the backup's owner can reach, or as files
//! behind it.

use std::path::Path;
use std::sync::Arc;

use provider_api::{Access, BitmapMode, VmBackup, Volume};
use provider_nbd::{Client, Options};
use qmp_client::Error;
use qmp_client::backup::{AccessInfo, BitmapAction};
use qmp_client::commands::{BitmapRef, BlockExportDel, NbdExportAdd, NbdServerStart, RemoveMode};

use super::disks::Disk;
use super::file::{self, FileDisk};
use super::regions::ExportRegions;
use super::relay::{Passing, Relay};
use super::tpm::Tpm;
use super::{Mechanism, NBD_TIMEOUT, Offered, Server, VmDriver, ops, short_id};
use crate::bandwidth::{Budget, GuestShare};
use crate::blocking;
use crate::guest::{GuestError, Task};
use crate::journal::{Entry, FileExport};
use crate::layout::{check_socket_path, make_private_dir};
use crate::temp_tree;

/// Name of the socket of QEMU's server.
const NBD_SOCKET: &str = "nbd";

impl VmDriver {
    pub(super) async fn do_open_source(&mut self, task: Task<'_>) -> Result<(), GuestError> {
        self.log_infos(task);
        let session = self.session()?.clone();
        // Short, because the path of a socket is limited to 107 bytes.
        let dir = self.layout.vm_run_dir(self.id).join(format!("b-{}", short_id()));
        let socket = dir.join(NBD_SOCKET);
        check_socket_path(&socket).map_err(GuestError::at("choose a socket for the disks"))?;
        task.journal.append(Entry::Directory { path: dir.clone() }).await?;
        self.run_dir = Some(dir.clone());
        make_private_dir(&dir).map_err(GuestError::at("make a directory for a socket"))?;
        let exports = self.export_ids();
        task.journal.append(Entry::NbdServer { socket: socket.clone(), exports }).await?;
        let start = NbdServerStart::unix(&socket).ok_or_else(|| {
            GuestError::Refused(format!("'{}' is not UTF-8, as QMP needs.", socket.display()))
        })?;
        self.server = Some(Server { socket: socket.clone(), is_started: false });
        let started = session.execute(start).await;
        self.server = match &started {
            Ok(_) => Some(Server { socket, is_started: true }),
            // The one that runs, if any, is somebody else's.
            Err(Error::Qmp { .. }) => None,
            Err(_) => Some(Server { socket, is_started: false }),
        };
        started.map_err(GuestError::at(format!("start the NBD server of VM {}", self.id)))?;
        for (disk, info) in self.disks.iter().zip(&self.infos) {
            session
                .execute(export_of(disk, info))
                .await
                .map_err(GuestError::at(format!("export the disk '{}'", disk.key)))?;
        }
        self.open_relays(&dir).map_err(GuestError::at("open a socket for a disk"))?;
        if let Some(tpm) = &mut self.tpm {
            tpm.serve(&dir).map_err(GuestError::at("open a socket for the TPM's state"))?;
        }
        if self.mechanism == Mechanism::File {
            self.open_files(&dir, task).await?;
        }
        self.is_open = true;
        Ok(())
    }

    fn open_relays(&mut self, dir: &Path) -> std::io::Result<()> {
        let share = self.options.bandwidth.as_ref().map(Budget::guest);
        for index in 0..self.disks.len() {
            let passing = Passing {
                share: share.as_ref().map(GuestShare::disk),
                trims_zeroes: self.mechanism == Mechanism::File,
            };
            if passing.does_something() {
                let own = dir.join(format!("disk{index}"));
                self.relays.push(Relay::open(own, dir.join(NBD_SOCKET), passing)?);
            }
        }
        Ok(())
    }

    /// Offers all disks as files, beside the sockets.
    async fn open_files(&mut self, dir: &Path, task: Task<'_>) -> Result<(), GuestError> {
        for (index, (disk, info)) in self.disks.iter().zip(&self.infos).enumerate() {
            let socket = self.relays[index].socket().to_owned();
            let export = self.journal_file(dir, index, task).await?;
            self.file_exports.push(export.clone());
            let file =
                FileDisk::open(&self.tools, export, &socket, &disk.key, disk.size_bytes).await?;
            self.files.push(file);
            let regions = ExportRegions::new(dir.join(NBD_SOCKET), offered(disk, info)?);
            self.regions.push(Arc::new(regions));
        }
        let Some((tpm, server)) = self.tpm.as_ref().and_then(|tpm| Some((tpm, tpm.server()?)))
        else {
            return Ok(());
        };
        let (socket, offered) = (server.socket().to_owned(), tpm.offered());
        let export = self.journal_file(dir, self.disks.len(), task).await?;
        self.file_exports.push(export.clone());
        let (name, size_bytes) = (&offered.device, offered.size_bytes);
        self.files.push(FileDisk::open(&self.tools, export, &socket, name, size_bytes).await?);
        self.regions.push(Arc::new(ExportRegions::new(socket, offered)));
        Ok(())
    }

    async fn journal_file(
        &self,
        dir: &Path,
        index: usize,
        task: Task<'_>,
    ) -> Result<FileExport, GuestError> {
        let mark = format!("vzdump-{}-{}-{index}", self.id, short_id());
        let export = FileExport { mark, path: dir.join(format!("file{index}")) };
        task.journal.append(Entry::FileExport(export.clone())).await?;
        Ok(export)
    }

    /// Ends the daemons of all files that were begun, and removes their mounts.
    async fn withdraw_files(&mut self) -> Result<(), GuestError> {
        for regions in std::mem::take(&mut self.regions) {
            regions.close().await;
        }
        while let Some(export) = self.file_exports.last() {
            let doing = format!("withdraw the file '{}'", export.path.display());
            file::withdraw(export).await.map_err(GuestError::at(doing))?;
            self.file_exports.pop();
        }
        self.files.clear();
        Ok(())
    }

    fn export_ids(&self) -> Vec<String> {
        self.disks.iter().map(Disk::export_id).collect()
    }

    pub(super) async fn do_close_source(&mut self) -> Result<(), GuestError> {
        self.is_open = false;
        self.withdraw_files().await?;
        self.relays.clear();
        self.tpm.iter_mut().for_each(Tpm::close);
        // The directory stays with a server that stays: its socket tells the recovery whose it is.
        self.stop_server().await?;
        self.remove_run_dir().await
    }

    /// Withdraws the disks from the provider, has QEMU forget all old data, and closes the exports, so
    /// that the guest pays for nothing while the commit is under way. The access stays: it keeps the
    /// bitmaps until the commit is known.
    pub(super) async fn do_drop_data(&mut self, task: Task<'_>) -> Result<(), GuestError> {
        if !self.is_open {
            return Ok(());
        }
        self.is_open = false;
        self.withdraw_files().await?;
        self.relays.clear();
        self.tpm.iter_mut().for_each(Tpm::close);
        let server = self.server.as_ref().map(|server| server.socket.clone());
        if let Some(socket) = server {
            for disk in &self.disks {
                release_all(&socket, disk).await.map_err(GuestError::at(format!(
                    "drop the old data of the disk '{}'",
                    disk.key
                )))?;
            }
        }
        let session = self.session()?.clone();
        for id in self.export_ids() {
            let mode = Some(RemoveMode::Hard);
            session
                .execute(BlockExportDel { id: id.clone(), mode })
                .await
                .map_err(GuestError::at(format!("close the export '{id}'")))?;
        }
        self.stop_server().await?;
        self.remove_run_dir().await?;
        task.sink.info("the provider has read everything; old data is dropped before the commit");
        Ok(())
    }

    async fn remove_run_dir(&mut self) -> Result<(), GuestError> {
        let Some(dir) = self.run_dir.take() else {
            return Ok(());
        };
        let doing = format!("remove the directory '{}'", dir.display());
        blocking::run(move || temp_tree::remove(&dir)).await.map_err(GuestError::at(doing))
    }

    async fn stop_server(&mut self) -> Result<(), GuestError> {
        let Some(server) = self.server.take() else {
            return Ok(());
        };
        let Some(session) = self.session_if_alive().await? else {
            return Ok(());
        };
        let stop = async {
            let is_ours = server.is_started
                || ops::owns_nbd(&session, &server.socket, &self.export_ids())
                    .await
                    .map_err(GuestError::at("find out whose the NBD server is"))?;
            if is_ours { ops::stop_nbd(&session).await } else { Ok(()) }
        };
        match stop.await {
            Err(_) if session.is_closed() && self.is_ending().await => Ok(()),
            other => other,
        }
    }

    fn tpm_volume(&self) -> Option<Volume> {
        let tpm = self.tpm.as_ref()?;
        let index = self.disks.len();
        let access = match (self.files.get(index), self.regions.get(index)) {
            (Some(file), Some(regions)) => {
                let regions = Arc::clone(regions);
                Access::File { path: file.path().to_owned(), regions }
            }
            _ => tpm.nbd_access()?,
        };
        Some(Tpm::volume(access))
    }

    pub(super) fn make_source(&self) -> VmBackup {
        let mut volumes = Vec::new();
        if let Some(Server { socket, .. }) = self.server.as_ref().filter(|_| self.is_open) {
            let pairs = self.disks.iter().zip(&self.infos).enumerate();
            let offered = pairs.map(|(index, (disk, info))| {
                let access = match (self.files.get(index), self.regions.get(index)) {
                    (Some(file), Some(regions)) => {
                        let regions = Arc::clone(regions);
                        Access::File { path: file.path().to_owned(), regions }
                    }
                    _ => Access::Nbd {
                        socket: self
                            .relays
                            .get(index)
                            .map_or(socket.as_path(), Relay::socket)
                            .to_owned(),
                        export: disk.key.clone(),
                        bitmap: info.bitmap_name.clone(),
                    },
                };
                volume_of(disk, info, access)
            });
            volumes = offered.collect();
            volumes.extend(self.tpm_volume());
        }
        let config = self.config.for_backup().to_string().into_bytes();
        VmBackup { config, firewall: self.firewall.clone(), volumes }
    }
}

/// Tells the snapshot of a disk that nothing of it is needed any more.
async fn release_all(socket: &Path, disk: &Disk) -> provider_nbd::Result<()> {
    let options = Options { timeout: Some(NBD_TIMEOUT), ..Options::default() };
    let client = Client::connect_unix(socket, &disk.key, options).await?;
    client.trim(0, disk.size_bytes).await?;
    client.disconnect().await
}

fn export_of(disk: &Disk, info: &AccessInfo) -> NbdExportAdd {
    let bitmap = info.bitmap_node_name.clone().zip(info.bitmap_name.clone());
    NbdExportAdd {
        id: disk.export_id(),
        node_name: info.node_name.clone(),
        name: Some(disk.key.clone()),
        // For trims, by which the provider releases what it has stored; writes fail.
        writable: true,
        bitmaps: bitmap.map(|(node, name)| BitmapRef::OnNode { node, name }).into_iter().collect(),
        iothread: None,
    }
}

fn bitmap_mode(info: &AccessInfo) -> BitmapMode {
    match (&info.bitmap_name, &info.bitmap_action) {
        (None, _) => BitmapMode::None,
        (Some(_), BitmapAction::Used) => BitmapMode::Reuse,
        // Whatever a newer QEMU did: copying everything is never wrong.
        (Some(_), _) => BitmapMode::New,
    }
}

fn volume_of(disk: &Disk, info: &AccessInfo, access: Access) -> Volume {
    Volume {
        device: disk.key.clone(),
        size_bytes: disk.size_bytes,
        access,
        bitmap_mode: bitmap_mode(info),
        bitmap_action: info.bitmap_action.as_str().to_owned(),
        generation: info.generation.clone(),
        dirty_bytes: info.dirty_bytes,
    }
}

fn offered(disk: &Disk, info: &AccessInfo) -> Result<Offered, GuestError> {
    let reused_bitmap = info.bitmap_name.clone().filter(|_| bitmap_mode(info) == BitmapMode::Reuse);
    let wanted_bytes = match (&reused_bitmap, info.dirty_bytes) {
        (None, _) => disk.size_bytes,
        (Some(_), Some(dirty_bytes)) => dirty_bytes,
        (Some(_), None) => {
            return Err(GuestError::Refused(format!(
                "QEMU does not say how much of the disk '{}' has changed.",
                disk.key
            )));
        }
    };
    Ok(Offered {
        device: disk.key.clone(),
        export: disk.key.clone(),
        size_bytes: disk.size_bytes,
        reused_bitmap,
        wanted_bytes,
    })
}
