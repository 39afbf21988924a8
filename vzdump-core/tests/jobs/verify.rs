// SPDX-License-Identifier: MIT OR Apache-2.0
//! Verifications of a provider that works, one that fails, and one that does not go on.

use std::sync::Mutex;
use std::time::Duration;

use provider_api::{CancellationToken, Error, Kind, VerifyExtent, VerifyOptions, VerifyReport};
use vzdump_core::job::Limits;
use vzdump_core::task_log::{Level, Progress, TaskSink};
use vzdump_core::verify::verify;

use crate::provider::{ARCHIVE, FakeProvider, Script};

/// Keeps the last progress.
#[derive(Default)]
struct Last(Mutex<Option<Progress>>);

impl TaskSink for Last {
    fn line(&self, _level: Level, _text: &str) {}
    fn progress(&self, progress: &Progress) {
        *self.0.lock().unwrap() = Some(progress.clone());
    }
}

async fn run(script: Script) -> (Result<VerifyReport, Error>, Option<Progress>) {
    let dir = tempfile::tempdir().unwrap();
    let provider = FakeProvider::new(dir.path(), script);
    let limits = Limits { transfer_stall: Duration::from_millis(50), ..Limits::default() };
    let options = VerifyOptions { extent: VerifyExtent::All, known_sound: Vec::new() };
    let (last, cancel) = (Last::default(), CancellationToken::new());
    let report = verify(&provider, ARCHIVE, 100, &options, &limits, &last, &cancel).await;
    (report, last.0.into_inner().unwrap())
}

#[tokio::test]
async fn what_is_found_and_how_far_it_is_are_passed_on() {
    let found = VerifyReport { read_bytes: 30, blocks: 1, damage_count: 7, ..Default::default() };
    let (report, last) = run(Script { verify: Some(found.clone()), ..Script::default() }).await;
    assert_eq!(report.unwrap(), found);
    let last = last.unwrap();
    assert_eq!((last.guest_id, last.done_bytes, last.total_bytes), (100, 30, 30));
}

#[tokio::test]
async fn a_provider_that_fails_or_does_not_go_on_is_an_error() {
    let (report, _) = run(Script { fail: Some("verify"), ..Script::default() }).await;
    assert_eq!(report.unwrap_err().kind, Kind::Other);
    let (report, _) = run(Script::default()).await;
    let error = report.unwrap_err();
    assert_eq!(error.kind, Kind::Cancelled);
    assert!(error.message.contains("does not go on"), "{error}");
}
