// SPDX-License-Identifier: MIT OR Apache-2.0
//! Makes a new container: its volumes first, each journalled before it is made, its configuration last and
//! in one step.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use provider_api::{
    Call, CancellationToken, ContainerCommand, ContainerRunner as _, GuestKind, IdMapRange,
    Identity,
};
use tokio::sync::mpsc;
use vzdump_core::config::container::CtConfig;
use vzdump_core::job::{JobContext, backup_lock_path};
use vzdump_core::journal::recover::{self, Leftover};
use vzdump_core::journal::volumes::NewVolumes;
use vzdump_core::journal::{Begin, Entry, Journal, TaskKind};
use vzdump_core::layout::{check_guest_id, make_private_dir};
use vzdump_core::lock::FileLock;
use vzdump_core::storage::{DEFAULT_STORAGE, ImageFormat, VolumeId};
use vzdump_core::task_log::{TaskSink, size_config};

use crate::CtError;
use crate::runner::Runner;
use crate::runtime::{beside, root_of};
use crate::sandbox::TREE;
use crate::tool::{command, run};
use crate::view::{Part, View, ViewOptions};

/// Making a file system writes little, but its storage may be busy.
const MKFS_LIMIT: Duration = Duration::from_secs(300);
/// Lines of commands that wait for the log.
const LOG_LINES: usize = 1000;

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
    for path in [ctx.layout.ct_config_path(id), ctx.layout.vm_config_path(id)] {
        if path.exists() {
            return Err(CtError::Invalid(format!(
                "The guest {id} exists already ('{}').",
                path.display()
            )));
        }
    }
    Ok(())
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
    let decompressor = decompressor(&options.template);
    let archive = Archive { what: &what, file: template, decompressor };
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
    let mut mkfs = command("mkfs.ext4", ["-q", "-F", "-m", "0", "-E", &owner, "--"]);
    mkfs.arg(path);
    run(&mkfs, MKFS_LIMIT).map(drop).map_err(CtError::at(doing()))
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

/// A directory of a task in which the files of a new container are mounted.
pub(crate) struct Place {
    private: PathBuf,
}

impl Place {
    pub(crate) async fn make(ctx: &JobContext, id: u32, new: &NewVolumes) -> Result<Self, CtError> {
        let parent = ctx.layout.run().join("ct-restore");
        make_private_dir(&parent)?;
        let private = parent.join(format!("{id}-{}", uuid::Uuid::new_v4().simple()));
        new.journal.append(Entry::Directory { path: private.clone() }).await?;
        make_private_dir(&private)?;
        Ok(Self { private })
    }

    /// A directory for the provider.
    pub(crate) fn for_provider(&self) -> Result<PathBuf, CtError> {
        let dir = self.private.join("provider");
        make_private_dir(&dir)?;
        Ok(dir)
    }

    pub(crate) async fn open(
        &self,
        ctx: &JobContext,
        parts: Vec<Part>,
        ids: &[IdMapRange],
    ) -> Result<(Arc<Runner>, mpsc::Receiver<String>), CtError> {
        let dir = self.private.join("view");
        make_private_dir(&dir)?;
        let ids = ids.to_vec();
        let options = ViewOptions { writable: true, is_snapshot: false };
        let view = beside(move || View::open(&dir, &parts, &ids, options)).await?;
        let (log, lines) = mpsc::channel(LOG_LINES);
        let program = ctx.guard.program.clone();
        Ok((Arc::new(Runner { view: Arc::new(view), program, log, writable: true }), lines))
    }

    pub(crate) async fn remove(self) -> Result<(), CtError> {
        beside(move || match std::fs::remove_dir_all(&self.private) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(CtError::at("remove the directory of the task")(error))
            }
            _ => Ok(()),
        })
        .await
    }
}

/// Unpacks a tar archive as the container's root, in a sandbox that sees nothing but the new volumes:
/// whatever is in the archive, there is nothing else it could change.
pub(crate) async fn unpack(
    runner: &Arc<Runner>,
    mut lines: mpsc::Receiver<String>,
    archive: Archive<'_>,
    sink: &dyn TaskSink,
    cancel: &CancellationToken,
) -> Result<(), CtError> {
    let mut argv = ["tar", "--extract", "--file=-", "--numeric-owner", "--preserve-permissions"]
        .map(str::to_owned)
        .to_vec();
    argv.extend(["--xattrs", "--xattrs-include=*", "--acls"].map(str::to_owned));
    // Devices are made when the container starts; those of an archive may be any of the host's.
    argv.extend(["--anchored", "--exclude=./dev/*", "--exclude=dev/*"].map(str::to_owned));
    let decompressor = archive.decompressor;
    argv.extend(decompressor.map(|program| format!("--use-compress-program={program}")));
    argv.push(format!("--directory={TREE}"));
    let command = ContainerCommand {
        argv: argv.into_iter().map(Into::into).collect(),
        identity: Identity::MappedRoot,
        env: Vec::new(),
        paths: Vec::new(),
        stdin: Some(archive.file.into()),
        stdout: None,
    };
    let call = Call { cancel: cancel.child_token(), deadline: None };
    let running = runner.command(command, &call);
    tokio::pin!(running);
    let ended = loop {
        tokio::select! {
            ended = &mut running => break ended,
            Some(line) = lines.recv() => sink.info(&line),
        }
    };
    while let Ok(line) = lines.try_recv() {
        sink.info(&line);
    }
    if cancel.is_cancelled() {
        return Err(CtError::Cancelled);
    }
    let doing = || format!("unpack {}", archive.what);
    let ended = ended.map_err(CtError::at(doing()))?;
    if ended.exit_code == 0 {
        return Ok(());
    }
    Err(CtError::at(doing())(ended.stderr_tail.trim().to_owned()))
}

/// A tar archive to be unpacked.
pub(crate) struct Archive<'a> {
    /// What it is, in words.
    pub(crate) what: &'a str,
    pub(crate) file: File,
    pub(crate) decompressor: Option<&'static str>,
}

fn decompressor(path: &Path) -> Option<&'static str> {
    match path.extension()?.to_str()? {
        "gz" | "tgz" => Some("gzip"),
        "bz2" => Some("bzip2"),
        "xz" => Some("xz"),
        "zst" => Some("zstd"),
        _ => None,
    }
}
