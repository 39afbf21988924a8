// SPDX-License-Identifier: MIT OR Apache-2.0
//! A scripted QMP peer: what it reads and answers is up to each test.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used,
    reason = "each test binary uses a part and may panic"
)]

use std::{
    fs::File,
    future::Future,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use qmp_client::{Options, Session, commands::BlockdevAdd};
use serde_json::{Map, Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncWriteExt as _, Interest},
    net::UnixStream,
    process::{Child, Command},
    time::timeout,
};

/// Far more than anything here takes; only a hang reaches it.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Fails a test that hangs.
pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("the test hangs")
}

/// Limits short enough for tests that wait for them.
pub fn short() -> Options {
    Options { greeting_timeout: Duration::from_millis(100), ..Options::default() }
}

pub fn greeting() -> Value {
    json!({"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 13}, "package": "test"},
        "capabilities": ["oob"]}})
}

/// The other end of a session.
pub struct Peer {
    pub stream: UnixStream,
    buffer: Vec<u8>,
    /// Descriptors received so far.
    pub fds: Vec<OwnedFd>,
}

impl Peer {
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, buffer: Vec::new(), fds: Vec::new() }
    }

    pub async fn send_raw(&mut self, bytes: &[u8]) {
        soon(self.stream.write_all(bytes)).await.unwrap();
    }

    pub async fn send(&mut self, message: Value) {
        self.send_raw(format!("{message}\r\n").as_bytes()).await;
    }

    /// The next command; `None` when the client has closed the connection.
    pub async fn try_read(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Some(serde_json::from_slice(&line).unwrap());
            }
            if soon(self.fill()).await == 0 {
                return None;
            }
        }
    }

    pub async fn read(&mut self) -> Value {
        self.try_read().await.expect("the client closed the connection")
    }

    /// Reads a command and answers it with success.
    pub async fn serve(&mut self, result: Value) -> Value {
        let command = self.read().await;
        self.reply(&command, result).await;
        command
    }

    pub async fn reply(&mut self, command: &Value, result: Value) {
        self.send(json!({"return": result, "id": command["id"]})).await;
    }

    pub async fn fail(&mut self, command: &Value, class: &str, desc: &str) {
        let error = json!({"class": class, "desc": desc});
        self.send(json!({"error": error, "id": command["id"]})).await;
    }

    pub async fn greet(&mut self) {
        self.send(greeting()).await;
        let command = self.serve(json!({})).await;
        assert_eq!(command["execute"], "qmp_capabilities");
    }

    async fn fill(&mut self) -> usize {
        use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
        let mut chunk = vec![0; 4096];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let read = self.stream.async_io(Interest::READABLE, || {
            let iov = std::io::IoSliceMut::new(&mut chunk);
            Ok(recvmsg(&self.stream, &mut [iov], &mut control, RecvFlags::CMSG_CLOEXEC)?)
        });
        let length = read.await.unwrap().bytes;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        self.buffer.extend_from_slice(&chunk[..length]);
        length
    }
}

/// A session and its peer after the handshake.
pub async fn pair_with(options: Options) -> (Session, Peer) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut peer = Peer::new(theirs);
    let (session, ()) = tokio::join!(Session::from_stream(ours, options), peer.greet());
    (session.unwrap(), peer)
}

pub async fn pair() -> (Session, Peer) {
    pair_with(Options::default()).await
}

/// A real program: the first of `places` that exists, else the one in `PATH`. A test without its
/// program is skipped; in CI that is a failure for what CI installs or builds.
pub fn program(name: &str, places: &[&Path], in_ci: InCi) -> Option<PathBuf> {
    let in_path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&in_path).map(|folder| folder.join(name));
    let found = places.iter().map(|place| place.to_path_buf()).chain(in_path).find(|p| p.is_file());
    if found.is_none() {
        let ci = std::env::var_os("CI").is_some_and(|value| !value.is_empty());
        assert!(!ci || matches!(in_ci, InCi::Optional), "{name} is missing, and CI is set");
        println!("skipped: {name} is not installed");
    }
    found
}

/// Whether CI has a program.
pub enum InCi {
    Required,
    Optional,
}

/// A program of the patched QEMU, which `cargo xtask qemu` builds; as [`program`] when absent.
pub fn built(name: &str) -> Option<PathBuf> {
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/qemu/bin").join(name);
    if ours.is_file() {
        return Some(ours);
    }
    let ci = std::env::var_os("CI").is_some_and(|value| !value.is_empty());
    assert!(!ci, "the patched {name} is missing, and CI is set");
    println!("skipped: cargo xtask qemu has not built {name}");
    None
}

/// Size of the disks that tests make.
pub const DISK_BYTES: u64 = 4 << 20;

/// Starts a storage daemon that has nothing but its monitor.
pub async fn storage_daemon(program: PathBuf) -> Daemon {
    Daemon::start(program, &["--chardev", SOCKET, "--monitor", "chardev=qmp"]).await
}

/// Starts the patched emulator without a machine; `None` where it is not built.
pub async fn emulator() -> Option<Daemon> {
    let program = built("qemu-system-x86_64")?;
    let arguments =
        ["-machine", "none", "-nodefaults", "-display", "none", "-S", "-chardev", SOCKET];
    let monitor = ["-mon", "chardev=qmp,mode=control"];
    Some(Daemon::start(program, &[&arguments[..], &monitor[..]].concat()).await)
}

/// Adds a raw node of an empty file in the daemon's folder.
pub async fn add_raw_disk(daemon: &Daemon, session: &Session, node: &str) {
    let path = daemon.path(&format!("{node}.raw"));
    File::create_new(&path).unwrap().set_len(DISK_BYTES).unwrap();
    session.execute(raw_node(node, &path.display().to_string())).await.unwrap();
}

/// A raw node of a file, by a name that QEMU can open.
pub fn raw_node(node: &str, filename: &str) -> BlockdevAdd {
    let file = json!({"driver": "file", "filename": filename, "discard": "unmap"});
    BlockdevAdd(Map::from_iter([
        ("node-name".into(), json!(node)),
        ("driver".into(), json!("raw")),
        ("discard".into(), json!("unmap")),
        ("file".into(), file),
    ]))
}

/// The monitor's character device; programs run in the daemon's folder.
pub const SOCKET: &str = "socket,id=qmp,server=on,wait=off,path=qmp";

/// A running QEMU program with a monitor; it is killed when the test ends.
pub struct Daemon {
    folder: TempDir,
    pub child: Child,
}

impl Daemon {
    pub async fn start(program: PathBuf, arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut child = Command::new(program)
            .args(arguments)
            .current_dir(folder.path())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        wait_for_socket(&folder.path().join("qmp"), &mut child).await;
        Self { folder, child }
    }

    pub async fn connect(&self) -> Session {
        Session::connect(self.path("qmp"), Options::default()).await.unwrap()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// Waits until somebody listens; fails if the program ends before. A listener announces itself by
/// nothing but accepting.
pub async fn wait_for_socket(path: &Path, child: &mut Child) {
    soon(async {
        while std::os::unix::net::UnixStream::connect(path).is_err() {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("{} was not made: {status}", path.display());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}
