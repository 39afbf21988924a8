// SPDX-License-Identifier: MIT OR Apache-2.0
//! Makes a new container: its volumes first, each journalled before it is made, its configuration last and
//! in one step.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use provider_api::{CancellationToken, GuestKind, IdMapRange};
use vzdump_core::config::container::CtConfig;
use vzdump_core::job::{JobContext, backup_lock_path};
use vzdump_core::journal::recover::{self, Leftover};
use vzdump_core::journal::volumes::NewVolumes;
use vzdump_core::journal::{Begin, Journal, TaskKind};
use vzdump_core::layout::check_guest_id;
use vzdump_core::lock::FileLock;
use vzdump_core::storage::{DEFAULT_STORAGE, ImageFormat, VolumeId};
use vzdump_core::task_log::{TaskSink, size_config};

use crate::CtError;
use crate::place::{Archive, Place, unpack};
use crate::runtime::{beside, root_of};
use crate::tool::{command, run};
use crate::unpack::{Bounds, Codec};
use crate::view::Part;

/// Making a file system writes little, but its storage may be busy.
const MKFS_LIMIT: Duration = Duration::from_secs(300);

/// A volume of a new container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewMount {
    /// Its key in the configuration: `rootfs`, `mp0`.
    pub key: String,
    /// Where it is in the container; `/` for `rootfs`.
    pub mount_point: PathBuf,
    /// Its size; none for a subvolume.
    pub size_bytes: u64,
    /// Whether backups include it.
    pub backup: bool,
}

/// A new container.
#[derive(Debug, Clone)]
pub struct CtCreateOptions {
    /// Keys of the configuration, such as `hostname`; the volumes are added to them.
    pub keys: Vec<(String, String)>,
    /// The volumes, the root file system first.
    pub mounts: Vec<NewMount>,
    /// The storage for the volumes.
    pub storage: String,
    /// Raw images or subvolumes.
    pub format: ImageFormat,
    /// A tar archive with the files, which the administrator trusts.
    pub template: PathBuf,
}

impl Default for CtCreateOptions {
    fn default() -> Self {
        Self {
            keys: Vec::new(),
            mounts: Vec::new(),
            storage: DEFAULT_STORAGE.into(),
            format: ImageFormat::Raw,
            template: PathBuf::new(),
        }
    }
}

/// A container that was made.
#[derive(Debug, Clone, serde::Serialize)]
pub struct CtCreated {
    /// Its number.
    pub id: u32,
    /// Its configuration.
    pub config: PathBuf,
    /// Its volumes: key and volume.
    pub volumes: Vec<(String, String)>,
}

/// Makes a container. Should be awaited to its end; cancel it by the token.
///
/// # Errors
/// [`CtError`]; what was made so far is removed then.
pub async fn create(
    ctx: &JobContext,
    id: u32,
    options: &CtCreateOptions,
    sink: &dyn TaskSink,
    cancel: &CancellationToken,
) -> Result<CtCreated, CtError> {
    check_guest_id(id)?;
    let path = backup_lock_path(&ctx.layout, GuestKind::Lxc, id);
    let _lock = FileLock::try_acquire(&path, &format!("CT {id}"))?;
    prepare_place(ctx, id, sink).await?;
    let template = File::open(&options.template)
        .map_err(CtError::at(format!("open the template '{}'", options.template.display())))?;
    let mut config = CtConfig::default();
    for (key, value) in &options.keys {
        config.lines_mut().set(key, value)?;
    }
    let begin = Begin::new(TaskKind::Create, GuestKind::Lxc, id, &options.storage)
        .map_err(CtError::at("read /proc of this process"))?;
    let mut new = NewVolumes::new(Journal::create(&ctx.layout, begin).await?);
    let making = fill(ctx, id, options, config, template, &mut new, sink, cancel);
    match Box::pin(making).await {
        Ok(volumes) => {
            new.journal.remove().await?;
            Ok(CtCreated { id, config: ctx.layout.ct_config_path(id), volumes })
        }
        Err(error) => {
            let problems = new.free(ctx).await;
            problems.iter().for_each(|problem| sink.warn(problem));
            if problems.is_empty() {
                new.journal.remove().await?;
            }
            Err(error)
        }
    }
}

/// That the number is free, and nothing is left of an earlier task.
pub(crate) async fn prepare_place(
    ctx: &JobContext,
    id: u32,
    sink: &dyn TaskSink,
) -> Result<(), CtError> {
    let left = recover::recover_guest(ctx, GuestKind::Lxc, id, sink).await?;
    if let Some(Leftover { reason, .. }) = left.into_iter().next() {
        return Err(CtError::Invalid(format!(
            "An earlier task of this guest is not cleaned up: {reason}"
        )));
    }
    match ctx.layout.guest_configs(id).first() {
        None => Ok(()),
        Some(path) => {
            let text = format!("The guest {id} exists already ('{}').", path.display());
            Err(CtError::Invalid(text))
        }
    }
}

#[expect(clippy::too_many_arguments, reason = "the parts of one task, used once")]
async fn fill(
    ctx: &JobContext,
    id: u32,
    options: &CtCreateOptions,
    mut config: CtConfig,
    template: File,
    new: &mut NewVolumes,
    sink: &dyn TaskSink,
    cancel: &CancellationToken,
) -> Result<Vec<(String, String)>, CtError> {
    let ids = config.id_map()?;
    let made =
        make_volumes(ctx, id, &options.storage, options.format, &options.mounts, &ids, new).await?;
    for (mount, volume) in options.mounts.iter().zip(&made) {
        config.lines_mut().set(&mount.key, &entry_of(mount, volume, options.format))?;
    }
    // That the configuration makes sense, before the files are written.
    config.mounts()?;
    let data_bytes = data_bytes_max(ctx, &options.mounts, &made).await?;
    let place = Place::make(ctx, id, new).await?;
    let parts = parts_of(ctx, &options.mounts, &made)?;
    let (runner, lines) = match place.open(ctx, parts, &ids).await {
        Ok(opened) => opened,
        Err(error) => {
            place.remove().await?;
            return Err(error);
        }
    };
    let what = format!("the template '{}'", options.template.display());
    let archive = Archive {
        what: &what,
        file: template,
        codec: codec_of(&options.template),
        mounts: options.mounts.iter().map(|mount| mount.mount_point.clone()).collect(),
        bounds: Bounds { data_bytes, bytes_per_s: None },
    };
    let unpacked = unpack(&runner, lines, archive, sink, cancel).await;
    // Unmounted before anything is removed.
    let closed = beside(move || crate::runner::close(runner)).await;
    place.remove().await?;
    unpacked?;
    closed?;
    config.lines().write_new(&ctx.layout.ct_config_path(id))?;
    let keys = options.mounts.iter().map(|mount| mount.key.clone());
    Ok(keys.zip(made.iter().map(VolumeId::to_string)).collect())
}

/// The value of a volume's key.
pub(crate) fn entry_of(mount: &NewMount, volume: &VolumeId, format: ImageFormat) -> String {
    let mut value = volume.to_string();
    if mount.mount_point != Path::new("/") {
        value.push_str(&format!(",mp={}", mount.mount_point.display()));
        if mount.backup {
            value.push_str(",backup=1");
        }
    }
    if format == ImageFormat::Raw {
        value.push_str(&format!(",size={}", size_config(mount.size_bytes)));
    }
    value
}

/// Makes volumes with empty file systems that belong to the container's root.
pub(crate) async fn make_volumes(
    ctx: &JobContext,
    id: u32,
    storage: &str,
    format: ImageFormat,
    mounts: &[NewMount],
    ids: &[IdMapRange],
    new: &mut NewVolumes,
) -> Result<Vec<VolumeId>, CtError> {
    let storage = ctx.storages.images(storage)?;
    let mut made = Vec::new();
    for mount in mounts {
        let size_bytes = if format == ImageFormat::Subvol { 0 } else { mount.size_bytes };
        let volume = new.allocate(ctx, storage.as_ref(), id, format, size_bytes).await?;
        let path = storage.volume_path(&volume)?;
        let owner = root_of(ids);
        beside(move || make_file_system(&path, format, owner)).await?;
        made.push(volume);
    }
    Ok(made)
}

fn make_file_system(path: &Path, format: ImageFormat, owner: (u32, u32)) -> Result<(), CtError> {
    let (uid, gid) = owner;
    let doing = || format!("make a file system in '{}'", path.display());
    if format == ImageFormat::Subvol {
        return std::os::unix::fs::chown(path, Some(uid), Some(gid)).map_err(CtError::at(doing()));
    }
    let owner = format!("root_owner={uid}:{gid},lazy_itable_init=1,lazy_journal_init=1");
    // Small volumes would get smaller blocks, into which long links and attributes do not fit.
    let mut mkfs = command("mkfs.ext4", ["-q", "-F", "-b", "4096", "-m", "0", "-E", &owner, "--"]);
    mkfs.arg(path);
    run(&mkfs, MKFS_LIMIT).map(drop).map_err(CtError::at(doing()))
}

/// How many bytes of data the volumes can take: what their images have, or else what is free.
pub(crate) async fn data_bytes_max(
    ctx: &JobContext,
    mounts: &[NewMount],
    volumes: &[VolumeId],
) -> Result<u64, CtError> {
    let mut sum: u64 = 0;
    let mut counted = Vec::new();
    for (mount, volume) in mounts.iter().zip(volumes) {
        if mount.size_bytes > 0 {
            sum = sum.saturating_add(mount.size_bytes);
        } else if !counted.contains(&volume.storage()) {
            counted.push(volume.storage());
            let status = ctx.storages.images(volume.storage())?.status().await?;
            sum = sum.saturating_add(status.available_bytes);
        }
    }
    Ok(sum)
}

/// The volumes for a view.
pub(crate) fn parts_of(
    ctx: &JobContext,
    mounts: &[NewMount],
    volumes: &[VolumeId],
) -> Result<Vec<Part>, CtError> {
    let part = |(mount, volume): (&NewMount, &VolumeId)| {
        Ok(Part {
            key: mount.key.clone(),
            mount_point: mount.mount_point.clone(),
            path: ctx.storages.images(volume.storage())?.volume_path(volume)?,
            is_image: volume.format() == ImageFormat::Raw,
        })
    };
    let mut parts: Vec<Part> =
        mounts.iter().zip(volumes).map(part).collect::<Result<_, CtError>>()?;
    parts.sort_by(|a, b| a.mount_point.cmp(&b.mount_point));
    Ok(parts)
}

/// By the name of the file, as `tar --auto-compress` does.
fn codec_of(path: &Path) -> Codec {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("gz" | "tgz") => Codec::Gz,
        Some("bz2" | "tbz2") => Codec::Bz2,
        Some("xz" | "txz") => Codec::Xz,
        Some("zst" | "tzst") => Codec::Zst,
        _ => Codec::None,
    }
}
