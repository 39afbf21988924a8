// SPDX-License-Identifier: GPL-2.0-or-later
//! The state of every granule, in two levels: an area nobody touched costs almost nothing.

use crate::range::Geometry;
use crate::{ByteRange, NeedMap, OutOfMemory};

/// State of one granule; see the drawing in the crate's documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Granule {
    /// The old data is in the source only.
    Needed,
    /// A guest request reads the old data now.
    Reading,
    /// The old data is in RAM, in this extent.
    Ram(u32),
    /// The old data is in the fleecing image, at this position in granules.
    Log(u32),
    /// The old data was zero.
    Zero,
    /// Not in the dirty bitmap.
    Clean,
    /// Released by the reader.
    Released,
    /// The old data could not be read.
    Lost,
}

const NEEDED: u32 = 0;
const READING: u32 = 1;
const ZERO: u32 = 2;
const CLEAN: u32 = 3;
const RELEASED: u32 = 4;
const LOST: u32 = 5;
const RAM: u32 = 1 << 30;
const LOG: u32 = 1 << 31;

impl Granule {
    const fn encode(self) -> u32 {
        match self {
            Self::Needed => NEEDED,
            Self::Reading => READING,
            Self::Zero => ZERO,
            Self::Clean => CLEAN,
            Self::Released => RELEASED,
            Self::Lost => LOST,
            Self::Ram(extent) => RAM | extent,
            Self::Log(position) => LOG | position,
        }
    }

    fn decode(word: u32) -> Self {
        match word {
            NEEDED => Self::Needed,
            READING => Self::Reading,
            ZERO => Self::Zero,
            CLEAN => Self::Clean,
            RELEASED => Self::Released,
            LOST => Self::Lost,
            _ if word & LOG != 0 => Self::Log(word & !LOG),
            _ => Self::Ram(word & !RAM),
        }
    }
}

/// Granules in one region.
const REGION: u64 = 1024;

/// One region: uniform until something in it changes.
enum Region {
    /// Nobody looked yet: needed, or what the need map says.
    Untouched,
    /// Wholly outside the dirty bitmap.
    Clean,
    /// Wholly released.
    Released,
    /// One word for each granule; `released` counts those that are.
    Table { words: Box<[u32]>, released: u32 },
}

/// The states of all granules.
pub(crate) struct Table {
    geometry: Geometry,
    regions: Vec<Region>,
    need: Option<Box<dyn NeedMap>>,
    tables: u64,
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Table")
            .field("geometry", &self.geometry)
            .field("tables", &self.tables)
            .finish()
    }
}

impl Table {
    /// A table in which nothing is touched; `need` limits what is needed at all.
    pub(crate) fn new(
        geometry: Geometry,
        need: Option<Box<dyn NeedMap>>,
    ) -> Result<Self, OutOfMemory> {
        let count = geometry.count().div_ceil(REGION) as usize;
        let mut regions = Vec::new();
        regions.try_reserve_exact(count).map_err(|_| OutOfMemory)?;
        regions.resize_with(count, || Region::Untouched);
        Ok(Self { geometry, regions, need, tables: 0 })
    }

    /// RAM in use, in bytes.
    pub(crate) fn metadata_bytes(&self) -> u64 {
        self.regions.len() as u64 * size_of::<Region>() as u64 + self.tables * REGION * 4
    }

    /// State of one granule.
    pub(crate) fn get(&self, granule: u64) -> Granule {
        match &self.regions[(granule / REGION) as usize] {
            Region::Untouched => match &self.need {
                None => Granule::Needed,
                Some(need) => initial(self.geometry, need.as_ref(), granule),
            },
            Region::Clean => Granule::Clean,
            Region::Released => Granule::Released,
            Region::Table { words, .. } => Granule::decode(words[(granule % REGION) as usize]),
        }
    }

    /// Changes the state of one granule. `Released` is final.
    pub(crate) fn set(&mut self, granule: u64, state: Granule) -> Result<(), OutOfMemory> {
        let index = (granule / REGION) as usize;
        self.materialise(index)?;
        let in_region = (self.geometry.count() - index as u64 * REGION).min(REGION);
        let Region::Table { words, released } = &mut self.regions[index] else {
            // Uniformly clean or released: such granules never change, but for a clean one that
            // the reader releases, which stays unreadable either way.
            return Ok(());
        };
        let word = &mut words[(granule % REGION) as usize];
        if *word == RELEASED {
            return Ok(());
        }
        *word = state.encode();
        if state == Granule::Released {
            *released += 1;
            if u64::from(*released) == in_region {
                self.regions[index] = Region::Released;
                self.tables -= 1;
            }
        }
        Ok(())
    }

    /// Releases a whole untouched region at once; false when `granules` does not cover it or it is
    /// not untouched.
    pub(crate) fn release_region(
        &mut self,
        granules: &std::ops::Range<u64>,
        at: u64,
    ) -> Option<u64> {
        let first = at / REGION * REGION;
        let end = (first + REGION).min(self.geometry.count());
        if at != first || granules.start > first || granules.end < end || self.need.is_some() {
            return None;
        }
        let region = &mut self.regions[(at / REGION) as usize];
        if !matches!(region, Region::Untouched) {
            return None;
        }
        *region = Region::Released;
        Some(end)
    }

    /// How many granules from `granule`, at most `limit`, are surely in the same state because
    /// their regions are uniform; at least one.
    pub(crate) fn uniform_run(&self, granule: u64, limit: u64) -> u64 {
        let rest = (REGION - granule % REGION).min(limit).max(1);
        match (&self.regions[(granule / REGION) as usize], &self.need) {
            (Region::Untouched, Some(need)) => self.untouched_run(need.as_ref(), granule, rest),
            (Region::Untouched, None) | (Region::Clean | Region::Released, _) => rest,
            (Region::Table { .. }, _) => 1,
        }
    }

    /// One question to the need map for the whole run.
    fn untouched_run(&self, need: &dyn NeedMap, granule: u64, rest: u64) -> u64 {
        let area = self.geometry.bytes(granule..granule + rest);
        let run = match need.next_needed(area.start, area.end) {
            None => rest,
            Some(needed) => {
                let cover = self.geometry.cover(ByteRange { start: needed.start, end: needed.end });
                let end = if cover.start > granule { cover.start } else { cover.end };
                end - granule
            }
        };
        run.clamp(1, rest)
    }

    fn materialise(&mut self, index: usize) -> Result<(), OutOfMemory> {
        if !matches!(self.regions[index], Region::Untouched) {
            return Ok(());
        }
        let mut words: Vec<u32> = Vec::new();
        words.try_reserve_exact(REGION as usize).map_err(|_| OutOfMemory)?;
        words.resize(REGION as usize, NEEDED);
        if let Some(need) = &self.need {
            words.fill(CLEAN);
            let first = index as u64 * REGION;
            let area = self.geometry.bytes(first..(first + REGION).min(self.geometry.count()));
            let mut any = false;
            let mut at = area.start;
            while let Some(needed) = need.next_needed(at, area.end) {
                for granule in
                    self.geometry.cover(ByteRange { start: needed.start, end: needed.end })
                {
                    words[(granule - first) as usize] = NEEDED;
                }
                any = true;
                at = needed.end.max(at + 1);
            }
            if !any {
                self.regions[index] = Region::Clean;
                return Ok(());
            }
        }
        self.tables += 1;
        self.regions[index] = Region::Table { words: words.into_boxed_slice(), released: 0 };
        Ok(())
    }
}

fn initial(geometry: Geometry, need: &dyn NeedMap, granule: u64) -> Granule {
    let area = geometry.bytes(granule..granule + 1);
    match need.next_needed(area.start, area.end) {
        Some(_) => Granule::Needed,
        None => Granule::Clean,
    }
}
