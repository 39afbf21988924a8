// SPDX-License-Identifier: MIT OR Apache-2.0
//! A real VM is backed up and restored by a provider that is a program of its own, the example in Python,
//! also when that program is killed.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use system_tests::console::Console;
use system_tests::lab::{BACKUPS, Backup, Lab, LabOptions, PLAIN_VIRTIO, SOURCE_VM};
use system_tests::process::Stop;
use system_tests::turn::Turn;
use tempfile::TempDir;

const PROGRAM: &str = include_str!("../../providers/examples/python/file-store.py");
const SOON: Duration = Duration::from_secs(90);
/// The last step before an archive is there, in the example's words.
const RENAME: &str = "            os.rename(backup.path, self.place(backup.archive))\n";

struct Scene {
    lab: Lab,
    dir: TempDir,
    _turn: Turn,
    next_vm: u32,
}

impl Scene {
    fn new() -> Self {
        let stop = Stop::default();
        let turn = Turn::wait(&stop).unwrap();
        let dir = tempfile::Builder::new().prefix("vz-rpc-").tempdir_in("/var/tmp").unwrap();
        let options = LabOptions {
            disk_bytes: 64 << 20,
            format: "qcow2",
            hardware: PLAIN_VIRTIO,
            rate_per_s: 300,
            show: true,
        };
        let lab = Lab::create(dir.path(), options, &stop).unwrap();
        let scene = Self { lab, dir, _turn: turn, next_vm: 200 };
        let path = scene.dir.path().join("etc/storage.cfg");
        let storages = fs::read_to_string(&path).unwrap();
        assert!(storages.contains("directory: backups"), "{storages}");
        fs::write(&path, storages.replace("directory: backups", "file-store: backups")).unwrap();
        scene.install(PROGRAM);
        scene
    }

    fn program(&self) -> PathBuf {
        self.dir.path().join("lib/providers/file-store")
    }

    /// Replaces the provider's program.
    fn install(&self, text: &str) {
        let (program, new) = (self.program(), self.dir.path().join("program.new"));
        fs::create_dir_all(program.parent().unwrap()).unwrap();
        fs::write(&new, text).unwrap();
        fs::set_permissions(&new, PermissionsExt::from_mode(0o755)).unwrap();
        fs::rename(new, program).unwrap();
    }

    /// The same program, but it kills itself once where it says so.
    fn install_killed(&self, place: &str, with: &str) {
        let mark = self.dir.path().join("killed");
        let _ = fs::remove_file(&mark);
        let mark = mark.display();
        let dies = format!(
            "            if not os.path.exists('{mark}'):\n                open('{mark}', 'w').close()\n                \
             os.kill(os.getpid(), 9)\n"
        );
        assert!(PROGRAM.contains(place), "the example has changed: {place}");
        self.install(&PROGRAM.replace(place, &with.replace("DIES\n", &dies)));
    }

    fn assert_restores(&mut self, backup: &Backup) {
        let vm = self.next_vm;
        self.next_vm += 1;
        self.lab.restore(&backup.volume, vm).unwrap();
        let report = self.lab.check_outside(vm, false).unwrap();
        assert!(report.problems.is_empty(), "{}", report.line());
    }

    fn assert_guest_writes(&self, console: &mut Console) {
        let before = console.records().unwrap().last;
        console.wait_for_record(before.max(1) + 50, SOON, &self.lab.stop).unwrap();
    }

    /// No process of the provider is left, and nothing of the backup.
    fn assert_tidy(&self) {
        let program = self.program();
        let waited = self.lab.stop.wait_for("the provider's end", SOON, || {
            Ok(pids_of(&program).is_empty().then_some(()))
        });
        waited.unwrap();
        let journals = self.dir.path().join("state/journal");
        let open: Vec<_> = journals.read_dir().unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(open.is_empty(), "{open:?}");
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        assert!(!mounts.contains(self.dir.path().to_str().unwrap()), "{mounts}");
    }
}

/// The processes that run this program.
fn pids_of(program: &Path) -> Vec<Pid> {
    let word = program.to_str().unwrap();
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let found = entries.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let line = fs::read_to_string(entry.path().join("cmdline")).ok()?;
        line.split('\0').any(|part| part == word).then(|| Pid::from_raw(pid))?
    });
    found.collect()
}

#[test]
fn a_program_backs_up_a_running_vm_and_its_death_costs_no_guest_anything() {
    let mut scene = Scene::new();
    let mut console = scene.lab.start(SOURCE_VM).unwrap().console;
    scene.assert_guest_writes(&mut console);
    let first = scene.lab.backup().unwrap();
    assert!(!first.is_increment());
    scene.assert_guest_writes(&mut console);
    let second = scene.lab.backup().unwrap();
    assert!(second.is_increment(), "{:?}", second.bitmap_actions);
    scene.assert_tidy();
    scene.assert_restores(&first);
    scene.assert_restores(&second);
    assert_eq!(scene.lab.archives().unwrap().len(), 2);

    println!("killed while it copies");
    let copies = "            piece = source.read(offset, count)\n";
    scene.install_killed(copies, &format!("{copies}DIES\n"));
    assert!(scene.lab.backup().is_err());
    assert_eq!(scene.lab.archives().unwrap().len(), 2);
    scene.assert_tidy();
    scene.assert_guest_writes(&mut console);

    println!("killed in the commit, before it is one");
    scene.install_killed(RENAME, &format!("DIES\n{RENAME}"));
    assert!(scene.lab.backup().is_err());
    assert_eq!(scene.lab.archives().unwrap().len(), 2);
    scene.assert_tidy();

    println!("killed in the commit, when it is one");
    scene.assert_guest_writes(&mut console);
    scene.install_killed(RENAME, &format!("{RENAME}DIES\n"));
    let third = scene.lab.backup().unwrap();
    assert!(third.is_increment(), "{:?}", third.bitmap_actions);
    assert_eq!(scene.lab.archives().unwrap().len(), 3);
    scene.assert_tidy();
    scene.assert_restores(&third);

    println!("killed from outside, and after that as always");
    scene.install(&PROGRAM.replace(copies, &format!("{copies}            time.sleep(0.2)\n")));
    let vm = SOURCE_VM.to_string();
    scene.assert_guest_writes(&mut console);
    let backup = scene.lab.vzdump.spawn_with(&["backup", &vm, "--storage", BACKUPS], &[]).unwrap();
    let program = scene.program();
    let data = scene.dir.path().join("backups");
    let waited = scene.lab.stop.wait_for("a copy under way", SOON, || {
        let copying = fs::read_dir(&data)?.flatten().any(|entry| {
            let is_new = entry.file_name().to_string_lossy().starts_with(".tmp-vzdump");
            is_new && entry.path().read_dir().is_ok_and(|names| names.count() > 1)
        });
        Ok(copying.then_some(()))
    });
    waited.unwrap();
    for pid in pids_of(&program) {
        kill_process(pid, Signal::KILL).unwrap();
    }
    let finished = backup.finish(SOON, &scene.lab.stop).unwrap();
    assert_eq!(finished.status.code(), Some(255), "{}", finished.stderr);
    assert!(finished.stdout.contains("signal: 9"), "{}", finished.stdout);
    scene.assert_tidy();
    scene.install(PROGRAM);
    let last = scene.lab.backup().unwrap();
    assert!(last.is_increment(), "{:?}", last.bitmap_actions);
    scene.assert_tidy();
    scene.assert_restores(&last);
}
