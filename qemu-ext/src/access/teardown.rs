// SPDX-License-Identifier: GPL-2.0-or-later
//! The command `backup-access-teardown`, a coroutine in two phases, and the same without a command
//! after the end of a lease.
//!
//! First exports end and I/O of the fleecing images is waited for without draining, because a
//! drain would hold the guest for as long as an image is stuck. Then, with nothing left in
//! flight, the nodes are taken out in one drained section. Exports are held by us in between:
//! deleting them outside of a drained section can hang QEMU 10.0 when nodes are in iothreads.

use std::time::{Duration, Instant};

use super::bitmaps::Settled;
use super::lease::{self, Lease};
use super::registry::{self, Access, Device, Operation};
use super::{TeardownOutcome, status};
use crate::fault;
use crate::filter;
use crate::qemu::error::Error;
use crate::qemu::export::{self, HeldExport};
use crate::qemu::graph::{Bds, Drained, Holder, NodeRef};
use crate::qemu::main_loop::{self, MainLoop};
use crate::qemu::qapi::{self, TornDownEvent};
use crate::qemu::try_guard;

/// Between two looks at what is still in flight.
const STEP: Duration = Duration::from_millis(5);
/// For the deletion of exports that nobody uses: it waits for nothing but the main loop.
const DELETION_LIMIT: Duration = Duration::from_secs(10);

/// Ends the access of a target. Called in a coroutine of the main context.
///
/// # Errors
/// Something uses the snapshot nodes, or I/O of a fleecing image does not end. The access stays,
/// and the command may be given again.
pub fn teardown(target_id: &str, success: bool) -> Result<TeardownOutcome, Error> {
    let _operation = Operation::begin("backup-access-teardown")?;
    let begun = main_loop::call_from_coroutine(|main_loop| begin(main_loop, target_id, success));
    let Some(limit) = begun.ok_or_else(died)?? else { return Ok(gone(target_id)) };
    let start = Instant::now();
    loop {
        let waiting = main_loop::call_from_coroutine(|main_loop| pending(main_loop, target_id));
        let Some(what) = waiting.ok_or_else(died)? else { break };
        if start.elapsed() >= limit {
            return Err(Error::new(format!(
                "{what} (waited {} seconds); the access stays in state closing, try again",
                limit.as_secs()
            )));
        }
        main_loop::sleep_in_coroutine(STEP);
    }
    let finished =
        main_loop::call_from_coroutine(|main_loop| finish(main_loop, target_id, success));
    finished.ok_or_else(died)?
}

fn died() -> Error {
    Error::new("internal error in the teardown (see QEMU's log); try again")
}

/// There is no access: why, if no command ended it.
fn gone(target_id: &str) -> TeardownOutcome {
    TeardownOutcome { existed: false, reason: registry::lock().why_gone(target_id) }
}

/// Stops the access for a command. How long to wait, or none if it is unknown.
fn begin(main_loop: MainLoop, target_id: &str, success: bool) -> Result<Option<Duration>, Error> {
    bring_owners_home(main_loop, target_id);
    let limit = {
        let mut registry = registry::lock();
        let Some(access) = registry.access(target_id) else { return Ok(None) };
        if let Some(what) = used_by_others(main_loop, access) {
            return Err(Error::new(format!("{what}; end that first")));
        }
        access.verdict = Some(success);
        access.devices.iter().map(|d| d.timeout).max().unwrap_or_default()
    };
    close(main_loop, target_id);
    Ok(Some(limit))
}

/// One try to end an access whose lease is over, without waiting for anything. What is in the way,
/// if something is.
///
/// # Errors
/// Those of the second phase; the access stays.
pub(super) fn try_end(main_loop: MainLoop, target_id: &str) -> Result<Option<String>, Error> {
    // The snapshot ends, whoever still uses it.
    close(main_loop, target_id);
    if let Some(what) = pending(main_loop, target_id) {
        return Ok(Some(what));
    }
    bring_owners_home(main_loop, target_id);
    let success = {
        let mut registry = registry::lock();
        let Some(access) = registry.access(target_id) else { return Ok(None) };
        if let Some(what) = used_by_others(main_loop, access) {
            return Ok(Some(what));
        }
        access.verdict.unwrap_or(false)
    };
    let outcome = finish(main_loop, target_id, success)?;
    let how = if success { "a success, which a command had said," } else { "a failure" };
    registry::lock().note_end(target_id, how, outcome.reason.unwrap_or_default());
    Ok(None)
}

/// Stops the access and tells its exports to end. May be done again.
fn close(main_loop: MainLoop, target_id: &str) {
    let mut registry = registry::lock();
    let Some(access) = registry.access(target_id) else { return };
    access.closing = true;
    let snapshots = access.devices.iter().filter_map(|device| device.snapshot(main_loop));
    let held: Vec<HeldExport> =
        snapshots.flat_map(|snapshot| hold_exports(main_loop, snapshot, &access.exports)).collect();
    let filters: Vec<Bds> = access.devices.iter().filter_map(|d| d.filter(main_loop)).collect();
    drop(registry);
    for filter in filters {
        filter::begin_close(filter);
    }
    // With no lock held: an export may poll while it ends.
    for export in &held {
        export.request_shutdown(main_loop);
    }
    if let Some(access) = registry::lock().access(target_id) {
        access.exports.extend(held);
    }
}

/// Has the owners of snapshot nodes hold these and nothing else: an overlay that a user put above
/// one has taken its owner along, and could not be removed otherwise.
fn bring_owners_home(main_loop: MainLoop, target_id: &str) {
    let mut astray = Vec::new();
    if let Some(access) = registry::lock().access(target_id) {
        for (index, device) in access.devices.iter_mut().enumerate() {
            let snapshot = device.snapshot(main_loop);
            if snapshot.is_some()
                && let Some(owner) = device.owner.take_if(|o| o.node(main_loop) != snapshot)
            {
                astray.push((index, snapshot, owner));
            }
        }
    }
    for (index, snapshot, owner) in astray {
        // With no lock held: this drains. If it fails, what is above is named as a foreign user.
        if let Some(Err(error)) = snapshot.map(|node| owner.hold_again(main_loop, node)) {
            status::warn(&format!("teardown of target '{target_id}': {error}"));
        }
        let mut registry = registry::lock();
        let access = registry.access(target_id);
        if let Some(device) = access.and_then(|access| access.devices.get_mut(index)) {
            device.owner = Some(owner);
        }
    }
}

/// Holds the node's exports that are not held yet.
fn hold_exports(main_loop: MainLoop, node: Bds, held: &[HeldExport]) -> Vec<HeldExport> {
    export::ids_of(main_loop, node)
        .iter()
        .filter(|id| held.iter().all(|export| export.id() != id.as_str()))
        .filter_map(|id| HeldExport::new(main_loop, id))
        .collect()
}

/// A snapshot node that others use besides us and exports, and who.
fn used_by_others(main_loop: MainLoop, access: &Access) -> Option<String> {
    access.devices.iter().find_map(|device| {
        let users = foreign_users(main_loop, device, device.snapshot(main_loop)?);
        (!users.is_empty()).then(|| {
            format!(
                "snapshot node '{}' of device '{}' is in use by {}",
                device.snapshot_node,
                device.device,
                users.join(", ")
            )
        })
    })
}

/// Who uses the snapshot node besides us and exports.
fn foreign_users(main_loop: MainLoop, device: &Device, snapshot: Bds) -> Vec<String> {
    let mut ours = export::parents_of(main_loop, snapshot);
    ours.extend(device.owner.as_ref().map(Holder::id));
    let parents = snapshot.parents(main_loop);
    parents.into_iter().filter(|p| !ours.contains(&p.who)).map(|p| p.description).collect()
}

/// What is still to be waited for.
fn pending(main_loop: MainLoop, target_id: &str) -> Option<String> {
    let mut registry = registry::lock();
    let access = registry.access(target_id)?;
    for device in &access.devices {
        let requests = device.filter(main_loop).map_or(0, filter::io_in_flight);
        if requests > 0 {
            return Some(format!(
                "device '{}' still has {requests} requests to its fleecing image '{}', or postponed \
                 discards of the guest, in flight",
                device.device, device.fleecing_node
            ));
        }
    }
    if let Some(busy) = access.exports.iter().find(|export| !export.is_idle(main_loop)) {
        return Some(format!("export '{}' has not ended", busy.id()));
    }
    registry.stuck_device(main_loop, target_id)
}

/// Takes the nodes out and settles the bitmaps. After an error or a panic the access stays with
/// the devices that are left.
fn finish(main_loop: MainLoop, target_id: &str, success: bool) -> Result<TeardownOutcome, Error> {
    let Some(mut access) = registry::lock().take(target_id) else { return Ok(gone(target_id)) };
    let ended = try_guard(|| take_out(main_loop, &mut access, success));
    let outcome = match ended.unwrap_or_else(|| Err(died())) {
        Ok(outcome) => outcome,
        Err(error) => {
            registry::lock().add(access);
            // They may have found no access meanwhile and stopped.
            status::start_watchdog(main_loop);
            lease::start_clock(main_loop);
            return Err(error);
        }
    };
    if !access.end_reported {
        let event = TornDownEvent { target_id, success, reason: outcome.reason.as_deref() };
        qapi::send_torn_down(main_loop, &event);
    }
    Ok(outcome)
}

fn take_out(
    main_loop: MainLoop,
    access: &mut Access,
    success: bool,
) -> Result<TeardownOutcome, Error> {
    let drained = Drained::new(main_loop);
    delete_exports(&drained, access)?;
    let over = access.lease.as_ref().and_then(Lease::why_over);
    let broken = access.devices.iter().filter_map(|device| {
        let (text, _) = filter::stats(device.filter(main_loop)?).error?;
        Some(format!("device '{}': {text}", device.device))
    });
    let mut problems: Vec<String> = over.into_iter().chain(broken).collect();
    let mut settled = Vec::new();
    while let Some(device) = access.devices.first_mut() {
        match remove(&drained, device, success) {
            Ok((source, bitmaps)) => settled.push((device.device.clone(), source, bitmaps)),
            Err(error) => problems.push(format!("device '{}': {error}", device.device)),
        }
        access.devices.remove(0);
    }
    drop(drained);
    for (device, source, bitmaps) in settled {
        let texts = bitmaps.finish(main_loop, source.node());
        problems.extend(texts.into_iter().map(|text| format!("device '{device}': {text}")));
    }
    let reason = (!problems.is_empty()).then(|| problems.join("; "));
    Ok(TeardownOutcome { existed: true, reason })
}

/// Gives the held exports up and waits until they are deleted.
fn delete_exports(drained: &Drained, access: &mut Access) -> Result<(), Error> {
    let main_loop = drained.main_loop();
    let ended: Vec<_> = access.exports.drain(..).map(|export| export.release(drained)).collect();
    let nodes: Vec<Bds> =
        access.devices.iter().filter_map(|device| device.snapshot(main_loop)).collect();
    let left = || -> Vec<String> {
        nodes.iter().flat_map(|&node| export::ids_of(main_loop, node)).collect()
    };
    let gone = main_loop.poll_until(DELETION_LIMIT, || {
        ended.iter().all(|export| export.is_gone(main_loop)) && left().is_empty()
    });
    if gone {
        return Ok(());
    }
    let left = left().join("', '");
    Err(Error::new(format!("exports of snapshot nodes are still there: '{left}'; try again")))
}

/// Takes one device's nodes out. Its source, and what its bitmaps still ask for.
fn remove(
    drained: &Drained,
    device: &mut Device,
    success: bool,
) -> Result<(NodeRef, Settled), Error> {
    let main_loop = drained.main_loop();
    let gone = |what: &str| Error::new(format!("{what} is gone"));
    let source = device.source(main_loop).ok_or_else(|| gone(&device.source_node))?;
    let source = NodeRef::new(main_loop, source);
    let filter = device.filter(main_loop).map(|filter| NodeRef::new(main_loop, filter));
    // The snapshot node first: nothing may see it above another node.
    device.owner = None;
    fault::point("teardown_removing");
    let removed = match &filter {
        Some(filter) => {
            // Stopping cannot fail.
            let _ = filter::set_active(filter.node(), false);
            let below = filter.node().below(main_loop).unwrap_or(source.node());
            drained.replace_node(filter.node(), below)
        }
        None => Err(gone(&device.filter_node)),
    };
    // The filter reads its bitmap until it is closed.
    drop(filter);
    device.relaxed.clear();
    let settled = match &device.bitmaps {
        Some(bitmaps) => bitmaps.settle(main_loop, source.node(), success)?,
        None => Settled::default(),
    };
    removed?;
    Ok((source, settled))
}

/// Deletes exports that have ended although no teardown is there to do it: it gave up, or QEMU
/// exits and waits for all exports, while the teardown waits for the main loop.
pub(super) fn release_ended_exports(main_loop: MainLoop) {
    let mut ended = Vec::new();
    {
        let mut registry = registry::lock();
        // The drained section below waits for all disks of the guest, not only for these.
        let is_busy = |device: &Device| {
            device.filter(main_loop).is_some_and(|filter| filter::io_in_flight(filter) > 0)
        };
        if registry.accesses.iter().flat_map(|access| &access.devices).any(is_busy) {
            return;
        }
        for access in &mut registry.accesses {
            ended.extend(access.exports.extract_if(.., |export| export.is_idle(main_loop)));
        }
    }
    if ended.is_empty() {
        return;
    }
    let drained = Drained::new(main_loop);
    let ended: Vec<_> = ended.into_iter().map(|export| export.release(&drained)).collect();
    main_loop.poll_until(DELETION_LIMIT, || ended.iter().all(|export| export.is_gone(main_loop)));
}
