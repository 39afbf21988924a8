// SPDX-License-Identifier: MIT OR Apache-2.0
//! Real servers as child processes: each has a private socket and dies with its handle.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use provider_nbd::{Client, Options};
use tempfile::TempDir;

const START_LIMIT: Duration = Duration::from_secs(20);

/// A server and the directory with its socket and images.
pub(crate) struct Peer {
    child: Child,
    dir: TempDir,
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn temp_dir() -> TempDir {
    TempDir::with_prefix("nbd-peer-").expect("a temporary directory")
}

fn missing(tool: &str, error: &std::io::Error) -> ! {
    let package = match tool {
        "nbdkit" => "nbdkit",
        "nbdinfo" | "nbdcopy" => "libnbd-bin",
        _ => "qemu-utils",
    };
    panic!("This test needs the program '{tool}' of the Debian package '{package}': {error}.")
}

/// Runs a tool to its end and returns what it printed.
pub(crate) fn run<S: AsRef<OsStr>>(tool: &str, args: impl IntoIterator<Item = S>) -> String {
    let output = Command::new(tool)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| missing(tool, &error));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tool} failed: {stderr}");
    String::from_utf8(output.stdout).expect("text")
}

impl Peer {
    /// Starts a server; `args` gets the directory and the path of the socket.
    pub(crate) fn start(
        tool: &str,
        dir: TempDir,
        args: impl FnOnce(&Path, String) -> Vec<String>,
    ) -> Self {
        let socket = dir.path().join("s");
        let args = args(dir.path(), socket.to_str().expect("text").to_owned());
        let stderr = File::create(dir.path().join("stderr")).expect("a file for messages");
        let child = Command::new(tool)
            .args(&args)
            .stdin(Stdio::null())
            .stderr(stderr)
            .spawn()
            .unwrap_or_else(|error| missing(tool, &error));
        let mut peer = Self { child, dir };
        peer.wait_until_it_listens(tool, &args);
        peer
    }

    fn wait_until_it_listens(&mut self, tool: &str, args: &[String]) {
        let begin = Instant::now();
        while std::os::unix::net::UnixStream::connect(self.socket()).is_err() {
            if let Some(status) = self.child.try_wait().expect("status of the server") {
                let words = std::fs::read_to_string(self.dir.path().join("stderr"));
                panic!("{tool} {args:?} ended with {status} instead of serving: {words:?}");
            }
            assert!(begin.elapsed() < START_LIMIT, "{tool} {args:?} does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    /// An address for the tools of libnbd.
    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    pub(crate) async fn connect(&self, export: &str, contexts: &[&str]) -> Client {
        let options = Options {
            contexts: contexts.iter().map(|&name| name.to_owned()).collect(),
            connections: 4,
            timeout: Some(Duration::from_secs(20)),
            ..Options::default()
        };
        Client::connect_unix(self.socket(), export, options).await.expect("the client connects")
    }
}

/// Bytes that differ everywhere and from seed to seed.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}
