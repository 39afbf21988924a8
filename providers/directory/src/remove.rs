// SPDX-License-Identifier: MIT OR Apache-2.0
//! The removal of one archive. Archives that build upon it are replaced first by ones that do not.
//!
//! ```text
//! full ◄── B ◄── S ◄── T        remove B
//!   1. .tmp-merge-…/ = S with B merged into its disks, complete and durable     (long; any disk of S
//!      that does not build upon B is linked)
//!   2. .tmp-merge-… and S exchange their names                                  (one step)
//!   3. B is renamed to .tmp-dead-…, and removed
//! full ◄── S' ◄── T
//! ```
//!
//! Nothing that an archive gives is ever written to. Before step 2 the chain is the old one, after it
//! S' gives the same bytes as S and B is needed by nobody; with several archives on top of B the first
//! two steps are repeated. So a crash needs no repair: a dead `.tmp-` directory is removed by the next
//! activation, and the removal may be asked for again. T names S by its name, which stays.
//!
//! An archive whose manifest cannot be read is not merged into anything: it is removed if nothing builds upon it, and
//! if its name says whose it is, so that the guest's locks hold off those who use it.
//!
//! The price: B's images are copied, by sharing their blocks on btrfs and XFS, else as bytes, and both
//! are there at once for a while.

use std::fs;
use std::path::Path;

use provider_api::{Call, Error, Kind, Result};
use tracing::{info, warn};

use crate::attributes;
use crate::call::{blocking, check};
use crate::commit::take_dead_runs;
use crate::files;
use crate::guest::guest_in_name;
use crate::header::Header;
use crate::kill_point::step;
use crate::leftovers::Remover;
use crate::limits::{LOCK_WAIT, MERGE_ROUNDS, USE_WAIT};
use crate::manifest::{
    Disk, MANIFEST_FILE, Manifest, checksums_file, config_file, firewall_file, image_file,
};
use crate::merge::merge_disk;
use crate::storage::{Leftover, RunDirectory, Storage};
use crate::usage::Guest;

/// Removes an archive. Cancelling the call, or dropping the future, ends it between two steps.
pub(crate) async fn remove(
    storage: Storage,
    archive: String,
    remover: &Remover,
    call: &Call,
) -> Result<()> {
    let call = Call { cancel: call.cancel.child_token(), deadline: call.deadline };
    let _end = call.cancel.clone().drop_guard();
    // What a dead removal was about to put in its place must not come back later.
    let (lock, dead) = (storage.must_lock(&call, LOCK_WAIT).await?, storage.clone());
    let leftovers = blocking(move || take_dead_runs(&dead, &lock));
    remover.remove(leftovers.await?, &call).await;
    // Awaited also when it is cancelled: afterwards it is known whether the archive is there.
    blocking(move || {
        let result = Removal::begin(&storage, &archive, &call).and_then(|removal| removal.run());
        result.map_err(|error| {
            // A file that is missing is not the archive that is missing.
            let is_there = error.kind == Kind::NotFound && storage.exists(&archive).unwrap_or(true);
            if is_there { Error { kind: Kind::Corrupt, ..error } } else { error }
        })
    })
    .await
}

struct Removal<'a> {
    storage: &'a Storage,
    archive: &'a str,
    guest: Guest,
    /// Whether its manifest can be read.
    is_readable: bool,
    call: &'a Call,
}

impl<'a> Removal<'a> {
    fn begin(storage: &'a Storage, archive: &'a str, call: &'a Call) -> Result<Self> {
        let (is_readable, (kind, id)) = match storage.manifest(archive) {
            Ok(manifest) => (true, (manifest.subtype, manifest.guest_id)),
            Err(error) if storage.look(archive).is_none() => return Err(error),
            Err(error) => match guest_in_name(archive) {
                Some(guest) => (false, guest),
                None => {
                    let text = format!(
                        "Archive {archive} is kept: neither its manifest nor its name says whose it is. Move \
                         its directory elsewhere. {error}"
                    );
                    return Err(Error { message: text, ..error });
                }
            },
        };
        let guest = Guest::new(storage, kind, id);
        Ok(Self { storage, archive, guest, is_readable, call })
    }

    fn run(&self) -> Result<()> {
        let _change = self.guest.begin_change(self.call, LOCK_WAIT)?;
        // Before anything is copied in vain.
        self.check_removable()?;
        drop(self.guest.exclusive(self.call, USE_WAIT)?);
        for _ in 0..MERGE_ROUNDS {
            let dependents = self.dependents()?;
            if !self.is_readable && !dependents.is_empty() {
                return Err(self.cannot_be_merged(dependents));
            }
            for above in dependents {
                self.merge_into(&above)?;
            }
            if let Some(leftover) = self.take_away()? {
                discard(&leftover);
                return Ok(());
            }
        }
        Err(Error::has_dependents(
            self.archive,
            self.dependents()?.into_iter().map(|above| above.archive).collect(),
        ))
    }

    fn cannot_be_merged(&self, dependents: Vec<Manifest>) -> Error {
        let names: Vec<_> = dependents.into_iter().map(|above| above.archive).collect();
        let text = format!(
            "Archive {} is kept: its manifest cannot be read, so it cannot be merged into {}, which need it. \
             Remove those first.",
            self.archive,
            names.join(", ")
        );
        Error { message: text, ..Error::has_dependents(self.archive, names) }
    }

    fn check_removable(&self) -> Result<()> {
        if self.is_readable {
            self.storage.manifest(self.archive)?;
        }
        if attributes::is_protected(self.storage, self.archive) {
            return Err(Error::new(
                Kind::Protected,
                format!("Archive {} is protected.", self.archive),
            ));
        }
        Ok(())
    }

    /// The archives that build upon this one; an error if that cannot be told of one.
    fn dependents(&self) -> Result<Vec<Manifest>> {
        let mut found = Vec::new();
        for (name, manifest) in self.storage.read_manifests()? {
            if name == self.archive {
                continue;
            }
            match manifest {
                Ok(above) if above.disks.iter().any(|disk| self.is_below(disk)) => {
                    found.push(above);
                }
                Ok(_) => {}
                Err(error) => self.check_unreadable(&name, error)?,
            }
        }
        Ok(found)
    }

    fn is_below(&self, disk: &Disk) -> bool {
        disk.base.as_deref() == Some(self.archive)
    }

    /// Takes the archive away if nothing builds upon it any more.
    fn take_away(&self) -> Result<Option<Leftover>> {
        let _exclusive = self.guest.exclusive(self.call, LOCK_WAIT)?;
        let lock = self.storage.must_lock_blocking(self.call, LOCK_WAIT)?;
        self.check_removable()?;
        if !self.dependents()?.is_empty() {
            return Ok(None);
        }
        step();
        let leftover = self.storage.take_away(self.archive, &lock)?.ok_or_else(|| {
            Error::new(Kind::NotFound, format!("There is no archive {}.", self.archive))
        })?;
        step();
        files::sync_directory(self.storage.path())?;
        step();
        Ok(Some(leftover))
    }

    /// An archive whose manifest is wrong, lost or not to be read is not merged into; if its images build upon
    /// this one, it can only be repaired as long as this one is there. The images alone tell: while one of them
    /// cannot be read either, nobody knows what it would say.
    fn check_unreadable(&self, name: &str, error: Error) -> Result<()> {
        let unknown = |error: Error| {
            let text = format!(
                "Archive {} is kept: it cannot be told whether {name} builds upon it. {error} Try again when \
                 all files of {name} can be read, or move its directory elsewhere.",
                self.archive
            );
            Error { message: text, ..error }
        };
        let builds_upon = images_build_upon(&self.storage.archive_path(name), self.archive);
        if !builds_upon.map_err(unknown)? {
            return Ok(());
        }
        let text = format!(
            "Archive {} is kept: {name} builds upon it, but its manifest cannot be read. Repair or remove \
             {name} first. {error}",
            self.archive
        );
        Err(Error { message: text, ..error })
    }

    /// Replaces an archive by one that holds what it had of this one.
    fn merge_into(&self, above: &Manifest) -> Result<()> {
        info!("Archive {} is merged into {}.", self.archive, above.archive);
        let run = {
            let lock = self.storage.must_lock_blocking(self.call, LOCK_WAIT)?;
            self.storage.begin_merge(&lock)?
        };
        step();
        let result = self.build(above, &run).and_then(|()| self.replace(above, &run));
        // What it was going to be, or what it was: unless it is the only one that is left, after two
        // renames have failed. The next activation then puts it in its place.
        if matches!(self.storage.exists(&above.archive), Ok(true))
            && let Err(error) = run.remove()
        {
            warn!("What a removal left is removed by the next activation: {error}");
        }
        result
    }

    fn build(&self, above: &Manifest, run: &RunDirectory) -> Result<()> {
        self.check_removable()?;
        let below = self.storage.manifest(self.archive)?;
        let from = self.storage.archive_path(&above.archive);
        let link = |file: &str| {
            let check = || check(self.call, "The removal");
            files::link_or_copy(&from.join(file), &run.path().join(file), check)
        };
        link(config_file(above.subtype))?;
        if above.firewall.is_some() {
            link(firewall_file(above.subtype))?;
        }
        let mut manifest = above.clone();
        for disk in &mut manifest.disks {
            if self.is_below(disk) {
                let (storage, path) = (self.storage, run.path());
                *disk = merge_disk(storage, &below, above, &disk.device, path, self.call)?;
            } else {
                link(&image_file(&disk.device))?;
                link(&checksums_file(&disk.device))?;
            }
            step();
        }
        files::write_new(&run.path().join(MANIFEST_FILE), &manifest.to_text()?)?;
        files::sync_directory(run.path())?;
        step();
        Ok(())
    }

    fn replace(&self, above: &Manifest, run: &RunDirectory) -> Result<()> {
        let _exclusive = self.guest.exclusive(self.call, LOCK_WAIT)?;
        let lock = self.storage.must_lock_blocking(self.call, LOCK_WAIT)?;
        // Somebody may have protected the archive that goes; then this was in vain, but right.
        self.check_removable()?;
        attributes::copy(self.storage, &above.archive, run.path(), &lock)?;
        files::sync_directory(run.path())?;
        files::sync_directory(self.storage.path())?;
        step();
        let old = run.replace(self.storage, &above.archive, &lock)?;
        step();
        // Removing takes long.
        drop(lock);
        if let Some(old) = old {
            discard(&old);
        }
        Ok(())
    }
}

/// Removes what nobody needs any more. It has succeeded already: what stays is removed by the next
/// activation.
fn discard(leftover: &Leftover) {
    if let Err(error) = leftover.remove() {
        warn!("{error}");
    }
}

/// Whether the header of an image in `directory` names one of `archive` as its backing file.
fn images_build_upon(directory: &Path, archive: &str) -> Result<bool> {
    let failed = |e| Error::io(format!("Cannot list {}.", directory.display()), e);
    for entry in fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_none_or(|extension| extension != "qcow2") {
            continue;
        }
        let mut file = files::open_regular(&path)?;
        let header = Header::read(&mut file)
            .map_err(|e| Error::io(format!("Cannot read {}.", path.display()), e))?;
        // What is no image builds upon nothing that could be found.
        if header.is_ok_and(|header| header.builds_upon(archive)) {
            return Ok(true);
        }
    }
    Ok(false)
}
