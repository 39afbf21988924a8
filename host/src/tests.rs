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
