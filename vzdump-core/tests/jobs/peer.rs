// SPDX-License-Identifier: MIT OR Apache-2.0
//! A QEMU that speaks just enough QMP, refuses what the real one refuses, and fails on demand.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

/// What to do with a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reaction {
    /// Execute and answer it.
    Answer,
    /// Refuse it.
    Refuse,
    /// Execute it and never answer.
    Silent,
}

/// Decides on each command by its number, from 1, and name.
pub type Script = Box<dyn FnMut(usize, &str) -> Reaction + Send>;

/// An active access.
#[derive(Debug, Clone)]
pub struct Access {
    pub target: String,
    pub devices: Vec<Value>,
    pub lease_s: Option<u64>,
    /// `buffer-total` of the request.
    pub buffer_total: Option<u64>,
}

#[derive(Default)]
pub struct State {
    /// Node names and sizes; the disks and the fleecing images.
    pub nodes: BTreeMap<String, u64>,
    pub server: bool,
    /// Where the server listens, if a backup started it.
    socket: Option<String>,
    pub exports: Vec<String>,
    pub access: Option<Access>,
    /// Every command, with what matters of its arguments.
    pub log: Vec<String>,
    /// Commands so far, those of the handshake excepted.
    pub count: usize,
    pub state: &'static str,
    /// It stays when its guest switches off.
    pub stays: bool,
    /// A QEMU without our extension.
    pub lacks_access: bool,
    script: Option<Arc<Mutex<Script>>>,
    events: Option<mpsc::UnboundedSender<Value>>,
}

/// A scripted QEMU behind a monitor socket.
#[derive(Clone)]
pub struct Peer {
    state: Arc<Mutex<State>>,
    task: Arc<tokio::task::JoinHandle<()>>,
}

impl Peer {
    pub fn start(socket: &Path, disks: &[(&str, u64)]) -> Self {
        let nodes = disks.iter().map(|(key, size)| (format!("drive-{key}"), *size)).collect();
        let state = State { nodes, state: "running", ..State::default() };
        let state = Arc::new(Mutex::new(state));
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket).unwrap();
        let shared = Arc::clone(&state);
        let task = tokio::spawn(async move {
            // One client at a time, as a monitor.
            while let Ok((stream, _)) = listener.accept().await {
                serve(stream, &shared).await;
            }
        });
        Self { state, task: Arc::new(task) }
    }

    /// QEMU's connections break and its socket answers no more.
    pub fn end(&self) {
        self.task.abort();
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn script(&self, script: impl FnMut(usize, &str) -> Reaction + Send + 'static) {
        self.state().script = Some(Arc::new(Mutex::new(Box::new(script))));
    }

    pub fn unscript(&self) {
        self.state().script = None;
    }

    pub fn send_event(&self, event: Value) {
        self.state().events.as_ref().unwrap().send(event).unwrap();
    }

    pub fn log(&self) -> Vec<String> {
        self.state().log.clone()
    }

    /// Only the disks are left.
    pub fn assert_clean(&self, what: &str) {
        let state = self.state();
        let extra: Vec<_> = state.nodes.keys().filter(|node| node.contains("fleecing")).collect();
        assert!(extra.is_empty(), "{what}: nodes {extra:?} are left\n{:#?}", state.log);
        assert!(state.access.is_none(), "{what}: an access is left\n{:#?}", state.log);
        assert!(!state.server && state.exports.is_empty(), "{what}: exports are left");
        assert!(!state.stays, "{what}: QEMU would stay\n{:#?}", state.log);
        assert_ne!(state.state, "paused", "{what}: the guest does not run\n{:#?}", state.log);
    }
}

async fn serve(stream: UnixStream, state: &Mutex<State>) {
    let (reader, mut writer) = stream.into_split();
    let mut lines = BufReader::new(reader).lines();
    let (sender, mut events) = mpsc::unbounded_channel();
    state.lock().unwrap().events = Some(sender);
    let greeting = json!({"QMP": {"version": {"qemu": {"micro": 13, "minor": 0, "major": 10},
        "package": ""}, "capabilities": ["oob"]}});
    if write(&mut writer, &greeting).await.is_err() {
        return;
    }
    loop {
        tokio::select! {
            line = lines.next_line() => {
                let Ok(Some(line)) = line else { return };
                let request: Value = serde_json::from_str(line.trim_start_matches('\u{feff}')).unwrap();
                let Some(mut answer) = react(&request, state) else { continue };
                if let Some(id) = request.get("id") {
                    answer["id"] = id.clone();
                }
                if write(&mut writer, &answer).await.is_err() {
                    return;
                }
            }
            Some(event) = events.recv() => {
                if write(&mut writer, &event).await.is_err() {
                    return;
                }
            }
        }
    }
}

async fn write(
    writer: &mut tokio::net::unix::OwnedWriteHalf,
    value: &Value,
) -> std::io::Result<()> {
    writer.write_all(format!("{value}\r\n").as_bytes()).await
}

fn react(request: &Value, state: &Mutex<State>) -> Option<Value> {
    let name = request["execute"].as_str().unwrap().to_owned();
    let arguments = &request["arguments"];
    if name == "qmp_capabilities" {
        return Some(json!({"return": {}}));
    }
    let (number, script) = {
        let mut state = state.lock().unwrap();
        state.count += 1;
        state.log.push(describe(&name, arguments));
        (state.count, state.script.clone())
    };
    // Without the lock of the state: a script may look at it.
    let reaction = script.map_or(Reaction::Answer, |script| script.lock().unwrap()(number, &name));
    if reaction == Reaction::Refuse {
        return Some(error("GenericError", "scripted failure"));
    }
    let result = state.lock().unwrap().execute(&name, arguments);
    if reaction == Reaction::Silent {
        return None;
    }
    Some(match result {
        Ok(value) => json!({"return": value}),
        Err(desc) => error("GenericError", &desc),
    })
}

fn error(class: &str, desc: &str) -> Value {
    json!({"error": {"class": class, "desc": desc}})
}

fn describe(name: &str, arguments: &Value) -> String {
    let detail = match name {
        "blockdev-add" | "blockdev-del" => {
            arguments["node-name"].as_str().unwrap_or("?").to_owned()
        }
        "block-export-add" => format!("{} {}", arguments["id"], arguments["bitmaps"]),
        "backup-access-teardown" => format!("success={}", arguments["success"]),
        "backup-access-setup" => arguments["devices"].to_string(),
        "set-action" => format!("shutdown={}", arguments["shutdown"].as_str().unwrap_or("?")),
        _ => String::new(),
    };
    format!("{name} {detail}").trim().to_owned()
}

impl State {
    fn execute(&mut self, name: &str, arguments: &Value) -> Result<Value, String> {
        let text = |key: &str| arguments[key].as_str().unwrap_or_default().to_owned();
        match name {
            "query-commands" if self.lacks_access => Ok(json!([{"name": "query-status"}])),
            "query-commands" => Ok(json!([{"name": "backup-access-setup"}])),
            "query-status" => Ok(json!({"running": self.state == "running", "status": self.state})),
            "stop" | "cont" => {
                self.state = if name == "stop" { "paused" } else { "running" };
                Ok(json!({}))
            }
            "set-action" => {
                self.stays = arguments["shutdown"] == "pause";
                Ok(json!({}))
            }
            "query-named-block-nodes" => Ok(self
                .nodes
                .iter()
                .map(|(node, size)| {
                    json!({"node-name": node, "drv": "raw", "file": "f",
                        "image": {"virtual-size": size, "filename": "f", "format": "raw"}})
                })
                .collect()),
            "query-block-exports" => Ok(self
                .exports
                .iter()
                .map(
                    |id| json!({"id": id, "type": "nbd", "node-name": "n", "shutting-down": false}),
                )
                .collect()),
            "blockdev-add" => {
                let path = arguments["file"]["filename"].as_str().unwrap();
                let size = std::fs::metadata(path).map_err(|e| e.to_string())?.len();
                match self.nodes.insert(text("node-name"), size) {
                    None => Ok(json!({})),
                    Some(_) => Err("Duplicate nodes".into()),
                }
            }
            "blockdev-del" => self.delete_node(&text("node-name")),
            "backup-access-setup" => self.setup(arguments),
            "query-backup-access" => Ok(self.query()),
            "backup-access-renew" if self.access.is_none() => Err("no backup access".into()),
            "backup-access-renew" => Ok(json!({})),
            "backup-access-teardown" => {
                let existed = self.access.take().is_some();
                // The real one shuts the exports of its nodes down.
                self.exports.clear();
                Ok(json!({"existed": existed}))
            }
            "nbd-server-start" if self.server => Err("NBD server already running".into()),
            "nbd-server-start" => {
                let socket = arguments["addr"]["data"]["path"].as_str().unwrap();
                std::fs::write(socket, "").unwrap();
                self.socket = Some(socket.to_owned());
                self.server = true;
                Ok(json!({}))
            }
            "nbd-server-stop" if !self.server => Err("NBD server not running".into()),
            // The real one waits for their requests, and all of QEMU with it.
            "nbd-server-stop" if !self.exports.is_empty() => Err("QEMU hangs".into()),
            "nbd-server-stop" => {
                self.server = false;
                self.socket.take().map(std::fs::remove_file);
                Ok(json!({}))
            }
            "block-export-add" => {
                if !self.server || self.access.is_none() {
                    return Err("nothing to export".into());
                }
                self.exports.push(text("id"));
                Ok(json!({}))
            }
            other => Err(format!("The command {other} has not been found")),
        }
    }

    fn delete_node(&mut self, node: &str) -> Result<Value, String> {
        let is_used = self.access.as_ref().is_some_and(|access| {
            access.devices.iter().any(|device| device["fleecing"].as_str() == Some(node))
        });
        if is_used {
            return Err(format!("Node {node} is in use"));
        }
        match self.nodes.remove(node) {
            Some(_) => Ok(json!({})),
            None => Err(format!("Failed to find node with node-name='{node}'")),
        }
    }

    fn setup(&mut self, arguments: &Value) -> Result<Value, String> {
        if self.access.is_some() {
            return Err("an access is active".into());
        }
        let devices = arguments["devices"].as_array().unwrap().clone();
        let mut infos = Vec::new();
        for device in &devices {
            let node = device["device"].as_str().unwrap();
            let size = *self.nodes.get(node).ok_or("no such device")?;
            let fleecing = device["fleecing"].as_str().unwrap();
            if self.nodes.get(fleecing) != Some(&size) {
                return Err("fleecing size mismatch".into());
            }
            let mut info = json!({"node-name": format!("ba-{node}"), "device": node, "size": size,
                "drained-ns": 1234, "bitmap-action": "not-used"});
            match device["bitmap-mode"].as_str() {
                Some("none") | None => {}
                Some(mode) => {
                    let is_used = mode == "use";
                    info["bitmap-action"] = json!(if is_used { "used" } else { "new" });
                    info["bitmap-node-name"] = json!(format!("ba-{node}"));
                    info["bitmap-name"] = json!("dirty");
                    info["generation"] = json!("gen-next");
                    info["dirty"] = json!(if is_used { 65536 } else { size });
                }
            }
            infos.push(info);
        }
        let target = arguments["target-id"].as_str().unwrap().to_owned();
        let lease_s = arguments["lease"].as_u64();
        let buffer_total = arguments["buffer-total"].as_u64();
        self.access = Some(Access { target, devices, lease_s, buffer_total });
        Ok(Value::Array(infos))
    }

    fn query(&self) -> Value {
        let Some(access) = &self.access else { return json!([]) };
        let devices: Vec<Value> = access
            .devices
            .iter()
            .map(|device| {
                json!({"device": device["device"], "node-name": "n", "size": 1, "state": "active",
                    "captured": 4096, "in-ram": 0, "in-log": 0, "zero": 0, "released": 512,
                    "metadata": 0, "writes-delayed": 3, "delay-total-ns": 9, "delay-max-ns": 7,
                    "delay-p50-ns": 3, "delay-p99-ns": 7, "delay-p999-ns": 7,
                    "delay-histogram": [{"le-ns": 3, "count": 2}, {"le-ns": 7, "count": 1}],
                    "written": 0, "log-allocated": 0, "shared": 0, "discards-postponed": 0,
                    "overflows": 0, "bitmap-action": "new"})
            })
            .collect();
        json!([{"target-id": access.target, "start-time": 1, "devices": devices}])
    }
}
