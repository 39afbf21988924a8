// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sessions against a scripted peer.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support;

use std::{
    io::{Read as _, Seek as _, Write as _},
    time::Duration,
};

use qmp_client::{
    Error, EventItem, Options, Session,
    commands::{AddFd, GetFd, QueryStatus, Quit, RunState, Stop},
};
use serde_json::{Value, json};
use support::{Peer, greeting, pair, pair_with, short, soon};
use tokio::net::{TcpListener, UnixListener, UnixStream};

const SHORT: Duration = Duration::from_millis(50);

/// Connects to a peer that says `first` and waits for the outcome.
async fn meet(first: &[u8]) -> Result<Session, Error> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut peer = Peer::new(theirs);
    peer.send_raw(first).await;
    soon(Session::from_stream(ours, short())).await
}

fn lines(messages: &[Value]) -> Vec<u8> {
    messages.iter().map(|message| format!("{message}\r\n")).collect::<String>().into_bytes()
}

#[tokio::test]
async fn the_greeting_tells_the_version_whatever_else_it_holds() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut peer = Peer::new(theirs);
    let mut message = greeting();
    message["QMP"]["capabilities"] = json!(["oob", {"future": 1}]);
    message["future"] = json!([]);
    let script = async {
        peer.send_raw(b"\r\n").await;
        // A monitor sends to the next client what an earlier one did not wait for.
        peer.send(json!({"return": {"existed": true}, "id": "qc-0000000000000000-7"})).await;
        peer.send(json!({"error": {"class": "GenericError", "desc": "no"}})).await;
        peer.send(message).await;
        let command = peer.read().await;
        peer.send(json!({"return": {}, "id": 0})).await;
        peer.send(json!({"return": {}, "id": "qc-0000000000000000-0"})).await;
        peer.send(json!({"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 2}})).await;
        peer.reply(&command, json!({})).await;
        peer.serve(json!({"running": true, "status": "running"})).await
    };
    let client = async {
        let session = Session::from_stream(ours, Options::default()).await.unwrap();
        let status = session.execute(QueryStatus).await.unwrap();
        (session, status)
    };
    let ((session, status), command) = soon(async { tokio::join!(client, script) }).await;
    assert_eq!(session.version().to_string(), "10.0.13");
    assert_eq!(session.version().package, "test");
    assert_eq!((status.running, status.status), (true, RunState::Running));
    assert_eq!(command["execute"], "query-status");
    assert!(command.get("arguments").is_none());
}

#[tokio::test]
async fn a_peer_that_is_not_qemu_is_named_at_once() {
    let long = [b'{'; 100_000];
    let cases: [&[u8]; 6] = [
        b"NBDMAGICIHAVEOPT\0\x03",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"{\"hello\": 1}\n",
        b"{\n    \"QMP\": {",
        b"[]\n",
        &long,
    ];
    for first in cases {
        let error = meet(first).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::NotQemu { .. }), "{text}");
        assert!(text.contains("is not a QMP monitor"), "{text}");
        assert!(!text.contains(char::is_control), "{text}");
    }
}

#[tokio::test]
async fn a_peer_that_closes_without_greeting_is_not_qemu() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    let error = soon(Session::from_stream(ours, short())).await.unwrap_err();
    assert!(matches!(error, Error::NotQemu { .. }), "{error}");
}

#[tokio::test]
async fn a_monitor_that_serves_another_client_is_busy() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let error = soon(Session::connect(&path, short())).await.unwrap_err();
    assert!(matches!(error, Error::Busy { after_ms: 100, .. }), "{error}");
    assert!(error.to_string().contains("another program"), "{error}");

    // With a full queue of connections it is busy, too, not "resource temporarily unavailable".
    rustix::net::listen(&listener, 0).unwrap();
    let mut waiting = Vec::new();
    while let Ok(stream) = UnixStream::connect(&path).await {
        waiting.push(stream);
    }
    let error = soon(Session::connect(&path, short())).await.unwrap_err();
    assert!(matches!(error, Error::Busy { .. }), "{error}");
}

#[tokio::test]
async fn a_monitor_that_hangs_up_once_is_called_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let script = async {
        for _ in 0..2 {
            drop(listener.accept().await.unwrap());
        }
        let mut peer = Peer::new(listener.accept().await.unwrap().0);
        peer.greet().await;
        peer
    };
    let connect = Session::connect(&path, Options::default());
    let (session, _peer) = soon(async { tokio::join!(connect, script) }).await;
    session.unwrap();

    // But not for ever.
    let script = async {
        loop {
            drop(listener.accept().await.unwrap());
        }
    };
    let error = tokio::select! {
        result = soon(Session::connect(&path, Options::default())) => result.unwrap_err(),
        () = script => panic!("the script ended"),
    };
    assert!(matches!(error, Error::NotQemu { .. }), "{error}");
}

#[tokio::test]
async fn quitting_needs_no_reply() {
    let (session, mut peer) = pair().await;
    let script = async {
        peer.read().await;
        drop(peer);
    };
    let (result, ()) = tokio::join!(session.quit(), script);
    result.unwrap();
}

#[tokio::test]
async fn a_missing_socket_is_named() {
    let error = Session::connect("/nonexistent/qmp", Options::default()).await.unwrap_err();
    assert!(matches!(error, Error::Connect { .. }));
    assert!(error.to_string().contains("/nonexistent/qmp"), "{error}");
}

#[tokio::test]
async fn a_refused_negotiation_is_an_error_of_qemu() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut peer = Peer::new(theirs);
    let script = async {
        peer.send(greeting()).await;
        let command = peer.read().await;
        peer.fail(&command, "CommandNotFound", "no").await;
    };
    let (session, ()) = tokio::join!(Session::from_stream(ours, short()), script);
    let error = session.unwrap_err();
    assert!(matches!(&error, Error::Qmp { command, .. } if command == "qmp_capabilities"));
}

#[tokio::test]
async fn tcp_works_but_passes_no_descriptors() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let script = async {
        use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = BufReader::new(stream);
        stream.write_all(&lines(&[greeting()])).await.unwrap();
        let mut line = String::new();
        stream.read_line(&mut line).await.unwrap();
        let command: Value = serde_json::from_str(&line).unwrap();
        let reply = json!({"return": {}, "id": command["id"]});
        stream.write_all(&lines(&[reply])).await.unwrap();
        stream
    };
    let connect = Session::connect_tcp(address, Options::default());
    let (session, _stream) = soon(async { tokio::join!(connect, script) }).await;
    let file = tempfile::tempfile().unwrap();
    let error = session.unwrap().execute_with_fd(AddFd::default(), file.into()).await.unwrap_err();
    assert!(matches!(error, Error::Protocol { .. }), "{error}");
}

#[tokio::test]
async fn replies_out_of_order_reach_their_commands() {
    let (session, mut peer) = pair().await;
    let script = async {
        let (first, second) = (peer.read().await, peer.read().await);
        assert_ne!(first["id"], second["id"]);
        for command in [second, first] {
            let name = command["execute"].clone();
            peer.reply(&command, name).await;
        }
    };
    let calls = async {
        let first = session.execute_raw("first", Value::Null, None);
        let second = session.execute_raw("second", Value::Null, None);
        tokio::join!(first, second)
    };
    let ((first, second), ()) = tokio::join!(calls, script);
    assert_eq!((first.unwrap(), second.unwrap()), (json!("first"), json!("second")));
}

#[tokio::test]
async fn many_commands_run_at_once() {
    let (session, mut peer) = pair().await;
    let calls: Vec<_> = (0..500)
        .map(|number| {
            let session = session.clone();
            tokio::spawn(async move {
                session.execute_raw("echo", json!({"number": number}), None).await
            })
        })
        .collect();
    for _ in 0..500 {
        let command = peer.read().await;
        peer.reply(&command, command["arguments"]["number"].clone()).await;
    }
    for (number, call) in calls.into_iter().enumerate() {
        assert_eq!(soon(call).await.unwrap().unwrap(), json!(number));
    }
}

#[tokio::test]
async fn foreign_replies_and_bad_lines_do_not_disturb() {
    let (session, mut peer) = pair().await;
    let script = async {
        let command = peer.read().await;
        peer.send(json!({"return": "foreign", "id": 1})).await;
        peer.send(json!({"return": "foreign", "id": "qc-0123456789abcdef-1"})).await;
        peer.send(json!({"return": "nobody's"})).await;
        peer.send(json!({"error": {"class": "GenericError", "desc": "x"}})).await;
        peer.send_raw(b"\n}{ not json \xff\xfe\n[]\nnull\n").await;
        peer.send(greeting()).await;
        peer.reply(&command, json!("ours")).await;
    };
    let (result, ()) = tokio::join!(session.execute_raw("x", Value::Null, None), script);
    assert_eq!(result.unwrap(), "ours");
}

#[tokio::test]
async fn a_stream_of_garbage_is_given_up() {
    let (session, mut peer) = pair().await;
    peer.send_raw(&b"garbage\n".repeat(200)).await;
    soon(session.closed()).await;
    assert!(matches!(session.execute(Stop).await, Err(Error::Disconnected)));
}

#[tokio::test]
async fn a_late_reply_never_reaches_a_later_command() {
    let (session, mut peer) = pair().await;
    let error = session.execute_raw("slow", Value::Null, Some(SHORT)).await.unwrap_err();
    assert!(matches!(&error, Error::Timeout { command, after_ms: 50 } if command == "slow"));
    let slow = peer.read().await;
    let script = async {
        let next = peer.read().await;
        peer.reply(&slow, json!("late")).await;
        peer.reply(&next, json!("next")).await;
    };
    let (result, ()) = tokio::join!(session.execute_raw("next", Value::Null, None), script);
    assert_eq!(result.unwrap(), "next");
}

#[tokio::test]
async fn a_reply_in_single_bytes_is_read() {
    let (session, mut peer) = pair().await;
    let script = async {
        let command = peer.read().await;
        let reply = json!({"return": "übung", "id": command["id"]});
        for byte in lines(&[reply]) {
            peer.send_raw(&[byte]).await;
            tokio::task::yield_now().await;
        }
    };
    let (result, ()) = tokio::join!(session.execute_raw("x", Value::Null, None), script);
    assert_eq!(result.unwrap(), "übung");
}

#[tokio::test]
async fn an_oversize_reply_fails_its_command_and_no_other() {
    let (session, mut peer) =
        pair_with(Options { max_line_bytes: 10_000, ..Options::default() }).await;
    let script = async {
        let (first, last) = (peer.read().await, peer.read().await);
        let text = "x".repeat(300_000);
        // QEMU gives its members no certain order.
        let id_first = format!("{{\"id\": {}, \"return\": \"{text}\"}}\n", first["id"]);
        let id_last = format!("{{\"return\": \"{text}\", \"id\": {}}}\n", last["id"]);
        peer.send_raw(id_first.as_bytes()).await;
        peer.send_raw(id_last.as_bytes()).await;
        peer.serve(json!("small")).await;
    };
    let calls = async {
        let first = session.execute_raw("large", Value::Null, None);
        let last = session.execute_raw("large", Value::Null, None);
        let (first, last) = tokio::join!(first, last);
        for result in [first, last] {
            let error = result.unwrap_err();
            assert!(matches!(&error, Error::Protocol { context, .. } if context == "large"));
        }
        session.execute_raw("small", Value::Null, None).await
    };
    let (small, ()) = soon(async { tokio::join!(calls, script) }).await;
    assert_eq!(small.unwrap(), "small");
}

#[tokio::test]
async fn when_the_peer_goes_all_pending_commands_fail_at_once() {
    let (session, mut peer) = pair().await;
    let mut events = session.events();
    let calls: Vec<_> = (0..3)
        .map(|_| {
            let session = session.clone();
            tokio::spawn(async move { session.execute(QueryStatus).await })
        })
        .collect();
    for _ in 0..3 {
        peer.read().await;
    }
    peer.send_raw(b"{\"return\": ").await;
    drop(peer);
    for call in calls {
        assert!(matches!(soon(call).await.unwrap(), Err(Error::Disconnected)));
    }
    soon(session.closed()).await;
    assert!(session.is_closed());
    assert_eq!(soon(events.next()).await, None);
    assert_eq!(soon(session.events().next()).await, None);
    assert!(matches!(session.execute(Quit).await, Err(Error::Disconnected)));
}

#[tokio::test]
async fn the_connection_closes_with_the_last_session() {
    let (session, mut peer) = pair().await;
    let clone = session.clone();
    drop(session);
    let (result, _) = tokio::join!(clone.execute(Stop), peer.serve(json!({})));
    result.unwrap();
    drop(clone);
    assert_eq!(peer.try_read().await, None);
}

/// Fills the socket so that the writer waits; returns what the peer has to read first.
async fn block_writer(session: &Session) {
    let big = json!({"x": "y".repeat(2 << 20)});
    let _ = session.execute_raw("big", big, Some(SHORT)).await;
}

#[tokio::test]
async fn a_command_cancelled_before_it_was_written_is_not_sent() {
    let (session, mut peer) = pair().await;
    block_writer(&session).await;
    let error = session.execute_raw("unwanted", Value::Null, Some(SHORT)).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    let script = async {
        assert_eq!(peer.read().await["execute"], "big");
        peer.serve(json!("ok")).await
    };
    let (result, command) = tokio::join!(session.execute_raw("wanted", Value::Null, None), script);
    assert_eq!((result.unwrap(), &command["execute"]), (json!("ok"), &json!("wanted")));
}

#[tokio::test]
async fn dropping_a_session_while_the_peer_reads_nothing_ends() {
    let (session, peer) = pair().await;
    block_writer(&session).await;
    let mut events = session.events();
    drop(session);
    assert_eq!(soon(events.next()).await, None);
    drop(peer);
}

#[tokio::test]
async fn qemus_errors_keep_class_and_sentence() {
    let (session, mut peer) = pair().await;
    let script = async {
        let command = peer.read().await;
        peer.fail(&command, "DeviceNotFound", "Cannot find device='x'").await;
        let command = peer.read().await;
        peer.fail(&command, "FutureClass", "y").await;
    };
    let calls = async {
        let first = session.execute(Stop).await.unwrap_err();
        (first, session.execute(Stop).await.unwrap_err())
    };
    let ((first, second), ()) = tokio::join!(calls, script);
    assert!(first.is_device_not_found());
    assert_eq!(first.to_string(), "stop failed: Cannot find device='x'");
    assert!(matches!(second, Error::Qmp { class, .. } if class == "FutureClass"));
}

#[tokio::test]
async fn a_result_of_another_form_is_a_protocol_error() {
    let (session, mut peer) = pair().await;
    let (result, _) =
        tokio::join!(session.execute(QueryStatus), peer.serve(json!({"running": "perhaps"})));
    let error = result.unwrap_err();
    assert!(matches!(&error, Error::Protocol { context, .. } if context == "query-status"));
}

#[tokio::test]
async fn arguments_that_are_no_object_are_refused_here() {
    let (session, _peer) = pair().await;
    let error = session.execute_raw("x", json!([1]), None).await.unwrap_err();
    assert!(matches!(error, Error::Protocol { .. }), "{error}");
}

#[tokio::test]
async fn unknown_events_are_kept_and_lost_ones_are_counted() {
    let (session, mut peer) = pair_with(Options { event_capacity: 4, ..Options::default() }).await;
    let mut events = session.events();
    for number in 0..10 {
        peer.send(json!({"event": "X_FUTURE", "data": {"number": number}, "more": 1})).await;
    }
    // Its reply comes behind the events.
    let (result, _) = tokio::join!(session.execute(Stop), peer.serve(json!({})));
    result.unwrap();
    assert_eq!(events.next().await, Some(EventItem::Lagged(6)));
    for number in 6..10 {
        let Some(EventItem::Event(event)) = events.next().await else { panic!("no event") };
        assert_eq!((event.name.as_str(), &event.data["number"]), ("X_FUTURE", &json!(number)));
    }
}

#[tokio::test]
async fn commands_are_asked_for_once() {
    let (session, mut peer) = pair().await;
    let script = async {
        let command = peer.serve(json!([{"name": "stop"}, {"name": "quit", "new": 1}])).await;
        assert_eq!(command["execute"], "query-commands");
    };
    let (known, ()) = tokio::join!(session.has_command("stop"), script);
    assert!(known.unwrap());
    let error = soon(session.require_command("backup-access-setup")).await.unwrap_err();
    assert!(matches!(&error, Error::MissingFeature { .. }), "{error}");
    assert!(error.to_string().contains("backup-access-setup"), "{error}");
}

#[tokio::test]
async fn a_descriptor_arrives_with_its_command() {
    let (session, mut peer) = pair().await;
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"content").unwrap();
    let script = async {
        let command = peer.serve(json!({"fdset-id": 3, "fd": 20})).await;
        assert_eq!(command["execute"], "add-fd");
        assert_eq!(peer.fds.len(), 1);
        std::fs::File::from(peer.fds.remove(0))
    };
    let fd = file.into();
    let (info, mut received) = tokio::join!(session.execute_with_fd(AddFd::default(), fd), script);
    assert_eq!(info.unwrap().fdset_id, 3);
    received.rewind().unwrap();
    let mut content = String::new();
    received.read_to_string(&mut content).unwrap();
    assert_eq!(content, "content");
}

#[tokio::test]
async fn a_descriptor_waits_for_the_reply_to_the_one_before_even_if_that_was_cancelled() {
    // QEMU keeps only the descriptors it received last: the second must not replace the first.
    let (session, mut peer) = pair_with(short()).await;
    let get = |name: &str| GetFd { fdname: name.to_owned() };
    let file = || tempfile::tempfile().unwrap().into();
    let first = tokio::spawn({
        let (session, command, fd) = (session.clone(), get("first"), file());
        async move { session.execute_with_fd(command, fd).await }
    });
    let command = peer.read().await;
    assert_eq!(command["arguments"]["fdname"], "first");
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());

    let second = session.execute_with_fd(get("second"), file());
    let script = async {
        // Another command passes by, the second descriptor does not.
        let (other, _) = tokio::join!(session.execute(Stop), async {
            let other = peer.serve(json!({})).await;
            assert_eq!(other["execute"], "stop");
        });
        other.unwrap();
        assert_eq!(peer.fds.len(), 1);
        peer.reply(&command, json!({})).await;
        let command = peer.serve(json!({})).await;
        assert_eq!(command["arguments"]["fdname"], "second");
        assert_eq!(peer.fds.len(), 2);
    };
    let (result, ()) = tokio::join!(second, script);
    result.unwrap();
}

#[tokio::test]
async fn a_command_with_a_descriptor_has_a_time_limit_of_its_own() {
    let (session, mut peer) = pair().await;
    let file = || tempfile::tempfile().unwrap().into();
    let limited = |fd| session.execute_with_fd_and_timeout(AddFd::default(), fd, SHORT);
    let error = limited(file()).await.unwrap_err();
    assert!(matches!(&error, Error::Timeout { command, after_ms: 50 } if command == "add-fd"));
    let first = peer.read().await;
    // It waits for the turn of the first, which QEMU has not answered yet.
    assert!(limited(file()).await.unwrap_err().is_timeout());
    let script = async {
        peer.reply(&first, json!({"fdset-id": 1, "fd": 20})).await;
        peer.serve(json!({"fdset-id": 2, "fd": 21})).await;
    };
    let (info, ()) = tokio::join!(session.execute_with_fd(AddFd::default(), file()), script);
    assert_eq!(info.unwrap().path(), "/dev/fdset/2");
}
