// SPDX-License-Identifier: MIT OR Apache-2.0
//! Backups that nothing disturbs: full, incremental, chains, odd disks.

use std::sync::Arc;

use provider_api::{BitmapMode, BitmapRequest, Provider};

use super::Verdict;
use crate::bench::{Ctx, Made};
use crate::disk::{BITMAP_GRANULE, GRANULE};
use crate::fault::{Checked, Fault, ensure};
use crate::machine::{Change, Vm, fresh_content};

/// Small changes between two backups.
const FINE_CHANGES: usize = 12;

/// Checks that a backup was asked for, and made, as an increment on `base`.
fn must_build_upon(made: &Made, base: &Made) -> Checked {
    for (request, generation) in made.requests.iter().zip(&base.generations) {
        match request {
            BitmapRequest::Use { generation: asked, .. } if Some(asked) == generation.as_ref() => {}
            BitmapRequest::Use { .. } => {
                return Err(Fault::new(
                    "plan_volumes asks for another generation than that of the last archive.",
                )
                .advise("Store `generation` of each volume with the archive, and ask for it."));
            }
            other => {
                return Err(Fault::new(format!(
                    "plan_volumes asks for {other:?} though there is an archive to build upon."
                ))
                .advise(
                    "A provider with `vm_incremental` asks for the generation of its last archive.",
                ));
            }
        }
    }
    Ok(())
}

pub(super) async fn full(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let mut vm = ctx.usual_vm().await?;
    let made = ctx.back_up(provider.as_ref(), &mut vm).await?;
    for mode in &made.modes {
        ensure(*mode != BitmapMode::Reuse, || {
            "The first backup of a guest is no increment.".to_owned()
        })?;
    }
    if provider.describe().capabilities.vm_incremental {
        ensure(!made.requests.contains(&BitmapRequest::None), || {
            "plan_volumes wants no bitmap, so that no increment can ever follow.".to_owned()
        })?;
    }
    check_config(ctx, provider.as_ref(), &vm, &made).await?;
    ctx.check_restore(provider.as_ref(), &made).await?;
    // What another process sees.
    let other = ctx.provider().await?;
    ctx.check_restore(other.as_ref(), &made).await?;
    Ok(Verdict::Passed)
}

/// Checks that the configuration files are kept as they were.
pub(super) async fn check_config(
    ctx: &Ctx,
    provider: &dyn Provider,
    vm: &Vm,
    made: &Made,
) -> Checked {
    let call = ctx.call();
    let kept = provider.guest_config(&made.archive, &call);
    let kept = ctx.expect("guest_config", kept).await?;
    ensure(kept.config == vm.config, || {
        format!(
            "The configuration in {} has {} bytes and is not the one that was backed up ({} bytes).",
            made.archive,
            kept.config.len(),
            vm.config.len()
        )
    })?;
    ensure(kept.firewall == vm.firewall, || {
        format!("The firewall configuration in {} is not the one that was backed up.", made.archive)
    })
}

pub(super) async fn incremental(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let mut vm = ctx.usual_vm().await?;
    let full = ctx.back_up(provider.as_ref(), &mut vm).await?;
    vm.scribble(12).await?;
    let first = ctx.back_up(provider.as_ref(), &mut vm).await?;
    must_build_upon(&first, &full)?;
    ensure(first.is_incremental(), || "The increment became a full backup.".to_owned())?;
    vm.scribble(12).await?;
    // Another process knows the generation, too.
    let other = ctx.provider().await?;
    let second = ctx.back_up(other.as_ref(), &mut vm).await?;
    must_build_upon(&second, &first)?;
    for made in [&second, &first, &full] {
        ctx.check_restore(other.as_ref(), made).await?;
    }
    let size: u64 = full.truth.iter().map(|(_, content)| content.len() as u64).sum();
    if first.transferred.written_bytes > size {
        ctx.remark("An increment writes more than the disks have.");
    }
    Ok(Verdict::Passed)
}

/// Small changes on each disk, most of them within data, none at the beginning of a larger unit.
async fn prick(vm: &mut Vm) -> Checked {
    let disks: Vec<_> =
        vm.truth.iter().map(|(name, content)| (name.clone(), content.len() as u64)).collect();
    for (device, size_bytes) in disks {
        for n in 0..FINE_CHANGES {
            let unit = vm.random.below(size_bytes / BITMAP_GRANULE);
            let granule = 1 + vm.random.below(BITMAP_GRANULE / GRANULE - 2);
            let offset = unit * BITMAP_GRANULE + granule * GRANULE;
            let change = match n % 4 {
                0 => Change::Zero { offset, length: GRANULE },
                _ => Change::Write { offset: offset + 512, data: vm.random.bytes(512) },
            };
            vm.change(&device, &change).await?;
        }
    }
    Ok(())
}

/// A host may have finer bitmaps: what changed is less than any unit of the provider's.
pub(super) async fn fine_increment(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let mut vm = ctx.usual_vm().await?;
    vm.sim()?.set_granule(GRANULE);
    vm.is_busy = false;
    let mut all = vec![ctx.back_up(provider.as_ref(), &mut vm).await?];
    for _ in 0..2 {
        prick(&mut vm).await?;
        let made = ctx.back_up(provider.as_ref(), &mut vm).await?;
        ensure(made.is_incremental(), || "The increment became a full backup.".to_owned())?;
        all.push(made);
    }
    for made in &all {
        ctx.check_restore(provider.as_ref(), made).await.map_err(|fault| {
            fault.advise(
                "A bitmap may mark as little as 4 KiB: what it does not mark is as in the archive \
                 before, also within one block or chunk of yours.",
            )
        })?;
    }
    Ok(Verdict::Passed)
}

pub(super) async fn empty_increment(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let mut vm = ctx.usual_vm().await?;
    vm.is_busy = false;
    let full = ctx.back_up(provider.as_ref(), &mut vm).await?;
    let empty = ctx.back_up(provider.as_ref(), &mut vm).await?;
    must_build_upon(&empty, &full)?;
    ensure(empty.transferred.read_bytes == 0, || {
        format!("An increment of nothing reads {} bytes.", empty.transferred.read_bytes)
    })?;
    vm.scribble(4).await?;
    let next = ctx.back_up(provider.as_ref(), &mut vm).await?;
    must_build_upon(&next, &empty)?;
    for made in [&next, &empty, &full] {
        ctx.check_restore(provider.as_ref(), made).await?;
    }
    Ok(Verdict::Passed)
}

/// The bitmap was lost: all is dirty, though an increment was asked for.
pub(super) async fn late_full(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let mut vm = ctx.usual_vm().await?;
    let first = ctx.back_up(provider.as_ref(), &mut vm).await?;
    vm.scribble(8).await?;
    vm.sim()?.invalidate();
    let late = ctx.back_up(provider.as_ref(), &mut vm).await?;
    must_build_upon(&late, &first)?;
    ensure(!late.is_incremental(), || "The kit offered no full backup.".to_owned())?;
    vm.scribble(8).await?;
    let next = ctx.back_up(provider.as_ref(), &mut vm).await?;
    must_build_upon(&next, &late)?;
    for made in [&next, &late, &first] {
        ctx.check_restore(provider.as_ref(), made).await?;
    }
    Ok(Verdict::Passed)
}

pub(super) async fn chain(ctx: &Ctx) -> Checked<Verdict> {
    let size = ctx.bench.options.size_bytes;
    let mut vm = ctx.vm(&[size, size / 4 + 512]).await?;
    let mut all: Vec<Made> = Vec::new();
    let mut fulls = 0;
    for step in 0..ctx.bench.options.chain_steps.max(2) {
        // Each from a process of its own.
        let provider = ctx.provider().await?;
        let made = ctx.back_up(provider.as_ref(), &mut vm).await;
        let made = made.map_err(|fault| fault.at(&format!("Step {step}")))?;
        fulls += usize::from(!made.is_incremental());
        ctx.check_restore(provider.as_ref(), &made).await?;
        all.push(made);
        vm.scribble(3).await?;
    }
    ensure(fulls < all.len(), || "None of the backups is an increment.".to_owned())?;
    if fulls > 1 {
        ctx.remark(format!("{fulls} of {} backups of the chain are full ones.", all.len()));
    }
    let provider = ctx.provider().await?;
    for made in all.iter().step_by(5) {
        ctx.check_restore(provider.as_ref(), made).await?;
    }
    Ok(Verdict::Passed)
}

/// Around each unit that a provider may think in.
pub(super) async fn sizes(ctx: &Ctx) -> Checked<Verdict> {
    let unit = BITMAP_GRANULE;
    let sizes =
        [512, 4096, 4096 + 512, unit - 512, unit, unit + 512, (1 << 20) - 512, (2 << 20) + 512];
    let provider = ctx.provider().await?;
    let mut vm = ctx.vm(&sizes).await?;
    let mut all = Vec::new();
    for _ in 0..3 {
        all.push(ctx.back_up(provider.as_ref(), &mut vm).await?);
        vm.scribble(1).await?;
    }
    for made in &all {
        ctx.check_restore(provider.as_ref(), made).await?;
    }
    Ok(Verdict::Passed)
}

pub(super) async fn changed_disks(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let size = ctx.bench.options.size_bytes / 4;
    let mut vm = ctx.vm(&[size, size]).await?;
    let mut all = vec![ctx.back_up(provider.as_ref(), &mut vm).await?];
    // One grows and is another disk from then on; a third one comes.
    let mut grown = vm.truth[1].1.to_vec();
    grown.resize(grown.len() + 512 * 5, 7);
    vm.truth[1].1 = Arc::new(grown);
    let fresh = fresh_content(&mut vm.random, size);
    vm.truth.push(("virtio7".to_owned(), Arc::new(fresh)));
    let truth = vm.truth.clone();
    vm.sim()?.replace_disks(&truth);
    vm.scribble(3).await?;
    all.push(ctx.back_up(provider.as_ref(), &mut vm).await?);
    // The first one goes.
    vm.truth.remove(0);
    let truth = vm.truth.clone();
    vm.sim()?.replace_disks(&truth);
    vm.scribble(3).await?;
    all.push(ctx.back_up(provider.as_ref(), &mut vm).await?);
    vm.scribble(3).await?;
    all.push(ctx.back_up(provider.as_ref(), &mut vm).await?);
    for made in &all {
        ctx.check_restore(provider.as_ref(), made).await?;
    }
    Ok(Verdict::Passed)
}

/// The host plans nothing then, and offers nothing to read.
pub(super) async fn no_disks(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let mut vm = ctx.vm(&[]).await?;
    let mut begun = ctx.begin(provider.as_ref(), &vm).await?;
    let copied = ctx.copy(begun.backup.as_mut(), &mut vm, &[]).await?;
    let archive = begun.archive.clone();
    match copied.result {
        Ok(_) => {
            let committed = ctx.commit(begun, provider_api::Uuid::new_v4()).await?;
            let committed = async { committed };
            ctx.expect("commit", committed).await?;
        }
        Err(error) => {
            let why = format!("backup_vm fails: {}", crate::fault::words(&error));
            ctx.abort(begun).await?;
            return Err(Fault::new(why));
        }
    }
    ensure(ctx.list(provider.as_ref()).await?.contains_key(&archive), || {
        format!("Archive {archive} is not listed after its commit.")
    })?;
    let call = ctx.call();
    let kept = ctx.expect("guest_config", provider.guest_config(&archive, &call)).await?;
    ensure(kept.config == vm.config, || "The configuration is not the one backed up.".to_owned())?;
    Ok(Verdict::Passed)
}

/// A full backup and an increment from files, also of a provider for which the host chooses NBD.
pub(super) async fn files(ctx: &Ctx) -> Checked<Verdict> {
    ctx.offer_files();
    let is_incremental = ctx.bare_provider().await?.describe().capabilities.vm_incremental;
    full(ctx).await?;
    if is_incremental { incremental(ctx).await } else { Ok(Verdict::Passed) }
}
