// SPDX-License-Identifier: MIT OR Apache-2.0
//! Scenario 49: what a guest keeps beside its disks, its EFI variables, is backed up and restored.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use system_tests::process::{Stop, run};
use system_tests::qemu::bin_dir;
use system_tests::turn::Turn;
use system_tests::vzdump::Vzdump;
use tempfile::TempDir;

const SOON: Duration = Duration::from_secs(120);
const VARS_BYTES: u64 = 528 << 10;

struct Site {
    vzdump: Vzdump,
    stop: Stop,
    dir: TempDir,
    _turn: Turn,
}

impl Site {
    fn new() -> Self {
        let stop = Stop::default();
        let turn = Turn::wait(&stop).unwrap();
        let dir = tempfile::Builder::new().prefix("vz-efi-").tempdir_in("/var/tmp").unwrap();
        let vzdump = Vzdump::find(dir.path(), true, &stop).unwrap();
        let site = Self { vzdump, stop, dir, _turn: turn };
        for folder in ["etc", "local", "backups"] {
            std::fs::create_dir_all(site.path(folder)).unwrap();
        }
        let storages = format!(
            "dir: local\n\tpath {}\n\tcontent images\n\ndirectory: backups\n\tpath {}\n",
            site.path("local").display(),
            site.path("backups").display()
        );
        std::fs::write(site.path("etc/storage.cfg"), storages).unwrap();
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, words: &[&str]) -> Value {
        self.vzdump.run(words, SOON).unwrap()
    }

    fn config(&self, vm: u32) -> String {
        std::fs::read_to_string(self.path(&format!("etc/qemu-server/{vm}.conf"))).unwrap()
    }

    /// The file of a disk, by its key.
    fn volume(&self, vm: u32, key: &str) -> PathBuf {
        let config = self.config(vm);
        let line = config.lines().find_map(|line| line.strip_prefix(&format!("{key}: local:")));
        self.path("local/images").join(line.unwrap().split(',').next().unwrap())
    }

    /// Its bytes, whatever its format.
    fn content(&self, vm: u32, key: &str) -> Vec<u8> {
        let path = self.volume(vm, key);
        if let Some(base) = path.to_str().unwrap().strip_suffix(".raw.qcow2") {
            // It ends with a whole cluster of the image.
            let mut bytes = std::fs::read(format!("{base}.raw.data")).unwrap();
            bytes.truncate(usize::try_from(VARS_BYTES).unwrap());
            return bytes;
        }
        let raw = self.path("content.raw");
        let format = if path.extension().unwrap() == "qcow2" { "qcow2" } else { "raw" };
        let mut command = Command::new(bin_dir().unwrap().join("qemu-img"));
        command.args(["convert", "-U", "-f", format, "-O", "raw"]).arg(path).arg(&raw);
        run(&mut command, SOON, &self.stop).unwrap();
        std::fs::read(raw).unwrap()
    }

    fn backup(&self) -> String {
        let report = self.run(&["backup", "100", "--storage", "backups"]);
        assert_eq!(report["guests"][0]["warnings"], Value::Array(Vec::new()), "{report}");
        format!("backups:backup/{}", report["guests"][0]["archive"].as_str().unwrap())
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for vm in ["100", "101"] {
            // Fails only if there is no such VM.
            let _ = self.vzdump.uninterrupted().finish(&["vm", "stop", vm, "--now"], SOON);
        }
    }
}

#[test]
fn s49_efi_variables_are_backed_up_and_restored_like_a_disk() {
    for format in ["raw", "qcow2", "raw+bitmaps"] {
        let site = Site::new();
        let create = ["vm", "create", "100", "--memory", "64", "--format", format, "--efidisk"];
        site.run(&[&create, &["efitype=4m,pre-enrolled-keys=0", "--disk", "1M"][..]].concat());
        assert!(site.config(100).contains("bios: ovmf\n"), "{}", site.config(100));
        let config = site.config(100);
        let line = config.lines().find(|line| line.starts_with("efidisk0: ")).unwrap();
        assert!(line.ends_with(",efitype=4m,pre-enrolled-keys=0,size=528K"), "{line}");
        let fresh = site.content(100, "efidisk0");
        let template = std::fs::read(Path::new("/usr/share/OVMF/OVMF_VARS_4M.fd")).unwrap();
        assert!(fresh == template, "{format}: not the variables of a new guest");

        if format == "raw" {
            // Once, because it takes an emulated machine seconds.
            site.run(&["vm", "start", "100"]);
            let written = || Ok((site.content(100, "efidisk0") != fresh).then_some(()));
            site.stop.wait_for("variables that the firmware has written", SOON, written).unwrap();
            // Nobody writes any more, so that there is something to compare with.
            site.run(&["vm", "stop", "100", "--now"]);
        }
        let off = site.backup();
        site.run(&["vm", "start", "100", "--paused"]);
        let running = site.backup();
        let before = site.content(100, "efidisk0");
        assert_eq!(before.len() as u64, VARS_BYTES);
        for archive in [off, running] {
            site.run(&["restore", &archive, "101", "--force", "--storage", "local"]);
            assert!(site.content(101, "efidisk0") == before, "{format}: other variables");
            site.run(&["vm", "start", "101", "--paused"]);
            site.run(&["vm", "stop", "101", "--now"]);
        }
    }
}
