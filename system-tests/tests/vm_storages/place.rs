// SPDX-License-Identifier: MIT OR Apache-2.0
//! An installation with one VM whose guest does not run: its disks are written over the monitor, so that a
//! test knows every byte and needs no time to boot.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use qmp_client::{Options, Session};
use rustix::process::Signal;
use serde_json::{Value, json};
use system_tests::lab::storages;
use system_tests::process::{Collected, Finished, Stop};
use system_tests::vzdump::{Vzdump, last_json};

pub const MIB: u64 = 1 << 20;
pub const SOON: Duration = Duration::from_secs(60);
/// A stalled storage is given up after 45 s.
pub const LATE: Duration = Duration::from_secs(150);
const STORE: [&str; 2] = ["--storage", "backups"];

pub struct Place {
    pub vzdump: Vzdump,
    pub stop: Stop,
    dir: tempfile::TempDir,
}

impl Place {
    /// Storages `local` and `backups`, and what `more` says.
    pub fn new(more: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("vz-st-").tempdir_in("/var/tmp").unwrap();
        let stop = Stop::default();
        let vzdump = Vzdump::find(dir.path(), true, &stop).unwrap();
        let place = Self { vzdump, stop, dir };
        fs::create_dir_all(place.path("etc")).unwrap();
        let text = format!("{}\n{more}", storages(place.dir.path()));
        fs::write(place.path("etc/storage.cfg"), text).unwrap();
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn run(&self, arguments: &[&str]) -> Value {
        self.vzdump.run(arguments, SOON).unwrap()
    }

    /// Makes VM 100 with SCSI disks; more options of `vm create` follow.
    pub fn create(&self, options: &[&str]) {
        self.run(&[&["vm", "create", "100", "--bus", "scsi", "--memory", "64"], options].concat());
    }

    pub fn start(&self) {
        self.run(&["vm", "start", "100", "--paused"]);
    }

    pub fn stop_vm(&self) {
        self.run(&["vm", "stop", "100"]);
    }

    pub fn kill_qemu(&self) {
        let pid: i32 =
            fs::read_to_string(self.path("run/vm/100/pid")).unwrap().trim().parse().unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, Signal::KILL).unwrap();
        let gone = || Ok((self.run(&["vm", "status", "100"])["running"] == false).then_some(()));
        self.stop.wait_for("the end of a killed QEMU", SOON, gone).unwrap();
    }

    pub fn spawn_backup(&self, options: &[&str], environment: &[(&str, &str)]) -> Collected {
        let arguments = [&["backup", "100"], &STORE[..], options].concat();
        self.vzdump.spawn_with(&arguments, environment).unwrap()
    }

    /// A backup; what it said in the end, of which the exit code is a part.
    pub fn backup(&self, options: &[&str]) -> Ended {
        self.end(self.spawn_backup(options, &[]))
    }

    pub fn end(&self, backup: Collected) -> Ended {
        Ended::new(backup.finish(LATE, &self.stop).unwrap())
    }

    /// A backup that works; its only guest in the report.
    pub fn good_backup(&self, options: &[&str]) -> Value {
        let ended = self.backup(options);
        assert_eq!(ended.guest["result"], "committed", "{}", ended.said);
        ended.guest
    }

    /// A backup that has an access to the disks and stands still until [`Place::go_on`].
    pub async fn halted_backup(&self, options: &[&str]) -> (Collected, Session) {
        let session = self.monitor().await;
        // Held by itself: by a signal from here it could be in the middle of a command, whose time
        // limit would be over when it goes on.
        let step = [("VZDUMP_TEST_STOP_AT", "OpenSource")];
        let mut backup = self.spawn_backup(options, &step);
        if let Err(error) = backup.process().wait_until_stopped(SOON, &self.stop) {
            panic!("{error:#}: {}", self.end(backup).said);
        }
        (backup, session)
    }

    pub fn go_on(&self, mut backup: Collected) -> Ended {
        backup.process().signal(Signal::CONT).unwrap();
        self.end(backup)
    }

    pub async fn monitor(&self) -> Session {
        let path = self.path("run/vm/100/qmp-spare.sock");
        Session::connect(path, Options::default()).await.unwrap()
    }

    /// The file with the bytes of a restored or a stopped VM's raw disk.
    pub fn bytes(&self, volume: &str) -> Vec<u8> {
        let (guest, file) = volume.strip_prefix("local:").unwrap().split_once('/').unwrap();
        let file = match file.strip_suffix(".raw.qcow2") {
            Some(stem) => format!("{stem}.raw.data"),
            None => file.to_owned(),
        };
        fs::read(self.path("local/images").join(guest).join(file)).unwrap()
    }

    /// Restores the archive of a report as a raw disk, and removes it again; its bytes.
    pub fn restored(&self, guest: &Value) -> Vec<u8> {
        let archive = format!("backups:backup/{}", guest["archive"].as_str().unwrap());
        let report =
            self.run(&["restore", &archive, "200", "--storage", "local", "--format", "raw"]);
        let bytes = self.bytes(report["volumes"][0]["volume"].as_str().unwrap());
        self.run(&["vm", "destroy", "200"]);
        bytes
    }

    /// No task has left anything.
    pub fn assert_tidy(&self) {
        for storage in ["local", "backups"].into_iter().chain(self.more_storages()) {
            if storage == "backups" {
                continue;
            }
            for image in self.run(&["storage", "list", storage]).as_array().unwrap() {
                assert_eq!(image["used_as"], "disk", "{image}");
            }
        }
        let journals = fs::read_dir(self.path("state/journal")).unwrap();
        let left: Vec<_> = journals.map(|entry| entry.unwrap().file_name()).collect();
        assert!(left.is_empty(), "{left:?}");
    }

    fn more_storages(&self) -> Vec<&'static str> {
        let text = fs::read_to_string(self.path("etc/storage.cfg")).unwrap();
        ["tree", "small"].into_iter().filter(|id| text.contains(&format!(": {id}\n"))).collect()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Fails for one that does not run, which is fine.
        let _ = self.vzdump.uninterrupted().finish(&["vm", "stop", "100", "--now"], SOON);
    }
}

/// How a backup ended.
pub struct Ended {
    /// Its guest in the report.
    pub guest: Value,
    /// Everything it said.
    pub said: String,
}

impl Ended {
    fn new(finished: Finished) -> Self {
        let report = last_json(&finished.stdout).unwrap();
        let guest = report["guests"][0].clone();
        let said = format!("{}\n{}", finished.stdout, finished.stderr);
        assert_eq!(finished.status.success(), guest["result"] == "committed", "{said}");
        Self { guest, said }
    }

    pub fn error(&self) -> String {
        assert_eq!(self.guest["result"], "failed", "{}", self.said);
        self.guest["error"].as_str().unwrap().to_owned()
    }
}

/// The guest writes to the disk `scsi0`, and has done so when this returns.
pub async fn writes(session: &Session, pattern: u8, offset: u64, len: u64) {
    qemu_io(session, &format!("write -P {pattern:#x} {offset} {len}")).await;
}

/// Does something with the guest's disk.
pub async fn qemu_io(session: &Session, command: &str) {
    let line = format!("qemu-io -d scsi0 \"{command}\"");
    let arguments = json!({ "command-line": line });
    let said = session.execute_raw("human-monitor-command", arguments, Some(LATE)).await.unwrap();
    assert_eq!(said, "", "{command}");
}

/// The state of the only device of the only access.
pub async fn device_status(session: &Session) -> Value {
    let all = session.execute_raw("query-backup-access", Value::Null, None).await.unwrap();
    all[0]["devices"][0].clone()
}

/// A file of bytes that are no zeroes and have no order.
pub fn random_file(path: &Path, size_bytes: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(size_bytes).unwrap()];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for chunk in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
    }
    fs::write(path, &bytes).unwrap();
    bytes
}
