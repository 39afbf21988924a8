// SPDX-License-Identifier: MIT OR Apache-2.0
//! A storage daemon, or an emulator whose guest never runs, with small disks: `disk0` and `disk1`
//! with fleecing images and exports of the same names, and nodes that are wrong in some way.

use std::io::{BufRead as _, BufReader, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use qmp_client::{EventItem, EventStream, Options, Session};
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};
use system_tests::qemu::bin_dir;

/// Size of all disks.
pub(super) const DISK_BYTES: u64 = 4 << 20;
const LIMIT: Duration = Duration::from_secs(60);
/// The socket of another monitor than the one of the lab itself, in the lab's folder.
pub(super) const SECOND_MONITOR: &str = "qmp2";

/// What is special about a daemon.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Setup {
    /// Disks and exports are in a thread of their own.
    pub(super) iothread: bool,
    /// There is a node `slow` that writes 200 kB per second.
    pub(super) slow_fleecing: bool,
    /// With faults of these names (see `fault.rs` of the extension), in the daemon made for that.
    pub(super) faults: &'static str,
}

/// A write of the guest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Change {
    pub(super) pattern: u8,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// The process with its folder; killed when dropped.
pub(super) struct Lab {
    child: Option<Child>,
    session: Session,
    folder: tempfile::TempDir,
    exports: AtomicU32,
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

impl Lab {
    /// Starts a storage daemon.
    pub(super) async fn start(setup: Setup) -> Self {
        Self::start_in(&std::env::temp_dir(), setup).await
    }

    /// Starts a storage daemon whose disks are on the file system of this folder.
    pub(super) async fn start_in(folder: &Path, setup: Setup) -> Self {
        let folder = tempfile::tempdir_in(folder).unwrap();
        let mut command = daemon(setup.faults, folder.path());
        let nbd = json!({ "addr": { "type": "unix", "path": folder.path().join("nbd") },
                          "max-connections": 16 });
        if setup.iothread {
            command.args(["--object", "iothread,id=io0"]);
        }
        for node in nodes(folder.path()) {
            command.arg("--blockdev").arg(node.to_string());
        }
        if setup.slow_fleecing {
            let group = json!({ "qom-type": "throttle-group", "id": "brake",
                                "limits": { "bps-write": 200_000 } });
            let node = json!({ "driver": "throttle", "node-name": "slow",
                               "throttle-group": "brake", "file": "exported" });
            command.arg("--object").arg(group.to_string());
            command.arg("--blockdev").arg(node.to_string());
        }
        command.arg("--nbd-server").arg(nbd.to_string());
        for (node, writable) in [("disk0", true), ("disk1", true), ("exported", false)] {
            if setup.slow_fleecing && node == "exported" {
                continue;
            }
            let mut export = json!({ "type": "nbd", "id": format!("guest-{node}"), "name": node,
                                     "node-name": node, "writable": writable });
            if setup.iothread {
                export["iothread"] = json!("io0");
                export["fixed-iothread"] = json!(true);
            }
            command.arg("--export").arg(export.to_string());
        }
        for monitor in ["qmp", SECOND_MONITOR] {
            let path = folder.path().join(monitor);
            command.arg("--chardev");
            command.arg(format!("socket,id={monitor},path={},server=on,wait=off", path.display()));
            command.arg("--monitor").arg(format!("chardev={monitor}"));
        }
        Self::connect(command, folder).await
    }

    /// Starts an emulator: `disk0` has the device `guest-disk0`, `shared` has the device `disk1`,
    /// `old` and its fleecing image are made by `-drive`, the drive of `cd` is empty.
    pub(super) async fn start_emulator(options: &[&str]) -> Self {
        let cd = ["-drive", "if=none,id=empty", "-device", "ide-cd,drive=empty,id=cd"];
        Self::start_emulator_without_cd(&[&cd, options].concat()).await
    }

    /// The same without `cd`: the firmware waits half a minute for a medium.
    pub(super) async fn start_emulator_without_cd(options: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(bin_dir().unwrap().join("qemu-system-x86_64"));
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-S"]);
        command.args(["-machine", "q35", "-accel", "tcg", "-object", "iothread,id=io0"]);
        for node in nodes(folder.path()) {
            command.arg("-blockdev").arg(node.to_string());
        }
        command.args(["-device", "virtio-blk-pci,id=guest-disk0,drive=disk0,iothread=io0"]);
        command.args(["-device", "virtio-blk-pci,id=disk1,drive=shared"]);
        for id in ["old", "old-fleecing"] {
            let path = folder.path().join(id);
            std::fs::File::create(&path).unwrap().set_len(DISK_BYTES).unwrap();
            let file = path.display();
            command.args(["-drive", &format!("if=none,id={id},format=raw,file={file}")]);
        }
        command.args(["-device", "virtio-blk-pci,drive=old"]);
        for monitor in ["qmp", SECOND_MONITOR] {
            let path = folder.path().join(monitor);
            command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", path.display()));
        }
        command.args(options);
        Self::connect(command, folder).await
    }

    async fn connect(mut command: Command, folder: tempfile::TempDir) -> Self {
        let mut child = command.stdin(Stdio::null()).spawn().unwrap();
        let start = Instant::now();
        let session = loop {
            match Session::connect(folder.path().join("qmp"), Options::default()).await {
                Ok(session) => break session,
                Err(error) => {
                    let ended = child.try_wait().unwrap();
                    if ended.is_some() || start.elapsed() > LIMIT {
                        drop(child.kill());
                        drop(child.wait());
                        panic!("{error}; the process: {ended:?}");
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        Self { child: Some(child), session, folder, exports: AtomicU32::new(0) }
    }

    /// How many sockets the process has open: its clients and what it listens on.
    pub(super) fn sockets(&self) -> usize {
        let pid = self.child.as_ref().unwrap().id();
        let files = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        let links = files.filter_map(|file| std::fs::read_link(file.path()).ok());
        links.filter(|link| link.to_string_lossy().starts_with("socket:")).count()
    }

    pub(super) fn session(&self) -> &Session {
        &self.session
    }

    /// A file in the lab's folder.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Gives a command that may fail.
    pub(super) async fn try_run(
        &self,
        command: &str,
        arguments: Value,
    ) -> Result<Value, qmp_client::Error> {
        self.session.execute_raw(command, arguments, Some(LIMIT)).await
    }

    /// Gives a command that must succeed.
    pub(super) async fn run(&self, command: &str, arguments: Value) -> Value {
        let shown = format!("{command} {arguments}");
        self.try_run(command, arguments).await.unwrap_or_else(|error| panic!("{shown}: {error}"))
    }

    pub(super) async fn setup(&self, target: &str, devices: Value) -> Vec<Value> {
        let arguments = json!({ "target-id": target, "devices": devices });
        let infos = self.run("backup-access-setup", arguments).await;
        infos.as_array().unwrap().clone()
    }

    pub(super) async fn teardown(&self, target: &str, success: bool) -> Value {
        let arguments = json!({ "target-id": target, "success": success });
        self.run("backup-access-teardown", arguments).await
    }

    /// Adds a disk of zeroes, as large as the others.
    pub(super) async fn add_disk(&self, name: &str) {
        for node in disk_nodes(self.folder.path(), name, DISK_BYTES, false) {
            self.run("blockdev-add", node).await;
        }
    }

    /// All nodes and links, in a form that can be compared.
    pub(super) async fn graph(&self) -> Vec<String> {
        let graph = self.run("x-debug-query-block-graph", json!({})).await;
        let name = |id: &Value| {
            let nodes = graph["nodes"].as_array().unwrap();
            let node = nodes.iter().find(|node| node["id"] == *id).unwrap();
            format!("{} '{}'", node["type"].as_str().unwrap(), node["name"].as_str().unwrap())
        };
        let nodes = graph["nodes"].as_array().unwrap().iter().map(|node| name(&node["id"]));
        let edges = graph["edges"].as_array().unwrap().iter().map(|edge| {
            let (parent, child) = (name(&edge["parent"]), name(&edge["child"]));
            format!(
                "{parent} -{}-> {child}: {} {}",
                edge["name"], edge["perm"], edge["shared-perm"]
            )
        });
        let mut lines: Vec<String> = nodes.chain(edges).collect();
        lines.sort();
        lines
    }

    /// The names of a node's dirty bitmaps.
    pub(super) async fn bitmaps(&self, node: &str) -> Vec<String> {
        let nodes = self.run("query-named-block-nodes", json!({ "flat": true })).await;
        let nodes = nodes.as_array().unwrap();
        let node = nodes.iter().find(|entry| entry["node-name"] == node).unwrap();
        let bitmaps = node.get("dirty-bitmaps").and_then(Value::as_array);
        // Those without a name keep internal snapshots from being loaded.
        let names = bitmaps.into_iter().flatten().filter_map(|b| b["name"].as_str());
        names.map(str::to_owned).collect()
    }

    /// Exports a snapshot, with its bitmap if it has one; the export's name.
    pub(super) async fn export(&self, info: &Value) -> String {
        let name = format!("snapshot{}", self.exports.fetch_add(1, Ordering::Relaxed));
        let mut export = json!({ "type": "nbd", "id": name, "name": name, "writable": true,
                                 "node-name": info["node-name"] });
        if let Some(bitmap) = info.get("bitmap-name") {
            export["bitmaps"] = json!([{ "node": info["bitmap-node-name"], "name": bitmap }]);
        }
        self.run("block-export-add", export).await;
        name
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.folder.path().join("nbd").display())
    }

    async fn io(&self, export: &str, command: &str) {
        let text = self.try_io(export, &[command]).await;
        assert!(!text.contains("failed"), "{command} on {export}: {text}");
    }

    /// Runs commands of `qemu-io` on an export; what it says, which has the word "failed" for each
    /// that failed.
    pub(super) async fn try_io<C: AsRef<str>>(&self, export: &str, commands: &[C]) -> String {
        let mut process = tokio::process::Command::new(bin_dir().unwrap().join("qemu-io"));
        process.args(["-f", "raw"]);
        if commands.iter().all(|command| command.as_ref().starts_with("read ")) {
            process.arg("-r");
        }
        for command in commands {
            process.args(["-c", command.as_ref()]);
        }
        process.arg(self.uri(export)).stdin(Stdio::null()).kill_on_drop(true);
        let output = tokio::time::timeout(LIMIT, process.output()).await.expect("in time").unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        let end = if output.status.success() { "" } else { "\nqemu-io failed" };
        format!("{text}{errors}{end}")
    }

    /// Writes as the guest would.
    pub(super) async fn guest_writes(&self, export: &str, pattern: u8, offset: u64, len: u64) {
        self.io(export, &format!("write -P {pattern:#x} {offset} {len}")).await;
    }

    /// Compares the content with a pattern.
    pub(super) async fn expect(&self, export: &str, pattern: u8, offset: u64, len: u64) {
        self.io(export, &format!("read -P {pattern:#x} {offset} {len}")).await;
    }

    /// Compares the whole content with a file, byte by byte.
    pub(super) fn expect_file(&self, export: &str, file: &Path) {
        self.image(&["compare", "-f", "raw", "-F", "raw"], export, file);
    }

    /// Saves the whole content as a file.
    pub(super) fn save(&self, export: &str, file: &Path) {
        self.image(&["convert", "-f", "raw", "-O", "raw"], export, file);
    }

    fn image(&self, command: &[&str], export: &str, file: &Path) {
        let mut process = Command::new(bin_dir().unwrap().join("qemu-img"));
        let output = process.args(command).arg(self.uri(export)).arg(file).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command:?} {export}: {text}{errors}");
    }

    /// Reads everything.
    pub(super) async fn read_all(&self, export: &str) {
        self.io(export, &format!("read 0 {DISK_BYTES}")).await;
    }

    /// The dirty areas as a client sees them.
    pub(super) fn dirty_map(&self, export: &str, bitmap: &str) -> Vec<Range<u64>> {
        let options = format!(
            "driver=nbd,export={export},server.type=unix,server.path={},\
             x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}",
            self.folder.path().join("nbd").display()
        );
        let output = Command::new(bin_dir().unwrap().join("qemu-img"))
            .args(["map", "--output=json", "--image-opts", &options])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let areas: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
        // qemu-img shows what is dirty as a hole.
        let dirty = areas.iter().filter(|area| area["data"] == false);
        dirty
            .map(|area| {
                let start = area["start"].as_u64().unwrap();
                start..start + area["length"].as_u64().unwrap()
            })
            .collect()
    }

    /// Writes all the time until it is told to stop.
    pub(super) fn write_forever(self: &Arc<Self>, export: &str) -> Writer {
        let (lab, export) = (Arc::clone(self), export.to_owned());
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let task = tokio::spawn(async move {
            let mut number = 0_u64;
            while !told.load(Ordering::Relaxed) {
                let offset = number * 7 % 64 * 65536;
                lab.guest_writes(&export, 0xa5, offset, 65536).await;
                number += 1;
            }
            number
        });
        Writer { stop, task }
    }

    /// Waits for an event of this name; its data.
    pub(super) async fn next_event(&self, events: &mut EventStream, name: &str) -> Value {
        let wait = async {
            loop {
                match events.next().await.expect("the connection stays") {
                    EventItem::Event(event) if event.name == name => return event.data,
                    _ => {}
                }
            }
        };
        let data = tokio::time::timeout(LIMIT, wait).await.expect("the event comes");
        serde_json::to_value(data).unwrap()
    }

    /// Waits until it is so.
    pub(super) async fn until(&self, what: &str, condition: impl AsyncFn() -> bool) {
        let start = Instant::now();
        while !condition().await {
            assert!(start.elapsed() < LIMIT, "not in time: {what}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Sends the process a signal.
    pub(super) fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(self.child.as_ref().unwrap());
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Tells it to quit; it must end by itself and well.
    pub(super) async fn quit(self) {
        drop(self.session.execute_raw("quit", json!({}), None).await);
        self.ends().await;
    }

    /// It ends by itself and well.
    pub(super) async fn ends(mut self) {
        let mut child = self.child.take().unwrap();
        let status: ExitStatus = tokio::task::spawn_blocking(move || {
            let start = Instant::now();
            loop {
                if let Some(status) = child.try_wait().unwrap() {
                    return status;
                }
                if start.elapsed() > LIMIT {
                    drop(child.kill());
                    drop(child.wait());
                    panic!("it did not end");
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        })
        .await
        .unwrap();
        assert!(status.success(), "{status}");
        let closed = tokio::time::timeout(LIMIT, self.session.closed()).await;
        closed.expect("with its process the connection is gone");
    }
}

/// A guest that writes all the time.
pub(super) struct Writer {
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<u64>,
}

impl Writer {
    /// Ends it; how often it wrote.
    pub(super) async fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        tokio::time::timeout(LIMIT, self.task).await.expect("in time").unwrap()
    }
}

/// A client of an export that stays connected until it is dropped.
pub(super) struct Client {
    child: Child,
}

impl Client {
    pub(super) fn connect(lab: &Lab, export: &str) -> Self {
        let child = Command::new(bin_dir().unwrap().join("qemu-io"))
            .args(["-f", "raw", &lab.uri(export)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { child }
    }

    /// Reads and compares, and goes on waiting for commands.
    pub(super) fn reads(&mut self, pattern: u8) {
        self.reads_at(pattern, 0);
    }

    /// The same elsewhere.
    pub(super) fn reads_at(&mut self, pattern: u8, offset: u64) {
        let stdin = self.child.stdin.as_mut().unwrap();
        writeln!(stdin, "read -P {pattern:#x} {offset} 4096").unwrap();
        let mut lines = BufReader::new(self.child.stdout.as_mut().unwrap()).lines();
        let line = lines.next().unwrap().unwrap();
        assert!(line.contains("read 4096/4096"), "{line}");
    }

    /// Goes on reading everything for a while.
    pub(super) fn keeps_reading(&mut self) {
        let stdin = self.child.stdin.as_mut().unwrap();
        stdin.write_all(format!("read -q 0 {DISK_BYTES}\n").repeat(1000).as_bytes()).unwrap();
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The storage daemon, or that with faults.
fn daemon(faults: &str, folder: &Path) -> Command {
    let bin = bin_dir().unwrap();
    if faults.is_empty() {
        return Command::new(bin.join("qemu-storage-daemon"));
    }
    let program = bin.with_file_name("faults").join("qemu-storage-daemon");
    assert!(program.is_file(), "{} is missing: run ./x qemu --faults", program.display());
    let mut command = Command::new(program);
    command.env("BACKUP_ACCESS_FAULTS", faults);
    command.stderr(std::fs::File::create(folder.join("stderr")).unwrap());
    command
}

/// Makes a file of zeroes; the descriptions of its node and of the raw node above it.
fn disk_nodes(folder: &Path, name: &str, size_bytes: u64, read_only: bool) -> [Value; 2] {
    let path: PathBuf = folder.join(name);
    std::fs::File::create(&path).unwrap().set_len(size_bytes).unwrap();
    let file = format!("{name}-file");
    [
        json!({ "driver": "file", "node-name": file, "filename": path, "discard": "unmap",
                "read-only": read_only }),
        json!({ "driver": "raw", "node-name": name, "file": file, "discard": "unmap",
                "read-only": read_only }),
    ]
}

/// The block nodes of daemon and emulator.
fn nodes(folder: &Path) -> Vec<Value> {
    let mut nodes = Vec::new();
    let mut disk = |name: &str, size_bytes: u64, read_only: bool| {
        nodes.extend(disk_nodes(folder, name, size_bytes, read_only));
    };
    for name in ["disk0", "disk0-fleecing", "disk1", "disk1-fleecing", "alone", "shared"] {
        disk(name, DISK_BYTES, false);
    }
    disk("exported", DISK_BYTES, false);
    disk("a-name-of-23-characters", DISK_BYTES, false);
    disk("read-only", DISK_BYTES, true);
    disk("small", 512 << 10, false);
    nodes
}
