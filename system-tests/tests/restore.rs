// SPDX-License-Identifier: MIT OR Apache-2.0
//! Restores of a real guest: over the guest itself, single disks, and what a kill leaves.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Signal;
use system_tests::lab::{BACKUPS, Checked, Lab, LabOptions, SOURCE_VM, VIRTIO_WITH_THREADS};
use system_tests::process::{Collected, Finished, Stop};
use system_tests::turn::Turn;
use tempfile::TempDir;

const SOON: Duration = Duration::from_secs(120);
/// Ends `vzdump` by SIGKILL when its task reaches this step.
const KILL_AT: &str = "VZDUMP_TEST_KILL_AT";
/// Steps of a restore before the new configuration is in place, and after it.
const BEFORE: [&str; 7] = [
    "entry:replace",
    "entry:directory",
    "restore:offered",
    "entry:volume",
    "restore:allocated",
    "restore:filled",
    "entry:switch",
];
const AFTER: [&str; 3] = ["restore:switched", "entry:complete", "restore:finished"];

struct Scene {
    lab: Lab,
    dir: TempDir,
    archive: String,
    /// What the guest had written at the point in time, and at its end.
    saved: Checked,
    last: Checked,
    _turn: Turn,
}

impl Scene {
    /// A guest that is backed up, writes on, and is switched off.
    fn new(format: &'static str) -> Self {
        let stop = Stop::default();
        let turn = Turn::wait(&stop).unwrap();
        let dir = tempfile::Builder::new().prefix("vz-res-").tempdir_in("/var/tmp").unwrap();
        let options = LabOptions {
            disk_bytes: 48 << 20,
            format,
            hardware: VIRTIO_WITH_THREADS,
            rate_per_s: 300,
            show: true,
        };
        let mut lab = Lab::create(dir.path(), options, &stop).unwrap();
        let mut console = lab.start(SOURCE_VM).unwrap().console;
        console.wait_for_record(200, SOON, &stop).unwrap();
        let archive = lab.backup().unwrap().volume;
        let at = console.records().unwrap().last;
        console.wait_for_record(at + 300, SOON, &stop).unwrap();
        lab.stop_vm(SOURCE_VM).unwrap();
        let mut scene = Self { lab, dir, archive, saved: none(), last: none(), _turn: turn };
        scene.last = scene.check(SOURCE_VM, true);
        scene.lab.restore(&scene.archive, 300).unwrap();
        scene.saved = scene.check(300, false);
        assert!(scene.saved.last_b < scene.last.last_b, "{:?}", (scene.saved, scene.last));
        scene
    }

    fn check(&self, vm: u32, allow_in_flight: bool) -> Checked {
        let report = self.lab.check_outside(vm, allow_in_flight).unwrap();
        assert!(report.problems.is_empty(), "{}", report.line());
        Checked { last_a: report.last_a, last_b: report.last_b, in_flight_sectors: 0 }
    }

    fn spawn(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Collected {
        let vm = SOURCE_VM.to_string();
        let fixed = ["restore", &self.archive, &vm, "--allow-raw-config"];
        let arguments = [fixed.as_slice(), arguments].concat();
        self.lab.vzdump.spawn_with(&arguments, environment).unwrap()
    }

    fn restore(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Finished {
        self.spawn(arguments, environment).finish(SOON, &self.lab.stop).unwrap()
    }

    fn config_path(&self) -> PathBuf {
        self.dir.path().join(format!("etc/qemu-server/{SOURCE_VM}.conf"))
    }

    fn config(&self) -> String {
        std::fs::read_to_string(self.config_path()).unwrap()
    }

    fn images(&self) -> BTreeSet<PathBuf> {
        let folder = self.dir.path().join(format!("local/images/{SOURCE_VM}"));
        folder.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    fn doctor(&self) {
        self.lab.vzdump.run(&["doctor", "--fix"], SOON).unwrap();
        let journals = self.dir.path().join("state/journal");
        let open: Vec<_> = journals.read_dir().unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(open.is_empty(), "{open:?}");
    }
}

fn none() -> Checked {
    Checked { last_a: 0, last_b: 0, in_flight_sectors: 0 }
}

#[test]
fn restore_over_an_existing_vm_killed_anywhere_leaves_the_old_one_or_the_new_one() {
    let mut scene = Scene::new("qcow2");
    let (config, images) = (scene.config(), scene.images());
    for step in BEFORE {
        println!("killed at {step}");
        let finished = scene.restore(&["--force"], &[(KILL_AT, step)]);
        assert_eq!(finished.status.signal(), Some(9), "{step}: {}", finished.stderr);
        // And what undoes it is killed, too.
        let doctor =
            scene.lab.vzdump.spawn_with(&["doctor", "--fix"], &[(KILL_AT, "restore:freed")]);
        let finished = doctor.unwrap().finish(SOON, &scene.lab.stop).unwrap();
        assert_eq!(finished.status.signal(), Some(9), "{step}: {}", finished.stderr);
        scene.doctor();
        assert_eq!((scene.config(), scene.images()), (config.clone(), images.clone()), "{step}");
        assert_eq!(scene.check(SOURCE_VM, true), scene.last, "{step}");
    }
    let path = scene.config_path();
    println!("a power cut that brings the old configuration back");
    let finished = scene.restore(&["--force"], &[(KILL_AT, "entry:complete")]);
    assert_eq!(finished.status.signal(), Some(9), "{}", finished.stderr);
    std::fs::rename(&path, path.with_file_name(format!(".{SOURCE_VM}.conf.restore"))).unwrap();
    std::fs::write(&path, &config).unwrap();
    scene.doctor();
    assert_eq!((scene.config(), scene.images()), (config.clone(), images.clone()));
    assert_eq!(scene.check(SOURCE_VM, true), scene.last);
    println!("a configuration that is changed meanwhile");
    let mut restore = scene.spawn(&["--force"], &[("VZDUMP_TEST_STOP_AT", "restore:filled")]);
    restore.process().wait_until_stopped(SOON, &scene.lab.stop).unwrap();
    let changed = format!("{config}tags: changed\n");
    std::fs::write(&path, &changed).unwrap();
    restore.process().signal(Signal::CONT).unwrap();
    let finished = restore.finish(SOON, &scene.lab.stop).unwrap();
    let said = format!("{}{}", finished.stdout, finished.stderr);
    assert!(!finished.status.success() && said.contains("100.conf' was changed"), "{said}");
    assert_eq!((scene.config(), scene.images()), (changed, images));
    for step in AFTER {
        println!("killed at {step}");
        let before = scene.images();
        let finished = scene.restore(&["--force"], &[(KILL_AT, step)]);
        assert_eq!(finished.status.signal(), Some(9), "{step}: {}", finished.stderr);
        scene.doctor();
        assert!(scene.images().is_disjoint(&before) && scene.images().len() == 2, "{step}");
        assert_eq!(scene.check(SOURCE_VM, false), scene.saved, "{step}");
    }
    let finished = scene.restore(&["--force", "--in-place", "--unique"], &[]);
    assert!(finished.status.success(), "{}", finished.stderr);
    // And it is a guest that runs, and can be backed up again.
    let running = scene.lab.start(SOURCE_VM).unwrap();
    assert_eq!(running.checked.last_b, scene.saved.last_b);
    let next = scene.lab.backup().unwrap();
    assert!(!next.is_increment(), "the disks are others: {:?}", next.bitmap_actions);
    assert_eq!(scene.lab.archives().unwrap().len(), 2);
    assert!(next.volume.starts_with(BACKUPS));
}

#[test]
fn a_single_disk_of_a_guest_comes_back_and_the_other_one_stays() {
    let scene = Scene::new("raw");
    let before = scene.images();
    let finished = scene.restore(&["--disk", "virtio0", "--disk", "virtio1"], &[]);
    assert!(finished.status.success(), "{}", finished.stderr);
    let config = scene.config();
    assert!(config.contains("unused0:") && config.contains("unused1:"), "{config}");
    assert!(scene.images().is_superset(&before), "the replaced disks are kept");
    for image in &before {
        std::fs::remove_file(image).unwrap();
    }
    assert_eq!(scene.check(SOURCE_VM, false), scene.saved);
}
