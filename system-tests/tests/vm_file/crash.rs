// SPDX-License-Identifier: MIT OR Apache-2.0
//! kill -9 of the backup at every step, for a provider that reads files.

use crate::provider::Behaviour;
use crate::scene::{KIB, Scene};

/// Steps, and whether the archive is there when the next one begins.
pub const STEPS: [(&str, bool); 15] = [
    ("OpenSource", false),
    ("entry:directory", false),
    ("entry:nbd_server", false),
    ("entry:file_export", false),
    ("Transfer", false),
    ("JournalCommit", false),
    ("entry:committing", false),
    ("Commit", false),
    ("RecordOutcome", true),
    ("entry:outcome", true),
    ("Teardown", true),
    ("CloseSource", true),
    ("Release", true),
    ("Cleanup", true),
    ("CloseJournal", true),
];

/// Kills a backup at each step: the next run, or the doctor, leaves no mount and no daemon, and the next
/// backup is an increment that misses nothing.
pub async fn kill_everywhere(scene: &mut Scene, steps: &[(&str, bool)]) {
    scene.good_backup().await;
    for (turn, &(step, is_committed)) in steps.iter().enumerate() {
        println!("killed at {step}");
        let pattern = u8::try_from(turn).unwrap() + 1;
        let offset = 64 * KIB * u64::from(pattern);
        scene.write(pattern, offset, 4 * KIB).await;
        let archives = scene.provider.archives().len();
        scene.backup_killed_at(step).await;
        let expected = archives + usize::from(is_committed);
        assert_eq!(scene.provider.archives().len(), expected, "{step}");
        scene.write(0x80 + pattern, offset + 16 * KIB, 4 * KIB).await;
        match turn % 3 {
            0 => scene.recover().await,
            1 => scene.doctor().await,
            // The next backup is the recovery.
            _ => {}
        }
        if turn % 3 < 2 {
            scene.assert_tidy(step);
        }
        let next = scene.backup().await;
        assert!(next.is_success(), "{step}: {next:?}");
        scene.assert_holds(&next, &scene.bytes, step);
        assert_eq!(next.volumes[0].bitmap_action, "used", "{step}");
        scene.assert_tidy(step);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_every_step_leaves_no_mount_and_no_daemon() {
    let mut scene = Scene::new(Behaviour::default());
    kill_everywhere(&mut scene, &STEPS).await;
}
