// SPDX-License-Identifier: MIT OR Apache-2.0
//! The main job end to end, and what is left of it when something is killed half way.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use qmp_client::{Options, Session, backup};
use rustix::process::Signal;
use system_tests::console::Console;
use system_tests::lab::{
    BACKUPS, Backup, Lab, LabOptions, PLAIN_VIRTIO, SCSI_WITH_THREADS, SOURCE_VM,
    VIRTIO_WITH_THREADS,
};
use system_tests::process::{Collected, Finished, Stop};
use system_tests::story::{self, Pace};
use system_tests::turn::Turn;
use tempfile::TempDir;

const RATE_PER_S: u32 = 300;
const SOON: Duration = Duration::from_secs(60);
/// A running backup is disturbed once it has stored this much.
const SOME_DATA_BYTES: u64 = 1 << 20;
/// Ends `vzdump` by SIGKILL when its job reaches this action.
const KILL_AT: &str = "VZDUMP_TEST_KILL_AT";

struct Scene {
    lab: Lab,
    dir: TempDir,
    _turn: Turn,
    next_vm: u32,
}

impl Scene {
    fn new(disk_mib: u64, format: &'static str, hardware: &'static [&'static str]) -> Self {
        let stop = Stop::default();
        let turn = Turn::wait(&stop).unwrap();
        let dir = tempfile::Builder::new().prefix("vz-e2e-").tempdir_in("/var/tmp").unwrap();
        let options = LabOptions {
            disk_bytes: disk_mib << 20,
            format,
            hardware,
            rate_per_s: RATE_PER_S,
            show: true,
        };
        let lab = Lab::create(dir.path(), options, &stop).unwrap();
        Self { lab, dir, _turn: turn, next_vm: 200 }
    }

    fn start_backup(&self, environment: &[(&str, &str)]) -> Collected {
        let vm = SOURCE_VM.to_string();
        let arguments = ["backup", &vm, "--storage", BACKUPS];
        self.lab.vzdump.spawn_with(&arguments, environment).unwrap()
    }

    fn finish(&self, backup: Collected) -> Finished {
        backup.finish(SOON, &self.lab.stop).unwrap()
    }

    /// Waits until a backup that was just started has stored something.
    fn wait_for_data(&self, backup: &mut Collected, stored_before: u64) {
        let folder = self.lab.backups_dir();
        let more = "data of a running backup";
        let waited = self.lab.stop.wait_for(more, SOON, || {
            let ended = backup.process().try_wait()?;
            assert!(ended.is_none(), "the backup ended before it could be disturbed");
            Ok((size_of(&folder) > stored_before + SOME_DATA_BYTES).then_some(()))
        });
        waited.unwrap();
    }

    fn stored_bytes(&self) -> u64 {
        size_of(&self.lab.backups_dir())
    }

    /// The restored disks are exactly what a point in time must be; no guest is needed to see it.
    fn assert_restores(&mut self, backup: &Backup) {
        let vm = self.next_vm;
        self.next_vm += 1;
        self.lab.restore(&backup.volume, vm).unwrap();
        let report = self.lab.check_outside(vm, false).unwrap();
        assert!(report.problems.is_empty(), "{}", report.line());
        std::fs::remove_dir_all(self.dir.path().join(format!("local/images/{vm}"))).unwrap();
        std::fs::remove_file(self.dir.path().join(format!("etc/qemu-server/{vm}.conf"))).unwrap();
    }

    /// A backup that dies at this step, and the archives that `list` shows then.
    fn backup_killed_at(&self, step: &str, archives: usize) {
        let finished = self.finish(self.start_backup(&[(KILL_AT, step)]));
        assert_eq!(finished.status.signal(), Some(9), "{step}: {}", finished.stderr);
        let listed = self.lab.archives().unwrap();
        assert_eq!(listed.len(), archives, "after the kill at {step}: {listed:?}");
    }

    fn assert_guest_writes(&self, console: &mut Console) {
        let before = console.records().unwrap().last;
        console.wait_for_record(before.max(1) + 50, SOON, &self.lab.stop).unwrap();
    }

    /// Nothing but the two disks is left beside them: no fleecing image, no half restore.
    fn assert_tidy(&self) {
        let folder = self.dir.path().join(format!("local/images/{SOURCE_VM}"));
        let names: Vec<_> = folder.read_dir().unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "{names:?}");
        let journals = self.dir.path().join("state/journal");
        let open: Vec<_> = journals.read_dir().unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(open.is_empty(), "{open:?}");
    }
}

fn size_of(folder: &Path) -> u64 {
    let Ok(entries) = folder.read_dir() else { return 0 };
    let sizes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(data) if data.is_dir() => size_of(&entry.path()),
        Ok(data) => data.len(),
        // It was removed or renamed meanwhile.
        Err(_) => 0,
    });
    sizes.sum()
}

#[test]
fn a_running_vm_is_backed_up_twice_and_both_backups_boot_elsewhere() {
    let mut scene = Scene::new(128, "raw", VIRTIO_WITH_THREADS);
    let pace = Pace { before: 300, between: 900 };
    let ending = story::tell(&mut scene.lab, pace, |step| println!("{step}")).unwrap();
    println!("{}", ending.table);
    assert_eq!(scene.lab.archives().unwrap().len(), 2);
    scene.assert_tidy();
}

/// Every step of the job, and whether the archive is there when the next one begins.
const STEPS: [(&str, bool); 19] = [
    ("OpenJournal", false),
    ("StartGuest", false),
    ("Prepare", false),
    ("EnterMode", false),
    ("PlanVolumes", false),
    ("Acquire", false),
    ("PointInTime", false),
    ("Resume", false),
    ("OpenSource", false),
    ("Transfer", false),
    ("JournalCommit", false),
    ("Commit", false),
    ("RecordOutcome", true),
    ("CloseSource", true),
    ("Teardown", true),
    ("Release", true),
    ("LeaveMode", true),
    ("Cleanup", true),
    ("CloseJournal", true),
];

#[test]
fn a_backup_killed_anywhere_is_followed_by_an_increment_that_restores_exactly() {
    let mut scene = Scene::new(64, "qcow2", PLAIN_VIRTIO);
    let mut console = scene.lab.start(SOURCE_VM).unwrap().console;
    let first = scene.lab.backup().unwrap();
    assert!(!first.is_increment());
    let mut archives = 1;
    for (step, is_committed) in STEPS {
        println!("killed at {step}");
        archives += usize::from(is_committed);
        scene.backup_killed_at(step, archives);
        scene.assert_guest_writes(&mut console);
        let next = scene.lab.backup().unwrap();
        assert!(next.is_increment(), "after the kill at {step}: {:?}", next.bitmap_actions);
        archives += 1;
        scene.assert_tidy();
        scene.assert_restores(&next);
    }
    println!("killed again and again without a success in between");
    for (step, is_committed) in STEPS.into_iter().rev() {
        archives += usize::from(is_committed);
        scene.backup_killed_at(step, archives);
    }
    scene.assert_guest_writes(&mut console);
    let last = scene.lab.backup().unwrap();
    assert!(last.is_increment(), "{:?}", last.bitmap_actions);
    scene.assert_tidy();
    scene.assert_restores(&last);
}

#[test]
fn a_plain_copy_of_the_disks_of_a_running_vm_is_found_out() {
    // Not a test of the product but of these tests: a backup without a point in time must fail.
    let mut scene = Scene::new(32, "raw", PLAIN_VIRTIO);
    let mut console = scene.lab.start(SOURCE_VM).unwrap().console;
    let images = scene.dir.path().join("local/images");
    std::fs::create_dir(images.join("300")).unwrap();
    for name in ["disk-0.raw", "disk-1.raw"] {
        scene.assert_guest_writes(&mut console);
        let from = images.join(format!("{SOURCE_VM}/vm-{SOURCE_VM}-{name}"));
        std::fs::copy(from, images.join("300").join(name)).unwrap();
    }
    let line = scene.lab.check_outside(300, true).unwrap().line();
    assert!(line.contains("different points in time"), "{line}");
}

#[test]
fn a_transfer_that_is_killed_or_interrupted_harms_nobody() {
    let mut scene = Scene::new(256, "raw", PLAIN_VIRTIO);
    let mut console = scene.lab.start(SOURCE_VM).unwrap().console;
    for signal in [Signal::KILL, Signal::TERM] {
        println!("transfer ended by {signal:?}");
        let stored = scene.stored_bytes();
        let mut backup = scene.start_backup(&[]);
        scene.wait_for_data(&mut backup, stored);
        backup.process().signal(signal).unwrap();
        let finished = scene.finish(backup);
        if signal == Signal::TERM {
            // It ended by itself, said so, and left nothing behind.
            let code = finished.status.code();
            assert!(code.is_some_and(|code| code != 0), "{code:?}: {}", finished.stderr);
            scene.assert_tidy();
        }
        assert_eq!(scene.lab.archives().unwrap(), Vec::<String>::new());
        scene.assert_guest_writes(&mut console);
    }
    let full = scene.lab.backup().unwrap();
    scene.assert_guest_writes(&mut console);
    scene.assert_tidy();
    scene.assert_restores(&full);
}

/// Waits until QEMU has no access any more; false if it had none at first.
async fn accesses_end(monitor: &Path) -> bool {
    let session = Session::connect(monitor, Options::default()).await.unwrap();
    let mut events = session.events();
    let had_one = !backup::query(&session).await.unwrap().is_empty();
    let wait = async {
        while !backup::query(&session).await.unwrap().is_empty() {
            let second = tokio::time::timeout(Duration::from_secs(1), events.next());
            drop(second.await);
        }
    };
    tokio::time::timeout(2 * SOON, wait).await.expect("the lease of the access ends");
    had_one
}

#[test]
fn a_killed_backup_leaves_no_access_in_qemu_and_the_next_one_works() {
    let mut scene = Scene::new(256, "qcow2", VIRTIO_WITH_THREADS);
    let mut console = scene.lab.start(SOURCE_VM).unwrap().console;
    let stored = scene.stored_bytes();
    let mut killed = scene.start_backup(&[]);
    scene.wait_for_data(&mut killed, stored);
    killed.process().signal(Signal::KILL).unwrap();
    scene.finish(killed);
    let monitor = scene.dir.path().join(format!("run/vm/{SOURCE_VM}/qmp-spare.sock"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    assert!(runtime.block_on(accesses_end(&monitor)), "there was none when vzdump was killed");
    scene.assert_guest_writes(&mut console);
    let next = scene.lab.backup().unwrap();
    scene.assert_tidy();
    scene.assert_restores(&next);
}

#[test]
fn a_qemu_killed_during_a_backup_loses_no_write_and_leaves_no_archive() {
    let mut scene = Scene::new(256, "qcow2", SCSI_WITH_THREADS);
    let mut console = scene.lab.start(SOURCE_VM).unwrap().console;
    let seen = console.wait_for_record(300, SOON, &scene.lab.stop).unwrap();
    let stored = scene.stored_bytes();
    let mut backup = scene.start_backup(&[]);
    scene.wait_for_data(&mut backup, stored);
    let qemu = scene.lab.qemu_pid(SOURCE_VM).unwrap();
    rustix::process::kill_process(qemu, Signal::KILL).unwrap();
    let finished = scene.finish(backup);
    let code = finished.status.code();
    assert!(code.is_some_and(|code| code != 0), "{code:?}: {}", finished.stderr);
    assert_eq!(scene.lab.archives().unwrap(), Vec::<String>::new());

    let report = scene.lab.check_outside(SOURCE_VM, true).unwrap();
    assert!(report.problems.is_empty() && report.last_b >= seen.last, "{}", report.line());
    let mut running = scene.lab.start(SOURCE_VM).unwrap();
    assert!(running.checked.last_b >= seen.last);
    scene.assert_guest_writes(&mut running.console);
    let next = scene.lab.backup().unwrap();
    scene.assert_tidy();
    scene.assert_restores(&next);
}

#[test]
fn the_chain_of_a_guest_goes_on_after_it_was_shut_down_and_started() {
    let mut scene = Scene::new(64, "raw+bitmaps", VIRTIO_WITH_THREADS);
    let mut console = scene.lab.start(SOURCE_VM).unwrap().console;
    scene.assert_guest_writes(&mut console);
    let full = scene.lab.backup().unwrap();
    assert!(!full.is_increment());
    scene.assert_guest_writes(&mut console);
    scene.lab.stop_vm(SOURCE_VM).unwrap();
    // A power button would have done, too, but not in every guest.
    console.wait_for("GUEST SHUTDOWN BY THE AGENT", SOON, &scene.lab.stop).unwrap();

    let mut console = scene.lab.start(SOURCE_VM).unwrap().console;
    scene.assert_guest_writes(&mut console);
    let next = scene.lab.backup().unwrap();
    assert!(next.is_increment(), "{:?}", next.bitmap_actions);
    assert!(next.total_bytes < full.total_bytes, "{} bytes", next.total_bytes);
    scene.assert_restores(&next);

    scene.assert_guest_writes(&mut console);
    let qemu = scene.lab.qemu_pid(SOURCE_VM).unwrap();
    rustix::process::kill_process(qemu, Signal::KILL).unwrap();
    let status = ["vm", "status", "100"];
    let is_gone = || Ok((scene.lab.vzdump.run(&status, SOON)?["running"] == false).then_some(()));
    scene.lab.stop.wait_for("end of a killed QEMU", SOON, is_gone).unwrap();
    let mut console = scene.lab.start(SOURCE_VM).unwrap().console;
    scene.assert_guest_writes(&mut console);
    let after_kill = scene.lab.backup().unwrap();
    assert_eq!(after_kill.total_bytes, after_kill.disks_bytes, "{:?}", after_kill.bitmap_actions);
    scene.assert_restores(&after_kill);
}
