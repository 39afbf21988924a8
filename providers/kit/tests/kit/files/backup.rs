// SPDX-License-Identifier: MIT OR Apache-2.0
//! Backups: each disk becomes a raw file, an increment begins as a copy of the last one.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use provider_api::{
    Access, BitmapMode, BitmapRequest, BoxFuture, Call, Committed, ContainerBackup,
    ContainerTransferred, DirtyRegions, Error, GuestBackup, GuestInfo, Job, Kind, Progress,
    Readable, RegionReader, Result, Transferred, Uuid, VmBackup, Volume, VolumeInfo,
};
use provider_nbd::{Client, Options, context};

use super::store::{Disk, Manifest, Store, checksum};
use super::{Fault, container, now, other};

/// Read at once.
const PIECE_BYTES: u64 = 256 << 10;

pub(crate) struct FileJob(pub(crate) Store);

impl Job for FileJob {
    fn start_guest<'a>(
        &'a mut self,
        guest: GuestInfo,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<Box<dyn GuestBackup>>> {
        let store = self.0.clone();
        let mut name = format!("files-{}-{}", guest.id, guest.start_time_s);
        if store.setup.has(Fault::NameOfGuest) {
            name = format!("{name}-{}", guest.name.as_deref().unwrap_or_default());
        }
        let tmp = store.temporary(&name);
        let made = fs::create_dir_all(&tmp).and_then(|()| fs::write(tmp.join("alive"), b""));
        now(made.map_err(|error| Error::io("Making a directory failed.", error)).map(|()| {
            let manifest = Manifest {
                kind: guest.kind,
                guest_id: guest.id,
                time_s: guest.start_time_s,
                number: 0,
                commit_id: None,
                disks: Vec::new(),
            };
            let backup: Box<dyn GuestBackup> =
                Box::new(FileBackup { store, name, manifest, late: None });
            backup
        }))
    }

    fn finish<'a>(self: Box<Self>, _call: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a,
    {
        now(Ok(()))
    }
}

struct FileBackup {
    store: Store,
    name: String,
    manifest: Manifest,
    /// A disk that is read once more in the commit.
    late: Option<Volume>,
}

impl Drop for FileBackup {
    fn drop(&mut self) {
        // Without this mark nobody is at work here any more.
        let _ = fs::remove_file(self.store.temporary(&self.name).join("alive"));
    }
}

/// An area that must be stored.
struct Area {
    offset: u64,
    length: u64,
    zero: bool,
}

/// How a disk is read.
enum Source {
    Nbd(Client),
    File { path: PathBuf, regions: Arc<dyn DirtyRegions> },
}

impl FileBackup {
    fn has(&self, fault: Fault) -> bool {
        self.store.setup.has(fault)
    }

    /// The newest archive with this disk in this size, and the generation.
    fn base(&self, device: &str, size_bytes: u64) -> Result<Option<(PathBuf, String)>> {
        let mut all = self.store.manifests()?;
        all.retain(|(_, manifest)| manifest.guest_id == self.manifest.guest_id);
        if !self.has(Fault::AsksForOldGeneration) {
            all.reverse();
        }
        for (name, manifest) in all {
            let disk = manifest.disks.into_iter().find(|d| d.device == device);
            if let Some(Disk { size_bytes: size, generation: Some(generation), .. }) = disk
                && size == size_bytes
            {
                let file = self.store.archives().join(name).join(format!("{device}.raw"));
                return Ok(Some((file, generation)));
            }
        }
        Ok(None)
    }

    fn plan(&self, volumes: &[VolumeInfo]) -> Result<Vec<BitmapRequest>> {
        let mut requests = Vec::new();
        for volume in volumes {
            requests.push(match self.base(&volume.device, volume.size_bytes)? {
                _ if self.has(Fault::NoIncrement) => BitmapRequest::New,
                Some(_) if self.has(Fault::HugeGeneration) => BitmapRequest::Use {
                    generation: "g".repeat(100_000),
                    readable: Readable::Dirty,
                },
                Some((_, generation)) => {
                    let all = self.store.setup.reads_all;
                    let readable = if all { Readable::All } else { Readable::Dirty };
                    BitmapRequest::Use { generation, readable }
                }
                None => BitmapRequest::New,
            });
        }
        if self.has(Fault::TooFewRequests) {
            requests.pop();
        }
        Ok(requests)
    }

    async fn backup(
        &mut self,
        backup: VmBackup,
        progress: &dyn Progress,
        call: &Call,
    ) -> Result<Transferred> {
        if self.has(Fault::Panics) {
            panic!("a bug of the provider");
        }
        if self.has(Fault::NoDisksFail) && backup.volumes.is_empty() {
            return Err(other("There are no disks."));
        }
        let tmp = self.store.temporary(&self.name);
        let failed = |error| Error::io("Writing a configuration failed.", error);
        fs::write(tmp.join("config"), &backup.config).map_err(failed)?;
        if let Some(firewall) = &backup.firewall {
            fs::write(tmp.join("firewall"), firewall).map_err(failed)?;
        }
        let mut moved = Transferred::default();
        for volume in &backup.volumes {
            let is_deaf = self.has(Fault::IgnoresCancel);
            let work = self.disk(volume, progress, &mut moved);
            if is_deaf {
                work.await?;
                continue;
            }
            tokio::select! {
                biased;
                () = call.cancel.cancelled() => {
                    return Err(Error::new(Kind::Cancelled, "It was cancelled."));
                }
                result = work => result?,
            };
        }
        if self.has(Fault::ReadsInCommit) {
            self.late = backup.volumes.first().cloned();
        }
        if self.has(Fault::EndlessBackup) {
            std::future::pending::<()>().await;
        }
        if self.has(Fault::WrongTotal) {
            moved.total_bytes += 1;
        }
        let early = [Fault::ListedEarly, Fault::CrashLeavesArchive];
        if early.iter().any(|fault| self.has(*fault)) {
            let text = serde_json::to_vec(&self.manifest).unwrap();
            fs::write(tmp.join("manifest"), text).map_err(failed)?;
        }
        Ok(moved)
    }

    async fn disk(
        &mut self,
        volume: &Volume,
        progress: &dyn Progress,
        moved: &mut Transferred,
    ) -> Result<()> {
        let is_full = self.store.setup.reads_all || self.has(Fault::IgnoresBitmap);
        let is_increment = volume.bitmap_mode == BitmapMode::Reuse && !is_full;
        let mut content = match self.base(&volume.device, volume.size_bytes)? {
            Some((base, _)) if is_increment => {
                fs::read(base).map_err(|error| Error::io("Reading the base failed.", error))?
            }
            _ => Vec::new(),
        };
        content.resize(usize::try_from(volume.size_bytes).unwrap(), 0);
        let source = self.open(volume).await?;
        let mut areas = match &source {
            Source::Nbd(client) => nbd_areas(client, volume, is_increment).await?,
            Source::File { regions, .. } => file_areas(regions, volume.size_bytes).await?,
        };
        let found: u64 = areas.iter().map(|area| area.length).sum();
        let expected = if is_increment { volume.dirty_bytes } else { Some(volume.size_bytes) };
        if Some(found) != expected && !self.has(Fault::DirtySumIgnored) {
            return Err(Error::new(Kind::Corrupt, format!("{found} bytes, not {expected:?}.")));
        }
        if self.has(Fault::SkipsLastArea) && is_increment {
            areas.pop();
        }
        if self.has(Fault::ReadsClean) && is_increment {
            let length = PIECE_BYTES.min(volume.size_bytes);
            let _ = self.read(&source, 0, length).await;
        }
        if self.has(Fault::ChunkRestZeroed) && is_increment {
            zero_chunks(&areas, &mut content);
        }
        let mut done = 0;
        for area in &areas {
            self.store_area(&source, area, &mut content, moved).await?;
            done += area.length;
            if self.has(Fault::ProgressPastEnd) {
                done = volume.size_bytes + 1;
            }
            if !self.has(Fault::SilentProgress) {
                progress.report(&volume.device, done, found.max(1), 0);
            }
        }
        moved.total_bytes += found;
        if self.has(Fault::ShortFile) {
            content.pop();
        }
        if self.has(Fault::SizeRounded) {
            content.resize(content.len().next_multiple_of(4096), 0);
        }
        let file = self.store.temporary(&self.name).join(format!("{}.raw", volume.device));
        fs::write(file, &content).map_err(|error| Error::io("Writing a disk failed.", error))?;
        self.manifest.disks.push(Disk {
            device: volume.device.clone(),
            size_bytes: volume.size_bytes,
            generation: volume.generation.clone(),
            checksum: checksum(&content),
        });
        Ok(())
    }

    async fn open(&self, volume: &Volume) -> Result<Source> {
        match &volume.access {
            Access::Nbd { socket, export, bitmap } => {
                let mut contexts = vec![context::BASE_ALLOCATION.to_owned()];
                contexts.extend(bitmap.as_deref().map(context::dirty_bitmap));
                let timeout = Some(Duration::from_secs(20));
                let options =
                    Options { contexts, whole_reads: true, timeout, ..Options::default() };
                let client = Client::connect_unix(socket, export, options).await;
                let client = client.map_err(|e| Error::with_source(Kind::Io, "No export.", e))?;
                if client.size_bytes() != volume.size_bytes && !self.has(Fault::SizeIgnored) {
                    return Err(Error::new(Kind::Corrupt, "The export has another size."));
                }
                Ok(Source::Nbd(client))
            }
            Access::File { path, regions } => {
                let size = fs::metadata(path).map_err(|e| Error::io("No file.", e))?.len();
                if size != volume.size_bytes {
                    return Err(Error::new(Kind::Corrupt, "The file has another size."));
                }
                Ok(Source::File { path: path.clone(), regions: Arc::clone(regions) })
            }
            _ => Err(other("An access that is not known.")),
        }
    }

    async fn read(&self, source: &Source, offset: u64, length: u64) -> Result<Vec<u8>> {
        let length = usize::try_from(length).unwrap();
        match source {
            Source::Nbd(client) => {
                let data = client.read(offset, length).await;
                let data = data.map_err(|e| Error::with_source(Kind::Io, "A read failed.", e))?;
                Ok(data.to_vec())
            }
            Source::File { path, .. } => read_direct(path.clone(), offset, length).await,
        }
    }

    async fn store_area(
        &self,
        source: &Source,
        area: &Area,
        content: &mut [u8],
        moved: &mut Transferred,
    ) -> Result<()> {
        let mut at = area.offset;
        let end = area.offset + area.length;
        while at < end {
            let length = PIECE_BYTES.min(end - at);
            let range = usize::try_from(at).unwrap()..usize::try_from(at + length).unwrap();
            if self.has(Fault::ReleasesUnread) {
                release(source, at, length).await;
            }
            if area.zero {
                if !self.has(Fault::ZeroesLost) {
                    content[range].fill(0);
                }
            } else {
                let data = match self.read(source, at, length).await {
                    Ok(data) => data,
                    Err(_) if self.has(Fault::SwallowsErrors) => vec![0; range.len()],
                    Err(error) => return Err(error),
                };
                moved.read_bytes += length;
                moved.written_bytes += length;
                content[range].copy_from_slice(&data);
            }
            release(source, at, length).await;
            if self.has(Fault::SameBytesAgain) && !area.zero {
                self.read(source, at, length).await.ok();
            }
            at += length;
        }
        Ok(())
    }
}

/// Begins each chunk that has something to store as zeroes, and not as what it was.
fn zero_chunks(areas: &[Area], content: &mut [u8]) {
    const CHUNK_BYTES: usize = 64 << 10;
    for area in areas {
        let begin = usize::try_from(area.offset).unwrap() / CHUNK_BYTES * CHUNK_BYTES;
        let end = usize::try_from(area.offset + area.length).unwrap();
        let end = end.next_multiple_of(CHUNK_BYTES).min(content.len());
        content[begin..end].fill(0);
    }
}

/// Gives up what was stored; a saving, so its failure does not matter.
async fn release(source: &Source, offset: u64, length: u64) {
    match source {
        Source::Nbd(client) => {
            let _ = client.trim(offset, length).await;
        }
        Source::File { path, .. } => {
            let path = path.clone();
            let punch = move || {
                use rustix::fs::{FallocateFlags, fallocate};
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let file = fs::File::options().write(true).open(path)?;
                std::io::Result::Ok(fallocate(file, flags, offset, length)?)
            };
            let _ = tokio::task::spawn_blocking(punch).await;
        }
    }
}

/// Reads past the page cache, whose read-ahead would meet areas that cannot be read.
async fn read_direct(path: PathBuf, offset: u64, length: usize) -> Result<Vec<u8>> {
    const UNIT: usize = 4096;
    let read = move || -> std::io::Result<Vec<u8>> {
        use std::os::unix::fs::OpenOptionsExt as _;
        let direct = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).unwrap();
        let file = fs::File::options().read(true).custom_flags(direct).open(path)?;
        let mut memory = vec![0; length.next_multiple_of(UNIT) + UNIT];
        let begin = memory.as_ptr().align_offset(UNIT);
        let whole = &mut memory[begin..begin + length.next_multiple_of(UNIT)];
        let mut done = 0;
        while done < length {
            match file.read_at(&mut whole[done..], offset + done as u64)? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                count => done += count,
            }
        }
        Ok(whole[..length].to_vec())
    };
    let read = tokio::task::spawn_blocking(read).await.map_err(|e| other(e.to_string()))?;
    read.map_err(|error| Error::io(format!("A read at {offset} failed."), error))
}

/// What must be stored of a disk over NBD: all, or what the bitmap marks.
async fn nbd_areas(client: &Client, volume: &Volume, is_increment: bool) -> Result<Vec<Area>> {
    let failed = |e| Error::with_source(Kind::Io, "Block status failed.", e);
    let mut parts = vec![(0, volume.size_bytes.min(client.size_bytes()))];
    if is_increment && let Access::Nbd { bitmap: Some(bitmap), .. } = &volume.access {
        parts.clear();
        let mut extents = client.extents(&context::dirty_bitmap(bitmap), 0, client.size_bytes());
        while let Some(extent) = extents.next().await.map_err(failed)? {
            if extent.flags & context::DIRTY != 0 {
                parts.push((extent.offset, extent.len));
            }
        }
    }
    let mut areas = Vec::new();
    for (offset, length) in parts {
        let mut extents = client.extents(context::BASE_ALLOCATION, offset, length);
        while let Some(extent) = extents.next().await.map_err(failed)? {
            let end = extent.end().min(offset + length);
            areas.push(Area {
                offset: extent.offset,
                length: end - extent.offset,
                zero: extent.flags & context::ZERO != 0,
            });
        }
    }
    Ok(areas)
}

async fn file_areas(regions: &Arc<dyn DirtyRegions>, size_bytes: u64) -> Result<Vec<Area>> {
    let mut reader = RegionReader::new(Arc::clone(regions), size_bytes);
    let mut areas = Vec::new();
    while let Some(page) = reader.next(&Call::default()).await? {
        areas.extend(page.into_iter().map(|region| Area {
            offset: region.offset,
            length: region.length_bytes,
            zero: region.zero,
        }));
    }
    Ok(areas)
}

impl GuestBackup for FileBackup {
    fn archive_name(&self) -> &str {
        &self.name
    }

    fn plan_volumes<'a>(
        &'a mut self,
        volumes: &'a [VolumeInfo],
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<Vec<BitmapRequest>>> {
        now(self.plan(volumes))
    }

    fn backup_vm<'a>(
        &'a mut self,
        backup: VmBackup,
        progress: &'a dyn Progress,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<Transferred>> {
        Box::pin(self.backup(backup, progress, call))
    }

    fn backup_container<'a>(
        &'a mut self,
        backup: ContainerBackup,
        _progress: &'a dyn Progress,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<ContainerTransferred>> {
        Box::pin(container::store(&self.store, self.store.temporary(&self.name), backup, call))
    }

    fn commit<'a>(self: Box<Self>, id: Uuid, _call: &'a Call) -> BoxFuture<'a, Result<Committed>>
    where
        Self: 'a,
    {
        Box::pin(async move {
            let (store, name, manifest) =
                (self.store.clone(), self.name.clone(), self.manifest.clone());
            if let Some(volume) = &self.late {
                self.open(volume).await?;
            }
            // A slow step, during which the host may die.
            let slow = Duration::from_millis(4);
            if store.setup.has(Fault::CommitsAnyway) {
                let late = tokio::spawn(async move {
                    tokio::time::sleep(slow * 5).await;
                    store.commit(&name, manifest, id).map(|()| name)
                });
                let archive = late.await.map_err(|e| other(e.to_string()))??;
                return Ok(Committed { archive, size_bytes: 1 });
            }
            tokio::time::sleep(slow).await;
            let size_bytes = manifest.disks.iter().map(|disk| disk.size_bytes).sum();
            store.commit(&name, manifest, id)?;
            Ok(Committed { archive: name, size_bytes })
        })
    }

    fn abort<'a>(self: Box<Self>, _why: &'a str, _call: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a,
    {
        let manifest = self.manifest.clone();
        if self.has(Fault::AbortLeavesArchive) {
            return now(self.store.commit(&self.name, manifest, Uuid::new_v4()));
        }
        let removed = fs::remove_dir_all(self.store.temporary(&self.name));
        now(removed.map_err(|error| Error::io("Removing failed.", error)))
    }
}
