// SPDX-License-Identifier: MIT OR Apache-2.0
//! Machines for the conformance kit whose disks are those of a real QEMU: each is a storage daemon with
//! the backup access extension, used as the backup of a VM uses it.
//!
//! ```text
//!  kit ─ changes ─► NBD export ─► filter ─► raw disk        provider ◄─ NBD export ◄─ snapshot, bitmap
//!                                    └────► fleecing image ─────────────────────────────┘
//! ```

mod daemon;
mod files;
mod trees;

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use provider_api::{Access, BitmapMode, BitmapRequest, BoxFuture, Volume, VolumeInfo};
use provider_kit::{Change, Machine, MachineMaker};
use provider_nbd::{Client, ZeroOptions};
use qmp_client::backup::{self, AccessInfo, BackupAccess, BitmapAction, Device, SetupRequest};
use qmp_client::commands::{BitmapRef, BlockdevAdd, BlockdevDel, NbdExportAdd, NbdServerStart};
use qmp_client::{Command, Error};
use serde_json::{Value, json};
use vzdump_core::tools::Tools;

pub(crate) use self::trees::RealTrees;

use self::daemon::Daemon;
use self::files::Files;
use crate::{HostError, chain};

/// The command all of this stands on.
const SETUP_COMMAND: &str = "backup-access-setup";
const TARGET: &str = "vzdump:kit";
/// QEMU ends the access this long after this process is gone.
const LEASE_S: u32 = 60;
/// For one request to the disks.
const NBD_LIMIT: Duration = Duration::from_secs(60);
/// How often a node in use is tried again: a closing client may hold it for a moment.
const DEL_ATTEMPTS: u32 = 25;
const DEL_DELAY: Duration = Duration::from_millis(200);
/// Zeroes in such units of a new disk take no space.
const HOLE_BYTES: usize = 4096;

/// Makes such machines.
#[derive(Debug)]
pub(crate) struct RealMaker {
    program: PathBuf,
    as_files: bool,
}

impl RealMaker {
    /// Finds the storage daemon and sees whether it has the extension. The machines offer their disks as files,
    /// or over NBD.
    pub(crate) async fn open(tools: &Tools, as_files: bool) -> Result<Self, HostError> {
        let program =
            tools.qemu_storage_daemon().map_err(|error| HostError::Settings(error.to_string()))?;
        if let Err(error) = daemon::remove_left() {
            tracing::warn!("Directories that earlier checks left cannot be removed: {error}");
        }
        let refused = |why: String| {
            HostError::Settings(format!(
                "A real QEMU cannot be used: '{}': {why}",
                program.display()
            ))
        };
        let daemon = Daemon::start(&program).await.map_err(refused)?;
        match daemon.session().require_command(SETUP_COMMAND).await {
            Ok(()) => Ok(Self { program, as_files }),
            Err(Error::MissingFeature { .. }) => Err(refused(format!(
                "it lacks the backup access extension (command {SETUP_COMMAND}). Build the patched \
                 QEMU with `cargo xtask qemu`, or name the directory of its programs by --qemu-bin."
            ))),
            Err(error) => Err(refused(chain(&error))),
        }
    }
}

impl MachineMaker for RealMaker {
    fn make<'a>(
        &'a self,
        disks: &'a [(String, Arc<Vec<u8>>)],
    ) -> BoxFuture<'a, Result<Box<dyn Machine>, String>> {
        Box::pin(async move {
            let files = self.as_files.then(|| self.program.clone());
            let machine = RealMachine::start(&self.program, files, disks).await;
            let machine = machine.map_err(|why| format!("QEMU's storage daemon: {why}"))?;
            Ok(Box::new(machine) as Box<dyn Machine>)
        })
    }

    fn offers_files(&self) -> bool {
        self.as_files
    }
}

#[derive(Debug)]
struct Disk {
    device: String,
    size_bytes: u64,
    /// What the guest's changes go through.
    guest: Client,
}

/// A daemon with disks.
#[derive(Debug)]
struct RealMachine {
    disks: Vec<Disk>,
    access: Option<BackupAccess>,
    /// Nodes of fleecing images.
    fleecing: Vec<String>,
    /// The daemon that offers the disks as files, if they are wanted so.
    files_program: Option<PathBuf>,
    files: Option<Files>,
    // The last one to be dropped: the others are within it.
    daemon: Daemon,
}

impl RealMachine {
    async fn start(
        program: &Path,
        files_program: Option<PathBuf>,
        disks: &[(String, Arc<Vec<u8>>)],
    ) -> Result<Self, String> {
        let daemon = Daemon::start(program).await?;
        let (disks_now, fleecing) = (Vec::new(), Vec::new());
        let mut machine =
            Self { disks: disks_now, access: None, fleecing, files_program, files: None, daemon };
        let socket = machine.daemon.path("nbd");
        let start = NbdServerStart::unix(&socket)
            .ok_or_else(|| format!("'{}' is not UTF-8, as QMP needs", socket.display()))?;
        machine.run(NbdServerStart { max_connections: Some(0), ..start }).await?;
        for (device, content) in disks {
            machine.add_disk(device, content).await?;
        }
        Ok(machine)
    }

    async fn run<C: Command>(&self, command: C) -> Result<C::Ok, String> {
        self.daemon
            .session()
            .execute(command)
            .await
            .map_err(|e| format!("{}: {}", C::NAME, chain(&e)))
    }

    async fn add_disk(&mut self, device: &str, content: &Arc<Vec<u8>>) -> Result<(), String> {
        let node = format!("disk{}", self.disks.len());
        self.add_image(&node, Arc::clone(content)).await?;
        let name = format!("guest-{node}");
        self.run(NbdExportAdd {
            id: name.clone(),
            node_name: node,
            name: Some(name.clone()),
            writable: true,
            bitmaps: Vec::new(),
            iothread: None,
        })
        .await?;
        let options = provider_nbd::Options { timeout: Some(NBD_LIMIT), ..Default::default() };
        let guest = Client::connect_unix(self.daemon.path("nbd"), &name, options).await;
        let guest = guest.map_err(|error| chain(&error))?;
        let size_bytes = content.len() as u64;
        self.disks.push(Disk { device: device.to_owned(), size_bytes, guest });
        Ok(())
    }

    /// Adds a raw image of this content. Its file is gone whatever happens to this process.
    async fn add_image(&self, node: &str, content: Arc<Vec<u8>>) -> Result<(), String> {
        let path = self.daemon.path(node);
        let filename = path.to_str().ok_or("the temporary directory is not UTF-8")?.to_owned();
        let failed = |error: std::io::Error| format!("'{}': {error}", path.display());
        let place = path.clone();
        let written = tokio::task::spawn_blocking(move || write_image(&place, &content)).await;
        written.map_err(|error| error.to_string())?.map_err(failed)?;
        let options = json!({
            "driver": "raw",
            "node-name": node,
            "discard": "unmap",
            "file": { "driver": "file", "filename": filename, "discard": "unmap" },
        });
        let Value::Object(options) = options else {
            unreachable!("json! with braces is an object")
        };
        let added = self.run(BlockdevAdd(options)).await;
        std::fs::remove_file(&path).map_err(failed)?;
        added.map(drop)
    }

    async fn change(&self, device: &str, change: &Change) -> Result<(), String> {
        let disk = self.disks.iter().find(|disk| disk.device == device);
        let guest = &disk.ok_or_else(|| format!("there is no disk '{device}'"))?.guest;
        let done = match change {
            Change::Write { offset, data } => {
                guest.write(*offset, Bytes::copy_from_slice(data), false).await
            }
            Change::Zero { offset, length } => {
                guest.write_zeroes(*offset, *length, ZeroOptions::default()).await
            }
            Change::Discard { offset, length } => discard(guest, *offset, *length).await,
        };
        done.map_err(|error| format!("a write to the disk '{device}': {}", chain(&error)))
    }

    async fn begin(&mut self, requests: &[BitmapRequest]) -> Result<Vec<Volume>, String> {
        if requests.len() != self.disks.len() {
            return Err("the number of requests is not that of the disks".to_owned());
        }
        if self.access.is_some() {
            return Err("the last point in time was not withdrawn".to_owned());
        }
        let mut devices = Vec::new();
        for (n, request) in requests.iter().enumerate() {
            let node = format!("fleecing{n}");
            let empty = Arc::new(vec![0; self.disks[n].size_bytes as usize]);
            self.fleecing.push(node.clone());
            self.add_image(&node, empty).await?;
            devices.push(device_of(format!("disk{n}"), node, request));
        }
        if devices.is_empty() {
            return Ok(Vec::new());
        }
        let mut setup = SetupRequest::new(TARGET, devices);
        setup.lease_s = Some(LEASE_S);
        let access = BackupAccess::setup(self.daemon.session().clone(), setup).await;
        let access = access.map_err(|error| format!("{SETUP_COMMAND}: {}", chain(&error)))?;
        let infos = access.infos().to_vec();
        self.access = Some(access);
        let mut volumes = self.offer(&infos).await?;
        if let Some(program) = &self.files_program {
            self.files = Some(Files::open(program, &mut volumes).await?);
        }
        Ok(volumes)
    }

    async fn offer(&self, infos: &[AccessInfo]) -> Result<Vec<Volume>, String> {
        let mut volumes = Vec::new();
        for (disk, info) in self.disks.iter().zip(infos) {
            let bitmap = info.bitmap_node_name.clone().zip(info.bitmap_name.clone());
            let bitmaps = bitmap.map(|(node, name)| BitmapRef::OnNode { node, name });
            self.run(NbdExportAdd {
                id: format!("snapshot-{}", disk.device),
                node_name: info.node_name.clone(),
                name: Some(disk.device.clone()),
                // For trims, by which the provider releases what it has stored; writes fail.
                writable: true,
                bitmaps: bitmaps.into_iter().collect(),
                iothread: None,
            })
            .await?;
            volumes.push(volume_of(disk, info, self.daemon.path("nbd")));
        }
        Ok(volumes)
    }

    /// Ends the access, which ends its exports, and removes the fleecing images.
    async fn end(&mut self, success: bool) -> Result<(), String> {
        if let Some(files) = self.files.take() {
            files.close().await;
        }
        let ended = match self.access.take() {
            None => Ok(()),
            Some(access) => {
                let ended = if success { access.commit().await } else { access.abort().await };
                ended
                    .map_err(|error| format!("backup-access-teardown: {}", chain(&error)))
                    .and_then(|result| match result.reason {
                        Some(reason) => Err(format!("the backup access broke: {reason}")),
                        None if !result.existed => Err("the backup access was gone".to_owned()),
                        None => Ok(()),
                    })
            }
        };
        for node in std::mem::take(&mut self.fleecing) {
            let removed = self.remove_node(&node).await;
            if ended.is_ok() {
                removed?;
            }
        }
        ended
    }

    async fn remove_node(&self, node: &str) -> Result<(), String> {
        let mut attempt = 1;
        loop {
            let command = BlockdevDel { node_name: node.to_owned() };
            match self.daemon.session().execute(command).await {
                Ok(_) => return Ok(()),
                Err(Error::Qmp { .. }) if attempt < DEL_ATTEMPTS => {
                    attempt += 1;
                    tokio::time::sleep(DEL_DELAY).await;
                }
                Err(error) => return Err(format!("blockdev-del: {}", chain(&error))),
            }
        }
    }
}

impl Machine for RealMachine {
    fn disks(&self) -> Vec<VolumeInfo> {
        let info = |disk: &Disk| VolumeInfo {
            device: disk.device.clone(),
            size_bytes: disk.size_bytes,
            volume_id: Some(format!("kit:{}", disk.device)),
        };
        self.disks.iter().map(info).collect()
    }

    fn apply<'a>(
        &'a mut self,
        device: &'a str,
        change: &'a Change,
    ) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(self.change(device, change))
    }

    fn freeze<'a>(
        &'a mut self,
        requests: &'a [BitmapRequest],
    ) -> BoxFuture<'a, Result<Vec<Volume>, String>> {
        Box::pin(self.begin(requests))
    }

    fn thaw(&mut self, success: bool) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(self.end(success))
    }
}

/// A new sparse file.
fn write_image(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let file = File::create_new(path)?;
    file.set_len(content.len() as u64)?;
    for (n, piece) in content.chunks(HOLE_BYTES).enumerate() {
        if piece.iter().any(|byte| *byte != 0) {
            file.write_all_at(piece, (n * HOLE_BYTES) as u64)?;
        }
    }
    Ok(())
}

/// What a discarded area reads as is not promised; the kit's truth are zeroes.
async fn discard(guest: &Client, offset: u64, length: u64) -> provider_nbd::Result<()> {
    guest.trim(offset, length).await?;
    let found = guest.read(offset, length as usize).await?;
    if found.iter().all(|byte| *byte == 0) {
        return Ok(());
    }
    guest.write_zeroes(offset, length, ZeroOptions::default()).await
}

fn device_of(node: String, fleecing: String, request: &BitmapRequest) -> Device {
    let mut device = Device::new(node);
    device.fleecing = Some(fleecing);
    device.bitmap_mode = Some(match request {
        BitmapRequest::None => backup::BitmapMode::None,
        BitmapRequest::New => backup::BitmapMode::New,
        BitmapRequest::Use { generation, readable } => {
            device.generation = Some(generation.clone());
            device.readable = Some(match readable {
                provider_api::Readable::Dirty => backup::Readable::Dirty,
                provider_api::Readable::All => backup::Readable::All,
            });
            backup::BitmapMode::Use
        }
    });
    device
}

fn volume_of(disk: &Disk, info: &AccessInfo, socket: PathBuf) -> Volume {
    let bitmap_mode = match (&info.bitmap_name, &info.bitmap_action) {
        (None, _) => BitmapMode::None,
        (Some(_), BitmapAction::Used) => BitmapMode::Reuse,
        (Some(_), _) => BitmapMode::New,
    };
    Volume {
        device: disk.device.clone(),
        size_bytes: info.size_bytes,
        access: Access::Nbd {
            socket,
            export: disk.device.clone(),
            bitmap: info.bitmap_name.clone(),
        },
        bitmap_mode,
        bitmap_action: info.bitmap_action.as_str().to_owned(),
        generation: info.generation.clone(),
        dirty_bytes: info.dirty_bytes,
    }
}
