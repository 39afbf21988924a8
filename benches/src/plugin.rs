// SPDX-License-Identifier: MIT OR Apache-2.0
//! The directory provider behind the provider protocol, as a process of its own: what backups over it cost
//! beyond the same provider in process. Backups, lists and removals; it declares no restores.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use provider_api::{
    API_VERSION, Access, Archive, BitmapRequest, Call, CancellationToken, Error, GuestBackup,
    GuestInfo, Job, JobInfo, Kind, Progress, Provider, Result, Uuid, VmBackup, Volume, VolumeInfo,
};
use provider_directory::{DirectoryOptions, DirectoryProvider, ToolPaths};
use provider_rpc::LINE_BYTES_MAX;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::mpsc;

/// Messages that wait to be written; further reports of progress are left out.
const WAITING_MAX: usize = 256;

type Guest = Arc<tokio::sync::Mutex<Option<Box<dyn GuestBackup>>>>;

/// What all requests share.
struct Plugin {
    provider: OnceLock<DirectoryProvider>,
    out: mpsc::Sender<Value>,
    last: AtomicU64,
    /// Of the requests under way.
    cancels: Mutex<HashMap<u64, CancellationToken>>,
    jobs: tokio::sync::Mutex<HashMap<String, Box<dyn Job>>>,
    guests: Mutex<HashMap<String, Guest>>,
}

/// Serves the host until its messages end.
///
/// # Errors
/// A line is no message, or too long.
pub async fn serve(
    input: impl AsyncRead + Unpin,
    output: impl AsyncWrite + Unpin + Send + 'static,
) -> anyhow::Result<()> {
    let (out, messages) = mpsc::channel(WAITING_MAX);
    tokio::spawn(write(messages, output));
    let plugin = Arc::new(Plugin {
        provider: OnceLock::new(),
        out,
        last: AtomicU64::new(0),
        cancels: Mutex::default(),
        jobs: tokio::sync::Mutex::default(),
        guests: Mutex::default(),
    });
    let mut input = BufReader::new(input);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read =
            (&mut input).take(LINE_BYTES_MAX as u64 + 1).read_until(b'\n', &mut line).await?;
        if read == 0 {
            return Ok(());
        }
        anyhow::ensure!(line.ends_with(b"\n"), "a line is cut off, or too long");
        plugin.receive(serde_json::from_slice(&line)?);
    }
}

async fn write(mut messages: mpsc::Receiver<Value>, mut output: impl AsyncWrite + Unpin) {
    while let Some(mut message) = messages.recv().await {
        message["jsonrpc"] = json!("2.0");
        let line = format!("{message}\n");
        // If nobody reads any more, our input ends, too.
        if output.write_all(line.as_bytes()).await.is_err() || output.flush().await.is_err() {
            return;
        }
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn invalid(why: impl Into<String>) -> Error {
    Error::new(Kind::Invalid, why)
}

fn param<T: DeserializeOwned>(params: &Value, key: &str) -> Result<T> {
    T::deserialize(&params[key]).map_err(|error| invalid(format!("'{key}': {error}")))
}

/// Numbers of 64 bits are texts.
fn number<T: std::str::FromStr>(params: &Value, key: &str) -> Result<T> {
    let text: String = param(params, key)?;
    text.parse().map_err(|_| invalid(format!("'{key}' is no number: {text}")))
}

fn bytes(params: &Value, key: &str) -> Result<Vec<u8>> {
    let text: String = param(params, key)?;
    STANDARD.decode(text).map_err(|error| invalid(format!("'{key}': {error}")))
}

impl Plugin {
    fn receive(self: &Arc<Self>, message: Value) {
        let id = message["id"].as_u64();
        match (message["method"].as_str(), id) {
            (Some("$/cancel"), _) => {
                let id = message["params"]["id"].as_u64().unwrap_or_default();
                if let Some(cancel) = held(&self.cancels).get(&id) {
                    cancel.cancel();
                }
            }
            (Some(method), Some(id)) => {
                let cancel = CancellationToken::new();
                held(&self.cancels).insert(id, cancel.clone());
                let (plugin, method) = (Arc::clone(self), method.to_owned());
                tokio::spawn(async move {
                    let params = &message["params"];
                    let wait = number(params, "timeout_ms").ok().map(Duration::from_millis);
                    let deadline = wait.and_then(|wait| Instant::now().checked_add(wait));
                    let call = Call { cancel, deadline };
                    let answer = plugin.handle(&method, params, id, &call).await;
                    held(&plugin.cancels).remove(&id);
                    // The host is gone if it cannot be told.
                    let _ = plugin.out.send(reply(id, &method, answer)).await;
                });
            }
            // We ask nothing, so there are no answers; and no other notifications.
            _ => {}
        }
    }

    fn handle_for(&self, kind: &str) -> String {
        format!("{kind}-{}", self.last.fetch_add(1, Ordering::Relaxed))
    }

    fn provider(&self) -> Result<&DirectoryProvider> {
        self.provider.get().ok_or_else(|| invalid("'configure' has to come first."))
    }

    fn guest(&self, params: &Value) -> Result<(String, Guest)> {
        let handle: String = param(params, "guest")?;
        let guest = held(&self.guests).get(&handle).map(Arc::clone);
        guest.map(|guest| (handle, guest)).ok_or_else(|| invalid("There is no such guest."))
    }

    /// The answer; none to a method that is not there.
    async fn handle(
        &self,
        method: &str,
        params: &Value,
        id: u64,
        call: &Call,
    ) -> Result<Option<Value>> {
        Ok(Some(match method {
            "initialize" => hello(),
            "configure" => {
                let path: PathBuf = param(&params["properties"], "path")?;
                let options = DirectoryOptions { path, tools: ToolPaths::default() };
                let provider = DirectoryProvider::new(options);
                self.provider.set(provider).map_err(|_| invalid("It is configured already."))?;
                json!({})
            }
            "start_job" | "start_guest" | "finish_job" => self.job(method, params, call).await?,
            "plan_volumes" => self.plan(params, call).await?,
            "backup_vm" => self.back_up(params, id, call).await?,
            "commit" | "abort" => self.end(method, params, call).await?,
            _ => return self.storage(method, params, call).await,
        }))
    }

    async fn storage(&self, method: &str, params: &Value, call: &Call) -> Result<Option<Value>> {
        let provider = self.provider()?;
        let archive = || param::<String>(params, "archive");
        Ok(Some(match method {
            "activate" => provider.activate(call).await.map(|()| json!({}))?,
            "status" => {
                let status = provider.status(call).await?;
                json!({"total_bytes": status.total_bytes.to_string(),
                       "used_bytes": status.used_bytes.to_string()})
            }
            "list" => {
                let archives: Vec<Value> = provider.list(call).await?.iter().map(entry).collect();
                json!({"archives": archives})
            }
            "guest_config" => {
                let found = provider.guest_config(&archive()?, call).await?;
                let firewall = found.firewall.map(|firewall| STANDARD.encode(firewall));
                json!({"config": STANDARD.encode(found.config), "firewall": firewall})
            }
            "remove" => provider.remove(&archive()?, call).await.map(|()| json!({}))?,
            "commit_outcome" => {
                let outcome = provider.commit_outcome(param::<Uuid>(params, "id")?, call).await?;
                serde_json::to_value(outcome).map_err(|error| invalid(error.to_string()))?
            }
            _ => return Ok(None),
        }))
    }

    async fn job(&self, method: &str, params: &Value, call: &Call) -> Result<Value> {
        if method == "start_job" {
            let info = JobInfo { start_time_s: number(params, "start_time_s")? };
            let job = self.provider()?.start_job(info, call).await?;
            let handle = self.handle_for("job");
            self.jobs.lock().await.insert(handle.clone(), job);
            return Ok(json!({"job": handle}));
        }
        let handle: String = param(params, "job")?;
        let missing = || invalid("There is no such job.");
        if method == "finish_job" {
            let job = self.jobs.lock().await.remove(&handle).ok_or_else(missing)?;
            return job.finish(call).await.map(|()| json!({}));
        }
        let info = GuestInfo {
            kind: param(params, "kind")?,
            id: param(params, "guest_id")?,
            name: param(params, "name")?,
            start_time_s: number(params, "start_time_s")?,
        };
        let mut jobs = self.jobs.lock().await;
        let guest = jobs.get_mut(&handle).ok_or_else(missing)?.start_guest(info, call).await?;
        let handle = self.handle_for("guest");
        let answer = json!({"guest": handle, "archive_name": guest.archive_name()});
        held(&self.guests).insert(handle, Arc::new(tokio::sync::Mutex::new(Some(guest))));
        Ok(answer)
    }

    async fn plan(&self, params: &Value, call: &Call) -> Result<Value> {
        let volumes: Vec<Value> = param(params, "volumes")?;
        let volumes: Result<Vec<_>> = volumes.iter().map(volume_info).collect();
        let (_, guest) = self.guest(params)?;
        let mut guest = guest.lock().await;
        let requests = here(&mut guest)?.plan_volumes(&volumes?, call).await?;
        let requests: Vec<Value> = requests.iter().map(bitmap_request).collect();
        Ok(json!({"requests": requests}))
    }

    async fn back_up(&self, params: &Value, request: u64, call: &Call) -> Result<Value> {
        let volumes: Vec<Value> = param(params, "volumes")?;
        let volumes: Result<Vec<_>> = volumes.iter().map(volume).collect();
        let has_firewall = !params["firewall"].is_null();
        let backup = VmBackup {
            config: bytes(params, "config")?,
            firewall: has_firewall.then(|| bytes(params, "firewall")).transpose()?,
            volumes: volumes?,
        };
        let (_, guest) = self.guest(params)?;
        let mut guest = guest.lock().await;
        let progress = Reports::new(request, self.out.clone());
        let moved = here(&mut guest)?.backup_vm(backup, &progress, call).await?;
        Ok(json!({
            "total_bytes": moved.total_bytes.to_string(),
            "read_bytes": moved.read_bytes.to_string(),
            "zero_bytes": moved.zero_bytes.to_string(),
            "written_bytes": moved.written_bytes.to_string(),
        }))
    }

    /// Waits for a copy that was cancelled and has not ended yet.
    async fn end(&self, method: &str, params: &Value, call: &Call) -> Result<Value> {
        let (handle, guest) = self.guest(params)?;
        let taken = guest.lock().await.take();
        held(&self.guests).remove(&handle);
        let guest = taken.ok_or_else(|| invalid("The guest's backup has ended already."))?;
        if method == "abort" {
            let why: String = param(params, "why")?;
            return guest.abort(&why, call).await.map(|()| json!({}));
        }
        let committed = guest.commit(param(params, "id")?, call).await?;
        Ok(json!({"archive": committed.archive, "size_bytes": committed.size_bytes.to_string()}))
    }
}

fn here(guest: &mut Option<Box<dyn GuestBackup>>) -> Result<&mut Box<dyn GuestBackup>> {
    guest.as_mut().ok_or_else(|| invalid("The guest's backup has ended already."))
}

fn hello() -> Value {
    json!({
        "name": "directory over RPC",
        "api_version": API_VERSION,
        "capabilities": {"vm_nbd": true, "vm_incremental": true, "remove": true},
        "properties": [
            {"name": "path", "kind": "path", "required": true, "description": "The directory."}
        ],
    })
}

fn entry(archive: &Archive) -> Value {
    json!({
        "name": archive.name,
        "subtype": archive.subtype,
        "guest_id": archive.guest_id,
        "time_s": archive.time_s.to_string(),
        "size_bytes": archive.size_bytes.to_string(),
        "base": archive.base,
        "commit_id": archive.commit_id,
        "protected": archive.protected,
        "notes": archive.notes,
    })
}

fn volume_info(wire: &Value) -> Result<VolumeInfo> {
    Ok(VolumeInfo {
        device: param(wire, "device")?,
        size_bytes: number(wire, "size_bytes")?,
        volume_id: param(wire, "volume_id")?,
    })
}

fn volume(wire: &Value) -> Result<Volume> {
    let access = &wire["access"];
    if access["kind"] != "nbd" {
        return Err(invalid("Only disks that are offered over NBD can be read."));
    }
    let has_dirty = !wire["dirty_bytes"].is_null();
    Ok(Volume {
        device: param(wire, "device")?,
        size_bytes: number(wire, "size_bytes")?,
        access: Access::Nbd {
            socket: param(access, "socket")?,
            export: param(access, "export")?,
            bitmap: param(access, "bitmap")?,
        },
        bitmap_mode: param(wire, "bitmap_mode")?,
        bitmap_action: param(wire, "bitmap_action")?,
        generation: param(wire, "generation")?,
        dirty_bytes: has_dirty.then(|| number(wire, "dirty_bytes")).transpose()?,
    })
}

fn bitmap_request(request: &BitmapRequest) -> Value {
    match request {
        BitmapRequest::None => json!({"bitmap": "none"}),
        BitmapRequest::New => json!({"bitmap": "new"}),
        BitmapRequest::Use { generation, readable } => {
            json!({"bitmap": "use", "generation": generation, "readable": readable})
        }
    }
}

fn reply(id: u64, method: &str, answer: Result<Option<Value>>) -> Value {
    match answer {
        Ok(Some(result)) => json!({"id": id, "result": result}),
        Ok(None) => {
            let why = format!("There is no method '{method}'.");
            json!({"id": id, "error": {"code": -32601, "message": why}})
        }
        Err(error) => {
            let data = json!({"kind": error.kind.word(), "dependents": error.dependents});
            json!({"id": id, "error": {"code": -32000, "message": error.message, "data": data}})
        }
    }
}

/// How often a disk's progress is told.
const REPORT_INTERVAL: Duration = Duration::from_millis(200);

/// Passes on what a copy reports.
struct Reports {
    request: u64,
    out: mpsc::Sender<Value>,
    /// When each disk's progress was told last.
    told: Mutex<HashMap<String, Instant>>,
}

impl Reports {
    fn new(request: u64, out: mpsc::Sender<Value>) -> Self {
        Self { request, out, told: Mutex::default() }
    }

    fn is_due(&self, device: &str) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let is_due = told.get(device).is_none_or(|last| now - *last >= REPORT_INTERVAL);
        if is_due {
            told.insert(device.to_owned(), now);
        }
        is_due
    }
}

impl Progress for Reports {
    fn report(&self, device: &str, done_bytes: u64, total_bytes: u64, zero_bytes: u64) {
        if done_bytes < total_bytes && !self.is_due(device) {
            return;
        }
        // The next one says more.
        let _ = self.out.try_send(json!({"method": "progress", "params": {
            "request": self.request, "device": device, "done_bytes": done_bytes.to_string(),
            "total_bytes": total_bytes.to_string(), "zero_bytes": zero_bytes.to_string()}}));
    }

    fn log(&self, line: &str) {
        let _ = self.out.try_send(json!({"method": "log", "params": {
            "request": self.request, "level": "info", "line": line}}));
    }
}
