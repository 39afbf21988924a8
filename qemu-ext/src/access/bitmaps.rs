// SPDX-License-Identifier: GPL-2.0-or-later
//! The target's dirty bitmaps on one disk: planned, switched at the point in time, undone when the
//! setup fails, settled by the teardown.
//!
//! The real bitmaps stay on the source node and are busy by us as long as the access exists, so
//! that nobody exports, changes or releases them; the client gets a copy on the snapshot node.

use std::hash::{BuildHasher, Hasher, RandomState};

use fleece::NeedMap;
use fleece::bitmap_name::{
    self, Action, BitmapName, Decision, Ending, Existing, HASH_LEN, Id, Mode, belongs_to,
};

use super::{BitmapInfo, DeviceRequest};
use crate::qemu::bitmap::{Bitmap, FrozenBitmap};
use crate::qemu::error::Error;
use crate::qemu::glib::sha256_hex;
use crate::qemu::graph::Bds;
use crate::qemu::main_loop::MainLoop;

const DEFAULT_GRANULARITY_BYTES: u32 = 65536;
/// Name of the client's copy on the snapshot node.
const COPY_NAME: &str = "dirty";

/// What a setup will do with the bitmaps of one disk.
#[derive(Debug)]
pub(super) struct BitmapPlan {
    target_hash: String,
    size_bytes: u64,
    pub(super) action: Action,
    used: Option<String>,
    removed: Vec<String>,
    granularity_bytes: u32,
    id: Id,
}

impl BitmapPlan {
    /// Looks at the bitmaps that exist and decides.
    pub(super) fn new(
        main_loop: MainLoop,
        source: Bds,
        target_id: &str,
        size_bytes: u64,
        request: &DeviceRequest,
        granularity_bytes: Option<u32>,
    ) -> Result<Self, Error> {
        let mut target_hash = sha256_hex(target_id.as_bytes());
        target_hash.truncate(HASH_LEN);
        let bitmaps: Vec<Bitmap> = Bitmap::all(main_loop, source)
            .into_iter()
            .filter(|bitmap| belongs_to(&bitmap.name(main_loop), &target_hash))
            .collect();
        let existing: Vec<Existing> = bitmaps
            .iter()
            .map(|bitmap| Existing {
                name: bitmap.name(main_loop),
                sound: bitmap.is_sound(main_loop) && bitmap.size_bytes(main_loop) == size_bytes,
            })
            .collect();
        let generation = request.generation.as_deref();
        let Decision { action, used, removed } =
            bitmap_name::decide(request.mode, &existing, size_bytes, generation);
        if request.mode != Mode::Omitted
            && let Some(busy) = bitmaps.iter().find(|bitmap| bitmap.is_busy(main_loop))
        {
            return Err(Error::new(format!(
                "its bitmap '{}' is in use by another operation (an export or a block job)",
                busy.name(main_loop)
            )));
        }
        let used_granularity = used.map(|index| bitmaps[index].granularity_bytes(main_loop));
        let name_of = |index: usize| existing[index].name.clone();
        Ok(Self {
            target_hash,
            size_bytes,
            action,
            used: used.map(name_of),
            removed: removed.into_iter().map(name_of).collect(),
            granularity_bytes: granularity_bytes
                .or(used_granularity)
                .unwrap_or(DEFAULT_GRANULARITY_BYTES),
            id: random_id(),
        })
    }

    fn pending_name(&self) -> String {
        let ids = vec![self.id.clone()];
        BitmapName::new(&self.target_hash, self.size_bytes, Ending::Pending, ids).to_string()
    }
}

/// An id that nobody has seen before: the standard library's hasher is keyed by random bytes of
/// the operating system.
fn random_id() -> Id {
    let mut bytes = [0; 10];
    for (chunk, number) in bytes.chunks_mut(5).zip(0_u8..) {
        let mut hasher = RandomState::new().build_hasher();
        hasher.write_u8(number);
        chunk.copy_from_slice(&hasher.finish().to_le_bytes()[..5]);
    }
    Id::from_random(bytes)
}

/// The bitmaps of one disk while a setup is going on.
#[derive(Debug)]
pub(super) struct SetupBitmaps {
    plan: BitmapPlan,
    old: Option<Bitmap>,
    new: Option<Bitmap>,
    copy: Option<Bitmap>,
    switched: bool,
}

impl SetupBitmaps {
    /// Creates the new bitmap, which does not record yet. On an error nothing is left.
    pub(super) fn prepare(
        main_loop: MainLoop,
        source: Bds,
        plan: BitmapPlan,
    ) -> Result<Self, Error> {
        let mut this = Self { old: None, new: None, copy: None, switched: false, plan };
        if !this.plan.action.has_bitmap() {
            return Ok(this);
        }
        let old = match &this.plan.used {
            None => None,
            Some(name) => Some(
                Bitmap::find(main_loop, source, name)
                    .ok_or_else(|| Error::new(format!("bitmap '{name}' is gone")))?,
            ),
        };
        let name = this.plan.pending_name();
        let new = Bitmap::create(main_loop, source, this.plan.granularity_bytes, &name)?;
        for bitmap in old.into_iter().chain([new]) {
            bitmap.set_busy(main_loop, true);
        }
        (this.old, this.new) = (old, Some(new));
        Ok(this)
    }

    /// What the reader will need; none means all.
    pub(super) fn need_map(&self) -> Option<Box<dyn NeedMap>> {
        self.old.map(|old| Box::new(FrozenBitmap::new(old)) as Box<dyn NeedMap>)
    }

    /// Creates the client's copy, empty.
    pub(super) fn create_copy(&mut self, main_loop: MainLoop, snapshot: Bds) -> Result<(), Error> {
        let Some(new) = self.new else { return Ok(()) };
        let granularity = self.old.unwrap_or(new).granularity_bytes(main_loop);
        self.copy = Some(Bitmap::create(main_loop, snapshot, granularity, COPY_NAME)?);
        Ok(())
    }

    /// The point in time: changes go to the new bitmap from here on. Everything is drained.
    pub(super) fn switch(&mut self) {
        if let Some(new) = self.new {
            new.record(true);
        }
        if let Some(old) = self.old {
            old.record(false);
        }
        self.switched = true;
    }

    /// Fills the client's copy.
    pub(super) fn fill_copy(&self, main_loop: MainLoop) -> Result<Option<BitmapInfo>, Error> {
        let Some(copy) = self.copy else { return Ok(None) };
        if let Some(old) = self.old {
            old.set_busy(main_loop, false);
            let merged = copy.merge_from(main_loop, old);
            old.set_busy(main_loop, true);
            merged?;
        } else {
            copy.set_all(main_loop);
        }
        Ok(Some(BitmapInfo {
            name: COPY_NAME.to_owned(),
            generation: self.plan.id.as_str().to_owned(),
            dirty_bytes: copy.dirty_bytes(main_loop),
        }))
    }

    /// Everything is as before the setup. Everything is drained.
    pub(super) fn undo(self, main_loop: MainLoop) {
        for bitmap in self.old.into_iter().chain(self.new) {
            bitmap.set_busy(main_loop, false);
        }
        if let (Some(old), Some(new), true) = (self.old, self.new, self.switched) {
            // What was written since the switch; the sizes are equal, so this cannot fail.
            if old.merge_from(main_loop, new).is_ok() {
                old.record(true);
            }
        }
        if let Some(new) = self.new {
            drop(new.release(main_loop));
        }
    }

    /// The setup has succeeded: removes what is not wanted any more. What the access keeps.
    pub(super) fn finish(self, main_loop: MainLoop, source: Bds) -> Option<AccessBitmaps> {
        for name in &self.plan.removed {
            if let Some(bitmap) = Bitmap::find(main_loop, source, name) {
                remove(main_loop, source, bitmap);
            }
        }
        self.new.map(|_| AccessBitmaps {
            pending: self.plan.pending_name(),
            old: self.plan.used,
            target_hash: self.plan.target_hash,
            size_bytes: self.plan.size_bytes,
            id: self.plan.id,
        })
    }

    pub(super) fn action(&self) -> Action {
        self.plan.action
    }
}

/// Removes a bitmap that nobody uses, stored or not. Where that fails it stays: it will be found
/// invalid again.
fn remove(main_loop: MainLoop, source: Bds, bitmap: Bitmap) {
    let name = bitmap.name(main_loop);
    if bitmap.is_persistent(main_loop) && Bitmap::remove_stored(main_loop, source, &name).is_err() {
        return;
    }
    drop(bitmap.release(main_loop));
}

/// The bitmaps of one disk while an access exists, by name.
#[derive(Debug)]
pub(super) struct AccessBitmaps {
    target_hash: String,
    size_bytes: u64,
    /// The used bitmap, frozen at the point in time.
    old: Option<String>,
    /// Records what is written since.
    pending: String,
    id: Id,
}

impl AccessBitmaps {
    /// Lets everybody use the bitmaps again: the node is about to close, at QEMU's exit.
    pub(super) fn let_go(&self, main_loop: MainLoop, source: Bds) {
        for name in self.old.iter().chain([&self.pending]) {
            if let Some(bitmap) = Bitmap::find(main_loop, source, name) {
                bitmap.set_busy(main_loop, false);
            }
        }
    }

    /// Leaves the one bitmap that the next setup will find. Everything is drained.
    ///
    /// Returns the name of a bitmap whose stored copy is to be removed once nothing is drained.
    ///
    /// # Errors
    /// What failed; no bitmap is left then, so that the next backup is a full one.
    pub(super) fn settle(
        &self,
        main_loop: MainLoop,
        source: Bds,
        success: bool,
    ) -> Result<Option<String>, Error> {
        self.let_go(main_loop, source);
        let old = self.old.as_ref().and_then(|name| Bitmap::find(main_loop, source, name));
        let new = Bitmap::find(main_loop, source, &self.pending);
        let stored = old.filter(|old| old.is_persistent(main_loop)).and(self.old.clone());
        let settled = self.merge(main_loop, source, old, new, success);
        for bitmap in old.into_iter().chain(new) {
            bitmap.release(main_loop)?;
        }
        settled.map(|()| stored)
    }

    fn merge(
        &self,
        main_loop: MainLoop,
        source: Bds,
        old: Option<Bitmap>,
        new: Option<Bitmap>,
        success: bool,
    ) -> Result<(), Error> {
        let gone = |name: &str| Error::new(format!("bitmap '{name}' is gone"));
        let new = new.ok_or_else(|| gone(&self.pending))?;
        if let (Some(name), None) = (&self.old, old) {
            return Err(gone(name));
        }
        let old_name = self.old.as_deref().and_then(BitmapName::parse);
        let name = bitmap_name::settled(
            &self.target_hash,
            self.size_bytes,
            old_name.as_ref(),
            &self.id,
            success,
        );
        let granularity = new.granularity_bytes(main_loop);
        let settled = Bitmap::create(main_loop, source, granularity, &name.to_string())?;
        let parts = [Some(new), old.filter(|_| !success)];
        for part in parts.into_iter().flatten() {
            if let Err(error) = settled.merge_from(main_loop, part) {
                settled.release(main_loop)?;
                return Err(error);
            }
        }
        settled.record(true);
        Ok(())
    }
}
