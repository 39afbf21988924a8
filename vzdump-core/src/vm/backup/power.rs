// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether a VM runs before, during and after its backup.
//!
//! ```text
//!  found      mode      for the point in time              afterwards          at the end
//!  running    snapshot  –                                  –                   –
//!  running    suspend   paused                             runs again          –
//!  running    stop      shut down, QEMU started paused     runs in that QEMU   –
//!  off        any       QEMU started paused                –                   QEMU ended, if it was
//!                                                                              never let run
//!  paused, …  any       –                                  –                   –
//! ```
//!
//! Other than vzdump, `suspend` pauses the guest for the setup of the access alone, not while disks are
//! prepared and the provider plans, and does not try to freeze a guest that is paused.
//!
//! For the time of the backup QEMU is told to stay when its guest switches off (`set-action`, not
//! `-no-shutdown`, which could not be taken back); in the end it is told to go again, and ended if
//! the guest is off. Should `vzdump` be killed, QEMU stays until the next backup or `doctor --fix`;
//! `vm stop` and `vm start` know such a QEMU.
//!
//! Everything is journalled before it is done, and [`run_again`] and [`leave`] undo it for the driver
//! as for the recovery.

use std::time::{Duration, Instant};

use provider_api::{Uuid, VolumeInfo};
use qmp_client::commands::{
    Cont, QueryStatus, RunState, SetAction, ShutdownAction, StatusInfo, Stop,
};
use qmp_client::{Error, Session};

use super::tpm::Tpm;
use super::{SETUP_COMMAND, VmDriver, disks, ops};
use crate::guest::{BackupMode, GuestError, Task};
use crate::job::report::millis;
use crate::journal::{Entry, Held, ProcessStamp};
use crate::layout::{Layout, Monitor};
use crate::storage::StorageSet;
use crate::task_log::TaskSink;
use crate::tools::Tools;
use crate::vm::process::VmProcess;
use crate::vm::qemu_cmdline;
use crate::vm::runner::{self, BackupStart, RunnerError, StartOptions};

/// How long a guest that was asked to shut down, and then not waited for, is given to do so.
const LATE_SHUTDOWN_WAIT: Duration = Duration::from_secs(60);
/// How long a QEMU that is being started is waited for that whoever started it no longer waits for.
const CONNECT_WAIT: Duration = Duration::from_secs(20);
const CONNECT_POLL: Duration = Duration::from_millis(100);

/// What belongs to one VM on this host.
#[derive(Clone, Copy)]
pub(crate) struct Vm<'a> {
    pub(crate) layout: &'a Layout,
    pub(crate) tools: &'a Tools,
    pub(crate) storages: &'a StorageSet,
    pub(crate) id: u32,
}

/// What a backup did to the power state of its VM.
#[derive(Debug, Default)]
pub(super) struct Power {
    /// Why the guest does not run, and since when.
    held: Option<(Held, Instant)>,
    /// The guest could not even be asked to shut down, and runs as before.
    is_unasked: bool,
    /// The hook script was told that the guest goes on, or is being told.
    is_restart_told: bool,
    /// The QEMU that ran when the guest was shut down or paused.
    before: Option<ProcessStamp>,
    /// The mark of the QEMU that was started.
    mark: Option<String>,
    /// It was started only for the backup.
    is_off: bool,
    /// Its guest had switched off before: somebody else had it stay.
    was_off_inside: bool,
    /// It may have been told to stay when its guest switches off.
    is_kept: bool,
}

/// How a guest that was shut down or paused for its backup came to run again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Again {
    /// It goes on in the QEMU it has.
    Resumed,
    /// It was started anew.
    Started,
    /// It runs, or does what somebody else wants.
    AsItIs,
    /// It was asked to shut down, has not done so, and may still.
    NotYetDown,
}

impl VmDriver {
    fn vm(&self) -> Vm<'_> {
        Vm { layout: &self.layout, tools: &self.tools, storages: &self.storages, id: self.id }
    }

    /// The mode by its effect: a VM that is off is backed up as in the mode stop.
    pub(super) fn effective_mode(&self) -> BackupMode {
        if self.process.is_some() { self.options.mode } else { BackupMode::Stop }
    }

    pub(super) async fn do_enter_mode(
        &mut self,
        task: Task<'_>,
    ) -> Result<Vec<VolumeInfo>, GuestError> {
        match self.process.clone() {
            Some(process) => self.enter_existing(process, task).await?,
            None => {
                self.power.is_off = true;
                self.start_paused(false, task).await?;
            }
        }
        self.keep_alive(task).await?;
        let session = self.session()?.clone();
        self.disks = disks::measure(&session, std::mem::take(&mut self.chosen), task.sink).await?;
        let volume = |disk: &disks::Disk| VolumeInfo {
            device: disk.key.clone(),
            size_bytes: disk.size_bytes,
            volume_id: Some(disk.volume.clone()),
        };
        let tpm = self.tpm.as_ref().map(Tpm::info);
        Ok(self.disks.iter().map(volume).chain(tpm).collect())
    }

    async fn enter_existing(
        &mut self,
        process: ProcessStamp,
        task: Task<'_>,
    ) -> Result<(), GuestError> {
        task.journal.append(Entry::Qemu { process: process.clone() }).await?;
        let session = self.connect().await?;
        let status = status_of(&session).await?;
        self.power.was_off_inside = status.status == RunState::Shutdown;
        if self.options.mode == BackupMode::Stop {
            if status.running {
                drop(session);
                return self.shut_down_and_start(process, task).await;
            }
            task.sink.warn(&format!(
                "the guest is not running ({}), so it cannot shut down; its disks are backed up as \
                 they are",
                status.status.as_str()
            ));
        }
        require_access(&session).await.map_err(|error| GuestError::Refused(format!(
            "VM {} runs in a QEMU that cannot be backed up: restart the VM with the patched QEMU \
             ({error}).",
            self.id
        )))?;
        self.session = Some(session);
        Ok(())
    }

    async fn connect(&self) -> Result<Session, GuestError> {
        ops::connect(&self.layout.qmp_socket(self.id, Monitor::Backup))
            .await
            .map_err(GuestError::at(format!("connect to the monitor of VM {}", self.id)))
    }

    async fn shut_down_and_start(
        &mut self,
        process: ProcessStamp,
        task: Task<'_>,
    ) -> Result<(), GuestError> {
        let (layout, id, limit) = (self.layout.clone(), self.id, self.options.stop_wait);
        runner::check_startable(&layout, &self.tools, &self.storages, id).map_err(
            GuestError::at(format!("shut VM {id} down, because it could not be started again")),
        )?;
        task.hooks.pre_stop(task.sink).await?;
        task.journal.append(Entry::ShutDown).await?;
        task.sink.info("stopping virtual guest");
        self.power.before = Some(process);
        self.power.held = Some((Held::ShutDown, Instant::now()));
        let is_down = runner::shut_down(&layout, id, limit).await;
        if let Err(RunnerError::Qmp { .. } | RunnerError::Lock(_)) = is_down {
            self.power.is_unasked = true;
            // For a recovery; if it fails, so does the resume, which says why.
            let _ = task.journal.append(Entry::Resumed).await;
        }
        if !is_down.map_err(GuestError::at(format!("shut VM {id} down")))? {
            return Err(GuestError::Refused(format!(
                "VM {id} did not shut down within {} seconds; it may still do so.",
                limit.as_secs()
            )));
        }
        self.start_paused(true, task).await
    }

    async fn start_paused(&mut self, is_to_run: bool, task: Task<'_>) -> Result<(), GuestError> {
        let mark = format!("vzdump-{}", Uuid::new_v4().simple());
        task.journal.append(Entry::Start { mark: mark.clone(), is_to_run }).await?;
        task.sink.info("starting kvm to execute backup task");
        self.power.mark = Some(mark.clone());
        self.process = None;
        let disks: Vec<String> = self.chosen.iter().map(|disk| disk.key.clone()).collect();
        let options = BackupStart { mark: &mark, is_to_run, disks: &disks };
        let started =
            runner::start_for_backup(&self.layout, &self.tools, &self.storages, self.id, options)
                .await
                .map_err(GuestError::at(format!("start VM {} for its backup", self.id)))?;
        let process = ProcessStamp::of(started.process)
            .map_err(GuestError::at("read /proc of the QEMU that was started"))?;
        self.process = Some(process.clone());
        started.notices.iter().for_each(|notice| task.sink.info(notice));
        task.journal.append(Entry::Qemu { process }).await?;
        let session = self.connect().await?;
        require_access(&session).await.map_err(GuestError::at(format!(
            "back up VM {} with the QEMU of this host",
            self.id
        )))?;
        self.session = Some(session);
        Ok(())
    }

    /// Has QEMU stay until the backup has ended, whatever its guest does.
    async fn keep_alive(&mut self, task: Task<'_>) -> Result<(), GuestError> {
        let session = self.session()?.clone();
        let process = self.process.as_ref().ok_or_else(|| self.gone())?.process;
        let arguments =
            process.arguments().map_err(GuestError::at("read the arguments of QEMU"))?;
        let needs_nothing = self.power.was_off_inside
            || stays_by_itself(&arguments)
            || qemu_cmdline::is_disks_only(&arguments);
        if needs_nothing {
            return Ok(());
        }
        task.journal.append(Entry::KeepAlive).await?;
        self.power.is_kept = true;
        set_shutdown(&session, ShutdownAction::Pause)
            .await
            .map_err(GuestError::at("have QEMU stay when its guest switches off"))
    }

    /// Says so if somebody let the guest run that was off for the point in time.
    pub(super) async fn warn_if_run(
        &self,
        session: &Session,
        task: Task<'_>,
    ) -> Result<(), GuestError> {
        if self.power.mark.is_some() && status_of(session).await?.running {
            task.sink.warn(
                "the guest was started before the point in time; the backup is as after a power cut",
            );
        }
        Ok(())
    }

    /// Pauses a running guest; tells whether it was one.
    pub(super) async fn pause(
        &mut self,
        session: &Session,
        task: Task<'_>,
    ) -> Result<bool, GuestError> {
        if status_of(session).await?.status != RunState::Running {
            return Ok(false);
        }
        task.hooks.pre_stop(task.sink).await?;
        task.sink.info("suspending guest");
        task.journal.append(Entry::Pause).await?;
        self.power.before.clone_from(&self.process);
        self.power.held = Some((Held::Paused, Instant::now()));
        session.execute(Stop).await.map_err(GuestError::at("pause the guest"))?;
        Ok(true)
    }

    pub(super) async fn do_resume(&mut self, task: Task<'_>) -> Result<Option<u64>, GuestError> {
        let Some((held, since)) = self.power.held else {
            return Ok(None);
        };
        // Once: when it fails, the next try must let the guest run.
        let is_told = std::mem::replace(&mut self.power.is_restart_told, true);
        let before = if is_told { Ok(()) } else { task.hooks.pre_restart(task.sink).await };
        let is_unasked = self.power.is_unasked;
        let again = in_time(self.undo_limit, "let the guest run again", async {
            if is_unasked {
                return Ok(Again::AsItIs);
            }
            let session = self.session_if_alive().await.unwrap_or(None);
            let (mark, before) = (self.power.mark.as_deref(), self.power.before.as_ref());
            run_again(self.vm(), held, mark, before, session.as_ref()).await
        });
        let again = again.await?;
        let downtime = since.elapsed();
        self.power.held = None;
        // Not a line before it runs: a terminal that is stopped would keep it down.
        task.journal.append(Entry::Resumed).await?;
        log_again(again, self.id, Some(downtime), task.sink);
        if again != Again::NotYetDown {
            task.hooks.post_restart(task.sink).await?;
        }
        before?;
        Ok((again != Again::NotYetDown && !is_unasked).then(|| millis(downtime)))
    }

    pub(super) async fn do_leave_mode(&mut self, task: Task<'_>) -> Result<(), GuestError> {
        let resumed = self.do_resume(task).await.map(drop);
        let thawed = self.thaw_at_last(task).await;
        let left = in_time(self.undo_limit, "leave QEMU as it was", self.leave_now(task)).await;
        self.session = None;
        self.events = None;
        let mut first = Ok(());
        for error in [resumed, thawed, left].into_iter().filter_map(Result::err) {
            if first.is_ok() {
                first = Err(error);
            } else {
                task.sink.warn(&crate::job::chain(&error));
            }
        }
        first
    }

    async fn leave_now(&mut self, task: Task<'_>) -> Result<(), GuestError> {
        match (self.session_if_alive().await, self.process.clone()) {
            (Ok(Some(session)), Some(process)) => {
                let change = Change { is_off: self.power.is_off, is_kept: self.power.is_kept };
                match leave(self.vm(), &process.process, &session, change, task.sink).await {
                    Err(_) if session.is_closed() && self.is_ending().await => Ok(()),
                    other => other,
                }
            }
            (other, _) => other.map(drop),
        }
    }
}

/// The scripts of these steps have limits of their own.
async fn in_time<T>(
    limit: Duration,
    doing: &str,
    step: impl Future<Output = Result<T, GuestError>>,
) -> Result<T, GuestError> {
    tokio::time::timeout(limit, step).await.unwrap_or_else(|_| {
        let text = format!("Cannot {doing}: no end within {} seconds.", limit.as_secs());
        Err(GuestError::Refused(text))
    })
}

async fn require_access(session: &Session) -> Result<(), Error> {
    session.require_command(SETUP_COMMAND).await
}

async fn status_of(session: &Session) -> Result<StatusInfo, GuestError> {
    session.execute(QueryStatus).await.map_err(GuestError::at("ask QEMU whether the guest runs"))
}

async fn set_shutdown(session: &Session, action: ShutdownAction) -> Result<(), Error> {
    session.execute(SetAction { shutdown: Some(action) }).await.map(drop)
}

/// Whether QEMU was told by its administrator to stay when its guest switches off.
fn stays_by_itself(arguments: &[String]) -> bool {
    let is_option = |word: &str, name: &str| word.trim_start_matches('-') == name;
    arguments.iter().any(|word| word.starts_with('-') && is_option(word, "no-shutdown"))
        || arguments.windows(2).any(|pair| match pair {
            [name, value] => {
                name.starts_with('-') && is_option(name, "action") && value.contains("shutdown=")
            }
            _ => false,
        })
}

/// A line about a guest that was shut down or paused.
pub(crate) fn log_again(again: Again, id: u32, downtime: Option<Duration>, sink: &dyn TaskSink) {
    let after = downtime.map(|time| format!(" after {:.1} seconds", time.as_secs_f64()));
    let after = after.unwrap_or_default();
    match again {
        Again::Resumed => sink.info(&format!("resuming VM again{after}")),
        Again::Started => sink.info(&format!("guest is online again{after}")),
        Again::AsItIs => {}
        Again::NotYetDown => sink.warn(&format!(
            "VM {id} was asked to shut down for its backup and still runs; if it does shut down, it \
             has to be started again"
        )),
    }
}

/// Lets a guest run that was shut down or paused for its backup. May be repeated.
///
/// `before` is the QEMU that ran then, `session` the one of the present QEMU, if there is one.
pub(crate) async fn run_again(
    vm: Vm<'_>,
    held: Held,
    mark: Option<&str>,
    before: Option<&ProcessStamp>,
    session: Option<&Session>,
) -> Result<Again, GuestError> {
    // Ours may not have made its pid file yet.
    let ours = match mark {
        Some(mark) => VmProcess::of_mark(mark).map_err(GuestError::at("look for QEMU"))?,
        None => None,
    };
    let found = runner::find_process(vm.layout, vm.id)
        .map_err(GuestError::at(format!("find out whether VM {} runs", vm.id)))?;
    let Some(process) = ours.or(found) else {
        return match held {
            Held::ShutDown => start_anew(vm).await,
            // It ended by itself while it was paused, or was killed.
            Held::Paused => Ok(Again::AsItIs),
        };
    };
    let wanted = match held {
        Held::Paused if before.is_some_and(|before| before.process == process) => RunState::Paused,
        Held::Paused => return Ok(Again::AsItIs),
        Held::ShutDown if ours == Some(process) => RunState::Prelaunch,
        Held::ShutDown => return wait_for_the_end(vm, process, before).await,
    };
    let own;
    let session = match session.filter(|session| !session.is_closed()) {
        Some(session) => session,
        None => match connect_patiently(vm, process).await? {
            Some(session) => {
                own = session;
                &own
            }
            None if held == Held::ShutDown => return start_anew(vm).await,
            None => return Ok(Again::AsItIs),
        },
    };
    if status_of(session).await?.status != wanted {
        return Ok(Again::AsItIs);
    }
    session.execute(Cont).await.map_err(GuestError::at(format!("let VM {} go on", vm.id)))?;
    Ok(Again::Resumed)
}

async fn start_anew(vm: Vm<'_>) -> Result<Again, GuestError> {
    let Vm { layout, tools, storages, id } = vm;
    match runner::start(layout, tools, storages, id, StartOptions::default()).await {
        Ok(_) => Ok(Again::Started),
        Err(RunnerError::AlreadyRunning { .. }) => Ok(Again::AsItIs),
        Err(error) => {
            Err(GuestError::step(format!("start VM {id} again, which its backup shut down"), error))
        }
    }
}

/// Waits a while for a guest that was asked to shut down.
async fn wait_for_the_end(
    vm: Vm<'_>,
    process: VmProcess,
    before: Option<&ProcessStamp>,
) -> Result<Again, GuestError> {
    if before.is_none_or(|before| before.process != process) {
        // Somebody else started it.
        return Ok(Again::AsItIs);
    }
    let doing = || GuestError::at("wait for the end of QEMU");
    match process.open().map_err(doing())? {
        Some(handle) if !handle.wait(LATE_SHUTDOWN_WAIT).await.map_err(doing())? => {
            // A QEMU that stays by itself may be there without a guest that runs.
            Ok(match start_anew(vm).await? {
                Again::AsItIs => Again::NotYetDown,
                again => again,
            })
        }
        _ => start_anew(vm).await,
    }
}

/// Connects to a QEMU that may still be starting; `None` if it ends instead.
pub(crate) async fn connect_patiently(
    vm: Vm<'_>,
    process: VmProcess,
) -> Result<Option<Session>, GuestError> {
    let socket = vm.layout.qmp_socket(vm.id, Monitor::Backup);
    let doing = || GuestError::at("look at the process of QEMU");
    let deadline = Instant::now() + CONNECT_WAIT;
    loop {
        let Some(handle) = process.open().map_err(doing())? else { return Ok(None) };
        let error = match ops::connect(&socket).await {
            Ok(session) => return Ok(Some(session)),
            Err(error) => error,
        };
        if handle.wait(CONNECT_POLL).await.map_err(doing())? {
            return Ok(None);
        }
        if Instant::now() >= deadline {
            let doing = format!("connect to the monitor of VM {}", vm.id);
            return Err(GuestError::step(doing, error));
        }
    }
}

/// What is to be undone at the end of a backup.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Change {
    /// The VM was off: its QEMU was started for the backup.
    pub(crate) is_off: bool,
    /// QEMU was told to stay when its guest switches off.
    pub(crate) is_kept: bool,
}

/// Leaves QEMU as it would be without the backup. May be repeated.
pub(crate) async fn leave(
    vm: Vm<'_>,
    process: &VmProcess,
    session: &Session,
    change: Change,
    sink: &dyn TaskSink,
) -> Result<(), GuestError> {
    let mut unwanted = Vec::new();
    if change.is_kept {
        // First: a guest that switches off from now on ends QEMU itself.
        set_shutdown(session, ShutdownAction::Poweroff)
            .await
            .map_err(GuestError::at("have QEMU end again when its guest switches off"))?;
        unwanted.push(RunState::Shutdown);
    }
    if change.is_off {
        unwanted.push(RunState::Prelaunch);
    }
    if unwanted.is_empty() {
        return Ok(());
    }
    let (state, is_ended) = runner::end_if(vm.layout, vm.id, process, session, &unwanted)
        .await
        .map_err(GuestError::at(format!("end the QEMU of VM {}", vm.id)))?;
    match (is_ended, state) {
        (true, RunState::Shutdown) => {
            sink.info("the guest has switched off during its backup; QEMU is ended");
        }
        (true, _) => sink.info("stopping kvm after backup task"),
        (false, state) if change.is_off => sink.info(&format!(
            "kvm status changed after backup ('{}') - keep VM running",
            state.as_str()
        )),
        (false, _) => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_administrator_may_have_qemu_stay() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        for stays in ["qemu -no-shutdown -S", "qemu --no-shutdown", "q -action shutdown=pause"] {
            assert!(stays_by_itself(&words(stays)), "{stays}");
        }
        for goes in ["qemu -no-reboot", "qemu -action reboot=shutdown", "qemu -name no-shutdown"] {
            assert!(!stays_by_itself(&words(goes)), "{goes}");
        }
    }
}
