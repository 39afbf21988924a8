// SPDX-License-Identifier: GPL-2.0-or-later
//! The numbers of a setup request: defaults, overrides per device, and the ranges they must be in.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use fleece::{Group, OnError};

use super::{DeviceRequest, SetupRequest};
use crate::qemu::error::Error;

const MIB: u64 = 1 << 20;
const GRANULARITY_BYTES: RangeInclusive<u64> = 4096..=4 * MIB;
const BUFFER_BYTES: RangeInclusive<u64> = 0..=65536 * MIB;
const DEFAULT_BUFFER_BYTES: u64 = 64 * MIB;
const BUFFER_TOTAL_BYTES: RangeInclusive<u64> = 0..=1 << 40;
/// A node cannot be larger.
const FLEECING_LIMIT_BYTES: RangeInclusive<u64> = MIB..=i64::MAX as u64;
const METADATA_LIMIT_BYTES: RangeInclusive<u64> = MIB..=65536 * MIB;
const DEFAULT_METADATA_LIMIT_BYTES: u64 = 256 * MIB;
/// One granule to one piece of a guest request.
const REFLINK_BYTES: RangeInclusive<u64> = 4096..=MIB;
const TIMEOUT_S: RangeInclusive<u32> = 1..=86400;
const DEFAULT_TIMEOUT_S: u32 = 45;
const LEASE_S: RangeInclusive<u32> = 0..=86400;

/// Numbers of one device after defaults and overrides.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    /// Of new bitmaps; none is the default.
    pub(super) granularity_bytes: Option<u32>,
    pub(super) buffer_bytes: u64,
    /// With a limit the fleecing image may be smaller than the disk.
    pub(super) fleecing_limit_bytes: Option<u64>,
    pub(super) metadata_limit_bytes: u64,
    /// None copies all old data.
    pub(super) reflink_bytes: Option<u64>,
    pub(super) timeout: Duration,
    pub(super) on_error: OnError,
    /// Shared by all devices of the request.
    pub(super) group: Option<Arc<Group>>,
}

/// Checks the numbers of the request; those of its devices, in their order.
///
/// # Errors
/// Names the device, the member and its range.
pub(super) fn check(request: &SetupRequest) -> Result<Vec<Limits>, Error> {
    in_range("lease", request.lease_s, &LEASE_S)?;
    let group = match request.buffer_total_bytes {
        None => None,
        Some(bytes) => {
            in_range("buffer-total", bytes, &BUFFER_TOTAL_BYTES)?;
            Some(Arc::new(Group::new(bytes)))
        }
    };
    let limits = |device: &DeviceRequest| {
        of_device(request, device, group.clone())
            .map_err(|error| error.context(&format!("device '{}'", device.device)))
    };
    request.devices.iter().map(limits).collect()
}

fn of_device(
    request: &SetupRequest,
    device: &DeviceRequest,
    group: Option<Arc<Group>>,
) -> Result<Limits, Error> {
    let (own, defaults) = (&device.options, &request.defaults);
    let granularity = own.granularity_bytes.or(defaults.granularity_bytes);
    let granularity_bytes = granularity.map(check_granularity).transpose()?;

    let buffer_bytes = own.buffer_bytes.or(defaults.buffer_bytes).unwrap_or(DEFAULT_BUFFER_BYTES);
    in_range("buffer-size", buffer_bytes, &BUFFER_BYTES)?;

    let fleecing_limit_bytes = own.fleecing_limit_bytes.or(defaults.fleecing_limit_bytes);
    if let Some(bytes) = fleecing_limit_bytes {
        in_range("fleecing-limit", bytes, &FLEECING_LIMIT_BYTES)?;
    }

    let metadata_limit = own.metadata_limit_bytes.or(defaults.metadata_limit_bytes);
    let metadata_limit_bytes = metadata_limit.unwrap_or(DEFAULT_METADATA_LIMIT_BYTES);
    in_range("metadata-limit", metadata_limit_bytes, &METADATA_LIMIT_BYTES)?;

    let reflink_bytes = own.reflink_bytes.or(defaults.reflink_bytes);
    if let Some(bytes) = reflink_bytes {
        in_range("reflink-size", bytes, &REFLINK_BYTES)?;
    }

    let timeout_s = own.timeout_s.or(defaults.timeout_s).unwrap_or(DEFAULT_TIMEOUT_S);
    in_range("timeout", timeout_s, &TIMEOUT_S)?;

    Ok(Limits {
        granularity_bytes,
        buffer_bytes,
        fleecing_limit_bytes,
        metadata_limit_bytes,
        reflink_bytes,
        timeout: Duration::from_secs(u64::from(timeout_s)),
        on_error: own.on_error.or(defaults.on_error).unwrap_or_default(),
        group,
    })
}

fn check_granularity(bytes: u64) -> Result<u32, Error> {
    u32::try_from(bytes)
        .ok()
        .filter(|granularity| granularity.is_power_of_two() && GRANULARITY_BYTES.contains(&bytes))
        .ok_or_else(|| {
            let (min, max) = (GRANULARITY_BYTES.start(), GRANULARITY_BYTES.end());
            Error::new(format!("granularity {bytes} is not a power of two from {min} to {max}"))
        })
}

fn in_range<T: PartialOrd + Display>(
    member: &str,
    value: T,
    range: &RangeInclusive<T>,
) -> Result<(), Error> {
    if range.contains(&value) {
        return Ok(());
    }
    let (min, max) = (range.start(), range.end());
    Err(Error::new(format!("{member} {value} is not between {min} and {max}")))
}
