// SPDX-License-Identifier: MIT OR Apache-2.0
//! What somebody with access to the storage may have put there must not be believed.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use common::{Bench, GuestDisk, Random, run, scribble, text};
use provider_api::{Kind, Provider};
use serde_json::{Value, json};

/// A storage with a full archive and an increment.
struct Attack {
    bench: Bench,
    base: String,
    top: String,
    truth: PathBuf,
}

impl Attack {
    async fn new() -> Self {
        let bench = Bench::new().await;
        let disk = GuestDisk::create(bench.path(), "scsi0", (4 << 20) + 512, 65536);
        let mut random = Random::new(20);
        scribble(&disk, &mut random, 30).await;
        let (base, _) = bench.back_up(1, &[&disk], "g1").await.unwrap();
        scribble(&disk, &mut random, 5).await;
        let truth = disk.reference("truth");
        let (top, _) = bench.back_up(1, &[&disk], "g2").await.unwrap();
        Self { bench, base, top, truth }
    }

    fn image(&self, archive: &str) -> PathBuf {
        self.bench.storage().join(archive).join("scsi0.qcow2")
    }

    fn edit_manifest(&self, archive: &str, change: impl FnOnce(&mut Value)) {
        let path = self.bench.storage().join(archive).join("manifest.json");
        let mut manifest: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut manifest);
        std::fs::write(&path, serde_json::to_vec(&manifest).unwrap()).unwrap();
    }

    /// Keeps the manifest in step with a changed image, so that only the change itself can be
    /// what is refused.
    fn accept_length(&self, archive: &str) {
        let length = std::fs::metadata(self.image(archive)).unwrap().len();
        self.edit_manifest(archive, |m| m["disks"][0]["file_size_bytes"] = json!(length));
    }

    fn patch(&self, archive: &str, offset: u64, bytes: &[u8]) {
        let mut file = std::fs::File::options().write(true).open(self.image(archive)).unwrap();
        file.seek(SeekFrom::Start(offset)).unwrap();
        file.write_all(bytes).unwrap();
    }

    async fn refused(&self, why: &str) {
        let (top, call) = (&self.top, &self.bench.call);
        let Err(error) = self.bench.provider.restore_vm_init(top, call).await else {
            panic!("not refused: {why}");
        };
        assert!(error.message.contains(why), "{error}");
        assert_ne!(error.kind, Kind::Io, "{error}");
    }
}

fn secret(attack: &Attack) -> PathBuf {
    let path = attack.bench.path().join("secret.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&path), "4194816"]);
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn the_untouched_chain_is_accepted() {
    let attack = Attack::new().await;
    attack.bench.check_restore(&attack.top, "scsi0", &attack.truth).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_backing_file_is_refused() {
    for is_base in [false, true] {
        let attack = Attack::new().await;
        let target = if is_base { attack.base.clone() } else { attack.top.clone() };
        let secret = secret(&attack);
        let image = attack.image(&target);
        run("qemu-img", &["rebase", "-u", "-F", "qcow2", "-b", text(&secret), text(&image)]);
        attack.accept_length(&target);
        attack.refused("its backing file is").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_or_other_backing_name_is_refused() {
    let attack = Attack::new().await;
    run("qemu-img", &["rebase", "-u", "-b", "", text(&attack.image(&attack.top))]);
    attack.accept_length(&attack.top);
    attack.refused("its backing file is").await;

    let attack = Attack::new().await;
    let image = attack.image(&attack.top);
    // The same file, but as raw: its content would be taken for a disk's.
    let name = format!("../{}/scsi0.qcow2", attack.base);
    run("qemu-img", &["rebase", "-u", "-F", "raw", "-b", &name, text(&image)]);
    attack.accept_length(&attack.top);
    attack.refused("its backing format is").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_external_data_file_is_refused() {
    let attack = Attack::new().await;
    let image = attack.image(&attack.base);
    std::fs::remove_file(&image).unwrap();
    let data = attack.bench.path().join("data.raw");
    let option = format!("data_file={},data_file_raw=on", text(&data));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &option, text(&image), "4194816"]);
    attack.accept_length(&attack.base);
    attack.refused("external data file").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn encryption_snapshots_and_other_sizes_are_refused() {
    for (offset, bytes, why) in [
        (32, 2u32.to_be_bytes().to_vec(), "encrypted"),
        (32, 1u32.to_be_bytes().to_vec(), "encrypted"),
        (60, 1u32.to_be_bytes().to_vec(), "snapshots"),
        (24, (8u64 << 20).to_be_bytes().to_vec(), "its disk has"),
        (4, 2u32.to_be_bytes().to_vec(), "version 2"),
        (0, b"RAW!".to_vec(), "not a qcow2 image"),
        (88, 1u64.to_be_bytes().to_vec(), "features"),
        (100, 7u32.to_be_bytes().to_vec(), "its header has"),
    ] {
        let attack = Attack::new().await;
        attack.patch(&attack.base, offset, &bytes);
        attack.refused(why).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_instead_of_an_image_is_refused() {
    let attack = Attack::new().await;
    let image = attack.image(&attack.base);
    let moved = attack.bench.path().join("moved.qcow2");
    std::fs::rename(&image, &moved).unwrap();
    std::os::unix::fs::symlink(&moved, &image).unwrap();
    let (top, call) = (&attack.top, &attack.bench.call);
    assert!(attack.bench.provider.restore_vm_init(top, call).await.is_err());
    // Nor is an archive that is itself a link.
    std::fs::remove_file(&image).unwrap();
    std::fs::rename(&moved, &image).unwrap();
    let archive = attack.bench.storage().join(&attack.base);
    let elsewhere = attack.bench.path().join("elsewhere");
    std::fs::rename(&archive, &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &archive).unwrap();
    attack.refused("cannot be used").await;
    assert_eq!(attack.bench.names().await, std::slice::from_ref(top));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_that_lies_is_refused() {
    type Change = fn(&mut Value);
    let lies: [(Change, &str); 6] = [
        (|m| m["disks"][0]["base"] = json!("../../etc"), "Archive name"),
        (|m| m["disks"][0]["base"] = json!("nothing-there"), "its backing file is"),
        (|m| m["disks"][0]["device"] = json!("../../x"), "Device name"),
        (|m| m["disks"][0]["size_bytes"] = json!(1u64 << 62), "bytes"),
        (|m| m["archive"] = json!("other"), "other"),
        (|m| m["version"] = json!(99), "not known"),
    ];
    for (change, why) in lies {
        let attack = Attack::new().await;
        attack.edit_manifest(&attack.top, change);
        attack.refused(why).await;
    }
    // A base that is gone, a circle, and a base of another guest.
    let attack = Attack::new().await;
    std::fs::remove_dir_all(attack.bench.storage().join(&attack.base)).unwrap();
    attack.refused("cannot be used").await;
    let attack = Attack::new().await;
    let top = attack.top.clone();
    attack.edit_manifest(&attack.base, |m| m["disks"][0]["base"] = json!(top));
    attack.refused("its backing file is").await;
    let attack = Attack::new().await;
    attack.edit_manifest(&attack.base, |m| m["guest_id"] = json!(2));
    attack.refused("not an earlier backup of the same guest").await;
    // One damaged manifest does not hide the others.
    let attack = Attack::new().await;
    let manifest = |archive: &str| attack.bench.storage().join(archive).join("manifest.json");
    std::fs::write(manifest(&attack.base), "{").unwrap();
    assert_eq!(attack.bench.names().await, std::slice::from_ref(&attack.top));
    attack.refused("cannot be used").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn archive_names_do_not_leave_the_storage() {
    let attack = Attack::new().await;
    for name in ["../x", "/etc", ".vzdump", ".tmp-x", "a/b", ""] {
        let call = &attack.bench.call;
        let Err(error) = attack.bench.provider.restore_vm_init(name, call).await else {
            panic!("{name:?} was accepted");
        };
        assert_eq!(error.kind, Kind::Invalid, "{name:?}");
        assert!(attack.bench.provider.guest_config(name, call).await.is_err());
    }
    let config = attack.bench.storage().join(&attack.top).join("qemu-server.conf");
    append(&config, b"args: -bad\n");
    let error =
        attack.bench.provider.guest_config(&attack.top, &attack.bench.call).await.unwrap_err();
    assert_eq!(error.kind, Kind::Corrupt);
}

fn append(path: &Path, bytes: &[u8]) {
    std::fs::File::options().append(true).open(path).unwrap().write_all(bytes).unwrap();
}
