// SPDX-License-Identifier: MIT OR Apache-2.0
//! Processes that this program did not start itself, told apart by number and start time.
//!
//! A number alone can belong to another process by the time it is used. A [`ProcessHandle`] is
//! opened first and compared afterwards, so a signal can only reach the process that was meant.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Flock, FlockType, Pid, PidfdFlags, Signal, fcntl_getlk, pidfd_open, pidfd_send_signal,
};

/// How often the end of a process is looked for while it is waited for.
const WAIT_POLL: Duration = Duration::from_millis(20);
/// How long a killed process may take from the end of its memory to that of its files.
const LETS_GO_WITHIN: Duration = Duration::from_secs(5);

/// A process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct VmProcess {
    /// Its number.
    pub pid: i32,
    /// When it was started, in clock ticks since the boot.
    pub start_time_ticks: u64,
}

impl VmProcess {
    /// The living process of this number.
    ///
    /// # Errors
    /// When it cannot be asked for; a dead or unknown one is `None`.
    pub fn of_pid(pid: i32) -> io::Result<Option<Self>> {
        let stat = Stat::of(pid)?;
        Ok(stat.map(|stat| Self { pid, start_time_ticks: stat.start_time_ticks }))
    }

    /// The process that holds the lock on its pid file, as QEMU does for as long as it lives. A
    /// file that was left behind is not locked, so the number in it is never believed. One that is about to end
    /// answers nobody any more but has its files open still: its end is waited for, for some seconds.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn of_pid_file(path: &Path) -> io::Result<Option<Self>> {
        let deadline = Instant::now() + LETS_GO_WITHIN;
        loop {
            let Some(process) = Self::that_locks(path)? else { return Ok(None) };
            let is_ending = Stat::of(process.pid)?.is_none_or(|stat| stat.memory_bytes == 0);
            if !is_ending || Instant::now() >= deadline {
                return Ok(Some(process));
            }
            std::thread::sleep(WAIT_POLL);
        }
    }

    fn that_locks(path: &Path) -> io::Result<Option<Self>> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let wanted = Flock::from(FlockType::ReadLock);
        match fcntl_getlk(&file, &wanted)? {
            None => Ok(None),
            Some(Flock { pid: Some(pid), .. }) => Self::of_pid(pid.as_raw_nonzero().get()),
            Some(_) => Err(io::Error::other("its lock is held outside of this pid namespace")),
        }
    }

    /// The QEMU that was started with this mark, whether or not it has made its pid file yet.
    ///
    /// # Errors
    /// `/proc` cannot be listed.
    pub fn of_mark(mark: &str) -> io::Result<Option<Self>> {
        Self::of_arguments(&["-chardev".to_owned(), mark_argument(mark)])
    }

    /// The storage daemon that was started with this mark.
    ///
    /// # Errors
    /// `/proc` cannot be listed.
    pub fn of_daemon_mark(mark: &str) -> io::Result<Option<Self>> {
        Self::of_arguments(&[DAEMON_MARK_OPTION.to_owned(), mark_argument(mark)])
    }

    /// The process among whose arguments these two follow one another.
    pub(super) fn of_arguments(wanted: &[String; 2]) -> io::Result<Option<Self>> {
        for entry in std::fs::read_dir("/proc")? {
            // Processes come and go meanwhile.
            let Ok(entry) = entry else { continue };
            let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
            let Some(process) = pid.map(Self::of_pid).transpose().ok().flatten().flatten() else {
                continue;
            };
            if process
                .arguments()
                .is_ok_and(|all| all.windows(2).any(|pair| pair == wanted.as_slice()))
            {
                return Ok(Some(process));
            }
        }
        Ok(None)
    }

    /// The arguments it was started with.
    ///
    /// # Errors
    /// It is gone, or cannot be asked for them.
    pub fn arguments(&self) -> io::Result<Vec<String>> {
        let bytes = std::fs::read(format!("/proc/{}/cmdline", self.pid))?;
        let words = bytes.split(|byte| *byte == 0);
        Ok(words.map(|word| String::from_utf8_lossy(word).into_owned()).collect())
    }

    /// Opens the process, if it still is the same.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(&self) -> io::Result<Option<ProcessHandle>> {
        let Some(pid) = Pid::from_raw(self.pid) else { return Ok(None) };
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        // Compared after opening: from now on the number cannot change hands.
        if Self::of_pid(self.pid)? != Some(*self) {
            return Ok(None);
        }
        Ok(Some(ProcessHandle { fd }))
    }
}

/// What the kernel says of a process.
struct Stat {
    start_time_ticks: u64,
    /// Its address space; none any more when it is about to end.
    memory_bytes: u64,
}

impl Stat {
    /// Of a living process.
    fn of(pid: i32) -> io::Result<Option<Self>> {
        let text = match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(text) => text,
            // ESRCH: it died between opening and reading.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.raw_os_error() == Some(3) => return Ok(None),
            Err(error) => return Err(error),
        };
        Self::parse(&text)
    }

    fn parse(text: &str) -> io::Result<Option<Self>> {
        let invalid = || io::Error::new(io::ErrorKind::InvalidData, "/proc/<pid>/stat is unknown");
        // The name before it, in parentheses, may contain anything.
        let (_, fields) = text.rsplit_once(')').ok_or_else(invalid)?;
        let mut fields = fields.split_ascii_whitespace();
        if matches!(fields.next(), Some("Z" | "X")) {
            return Ok(None);
        }
        // The state is field 3 of the line, the start time field 22, the address space field 23.
        let mut number =
            |skip| fields.nth(skip).and_then(|field| field.parse().ok()).ok_or_else(invalid);
        Ok(Some(Self { start_time_ticks: number(18)?, memory_bytes: number(0)? }))
    }
}

/// What comes before a mark in a storage daemon's command line.
pub(crate) const DAEMON_MARK_OPTION: &str = "--chardev";

/// What a mark is in QEMU's command line: a character device that nothing uses.
pub(crate) fn mark_argument(mark: &str) -> String {
    format!("null,id={mark}")
}

/// An open process.
#[derive(Debug)]
pub struct ProcessHandle {
    fd: OwnedFd,
}

impl ProcessHandle {
    /// Sends a signal; one that is already gone is no error.
    ///
    /// # Errors
    /// When the signal is not allowed.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(&self.fd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Waits for the end of the process; tells whether it came in time.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub async fn wait(&self, timeout: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + timeout;
        loop {
            if self.has_ended()? {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            tokio::time::sleep(WAIT_POLL).await;
        }
    }

    /// Whether the process has ended.
    ///
    /// # Errors
    /// When it cannot be asked for.
    pub fn has_ended(&self) -> io::Result<bool> {
        // The descriptor is readable from the end of the process on.
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        Ok(poll(&mut fds, Some(&Timespec::default()))? > 0)
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_process_is_ended_and_waited_for() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let process = VmProcess::of_pid(pid).unwrap().unwrap();
        let handle = process.open().unwrap().unwrap();
        assert!(!handle.wait(Duration::ZERO).await.unwrap());
        handle.signal(Signal::KILL).unwrap();
        assert!(handle.wait(LIMIT).await.unwrap());
        assert_eq!(VmProcess::of_pid(pid).unwrap(), None, "a dead child counts as living");
        child.wait().unwrap();
        assert!(process.open().unwrap().is_none());
        handle.signal(Signal::KILL).unwrap();
    }

    #[tokio::test]
    async fn another_process_of_the_same_number_is_left_alone() {
        let own = VmProcess::of_pid(std::process::id().try_into().unwrap()).unwrap().unwrap();
        let other = VmProcess { start_time_ticks: own.start_time_ticks + 1, ..own };
        assert!(other.open().unwrap().is_none());
        assert!(own.open().unwrap().is_some());
    }

    #[test]
    fn a_process_is_found_by_its_mark() {
        let mark = format!("mark-{}", uuid::Uuid::new_v4().simple());
        assert_eq!(VmProcess::of_mark(&mark).unwrap(), None);
        let start = |words: &[&str]| {
            let mut command = Command::new("sh");
            command.args(["-c", "read line", "sh"]).args(words).stdin(Stdio::piped());
            command.spawn().unwrap()
        };
        let argument = mark_argument(&mark);
        // Somebody who looks for it is not it.
        let mut other = start(&["-e", &argument]);
        assert_eq!(VmProcess::of_mark(&mark).unwrap(), None);
        let mut child = start(&["-chardev", &argument]);
        // Its arguments are there a moment after it is.
        let begin = Instant::now();
        let found = loop {
            if let Some(found) = VmProcess::of_mark(&mark).unwrap() {
                break found;
            }
            assert!(begin.elapsed() < LIMIT, "it is not found");
            std::thread::sleep(WAIT_POLL);
        };
        assert_eq!(u32::try_from(found.pid).unwrap(), child.id());
        for child in [&mut child, &mut other] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!(VmProcess::of_mark(&mark).unwrap(), None);
    }

    #[test]
    fn a_process_that_is_about_to_end_has_no_memory() {
        let line = |state: &str, memory: u64| {
            format!(
                "7 (a) b (c) {state} 1 7 7 0 -1 0 0 0 0 0 1 2 0 0 20 0 4 0 4711 {memory} 99 0\n"
            )
        };
        let stat = Stat::parse(&line("S", 4096)).unwrap().unwrap();
        assert_eq!((stat.start_time_ticks, stat.memory_bytes), (4711, 4096));
        assert_eq!(Stat::parse(&line("R", 0)).unwrap().unwrap().memory_bytes, 0);
        assert!(Stat::parse(&line("Z", 0)).unwrap().is_none());
        assert!(Stat::parse("7 (a) S 1").is_err());
        let own = Stat::of(std::process::id().try_into().unwrap()).unwrap().unwrap();
        assert!(own.memory_bytes > 1 << 20);
    }

    #[test]
    fn a_pid_file_that_is_not_locked_names_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        assert_eq!(VmProcess::of_pid_file(&path).unwrap(), None);
        std::fs::write(&path, std::process::id().to_string()).unwrap();
        assert_eq!(VmProcess::of_pid_file(&path).unwrap(), None);
    }
}
