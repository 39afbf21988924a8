// SPDX-License-Identifier: MIT OR Apache-2.0
//! A virtual machine as the kit sees it: disks that change, and a point in time that is offered.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use provider_api::{
    Access, BitmapMode, BitmapRequest, BoxFuture, Uuid, VmBackup, Volume, VolumeInfo,
};
use provider_nbd::server::{Export, Server};

use crate::disk::{Disk, marked_bytes};
use crate::fault::{Checked, Fault};
use crate::file::FileOffer;
use crate::random::Random;
use crate::snapshot::{BITMAP, Seen, Shared, Snapshot, Trouble};

/// A change that a guest makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Data is written.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Vec<u8>,
    },
    /// Zeroes are written.
    Zero {
        /// Where.
        offset: u64,
        /// How many bytes.
        length: u64,
    },
    /// An area is discarded; it reads as zeroes then.
    Discard {
        /// Where.
        offset: u64,
        /// How many bytes.
        length: u64,
    },
}

impl Change {
    /// Offset and length in bytes.
    #[must_use]
    pub fn range(&self) -> (u64, u64) {
        match self {
            Self::Write { offset, data } => (*offset, data.len() as u64),
            Self::Zero { offset, length } | Self::Discard { offset, length } => (*offset, *length),
        }
    }

    pub(crate) fn apply(&self, content: &mut [u8]) {
        let (offset, length) = self.range();
        let area = &mut content[offset as usize..(offset + length) as usize];
        match self {
            Self::Write { data, .. } => area.copy_from_slice(data),
            Self::Zero { .. } | Self::Discard { .. } => area.fill(0),
        }
    }
}

/// Something that runs disks with dirty bitmaps: the kit's simulation, or a real QEMU.
pub trait Machine: Send + Sync {
    /// Its disks, in their order.
    fn disks(&self) -> Vec<VolumeInfo>;

    /// Changes a disk.
    fn apply<'a>(
        &'a mut self,
        device: &'a str,
        change: &'a Change,
    ) -> BoxFuture<'a, Result<(), String>>;

    /// Makes a point in time of all disks and offers it.
    fn freeze<'a>(
        &'a mut self,
        requests: &'a [BitmapRequest],
    ) -> BoxFuture<'a, Result<Vec<Volume>, String>>;

    /// Withdraws the point in time; after a success the bitmaps begin at it.
    fn thaw(&mut self, success: bool) -> BoxFuture<'_, Result<(), String>>;
}

/// Makes machines with disks of a content.
pub trait MachineMaker: Send + Sync {
    /// A machine with these disks: device names and content.
    fn make<'a>(
        &'a self,
        disks: &'a [(String, Arc<Vec<u8>>)],
    ) -> BoxFuture<'a, Result<Box<dyn Machine>, String>>;

    /// Whether their disks are offered as files, and not over NBD.
    fn offers_files(&self) -> bool {
        false
    }
}

/// How the simulation offers its disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Offer {
    Nbd,
    /// As files; with QEMU's storage daemon, if there is one, they fail where they must.
    File {
        storage_daemon: Option<PathBuf>,
    },
}

impl Offer {
    /// Whether requests of the disks can be made to fail: plain files know of none.
    pub(crate) fn can_have_trouble(&self) -> bool {
        !matches!(self, Self::File { storage_daemon: None })
    }
}

/// The simulation.
pub(crate) struct SimMachine {
    disks: Vec<Disk>,
    dir: PathBuf,
    offer: Offer,
    trouble: Trouble,
    shared: Arc<Shared>,
    server: Option<Server>,
    files: Option<FileOffer>,
    /// A lie about the number of dirty bytes, to see whether it is noticed.
    pub(crate) dirty_lie: Option<i64>,
    /// A lie about the size.
    pub(crate) size_lie: Option<i64>,
}

impl SimMachine {
    /// `dir` is private to it and exists.
    pub(crate) fn new(disks: &[(String, Arc<Vec<u8>>)], dir: PathBuf, offer: Offer) -> Self {
        let disks = disks.iter().map(|(device, content)| Disk::new(device, content.to_vec()));
        Self {
            disks: disks.collect(),
            dir,
            offer,
            trouble: Trouble::default(),
            shared: Arc::default(),
            server: None,
            files: None,
            dirty_lie: None,
            size_lie: None,
        }
    }

    /// For the next point in time.
    pub(crate) fn set_trouble(&mut self, trouble: Trouble) {
        self.trouble = trouble;
    }

    /// What was done with the last point in time.
    pub(crate) fn seen(&self) -> Seen {
        self.shared.seen()
    }

    /// Forgets the history of all bitmaps.
    pub(crate) fn invalidate(&mut self) {
        self.disks.iter_mut().for_each(Disk::invalidate);
    }

    /// Bitmaps of this granularity, before the first backup.
    pub(crate) fn set_granule(&mut self, granule_bytes: u64) {
        self.disks.iter_mut().for_each(|disk| disk.set_granule(granule_bytes));
    }

    /// Takes the disks away from the provider; what counts for the next increment is not decided by that.
    pub(crate) async fn withdraw(&mut self) {
        if let Some(files) = self.files.take() {
            files.close().await;
        }
        self.server = None;
    }

    /// Replaces the disks; those of the same name and size keep their bitmaps.
    pub(crate) fn replace_disks(&mut self, disks: &[(String, Arc<Vec<u8>>)]) {
        let mut old = std::mem::take(&mut self.disks);
        for (device, content) in disks {
            let same = old
                .iter()
                .position(|o| o.device == *device && o.size_bytes() == content.len() as u64);
            let disk = same.map(|at| old.swap_remove(at));
            self.disks.push(disk.unwrap_or_else(|| Disk::new(device, content.to_vec())));
        }
    }

    async fn offer(&mut self, requests: &[BitmapRequest]) -> Result<Vec<Volume>, String> {
        if requests.len() != self.disks.len() {
            return Err("the number of requests is not that of the disks".to_owned());
        }
        let socket = self.dir.join(format!("{}.sock", &Uuid::new_v4().simple().to_string()[..8]));
        self.shared = Shared::new(std::mem::take(&mut self.trouble));
        let is_file = self.offer != Offer::Nbd;
        let mut volumes = Vec::new();
        let mut exports: Vec<(String, Arc<dyn Export>)> = Vec::new();
        let mut snapshots = Vec::new();
        for (disk, request) in self.disks.iter_mut().zip(requests) {
            let frozen = disk.freeze(request);
            let marked =
                |dirty: &Vec<bool>| marked_bytes(dirty, frozen.granule_bytes, disk.size_bytes());
            let dirty = frozen.dirty.as_ref().map(marked);
            let lie = |lie: Option<i64>, truth: u64| truth.saturating_add_signed(lie.unwrap_or(0));
            volumes.push(Volume {
                device: disk.device.clone(),
                size_bytes: lie(self.size_lie, disk.size_bytes()),
                access: Access::Nbd {
                    socket: socket.clone(),
                    export: disk.device.clone(),
                    bitmap: (frozen.mode != BitmapMode::None).then(|| BITMAP.to_owned()),
                },
                bitmap_mode: frozen.mode,
                bitmap_action: frozen.action.to_owned(),
                generation: frozen.generation.clone(),
                dirty_bytes: dirty.map(|dirty| lie(self.dirty_lie, dirty)),
            });
            let shared = Arc::clone(&self.shared);
            let snapshot = Snapshot::new(&disk.device, frozen.clone(), shared, is_file);
            let snapshot = Arc::new(snapshot);
            exports.push((disk.device.clone(), Arc::clone(&snapshot) as Arc<dyn Export>));
            snapshots.push(frozen);
        }
        let server = Server::listen(&socket, exports)
            .map_err(|error| format!("cannot listen at {}: {error}", socket.display()))?;
        self.server = Some(server);
        if let Offer::File { storage_daemon } = &self.offer {
            let daemon = storage_daemon.as_deref();
            let files = FileOffer::open(&self.dir, &socket, daemon, &snapshots, &mut volumes);
            self.files = Some(files.await?);
        }
        Ok(volumes)
    }
}

impl Machine for SimMachine {
    fn disks(&self) -> Vec<VolumeInfo> {
        let info = |disk: &Disk| VolumeInfo {
            device: disk.device.clone(),
            size_bytes: disk.size_bytes(),
            volume_id: Some(format!("kit:{}", disk.device)),
        };
        self.disks.iter().map(info).collect()
    }

    fn apply<'a>(
        &'a mut self,
        device: &'a str,
        change: &'a Change,
    ) -> BoxFuture<'a, Result<(), String>> {
        if let Some(disk) = self.disks.iter_mut().find(|disk| disk.device == device) {
            disk.apply(change);
        }
        Box::pin(std::future::ready(Ok(())))
    }

    fn freeze<'a>(
        &'a mut self,
        requests: &'a [BitmapRequest],
    ) -> BoxFuture<'a, Result<Vec<Volume>, String>> {
        Box::pin(self.offer(requests))
    }

    fn thaw(&mut self, success: bool) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move {
            self.withdraw().await;
            self.disks.iter_mut().for_each(|disk| disk.thaw(success));
            Ok(())
        })
    }
}

/// Either kind of machine; only the simulation can be made to fail.
pub(crate) enum AnyMachine {
    Sim(Box<SimMachine>),
    Other(Box<dyn Machine>),
}

impl AnyMachine {
    pub(crate) fn as_dyn(&mut self) -> &mut dyn Machine {
        match self {
            Self::Sim(machine) => machine.as_mut(),
            Self::Other(machine) => machine.as_mut(),
        }
    }
}

/// The content of a disk at some time.
pub(crate) type Truth = Vec<(String, Arc<Vec<u8>>)>;

/// A virtual machine with the truth about its disks.
pub(crate) struct Vm {
    pub(crate) id: u32,
    pub(crate) name: Option<String>,
    pub(crate) config: Vec<u8>,
    pub(crate) firewall: Option<Vec<u8>>,
    pub(crate) truth: Truth,
    pub(crate) machine: AnyMachine,
    pub(crate) random: Random,
    /// Whether the guest goes on writing during backups.
    pub(crate) is_busy: bool,
}

impl Vm {
    /// What is given to the provider beside the volumes.
    pub(crate) fn backup(&self, volumes: Vec<Volume>) -> VmBackup {
        VmBackup { config: self.config.clone(), firewall: self.firewall.clone(), volumes }
    }

    /// The simulation; the checks that need it are not run without.
    pub(crate) fn sim(&mut self) -> Checked<&mut SimMachine> {
        match &mut self.machine {
            AnyMachine::Sim(machine) => Ok(machine),
            AnyMachine::Other(_) => Err(Fault::new("This check needs the kit's own disks.")),
        }
    }

    pub(crate) async fn change(&mut self, device: &str, change: &Change) -> Checked {
        if let Some((_, content)) = self.truth.iter_mut().find(|(name, _)| name == device) {
            change.apply(Arc::make_mut(content).as_mut_slice());
        }
        self.machine.as_dyn().apply(device, change).await.map_err(Fault::new)
    }

    /// So many random changes on each disk.
    pub(crate) async fn scribble(&mut self, count: usize) -> Checked {
        let disks: Vec<_> =
            self.truth.iter().map(|(name, content)| (name.clone(), content.len() as u64)).collect();
        for (device, size_bytes) in disks {
            for _ in 0..count {
                let change = random_change(&mut self.random, size_bytes);
                self.change(&device, &change).await?;
            }
        }
        Ok(())
    }
}

/// A change in units of 512 bytes: mostly data, also zeroes and discards.
fn random_change(random: &mut Random, size_bytes: u64) -> Change {
    let sectors = size_bytes / 512;
    let first = random.below(sectors);
    let most = (sectors - first).min(256);
    let (offset, length) = (first * 512, (1 + random.below(most)) * 512);
    match random.below(4) {
        0 => Change::Zero { offset, length },
        1 => Change::Discard { offset, length },
        _ => Change::Write { offset, data: random.bytes(length as usize) },
    }
}

/// The first content of a disk: data, repeated bytes, and holes.
pub(crate) fn fresh_content(random: &mut Random, size_bytes: u64) -> Vec<u8> {
    let mut content = vec![0; size_bytes as usize];
    for piece in content.chunks_mut(32 << 10) {
        match random.below(4) {
            0 | 1 => {}
            2 => piece.fill(random.number() as u8),
            _ => piece.copy_from_slice(&random.bytes(piece.len())),
        }
    }
    // So that a disk is never all zero, however small it is, and both its ends matter.
    let end = content.len() - 8;
    content[..8].copy_from_slice(b"kit\x01disk");
    content[end..].copy_from_slice(b"the end.");
    content
}

/// A place for sockets, short enough for their paths.
pub(crate) fn private_dir(parent: &Path, name: &str) -> Checked<PathBuf> {
    let dir = parent.join(name);
    std::fs::create_dir(&dir)
        .map_err(|error| Fault::new(format!("Cannot make {}: {error}.", dir.display())))?;
    Ok(dir)
}
