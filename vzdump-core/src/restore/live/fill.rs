// SPDX-License-Identifier: MIT OR Apache-2.0
//! Fills the disks of a guest that runs, by one block job per disk.
//!
//! Every step looks at what QEMU says of the job, so that a resume goes on wherever the process before it
//! ended. Jobs do not change the graph by themselves: before an image loses its backing, or the target takes the place of
//! an image, everything that was copied must be durable, and the journal must say so.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use provider_api::VmRestore;
use qmp_client::Session;
use qmp_client::commands::{Cont, QueryNamedBlockNodes, QueryStatus, RunState};
use qmp_client::jobs::{
    BlockJobSetSpeed, BlockStream, BlockdevMirror, HumanMonitor, JobCancel, JobComplete,
    JobDismiss, JobFinalize, JobInfo, JobStatus, MirrorCopyMode, MirrorSync, QueryJobs,
};
use tokio::net::UnixStream;

use super::Filling;
use crate::journal::{self, Entry, LiveDisk};
use crate::restore::RestoreReport;
use crate::restore::meter::Meter;
use crate::restore::task::{Restore, Step, step, words};
use crate::task_log::clean;
use crate::vm::backup::ops;
use crate::vm::qemu_cmdline::{LiveNode, drive_node};

/// How often the jobs are looked at.
const LOOK: Duration = Duration::from_millis(200);
/// The same while one is about to change the graph: the guest's requests may wait for it.
const LOOK_CLOSELY: Duration = Duration::from_millis(5);
/// How long a lost archive is offered again. QEMU's attempts to connect are up to 16 seconds apart
/// (`connect_thread_func`), and what the guest or a job asks for before the next one fails at once.
const REVIVE_FOR: Duration = Duration::from_secs(60);
/// An archive that was not lost for this long is not the one that was lost before: longer than requests wait for a
/// connection, and than attempts to connect are apart.
const REVIVED_AFTER: Duration = Duration::from_secs(30);
/// Before it is offered again.
const REVIVE_DELAY: Duration = Duration::from_secs(1);
/// A server that does not take a connection in this time is not there.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// For a flush, and for changes of the graph, which wait for the guest's requests in flight.
const CHANGE_WITHIN: Duration = Duration::from_secs(300);
/// How long a mirror that comes to its end is followed before it is cancelled.
const SETTLE_WITHIN: Duration = Duration::from_secs(60);

/// What became of one look at a disk.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    /// Its job works, or waits for its turn.
    Working,
    /// Its job is about to end.
    Ending,
    /// It is complete.
    Filled,
    /// Its job failed, and is gone.
    Failed(String),
}

/// What a loop remembers.
struct Watch {
    /// What was done when something was done last, and when that was.
    done_bytes: u64,
    moved: Instant,
    /// When the archive was lost first, and last.
    lost: Option<(Instant, Instant)>,
    /// Jobs that were told to come to their end.
    completing: BTreeSet<String>,
    /// Those that were told to change the graph. Whether they did is QEMU's to say from there on.
    finalizing: BTreeSet<String>,
}

impl Watch {
    /// Whether the guest's requests wait for a mirror, or will soon.
    fn is_ending(&self, key: &str, job: &JobInfo) -> bool {
        self.completing.contains(key)
            || job.status == JobStatus::Pending
            || job.status.as_str() == "waiting"
    }
}

fn job_id(key: &str) -> String {
    format!("fill-{key}")
}

impl Restore<'_> {
    /// Fills all disks. The caller holds the guest's lock.
    pub(super) async fn fill_live(
        &self,
        source: &mut dyn VmRestore,
        filling: &mut Filling,
        session: &Session,
        report: &mut RestoreReport,
    ) -> Step<()> {
        let mut watch = Watch {
            done_bytes: 0,
            moved: Instant::now(),
            lost: None,
            completing: BTreeSet::new(),
            finalizing: BTreeSet::new(),
        };
        let filled = self.fill_all(source, filling, session, &mut watch, report).await;
        if filled.is_err() {
            let settled = self.settle(session, filling, &mut watch, report).await;
            self.warn(report, settled.err());
        }
        filled
    }

    async fn fill_all(
        &self,
        source: &mut dyn VmRestore,
        filling: &mut Filling,
        session: &Session,
        watch: &mut Watch,
        report: &mut RestoreReport,
    ) -> Step<()> {
        let disks = filling.live.disks.clone();
        let shown = disks.iter().map(|disk| (disk.device.clone(), disk.size_bytes));
        let meter = Meter::new(self.id, shown, self.sink);
        self.limit_jobs(session).await?;
        // A process before this one may have ended before it did so. A job that is left counts as one at work.
        for disk in disks.iter().filter(|disk| filling.filled.contains(&disk.key)) {
            tidy(session, &disk.key).await?;
        }
        loop {
            if self.cancel.is_cancelled() {
                return Err("the restore was cancelled".to_owned());
            }
            let jobs = jobs_of(session).await?;
            self.tell(&disks, filling, &jobs, &meter, watch)?;
            let mut failed = None;
            let mut is_ending = false;
            for disk in &disks {
                if filling.filled.contains(&disk.key) {
                    continue;
                }
                let job = jobs.get(&job_id(&disk.key));
                if job.is_none() && self.must_wait(&disks, filling, &jobs, disk) {
                    continue;
                }
                match self.look(session, filling, disk, job, watch).await? {
                    Found::Working => {}
                    Found::Ending => is_ending = true,
                    Found::Filled => {}
                    Found::Failed(error) => {
                        failed = Some(format!("the disk '{}': {error}", disk.device));
                    }
                }
            }
            if disks.iter().all(|disk| filling.filled.contains(&disk.key)) {
                return Ok(());
            }
            let status = session.execute(QueryStatus).await.map_err(lost)?.status;
            if failed.is_some() || status == RunState::IoError {
                let why = failed.unwrap_or_else(|| "the guest met an I/O error".to_owned());
                // It can take minutes.
                self.settle(session, filling, watch, report).await?;
                self.revive(source, filling, session, &status, &why, watch, report).await?;
            }
            tokio::time::sleep(if is_ending { LOOK_CLOSELY } else { LOOK }).await;
        }
    }

    /// Jobs that are left of another process had its limit.
    async fn limit_jobs(&self, session: &Session) -> Step<()> {
        let speed_bytes_per_s = self.options.limit_bytes_per_s.unwrap_or(0);
        for job in session.execute(QueryJobs).await.map_err(lost)? {
            if job.id.starts_with(&job_id("")) && job.status == JobStatus::Running {
                let limit = BlockJobSetSpeed { device: job.id, speed_bytes_per_s };
                match session.execute(limit).await {
                    // It may have come to its end meanwhile.
                    Ok(_) | Err(qmp_client::Error::Qmp { .. }) => {}
                    Err(error) => return Err(lost(error)),
                }
            }
        }
        Ok(())
    }

    /// Whether enough other disks are being filled.
    fn must_wait(
        &self,
        disks: &[LiveDisk],
        filling: &Filling,
        jobs: &BTreeMap<String, JobInfo>,
        disk: &LiveDisk,
    ) -> bool {
        let before = disks.iter().take_while(|other| other.key != disk.key);
        let open = before.filter(|other| !filling.filled.contains(&other.key)).count();
        let working = disks.iter().filter(|other| jobs.contains_key(&job_id(&other.key))).count();
        open.max(working) >= self.disks_at_once()
    }

    /// Shows the progress; fails when there has been none for too long.
    fn tell(
        &self,
        disks: &[LiveDisk],
        filling: &Filling,
        jobs: &BTreeMap<String, JobInfo>,
        meter: &Meter<'_>,
        watch: &mut Watch,
    ) -> Step<()> {
        let mut all_bytes: u64 = 0;
        for (index, disk) in disks.iter().enumerate() {
            let done_bytes = match jobs.get(&job_id(&disk.key)) {
                _ if filling.filled.contains(&disk.key) => disk.size_bytes,
                Some(job) => part_of(disk.size_bytes, job),
                None => 0,
            };
            all_bytes = all_bytes.saturating_add(done_bytes);
            meter.tell(index, done_bytes);
        }
        let total_bytes: u64 = disks.iter().map(|disk| disk.size_bytes).sum();
        if all_bytes >= total_bytes / 2 {
            step("live:half");
        }
        if all_bytes != watch.done_bytes {
            (watch.done_bytes, watch.moved) = (all_bytes, Instant::now());
        }
        let stall = self.ctx.limits.transfer_stall;
        if watch.moved.elapsed() >= stall {
            return Err(format!("nothing was copied for {} seconds", stall.as_secs()));
        }
        Ok(())
    }

    /// Takes one disk a step further.
    async fn look(
        &self,
        session: &Session,
        filling: &mut Filling,
        disk: &LiveDisk,
        job: Option<&JobInfo>,
        watch: &mut Watch,
    ) -> Step<Found> {
        let key = &disk.key;
        let id = job_id(key);
        let is_mirror = disk.overlay.is_some();
        let Some(job) = job else {
            // A job goes only after the journal says what became of it.
            if is_mirror && filling.pivoted.contains(key) {
                return self.filled(session, filling, disk).await;
            }
            self.start_job(session, disk, id).await?;
            return Ok(Found::Working);
        };
        match &job.status {
            JobStatus::Ready if watch.completing.insert(key.clone()) => {
                session.execute(JobComplete { id }).await.map_err(lost)?;
                step("live:completing");
                Ok(Found::Ending)
            }
            JobStatus::Pending => {
                self.make_durable(session, filling, disk).await?;
                step("live:pending");
                watch.finalizing.insert(key.clone());
                let change = JobFinalize { id };
                session.execute_with_timeout(change, CHANGE_WITHIN).await.map_err(lost)?;
                step("live:finalized");
                Ok(Found::Ending)
            }
            JobStatus::Concluded => {
                watch.completing.remove(key);
                watch.finalizing.remove(key);
                match &job.error {
                    None => self.filled(session, filling, disk).await,
                    Some(error) => {
                        self.unpivot(filling, key).await?;
                        session.execute(JobDismiss { id }).await.map_err(lost)?;
                        Ok(Found::Failed(clean(error)))
                    }
                }
            }
            _ if watch.completing.contains(key) => Ok(Found::Ending),
            _ => Ok(Found::Working),
        }
    }

    /// Follows mirrors that come to their end until they have: meanwhile the guest's requests wait in QEMU. One that
    /// does not get there is cancelled, and begins anew when the restore goes on.
    async fn settle(
        &self,
        session: &Session,
        filling: &mut Filling,
        watch: &mut Watch,
        report: &mut RestoreReport,
    ) -> Step<()> {
        let mirrors = filling.live.disks.iter().filter(|disk| disk.overlay.is_some());
        let mirrors: Vec<LiveDisk> = mirrors.cloned().collect();
        let until = Instant::now() + SETTLE_WITHIN;
        let (mut result, mut failed, mut told) = (Ok(()), BTreeSet::new(), BTreeSet::new());
        loop {
            let jobs = jobs_of(session).await?;
            let is_late = Instant::now() >= until;
            let mut is_ending = false;
            for disk in &mirrors {
                let job = jobs.get(&job_id(&disk.key)).filter(|_| !failed.contains(&disk.key));
                let Some(job) = job.filter(|job| watch.is_ending(&disk.key, job)) else { continue };
                is_ending = true;
                let settled = self.settle_one(session, filling, watch, disk, job, is_late).await;
                match settled {
                    // That it was cancelled is told, too.
                    Ok(Some(why)) if told.insert(disk.key.clone()) => {
                        let device = &disk.device;
                        let warning = format!("the disk '{device}' has to be copied anew: {why}");
                        self.warn(report, [warning]);
                    }
                    Ok(_) => {}
                    Err(error) => {
                        failed.insert(disk.key.clone());
                        result = result.and(Err(format!("the disk '{}': {error}", disk.device)));
                    }
                }
            }
            if !is_ending || is_late {
                return result;
            }
            tokio::time::sleep(LOOK_CLOSELY).await;
        }
    }

    /// Why the mirror has failed or was cancelled, if it was.
    async fn settle_one(
        &self,
        session: &Session,
        filling: &mut Filling,
        watch: &mut Watch,
        disk: &LiveDisk,
        job: &JobInfo,
        is_late: bool,
    ) -> Step<Option<String>> {
        // Once it is over, nobody waits for it.
        let is_over = job.status == JobStatus::Concluded;
        let why = match self.look(session, filling, disk, Some(job), watch).await {
            Ok(Found::Failed(error)) => return Ok(Some(error)),
            Ok(_) if is_over || !is_late => return Ok(None),
            Ok(_) => format!("it did not end within {} seconds", SETTLE_WITHIN.as_secs()),
            Err(error) if is_over => return Err(error),
            Err(error) => error,
        };
        let cancelled = self.cancel_mirror(session, filling, watch, &disk.key).await;
        cancelled.map_err(|error| format!("{why}; the guest may wait for it: {error}"))?;
        Ok(Some(why))
    }

    /// The guest goes on with its overlay.
    async fn cancel_mirror(
        &self,
        session: &Session,
        filling: &mut Filling,
        watch: &Watch,
        key: &str,
    ) -> Step<()> {
        if watch.finalizing.contains(key) {
            return Err("QEMU does not say whether the disk has been replaced".to_owned());
        }
        // As the file has it: what failed to be written may be there nevertheless.
        if journal::read(filling.journal.path()).map_err(words)?.pivoted.contains(key) {
            let entry = Entry::Unpivot { key: key.to_owned() };
            filling.journal.append(entry).await.map_err(words)?;
        }
        filling.pivoted.remove(key);
        session.execute(JobCancel { id: job_id(key) }).await.map_err(lost)?;
        Ok(())
    }

    async fn start_job(&self, session: &Session, disk: &LiveDisk, job_id: String) -> Step<()> {
        let key = &disk.key;
        let speed_bytes_per_s = self.options.limit_bytes_per_s;
        let started = if disk.overlay.is_some() {
            let job = BlockdevMirror {
                job_id,
                device: LiveNode::overlay_node(key),
                target: drive_node(key),
                sync: MirrorSync::Full,
                copy_mode: MirrorCopyMode::WriteBlocking,
                speed_bytes_per_s,
                auto_finalize: false,
                auto_dismiss: false,
            };
            session.execute_with_timeout(job, CHANGE_WITHIN).await
        } else {
            let job = BlockStream {
                job_id,
                device: drive_node(key),
                speed_bytes_per_s,
                auto_finalize: false,
                auto_dismiss: false,
            };
            session.execute_with_timeout(job, CHANGE_WITHIN).await
        };
        started.map_err(|error| format!("the disk '{}': {}", disk.device, words(error)))?;
        Ok(())
    }

    /// Before the graph changes. Of a mirror QEMU has flushed the target, and it holds the guest's requests back
    /// from there on, so that both sides are equal: which one counts is what the journal says.
    async fn make_durable(
        &self,
        session: &Session,
        filling: &mut Filling,
        disk: &LiveDisk,
    ) -> Step<()> {
        let key = &disk.key;
        if disk.overlay.is_none() {
            return flush(session, &drive_node(key)).await;
        }
        if !filling.pivoted.contains(key) {
            let entry = Entry::Pivot { key: key.clone() };
            filling.journal.append(entry).await.map_err(words)?;
            // Not before: it is asked for again after an error.
            filling.pivoted.insert(key.clone());
        }
        Ok(())
    }

    async fn unpivot(&self, filling: &mut Filling, key: &str) -> Step<()> {
        if filling.pivoted.contains(key) {
            let entry = Entry::Unpivot { key: key.to_owned() };
            filling.journal.append(entry).await.map_err(words)?;
            filling.pivoted.remove(key);
        }
        Ok(())
    }

    /// After the graph has changed.
    async fn filled(
        &self,
        session: &Session,
        filling: &mut Filling,
        disk: &LiveDisk,
    ) -> Step<Found> {
        let key = &disk.key;
        if disk.overlay.is_none() {
            // The image's header, too, which names no archive any more.
            flush(session, &drive_node(key)).await?;
        }
        filling.journal.append(Entry::Filled { key: key.clone() }).await.map_err(words)?;
        filling.filled.insert(key.clone());
        self.sink.info(&format!("the disk '{}' is complete", disk.device));
        tidy(session, key).await?;
        Ok(Found::Filled)
    }

    /// Offers again what is not served any more, and lets the guest go on.
    #[expect(clippy::too_many_arguments, reason = "all of the loop's state")]
    async fn revive(
        &self,
        source: &mut dyn VmRestore,
        filling: &mut Filling,
        session: &Session,
        status: &RunState,
        why: &str,
        watch: &mut Watch,
        report: &mut RestoreReport,
    ) -> Step<()> {
        let first = match watch.lost {
            Some((first, last)) if last.elapsed() < REVIVED_AFTER => first,
            _ => {
                self.warn(report, [format!("{why}; trying again")]);
                Instant::now()
            }
        };
        if first.elapsed() >= REVIVE_FOR {
            return Err(why.to_owned());
        }
        watch.lost = Some((first, Instant::now()));
        self.cancellable(async {
            tokio::time::sleep(REVIVE_DELAY).await;
            Ok(())
        })
        .await?;
        let began = Instant::now();
        for disk in filling.live.disks.clone() {
            let is_open =
                !filling.filled.contains(&disk.key) && !filling.pivoted.contains(&disk.key);
            if is_open && !is_served(&filling.live.dir.join(&disk.key)).await {
                let limit = self.ctx.limits.provider_call;
                self.offer_again(source, filling, &disk, limit, report).await?;
            }
        }
        // Meanwhile QEMU could neither try again nor copy anything.
        let spent = began.elapsed();
        watch.lost = Some((first + spent, Instant::now()));
        watch.moved += spent;
        if *status == RunState::IoError {
            session.execute(Cont).await.map_err(lost)?;
        }
        Ok(())
    }

    pub(super) async fn offer_again(
        &self,
        source: &mut dyn VmRestore,
        filling: &mut Filling,
        disk: &LiveDisk,
        limit: Duration,
        report: &mut RestoreReport,
    ) -> Step<()> {
        let LiveDisk { device, key, size_bytes, .. } = disk;
        if filling.offered.contains(device) {
            filling.offered.retain(|other| other != device);
            self.withdraw_one(source, device, &mut report.warnings).await;
        }
        filling.offered.push(device.clone());
        let dir = &filling.private_dir;
        let offer = self.offer_one(source, device, *size_bytes, dir, limit).await;
        let offer = offer.map_err(|error| format!("the disk '{device}': {error}"))?;
        let export = self.link(&filling.live.dir, key, offer).await?;
        if filling.exports.get(key) != Some(&export) {
            return Err(format!(
                "the provider now serves the disk '{device}' by another name, which a running QEMU \
                 cannot follow; stop the VM first"
            ));
        }
        self.sink.info(&format!("the disk '{device}' is served again"));
        Ok(())
    }
}

async fn jobs_of(session: &Session) -> Step<BTreeMap<String, JobInfo>> {
    let jobs = session.execute(QueryJobs).await.map_err(lost)?;
    Ok(jobs.into_iter().map(|job| (job.id.clone(), job)).collect())
}

/// QEMU's word for how far a job is, in bytes of the disk.
fn part_of(size_bytes: u64, job: &JobInfo) -> u64 {
    let done = u128::from(job.current_progress.min(job.total_progress));
    let part = u128::from(size_bytes) * done / u128::from(job.total_progress.max(1));
    u64::try_from(part).unwrap_or(size_bytes)
}

async fn is_served(socket: &std::path::Path) -> bool {
    let connected = tokio::time::timeout(CONNECT_WITHIN, UnixStream::connect(socket));
    matches!(connected.await, Ok(Ok(_)))
}

/// Takes away what a disk that is complete needs no more in QEMU.
async fn tidy(session: &Session, key: &str) -> Step<()> {
    let id = job_id(key);
    let jobs = session.execute(QueryJobs).await.map_err(lost)?;
    if jobs.iter().any(|job| job.id == id) {
        session.execute(JobDismiss { id }).await.map_err(lost)?;
    }
    for node in [LiveNode::overlay_node(key), LiveNode::archive_node(key)] {
        ops::remove_node(session, &node).await.map_err(lost)?;
    }
    Ok(())
}

async fn flush(session: &Session, node: &str) -> Step<()> {
    let said = session.execute_with_timeout(HumanMonitor::flush(node), CHANGE_WITHIN).await;
    let said = said.map_err(lost)?;
    match said.trim() {
        "" => Ok(()),
        said => Err(format!("'{node}' could not be flushed: {}", clean(said))),
    }
}

/// QEMU ended, or refused.
fn lost(error: qmp_client::Error) -> String {
    format!("QEMU does not go on with the restore: {}", words(error))
}

/// Keys of the disks that a running QEMU reads from the archive.
pub(super) async fn open_in(session: &Session) -> Step<BTreeSet<String>> {
    let nodes = session.execute(QueryNamedBlockNodes { flat: true }).await.map_err(lost)?;
    let names = nodes.into_iter().filter_map(|node| node.node_name);
    let prefix = LiveNode::archive_node("");
    Ok(names.filter_map(|name| name.strip_prefix(&prefix).map(str::to_owned)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_told_in_bytes_of_the_disk() {
        let job = |current_progress, total_progress| JobInfo {
            id: "x".into(),
            status: JobStatus::Running,
            current_progress,
            total_progress,
            error: None,
        };
        assert_eq!(part_of(1000, &job(0, 0)), 0);
        assert_eq!(part_of(1000, &job(1, 4)), 250);
        assert_eq!(part_of(u64::MAX, &job(9, 4)), u64::MAX);
    }
}
