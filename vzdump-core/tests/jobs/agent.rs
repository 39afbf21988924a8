// SPDX-License-Identifier: MIT OR Apache-2.0
//! A scripted guest agent.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

/// What an agent does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Does {
    Everything,
    /// Freezing works but is reported as failed.
    RefusesFreeze,
    /// Never answers.
    Nothing,
    /// Freezes and never says so, and answers what comes after that.
    HangsInFreeze,
    /// Takes longer to freeze than anybody waits, and answers to nothing meanwhile.
    FreezesLate,
    /// Freezes and is dead then: it answers no more.
    DiesFrozen,
    /// Freezes, and answers to the second thaw only: it was started again.
    ThawsLate,
    /// Freezes, and answers to the fourth thaw with an error, and to the fifth as it should.
    ThawsAfterAnError,
}

/// What [`Does::FreezesLate`] takes: longer than the limits of a test for the freeze and all attempts to
/// thaw.
const LATE: Duration = Duration::from_secs(4);

/// A guest agent behind its socket.
pub struct FakeAgent {
    log: Arc<Mutex<Vec<String>>>,
    frozen: watch::Receiver<bool>,
}

impl FakeAgent {
    pub fn start(socket: &Path, does: Does) -> Self {
        let log = Arc::new(Mutex::new(Vec::new()));
        let (sender, frozen) = watch::channel(false);
        let listener = UnixListener::bind(socket).unwrap();
        let shared = Arc::clone(&log);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                serve(stream, &shared, &sender, does).await;
            }
        });
        Self { log, frozen }
    }

    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    pub fn is_frozen(&self) -> bool {
        *self.frozen.borrow()
    }

    /// Waits until the guest is frozen, or thawed.
    pub async fn wait_for(&self, frozen: bool) {
        let mut receiver = self.frozen.clone();
        let wait = receiver.wait_for(|now| *now == frozen);
        tokio::time::timeout(Duration::from_secs(60), wait).await.unwrap().unwrap();
    }
}

async fn serve(
    stream: UnixStream,
    log: &Mutex<Vec<String>>,
    frozen: &watch::Sender<bool>,
    does: Does,
) {
    let (reader, mut writer) = stream.into_split();
    let mut lines = BufReader::new(reader).split(b'\n');
    let mut thaws = 0;
    while let Ok(Some(line)) = lines.next_segment().await {
        let line: Vec<u8> = line.into_iter().filter(|byte| *byte != 0xff).collect();
        let Ok(request) = serde_json::from_slice::<Value>(&line) else { continue };
        let name = request["execute"].as_str().unwrap().to_owned();
        if name != "guest-sync-delimited" {
            log.lock().unwrap().push(name.clone());
        }
        thaws += u32::from(name == "guest-fsfreeze-thaw");
        let is_silent = match does {
            Does::Nothing => true,
            Does::DiesFrozen => *frozen.borrow(),
            // What it is asked after the first thaw is its answer to the second one's sync.
            Does::ThawsLate => *frozen.borrow() && name == "guest-fsfreeze-thaw" && thaws < 2,
            Does::ThawsAfterAnError => name == "guest-fsfreeze-thaw" && thaws < 4,
            _ => false,
        };
        if is_silent {
            continue;
        }
        let mut answer = Vec::new();
        let value = match name.as_str() {
            "guest-sync-delimited" => {
                answer.push(0xff);
                json!({"return": request["arguments"]["id"]})
            }
            "guest-fsfreeze-status" => {
                json!({"return": if *frozen.borrow() { "frozen" } else { "thawed" }})
            }
            "guest-fsfreeze-freeze" => {
                if does == Does::FreezesLate {
                    tokio::time::sleep(LATE).await;
                }
                frozen.send_replace(true);
                if does == Does::HangsInFreeze {
                    continue;
                }
                if does == Does::RefusesFreeze {
                    json!({"error": {"class": "GenericError", "desc": "scripted"}})
                } else {
                    json!({"return": 2})
                }
            }
            "guest-fsfreeze-thaw" if does == Does::ThawsAfterAnError && thaws == 4 => {
                json!({"error": {"class": "GenericError", "desc": "scripted"}})
            }
            "guest-fsfreeze-thaw" => {
                frozen.send_replace(false);
                json!({"return": 2})
            }
            _ => json!({"return": {}}),
        };
        answer.extend_from_slice(format!("{value}\n").as_bytes());
        if writer.write_all(&answer).await.is_err() {
            return;
        }
    }
}
