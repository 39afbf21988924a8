// SPDX-License-Identifier: MIT OR Apache-2.0
//! Against the patched system emulator: what a storage daemon does not have.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support;

use std::{fs::File, io::Write as _};

use qmp_client::commands::{
    AddFd, CloseFd, Cont, GetFd, QueryBlock, QueryQmpSchema, QueryStatus, RunState, Stop,
};
use serde_json::{Value, json};
use support::{Daemon, SOCKET, built};

async fn start() -> Option<Daemon> {
    let program = built("qemu-system-x86_64")?;
    let arguments =
        ["-machine", "none", "-nodefaults", "-display", "none", "-S", "-chardev", SOCKET];
    let monitor = ["-mon", "chardev=qmp,mode=control"];
    Some(Daemon::start(program, &[&arguments[..], &monitor[..]].concat()).await)
}

#[tokio::test]
async fn the_guest_is_stopped_and_goes_on() {
    let Some(daemon) = start().await else { return };
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
    let Some(daemon) = start().await else { return };
    let schema = daemon.connect().await.execute(QueryQmpSchema).await.unwrap();
    for name in ["backup-access-setup", "backup-access-teardown", "query-backup-access"] {
        let found = |entry: &Value| entry["meta-type"] == "command" && entry["name"] == name;
        assert!(schema.iter().any(found), "{name}");
    }
}

#[tokio::test]
async fn descriptors_arrive_even_when_many_are_sent_at_once() {
    let Some(daemon) = start().await else { return };
    let session = daemon.connect().await;
    let calls: Vec<_> = (0..32)
        .map(|number: u32| {
            let path = daemon.path(&format!("file{number}"));
            File::create_new(&path).unwrap().write_all(&number.to_le_bytes()).unwrap();
            let (session, fd) = (session.clone(), File::open(&path).unwrap().into());
            tokio::spawn(async move {
                let opaque = Some(path.display().to_string());
                let command = AddFd { fdset_id: Some(number.into()), opaque };
                session.execute_with_fd(command, fd).await.unwrap()
            })
        })
        .collect();
    for call in calls {
        call.await.unwrap();
    }
    let sets = session.execute_raw("query-fdsets", Value::Null, None).await.unwrap();
    let process = daemon.child.id().unwrap();
    let mut seen = 0;
    for fd in sets.as_array().unwrap().iter().flat_map(|set| set["fds"].as_array().unwrap()) {
        // QEMU's own view: its descriptor must be the file that went with that command.
        let target = std::fs::read_link(format!("/proc/{process}/fd/{}", fd["fd"])).unwrap();
        assert_eq!(json!(target), fd["opaque"]);
        seen += 1;
    }
    assert_eq!(seen, 32);

    let fdname = "named".to_owned();
    let fd = File::open(daemon.path("file0")).unwrap().into();
    session.execute_with_fd(GetFd { fdname: fdname.clone() }, fd).await.unwrap();
    session.execute(CloseFd { fdname }).await.unwrap();
}
