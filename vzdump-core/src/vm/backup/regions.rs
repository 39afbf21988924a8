// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a provider must read of a disk that is offered as a file, asked of the same export.
//!
//! The sum that the last page states is not counted here: it is what QEMU said when the point in time was
//! taken, so a page that is missing, or an answer that is wrong, cannot go unnoticed.

use std::path::PathBuf;

use provider_api::{
    BoxFuture, Call, DirtyRegions, Error, Kind, NextRegions, Region, RegionPage, Result,
};
use provider_nbd::{Client, Options, context};

use super::{NBD_TIMEOUT, Offered};

/// The most regions of one page.
const PAGE_REGIONS_MAX: usize = 4096;
/// How much of a disk one page may be about.
const PAGE_BYTES_MAX: u64 = 1 << 30;
/// Regions begin and end at multiples of this, or at the end of the disk: a file that is read past the
/// page cache cannot be read otherwise.
const ALIGNMENT: u64 = 4096;

/// A part of a disk: begin and end.
type Area = (u64, u64);

/// The regions of one disk.
#[derive(Debug)]
pub struct ExportRegions {
    socket: PathBuf,
    disk: Offered,
    state: tokio::sync::Mutex<State>,
}

#[derive(Debug)]
enum State {
    /// Nobody has asked yet.
    Unused,
    Open(Client),
    /// The backup has ended.
    Closed,
}

impl ExportRegions {
    /// Of a disk that the server at `socket` exports.
    #[must_use]
    pub fn new(socket: PathBuf, disk: Offered) -> Self {
        Self { socket, disk, state: tokio::sync::Mutex::new(State::Unused) }
    }

    /// Answers no more: whoever still asks gets an error.
    pub async fn close(&self) {
        *self.state.lock().await = State::Closed;
    }

    /// The context that tells what changed; none if all of the disk is wanted.
    fn dirty_context(&self) -> Option<String> {
        self.disk.reused_bitmap.as_deref().map(context::dirty_bitmap)
    }

    async fn client(&self) -> Result<Client> {
        let mut state = self.state.lock().await;
        match &*state {
            State::Open(client) if !client.is_closed() => return Ok(client.clone()),
            State::Closed => {
                let text = format!("The backup of disk {} has ended.", self.disk.device);
                return Err(Error::new(Kind::Cancelled, text));
            }
            _ => {}
        }
        let base = context::BASE_ALLOCATION.to_owned();
        let options = Options {
            contexts: std::iter::once(base).chain(self.dirty_context()).collect(),
            timeout: Some(NBD_TIMEOUT),
            ..Options::default()
        };
        let client = Client::connect_unix(&self.socket, &self.disk.export, options);
        let client = client.await.map_err(|error| self.failed(error))?;
        if client.size_bytes() != self.disk.size_bytes {
            let text = format!("The export of disk {} has another size.", self.disk.device);
            return Err(Error::new(Kind::Corrupt, text));
        }
        *state = State::Open(client.clone());
        Ok(client)
    }

    fn failed(&self, error: provider_nbd::Error) -> Error {
        let text = format!("What changed on disk {} cannot be found out.", self.disk.device);
        Error::with_source(Kind::Io, text, error)
    }

    async fn find(&self, from: u64) -> Result<RegionPage> {
        let size_bytes = self.disk.size_bytes;
        if from > size_bytes {
            let text = format!("Disk {} ends before {from}.", self.disk.device);
            return Err(Error::new(Kind::Invalid, text));
        }
        let client = self.client().await?;
        let (areas, end) = self.areas(&client, from).await?;
        let mut regions = Vec::new();
        if let (Some(first), Some(last)) = (areas.first(), areas.last()) {
            let zeroes = self.marked(&client, context::BASE_ALLOCATION, (first.0, last.1)).await?;
            let inner = zeroes.into_iter().filter_map(|zero| shrink(zero, size_bytes));
            regions = cut(&areas, &inner.collect::<Vec<_>>());
        }
        if regions.len() > PAGE_REGIONS_MAX {
            regions.truncate(PAGE_REGIONS_MAX);
            let last = regions[PAGE_REGIONS_MAX - 1];
            let offset = last.offset + last.length_bytes;
            return Ok(RegionPage { regions, next: NextRegions::From { offset } });
        }
        let next = if end < size_bytes {
            NextRegions::From { offset: end }
        } else {
            NextRegions::End { total_bytes: self.disk.wanted_bytes }
        };
        Ok(RegionPage { regions, next })
    }

    /// Wanted areas from an offset on, as many as fit one page, and where the others begin.
    async fn areas(&self, client: &Client, from: u64) -> Result<(Vec<Area>, u64)> {
        let size_bytes = self.disk.size_bytes;
        let Some(name) = self.dirty_context() else {
            let end = size_bytes.min(from.saturating_add(PAGE_BYTES_MAX));
            return Ok((Some((from, end)).filter(|_| from < end).into_iter().collect(), end));
        };
        let mut extents = client.extents(&name, from, size_bytes - from);
        let mut found: Vec<Area> = Vec::new();
        while let Some(extent) = extents.next().await.map_err(|error| self.failed(error))? {
            if extent.flags & context::DIRTY == 0 {
                continue;
            }
            let first = found.first().map_or(extent.offset, |area| area.0);
            let limit = first.saturating_add(PAGE_BYTES_MAX).min(size_bytes);
            if extent.offset >= limit || found.len() == PAGE_REGIONS_MAX {
                return Ok((found, extent.offset));
            }
            found.push((extent.offset, extent.end().min(limit)));
            if extent.end() > limit {
                return Ok((found, limit));
            }
        }
        Ok((found, size_bytes))
    }

    async fn marked(&self, client: &Client, name: &str, area: Area) -> Result<Vec<Area>> {
        let mut extents = client.extents(name, area.0, area.1 - area.0);
        let mut found = Vec::new();
        while let Some(extent) = extents.next().await.map_err(|error| self.failed(error))? {
            if extent.flags & context::ZERO != 0 {
                found.push((extent.offset, extent.end().min(area.1)));
            }
        }
        Ok(found)
    }
}

impl DirtyRegions for ExportRegions {
    fn page<'a>(&'a self, offset: u64, call: &'a Call) -> BoxFuture<'a, Result<RegionPage>> {
        Box::pin(async move {
            let found = call.cancel.run_until_cancelled(self.find(offset)).await;
            found.unwrap_or_else(|| {
                Err(Error::new(Kind::Cancelled, "The question for regions was cancelled."))
            })
        })
    }
}

/// The part of an area that begins and ends at multiples of [`ALIGNMENT`], or at the end of the disk.
fn shrink((start, end): Area, size_bytes: u64) -> Option<Area> {
    let start = start.checked_next_multiple_of(ALIGNMENT)?;
    let end = if end == size_bytes { end } else { end - end % ALIGNMENT };
    (start < end).then_some((start, end))
}

/// Cuts areas where zeroes begin and end. Both are in order and do not overlap.
fn cut(areas: &[Area], zeroes: &[Area]) -> Vec<Region> {
    let mut regions = Vec::new();
    let mut push = |start: u64, end: u64, zero: bool| {
        if start < end {
            regions.push(Region { offset: start, length_bytes: end - start, zero });
        }
    };
    let mut zeroes = zeroes.iter().copied().peekable();
    for &(start, end) in areas {
        let mut at = start;
        while let Some(&(zero_start, zero_end)) = zeroes.peek() {
            if zero_start >= end {
                break;
            }
            if zero_end > at {
                let zero_start = zero_start.max(at);
                push(at, zero_start, false);
                push(zero_start, zero_end.min(end), true);
                at = zero_end.min(end);
            }
            if zero_end > end {
                // The rest may be in the next area.
                break;
            }
            zeroes.next();
        }
        push(at, end, false);
    }
    regions
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cuts(areas: &[Area], zeroes: &[Area]) -> Vec<(u64, u64, bool)> {
        let regions = cut(areas, zeroes);
        regions.iter().map(|r| (r.offset, r.offset + r.length_bytes, r.zero)).collect()
    }

    #[test]
    fn areas_are_cut_where_zeroes_begin_and_end() {
        let areas = [(0, 10), (20, 30), (40, 50)];
        assert_eq!(cuts(&areas, &[]), [(0, 10, false), (20, 30, false), (40, 50, false)]);
        let zeroes = [(2, 4), (8, 22), (25, 60)];
        assert_eq!(
            cuts(&areas, &zeroes),
            [
                (0, 2, false),
                (2, 4, true),
                (4, 8, false),
                (8, 10, true),
                (20, 22, true),
                (22, 25, false),
                (25, 30, true),
                (40, 50, true),
            ]
        );
        assert_eq!(cuts(&[(5, 6)], &[(0, 3), (4, 5)]), [(5, 6, false)]);
    }

    /// Whatever the areas and zeroes: the regions are the areas, each byte once.
    #[test]
    fn nothing_is_lost_or_added() {
        let area_of = |bits: u32| {
            let mut areas: Vec<Area> = Vec::new();
            for at in (0..10).filter(|at| bits >> at & 1 == 1) {
                match areas.last_mut() {
                    Some(last) if last.1 == at => last.1 = at + 1,
                    _ => areas.push((at, at + 1)),
                }
            }
            areas
        };
        for wanted in 0..1_u32 << 10 {
            for zero in (0..1_u32 << 10).step_by(7) {
                let (mut all, mut zeroes) = (0, 0);
                let mut reached = 0;
                for (start, end, is_zero) in cuts(&area_of(wanted), &area_of(zero)) {
                    assert!(start >= reached && end > start);
                    reached = end;
                    for at in start..end {
                        all |= 1 << at;
                        zeroes |= u32::from(is_zero) << at;
                    }
                }
                assert_eq!((all, zeroes), (wanted, wanted & zero), "{wanted:b} {zero:b}");
            }
        }
    }

    #[test]
    fn zeroes_shrink_to_what_can_be_read_around_them() {
        assert_eq!(shrink((512, 8192 + 512), 1 << 20), Some((4096, 8192)));
        assert_eq!(shrink((512, 4096), 1 << 20), None);
        assert_eq!(shrink((512, 8192 + 512), 8192 + 512), Some((4096, 8192 + 512)));
        assert_eq!(shrink((u64::MAX - 1, u64::MAX), u64::MAX), None);
    }
}
