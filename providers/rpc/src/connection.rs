// SPDX-License-Identifier: MIT OR Apache-2.0
//! One running plugin and the messages to and from it.
//!
//! ```text
//! callers ─► outbox (bounded) ─► writer ─► stdin   plugin
//!    ▲                             ▲                 │
//!    └── replies, progress ── reader ◄───────── stdout
//!                                └─► serve: the plugin's own requests
//! ```
//!
//! Whatever a plugin sends that is not of the protocol ends its process: after that nothing it says could
//! be told apart. Everybody who waits for it gets an error that says what it was.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use provider_api::{Call, CancellationToken, Error, Kind, Progress, Result};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::process::{ChildStderr, ChildStdin, ChildStdout};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::process::{self, END_GRACE, Process, SecretsPipe, Started};
use crate::serve::Served;
use crate::tap::{Direction, Tap};
use crate::wire::{
    Incoming, LINE_BYTES_MAX, Line, LineReader, METHOD_NOT_FOUND, WireError, shorten, shorten_bytes,
};

/// Most requests that a plugin works on at the same time; further ones wait.
pub const REQUESTS_MAX: usize = 64;
/// Messages that wait for the plugin to read them.
const OUTBOX_MAX: usize = 32;
/// Progress reports and log lines that wait for the call they belong to; further ones are dropped.
const EVENTS_MAX: usize = 256;
/// How long a cancelled call waits for the plugin to stop before it returns.
const CANCEL_WAIT: Duration = Duration::from_secs(10);
/// A plugin that does not answer a cancelled request for so long hangs, and is ended.
pub const CANCELLED_MAX: Duration = Duration::from_secs(60);
/// What is waited for the exit status and last words of a plugin that is gone.
const LAST_WORDS_WAIT: Duration = Duration::from_millis(500);
/// What is waited for the reader to say that a plugin that reads no more is gone: it takes that time twice.
const CLOSED_INPUT_WAIT: Duration = LAST_WORDS_WAIT.saturating_mul(3);
/// Longest line of standard error that is kept.
const STDERR_LINE_BYTES_MAX: usize = 4096;
/// Lines of standard error that are logged of one process; the others are read and dropped.
const STDERR_LINES_MAX: u64 = 10_000;
/// Lines of standard error that are part of the error when a plugin dies.
const LAST_WORDS_LINES: usize = 5;
/// How much of a bad message is quoted.
const QUOTE_BYTES: usize = 120;

/// What a plugin says about a request it is working on.
pub(crate) enum Event {
    Progress { device: String, done_bytes: u64, total_bytes: u64, zero_bytes: u64 },
    Log(String),
}

/// A request that was sent.
enum Pending {
    /// Somebody waits for the reply.
    Waiting {
        method: &'static str,
        reply: oneshot::Sender<Result<Value>>,
        events: Option<mpsc::Sender<Event>>,
        _slot: OwnedSemaphorePermit,
    },
    /// Nobody does any more; the plugin was told.
    Abandoned { method: &'static str, _slot: OwnedSemaphorePermit },
}

#[derive(Default)]
struct State {
    last_id: u64,
    pending: HashMap<u64, Pending>,
    /// Why the process is of no use any more.
    fault: Option<String>,
    last_words: VecDeque<String>,
}

/// What the tasks of a connection share.
pub(crate) struct Shared {
    /// The storage's provider in error messages.
    name: String,
    outbox: mpsc::Sender<String>,
    state: Mutex<State>,
    slots: Arc<Semaphore>,
    /// The process is of no use any more.
    broken: CancellationToken,
    /// Nobody uses the connection any more.
    closing: CancellationToken,
    pub(crate) served: Served,
    tap: Option<Tap>,
}

/// A running plugin. When the last user drops it, the plugin's standard input ends, and it has to.
pub(crate) struct Connection {
    shared: Arc<Shared>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.shared.closing.cancel();
    }
}

impl Connection {
    /// Starts a plugin; the secrets have to be sent before it is configured.
    pub(crate) fn start(
        program: &std::path::PathBuf,
        name: String,
        tap: Option<Tap>,
    ) -> Result<(Self, SecretsPipe)> {
        let Started { process, stdin, stdout, stderr, secrets } = process::start(program)?;
        let (outbox, inbox) = mpsc::channel(OUTBOX_MAX);
        let shared = Arc::new(Shared {
            name,
            outbox,
            state: Mutex::default(),
            slots: Arc::new(Semaphore::new(REQUESTS_MAX)),
            broken: CancellationToken::new(),
            closing: CancellationToken::new(),
            served: Served::default(),
            tap,
        });
        tokio::spawn(write_all(Arc::clone(&shared), stdin, inbox));
        tokio::spawn(run(Arc::clone(&shared), process, stdout, stderr));
        Ok((Self { shared }, secrets))
    }

    pub(crate) fn is_alive(&self) -> bool {
        !self.shared.broken.is_cancelled()
    }

    /// The error of an answer that cannot be used.
    pub(crate) fn fault(&self, what: &str) -> Error {
        self.shared.error(Kind::Other, what)
    }

    pub(crate) fn served(&self) -> &Served {
        &self.shared.served
    }

    /// Asks the plugin and waits for its reply.
    pub(crate) async fn request<R: DeserializeOwned>(
        &self,
        method: &'static str,
        params: Value,
        call: &Call,
    ) -> Result<R> {
        self.shared.request(method, params, None, call).await
    }

    /// The same for work that reports how it goes on.
    pub(crate) async fn request_with_progress<R: DeserializeOwned>(
        &self,
        method: &'static str,
        params: Value,
        progress: &dyn Progress,
        call: &Call,
    ) -> Result<R> {
        self.shared.request(method, params, Some(progress), call).await
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that panics runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn broken(&self) -> &CancellationToken {
        &self.broken
    }

    fn tap(&self, direction: Direction, line: &str) {
        if let Some(tap) = &self.tap {
            tap(direction, line);
        }
    }

    fn error(&self, kind: Kind, what: &str) -> Error {
        // What is quoted may be a sentence, too.
        Error::new(kind, format!("The provider {} {}.", self.name, what.trim_end_matches('.')))
    }

    /// The error of everybody who needs a process that is gone.
    fn gone(&self) -> Error {
        let state = self.state();
        let why = state.fault.as_deref().unwrap_or("is ending");
        self.error(Kind::Io, why)
    }

    /// Gives the process up; the first reason counts.
    pub(crate) fn fail(&self, why: String) {
        let pending = {
            let mut state = self.state();
            state.fault.get_or_insert(why);
            std::mem::take(&mut state.pending)
        };
        self.broken.cancel();
        for pending in pending.into_values() {
            if let Pending::Waiting { reply, .. } = pending {
                let _ = reply.send(Err(self.gone()));
            }
        }
    }

    async fn request<R: DeserializeOwned>(
        self: &Arc<Self>,
        method: &'static str,
        params: Value,
        progress: Option<&dyn Progress>,
        call: &Call,
    ) -> Result<R> {
        let sleep = call.deadline.map(|at| tokio::time::sleep_until(at.into()));
        let late = async {
            match sleep {
                Some(sleep) => sleep.await,
                None => std::future::pending().await,
            }
        };
        let value = tokio::select! {
            biased;
            value = self.exchange(method, params, progress, call) => value?,
            () = late => return Err(self.error(
                Kind::Cancelled, &format!("did not answer '{method}' in time"))),
        };
        let shown = || format!("answers '{method}' with something that makes no sense");
        serde_path_to_error::deserialize(value).map_err(|error| {
            let member = error.path().to_string();
            let place = if member == "." { String::new() } else { format!("'{member}': ") };
            let why = shorten(&format!("{place}{}", error.inner()), QUOTE_BYTES);
            self.error(Kind::Other, &format!("{}: {why}", shown()))
        })
    }

    /// Sends the request and waits for the reply, also for a while after it was cancelled.
    async fn exchange(
        self: &Arc<Self>,
        method: &'static str,
        params: Value,
        progress: Option<&dyn Progress>,
        call: &Call,
    ) -> Result<Value> {
        let cancelled = || self.error(Kind::Cancelled, &format!("was cancelled in '{method}'"));
        let sent = call.cancel.run_until_cancelled(self.send_request(
            method,
            params,
            progress.is_some(),
            call.deadline,
        ));
        let Some(sent) = sent.await else { return Err(cancelled()) };
        let (mut asked, mut reply, events) = sent?;
        // A channel that never has anything stands in for calls without progress.
        let mut events = events.unwrap_or_else(|| mpsc::channel(1).1);
        let mut give_up: Option<tokio::time::Instant> = None;
        loop {
            let at = give_up.unwrap_or_else(tokio::time::Instant::now);
            tokio::select! {
                biased;
                () = call.cancel.cancelled(), if give_up.is_none() => {
                    asked.cancel();
                    give_up = Some(tokio::time::Instant::now() + CANCEL_WAIT);
                }
                () = tokio::time::sleep_until(at), if give_up.is_some() => return Err(cancelled()),
                answer = &mut reply => {
                    asked.is_answered = true;
                    // What it reported before it answered comes first.
                    while let Ok(event) = events.try_recv() {
                        report(progress, event);
                    }
                    return answer.unwrap_or_else(|_| Err(self.gone()));
                }
                Some(event) = events.recv() => report(progress, event),
            }
        }
    }

    async fn send_request(
        self: &Arc<Self>,
        method: &'static str,
        mut params: Value,
        has_events: bool,
        deadline: Option<Instant>,
    ) -> Result<(Asked, oneshot::Receiver<Result<Value>>, Option<mpsc::Receiver<Event>>)> {
        let slot = Arc::clone(&self.slots).acquire_owned();
        let slot = self.unless_broken(slot).await?.map_err(|_| self.gone())?;
        // From here on nothing waits: what is registered has been sent.
        let place = self.unless_broken(self.outbox.reserve()).await?.map_err(|_| self.gone())?;
        if let (Some(deadline), Some(params)) = (deadline, params.as_object_mut()) {
            let left = deadline.saturating_duration_since(Instant::now()).as_millis();
            params.insert("timeout_ms".to_owned(), json!(left.to_string()));
        }
        let (reply, answer) = oneshot::channel();
        let (events, reports) = has_events.then(|| mpsc::channel(EVENTS_MAX)).unzip();
        let mut state = self.state();
        let id = state.last_id + 1;
        let message = json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params});
        let message = self.checked(message.to_string())?;
        state.last_id = id;
        if state.fault.is_none() {
            state.pending.insert(id, Pending::Waiting { method, reply, events, _slot: slot });
        }
        drop(state);
        place.send(message);
        let asked = Asked { shared: Arc::clone(self), id, is_answered: false, is_told: false };
        Ok((asked, answer, reports))
    }

    fn checked(&self, message: String) -> Result<String> {
        let bytes = message.len();
        if bytes <= LINE_BYTES_MAX {
            return Ok(message);
        }
        Err(self.error(
            Kind::Invalid,
            &format!("cannot be sent {bytes} bytes at once; {LINE_BYTES_MAX} are the limit"),
        ))
    }

    async fn unless_broken<T>(&self, work: impl Future<Output = T>) -> Result<T> {
        self.broken.run_until_cancelled(work).await.ok_or_else(|| self.gone())
    }

    /// Puts a reply in line; waits while the plugin does not read, and then calls `settled`.
    pub(crate) async fn answer(&self, message: String, settled: impl FnOnce()) {
        if let Ok(Ok(place)) = self.unless_broken(self.outbox.reserve()).await {
            // Before the plugin can see it: it may use the id again at once.
            settled();
            place.send(message);
        }
    }

    /// Puts a message in line if there is room.
    pub(crate) fn try_send(&self, message: String) -> bool {
        self.outbox.try_send(message).is_ok()
    }

    /// Nobody waits for the reply any more.
    fn abandon(self: &Arc<Self>, id: u64) {
        {
            let mut state = self.state();
            let Some(Pending::Waiting { method, _slot, .. }) = state.pending.remove(&id) else {
                return;
            };
            state.pending.insert(id, Pending::Abandoned { method, _slot });
        }
        let shared = Arc::clone(self);
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        runtime.spawn(async move {
            let waited = tokio::time::sleep(CANCELLED_MAX);
            if shared.broken.run_until_cancelled(waited).await.is_none() {
                return;
            }
            let hangs = match shared.state().pending.get(&id) {
                Some(Pending::Abandoned { method, .. }) => Some(*method),
                _ => None,
            };
            if let Some(method) = hangs {
                let seconds = CANCELLED_MAX.as_secs();
                shared.fail(format!(
                    "did not answer '{method}' within {seconds} seconds after it was cancelled; it \
                     was ended"
                ));
            }
        });
    }

    /// Takes a line of the plugin; an error is why it has to end.
    pub(crate) fn take(self: &Arc<Self>, line: &[u8]) -> std::result::Result<(), String> {
        let quote = || shorten_bytes(line, QUOTE_BYTES);
        if let (Some(_), Ok(text)) = (&self.tap, std::str::from_utf8(line)) {
            self.tap(Direction::FromPlugin, text);
        }
        let message: Incoming = serde_json::from_slice(line)
            .map_err(|_| format!("wrote what is no message of the protocol: {}", quote()))?;
        if message.jsonrpc != "2.0" {
            return Err(format!("wrote a message that is not of JSON-RPC 2.0: {}", quote()));
        }
        match message {
            Incoming { method: Some(method), id: None, params, .. } => {
                self.notification(&method, params);
                Ok(())
            }
            Incoming { method: Some(method), id: Some(id), params, .. } => {
                if !(id.is_string() || id.is_u64()) {
                    return Err(format!("sent a request with an impossible id: {}", quote()));
                }
                crate::serve::request(self, &method, id, params)
            }
            Incoming { id: Some(id), result: Some(result), error: None, .. } => {
                self.reply(&id, Ok(result))
            }
            Incoming { id: Some(id), result: None, error: Some(error), .. } => {
                self.reply(&id, Err(error))
            }
            // JSON-RPC's answer to what could not be read as a request at all.
            Incoming { id: None, error: Some(error), .. } => {
                Err(format!("did not understand a message: {}", shorten(&error.message, 500)))
            }
            _ => Err(format!("wrote what is neither request nor reply: {}", quote())),
        }
    }

    fn reply(
        self: &Arc<Self>,
        id: &Value,
        result: std::result::Result<Value, WireError>,
    ) -> std::result::Result<(), String> {
        let pending = id.as_u64().and_then(|id| self.state().pending.remove(&id));
        match pending {
            Some(Pending::Waiting { method, reply, .. }) => {
                let _ = reply.send(result.map_err(|error| self.contract_error(method, error)));
                Ok(())
            }
            Some(Pending::Abandoned { method, .. }) => {
                if let Ok(result) = result {
                    self.release_late(method, &result);
                }
                Ok(())
            }
            None => Err(format!(
                "answered the request {}, which was not asked or is answered already",
                shorten(&id.to_string(), 40)
            )),
        }
    }

    /// What a cancelled request has begun nevertheless is given back.
    fn release_late(self: &Arc<Self>, method: &'static str, result: &Value) {
        let (handle, release) = match method {
            "start_job" => ("job", "finish_job"),
            "start_guest" => ("guest", "abort"),
            "restore_vm" | "restore_container" => ("restore", "restore_cleanup"),
            _ => return,
        };
        let mut params = json!({ handle: result.get(handle) });
        if release == "abort" {
            params["why"] = json!("cancelled");
        }
        let shared = Arc::clone(self);
        tokio::spawn(async move {
            let deadline = Instant::now().checked_add(CANCELLED_MAX);
            let call = Call { cancel: CancellationToken::new(), deadline };
            let released = shared.request::<serde::de::IgnoredAny>(release, params, None, &call);
            if let Err(error) = released.await {
                tracing::warn!(%error, "what a cancelled request had begun was not given back");
            }
        });
    }

    fn contract_error(&self, method: &str, error: WireError) -> Error {
        let data = error.data.unwrap_or_default();
        let kind = data.kind.as_deref().map_or(Kind::Other, Kind::from_word);
        if error.code == METHOD_NOT_FOUND {
            let Error { message, .. } =
                self.error(Kind::Invalid, &format!("does not know '{method}'"));
            return Error::with_source(Kind::Invalid, message, UnknownMethod);
        }
        let mut message = shorten(error.message.trim(), 2000);
        if message.is_empty() {
            message = format!("The provider {} failed in '{method}'.", self.name);
        }
        let mut dependents = data.dependents;
        dependents.truncate(1000);
        Error { dependents, ..Error::new(kind, message) }
    }

    fn notification(&self, method: &str, params: Option<Value>) {
        let params = params.unwrap_or_default();
        let request = params.get("request").and_then(Value::as_u64);
        let text = |key: &str| params.get(key).and_then(Value::as_str);
        let number = |key: &str| text(key).and_then(|text| text.parse().ok());
        match method {
            "progress" => {
                let (Some(request), Some(device)) = (request, text("device")) else { return };
                self.event(
                    request,
                    Event::Progress {
                        device: shorten(device, 100),
                        done_bytes: number("done_bytes").unwrap_or(0),
                        total_bytes: number("total_bytes").unwrap_or(0),
                        zero_bytes: number("zero_bytes").unwrap_or(0),
                    },
                );
            }
            "log" => {
                let line = shorten(text("line").unwrap_or_default(), STDERR_LINE_BYTES_MAX);
                let level = text("level").unwrap_or("info");
                match request {
                    Some(request) => {
                        let mark = if matches!(level, "warning" | "error") { level } else { "" };
                        let joint = if mark.is_empty() { "" } else { ": " };
                        self.event(request, Event::Log(format!("{mark}{joint}{line}")));
                    }
                    None => log(&self.name, level, &line),
                }
            }
            "$/cancel" => self.served.cancel(params.get("id")),
            // Something newer than this program.
            _ => tracing::debug!(provider = self.name, method, "unknown notification"),
        }
    }

    fn event(&self, request: u64, event: Event) {
        if let Some(Pending::Waiting { events: Some(events), .. }) =
            self.state().pending.get(&request)
        {
            // A flood must not hold up the replies behind it.
            let _ = events.try_send(event);
        }
    }

    fn remember_words(&self, line: &str) {
        let mut state = self.state();
        if state.last_words.len() == LAST_WORDS_LINES {
            state.last_words.pop_front();
        }
        state.last_words.push_back(shorten(line, 300));
    }
}

/// A request under way. Dropped without an answer, the plugin is told that nobody waits for it.
struct Asked {
    shared: Arc<Shared>,
    id: u64,
    is_answered: bool,
    is_told: bool,
}

impl Asked {
    fn cancel(&mut self) {
        let message = json!({"jsonrpc": "2.0", "method": "$/cancel", "params": {"id": self.id}});
        self.is_told = self.is_told || self.shared.try_send(message.to_string());
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        if !self.is_answered {
            self.cancel();
            self.shared.abandon(self.id);
        }
    }
}

/// The cause of an error that says that a plugin does not have a method.
#[derive(Debug)]
struct UnknownMethod;

impl std::fmt::Display for UnknownMethod {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "it answers with the error {METHOD_NOT_FOUND}")
    }
}

impl std::error::Error for UnknownMethod {}

/// Whether the plugin does not have the method; other methods may fail with the same kind.
pub(crate) fn is_unknown_method(error: &Error) -> bool {
    error.source.as_ref().is_some_and(|source| source.is::<UnknownMethod>())
}

fn report(progress: Option<&dyn Progress>, event: Event) {
    let Some(progress) = progress else { return };
    match event {
        Event::Progress { device, done_bytes, total_bytes, zero_bytes } => {
            progress.report(&device, done_bytes, total_bytes, zero_bytes);
        }
        Event::Log(line) => progress.log(&line),
    }
}

fn log(provider: &str, level: &str, line: &str) {
    match level {
        "error" => tracing::error!(provider, "{line}"),
        "warning" => tracing::warn!(provider, "{line}"),
        "debug" => tracing::debug!(provider, "{line}"),
        _ => tracing::info!(provider, "{line}"),
    }
}

async fn write_all(shared: Arc<Shared>, mut stdin: ChildStdin, mut inbox: mpsc::Receiver<String>) {
    loop {
        let message = tokio::select! {
            biased;
            () = shared.broken.cancelled() => return,
            Some(message) = inbox.recv() => message,
            () = shared.closing.cancelled() => return,
        };
        shared.tap(Direction::ToPlugin, &message);
        let line = message + "\n";
        let written = tokio::select! {
            written = stdin.write_all(line.as_bytes()) => written,
            () = shared.broken.cancelled() => return,
            () = shared.closing.cancelled() => return,
        };
        if written.is_err() {
            break;
        }
    }
    // The reader finds out why, if the plugin is gone. One that lives on is of no use either.
    let waited = tokio::time::sleep(CLOSED_INPUT_WAIT);
    if shared.broken.run_until_cancelled(waited).await.is_some() {
        shared.fail("has closed its standard input".to_owned());
    }
}

async fn run(shared: Arc<Shared>, mut process: Process, stdout: ChildStdout, stderr: ChildStderr) {
    let mut words = tokio::spawn(read_stderr(Arc::clone(&shared), stderr));
    let mut stdout = LineReader::new(BufReader::new(stdout), LINE_BYTES_MAX, false);
    let fault = {
        let mut read = std::pin::pin!(read_messages(&shared, &mut stdout));
        tokio::select! {
            fault = &mut read => fault,
            () = shared.closing.cancelled() => None,
            () = shared.broken.cancelled() => Some(String::new()),
            // What it started may keep its standard output open. The last that it said itself is still in there.
            _ = process.wait() => tokio::time::timeout(LAST_WORDS_WAIT, read).await.unwrap_or(None),
        }
    };
    let is_orderly = fault.is_none();
    let why = match fault {
        Some(fault) => fault,
        None if shared.closing.is_cancelled() => "is ending".to_owned(),
        None => end_in_words(&shared, &mut process, &mut words, stdout.rest()).await,
    };
    shared.fail(why);
    shared.closing.cancel();
    if is_orderly {
        let end = async { tokio::join!(process.wait(), stdout.drain()) };
        let _ = tokio::time::timeout(END_GRACE, end).await;
    }
    process.end().await;
    words.abort();
}

/// Reads to the end of standard output, or to something that must not be there.
async fn read_messages(
    shared: &Arc<Shared>,
    stdout: &mut LineReader<BufReader<ChildStdout>>,
) -> Option<String> {
    loop {
        let taken = match stdout.next().await {
            Ok(Some(Line::Whole(line))) if line.trim_ascii().is_empty() => Ok(()),
            Ok(Some(Line::Whole(line))) => shared.take(&line),
            Ok(Some(Line::TooLong(line))) => Err(format!(
                "wrote a line of more than {LINE_BYTES_MAX} bytes: {}",
                shorten_bytes(&line, QUOTE_BYTES)
            )),
            Ok(None) | Err(_) => return None,
        };
        if let Err(why) = taken {
            return Some(why);
        }
    }
}

async fn end_in_words(
    shared: &Shared,
    process: &mut Process,
    words: &mut tokio::task::JoinHandle<()>,
    rest: &[u8],
) -> String {
    let status = tokio::time::timeout(LAST_WORDS_WAIT, process.wait()).await;
    let mut why = match status {
        Ok(Ok(status)) => format!("has ended ({status})"),
        _ => "has closed its standard output".to_owned(),
    };
    if !rest.trim_ascii().is_empty() {
        why.push_str(&format!(" in the middle of the line '{}'", shorten_bytes(rest, QUOTE_BYTES)));
    }
    let _ = tokio::time::timeout(LAST_WORDS_WAIT, words).await;
    let state = shared.state();
    if !state.last_words.is_empty() {
        let words: Vec<_> = state.last_words.iter().map(String::as_str).collect();
        why.push_str(&format!(", and said: {}", words.join(" | ")));
    }
    why
}

/// Reads standard error to its end, so that the plugin never waits for it.
async fn read_stderr(shared: Arc<Shared>, stderr: ChildStderr) {
    let mut lines = LineReader::new(BufReader::new(stderr), STDERR_LINE_BYTES_MAX, true);
    let mut count = 0_u64;
    loop {
        let line = match lines.next().await {
            Ok(Some(Line::Whole(line) | Line::TooLong(line))) => line,
            Ok(None) if !lines.rest().is_empty() => lines.take_rest(),
            Ok(None) | Err(_) => return,
        };
        let line = shorten_bytes(&line, STDERR_LINE_BYTES_MAX);
        let (level, text) = split_level(&line);
        shared.remember_words(text);
        count = count.saturating_add(1);
        match count {
            ..=STDERR_LINES_MAX => log(&shared.name, level, text),
            count if count == STDERR_LINES_MAX + 1 => {
                log(&shared.name, "warning", "writes too many log lines; the others are left out");
            }
            _ => {}
        }
    }
}

/// The level that a line of standard error begins with.
fn split_level(line: &str) -> (&str, &str) {
    match line.split_once(": ") {
        Some((level @ ("error" | "warning" | "info" | "debug"), text)) => (level, text),
        _ => ("info", line),
    }
}
