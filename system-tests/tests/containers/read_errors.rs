// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk with a sector that cannot be read: QEMU's storage daemon offers a volume's image as a file, with an error
//! injected where one file has its last block.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::json;
use system_tests::process::Guarded;
use system_tests::qemu;

use crate::scene::{Scene, wait_for};

const SECTOR_BYTES: u64 = 512;
/// Longer than what is read ahead of one page.
const FILE_BYTES: usize = 1 << 20;

/// An image in which one sector cannot be read, at the place of the image itself.
struct BadImage {
    path: PathBuf,
    _daemon: Guarded,
}

impl BadImage {
    fn offer(path: &Path, bad_sector: u64) -> Self {
        let real = path.with_extension("real");
        std::fs::rename(path, &real).unwrap();
        let size = std::fs::metadata(&real).unwrap().len();
        std::fs::write(path, "").unwrap();
        let node = json!({ "driver": "blkdebug", "node-name": "bad",
            "image": { "driver": "raw", "file": { "driver": "file", "filename": real } },
            "inject-error": [{ "event": "none", "iotype": "read", "sector": bad_sector, "errno": 5 }] });
        let export = json!({ "type": "fuse", "id": "file", "node-name": "bad", "mountpoint": path,
            "writable": true });
        let mut daemon = Command::new(qemu::bin_dir().unwrap().join("qemu-storage-daemon"));
        daemon.args(["--blockdev", &node.to_string(), "--export", &export.to_string()]);
        let daemon = Guarded::spawn(daemon.stdin(Stdio::null())).unwrap();
        let this = Self { path: path.to_owned(), _daemon: daemon };
        wait_for("the image is offered", || {
            std::fs::metadata(path).is_ok_and(|meta| meta.len() == size)
        });
        this
    }
}

impl Drop for BadImage {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}

/// Where the file's last block is.
fn last_sector(image: &Path, file: &str) -> u64 {
    let ask = |request: &str| {
        let mut debugfs = Command::new("debugfs");
        let output = debugfs.args(["-R", request]).arg(image).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let blocks = ask(&format!("blocks {file}"));
    let block: u64 = blocks.split_whitespace().last().unwrap().parse().unwrap();
    let about = ask("stats");
    let size = about.lines().find_map(|line| line.strip_prefix("Block size:")).unwrap();
    block * size.trim().parse::<u64>().unwrap() / SECTOR_BYTES
}

#[test]
fn a_file_that_the_disk_cannot_read_is_named_and_never_in_an_archive_with_other_data() {
    let scene = Scene::with_archives();
    scene.create(200, &["--mount", "/srv:32M"]);
    scene.run(&["ct", "start", "200"]);
    for name in ["/srv/broken", "/srv/good"] {
        std::fs::write(scene.inside(200, name), vec![b'x'; FILE_BYTES]).unwrap();
    }
    scene.run(&["ct", "stop", "200", "--now"]);
    let image = scene.root.join("state/storage/images/200/vm-200-disk-1.raw");
    let bad = BadImage::offer(&image, last_sector(&image, "/broken"));

    let refused = scene.fail(&["backup", "200", "--mode", "stop"]);
    assert!(refused.contains("srv/broken"), "{refused}");
    let refused = scene.fail(&["backup", "200", "--mode", "stop", "--skip-unreadable"]);
    assert!(refused.contains("srv/broken") && refused.contains("only in part"), "{refused}");

    scene.run(&["ct", "start", "200"]);
    let refused = scene.fail(&["backup", "200", "--mode", "suspend"]);
    assert!(refused.contains("broken") && refused.contains("--skip-unreadable"), "{refused}");
    assert_eq!(scene.run(&["list"])["archives"], json!([]));
    let report = scene.run(&["backup", "200", "--mode", "suspend", "--skip-unreadable"]);
    let guest = &report["guests"][0];
    let log = std::fs::read_to_string(guest["log_path"].as_str().unwrap()).unwrap();
    assert!(log.contains("broken' could not be read and is left out"), "{log}");
    let ignored = &guest["container"]["ignored"];
    assert!(ignored.to_string().contains("/srv/broken"), "{report}");
    assert_eq!(guest["container"]["ignored_count"], 1, "{report}");
    let archive = format!("store:backup/{}", guest["archive"].as_str().unwrap());
    scene.expect(300);
    scene.run(&["restore", &archive, "300", "--start"]);
    let restored = scene.inside(300, "/srv");
    assert_eq!(std::fs::read(restored.join("good")).unwrap(), [b'x'; FILE_BYTES]);
    assert!(!restored.join("broken").exists());
    assert_eq!(scene.state(200), "running");
    for id in ["200", "300"] {
        scene.run(&["ct", "stop", id, "--now"]);
    }
    drop(bad);
}
