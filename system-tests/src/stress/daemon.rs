// SPDX-License-Identifier: MIT OR Apache-2.0
//! A patched storage daemon with one disk, its fleecing image and a guest's export.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use provider_nbd::Client;
use qmp_client::Session;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use super::Plan;
use super::faults::{Fault, Faults};
use crate::storage::{Connection, LIMIT, Storage, create_qcow2};

/// What a full fleecing image has room for, its own tables included.
const ROOM_BYTES: u64 = 6 << 20;
const PAUSE: Duration = Duration::from_millis(3);

pub(super) struct Daemon {
    storage: Storage,
    pub(super) faults: Faults,
    /// The node of the disk's file, to be opened again while it is in use.
    disk_file: Value,
    /// QEMU does not tell a client that connects within a drained section to be quiet: the section
    /// then never ends, with or without an access. So who connects holds this, and who drains.
    connecting: Arc<Mutex<()>>,
}

impl Daemon {
    /// Starts it and exports the disk as `guest`.
    pub(super) async fn start(plan: &Plan) -> Result<Self> {
        let storage = Storage::start().await?;
        let mut faults = Faults::new(plan.fault, &storage.path(""));
        File::create(storage.path("disk.raw"))?.set_len(plan.size_bytes)?;
        create_fleecing(plan, &storage)?;
        let cache = json!({ "direct": plan.direct });
        let serves = |served: fn(Fault) -> bool| plan.fault.is_some_and(served);
        let mut disk_file = Value::Null;
        for (name, node, disk, served) in [
            ("disk.raw", "disk-file", true, serves(Fault::serves_disk)),
            ("fleecing", "fleecing-file", false, serves(Fault::serves_image)),
        ] {
            let mut file = if served {
                faults.serve(&storage, name, disk).await?
            } else {
                storage.file_node(node, name)
            };
            file["node-name"] = json!(node);
            file["discard"] = json!("unmap");
            file["cache"] = cache.clone();
            if disk {
                disk_file = file.clone();
            }
            storage.node(file).await?;
        }
        let mut below = "fleecing-file";
        if plan.fault == Some(Fault::Full) {
            let room = json!({ "driver": "raw", "node-name": "room", "file": below,
                               "size": ROOM_BYTES, "cache": cache });
            storage.node(room).await?;
            below = "room";
        }
        let format = if plan.qcow2 { "qcow2" } else { "raw" };
        for (driver, node, below) in
            [("raw", "disk", "disk-file"), (format, "disk-fleecing", below)]
        {
            let node = json!({ "driver": driver, "node-name": node, "file": below,
                               "discard": "unmap", "cache": cache });
            storage.node(node).await?;
        }
        let mut export = json!({ "type": "nbd", "id": "guest", "node-name": "disk",
                                 "name": "guest", "writable": true });
        if plan.iothread {
            storage.iothread("io0").await?;
            // A guest's device cannot be moved to another thread either.
            export["iothread"] = json!("io0");
            export["fixed-iothread"] = json!(true);
        }
        storage.run("block-export-add", export).await?;
        Ok(Self { storage, faults, disk_file, connecting: Arc::default() })
    }

    pub(super) fn session(&self) -> &Session {
        self.storage.session()
    }

    pub(super) async fn connect(&self, export: &str, contexts: &[&str]) -> Result<Client> {
        let _quiet = self.connecting.lock().await;
        self.storage.client_with(export, Connection { contexts, timeout: LIMIT }).await
    }

    /// Exports a node for reading and trimming, with a dirty bitmap of its own if it has one.
    pub(super) async fn export(&self, node: &str, name: &str, bitmap: Option<&str>) -> Result<()> {
        let bitmaps: Vec<_> =
            bitmap.iter().map(|bitmap| json!({ "node": node, "name": bitmap })).collect();
        let export = json!({ "type": "nbd", "id": name, "node-name": node, "name": name,
                             "writable": true, "bitmaps": bitmaps });
        self.storage.run("block-export-add", export).await?;
        Ok(())
    }

    /// Drains the disk again and again, in each way that a monitor can.
    pub(super) fn drain_all_the_time(&self) -> Drains {
        let (session, file) = (self.session().clone(), self.disk_file.clone());
        let connecting = Arc::clone(&self.connecting);
        let task = tokio::spawn(async move {
            let mut number = 0_u64;
            loop {
                let quiet = connecting.lock().await;
                drain(&session, "disk", &file, number).await?;
                drop(quiet);
                number += 1;
                tokio::time::sleep(PAUSE).await;
            }
        });
        Drains(task)
    }

    /// Ends it by SIGKILL; what is left of the disk.
    pub(super) fn kill(self) -> Result<File> {
        let folder = self.storage.kill()?;
        Ok(File::open(folder.path().join("disk.raw"))?)
    }

    /// Tells it to quit; it must end by itself and without an error. The disk.
    pub(super) async fn quit(self) -> Result<File> {
        let disk = File::open(self.storage.path("disk.raw"))?;
        self.storage.quit().await?;
        Ok(disk)
    }
}

/// A task that drains; it ends with the value.
pub(super) struct Drains(JoinHandle<Result<()>>);

impl Drains {
    /// Ends it; an error if one of its commands failed.
    pub(super) async fn stop(mut self) -> Result<()> {
        self.0.abort();
        match (&mut self.0).await {
            Ok(ended) => ended,
            Err(error) if error.is_cancelled() => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl Drop for Drains {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Drains a disk, in one of the ways that a monitor can; `file` describes the node of its file.
pub(crate) async fn drain(session: &Session, disk: &str, file: &Value, number: u64) -> Result<()> {
    let run = async |command: &str, arguments: Value| -> Result<()> {
        session.execute_raw(command, arguments, Some(LIMIT)).await?;
        Ok(())
    };
    match number % 3 {
        // All disks, before the actions begin.
        0 => {
            let name = format!("drain-{number}");
            let bitmap = json!({ "node": file["node-name"], "name": name });
            let add = json!({ "type": "block-dirty-bitmap-add", "data": bitmap });
            run("transaction", json!({ "actions": [add] })).await?;
            run("block-dirty-bitmap-remove", bitmap).await
        }
        // The file and all above it.
        1 => run("blockdev-reopen", json!({ "options": [file] })).await,
        // The disk, by a parent that comes and goes.
        _ => {
            let node = json!({ "driver": "raw", "node-name": "above", "file": disk,
                               "read-only": true });
            run("blockdev-add", node).await?;
            run("blockdev-del", json!({ "node-name": "above" })).await
        }
    }
}

fn create_fleecing(plan: &Plan, storage: &Storage) -> Result<()> {
    let path = storage.path("fleecing");
    if !plan.qcow2 {
        File::create(&path)?.set_len(plan.size_bytes)?;
        return Ok(());
    }
    create_qcow2(&path, plan.size_bytes)?;
    if plan.fault == Some(Fault::Full) {
        File::options().write(true).open(&path)?.set_len(ROOM_BYTES)?;
    }
    Ok(())
}
