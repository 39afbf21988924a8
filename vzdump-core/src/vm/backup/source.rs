// SPDX-License-Identifier: MIT OR Apache-2.0
//! The frozen disks, offered over NBD on a socket that only the backup's owner can reach.

use std::path::PathBuf;

use provider_api::{Access, BitmapMode, VmBackup, Volume};
use qmp_client::Error;
use qmp_client::backup::{AccessInfo, BitmapAction};
use qmp_client::commands::{BitmapRef, NbdExportAdd, NbdServerStart};

use super::disks::Disk;
use super::limited::LimitedDisk;
use super::{Server, VmDriver, ops, short_id};
use crate::blocking;
use crate::guest::{GuestError, Task};
use crate::journal::Entry;
use crate::layout::{check_socket_path, make_private_dir};

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
        if let Some(budget) = &self.options.bandwidth {
            let share = budget.guest();
            for index in 0..self.disks.len() {
                let own = dir.join(format!("lim{index}"));
                let disk = LimitedDisk::open(own, dir.join(NBD_SOCKET), share.disk());
                self.limited.push(disk.map_err(GuestError::at("open a socket for a disk"))?);
            }
        }
        self.is_open = true;
        Ok(())
    }

    fn export_ids(&self) -> Vec<String> {
        self.disks.iter().map(Disk::export_id).collect()
    }

    pub(super) async fn do_close_source(&mut self) -> Result<(), GuestError> {
        self.is_open = false;
        self.limited.clear();
        // The directory stays with a server that stays: its socket tells the recovery whose it is.
        self.stop_server().await?;
        remove_dir(self.run_dir.take()).await
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

    pub(super) fn make_source(&self) -> VmBackup {
        let mut volumes = Vec::new();
        if let Some(Server { socket, .. }) = self.server.as_ref().filter(|_| self.is_open) {
            let pairs = self.disks.iter().zip(&self.infos).enumerate();
            let offered = pairs.map(|(index, (disk, info))| {
                let limited = self.limited.get(index).map(LimitedDisk::socket);
                volume_of(disk, info, limited.unwrap_or(socket).to_owned())
            });
            volumes = offered.collect();
        }
        let config = self.config.for_backup().to_string().into_bytes();
        VmBackup { config, firewall: self.firewall.clone(), volumes }
    }
}

/// Removes a private directory; one that is not there is no error.
async fn remove_dir(dir: Option<PathBuf>) -> Result<(), GuestError> {
    let Some(dir) = dir else {
        return Ok(());
    };
    let doing = format!("remove the directory '{}'", dir.display());
    match blocking::run(move || std::fs::remove_dir_all(dir)).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(GuestError::step(doing, error))
        }
        _ => Ok(()),
    }
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

fn volume_of(disk: &Disk, info: &AccessInfo, socket: PathBuf) -> Volume {
    let bitmap = info.bitmap_name.clone();
    let bitmap_mode = match (&bitmap, &info.bitmap_action) {
        (None, _) => BitmapMode::None,
        (Some(_), BitmapAction::Used) => BitmapMode::Reuse,
        // Whatever a newer QEMU did: copying everything is never wrong.
        (Some(_), _) => BitmapMode::New,
    };
    Volume {
        device: disk.key.clone(),
        size_bytes: disk.size_bytes,
        access: Access::Nbd { socket, export: disk.key.clone(), bitmap },
        bitmap_mode,
        bitmap_action: info.bitmap_action.as_str().to_owned(),
        generation: info.generation.clone(),
        dirty_bytes: info.dirty_bytes,
    }
}
