// SPDX-License-Identifier: MIT OR Apache-2.0
//! How long accesses last: leases that are renewed or not, whatever holds QEMU's main loop up, and
//! what becomes of an access when its client, its guest or QEMU ends.

#![allow(clippy::unwrap_used, reason = "tests")]

#[allow(dead_code, reason = "shared with tests that use the rest of it")]
mod access_lab;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use access_lab::{Client, DISK_BYTES, Lab, SECOND_MONITOR, Setup};
use qmp_client::{EventItem, EventStream, Options, Session};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;

const MIB: u64 = 1 << 20;
const TORN_DOWN: &str = "BACKUP_ACCESS_TORN_DOWN";
/// What a lease of one second has at most before it is over, if nothing holds QEMU up.
const ONE_SECOND_LEASE: Duration = Duration::from_secs(2);

/// A setup with a lease.
fn request(target: &str, devices: Value, lease_s: u32) -> Value {
    json!({ "target-id": target, "devices": devices, "lease": lease_s })
}

async fn setup(lab: &Lab, target: &str, devices: Value, lease_s: u32) -> Vec<Value> {
    let infos = lab.run("backup-access-setup", request(target, devices, lease_s)).await;
    infos.as_array().unwrap().clone()
}

async fn renew(lab: &Lab, target: &str) -> Result<Value, String> {
    let renewed = lab.try_run("backup-access-renew", json!({ "target-id": target })).await;
    renewed.map_err(|error| error.to_string())
}

/// The status of a target's access.
async fn status(lab: &Lab, target: &str) -> Option<Value> {
    let all = lab.run("query-backup-access", json!({})).await;
    all.as_array().unwrap().iter().find(|status| status["target-id"] == target).cloned()
}

async fn lease_left(lab: &Lab, target: &str) -> u64 {
    let status = status(lab, target).await.expect("the access is there");
    status["lease-left"].as_u64().unwrap()
}

/// Waits for the event that the access of `t` has ended after its lease; its reason.
async fn lease_ends(lab: &Lab, events: &mut EventStream, success: bool) -> String {
    let event = lab.next_event(events, TORN_DOWN).await;
    assert_eq!((&event["target-id"], &event["success"]), (&json!("t"), &json!(success)), "{event}");
    let reason = event["reason"].as_str().unwrap();
    let mut parts = reason.split(" seconds ended without a renewal");
    assert!(parts.next().unwrap().contains("its lease of ") && parts.next().is_some(), "{reason}");
    assert!(status(lab, "t").await.is_none());
    reason.to_owned()
}

/// The data of the only event of this kind that came before the connection closed.
async fn only_torn_down(events: &mut EventStream) -> Value {
    let mut found = Vec::new();
    while let Some(item) = events.next().await {
        if let EventItem::Event(event) = item
            && event.name == TORN_DOWN
        {
            found.push(event.data);
        }
    }
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

#[tokio::test]
async fn a_lease_counts_down_and_a_renewal_lets_it_begin_again() {
    let lab = Lab::start(Setup::default()).await;
    let before = lab.graph().await;
    setup(&lab, "t", json!([{ "device": "disk0" }]), 3).await;
    lab.setup("u", json!([{ "device": "disk1" }])).await;
    assert_eq!(lease_left(&lab, "t").await, 3);
    assert_eq!(status(&lab, "u").await.unwrap().get("lease-left"), None);
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(7) {
        lab.until("a second of the lease is over", async || lease_left(&lab, "t").await < 3).await;
        assert_eq!(renew(&lab, "t").await.unwrap(), json!({}));
        assert_eq!(lease_left(&lab, "t").await, 3);
    }
    assert_eq!(status(&lab, "t").await.unwrap()["devices"][0]["state"], "active");
    for (target, reason) in [
        ("u", "the backup access of target 'u' has no lease"),
        ("nobody", "target 'nobody' has no backup access"),
    ] {
        let error = renew(&lab, target).await.unwrap_err();
        assert!(error.contains(reason), "{error}");
    }
    let mut events = lab.session().events();
    for (target, success) in [("u", true), ("t", false)] {
        assert_eq!(lab.teardown(target, success).await, json!({ "existed": true }));
        let event = lab.next_event(&mut events, TORN_DOWN).await;
        assert_eq!(event, json!({ "target-id": target, "success": success }));
    }
    assert_eq!(lab.graph().await, before);
    lab.quit().await;
}

#[tokio::test]
async fn an_access_outlives_its_client_and_ends_with_its_lease() {
    let lab = Lab::start(Setup::default()).await;
    let before = lab.graph().await;
    let mut events = lab.session().events();
    // A committed backup, so that the failed one has something to keep.
    lab.setup("t", json!([{ "device": "disk0", "bitmap-mode": "new" }])).await;
    lab.teardown("t", true).await;
    lab.next_event(&mut events, TORN_DOWN).await;
    lab.guest_writes("disk0", 0x21, 0, 1).await;

    let socket = lab.path(SECOND_MONITOR);
    let client = Session::connect(&socket, Options::default()).await.unwrap();
    let device = json!([{ "device": "disk0", "bitmap-mode": "use" }]);
    let setup = client.execute_raw("backup-access-setup", request("t", device, 1), None);
    let info = setup.await.unwrap()[0].clone();
    assert_eq!((&info["bitmap-action"], &info["dirty"]), (&json!("used"), &json!(65536)));
    let device = json!([{ "device": "disk1" }]);
    let setup = client.execute_raw("backup-access-setup", request("u", device, 0), None);
    setup.await.unwrap();
    lab.guest_writes("disk0", 0x22, MIB, 1).await;
    drop(client);

    lease_ends(&lab, &mut events, false).await;
    let gone = lab.teardown("t", true).await;
    assert_eq!(gone["existed"], false);
    let reason = gone["reason"].as_str().unwrap();
    assert!(reason.contains("torn down as a failure") && reason.contains("lease"), "{reason}");
    let error = renew(&lab, "t").await.unwrap_err();
    assert!(error.contains("has no backup access: it was torn down as a failure"), "{error}");
    // The one without a lease is still there.
    assert_eq!(status(&lab, "u").await.unwrap()["devices"][0]["state"], "active");
    assert_eq!(lab.teardown("u", false).await["existed"], true);
    assert_eq!(lab.graph().await, before);
    // Both changes are known, to the generation of the access that failed too.
    let device =
        json!({ "device": "disk0", "bitmap-mode": "use", "generation": info["generation"] });
    let infos = lab.setup("t", json!([device])).await;
    assert_eq!((&infos[0]["bitmap-action"], &infos[0]["dirty"]), (&json!("used"), &json!(131_072)));
    lab.teardown("t", false).await;
    // A command has ended this one: nothing is left to be told about the other.
    assert_eq!(lab.teardown("t", false).await, json!({ "existed": false }));
    lab.quit().await;
}

#[tokio::test]
async fn time_in_which_qemu_is_stopped_does_not_count() {
    const STOPPED: Duration = Duration::from_secs(6);
    let lab = Arc::new(Lab::start(Setup::default()).await);
    let mut events = lab.session().events();
    setup(&lab, "t", json!([{ "device": "disk0" }]), 2).await;
    // A renewal is in the socket when QEMU goes on, and the lease would have been over long ago.
    lab.until("a second is left", async || lease_left(&lab, "t").await < 2).await;
    lab.signal(Signal::STOP);
    let renewal = tokio::spawn({
        let lab = Arc::clone(&lab);
        async move { renew(&lab, "t").await }
    });
    tokio::time::sleep(STOPPED).await;
    lab.signal(Signal::CONT);
    renewal.await.unwrap().unwrap();
    assert_eq!(lease_left(&lab, "t").await, 2);
    // Without a renewal it goes on where it was, and ends.
    lab.until("a second is left", async || lease_left(&lab, "t").await < 2).await;
    lab.signal(Signal::STOP);
    let query = tokio::spawn({
        let lab = Arc::clone(&lab);
        async move { status(&lab, "t").await }
    });
    tokio::time::sleep(STOPPED).await;
    lab.signal(Signal::CONT);
    assert!(query.await.unwrap().is_some(), "it was over at once");
    let event = lab.next_event(&mut events, TORN_DOWN).await;
    assert_eq!((&event["target-id"], &event["success"]), (&json!("t"), &json!(false)));
    Arc::into_inner(lab).unwrap().quit().await;
}

#[tokio::test]
async fn moments_between_stops_do_not_count() {
    const ROUNDS: usize = 20;
    let lab = Lab::start(Setup::default()).await;
    let mut events = lab.session().events();
    setup(&lab, "t", json!([{ "device": "disk0" }]), 1).await;
    for _ in 0..ROUNDS {
        lab.signal(Signal::STOP);
        tokio::time::sleep(Duration::from_millis(700)).await;
        lab.signal(Signal::CONT);
        // Too short for anything but the tick that is overdue.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(status(&lab, "t").await.is_some(), "it was over at once");
    lease_ends(&lab, &mut events, false).await;
    lab.quit().await;
}

/// A disk whose requests take so long: a drained section waits for them in the main loop.
async fn sleepy_disk(lab: &Lab, latency: Duration) {
    let latency_ns = u64::try_from(latency.as_nanos()).unwrap();
    let node = json!({ "driver": "null-co", "node-name": "sleepy", "size": DISK_BYTES,
                       "read-zeroes": true, "latency-ns": latency_ns });
    lab.run("blockdev-add", node).await;
    let export = json!({ "type": "nbd", "id": "sleepy", "name": "sleepy", "node-name": "sleepy",
                         "writable": true });
    lab.run("block-export-add", export).await;
}

/// A guest that has one write after the other in flight on the sleepy disk.
fn sleepy_guest(lab: &Arc<Lab>, writes: u64) -> tokio::task::JoinHandle<String> {
    let lab = Arc::clone(lab);
    tokio::spawn(async move {
        let writes: Vec<String> = (0..writes).map(|n| format!("write {}k 4k", n * 64)).collect();
        lab.try_io("sleepy", &writes).await
    })
}

/// Sets `u` up on the sleepy disk, which takes longer than a lease of one second.
async fn long_setup(lab: &Lab) {
    let start = Instant::now();
    lab.setup("u", json!([{ "device": "sleepy", "fleecing": "disk1-fleecing" }])).await;
    let took = start.elapsed();
    assert!(took > ONE_SECOND_LEASE, "the setup took {took:?}: the test shows nothing");
}

#[tokio::test]
async fn a_renewal_behind_a_long_setup_comes_in_time() {
    let lab = Arc::new(Lab::start(Setup::default()).await);
    let mut events = lab.session().events();
    sleepy_disk(&lab, Duration::from_secs(4)).await;
    let guest = sleepy_guest(&lab, 3);
    tokio::time::sleep(Duration::from_millis(500)).await;
    setup(&lab, "t", json!([{ "device": "disk0" }]), 1).await;
    // From QEMU 10.2 on that setup waits for the guest, too: until its next write is in flight.
    tokio::time::sleep(Duration::from_millis(400)).await;
    let (renewed, ()) = tokio::join!(
        async {
            // Behind the setup, in the same socket.
            tokio::time::sleep(Duration::from_millis(100)).await;
            renew(&lab, "t").await
        },
        long_setup(&lab)
    );
    renewed.unwrap();
    assert!(status(&lab, "t").await.is_some());
    lease_ends(&lab, &mut events, false).await;
    guest.await.unwrap();
    assert_eq!(lab.teardown("u", true).await["existed"], true);
    Arc::into_inner(lab).unwrap().quit().await;
}

/// A connection to the second monitor whose commands can be executed out of band.
struct OutOfBand(BufReader<UnixStream>);

impl OutOfBand {
    async fn connect(lab: &Lab) -> Self {
        let stream = UnixStream::connect(lab.path(SECOND_MONITOR)).await.unwrap();
        let mut this = Self(BufReader::new(stream));
        assert!(this.answer().await.get("QMP").is_some());
        let enable = json!({ "enable": ["oob"] });
        let able = this.ask(json!({ "execute": "qmp_capabilities", "arguments": enable })).await;
        assert_eq!(able, json!({ "return": {} }));
        this
    }

    async fn ask(&mut self, request: Value) -> Value {
        self.0.write_all(format!("{request}\n").as_bytes()).await.unwrap();
        self.answer().await
    }

    async fn answer(&mut self) -> Value {
        loop {
            let mut line = String::new();
            self.0.read_line(&mut line).await.unwrap();
            let message: Value = serde_json::from_str(&line).unwrap();
            if message.get("event").is_none() {
                return message;
            }
        }
    }

    async fn renew(&mut self, target: &str) -> Value {
        let arguments = json!({ "target-id": target });
        self.ask(json!({ "exec-oob": "backup-access-renew", "arguments": arguments, "id": 1 }))
            .await
    }
}

#[tokio::test]
async fn a_renewal_out_of_band_does_not_wait_for_other_commands() {
    let lab = Arc::new(Lab::start(Setup::default()).await);
    sleepy_disk(&lab, Duration::from_secs(4)).await;
    let guest = sleepy_guest(&lab, 2);
    tokio::time::sleep(Duration::from_millis(500)).await;
    setup(&lab, "t", json!([{ "device": "disk0" }]), 2).await;
    let mut client = OutOfBand::connect(&lab).await;
    let is_set_up = AtomicBool::new(false);
    let set_up = async {
        long_setup(&lab).await;
        is_set_up.store(true, Ordering::Relaxed);
    };
    let renewals = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(client.renew("t").await, json!({ "return": {}, "id": 1 }));
        let refused = client.renew("nobody").await;
        let text = refused["error"]["desc"].as_str().unwrap();
        assert!(text.contains("'nobody' has no backup access"), "{text}");
        assert!(!is_set_up.load(Ordering::Relaxed), "the answers came after the setup");
    };
    tokio::join!(set_up, renewals);
    assert_eq!(status(&lab, "t").await.unwrap()["devices"][0]["state"], "active");
    guest.await.unwrap();
    lab.teardown("u", true).await;
    // Its lease is over, or it is ended here.
    lab.teardown("t", false).await;
    Arc::into_inner(lab).unwrap().quit().await;
}

/// A daemon with a slow node for a fleecing image, and data on the disk.
async fn slow_image() -> Lab {
    let lab = Lab::start(Setup { slow_fleecing: true, ..Setup::default() }).await;
    lab.guest_writes("disk0", 0x61, 0, DISK_BYTES).await;
    lab
}

/// The guest writes until the snapshot breaks, because its fleecing image is stuck for a few seconds;
/// `t` is renewed meanwhile. Another setup would move the image: it drains it.
async fn break_by_writing(lab: &Lab) {
    let mut events = lab.session().events();
    let write = lab.guest_writes("disk0", 0x62, 0, DISK_BYTES);
    let renewals = async {
        let broken = lab.next_event(&mut events, "BACKUP_ACCESS_BROKEN");
        tokio::pin!(broken);
        while tokio::time::timeout(Duration::from_millis(300), &mut broken).await.is_err() {
            renew(lab, "t").await.unwrap();
        }
    };
    tokio::join!(write, renewals);
    renew(lab, "t").await.unwrap();
}

#[tokio::test]
async fn a_renewal_behind_a_long_teardown_comes_in_time() {
    for renews in [true, false] {
        let lab = slow_image().await;
        let mut events = lab.session().events();
        let devices = json!([
            { "device": "disk0", "fleecing": "slow", "buffer-size": 0, "timeout": 1 },
            // The teardown waits for so long.
            { "device": "disk1", "timeout": 50 },
        ]);
        lab.setup("u", devices).await;
        setup(&lab, "t", json!([{ "device": "alone", "fleecing": "shared" }]), 1).await;
        break_by_writing(&lab).await;
        let start = Instant::now();
        let teardown = async {
            lab.teardown("u", false).await;
            let took = start.elapsed();
            assert!(took > ONE_SECOND_LEASE, "the teardown took {took:?}: the test shows nothing");
        };
        let rest = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            if renews {
                renew(&lab, "t").await.unwrap();
            }
            assert!(status(&lab, "t").await.is_some(), "renewed: {renews}");
        };
        tokio::join!(teardown, rest);
        let event = lab.next_event(&mut events, TORN_DOWN).await;
        assert_eq!(event["target-id"], "u");
        lease_ends(&lab, &mut events, false).await;
        lab.quit().await;
    }
}

#[tokio::test]
async fn exports_with_clients_that_read_end_with_the_lease() {
    for iothread in [false, true] {
        let lab = Arc::new(Lab::start(Setup { iothread, ..Setup::default() }).await);
        let before = lab.graph().await;
        let mut events = lab.session().events();
        lab.guest_writes("disk0", 0x42, 0, DISK_BYTES).await;
        let devices = json!([{ "device": "disk0", "bitmap-mode": "new" }, { "device": "disk1" }]);
        let infos = setup(&lab, "t", devices, 3).await;
        let name = lab.export(&infos[0]).await;
        let mut idle = Client::connect(&lab, &name);
        idle.reads(0x42);
        let reader = tokio::spawn({
            let (lab, name) = (Arc::clone(&lab), name.clone());
            async move {
                let reads = vec![format!("read -q -P 0x42 0 {DISK_BYTES}"); 5000];
                lab.try_io(&name, &reads).await
            }
        });
        let writer = lab.write_forever("disk0");
        lease_ends(&lab, &mut events, false).await;
        let text = reader.await.unwrap();
        assert!(text.contains("failed") && !text.contains("verification"), "{text}");
        assert!(writer.stop().await > 0);
        let exports = lab.run("query-block-exports", json!({})).await;
        assert!(exports.as_array().unwrap().iter().all(|export| export["id"] != json!(name)));
        drop(idle);
        lab.until("the graph is as before", async || lab.graph().await == before).await;
        let lab = Arc::into_inner(lab).unwrap();
        lab.quit().await;
    }
}

#[tokio::test]
async fn a_stuck_fleecing_image_is_tried_again_until_it_moves() {
    let lab = slow_image().await;
    let before = lab.graph().await;
    let mut events = lab.session().events();
    let device = json!({ "device": "disk0", "fleecing": "slow", "bitmap-mode": "new",
                         "buffer-size": 0, "timeout": 1 });
    setup(&lab, "t", json!([device]), 1).await;
    lab.guest_writes("disk0", 0x62, 0, DISK_BYTES).await;
    lab.until("its teardown has begun", async || {
        let status = status(&lab, "t").await.expect("the image is stuck for longer");
        status["devices"][0]["state"] == "closing"
    })
    .await;
    assert_eq!(lease_left(&lab, "t").await, 0);
    let error = renew(&lab, "t").await.unwrap_err();
    assert!(error.contains("target 't' is closing: its lease of 1 seconds ended"), "{error}");
    // Guest and QMP go on.
    lab.guest_writes("disk0", 0x63, 0, MIB).await;
    let again = request("t", json!([{ "device": "disk1" }]), 0);
    let error = lab.try_run("backup-access-setup", again).await.unwrap_err().to_string();
    assert!(error.contains("already has a backup access"), "{error}");
    // A drained section would wait for the image, and the guest with it.
    let other = request("other", json!([{ "device": "disk1" }]), 0);
    let error = lab.try_run("backup-access-setup", other).await.unwrap_err().to_string();
    assert!(
        error.contains(
            "device 'disk0' of target 't' has had a request to its fleecing image 'slow'"
        ),
        "{error}"
    );
    let reason = lease_ends(&lab, &mut events, false).await;
    assert!(reason.contains("device 'disk0'"), "the broken snapshot is named: {reason}");
    lab.expect("disk0", 0x63, 0, MIB).await;
    lab.expect("disk0", 0x62, MIB, MIB).await;
    assert_eq!(lab.graph().await, before);
    assert_eq!(lab.bitmaps("disk0").await.len(), 2, "one and its guard");
    lab.quit().await;
}

#[tokio::test]
async fn what_a_command_said_about_success_counts_when_the_lease_ends_it() {
    let lab = slow_image().await;
    let mut events = lab.session().events();
    let device = json!({ "device": "disk0", "fleecing": "slow", "bitmap-mode": "new",
                         "buffer-size": 0, "timeout": 1 });
    let infos = setup(&lab, "t", json!([device]), 2).await;
    break_by_writing(&lab).await;
    let arguments = json!({ "target-id": "t", "success": true });
    let error = lab.try_run("backup-access-teardown", arguments).await.unwrap_err().to_string();
    assert!(error.contains("in flight"), "{error}");
    let error = renew(&lab, "t").await.unwrap_err();
    assert!(error.contains("the backup access of target 't' is closing"), "{error}");
    lease_ends(&lab, &mut events, true).await;
    let device = json!({ "device": "disk0", "bitmap-mode": "use",
                         "generation": infos[0]["generation"] });
    let infos = lab.setup("t", json!([device])).await;
    assert_eq!(infos[0]["bitmap-action"], "used");
    lab.teardown("t", false).await;
    lab.quit().await;
}

#[tokio::test]
async fn a_broken_snapshot_ends_with_its_lease() {
    let lab = Lab::start(Setup::default()).await;
    let before = lab.graph().await;
    let mut events = lab.session().events();
    lab.guest_writes("disk0", 0x71, 0, DISK_BYTES).await;
    let device = json!({ "device": "disk0", "fleecing-limit": MIB, "buffer-size": 0,
                         "bitmap-mode": "use" });
    let infos = setup(&lab, "t", json!([device]), 3).await;
    let name = lab.export(&infos[0]).await;
    lab.guest_writes("disk0", 0x72, 0, DISK_BYTES).await;
    let broken = lab.next_event(&mut events, "BACKUP_ACCESS_BROKEN").await;
    renew(&lab, "t").await.unwrap();
    let text = lab.try_io(&name, &["read 0 4k"]).await;
    assert!(text.contains("failed"), "{text}");
    let reason = lease_ends(&lab, &mut events, false).await;
    assert!(reason.contains(broken["error"].as_str().unwrap()), "{reason}");
    assert_eq!(lab.graph().await, before);
    lab.expect("disk0", 0x72, 0, DISK_BYTES).await;
    lab.quit().await;
}

#[tokio::test]
async fn a_foreign_user_of_the_snapshot_delays_the_end() {
    let lab = Lab::start(Setup::default()).await;
    let before = lab.graph().await;
    let mut events = lab.session().events();
    let infos = setup(&lab, "t", json!([{ "device": "disk0" }]), 3).await;
    let node = infos[0]["node-name"].as_str().unwrap();
    let above = json!({ "driver": "raw", "node-name": "above", "file": node, "read-only": true });
    lab.run("blockdev-add", above).await;
    lab.until("its teardown has begun", async || {
        status(&lab, "t").await.unwrap()["devices"][0]["state"] == "closing"
    })
    .await;
    // Nothing is saved for it any more.
    lab.guest_writes("disk0", 0x32, 0, DISK_BYTES).await;
    assert_eq!(status(&lab, "t").await.unwrap()["devices"][0]["captured"], 0);
    lab.run("blockdev-del", json!({ "node-name": "above" })).await;
    lease_ends(&lab, &mut events, false).await;
    assert_eq!(lab.graph().await, before);
    lab.quit().await;
}

#[tokio::test]
async fn setups_and_teardowns_beside_it_do_not_keep_an_access_alive() {
    let lab = Lab::start(Setup::default()).await;
    let mut events = lab.session().events();
    setup(&lab, "t", json!([{ "device": "disk0" }]), 1).await;
    let start = Instant::now();
    while status(&lab, "t").await.is_some() {
        assert!(start.elapsed() < Duration::from_secs(60), "it does not end");
        lab.setup("u", json!([{ "device": "disk1" }])).await;
        lab.teardown("u", true).await;
    }
    while lab.next_event(&mut events, TORN_DOWN).await["target-id"] != "t" {}
    lab.quit().await;
}

/// How a process with accesses is ended.
#[derive(Debug, Clone, Copy)]
enum End {
    Quit,
    Terminate,
}

/// The process ends well although there are accesses, and says that they are gone.
async fn ends_well(lab: Lab, end: End) {
    let mut events = lab.session().events();
    match end {
        End::Quit => lab.quit().await,
        End::Terminate => {
            lab.signal(Signal::TERM);
            lab.ends().await;
        }
    }
    let event = only_torn_down(&mut events).await;
    let expected = json!({ "target-id": "t", "success": false, "reason": "QEMU exits" });
    assert_eq!(event, expected);
}

#[tokio::test]
async fn the_daemon_says_at_its_exit_that_accesses_are_gone() {
    for (end, iothread) in [(End::Quit, false), (End::Terminate, true), (End::Terminate, false)] {
        let lab = Lab::start(Setup { iothread, ..Setup::default() }).await;
        let device = |name: &str| json!({ "device": name, "bitmap-mode": "use" });
        let devices = json!([device("disk0"), device("disk1")]);
        let infos = setup(&lab, "t", devices, 60).await;
        lab.guest_writes("disk0", 0x12, 0, MIB).await;
        let name = lab.export(&infos[0]).await;
        let mut client = Client::connect(&lab, &name);
        client.reads(0);
        client.keeps_reading();
        ends_well(lab, end).await;
    }
}

#[tokio::test]
async fn the_daemon_exits_in_the_middle_of_a_teardown_after_a_lease() {
    let lab = slow_image().await;
    let device = json!({ "device": "disk0", "fleecing": "slow", "buffer-size": 0, "timeout": 1 });
    let infos = setup(&lab, "t", json!([device]), 1).await;
    lab.export(&infos[0]).await;
    lab.guest_writes("disk0", 0x62, 0, DISK_BYTES).await;
    lab.until("its teardown has begun", async || {
        status(&lab, "t").await.expect("the image is stuck")["devices"][0]["state"] == "closing"
    })
    .await;
    let mut events = lab.session().events();
    lab.quit().await;
    let event = only_torn_down(&mut events).await;
    assert_eq!((&event["target-id"], &event["success"]), (&json!("t"), &json!(false)));
    let reason = event["reason"].as_str().unwrap();
    assert!(reason.contains("its lease of 1 seconds ended without a renewal"), "{reason}");
}

#[tokio::test]
async fn the_emulator_has_leases_and_says_at_its_exit_that_accesses_are_gone() {
    for end in [End::Quit, End::Terminate] {
        let lab = Lab::start_emulator(&[]).await;
        let before = lab.graph().await;
        let mut events = lab.session().events();
        let device = json!([{ "device": "disk0", "bitmap-mode": "use" }]);
        setup(&lab, "t", device.clone(), 1).await;
        lease_ends(&lab, &mut events, false).await;
        assert_eq!(lab.graph().await, before);
        setup(&lab, "t", device, 60).await;
        ends_well(lab, end).await;
    }
}

/// Puts a boot sector on the disks of the emulator that switches the machine off by its power
/// management.
fn bootable(lab: &Lab) {
    const PM1_CONTROL: [u8; 2] = 0x604_u16.to_le_bytes();
    const SOFT_OFF: [u8; 2] = 0x2000_u16.to_le_bytes();
    let mut sector = vec![0_u8; 512];
    // mov dx, PM1_CONTROL; mov ax, SOFT_OFF; out dx, ax; again: hlt; jmp again
    let code: Vec<u8> =
        [&[0xba], &PM1_CONTROL[..], &[0xb8], &SOFT_OFF, &[0xef, 0xf4, 0xeb, 0xfd]].concat();
    sector[..code.len()].copy_from_slice(&code);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    for disk in ["disk0", "shared", "old"] {
        let file = std::fs::File::options().write(true).open(lab.path(disk)).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &sector, 0).unwrap();
    }
}

#[tokio::test]
async fn an_access_outlives_a_guest_that_switches_itself_off() {
    let lab = Lab::start_emulator(&["-no-shutdown"]).await;
    let before = lab.graph().await;
    bootable(&lab);
    let mut events = lab.session().events();
    let infos = setup(&lab, "t", json!([{ "device": "disk0", "bitmap-mode": "use" }]), 60).await;
    let old = json!([{ "device": "old" }]);
    setup(&lab, "old", old, 0).await;
    lab.run("cont", json!({})).await;
    lab.next_event(&mut events, "SHUTDOWN").await;
    lab.until("it is off", async || {
        lab.run("query-status", json!({})).await["status"] == "shutdown"
    })
    .await;
    for target in ["t", "old"] {
        assert_eq!(status(&lab, target).await.unwrap()["devices"][0]["state"], "active");
    }
    renew(&lab, "t").await.unwrap();
    // The snapshot can still be used, and everything can be taken out again.
    let above = json!({ "driver": "raw", "node-name": "above", "file": infos[0]["node-name"],
                        "read-only": true });
    lab.run("blockdev-add", above).await;
    lab.run("blockdev-del", json!({ "node-name": "above" })).await;
    assert_eq!(lab.teardown("t", true).await, json!({ "existed": true }));
    assert_eq!(lab.teardown("old", true).await, json!({ "existed": true }));
    setup(&lab, "t", json!([{ "device": "disk0" }]), 1).await;
    for target in ["t", "old"] {
        let event = lab.next_event(&mut events, TORN_DOWN).await;
        assert_eq!(event, json!({ "target-id": target, "success": true }));
    }
    lease_ends(&lab, &mut events, false).await;
    assert_eq!(lab.graph().await, before);
    lab.quit().await;
}

#[tokio::test]
async fn an_emulator_that_ends_with_its_guest_ends_well() {
    let lab = Lab::start_emulator(&[]).await;
    bootable(&lab);
    let mut events = lab.session().events();
    setup(&lab, "t", json!([{ "device": "disk0", "bitmap-mode": "use" }]), 60).await;
    lab.run("cont", json!({})).await;
    lab.ends().await;
    let event = only_torn_down(&mut events).await;
    assert_eq!(event["reason"], "QEMU exits");
}
