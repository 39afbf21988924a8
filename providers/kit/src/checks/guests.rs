// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guests at once, guests with hostile names and files, and a storage that is busy.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::{join, join_all};
use provider_api::{JobInfo, Provider, Uuid};

use super::Verdict;
use super::backup::check_config;
use super::basics::ask_status;
use super::containers::{Ct, back_up_ct, restore};
use crate::bench::Ctx;
use crate::container::Tree;
use crate::fault::{Checked, Fault, ensure};
use crate::machine::Vm;
use crate::snapshot::Trouble;

/// `list` during a backup must answer in this time.
const LIST_LIMIT: Duration = Duration::from_secs(5);
/// Where volumes of containers are, without the slash at the beginning.
const MOUNT_POINTS: [&str; 7] = [
    "mnt/two words",
    "mnt/two\nlines",
    "mnt/$(reboot)`reboot`;'\"",
    "mnt/*?[a]{b,c}\\",
    "-rf/--help",
    "\u{202e}\u{1f512} \u{e4}",
    "mnt/a very deep place/of/a/volume/in/which/nothing/else/is",
];
/// Guests of one job at once.
const GUESTS: usize = 3;

/// Three guests of one job at the same time.
pub(super) async fn concurrent(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let size = ctx.bench.options.size_bytes / 2;
    let mut vms = Vec::new();
    for _ in 0..GUESTS {
        vms.push(ctx.vm(&[size, 512 * 9]).await?);
    }
    for round in 0..2 {
        let start_time_s = ctx.bench.time_s();
        let call = ctx.call();
        let job = provider.start_job(JobInfo { start_time_s }, &call);
        let mut job = ctx.expect("start_job", job).await?;
        let mut begun = Vec::new();
        for vm in &vms {
            begun.push(ctx.start_guest(job.as_mut(), vm, start_time_s).await?);
        }
        let guests =
            begun.into_iter().zip(&mut vms).map(|((mut backup, archive), vm)| async move {
                let requests = ctx.plan(backup.as_mut(), vm).await?;
                if round == 1 {
                    // Another process begins a task; what is under way here is not dead.
                    ctx.provider().await?;
                }
                let copied = ctx.copy(backup.as_mut(), vm, &requests).await?;
                ctx.expect("backup_vm", async { copied.result }).await?;
                ctx.note_made(&archive);
                let call = ctx.call();
                let commit = backup.commit(Uuid::new_v4(), &call);
                let committed = ctx.answer("commit", commit).await?;
                vm.machine.as_dyn().thaw(committed.is_ok()).await.map_err(Fault::new)?;
                let committed = ctx.expect("commit", async { committed }).await?;
                vm.scribble(2).await?;
                Ok((committed.archive, copied.truth))
            });
        let done: Vec<Checked<_>> = join_all(guests).await;
        let call = ctx.call();
        ctx.expect("finish", job.finish(&call)).await?;
        for result in done {
            let at = |fault: Fault| fault.at(&format!("Round {round} of {GUESTS} guests at once"));
            let (archive, truth) = result.map_err(at)?;
            ctx.restore(provider.as_ref(), &archive, &truth).await.map_err(at)?;
        }
    }
    Ok(Verdict::Passed)
}

/// Names as guests have them, and as nobody should.
fn hostile_names() -> [Option<String>; 10] {
    [
        None,
        Some(String::new()),
        Some("../../../../etc/passwd".to_owned()),
        Some("/".to_owned()),
        Some("a\nb\r\n\tc".to_owned()),
        Some("\u{1b}[2J\u{7}\u{0}".to_owned()),
        Some("$(reboot) `reboot`; reboot | reboot && 'reboot\" --help".to_owned()),
        Some("\u{202e}\u{1f512} \u{e4}\u{f6}\u{fc} \u{0301}".to_owned()),
        Some("-rf".to_owned()),
        Some("x".repeat(4096)),
    ]
}

/// Files of any bytes: configurations, and those of the firewall.
fn hostile_configs() -> [(Vec<u8>, Option<Vec<u8>>); 5] {
    let all_bytes: Vec<u8> = (0..=255).collect();
    [
        (Vec::new(), None),
        (Vec::new(), Some(Vec::new())),
        (all_bytes.clone(), Some(all_bytes)),
        (b"name: x\r\nargs: $(reboot)\n\xff\xfe without an end".to_vec(), None),
        (vec![b'#'; 512 << 10], Some(vec![b'\n'; 64 << 10])),
    ]
}

pub(super) async fn names(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    for name in hostile_names() {
        let mut vm = ctx.vm(&[64 << 10]).await?;
        vm.name = name.clone();
        let at = |fault: Fault| fault.at(&format!("A guest named {:?}", shortened(&name)));
        let made = ctx.back_up(provider.as_ref(), &mut vm).await.map_err(at)?;
        ctx.check_restore(provider.as_ref(), &made).await.map_err(at)?;
    }
    Ok(Verdict::Passed)
}

fn shortened(name: &Option<String>) -> String {
    name.as_deref().unwrap_or("(nothing)").chars().take(24).collect()
}

pub(super) async fn configs(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    for (n, (config, firewall)) in hostile_configs().into_iter().enumerate() {
        let mut vm: Vm = ctx.vm(&[64 << 10]).await?;
        (vm.config, vm.firewall) = (config, firewall);
        let place = format!("Configuration {n}, of {} bytes", vm.config.len());
        let at = |fault: Fault| fault.at(&place);
        let made = ctx.back_up(provider.as_ref(), &mut vm).await;
        let made = made.map_err(&at)?;
        check_config(ctx, provider.as_ref(), &vm, &made).await.map_err(at)?;
    }
    Ok(Verdict::Passed)
}

/// The tree of a container that is as small as can be.
fn small_tree(ctx: &Ctx) -> Checked<PathBuf> {
    let root = ctx.bench.private_dir()?;
    let made = std::fs::write(root.join("file"), "kit");
    made.map_err(|e| Fault::new(format!("The kit cannot make its tree: {e}.")))?;
    Ok(root)
}

/// Containers called so, and ones whose volumes are at places that a shell, a list of lines or a pattern does
/// not take for what they are.
pub(super) async fn container_names(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let root = small_tree(ctx)?;
    let tree = Tree::read(&root)?;
    // Two of them: a provider has one way to deal with names.
    for name in hostile_names().into_iter().skip(2).step_by(4) {
        let at = |fault: Fault| fault.at(&format!("A container named {:?}", shortened(&name)));
        let ct = Ct { name: name.clone(), ..Ct::new(ctx.bench.guest_id()) };
        let made = back_up_ct(ctx, provider.as_ref(), &ct, &root, (&tree, &[])).await;
        restore(ctx, provider.as_ref(), &made.map_err(at)?, &tree).await.map_err(at)?;
    }
    let mut ct = Ct::new(ctx.bench.guest_id());
    for name in MOUNT_POINTS {
        let failed = |e| Fault::new(format!("The kit cannot make its tree: {e}."));
        std::fs::create_dir_all(root.join(name)).map_err(failed)?;
        std::fs::write(root.join(name).join("in the volume"), name).map_err(failed)?;
        ct.mount_points.push(Path::new("/").join(name));
    }
    let tree = Tree::read(&root)?;
    let at = |fault: Fault| fault.at(&format!("A container with volumes at {MOUNT_POINTS:?}"));
    let made = back_up_ct(ctx, provider.as_ref(), &ct, &root, (&tree, &[])).await;
    restore(ctx, provider.as_ref(), &made.map_err(at)?, &tree).await.map_err(at)?;
    Ok(Verdict::Passed)
}

/// The same files as of VMs, which are no less a container's.
pub(super) async fn container_configs(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let root = small_tree(ctx)?;
    let tree = Tree::read(&root)?;
    // Nothing at all, which is not the same as no file; all bytes; large ones.
    let all = hostile_configs().into_iter().enumerate();
    for (n, (config, firewall)) in all.filter(|(_, (_, firewall))| firewall.is_some()) {
        let place = format!("Configuration {n} of a container, of {} bytes", config.len());
        let ct = Ct { config, firewall, ..Ct::new(ctx.bench.guest_id()) };
        // Compares what is kept of them.
        let made = back_up_ct(ctx, provider.as_ref(), &ct, &root, (&tree, &[])).await;
        made.map_err(|fault| fault.at(&place))?;
    }
    Ok(Verdict::Passed)
}

/// Asks for status and list until a backup is over; says how often.
pub(super) async fn ask_until(
    ctx: &Ctx,
    provider: &dyn Provider,
    is_over: &AtomicBool,
) -> Checked<u32> {
    let mut asked = 0;
    while !is_over.load(Ordering::Relaxed) {
        ask_status(ctx, provider).await?;
        let begin = Instant::now();
        ctx.list(provider).await?;
        ensure(begin.elapsed() < LIST_LIMIT, || {
            format!("list takes {} ms during a backup.", begin.elapsed().as_millis())
        })?;
        asked += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(asked)
}

/// A slow disk keeps a backup under way, and the storage is asked meanwhile.
pub(super) async fn load(ctx: &Ctx) -> Checked<Verdict> {
    let provider = ctx.provider().await?;
    let mut vm = ctx.usual_vm().await?;
    let delay = Some(Duration::from_millis(100));
    vm.sim()?.set_trouble(Trouble { delay, ..Trouble::default() });
    let is_over = AtomicBool::new(false);
    let backup = async {
        let made = ctx.back_up(provider.as_ref(), &mut vm).await;
        is_over.store(true, Ordering::Relaxed);
        made
    };
    let asking = ask_until(ctx, provider.as_ref(), &is_over);
    let (made, asked) = join(backup, asking).await;
    made?;
    let asked = asked.map_err(|fault| fault.at("During a backup"))?;
    if asked < 3 {
        ctx.remark("The backup was too fast to ask much during it.");
    }
    Ok(Verdict::Passed)
}
