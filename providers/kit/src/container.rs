// SPDX-License-Identifier: MIT OR Apache-2.0
//! A container's file tree with all that is odd about files, commands that read it, and the comparison
//! with what a restore gives.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use provider_api::{
    BoxFuture, Call, CommandEnd, Compression, ContainerCommand, ContainerData, ContainerRunner,
    Error, Excludes, Kind, Result, STDERR_TAIL_BYTES, Selection,
};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;

use crate::attributes::{self, Attributes};
use crate::fault::{Checked, Fault, clean, ensure};
use crate::random::Random;

/// Where programs are looked for.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// Entries of a restored tree that are looked at; the kit's own trees have far fewer.
const ENTRIES_MAX: usize = 10_000;
/// What a restored tree may take, of one file and in all; the kit's own trees take some 100 KiB.
const TREE_BYTES_MAX: u64 = 64 << 20;
/// How often a tree that is being unpacked is looked at.
const WATCH_STEP: Duration = Duration::from_millis(100);
/// Time stamps of the tree lie in the past, where nothing else sets them.
const OLD: Duration = Duration::from_secs(1_500_000_000);

/// How much of the output of a command comes that is killed.
const OUTPUT_PART_BYTES: u64 = 64 << 10;
/// What is more than that, so that something is missing; it does not become less by compression.
const BULK_BYTES: usize = 1 << 20;
/// The signal's number.
const SIGKILL: i32 = 9;

/// Adds a file that is larger than what comes of a command that is killed.
pub(crate) fn make_bulk(root: &Path) -> std::io::Result<()> {
    fs::write(root.join("var/bulk"), Random::new(1).bytes(BULK_BYTES))
}

/// Makes the tree in an empty directory.
pub(crate) fn make_tree(root: &Path) -> std::io::Result<()> {
    for dir in ["etc", "var/lib/empty", "home/a b", "-rf", "\u{1f512}"] {
        fs::create_dir_all(root.join(dir))?;
    }
    fs::write(root.join("etc/hostname"), "kit\n")?;
    fs::write(root.join("etc/empty"), "")?;
    let names: [&[u8]; 7] = [
        b"new\nline",
        b"not \xff\xfe text",
        b"quote\"s' and \\",
        b"$(reboot)",
        b" ",
        b"--help",
        &[b'n'; 200],
    ];
    for name in names {
        fs::write(root.join("home/a b").join(OsStr::from_bytes(name)), name)?;
    }
    fs::hard_link(root.join("etc/hostname"), root.join("var/lib/other-name"))?;
    for (link, target) in
        [("dangling", "../nowhere"), ("absolute", "/etc/shadow"), ("up", ".."), ("self", "self")]
    {
        symlink(target, root.join("etc").join(link))?;
    }
    let sparse = fs::File::create(root.join("var/sparse"))?;
    sparse.set_len(1 << 20)?;
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"end", (1 << 20) - 3)?;
    mknodat(CWD, root.join("var/fifo"), FileType::Fifo, Mode::from_raw_mode(0o640), 0)?;
    for (file, mode) in [("etc/empty", 0o4755), ("etc/hostname", 0o600), ("home", 0o1777)] {
        fs::set_permissions(root.join(file), fs::Permissions::from_mode(mode))?;
    }
    let time = SystemTime::UNIX_EPOCH + OLD;
    for file in ["etc/hostname", "var/sparse", "var/lib/empty"] {
        fs::File::open(root.join(file))?.set_modified(time)?;
    }
    Ok(())
}

/// Patterns of what is left out of a tree, and what they leave out of that of [`make_excluded`].
pub(crate) const EXCLUDED: [&str; 5] = ["/tmp/?*", "/opt", "*.swp", "/var/run/?*.pid", "cache/"];
pub(crate) const LEFT_OUT: [&str; 7] = [
    "tmp/file",
    "tmp/deep",
    "opt",
    "home/notes.swp",
    "home/\n \\*.swp",
    "var/run/x.pid",
    "var/cache",
];

/// Adds what [`EXCLUDED`] leaves out, and what stays though it looks similar.
pub(crate) fn make_excluded(root: &Path) -> std::io::Result<()> {
    for dir in ["tmp/deep", "opt/deep", "home/tmp", "home/opt", "var/run", "var/cache"] {
        fs::create_dir_all(root.join(dir))?;
    }
    let stay = [
        "home/tmp/file",
        "home/opt/file",
        "home/notes.swp.txt",
        "var/run/lock",
        "swp",
        "home/cache",
    ];
    let go = [
        "tmp/file",
        "tmp/deep/file",
        "opt/deep/file",
        "home/notes.swp",
        "home/\n \\*.swp",
        "var/run/x.pid",
        "var/cache/x",
    ];
    stay.iter().chain(&go).try_for_each(|name| fs::write(root.join(name), name))
}

/// Changes the tree as a container that runs on.
pub(crate) fn change_tree(root: &Path) -> std::io::Result<()> {
    fs::write(root.join("etc/hostname"), "changed\n")?;
    fs::remove_file(root.join("home/a b").join(" "))?;
    fs::write(root.join("var/lib/new"), vec![7; 70_000])?;
    fs::rename(root.join("etc/dangling"), root.join("etc/moved"))
}

/// What is compared of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    kind: &'static str,
    mode: u32,
    owner: (u32, u32),
    /// Of regular files and directories, in seconds.
    time_s: i64,
    /// Names of the same file, this one included.
    names: u64,
    content: Vec<u8>,
    attributes: Attributes,
    /// Whether it takes less room than its content.
    has_holes: bool,
}

/// A tree as it was at some time.
pub(crate) struct Tree(BTreeMap<OsString, Entry>);

impl Tree {
    /// Reads all of a tree; nothing is followed.
    pub(crate) fn read(root: &Path) -> Checked<Self> {
        let mut entries = BTreeMap::new();
        let mut open = vec![root.to_owned()];
        while let Some(dir) = open.pop() {
            let failed = |e: std::io::Error| Fault::new(format!("The tree cannot be read: {e}."));
            for found in fs::read_dir(&dir).map_err(failed)? {
                let path = found.map_err(failed)?.path();
                let entry = read_entry(&path).map_err(failed)?;
                if entry.kind == "directory" {
                    open.push(path.clone());
                }
                let name = path.strip_prefix(root).unwrap_or(&path).as_os_str().to_owned();
                entries.insert(name, entry);
                ensure(entries.len() <= ENTRIES_MAX, || {
                    format!("The restored tree has more than {ENTRIES_MAX} entries.")
                })?;
            }
        }
        Ok(Self(entries))
    }

    /// The tree without these entries and what is in them; for the others nothing else changes.
    pub(crate) fn without(mut self, left_out: &[&str]) -> Self {
        self.0.retain(|name, _| !left_out.iter().any(|out| Path::new(name).starts_with(out)));
        self
    }

    /// How many entries it has.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Fails unless a restored tree is the same. Owners count only where the kit may set them.
    pub(crate) fn compare(&self, found: &Self, has_owners: bool) -> Checked {
        for (name, expected) in &self.0 {
            let shown = clean(&name.to_string_lossy());
            let Some(entry) = found.0.get(name) else {
                return Err(Fault::new(format!("'{shown}' is missing.")));
            };
            let faults = [
                (entry.kind != expected.kind, "is another kind of file"),
                (entry.content != expected.content, "has another content"),
                (entry.mode != expected.mode, "has another mode"),
                (entry.names != expected.names, "has lost its hard links, or got some"),
                (entry.time_s != expected.time_s, "has another time"),
                (has_owners && entry.owner != expected.owner, "has another owner"),
            ];
            let differs = attributes::difference(&expected.attributes, &entry.attributes);
            if let Some(what) = differs {
                return Err(Fault::new(format!("'{shown}' {what}.")));
            }
            if let Some((_, what)) = faults.iter().find(|(is_wrong, _)| *is_wrong) {
                return Err(Fault::new(format!("'{shown}' {what}.")));
            }
        }
        match found.0.keys().find(|name| !self.0.contains_key(*name)) {
            Some(name) => {
                Err(Fault::new(format!("'{}' is too much.", clean(&name.to_string_lossy()))))
            }
            None => Ok(()),
        }
    }

    /// A file that has lost its holes; its content is the same.
    pub(crate) fn without_holes(&self, found: &Self) -> Option<String> {
        let is_filled = |(name, _): &(&OsString, &Entry)| {
            found.0.get(*name).is_some_and(|entry| !entry.has_holes)
        };
        let (name, _) = self.0.iter().filter(|(_, entry)| entry.has_holes).find(is_filled)?;
        Some(clean(&name.to_string_lossy()))
    }
}

fn read_entry(path: &Path) -> std::io::Result<Entry> {
    let meta = fs::symlink_metadata(path)?;
    let kind = meta.file_type();
    let (kind, content) = if kind.is_dir() {
        ("directory", Vec::new())
    } else if kind.is_symlink() {
        ("symbolic link", fs::read_link(path)?.into_os_string().as_bytes().to_vec())
    } else if kind.is_fifo() {
        ("fifo", Vec::new())
    } else if kind.is_file() {
        if meta.len() > TREE_BYTES_MAX {
            let text = format!("'{}' has {} bytes", clean(&path.to_string_lossy()), meta.len());
            return Err(std::io::Error::other(text));
        }
        ("file", fs::read(path)?)
    } else {
        ("other", Vec::new())
    };
    let has_time = matches!(kind, "file" | "directory");
    Ok(Entry {
        kind,
        mode: if kind == "symbolic link" { 0 } else { meta.mode() & 0o7777 },
        owner: (meta.uid(), meta.gid()),
        time_s: if has_time { meta.mtime() } else { 0 },
        names: if kind == "directory" { 1 } else { meta.nlink() },
        content,
        attributes: attributes::read(path)?,
        has_holes: kind == "file" && meta.blocks() * 512 < meta.len(),
    })
}

/// A directory as a provider finds it in the backup of a container.
pub trait ShownTree: Send + Sync {
    /// Where commands find it.
    fn tree(&self) -> PathBuf;

    /// Where a provider of this process finds it.
    fn host_tree(&self) -> PathBuf;

    /// Where commands find the lists of what is read of it.
    fn lists(&self) -> PathBuf;

    /// Where a provider of this process finds them.
    fn host_lists(&self) -> PathBuf;

    /// Runs commands beside it.
    fn runner(&self) -> Arc<dyn ContainerRunner>;

    /// Withdraws it. An error says what holds it.
    fn close(self: Box<Self>) -> BoxFuture<'static, std::result::Result<(), String>>;
}

/// Shows directories as the trees of containers.
pub trait TreeMaker: Send + Sync {
    /// Why it cannot; none if it can.
    fn unusable(&self) -> Option<String> {
        None
    }

    /// Shows the directory `root`, of which `excludes` leave something out; `place` is empty, private to it, and stays until it is withdrawn.
    fn show<'a>(
        &'a self,
        root: &'a Path,
        place: &'a Path,
        excludes: &'a Excludes,
    ) -> BoxFuture<'a, std::result::Result<Box<dyn ShownTree>, String>>;
}

/// The directory itself, and its lists.
pub(crate) struct PlainTree {
    pub(crate) root: PathBuf,
    pub(crate) lists: PathBuf,
    /// How long commands wait before they begin.
    pub(crate) pause: Duration,
    /// How they end.
    pub(crate) ending: Ending,
}

/// How commands end, and how many there were.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ending {
    /// Why they fail; none if they end as they do.
    pub(crate) failure: Option<Failure>,
    pub(crate) commands: Arc<AtomicUsize>,
}

/// How a command fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    /// All of its output comes, and then it says that there was an error.
    ExitCode,
    /// It is killed in the middle of its output.
    Killed,
}

impl PlainTree {
    /// Lists what is read of `root` at `<place>/lists`.
    pub(crate) fn new(root: &Path, place: &Path, excludes: &Excludes) -> std::io::Result<Self> {
        let lists = place.join("lists");
        Selection::write(&lists, root, &[], excludes)?;
        Ok(Self { root: root.to_owned(), lists, pause: Duration::ZERO, ending: Ending::default() })
    }
}

impl ShownTree for PlainTree {
    fn tree(&self) -> PathBuf {
        self.root.clone()
    }

    fn host_tree(&self) -> PathBuf {
        self.root.clone()
    }

    fn lists(&self) -> PathBuf {
        self.lists.clone()
    }

    fn host_lists(&self) -> PathBuf {
        self.lists.clone()
    }

    fn runner(&self) -> Arc<dyn ContainerRunner> {
        Arc::new(PlainRunner { pause: self.pause, ending: self.ending.clone() })
    }

    fn close(self: Box<Self>) -> BoxFuture<'static, std::result::Result<(), String>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// Runs commands as they are, after a while: the tree is an ordinary directory here, and nobody is locked in.
#[derive(Debug)]
struct PlainRunner {
    pause: Duration,
    ending: Ending,
}

impl ContainerRunner for PlainRunner {
    fn command<'a>(
        &'a self,
        command: ContainerCommand,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<CommandEnd>> {
        Box::pin(async move {
            tokio::time::sleep(self.pause).await;
            self.ending.commands.fetch_add(1, Ordering::Relaxed);
            match self.ending.failure {
                None => run(command, call).await,
                Some(Failure::ExitCode) => {
                    let end = run(command, call).await?;
                    let why = "tar: ./etc/hostname: Read error: Input/output error\n";
                    Ok(CommandEnd { exit_code: 2, stderr_tail: end.stderr_tail + why })
                }
                Some(Failure::Killed) => {
                    run_in_part(command, call).await?;
                    Ok(CommandEnd { exit_code: 128 + SIGKILL, stderr_tail: String::new() })
                }
            }
        })
    }
}

/// Runs a command, of whose output only the beginning comes.
async fn run_in_part(mut command: ContainerCommand, call: &Call) -> Result<()> {
    let Some(output) = command.stdout.take() else {
        return run(command, call).await.map(|_| ());
    };
    let failed = |error| Error::io("The kit cannot make a pipe.", error);
    let (reader, writer) = std::io::pipe().map_err(failed)?;
    command.stdout = Some(writer.into());
    let copying = tokio::task::spawn_blocking(move || {
        // A provider that stops to read it is no fault of the kit.
        let _ = std::io::copy(&mut reader.take(OUTPUT_PART_BYTES), &mut fs::File::from(output));
    });
    // It ends when nobody reads its output any more.
    run(command, call).await?;
    copying.await.map_err(|error| Error::new(Kind::Other, format!("The kit: {error}.")))
}

async fn run(command: ContainerCommand, call: &Call) -> Result<CommandEnd> {
    let (Some(program), arguments) = (command.argv.first(), command.argv.get(1..)) else {
        return Err(Error::new(Kind::Invalid, "The command has no program."));
    };
    let shown = program.to_string_lossy().into_owned();
    let failed = |error| Error::io(format!("Cannot run {shown}."), error);
    let mut child = Command::new(program)
        .args(arguments.unwrap_or_default())
        .env_clear()
        .envs([("PATH", PATH), ("LANG", "C.UTF-8"), ("HOME", "/")])
        .envs(command.env)
        .stdin(command.stdin.map_or_else(Stdio::null, Stdio::from))
        .stdout(command.stdout.map_or_else(Stdio::null, Stdio::from))
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let (mut stderr, mut copy) = (child.stderr.take(), command.stderr);
    let words = async {
        let mut tail = Vec::new();
        let mut chunk = [0; 4096];
        while let Some(stderr) = &mut stderr
            && let Ok(count @ 1..) = stderr.read(&mut chunk).await
        {
            tail.extend_from_slice(&chunk[..count]);
            if let Some(copy) = &mut copy {
                copy.give(&chunk[..count]);
            }
            let excess = tail.len().saturating_sub(STDERR_TAIL_BYTES);
            tail.drain(..excess);
        }
        String::from_utf8_lossy(&tail).into_owned()
    };
    let ended = async { tokio::join!(child.wait(), words) };
    let (status, stderr_tail) = tokio::select! {
        biased;
        () = call.cancel.cancelled() => {
            return Err(Error::new(Kind::Cancelled, format!("{shown} was cancelled.")));
        }
        ended = ended => ended,
    };
    let status = status.map_err(failed)?;
    use std::os::unix::process::ExitStatusExt as _;
    let exit_code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(CommandEnd { exit_code, stderr_tail })
}

/// Brings what a restore offers into a directory: the tree itself, or a tar archive unpacked into `room`.
pub(crate) async fn unpack(data: &ContainerData, room: &Path) -> Checked<PathBuf> {
    match data {
        ContainerData::Directory(path) => {
            let meta = fs::symlink_metadata(path)
                .map_err(|e| Fault::new(format!("The restored directory cannot be used: {e}.")))?;
            ensure(path.is_absolute() && meta.is_dir(), || {
                format!("{} is no directory.", clean(&path.display().to_string()))
            })?;
            Ok(path.clone())
        }
        ContainerData::Tar { path, compression } => untar(path, *compression, room).await,
        _ => Err(Fault::new("It offers the files in a way that the kit does not know.")),
    }
}

/// Looks at a tree that grows, until it is too large.
async fn watch(root: PathBuf) -> String {
    loop {
        tokio::time::sleep(WATCH_STEP).await;
        let root = root.clone();
        let found = tokio::task::spawn_blocking(move || too_large(&root)).await;
        if let Ok(Some(why)) = found {
            return why;
        }
    }
}

/// Why a tree is too large. Entries may come and go meanwhile.
fn too_large(root: &Path) -> Option<String> {
    let (mut open, mut entries, mut bytes) = (vec![root.to_owned()], 0, 0_u64);
    while let Some(dir) = open.pop() {
        for found in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let Ok(meta) = found.metadata() else { continue };
            entries += 1;
            bytes = bytes.saturating_add(meta.blocks().saturating_mul(512));
            if entries > ENTRIES_MAX || bytes > TREE_BYTES_MAX {
                return Some(format!(
                    "The restored archive goes on after {entries} entries and {bytes} bytes, which is far \
                     more than was backed up."
                ));
            }
            if meta.is_dir() {
                open.push(found.path());
            }
        }
    }
    None
}

async fn untar(path: &Path, compression: Compression, room: &Path) -> Checked<PathBuf> {
    let shown = clean(&path.display().to_string());
    let meta = fs::symlink_metadata(path)
        .map_err(|e| Fault::new(format!("The archive {shown} cannot be used: {e}.")))?;
    let kind = meta.file_type();
    ensure(path.is_absolute() && (kind.is_file() || kind.is_fifo()), || {
        format!("{shown} is neither a regular file nor a FIFO.")
    })?;
    let target = room.join("unpacked");
    fs::create_dir(&target)
        .map_err(|e| Fault::new(format!("Cannot make {}: {e}.", target.display())))?;
    let mut argv: Vec<OsString> =
        vec!["tar".into(), "-xpf".into(), path.into(), "-C".into(), (&target).into()];
    argv.extend(["--numeric-owner", "--acls", "--xattrs"].map(Into::into));
    argv.push("--xattrs-include=user.*".into());
    argv.push("--xattrs-include=security.capability".into());
    match compression {
        Compression::None => {}
        Compression::Gz => argv.push("--gzip".into()),
        Compression::Bz2 => argv.push("--bzip2".into()),
        Compression::Xz => argv.push("--xz".into()),
        Compression::Zst => argv.push("--zstd".into()),
    }
    let command = ContainerCommand {
        argv,
        identity: provider_api::Identity::MappedRoot,
        env: Vec::new(),
        paths: Vec::new(),
        stdin: None,
        stdout: None,
        stderr: None,
    };
    let call = Call::default();
    let end = tokio::select! {
        end = run(command, &call) => end,
        why = watch(target.clone()) => return Err(Fault::new(why)),
    };
    let end = end.map_err(|e| Fault::new(format!("tar: {}", clean(&e.message))))?;
    ensure(end.exit_code == 0, || {
        format!("tar cannot unpack the archive: {}", clean(&end.stderr_tail))
    })?;
    Ok(target)
}
