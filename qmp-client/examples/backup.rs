// SPDX-License-Identifier: MIT OR Apache-2.0
//! A whole backup against a storage daemon: setup, export, read and release, teardown.
//!
//! `cargo run -p qmp-client --example backup [PROGRAM]`; the default program is the patched
//! `qemu-storage-daemon` that `cargo xtask qemu` builds.

use std::{env, error::Error, fs::File, path::Path, process::ExitCode, time::Duration};

use bytes::Bytes;
use provider_nbd::{Client, context};
use qmp_client::{
    Options, Session,
    backup::{AccessInfo, BackupAccess, BitmapMode, Device, SetupRequest},
    commands::{BitmapRef, BlockdevAdd, NbdExportAdd, NbdServerStart},
};
use serde_json::{Value, json};
use tokio::process::{Child, Command};

const DISK_BYTES: u64 = 64 << 20;
const PIECE_BYTES: u64 = 1 << 20;
const DAEMON: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/qemu/bin/qemu-storage-daemon");

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[tokio::main]
async fn main() -> ExitCode {
    let program = env::args_os().nth(1).unwrap_or_else(|| DAEMON.into());
    match backup(Path::new(&program)).await {
        Ok(copy) => {
            let begin = String::from_utf8_lossy(&copy[..3]);
            println!("{} bytes of the point in time, beginning with \"{begin}\"", copy.len());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Starts a daemon, backs its disk up while the guest overwrites it, and returns the copy.
pub(crate) async fn backup(program: &Path) -> Result<Vec<u8>> {
    let folder = tempfile::tempdir()?;
    let qmp = folder.path().join("qmp");
    let nbd = folder.path().join("nbd");
    let mut daemon = Command::new(program)
        .arg("--chardev")
        .arg(format!("socket,id=qmp,path={},server=on,wait=off", qmp.display()))
        .args(["--monitor", "chardev=qmp"])
        .kill_on_drop(true)
        .spawn()?;
    let session = connect(&qmp, &mut daemon).await?;
    session.require_command("backup-access-setup").await?;

    // The disk, and the image that takes its old data: `<device>-fleecing` by default.
    for name in ["disk0", "disk0-fleecing"] {
        let path = folder.path().join(name);
        File::create(&path)?.set_len(DISK_BYTES)?;
        session.execute(raw_node(name, &path)).await?;
    }
    session.execute(NbdServerStart::unix(&nbd).ok_or("a path that is not UTF-8")?).await?;

    // In a virtual machine this is the guest's disk; here somebody writes to it over NBD.
    session.execute(export("guest", "disk0", None)).await?;
    let guest = Client::connect_unix(&nbd, "guest", provider_nbd::Options::default()).await?;
    guest.write(0, Bytes::from_static(b"old"), false).await?;

    // The point in time. All devices of a request have the same.
    let device = Device { bitmap_mode: Some(BitmapMode::Use), ..Device::new("disk0") };
    let request = SetupRequest::new("example", vec![device]);
    let access = BackupAccess::setup(session.clone(), request).await?;
    let info = &access.infos()[0];
    let dirty_bytes = info.dirty_bytes.unwrap_or(info.size_bytes);
    println!("{}: bitmap {}, {dirty_bytes} bytes to copy", info.device, info.bitmap_action);

    guest.write(0, Bytes::from_static(b"new"), false).await?;

    session.execute(export("snapshot", &info.node_name, Some(info))).await?;
    let copy = copy_dirty(&nbd, info).await?;

    // The copy is durable, so the bitmap may start again; remember `info.generation` with it.
    access.commit().await?;
    session.quit().await?;
    daemon.wait().await?;
    Ok(copy)
}

/// Reads what the bitmap marks and releases it, so that the guest's writes to it cost nothing more.
async fn copy_dirty(nbd: &Path, info: &AccessInfo) -> Result<Vec<u8>> {
    let bitmap = context::dirty_bitmap(info.bitmap_name.as_deref().unwrap_or_default());
    let options = provider_nbd::Options {
        contexts: vec![bitmap.clone()],
        // A failed read is then an error and not the end of the connection.
        whole_reads: true,
        ..provider_nbd::Options::default()
    };
    let snapshot = Client::connect_unix(nbd, "snapshot", options).await?;
    let mut copy = vec![0; usize::try_from(info.size_bytes)?];
    let mut extents = snapshot.extents(&bitmap, 0, info.size_bytes);
    while let Some(extent) = extents.next().await? {
        if extent.flags & context::DIRTY == 0 {
            continue;
        }
        let mut offset = extent.offset;
        while offset < extent.end() {
            let len = PIECE_BYTES.min(extent.end() - offset);
            let data = snapshot.read(offset, usize::try_from(len)?).await?;
            copy[usize::try_from(offset)?..][..data.len()].copy_from_slice(&data);
            snapshot.trim(offset, len).await?;
            offset += len;
        }
    }
    snapshot.disconnect().await?;
    Ok(copy)
}

fn export(name: &str, node: &str, info: Option<&AccessInfo>) -> NbdExportAdd {
    let bitmap = info.and_then(|info| {
        let (node, name) = (info.bitmap_node_name.clone()?, info.bitmap_name.clone()?);
        Some(BitmapRef::OnNode { node, name })
    });
    NbdExportAdd {
        id: name.to_owned(),
        node_name: node.to_owned(),
        name: Some(name.to_owned()),
        // Of a snapshot that allows to release; writes fail.
        writable: true,
        bitmaps: bitmap.into_iter().collect(),
        iothread: None,
    }
}

fn raw_node(node: &str, path: &Path) -> BlockdevAdd {
    let node = json!({"node-name": node, "driver": "raw", "discard": "unmap",
        "file": {"driver": "file", "filename": path, "discard": "unmap"}});
    let Value::Object(node) = node else { unreachable!("it is an object") };
    BlockdevAdd(node)
}

/// Connects as soon as the daemon listens.
async fn connect(qmp: &Path, daemon: &mut Child) -> Result<Session> {
    const ATTEMPTS: u32 = 1000;
    for _ in 0..ATTEMPTS {
        if qmp.exists() {
            return Ok(Session::connect(qmp, Options::default()).await?);
        }
        if let Some(status) = daemon.try_wait()? {
            return Err(format!("the daemon ended at once: {status}").into());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Err("the daemon does not listen".into())
}
