// SPDX-License-Identifier: MIT OR Apache-2.0
//! Plugins that lie, hang, flood and die.

use std::sync::Arc;
use std::time::{Duration, Instant};

use provider_api::{
    Access, BitmapMode, CommitOutcome, Error, GuestInfo, GuestKind, JobInfo, Kind, Provider, Uuid,
    VmBackup, Volume,
};
use provider_rpc::{Direction, LINE_BYTES_MAX, RpcProvider};

use crate::bench::{Bench, Notes, call, region, vm, within_ms};

/// A plugin that answers everything with nothing, but for what `handle` does.
fn plugin(handle: &str) -> String {
    format!(
        r#"#!/usr/bin/env python3
import json, os, sys, threading, time

def send(message):
    sys.stdout.write(json.dumps({{"jsonrpc": "2.0", **message}}) + "\n")
    sys.stdout.flush()

def reply(request, result):
    send({{"id": request["id"], "result": result}})

STATUS = {{"total_bytes": "10", "used_bytes": "4"}}
HELLO = {{"name": "liar", "api_version": 2, "capabilities": {{"vm_file": True, "verify": True}}}}

def handle(request, name, params):
{handle}
    if name == "initialize":
        reply(request, HELLO)
    elif name == "start_job":
        reply(request, {{"job": "j"}})
    elif name == "start_guest":
        reply(request, {{"guest": "g", "archive_name": "a"}})
    elif name == "status":
        reply(request, STATUS)
    elif name is not None and "id" in request:
        reply(request, {{}})

for line in sys.stdin:
    request = json.loads(line)
    handle(request, request.get("method"), request.get("params"))
"#
    )
}

fn bench(handle: &str) -> Bench {
    Bench::with_script(&plugin(handle))
}

/// Starts a plugin that handles one method in its own way.
async fn started(handle: &str) -> (Bench, RpcProvider) {
    let bench = bench(handle);
    let provider = bench.start().await.unwrap();
    (bench, provider)
}

async fn status_error(handle: &str) -> Error {
    let (_bench, provider) = started(handle).await;
    provider.status(&call()).await.unwrap_err()
}

/// Ends the plugins of a bench by SIGKILL.
pub(crate) fn kill(bench: &Bench) {
    for pid in pids(bench) {
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// Our children that run this bench's plugin.
pub(crate) fn pids(bench: &Bench) -> Vec<i32> {
    let own = std::process::id().to_string();
    let is_ours = |status: &str| {
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
        parent.is_some_and(|parent| parent.trim() == own)
    };
    processes(bench.options.program.to_str().unwrap(), is_ours)
}

/// Processes with this word in their command line.
fn processes(word: &str, is_wanted: impl Fn(&str) -> bool) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let read = |file: &str| std::fs::read_to_string(entry.path().join(file));
        let (Ok(line), Ok(status)) = (read("cmdline"), read("status")) else { continue };
        if is_wanted(&status) && line.split('\0').any(|part| part == word) {
            found.push(pid);
        }
    }
    found
}

async fn wait_until(what: &str, limit: Duration, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + limit;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}: not within {limit:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_plugin_of_version_1_works() {
    let (bench, provider) = started(
        r#"
    if name == "initialize":
        able = {"vm_nbd": True, "vm_restore": True, "vm_incremental": False}
        return reply(request, {"name": "old", "api_version": 1, "capabilities": able})
    if name == "list":
        one = {"name": "a", "subtype": "qemu", "guest_id": 100, "time_s": "5", "size_bytes": "7"}
        return reply(request, {"archives": [one]})
    if name == "backup_vm":
        keys = ("total_bytes", "read_bytes", "zero_bytes", "written_bytes")
        return reply(request, {key: "1" for key in keys})"#,
    )
    .await;
    let able = provider.describe().capabilities;
    assert!(able.vm_nbd && !able.vm_file && !able.container && !able.notes && !able.log);
    assert!(provider.properties().is_empty());
    let archive = provider.list(&call()).await.unwrap().remove(0);
    assert_eq!((archive.time_s, archive.size_bytes, archive.base), (5, 7, None));
    let mut job = provider.start_job(JobInfo { start_time_s: 0 }, &call()).await.unwrap();
    let mut backup = job.start_guest(guest(), &call()).await.unwrap();
    let access = Access::Nbd { socket: "/s".into(), export: "e".into(), bitmap: None };
    let volume = Volume {
        device: "scsi0".into(),
        size_bytes: u64::MAX,
        access,
        bitmap_mode: BitmapMode::None,
        bitmap_action: "not-used".into(),
        generation: None,
        dirty_bytes: None,
    };
    let backup_vm = VmBackup { config: Vec::new(), firewall: None, volumes: vec![volume] };
    let moved = backup.backup_vm(backup_vm, &Notes::default(), &call()).await.unwrap();
    assert_eq!(moved.total_bytes, 1);
    let messages = bench.messages.lock().unwrap();
    let sent = |text: &str| {
        messages.iter().any(|(to, line)| *to == Direction::ToPlugin && line.contains(text))
    };
    assert!(sent("\"size_bytes\":\"18446744073709551615\"") && sent("\"export\":\"e\""));
    assert!(sent("\"timeout_ms\":\""), "no deadline was told");
}

fn guest() -> GuestInfo {
    GuestInfo { kind: GuestKind::Qemu, id: 100, name: None, start_time_s: 0 }
}

#[tokio::test]
async fn versions_that_cannot_work_are_refused_and_nothing_is_left() {
    for version in [0, 99] {
        let bench = bench(&format!(
            "    if name == 'initialize':\n        return reply(request, {{**HELLO, 'api_version': {version}}})"
        ));
        let error = bench.start().await.err().unwrap().to_string();
        assert!(error.contains(&format!("version {version} of the contract")), "{error}");
        wait_until("the process ends", Duration::from_secs(8), || pids(&bench).is_empty()).await;
    }
}

#[tokio::test]
async fn what_is_no_answer_ends_the_process_with_an_error_that_quotes_it() {
    for (handle, fault) in [
        ("print('hello there', flush=True)", "no message of the protocol: hello there"),
        ("print('{\"id\": 1}', flush=True)", "no message of the protocol"),
        (
            "print('{\"jsonrpc\": \"1.0\", \"id\": 3, \"result\": 1}', flush=True)",
            "not of JSON-RPC 2.0",
        ),
        ("send({'id': 3})", "neither request nor reply"),
        ("send({'id': 4711, 'result': {}})", "the request 4711, which was not asked"),
        ("send({'id': 'three', 'result': {}})", "the request \"three\", which was not asked"),
        (
            "send({'error': {'code': -32700, 'message': 'what?'}})",
            "did not understand a message: what?",
        ),
        ("send({'id': [1], 'method': 'regions'})", "an impossible id"),
        ("sys.stdout.write('x' * 3000000)", "a line of more than 1048576 bytes: xxx"),
        (
            "\n        while True: sys.stdout.write('y' * 65536)",
            "a line of more than 1048576 bytes: yyy",
        ),
        ("os.close(1); time.sleep(9)", "has closed its standard output"),
        ("os._exit(3)", "has ended (exit status: 3)"),
        (
            "os.write(1, b'{\"jsonrpc\": '); os._exit(3)",
            "(exit status: 3) in the middle of the line '{\"jsonrpc\":",
        ),
        ("os.write(2, b'half a word'); os._exit(3)", "said: half a word"),
        // What it started has its standard output.
        ("os.fork() and os._exit(3) or time.sleep(99)", "has ended (exit status: 3)"),
        ("sys.exit('error: the disk is on fire')", "said: the disk is on fire"),
    ] {
        let error = status_error(&format!("    if name == 'status': {handle}\n")).await;
        assert!(error.to_string().contains(fault), "{handle}: {error}");
        assert_eq!(error.kind, Kind::Io, "{handle}");
    }
}

#[tokio::test]
async fn a_second_answer_ends_the_process() {
    let (bench, provider) = started(
        "    if name == 'status':\n        reply(request, STATUS)\n        return reply(request, STATUS)",
    )
    .await;
    provider.status(&call()).await.unwrap();
    wait_until("the process ends", Duration::from_secs(8), || pids(&bench).is_empty()).await;
}

#[tokio::test]
async fn answers_that_make_no_sense_name_the_method() {
    for (result, fault) in [
        ("{}", "missing field `total_bytes`"),
        (
            "{'total_bytes': 10, 'used_bytes': 4}",
            "'total_bytes': invalid type: integer `10`, expected a text of decimal digits",
        ),
        ("{'total_bytes': '-1', 'used_bytes': '4'}", "no decimal number of 64 bits"),
        ("None", "invalid type: null, expected an object"),
    ] {
        let handle = format!("    if name == 'status': return reply(request, {result})");
        let error = status_error(&handle).await.to_string();
        let named = "answers 'status' with something that makes no sense";
        assert!(error.contains(named) && error.contains(fault), "{error}");
    }
    let (_bench, provider) = started(
        "    if name == 'guest_config': return reply(request, {'config': '!', 'firewall': None})",
    )
    .await;
    let error = provider.guest_config("a", &call()).await.unwrap_err().to_string();
    assert!(error.contains("'config': the text is no Base64"), "{error}");
    assert!(error.ends_with(", offset 0."), "one full stop: {error}");
}

#[tokio::test]
async fn errors_keep_their_kind() {
    let (_bench, provider) = started(
        r#"
    if name == "remove":
        data = {"kind": "has_dependents", "dependents": ["b"]}
        return send({"id": request["id"], "error": {"code": -32000, "message": "No!\x1b", "data": data}})
    if name == "status":
        return send({"id": request["id"], "error": {"code": -32601, "message": "what"}})"#,
    )
    .await;
    let error = provider.remove("a", &call()).await.unwrap_err();
    assert_eq!((error.kind, error.message.as_str()), (Kind::HasDependents, "No! "));
    assert_eq!(error.dependents, ["b"]);
    let error = provider.status(&call()).await.unwrap_err();
    assert!(error.to_string().contains("does not know 'status'"), "{error}");
}

#[tokio::test]
async fn answers_may_come_in_any_order() {
    let (_bench, provider) = started(
        r#"
    global held
    if name == "notes" and params["archive"] == "first":
        held = request
        return
    if name == "notes":
        reply(request, {"notes": "of " + params["archive"]})
        return reply(held, {"notes": "of first"})"#,
    )
    .await;
    let call = call();
    let (first, second) =
        tokio::join!(provider.notes("first", &call), provider.notes("second", &call));
    assert_eq!((first.unwrap().as_str(), second.unwrap().as_str()), ("of first", "of second"));
}

#[tokio::test]
async fn a_call_that_is_never_answered_ends_in_time_and_disturbs_no_other() {
    let (_bench, provider) = started("    if name in ('list', 'notes'): return").await;
    let begun = Instant::now();
    let error = provider.list(&within_ms(300)).await.unwrap_err();
    assert_eq!(error.kind, Kind::Cancelled);
    assert!(error.to_string().contains("did not answer 'list' in time"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(provider.status(&call()).await.unwrap().used_bytes, 4);
    // More requests than a plugin may have at once: the others wait, but not longer than they may.
    let late = within_ms(1500);
    let all = (0..200).map(|_| provider.notes("a", &late));
    let results = futures_util::future::join_all(all).await;
    assert!(results.into_iter().all(|result| result.unwrap_err().kind == Kind::Cancelled));
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_cancelled_call_is_told_and_what_it_began_is_given_back() {
    let (bench, provider) = started(
        r#"
    global held
    if name == "start_job":
        held = request
        return
    if name == "$/cancel":
        assert params["id"] == held["id"]
        return reply(held, {"job": "late"})"#,
    )
    .await;
    let call = call();
    let cancel = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        call.cancel.cancel();
    };
    let job = provider.start_job(JobInfo { start_time_s: 0 }, &call);
    let (job, ()) = tokio::join!(job, cancel);
    // It was answered although it was cancelled: then it counts.
    assert!(job.is_ok());

    let job = provider.start_job(JobInfo { start_time_s: 0 }, &within_ms(200)).await;
    assert_eq!(job.err().unwrap().kind, Kind::Cancelled);
    wait_until("the late job is finished", Duration::from_secs(5), || {
        let messages = bench.messages.lock().unwrap();
        messages.iter().any(|(_, l)| l.contains("finish_job") && l.contains("\"late\""))
    })
    .await;
}

#[tokio::test]
async fn a_plugin_that_does_not_read_costs_no_memory_and_no_time() {
    let (_bench, provider) = started("    if name == 'activate': time.sleep(60)").await;
    let short = within_ms(1000);
    let notes = "x".repeat(60 << 10);
    let begun = Instant::now();
    let stuck = provider.activate(&short);
    let all = (0..100).map(|_| provider.set_notes("a", &notes, &short));
    let (first, others) = tokio::join!(stuck, futures_util::future::join_all(all));
    assert_eq!(first.unwrap_err().kind, Kind::Cancelled);
    assert!(others.into_iter().all(|result| result.unwrap_err().kind == Kind::Cancelled));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn what_is_too_long_is_not_sent() {
    let (_bench, provider) = started("    pass").await;
    let notes = "x".repeat(LINE_BYTES_MAX);
    let error = provider.set_notes("a", &notes, &call()).await.unwrap_err();
    assert!(error.to_string().contains("bytes at once"), "{error}");
    provider.status(&call()).await.unwrap();
}

#[tokio::test]
async fn endless_words_on_standard_error_hold_nothing_up() {
    let (_bench, provider) = started(
        r#"
    if name == "activate":
        def flood():
            for _ in range(400):
                os.write(2, b"warning: x\n" * 1000 + b"y" * 100000)
        threading.Thread(target=flood).start()
        return reply(request, {})"#,
    )
    .await;
    provider.activate(&call()).await.unwrap();
    for _ in 0..20 {
        assert_eq!(provider.status(&within_ms(5000)).await.unwrap().used_bytes, 4);
    }
}

#[tokio::test]
async fn lists_that_never_end_are_cut() {
    let (_bench, provider) = started(
        r#"
    if name == "list":
        return reply(request, {"archives": [], "next": "same"})
    if name == "unreadable":
        n = int(params.get("cursor", "0")) + 1
        return reply(request, {"archives": ["a"] * 1000, "next": str(n)})"#,
    )
    .await;
    let (_bench, with_long_names) = started(
        r#"
    if name == "unreadable":
        n = int(params.get("cursor", "0")) + 1
        return reply(request, {"archives": ["a" * 1000000], "next": str(n)})"#,
    )
    .await;
    let error = with_long_names.unreadable(&call()).await.unwrap_err().to_string();
    assert!(error.contains("more than 67108864 bytes"), "{error}");
    let error = provider.list(&call()).await.unwrap_err().to_string();
    assert!(error.contains("pages that go round in circles"), "{error}");
    assert!(error.contains("of the storage '"), "{error}");
    let error = provider.unreadable(&call()).await.unwrap_err().to_string();
    assert!(error.contains("more than 100000 archives"), "{error}");
}

#[tokio::test]
async fn only_a_method_that_is_not_there_lists_nothing() {
    for (code, is_error) in [(-32601, false), (-32000, true)] {
        let (_bench, provider) = started(&format!(
            r#"
    if name == "unreadable":
        error = {{"code": {code}, "message": "no", "data": {{"kind": "invalid"}}}}
        return send({{"id": request["id"], "error": error}})"#
        ))
        .await;
        let answer = provider.unreadable(&call()).await;
        assert_eq!(answer.is_err(), is_error, "{answer:?}");
        assert!(is_error || answer.unwrap().is_empty());
    }
}

/// A plugin that dies in `commit`, before or after it is durable, and knows that in its next life.
#[tokio::test]
async fn a_plugin_that_dies_is_started_again_and_asked_what_became_of_the_commit() {
    let (bench, provider) = started(
        r#"
    record = os.path.join(os.path.dirname(os.path.abspath(__file__)), "record")
    if name == "commit":
        open(record, "w").write(params["id"])
        os._exit(9)
    if name == "commit_outcome":
        known = os.path.exists(record) and open(record).read() == params["id"]
        return reply(request, {"outcome": "committed", "archive": "a"} if known else {"outcome": "not_committed"})"#,
    )
    .await;
    let mut job = provider.start_job(JobInfo { start_time_s: 0 }, &call()).await.unwrap();
    let first = job.start_guest(guest(), &call()).await.unwrap();
    let other = job.start_guest(guest(), &call()).await.unwrap();
    let id = Uuid::new_v4();
    let error = first.commit(id, &call()).await.unwrap_err();
    assert!(error.to_string().contains("has ended (exit status: 9)"), "{error}");
    let outcome = provider.commit_outcome(id, &call()).await.unwrap();
    assert_eq!(outcome, CommitOutcome::Committed { archive: "a".into() });
    let outcome = provider.commit_outcome(Uuid::new_v4(), &call()).await.unwrap();
    assert_eq!(outcome, CommitOutcome::NotCommitted);
    // The other guest's process is dead: its backup fails, is given up, and the next one works.
    assert!(other.commit(Uuid::new_v4(), &call()).await.is_err());
    let next = job.start_guest(guest(), &call()).await.unwrap();
    next.abort("a test", &call()).await.unwrap();
    let hellos = bench.messages.lock().unwrap();
    let hellos = hellos.iter().filter(|(_, l)| l.contains("\"initialize\"")).count();
    assert_eq!(hellos, 2);
}

#[tokio::test]
async fn a_plugin_that_always_dies_is_not_started_for_ever() {
    let (_bench, provider) = started("    if name == 'status': os._exit(1)").await;
    for _ in 0..5 {
        let error = provider.status(&call()).await.unwrap_err().to_string();
        assert!(error.contains("has ended"), "{error}");
    }
    let error = provider.status(&call()).await.unwrap_err().to_string();
    assert!(error.contains("5 times within a minute"), "{error}");
}

#[tokio::test]
async fn a_plugin_that_reads_no_more_is_started_again() {
    let (bench, provider) = started(
        r#"
    if name == "activate":
        os.close(0)
        reply(request, {})
        time.sleep(60)"#,
    )
    .await;
    provider.activate(&call()).await.unwrap();
    let error = provider.status(&call()).await.unwrap_err();
    assert!(error.to_string().contains("has closed its standard input"), "{error}");
    assert_eq!(error.kind, Kind::Io);
    assert_eq!(provider.status(&call()).await.unwrap().used_bytes, 4);
    wait_until("the first ends", Duration::from_secs(8), || pids(&bench).len() == 1).await;
}

#[tokio::test]
async fn properties_and_secrets_arrive() {
    let mut bench = bench(
        r#"
    if name == "initialize":
        path = {"name": "path", "kind": "path", "required": True}
        key = {"name": "key", "kind": "text", "required": True, "sensitive": True}
        return reply(request, {**HELLO, "properties": [path, key]})
    if name == "configure":
        global seen
        seen = json.dumps([params["properties"], json.loads(os.fdopen(3).read())])
    if name == "notes":
        return reply(request, {"notes": seen})"#,
    );
    bench.options.properties = vec![("path".into(), "/x".into())];
    let error = bench.start().await.err().unwrap().to_string();
    assert!(error.contains("needs the property 'key' in /"), "{error}");
    std::fs::write(&bench.options.secrets_path, "key: hush\n").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(&bench.options.secrets_path, mode).unwrap();
    let provider = bench.start().await.unwrap();
    assert_eq!(provider.properties().len(), 2);
    let seen = provider.notes("a", &call()).await.unwrap();
    assert_eq!(seen, r#"[{"path": "/x"}, {"key": "hush"}]"#);
    let messages = bench.messages.lock().unwrap();
    assert!(!messages.iter().any(|(to, l)| *to == Direction::ToPlugin && l.contains("hush")));
}

#[tokio::test]
async fn the_host_s_side_answers_what_it_cannot_do() {
    let (_bench, provider) = started(
        r#"
    global answers
    if name == "backup_vm":
        answers, done = [], request
        handle = params["volumes"][0]["access"]["regions"]
        send({"method": "log", "params": {"request": request["id"], "level": "warning", "line": "a"}})
        send({"id": "a", "method": "made.up", "params": {}})
        send({"id": "b", "method": "regions", "params": {"regions": "nothing", "offset": "0"}})
        send({"id": "c", "method": "regions", "params": {"regions": handle, "offset": 0}})
        send({"id": "d", "method": "container.command", "params": {"container": handle, "argv": ["x"], "identity": "reader"}})
        send({"id": "e", "method": "regions", "params": {"regions": handle, "offset": "0"}})
        got = {}
        while len(got) < 5:
            answer = json.loads(sys.stdin.readline())
            got[answer["id"]] = answer
        assert [got[i]["error"]["code"] for i in "abcd"] == [-32601, -32602, -32602, -32602], got
        page = got["e"]["result"]
        assert page["next"] == "end" and page["total_bytes"] == "512", page
        # Out of the call, the regions are gone.
        reply(request, {key: "512" for key in ("total_bytes", "read_bytes", "zero_bytes", "written_bytes")})
        time.sleep(0.2)
        send({"id": "z", "method": "regions", "params": {"regions": handle, "offset": "0"}})
        answer = json.loads(sys.stdin.readline())
        while answer["id"] != "z":
            handle_later = answer
            answer = json.loads(sys.stdin.readline())
        assert answer["error"]["code"] == -32602, answer
        return reply(handle_later, STATUS)"#,
    )
    .await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, [1; 512]).unwrap();
    let mut job = provider.start_job(JobInfo { start_time_s: 0 }, &call()).await.unwrap();
    let mut backup = job.start_guest(guest(), &call()).await.unwrap();
    let vm = vm(&path, vec![region(0, 512, false)], BitmapMode::New, "g");
    let notes = Notes::default();
    let moved = backup.backup_vm(vm, &notes, &call()).await.unwrap();
    assert_eq!(moved.read_bytes, 512);
    assert_eq!(*notes.0.lock().unwrap(), ["warning: a"]);
    // It answers further requests only if all its asserts held.
    provider.status(&call()).await.unwrap();
}

#[tokio::test]
async fn too_many_questions_of_a_plugin_are_refused() {
    let (bench, provider) = started(
        r#"
    if name == "activate":
        for n in range(5000):
            send({"id": f"q{n}", "method": "container.command", "params": {}})
        return reply(request, {})
    if name is None:
        return"#,
    )
    .await;
    let answered = provider.activate(&call()).await;
    // Either it reads its answers fast enough, or it is ended; in no case it is left hanging.
    if let Err(error) = answered {
        assert!(error.to_string().contains("more than 16 requests"), "{error}");
        wait_until("the process ends", Duration::from_secs(8), || pids(&bench).is_empty()).await;
    }
}

/// A plugin that ignores the end of its input, with a child that does, too, and one in a session of its own.
const STUBBORN: &str = r#"
    if name == "configure":
        import subprocess
        endless = ["/bin/sh", "-c", "while true; do sleep 1; done", os.path.abspath(__file__)]
        subprocess.Popen(endless)
        subprocess.Popen(endless, start_new_session=True)
        reply(request, {})
        while True: time.sleep(1)"#;

#[tokio::test]
async fn a_dropped_provider_leaves_nothing() {
    let (bench, provider) = started(STUBBORN).await;
    let word = bench.options.program.to_str().unwrap();
    wait_until("all are up", Duration::from_secs(5), || processes(word, |_| true).len() == 3).await;
    drop(provider);
    wait_until("all end", Duration::from_secs(15), || processes(word, |_| true).is_empty()).await;
}

const HOLD: &str = "TEST_HOLD_PLUGIN";

#[test]
fn a_host_that_is_killed_leaves_nothing() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    if let Some(program) = std::env::var_os(HOLD) {
        // In the process that is going to be killed.
        runtime.block_on(async {
            let bench = Bench::with_program(tempfile::tempdir().unwrap(), program.into());
            let _provider = Arc::new(bench.start().await.unwrap());
            std::future::pending::<()>().await;
        });
    }
    let bench = bench(STUBBORN);
    let word = bench.options.program.to_str().unwrap();
    let mut host = std::process::Command::new(std::env::current_exe().unwrap());
    host.args(["--exact", "faults::a_host_that_is_killed_leaves_nothing", "--nocapture"]);
    let mut host = host.env(HOLD, word).spawn().unwrap();
    runtime.block_on(async {
        let count = || processes(word, |_| true).len();
        wait_until("the plugin is up", Duration::from_secs(20), || count() == 3).await;
        host.kill().unwrap();
        host.wait().unwrap();
        wait_until("all end", Duration::from_secs(15), || count() == 0).await;
    });
}
