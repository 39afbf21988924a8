// SPDX-License-Identifier: MIT OR Apache-2.0
//! Providers that commit slowly: the guest does not pay for the commit, and no change is missed whatever
//! becomes of it.

use std::sync::Arc;

use crate::crash::{STEPS, kill_everywhere};
use crate::place::{device_status, writes};
use crate::provider::{Behaviour, Pause};
use crate::scene::{KIB, Scene};

fn slow(commit_fails: bool) -> (Behaviour, Arc<Pause>) {
    let pause = Arc::new(Pause::default());
    let in_commit = Some(Arc::clone(&pause));
    (Behaviour { slow_commit: true, in_commit, commit_fails, ..Behaviour::default() }, pause)
}

#[tokio::test(flavor = "multi_thread")]
async fn old_data_is_dropped_before_a_slow_commit_and_the_next_increment_is_exact() {
    let mut scene = Scene::new(Behaviour { slow_commit: true, ..Behaviour::default() });
    scene.good_backup().await;
    for (turn, commit_fails) in [(0_u8, false), (1, true), (2, false), (3, true), (4, true)] {
        let what = format!("turn {turn}, fails: {commit_fails}");
        let (behaviour, pause) = slow(commit_fails);
        scene.provider.behave(behaviour);
        scene.write(0x10 + turn, 256 * KIB * u64::from(turn), 32 * KIB).await;
        let before = scene.bytes.clone();
        let monitor = scene.place.monitor().await;
        let (offset, length) = (2048 * KIB + 128 * KIB * u64::from(turn), 64 * KIB);
        let look = async {
            pause.reached.notified().await;
            let status = device_status(&monitor).await;
            assert_eq!(status["state"], "active", "{what}: {status}");
            for kept in ["in-ram", "in-log"] {
                assert_eq!(status[kept], 0, "{what}: {status}");
            }
            let captured = status["captured"].as_u64().unwrap();
            let none = serde_json::Value::Null;
            let exports = monitor.execute_raw("query-block-exports", none, None).await.unwrap();
            assert_eq!(exports, serde_json::json!([]), "{what}");
            assert!(scene.mounts().is_empty() && scene.daemons().is_empty(), "{what}");
            // The guest writes on, where the backup has read and elsewhere, and nothing is kept.
            writes(&monitor, 0x20 + turn, offset, length).await;
            writes(&monitor, 0x30 + turn, 256 * KIB * u64::from(turn), 32 * KIB).await;
            let status = device_status(&monitor).await;
            assert_eq!(status["captured"].as_u64().unwrap(), captured, "{what}: {status}");
            pause.go_on.notify_one();
        };
        let (report, ()) = tokio::join!(scene.backup(), look);
        drop(monitor);
        let at = |offset: u64| usize::try_from(offset).unwrap();
        scene.bytes[at(offset)..at(offset + length)].fill(0x20 + turn);
        let second = 256 * KIB * u64::from(turn);
        scene.bytes[at(second)..at(second + 32 * KIB)].fill(0x30 + turn);
        assert_eq!(report.is_success(), !commit_fails, "{what}: {report:?}");
        if report.is_success() {
            scene.assert_holds(&report, &before, &what);
            assert_eq!(report.volumes[0].bitmap_action, "used", "{what}");
        }
        scene.assert_tidy(&what);
    }
    scene.provider.behave(Behaviour { slow_commit: true, ..Behaviour::default() });
    let last = scene.good_backup().await;
    assert_eq!(last.volumes[0].bitmap_action, "used");
    scene.assert_holds(&last, &scene.bytes, "the last one");
    scene.assert_tidy("the last one");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_every_step_of_a_slow_commit_misses_no_change() {
    let mut scene = Scene::new(Behaviour { slow_commit: true, ..Behaviour::default() });
    let at = STEPS.iter().position(|(step, _)| *step == "JournalCommit").unwrap();
    let mut steps = STEPS[at..].to_vec();
    steps.insert(0, ("DropData", false));
    kill_everywhere(&mut scene, &steps).await;
}
