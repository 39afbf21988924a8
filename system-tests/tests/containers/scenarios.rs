// SPDX-License-Identifier: MIT OR Apache-2.0
//! Scenarios of containers, by their numbers in `docs/scenarios.md`; those about modes are in `backup`, those
//! about what a killed program leaves in `program`, those about hostile archives in `restore`.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use provider_api::Identity;
use rustix::fs::{CWD, FileType, Mode, OFlags, mkdirat, mknodat, openat};
use system_tests::loopfs::{Kind, LoopFs};
use system_tests::turn::Turn;
use vzdump_core::guest::BackupMode;
use vzdump_core::job::report::GuestResult;

use crate::backup::{assert_committed, assert_writes_on, back_up, member, provider, start_writing};
use crate::program::scene_with;
use crate::restore::restore;
use crate::scene::{Scene, wait_for};

fn said(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn members(tar: &Path) -> Vec<String> {
    said(Command::new("tar").arg("-tf").arg(tar)).lines().map(str::to_owned).collect()
}

fn edit_config(scene: &Scene, id: u32, edit: impl FnOnce(String) -> String) {
    let path = scene.root.join(format!("etc/lxc/{id}.conf"));
    std::fs::write(&path, edit(scene.config(id))).unwrap();
}

#[test]
fn a_locked_container_is_not_backed_up() {
    let scene = Scene::new();
    scene.create(200, &[]);
    edit_config(&scene, 200, |text| text + "lock: migrate\n");
    let provider = provider(&scene, Identity::MappedRoot);
    let (report, log) = back_up(&scene, 200, BackupMode::Stop, &provider);
    assert!(report.error.is_some_and(|error| error.contains("is locked (migrate)")), "{log}");
    assert_eq!(report.archive, None, "{log}");
}

#[test]
fn mount_points_65_only_those_with_backup_1_are_in_the_archive() {
    let scene = Scene::new();
    scene.create(200, &["--mount", "/srv:32M"]);
    let data = scene.root.join("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("of-the-host"), "").unwrap();
    let bind = format!("mp1: {},mp=/data,backup=1\n", data.display());
    for (backup, mode) in [
        ("backup=0", BackupMode::Suspend),
        ("backup=1", BackupMode::Suspend),
        ("backup=1", BackupMode::Stop),
        ("backup=0", BackupMode::Stop),
    ] {
        edit_config(&scene, 200, |text| {
            let lines = text.lines().filter(|line| !line.starts_with("mp1"));
            let text: String = lines.map(|line| format!("{line}\n")).collect();
            text.replace("backup=1", backup).replace("backup=0", backup) + &bind
        });
        if scene.state(200) == "stopped" {
            start_writing(&scene, 200);
            assert!(scene.inside(200, "/data/of-the-host").exists());
        }
        let provider = provider(&scene, Identity::MappedRoot);
        let (report, log) = back_up(&scene, 200, mode, &provider);
        assert_committed(&report, &log);
        let names = members(&provider.tar(&report.archive.unwrap()));
        let has = |name: &str| names.iter().any(|found| found == name);
        assert!(has("./root/a") && has("./srv/"), "{names:?}");
        assert_eq!(has("./srv/b"), backup == "backup=1", "{mode} {backup}: {names:?}");
        assert!(!names.iter().any(|name| name.contains("of-the-host")), "{names:?}");
        assert!(log.contains("exclude 'mp1' ('/data'): it belongs to the host"), "{log}");
        assert_eq!(log.contains("exclude 'mp0' ('/srv'): no 'backup=1'"), backup == "backup=0");
        assert_writes_on(&scene, 200);
    }
}

/// What reads the tree follows no link, so the volume behind it would be lost in silence.
#[test]
fn mount_points_65_behind_a_link_are_refused_before_the_container_is_stopped() {
    let scene = Scene::new();
    scene.create(200, &["--mount", "/srv:32M"]);
    start_writing(&scene, 200);
    symlink("../srv", scene.inside(200, "/var/data")).unwrap();
    scene.run(&["ct", "stop", "200", "--now"]);
    edit_config(&scene, 200, |text| text.replace("mp=/srv,", "mp=/var/data,"));
    let started = scene.run(&["ct", "start", "200"]);
    let notices = started["notices"].to_string();
    assert!(notices.contains("'mp0' at '/var/data'") && notices.contains("mp=/srv"), "{started}");
    wait_for("both volumes are written", || scene.inside(200, "/srv/b").exists());
    let provider = provider(&scene, Identity::MappedRoot);
    let refused = |mode| {
        let (report, log) = back_up(&scene, 200, mode, &provider);
        let error = report.error.unwrap_or_else(|| panic!("{log}"));
        for words in ["show 'mp0' at '/var/data'", "leads from there to '/srv'", "'mp=/srv'"] {
            assert!(error.contains(words), "{words}: {error}");
        }
        log
    };
    for mode in [BackupMode::Stop, BackupMode::Suspend] {
        let log = refused(mode);
        assert!(!log.contains("stopping") && !log.contains("first copy"), "{log}");
        assert_writes_on(&scene, 200);
    }
    scene.run(&["ct", "stop", "200", "--now"]);
    refused(BackupMode::Stop);
    edit_config(&scene, 200, |text| text.replace("mp=/var/data,", "mp=/srv,"));
    let (report, log) = back_up(&scene, 200, BackupMode::Stop, &provider);
    assert_committed(&report, &log);
    let names = members(&provider.tar(&report.archive.unwrap()));
    assert!(names.iter().any(|name| name == "./srv/b"), "{names:?}");
    wait_for("nothing is left", || scene.leftovers().is_empty());
}

#[test]
fn mount_points_65_in_a_volume_that_is_left_out_are_in_the_archive() {
    let scene = Scene::new();
    scene.create(200, &["--mount", "/srv:32M", "--mount", "/srv/data:32M"]);
    edit_config(&scene, 200, |text| text.replace("mp=/srv,backup=1", "mp=/srv,backup=0"));
    let provider = provider(&scene, Identity::MappedRoot);
    let (report, log) = back_up(&scene, 200, BackupMode::Stop, &provider);
    let error = report.error.unwrap_or_else(|| panic!("{log}"));
    for words in ["show 'mp1' at '/srv/data'", "'rootfs' has no such directory", "start the"] {
        assert!(error.contains(words), "{words}: {error}");
    }
    // Which makes the place.
    start_writing(&scene, 200);
    std::fs::write(scene.inside(200, "/srv/data/inner"), "inner").unwrap();
    chown(scene.inside(200, "/srv/data/inner"), Some(100_000), Some(100_000)).unwrap();
    for mode in [BackupMode::Suspend, BackupMode::Stop] {
        let (report, log) = back_up(&scene, 200, mode, &provider);
        assert_committed(&report, &log);
        let archive = report.archive.unwrap();
        let names = members(&provider.tar(&archive));
        let has = |name: &str| names.iter().any(|found| found == name);
        assert!(has("./srv/data/inner") && !has("./srv/b"), "{mode}: {names:?}");
        assert_writes_on(&scene, 200);
        if mode == BackupMode::Stop {
            let (report, log) = restore(&scene, &provider, &archive, 300, &Default::default());
            assert_eq!(report.error, None, "{log}");
        }
    }
}

/// The names in the newest archive of the directory provider, but for those that the writer makes and takes.
fn stored_names(scene: &Scene) -> Vec<String> {
    let find = said(Command::new("find").arg(scene.root.join("archives")).args([
        "-name",
        "tree.tar.zst",
        "-printf",
        "%T@ %p\n",
    ]));
    let newest = find.lines().max().unwrap().split_once(' ').unwrap().1.to_owned();
    let mut names = members(Path::new(&newest));
    names.retain(|name| !name.ends_with(".new"));
    names.sort();
    // A mount point is there twice if its volume has a file system of its own.
    names.dedup();
    names
}

/// Patterns, odd ones too; those with a slash at the end are about directories only.
const PATTERNS: [&str; 9] = [
    "/srv/x/cache",
    "*.bak",
    "**/c.tmp",
    "only/",
    "/srv/x/*/one",
    "y[0-9]",
    "[!a-z]odd",
    ".dot*",
    "/srv/x/two/**",
];
/// What is below `/srv/x` and stays, and what does not.
const KEPT: [&str; 9] = [
    "keep",
    "inner/cache/x",
    "deep/a/b/",
    "deep/a/one",
    "file/only",
    "ya",
    "a.bak.d/",
    "two/",
    "x.dot",
];
const GONE: [&str; 9] = [
    "a.bak",
    "cache/one",
    "cache/sub/two",
    "deep/a/b/c.tmp",
    "only/in",
    "inner/one",
    "y7",
    ".dots",
    "two/below",
];

#[test]
fn exclude_patterns_66_leave_the_same_out_in_every_mode() {
    let disk = LoopFs::new(Kind::Btrfs).unwrap();
    let scene = scene_with(Some(("btrfs", "subvol", &disk.path())));
    let top = scene.inside(200, "/srv/x");
    for file in KEPT
        .iter()
        .chain(&GONE)
        .map(|name| format!("{name}{}", if name.ends_with('/') { "in" } else { "" }))
    {
        let path = top.join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "").unwrap();
    }
    // Names that are no text, the second of them beyond what tools take for a line.
    for name in [&b"\xffodd"[..], b"new\nline\xfe.bak", b"kept\xff"] {
        std::fs::write(top.join(std::ffi::OsString::from_vec(name.to_vec())), "").unwrap();
    }
    std::fs::remove_file(top.join("two/in")).unwrap();
    said(Command::new("btrfs").args(["subvolume", "create"]).arg(top.join("nested")));
    std::fs::write(top.join("nested/not in the backup"), "").unwrap();
    let backup = |mode, patterns: &[&str]| {
        let mut arguments = vec!["backup", "200", "--mode", mode];
        patterns.iter().for_each(|pattern| arguments.extend(["--exclude-path", pattern]));
        let report = scene.run(&arguments);
        assert_eq!(report["guests"][0]["result"], "committed", "{report}");
        let nested = "'/srv/x/nested' belongs to another file system or subvolume";
        let log = report["guests"][0]["log_path"].as_str().unwrap();
        let log = std::fs::read_to_string(log).unwrap();
        assert_eq!(log.contains(nested), !patterns.contains(&"/s?v/"), "{mode}: {log}");
        stored_names(&scene)
    };
    let lists = ["snapshot", "suspend", "stop"].map(|mode| backup(mode, &PATTERNS));
    assert_eq!(lists[0], lists[1], "snapshot and suspend");
    assert_eq!(lists[0], lists[2], "snapshot and stop");
    let has = |name: &str| lists[0].iter().any(|found| found == &format!("./srv/x/{name}"));
    assert!(KEPT.iter().all(|kept| has(kept)), "{:?}", lists[0]);
    assert!(has("nested/") && !has("nested/not in the backup"), "{:?}", lists[0]);
    assert!(!GONE.iter().any(|gone| has(gone)), "{:?}", lists[0]);
    assert!(has("kept\\377") && !has("\\377odd") && !has("new\\nline\\376.bak"), "{:?}", lists[0]);

    // A mount point with all that is in its volume.
    let lists = ["snapshot", "suspend", "stop"].map(|mode| backup(mode, &["/s?v/"]));
    assert!(lists[0] == lists[1] && lists[0] == lists[2], "{lists:?}");
    assert!(!lists[0].iter().any(|name| name.contains("srv")), "{:?}", lists[0]);
    assert!(lists[0].iter().any(|name| name == "./root/a"), "{:?}", lists[0]);

    // What means nothing is refused before anything happens.
    let said = scene.fail(&["backup", "200", "--mode", "stop", "--exclude-path", "/srv/[a"]);
    assert!(said.contains("\"/srv/[a\"") && said.contains("without a ']'"), "{said}");
    assert_eq!(scene.state(200), "running");
}

/// What only a faithful copy has; owners are those on disk of the container's ids.
fn make_odd_things(dir: &Path) {
    let at = |name: &str| dir.join(name);
    std::fs::create_dir_all(at("a/b")).unwrap();
    for name in ["a/file", "a/linked", "plain"] {
        std::fs::write(at(name), name).unwrap();
    }
    std::fs::hard_link(at("a/linked"), at("a/b/linked too")).unwrap();
    symlink("nowhere", at("link")).unwrap();
    let node = |name: &str, kind| mknodat(CWD, at(name), kind, Mode::RWXU, 0).unwrap();
    node("fifo", FileType::Fifo);
    node("socket", FileType::Socket);
    node("whiteout", FileType::CharacterDevice);
    std::fs::write(at(&"n".repeat(255)), "").unwrap();
    let odd_name = std::ffi::OsString::from_vec(vec![b'x', 0xff, 0x80]);
    std::fs::write(dir.join(&odd_name), "").unwrap();
    chown(dir.join(&odd_name), Some(100_000), Some(100_000)).unwrap();
    let sparse = File::create(at("sparse")).unwrap();
    sparse.set_len(16 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"middle", 8 << 20).unwrap();
    said(Command::new("setfattr").args(["-n", "user.v", "-v", "value"]).arg(at("plain")));
    // Version 3, of the container's root.
    let capability = "0x0100000300200000000000000000000000000000a0860100";
    said(
        Command::new("setfattr")
            .args(["-n", "security.capability", "-v", capability])
            .arg(at("a/file")),
    );
    said(Command::new("setfacl").args(["-m", "u:100033:rx"]).arg(at("plain")));
    said(Command::new("setfacl").args(["-d", "-m", "g:100044:rx"]).arg(at("a/b")));
    for entry in said(Command::new("find").arg(dir).args(["-print0"])).split('\0') {
        // One name is no text.
        if !entry.is_empty() && Path::new(entry).symlink_metadata().is_ok() {
            rustix::fs::chownat(
                CWD,
                entry,
                Some(rustix::fs::Uid::from_raw(100_007)),
                Some(rustix::fs::Gid::from_raw(100_008)),
                rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
            )
            .unwrap();
        }
    }
    // A new owner has taken it away.
    said(
        Command::new("setfattr")
            .args(["-n", "security.capability", "-v", capability])
            .arg(at("a/file")),
    );
    said(Command::new("touch").args(["-d", "2001-02-03 04:05:06.789012345"]).arg(at("a/file")));
    said(Command::new("touch").args(["-d", "1999-02-03 04:05:06.123456789"]).arg(at("a/b")));
}

/// Everything but sockets, which have no meaning in an archive.
fn described(dir: &Path) -> String {
    let script = "find . ! -type s -printf '%P %y %m %U:%G %T@ %l\\n' | LC_ALL=C sort; \
        find . -type f -printf '%P %n %s\\n' | LC_ALL=C sort; \
        find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum; \
        find . ! -type s -print0 | LC_ALL=C sort -z | xargs -0 getfattr -h -d -m - -e hex --";
    said(Command::new("sh").args(["-c", script]).current_dir(dir))
}

#[test]
fn files_67_of_every_kind_survive_a_round_trip_in_every_mode() {
    let disk = LoopFs::new(Kind::Btrfs).unwrap();
    let scene = scene_with(Some(("btrfs", "subvol", &disk.path())));
    let odd = scene.inside(200, "/srv/odd");
    std::fs::create_dir(&odd).unwrap();
    make_odd_things(&odd);
    let before = described(&odd);
    assert!(before.contains("security.capability") && before.contains("posix_acl"), "{before}");
    for (mode, id) in [("snapshot", "300"), ("suspend", "301"), ("stop", "302")] {
        let report = scene.run(&["backup", "200", "--mode", mode]);
        let guest = &report["guests"][0];
        assert_eq!(guest["result"], "committed", "{report}");
        let ignored = guest["container"]["ignored"].to_string();
        assert!(ignored.contains("socket"), "{mode}: {report}");
        let archive = format!("store:backup/{}", guest["archive"].as_str().unwrap());
        let number = id.parse().unwrap();
        scene.expect(number);
        scene.run(&["restore", &archive, id, "--start"]);
        assert_eq!(described(&scene.inside(number, "/srv/odd")), before, "{mode}");
        scene.run(&["ct", "stop", id, "--now"]);
    }
}

/// A chain of directories, longer than any path that the kernel takes, and the last of them.
fn deep_directory(top: &Path, is_new: bool) -> OwnedFd {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let name = "d".repeat(250);
    let mut dir: OwnedFd = File::open(top).unwrap().into();
    for _ in 0..160 {
        if is_new {
            mkdirat(&dir, name.as_str(), Mode::RWXU).unwrap();
        }
        dir = openat(&dir, name.as_str(), flags, Mode::empty()).unwrap();
    }
    dir
}

/// Any user in a container can make such a thing.
#[test]
fn files_67_in_the_deepest_directories_come_back_in_every_mode() {
    let scene = Scene::with_archives();
    scene.create(200, &["--privileged"]);
    scene.run(&["ct", "start", "200"]);
    let last = deep_directory(&scene.inside(200, "/root"), true);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
    let file = openat(&last, "file", flags, Mode::RUSR).unwrap();
    File::from(file).write_all(b"deep").unwrap();
    drop(last);
    for (mode, id) in [("suspend", "300"), ("stop", "301")] {
        let report = scene.run(&["backup", "200", "--mode", mode]);
        let guest = &report["guests"][0];
        assert_eq!(guest["result"], "committed", "{report}");
        let archive = format!("store:backup/{}", guest["archive"].as_str().unwrap());
        let number = id.parse().unwrap();
        scene.expect(number);
        scene.run(&["restore", &archive, id, "--privileged", "--start"]);
        let last = deep_directory(&scene.inside(number, "/root"), false);
        let file = openat(&last, "file", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        assert_eq!(std::io::read_to_string(File::from(file)).unwrap(), "deep", "{mode}");
        drop(last);
        scene.run(&["ct", "stop", id, "--now"]);
    }
}

#[test]
fn a_custom_id_map_68_gives_the_owners_that_the_container_sees() {
    const MAP: &str = "lxc.idmap: u 0 100000 1000\nlxc.idmap: u 1000 110000 50000\n\
        lxc.idmap: g 0 100000 2000\nlxc.idmap: g 2000 120000 40000\n";
    let scene = Scene::new();
    scene.create(200, &["--mount", "/srv:32M"]);
    edit_config(&scene, 200, |text| text + MAP);
    start_writing(&scene, 200);
    for (name, uid, gid) in [("low", 100_999, 101_999), ("high", 110_000, 120_000)] {
        let path = scene.inside(200, &format!("/srv/{name}"));
        std::fs::write(&path, "").unwrap();
        chown(&path, Some(uid), Some(gid)).unwrap();
    }
    for (identity, mode) in [
        (Identity::MappedRoot, BackupMode::Suspend),
        (Identity::Reader, BackupMode::Suspend),
        (Identity::MappedRoot, BackupMode::Stop),
    ] {
        let provider = provider(&scene, identity);
        let (report, log) = back_up(&scene, 200, mode, &provider);
        assert_committed(&report, &log);
        let tar = provider.tar(&report.archive.unwrap());
        let list = said(Command::new("tar").args(["--numeric-owner", "-tvf"]).arg(tar));
        for (name, owner) in [("low", " 999/1999 "), ("high", " 1000/2000 "), ("b", " 0/0 ")] {
            let line = list.lines().find(|line| line.ends_with(&format!(" ./srv/{name}"))).unwrap();
            assert!(line.contains(owner), "{identity:?} {mode}: {line}");
        }
    }
}

#[test]
fn a_provider_that_keeps_the_files_open_69_is_told_and_the_copy_is_removed() {
    let scene = Scene::new();
    scene.create(200, &["--mount", "/srv:32M"]);
    start_writing(&scene, 200);
    let mut provider = provider(&scene, Identity::MappedRoot);
    provider.keeps = true;
    let (report, log) = back_up(&scene, 200, BackupMode::Suspend, &provider);
    assert_eq!(report.result, GuestResult::Committed, "the archive is complete: {log}");
    let told = "The provider still holds the container's files after the end of the backup";
    assert!(log.contains(told), "{log}");
    assert_writes_on(&scene, 200);
    let copies = || std::fs::read_dir(scene.root.join("state/tmp")).unwrap().count();
    assert_eq!(copies(), 0, "{log}");
    provider.kept.lock().unwrap().clear();
    scene.vzdump.finish(&["doctor", "--fix"], crate::scene::LIMIT).unwrap();
    scene.run(&["ct", "stop", "200", "--now"]);
    wait_for("nothing is left", || scene.leftovers().is_empty());
}

/// A provider has one state from the begin of a guest's backup to its end: also what it changes while the files are
/// read, which in a process of its own would be lost.
#[test]
fn what_a_provider_notes_70_it_knows_in_every_later_call() {
    let scene = Scene::new();
    scene.create(200, &[]);
    let mut provider = provider(&scene, Identity::MappedRoot);
    let (report, log) = back_up(&scene, 200, BackupMode::Stop, &provider);
    assert_committed(&report, &log);
    provider.script = Some("exit 3".to_owned());
    let (report, log) = back_up(&scene, 200, BackupMode::Stop, &provider);
    assert_eq!(report.result, GuestResult::Failed, "{log}");
    assert_eq!(*provider.ends.lock().unwrap(), ["begun read committed", "begun read aborted"]);
}

#[test]
fn a_firewall_configuration_74_that_is_not_there_is_none_and_not_an_empty_one() {
    let scene = Scene::new();
    scene.create(200, &[]);
    let provider = provider(&scene, Identity::MappedRoot);
    let file = scene.root.join("etc/firewall/200.fw");
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    for content in [None, Some(""), Some("[OPTIONS]\nenable: 1\n")] {
        match content {
            Some(text) => std::fs::write(&file, text).unwrap(),
            None => assert!(!file.exists()),
        }
        let (report, log) = back_up(&scene, 200, BackupMode::Stop, &provider);
        assert_committed(&report, &log);
        let kept = provider.firewall(&report.archive.unwrap());
        assert_eq!(kept.as_deref(), content.map(str::as_bytes), "{log}");
    }
}

/// The archive of a privileged container is made, with a warning, and what it is worth is said.
#[test]
fn a_privileged_container_71_is_backed_up_with_a_warning_and_refused_as_another_one() {
    let scene = scene_with(None);
    scene.create(201, &["--privileged", "--mount", "/srv:32M"]);
    start_writing(&scene, 201);
    let report = scene.run(&["backup", "201", "--mode", "suspend"]);
    let guest = &report["guests"][0];
    assert_eq!(guest["result"], "committed", "{report}");
    let log = std::fs::read_to_string(guest["log_path"].as_str().unwrap()).unwrap();
    assert!(log.contains("the container is privileged"), "{log}");
    let archive = format!("store:backup/{}", guest["archive"].as_str().unwrap());
    let refused = scene.fail(&["restore", &archive, "300"]);
    assert!(refused.contains("--privileged"), "{refused}");
    assert!(!scene.root.join("etc/lxc/300.conf").exists());
    scene.expect(300);
    scene.run(&["restore", &archive, "300", "--privileged", "--start"]);
    wait_for("the restored writer goes on", || scene.inside(300, "/srv/b").exists());
}

/// A VM of 8 MiB that has nothing to boot, but runs.
fn make_vm(scene: &Scene, id: u32) -> PathBuf {
    let disk = scene.root.join(format!("state/storage/images/{id}/vm-{id}-disk-0.raw"));
    std::fs::create_dir_all(disk.parent().unwrap()).unwrap();
    let content: Vec<u8> = (0..8_u32 << 20).map(|at| (at >> 9) as u8 ^ at as u8).collect();
    std::fs::write(&disk, content).unwrap();
    let config = scene.root.join(format!("etc/qemu-server/{id}.conf"));
    std::fs::create_dir_all(config.parent().unwrap()).unwrap();
    std::fs::write(
        config,
        format!("name: vm{id}\nmemory: 32\nscsi0: local:{id}/vm-{id}-disk-0.raw\n"),
    )
    .unwrap();
    disk
}

/// VMs that run and that do not, containers that run and that do not, one guest that cannot be backed up: one run.
#[test]
fn virtual_machines_and_containers_are_backed_up_in_one_run() {
    let _turn = Turn::wait(&system_tests::process::Stop::default()).unwrap();
    let scene = scene_with(None);
    scene.create(201, &[]);
    let disks = [make_vm(&scene, 100), make_vm(&scene, 101)];
    let broken = make_vm(&scene, 102);
    std::fs::remove_file(broken).unwrap();
    scene.run(&["vm", "start", "100"]);
    let finished = scene
        .vzdump
        .finish(&["backup", "--all", "--jobs", "2", "--mode", "snapshot"], crate::scene::LIMIT)
        .unwrap();
    let ended = scene.vzdump.finish(&["vm", "stop", "100", "--now"], crate::scene::LIMIT).unwrap();
    let report = system_tests::vzdump::last_json(&finished.stdout).unwrap();
    let guests = report["guests"].as_array().unwrap();
    let result = |id: u64| {
        let guest = guests.iter().find(|guest| guest["id"] == id).unwrap();
        format!("{} {}", guest["kind"].as_str().unwrap(), guest["result"].as_str().unwrap())
    };
    let expected = [
        (100, "qemu committed"),
        (101, "qemu committed"),
        (102, "qemu failed"),
        (200, "lxc committed"),
        (201, "lxc committed"),
    ];
    for (id, outcome) in expected {
        assert_eq!(result(id), outcome, "{id}: {report}");
    }
    assert!(!finished.status.success(), "one guest failed");
    assert!(ended.status.success(), "{}", ended.stderr);
    assert_writes_on(&scene, 200);
    let archive = |id: u64| {
        let guest = guests.iter().find(|guest| guest["id"] == id).unwrap();
        format!("store:backup/{}", guest["archive"].as_str().unwrap())
    };
    scene.expect(300);
    scene.run(&["restore", &archive(200), "300", "--start"]);
    wait_for("the restored writer goes on", || scene.inside(300, "/srv/b").exists());
    scene.run(&["restore", &archive(101), "301"]);
    let restored = scene.root.join("state/storage/images/301/vm-301-disk-0.raw");
    let both = [&disks[1], &restored].map(|path| std::fs::read(path).unwrap());
    assert!(both[0] == both[1], "the disk of the VM is restored exactly");
    assert_eq!(archive_count(&scene), 4, "four archives are listed");
}

fn archive_count(scene: &Scene) -> usize {
    scene.run(&["list"])["archives"].as_array().unwrap().len()
}

/// The tree cannot be changed, and the writer's numbers are those of the moment it was stopped.
#[test]
fn stop_mode_64_shows_a_tree_that_cannot_be_changed() {
    let scene = Scene::new();
    scene.create(200, &["--mount", "/srv:32M"]);
    start_writing(&scene, 200);
    let mut provider = provider(&scene, Identity::MappedRoot);
    provider.script = Some(
        "touch /guest/root/new /guest/srv/new 2>/dev/null && echo CHANGED; \
         rm -f /guest/root/a 2>/dev/null && echo CHANGED; cat /guest/root/a"
            .to_owned(),
    );
    let (report, log) = back_up(&scene, 200, BackupMode::Stop, &provider);
    assert_committed(&report, &log);
    let printed = std::fs::read_to_string(provider.tar(&report.archive.unwrap())).unwrap();
    assert!(printed.trim().parse::<u64>().is_ok(), "{printed}");
    assert_writes_on(&scene, 200);
    let provider = crate::backup::provider(&scene, Identity::Reader);
    let (report, log) = back_up(&scene, 200, BackupMode::Stop, &provider);
    assert_committed(&report, &log);
    assert!(!member(&provider.tar(&report.archive.unwrap()), "./root/a").is_empty());
}
