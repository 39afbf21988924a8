// SPDX-License-Identifier: MIT OR Apache-2.0
//! Jobs that work: their order, their log, their report.

use provider_api::BitmapRequest;
use vzdump_core::job::report::GuestResult;

use crate::provider::{ARCHIVE, Script};
use crate::world::World;

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_has_the_documented_order_and_leaves_nothing() {
    let world = World::new();
    let report = world.backup().await;
    assert_eq!(report.result, GuestResult::Committed, "{}", world.sink.text());
    world.assert_clean("success");
    // The random end of a node's name makes it this backup's.
    let plain = |line: &String| {
        let line = line.split(" [").next().unwrap();
        let is_node = line.starts_with("blockdev-");
        if is_node { line.rsplit_once('-').unwrap().0.to_owned() } else { line.to_owned() }
    };
    let log: Vec<String> = world.peer.log().iter().map(plain).collect();
    assert_eq!(
        log,
        [
            "query-status",
            "query-commands",
            "set-action shutdown=pause",
            "query-named-block-nodes",
            "blockdev-add fleecing-scsi0",
            "blockdev-add fleecing-virtio1",
            "backup-access-setup",
            "nbd-server-start",
            "block-export-add \"vzdump-scsi0\"",
            "block-export-add \"vzdump-virtio1\"",
            "query-backup-access",
            "backup-access-teardown success=true",
            "query-block-exports",
            "nbd-server-stop",
            "query-named-block-nodes",
            "blockdev-del fleecing-virtio1",
            "query-named-block-nodes",
            "blockdev-del fleecing-scsi0",
            "set-action shutdown=poweroff",
            "query-status",
        ]
    );
    assert_eq!(
        world.provider.calls(),
        [
            "activate",
            "start_job",
            "start_guest",
            "plan_volumes",
            "backup_vm",
            "volumes [\"scsi0 New Some(\\\"gen-next\\\")\", \"virtio1 New Some(\\\"gen-next\\\")\"]",
            "commit",
            "guest_config",
            "keep_log",
            "vzdump-qemu-100-2026_01_02-03_04_05: log",
            "finish",
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_report_and_the_log_have_every_number() {
    let world = World::new();
    let report = world.backup().await;
    assert_eq!(report.archive.as_deref(), Some(ARCHIVE));
    assert_eq!((report.archive_size_bytes, report.disks_size_bytes), (42, 5 << 19));
    assert_eq!(report.transferred.total_bytes, 5 << 19);
    assert_eq!(report.point_in_time.drained_ns, Some(1234));
    assert_eq!(report.point_in_time.freeze_ms, None);
    let access = report.access.unwrap();
    assert_eq!((access.writes_delayed, access.delay_max_ns, access.captured_bytes), (6, 7, 8192));
    assert_eq!((access.delay_p50_ns, access.delay_p99_ns), (3, 7));
    assert_eq!(report.volumes[1].bitmap_action, "new");
    let text = world.sink.text();
    for line in [
        "INFO: starting new backup job: vzdump 100 --storage store",
        "INFO: Starting Backup of VM 100 (qemu)",
        "INFO: status = running",
        "INFO: VM Name: web",
        "INFO: exclude disk 'scsi2' 'local:100/x.raw' (backup=no)",
        "INFO: include disk 'scsi0' 'local:100/vm-100-disk-0.raw' 1M",
        "INFO: scsi0: dirty-bitmap status: created new",
        "INFO: all read",
        "INFO: 100% (2.5 MiB of 2.5 MiB) in 0s",
        "INFO: transferred 2.50 MiB in <1 seconds",
        "INFO: guest writes that had to wait: 6 (half of them up to 0.0 ms, 99% up to 0.0 ms, ",
        "INFO: Finished Backup of VM 100 (00:00:0",
        "INFO: Backup job finished successfully",
    ] {
        assert!(text.contains(line), "{line:?} is missing in\n{text}");
    }
    let file = std::fs::read_to_string(report.log_path.unwrap()).unwrap();
    assert!(
        file.contains("INFO: Starting Backup of VM 100") && file.contains("Finished"),
        "{file}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_increment_uses_the_bitmap_of_its_generation() {
    let using = || BitmapRequest::Use {
        generation: "gen-1".into(),
        readable: provider_api::Readable::Dirty,
    };
    let script = Script { requests: vec![using(), BitmapRequest::None], ..Script::default() };
    let world = World::with("", script);
    let report = world.backup().await;
    assert!(report.is_success(), "{}", world.sink.text());
    let setup =
        world.peer.log().into_iter().find(|l| l.starts_with("backup-access-setup")).unwrap();
    assert!(setup.contains("\"generation\":\"gen-1\"") && setup.contains("\"none\""), "{setup}");
    let volumes = world.provider.calls().into_iter().find(|c| c.starts_with("volumes")).unwrap();
    assert!(volumes.contains("scsi0 Reuse") && volumes.contains("virtio1 None None"), "{volumes}");
    let text = world.sink.text();
    assert!(text.contains("OK (64.0 KiB of 1.0 MiB dirty)"));
    assert_eq!(report.reused_bytes, (1 << 20) - (64 << 10));
    assert!(text.contains("INFO: backup was done incrementally, reused 960.0 KiB (37%)"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_without_disks_keeps_its_configuration() {
    let world = World::new();
    std::fs::write(world.ctx.layout.vm_config_path(100), "name: none\n").unwrap();
    let report = world.backup().await;
    assert!(report.is_success(), "{}", world.sink.text());
    assert!(!world.peer.log().iter().any(|line| line.contains("access")), "{:?}", world.peer.log());
    assert_eq!(world.provider.count("plan_volumes"), 0);
    world.assert_clean("no disks");
}
