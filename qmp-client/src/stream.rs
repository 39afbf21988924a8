// SPDX-License-Identifier: MIT OR Apache-2.0
//! The byte stream below a session: a Unix socket, or TCP in tests.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd as _, OwnedFd},
};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::{
    io::Interest,
    net::{TcpStream, UnixStream},
};

/// At most this many descriptors travel with one command.
pub(crate) const MAX_FDS: usize = 4;

/// A connected socket.
#[derive(Debug)]
#[non_exhaustive]
pub enum Stream {
    /// A Unix socket; passes descriptors.
    Unix(UnixStream),
    /// A TCP connection.
    Tcp(TcpStream),
}

impl From<UnixStream> for Stream {
    fn from(stream: UnixStream) -> Self {
        Self::Unix(stream)
    }
}

impl From<TcpStream> for Stream {
    fn from(stream: TcpStream) -> Self {
        Self::Tcp(stream)
    }
}

impl Stream {
    /// Whether descriptors can be passed.
    pub(crate) fn passes_fds(&self) -> bool {
        matches!(self, Self::Unix(_))
    }

    /// Reads what is there; 0 at the end. Safe to cancel.
    pub(crate) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let result = match self {
                Self::Unix(stream) => {
                    stream.readable().await?;
                    stream.try_read(buffer)
                }
                Self::Tcp(stream) => {
                    stream.readable().await?;
                    stream.try_read(buffer)
                }
            };
            match result {
                Err(e) if is_retry(&e) => {}
                result => return result,
            }
        }
    }

    /// Writes everything. When cancelled, a part may have been written.
    pub(crate) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let result = match self {
                Self::Unix(stream) => {
                    stream.writable().await?;
                    stream.try_write(bytes)
                }
                Self::Tcp(stream) => {
                    stream.writable().await?;
                    stream.try_write(bytes)
                }
            };
            match result {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => bytes = &bytes[written..],
                Err(e) if is_retry(&e) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Writes everything; the descriptors go with the first byte.
    pub(crate) async fn write_all_with_fds(&self, bytes: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
        if fds.is_empty() {
            return self.write_all(bytes).await;
        }
        let Self::Unix(stream) = self else {
            return Err(io::Error::other("descriptors pass through Unix sockets only"));
        };
        let written =
            stream.async_io(Interest::WRITABLE, || send_with_fds(stream, bytes, fds)).await?;
        self.write_all(&bytes[written..]).await
    }
}

fn send_with_fds(stream: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> io::Result<usize> {
    let borrowed: Vec<_> = fds.iter().map(OwnedFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(io::Error::other(format!("at most {MAX_FDS} descriptors go with a command")));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut control, flags)?)
}

fn is_retry(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
