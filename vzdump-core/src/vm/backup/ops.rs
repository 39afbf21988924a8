// SPDX-License-Identifier: MIT OR Apache-2.0
//! QMP steps that a backup and the recovery of one share. Undoing what is not there is no error.

use std::path::Path;
use std::time::Duration;

use qmp_client::commands::{
    BlockdevAdd, BlockdevDel, NbdServerStop, QueryBlockExports, QueryNamedBlockNodes,
};
use qmp_client::{Error, Options, Session};
use serde_json::{Map, Value, json};

use crate::guest::GuestError;
use crate::task_log::clean;

/// Closing an image may have to wait for a slow storage.
const BLOCKDEV_LIMIT: Duration = Duration::from_secs(60);
/// Stopping the server waits for its connections to close.
const NBD_STOP_LIMIT: Duration = Duration::from_secs(30);
/// How often a node in use is tried again: a closing client may hold it for a moment.
const DEL_ATTEMPTS: u32 = 10;
const DEL_DELAY: Duration = Duration::from_millis(200);
/// How often exports that are ending are looked at.
const EXPORT_ATTEMPTS: u32 = 10;
const EXPORT_DELAY: Duration = Duration::from_millis(200);

/// Connects to a monitor.
pub(crate) async fn connect(socket: &Path) -> Result<Session, Error> {
    Session::connect(socket, Options::default()).await
}

/// Attaches a raw fleecing image. Its content is private to QEMU and worthless after a crash, so
/// nothing is ever flushed to it.
///
/// Through the page cache: what is read back soon needs no disk, and a disk of any size works. Past it
/// an image whose size is no multiple of its file system's blocks is refused by QEMU with words about
/// permissions.
pub(super) async fn add_fleecing_node(
    session: &Session,
    node: &str,
    path: &str,
) -> Result<(), Error> {
    let options = json!({
        "driver": "raw",
        "node-name": node,
        "discard": "unmap",
        "cache": { "direct": false, "no-flush": true },
        "file": {
            "driver": "file",
            "filename": path,
            "discard": "unmap",
            "cache": { "direct": false, "no-flush": true },
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

/// Whether the NBD server is the one that was to be started with these names, and not somebody
/// else's, of whom ours was refused.
pub(crate) async fn owns_nbd(
    session: &Session,
    socket: &Path,
    exports: &[String],
) -> Result<bool, Error> {
    // QEMU removes the socket with the server, and only a backup that is cleaned up removes it else.
    Ok(socket.exists() || nbd_exports(session).await?.iter().any(|id| exports.contains(id)))
}

/// Stops our NBD server, after the teardown has ended its exports.
///
/// While there are exports it is not stopped: QEMU would wait for their requests with its main loop,
/// without a limit if their storage hangs.
pub(crate) async fn stop_nbd(session: &Session) -> Result<(), GuestError> {
    let failed = || GuestError::at("stop the NBD server");
    let mut attempt = 0;
    loop {
        let left = nbd_exports(session).await.map_err(failed())?;
        if left.is_empty() {
            break;
        }
        attempt += 1;
        if attempt == EXPORT_ATTEMPTS {
            return Err(GuestError::Refused(format!(
                "The NBD server is not stopped, because it still has exports: {}.",
                clean(&left.join(", "))
            )));
        }
        tokio::time::sleep(EXPORT_DELAY).await;
    }
    match session.execute_with_timeout(NbdServerStop, NBD_STOP_LIMIT).await {
        // It does not run, which is what is wanted.
        Err(Error::Qmp { desc, .. }) if desc.contains("not running") => Ok(()),
        other => other.map(|_| ()).map_err(failed()),
    }
}

async fn nbd_exports(session: &Session) -> Result<Vec<String>, Error> {
    let exports = session.execute(QueryBlockExports).await?;
    let nbd = exports.into_iter().filter(|export| export.kind == "nbd");
    Ok(nbd.map(|export| export.id).collect())
}
