// SPDX-License-Identifier: MIT OR Apache-2.0
//! Block jobs, snapshots and other commands of QEMU beside a backup access: each works or is
//! refused, and whatever happens, the snapshot shows the point in time and the guest its own data.
//! What a job copies is right too.

#![allow(clippy::unwrap_used, reason = "tests")]

#[allow(dead_code, reason = "shared with tests that use the rest of it")]
mod access_lab;

use access_lab::{DISK_BYTES, Lab, Setup};
use qmp_client::EventStream;
use serde_json::{Value, json};
use system_tests::qemu::bin_dir;

const MIB: u64 = 1 << 20;
/// The disk before the point in time, and what is written in its first and second MiB after it.
const OLD: u8 = 0x11;
const FIRST: u8 = 0x22;
const SECOND: u8 = 0x33;

/// A disk with a throttle node above, through which the guest works, and an access to it.
struct Scene {
    lab: Lab,
    /// The disk's own node.
    disk: &'static str,
    begin: Vec<String>,
    events: EventStream,
    /// The access's nodes and the export of its snapshot.
    filter: String,
    snapshot: String,
    export: String,
}

/// What is below the throttle node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Below {
    Raw,
    /// A qcow2 overlay over a qcow2 image with all of the content.
    Overlay,
}

impl Scene {
    /// The guest's export is `top`.
    async fn start(below: Below) -> Self {
        let lab = Lab::start(Setup::default()).await;
        let disk = match below {
            Below::Raw => "shared",
            Below::Overlay => {
                add_qcow2(&lab, "base", None).await;
                export(&lab, "base", true).await;
                lab.guest_writes("base", OLD, 0, DISK_BYTES).await;
                lab.run("block-export-del", json!({ "id": "base" })).await;
                wait_for_exports(&lab, "base").await;
                add_qcow2(&lab, "middle", Some("base")).await;
                add_qcow2(&lab, "overlay", Some("middle")).await;
                "overlay"
            }
        };
        let group = json!({ "qom-type": "throttle-group", "id": "free" });
        lab.run("object-add", group).await;
        let top = json!({ "driver": "throttle", "node-name": "top", "throttle-group": "free",
                          "file": disk });
        lab.run("blockdev-add", top).await;
        export(&lab, "top", true).await;
        lab.guest_writes("top", OLD, 0, if below == Below::Raw { DISK_BYTES } else { MIB }).await;
        let begin = lab.graph().await;
        let events = lab.session().events();
        let empty = String::new;
        Self { lab, disk, begin, events, filter: empty(), snapshot: empty(), export: empty() }
    }

    fn devices(&self) -> Value {
        json!([{ "device": self.disk, "fleecing": "disk0-fleecing", "bitmap-mode": "use" }])
    }

    /// The point in time; then the guest changes its first MiB.
    async fn set_up(&mut self) {
        let infos = self.lab.setup("t", self.devices()).await;
        infos[0]["node-name"].as_str().unwrap().clone_into(&mut self.snapshot);
        self.filter = self.snapshot.replace("-1", "-0");
        self.export = self.lab.export(&infos[0]).await;
        self.lab.guest_writes("top", FIRST, 0, MIB).await;
    }

    async fn set_up_is_refused(&self, reason: &str) {
        let request = json!({ "target-id": "t", "devices": self.devices() });
        let before = self.lab.graph().await;
        let error = self.lab.try_run("backup-access-setup", request).await.unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
        assert_eq!(self.lab.graph().await, before);
    }

    async fn check_snapshot(&self) {
        self.lab.expect(&self.export, OLD, 0, DISK_BYTES).await;
    }

    /// A command that must fail with this reason, and change nothing of snapshot and guest.
    async fn refused(&self, command: &str, arguments: Value, reason: &str) {
        let before = self.lab.graph().await;
        let error = self.lab.try_run(command, arguments.clone()).await;
        let text = match error {
            Err(error) => error.to_string(),
            Ok(value) => panic!("{command} {arguments} was accepted: {value}"),
        };
        assert!(text.contains(reason), "{command} {arguments}\nwas refused with: {text}");
        assert_eq!(self.lab.graph().await, before, "after {command} {arguments}");
    }

    /// Waits until the job `j` has copied everything.
    async fn job_is_ready(&self) {
        let ready = async || jobs(&self.lab).await[0]["ready"] == true;
        self.lab.until("the job is ready", ready).await;
    }

    /// Waits for the end of the job `j`; its error.
    async fn job_ends(&mut self) -> Option<String> {
        let data = self.lab.next_event(&mut self.events, "BLOCK_JOB_COMPLETED").await;
        assert_eq!(data["device"], "j");
        data["error"].as_str().map(str::to_owned)
    }

    async fn cancel(&mut self) {
        self.lab.run("block-job-cancel", json!({ "device": "j", "force": true })).await;
        self.lab.until("the job is gone", async || jobs(&self.lab).await == json!([])).await;
    }

    /// The guest's disk, read by its export: its first MiB, its second one, and the rest.
    async fn check_guest(&self, first: u8, second: u8) {
        for (pattern, offset, len) in
            [(first, 0, MIB), (second, MIB, MIB), (OLD, 2 * MIB, DISK_BYTES - 2 * MIB)]
        {
            self.lab.expect("top", pattern, offset, len).await;
        }
    }

    async fn tear_down(&self) {
        self.check_snapshot().await;
        assert_eq!(self.lab.teardown("t", true).await, json!({ "existed": true }));
    }

    /// Nothing is left; the bitmap has recorded what the guest wrote.
    async fn end(self, dirty_bytes: u64) {
        assert_eq!(self.lab.graph().await, self.begin);
        let infos = self.lab.setup("t", self.devices()).await;
        assert_eq!(infos[0]["bitmap-action"], "used");
        assert_eq!(infos[0]["dirty"], dirty_bytes);
        self.lab.teardown("t", true).await;
        self.lab.quit().await;
    }

    fn job(&self, device: &str, more: Value) -> Value {
        let mut job = json!({ "job-id": "j", "device": device });
        for (key, value) in more.as_object().unwrap() {
            job[key] = value.clone();
        }
        job
    }
}

async fn jobs(lab: &Lab) -> Value {
    lab.run("query-block-jobs", json!({})).await
}

async fn export(lab: &Lab, node: &str, writable: bool) {
    let export = json!({ "type": "nbd", "id": node, "name": node, "node-name": node,
                         "writable": writable });
    lab.run("block-export-add", export).await;
}

async fn wait_for_exports(lab: &Lab, gone: &str) {
    lab.until("the export is gone", async || {
        let exports = lab.run("query-block-exports", json!({})).await;
        exports.as_array().unwrap().iter().all(|export| export["id"] != json!(gone))
    })
    .await;
}

/// Makes a qcow2 image and its node, above another node or alone.
async fn add_qcow2(lab: &Lab, name: &str, backing: Option<&str>) {
    let path = lab.path(name);
    let mut command = std::process::Command::new(bin_dir().unwrap().join("qemu-img"));
    command.args(["create", "-q", "-f", "qcow2"]);
    if let Some(backing) = backing {
        command.args(["-u", "-F", "qcow2", "-b"]).arg(lab.path(backing));
    }
    command.arg(&path).arg(DISK_BYTES.to_string());
    assert!(command.status().unwrap().success());
    let file = format!("{name}-file");
    let node = json!({ "driver": "file", "node-name": file, "filename": path });
    lab.run("blockdev-add", node).await;
    let mut node =
        json!({ "driver": "qcow2", "node-name": name, "file": file, "backing": backing });
    if backing.is_none() {
        node["backing"] = Value::Null;
    }
    lab.run("blockdev-add", node).await;
}

/// Takes a node of [`add_qcow2`] away.
async fn delete_qcow2(lab: &Lab, name: &str) {
    for node in [name.to_owned(), format!("{name}-file")] {
        lab.run("blockdev-del", json!({ "node-name": node })).await;
    }
}

/// A backup job that copies all: it has a point in time of its own.
#[tokio::test]
async fn a_full_backup_job_works_before_and_during_an_access() {
    for (before, node) in [(false, "filter"), (false, "top"), (true, "top"), (true, "shared")] {
        let mut scene = Scene::start(Below::Raw).await;
        let more = json!({ "target": "alone", "sync": "full", "speed": MIB });
        if before {
            scene.lab.run("blockdev-backup", scene.job(node, more.clone())).await;
        }
        scene.set_up().await;
        if !before {
            let node = if node == "filter" { scene.filter.clone() } else { node.to_owned() };
            scene.lab.run("blockdev-backup", scene.job(&node, more)).await;
        }
        scene.lab.guest_writes("top", SECOND, MIB, MIB).await;
        scene.check_snapshot().await;
        scene.lab.run("block-job-set-speed", json!({ "device": "j", "speed": 0 })).await;
        assert_eq!(scene.job_ends().await, None);
        export(&scene.lab, "alone", false).await;
        scene.lab.expect("alone", if before { OLD } else { FIRST }, 0, MIB).await;
        scene.lab.expect("alone", OLD, MIB, DISK_BYTES - MIB).await;
        scene.lab.run("block-export-del", json!({ "id": "alone" })).await;
        wait_for_exports(&scene.lab, "alone").await;
        scene.check_guest(FIRST, SECOND).await;
        scene.tear_down().await;
        scene.end(2 * MIB).await;
    }
}

/// A backup job that copies what is overwritten, as fleecing without us does it.
#[tokio::test]
async fn a_backup_job_of_old_data_works_before_and_during_an_access() {
    for (before, node) in [(false, "filter"), (false, "top"), (true, "top"), (true, "shared")] {
        let mut scene = Scene::start(Below::Raw).await;
        let more = json!({ "target": "alone", "sync": "none" });
        if before {
            scene.lab.run("blockdev-backup", scene.job(node, more.clone())).await;
        }
        scene.set_up().await;
        if !before {
            let node = if node == "filter" { scene.filter.clone() } else { node.to_owned() };
            scene.lab.run("blockdev-backup", scene.job(&node, more)).await;
        }
        scene.lab.guest_writes("top", SECOND, MIB, MIB).await;
        scene.check_snapshot().await;
        scene.check_guest(FIRST, SECOND).await;
        // The access may end first.
        if before {
            scene.tear_down().await;
            scene.lab.guest_writes("top", SECOND, MIB, MIB).await;
            scene.cancel().await;
        } else {
            scene.cancel().await;
            scene.tear_down().await;
        }
        export(&scene.lab, "alone", false).await;
        let first = if before { OLD } else { 0 };
        scene.lab.expect("alone", first, 0, MIB).await;
        scene.lab.expect("alone", OLD, MIB, MIB).await;
        scene.lab.expect("alone", 0, 2 * MIB, DISK_BYTES - 2 * MIB).await;
        scene.lab.run("block-export-del", json!({ "id": "alone" })).await;
        wait_for_exports(&scene.lab, "alone").await;
        scene.end(2 * MIB).await;
    }
}

#[tokio::test]
async fn a_backup_job_below_the_filter_is_refused() {
    let mut scene = Scene::start(Below::Raw).await;
    scene.set_up().await;
    for (node, reason) in [
        ("shared", "Cannot change 'file' link to 'shared'"),
        ("shared-file", "Cannot change 'file' link to 'shared-file'"),
        ("disk0-fleecing", "disk0-fleecing"),
        ("disk0-fleecing-file", "disk0-fleecing"),
    ] {
        let job = scene.job(node, json!({ "target": "alone", "sync": "none" }));
        scene.refused("blockdev-backup", job, reason).await;
    }
    for node in ["shared", scene.filter.as_str(), "disk0-fleecing"] {
        let job = json!({ "job-id": "j", "device": "alone", "target": node, "sync": "full" });
        let reason = if node == "disk0-fleecing" { "Node 'disk0-fleecing'" } else { "is busy" };
        scene.refused("blockdev-backup", job, reason).await;
    }
    scene.tear_down().await;
    scene.end(MIB).await;
}

#[tokio::test]
async fn a_job_may_read_the_snapshot() {
    let mut scene = Scene::start(Below::Raw).await;
    scene.set_up().await;
    let device = scene.snapshot.clone();
    let job = scene.job(&device, json!({ "target": "alone", "sync": "full", "speed": MIB }));
    scene.lab.run("blockdev-backup", job).await;
    let arguments = json!({ "target-id": "t", "success": true });
    let error = scene.lab.try_run("backup-access-teardown", arguments).await.unwrap_err();
    assert!(error.to_string().contains("in use by"), "{error}");
    scene.lab.guest_writes("top", SECOND, MIB, MIB).await;
    scene.lab.run("block-job-set-speed", json!({ "device": "j", "speed": 0 })).await;
    assert_eq!(scene.job_ends().await, None);
    export(&scene.lab, "alone", false).await;
    scene.lab.expect("alone", OLD, 0, DISK_BYTES).await;
    scene.lab.run("block-export-del", json!({ "id": "alone" })).await;
    wait_for_exports(&scene.lab, "alone").await;
    scene.tear_down().await;
    scene.end(2 * MIB).await;
}

#[tokio::test]
async fn a_mirror_job_works_above_the_filter_and_pivots() {
    for before in [false, true] {
        let mut scene = Scene::start(Below::Raw).await;
        let job = scene.job("top", json!({ "target": "alone", "sync": "full" }));
        if before {
            scene.lab.run("blockdev-mirror", job.clone()).await;
            let devices = json!([{ "device": "top", "fleecing": "disk0-fleecing" }]);
            let request = json!({ "target-id": "t", "devices": devices });
            let error = scene.lab.try_run("backup-access-setup", request).await.unwrap_err();
            assert!(error.to_string().contains("in use by block job: mirror"), "{error}");
        }
        scene.set_up().await;
        if !before {
            scene.lab.run("blockdev-mirror", job).await;
        }
        let mut events = scene.lab.session().events();
        scene.job_is_ready().await;
        scene.lab.guest_writes("top", SECOND, MIB, MIB).await;
        scene.check_snapshot().await;
        scene.lab.run("block-job-complete", json!({ "device": "j" })).await;
        let data = scene.lab.next_event(&mut events, "BLOCK_JOB_COMPLETED").await;
        assert_eq!(data.get("error"), None, "{data}");
        // The guest works on the copy now.
        scene.check_guest(FIRST, SECOND).await;
        scene.lab.guest_writes("top", 0x44, 0, MIB).await;
        scene.check_snapshot().await;
        scene.tear_down().await;
        scene.check_guest(0x44, SECOND).await;
        for (node, first) in [("alone", 0x44), ("shared", FIRST)] {
            if node == "shared" {
                export(&scene.lab, node, false).await;
                scene.lab.expect(node, first, 0, MIB).await;
                scene.lab.expect(node, SECOND, MIB, MIB).await;
            }
        }
        let graph = scene.lab.graph().await;
        assert!(graph.iter().all(|line| !line.contains("'ba-")), "{graph:#?}");
        scene.lab.quit().await;
    }
}

#[tokio::test]
async fn a_mirror_job_below_the_throttle_is_refused() {
    let mut scene = Scene::start(Below::Raw).await;
    scene.set_up().await;
    let full = json!({ "target": "alone", "sync": "full" });
    for node in ["shared", scene.filter.as_str(), "disk0-fleecing", "shared-file"] {
        scene.refused("blockdev-mirror", scene.job(node, full.clone()), "root block node").await;
    }
    let snapshot = scene.snapshot.clone();
    for replaces in ["shared", scene.filter.as_str()] {
        let job = json!({ "target": "alone", "sync": "full", "replaces": replaces });
        scene.refused("blockdev-mirror", scene.job("top", job), "is busy").await;
    }
    for target in ["shared", scene.filter.as_str()] {
        let job = json!({ "target": target, "sync": "full" });
        scene.refused("blockdev-mirror", scene.job("exported", job), "is busy").await;
    }
    // The snapshot can be mirrored like any read-only disk.
    scene.lab.run("blockdev-mirror", scene.job(&snapshot, full)).await;
    scene.job_is_ready().await;
    scene.cancel().await;
    scene.tear_down().await;
    scene.end(MIB).await;
}

#[tokio::test]
async fn stream_and_commit_are_refused_during_an_access() {
    let mut scene = Scene::start(Below::Overlay).await;
    scene.set_up().await;
    for node in ["top", scene.filter.as_str(), "overlay", "middle"] {
        let reason = if node == "middle" { "Cannot change 'backing' link" } else { "is busy" };
        scene.refused("block-stream", scene.job(node, json!({})), reason).await;
    }
    for (more, reason) in [
        (json!({}), "is busy"),
        (json!({ "base-node": "middle" }), "is busy"),
        (json!({ "top-node": "overlay", "base-node": "base" }), "is busy"),
        (json!({ "top-node": "middle", "base-node": "base" }), "is busy"),
    ] {
        scene.refused("block-commit", scene.job("top", more), reason).await;
    }
    for node in ["overlay", scene.filter.as_str()] {
        scene.refused("block-commit", scene.job(node, json!({})), "root block node").await;
    }
    scene.check_guest(FIRST, OLD).await;
    scene.tear_down().await;
    // Afterwards all of them work.
    scene.lab.run("block-stream", scene.job("overlay", json!({ "base-node": "base" }))).await;
    assert_eq!(scene.job_ends().await, None);
    scene.check_guest(FIRST, OLD).await;
    scene.lab.quit().await;
}

#[tokio::test]
async fn an_access_is_refused_while_stream_or_commit_are_at_work() {
    let middle = json!({ "device": "top", "top-node": "middle", "base-node": "base" });
    for (command, more, reason) in [
        ("block-stream", json!({ "device": "overlay" }), "in use by block job: stream"),
        ("block-stream", json!({ "device": "middle" }), "below it is in use by stream job 'j'"),
        ("block-commit", json!({ "device": "top" }), "in use by block job: commit"),
        ("block-commit", middle, "below it is in use by commit job 'j'"),
    ] {
        let mut scene = Scene::start(Below::Overlay).await;
        let mut job = scene.job("", more);
        // It goes on until it is told to end.
        job["speed"] = json!(1);
        job["auto-finalize"] = json!(false);
        scene.lab.run(command, job).await;
        scene.set_up_is_refused(reason).await;
        scene.lab.guest_writes("top", FIRST, 0, MIB).await;
        scene.cancel().await;
        scene.lab.guest_writes("top", OLD, 0, MIB).await;
        assert_eq!(scene.lab.graph().await, scene.begin, "{command}");
        scene.set_up().await;
        scene.check_guest(FIRST, OLD).await;
        scene.tear_down().await;
        scene.end(MIB).await;
    }
}

/// An overlay above the throttle node takes the guest's writes away from the disk, and a commit
/// brings them back through the filter.
#[tokio::test]
async fn an_active_commit_through_the_filter_is_captured() {
    let mut scene = Scene::start(Below::Raw).await;
    scene.set_up().await;
    add_qcow2(&scene.lab, "above", None).await;
    let arguments = json!({ "node": "top", "overlay": "above" });
    scene.lab.run("blockdev-snapshot", arguments).await;
    scene.lab.guest_writes("top", SECOND, MIB, MIB).await;
    scene.check_snapshot().await;
    scene.check_guest(FIRST, SECOND).await;
    let job = scene.job("above", json!({ "base-node": "top" }));
    scene.lab.run("block-commit", job).await;
    scene.job_is_ready().await;
    scene.lab.run("block-job-complete", json!({ "device": "j" })).await;
    assert_eq!(scene.job_ends().await, None);
    scene.check_snapshot().await;
    scene.check_guest(FIRST, SECOND).await;
    delete_qcow2(&scene.lab, "above").await;
    scene.tear_down().await;
    scene.end(2 * MIB).await;
}

#[tokio::test]
async fn external_snapshots_of_filter_and_disk_are_refused() {
    let mut scene = Scene::start(Below::Raw).await;
    scene.set_up().await;
    add_qcow2(&scene.lab, "above", None).await;
    scene.begin = {
        let mut begin = scene.begin.clone();
        let graph = scene.lab.graph().await;
        begin.extend(graph.into_iter().filter(|line| line.contains("'above")));
        begin.sort();
        begin
    };
    for node in ["shared", scene.filter.as_str(), "disk0-fleecing"] {
        let reason = "is busy: a backup access of target 't' is active";
        let existing = json!({ "node": node, "overlay": "above" });
        scene.refused("blockdev-snapshot", existing, reason).await;
        for mode in ["absolute-paths", "existing"] {
            let new = json!({ "node-name": node, "snapshot-node-name": "new", "mode": mode,
                              "snapshot-file": scene.lab.path("above") });
            scene.refused("blockdev-snapshot-sync", new, reason).await;
        }
    }
    scene.tear_down().await;
    scene.end(MIB).await;
}

#[tokio::test]
async fn an_overlay_above_the_snapshot_is_a_foreign_user() {
    let mut scene = Scene::start(Below::Raw).await;
    scene.set_up().await;
    let arguments = json!({ "target-id": "t", "success": true });
    add_qcow2(&scene.lab, "above", None).await;
    let overlay = json!({ "node": scene.snapshot, "overlay": "above" });
    scene.lab.run("blockdev-snapshot", overlay).await;
    // The export works on the overlay now.
    scene.check_snapshot().await;
    scene.lab.guest_writes(&scene.export, 0x66, 3 * MIB, MIB).await;
    scene.lab.expect(&scene.export, 0x66, 3 * MIB, MIB).await;
    scene.check_guest(FIRST, OLD).await;
    for _ in 0..2 {
        let refused = scene.lab.try_run("backup-access-teardown", arguments.clone()).await;
        let text = refused.unwrap_err().to_string();
        assert!(text.contains(&scene.snapshot) && text.contains("above"), "{text}");
    }
    scene.lab.run("block-export-del", json!({ "id": scene.export })).await;
    wait_for_exports(&scene.lab, &scene.export).await;
    delete_qcow2(&scene.lab, "above").await;
    assert_eq!(scene.lab.run("backup-access-teardown", arguments).await["existed"], true);
    scene.end(MIB).await;
}

#[tokio::test]
async fn resizing_deleting_and_deactivating_are_refused() {
    let mut scene = Scene::start(Below::Raw).await;
    scene.set_up().await;
    let (filter, snapshot) = (scene.filter.clone(), scene.snapshot.clone());
    let busy = "is busy: a backup access of target 't' is active";
    for (node, reason) in [
        ("shared", busy),
        (&filter, busy),
        ("disk0-fleecing", busy),
        (&snapshot, ""),
        ("top", ""),
        ("shared-file", ""),
        ("disk0-fleecing-file", ""),
    ] {
        for size in [DISK_BYTES * 2, DISK_BYTES / 2] {
            let arguments = json!({ "node-name": node, "size": size });
            scene.refused("block_resize", arguments, reason).await;
        }
    }
    for (node, reason) in [
        ("shared", "in use"),
        ("shared-file", "in use"),
        ("disk0-fleecing", "in use"),
        ("disk0-fleecing-file", "in use"),
        (&filter, "not owned by the monitor"),
        (&snapshot, "in use"),
    ] {
        scene.refused("blockdev-del", json!({ "node-name": node }), reason).await;
    }
    for node in ["shared", "shared-file", &filter, &snapshot, "disk0-fleecing"] {
        let arguments = json!({ "node-name": node, "active": false });
        scene.refused("blockdev-set-active", arguments, "").await;
    }
    scene.check_snapshot().await;
    // Without a writing user, too. Releasing what was read needs an active node.
    scene.lab.run("block-export-del", json!({ "id": scene.export })).await;
    wait_for_exports(&scene.lab, &scene.export).await;
    let arguments = json!({ "node-name": snapshot, "active": false });
    scene.refused("blockdev-set-active", arguments, "").await;
    let info = json!({ "node-name": snapshot });
    scene.export = scene.lab.export(&info).await;
    let command = format!("discard {} {MIB}", 3 * MIB);
    assert!(!scene.lab.try_io(&scene.export, &[command]).await.contains("failed"));
    scene.lab.expect(&scene.export, OLD, 0, 3 * MIB).await;
    scene.lab.teardown("t", true).await;
    scene.end(MIB).await;
}

#[tokio::test]
async fn reopening_nodes_does_not_move_the_snapshot() {
    let mut scene = Scene::start(Below::Raw).await;
    scene.set_up().await;
    let raw = |node: &str, file: &str| {
        json!({ "options": [{ "driver": "raw", "node-name": node, "file": file,
                              "discard": "unmap" }] })
    };
    // As they are.
    for node in ["shared", "disk0-fleecing"] {
        scene.lab.run("blockdev-reopen", raw(node, &format!("{node}-file"))).await;
    }
    // With another node below: the disk's content would change past the filter.
    for node in ["shared", "disk0-fleecing"] {
        scene.refused("blockdev-reopen", raw(node, "alone-file"), "frozen 'file' link").await;
    }
    let mut read_only = raw("shared", "shared-file");
    read_only["options"][0]["read-only"] = json!(true);
    scene.refused("blockdev-reopen", read_only, "").await;
    for node in [scene.filter.as_str(), scene.snapshot.as_str()] {
        scene.refused("blockdev-reopen", raw(node, "shared"), "").await;
    }
    // The guest cannot be led past the filter, but elsewhere and back.
    let top = |file: &str| {
        json!({ "options": [{ "driver": "throttle", "node-name": "top", "throttle-group": "free",
                              "file": file }] })
    };
    scene.refused("blockdev-reopen", top("shared"), "").await;
    scene.lab.run("blockdev-reopen", top("alone")).await;
    scene.lab.guest_writes("top", 0x77, 0, MIB).await;
    scene.check_snapshot().await;
    let filter = scene.filter.clone();
    scene.lab.run("blockdev-reopen", top(&filter)).await;
    scene.lab.guest_writes("top", SECOND, MIB, MIB).await;
    scene.check_guest(FIRST, SECOND).await;
    scene.tear_down().await;
    scene.end(2 * MIB).await;
}

/// A raw node may begin elsewhere in its file from one moment to the next: then the snapshot is
/// lost, and says so.
#[tokio::test]
async fn a_reopened_offset_breaks_the_snapshot() {
    for node in ["shared", "disk0-fleecing"] {
        let mut scene = Scene::start(Below::Raw).await;
        scene.set_up().await;
        let mut events = scene.lab.session().events();
        let reopen = async |offset: u64| {
            let file = format!("{node}-file");
            let options = json!([{ "driver": "raw", "node-name": node, "file": file,
                                   "discard": "unmap", "offset": offset }]);
            scene.lab.run("blockdev-reopen", json!({ "options": options })).await;
        };
        reopen(0).await;
        scene.check_snapshot().await;
        reopen(MIB).await;
        let event = scene.lab.next_event(&mut events, "BACKUP_ACCESS_BROKEN").await;
        let error = event["error"].as_str().unwrap();
        assert!(error.contains(&format!("node '{node}' was reopened")), "{error}");
        assert!(scene.lab.try_io(&scene.export, &["read 0 4096"]).await.contains("failed"));
        reopen(0).await;
        scene.lab.teardown("t", true).await;
        scene.end(MIB).await;
    }
}

#[tokio::test]
async fn quorum_children_may_come_and_go_below_the_filter() {
    let mut scene = Scene::start(Below::Raw).await;
    scene.lab.run("block-export-del", json!({ "id": "top" })).await;
    wait_for_exports(&scene.lab, "top").await;
    scene.lab.run("blockdev-del", json!({ "node-name": "top" })).await;
    add_qcow2(&scene.lab, "q1", None).await;
    scene.lab.add_disk("q2").await;
    let node = json!({ "driver": "quorum", "node-name": "top", "vote-threshold": 1,
                       "children": ["q1", "shared"] });
    scene.lab.run("blockdev-add", node).await;
    export(&scene.lab, "top", true).await;
    scene.lab.guest_writes("top", OLD, 0, DISK_BYTES).await;
    scene.disk = "top";
    scene.begin = scene.lab.graph().await;
    scene.set_up().await;
    for parent in [scene.filter.as_str(), scene.snapshot.as_str(), "disk0-fleecing"] {
        let arguments = json!({ "parent": parent, "node": "q2" });
        scene.refused("x-blockdev-change", arguments, "support").await;
    }
    scene.lab.run("x-blockdev-change", json!({ "parent": "top", "child": "children.0" })).await;
    for node in ["q1", "q1-file"] {
        scene.lab.run("blockdev-del", json!({ "node-name": node })).await;
    }
    scene.check_snapshot().await;
    scene.lab.guest_writes("top", SECOND, MIB, MIB).await;
    scene.check_guest(FIRST, SECOND).await;
    scene.tear_down().await;
    scene.lab.quit().await;
}

#[tokio::test]
async fn other_commands_leave_our_bitmaps_alone() {
    let mut scene = Scene::start(Below::Raw).await;
    // One that is used and one that is new.
    scene.lab.setup("t", scene.devices()).await;
    scene.lab.teardown("t", true).await;
    scene.lab.guest_writes("top", OLD, 0, DISK_BYTES).await;
    scene.set_up().await;
    let mut bitmaps = scene.lab.bitmaps("shared").await;
    bitmaps.retain(|name| !name.ends_with("-guard"));
    assert_eq!(bitmaps.len(), 2);
    let own = json!({ "node": "shared", "name": "own" });
    scene.lab.run("block-dirty-bitmap-add", own.clone()).await;
    for name in &bitmaps {
        let bitmap = json!({ "node": "shared", "name": name });
        for command in ["remove", "clear", "enable", "disable"] {
            let command = format!("block-dirty-bitmap-{command}");
            scene.refused(&command, bitmap.clone(), "in use by another operation").await;
        }
        for (target, from) in [(name.as_str(), "own"), ("own", name.as_str())] {
            let merge = json!({ "node": "shared", "target": target, "bitmaps": [from] });
            scene.refused("block-dirty-bitmap-merge", merge, "in use by another operation").await;
        }
        let job = json!({ "target": "alone", "sync": "bitmap", "bitmap": name,
                          "bitmap-mode": "always" });
        scene.refused("blockdev-backup", scene.job("shared", job), "").await;
    }
    scene.lab.run("block-dirty-bitmap-remove", own).await;
    // The client's copy is the client's, when no export has it.
    scene.check_snapshot().await;
    let copy = json!({ "node": scene.snapshot, "name": "dirty" });
    scene.refused("block-dirty-bitmap-remove", copy.clone(), "in use").await;
    scene.lab.run("block-export-del", json!({ "id": scene.export })).await;
    wait_for_exports(&scene.lab, &scene.export).await;
    scene.lab.run("block-dirty-bitmap-remove", copy).await;
    assert_eq!(scene.lab.teardown("t", true).await, json!({ "existed": true }));
    scene.end(MIB).await;
}

#[tokio::test]
async fn writers_beside_the_filter_are_refused() {
    let mut scene = Scene::start(Below::Raw).await;
    scene.set_up().await;
    for node in ["shared", "shared-file", "disk0-fleecing", "disk0-fleecing-file"] {
        let export = json!({ "type": "nbd", "id": "beside", "name": "beside", "node-name": node,
                             "writable": true });
        scene.refused("block-export-add", export, "").await;
    }
    export(&scene.lab, "shared", false).await;
    scene.lab.expect("shared", FIRST, 0, MIB).await;
    // A writer through the filter is a guest like any other.
    let filter = scene.filter.clone();
    export(&scene.lab, &filter, true).await;
    scene.lab.guest_writes(&filter, SECOND, MIB, MIB).await;
    scene.check_guest(FIRST, SECOND).await;
    scene.tear_down().await;
    for id in ["shared", filter.as_str()] {
        scene.lab.run("block-export-del", json!({ "id": id })).await;
        wait_for_exports(&scene.lab, id).await;
    }
    scene.end(2 * MIB).await;
}
