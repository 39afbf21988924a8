// SPDX-License-Identifier: MIT OR Apache-2.0
//! Puts a restored configuration in the place of the one that a guest has.
//!
//! ```text
//!  stage     the new configuration and the new rules lie beside the old ones, durably
//!  Switch    journalled; from here on "no staged configuration" means "switched"
//!  rename    the new configuration is there, in one step
//!  settle    the rename is durable; rules
//!  Complete  journalled; then the old volumes go, of which nothing is named any more
//! ```
//!
//! A crash before the rename leaves the old guest as it was; the recovery undoes. After it the
//! recovery finishes. The guest's lock and its power lock are held throughout.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use provider_api::GuestKind;

use super::task::step;
use crate::blocking;
use crate::config::guest::VmConfig;
use crate::config::{ConfigError, write_atomically};
use crate::job::{JobContext, chain, guest_words};
use crate::journal::volumes::free_within;
use crate::journal::{self, Entry, Journal, Record, sync_dir};
use crate::layout::Layout;
use crate::storage::VolumeId;
use crate::task_log::TaskSink;

/// What the names of staged files end in.
const STAGED: &str = ".restore";

fn staged(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // No name that anything reads as a configuration.
    path.with_file_name(format!(".{name}{STAGED}"))
}

/// The guest that is replaced.
type Guest = (GuestKind, u32);

fn staged_files(layout: &Layout, (kind, id): Guest) -> [PathBuf; 2] {
    [staged(&layout.guest_config_path(kind, id)), staged(&layout.firewall_path(id))]
}

/// Fails if the configuration is not the known one any more: nothing keeps people from changing it while a restore
/// works for hours, and what replaces it is made of the one that was read at first.
///
/// # Errors
/// In words.
pub async fn check_unchanged(
    layout: &Layout,
    (kind, id): Guest,
    known: &VmConfig,
) -> Result<(), String> {
    let path = layout.guest_config_path(kind, id);
    let shown = path.display().to_string();
    let now = blocking::run(move || Ok(VmConfig::read(&path))).await;
    let now = now.map_err(|error| error.to_string())?.map_err(|error| chain(&error))?;
    if now.is_some_and(|now| now.to_string() == known.to_string()) {
        return Ok(());
    }
    Err(format!(
        "'{shown}' was changed while the restore worked, and that change would be lost; restore \
         again, and leave it alone meanwhile"
    ))
}

/// Stages and switches. After an error before the switch the old configuration is in place; what is staged is
/// removed by [`unstage`].
///
/// # Errors
/// In words.
pub async fn switch(
    layout: &Layout,
    guest: Guest,
    config: &VmConfig,
    firewall: Option<Vec<u8>>,
    journal: &Journal,
) -> Result<(), String> {
    let [staged_config, staged_firewall] = staged_files(layout, guest);
    let (text, to) = (config.to_string(), staged_config.clone());
    beside(move || {
        if let Some(rules) = firewall {
            write_atomically(&staged_firewall, &rules, false)?;
        }
        write_atomically(&to, text.as_bytes(), false)
    })
    .await?;
    journal.append(Entry::Switch).await.map_err(|error| chain(&error))?;
    let to = layout.guest_config_path(guest.0, guest.1);
    beside(move || {
        let fault = |source| ConfigError::Write { path: to.clone(), source };
        fs::rename(&staged_config, &to).map_err(fault)
    })
    .await?;
    #[cfg(debug_assertions)]
    crate::job::kill_point::at("restore:switched");
    Ok(())
}

/// Removes what is staged, when nothing else of the restore is left: as long as the staged configuration is there, the
/// recovery knows that the switch has not happened.
///
/// # Errors
/// In words.
pub async fn unstage(layout: &Layout, guest: Guest) -> Result<(), String> {
    let [config, firewall] = staged_files(layout, guest);
    for path in [firewall, config] {
        remove_file(path).await?;
    }
    Ok(())
}

/// What [`complete`] came to.
#[derive(Debug)]
pub struct Completed {
    /// The old volumes, if they are gone.
    pub removed: Vec<String>,
    /// What is left to do: the recovery's, as long as there is the journal.
    pub problems: Vec<String>,
}

/// From here on the guest is whole; what is left can only warn.
pub async fn complete(
    ctx: &JobContext,
    guest: Guest,
    journal: Journal,
    frees: &BTreeSet<VolumeId>,
) -> Completed {
    finish(ctx, guest, journal, frees, Ok(())).await
}

/// The same after a directory was removed, or was not: then the recovery has to do it.
pub(super) async fn finish(
    ctx: &JobContext,
    guest: Guest,
    journal: Journal,
    frees: &BTreeSet<VolumeId>,
    dir_removed: Result<(), String>,
) -> Completed {
    let frees: Vec<VolumeId> = frees.iter().cloned().collect();
    let mut problems = match settle(ctx, guest).await {
        Err(problem) => vec![problem],
        Ok(()) => {
            if let Err(error) = journal.append(Entry::Complete).await {
                tracing::warn!(%error, "the end of a restore was not journalled");
            }
            free_unnamed(ctx, guest, &frees).await.err().unwrap_or_default()
        }
    };
    step("restore:finished");
    let is_freed = problems.is_empty();
    problems.extend(dir_removed.err());
    if problems.is_empty() {
        problems.extend(journal.remove().await.err().map(|error| chain(&error)));
    }
    let removed =
        if is_freed { frees.iter().map(ToString::to_string).collect() } else { <_>::default() };
    Completed { removed, problems }
}

/// What follows a switch: it is made durable, and the rules follow. Before that a power cut brings the old
/// configuration back, so the old volumes must be there, and the journal must not say that all is done.
async fn settle(ctx: &JobContext, (kind, id): Guest) -> Result<(), String> {
    let layout = &ctx.layout;
    let (config, firewall) = (layout.guest_config_path(kind, id), layout.firewall_path(id));
    let settled = blocking::run(move || {
        config.parent().map_or(Ok(()), sync_dir)?;
        match fs::rename(staged(&firewall), &firewall) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(()) => firewall.parent().map_or(Ok(()), sync_dir),
        }
    });
    settled.await.map_err(|error| {
        format!(
            "the restored configuration of {} may be lost by a power cut, so the volumes it \
             replaced are kept: {error}",
            guest_words(kind, id)
        )
    })
}

/// Frees volumes that the guest's configuration does not name.
pub(super) async fn free_unnamed(
    ctx: &JobContext,
    (kind, id): Guest,
    frees: &[VolumeId],
) -> Result<(), Vec<String>> {
    let config = VmConfig::read(&ctx.layout.guest_config_path(kind, id));
    let config = config.map_err(|error| vec![chain(&error)])?.unwrap_or_default();
    let mut problems = Vec::new();
    for volume in frees {
        if volume.guest_id() == id && !config.names_volume(&volume.to_string()) {
            problems.extend(free_within(ctx, volume, ctx.limits.undo).await.err());
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

/// Undoes or finishes a restore that died while it replaced a guest or some of its disks.
pub(crate) async fn recover(
    ctx: &JobContext,
    record: &Record,
    sink: &dyn TaskSink,
) -> Result<(), String> {
    let guest @ (kind, id) = (record.begin.guest_kind, record.begin.guest_id);
    let name = guest_words(kind, id);
    let Some((frees, in_place)) = &record.replaces else { return Ok(()) };
    let frees: Vec<VolumeId> = frees.iter().filter_map(|text| text.parse().ok()).collect();
    let [staged_config, _] = staged_files(&ctx.layout, guest);
    let is_staged = blocking::run(move || staged_config.try_exists())
        .await
        .map_err(|error| error.to_string())?;
    // Whatever the journal says: a power cut may have undone the rename.
    if (record.complete || record.switching) && !is_staged {
        sink.info(&format!("the interrupted restore of {name} had replaced its disks"));
        settle(ctx, guest).await?;
        // What was found says the same the next time, so a full disk must not keep from freeing.
        if let Err(error) = journal::append_to(&record.path, Entry::Complete).await {
            sink.warn(&format!("going on all the same: {}", chain(&error)));
        }
        return free_unnamed(ctx, guest, &frees).await.map_err(|problems| problems.join("; "));
    }
    let new: Vec<VolumeId> = record.volumes.iter().filter_map(|text| text.parse().ok()).collect();
    let both = if *in_place { [new, frees].concat() } else { new };
    let freed = free_unnamed(ctx, guest, &both).await;
    let now =
        VmConfig::read(&ctx.layout.guest_config_path(kind, id)).map_err(|error| chain(&error))?;
    if now.is_some_and(|config| config.get("lock") == Some(super::old::LOCK)) {
        sink.warn(&format!(
            "the disks that the restore of {name} was to replace are gone, as '--in-place' allows; \
             restore it again"
        ));
    }
    freed.map_err(|problems| problems.join("; "))?;
    step("restore:freed");
    unstage(&ctx.layout, guest).await
}

async fn remove_file(path: PathBuf) -> Result<(), String> {
    let shown = path.display().to_string();
    match blocking::run(move || fs::remove_file(path)).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(format!("cannot remove '{shown}': {error}"))
        }
        _ => Ok(()),
    }
}

/// Awaited to its end, so that nobody undoes what is still being done.
pub(super) async fn beside(
    write: impl FnOnce() -> Result<(), ConfigError> + Send + 'static,
) -> Result<(), String> {
    let written = blocking::run(move || Ok(write())).await.map_err(|error| error.to_string())?;
    written.map_err(|error| chain(&error))
}
