// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disks with several queues in several threads of the emulator, written by a real guest: the
//! filter is entered by several threads at once. Snapshots of all disks, one after another, each
//! compared with what the guest may have written up to one point in time.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::time::Duration;

use bytes::BytesMut;
use qmp_client::{Options, Session};
use serde_json::{Value, json};
use system_tests::guest::GuestImage;
use system_tests::process::Stop;
use system_tests::qemu::{BOOT_WITHIN, DirectGuest};
use system_tests::records::check::check_pair;
use system_tests::records::disk::{Disk, create_pair};
use system_tests::records::passes::{self, Sections};
use system_tests::storage::LIMIT;
use system_tests::turn::Turn;

const PAIR_BYTES: u64 = 16 << 20;
const PASSES_BYTES: u64 = 2 << 20;
const THREADS: usize = 2;
/// Writers of the third disk; more than there are processors, so that they move between them.
const SECTIONS: u64 = 5;
const ROUNDS: usize = 6;
const PROGRESS_WITHIN: Duration = Duration::from_secs(120);

struct Monitor(Session);

impl Monitor {
    async fn run(&self, command: &str, arguments: Value) -> Value {
        let shown = format!("{command} {arguments}");
        let result = self.0.execute_raw(command, arguments, Some(LIMIT)).await;
        result.unwrap_or_else(|error| panic!("{shown}: {error}"))
    }

    /// Three fleecing images and an NBD server.
    async fn prepare(&self, dir: &Path) {
        for (index, size) in [PAIR_BYTES, PAIR_BYTES, PASSES_BYTES].into_iter().enumerate() {
            let (name, file) = (format!("d{index}-fleecing"), format!("d{index}-fleecing-file"));
            let path = dir.join(&name);
            std::fs::File::create(&path).unwrap().set_len(size).unwrap();
            let node = json!({ "driver": "file", "node-name": file, "filename": path,
                               "discard": "unmap" });
            self.run("blockdev-add", node).await;
            let node = json!({ "driver": "raw", "node-name": name, "file": file,
                               "discard": "unmap" });
            self.run("blockdev-add", node).await;
        }
        let address = json!({ "type": "unix", "data": { "path": dir.join("nbd") } });
        self.run("nbd-server-start", json!({ "addr": address })).await;
    }

    /// The content of a snapshot; with `release`, it is given back as it is read.
    async fn read(&self, dir: &Path, info: &Value, release: bool) -> Vec<u8> {
        let name = info["device"].as_str().unwrap();
        let export = json!({ "type": "nbd", "id": name, "name": name, "writable": true,
                             "node-name": info["node-name"] });
        self.run("block-export-add", export).await;
        let options = provider_nbd::Options { timeout: Some(LIMIT), ..Default::default() };
        let socket = dir.join("nbd");
        let client = provider_nbd::Client::connect_unix(socket, name, options).await.unwrap();
        let mut content = BytesMut::new();
        while (content.len() as u64) < client.size_bytes() {
            let offset = content.len() as u64;
            let len = (client.size_bytes() - offset).min(256 << 10);
            content.extend_from_slice(&client.read(offset, len as usize).await.unwrap());
            if release {
                client.trim(offset, len).await.unwrap();
            }
        }
        content.to_vec()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshots_of_disks_with_several_queues_are_of_one_point_in_time() {
    let (stop, dir) = (Stop::default(), tempfile::tempdir_in("/var/tmp").unwrap());
    let _turn = Turn::wait(&stop).unwrap();
    let image = GuestImage::build(&stop).unwrap();
    let dir = dir.path();
    let [a, b, c] = ["a", "b", "c"].map(|name| dir.join(name));
    create_pair([&a, &b], PAIR_BYTES, 43).unwrap();
    let sections = Sections::new(PASSES_BYTES, SECTIONS).unwrap();
    passes::create(&c, PASSES_BYTES, sections).unwrap();
    let options = format!("vzdump.rate=400 vzdump.passes={SECTIONS}");
    let disks = [a.as_path(), &b, &c];
    let mut guest = DirectGuest::boot_multiqueue(&image, &disks, dir, &options, THREADS).unwrap();
    guest.console.wait_for("PASSES ", BOOT_WITHIN, &stop).unwrap();
    let monitor = Monitor(Session::connect(dir.join("qmp"), Options::default()).await.unwrap());
    monitor.prepare(dir).await;

    let mut last = vec![0; SECTIONS as usize];
    let mut last_record = 0;
    for round in 0..ROUNDS {
        let devices = json!([{ "device": "d0" }, { "device": "d1" }, { "device": "d2" }]);
        let buffer_bytes = [0, 128 << 10, 64 << 20][round % 3];
        let request = json!({ "target-id": "t", "devices": devices, "buffer-size": buffer_bytes });
        let infos = monitor.run("backup-access-setup", request).await;
        // The guest writes all over its disks before they are read.
        guest.console.wait_for("PASSES ", PROGRESS_WITHIN, &stop).unwrap();
        let release = round % 2 == 1;
        let content = monitor.read(dir, &infos[2], release).await;
        let seen = passes::check(&content, sections).unwrap();
        assert!(seen.iter().zip(&last).all(|(seen, last)| seen >= last), "{seen:?} after {last:?}");
        last = seen;

        let copies = ["a.copy", "b.copy"].map(|name| dir.join(name));
        for (copy, info) in copies.iter().zip([&infos[0], &infos[1]]) {
            std::fs::write(copy, monitor.read(dir, info, release).await).unwrap();
        }
        let copies = copies.map(|copy| Disk::open(&copy, false).unwrap());
        let report = check_pair(&copies[0], &copies[1], false).unwrap();
        assert!(report.problems.is_empty(), "round {round}: {}", report.line());
        assert!(report.last_b >= last_record, "{} after {last_record}", report.line());
        last_record = report.last_b;

        let status = monitor.run("query-backup-access", json!({})).await;
        for device in status[0]["devices"].as_array().unwrap() {
            assert_eq!(device["state"], "active", "{device}");
        }
        let teardown = json!({ "target-id": "t", "success": true });
        monitor.run("backup-access-teardown", teardown).await;
    }
    assert!(last.iter().all(|&pass| pass > 0) && last_record > 0, "{last:?} {last_record}");
    println!("passes {last:?}, records {last_record}");
    drop(monitor);
    drop(guest);
}
