// SPDX-License-Identifier: MIT OR Apache-2.0
//! What goes on beside the accesses: queries, requests that must be refused, drained sections, block
//! jobs, clients that die.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rand::Rng as _;
use rand::rngs::StdRng;
use serde_json::{Value, json};

use super::client::{self, Death};
use super::disk::{Form, TARGETS};
use super::machine::Machine;
use super::tally::{DRAINS, JOBS, Places, QUERIES, REFUSED, UNKNOWN};
use crate::storage::until;
use crate::stress::daemon::drain;

const MIB: u64 = 1 << 20;
const QUERIED: [&str; 5] = [
    "query-backup-access",
    "query-backup-access",
    "query-block-exports",
    "query-block-jobs",
    "query-named-block-nodes",
];

/// Makes noise until told to stop.
pub(super) async fn make(
    machine: &Machine,
    mut rng: StdRng,
    places: &Places,
    stop: &AtomicBool,
) -> Result<()> {
    while !stop.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(rng.random_range(1..80))).await;
        match rng.random_range(0..100) {
            0..50 => {
                let command = QUERIED[rng.random_range(0..QUERIED.len())];
                places.at("noise", command);
                machine.storage.run(command, json!({})).await?;
                machine.tally.add(QUERIES, 1);
            }
            50..70 => refused(machine, &mut rng, places).await?,
            70..76 => {
                places.at("noise", "a teardown of nothing");
                let arguments = json!({ "target-id": "nobody", "success": rng.random::<bool>() });
                let result = machine.change("backup-access-teardown", arguments).await?;
                ensure!(result == json!({ "existed": false }), "teardown of nothing: {result}");
                machine.tally.add(UNKNOWN, 1);
            }
            76..90 => drained(machine, &mut rng, places).await?,
            _ => {
                places.at("noise", "a client dies in a query");
                let _quiet = machine.quiet().await;
                let command = QUERIED[rng.random_range(0..QUERIED.len())];
                client::killed(machine, command, json!({}), Death::random(&mut rng)).await?;
            }
        }
    }
    Ok(())
}

async fn drained(machine: &Machine, rng: &mut StdRng, places: &Places) -> Result<()> {
    let disk = &machine.disks[rng.random_range(0..machine.disks.len())];
    if disk.form == Form::Served {
        return Ok(());
    }
    places.at("noise", format!("draining {}", disk.name));
    let _quiet = machine.quiet().await;
    let file = disk.file_node(&machine.storage);
    drain(machine.storage.session(), disk.name, &file, machine.number()).await?;
    machine.tally.add(DRAINS, 1);
    Ok(())
}

/// A setup that must be refused, by target and devices, and a part of the reason.
fn bad_setup(machine: &Machine, rng: &mut StdRng) -> (Value, &'static str) {
    let target = TARGETS[rng.random_range(0..TARGETS.len())];
    let disk = machine.disks[rng.random_range(0..machine.disks.len())].name;
    let request = |devices: Value| json!({ "target-id": target, "devices": devices });
    let good = json!({ "device": disk, "fleecing": disk });
    match rng.random_range(0..9) {
        0 => (request(json!([])), "empty"),
        1 => (request(json!([{ "device": "nothing", "fleecing": "nothing" }])), "no backend, node"),
        2 => (request(json!([{ "device": disk, "fleecing": "nothing" }])), "does not exist"),
        3 => (request(json!([good])), "is the device itself"),
        4 => {
            let small = json!({ "device": disk, "fleecing": "small" });
            (request(json!([small, { "device": "nothing", "fleecing": "small" }])), "is too small")
        }
        5 => (request(json!([{ "device": disk, "timeout": 0 }])), "timeout"),
        6 => (request(json!([{ "device": disk, "granularity": 5000 }])), "granularity"),
        7 => (json!({ "target-id": "", "devices": [good] }), "1 to 255 bytes"),
        _ => (json!({ "target-id": "x".repeat(256), "devices": [good] }), "1 to 255 bytes"),
    }
}

/// Nothing changes by it. The disk may have an access, which is a reason too.
async fn refused(machine: &Machine, rng: &mut StdRng, places: &Places) -> Result<()> {
    let (request, reason) = bad_setup(machine, rng);
    places.at("noise", format!("a setup that must be refused: {request}"));
    let _quiet = machine.quiet().await;
    let null = json!({ "driver": "null-co", "node-name": "small", "size": MIB / 2 });
    machine.storage.node(null).await?;
    let before = machine.storage.graph().await?;
    let answer = machine.storage.try_run("backup-access-setup", request.clone()).await;
    let after = machine.storage.graph().await?;
    machine.storage.run("blockdev-del", json!({ "node-name": "small" })).await?;
    let text = match answer {
        Ok(infos) => bail!("{request} was accepted: {infos}"),
        // Another target's stuck image comes first.
        Err(error) if client::is_held_up(&error) => return Ok(()),
        Err(error) => error.to_string(),
    };
    let reasons = [reason, "already has a backup access", "in use by"];
    ensure!(
        reasons.iter().any(|reason| text.contains(reason)),
        "{request}\nwas refused with {text}"
    );
    // An access may end by its lease meanwhile: nodes may go. None may come.
    let ours = |line: &&String| line.contains("\"ba-") && !line.contains("->");
    let new = after.iter().filter(ours).find(|line| !before.contains(*line));
    ensure!(new.is_none(), "{request}\nmade {new:?}: from {before:#?}\nto {after:#?}");
    machine.tally.add(REFUSED, 1);
    Ok(())
}

/// Runs block jobs above the filters until told to stop.
pub(super) async fn run_jobs(
    machine: &Machine,
    mut rng: StdRng,
    places: &Places,
    stop: &AtomicBool,
) -> Result<()> {
    while !stop.load(Ordering::Relaxed) {
        places.at("jobs", "waiting");
        tokio::time::sleep(Duration::from_millis(rng.random_range(1..400))).await;
        let with_top: Vec<_> = machine.disks.iter().filter(|disk| disk.has_top()).collect();
        let disk = with_top[rng.random_range(0..with_top.len())];
        places.at("jobs", format!("a job of {}", disk.name));
        let target = json!({ "driver": "null-co", "node-name": "copy", "size": disk.size_bytes });
        machine.change("blockdev-add", target).await?;
        let full: bool = rng.random();
        let mut job = json!({ "job-id": "job", "device": disk.guest_node(), "target": "copy",
                              "sync": if full { "full" } else { "none" },
                              "auto-finalize": false });
        if rng.random() {
            job["speed"] = json!(disk.size_bytes);
        }
        machine.change("blockdev-backup", job).await?;
        let time = Duration::from_millis(rng.random_range(1..700));
        let finished = full && rng.random() && finishes(machine, &mut rng).await?;
        if !finished {
            tokio::time::sleep(time).await;
        }
        // The end of a job drains.
        let _quiet = machine.quiet().await;
        let status = job_status(machine).await?;
        places.at("jobs", format!("the end of a job of {}: {status:?}", disk.name));
        if status.as_deref() == Some("pending") {
            machine.storage.run("job-finalize", json!({ "id": "job" })).await?;
        } else {
            let cancel = json!({ "device": "job", "force": true });
            machine.storage.run("block-job-cancel", cancel).await?;
        }
        until("the job has ended", async || Ok(job_status(machine).await?.is_none())).await?;
        machine.storage.run("blockdev-del", json!({ "node-name": "copy" })).await?;
        machine.tally.add(JOBS, 1);
    }
    Ok(())
}

/// Waits until the job has copied everything.
async fn finishes(machine: &Machine, rng: &mut StdRng) -> Result<bool> {
    let again = Duration::from_millis(rng.random_range(5..50));
    let wait = async {
        while job_status(machine).await?.context("the job is gone")? != "pending" {
            tokio::time::sleep(again).await;
        }
        anyhow::Ok(true)
    };
    tokio::time::timeout(crate::storage::LIMIT, wait).await.context("the job does not finish")?
}

async fn job_status(machine: &Machine) -> Result<Option<String>> {
    let jobs = machine.storage.run("query-jobs", json!({})).await?;
    let job = jobs.as_array().and_then(|jobs| jobs.iter().find(|job| job["id"] == "job"));
    Ok(job.and_then(|job| job["status"].as_str()).map(str::to_owned))
}
