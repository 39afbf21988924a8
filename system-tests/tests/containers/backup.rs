// SPDX-License-Identifier: MIT OR Apache-2.0
//! Backups of containers: the modes, what is in the archive, and what commands beside it see.

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use provider_api::{GuestKind, Identity};
use system_tests::loopfs::{Kind, LoopFs};
use tokio_util::sync::CancellationToken;
use vzdump_core::bandwidth::Budget;
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
    TarProvider {
        dir: scene.root.join("archives"),
        identity,
        script: None,
        ignores_exit_codes: false,
        keeps: false,
        kept: Arc::default(),
        ends: Arc::default(),
    }
}

/// One backup; its report and its log.
pub(crate) fn back_up(
    scene: &Scene,
    id: u32,
    mode: BackupMode,
    provider: &TarProvider,
) -> (GuestReport, String) {
    back_up_with(scene, id, provider, |options| options.mode = mode)
}

/// The same with options.
pub(crate) fn back_up_with(
    scene: &Scene,
    id: u32,
    provider: &TarProvider,
    set: impl FnOnce(&mut BackupOptions),
) -> (GuestReport, String) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let lines = Lines::default();
    let mut options = BackupOptions::new("store");
    set(&mut options);
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
pub(crate) fn assert_one_point_in_time(tar: &Path) {
    let number = |name| member(tar, name).trim().parse::<u64>().unwrap();
    let (first, second) = (number("./root/a"), number("./srv/b"));
    assert!(second <= first && first <= second + 1, "a {first}, b {second}");
    let list = Command::new("tar").arg("-tvf").arg(tar).args(["--numeric-owner"]).output().unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    let line = list.lines().find(|line| line.ends_with(" ./root/a")).unwrap();
    assert!(line.contains(" 0/0 "), "the container's ids: {line}");
}

pub(crate) fn start_writing(scene: &Scene, id: u32) {
    scene.run(&["ct", "start", &id.to_string()]);
    wait_for("both volumes are written", || scene.inside(id, "/srv/b").exists());
}

pub(crate) fn assert_committed(report: &GuestReport, log: &str) {
    assert_eq!((report.result, &report.error), (GuestResult::Committed, &None), "{log}");
    assert_eq!(report.kind, GuestKind::Lxc);
    assert!(report.warnings.is_empty(), "{:?}", report.warnings);
}

pub(crate) fn assert_writes_on(scene: &Scene, id: u32) {
    assert_eq!(scene.state(id), "running");
    let read = || std::fs::read_to_string(scene.inside(id, "/root/a")).unwrap_or_default();
    let before = read();
    wait_for("the writer goes on", || !read().is_empty() && read() != before);
}

/// Raw images on a file system that does not share blocks.
#[test]
fn storage_without_snapshots_62_falls_back_to_suspend_with_a_warning() {
    let scene = Scene::new();
    scene.create(200, &["--hostname", "web", "--mount", "/srv:32M"]);
    start_writing(&scene, 200);
    let provider = provider(&scene, Identity::MappedRoot);
    for _ in 0..3 {
        let (report, log) = back_up(&scene, 200, BackupMode::Snapshot, &provider);
        assert_committed(&report, &log);
        assert!(log.contains("mode snapshot is not possible: 'local:200/"), "{log}");
        assert!(log.contains("mode suspend is used instead"), "{log}");
        assert!(report.point_in_time.downtime_ms.is_some(), "{log}");
        assert_writes_on(&scene, 200);
        assert_one_point_in_time(&provider.tar(&report.archive.unwrap()));
    }
    assert!(scene.leftovers().iter().all(|left| !left.contains("state/tmp")));
    let (report, log) = back_up(&scene, 200, BackupMode::Stop, &provider);
    assert_committed(&report, &log);
    assert_eq!(scene.state(200), "running", "{log}");
    assert!(report.point_in_time.downtime_ms.is_some(), "{log}");
    assert_one_point_in_time(&provider.tar(&report.archive.unwrap()));
    scene.run(&["ct", "stop", "200", "--now"]);
    wait_for("nothing is left", || scene.leftovers().is_empty());
}

#[test]
fn stop_mode_64_a_failing_provider_does_not_keep_the_container_down() {
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

/// Whatever the provider makes of the exit code.
#[test]
fn a_reader_that_is_killed_makes_no_archive() {
    let scene = Scene::new();
    scene.create(200, &[]);
    let mut provider = provider(&scene, Identity::MappedRoot);
    provider.script = Some("sh -c 'echo a part; kill -KILL $$'; exit $?".to_owned());
    provider.ignores_exit_codes = true;
    let (report, log) = back_up(&scene, 200, BackupMode::Stop, &provider);
    assert_eq!(report.result, GuestResult::Failed, "{log}");
    let error = report.error.unwrap();
    assert!(error.contains("was ended by signal 9"), "{error}");
    provider.script = Some("echo all; exit 3".to_owned());
    let (report, log) = back_up(&scene, 200, BackupMode::Stop, &provider);
    assert_eq!(report.result, GuestResult::Committed, "{log}");
}

/// A restore refuses it, so the backup tells of it.
#[test]
fn a_device_file_of_an_unprivileged_container_is_told() {
    let scene = Scene::new();
    scene.create(200, &[]);
    let image = scene.root.join("state/storage/images/200/vm-200-disk-0.raw");
    let mounted = Mounted::of(&image, &scene.root.join("mounted"));
    for name in ["dev/tty9", "srv/null"] {
        let made = Command::new("mknod").arg(mounted.0.join(name)).args(["c", "1", "3"]).status();
        assert!(made.unwrap().success());
    }
    mounted.end();
    let provider = provider(&scene, Identity::MappedRoot);
    let (report, log) = back_up(&scene, 200, BackupMode::Stop, &provider);
    assert_eq!(report.result, GuestResult::Committed, "{log}");
    assert!(log.contains("'/srv/null' is a device file"), "{log}");
    assert!(!log.contains("tty9"), "{log}");
    let (report, log) = back_up_with(&scene, 200, &provider, |options| {
        options.exclude = provider_api::Excludes::parse(&["/srv/null"]).unwrap();
    });
    assert_committed(&report, &log);
    assert!(!log.contains("is a device file"), "{log}");
}

/// What passes is counted where it comes out of the command, so the provider cannot be faster.
#[test]
fn a_bandwidth_limit_holds_for_what_a_command_writes() {
    const RATE: u64 = 1 << 20;
    let scene = Scene::new();
    scene.create(200, &[]);
    for identity in [Identity::MappedRoot, Identity::Reader] {
        let provider = provider(&scene, identity);
        let (report, log) = back_up_with(&scene, 200, &provider, |options| {
            options.bandwidth = Some(Budget::new(RATE));
        });
        assert_committed(&report, &log);
        let tar = provider.tar(&report.archive.unwrap());
        let bytes = std::fs::metadata(&tar).unwrap().len();
        assert!(bytes > RATE, "{bytes}");
        // A tenth of a second may be saved up.
        let least_ms = bytes * 1000 / RATE - 150;
        assert!(report.transfer_ms >= least_ms, "{} of {least_ms} ms", report.transfer_ms);
        assert_eq!(member(&tar, "./etc/inittab").lines().count(), 2);
    }
}

/// The stop cannot be called off, so the container is started when it has ended.
#[test]
fn stop_mode_64_a_backup_that_is_cancelled_while_the_container_stops_starts_it_again() {
    let scene = Scene::new();
    scene.create(200, &["--mount", "/srv:32M"]);
    start_writing(&scene, 200);
    let inittab = scene.inside(200, "/etc/inittab");
    let text = std::fs::read_to_string(&inittab).unwrap();
    std::fs::write(&inittab, text + "::shutdown:/bin/sleep 3\n").unwrap();
    scene.run(&["ct", "stop", "200"]);
    start_writing(&scene, 200);
    let provider = provider(&scene, Identity::MappedRoot);
    let options = BackupOptions { mode: BackupMode::Stop, ..BackupOptions::new("store") };
    let (ctx, lines, cancel) =
        (scene.context(&provider), Lines::default(), CancellationToken::new());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let report = runtime.block_on(async {
        let job = run_backup(&ctx, &[200], &provider, &options, &lines, &cancel);
        let cancelling = async {
            while !lines.text().contains("stopping the container") {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
            cancel.cancel();
        };
        tokio::join!(job, cancelling).0
    });
    assert!(report.guests[0].result != GuestResult::Committed, "{}", lines.text());
    // Not only in the moment before it goes down.
    std::thread::sleep(Duration::from_secs(4));
    assert_writes_on(&scene, 200);
}

/// LXC says that a container has stopped before its volumes are unmounted; here somebody else has one mounted.
#[test]
fn a_snapshot_of_a_stopped_container_has_what_is_written_when_it_is_unmounted() {
    let disk = LoopFs::new(Kind::Xfs).unwrap();
    let scene = Scene::new();
    scene.add_storage("dir", "fast", &disk.path());
    scene.create(200, &["--storage", "fast", "--format", "raw"]);
    let image = disk.path().join("images/200/vm-200-disk-0.raw");
    let place = scene.root.join("mounted");
    let mounted = Mounted::of(&image, &place);
    std::fs::write(place.join("root/late"), "late").unwrap();
    let ending = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(1500));
        mounted.end();
    });
    let provider = provider(&scene, Identity::MappedRoot);
    let (report, log) = back_up(&scene, 200, BackupMode::Snapshot, &provider);
    ending.join().unwrap();
    assert_committed(&report, &log);
    assert_eq!(member(&provider.tar(&report.archive.unwrap()), "./root/late"), "late");

    // As after a power failure: what was written last is in the journal only.
    let mounted = Mounted::of(&image, &place);
    std::fs::write(place.join("root/later"), "later").unwrap();
    std::fs::File::open(place.join("root/later")).unwrap().sync_all().unwrap();
    let cut_off = image.with_extension("cut");
    let mut copy = Command::new("cp");
    assert!(copy.arg("--reflink=always").args([&image, &cut_off]).status().unwrap().success());
    mounted.end();
    std::fs::rename(&cut_off, &image).unwrap();
    let (report, log) = back_up(&scene, 200, BackupMode::Snapshot, &provider);
    let error = report.error.unwrap_or_else(|| panic!("{log}"));
    assert!(error.contains("starting the container once mends it"), "{error}");
    scene.run(&["ct", "start", "200"]);
    scene.run(&["ct", "stop", "200", "--now"]);
    let (report, log) = back_up(&scene, 200, BackupMode::Snapshot, &provider);
    assert_committed(&report, &log);
    let tar = provider.tar(&report.archive.unwrap());
    assert_eq!(member(&tar, "./root/later"), "later");
}

/// Several snapshots of a container that writes, with each kind of volume.
fn snapshots(kind: Kind, storage: &str, format: &str) {
    let disk = LoopFs::new(kind).unwrap();
    let scene = Scene::new();
    scene.add_storage(storage, "fast", &disk.path());
    let more = ["--storage", "fast", "--format", format, "--mount", "/srv:32M"];
    scene.create(200, &more);
    start_writing(&scene, 200);
    for (identity, mode) in [
        (Identity::MappedRoot, BackupMode::Snapshot),
        (Identity::Reader, BackupMode::Snapshot),
        (Identity::Reader, BackupMode::Suspend),
        (Identity::MappedRoot, BackupMode::Suspend),
    ] {
        let provider = provider(&scene, identity);
        let (report, log) = back_up(&scene, 200, mode, &provider);
        assert_committed(&report, &log);
        assert_one_point_in_time(&provider.tar(&report.archive.unwrap()));
        assert_eq!(scene.state(200), "running");
        let names = std::fs::read_dir(disk.path().join("images/200")).unwrap();
        assert_eq!(names.count(), 2, "the snapshots are gone");
    }
    // It was not stopped.
    assert_writes_on(&scene, 200);
    scene.run(&["ct", "stop", "200", "--now"]);
    wait_for("nothing is left", || scene.leftovers().is_empty());
}

#[test]
fn two_volumes_61_on_xfs_are_of_one_point_in_time() {
    snapshots(Kind::Xfs, "dir", "raw");
}

#[test]
fn two_volumes_61_that_are_subvolumes_are_of_one_point_in_time() {
    snapshots(Kind::Btrfs, "btrfs", "subvol");
}

/// A directory that cannot hold the copy is named, and the container runs on.
#[test]
fn suspend_63_a_temporary_directory_that_will_not_do_is_named() {
    let scene = Scene::new();
    scene.create(200, &["--mount", "/srv:32M"]);
    start_writing(&scene, 200);
    std::fs::write(scene.inside(200, "/root/big"), vec![7; 8 << 20]).unwrap();
    let provider = provider(&scene, Identity::MappedRoot);
    let ramfs = Mounted::new(&scene.root.join("ramfs"), "ramfs", "");
    let small = Mounted::new(&scene.root.join("small"), "tmpfs", "size=4m");
    let cases = [
        (scene.root.join("none"), "does not exist"),
        (ramfs.0.clone(), "'tmpdir' in vzdump.conf"),
        (small.0.clone(), "the container's files need up to"),
    ];
    for (dir, why) in cases {
        let (report, log) = back_up_with(&scene, 200, &provider, |options| {
            options.mode = BackupMode::Suspend;
            options.temp_dir = Some(dir.clone());
        });
        let error = report.error.unwrap_or_else(|| panic!("{}: {log}", dir.display()));
        assert!(error.contains(why) && error.contains(dir.to_str().unwrap()), "{error}");
        assert_writes_on(&scene, 200);
        assert!(!dir.exists() || std::fs::read_dir(&dir).unwrap().next().is_none(), "{log}");
    }
    drop((ramfs, small));
    scene.run(&["ct", "stop", "200", "--now"]);
    wait_for("nothing is left", || scene.leftovers().is_empty());
}

/// A file system that is unmounted when this is dropped.
struct Mounted(std::path::PathBuf);

impl Mounted {
    fn new(path: &Path, kind: &str, options: &str) -> Self {
        std::fs::create_dir(path).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", kind, "-o", options, "none"]).arg(path);
        assert!(mount.status().unwrap().success());
        Self(path.to_owned())
    }

    /// The file system of an image.
    fn of(image: &Path, path: &Path) -> Self {
        std::fs::create_dir_all(path).unwrap();
        let mounted = Command::new("mount").args(["-o", "loop"]).arg(image).arg(path).status();
        assert!(mounted.unwrap().success());
        Self(path.to_owned())
    }

    /// In order: what was written to it is on its disk.
    fn end(self) {
        assert!(Command::new("umount").arg(&self.0).status().unwrap().success());
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // It may have ended.
        drop(Command::new("umount").args(["--quiet", "--lazy"]).arg(&self.0).status());
    }
}

/// A command sees the container's root as root, cannot write, and sees nothing of the host.
#[test]
fn commands_60_see_the_container_and_no_secret_of_the_host() {
    const LOOK: &str = "echo owner $(stat -c %u:%g /guest/root) self $(id -u); \
        touch /guest/new 2>/dev/null && echo CHANGED; \
        cat /etc/shadow 2>/dev/null && echo SECRET; \
        [ -w /proc/self/comm ] && echo KERNEL; \
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
            for bad in ["CHANGED", "SECRET", "KERNEL", "DEVICE", "MOUNTED"] {
                assert!(!said.contains(bad), "{identity:?} of {id}: {said}");
            }
            for name in ["root ", "home", "boot", "srv", "work"] {
                let list = said.lines().find(|line| line.starts_with("root ")).unwrap();
                assert!(!list[5..].split(' ').any(|entry| entry == name.trim()), "{said}");
            }
        }
    }
}
