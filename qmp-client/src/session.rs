// SPDX-License-Identifier: MIT OR Apache-2.0
//! One connection to a QMP monitor.

use std::{
    collections::HashSet,
    hash::{BuildHasher as _, RandomState},
    net::SocketAddr,
    os::fd::OwnedFd,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use qapi_spec::Command;
use serde::de::DeserializeOwned;
use serde_json::{Value, value::RawValue};
use tokio::{
    net::TcpStream,
    sync::{OnceCell, Semaphore, mpsc},
    time::timeout,
};

use crate::{
    Error, EventStream, Greeting, Result, Stream, Version,
    codec::{self, IdSpace},
    commands::{QueryCommands, Quit},
    handshake::{self, Ready},
    pending::{Keep, Reply, Waiter},
    pump::{self, Outgoing, Shared},
    stream::MAX_FDS,
};

/// Commands that may wait to be written; more callers wait for room.
const QUEUE_COMMANDS: usize = 64;

/// Limits of a session.
#[derive(Debug, Clone)]
pub struct Options {
    /// How long to wait for the greeting before the monitor counts as busy. Default: 5 s.
    pub greeting_timeout: Duration,
    /// How long a command may take unless its call says otherwise. Default: 30 s.
    pub command_timeout: Duration,
    /// Longest line that is read. Default: 64 MiB.
    pub max_line_bytes: usize,
    /// Events kept for a slow reader of [`Session::events`]. Default: 1024.
    pub event_capacity: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            greeting_timeout: Duration::from_secs(5),
            command_timeout: Duration::from_secs(30),
            max_line_bytes: 64 << 20,
            event_capacity: 1024,
        }
    }
}

/// A connection to a QMP monitor; clones share it, and it closes with the last clone.
///
/// All calls may run concurrently and may be cancelled at any point by dropping their future. A
/// command that was not written yet is then not sent; otherwise its outcome is unknown and its
/// late reply is ignored.
#[derive(Debug, Clone)]
pub struct Session {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    queue: mpsc::UnboundedSender<Outgoing>,
    /// Room in `queue`, which only urgent commands may exceed.
    room: Arc<Semaphore>,
    /// One command with descriptors at a time.
    fd_turn: Arc<Semaphore>,
    next_id: AtomicU64,
    greeting: Greeting,
    command_timeout: Duration,
    passes_fds: bool,
    commands: OnceCell<HashSet<String>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.unused.cancel();
    }
}

impl Session {
    /// Connects to the Unix socket of a monitor and brings it into command mode.
    ///
    /// # Errors
    /// [`Error::Connect`], [`Error::Busy`] or [`Error::NotQemu`].
    pub async fn connect(path: impl AsRef<Path>, options: Options) -> Result<Self> {
        let path = path.as_ref();
        let ids = new_ids();
        let (stream, ready) = handshake::connect(path, &ids, &options).await?;
        Ok(Self::start(stream, path.display().to_string(), ids, ready, &options))
    }

    /// Connects over TCP. QMP has no authentication: for tests and loopback only.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn connect_tcp(address: SocketAddr, options: Options) -> Result<Self> {
        let peer = address.to_string();
        let stream = timeout(options.greeting_timeout, TcpStream::connect(address))
            .await
            .unwrap_or_else(|elapsed| Err(elapsed.into()))
            .map_err(|source| Error::Connect { path: peer.clone(), source })?;
        Self::start_on(stream.into(), peer, options).await
    }

    /// Starts on a connected socket whose peer has not been spoken to.
    ///
    /// # Errors
    /// [`Error::Busy`] or [`Error::NotQemu`].
    pub async fn from_stream(stream: impl Into<Stream>, options: Options) -> Result<Self> {
        Self::start_on(stream.into(), "The given socket".to_owned(), options).await
    }

    async fn start_on(stream: Stream, peer: String, options: Options) -> Result<Self> {
        let ids = new_ids();
        let ready = handshake::shake_hands_once(&stream, &peer, &ids, &options).await?;
        Ok(Self::start(stream, peer, ids, ready, &options))
    }

    fn start(
        stream: Stream,
        peer: String,
        ids: IdSpace,
        (greeting, framer): Ready,
        options: &Options,
    ) -> Self {
        let passes_fds = stream.passes_fds();
        let stream = Arc::new(stream);
        let shared = Arc::new(Shared::new(peer, ids, options.event_capacity));
        let (queue, commands) = mpsc::unbounded_channel();
        tokio::spawn(pump::write_commands(Arc::clone(&shared), Arc::clone(&stream), commands));
        tokio::spawn(pump::read_messages(Arc::clone(&shared), stream, framer));
        let inner = Inner {
            shared,
            queue,
            room: Arc::new(Semaphore::new(QUEUE_COMMANDS)),
            fd_turn: Arc::new(Semaphore::new(1)),
            next_id: AtomicU64::new(1),
            greeting,
            command_timeout: options.command_timeout,
            passes_fds,
            commands: OnceCell::new(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// QEMU's version, from its greeting.
    #[must_use]
    pub fn version(&self) -> &Version {
        &self.inner.greeting.version
    }

    /// Executes a command with the session's time limit.
    ///
    /// # Errors
    /// [`Error::Qmp`] if QEMU refuses or fails it, [`Error::Timeout`], [`Error::Disconnected`], or
    /// [`Error::Protocol`] if the result does not have the expected form.
    pub async fn execute<C: Command>(&self, command: C) -> Result<C::Ok> {
        self.execute_with_timeout(command, self.inner.command_timeout).await
    }

    /// Executes a command with its own time limit.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub async fn execute_with_timeout<C: Command>(
        &self,
        command: C,
        limit: Duration,
    ) -> Result<C::Ok> {
        let arguments = to_arguments(C::NAME, &command)?;
        drop(command);
        let value = self.call(C::NAME, arguments, Vec::new(), limit).await?;
        from_result(C::NAME, &value)
    }

    /// Executes a command by name. Arguments are an object, or `Null` for none; the limit defaults
    /// to the session's.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub async fn execute_raw(
        &self,
        name: &str,
        arguments: Value,
        limit: Option<Duration>,
    ) -> Result<Value> {
        check_arguments(name, &arguments)?;
        let limit = limit.unwrap_or(self.inner.command_timeout);
        let value = self.call(name, arguments, Vec::new(), limit).await?;
        from_result(name, &value)
    }

    /// Executes a command that takes a file descriptor, such as `getfd` and `add-fd`.
    ///
    /// QEMU keeps only the descriptors it received last, so these commands wait for each other.
    ///
    /// # Errors
    /// As [`Self::execute`]; [`Error::Protocol`] over TCP.
    pub async fn execute_with_fd<C: Command>(&self, command: C, fd: OwnedFd) -> Result<C::Ok> {
        self.execute_with_fd_and_timeout(command, fd, self.inner.command_timeout).await
    }

    /// The same with its own time limit, which includes the wait for such commands before it.
    ///
    /// # Errors
    /// As [`Self::execute_with_fd`].
    pub async fn execute_with_fd_and_timeout<C: Command>(
        &self,
        command: C,
        fd: OwnedFd,
        limit: Duration,
    ) -> Result<C::Ok> {
        let arguments = to_arguments(C::NAME, &command)?;
        drop(command);
        let value = self.call(C::NAME, arguments, vec![fd], limit).await?;
        from_result(C::NAME, &value)
    }

    /// Ends QEMU and returns once it has closed the connection. A guest is not asked.
    ///
    /// QEMU may be gone before its reply is sent, so that is no error here.
    ///
    /// # Errors
    /// [`Error::Timeout`] if it does not end, [`Error::Qmp`] if it refuses.
    pub async fn quit(&self) -> Result<()> {
        match self.execute(Quit).await {
            Ok(_) | Err(Error::Disconnected) => {}
            Err(error) => return Err(error),
        }
        let limit = self.inner.command_timeout;
        timeout(limit, self.closed()).await.map_err(|_elapsed| Error::timeout(Quit::NAME, limit))
    }

    /// All events from now on, for this reader.
    #[must_use]
    pub fn events(&self) -> EventStream {
        EventStream::new(self.inner.shared.subscribe())
    }

    /// Returns once the connection is gone.
    pub async fn closed(&self) {
        self.inner.shared.closed.cancelled().await;
    }

    /// Whether the connection is gone.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.inner.shared.closed.is_cancelled()
    }

    /// Whether this QEMU has a command. Asked once per session.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub async fn has_command(&self, name: &str) -> Result<bool> {
        let list = || async {
            let commands = self.execute(QueryCommands).await?;
            Ok::<_, Error>(commands.into_iter().map(|command| command.name).collect())
        };
        Ok(self.inner.commands.get_or_try_init(list).await?.contains(name))
    }

    /// Fails with [`Error::MissingFeature`] unless this QEMU has the command.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub async fn require_command(&self, name: &str) -> Result<()> {
        if self.has_command(name).await? {
            return Ok(());
        }
        Err(Error::MissingFeature { feature: format!("the command {name}") })
    }

    async fn call(
        &self,
        name: &str,
        arguments: Value,
        fds: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<Box<RawValue>> {
        timeout(limit, self.exchange(name, &arguments, fds))
            .await
            .unwrap_or_else(|_elapsed| Err(Error::timeout(name, limit)))
    }

    async fn exchange(
        &self,
        name: &str,
        arguments: &Value,
        fds: Vec<OwnedFd>,
    ) -> Result<Box<RawValue>> {
        const OPEN: &str = "the semaphores of a session are never closed";
        let inner = &self.inner;
        let mut keep = Keep::No;
        if !fds.is_empty() {
            if !inner.passes_fds || fds.len() > MAX_FDS {
                let detail = "descriptors pass one by one through Unix sockets only";
                return Err(Error::protocol(name, detail));
            }
            // Queued behind a command whose caller gave up, this waits until QEMU has answered it.
            let turn = Arc::clone(&inner.fd_turn).acquire_owned();
            let turn = self.unless_closed(turn).await?.expect(OPEN);
            keep = Keep::WithPermit { _permit: turn };
        }
        let room = Arc::clone(&inner.room).acquire_owned();
        let room = self.unless_closed(room).await?.expect(OPEN);
        let line = |id: &str| codec::encode(name, arguments, Some(id));
        let mut waiter = self.enqueue(line, keep, fds, Some(room))?;
        result_of(name, waiter.reply().await?)
    }

    /// Queues a command at once, whatever is queued already, in the order of the calls. It is sent
    /// even if the returned [`Urgent`] is dropped.
    pub(crate) fn start_urgent<C: Command>(&self, command: &C) -> Result<Urgent> {
        let arguments = to_arguments(C::NAME, command)?;
        let line = |id: &str| codec::encode(C::NAME, &arguments, Some(id));
        let waiter = self.enqueue(line, Keep::Sticky, Vec::new(), None)?;
        Ok(Urgent { session: self.clone(), name: C::NAME, waiter })
    }

    fn enqueue(
        &self,
        line: impl FnOnce(&str) -> Vec<u8>,
        keep: Keep,
        fds: Vec<OwnedFd>,
        permit: Option<tokio::sync::OwnedSemaphorePermit>,
    ) -> Result<Waiter> {
        let inner = &self.inner;
        let id = inner.next_id.fetch_add(1, Ordering::Relaxed);
        let waiter = inner.shared.pending.register(id, keep)?;
        let line = line(&inner.shared.ids.text(id));
        let outgoing = Outgoing { id, line, fds, permit };
        inner.queue.send(outgoing).map_err(|_closed| Error::Disconnected)?;
        Ok(waiter)
    }

    async fn unless_closed<T>(&self, wait: impl Future<Output = T>) -> Result<T> {
        tokio::select! {
            biased;
            () = self.inner.shared.closed.cancelled() => Err(Error::Disconnected),
            value = wait => Ok(value),
        }
    }
}

fn new_ids() -> IdSpace {
    IdSpace::new(RandomState::new().hash_one("session"))
}

/// A queued command that holds its session open until the reply is there.
#[derive(Debug)]
pub(crate) struct Urgent {
    /// QEMU drops queued commands of a connection that closes.
    session: Session,
    name: &'static str,
    waiter: Waiter,
}

impl Urgent {
    /// Waits for the result.
    pub(crate) async fn finish<T: DeserializeOwned>(mut self, limit: Duration) -> Result<T> {
        let reply = timeout(limit, self.waiter.reply())
            .await
            .map_err(|_elapsed| Error::timeout(self.name, limit))??;
        let value = result_of(self.name, reply)?;
        drop(self.session);
        from_result(self.name, &value)
    }
}

fn result_of(name: &str, reply: Reply) -> Result<Box<RawValue>> {
    match reply {
        Reply::Return(value) => Ok(value),
        Reply::Error { class, desc } => Err(Error::Qmp { command: name.to_owned(), class, desc }),
        Reply::Unreadable(detail) => Err(Error::protocol(name, detail)),
    }
}

fn to_arguments<C: Command>(name: &str, command: &C) -> Result<Value> {
    let arguments = serde_json::to_value(command).map_err(|e| Error::protocol(name, e))?;
    check_arguments(name, &arguments)?;
    Ok(arguments)
}

/// QEMU would answer a call with other arguments by an error without an id.
fn check_arguments(name: &str, arguments: &Value) -> Result<()> {
    if arguments.is_object() || arguments.is_null() {
        return Ok(());
    }
    Err(Error::protocol(name, "the arguments are not an object"))
}

fn from_result<T: DeserializeOwned>(name: &str, value: &RawValue) -> Result<T> {
    serde_json::from_str(value.get())
        .map_err(|e| Error::protocol(name, format!("the result has an unexpected form: {e}")))
}
