// SPDX-License-Identifier: GPL-2.0-or-later
//! The state of every granule, in regions that are allocated when first touched.
//!
//! Two bits a granule. `done` says that a guest request needs to do nothing; it is read without a
//! lock, one load for 64 granules. `kept` is under the region's lock and tells the rest:
//!
//! ```text
//!   done kept
//!    0    0    Needed: the old data is in the source only
//!    0    1    Reading: a guest request saves it now (or a postponed discard is being done)
//!    1    1    saved: `places` says where; without an entry there it was zero
//!    1    0    gone: outside the dirty bitmap, or released
//! ```
//!
//! `done` is never taken back; a region is never freed before the table.

use std::ops::{ControlFlow, Range};

use crate::mask::words;
use crate::places::{Location, Places};
use crate::range::{ByteRange, Geometry, REGION_GRANULES};
use crate::spans::{Separate, Spans};
use crate::sync::{AtomicBool, AtomicU64, Mutex, MutexGuard, Ordering, Place};
use crate::{NeedMap, OutOfMemory};

const WORDS: usize = (REGION_GRANULES / 64) as usize;

/// State of one granule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Granule {
    /// The old data is in the source; nobody has overwritten it.
    Source,
    /// The old data is in RAM, in this extent.
    Ram(u32),
    /// The old data is in the fleecing image, at this position in granules.
    Log(u64),
    /// The old data was zero.
    Zero,
    /// Not in the dirty bitmap, or released.
    Gone,
    /// The old data could not be read.
    Lost,
}

/// The states of [`REGION_GRANULES`] granules.
pub(crate) struct Region<T> {
    done: Box<[AtomicU64]>,
    state: Mutex<RegionState<T>>,
}

/// What of a region is under its lock.
pub(crate) struct RegionState<T> {
    kept: Box<[u64]>,
    pub(crate) places: Places,
    /// Who waits for a capture, or a discard, in this region to end.
    pub(crate) waiters: Vec<T>,
    /// Guest discards that are done when the reader has released what they are about. All of them
    /// are of needed granules.
    pub(crate) postponed: Spans,
    /// Those that are being done now; their granules are gone for readers, and guest requests wait.
    pub(crate) discarding: Separate,
}

/// A region, locked.
pub(crate) struct Locked<'a, T> {
    done: &'a [AtomicU64],
    state: MutexGuard<'a, RegionState<T>>,
}

impl<T> std::ops::Deref for Locked<'_, T> {
    type Target = RegionState<T>;
    fn deref(&self) -> &RegionState<T> {
        &self.state
    }
}

impl<T> std::ops::DerefMut for Locked<'_, T> {
    fn deref_mut(&mut self) -> &mut RegionState<T> {
        &mut self.state
    }
}

impl<T> Region<T> {
    fn new() -> Result<Box<Self>, OutOfMemory> {
        let mut done = Vec::new();
        done.try_reserve_exact(WORDS).map_err(|_| OutOfMemory)?;
        done.resize_with(WORDS, || AtomicU64::new(0));
        let mut kept = Vec::new();
        kept.try_reserve_exact(WORDS).map_err(|_| OutOfMemory)?;
        kept.resize(WORDS, 0);
        let state = RegionState {
            kept: kept.into_boxed_slice(),
            places: Places::default(),
            waiters: Vec::new(),
            postponed: Spans::default(),
            discarding: Separate::default(),
        };
        Ok(Box::new(Self { done: done.into_boxed_slice(), state: Mutex::new(state) }))
    }

    /// Whether guest requests on these granules need to do nothing. Takes no lock.
    pub(crate) fn passes(&self, local: Range<u32>) -> bool {
        words(local).all(|(word, bits)| self.done[word].load(Ordering::Acquire) & bits == bits)
    }

    pub(crate) fn lock(&self) -> Locked<'_, T> {
        Locked { done: &self.done, state: self.state.lock() }
    }
}

impl<T> Locked<'_, T> {
    /// The `done` bits of a word.
    pub(crate) fn done(&self, word: usize) -> u64 {
        // Written under this lock only.
        self.done[word].load(Ordering::Relaxed)
    }

    /// The `kept` bits of a word.
    pub(crate) fn kept(&self, word: usize) -> u64 {
        self.state.kept[word]
    }

    /// Marks granules as being read by the caller.
    pub(crate) fn begin_reading(&mut self, word: usize, bits: u64) {
        self.state.kept[word] |= bits;
    }

    /// Undoes [`Locked::begin_reading`]: they are needed again.
    pub(crate) fn abandon_reading(&mut self, word: usize, bits: u64) {
        self.state.kept[word] &= !bits;
    }

    /// Publishes saved granules: requests to them pass from now on.
    pub(crate) fn finish_reading(&mut self, word: usize, bits: u64) {
        self.done[word].fetch_or(bits, Ordering::Release);
    }

    /// Marks granules as gone.
    pub(crate) fn finish_gone(&mut self, word: usize, bits: u64) {
        self.state.kept[word] &= !bits;
        self.done[word].fetch_or(bits, Ordering::Release);
    }

    /// State of one granule as a reader sees it.
    pub(crate) fn granule(&self, local: u32) -> Granule {
        let (word, bit) = (local as usize / 64, 1 << (local % 64));
        match (self.done(word) & bit != 0, self.kept(word) & bit != 0) {
            (false, true) if self.discarding.contains(local) => Granule::Gone,
            (false, _) => Granule::Source,
            (true, false) => Granule::Gone,
            (true, true) => match self.places.get(local) {
                None => Granule::Zero,
                Some(Location::Ram(extent)) => Granule::Ram(extent),
                Some(Location::Log(position)) => Granule::Log(position),
                Some(Location::Lost) => Granule::Lost,
            },
        }
    }

    /// RAM of the parts of a region whose size changes.
    pub(crate) fn variable_bytes(&self) -> u64 {
        self.places.bytes() + self.postponed.bytes() + self.discarding.bytes()
    }
}

/// The states of all granules.
pub(crate) struct Table<T: 'static> {
    geometry: Geometry,
    regions: Vec<Place<Region<T>>>,
    need: Option<Box<dyn NeedMap>>,
    metadata: AtomicU64,
    metadata_limit: u64,
    limit_was_hit: AtomicBool,
}

/// RAM of one region beside its variable parts.
const REGION_BYTES: u64 = (2 * WORDS * size_of::<u64>()) as u64 + 160;

impl<T> Table<T> {
    /// A table in which nothing is touched; `need` limits what is needed at all.
    pub(crate) fn new(
        geometry: Geometry,
        need: Option<Box<dyn NeedMap>>,
        metadata_limit: u64,
    ) -> Result<Self, OutOfMemory> {
        let count = geometry.count().div_ceil(REGION_GRANULES) as usize;
        let mut regions = Vec::new();
        regions.try_reserve_exact(count).map_err(|_| OutOfMemory)?;
        regions.resize_with(count, Place::empty);
        let root = (count * size_of::<Place<Region<T>>>()) as u64;
        Ok(Self {
            geometry,
            regions,
            need,
            metadata: AtomicU64::new(root),
            metadata_limit,
            limit_was_hit: AtomicBool::new(false),
        })
    }

    /// RAM in use, in bytes.
    pub(crate) fn metadata_bytes(&self) -> u64 {
        self.metadata.load(Ordering::Relaxed)
    }

    /// Books a change of a region's variable parts.
    ///
    /// # Errors
    /// The limit is exceeded.
    pub(crate) fn book(&self, before: u64, after: u64) -> Result<(), OutOfMemory> {
        if after < before {
            self.metadata.fetch_sub(before - after, Ordering::Relaxed);
            return Ok(());
        }
        let more = after - before;
        let total = self.metadata.fetch_add(more, Ordering::Relaxed) + more;
        if more == 0 || total <= self.metadata_limit {
            return Ok(());
        }
        self.limit_was_hit.store(true, Ordering::Relaxed);
        Err(OutOfMemory)
    }

    /// Whether something failed because of the limit, and the limit.
    pub(crate) fn hit_limit(&self) -> Option<u64> {
        self.limit_was_hit.load(Ordering::Relaxed).then_some(self.metadata_limit)
    }

    /// Whether a guest request on these granules of one piece needs to do nothing. No lock.
    pub(crate) fn passes(&self, granules: &Range<u64>) -> bool {
        if granules.is_empty() {
            return true;
        }
        let region = granules.start / REGION_GRANULES;
        let first = region * REGION_GRANULES;
        self.regions[region as usize].get().is_some_and(|region| {
            region.passes((granules.start - first) as u32..(granules.end - first) as u32)
        })
    }

    /// A region that somebody touched.
    pub(crate) fn region(&self, index: usize) -> Option<&Region<T>> {
        self.regions.get(index)?.get()
    }

    /// All regions that somebody touched.
    pub(crate) fn touched(&self) -> impl Iterator<Item = (usize, &Region<T>)> {
        self.regions
            .iter()
            .enumerate()
            .filter_map(|(index, place)| place.get().map(|region| (index, region)))
    }

    /// Calls `visit` with what is needed, [`Granule::Source`], and what is not, [`Granule::Gone`], of these granules of
    /// a region that nobody touched.
    pub(crate) fn each_untouched_run(
        &self,
        index: usize,
        local: Range<u32>,
        mut visit: impl FnMut(Range<u32>, Granule) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let Some(need) = &self.need else { return visit(local, Granule::Source) };
        let first = index as u64 * REGION_GRANULES;
        let area =
            self.geometry.bytes(first + u64::from(local.start)..first + u64::from(local.end));
        let (mut told, mut at) = (local.start, area.start);
        while let Some(needed) = need.next_needed(at, area.end) {
            let cover = self.geometry.cover(ByteRange { start: needed.start, end: needed.end });
            let start = ((cover.start - first) as u32).max(told);
            let end = (cover.end - first) as u32;
            if told < start {
                visit(told..start, Granule::Gone)?;
            }
            if start < end {
                visit(start..end, Granule::Source)?;
                told = end;
            }
            at = needed.end.max(at + 1);
        }
        if told < local.end {
            visit(told..local.end, Granule::Gone)?;
        }
        ControlFlow::Continue(())
    }

    /// A region, allocated if nobody touched it before.
    ///
    /// # Errors
    /// There is no memory, or the limit is reached.
    pub(crate) fn touch(&self, index: usize) -> Result<&Region<T>, OutOfMemory> {
        let place = &self.regions[index];
        if let Some(region) = place.get() {
            return Ok(region);
        }
        let region = Region::new()?;
        self.fill_from_need(index, &region);
        let booked = self.book(0, REGION_BYTES);
        if booked.is_err() || !place.fill(region) {
            let _ = self.book(REGION_BYTES, 0);
        }
        booked?;
        place.get().ok_or(OutOfMemory)
    }

    /// A region for notes that can be done without. A new one only while half of the limit is left: the rest is for
    /// captures, which cannot.
    pub(crate) fn touch_spare(&self, index: usize) -> Option<&Region<T>> {
        if self.region(index).is_none() && self.metadata_bytes() >= self.metadata_limit / 2 {
            return None;
        }
        self.touch(index).ok()
    }

    /// Marks what is outside the dirty bitmap as gone.
    fn fill_from_need(&self, index: usize, region: &Region<T>) {
        if self.need.is_none() {
            return;
        }
        let mut region = region.lock();
        let count = self.geometry.count() - index as u64 * REGION_GRANULES;
        let _whole =
            self.each_untouched_run(index, 0..count.min(REGION_GRANULES) as u32, |run, granule| {
                if granule == Granule::Gone {
                    words(run).for_each(|(word, bits)| region.finish_gone(word, bits));
                }
                ControlFlow::Continue(())
            });
    }
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use super::{Granule, REGION_BYTES, Region, Table};
    use crate::NeedMap;
    use crate::range::{Geometry, REGION_GRANULES};
    use rand::rngs::StdRng;
    use rand::{Rng as _, SeedableRng as _};
    use std::ops::{ControlFlow, Range};

    struct Areas(Vec<Range<u64>>);

    impl NeedMap for Areas {
        fn next_needed(&self, start: u64, end: u64) -> Option<Range<u64>> {
            let area = self.0.iter().find(|area| area.end > start && area.start < end)?;
            Some(area.start.max(start)..area.end.min(end))
        }
    }

    #[test]
    fn only_what_the_bitmap_marks_is_needed() {
        let geometry = Geometry::new(100 << 20, 512).unwrap();
        let need = Areas(vec![4096..12288, (65 << 20)..(65 << 20) + 512]);
        let table: Table<()> = Table::new(geometry, Some(Box::new(need)), u64::MAX).unwrap();
        let states = |index: usize, local| table.touch(index).unwrap().lock().granule(local);
        assert_eq!(states(0, 0), Granule::Gone);
        assert_eq!(states(0, 1), Granule::Source);
        assert_eq!(states(0, 2), Granule::Source);
        assert_eq!(states(0, 3), Granule::Gone);
        assert_eq!(states(1, 256), Granule::Source);
        assert_eq!(states(1, 257), Granule::Gone);
        assert!(table.passes(&(0..1)) && !table.passes(&(0..2)));
    }

    #[test]
    fn a_region_that_nobody_touched_reads_like_one_that_was() {
        let mut rng = StdRng::seed_from_u64(3);
        for granule in [512, 4096] {
            for _ in 0..50 {
                let geometry = Geometry::new((100 << 20) + 512, granule).unwrap();
                let mut at = 0;
                let areas = core::iter::from_fn(|| {
                    let start = at + rng.random_range(0..(8_u64 << 20)) / 512 * 512;
                    at = start + rng.random_range(1..4096_u64) * 512;
                    (at < 100 << 20).then_some(start..at)
                });
                let areas: Vec<Range<u64>> = areas.collect();
                let need = Box::new(Areas(areas.clone()));
                let table: Table<()> = Table::new(geometry, Some(need), u64::MAX).unwrap();
                for (index, all) in geometry.by_region(0..geometry.count()) {
                    let local = rng.random_range(all.clone());
                    let local = local..rng.random_range(local + 1..=all.end);
                    let mut told = Vec::new();
                    let visit = |run: Range<u32>, granule| {
                        told.extend(run.map(|at| (at, granule)));
                        ControlFlow::Continue(())
                    };
                    assert!(table.each_untouched_run(index, local.clone(), visit).is_continue());
                    let region = table.touch(index).unwrap().lock();
                    let noted: Vec<_> = local.map(|at| (at, region.granule(at))).collect();
                    assert!(told == noted, "region {index} with granules of {granule}");
                    for (at, state) in told {
                        let number = index as u64 * REGION_GRANULES + u64::from(at);
                        let bytes = geometry.bytes(number..number + 1);
                        let touches =
                            |area: &Range<u64>| area.start < bytes.end && bytes.start < area.end;
                        assert_eq!(state == Granule::Source, areas.iter().any(touches), "{number}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_touched_tebibyte_costs_at_most_68_mib() {
        let geometry = Geometry::new(1 << 40, 512).unwrap();
        let table: Table<()> = Table::new(geometry, None, u64::MAX).unwrap();
        assert!(table.metadata_bytes() <= 1 << 18, "untouched: {}", table.metadata_bytes());
        let regions = geometry.count() / REGION_GRANULES;
        let total = table.metadata_bytes() + regions * REGION_BYTES;
        assert!(total <= 68 << 20, "touched: {total}");
        // What is booked is what is used.
        assert!(size_of::<Region<usize>>() + 32 <= 160 + 48);
    }

    #[test]
    fn the_limit_is_kept() {
        let geometry = Geometry::new(1 << 30, 512).unwrap();
        let table: Table<()> = Table::new(geometry, None, 3 * REGION_BYTES).unwrap();
        assert!(table.touch(0).is_ok() && table.touch(1).is_ok());
        assert!(table.touch(2).is_err());
        assert!(table.touch(0).is_ok());
    }
}
