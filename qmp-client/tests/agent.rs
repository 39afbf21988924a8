// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest agent client: against a scripted agent with junk in its channel, and against the real
//! `qemu-ga` where it is installed.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support;

use std::{path::Path, time::Duration};

use proptest::{collection::vec, prelude::*};
use qmp_client::{
    Error,
    agent::{Agent, AgentOptions, FreezeStatus},
};
use serde_json::{Value, json};
use support::{InCi, program, soon};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
};

/// The agent's end of the channel.
struct Guest(BufReader<UnixStream>);

impl Guest {
    async fn send(&mut self, bytes: &[u8]) {
        soon(self.0.write_all(bytes)).await.unwrap();
    }

    /// One line, as bytes.
    async fn read_line(&mut self) -> Vec<u8> {
        let mut line = Vec::new();
        soon(self.0.read_until(b'\n', &mut line)).await.unwrap();
        line
    }

    async fn read(&mut self) -> Value {
        let line = self.read_line().await;
        serde_json::from_slice(&line)
            .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&line)))
    }

    /// Answers a resynchronisation after sending `junk`.
    async fn sync(&mut self, junk: &[u8]) {
        let line = self.read_line().await;
        let start = line.iter().position(|&byte| byte == 0xff).expect("no delimiter");
        let command: Value = serde_json::from_slice(&line[start + 1..]).unwrap();
        assert_eq!(command["execute"], "guest-sync-delimited");
        let reply = json!({"return": command["arguments"]["id"]});
        self.send(junk).await;
        self.send(&[b"\xff", format!("{reply}\n").as_bytes()].concat()).await;
    }

    async fn serve(&mut self, name: &str, result: Value) {
        let command = self.read().await;
        assert_eq!(command["execute"], name);
        // Agents before QEMU 3.0 refuse commands with an id.
        assert!(command.get("id").is_none());
        self.send(format!("{}\n", json!({ "return": result })).as_bytes()).await;
    }
}

fn pair_with(options: AgentOptions) -> (Agent, Guest) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Agent::from_stream(ours, options), Guest(BufReader::new(theirs)))
}

fn impatient() -> AgentOptions {
    AgentOptions { command_timeout: Duration::from_millis(100), ..AgentOptions::default() }
}

#[tokio::test]
async fn junk_before_the_first_command_is_dropped() {
    let junk: [&[u8]; 6] = [
        b"",
        b"{\"return\": {}}\n{\"return\": 7}\n",
        b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON parse error\"}}\n",
        b"half a line of an earlier reply",
        b"\xff{\"return\": 1}\n\xff\xff",
        &[b'x'; 100_000],
    ];
    for junk in junk {
        let (agent, mut guest) =
            pair_with(AgentOptions { max_line_bytes: 5000, ..AgentOptions::default() });
        let script = async {
            guest.sync(junk).await;
            guest.serve("guest-ping", json!({})).await;
            // In step now: the next command needs no new resynchronisation.
            guest.serve("guest-fsfreeze-status", json!("thawed")).await;
        };
        let calls = async {
            agent.ping().await.unwrap();
            agent.fsfreeze_status().await.unwrap()
        };
        let (status, ()) = soon(async { tokio::join!(calls, script) }).await;
        assert_eq!(status, FreezeStatus::Thawed);
    }
}

#[test]
fn no_junk_keeps_the_client_from_getting_in_step() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let piece = prop_oneof![
        vec(any::<u8>(), 0..200),
        Just(b"\xff".to_vec()),
        Just(b"\n".to_vec()),
        Just(b"{\"return\": 12345}\n".to_vec()),
        Just(b"{\"QMP\": {}}\n{\"event\": \"A\"}\n".to_vec()),
    ];
    let junk = vec(piece, 0..20).prop_map(|pieces| pieces.concat());
    let config = ProptestConfig { failure_persistence: None, cases: 200, ..Default::default() };
    proptest!(config, |(junk in junk)| {
        runtime.block_on(async {
            let options = AgentOptions { max_line_bytes: 600, ..AgentOptions::default() };
            let (agent, mut guest) = pair_with(options);
            let script = async {
                guest.sync(&junk).await;
                guest.serve("guest-ping", json!({})).await;
            };
            let (result, ()) = tokio::join!(agent.ping(), script);
            result.unwrap();
        });
    });
}

#[tokio::test]
async fn after_a_timeout_the_late_reply_is_not_taken_for_the_next_one() {
    let (agent, mut guest) = pair_with(AgentOptions {
        freeze_timeout: Duration::from_millis(100),
        ..AgentOptions::default()
    });
    let script = async {
        guest.sync(b"").await;
        assert_eq!(guest.read().await["execute"], "guest-fsfreeze-freeze");
    };
    let (result, ()) = tokio::join!(agent.fsfreeze_freeze(), script);
    let error = result.unwrap_err();
    assert!(matches!(&error, Error::Timeout { command, .. } if command == "guest-fsfreeze-freeze"));
    let script = async {
        guest.sync(b"{\"return\": 3}\n").await;
        guest.serve("guest-fsfreeze-thaw", json!(2)).await;
    };
    let (thawed, ()) = tokio::join!(agent.fsfreeze_thaw(), script);
    assert_eq!(thawed.unwrap(), 2);
}

#[tokio::test]
async fn a_cancelled_command_is_followed_by_a_resynchronisation() {
    let (agent, mut guest) = pair_with(AgentOptions::default());
    let script = async {
        guest.sync(b"").await;
        guest.read().await
    };
    tokio::select! {
        _ = agent.info() => panic!("nobody answered"),
        _ = script => {}
    }
    let script = async {
        guest.sync(b"{\"return\": {\"version\": \"late\"").await;
        guest.serve("guest-ping", json!({})).await;
    };
    let (result, ()) = tokio::join!(agent.ping(), script);
    result.unwrap();
}

#[tokio::test]
async fn a_silent_agent_is_named_with_what_to_do() {
    let (agent, _guest) = pair_with(impatient());
    let error = agent.ping().await.unwrap_err();
    assert!(matches!(error, Error::AgentSilent { after_ms: 100, .. }), "{error}");
    assert!(error.is_timeout());
    assert!(error.to_string().contains("installed and running"), "{error}");
}

#[tokio::test]
async fn an_endless_flood_of_junk_ends_with_the_time_limit() {
    let (agent, mut guest) = pair_with(impatient());
    let flood =
        tokio::spawn(async move { while guest.0.write_all(&[b'x'; 4096]).await.is_ok() {} });
    let error = soon(agent.ping()).await.unwrap_err();
    assert!(matches!(error, Error::AgentSilent { .. }), "{error}");
    drop(agent);
    soon(flood).await.unwrap();
}

#[tokio::test]
async fn refusals_and_nonsense_of_the_guest_are_errors() {
    let (agent, mut guest) = pair_with(AgentOptions::default());
    let script = async {
        guest.sync(b"").await;
        guest.read().await;
        let error = json!({"error": {"class": "GenericError", "desc": "hook failed"}});
        guest.send(format!("{error}\n").as_bytes()).await;
        guest.serve("guest-fsfreeze-freeze", json!(-1)).await;
        guest.serve("guest-fsfreeze-freeze", json!("many")).await;
        guest.read().await;
        guest.send(b"nonsense\n").await;
        // After nonsense the stream is not trusted any more.
        guest.sync(b"").await;
        guest.serve("guest-fsfreeze-freeze", json!(4)).await;
    };
    let calls = async {
        let error = agent.fsfreeze_freeze().await.unwrap_err();
        assert_eq!(error.to_string(), "guest-fsfreeze-freeze failed: hook failed");
        for _ in 0..3 {
            let error = agent.fsfreeze_freeze().await.unwrap_err();
            assert!(matches!(error, Error::Protocol { .. }), "{error}");
        }
        agent.fsfreeze_freeze().await
    };
    let (count, ()) = tokio::join!(calls, script);
    assert_eq!(count.unwrap(), 4);
}

#[tokio::test]
async fn concurrent_calls_take_turns() {
    let (agent, mut guest) = pair_with(AgentOptions::default());
    let script = async {
        guest.sync(b"").await;
        for number in 0..20 {
            guest.read().await;
            guest.send(format!("{{\"return\": {number}}}\n").as_bytes()).await;
        }
    };
    let calls = async {
        let agent = std::sync::Arc::new(agent);
        let calls: Vec<_> = (0..20)
            .map(|_| {
                let agent = agent.clone();
                tokio::spawn(async move { agent.execute_raw("x", Value::Null, None).await })
            })
            .collect();
        let mut seen = Vec::new();
        for call in calls {
            seen.push(soon(call).await.unwrap().unwrap().as_u64().unwrap());
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..20).collect::<Vec<_>>());
    };
    tokio::join!(calls, script);
}

#[tokio::test]
async fn a_channel_that_closes_is_reported() {
    let (agent, guest) = pair_with(AgentOptions::default());
    drop(guest);
    assert!(matches!(soon(agent.ping()).await, Err(Error::Disconnected)));
}

#[tokio::test]
async fn the_real_agent_answers_after_junk() {
    // On hosts it is out of place; the end-to-end test meets it inside a guest.
    let places = [Path::new("/usr/sbin/qemu-ga")];
    let Some(program) = program("qemu-ga", &places, InCi::Optional) else { return };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("ga");
    let mut child = tokio::process::Command::new(program)
        .args(["--method", "unix-listen", "--path"])
        .arg(&socket)
        .arg("--statedir")
        .arg(folder.path())
        .arg("--pidfile")
        .arg(folder.path().join("pid"))
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    support::wait_for_socket(&socket, &mut child).await;

    // An earlier client leaves half a command behind. (An unread reply would be an error on the
    // agent's socket, which ends it; a guest's serial port has no such error.)
    let mut earlier = BufReader::new(UnixStream::connect(&socket).await.unwrap());
    earlier.write_all(b"{\"execute\": \"guest-ping\"}\n").await.unwrap();
    soon(earlier.read_until(b'\n', &mut Vec::new())).await.unwrap();
    earlier.write_all(b"{\"execute\": \"gue").await.unwrap();
    drop(earlier);

    let agent = Agent::connect(&socket, AgentOptions::default()).await.unwrap();
    agent.ping().await.unwrap();
    let info = agent.info().await.unwrap();
    assert!(info.supports("guest-sync-delimited") && info.supports("guest-fsfreeze-thaw"));
    assert!(!info.version.is_empty());
    assert_eq!(agent.fsfreeze_status().await.unwrap(), FreezeStatus::Thawed);
    let error = agent.execute_raw("guest-no-such", Value::Null, None).await.unwrap_err();
    assert!(error.is_command_not_found(), "{error}");
    agent.ping().await.unwrap();
    child.kill().await.unwrap();
}
