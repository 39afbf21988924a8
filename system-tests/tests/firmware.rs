// SPDX-License-Identifier: MIT OR Apache-2.0
//! Scenario 49: what a guest keeps beside its disks, its EFI variables and its TPM, is backed up and restored.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Signal};
use serde_json::Value;
use system_tests::console::Console;
use system_tests::guest::{KERNEL_OPTIONS, secrets};
use system_tests::lab::storages;
use system_tests::process::{Stop, run};
use system_tests::qemu::bin_dir;
use system_tests::turn::Turn;
use system_tests::vzdump::{Vzdump, last_json};
use tempfile::TempDir;

const SOON: Duration = Duration::from_secs(120);
const VARS_BYTES: u64 = 528 << 10;

struct Site {
    vzdump: Vzdump,
    stop: Stop,
    dir: TempDir,
    _turn: Turn,
}

impl Site {
    fn new() -> Self {
        let stop = Stop::default();
        let turn = Turn::wait(&stop).unwrap();
        let dir = tempfile::Builder::new().prefix("vz-efi-").tempdir_in("/var/tmp").unwrap();
        let vzdump = Vzdump::find(dir.path(), true, &stop).unwrap();
        let site = Self { vzdump, stop, dir, _turn: turn };
        for folder in ["etc", "local", "backups"] {
            std::fs::create_dir_all(site.path(folder)).unwrap();
        }
        std::fs::write(site.path("etc/storage.cfg"), storages(site.dir.path())).unwrap();
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, words: &[&str]) -> Value {
        self.vzdump.run(words, SOON).unwrap()
    }

    fn config(&self, vm: u32) -> String {
        std::fs::read_to_string(self.path(&format!("etc/qemu-server/{vm}.conf"))).unwrap()
    }

    /// The file of a disk, by its key.
    fn volume(&self, vm: u32, key: &str) -> PathBuf {
        let config = self.config(vm);
        let line = config.lines().find_map(|line| line.strip_prefix(&format!("{key}: local:")));
        self.path("local/images").join(line.unwrap().split(',').next().unwrap())
    }

    /// Its bytes, whatever its format.
    fn content(&self, vm: u32, key: &str) -> Vec<u8> {
        let path = self.volume(vm, key);
        if let Some(base) = path.to_str().unwrap().strip_suffix(".raw.qcow2") {
            // It ends with a whole cluster of the image.
            let mut bytes = std::fs::read(format!("{base}.raw.data")).unwrap();
            bytes.truncate(usize::try_from(VARS_BYTES).unwrap());
            return bytes;
        }
        let raw = self.path("content.raw");
        let format = if path.extension().unwrap() == "qcow2" { "qcow2" } else { "raw" };
        let mut command = Command::new(bin_dir().unwrap().join("qemu-img"));
        command.args(["convert", "-U", "-f", format, "-O", "raw"]).arg(path).arg(&raw);
        run(&mut command, SOON, &self.stop).unwrap();
        std::fs::read(raw).unwrap()
    }

    fn backup(&self) -> String {
        let report = self.run(&["backup", "100", "--storage", "backups"]);
        assert_eq!(report["guests"][0]["warnings"], Value::Array(Vec::new()), "{report}");
        format!("backups:backup/{}", report["guests"][0]["archive"].as_str().unwrap())
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for vm in ["100", "101"] {
            // Fails only if there is no such VM.
            let _ = self.vzdump.uninterrupted().finish(&["vm", "stop", vm, "--now"], SOON);
        }
    }
}

#[test]
fn s49_efi_variables_are_backed_up_and_restored_like_a_disk() {
    for format in ["raw", "qcow2", "raw+bitmaps"] {
        let site = Site::new();
        let create = ["vm", "create", "100", "--memory", "64", "--format", format, "--efidisk"];
        site.run(&[&create, &["efitype=4m,pre-enrolled-keys=0", "--disk", "1M"][..]].concat());
        assert!(site.config(100).contains("bios: ovmf\n"), "{}", site.config(100));
        let config = site.config(100);
        let line = config.lines().find(|line| line.starts_with("efidisk0: ")).unwrap();
        assert!(line.ends_with(",efitype=4m,pre-enrolled-keys=0,size=528K"), "{line}");
        let fresh = site.content(100, "efidisk0");
        let template = std::fs::read(Path::new("/usr/share/OVMF/OVMF_VARS_4M.fd")).unwrap();
        assert!(fresh == template, "{format}: not the variables of a new guest");

        if format == "raw" {
            // Once, because it takes an emulated machine seconds.
            site.run(&["vm", "start", "100"]);
            let written = || Ok((site.content(100, "efidisk0") != fresh).then_some(()));
            site.stop.wait_for("variables that the firmware has written", SOON, written).unwrap();
            // Nobody writes any more, so that there is something to compare with.
            site.run(&["vm", "stop", "100", "--now"]);
        }
        let off = site.backup();
        site.run(&["vm", "start", "100", "--paused"]);
        let running = site.backup();
        let before = site.content(100, "efidisk0");
        assert_eq!(before.len() as u64, VARS_BYTES);
        for archive in [off, running] {
            site.run(&["restore", &archive, "101", "--force", "--storage", "local"]);
            assert!(site.content(101, "efidisk0") == before, "{format}: other variables");
            site.run(&["vm", "start", "101", "--paused"]);
            site.run(&["vm", "stop", "101", "--now"]);
        }
    }
}

/// A line of the guest's console, told what to do before.
fn told(site: &Site, vm: u32, order: &str, needle: &str) -> String {
    let run = site.path(&format!("run/vm/{vm}"));
    let mut console = Console::from_end_of(&run.join("console.log")).unwrap();
    let mut serial = UnixStream::connect(run.join("serial0.sock")).unwrap();
    serial.write_all(format!("{order}\n").as_bytes()).unwrap();
    console.wait_for(needle, SOON, &site.stop).unwrap()
}

/// What a guest says of its secrets when it has booted.
fn booted(site: &Site, vm: u32) -> String {
    let log = site.path(&format!("run/vm/{vm}/console.log"));
    let line = Console::from_start_of(&log).wait_for("SECRETS efi=", SOON, &site.stop).unwrap();
    line.split("SECRETS ").nth(1).unwrap().trim().to_owned()
}

/// A guest that says what its firmware and its TPM have.
fn make_guest(site: &Site, efi: &str) {
    let guest = secrets::build(&site.stop).unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let (kernel, initrd) = (text(&guest.kernel), text(&guest.initrd));
    let mut create = vec!["vm", "create", "100", "--memory", "256", "--format", "qcow2"];
    create.extend(["--efidisk", efi, "--tpm", "--disk", "1M"]);
    create.extend(["--kernel", &kernel, "--initrd", &initrd, "--append", KERNEL_OPTIONS]);
    site.run(&create);
}

/// What a guest says of its firmware when it has booted.
fn firmware(site: &Site, vm: u32) -> String {
    let log = site.path(&format!("run/vm/{vm}/console.log"));
    let line = Console::from_start_of(&log).wait_for("FIRMWARE ", SOON, &site.stop).unwrap();
    line.split("FIRMWARE ").nth(1).unwrap().trim().to_owned()
}

#[test]
#[ignore = "boots a guest with UEFI three times, a minute and more under TCG"]
fn s49_a_live_restored_guest_has_its_efi_variables_and_its_tpm() {
    let site = Site::new();
    make_guest(&site, "efitype=4m");
    site.run(&["vm", "start", "100"]);
    let first = booted(&site, 100);
    let register = first.strip_prefix("efi=none tpm=none pcr0=").unwrap().to_owned();
    told(&site, 100, "write 1", "SECRETS WRITTEN 1");
    site.run(&["vm", "stop", "100", "--now"]);
    let archive = site.backup();
    for format in ["qcow2", "raw"] {
        let words = ["restore", &archive, "101", "--live", "--allow-raw-config"];
        site.run(&[&words[..], &["--storage", "local", "--format", format]].concat());
        assert_eq!(booted(&site, 101), format!("efi=1 tpm=1 pcr0={register}"), "{format}");
        assert_eq!(site.volume(101, "tpmstate0").extension().unwrap(), "raw");
        assert!(!site.config(101).contains("lock:"), "{}", site.config(101));
        println!("and after the restore it keeps what is written then");
        told(&site, 101, "write 3", "SECRETS WRITTEN 3");
        site.run(&["vm", "stop", "101", "--now"]);
        site.run(&["vm", "destroy", "101"]);
    }
    assert_eq!(processes_of(&site), 0);
}

#[test]
#[ignore = "boots a guest with UEFI four times, a minute under TCG"]
fn s49_secure_boot_small_firmware_and_a_tpm_of_version_1_are_restored() {
    for (efi, secure, version) in
        [("efitype=4m,pre-enrolled-keys=1", 1, 2), ("efitype=2m,pre-enrolled-keys=0", 0, 1)]
    {
        println!("{efi}, TPM {version}");
        let site = Site::new();
        make_guest(&site, efi);
        let path = site.path("etc/qemu-server/100.conf");
        if version == 1 {
            let config = site.config(100);
            assert!(config.contains("version=v2.0"), "{config}");
            std::fs::write(&path, config.replace("version=v2.0", "version=v1.2")).unwrap();
        }
        site.run(&["vm", "start", "100"]);
        let facts = firmware(&site, 100);
        assert!(facts.starts_with(&format!("secure={secure} tpm={version} key=")), "{facts}");
        if version == 2 {
            booted(&site, 100);
            told(&site, 100, "write 1", "SECRETS WRITTEN 1");
        } else {
            // That of no text.
            assert!(!facts.ends_with("d41d8cd98f00b204e9800998ecf8427e"), "{facts}: no key");
        }
        let archive = site.backup();
        site.run(&["vm", "stop", "100", "--now"]);
        site.run(&["restore", &archive, "101", "--allow-raw-config", "--storage", "local"]);
        site.run(&["vm", "start", "101"]);
        assert_eq!(firmware(&site, 101), facts);
        if version == 2 {
            let secrets = booted(&site, 101);
            assert!(secrets.starts_with("efi=1 tpm=1 "), "{secrets}");
        }
        site.run(&["vm", "stop", "101", "--now"]);
    }
}

#[test]
fn s49_a_restored_guest_has_the_efi_variables_and_the_tpm_of_the_point_in_time() {
    let site = Site::new();
    make_guest(&site, "efitype=4m");
    site.run(&["vm", "start", "100"]);
    let first = booted(&site, 100);
    let register = first.strip_prefix("efi=none tpm=none pcr0=").unwrap().to_owned();
    assert!(register.len() == 64 && register != "0".repeat(64), "{first}: nothing was measured");
    told(&site, 100, "write 1", "SECRETS WRITTEN 1");

    println!("what is written after the point in time is not in the archive");
    let words = ["backup", "100", "--storage", "backups"];
    let mut backup =
        site.vzdump.spawn_with(&words, &[("VZDUMP_TEST_STOP_AT", "Transfer")]).unwrap();
    backup.process().wait_until_stopped(SOON, &site.stop).unwrap();
    told(&site, 100, "write 2", "SECRETS WRITTEN 2");
    backup.process().signal(Signal::CONT).unwrap();
    let finished = backup.finish(SOON, &site.stop).unwrap();
    assert!(finished.status.success(), "{}", finished.stdout);
    let report = last_json(&finished.stdout).unwrap();
    assert!(finished.stdout.contains("TPM state: "), "{}", finished.stdout);
    let archive = format!("backups:backup/{}", report["guests"][0]["archive"].as_str().unwrap());
    let now = told(&site, 100, "read", "SECRETS efi=");
    assert!(now.contains(&format!("efi=2 tpm=2 pcr0={register}")), "{now}");
    site.run(&["vm", "stop", "100", "--now"]);

    let words = ["restore", &archive, "101", "--allow-raw-config"];
    site.run(&words);
    site.run(&["vm", "start", "101"]);
    assert_eq!(booted(&site, 101), format!("efi=1 tpm=1 pcr0={register}"));
    site.run(&["vm", "stop", "101", "--now"]);
    assert_eq!(processes_of(&site), 0);
}

/// Processes that have the installation in their command line.
fn processes_of(site: &Site) -> usize {
    let needle = site.dir.path().to_str().unwrap().to_owned();
    let lines = Path::new("/proc").read_dir().unwrap().flatten().filter_map(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        Some(String::from_utf8_lossy(&line).into_owned())
    });
    lines.filter(|line| line.contains(&needle)).count()
}

fn tpm_pid(site: &Site) -> Option<i32> {
    pid_of(&format!("type=unixio,path={},", site.path("run/vm/100/swtpm.sock").display()))
}

/// The state of the VM's swtpm as the kernel has it; none if there is no such process.
fn tpm_state(site: &Site) -> Option<char> {
    let found = tpm_pid(site)?;
    let stat = std::fs::read_to_string(format!("/proc/{found}/stat")).ok()?;
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

/// The process that has this in its command line.
fn pid_of(needle: &str) -> Option<i32> {
    Path::new("/proc").read_dir().unwrap().flatten().find_map(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        let is_it = String::from_utf8_lossy(&line).contains(needle);
        is_it.then(|| entry.file_name().to_str()?.parse().ok()).flatten()
    })
}

fn wait_until(site: &Site, what: &str, is_so: impl Fn() -> bool) {
    site.stop.wait_for(what, SOON, || Ok(is_so().then_some(()))).unwrap();
}

const BACKUP: [&str; 4] = ["backup", "100", "--storage", "backups"];

#[test]
fn s49_a_kill_at_each_step_of_the_copy_of_a_tpm_leaves_nothing_stopped() {
    let site = Site::new();
    site.run(&["vm", "create", "100", "--memory", "32", "--tpm", "--disk", "1M"]);
    println!("killed between the start of swtpm and that of QEMU");
    let words = ["vm", "start", "100", "--paused"];
    let killed = site.vzdump.spawn_with(&words, &[("VZDUMP_TEST_KILL_AT", "tpm:started")]);
    killed.unwrap().finish(SOON, &site.stop).unwrap();
    assert!(tpm_state(&site).is_some(), "it was not started");
    site.run(&["doctor", "--fix"]);
    assert_eq!((tpm_state(&site), processes_of(&site)), (None, 0));

    site.run(&words);
    let alone = processes_of(&site);
    assert_eq!(alone, 2, "QEMU and swtpm");
    for step in ["entry:tpm", "tpm:guarded", "tpm:stopped", "tpm:copied", "tpm:continued"] {
        println!("killed at {step}");
        let killed = site.vzdump.spawn_with(&BACKUP, &[("VZDUMP_TEST_KILL_AT", step)]).unwrap();
        let finished = killed.finish(SOON, &site.stop).unwrap();
        assert_eq!(finished.status.signal(), Some(9), "{step}: {}", finished.stdout);
        // By the guard alone: nobody has cleaned up yet.
        wait_until(&site, "swtpm to go on", || tpm_state(&site).is_some_and(|state| state != 'T'));
        site.run(&["doctor", "--fix"]);
        wait_until(&site, "the end of the guard", || processes_of(&site) == alone);
    }

    println!("the guard is killed: the task has swtpm go on, and its archive would not be sound");
    let stopped = |step| {
        let mut backup = site.vzdump.spawn_with(&BACKUP, &[("VZDUMP_TEST_STOP_AT", step)]).unwrap();
        backup.process().wait_until_stopped(SOON, &site.stop).unwrap();
        assert_eq!(tpm_state(&site), Some('T'), "{step}");
        let guard = format!("\0--swtpm\0{}\0", tpm_pid(&site).unwrap());
        let guard = pid_of(&guard).and_then(Pid::from_raw).unwrap();
        rustix::process::kill_process(guard, Signal::KILL).unwrap();
        backup
    };
    let mut backup = stopped("tpm:copied");
    backup.process().signal(Signal::CONT).unwrap();
    let finished = backup.finish(SOON, &site.stop).unwrap();
    assert_ne!(finished.status.code(), Some(0), "{}", finished.stdout);
    assert!(finished.stdout.contains("its guard ended"), "{}", finished.stdout);
    assert_ne!(tpm_state(&site), Some('T'));

    println!("guard and task are killed: the recovery has it go on");
    let mut backup = stopped("tpm:copied");
    backup.process().signal(Signal::KILL).unwrap();
    backup.finish(SOON, &site.stop).unwrap();
    assert_eq!(tpm_state(&site), Some('T'));
    site.run(&["doctor", "--fix"]);
    wait_until(&site, "swtpm to go on", || tpm_state(&site).is_some_and(|state| state != 'T'));

    println!("and then all is as before");
    let archive = site.backup();
    site.run(&["restore", &archive, "101"]);
    let (now, then) = (site.content(100, "tpmstate0"), site.content(101, "tpmstate0"));
    assert!(then.len() == 4 << 20 && then[..now.len()] == now, "another state");
    assert!(then[now.len()..].iter().all(|byte| *byte == 0));
    let qemu = std::fs::read_to_string(site.path("run/vm/100/pid")).unwrap();
    let qemu = Pid::from_raw(qemu.trim().parse().unwrap()).unwrap();
    rustix::process::kill_process(qemu, Signal::KILL).unwrap();
    wait_until(&site, "the end of swtpm with QEMU", || processes_of(&site) == 0);

    println!("one that is off is its file alone");
    let path = site.path("etc/qemu-server/100.conf");
    std::fs::write(&path, site.config(100) + "vga: std\n").unwrap();
    let off = site.backup();
    site.run(&["restore", &off, "101", "--force", "--format", "qcow2"]);
    assert!(site.volume(101, "tpmstate0").to_str().unwrap().ends_with(".raw"));
    assert!(site.content(101, "tpmstate0")[..now.len()] == now);

    println!("a throw-away VM has a copy of it, and a picture of its display is kept");
    let words = ["verify", &off, "--boot", "--boot-console", "never said", "--boot-timeout", "1"];
    let finished = site.vzdump.finish(&words, SOON).unwrap();
    let report = last_json(&finished.stdout).unwrap()["archives"][0].clone();
    assert_eq!(report["is_untested"], false, "{report}");
    let picture = report["screenshot"].as_str().expect("a picture");
    assert!(std::fs::read(picture).unwrap().starts_with(b"\x89PNG"));
    let listed = site.run(&["list"])["archives"].as_array().unwrap().clone();
    let listed = listed.into_iter().find(|archive| archive["volid"] == off.as_str()).unwrap();
    assert_eq!(listed["booted"]["screenshot"], report["screenshot"]);
    assert_eq!(processes_of(&site), 0);
}
