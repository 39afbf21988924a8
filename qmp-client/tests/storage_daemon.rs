// SPDX-License-Identifier: MIT OR Apache-2.0
//! Against real storage daemons: the distribution's, which lacks the extension, and ours.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support;

use std::{path::Path, time::Duration};

use qmp_client::{
    Error, EventItem, EventStream, Options, Session,
    backup::{
        self, AccessState, BackupAccess, BitmapAction, BitmapMode, Device, LoadBitmap, Readable,
        SetupRequest,
    },
    commands::{
        BlockExportDel, BlockdevDel, NbdExportAdd, NbdServerStart, NbdServerStop,
        QueryBlockExports, QueryNamedBlockNodes, QueryQmpSchema, QueryVersion, RemoveMode,
    },
};
use serde_json::{Value, json};
use support::{DISK_BYTES, Daemon, InCi, add_raw_disk, built, program, soon, storage_daemon};

const NAME: &str = "qemu-storage-daemon";

/// The distribution's, which knows nothing of us.
async fn plain() -> Option<Daemon> {
    let usual = [Path::new("/usr/bin/qemu-storage-daemon")];
    Some(storage_daemon(program(NAME, &usual, InCi::Required)?).await)
}

/// The one `cargo xtask qemu` builds.
async fn patched() -> Option<Daemon> {
    Some(storage_daemon(built(NAME)?).await)
}

async fn wait_for(events: &mut EventStream, name: &str) -> Value {
    soon(async {
        loop {
            match events.next().await {
                Some(EventItem::Event(event)) if event.name == name => return event.data,
                Some(_) => {}
                None => panic!("the connection closed before {name}"),
            }
        }
    })
    .await
}

#[tokio::test]
async fn a_node_is_exported_and_removed_again() {
    let Some(daemon) = plain().await else { return };
    let session = daemon.connect().await;
    let mut events = session.events();
    let version = session.execute(QueryVersion).await.unwrap();
    assert_eq!(&version, session.version());
    assert!(version.qemu.major >= 7);

    add_raw_disk(&daemon, &session, "disk").await;
    let nodes = session.execute(QueryNamedBlockNodes { flat: true }).await.unwrap();
    let node = nodes.iter().find(|node| node.node_name.as_deref() == Some("disk")).unwrap();
    assert_eq!((node.drv.as_str(), node.image.virtual_size_bytes), ("raw", DISK_BYTES));

    let bitmap = json!({"node": "disk", "name": "dirty", "granularity": 65536,
        "disabled": true});
    session.execute_raw("block-dirty-bitmap-add", bitmap, None).await.unwrap();
    let nodes = session.execute(QueryNamedBlockNodes { flat: true }).await.unwrap();
    let node = nodes.iter().find(|node| node.node_name.as_deref() == Some("disk")).unwrap();
    assert_eq!(node.dirty_bitmaps[0].granularity_bytes, 65536);

    let server = NbdServerStart::unix(&daemon.path("nbd")).unwrap();
    session.execute(server).await.unwrap();
    let export = NbdExportAdd {
        id: "export".into(),
        node_name: "disk".into(),
        name: Some("disk".into()),
        writable: false,
        bitmaps: vec![qmp_client::commands::BitmapRef::Name("dirty".into())],
        iothread: None,
    };
    session.execute(export).await.unwrap();
    let exports = session.execute(QueryBlockExports).await.unwrap();
    assert_eq!((exports[0].id.as_str(), exports[0].kind.as_str()), ("export", "nbd"));

    let remove = BlockExportDel { id: "export".into(), mode: Some(RemoveMode::Hard) };
    session.execute(remove).await.unwrap();
    assert_eq!(wait_for(&mut events, "BLOCK_EXPORT_DELETED").await["id"], "export");
    session.execute(NbdServerStop).await.unwrap();
    session.execute(BlockdevDel { node_name: "disk".into() }).await.unwrap();
    let error = session.execute(BlockdevDel { node_name: "disk".into() }).await.unwrap_err();
    assert!(matches!(error, Error::Qmp { .. }), "{error}");
}

#[tokio::test]
async fn a_second_client_finds_the_monitor_busy_until_the_first_leaves() {
    let Some(daemon) = plain().await else { return };
    let first = daemon.connect().await;
    let short = Options { greeting_timeout: Duration::from_millis(200), ..Options::default() };
    let error = Session::connect(daemon.path("qmp"), short).await.unwrap_err();
    assert!(matches!(error, Error::Busy { .. }), "{error}");
    first.execute(QueryVersion).await.unwrap();
    drop(first);
    daemon.connect().await.execute(QueryVersion).await.unwrap();
}

#[tokio::test]
async fn clients_that_leave_in_the_middle_do_not_confuse_the_next() {
    let Some(daemon) = plain().await else { return };
    for _ in 0..20 {
        let session = daemon.connect().await;
        let limit = Duration::from_micros(1);
        let _ = session.execute_with_timeout(QueryQmpSchema, limit).await;
        let _ = session.execute_with_timeout(QueryQmpSchema, limit).await;
    }
    let session = daemon.connect().await;
    let nodes = session.execute(QueryNamedBlockNodes { flat: true }).await.unwrap();
    assert!(nodes.is_empty());
}

#[tokio::test]
async fn quitting_or_killing_the_daemon_ends_the_session() {
    let Some(daemon) = plain().await else { return };
    let session = daemon.connect().await;
    session.quit().await.unwrap();
    assert!(session.is_closed());
    drop(daemon);

    let Some(mut daemon) = plain().await else { return };
    let session = daemon.connect().await;
    daemon.child.kill().await.unwrap();
    soon(session.closed()).await;
    assert!(matches!(session.execute(QueryVersion).await, Err(Error::Disconnected)));
}

#[tokio::test]
async fn a_daemon_without_the_extension_is_named() {
    let Some(daemon) = plain().await else { return };
    let session = daemon.connect().await;
    let request = SetupRequest::new("target", vec![Device::new("disk")]);
    let error = BackupAccess::setup(session.clone(), request).await.unwrap_err();
    assert!(matches!(error, Error::MissingFeature { .. }), "{error}");
    assert!(!session.has_command("backup-access-setup").await.unwrap());
    assert!(session.has_command("blockdev-add").await.unwrap());
}

async fn two_disks(daemon: &Daemon, session: &Session) {
    for node in ["disk0", "disk0-fleecing", "disk1", "disk1-fleecing"] {
        add_raw_disk(daemon, session, node).await;
    }
}

fn request(mode: BitmapMode, generation: Option<&str>) -> SetupRequest {
    let device = |name: &str| Device {
        bitmap_mode: Some(mode.clone()),
        generation: generation.map(str::to_owned),
        ..Device::new(name)
    };
    SetupRequest::new("target", vec![device("disk0"), device("disk1")])
}

#[tokio::test]
async fn an_access_is_set_up_watched_and_committed() {
    let Some(daemon) = patched().await else { return };
    let session = daemon.connect().await;
    session.require_command("backup-access-setup").await.unwrap();
    two_disks(&daemon, &session).await;

    let access =
        BackupAccess::setup(session.clone(), request(BitmapMode::Use, None)).await.unwrap();
    for (info, device) in access.infos().iter().zip(["disk0", "disk1"]) {
        assert_eq!((info.device.as_str(), info.size_bytes), (device, DISK_BYTES));
        assert_eq!(info.bitmap_action, BitmapAction::MissingRecreated);
        assert_eq!(info.dirty_bytes, Some(DISK_BYTES));
        assert!(info.bitmap_name.is_some() && info.generation.is_some());
    }
    let generation = access.infos()[0].generation.clone();
    let status = access.status().await.unwrap().unwrap();
    assert_eq!(status.devices.len(), 2);
    assert!(status.devices.iter().all(|device| device.state == AccessState::Active));

    let again = BackupAccess::setup(session.clone(), request(BitmapMode::Use, None)).await;
    assert!(matches!(again.unwrap_err(), Error::Qmp { .. }));
    assert!(access.status().await.unwrap().is_some(), "the refused setup must not end it");
    assert!(access.commit().await.unwrap().existed);

    let request = request(BitmapMode::Use, generation.as_deref());
    let access = BackupAccess::setup(session.clone(), request).await.unwrap();
    assert_eq!(access.infos()[0].bitmap_action, BitmapAction::Used);
    assert_eq!(access.infos()[0].dirty_bytes, Some(0));
    assert!(access.abort().await.unwrap().existed);
    assert!(!backup::teardown(&session, "target", false).await.unwrap().existed);
    assert!(backup::query(&session).await.unwrap().is_empty());
}

#[tokio::test]
async fn bitmaps_are_kept_in_files_and_removed() {
    let Some(daemon) = patched().await else { return };
    let session = daemon.connect().await;
    two_disks(&daemon, &session).await;
    let load = LoadBitmap {
        device: "disk0".into(),
        target_id: "target".into(),
        file: daemon.path("bitmap").display().to_string(),
        trust_unmodified: false,
    };
    assert!(!backup::load_bitmap(&session, &load).await.unwrap());
    let error = backup::load_bitmap(&session, &load).await.unwrap_err();
    assert!(matches!(error, Error::Qmp { .. }), "{error}");
    let mut request = request(BitmapMode::Use, None);
    for device in &mut request.devices {
        device.readable = Some(Readable::All);
    }
    let access = BackupAccess::setup(session.clone(), request.clone()).await.unwrap();
    access.commit().await.unwrap();
    // Into its file, and out of it.
    backup::unload_bitmap(&session, "disk0", "target").await.unwrap();
    let error = backup::unload_bitmap(&session, "disk0", "target").await.unwrap_err();
    assert!(error.to_string().contains("no bitmap file"), "{error}");
    assert!(backup::load_bitmap(&session, &load).await.unwrap());
    backup::remove_bitmaps(&session, "target", Some("disk1")).await.unwrap();
    let access = BackupAccess::setup(session.clone(), request).await.unwrap();
    let actions: Vec<_> = access.infos().iter().map(|info| info.bitmap_action.clone()).collect();
    assert_eq!(actions, [BitmapAction::Used, BitmapAction::MissingRecreated]);
    access.abort().await.unwrap();
    backup::remove_bitmaps(&session, "target", None).await.unwrap();
    let error = backup::remove_bitmaps(&session, "target", Some("nothing")).await.unwrap_err();
    assert!(error.is_device_not_found(), "{error}");
}

#[tokio::test]
async fn a_dropped_access_is_gone_and_the_next_one_works() {
    let Some(daemon) = patched().await else { return };
    let session = daemon.connect().await;
    two_disks(&daemon, &session).await;
    for _ in 0..3 {
        let access =
            BackupAccess::setup(session.clone(), request(BitmapMode::New, None)).await.unwrap();
        drop(access);
    }
    assert!(backup::query(&session).await.unwrap().is_empty());
    // The last session leaves with the guard: the teardown is executed nevertheless.
    let access =
        BackupAccess::setup(session.clone(), request(BitmapMode::New, None)).await.unwrap();
    drop(session);
    drop(access);
    // Busy until the old connection is closed, which is after the teardown.
    let session = daemon.connect().await;
    assert!(backup::query(&session).await.unwrap().is_empty());
}

#[tokio::test]
async fn bad_requests_change_nothing() {
    let Some(daemon) = patched().await else { return };
    let session = daemon.connect().await;
    two_disks(&daemon, &session).await;
    let missing = SetupRequest::new("target", vec![Device::new("disk0"), Device::new("nothing")]);
    let error = BackupAccess::setup(session.clone(), missing).await.unwrap_err();
    assert!(error.is_device_not_found(), "{error}");
    let requests = [
        SetupRequest::new("", vec![Device::new("disk0")]),
        SetupRequest::new("target", Vec::new()),
        SetupRequest::new("target", vec![Device::new("disk0"), Device::new("disk0")]),
        SetupRequest::new(
            "target",
            vec![Device { fleecing: Some("disk0".into()), ..Device::new("disk0") }],
        ),
    ];
    for request in requests {
        let error = BackupAccess::setup(session.clone(), request).await.unwrap_err();
        assert!(matches!(error, Error::Qmp { .. }), "{error}");
    }
    assert!(backup::query(&session).await.unwrap().is_empty());
    let access =
        BackupAccess::setup(session.clone(), request(BitmapMode::None, None)).await.unwrap();
    assert_eq!(access.infos()[0].bitmap_action, BitmapAction::NotUsed);
    access.abort().await.unwrap();
}
