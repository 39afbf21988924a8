// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a command that reads a container's tree finds itself in, and what unpacks an archive.
//!
//! This program is started again for each of them, as the first process of a process namespace, within the mount
//! namespace of the tree. It makes a small root: the programs of the host, a few devices, the tree at
//! [`TREE`]; moves into it, gives up its rights, and becomes the command, or unpacks. What the command
//! starts ends with it, and it ends with the thread that started it.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, ExitCode};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use provider_api::Identity;
use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::process::{Signal, set_parent_process_death_signal};
use rustix::thread::{
    CapabilitySet, CapabilitySets, configure_capability_in_ambient_set,
    remove_capability_from_bounding_set, set_capabilities, set_keep_capabilities, set_no_new_privs,
};
use serde::{Deserialize, Serialize};

use crate::attach::attach;
use crate::system::{MountAttributes, set_mount_attributes};
use crate::unpack::{UnpackSpec, Unpacked, unpack};

/// The hidden subcommand that runs [`run_sandbox`].
pub const SUBCOMMAND: &str = "__ct-sandbox";
/// Where the tree is.
pub const TREE: &str = "/guest";
/// Where the lists of what is read of it are.
pub const LISTS: &str = "/lists";
/// The exit code of a command that was not begun.
pub(crate) const NOT_BEGUN: i32 = 125;
/// Begins what is said of that.
pub(crate) const NOT_BEGUN_PREFIX: &str = "vzdump sandbox: ";
/// A user without rights: nobody of Debian.
const NOBODY: u32 = 65534;
/// What making files needs, and nothing else.
const OWNER_CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);
const SEARCH_PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// What in the root of the host belongs to its programs.
const PROGRAMS: [&str; 7] = ["usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32"];
const DEVICES: [&str; 5] = ["null", "zero", "full", "random", "urandom"];
/// Nothing secret, and programs do not work without it.
const SETTINGS: [&str; 4] = ["alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d"];
/// What a program with a network needs beside.
const NETWORK_SETTINGS: [&str; 8] = [
    "ca-certificates",
    "hosts",
    "host.conf",
    "localtime",
    "nsswitch.conf",
    "resolv.conf",
    "services",
    "ssl/certs",
];

/// What the host asks for.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Spec {
    /// An empty directory in which the root is made; only this process sees what is in it.
    pub(crate) root: PathBuf,
    /// The tree, in the mount namespace this begins in.
    pub(crate) tree: PathBuf,
    /// The lists of what is read of it, if not all of it is.
    pub(crate) lists: Option<PathBuf>,
    /// As whom it is done.
    pub(crate) role: Role,
    /// The descriptor of the user namespace of a mapped root, by its path in `/proc`.
    pub(crate) user_namespace: PathBuf,
    /// Paths of the host that are seen, too.
    pub(crate) paths: Vec<PathBuf>,
    /// What is done.
    pub(crate) work: Work,
}

/// As whom something is done in a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Role {
    /// The container's root, in a user namespace.
    MappedRoot,
    /// Nobody, who may read everything.
    Reader,
    /// Root of the host with the rights over files alone, for the volumes of a privileged container.
    Owner,
    /// Root of the host with the right to read everything alone: some file systems show nothing to others.
    SourceReader,
}

impl From<Identity> for Role {
    fn from(identity: Identity) -> Self {
        match identity {
            Identity::MappedRoot => Self::MappedRoot,
            Identity::Reader => Self::Reader,
        }
    }
}

/// What is done in a sandbox.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Work {
    /// A command runs.
    Command {
        /// Program and arguments.
        argv: Vec<OsString>,
        /// Its environment.
        env: Vec<(OsString, OsString)>,
    },
    /// The archive at the standard input is unpacked.
    Unpack(UnpackSpec),
}

/// Does what the file says which is named by the only argument: mostly, it becomes a command. To be called
/// before the process has a second thread.
#[must_use]
pub fn run_sandbox(args: &[OsString]) -> ExitCode {
    let error = match enter(args) {
        Ok(Work::Unpack(spec)) => return run_unpack(&spec),
        Ok(Work::Command { argv, env }) => become_command(&argv, env),
        Err(error) => error,
    };
    // Read by the runner, which tells it; nobody else is there.
    let _ =
        io::Write::write_all(&mut io::stderr(), format!("{NOT_BEGUN_PREFIX}{error}\n").as_bytes());
    ExitCode::from(u8::try_from(NOT_BEGUN).unwrap_or(u8::MAX))
}

/// Makes the root, moves into it and gives up all rights that are not needed.
fn enter(args: &[OsString]) -> Result<Work, String> {
    let [path] = args else { return Err("a file is to be named".to_owned()) };
    let words = |what: &str| {
        let what = what.to_owned();
        move |error: io::Error| format!("{what}: {error}")
    };
    let text = fs::read(path).map_err(words("its file"))?;
    let spec: Spec = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    let namespace: OwnedFd = File::open(&spec.user_namespace).map_err(words("ids"))?.into();
    make_root(&spec).map_err(words("its root"))?;
    enter_root(&spec.root).map_err(words("its root"))?;
    match spec.role {
        Role::MappedRoot => become_mapped_root(&namespace),
        Role::Reader => become_reader(),
        Role::Owner => keep_capabilities(OWNER_CAPABILITIES, None),
        Role::SourceReader => keep_capabilities(CapabilitySet::DAC_READ_SEARCH, None),
    }
    .map_err(words("its rights"))?;
    drop(namespace);
    // Giving up rights has reset it.
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(|errno| errno.to_string())?;
    Ok(spec.work)
}

/// Why it could not.
fn become_command(argv: &[OsString], env: Vec<(OsString, OsString)>) -> String {
    let Some((program, arguments)) = argv.split_first() else {
        return "no program is named".to_owned();
    };
    let error = Command::new(program)
        .args(arguments)
        .env_clear()
        .envs([("PATH", SEARCH_PATH), ("LANG", "C.UTF-8"), ("HOME", "/")])
        .envs(env)
        .exec();
    format!("'{}': {error}", program.display())
}

/// Unpacks, with a line of JSON on the standard output from time to time and at the end.
fn run_unpack(spec: &UnpackSpec) -> ExitCode {
    let report = |done: &Unpacked| {
        let mut line = serde_json::to_vec(done).unwrap_or_default();
        line.push(b'\n');
        // Who does not listen ends this process by other means.
        let _ = io::Write::write_all(&mut io::stdout(), &line);
    };
    match unpack(io::stdin(), Path::new(TREE), spec, report) {
        Ok(done) => {
            report(&done);
            ExitCode::SUCCESS
        }
        Err(why) => {
            let _ = io::Write::write_all(&mut io::stderr(), format!("{why}\n").as_bytes());
            ExitCode::FAILURE
        }
    }
}

fn make_root(spec: &Spec) -> io::Result<()> {
    let root = spec.root.as_path();
    mount(Some("tmpfs"), root, Some("tmpfs"), MsFlags::MS_NOSUID, Some("mode=0755,size=4m"))?;
    for name in PROGRAMS {
        let path = Path::new("/").join(name);
        match fs::symlink_metadata(&path) {
            Err(_) => {}
            Ok(meta) if meta.is_symlink() => symlink(fs::read_link(&path)?, root.join(name))?,
            Ok(_) => show(&path, root, true)?,
        }
    }
    for name in ["dev", "etc", "proc", "tmp", "run", "var", &TREE[1..], &LISTS[1..]] {
        fs::create_dir(root.join(name))?;
    }
    for name in DEVICES {
        let target = root.join("dev").join(name);
        File::create(&target)?;
        let source = Path::new("/dev").join(name);
        mount(Some(&source), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    }
    symlink("/proc/self/fd", root.join("dev/fd"))?;
    for (name, text) in [
        ("passwd", "root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"),
        ("group", "root:x:0:\nnogroup:x:65534:\n"),
    ] {
        fs::write(root.join("etc").join(name), text)?;
    }
    let is_reader = spec.role == Role::Reader;
    let more: &[&str] = if is_reader { &NETWORK_SETTINGS } else { &[] };
    for name in SETTINGS.iter().chain(more) {
        let path = Path::new("/etc").join(name);
        if path.exists() {
            show(&path, root, true)?;
        }
    }
    let inert = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let proc = root.join("proc");
    mount(Some("proc"), &proc, Some("proc"), inert, None::<&str>)?;
    // Root of the host may change the kernel's settings there, without any other right.
    make_read_only(&proc)?;
    let tmp = root.join("tmp");
    mount(Some("tmpfs"), &tmp, Some("tmpfs"), inert, Some("mode=1777,size=256m"))?;
    let tree = open_tree(CWD, &spec.tree, recursive())?;
    attach(&tree, File::open(root.join(&TREE[1..]))?.as_fd())?;
    if let Some(lists) = &spec.lists {
        let lists = open_tree(CWD, lists, recursive())?;
        let attributes = MountAttributes { read_only: true, inert: true };
        set_mount_attributes(lists.as_fd(), attributes, None)?;
        attach(&lists, File::open(root.join(&LISTS[1..]))?.as_fd())?;
    }
    if is_reader {
        for path in &spec.paths {
            check_declared(path)?;
            show(path, root, false)?;
        }
    }
    Ok(())
}

fn recursive() -> OpenTreeFlags {
    OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE
}

/// Shows a file or directory of the host at its own path.
fn show(path: &Path, root: &Path, read_only: bool) -> io::Result<()> {
    // A link's own target may not be there, so what it leads to is shown in its place.
    let meta = fs::metadata(path)?;
    let target = root.join(path.strip_prefix("/").unwrap_or(path));
    if meta.is_dir() {
        fs::create_dir_all(&target)?;
    } else {
        fs::create_dir_all(target.parent().unwrap_or(root))?;
        File::create(&target)?;
    }
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(path), &target, None::<&str>, flags, None::<&str>)?;
    if read_only { make_read_only(&target) } else { Ok(()) }
}

fn make_read_only(mounted: &Path) -> io::Result<()> {
    let opened = open_tree(CWD, mounted, OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    let attributes = MountAttributes { read_only: true, inert: false };
    set_mount_attributes(opened.as_fd(), attributes, None)
}

/// A path that a provider declares must be one of its own, not the host's.
pub(crate) fn check_declared(path: &Path) -> io::Result<()> {
    let mut parts = path.components();
    let is_absolute = parts.next() == Some(Component::RootDir);
    let is_plain = parts.clone().all(|part| matches!(part, Component::Normal(_)));
    let first = parts.next().map(Component::as_os_str);
    let is_ours = first.is_none_or(|first| {
        let taken = ["dev", "etc", "proc", "sys", "boot", &TREE[1..], &LISTS[1..]];
        taken.iter().chain(&PROGRAMS).any(|name| OsStr::new(name) == first)
    });
    if is_absolute && is_plain && !is_ours {
        return Ok(());
    }
    let text =
        format!("'{}' cannot be shown to a command: it belongs to the system", path.display());
    Err(io::Error::other(text))
}

/// Makes the directory the root, and the old one unreachable.
fn enter_root(root: &Path) -> io::Result<()> {
    std::env::set_current_dir(root)?;
    // The old root lies over the new one then, and is taken away.
    rustix::process::pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    std::env::set_current_dir("/")?;
    fs::set_permissions("/", fs::Permissions::from_mode(0o755))
}

fn become_mapped_root(namespace: &OwnedFd) -> io::Result<()> {
    setns(namespace, CloneFlags::CLONE_NEWUSER)?;
    setgroups(&[])?;
    setresgid(Gid::from_raw(0), Gid::from_raw(0), Gid::from_raw(0))?;
    setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0))?;
    Ok(set_no_new_privs(true)?)
}

fn become_reader() -> io::Result<()> {
    keep_capabilities(CapabilitySet::DAC_READ_SEARCH, Some(NOBODY))?;
    // Without it the rights would end when the command is executed.
    Ok(configure_capability_in_ambient_set(CapabilitySet::DAC_READ_SEARCH, true)?)
}

/// Gives up all rights but some, for good, and becomes another user.
fn keep_capabilities(kept: CapabilitySet, user: Option<u32>) -> io::Result<()> {
    set_keep_capabilities(true)?;
    for capability in CapabilitySet::all().iter().filter(|one| !kept.contains(*one)) {
        match remove_capability_from_bounding_set(capability) {
            // One that this kernel does not know.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    setgroups(&[])?;
    if let Some(id) = user {
        setresgid(Gid::from_raw(id), Gid::from_raw(id), Gid::from_raw(id))?;
        setresuid(Uid::from_raw(id), Uid::from_raw(id), Uid::from_raw(id))?;
    }
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: kept };
    set_capabilities(None, sets)?;
    Ok(set_no_new_privs(true)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_s_own_directories_are_not_shown() {
        for good in ["/srv/borg", "/var/cache/restic", "/root/.config/borg"] {
            check_declared(Path::new(good)).unwrap();
        }
        for bad in
            ["/", "/etc/shadow", "/usr/local", "/proc", "/guest/x", "a", "/srv/../etc", "/dev"]
        {
            assert!(check_declared(Path::new(bad)).is_err(), "{bad}");
        }
    }
}
