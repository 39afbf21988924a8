// SPDX-License-Identifier: MIT OR Apache-2.0
//! A simulated disk with its dirty bitmap, with the rules that QEMU's extension has for generations.

use std::collections::VecDeque;
use std::sync::Arc;

use provider_api::{BitmapMode, BitmapRequest, Readable, Uuid};

use crate::Change;

/// Unit of what can be read and released.
pub(crate) const GRANULE: u64 = 4096;
/// Granularity of a bitmap, unless a check asks for a finer one.
pub(crate) const BITMAP_GRANULE: u64 = 64 << 10;
/// For so many ids a bitmap of failed backups stays valid.
const GENERATIONS_MAX: usize = 16;

/// What a setup found of the bitmap.
#[derive(Debug, Clone)]
pub(crate) struct Frozen {
    pub(crate) content: Arc<Vec<u8>>,
    pub(crate) mode: BitmapMode,
    pub(crate) action: &'static str,
    pub(crate) generation: Option<String>,
    /// Per `granule_bytes`; none without a bitmap.
    pub(crate) dirty: Option<Vec<bool>>,
    /// Granularity of the bitmap.
    pub(crate) granule_bytes: u64,
    pub(crate) readable: Readable,
}

#[derive(Debug, Clone)]
struct Bitmap {
    dirty: Vec<bool>,
    /// Generations since which it holds all changes.
    valid_for: VecDeque<String>,
}

/// A backup under way.
#[derive(Debug)]
struct Pending {
    generation: String,
    /// What the bitmap held, if it was one to build upon.
    before: Option<Bitmap>,
}

/// The disk.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) device: String,
    granule_bytes: u64,
    content: Arc<Vec<u8>>,
    bitmap: Option<Bitmap>,
    pending: Option<Pending>,
}

impl Disk {
    pub(crate) fn new(device: &str, content: Vec<u8>) -> Self {
        Self {
            device: device.to_owned(),
            granule_bytes: BITMAP_GRANULE,
            content: Arc::new(content),
            bitmap: None,
            pending: None,
        }
    }

    /// Another granularity, before there is a bitmap; a multiple of [`GRANULE`].
    pub(crate) fn set_granule(&mut self, granule_bytes: u64) {
        self.granule_bytes = granule_bytes;
    }

    pub(crate) fn size_bytes(&self) -> u64 {
        self.content.len() as u64
    }

    fn granules(&self) -> usize {
        self.content.len().div_ceil(self.granule_bytes as usize)
    }

    pub(crate) fn apply(&mut self, change: &Change) {
        change.apply(Arc::make_mut(&mut self.content).as_mut_slice());
        let (offset, length) = change.range();
        if let Some(bitmap) = &mut self.bitmap
            && length > 0
        {
            let first = (offset / self.granule_bytes) as usize;
            let last = ((offset + length - 1) / self.granule_bytes) as usize;
            bitmap.dirty[first..=last].fill(true);
        }
    }

    /// Forgets the bitmap's history, as a crash of QEMU does.
    pub(crate) fn invalidate(&mut self) {
        if let Some(bitmap) = &mut self.bitmap {
            bitmap.valid_for.clear();
        }
    }

    /// Sets up an access: the point in time is now.
    pub(crate) fn freeze(&mut self, request: &BitmapRequest) -> Frozen {
        let mut frozen = Frozen {
            content: Arc::clone(&self.content),
            mode: BitmapMode::New,
            action: "new",
            generation: None,
            dirty: None,
            granule_bytes: self.granule_bytes,
            readable: Readable::All,
        };
        let before = match request {
            BitmapRequest::None => {
                let removed = self.bitmap.take().is_some();
                frozen.mode = BitmapMode::None;
                frozen.action = if removed { "not-used-removed" } else { "not-used" };
                return frozen;
            }
            BitmapRequest::New => None,
            BitmapRequest::Use { generation, readable } => match self.bitmap.take() {
                Some(bitmap) if bitmap.valid_for.contains(generation) => {
                    frozen.mode = BitmapMode::Reuse;
                    frozen.action = "used";
                    frozen.readable = *readable;
                    Some(bitmap)
                }
                Some(_) => {
                    frozen.action = "invalid";
                    None
                }
                None => {
                    frozen.action = "missing-recreated";
                    None
                }
            },
        };
        let all = vec![true; self.granules()];
        frozen.dirty = Some(before.as_ref().map_or(all, |bitmap| bitmap.dirty.clone()));
        let generation = Uuid::new_v4().simple().to_string();
        frozen.generation = Some(generation.clone());
        // From here on it holds what changes after the point in time.
        let dirty = vec![false; self.granules()];
        self.bitmap = Some(Bitmap { dirty, valid_for: VecDeque::new() });
        self.pending = Some(Pending { generation, before });
        frozen
    }

    /// Ends the access.
    pub(crate) fn thaw(&mut self, success: bool) {
        let Some(Pending { generation, before }) = self.pending.take() else { return };
        let Some(bitmap) = &mut self.bitmap else { return };
        if success {
            bitmap.valid_for = VecDeque::from([generation]);
            return;
        }
        match before {
            // Old and new changes together are still all since its base.
            Some(before) => {
                for (now, then) in bitmap.dirty.iter_mut().zip(&before.dirty) {
                    *now |= then;
                }
                bitmap.valid_for = before.valid_for;
            }
            None => bitmap.dirty.fill(true),
        }
        bitmap.valid_for.push_back(generation);
        while bitmap.valid_for.len() > GENERATIONS_MAX {
            bitmap.valid_for.pop_front();
        }
    }
}

/// Bytes that a bitmap of this granularity marks on a disk of this size.
pub(crate) fn marked_bytes(dirty: &[bool], granule_bytes: u64, size_bytes: u64) -> u64 {
    let granules = dirty.iter().enumerate().filter(|(_, dirty)| **dirty);
    granules
        .map(|(n, _)| {
            let begin = n as u64 * granule_bytes;
            granule_bytes.min(size_bytes - begin)
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(offset: u64) -> Change {
        Change::Write { offset, data: vec![1; 512] }
    }

    fn used(generation: &Option<String>) -> BitmapRequest {
        let generation = generation.clone().unwrap();
        BitmapRequest::Use { generation, readable: Readable::Dirty }
    }

    #[test]
    fn a_bitmap_follows_the_rules_of_generations() {
        let mut disk = Disk::new("scsi0", vec![0; 200 << 10]);
        let first = disk.freeze(&BitmapRequest::New);
        assert_eq!((first.mode, first.action), (BitmapMode::New, "new"));
        let marked = marked_bytes(&first.dirty.unwrap(), BITMAP_GRANULE, 200 << 10);
        assert_eq!(marked, 200 << 10);
        disk.apply(&write(70 << 10));
        disk.thaw(true);
        // Failed: what it held is kept, and the id that was handed out is good, too.
        let second = disk.freeze(&used(&first.generation));
        assert_eq!(
            (second.mode, second.dirty.unwrap()),
            (BitmapMode::Reuse, vec![false, true, false, false])
        );
        disk.apply(&write(0));
        disk.thaw(false);
        for generation in [&first.generation, &second.generation] {
            let frozen = disk.freeze(&used(generation));
            assert_eq!(frozen.dirty.unwrap(), [true, true, false, false]);
            disk.thaw(false);
        }
        let third = disk.freeze(&used(&first.generation));
        disk.thaw(true);
        // Only the last one counts now.
        assert_eq!(disk.freeze(&used(&first.generation)).action, "invalid");
        disk.thaw(false);
        assert_eq!(disk.freeze(&used(&third.generation)).action, "invalid");
        disk.thaw(true);
        assert_eq!(disk.freeze(&BitmapRequest::None).action, "not-used-removed");
        disk.thaw(true);
        assert_eq!(disk.freeze(&used(&third.generation)).action, "missing-recreated");
    }
}
