// SPDX-License-Identifier: MIT OR Apache-2.0
//! A restore in the place of a container that is there: the old one or the new one, wherever it ends.

use std::path::{Path, PathBuf};

use lxc_backend::restore::CtRestoreOptions;
use provider_api::Identity;

use system_tests::loopfs::{Kind, LoopFs};

use crate::backup::provider;
use crate::restore::{restore, tar_of};
use crate::scene::{LIMIT, Scene, wait_for};

const RULES: &str = "[RULES]\nIN ACCEPT -p tcp -dport 22\n";

/// A host with the stopped container 200, one archive of it, and what was done to it since.
struct Replaced {
    scene: Scene,
    volid: String,
}

impl Replaced {
    fn new() -> Self {
        let scene = Scene::with_archives();
        scene.create(200, &["--hostname", "web", "--mount", "/srv:32M"]);
        let rules = scene.root.join("etc/firewall/200.fw");
        std::fs::create_dir_all(rules.parent().unwrap()).unwrap();
        std::fs::write(&rules, RULES).unwrap();
        let config = scene.root.join("etc/lxc/200.conf");
        let net = "net0: name=eth0,hwaddr=BC:24:11:00:00:01,type=veth\n";
        std::fs::write(&config, format!("{}{net}", scene.config(200))).unwrap();
        let report = scene.run(&["backup", "200"]);
        assert_eq!(report["guests"][0]["result"], "committed", "{report}");
        let volid = scene.run(&["list"])["archives"][0]["volid"].as_str().unwrap().to_owned();
        // A volume that the archive does not know, and rules that it replaces.
        let later = scene.root.join("state/storage/images/200/vm-200-disk-2.raw");
        std::fs::write(later, "later").unwrap();
        let more = "mp1: local:200/vm-200-disk-2.raw,mp=/cache,size=4M\n";
        std::fs::write(&config, format!("{}{more}", scene.config(200))).unwrap();
        std::fs::write(&rules, "[OPTIONS]\nenable: 0\n").unwrap();
        Self { scene, volid }
    }

    fn images(&self) -> Vec<String> {
        let dir = self.scene.root.join("state/storage/images/200");
        let entries = std::fs::read_dir(dir).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The configuration and the content of all that it names.
    fn state(&self) -> (String, Vec<(String, blake3::Hash)>) {
        let hashed = |name: String| {
            let path = self.scene.root.join("state/storage/images/200").join(&name);
            let hash = blake3::hash(&std::fs::read(path).unwrap());
            (name, hash)
        };
        (self.scene.config(200), self.images().into_iter().map(hashed).collect())
    }

    fn restore<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        [&["restore", &self.volid, "200"], more].concat()
    }
}

#[test]
fn a_container_is_replaced_and_keeps_what_the_archive_lacks() {
    let test = Replaced::new();
    let scene = &test.scene;
    let before = test.state();
    let refused = scene.fail(&test.restore(&[]));
    assert!(refused.contains("exists already"), "{refused}");
    let plan = scene.run(&test.restore(&["--force", "--unique", "--dry-run"]));
    assert_eq!((&plan["kind"], &plan["privileged"]), (&"lxc".into(), &false.into()), "{plan}");
    assert_eq!((&plan["replaces"], &plan["firewall"]), (&true.into(), &true.into()), "{plan}");
    assert_eq!(plan["unused"][0], "local:200/vm-200-disk-2.raw", "{plan}");
    assert_eq!(plan["removed"].as_array().unwrap().len(), 2, "{plan}");
    assert_eq!(plan["space"][0]["needed_bytes"], 96 << 20, "{plan}");
    assert_eq!(test.state(), before, "a dry run changes nothing");
    let report = scene.run(&test.restore(&["--force", "--unique"]));
    assert_eq!(report["removed"].as_array().unwrap().len(), 2, "{report}");
    let config = scene.config(200);
    assert!(!config.contains("BC:24:11:00:00:01"), "{config}");
    let net = config.lines().find(|line| line.starts_with("net0:")).unwrap();
    assert_eq!(
        config.replace(&format!("{net}\n"), ""),
        "hostname: web\nunprivileged: 1\nrootfs: local:200/vm-200-disk-3.raw,size=64M\n\
         mp0: local:200/vm-200-disk-4.raw,mp=/srv,backup=1,size=32M\n\
         unused0: local:200/vm-200-disk-2.raw\n"
    );
    assert_eq!(test.images(), ["vm-200-disk-2.raw", "vm-200-disk-3.raw", "vm-200-disk-4.raw"]);
    let rules = std::fs::read_to_string(scene.root.join("etc/firewall/200.fw")).unwrap();
    assert_eq!(rules, RULES);
    assert_eq!(scene.leftovers(), [""; 0]);
    std::fs::write(scene.root.join("etc/lxc/200.conf"), config.replace(&format!("{net}\n"), ""))
        .unwrap();
    scene.run(&["ct", "start", "200"]);
    wait_for("the restored container is up", || scene.inside(200, "/srv/b").exists());
    let refused = scene.fail(&test.restore(&["--force"]));
    assert!(refused.contains("is running"), "{refused}");
}

#[test]
fn a_restore_that_fails_leaves_the_old_container() {
    let test = Replaced::new();
    let scene = &test.scene;
    let provider = provider(scene, Identity::MappedRoot);
    let config = "rootfs: local:200/a.raw,size=64M\nunprivileged: 1\n";
    let harm = tar_of(scene, "harm.tar", &[("a", b'0', "", b"x"), ("../b", b'0', "", b"x")]);
    let before = test.state();
    provider.plant("harm", config, &harm);
    let force = CtRestoreOptions { force: true, ..CtRestoreOptions::default() };
    let (report, log) = restore(scene, &provider, "harm", 200, &force);
    assert!(report.error.is_some_and(|error| error.contains("leads upwards")), "{log}");
    provider.plant("root", "rootfs: local:200/a.raw,size=64M\n", &scene.template);
    let (report, log) = restore(scene, &provider, "root", 200, &force);
    assert!(report.error.is_some_and(|error| error.contains("Use --privileged")), "{log}");
    provider.plant("huge", "rootfs: local:200/a.raw,size=900T\nunprivileged: 1\n", &scene.template);
    let (report, log) = restore(scene, &provider, "huge", 200, &force);
    assert!(report.error.is_some_and(|error| error.contains("--overcommit")), "{log}");
    assert_eq!(test.state(), before);
    assert_eq!(scene.leftovers(), [""; 0]);
    // A configuration that is changed meanwhile.
    let stop = system_tests::process::Stop::default();
    let environment = [("VZDUMP_TEST_STOP_AT", "restore:filled")];
    let mut running = scene.vzdump.spawn_with(&test.restore(&["--force"]), &environment).unwrap();
    running.process().wait_until_stopped(LIMIT, &stop).unwrap();
    let changed = format!("{}tags: changed\n", before.0);
    std::fs::write(scene.root.join("etc/lxc/200.conf"), &changed).unwrap();
    running.process().signal(rustix::process::Signal::CONT).unwrap();
    let failed = running.finish(LIMIT, &stop).unwrap();
    let said = format!("{}{}", failed.stdout, failed.stderr);
    assert!(!failed.status.success() && said.contains("200.conf' was changed"), "{said}");
    assert_eq!(test.state(), (changed, before.1));
    wait_for("everything is unmounted", || scene.leftovers().is_empty());
}

#[test]
fn a_restore_that_is_killed_leaves_the_old_container_or_the_new_one() {
    let test = Replaced::new();
    let scene = &test.scene;
    let steps = [
        ("entry:replace", false),
        ("entry:volume", false),
        ("entry:directory", false),
        ("restore:allocated", false),
        ("restore:filled", false),
        ("entry:switch", false),
        ("restore:switched", true),
        ("entry:complete", true),
        ("restore:finished", true),
    ];
    for (step, is_new) in steps {
        let before = test.state();
        let environment = [("VZDUMP_TEST_KILL_AT", step)];
        let killed = scene.vzdump.spawn_with(&test.restore(&["--force"]), &environment).unwrap();
        let killed = killed.finish(LIMIT, &system_tests::process::Stop::default()).unwrap();
        assert!(!killed.status.success(), "{step} was not reached: {}", killed.stdout);
        scene.run(&["doctor", "--fix"]);
        wait_for("everything is unmounted", || scene.leftovers().is_empty());
        let after = test.state();
        if is_new {
            assert_ne!(after.0, before.0, "{step}");
        } else {
            assert_eq!(after, before, "{step}");
        }
        // Nothing but what the configuration names, and all of that.
        for (name, _) in &after.1 {
            assert!(after.0.contains(name.as_str()), "{step}: {name} of {}", after.0);
        }
        assert_eq!(after.0.matches(".raw").count(), after.1.len(), "{step}: {}", after.0);
        let staged: PathBuf = scene.root.join("etc/lxc/.200.conf.restore");
        assert!(!staged.exists(), "{step}");
    }
    let config = scene.config(200);
    let without_net: String = config
        .lines()
        .filter(|line| !line.starts_with("net0:"))
        .map(|l| format!("{l}\n"))
        .collect();
    std::fs::write(scene.root.join("etc/lxc/200.conf"), without_net).unwrap();
    scene.run(&["ct", "start", "200"]);
    wait_for("the restored container is up", || scene.inside(200, "/srv/b").exists());
}

/// As systemd makes them by itself; read-only ones as a user's snapshots.
#[test]
fn a_container_with_subvolumes_in_it_is_replaced_and_backed_up_again() {
    let disk = LoopFs::new(Kind::Btrfs).unwrap();
    let scene = Scene::with_archives();
    scene.add_storage("btrfs", "fast", &disk.path());
    scene.create(200, &["--storage", "fast", "--format", "subvol"]);
    let root = disk.path().join("images/200/subvol-200-disk-0.subvol");
    let btrfs = |arguments: &[&str]| {
        let mut command = std::process::Command::new("btrfs");
        assert!(command.args(arguments).current_dir(&root).status().unwrap().success());
    };
    for path in ["var/machines", "srv/a b", "srv/a b/inner", "srv/a b/inner/deep"] {
        btrfs(&["-q", "subvolume", "create", path]);
    }
    btrfs(&["-q", "subvolume", "snapshot", "-r", ".", "srv/a b/old"]);
    // A name that looks like a line about a subvolume of somebody else.
    let other = disk.path().join("others");
    btrfs(&["-q", "subvolume", "create", other.to_str().unwrap()]);
    let number = |path: &Path| {
        let mut command = std::process::Command::new("btrfs");
        let output = command.args(["inspect-internal", "rootid"]).arg(path).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    let line = format!("x\nID {} gen 7 top level {} path y", number(&other), number(&root));
    btrfs(&["-q", "subvolume", "create", &line]);
    for path in ["srv/a b/inner", "srv/a b", "."] {
        btrfs(&["property", "set", "-t", "subvol", path, "ro", "true"]);
    }
    scene.run(&["backup", "200"]);
    let volid = scene.run(&["list"])["archives"][0]["volid"].as_str().unwrap().to_owned();
    let report = scene.run(&["restore", &volid, "200", "--force"]);
    assert_eq!(report["removed"][0], "fast:200/subvol-200-disk-0.subvol", "{report}");
    assert!(!root.exists() && other.exists());
    scene.run(&["doctor"]);
    let report = scene.run(&["backup", "200"]);
    assert_eq!(report["guests"][0]["result"], "committed", "{report}");
}

/// A pattern left the volume out, so nothing of it comes back: not even where an archive says that it is in it.
#[test]
fn a_volume_that_a_pattern_left_out_survives() {
    let scene = Scene::with_archives();
    scene.create(200, &["--mount", "/srv:32M"]);
    let image = scene.root.join("state/storage/images/200/vm-200-disk-1.raw");
    let content = blake3::hash(&std::fs::read(&image).unwrap());
    let assert_whole = || {
        let now = std::fs::read(&image).expect("the volume is not removed");
        assert!(blake3::hash(&now) == content, "the volume is as it was");
    };
    let mount = "mp0: local:200/vm-200-disk-1.raw,mp=/srv,backup=1,size=32M";
    assert!(scene.config(200).contains(mount), "{}", scene.config(200));
    let report = scene.run(&["backup", "200", "--exclude-path", "/srv"]);
    assert_eq!(report["guests"][0]["result"], "committed", "{report}");
    let list = scene.run(&["list"]);
    let volid = list["archives"][0]["volid"].as_str().unwrap();
    let report = scene.run(&["restore", volid, "200", "--force"]);
    assert_eq!(report["removed"].as_array().unwrap().len(), 1, "{report}");
    assert!(scene.config(200).contains(mount), "{}", scene.config(200));
    assert_whole();
    // As archives said before.
    let provider = provider(&scene, Identity::MappedRoot);
    let config = format!("rootfs: local:200/a.raw,size=64M\n{mount}\nunprivileged: 1\n");
    provider.plant("old", &config, &tar_of(&scene, "old.tar", &[("a", b'0', "", b"x")]));
    let force = CtRestoreOptions { force: true, ..CtRestoreOptions::default() };
    let (report, log) = restore(&scene, &provider, "old", 200, &force);
    assert_eq!(report.error, None, "{log}");
    let unused = "unused0: local:200/vm-200-disk-1.raw";
    assert!(scene.config(200).contains(unused), "{}", scene.config(200));
    assert!(log.contains("stays as an unused volume"), "{log}");
    assert_eq!(report.removed.len(), 1, "{log}");
    assert_whole();
}
