// SPDX-License-Identifier: GPL-2.0-or-later
//! Space of the fleecing image, used as a log.
//!
//! A position is given out once and never again, so a read of it can never meet other data. Each
//! granule is captured at most once, so the log never outgrows an image as large as the disk. A
//! segment in which nothing is live any more is given back; what is being written is live.

use std::collections::VecDeque;

use crate::range::Geometry;

#[derive(Debug, Clone, Copy, Default)]
struct Segment {
    live: u32,
    given_back: bool,
}

/// Why the log gives out no more space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Full {
    /// The image has no more room.
    Image,
    /// The limit on segments in use is reached.
    Limit,
    /// No memory for the notes.
    Memory,
}

/// Positions are in granules; the odd tail has the image's last place to itself.
#[derive(Debug)]
pub(crate) struct Log {
    head: u64,
    /// One past the last position, the odd tail's place not counted.
    capacity: u64,
    segment_granules: u64,
    segment_limit: u64,
    /// The segments from `first_segment` on; older ones are all given back.
    segments: VecDeque<Segment>,
    first_segment: u64,
    /// Segments that are not given back.
    in_use: u64,
    live: u64,
    granule: u64,
    has_odd_tail: bool,
}

impl Log {
    /// A log in an image of `image_bytes`; `segment_bytes` is a multiple of the image's cluster
    /// size, `limit_bytes` caps the segments in use.
    pub(crate) fn new(
        geometry: Geometry,
        image_bytes: u64,
        segment_bytes: u64,
        limit_bytes: Option<u64>,
    ) -> Self {
        let granule = geometry.granule();
        let segment_bytes = segment_bytes.max(granule);
        let tail_bytes = geometry.size() % granule;
        let positions = image_bytes.saturating_sub(tail_bytes) / granule;
        Self {
            head: 0,
            capacity: positions.min(geometry.count()),
            segment_granules: (segment_bytes / granule).max(1),
            segment_limit: limit_bytes.map_or(u64::MAX, |limit| (limit / segment_bytes).max(1)),
            segments: VecDeque::new(),
            first_segment: 0,
            in_use: 0,
            live: 0,
            granule,
            has_odd_tail: geometry.odd_tail().is_some(),
        }
    }

    /// Granules in the log that are still needed, those being written included.
    pub(crate) fn live(&self) -> u64 {
        self.live
    }

    /// Bytes of the image that are not given back.
    pub(crate) fn allocated_bytes(&self) -> u64 {
        self.in_use * self.segment_granules * self.granule
    }

    pub(crate) fn metadata_bytes(&self) -> u64 {
        (self.segments.capacity() * size_of::<Segment>()) as u64
    }

    /// The place of the odd tail granule: behind all others.
    pub(crate) fn tail_position(&self) -> Option<u64> {
        self.has_odd_tail.then_some(self.capacity)
    }

    /// Gives out `count` consecutive positions, all of them live.
    ///
    /// # Errors
    /// There is no more space; nothing has changed.
    pub(crate) fn take(&mut self, count: u64) -> Result<u64, Full> {
        let position = self.head;
        let end = position.checked_add(count).filter(|&end| end <= self.capacity);
        let end = end.ok_or(Full::Image)?;
        let segments = end.div_ceil(self.segment_granules) - self.first_segment;
        let more = (segments as usize).saturating_sub(self.segments.len());
        if self.in_use + more as u64 > self.segment_limit {
            return Err(Full::Limit);
        }
        self.segments.try_reserve(more).map_err(|_| Full::Memory)?;
        for _ in 0..more {
            self.segments.push_back(Segment::default());
        }
        self.in_use += more as u64;
        self.head = end;
        self.live += count;
        self.each_segment(position, count, |segment, part| segment.live += part as u32);
        Ok(position)
    }

    /// The odd tail is in its place.
    pub(crate) fn add_tail(&mut self) {
        self.live += 1;
    }

    /// The granule at `position` is not needed any more.
    pub(crate) fn remove(&mut self, position: u64) {
        self.live = self.live.saturating_sub(1);
        // The odd tail's place belongs to no segment: its space is never given back.
        if position < self.capacity {
            self.each_segment(position, 1, |segment, _| {
                segment.live = segment.live.saturating_sub(1);
            });
        }
    }

    /// Adds to `out` the segments among these positions that can be given back now, as (position,
    /// count).
    pub(crate) fn give_back(&mut self, position: u64, count: u64, out: &mut Vec<(u64, u64)>) {
        let first = position / self.segment_granules;
        let last = (position + count.max(1) - 1) / self.segment_granules;
        for index in first..=last {
            let begin = index * self.segment_granules;
            let full = begin.checked_add(self.segment_granules).is_some_and(|end| end <= self.head);
            let Some(segment) = self.segment(index) else { continue };
            if full && segment.live == 0 && !segment.given_back {
                segment.given_back = true;
                self.in_use -= 1;
                out.push((begin, self.segment_granules));
            }
        }
        while self.segments.front().is_some_and(|segment| segment.given_back) {
            self.segments.pop_front();
            self.first_segment += 1;
        }
    }

    fn segment(&mut self, index: u64) -> Option<&mut Segment> {
        let at = index.checked_sub(self.first_segment)?;
        self.segments.get_mut(at as usize)
    }

    /// Calls `f` with each segment among these positions and how many of them are in it.
    fn each_segment(&mut self, position: u64, count: u64, mut f: impl FnMut(&mut Segment, u64)) {
        let size = self.segment_granules;
        let end = position + count;
        let mut at = position;
        while at < end {
            let stop = ((at / size + 1) * size).min(end);
            if let Some(segment) = self.segment(at / size) {
                f(segment, stop - at);
            }
            at = stop;
        }
    }
}

#[cfg(not(loom))]
#[cfg(test)]
mod tests {
    use super::{Full, Log};
    use crate::range::Geometry;

    const GRANULE: u64 = 4096;

    fn log(granules: u64, limit: Option<u64>) -> Log {
        let geometry = Geometry::new(granules * GRANULE, 512).unwrap();
        Log::new(geometry, granules * GRANULE, 4 * GRANULE, limit)
    }

    #[test]
    fn a_segment_goes_back_once_it_is_full_and_dead() {
        let mut log = log(16, None);
        let mut back = Vec::new();
        assert_eq!(log.take(4), Ok(0));
        (0..3).for_each(|position| log.remove(position));
        log.give_back(0, 4, &mut back);
        assert!(back.is_empty(), "one is live, perhaps being written");
        log.remove(3);
        log.give_back(0, 4, &mut back);
        assert_eq!(back, [(0, 4)]);
        assert_eq!((log.live(), log.allocated_bytes()), (0, 0));
        assert_eq!(log.take(2), Ok(4), "space is never used again");
        log.remove(4);
        log.remove(5);
        back.clear();
        log.give_back(4, 2, &mut back);
        assert!(back.is_empty(), "more will be written to it");
    }

    #[test]
    fn the_image_and_the_limit_end_it() {
        let mut small = log(6, None);
        assert_eq!(small.take(5), Ok(0));
        assert_eq!(small.take(2), Err(Full::Image));
        assert_eq!(small.take(1), Ok(5));
        let mut limited = log(64, Some(8 * GRANULE));
        assert_eq!(limited.take(8), Ok(0));
        assert_eq!(limited.take(1), Err(Full::Limit));
        (0..4).for_each(|position| limited.remove(position));
        limited.give_back(0, 4, &mut Vec::new());
        assert_eq!(limited.take(1), Ok(8), "a segment that went back counts no more");
    }

    #[test]
    fn the_odd_tail_has_the_last_place_also_in_a_smaller_image() {
        let geometry = Geometry::new(10 * GRANULE + 512, 512).unwrap();
        let log = Log::new(geometry, 10 * GRANULE + 512, GRANULE, None);
        assert_eq!(log.tail_position(), Some(10));
        let log = Log::new(geometry, 4 * GRANULE, GRANULE, Some(GRANULE));
        assert_eq!(log.tail_position(), Some(3));
    }
}
