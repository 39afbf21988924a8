// SPDX-License-Identifier: MIT OR Apache-2.0
//! The way of a command's output through this process, at the pace of a budget: a provider may read no faster, whatever
//! it does with the limit that it is told.

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::thread::JoinHandle;
use std::time::Duration;

use provider_api::CancellationToken;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::runtime::Handle;
use tokio_util::sync::DropGuard;
use vzdump_core::bandwidth::DiskShare;

/// What passes in one turn.
const CHUNK_BYTES: usize = 64 << 10;
/// What a pipe that has room takes without waiting (`PIPE_BUF`).
const ROOM_BYTES: usize = 4 << 10;
/// Between two looks at whether anybody still waits for the output.
const LOOK: Duration = Duration::from_millis(200);

/// A thread that passes on what a command writes. Dropping it ends it soon.
#[derive(Debug)]
pub(crate) struct Passing {
    thread: JoinHandle<io::Result<()>>,
    _end: DropGuard,
}

impl Passing {
    /// What is written to the pipe comes to `to` at the pace of the share.
    pub(crate) fn start(
        to: OwnedFd,
        share: DiskShare,
        runtime: Handle,
    ) -> io::Result<(PipeWriter, Self)> {
        let (reader, writer) = io::pipe()?;
        let cancel = CancellationToken::new();
        let end = cancel.clone().drop_guard();
        let work = move || pass_on(reader, &File::from(to), (&share, &runtime), &cancel);
        let thread = std::thread::Builder::new().name("ct-pace".to_owned()).spawn(work)?;
        Ok((writer, Self { thread, _end: end }))
    }

    /// Whether all has been passed on, or cannot be.
    pub(crate) fn is_over(&self) -> bool {
        self.thread.is_finished()
    }

    /// Why not all could be passed on; nothing if whoever read it wants no more, which the command notices.
    pub(crate) fn result(self) -> io::Result<()> {
        match self.thread.join() {
            Ok(Err(error)) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
            Ok(_) => Ok(()),
            Err(_) => Err(io::Error::other("the thread that passes it on has failed")),
        }
    }
}

fn pass_on(
    mut from: PipeReader,
    to: &File,
    (share, runtime): (&DiskShare, &Handle),
    cancel: &CancellationToken,
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        // Ends with the command at the latest.
        let count = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        let passed = cancel.run_until_cancelled(share.pass(count as u64));
        if runtime.block_on(passed).is_none() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        write_all(to, &buffer[..count], cancel)?;
    }
}

/// Writes without waiting for ever for somebody who does not read.
fn write_all(mut to: &File, mut bytes: &[u8], cancel: &CancellationToken) -> io::Result<()> {
    let look = Timespec::try_from(LOOK).map_err(io::Error::other)?;
    while !bytes.is_empty() {
        if cancel.is_cancelled() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        match poll(&mut [PollFd::from_borrowed_fd(to.as_fd(), PollFlags::OUT)], Some(&look)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        match to.write(&bytes[..bytes.len().min(ROOM_BYTES)]) {
            Ok(count) => bytes = &bytes[count..],
            // Of a socket, or of one that somebody made so.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                ) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use vzdump_core::bandwidth::Budget;

    use super::*;

    const RATE: u64 = 1 << 20;

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn what_a_command_writes_comes_whole_and_not_faster_than_it_may() {
        let (mut reader, to) = io::pipe().unwrap();
        let share = Budget::new(RATE).guest().disk();
        let started = Instant::now();
        let (mut writer, passing) = Passing::start(to.into(), share, Handle::current()).unwrap();
        let sent: Vec<u8> = (0..RATE).map(|number| (number % 251) as u8).collect();
        let expected = sent.clone();
        let reading = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all
        });
        let writing = std::thread::spawn(move || writer.write_all(&sent).unwrap());
        tokio::task::spawn_blocking(move || {
            writing.join().unwrap();
            assert!(reading.join().unwrap() == expected);
            passing.result().unwrap();
        })
        .await
        .unwrap();
        // A burst of a tenth of a second may be free.
        assert!(started.elapsed() >= Duration::from_millis(850), "{:?}", started.elapsed());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn nobody_who_reads_and_nobody_who_waits_end_it() {
        let share = Budget::new(RATE << 10).guest().disk();
        // The command is told that nobody reads.
        let (reader, to) = io::pipe().unwrap();
        let (mut writer, passing) =
            Passing::start(to.into(), share.clone(), Handle::current()).unwrap();
        drop(reader);
        tokio::task::spawn_blocking(move || {
            let error = writer.write_all(&vec![1; 1 << 20]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
            passing.result().unwrap();
        })
        .await
        .unwrap();
        // Somebody has the pipe and does not read it, and nobody waits for the command any more.
        let (_reader, to) = io::pipe().unwrap();
        let (mut writer, passing) = Passing::start(to.into(), share, Handle::current()).unwrap();
        let writing = std::thread::spawn(move || writer.write_all(&vec![1; 1 << 20]));
        drop(passing);
        tokio::task::spawn_blocking(move || assert!(writing.join().unwrap().is_err()))
            .await
            .unwrap();
    }
}
