// SPDX-License-Identifier: MIT OR Apache-2.0
//! Writing one disk's qcow2 image.
//!
//! `imago` writes it, on blocking threads: a trial of all this provider needs (relative backing
//! file name with its format, zero clusters over a base, areas smaller than a cluster over a base,
//! sizes that are no multiple of a cluster, many threads) gave images that `qemu-img check` and a
//! byte comparison find right, without a process and a socket per disk as `qemu-nbd` would need.
//! Two things it does not do are done here or in `chain`: it ignores encryption in a header it
//! opens, and it would open any file a header names.

use std::fs::File as StdFile;
use std::path::Path;

use imago::file::File;
use imago::format::drivers::ShallowMapping;
use imago::qcow2::Qcow2;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Storage,
    StorageOpenOptions,
};
use provider_api::{Error, Result};

use crate::areas::Area;
use crate::call::corrupt;
use crate::chain::Chain;
use crate::files;
use crate::limits::CLUSTER_BYTES;
use crate::manifest::backing_name;

/// An image being written.
#[derive(Debug)]
pub(crate) struct Image {
    access: FormatAccess<File>,
    /// A second handle of the file, for its size and the last sync.
    file: StdFile,
    /// For messages.
    path: String,
    is_increment: bool,
}

impl Image {
    /// Makes an image: standalone, or on top of a base that has been checked.
    pub(crate) fn create(
        path: &Path,
        device: &str,
        size_bytes: u64,
        base: Option<&Chain>,
    ) -> Result<Self> {
        let shown = path.display().to_string();
        let failed = |e| Error::io(format!("Cannot create image {shown}."), e);
        let file = files::create(path)?;
        let handle = file.try_clone().map_err(failed)?;
        let options = StorageOpenOptions::new().write(true).filename(path);
        let storage = File::from_open_file(file, options).map_err(failed)?;
        let backing = base.map(open_chain).transpose()?;
        let mut builder =
            Qcow2::<File>::create_builder(storage).size(size_bytes).cluster_size(cluster_size());
        if let Some(base) = base {
            builder = builder.backing(backing_name(base.top_archive(), device), "qcow2".to_owned());
        }
        let image = builder
            .create_open(DenyImplicitOpenGate::default(), |storage| {
                Ok(Qcow2::<File>::builder(storage).backing(backing).write(true))
            })
            .map_err(failed)?;
        Ok(Self {
            access: FormatAccess::new(image),
            file: handle,
            path: shown,
            is_increment: base.is_some(),
        })
    }

    /// Opens a copy of a checked chain's topmost image, to change it; what lies below is the same.
    pub(crate) fn reopen(path: &Path, original: &Chain) -> Result<Self> {
        let shown = path.display().to_string();
        let failed = |e| Error::io(format!("Cannot open image {shown}."), e);
        let handle =
            std::fs::OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
        let backing = original.below().as_ref().map(open_chain).transpose()?;
        let is_increment = backing.is_some();
        let options = StorageOpenOptions::new().write(true).filename(path);
        let storage =
            File::from_open_file(handle.try_clone().map_err(failed)?, options).map_err(failed)?;
        let image = Qcow2::<File>::builder(storage)
            .backing(backing)
            .data_file(None)
            .write(true)
            .open(DenyImplicitOpenGate::default())
            .map_err(failed)?;
        Ok(Self { access: FormatAccess::new(image), file: handle, path: shown, is_increment })
    }

    /// Writes data. Two threads must not write into the same cluster at the same time.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.access.write(data, offset).map_err(|e| self.write_failed(offset, e))
    }

    /// Makes an area read as zeroes. In a standalone image, what was never written does; in an
    /// increment the base's data must be hidden.
    pub(crate) fn write_zeroes(&self, offset: u64, length_bytes: u64) -> Result<()> {
        if !self.is_increment {
            return Ok(());
        }
        if self.must_write_zeroes(offset, length_bytes) {
            return self.write_plain_zeroes(offset, length_bytes);
        }
        self.access.write_zeroes(offset, length_bytes).map_err(|e| self.write_failed(offset, e))
    }

    /// Makes an area read as zeroes that may have data, and gives the space of that back.
    pub(crate) fn discard_to_zero(&mut self, offset: u64, length_bytes: u64) -> Result<()> {
        if self.must_write_zeroes(offset, length_bytes) {
            return self.write_plain_zeroes(offset, length_bytes);
        }
        let discarded = self.access.discard_to_zero(offset, length_bytes);
        discarded.map_err(|e| self.write_failed(offset, e))
    }

    /// On a disk smaller than a cluster `imago` 0.2.6 computes the end of a zero area that is not the disk's
    /// end as less than 0: it panics, or without overflow checks zeroes more than was asked for.
    fn must_write_zeroes(&self, offset: u64, length_bytes: u64) -> bool {
        let size_bytes = self.access.size();
        size_bytes < CLUSTER_BYTES && offset.saturating_add(length_bytes) < size_bytes
    }

    /// At most a cluster.
    fn write_plain_zeroes(&self, offset: u64, length_bytes: u64) -> Result<()> {
        let length = usize::try_from(length_bytes).map_err(|_| corrupt("An area is too long."))?;
        self.write(offset, &vec![0; length])
    }

    fn write_failed(&self, offset: u64, error: std::io::Error) -> Error {
        Error::io(format!("Cannot write to image {} at {offset}.", self.path), error)
    }

    /// Makes the image durable and tells the size of its file.
    pub(crate) fn finish(self) -> Result<u64> {
        let Self { access, file, path, .. } = self;
        let failed = |e| Error::io(format!("Cannot finish image {path}."), e);
        access.flush().map_err(failed)?;
        drop(access);
        file.sync_all().map_err(failed)?;
        Ok(file.metadata().map_err(failed)?.len())
    }
}

fn cluster_size() -> usize {
    usize::try_from(CLUSTER_BYTES).expect("64 KiB fit in any usize")
}

/// What an image itself has of an area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kept {
    /// Data.
    Data,
    /// The note that it reads as zeroes.
    Zero,
    /// Nothing: what is below is read.
    Below,
}

/// A checked chain, open for reading.
pub(crate) struct ImageReader(FormatAccess<File>);

impl ImageReader {
    pub(crate) fn open(chain: &Chain) -> Result<Self> {
        open_chain(chain).map(Self)
    }

    /// Reads what the disk holds at `offset`.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        let read = self.0.read(data, offset);
        read.map_err(|e| Error::io(format!("Cannot read an archive's image at {offset}."), e))
    }

    /// Calls `work` for the parts of an area, with what the topmost image itself has there.
    pub(crate) fn each_kept(
        &self,
        area: Area,
        mut work: impl FnMut(Area, Kept) -> Result<()>,
    ) -> Result<()> {
        let mut at = area.start;
        while at < area.end {
            let (mapping, length_bytes) =
                self.0.get_shallow_mapping(at, area.end - at).map_err(|e| {
                    Error::io(format!("Cannot find out where an archive's image has {at}."), e)
                })?;
            let kept = match mapping {
                ShallowMapping::Zero { .. } => Kept::Zero,
                ShallowMapping::Indirect { offset, .. } if offset == at => Kept::Below,
                _ => Kept::Data,
            };
            if length_bytes == 0 {
                return Err(corrupt(format!("An archive's image ends before {at}.")));
            }
            let part = Area::new(at, area.end.min(at.saturating_add(length_bytes)));
            work(part, kept)?;
            at = part.end;
        }
        Ok(())
    }
}

/// Opens a checked chain for reading, base first; needed for areas smaller than a cluster, whose
/// surroundings come from the base.
fn open_chain(chain: &Chain) -> Result<FormatAccess<File>> {
    let mut below = None;
    for link in chain.links().iter().rev() {
        let failed = |e| Error::io(format!("Cannot open image {}.", link.path.display()), e);
        let file = File::open(StorageOpenOptions::new().filename(&link.path)).map_err(failed)?;
        let image = Qcow2::<File>::builder(file)
            .backing(below.take())
            .data_file(None)
            .open(DenyImplicitOpenGate::default())
            .map_err(failed)?;
        below = Some(FormatAccess::new(image));
    }
    below.ok_or_else(|| corrupt("An image chain is empty."))
}
