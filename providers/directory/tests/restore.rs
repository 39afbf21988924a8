// SPDX-License-Identifier: MIT OR Apache-2.0
//! The server of a restore, and the checksums a later verify will use.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{Bench, GuestDisk, LIMIT, Random, end_with_parent, provider, scribble, start_child};
use provider_api::{Call, Kind, Provider, VolumeSource};
use provider_directory::{DirectoryOptions, DirectoryProvider, ToolPaths};

const CHILD_STORAGE: &str = "DIRECTORY_TEST_STORAGE";
const CHILD_ARCHIVE: &str = "DIRECTORY_TEST_ARCHIVE";

/// Not a test of its own: what a child process runs.
#[tokio::test(flavor = "multi_thread")]
async fn child_process() {
    let Ok(path) = std::env::var(CHILD_STORAGE) else { return };
    let archive = std::env::var(CHILD_ARCHIVE).unwrap();
    end_with_parent();
    let call = Call::default();
    let storage = provider(Path::new(&path));
    let mut restore = storage.restore_vm_init(&archive, &call).await.unwrap();
    // Beside the storage, in the folder of the parent: this process will not clean up.
    let folder = Path::new(&path).parent().unwrap();
    let source = restore.volume_init("scsi0", folder, &call).await.unwrap();
    let VolumeSource::NbdUnix { socket, .. } = source else { panic!("not NBD") };
    println!("\nSOCKET {}", socket.display());
    std::future::pending::<()>().await;
}

async fn wait_until_refused(socket: &Path) {
    let until = Instant::now() + LIMIT;
    while UnixStream::connect(socket).is_ok() {
        assert!(Instant::now() < until, "the server at {} lives on", socket.display());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn archive(bench: &Bench) -> (String, PathBuf) {
    let disk = GuestDisk::create(bench.path(), "scsi0", (9 << 20) + 512, 4096);
    scribble(&disk, &mut Random::new(30), 60).await;
    let truth = disk.reference("truth");
    (bench.back_up(1, &[&disk], "g1").await.unwrap().0, truth)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_dies_with_a_killed_process() {
    let bench = Bench::new().await;
    let (archive, _) = archive(&bench).await;
    let storage = bench.storage();
    let environment = [(CHILD_STORAGE, storage.as_os_str()), (CHILD_ARCHIVE, archive.as_ref())];
    let mut process = start_child(&environment);
    let output = BufReader::new(process.0.stdout.take().unwrap());
    let socket = output
        .lines()
        .find_map(|line| line.unwrap().strip_prefix("SOCKET ").map(PathBuf::from))
        .expect("the child process ended early");
    assert!(UnixStream::connect(&socket).is_ok());
    drop(process);
    wait_until_refused(&socket).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_restore_ends_its_server() {
    let bench = Bench::new().await;
    let (archive, _) = archive(&bench).await;
    let mut restore = bench.provider.restore_vm_init(&archive, &bench.call).await.unwrap();
    assert_eq!(restore.devices()[0].size_bytes, (9 << 20) + 512);
    let source = restore.volume_init("scsi0", bench.path(), &bench.call).await.unwrap();
    let VolumeSource::NbdUnix { socket, .. } = source else { panic!("not NBD") };
    assert!(restore.volume_init("scsi0", bench.path(), &bench.call).await.is_err(), "twice");
    assert!(UnixStream::connect(&socket).is_ok());
    drop(restore);
    wait_until_refused(&socket).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_start_is_an_error_that_says_why() {
    let bench = Bench::new().await;
    let (archive, _) = archive(&bench).await;
    let start = async |qemu_nbd: &str, device: &str, folder: &Path| {
        let tools = ToolPaths { qemu_nbd: qemu_nbd.into(), ..ToolPaths::default() };
        let other = DirectoryProvider::new(DirectoryOptions { path: bench.storage(), tools });
        let mut restore = other.restore_vm_init(&archive, &bench.call).await.unwrap();
        let result = restore.volume_init(device, folder, &bench.call).await;
        restore.volume_cleanup(device, &bench.call).await.unwrap();
        restore.cleanup(&bench.call).await.unwrap();
        result.unwrap_err()
    };
    let error = start("/nowhere/qemu-nbd", "scsi0", bench.path()).await;
    assert!(error.message.contains("/nowhere/qemu-nbd"), "{error}");
    let error = start("qemu-nbd", "scsi9", bench.path()).await;
    assert_eq!(error.kind, Kind::NotFound);
    let error = start("qemu-nbd", "scsi0", &bench.path().join("x".repeat(100))).await;
    assert!(error.message.contains("longer than"), "{error}");
    let error = start("qemu-nbd", "scsi0", &bench.path().join("missing")).await;
    assert!(error.message.contains("qemu-nbd ended"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn checksums_cover_exactly_what_an_archive_holds() {
    let bench = Bench::new().await;
    let disk = GuestDisk::create(bench.path(), "scsi0", (9 << 20) + 512, 4096);
    let mut random = Random::new(31);
    for step in 0..3 {
        scribble(&disk, &mut random, 40).await;
        let truth = std::fs::read(disk.reference("truth")).unwrap();
        let (archive, moved) = bench.back_up(1, &[&disk], &format!("g{step}")).await.unwrap();
        let folder = bench.storage().join(archive);
        let text = std::fs::read_to_string(folder.join("scsi0.blake3")).unwrap();
        let manifest = std::fs::read_to_string(folder.join("manifest.json")).unwrap();
        assert!(manifest.contains(blake3::hash(text.as_bytes()).to_hex().as_str()));
        let (mut covered, mut end_before) = (0, 0);
        for line in text.lines() {
            let parts: Vec<_> = line.split(' ').collect();
            let [offset, length, hash] = parts[..] else { panic!("{line}") };
            let (offset, length): (usize, usize) =
                (offset.parse().unwrap(), length.parse().unwrap());
            let content = &truth[offset..offset + length];
            if hash == "zero" {
                assert!(content == vec![0; length], "{line}");
            } else {
                assert_eq!(offset >> 22, (offset + length - 1) >> 22, "{line}");
                assert_eq!(blake3::hash(content).to_hex().as_str(), hash, "{line}");
            }
            assert!(offset >= end_before);
            end_before = offset + length;
            covered += length as u64;
        }
        assert_eq!(covered, moved.total_bytes);
    }
}
