// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is done with archives: restores, notes, protection, verification, removal.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use futures_util::future::join_all;
use provider_api::{
    BitmapRequest, Error, Kind, LOG_BYTES_MAX, NOTES_BYTES_MAX, Provider, Uuid, VerifyExtent,
    VerifyOptions, VerifyReport, notes_line,
};

use super::Verdict;
use crate::bench::{Ctx, Made};
use crate::fault::{Checked, Fault, clean, ensure, words};
use crate::machine::{Truth, Vm};

/// Files of a storage that are looked at for one to be damaged.
const FILES_MAX: usize = 100_000;
/// How large a file that is damaged may be, in the size of a disk: an archive of it, with what belongs to it.
const DAMAGED_PER_DISK_BYTE: u64 = 4;

/// So many backups of one guest, oldest first.
async fn some(ctx: &Ctx, provider: &dyn Provider, count: usize) -> Checked<Vec<Made>> {
    let mut vm = ctx.usual_vm().await?;
    let mut all = Vec::new();
    for _ in 0..count {
        all.push(ctx.back_up(provider, &mut vm).await?);
        vm.scribble(4).await?;
    }
    Ok(all)
}

pub(super) async fn restores(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let all = some(ctx, provider.as_ref(), 2).await?;
    // Two archives of a chain, and one of them twice, at the same time.
    let at_once = [&all[0], &all[1], &all[1]];
    let restores = at_once.map(|made| ctx.check_restore(provider.as_ref(), made));
    for result in join_all(restores).await {
        result.map_err(|fault| fault.at("Three restores at once"))?;
    }
    // A disk that the archive does not have, then a restore that reads nothing.
    let call = ctx.call();
    let begun = provider.restore_vm_init(&all[0].archive, &call);
    let mut restore = ctx.expect("restore_vm_init", begun).await?;
    let dir = ctx.bench.private_dir()?;
    let offered = restore.volume_init("scsi99", &dir, &call);
    let offered = ctx.answer("volume_init", offered).await?;
    let cleaned = ctx.expect("volume_cleanup", restore.volume_cleanup("scsi99", &call)).await;
    ctx.expect("cleanup", restore.cleanup(&call)).await?;
    ensure(offered.is_err(), || "volume_init works for a disk that is not there.".to_owned())?;
    cleaned?;
    ctx.check_restore(provider.as_ref(), &all[0]).await?;
    Ok(Verdict::Passed)
}

pub(super) async fn random_read(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let all = some(ctx, provider.as_ref(), 2).await?;
    ctx.read_at_random(provider.as_ref(), &all[1]).await?;
    Ok(Verdict::Passed)
}

pub(super) async fn notes(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let all = some(ctx, provider.as_ref(), 1).await?;
    let name = &all[0].archive;
    let long = "\u{20ac} long\n".repeat(NOTES_BYTES_MAX / 9);
    let texts =
        ["", "one line", "\n\n  first\n\tsecond \u{1f512}\n", &long, "../x: {{guestname}}\n", ""];
    for text in texts {
        let call = ctx.call();
        ctx.expect("set_notes", provider.set_notes(name, text, &call)).await?;
        let other = ctx.bare_provider().await?;
        let kept = ctx.expect("notes", other.notes(name, &call)).await?;
        ensure(kept == text, || {
            format!(
                "Notes of {} bytes come back with {} bytes, or changed.",
                text.len(),
                kept.len()
            )
        })?;
        let list = ctx.list(other.as_ref()).await?;
        let shown = list.get(name).and_then(|archive| archive.notes.clone());
        ensure(shown == notes_line(text), || {
            format!(
                "list shows {} as the notes, not {}.",
                quoted(shown.as_deref()),
                quoted(notes_line(text).as_deref())
            )
        })
        .map_err(|fault| {
            fault.advise(
                "A list shows the first line of the notes that is not blank, without white space at its \
                 ends, at most 512 bytes of it, and none (null) without such a line. (In Rust: `notes_line`.)",
            )
        })?;
    }
    Ok(Verdict::Passed)
}

/// An optional text in words of no language.
fn quoted(text: Option<&str>) -> String {
    text.map_or_else(|| "none (null)".to_owned(), |text| format!("{:?}", clean(text)))
}

pub(super) async fn log(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let all = some(ctx, provider.as_ref(), 1).await?;
    let name = &all[0].archive;
    let long = "INFO: \u{e4}\n".repeat(LOG_BYTES_MAX / 9);
    let call = ctx.call();
    let kept = ctx.expect("log", provider.log(name, &call)).await?;
    ensure(kept.is_empty(), || "There is a log before one was kept.".to_owned())?;
    for text in ["INFO: first\n", &long, "INFO: last"] {
        let call = ctx.call();
        ctx.expect("keep_log", provider.keep_log(name, text, &call)).await?;
        let other = ctx.bare_provider().await?;
        let kept = ctx.expect("log", other.log(name, &call)).await?;
        ensure(kept == text, || {
            format!(
                "A log of {} bytes comes back with {} bytes, or changed.",
                text.len(),
                kept.len()
            )
        })?;
    }
    Ok(Verdict::Passed)
}

pub(super) async fn protect(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let all = some(ctx, provider.as_ref(), 2).await?;
    let name = &all[1].archive;
    for protected in [true, true, false, false, true] {
        let call = ctx.call();
        ctx.expect("set_protected", provider.set_protected(name, protected, &call)).await?;
        let other = ctx.bare_provider().await?;
        let list = ctx.list(other.as_ref()).await?;
        ensure(list.get(name).is_some_and(|archive| archive.protected == protected), || {
            format!("Archive {name} is not listed with protected = {protected}.")
        })?;
    }
    let call = ctx.call();
    let refused = ctx.answer("remove", provider.remove(name, &call)).await?;
    must_be("remove of a protected archive", refused, Kind::Protected)?;
    ctx.check_still_restores(provider.as_ref(), &all[1]).await?;
    let call = ctx.call();
    ctx.expect("set_protected", provider.set_protected(name, false, &call)).await?;
    ctx.expect("remove", provider.remove(name, &call)).await?;
    let list = ctx.list(provider.as_ref()).await?;
    ensure(!list.contains_key(name), || format!("Archive {name} is listed after its removal."))?;
    Ok(Verdict::Passed)
}

fn must_be<T>(what: &str, result: Result<T, Error>, kind: Kind) -> Checked {
    match result {
        Ok(_) => Err(Fault::new(format!("{what} works; it must be refused as {kind:?}."))),
        Err(error) if error.kind == kind => Ok(()),
        Err(error) => Err(Fault::new(format!(
            "{what} is refused as {:?}, not as {kind:?}: {}",
            error.kind,
            clean(&error.message)
        ))),
    }
}

async fn verify_one(
    ctx: &Ctx,
    provider: &dyn Provider,
    archive: &str,
    extent: VerifyExtent,
) -> Checked<VerifyReport> {
    let options = VerifyOptions { extent, known_sound: Vec::new() };
    let call = ctx.call();
    let silent = super::trouble::Silent;
    ctx.expect("verify", provider.verify(archive, &options, &silent, &call)).await
}

pub(super) async fn verify(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let all = some(ctx, provider.as_ref(), 3).await?;
    for extent in [VerifyExtent::Sample { percent: 30, seed: 7 }, VerifyExtent::All] {
        for made in &all {
            let name = &made.archive;
            let report = verify_one(ctx, provider.as_ref(), name, extent).await?;
            if let Some(damage) = report.damage.first() {
                return Err(Fault::new(format!(
                    "verify calls the sound archive {name} damaged: {}",
                    clean(&damage.problem)
                )));
            }
            ensure(report.damage_count == 0, || format!("verify counts damage in {name}."))?;
            let list = ctx.list(ctx.bare_provider().await?.as_ref()).await?;
            let verified = list.get(name).and_then(|archive| archive.verified);
            ensure(verified.is_some_and(|v| v.extent == extent && v.damage_count == 0), || {
                let listed = verified.map_or_else(|| "nothing".to_owned(), |v| format!("{v:?}"));
                format!("{name} was verified ({extent:?}), and `list` says {listed} of it.")
            })
            .map_err(|fault| {
                fault.advise(
                    "Keep time, extent and number of damages of the last verification, and list them as \
                     the archive's `verified`.",
                )
            })?;
        }
    }
    Ok(Verdict::Passed)
}

/// Flips one bit of files that belong to an archive of the kit: of each disk, if they say whose they are.
pub(super) async fn damage(ctx: &Ctx) -> Checked<Verdict> {
    let Some(dir) = ctx.bench.options.data_dir.clone() else {
        let why = "the kit does not know where the storage keeps its data (--data-dir)";
        return Ok(Verdict::NotTested(why.to_owned()));
    };
    let provider = ctx.provider().await?;
    let before = files(&dir);
    let all = some(ctx, provider.as_ref(), 1).await?;
    let made = &all[0];
    let name = &made.archive;
    let own = own_files(&dir, name, &before, &files(&dir));
    let max_bytes = DAMAGED_PER_DISK_BYTE.saturating_mul(ctx.bench.options.size_bytes);
    let chosen = to_be_damaged(&dir, &own, &made.truth, max_bytes);
    if chosen.is_empty() {
        let why = format!(
            "below {} a backup of {name} makes no file of at most {max_bytes} bytes that is certainly its \
             own, by a name that begins with the archive's",
            dir.display()
        );
        return Ok(Verdict::NotTested(why));
    }
    let own_bytes: u64 = own.iter().map(|(_, size)| size).sum();
    if own_bytes < least_data_bytes(&made.truth) {
        ctx.remark(format!(
            "Data not tested: with {own_bytes} bytes the files that are certainly the archive's own have not \
             the data of its disks. What may be other archives', too, is not damaged."
        ));
    }
    for file in chosen {
        let shown = file.strip_prefix(&dir).unwrap_or(&file).display().to_string();
        damage_one(ctx, provider.as_ref(), made, (&file, &clean(&shown))).await?;
    }
    Ok(Verdict::Passed)
}

async fn damage_one(
    ctx: &Ctx,
    provider: &dyn Provider,
    made: &Made,
    (file, shown): (&Path, &str),
) -> Checked {
    let name = &made.archive;
    let flipped = flip_bit(file).map_err(|e| Fault::new(format!("Cannot damage {shown}: {e}.")))?;
    let report = verify_one(ctx, provider, name, VerifyExtent::All).await;
    let restored = ctx.restore(provider, name, &made.truth).await;
    // As it was, so that the archive can be removed as a sound one.
    flip_bit_at(file, flipped).map_err(|e| Fault::new(format!("Cannot mend {shown}: {e}.")))?;
    ctx.remark(format!("Bit 0 of byte {flipped} of {shown} was flipped."));
    let report = report?;
    if report.is_sound() && report.damage.is_empty() {
        let fault = Fault::new(format!(
            "verify finds nothing with bit 0 of byte {flipped} of {shown} flipped."
        ));
        return Err(fault.advise("Compare with checksums that were made when the data was read."));
    }
    ensure(report.damage.iter().all(|damage| !damage.problem.is_empty()), || {
        "verify finds damage and does not say which.".to_owned()
    })?;
    if restored.is_err() {
        ctx.remark("A restore notices the damage, too.");
    }
    Ok(())
}

type Files = BTreeMap<PathBuf, (u64, Option<SystemTime>)>;

/// All regular files below a directory, with size and time.
fn files(dir: &Path) -> Files {
    let mut found = Files::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        let Ok(entries) = std::fs::read_dir(&dir) else { continue };
        for entry in entries.flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_dir() {
                open.push(entry.path());
            } else if meta.is_file() && found.len() < FILES_MAX {
                found.insert(entry.path(), (meta.len(), meta.modified().ok()));
            }
        }
    }
    found
}

/// The files of an archive that were not there before, with their sizes, the largest first: data before an
/// index. Others may make archives in the same directory meanwhile, and those are theirs.
fn own_files(dir: &Path, archive: &str, before: &Files, after: &Files) -> Vec<(PathBuf, u64)> {
    let own = after.iter().filter(|(path, (size, _))| {
        *size > 0 && !before.contains_key(*path) && is_named_after(dir, path, archive)
    });
    let mut own: Vec<_> = own.map(|(path, (size, _))| (path.clone(), *size)).collect();
    own.sort_by_key(|(_, size)| std::cmp::Reverse(*size));
    own
}

/// The largest file of each disk, where the paths name the disks; else the largest of all.
fn to_be_damaged(
    dir: &Path,
    own: &[(PathBuf, u64)],
    truth: &Truth,
    max_bytes: u64,
) -> BTreeSet<PathBuf> {
    let fits = || own.iter().filter(|(_, size)| *size <= max_bytes).map(|(path, _)| path);
    let of_disk = |device: &str| {
        fits().find(|path| {
            let below = path.strip_prefix(dir).unwrap_or(path);
            below.to_str().is_some_and(|below| below.contains(device))
        })
    };
    let of_disks = truth.iter().filter_map(|(device, _)| of_disk(device).cloned());
    let mut chosen: BTreeSet<PathBuf> = of_disks.collect();
    if chosen.is_empty() {
        chosen.extend(fits().next().cloned());
    }
    chosen
}

/// What the disks take at least in a storage, however well it compresses: half of what does not repeat.
fn least_data_bytes(truth: &Truth) -> u64 {
    const PIECE_BYTES: usize = 4096;
    let pieces = truth.iter().flat_map(|(_, content)| content.chunks(PIECE_BYTES));
    let varied = pieces.filter(|piece| piece.iter().any(|byte| *byte != piece[0]));
    varied.map(|piece| piece.len() as u64).sum::<u64>() / 2
}

/// Whether a part of a path below `dir` is an archive's name, alone or with an ending.
fn is_named_after(dir: &Path, path: &Path, archive: &str) -> bool {
    let Ok(below) = path.strip_prefix(dir) else { return false };
    below.components().any(|part| {
        let rest = part.as_os_str().to_str().and_then(|part| part.strip_prefix(archive));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    })
}

/// Flips bit 0 in the middle of the data, and says where.
fn flip_bit(file: &Path) -> std::io::Result<u64> {
    let content = std::fs::File::open(file)?;
    let size_bytes = content.metadata()?.len();
    // The middle of what is not zero: holes of a sparse file say nothing about it.
    let data_bytes = nonzero(&content)?.count() as u64;
    let middle = usize::try_from(data_bytes / 2).unwrap_or(0);
    let at = nonzero(&content)?.nth(middle).unwrap_or(size_bytes / 2);
    flip_bit_at(file, at)?;
    Ok(at)
}

/// Where the bytes are that are not zero.
fn nonzero(mut file: &std::fs::File) -> std::io::Result<impl Iterator<Item = u64>> {
    use std::io::{BufReader, Read as _, Seek as _};
    file.rewind()?;
    let bytes = BufReader::new(file).bytes().map_while(Result::ok);
    Ok((0..).zip(bytes).filter(|(_, byte)| *byte != 0).map(|(at, _)| at))
}

fn flip_bit_at(file: &Path, at: u64) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::File::options().read(true).write(true).open(file)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    byte[0] ^= 1;
    file.write_all_at(&byte, at)
}

/// Removes archives of a chain, in every order that matters.
pub(super) async fn remove(ctx: &Ctx) -> Checked<Verdict> {
    // The base, the middle, the end of a chain of four.
    for victim in [0, 2, 3] {
        let provider = ctx.provider().await?;
        let provider = provider.as_ref();
        let mut vm = ctx.usual_vm().await?;
        let mut all = Vec::new();
        for _ in 0..4 {
            all.push(ctx.back_up(provider, &mut vm).await?);
            vm.scribble(4).await?;
        }
        let name = all[victim].archive.clone();
        let call = ctx.call();
        let removed = ctx.answer("remove", provider.remove(&name, &call)).await?;
        let at = |fault: Fault| fault.at(&format!("After removal {victim} of a chain of 4"));
        judge_removal(ctx, provider, &mut all, victim, removed).await.map_err(at)?;
        for made in &all {
            ctx.check_restore(provider, made).await.map_err(at)?;
        }
        // The next increment builds upon what is there.
        let next = ctx.back_up(provider, &mut vm).await.map_err(at)?;
        let is_gone = all.iter().all(|made| made.archive != name);
        if is_gone && victim == 3 {
            let wanted = next.requests.iter().any(|request| {
                matches!(request, BitmapRequest::Use { generation, .. }
                    if next_asks_for_gone(generation, &all))
            });
            ensure(!wanted, || {
                "The backup after a removal wants to build upon the archive that was removed."
                    .to_owned()
            })?;
        }
        ctx.check_restore(provider, &next).await.map_err(at)?;
        for made in &all {
            ctx.check_restore(provider, made).await.map_err(at)?;
        }
    }
    remove_restored(ctx).await?;
    Ok(Verdict::Passed)
}

/// Another process removes archives while a backup has stored its data and is not committed yet: one of another
/// guest with much the same disks, then the oldest of the guest itself.
pub(super) async fn remove_meanwhile(ctx: &Ctx) -> Checked<Verdict> {
    let (provider, other) = (ctx.provider().await?, ctx.provider().await?);
    let (provider, other) = (provider.as_ref(), other.as_ref());
    let mut vm = ctx.usual_vm().await?;
    let mut twin = ctx.usual_vm().await?;
    let truth = vm.truth.clone();
    twin.sim()?.replace_disks(&[]);
    twin.sim()?.replace_disks(&truth);
    twin.truth = truth;
    let victim = ctx.back_up(provider, &mut twin).await?;
    // Something of its own, too.
    vm.scribble(2).await?;
    let mut all = Vec::new();
    let full = back_up_during_removal(ctx, (provider, other), &mut vm, &victim).await;
    all.push(full.map_err(|fault| fault.at("A full backup, an archive of another guest"))?.0);
    for _ in 0..2 {
        vm.scribble(4).await?;
        all.push(ctx.back_up(provider, &mut vm).await?);
    }
    vm.scribble(4).await?;
    let victim = all[0].clone();
    let next = back_up_during_removal(ctx, (provider, other), &mut vm, &victim).await;
    let (next, is_gone) =
        next.map_err(|fault| fault.at("An increment, the oldest archive of its guest"))?;
    all.push(next);
    for made in all.iter().skip(usize::from(is_gone)) {
        ctx.check_restore(provider, made).await.map_err(of_the_sweep)?;
    }
    Ok(Verdict::Passed)
}

fn of_the_sweep(fault: Fault) -> Fault {
    fault.advise(
        "A removal must leave alone what a backup under way has stored, or found to be there already.",
    )
}

/// One backup, and the removal of `victim` before its commit. Says whether that is gone.
async fn back_up_during_removal(
    ctx: &Ctx,
    (provider, other): (&dyn Provider, &dyn Provider),
    vm: &mut Vm,
    victim: &Made,
) -> Checked<(Made, bool)> {
    let mut begun = ctx.begin(provider, vm).await?;
    let requests = ctx.plan(begun.backup.as_mut(), vm).await?;
    let copied = ctx.copy(begun.backup.as_mut(), vm, &requests).await?;
    let moved = ctx.expect("backup_vm", async { copied.result }).await?;
    let call = ctx.call();
    let removed = ctx.answer("remove", other.remove(&victim.archive, &call)).await?;
    if let Err(error) = &removed {
        ensure(matches!(error.kind, Kind::InUse | Kind::HasDependents), || {
            format!("remove during a backup fails: {}", words(error))
        })?;
    }
    let (archive, commit_id) = (begun.archive.clone(), Uuid::new_v4());
    let committed = ctx.commit(begun, commit_id).await?;
    vm.machine.as_dyn().thaw(committed.is_ok()).await.map_err(Fault::new)?;
    ctx.expect("commit, after another archive was removed,", async { committed })
        .await
        .map_err(of_the_sweep)?;
    let volumes = (copied.truth, copied.volumes.as_slice());
    let made = Made::new(archive, commit_id, requests, volumes, moved);
    ctx.check_restore(ctx.provider().await?.as_ref(), &made).await.map_err(of_the_sweep)?;
    Ok((made, removed.is_ok()))
}

/// Another process wants an archive gone that is being restored: it is refused, or the restore is right
/// nevertheless.
async fn remove_restored(ctx: &Ctx) -> Checked {
    let (provider, other) = (ctx.provider().await?, ctx.provider().await?);
    let all = some(ctx, provider.as_ref(), 1).await?;
    let (name, call) = (&all[0].archive, ctx.call());
    let removing = async || ctx.answer("remove", other.remove(name, &call)).await;
    let restoring = ctx.restore_during(provider.as_ref(), name, &all[0].truth, removing);
    let (removed, restored) = restoring.await?;
    let removed = removed?;
    let is_listed = ctx.list(provider.as_ref()).await?.contains_key(name);
    if removed.is_err() {
        must_be("remove of an archive that is being restored", removed, Kind::InUse)?;
        ensure(is_listed, || format!("The removal of {name} is refused, and it is gone."))?;
        return restored.map_err(|fault| fault.at("A restore with a removal that is refused"));
    }
    ensure(!is_listed, || format!("Archive {name} is listed after its removal."))?;
    restored.map_err(|fault| {
        fault
            .at("A restore whose archive is removed meanwhile")
            .advise("Refuse a removal as `InUse` from restore_vm_init to cleanup.")
    })
}

/// Whether a generation is none of the archives that are left.
fn next_asks_for_gone(generation: &String, left: &[Made]) -> bool {
    !left.iter().flat_map(|made| made.generations.iter().flatten()).any(|g| g == generation)
}

/// Judges the answer to a removal, and takes the archive from the list if it is gone.
async fn judge_removal(
    ctx: &Ctx,
    provider: &dyn Provider,
    all: &mut Vec<Made>,
    victim: usize,
    removed: Result<(), Error>,
) -> Checked {
    let name = all[victim].archive.clone();
    let list = ctx.list(provider).await?;
    match removed {
        Ok(()) => {
            ensure(!list.contains_key(&name), || {
                format!("Archive {name} is listed after its removal.")
            })?;
            all.remove(victim);
        }
        Err(error) if error.kind == Kind::HasDependents => {
            ensure(list.contains_key(&name), || {
                format!("The removal of {name} is refused, and it is gone.")
            })?;
            ensure(victim + 1 < all.len(), || {
                "The removal of the newest archive is refused because of dependents.".to_owned()
            })?;
            let are_known = error.dependents.iter().all(|name| list.contains_key(name));
            ensure(!error.dependents.is_empty() && are_known, || {
                format!(
                    "The removal of {name} is refused, and the archives that need it are not named."
                )
            })?;
            ctx.remark("An archive that others need cannot be removed before them.");
        }
        Err(error) => return Err(Fault::new(format!("remove fails: {}", words(&error)))),
    }
    for made in all.iter() {
        ensure(list.contains_key(&made.archive), || {
            format!("Archive {} is gone, too.", made.archive)
        })?;
    }
    Ok(())
}

/// Removes what a retention would: the oldest, those first that were made last.
pub(super) async fn prune(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let provider = provider.as_ref();
    let mut vm = ctx.usual_vm().await?;
    let mut all: Vec<Made> = Vec::new();
    for _ in 0..6 {
        all.push(ctx.back_up(provider, &mut vm).await?);
        vm.scribble(4).await?;
    }
    for victim in [4, 2, 1, 0] {
        let call = ctx.call();
        let removed = provider.remove(&all[victim].archive, &call);
        let removed = ctx.answer("remove", removed).await?;
        judge_removal(ctx, provider, &mut all, victim, removed).await?;
        for made in &all {
            ctx.check_restore(provider, made).await?;
        }
    }
    let next = ctx.back_up(provider, &mut vm).await?;
    for made in all.iter().chain([&next]) {
        ctx.check_restore(provider, made).await?;
    }
    Ok(Verdict::Passed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_file_of_the_own_archive_is_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let put = |path: &str, size: usize| {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, vec![1; size]).unwrap();
        };
        let own = |before: &Files| own_files(dir.path(), "a-1", before, &files(dir.path()));
        let at = |path: &str| dir.path().join(path);
        let before = files(dir.path());
        for other in ["a-10/image", "b-a-1/image", "x/a-1-2.img", "image"] {
            put(other, 100);
        }
        assert_eq!(own(&before), []);
        put("a-1/image", 10);
        put("a-1/index", 5);
        assert_eq!(own(&before), [(at("a-1/image"), 10), (at("a-1/index"), 5)]);
        assert_eq!(own(&files(dir.path())), [], "what was there before");
        put("deep/a-1.img", 20);
        assert_eq!(own(&before)[0], (at("deep/a-1.img"), 20));
        // Of each disk one, where that can be told.
        let disk = |name: &str| (name.to_owned(), std::sync::Arc::new(vec![0; 512]));
        let truth = vec![disk("scsi0"), disk("scsi1")];
        let chosen = |max: u64| to_be_damaged(dir.path(), &own(&before), &truth, max);
        assert_eq!(chosen(100), BTreeSet::from([at("deep/a-1.img")]));
        assert_eq!(chosen(10), BTreeSet::from([at("a-1/image")]));
        for (name, size) in [("scsi0.img", 9), ("scsi0.index", 2), ("scsi1.img", 8)] {
            put(&format!("a-1/{name}"), size);
        }
        let both = BTreeSet::from([at("a-1/scsi0.img"), at("a-1/scsi1.img")]);
        assert_eq!(chosen(100), both);
    }

    #[test]
    fn what_is_less_than_the_data_is_an_index() {
        let mut random = crate::random::Random::new(1);
        let mut content = vec![0; 1 << 20];
        content[..1 << 18].fill(7);
        content[1 << 19..].copy_from_slice(&random.bytes(1 << 19));
        let truth = vec![("scsi0".to_owned(), std::sync::Arc::new(content))];
        assert_eq!(least_data_bytes(&truth), 1 << 18);
    }

    #[test]
    fn the_middle_of_the_data_is_flipped_and_flipped_back() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        let mut content = vec![0; 100_000];
        content[70_000..70_003].fill(6);
        std::fs::write(&file, &content).unwrap();
        assert_eq!(flip_bit(&file).unwrap(), 70_001);
        assert_ne!(std::fs::read(&file).unwrap(), content);
        flip_bit_at(&file, 70_001).unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), content);
    }
}
