// SPDX-License-Identifier: GPL-2.0-or-later
//! Bitmaps of raw disks that are kept in files: the commands `backup-access-bitmap-load` and
//! `-unload`, and what happens when QEMU closes such a disk.
//!
//! A file is sealed only while nobody can write to the disk. Loading unseals it before the bitmap
//! exists; the sentinel node seals it again when the disk is closed cleanly. So after a crash the
//! file says that it was in use, and nobody believes it.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use fleece::bitmap_file::{BitmapFile, Seal, Storage, StoredBitmap, max_file_bytes};
use fleece::bitmap_name::BitmapName;

use super::LoadRequest;
use super::registry::{self, Operation};
use super::{bitmap_file, bitmaps, guard, request, status};
use crate::fault;
use crate::qemu::bitmap::Bitmap;
use crate::qemu::error::Error;
use crate::qemu::glib::sha256_hex;
use crate::qemu::graph::{Bds, Drained, Holder, NodeRef};
use crate::qemu::main_loop::MainLoop;
use crate::qemu::sentinel::SENTINEL_DRIVER;
use crate::qemu::try_guard;

/// What to do when a backup must begin anew.
const START_AGAIN: &str = "a full backup is needed: remove the file and load again";

/// A disk whose bitmap is kept in a file.
#[derive(Debug)]
struct Loaded {
    target_id: String,
    source_node: String,
    sentinel_node: String,
    path: PathBuf,
    /// Owns the sentinel. At QEMU's exit it stays: QEMU is walking over all BlockBackends then.
    _owner: Holder,
    stage: Stage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Open,
    /// QEMU exits, and an access must be settled before the file can be sealed.
    Waiting,
    Closed,
}

static LOADED: Mutex<Vec<Loaded>> = Mutex::new(Vec::new());

/// Never held across a call that polls.
fn lock() -> MutexGuard<'static, Vec<Loaded>> {
    LOADED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The disk and the file of a request.
struct Place<'a> {
    target_id: &'a str,
    target_hash: String,
    path: &'a Path,
    source: Bds,
    source_node: String,
    size_bytes: u64,
    storage: Storage,
}

/// Keeps the bitmap of a raw disk in a file from now on, and takes over what the file has. Whether
/// it had a bitmap.
///
/// # Errors
/// The request is not acceptable, or the file is not to be believed; nothing has changed then.
pub fn load(main_loop: MainLoop, request: &LoadRequest) -> Result<bool, Error> {
    let _operation = Operation::begin("backup-access-bitmap-load")?;
    request::check_target_id(&request.target_id)?;
    let named = |error: Error| error.context(&format!("device '{}'", request.device));
    let in_file = |error: Error| named(error.context(&format!("bitmap file '{}'", request.file)));
    let path = Path::new(&request.file);
    if !path.is_absolute() || path.file_name().is_none() {
        return Err(in_file(Error::new("must be named by an absolute path")));
    }
    let place = place(main_loop, request, path).map_err(named)?;
    let old = bitmap_file::read(path, max_file_bytes(place.size_bytes)).map_err(in_file)?;
    let stored = match &old {
        None => None,
        Some(bytes) => check_file(&place, bytes, request.trust_unmodified).map_err(in_file)?,
    };
    let had_one = stored.is_some();
    let in_use = encode(&place.target_hash, None).map_err(in_file)?;
    let taken = bitmap_file::replace(path, &in_use)
        .map_err(in_file)
        .and_then(|()| try_guard(|| take_over(main_loop, &place, stored)).unwrap_or_else(died))
        .map_err(named);
    match taken {
        Ok(owner) => {
            lock().push(Loaded {
                target_id: request.target_id.clone(),
                sentinel_node: sentinel_name(place.target_id, &place.source_node),
                source_node: place.source_node,
                path: path.to_owned(),
                _owner: owner,
                stage: Stage::Open,
            });
            Ok(had_one)
        }
        Err(error) => Err(give_back(main_loop, &place, old.as_deref(), error)),
    }
}

fn died<T>() -> Result<T, Error> {
    Err(Error::new("internal error (see QEMU's log)"))
}

/// Checks everything but the file. Nothing is changed.
fn place<'a>(
    main_loop: MainLoop,
    request: &'a LoadRequest,
    path: &'a Path,
) -> Result<Place<'a>, Error> {
    let source = request::resolve(main_loop, &request.device)?.skip_filters(main_loop);
    let source_node = source.node_name(main_loop);
    let fault = |text: String| Err(Error::new(text));
    if let Some(target) = registry::lock().target_of_source(&source_node) {
        return fault(format!("a backup access of target '{target}' is active"));
    }
    for loaded in lock().iter() {
        let file = loaded.path.display();
        if loaded.source_node == source_node && loaded.target_id == request.target_id {
            return fault(format!("the bitmap file '{file}' of this target is loaded already"));
        }
        if loaded.path == path {
            let node = &loaded.source_node;
            return fault(format!("the bitmap file '{file}' is loaded for node '{node}'"));
        }
    }
    if !source.is_inserted(main_loop) {
        return fault("there is no medium in it".to_owned());
    }
    if source.is_inactive(main_loop) {
        return fault("it is inactive (a migration is going on or has handed it over)".to_owned());
    }
    if source.is_read_only(main_loop) {
        return fault("it is read-only".to_owned());
    }
    if Bitmap::are_stored_by(main_loop, source) {
        return fault("its image stores bitmaps itself: there is nothing to load".to_owned());
    }
    if source.may_grow(main_loop) {
        return fault("it is the storage of another image; name the disk above it".to_owned());
    }
    let target_hash = bitmaps::hash_of(&request.target_id);
    if let Some(bitmap) = bitmaps::all_of_target(main_loop, source, &target_hash).first() {
        let name = bitmap.name(main_loop);
        return fault(format!("it already has the bitmap '{name}' of this target"));
    }
    if !source.is_unwritten(main_loop) {
        return fault(written());
    }
    if main_loop.vm_has_run() && source.may_be_written(main_loop) {
        return fault(
            "the guest has run; load before it starts, or before the disk is plugged in".to_owned(),
        );
    }
    Ok(Place {
        target_id: &request.target_id,
        target_hash,
        path,
        source,
        size_bytes: source.length(main_loop)?,
        storage: bitmap_file::storage_of(main_loop, source)?,
        source_node,
    })
}

fn written() -> String {
    "it was written to since it was opened; load before the guest starts".to_owned()
}

/// The bitmap of a file, if the file can be believed.
fn check_file(
    place: &Place<'_>,
    bytes: &[u8],
    trust_unmodified: bool,
) -> Result<Option<StoredBitmap>, Error> {
    let fault = |text: &str| Err(Error::new(format!("{text}; {START_AGAIN}")));
    let file = match BitmapFile::decode(bytes) {
        Ok(file) => file,
        Err(damage) => return fault(&damage.to_string()),
    };
    if file.target_hash != place.target_hash {
        return Err(Error::new("belongs to another target"));
    }
    let Some(seal) = file.seal else {
        return fault("was in use when QEMU ended without closing the disk");
    };
    if seal.size_bytes != place.size_bytes {
        return fault(&format!(
            "is of a disk of {} bytes, this one has {} bytes",
            seal.size_bytes, place.size_bytes
        ));
    }
    match (seal.storage, place.storage) {
        (then @ Storage::File { .. }, now @ Storage::File { .. }) if then == now => {}
        (Storage::File { .. }, Storage::File { .. }) => {
            return fault(
                "does not fit the disk, whose file was changed or replaced since (other size, \
                 inode or ctime)",
            );
        }
        (Storage::BlockDevice, Storage::BlockDevice) | (Storage::Unknown, Storage::Unknown) => {
            if !trust_unmodified {
                return Err(Error::new(format!(
                    "cannot be checked against the disk, which is no regular file: give \
                     trust-unmodified if nobody changed it since; else {START_AGAIN}"
                )));
            }
        }
        _ => return fault("is of a disk that was stored in another way"),
    }
    Ok(seal.bitmap)
}

fn encode(target_hash: &str, seal: Option<Seal>) -> Result<Vec<u8>, Error> {
    let file = BitmapFile { target_hash: target_hash.to_owned(), seal };
    file.encode().map_err(|_| Error::new("there is no memory for its content"))
}

fn sentinel_name(target_id: &str, source_node: &str) -> String {
    let hash = sha256_hex(format!("{target_id}\0{source_node}").as_bytes());
    format!("ba-{}-2", &hash[..16])
}

/// Puts the sentinel beside the disk, and makes the bitmap. On an error nothing is left.
fn take_over(
    main_loop: MainLoop,
    place: &Place<'_>,
    stored: Option<StoredBitmap>,
) -> Result<Holder, Error> {
    let name = sentinel_name(place.target_id, &place.source_node);
    // Opening a node moves what is below it to the main context, unless somebody objects.
    let pin = Holder::new(main_loop, place.source)?;
    let options = [("driver", SENTINEL_DRIVER), ("node-name", &name), ("file", &place.source_node)];
    let sentinel = NodeRef::open(main_loop, &options, 0)?;
    // Nodes with an iothread are taken away while everything is drained.
    let drained = Drained::new(main_loop);
    let owner = Holder::new(main_loop, sentinel.node());
    drop(sentinel);
    let owner = owner?;
    fault::point("load_sentinel");
    if !place.source.is_unwritten(main_loop) {
        return Err(Error::new(written()));
    }
    if let Some(stored) = stored {
        make(main_loop, place, stored)?;
    }
    drop(pin);
    owner.allow_context_change(main_loop, true);
    drop(drained);
    Ok(owner)
}

/// Makes the bitmap as it was.
fn make(main_loop: MainLoop, place: &Place<'_>, mut stored: StoredBitmap) -> Result<(), Error> {
    let granularity = stored.granularity_bytes;
    let bitmap = Bitmap::create(main_loop, place.source, granularity, &stored.name)?;
    let guarded = if bitmap.set_bits(main_loop, &mut stored.bits) {
        guard::renew(main_loop, place.source, &place.target_hash, place.size_bytes).map(drop)
    } else {
        Err(Error::new("the bitmap has another length than the disk"))
    };
    match guarded {
        Ok(()) => bitmap.record(true),
        Err(error) => {
            bitmap.release(main_loop)?;
            return Err(error);
        }
    }
    Ok(())
}

/// Seals the file again after a load that failed, or removes one that was not there; the error.
fn give_back(main_loop: MainLoop, place: &Place<'_>, old: Option<&[u8]>, error: Error) -> Error {
    if !place.source.is_unwritten(main_loop) {
        return error;
    }
    release_bitmaps(main_loop, place.source, &place.target_hash);
    let restored = match old {
        Some(bytes) => bitmap_file::replace(place.path, bytes),
        None => std::fs::remove_file(place.path).map_err(|error| Error::new(error.to_string())),
    };
    match restored {
        Ok(()) => error,
        Err(other) => Error::new(format!("{error}; its file stays unsealed: {other}")),
    }
}

fn release_bitmaps(main_loop: MainLoop, source: Bds, target_hash: &str) {
    for bitmap in bitmaps::all_of_target(main_loop, source, target_hash) {
        // A busy one stays.
        drop(bitmap.release(main_loop));
    }
}

/// Writes the bitmap of a disk that nobody writes to into its file.
fn seal(main_loop: MainLoop, source: Bds, target_id: &str, path: &Path) -> Result<(), Error> {
    let target_hash = bitmaps::hash_of(target_id);
    if source.is_inactive(main_loop) {
        return Err(Error::new("the disk was handed over by a migration"));
    }
    source.flush(main_loop)?;
    fault::point("seal");
    let size_bytes = source.length(main_loop)?;
    let storage = bitmap_file::storage_of(main_loop, source)?;
    bitmap_file::wait_for_next_ctime(storage);
    let is_settled = |bitmap: &Bitmap| {
        bitmap.is_sound(main_loop)
            && bitmap.size_bytes(main_loop) == size_bytes
            && BitmapName::parse(&bitmap.name(main_loop)).is_some_and(|name| name.is_settled())
    };
    let mut bitmaps = bitmaps::all_of_target(main_loop, source, &target_hash);
    bitmaps.retain(is_settled);
    let guarded = guard::is_intact(main_loop, source, &target_hash, size_bytes);
    let bitmap = match bitmaps.first().filter(|_| guarded) {
        None => None,
        Some(bitmap) => Some(StoredBitmap {
            name: bitmap.name(main_loop),
            granularity_bytes: bitmap.granularity_bytes(main_loop),
            bits: bitmap
                .to_bits(main_loop)
                .ok_or_else(|| Error::new("there is no memory for its content"))?,
        }),
    };
    let bytes = encode(&target_hash, Some(Seal { size_bytes, storage, bitmap }))?;
    bitmap_file::replace(path, &bytes)
}

/// Seals the file of a disk that nobody uses any more, and lets the disk go.
///
/// # Errors
/// There is no such file, somebody may write to the disk, or the file cannot be written; the file
/// stays loaded then.
pub fn unload(main_loop: MainLoop, device: &str, target_id: &str) -> Result<(), Error> {
    let _operation = Operation::begin("backup-access-bitmap-unload")?;
    request::check_target_id(target_id)?;
    let named = |error: Error| error.context(&format!("device '{device}'"));
    let source = request::resolve(main_loop, device).map_err(named)?.skip_filters(main_loop);
    let source_node = source.node_name(main_loop);
    let path = path_of(target_id, &source_node).ok_or_else(|| {
        named(Error::new(format!("no bitmap file of target '{target_id}' is loaded")))
    })?;
    if let Some(target) = registry::lock().target_of_source(&source_node) {
        let text = format!("a backup access of target '{target}' is active; tear it down first");
        return Err(named(Error::new(text)));
    }
    if source.may_be_written(main_loop) {
        let users = source.parents(main_loop).into_iter().map(|user| user.description);
        let users = users.filter(|user| !user.is_empty()).collect::<Vec<_>>().join(", ");
        let text = format!("it may still be written to ({users}); end its use first");
        return Err(named(Error::new(text)));
    }
    let in_file = |error: Error| named(error.context(&format!("bitmap file '{}'", path.display())));
    let target_hash = bitmaps::hash_of(target_id);
    let all = bitmaps::all_of_target(main_loop, source, &target_hash);
    bitmaps::check_idle(main_loop, source, &all).map_err(named)?;
    seal(main_loop, source, target_id, &path).map_err(in_file)?;
    let source = NodeRef::new(main_loop, source);
    let taken = {
        let mut loaded = lock();
        let index = loaded.iter().position(|entry| entry.path == path);
        index.map(|index| loaded.remove(index))
    };
    release_bitmaps(main_loop, source.node(), &target_hash);
    let drained = Drained::new(main_loop);
    drop(taken);
    drop(drained);
    Ok(())
}

fn path_of(target_id: &str, source_node: &str) -> Option<PathBuf> {
    let loaded = lock();
    let entry = loaded
        .iter()
        .find(|entry| entry.target_id == target_id && entry.source_node == source_node)?;
    Some(entry.path.clone())
}

/// A sentinel closes, and with it the disk: QEMU exits. The disk is still there.
pub fn sentinel_closed(main_loop: MainLoop, sentinel_node: &str) {
    let found = {
        let mut loaded = lock();
        let mut entries = loaded.iter_mut();
        let Some(entry) = entries.find(|entry| entry.sentinel_node == sentinel_node) else {
            return;
        };
        let waits = registry::lock().is_unsettled(&entry.target_id, &entry.source_node);
        entry.stage = if waits { Stage::Waiting } else { Stage::Closed };
        (!waits).then(|| (entry.target_id.clone(), entry.source_node.clone(), entry.path.clone()))
    };
    if let Some((target_id, source_node, path)) = found {
        seal_at_exit(main_loop, &target_id, &source_node, &path);
    }
}

/// An access is settled at QEMU's exit: what waited for that can be sealed.
pub(super) fn settled_at_exit(main_loop: MainLoop, target_id: &str, source_node: &str) {
    let found = {
        let mut loaded = lock();
        let mut entries = loaded.iter_mut();
        let Some(entry) = entries.find(|entry| {
            entry.target_id == target_id
                && entry.source_node == source_node
                && entry.stage == Stage::Waiting
        }) else {
            return;
        };
        entry.stage = Stage::Closed;
        entry.path.clone()
    };
    seal_at_exit(main_loop, target_id, source_node, &found);
}

fn seal_at_exit(main_loop: MainLoop, target_id: &str, source_node: &str, path: &Path) {
    let sealed = match Bds::find(main_loop, source_node) {
        Some(source) => seal(main_loop, source, target_id, path),
        None => Err(Error::new("the disk is gone")),
    };
    if let Err(error) = sealed {
        let file = path.display();
        status::warn(&format!(
            "bitmap file '{file}' of node '{source_node}' stays unsealed: {error}"
        ));
    }
}
