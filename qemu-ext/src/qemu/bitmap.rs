// SPDX-License-Identifier: GPL-2.0-or-later
//! Dirty bitmaps of a node.

use core::ops::Range;
use core::ptr::NonNull;

use fleece::NeedMap;
use qemu_ext_sys as sys;

use super::error::{Error, Slot};
use super::glib;
use super::graph::Bds;
use super::main_loop::MainLoop;

/// As coarse as it can be: such a bitmap takes next to no memory.
const SILENT_GRANULARITY_BYTES: u32 = 1 << 30;

/// A dirty bitmap. It is a plain pointer: looked up by name, used at once, and kept only while the
/// bitmap is marked busy by us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bitmap(NonNull<sys::BdrvDirtyBitmap>);

impl Bitmap {
    /// All named bitmaps of the node.
    pub fn all(_: MainLoop, node: Bds) -> Vec<Self> {
        let mut all = Vec::new();
        // SAFETY: main loop: the list does not change meanwhile.
        let mut next = unsafe { sys::bdrv_dirty_bitmap_first(node.as_ptr()) };
        while let Some(bitmap) = NonNull::new(next) {
            // SAFETY: as above.
            unsafe {
                if !sys::bdrv_dirty_bitmap_name(bitmap.as_ptr()).is_null() {
                    all.push(Self(bitmap));
                }
                next = sys::bdrv_dirty_bitmap_next(bitmap.as_ptr());
            }
        }
        all
    }

    /// The node's bitmap of this name.
    pub fn find(_: MainLoop, node: Bds, name: &str) -> Option<Self> {
        let name = glib::c_string(name);
        // SAFETY: main loop, the node is there.
        let bitmap = unsafe { sys::bdrv_find_dirty_bitmap(node.as_ptr(), name.as_ptr()) };
        NonNull::new(bitmap).map(Self)
    }

    /// A new bitmap that is empty and does not record yet. The granularity is a power of two of
    /// at least 512 bytes.
    ///
    /// # Errors
    /// QEMU's error.
    pub fn create(
        _: MainLoop,
        node: Bds,
        granularity_bytes: u32,
        name: &str,
    ) -> Result<Self, Error> {
        if !granularity_bytes.is_power_of_two() || granularity_bytes < 512 {
            return Err(Error::new(format!("bitmap granularity {granularity_bytes} is invalid")));
        }
        let name = glib::c_string(name);
        // SAFETY: main loop, outside of coroutines; the granularity is acceptable.
        unsafe { Self::create_at(node, granularity_bytes, name.as_ptr()) }
    }

    /// A bitmap without a name that never records and is there for its own sake: QEMU loads no
    /// internal snapshot into a node that has one. To be released before the node closes.
    ///
    /// # Errors
    /// QEMU's error.
    pub fn create_silent(_: MainLoop, node: Bds) -> Result<Self, Error> {
        // SAFETY: main loop, outside of coroutines; no name is a name, too.
        unsafe { Self::create_at(node, SILENT_GRANULARITY_BYTES, core::ptr::null()) }
    }

    /// # Safety
    /// Main loop, outside of coroutines; the granularity is a power of two of at least 512, the
    /// name a C string or null.
    unsafe fn create_at(
        node: Bds,
        granularity_bytes: u32,
        name: *const core::ffi::c_char,
    ) -> Result<Self, Error> {
        let mut error = Slot::new();
        // SAFETY: as stated.
        let bitmap = unsafe {
            sys::bdrv_create_dirty_bitmap(node.as_ptr(), granularity_bytes, name, error.as_errp())
        };
        let bitmap = Self(NonNull::new(bitmap).ok_or_else(|| error.take())?);
        bitmap.record(false);
        Ok(bitmap)
    }

    /// Frees the bitmap; a busy one stays.
    ///
    /// # Errors
    /// Someone uses it.
    pub fn release(self, main_loop: MainLoop) -> Result<(), Error> {
        if self.is_busy(main_loop) {
            let name = self.name(main_loop);
            return Err(Error::new(format!("bitmap '{name}' is in use by another operation")));
        }
        // SAFETY: main loop; nobody uses it.
        unsafe { sys::bdrv_release_dirty_bitmap(self.0.as_ptr()) };
        Ok(())
    }

    /// Removes what is stored of it in the image; the bitmap itself stays.
    ///
    /// # Errors
    /// The image's error.
    pub fn remove_stored(main_loop: MainLoop, node: Bds, name: &str) -> Result<(), Error> {
        let _ = main_loop;
        let name = glib::c_string(name);
        let mut error = Slot::new();
        // SAFETY: main loop, outside of coroutines.
        let result = unsafe {
            sys::bdrv_remove_persistent_dirty_bitmap(node.as_ptr(), name.as_ptr(), error.as_errp())
        };
        if result < 0 { Err(error.take()) } else { Ok(()) }
    }

    /// The bitmap's name.
    pub fn name(self, _: MainLoop) -> String {
        // SAFETY: main loop, the bitmap is there.
        unsafe { glib::text(sys::bdrv_dirty_bitmap_name(self.0.as_ptr())) }
    }

    /// Whether someone, possibly we, uses it.
    pub fn is_busy(self, _: MainLoop) -> bool {
        // SAFETY: main loop, the bitmap is there.
        unsafe { sys::ba_bitmap_is_busy(self.0.as_ptr()) }
    }

    /// Keeps everybody from exporting, changing or releasing it, or ends that.
    pub fn set_busy(self, _: MainLoop, busy: bool) {
        // SAFETY: main loop, the bitmap is there.
        unsafe { sys::bdrv_dirty_bitmap_set_busy(self.0.as_ptr(), busy) };
    }

    /// Starts or stops recording of writes.
    pub fn record(self, on: bool) {
        // SAFETY: the bitmap is there; the call takes the bitmap's lock.
        unsafe {
            if on {
                sys::bdrv_enable_dirty_bitmap(self.0.as_ptr());
            } else {
                sys::bdrv_disable_dirty_bitmap(self.0.as_ptr());
            }
        }
    }

    /// Whether it records writes.
    fn is_recording(self, _: MainLoop) -> bool {
        // SAFETY: main loop, the bitmap is there.
        unsafe { sys::bdrv_dirty_bitmap_enabled(self.0.as_ptr()) }
    }

    /// Whether it can be neither read nor trusted: its image was not closed cleanly.
    fn is_inconsistent(self, _: MainLoop) -> bool {
        // SAFETY: main loop, the bitmap is there.
        unsafe { sys::bdrv_dirty_bitmap_inconsistent(self.0.as_ptr()) }
    }

    fn is_usable(self, main_loop: MainLoop) -> bool {
        !self.is_inconsistent(main_loop) && !self.is_read_only(main_loop)
    }

    /// Whether it has recorded all writes since it was made and can be used.
    pub fn is_sound(self, main_loop: MainLoop) -> bool {
        self.is_recording(main_loop) && self.is_usable(main_loop)
    }

    /// Whether it records nothing and can be used.
    pub fn is_frozen(self, main_loop: MainLoop) -> bool {
        !self.is_recording(main_loop) && self.is_usable(main_loop)
    }

    /// Whether it cannot be changed because its image is read-only.
    pub fn is_read_only(self, _: MainLoop) -> bool {
        // SAFETY: main loop, the bitmap is there.
        unsafe { sys::bdrv_dirty_bitmap_readonly(self.0.as_ptr()) }
    }

    /// Whether it is stored in the image.
    pub fn is_persistent(self, _: MainLoop) -> bool {
        // SAFETY: main loop, the bitmap is there.
        unsafe { sys::bdrv_dirty_bitmap_get_persistence(self.0.as_ptr()) }
    }

    /// Whether the node's image stores bitmaps when it is closed.
    pub fn are_stored_by(_: MainLoop, node: Bds) -> bool {
        // SAFETY: main loop, the node is there.
        unsafe { sys::bdrv_supports_persistent_dirty_bitmap(node.as_ptr()) }
    }

    /// Whether the node's image would store a new bitmap of this name when it is closed; false
    /// where it stores none at all.
    ///
    /// # Errors
    /// It stores bitmaps, but not this one.
    pub fn is_storable(
        main_loop: MainLoop,
        node: Bds,
        granularity_bytes: u32,
        name: &str,
    ) -> Result<bool, Error> {
        if !Self::are_stored_by(main_loop, node) || node.is_read_only(main_loop) {
            return Ok(false);
        }
        let name = glib::c_string(name);
        let mut error = Slot::new();
        // SAFETY: main loop, outside of coroutines.
        let storable = unsafe {
            sys::bdrv_can_store_new_dirty_bitmap(
                node.as_ptr(),
                name.as_ptr(),
                granularity_bytes,
                error.as_errp(),
            )
        };
        if storable { Ok(true) } else { Err(error.take()) }
    }

    /// Lets the image store it when it is closed.
    pub fn make_persistent(self, _: MainLoop) {
        // SAFETY: main loop, the bitmap is there.
        unsafe { sys::bdrv_dirty_bitmap_set_persistence(self.0.as_ptr(), true) };
    }

    /// Bytes per bit.
    pub fn granularity_bytes(self, _: MainLoop) -> u32 {
        // SAFETY: main loop, the bitmap is there.
        unsafe { sys::bdrv_dirty_bitmap_granularity(self.0.as_ptr()) }
    }

    /// Bytes of the disk that it covers.
    pub fn size_bytes(self, _: MainLoop) -> u64 {
        // SAFETY: main loop, the bitmap is there.
        let size = unsafe { sys::bdrv_dirty_bitmap_size(self.0.as_ptr()) };
        u64::try_from(size).unwrap_or(0)
    }

    /// Marks everything dirty.
    pub fn set_all(self, main_loop: MainLoop) {
        self.set(main_loop, 0, self.size_bytes(main_loop));
    }

    /// Marks a range dirty, as far as it is on the disk.
    pub fn set(self, main_loop: MainLoop, offset: u64, len: u64) {
        let size = self.size_bytes(main_loop);
        let offset = offset.min(size);
        let len = len.min(size - offset);
        let (offset, len) = (i64::try_from(offset), i64::try_from(len));
        if let (Ok(offset), Ok(len @ 1..)) = (offset, len) {
            // SAFETY: main loop; the bitmap is there and ours to change; the range is inside.
            unsafe { sys::bdrv_set_dirty_bitmap(self.0.as_ptr(), offset, len) };
        }
    }

    /// Whether the byte at this offset is dirty; false beyond the end.
    pub fn is_dirty(self, main_loop: MainLoop, offset: u64) -> bool {
        let Ok(at) = i64::try_from(offset) else { return false };
        // SAFETY: main loop; the bitmap is there and the byte inside of it.
        offset < self.size_bytes(main_loop)
            && unsafe { sys::bdrv_dirty_bitmap_get(self.0.as_ptr(), at) }
    }

    /// Adds what is dirty in the other one.
    ///
    /// # Errors
    /// One of them is busy, or their sizes differ.
    pub fn merge_from(self, _: MainLoop, other: Self) -> Result<(), Error> {
        let mut error = Slot::new();
        // SAFETY: main loop; both bitmaps are there.
        let merged = unsafe {
            sys::bdrv_merge_dirty_bitmap(
                self.0.as_ptr(),
                other.0.as_ptr(),
                core::ptr::null_mut(),
                error.as_errp(),
            )
        };
        if merged { Ok(()) } else { Err(error.take()) }
    }

    /// Its bits: one for each granule, in words of 64. Nobody writes to the disk meanwhile. None
    /// without the memory for them.
    pub fn to_bits(self, main_loop: MainLoop) -> Option<Vec<u8>> {
        let size = self.size_bytes(main_loop);
        let mut bits = Vec::new();
        let len = self.bits_len(main_loop)?;
        bits.try_reserve_exact(len).ok()?;
        bits.resize(len, 0);
        // SAFETY: main loop; the buffer has as many bytes as QEMU asks for.
        unsafe {
            sys::bdrv_dirty_bitmap_serialize_part(self.0.as_ptr(), bits.as_mut_ptr(), 0, size);
        }
        Some(bits)
    }

    /// Sets all bits at once, as [`Bitmap::to_bits`] gives them; false if they are not as many. It
    /// does not record yet.
    pub fn set_bits(self, main_loop: MainLoop, bits: &mut [u8]) -> bool {
        let size = self.size_bytes(main_loop);
        if self.bits_len(main_loop) != Some(bits.len()) {
            return false;
        }
        // SAFETY: main loop; the buffer has as many bytes as QEMU asks for.
        unsafe {
            sys::bdrv_dirty_bitmap_deserialize_part(
                self.0.as_ptr(),
                bits.as_mut_ptr(),
                0,
                size,
                true,
            );
        }
        true
    }

    fn bits_len(self, main_loop: MainLoop) -> Option<usize> {
        let size = self.size_bytes(main_loop);
        // SAFETY: main loop, the bitmap is there.
        let len = unsafe { sys::bdrv_dirty_bitmap_serialization_size(self.0.as_ptr(), 0, size) };
        usize::try_from(len).ok().filter(|_| size > 0)
    }

    /// Dirty bytes, of which none lies beyond the end of the disk.
    pub fn dirty_bytes(self, main_loop: MainLoop) -> u64 {
        let size = self.size_bytes(main_loop);
        let granularity = u64::from(self.granularity_bytes(main_loop));
        let overhang = size.next_multiple_of(granularity) - size;
        // SAFETY: main loop; the bitmap is there; the last byte exists if the size is not zero.
        let (count, tail) = unsafe {
            let last = i64::try_from(size.saturating_sub(1)).unwrap_or(i64::MAX);
            let tail = overhang > 0 && sys::bdrv_dirty_bitmap_get(self.0.as_ptr(), last);
            (sys::bdrv_get_dirty_count(self.0.as_ptr()), tail)
        };
        let count = u64::try_from(count).unwrap_or(0);
        if tail { count.saturating_sub(overhang) } else { count }
    }
}

/// A bitmap as the map of what is needed: frozen (it records nothing) and marked busy by us while
/// this exists, so that it neither changes nor goes away, and every thread may read it.
#[derive(Debug)]
pub struct FrozenBitmap(Bitmap);

// SAFETY: the bitmap does not change while this exists, see above.
unsafe impl Send for FrozenBitmap {}
// SAFETY: as for `Send`; reading has no side effects.
unsafe impl Sync for FrozenBitmap {}

impl FrozenBitmap {
    /// Uses a bitmap that is marked busy by us and is not recording whenever the map is asked.
    pub fn new(bitmap: Bitmap) -> Self {
        Self(bitmap)
    }
}

impl NeedMap for FrozenBitmap {
    fn next_needed(&self, start: u64, end: u64) -> Option<Range<u64>> {
        let start = i64::try_from(start).ok()?;
        let end = i64::try_from(end).unwrap_or(i64::MAX);
        let (mut area_start, mut area_len) = (0, 0);
        // SAFETY: the bitmap is there and does not change; the arguments are not negative.
        let found = unsafe {
            sys::bdrv_dirty_bitmap_next_dirty_area(
                self.0.0.as_ptr(),
                start,
                end,
                i64::MAX,
                &raw mut area_start,
                &raw mut area_len,
            )
        };
        let first = u64::try_from(area_start).ok()?;
        let len = u64::try_from(area_len).ok()?;
        found.then_some(first..first.saturating_add(len))
    }
}
