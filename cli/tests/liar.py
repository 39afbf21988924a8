#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# A provider with one archive, and one lie about it, which the file `lie` names.
import base64, json, os, sys, time

def send(message):
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    sys.stdout.flush()

SIZE, store = 1 << 20, {}
CONFIG = b"name: web\nmemory: 128\nscsi0: gone:100/vm-100-disk-0.raw,size=1M\n"

def handle(request, name, params):
    answer = lambda result: send({"id": request["id"], "result": result})
    if name == "initialize":
        wanted = {"name": "path", "kind": "path", "required": True}
        able = {"vm_file": True, "vm_restore": True}
        return answer({"name": "liar", "api_version": 2, "capabilities": able, "properties": [wanted]})
    if name == "configure":
        store["path"] = params["properties"]["path"]
        return answer({})
    path = store["path"]
    lie = open(os.path.join(path, "lie")).read()
    disk = os.path.join(path, "disk")
    if name == "list":
        names = {"huge-name": "a" * 500000, "odd-name": "../a"}
        one = {"name": names.get(lie, "a"), "subtype": "qemu", "guest_id": 100, "time_s": "5", "size_bytes": "7"}
        return answer({"archives": [one] * (2 if lie == "twice" else 1)})
    if name == "guest_config":
        config = {"no-config": b"", "huge-config": b"#" * 700000, "odd-config": b"\xff\x00"}.get(lie, CONFIG)
        return answer({"config": base64.b64encode(config).decode(), "firewall": None})
    if name == "restore_vm":
        device = {"device": "scsi0", "size_bytes": {"huge-size": str(2**64 - 1), "other-size": "4096"}.get(lie, str(SIZE))}
        if lie == "odd-device":
            device["device"] = "../../scsi0"
        if lie == "huge-device":
            device["device"] = "s" * 900000
        if lie == "bad-number":
            device["size_bytes"] = "-1"
        return answer({"restore": "r", "devices": [device] * (100000 if lie == "many" else 2 if lie == "twins" else 1)})
    if name == "volume_init":
        length = {"short": SIZE // 2, "long": SIZE * 2}.get(lie, SIZE)
        with open(disk, "wb") as file:
            file.truncate(length)
        link = os.path.join(path, "link")
        if lie == "link" and not os.path.islink(link):
            os.symlink(disk, link)
        if lie == "endless":
            while True:
                sys.stdout.write("x" * 65536)
        if lie == "other-answer":
            return send({"id": request["id"] + 1, "result": {}})
        if lie == "both":
            answer({"kind": "path", "path": disk})
        if lie == "never":
            return
        if lie == "dies":
            os._exit(7)
        if lie == "socket":
            return answer({"kind": "nbd_unix", "socket": "/run/nobody.sock", "export": "x"})
        place = {"link": link, "relative": "disk", "directory": path, "device": "/dev/zero", "gone": disk + "-not"}
        return answer({"kind": "path", "path": place.get(lie, disk)})
    if name == "status":
        return answer({"total_bytes": "10", "used_bytes": "4"})
    if name is not None and "id" in request:
        answer({})

for line in sys.stdin:
    request = json.loads(line)
    handle(request, request.get("method"), request.get("params"))
