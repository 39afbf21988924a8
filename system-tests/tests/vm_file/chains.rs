// SPDX-License-Identifier: MIT OR Apache-2.0
//! Full backups, increments and restores through files.

use std::sync::Arc;

use provider_api::{Kind, Readable};
use rustix::process::{Pid, Signal, kill_process};
use vzdump_core::bandwidth::Budget;
use vzdump_core::guest::AccessStats;
use vzdump_core::restore::{RestoreOptions, restore_vm};

use crate::provider::{Behaviour, Pause, open_direct, read_direct, release};
use crate::scene::{DISK_BYTES, KIB, STORE, Scene, VM};

/// What a backup is for which the provider waits before it copies.
pub fn paused() -> (Behaviour, Arc<Pause>) {
    let pause = Arc::new(Pause::default());
    (Behaviour { before_copy: Some(Arc::clone(&pause)), ..Behaviour::default() }, pause)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_backup_and_increments_are_byte_exact_while_the_guest_writes() {
    let (behaviour, pause) = paused();
    let mut scene = Scene::new(behaviour);
    for (turn, write) in [(0, 256 * KIB), (1, 64 * KIB), (2, 64 * KIB)] {
        let before = scene.bytes.clone();
        let offset = 512 * KIB * (turn + 1);
        let monitor = scene.place.monitor().await;
        let disturb = async {
            pause.reached.notified().await;
            crate::place::writes(&monitor, 0xa0 + turn as u8, offset, write).await;
            // The last bytes of the disk, too.
            crate::place::writes(&monitor, 0xb0 + turn as u8, DISK_BYTES - 512, 512).await;
            pause.go_on.notify_one();
        };
        let (report, ()) = tokio::join!(scene.good_backup(), disturb);
        drop(monitor);
        scene.assert_holds(&report, &before, &format!("turn {turn}"));
        scene.assert_tidy(&format!("turn {turn}"));
        let action = &report.volumes[0].bitmap_action;
        let expected = [DISK_BYTES, 256 * KIB + 512, 64 * KIB + 512][turn as usize];
        assert_eq!(action, if turn == 0 { "new" } else { "used" });
        assert_eq!(report.transferred.total_bytes, expected, "turn {turn}");
        if turn == 0 {
            assert_eq!(report.transferred.zero_bytes, 1 << 20, "zeroes were read");
        }
        let at = usize::try_from(offset).unwrap();
        scene.bytes[at..at + usize::try_from(write).unwrap()].fill(0xa0 + turn as u8);
        let end = scene.bytes.len();
        scene.bytes[end - 512..].fill(0xb0 + turn as u8);
    }
    scene.provider.behave(Behaviour::default());
    let last = scene.good_backup().await;
    let archive = last.archive.clone().unwrap();
    let options = RestoreOptions {
        source_storage: STORE.into(),
        storage: Some("local".into()),
        ..RestoreOptions::default()
    };
    let Scene { ctx, provider, sink, cancel, .. } = &scene;
    let restored = restore_vm(ctx, provider, &archive, 200, &options, sink, cancel).await;
    assert!(restored.is_success(), "{restored:?}");
    assert!(scene.place.bytes(&restored.volumes[0].volume) == scene.bytes, "another disk");
    assert_ne!(VM, restored.id);
}

/// What a provider may do with its file, and what it may not.
#[tokio::test(flavor = "multi_thread")]
async fn a_hole_releases_and_what_was_released_or_is_clean_cannot_be_read() {
    let (behaviour, pause) = paused();
    let mut scene = Scene::new(Behaviour::default());
    scene.good_backup().await;
    scene.write(7, 1 << 20, 128 * KIB).await;
    scene.provider.behave(behaviour);
    let files = scene.place.path("run/vm/100");
    let try_out = async {
        pause.reached.notified().await;
        let folder = std::fs::read_dir(&files).unwrap().map(|entry| entry.unwrap().path());
        let folder = folder.filter(|path| path.is_dir()).collect::<Vec<_>>().pop().unwrap();
        let path = folder.join("file0");
        let work = move || {
            let file = open_direct(&path).unwrap();
            let dirty = read_direct(&file, 1 << 20, 64 * KIB).unwrap();
            assert!(dirty.iter().all(|byte| *byte == 7));
            // Clean, also the end of the disk.
            for (offset, length) in [(0, 4 * KIB), (DISK_BYTES - 512, 512)] {
                let error = read_direct(&file, offset, length).unwrap_err();
                assert_eq!(error.kind, Kind::Io, "{error:?}");
            }
            release(&file, 1 << 20, 64 * KIB).unwrap();
            read_direct(&file, 1 << 20, 4 * KIB).unwrap_err();
            assert!(std::os::unix::fs::FileExt::write_at(&file, &dirty[..4096], 0).is_err());
            // A read in the part that was not released works on.
            read_direct(&file, (1 << 20) + 64 * KIB, 64 * KIB).unwrap();
        };
        tokio::task::spawn_blocking(work).await.unwrap();
        pause.go_on.notify_one();
    };
    let (report, ()) = tokio::join!(scene.backup(), try_out);
    // It then reads what it has released itself.
    assert!(!report.is_success());
    let error = report.error.unwrap();
    assert!(error.contains("Operation not permitted") || error.contains("os error 1"), "{error}");
    scene.assert_tidy("after a failed read");
    scene.provider.behave(Behaviour::default());
    let next = scene.good_backup().await;
    assert_eq!(next.volumes[0].bitmap_action, "used");
    scene.assert_holds(&next, &scene.bytes, "after a failed read");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_may_read_everything_late_if_it_asked_for_that() {
    let mut scene = Scene::new(Behaviour::default());
    scene.good_backup().await;
    scene.write(9, 2 << 20, 64 * KIB).await;
    let stats = |report: &vzdump_core::job::GuestReport| -> AccessStats { report.access.unwrap() };
    for readable in [Readable::All, Readable::Dirty] {
        let (behaviour, pause) = paused();
        let reads_all = readable == Readable::All;
        scene.provider.behave(Behaviour { readable, reads_all, ..behaviour });
        let before = scene.bytes.clone();
        let monitor = scene.place.monitor().await;
        let disturb = async {
            pause.reached.notified().await;
            // Where nothing had changed.
            crate::place::writes(&monitor, 0x55, 3 << 20, 128 * KIB).await;
            pause.go_on.notify_one();
        };
        let (report, ()) = tokio::join!(scene.good_backup(), disturb);
        drop(monitor);
        scene.bytes[3 << 20..(3 << 20) + (128 << 10)].fill(0x55);
        assert_eq!(report.volumes[0].bitmap_action, "used");
        scene.assert_holds(&report, &before, &format!("{readable:?}"));
        // Old data of clean areas is kept only for a reader of everything.
        let kept = stats(&report).captured_bytes;
        match readable {
            Readable::All => {
                assert_eq!(report.transferred.read_bytes, DISK_BYTES + 64 * KIB);
                assert!(kept >= 128 * KIB, "{kept} bytes were kept");
                assert_eq!(report.reused_bytes, 0, "a late full backup reused something");
            }
            // The second time these areas are dirty: what was written during the first backup.
            Readable::Dirty => {
                assert_eq!(report.transferred.read_bytes, 128 * KIB);
                assert_eq!(report.reused_bytes, DISK_BYTES - 128 * KIB);
            }
        }
    }
    scene.assert_tidy("late full");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_read_within_the_bandwidth() {
    let mut scene = Scene::new(Behaviour::default());
    scene.options.bandwidth = Some(Budget::new(2 << 20));
    let started = std::time::Instant::now();
    let report = scene.good_backup().await;
    // 3 MiB of data at 2 MiB/s.
    assert!(started.elapsed().as_millis() > 1200, "{:?}", started.elapsed());
    scene.assert_holds(&report, &scene.bytes, "limited");
    scene.assert_tidy("limited");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_is_killed_fails_the_backup_and_leaves_nothing() {
    let (behaviour, pause) = paused();
    let scene = Scene::new(behaviour);
    let kill = async {
        pause.reached.notified().await;
        let daemons = scene.daemons();
        assert_eq!(daemons.len(), 1);
        kill_process(Pid::from_raw(daemons[0]).unwrap(), Signal::KILL).unwrap();
        pause.go_on.notify_one();
    };
    let (report, ()) = tokio::join!(scene.backup(), kill);
    assert!(!report.is_success());
    scene.assert_tidy("killed daemon");
    scene.provider.behave(Behaviour::default());
    let next = scene.good_backup().await;
    scene.assert_holds(&next, &scene.bytes, "after a killed daemon");
}

/// By the directory provider, whose archives the program shows.
#[test]
fn the_log_of_a_backup_is_kept_with_its_archive_and_shown() {
    let place = crate::place::Place::new("");
    place.create(&["--disk", "1M"]);
    place.start();
    let guest = place.good_backup(&[]);
    let archive = format!("backups:backup/{}", guest["archive"].as_str().unwrap());
    let shown = place.run(&["show-log", &archive]);
    let log = shown["log"].as_str().unwrap();
    for line in ["Starting Backup of VM 100", "creating archive", "dirty-bitmap status"] {
        assert!(log.contains(line), "{line:?} is missing in {log}");
    }
    place.run(&["remove", &archive]);
    let gone = place.vzdump.finish(&["show-log", &archive], crate::place::SOON).unwrap();
    assert!(!gone.status.success(), "the log of an archive that is gone is shown");
}

/// The state of a TPM, whose swtpm does not run, comes as a file, too.
#[tokio::test(flavor = "multi_thread")]
async fn s49_the_state_of_a_tpm_is_offered_as_a_file_like_a_disk() {
    let scene = Scene::new(Behaviour::default());
    let volume = "local:100/vm-100-disk-9.raw";
    let state: Vec<u8> = (0..9000_u32).map(|n| (n % 250) as u8 + 1).collect();
    std::fs::write(scene.ctx.storages.resolve(volume).unwrap(), &state).unwrap();
    let path = scene.ctx.layout.vm_config_path(VM);
    let config = std::fs::read_to_string(&path).unwrap();
    std::fs::write(path, format!("{config}tpmstate0: {volume},version=v2.0\n")).unwrap();
    for turn in 0..2 {
        let report = scene.good_backup().await;
        scene.assert_holds(&report, &scene.bytes, &format!("turn {turn}"));
        let stored = scene.provider.bytes(report.archive.as_deref().unwrap(), "tpmstate0");
        assert_eq!(stored.len(), 4 << 20);
        assert!(stored[..state.len()] == state && stored[state.len()..].iter().all(|b| *b == 0));
        scene.assert_tidy(&format!("turn {turn}"));
    }
}
