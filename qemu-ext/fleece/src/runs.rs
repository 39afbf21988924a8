// SPDX-License-Identifier: GPL-2.0-or-later
//! Which slots of a buffer's memory are free: runs of 4 KiB slots in chunks of 1 MiB, so that the
//! data of one capture is contiguous. Only numbers; the memory itself belongs to who uses this.

/// Slots of one chunk.
const SLOTS: usize = 256;

#[derive(Debug, Clone, Copy)]
struct Chunk {
    /// A bit for each free slot.
    free: [u64; SLOTS / 64],
    count: u32,
}

/// Free runs of slots.
#[derive(Debug)]
pub struct Runs {
    chunks: Vec<Chunk>,
    limit: usize,
    cursor: usize,
}

impl Runs {
    /// Slots of one chunk.
    pub const CHUNK_SLOTS: usize = SLOTS;

    /// At most `limit_chunks` chunks; none is in use yet.
    #[must_use]
    pub const fn new(limit_chunks: usize) -> Self {
        Self { chunks: Vec::new(), limit: limit_chunks, cursor: 0 }
    }

    /// A free run of `count` slots (1 to [`Runs::CHUNK_SLOTS`]): its chunk and first slot. The
    /// chunk is the next new one if no other has such a run; none at the limit.
    pub fn take(&mut self, count: usize) -> Option<(usize, usize)> {
        if count == 0 || count > SLOTS {
            return None;
        }
        let chunks = self.chunks.len();
        for nth in 0..chunks {
            let index = (self.cursor + nth) % chunks;
            let chunk = &mut self.chunks[index];
            if chunk.count as usize >= count
                && let Some(slot) = find(&chunk.free, count)
            {
                chunk.take(slot, count);
                self.cursor = index;
                return Some((index, slot));
            }
        }
        if chunks >= self.limit || self.chunks.try_reserve(1).is_err() {
            return None;
        }
        let mut chunk = Chunk { free: [u64::MAX; SLOTS / 64], count: SLOTS as u32 };
        chunk.take(0, count);
        self.chunks.push(chunk);
        self.cursor = chunks;
        Some((chunks, 0))
    }

    /// Gives a run back.
    pub fn give_back(&mut self, chunk: usize, slot: usize, count: usize) {
        let Some(chunk) = self.chunks.get_mut(chunk) else { return };
        for at in slot..slot + count {
            chunk.free[at / 64] |= 1 << (at % 64);
        }
        chunk.count += count as u32;
    }
}

impl Chunk {
    fn take(&mut self, slot: usize, count: usize) {
        for at in slot..slot + count {
            self.free[at / 64] &= !(1 << (at % 64));
        }
        self.count -= count as u32;
    }
}

/// The first slot at or after `from` whose bit is `wanted`.
fn next(free: &[u64; SLOTS / 64], from: usize, wanted: bool) -> usize {
    let mut at = from;
    while at < SLOTS {
        let word = if wanted { free[at / 64] } else { !free[at / 64] };
        let rest = word >> (at % 64);
        if rest != 0 {
            return at + rest.trailing_zeros() as usize;
        }
        at = (at / 64 + 1) * 64;
    }
    SLOTS
}

fn find(free: &[u64; SLOTS / 64], count: usize) -> Option<usize> {
    let mut at = next(free, 0, true);
    while at + count <= SLOTS {
        let end = next(free, at, false);
        if end - at >= count {
            return Some(at);
        }
        at = next(free, end, true);
    }
    None
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use super::{Runs, SLOTS};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use std::collections::BTreeSet;

    #[test]
    fn runs_never_overlap_and_all_come_back() {
        let mut rng = StdRng::seed_from_u64(9);
        let mut runs = Runs::new(4);
        let mut taken: Vec<(usize, usize, usize)> = Vec::new();
        let mut used = BTreeSet::new();
        for _ in 0..20_000 {
            let count = if rng.random_ratio(1, 10) { rng.random_range(1..=SLOTS) } else { 1 };
            if rng.random_ratio(11, 20) {
                if let Some((chunk, slot)) = runs.take(count) {
                    assert!(chunk < 4 && slot + count <= SLOTS);
                    for at in slot..slot + count {
                        assert!(used.insert((chunk, at)));
                    }
                    taken.push((chunk, slot, count));
                }
            } else if !taken.is_empty() {
                let (chunk, slot, count) = taken.swap_remove(rng.random_range(0..taken.len()));
                runs.give_back(chunk, slot, count);
                (slot..slot + count).for_each(|at| assert!(used.remove(&(chunk, at))));
            }
        }
        for (chunk, slot, count) in taken {
            runs.give_back(chunk, slot, count);
        }
        for _ in 0..4 {
            assert!(runs.take(SLOTS).is_some());
        }
        assert_eq!(runs.take(1), None);
    }
}
