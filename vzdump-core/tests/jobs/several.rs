// SPDX-License-Identifier: MIT OR Apache-2.0
//! Jobs of several guests: one after the other or at the same time, with failures, locks and
//! cancellation. The numbers are those of the scenarios that the project was made for.

use std::time::Duration;

use vzdump_core::job::report::GuestResult;
use vzdump_core::job::{JobReport, run_backup};
use vzdump_core::layout::Monitor;

use crate::peer::Peer;
use crate::provider::Script;
use crate::world::{DISKS, ID, PidHolder, World, start_qemu};

/// A world with three running VMs.
pub struct Three {
    pub world: World,
    pub others: Vec<(Peer, PidHolder)>,
}

pub const IDS: [u32; 3] = [ID, 101, 102];

impl Three {
    pub fn with(script: Script) -> Self {
        let world = World::with("", script);
        let layout = &world.ctx.layout;
        let start = |&id: &u32| {
            layout.make_vm_run_dir(id).unwrap();
            let config = format!(
                "name: guest{id}\nscsi0: local:{id}/vm-{id}-disk-0.raw\n\
                 virtio1: local:{id}/vm-{id}-disk-1.raw\n"
            );
            std::fs::write(layout.vm_config_path(id), config).unwrap();
            let peer = Peer::start(&layout.qmp_socket(id, Monitor::Backup), &DISKS);
            (peer, start_qemu(&layout.pid_file(id)))
        };
        let others = IDS[1..].iter().map(start).collect();
        Self { world, others }
    }

    pub async fn backup(&self) -> JobReport {
        let World { ctx, provider, options, sink, cancel, .. } = &self.world;
        let run = run_backup(ctx, &IDS, provider, options, sink, cancel);
        tokio::time::timeout(Duration::from_secs(60), run).await.expect("the job hangs")
    }

    pub fn assert_clean(&self, what: &str) {
        self.world.assert_clean(what);
        self.others.iter().for_each(|(peer, _)| peer.assert_clean(what));
    }
}

fn results(report: &JobReport) -> Vec<(u32, GuestResult)> {
    report.guests.iter().map(|guest| (guest.id, guest.result)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn scenario_77_guest_2_of_3_fails_and_1_and_3_are_saved() {
    for jobs in [1, 2, 3] {
        let fail_guest = Some((101, "backup_vm"));
        let mut three = Three::with(Script { fail_guest, ..Script::default() });
        three.world.options.jobs = jobs;
        let report = three.backup().await;
        let expected = [GuestResult::Committed, GuestResult::Failed, GuestResult::Committed];
        assert_eq!(results(&report), IDS.into_iter().zip(expected).collect::<Vec<_>>(), "{jobs}");
        assert!(!report.is_success() && report.error.is_none());
        let why = "scripted failure of backup_vm of 101".to_owned();
        assert_eq!(report.guests[1].error.as_ref(), Some(&why));
        // Given up once, with the reason.
        assert_eq!(*three.world.provider.0.aborts.lock().unwrap(), [(101, why)]);
        assert_eq!(three.world.provider.count("finish"), 1);
        assert!(three.world.sink.text().contains("ERROR: Backup job finished with errors"));
        three.assert_clean("one failed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_are_worked_on_at_the_same_time_but_no_more_than_asked_for() {
    for (jobs, most) in [(1, 1), (2, 2), (5, 3)] {
        let copy_for = Duration::from_millis(300);
        let mut three = Three::with(Script { copy_for, ..Script::default() });
        three.world.options.jobs = jobs;
        let report = three.backup().await;
        assert!(report.is_success(), "{}", three.world.sink.text());
        assert_eq!(three.world.provider.0.copies.lock().unwrap().1, most, "of {jobs}");
        assert_eq!(report.guests.iter().map(|guest| guest.id).collect::<Vec<_>>(), IDS);
        three.assert_clean("parallel");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ram_for_old_data_is_split_among_guests_at_the_same_time() {
    for (jobs, part) in [(1, 64 << 20), (2, 32 << 20)] {
        let copy_for = Duration::from_millis(300);
        let mut three = Three::with(Script { copy_for, ..Script::default() });
        three.world.options.jobs = jobs;
        three.world.options.buffer_total_bytes = Some(64 << 20);
        let look = async {
            while three.world.provider.0.copies.lock().unwrap().0 == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            three.world.peer.state().access.as_ref().and_then(|access| access.buffer_total)
        };
        let (report, buffer_total) = tokio::join!(three.backup(), look);
        assert!(report.is_success(), "{}", three.world.sink.text());
        assert_eq!(buffer_total, Some(part), "of {jobs}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_say_which_guest_they_are_of_only_if_several_are_worked_on() {
    for jobs in [1, 3] {
        let mut three = Three::with(Script::default());
        three.world.options.jobs = jobs;
        let report = three.backup().await;
        let text = three.world.sink.text();
        let is_marked = jobs > 1;
        for id in IDS {
            let line = format!("INFO: {id}: Starting Backup of VM {id} (qemu)");
            assert_eq!(text.contains(&line), is_marked, "{text}");
            assert_eq!(text.contains(&format!("INFO: {id}: all read")), is_marked, "{text}");
        }
        // A guest's own log needs no mark, and has no line of another guest.
        let log = std::fs::read_to_string(report.guests[1].log_path.as_ref().unwrap()).unwrap();
        assert!(log.contains("INFO: Starting Backup of VM 101"), "{log}");
        assert!(!log.contains("VM 100") && !log.contains("VM 102"), "{log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn scenario_80_every_begun_backup_ends_once_on_every_path() {
    for call in ["start_guest", "plan_volumes", "backup_vm", "commit"] {
        for jobs in [1, 3] {
            let mut three =
                Three::with(Script { fail_guest: Some((101, call)), ..Script::default() });
            three.world.options.jobs = jobs;
            let report = three.backup().await;
            assert_eq!(report.guests[1].result, GuestResult::Failed, "{call}");
            let provider = &three.world.provider;
            // Each begun backup is consumed by a commit or by an abort.
            let begun = if call == "start_guest" { 2 } else { 3 };
            assert_eq!(provider.count("commit") + provider.count("abort"), begun, "{call}");
            assert_eq!(provider.count("finish"), 1, "{call}");
            assert_eq!(provider.calls().last().unwrap(), "finish", "{call}");
            three.assert_clean(call);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_of_several_guests_ends_all_and_begins_no_more() {
    let copy_for = Duration::from_secs(3600);
    let mut three = Three::with(Script { copy_for, ..Script::default() });
    three.world.options.jobs = 2;
    let cancel = async {
        while three.world.provider.0.copies.lock().unwrap().0 < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        three.world.cancel.cancel();
    };
    let (report, ()) = tokio::join!(three.backup(), cancel);
    assert_eq!(three.world.provider.count("start_guest"), 2);
    assert_eq!(three.world.provider.count("abort"), 2);
    for guest in &report.guests {
        assert_eq!(guest.error.as_deref(), Some("the job was cancelled"));
    }
    assert!(!three.world.sink.text().contains("VM 102"), "it was never begun");
    three.assert_clean("cancelled");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_panics_for_one_guest_does_not_stop_the_others() {
    for (call, jobs) in [("backup_vm", 1), ("backup_vm", 3), ("commit", 1)] {
        let panic_guest = Some((101, call));
        let mut three = Three::with(Script { panic_guest, ..Script::default() });
        three.world.options.jobs = jobs;
        let report = three.backup().await;
        let expected = [GuestResult::Committed, GuestResult::Unknown, GuestResult::Committed];
        assert_eq!(results(&report), IDS.into_iter().zip(expected).collect::<Vec<_>>(), "{call}");
        let error = report.guests[1].error.as_ref().unwrap();
        let why = format!("internal error: scripted panic of {call} of 101; what it had begun");
        assert!(error.starts_with(&why), "{error}");
        assert_eq!(three.world.provider.count("finish"), 1);
        // At once: a guest that is held must not wait for its next backup.
        three.assert_clean(call);
        three.world.provider.0.script.lock().unwrap().panic_guest = None;
        let next = three.backup().await;
        assert!(next.is_success(), "{}", three.world.sink.text());
        three.assert_clean(call);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn scenario_83_a_second_job_waits_and_times_out_with_a_clear_error() {
    let copy_for = Duration::from_millis(1500);
    let mut world = World::with("", Script { copy_for, ..Script::default() });
    world.options.lock_wait = Duration::from_secs(30);
    let patient = world.options.clone();
    let impatient = vzdump_core::job::BackupOptions {
        lock_wait: Duration::from_millis(100),
        ..world.options.clone()
    };
    let later = |options| {
        let World { ctx, provider, sink, cancel, .. } = &world;
        async move {
            while provider.0.copies.lock().unwrap().0 == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            run_backup(ctx, &[ID], provider, &options, sink, cancel).await
        }
    };
    let jobs = async { tokio::join!(world.backup(), later(impatient), later(patient)) };
    let (first, impatient, patient) =
        tokio::time::timeout(Duration::from_secs(60), jobs).await.expect("a job hangs");
    assert!(first.is_success() && patient.is_success(), "{}", world.sink.text());
    let error = impatient.guests[0].error.as_ref().unwrap();
    let own = std::process::id();
    assert!(
        error.contains(&format!("VM 100 is in use by another task (process {own}).")),
        "{error}"
    );
    assert!(error.contains("It was waited for"), "{error}");
    assert!(world.sink.text().contains("Waiting for up to 30s."), "{}", world.sink.text());
    assert_eq!(world.provider.0.copies.lock().unwrap().1, 1, "they met");
    world.assert_clean("two jobs");
}

#[tokio::test(flavor = "multi_thread")]
async fn scenario_75_a_job_that_cannot_begin_touches_no_guest() {
    for call in ["activate", "start_job"] {
        let three = Three::with(Script { fail: Some(call), ..Script::default() });
        let report = three.backup().await;
        assert!(report.error.as_ref().unwrap().contains(&format!("scripted failure of {call}")));
        assert!(report.guests.is_empty() && !report.is_success());
        assert_eq!(three.world.provider.count("start_guest"), 0);
        // There is no job to end.
        assert_eq!(three.world.provider.count("finish"), 0);
        assert_eq!(three.world.peer.log(), [""; 0]);
        assert!(three.world.sink.text().contains("ERROR: Backup job failed - scripted failure"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn scenario_76_three_bad_archive_names_are_three_clear_errors() {
    for (name, fault) in [("", "0 bytes"), ("a//b", "empty"), ("a b", "character ' '")] {
        let world =
            World::with("", Script { archive_name: Some(name.into()), ..Script::default() });
        let error = world.backup().await.error.unwrap();
        assert!(error.contains(fault), "{error}");
        // The guest was not even asked how it is.
        assert_eq!(world.peer.log(), [""; 0]);
        assert_eq!(world.provider.count("abort"), 1);
        world.assert_clean(name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn scenario_78_a_log_that_cannot_be_written_is_only_warned_of() {
    let world = World::new();
    // A directory where the log should be.
    let path = world.ctx.layout.log_dir().join("qemu-100.log");
    std::fs::create_dir_all(&path).unwrap();
    let report = world.backup().await;
    assert!(report.is_success(), "{}", world.sink.text());
    assert!(world.sink.text().contains("WARN: no log file"), "{}", world.sink.text());
    assert_eq!(report.log_path, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn scenario_79_lines_of_the_provider_are_in_the_guest_s_log() {
    let world = World::new();
    let report = world.backup().await;
    let log = std::fs::read_to_string(report.log_path.unwrap()).unwrap();
    assert!(log.contains(" INFO: all read\n"), "{log}");
}
