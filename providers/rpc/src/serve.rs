// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a plugin may ask the host for while it backs a guest up: the regions of a disk, and commands
//! that read a container's tree.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use provider_api::{
    Call, CancellationToken, ContainerCommand, ContainerRunner, DirtyRegions, Error, Identity,
    Kind, NextRegions, Region, RegionPage, Result,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::connection::Shared;
use crate::files::{open_stdin, open_stdout};
use crate::wire::{CONTRACT_ERROR, Dec, INVALID_PARAMS, METHOD_NOT_FOUND, shorten};

/// Most requests of a plugin that are worked on at the same time.
pub const PLUGIN_REQUESTS_MAX: usize = 16;
/// Regions in one reply; the rest comes with the next page.
const REGIONS_MAX: usize = 4000;
/// Arguments, variables and paths of a command.
const COMMAND_WORDS_MAX: usize = 4096;

/// What can be asked for, and what is being asked for.
#[derive(Default)]
pub(crate) struct Served(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    last_handle: u64,
    regions: HashMap<String, (Arc<dyn DirtyRegions>, CancellationToken)>,
    runners: HashMap<String, (Arc<dyn ContainerRunner>, CancellationToken)>,
    /// Requests of the plugin under way, by their ids as they are on the wire.
    running: HashMap<String, CancellationToken>,
}

/// Takes an offer back when the call that made it ends, and stops what is under way with it.
pub(crate) struct Offer {
    inner: Arc<Mutex<Inner>>,
    handles: Vec<String>,
    cancel: CancellationToken,
}

impl Drop for Offer {
    fn drop(&mut self) {
        self.cancel.cancel();
        let mut inner = lock(&self.inner);
        for handle in &self.handles {
            inner.regions.remove(handle);
            inner.runners.remove(handle);
        }
    }
}

impl Offer {
    /// Lets the plugin ask for the regions of a disk.
    pub(crate) fn regions(&mut self, source: Arc<dyn DirtyRegions>) -> String {
        let mut inner = lock(&self.inner);
        let handle = inner.next_handle("regions");
        inner.regions.insert(handle.clone(), (source, self.cancel.clone()));
        self.handles.push(handle.clone());
        handle
    }

    /// Lets the plugin run commands that read a container's tree.
    pub(crate) fn runner(&mut self, runner: Arc<dyn ContainerRunner>) -> String {
        let mut inner = lock(&self.inner);
        let handle = inner.next_handle("container");
        inner.runners.insert(handle.clone(), (runner, self.cancel.clone()));
        self.handles.push(handle.clone());
        handle
    }
}

fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    // Nothing that panics runs under the lock.
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    fn next_handle(&mut self, what: &str) -> String {
        self.last_handle += 1;
        format!("{what}-{}", self.last_handle)
    }
}

impl Served {
    /// Offers that end with this call, at the latest.
    pub(crate) fn offer(&self, call: &Call) -> Offer {
        let cancel = call.cancel.child_token();
        Offer { inner: Arc::clone(&self.0), handles: Vec::new(), cancel }
    }

    pub(crate) fn cancel(&self, id: Option<&Value>) {
        let id = id.map(ToString::to_string).unwrap_or_default();
        if let Some(cancel) = lock(&self.0).running.get(&id) {
            cancel.cancel();
        }
    }
}

/// Removes a request of the plugin from those under way.
struct Running {
    inner: Arc<Mutex<Inner>>,
    id: String,
}

impl Drop for Running {
    fn drop(&mut self) {
        lock(&self.inner).running.remove(&self.id);
    }
}

/// Begins to work on a request of the plugin; an error is why the plugin has to end.
pub(crate) fn request(
    shared: &Arc<Shared>,
    method: &str,
    id: Value,
    params: Option<Value>,
) -> std::result::Result<(), String> {
    let key = id.to_string();
    let cancel = CancellationToken::new();
    {
        let mut inner = lock(&shared.served.0);
        if inner.running.contains_key(&key) {
            let id = shorten(&key, 40);
            return Err(format!("sent a second request {id} before the first one was answered"));
        }
        if inner.running.len() >= PLUGIN_REQUESTS_MAX {
            let why = format!("sent more than {PLUGIN_REQUESTS_MAX} requests at the same time");
            let refused =
                error_reply(&id, &refusal(CONTRACT_ERROR, format!("The provider {why}.")));
            return if shared.try_send(refused) { Ok(()) } else { Err(why) };
        }
        inner.running.insert(key.clone(), cancel.clone());
    }
    let running = Running { inner: Arc::clone(&shared.served.0), id: key };
    let (shared, method) = (Arc::clone(shared), method.to_owned());
    tokio::spawn(async move {
        let stop = cancel.clone();
        let stop_with_process = shared.broken().clone();
        let work = answer(&shared, &method, params.unwrap_or_default(), &cancel);
        let answered = tokio::select! {
            answered = work => answered,
            () = stop_with_process.cancelled() => { stop.cancel(); return; }
        };
        let reply = match answered {
            Ok(result) => json!({"jsonrpc": "2.0", "id": id, "result": result}).to_string(),
            Err(refusal) => error_reply(&id, &refusal),
        };
        shared.answer(reply, || drop(running)).await;
    });
    Ok(())
}

fn error_reply(id: &Value, Refusal { code, error }: &Refusal) -> String {
    let data = json!({"kind": error.kind.word()});
    let error = json!({"code": code, "message": error.to_string(), "data": data});
    json!({"jsonrpc": "2.0", "id": id, "error": error}).to_string()
}

struct Refusal {
    code: i64,
    error: Error,
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self { code: CONTRACT_ERROR, error }
    }
}

fn refusal(code: i64, why: String) -> Refusal {
    Refusal { code, error: Error::new(Kind::Invalid, why) }
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct RegionsParams {
    regions: String,
    offset: Dec<u64>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct CommandParams {
    container: String,
    argv: Vec<String>,
    identity: Identity,
    #[serde(default)]
    env: HashMap<String, String>,
    #[serde(default)]
    paths: Vec<PathBuf>,
    #[serde(default)]
    stdin: Option<PathBuf>,
    #[serde(default)]
    stdout: Option<PathBuf>,
}

async fn answer(
    shared: &Shared,
    method: &str,
    params: Value,
    cancel: &CancellationToken,
) -> std::result::Result<Value, Refusal> {
    let bad = |error: serde_json::Error| {
        refusal(INVALID_PARAMS, format!("'{}': {error}", shorten(method, 40)))
    };
    match method {
        "regions" => {
            let params: RegionsParams = serde_json::from_value(params).map_err(bad)?;
            regions(shared, params, cancel).await
        }
        "container.command" => {
            let params: CommandParams = serde_json::from_value(params).map_err(bad)?;
            command(shared, params, cancel).await
        }
        other => {
            let why = format!("The host does not know the method '{}'.", shorten(other, 40));
            Err(refusal(METHOD_NOT_FOUND, why))
        }
    }
}

/// A call that ends with the plugin's request and with the offer.
fn call_of(offer: &CancellationToken, cancel: &CancellationToken) -> (Call, impl Drop) {
    let both = offer.child_token();
    let (ended, linked) = (cancel.clone(), both.clone());
    let task = tokio::spawn(async move {
        ended.cancelled().await;
        linked.cancel();
    });
    struct Stop(tokio::task::JoinHandle<()>);
    impl Drop for Stop {
        fn drop(&mut self) {
            self.0.abort();
        }
    }
    (Call { cancel: both, deadline: None }, Stop(task))
}

fn unknown(what: &str, handle: &str) -> Refusal {
    let handle = shorten(handle, 40);
    refusal(INVALID_PARAMS, format!("There are no {what} '{handle}', or they are no more."))
}

async fn regions(
    shared: &Shared,
    params: RegionsParams,
    cancel: &CancellationToken,
) -> std::result::Result<Value, Refusal> {
    let found = lock(&shared.served.0).regions.get(&params.regions).cloned();
    let (source, offer) = found.ok_or_else(|| unknown("regions", &params.regions))?;
    let (call, _stop) = call_of(&offer, cancel);
    let asked = call.cancel.run_until_cancelled(source.page(params.offset.0, &call)).await;
    Ok(json!(WirePage::from(asked.unwrap_or_else(cancelled)?)))
}

#[derive(Serialize)]
struct WireRegion {
    offset: Dec<u64>,
    length_bytes: Dec<u64>,
    zero: bool,
}

impl From<Region> for WireRegion {
    fn from(region: Region) -> Self {
        let Region { offset, length_bytes, zero } = region;
        Self { offset: Dec(offset), length_bytes: Dec(length_bytes), zero }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case", tag = "next")]
enum WireNext {
    From { offset: Dec<u64> },
    End { total_bytes: Dec<u64> },
}

#[derive(Serialize)]
struct WirePage {
    regions: Vec<WireRegion>,
    #[serde(flatten)]
    next: WireNext,
}

impl From<RegionPage> for WirePage {
    /// A page that does not fit into a message is cut; the next one begins where it was.
    fn from(mut page: RegionPage) -> Self {
        let cut = page.regions.get(REGIONS_MAX).map(|region| region.offset);
        page.regions.truncate(REGIONS_MAX);
        let next = match (cut, page.next) {
            (Some(offset), _) | (None, NextRegions::From { offset }) => {
                WireNext::From { offset: Dec(offset) }
            }
            (None, NextRegions::End { total_bytes }) => {
                WireNext::End { total_bytes: Dec(total_bytes) }
            }
        };
        Self { regions: page.regions.into_iter().map(Into::into).collect(), next }
    }
}

fn cancelled<T>() -> Result<T> {
    Err(Error::new(Kind::Cancelled, "The backup that this belongs to has ended."))
}

async fn command(
    shared: &Shared,
    params: CommandParams,
    cancel: &CancellationToken,
) -> std::result::Result<Value, Refusal> {
    let found = lock(&shared.served.0).runners.get(&params.container).cloned();
    let (runner, offer) =
        found.ok_or_else(|| unknown("files of a container", &params.container))?;
    let words = params.argv.len() + params.env.len() + params.paths.len();
    if params.argv.is_empty() || words > COMMAND_WORDS_MAX {
        let why = format!("A command has 1 to {COMMAND_WORDS_MAX} words; this one has {words}.");
        return Err(refusal(INVALID_PARAMS, why));
    }
    let (call, _stop) = call_of(&offer, cancel);
    let run = async {
        let stdin = match &params.stdin {
            Some(path) => Some(open_stdin(path).await?),
            None => None,
        };
        let stdout = match &params.stdout {
            Some(path) => Some(open_stdout(path).await?),
            None => None,
        };
        let command = ContainerCommand {
            argv: params.argv.into_iter().map(Into::into).collect(),
            identity: params.identity,
            env: params.env.into_iter().map(|(key, value)| (key.into(), value.into())).collect(),
            paths: params.paths,
            stdin,
            stdout,
            stderr: None,
        };
        runner.command(command, &call).await
    };
    // Dropping it kills the command.
    let end = call.cancel.run_until_cancelled(run).await.unwrap_or_else(cancelled)?;
    Ok(json!({"exit_code": end.exit_code, "stderr_tail": end.stderr_tail}))
}
