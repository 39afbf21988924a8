// SPDX-License-Identifier: MIT OR Apache-2.0
//! The file tree of a container, as a tree of files in the archive.
//!
//! ```text
//!  tar (as the container's root, by the host's runner) ─► pipe ─► entries counted ─► tar ─► tree/
//!                                                              tree/ read back ─► tree.blake3, see `listing`
//! ```
//!
//! What is left out, and how a tree is walked, is the same as in an archive of the other format: the first
//! command is the same. The second one runs as this process; it makes nothing outside of the directory, and
//! whatever it says is taken for a failure, for it calls what it cannot restore a warning.

use std::io::{ErrorKind, PipeReader, Read as _, Write as _};
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use provider_api::{Error, Kind, Result};

use super::entries::Counter;
use super::times::Times;
use super::{Passing, Stored, listing};
use crate::call::corrupt;
use crate::files;
use crate::kill_point::step;
use crate::limits::{PIPE_BYTES, SERVER_OUTPUT_BYTES};
use crate::manifest::{ContainerFormat, TREE_DIRECTORY, TREE_LIST_FILE, Tree};

/// Makes files as they are described, with the numbers of their owners.
const EXTRACT: [&str; 13] = [
    "tar",
    "--extract",
    "--file=-",
    "--blocking-factor=512",
    "--numeric-owner",
    "--same-owner",
    "--same-permissions",
    "--acls",
    "--xattrs",
    "--xattrs-include=user.*",
    "--xattrs-include=security.capability",
    // A volume below another one comes later, and changes the time of the directory that it is in.
    "--delay-directory-restore",
    // Files may well be from the future.
    "--warning=no-timestamp",
];

/// What it says, at the end of a line, if there is no more room; and of a piece that had room only in part.
const NO_ROOM: [&str; 2] = ["No space left on device", "Disk quota exceeded"];
const WRITTEN_IN_PART: &str = ": Wrote only ";
/// With less than this a storage is full: a few of the pieces that are written at once.
const FULL_BYTES: u64 = 1 << 20;

/// Takes all that comes out of the pipe into a new tree of files. `walks` is how many volumes are walked: a
/// directory in which another one is mounted is there twice.
pub(super) fn fill(
    pipe: PipeReader,
    directory: &Path,
    walks: usize,
    passing: &Passing,
    is_stopped: &AtomicBool,
) -> Result<Stored> {
    let tree = directory.join(TREE_DIRECTORY);
    files::make_directory(&tree)
        .map_err(|e| Error::io(format!("Cannot make {}.", tree.display()), e))?;
    step();
    let counter = extract(pipe, &tree, passing, is_stopped)?;
    step();
    let mut go_on = |_| check_stopped(is_stopped);
    let list = listing::write(&tree, &directory.join(TREE_LIST_FILE), &mut go_on)?;
    step();
    let (entries, read_bytes) = (counter.entries(), counter.data_bytes());
    let twice = u64::try_from(walks).unwrap_or(u64::MAX).saturating_sub(1);
    // An archive without entries is the caller's matter: the root of the tree is there anyway.
    let is_whole = list.entries <= entries && list.entries >= entries.saturating_sub(twice);
    if entries > 0 && !is_whole {
        return Err(corrupt(format!(
            "Of {entries} files and directories of the container {} were stored.",
            list.entries
        )));
    }
    files::sync_file_system(directory)?;
    step();
    let tree = Tree {
        format: ContainerFormat::Tree,
        file_size_bytes: list.size_bytes,
        blake3: list.blake3,
        entries: list.entries,
        data_bytes: read_bytes,
    };
    Ok(Stored { entries: list.entries.min(entries), read_bytes, tree })
}

fn check_stopped(is_stopped: &AtomicBool) -> Result<()> {
    if is_stopped.load(Ordering::Relaxed) {
        return Err(Error::new(Kind::Cancelled, "Nobody waits for the container's files."));
    }
    Ok(())
}

/// The command, ended when this is dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if it is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The one that dies with this thread, which waits for it.
fn start(tree: &Path) -> Result<Process> {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).args(EXTRACT).arg("--directory").arg(tree);
    // The words of its messages are looked at.
    command.env("LC_ALL", "C").env_remove("TAR_OPTIONS");
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let child = command.spawn().map_err(|e| Error::io("Cannot run setpriv and tar.", e))?;
    Ok(Process(child))
}

fn extract(
    pipe: PipeReader,
    tree: &Path,
    passing: &Passing,
    is_stopped: &AtomicBool,
) -> Result<Counter> {
    // It sets other times than it is told, and does not notice.
    let counter = Counter::with_times(Times::of(tree)?);
    let mut process = start(tree)?;
    let (Some(input), Some(output)) = (process.0.stdin.take(), process.0.stderr.take()) else {
        return Err(Error::new(Kind::Other, "tar was started without its pipes."));
    };
    std::thread::scope(|scope| {
        let said = scope.spawn(move || listen(output));
        let passed = pass(pipe, input, counter, (passing, is_stopped));
        if passed.is_err() {
            // What it has not made yet is not wanted any more.
            let _ = process.0.kill();
        }
        let status = process.0.wait().map_err(|e| Error::io("Cannot wait for tar.", e))?;
        let said = said.join().unwrap_or_default();
        let counter = passed?;
        check_end(status, &said, tree)?;
        // It goes on to the end of the input, so whatever was not passed on is its end, too.
        counter.ok_or_else(|| {
            Error::new(Kind::Io, "tar did not take all of the container's files from its input.")
        })
    })
}

/// Passes the archive on and looks at it; none if the command does not take all of it.
fn pass(
    mut pipe: PipeReader,
    mut input: ChildStdin,
    mut counter: Counter,
    (passing, is_stopped): (&Passing, &AtomicBool),
) -> Result<Option<Counter>> {
    let mut buffer = vec![0; PIPE_BYTES];
    loop {
        let count = pipe
            .read(&mut buffer)
            .map_err(|e| Error::io("Cannot read what tar says of a container's files.", e))?;
        check_stopped(is_stopped)?;
        if count == 0 {
            break;
        }
        counter.take(&buffer[..count]).map_err(corrupt)?;
        match input.write_all(&buffer[..count]) {
            Err(e) if e.kind() == ErrorKind::BrokenPipe => return Ok(None),
            other => other.map_err(|e| Error::io("Cannot pass a container's files to tar.", e))?,
        }
        passing.note(&counter);
    }
    counter.finish().map_err(corrupt)?;
    Ok(Some(counter))
}

/// The first words of the command; all others are dropped.
fn listen(output: ChildStderr) -> String {
    let mut text = Vec::new();
    let mut output = output;
    // An incomplete message is better than none.
    let _ = output.by_ref().take(SERVER_OUTPUT_BYTES as u64).read_to_end(&mut text);
    let _ = std::io::copy(&mut output, &mut std::io::sink());
    String::from_utf8_lossy(&text).into_owned()
}

fn check_end(status: ExitStatus, said: &str, tree: &Path) -> Result<()> {
    let mut lines = said.lines().map(|line| line.trim().trim_end_matches('.'));
    let Some(first) = lines.clone().find(|line| !line.is_empty()) else {
        if status.success() {
            return Ok(());
        }
        let text = format!("tar ended ({status}) while it stored a container's files.");
        return Err(Error::new(Kind::Io, text));
    };
    let full = lines.find(|line| tells_of_no_room(line)).map(str::to_owned);
    // Of a piece that is written in part it does not say why the rest was not.
    let full = full.or_else(|| {
        let is_in_part = said.contains(WRITTEN_IN_PART) && is_full(tree);
        is_in_part.then(|| format!("{first}: {}", NO_ROOM[0]))
    });
    if let Some(why) = full {
        let text = format!("Cannot write the container's files to {}: {why}.", tree.display());
        return Err(Error::new(Kind::NoSpace, text));
    }
    Err(Error::new(
        Kind::Io,
        format!(
            "A file of the container cannot be stored as it is: {first}. With 'container-format tar' the storage \
             needs no owners, attributes and long paths of its own."
        ),
    ))
}

/// Whether nothing more fits into the storage. For an attribute there may be no room in an empty one either.
fn tells_of_no_room(line: &str) -> bool {
    let call = line.rsplit_once(": Cannot ").map_or("", |(_, call)| call);
    NO_ROOM.iter().any(|words| line.ends_with(words)) && !call.starts_with("set")
}

fn is_full(tree: &Path) -> bool {
    rustix::fs::statvfs(tree)
        .is_ok_and(|stat| stat.f_bfree.saturating_mul(stat.f_frsize) < FULL_BYTES)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    #[test]
    fn whatever_tar_says_is_a_failure() {
        let tree = Path::new("/proc");
        let (good, bad) = (ExitStatus::from_raw(0), ExitStatus::from_raw(2 << 8));
        check_end(good, "", tree).unwrap();
        assert!(check_end(bad, "", tree).unwrap_err().message.contains("exit status: 2"));
        let warning = "tar: ./a: Warning: Cannot setxattr: Operation not supported\n";
        assert!(check_end(good, warning, tree).unwrap_err().message.contains("Cannot setxattr"));
        let full = "tar: ./a: Wrote only 512 of 10240 bytes\ntar: ./b: Cannot open: No space left on device\n";
        let full = check_end(bad, full, tree).unwrap_err();
        assert!(
            full.kind == Kind::NoSpace
                && full.message.contains("to /proc: tar: ./b: Cannot open: No space")
        );
        let large = "tar: setxattrat: Cannot set 'user.a' extended attribute for file './a': No space left on device";
        let large = check_end(good, large, tree).unwrap_err();
        assert!(large.kind == Kind::Io && large.message.contains("container-format tar"));
    }
}
