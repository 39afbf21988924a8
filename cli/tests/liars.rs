// SPDX-License-Identifier: MIT OR Apache-2.0
//! A program as a provider that lies about its archive: the restore fails with an error that says how, and
//! nothing is left of it.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const LIAR: &str = include_str!("liar.py");
/// What each lie is told as.
const LIES: &[(&str, &str)] = &[
    ("short", "the archive announced 1048576 bytes, but the provider offers 524288"),
    ("long", "the archive announced 1048576 bytes, but the provider offers 2097152"),
    ("other-size", "the archive announced 4096 bytes, but the provider offers 1048576"),
    ("huge-size", "has the bad size of 18446744073709551615 bytes"),
    ("bad-number", "is no decimal number of 64 bits"),
    ("link", "cannot open the provider's file"),
    ("socket", "is not in the private directory"),
    ("relative", "is not absolute"),
    ("directory", "is neither a file nor a block device"),
    ("device", "is neither a file nor a block device"),
    ("gone", "cannot open the provider's file"),
    ("odd-device", "a disk with the bad name '../../scsi0'"),
    ("huge-device", "a disk with the bad name 'sss"),
    ("many", "a line of more than 1048576 bytes"),
    ("twins", "has the disk 'scsi0' twice"),
    ("no-config", "the archive has no configuration"),
    ("odd-config", "The configuration is not text"),
    ("endless", "a line of more than 1048576 bytes"),
    ("other-answer", "which was not asked or is answered already"),
    ("dies", "has ended (exit status: 7)"),
];

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self { dir: tempfile::tempdir().unwrap() };
        for name in ["etc", "lib/providers", "store", "local"] {
            fs::create_dir_all(place.path(name)).unwrap();
        }
        let (store, local) = (place.path("store"), place.path("local"));
        let text = format!(
            "liar: store\n\tpath {}\n\ndir: local\n\tpath {}\n\tcontent images\n",
            store.display(),
            local.display()
        );
        fs::write(place.path("etc/storage.cfg"), text).unwrap();
        // Renamed into place: a file that is still open for writing cannot be executed.
        fs::write(place.path("new"), LIAR).unwrap();
        fs::set_permissions(place.path("new"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(place.path("new"), place.path("lib/providers/liar")).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn restore(&self, lie: &str) -> Command {
        fs::write(self.path("store/lie"), lie).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_vzdump"));
        command.arg("--root").arg(self.dir.path());
        command.args(["restore", "store:backup/a", "200", "--storage", "local", "--format", "raw"]);
        command
    }

    fn assert_nothing_made(&self, lie: &str) {
        let config = self.path("etc/qemu-server/200.conf");
        assert!(!config.exists(), "{lie}");
        assert_eq!(files_in(&self.path("local")), [""; 0].map(PathBuf::from), "{lie}");
    }
}

/// All files below a directory.
fn files_in(dir: &Path) -> Vec<PathBuf> {
    let (mut open, mut files) = (vec![dir.to_owned()], Vec::new());
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { open.push(path) } else { files.push(path) }
        }
    }
    files
}

fn said(output: &Output) -> String {
    [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat()
}

#[test]
fn each_lie_of_a_program_about_its_archive_is_told_and_leaves_nothing() {
    let place = Place::new();
    for (lie, fault) in LIES {
        let output = place.restore(lie).output().unwrap();
        let text = said(&output);
        assert_eq!(output.status.code(), Some(255), "{lie}: {text}");
        assert!(text.contains(fault), "{lie}: {text}");
        assert!(text.len() < 8192, "{lie} is told in {} bytes", text.len());
        place.assert_nothing_made(lie);
    }
    // Without a lie all of it is good.
    let output = place.restore("none").output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert_eq!(files_in(&place.path("local")).len(), 1);
}

#[test]
fn an_archive_that_is_listed_twice_is_shown_once_and_told() {
    let place = Place::new();
    let list = |lie: &str| {
        fs::write(place.path("store/lie"), lie).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_vzdump"));
        command.arg("--root").arg(place.dir.path()).arg("list").output().unwrap()
    };
    let rows = |output: &Output| said(output).matches("store:backup/a ").count();
    let honest = list("none");
    assert_eq!((honest.status.code(), rows(&honest)), (Some(0), 1), "{}", said(&honest));
    let liar = list("twice");
    let text = said(&liar);
    assert_eq!((liar.status.code(), rows(&liar)), (Some(1), 1), "{text}");
    let told =
        "store: The provider lists the archive 'a' 2 times, which is a fault of the provider";
    assert_eq!(text.matches(told).count(), 1, "{text}");
}

#[test]
fn a_restore_that_is_never_answered_can_be_ended_and_leaves_nothing() {
    let place = Place::new();
    let mut command = place.restore("never");
    let mut restore = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    // It is asked when the file of the disk is there.
    let deadline = Instant::now() + Duration::from_secs(60);
    while !place.path("store/disk").exists() {
        assert!(Instant::now() < deadline && restore.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(10));
    }
    let pid = restore.id().to_string();
    assert!(Command::new("kill").args(["-s", "INT", &pid]).status().unwrap().success());
    let begin = Instant::now();
    assert_eq!(restore.wait().unwrap().code(), Some(255));
    assert!(begin.elapsed() < Duration::from_secs(40), "{:?}", begin.elapsed());
    place.assert_nothing_made("never");
}
