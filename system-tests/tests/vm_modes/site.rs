// SPDX-License-Identifier: MIT OR Apache-2.0
//! An installation with one VM whose guest is a boot sector, and everything the tests do with it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use qmp_client::{Options, Session};
use rand::{RngCore as _, SeedableRng as _, rngs::StdRng};
use rustix::process::Signal;
use serde_json::{Value, json};
use system_tests::lab::storages;
use system_tests::process::{Collected, Finished, Stop, run};
use system_tests::qemu::bin_dir;
use system_tests::turn::Turn;
use system_tests::vzdump::{Vzdump, last_json};
use tempfile::TempDir;

use crate::sector::{self, Guest};

pub const VM: u32 = 100;
/// Stops `vzdump` by SIGSTOP when its job reaches this step.
const STOP_AT: &str = "VZDUMP_TEST_STOP_AT";
/// The same by SIGKILL.
const KILL_AT: &str = "VZDUMP_TEST_KILL_AT";
/// Nothing that works takes this long, on two busy cores.
pub const SOON: Duration = Duration::from_secs(90);

/// A disk of the VM.
pub struct Disk {
    pub key: &'static str,
    pub options: &'static str,
    pub format: &'static str,
    pub size_bytes: u64,
}

impl Disk {
    pub const fn raw(key: &'static str, size_bytes: u64) -> Self {
        Self { key, options: "", format: "raw", size_bytes }
    }
}

pub struct Site {
    pub vzdump: Vzdump,
    pub stop: Stop,
    pub dir: TempDir,
    /// What was written to each disk before its guest ran.
    pub contents: Vec<(&'static str, Vec<u8>)>,
    runtime: tokio::runtime::Runtime,
    next_vm: u32,
    _turn: Turn,
}

impl Site {
    /// A site whose VM has one small disk, on which its guest is.
    pub fn new(guest: Guest) -> Self {
        Self::with(guest, "", &[Disk::raw("virtio0", 4 << 20)])
    }

    /// The guest is on the first disk; `lines` go to the configuration.
    pub fn with(guest: Guest, lines: &str, disks: &[Disk]) -> Self {
        let stop = Stop::default();
        let turn = Turn::wait(&stop).unwrap();
        let dir = tempfile::Builder::new().prefix("vz-modes-").tempdir_in("/var/tmp").unwrap();
        let vzdump = Vzdump::find(dir.path(), true, &stop).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let contents = Vec::new();
        let mut site = Self { vzdump, stop, dir, contents, runtime, next_vm: 200, _turn: turn };
        for folder in ["etc/qemu-server", "backups", "local/images/100"] {
            std::fs::create_dir_all(site.path(folder)).unwrap();
        }
        std::fs::write(site.path("etc/storage.cfg"), storages(site.dir.path())).unwrap();
        let mut config = format!("name: sector\nmemory: 32\n{lines}");
        if let Some(first) = disks.first() {
            config.push_str(&format!("boot: order={}\n", first.key));
        }
        for (number, disk) in disks.iter().enumerate() {
            let volume = site.make_disk(number, disk, guest);
            config.push_str(&format!("{}: {volume}{}\n", disk.key, disk.options));
        }
        std::fs::write(site.config_path(VM), config).unwrap();
        site
    }

    fn make_disk(&mut self, number: usize, disk: &Disk, guest: Guest) -> String {
        let mut content = vec![0; usize::try_from(disk.size_bytes).unwrap()];
        StdRng::seed_from_u64(number as u64).fill_bytes(&mut content);
        if number == 0 {
            content[..512].copy_from_slice(&sector::sector(guest));
            content[512..1024].fill(0);
        }
        let name = format!("vm-100-disk-{number}.{}", disk.format);
        let path = self.path(&format!("local/images/100/{name}"));
        let raw = path.with_extension("raw");
        std::fs::write(&raw, &content).unwrap();
        if disk.format != "raw" {
            convert(&raw, "raw", &path, disk.format);
            std::fs::remove_file(raw).unwrap();
        }
        // What QEMU makes of a file that does not end with a sector.
        content.resize(content.len().next_multiple_of(512), 0);
        self.contents.push((disk.key, content));
        format!("local:100/{name}")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn config_path(&self, vm: u32) -> PathBuf {
        self.path(&format!("etc/qemu-server/{vm}.conf"))
    }

    pub fn add_to_config(&self, lines: &str) {
        let text = std::fs::read_to_string(self.config_path(VM)).unwrap();
        std::fs::write(self.config_path(VM), text + lines).unwrap();
    }

    pub fn vm(&self, words: &[&str]) -> Value {
        self.vzdump.run(&[&["vm"], words].concat(), SOON).unwrap()
    }

    pub fn try_vm(&self, words: &[&str]) -> Finished {
        self.vzdump.finish(&[&["vm"], words].concat(), SOON).unwrap()
    }

    /// QEMU's word for what the guest does; `off` without a QEMU.
    pub fn state(&self) -> String {
        let status = self.vm(&["status", "100"]);
        match status["running"].as_bool().unwrap() {
            true => status["qmp_status"].as_str().unwrap_or("no answer").to_owned(),
            false => "off".to_owned(),
        }
    }

    pub fn wait_for_state(&self, wanted: &str) {
        let what = format!("the state '{wanted}', not '{}'", self.state());
        let ready = || Ok((self.state() == wanted).then_some(()));
        self.stop.wait_for(&what, SOON, ready).unwrap();
    }

    /// Starts the VM and waits until its guest works.
    pub fn start(&self) {
        let boots = self.boots();
        self.vm(&["start", "100"]);
        self.wait_for_boot(boots + 1);
    }

    fn first_bytes(&self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        let file = File::open(self.path("local/images/100/vm-100-disk-0.raw")).unwrap();
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// How often the guest has booted.
    pub fn boots(&self) -> u8 {
        self.first_bytes(1024)[usize::try_from(sector::BOOTS).unwrap()]
    }

    pub fn wait_for_boot(&self, number: u8) {
        let ready = || Ok((self.boots() == number).then_some(()));
        self.stop.wait_for(&format!("boot {number}"), SOON, ready).unwrap();
        self.assert_writes();
    }

    fn writes(&self) -> [u8; 2] {
        let at = usize::try_from(sector::WRITES).unwrap();
        self.first_bytes(1024)[at..at + 2].try_into().unwrap()
    }

    /// The guest runs and reaches its disk.
    pub fn assert_writes(&self) {
        let before = self.writes();
        let ready = || Ok((self.writes() != before).then_some(()));
        self.stop.wait_for("a write of the guest", SOON, ready).unwrap();
    }

    /// A command of QMP.
    pub fn qmp(&self, command: &str) -> Value {
        self.qmp_with(command, Value::Null)
    }

    pub fn qmp_with(&self, command: &str, arguments: Value) -> Value {
        let socket = self.path("run/vm/100/qmp-spare.sock");
        self.runtime.block_on(async {
            let session = Session::connect(&socket, Options::default()).await.unwrap();
            session.execute_raw(command, arguments, None).await.unwrap()
        })
    }

    pub fn power_button(&self) {
        self.qmp("system_powerdown");
    }

    /// Starts a backup that stands still when it reaches the step.
    pub fn backup_stopped_at(&self, step: &str, mode: &str) -> Collected {
        let mut backup = self.spawn_backup(mode, &[(STOP_AT, step)]);
        let stopped = backup.process().wait_until_stopped(SOON, &self.stop);
        stopped.unwrap_or_else(|error| panic!("{step}: {error:#}"));
        backup
    }

    pub fn spawn_backup(&self, mode: &str, environment: &[(&str, &str)]) -> Collected {
        let words = ["backup", "100", "--storage", "backups", "--mode", mode];
        self.vzdump.spawn_with(&words, environment).unwrap()
    }

    /// Has a backup go on that stands still; its end.
    pub fn go_on(&self, mut backup: Collected) -> Report {
        backup.process().signal(Signal::CONT).unwrap();
        self.finish(backup)
    }

    pub fn finish(&self, backup: Collected) -> Report {
        let finished = backup.finish(SOON, &self.stop).unwrap();
        let report = last_json(&finished.stdout).unwrap_or_default();
        let guest = report.pointer("/guests/0").cloned().unwrap_or_default();
        Report { guest, lines: lines_of(&finished.stdout), code: finished.status.code() }
    }

    pub fn backup(&self, mode: &str) -> Report {
        self.finish(self.spawn_backup(mode, &[]))
    }

    /// Runs a backup that is killed at the step.
    pub fn backup_killed_at(&self, step: &str, mode: &str) {
        let killed = self.spawn_backup(mode, &[(KILL_AT, step)]);
        let finished = killed.finish(SOON, &self.stop).unwrap();
        assert_eq!(finished.status.signal(), Some(9), "{step}: {}", finished.stdout);
    }

    /// Cleans up as an administrator would.
    pub fn doctor(&self) {
        let finished = self.vzdump.finish(&["doctor", "--fix"], SOON).unwrap();
        assert!(!finished.stdout.contains("not cleaned up"), "{}", finished.stdout);
        self.assert_tidy();
    }

    /// Nothing of a backup is left.
    pub fn assert_tidy(&self) {
        let images = self.path("local/images/100").read_dir().unwrap();
        let names = images.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let fleecing: Vec<_> = names.filter(|name| name.contains("fleece")).collect();
        assert_eq!(fleecing, Vec::<String>::new());
        let journals = self.path("state/journal").read_dir();
        let journals: Vec<_> =
            journals.map(|all| all.map(|e| e.unwrap().file_name()).collect()).unwrap_or_default();
        assert!(journals.is_empty(), "{journals:?}");
    }

    /// The disks of an archive, by their keys.
    pub fn restore(&mut self, report: &Report) -> Vec<(String, Vec<u8>)> {
        let vm = self.next_vm;
        self.next_vm += 1;
        let archive = format!("backups:backup/{}", report.guest["archive"].as_str().unwrap());
        let id = vm.to_string();
        let words = ["restore", &archive, &id, "--storage", "local", "--format", "raw"];
        self.vzdump.run(&words, SOON).unwrap();
        let config = std::fs::read_to_string(self.config_path(vm)).unwrap();
        let disks = config.lines().filter_map(|line| {
            let (key, rest) = line.split_once(": local:")?;
            let volume = rest.split(',').next()?;
            let path = self.path(&format!("local/images/{volume}"));
            Some((key.to_owned(), std::fs::read(path).ok()?))
        });
        disks.collect()
    }

    /// Restores an archive: its disks are those of the site, except for what its guest writes.
    pub fn assert_restores(&mut self, report: &Report) {
        let restored = self.restore(report);
        for (key, bytes) in &restored {
            let (_, content) = self.contents.iter().find(|(known, _)| known == key).unwrap();
            assert_eq!(bytes.len(), content.len(), "{key}");
            let from = if *key == self.contents[0].0 { sector::UNTOUCHED } else { 0 };
            assert!(bytes[from..] == content[from..], "{key} is not what it was");
            assert_eq!(bytes[..512], content[..512], "{key}");
        }
        assert!(!restored.is_empty());
    }

    /// How often the guest of an archive had booted.
    pub fn archived_boots(&mut self, report: &Report) -> u8 {
        let restored = self.restore(report);
        restored[0].1[usize::try_from(sector::BOOTS).unwrap()]
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // Fails only if there is no VM any more.
        let _ = self.vzdump.uninterrupted().finish(&["vm", "stop", "100", "--now"], SOON);
    }
}

/// How a backup ended.
pub struct Report {
    /// The report of its guest.
    pub guest: Value,
    /// The lines of its log.
    pub lines: String,
    pub code: Option<i32>,
}

impl Report {
    #[track_caller]
    pub fn assert_good(&self) -> &Self {
        assert_eq!(self.guest["result"], json!("committed"), "{}", self.lines);
        assert_eq!(self.guest["warnings"], json!([]), "{}", self.lines);
        assert_eq!(self.code, Some(0));
        self
    }

    #[track_caller]
    pub fn assert_says(&self, line: &str) -> &Self {
        assert!(self.lines.contains(line), "{line:?} is missing in\n{}", self.lines);
        self
    }

    pub fn error(&self) -> &str {
        assert_eq!(self.code, Some(255), "{}", self.lines);
        self.guest["error"].as_str().unwrap()
    }

    pub fn downtime(&self) -> Option<Duration> {
        let ms = self.guest.pointer("/point_in_time/downtime_ms").and_then(Value::as_u64);
        ms.map(Duration::from_millis)
    }
}

/// The log lines among the events that a task prints.
fn lines_of(output: &str) -> String {
    let mut lines = String::new();
    for event in serde_json::Deserializer::from_str(output).into_iter::<Value>().flatten() {
        if let (Some(level), Some(text)) = (event["level"].as_str(), event["message"].as_str()) {
            lines.push_str(&format!("{}: {text}\n", level.to_uppercase()));
        }
    }
    lines
}

fn convert(from: &Path, from_format: &str, to: &Path, to_format: &str) {
    let mut command = Command::new(bin_dir().unwrap().join("qemu-img"));
    command.args(["convert", "-f", from_format, "-O", to_format]).arg(from).arg(to);
    run(&mut command, SOON, &Stop::default()).unwrap();
}
