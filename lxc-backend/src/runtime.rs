// SPDX-License-Identifier: MIT OR Apache-2.0
//! Starting and stopping containers.
//!
//! A container's volumes are mounted in a mount namespace of their own, in which LXC's monitor is started. When
//! the container ends the monitor does, and with it the namespace, its mounts and their loop devices: there is
//! nothing to clean up, whatever ends first.

use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use provider_api::{GuestKind, IdMapRange};
use vzdump_core::config::container::{CtConfig, MountEntry, ROOTFS};
use vzdump_core::journal::by_hand;
use vzdump_core::layout::{self, Layout};
use vzdump_core::lock::FileLock;
use vzdump_core::storage::{ImageFormat, StorageSet, VolumeId};

use crate::attach::{attach, detached, nearest_above, open_below, open_or_make_below, open_place};
use crate::config::{Cgroups, LxcConfig, bridges, translate};
use crate::holder::Holder;
use crate::lxc::Lxc;
pub use crate::lxc::State;
use crate::system::MountAttributes;
use crate::view::{Origin, mount_image};
use crate::{CtError, tool};

/// A directory of the LXC package. In the container's namespace it is covered, because an unprivileged
/// container must be able to reach its files through all of the directories above them.
pub(crate) const COVERED: &str = "/var/lib/lxc";
/// Where the kernel lists the networks of the host.
const HOST_NETWORKS: &str = "/sys/class/net";
/// For LXC's monitor to say that the container runs.
const START_LIMIT: Duration = Duration::from_secs(120);
/// How long an operation of another task on the same container is waited for.
const LOCK_WAIT: Duration = Duration::from_secs(60);
/// For a container that says it has stopped to be gone.
const GONE_LIMIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);

/// How a start went.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Started {
    /// The container's first process.
    pub pid: Option<i32>,
    /// What is odd.
    pub notices: Vec<String>,
}

/// How a container was stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopped {
    /// It did not run.
    DidNotRun,
    /// It shut down.
    ShutDown,
    /// It was ended by force.
    Killed,
}

/// What a container is doing.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct CtStatus {
    /// Its number.
    pub id: u32,
    /// Its host name.
    pub name: Option<String>,
    /// Its state.
    pub state: State,
    /// Its first process.
    pub pid: Option<i32>,
    /// Whether its root is none on the host.
    pub unprivileged: bool,
}

/// The containers that have a configuration.
///
/// # Errors
/// The directory cannot be read.
pub fn list_ids(layout: &Layout) -> Result<Vec<u32>, CtError> {
    let dir = layout.ct_config_dir();
    let entries = match fs::read_dir(&dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(CtError::at(format!("look into '{}'", dir.display())))?,
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut ids: Vec<u32> =
        names.filter_map(|name| name.strip_suffix(".conf")?.parse().ok()).collect();
    ids.retain(|id| layout::check_guest_id(*id).is_ok());
    ids.sort_unstable();
    Ok(ids)
}

/// The configuration of a container.
///
/// # Errors
/// [`CtError::NoConfig`], [`CtError::Config`].
pub fn read_config(layout: &Layout, id: u32) -> Result<CtConfig, CtError> {
    layout::check_guest_id(id)?;
    let path = layout.ct_config_path(id);
    CtConfig::read(&path)?.ok_or(CtError::NoConfig { id, path })
}

/// Refuses a container of which its configuration says that something else is being done with it.
pub(crate) fn refuse_locked(config: &CtConfig, id: u32) -> Result<(), CtError> {
    let Some(lock) = config.lines().get("lock") else { return Ok(()) };
    Err(CtError::Invalid(format!(
        "The container {id} is locked ({lock}); remove the key 'lock' if that is left over."
    )))
}

/// Tells what a container is doing. May block.
///
/// # Errors
/// [`CtError`].
pub fn status(layout: &Layout, id: u32) -> Result<CtStatus, CtError> {
    let config = read_config(layout, id)?;
    let lxc = Lxc::new(&layout.lxc_path(), id);
    let mut state = lxc.state()?;
    let pid = if state == State::Stopped { None } else { lxc.init_pid()? };
    if state == State::Running && pid.is_some_and(|pid| lxc.is_frozen(pid)) {
        state = State::Frozen;
    }
    Ok(CtStatus {
        id,
        name: config.hostname().map(str::to_owned),
        state,
        pid,
        unprivileged: config.is_unprivileged(),
    })
}

/// Starts a container. May block.
///
/// # Errors
/// [`CtError`]; nothing is left running or mounted then.
pub async fn start(layout: &Layout, storages: &StorageSet, id: u32) -> Result<Started, CtError> {
    let path = layout.ct_power_lock_path(id);
    let lock = FileLock::acquire(&path, &format!("CT {id}"), LOCK_WAIT).await?;
    let (ours, storages) = (layout.clone(), storages.clone());
    let started = beside(move || {
        let config = read_config(&ours, id)?;
        refuse_locked(&config, id)?;
        let started = start_now(&ours, &storages, id);
        drop(lock);
        started
    })
    .await?;
    by_hand::settled(layout, GuestKind::Lxc, id).await;
    Ok(started)
}

/// Stops a container: asks it to shut down, and ends it when the time is over; at once without any. May block.
///
/// # Errors
/// [`CtError`].
pub async fn stop(layout: &Layout, id: u32, wait: Duration) -> Result<Stopped, CtError> {
    read_config(layout, id)?;
    let path = layout.ct_power_lock_path(id);
    let lock = FileLock::acquire(&path, &format!("CT {id}"), LOCK_WAIT).await?;
    let ours = layout.clone();
    let stopped = beside(move || {
        let stopped = stop_now(&ours, id, wait);
        drop(lock);
        stopped
    })
    .await?;
    by_hand::settled(layout, GuestKind::Lxc, id).await;
    Ok(stopped)
}

/// Does something that may block beside the tasks.
pub(crate) async fn beside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CtError> + Send + 'static,
) -> Result<T, CtError> {
    let ended = vzdump_core::blocking::run(move || Ok(work())).await;
    ended.unwrap_or_else(|error| Err(CtError::at("wait for a thread")(error)))
}

/// A thread that goes on also when nobody waits for it any more.
#[derive(Debug, Default)]
pub(crate) struct Busy(Arc<tokio::sync::Mutex<()>>);

impl Busy {
    /// As [`beside`]; one after the other.
    pub(crate) async fn beside<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, CtError> + Send + 'static,
    ) -> Result<T, CtError> {
        let held = Arc::clone(&self.0).lock_owned().await;
        beside(move || {
            let result = work();
            drop(held);
            result
        })
        .await
    }

    #[cfg(test)]
    pub(crate) fn has_ended(&self) -> bool {
        self.0.try_lock().is_ok()
    }

    /// Waits until it has ended, if there is one.
    pub(crate) async fn settle(&self) {
        drop(self.0.lock().await);
    }
}

fn stop_now(layout: &Layout, id: u32, wait: Duration) -> Result<Stopped, CtError> {
    let lxc = Lxc::new(&layout.lxc_path(), id);
    if lxc.state()? == State::Stopped {
        return Ok(Stopped::DidNotRun);
    }
    // What cannot be asked is killed, too.
    if !wait.is_zero() && shut_down_now(&lxc, wait).unwrap_or(false) {
        return Ok(Stopped::ShutDown);
    }
    if let Err(error) = lxc.kill() {
        // It may have shut down a moment ago.
        return if lxc.state()? == State::Stopped { Ok(Stopped::ShutDown) } else { Err(error) };
    }
    wait_until_gone(&lxc)?;
    Ok(Stopped::Killed)
}

/// Asks a container to shut down, and does not kill it; tells whether it is down. If not it may still shut down.
pub(crate) fn shut_down_now(lxc: &Lxc, wait: Duration) -> Result<bool, CtError> {
    let is_down = lxc.shut_down(wait)?;
    if is_down {
        wait_until_gone(lxc)?;
    }
    Ok(is_down)
}

fn wait_until_gone(lxc: &Lxc) -> Result<(), CtError> {
    let deadline = Instant::now() + GONE_LIMIT;
    while lxc.state()? != State::Stopped {
        if Instant::now() >= deadline {
            return Err(CtError::Invalid(format!("The container {} does not stop.", lxc.name)));
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// What a start needs.
struct Needs {
    ids: Vec<IdMapRange>,
    rootfs: PathBuf,
    translated: LxcConfig,
    volumes: Vec<Found>,
}

/// Looks whether a container can be started as it is configured now, as far as that can be told without doing it. May
/// block.
pub(crate) fn check_startable(
    layout: &Layout,
    storages: &StorageSet,
    id: u32,
) -> Result<(), CtError> {
    let config = read_config(layout, id)?;
    refuse_locked(&config, id)?;
    needs_of(&config, storages, id).map(drop)
}

fn needs_of(config: &CtConfig, storages: &StorageSet, id: u32) -> Result<Needs, CtError> {
    let ids = config.id_map()?;
    check_subordinate_ids(&ids)?;
    let rootfs = Path::new(COVERED).join(id.to_string()).join("rootfs");
    let translated = translate(config, &rootfs, Cgroups::of_host())?;
    if !translated.unknown.is_empty() {
        return Err(CtError::Invalid(format!(
            "The configuration of the container {id} has keys that are not known: {}.",
            translated.unknown.join(", ")
        )));
    }
    let missing = |(_, bridge): &(String, String)| !Path::new(HOST_NETWORKS).join(bridge).exists();
    if let Some((key, bridge)) = bridges(config).into_iter().find(missing) {
        return Err(CtError::Invalid(format!(
            "The bridge '{bridge}' of the container {id} ({key}) does not exist on this host."
        )));
    }
    let volumes = find_volumes(config, storages)?;
    Ok(Needs { ids, rootfs, translated, volumes })
}

pub(crate) fn start_now(
    layout: &Layout,
    storages: &StorageSet,
    id: u32,
) -> Result<Started, CtError> {
    let config = read_config(layout, id)?;
    let lxc = Lxc::new(&layout.lxc_path(), id);
    if lxc.state()? != State::Stopped {
        return Err(CtError::Running { id });
    }
    let Needs { ids, rootfs, translated, volumes } = needs_of(&config, storages, id)?;
    let config_path = lxc.config_path();
    write_lxc_config(&lxc, &translated.text)
        .map_err(CtError::at(format!("write LXC's configuration '{}'", config_path.display())))?;
    let holder = Holder::start("ct-start").map_err(CtError::at("make a mount namespace"))?;
    let in_namespace = lxc.clone();
    let mut notices = holder
        .run(move || -> Result<Vec<String>, CtError> {
            let notices = mount_all(&rootfs, &volumes, root_of(&ids))?;
            run_lxc_start(&in_namespace)?;
            Ok(notices)
        })
        .map_err(CtError::at("start a container"))??;
    let pid = lxc.init_pid()?;
    let ignored = translated
        .ignored
        .iter()
        .filter(|key| matches!(key.as_str(), "cores" | "cpulimit" | "features" | "hookscript"));
    notices.extend(ignored.map(|key| format!("'{key}' of the configuration has no effect")));
    Ok(Started { pid, notices })
}

/// An unprivileged container's root passes through the directories, but sees nothing of them.
fn write_lxc_config(lxc: &Lxc, text: &str) -> io::Result<()> {
    let path = lxc.config_path();
    for dir in [Some(lxc.path.as_path()), path.parent()].into_iter().flatten() {
        fs::create_dir_all(dir)?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o711))?;
    }
    fs::write(&path, text)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))
}

/// The owner on disk of what belongs to the container's root.
pub(crate) fn root_of(ids: &[IdMapRange]) -> (u32, u32) {
    let of = |is_group| {
        let found = ids.iter().find(|range| range.is_group == is_group && range.container_id == 0);
        found.map_or(0, |range| range.host_id)
    };
    (of(false), of(true))
}

/// A volume and where it comes from.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) entry: MountEntry,
    pub(crate) path: PathBuf,
    pub(crate) format: Option<ImageFormat>,
}

/// Where the volumes and directories of a configuration are.
pub(crate) fn find_volumes(
    config: &CtConfig,
    storages: &StorageSet,
) -> Result<Vec<Found>, CtError> {
    let find = |entry: MountEntry| {
        let path = storages.resolve(&entry.volume)?;
        let format = if entry.is_bind() {
            None
        } else {
            let format = entry.volume.parse::<VolumeId>()?.format();
            if !matches!(format, ImageFormat::Raw | ImageFormat::Subvol) {
                return Err(CtError::Invalid(format!(
                    "The volume '{}' ({}) has the format {format}; containers have raw images and \
                     subvolumes.",
                    entry.volume, entry.key
                )));
            }
            Some(format)
        };
        if !path.exists() {
            return Err(CtError::Invalid(format!(
                "'{}' ({}) does not exist: '{}'.",
                entry.volume,
                entry.key,
                path.display()
            )));
        }
        Ok(Found { entry, path, format })
    };
    config.mounts()?.into_iter().map(find).collect()
}

/// Mounts everything for LXC, in the namespace of this thread. Tells what a backup would refuse.
fn mount_all(rootfs: &Path, volumes: &[Found], owner: (u32, u32)) -> Result<Vec<String>, CtError> {
    let fault = |error: io::Error| CtError::at("prepare the mounts of the container")(error);
    let mode = Some("mode=0755,size=1m");
    mount(Some("tmpfs"), COVERED, Some("tmpfs"), MsFlags::empty(), mode)
        .map_err(|errno| fault(errno.into()))?;
    let staging = Path::new(COVERED).join("volumes");
    fs::create_dir_all(rootfs).map_err(fault)?;
    let mut mounted: Vec<(&Found, PathBuf)> = Vec::new();
    let mut notices = Vec::new();
    for found in volumes {
        let key = &found.entry.key;
        let at = |error: io::Error| {
            CtError::at(format!("mount '{}' ({key})", found.entry.volume))(error)
        };
        let is_read_only = found.entry.is_read_only();
        let source = match found.format {
            Some(ImageFormat::Raw) => {
                let stage = staging.join(key);
                fs::create_dir_all(&stage).map_err(at)?;
                mount_image(&found.path, &stage, is_read_only, Origin::Volume)?;
                stage
            }
            _ => found.path.clone(),
        };
        let attributes = MountAttributes { read_only: is_read_only, inert: false };
        let tree = detached(&source, attributes, None).map_err(at)?;
        let root = fs::File::open(rootfs).map_err(fault)?;
        let target = if key == ROOTFS {
            open_below(root.as_fd(), Path::new("/"))
        } else {
            open_or_make_below(root.as_fd(), &found.entry.mount_point, owner)
        };
        attach(&tree, target.map_err(at)?.as_fd()).map_err(at)?;
        if let Err(error) = make_ready_for_backup(&mounted, found, owner) {
            let place = found.entry.mount_point.display();
            notices.push(format!("a backup will refuse '{key}' at '{place}': {error}"));
        }
        mounted.push((found, source));
    }
    Ok(notices)
}

/// A backup has only some of the volumes, and cannot make anything in them: if a volume is mounted in one that is
/// left out, its mount point is made in the nearest one around it that is not.
fn make_ready_for_backup(
    mounted: &[(&Found, PathBuf)],
    volume: &Found,
    owner: (u32, u32),
) -> io::Result<()> {
    if !volume.entry.backup() {
        return Ok(());
    }
    let place = volume.entry.mount_point.as_path();
    let kept = mounted.iter().filter(|(one, _)| one.entry.backup());
    let above = nearest_above(kept, |(one, _)| one.entry.mount_point.as_path(), place);
    let Some((above, source)) = above else { return Ok(()) };
    let root = fs::File::open(source)?;
    let top = above.entry.mount_point.as_path();
    let nearest = nearest_above(mounted, |(one, _)| one.entry.mount_point.as_path(), place);
    if nearest.is_some_and(|(one, _)| !one.entry.backup()) {
        let below = place.strip_prefix(top).unwrap_or(place);
        open_or_make_below(root.as_fd(), below, owner)?;
    }
    open_place(root.as_fd(), (above.entry.key.as_str(), top), place).map(drop)
}

/// Starts LXC's monitor in the namespace of this thread.
fn run_lxc_start(lxc: &Lxc) -> Result<(), CtError> {
    let log = lxc.log_path();
    // Only of this start.
    let _ = fs::remove_file(&log);
    let log_text = log.display().to_string();
    let command = lxc.command("lxc-start", &["-d", "-l", "WARN", "-o", &log_text]);
    tool::run(&command, START_LIMIT).map(drop).map_err(|why| {
        let text = fs::read_to_string(&log).unwrap_or_default();
        let errors: Vec<&str> =
            text.lines().filter(|line| line.contains(" ERROR ")).map(last_part).collect();
        let said = errors.first().map_or(why.clone(), |first| format!("{why}; {first}"));
        CtError::at(format!("start the container {} ('{log_text}')", lxc.name))(said)
    })
}

/// Of `lxc-start 200 20260102… ERROR  conf - ../src/lxc/conf.c:f:1 - what happened` the last part.
fn last_part(line: &str) -> &str {
    line.splitn(3, " - ").last().unwrap_or(line)
}

/// With Debian's package uidmap LXC asks programs of it to map ids, and these ask a file.
fn check_subordinate_ids(ids: &[IdMapRange]) -> Result<(), CtError> {
    if ids.is_empty() || !Path::new("/usr/bin/newuidmap").exists() {
        return Ok(());
    }
    for (file, is_group) in [("/etc/subuid", false), ("/etc/subgid", true)] {
        let text = fs::read_to_string(file).unwrap_or_default();
        for range in ids.iter().filter(|range| range.is_group == is_group) {
            if !text.lines().any(|line| covers(line, range)) {
                return Err(CtError::Invalid(format!(
                    "The ids {} to {} of the container are not given to root in '{file}': add the line \
                     'root:{}:{}'.",
                    range.host_id,
                    range.host_id + (range.count - 1),
                    range.host_id,
                    range.count
                )));
            }
        }
    }
    Ok(())
}

fn covers(line: &str, range: &IdMapRange) -> bool {
    let mut parts = line.trim().split(':');
    let is_root = matches!(parts.next(), Some("root" | "0"));
    let mut number = || parts.next()?.parse::<u64>().ok();
    let (Some(first), Some(count)) = (number(), number()) else { return false };
    let begin = u64::from(range.host_id);
    is_root && first <= begin && begin + u64::from(range.count) <= first.saturating_add(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subordinate_ids_must_cover_the_whole_range() {
        let range =
            IdMapRange { is_group: false, container_id: 0, host_id: 100_000, count: 65_536 };
        for (line, covered) in [
            ("root:100000:65536", true),
            ("root:1:4000000", true),
            ("0:100000:65536", true),
            ("root:100000:65535", false),
            ("root:100001:65536", false),
            ("web:100000:65536", false),
            ("root:100000", false),
            ("", false),
        ] {
            assert_eq!(covers(line, &range), covered, "{line}");
        }
    }

    #[test]
    fn lxc_s_lines_are_cut_to_what_they_say() {
        let line = "lxc-start 200 20260102 ERROR    conf - ../src/lxc/conf.c:f:1 - No such - thing";
        assert_eq!(last_part(line), "No such - thing");
        assert_eq!(last_part("odd"), "odd");
    }
}
