// SPDX-License-Identifier: MIT OR Apache-2.0
//! The job engine on real guests: the bandwidth limit, several guests at a time, signals at every
//! step. The numbers are those of the scenarios that the project was made for.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use system_tests::console::Console;
use system_tests::lab::{
    BACKUPS, Lab, LabOptions, PLAIN_VIRTIO, Running, SOURCE_VM, VIRTIO_WITH_THREADS,
};
use system_tests::process::{Finished, Stop};
use system_tests::turn::Turn;
use system_tests::vzdump::last_json;

const SECOND_VM: u32 = 200;
/// Ends what takes no longer than cleaning up.
const SOON: Duration = Duration::from_secs(120);
/// Has `vzdump` asked to end, twice, when its job reaches this action.
const TERM_AT: &str = "VZDUMP_TEST_TERM_AT";
/// Ends `vzdump` by SIGKILL when its job reaches this action.
const KILL_AT: &str = "VZDUMP_TEST_KILL_AT";

struct Scene {
    lab: Lab,
    _dir: tempfile::TempDir,
    _turn: Turn,
}

impl Scene {
    fn new(disk_mib: u64, format: &'static str, hardware: &'static [&'static str]) -> Self {
        let stop = Stop::default();
        let turn = Turn::wait(&stop).unwrap();
        let dir = tempfile::Builder::new().prefix("vz-job-").tempdir_in("/var/tmp").unwrap();
        let disk_bytes = disk_mib << 20;
        let options = LabOptions { disk_bytes, format, hardware, rate_per_s: 300, show: true };
        let lab = Lab::create(dir.path(), options, &stop).unwrap();
        Self { lab, _dir: dir, _turn: turn }
    }

    fn run(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Finished {
        let arguments = [&["backup", "--storage", BACKUPS], arguments].concat();
        let backup = self.lab.vzdump.spawn_with(&arguments, environment).unwrap();
        backup.finish(SOON, &self.lab.stop).unwrap()
    }

    fn backup(&self, arguments: &[&str], environment: &[(&str, &str)]) -> (Finished, Value) {
        let finished = self.run(arguments, environment);
        let report = last_json(&finished.stdout).unwrap();
        (finished, report)
    }

    fn assert_guest_writes(&self, console: &mut Console) {
        let before = console.records().unwrap().last;
        console.wait_for_record(before.max(1) + 50, SOON, &self.lab.stop).unwrap();
    }

    /// Nothing is left of a job: no image, no journal, no private directory.
    fn assert_tidy(&self, what: &str) {
        let dir = &self.lab.dir;
        let names = |path: PathBuf| -> Vec<_> {
            let entries = path.read_dir().into_iter().flatten();
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
        };
        let images = names(dir.join(format!("local/images/{SOURCE_VM}")));
        assert_eq!(images.len(), 2, "{what}: {images:?}");
        assert_eq!(names(dir.join("state/journal")), [""; 0], "{what}");
        let private = names(dir.join(format!("run/vm/{SOURCE_VM}")));
        assert!(!private.iter().any(|name| name.starts_with("b-")), "{what}: {private:?}");
    }

    /// The restored disks are exactly what a point in time must be.
    fn assert_restores(&self, report: &Value, guest: usize, vm: u32) {
        let archive = report["guests"][guest]["archive"].as_str().unwrap();
        self.lab.restore(&format!("{BACKUPS}:backup/{archive}"), vm).unwrap();
        let found = self.lab.check_outside(vm, false).unwrap();
        assert!(found.problems.is_empty(), "{}", found.line());
    }
}

fn number(report: &Value, guest: usize, pointer: &str) -> u64 {
    report["guests"][guest].pointer(pointer).and_then(Value::as_u64).unwrap()
}

/// Bytes read by all guests in the time of the slowest one, as a part of the limit.
fn ratio(report: &Value, guests: usize, limit_kib_per_s: u64) -> f64 {
    let all = 0..guests;
    let read: u64 = all.clone().map(|at| number(report, at, "/transferred/read_bytes")).sum();
    let ms = all.map(|at| number(report, at, "/transfer_ms")).max().unwrap();
    let rate = read as f64 / (ms as f64 / 1000.0);
    println!("{read} bytes in {ms} ms: {:.2} of the limit", rate / (limit_kib_per_s << 10) as f64);
    rate / (limit_kib_per_s << 10) as f64
}

#[test]
fn scenario_57_a_bandwidth_limit_is_kept_over_all_disks_and_guests() {
    const LIMIT_KIB_PER_S: u64 = 8 << 10;
    let limit = LIMIT_KIB_PER_S.to_string();
    let mut scene = Scene::new(48, "raw", VIRTIO_WITH_THREADS);
    let Running { mut console, .. } = scene.lab.start(SOURCE_VM).unwrap();
    let vm = SOURCE_VM.to_string();
    let (full, report) = scene.backup(&[&vm, "--bwlimit", &limit], &[]);
    assert!(full.status.success(), "{}", full.stdout);
    // The limit is the limit; that it is reached says that nothing else held the backup up.
    let part = ratio(&report, 1, LIMIT_KIB_PER_S);
    assert!((0.5..=1.05).contains(&part), "{part}");
    // Trims come through: what was stored is released.
    assert!(number(&report, 0, "/access/released_bytes") > 0, "{report}");
    scene.assert_tidy("limited");
    scene.assert_restores(&report, 0, SECOND_VM);

    // Bitmaps and block status come through too: an increment of two guests at once.
    scene.assert_guest_writes(&mut console);
    scene.lab.start(SECOND_VM).unwrap();
    let second = SECOND_VM.to_string();
    let (both, report) = scene.backup(&[&vm, &second, "--jobs", "2", "--bwlimit", &limit], &[]);
    assert!(both.status.success(), "{}", both.stdout);
    let actions: Vec<_> = report["guests"]
        .as_array()
        .unwrap()
        .iter()
        .map(|g| &g["volumes"][0]["bitmap_action"])
        .collect();
    assert_eq!(actions, ["used", "new"]);
    let part = ratio(&report, 2, LIMIT_KIB_PER_S);
    assert!(part <= 1.05, "{part}");
    let text = both.stdout;
    assert!(text.contains("\"guest_id\":200") && text.contains("\"guest_id\":100"), "{text}");
    scene.assert_restores(&report, 0, 300);
    scene.assert_restores(&report, 1, 301);
    scene.assert_tidy("both");
}

/// Every step of the job, and whether it ends with an archive when it is interrupted there; a commit
/// may be given up or be too far for that.
const STEPS: [(&str, Option<bool>); 20] = [
    ("OpenJournal", Some(false)),
    ("StartGuest", Some(false)),
    ("Prepare", Some(false)),
    ("EnterMode", Some(false)),
    ("PlanVolumes", Some(false)),
    ("Acquire", Some(false)),
    ("PointInTime", Some(false)),
    ("Resume", Some(false)),
    ("OpenSource", Some(false)),
    ("Transfer", Some(false)),
    ("JournalCommit", None),
    ("Commit", None),
    ("RecordOutcome", Some(true)),
    ("Teardown", Some(true)),
    ("CloseSource", Some(true)),
    ("Release", Some(true)),
    ("LeaveMode", Some(true)),
    ("Cleanup", Some(true)),
    ("Describe", Some(true)),
    ("CloseJournal", Some(true)),
];

#[test]
fn scenario_58_signals_at_each_step_end_the_job_in_order_and_leave_the_guest_running() {
    let mut scene = Scene::new(32, "qcow2", PLAIN_VIRTIO);
    let mut console = scene.lab.start(SOURCE_VM).unwrap().console;
    let vm = SOURCE_VM.to_string();
    let mut archives = 0;
    for (step, expected) in STEPS {
        println!("signals at {step}");
        let (ended, report) = scene.backup(&[&vm], &[(TERM_AT, step)]);
        let guest = &report["guests"][0];
        let is_committed = guest["result"] == "committed";
        assert!(expected.is_none_or(|expected| expected == is_committed), "{step}: {guest}");
        let code = if is_committed { 0 } else { 255 };
        assert_eq!(ended.status.code(), Some(code), "{step}: {}", ended.stdout);
        assert_eq!(guest["error"].is_null(), is_committed, "{step}: {guest}");
        archives += usize::from(is_committed);
        assert_eq!(scene.lab.archives().unwrap().len(), archives, "{step}");
        assert!(ended.stderr.contains("ending in order"), "{step}: {}", ended.stderr);
        scene.assert_tidy(step);
        scene.assert_guest_writes(&mut console);
    }
    // No lock is left, and the changes of the failed ones are not lost.
    let (last, report) = scene.backup(&[&vm, "--lockwait", "0"], &[]);
    assert!(last.status.success(), "{}", last.stdout);
    assert_eq!(report["guests"][0]["volumes"][0]["bitmap_action"], "used");
    scene.assert_restores(&report, 0, 300);
}

/// What is undone when a transfer is cancelled.
const UNDO: [&str; 7] =
    ["Teardown", "CloseSource", "Release", "LeaveMode", "Cleanup", "Abort", "CloseJournal"];

#[test]
fn a_kill_at_each_step_of_an_abort_is_cleaned_up_by_the_next_run() {
    let mut scene = Scene::new(32, "raw", PLAIN_VIRTIO);
    let mut console = scene.lab.start(SOURCE_VM).unwrap().console;
    let vm = SOURCE_VM.to_string();
    let (first, _) = scene.backup(&[&vm], &[]);
    assert!(first.status.success(), "{}", first.stdout);
    for (archives, step) in (1..).zip(UNDO) {
        println!("cancelled, then killed at {step}");
        // The limit has the signals meet a transfer under way.
        let limited = [vm.as_str(), "--bwlimit", "512"];
        let killed = scene.run(&limited, &[(TERM_AT, "Transfer"), (KILL_AT, step)]);
        assert_eq!(killed.status.signal(), Some(9), "{step}: {}", killed.stdout);
        assert_eq!(scene.lab.archives().unwrap().len(), archives, "{step}");
        scene.assert_guest_writes(&mut console);
        let (next, report) = scene.backup(&[&vm], &[]);
        assert!(next.status.success(), "{step}: {}", next.stdout);
        assert_eq!(report["guests"][0]["volumes"][0]["bitmap_action"], "used", "{step}");
        scene.assert_tidy(step);
    }
    let (_, last) = scene.backup(&[&vm], &[]);
    scene.assert_restores(&last, 0, 300);
}
