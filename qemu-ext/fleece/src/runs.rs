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
    memory: Memory,
}

/// Whether there may be memory behind a chunk that is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Memory {
    /// None, as far as it is free.
    None,
    /// It was used since the last look.
    Used,
    /// It was free at the last look, at the last two.
    Resting,
    Idle,
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
        let mut chunk = Chunk::new();
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

    /// To be called now and then: what is free at two calls in a row is idle.
    pub fn look_for_idle(&mut self) {
        for chunk in self.chunks.iter_mut().filter(|chunk| chunk.count as usize == SLOTS) {
            chunk.memory = match chunk.memory {
                Memory::Used => Memory::Resting,
                Memory::Resting => Memory::Idle,
                same => same,
            };
        }
    }

    /// Takes the first idle chunk from `from` on, whole. Its memory can be given back to the system, then the chunk with
    /// [`Runs::emptied`].
    pub fn take_idle(&mut self, from: usize) -> Option<usize> {
        let mut chunks = self.chunks.iter_mut().enumerate().skip(from);
        let (index, chunk) = chunks.find(|(_, chunk)| chunk.memory == Memory::Idle)?;
        chunk.take(0, SLOTS);
        Some(index)
    }

    /// Gives a whole chunk back that has no memory now.
    pub fn emptied(&mut self, chunk: usize) {
        if let Some(chunk) = self.chunks.get_mut(chunk) {
            *chunk = Chunk::new();
        }
    }
}

impl Chunk {
    const fn new() -> Self {
        Self { free: [u64::MAX; SLOTS / 64], count: SLOTS as u32, memory: Memory::None }
    }

    fn take(&mut self, slot: usize, count: usize) {
        self.memory = Memory::Used;
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
    fn memory_is_idle_when_it_was_free_at_two_looks_in_a_row() {
        let mut runs = Runs::new(3);
        let first = runs.take(SLOTS).unwrap();
        let second = runs.take(SLOTS).unwrap();
        runs.give_back(first.0, 0, SLOTS);
        runs.look_for_idle();
        assert_eq!(runs.take_idle(0), None, "used since the last look");
        runs.look_for_idle();
        assert_eq!(runs.take_idle(0), Some(first.0));
        assert_ne!(runs.take(1).unwrap().0, first.0, "it is taken");
        runs.emptied(first.0);
        runs.give_back(second.0, 0, SLOTS);
        runs.look_for_idle();
        assert_eq!(runs.take_idle(0), None, "one has no memory any more");
        assert_eq!(runs.take(SLOTS), Some((first.0, 0)), "it is free again");
        runs.give_back(first.0, 0, SLOTS);
        runs.look_for_idle();
        assert_eq!(runs.take_idle(0), Some(second.0), "only that was free all the time");
        assert_eq!(runs.take_idle(second.0), None);
    }

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
