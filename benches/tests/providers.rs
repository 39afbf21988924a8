// SPDX-License-Identifier: MIT OR Apache-2.0
//! `providers-bench` with tiny disks: it measures every way of every case, and what is stored is
//! plausible. Nothing is said about speed.

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

const MIB: u64 = 1 << 20;

/// What a way stored in each round; none where it was not measured.
fn stored_bytes(case: &Value, way: usize) -> Option<Vec<u64>> {
    let stored = |run: &Value| {
        let is_measured = run["seconds"].as_f64()? > 0.0 && run["cpu_seconds"].as_f64()? >= 0.0;
        run["stored_bytes"].as_u64().filter(|_| is_measured)
    };
    case["runs"][way].as_array()?.iter().map(stored).collect()
}

/// Nothing here needs the patched one.
fn qemu_of_the_system() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).find(|folder| folder.join("qemu-nbd").exists());
    found.expect("qemu-nbd is missing: install qemu-utils")
}

#[test]
fn every_way_of_every_case_is_measured() {
    let folder = tempfile::tempdir().unwrap();
    let [json, markdown] = ["all.json", "page.md"].map(|name| folder.path().join(name));
    let output = Command::new(env!("CARGO_BIN_EXE_providers-bench"))
        .args(["--rounds", "2", "--disk-size", "8", "--changed", "25", "--folder"])
        .arg(folder.path())
        .arg("--qemu")
        .arg(qemu_of_the_system())
        .arg("--plugin")
        .arg(env!("CARGO_BIN_EXE_directory-plugin"))
        .arg("--json")
        .arg(&json)
        .arg("--markdown")
        .arg(&markdown)
        .output()
        .unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{complaint}");
    let all: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let cases = all["cases"].as_array().unwrap();
    let names: Vec<&str> = cases.iter().map(|case| case["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["full", "half-zero", "increment"]);
    for (case, data_bytes) in cases.iter().zip([8 * MIB, 4 * MIB, 2 * MIB]) {
        for way in 0..4 {
            let stored = stored_bytes(case, way).unwrap();
            assert_eq!(stored.len(), 2, "{case}");
            // The data and some metadata: zeroes and what has not changed are not stored.
            let is_plausible = |bytes: &u64| (data_bytes..data_bytes + MIB).contains(bytes);
            assert!(stored.iter().all(is_plausible), "{case}");
        }
    }
    let page = std::fs::read_to_string(&markdown).unwrap();
    assert!(page.contains("### half-zero, 8 MiB") && page.contains("| directory, over RPC "));
    // Archives, images and sockets are gone; the disk is kept for the next run.
    let left = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
    let mut left: Vec<_> = left.map(|name| name.into_string().unwrap()).collect();
    left.sort();
    assert_eq!(left, ["all.json", "disk-8m.raw", "lock", "page.md"]);
}

#[test]
fn the_cases_are_listed() {
    let program = env!("CARGO_BIN_EXE_providers-bench");
    let output = Command::new(program).arg("--list").output().unwrap();
    assert!(output.status.success());
    assert_eq!(output.stdout, b"full\nhalf-zero\nincrement\n");
}
