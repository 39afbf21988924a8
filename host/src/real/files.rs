// SPDX-License-Identifier: MIT OR Apache-2.0
//! The disks of one point in time as files: a storage daemon of their own reads their NBD exports and offers
//! them by FUSE, as in the backup of a VM.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use provider_api::{Access, BitmapMode, Volume};
use qmp_client::Session;
use qmp_client::commands::{BlockExportDel, BlockdevAdd, RemoveMode};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use serde_json::{Value, json};
use vzdump_core::vm::backup::{ExportRegions, Offered};

use super::daemon::Daemon;
use crate::chain;

/// The files; they vanish when this is dropped.
#[derive(Debug)]
pub(super) struct Files {
    paths: Vec<PathBuf>,
    regions: Vec<Arc<ExportRegions>>,
    // The last one to be dropped: the files are its mounts.
    daemon: Daemon,
}

impl Files {
    /// Puts a file in the place of each volume's export.
    pub(super) async fn open(program: &Path, volumes: &mut [Volume]) -> Result<Self, String> {
        let daemon = Daemon::start(program).await?;
        let mut files = Self { paths: Vec::new(), regions: Vec::new(), daemon };
        for (number, volume) in volumes.iter_mut().enumerate() {
            files.add(number, volume).await?;
        }
        Ok(files)
    }

    async fn add(&mut self, number: usize, volume: &mut Volume) -> Result<(), String> {
        let Access::Nbd { socket, export, bitmap } = &volume.access else {
            return Err(format!("the disk {} is no export", volume.device));
        };
        let is_reused = volume.bitmap_mode == BitmapMode::Reuse;
        let offered = Offered {
            device: volume.device.clone(),
            export: export.clone(),
            size_bytes: volume.size_bytes,
            reused_bitmap: bitmap.clone().filter(|_| is_reused),
            wanted_bytes: volume.dirty_bytes.filter(|_| is_reused).unwrap_or(volume.size_bytes),
        };
        let path = self.daemon.path(&name(number));
        let failed = |error: std::io::Error| format!("'{}': {error}", path.display());
        File::create_new(&path).map_err(failed)?;
        self.paths.push(path.clone());
        let node = json!({
            "driver": "nbd",
            "node-name": name(number),
            // Without it a hole would be asked for as zeroes that take space.
            "discard": "unmap",
            "server": { "type": "unix", "path": utf8(socket)? },
            "export": export,
        });
        let file = json!({
            "type": "fuse",
            "id": name(number),
            "node-name": name(number),
            "mountpoint": utf8(&path)?,
            "writable": true,
            "growable": false,
            "allow-other": "off",
        });
        let Value::Object(node) = node else { unreachable!("json! with braces is an object") };
        let session: &Session = self.daemon.session();
        let said = |what: &str, error| format!("{what}: {}", chain(&error));
        session.execute(BlockdevAdd(node)).await.map_err(|e| said("blockdev-add", e))?;
        let added = session.execute_raw("block-export-add", file, None).await;
        added.map_err(|e| said("block-export-add", e))?;
        let size_bytes = path.metadata().map_err(failed)?.len();
        if size_bytes != volume.size_bytes {
            return Err(format!("the file of {} has {size_bytes} bytes", volume.device));
        }
        let regions = Arc::new(ExportRegions::new(socket.clone(), offered));
        self.regions.push(Arc::clone(&regions));
        volume.access = Access::File { path, regions };
        Ok(())
    }

    /// Withdraws the files in order.
    pub(super) async fn close(self) {
        for regions in &self.regions {
            regions.close().await;
        }
        for number in 0..self.paths.len() {
            let command = BlockExportDel { id: name(number), mode: Some(RemoveMode::Hard) };
            // One that is still open stays until the daemon ends, and loses its place when this is dropped.
            if let Err(error) = self.daemon.session().execute(command).await {
                tracing::debug!("a file of a checked disk stays open: {error}");
            }
        }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        self.paths.iter().for_each(|path| unmount_file(path));
    }
}

fn name(number: usize) -> String {
    format!("file{number}")
}

fn utf8(path: &Path) -> Result<&str, String> {
    path.to_str().ok_or_else(|| format!("'{}' is not UTF-8", path.display()))
}

/// Takes a mount away from a file, if there is one; whoever has it open keeps what is dead then.
pub(super) fn unmount_file(path: &Path) {
    match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
        // Without rights of its own the program that mounted it must be asked; it fails without a mount.
        Err(_) => {
            let mut command = Command::new("fusermount3");
            command.args(["-u", "-z", "-q"]).arg(path).stdin(Stdio::null());
            let _ = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
        }
    }
}
