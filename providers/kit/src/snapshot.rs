// SPDX-License-Identifier: MIT OR Apache-2.0
//! The frozen disk as an export: what is clean or released cannot be read, what a provider does is
//! noted, and it can be made to fail.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use provider_api::Readable;
use provider_nbd::server::{Export, ExportFuture, Refusal};
use provider_nbd::wire::{BlockSizes, DEFAULT_MAX_BLOCK, flag};
use provider_nbd::{Errno, context};

use crate::disk::{Frozen, GRANULE};

/// Name of the bitmap in the exports.
pub(crate) const BITMAP: &str = "kit0";

/// What happens to requests of all disks of one snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Trouble {
    /// The request with this number fails, counted from 0.
    pub(crate) fail_at: Option<u64>,
    /// All requests from this number on find the connection closed.
    pub(crate) hang_up_at: Option<u64>,
    /// Each request takes at least so long.
    pub(crate) delay: Option<Duration>,
}

/// What a provider did with a snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Requests in all.
    pub(crate) requests: u64,
    /// Bytes that were read.
    pub(crate) read_bytes: u64,
    /// Bytes that were released.
    pub(crate) released_bytes: u64,
    /// Reads of areas that the bitmap does not mark.
    pub(crate) reads_of_clean: u64,
    /// Reads of areas that had been released.
    pub(crate) reads_of_released: u64,
    /// Granules that were read more than once.
    pub(crate) read_again: u64,
    /// Bytes with data that were released without having been read.
    pub(crate) released_unread_bytes: u64,
    /// Where the first of them was.
    pub(crate) released_unread_at: Option<(String, u64)>,
}

/// What all disks of one snapshot share.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    trouble: Trouble,
    requests: AtomicU64,
    seen: Mutex<Seen>,
}

impl Shared {
    pub(crate) fn new(trouble: Trouble) -> Arc<Self> {
        Arc::new(Self { trouble, ..Self::default() })
    }

    pub(crate) fn seen(&self) -> Seen {
        Seen { requests: self.requests.load(Ordering::SeqCst), ..self.note().clone() }
    }

    fn note(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a request, and lets it fail if it is its turn.
    async fn turn(&self) -> Result<(), Refusal> {
        let number = self.requests.fetch_add(1, Ordering::SeqCst);
        if let Some(delay) = self.trouble.delay {
            tokio::time::sleep(delay).await;
        }
        if self.trouble.hang_up_at.is_some_and(|at| number >= at) {
            return Err(Refusal::HangUp);
        }
        if self.trouble.fail_at == Some(number) {
            return Err(Refusal::new(Errno::EIO, "the kit lets this request fail"));
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Clean,
    Unread,
    Read,
    Released,
}

/// One frozen disk.
#[derive(Debug)]
pub(crate) struct Snapshot {
    device: String,
    frozen: Frozen,
    /// Per [`GRANULE`].
    states: Mutex<Vec<State>>,
    zero: Vec<bool>,
    shared: Arc<Shared>,
    /// Whether zeroes that may become a hole are a release: QEMU's storage daemon makes them of a punched
    /// hole.
    is_file: bool,
}

impl Snapshot {
    pub(crate) fn new(device: &str, frozen: Frozen, shared: Arc<Shared>, is_file: bool) -> Self {
        let is_readable = |n: usize| match (&frozen.dirty, frozen.readable) {
            (Some(dirty), Readable::Dirty) => {
                dirty[(n as u64 * GRANULE / frozen.granule_bytes) as usize]
            }
            _ => true,
        };
        let granules = frozen.content.chunks(GRANULE as usize);
        let zero: Vec<bool> = granules.map(|bytes| bytes.iter().all(|byte| *byte == 0)).collect();
        let states = (0..zero.len())
            .map(|n| if is_readable(n) { State::Unread } else { State::Clean })
            .collect();
        Self {
            device: device.to_owned(),
            frozen,
            states: Mutex::new(states),
            zero,
            shared,
            is_file,
        }
    }

    fn states(&self) -> MutexGuard<'_, Vec<State>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_now(&self, offset: u64, len: usize) -> Result<Bytes, Refusal> {
        let mut states = self.states();
        let range = touched(offset, len as u64);
        let mut seen = self.shared.note();
        if states[range.clone()].contains(&State::Clean) {
            seen.reads_of_clean += 1;
            return Err(Refusal::new(Errno::EPERM, "the area is not dirty"));
        }
        if states[range.clone()].contains(&State::Released) {
            seen.reads_of_released += 1;
            return Err(Refusal::new(Errno::EPERM, "the area was released"));
        }
        for state in &mut states[range] {
            if *state == State::Read {
                seen.read_again += 1;
            }
            *state = State::Read;
        }
        seen.read_bytes += len as u64;
        let at = offset as usize;
        Ok(Bytes::copy_from_slice(&self.frozen.content[at..at + len]))
    }

    fn release_now(&self, offset: u64, len: u64) {
        let mut states = self.states();
        let mut seen = self.shared.note();
        let end = offset + len;
        let first = offset.div_ceil(GRANULE) as usize;
        // The last granule of an odd disk is whole when its end is reached.
        let last = if end == self.size_bytes() { end.div_ceil(GRANULE) } else { end / GRANULE };
        for (n, state) in states.iter_mut().enumerate().take(last as usize).skip(first) {
            let begin = n as u64 * GRANULE;
            let bytes = GRANULE.min(self.size_bytes() - begin);
            match *state {
                State::Clean | State::Released => continue,
                State::Unread if !self.zero[n] => {
                    seen.released_unread_bytes += bytes;
                    let place = || (self.device.clone(), begin);
                    seen.released_unread_at.get_or_insert_with(place);
                }
                State::Unread | State::Read => {}
            }
            seen.released_bytes += bytes;
            *state = State::Released;
        }
    }

    /// Clean and released areas count as data.
    fn allocation(&self, offset: u64, len: u64) -> Vec<(u64, u64)> {
        let states = self.states();
        let flags = |n: usize| match states[n] {
            State::Unread | State::Read if self.zero[n] => context::HOLE | context::ZERO,
            _ => 0,
        };
        runs(offset, len, GRANULE, flags)
    }

    fn dirty(&self, offset: u64, len: u64) -> Vec<(u64, u64)> {
        let dirty = self.frozen.dirty.as_deref().unwrap_or_default();
        let flags = |n: usize| u64::from(dirty.get(n).copied().unwrap_or_default());
        runs(offset, len, self.frozen.granule_bytes, flags)
    }
}

/// The granules that a range touches.
fn touched(offset: u64, len: u64) -> std::ops::Range<usize> {
    (offset / GRANULE) as usize..(offset + len).div_ceil(GRANULE) as usize
}

/// Neighbours with the same flags, as lengths and flags.
fn runs(offset: u64, len: u64, unit: u64, flags: impl Fn(usize) -> u64) -> Vec<(u64, u64)> {
    let end = offset + len;
    let mut runs: Vec<(u64, u64)> = Vec::new();
    let mut at = offset;
    while at < end {
        let n = at / unit;
        let next = ((n + 1) * unit).min(end);
        let flags = flags(n as usize);
        match runs.last_mut() {
            Some(last) if last.1 == flags => last.0 += next - at,
            _ => runs.push((next - at, flags)),
        }
        at = next;
    }
    runs
}

impl Export for Snapshot {
    fn size_bytes(&self) -> u64 {
        self.frozen.content.len() as u64
    }

    fn flags(&self) -> u16 {
        // Writable, for trims: as QEMU's exports of snapshots are.
        flag::HAS_FLAGS
            | flag::SEND_FLUSH
            | flag::SEND_FUA
            | flag::SEND_TRIM
            | flag::SEND_WRITE_ZEROES
            | flag::SEND_FAST_ZERO
            | flag::CAN_MULTI_CONN
            | flag::SEND_DF
    }

    fn block_sizes(&self) -> BlockSizes {
        BlockSizes { min: 1, preferred: 64 << 10, max: DEFAULT_MAX_BLOCK }
    }

    fn contexts(&self) -> Vec<String> {
        let mut names = vec![context::BASE_ALLOCATION.to_owned()];
        if self.frozen.dirty.is_some() {
            names.push(context::dirty_bitmap(BITMAP));
        }
        names
    }

    fn read(&self, offset: u64, len: usize) -> ExportFuture<'_, Bytes> {
        Box::pin(async move {
            self.shared.turn().await?;
            self.read_now(offset, len)
        })
    }

    fn block_status<'a>(
        &'a self,
        context: &'a str,
        offset: u64,
        len: u64,
    ) -> ExportFuture<'a, Vec<(u64, u64)>> {
        Box::pin(async move {
            self.shared.turn().await?;
            Ok(match context {
                context::BASE_ALLOCATION => self.allocation(offset, len),
                _ => self.dirty(offset, len),
            })
        })
    }

    fn write(&self, _offset: u64, _data: Bytes) -> ExportFuture<'_, ()> {
        let refusal = Refusal::new(Errno::EPERM, "a snapshot cannot be written");
        Box::pin(std::future::ready(Err(refusal)))
    }

    fn trim(&self, offset: u64, len: u64) -> ExportFuture<'_, ()> {
        Box::pin(async move {
            self.shared.turn().await?;
            self.release_now(offset, len);
            Ok(())
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_trim: bool) -> ExportFuture<'_, ()> {
        if self.is_file && may_trim {
            return self.trim(offset, len);
        }
        self.write(offset, Bytes::new())
    }

    fn flush(&self) -> ExportFuture<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }
}

#[cfg(test)]
mod tests {
    use provider_api::BitmapMode;

    use super::*;
    use crate::disk::BITMAP_GRANULE;

    /// Four bitmap granules, of which the second and the odd last one are dirty.
    fn snapshot(readable: Readable) -> (Snapshot, Arc<Shared>) {
        let mut content = vec![7; 3 * BITMAP_GRANULE as usize + 512];
        content[BITMAP_GRANULE as usize..][..GRANULE as usize].fill(0);
        let frozen = Frozen {
            content: Arc::new(content),
            mode: BitmapMode::Reuse,
            action: "used",
            generation: None,
            dirty: Some(vec![false, true, false, true]),
            granule_bytes: BITMAP_GRANULE,
            readable,
        };
        let shared = Shared::new(Trouble::default());
        (Snapshot::new("scsi0", frozen, Arc::clone(&shared), false), shared)
    }

    #[tokio::test]
    async fn only_what_is_dirty_and_not_released_can_be_read() {
        let (disk, shared) = snapshot(Readable::Dirty);
        let unit = BITMAP_GRANULE;
        assert!(disk.read(0, 512).await.is_err());
        assert!(disk.read(unit - 512, 1024).await.is_err());
        assert_eq!(disk.read(unit, 512).await.unwrap()[..], [0; 512]);
        assert_eq!(disk.read(3 * unit, 512).await.unwrap()[..], [7; 512]);
        // Released in part: nothing happens; whole, and the odd end: gone.
        disk.trim(3 * unit - 512, 1024).await.unwrap();
        assert!(disk.read(3 * unit, 512).await.is_err());
        disk.trim(unit + 512, GRANULE).await.unwrap();
        assert!(disk.read(unit + GRANULE, 512).await.is_ok());
        assert_eq!(shared.seen().released_unread_bytes, 0);
        disk.trim(unit, 3 * GRANULE).await.unwrap();
        let seen = shared.seen();
        assert_eq!(seen.released_unread_bytes, GRANULE);
        assert_eq!(seen.released_unread_at, Some(("scsi0".to_owned(), unit + 2 * GRANULE)));
        assert_eq!((seen.reads_of_clean, seen.reads_of_released), (2, 1));
        assert_eq!(seen.read_again, 0);
    }

    #[tokio::test]
    async fn block_status_tells_what_is_dirty_and_what_is_zero() {
        let (disk, _) = snapshot(Readable::Dirty);
        let unit = BITMAP_GRANULE;
        let name = context::dirty_bitmap(BITMAP);
        let dirty = disk.block_status(&name, 0, disk.size_bytes()).await.unwrap();
        assert_eq!(dirty, [(unit, 0), (unit, 1), (unit, 0), (512, 1)]);
        let zero = disk.block_status(context::BASE_ALLOCATION, unit - 512, unit).await.unwrap();
        assert_eq!(zero, [(512, 0), (GRANULE, 3), (unit - 512 - GRANULE, 0)]);
    }

    #[tokio::test]
    async fn with_all_readable_clean_areas_can_be_read() {
        let (disk, _) = snapshot(Readable::All);
        assert!(disk.read(0, 512).await.is_ok());
    }

    #[tokio::test]
    async fn trouble_comes_when_it_was_ordered() {
        let (mut disk, _) = snapshot(Readable::All);
        disk.shared = Shared::new(Trouble { fail_at: Some(1), hang_up_at: Some(3), delay: None });
        assert!(disk.read(0, 512).await.is_ok());
        assert!(matches!(disk.read(0, 512).await, Err(Refusal::Error { .. })));
        assert!(disk.trim(0, 4096).await.is_ok());
        assert_eq!(disk.read(0, 512).await, Err(Refusal::HangUp));
        assert_eq!(disk.trim(0, 512).await, Err(Refusal::HangUp));
    }
}
