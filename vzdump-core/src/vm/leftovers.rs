// SPDX-License-Identifier: MIT OR Apache-2.0
//! Fleecing images that no task knows any more.
//!
//! A backup that dies leaves a journal, and the recovery removes its images. But a journal can be lost
//! too, with the disk of the state directory or by hand. So whoever holds a guest's lock, and has cleaned
//! up after all of its journals, may remove every image that is named as one of the guest's fleecing images.

use std::collections::BTreeSet;
use std::time::Duration;

use provider_api::GuestKind;
use qmp_client::Session;
use qmp_client::commands::QueryNamedBlockNodes;

use super::backup::{free_volume, is_our_fleecing_image, ops, running_process};
use crate::config::guest::VmConfig;
use crate::job::{JobContext, backup_lock_path, chain};
use crate::journal;
use crate::layout::Monitor;
use crate::lock::{FileLock, LockError};
use crate::storage::VolumeId;
use crate::task_log::TaskSink;

/// A storage that does not list a directory in this time hangs; a backup does not wait for one it may
/// not even need.
const LOOK_LIMIT: Duration = Duration::from_secs(10);

/// What became of left images.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Swept {
    /// Images that were removed.
    pub removed: Vec<String>,
    /// What could not be looked into or removed, in words.
    pub problems: Vec<String>,
}

/// The fleecing images of guests of this host that belong to no task; guests that are being worked on are left out.
///
/// # Errors
/// In words: what could not be looked into.
pub async fn find(ctx: &JobContext) -> Result<Vec<VolumeId>, String> {
    let (found, faults) = look(ctx, None).await;
    if let Some(fault) = faults.into_iter().next() {
        return Err(fault);
    }
    let mut left = Vec::new();
    for image in found.into_iter().filter(|image| is_here(ctx, image.guest_id())) {
        if lock_if_idle(ctx, image.guest_id())?.is_some() {
            left.push(image);
        }
    }
    Ok(left)
}

/// Removes the left images of one guest, whose lock the caller holds and whose journals are cleared. What
/// goes wrong is a warning: a left image costs space and nothing else.
pub async fn remove_of_guest(ctx: &JobContext, id: u32, sink: &dyn TaskSink) {
    let mut swept = Swept::default();
    remove(ctx, id, &mut swept).await;
    tell(&swept, sink);
}

/// Removes the left images of all guests of this host that nobody works on (`doctor --fix`).
pub async fn remove_all(ctx: &JobContext, sink: &dyn TaskSink) -> Swept {
    let mut swept = Swept::default();
    let (found, faults) = look(ctx, None).await;
    swept.problems = faults;
    let ids: BTreeSet<u32> = found.iter().map(VolumeId::guest_id).collect();
    for id in ids.into_iter().filter(|&id| is_here(ctx, id)) {
        match lock_if_idle(ctx, id) {
            // They are looked for again: a backup that ended meanwhile has removed its own.
            Ok(Some(_held)) => remove(ctx, id, &mut swept).await,
            Ok(None) => {}
            Err(problem) => swept.problems.push(problem),
        }
    }
    tell(&swept, sink);
    swept
}

fn tell(swept: &Swept, sink: &dyn TaskSink) {
    for volume in &swept.removed {
        sink.warn(&format!("removed the fleecing image '{volume}' that an earlier backup left"));
    }
    swept.problems.iter().for_each(|problem| sink.warn(problem));
}

/// A storage may be shared: a guest of another host has its locks and its journals there.
fn is_here(ctx: &JobContext, id: u32) -> bool {
    !ctx.layout.guest_configs(id).is_empty()
}

/// The lock of a guest that no task works on and that no journal names.
fn lock_if_idle(ctx: &JobContext, id: u32) -> Result<Option<FileLock>, String> {
    let path = backup_lock_path(&ctx.layout, GuestKind::Qemu, id);
    match FileLock::try_acquire(&path, &format!("VM {id}")) {
        Err(LockError::Busy { .. }) => Ok(None),
        Err(error) => Err(chain(&error)),
        Ok(held) => {
            let journals = journal::list(&ctx.layout, Some((GuestKind::Qemu, id)));
            let is_idle = journals.map_err(|error| chain(&error))?.is_empty();
            Ok(is_idle.then_some(held))
        }
    }
}

async fn look(ctx: &JobContext, id: Option<u32>) -> (Vec<VolumeId>, Vec<String>) {
    let (mut found, faults) = ctx.storages.fleecing_images(id, LOOK_LIMIT).await;
    found.retain(is_our_fleecing_image);
    (found, faults)
}

async fn remove(ctx: &JobContext, id: u32, swept: &mut Swept) {
    let (images, faults) = look(ctx, Some(id)).await;
    let is_new = |fault: &String| !swept.problems.contains(fault);
    let new: Vec<String> = faults.into_iter().filter(is_new).collect();
    swept.problems.extend(new);
    if images.is_empty() {
        return;
    }
    let config = VmConfig::read(&ctx.layout.vm_config_path(id)).map_err(|error| chain(&error));
    let ready = match config {
        Ok(config) => session(ctx, id).await.map(|session| (config, session)),
        Err(why) => Err(why),
    };
    let (config, session) = match ready {
        Ok(ready) => ready,
        Err(why) => {
            let why = format!("fleecing images of VM {id} that were left stay: {why}");
            return swept.problems.push(why);
        }
    };
    for volume in images {
        let name = volume.to_string();
        if config.as_ref().is_some_and(|config| config.names_volume(&name)) {
            swept.problems.push(format!("the image '{name}' stays: VM {id} uses it as a disk"));
            continue;
        }
        let limit = ctx.limits.undo;
        let removed = tokio::time::timeout(limit, remove_image(ctx, session.as_ref(), &volume));
        match removed.await {
            Ok(Ok(())) => swept.removed.push(name),
            Ok(Err(why)) => swept.problems.push(format!("the image '{name}' stays: {why}")),
            Err(_) => swept.problems.push(format!("the image '{name}' stays: its storage hangs")),
        }
    }
}

/// The monitor of a VM that runs.
async fn session(ctx: &JobContext, id: u32) -> Result<Option<Session>, String> {
    if running_process(&ctx.layout, id).map_err(|error| chain(&error))?.is_none() {
        return Ok(None);
    }
    let socket = ctx.layout.qmp_socket(id, Monitor::Backup);
    ops::connect(&socket).await.map(Some).map_err(|error| chain(&error))
}

/// A file that QEMU still uses is detached first, or stays.
async fn remove_image(
    ctx: &JobContext,
    session: Option<&Session>,
    volume: &VolumeId,
) -> Result<(), String> {
    if let Some(session) = session {
        let path = ctx.storages.resolve(&volume.to_string()).map_err(|error| chain(&error))?;
        let nodes = session.execute(QueryNamedBlockNodes { flat: true }).await;
        for node in nodes.map_err(|error| chain(&error))? {
            // Those below it have names that QEMU made, and go with it.
            let name = node.node_name.filter(|name| !name.starts_with('#'));
            if let Some(name) = name
                && std::path::Path::new(&node.image.filename) == path
            {
                ops::remove_node(session, &name).await.map_err(|error| chain(&error))?;
            }
        }
    }
    free_volume(&ctx.storages, volume).await.map_err(|error| chain(&error))
}
