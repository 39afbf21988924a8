// SPDX-License-Identifier: MIT OR Apache-2.0
//! Freeze and thaw by the guest agent: that of a Linux guest, and one that is not there.

use std::time::Duration;

use qmp_client::agent::{Agent, AgentOptions, FreezeStatus};
use qmp_client::{Options, Session};
use serde_json::json;
use system_tests::lab::{BACKUPS, Lab, LabOptions, PLAIN_VIRTIO, SOURCE_VM};
use system_tests::process::Stop;
use system_tests::turn::Turn;

use crate::sector::Guest;
use crate::site::{Disk, SOON, Site};

/// What the agent says once its socket is free; nobody holds a guest longer than this.
fn freeze_status(lab: &Lab, dir: &std::path::Path) -> FreezeStatus {
    let socket = dir.join(format!("run/vm/{SOURCE_VM}/agent.sock"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let ask = || {
        runtime.block_on(async {
            let options = AgentOptions {
                connect_timeout: Duration::from_secs(1),
                command_timeout: Duration::from_secs(3),
                ..AgentOptions::default()
            };
            let agent = Agent::connect(&socket, options).await.ok()?;
            agent.fsfreeze_status().await.ok()
        })
    };
    lab.stop.wait_for("an answer of the agent", SOON, || Ok(ask())).unwrap()
}

#[test]
fn s43_the_guest_is_frozen_for_the_setup_and_thawed_whatever_becomes_of_it() {
    let stop = Stop::default();
    let _turn = Turn::wait(&stop).unwrap();
    let dir = tempfile::Builder::new().prefix("vz-agent-").tempdir_in("/var/tmp").unwrap();
    let options = LabOptions {
        disk_bytes: 32 << 20,
        format: "raw",
        hardware: PLAIN_VIRTIO,
        rate_per_s: 50,
        show: true,
    };
    let mut lab = Lab::create(dir.path(), options, &stop).unwrap();
    let _running = lab.start(SOURCE_VM).unwrap();

    let report = lab.backup().unwrap();
    assert!(report.freeze.is_some(), "it was not frozen");
    assert_eq!(freeze_status(&lab, dir.path()), FreezeStatus::Thawed);

    println!("killed between freeze and thaw");
    let vm = SOURCE_VM.to_string();
    let words = ["backup", &vm, "--storage", BACKUPS];
    let killed = lab.vzdump.spawn_with(&words, &[("VZDUMP_TEST_KILL_AT", "frozen")]).unwrap();
    killed.finish(SOON, &stop).unwrap();
    assert_eq!(freeze_status(&lab, dir.path()), FreezeStatus::Thawed);

    println!("a setup that fails, because somebody has an access of this target");
    let monitor = dir.path().join(format!("run/vm/{SOURCE_VM}/qmp-spare.sock"));
    lab.vzdump.run(&["doctor", "--fix"], SOON).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let session = Session::connect(&monitor, Options::default()).await.unwrap();
        let fleecing = json!({ "driver": "null-co", "node-name": "other", "size": 32 << 20 });
        session.execute_raw("blockdev-add", fleecing, None).await.unwrap();
        let target = format!("vzdump:{BACKUPS}");
        let device = json!([{ "device": "drive-virtio0", "fleecing": "other" }]);
        let setup = json!({ "target-id": target, "devices": device });
        session.execute_raw("backup-access-setup", setup, None).await.unwrap();
    });
    let finished = lab.vzdump.finish(&words, SOON).unwrap();
    assert_eq!(finished.status.code(), Some(255), "{}", finished.stdout);
    assert!(
        finished.stdout.contains("issuing guest-agent 'fs-thaw' command"),
        "{}",
        finished.stdout
    );
    assert_eq!(freeze_status(&lab, dir.path()), FreezeStatus::Thawed);
}

#[test]
fn s44_an_agent_that_is_not_there_costs_seconds_and_not_the_backup() {
    let mut site = Site::with(Guest::Writes, "agent: 1\n", &[Disk::raw("virtio0", 2 << 20)]);
    site.start();
    let report = site.backup("snapshot");
    report.assert_good().assert_says("WARN: guest-agent 'fs-freeze' failed");
    assert_eq!(report.guest["point_in_time"]["freeze_ms"], serde_json::Value::Null);
    site.assert_restores(&report);
}
