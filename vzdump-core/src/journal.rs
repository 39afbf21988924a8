// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a task is about to acquire, on disk before it is acquired, so that a crash at any point
//! can be cleaned up by the next run.
//!
//! One file per running task, in the layout's journal directory: JSON lines, appended and synced.
//! The rule is "choose a name, journal it, then acquire it"; so a line that is torn by a crash
//! (only the last one can be) names nothing that exists. A task that ends well removes its file;
//! what [`recover`] finds was left by a task that died, or that could not undo something.
//!
//! Undoing is idempotent, therefore nothing is journalled when it is given back.
//!
//! Whoever creates a journal holds the guest's lock ([`crate::job::backup_lock_path`]) before that and
//! as long as it uses the journal: the recovery takes the lock as the proof that the task is over.

pub mod by_hand;
pub mod recover;
mod stamp;
pub mod volumes;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use provider_api::{GuestKind, Uuid};
use serde::{Deserialize, Serialize};

pub use stamp::ProcessStamp;

use crate::job::describe::Description;
use crate::layout::{Layout, LayoutError, make_private_dir};

/// Version of the format; a file of a newer one is not touched.
pub const VERSION: u32 = 1;
/// The largest journal that is read; real ones have a few KiB.
const SIZE_BYTES_MAX: u64 = 1 << 20;
/// The most journals that are looked at.
const FILES_MAX: usize = 10_000;
const SUFFIX: &str = ".journal";
/// How one ends whose first line is not durable yet.
const UNFINISHED: &str = ".new";

/// A fault of the journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The directory could not be made.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A journal could not be read or written.
    #[error("Cannot {doing} the journal '{path}'.")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A journal makes no sense.
    #[error(
        "The journal '{path}' is damaged in line {line}: {reason}. What its task has left cannot be known from it: \
         see to it that the guest runs as it should, and remove the file."
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A journal of a newer program.
    #[error(
        "The journal '{path}' has version {version}; this program knows {VERSION}. Use the newer program."
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
}

/// What kind of task a journal belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskKind {
    /// The backup of a guest.
    Backup,
    /// The restore of a guest.
    Restore,
    /// The making of a new guest.
    Create,
}

/// The first line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begin {
    /// Version of the format.
    pub version: u32,
    /// Kind of the task.
    pub task: TaskKind,
    /// Kind of the guest.
    pub guest_kind: GuestKind,
    /// Number of the guest; of the new one if one is made.
    pub guest_id: u32,
    /// Storage of the archive; of the disks for a guest that is made without one.
    pub storage: String,
    /// The process that runs the task.
    pub owner: ProcessStamp,
}

impl Begin {
    /// The first line of a task of this process.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn new(
        task: TaskKind,
        guest_kind: GuestKind,
        guest_id: u32,
        storage: &str,
    ) -> io::Result<Self> {
        let owner = ProcessStamp::current()?;
        Ok(Self {
            version: VERSION,
            task,
            guest_kind,
            guest_id,
            storage: storage.to_owned(),
            owner,
        })
    }
}

/// What became of a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KnownOutcome {
    /// It is durable.
    Committed,
    /// It did not happen.
    NotCommitted,
    /// It could not be found out; the bitmaps keep everything.
    Unknown,
}

/// A fleecing image and the node it becomes in QEMU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FleecingImage {
    /// Node name in QEMU.
    pub node: String,
    /// Volume id.
    pub volume: String,
}

/// A disk that a storage daemon offers as a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileExport {
    /// What the daemon's command line tells it by, see
    /// [`crate::vm::process::VmProcess::of_daemon_mark`].
    pub mark: String,
    /// The file, which is a mount.
    pub path: PathBuf,
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "entry", rename_all = "snake_case")]
pub enum Entry {
    /// The task begins.
    Begin(Begin),
    /// The QEMU process the following names belong to; of a container its first process.
    Qemu {
        /// The process.
        process: ProcessStamp,
    },
    /// The archive's name.
    Archive {
        /// As the provider chose it.
        name: String,
    },
    /// A directory that belongs to the task alone.
    Directory {
        /// Its path.
        path: PathBuf,
    },
    /// The directory into which a container's files are copied, see [`crate::temp_tree`].
    TemporaryTree {
        /// Its path.
        path: PathBuf,
    },
    /// A fleecing image.
    Fleecing(FleecingImage),
    /// The guest is about to be frozen.
    Freeze,
    /// The guest is thawed.
    Thawed,
    /// The VM's swtpm is about to be stopped by a signal for a moment.
    Tpm {
        /// The process.
        process: ProcessStamp,
    },
    /// The running guest is about to be shut down for its backup; it must run again.
    ShutDown,
    /// QEMU is about to be started without letting its guest run.
    Start {
        /// What its command line tells it by, see [`crate::vm::process::VmProcess::of_mark`].
        mark: String,
        /// The guest is to run in it after the point in time; else the VM was off.
        is_to_run: bool,
    },
    /// QEMU is about to be told to stay when its guest switches off.
    KeepAlive,
    /// The running guest is about to be paused for its backup.
    Pause,
    /// What was shut down or paused runs again.
    Resumed,
    /// The access in QEMU.
    Access {
        /// Its target id.
        target_id: String,
    },
    /// The NBD server in QEMU and its exports.
    NbdServer {
        /// Path of the socket.
        socket: PathBuf,
        /// Ids of the exports.
        exports: Vec<String>,
    },
    /// A storage daemon is about to be started that offers a disk as a file.
    FileExport(FileExport),
    /// The provider is about to be asked to commit.
    Committing {
        /// The host's id of the commit.
        id: Uuid,
        /// What the archive gets when it is committed.
        #[serde(default, skip_serializing_if = "Description::is_empty")]
        description: Description,
    },
    /// What became of the commit.
    Outcome {
        /// The id.
        id: Uuid,
        /// The outcome.
        outcome: KnownOutcome,
    },
    /// A snapshot of a volume that a container's backup reads.
    Snapshot {
        /// Volume id.
        volume: String,
        /// The snapshot's name.
        name: String,
    },
    /// A new volume of a guest that is being made, or a copy of one that a container's backup reads.
    Volume {
        /// Volume id.
        volume: String,
    },
    /// A volume named before was not made: the name belongs to someone else.
    Forget {
        /// Volume id.
        volume: String,
    },
    /// A file of a restore that is written at the end.
    File {
        /// Its path.
        path: PathBuf,
    },
    /// A guest that exists is to be replaced, or some of its disks.
    Replace {
        /// Its volumes that go when nothing names them any more.
        frees: Vec<String>,
        /// They go before the new ones are made.
        in_place: bool,
    },
    /// The new configuration lies beside the old one and is about to take its place.
    Switch,
    /// A new guest is about to get volumes that are filled while it runs.
    Live(Live),
    /// The guest is about to run on them: from here on they have what it writes.
    Runs,
    /// Its user gives it up: what the guest wrote goes, too.
    GivenUp,
    /// Another process goes on with the task.
    Resume {
        /// The process.
        owner: ProcessStamp,
    },
    /// The name by which an archive's disk is served to a QEMU that is about to be started.
    Export {
        /// The disk's key.
        key: String,
        /// The name.
        export: String,
    },
    /// A disk's target has everything, durably, and is about to take the place of the overlay.
    Pivot {
        /// The disk's key.
        key: String,
    },
    /// It could not: the overlay stays in use.
    Unpivot {
        /// The disk's key.
        key: String,
    },
    /// A disk has everything, durably, and needs no archive any more.
    Filled {
        /// The disk's key.
        key: String,
    },
    /// The guest is made: its volumes belong to the new guest.
    Complete,
}

/// What a live restore works on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Live {
    /// Where QEMU finds the archive's sockets, whoever serves them.
    pub dir: PathBuf,
    /// Most bytes per second.
    pub limit_bytes_per_s: Option<u64>,
    /// The disks that are filled while the guest runs.
    pub disks: Vec<LiveDisk>,
}

/// A disk that is filled while its guest runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LiveDisk {
    /// Its name in the archive.
    pub device: String,
    /// Its key in the configuration.
    pub key: String,
    /// Its size.
    pub size_bytes: u64,
    /// The volume that is filled.
    pub volume: String,
    /// The volume that has the guest's writes, unless it is the same.
    pub overlay: Option<String>,
}

/// Removes what a process left that was killed while it made a journal of this guest, whose lock the caller holds.
fn remove_unfinished(dir: &Path, begin: &Begin) {
    let prefix = format!(".{}-{}-", begin.guest_kind, begin.guest_id);
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().take(FILES_MAX);
    for entry in entries {
        let is_left = entry
            .file_name()
            .to_str()
            .is_some_and(|name| name.starts_with(&prefix) && name.ends_with(UNFINISHED));
        if is_left {
            // One that stays only costs its name.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// The journal of a running task.
///
/// Dropping it keeps the file, as a crash would.
#[derive(Debug, Clone)]
pub struct Journal {
    path: PathBuf,
    /// Shared, so that a cancelled append still ends on its thread and lines never mix.
    file: Arc<Mutex<File>>,
}

impl Journal {
    /// Creates the journal of a task, durably, with its first line.
    ///
    /// # Errors
    /// The file cannot be written.
    pub async fn create(layout: &Layout, begin: Begin) -> Result<Self, JournalError> {
        let dir = layout.journal_dir();
        blocking(move || Self::create_now(&dir, begin)).await
    }

    fn create_now(dir: &Path, begin: Begin) -> Result<Self, JournalError> {
        make_private_dir(dir)?;
        let stem = format!("{}-{}-{}", begin.guest_kind, begin.guest_id, Uuid::new_v4().simple());
        let path = dir.join(format!("{stem}{SUFFIX}"));
        let fault = |source| JournalError::Io { doing: "create", path: path.clone(), source };
        remove_unfinished(dir, &begin);
        // Under another name until its first line is durable: a journal always says whose it is.
        let unfinished = dir.join(format!(".{stem}{UNFINISHED}"));
        let mut file = File::options()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(&unfinished)
            .map_err(fault)?;
        let written = write_line(&mut file, &Entry::Begin(begin))
            .and_then(|()| fs::rename(&unfinished, &path))
            .and_then(|()| sync_dir(dir));
        if let Err(source) = written {
            // Nothing has been acquired yet, so a file that stays only costs its name.
            let _ = fs::remove_file(&unfinished);
            let _ = fs::remove_file(&path);
            return Err(fault(source));
        }
        Ok(Self { path, file: Arc::new(Mutex::new(file)) })
    }

    /// Goes on with the journal of a process that has ended.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub(crate) async fn reopen(path: &Path) -> Result<Self, JournalError> {
        let path = path.to_owned();
        blocking(move || {
            let opened =
                cut_torn_line(&path).and_then(|()| File::options().append(true).open(&path));
            let file = opened.map_err(|source| JournalError::Io {
                doing: "open",
                path: path.clone(),
                source,
            })?;
            Ok(Self { path, file: Arc::new(Mutex::new(file)) })
        })
        .await
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends a line; it is durable when this returns.
    ///
    /// # Errors
    /// The file cannot be written.
    pub async fn append(&self, entry: Entry) -> Result<(), JournalError> {
        let file = Arc::clone(&self.file);
        let path = self.path.clone();
        blocking(move || {
            let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
            write_line(&mut file, &entry).map_err(|source| JournalError::Io {
                doing: "write",
                path,
                source,
            })?;
            #[cfg(debug_assertions)]
            crate::job::kill_point::journalled(&entry);
            Ok(())
        })
        .await
    }

    /// Removes the journal: everything in it has been given back.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub async fn remove(self) -> Result<(), JournalError> {
        remove(&self.path).await
    }
}

/// Removes a journal, durably. One that is gone is no error.
pub(crate) async fn remove(path: &Path) -> Result<(), JournalError> {
    let path = path.to_owned();
    blocking(move || {
        let result = match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => path.parent().map_or(Ok(()), sync_dir),
        };
        result.map_err(|source| JournalError::Io { doing: "remove", path, source })
    })
    .await
}

/// Appends a line to the journal of another process that has ended.
pub(crate) async fn append_to(path: &Path, entry: Entry) -> Result<(), JournalError> {
    let path = path.to_owned();
    blocking(move || {
        let written = File::options().append(true).open(&path).and_then(|mut file| {
            cut_torn_line(&path)?;
            write_line(&mut file, &entry)
        });
        written.map_err(|source| JournalError::Io { doing: "write", path, source })
    })
    .await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, JournalError> + Send + 'static,
) -> Result<T, JournalError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(JournalError::Io {
            doing: "use",
            path: PathBuf::new(),
            source: io::Error::other(error),
        }),
    }
}

fn write_line(file: &mut File, entry: &Entry) -> io::Result<()> {
    let mut line = serde_json::to_vec(entry)?;
    line.push(b'\n');
    let length_bytes = file.metadata()?.len();
    let written = file.write_all(&line).and_then(|()| file.sync_data());
    if written.is_err() {
        // A part of it would spoil the line that comes next. Nothing was acquired yet.
        let _ = file.set_len(length_bytes);
    }
    written
}

/// Removes what follows the last line break, so that the next line stands alone.
fn cut_torn_line(path: &Path) -> io::Result<()> {
    let text = fs::read(path)?;
    let whole = text.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
    if whole == text.len() {
        return Ok(());
    }
    File::options().write(true).open(path)?.set_len(whole as u64)
}

pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// What a journal says, read back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The file.
    pub path: PathBuf,
    /// Its first line.
    pub begin: Begin,
    /// The QEMU process, once known.
    pub qemu: Option<ProcessStamp>,
    /// The archive's name, once known.
    pub archive: Option<String>,
    /// Directories of the task.
    pub directories: Vec<PathBuf>,
    /// Copies of containers' files.
    pub temporary_trees: Vec<PathBuf>,
    /// Fleecing images.
    pub fleecing: Vec<FleecingImage>,
    /// The guest may be frozen.
    pub frozen: bool,
    /// The swtpm that may be stopped by a signal.
    pub tpm: Option<ProcessStamp>,
    /// The guest was shut down or paused and may not run again yet.
    pub held: Option<Held>,
    /// The QEMU it ran in then.
    pub ran: Option<ProcessStamp>,
    /// The mark of a QEMU that was started for the backup, and whether the guest is to run in it.
    pub started: Option<(String, bool)>,
    /// QEMU may have been told to stay when its guest switches off.
    pub kept_alive: bool,
    /// Target id of the access.
    pub access: Option<String>,
    /// Socket and exports of the NBD server; `None` if it was not started.
    pub nbd: Option<(PathBuf, Vec<String>)>,
    /// Disks that were offered as files.
    pub file_exports: Vec<FileExport>,
    /// The commit that was begun.
    pub committing: Option<Uuid>,
    /// What its archive gets.
    pub description: Description,
    /// What is known of it.
    pub outcome: Option<KnownOutcome>,
    /// Snapshots of volumes: volume id and name.
    pub snapshots: Vec<(String, String)>,
    /// New volumes of a restore, or copies for a container's backup.
    pub volumes: Vec<String>,
    /// Files of a restore.
    pub files: Vec<PathBuf>,
    /// Old volumes that go, and whether that is before the new ones are made; none if no guest is replaced.
    pub replaces: Option<(Vec<String>, bool)>,
    /// The new configuration was about to take the place of the old one.
    pub switching: bool,
    /// What a live restore works on.
    pub live: Option<Live>,
    /// Its guest has run, or may have.
    pub runs: bool,
    /// It was given up, so it is undone although its guest has run.
    pub given_up: bool,
    /// By which names its disks are served, by their keys.
    pub exports: BTreeMap<String, String>,
    /// Its disks whose target was about to take the place of the overlay.
    pub pivoted: BTreeSet<String>,
    /// Its disks that are complete.
    pub filled: BTreeSet<String>,
    /// The restore was complete.
    pub complete: bool,
}

/// Why a guest that ran before its backup may not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// It was shut down.
    ShutDown,
    /// It was paused.
    Paused,
}

impl Record {
    fn new(path: PathBuf, begin: Begin) -> Self {
        Self {
            path,
            begin,
            qemu: None,
            archive: None,
            directories: Vec::new(),
            temporary_trees: Vec::new(),
            fleecing: Vec::new(),
            frozen: false,
            tpm: None,
            held: None,
            ran: None,
            started: None,
            kept_alive: false,
            access: None,
            nbd: None,
            file_exports: Vec::new(),
            committing: None,
            description: Description::default(),
            outcome: None,
            snapshots: Vec::new(),
            volumes: Vec::new(),
            files: Vec::new(),
            replaces: None,
            switching: false,
            live: None,
            runs: false,
            given_up: false,
            exports: BTreeMap::new(),
            pivoted: BTreeSet::new(),
            filled: BTreeSet::new(),
            complete: false,
        }
    }

    fn hold(&mut self, held: Held) {
        self.held = Some(held);
        self.ran.clone_from(&self.qemu);
    }

    fn add(&mut self, entry: Entry) -> Result<(), &'static str> {
        match entry {
            Entry::Begin(_) => return Err("a second beginning"),
            Entry::Qemu { process } => self.qemu = Some(process),
            Entry::Archive { name } => self.archive = Some(name),
            Entry::Directory { path } => self.directories.push(path),
            Entry::TemporaryTree { path } => self.temporary_trees.push(path),
            Entry::Fleecing(image) => self.fleecing.push(image),
            Entry::Freeze => self.frozen = true,
            Entry::Thawed => self.frozen = false,
            Entry::Tpm { process } => self.tpm = Some(process),
            Entry::ShutDown => self.hold(Held::ShutDown),
            Entry::Pause => self.hold(Held::Paused),
            Entry::Resumed => self.held = None,
            Entry::Start { mark, is_to_run } => self.started = Some((mark, is_to_run)),
            Entry::KeepAlive => self.kept_alive = true,
            Entry::Access { target_id } => self.access = Some(target_id),
            Entry::NbdServer { socket, exports } => self.nbd = Some((socket, exports)),
            Entry::FileExport(export) => self.file_exports.push(export),
            Entry::Snapshot { volume, name } => self.snapshots.push((volume, name)),
            Entry::Committing { id, description } => {
                self.committing = Some(id);
                self.description = description;
            }
            Entry::Outcome { id, outcome } => {
                if self.committing != Some(id) {
                    return Err("the outcome of a commit that was not begun");
                }
                self.outcome = Some(outcome);
            }
            Entry::Volume { volume } => self.volumes.push(volume),
            Entry::Forget { volume } => self.volumes.retain(|name| *name != volume),
            Entry::File { path } => self.files.push(path),
            Entry::Replace { frees, in_place } => self.replaces = Some((frees, in_place)),
            Entry::Switch => self.switching = true,
            Entry::Live(live) => self.live = Some(live),
            Entry::Runs => self.runs = true,
            Entry::GivenUp => self.given_up = true,
            Entry::Resume { owner } => self.begin.owner = owner,
            Entry::Export { key, export } => drop(self.exports.insert(key, export)),
            Entry::Pivot { key } => drop(self.pivoted.insert(key)),
            Entry::Unpivot { key } => drop(self.pivoted.remove(&key)),
            Entry::Filled { key } => drop(self.filled.insert(key)),
            Entry::Complete => self.complete = true,
        }
        Ok(())
    }
}

/// Reads one journal.
///
/// # Errors
/// It cannot be read, is damaged, or is of a newer version.
pub fn read(path: &Path) -> Result<Record, JournalError> {
    let fault = |source| JournalError::Io { doing: "read", path: path.to_owned(), source };
    let mut text = Vec::new();
    let file = File::open(path).map_err(fault)?;
    file.take(SIZE_BYTES_MAX + 1).read_to_end(&mut text).map_err(fault)?;
    if text.len() as u64 > SIZE_BYTES_MAX {
        return Err(fault(io::Error::new(io::ErrorKind::FileTooLarge, "larger than 1 MiB")));
    }
    parse(path, &text)
}

fn parse(path: &Path, text: &[u8]) -> Result<Record, JournalError> {
    let damaged =
        |line, reason: String| JournalError::Damaged { path: path.to_owned(), line, reason };
    // What follows the last line break was torn by a crash, before anything was acquired.
    let whole = text.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
    let mut record: Option<Record> = None;
    for (index, line) in text[..whole].split_inclusive(|b| *b == b'\n').enumerate() {
        let number = index + 1;
        if record.is_none() {
            check_version(path, line)?;
        }
        let entry: Entry =
            serde_json::from_slice(line).map_err(|error| damaged(number, error.to_string()))?;
        match (&mut record, entry) {
            (None, Entry::Begin(begin)) => record = Some(Record::new(path.to_owned(), begin)),
            (None, _) => return Err(damaged(number, "it does not begin".to_owned())),
            (Some(record), entry) => {
                record.add(entry).map_err(|reason| damaged(number, reason.to_owned()))?;
            }
        }
    }
    record.ok_or_else(|| damaged(1, "it is empty".to_owned()))
}

/// Looks at the version alone, because a newer line may not be readable otherwise.
fn check_version(path: &Path, line: &[u8]) -> Result<(), JournalError> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    match serde_json::from_slice::<Version>(line) {
        Ok(Version { version }) if version > VERSION => {
            Err(JournalError::Newer { path: path.to_owned(), version })
        }
        _ => Ok(()),
    }
}

/// The journals of one guest, or of all.
///
/// # Errors
/// The directory cannot be read.
pub fn list(
    layout: &Layout,
    guest: Option<(GuestKind, u32)>,
) -> Result<Vec<PathBuf>, JournalError> {
    let dir = layout.journal_dir();
    let fault = |source| JournalError::Io { doing: "list", path: dir.clone(), source };
    let entries = match fs::read_dir(&dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(fault)?,
    };
    let prefix = guest.map(|(kind, id)| format!("{kind}-{id}-"));
    let mut paths = Vec::new();
    for entry in entries.take(FILES_MAX) {
        let entry = entry.map_err(fault)?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let is_wanted = prefix.as_deref().is_none_or(|prefix| name.starts_with(prefix));
        if name.ends_with(SUFFIX) && !name.starts_with('.') && is_wanted {
            paths.push(entry.path());
        }
    }
    paths.sort();
    Ok(paths)
}

/// The number of the guest, by the name of its journal.
#[must_use]
pub fn guest_in_name(path: &Path) -> Option<u32> {
    path.file_name()?.to_str()?.split('-').nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests;
