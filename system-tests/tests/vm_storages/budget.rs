// SPDX-License-Identifier: MIT OR Apache-2.0
//! Backups in several processes under the limits of one host.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;
use system_tests::vzdump::last_json;

use crate::place::{LATE, MIB, Place, SOON, random_file};

const DISK_BYTES: u64 = 24 * MIB;
const LIMIT_KIB_PER_S: u64 = 4 << 10;

/// Two VMs, and what `vzdump.conf` says.
fn place_with(conf: &str) -> Place {
    let place = Place::new("");
    let source = place.path("source");
    random_file(&source, DISK_BYTES);
    for id in ["100", "101"] {
        let from = source.to_str().unwrap();
        place.run(&["vm", "create", id, "--bus", "scsi", "--memory", "64", "--disk-from", from]);
        place.run(&["vm", "start", id, "--paused"]);
    }
    fs::write(place.path("etc/vzdump.conf"), conf).unwrap();
    place
}

/// Backs both up in a process each, at the same time; their reports, and what they said.
fn back_up_both(place: &Place) -> Vec<(Value, String)> {
    let start = |id: &str| {
        let words = ["backup", id, "--storage", "backups"];
        place.vzdump.spawn_with(&words, &[]).unwrap()
    };
    let running = ["100", "101"].map(start);
    let ended = running.into_iter().map(|backup| {
        let finished = backup.finish(LATE, &place.stop).unwrap();
        let said = format!("{}\n{}", finished.stdout, finished.stderr);
        assert!(finished.status.success(), "{said}");
        (last_json(&finished.stdout).unwrap()["guests"][0].clone(), said)
    });
    ended.collect()
}

fn stop_second(place: &Place) {
    place.vzdump.uninterrupted().finish(&["vm", "stop", "101", "--now"], SOON).unwrap();
}

#[test]
fn two_processes_keep_the_bandwidth_limit_of_the_host_together() {
    let place = place_with(&format!("host-bwlimit: {LIMIT_KIB_PER_S}\n"));
    let begin = Instant::now();
    let ended = back_up_both(&place);
    let took = begin.elapsed();
    stop_second(&place);
    let read: u64 =
        ended.iter().map(|(g, _)| g["transferred"]["read_bytes"].as_u64().unwrap()).sum();
    assert!(read >= 2 * DISK_BYTES, "{read}");
    let rate = read as f64 / took.as_secs_f64() / (LIMIT_KIB_PER_S << 10) as f64;
    println!("{read} bytes in {took:?}: {rate:.2} of the limit");
    assert!(rate <= 1.05, "{rate}");
    // Neither had to wait for the other to end.
    let alone = Duration::from_secs(DISK_BYTES / (LIMIT_KIB_PER_S << 10));
    for (guest, said) in &ended {
        let ms = guest["transfer_ms"].as_u64().unwrap();
        assert!(Duration::from_millis(ms) > alone * 5 / 4, "{ms} ms: {said}");
    }
}

#[test]
fn two_processes_share_the_ram_of_the_host() {
    // The bandwidth has them run at the same time.
    let place = place_with(&format!("host-buffer-total: 80M\nhost-bwlimit: {LIMIT_KIB_PER_S}\n"));
    let ended = back_up_both(&place);
    let told: Vec<_> =
        ended.iter().filter(|(_, said)| said.contains("'host-buffer-total': 16.0 MiB")).collect();
    assert_eq!(told.len(), 1, "{}", ended[0].1);
    // What they had has come back.
    let words = ["backup", "100", "--storage", "backups"];
    let alone = place.vzdump.spawn_with(&words, &[]).unwrap().finish(LATE, &place.stop).unwrap();
    assert!(alone.status.success() && !alone.stdout.contains("host-buffer-total"), "{alone:?}");
    stop_second(&place);
}
