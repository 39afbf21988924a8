// SPDX-License-Identifier: GPL-2.0-or-later
//! Checks a setup request against the graph before anything is touched.

use std::collections::HashSet;

use super::bitmaps::BitmapPlan;
use super::limits::{self, Limits};
use super::{DeviceRequest, SetupRequest, registry};
use crate::filter::{FILTER_DRIVER, SNAPSHOT_DRIVER};
use crate::qemu::error::Error;
use crate::qemu::glib::sha256_hex;
use crate::qemu::graph::{Backend, Bds};
use crate::qemu::main_loop::MainLoop;
use crate::qemu::sentinel::SENTINEL_DRIVER;

/// Smallest fleecing image of a disk that is larger, given a limit on what is stored in it.
const MIN_FLEECING_BYTES: u64 = 1 << 20;
/// Longest name that QEMU accepts for a node.
const MAX_NODE_NAME: usize = 31;
/// Devices whose requests go past the block layer.
const PASSTHROUGH: [&str; 2] = ["scsi-block", "scsi-generic"];
/// Devices that promise their guest what it reads where it discarded: zeroes, or always the same.
const KNOWN_AFTER_DISCARD: [&str; 3] = ["nvme", "nvme-ns", "ide-hd"];

/// One device, checked.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) device: String,
    pub(super) source: Bds,
    pub(super) source_node: String,
    pub(super) fleecing_node: String,
    pub(super) filter_node: String,
    pub(super) snapshot_node: String,
    pub(super) size_bytes: u64,
    pub(super) limits: Limits,
    pub(super) bitmaps: BitmapPlan,
}

/// Checks the whole request. Nothing is changed.
///
/// # Errors
/// What is wrong, and with which device.
pub(super) fn check(main_loop: MainLoop, request: &SetupRequest) -> Result<Vec<Plan>, Error> {
    check_target_id(&request.target_id)?;
    if request.devices.is_empty() {
        return Err(Error::new("the list of devices is empty"));
    }
    let limits = limits::check(request)?;
    if registry::lock().access(&request.target_id).is_some() {
        return Err(Error::new(format!(
            "target '{}' already has a backup access; tear it down first",
            request.target_id
        )));
    }
    if let Some(stuck) = registry::lock().stuck_device(main_loop, &request.target_id) {
        return Err(Error::new(format!("{stuck}; a setup would wait for it, try again later")));
    }
    let mut plans = Vec::with_capacity(request.devices.len());
    for (device, limits) in request.devices.iter().zip(limits) {
        let plan = check_device(main_loop, &request.target_id, device, limits)
            .map_err(|error| error.context(&format!("device '{}'", device.device)))?;
        plans.push(plan);
    }
    check_distinct(&plans)?;
    Ok(plans)
}

pub(super) fn check_target_id(target_id: &str) -> Result<(), Error> {
    if target_id.is_empty() || target_id.len() > 255 {
        return Err(Error::new("target-id must have 1 to 255 bytes"));
    }
    Ok(())
}

fn check_device(
    main_loop: MainLoop,
    target_id: &str,
    request: &DeviceRequest,
    limits: Limits,
) -> Result<Plan, Error> {
    let top = resolve(main_loop, &request.device)?;
    let source = top.skip_filters(main_loop);
    let source_node = source.node_name(main_loop);
    let size_bytes = check_source(main_loop, top, source)?;
    let fleecing_node = check_fleecing(main_loop, request, [top, source], size_bytes, &limits)?;
    let hash = sha256_hex(format!("{target_id}\0{}", request.device).as_bytes());
    let bitmaps = BitmapPlan::new(
        main_loop,
        source,
        target_id,
        size_bytes,
        request,
        limits.granularity_bytes,
    )?;
    Ok(Plan {
        device: request.device.clone(),
        source,
        source_node,
        fleecing_node,
        filter_node: format!("ba-{}-0", &hash[..16]),
        snapshot_node: format!("ba-{}-1", &hash[..16]),
        size_bytes,
        limits,
        bitmaps,
    })
}

/// The topmost node of the device: of its backend, else the node, else of the device's backend.
pub(super) fn resolve(main_loop: MainLoop, name: &str) -> Result<Bds, Error> {
    // The drive of a virtio device belongs to a part of it that has no id of its own.
    let part = format!("{name}/virtio-backend");
    let backends = [
        Backend::find(main_loop, name),
        Backend::find_by_qdev_id(main_loop, name),
        Backend::find_by_qdev_id(main_loop, &part),
    ];
    let node = Bds::find(main_loop, name);
    let found: Vec<Bds> =
        backends.iter().flatten().filter_map(|b| b.node(main_loop)).chain(node).collect();
    let Some(&first) = found.first() else {
        return Err(if backends.iter().any(Option::is_some) {
            Error::new("there is no medium in it")
        } else {
            Error::device_not_found("there is no backend, node or device of this name")
        });
    };
    let source = first.skip_filters(main_loop);
    if found.iter().any(|node| node.skip_filters(main_loop) != source) {
        return Err(Error::new(
            "the name is ambiguous: it stands for different disks as the name of a backend or \
             node and as the id of a device; use a node name",
        ));
    }
    Ok(first)
}

/// Checks that the node can be backed up; its size.
fn check_source(main_loop: MainLoop, top: Bds, source: Bds) -> Result<u64, Error> {
    if !source.is_inserted(main_loop) {
        return Err(Error::new("there is no medium in it"));
    }
    let name = source.node_name(main_loop);
    if let Some((target, device)) = registry::lock().find_device(|d| d.fleecing_node == name) {
        return Err(Error::new(format!(
            "it is the fleecing image of device '{}' for target '{target}'",
            device.device
        )));
    }
    if [FILTER_DRIVER, SNAPSHOT_DRIVER, SENTINEL_DRIVER]
        .contains(&source.driver(main_loop).as_str())
    {
        return Err(Error::new("it is itself part of a backup access"));
    }
    if source.is_inactive(main_loop) {
        return Err(Error::new("it is inactive (handed over by a migration)"));
    }
    let passes_by = |backend: &Backend| {
        backend.node(main_loop).is_some_and(|node| node.skip_filters(main_loop) == source)
            && PASSTHROUGH.contains(&backend.device_type(main_loop).as_str())
    };
    if source.is_scsi_generic(main_loop) || Backend::all(main_loop).iter().any(passes_by) {
        return Err(Error::new("it is a SCSI passthrough device, whose requests bypass filters"));
    }
    if source.is_zoned(main_loop) {
        return Err(Error::new("it is a zoned device, whose requests filters do not pass on"));
    }
    if source.may_grow(main_loop) {
        let users = source.parents(main_loop).into_iter().map(|user| user.description);
        return Err(Error::new(format!(
            "it may grow while it is used by {}; name the disk above it",
            users.collect::<Vec<_>>().join(", ")
        )));
    }
    for node in [top, source] {
        if let Some(error) = node.backup_forbidden(main_loop) {
            return Err(error);
        }
    }
    match source.length(main_loop).map_err(|error| error.context("its size cannot be had"))? {
        0 => Err(Error::new("it has a size of 0 bytes")),
        size => Ok(size),
    }
}

/// The types of the guest devices that use the disk.
pub(super) fn device_types(main_loop: MainLoop, source: Bds) -> Vec<String> {
    Backend::all(main_loop)
        .into_iter()
        .filter(|backend| {
            backend.node(main_loop).is_some_and(|node| node.skip_filters(main_loop) == source)
        })
        .map(|backend| backend.device_type(main_loop))
        .filter(|device_type| !device_type.is_empty())
        .collect()
}

/// Whether a guest may go on reading what it discarded until the discard is carried out.
pub(super) fn may_postpone_discards(device_types: &[String]) -> bool {
    !device_types.iter().any(|name| KNOWN_AFTER_DISCARD.contains(&name.as_str()))
}

/// Checks the fleecing image; its node name.
fn check_fleecing(
    main_loop: MainLoop,
    request: &DeviceRequest,
    disk: [Bds; 2],
    size_bytes: u64,
    limits: &Limits,
) -> Result<String, Error> {
    let name = match &request.fleecing {
        Some(name) => name.clone(),
        None => default_fleecing(&request.device, &disk[1].node_name(main_loop))?,
    };
    let backend = Backend::find(main_loop, &name);
    let node = match backend {
        Some(backend) => backend.node(main_loop),
        None => Bds::find(main_loop, &name),
    };
    let fault = |text: String| Err(Error::new(format!("fleecing image '{name}' {text}")));
    let Some(node) = node.filter(|node| node.is_inserted(main_loop)) else {
        return fault(match backend {
            Some(_) => "has no medium".into(),
            None => "does not exist: there is no node or backend of this name".into(),
        });
    };
    if disk.contains(&node) || disk.contains(&node.skip_filters(main_loop)) {
        return fault("is the device itself".into());
    }
    if node.is_read_only(main_loop) {
        return fault("is read-only".into());
    }
    if node.is_inactive(main_loop) {
        return fault("is inactive (handed over by a migration)".into());
    }
    let node_name = node.node_name(main_loop);
    if let Some((target, _)) = registry::lock().find_device(|d| d.fleecing_node == node_name) {
        return fault(format!("is in use by the backup access of target '{target}'"));
    }
    let idle: HashSet<_> = idle_backends(main_loop, node).into_iter().map(Backend::id).collect();
    if let Some(user) = node.parents(main_loop).into_iter().find(|p| !idle.contains(&p.who)) {
        return fault(format!("is in use by {}", user.description));
    }
    let size = node.length(main_loop).map_err(|error| {
        error.context(&format!("the size of fleecing image '{name}' cannot be had"))
    })?;
    let enough = match limits.fleecing_limit_bytes {
        Some(_) => size_bytes.min(MIN_FLEECING_BYTES),
        None => size_bytes,
    };
    if size < enough {
        let instead = match limits.fleecing_limit_bytes {
            Some(_) => format!("with fleecing-limit it needs {enough} bytes"),
            None => "use a larger image or a fleecing-limit".to_owned(),
        };
        return fault(format!(
            "is too small: it has {size} bytes, the disk has {size_bytes} bytes; {instead}"
        ));
    }
    Ok(node_name)
}

/// Backends of the node that the monitor knows and no device uses.
pub(super) fn idle_backends(main_loop: MainLoop, node: Bds) -> Vec<Backend> {
    let mut backends = Backend::all(main_loop);
    backends.retain(|backend| {
        backend.node(main_loop) == Some(node)
            && !backend.name(main_loop).is_empty()
            && backend.device_type(main_loop).is_empty()
    });
    backends
}

/// The name where a fleecing image is expected when the request has none.
fn default_fleecing(device: &str, source_node: &str) -> Result<String, Error> {
    if let Some((target, other)) = registry::lock().find_device(|d| d.source_node == source_node) {
        return Err(Error::new(format!(
            "'fleecing' must be given: target '{target}' has a backup access to this disk already, \
             with fleecing image '{}', and each needs one of its own",
            other.fleecing_node
        )));
    }
    let name = format!("{device}-fleecing");
    let mut bytes = name.bytes();
    let valid = name.len() <= MAX_NODE_NAME
        && bytes.next().is_some_and(|b| b.is_ascii_alphabetic())
        && bytes.all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
    if valid {
        Ok(name)
    } else {
        Err(Error::new(format!(
            "'fleecing' must be given: '{name}' is no valid name of at most {MAX_NODE_NAME} \
             characters"
        )))
    }
}

/// Checks the devices of one request against each other.
fn check_distinct(plans: &[Plan]) -> Result<(), Error> {
    for (index, plan) in plans.iter().enumerate() {
        for other in &plans[..index] {
            let fault = |text: String| Err(Error::new(format!("device '{}': {text}", plan.device)));
            if plan.source == other.source {
                return fault(format!("it is the same disk as device '{}'", other.device));
            }
            if plan.fleecing_node == other.fleecing_node {
                return fault(format!(
                    "fleecing image '{}' is used for device '{}' too",
                    plan.fleecing_node, other.device
                ));
            }
            for (disk, image) in [(plan, other), (other, plan)] {
                if disk.source_node == image.fleecing_node {
                    return fault(format!(
                        "node '{}' is both a disk to back up and a fleecing image",
                        disk.source_node
                    ));
                }
            }
        }
    }
    Ok(())
}
