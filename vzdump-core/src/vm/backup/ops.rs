// SPDX-License-Identifier: MIT OR Apache-2.0
//! QMP steps that a backup and the recovery of one share. Undoing what is not there is no error.

use std::path::Path;
use std::time::Duration;

use qmp_client::commands::{
    BlockExportDel, BlockdevAdd, BlockdevDel, NbdServerStop, QueryBlockExports,
    QueryNamedBlockNodes, RemoveMode,
};
use qmp_client::{Error, Options, Session};
use serde_json::{Map, Value, json};

use crate::storage::ImageFormat;

/// Closing an image may have to wait for a slow storage.
const BLOCKDEV_LIMIT: Duration = Duration::from_secs(60);
/// Stopping the server waits for its requests in flight.
const NBD_STOP_LIMIT: Duration = Duration::from_secs(30);
/// How often a node in use is tried again: a closing client may hold it for a moment.
const DEL_ATTEMPTS: u32 = 10;
const DEL_DELAY: Duration = Duration::from_millis(200);

/// Connects to a monitor.
pub(crate) async fn connect(socket: &Path) -> Result<Session, Error> {
    Session::connect(socket, Options::default()).await
}

/// Attaches a fleecing image. Its content is private to QEMU and worthless after a crash, so
/// nothing is ever flushed to it.
pub(super) async fn add_fleecing_node(
    session: &Session,
    node: &str,
    path: &str,
    format: ImageFormat,
) -> Result<(), Error> {
    let options = json!({
        "driver": format.name(),
        "node-name": node,
        "discard": "unmap",
        "cache": { "no-flush": true },
        "file": {
            "driver": "file",
            "filename": path,
            "discard": "unmap",
            "cache": { "no-flush": true },
        },
    });
    let Value::Object(options) = options else { unreachable!("json! with braces is an object") };
    add_node(session, options).await
}

async fn add_node(session: &Session, options: Map<String, Value>) -> Result<(), Error> {
    session.execute_with_timeout(BlockdevAdd(options), BLOCKDEV_LIMIT).await?;
    Ok(())
}

/// Whether a node exists.
async fn has_node(session: &Session, node: &str) -> Result<bool, Error> {
    let nodes = session.execute(QueryNamedBlockNodes { flat: true }).await?;
    Ok(nodes.iter().any(|info| info.node_name.as_deref() == Some(node)))
}

/// Removes a node.
pub(crate) async fn remove_node(session: &Session, node: &str) -> Result<(), Error> {
    let mut attempt = 0;
    loop {
        if !has_node(session, node).await? {
            return Ok(());
        }
        let command = BlockdevDel { node_name: node.to_owned() };
        match session.execute_with_timeout(command, BLOCKDEV_LIMIT).await {
            Ok(_) => return Ok(()),
            Err(Error::Qmp { .. }) if attempt < DEL_ATTEMPTS => {
                attempt += 1;
                tokio::time::sleep(DEL_DELAY).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Stops the NBD server with our exports; exports of others, if any, keep it running.
pub(crate) async fn stop_nbd(session: &Session, ours: &[String]) -> Result<(), Error> {
    let exports = session.execute(QueryBlockExports).await?;
    let nbd: Vec<String> =
        exports.into_iter().filter(|export| export.kind == "nbd").map(|export| export.id).collect();
    if nbd.iter().all(|id| ours.contains(id)) {
        let stopped = session.execute_with_timeout(NbdServerStop, NBD_STOP_LIMIT).await;
        return match stopped {
            // It does not run, which is what is wanted.
            Err(Error::Qmp { desc, .. }) if desc.contains("not running") => Ok(()),
            other => other.map(|_| ()),
        };
    }
    for id in nbd.into_iter().filter(|id| ours.contains(id)) {
        let command = BlockExportDel { id, mode: Some(RemoveMode::Hard) };
        session.execute(command).await?;
    }
    Ok(())
}
