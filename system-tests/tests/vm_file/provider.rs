// SPDX-License-Identifier: MIT OR Apache-2.0
//! A small provider that keeps whole raw images, one folder for each archive. It reads files, as a product
//! would that knows nothing of NBD.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use provider_api::{
    Access, Archive, BitmapMode, BitmapRequest, BoxFuture, Call, Capabilities, CommitOutcome,
    Committed, Description, Error, GuestBackup, GuestConfig, GuestInfo, GuestKind, Job, JobInfo,
    Kind, Progress, Provider, Readable, Region, RegionReader, RestoreDevice, Result, Status,
    Transferred, Uuid, VmBackup, VmRestore, Volume, VolumeInfo, VolumeSource,
};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

/// Requests past the page cache are multiples of it.
const BLOCK_BYTES: usize = 4096;
const READ_BYTES: u64 = 256 << 10;
const MANIFEST: &str = "manifest.json";

#[derive(Debug, Clone, Serialize, Deserialize)]
struct StoredDisk {
    device: String,
    size_bytes: u64,
    generation: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Manifest {
    id: Uuid,
    name: String,
    time_s: i64,
    config: Vec<u8>,
    disks: Vec<StoredDisk>,
}

/// A moment at which the provider stands still until it is told to go on.
#[derive(Debug, Default)]
pub struct Pause {
    pub reached: Notify,
    pub go_on: Notify,
}

impl Pause {
    async fn stand(pause: Option<&Arc<Self>>) {
        if let Some(pause) = pause {
            pause.reached.notify_one();
            pause.go_on.notified().await;
        }
    }
}

/// What the provider does differently.
#[derive(Debug, Clone, Default)]
pub struct Behaviour {
    pub slow_commit: bool,
    pub readable: Readable,
    /// Reads all of each disk, whatever the bitmap says.
    pub reads_all: bool,
    /// The commit fails before anything is durable.
    pub commit_fails: bool,
    /// Before the first byte is read, with the files open.
    pub before_copy: Option<Arc<Pause>>,
    pub in_commit: Option<Arc<Pause>>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    behaviour: Mutex<Behaviour>,
}

#[derive(Debug, Clone)]
pub struct FileProvider(Arc<Inner>);

impl FileProvider {
    pub fn new(dir: &Path, behaviour: Behaviour) -> Self {
        fs::create_dir_all(dir).unwrap();
        Self(Arc::new(Inner { dir: dir.to_owned(), behaviour: Mutex::new(behaviour) }))
    }

    pub fn behave(&self, behaviour: Behaviour) {
        *self.0.behaviour.lock().unwrap() = behaviour;
    }

    fn behaviour(&self) -> Behaviour {
        self.0.behaviour.lock().unwrap().clone()
    }

    /// The committed archives, the newest last.
    fn manifests(&self) -> Vec<Manifest> {
        let folders = fs::read_dir(&self.0.dir).unwrap().map(|entry| entry.unwrap().path());
        let texts = folders.filter_map(|folder| fs::read(folder.join(MANIFEST)).ok());
        let mut all: Vec<Manifest> =
            texts.map(|text| serde_json::from_slice(&text).unwrap()).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    pub fn archives(&self) -> Vec<String> {
        self.manifests().into_iter().map(|manifest| manifest.name).collect()
    }

    /// The bytes of an archive's disk.
    pub fn bytes(&self, archive: &str, device: &str) -> Vec<u8> {
        fs::read(self.0.dir.join(archive).join(device)).unwrap()
    }

    fn find(&self, archive: &str) -> Result<Manifest> {
        let found = self.manifests().into_iter().find(|manifest| manifest.name == archive);
        found.ok_or_else(|| Error::new(Kind::NotFound, format!("There is no archive {archive}.")))
    }
}

fn ready<'a, T: Send + 'a>(value: T) -> BoxFuture<'a, T> {
    Box::pin(std::future::ready(value))
}

impl Provider for FileProvider {
    fn describe(&self) -> Description {
        let capabilities = Capabilities {
            vm_file: true,
            vm_restore: true,
            vm_incremental: true,
            slow_commit: self.behaviour().slow_commit,
            ..Capabilities::default()
        };
        let api_version = provider_api::API_VERSION;
        Description { name: "files".into(), api_version, capabilities }
    }

    fn activate<'a>(&'a self, _call: &'a Call) -> BoxFuture<'a, Result<()>> {
        for entry in fs::read_dir(&self.0.dir).unwrap() {
            let path = entry.unwrap().path();
            if !path.join(MANIFEST).exists() {
                fs::remove_dir_all(path).unwrap();
            }
        }
        ready(Ok(()))
    }

    fn status<'a>(&'a self, _call: &'a Call) -> BoxFuture<'a, Result<Status>> {
        ready(Ok(Status { total_bytes: 1, used_bytes: 0 }))
    }

    fn list<'a>(&'a self, _call: &'a Call) -> BoxFuture<'a, Result<Vec<Archive>>> {
        let archives = self.manifests().into_iter().map(|manifest| Archive {
            name: manifest.name,
            subtype: GuestKind::Qemu,
            guest_id: 100,
            time_s: manifest.time_s,
            size_bytes: 1,
            base: None,
            commit_id: Some(manifest.id),
            protected: false,
            notes: None,
            verified: None,
        });
        ready(Ok(archives.collect()))
    }

    fn guest_config<'a>(
        &'a self,
        archive: &'a str,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<GuestConfig>> {
        let found = self.find(archive);
        ready(found.map(|manifest| GuestConfig { config: manifest.config, firewall: None }))
    }

    fn commit_outcome<'a>(
        &'a self,
        id: Uuid,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<CommitOutcome>> {
        let found = self.manifests().into_iter().find(|manifest| manifest.id == id);
        ready(Ok(match found {
            Some(manifest) => CommitOutcome::Committed { archive: manifest.name },
            None => CommitOutcome::NotCommitted,
        }))
    }

    fn start_job<'a>(
        &'a self,
        _job: JobInfo,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<Box<dyn Job>>> {
        ready(Ok(Box::new(FileJob(self.clone())) as Box<dyn Job>))
    }

    fn restore_vm_init<'a>(
        &'a self,
        archive: &'a str,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<Box<dyn VmRestore>>> {
        let folder = self.0.dir.join(archive);
        ready(self.find(archive).map(|manifest| {
            let disks = manifest.disks.into_iter();
            let devices = disks
                .map(|disk| RestoreDevice { device: disk.device, size_bytes: disk.size_bytes })
                .collect();
            Box::new(FileRestore { folder, devices }) as Box<dyn VmRestore>
        }))
    }
}

struct FileRestore {
    folder: PathBuf,
    devices: Vec<RestoreDevice>,
}

impl VmRestore for FileRestore {
    fn devices(&self) -> &[RestoreDevice] {
        &self.devices
    }

    fn volume_init<'a>(
        &'a mut self,
        device: &'a str,
        _private_dir: &'a Path,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<VolumeSource>> {
        ready(Ok(VolumeSource::Path(self.folder.join(device))))
    }

    fn volume_cleanup<'a>(
        &'a mut self,
        _device: &'a str,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<()>> {
        ready(Ok(()))
    }

    fn cleanup<'a>(self: Box<Self>, _call: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a,
    {
        ready(Ok(()))
    }
}

struct FileJob(FileProvider);

impl Job for FileJob {
    fn start_guest<'a>(
        &'a mut self,
        guest: GuestInfo,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<Box<dyn GuestBackup>>> {
        let provider = self.0.clone();
        let name = format!("vm-{}-{:03}", guest.id, provider.archives().len());
        let folder = provider.0.dir.join(&name);
        // What a killed one has begun.
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).unwrap();
        let base = provider.manifests().pop();
        let time_s = guest.start_time_s;
        let backup =
            FileBackup { provider, base, name, folder, time_s, disks: vec![], config: vec![] };
        ready(Ok(Box::new(backup) as Box<dyn GuestBackup>))
    }

    fn finish<'a>(self: Box<Self>, _call: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a,
    {
        ready(Ok(()))
    }
}

struct FileBackup {
    provider: FileProvider,
    base: Option<Manifest>,
    name: String,
    folder: PathBuf,
    time_s: i64,
    disks: Vec<StoredDisk>,
    config: Vec<u8>,
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
        let readable = self.provider.behaviour().readable;
        let known = |device: &str| {
            let disks = &self.base.as_ref()?.disks;
            disks.iter().find(|disk| disk.device == device)?.generation.clone()
        };
        let requests = volumes.iter().map(|volume| match known(&volume.device) {
            Some(generation) => BitmapRequest::Use { generation, readable },
            None => BitmapRequest::New,
        });
        ready(Ok(requests.collect()))
    }

    fn backup_vm<'a>(
        &'a mut self,
        backup: VmBackup,
        progress: &'a dyn Progress,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<Transferred>> {
        Box::pin(async move {
            self.config = backup.config;
            let mut moved = Transferred::default();
            for volume in &backup.volumes {
                let disk = self.copy(volume, progress, call).await?;
                moved.total_bytes += disk.total_bytes;
                moved.read_bytes += disk.read_bytes;
                moved.zero_bytes += disk.zero_bytes;
                self.disks.push(StoredDisk {
                    device: volume.device.clone(),
                    size_bytes: volume.size_bytes,
                    generation: volume.generation.clone(),
                });
            }
            Ok(moved)
        })
    }

    fn commit<'a>(self: Box<Self>, id: Uuid, _call: &'a Call) -> BoxFuture<'a, Result<Committed>>
    where
        Self: 'a,
    {
        Box::pin(async move {
            let behaviour = self.provider.behaviour();
            Pause::stand(behaviour.in_commit.as_ref()).await;
            if behaviour.commit_fails {
                let _ = fs::remove_dir_all(&self.folder);
                return Err(Error::new(Kind::Other, "the upload failed"));
            }
            let Self { name, time_s, disks, config, folder, .. } = *self;
            let manifest = Manifest { id, name: name.clone(), time_s, config, disks };
            let unfinished = folder.join("unfinished");
            fs::write(&unfinished, serde_json::to_vec(&manifest).unwrap()).unwrap();
            fs::rename(&unfinished, folder.join(MANIFEST)).unwrap();
            Ok(Committed { archive: name, size_bytes: 1 })
        })
    }

    fn abort<'a>(self: Box<Self>, _why: &'a str, _call: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a,
    {
        fs::remove_dir_all(&self.folder).unwrap();
        ready(Ok(()))
    }
}

impl FileBackup {
    async fn copy(
        &self,
        volume: &Volume,
        progress: &dyn Progress,
        call: &Call,
    ) -> Result<Transferred> {
        let Access::File { path, regions } = &volume.access else {
            return Err(Error::new(Kind::Invalid, "The disk is not offered as a file."));
        };
        let behaviour = self.provider.behaviour();
        let source = open_direct(path)?;
        Pause::stand(behaviour.before_copy.as_ref()).await;
        let size_bytes = source.metadata().map_err(|e| Error::io("size", e))?.len();
        assert_eq!(size_bytes, volume.size_bytes, "the file has another size");
        let image = self.image(volume)?;
        let mut reader = RegionReader::new(Arc::clone(regions), size_bytes);
        let mut moved = Transferred::default();
        while let Some(page) = reader.next(call).await? {
            assert!(page.len() <= 4096, "a page of {} regions", page.len());
            for region in page {
                let (source, image) = (source.try_clone().unwrap(), image.try_clone().unwrap());
                let copied =
                    tokio::task::spawn_blocking(move || copy_region(&source, &image, region));
                moved.read_bytes += copied.await.unwrap()?;
                moved.zero_bytes += if region.zero { region.length_bytes } else { 0 };
                moved.total_bytes += region.length_bytes;
                progress.report(&volume.device, moved.total_bytes, size_bytes, moved.zero_bytes);
            }
        }
        let wanted = match volume.bitmap_mode {
            BitmapMode::Reuse => volume.dirty_bytes.unwrap(),
            _ => size_bytes,
        };
        assert_eq!(reader.sum_bytes(), wanted);
        if behaviour.reads_all {
            moved.read_bytes += compare(source, image, size_bytes).await?;
            moved.total_bytes = size_bytes;
        }
        Ok(moved)
    }

    /// What the new image is made of: the last one, or zeroes.
    fn image(&self, volume: &Volume) -> Result<File> {
        let path = self.folder.join(&volume.device);
        if volume.bitmap_mode == BitmapMode::Reuse {
            let base = self.base.as_ref().unwrap();
            let from = self.provider.0.dir.join(&base.name).join(&volume.device);
            fs::copy(from, &path).map_err(|e| Error::io("copy the base", e))?;
        }
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(|e| Error::io("make an image", e))?;
        file.set_len(volume.size_bytes).map_err(|e| Error::io("make an image", e))?;
        Ok(file)
    }
}

/// Reads all of a disk and compares it with what is stored: a late full backup would store it.
async fn compare(source: File, image: File, size_bytes: u64) -> Result<u64> {
    let work = move || {
        let mut at = 0;
        while at < size_bytes {
            let length = READ_BYTES.min(size_bytes - at);
            let data = read_direct(&source, at, length)?;
            let mut stored = vec![0; data.len()];
            image.read_exact_at(&mut stored, at).unwrap();
            assert!(data == stored, "the bytes at {at} are not those of the image");
            release(&source, at, length)?;
            at += length;
        }
        Ok(size_bytes)
    };
    tokio::task::spawn_blocking(work).await.unwrap()
}

pub fn open_direct(path: &Path) -> Result<File> {
    let flags = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).unwrap();
    let file = File::options().read(true).write(true).custom_flags(flags).open(path);
    file.map_err(|error| Error::io(format!("open {}", path.display()), error))
}

fn copy_region(source: &File, image: &File, region: Region) -> Result<u64> {
    let Region { offset, length_bytes, zero } = region;
    if zero {
        let zeroes = vec![0; usize::try_from(length_bytes).unwrap()];
        image.write_all_at(&zeroes, offset).map_err(|e| Error::io("write", e))?;
        return Ok(0);
    }
    let mut at = offset;
    while at < offset + length_bytes {
        let length = READ_BYTES.min(offset + length_bytes - at);
        let data = read_direct(source, at, length)?;
        image.write_all_at(&data, at).map_err(|e| Error::io("write", e))?;
        at += length;
    }
    Ok(length_bytes)
}

/// Reads with offset, length and memory as a file past the page cache wants them.
pub fn read_direct(source: &File, offset: u64, length: u64) -> Result<Vec<u8>> {
    let length = usize::try_from(length).unwrap();
    let rounded = length.next_multiple_of(BLOCK_BYTES);
    assert!(offset.is_multiple_of(BLOCK_BYTES as u64), "a region begins at {offset}");
    let mut memory = vec![0_u8; rounded + BLOCK_BYTES];
    let skip = memory.as_ptr().align_offset(BLOCK_BYTES);
    let buffer = &mut memory[skip..skip + rounded];
    let mut have = 0;
    while have < length {
        let count = source.read_at(&mut buffer[have..], offset + have as u64);
        let count = count.map_err(|error| Error::io(format!("read at {offset}"), error))?;
        if count == 0 {
            return Err(Error::new(Kind::Corrupt, format!("the file ends at {offset}")));
        }
        have += count;
    }
    Ok(buffer[..length].to_vec())
}

/// Punches a hole.
pub fn release(source: &File, offset: u64, length: u64) -> Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let punched = fallocate(source, flags, offset, length);
    punched.map_err(|errno: Errno| Error::io(format!("punch at {offset}"), errno.into()))
}
