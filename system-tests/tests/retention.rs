// SPDX-License-Identifier: MIT OR Apache-2.0
//! Chains of backups of a real QEMU that are pruned in the middle: what stays is restored and
//! compared byte by byte, and backups go on.
//!
//! The VM is paused and has no operating system: its disks change only by what the test writes
//! through their devices, so the test knows every byte.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::path::PathBuf;
use std::time::Duration;

use qmp_client::{Options, Session};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use system_tests::process::Stop;
use system_tests::turn::Turn;
use system_tests::vzdump::{TASK_WITHIN, Vzdump};
use tempfile::TempDir;

const VM: &str = "100";
const COPY: &str = "101";
/// The second one is no multiple of a cluster.
const DISKS_BYTES: [usize; 2] = [24 << 20, (5 << 20) + 512];
/// QEMU answers a monitor command within this.
const SOON: Duration = Duration::from_secs(60);

/// One archive and what its disks must give.
struct Made {
    volid: String,
    disks: Vec<Vec<u8>>,
}

struct Scene {
    vzdump: Vzdump,
    dir: TempDir,
    runtime: tokio::runtime::Runtime,
    random: StdRng,
    disks: Vec<Vec<u8>>,
    made: Vec<Made>,
    _turn: Turn,
}

impl Scene {
    fn new() -> Self {
        let stop = Stop::default();
        let turn = Turn::wait(&stop).unwrap();
        let dir = tempfile::Builder::new().prefix("vz-keep-").tempdir_in("/var/tmp").unwrap();
        let etc = dir.path().join("etc");
        std::fs::create_dir_all(&etc).unwrap();
        let backups = dir.path().join("backups");
        let storages = format!(
            "directory: backups\n\tpath {}\n\tmax-protected-backups 2\n",
            backups.display()
        );
        std::fs::write(etc.join("storage.cfg"), storages).unwrap();
        let vzdump = Vzdump::find(dir.path(), true, &stop).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let seed = 20_261_128;
        let scene = Self {
            vzdump,
            dir,
            runtime,
            random: StdRng::seed_from_u64(seed),
            disks: DISKS_BYTES.iter().map(|size| vec![0; *size]).collect(),
            made: Vec::new(),
            _turn: turn,
        };
        let sizes = DISKS_BYTES.map(|size| size.to_string());
        let disks =
            ["--disk", &sizes[0], "--disk", &sizes[1], "--format", "qcow2", "--bus", "scsi"];
        let create = ["vm", "create", VM, "--name", "web", "--memory", "64"];
        scene.run(&[&create[..], &disks[..]].concat());
        scene.run(&["vm", "start", VM, "--paused"]);
        scene
    }

    fn run(&self, arguments: &[&str]) -> Value {
        self.vzdump.run(arguments, TASK_WITHIN).unwrap()
    }

    /// Runs a command that must fail with this reason.
    fn refused(&self, arguments: &[&str], reason: &str) {
        let finished = self.vzdump.finish(arguments, TASK_WITHIN).unwrap();
        let said = format!("{}{}", finished.stdout, finished.stderr);
        assert!(!finished.status.success() && said.contains(reason), "{arguments:?}: {said}");
    }

    /// Writes through the disks' devices, as a guest would.
    fn change(&mut self, requests: usize) {
        let mut commands = Vec::new();
        for _ in 0..requests {
            let disk = self.random.random_range(0..self.disks.len());
            let sectors = self.disks[disk].len() / 512;
            let start = self.random.random_range(0..sectors);
            let longest = if self.random.random_ratio(1, 4) { 4096 } else { 100 };
            let length = self.random.random_range(1..=longest).min(sectors - start) * 512;
            let start = start * 512;
            let zeroes = self.random.random_ratio(1, 4);
            let pattern = if zeroes { 0 } else { self.random.random_range(1..=255_u8) };
            let how = if zeroes { "-z".to_owned() } else { format!("-P {pattern}") };
            commands.push(format!("qemu-io -d scsi{disk} \"write {how} {start} {length}\""));
            self.disks[disk][start..start + length].fill(pattern);
        }
        let socket = self.dir.path().join(format!("run/vm/{VM}/qmp-spare.sock"));
        self.runtime.block_on(async {
            let session = Session::connect(socket, Options::default()).await.unwrap();
            for command in commands {
                let line = json!({ "command-line": command });
                let said = session.execute_raw("human-monitor-command", line, Some(SOON)).await;
                // It says nothing unless something is wrong.
                assert_eq!(said.unwrap(), json!(""), "{command}");
            }
        });
    }

    fn back_up(&mut self, more: &[&str]) -> Value {
        let backup = [&["backup", VM, "--storage", "backups"], more].concat();
        let report = self.run(&backup);
        let guest = report["guests"][0].clone();
        let volid = format!("backups:backup/{}", guest["archive"].as_str().unwrap());
        self.made.push(Made { volid, disks: self.disks.clone() });
        guest
    }

    fn volid(&self, at: usize) -> &str {
        &self.made[at].volid
    }

    fn archives(&self) -> Vec<Value> {
        self.run(&["list"])["archives"].as_array().unwrap().clone()
    }

    /// Exactly what is expected is there, each restores to its bytes, and nothing is left over.
    fn check(&self) {
        let listed = self.archives();
        let listed: Vec<_> = listed.iter().map(|a| a["volid"].as_str().unwrap()).collect();
        let expected: Vec<_> = self.made.iter().map(|made| made.volid.as_str()).collect();
        assert_eq!(listed, expected);
        for made in &self.made {
            self.run(&["restore", &made.volid, COPY, "--format", "raw"]);
            for (number, content) in made.disks.iter().enumerate() {
                let path = self.image(COPY, number);
                assert!(std::fs::read(path).unwrap() == *content, "{} differs", made.volid);
            }
            let images = self.image(COPY, 0).parent().unwrap().to_owned();
            std::fs::remove_dir_all(images).unwrap();
            let config = self.dir.path().join(format!("etc/qemu-server/{COPY}.conf"));
            std::fs::remove_file(config).unwrap();
        }
        let names = self.dir.path().join("backups").read_dir().unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let left: Vec<_> = names.filter(|name| name.starts_with(".tmp-")).collect();
        assert!(left.is_empty(), "{left:?}");
    }

    fn image(&self, vm: &str, number: usize) -> PathBuf {
        self.dir.path().join(format!("state/storage/images/{vm}/vm-{vm}-disk-{number}.raw"))
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = self.vzdump.finish(&["vm", "stop", VM, "--now"], SOON);
    }
}

fn actions(guest: &Value) -> Vec<&str> {
    let volumes = guest["volumes"].as_array().unwrap();
    volumes.iter().map(|volume| volume["bitmap_action"].as_str().unwrap()).collect()
}

#[test]
fn a_chain_pruned_in_the_middle_restores_exactly_and_goes_on() {
    let mut scene = Scene::new();
    scene.change(60);
    let full = scene.back_up(&[]);
    assert_eq!(actions(&full), ["new", "new"]);
    for _ in 0..5 {
        scene.change(12);
        let increment = scene.back_up(&["--notes-template", "{{guestname}} ({{vmid}})\\nmore"]);
        assert_eq!(actions(&increment), ["used", "used"]);
    }
    scene.check();

    // Nothing is done without being asked for.
    let prune = ["prune", VM, "--storage", "backups", "--keep-last", "2"];
    scene.refused(&prune[..4], "Nothing says what to keep");
    scene.run(&["protect", scene.volid(1)]);
    scene.refused(&["remove", scene.volid(1)], "is protected");
    let plan = scene.run(&[&prune[..], &["--dry-run"]].concat());
    let marks: Vec<_> = plan["archives"].as_array().unwrap().iter().map(|a| &a["mark"]).collect();
    assert_eq!(marks, ["remove", "protected", "remove", "remove", "keep", "keep"]);
    assert_eq!(plan["archives"][5]["rule"], "keep-last");
    scene.check();

    // The full backup and two in the middle go.
    let pruned = scene.run(&prune);
    let gone = |a: &&Value| a["mark"] == "removed";
    assert_eq!(pruned["archives"].as_array().unwrap().iter().filter(gone).count(), 3);
    for at in [3, 2, 0] {
        scene.made.remove(at);
    }
    scene.check();
    let listed = scene.archives();
    assert_eq!((&listed[0]["base"], &listed[0]["protected"]), (&Value::Null, &json!(true)));
    assert_eq!(listed[1]["base"], *scene.volid(0));
    assert_eq!(listed[1]["notes"], "web (100)");
    assert_eq!(scene.run(&["notes", scene.volid(1)])["notes"], "web (100)\nmore");

    // It goes on as an increment.
    scene.change(5);
    let next = scene.back_up(&[]);
    assert_eq!(actions(&next), ["used", "used"]);
    assert!(next["transferred"]["total_bytes"].as_u64().unwrap() < DISKS_BYTES[0] as u64);
    scene.check();
    assert_eq!(scene.run(&["doctor"])["pending"], json!([]));
}

#[test]
fn after_the_newest_archive_is_removed_the_next_backup_misses_nothing() {
    let mut scene = Scene::new();
    scene.change(30);
    scene.back_up(&[]);
    scene.change(8);
    scene.back_up(&[]);
    scene.run(&["remove", scene.volid(1)]);
    scene.made.pop();
    scene.check();
    // What only the removed archive held must not be missing: QEMU's bitmap began anew with it.
    scene.change(3);
    let next = scene.back_up(&[]);
    assert_eq!(actions(&next), ["invalid", "invalid"]);
    let all: usize = DISKS_BYTES.iter().sum();
    assert_eq!(next["transferred"]["total_bytes"], all);
    scene.check();
    scene.change(3);
    assert_eq!(actions(&scene.back_up(&[])), ["used", "used"]);
    scene.check();

    // A backup prunes, notes and protects at its end.
    scene.change(3);
    let options = ["--prune-backups", "keep-last=2", "--protected", "--notes-template", "kept"];
    let last = scene.back_up(&options);
    assert_eq!(last["warnings"], json!([]), "{last}");
    // The protected one is not counted.
    assert_eq!(last["pruned"], json!([scene.volid(0).rsplit('/').next().unwrap()]));
    scene.made.remove(0);
    scene.check();
    let listed = scene.archives();
    let newest = listed.last().unwrap();
    assert_eq!((&newest["protected"], &newest["notes"]), (&json!(true), &json!("kept")));

    // The limit holds for a backup and for the command.
    scene.run(&["protect", scene.volid(0)]);
    scene.refused(&["protect", scene.volid(1)], "may hold 2 protected archives");
    let protected = ["backup", VM, "--storage", "backups", "--protected"];
    scene.refused(&protected, "may hold 2 protected archives");
    scene.run(&["unprotect", scene.volid(0)]);
    scene.run(&["remove", scene.volid(0)]);
    scene.made.remove(0);
    scene.check();
}
