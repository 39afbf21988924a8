// SPDX-License-Identifier: GPL-2.0-or-later
//! A guest's discards. They are wishes: what the reader still needs is not saved for their sake,
//! they are done later, when the reader has released it, or at the end.

use std::ops::Range;

use crate::engine::{CAPTURING, Engine};
use crate::mask::words;
use crate::range::ByteRange;
use crate::sync::Ordering;
use crate::table::Locked;
use crate::{Errno, OutOfMemory};

/// Smaller fragments of a discard are not passed down on their own: they would cost a request
/// each, and hardly any device gives space back in such units.
const MIN_FRAGMENT_BYTES: u64 = 64 << 10;

/// What to do with a part of a discard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Discard {
    /// Submit it now.
    Pass,
    /// Report success: it is postponed, or not worth a request.
    Skip,
}

impl<T: Send, B: AsRef<[u8]> + AsMut<[u8]> + Send + Sync> Engine<T, B> {
    /// How many bytes from `rest.start` of a guest's discard of `whole_bytes` to treat alike, and
    /// how. Only for devices that do not promise zeroes after a discard.
    ///
    /// # Errors
    /// The disk is smaller than `rest`.
    pub fn next_discard(&self, rest: ByteRange, whole_bytes: u64) -> Result<(u64, Discard), Errno> {
        if self.gate() & CAPTURING == 0 {
            return Ok((rest.len(), Discard::Pass));
        }
        let cover = self.geometry.cover(rest);
        let Some((index, local)) = self.geometry.by_region(cover).next() else {
            return Err(Errno::EIO);
        };
        let Some(region) = self.table.touch_spare(index) else {
            // A wish that cannot be remembered.
            return Ok((rest.len(), Discard::Skip));
        };
        let mut state = region.lock();
        // Under the lock, and before anything is postponed.
        if !self.note_discards() {
            return Ok((rest.len(), Discard::Pass));
        }
        let (passes, run) = first_run(&state, local);
        let len = self.bytes_of(index, run.clone()).end.min(rest.end) - rest.start;
        if passes {
            let fragment = len < MIN_FRAGMENT_BYTES && len < whole_bytes;
            return Ok((len, if fragment { Discard::Skip } else { Discard::Pass }));
        }
        let inner = self.geometry.within(ByteRange::at(rest.start, len));
        for (part, local) in self.geometry.by_region(inner) {
            if part == index {
                self.postpone(&mut state, local);
            }
        }
        Ok((len, Discard::Skip))
    }

    /// Remembers the granules among these that are needed.
    fn postpone(&self, state: &mut Locked<'_, T>, local: Range<u32>) {
        let (before, before_bytes) = (state.postponed.count(), state.variable_bytes());
        for (word, mask) in words(local.clone()) {
            let mut needed = mask & !state.done(word) & !state.kept(word);
            // The list joins runs that touch.
            while needed != 0 {
                let start = needed.trailing_zeros();
                let len = (needed >> start).trailing_ones();
                let first = word as u32 * 64 + start;
                state.postponed.add(first..first + len);
                needed &= u64::MAX.checked_shl(start + len).unwrap_or(0);
            }
        }
        if self.table.book(before_bytes, state.variable_bytes()).is_err() {
            drop(state.postponed.take(&local));
            state.postponed.shrink();
            let _shrinks: Result<(), OutOfMemory> =
                self.table.book(before_bytes, state.variable_bytes());
        }
        self.count_postponed(before, state.postponed.count());
    }

    /// Counts what became of a region's postponed granules.
    pub(crate) fn count_postponed(&self, before: u64, after: u64) {
        let counter = &self.counters.postponed_granules;
        if after >= before {
            counter.fetch_add(after - before, Ordering::Relaxed);
        } else {
            counter.fetch_sub(before - after, Ordering::Relaxed);
        }
    }
}

/// Whether requests to the first granule pass, and the granules from there on for which that is the
/// same.
fn first_run<T>(state: &Locked<'_, T>, local: Range<u32>) -> (bool, Range<u32>) {
    let mut passes = None;
    let mut end = local.start;
    for (word, mask) in words(local.clone()) {
        let done = state.done(word);
        let first = mask.trailing_zeros();
        let passes = *passes.get_or_insert(done & (1 << first) != 0);
        let other = mask & if passes { !done } else { done };
        let base = word as u32 * 64;
        if other != 0 {
            end = base + other.trailing_zeros();
            break;
        }
        end = base + 64 - mask.leading_zeros();
    }
    (passes.unwrap_or(true), local.start..end)
}
