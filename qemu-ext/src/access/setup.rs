// SPDX-License-Identifier: GPL-2.0-or-later
//! The command `backup-access-setup`.
//!
//! Everything slow happens before the drained section; inside it only constant-time switches. On
//! any failure all of it is undone, inside a drained section too, because taking nodes with an
//! iothread out of the graph under running I/O can hang QEMU 10.0.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fleece::State;

use super::bitmaps::SetupBitmaps;
use super::lease::{self, Lease};
use super::registry::{self, Access, Device, Operation};
use super::request::{self, Plan};
use super::{BitmapInfo, DeviceInfo, SetupRequest, status};
use crate::fault;
use crate::filter::{self, FILTER_DRIVER, SNAPSHOT_DRIVER, Settings};
use crate::qemu::error::Error;
use crate::qemu::graph::{Bds, Drained, Holder, NodeRef, Relaxed, SNAPSHOT_FLAGS};
use crate::qemu::main_loop::{self, MainLoop};
use crate::qemu::migration::MigrationBlocker;
use crate::qemu::try_guard;

/// One device on its way into an access. Fields are dropped in this order.
#[derive(Debug)]
struct Prepared {
    /// Owns the snapshot node.
    owner: Option<Holder>,
    filter: Option<NodeRef>,
    relaxed: Vec<Relaxed>,
    /// Keeps the source in its AioContext, so that opening the filter moves the filter there.
    pin: Option<Holder>,
    source: NodeRef,
    bitmaps: Option<SetupBitmaps>,
    inserted: bool,
    /// A guest device uses the disk, and decides in which AioContext its nodes are.
    has_device: bool,
    plan: PlanRest,
}

/// What is left of the plan when its bitmaps are taken out.
#[derive(Debug)]
struct PlanRest {
    device: String,
    source_node: String,
    fleecing_node: String,
    filter_node: String,
    snapshot_node: String,
    size_bytes: u64,
    timeout: Duration,
}

/// Gives access to the content of devices at one common point in time.
///
/// # Errors
/// The request is not acceptable, or something failed or panicked; nothing has changed then.
pub fn setup(main_loop: MainLoop, request: &SetupRequest) -> Result<Vec<DeviceInfo>, Error> {
    let _operation = Operation::begin("backup-access-setup")?;
    let plans = request::check(main_loop, request)?;
    let blocker = MigrationBlocker::new(main_loop, &reason(&request.target_id))?;

    let mut prepared = Vec::with_capacity(plans.len());
    let done =
        try_guard(|| prepare_and_switch(main_loop, &request.target_id, plans, &mut prepared));
    let panicked = || Err(Error::new("internal error in the setup (see QEMU's log)"));
    let infos = match done.unwrap_or_else(panicked) {
        Ok(infos) => infos,
        Err(error) => {
            if !prepared.is_empty() {
                undo(&Drained::new(main_loop), &mut prepared);
            }
            return Err(error);
        }
    };
    let devices =
        prepared.into_iter().zip(&infos).map(|(p, info)| p.into_device(main_loop, info)).collect();
    let start = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    registry::lock().add(Access {
        target_id: request.target_id.clone(),
        start_time_ms: u64::try_from(start.as_millis()).unwrap_or(u64::MAX),
        devices,
        exports: Vec::new(),
        lease: Lease::new(request.lease_s),
        closing: false,
        verdict: None,
        end_reported: false,
        _migration_blocker: blocker,
    });
    status::start_watchdog(main_loop);
    lease::start_clock(main_loop);
    Ok(infos)
}

/// Why other commands are refused meanwhile.
fn reason(target_id: &str) -> String {
    format!("a backup access of target '{target_id}' is active")
}

fn prepare_and_switch(
    main_loop: MainLoop,
    target_id: &str,
    plans: Vec<Plan>,
    prepared: &mut Vec<Prepared>,
) -> Result<Vec<DeviceInfo>, Error> {
    for plan in plans {
        let device = plan.device.clone();
        prepare(main_loop, target_id, plan, prepared)
            .map_err(|error| error.context(&format!("device '{device}'")))?;
    }
    let drained_ns = switch(main_loop, prepared)?;
    prepared
        .iter()
        .map(|device| device.info(main_loop, drained_ns).map_err(|e| device.named(e)))
        .collect()
}

/// Does everything slow for one device. What was done is in `prepared`, also after an error.
fn prepare(
    main_loop: MainLoop,
    target_id: &str,
    plan: Plan,
    prepared: &mut Vec<Prepared>,
) -> Result<(), Error> {
    step()?;
    let bitmaps = SetupBitmaps::prepare(main_loop, plan.source, plan.bitmaps)?;
    let need = bitmaps.need_map();
    let device_types = request::device_types(main_loop, plan.source);
    prepared.push(Prepared {
        owner: None,
        filter: None,
        relaxed: Vec::new(),
        pin: None,
        source: NodeRef::new(main_loop, plan.source),
        bitmaps: Some(bitmaps),
        inserted: false,
        has_device: !device_types.is_empty(),
        plan: PlanRest {
            device: plan.device,
            source_node: plan.source_node,
            fleecing_node: plan.fleecing_node,
            filter_node: plan.filter_node,
            snapshot_node: plan.snapshot_node,
            size_bytes: plan.size_bytes,
            timeout: plan.limits.timeout,
        },
    });
    let this = prepared.last_mut().expect("it was just pushed");
    let rest = &this.plan;
    step()?;
    this.pin = Some(Holder::new(main_loop, plan.source)?);
    if let Some(fleecing) = Bds::find(main_loop, &rest.fleecing_node) {
        for backend in request::idle_backends(main_loop, fleecing) {
            step()?;
            this.relaxed.push(Relaxed::new(main_loop, backend)?);
        }
    }

    let options = [
        ("driver", FILTER_DRIVER),
        ("node-name", &rest.filter_node),
        ("file", &rest.source_node),
        ("target", &rest.fleecing_node),
    ];
    step()?;
    let filter = NodeRef::open(main_loop, &options, plan.source.inherited_flags(main_loop))?;
    let filter_node = filter.node();
    this.filter = Some(filter);
    let settings = Settings {
        buffer_bytes: plan.limits.buffer_bytes,
        group: plan.limits.group,
        fleecing_limit_bytes: plan.limits.fleecing_limit_bytes,
        share_from_bytes: plan.limits.reflink_bytes,
        metadata_limit_bytes: plan.limits.metadata_limit_bytes,
        timeout_ms: u64::try_from(rest.timeout.as_millis()).unwrap_or(u64::MAX),
        on_error: plan.limits.on_error,
        postpone_discards: request::may_postpone_discards(&device_types),
        need,
        reason: reason(target_id),
        notify: notifier(target_id, &rest.device),
        on_close: on_close(target_id, &rest.device),
    };
    step()?;
    filter::configure(main_loop, filter_node, settings).map_err(Error::new)?;

    let options = [
        ("driver", SNAPSHOT_DRIVER),
        ("node-name", &rest.snapshot_node),
        ("file", &rest.filter_node),
    ];
    step()?;
    let snapshot = NodeRef::open(main_loop, &options, SNAPSHOT_FLAGS)?;
    step()?;
    this.owner = Some(Holder::new(main_loop, snapshot.node())?);
    step()?;
    if let Some(bitmaps) = &mut this.bitmaps {
        bitmaps.create_copy(main_loop, snapshot.node())?;
    }
    step()
}

/// Before everything of a setup that can fail, so that the tests make each of it fail.
fn step() -> Result<(), Error> {
    if fault::step_fails("setup_step") { Err(Error::new("injected")) } else { Ok(()) }
}

/// What the filter calls, in any thread, when the snapshot became worse.
fn notifier(target_id: &str, device: &str) -> Box<dyn Fn() + Send + Sync> {
    let (target_id, device) = (target_id.to_owned(), device.to_owned());
    Box::new(move || {
        let (target_id, device) = (target_id.clone(), device.clone());
        main_loop::schedule(Box::new(move |main_loop| {
            status::report(main_loop, &target_id, &device);
        }));
    })
}

/// What the filter calls when it closes. During an access that happens at QEMU's exit only.
fn on_close(target_id: &str, device: &str) -> Box<dyn Fn() + Send> {
    let (target_id, device) = (target_id.to_owned(), device.to_owned());
    Box::new(move || {
        if let Some(main_loop) = MainLoop::current() {
            status::filter_closed(main_loop, &target_id, &device);
        }
    })
}

/// The point in time: all devices are switched in one drained section. How long that took. After
/// an error `prepared` is empty and everything is as before.
fn switch(main_loop: MainLoop, prepared: &mut Vec<Prepared>) -> Result<u64, Error> {
    let start = Instant::now();
    let drained = Drained::new(main_loop);
    let switched = prepared
        .iter_mut()
        .try_for_each(|device| device.switch(&drained).map_err(|error| device.named(error)));
    if let Err(error) = switched {
        undo(&drained, prepared);
        return Err(error);
    }
    drop(drained);
    Ok(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX))
}

/// Everything is as before.
fn undo(drained: &Drained, prepared: &mut Vec<Prepared>) {
    while let Some(device) = prepared.pop() {
        device.undo(drained);
    }
}

impl Prepared {
    fn named(&self, error: Error) -> Error {
        error.context(&format!("device '{}'", self.plan.device))
    }

    fn filter_node(&self) -> Option<Bds> {
        self.filter.as_ref().map(NodeRef::node)
    }

    /// Puts the filter directly above the source, below those of other targets: what an older one
    /// does late (a guest's postponed discard) is captured for this one like any other request.
    /// After an error [`Self::undo`] makes this device what it was.
    fn switch(&mut self, drained: &Drained) -> Result<(), Error> {
        let main_loop = drained.main_loop();
        let filter = self.filter_node().ok_or_else(|| Error::new("the filter is missing"))?;
        step()?;
        filter::set_active(filter, true).map_err(Error::new)?;
        let replaced = step().and_then(|()| drained.replace_node(self.source.node(), filter));
        if let Err(error) = replaced {
            // Stopping cannot fail.
            let _ = filter::set_active(filter, false);
            return Err(error);
        }
        self.inserted = true;
        step()?;
        if let Some(bitmaps) = &mut self.bitmaps {
            bitmaps.switch();
        }
        // The owner keeps the nodes in their context while the pin goes. A device may move them
        // later, as without us. Without one nothing but the end of an export would, back to the
        // main context, and QEMU 10.0's NBD server aborts when it is moved with requests coming in.
        self.pin = None;
        if let Some(owner) = &self.owner {
            owner.allow_context_change(main_loop, self.has_device);
        }
        step()
    }

    fn info(&self, main_loop: MainLoop, drained_ns: u64) -> Result<DeviceInfo, Error> {
        let bitmaps = self.bitmaps.as_ref().ok_or_else(|| Error::new("the bitmaps are gone"))?;
        step()?;
        let bitmap: Option<BitmapInfo> = bitmaps.fill_copy(main_loop)?;
        Ok(DeviceInfo {
            node_name: self.plan.snapshot_node.clone(),
            device: self.plan.device.clone(),
            size_bytes: self.plan.size_bytes,
            action: bitmaps.action(),
            bitmap,
            drained_ns,
        })
    }

    fn undo(mut self, drained: &Drained) {
        let main_loop = drained.main_loop();
        if let Some(filter) = self.filter_node() {
            filter::begin_close(filter);
            let _ = filter::set_active(filter, false);
            if self.inserted
                && let Err(error) = drained.replace_node(filter, self.source.node())
            {
                // Less is asked of the source than before: QEMU has no reason to refuse.
                status::warn(&format!("device '{}': {error}", self.plan.device));
            }
        }
        // The filter reads its bitmap until it is closed.
        self.owner = None;
        self.filter = None;
        self.relaxed.clear();
        self.pin = None;
        if let Some(bitmaps) = self.bitmaps.take() {
            bitmaps.undo(main_loop);
        }
    }

    fn into_device(mut self, main_loop: MainLoop, info: &DeviceInfo) -> Device {
        let bitmaps = self.bitmaps.take();
        Device {
            bitmaps: bitmaps.and_then(|b| b.finish(main_loop, self.source.node())),
            device: self.plan.device,
            source_node: self.plan.source_node,
            fleecing_node: self.plan.fleecing_node,
            filter_node: self.plan.filter_node,
            snapshot_node: self.plan.snapshot_node,
            size_bytes: self.plan.size_bytes,
            timeout: self.plan.timeout,
            action: info.action,
            dirty_bytes: info.bitmap.as_ref().map(|bitmap| bitmap.dirty_bytes),
            owner: self.owner.take(),
            relaxed: self.relaxed,
            reported: State::Active,
        }
    }
}
