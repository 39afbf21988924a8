// SPDX-License-Identifier: MIT OR Apache-2.0
//! Against the patched system emulator: what a storage daemon does not have.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support;

use qmp_client::commands::{Cont, QueryBlock, QueryQmpSchema, QueryStatus, RunState, Stop};
use serde_json::Value;
use support::emulator;

#[tokio::test]
async fn the_guest_is_stopped_and_goes_on() {
    let Some(daemon) = emulator().await else { return };
    let session = daemon.connect().await;
    let status = session.execute(QueryStatus).await.unwrap();
    assert_eq!((status.running, status.status), (false, RunState::Prelaunch));
    session.execute(Cont).await.unwrap();
    assert!(session.execute(QueryStatus).await.unwrap().running);
    session.execute(Stop).await.unwrap();
    assert_eq!(session.execute(QueryStatus).await.unwrap().status, RunState::Paused);
    assert!(session.execute(QueryBlock).await.unwrap().is_empty());
}

#[tokio::test]
async fn the_schema_shows_the_commands_of_the_extension() {
    let Some(daemon) = emulator().await else { return };
    let schema = daemon.connect().await.execute(QueryQmpSchema).await.unwrap();
    for name in ["backup-access-setup", "backup-access-teardown", "query-backup-access"] {
        let found = |entry: &Value| entry["meta-type"] == "command" && entry["name"] == name;
        assert!(schema.iter().any(found), "{name}");
    }
}
