// SPDX-License-Identifier: MIT OR Apache-2.0
//! Processes that die: everything of a provider is dropped, and a new one has to tell what became of it.

use std::time::Duration;

use provider_api::{CommitOutcome, Provider, Transferred, Uuid};

use futures_util::future::join;

use super::Verdict;
use crate::bench::{Ctx, Made};
use crate::fault::{Checked, Fault, ensure};
use crate::machine::Vm;

/// A commit is left alone after so long.
const PATIENCE_MS: [u64; 7] = [0, 1, 2, 5, 10, 25, 100];

/// A commit that goes on is asked for so long after it began.
const ASKED_AFTER_MS: [u64; 3] = [0, 2, 10];

pub(super) async fn crash(ctx: &Ctx) -> Checked<Verdict> {
    let mut vm = ctx.usual_vm().await?;
    let provider = ctx.provider().await?;
    let full = ctx.back_up(provider.as_ref(), &mut vm).await?;
    drop(provider);
    for step in ["start_guest", "plan_volumes", "backup_vm"] {
        let at = |fault: Fault| fault.at(&format!("Death after {step}"));
        vm.scribble(3).await?;
        let archive = die_after(ctx, &mut vm, step).await.map_err(at)?;
        vm.machine.as_dyn().thaw(false).await.map_err(Fault::new)?;
        let provider = ctx.provider().await.map_err(at)?;
        let list = ctx.list(provider.as_ref()).await.map_err(at)?;
        ensure(!list.contains_key(&archive), || format!("Archive {archive} is listed."))
            .map_err(at)?;
        let made = ctx.back_up(provider.as_ref(), &mut vm).await.map_err(at)?;
        for made in [&made, &full] {
            ctx.check_restore(provider.as_ref(), made).await.map_err(at)?;
        }
    }
    Ok(Verdict::Passed)
}

/// Begins a backup and drops all of it, and the provider.
async fn die_after(ctx: &Ctx, vm: &mut Vm, step: &str) -> Checked<String> {
    let provider = ctx.provider().await?;
    let mut begun = ctx.begin(provider.as_ref(), vm).await?;
    if step != "start_guest" {
        let requests = ctx.plan(begun.backup.as_mut(), vm).await?;
        if step == "backup_vm" {
            let copied = ctx.copy(begun.backup.as_mut(), vm, &requests).await?;
            ctx.expect("backup_vm", async { copied.result }).await?;
        }
    }
    Ok(begun.archive)
}

/// The host takes the disks away before a commit that is slow, and the guest goes on.
pub(super) async fn slow_commit(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let provider = provider.as_ref();
    let mut vm = ctx.usual_vm().await?;
    let mut all = Vec::new();
    for _ in 0..2 {
        let mut begun = ctx.begin(provider, &vm).await?;
        let requests = ctx.plan(begun.backup.as_mut(), &mut vm).await?;
        let copied = ctx.copy(begun.backup.as_mut(), &mut vm, &requests).await?;
        let moved = ctx.expect("backup_vm", async { copied.result }).await?;
        vm.sim()?.withdraw().await;
        vm.scribble(2).await?;
        let (archive, commit_id) = (begun.archive.clone(), Uuid::new_v4());
        let committed = ctx.commit(begun, commit_id).await?;
        vm.machine.as_dyn().thaw(committed.is_ok()).await.map_err(Fault::new)?;
        let what = "commit, after the disks were withdrawn,";
        ctx.expect(what, async { committed }).await.map_err(|fault| {
            fault.advise("With `slow_commit` all that is read of disks is read in backup_vm.")
        })?;
        let volumes = (copied.truth, copied.volumes.as_slice());
        all.push(Made::new(archive, commit_id, requests, volumes, moved));
        vm.scribble(3).await?;
    }
    for made in &all {
        ctx.check_restore(provider, made).await?;
    }
    Ok(Verdict::Passed)
}

pub(super) async fn outcome(ctx: &Ctx) -> Checked<Verdict> {
    let mut vm = ctx.usual_vm().await?;
    let provider = ctx.provider().await?;
    let mut sound = vec![ctx.back_up(provider.as_ref(), &mut vm).await?];
    drop(provider);
    for patience_ms in PATIENCE_MS {
        let at = |fault: Fault| fault.at(&format!("A commit left alone after {patience_ms} ms"));
        vm.scribble(3).await?;
        let left = leave_commit(ctx, &mut vm, Duration::from_millis(patience_ms)).await;
        let (made, was_committed) = left.map_err(at)?;
        let outcome = judge(ctx, &made, was_committed).await.map_err(at);
        let is_committed = matches!(outcome, Ok(CommitOutcome::Committed { .. }));
        vm.machine.as_dyn().thaw(is_committed).await.map_err(Fault::new)?;
        outcome?;
        if is_committed {
            sound.push(made);
        }
    }
    for delay_ms in [None].into_iter().chain(ASKED_AFTER_MS.map(Some)) {
        let when = delay_ms.map_or_else(
            || "A commit after it was asked for".to_owned(),
            |ms| format!("A commit that is asked for after {ms} ms"),
        );
        let at = |fault: Fault| fault.at(&when);
        vm.scribble(3).await?;
        let asked = ask_and_commit(ctx, &mut vm, delay_ms.map(Duration::from_millis)).await;
        let is_committed = matches!(asked, Ok((_, CommitOutcome::Committed { .. })));
        vm.machine.as_dyn().thaw(is_committed).await.map_err(Fault::new)?;
        let (made, _) = asked.map_err(at)?;
        sound.extend(is_committed.then_some(made));
    }
    let provider = ctx.provider().await?;
    vm.scribble(3).await?;
    sound.push(ctx.back_up(provider.as_ref(), &mut vm).await?);
    for made in &sound {
        ctx.check_restore(provider.as_ref(), made).await?;
    }
    Ok(Verdict::Passed)
}

/// Begins a commit, and drops everything while it is under way.
async fn leave_commit(ctx: &Ctx, vm: &mut Vm, patience: Duration) -> Checked<(Made, bool)> {
    let provider = ctx.provider().await?;
    let mut begun = ctx.begin(provider.as_ref(), vm).await?;
    let requests = ctx.plan(begun.backup.as_mut(), vm).await?;
    let copied = ctx.copy(begun.backup.as_mut(), vm, &requests).await?;
    ctx.expect("backup_vm", async { copied.result }).await?;
    ctx.note_made(&begun.archive);
    let commit_id = Uuid::new_v4();
    let call = ctx.call();
    let commit = begun.backup.commit(commit_id, &call);
    let result = tokio::time::timeout(patience, commit).await;
    let was_committed = matches!(result, Ok(Ok(_)));
    let made = Made::new(
        begun.archive,
        commit_id,
        requests,
        (copied.truth, &copied.volumes),
        Transferred::default(),
    );
    Ok((made, was_committed))
}

/// A process that lives has a backup open and commits it, and another one asks what became of that: before, or
/// so long after the commit began.
async fn ask_and_commit(
    ctx: &Ctx,
    vm: &mut Vm,
    delay: Option<Duration>,
) -> Checked<(Made, CommitOutcome)> {
    let (provider, other) = (ctx.provider().await?, ctx.bare_provider().await?);
    let mut begun = ctx.begin(provider.as_ref(), vm).await?;
    let requests = ctx.plan(begun.backup.as_mut(), vm).await?;
    let copied = ctx.copy(begun.backup.as_mut(), vm, &requests).await?;
    ctx.expect("backup_vm", async { copied.result }).await?;
    let (archive, commit_id) = (begun.archive.clone(), Uuid::new_v4());
    let (said, committed) = match delay {
        None => {
            let said = ctx.outcome(other.as_ref(), commit_id).await?;
            ensure(said == CommitOutcome::NotCommitted, || {
                format!("commit_outcome says {said:?} of an id that it has never seen.")
            })?;
            (said, ctx.commit(begun, commit_id).await?)
        }
        Some(delay) => {
            let asking = async {
                tokio::time::sleep(delay).await;
                ctx.outcome(other.as_ref(), commit_id).await
            };
            let (said, committed) = join(asking, ctx.commit(begun, commit_id)).await;
            (said?, committed?)
        }
    };
    let was_committed = committed.is_ok();
    if said == CommitOutcome::NotCommitted {
        ensure(!was_committed, || {
            "commit works after commit_outcome said not_committed in another process.".to_owned()
        })
        .map_err(|fault| {
            fault.advise(
                "Keep in the storage that an id was answered with not_committed, and look for that in \
                 the step that makes the archive one.",
            )
        })?;
    }
    let made = Made::new(
        archive,
        commit_id,
        requests,
        (copied.truth, &copied.volumes),
        Transferred::default(),
    );
    let outcome = judge(ctx, &made, was_committed).await?;
    Ok((made, outcome))
}

/// What new processes say must agree with each other, with the list and with the data.
async fn judge(ctx: &Ctx, made: &Made, was_committed: bool) -> Checked<CommitOutcome> {
    let provider = ctx.bare_provider().await?;
    let outcome = ctx.outcome(provider.as_ref(), made.commit_id).await?;
    let name = &made.archive;
    if was_committed {
        ensure(outcome != CommitOutcome::NotCommitted, || {
            "commit returned, and then commit_outcome says not_committed.".to_owned()
        })?;
    }
    agree(ctx, provider.as_ref(), made, &outcome).await?;
    let other = ctx.provider().await?;
    // What was begun may still go on somewhere.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let again = ctx.outcome(other.as_ref(), made.commit_id).await?;
    ensure(again == outcome, || {
        format!("commit_outcome of archive {name} is {outcome:?}, and later {again:?}.")
    })
    .map_err(|fault| fault.advise("Once it was told, the outcome must never change."))?;
    agree(ctx, other.as_ref(), made, &outcome).await?;
    Ok(outcome)
}

async fn agree(
    ctx: &Ctx,
    provider: &dyn Provider,
    made: &Made,
    outcome: &CommitOutcome,
) -> Checked {
    let name = &made.archive;
    let is_listed = ctx.list(provider).await?.contains_key(name);
    match outcome {
        CommitOutcome::Committed { archive } => {
            ensure(archive == name, || "commit_outcome names another archive.".to_owned())?;
            ensure(is_listed, || {
                format!("commit_outcome says committed, and archive {name} is not listed.")
            })?;
            ctx.check_restore(provider, made).await
        }
        _ => ensure(!is_listed, || {
            format!("commit_outcome says {outcome:?}, and archive {name} is listed.")
        }),
    }
}
