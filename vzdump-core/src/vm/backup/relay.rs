// SPDX-License-Identifier: MIT OR Apache-2.0
//! A way of our own to one disk's export: a socket between QEMU and whoever reads the disk, for what QEMU
//! itself does not do.
//!
//! With a bandwidth limit all that QEMU sends waits for its turn in the budget; why this is not done
//! within QEMU is in `docs/design/0013`. For a disk that is offered as a file, writes of zeroes become
//! trims ([`requests`]). All else is passed on as it is, so everything that the export can do works
//! as without it. Requests are not held up: a trim or a question about a bitmap costs next to nothing.

mod requests;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{JoinHandle, JoinSet};

use crate::bandwidth::DiskShare;
use crate::layout::check_socket_path;

/// The most connections to one disk; more are closed at once.
const CONNECTIONS_MAX: usize = 16;
/// After a connection that could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// What is passed on in one turn.
const CHUNK_BYTES: usize = 64 << 10;

/// What happens on the way.
#[derive(Debug, Clone, Default)]
pub(super) struct Passing {
    /// What QEMU sends waits for its turn in this.
    pub(super) share: Option<DiskShare>,
    /// Writes of zeroes that need not leave space behind become trims.
    pub(super) trims_zeroes: bool,
}

impl Passing {
    /// Whether it differs from no way of our own.
    pub(super) fn does_something(&self) -> bool {
        self.share.is_some() || self.trims_zeroes
    }
}

/// A way to one disk's export. Dropping it closes all connections.
#[derive(Debug)]
pub(super) struct Relay {
    socket: PathBuf,
    task: JoinHandle<()>,
}

impl Relay {
    /// Listens at `socket`, for clients of the server at `upstream`.
    pub(super) fn open(socket: PathBuf, upstream: PathBuf, passing: Passing) -> io::Result<Self> {
        check_socket_path(&socket).map_err(io::Error::other)?;
        let listener = UnixListener::bind(&socket)?;
        let task = tokio::spawn(serve(listener, upstream, passing));
        Ok(Self { socket, task })
    }

    /// Where the provider connects.
    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // The connections belong to the task.
        self.task.abort();
    }
}

async fn serve(listener: UnixListener, upstream: PathBuf, passing: Passing) {
    let mut connections = JoinSet::new();
    let mut is_refused = false;
    loop {
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            // For a while, such as for want of file descriptors: whoever connects waits for us.
            Err(error) => {
                if !std::mem::replace(&mut is_refused, true) {
                    tracing::warn!(%error, "no new connections to a disk for now");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        is_refused = false;
        while connections.try_join_next().is_some() {}
        if connections.len() < CONNECTIONS_MAX {
            let (upstream, passing) = (upstream.clone(), passing.clone());
            connections.spawn(async move {
                if let Err(error) = connect(client, &upstream, &passing).await {
                    tracing::debug!(%error, "a connection to a disk ended");
                }
            });
        }
    }
}

/// Passes on one connection until QEMU's side of it ends.
async fn connect(client: UnixStream, upstream: &Path, passing: &Passing) -> io::Result<()> {
    let (from_qemu, mut to_qemu) = UnixStream::connect(upstream).await?.into_split();
    let (mut from_client, to_client) = client.into_split();
    let requests = async {
        let copied = if passing.trims_zeroes {
            requests::pass_on(&mut BufReader::new(from_client), &mut to_qemu).await
        } else {
            tokio::io::copy(&mut from_client, &mut to_qemu).await.map(drop)
        };
        // QEMU then closes its side.
        to_qemu.shutdown().await?;
        copied
    };
    let replies = pass_on(from_qemu, to_client, passing.share.as_ref());
    tokio::pin!(requests, replies);
    tokio::select! {
        replies = &mut replies => return replies,
        requests = &mut requests => requests?,
    }
    replies.await
}

async fn pass_on(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    share: Option<&DiskShare>,
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return to.shutdown().await;
        }
        if let Some(share) = share {
            share.pass(count as u64).await;
        }
        to.write_all(&buffer[..count]).await?;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::bandwidth::Budget;

    /// A server that answers every byte with as many bytes as its value says KiB.
    async fn answer(listener: UnixListener) {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                while let Ok(wanted) = stream.read_u8().await {
                    let reply = vec![wanted; usize::from(wanted) << 10];
                    stream.write_all(&reply).await.unwrap();
                }
            });
        }
    }

    #[tokio::test]
    async fn bytes_pass_unchanged_at_the_rate_over_all_connections() {
        let dir = tempfile::tempdir().unwrap();
        let upstream = dir.path().join("nbd");
        tokio::spawn(answer(UnixListener::bind(&upstream).unwrap()));
        let budget = Budget::new(1 << 20);
        let share = budget.guest().disk();
        let passing = Passing { share: Some(share), ..Passing::default() };
        let disk = Relay::open(dir.path().join("lim0"), upstream, passing).unwrap();
        let start = Instant::now();
        let read = async || {
            let mut client = UnixStream::connect(disk.socket()).await.unwrap();
            for wanted in [200_u8, 0, 100] {
                client.write_u8(wanted).await.unwrap();
                let mut reply = vec![0; usize::from(wanted) << 10];
                client.read_exact(&mut reply).await.unwrap();
                assert!(reply.iter().all(|&byte| byte == wanted));
            }
            client.shutdown().await.unwrap();
            assert_eq!(client.read(&mut [0]).await.unwrap(), 0, "the end is passed on");
        };
        tokio::join!(read(), read());
        // 600 KiB at 1 MiB/s, less what may come at once.
        assert!(start.elapsed() >= Duration::from_millis(450), "{:?}", start.elapsed());
        let mut client = UnixStream::connect(disk.socket()).await.unwrap();
        drop(disk);
        assert_eq!(client.read(&mut [0]).await.unwrap_or(0), 0, "dropped, but not closed");
    }

    const FEW_FILES: &str = "VZDUMP_TEST_FEW_FILES";

    /// Not a test: run with few file descriptors, all of which it uses up for a while.
    #[tokio::test]
    async fn few_files_entry() {
        if std::env::var_os(FEW_FILES).is_none() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let upstream = dir.path().join("nbd");
        tokio::spawn(answer(UnixListener::bind(&upstream).unwrap()));
        let disk = Relay::open(dir.path().join("lim0"), upstream, Passing::default()).unwrap();
        let mut files = Vec::new();
        while let Ok(file) = std::fs::File::open("/dev/null") {
            files.push(file);
        }
        files.pop();
        let mut client = UnixStream::connect(disk.socket()).await.unwrap();
        // It cannot be accepted.
        tokio::time::sleep(ACCEPT_PAUSE * 2).await;
        files.clear();
        client.write_u8(1).await.unwrap();
        let mut reply = vec![0; 1 << 10];
        tokio::time::timeout(Duration::from_secs(20), client.read_exact(&mut reply))
            .await
            .expect("the way to the disk has ended")
            .unwrap();
    }

    #[test]
    fn a_want_of_file_descriptors_does_not_end_the_way_to_a_disk() {
        let entry = "vm::backup::relay::tests::few_files_entry";
        let ended = std::process::Command::new("sh")
            .args(["-c", "ulimit -n 64; exec \"$0\" --exact \"$1\""])
            .arg(std::env::current_exe().unwrap())
            .arg(entry)
            .env(FEW_FILES, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&ended.stdout);
        assert!(ended.status.success() && said.contains("1 passed"), "{said}");
    }
}
