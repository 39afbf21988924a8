// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the documents and the examples promise to those who write host tools.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal, kill_process};
use system_tests::qemu::{bin_dir, workspace};
use system_tests::{docs, storage};

#[allow(dead_code, reason = "its main function is for those who run it by hand")]
#[path = "../../qmp-client/examples/backup.rs"]
mod example;

/// The daemon that a document starts is ended if the document does not come to its end.
struct Daemon {
    folder: PathBuf,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let Ok(text) = fs::read_to_string(self.folder.join("qsd.pid")) else { return };
        let Some(pid) = text.trim().parse().ok().and_then(Pid::from_raw) else { return };
        let command = fs::read(Path::new("/proc").join(text.trim()).join("cmdline"));
        let folder = self.folder.display().to_string();
        // Another process may have the number by now.
        if command.is_ok_and(|command| String::from_utf8_lossy(&command).contains(&folder)) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

#[tokio::test]
async fn every_command_of_the_session_by_hand_does_what_is_shown() {
    let parent = storage::folder().unwrap();
    // The document makes it itself.
    let folder = parent.path().join("demo");
    let _daemon = Daemon { folder: folder.clone() };
    let document = workspace().join("docs/qmp.md");
    if let Err(error) = docs::check(&document, &folder).await {
        panic!("{error:#}");
    }
}

#[tokio::test]
async fn the_example_of_the_client_reads_the_point_in_time() {
    let copy = example::backup(&bin_dir().unwrap().join("qemu-storage-daemon")).await.unwrap();
    assert_eq!(copy.len(), 64 << 20);
    assert_eq!(&copy[..3], b"old");
    assert!(copy[3..].iter().all(|&byte| byte == 0));
}
