// SPDX-License-Identifier: MIT OR Apache-2.0
//! Descriptors passed to the patched emulator: files without a name and a socket that it cannot
//! reach. (The storage daemon has no commands for descriptors.)
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support;

use std::{
    fs::File,
    io::Write as _,
    os::fd::{AsFd as _, OwnedFd},
    os::unix::{fs::FileExt as _, net::UnixListener},
};

use provider_nbd::Client;
use qmp_client::{
    Error, Session,
    backup::{BackupAccess, Device, SetupRequest},
    commands::{
        AddFd, AddFdInfo, BlockdevDel, CloseFd, GetFd, NbdExportAdd, NbdServerStart, QueryFdsets,
        RemoveFd,
    },
};
use serde_json::json;
use support::{DISK_BYTES, Daemon, emulator, raw_node};

const OLD: u8 = 0x11;
const NEW: u8 = 0x22;
const LENGTH: usize = 64 << 10;

/// A file that no path leads to, and a descriptor of it for QEMU.
fn nameless(size_bytes: u64) -> (File, OwnedFd) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size_bytes).unwrap();
    let fd = file.as_fd().try_clone_to_owned().unwrap();
    (file, fd)
}

async fn add_fd(session: &Session, fd: OwnedFd) -> AddFdInfo {
    session.execute_with_fd(AddFd::default(), fd).await.unwrap()
}

async fn export(session: &Session, name: &str, node: &str) {
    let export = NbdExportAdd {
        id: name.to_owned(),
        node_name: node.to_owned(),
        name: Some(name.to_owned()),
        writable: true,
        bitmaps: Vec::new(),
        iothread: None,
    };
    session.execute(export).await.unwrap();
}

/// Starts the NBD server on a socket that is made here and not by QEMU.
async fn serve_on_passed_socket(daemon: &Daemon, session: &Session) {
    let listener = UnixListener::bind(daemon.path("nbd")).unwrap();
    let command = GetFd { fdname: "socket".into() };
    session.execute_with_fd(command, listener.into()).await.unwrap();
    session.execute(NbdServerStart::given("socket")).await.unwrap();
}

#[tokio::test]
async fn a_disk_and_its_fleecing_image_need_no_name() {
    let Some(daemon) = emulator().await else { return };
    let session = daemon.connect().await;
    let (disk, disk_fd) = nameless(DISK_BYTES);
    let (fleecing, fleecing_fd) = nameless(DISK_BYTES);
    disk.write_all_at(&[OLD; LENGTH], 0).unwrap();

    // Without the descriptor there is nothing behind such a name.
    let nothing = session.execute(raw_node("disk", "/dev/fdset/1")).await;
    assert!(matches!(nothing, Err(Error::Qmp { .. })), "{nothing:?}");
    let sets = [add_fd(&session, disk_fd).await, add_fd(&session, fleecing_fd).await];
    for (node, set) in ["disk", "disk-fleecing"].into_iter().zip(&sets) {
        session.execute(raw_node(node, &set.path())).await.unwrap();
    }

    serve_on_passed_socket(&daemon, &session).await;
    export(&session, "guest", "disk").await;
    let mut request = SetupRequest::new("target", vec![Device::new("disk")]);
    // Old data goes to the fleecing image at once, so that its descriptor is used.
    request.buffer_size_bytes = Some(0);
    let access = BackupAccess::setup(session.clone(), request).await.unwrap();
    export(&session, "snapshot", &access.infos()[0].node_name).await;

    let connect = async |export| {
        Client::connect_unix(daemon.path("nbd"), export, provider_nbd::Options::default())
            .await
            .unwrap()
    };
    let guest = connect("guest").await;
    guest.write(0, vec![NEW; LENGTH].into(), true).await.unwrap();
    let snapshot = connect("snapshot").await;
    assert_eq!(snapshot.read(0, LENGTH).await.unwrap(), vec![OLD; LENGTH]);
    let mut content = vec![0; LENGTH];
    disk.read_exact_at(&mut content, 0).unwrap();
    assert_eq!(content, [NEW; LENGTH], "the disk is the file that was passed");
    fleecing.read_exact_at(&mut content, 0).unwrap();
    assert_eq!(content, [OLD; LENGTH], "old data is in the file that was passed");
    drop((guest, snapshot));
    access.commit().await.unwrap();

    session
        .execute_raw("block-export-del", json!({"id": "guest", "mode": "hard"}), None)
        .await
        .unwrap();
    for (node, set) in ["disk", "disk-fleecing"].into_iter().zip(sets) {
        session.execute(RemoveFd { fdset_id: set.fdset_id, fd: None }).await.unwrap();
        let again = session.execute(raw_node("again", &set.path())).await;
        assert!(matches!(again, Err(Error::Qmp { .. })), "{again:?}");
        session.execute(BlockdevDel { node_name: node.into() }).await.unwrap();
    }
    assert_eq!(session.execute(QueryFdsets).await.unwrap(), []);
}

#[tokio::test]
async fn descriptors_arrive_even_when_many_are_sent_at_once() {
    let Some(daemon) = emulator().await else { return };
    let session = daemon.connect().await;
    let calls: Vec<_> = (0..32)
        .map(|number: u32| {
            let path = daemon.path(&format!("file{number}"));
            File::create_new(&path).unwrap().write_all(&number.to_le_bytes()).unwrap();
            let (session, fd) = (session.clone(), File::open(&path).unwrap().into());
            tokio::spawn(async move {
                let opaque = Some(path.display().to_string());
                let command = AddFd { fdset_id: Some(number.into()), opaque };
                session.execute_with_fd(command, fd).await.unwrap()
            })
        })
        .collect();
    for call in calls {
        call.await.unwrap();
    }
    let sets = session.execute(QueryFdsets).await.unwrap();
    let process = daemon.child.id().unwrap();
    let mut seen = 0;
    for fd in sets.iter().flat_map(|set| &set.fds) {
        // QEMU's own view: its descriptor must be the file that went with that command.
        let target = std::fs::read_link(format!("/proc/{process}/fd/{}", fd.fd)).unwrap();
        assert_eq!(target.to_str(), fd.opaque.as_deref());
        seen += 1;
    }
    assert_eq!(seen, 32);

    let fdname = "named".to_owned();
    let fd = File::open(daemon.path("file0")).unwrap().into();
    session.execute_with_fd(GetFd { fdname: fdname.clone() }, fd).await.unwrap();
    session.execute(CloseFd { fdname }).await.unwrap();
}
