// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a restore is going to do, checked before anything is made.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use vzdump_core::config::container::{CtConfig, MountEntry, ROOTFS};
use vzdump_core::job::JobContext;
use vzdump_core::restore::PlannedVolume;
use vzdump_core::restore::space::{self, PlannedSpace};
use vzdump_core::storage::{BTRFS_KIND, DEFAULT_STORAGE, ImageFormat, Storage, VolumeId};
use vzdump_core::task_log::size_config;
use vzdump_core::vm::create::parse_size;

use super::CtRestoreOptions;
use super::old::{self, Fates};
use crate::CtError;
use crate::create::NewMount;
use crate::runtime::beside;

/// What the unpacking says if the volumes are too small.
const TOO_LITTLE_ROOM: [&str; 2] = ["bytes of data with", "No space left on device"];
/// What to do then.
const WITHOUT_SIZES: &str = "Restore it to a storage of the type btrfs (--storage, --format \
     subvol), where volumes need no size, or make a container of its files (vzdump ct create \
     --template --size).";

/// A volume that is to be made.
#[derive(Debug, Clone)]
pub(super) struct Planned {
    pub(super) mount: NewMount,
    pub(super) storage: Arc<dyn Storage>,
    pub(super) format: ImageFormat,
    /// As the archive has it.
    entry: MountEntry,
}

impl Planned {
    /// The archive's options of the mount, with a new volume.
    pub(super) fn value(&self, volume: &str) -> String {
        let mut entry = self.entry.clone();
        volume.clone_into(&mut entry.volume);
        if self.format == ImageFormat::Subvol {
            entry.options.remove("size");
        } else {
            entry.options.set("size", &size_config(self.mount.size_bytes));
        }
        entry.to_value()
    }

    pub(super) fn mount_point(&self) -> &Path {
        &self.mount.mount_point
    }

    pub(super) fn shown(&self) -> PlannedVolume {
        PlannedVolume {
            device: self.mount.key.clone(),
            key: self.mount.key.clone(),
            size_bytes: self.mount.size_bytes,
            storage: self.storage.id().to_owned(),
            format: self.format,
        }
    }
}

/// What is going to be done.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// The root file system first, parents before children.
    pub(super) volumes: Vec<Planned>,
    /// What becomes of the volumes of a container that is there already.
    pub(super) fates: Fates,
    pub(super) space: Vec<PlannedSpace>,
    pub(super) warnings: Vec<String>,
}

impl Plan {
    /// Says what to do, too, if the files do not fit into the volumes.
    pub(super) fn advise(&self, error: CtError) -> CtError {
        let said = error.words();
        let are_too_many = TOO_LITTLE_ROOM.iter().any(|words| said.contains(words));
        if !are_too_many || self.volumes.iter().all(|one| one.format == ImageFormat::Subvol) {
            return error;
        }
        CtError::Invalid(format!(
            "{said}. The volumes are as large as the archive's configuration says. {WITHOUT_SIZES}"
        ))
    }
}

/// Plans the volumes, and looks whether they can be made.
pub(super) async fn plan(
    ctx: &JobContext,
    id: u32,
    archived: &CtConfig,
    old: Option<&CtConfig>,
    options: &CtRestoreOptions,
) -> Result<Plan, CtError> {
    let mut plan = Plan::default();
    let mounts = archived.mounts()?;
    for entry in mounts.iter().filter(|entry| entry.backup()) {
        let planned = plan_volume(ctx, entry.clone(), options, &mut plan.warnings)?;
        plan.volumes.push(planned);
    }
    if let Some(old) = old {
        plan.fates = old::fates(id, old, &mounts)?;
    }
    check_places(ctx, id, &plan.volumes).await?;
    let needs = plan.volumes.iter().map(|one| (Arc::clone(&one.storage), one.mount.size_bytes));
    let freed = BTreeSet::new();
    let measured = space::measure(needs, &freed, &ctx.storages);
    let limit = ctx.limits.undo;
    plan.space = tokio::time::timeout(limit, measured).await.map_err(|_| {
        let seconds = limit.as_secs();
        CtError::Invalid(format!("A storage did not answer within {seconds} seconds."))
    })?;
    Ok(plan)
}

fn plan_volume(
    ctx: &JobContext,
    entry: MountEntry,
    options: &CtRestoreOptions,
    warnings: &mut Vec<String>,
) -> Result<Planned, CtError> {
    let old: VolumeId = entry.volume.parse()?;
    let storage = match (&options.storage, ctx.storages.images(old.storage())) {
        (Some(id), _) => ctx.storages.images(id)?,
        (None, Ok(storage)) => storage,
        (None, Err(error)) => {
            let warning =
                format!("'{}': using the storage '{DEFAULT_STORAGE}': {error}", entry.key);
            warnings.push(warning);
            ctx.storages.images(DEFAULT_STORAGE)?
        }
    };
    let format = format_of(options.format, old.format(), storage.as_ref())?;
    let size_bytes = match entry.options.get("size") {
        _ if format == ImageFormat::Subvol => 0,
        Some(size) => parse_size(size)
            .map_err(|why| CtError::Invalid(format!("'{}' of the archive: {why}", entry.key)))?,
        None => 0,
    };
    // A directory is written down with the size 0 by Proxmox VE.
    if size_bytes == 0 && format != ImageFormat::Subvol {
        return Err(CtError::Invalid(format!(
            "'{}' of the archive has no size. {WITHOUT_SIZES}",
            entry.key
        )));
    }
    let mount = NewMount {
        key: entry.key.clone(),
        mount_point: entry.mount_point.clone(),
        size_bytes,
        backup: entry.key != ROOTFS,
    };
    Ok(Planned { mount, storage, format, entry })
}

/// The one that is asked for, or else that of the archive where the storage has it.
fn format_of(
    wanted: Option<ImageFormat>,
    archived: ImageFormat,
    storage: &dyn Storage,
) -> Result<ImageFormat, CtError> {
    let has_subvolumes = storage.kind() == BTRFS_KIND;
    match wanted {
        None if archived == ImageFormat::Subvol && has_subvolumes => Ok(ImageFormat::Subvol),
        None | Some(ImageFormat::Raw) => Ok(ImageFormat::Raw),
        Some(ImageFormat::Subvol) if has_subvolumes => Ok(ImageFormat::Subvol),
        Some(ImageFormat::Subvol) => Err(CtError::Invalid(format!(
            "The storage '{}' has no subvolumes: it is not of the type btrfs.",
            storage.id()
        ))),
        Some(other) => Err(CtError::Invalid(format!(
            "A container's volumes cannot be '{other}': raw and subvol are possible."
        ))),
    }
}

/// That files can be made where the configuration and the volumes go.
async fn check_places(ctx: &JobContext, id: u32, volumes: &[Planned]) -> Result<(), CtError> {
    let mut places = BTreeMap::from([("the configuration".to_owned(), ctx.layout.ct_config_dir())]);
    for one in volumes {
        let volume = VolumeId::new(one.storage.id(), id, "any", one.format)?;
        let path = one.storage.volume_path(&volume)?;
        let dir = path.parent().unwrap_or(&path).to_owned();
        places.insert(format!("a volume on the storage '{}'", one.storage.id()), dir);
    }
    let checked = beside(move || {
        places.into_iter().try_for_each(|(what, dir)| {
            space::check_dir(&dir)
                .map_err(|why| CtError::Invalid(format!("Cannot make {what}: {why}.")))
        })
    });
    tokio::time::timeout(ctx.limits.undo, checked)
        .await
        .map_err(|_| CtError::Invalid("A storage does not answer.".to_owned()))?
}
