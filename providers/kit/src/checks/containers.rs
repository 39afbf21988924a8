// SPDX-License-Identifier: MIT OR Apache-2.0
//! Containers: a tree of odd files, backed up and compared with what a restore gives.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::join;

use provider_api::{
    ContainerBackup, ContainerData, ContainerMount, ContainerRestore, ContainerTransferred, Error,
    Excludes, GuestBackup, GuestInfo, GuestKind, Job, JobInfo, Provider, Uuid,
};

use super::Verdict;
use super::guests::ask_until;
use super::trouble::Silent;
use crate::attributes;
use crate::bench::Ctx;
use crate::container::{
    EXCLUDED, Ending, Failure, LEFT_OUT, PlainTree, ShownTree, Tree, change_tree, make_bulk,
    make_excluded, make_tree, unpack,
};
use crate::fault::{Checked, Fault, ensure, words};

const CONFIG: &[u8] = b"arch: amd64\nhostname: kit\nrootfs: kit:rootfs,size=1G\n";

/// How long a command waits for the storage to be asked meanwhile.
const SLOW_COMMAND: Duration = Duration::from_secs(1);

/// A container as the host tells of it.
pub(super) struct Ct {
    pub(super) id: u32,
    pub(super) name: Option<String>,
    pub(super) config: Vec<u8>,
    pub(super) firewall: Option<Vec<u8>>,
    /// Mount points of its volumes.
    pub(super) mount_points: Vec<PathBuf>,
}

impl Ct {
    /// One as most are.
    pub(super) fn new(id: u32) -> Self {
        let mount_points = vec!["/".into()];
        Self {
            id,
            name: Some("kit".to_owned()),
            config: CONFIG.to_vec(),
            firewall: None,
            mount_points,
        }
    }

    fn mounts(&self) -> Vec<ContainerMount> {
        let mount = |(n, mount_point): (usize, &PathBuf)| {
            let key = if n == 0 { "rootfs".to_owned() } else { format!("mp{}", n - 1) };
            let volume_id = format!("kit:{key}");
            ContainerMount { key, mount_point: mount_point.clone(), volume_id }
        };
        self.mount_points.iter().enumerate().map(mount).collect()
    }
}

/// A container's backup that was begun.
struct Begun {
    job: Box<dyn Job>,
    backup: Box<dyn GuestBackup>,
    archive: String,
}

async fn begin(ctx: &Ctx, provider: &dyn Provider, ct: &Ct) -> Checked<Begun> {
    let start_time_s = ctx.bench.time_s();
    let call = ctx.call();
    let job = provider.start_job(JobInfo { start_time_s }, &call);
    let mut job = ctx.expect("start_job", job).await?;
    let (id, name) = (ct.id, ct.name.clone());
    let info = GuestInfo { kind: GuestKind::Lxc, id, name, start_time_s };
    let backup = ctx.expect("start_guest", job.start_guest(info, &call)).await?;
    let archive = backup.archive_name().to_owned();
    provider_api::check_archive_name(&archive).map_err(Fault::new)?;
    Ok(Begun { job, backup, archive })
}

/// Shows the tree, as it is or as the host shows it.
async fn show(ctx: &Ctx, root: &Path, exclude: &[&str]) -> Checked<Box<dyn ShownTree>> {
    let excludes = Excludes::parse(exclude).map_err(|error| Fault::new(words(&error)))?;
    let place = ctx.bench.private_dir()?;
    match &ctx.bench.options.trees {
        None => Ok(Box::new(plain(root, &place, &excludes)?)),
        Some(maker) => {
            let shown = maker.show(root, &place, &excludes).await;
            shown.map_err(|why| Fault::new(format!("The kit's tree cannot be shown: {why}")))
        }
    }
}

fn plain(root: &Path, place: &Path, excludes: &Excludes) -> Checked<PlainTree> {
    PlainTree::new(root, place, excludes)
        .map_err(|e| Fault::new(format!("The kit cannot list its tree: {e}.")))
}

/// Copies the tree, or what is at another place in it, leaving out `exclude`.
async fn copy(
    ctx: &Ctx,
    (backup, ct): (&mut dyn GuestBackup, &Ct),
    root: &Path,
    (below, exclude): (&str, &[&str]),
) -> Checked<Result<ContainerTransferred, Error>> {
    copy_shown(ctx, (backup, ct), show(ctx, root, exclude).await?, below).await
}

async fn copy_shown(
    ctx: &Ctx,
    (backup, ct): (&mut dyn GuestBackup, &Ct),
    shown: Box<dyn ShownTree>,
    below: &str,
) -> Checked<Result<ContainerTransferred, Error>> {
    let at = |tree: PathBuf| if below.is_empty() { tree } else { tree.join(below) };
    let container = ContainerBackup {
        config: ct.config.clone(),
        firewall: ct.firewall.clone(),
        tree: at(shown.tree()),
        host_tree: at(shown.host_tree()),
        mounts: ct.mounts(),
        id_map: Vec::new(),
        lists: shown.lists(),
        host_lists: shown.host_lists(),
        skip_unreadable: false,
        expected_bytes: None,
        bandwidth_limit: None,
        runner: shown.runner(),
    };
    let call = ctx.call();
    let copied = backup.backup_container(container, &Silent, &call);
    let copied = ctx.answer("backup_container", copied).await;
    let closed = shown.close().await;
    let copied = copied?;
    closed.map_err(|why| {
        Fault::new(format!("The tree cannot be withdrawn after backup_container: {why}"))
            .advise("The tree and its runner are there until backup_container returns, no longer.")
    })?;
    Ok(copied)
}

/// All of the tree.
const WHOLE: (&str, &[&str]) = ("", &[]);

async fn finish(ctx: &Ctx, job: Box<dyn Job>) -> Checked {
    let call = ctx.call();
    ctx.expect("finish", job.finish(&call)).await
}

/// A whole backup that must succeed; the archive's name.
async fn back_up(
    ctx: &Ctx,
    provider: &dyn Provider,
    id: u32,
    root: &Path,
    part: (&Tree, &[&str]),
) -> Checked<String> {
    back_up_ct(ctx, provider, &Ct::new(id), root, part).await
}

/// The same of any container.
pub(super) async fn back_up_ct(
    ctx: &Ctx,
    provider: &dyn Provider,
    ct: &Ct,
    root: &Path,
    (tree, exclude): (&Tree, &[&str]),
) -> Checked<String> {
    let id = ct.id;
    let mut begun = begin(ctx, provider, ct).await?;
    let moved = match copy(ctx, (begun.backup.as_mut(), ct), root, ("", exclude)).await? {
        Ok(moved) => moved,
        Err(error) => {
            let fault = Fault::new(format!("backup_container fails: {}", words(&error)));
            // Its own failure would hide the first one.
            let call = ctx.call();
            let _ = ctx.answer("abort", begun.backup.abort("it failed", &call)).await;
            return Err(fault);
        }
    };
    let least = tree.len() as u64;
    ensure(moved.entries.saturating_add(moved.ignored_count) >= least, || {
        format!("It stored {} entries of a tree that has {least}.", moved.entries)
    })
    .map_err(|fault| fault.advise("An archive that lacks files must not be a success."))?;
    if let Some(ignored) = moved.ignored.first() {
        return Err(Fault::new(format!(
            "It left out {}: {}",
            crate::fault::clean(&ignored.path),
            crate::fault::clean(&ignored.why)
        )));
    }
    ensure(!ctx.list(provider).await?.contains_key(&begun.archive), || {
        format!("Archive {} is listed before its commit.", begun.archive)
    })?;
    ctx.note_made(&begun.archive);
    let call = ctx.call();
    ctx.expect("commit", begun.backup.commit(Uuid::new_v4(), &call)).await?;
    finish(ctx, begun.job).await?;
    let list = ctx.list(provider).await?;
    let listed = list.get(&begun.archive);
    ensure(listed.is_some_and(|a| a.subtype == GuestKind::Lxc && a.guest_id == id), || {
        format!("Archive {} is not listed as one of container {id}.", begun.archive)
    })?;
    let kept = ctx.expect("guest_config", provider.guest_config(&begun.archive, &call)).await?;
    ensure(kept.config == ct.config, || {
        format!("The configuration in {} is not the one that was backed up.", begun.archive)
    })?;
    ensure(kept.firewall == ct.firewall, || {
        format!(
            "The firewall configuration in {} is not the one that was backed up.",
            begun.archive
        )
    })?;
    Ok(begun.archive)
}

pub(super) async fn restore(
    ctx: &Ctx,
    provider: &dyn Provider,
    archive: &str,
    tree: &Tree,
) -> Checked {
    let call = ctx.call();
    let begun = provider.restore_container_init(archive, &call);
    let mut restore = ctx.expect("restore_container_init", begun).await?;
    let dir = ctx.bench.private_dir()?;
    let room = ctx.bench.private_dir()?;
    let compared = compare(ctx, restore.as_mut(), &dir, &room, tree).await;
    let cleaned = ctx.expect("cleanup", restore.cleanup(&call)).await;
    // What is left in them is not needed any more.
    let _ = std::fs::remove_dir_all(&dir);
    let _ = std::fs::remove_dir_all(&room);
    compared.and(cleaned).map_err(|fault| fault.at(&format!("Restore of {archive}")))
}

async fn compare(
    ctx: &Ctx,
    restore: &mut dyn ContainerRestore,
    dir: &Path,
    room: &Path,
    tree: &Tree,
) -> Checked {
    let call = ctx.call();
    let data = ctx.expect("data", restore.data(dir, &call)).await?;
    // tar sets owners only as root; those of a directory are the provider's.
    let is_root = rustix::process::geteuid().is_root();
    let has_owners = is_root || matches!(data, ContainerData::Directory(_));
    let limit = ctx.bench.options.call_limit;
    let unpacked = tokio::time::timeout(limit, unpack(&data, room)).await;
    let root = match unpacked {
        Ok(root) => root?,
        Err(_) => return Err(Fault::new("The restored files come to no end.")),
    };
    let found = Tree::read(&root)?;
    tree.compare(&found, has_owners)?;
    if let Some(name) = tree.without_holes(&found) {
        ctx.remark(format!(
            "'{name}' has lost its holes: a restore takes more room than the container."
        ));
    }
    Ok(())
}

pub(super) async fn container(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let root = ctx.bench.private_dir()?;
    let made = |e: std::io::Error| Fault::new(format!("The kit cannot make its tree: {e}."));
    make_tree(&root).map_err(made)?;
    let lacking = attributes::decorate(&root).map_err(made)?;
    if !lacking.is_empty() {
        ctx.remark(format!("Not tested, because the kit cannot set them: {}.", lacking.join(", ")));
    }
    let first = Tree::read(&root)?;
    let id = ctx.bench.guest_id();
    let one = back_up(ctx, provider.as_ref(), id, &root, (&first, &[])).await?;
    change_tree(&root).map_err(made)?;
    let second = Tree::read(&root)?;
    let two = back_up(ctx, provider.as_ref(), id, &root, (&second, &[])).await?;
    restore(ctx, provider.as_ref(), &one, &first).await?;
    restore(ctx, ctx.provider().await?.as_ref(), &two, &second).await?;
    Ok(Verdict::Passed)
}

/// The host lists what is read of the tree; the provider must not read anything else.
pub(super) async fn exclude(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let root = ctx.bench.private_dir()?;
    let made = |e: std::io::Error| Fault::new(format!("The kit cannot make its tree: {e}."));
    make_tree(&root).map_err(made)?;
    make_excluded(&root).map_err(made)?;
    let expected = Tree::read(&root)?.without(&LEFT_OUT);
    let id = ctx.bench.guest_id();
    let archive = back_up(ctx, provider.as_ref(), id, &root, (&expected, &EXCLUDED)).await?;
    let advice = "`lists` has what is read of the tree: `selected`, in the form that tar reads; and what is not, \
                  `excluded`, for providers that walk by themselves.";
    let compared = restore(ctx, provider.as_ref(), &archive, &expected).await;
    compared.map_err(|fault| fault.at(&format!("With {EXCLUDED:?} left out")).advise(advice))?;
    Ok(Verdict::Passed)
}

/// A command that is slow keeps a backup under way, and the storage is asked meanwhile.
pub(super) async fn load(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let root = ctx.bench.private_dir()?;
    make_tree(&root).map_err(|e| Fault::new(format!("The kit cannot make its tree: {e}.")))?;
    let ct = Ct::new(ctx.bench.guest_id());
    let mut begun = begin(ctx, provider.as_ref(), &ct).await?;
    let mut shown = plain(&root, &ctx.bench.private_dir()?, &Excludes::default())?;
    shown.pause = SLOW_COMMAND;
    let is_over = AtomicBool::new(false);
    let backup = async {
        let copied = copy_shown(ctx, (begun.backup.as_mut(), &ct), Box::new(shown), WHOLE.0).await;
        is_over.store(true, Ordering::Relaxed);
        copied
    };
    let asking = ask_until(ctx, provider.as_ref(), &is_over);
    let (copied, asked) = join(backup, asking).await;
    let call = ctx.call();
    ctx.expect("abort", begun.backup.abort("the kit gives it up", &call)).await?;
    finish(ctx, begun.job).await?;
    let copied = copied?;
    ctx.expect("backup_container", async { copied }).await?;
    asked.map_err(|fault| fault.at("During the backup of a container"))?;
    Ok(Verdict::Passed)
}

/// All commands that a backup runs fail: it must never become an archive.
pub(super) async fn failing_commands(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let root = ctx.bench.private_dir()?;
    make_tree(&root)
        .and_then(|()| make_bulk(&root))
        .map_err(|e| Fault::new(format!("The kit cannot make its tree: {e}.")))?;
    let ct = Ct::new(ctx.bench.guest_id());
    for (failure, how) in [
        (Failure::ExitCode, "ends with the exit code 2"),
        (Failure::Killed, "is killed in the middle"),
    ] {
        let ending = Ending { failure: Some(failure), ..Ending::default() };
        let commands = Arc::clone(&ending.commands);
        let mut shown = plain(&root, &ctx.bench.private_dir()?, &Excludes::default())?;
        shown.ending = ending;
        let mut begun = begin(ctx, provider.as_ref(), &ct).await?;
        let copied =
            copy_shown(ctx, (begun.backup.as_mut(), &ct), Box::new(shown), WHOLE.0).await?;
        let call = ctx.call();
        ctx.expect("abort", begun.backup.abort("the kit gives it up", &call)).await?;
        finish(ctx, begun.job).await?;
        if commands.load(Ordering::Relaxed) == 0 {
            ctx.remark("It runs no command to read a container, so that none can fail.");
            break;
        }
        ensure(copied.is_err(), || {
            format!("The backup of a container succeeds though the command that reads it {how}.")
        })
        .map_err(|fault| {
            fault.advise("Any exit code but 0 fails the backup, unless you know what it means.")
        })?;
        ensure(!ctx.list(provider.as_ref()).await?.contains_key(&begun.archive), || {
            format!("Archive {} is listed though its backup failed.", begun.archive)
        })?;
    }
    let tree = Tree::read(&root)?;
    let archive = back_up(ctx, provider.as_ref(), ct.id, &root, (&tree, &[])).await?;
    restore(ctx, provider.as_ref(), &archive, &tree).await?;
    Ok(Verdict::Passed)
}

pub(super) async fn abort(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let root = ctx.bench.private_dir()?;
    make_tree(&root).map_err(|e| Fault::new(format!("The kit cannot make its tree: {e}.")))?;
    let tree = Tree::read(&root)?;
    let id = ctx.bench.guest_id();
    let ct = Ct::new(id);
    for is_copied in [false, true] {
        let mut begun = begin(ctx, provider.as_ref(), &ct).await?;
        if is_copied {
            let copied = copy(ctx, (begun.backup.as_mut(), &ct), &root, WHOLE).await?;
            ctx.expect("backup_container", async { copied }).await?;
        }
        let call = ctx.call();
        ctx.expect("abort", begun.backup.abort("the kit gives it up", &call)).await?;
        finish(ctx, begun.job).await?;
        ensure(!ctx.list(provider.as_ref()).await?.contains_key(&begun.archive), || {
            format!("Archive {} is listed after its abort.", begun.archive)
        })?;
    }
    // A tree that cannot be read is no archive.
    let mut begun = begin(ctx, provider.as_ref(), &ct).await?;
    let copied = copy(ctx, (begun.backup.as_mut(), &ct), &root, ("nowhere", &[])).await?;
    let call = ctx.call();
    ctx.expect("abort", begun.backup.abort("the kit gives it up", &call)).await?;
    finish(ctx, begun.job).await?;
    ensure(copied.map_or(true, |moved| moved.entries == 0), || {
        "The backup of a tree that is not there succeeds.".to_owned()
    })?;
    let archive = back_up(ctx, provider.as_ref(), id, &root, (&tree, &[])).await?;
    restore(ctx, provider.as_ref(), &archive, &tree).await?;
    Ok(Verdict::Passed)
}
