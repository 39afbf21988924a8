// SPDX-License-Identifier: MIT OR Apache-2.0
//! Containers: the frozen file tree that is backed up, commands that read it, and its restore.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{BoxFuture, Call, Result};

/// The most entries that [`ContainerTransferred::ignored`] names; the others are only counted.
pub const IGNORED_MAX: usize = 1000;

/// As whom a command reads a container's file tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Identity {
    /// As the container's root, in a user namespace with the container's ids. Sees the tree, the programs
    /// of the host, and nothing else of it: for tools that need no files of their own (`tar`).
    MappedRoot,
    /// As a user of the host without rights, but allowed to read everything in the tree
    /// (`CAP_DAC_READ_SEARCH` alone). Sees owners as the container does, and of the host the programs
    /// and the paths that the command declares: for tools with caches, keys and a network
    /// (`borg`, `restic`).
    Reader,
}

/// A run of user or group ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMapRange {
    /// Whether it is about groups; else users.
    pub is_group: bool,
    /// First id in the container.
    pub container_id: u32,
    /// First id on the host.
    pub host_id: u32,
    /// How many.
    pub count: u32,
}

/// A volume of a container that is part of the tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerMount {
    /// Its key in the configuration: `rootfs`, `mp0`.
    pub key: String,
    /// Where it is in the tree and in the container; `/` for `rootfs`.
    pub mount_point: PathBuf,
    /// Its volume id on the host, for people and logs.
    pub volume_id: String,
}

/// All that belongs to the backup of one container.
#[derive(Debug, Clone)]
pub struct ContainerBackup {
    /// The container's configuration.
    pub config: Vec<u8>,
    /// Its firewall configuration, if there is one.
    pub firewall: Option<Vec<u8>>,
    /// Where commands of `runner` find the tree: a read-only directory with all volumes at their places.
    pub tree: PathBuf,
    /// The same tree for a provider that runs in the host's process (as root, in its mount namespace).
    /// Its owners are those that the container sees.
    pub host_tree: PathBuf,
    /// The volumes in the tree: a walk must cross into these file systems, and into no others.
    pub mounts: Vec<ContainerMount>,
    /// How ids of the container are kept on the host; empty for a privileged container. Only to be
    /// told to a restore elsewhere: the tree shows the container's ids.
    pub id_map: Vec<IdMapRange>,
    /// Where commands of `runner` find the lists of what is backed up ([`crate::Selection`]). The tree still
    /// shows what is left out.
    pub lists: PathBuf,
    /// The same lists for a provider that runs in the host's process.
    pub host_lists: PathBuf,
    /// Whether a file that cannot be read is left out and told in [`ContainerTransferred::ignored`]; else the
    /// backup fails.
    pub skip_unreadable: bool,
    /// How many bytes there are to be read, if that is known; only for progress.
    pub expected_bytes: Option<u64>,
    /// What the provider may read, in bytes per second; none without a limit. A command's output is
    /// limited by the host; one that sends its data elsewhere has to be told the limit.
    pub bandwidth_limit: Option<u64>,
    /// Runs commands that read the tree.
    pub runner: Arc<dyn ContainerRunner>,
}

/// A command that reads a container's tree.
#[derive(Debug)]
pub struct ContainerCommand {
    /// Program and arguments; the program is looked for in `/usr/sbin:/usr/bin:/sbin:/bin`.
    pub argv: Vec<OsString>,
    /// As whom it runs.
    pub identity: Identity,
    /// Its environment besides `PATH`, `LANG=C.UTF-8` and `HOME=/`.
    pub env: Vec<(OsString, OsString)>,
    /// Paths of the host that a [`Identity::Reader`] sees, too, and may write to.
    pub paths: Vec<PathBuf>,
    /// Its standard input; nothing without one.
    pub stdin: Option<OwnedFd>,
    /// Its standard output; without one it goes line by line to the guest's log.
    pub stdout: Option<OwnedFd>,
    /// Is given all of its standard error, which goes to the guest's log as well.
    pub stderr: Option<StderrCopy>,
}

/// Is given what a command writes to standard error as it comes, in pieces of any size; all of it before the
/// command's end is told.
pub struct StderrCopy(Box<TakeBytes>);

type TakeBytes = dyn FnMut(&[u8]) + Send;

impl StderrCopy {
    /// One that hands the pieces on. What it does must be short: the command waits for it.
    pub fn new(take: impl FnMut(&[u8]) + Send + 'static) -> Self {
        Self(Box::new(take))
    }

    /// Gives the next piece.
    pub fn give(&mut self, bytes: &[u8]) {
        (self.0)(bytes);
    }
}

impl std::fmt::Debug for StderrCopy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("StderrCopy")
    }
}

/// How much of a command's last words is kept in [`CommandEnd::stderr_tail`].
pub const STDERR_TAIL_BYTES: usize = 16 << 10;

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandEnd {
    /// Its exit code, or 128 and the number of the signal that ended it.
    pub exit_code: i32,
    /// The last lines it wrote to standard error, at most [`STDERR_TAIL_BYTES`]; all of them are in the guest's log.
    pub stderr_tail: String,
}

/// Runs commands beside a container's tree.
pub trait ContainerRunner: Send + Sync + std::fmt::Debug {
    /// Runs a command to its end. It is killed, with all it started, when the call is cancelled, the
    /// future is dropped or the host dies. That it failed is in [`CommandEnd`], not an error. One that a signal has
    /// ended, or that ends with 129 to 192 as a shell says so, fails the guest's backup whatever comes after it: what
    /// it has written is not all there is.
    fn command<'a>(
        &'a self,
        command: ContainerCommand,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<CommandEnd>>;
}

/// A file that was left out though nobody asked for that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IgnoredEntry {
    /// Its path in the container, bytes that are no UTF-8 replaced.
    pub path: String,
    /// Why, in words.
    pub why: String,
}

/// What the backup of a container moved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerTransferred {
    /// Files, directories and everything else in the archive, in number.
    pub entries: u64,
    /// Bytes read from files.
    pub read_bytes: u64,
    /// Bytes written to the storage.
    pub written_bytes: u64,
    /// What is not in the archive because it could not be read or has no meaning there (sockets), at
    /// most [`IGNORED_MAX`].
    pub ignored: Vec<IgnoredEntry>,
    /// How many were ignored in all.
    pub ignored_count: u64,
}

/// Compression of a tar archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// None.
    None,
    /// gzip.
    Gz,
    /// bzip2.
    Bz2,
    /// xz.
    Xz,
    /// zstd.
    Zst,
}

/// Where the host reads a container's files from. All of it is untrusted input.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ContainerData {
    /// A directory that holds the tree, with the container's ids. The host only reads it.
    Directory(PathBuf),
    /// A tar archive (ustar, pax or GNU) with the container's ids: a regular file or a FIFO.
    Tar {
        /// Its path.
        path: PathBuf,
        /// How it is compressed.
        compression: Compression,
    },
}

/// The restore of one container's archive.
pub trait ContainerRestore: Send {
    /// Offers the files. `private_dir` exists, belongs to this restore alone, and is where a
    /// FIFO or a directory may be made. Called once.
    fn data<'a>(
        &'a mut self,
        private_dir: &'a Path,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<ContainerData>>;

    /// Ends the restore, after success and after failure.
    fn cleanup<'a>(self: Box<Self>, call: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a;
}
