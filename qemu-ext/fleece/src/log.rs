// SPDX-License-Identifier: GPL-2.0-or-later
//! Space of the fleecing image, used as a log.
//!
//! A position is given out once and never again, so a read of it can never meet other data. Each
//! granule is captured at most once, so the log never outgrows an image as large as the disk. A
//! segment in which nothing is live any more is given back, once no write to it is in flight.

use crate::range::Geometry;

#[derive(Debug, Clone, Copy, Default)]
struct Segment {
    live: u32,
    writing: u32,
    given_back: bool,
}

/// Positions are in granules; the odd tail has the image's last place to itself.
#[derive(Debug)]
pub(crate) struct Log {
    head: u32,
    odd_tail: Option<u32>,
    segment_granules: u32,
    segments: Vec<Segment>,
    live: u64,
}

impl Log {
    /// A log in an image as large as the disk; `segment_bytes` is a multiple of the image's
    /// cluster size.
    pub(crate) fn new(geometry: Geometry, segment_bytes: u64) -> Self {
        Self {
            head: 0,
            odd_tail: geometry.has_odd_tail().then(|| (geometry.count() - 1) as u32),
            segment_granules: (segment_bytes / geometry.granule()).max(1) as u32,
            segments: Vec::new(),
            live: 0,
        }
    }

    /// Live granules.
    pub(crate) fn live(&self) -> u64 {
        self.live
    }

    pub(crate) fn metadata_bytes(&self) -> u64 {
        (self.segments.capacity() * size_of::<Segment>()) as u64
    }

    /// Gives out `count` consecutive positions and notes a write to them; none when there is no
    /// memory for the notes.
    pub(crate) fn begin_write(&mut self, count: u32) -> Option<u32> {
        let position = self.head;
        let last_segment = ((position + count - 1) / self.segment_granules) as usize;
        if last_segment >= self.segments.len() {
            let more = last_segment + 1 - self.segments.len();
            self.segments.try_reserve(more).ok()?;
            self.segments.resize(last_segment + 1, Segment::default());
        }
        self.head += count;
        self.each_segment(position, count, |segment| segment.writing += 1);
        Some(position)
    }

    /// Ends a write begun with [`Log::begin_write`].
    pub(crate) fn end_write(&mut self, position: u32, count: u32) {
        self.each_segment(position, count, |segment| segment.writing -= 1);
    }

    /// The granule at `position` became live.
    pub(crate) fn add(&mut self, position: u32) {
        self.live += 1;
        if let Some(segment) = self.segment_of(position) {
            segment.live += 1;
        }
    }

    /// The granule at `position` was released.
    pub(crate) fn remove(&mut self, position: u32) {
        self.live -= 1;
        if let Some(segment) = self.segment_of(position) {
            segment.live -= 1;
        }
    }

    /// Segments touched by these positions that can be given back now, as (position, count).
    pub(crate) fn give_back(&mut self, position: u32, count: u32, out: &mut Vec<(u32, u32)>) {
        let first = position / self.segment_granules;
        let last = (position + count.max(1) - 1) / self.segment_granules;
        for index in first..=last {
            let end = (index + 1) * self.segment_granules;
            let Some(segment) = self.segments.get_mut(index as usize) else { continue };
            if segment.live == 0 && segment.writing == 0 && !segment.given_back && end <= self.head
            {
                segment.given_back = true;
                out.push((index * self.segment_granules, self.segment_granules));
            }
        }
    }

    /// The segment that counts `position`; the odd tail's place is not counted, because the head
    /// never passes it and so its segment is never given back.
    fn segment_of(&mut self, position: u32) -> Option<&mut Segment> {
        if self.odd_tail == Some(position) {
            return None;
        }
        self.segments.get_mut((position / self.segment_granules) as usize)
    }

    fn each_segment(&mut self, position: u32, count: u32, mut f: impl FnMut(&mut Segment)) {
        let first = (position / self.segment_granules) as usize;
        let last = ((position + count - 1) / self.segment_granules) as usize;
        for segment in self.segments.iter_mut().take(last + 1).skip(first) {
            f(segment);
        }
    }
}
