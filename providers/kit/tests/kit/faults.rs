// SPDX-License-Identifier: MIT OR Apache-2.0
//! A provider that is right passes, and each way to be wrong is caught by the check that is for it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use provider_api::BoxFuture;
use provider_kit::{
    Grade, KitOptions, Machine, MachineMaker, NoObserver, Outcome, Report, ShownTree, TreeMaker,
    check, check_names, main_step_names,
};

use crate::files::{Fault, Setup};
use crate::{failed, shown};

/// The check that catches each fault.
const CAUGHT_BY: &[(Fault, &str)] = &[
    (Fault::AbortLeavesArchive, "abort"),
    (Fault::ActivateTakesAll, "concurrent"),
    (Fault::ActivatesOnce, "activate"),
    (Fault::AsksForOldGeneration, "incremental"),
    (Fault::BaseIsUnlisted, "full"),
    (Fault::BlindVerify, "damage"),
    (Fault::ChunkRestZeroed, "fine-increment"),
    (Fault::CommitsAnyway, "commit-outcome"),
    (Fault::ConfigIsText, "hostile-configs"),
    (Fault::ContainerErrorsIgnored, "container-abort"),
    (Fault::ContainerFirewallLost, "container-configs"),
    (Fault::ContainerIsEmpty, "container"),
    (Fault::CrashLeavesArchive, "crash"),
    (Fault::DirtySumIgnored, "wrong-sum"),
    (Fault::DuplicateInList, "full"),
    (Fault::EndlessBackup, "full"),
    (Fault::EndlessNotes, "notes"),
    (Fault::ExitCodesIgnored, "container-command"),
    (Fault::FalseAlarm, "verify"),
    (Fault::FirewallLost, "full"),
    (Fault::ForgetsCommits, "full"),
    (Fault::HardLinksLost, "container"),
    (Fault::HugeGeneration, "incremental"),
    (Fault::IgnoresBitmap, "incremental"),
    (Fault::IgnoresCancel, "cancel"),
    (Fault::KeepsProtectedNot, "protect"),
    (Fault::KilledIsNoError, "container-command"),
    (Fault::ListedEarly, "full"),
    (Fault::LogCut, "log"),
    (Fault::MountPointsAreLines, "container-names"),
    (Fault::NameOfGuest, "hostile-names"),
    (Fault::NeverAnswers, "status"),
    (Fault::NoDisksFail, "no-disks"),
    (Fault::NoIncrement, "incremental"),
    (Fault::NoTombstone, "commit-outcome"),
    (Fault::NotesCut, "notes"),
    (Fault::OneTemporaryPlace, "concurrent"),
    (Fault::Panics, "full"),
    (Fault::PathForRandomRead, "random-read"),
    (Fault::PendingForEver, "unknown"),
    (Fault::ProgressPastEnd, "full"),
    (Fault::ReadsClean, "incremental"),
    (Fault::ReleasesUnread, "full"),
    (Fault::RemoveIsRefused, "remove"),
    (Fault::RemoveTakesNext, "prune"),
    (Fault::RemoveTakesRestored, "remove"),
    (Fault::SameBytesAgain, "full"),
    (Fault::ShortFile, "sizes"),
    (Fault::SilentProgress, "full"),
    (Fault::SizeIgnored, "wrong-size"),
    (Fault::SizeRounded, "sizes"),
    (Fault::SkipsLastArea, "incremental"),
    (Fault::SlowStatus, "status"),
    (Fault::SlowStatus, "load"),
    (Fault::SocketElsewhere, "full"),
    (Fault::SwallowsErrors, "failing-request"),
    (Fault::SwallowsErrors, "lost-disks"),
    (Fault::SweepTakesUnderWay, "remove-meanwhile"),
    (Fault::SymbolicLink, "full"),
    (Fault::TooFewRequests, "full"),
    (Fault::UnknownIsIo, "unknown"),
    (Fault::UsedAboveTotal, "status"),
    (Fault::VerifiesFirstDisk, "damage"),
    (Fault::WrongKind, "full"),
    (Fault::WrongPropertyName, "describe"),
    (Fault::WrongTime, "full"),
    (Fault::WrongTotal, "full"),
    (Fault::ZeroesLost, "incremental"),
    (Fault::DeafExport, "full"),
    (Fault::EndlessTar, "container"),
    (Fault::HugeFile, "container"),
    (Fault::IgnoresExcludes, "container-exclude"),
    (Fault::ReadsInCommit, "slow-commit"),
    (Fault::RestoreNeverAnswers, "full"),
    (Fault::SilentTar, "container"),
    // The same faults, seen in other lights.
    (Fault::SlowStatus, "container-load"),
    (Fault::NameOfGuest, "container-names"),
    (Fault::ConfigIsText, "container-configs"),
    (Fault::SkipsLastArea, "chain"),
    (Fault::SkipsLastArea, "files"),
    (Fault::AbortLeavesArchive, "container-abort"),
    (Fault::IgnoresBitmap, "empty-increment"),
    (Fault::AsksForOldGeneration, "late-full"),
    (Fault::ZeroesLost, "changed-disks"),
    (Fault::SymbolicLink, "restores"),
];

async fn run(setup: Setup, only: &str) -> Report {
    let options = KitOptions {
        size_bytes: 1 << 20,
        seed: 42,
        data_dir: Some(setup.dir.clone()),
        only: if only.is_empty() { Vec::new() } else { vec![only.to_owned()] },
        call_limit: Duration::from_secs(if only.is_empty() { 60 } else { 5 }),
        ..KitOptions::default()
    };
    check(setup.factory(), options, &NoObserver, &Default::default()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_without_faults_is_complete() {
    let dir = tempfile::Builder::new().prefix("kit-files").tempdir().unwrap();
    let report = run(Setup::new(dir.path().to_owned(), None), "").await;
    assert_eq!(report.grade, Grade::Complete, "{}", shown(&report));
    assert_eq!(report.left, [""; 0]);
    let remarks = report.checks.iter().filter_map(|check| match &check.outcome {
        Outcome::Passed { remarks } => Some(remarks.join(" ")),
        _ => None,
    });
    let is_blame = |text: &String| {
        !text.is_empty()
            && !text.contains("too fast")
            && !text.contains("qemu-storage-daemon")
            && !text.contains("was flipped")
            && !text.starts_with("Not tested")
    };
    let remarks = remarks.filter(is_blame);
    assert_eq!(remarks.collect::<Vec<_>>(), [""; 0]);
}

/// Some compare with the last archive what a bitmap does not mark, or make full backups now and then.
#[tokio::test(flavor = "multi_thread")]
async fn a_provider_may_ask_for_all_of_a_disk() {
    let dir = tempfile::Builder::new().prefix("kit-all").tempdir().unwrap();
    let setup = Setup { reads_all: true, ..Setup::new(dir.path().to_owned(), None) };
    let only = ["incremental", "chain", "late-full"].map(str::to_owned).to_vec();
    let options = KitOptions { size_bytes: 1 << 20, chain_steps: 4, only, ..KitOptions::default() };
    let report = check(setup.factory(), options, &NoObserver, &Default::default()).await;
    assert_eq!(report.counts().passed, 3, "{}", shown(&report));
}

/// What of a file depends on who the kit is and where its tree lies.
#[tokio::test(flavor = "multi_thread")]
async fn lost_owners_attributes_lists_and_holes_are_noticed() {
    let is_root = rustix::process::geteuid().is_root();
    for (fault, kind, word) in [
        (Fault::OwnersLost, "owners", "owner"),
        (Fault::AclsLost, "access control lists", "access control list"),
        (Fault::AttributesLost, "extended attributes", "attributes"),
        (Fault::HolesLost, "holes", "lost its holes"),
    ] {
        let dir = tempfile::Builder::new().prefix("kit-fault").tempdir().unwrap();
        let report = run(Setup::new(dir.path().to_owned(), Some(fault)), "container").await;
        let text = match &report.checks[0].outcome {
            Outcome::Passed { remarks } => remarks.join(" "),
            Outcome::Failed { why, .. } => why.clone(),
            _ => String::new(),
        };
        let is_told = text.contains("Not tested") && text.contains(kind);
        assert!(text.contains(word) || is_told, "{fault:?}: {}", shown(&report));
        let must_fail = fault == Fault::OwnersLost && is_root;
        assert!(!must_fail || failed(&report) == ["container"], "{}", shown(&report));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_fault_is_caught_by_its_check() {
    let mut passed = Vec::new();
    let all = CAUGHT_BY.iter().map(|(fault, name)| async move {
        let dir = tempfile::Builder::new().prefix("kit-fault").tempdir().unwrap();
        let report = run(Setup::new(dir.path().to_owned(), Some(*fault)), name).await;
        (fault, name, report)
    });
    // Not all at once: some measure time.
    let mut all = futures_util::StreamExt::buffer_unordered(futures_util::stream::iter(all), 4);
    while let Some((fault, name, report)) = futures_util::StreamExt::next(&mut all).await {
        println!("{fault:?}: {}", shown(&report));
        if failed(&report) != [*name] {
            passed.push(format!("{fault:?} by {name}: {}", shown(&report)));
        }
    }
    assert_eq!(passed, [""; 0], "not caught");
}

#[test]
fn every_check_has_a_fault_that_it_catches() {
    let without: Vec<_> = check_names()
        .map(|(name, _)| name)
        .filter(|name| !CAUGHT_BY.iter().any(|(_, check)| check == name))
        .collect();
    assert_eq!(without, [""; 0]);
}

/// QEMU's storage daemon, where it can offer files.
fn storage_daemon() -> Option<std::path::PathBuf> {
    let path = std::path::PathBuf::from("/usr/bin/qemu-storage-daemon");
    let is_usable = path.exists() && Path::new("/dev/fuse").exists();
    if !is_usable {
        eprintln!(
            "skipped in part: qemu-storage-daemon of Debian's qemu-system-common, or /dev/fuse, is missing"
        );
    }
    is_usable.then_some(path)
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_may_be_files() {
    for storage_daemon in [None, storage_daemon()] {
        let has_daemon = storage_daemon.is_some();
        for (fault, caught) in [
            (None, false),
            (Some(Fault::SkipsLastArea), true),
            // Only a daemon's files fail where they must.
            (Some(Fault::ReadsClean), has_daemon),
        ] {
            let dir = tempfile::Builder::new().prefix("kit-file").tempdir().unwrap();
            let setup = Setup { from_files: true, ..Setup::new(dir.path().to_owned(), fault) };
            let options = KitOptions {
                size_bytes: 1 << 20,
                seed: 42,
                only: vec![
                    "full".to_owned(),
                    "incremental".to_owned(),
                    "wrong-sum".to_owned(),
                    "wrong-size".to_owned(),
                ],
                storage_daemon: storage_daemon.clone(),
                ..KitOptions::default()
            };
            let report = check(setup.factory(), options, &NoObserver, &Default::default()).await;
            let expected: &[&str] = if caught { &["incremental"] } else { &[] };
            assert_eq!(failed(&report), expected, "{fault:?} {has_daemon} {}", shown(&report));
            assert!(report.source.contains("files"), "{}", report.source);
            if has_daemon {
                assert!(!shown(&report).contains("releases nothing"), "{}", shown(&report));
            }
        }
    }
}

/// Plain files hide what these checks look for: a provider that is right would seem wrong.
#[tokio::test(flavor = "multi_thread")]
async fn checks_that_need_disks_with_trouble_are_not_made_with_plain_files() {
    let dir = tempfile::Builder::new().prefix("kit-plain").tempdir().unwrap();
    let setup = Setup { from_files: true, ..Setup::new(dir.path().to_owned(), None) };
    let only = ["failing-request", "lost-disks", "cancel"].map(str::to_owned).to_vec();
    let options = KitOptions { size_bytes: 1 << 20, only, ..KitOptions::default() };
    let report = check(setup.factory(), options, &NoObserver, &Default::default()).await;
    let is_told = |outcome: &Outcome| match outcome {
        Outcome::NotTested { why } => why.contains("qemu-storage-daemon"),
        _ => false,
    };
    let told = report.checks.iter().filter(|check| is_told(&check.outcome)).count();
    assert_eq!(told, 3, "{}", shown(&report));
}

/// Machines that cannot be made.
struct NoMachines {
    as_files: bool,
}

impl MachineMaker for NoMachines {
    fn make<'a>(
        &'a self,
        _disks: &'a [(String, Arc<Vec<u8>>)],
    ) -> BoxFuture<'a, Result<Box<dyn Machine>, String>> {
        Box::pin(std::future::ready(Err("a machine is made".to_owned())))
    }

    fn offers_files(&self) -> bool {
        self.as_files
    }
}

/// Trees that cannot be shown.
struct NoTrees {
    unusable: Option<String>,
}

impl TreeMaker for NoTrees {
    fn unusable(&self) -> Option<String> {
        self.unusable.clone()
    }

    fn show<'a>(
        &'a self,
        _root: &'a Path,
        _place: &'a Path,
        _excludes: &'a provider_api::Excludes,
    ) -> BoxFuture<'a, Result<Box<dyn ShownTree>, String>> {
        Box::pin(std::future::ready(Err("a tree is shown".to_owned())))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn real_disks_are_for_providers_that_can_read_them() {
    for (from_files, as_files) in [(true, true), (true, false), (false, true), (false, false)] {
        let dir = tempfile::tempdir().unwrap();
        let setup = Setup { from_files, ..Setup::new(dir.path().to_owned(), None) };
        let unusable = as_files.then(|| "no rights".to_owned());
        let options = KitOptions {
            machines: Some(Arc::new(NoMachines { as_files })),
            trees: Some(Arc::new(NoTrees { unusable })),
            ..KitOptions::default()
        };
        let report = check(setup.factory(), options, &NoObserver, &Default::default()).await;
        let names: Vec<_> = report.checks.iter().map(|check| check.name.as_str()).collect();
        assert_eq!(names, main_step_names().collect::<Vec<_>>());
        // One that reads NBD reads files, too.
        let can_read = as_files || !from_files;
        for check in &report.checks {
            let is_tree = check.name.starts_with("container");
            let is_told = match &check.outcome {
                Outcome::NotTested { why } if is_tree => as_files && why.contains("no rights"),
                Outcome::NotTested { why } => !can_read && why.contains("NBD"),
                Outcome::Failed { why, .. } if is_tree => why.contains("a tree is shown"),
                Outcome::Failed { why, .. } => can_read && why.contains("a machine is made"),
                Outcome::NotSupported { .. } => is_tree && from_files,
                Outcome::Passed { .. } => false,
            };
            assert!(is_told, "{}: {}", check.name, shown(&report));
        }
    }
}
