// SPDX-License-Identifier: MIT OR Apache-2.0
//! A host tool is killed in the middle of a backup; another process finds its access and finishes
//! it. The first is a real child process of this test, the second the test itself.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support;

use std::{path::PathBuf, process::Stdio, time::Duration};

use provider_nbd::Client;
use qmp_client::{
    Options, Session,
    backup::{
        self, AccessState, BackupAccess, BitmapAction, BitmapMode, Device, SetupRequest,
        TeardownResult,
    },
    commands::{BitmapRef, NbdExportAdd, NbdServerStart, QueryBlockExports, QueryNamedBlockNodes},
};
use support::{DISK_BYTES, Daemon, add_raw_disk, built, soon, storage_daemon};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};

/// Where the child finds the monitor; without it the child's function is no test of anything.
const MONITOR: &str = "RECONNECT_TEST_MONITOR";
/// The function below that the child runs.
const HOST_TOOL: &str = "the_host_tool_that_is_killed";
const TARGET: &str = "store:100";
const OLD: u8 = 0x5a;
const NEW: u8 = 0xa5;

fn request(generation: Option<&str>) -> SetupRequest {
    let device = Device {
        bitmap_mode: Some(BitmapMode::Use),
        generation: generation.map(str::to_owned),
        ..Device::new("disk")
    };
    SetupRequest::new(TARGET, vec![device])
}

fn export(name: &str, node: &str, bitmaps: Vec<BitmapRef>) -> NbdExportAdd {
    NbdExportAdd {
        id: name.to_owned(),
        node_name: node.to_owned(),
        name: Some(name.to_owned()),
        writable: true,
        bitmaps,
        iothread: None,
    }
}

/// Runs in the child: sets an access up, exports the snapshot, notes the generation where a real
/// tool would (its journal; here standard output), and then waits to be killed.
#[tokio::test]
async fn the_host_tool_that_is_killed() {
    let Some(monitor) = std::env::var_os(MONITOR) else { return };
    let session = Session::connect(PathBuf::from(monitor), Options::default()).await.unwrap();
    let access = BackupAccess::setup(session.clone(), request(None)).await.unwrap();
    let info = &access.infos()[0];
    let bitmap = BitmapRef::OnNode {
        node: info.bitmap_node_name.clone().unwrap(),
        name: info.bitmap_name.clone().unwrap(),
    };
    session.execute(export("snapshot", &info.node_name, vec![bitmap])).await.unwrap();
    println!("\ngeneration {}", info.generation.as_ref().unwrap());
    std::future::pending::<()>().await;
}

/// A daemon with a disk full of [`OLD`], its fleecing image, and the guest's export.
async fn daemon() -> Option<Daemon> {
    let daemon = storage_daemon(built("qemu-storage-daemon")?).await;
    let session = daemon.connect().await;
    for node in ["disk", "disk-fleecing"] {
        add_raw_disk(&daemon, &session, node).await;
    }
    session.execute(NbdServerStart::unix(&daemon.path("nbd")).unwrap()).await.unwrap();
    session.execute(export("guest", "disk", Vec::new())).await.unwrap();
    guest_fills(&daemon, OLD).await;
    Some(daemon)
}

async fn client(daemon: &Daemon, export: &str) -> Client {
    let options = provider_nbd::Options { whole_reads: true, ..provider_nbd::Options::default() };
    Client::connect_unix(daemon.path("nbd"), export, options).await.unwrap()
}

async fn guest_fills(daemon: &Daemon, pattern: u8) {
    let data = vec![pattern; usize::try_from(DISK_BYTES).unwrap()];
    let guest = client(daemon, "guest").await;
    guest.write(0, data.into(), false).await.unwrap();
    guest.disconnect().await.unwrap();
}

/// Starts the child; its process is killed when dropped.
fn start_host_tool(daemon: &Daemon) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", HOST_TOOL, "--nocapture"])
        .env(MONITOR, daemon.path("qmp"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

/// Waits until the child has its access; the generation that it notes.
async fn generation_of(child: &mut Child) -> String {
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    soon(async {
        loop {
            let line = lines.next_line().await.unwrap().expect("the child ended early");
            if let Some(generation) = line.strip_prefix("generation ") {
                return generation.to_owned();
            }
        }
    })
    .await
}

/// Connects once the monitor is free of its dead client.
async fn reconnect(daemon: &Daemon) -> Session {
    soon(Session::connect(daemon.path("qmp"), Options::default())).await.unwrap()
}

/// Kills a host tool in the middle of its backup and takes its access over, while the guest
/// overwrites everything; then `finish`es it. The generation the dead tool had noted.
async fn crash_and_finish(
    daemon: &Daemon,
    finish: impl AsyncFnOnce(BackupAccess) -> TeardownResult,
) -> String {
    let mut child = start_host_tool(daemon);
    let generation = generation_of(&mut child).await;
    child.kill().await.unwrap();
    guest_fills(daemon, NEW).await;

    let session = reconnect(daemon).await;
    assert!(BackupAccess::adopt(session.clone(), "store:1").await.unwrap().is_none());
    let access = BackupAccess::adopt(session.clone(), TARGET).await.unwrap().unwrap();
    assert_eq!((access.target_id(), access.infos().len()), (TARGET, 0));
    let status = access.status().await.unwrap().unwrap();
    assert_eq!(status.devices[0].state, AccessState::Active);
    assert_eq!(status.devices[0].bitmap_action, BitmapAction::MissingRecreated);
    assert_eq!(status.devices[0].captured_bytes, DISK_BYTES);

    // The dead tool's export still serves the point in time: a backup could even go on.
    let snapshot = client(daemon, "snapshot").await;
    let read = snapshot.read(0, usize::try_from(DISK_BYTES).unwrap()).await.unwrap();
    assert!(read.iter().all(|&byte| byte == OLD));
    drop(snapshot);

    assert_eq!(finish(access).await, TeardownResult { existed: true, reason: None });
    assert!(backup::query(&session).await.unwrap().is_empty());
    assert!(BackupAccess::adopt(session.clone(), TARGET).await.unwrap().is_none());
    let exports = session.execute(QueryBlockExports).await.unwrap();
    assert!(exports.iter().all(|export| export.id == "guest"), "{exports:?}");
    let nodes = session.execute(QueryNamedBlockNodes { flat: true }).await.unwrap();
    let left = nodes.iter().filter(|node| node.drv.starts_with("backup-")).count();
    assert_eq!(left, 0, "{nodes:?}");
    generation
}

/// What the next setup makes of the bitmap, and how much is dirty.
async fn next_setup(daemon: &Daemon, generation: Option<&str>) -> (BitmapAction, u64) {
    let session = reconnect(daemon).await;
    let access = BackupAccess::setup(session, request(generation)).await.unwrap();
    let info = access.infos()[0].clone();
    access.abort().await.unwrap();
    (info.bitmap_action, info.dirty_bytes.unwrap())
}

#[tokio::test]
async fn the_access_of_a_killed_tool_is_committed_by_another() {
    let Some(daemon) = daemon().await else { return };
    let commit = async |access: BackupAccess| access.commit().await.unwrap();
    let generation = crash_and_finish(&daemon, commit).await;
    // The backup counts: an increment has what the guest wrote since its point in time.
    let (action, dirty_bytes) = next_setup(&daemon, Some(&generation)).await;
    assert_eq!((action, dirty_bytes), (BitmapAction::Used, DISK_BYTES));
}

#[tokio::test]
async fn the_access_of_a_killed_tool_is_aborted_by_another() {
    let Some(daemon) = daemon().await else { return };
    let abort = async |access: BackupAccess| access.abort().await.unwrap();
    let generation = crash_and_finish(&daemon, abort).await;
    // Nobody knows whether it was stored, so it does not count without its generation.
    assert_eq!(next_setup(&daemon, None).await, (BitmapAction::Invalid, DISK_BYTES));
    // That setup began anew: the generation is gone.
    let (action, _) = next_setup(&daemon, Some(&generation)).await;
    assert_eq!(action, BitmapAction::Invalid);
}

#[tokio::test]
async fn a_dropped_adopted_access_is_ended_as_a_failure() {
    let Some(daemon) = daemon().await else { return };
    let mut child = start_host_tool(&daemon);
    let generation = generation_of(&mut child).await;
    child.kill().await.unwrap();
    let session = reconnect(&daemon).await;
    drop(BackupAccess::adopt(session.clone(), TARGET).await.unwrap().unwrap());
    // The monitor answers in order, so the teardown comes first.
    assert!(backup::query(&session).await.unwrap().is_empty());
    drop(session);
    // The generation is valid as that of a backup that may have been committed.
    assert_eq!(next_setup(&daemon, Some(&generation)).await, (BitmapAction::Used, 0));
}

#[tokio::test]
async fn whenever_a_tool_is_killed_the_next_one_cleans_up() {
    const ROUNDS: u32 = 24;
    let Some(daemon) = daemon().await else { return };
    let mut found = 0;
    for round in 0..ROUNDS {
        let mut child = start_host_tool(&daemon);
        // From before it connects until its access is there.
        let pause = Duration::from_millis(2) * round;
        drop(tokio::time::timeout(pause, generation_of(&mut child)).await);
        child.kill().await.unwrap();
        let session = reconnect(&daemon).await;
        if let Some(access) = BackupAccess::adopt(session.clone(), TARGET).await.unwrap() {
            found += 1;
            assert!(access.abort().await.unwrap().existed);
        }
        assert!(backup::query(&session).await.unwrap().is_empty(), "round {round}");
        drop(session);
        next_setup(&daemon, None).await;
    }
    // A child that has its access already is not killed too early for this test to mean anything.
    let mut child = start_host_tool(&daemon);
    generation_of(&mut child).await;
    child.kill().await.unwrap();
    let session = reconnect(&daemon).await;
    let last = BackupAccess::adopt(session, TARGET).await.unwrap();
    assert!(last.is_some(), "{found} of {ROUNDS} were found before");
    last.unwrap().abort().await.unwrap();
}
