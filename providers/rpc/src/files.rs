// SPDX-License-Identifier: MIT OR Apache-2.0
//! Files that change hands by their path: what a command reads and writes, and logs.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use provider_api::{Error, Kind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, MemfdFlags, Mode, OFlags, fcntl_getfl, fcntl_setfl, fstat};
use rustix::io::Errno;

/// How long the other end of a FIFO is waited for.
const PEER_WAIT: Duration = Duration::from_secs(30);
const PEER_POLL: Duration = Duration::from_millis(10);
/// What is awaited of a reader.
const READER_DOES: &str = "opened";
/// What is awaited of a writer: one that is silent is not seen.
const WRITER_DOES: &str = "opened and wrote to, or closed,";

/// Opens what a command reads: a file, or a FIFO once somebody has written to it, or has closed it again.
pub(crate) async fn open_stdin(path: &Path) -> Result<OwnedFd> {
    let fd = open(path, OFlags::RDONLY)?;
    let mut waited = Duration::ZERO;
    // A FIFO that nobody has opened yet would read as empty.
    while is_fifo(path, &fd)? && !has_input(&fd) {
        wait_for_peer(path, WRITER_DOES, &mut waited).await?;
    }
    blocking(path, fd)
}

/// Opens what a command writes: a file, which is emptied, or a FIFO once somebody reads from it.
pub(crate) async fn open_stdout(path: &Path) -> Result<OwnedFd> {
    let mut waited = Duration::ZERO;
    loop {
        match open(path, OFlags::WRONLY) {
            Err(error) if is_without_reader(&error) => {
                wait_for_peer(path, READER_DOES, &mut waited).await?;
            }
            Err(error) => return Err(error),
            Ok(fd) => {
                if !is_fifo(path, &fd)? {
                    rustix::fs::ftruncate(&fd, 0).map_err(|errno| failed(path, errno))?;
                }
                return blocking(path, fd);
            }
        }
    }
}

/// Never waits, and never follows a link that somebody put there.
fn open(path: &Path, how: OFlags) -> Result<OwnedFd> {
    if !path.is_absolute() {
        let why = format!("The path {} is not absolute.", path.display());
        return Err(Error::new(Kind::Invalid, why));
    }
    let flags = how | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY;
    rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| failed(path, errno))
}

fn failed(path: &Path, errno: Errno) -> Error {
    Error::io(format!("Cannot open {} for a command.", path.display()), errno.into())
}

/// `ENXIO`, which also sockets give; those never get a reader.
fn is_without_reader(error: &Error) -> bool {
    let cause = error.source.as_ref().and_then(|cause| cause.downcast_ref::<std::io::Error>());
    cause.and_then(std::io::Error::raw_os_error) == Some(Errno::NXIO.raw_os_error())
}

fn is_fifo(path: &Path, fd: &OwnedFd) -> Result<bool> {
    let stat = fstat(fd).map_err(|errno| failed(path, errno))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Fifo => Ok(true),
        FileType::RegularFile => Ok(false),
        _ => {
            let why = format!("{} is neither a file nor a FIFO.", path.display());
            Err(Error::new(Kind::Invalid, why))
        }
    }
}

/// Whether there is something to read, or the end. Linux reports nothing for a FIFO that had no writer yet, nor
/// for one whose writer is silent.
fn has_input(fd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

async fn wait_for_peer(path: &Path, peer_does: &str, waited: &mut Duration) -> Result<()> {
    if *waited >= PEER_WAIT {
        let (shown, seconds) = (path.display(), PEER_WAIT.as_secs());
        let why = format!("Nobody {peer_does} the other end of {shown} in {seconds} s.");
        return Err(Error::new(Kind::Invalid, why));
    }
    tokio::time::sleep(PEER_POLL).await;
    *waited += PEER_POLL;
    Ok(())
}

fn blocking(path: &Path, fd: OwnedFd) -> Result<OwnedFd> {
    let set = fcntl_getfl(&fd).and_then(|flags| fcntl_setfl(&fd, flags - OFlags::NONBLOCK));
    set.map_err(|errno| failed(path, errno))?;
    Ok(fd)
}

/// A text in memory that has a path as long as this lives, whatever way that ends.
pub(crate) struct TextFile(File);

impl TextFile {
    pub(crate) fn new(text: &str) -> std::io::Result<Self> {
        let mut file = File::from(rustix::fs::memfd_create("vzdump-text", MemfdFlags::CLOEXEC)?);
        file.write_all(text.as_bytes())?;
        Ok(Self(file))
    }

    /// What somebody else wrote to it, as far as it is text; one byte more than allowed shows as too long.
    pub(crate) fn read(&self, max_bytes: usize) -> std::io::Result<String> {
        let mut bytes = vec![0; max_bytes + 1];
        let mut used = 0;
        while used < bytes.len() {
            match rustix::io::pread(&self.0, &mut bytes[used..], used as u64)? {
                0 => break,
                count => used += count,
            }
        }
        if used > max_bytes {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        bytes.truncate(used);
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    pub(crate) fn path(&self) -> String {
        use std::os::fd::AsRawFd;
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_fd().as_raw_fd())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[tokio::test]
    async fn fifos_are_opened_when_both_ends_are_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, 0o600.into(), 0).unwrap();
        let reader = path.clone();
        let reader = tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            File::open(reader).unwrap().read_to_string(&mut text).map(|_| text)
        });
        let fd = open_stdout(&path).await.unwrap();
        assert!(!fcntl_getfl(&fd).unwrap().contains(OFlags::NONBLOCK));
        File::from(fd).write_all(b"through").unwrap();
        assert_eq!(reader.await.unwrap().unwrap(), "through");

        let writer = path.clone();
        let writer = tokio::task::spawn_blocking(move || std::fs::write(writer, "back"));
        let fd = open_stdin(&path).await.unwrap();
        let read = tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            File::from(fd).read_to_string(&mut text).map(|_| text)
        });
        assert_eq!(read.await.unwrap().unwrap(), "back");
        writer.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_silent_writer_is_seen_when_it_closes_the_fifo() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, 0o600.into(), 0).unwrap();
        let fd = open(&path, OFlags::RDONLY).unwrap();
        assert!(!has_input(&fd));
        let writer = open(&path, OFlags::WRONLY).unwrap();
        assert!(!has_input(&fd));
        drop(writer);
        assert!(has_input(&fd));
        let mut waited = PEER_WAIT;
        let error = wait_for_peer(&path, WRITER_DOES, &mut waited).await.unwrap_err();
        assert!(error.message.starts_with("Nobody opened and wrote to, or closed, the other end"));
    }

    #[tokio::test]
    async fn what_is_no_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
        for path in [Path::new("relative"), Path::new("/dev/null"), dir.path(), &link] {
            assert!(open_stdin(path).await.is_err(), "{}", path.display());
            assert!(open_stdout(path).await.is_err(), "{}", path.display());
        }
    }

    #[test]
    fn a_text_has_a_path() {
        let text = TextFile::new("lines\n").unwrap();
        assert_eq!(std::fs::read_to_string(text.path()).unwrap(), "lines\n");
        std::fs::write(text.path(), "other").unwrap();
        assert_eq!(text.read(5).unwrap(), "other");
        assert!(text.read(4).is_err());
    }
}
