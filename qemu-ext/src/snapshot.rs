// SPDX-License-Identifier: GPL-2.0-or-later
//! The snapshot node: what a backup client sees, exported by the caller.
//!
//! Its C callbacks are in `qemu/driver.rs`. Its link to the filter stays at its node whatever a
//! block job inserts, because a moved link would read new data with success.

use fleece::{ByteRange, Errno};

use crate::filter::Filter;
use crate::qemu::coroutine::CoGraph;
use crate::qemu::iovec::IoSlice;

/// Request alignment of the snapshot node in bytes: a disk's size is a multiple of it.
pub(crate) const ALIGNMENT: u64 = 512;

/// Reads the content at the point in time.
pub(crate) fn read(
    filter: &Filter,
    graph: &CoGraph<'_>,
    range: ByteRange,
    buf: &mut IoSlice,
) -> Result<(), Errno> {
    filter.for_reader(graph, |engine, io| engine.read(io, range, buf))
}

/// Whether the snapshot is zero from `range.start`, and for how many bytes the answer holds.
pub(crate) fn is_zero(
    filter: &Filter,
    graph: &CoGraph<'_>,
    range: ByteRange,
) -> Result<(u64, bool), Errno> {
    let (len, zero) = filter.for_reader(graph, |engine, io| engine.is_zero(io, range))?;
    if len == range.len() || len.is_multiple_of(ALIGNMENT) {
        return Ok((len, zero));
    }
    // The source may answer in bytes; the block layer wants whole sectors here.
    match len / ALIGNMENT * ALIGNMENT {
        0 => Ok((ALIGNMENT.min(range.len()), false)),
        whole => Ok((whole, zero)),
    }
}

/// Releases what the client has stored.
pub(crate) fn release(filter: &Filter, graph: &CoGraph<'_>, range: ByteRange) -> Result<(), Errno> {
    filter.for_reader(graph, |engine, io| {
        engine.release(io, range);
        Ok(())
    })
}
