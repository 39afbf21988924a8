// SPDX-License-Identifier: GPL-2.0-or-later
//! The guard of a target's bitmap: shows that the disk was never smaller meanwhile.
//!
//! QEMU resizes bitmaps with their disk and tells nobody. A disk that was made smaller and then as
//! large as before has lost data, and its bitmap marks nothing there. The guard is a second bitmap
//! that records nothing. Its last bit, set by us, goes with the end of the disk and does not come
//! back with it. It is stored and migrated like the bitmap that it guards.

use super::bitmaps::check_idle;
use crate::qemu::bitmap::Bitmap;
use crate::qemu::error::Error;
use crate::qemu::graph::Bds;
use crate::qemu::main_loop::MainLoop;

/// A disk that was smaller by less than one granule is not noticed: 512 bytes up to 8 GiB, the
/// unit of sizes in QEMU; 64 KiB from 1 TiB on, so that the guard stays small.
const GRANULARITY_BYTES: std::ops::RangeInclusive<u64> = 512..=65536;
const MAX_BITS_LOG2: u32 = 24;

/// The guard's name. It is one of the target's names, but tells nothing else.
pub(super) fn name(target_hash: &str) -> String {
    format!("ba1-{target_hash}-guard")
}

fn granularity_bytes(size_bytes: u64) -> u32 {
    let wanted = (size_bytes >> MAX_BITS_LOG2).next_power_of_two();
    let bytes = wanted.clamp(*GRANULARITY_BYTES.start(), *GRANULARITY_BYTES.end());
    u32::try_from(bytes).unwrap_or(512)
}

fn fits(main_loop: MainLoop, guard: Bitmap, size_bytes: u64) -> bool {
    guard.size_bytes(main_loop) == size_bytes
        && guard.granularity_bytes(main_loop) == granularity_bytes(size_bytes)
        && guard.is_frozen(main_loop)
}

/// Whether the disk of this size was never smaller since the guard was renewed.
pub(super) fn is_intact(
    main_loop: MainLoop,
    source: Bds,
    target_hash: &str,
    size_bytes: u64,
) -> bool {
    Bitmap::find(main_loop, source, &name(target_hash)).is_some_and(|guard| {
        fits(main_loop, guard, size_bytes)
            && guard.is_dirty(main_loop, size_bytes.saturating_sub(1))
    })
}

/// Starts guarding from now on. Within a success, whether the image will store the guard, if it
/// can store any bitmap.
///
/// # Errors
/// Somebody uses the old guard, or QEMU cannot make one.
pub(super) fn renew(
    main_loop: MainLoop,
    source: Bds,
    target_hash: &str,
    size_bytes: u64,
) -> Result<Result<bool, Error>, Error> {
    let name = name(target_hash);
    let last = size_bytes.saturating_sub(1);
    if let Some(guard) = Bitmap::find(main_loop, source, &name) {
        let stores = Bitmap::are_stored_by(main_loop, source) && !source.is_read_only(main_loop);
        if fits(main_loop, guard, size_bytes) && guard.is_persistent(main_loop) == stores {
            guard.set(main_loop, last, 1);
            return Ok(Ok(stores));
        }
        check_idle(main_loop, source, &[guard])?;
        // What the image has of it is marked as in use, and replaced when the disk is closed.
        guard.release(main_loop)?;
    }
    let granularity = granularity_bytes(size_bytes);
    let storable = Bitmap::is_storable(main_loop, source, granularity, &name);
    let guard = Bitmap::create(main_loop, source, granularity, &name)?;
    guard.set(main_loop, last, 1);
    if matches!(storable, Ok(true)) {
        guard.make_persistent(main_loop);
    }
    Ok(storable)
}
