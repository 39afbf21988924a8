// SPDX-License-Identifier: MIT OR Apache-2.0
//! One `qemu-nbd` that serves one disk of an archive on a private socket.
//!
//! The images are given to it one by one as an explicit graph, so that it opens what was checked
//! and never follows a name in an image's header. The process dies with this one: it is started
//! through `setpriv --pdeathsig`, whose signal belongs to the *thread* that starts a process; so a
//! thread of its own starts it, waits for it and outlives it.

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use provider_api::{Error, Kind, Result};
use tokio::sync::oneshot;

use crate::call::invalid;
use crate::chain::Chain;
use crate::limits::{SERVER_CLIENTS, SERVER_OUTPUT_BYTES, SERVER_START_RETRY, SERVER_START_WAIT};

/// Longest path of a Unix socket on Linux, without the terminating zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// How often the thread looks whether the process has ended.
const LOOK: Duration = Duration::from_millis(200);

/// A running server; dropping it ends it.
#[derive(Debug)]
pub(crate) struct Server {
    socket: PathBuf,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts a server and waits until it listens.
    pub(crate) async fn start(
        qemu_nbd: &Path,
        chain: &Chain,
        socket: PathBuf,
        export: &str,
    ) -> Result<Self> {
        if socket.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            return Err(invalid(format!(
                "Socket path {} is longer than {SOCKET_PATH_BYTES_MAX} bytes; use a shorter run \
                 directory.",
                socket.display()
            )));
        }
        let command = command(qemu_nbd, chain, &socket, export)?;
        let (stop, stopped) = channel();
        let (ready, is_ready) = oneshot::channel();
        let path = socket.clone();
        let thread = std::thread::Builder::new()
            .name("restore-server".to_owned())
            .spawn(move || serve(command, &path, ready, &stopped))
            .map_err(|e| Error::io("Cannot start a thread for qemu-nbd.", e))?;
        // From here on a drop of this future ends the server again.
        let server = Self { socket, stop: Some(stop), thread: Some(thread) };
        match is_ready.await {
            Ok(Ok(())) => Ok(server),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::new(Kind::Other, "The thread of qemu-nbd ended unexpectedly.")),
        }
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Ends the server and waits for its end; blocks for some milliseconds.
    pub(crate) fn stop(mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::warn!("The thread of a qemu-nbd ended unexpectedly.");
        }
    }
}

/// The process, ended when this is dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if it is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn command(qemu_nbd: &Path, chain: &Chain, socket: &Path, export: &str) -> Result<Command> {
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL"])
        .arg(qemu_nbd)
        .args(["--read-only", "--persistent", "--cache=writeback"])
        .arg(format!("--shared={SERVER_CLIENTS}"))
        .arg("--socket")
        .arg(socket)
        .arg("--export-name")
        .arg(export)
        .arg(graph(chain)?)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    Ok(command)
}

/// The chain as a block graph; the lowest image has no backing whatever its header says.
fn graph(chain: &Chain) -> Result<String> {
    let mut below = serde_json::Value::Null;
    for link in chain.links().iter().rev() {
        let name = link
            .path
            .to_str()
            .ok_or_else(|| invalid(format!("Path {} is not UTF-8.", link.path.display())))?;
        below = serde_json::json!({
            "driver": "qcow2",
            "read-only": true,
            "file": {"driver": "file", "filename": name, "read-only": true},
            "backing": below,
        });
    }
    Ok(format!("json:{below}"))
}

fn serve(
    mut command: Command,
    socket: &Path,
    ready: oneshot::Sender<Result<()>>,
    stopped: &Receiver<()>,
) {
    let mut process = match command.spawn() {
        Ok(child) => Process(child),
        Err(e) => {
            let what = format!("Cannot run {}.", command.get_program().display());
            // Nobody waits any more if this fails.
            let _ = ready.send(Err(Error::io(what, e)));
            return;
        }
    };
    let outcome = wait_until_listening(&mut process, socket, stopped);
    let is_listening = outcome.is_ok();
    let _ = ready.send(outcome);
    if is_listening {
        wait_for_end(&mut process, stopped);
    }
    drop(process);
    if let Err(e) = std::fs::remove_file(socket)
        && e.kind() != ErrorKind::NotFound
    {
        tracing::warn!("Cannot remove socket {}: {e}", socket.display());
    }
}

fn wait_until_listening(
    process: &mut Process,
    socket: &Path,
    stopped: &Receiver<()>,
) -> Result<()> {
    let until = Instant::now() + SERVER_START_WAIT;
    loop {
        // A connection without a word is what a port scan looks like; qemu-nbd goes on.
        if UnixStream::connect(socket).is_ok() {
            return Ok(());
        }
        if process.0.try_wait().is_ok_and(|status| status.is_some()) {
            return Err(Error::new(
                Kind::Other,
                format!("qemu-nbd ended: {}", error_output(process)),
            ));
        }
        if Instant::now() >= until {
            return Err(Error::new(Kind::Other, "qemu-nbd did not begin to listen."));
        }
        if !matches!(stopped.recv_timeout(SERVER_START_RETRY), Err(RecvTimeoutError::Timeout)) {
            return Err(Error::new(Kind::Cancelled, "The start of qemu-nbd was cancelled."));
        }
    }
}

fn wait_for_end(process: &mut Process, stopped: &Receiver<()>) {
    loop {
        if !matches!(stopped.recv_timeout(LOOK), Err(RecvTimeoutError::Timeout)) {
            return;
        }
        if let Ok(Some(status)) = process.0.try_wait() {
            tracing::warn!("qemu-nbd ended by itself ({status}): {}", error_output(process));
            return;
        }
    }
}

/// What an ended process wrote to its error output, shortened.
fn error_output(process: &mut Process) -> String {
    let mut text = Vec::new();
    if let Some(output) = process.0.stderr.take() {
        // An incomplete message is better than none.
        let _ = output.take(SERVER_OUTPUT_BYTES as u64).read_to_end(&mut text);
    }
    String::from_utf8_lossy(&text).trim().replace('\n', "; ")
}
