// SPDX-License-Identifier: MIT OR Apache-2.0
//! A patched storage daemon that begins with nothing: tests add the nodes, filters, threads and
//! exports they need over QMP, and do the guest's and the backup client's I/O over NBD.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use provider_nbd::{Client, Errno, context};
use qmp_client::{EventItem, EventStream, Options, Session};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::process::{Guarded, Stop};

/// How long anything that must happen may take on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(60);
/// A second monitor's socket in the folder of a process.
pub const SECOND_MONITOR: &str = "qmp2";
/// The file in the folder of a process with what it wrote to its standard error, see [`Launch`].
pub const STDERR: &str = "stderr";
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(5);

/// The daemon with its folder; killed when dropped.
#[derive(Debug)]
pub struct Storage {
    process: Guarded,
    session: Session,
    folder: tempfile::TempDir,
    numbers: AtomicU32,
}

/// What is special about a process.
#[derive(Debug, Clone, Copy, Default)]
pub struct Launch<'a> {
    /// An emulator with these options, whose guest does not run, in place of the daemon.
    pub emulator: Option<&'a [&'a str]>,
    /// Variables of its environment.
    pub environment: &'a [(&'a str, &'a str)],
    /// Its standard error goes to the file [`STDERR`] in its folder.
    pub keep_stderr: bool,
}

/// How a client of an export connects.
#[derive(Debug, Clone, Copy)]
pub struct Connection<'a> {
    /// Metadata contexts.
    pub contexts: &'a [&'a str],
    /// The longest wait for one request.
    pub timeout: Duration,
}

impl Default for Connection<'_> {
    fn default() -> Self {
        Self { contexts: &[], timeout: LIMIT }
    }
}

impl Storage {
    /// Starts a daemon that has an NBD server and nothing else.
    ///
    /// # Errors
    /// The patched QEMU is missing or does not start.
    pub async fn start() -> Result<Self> {
        Self::start_in(folder()?).await
    }

    /// The same in a folder of an earlier one.
    ///
    /// # Errors
    /// Those of [`Self::start`].
    pub async fn start_in(folder: tempfile::TempDir) -> Result<Self> {
        Self::launch(folder, &Launch::default()).await
    }

    /// An emulator with these options, whose guest does not run, in place of the daemon.
    ///
    /// # Errors
    /// Those of [`Self::start`].
    pub async fn start_emulator_in(folder: tempfile::TempDir, options: &[&str]) -> Result<Self> {
        Self::launch(folder, &Launch { emulator: Some(options), ..Launch::default() }).await
    }

    /// Any of them.
    ///
    /// # Errors
    /// Those of [`Self::start`].
    pub async fn launch(folder: tempfile::TempDir, how: &Launch<'_>) -> Result<Self> {
        let [qmp, second, nbd] =
            ["qmp", SECOND_MONITOR, "nbd"].map(|name| free_socket(&folder, name));
        let mut command = match how.emulator {
            None => daemon_command(&qmp, &second, &nbd)?,
            Some(options) => emulator_command(&qmp, &second, options)?,
        };
        command.envs(how.environment.iter().copied()).stdin(Stdio::null());
        if how.keep_stderr {
            let path = folder.path().join(STDERR);
            let file = File::options().create(true).append(true).open(path)?;
            command.stderr(file);
        }
        let mut process = Guarded::spawn(&mut command)?;
        let connected = connect(&qmp, &mut process).await;
        let session = connected.with_context(|| {
            let said = std::fs::read_to_string(folder.path().join(STDERR)).unwrap_or_default();
            format!("it said: {}", crate::process::tail(&said))
        })?;
        let this = Self { process, session, folder, numbers: AtomicU32::new(0) };
        if how.emulator.is_some() {
            let address = json!({ "type": "unix", "data": { "path": nbd } });
            let server = json!({ "addr": address, "max-connections": 0 });
            this.run("nbd-server-start", server).await?;
        }
        Ok(this)
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// RAM that the daemon has and no file is behind, in bytes.
    ///
    /// # Errors
    /// It has ended.
    pub fn anonymous_bytes(&self) -> Result<u64> {
        Ok(crate::soak::proc::memory(self.pid())?.anonymous_bytes)
    }

    /// How the process ended, if it has.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.process.try_wait()
    }

    /// The QMP connection.
    #[must_use]
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// A file in the daemon's folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Gives a command that may fail.
    ///
    /// # Errors
    /// Those of the command.
    pub async fn try_run(
        &self,
        command: &str,
        arguments: Value,
    ) -> Result<Value, qmp_client::Error> {
        self.session.execute_raw(command, arguments, Some(LIMIT)).await
    }

    /// Gives a command that must succeed.
    ///
    /// # Errors
    /// It fails.
    pub async fn run(&self, command: &str, arguments: Value) -> Result<Value> {
        let shown = format!("{command} {arguments}");
        self.try_run(command, arguments).await.context(shown)
    }

    /// Adds a block node.
    ///
    /// # Errors
    /// QEMU refuses it.
    pub async fn node(&self, node: Value) -> Result<()> {
        self.run("blockdev-add", node).await.map(drop)
    }

    /// Makes an empty file and the raw node of this name above it.
    ///
    /// # Errors
    /// The file or a node cannot be made.
    pub async fn disk(&self, name: &str, size_bytes: u64) -> Result<()> {
        File::create(self.path(name))?.set_len(size_bytes)?;
        let file = format!("{name}-file");
        self.node(self.file_node(&file, name)).await?;
        self.node(raw_node(name, &file)).await
    }

    /// The description of a node of a file in the folder.
    #[must_use]
    pub fn file_node(&self, node: &str, name: &str) -> Value {
        json!({ "driver": "file", "node-name": node, "filename": self.path(name),
                "discard": "unmap" })
    }

    /// Makes a thread.
    ///
    /// # Errors
    /// QEMU refuses it.
    pub async fn iothread(&self, id: &str) -> Result<()> {
        self.run("object-add", json!({ "qom-type": "iothread", "id": id })).await.map(drop)
    }

    /// Exports a node as a guest's device: writable, and bound to its thread if it has one.
    ///
    /// # Errors
    /// QEMU refuses it.
    pub async fn export_disk(&self, node: &str, iothread: Option<&str>) -> Result<()> {
        let mut export = json!({ "type": "nbd", "id": format!("guest-{node}"), "name": node,
                                 "node-name": node, "writable": true });
        if let Some(iothread) = iothread {
            export["iothread"] = json!(iothread);
            export["fixed-iothread"] = json!(true);
        }
        self.run("block-export-add", export).await.map(drop)
    }

    /// Exports a snapshot as a backup client needs it, with its bitmap if it has one; the name.
    ///
    /// # Errors
    /// QEMU refuses it.
    pub async fn export_snapshot(&self, info: &Value) -> Result<String> {
        let name = format!("snapshot{}", self.numbers.fetch_add(1, Ordering::Relaxed));
        let mut export = json!({ "type": "nbd", "id": name, "name": name, "writable": true,
                                 "node-name": info["node-name"] });
        if let Some(bitmap) = info.get("bitmap-name") {
            export["bitmaps"] = json!([{ "node": info["bitmap-node-name"], "name": bitmap }]);
        }
        self.run("block-export-add", export).await?;
        Ok(name)
    }

    /// Connects to an export.
    ///
    /// # Errors
    /// There is no such export, or it lacks a context.
    pub async fn client(&self, export: &str) -> Result<Client> {
        self.client_with(export, Connection::default()).await
    }

    /// Connects to an export.
    ///
    /// # Errors
    /// There is no such export, or it lacks a context.
    pub async fn client_with(&self, export: &str, how: Connection<'_>) -> Result<Client> {
        let options = provider_nbd::Options {
            contexts: how.contexts.iter().map(|&context| context.to_owned()).collect(),
            connections: 1,
            whole_reads: true,
            timeout: Some(how.timeout),
        };
        Client::connect_unix(self.path("nbd"), export, options)
            .await
            .with_context(|| format!("connecting to the export {export}"))
    }

    /// The dirty areas of an access, see [`dirty_areas`].
    ///
    /// # Errors
    /// The snapshot cannot be exported or asked, or it has no bitmap.
    pub async fn dirty_areas(&self, info: &Value) -> Result<Vec<(u64, u64)>> {
        let bitmap = info["bitmap-name"].as_str().context("the access has no bitmap")?;
        let dirty = context::dirty_bitmap(bitmap);
        let name = self.export_snapshot(info).await?;
        let how = Connection { contexts: &[&dirty], timeout: LIMIT };
        let snapshot = self.client_with(&name, how).await?;
        dirty_areas(&snapshot, &dirty).await
    }

    /// Exports a snapshot and connects to it.
    ///
    /// # Errors
    /// Either fails.
    pub async fn snapshot(&self, info: &Value) -> Result<Client> {
        let name = self.export_snapshot(info).await?;
        self.client_with(&name, Connection { contexts: &["base:allocation"], timeout: LIMIT }).await
    }

    /// Sets an access of the target `t` up.
    ///
    /// # Errors
    /// QEMU refuses it.
    pub async fn setup(&self, devices: Value) -> Result<Vec<Value>> {
        self.setup_of("t", devices).await
    }

    /// Sets an access of another target up.
    ///
    /// # Errors
    /// QEMU refuses it.
    pub async fn setup_of(&self, target: &str, devices: Value) -> Result<Vec<Value>> {
        let arguments = json!({ "target-id": target, "devices": devices });
        let infos = self.run("backup-access-setup", arguments).await?;
        infos.as_array().cloned().context("setup returns no list")
    }

    /// Ends the access of the target `t`, which must be there.
    ///
    /// # Errors
    /// QEMU refuses it, or there is none.
    pub async fn teardown(&self, success: bool) -> Result<Value> {
        self.teardown_of("t", success).await
    }

    /// Ends the access of another target, which must be there.
    ///
    /// # Errors
    /// QEMU refuses it, or there is none.
    pub async fn teardown_of(&self, target: &str, success: bool) -> Result<Value> {
        let arguments = json!({ "target-id": target, "success": success });
        let result = self.run("backup-access-teardown", arguments).await?;
        ensure!(result["existed"] == true, "there was no access: {result}");
        Ok(result)
    }

    /// The status of the access's device of this number.
    ///
    /// # Errors
    /// There is none.
    pub async fn status(&self, device: usize) -> Result<Value> {
        let all = self.run("query-backup-access", json!({})).await?;
        let status = all.pointer(&format!("/0/devices/{device}"));
        status.cloned().with_context(|| format!("no device {device} in {all}"))
    }

    /// A number of that status.
    ///
    /// # Errors
    /// There is none.
    pub async fn count(&self, device: usize, member: &str) -> Result<u64> {
        let status = self.status(device).await?;
        status[member].as_u64().with_context(|| format!("no {member} in {status}"))
    }

    /// The names of all nodes and links, in a form that can be compared.
    ///
    /// # Errors
    /// QEMU does not tell.
    pub async fn graph(&self) -> Result<Vec<String>> {
        let graph = self.run("x-debug-query-block-graph", json!({})).await?;
        let list = |member: &str| graph[member].as_array().cloned().unwrap_or_default();
        let nodes = list("nodes");
        let name = |id: &Value| {
            let node = nodes.iter().find(|node| node["id"] == *id);
            node.map_or_else(|| id.to_string(), |node| format!("{} {}", node["type"], node["name"]))
        };
        let edges = list("edges").into_iter().map(|edge| {
            let (parent, child) = (name(&edge["parent"]), name(&edge["child"]));
            format!("{parent} -{}-> {child}: {}", edge["name"], edge["perm"])
        });
        let mut lines: Vec<String> = nodes.iter().map(|node| name(&node["id"])).collect();
        lines.extend(edges);
        lines.sort();
        Ok(lines)
    }

    /// The dirty bitmaps of a node.
    ///
    /// # Errors
    /// There is no such node.
    pub async fn bitmaps(&self, node: &str) -> Result<Vec<String>> {
        let nodes = self.run("query-named-block-nodes", json!({ "flat": true })).await?;
        let nodes = nodes.as_array().context("no list of nodes")?;
        let node = nodes.iter().find(|entry| entry["node-name"] == node).context("no such node")?;
        let bitmaps = node.get("dirty-bitmaps").and_then(Value::as_array);
        let names = bitmaps.into_iter().flatten().filter_map(|bitmap| bitmap["name"].as_str());
        Ok(names.map(str::to_owned).collect())
    }

    /// Makes a node name of ours known by what it is: the filter of a snapshot node.
    ///
    /// # Errors
    /// QEMU does not tell, or there is none.
    pub async fn filter_of(&self, info: &Value) -> Result<String> {
        let wanted = format!("{} -", json!(info["node-name"]));
        for line in self.graph().await? {
            let Some((_, link)) = line.split_once(&wanted) else { continue };
            let name = link.split('"').nth(5);
            return name.map(str::to_owned).with_context(|| format!("odd link: {line}"));
        }
        bail!("no filter below {}", info["node-name"])
    }

    /// Sends SIGKILL; the folder stays for another daemon.
    ///
    /// # Errors
    /// It does not end.
    pub fn kill(mut self) -> Result<tempfile::TempDir> {
        self.process.signal(Signal::KILL)?;
        self.process.wait(LIMIT, &Stop::default())?;
        Ok(self.folder)
    }

    /// Tells it to quit; it must end by itself and well.
    ///
    /// # Errors
    /// It does not.
    pub async fn quit(self) -> Result<()> {
        self.stop().await.map(drop)
    }

    /// The same; the folder stays for another one.
    ///
    /// # Errors
    /// Those of [`Self::quit`].
    pub async fn stop(mut self) -> Result<tempfile::TempDir> {
        // The connection may close before the reply.
        drop(self.session.execute_raw("quit", json!({}), Some(LIMIT)).await);
        let mut status = None;
        until("the storage daemon has ended", async || {
            status = self.process.try_wait()?;
            Ok(status.is_some())
        })
        .await?;
        ensure!(status.is_some_and(|status| status.success()), "it ended with {status:?}");
        Ok(self.folder)
    }
}

fn daemon_command(qmp: &Path, second: &Path, nbd: &Path) -> Result<Command> {
    let server = json!({ "addr": { "type": "unix", "path": nbd }, "max-connections": 0 });
    let mut command = Command::new(crate::qemu::bin_dir()?.join("qemu-storage-daemon"));
    for (id, path) in [("qmp", qmp), ("qmp2", second)] {
        command.arg("--chardev");
        command.arg(format!("socket,id={id},path={},server=on,wait=off", path.display()));
        command.args(["--monitor", &format!("chardev={id}")]);
    }
    command.arg("--nbd-server").arg(server.to_string());
    Ok(command)
}

fn emulator_command(qmp: &Path, second: &Path, options: &[&str]) -> Result<Command> {
    let mut command = Command::new(crate::qemu::bin_dir()?.join("qemu-system-x86_64"));
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-S"]);
    command.args(["-machine", "pc", "-accel", "tcg", "-m", "64"]);
    for path in [qmp, second] {
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", path.display()));
    }
    command.args(options);
    Ok(command)
}

/// The place of a socket, where an earlier process may have left one.
fn free_socket(folder: &tempfile::TempDir, name: &str) -> PathBuf {
    let path = folder.path().join(name);
    drop(std::fs::remove_file(&path));
    path
}

/// The areas that a dirty bitmap marks, as offset and length, as a backup client sees them.
///
/// # Errors
/// The server does not tell.
pub async fn dirty_areas(client: &Client, bitmap: &str) -> Result<Vec<(u64, u64)>> {
    let mut extents = client.extents(bitmap, 0, client.size_bytes());
    let mut areas = Vec::new();
    while let Some(extent) = extents.next().await.context("dirty areas")? {
        if extent.flags & context::DIRTY != 0 {
            areas.push((extent.offset, extent.len));
        }
    }
    Ok(areas)
}

/// The description of a raw node.
#[must_use]
pub fn raw_node(node: &str, below: &str) -> Value {
    json!({ "driver": "raw", "node-name": node, "file": below, "discard": "unmap" })
}

/// A folder on a disk, below the build folder: the temporary folder may be in RAM.
///
/// # Errors
/// It cannot be made.
pub fn folder() -> Result<tempfile::TempDir> {
    let path = crate::qemu::workspace().join("target/storage");
    std::fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
    Ok(tempfile::Builder::new().prefix("s-").tempdir_in(path)?)
}

/// Waits until it is so.
///
/// # Errors
/// It does not become so, or cannot be found out.
pub async fn until(what: &str, mut condition: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !condition().await? {
        ensure!(start.elapsed() < LIMIT, "not in time: {what}");
        tokio::time::sleep(LOOK_AGAIN_AFTER).await;
    }
    Ok(())
}

/// Waits for an event of this name; its data.
///
/// # Errors
/// It does not come.
pub async fn next_event(events: &mut EventStream, name: &str) -> Result<Value> {
    let wait = async {
        loop {
            match events.next().await {
                Some(EventItem::Event(event)) if event.name == name => return Ok(event.data),
                Some(_) => {}
                None => bail!("the connection ended"),
            }
        }
    };
    let data = tokio::time::timeout(LIMIT, wait).await.with_context(|| format!("no {name}"))??;
    Ok(serde_json::to_value(data)?)
}

/// Makes an empty qcow2 image.
///
/// # Errors
/// qemu-img is missing or fails.
pub fn create_qcow2(path: &Path, size_bytes: u64) -> Result<()> {
    let status = Command::new(crate::qemu::bin_dir()?.join("qemu-img"))
        .args(["create", "-q", "-f", "qcow2"])
        .arg(path)
        .arg(size_bytes.to_string())
        .status()
        .context("qemu-img")?;
    ensure!(status.success(), "qemu-img cannot make {}: {status}", path.display());
    Ok(())
}

/// Fills a range with a byte.
///
/// # Errors
/// The write fails.
pub async fn fill(guest: &Client, pattern: u8, offset: u64, len: u64) -> Result<()> {
    let data = Bytes::from(vec![pattern; usize::try_from(len)?]);
    guest.write(offset, data, false).await.with_context(|| format!("write of {len} at {offset}"))
}

/// Checks that a range is full of a byte.
///
/// # Errors
/// It is not, or the read fails.
pub async fn expect(client: &Client, pattern: u8, offset: u64, len: u64) -> Result<()> {
    let data = client.read(offset, usize::try_from(len)?).await;
    let data = data.with_context(|| format!("read of {len} at {offset}"))?;
    match data.iter().position(|&byte| byte != pattern) {
        Some(at) => {
            bail!("byte {} is {:#x}, not {pattern:#x}", offset + at as u64, data[at])
        }
        None => Ok(()),
    }
}

/// Checks that a read fails with this error.
///
/// # Errors
/// It does not.
pub async fn refused(client: &Client, errno: Errno, offset: u64, len: u64) -> Result<()> {
    let error = client.read(offset, usize::try_from(len)?).await.err();
    let found = error.as_ref().and_then(provider_nbd::Error::errno);
    ensure!(found == Some(errno), "read of {len} at {offset}: {error:?}, not {errno:?}");
    Ok(())
}

/// Space that a file takes.
///
/// # Errors
/// There is no such file.
pub fn space_bytes(path: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    Ok(std::fs::metadata(path)?.blocks() * 512)
}

/// Connects as soon as the daemon listens.
async fn connect(qmp: &Path, process: &mut Guarded) -> Result<Session> {
    let start = Instant::now();
    loop {
        match Session::connect(qmp, Options::default()).await {
            Ok(session) => return Ok(session),
            Err(error) if start.elapsed() > LIMIT => return Err(error.into()),
            Err(_) => {}
        }
        if let Some(status) = process.try_wait()? {
            bail!("the storage daemon ended with {status}");
        }
        tokio::time::sleep(LOOK_AGAIN_AFTER).await;
    }
}
