// SPDX-License-Identifier: MIT OR Apache-2.0
//! A backup provider for vzdump: full backups of virtual machines, each disk as a sparse file in a directory.
//!
//! ```text
//! <path>/<archive>/manifest.json    what the archive is; its presence makes it one
//! <path>/<archive>/<disk>.raw       a disk
//! <path>/.tmp-…                     a backup under way, or left by a dead process
//! <path>/.commits/<id>              what became of a commit: an archive's name, or that it is refused
//! ```

#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    reason = "a lock is only poisoned by a panic that has ended its request"
)]

use std::cell::Cell;
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, FlockOperation, OFlags, fallocate, flock};
use serde_json::{Value, json};

const BLOCK: usize = 4096;
const PIECE: usize = 1 << 20;
/// Archives on a page of the list: a message may have 1 MiB.
const PAGE: usize = 500;
/// What a record says of a commit that came too late; no archive is called so.
const REFUSED: &str = "refused";

/// An error of the contract: its kind and a sentence.
struct Failure(&'static str, String);

type Answer = Result<Value, Failure>;

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        let kind = match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => "no_space",
            std::io::ErrorKind::NotFound => "not_found",
            _ => "io",
        };
        Self(kind, error.to_string())
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        Self("corrupt", error.to_string())
    }
}

fn invalid(why: impl Into<String>) -> Failure {
    Failure("invalid", why.into())
}

fn text<'a>(value: &'a Value, key: &str) -> Result<&'a str, Failure> {
    value[key].as_str().ok_or_else(|| invalid(format!("'{key}' is no text")))
}

/// Numbers of 64 bits are texts.
fn number(value: &Value, key: &str) -> Result<u64, Failure> {
    text(value, key)?.parse().map_err(|_| invalid(format!("'{key}' is no number")))
}

// ---- The protocol ----------------------------------------------------------------------------------------

/// What all requests share.
#[derive(Default)]
struct Host {
    path: OnceLock<PathBuf>,
    last: AtomicU64,
    /// Of the host's requests under way: what stops them.
    stops: Mutex<HashMap<u64, Arc<AtomicBool>>>,
    /// Of our own requests under way: who takes the answer.
    asked: Mutex<HashMap<u64, Sender<Value>>>,
    backups: Mutex<HashMap<String, Backup>>,
    /// What is being restored, by handle.
    restores: Mutex<HashMap<String, (String, File)>>,
}

/// A request of the host that is being worked on.
struct Request {
    id: u64,
    stop: Arc<AtomicBool>,
    /// When progress was told last.
    told: Cell<Option<Instant>>,
}

fn send(mut message: Value) {
    message["jsonrpc"] = json!("2.0");
    let line = format!("{message}\n");
    // If nobody reads any more, our input ends, too.
    let _ = std::io::stdout().lock().write_all(line.as_bytes());
}

impl Host {
    fn handle(&self, kind: &str) -> String {
        format!("{kind}-{}", self.last.fetch_add(1, Ordering::Relaxed))
    }

    /// Asks the host and waits for its answer; gives up when our own request is cancelled.
    fn ask(&self, request: &Request, method: &str, params: Value) -> Answer {
        let id = self.last.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = channel();
        self.asked.lock().unwrap().insert(id, sender);
        send(json!({"id": id, "method": method, "params": params}));
        loop {
            if let Ok(mut answer) = receiver.recv_timeout(Duration::from_millis(100)) {
                if answer["error"].is_object() {
                    return Err(Failure("io", answer["error"]["message"].to_string()));
                }
                return Ok(answer["result"].take());
            }
            check(request)?;
        }
    }
}

fn check(request: &Request) -> Result<(), Failure> {
    if request.stop.load(Ordering::Relaxed) {
        return Err(Failure("cancelled", "The host has cancelled the call.".into()));
    }
    Ok(())
}

fn main() {
    let host = Arc::new(Host::default());
    for line in std::io::stdin().lock().lines() {
        // What cannot be read makes no sense from here on.
        let Ok(message) = line.map_err(drop).and_then(|l| serde_json::from_str(&l).map_err(drop))
        else {
            break;
        };
        receive(&host, message);
    }
}

fn receive(host: &Arc<Host>, message: Value) {
    let id = message["id"].as_u64().unwrap_or_default();
    match message["method"].as_str().map(str::to_owned) {
        None => {
            if let Some(sender) = host.asked.lock().unwrap().remove(&id) {
                let _ = sender.send(message);
            }
        }
        Some(method) if method == "$/cancel" => {
            let id = message["params"]["id"].as_u64().unwrap_or_default();
            if let Some(stop) = host.stops.lock().unwrap().get(&id) {
                stop.store(true, Ordering::Relaxed);
            }
        }
        Some(method) => {
            let stop = Arc::new(AtomicBool::new(false));
            host.stops.lock().unwrap().insert(id, Arc::clone(&stop));
            let host = Arc::clone(host);
            std::thread::spawn(move || {
                let request = Request { id, stop, told: Cell::default() };
                let work = || handle(&host, &request, &method, &message["params"]);
                // A mistake of ours is an error, too: without an answer the host would wait.
                let answer = catch_unwind(AssertUnwindSafe(work))
                    .unwrap_or_else(|_| Err(Failure("other", format!("{method}: a panic"))));
                host.stops.lock().unwrap().remove(&id);
                send(match answer {
                    Ok(Some(result)) => json!({"id": id, "result": result}),
                    Ok(None) => json!({"id": id, "error":
                        {"code": -32601, "message": format!("There is no method '{method}'.")}}),
                    Err(Failure(kind, why)) => json!({"id": id, "error":
                        {"code": -32000, "message": why, "data": {"kind": kind}}}),
                });
            });
        }
    }
}

fn handle(
    host: &Host,
    request: &Request,
    method: &str,
    params: &Value,
) -> Result<Option<Value>, Failure> {
    if method == "initialize" {
        return Ok(Some(json!({
            "name": "full store",
            "api_version": 2,
            "capabilities": {"vm_file": true, "vm_restore": true, "remove": true},
            "properties": [
                {"name": "path", "kind": "path", "required": true, "description": "The directory."}
            ],
        })));
    }
    if method == "configure" {
        let _ = host.path.set(text(&params["properties"], "path")?.into());
        return Ok(Some(json!({})));
    }
    let path = host.path.get().ok_or_else(|| invalid("'configure' has to come first."))?;
    let store = Store { path };
    Ok(Some(match method {
        "activate" => store.activate()?,
        "status" => store.status()?,
        "list" => store.list(params["cursor"].as_str().unwrap_or_default())?,
        "guest_config" => {
            let manifest = store.manifest(text(params, "archive")?)?;
            json!({"config": manifest["config"], "firewall": manifest["firewall"]})
        }
        "remove" => store.remove(text(params, "archive")?)?,
        "commit_outcome" => store.outcome(text(params, "id")?)?,
        "start_job" => json!({"job": "job"}),
        "start_guest" => {
            let backup = store.begin(params)?;
            let answer = json!({"guest": host.handle("guest"), "archive_name": backup.archive});
            host.backups.lock().unwrap().insert(answer["guest"].to_string(), backup);
            answer
        }
        // Full backups only: no bitmap is wanted.
        "plan_volumes" => {
            let disks = params["volumes"].as_array().map_or(0, Vec::len);
            json!({"requests": vec![json!({"bitmap": "none"}); disks]})
        }
        "backup_vm" => {
            let guest = params["guest"].to_string();
            let path = host.backups.lock().unwrap().get(&guest).map(|b| b.path.clone());
            let path = path.ok_or_else(|| invalid("There is no such backup."))?;
            back_up(host, request, &path, params)?
        }
        "commit" => {
            let backup = host.backups.lock().unwrap().remove(&params["guest"].to_string());
            store.commit(&backup.ok_or_else(|| invalid("There is no such backup."))?, params)?
        }
        "abort" => {
            let backup = host.backups.lock().unwrap().remove(&params["guest"].to_string());
            if let Some(Backup { path, lock, .. }) = backup {
                remove_dir(&path, lock)?;
            }
            json!({})
        }
        "restore_vm" => {
            let archive = text(params, "archive")?;
            let held = store.hold(archive, FlockOperation::NonBlockingLockShared)?;
            let restore = host.handle("restore");
            let devices = store.manifest(archive)?["disks"].clone();
            let kept = (archive.to_owned(), held);
            host.restores.lock().unwrap().insert(restore.clone(), kept);
            json!({"restore": restore, "devices": devices})
        }
        "volume_init" => disk_of(host, &store, params)?,
        "restore_cleanup" => {
            host.restores.lock().unwrap().remove(text(params, "restore")?);
            json!({})
        }
        "volume_cleanup" | "finish_job" => json!({}),
        _ => return Ok(None),
    }))
}

/// Where a disk of an archive that is being restored is.
fn disk_of(host: &Host, store: &Store<'_>, params: &Value) -> Answer {
    let restores = host.restores.lock().unwrap();
    let found = restores.get(text(params, "restore")?);
    let (archive, _) = found.ok_or_else(|| invalid("There is no such restore."))?;
    let device = text(params, "device")?;
    let disks = store.manifest(archive)?["disks"].take();
    if !disks.as_array().is_some_and(|disks| disks.iter().any(|d| d["device"] == device)) {
        return Err(Failure("not_found", format!("{archive} has no disk {device:?}.")));
    }
    let disk = store.place(archive)?.join(format!("{device}.raw"));
    Ok(json!({"kind": "path", "path": disk}))
}

// ---- The store -------------------------------------------------------------------------------------------

struct Store<'a> {
    path: &'a Path,
}

/// A guest's backup until it is committed; the lock says that we are alive.
struct Backup {
    archive: String,
    path: PathBuf,
    manifest: Value,
    lock: File,
}

/// Only without its manifest there is no archive; any other error must not look like that.
fn unreadable(archive: &str, error: &std::io::Error) -> Failure {
    match error.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => {
            Failure("not_found", format!("There is no archive {archive}."))
        }
        _ => Failure("io", format!("The manifest of {archive} cannot be read: {error}.")),
    }
}

/// For exclusive locks, which NFS gives only to those who may write.
fn open_to_lock(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

/// Removes a directory, of which the lock is open: on NFS it would stay until that is closed. Somebody else may
/// remove it then, too.
fn remove_dir(path: &Path, lock: File) -> std::io::Result<()> {
    drop(lock);
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn sync(path: &Path) -> std::io::Result<()> {
    File::open(path)?.sync_all()
}

fn is_name(name: &str) -> bool {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    !name.is_empty() && !name.starts_with('.') && name.bytes().all(is_plain)
}

impl Store<'_> {
    fn place(&self, archive: &str) -> Result<PathBuf, Failure> {
        if !is_name(archive) {
            return Err(Failure("not_found", format!("There is no archive {archive:?}.")));
        }
        Ok(self.path.join(archive))
    }

    fn manifest(&self, archive: &str) -> Answer {
        let bytes = fs::read(self.place(archive)?.join("manifest.json"));
        let bytes = bytes.map_err(|error| unreadable(archive, &error))?;
        Ok(serde_json::from_slice(&bytes)?)
    }

    /// Keeps an archive from being removed, or from being read.
    fn hold(&self, archive: &str, how: FlockOperation) -> Result<File, Failure> {
        let path = self.place(archive)?.join("manifest.json");
        let file = match how {
            FlockOperation::NonBlockingLockShared => File::open(&path),
            _ => open_to_lock(&path),
        };
        let file = file.map_err(|error| unreadable(archive, &error))?;
        let busy = |_| Failure("in_use", format!("The archive {archive} is in use."));
        flock(&file, how).map_err(busy)?;
        // It may have been removed between both steps, and the lock be one of what is left of it.
        let now = fs::metadata(&path).map_err(|error| unreadable(archive, &error))?;
        let held = file.metadata()?;
        if (now.dev(), now.ino()) != (held.dev(), held.ino()) {
            return Err(Failure("not_found", format!("There is no archive {archive} any more.")));
        }
        Ok(file)
    }

    /// Names in the directory; none without one.
    fn names(&self) -> std::io::Result<Vec<String>> {
        match fs::read_dir(self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            entries => {
                let names = entries?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
                Ok(names.collect())
            }
        }
    }

    fn activate(&self) -> Answer {
        fs::create_dir_all(self.path.join(".commits"))?;
        for name in self.names()?.into_iter().filter(|name| name.starts_with(".tmp-")) {
            let path = self.path.join(name);
            // Without a lock it is just being made or removed; so it is old only by its process.
            let Ok(lock) = open_to_lock(&path.join("lock")) else { continue };
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
                remove_dir(&path, lock)?;
            }
        }
        Ok(json!({}))
    }

    fn status(&self) -> Answer {
        fs::create_dir_all(self.path)?;
        let stat = rustix::fs::statvfs(self.path).map_err(std::io::Error::from)?;
        let total = stat.f_blocks.saturating_mul(stat.f_frsize);
        let used = total.saturating_sub(stat.f_bavail.saturating_mul(stat.f_frsize));
        Ok(json!({"total_bytes": total.to_string(), "used_bytes": used.to_string()}))
    }

    /// A page of the archives whose names come after the cursor. It is a name, not a number: what goes
    /// meanwhile must not shift the pages.
    fn list(&self, cursor: &str) -> Answer {
        let mut names = self.names()?;
        names.retain(|name| is_name(name) && name.as_str() > cursor);
        names.sort();
        let next = (names.len() > PAGE).then(|| names[PAGE - 1].clone());
        let mut archives = Vec::new();
        for name in names.into_iter().take(PAGE) {
            let mut entry = match self.manifest(&name) {
                // None, gone meanwhile, or damaged. Any other error is one of the list: the host must not
                // take the others for all that there are.
                Err(Failure("not_found" | "corrupt", _)) => continue,
                entry => entry?,
            };
            for key in ["config", "firewall", "disks"] {
                entry.as_object_mut().and_then(|entry| entry.remove(key));
            }
            entry["name"] = json!(name);
            archives.push(entry);
        }
        Ok(json!({"archives": archives, "next": next}))
    }

    fn remove(&self, archive: &str) -> Answer {
        let held = self.hold(archive, FlockOperation::NonBlockingLockExclusive)?;
        let dead = self.path.join(format!(".tmp-dead-{archive}-{}", std::process::id()));
        // With a lock that nobody holds: the next activation ends what a crash leaves.
        File::create(self.place(archive)?.join("lock"))?;
        fs::rename(self.place(archive)?, &dead)?;
        sync(self.path)?;
        remove_dir(&dead, held)?;
        Ok(json!({}))
    }

    fn begin(&self, params: &Value) -> Result<Backup, Failure> {
        let (kind, guest) = (text(params, "kind")?, params["guest_id"].clone());
        let time_s = number(params, "start_time_s")?;
        let archive = format!("full-{kind}-{guest}-{time_s}");
        if self.place(&archive)?.exists() {
            return Err(invalid(format!("There is an archive {archive} already.")));
        }
        let path = self.path.join(format!(".tmp-{archive}-{}", std::process::id()));
        fs::create_dir_all(&path)?;
        let lock = File::create(path.join("lock"))?;
        flock(&lock, FlockOperation::LockExclusive).map_err(std::io::Error::from)?;
        let manifest = json!({"subtype": kind, "guest_id": guest, "time_s": time_s.to_string()});
        Ok(Backup { archive, path, manifest, lock })
    }

    /// A commit writes its name into its record before it counts, and holds a lock meanwhile. Who asks for
    /// the outcome and finds no archive makes one that forbids the commit.
    fn record(&self, id: &str) -> Result<(File, String), Failure> {
        let dir = self.path.join(".commits");
        fs::create_dir_all(&dir)?;
        if !is_name(id) {
            return Err(invalid("This is no id of a commit."));
        }
        let path = dir.join(id);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(&path)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| Failure("in_use", "The commit is under way.".into()))?;
        let known = fs::read_to_string(&path)?;
        sync(&dir)?;
        Ok((file, known))
    }

    fn commit(&self, backup: &Backup, params: &Value) -> Answer {
        let (file, known) = self.record(text(params, "id")?)?;
        if !known.is_empty() {
            return Err(invalid("This commit was given up."));
        }
        file.write_all_at(backup.archive.as_bytes(), 0)?;
        file.sync_all()?;
        let details = fs::read(backup.path.join("details.json"))?;
        let details: Value = serde_json::from_slice(&details)?;
        let mut manifest = backup.manifest.clone();
        for key in ["config", "firewall", "disks"] {
            manifest[key] = details[key].clone();
        }
        manifest["commit_id"] = params["id"].clone();
        let mut size_bytes = 0;
        for entry in fs::read_dir(&backup.path)? {
            let path = entry?.path();
            size_bytes += fs::metadata(&path)?.blocks() * 512;
            sync(&path)?;
        }
        manifest["size_bytes"] = json!(size_bytes.to_string());
        fs::write(backup.path.join("manifest.json"), manifest.to_string())?;
        sync(&backup.path.join("manifest.json"))?;
        sync(&backup.path)?;
        fs::rename(&backup.path, self.place(&backup.archive)?)?;
        sync(self.path)?;
        Ok(json!({"archive": backup.archive, "size_bytes": size_bytes.to_string()}))
    }

    fn outcome(&self, id: &str) -> Answer {
        let (file, archive) = match self.record(id) {
            Err(Failure("in_use", _)) => return Ok(json!({"outcome": "pending"})),
            record => record?,
        };
        let found = match self.manifest(&archive) {
            Err(Failure("not_found", _)) => Value::Null,
            found => found?,
        };
        if found["commit_id"] == json!(id) {
            return Ok(json!({"outcome": "committed", "archive": archive}));
        }
        file.set_len(0)?;
        file.write_all_at(REFUSED.as_bytes(), 0)?;
        file.sync_all()?;
        Ok(json!({"outcome": "not_committed"}))
    }
}

// ---- Reading disks ---------------------------------------------------------------------------------------

fn back_up(host: &Host, request: &Request, path: &Path, params: &Value) -> Answer {
    let (mut disks, mut sum) = (Vec::new(), [0_u64; 4]);
    for volume in params["volumes"].as_array().into_iter().flatten() {
        let device = text(volume, "device")?;
        if !is_name(device) || volume["access"]["kind"] != "file" {
            return Err(invalid(format!("The disk {device} is not offered as a file.")));
        }
        let size = number(volume, "size_bytes")?;
        let moved = copy(host, request, volume, &path.join(format!("{device}.raw")), size)?;
        sum.iter_mut().zip(moved).for_each(|(sum, moved)| *sum += moved);
        disks.push(json!({"device": device, "size_bytes": size.to_string()}));
    }
    let details = json!({
        "config": params["config"], "firewall": params["firewall"], "disks": disks});
    fs::write(path.join("details.json"), details.to_string())?;
    let [total, read, zero, written] = sum.map(|bytes| bytes.to_string());
    Ok(json!({
        "total_bytes": total, "read_bytes": read, "zero_bytes": zero, "written_bytes": written}))
}

/// Copies a disk; returns its bytes, those read, those zero and those written.
fn copy(
    host: &Host,
    request: &Request,
    volume: &Value,
    target: &Path,
    size: u64,
) -> Result<[u64; 4], Failure> {
    let (device, access) = (text(volume, "device")?, &volume["access"]);
    let source = open(text(access, "path")?)?;
    let target = File::create(target)?;
    target.set_len(size)?;
    let (mut offset, mut reached, [mut read, mut zero, mut written]) = (0, 0, [0_u64; 3]);
    // Aligned, as O_DIRECT wants it.
    let mut buffer = vec![0_u8; PIECE + BLOCK];
    let skip = buffer.as_ptr().align_offset(BLOCK);
    let buffer = &mut buffer[skip..skip + PIECE];
    loop {
        let asked = json!({"regions": access["regions"], "offset": offset.to_string()});
        let page = host.ask(request, "regions", asked)?;
        for region in page["regions"].as_array().into_iter().flatten() {
            let (begin, length) = (number(region, "offset")?, number(region, "length_bytes")?);
            // All of the disk is wanted, so the areas follow each other.
            if begin != reached || length > size - reached {
                return Err(Failure("corrupt", format!("An area at {begin} is odd.")));
            }
            reached = begin + length;
            if region["zero"] == true {
                zero += length;
                continue;
            }
            let mut at = begin;
            while at < reached {
                check(request)?;
                let count = read_piece(&source, buffer, at, reached)?;
                let piece = &buffer[..count];
                read += count as u64;
                for (index, block) in piece.chunks(BLOCK).enumerate() {
                    if block.iter().all(|byte| *byte == 0) {
                        zero += block.len() as u64;
                    } else {
                        target.write_all_at(block, at + (index * BLOCK) as u64)?;
                        written += block.len() as u64;
                    }
                }
                // What is stored need not be kept for us; that it cannot be released costs only room.
                let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let _ = fallocate(&source, hole, at, count as u64);
                at += count as u64;
                progress(request, device, at, size, zero);
            }
        }
        if page["next"] == "end" {
            break;
        }
        offset = number(&page, "offset")?;
    }
    if reached != size {
        return Err(Failure("corrupt", format!("The disk {device} ends at {reached}.")));
    }
    progress(request, device, size, size, zero);
    Ok([size, read, zero, written])
}

/// A few times a second is enough.
fn progress(request: &Request, device: &str, done: u64, total: u64, zero: u64) {
    let is_recent = |told: Instant| told.elapsed() < Duration::from_millis(200);
    if done < total && request.told.get().is_some_and(is_recent) {
        return;
    }
    request.told.set(Some(Instant::now()));
    send(json!({"method": "progress", "params": {
        "request": request.id, "device": device, "done_bytes": done.to_string(),
        "total_bytes": total.to_string(), "zero_bytes": zero.to_string()}}));
}

fn open(path: &str) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    let direct = i32::try_from(OFlags::DIRECT.bits()).unwrap_or_default();
    match options.read(true).write(true).custom_flags(direct).open(path) {
        // A file system without it.
        Err(error) if error.raw_os_error() == Some(22) => options.custom_flags(0).open(path),
        opened => opened,
    }
}

/// Reads from `at`, at most a buffer full, and not beyond `end`; both may lie within a block only at the
/// end of the disk or after an area that does.
fn read_piece(source: &File, buffer: &mut [u8], at: u64, end: u64) -> Result<usize, Failure> {
    let lead = (at % BLOCK as u64) as usize;
    let wanted = usize::try_from(end - at).unwrap_or(usize::MAX).min(PIECE - BLOCK);
    let whole = (lead + wanted).next_multiple_of(BLOCK);
    let mut got = 0;
    while got < lead + wanted {
        match source.read_at(&mut buffer[got..whole], at - lead as u64 + got as u64)? {
            0 => return Err(Failure("io", "The disk ends before it should.".into())),
            count => got += count,
        }
    }
    buffer.copy_within(lead..lead + wanted, 0);
    Ok(wanted)
}
