// SPDX-License-Identifier: MIT OR Apache-2.0
//! The backup access guard against a scripted peer: on every way out exactly one teardown is sent,
//! and none for an access that is not ours.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support;

use std::time::Duration;

use qmp_client::{
    Error, EventItem,
    backup::{
        self, AccessState, BackupAccess, BitmapAction, BrokenEvent, DelayBucket, Device, OnError,
        RemovedBitmap, SetupRequest, TornDownEvent,
    },
    commands::Stop,
};
use serde_json::{Value, json};
use support::{Peer, pair, soon};

fn request() -> SetupRequest {
    SetupRequest::new("target", vec![Device::new("drive0"), Device::new("drive1")])
}

fn infos() -> Value {
    let info = |device: &str| {
        json!({"node-name": format!("ba-{device}"), "device": device, "size": 1 << 20,
            "bitmap-action": "used", "generation": "g", "dirty": 65536, "drained-ns": 1})
    };
    json!([info("drive0"), info("drive1")])
}

/// Expects a teardown with this verdict and answers it.
async fn serve_teardown(peer: &mut Peer, success: bool) {
    let command = peer.serve(json!({"existed": true})).await;
    assert_eq!(command["execute"], "backup-access-teardown");
    assert_eq!(command["arguments"], json!({"target-id": "target", "success": success}));
}

async fn access() -> (BackupAccess, qmp_client::Session, Peer) {
    let (session, mut peer) = pair().await;
    let setup = BackupAccess::setup(session.clone(), request());
    let (access, command) = tokio::join!(setup, peer.serve(infos()));
    assert_eq!(command["execute"], "backup-access-setup");
    (access.unwrap(), session, peer)
}

#[tokio::test]
async fn commit_tears_down_as_success_and_only_once() {
    let (access, session, mut peer) = access().await;
    assert_eq!(access.infos().len(), 2);
    assert_eq!(access.infos()[0].bitmap_action, BitmapAction::Used);
    assert_eq!(access.infos()[0].dirty_bytes, Some(65536));
    let (result, ()) = tokio::join!(access.commit(), serve_teardown(&mut peer, true));
    assert!(result.unwrap().existed);
    drop(session);
    assert_eq!(peer.try_read().await, None);
}

#[tokio::test]
async fn abort_tears_down_as_failure_and_only_once() {
    let (access, session, mut peer) = access().await;
    let (result, ()) = tokio::join!(access.abort(), serve_teardown(&mut peer, false));
    assert!(result.unwrap().existed);
    drop(session);
    assert_eq!(peer.try_read().await, None);
}

#[tokio::test]
async fn a_dropped_access_is_torn_down_before_any_later_command() {
    let (access, session, mut peer) = access().await;
    drop(access);
    let later = session.execute(Stop);
    let script = async {
        serve_teardown(&mut peer, false).await;
        peer.serve(json!({})).await
    };
    let (result, command) = tokio::join!(later, script);
    result.unwrap();
    assert_eq!(command["execute"], "stop");
}

#[tokio::test]
async fn the_connection_stays_open_until_a_dropped_access_is_torn_down() {
    // QEMU forgets queued commands of a connection that closes.
    let (access, session, mut peer) = access().await;
    drop(access);
    drop(session);
    let command = peer.read().await;
    assert_eq!(command["arguments"]["success"], false);
    peer.reply(&command, json!({"existed": true})).await;
    assert_eq!(peer.try_read().await, None);
}

#[tokio::test]
async fn a_cancelled_commit_goes_on_as_success() {
    let (access, session, mut peer) = access().await;
    let commit = tokio::time::timeout(Duration::from_millis(20), access.commit());
    assert!(commit.await.is_err());
    drop(session);
    serve_teardown(&mut peer, true).await;
    assert_eq!(peer.try_read().await, None);
}

#[tokio::test]
async fn a_failed_commit_sends_no_other_verdict() {
    let (access, session, mut peer) = access().await;
    let script = async {
        let command = peer.read().await;
        peer.fail(&command, "GenericError", "2 requests hang in drive0-fleecing").await;
        serve_teardown(&mut peer, true).await;
    };
    let calls = async {
        let error = access.commit().await.unwrap_err();
        assert!(error.to_string().contains("drive0-fleecing"), "{error}");
        backup::teardown(&session, "target", true).await
    };
    let (result, ()) = tokio::join!(calls, script);
    assert!(result.unwrap().existed);
    drop(session);
    assert_eq!(peer.try_read().await, None);
}

#[tokio::test]
async fn a_setup_granted_after_its_caller_gave_up_is_undone() {
    let (session, mut peer) = pair().await;
    let limit = Duration::from_millis(30);
    let error =
        BackupAccess::setup_with_timeout(session.clone(), request(), limit).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { after_ms: 30, .. }), "{error}");
    drop(session);
    assert_eq!(peer.serve(infos()).await["execute"], "backup-access-setup");
    serve_teardown(&mut peer, false).await;
    assert_eq!(peer.try_read().await, None);
}

#[tokio::test]
async fn a_refused_setup_never_ends_the_access_of_another() {
    let (session, mut peer) = pair().await;
    let script = async {
        let command = peer.read().await;
        peer.fail(&command, "GenericError", "Target 'target' is active already").await;
    };
    let (result, ()) = tokio::join!(BackupAccess::setup(session.clone(), request()), script);
    assert!(matches!(result.unwrap_err(), Error::Qmp { .. }));
    drop(session);
    assert_eq!(peer.try_read().await, None);
}

#[tokio::test]
async fn a_setup_whose_reply_makes_no_sense_is_undone() {
    let mut swapped = infos();
    swapped.as_array_mut().unwrap().reverse();
    for reply in [json!([]), json!("ok"), swapped] {
        let (session, mut peer) = pair().await;
        let script = async {
            peer.serve(reply).await;
            serve_teardown(&mut peer, false).await;
        };
        let setup = BackupAccess::setup(session, request());
        let (result, ()) = soon(async { tokio::join!(setup, script) }).await;
        assert!(matches!(result.unwrap_err(), Error::Protocol { .. }));
        assert_eq!(peer.try_read().await, None);
    }
}

#[tokio::test]
async fn an_access_on_a_broken_connection_ends_without_a_hang() {
    let (dropped, session, peer) = access().await;
    drop(peer);
    soon(session.closed()).await;
    drop(dropped);
    let (access, _session, peer) = access().await;
    drop(peer);
    assert!(matches!(soon(access.commit()).await, Err(Error::Disconnected)));
}

#[tokio::test]
async fn a_qemu_without_the_extension_is_named_in_one_sentence() {
    let (session, mut peer) = pair().await;
    let script = async {
        for _ in 0..6 {
            let command = peer.read().await;
            peer.fail(&command, "CommandNotFound", "The command has not been found").await;
        }
    };
    let calls = async {
        [
            backup::setup(&session, &request()).await.unwrap_err(),
            backup::query(&session).await.unwrap_err(),
            backup::teardown(&session, "target", false).await.unwrap_err(),
            backup::renew(&session, "target").await.unwrap_err(),
            backup::remove_bitmaps(&session, "target", None).await.unwrap_err(),
            BackupAccess::setup(session.clone(), request()).await.unwrap_err(),
        ]
    };
    let (errors, ()) = tokio::join!(calls, script);
    for error in errors {
        assert!(matches!(&error, Error::MissingFeature { .. }), "{error}");
        assert!(error.to_string().starts_with("This QEMU lacks the backup access extension"));
    }
}

#[tokio::test]
async fn the_status_is_that_of_the_target() {
    let (access, _session, mut peer) = access().await;
    let device = |state: &str| {
        json!({"device": "drive0", "node-name": "n", "size": 1, "state": state, "captured": 2,
            "in-ram": 3, "in-log": 4, "zero": 5, "released": 6, "metadata": 7,
            "writes-delayed": 8, "delay-total-ns": 9, "delay-max-ns": 10, "overflows": 11,
            "delay-p50-ns": 13, "delay-p99-ns": 14, "delay-p999-ns": 15,
            "delay-histogram": [{"le-ns": 13, "count": 16}, {"le-ns": 15, "count": 17}],
            "written": 18, "log-allocated": 19, "shared": 21, "discards-postponed": 20,
            "bitmap-action": "new", "future": 12})
    };
    let status = |target: &str, state: &str| json!({"target-id": target, "start-time": 1, "lease-left": 21, "devices": [device(state)]});
    let reply = json!([status("other", "active"), status("target", "half-broken")]);
    let (result, _) = tokio::join!(access.status(), peer.serve(reply));
    let found = result.unwrap().unwrap();
    assert_eq!(found.lease_left_s, Some(21));
    assert_eq!(found.devices[0].state, AccessState::Other("half-broken".into()));
    let device = &found.devices[0];
    assert_eq!(device.in_log_bytes, 4);
    assert_eq!((device.delay_p50_ns, device.delay_p99_ns, device.delay_p999_ns), (13, 14, 15));
    let buckets = [DelayBucket { le_ns: 13, count: 16 }, DelayBucket { le_ns: 15, count: 17 }];
    assert_eq!(device.delay_histogram, buckets);
    assert_eq!((device.written_bytes, device.log_allocated_bytes), (18, 19));
    assert_eq!((device.discards_postponed_bytes, device.shared_bytes), (20, 21));
}

#[tokio::test]
async fn options_are_sent_for_the_access_and_per_device() {
    let (session, mut peer) = pair().await;
    let mut request = request();
    request.buffer_total_bytes = Some(1);
    request.fleecing_limit_bytes = Some(2);
    request.metadata_limit_bytes = Some(3);
    request.reflink_size_bytes = Some(6);
    request.on_error = Some(OnError::BreakGuestWrite);
    request.lease_s = Some(8);
    request.devices[1].fleecing_limit_bytes = Some(4);
    request.devices[1].metadata_limit_bytes = Some(5);
    request.devices[1].reflink_size_bytes = Some(7);
    request.devices[1].on_error = Some(OnError::Other("pause-guest".into()));
    let setup = backup::setup(&session, &request);
    let (result, command) = tokio::join!(setup, peer.serve(infos()));
    result.unwrap();
    let expected = json!({
        "target-id": "target", "buffer-total": 1, "fleecing-limit": 2, "metadata-limit": 3,
        "reflink-size": 6, "on-error": "break-guest-write", "lease": 8,
        "devices": [
            {"device": "drive0"},
            {"device": "drive1", "fleecing-limit": 4, "metadata-limit": 5,
                "reflink-size": 7, "on-error": "pause-guest"},
        ],
    });
    assert_eq!(command["arguments"], expected);
}

#[tokio::test]
async fn a_broken_event_names_the_node_and_the_errno() {
    let (session, mut peer) = pair().await;
    let mut events = session.events();
    peer.send(json!({"event": "BACKUP_ACCESS_BROKEN",
        "timestamp": {"seconds": 1, "microseconds": 2},
        "data": {"target-id": "target", "device": "drive0", "node-name": "ba-1",
            "state": "half-broken", "error": "no space", "errno": 28}}))
        .await;
    let Some(EventItem::Event(event)) = soon(events.next()).await else { panic!("no event") };
    let expected = BrokenEvent {
        target_id: "target".into(),
        device: "drive0".into(),
        node_name: "ba-1".into(),
        state: AccessState::Other("half-broken".into()),
        error: "no space".into(),
        errno: Some(28),
    };
    assert_eq!(BrokenEvent::from_event(&event).unwrap(), Some(expected));
}

#[tokio::test]
async fn a_torn_down_event_says_whether_the_bitmaps_were_settled_as_a_success() {
    let (session, mut peer) = pair().await;
    let mut events = session.events();
    peer.send(json!({"event": "BACKUP_ACCESS_TORN_DOWN",
        "timestamp": {"seconds": 1, "microseconds": 2},
        "data": {"target-id": "target", "success": true}}))
        .await;
    let Some(EventItem::Event(event)) = soon(events.next()).await else { panic!("no event") };
    let expected = TornDownEvent { target_id: "target".into(), success: true, reason: None };
    assert_eq!(TornDownEvent::from_event(&event).unwrap(), Some(expected));
}

#[tokio::test]
async fn bitmaps_are_removed_on_one_device_or_everywhere() {
    let (session, mut peer) = pair().await;
    let reply = json!({"removed": [{"node-name": "disk", "bitmap-name": "ba1-x", "new": 1}]});
    let remove = backup::remove_bitmaps(&session, "target", Some("drive0"));
    let (result, command) = tokio::join!(remove, peer.serve(reply));
    let expected = RemovedBitmap { node_name: "disk".into(), bitmap_name: "ba1-x".into() };
    assert_eq!(result.unwrap(), [expected]);
    assert_eq!(command["execute"], "backup-access-bitmap-remove");
    assert_eq!(command["arguments"], json!({"target-id": "target", "device": "drive0"}));
    let remove = backup::remove_bitmaps(&session, "target", None);
    let (result, command) = tokio::join!(remove, peer.serve(json!({"removed": []})));
    assert_eq!(result.unwrap(), []);
    assert_eq!(command["arguments"], json!({"target-id": "target"}));
}

/// An access with a lease of this many seconds, and the lease that was asked for.
async fn leased(lease_s: Option<u32>) -> (BackupAccess, qmp_client::Session, Peer, Value) {
    let (session, mut peer) = pair().await;
    let request = SetupRequest { lease_s, ..request() };
    let setup = BackupAccess::setup(session.clone(), request);
    let (access, command) = tokio::join!(setup, peer.serve(infos()));
    (access.unwrap(), session, peer, command["arguments"]["lease"].clone())
}

async fn serve_renewal(peer: &mut Peer) {
    let command = peer.serve(json!({})).await;
    assert_eq!(command["execute"], "backup-access-renew");
    assert_eq!(command["arguments"], json!({"target-id": "target"}));
}

#[tokio::test]
async fn an_access_renews_its_lease_until_it_is_ended() {
    let (access, session, mut peer, lease) = leased(Some(1)).await;
    assert_eq!(lease, 1);
    let start = std::time::Instant::now();
    for _ in 0..4 {
        serve_renewal(&mut peer).await;
    }
    let took = start.elapsed();
    assert!(took >= Duration::from_secs(1), "four renewals in {took:?}");
    assert!(access.renewal_error().is_none());
    assert!(tokio::time::timeout(Duration::ZERO, access.lease_lost()).await.is_err());
    let (result, ()) = tokio::join!(access.commit(), serve_teardown(&mut peer, true));
    assert!(result.unwrap().existed);
    // Another renewal would be due by now.
    tokio::time::sleep(Duration::from_millis(700)).await;
    drop(session);
    assert_eq!(peer.try_read().await, None);
}

#[tokio::test]
async fn a_dropped_access_is_not_renewed_any_more() {
    let (access, session, mut peer, _) = leased(Some(1)).await;
    serve_renewal(&mut peer).await;
    drop(access);
    serve_teardown(&mut peer, false).await;
    tokio::time::sleep(Duration::from_millis(700)).await;
    drop(session);
    assert_eq!(peer.try_read().await, None);
}

#[tokio::test]
async fn an_access_has_a_lease_unless_its_owner_wants_none() {
    let (access, _session, _peer, lease) = leased(None).await;
    assert_eq!(lease, backup::DEFAULT_LEASE_S);
    drop(access);
    let (access, _session, mut peer, lease) = leased(Some(0)).await;
    assert_eq!(lease, 0);
    assert!(tokio::time::timeout(Duration::from_millis(500), access.lease_lost()).await.is_err());
    drop(access);
    serve_teardown(&mut peer, false).await;
}

#[tokio::test]
async fn a_renewal_that_is_refused_is_reported_and_not_tried_again() {
    let (access, session, mut peer, _) = leased(Some(1)).await;
    let command = peer.read().await;
    peer.fail(&command, "GenericError", "target 'target' has no backup access").await;
    let error = soon(access.lease_lost()).await;
    assert!(error.to_string().contains("has no backup access"), "{error}");
    assert_eq!(access.renewal_error().unwrap().to_string(), error.to_string());
    tokio::time::sleep(Duration::from_millis(700)).await;
    // It is not known here that the access is gone, so it is ended nevertheless.
    drop(access);
    serve_teardown(&mut peer, false).await;
    drop(session);
    assert_eq!(peer.try_read().await, None);
}

#[tokio::test]
async fn a_late_answer_to_a_renewal_is_reported_and_forgiven() {
    let (access, _session, mut peer, _) = leased(Some(1)).await;
    let late = peer.read().await;
    soon(async {
        while access.renewal_error().is_none() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let error = access.renewal_error().unwrap();
    assert!(error.is_timeout(), "{error}");
    assert!(tokio::time::timeout(Duration::ZERO, access.lease_lost()).await.is_err());
    peer.reply(&late, json!({})).await;
    serve_renewal(&mut peer).await;
    soon(async {
        while access.renewal_error().is_some() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_lease_is_lost_with_its_connection() {
    let (access, _session, peer, _) = leased(Some(1)).await;
    drop(peer);
    let error = soon(access.lease_lost()).await;
    assert!(matches!(*error, Error::Disconnected), "{error}");
}

/// Answers a query with an access of the target that has so many seconds left, or no lease.
async fn serve_query(peer: &mut Peer, left_s: Option<u32>) {
    let mut status = json!({"target-id": "target", "start-time": 1, "devices": []});
    if let Some(left_s) = left_s {
        status["lease-left"] = json!(left_s);
    }
    assert_eq!(peer.serve(json!([status])).await["execute"], "query-backup-access");
}

#[tokio::test]
async fn an_adopted_access_is_renewed_at_once_and_then_as_often_as_its_lease_demands() {
    let (session, mut peer) = pair().await;
    let script = async {
        // Nearly over; how long it is as a whole is seen after a renewal.
        serve_query(&mut peer, Some(0)).await;
        serve_renewal(&mut peer).await;
        serve_query(&mut peer, Some(1)).await;
    };
    let (access, ()) = tokio::join!(BackupAccess::adopt(session, "target"), script);
    let access = access.unwrap().unwrap();
    for _ in 0..3 {
        serve_renewal(&mut peer).await;
    }
    let (result, ()) = tokio::join!(access.commit(), serve_teardown(&mut peer, true));
    assert!(result.unwrap().existed);
}

#[tokio::test]
async fn an_adopted_access_without_a_lease_or_that_is_closing_can_be_ended() {
    for left_s in [None, Some(0)] {
        let (session, mut peer) = pair().await;
        let script = async {
            serve_query(&mut peer, left_s).await;
            if left_s.is_some() {
                let command = peer.read().await;
                peer.fail(&command, "GenericError", "it is closing").await;
            }
        };
        let (access, ()) = tokio::join!(BackupAccess::adopt(session, "target"), script);
        let access = access.unwrap().unwrap();
        let (result, ()) = tokio::join!(access.abort(), serve_teardown(&mut peer, false));
        assert!(result.unwrap().existed);
    }
}
