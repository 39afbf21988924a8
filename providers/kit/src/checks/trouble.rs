// SPDX-License-Identifier: MIT OR Apache-2.0
//! Backups that fail: whatever happens, no archive is wrong and the next backup is right.

use std::time::{Duration, Instant};

use provider_api::{CancellationToken, Provider, Transferred, Uuid};

use super::Verdict;
use crate::bench::{Ctx, Made};
use crate::fault::{Checked, Fault, ensure, words};
use crate::machine::Vm;
use crate::snapshot::Trouble;

/// Requests that are made to fail, one backup each.
const FAILING_MAX: u64 = 400;
/// A provider must stop in this time when it is told to.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Why a check that needs disks with trouble is not made; nothing if they can have it.
fn cannot_look(ctx: &Ctx) -> Option<Verdict> {
    let why = "plain files cannot be made to fail or to be slow; that needs qemu-storage-daemon \
               and /dev/fuse";
    (!ctx.bench.offer.can_have_trouble()).then(|| Verdict::NotTested(why.to_owned()))
}

/// Fails unless the archive is not listed.
async fn must_be_gone(ctx: &Ctx, provider: &dyn Provider, archive: &str, when: &str) -> Checked {
    let list = ctx.list(provider).await?;
    ensure(!list.contains_key(archive), || format!("Archive {archive} is listed {when}."))
}

/// The backup after a failure: right, and all before it, too.
async fn must_go_on(ctx: &Ctx, provider: &dyn Provider, vm: &mut Vm, before: &[Made]) -> Checked {
    vm.scribble(3).await?;
    let after = |fault: Fault| fault.at("After it");
    let made = ctx.back_up(provider, vm).await.map_err(after)?;
    for made in before.iter().chain([&made]) {
        ctx.check_restore(provider, made).await.map_err(after)?;
    }
    Ok(())
}

pub(super) async fn abort(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let provider = provider.as_ref();
    let mut vm = ctx.usual_vm().await?;
    let full = ctx.back_up(provider, &mut vm).await?;
    for step in ["start_guest", "plan_volumes", "backup_vm"] {
        let at = |fault: Fault| fault.at(&format!("Abort after {step}"));
        vm.scribble(3).await?;
        let mut begun = ctx.begin(provider, &vm).await?;
        if step != "start_guest" {
            let requests = ctx.plan(begun.backup.as_mut(), &mut vm).await?;
            if step == "backup_vm" {
                let copied = ctx.copy(begun.backup.as_mut(), &mut vm, &requests).await?;
                ctx.expect("backup_vm", async { copied.result }).await.map_err(at)?;
            }
        }
        let archive = begun.archive.clone();
        let aborted = ctx.abort(begun).await.map_err(at);
        vm.machine.as_dyn().thaw(false).await.map_err(Fault::new)?;
        aborted?;
        must_be_gone(ctx, provider, &archive, "after its abort").await.map_err(at)?;
        must_go_on(ctx, provider, &mut vm, std::slice::from_ref(&full)).await.map_err(at)?;
    }
    Ok(Verdict::Passed)
}

/// One backup with trouble. Says how many requests it made and whether it became an archive.
async fn troubled(
    ctx: &Ctx,
    provider: &dyn Provider,
    vm: &mut Vm,
    trouble: Trouble,
) -> Checked<(u64, Option<Made>)> {
    vm.sim()?.set_trouble(trouble);
    let mut begun = ctx.begin(provider, vm).await?;
    let requests = ctx.plan(begun.backup.as_mut(), vm).await?;
    let copied = ctx.copy(begun.backup.as_mut(), vm, &requests).await?;
    let count = vm.sim()?.seen().requests;
    let archive = begun.archive.clone();
    if copied.result.is_err() {
        let aborted = ctx.abort(begun).await;
        vm.machine.as_dyn().thaw(false).await.map_err(Fault::new)?;
        aborted?;
        must_be_gone(ctx, provider, &archive, "though its backup failed").await?;
        return Ok((count, None));
    }
    // It tried again, or did without: then it must be right all the more.
    let commit_id = Uuid::new_v4();
    let committed = ctx.commit(begun, commit_id).await?;
    vm.machine.as_dyn().thaw(committed.is_ok()).await.map_err(Fault::new)?;
    ctx.expect("commit", async { committed }).await?;
    let made = Made::new(
        archive,
        commit_id,
        requests,
        (copied.truth, &copied.volumes),
        Transferred::default(),
    );
    ctx.check_restore(provider, &made).await.map_err(|fault| {
        fault.at("It succeeds though a request failed, and the archive is wrong")
    })?;
    Ok((count, Some(made)))
}

/// Every request of a full backup and of an increment fails in its turn.
pub(super) async fn failing_requests(ctx: &Ctx) -> Checked<Verdict> {
    if let Some(not_tested) = cannot_look(ctx) {
        return Ok(not_tested);
    }
    let provider = ctx.provider().await?;
    let provider = provider.as_ref();
    let mut failed = 0;
    for is_increment in [false, true] {
        let mut n = 0;
        let mut vm = ctx.vm(&[1 << 20, (256 << 10) + 512]).await?;
        loop {
            if !is_increment {
                // A full backup each time.
                vm = ctx.vm(&[1 << 20, (256 << 10) + 512]).await?;
            } else if n == 0 {
                ctx.back_up(provider, &mut vm).await?;
            }
            vm.scribble(3).await?;
            let trouble = Trouble { fail_at: Some(n), ..Trouble::default() };
            let (count, made) = troubled(ctx, provider, &mut vm, trouble)
                .await
                .map_err(|fault| fault.at(&format!("Request {n} fails")))?;
            failed += usize::from(made.is_none());
            // A backup that failed ends early; one that came to its end below n met no trouble.
            if count <= n {
                break;
            }
            n += 1;
            if n == FAILING_MAX {
                ctx.remark(format!("Only the first {FAILING_MAX} requests were made to fail."));
                break;
            }
        }
        if is_increment {
            must_go_on(ctx, provider, &mut vm, &[]).await?;
        }
    }
    if failed == 0 {
        return Err(Fault::new("No backup fails, whichever request of its disks does.")
            .advise("A failed read must end the backup, or be tried again."));
    }
    Ok(Verdict::Passed)
}

/// The server closes all connections for good.
pub(super) async fn lost_disks(ctx: &Ctx) -> Checked<Verdict> {
    if let Some(not_tested) = cannot_look(ctx) {
        return Ok(not_tested);
    }
    let provider = ctx.provider().await?;
    let provider = provider.as_ref();
    let mut vm = ctx.vm(&[ctx.bench.options.size_bytes]).await?;
    let full = ctx.back_up(provider, &mut vm).await?;
    vm.scribble(12).await?;
    ctx.back_up(provider, &mut vm).await?;
    // Early, when areas are asked for, and late, when data is read.
    let count = vm.sim()?.seen().requests;
    for at in [0, 1, count / 3, count * 2 / 3, count.saturating_sub(2)] {
        vm.scribble(12).await?;
        let trouble = Trouble { hang_up_at: Some(at), ..Trouble::default() };
        let place = |fault: Fault| fault.at(&format!("Disks lost at request {at}"));
        let (_, made) = troubled(ctx, provider, &mut vm, trouble).await.map_err(place)?;
        ensure(at > 0 || made.is_none(), || {
            "The backup succeeds though its disks were lost from the beginning.".to_owned()
        })?;
        must_go_on(ctx, provider, &mut vm, std::slice::from_ref(&full)).await.map_err(place)?;
    }
    Ok(Verdict::Passed)
}

/// One backup that must fail.
async fn must_fail(ctx: &Ctx, vm: &mut Vm, lie: &str, advice: &str) -> Checked {
    let provider = ctx.provider().await?;
    let mut begun = ctx.begin(provider.as_ref(), vm).await?;
    let requests = ctx.plan(begun.backup.as_mut(), vm).await?;
    let copied = ctx.copy(begun.backup.as_mut(), vm, &requests).await;
    let archive = begun.archive.clone();
    let aborted = ctx.abort(begun).await;
    vm.machine.as_dyn().thaw(false).await.map_err(Fault::new)?;
    // A success whose progress makes no sense is a success, too.
    let succeeded = match copied {
        Ok(copied) => copied.result.is_ok(),
        Err(fault) => return Err(fault),
    };
    ensure(!succeeded, || format!("The backup succeeds though {lie}."))
        .map_err(|fault| fault.advise(advice))?;
    aborted?;
    must_be_gone(ctx, provider.as_ref(), &archive, "though its backup failed").await
}

/// The sum of what the bitmap marks is not the one announced.
pub(super) async fn wrong_sum(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let advice =
        "Compare the sum of all dirty areas with `dirty_bytes`, or the increment may be wrong.";
    for lie in [4096, -4096] {
        let mut vm = ctx.usual_vm().await?;
        ctx.back_up(provider.as_ref(), &mut vm).await?;
        vm.scribble(4).await?;
        vm.sim()?.dirty_lie = Some(lie);
        must_fail(ctx, &mut vm, "the bitmap marks another number of bytes than announced", advice)
            .await?;
    }
    Ok(Verdict::Passed)
}

pub(super) async fn wrong_size(ctx: &Ctx) -> Checked<Verdict> {
    let advice =
        "Compare the size of the export or file with `size_bytes` before anything is stored.";
    for lie in [512, -512] {
        let mut vm = ctx.usual_vm().await?;
        vm.sim()?.size_lie = Some(lie);
        must_fail(ctx, &mut vm, "a disk has another size than announced", advice).await?;
    }
    Ok(Verdict::Passed)
}

pub(super) async fn cancel(ctx: &Ctx) -> Checked<Verdict> {
    if let Some(not_tested) = cannot_look(ctx) {
        return Ok(not_tested);
    }
    let provider = ctx.provider().await?;
    let mut vm = ctx.usual_vm().await?;
    let delay = Some(Duration::from_millis(500));
    vm.sim()?.set_trouble(Trouble { delay, ..Trouble::default() });
    let mut begun = ctx.begin(provider.as_ref(), &vm).await?;
    let requests = ctx.plan(begun.backup.as_mut(), &mut vm).await?;
    let volumes = vm.machine.as_dyn().freeze(&requests).await.map_err(Fault::new)?;
    let mut call = ctx.call();
    call.cancel = CancellationToken::new();
    let stop = call.cancel.clone();
    let stopper = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(200)).await;
        stop.cancel();
        Instant::now()
    });
    let silent = Silent;
    let backup = begun.backup.backup_vm(vm.backup(volumes), &silent, &call);
    let result = tokio::time::timeout(STOP_LIMIT, backup).await;
    stopper.abort();
    let archive = begun.archive.clone();
    let aborted = ctx.abort(begun).await;
    vm.machine.as_dyn().thaw(false).await.map_err(Fault::new)?;
    match result {
        Err(_) => {
            let fault = Fault::new(format!(
                "backup_vm goes on for {} s after its token was cancelled.",
                STOP_LIMIT.as_secs()
            ));
            return Err(fault.advise("Watch `call.cancel` in every loop and every wait."));
        }
        Ok(Ok(_)) => ctx.remark("The backup was too fast to be cancelled."),
        Ok(Err(error)) if error.kind != provider_api::Kind::Cancelled => {
            ctx.remark(format!("A cancelled backup fails as {:?}: {}", error.kind, words(&error)));
        }
        Ok(Err(_)) => {}
    }
    aborted?;
    must_be_gone(ctx, provider.as_ref(), &archive, "after its abort").await?;
    Ok(Verdict::Passed)
}

/// For checks that do not look at progress.
pub(super) struct Silent;

impl provider_api::Progress for Silent {
    fn report(&self, _device: &str, _done: u64, _total: u64, _zero: u64) {}
    fn log(&self, _line: &str) {}
}
