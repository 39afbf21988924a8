// SPDX-License-Identifier: MIT OR Apache-2.0
//! A patched storage daemon with one disk, its fleecing image and a guest's export.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use qmp_client::{Options, Session};
use serde_json::json;

use super::Plan;

const START_WITHIN: Duration = Duration::from_secs(20);
const QUIT_WITHIN: Duration = Duration::from_secs(60);

pub(super) struct Daemon {
    child: Child,
    session: Session,
    folder: tempfile::TempDir,
}

impl Daemon {
    /// Starts it and exports the disk as `guest`.
    pub(super) async fn start(plan: &Plan) -> Result<Self> {
        let bin = crate::qemu::bin_dir()?;
        // Not the temporary folder: that may be in RAM, where direct I/O is not possible.
        let folder = tempfile::Builder::new().prefix("stress-").tempdir_in(scratch()?)?;
        let disk = folder.path().join("disk.raw");
        std::fs::File::create(&disk)?.set_len(plan.size_bytes)?;
        let fleecing = create_fleecing(plan, &bin, folder.path())?;
        let cache = json!({ "direct": plan.direct });
        let file = |path: &Path, node: &str| {
            json!({ "driver": "file", "filename": path, "node-name": node, "cache": cache,
                    "discard": "unmap" })
        };
        let top = |driver: &str, node: &str, below: &str| {
            json!({ "driver": driver, "node-name": node, "file": below, "discard": "unmap",
                    "cache": cache })
        };
        let format = if plan.qcow2 { "qcow2" } else { "raw" };
        let mut export = json!({ "type": "nbd", "id": "guest", "node-name": "disk",
                                 "name": "guest", "writable": true });
        let mut command = Command::new(bin.join("qemu-storage-daemon"));
        if plan.iothread {
            command.arg("--object").arg("iothread,id=io0");
            // A guest's device cannot be moved to another thread either.
            export["iothread"] = json!("io0");
            export["fixed-iothread"] = json!(true);
        }
        for node in [
            file(&disk, "disk-file"),
            top("raw", "disk", "disk-file"),
            file(&fleecing, "fleecing-file"),
            top(format, "disk-fleecing", "fleecing-file"),
        ] {
            command.arg("--blockdev").arg(node.to_string());
        }
        let qmp = folder.path().join("qmp");
        let nbd = json!({ "addr": { "type": "unix", "path": folder.path().join("nbd") },
                          "max-connections": 8 });
        let child = command
            .arg("--chardev")
            .arg(format!("socket,id=qmp,path={},server=on,wait=off", qmp.display()))
            .args(["--monitor", "chardev=qmp"])
            .arg("--nbd-server")
            .arg(nbd.to_string())
            .arg("--export")
            .arg(export.to_string())
            .stdin(Stdio::null())
            .spawn()?;
        let mut child = Ended(Some(child));
        let session = connect(&qmp, &mut child).await?;
        let child = child.0.take().context("just started")?;
        Ok(Self { child, session, folder })
    }

    pub(super) fn session(&self) -> &Session {
        &self.session
    }

    pub(super) fn nbd_socket(&self) -> PathBuf {
        self.folder.path().join("nbd")
    }

    /// Exports a node for reading and trimming, with a dirty bitmap of its own if it has one.
    pub(super) async fn export(&self, node: &str, name: &str, bitmap: Option<&str>) -> Result<()> {
        let bitmaps: Vec<_> =
            bitmap.iter().map(|bitmap| json!({ "node": node, "name": bitmap })).collect();
        let export = json!({ "type": "nbd", "id": name, "node-name": node, "name": name,
                             "writable": true, "bitmaps": bitmaps });
        self.session.execute_raw("block-export-add", export, None).await?;
        Ok(())
    }

    /// Ends it by SIGKILL; what is left of the disk.
    pub(super) fn kill(mut self) -> Result<std::fs::File> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(std::fs::File::open(self.folder.path().join("disk.raw"))?)
    }

    /// Tells it to quit; it must end by itself and without an error.
    pub(super) async fn quit(mut self) -> Result<()> {
        // The connection may close before the reply.
        drop(self.session.execute_raw("quit", json!({}), None).await);
        let deadline = Instant::now() + QUIT_WITHIN;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            ensure!(Instant::now() < deadline, "it did not quit within {QUIT_WITHIN:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        ensure!(status.success(), "it ended with {status}");
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// A process that is ended when the value is dropped before it was taken.
struct Ended(Option<Child>);

impl Drop for Ended {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            end(child);
        }
    }
}

fn end(child: &mut Child) {
    if !matches!(child.try_wait(), Ok(Some(_))) {
        drop(child.kill());
        drop(child.wait());
    }
}

fn scratch() -> Result<PathBuf> {
    let path = crate::qemu::workspace().join("target/stress");
    std::fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
    Ok(path)
}

fn create_fleecing(plan: &Plan, bin: &Path, folder: &Path) -> Result<PathBuf> {
    let path = folder.join("fleecing");
    if !plan.qcow2 {
        std::fs::File::create(&path)?.set_len(plan.size_bytes)?;
        return Ok(path);
    }
    let status = Command::new(bin.join("qemu-img"))
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&path)
        .arg(plan.size_bytes.to_string())
        .status()?;
    ensure!(status.success(), "qemu-img create ended with {status}");
    Ok(path)
}

/// Connects as soon as the daemon listens.
async fn connect(qmp: &Path, child: &mut Ended) -> Result<Session> {
    let deadline = Instant::now() + START_WITHIN;
    loop {
        match Session::connect(qmp, Options::default()).await {
            Ok(session) => return Ok(session),
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            Err(_) => {}
        }
        if let Some(child) = &mut child.0
            && let Some(status) = child.try_wait()?
        {
            bail!("the storage daemon ended with {status}");
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
