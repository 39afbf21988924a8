// SPDX-License-Identifier: MIT OR Apache-2.0
//! The hook script: its phases with arguments and environment, and what it lets fail.

use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;

use vzdump_core::guest::BackupMode;
use vzdump_core::job::report::GuestResult;
use vzdump_core::job::{GuestReport, JobReport};
use vzdump_core::layout::Monitor;

use crate::modes::make_disks;
use crate::peer::Reaction;
use crate::provider::Script;
use crate::several::Three;
use crate::world::{ID, World};

/// Notes every call in the file `calls`; `$phase` of `more` is the phase.
fn write_script(world: &World, more: &str) -> PathBuf {
    let calls = world.root.join("calls");
    let path = world.root.join("hook");
    let text = format!(
        "#!/bin/sh\nphase=$1\n\
         echo \"$* STOREID=$STOREID VMTYPE=$VMTYPE HOSTNAME=$HOSTNAME TARGET=$TARGET \
         LOGFILE=${{LOGFILE##*/}}\" >> {}\necho \"called for $phase\"\n{more}\n",
        calls.display()
    );
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn calls(world: &World) -> Vec<String> {
    let text = std::fs::read_to_string(world.root.join("calls")).unwrap_or_default();
    // What is not set is not shown.
    let shown = text.lines().map(|line| {
        let words = line.split(' ').filter(|word| !word.ends_with('='));
        words.collect::<Vec<_>>().join(" ")
    });
    shown.collect()
}

fn phases(world: &World) -> Vec<String> {
    calls(world).iter().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_phases_have_vzdumps_order_arguments_and_environment() {
    let mut world = World::new();
    world.options.script = Some(write_script(&world, ""));
    let report = world.backup().await;
    assert!(report.is_success(), "{}", world.sink.text());
    let target = format!("store:backup/{}", crate::provider::ARCHIVE);
    assert_eq!(
        calls(&world),
        [
            "job-init STOREID=store".to_owned(),
            "job-start STOREID=store".to_owned(),
            "backup-start snapshot 100 STOREID=store VMTYPE=qemu HOSTNAME=web".to_owned(),
            format!(
                "backup-end snapshot 100 STOREID=store VMTYPE=qemu HOSTNAME=web TARGET={target}"
            ),
            "log-end snapshot 100 STOREID=store VMTYPE=qemu HOSTNAME=web LOGFILE=qemu-100.log"
                .to_owned(),
            "job-end STOREID=store".to_owned(),
        ]
    );
    let text = world.sink.text();
    assert!(text.contains("INFO: called for job-init") && text.contains("called for log-end"));
    let log = std::fs::read_to_string(report.log_path.unwrap()).unwrap();
    assert!(log.contains("called for backup-start") && !log.contains("job-"), "{log}");
}

/// A job of three guests whose script fails in one phase, for the second guest if it is a guest's.
async fn failing_in(phase: &str, jobs: usize) -> (Three, JobReport) {
    let mut three = Three::with(Script::default());
    let fail = format!("[ $phase = {phase} ] && [ \"${{3:-101}}\" = 101 ] && exit 7; exit 0");
    three.world.options.script = Some(write_script(&three.world, &fail));
    three.world.options.jobs = jobs;
    let report = three.backup().await;
    three.assert_clean(phase);
    (three, report)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_that_fails_for_the_job_fails_the_job() {
    for (phase, guests, begun) in [("job-init", 0, 0), ("job-start", 0, 1), ("job-end", 3, 1)] {
        let (three, report) = failing_in(phase, 1).await;
        let error = report.error.as_ref().unwrap();
        assert!(error.contains(&format!("in phase {phase}: exit status: 7")), "{error}");
        assert_eq!(report.guests.len(), guests, "{phase}");
        assert!(report.guests.iter().all(GuestReport::is_success));
        assert_eq!(three.world.provider.count("start_job"), begun, "{phase}");
        assert_eq!(three.world.provider.count("finish"), begun, "{phase}");
        // As with vzdump, a job that was not even constructed is not aborted.
        let last = if phase == "job-init" { "job-init" } else { "job-abort" };
        assert_eq!(phases(&three.world).last().unwrap(), last);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_that_fails_for_a_guest_fails_that_guest() {
    for jobs in [1, 3] {
        let (three, report) = failing_in("backup-start", jobs).await;
        let results: Vec<_> = report.guests.iter().map(GuestReport::is_success).collect();
        assert_eq!(results, [true, false, true]);
        assert_eq!(three.world.provider.count("start_guest"), 2, "it was begun all the same");
        let aborts = |line: &&String| line.starts_with("backup-abort");
        let calls = calls(&three.world);
        let aborts: Vec<_> = calls.iter().filter(aborts).collect();
        assert_eq!(
            aborts,
            ["backup-abort snapshot 101 STOREID=store VMTYPE=qemu HOSTNAME=guest101"]
        );
        assert_eq!(phases(&three.world).last().unwrap(), "job-end");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn scenario_40_a_script_that_fails_after_the_commit_leaves_the_archive_alone() {
    let (three, report) = failing_in("backup-end", 1).await;
    let guest = &report.guests[1];
    assert_eq!(guest.result, GuestResult::Committed);
    let error = guest.error.as_ref().unwrap();
    assert!(error.ends_with("the archive is complete and stays"), "{error}");
    assert!(!report.is_success());
    assert_eq!(three.world.provider.count("abort"), 0);
    let torn_down = "backup-access-teardown success=true".to_owned();
    assert!(three.others[0].0.log().contains(&torn_down));
    assert!(three.world.sink.text().contains("ERROR: Backup of VM 101 failed - the hook script"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_that_fails_when_all_is_over_is_warned_of() {
    let (three, report) = failing_in("log-end", 1).await;
    assert!(report.is_success(), "{}", three.world.sink.text());
    assert!(report.guests[1].warnings[0].contains("in phase log-end"), "{report:?}");
    // The first error stays the first.
    let mut world = World::with("", Script { fail: Some("backup_vm"), ..Script::default() });
    let fail = "[ $phase = backup-abort ] && exit 1; exit 0";
    world.options.script = Some(write_script(&world, fail));
    let report = world.backup().await;
    assert!(report.error.unwrap().contains("scripted failure of backup_vm"));
    assert!(report.warnings[0].contains("in phase backup-abort"), "{:?}", report.warnings);
    assert_eq!(
        phases(&world),
        ["job-init", "job-start", "backup-start", "backup-abort", "log-end", "job-end"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_ends_its_script_and_calls_it_for_the_abort() {
    let mut world = World::new();
    let block = "[ $phase = backup-start ] && exec sleep 3600; exit 0";
    world.options.script = Some(write_script(&world, block));
    let cancel = async {
        while phases(&world).last().is_none_or(|phase| phase != "backup-start") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        world.cancel.cancel();
    };
    let (report, ()) = tokio::join!(world.backup(), cancel);
    let error = report.error.unwrap();
    assert!(
        error.contains("in phase backup-start: the job was cancelled; it was ended"),
        "{error}"
    );
    assert_eq!(
        phases(&world),
        ["job-init", "job-start", "backup-start", "backup-abort", "log-end", "job-abort"]
    );
    assert_eq!(world.provider.count("start_guest"), 0);
    assert_eq!(world.provider.count("finish"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_cancelled_too_late_has_come_to_its_end() {
    let mut world = World::new();
    world.options.script = Some(write_script(&world, ""));
    let cancel = world.cancel.clone();
    world.peer.script(move |_, name| {
        if name == "backup-access-teardown" {
            cancel.cancel();
        }
        Reaction::Answer
    });
    let report = world.backup().await;
    assert!(report.is_success(), "{}", world.sink.text());
    let phases = phases(&world);
    assert_eq!(&phases[3..], ["backup-end", "log-end", "job-end"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_that_hangs_while_ending_does_not_keep_a_cancelled_job() {
    let copy_for = Duration::from_secs(3600);
    let mut world = World::with("", Script { copy_for, ..Script::default() });
    world.ctx.limits.hook_grace = Duration::from_secs(1);
    let hang = "case $phase in *abort|*end) exec sleep 3600;; esac";
    world.options.script = Some(write_script(&world, hang));
    let cancel = async {
        while world.provider.0.copies.lock().unwrap().0 == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        world.cancel.cancel();
    };
    // Its own bound is a minute.
    let (report, ()) = tokio::join!(world.backup(), cancel);
    assert_eq!(report.error.as_deref(), Some("the job was cancelled"));
    assert_eq!(report.warnings.len(), 2, "{:?}", report.warnings);
    assert_eq!(phases(&world).last().unwrap(), "job-abort");
    world.assert_clean("cancelled");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_that_is_not_there_fails_the_job_before_anything_is_begun() {
    let mut world = World::new();
    world.options.script = Some("/nonexistent/hook".into());
    let World { ctx, provider, options, sink, cancel, .. } = &world;
    let report = vzdump_core::job::run_backup(ctx, &[100], provider, options, sink, cancel).await;
    let error = report.error.unwrap();
    assert!(error.contains("the hook script '/nonexistent/hook' cannot be used"), "{error}");
    assert!(provider.calls().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_nobody_could_ask_to_shut_down_is_not_waited_for() {
    let mut world = World::new();
    make_disks(&world);
    world.options.mode = BackupMode::Stop;
    world.options.stop_wait = Duration::from_millis(100);
    world.options.script = Some(write_script(&world, ""));
    // The monitor belongs to somebody else, who does not let go.
    let _busy = UnixListener::bind(world.ctx.layout.qmp_socket(ID, Monitor::Runner)).unwrap();
    let began = std::time::Instant::now();
    let report = world.backup().await;
    let error = report.error.unwrap();
    assert!(error.contains("ask for a shutdown of the guest"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(30), "it was waited for");
    let text = world.sink.text();
    assert!(!text.contains("still runs"), "{text}");
    assert_eq!(report.point_in_time.downtime_ms, None);
    let phases = phases(&world);
    let at = |phase: &str| phases.iter().position(|name| name == phase).unwrap();
    assert_eq!((at("pre-restart"), at("post-restart")), (at("pre-stop") + 1, at("pre-stop") + 2));
    world.assert_clean("busy monitor");
}
