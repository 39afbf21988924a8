// SPDX-License-Identifier: MIT OR Apache-2.0
//! The mode suspend: a container's volumes are copied to a temporary directory, once while it runs and once,
//! what has changed since, while it is frozen.

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use provider_api::{Excludes, IdMapRange, IgnoredEntry, Reached};
use rustix::fs::fstatvfs;
use vzdump_core::config::container::MountEntry;
use vzdump_core::guest::{GuestError, Task};
use vzdump_core::job::{BackupOptions, JobContext};
use vzdump_core::journal::Entry;
use vzdump_core::layout::make_private_dir;
use vzdump_core::storage::ImageFormat;
use vzdump_core::task_log::size;
use vzdump_core::temp_tree;

use crate::CtError;
use crate::attach::detached;
use crate::copy::{Control, CopyError, PassReport, Skipped, TreeCopy};
use crate::guard::{Frozen, Owed, Target};
use crate::ids::{foreign_ids, reversed, user_namespace};
use crate::lxc::Lxc;
use crate::runtime::{Busy, Found, beside};
use crate::snapshot::monitored_mount;
use crate::system::MountAttributes;

/// What is left of the time for a point in time when the container must run again.
const THAW_MARGIN: Duration = Duration::from_secs(20);
/// And when the copy gives up, so that the guard need not do anything.
const COPY_MARGIN: Duration = Duration::from_secs(5);
/// How often the first pass is looked at.
const WATCH: Duration = Duration::from_millis(500);
/// How often it is told how far it is.
const TELL: Duration = Duration::from_secs(60);
/// How many files that were left out are told.
const TOLD_MAX: usize = 20;

/// The copies of one container's volumes.
pub(crate) struct Suspension {
    dir: PathBuf,
    trees: Arc<Mutex<Vec<TreeCopy>>>,
    /// Bytes of the first copy, which tell about how many there are.
    bytes: AtomicU64,
    /// Of the second copy, what it left out among others.
    report: OnceLock<PassReport>,
    /// Held by the thread that works in the directory, also when nobody waits for it any more.
    busy: Busy,
    owed: Owed,
}

/// Ends a copy that nobody waits for.
struct CancelOnDrop(Arc<Control>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// Tells of a directory in which something else begins than the volume.
pub(crate) fn warn_of_foreign(path: &Path, task: Task<'_>) {
    let text = "belongs to another file system or subvolume, and is empty in the backup";
    task.sink.warn(&format!("'{}' {text}", path.display()));
}

impl Suspension {
    /// Chooses a directory; makes nothing but the one around it. May block.
    pub(crate) fn plan(
        ctx: &JobContext,
        options: &BackupOptions,
        id: u32,
        owed: &Owed,
    ) -> Result<Self, CtError> {
        let around = match &options.temp_dir {
            Some(dir) if dir.is_dir() => dir.clone(),
            Some(dir) => {
                let text = format!("The directory '{}' (tmpdir) does not exist.", dir.display());
                return Err(CtError::Invalid(text));
            }
            None => {
                let dir = ctx.layout.temp_dir();
                make_private_dir(&dir)?;
                dir
            }
        };
        let dir = temp_tree::plan(&around, id);
        Ok(Self {
            dir,
            trees: Arc::default(),
            bytes: AtomicU64::new(0),
            report: OnceLock::new(),
            busy: Busy::default(),
            owed: owed.clone(),
        })
    }

    /// What the journal keeps of it.
    pub(crate) fn entry(&self) -> Entry {
        Entry::TemporaryTree { path: self.dir.clone() }
    }

    /// Where the files of a volume are in the end.
    pub(crate) fn path(&self, key: &str) -> PathBuf {
        self.dir.join(key)
    }

    /// Copies everything, while the container runs. It is frozen for a moment before: whatever one of its processes was
    /// about to write then is written, and what is written later changes the times of its file later.
    pub(crate) async fn first(
        &self,
        ctx: &JobContext,
        options: &BackupOptions,
        of: (&Lxc, &[Found], &[IdMapRange]),
        task: Task<'_>,
    ) -> Result<(), CtError> {
        let share = options.bandwidth.as_ref().map(|budget| budget.guest().disk());
        let control = Arc::new(share.map_or_else(Control::default, Control::with_limit));
        let cancel = CancelOnDrop(Arc::clone(&control));
        let (lxc, volumes, ids) = (of.0.clone(), of.1.to_vec(), of.2.to_vec());
        let excludes = options.exclude.clone();
        let (dir, trees) = (self.dir.clone(), Arc::clone(&self.trees));
        let in_thread = Arc::clone(&control);
        let (target, owed) = (processes_of(of.0), self.owed.clone());
        let (program, freeze) = (ctx.guard.program.clone(), ctx.limits.freeze.freeze);
        let hold = hold_of(ctx);
        task.journal.append(Entry::Freeze).await?;
        let settled =
            self.busy.beside(move || Frozen::freeze(&program, target, freeze, hold, &owed)?.thaw());
        settled.await?;
        task.journal.append(Entry::Thawed).await?;
        let work = self.busy.beside(move || {
            let (made, report) = copy_running(&dir, &lxc, (&volumes, &excludes), &ids, &in_thread)?;
            *trees.lock().unwrap_or_else(PoisonError::into_inner) = made;
            Ok(report)
        });
        let started = Instant::now();
        let report = watched(work, &control, ctx.limits.transfer_stall, task).await?;
        drop(cancel);
        self.bytes.store(report.copied_bytes, Ordering::Relaxed);
        task.sink.info(&format!(
            "first copy: {} files, {} in {} ms",
            report.entries,
            size(report.copied_bytes),
            started.elapsed().as_millis()
        ));
        for path in &report.foreign {
            warn_of_foreign(path, task);
        }
        Ok(())
    }

    /// Freezes the container, copies what has changed, and lets it go on, after `goes_on`. Tells for how many milliseconds
    /// it was frozen.
    pub(crate) async fn second(
        &self,
        ctx: &JobContext,
        options: &BackupOptions,
        lxc: &Lxc,
        goes_on: impl Future<Output = Result<(), GuestError>>,
        task: Task<'_>,
    ) -> Result<u64, GuestError> {
        let skips_unreadable = options.skip_unreadable;
        let limits = &ctx.limits;
        let hold = hold_of(ctx);
        let deadline = Instant::now() + hold.saturating_sub(COPY_MARGIN);
        let control = Arc::new(Control::until(deadline));
        let cancel = CancelOnDrop(Arc::clone(&control));
        let (target, owed) = (processes_of(lxc), self.owed.clone());
        let (program, freeze) = (ctx.guard.program.clone(), limits.freeze.freeze);
        let (dir, trees) = (self.dir.clone(), Arc::clone(&self.trees));
        task.journal.append(Entry::Freeze).await?;
        let (is_copied, copied) = tokio::sync::oneshot::channel();
        // Nothing is sent: it goes on when this is dropped, also by a task that is given up.
        let (held, holding) = std::sync::mpsc::channel::<()>();
        let work = self.busy.beside(move || {
            let trees = std::mem::take(&mut *trees.lock().unwrap_or_else(PoisonError::into_inner));
            let started = Instant::now();
            let frozen = Frozen::freeze(&program, target, freeze, hold, &owed)?;
            #[cfg(debug_assertions)]
            vzdump_core::job::kill_point::at("frozen");
            let begun = Instant::now();
            let copied = copy_frozen(trees, &control, skips_unreadable);
            let copy_ms = begun.elapsed().as_millis();
            #[cfg(debug_assertions)]
            vzdump_core::job::kill_point::at("copied");
            let _ = is_copied.send(());
            let _ = holding.recv_timeout(deadline.saturating_duration_since(Instant::now()));
            let thawed = frozen.thaw();
            let frozen_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
            let (trees, report) = copied.map_err(|error| words(error, &dir))?;
            thawed?;
            for tree in trees {
                tree.finish().map_err(|error| words(error, &dir))?;
            }
            Ok((report, copy_ms, frozen_ms))
        });
        let tell = async {
            let told = if copied.await.is_ok() { goes_on.await } else { Ok(()) };
            drop(held);
            told
        };
        let (told, done) = tokio::join!(tell, work);
        let (report, copy_ms, frozen_ms) = done?;
        drop(cancel);
        task.journal.append(Entry::Thawed).await?;
        told?;
        task.sink.info(&format!(
            "second copy: {} of {} files, {}, {} removed, in {copy_ms} ms; the container was frozen for {frozen_ms} ms",
            report.copied,
            report.entries,
            size(report.copied_bytes),
            report.removed
        ));
        tell_skipped(&report, task);
        // There is one second copy.
        let _ = self.report.set(report);
        Ok(frozen_ms)
    }

    /// About how many bytes the copies have.
    pub(crate) fn copied_bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// How many files and directories patterns left out of the copies.
    pub(crate) fn excluded(&self) -> u64 {
        self.report.get().map_or(0, |report| report.excluded)
    }

    /// How many files could not be read and are not in the copies, and the first of them.
    pub(crate) fn unreadable(&self) -> (u64, Vec<IgnoredEntry>) {
        let Some(report) = self.report.get() else { return (0, Vec::new()) };
        let entry = |skipped: &Skipped| IgnoredEntry {
            path: skipped.path.to_string_lossy().into_owned(),
            why: skipped.why.clone(),
        };
        (report.skipped_count, report.skipped.iter().map(entry).collect())
    }

    /// Waits until nobody works in the directory any more, and so the container is not frozen.
    pub(crate) async fn settle(&self) {
        self.busy.settle().await;
    }

    /// Removes the copies.
    pub(crate) async fn remove(self) -> Result<(), CtError> {
        self.settle().await;
        let Self { dir, trees, .. } = self;
        beside(move || {
            drop(trees);
            let doing = format!("remove the copy '{}'", dir.display());
            temp_tree::remove(&dir).map_err(CtError::at(doing))
        })
        .await
    }
}

/// For how long a container may be frozen.
fn hold_of(ctx: &JobContext) -> Duration {
    ctx.limits.point_in_time.saturating_sub(THAW_MARGIN).max(Duration::from_secs(1))
}

fn processes_of(lxc: &Lxc) -> Target {
    Target { lxc: lxc.clone(), with_processes: true, file_systems: Vec::new() }
}

fn tell_skipped(report: &PassReport, task: Task<'_>) {
    for skipped in report.skipped.iter().take(TOLD_MAX) {
        let path = skipped.path.display();
        task.sink.warn(&format!("'{path}' could not be read and is left out: {}", skipped.why));
    }
    let rest = report.skipped_count.saturating_sub(TOLD_MAX as u64);
    if rest > 0 {
        task.sink.warn(&format!("{rest} more files could not be read and are left out"));
    }
}

/// Waits for the first pass as long as it gets on.
async fn watched<T>(
    work: impl Future<Output = Result<T, CtError>>,
    control: &Control,
    stall: Duration,
    task: Task<'_>,
) -> Result<T, CtError> {
    let mut work = std::pin::pin!(work);
    let mut tick = tokio::time::interval(WATCH);
    let (mut last, mut moved, mut told) = (control.progress(), Instant::now(), Instant::now());
    loop {
        tokio::select! {
            done = &mut work => return done,
            _ = tick.tick() => {}
        }
        let now = control.progress();
        if now != last {
            (last, moved) = (now, Instant::now());
        } else if moved.elapsed() >= stall {
            return Err(CtError::Invalid(format!(
                "The copy of the container's files has not got on for {} seconds.",
                stall.as_secs()
            )));
        }
        if told.elapsed() >= TELL {
            told = Instant::now();
            task.sink.info(&format!("first copy: {} files, {} so far", now.0, size(now.1)));
        }
    }
}

fn copy_running(
    dir: &Path,
    lxc: &Lxc,
    (volumes, excludes): (&[Found], &Excludes),
    ids: &[IdMapRange],
    control: &Control,
) -> Result<(Vec<TreeCopy>, PassReport), CtError> {
    let doing = || format!("make the temporary directory '{}'", dir.display());
    temp_tree::create(dir).map_err(CtError::at(doing()))?;
    let place: OwnedFd = File::open(dir).map_err(CtError::at(doing()))?.into();
    check_ids(dir, ids)?;
    let mut sources = Vec::new();
    for volume in volumes {
        let is_image = volume.format == Some(ImageFormat::Raw);
        let key = &volume.entry.key;
        let path = if is_image { monitored_mount(lxc, key)? } else { volume.path.clone() };
        let source: OwnedFd =
            File::open(&path).map_err(CtError::at(format!("open the volume '{key}'")))?.into();
        // Only volumes that are not left out come here.
        let reached = excludes.directory(&volume.entry.mount_point);
        let reached = reached.unwrap_or_else(|| excludes.root());
        sources.push((&volume.entry, source, is_image, reached));
    }
    check_space(dir, &place, &sources)?;
    let mut trees = Vec::new();
    let mut report = PassReport::default();
    for (MountEntry { key, mount_point, .. }, source, _, reached) in sources {
        let mut tree =
            TreeCopy::new(source, &place, key, reached).map_err(|error| words(error, dir))?;
        tree.mount_point.clone_from(mount_point);
        let passed = tree.first(control).map_err(|error| words(error, dir))?;
        report.add(passed);
        trees.push(tree);
        #[cfg(debug_assertions)]
        vzdump_core::job::kill_point::at("first-copy");
    }
    Ok((trees, report))
}

/// The provider is to see the container's ids: found out before anything is copied.
fn check_ids(dir: &Path, ids: &[IdMapRange]) -> Result<(), CtError> {
    let shown = if ids.is_empty() { foreign_ids() } else { reversed(ids) };
    let try_it = || {
        let namespace = user_namespace(&shown)?;
        let attributes = MountAttributes { read_only: true, inert: true };
        detached(dir, attributes, Some(namespace.as_fd())).map(drop)
    };
    try_it().map_err(|error| {
        CtError::Invalid(format!(
            "The file system of the temporary directory '{}' cannot be shown with the container's ids \
             ({error}): choose another one by 'tmpdir' in vzdump.conf.",
            dir.display()
        ))
    })
}

/// Images have file systems of their own, which tell what is used. A copy that would fill the host up is not begun.
fn check_space(
    dir: &Path,
    place: &OwnedFd,
    sources: &[(&MountEntry, OwnedFd, bool, Reached)],
) -> Result<(), CtError> {
    let used = |source: &OwnedFd| {
        let stat = fstatvfs(source).ok()?;
        stat.f_blocks.saturating_sub(stat.f_bfree).checked_mul(stat.f_frsize)
    };
    let needed: u64 =
        sources.iter().filter(|s| s.2).filter_map(|(_, source, ..)| used(source)).sum();
    let Ok(stat) = fstatvfs(place) else { return Ok(()) };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if needed <= free {
        return Ok(());
    }
    Err(CtError::Invalid(format!(
        "The temporary directory '{}' has {} free, and the container's files need up to {}: choose another one \
         by 'tmpdir' in vzdump.conf, or use --mode stop.",
        dir.display(),
        size(free),
        size(needed)
    )))
}

fn copy_frozen(
    mut trees: Vec<TreeCopy>,
    control: &Control,
    skips_unreadable: bool,
) -> Result<(Vec<TreeCopy>, PassReport), CopyError> {
    let mut report = PassReport::default();
    for tree in &mut trees {
        report.add(tree.second(control, skips_unreadable)?);
    }
    Ok((trees, report))
}

fn words(error: CopyError, dir: &Path) -> CtError {
    let dir = dir.display();
    CtError::Invalid(match error {
        CopyError::Cancelled => return CtError::Cancelled,
        CopyError::TooLong => {
            "The container would have been frozen for too long: too much has changed since \
                               the first copy. Use --mode stop."
                .to_owned()
        }
        CopyError::TooMany => {
            format!("The container's files cannot be copied: {error}. Use --mode stop.")
        }
        CopyError::Source { .. } => format!(
            "The copy of the container's files failed: {error}. With --skip-unreadable such files are left out."
        ),
        full if full.is_full() => format!(
            "The temporary directory '{dir}' is full: {full}. Choose another one by 'tmpdir' in vzdump.conf, \
             or use --mode stop."
        ),
        other => format!(
            "The temporary directory '{dir}' does not hold the container's files: {other}. Choose another one \
             by 'tmpdir' in vzdump.conf."
        ),
    })
}
