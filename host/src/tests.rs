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
    // Whatever the environment names: no test here is to start a QEMU.
    let overrides = Overrides { qemu_bin: Some("/nonexistent".into()) };
    let host = Host::open(Some(dir.path().into()), &overrides).unwrap();
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
        ("tank", "has the type 'zfspool', which is neither built in nor the name of a program in"),
        ("none", "is not in storage.cfg"),
        ("off", "is disabled"),
    ] {
        let error = host.list(Some(storage)).await.unwrap_err().to_string();
        assert!(error.contains(fault), "{error}");
    }
}

#[tokio::test]
async fn a_directory_is_used_only_where_it_is_said_to_be() {
    let section = |id: &str, line: &str| {
        format!("directory: {id}\n\tpath ROOT/{id}\n\tcontent backup\n\tshared 1\n\t{line}\n\n")
    };
    let cases = [
        (
            "typo",
            "is_mountpont yes",
            "has 'is_mountpont', which its type 'directory' does not know",
        ),
        ("limit", "bwlimit 5", "has 'bwlimit'"),
        ("odd", "mkdir perhaps", "The storage 'odd' has 'mkdir perhaps', which is neither 0 nor 1"),
        ("absent", "is_mountpoint yes", "Nothing is mounted at "),
        ("other", "is_mountpoint ROOT/etc", "/etc, where storage.cfg says"),
        ("unmade", "mkdir 0", "does not exist, and storage.cfg says that it is not made"),
        ("unmade2", "create-base-path no", "does not exist, and storage.cfg"),
        ("made", "is_mountpoint no", ""),
        ("mounted", "is_mountpoint /proc", ""),
    ];
    let (dir, host) = host(&cases.map(|(id, line, _)| section(id, line)).concat());
    for (id, line, fault) in cases {
        let call = provider_api::Call::default();
        let done = match host.providers.get(id).await {
            Ok(provider) => provider.activate(&call).await.map_err(|error| chain(&error)),
            Err(error) => Err(error),
        };
        if fault.is_empty() {
            done.unwrap();
            assert!(dir.path().join(id).join(".vzdump").is_dir(), "{line}");
        } else {
            let error = done.unwrap_err();
            assert!(error.contains(fault), "{line}: {error}");
            let provider = host.providers.get(id).await;
            if let Ok(provider) = provider {
                // What is below an empty mount point has space, too.
                let error =
                    provider.status(&call).await.map_err(|error| chain(&error)).unwrap_err();
                assert!(error.contains(fault), "{line}: {error}");
            }
            assert!(!dir.path().join(id).exists(), "{line}");
        }
    }
}

#[tokio::test]
async fn a_task_is_cancelled_also_while_a_plugin_hangs_in_its_start() {
    use std::os::unix::fs::PermissionsExt;
    let (dir, _) = host("");
    let program = dir.path().join("lib/providers/hangs");
    fs::create_dir_all(program.parent().unwrap()).unwrap();
    fs::write(&program, "#!/bin/sh\ntouch \"$0.begun\"\nexec sleep 60\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(dir.path().join("etc/storage.cfg"), "hangs: store\n").unwrap();
    let host = Host::open(Some(dir.path().into()), &Overrides::default()).unwrap();
    let cancel = CancellationToken::new();
    let stop = async {
        while !program.with_extension("begun").exists() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        cancel.cancel();
    };
    let both = async { tokio::join!(host.providers.get_for_task("store", &cancel), stop) };
    let (got, ()) = tokio::time::timeout(std::time::Duration::from_secs(60), both).await.unwrap();
    let error = got.err().unwrap().to_string();
    assert!(error.contains("Interrupted while the provider of the storage 'store'"), "{error}");
}

/// The example in Python, as an administrator would install it.
const PLUGIN: &[u8] = include_bytes!("../../providers/examples/python/file-store.py");

#[tokio::test]
async fn a_type_is_the_name_of_a_program_in_the_plugin_directory() {
    use std::os::unix::fs::PermissionsExt;
    let storages = "file-store: vault\n\tpath ROOT/vault\n\tprune-backups keep-last=1\n\n\
                    file-store: wrong\n\tcolour red\n\nother-store: other\n\nfile-store: off\n\tdisable\n";
    let (dir, _) = host(storages);
    let program = dir.path().join("lib/providers/file-store");
    fs::create_dir_all(program.parent().unwrap()).unwrap();
    fs::write(dir.path().join("new"), PLUGIN).unwrap();
    fs::set_permissions(dir.path().join("new"), PermissionsExt::from_mode(0o755)).unwrap();
    fs::rename(dir.path().join("new"), &program).unwrap();
    let host = Host::open(Some(dir.path().into()), &Overrides::default()).unwrap();
    let uses: Vec<_> = host.storages().into_iter().map(|s| s.used_for).collect();
    let (backups, other) = (StorageUse::Backups, StorageUse::Unsupported);
    assert_eq!(uses[..4], [backups, backups, other, backups]);
    assert!(host.list(Some("vault")).await.unwrap().archives.is_empty());
    let error = host.list(Some("wrong")).await.unwrap_err().to_string();
    assert!(
        error.contains("'colour', which its provider does not know; it knows: path, max-chain")
    );
    let error = host.list(Some("off")).await.unwrap_err().to_string();
    assert!(error.contains("is disabled"), "{error}");

    // Nothing is started before it is used: a program that cannot be started disturbs nobody.
    fs::set_permissions(&program, PermissionsExt::from_mode(0o644)).unwrap();
    let host = Host::open(Some(dir.path().into()), &Overrides::default()).unwrap();
    assert_eq!(host.storages().len(), 5);
    let error = host.list(Some("vault")).await.unwrap_err().to_string();
    assert!(error.contains("is not executable (chmod +x)"), "{error}");

    // Another directory may be named.
    let settings = format!("provider-dir: {}\n", dir.path().join("elsewhere").display());
    fs::write(dir.path().join("etc/vzdump.conf"), settings).unwrap();
    let host = Host::open(Some(dir.path().into()), &Overrides::default()).unwrap();
    assert_eq!(host.storages()[0].used_for, StorageUse::Unsupported);
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
async fn an_archive_that_is_not_found_may_be_where_could_not_be_looked() {
    let (_dir, host) =
        host("directory: backups\n\tpath ROOT/backups\n\ndirectory: odd\n\tpath odd\n");
    let archives = store(&host, 100, &[0]).await;
    let error = host.show_config("nothing").await.unwrap_err().to_string();
    assert!(error.contains("no archive 'nothing' among those that could be listed"), "{error}");
    assert!(error.contains("odd: The storage 'odd' needs a 'path' that is absolute"), "{error}");
    // One that is found needs no other storage.
    host.show_config(archives[0].split_once(":backup/").unwrap().1).await.unwrap();
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
    let status = &all[0].status;
    assert_eq!((all.len(), status.id, status.running, &all[0].problem), (1, 100, false, &None));
    let error = host.vm_start(100, StartOptions::default()).await.unwrap_err();
    assert!(error.to_string().contains("cargo xtask qemu"), "{error}");
}

#[tokio::test]
async fn a_vm_that_cannot_be_read_does_not_hide_the_others() {
    let (dir, host) = host_with_guests();
    let vms = dir.path().join("etc/qemu-server");
    fs::write(vms.join("101.conf"), b"name: caf\xe9\n").unwrap();
    // It is listed, and not there when it is looked at, as a VM that is removed meanwhile.
    fs::remove_file(vms.join("102.conf")).unwrap();
    std::os::unix::fs::symlink("nothing", vms.join("102.conf")).unwrap();
    let all = host.vm_list().await.unwrap();
    let states: Vec<_> = all.iter().map(|vm| (vm.status.id, vm.problem.is_some())).collect();
    assert_eq!(states, [(100, false), (101, true)]);
    let problem = all[1].problem.as_deref().unwrap();
    assert!(problem.contains("qemu-server/101.conf' is not text"), "{problem}");
    assert!(matches!(host.vm_status(102).await, Err(HostError::Runner(_))));
}

#[tokio::test]
async fn a_storage_of_other_hosts_counts_as_switched_off() {
    let own = own_name();
    let storages = format!(
        "directory: mine\n\tpath ROOT/mine\n\tnodes other,{own}\n\n\
         directory: theirs\n\tpath ROOT/theirs\n\tnodes {own}2,other\n\n\
         dir: disks\n\tpath ROOT/disks\n\tnodes other\n"
    );
    let (_dir, host) = host(&storages);
    let off: Vec<_> = host.storages().into_iter().map(|s| (s.id, s.disabled)).collect();
    let expected = [("mine", false), ("theirs", true), ("disks", true), ("local", false)];
    assert_eq!(off, expected.map(|(id, is_off)| (id.to_owned(), is_off)));
    // Not asked, in contrast to the other one, whose directory is not there.
    let asked: Vec<_> =
        host.list(None).await.unwrap().problems.into_iter().map(|p| p.storage).collect();
    assert_eq!(asked, ["mine"]);
    let error = host.list(Some("theirs")).await.unwrap_err().to_string();
    let why = format!("'theirs' is for other hosts: storage.cfg has 'nodes {own}2,other'");
    assert!(error.contains(&why), "{error}");
    assert!(host.images("disks").await.unwrap_err().to_string().contains("is disabled"));
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
    let (provider, call) = (host.providers.get("backups").await.unwrap(), Call::default());
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

#[tokio::test]
async fn what_a_verification_found_is_kept_by_the_host_only_if_the_provider_forgets_it() {
    use provider_api::{Verified, VerifyExtent};
    let (_dir, host) = host(STORAGES);
    let (sink, cancel) = (vzdump_core::task_log::NoLog, CancellationToken::new());
    let archives = store(&host, 100, &[0, 1]).await;
    let now = jiff::Timestamp::now().as_second();
    let found = |time_s, damage_count| Verified { time_s, extent: VerifyExtent::All, damage_count };
    let all = async || host.list(None).await.unwrap().archives;
    // As by a provider that remembers nothing; the second is about an older archive of this name.
    let kept = [(archives[0].clone(), found(now, 0)), (archives[1].clone(), found(1, 0))];
    host.keep(kept).await.unwrap();
    let listed: Vec<_> = all().await.iter().map(|archive| archive.verified).collect();
    assert_eq!(listed, [Some(found(now, 0)), None]);
    let request = |not_since_days| VerifyRequest {
        archives: Vec::new(),
        storage: Some("backups".to_owned()),
        guests: Vec::new(),
        extent: VerifyExtent::All,
        not_since_days,
    };
    let verify = async |days| {
        let summary = host.verify(request(days), &sink, &cancel).await.unwrap();
        summary.archives.into_iter().map(|archive| archive.result).collect::<Vec<_>>()
    };
    assert_eq!(verify(Some(1)).await, [VerifyResult::Skipped, VerifyResult::Sound]);
    host.keep([(archives[0].clone(), found(now, 3))]).await.unwrap();
    assert_eq!(all().await[0].verified, Some(found(now, 3)));
    assert_eq!(verify(Some(1)).await, [VerifyResult::Sound, VerifyResult::Skipped]);
    // This provider remembers: what it says goes before what the host has kept.
    assert_eq!(all().await[0].verified.unwrap().damage_count, 0);
    assert_eq!(host.results::<Verified>()[&archives[0]], found(now, 3));
}

#[tokio::test]
async fn an_archive_that_cannot_be_read_is_listed_verified_and_removed() {
    let (dir, host) = host(STORAGES);
    let (sink, cancel) = (vzdump_core::task_log::NoLog, CancellationToken::new());
    let lost = store(&host, 100, &[0]).await.remove(0);
    let other = store(&host, 101, &[0]).await.remove(0);
    let (_, name) = lost.split_once(":backup/").unwrap();
    fs::remove_file(dir.path().join("backups").join(name).join("manifest.json")).unwrap();
    let list = host.list(None).await.unwrap();
    assert_eq!(list.archives.len(), 1);
    assert_eq!(list.problems[0].volid.as_ref(), Some(&lost));
    let verify = async |guest| {
        let request = VerifyRequest {
            archives: Vec::new(),
            storage: Some("backups".to_owned()),
            guests: vec![guest],
            extent: VerifyExtent::All,
            not_since_days: None,
        };
        host.verify(request, &sink, &cancel).await.unwrap()
    };
    let found = verify(100).await;
    assert!(!found.is_success());
    assert_eq!((&found.archives[0].volid, found.archives[0].vmid), (&lost, Some(100)));
    let found = verify(101).await;
    assert!(found.is_success() && found.archives.len() == 1, "{found:?}");
    // Of this one not even the name says whose it is.
    let nameless = dir.path().join("backups/copy");
    fs::create_dir(&nameless).unwrap();
    fs::write(nameless.join("qemu-server.conf"), "name: a\n").unwrap();
    assert!(!verify(101).await.is_success());
    let error = host.remove_archive("copy", &cancel).await.unwrap_err();
    assert!(error.to_string().contains("does not say whose it is"), "{error}");
    host.remove_archive(name, &cancel).await.unwrap();
    let list = host.list(None).await.unwrap();
    assert_eq!((&list.archives[0].volid, list.problems.len()), (&other, 1));
}

#[tokio::test]
async fn the_archive_of_an_interrupted_live_restore_is_not_removed() {
    use vzdump_core::journal::{Begin, Entry, Journal, Live, TaskKind};
    let (dir, host) = host(STORAGES);
    let cancel = CancellationToken::new();
    let archives = store(&host, 100, &[0, 1]).await;
    let begin = Begin::new(TaskKind::Restore, GuestKind::Qemu, 200, "backups").unwrap();
    let journal = Journal::create(&host.layout, begin).await.unwrap();
    let name = archives[0].split_once(":backup/").unwrap().1.to_owned();
    let dir = dir.path().join("run/l");
    let live = Live { dir, limit_bytes_per_s: None, disks: Vec::new() };
    for entry in [Entry::Archive { name }, Entry::Live(live), Entry::Runs] {
        journal.append(entry).await.unwrap();
    }
    let error = host.remove_archive(&archives[0], &cancel).await.unwrap_err().to_string();
    assert!(error.contains("`vzdump restore --resume 200`"), "{error}");
    host.remove_archive(&archives[1], &cancel).await.unwrap();
    journal.append(Entry::Complete).await.unwrap();
    host.remove_archive(&archives[0], &cancel).await.unwrap();
}

/// As when the storage has become full.
#[tokio::test]
async fn damage_counts_that_the_provider_cannot_remember() {
    let (dir, host) = host(STORAGES);
    let (sink, cancel) = (vzdump_core::task_log::NoLog, CancellationToken::new());
    let archives = store(&host, 100, &[0]).await;
    let archive = dir.path().join("backups").join(archives[0].split_once(":backup/").unwrap().1);
    let verify = async || {
        let request = VerifyRequest {
            archives: archives.clone(),
            storage: None,
            guests: Vec::new(),
            extent: VerifyExtent::All,
            not_since_days: Some(30),
        };
        host.verify(request, &sink, &cancel).await.unwrap().archives.remove(0).result
    };
    let listed = async || host.list(None).await.unwrap().archives.remove(0);
    assert_eq!(verify().await, VerifyResult::Sound);
    // That was days ago.
    let mut sound = listed().await.verified.unwrap();
    sound.time_s -= 40 * 86_400;
    fs::write(archive.join("verified"), serde_json::to_vec(&sound).unwrap()).unwrap();
    assert_eq!(listed().await.verified, Some(sound));

    fs::create_dir(archive.join("verified.next")).unwrap();
    let config = archive.join("qemu-server.conf");
    let whole = fs::read(&config).unwrap();
    fs::write(&config, "name: b\n").unwrap();
    assert!(matches!(verify().await, VerifyResult::Damaged { damage_count: 1, .. }));
    let damaged = listed().await.verified.unwrap();
    assert_eq!(damaged.damage_count, 1);

    // What was found sound lately would be skipped, and this was not.
    sound.time_s = damaged.time_s - 86_400;
    fs::write(archive.join("verified"), serde_json::to_vec(&sound).unwrap()).unwrap();
    assert!(matches!(verify().await, VerifyResult::Damaged { .. }));

    // The provider can again.
    fs::remove_dir(archive.join("verified.next")).unwrap();
    fs::write(&config, whole).unwrap();
    assert_eq!(verify().await, VerifyResult::Sound);
    sound.time_s = damaged.time_s + 60;
    fs::write(archive.join("verified"), serde_json::to_vec(&sound).unwrap()).unwrap();
    assert_eq!(listed().await.verified, Some(sound));
}

#[tokio::test]
async fn what_was_found_of_an_older_archive_of_this_name_does_not_count() {
    let (_dir, host) = host(STORAGES);
    let archives = store(&host, 100, &[0, 1]).await;
    let times: Vec<_> = host.list(None).await.unwrap().archives.iter().map(|a| a.time_s).collect();
    let booted = |time_s| Booted { time_s, ready_ms: Some(1), screenshot: None };
    let kept =
        [(archives[0].clone(), booted(times[0])), (archives[1].clone(), booted(times[1] - 1))];
    host.keep(kept).await.unwrap();
    let listed = host.list(None).await.unwrap().archives;
    let listed: Vec<_> = listed.into_iter().map(|archive| archive.booted).collect();
    assert_eq!(listed, [Some(booted(times[0])), None]);
}

#[tokio::test]
async fn a_picture_goes_with_the_result_it_belongs_to() {
    let (dir, host) = host(STORAGES);
    let picture = |name: &str| {
        let path = dir.path().join(name);
        fs::write(&path, "").unwrap();
        path
    };
    let (first, second) = (picture("a.png"), picture("b.png"));
    let booted = |screenshot: Option<&PathBuf>| Booted {
        time_s: 1,
        ready_ms: None,
        screenshot: screenshot.cloned(),
    };
    let volid = || "backups:backup/a".to_owned();
    host.keep([(volid(), booted(Some(&first)))]).await.unwrap();
    host.keep([(volid(), booted(Some(&first)))]).await.unwrap();
    assert!(first.exists(), "it is that of the new result, too");
    host.keep([(volid(), booted(Some(&second)))]).await.unwrap();
    assert!(!first.exists() && second.exists());
    assert_eq!(host.results::<Booted>()[&volid()].screenshot, Some(second));
}

fn request(settings: BackupSettings) -> BackupRequest {
    BackupRequest {
        settings,
        job: None,
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
    let (dir, host) = host(
        "directory: backups\n\tpath ROOT/backups\n\ndirectory: more\n\tpath /x\n\ndir: fast\n\tpath /f\n",
    );
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
fn guests_are_excluded_from_what_a_job_chooses() {
    let (dir, host) = host_with_guests();
    let conf = dir.path().join("etc/vzdump.conf");
    // Without effect there, and so upon what others exclude.
    fs::write(conf, "exclude: 100\n").unwrap();
    let ids = |exclude: &[u32]| {
        let mut settings = BackupSettings { storage: Some("more".into()), ..Default::default() };
        settings.choose(vec![], false, exclude.to_vec(), None).unwrap();
        let job = BackupRequest { job: Some("nightly".into()), ..request(settings.clone()) };
        let all = host.plan_backup(request(settings)).map(|plan| plan.ids);
        (host.plan_backup(job).map(|plan| plan.ids), all)
    };
    let (of_job, all) = ids(&[102]);
    assert_eq!((of_job.unwrap(), all.unwrap()), (vec![101], vec![100, 101]));
    let jobs = "vzdump: nightly\n\tvmid 101,102\n";
    fs::write(dir.path().join("etc/jobs.cfg"), jobs).unwrap();
    assert_eq!(ids(&[102]).0.unwrap(), [101]);
    let error = ids(&[101, 102]).0.unwrap_err().to_string();
    assert!(error.starts_with("All guests that the job 'nightly' names are excluded"), "{error}");
}

#[test]
fn the_command_line_goes_before_the_job_and_the_job_before_vzdump_conf() {
    let (_dir, host) = host_with_guests();
    let mut plan = host.plan_backup(request(guests(&[100]))).unwrap();
    assert_eq!((plan.options.storage.as_str(), plan.options.jobs), ("backups", 1));
    assert_eq!(plan.options.lock_wait.as_secs(), 180);
    assert_eq!(plan.options.fleecing.storage.as_deref(), Some("fast"));
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
fn the_limits_of_the_host_go_with_those_of_the_job() {
    let (dir, host) = host_with_guests();
    let conf = |text: &str| fs::write(dir.path().join("etc/vzdump.conf"), text).unwrap();
    let plan = |limit| {
        let settings = BackupSettings {
            bwlimit_kib_per_s: limit,
            storage: Some("backups".into()),
            ..guests(&[100])
        };
        host.plan_backup(request(settings))
    };
    conf("host-bwlimit: 4096\nhost-buffer-total: 1G\n");
    for (own, rate) in
        [(None, 4 << 20), (Some(0), 4 << 20), (Some(1024), 1 << 20), (Some(9000), 4 << 20)]
    {
        let plan = plan(own).unwrap();
        assert_eq!(plan.options.bandwidth.unwrap().rate_bytes_per_s(), rate, "{own:?}");
        assert_eq!(plan.options.host_ram.unwrap().total_bytes(), 1 << 30);
        assert!(plan.notices.is_empty(), "{:?}", plan.notices);
    }
    conf("host-bwlimit: 0\nhost-buffer-total: 0\n");
    let unlimited = plan(None).unwrap();
    assert!(unlimited.options.bandwidth.is_none() && unlimited.options.host_ram.is_none());
    for (text, fault) in [
        ("host-bwlimit: fast\n", "vzdump.conf: 'host-bwlimit': 'fast' is no number"),
        ("host-bwlimit: 100\n", "'host-bwlimit': 100 KiB/s is too little"),
        ("host-buffer-total: lots\n", "vzdump.conf: 'host-buffer-total'"),
        // Not passed over: it might have been what keeps archives.
        ("# ours\n  remove: 0\n", "vzdump.conf: the line '  remove: 0' is not understood"),
        ("remove=0\n", "vzdump.conf: the line 'remove=0' is not understood"),
        ("bwlimit: 0\n[night]\nremove: 0\n", "vzdump.conf: the section '[night]' is not"),
    ] {
        conf(text);
        let error = plan(None).unwrap_err().to_string();
        assert!(error.contains(fault), "{error}");
    }
}

#[test]
fn nothing_is_pruned_where_remove_is_0() {
    let (_dir, host) = host_with_guests();
    let rules: Retention = "keep-last=1".parse().unwrap();
    for (remove, prune) in [(None, Some(rules)), (Some(true), Some(rules)), (Some(false), None)] {
        let settings = BackupSettings { prune_backups: Some(rules), remove, ..guests(&[100]) };
        assert_eq!(host.plan_backup(request(settings)).unwrap().options.prune, prune);
    }
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

#[test]
fn what_qemu_would_refuse_is_refused_before_a_guest_is_shut_down() {
    let (_dir, host) = host_with_guests();
    let plan = |granularity_bytes, buffer_size_bytes, buffer_total_bytes| {
        let request = request(guests(&[100]));
        let sizes =
            BackupRequest { granularity_bytes, buffer_size_bytes, buffer_total_bytes, ..request };
        host.plan_backup(sizes)
    };
    plan(Some(4 << 10), Some(0), Some(0)).unwrap();
    plan(Some(4 << 20), Some(64 << 30), Some(1 << 40)).unwrap();
    let granularity = "is not a power of two from 4K to 4M.";
    for (sizes, fault) in [
        ((Some(0), None, None), format!("'granularity': 0 {granularity}")),
        ((Some(2 << 10), None, None), format!("'granularity': 2K {granularity}")),
        ((Some(12 << 10), None, None), format!("'granularity': 12K {granularity}")),
        ((Some(8 << 20), None, None), format!("'granularity': 8M {granularity}")),
        ((None, Some(65 << 30), None), "'buffer-size': 65G is not from 0 to 64G.".to_owned()),
        ((None, None, Some(2 << 40)), "'buffer-total': 2T is not from 0 to 1T.".to_owned()),
    ] {
        assert_eq!(plan(sizes.0, sizes.1, sizes.2).unwrap_err().to_string(), fault);
    }
}

#[test]
fn storages_for_old_data_are_looked_up_before_anything_is_begun() {
    let (dir, host) = host_with_guests();
    let plan = |id, text: &str| {
        let fleecing = Some(text.parse().unwrap());
        host.plan_backup(request(BackupSettings { fleecing, ..guests(&[id]) }))
    };
    for good in ["limit=1G", "storage=fast,scsi0=local", "enabled=0,storage=nowhere"] {
        plan(100, good).unwrap();
    }
    for (text, fault) in [
        ("storage=nowhere", "'storage=nowhere' is no place for old data: The storage 'nowhere'"),
        ("storage=fast,scsi9=nowhere", "'fleecing': 'scsi9=nowhere'"),
        ("storage=backups", "has the type 'directory', which holds no images. Storages for images"),
        ("scsi1=more", "Storages for images: fast, local."),
    ] {
        let error = plan(100, text).unwrap_err().to_string();
        assert!(error.contains(fault), "{error}");
    }
    // Containers have no old data.
    fs::create_dir_all(dir.path().join("etc/lxc")).unwrap();
    fs::write(dir.path().join("etc/lxc/200.conf"), "hostname: ct\n").unwrap();
    plan(200, "storage=nowhere").unwrap();
}
