// SPDX-License-Identifier: MIT OR Apache-2.0
//! Fleecing images on storages that are full, stall, cannot discard, or share blocks.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::fs::FallocateFlags;
use system_tests::loopfs::{Kind, LoopFs};

use crate::place::{MIB, Place, device_status, qemu_io, random_file, writes};

const DISK_BYTES: u64 = 96 * MIB;

/// A VM with one disk of data, and the storage `small` at this path.
fn place_with(kind: &str, path: &Path, more: &str) -> (Place, Vec<u8>) {
    let place = Place::new(&format!("{kind}: small\n\tpath {}\n{more}", path.display()));
    let source = place.path("source");
    let bytes = random_file(&source, DISK_BYTES);
    place.create(&["--disk-from", source.to_str().unwrap()]);
    fs::remove_file(source).unwrap();
    place.start();
    (place, bytes)
}

/// Leaves nothing free.
fn fill_up(dir: &Path) {
    let file = File::create(dir.join("filler")).unwrap();
    let (mut end, mut step) = (0, 64 * MIB);
    while step >= 4096 {
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), end, step) {
            Ok(()) => end += step,
            Err(_) => step /= 2,
        }
    }
}

/// The guest goes on, the next backup works, and its disk is what the guest wrote.
async fn assert_goes_on(place: &Place, mut expected: Vec<u8>, written: &[(u8, u64, u64)]) {
    for (pattern, offset, len) in written {
        expected[*offset as usize..][..*len as usize].fill(*pattern);
    }
    place.assert_tidy();
    let guest = place.good_backup(&[]);
    assert!(place.restored(&guest) == expected, "the guest's disk is another");
    place.stop_vm();
    assert!(place.bytes("local:100/vm-100-disk-0.raw") == expected, "a guest write was lost");
}

#[tokio::test]
async fn fleecing_storage_full_17_the_guest_writes_on_and_the_backup_says_why_it_failed() {
    let fs = LoopFs::new(Kind::Xfs).unwrap();
    let (place, bytes) = place_with("dir", &fs.path(), "");
    let options = ["--fleecing", "storage=small", "--buffer-size", "0"];
    let (backup, session) = place.halted_backup(&options).await;
    fill_up(&fs.path());
    // From the end, which the reader has not released yet.
    let written = (7, DISK_BYTES - 8 * MIB, 8 * MIB);
    writes(&session, written.0, written.1, written.2).await;
    drop(session);
    let error = place.go_on(backup).error();
    assert!(error.contains("No space left on device") && error.contains("'small:"), "{error}");
    fs::remove_file(fs.path().join("filler")).unwrap();
    assert_goes_on(&place, bytes, &[written]).await;
}

#[tokio::test]
async fn fleecing_limit_the_guest_writes_on_and_the_backup_says_why_it_failed() {
    let (place, bytes) = place_with("dir", Path::new("/var/tmp/unused"), "");
    let options = ["--fleecing", "limit=1M", "--buffer-size", "0"];
    let (backup, session) = place.halted_backup(&options).await;
    let written = (7, DISK_BYTES - 8 * MIB, 8 * MIB);
    writes(&session, written.0, written.1, written.2).await;
    drop(session);
    let error = place.go_on(backup).error();
    assert!(error.contains("limit") && error.contains("scsi0"), "{error}");
    assert_goes_on(&place, bytes, &[written]).await;
}

/// A file system that takes no writes until this is dropped.
struct Frozen<'a>(&'a Path);

impl<'a> Frozen<'a> {
    fn new(path: &'a Path) -> Self {
        assert!(Command::new("fsfreeze").arg("-f").arg(path).status().unwrap().success());
        Self(path)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("-u").arg(self.0).status();
    }
}

#[tokio::test]
async fn fleecing_target_stalls_18_the_guest_goes_on_and_the_backup_fails() {
    let fs = LoopFs::new(Kind::Xfs).unwrap();
    let path = fs.path();
    let (place, bytes) = place_with("dir", &path, "");
    let options = ["--fleecing", "storage=small", "--buffer-size", "1M"];
    let (backup, session) = place.halted_backup(&options).await;
    let frozen = Frozen::new(&path);
    let written = (7, DISK_BYTES - 8 * MIB, 8 * MIB);
    // Not waited for here: it stands still until QEMU gives the image up.
    qemu_io(&session, &format!("aio_write -P 7 {} {}", written.1, written.2)).await;
    let begin = std::time::Instant::now();
    while device_status(&session).await["state"] != "broken" {
        assert!(begin.elapsed() < Duration::from_secs(100), "{}", device_status(&session).await);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    // The image still stands still, but the guest's write has been done.
    let begin = std::time::Instant::now();
    while written_bytes(&session).await < written.2 {
        assert!(begin.elapsed() < Duration::from_secs(30), "the guest's write stands still");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    drop(frozen);
    drop(session);
    let error = place.go_on(backup).error();
    assert!(error.contains("scsi0") && error.contains("45"), "{error}");
    assert_goes_on(&place, bytes, &[written]).await;
}

/// What the guest's disk has written, by its own account.
async fn written_bytes(session: &qmp_client::Session) -> u64 {
    let all = session.execute_raw("query-blockstats", serde_json::Value::Null, None).await.unwrap();
    let sums = all.as_array().unwrap().iter().map(|each| each["stats"]["wr_bytes"].as_u64());
    sums.flatten().max().unwrap()
}

/// A mounted file system without discard.
struct RamFs(tempfile::TempDir);

impl RamFs {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("mount");
        command.args(["-t", "ramfs", "ramfs"]).arg(dir.path());
        assert!(command.status().unwrap().success(), "mounting needs root");
        Self(dir)
    }
}

impl Drop for RamFs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn no_discard_support_on_fleecing_storage_55_the_backup_works_and_warns_once() {
    let fs = RamFs::new();
    let more = format!("dir: small\n\tpath {}\n", fs.0.path().display());
    let place = Place::new(&more);
    let source = place.path("source");
    let bytes = random_file(&source, DISK_BYTES);
    let from = source.to_str().unwrap();
    place.create(&["--disk-from", from, "--disk", "4M"]);
    place.start();
    let (backup, session) =
        place.halted_backup(&["--fleecing", "storage=small", "--buffer-size", "0"]).await;
    writes(&session, 7, DISK_BYTES - 8 * MIB, 8 * MIB).await;
    let ended = place.go_on(backup);
    assert_eq!(ended.guest["result"], "committed", "{}", ended.said);
    let warnings = ended.said.matches("cannot give back space").count();
    assert_eq!(warnings, 1, "{}", ended.said);
    place.stop_vm();
    assert!(place.restored(&ended.guest) == bytes, "the backup is not of its point in time");
    // Where it can, nothing is said.
    place.start();
    let ended = place.backup(&[]);
    assert!(!ended.said.contains("cannot give back space"), "{}", ended.said);
}

#[tokio::test]
async fn images_on_btrfs_share_blocks_of_old_data_where_that_is_asked_for() {
    let fs = LoopFs::new(Kind::Btrfs).unwrap();
    let place = Place::new(&format!("btrfs: tree\n\tpath {}\n", fs.path().display()));
    let source = place.path("source");
    let bytes = random_file(&source, 32 * MIB);
    place.create(&["--disk-from", source.to_str().unwrap(), "--storage", "tree"]);
    place.start();
    // An image beside the disk, by default, and in a subvolume of its own.
    let (backup, session) = place.halted_backup(&["--fleecing", "reflink=64K"]).await;
    let list = place.run(&["storage", "list", "tree"]);
    let uses: Vec<_> = list.as_array().unwrap().iter().map(|image| &image["used_as"]).collect();
    assert_eq!(uses, ["disk", "fleecing"], "{list}");
    writes(&session, 7, 24 * MIB, 4 * MIB).await;
    let status = device_status(&session).await;
    assert!(status["shared"].as_u64().unwrap() > 0, "{status}");
    let ended = place.go_on(backup);
    assert_eq!(ended.guest["result"], "committed", "{}", ended.said);
    assert!(place.restored(&ended.guest) == bytes, "the backup is not of its point in time");
    // Elsewhere it is copied, and said.
    let ended = place.backup(&["--fleecing", "storage=local,reflink=64K"]);
    assert_eq!(ended.guest["result"], "committed", "{}", ended.said);
    assert!(ended.said.contains("copied, not shared"), "{}", ended.said);
    place.assert_tidy();
}

#[test]
fn each_disk_may_have_its_own_fleecing_storage_and_bad_ones_are_named() {
    // Nothing can be made in `nothing`.
    let place = Place::new("zfspool: tank\n\tpool rpool/data\n\ndir: nothing\n\tpath /proc\n");
    place.create(&["--disk", "1M", "--disk", "1049088"]);
    place.start();
    let options = ["--fleecing", "storage=nothing,scsi0=local,scsi1=local"];
    place.good_backup(&options);
    let ended = place.backup(&["--fleecing", "enabled=0,storage=nowhere"]);
    assert_eq!(ended.guest["result"], "committed", "{}", ended.said);
    assert_eq!(ended.said.matches("fleecing cannot be switched off").count(), 1, "{}", ended.said);
    // Also those of disks that the VM does not have, before the VM is touched.
    let pid = place.run(&["vm", "status", "100"])["pid"].clone();
    for (list, why) in [
        ("storage=nowhere", "'nowhere' is not in storage.cfg"),
        ("scsi5=tank", "'zfspool', which holds no images"),
    ] {
        let ended = place.backup(&["--mode", "stop", "--fleecing", list]);
        assert!(ended.guest.is_null() && ended.said.contains(why), "{}", ended.said);
        assert_eq!(place.run(&["vm", "status", "100"])["pid"], pid);
        place.assert_tidy();
    }
    let states = place.run(&["storage", "status"]);
    let tank = states.as_array().unwrap().iter().find(|state| state["id"] == "tank").unwrap();
    assert_eq!((&tank["used_for"], &tank["kind"]), (&"unsupported".into(), &"zfspool".into()));
}
