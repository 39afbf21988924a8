// SPDX-License-Identifier: MIT OR Apache-2.0
//! A patched storage daemon that is told everything over QMP.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use qmp_client::{Options, Session};
use serde_json::{Value, json};
use tokio::process::{Child, Command};

use crate::cases::Cache;
use crate::scratch::Scratch;

const START_WITHIN: Duration = Duration::from_secs(20);
const QUIT_WITHIN: Duration = Duration::from_secs(90);
const COMMAND_WITHIN: Duration = Duration::from_secs(120);
const IOTHREAD: &str = "io0";

/// A running daemon; killed when dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    session: Session,
    pid: u32,
    iothread: bool,
    folder: Scratch,
}

impl Daemon {
    /// Starts one without any nodes; its sockets are in a new folder in `folder`.
    ///
    /// # Errors
    /// It does not start.
    pub async fn start(bin: &Path, folder: &Path, iothread: bool) -> Result<Self> {
        let folder = Scratch::new(folder, "run-")?;
        let qmp = folder.path().join("qmp");
        let nbd = json!({ "addr": { "type": "unix", "path": folder.path().join("nbd") },
                          "max-connections": 16 });
        let program = bin.join("qemu-storage-daemon");
        let mut command = Command::new(&program);
        if iothread {
            command.arg("--object").arg(format!("iothread,id={IOTHREAD}"));
        }
        let mut child = command
            .arg("--chardev")
            .arg(format!("socket,id=qmp,path={},server=on,wait=off", qmp.display()))
            .args(["--monitor", "chardev=qmp"])
            .arg("--nbd-server")
            .arg(nbd.to_string())
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {}; run ./x qemu first", program.display()))?;
        let pid = child.id().context("the storage daemon has no process id")?;
        let session = connect(&qmp, &mut child).await?;
        Ok(Self { child, session, pid, iothread, folder })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// QEMU's version.
    #[must_use]
    pub fn version(&self) -> String {
        self.session.version().to_string()
    }

    /// Where its exports are.
    #[must_use]
    pub fn nbd_socket(&self) -> PathBuf {
        self.folder.path().join("nbd")
    }

    /// Executes a command.
    ///
    /// # Errors
    /// It fails, or does not end in time.
    pub async fn execute(&self, name: &str, arguments: Value) -> Result<Value> {
        let result = self.session.execute_raw(name, arguments, Some(COMMAND_WITHIN)).await;
        result.with_context(|| format!("the storage daemon failed {name}"))
    }

    /// Adds a block node.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub async fn add_node(&self, node: Value) -> Result<()> {
        let text = node.to_string();
        self.execute("blockdev-add", node).await.with_context(|| text)?;
        Ok(())
    }

    /// Adds a file and a format above it, which is called `node`.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub async fn add_file(&self, node: &str, file: &File<'_>) -> Result<()> {
        let below = format!("{node}-file");
        let format = if file.qcow2 { "qcow2" } else { "raw" };
        let cache = json!({ "direct": file.cache == Cache::Direct });
        self.add_node(json!({ "driver": "file", "filename": file.path, "node-name": below,
                              "cache": cache, "aio": file.aio, "discard": "unmap" }))
            .await?;
        self.add_node(json!({ "driver": format, "file": below, "node-name": node,
                              "cache": cache, "discard": "unmap" }))
            .await
    }

    /// Exports a node by NBD; the guest's export lives in the iothread, if there is one.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub async fn export(&self, node: &str, name: &str, writable: bool) -> Result<()> {
        let mut export = json!({ "type": "nbd", "id": name, "node-name": node, "name": name,
                                 "writable": writable });
        if self.iothread && name == "guest" {
            export["iothread"] = json!(IOTHREAD);
        }
        self.execute("block-export-add", export).await?;
        Ok(())
    }

    /// Tells it to quit, and waits until it has.
    ///
    /// # Errors
    /// It does not end in time, or not well.
    pub async fn quit(mut self) -> Result<()> {
        // The connection may close before the reply.
        drop(self.session.execute_raw("quit", json!({}), Some(QUIT_WITHIN)).await);
        let Ok(status) = tokio::time::timeout(QUIT_WITHIN, self.child.wait()).await else {
            bail!("the storage daemon did not quit within {} s", QUIT_WITHIN.as_secs());
        };
        let status = status.context("cannot wait for the storage daemon")?;
        if !status.success() {
            bail!("the storage daemon ended with {status}");
        }
        Ok(())
    }
}

/// An image file.
#[derive(Debug, Clone, Copy)]
pub struct File<'a> {
    /// Where it is.
    pub path: &'a Path,
    /// Its format, raw if not.
    pub qcow2: bool,
    /// Caching.
    pub cache: Cache,
    /// Kind of asynchronous I/O.
    pub aio: &'a str,
}

/// Connects as soon as the daemon listens.
pub(crate) async fn connect(qmp: &Path, child: &mut Child) -> Result<Session> {
    let deadline = Instant::now() + START_WITHIN;
    loop {
        match Session::connect(qmp, Options::default()).await {
            Ok(session) => return Ok(session),
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            Err(_) => {}
        }
        if let Some(status) = child.try_wait()? {
            bail!("the storage daemon ended with {status}");
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
