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

/// Not a test: fills a journal up to the limit of its files, which [`FULL`] names the directory of.
#[tokio::test]
async fn full_entry() {
    let Some(root) = std::env::var_os(FULL) else { return };
    let layout = Layout::new(Some(root.into()));
    let journal = Journal::create(&layout, begin()).await.unwrap();
    // Written in part.
    let error = journal.append(Entry::Archive { name: "a".repeat(2000) }).await.unwrap_err();
    assert!(matches!(error, JournalError::Io { doing: "write", .. }), "{error}");
    journal.append(Entry::Freeze).await.unwrap();
}

const FULL: &str = "VZDUMP_TEST_FULL_ROOT";

#[test]
fn a_line_that_could_not_be_written_whole_does_not_spoil_the_next_one() {
    let root = tempfile::tempdir().unwrap();
    // In blocks of 512 or 1024 bytes.
    let script = "trap '' XFSZ; ulimit -f 1; exec \"$0\" --exact journal::tests::full_entry";
    let ended = std::process::Command::new("sh")
        .args(["-c", script])
        .arg(std::env::current_exe().unwrap())
        .env(FULL, root.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ended.stdout);
    assert!(ended.status.success() && said.contains("1 passed"), "{said}");
    let found = list(&Layout::new(Some(root.path().to_owned())), None).unwrap();
    let record = read(&found[0]).unwrap();
    assert!(record.frozen && record.archive.is_none(), "{record:?}");
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

#[tokio::test]
async fn what_was_left_without_a_first_line_goes_with_the_guests_next_journal() {
    let root = tempfile::tempdir().unwrap();
    let layout = Layout::new(Some(root.path().to_owned()));
    let dir = layout.journal_dir();
    make_private_dir(&dir).unwrap();
    let others = [".qemu-1000-x.new", ".lxc-100-x.new", "qemu-100-x.new", ".qemu-100-x.txt"];
    for name in others.into_iter().chain([".qemu-100-x.new"]) {
        fs::write(dir.join(name), "").unwrap();
    }
    Journal::create(&layout, begin()).await.unwrap();
    assert!(others.iter().all(|name| dir.join(name).exists()));
    assert!(!dir.join(".qemu-100-x.new").exists());
    assert_eq!(fs::read_dir(&dir).unwrap().count(), others.len() + 1);
}

#[tokio::test]
async fn a_journals_name_says_whose_it_is() {
    let root = tempfile::tempdir().unwrap();
    let layout = Layout::new(Some(root.path().to_owned()));
    let journal = Journal::create(&layout, begin()).await.unwrap();
    assert_eq!(guest_in_name(journal.path()), Some(100));
    assert_eq!(guest_in_name(Path::new("/j/other.journal")), None);
}
