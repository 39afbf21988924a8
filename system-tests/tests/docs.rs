// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the documents and the examples promise to those who write host tools.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use system_tests::process::Stop;
use system_tests::qemu::{bin_dir, workspace};
use system_tests::vzdump::Vzdump;
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
async fn a_stranger_comes_from_nothing_to_a_provider_that_passes_checks() {
    let parent = storage::folder().unwrap();
    let document = workspace().join("docs/writing-a-provider.md");
    if let Err(error) = docs::check(&document, &parent.path().join("demo")).await {
        panic!("{error:#}");
    }
}

/// What the README of a new provider in Python says, word for word, but with two of the checks.
#[test]
fn the_readme_of_a_new_provider_says_how_to_try_it() {
    let folder = storage::folder().unwrap();
    let vzdump = Vzdump::find(&folder.path().join("root"), false, &Stop::default()).unwrap();
    let provider = folder.path().join("own");
    let new = ["provider", "new", provider.to_str().unwrap(), "--language", "python"];
    vzdump.run(&new, Duration::from_secs(60)).unwrap();
    let readme = fs::read_to_string(provider.join("README.md")).unwrap();
    let commands = readme.split("```").nth(1).unwrap();
    assert!(commands.contains("vzdump --root try provider check mine\n"), "{commands}");
    let commands = commands.replace("check mine", "check mine --only full --only abort");
    let mut shell = Command::new("bash");
    let output =
        vzdump.installed(&mut shell).args(["-ec", &commands]).current_dir(&provider).output();
    let output = output.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("file store: conforming (2 passed, 0 failed"), "{text}");
}

#[tokio::test]
async fn the_example_of_the_client_reads_the_point_in_time() {
    let copy = example::backup(&bin_dir().unwrap().join("qemu-storage-daemon")).await.unwrap();
    assert_eq!(copy.len(), 64 << 20);
    assert_eq!(&copy[..3], b"old");
    assert!(copy[3..].iter().all(|&byte| byte == 0));
}
