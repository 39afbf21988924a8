// SPDX-License-Identifier: MIT OR Apache-2.0
//! Backups of containers: the modes, what is in the archive, and what commands beside it see.

use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

use provider_api::{GuestKind, Identity};
use system_tests::loopfs::{Kind, LoopFs};
use tokio_util::sync::CancellationToken;
use vzdump_core::guest::BackupMode;
use vzdump_core::job::report::{GuestReport, GuestResult};
use vzdump_core::job::{BackupOptions, run_backup};
use vzdump_core::task_log::{Level, Progress, TaskSink};

use crate::provider::TarProvider;
use crate::scene::{Scene, wait_for};

/// Collects lines.
#[derive(Default)]
pub(crate) struct Lines(Mutex<Vec<String>>);

impl Lines {
    pub(crate) fn text(&self) -> String {
        self.0.lock().unwrap().join("\n")
    }
}

impl TaskSink for Lines {
    fn line(&self, _: Level, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }

    fn progress(&self, _: &Progress) {}
}

pub(crate) fn provider(scene: &Scene, identity: Identity) -> TarProvider {
    TarProvider { dir: scene.root.join("archives"), identity, script: None }
}

/// One backup; its report and its log.
pub(crate) fn back_up(
    scene: &Scene,
    id: u32,
    mode: BackupMode,
    provider: &TarProvider,
) -> (GuestReport, String) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let lines = Lines::default();
    let options = BackupOptions { mode, ..BackupOptions::new("store") };
    let ctx = scene.context(provider);
    let cancel = CancellationToken::new();
    let ids = [id];
    let job = run_backup(&ctx, &ids, provider, &options, &lines, &cancel);
    let mut report = runtime.block_on(job);
    assert_eq!(report.error, None);
    (report.guests.remove(0), lines.text())
}

pub(crate) fn member(tar: &Path, name: &str) -> String {
    let output = Command::new("tar").args(["-xOf"]).arg(tar).arg(name).output().unwrap();
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The writer counts in one volume first: the other is never ahead, and at most one behind.
fn assert_one_point_in_time(tar: &Path) {
    let number = |name| member(tar, name).trim().parse::<u64>().unwrap();
    let (first, second) = (number("./root/a"), number("./srv/b"));
    assert!(second <= first && first <= second + 1, "a {first}, b {second}");
    let list = Command::new("tar").arg("-tvf").arg(tar).args(["--numeric-owner"]).output().unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    let line = list.lines().find(|line| line.ends_with(" ./root/a")).unwrap();
    assert!(line.contains(" 0/0 "), "the container's ids: {line}");
}

fn start_writing(scene: &Scene, id: u32) {
    scene.run(&["ct", "start", &id.to_string()]);
    wait_for("both volumes are written", || scene.inside(id, "/srv/b").exists());
}

fn assert_committed(report: &GuestReport, log: &str) {
    assert_eq!((report.result, &report.error), (GuestResult::Committed, &None), "{log}");
    assert_eq!(report.kind, GuestKind::Lxc);
    assert!(report.warnings.is_empty(), "{:?}", report.warnings);
}

#[test]
fn a_container_that_cannot_be_snapshotted_is_down_for_its_backup_and_runs_again() {
    let scene = Scene::new();
    scene.create(200, &["--hostname", "web", "--mount", "/srv:32M"]);
    start_writing(&scene, 200);
    let provider = provider(&scene, Identity::MappedRoot);
    let (refused, log) = back_up(&scene, 200, BackupMode::Snapshot, &provider);
    assert!(refused.error.unwrap().contains("Use --mode stop"), "{log}");
    assert_eq!(scene.state(200), "running");
    let (report, log) = back_up(&scene, 200, BackupMode::Stop, &provider);
    assert_committed(&report, &log);
    assert_eq!(scene.state(200), "running", "{log}");
    assert_one_point_in_time(&provider.tar(&report.archive.unwrap()));
    scene.run(&["ct", "stop", "200", "--now"]);
    wait_for("nothing is left", || scene.leftovers().is_empty());
}

#[test]
fn a_failing_provider_does_not_keep_the_container_down() {
    let scene = Scene::new();
    scene.create(200, &["--mount", "/srv:32M"]);
    start_writing(&scene, 200);
    let mut provider = provider(&scene, Identity::MappedRoot);
    provider.script = Some("echo what went wrong >&2; exit 3".to_owned());
    let (report, log) = back_up(&scene, 200, BackupMode::Stop, &provider);
    assert_eq!(report.result, GuestResult::Failed);
    assert!(report.error.unwrap().contains("exit code 3: what went wrong"), "{log}");
    assert!(log.contains("what went wrong"), "commands' lines are in the log: {log}");
    assert_eq!(scene.state(200), "running");
}

/// Several snapshots of a container that writes, with each kind of volume.
fn snapshots(kind: Kind, storage: &str, format: &str) {
    let disk = LoopFs::new(kind).unwrap();
    let scene = Scene::new();
    scene.add_storage(storage, "fast", &disk.path());
    let more = ["--storage", "fast", "--format", format, "--mount", "/srv:32M"];
    scene.create(200, &more);
    start_writing(&scene, 200);
    for identity in [Identity::MappedRoot, Identity::Reader, Identity::MappedRoot] {
        let provider = provider(&scene, identity);
        let (report, log) = back_up(&scene, 200, BackupMode::Snapshot, &provider);
        assert_committed(&report, &log);
        assert_one_point_in_time(&provider.tar(&report.archive.unwrap()));
        assert_eq!(scene.state(200), "running");
        let names = std::fs::read_dir(disk.path().join("images/200")).unwrap();
        assert_eq!(names.count(), 2, "the snapshots are gone");
    }
    // It was not stopped: the writer goes on.
    let before = std::fs::read_to_string(scene.inside(200, "/root/a")).unwrap();
    wait_for("the writer goes on", || {
        std::fs::read_to_string(scene.inside(200, "/root/a")).is_ok_and(|now| now != before)
    });
    scene.run(&["ct", "stop", "200", "--now"]);
    wait_for("nothing is left", || scene.leftovers().is_empty());
}

#[test]
fn raw_images_on_xfs_are_snapshotted_at_one_point_in_time() {
    snapshots(Kind::Xfs, "dir", "raw");
}

#[test]
fn subvolumes_are_snapshotted_at_one_point_in_time() {
    snapshots(Kind::Btrfs, "btrfs", "subvol");
}

/// Scenario 60: a command sees the container's root as root, cannot write, and sees nothing of the host.
#[test]
fn commands_see_the_container_and_no_secret_of_the_host() {
    const LOOK: &str = "echo owner $(stat -c %u:%g /guest/root) self $(id -u); \
        touch /guest/new 2>/dev/null && echo CHANGED; \
        cat /etc/shadow 2>/dev/null && echo SECRET; \
        mknod /guest/dev/null9 c 1 3 2>/dev/null && echo DEVICE; \
        mount -t tmpfs none /tmp 2>/dev/null && echo MOUNTED; \
        echo root $(ls /); echo processes $(ls /proc | grep -c '^[0-9]')";
    let scene = Scene::new();
    scene.create(200, &[]);
    scene.create(201, &["--privileged"]);
    for id in [200, 201] {
        for (identity, own) in [(Identity::MappedRoot, "0"), (Identity::Reader, "65534")] {
            let mut provider = provider(&scene, identity);
            provider.script = Some(LOOK.to_owned());
            let (report, log) = back_up(&scene, id, BackupMode::Stop, &provider);
            assert_eq!(report.result, GuestResult::Committed, "{log}");
            let path = provider.tar(&report.archive.unwrap());
            let said = std::fs::read_to_string(path).unwrap();
            assert!(said.contains(&format!("owner 0:0 self {own}\n")), "{identity:?}: {said}");
            for bad in ["CHANGED", "SECRET", "DEVICE", "MOUNTED"] {
                assert!(!said.contains(bad), "{identity:?} of {id}: {said}");
            }
            for name in ["root ", "home", "boot", "srv", "work"] {
                let list = said.lines().find(|line| line.starts_with("root ")).unwrap();
                assert!(!list[5..].split(' ').any(|entry| entry == name.trim()), "{said}");
            }
        }
    }
}
