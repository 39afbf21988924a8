// SPDX-License-Identifier: MIT OR Apache-2.0
//! Providers that lie: the host says so, or takes no notice, and nothing else comes of it.

use provider_api::{BitmapRequest, Readable};
use vzdump_core::job::report::GuestResult;

use crate::provider::{ARCHIVE, Lie, Script};
use crate::world::World;

/// Disks of the VM.
const DISKS: usize = 2;

#[tokio::test(flavor = "multi_thread")]
async fn claims_about_a_backup_do_no_harm() {
    for lie in [Lie::HugeNumbers, Lie::OtherDisks, Lie::EndlessLines, Lie::OtherArchive] {
        let world = World::with("", Script { lie: Some(lie), ..Script::default() });
        let report = world.backup().await;
        assert!(report.is_success(), "{lie:?}: {report:?}");
        // Notes and protection go to this one.
        assert_eq!(report.archive.as_deref(), Some(ARCHIVE), "{lie:?}");
        let warned = report.warnings.iter().any(|w| w.contains("which is not the one it began"));
        assert_eq!(warned, lie == Lie::OtherArchive, "{lie:?}: {:?}", report.warnings);
        world.assert_clean(&format!("{lie:?}"));
        world.assert_truthful(&format!("{lie:?}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_is_less_than_it_says_fails() {
    let cases = [
        (Lie::HardlyAny, GuestResult::Failed, "looked at 1 bytes of the disks"),
        (Lie::NoArchive, GuestResult::Unknown, "but has no archive"),
    ];
    for (lie, result, fault) in cases {
        let world = World::with("", Script { lie: Some(lie), ..Script::default() });
        let report = world.backup().await;
        assert_eq!(report.result, result, "{lie:?}");
        let said = format!("{:?} {:?}", report.error, report.warnings);
        assert!(said.contains(fault) && !report.is_success(), "{lie:?}: {said}");
        world.assert_truthful(&format!("{lie:?}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_make_no_sense_are_refused() {
    let used = |generation: String| BitmapRequest::Use { generation, readable: Readable::Dirty };
    let cases = [
        (vec![BitmapRequest::New; 50], "50"),
        (vec![used("g".repeat(256)); DISKS], "generation"),
        (vec![used(String::new()); DISKS], "generation"),
    ];
    for (requests, fault) in cases {
        let what = format!("{} requests: {:.60}", requests.len(), format!("{:?}", requests[0]));
        let world = World::with("", Script { requests, ..Script::default() });
        let report = world.backup().await;
        assert_eq!(report.result, GuestResult::Failed, "{what}");
        let error = report.error.unwrap();
        assert!(error.contains(fault) && error.len() < 1000, "{what}: {error}");
        assert_eq!(world.provider.count("abort"), 1, "{what}");
        world.assert_clean(&what);
        world.assert_truthful(&what);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_are_none_are_refused() {
    for name in [String::new(), "x".repeat(100_000), "a\u{1b}[2J".into(), "/etc/passwd".into()] {
        let shown = format!("{name:.20}");
        let world = World::with("", Script { archive_name: Some(name), ..Script::default() });
        let report = world.backup().await;
        let error = report.error.unwrap();
        assert!(error.len() < 1000 && !error.contains('\u{1b}'), "{shown}: {error}");
        world.assert_clean(&shown);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_never_return_are_given_up() {
    for lie in [Lie::NoStart, Lie::NoPlan] {
        let mut world = World::with("", Script { lie: Some(lie), ..Script::default() });
        world.ctx.limits.provider_call = std::time::Duration::from_millis(300);
        let report = world.backup().await;
        assert_eq!(report.result, GuestResult::Failed, "{lie:?}");
        world.assert_clean(&format!("{lie:?}"));
        assert_eq!(world.provider.count("abort"), usize::from(lie == Lie::NoPlan), "{lie:?}");
    }
}
