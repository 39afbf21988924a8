// SPDX-License-Identifier: MIT OR Apache-2.0
//! Restores disks of an archive to files and block devices, without any guest.
//!
//! A file is written as `NAME.partial`, which is locked meanwhile, and gets its name when all of it is
//! durable. What a crash leaves under that name the next restore to the same file replaces. The
//! directory for the provider's sockets is locked, too: one whose lock is free is removed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;

use provider_api::{CancellationToken, Provider};
use rustix::fs::{CWD, FlockOperation, OFlags, RenameFlags, flock, renameat_with};
use serde::Serialize;
use tokio::process::Command;

use super::copy::{self, Source};
use super::task::{Restore, remove_dir};
use super::{RestoreOptions, meter::Meter};
use crate::blocking;
use crate::job::report::millis;
use crate::job::{JobContext, chain};
use crate::journal::sync_dir;
use crate::layout::{Layout, check_socket_path, make_private_dir};
use crate::lock::FileLock;
use crate::storage::ImageFormat;
use crate::task_log::{TaskSink, clean, clock, size};
use crate::temp_tree;
use crate::vm::backup::short_id;

/// How the directories of these restores begin.
const DIR_PREFIX: &str = "f-";
const LOCK_NAME: &str = "lock";

/// A disk of an archive, and the file or block device that it is restored to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskToFile {
    /// Its name in the archive.
    pub device: String,
    /// An absolute path: of a file that is made, or of a block device.
    pub path: PathBuf,
}

/// A disk that was restored to a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RestoredFile {
    /// Its name in the archive.
    pub device: String,
    /// Where it is.
    pub path: PathBuf,
    /// Size in bytes.
    pub size_bytes: u64,
}

/// Result of a restore to files.
#[derive(Debug, Clone, Serialize)]
pub struct FileReport {
    /// The archive.
    pub archive: String,
    /// What went wrong with the first disk that failed; the files made before it stay.
    pub error: Option<String>,
    /// What is odd.
    pub warnings: Vec<String>,
    /// What was restored.
    pub files: Vec<RestoredFile>,
    /// Duration in milliseconds.
    pub duration_ms: u64,
}

/// Restores disks to files and block devices, one after the other. Of the options `source_storage`, `format`
/// (of files), `force` (overwrite block devices) and the limit count.
///
/// Must be awaited to its end; cancel it by the token.
pub async fn restore_to_files(
    ctx: &JobContext,
    provider: &dyn Provider,
    archive: &str,
    disks: &[DiskToFile],
    options: &RestoreOptions,
    sink: &dyn TaskSink,
    cancel: &CancellationToken,
) -> FileReport {
    let started = Instant::now();
    let mut report = FileReport {
        archive: archive.to_owned(),
        error: None,
        warnings: Vec::new(),
        files: Vec::new(),
        duration_ms: 0,
    };
    let names: Vec<String> = disks.iter().map(|disk| clean(&disk.device)).collect();
    sink.info(&format!("restore of {} of '{}'", names.join(", "), clean(archive)));
    let task = Restore { ctx, provider, archive, id: 0, options, sink, cancel };
    match Box::pin(task.run_to_files(disks, &mut report)).await {
        Ok(()) => sink.info(&format!("restore finished ({})", clock(started.elapsed()))),
        Err(error) => {
            sink.error(&format!("restore failed - {error}"));
            report.error = Some(error);
        }
    }
    report.duration_ms = millis(started.elapsed());
    report
}

/// Where a disk goes, claimed.
#[derive(Debug)]
enum Claim {
    /// A new file, under its name for now.
    File { partial: PathBuf, path: PathBuf, file: File },
    /// A block device that nobody else uses.
    Device { path: PathBuf, _held: File },
}

impl Restore<'_> {
    async fn run_to_files(
        &self,
        disks: &[DiskToFile],
        report: &mut FileReport,
    ) -> Result<(), String> {
        provider_api::check_archive_name(self.archive)?;
        self.ctx.tools.qemu_img().map_err(|error| chain(&error))?;
        self.activate().await?;
        let mut source = self.begin_source().await?;
        let layout = self.ctx.layout.clone();
        let dir = blocking::run(move || Ok(private_dir(&layout))).await;
        let (result, made) = match dir.map_err(|error| error.to_string()).flatten() {
            Ok((dir, held)) => {
                let result = self.all_to_files(source.as_mut(), disks, &dir, report).await;
                (result, Some((dir, held)))
            }
            Err(error) => (Err(error), None),
        };
        let mut problems: Vec<String> = self.cleanup(source).await.err().into_iter().collect();
        if let Some((dir, _held)) = made {
            problems.extend(remove_dir(dir).await.err());
        }
        for problem in problems {
            self.sink.warn(&problem);
            report.warnings.push(problem);
        }
        result
    }

    async fn all_to_files(
        &self,
        source: &mut dyn provider_api::VmRestore,
        disks: &[DiskToFile],
        dir: &Path,
        report: &mut FileReport,
    ) -> Result<(), String> {
        let mut sized = Vec::new();
        for disk in disks {
            let found = source.devices().iter().find(|device| device.device == disk.device);
            let Some(found) = found else {
                let has: Vec<_> = source.devices().iter().map(|d| clean(&d.device)).collect();
                let (device, has) = (clean(&disk.device), has.join(", "));
                return Err(format!("the archive has no disk '{device}'; it has {has}"));
            };
            super::plan::check_device(found)?;
            sized.push((disk, found.size_bytes));
        }
        // All of them are looked at before the first one is begun.
        for (disk, size_bytes) in &sized {
            format_of(&disk.path, self.options.format)?;
            let (path, size_bytes, force) = (disk.path.clone(), *size_bytes, self.options.force);
            let looked = blocking::run(move || Ok(look(&path, size_bytes, force)));
            self.cancellable(async { looked.await.map_err(|error| error.to_string())? }).await?;
        }
        for (disk, size_bytes) in sized {
            self.one_to_file(source, disk, size_bytes, dir, report).await?;
        }
        Ok(())
    }

    async fn one_to_file(
        &self,
        source: &mut dyn provider_api::VmRestore,
        disk: &DiskToFile,
        size_bytes: u64,
        dir: &Path,
        report: &mut FileReport,
    ) -> Result<(), String> {
        let DiskToFile { device, path } = disk;
        let limit = self.ctx.limits.offer;
        let offered = self.offer_one(source, device, size_bytes, dir, limit).await;
        let result = match offered {
            Ok(offered) => self.write(offered, disk, size_bytes).await,
            Err(error) => Err(error),
        };
        let mut warnings = Vec::new();
        self.withdraw_one(source, device, &mut warnings).await;
        report.warnings.append(&mut warnings);
        result.map_err(|error| format!("the disk '{device}': {error}"))?;
        report.files.push(RestoredFile { device: device.clone(), path: path.clone(), size_bytes });
        Ok(())
    }

    async fn write(
        &self,
        source: Source,
        disk: &DiskToFile,
        size_bytes: u64,
    ) -> Result<(), String> {
        let DiskToFile { device, path } = disk;
        let shown = path.display();
        self.sink.info(&format!("restoring '{device}' to '{shown}' ({})", size(size_bytes)));
        let format = format_of(path, self.options.format)?;
        let (wanted, force) = (path.clone(), self.options.force);
        let claim = blocking::run(move || Ok(claim(&wanted, size_bytes, force)));
        let claim = claim.await.map_err(|error| error.to_string())??;
        let filled = self.cancellable(self.fill_claim(source, &claim, device, size_bytes, format));
        let filled = filled.await;
        blocking::run(move || {
            Ok(match filled {
                Ok(()) => claim.complete(),
                Err(error) => {
                    claim.give_up();
                    Err(error)
                }
            })
        })
        .await
        .map_err(|error| error.to_string())?
    }

    async fn fill_claim(
        &self,
        source: Source,
        claim: &Claim,
        device: &str,
        size_bytes: u64,
        format: ImageFormat,
    ) -> Result<(), String> {
        let (path, driver, is_zero) = match claim {
            Claim::File { partial, .. } => (partial, "file", true),
            Claim::Device { path, .. } => (path, "host_device", false),
        };
        let name = path.to_str().ok_or("the path is not text (UTF-8)")?.replace(',', ",,");
        let format = match claim {
            Claim::Device { .. } => ImageFormat::Raw,
            Claim::File { file, .. } if format == ImageFormat::Raw => {
                file.set_len(size_bytes).map_err(|error| error.to_string())?;
                format
            }
            Claim::File { .. } => {
                self.make_qcow2(path, size_bytes).await?;
                format
            }
        };
        let options = format!("driver={},file.driver={driver},file.filename={name}", format.name());
        let target = copy::Target {
            options: &options,
            files: &[path],
            size_bytes,
            is_zero,
            limit_bytes_per_s: self.options.limit_bytes_per_s,
        };
        let disks = std::iter::once((device.to_owned(), size_bytes));
        let meter = Meter::new(self.id, disks, self.sink);
        let stall = self.ctx.limits.transfer_stall;
        copy::copy(&self.ctx.tools, source, target, stall, |done| meter.tell(0, done)).await
    }

    async fn make_qcow2(&self, path: &Path, size_bytes: u64) -> Result<(), String> {
        let qemu_img = self.ctx.tools.qemu_img().map_err(|error| chain(&error))?;
        let made = Command::new(qemu_img)
            .args(["create", "-q", "-f", "qcow2", "--"])
            .arg(path)
            .arg(size_bytes.to_string())
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let made = made.await.map_err(|error| format!("cannot start qemu-img: {error}"))?;
        if made.status.success() {
            return Ok(());
        }
        Err(format!("qemu-img made no image: {}", clean(&String::from_utf8_lossy(&made.stderr))))
    }
}

/// The format of a file: what was asked for, else what its ending says, which nobody should have to doubt.
fn format_of(path: &Path, asked: Option<ImageFormat>) -> Result<ImageFormat, String> {
    let ending = path.extension().and_then(|ending| match ending.to_str()? {
        "qcow2" => Some(ImageFormat::Qcow2),
        "raw" => Some(ImageFormat::Raw),
        _ => None,
    });
    match (asked, ending) {
        (Some(asked), Some(ending)) if asked != ending => Err(format!(
            "'{}' does not end as a file of the format '{asked}' does; choose another name or format",
            path.display()
        )),
        _ => Ok(asked.or(ending).unwrap_or(ImageFormat::Raw)),
    }
}

fn partial_of(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    path.with_file_name(name)
}

/// Whether a disk could be restored there; changes nothing.
fn look(path: &Path, size_bytes: u64, force: bool) -> Result<(), String> {
    let shown = path.display();
    if !path.is_absolute() || path.file_name().is_none() {
        return Err(format!("'{shown}' is not an absolute path of a file"));
    }
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let dir = path.parent().unwrap_or(path);
            if !dir.is_dir() {
                return Err(format!("there is no directory '{}'", dir.display()));
            }
            super::space::check_dir(dir)
        }
        Err(error) => Err(format!("'{shown}' cannot be used: {error}")),
        Ok(meta) if meta.file_type().is_block_device() && force => {
            open_device(path, size_bytes).map(drop)
        }
        Ok(meta) if meta.file_type().is_block_device() => Err(format!(
            "all that is on the block device '{shown}' would be lost; add --force to allow that"
        )),
        Ok(_) => Err(format!("'{shown}' exists already; choose another name")),
    }
}

fn open_device(path: &Path, size_bytes: u64) -> Result<File, String> {
    let shown = path.display();
    // Nobody has it mounted, or as a part of something else.
    let flags = OFlags::EXCL.bits().cast_signed();
    let mut device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)
        .map_err(|error| format!("the block device '{shown}' cannot be used: {error}"))?;
    let has_bytes = device.seek(SeekFrom::End(0)).map_err(|error| error.to_string())?;
    if has_bytes < size_bytes {
        return Err(format!(
            "the block device '{shown}' has {has_bytes} bytes; the disk needs {size_bytes}"
        ));
    }
    Ok(device)
}

fn claim(path: &Path, size_bytes: u64, force: bool) -> Result<Claim, String> {
    look(path, size_bytes, force)?;
    if path.exists() {
        let held = open_device(path, size_bytes)?;
        return Ok(Claim::Device { path: path.to_owned(), _held: held });
    }
    let partial = partial_of(path);
    let fault = |error: io::Error| format!("cannot make '{}': {error}", partial.display());
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(&partial)
        .map_err(fault)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| format!("'{}' is being restored already", path.display()))?;
    file.set_len(0).map_err(fault)?;
    Ok(Claim::File { partial, path: path.to_owned(), file })
}

impl Claim {
    fn complete(self) -> Result<(), String> {
        let Self::File { partial, path, file } = &self else { return Ok(()) };
        let named = file
            .sync_all()
            .and_then(|()| name_once(partial, path))
            .and_then(|()| path.parent().map_or(Ok(()), sync_dir));
        if let Err(error) = named {
            let shown = path.display().to_string();
            self.give_up();
            return Err(format!("cannot make '{shown}': {error}"));
        }
        Ok(())
    }

    fn give_up(self) {
        if let Self::File { partial, .. } = self {
            // The next restore to this file replaces what cannot be removed now.
            let _ = fs::remove_file(partial);
        }
    }
}

/// Gives a file its name, unless that is taken meanwhile.
fn name_once(partial: &Path, path: &Path) -> io::Result<()> {
    match renameat_with(CWD, partial, CWD, path, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        // Not every file system can do that in one step.
        Err(rustix::io::Errno::INVAL) if !path.try_exists()? => fs::rename(partial, path),
        Err(errno) => Err(errno.into()),
    }
}

/// A directory of this restore alone; those that dead ones left are removed.
fn private_dir(layout: &Layout) -> Result<(PathBuf, FileLock), String> {
    let run = layout.run();
    for entry in fs::read_dir(run).into_iter().flatten().flatten() {
        let is_ours = entry.file_name().to_string_lossy().starts_with(DIR_PREFIX);
        let path = entry.path();
        if is_ours && FileLock::try_acquire(&path.join(LOCK_NAME), "A restore").is_ok() {
            // Only space is lost if it stays.
            let _ = temp_tree::remove(&path);
        }
    }
    let dir = run.join(format!("{DIR_PREFIX}{}", short_id()));
    let words = |error: crate::layout::LayoutError| chain(&error);
    check_socket_path(&dir.join("socket-of-a-provider")).map_err(words)?;
    make_private_dir(&dir).map_err(words)?;
    let held = FileLock::try_acquire(&dir.join(LOCK_NAME), "A restore");
    Ok((dir, held.map_err(|error| chain(&error))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_gets_its_name_when_it_is_complete() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        let partial = dir.path().join("disk.raw.partial");
        // What a crash has left.
        fs::write(&partial, "old").unwrap();
        let first = claim(&path, 512, false).unwrap();
        assert!(!path.exists() && fs::read(&partial).unwrap().is_empty());
        assert!(claim(&path, 512, false).unwrap_err().contains("is being restored already"));
        first.complete().unwrap();
        assert!(path.exists() && !partial.exists());
        assert!(claim(&path, 512, true).unwrap_err().contains("exists already"));
        let other = dir.path().join("other");
        claim(&other, 512, false).unwrap().give_up();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        // Somebody was faster.
        let late = claim(&other, 512, false).unwrap();
        fs::write(&other, "theirs").unwrap();
        assert!(late.complete().is_err());
        assert_eq!(fs::read_to_string(other).unwrap(), "theirs");
    }

    #[test]
    fn a_file_has_the_format_that_its_name_says() {
        use ImageFormat::{Qcow2, Raw};
        for (path, asked, expected) in [
            ("/a/x.qcow2", None, Some(Qcow2)),
            ("/a/x.raw", None, Some(Raw)),
            ("/a/x", None, Some(Raw)),
            ("/a/x.img", Some(Qcow2), Some(Qcow2)),
            ("/a/x.qcow2", Some(Raw), None),
            ("/a/x.raw", Some(Qcow2), None),
        ] {
            assert_eq!(format_of(Path::new(path), asked).ok(), expected, "{path} {asked:?}");
        }
    }

    #[test]
    fn what_cannot_be_written_is_named() {
        for (path, words) in [
            ("relative", "not an absolute path"),
            ("/", "not an absolute path"),
            ("/nonexistent/dir/file", "no directory"),
            ("/tmp", "exists already"),
        ] {
            let error = look(Path::new(path), 512, true).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn directories_of_dead_restores_are_removed() {
        let root = tempfile::tempdir().unwrap();
        let layout = Layout::new(Some(root.path().to_owned()));
        let (first, held) = private_dir(&layout).unwrap();
        let (second, _also) = private_dir(&layout).unwrap();
        assert!(first.exists() && second.exists());
        drop(held);
        private_dir(&layout).unwrap();
        assert!(!first.exists() && second.exists());
    }
}
