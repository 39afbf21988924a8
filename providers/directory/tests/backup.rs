// SPDX-License-Identifier: MIT OR Apache-2.0
//! Backups and restores through the contract, with `qemu-nbd` as the snapshot.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use common::{Bench, GuestDisk, Random, Recorder, Snapshot, scribble, text, vm};
use provider_api::{BitmapMode, BitmapRequest, Call, Kind, Provider, Readable, Uuid, Volume};

const ODD_SIZE: u64 = (10 << 20) + 7 * 512;

#[tokio::test(flavor = "multi_thread")]
async fn a_full_backup_restores_byte_exact() {
    let bench = Bench::new().await;
    let small = GuestDisk::create(bench.path(), "scsi0", ODD_SIZE, 65536);
    let large = GuestDisk::create(bench.path(), "virtio1", 70 << 20, 65536);
    let mut random = Random::new(1);
    scribble(&small, &mut random, 60).await;
    scribble(&large, &mut random, 200).await;
    let truth = [small.reference("full"), large.reference("full")];

    let (archive, transferred) = bench.back_up(100, &[&small, &large], "g1").await.unwrap();
    assert!(archive.starts_with("vzdump-qemu-100-2026_01_02-"), "{archive}");
    assert_eq!(transferred.total_bytes, ODD_SIZE + (70 << 20));
    assert_eq!(transferred.zero_bytes + transferred.written_bytes, transferred.total_bytes);
    assert!(transferred.read_bytes >= transferred.written_bytes);
    assert!(transferred.read_bytes < transferred.total_bytes, "holes must not be read");

    for (disk, truth) in [&small, &large].into_iter().zip(&truth) {
        bench.check_image(&archive, &disk.device, truth);
        bench.check_restore(&archive, &disk.device, truth).await;
    }
    let config = bench.provider.guest_config(&archive, &bench.call).await.unwrap();
    assert_eq!(config.config, b"name: test\nmemory: 512\n");
    assert_eq!(config.firewall.unwrap(), b"[OPTIONS]\nenable: 1\n");
    let listed = bench.provider.list(&bench.call).await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].guest_id, listed[0].base.clone()), (100, None));
    assert!(listed[0].size_bytes > transferred.written_bytes);
    let status = bench.provider.status(&bench.call).await.unwrap();
    assert!(status.total_bytes > 0 && status.used_bytes <= status.total_bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn zeroes_within_a_disk_smaller_than_a_cluster_are_only_they() {
    let bench = Bench::new().await;
    let disk = GuestDisk::create(bench.path(), "scsi0", 9 * 512, 512);
    disk.edit(async |client| client.write(0, vec![7; 9 * 512].into(), false).await.unwrap()).await;
    bench.back_up(7, &[&disk], "g0").await.unwrap();
    let zeroes = provider_nbd::ZeroOptions::default();
    disk.edit(async |client| client.write_zeroes(1024, 512, zeroes).await.unwrap()).await;
    let truth = disk.reference("zeroed");
    let (archive, moved) = bench.back_up(7, &[&disk], "g1").await.unwrap();
    assert_eq!(moved.total_bytes, 512);
    bench.check_restore(&archive, "scsi0", &truth).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_of_increments_restores_each_step() {
    // Sub-cluster dirty areas, zeroes over data of the base, and odd sizes must not lose a byte.
    for (seed, granularity, size) in [(2, 65536, ODD_SIZE), (3, 4096, ODD_SIZE), (4, 512, 5 << 20)]
    {
        let bench = Bench::new().await;
        let disk = GuestDisk::create(bench.path(), "scsi0", size, granularity);
        let mut random = Random::new(seed);
        let mut steps = Vec::new();
        for step in 0..10 {
            scribble(&disk, &mut random, if step == 0 { 100 } else { 25 }).await;
            let truth = disk.reference(&format!("step{step}"));
            let generation = format!("g{step}");
            let (archive, moved) = bench.back_up(7, &[&disk], &generation).await.unwrap();
            if step > 0 {
                assert!(moved.total_bytes < size, "step {step} was a full backup");
            }
            steps.push((archive, truth));
        }
        let listed = bench.provider.list(&bench.call).await.unwrap();
        assert_eq!(listed.iter().filter(|a| a.base.is_some()).count(), 9);
        for (archive, truth) in &steps {
            bench.check_image(archive, "scsi0", truth);
            bench.check_restore(archive, "scsi0", truth).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_increment_without_changes_is_small_and_restores() {
    let bench = Bench::new().await;
    let disk = GuestDisk::create(bench.path(), "scsi0", ODD_SIZE, 65536);
    scribble(&disk, &mut Random::new(5), 50).await;
    let truth = disk.reference("t");
    bench.back_up(1, &[&disk], "g1").await.unwrap();
    let (archive, moved) = bench.back_up(1, &[&disk], "g2").await.unwrap();
    assert_eq!(moved.total_bytes, 0);
    bench.check_restore(&archive, "scsi0", &truth).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bitmap_with_another_sum_than_announced_fails_the_backup() {
    let bench = Bench::new().await;
    let disk = GuestDisk::create(bench.path(), "scsi0", ODD_SIZE, 65536);
    let mut random = Random::new(6);
    scribble(&disk, &mut random, 50).await;
    bench.back_up(1, &[&disk], "g1").await.unwrap();
    scribble(&disk, &mut random, 5).await;

    let mut guest = bench.start(1).await;
    let requests = guest.plan_volumes(&[disk.info()], &bench.call).await.unwrap();
    assert_eq!(
        requests,
        [BitmapRequest::Use { generation: "g1".to_owned(), readable: Readable::Dirty }]
    );
    let snapshot = disk.snapshot().await;
    let mut volume = disk.volume(&snapshot, &requests[0], "g2").await;
    volume.dirty_bytes = volume.dirty_bytes.map(|bytes| bytes + 65536);
    let progress = Recorder::default();
    let error = guest.backup_vm(vm(vec![volume]), &progress, &bench.call).await.unwrap_err();
    assert_eq!(error.kind, Kind::Corrupt);
    assert!(error.message.contains("dirty bytes"), "{error}");
    guest.abort("wrong sum", &bench.call).await.unwrap();
    assert_eq!(bench.names().await.len(), 1);
    assert_eq!(visible(&bench).len(), 1, "abort must remove everything");
}

fn visible(bench: &Bench) -> Vec<String> {
    let entries = std::fs::read_dir(bench.storage()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name != ".vzdump").collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recreated_bitmap_gives_a_full_backup_although_an_increment_was_planned() {
    let bench = Bench::new().await;
    let disk = GuestDisk::create(bench.path(), "scsi0", ODD_SIZE, 65536);
    scribble(&disk, &mut Random::new(7), 50).await;
    let truth = disk.reference("t");
    bench.back_up(1, &[&disk], "g1").await.unwrap();

    let mut guest = bench.start(1).await;
    guest.plan_volumes(&[disk.info()], &bench.call).await.unwrap();
    let snapshot = disk.snapshot().await;
    let volume = Volume {
        bitmap_action: "invalid".to_owned(),
        ..disk.volume(&snapshot, &BitmapRequest::New, "g2").await
    };
    let progress = Recorder::default();
    guest.backup_vm(vm(vec![volume]), &progress, &bench.call).await.unwrap();
    let archive = guest.commit(Uuid::new_v4(), &bench.call).await.unwrap().archive;
    let listed = bench.provider.list(&bench.call).await.unwrap();
    assert_eq!(listed.iter().find(|a| a.name == archive).unwrap().base, None);
    bench.check_image(&archive, "scsi0", &truth);
}

#[tokio::test(flavor = "multi_thread")]
async fn plans_ask_for_an_increment_only_where_one_is_possible() {
    let bench = Bench::new().await;
    let disk = GuestDisk::create(bench.path(), "scsi0", ODD_SIZE, 65536);
    let (first, _) = bench.back_up(1, &[&disk], "g1").await.unwrap();
    let plan = async |id: u32, device: &str, size_bytes: u64| {
        let mut guest = bench.start(id).await;
        let info =
            provider_api::VolumeInfo { device: device.to_owned(), size_bytes, volume_id: None };
        let requests = guest.plan_volumes(&[info], &bench.call).await.unwrap();
        guest.abort("only a question", &bench.call).await.unwrap();
        requests[0].clone()
    };
    let known = BitmapRequest::Use { generation: "g1".to_owned(), readable: Readable::Dirty };
    assert_eq!(plan(1, "scsi0", ODD_SIZE).await, known);
    assert_eq!(plan(2, "scsi0", ODD_SIZE).await, BitmapRequest::New, "another guest");
    assert_eq!(plan(1, "scsi1", ODD_SIZE).await, BitmapRequest::New, "another disk");
    assert_eq!(plan(1, "scsi0", ODD_SIZE + 512).await, BitmapRequest::New, "another size");
    // A damaged newest archive is passed over for an older one.
    let (second, _) = bench.back_up(1, &[&disk], "g2").await.unwrap();
    let image = |archive: &str| bench.storage().join(archive).join("scsi0.qcow2");
    std::fs::File::options().write(true).open(image(&second)).unwrap().set_len(4096).unwrap();
    assert_eq!(plan(1, "scsi0", ODD_SIZE).await, known);
    std::fs::remove_file(image(&first)).unwrap();
    assert_eq!(plan(1, "scsi0", ODD_SIZE).await, BitmapRequest::New, "nothing complete");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_stored_is_released_and_a_refusal_is_told_once() {
    let bench = Bench::new().await;
    let size: u64 = 40 << 20;
    let raw = bench.path().join("snap.raw");
    std::fs::write(&raw, Random::new(8).bytes(size as usize)).unwrap();
    let truth = bench.path().join("truth.raw");
    std::fs::copy(&raw, &truth).unwrap();
    for (extra, is_released) in [("--discard=unmap", true), ("--read-only", false)] {
        std::fs::copy(&truth, &raw).unwrap();
        let snapshot = Snapshot::serve(bench.path(), &raw, &["--format=raw", extra]).await;
        let mut guest = bench.start(1).await;
        let volume = Volume {
            device: "scsi0".to_owned(),
            size_bytes: size,
            access: snapshot.access(None),
            bitmap_mode: BitmapMode::None,
            bitmap_action: "not-used".to_owned(),
            generation: None,
            dirty_bytes: None,
        };
        let progress = Recorder::default();
        guest.backup_vm(vm(vec![volume]), &progress, &bench.call).await.unwrap();
        let archive = guest.commit(Uuid::new_v4(), &bench.call).await.unwrap().archive;
        drop(snapshot);
        let left = std::fs::read(&raw).unwrap();
        assert_eq!(left == vec![0; left.len()], is_released);
        let lines = progress.lines.lock().unwrap().clone();
        let complaints = lines.iter().filter(|line| line.contains("released")).count();
        assert_eq!(complaints, usize::from(!is_released));
        assert_eq!(*progress.last.lock().unwrap(), Some((size, size, 0)));
        bench.check_restore(&archive, "scsi0", &truth).await;
    }
    // Without a generation nothing can follow.
    let mut guest = bench.start(1).await;
    let info =
        provider_api::VolumeInfo { device: "scsi0".to_owned(), size_bytes: size, volume_id: None };
    assert_eq!(guest.plan_volumes(&[info], &bench.call).await.unwrap(), [BitmapRequest::New]);
    guest.abort("done", &bench.call).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_guests_are_backed_up_at_the_same_time() {
    let bench = Bench::new().await;
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let one = GuestDisk::create(folders[0].path(), "scsi0", 30 << 20, 65536);
    let two = GuestDisk::create(folders[1].path(), "scsi0", ODD_SIZE, 65536);
    let mut random = Random::new(9);
    scribble(&one, &mut random, 100).await;
    scribble(&two, &mut random, 60).await;
    for step in 0..3 {
        let truth = [one.reference("t"), two.reference("t")];
        let generation = format!("g{step}");
        let disks = ([&one], [&two]);
        let (first, second) = tokio::join!(
            bench.back_up(1, &disks.0, &generation),
            bench.back_up(2, &disks.1, &generation)
        );
        bench.check_restore(&first.unwrap().0, "scsi0", &truth[0]).await;
        bench.check_restore(&second.unwrap().0, "scsi0", &truth[1]).await;
        scribble(&one, &mut random, 20).await;
        scribble(&two, &mut random, 20).await;
    }
    assert_eq!(bench.names().await.len(), 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn archives_of_the_same_second_get_names_of_their_own() {
    let bench = Bench::new().await;
    let mut job = bench
        .provider
        .start_job(provider_api::JobInfo { start_time_s: 0 }, &bench.call)
        .await
        .unwrap();
    let info = provider_api::GuestInfo {
        kind: provider_api::GuestKind::Qemu,
        id: 5,
        name: None,
        start_time_s: 0,
    };
    let mut names = Vec::new();
    let mut open = Vec::new();
    for step in 0..3 {
        let mut guest = job.start_guest(info.clone(), &bench.call).await.unwrap();
        names.push(guest.archive_name().to_owned());
        if step == 0 {
            let progress = Recorder::default();
            guest.backup_vm(vm(vec![]), &progress, &bench.call).await.unwrap();
            guest.commit(Uuid::new_v4(), &bench.call).await.unwrap();
        } else {
            open.push(guest);
        }
    }
    assert_eq!(names[0], "vzdump-qemu-5-1970_01_01-00_00_00");
    assert_eq!(names[1], format!("{}-2", names[0]));
    assert_eq!(names[2], format!("{}-3", names[0]));
    let lxc = provider_api::GuestInfo { kind: provider_api::GuestKind::Lxc, ..info };
    let mut other = job.start_guest(lxc, &bench.call).await.unwrap();
    assert_eq!(other.archive_name(), "vzdump-lxc-5-1970_01_01-00_00_00");
    // What is backed up must be what was begun.
    let progress = Recorder::default();
    assert!(other.backup_vm(vm(vec![]), &progress, &bench.call).await.is_err());
    job.finish(&bench.call).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_or_late_backup_stops_and_leaves_nothing() {
    let bench = Bench::new().await;
    let raw = bench.path().join("slow.raw");
    std::fs::File::create(&raw).unwrap().set_len(64 << 20).unwrap();
    // A server that never answers reads in time.
    let socket = bench.path().join("slow.sock");
    let child = std::process::Command::new("nbdkit")
        .args(["--foreground", "--exit-with-parent", "--unix", text(&socket)])
        .args(["--filter=noextents", "--filter=delay", "file", text(&raw), "rdelay=1000"])
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let _process = common::Process(child);
    common::connect(&socket, "", Vec::new()).await.disconnect().await.unwrap();
    let volume = Volume {
        device: "scsi0".to_owned(),
        size_bytes: 64 << 20,
        access: provider_api::Access::Nbd { socket, export: String::new(), bitmap: None },
        bitmap_mode: BitmapMode::New,
        bitmap_action: "new".to_owned(),
        generation: Some("g".to_owned()),
        dirty_bytes: None,
    };
    let late = Call {
        deadline: Some(std::time::Instant::now() + std::time::Duration::from_millis(300)),
        ..Call::default()
    };
    let cancelled = Call::default();
    let cancel = cancelled.cancel.clone();
    for call in [&late, &cancelled] {
        let mut guest = bench.start(1).await;
        let progress = Recorder::default();
        let backup = guest.backup_vm(vm(vec![volume.clone()]), &progress, call);
        let (result, ()) = tokio::join!(backup, async { cancel.cancel() });
        assert_eq!(result.unwrap_err().kind, Kind::Cancelled);
        guest.abort("cancelled", call).await.unwrap();
        assert!(visible(&bench).is_empty(), "{:?}", visible(&bench));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_breaks_fails_the_backup() {
    let bench = Bench::new().await;
    let raw = bench.path().join("bad.raw");
    std::fs::write(&raw, Random::new(10).bytes(16 << 20)).unwrap();
    let socket = bench.path().join("bad.sock");
    let child = std::process::Command::new("nbdkit")
        .args(["--foreground", "--exit-with-parent", "--unix", text(&socket)])
        .args(["--filter=error", "file", text(&raw), "error-pread=EIO", "error-pread-rate=10%"])
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let _process = common::Process(child);
    common::connect(&socket, "", Vec::new()).await.disconnect().await.unwrap();
    let mut guest = bench.start(1).await;
    let volume = Volume {
        device: "scsi0".to_owned(),
        size_bytes: 16 << 20,
        access: provider_api::Access::Nbd { socket, export: String::new(), bitmap: None },
        bitmap_mode: BitmapMode::None,
        bitmap_action: "not-used".to_owned(),
        generation: None,
        dirty_bytes: None,
    };
    let progress = Recorder::default();
    let wrong_size = Volume { size_bytes: 17 << 20, ..volume.clone() };
    let error = guest.backup_vm(vm(vec![wrong_size]), &progress, &bench.call).await.unwrap_err();
    assert!(error.message.contains("bytes"), "{error}");
    guest.abort("wrong size", &bench.call).await.unwrap();

    let mut guest = bench.start(1).await;
    let error = guest.backup_vm(vm(vec![volume]), &progress, &bench.call).await.unwrap_err();
    assert!(error.message.contains("scsi0"), "{error}");
    let error = guest.commit(Uuid::new_v4(), &bench.call).await.unwrap_err();
    assert_eq!(error.kind, Kind::Invalid, "an incomplete backup must not be committed");
    assert!(visible(&bench).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_device_names_are_refused_before_anything_is_written() {
    let bench = Bench::new().await;
    let disk = GuestDisk::create(bench.path(), "scsi0", 1 << 20, 65536);
    let snapshot = disk.snapshot().await;
    let volume = disk.volume(&snapshot, &BitmapRequest::New, "g").await;
    for devices in [vec!["../x"], vec!["a/b"], vec![""], vec!["scsi0", "scsi0"]] {
        let mut guest = bench.start(1).await;
        let named = |device: &&str| Volume { device: (*device).to_owned(), ..volume.clone() };
        let volumes = devices.iter().map(named).collect();
        let progress = Recorder::default();
        let error = guest.backup_vm(vm(volumes), &progress, &bench.call).await.unwrap_err();
        assert_eq!(error.kind, Kind::Invalid);
        guest.abort("bad name", &bench.call).await.unwrap();
    }
    // Reuse that nobody planned.
    let mut guest = bench.start(1).await;
    let reuse = Volume { bitmap_mode: BitmapMode::Reuse, dirty_bytes: Some(0), ..volume };
    let progress = Recorder::default();
    let error = guest.backup_vm(vm(vec![reuse]), &progress, &bench.call).await.unwrap_err();
    assert!(error.message.contains("planned"), "{error}");
    guest.abort("not planned", &bench.call).await.unwrap();
}
