// SPDX-License-Identifier: MIT OR Apache-2.0
//! Restores a container's archive as a new container.
//!
//! Everything in the archive is untrusted. What of the configuration reaches the host is dropped, the ids are
//! those of every unprivileged container, and the files are unpacked by a process that sees nothing but the new
//! volumes. The configuration comes last: until then there is no container, and what was made is removed.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use provider_api::{
    Call, CancellationToken, Compression, ContainerData, GuestKind, IdMapRange, Provider,
};
use vzdump_core::config::container::{CtConfig, MountEntry};
use vzdump_core::config::guest::split_numbered;
use vzdump_core::job::{JobContext, backup_lock_path};
use vzdump_core::journal::volumes::NewVolumes;
use vzdump_core::journal::{Begin, Journal, TaskKind};
use vzdump_core::layout::check_guest_id;
use vzdump_core::lock::FileLock;
use vzdump_core::restore::{RestoreReport, RestoredVolume};
use vzdump_core::storage::{ImageFormat, VolumeId};
use vzdump_core::task_log::TaskSink;
use vzdump_core::vm::create::parse_size;

use crate::CtError;
use crate::create::{NewMount, data_bytes_max, entry_of, make_volumes, parts_of, prepare_place};
use crate::place::{Archive, Place, unpack};
use crate::runtime::beside;
use crate::unpack::{Codec, Unpacked};

/// For a provider to open its end of a FIFO.
const OPEN_LIMIT: Duration = Duration::from_secs(120);

/// How a container is restored.
#[derive(Debug, Clone, Default)]
pub struct CtRestoreOptions {
    /// Storage of the new volumes; by default those of the archive's configuration.
    pub storage: Option<String>,
    /// Also a container whose root is root on the host.
    pub privileged: bool,
    /// Keep lines of the configuration that reach the host.
    pub allow_raw_config: bool,
    /// Start the container afterwards.
    pub start: bool,
}

/// Restores an archive as the new container `id`. What goes wrong is in the report. Must be awaited to its
/// end; cancel it by the token.
pub async fn restore_container(
    ctx: &JobContext,
    provider: &dyn Provider,
    archive: &str,
    id: u32,
    options: &CtRestoreOptions,
    sink: &dyn TaskSink,
    cancel: &CancellationToken,
) -> RestoreReport {
    let started = Instant::now();
    let mut report = RestoreReport::new(id, archive, ctx.layout.ct_config_path(id));
    let job = Restore { ctx, provider, archive, id, options, sink, cancel };
    if let Err(error) = Box::pin(job.run(&mut report)).await {
        let words = error.words();
        sink.error(&format!("Restore of CT {id} failed - {words}"));
        report.error = Some(words);
    }
    report.duration_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    report
}

struct Restore<'a> {
    ctx: &'a JobContext,
    provider: &'a dyn Provider,
    archive: &'a str,
    id: u32,
    options: &'a CtRestoreOptions,
    sink: &'a dyn TaskSink,
    cancel: &'a CancellationToken,
}

/// A volume that is to be made.
struct Planned {
    mount: NewMount,
    entry: MountEntry,
    storage: String,
    format: ImageFormat,
}

impl Restore<'_> {
    async fn run(&self, report: &mut RestoreReport) -> Result<(), CtError> {
        check_guest_id(self.id)?;
        let path = backup_lock_path(&self.ctx.layout, GuestKind::Lxc, self.id);
        let _lock = FileLock::try_acquire(&path, &format!("CT {}", self.id))?;
        prepare_place(self.ctx, self.id, self.sink).await?;
        let archived = self.read_config().await?;
        let (config, planned) = self.plan(&archived, &mut report.warnings)?;
        report.warnings.iter().for_each(|warning| self.sink.warn(warning));
        let ids = config.id_map()?;
        let source = planned.first().map_or("", |one| one.storage.as_str());
        let begin = Begin::new(TaskKind::Restore, GuestKind::Lxc, self.id, source)
            .map_err(CtError::at("read /proc of this process"))?;
        let mut new = NewVolumes::new(Journal::create(&self.ctx.layout, begin).await?);
        match self.fill(config, &planned, &ids, &mut new, &mut report.warnings).await {
            Ok(volumes) => {
                report.volumes = volumes;
                new.journal.remove().await?;
            }
            Err(error) => {
                let problems = new.free(self.ctx).await;
                problems.iter().for_each(|problem| self.sink.warn(problem));
                if problems.is_empty() {
                    new.journal.remove().await?;
                }
                return Err(error);
            }
        }
        self.sink.info(&format!("CT {} is restored", self.id));
        if self.options.start {
            let started =
                crate::runtime::start(&self.ctx.layout, &self.ctx.storages, self.id).await?;
            report.started = true;
            report.warnings.extend(started.notices);
        }
        Ok(())
    }

    fn call(&self, limit: Duration) -> Call {
        Call { cancel: self.cancel.child_token(), deadline: Instant::now().checked_add(limit) }
    }

    async fn read_config(&self) -> Result<CtConfig, CtError> {
        let limits = &self.ctx.limits;
        let late = || CtError::Invalid("The provider does not answer in time.".to_owned());
        let fault = CtError::at(format!("read the archive '{}'", self.archive));
        let call = self.call(limits.activate);
        let activated = tokio::time::timeout(limits.activate, self.provider.activate(&call)).await;
        activated.map_err(|_| late())?.map_err(CtError::at("make the provider ready"))?;
        let call = self.call(limits.provider_call);
        let read = self.provider.guest_config(self.archive, &call);
        let read = tokio::time::timeout(limits.provider_call, read).await.map_err(|_| late())?;
        Ok(CtConfig::from_bytes(read.map_err(fault)?.config)?)
    }

    /// Decides on everything before anything is made.
    fn plan(
        &self,
        archived: &CtConfig,
        warnings: &mut Vec<String>,
    ) -> Result<(CtConfig, Vec<Planned>), CtError> {
        if !archived.is_unprivileged() && !self.options.privileged {
            return Err(CtError::Invalid(
                "The archive is of a privileged container, whose root is root on this host, too. Use \
                 --privileged if you trust all that is in it."
                    .to_owned(),
            ));
        }
        let mut planned = Vec::new();
        let mut config = rewrite(archived, self.options.allow_raw_config, warnings)?;
        for entry in archived.mounts()? {
            config.lines_mut().remove(&entry.key);
            if !entry.backup() {
                warnings.push(format!("dropped '{}': it is not in the archive", entry.key));
                continue;
            }
            planned.push(self.plan_volume(entry)?);
        }
        Ok((config, planned))
    }

    fn plan_volume(&self, entry: MountEntry) -> Result<Planned, CtError> {
        let old: VolumeId = entry.volume.parse()?;
        let storage = self.options.storage.clone().unwrap_or_else(|| old.storage().to_owned());
        let is_btrfs =
            self.ctx.storages.images(&storage)?.kind() == vzdump_core::storage::BTRFS_KIND;
        let is_subvolume = old.format() == ImageFormat::Subvol && is_btrfs;
        let size_bytes = match entry.options.get("size") {
            _ if is_subvolume => 0,
            Some(size) => parse_size(size).map_err(CtError::Invalid)?,
            None => {
                return Err(CtError::Invalid(format!(
                    "'{}' of the archive has no size: restore it to a storage of the type btrfs.",
                    entry.key
                )));
            }
        };
        let mount = NewMount {
            key: entry.key.clone(),
            mount_point: entry.mount_point.clone(),
            size_bytes,
            backup: true,
        };
        let format = if is_subvolume { ImageFormat::Subvol } else { ImageFormat::Raw };
        Ok(Planned { mount, entry, storage, format })
    }

    async fn fill(
        &self,
        mut config: CtConfig,
        planned: &[Planned],
        ids: &[IdMapRange],
        new: &mut NewVolumes,
        warnings: &mut Vec<String>,
    ) -> Result<Vec<RestoredVolume>, CtError> {
        let (mut volumes, mut restored) = (Vec::new(), Vec::new());
        for one in planned {
            let mounts = std::slice::from_ref(&one.mount);
            let made =
                make_volumes(self.ctx, self.id, &one.storage, one.format, mounts, ids, new).await?;
            let Some(volume) = made.into_iter().next() else { continue };
            self.sink.info(&format!("new volume '{volume}' ({})", one.mount.key));
            let value = value_of(one, &volume);
            config.lines_mut().set(&one.mount.key, &value)?;
            restored.push(RestoredVolume {
                device: one.mount.key.clone(),
                volume: volume.to_string(),
                size_bytes: one.mount.size_bytes,
            });
            volumes.push(volume);
        }
        config.mounts()?;
        let place = Place::make(self.ctx, self.id, new).await?;
        let mounts: Vec<NewMount> = planned.iter().map(|one| one.mount.clone()).collect();
        let data_bytes_max = data_bytes_max(self.ctx, &mounts, &volumes).await?;
        let parts = parts_of(self.ctx, &mounts, &volumes)?;
        let (runner, lines) = match place.open(self.ctx, parts, ids).await {
            Ok(opened) => opened,
            Err(error) => {
                place.remove().await?;
                return Err(error);
            }
        };
        let unpacked = self.copy(&place, &runner, lines, &mounts, data_bytes_max).await;
        // Unmounted before anything is removed.
        let closed = beside(move || crate::runner::close(runner)).await;
        place.remove().await?;
        let unpacked = unpacked?;
        closed?;
        for (what, count) in &unpacked.left_out {
            let warning = format!("left out: {what} ({count})");
            self.sink.warn(&warning);
            warnings.push(warning);
        }
        if !unpacked.has_files {
            return Err(CtError::Invalid("The archive holds no files.".to_owned()));
        }
        config.lines().write_new(&self.ctx.layout.ct_config_path(self.id))?;
        Ok(restored)
    }

    /// Init and cleanup of the provider in a pair, the unpacking between them.
    async fn copy(
        &self,
        place: &Place,
        runner: &std::sync::Arc<crate::runner::Runner>,
        lines: tokio::sync::mpsc::Receiver<String>,
        mounts: &[NewMount],
        data_bytes_max: u64,
    ) -> Result<Unpacked, CtError> {
        let call = self.call(self.ctx.limits.provider_call);
        let at = || CtError::at(format!("restore from the archive '{}'", self.archive));
        let mut source =
            self.provider.restore_container_init(self.archive, &call).await.map_err(at())?;
        let dir = place.for_provider()?;
        let unpacked = match source.data(&dir, &call).await {
            Err(error) => Err(at()(error)),
            Ok(ContainerData::Tar { path, compression }) => match open(path).await {
                Err(error) => Err(error),
                Ok(file) => {
                    let archive = Archive {
                        what: "the archive",
                        file,
                        codec: codec_of(compression),
                        mounts: mounts.iter().map(|mount| mount.mount_point.clone()).collect(),
                        data_bytes_max,
                    };
                    unpack(runner, lines, archive, self.sink, self.cancel).await
                }
            },
            Ok(_) => Err(CtError::Invalid(
                "The provider offers no tar archive; others cannot be restored.".to_owned(),
            )),
        };
        let limit = self.ctx.limits.undo;
        let call = Call { cancel: CancellationToken::new(), deadline: None };
        match tokio::time::timeout(limit, source.cleanup(&call)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => self.sink.warn(&format!("end of the restore: {error}")),
            Err(_) => self.sink.warn("end of the restore: the provider does not answer in time"),
        }
        unpacked
    }
}

fn codec_of(compression: Compression) -> Codec {
    match compression {
        Compression::None => Codec::None,
        Compression::Gz => Codec::Gz,
        Compression::Bz2 => Codec::Bz2,
        Compression::Xz => Codec::Xz,
        Compression::Zst => Codec::Zst,
    }
}

/// Opens what a provider offers: a file or a FIFO, and not by a link.
async fn open(path: PathBuf) -> Result<File, CtError> {
    let doing = format!("open '{}', which the provider offers", path.display());
    let opening = beside(move || {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_NOFOLLOW);
        let file = options.open(&path).map_err(CtError::at(doing))?;
        let kind = file.metadata().map_err(CtError::at("look at it"))?.file_type();
        if kind.is_file() || kind.is_fifo() {
            return Ok(file);
        }
        Err(CtError::Invalid(format!("'{}' is neither a file nor a FIFO.", path.display())))
    });
    let late = || CtError::Invalid("The provider does not write its archive.".to_owned());
    tokio::time::timeout(OPEN_LIMIT, opening).await.map_err(|_| late())?
}

/// The archive's options of a volume, with the new name.
fn value_of(one: &Planned, volume: &VolumeId) -> String {
    let mut entry = one.entry.clone();
    if one.format == ImageFormat::Subvol {
        entry.options.remove("size");
    }
    if one.entry.options.named.is_empty() {
        return entry_of(&one.mount, volume, one.format);
    }
    entry.volume = volume.to_string();
    entry.to_value()
}

/// The configuration without what reaches the host, and as an unprivileged one if it was one.
fn rewrite(
    archived: &CtConfig,
    allow_raw_config: bool,
    warnings: &mut Vec<String>,
) -> Result<CtConfig, CtError> {
    let mut config = CtConfig::parse(&archived.lines().for_backup().to_string());
    let pairs: Vec<(String, String)> =
        config.lines().pairs().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    for (key, value) in pairs {
        let is_device = matches!(split_numbered(&key), Some(("dev", _)));
        let reaches = key.starts_with("lxc.") || key == "hookscript" || is_device;
        if reaches && !allow_raw_config && config.lines_mut().remove(&key) {
            warnings.push(format!(
                "dropped '{key}: {value}': it gives the container access to the host; use \
                 --allow-raw-config to keep it"
            ));
        }
    }
    if archived.is_unprivileged() {
        config.lines_mut().set("unprivileged", "1")?;
    }
    if config.lines_mut().remove("template") {
        warnings.push("dropped 'template': the restored container is none".to_owned());
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_reaches_the_host_is_dropped_and_ids_are_the_usual_ones() {
        let archived = CtConfig::parse(
            "hostname: web\nlxc.idmap: u 0 0 65536\nlxc.idmap: g 0 0 65536\nhookscript: local:a\n\
             lxc.mount.entry: /etc srv none bind\ndev0: /dev/sda\nunused0: local:200/x.raw\n\
             rootfs: local:200/a.raw,size=1G\ntemplate: 1\n",
        );
        let mut warnings = Vec::new();
        let config = rewrite(&archived, false, &mut warnings).unwrap();
        assert_eq!(
            config.to_string(),
            "hostname: web\nrootfs: local:200/a.raw,size=1G\nunprivileged: 1\n"
        );
        assert_eq!(warnings.len(), 5, "{warnings:?}");
        assert_eq!(config.id_map().unwrap()[0].host_id, 100_000);
        let kept = rewrite(&archived, true, &mut Vec::new()).unwrap();
        assert!(kept.to_string().contains("lxc.mount.entry"));
    }

    #[tokio::test]
    async fn a_provider_cannot_have_a_link_or_a_device_opened() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
        assert!(open(link).await.is_err());
        assert!(open("/dev/null".into()).await.is_err());
        assert!(open(dir.path().to_owned()).await.is_err());
    }
}
