// SPDX-License-Identifier: GPL-2.0-or-later
//! The command `query-backup-access`, the events, and the watchdog.

use std::io::Write;
use std::time::{Duration, Instant};

use fleece::{State, Stats};

use super::lease::Lease;
use super::registry::{self, Access, Device};
use super::{DeviceStatus, TargetStatus, loaded, request, teardown};
use crate::fault;
use crate::filter;
use crate::qemu::graph::Bds;
use crate::qemu::main_loop::{self, MainLoop};
use crate::qemu::qapi::{self, BrokenEvent, TornDownEvent};
use crate::qemu::timer::Timer;
use crate::qemu::try_guard;

const WATCHDOG_MS: u32 = 1000;
/// How long each time RAM may be given back: guest requests in the main loop wait meanwhile.
const GIVE_BACK_FOR: Duration = Duration::from_millis(2);

/// The status of all accesses.
pub fn query(main_loop: MainLoop) -> Vec<TargetStatus> {
    let registry = registry::lock();
    registry.accesses.iter().map(|access| target_status(main_loop, access)).collect()
}

fn target_status(main_loop: MainLoop, access: &Access) -> TargetStatus {
    let devices = access.devices.iter().map(|device| DeviceStatus {
        device: device.device.clone(),
        node_name: device.snapshot_node.clone(),
        size_bytes: device.size_bytes,
        stats: device.filter(main_loop).map_or_else(Stats::default, filter::stats),
        action: device.action,
        dirty_bytes: device.dirty_bytes,
    });
    TargetStatus {
        target_id: access.target_id.clone(),
        start_time_ms: access.start_time_ms,
        lease_left_s: access.lease.as_ref().map(Lease::left_s),
        devices: devices.collect(),
    }
}

fn severity(state: State) -> u32 {
    match state {
        State::Active | State::Closing => 0,
        State::Degraded => 1,
        State::Broken => 2,
    }
}

/// Emits the event if the device's snapshot became worse than was reported last.
pub(super) fn report(main_loop: MainLoop, target_id: &str, device: &str) {
    let mut registry = registry::lock();
    let Some(access) = registry.access(target_id) else { return };
    let Some(entry) = access.devices.iter_mut().find(|entry| entry.device == device) else {
        return;
    };
    let Some(node) = entry.filter(main_loop) else { return };
    let stats = filter::stats(node);
    if severity(stats.state) <= severity(entry.reported) {
        return;
    }
    entry.reported = stats.state;
    let node_name = entry.snapshot_node.clone();
    drop(registry);
    qapi::send_broken(
        main_loop,
        &BrokenEvent { target_id, device, node_name: &node_name, stats: &stats },
    );
}

/// The filter of a device closes although no teardown took it out: QEMU exits. That is a teardown
/// as failure.
pub(super) fn filter_closed(main_loop: MainLoop, target_id: &str, device: &str) {
    settle_at_exit(main_loop, target_id, device);
    report_exit(main_loop, target_id, device);
}

/// Settles the device's bitmaps, in time for the image that stores them when it is closed next.
fn settle_at_exit(main_loop: MainLoop, target_id: &str, device: &str) {
    let (source, bitmaps) = {
        let mut registry = registry::lock();
        let Some(access) = registry.access(target_id) else { return };
        let Some(entry) = access.devices.iter_mut().find(|entry| entry.device == device) else {
            return;
        };
        // The holder stays: QEMU is walking over all BlockBackends right now.
        let Some(source) = entry.source(main_loop) else { return };
        let Some(bitmaps) = entry.bitmaps.take() else { return };
        (source, bitmaps)
    };
    let settle = || {
        fault::point("settle_at_exit");
        bitmaps.settle(main_loop, source, false).map(|settled| settled.finish(main_loop, source))
    };
    // QEMU aborts if a bitmap is busy when its disk is closed.
    let settled = try_guard(settle);
    bitmaps.let_go(main_loop, source);
    let problems = match settled {
        Some(Ok(problems)) => problems,
        Some(Err(error)) => vec![error.to_string()],
        None => vec!["internal error; its bitmap is lost".to_owned()],
    };
    for text in problems {
        warn(&format!("target '{target_id}', device '{device}': {text}"));
    }
    loaded::settled_at_exit(main_loop, target_id, &source.node_name(main_loop));
}

/// Says that the access has ended, when this device is its last one. QEMU closes its monitors later.
fn report_exit(main_loop: MainLoop, target_id: &str, device: &str) {
    let mut registry = registry::lock();
    let Some(access) = registry.access(target_id) else { return };
    let is_closed = |entry: &Device| entry.device == device || entry.filter(main_loop).is_none();
    if access.end_reported || !access.devices.iter().all(is_closed) {
        return;
    }
    access.end_reported = true;
    let over = access.lease.as_ref().and_then(Lease::why_over);
    let reason = over.into_iter().chain(["QEMU exits".to_owned()]).collect::<Vec<_>>().join("; ");
    drop(registry);
    let event = TornDownEvent { target_id, success: false, reason: Some(&reason) };
    qapi::send_torn_down(main_loop, &event);
}

/// Sees to it that the watchdog runs.
pub(super) fn start_watchdog(main_loop: MainLoop) {
    let mut registry = registry::lock();
    if registry.watchdog.is_none() {
        registry.watchdog = Timer::new(main_loop, tick);
    }
    if let Some(timer) = &registry.watchdog {
        timer.arm_in_ms(WATCHDOG_MS);
    }
}

/// Every second: breaks snapshots that make no progress, gives unused RAM back, and sees to it that events
/// come even if reporting them failed. Also inside of other commands' waits.
fn tick(main_loop: MainLoop) {
    let registry = registry::lock();
    if registry.accesses.is_empty() {
        return;
    }
    if let Some(timer) = &registry.watchdog {
        timer.arm_in_ms(WATCHDOG_MS);
    }
    let mut filters: Vec<Bds> = Vec::new();
    let mut unreported = Vec::new();
    for access in &registry.accesses {
        for device in &access.devices {
            let Some(node) = device.filter(main_loop) else { continue };
            filters.push(node);
            if severity(filter::stats(node).state) > severity(device.reported) {
                unreported.push((access.target_id.clone(), device.device.clone()));
            }
        }
    }
    drop(registry);
    let until = Instant::now() + GIVE_BACK_FOR;
    for node in filters {
        filter::check_timeout(node);
        filter::give_back_idle_ram(node, until);
        let disk = node.skip_filters(main_loop);
        if !request::may_postpone_discards(&request::device_types(main_loop, disk)) {
            // One that was plugged in meanwhile.
            filter::capture_discards(node);
        }
    }
    for (target_id, device) in unreported {
        main_loop::schedule(Box::new(move |main_loop| report(main_loop, &target_id, &device)));
    }
    teardown::release_ended_exports(main_loop);
}

/// A line in QEMU's log about something that nobody asked for.
pub(super) fn warn(text: &str) {
    drop(writeln!(std::io::stderr(), "backup-access: warning: {text}"));
}
