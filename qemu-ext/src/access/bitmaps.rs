// SPDX-License-Identifier: GPL-2.0-or-later
//! The target's dirty bitmaps on one disk: planned, switched at the point in time, undone when the
//! setup fails, settled by the teardown.
//!
//! The real bitmaps stay on the source node and are busy by us as long as the access exists, so
//! that nobody exports, changes or releases them; the client gets a copy on the snapshot node.
//!
//! A bitmap that somebody else made busy is never touched. Where the node's image can store
//! bitmaps, the one that a teardown leaves is stored by QEMU when the disk is closed. Of an access
//! nothing new is stored: after a crash the image has at most the old bitmap, marked as in use,
//! which QEMU loads as inconsistent and the next setup finds invalid.

use std::hash::{BuildHasher, Hasher, RandomState};

use fleece::NeedMap;
use fleece::bitmap_name::{
    self, Action, BitmapName, Decision, Ending, Existing, HASH_LEN, Id, Mode, belongs_to,
};

use super::{BitmapInfo, DeviceRequest, Readable, RemovedBitmap, guard, registry, request};
use crate::fault;
use crate::qemu::bitmap::{Bitmap, FrozenBitmap};
use crate::qemu::error::Error;
use crate::qemu::glib::sha256_hex;
use crate::qemu::graph::{Bds, NodeRef};
use crate::qemu::main_loop::MainLoop;
use crate::qemu::users;

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
    readable: Readable,
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
        let target_hash = hash_of(target_id);
        let guard_name = guard::name(&target_hash);
        let (guards, bitmaps): (Vec<_>, Vec<_>) = all_of_target(main_loop, source, &target_hash)
            .into_iter()
            .partition(|bitmap| bitmap.name(main_loop) == guard_name);
        let guarded = guard::is_intact(main_loop, source, &target_hash, size_bytes);
        let existing: Vec<Existing> = bitmaps
            .iter()
            .map(|bitmap| Existing {
                name: bitmap.name(main_loop),
                sound: guarded
                    && bitmap.is_sound(main_loop)
                    && bitmap.size_bytes(main_loop) == size_bytes,
            })
            .collect();
        let generation = request.generation.as_deref();
        let Decision { action, used, removed } =
            bitmap_name::decide(request.mode, &existing, size_bytes, generation);
        if request.mode != Mode::Omitted {
            check_idle(main_loop, source, &bitmaps)?;
            check_idle(main_loop, source, &guards)?;
        }
        let guard = (request.mode == Mode::None && !guards.is_empty()).then_some(guard_name);
        let used_granularity = used.map(|index| bitmaps[index].granularity_bytes(main_loop));
        let name_of = |index: usize| existing[index].name.clone();
        Ok(Self {
            target_hash,
            size_bytes,
            action,
            used: used.map(name_of),
            removed: removed.into_iter().map(name_of).chain(guard).collect(),
            granularity_bytes: granularity_bytes
                .or(used_granularity)
                .unwrap_or(DEFAULT_GRANULARITY_BYTES),
            readable: request.readable,
            id: random_id(),
        })
    }

    fn pending_name(&self) -> String {
        let ids = vec![self.id.clone()];
        BitmapName::new(&self.target_hash, self.size_bytes, Ending::Pending, ids).to_string()
    }
}

/// What stands for the target in the names of its bitmaps.
pub(super) fn hash_of(target_id: &str) -> String {
    let mut hash = sha256_hex(target_id.as_bytes());
    hash.truncate(HASH_LEN);
    hash
}

/// The target's bitmaps on a disk, its guard among them.
pub(super) fn all_of_target(main_loop: MainLoop, source: Bds, target_hash: &str) -> Vec<Bitmap> {
    let mut bitmaps = Bitmap::all(main_loop, source);
    bitmaps.retain(|bitmap| belongs_to(&bitmap.name(main_loop), target_hash));
    bitmaps
}

/// Checks that nobody uses these bitmaps of a disk.
///
/// # Errors
/// Names the bitmap and, as far as QEMU tells, who uses it.
pub(super) fn check_idle(
    main_loop: MainLoop,
    source: Bds,
    bitmaps: &[Bitmap],
) -> Result<(), Error> {
    let Some(busy) = bitmaps.iter().find(|bitmap| bitmap.is_busy(main_loop)) else {
        return Ok(());
    };
    let name = busy.name(main_loop);
    let holder = match registry::lock().target_of_bitmap(&source.node_name(main_loop), &name) {
        Some(target) => format!("the backup access of target '{target}'"),
        None => match users::exports_and_jobs(main_loop, source).as_slice() {
            [] => "another operation".to_owned(),
            all => all.join(" or "),
        },
    };
    Err(Error::new(format!("its bitmap '{name}' is in use by {holder}")))
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
            Some(name) => Some(Bitmap::find(main_loop, source, name).ok_or_else(|| gone(name))?),
        };
        check_idle(main_loop, source, old.as_slice())?;
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
        let limits = self.old.filter(|_| self.plan.readable == Readable::Dirty);
        limits.map(|old| Box::new(FrozenBitmap::new(old)) as Box<dyn NeedMap>)
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
                // It cannot be in use, and what an image keeps of it is found inconsistent.
                drop(remove(main_loop, source, bitmap));
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

fn gone(name: &str) -> Error {
    Error::new(format!("bitmap '{name}' is gone"))
}

/// Removes a bitmap, stored or not.
///
/// # Errors
/// Somebody uses it, and it stays. Or its image failed: what the image has of it is marked as in
/// use, so nobody will use it.
fn remove(main_loop: MainLoop, source: Bds, bitmap: Bitmap) -> Result<(), Error> {
    check_idle(main_loop, source, &[bitmap])?;
    let (name, stored) = (bitmap.name(main_loop), bitmap.is_persistent(main_loop));
    let removed = if stored { Bitmap::remove_stored(main_loop, source, &name) } else { Ok(()) };
    bitmap.release(main_loop)?;
    removed
}

/// Removes all bitmaps of a target, of one device or of all disks. What was removed.
///
/// # Errors
/// One of them is in use or read-only, and nothing was removed; or an image cannot remove its copy.
pub fn remove_all(
    main_loop: MainLoop,
    target_id: &str,
    device: Option<&str>,
) -> Result<Vec<RemovedBitmap>, Error> {
    let _operation = registry::Operation::begin("backup-access-bitmap-remove")?;
    request::check_target_id(target_id)?;
    let nodes = match device {
        None => Bds::all(main_loop),
        Some(name) => {
            let named = |error: Error| error.context(&format!("device '{name}'"));
            let top = request::resolve(main_loop, name).map_err(named)?;
            vec![top.skip_filters(main_loop)]
        }
    };
    let hash = hash_of(target_id);
    let named = |node: Bds, error: Error| {
        let name = node.node_name(main_loop);
        error.context(&format!("target '{target_id}', node '{name}'"))
    };
    let mut disks = Vec::new();
    for node in nodes {
        let bitmaps = all_of_target(main_loop, node, &hash);
        check_idle(main_loop, node, &bitmaps).map_err(|error| named(node, error))?;
        if let Some(fixed) = bitmaps.iter().find(|bitmap| bitmap.is_read_only(main_loop)) {
            let text = format!("its bitmap '{}' is read-only", fixed.name(main_loop));
            return Err(named(node, Error::new(text)));
        }
        let names: Vec<String> = bitmaps.iter().map(|bitmap| bitmap.name(main_loop)).collect();
        // Removing waits for I/O.
        disks.push((NodeRef::new(main_loop, node), names));
    }
    let mut removed = Vec::new();
    for (disk, names) in disks {
        for bitmap_name in names {
            fault::point("bitmap_remove");
            if let Some(bitmap) = Bitmap::find(main_loop, disk.node(), &bitmap_name) {
                remove(main_loop, disk.node(), bitmap)
                    .map_err(|error| named(disk.node(), error))?;
                removed.push(RemovedBitmap {
                    node_name: disk.node().node_name(main_loop),
                    bitmap_name,
                });
            }
        }
    }
    Ok(removed)
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

/// What a settled disk still asks for.
#[derive(Debug, Default)]
pub(super) struct Settled {
    /// A bitmap whose stored copy is to be removed once nothing is drained.
    pub(super) stale: Option<String>,
    /// Why the image will not store the bitmap although it could store others.
    pub(super) unstored: Option<Error>,
}

impl Settled {
    /// Does what remains, with nothing drained by us; what went wrong.
    pub(super) fn finish(self, main_loop: MainLoop, source: Bds) -> Vec<String> {
        let unstored = self.unstored.map(|error| {
            format!("its bitmap is kept in RAM only and lost when QEMU ends: {error}")
        });
        let stale = self.stale.and_then(|name| {
            let error = Bitmap::remove_stored(main_loop, source, &name).err()?;
            Some(format!("the stored bitmap '{name}' stays: {error}"))
        });
        unstored.into_iter().chain(stale).collect()
    }
}

impl AccessBitmaps {
    /// Whether this bitmap is used by the access.
    pub(super) fn uses(&self, name: &str) -> bool {
        self.pending == name || self.old.as_deref() == Some(name)
    }

    /// Lets everybody use the bitmaps again.
    pub(super) fn let_go(&self, main_loop: MainLoop, source: Bds) {
        for name in self.old.iter().chain([&self.pending]) {
            if let Some(bitmap) = Bitmap::find(main_loop, source, name) {
                bitmap.set_busy(main_loop, false);
            }
        }
    }

    /// Leaves the one bitmap that the next setup will find. Nothing is written to the disk.
    ///
    /// # Errors
    /// What failed; no bitmap is left then, so that the next backup is a full one.
    pub(super) fn settle(
        &self,
        main_loop: MainLoop,
        source: Bds,
        success: bool,
    ) -> Result<Settled, Error> {
        self.let_go(main_loop, source);
        let old = self.old.as_ref().and_then(|name| Bitmap::find(main_loop, source, name));
        let new = Bitmap::find(main_loop, source, &self.pending);
        let stale = old.filter(|old| old.is_persistent(main_loop)).and(self.old.clone());
        let merged = self.merge(main_loop, source, old, new, success);
        for bitmap in old.into_iter().chain(new) {
            bitmap.release(main_loop)?;
        }
        Ok(Settled { stale, unstored: merged?.err() })
    }

    /// Makes the settled bitmap; within that, whether the image will store it, if it can store any.
    fn merge(
        &self,
        main_loop: MainLoop,
        source: Bds,
        old: Option<Bitmap>,
        new: Option<Bitmap>,
        success: bool,
    ) -> Result<Result<(), Error>, Error> {
        let new = new.ok_or_else(|| gone(&self.pending))?;
        if let (Some(name), None) = (&self.old, old) {
            return Err(gone(name));
        }
        let old_name = self.old.as_deref().and_then(BitmapName::parse);
        let id = &self.id;
        let name = bitmap_name::settled(
            &self.target_hash,
            self.size_bytes,
            old_name.as_ref(),
            id,
            success,
        )
        .to_string();
        let granularity = new.granularity_bytes(main_loop);
        let guard = guard::renew(main_loop, source, &self.target_hash, self.size_bytes)?;
        let storable = guard.and_then(|guard| {
            let storable = Bitmap::is_storable(main_loop, source, granularity, &name)?;
            Ok(guard && storable)
        });
        let settled = Bitmap::create(main_loop, source, granularity, &name)?;
        let parts = [Some(new), old.filter(|_| !success)];
        for part in parts.into_iter().flatten() {
            if let Err(error) = settled.merge_from(main_loop, part) {
                settled.release(main_loop)?;
                return Err(error);
            }
        }
        settled.record(true);
        Ok(storable.map(|storable| {
            if storable {
                settled.make_persistent(main_loop);
            }
        }))
    }
}
