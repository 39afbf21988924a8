// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is done once a guest's backup is durable, QEMU knows it, and its archive is described: its log is
//! handed over, and older archives are removed. It can only warn: the backup has succeeded. If the process
//! dies meanwhile, the next job removes what this one did not.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::Path;

use provider_api::{CancellationToken, GuestKind, LOG_BYTES_MAX, Provider};

use super::{BackupOptions, GuestReport, JobContext, call_within, chain, in_time};
use crate::blocking;
use crate::config::guest::VmConfig;
use crate::notes_template::NotesTemplate;
use crate::prune::{Fate, Pruner, list};
use crate::task_log::TaskSink;

/// The line that says that a part of a log is left out is shorter.
const NOTE_BYTES_MAX: usize = 128;

/// Checks what can be known before any guest is touched.
///
/// # Errors
/// What cannot work, in words.
pub(super) fn check_options(
    options: &BackupOptions,
    provider: &dyn Provider,
) -> Result<(), String> {
    if let Some(template) = &options.notes {
        NotesTemplate::parse(template)?;
    }
    if options.protected && !provider.describe().capabilities.protect {
        return Err(format!(
            "the provider of the storage '{}' cannot protect archives",
            options.storage
        ));
    }
    Ok(())
}

/// Checks before the backup of a guest that it may have one more protected archive.
///
/// # Errors
/// The limit is reached, or cannot be checked, in words.
pub(super) async fn check_protected(
    ctx: &JobContext,
    provider: &dyn Provider,
    options: &BackupOptions,
    report: &GuestReport,
    cancel: &CancellationToken,
) -> Result<(), String> {
    let Some(limit) = options.max_protected.filter(|_| options.protected) else { return Ok(()) };
    let archives = list(provider, &ctx.limits, cancel).await?;
    let of_guest = archives.iter().filter(|a| a.subtype == report.kind && a.guest_id == report.id);
    let protected = of_guest.filter(|archive| archive.protected).count();
    if protected as u64 >= u64::from(limit) {
        return Err(format!(
            "the storage '{}' may hold {limit} protected archives of a guest and has {protected} of \
             this one; unprotect one, or raise 'max-protected-backups'",
            options.storage
        ));
    }
    Ok(())
}

/// A guest's committed archive.
pub(super) struct Aftermath<'a> {
    pub(super) ctx: &'a JobContext,
    pub(super) provider: &'a dyn Provider,
    pub(super) options: &'a BackupOptions,
    pub(super) sink: &'a dyn TaskSink,
    pub(super) cancel: &'a CancellationToken,
}

impl Aftermath<'_> {
    /// Does what was asked for, if the backup is durable.
    pub(super) async fn run(&self, report: &mut GuestReport) {
        let Some(archive) = report.archive.clone().filter(|_| report.is_success()) else { return };
        if let Err(error) = self.keep_log(&archive, report).await {
            self.warn(report, format!("the archive has no log: {error}"));
        }
        if let Err(error) = self.prune(&archive, report).await {
            self.warn(report, format!("older archives are not pruned: {error}"));
        }
    }

    fn warn(&self, report: &mut GuestReport, text: String) {
        self.sink.warn(&text);
        report.warnings.push(text);
    }

    /// Hands over the log as far as it is written: what follows is about other archives, or comes when
    /// this one may have been pruned.
    async fn keep_log(&self, archive: &str, report: &GuestReport) -> Result<(), String> {
        let Some(path) = report.log_path.clone() else { return Ok(()) };
        if !self.provider.describe().capabilities.log {
            return Ok(());
        }
        let read = blocking::run(move || read_log(&path, LOG_BYTES_MAX)).await;
        let log = read.map_err(|error| format!("it cannot be read: {error}"))?;
        let limits = &self.ctx.limits;
        let call = call_within(self.cancel, limits.provider_call);
        in_time(limits, self.provider.keep_log(archive, &log, &call)).await
    }

    async fn prune(&self, archive: &str, report: &mut GuestReport) -> Result<(), String> {
        let Some(retention) = self.options.prune else { return Ok(()) };
        if retention == crate::retention::Retention::All {
            return Ok(());
        }
        self.sink.info(&format!("prune older backups with retention: {retention}"));
        let pruner = Pruner {
            provider: self.provider,
            storage: &self.options.storage,
            retention,
            zone: jiff::tz::TimeZone::system(),
            limits: &self.ctx.limits,
            sink: self.sink,
            cancel: self.cancel,
        };
        if let Some(other) = self.would_lose_disks(&pruner, report).await? {
            return Err(format!(
                "this backup has no disk, and '{other}' has some; if that is meant, `vzdump prune` \
                 removes it"
            ));
        }
        let entries = pruner.prune_guest(report.kind, report.id, Some(archive)).await?;
        for entry in entries {
            match entry.fate {
                Fate::Removed => report.pruned.push(entry.archive),
                // The sink has it already.
                Fate::Failed { error } => {
                    report.warnings.push(format!("'{}' was not removed: {error}", entry.archive));
                }
                _ => {}
            }
        }
        let count = report.pruned.len();
        self.sink.info(&format!("pruned {count} backup(s) not covered by keep-retention policy"));
        Ok(())
    }

    /// After a backup of a VM without disks: an archive with some that would be removed. The disks may have been lost
    /// by mistake, and then such archives are all that is left of them.
    async fn would_lose_disks(
        &self,
        pruner: &Pruner<'_>,
        report: &GuestReport,
    ) -> Result<Option<String>, String> {
        if report.kind != GuestKind::Qemu || !report.volumes.is_empty() {
            return Ok(None);
        }
        let limits = &self.ctx.limits;
        for entry in pruner.plan().await? {
            let is_ours = entry.subtype == report.kind && entry.vmid == report.id;
            if !is_ours || entry.fate != Fate::Remove {
                continue;
            }
            let call = call_within(self.cancel, limits.provider_call);
            let config = in_time(limits, self.provider.guest_config(&entry.archive, &call)).await;
            let has_disks = config.and_then(|config| has_disks(config.config));
            if has_disks.map_err(|error| format!("'{}': {error}", entry.archive))? {
                return Ok(Some(entry.archive));
            }
        }
        Ok(None)
    }
}

/// Whether a VM with this configuration has disks that a backup includes.
fn has_disks(config: Vec<u8>) -> Result<bool, String> {
    let disks = VmConfig::from_bytes(config).and_then(|config| config.disks());
    let disks = disks.map_err(|error| chain(&error))?;
    Ok(disks.iter().any(|disk| disk.backup && !disk.is_cdrom))
}

/// Reads a log. Of one that is too long the middle is left out, by whole lines, and a line says so.
fn read_log(path: &Path, bytes_max: usize) -> io::Result<String> {
    let mut file = File::open(path)?;
    let size_bytes = file.metadata()?.len();
    let mut read = |from, length: usize| {
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        (&file).take(length as u64).read_to_end(&mut bytes)?;
        Ok::<_, io::Error>(bytes)
    };
    if size_bytes <= bytes_max as u64 {
        let text = String::from_utf8_lossy(&read(0, bytes_max)?).into_owned();
        // It grows where bytes are no text.
        return Ok(text[..text.floor_char_boundary(bytes_max)].to_owned());
    }
    let half = bytes_max.saturating_sub(NOTE_BYTES_MAX) / 2;
    let (begin, end) = (read(0, half)?, read(size_bytes - half as u64, half)?);
    let begin = &begin[..begin.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1)];
    let end = &end[end.iter().position(|byte| *byte == b'\n').map_or(end.len(), |at| at + 1)..];
    let left_out = size_bytes - begin.len() as u64 - end.len() as u64;
    let note = format!("[{left_out} bytes of the log are left out here]\n");
    let text = [begin, note.as_bytes(), end].concat();
    let text = String::from_utf8_lossy(&text);
    Ok(text[..text.floor_char_boundary(bytes_max)].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_a_long_log_is_left_out_by_whole_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let lines: Vec<String> =
            (0..1000).map(|number| format!("line {number} \u{e9}\n")).collect();
        let whole = lines.concat();
        std::fs::write(&path, &whole).unwrap();
        assert_eq!(read_log(&path, whole.len()).unwrap(), whole);
        for bytes_max in [whole.len() - 1, 5000, 1000, 200] {
            let log = read_log(&path, bytes_max).unwrap();
            assert!(log.len() <= bytes_max);
            let (kept, notes): (Vec<_>, Vec<_>) =
                log.split_inclusive('\n').partition(|line| lines.iter().any(|own| own == line));
            let [note] = notes.as_slice() else { panic!("{notes:?}") };
            let kept_bytes: usize = kept.iter().map(|line| line.len()).sum();
            let left_out = whole.len() - kept_bytes;
            assert_eq!(*note, format!("[{left_out} bytes of the log are left out here]\n"));
            assert!(whole.starts_with(kept[0]) && whole.ends_with(kept[kept.len() - 1]));
        }
        std::fs::write(&path, [0xff; 10]).unwrap();
        assert!(read_log(&path, 10).unwrap().len() <= 10);
    }
}
