// SPDX-License-Identifier: MIT OR Apache-2.0
//! QMP clients that are gone before QEMU has answered, and the setups and teardowns of all others.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use qmp_client::{Options, Session};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::machine::Machine;
use super::tally::CLIENTS_KILLED;
use crate::storage::{LIMIT, SECOND_MONITOR};

/// When a client dies.
#[derive(Debug, Clone, Copy)]
pub(super) enum Death {
    /// So long after the command was sent.
    After(Duration),
    /// In the middle of sending it, after so many parts of 256.
    Sending(usize),
}

impl Death {
    pub(super) fn random(rng: &mut impl rand::Rng) -> Self {
        if rng.random_ratio(1, 4) {
            Self::Sending(rng.random_range(0..256))
        } else {
            Self::After(Duration::from_micros(rng.random_range(0..30_000)))
        }
    }
}

/// The line with which the second monitor greets a client, once it has forgotten the one before. What
/// that one did not wait for may come first.
async fn connect(machine: &Machine) -> Result<BufReader<UnixStream>> {
    let greeting = async {
        let stream = UnixStream::connect(machine.storage.path(SECOND_MONITOR)).await?;
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        while !line.contains("\"QMP\"") {
            line.clear();
            ensure!(stream.read_line(&mut line).await? > 0, "the second monitor hangs up");
        }
        Ok(stream)
    };
    timeout(LIMIT, greeting).await.context("no greeting of the second monitor in time")?
}

/// Has a client send a command on the second monitor and die. Whoever calls this keeps the others
/// quiet. When it returns, QEMU is done with the command, whether it was executed or not.
pub(super) async fn killed(
    machine: &Machine,
    command: &str,
    arguments: Value,
    death: Death,
) -> Result<()> {
    let mut stream = connect(machine).await?;
    let text = json!({ "execute": command, "arguments": arguments }).to_string();
    stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n").await?;
    let mut line = String::new();
    timeout(LIMIT, stream.read_line(&mut line)).await.context("no answer in time")??;
    match death {
        Death::After(time) => {
            stream.write_all(text.as_bytes()).await?;
            tokio::time::sleep(time).await;
        }
        Death::Sending(parts) => {
            stream.write_all(&text.as_bytes()[..text.len() * parts / 256]).await?;
        }
    }
    drop(stream);
    machine.tally.add(CLIENTS_KILLED, 1);
    // QEMU has seen the end of the client when it greets the next one, and executes the commands
    // of all monitors one after the other.
    let options = Options { greeting_timeout: LIMIT, ..Options::default() };
    let next = Session::connect(machine.storage.path(SECOND_MONITOR), options).await;
    drop(next.context("the client after the one that died")?);
    machine.storage.run("query-backup-access", json!({})).await?;
    Ok(())
}

/// The access of a target, if there is one.
pub(super) async fn find(machine: &Machine, target: &str) -> Result<Option<Value>> {
    let all = machine.storage.run("query-backup-access", json!({})).await?;
    let all = all.as_array().context("no list of accesses")?;
    Ok(all.iter().find(|access| access["target-id"] == target).cloned())
}

/// Whether a command was refused because of a fleecing image that does not move.
pub(super) fn is_held_up(error: &qmp_client::Error) -> bool {
    error.to_string().contains(" in flight")
}

/// Gives a teardown until it succeeds; how often, and the result. Only as long as an image hangs it
/// may be necessary to give it again.
pub(super) async fn tear_down(
    machine: &Machine,
    target: &str,
    success: bool,
) -> Result<(u64, Value)> {
    let arguments = json!({ "target-id": target, "success": success });
    let start = Instant::now();
    for count in 1.. {
        let quiet = machine.quiet().await;
        let hangs = machine.hangs();
        let tried = machine.storage.try_run("backup-access-teardown", arguments.clone()).await;
        // Whoever else has to end something gets a turn.
        drop(quiet);
        match tried {
            Ok(result) => return Ok((count, result)),
            Err(error) if hangs && is_held_up(&error) && start.elapsed() < 2 * LIMIT => {}
            Err(error) => {
                return Err(error).with_context(|| format!("teardown {count} of {target}"));
            }
        }
    }
    bail!("too many teardowns of {target}")
}
