// SPDX-License-Identifier: MIT OR Apache-2.0
//! Live restores of a real guest: it runs at once, what it writes meanwhile stays, and a restore that was killed
//! anywhere goes on.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use system_tests::console::Console;
use system_tests::lab::{Checked, Lab, LabOptions, SOURCE_VM, VIRTIO_WITH_THREADS};
use system_tests::process::{Collected, Finished, Stop};
use system_tests::turn::Turn;
use tempfile::TempDir;

const SOON: Duration = Duration::from_secs(120);
/// The VM that is made.
const NEW_VM: u32 = 200;
/// Ends `vzdump` by SIGKILL when its task reaches this step.
const KILL_AT: &str = "VZDUMP_TEST_KILL_AT";
/// Asks it to end there.
const TERM_AT: &str = "VZDUMP_TEST_TERM_AT";
const DISK_BYTES: u64 = 24 << 20;
/// So that all disks together take some seconds.
const SLOWLY_KIB_PER_S: &str = "4608";
/// So that the disk that the guest leaves alone does not get full before the test is over.
const HARDLY_KIB_PER_S: &str = "64";
const FAST_KIB_PER_S: &str = "1048576";

struct Scene {
    lab: Lab,
    dir: TempDir,
    archive: String,
    /// The last records in the archive.
    saved: Checked,
    _turn: Turn,
}

impl Scene {
    /// An archive of a guest that is off now.
    fn new() -> Self {
        let stop = Stop::default();
        let turn = Turn::wait(&stop).unwrap();
        let dir = tempfile::Builder::new().prefix("vz-live-").tempdir_in("/var/tmp").unwrap();
        let options = LabOptions {
            disk_bytes: DISK_BYTES,
            format: "qcow2",
            hardware: VIRTIO_WITH_THREADS,
            rate_per_s: 200,
            show: true,
        };
        let mut lab = Lab::create(dir.path(), options, &stop).unwrap();
        add_disk_that_the_guest_leaves_alone(dir.path());
        let mut console = lab.start(SOURCE_VM).unwrap().console;
        console.wait_for_record(200, SOON, &stop).unwrap();
        lab.stop_vm(SOURCE_VM).unwrap();
        let archive = lab.backup().unwrap().volume;
        let report = lab.check_outside(SOURCE_VM, true).unwrap();
        let saved = Checked { last_a: report.last_a, last_b: report.last_b, in_flight_sectors: 0 };
        Self { lab, dir, archive, saved, _turn: turn }
    }

    fn live(&self, format: &str, more: &[&str], environment: &[(&str, &str)]) -> Collected {
        let vm = NEW_VM.to_string();
        let fixed = ["restore", &self.archive, &vm, "--live", "--allow-raw-config", "--format"];
        let arguments = [fixed.as_slice(), &[format, "--storage", "local"], more].concat();
        self.lab.vzdump.spawn_with(&arguments, environment).unwrap()
    }

    fn finish(&self, running: Collected) -> Finished {
        running.finish(SOON, &self.lab.stop).unwrap()
    }

    fn config(&self) -> String {
        let path = self.dir.path().join(format!("etc/qemu-server/{NEW_VM}.conf"));
        std::fs::read_to_string(path).unwrap_or_default()
    }

    fn images(&self) -> BTreeSet<PathBuf> {
        let folder = self.dir.path().join(format!("local/images/{NEW_VM}"));
        folder.read_dir().into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
    }

    fn journals(&self) -> usize {
        self.dir.path().join("state/journal").read_dir().unwrap().count()
    }

    /// What the journals say.
    fn journal(&self) -> String {
        let folder = self.dir.path().join("state/journal");
        let files = folder.read_dir().into_iter().flatten().flatten();
        files.map(|file| std::fs::read_to_string(file.path()).unwrap_or_default()).collect()
    }

    fn resume(&self, limit_kib_per_s: &str, environment: &[(&str, &str)]) -> Collected {
        let vm = NEW_VM.to_string();
        let arguments = ["restore", "--resume", &vm, "--bwlimit", limit_kib_per_s];
        self.lab.vzdump.spawn_with(&arguments, environment).unwrap()
    }

    fn is_running(&self) -> bool {
        let status = self.lab.vzdump.run(&["vm", "status", "200"], SOON);
        status.is_ok_and(|status| status["running"] == true)
    }

    fn kill(&self, mut running: Collected) {
        running.process().signal(Signal::KILL).unwrap();
        let finished = self.finish(running);
        let log = self.dir.path().join(format!("run/vm/{NEW_VM}/qemu.log"));
        let said = (&finished.stdout, std::fs::read_to_string(log));
        assert_eq!(finished.status.signal(), Some(9), "{said:?}");
    }

    /// Kills the VM's QEMU and waits for its end.
    fn kill_qemu(&self) {
        let process = Path::new("/proc").join(self.lab.qemu_pid(NEW_VM).unwrap().to_string());
        self.lab.kill_qemu(NEW_VM);
        let gone = || Ok((!process.join("exe").exists()).then_some(()));
        self.lab.stop.wait_for("the end of QEMU", SOON, gone).unwrap();
    }

    /// Kills what serves the archive.
    fn kill_servers(&self) {
        let needle = self.dir.path().join("run/r-").to_string_lossy().into_owned();
        let mut killed = 0;
        for entry in Path::new("/proc").read_dir().unwrap().flatten() {
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            let pid = entry.file_name().to_string_lossy().parse().ok().and_then(Pid::from_raw);
            if let (true, Some(pid)) = (line.contains(&needle), pid) {
                kill_process(pid, Signal::KILL).unwrap();
                killed += 1;
            }
        }
        assert_eq!(killed, 3);
    }

    /// What is refused, with what to do, while the restore is interrupted.
    fn refused(&self) {
        let before = (self.images(), self.config(), self.journals());
        let vm = NEW_VM.to_string();
        for arguments in [
            vec!["backup", &vm, "--storage", "backups"],
            vec!["vm", "start", &vm],
            vec!["vm", "destroy", &vm],
            vec!["restore", &self.archive, &vm, "--force"],
            vec!["doctor", "--fix"],
        ] {
            let finished = self.lab.vzdump.finish(&arguments, SOON).unwrap();
            let said = format!("{}{}", finished.stdout, finished.stderr);
            let is_told = said.contains("vzdump restore --resume 200");
            assert!(!finished.status.success() && is_told, "{arguments:?}: {said}");
        }
        assert_eq!((self.images(), self.config(), self.journals()), before);
    }

    /// The guest's check of its disks after it has started; it must have all that it wrote before.
    fn checked(&self, console: &mut Console, at_least: u64) -> Checked {
        let line = console.wait_for("CHECK ", SOON, &self.lab.stop).unwrap();
        let checked = Checked::parse(&line).unwrap_or_else(|| panic!("{line}"));
        assert!(checked.last_b >= at_least, "{checked:?}, but {at_least} were written");
        checked
    }

    /// Switches the restored VM off, and checks its disks from outside.
    fn end(&mut self, at_least: u64) {
        self.lab.stop_vm(NEW_VM).unwrap();
        let report = self.lab.check_outside(NEW_VM, true).unwrap();
        assert!(report.problems.is_empty(), "{}", report.line());
        assert!(report.last_b >= at_least, "{} of {at_least}", report.last_b);
        assert_eq!((self.journals(), self.images().len()), (0, 3));
        assert!(!self.config().contains("lock:"), "{}", self.config());
    }
}

/// What the guest reads and writes of its other disks fills these, too: it reads all of them when it starts.
fn add_disk_that_the_guest_leaves_alone(root: &Path) {
    let image = root.join(format!("local/images/{SOURCE_VM}/vm-{SOURCE_VM}-disk-9.raw"));
    let content: Vec<u8> = (0..DISK_BYTES / 8).flat_map(|n| (n | 1 << 63).to_le_bytes()).collect();
    std::fs::write(image, content).unwrap();
    let config = root.join(format!("etc/qemu-server/{SOURCE_VM}.conf"));
    let mut lines = std::fs::read_to_string(&config).unwrap();
    lines.push_str(&format!("virtio2: local:{SOURCE_VM}/vm-{SOURCE_VM}-disk-9.raw,size=24M\n"));
    std::fs::write(&config, lines).unwrap();
}

#[test]
fn a_guest_runs_at_once_and_keeps_what_it_writes_while_its_disks_are_filled() {
    let mut scene = Scene::new();
    for format in ["qcow2", "raw"] {
        println!("to {format}");
        let mut console = scene.lab.watch(NEW_VM);
        let restore = scene.live(format, &["--bwlimit", SLOWLY_KIB_PER_S], &[]);
        scene.checked(&mut console, scene.saved.last_b);
        if format == "raw" {
            println!("its server is killed");
            scene.kill_servers();
        }
        let wanted = scene.saved.last_b + 100;
        console.wait_for_record(wanted, SOON, &scene.lab.stop).unwrap();
        let finished = scene.finish(restore);
        assert!(finished.status.success(), "{}", finished.stderr);
        let wanted = wanted + 100;
        console.wait_for_record(wanted, SOON, &scene.lab.stop).unwrap();
        scene.end(wanted);
        scene.lab.vzdump.run(&["vm", "destroy", "200"], SOON).unwrap();
    }
}

#[test]
#[ignore = "waits for QEMU's attempts to connect, which get up to 16 seconds apart"]
fn an_archive_that_is_away_for_long_is_found_again() {
    let mut scene = Scene::new();
    let mut console = scene.lab.watch(NEW_VM);
    let mut restore = scene.live("raw", &["--bwlimit", SLOWLY_KIB_PER_S], &[]);
    let runs = || Ok(scene.journal().contains("\"runs\"").then_some(()));
    scene.lab.stop.wait_for("the guest's start", SOON, runs).unwrap();
    // Nobody serves the archive until QEMU's fifth attempt has failed; the next one is 16 seconds later.
    restore.process().signal(Signal::STOP).unwrap();
    scene.kill_servers();
    std::thread::sleep(Duration::from_secs(17));
    restore.process().signal(Signal::CONT).unwrap();
    let finished = scene.finish(restore);
    assert!(finished.status.success(), "{}{}", finished.stdout, finished.stderr);
    scene.checked(&mut console, scene.saved.last_b);
    scene.end(scene.saved.last_b);
}

#[test]
#[ignore = "boots a guest twice and waits for its disks, most of a minute under TCG"]
fn a_guest_that_switches_off_while_its_disks_are_filled_is_whole_afterwards() {
    let mut scene = Scene::new();
    for (format, killed) in [("qcow2", false), ("raw", true)] {
        println!("to {format}");
        let mut console = scene.lab.watch(NEW_VM);
        let mut restore = scene.live(format, &["--bwlimit", HARDLY_KIB_PER_S], &[]);
        scene.checked(&mut console, scene.saved.last_b);
        let wanted = scene.saved.last_b + 60;
        let mut written = console.wait_for_record(wanted, SOON, &scene.lab.stop).unwrap().last;
        let stopped = scene.lab.vzdump.run(&["vm", "stop", "200"], SOON).unwrap();
        written = written.max(console.records().unwrap().last);
        assert_eq!(stopped["stopped"], "shutdown_in_backup");
        // What is off is still being filled.
        assert!(scene.config().contains("lock: live-restore") && scene.is_running());
        if killed {
            scene.kill(restore);
        } else {
            restore.process().signal(Signal::INT).unwrap();
            let finished = scene.finish(restore);
            let said = format!("{}{}", finished.stdout, finished.stderr);
            assert!(!finished.status.success() && said.contains("--resume 200"), "{said}");
        }
        restore = scene.resume(FAST_KIB_PER_S, &[]);
        let finished = scene.finish(restore);
        assert!(finished.status.success(), "{}", finished.stderr);
        assert!(!scene.is_running(), "{format}: QEMU is left");
        scene.end(written);
        scene.lab.vzdump.run(&["vm", "destroy", "200"], SOON).unwrap();
    }
}

#[test]
fn a_live_restore_that_is_given_up_leaves_nothing_wherever_that_is_killed() {
    let mut scene = Scene::new();
    let (vm, give_up) = (NEW_VM.to_string(), ["restore", "--give-up", "200"]);
    let finished = scene.lab.vzdump.finish(&give_up, SOON).unwrap();
    assert!(!finished.status.success() && finished.stderr.contains("no unfinished live restore"));
    for (format, with_qemu, killed) in
        [("qcow2", true, false), ("raw", true, true), ("raw", false, false)]
    {
        println!("to {format}");
        let mut console = scene.lab.watch(NEW_VM);
        let restore = scene.live(format, &["--bwlimit", HARDLY_KIB_PER_S], &[]);
        scene.checked(&mut console, scene.saved.last_b);
        let finished = scene.lab.vzdump.finish(&give_up, SOON).unwrap();
        assert!(!finished.status.success(), "{}", finished.stdout);
        assert!(scene.is_running() && scene.config().contains("lock: live-restore"));
        scene.kill(restore);
        if !with_qemu {
            scene.kill_qemu();
        }
        if killed {
            let running = scene.lab.vzdump.spawn_with(&give_up, &[(KILL_AT, "live:given-up")]);
            let finished = scene.finish(running.unwrap());
            assert_eq!(finished.status.signal(), Some(9), "{}", finished.stderr);
            let finished = scene.finish(scene.resume(FAST_KIB_PER_S, &[]));
            assert!(!finished.status.success());
            scene.lab.vzdump.run(&["doctor", "--fix"], SOON).unwrap();
        } else {
            scene.lab.vzdump.run(&give_up, SOON).unwrap();
        }
        let left = (scene.journals(), scene.images().len(), scene.config());
        assert_eq!(left, (0, 0, String::new()), "{format}");
        assert!(!scene.is_running() && !scene.dir.path().join("run/live-200").exists());
    }
    let again = ["restore", &scene.archive, &vm, "--allow-raw-config", "--storage", "local"];
    scene.lab.vzdump.run(&again, SOON).unwrap();
}

/// Steps before the guest runs: the restore is undone.
const BEFORE: [&str; 4] = ["live:offered", "live:allocated", "live:configured", "live:started"];

/// A restore, and its resumes, that are killed again and again, some with their QEMU.
struct Story {
    scene: Scene,
    format: &'static str,
    console: Console,
    /// What the guest has said it has written.
    written: u64,
}

impl Story {
    fn new(format: &'static str) -> Self {
        let mut scene = Scene::new();
        let (console, written) = (scene.lab.watch(NEW_VM), scene.saved.last_b);
        Self { scene, format, console, written }
    }

    fn undone_before_the_guest_runs(&self) {
        for step in BEFORE {
            println!("killed at {step}");
            let restore = self.scene.live(self.format, &[], &[(KILL_AT, step)]);
            let finished = self.scene.finish(restore);
            assert_eq!(finished.status.signal(), Some(9), "{step}: {}", finished.stderr);
            self.scene.lab.vzdump.run(&["doctor", "--fix"], SOON).unwrap();
            let left = (self.scene.journals(), self.scene.images().len(), self.scene.config());
            assert_eq!(left, (0, 0, String::new()), "{step}");
            assert!(!self.scene.is_running(), "{step}");
        }
    }

    /// Waits until the guest has written more.
    fn writes(&mut self) {
        let wanted = self.written + 60;
        let seen = self.console.wait_for_record(wanted, SOON, &self.scene.lab.stop).unwrap();
        self.written = seen.last;
    }

    /// The guest starts, and has all that it had written.
    fn starts(&mut self) {
        self.scene.checked(&mut self.console, self.written);
    }

    fn resume_killed_at(&mut self, step: &str, with_qemu: bool) {
        println!("resumed, and killed at {step}{}", if with_qemu { " with QEMU" } else { "" });
        let resumed = self.scene.resume(FAST_KIB_PER_S, &[(KILL_AT, step)]);
        let finished = self.scene.finish(resumed);
        let log = self.scene.dir.path().join(format!("run/vm/{NEW_VM}/qemu.log"));
        let said = (&finished.stdout, std::fs::read_to_string(log));
        assert_eq!(finished.status.signal(), Some(9), "{step}: {said:?}");
        self.written = self.written.max(self.console.records().unwrap().last);
        if with_qemu {
            self.kill_qemu();
        }
    }

    fn kill_qemu(&mut self) {
        self.scene.kill_qemu();
        self.console = self.scene.lab.watch(NEW_VM);
    }

    /// The guest runs while processes die around it and below it.
    fn interrupted(&mut self) {
        let more = ["--bwlimit", HARDLY_KIB_PER_S];
        let restore = self.scene.live(self.format, &more, &[(KILL_AT, "entry:runs")]);
        let finished = self.scene.finish(restore);
        assert_eq!(finished.status.signal(), Some(9), "{}", finished.stderr);

        println!("a guest that has not run yet");
        let resumed = self.scene.resume(HARDLY_KIB_PER_S, &[]);
        self.starts();
        self.writes();
        self.scene.kill(resumed);
        self.scene.refused();

        println!("a guest that runs, or waits for its archive");
        let resumed = self.scene.resume(HARDLY_KIB_PER_S, &[]);
        self.writes();
        println!("its QEMU is killed");
        self.kill_qemu();
        let finished = self.scene.finish(resumed);
        assert!(
            finished.stderr.contains("--resume 200") || finished.stdout.contains("--resume 200")
        );
        assert_eq!(finished.status.code(), Some(255), "{}", finished.stderr);
        self.scene.refused();

        println!("a guest that is started again");
        let resumed = self.scene.resume(HARDLY_KIB_PER_S, &[]);
        self.starts();
        self.writes();
        self.scene.kill(resumed);
        self.kill_qemu();
    }

    fn ends(mut self) {
        let resumed = self.scene.resume(FAST_KIB_PER_S, &[(KILL_AT, "entry:complete")]);
        let finished = self.scene.finish(resumed);
        assert_eq!(finished.status.signal(), Some(9), "{}", finished.stderr);
        self.scene.lab.vzdump.run(&["doctor", "--fix"], SOON).unwrap();
        if !self.scene.is_running() {
            self.scene.lab.vzdump.run(&["vm", "start", "200"], SOON).unwrap();
        }
        self.starts();
        self.writes();
        self.scene.end(self.written);
    }
}

#[test]
fn a_live_restore_to_qcow2_goes_on_wherever_it_was_killed() {
    let mut story = Story::new("qcow2");
    story.undone_before_the_guest_runs();
    story.interrupted();
    // Of the first disk, while others wait for it.
    story.resume_killed_at("entry:filled", false);
    story.resume_killed_at("live:half", false);
    story.resume_killed_at("live:pending", true);
    story.resume_killed_at("live:pending", false);
    story.resume_killed_at("live:finalized", true);
    story.resume_killed_at("entry:filled", false);
    story.resume_killed_at("live:unlocked", true);
    story.ends();
}

#[test]
fn a_live_restore_to_raw_goes_on_wherever_it_was_killed() {
    let mut story = Story::new("raw");
    story.undone_before_the_guest_runs();
    let restore = story.scene.live("raw", &["--bwlimit", HARDLY_KIB_PER_S], &[]);
    story.starts();
    story.writes();
    story.scene.kill(restore);
    // Of the first disk, while others wait for it.
    story.resume_killed_at("entry:filled", false);
    story.resume_killed_at("live:half", true);
    story.resume_killed_at("live:completing", false);
    story.resume_killed_at("live:finalized", true);
    story.resume_killed_at("live:completing", true);
    story.resume_killed_at("entry:pivot", false);
    story.resume_killed_at("entry:filled", false);
    story.resume_killed_at("live:unlocked", true);
    story.ends();
}

#[test]
fn a_restore_that_is_cancelled_while_a_mirror_completes_lets_the_guest_go_on() {
    let mut story = Story::new("raw");
    let restore = story.scene.live("raw", &["--bwlimit", HARDLY_KIB_PER_S], &[]);
    story.starts();
    story.writes();
    story.scene.kill(restore);
    let resumed = story.scene.resume(FAST_KIB_PER_S, &[(TERM_AT, "live:completing")]);
    let finished = story.scene.finish(resumed);
    let said = format!("{}{}", finished.stdout, finished.stderr);
    assert!(!finished.status.success() && said.contains("was cancelled"), "{said}");
    // The guest's requests wait in QEMU from the end of the copy until the disk is replaced.
    let journal = story.scene.journal();
    let filled = |key: &str| journal.contains(&format!("{{\"entry\":\"filled\",\"key\":\"{key}\""));
    assert!(filled("virtio0") && !filled("virtio2"), "{journal}");
    let finished = story.scene.finish(story.scene.resume(FAST_KIB_PER_S, &[]));
    assert!(finished.status.success(), "{}", finished.stderr);
    story.writes();
    story.scene.end(story.written);
}

/// Whether a file can be written that was open before; not every file system has a way to forbid that.
fn set_writable(file: &Path, is_writable: bool) -> bool {
    let mut open = std::fs::File::options().append(true).open(file).ok();
    let how = if is_writable { "-i" } else { "+i" };
    let set = std::process::Command::new("chattr").arg(how).arg(file).status();
    set.is_ok_and(|status| status.success())
        && open.as_mut().is_none_or(|open| std::io::Write::write_all(open, b" ").is_err())
}

#[test]
#[ignore = "boots a guest, waits for its disks, and needs ext4 and root"]
fn a_mirror_whose_end_cannot_be_journalled_begins_anew() {
    let mut story = Story::new("raw");
    let probe = story.scene.dir.path().join("probe");
    std::fs::write(&probe, "").unwrap();
    let is_possible = set_writable(&probe, false);
    set_writable(&probe, true);
    if !is_possible {
        println!("not tested: this file system, or user, cannot forbid to write an open file");
        return;
    }
    let restore = story.scene.live("raw", &["--bwlimit", HARDLY_KIB_PER_S], &[]);
    story.starts();
    story.writes();
    story.scene.kill(restore);
    let stop = [("VZDUMP_TEST_STOP_AT", "live:completing")];
    let mut resumed = story.scene.resume(FAST_KIB_PER_S, &stop);
    resumed.process().wait_until_stopped(SOON, &story.scene.lab.stop).unwrap();
    let journals = story.scene.dir.path().join("state/journal");
    let journal = journals.read_dir().unwrap().next().unwrap().unwrap().path();
    assert!(set_writable(&journal, false));
    resumed.process().signal(Signal::CONT).unwrap();
    let finished = story.scene.finish(resumed);
    set_writable(&journal, true);
    let said = format!("{}{}", finished.stdout, finished.stderr);
    assert!(!finished.status.success() && said.contains("Cannot write the journal"), "{said}");
    // The disk must not have been replaced: nobody would know, once QEMU ends.
    story.resume_killed_at("entry:pivot", false);
    let text = story.scene.journal();
    assert!(text.contains("{\"entry\":\"pivot\",\"key\":\"virtio0\""), "{text}");
    let finished = story.scene.finish(story.scene.resume(FAST_KIB_PER_S, &[]));
    assert!(finished.status.success(), "{}", finished.stderr);
    story.writes();
    story.scene.end(story.written);
}
