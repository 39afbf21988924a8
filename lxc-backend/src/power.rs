// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether a container runs after its backup: it is started again when it is down, also by the recovery. A container
//! that was asked to shut down and did not is not killed; it is waited for for a while.

use std::time::{Duration, Instant};

use vzdump_core::job::JobContext;
use vzdump_core::journal::{ProcessStamp, Record};
use vzdump_core::task_log::TaskSink;
use vzdump_core::vm::process::VmProcess;

use crate::CtError;
use crate::lxc::{Lxc, State};
use crate::runtime::{beside, start_now};

/// For an operation of somebody else on the container, such as a start, to end, and for a shutdown that came too late
/// for the backup.
pub(crate) const POWER_WAIT: Duration = Duration::from_secs(60);
/// Between two looks at whether a container has stopped.
const STATE_LOOK: Duration = Duration::from_millis(200);

/// What became of a container that was, or may have been, asked to shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fall {
    Down,
    /// Somebody has started it since.
    RunsAnew,
    /// It may still go down.
    NotYetDown,
}

/// After a start of the host it is the host's matter which containers run.
pub(crate) async fn run_again(
    ctx: &JobContext,
    record: &Record,
    sink: &dyn TaskSink,
) -> Result<(), CtError> {
    let id = record.begin.guest_id;
    if !record.begin.owner.is_of_this_boot() {
        return Ok(());
    }
    let lxc = Lxc::new(&ctx.layout.lxc_path(), id);
    let asked = lxc.clone();
    let state = beside(move || asked.state()).await?;
    if record.frozen && state != State::Stopped {
        // The guard has most likely done so long ago.
        let thawed = lxc.clone();
        beside(move || thawed.thaw()).await?;
        sink.info(&format!("CT {id} is thawed"));
    }
    if record.held.is_none() {
        return Ok(());
    }
    // Whether it was told to stop before the backup was interrupted nobody knows any more.
    match fall(&lxc, record.ran.as_ref(), POWER_WAIT).await? {
        Fall::Down => {
            crate::runtime::start(&ctx.layout, &ctx.storages, id).await?;
            sink.info(&format!("CT {id} runs again"));
        }
        Fall::RunsAnew => {}
        Fall::NotYetDown => sink.warn(&format!(
            "CT {id} may have been asked to stop for its backup and still runs; if it does stop, it has to be \
             started again"
        )),
    }
    Ok(())
}

/// Has a container run again that was asked to shut down; tells whether it was down. To be called by who holds the lock
/// of its power.
pub(crate) async fn start_again(
    ctx: &JobContext,
    (lxc, id): (&Lxc, u32),
    before: Option<&ProcessStamp>,
    sink: &dyn TaskSink,
) -> Result<bool, CtError> {
    match fall(lxc, before, POWER_WAIT.min(ctx.limits.undo)).await? {
        Fall::Down => {
            let (layout, storages) = (ctx.layout.clone(), ctx.storages.clone());
            beside(move || start_now(&layout, &storages, id)).await?;
            Ok(true)
        }
        Fall::RunsAnew => Ok(false),
        Fall::NotYetDown => {
            sink.warn(&format!(
                "CT {id} was asked to shut down for its backup and still runs; if it does shut down, it has to be \
                 started again"
            ));
            Ok(false)
        }
    }
}

/// Waits a while for the container to be down. `before` is the first process that was to end.
async fn fall(lxc: &Lxc, before: Option<&ProcessStamp>, wait: Duration) -> Result<Fall, CtError> {
    let deadline = Instant::now() + wait;
    loop {
        let asked = lxc.clone();
        let (state, now) = beside(move || Ok((asked.state()?, first_process(&asked)?))).await?;
        if state == State::Stopped {
            return Ok(Fall::Down);
        }
        // One that has just ended may still be said to run.
        if state == State::Running && now.is_some() && now.as_ref() != before {
            return Ok(Fall::RunsAnew);
        }
        if Instant::now() >= deadline {
            return Ok(Fall::NotYetDown);
        }
        tokio::time::sleep(STATE_LOOK).await;
    }
}

/// The container's first process, by which a later one is told from it. May block.
pub(crate) fn first_process(lxc: &Lxc) -> Result<Option<ProcessStamp>, CtError> {
    let Some(pid) = lxc.init_pid()? else { return Ok(None) };
    let process =
        VmProcess::of_pid(pid).and_then(|process| process.map(ProcessStamp::of).transpose());
    process.map_err(CtError::at("read /proc of the container's first process"))
}
