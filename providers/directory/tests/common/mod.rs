// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the tests share: guests made of files, `qemu-nbd` as the snapshot server, backups through
//! the contract, and restores compared with the truth.

#![allow(dead_code, reason = "each test program uses a part")]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use provider_api::{
    Access, BitmapMode, BitmapRequest, Call, GuestBackup, GuestInfo, GuestKind, JobInfo, Progress,
    Provider, Result, Transferred, Uuid, VmBackup, Volume, VolumeInfo, VolumeSource,
};
use provider_directory::{DirectoryOptions, DirectoryProvider, ToolPaths};
use provider_nbd::{Client, Options, context};
use tempfile::TempDir;

/// Waits in tests end here, far above what they need.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A process that ends with the test.
pub(crate) struct Process(pub(crate) Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A program that also dies with the thread that starts it, so that a killed test leaves none.
/// Tests start theirs from their own thread, which outlives them.
pub(crate) fn dies_with_test(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", program]);
    command
}

/// This test program again, to run its `child_process` only. It must call [`end_with_parent`].
pub(crate) fn start_child(environment: &[(&str, &OsStr)]) -> Process {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child_process", "--nocapture"]);
    command.envs(environment.iter().copied()).stdin(Stdio::piped()).stdout(Stdio::piped());
    Process(command.spawn().unwrap())
}

/// Ends this process when the one that holds the other end of its input is gone.
pub(crate) fn end_with_parent() {
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(1);
    });
}

/// Connects as soon as the server listens.
pub(crate) async fn connect(socket: &Path, export: &str, contexts: Vec<String>) -> Client {
    let until = Instant::now() + LIMIT;
    loop {
        let options =
            Options { contexts: contexts.clone(), timeout: Some(LIMIT), ..Options::default() };
        match Client::connect_unix(socket, export, options).await {
            Ok(client) => return client,
            Err(error) => assert!(Instant::now() < until, "no server: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A snapshot served by `qemu-nbd`.
pub(crate) struct Snapshot {
    pub(crate) socket: PathBuf,
    _process: Process,
}

impl Snapshot {
    pub(crate) async fn serve(folder: &Path, image: &Path, extra: &[&str]) -> Self {
        let socket = folder.join(format!("{}.sock", Uuid::new_v4().simple()));
        let child = dies_with_test("qemu-nbd")
            .args(["--persistent", "--shared=16", "--export-name=disk", "--socket"])
            .arg(&socket)
            .args(extra)
            .arg(image)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let process = Process(child);
        connect(&socket, "disk", Vec::new()).await.disconnect().await.unwrap();
        Self { socket, _process: process }
    }

    pub(crate) fn access(&self, bitmap: Option<&str>) -> Access {
        Access::Nbd {
            socket: self.socket.clone(),
            export: "disk".to_owned(),
            bitmap: bitmap.map(str::to_owned),
        }
    }
}

/// A guest's disk: a qcow2 image with a persistent bitmap, as a running QEMU would keep it.
pub(crate) struct GuestDisk {
    pub(crate) device: String,
    pub(crate) image: PathBuf,
    pub(crate) size_bytes: u64,
    folder: PathBuf,
}

pub(crate) const BITMAP: &str = "b0";

impl GuestDisk {
    pub(crate) fn create(folder: &Path, device: &str, size_bytes: u64, granularity: u32) -> Self {
        let image = folder.join(format!("{}-{device}.qcow2", Uuid::new_v4().simple()));
        run("qemu-img", &["create", "-q", "-f", "qcow2", text(&image), &size_bytes.to_string()]);
        let granularity = granularity.to_string();
        run("qemu-img", &["bitmap", "--add", "-g", &granularity, text(&image), BITMAP]);
        Self { device: device.to_owned(), image, size_bytes, folder: folder.to_owned() }
    }

    /// Changes the disk's content as its guest would.
    pub(crate) async fn edit(&self, change: impl AsyncFnOnce(&Client)) {
        let socket = self.folder.join("edit.sock");
        let _ = std::fs::remove_file(&socket);
        // Without --persistent it ends, and stores the bitmap, after its only client.
        let child = dies_with_test("qemu-nbd")
            .args(["--discard=unmap", "--format=qcow2", "--export-name=disk", "--socket"])
            .arg(&socket)
            .arg(&self.image)
            .spawn()
            .unwrap();
        let mut process = Process(child);
        let client = connect(&socket, "disk", Vec::new()).await;
        change(&client).await;
        client.disconnect().await.unwrap();
        assert!(process.0.wait().unwrap().success());
    }

    /// Forgets what is dirty, as a committed backup makes QEMU do.
    pub(crate) fn clear_bitmap(&self) {
        run("qemu-img", &["bitmap", "--clear", text(&self.image), BITMAP]);
    }

    /// The content, as a raw file.
    pub(crate) fn reference(&self, name: &str) -> PathBuf {
        let path = self.folder.join(format!("{name}-{}.raw", self.device));
        run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&self.image), text(&path)]);
        path
    }

    /// A frozen copy of the disk, served with its bitmap and writable: what is trimmed is gone.
    pub(crate) async fn snapshot(&self) -> Snapshot {
        let copy = self.folder.join(format!("{}.qcow2", Uuid::new_v4().simple()));
        std::fs::copy(&self.image, &copy).unwrap();
        let extra = ["--format=qcow2", "--discard=unmap", "--bitmap=b0"];
        Snapshot::serve(&self.folder, &copy, &extra).await
    }

    pub(crate) async fn dirty_bytes(&self, snapshot: &Snapshot) -> u64 {
        let name = context::dirty_bitmap(BITMAP);
        let client = connect(&snapshot.socket, "disk", vec![name.clone()]).await;
        let mut extents = client.extents(&name, 0, self.size_bytes);
        let mut sum = 0;
        while let Some(extent) = extents.next().await.unwrap() {
            sum += if extent.flags & context::DIRTY != 0 { extent.len } else { 0 };
        }
        client.disconnect().await.unwrap();
        sum
    }

    pub(crate) fn info(&self) -> VolumeInfo {
        VolumeInfo { device: self.device.clone(), size_bytes: self.size_bytes, volume_id: None }
    }

    /// The volume as the host would hand it over.
    pub(crate) async fn volume(
        &self,
        snapshot: &Snapshot,
        request: &BitmapRequest,
        generation: &str,
    ) -> Volume {
        let reuse = matches!(request, BitmapRequest::Use { .. });
        Volume {
            device: self.device.clone(),
            size_bytes: self.size_bytes,
            access: snapshot.access(Some(BITMAP)),
            bitmap_mode: if reuse { BitmapMode::Reuse } else { BitmapMode::New },
            bitmap_action: if reuse { "used" } else { "new" }.to_owned(),
            generation: Some(generation.to_owned()),
            dirty_bytes: if reuse {
                Some(self.dirty_bytes(snapshot).await)
            } else {
                Some(self.size_bytes)
            },
        }
    }
}

/// Keeps what was reported.
#[derive(Default)]
pub(crate) struct Recorder {
    pub(crate) lines: Mutex<Vec<String>>,
    pub(crate) last: Mutex<Option<(u64, u64, u64)>>,
}

impl Progress for Recorder {
    fn report(&self, _device: &str, done_bytes: u64, total_bytes: u64, zero_bytes: u64) {
        *self.last.lock().unwrap() = Some((done_bytes, total_bytes, zero_bytes));
    }
    fn log(&self, line: &str) {
        self.lines.lock().unwrap().push(line.to_owned());
    }
}

/// A storage in a folder of its own.
pub(crate) struct Bench {
    pub(crate) folder: TempDir,
    pub(crate) provider: DirectoryProvider,
    pub(crate) call: Call,
}

static TIME_S: AtomicI64 = AtomicI64::new(1_767_322_984);

impl Bench {
    pub(crate) async fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("dp").tempdir().unwrap();
        let bench = Self {
            provider: provider(&folder.path().join("storage")),
            folder,
            call: Call::default(),
        };
        bench.provider.activate(&bench.call).await.unwrap();
        bench
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn storage(&self) -> PathBuf {
        self.folder.path().join("storage")
    }

    pub(crate) async fn start(&self, id: u32) -> Box<dyn GuestBackup> {
        start(&self.provider, id, &self.call).await
    }

    /// Backs up the disks of a guest as the host does, and commits.
    pub(crate) async fn back_up(
        &self,
        id: u32,
        disks: &[&GuestDisk],
        generation: &str,
    ) -> Result<(String, Transferred)> {
        let mut guest = self.start(id).await;
        let transferred = copy(guest.as_mut(), disks, generation, &self.call).await;
        match transferred {
            Ok(transferred) => {
                let committed = guest.commit(Uuid::new_v4(), &self.call).await?;
                disks.iter().for_each(|disk| disk.clear_bitmap());
                Ok((committed.archive, transferred))
            }
            Err(error) => {
                guest.abort("failed", &self.call).await.unwrap();
                Err(error)
            }
        }
    }

    pub(crate) async fn names(&self) -> Vec<String> {
        let archives = self.provider.list(&self.call).await.unwrap();
        archives.into_iter().map(|archive| archive.name).collect()
    }

    pub(crate) async fn check_restore(&self, archive: &str, device: &str, reference: &Path) {
        check_restore(&self.storage(), archive, device, reference).await;
    }

    pub(crate) fn check_image(&self, archive: &str, device: &str, reference: &Path) {
        check_image(&self.storage(), archive, device, reference);
    }
}

/// Restores a disk over the contract and compares each byte.
pub(crate) async fn check_restore(storage: &Path, archive: &str, device: &str, reference: &Path) {
    let call = Call::default();
    let private = tempfile::Builder::new().prefix("dr").tempdir().unwrap();
    let mut restore = provider(storage).restore_vm_init(archive, &call).await.unwrap();
    let source = restore.volume_init(device, private.path(), &call).await.unwrap();
    let VolumeSource::NbdUnix { socket, export } = source else { panic!("not NBD") };
    let client = connect(&socket, &export, Vec::new()).await;
    let truth = std::fs::read(reference).unwrap();
    assert_eq!(client.size_bytes(), truth.len() as u64);
    assert!(client.flags().read_only);
    let content = client.read(0, truth.len()).await.unwrap();
    if content[..] != truth[..] {
        let position = (0..truth.len()).find(|i| content[*i] != truth[*i]);
        panic!("{archive} {device} differs from {} at {position:?}", reference.display());
    }
    client.disconnect().await.unwrap();
    restore.volume_cleanup(device, &call).await.unwrap();
    assert!(!socket.exists());
    restore.cleanup(&call).await.unwrap();
}

/// Lets QEMU's own tool judge an image of the archive, and its way to the base.
pub(crate) fn check_image(storage: &Path, archive: &str, device: &str, reference: &Path) {
    let image = storage.join(archive).join(format!("{device}.qcow2"));
    let output = run("qemu-img", &["check", "--output=json", "-f", "qcow2", text(&image)]);
    assert!(!output.contains("leaks") && !output.contains("corruptions"), "{output}");
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(&image), text(reference)]);
}

pub(crate) fn provider(path: &Path) -> DirectoryProvider {
    DirectoryProvider::new(DirectoryOptions { path: path.to_owned(), tools: ToolPaths::default() })
}

pub(crate) async fn start(
    provider: &DirectoryProvider,
    id: u32,
    call: &Call,
) -> Box<dyn GuestBackup> {
    let start_time_s = TIME_S.fetch_add(1, Ordering::Relaxed);
    let mut job = provider.start_job(JobInfo { start_time_s }, call).await.unwrap();
    let info = GuestInfo { kind: GuestKind::Qemu, id, name: Some("test".to_owned()), start_time_s };
    job.start_guest(info, call).await.unwrap()
}

/// Plans and copies, up to the commit.
pub(crate) async fn copy(
    guest: &mut dyn GuestBackup,
    disks: &[&GuestDisk],
    generation: &str,
    call: &Call,
) -> Result<Transferred> {
    let infos: Vec<_> = disks.iter().map(|disk| disk.info()).collect();
    let requests = guest.plan_volumes(&infos, call).await?;
    let mut volumes = Vec::new();
    let mut snapshots = Vec::new();
    for (disk, request) in disks.iter().zip(&requests) {
        let snapshot = disk.snapshot().await;
        volumes.push(disk.volume(&snapshot, request, generation).await);
        snapshots.push(snapshot);
    }
    let progress = Recorder::default();
    guest.backup_vm(vm(volumes), &progress, call).await
}

pub(crate) fn vm(volumes: Vec<Volume>) -> VmBackup {
    VmBackup {
        config: b"name: test\nmemory: 512\n".to_vec(),
        firewall: Some(b"[OPTIONS]\nenable: 1\n".to_vec()),
        volumes,
    }
}

/// Small fast generator with a seed that a failing test prints.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        println!("seed {seed}");
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(crate) fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut data: Vec<u8> = std::iter::repeat_with(|| self.next().to_le_bytes())
            .take(length / 8 + 1)
            .flatten()
            .collect();
        data.truncate(length);
        data
    }
}

/// Random writes, zero writes and trims in units of 512 bytes.
pub(crate) async fn scribble(disk: &GuestDisk, random: &mut Random, operations: u32) {
    let mut changes = Vec::new();
    for _ in 0..operations {
        let sectors = disk.size_bytes / 512;
        let longest = if random.below(4) == 0 { 2048 } else { 40 };
        let start = random.below(sectors);
        let length = (1 + random.below(longest)).min(sectors - start) * 512;
        let kind = random.below(4);
        let data = if kind < 2 { random.bytes(length as usize) } else { Vec::new() };
        changes.push((kind, start * 512, length, data));
    }
    disk.edit(async |client| {
        for (kind, offset, length, data) in changes {
            match kind {
                0 | 1 => client.write(offset, data.into(), false).await.unwrap(),
                2 => client
                    .write_zeroes(offset, length, provider_nbd::ZeroOptions::default())
                    .await
                    .unwrap(),
                _ => client.trim(offset, length).await.unwrap(),
            }
        }
    })
    .await;
}
