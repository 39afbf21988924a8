#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# A backup provider for vzdump in one file, with nothing but the library of Python 3.11: full and incremental
# backups of virtual machines, backups of containers as tar archives, all in a directory.
#
#     <path>/<archive>/manifest.json          what the archive is; its presence makes it one
#     <path>/<archive>/<disk>.data            a sparse file: each area that was read, at its place
#     <path>/<archive>/<disk>.areas           these areas, one per line: offset length data|zero
#     <path>/<archive>/files.tar              a container's files
#     <path>/<archive>/notes, protected, log  what came later
#     <path>/.tmp-…                           backups, restores and removals under way, or left by the dead
#     <path>/.commits/<id>                    what became of a commit
#
# Copy it to the plugin directory under the name that is to be the storage's type; make it executable.
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import itertools
import json
import mmap
import os
import re
import shutil
import sys
import tarfile
import threading
import time

PIECE_BYTES = 1 << 20
BLOCK_BYTES = 4096
RECORD_DAYS = 30
MOVED = ("total_bytes", "read_bytes", "zero_bytes", "written_bytes")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9.+=_:-]{0,199}\Z")
# What tar says, at the end of a line. The last 16 KiB of it are told: with less it is all there is.
IN_PART = re.compile(r": File shrank by \d+ bytes?; padding with zeros$|: Warning: Read error at byte \d+, [^:]*: [^:]*$")
LEFT_OUT = re.compile(r"tar: \.?(.*): (?:Warning: (Cannot .*(?<!Operation not supported))|socket ignored)$")
WORDS_BYTES = 15000

class Failure(Exception):
    """An error of the contract: a kind for decisions, a sentence for people."""

    def __init__(self, kind, message, dependents=()):
        super().__init__(message)
        self.kind, self.dependents = kind, list(dependents)

# ---- The protocol: one JSON-RPC message per line -----------------------------------------------------

class Host:
    """Reads requests, answers each from a thread of its own, and asks the host back."""

    def __init__(self):
        self.write_lock = threading.Lock()
        self.lock = threading.Lock()
        self.cancelled = {}  # of the host's requests under way: the event that stops them
        self.waiting = {}  # of our requests under way: what takes the answer
        self.ids = itertools.count(1)

    def send(self, message):
        line = json.dumps({"jsonrpc": "2.0", **message}) + "\n"
        with self.write_lock:
            sys.stdout.buffer.write(line.encode())
            sys.stdout.buffer.flush()

    def serve(self, methods):
        for line in sys.stdin.buffer:
            message = json.loads(line)
            if "method" not in message:
                with self.lock:
                    take = self.waiting.pop(message["id"], None)
                if take:
                    take(message)
            elif message["method"] == "$/cancel":
                with self.lock:
                    event = self.cancelled.get(message["params"]["id"])
                if event:
                    event.set()
            elif "id" in message:
                with self.lock:
                    self.cancelled[message["id"]] = threading.Event()
                threading.Thread(target=self.answer, args=(methods, message), daemon=True).start()
        # The host has closed our standard input or died. What is under way is unfinished, and the next
        # activation removes it.
        os._exit(0)

    def answer(self, methods, message):
        ident, name = message["id"], message["method"]
        try:
            method = methods.get(name)
            if method is None:
                reply = {"error": {"code": -32601, "message": f"There is no method '{name}'."}}
            else:
                request = Request(self, ident, self.cancelled[ident])
                reply = {"result": method(request, message.get("params") or {}) or {}}
        except Failure as failure:
            reply = error(failure.kind, str(failure), failure.dependents)
        except OSError as failure:
            kinds = {errno.ENOSPC: "no_space", errno.EDQUOT: "no_space", errno.ENOENT: "not_found"}
            reply = error(kinds.get(failure.errno, "io"), f"{name}: {failure}")
        except Exception as failure:  # a mistake; without an answer the host would wait
            sys.excepthook(*sys.exc_info())
            reply = error("invalid", f"{name}: {failure!r}")
        with self.lock:
            del self.cancelled[ident]
        self.send({"id": ident, **reply})

    def ask(self, method, params, cancelled):
        """Asks the host and waits for its answer; gives up when our own caller does."""
        box, came, ident = [], threading.Event(), f"p{next(self.ids)}"
        with self.lock:
            self.waiting[ident] = lambda answer: (box.append(answer), came.set())
        self.send({"id": ident, "method": method, "params": params})
        while not came.wait(0.1):
            if cancelled.is_set():
                self.send({"method": "$/cancel", "params": {"id": ident}})
                raise Failure("cancelled", f"{method} was cancelled.")
        if "error" in box[0]:
            kind = (box[0]["error"].get("data") or {}).get("kind", "other")
            raise Failure(kind, box[0]["error"]["message"])
        return box[0]["result"]

def error(kind, message, dependents=()):
    data = {"kind": kind, "dependents": list(dependents)}
    return {"error": {"code": -32000, "message": message, "data": data}}

class Request:
    """A request of the host that is being worked on."""

    def __init__(self, host, ident, cancelled):
        self.host, self.ident, self.cancelled = host, ident, cancelled
        self.reported = 0.0

    def check(self):
        if self.cancelled.is_set():
            raise Failure("cancelled", "The host has cancelled the call.")

    def ask(self, method, params):
        return self.host.ask(method, params, self.cancelled)

    def progress(self, device, done, total, zero, now=False):
        if not now and time.monotonic() - self.reported < 0.2:
            return
        self.reported = time.monotonic()
        numbers = {"done_bytes": str(done), "total_bytes": str(total), "zero_bytes": str(zero)}
        params = {"request": self.ident, "device": device, **numbers}
        self.host.send({"method": "progress", "params": params})

    def log(self, line):
        self.host.send({"method": "log", "params": {"request": self.ident, "level": "info", "line": line}})

def sync_dir(path):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

def write_durably(path, data):
    """Replaces a file in one step that a crash cannot split."""
    temporary = f"{path}.new-{threading.get_ident()}"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    sync_dir(os.path.dirname(path))

def read_text(path):
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return ""

def try_lock(path, how, mode=None):
    """An open file with the lock, or none if somebody else has it."""
    # NFS gives exclusive locks only to those who may write.
    file = open(path, mode or ("rb" if how == fcntl.LOCK_SH else "r+b"))
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        file.close()
        return None

class Snapshot:
    """A disk at its point in time, offered as a file: read past the page cache, released by holes."""

    def __init__(self, path):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.buffer = mmap.mmap(-1, PIECE_BYTES)  # aligned, as O_DIRECT wants it
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            self.fd = os.open(path, flags | os.O_DIRECT)
        except OSError as failure:
            if failure.errno != errno.EINVAL:  # a file system without O_DIRECT
                raise
            self.fd = os.open(path, flags)
        self.can_release = True

    def close(self):
        os.close(self.fd)

    def read(self, offset, length):
        """Reads what begins and ends anywhere; the reads themselves are of whole blocks."""
        start = offset - offset % BLOCK_BYTES
        wanted = offset - start + length
        whole = -(-wanted // BLOCK_BYTES) * BLOCK_BYTES
        view, got = memoryview(self.buffer), 0
        while got < wanted:
            count = os.preadv(self.fd, [view[got:whole]], start + got)
            if count == 0:
                raise Failure("io", f"The disk ends at {start + got}, before it should.")
            got += count
        return view[offset - start : wanted]

    def release(self, offset, length):
        """Tells the guest's side that this part is stored. It saves room there, no more."""
        if not self.can_release:
            return
        punch_and_keep_size = 0x02 | 0x01
        big = ctypes.c_longlong
        if self.libc.fallocate(self.fd, punch_and_keep_size, big(offset), big(length)) != 0:
            self.can_release = False

# ---- The store ---------------------------------------------------------------------------------------

class Store:
    def __init__(self, path):
        self.path = path
        self.commits = os.path.join(path, ".commits")
        self.numbers = itertools.count(1)

    def place(self, archive):
        # Without a slash and not beginning with a dot: it cannot lead out of the directory.
        if not NAME.match(archive):
            raise Failure("not_found", f"There is no archive {archive!r}.")
        return os.path.join(self.path, archive)

    def manifest(self, archive):
        try:
            with open(os.path.join(self.place(archive), "manifest.json"), encoding="utf-8") as file:
                return json.load(file)
        except (FileNotFoundError, NotADirectoryError):
            raise Failure("not_found", f"There is no archive {archive}.") from None
        except ValueError as failure:
            raise Failure("corrupt", f"The manifest of {archive} is damaged: {failure}") from None

    def manifests(self, after=""):
        for name in sorted(os.listdir(self.path)):
            if name <= after or not NAME.match(name):
                continue
            try:
                yield name, self.manifest(name)
            except Failure as failure:
                print(f"warning: {failure}", file=sys.stderr, flush=True)

    def hold(self, archive):
        """Keeps an archive from being removed as long as the returned file is open."""
        held = try_lock(os.path.join(self.place(archive), "manifest.json"), fcntl.LOCK_SH)
        # The lock may be one of what is left of an archive that was removed just before.
        if held is None or not self.is_held(archive, held):
            raise Failure("in_use", f"The archive {archive} is being removed.")
        return held

    def is_held(self, archive, held):
        stat = stat_of(os.path.join(self.place(archive), "manifest.json"))
        return stat is not None and os.path.samestat(stat, os.fstat(held.fileno()))

    def temporary(self, what):
        """A directory that goes away when it is not renamed, and the lock that says we are alive."""
        path = os.path.join(self.path, f".tmp-{what}-{os.getpid()}-{next(self.numbers)}")
        os.mkdir(path, 0o700)
        open(os.path.join(path, "lock"), "wb").close()
        return path, try_lock(os.path.join(path, "lock"), fcntl.LOCK_EX)

    def clean_up(self):
        os.makedirs(self.commits, 0o700, exist_ok=True)
        for name in (name for name in os.listdir(self.path) if name.startswith(".tmp-")):
            path = os.path.join(self.path, name)
            try:
                alive = try_lock(os.path.join(path, "lock"), fcntl.LOCK_EX)
            except FileNotFoundError:
                # Just being made, unless it is old.
                stat = stat_of(path)
                is_old = stat and time.time() - stat.st_mtime > 3600
                alive = open(os.devnull, "rb") if is_old else None
            if alive is not None:
                alive.close()  # on NFS a directory with an open file stays
                shutil.rmtree(path, ignore_errors=True)
        for name in os.listdir(self.commits):
            path = os.path.join(self.commits, name)
            stat = stat_of(path)
            if stat and time.time() - stat.st_mtime > RECORD_DAYS * 86400:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

    # A commit leaves a record before it does anything that counts, and holds a lock on it as long as it
    # lives. Whoever asks for the outcome and finds no record makes one that forbids the commit.

    def record(self, ident):
        os.makedirs(self.commits, 0o700, exist_ok=True)
        file = try_lock(os.path.join(self.commits, ident), fcntl.LOCK_EX, "a+b")
        if file:
            file.seek(0)
        return file

    def write_record(self, file, word):
        file.truncate(0)
        file.write(word.encode())
        file.flush()
        os.fsync(file.fileno())
        sync_dir(self.commits)

    def outcome(self, ident):
        with self.record(ident) or contextlib.nullcontext() as record:
            if record is None:
                return {"outcome": "pending"}
            for name, manifest in self.manifests():
                if manifest["commit_id"] == ident:
                    return {"outcome": "committed", "archive": name}
            # The committer is dead, or was never there; from now on it is too late for it.
            self.write_record(record, "refused")
            return {"outcome": "not_committed"}

    def commit(self, ident, backup):
        with self.record(ident) or contextlib.nullcontext() as record:
            if record is None or record.read() == b"refused":
                raise Failure("invalid", "This commit was given up.")
            base = backup.manifest["base"]
            if base and not self.is_held(base, backup.base_held):
                raise Failure("corrupt", f"The archive {base}, which this one builds upon, is gone.")
            self.write_record(record, "committing")
            backup.manifest["commit_id"] = ident
            for name in os.listdir(backup.path):
                with open(os.path.join(backup.path, name), "rb") as file:
                    os.fsync(file.fileno())
            text = json.dumps(backup.manifest, indent=1).encode()
            write_durably(os.path.join(backup.path, "manifest.json"), text)
            os.rename(backup.path, self.place(backup.archive))
            sync_dir(self.path)

    def remove(self, archive):
        place, manifest = self.place(archive), self.manifest(archive)
        held = try_lock(os.path.join(place, "manifest.json"), fcntl.LOCK_EX)
        if held is None:
            raise Failure("in_use", f"The archive {archive} is being read or built upon.")
        with held:
            if os.path.exists(os.path.join(place, "protected")):
                raise Failure("protected", f"The archive {archive} is protected.")
            needed_by = [name for name, other in self.manifests() if other["base"] == archive]
            if needed_by:
                text = f"The archive {archive} is needed by {', '.join(needed_by)}."
                raise Failure("has_dependents", text, needed_by)
            dead = os.path.join(self.path, f".tmp-dead-{os.getpid()}-{next(self.numbers)}")
            os.rename(place, dead)
            sync_dir(self.path)
        shutil.rmtree(dead, ignore_errors=True)
        if manifest["commit_id"]:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.commits, manifest["commit_id"]))

def stat_of(path):
    """None for what has vanished meanwhile: other processes remove things, too."""
    with contextlib.suppress(FileNotFoundError):
        return os.lstat(path)
    return None

def size_of(path):
    paths = (os.path.join(top, name) for top, _, names in os.walk(path) for name in names)
    return sum(stat.st_blocks * 512 for stat in map(stat_of, paths) if stat)

# ---- Backups -----------------------------------------------------------------------------------------

class Backup:
    """One guest's backup, in a temporary directory until it is committed."""

    def __init__(self, store, params, longest_chain):
        started = time.gmtime(int(params["start_time_s"]))
        stem = f"vzdump-{params['kind']}-{params['guest_id']}-"
        self.store, self.longest_chain = store, longest_chain
        self.archive = stem + time.strftime("%Y_%m_%d-%H_%M_%S", started)
        if os.path.exists(store.place(self.archive)):
            raise Failure("invalid", f"There is an archive {self.archive} already.")
        self.path, self.lock = store.temporary(self.archive)
        self.base, self.base_held = None, None
        self.manifest = {"subtype": params["kind"], "guest_id": params["guest_id"], "base": None, "chain": 1}
        self.manifest.update({"time_s": params["start_time_s"], "commit_id": None, "disks": {}})

    def plan(self, volumes):
        """Asks for what changed since the guest's last backup here, disk by disk."""
        guest = ("qemu", self.manifest["guest_id"])
        found = self.store.manifests()
        mine = ((int(m["time_s"]), name) for name, m in found if (m["subtype"], m["guest_id"]) == guest)
        _, last = max(mine, default=(0, None))
        disks, requests = self.hold_base(last) if last else {}, []
        for volume in volumes:
            known = disks.get(volume["device"])
            is_fit = known and known["generation"] and known["size_bytes"] == volume["size_bytes"]
            use = {"bitmap": "use", "generation": known["generation"]} if is_fit else None
            requests.append(use or {"bitmap": "new"})
        return requests

    def hold_base(self, last):
        """The disks to build upon; none if the archive is being removed or its chain is long enough."""
        with contextlib.suppress(Failure, FileNotFoundError):
            held = self.store.hold(last)
            # Read once it is held: before, another one of that name may come.
            manifest = self.store.manifest(last)
            if manifest["chain"] < self.longest_chain:
                self.base, self.base_held = last, held
                return manifest["disks"]
            held.close()
        return {}

    def keep_config(self, params):
        self.manifest["config"], self.manifest["firewall"] = params["config"], params["firewall"]

    def copy_disks(self, request, params):
        self.keep_config(params)
        moved = [self.copy_disk(request, volume) for volume in params["volumes"]]
        return {key: str(sum(disk[key] for disk in moved)) for key in MOVED}

    def copy_disk(self, request, volume):
        device, size = volume["device"], int(volume["size_bytes"])
        if volume["access"]["kind"] != "file" or not NAME.match(device):
            raise Failure("invalid", f"The disk {device} is not offered as a file.")
        is_increment = volume["bitmap_mode"] == "reuse"
        if is_increment and self.base is None:
            raise Failure("invalid", f"The disk {device} is an increment on nothing.")
        disk = {key: volume[key] for key in ("size_bytes", "generation")}
        disk["base"] = self.base if is_increment else None
        self.manifest["disks"][device] = disk
        if is_increment:
            self.manifest["base"] = self.base
            self.manifest["chain"] = self.store.manifest(self.base)["chain"] + 1
        # What a bitmap marks is known before; a full backup reads the whole disk.
        expected = int(volume["dirty_bytes"]) if is_increment else size
        source = Snapshot(volume["access"]["path"])
        stem = os.path.join(self.path, device)
        moved = dict.fromkeys(MOVED, 0)
        try:
            with open(stem + ".data", "wb") as data, open(stem + ".areas", "w+b") as areas:
                data.truncate(size)
                for offset, length, is_zero in regions(request, volume["access"]["regions"], size):
                    areas.write(f"{offset} {length} {'zero' if is_zero else 'data'}\n".encode())
                    moved["total_bytes"] += length
                    if is_zero:
                        moved["zero_bytes"] += length
                        source.release(offset, length)
                    else:
                        self.copy_area(request, device, source, data, offset, length, moved)
                    zero = moved["zero_bytes"]
                    request.progress(device, moved["total_bytes"], expected, zero)
                # Without a part of them a restore would take older data for this one's.
                areas.seek(0)
                disk["areas_sha256"] = hashlib.file_digest(areas, "sha256").hexdigest()
        finally:
            source.close()
        if moved["total_bytes"] != expected:
            text = f"The disk {device} has {moved['total_bytes']} bytes to read, not {expected}."
            raise Failure("corrupt", text)
        request.progress(device, moved["total_bytes"], expected, moved["zero_bytes"], now=True)
        return moved

    def copy_area(self, request, device, source, data, offset, length, moved):
        zeroes, end = bytes(BLOCK_BYTES), offset + length
        while offset < end:
            request.check()
            # One block less than the buffer has: the read may begin within a block.
            count = min(end - offset, PIECE_BYTES - BLOCK_BYTES)
            piece = source.read(offset, count)
            for at in range(0, count, BLOCK_BYTES):
                block = piece[at : at + BLOCK_BYTES]
                if block == zeroes[: len(block)]:
                    moved["zero_bytes"] += len(block)
                elif os.pwrite(data.fileno(), block, offset + at) == len(block):
                    moved["written_bytes"] += len(block)
                else:
                    raise Failure("no_space", f"The disk {device} does not fit into the storage.")
            source.release(offset, count)
            moved["read_bytes"] += count
            offset += count
            done = moved["total_bytes"] - (end - offset)
            request.progress(device, done, moved["total_bytes"], moved["zero_bytes"])

    def copy_files(self, request, params):
        self.keep_config(params)
        path = os.path.join(self.path, "files.tar")
        open(path, "wb").close()
        argv = ["tar", "--create", "--file=-", "--numeric-owner", "--acls", "--xattrs", "--sparse"]
        skips = params.get("skip_unreadable", False)
        argv += ["--directory=" + params["tree"], "--one-file-system", "--null", *["--ignore-failed-read"] * skips]
        argv += ["--no-verbatim-files-from", "--no-unquote", "--files-from=" + params["lists"] + "/selected"]
        command = {"container": params["container"], "argv": argv, "identity": "mapped_root"}
        done = threading.Event()
        threading.Thread(target=watch_file, args=(request, path, done), daemon=True).start()
        try:
            end = request.ask("container.command", {**command, "stdout": path})
        finally:
            done.set()
        if end["exit_code"] != 0:
            raise Failure("io", f"tar ended with {end['exit_code']}: {end['stderr_tail'][-500:]}")
        ignored = left_out(end["stderr_tail"], skips)
        entries, read_bytes = count_entries(request, path)
        if entries == 0:
            raise Failure("corrupt", "The archive has no entries.")
        size = os.stat(path).st_size
        numbers = {"entries": str(entries), "read_bytes": str(read_bytes), "written_bytes": str(size)}
        return {**numbers, "ignored": ignored, "ignored_count": str(len(ignored))}

    def commit(self, ident):
        self.store.commit(ident, self)
        place = self.store.place(self.archive)
        self.close()
        os.unlink(os.path.join(place, "lock"))
        return {"archive": self.archive, "size_bytes": str(size_of(place))}

    def abort(self):
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self):
        self.lock.close()
        if self.base_held:
            self.base_held.close()

def regions(request, handle, size):
    """All areas to read, page by page; an end is only one if the sum is right."""
    offset, reached, total = 0, 0, 0
    while True:
        page = request.ask("regions", {"regions": handle, "offset": str(offset)})
        for region in page["regions"]:
            begin, length = int(region["offset"]), int(region["length_bytes"])
            if length <= 0 or begin < reached or begin + length > size:
                raise Failure("corrupt", f"The area of {length} bytes at {begin} makes no sense.")
            reached, total = begin + length, total + length
            yield begin, length, region["zero"]
        if page["next"] == "end":
            if int(page["total_bytes"]) != total:
                raise Failure("corrupt", "The areas to read do not add up.")
            return
        if int(page["offset"]) <= offset:
            raise Failure("corrupt", "The pages of areas go round in circles.")
        offset = int(page["offset"])

def watch_file(request, path, done):
    while not done.wait(0.5):
        size = os.stat(path).st_size
        request.progress("files", size, size, 0)

def left_out(words, skips):
    """What tar says is not in the archive; it has zeros in the place of what it could not read of a file."""
    if skips and len(words.encode()) > WORDS_BYTES:
        raise Failure("io", "More cannot be read than this store can tell apart from what is read in part.")
    found = []
    for line in words.splitlines():
        entry = LEFT_OUT.match(line)
        if IN_PART.search(line) or entry and entry[2] and not skips:
            raise Failure("io", f"Something cannot be read, or only in part: {line}")
        if entry:
            found.append({"path": entry[1], "why": entry[2] or "a socket"})
    return found

def count_entries(request, path):
    entries, read_bytes = 0, 0
    with tarfile.open(path, "r:") as archive:
        for entry in archive:
            entries, read_bytes = entries + 1, read_bytes + entry.size
            archive.members = []  # else all of them are kept
            if entries % 1000 == 0:
                request.check()
    return entries, read_bytes

# ---- Restores ----------------------------------------------------------------------------------------

class Restore:
    """Keeps an archive and those it builds upon from being removed, and puts disks together."""

    def __init__(self, store, archive, subtype):
        self.store, self.archive = store, archive
        self.manifest = store.manifest(archive)
        if self.manifest["subtype"] != subtype:
            raise Failure("invalid", f"The archive {archive} is of the kind {self.manifest['subtype']}.")
        self.path, self.lock, self.held = None, None, []
        name = archive
        while name:
            self.held.append(store.hold(name))
            name = store.manifest(name)["base"]

    def devices(self):
        disks = self.manifest["disks"].items()
        return [{"device": device, "size_bytes": disk["size_bytes"]} for device, disk in disks]

    def disk(self, request, device):
        if device not in self.manifest["disks"]:
            raise Failure("not_found", f"The archive {self.archive} has no disk {device}.")
        chain, name = [], self.archive
        while name:
            chain.append(name)
            name = self.store.manifest(name)["disks"][device]["base"]
        whole = os.path.join(self.store.place(chain[-1]), device + ".data")
        if len(chain) == 1:
            return {"kind": "path", "path": whole}
        if self.path is None:
            self.path, self.lock = self.store.temporary("restore")
        target = os.path.join(self.path, device)
        with open(target, "w+b") as disk:
            disk.truncate(int(self.manifest["disks"][device]["size_bytes"]))
            for name in reversed(chain):
                digest = self.store.manifest(name)["disks"][device].get("areas_sha256")
                self.apply(request, os.path.join(self.store.place(name), device), digest, disk)
        return {"kind": "path", "path": target}

    def apply(self, request, stem, digest, disk):
        with open(stem + ".data", "rb") as data, open(stem + ".areas", "rb") as areas:
            # Archives of older versions have none.
            if digest and hashlib.file_digest(areas, "sha256").hexdigest() != digest:
                raise Failure("corrupt", f"{stem}.areas is not what was written.")
            areas.seek(0)
            for line in areas:
                offset, length = (int(word) for word in line.split()[:2])
                while length > 0:
                    request.check()
                    # Holes read as zeroes, as do the areas that were zero.
                    piece = os.pread(data.fileno(), min(length, PIECE_BYTES), offset)
                    if not piece:
                        raise Failure("corrupt", f"{stem}.data ends at {offset}, before it should.")
                    if os.pwrite(disk.fileno(), piece, offset) != len(piece):
                        raise Failure("no_space", "A disk does not fit into the storage.")
                    offset, length = offset + len(piece), length - len(piece)

    def drop(self, device):
        if self.path and NAME.match(device):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.path, device))

    def close(self):
        if self.path:
            self.lock.close()
            shutil.rmtree(self.path, ignore_errors=True)
        for held in self.held:
            held.close()

# ---- The methods -------------------------------------------------------------------------------------

class Provider:
    def __init__(self):
        self.store, self.longest_chain = None, 30
        self.handles, self.numbers = {}, itertools.count(1)

    def handle(self, kind, thing):
        name = f"{kind}-{next(self.numbers)}"
        self.handles[name] = thing
        return name

    def methods(self):
        return {name[3:]: getattr(self, name) for name in dir(self) if name.startswith("do_")}

    def do_initialize(self, _request, params):
        if params["api_version"] < 2:
            raise Failure("invalid", "This provider needs version 2 of the contract.")
        able = ("vm_file", "vm_incremental", "vm_restore", "container", "container_restore")
        able += ("notes", "protect", "remove", "log")
        path = {"name": "path", "kind": "path", "required": True, "description": "The directory."}
        chain = {"name": "max-chain", "kind": "number", "description": "Full backup every so often."}
        hello = {"name": "file store", "api_version": 2, "properties": [path, chain]}
        return {**hello, "capabilities": {name: True for name in able}}

    def do_configure(self, _request, params):
        # Secrets, if there are any, are on descriptor 3; this provider declares none.
        os.close(3)
        self.store = Store(params["properties"]["path"])
        self.longest_chain = int(params["properties"].get("max-chain", "30"))

    def do_activate(self, _request, _params):
        os.makedirs(self.store.path, 0o700, exist_ok=True)
        self.store.clean_up()

    def do_status(self, _request, _params):
        os.makedirs(self.store.path, 0o700, exist_ok=True)
        stat = os.statvfs(self.store.path)
        total, free = stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize
        return {"total_bytes": str(total), "used_bytes": str(max(total - free, 0))}

    def do_list(self, _request, params):
        # The cursor is the last name, not a number: what goes meanwhile must not shift the pages.
        after, most = params.get("cursor", ""), 500
        found = self.store.manifests(after) if os.path.isdir(self.store.path) else ()
        page = list(itertools.islice(found, most))
        more = {"next": page[-1][0]} if len(page) == most else {}
        return {"archives": [self.entry(*one) for one in page], **more}

    def entry(self, name, manifest):
        place = self.store.place(name)
        notes = read_text(os.path.join(place, "notes")).strip().split("\n")[0]
        return {
            **{key: manifest[key] for key in ("subtype", "guest_id", "time_s", "base", "commit_id")},
            "name": name,
            "size_bytes": str(size_of(place)),
            "protected": os.path.exists(os.path.join(place, "protected")),
            "notes": notes[:100] or None,
        }

    def file_of(self, params, name):
        self.store.manifest(params["archive"])
        return os.path.join(self.store.place(params["archive"]), name)

    def do_notes(self, _request, params):
        return {"notes": read_text(self.file_of(params, "notes"))}

    def do_set_notes(self, _request, params):
        write_durably(self.file_of(params, "notes"), params["notes"].encode())

    def do_set_protected(self, _request, params):
        path = self.file_of(params, "protected")
        if params["protected"]:
            write_durably(path, b"")
        elif os.path.exists(path):
            os.unlink(path)
            sync_dir(os.path.dirname(path))

    def do_keep_log(self, _request, params):
        with open(params["log_path"], "rb") as log:
            write_durably(self.file_of(params, "log"), log.read())

    def do_kept_log(self, _request, params):
        path = self.file_of(params, "log")
        if os.path.exists(path):
            shutil.copyfile(path, params["log_path"])

    def do_remove(self, _request, params):
        self.store.remove(params["archive"])

    def do_guest_config(self, _request, params):
        manifest = self.store.manifest(params["archive"])
        return {"config": manifest["config"], "firewall": manifest["firewall"]}

    def do_commit_outcome(self, _request, params):
        os.makedirs(self.store.path, 0o700, exist_ok=True)
        return self.store.outcome(params["id"])

    def do_start_job(self, _request, _params):
        return {"job": self.handle("job", None)}

    def do_finish_job(self, _request, params):
        self.handles.pop(params["job"], None)

    def do_start_guest(self, _request, params):
        backup = Backup(self.store, params, self.longest_chain)
        return {"guest": self.handle("guest", backup), "archive_name": backup.archive}

    def do_plan_volumes(self, _request, params):
        return {"requests": self.handles[params["guest"]].plan(params["volumes"])}

    def do_backup_vm(self, request, params):
        return self.handles[params["guest"]].copy_disks(request, params)

    def do_backup_container(self, request, params):
        return self.handles[params["guest"]].copy_files(request, params)

    def do_commit(self, _request, params):
        backup = self.handles.pop(params["guest"])
        try:
            return backup.commit(params["id"])
        except BaseException:
            backup.abort()
            raise

    def do_abort(self, _request, params):
        backup = self.handles.pop(params["guest"], None)
        if backup:
            backup.abort()

    def do_restore_vm(self, _request, params):
        restore = Restore(self.store, params["archive"], "qemu")
        return {"restore": self.handle("restore", restore), "devices": restore.devices()}

    def do_volume_init(self, request, params):
        return self.handles[params["restore"]].disk(request, params["device"])

    def do_volume_cleanup(self, _request, params):
        self.handles[params["restore"]].drop(params["device"])

    def do_restore_container(self, _request, params):
        return {"restore": self.handle("restore", Restore(self.store, params["archive"], "lxc"))}

    def do_container_data(self, _request, params):
        place = self.store.place(self.handles[params["restore"]].archive)
        return {"kind": "tar", "path": os.path.join(place, "files.tar"), "compression": "none"}

    def do_restore_cleanup(self, _request, params):
        restore = self.handles.pop(params["restore"], None)
        if restore:
            restore.close()

if __name__ == "__main__":
    Host().serve(Provider().methods())
