// SPDX-License-Identifier: GPL-2.0-or-later
//! Where the saved data of the granules of one region is: a small hash table.
//!
//! Eight bytes an entry in an open table that is at most 85 % full and grows by a quarter, so about
//! 12 bytes for each granule that is in RAM or in the log. Granules saved as zero have no entry.

use crate::OutOfMemory;

/// Where the old data of a granule is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Location {
    /// In RAM, in this extent.
    Ram(u32),
    /// In the fleecing image, at this position in granules.
    Log(u64),
    /// Nowhere: it could not be read.
    Lost,
}

/// The lower bits of a slot are the location, the others the granule's index in its region.
const KEY_SHIFT: u32 = 48;
const RAM: u64 = 1 << (KEY_SHIFT - 1);
const LOST: u64 = (1 << KEY_SHIFT) - 1;
const EMPTY: u64 = u64::MAX;
const MIN_CAPACITY: usize = 8;

impl Location {
    const fn encode(self) -> u64 {
        match self {
            Self::Ram(extent) => RAM | extent as u64,
            Self::Log(position) => position,
            Self::Lost => LOST,
        }
    }

    fn decode(slot: u64) -> Self {
        match slot & LOST {
            LOST => Self::Lost,
            word if word & RAM != 0 => Self::Ram(word as u32),
            word => Self::Log(word),
        }
    }
}

/// Locations by the granule's index in its region.
#[derive(Debug, Default)]
pub(crate) struct Places {
    slots: Box<[u64]>,
    len: usize,
}

const fn key(slot: u64) -> u32 {
    (slot >> KEY_SHIFT) as u32
}

impl Places {
    /// RAM in use, in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        size_of_val(&*self.slots) as u64
    }

    /// The slot where the search for `index` begins. Multiplication spreads neighbours.
    fn home(&self, index: u32) -> usize {
        let hash = index.wrapping_mul(0x9E37_79B9);
        ((u64::from(hash) * self.slots.len() as u64) >> 32) as usize
    }

    fn after(&self, at: usize) -> usize {
        if at + 1 == self.slots.len() { 0 } else { at + 1 }
    }

    fn find(&self, index: u32) -> Option<usize> {
        if self.len == 0 {
            return None;
        }
        let mut at = self.home(index);
        // Ends: the table is never full.
        loop {
            match self.slots[at] {
                EMPTY => return None,
                slot if key(slot) == index => return Some(at),
                _ => at = self.after(at),
            }
        }
    }

    pub(crate) fn get(&self, index: u32) -> Option<Location> {
        self.find(index).map(|at| Location::decode(self.slots[at]))
    }

    /// Changes the location of a granule that has one.
    pub(crate) fn replace(&mut self, index: u32, location: Location) {
        if let Some(at) = self.find(index) {
            self.slots[at] = u64::from(index) << KEY_SHIFT | location.encode();
        }
    }

    /// Makes room for `more` entries, so that [`Places::insert`] cannot fail.
    ///
    /// # Errors
    /// No memory; nothing has changed.
    pub(crate) fn reserve(&mut self, more: usize) -> Result<(), OutOfMemory> {
        let needed = self.len + more;
        if needed * 20 <= self.slots.len() * 17 {
            return Ok(());
        }
        let capacity = (self.slots.len() * 5 / 4).max(needed * 20 / 17 + 1).max(MIN_CAPACITY);
        self.rebuild(capacity)
    }

    fn rebuild(&mut self, capacity: usize) -> Result<(), OutOfMemory> {
        let mut slots: Vec<u64> = Vec::new();
        slots.try_reserve_exact(capacity).map_err(|_| OutOfMemory)?;
        slots.resize(capacity, EMPTY);
        let old = std::mem::replace(&mut self.slots, slots.into_boxed_slice());
        for &slot in old.iter().filter(|&&slot| slot != EMPTY) {
            self.put(slot);
        }
        Ok(())
    }

    fn put(&mut self, slot: u64) {
        let mut at = self.home(key(slot));
        while self.slots[at] != EMPTY {
            at = self.after(at);
        }
        self.slots[at] = slot;
    }

    /// Adds a granule that has no location, after [`Places::reserve`].
    pub(crate) fn insert(&mut self, index: u32, location: Location) {
        self.len += 1;
        self.put(u64::from(index) << KEY_SHIFT | location.encode());
    }

    /// Takes a granule's location out. Later entries of its run move up, so that no marks of
    /// deleted ones are needed.
    pub(crate) fn remove(&mut self, index: u32) -> Option<Location> {
        let mut hole = self.find(index)?;
        let location = Location::decode(self.slots[hole]);
        let capacity = self.slots.len();
        let distance = |from: usize, to: usize| (to + capacity - from) % capacity;
        let mut at = self.after(hole);
        while self.slots[at] != EMPTY {
            if distance(self.home(key(self.slots[at])), at) >= distance(hole, at) {
                self.slots[hole] = self.slots[at];
                hole = at;
            }
            at = self.after(at);
        }
        self.slots[hole] = EMPTY;
        self.len -= 1;
        if self.len == 0 {
            self.slots = Box::default();
        } else if self.len * 2 < capacity && capacity > MIN_CAPACITY {
            // Without memory it just stays as large as it is.
            let _ = self.rebuild((self.len * 3 / 2 + 1).max(MIN_CAPACITY));
        }
        Some(location)
    }
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use super::{Location, Places};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use std::collections::BTreeMap;

    #[test]
    fn behaves_like_a_map() {
        let mut rng = StdRng::seed_from_u64(3);
        let mut places = Places::default();
        let mut model = BTreeMap::new();
        for round in 0..40_000_u32 {
            let index = rng.random_range(0..3000);
            // Fills up first, empties afterwards.
            let fill = if round < 20_000 { 4 } else { 1 };
            if rng.random_ratio(fill, 5) {
                let location = match model.get(&index) {
                    Some(_) => {
                        places.replace(index, Location::Log(u64::from(round)));
                        Location::Log(u64::from(round))
                    }
                    None => {
                        places.reserve(1).unwrap();
                        places.insert(index, Location::Ram(round));
                        Location::Ram(round)
                    }
                };
                model.insert(index, location);
            } else {
                assert_eq!(places.remove(index), model.remove(&index));
            }
            let probe = rng.random_range(0..3000);
            assert_eq!(places.get(probe), model.get(&probe).copied());
        }
    }

    #[test]
    fn an_entry_costs_about_twelve_bytes() {
        let mut places = Places::default();
        for index in 0..16384 {
            places.reserve(1).unwrap();
            places.insert(index, Location::Log(u64::from(index)));
            if index >= 64 {
                let limit = u64::from(index + 1) * 12 + 64;
                assert!(places.bytes() <= limit, "{} entries: {}", index + 1, places.bytes());
            }
        }
        for index in 0..16384 {
            places.remove(index);
        }
        assert_eq!(places.bytes(), 0);
    }

    #[test]
    fn lost_is_told_from_the_last_extent_and_position() {
        let mut places = Places::default();
        places.reserve(3).unwrap();
        places.insert(0, Location::Lost);
        places.insert(1, Location::Ram(u32::MAX - 1));
        places.insert(2, Location::Log((1 << 47) - 1));
        assert_eq!(places.get(0), Some(Location::Lost));
        assert_eq!(places.get(1), Some(Location::Ram(u32::MAX - 1)));
        assert_eq!(places.get(2), Some(Location::Log((1 << 47) - 1)));
    }
}
