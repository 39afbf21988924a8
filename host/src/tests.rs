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

#[tokio::test]
async fn what_is_kept_is_said_by_the_task_then_the_storage_then_the_program() {
    let storages = "directory: backups\n\tpath ROOT/backups\n\tprune-backups keep-last=3\n\t\
                    max-protected-backups 5\n\ndirectory: plain\n\tpath ROOT/plain\n\n\
                    directory: wrong\n\tpath ROOT/wrong\n\tprune-backups keep-lost=3\n\t\
                    max-protected-backups -2\n";
    let (dir, host) = host(storages);
    let kept = |storage: &str, asked: Option<&str>| {
        let asked = asked.map(|text| text.parse().unwrap());
        host.retention(storage, asked).map(|kept| kept.map(|kept| kept.to_string()))
    };
    assert_eq!(kept("backups", Some("keep-daily=1")).unwrap().as_deref(), Some("keep-daily=1"));
    assert_eq!(kept("backups", None).unwrap().as_deref(), Some("keep-last=3"));
    assert_eq!(kept("plain", None).unwrap(), None);
    let error = kept("wrong", None).unwrap_err().to_string();
    assert!(error.contains("storage.cfg, storage 'wrong', prune-backups: 'keep-lost'"), "{error}");
    assert_eq!(host.max_protected("backups").unwrap(), Some(5));
    assert_eq!(host.max_protected("plain").unwrap(), None);
    assert!(host.max_protected("wrong").is_err());

    // Nobody says anything: nothing is removed, and that is said.
    let (sink, cancel) = (vzdump_core::task_log::NoLog, CancellationToken::new());
    let request = PruneRequest { storage: Some("plain".into()), ..PruneRequest::default() };
    let error = host.prune(request.clone(), &sink, &cancel).await.unwrap_err().to_string();
    assert!(error.contains("Nothing says what to keep in the storage 'plain'"), "{error}");
    fs::write(dir.path().join("etc/vzdump.conf"), "prune-backups: keep-weekly=2\n").unwrap();
    assert_eq!(kept("plain", None).unwrap().as_deref(), Some("keep-weekly=2"));
    let report = host.prune(request, &sink, &cancel).await.unwrap();
    assert_eq!((report.retention.as_str(), report.archives.len()), ("keep-weekly=2", 0));
    assert!(report.is_success());
}

#[tokio::test]
async fn archives_that_are_not_there_are_not_changed() {
    let (_dir, host) = host(STORAGES);
    let cancel = CancellationToken::new();
    let name = "backups:backup/vzdump-qemu-100-2026_01_02-03_04_05";
    assert!(host.remove_archive(name, &cancel).await.unwrap_err().to_string().contains(name));
    assert!(host.notes(name).await.is_err());
    assert!(host.set_notes(name, "x").await.is_err());
    assert!(host.set_protected(name, true).await.is_err());
}

/// Stores archives without disks, a day apart.
async fn store(host: &Host, id: u32, days: &[i64]) -> Vec<String> {
    use provider_api::{Call, GuestInfo, JobInfo, Uuid, VmBackup};
    struct Quiet;
    impl provider_api::Progress for Quiet {
        fn report(&self, _device: &str, _done: u64, _total: u64, _zero: u64) {}
        fn log(&self, _line: &str) {}
    }
    let (provider, call) = (host.providers.get("backups").unwrap(), Call::default());
    provider.activate(&call).await.unwrap();
    let mut volids = Vec::new();
    for day in days {
        let start_time_s = 1_767_322_984 + day * 86_400;
        let mut job = provider.start_job(JobInfo { start_time_s }, &call).await.unwrap();
        let info = GuestInfo { kind: GuestKind::Qemu, id, name: None, start_time_s };
        let mut backup = job.start_guest(info, &call).await.unwrap();
        let vm = VmBackup { config: b"name: a\n".to_vec(), firewall: None, volumes: Vec::new() };
        backup.backup_vm(vm, &Quiet, &call).await.unwrap();
        let committed = backup.commit(Uuid::new_v4(), &call).await.unwrap();
        volids.push(format!("backups:backup/{}", committed.archive));
        job.finish(&call).await.unwrap();
    }
    volids
}

fn fates(report: &PruneReport) -> Vec<(u32, Fate)> {
    report.archives.iter().map(|archive| (archive.vmid, archive.fate.clone())).collect()
}

#[tokio::test]
async fn a_prune_leaves_alone_what_is_busy_protected_or_not_meant() {
    use vzdump_core::lock::FileLock;
    use vzdump_core::retention::Rule;
    let (_dir, host) = host(STORAGES);
    let (sink, cancel) = (vzdump_core::task_log::NoLog, CancellationToken::new());
    let web = store(&host, 100, &[0, 1, 2]).await;
    store(&host, 101, &[0, 1]).await;
    let keep = Fate::Keep { rule: Rule::Last };
    let mut request = PruneRequest {
        retention: Some("keep-last=1".parse().unwrap()),
        dry_run: true,
        ..PruneRequest::default()
    };
    let report = host.prune(request.clone(), &sink, &cancel).await.unwrap();
    let planned = fates(&report);
    assert_eq!(planned.iter().filter(|(_, fate)| *fate == Fate::Remove).count(), 3);
    assert_eq!(host.list(None).await.unwrap().archives.len(), 5, "a dry run removes nothing");

    // The guest is being backed up.
    request.dry_run = false;
    request.ids = vec![100];
    let path = vzdump_core::job::target_lock_path(&host.layout, GuestKind::Qemu, 100, "backups");
    let held = FileLock::try_acquire(&path, "it").unwrap();
    let report = host.prune(request.clone(), &sink, &cancel).await.unwrap();
    assert!(!report.is_success() && report.problems[0].contains("in use"), "{report:?}");
    let error = host.remove_archive(&web[0], &cancel).await.unwrap_err();
    assert!(matches!(error, HostError::Lock(_)), "{error}");
    drop(held);

    host.set_protected(&web[0], true).await.unwrap();
    let error = host.remove_archive(&web[0], &cancel).await.unwrap_err().to_string();
    assert!(error.contains("is protected; `vzdump unprotect"), "{error}");
    let report = host.prune(request.clone(), &sink, &cancel).await.unwrap();
    assert!(report.is_success());
    assert_eq!(fates(&report), [(100, Fate::Protected), (100, Fate::Removed), (100, keep.clone())]);
    let left = host.list(None).await.unwrap().archives;
    let left: Vec<_> = left.iter().map(|archive| (archive.vmid, archive.protected)).collect();
    assert_eq!(left, [(100, true), (100, false), (101, false), (101, false)]);

    // Containers only: there are none.
    request.kind = Some(GuestKind::Lxc);
    request.ids = Vec::new();
    let report = host.prune(request, &sink, &cancel).await.unwrap();
    assert!(report.archives.is_empty() && report.is_success());
    host.set_protected(&web[0], false).await.unwrap();
    host.remove_archive(&web[0], &cancel).await.unwrap();
}
