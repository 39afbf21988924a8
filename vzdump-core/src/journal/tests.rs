// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is written is read back, and what is torn or newer is not trusted.

use super::*;

fn begin() -> Begin {
    Begin::new(TaskKind::Backup, GuestKind::Qemu, 100, "store").expect("/proc is readable")
}

#[tokio::test]
async fn what_is_written_is_read_back() {
    let root = tempfile::tempdir().unwrap();
    let layout = Layout::new(Some(root.path().to_owned()));
    let journal = Journal::create(&layout, begin()).await.unwrap();
    let id = Uuid::new_v4();
    let file = FileExport { mark: "m".into(), path: "/f".into() };
    let image = FleecingImage { node: "n".into(), volume: "local:100/f.raw".into() };
    for entry in [
        Entry::Qemu { process: ProcessStamp::current().unwrap() },
        Entry::Archive { name: "a".into() },
        Entry::Fleecing(image.clone()),
        Entry::Freeze,
        Entry::Access { target_id: "vzdump:store".into() },
        Entry::Thawed,
        Entry::NbdServer { socket: "/s".into(), exports: vec!["scsi0".into()] },
        Entry::FileExport(file.clone()),
        Entry::ShutDown,
        Entry::Start { mark: "m".into(), is_to_run: true },
        Entry::KeepAlive,
        Entry::Committing { id, description: Description::default() },
        Entry::Outcome { id, outcome: KnownOutcome::Committed },
    ] {
        journal.append(entry).await.unwrap();
    }
    let found = list(&layout, Some((GuestKind::Qemu, 100))).unwrap();
    assert_eq!(found, [journal.path().to_owned()]);
    assert!(list(&layout, Some((GuestKind::Qemu, 10))).unwrap().is_empty());
    let record = read(&found[0]).unwrap();
    assert!(record.begin.owner.is_alive() && !record.frozen);
    assert_eq!((record.fleecing, record.file_exports), (vec![image], vec![file]));
    assert_eq!((record.held, record.kept_alive), (Some(Held::ShutDown), true));
    assert_eq!((&record.ran, record.started), (&record.qemu, Some(("m".to_owned(), true))));
    assert_eq!((record.committing, record.outcome), (Some(id), Some(KnownOutcome::Committed)));
    journal.remove().await.unwrap();
    assert!(list(&layout, None).unwrap().is_empty());
}

#[test]
fn a_torn_last_line_names_nothing() {
    let mut text = serde_json::to_vec(&Entry::Begin(begin())).unwrap();
    let path = Path::new("j");
    // Torn within the first line: there is nothing to say whose it is.
    assert!(matches!(parse(path, &text), Err(JournalError::Damaged { .. })));
    text.extend_from_slice(b"\n{\"entry\":\"archive\",\"na");
    assert_eq!(parse(path, &text).unwrap().archive, None);
    // A line that is whole must make sense.
    text.extend_from_slice(b"?\n");
    let error = parse(path, &text).unwrap_err().to_string();
    assert!(error.contains("line 2"), "{error}");
}

#[test]
fn a_newer_journal_is_not_touched() {
    let text = b"{\"entry\":\"begin\",\"version\":2,\"other\":1}\n";
    assert!(matches!(parse(Path::new("j"), text), Err(JournalError::Newer { version: 2, .. })));
}

#[test]
fn a_process_is_told_from_its_successor() {
    let own = ProcessStamp::current().unwrap();
    assert!(own.is_alive() && own.is_of_this_boot());
    let mut other = own.clone();
    other.process.start_time_ticks += 1;
    assert!(!other.is_alive());
    let earlier = ProcessStamp { boot_id: "other".into(), ..own };
    assert!(!earlier.is_alive() && !earlier.is_of_this_boot());
}
