// SPDX-License-Identifier: MIT OR Apache-2.0
//! The provider: starts its plugin, again if need be, and asks it.

use std::collections::{HashSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use provider_api::{
    API_AGE, API_VERSION, Archive, BoxFuture, Call, Capabilities, CommitOutcome, ContainerRestore,
    Damage, DamagedArea, Description, Error, GuestConfig, GuestKind, Job, JobInfo, Kind,
    LOG_BYTES_MAX, Progress, Property, Provider, Result, Status, Uuid, Verified, VerifyExtent,
    VerifyOptions, VerifyReport, VmRestore, check_api_version,
};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use tokio::sync::Mutex;

use crate::connection::{Connection, is_unknown_method};
use crate::files::TextFile;
use crate::job::RpcJob;
use crate::settings;
use crate::tap::Tap;
use crate::wire::{Base64, Dec, shorten};

/// How long a plugin may take to be ready for its first request.
const START_TIME: Duration = Duration::from_secs(30);
/// So many starts are allowed within [`STARTS_WITHIN`]: a plugin that dies at once must not keep the host
/// busy.
const STARTS_MAX: usize = 5;
const STARTS_WITHIN: Duration = Duration::from_secs(60);
/// Longest list of archives.
const ARCHIVES_MAX: usize = 100_000;
/// What the texts in a list may take of memory: several hundred bytes for each of as many archives.
const LIST_BYTES_MAX: usize = 64 << 20;
/// Most messages of one list.
const PAGES_MAX: usize = 10_000;
/// Names told to a verification; without the others it only reads more.
const KNOWN_SOUND_MAX: usize = 1000;

/// Where a plugin is and what its storage says.
#[derive(Clone)]
pub struct RpcOptions {
    /// The executable.
    pub program: PathBuf,
    /// Name of the storage.
    pub storage: String,
    /// The storage's properties in `storage.cfg` but those that every storage has.
    pub properties: Vec<(String, String)>,
    /// The file of its secrets; need not exist.
    pub secrets_path: PathBuf,
    /// Who looks on.
    pub tap: Option<Tap>,
}

/// Whether this can be the name of a plugin's executable, and with that the type of a storage.
#[must_use]
pub fn is_plugin_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    bytes.first().is_some_and(u8::is_ascii_lowercase)
        && bytes.len() <= 64
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
}

/// A provider that runs as a process of its own.
pub struct RpcProvider {
    core: Arc<Core>,
}

/// What jobs need, too.
pub(crate) struct Core {
    options: RpcOptions,
    declared: Declared,
    running: Mutex<Running>,
}

struct Running {
    connection: Arc<Connection>,
    starts: VecDeque<Instant>,
}

/// What a plugin says about itself.
#[derive(Debug, Clone, Deserialize)]
#[serde(expecting = "an object")]
struct Declared {
    name: String,
    api_version: u32,
    capabilities: Capabilities,
    #[serde(default)]
    properties: Vec<Property>,
}

impl RpcProvider {
    /// Starts the plugin, learns what it is, and checks the storage's properties.
    ///
    /// # Errors
    /// The plugin cannot be started or speaks another version, or the properties are wrong; no process is
    /// left then.
    pub async fn start(options: RpcOptions) -> Result<Self> {
        let call = start_call(&Call::default());
        let (connection, declared) = connect(&options, &call).await?;
        let starts = VecDeque::from([Instant::now()]);
        let running = Mutex::new(Running { connection: Arc::new(connection), starts });
        Ok(Self { core: Arc::new(Core { options, declared, running }) })
    }

    async fn ask<R: serde::de::DeserializeOwned>(
        &self,
        method: &'static str,
        params: Value,
        call: &Call,
    ) -> Result<R> {
        self.core.connection(call).await?.request(method, params, call).await
    }

    async fn tell(&self, method: &'static str, params: Value, call: &Call) -> Result<()> {
        self.ask::<IgnoredAny>(method, params, call).await.map(|_| ())
    }
}

/// A start has its own deadline, unless the call's is nearer.
fn start_call(call: &Call) -> Call {
    let own = Instant::now() + START_TIME;
    let deadline = Some(call.deadline.map_or(own, |deadline| deadline.min(own)));
    Call { cancel: call.cancel.clone(), deadline }
}

/// The provider in error messages.
fn name_of(options: &RpcOptions) -> String {
    let file = options.program.file_name().unwrap_or_default().to_string_lossy();
    format!("'{}' of the storage '{}'", file, options.storage)
}

/// Starts a process and brings it to where it takes requests.
async fn connect(options: &RpcOptions, call: &Call) -> Result<(Connection, Declared)> {
    let name = name_of(options);
    let (connection, secrets) =
        Connection::start(&options.program, name.clone(), options.tap.clone())?;
    let hello = json!({
        "api_version": API_VERSION,
        "api_age": API_AGE,
        "host": {"name": "vzdump", "version": env!("CARGO_PKG_VERSION")},
        "storage": options.storage,
    });
    let mut declared: Declared = connection.request("initialize", hello, call).await?;
    let fault = |why: String| {
        let why = why.trim_end_matches('.');
        Error::new(Kind::Invalid, format!("The provider {name} {why}."))
    };
    declared.name = shorten(&declared.name, 100);
    check_api_version(declared.api_version)
        .map_err(|why| fault(format!("cannot be used: {why}")))?;
    settings::check_declared(&declared.properties).map_err(fault)?;
    let settings = settings::read(
        &options.storage,
        &options.properties,
        &options.secrets_path,
        &declared.properties,
    )?;
    secrets
        .send(&settings.secrets)
        .map_err(|error| Error::io(format!("Cannot give {name} its secrets."), error))?;
    let configuration = json!({"properties": settings.properties});
    connection.request::<IgnoredAny>("configure", configuration, call).await?;
    Ok((connection, declared))
}

impl Core {
    /// The running process; a new one if the last one has ended.
    pub(crate) async fn connection(&self, call: &Call) -> Result<Arc<Connection>> {
        let call = start_call(call);
        // Others may be starting it.
        let waiting = call.cancel.run_until_cancelled(self.running.lock());
        let Some(mut running) = waiting.await else { return Err(cancelled()) };
        if running.connection.is_alive() {
            return Ok(Arc::clone(&running.connection));
        }
        let now = Instant::now();
        running.starts.retain(|start| now.duration_since(*start) < STARTS_WITHIN);
        if running.starts.len() >= STARTS_MAX {
            return Err(Error::new(
                Kind::Io,
                format!(
                    "The provider {} has ended {STARTS_MAX} times within a minute; it is not started \
                     again for now.",
                    name_of(&self.options)
                ),
            ));
        }
        running.starts.push_back(now);
        let (connection, declared) = connect(&self.options, &call).await?;
        if declared.api_version != self.declared.api_version {
            return Err(Error::new(
                Kind::Invalid,
                format!("The provider {} was replaced meanwhile.", name_of(&self.options)),
            ));
        }
        running.connection = Arc::new(connection);
        Ok(Arc::clone(&running.connection))
    }
}

fn cancelled() -> Error {
    Error::new(Kind::Cancelled, "The call was cancelled.")
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct WireStatus {
    total_bytes: Dec<u64>,
    used_bytes: Dec<u64>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct WireArchive {
    name: String,
    subtype: GuestKind,
    guest_id: u32,
    time_s: Dec<i64>,
    size_bytes: Dec<u64>,
    #[serde(default)]
    base: Option<String>,
    #[serde(default)]
    commit_id: Option<Uuid>,
    #[serde(default)]
    protected: bool,
    #[serde(default)]
    notes: Option<String>,
    #[serde(default)]
    verified: Option<WireVerified>,
}

impl WireArchive {
    /// Of its texts.
    fn bytes(&self) -> usize {
        let optional = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        self.name.len() + optional(&self.base) + optional(&self.notes)
    }
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct WireVerified {
    time_s: Dec<i64>,
    #[serde(flatten)]
    extent: VerifyExtent,
    damage_count: Dec<u64>,
}

impl From<WireArchive> for Archive {
    fn from(wire: WireArchive) -> Self {
        Self {
            name: wire.name,
            subtype: wire.subtype,
            guest_id: wire.guest_id,
            time_s: wire.time_s.0,
            size_bytes: wire.size_bytes.0,
            base: wire.base,
            commit_id: wire.commit_id,
            protected: wire.protected,
            notes: wire.notes,
            verified: wire.verified.map(|verified| Verified {
                time_s: verified.time_s.0,
                extent: verified.extent,
                damage_count: verified.damage_count.0,
            }),
        }
    }
}

/// A part of a list.
#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct WireList<T> {
    archives: Vec<T>,
    /// What to ask for next; none at the end.
    #[serde(default)]
    next: Option<String>,
}

impl RpcProvider {
    /// All pages of a list, from one process: a new one would not know the place.
    async fn pages<T: serde::de::DeserializeOwned>(
        &self,
        method: &'static str,
        bytes_of: fn(&T) -> usize,
        call: &Call,
    ) -> Result<Vec<T>> {
        let connection = self.core.connection(call).await?;
        let fault = |why: &str| connection.fault(&format!("answers '{method}' {why}"));
        let (mut all, mut cursor, mut seen) = (Vec::new(), None::<String>, HashSet::new());
        let mut bytes: usize = 0;
        for _ in 0..PAGES_MAX {
            let params = cursor.map_or_else(|| json!({}), |cursor| json!({"cursor": cursor}));
            let page: WireList<T> = connection.request(method, params, call).await?;
            bytes += page.archives.iter().map(bytes_of).sum::<usize>();
            if bytes > LIST_BYTES_MAX {
                return Err(fault(&format!("with texts of more than {LIST_BYTES_MAX} bytes")));
            }
            all.extend(page.archives);
            if all.len() > ARCHIVES_MAX {
                return Err(fault(&format!("with more than {ARCHIVES_MAX} archives")));
            }
            let Some(next) = page.next else { return Ok(all) };
            if next.len() > 1024 || !seen.insert(next.clone()) {
                return Err(fault("with pages that go round in circles, or too long a cursor"));
            }
            cursor = Some(next);
        }
        Err(fault(&format!("with more than {PAGES_MAX} pages")))
    }
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct WireNotes {
    notes: String,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct WireConfig {
    config: Base64,
    #[serde(default)]
    firewall: Option<Base64>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct WireReport {
    read_bytes: Dec<u64>,
    blocks: Dec<u64>,
    damage: Vec<WireDamage>,
    damage_count: Dec<u64>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct WireDamage {
    archive: String,
    #[serde(default)]
    device: Option<String>,
    #[serde(default)]
    area: Option<WireArea>,
    problem: String,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct WireArea {
    offset: Dec<u64>,
    length_bytes: Dec<u64>,
}

impl From<WireReport> for VerifyReport {
    fn from(wire: WireReport) -> Self {
        let named = u64::try_from(wire.damage.len()).unwrap_or(u64::MAX);
        let mut report =
            Self { read_bytes: wire.read_bytes.0, blocks: wire.blocks.0, ..Self::default() };
        for damage in wire.damage {
            let area = damage.area.map(|area| DamagedArea {
                offset: area.offset.0,
                length_bytes: area.length_bytes.0,
            });
            let (archive, device) = (damage.archive, damage.device);
            report.add(Damage { archive, device, area, problem: shorten(&damage.problem, 1000) });
        }
        // Never fewer than were named.
        report.damage_count = wire.damage_count.0.max(named);
        report
    }
}

fn verify_params(archive: &str, options: &VerifyOptions) -> Value {
    let extent = match options.extent {
        VerifyExtent::All => json!({"extent": "all"}),
        VerifyExtent::Sample { percent, seed } => {
            json!({"extent": "sample", "percent": percent, "seed": seed})
        }
    };
    let known = &options.known_sound[..options.known_sound.len().min(KNOWN_SOUND_MAX)];
    json!({"archive": archive, "extent": extent, "known_sound": known})
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct WireJob {
    job: String,
}

/// Begins a job on this process.
pub(crate) async fn start_job(
    connection: &Connection,
    start_time_s: i64,
    call: &Call,
) -> Result<String> {
    let params = json!({"start_time_s": start_time_s.to_string()});
    let job: WireJob = connection.request("start_job", params, call).await?;
    Ok(job.job)
}

impl Provider for RpcProvider {
    fn describe(&self) -> Description {
        let Declared { name, api_version, capabilities, .. } = self.core.declared.clone();
        Description { name, api_version, capabilities }
    }

    fn properties(&self) -> Vec<Property> {
        self.core.declared.properties.clone()
    }

    fn activate<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.tell("activate", json!({}), call))
    }

    fn status<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<Status>> {
        Box::pin(async move {
            let status: WireStatus = self.ask("status", json!({}), call).await?;
            let (total_bytes, used_bytes) = (status.total_bytes.0, status.used_bytes.0);
            Ok(Status { total_bytes, used_bytes })
        })
    }

    fn list<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<Vec<Archive>>> {
        Box::pin(async move {
            let archives: Vec<WireArchive> = self.pages("list", WireArchive::bytes, call).await?;
            Ok(archives.into_iter().map(Into::into).collect())
        })
    }

    fn notes<'a>(&'a self, archive: &'a str, call: &'a Call) -> BoxFuture<'a, Result<String>> {
        Box::pin(async move {
            let notes: WireNotes = self.ask("notes", json!({"archive": archive}), call).await?;
            Ok(notes.notes)
        })
    }

    fn set_notes<'a>(
        &'a self,
        archive: &'a str,
        notes: &'a str,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.tell("set_notes", json!({"archive": archive, "notes": notes}), call))
    }

    fn set_protected<'a>(
        &'a self,
        archive: &'a str,
        protected: bool,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<()>> {
        let params = json!({"archive": archive, "protected": protected});
        Box::pin(self.tell("set_protected", params, call))
    }

    fn keep_log<'a>(
        &'a self,
        archive: &'a str,
        log: &'a str,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let file = TextFile::new(log)
                .map_err(|error| Error::io("Cannot hold the log in memory.", error))?;
            let params = json!({"archive": archive, "log_path": file.path()});
            self.tell("keep_log", params, call).await
        })
    }

    fn log<'a>(&'a self, archive: &'a str, call: &'a Call) -> BoxFuture<'a, Result<String>> {
        Box::pin(async move {
            let failed = |error| Error::io("Cannot hold the log in memory.", error);
            let file = TextFile::new("").map_err(failed)?;
            let params = json!({"archive": archive, "log_path": file.path()});
            self.tell("kept_log", params, call).await?;
            file.read(LOG_BYTES_MAX).map_err(failed)
        })
    }

    fn remove<'a>(&'a self, archive: &'a str, call: &'a Call) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.tell("remove", json!({"archive": archive}), call))
    }

    fn verify<'a>(
        &'a self,
        archive: &'a str,
        options: &'a VerifyOptions,
        progress: &'a dyn Progress,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<VerifyReport>> {
        Box::pin(async move {
            let connection = self.core.connection(call).await?;
            let params = verify_params(archive, options);
            let report: WireReport =
                connection.request_with_progress("verify", params, progress, call).await?;
            Ok(report.into())
        })
    }

    fn unreadable<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<Vec<String>>> {
        Box::pin(async move {
            // Only asked before a verification.
            if !self.core.declared.capabilities.verify {
                return Ok(Vec::new());
            }
            match self.pages("unreadable", String::len, call).await {
                // It lists whatever there is, and has no such method.
                Err(error) if is_unknown_method(&error) => Ok(Vec::new()),
                names => names,
            }
        })
    }

    fn guest_config<'a>(
        &'a self,
        archive: &'a str,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<GuestConfig>> {
        Box::pin(async move {
            let params = json!({"archive": archive});
            let config: WireConfig = self.ask("guest_config", params, call).await?;
            let firewall = config.firewall.map(|firewall| firewall.0);
            Ok(GuestConfig { config: config.config.0, firewall })
        })
    }

    fn commit_outcome<'a>(
        &'a self,
        id: Uuid,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<CommitOutcome>> {
        Box::pin(self.ask("commit_outcome", json!({"id": id}), call))
    }

    fn start_job<'a>(
        &'a self,
        job: JobInfo,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<Box<dyn Job>>> {
        Box::pin(async move {
            let connection = self.core.connection(call).await?;
            let handle = start_job(&connection, job.start_time_s, call).await?;
            let core = Arc::clone(&self.core);
            Ok(Box::new(RpcJob { core, info: job, connection, handle }) as Box<dyn Job>)
        })
    }

    fn restore_vm_init<'a>(
        &'a self,
        archive: &'a str,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<Box<dyn VmRestore>>> {
        Box::pin(async move {
            crate::restore::vm(self.core.connection(call).await?, archive, call).await
        })
    }

    fn restore_container_init<'a>(
        &'a self,
        archive: &'a str,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<Box<dyn ContainerRestore>>> {
        Box::pin(async move {
            crate::restore::container(self.core.connection(call).await?, archive, call).await
        })
    }
}
