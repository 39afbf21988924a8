// SPDX-License-Identifier: MIT OR Apache-2.0
//! Copies one disk from where the provider offers it into a fresh volume.
//!
//! The source is untrusted: it is taken as raw whatever it looks like, its size must match exactly,
//! a file is opened here and without following symbolic links, and a socket must lie in the
//! private directory of the restore.

use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use provider_api::VolumeSource;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt as _};

use crate::blocking;
use crate::bound;
use crate::task_log::clean;
use crate::tools::Tools;

/// Longest name of an export, from the NBD protocol.
const EXPORT_BYTES_MAX: usize = 4096;
/// How much of qemu-img's last words is kept.
const STDERR_BYTES_MAX: u64 = 4096;

/// A multiple of every block size that bypassing the page cache may take: QEMU looks for up to a page.
const DIRECT_BLOCK_BYTES: u64 = 64 << 10;
/// How often is looked whether a copy that says nothing is at work; a short time limit shortens it.
const SIGN_EVERY: Duration = Duration::from_secs(10);

/// A source that was checked.
#[derive(Debug)]
pub(super) enum Source {
    /// An open file or block device.
    File { file: File, is_device: bool },
    /// An NBD export.
    Nbd { socket: PathBuf, export: String },
}

/// A QEMU description of an NBD export on a socket whose path is text.
pub(super) fn nbd_options(socket: &Path, export: &str) -> String {
    let options = json!({
        "driver": "raw",
        "file": {
            "driver": "nbd",
            "server": { "type": "unix", "path": socket },
            "export": export,
        },
    });
    format!("json:{options}")
}

/// Where a disk is copied to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target<'a> {
    /// What `qemu-img` takes for it.
    pub(super) options: &'a str,
    /// Its files.
    pub(super) files: &'a [&'a Path],
    pub(super) size_bytes: u64,
    /// It reads as zeroes, so that none need be written.
    pub(super) is_zero: bool,
    /// Most bytes that are written per second.
    pub(super) limit_bytes_per_s: Option<u64>,
}

/// Checks what the provider offers.
pub(super) async fn open(
    source: &VolumeSource,
    private_dir: &Path,
    size_bytes: u64,
) -> Result<Source, String> {
    let (opened, found_bytes) = match source {
        VolumeSource::Path(path) => open_file(path)?,
        VolumeSource::NbdUnix { socket, export } => {
            check_socket(socket, private_dir)?;
            open_export(socket, export).await?
        }
        _ => return Err("the provider offers the disk in a way this host does not know".into()),
    };
    if found_bytes != size_bytes {
        return Err(format!(
            "the archive announced {size_bytes} bytes, but the provider offers {found_bytes}"
        ));
    }
    Ok(opened)
}

fn open_file(path: &Path) -> Result<(Source, u64), String> {
    let shown = clean(&path.display().to_string());
    if !path.is_absolute() {
        return Err(format!("the provider's path '{shown}' is not absolute"));
    }
    // Without blocking on a FIFO, and without following links anywhere on the way.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let fault =
        |error: std::io::Error| format!("cannot open the provider's file '{shown}': {error}");
    let fd = openat2(CWD, path, flags, Mode::empty(), resolve).map_err(|e| fault(e.into()))?;
    let mut file = File::from(fd);
    let kind = file.metadata().map_err(fault)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(format!("the provider's path '{shown}' is neither a file nor a block device"));
    }
    // The end of a block device is its size too.
    let size_bytes = file.seek(SeekFrom::End(0)).map_err(fault)?;
    file.rewind().map_err(fault)?;
    Ok((Source::File { file, is_device: kind.is_block_device() }, size_bytes))
}

fn check_socket(socket: &Path, private_dir: &Path) -> Result<(), String> {
    let shown = clean(&socket.display().to_string());
    let is_inside = socket.parent() == Some(private_dir) && socket.file_name().is_some();
    if !is_inside {
        return Err(format!("the provider's socket '{shown}' is not in the private directory"));
    }
    match std::fs::symlink_metadata(socket) {
        Ok(meta) if meta.file_type().is_socket() => Ok(()),
        Ok(_) => Err(format!("the provider's socket '{shown}' is no socket")),
        Err(error) => Err(format!("the provider's socket '{shown}' cannot be used: {error}")),
    }
}

async fn open_export(socket: &Path, export: &str) -> Result<(Source, u64), String> {
    if export.len() > EXPORT_BYTES_MAX || export.contains('\0') {
        return Err("the provider's export has a bad name".to_owned());
    }
    if socket.to_str().is_none() {
        return Err("the socket's path is not UTF-8".to_owned());
    }
    let fault = |error| {
        format!(
            "the provider's export '{}' cannot be used: {}",
            clean(export),
            crate::job::chain(&error)
        )
    };
    let options = provider_nbd::Options::default();
    let client =
        provider_nbd::Client::connect_unix(socket, export, options).await.map_err(fault)?;
    let size_bytes = client.size_bytes();
    // The size is known; a server that does not say goodbye is no fault.
    let _ = client.disconnect().await;
    Ok((Source::Nbd { socket: socket.to_owned(), export: export.to_owned() }, size_bytes))
}

/// Copies. `moved` is told how many bytes of the disk are dealt with. Dropping the future ends the
/// copy.
pub(super) async fn copy(
    tools: &Tools,
    source: Source,
    target: Target<'_>,
    stall: Duration,
    mut moved: impl FnMut(u64),
) -> Result<(), String> {
    let qemu_img = tools.qemu_img().map_err(|error| error.to_string())?;
    let (options, stdin) = match source {
        // Handed over open, so that it is the file that was checked.
        Source::File { file, is_device } => (file_options(is_device), Stdio::from(file)),
        Source::Nbd { socket, export } => (nbd_options(&socket, &export), Stdio::null()),
    };
    let mut command = bound::command(&qemu_img);
    command.args(["convert", "-p", "-n", "--target-image-opts"]);
    if target.is_zero {
        command.arg("--target-is-zero");
    }
    let (files, size_bytes) = (owned(target.files), target.size_bytes);
    let can_bypass = blocking::run(move || Ok(can_bypass_cache(&files, size_bytes))).await;
    if can_bypass.map_err(|error| error.to_string())? {
        // Out of order, because each write then takes as long as the disk does.
        command.args(["-t", "none", "-W"]);
    }
    if let Some(limit) = target.limit_bytes_per_s {
        command.args(["-r", &limit.to_string()]);
    }
    command.arg("--").arg(options).arg(target.options);
    command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
    let started = bound::start(command).await;
    let mut bound = started.map_err(|error| format!("cannot start qemu-img: {error}"))?;
    let child = &mut bound.child;
    let pid = child.id();
    let stdout = child.stdout.take().ok_or("qemu-img has no output")?;
    let stderr = child.stderr.take().ok_or("qemu-img has no output")?;
    // On its own, so that a copy that stands still can be ended; it ends with the process.
    let said = tokio::spawn(last_words(stderr));
    let told = |percent: f64| moved((target.size_bytes as f64 * percent / 100.0) as u64);
    if let Err(stalled) = follow(stdout, stall, || pid.map(signs_of_life), told).await {
        let _ = child.start_kill();
        let _ = child.wait().await;
        return Err(stalled);
    }
    let status = bound.wait().await.map_err(|error| format!("qemu-img was lost: {error}"))?;
    if !status.success() {
        let said = said.await.unwrap_or_default();
        return Err(format!("qemu-img could not copy the disk ({status}): {}", clean(&said)));
    }
    // qemu-img leaves the rest to the page cache: lengths and areas of files, or all of it.
    let paths = owned(target.files);
    let sync = move || paths.into_iter().try_for_each(|path| File::open(path)?.sync_all());
    let synced = tokio::task::spawn_blocking(sync).await;
    match synced {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(format!("cannot sync the new volume: {error}")),
        Err(error) => Err(format!("cannot sync the new volume: {error}")),
    }
}

fn owned(files: &[&Path]) -> Vec<PathBuf> {
    files.iter().map(|path| path.to_path_buf()).collect()
}

/// Whether data can be written past the page cache. Copying it there costs more than all else, it would begin to reach
/// the disk when it is synced, and takes the place of what others need (`docs/design/0032`).
fn can_bypass_cache(files: &[PathBuf], size_bytes: u64) -> bool {
    // Not every file system can do that, and what is not a multiple of blocks could change the size of a file.
    let is_possible = |path: &PathBuf| {
        let flags = OFlags::DIRECT.bits().cast_signed();
        File::options().read(true).write(true).custom_flags(flags).open(path).is_ok()
    };
    size_bytes.is_multiple_of(DIRECT_BLOCK_BYTES) && files.iter().all(is_possible)
}

fn file_options(is_device: bool) -> String {
    let driver = if is_device { "host_device" } else { "file" };
    let options = json!({
        "driver": "raw",
        "file": { "driver": driver, "filename": "/dev/stdin" },
    });
    format!("json:{options}")
}

/// What grows as long as a process is at work. Its progress alone does not tell: qemu-img prints only each whole
/// percent, which takes hours of a large disk with a limit. Bytes of sockets are not counted, but time spent on them is.
fn signs_of_life(pid: u32) -> (String, String) {
    let io = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // After the name, which may have any characters: the state, and ten more before the ticks in user mode and in
    // the kernel.
    let ticks = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().skip(11).take(2));
    (io, ticks.map(|ticks| ticks.collect::<Vec<_>>().join(" ")).unwrap_or_default())
}

/// Reads qemu-img's progress, `(12.34/100%)`, to the end of its output. Ends if it says nothing for `stall`, and its
/// signs of life stay the same.
async fn follow<S: PartialEq>(
    mut output: impl AsyncRead + Unpin,
    stall: Duration,
    signs: impl Fn() -> S,
    mut told: impl FnMut(f64),
) -> Result<(), String> {
    let mut text = Vec::new();
    let mut chunk = [0; 1024];
    let (mut last, mut moved) = (signs(), Instant::now());
    loop {
        let read = tokio::time::timeout(SIGN_EVERY.min(stall / 4), output.read(&mut chunk)).await;
        let length = match read {
            Ok(Ok(length)) => length,
            Ok(Err(error)) => return Err(format!("qemu-img's output failed: {error}")),
            Err(_) => {
                let now = signs();
                if now != last {
                    (last, moved) = (now, Instant::now());
                } else if moved.elapsed() >= stall {
                    return Err(format!("the copy stood still for {} seconds", stall.as_secs()));
                }
                continue;
            }
        };
        if length == 0 {
            return Ok(());
        }
        moved = Instant::now();
        text.extend_from_slice(&chunk[..length]);
        if let Some(percent) = last_percent(&text) {
            told(percent);
        }
        let keep = text.len().min(64);
        text.drain(..text.len() - keep);
    }
}

fn last_percent(text: &[u8]) -> Option<f64> {
    let text = std::str::from_utf8(text).ok()?;
    let (before, _) = text.rsplit_once("/100%)")?;
    let (_, number) = before.rsplit_once('(')?;
    number.trim().parse().ok().filter(|percent| (0.0..=100.0).contains(percent))
}

async fn last_words(stderr: impl AsyncRead + Unpin) -> String {
    let mut said = Vec::new();
    let mut limited = stderr.take(STDERR_BYTES_MAX);
    let _ = limited.read_to_end(&mut said).await;
    // Whatever else comes is read and forgotten, so that qemu-img never waits for us.
    let _ = tokio::io::copy(&mut limited.into_inner(), &mut tokio::io::sink()).await;
    String::from_utf8_lossy(&said).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_read_from_any_chunks() {
        assert_eq!(last_percent(b"    (0.00/100%)\r    (12.34/100%)\r    (13."), Some(12.34));
        assert_eq!(last_percent(b"    (13."), None);
        assert_eq!(last_percent(b"(200/100%)"), None);
    }

    #[tokio::test]
    async fn a_copy_that_works_is_not_one_that_stands_still() {
        let stall = Duration::from_millis(200);
        let run = async |script: &str| {
            let mut command = bound::command("sh");
            command.args(["-c", script]).stdin(Stdio::null()).stdout(Stdio::piped());
            let mut bound = bound::start(command).await.unwrap();
            let (pid, output) = (bound.child.id().unwrap(), bound.child.stdout.take().unwrap());
            follow(output, stall, || signs_of_life(pid), |_| ()).await
        };
        // Works for a second at least, and says nothing.
        let works = "read -r now x < /proc/uptime; end=$((${now%.*} + 2)); while read -r now x < /proc/uptime; \
                     [ ${now%.*} -lt $end ]; do :; done";
        run(works).await.unwrap();
        let error = run("exec sleep 100").await.unwrap_err();
        assert!(error.contains("stood still"), "{error}");
    }

    #[test]
    fn the_cache_is_bypassed_only_where_that_cannot_change_a_length() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let file = dir.path().join("disk");
        std::fs::write(&file, "").unwrap();
        let (files, missing) = ([file], [dir.path().join("other")]);
        assert!(can_bypass_cache(&files, 1 << 20));
        assert!(!can_bypass_cache(&files, (1 << 20) + 4096));
        assert!(!can_bypass_cache(&missing, 1 << 20));
        // A file system without it.
        assert!(!can_bypass_cache(&["/proc/self/comm".into()], 1 << 20));
    }

    #[tokio::test]
    async fn only_what_is_meant_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let file = dir.join("disk");
        std::fs::write(&file, vec![1; 1024]).unwrap();
        let path = |path: &Path| VolumeSource::Path(path.to_owned());
        assert!(open(&path(&file), &dir, 1024).await.is_ok());
        assert!(open(&path(&file), &dir, 1536).await.unwrap_err().contains("announced 1536"));
        let link = dir.join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(open(&path(&link), &dir, 1024).await.is_err());
        assert!(open(&path(Path::new("disk")), &dir, 1024).await.is_err());
        assert!(open(&path(&dir), &dir, 1024).await.is_err());
        let socket = |socket: &Path| VolumeSource::NbdUnix {
            socket: socket.to_owned(),
            export: String::new(),
        };
        for bad in [&file, Path::new("/run/nbd"), &dir.join("../x"), &dir] {
            assert!(open(&socket(bad), &dir, 1024).await.is_err(), "{bad:?}");
        }
    }
}
