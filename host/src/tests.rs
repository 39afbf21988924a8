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
