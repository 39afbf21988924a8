// SPDX-License-Identifier: MIT OR Apache-2.0
//! Notes, protection and pruning at the end of a guest's backup: their order, and that nothing of
//! it can fail the backup.

use std::sync::Arc;
use std::time::Duration;

use provider_api::{Archive, GuestKind};
use vzdump_core::job::GuestReport;

use crate::provider::{ARCHIVE, Script, Stored};
use crate::world::{ID, World};

const DAY_S: i64 = 86_400;

fn archive(name: &str, time_s: i64) -> Archive {
    Archive {
        name: name.to_owned(),
        subtype: GuestKind::Qemu,
        guest_id: ID,
        time_s,
        size_bytes: 1,
        base: None,
        commit_id: None,
        protected: false,
        notes: None,
        verified: None,
    }
}

/// A world that is asked for everything; its storage holds three older archives of the guest, one of
/// a container of the same number, and the new one.
fn world(script: Script) -> World {
    let mut other = archive("other", 0);
    other.subtype = GuestKind::Lxc;
    let now_s = 30 * DAY_S;
    let archives = vec![
        archive("old-1", DAY_S),
        archive("old-2", 2 * DAY_S),
        other,
        archive("old-3", 3 * DAY_S),
        archive(ARCHIVE, now_s),
    ];
    let mut world = World::with("", Script { archives, ..script });
    world.options.notes = Some("{{guestname}} {{vmid}}\\nby {{cluster}}".to_owned());
    world.options.protected = true;
    world.options.prune = Some("keep-last=2".parse().unwrap());
    world
}

/// The calls from the commit on.
fn calls_after_commit(world: &World) -> Vec<String> {
    let calls = world.provider.calls();
    let commit = calls.iter().position(|call| call == "commit").expect("there is a commit");
    calls[commit + 1..].to_vec()
}

fn assert_warned(report: &GuestReport, text: &str) {
    assert!(report.is_success(), "{report:?}");
    assert!(report.error.is_none(), "{report:?}");
    assert!(report.warnings.iter().any(|warning| warning.contains(text)), "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn notes_protection_and_pruning_come_after_the_teardown_in_this_order() {
    let world = world(Script::default());
    let peer = world.peer.clone();
    world.provider.0.script.lock().unwrap().on_change = Some(Arc::new(move || {
        let settled = "backup-access-teardown success=true".to_owned();
        assert!(peer.log().contains(&settled), "too early: {:#?}", peer.log());
    }));
    let report = world.backup().await;
    assert!(report.is_success() && report.warnings.is_empty(), "{report:?}");
    assert_eq!(report.pruned, ["old-1", "old-2"]);
    let notes = format!("{ARCHIVE}: web 100\nby standalone node");
    let protected = format!("{ARCHIVE}: true");
    let log = format!("{ARCHIVE}: log");
    assert_eq!(
        calls_after_commit(&world),
        [
            "guest_config",
            "set_notes",
            &notes,
            "set_protected",
            &protected,
            "keep_log",
            &log,
            "list",
            "remove",
            "old-2",
            "remove",
            "old-1",
            "finish",
        ]
    );
    let text = world.sink.text();
    for line in [
        "INFO: adding notes to backup",
        "INFO: marking backup as protected",
        "INFO: prune older backups with retention: keep-last=2",
        "INFO: removing backup 'store:backup/old-1'",
        "INFO: pruned 2 backup(s) not covered by keep-retention policy",
        "INFO: Finished Backup of VM 100",
    ] {
        assert!(text.contains(line), "{line:?} is missing in\n{text}");
    }
    world.assert_clean("success");
}

/// It would be kept by a rule and removed by the same.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_pruned_by_a_list_that_has_an_archive_twice() {
    let world = world(Script::default());
    {
        let mut script = world.provider.0.script.lock().unwrap();
        let again = script.archives[0].clone();
        script.archives.push(again);
    }
    let report = world.backup().await;
    assert_warned(&report, "older archives are not pruned: the storage lists the archive 'old-");
    assert_eq!(world.provider.count("remove"), 0);
    world.assert_clean("twice");
}

/// Scenario 40.
#[tokio::test(flavor = "multi_thread")]
async fn what_fails_after_the_commit_only_warns() {
    for (call, text) in [
        ("set_notes", "the archive has no notes: scripted failure of set_notes"),
        ("keep_log", "the archive has no log: scripted failure of keep_log"),
        ("set_protected", "the archive is not protected: scripted failure of set_protected"),
        ("list", "older archives are not pruned: scripted failure of list"),
        ("remove", "'old-1' was not removed: scripted failure of remove"),
    ] {
        let world = world(Script { fail: Some(call), ..Script::default() });
        let report = world.backup().await;
        assert_warned(&report, text);
        assert_eq!(world.provider.count("abort"), 0, "{call}");
        // The others are done all the same.
        for other in ["set_notes", "set_protected", "list"] {
            assert_eq!(world.provider.count(other), 1, "{call} fails, {other}");
        }
        let settled = "backup-access-teardown success=true".to_owned();
        assert!(world.peer.log().contains(&settled), "{call}");
        world.assert_clean(call);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_failed_prunes_nothing() {
    let world = world(Script { fail: Some("backup_vm"), ..Script::default() });
    assert!(!world.backup().await.is_success());
    for call in ["set_notes", "set_protected", "list", "remove"] {
        assert_eq!(world.provider.count(call), 0, "{call}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_need_stays_without_a_warning() {
    let world = world(Script { needed: vec!["old-1".into()], ..Script::default() });
    let report = world.backup().await;
    assert!(report.is_success() && report.warnings.is_empty(), "{report:?}");
    assert_eq!(report.pruned, ["old-2"]);
    assert!(world.sink.text().contains("'store:backup/old-1' stays"), "{}", world.sink.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_is_listed_no_more_counts_as_gone() {
    let not_found = vec![("old-1".to_owned(), false), ("old-2".to_owned(), true)];
    let world = world(Script { not_found, ..Script::default() });
    let report = world.backup().await;
    assert_eq!(report.pruned, ["old-2"]);
    assert_warned(&report, "'old-1' was not removed: scripted: something is missing");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_new_archive_stays_even_if_the_others_are_from_the_future() {
    let world = world(Script::default());
    for archive in &mut world.provider.0.script.lock().unwrap().archives {
        if archive.name.starts_with("old") {
            archive.time_s += 365 * DAY_S;
        }
    }
    let report = world.backup().await;
    assert_eq!(report.pruned, ["old-1"]);
    assert!(world.sink.text().contains("from the future"), "{}", world.sink.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_has_become_free_is_not_given_away_in_the_same_second() {
    let world = world(Script::default());
    // At the beginning of a second.
    let begun = jiff::Timestamp::now().subsec_nanosecond();
    tokio::time::sleep(Duration::from_nanos(u64::try_from(1_000_000_000 - begun).unwrap())).await;
    let now_s = jiff::Timestamp::now().as_second();
    for archive in &mut world.provider.0.script.lock().unwrap().archives {
        if archive.name.starts_with("old") {
            archive.time_s = now_s;
        }
    }
    let report = world.backup().await;
    assert_eq!(report.pruned, ["old-1"]);
    assert!(jiff::Timestamp::now().as_second() > now_s);
}

/// They may be all that is left of disks that were lost by mistake.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_without_disks_removes_no_archive_that_has_some() {
    for (config, is_pruned) in [
        ("scsi0: local:100/vm-100-disk-0.raw\n", false),
        ("scsi0: no, disk=\n", false),
        ("ide2: none,media=cdrom\nscsi0: local:100/x.raw,backup=0\n", true),
        ("name: web\n", true),
    ] {
        let restore = Some(Stored { config: config.to_owned(), ..Stored::default() });
        let world = world(Script { restore, ..Script::default() });
        std::fs::write(world.ctx.layout.vm_config_path(ID), "name: web\n").unwrap();
        let report = world.backup().await;
        if is_pruned {
            assert!(report.is_success() && report.warnings.is_empty(), "{report:?}");
            assert_eq!(report.pruned, ["old-1", "old-2"], "{config}");
        } else {
            assert_warned(&report, "older archives are not pruned: ");
            assert_eq!(world.provider.count("remove"), 0, "{config}");
        }
        world.assert_no_files(config);
    }
}

/// Scenario 82.
#[tokio::test(flavor = "multi_thread")]
async fn the_limit_of_protected_archives_is_checked_before_the_backup_begins() {
    let mut world = world(Script::default());
    for archive in &mut world.provider.0.script.lock().unwrap().archives {
        archive.protected = ["old-1", "other"].contains(&archive.name.as_str());
    }
    world.options.max_protected = Some(1);
    let error = world.backup().await.error.unwrap();
    assert!(error.contains("may hold 1 protected archives of a guest and has 1"), "{error}");
    assert_eq!(world.provider.count("start_guest"), 0);
    assert!(world.peer.log().is_empty());
    world.assert_no_files("limit");
    world.options.max_protected = Some(2);
    assert!(world.backup().await.is_success());
}

/// Scenario 82.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_notes_template_fails_the_job_before_any_guest() {
    use vzdump_core::job::run_backup;
    let mut world = World::new();
    world.options.notes = Some("{{host}}".to_owned());
    let World { ctx, provider, options, sink, cancel, .. } = &world;
    let report = run_backup(ctx, &[ID], provider, options, sink, cancel).await;
    assert!(report.error.unwrap().contains("unknown variable '{{host}}'"));
    assert!(report.guests.is_empty() && world.provider.calls().is_empty());
}
