// SPDX-License-Identifier: MIT OR Apache-2.0
//! The wiring, with real files and without QEMU.

use std::fs;

use super::*;

fn host(storage_cfg: &str) -> (tempfile::TempDir, Host) {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("etc")).unwrap();
    let text = storage_cfg.replace("ROOT", dir.path().to_str().unwrap());
    fs::write(dir.path().join("etc/storage.cfg"), text).unwrap();
    fs::write(dir.path().join("etc/vzdump.conf"), "qemu-bin: /nonexistent\nother: 1\n").unwrap();
    let host = Host::open(Some(dir.path().into()), &Overrides::default()).unwrap();
    (dir, host)
}

const STORAGES: &str = "directory: backups\n\tpath ROOT/backups\n\nzfspool: tank\n\tpool x\n\n\
                        directory: off\n\tpath /off\n\tdisable\n";

#[test]
fn storages_are_told_apart() {
    let (_dir, host) = host(STORAGES);
    let uses: Vec<_> = host.storages().into_iter().map(|s| (s.id, s.used_for)).collect();
    assert_eq!(
        uses,
        [
            ("backups".to_owned(), StorageUse::Backups),
            ("tank".to_owned(), StorageUse::Unsupported),
            ("off".to_owned(), StorageUse::Backups),
            ("local".to_owned(), StorageUse::Images),
        ]
    );
}

#[tokio::test]
async fn a_storage_that_holds_no_backups_is_refused_by_name() {
    let (_dir, host) = host(STORAGES);
    for (storage, fault) in [
        ("tank", "has the type 'zfspool', which holds no backups; storages for backups: backups."),
        ("none", "is not in storage.cfg"),
        ("off", "is disabled"),
    ] {
        let error = host.list(Some(storage)).await.unwrap_err().to_string();
        assert!(error.contains(fault), "{error}");
    }
}

#[tokio::test]
async fn an_archive_that_does_not_exist_is_named() {
    let (_dir, host) = host(STORAGES);
    let error = host.show_config("nothing").await.unwrap_err();
    assert!(error.to_string().contains("no archive 'nothing'"), "{error}");
    assert!(error.advice().unwrap().contains("vzdump list"));
    assert!(host.show_config("backups:backup/../x").await.is_err());
    assert!(host.show_config("backups:backup/nothing").await.is_err());
}

#[tokio::test]
async fn the_doctor_names_what_is_missing() {
    let (_dir, host) = host(STORAGES);
    let report = host.doctor(true, &vzdump_core::task_log::NoLog).await.unwrap();
    assert!(!report.is_healthy());
    let qemu = report.checks.iter().find(|check| check.name == "qemu-img").unwrap();
    assert!(!qemu.ok && qemu.found.contains("/nonexistent"), "{}", qemu.found);
    assert!(report.recovered.unwrap().left.is_empty());
}

#[tokio::test]
async fn a_vm_is_made_and_listed() {
    let (_dir, host) = host(STORAGES);
    let options = CreateOptions {
        keys: vec![("name".into(), "web".into())],
        disks: vec![DiskContent::Empty(1 << 20)],
        ..CreateOptions::default()
    };
    host.vm_create(100, &options, &vzdump_core::task_log::NoLog, &CancellationToken::new())
        .await
        .unwrap();
    let all = host.vm_list().await.unwrap();
    assert_eq!((all.len(), all[0].id, all[0].running), (1, 100, false));
    let error = host.vm_start(100, StartOptions::default()).await.unwrap_err();
    assert!(error.to_string().contains("cargo xtask qemu"), "{error}");
}

fn request(settings: BackupSettings) -> BackupRequest {
    BackupRequest {
        settings,
        job: None,
        fleecing_storage: None,
        freeze: true,
        buffer_size_bytes: None,
        granularity_bytes: None,
        buffer_total_bytes: None,
    }
}

fn guests(ids: &[u32]) -> BackupSettings {
    let selection = Some(Selection::Guests(ids.to_vec()));
    BackupSettings { selection, ..BackupSettings::default() }
}

/// A host with three VMs, a pool and a job.
fn host_with_guests() -> (tempfile::TempDir, Host) {
    let (dir, host) =
        host("directory: backups\n\tpath ROOT/backups\n\ndirectory: more\n\tpath /x\n");
    let etc = dir.path().join("etc");
    fs::create_dir_all(etc.join("qemu-server")).unwrap();
    for id in [100, 101, 102] {
        fs::write(etc.join(format!("qemu-server/{id}.conf")), "name: x\n").unwrap();
    }
    fs::write(etc.join("user.cfg"), "pool:web::102,101,999:local:\n").unwrap();
    let job = "vzdump: nightly\n\tschedule 21:00\n\tpool web\n\tstorage more\n\tbwlimit 2048\n\
               \tlockwait 7\n\tzstd 1\n";
    fs::write(etc.join("jobs.cfg"), job).unwrap();
    let conf = "qemu-bin: /nonexistent\nstorage: backups\nlockwait: 3\njobs: 2\nscript: /bin/sh\n\
                fleecing: enabled=1,storage=fast\nother: 1\nall: 1\n";
    fs::write(etc.join("vzdump.conf"), conf).unwrap();
    (dir, host)
}

#[test]
fn guests_are_chosen_by_number_all_exclude_and_pool() {
    let (_dir, host) = host_with_guests();
    let ids = |selection| {
        let settings = BackupSettings { selection: Some(selection), ..BackupSettings::default() };
        host.plan_backup(request(settings)).map(|plan| plan.ids)
    };
    let pool = |exclude| Selection::Pool { pool: "web".into(), exclude };
    assert_eq!(ids(Selection::Guests(vec![7, 100, 7])).unwrap(), [7, 100]);
    assert_eq!(ids(Selection::All { exclude: vec![] }).unwrap(), [100, 101, 102]);
    assert_eq!(ids(Selection::All { exclude: vec![101] }).unwrap(), [100, 102]);
    // 999 is on another host.
    assert_eq!(ids(pool(vec![])).unwrap(), [102, 101]);
    assert_eq!(ids(pool(vec![102])).unwrap(), [101]);
    let error = ids(Selection::Pool { pool: "none".into(), exclude: vec![] }).unwrap_err();
    assert!(error.to_string().contains("no pool 'none' in user.cfg; pools: web"), "{error}");
}

#[test]
fn the_command_line_goes_before_the_job_and_the_job_before_vzdump_conf() {
    let (_dir, host) = host_with_guests();
    let mut plan = host.plan_backup(request(guests(&[100]))).unwrap();
    assert_eq!((plan.options.storage.as_str(), plan.options.jobs), ("backups", 1));
    assert_eq!(plan.options.lock_wait.as_secs(), 180);
    assert_eq!(plan.options.fleecing_storage.as_deref(), Some("fast"));
    assert_eq!(plan.ionice, 7);
    assert_eq!(
        plan.notices,
        [
            "vzdump.conf: the key 'other' is unknown and has no effect",
            "vzdump.conf: which guests are backed up is not chosen there",
        ]
    );
    let settings = BackupSettings { lockwait_minutes: Some(1), ..BackupSettings::default() };
    let job = BackupRequest { job: Some("nightly".into()), ..request(settings) };
    plan = host.plan_backup(job).unwrap();
    assert_eq!(
        (plan.options.storage.as_str(), plan.ids.as_slice()),
        ("more", [102, 101].as_slice())
    );
    assert_eq!((plan.options.lock_wait.as_secs(), plan.options.jobs), (60, 2));
    assert_eq!(plan.options.bandwidth.unwrap().rate_bytes_per_s(), 2 << 20);
    assert!(
        plan.notices[0].starts_with("job 'nightly': 'zstd' has no effect:"),
        "{:?}",
        plan.notices
    );
    let job = BackupRequest { job: Some("x".into()), ..request(BackupSettings::default()) };
    let error = host.plan_backup(job).unwrap_err().to_string();
    assert_eq!(error, "There is no job 'x' in jobs.cfg; jobs: nightly.");
}

#[test]
fn options_that_make_no_sense_are_refused_before_anything_is_begun() {
    let (_dir, host) = host_with_guests();
    let none = host.plan_backup(request(BackupSettings::default())).unwrap_err().to_string();
    assert!(none.contains("No guest is chosen"), "{none}");
    for (settings, fault) in [
        (
            BackupSettings { bwlimit_kib_per_s: Some(1023), ..guests(&[100, 101]) },
            "at least 1024 KiB/s",
        ),
        (BackupSettings { bwlimit_kib_per_s: Some(u64::MAX), ..guests(&[100]) }, "is too much"),
        (BackupSettings { protected: Some(true), ..guests(&[100]) }, "'protected' is not"),
        (
            BackupSettings { node: Some("elsewhere".into()), ..guests(&[100]) },
            "for the host 'elsewhere'",
        ),
    ] {
        let error = host.plan_backup(request(settings)).unwrap_err().to_string();
        assert!(error.contains(fault), "{error}");
    }
    // Guests that are worked on one after the other share nothing.
    let enough =
        BackupSettings { bwlimit_kib_per_s: Some(512), jobs: Some(1), ..guests(&[100, 101]) };
    host.plan_backup(request(enough)).unwrap();
}
