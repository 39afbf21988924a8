// SPDX-License-Identifier: MIT OR Apache-2.0
//! Removals from a chain, wherever they end: what stays gives the bytes it gave before.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use std::ffi::OsStr;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};

use common::{
    Bench, GuestDisk, Random, copy, end_with_parent, provider, run, scribble, start_child, text,
};
use provider_api::{Archive, BitmapRequest, Call, Kind, Provider, Readable, Uuid};
use serde_json::Value;

const STORAGE: &str = "DIRECTORY_TEST_STORAGE";
const ARCHIVE: &str = "DIRECTORY_TEST_ARCHIVE";
const KILL_AT: &str = "DIRECTORY_TEST_KILL_AT";
const NO_EXCHANGE: &str = "DIRECTORY_TEST_NO_EXCHANGE";

/// Not a test of its own: removes an archive in a process that may be killed.
#[tokio::test(flavor = "multi_thread")]
async fn child_process() {
    let Some(path) = std::env::var_os(STORAGE) else { return };
    end_with_parent();
    let archive = std::env::var(ARCHIVE).unwrap();
    provider(Path::new(&path)).remove(&archive, &Call::default()).await.unwrap();
}

/// One archive and what its disks must give.
#[derive(Clone)]
struct Made {
    name: String,
    disks: Vec<(String, PathBuf)>,
}

/// A guest with a chain of archives. The second disk is there from the second archive on, so its
/// chain begins later.
struct Guest {
    bench: Bench,
    disks: Vec<GuestDisk>,
    random: Random,
    made: Vec<Made>,
}

impl Guest {
    async fn new(seed: u64, archives: usize) -> Self {
        let bench = Bench::new().await;
        let first = GuestDisk::create(bench.path(), "scsi0", (9 << 20) + 512, 65536);
        let second = GuestDisk::create(bench.path(), "virtio1", 1 << 20, 65536);
        let disks = vec![first, second];
        let mut guest = Self { bench, disks, random: Random::new(seed), made: Vec::new() };
        for _ in 0..archives {
            guest.back_up().await;
        }
        guest
    }

    async fn back_up(&mut self) {
        let at = self.made.len();
        for disk in &self.disks {
            scribble(disk, &mut self.random, if at == 0 { 40 } else { 6 }).await;
        }
        if at == 2 {
            // Whole blocks become zero, over data below.
            self.disks[0]
                .edit(async |client| {
                    let zeroes = provider_nbd::ZeroOptions::default();
                    client.write_zeroes(512, (8 << 20) + 5120, zeroes).await.unwrap();
                })
                .await;
        }
        let disks: Vec<_> = self.disks.iter().take(if at == 0 { 1 } else { 2 }).collect();
        let references =
            disks.iter().map(|disk| (disk.device.clone(), disk.reference(&format!("at-{at}"))));
        let references = references.collect();
        let (name, _) = self.bench.back_up(1, &disks, &format!("g{at}")).await.unwrap();
        self.made.push(Made { name, disks: references });
    }

    /// A copy of the storage for one case.
    fn copy(&self) -> Case {
        let storage = self.bench.path().join(Uuid::new_v4().simple().to_string());
        run("cp", &["-a", "--reflink=auto", text(&self.bench.storage()), text(&storage)]);
        Case { storage, made: self.made.clone() }
    }
}

/// A storage and what must be in it.
struct Case {
    storage: PathBuf,
    made: Vec<Made>,
}

impl Case {
    async fn list(&self) -> Vec<Archive> {
        let call = Call::default();
        let mut list = provider(&self.storage).list(&call).await.unwrap();
        list.sort_by(|a, b| a.name.cmp(&b.name));
        list
    }

    async fn remove(&mut self, at: usize) {
        let gone = self.made.remove(at);
        provider(&self.storage).remove(&gone.name, &Call::default()).await.unwrap();
    }

    /// What is listed gives the right bytes, its checksums fit, and nothing else is there.
    async fn check(&self, what: &str) {
        self.check_quickly(what).await;
        for made in &self.made {
            for (device, reference) in &made.disks {
                common::check_image(&self.storage, &made.name, device, reference);
            }
        }
    }

    /// The same without the judgement of QEMU's tools.
    async fn check_quickly(&self, what: &str) {
        let names: Vec<_> = self.list().await.into_iter().map(|archive| archive.name).collect();
        let expected: Vec<_> = self.made.iter().map(|made| made.name.clone()).collect();
        assert_eq!(names, expected, "{what}");
        assert_eq!(self.leftovers(), Vec::<String>::new(), "{what}");
        for made in &self.made {
            self.check_archive(made, what).await;
            let files = std::fs::read_dir(self.storage.join(&made.name)).unwrap();
            for file in files {
                let file = file.unwrap().file_name().into_string().unwrap();
                assert!(!["lock", "replaces"].contains(&file.as_str()), "{what}: {file} is left");
            }
        }
    }

    async fn check_archive(&self, made: &Made, what: &str) {
        for (device, reference) in &made.disks {
            println!("{what}: {} {device}", made.name);
            common::check_restore(&self.storage, &made.name, device, reference).await;
            check_sums(&self.storage.join(&made.name), device, reference);
        }
    }

    fn leftovers(&self) -> Vec<String> {
        let names = std::fs::read_dir(&self.storage).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with(".tmp-")).collect()
    }

    async fn activate(&self) {
        provider(&self.storage).activate(&Call::default()).await.unwrap();
    }
}

/// The checksums match the manifest and the truth, and a full image's cover the disk.
fn check_sums(directory: &Path, device: &str, reference: &Path) {
    let manifest = std::fs::read(directory.join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let disks = manifest["disks"].as_array().unwrap();
    let disk = disks.iter().find(|disk| disk["device"] == device).unwrap();
    let sums = std::fs::read(directory.join(format!("{device}.blake3"))).unwrap();
    assert_eq!(disk["checksums"]["blake3"], blake3::hash(&sums).to_hex().as_str());
    assert_eq!(disk["checksums"]["file_size_bytes"], sums.len());
    let truth = std::fs::read(reference).unwrap();
    let (mut end, mut covered) = (0, 0);
    for line in String::from_utf8(sums).unwrap().lines() {
        let words: Vec<_> = line.split(' ').collect();
        let (offset, length) = (words[0].parse().unwrap(), words[1].parse::<usize>().unwrap());
        assert!(offset >= end, "{line}");
        end = offset + length;
        covered += length;
        let data = &truth[offset..end];
        match words[2] {
            "zero" => assert!(data.iter().all(|byte| *byte == 0), "{line}"),
            hash => assert_eq!(hash, blake3::hash(data).to_hex().as_str(), "{line}"),
        }
    }
    if disk["base"].is_null() {
        assert_eq!(covered, truth.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_archive_of_a_chain_can_go() {
    let guest = Guest::new(1, 4).await;
    guest.copy().check("untouched").await;
    for at in 0..4 {
        let mut case = guest.copy();
        case.remove(at).await;
        case.check(&format!("without {at}")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_that_is_removed_from_its_base_or_at_random_stays_right() {
    let guest = Guest::new(2, 5).await;
    let mut case = guest.copy();
    while case.made.len() > 1 {
        case.remove(0).await;
        case.check(&format!("{} are left", case.made.len())).await;
        let list = case.list().await;
        assert_eq!((&list[0].base, list[0].size_bytes > 0), (&None, true));
    }
    case.remove(0).await;
    assert!(case.list().await.is_empty());
    let mut random = Random::new(3);
    let mut case = guest.copy();
    while case.made.len() > 1 {
        let at = random.below(case.made.len() as u64) as usize;
        case.remove(at).await;
        case.check(&format!("{at} was removed")).await;
    }
}

/// Removes in a child that is killed at its `step`; whether it lived long enough to succeed.
async fn removes_until(case: &Case, archive: &str, step: u32, exchange: bool) -> bool {
    let step = step.to_string();
    let mut environment: Vec<(&str, &OsStr)> = vec![
        (STORAGE, case.storage.as_os_str()),
        (ARCHIVE, archive.as_ref()),
        (KILL_AT, step.as_ref()),
    ];
    if !exchange {
        environment.push((NO_EXCHANGE, "1".as_ref()));
    }
    let mut child = start_child(&environment);
    // Waiting would close it, which ends the child.
    let _input = child.0.stdin.take();
    let status = tokio::task::spawn_blocking(move || child.0.wait().unwrap()).await.unwrap();
    assert!(status.success() || status.signal() == Some(9), "{status:?}");
    status.success()
}

async fn is_killed_at_every_step(guest: &Guest, at: usize, exchange: bool) {
    let gone = guest.made[at].name.clone();
    let mut steps = 0;
    loop {
        let mut case = guest.copy();
        if removes_until(&case, &gone, steps + 1, exchange).await {
            case.made.remove(at);
            case.check("it was not killed").await;
            break;
        }
        steps += 1;
        let what = format!("killed at step {steps}, exchange: {exchange}");
        let listed: Vec<_> = case.list().await.into_iter().map(|archive| archive.name).collect();
        for made in case.made.iter().filter(|made| listed.contains(&made.name)) {
            // What is listed before anything was cleaned up is right, too.
            for (device, reference) in &made.disks {
                common::check_restore(&case.storage, &made.name, device, reference).await;
            }
        }
        case.activate().await;
        let is_gone = !case.list().await.iter().any(|archive| archive.name == gone);
        if is_gone {
            case.made.remove(at);
        }
        case.check_quickly(&what).await;
        if !is_gone {
            case.remove(at).await;
            case.check_quickly(&format!("{what}, then removed")).await;
        }
    }
    let expected = if at + 1 == guest.made.len() { 3 } else { 12 };
    assert!(steps >= expected, "only {steps} steps were seen");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_every_step_of_a_removal_leaves_the_old_chain_or_the_new_one() {
    let guest = Guest::new(4, 3).await;
    // A base of one disk only, one of both, and the newest one.
    for at in [0, 1, 2] {
        is_killed_at_every_step(&guest, at, true).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_where_names_cannot_be_exchanged_leaves_the_old_chain_or_the_new_one() {
    let guest = Guest::new(5, 3).await;
    is_killed_at_every_step(&guest, 1, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_that_two_build_upon_is_merged_into_both() {
    let mut guest = Guest::new(6, 2).await;
    let disk = &guest.disks[0];
    scribble(disk, &mut guest.random, 5).await;
    let two = disk.reference("two");
    // As after a backup whose success QEMU was never told: its bitmap goes on.
    let mut backup = guest.bench.start(1).await;
    copy(backup.as_mut(), &[disk], "g2", &guest.bench.call).await.unwrap();
    let name = backup.commit(Uuid::new_v4(), &guest.bench.call).await.unwrap().archive;
    guest.made.push(Made { name: name.clone(), disks: vec![("scsi0".into(), two)] });
    let path = guest.bench.storage().join(&name).join("manifest.json");
    let text = std::fs::read_to_string(&path).unwrap().replace("\"g2\"", "null");
    std::fs::write(&path, text).unwrap();
    scribble(disk, &mut guest.random, 5).await;
    let three = disk.reference("three");
    let (name, _) = guest.bench.back_up(1, &[disk], "g3").await.unwrap();
    guest.made.push(Made { name, disks: vec![("scsi0".into(), three)] });
    let mut case = guest.copy();
    let base = case.list().await[1].name.clone();
    assert!(case.list().await[2..].iter().all(|archive| archive.base.as_ref() == Some(&base)));
    case.remove(1).await;
    case.check("merged into both").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_the_newest_is_removed_the_next_backup_asks_for_what_is_there() {
    let mut guest = Guest::new(7, 3).await;
    let call = Call::default();
    let newest = guest.made.pop().unwrap();
    guest.bench.provider.remove(&newest.name, &call).await.unwrap();
    let mut backup = guest.bench.start(1).await;
    let infos = guest.disks.iter().map(GuestDisk::info).collect::<Vec<_>>();
    let requests = backup.plan_volumes(&infos, &call).await.unwrap();
    // QEMU's bitmap is one of the generation "g2": asked for "g1" it gives a full backup.
    let asked = BitmapRequest::Use { generation: "g1".into(), readable: Readable::Dirty };
    assert_eq!(requests, [asked.clone(), asked]);
    backup.abort("seen", &call).await.unwrap();
    // With nothing left nothing is asked for.
    for made in guest.made.drain(..).rev() {
        guest.bench.provider.remove(&made.name, &call).await.unwrap();
    }
    let mut backup = guest.bench.start(1).await;
    let requests = backup.plan_volumes(&infos, &call).await.unwrap();
    assert_eq!(requests, [BitmapRequest::New, BitmapRequest::New]);
    backup.abort("seen", &call).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_goes_on_after_its_middle_was_removed() {
    let mut guest = Guest::new(8, 3).await;
    let gone = guest.made.remove(1);
    guest.bench.provider.remove(&gone.name, &guest.bench.call).await.unwrap();
    // The references are named by their number.
    guest.made.insert(0, gone);
    guest.back_up().await;
    guest.made.remove(0);
    let case = guest.copy();
    case.check("went on").await;
    assert_eq!(case.list().await[2].base.as_ref(), Some(&guest.made[1].name));
}

/// Backs up as QEMU and the host do: a bitmap of another generation than the one asked for is of no
/// use, and all of the disk is copied.
async fn back_up_as_qemu(guest: &mut Guest, number: usize, held: &mut Option<String>) {
    let call = Call::default();
    let disk = &guest.disks[0];
    scribble(disk, &mut guest.random, 6).await;
    let reference = disk.reference(&format!("history-{number}"));
    let mut backup = guest.bench.start(1).await;
    let asked = backup.plan_volumes(&[disk.info()], &call).await.unwrap().remove(0);
    let is_usable = matches!(&asked, BitmapRequest::Use { generation, .. } if Some(generation) == held.as_ref());
    let request = if is_usable { asked } else { BitmapRequest::New };
    let snapshot = disk.snapshot().await;
    let generation = format!("h{number}");
    let volume = disk.volume(&snapshot, &request, &generation).await;
    let progress = common::Recorder::default();
    backup.backup_vm(common::vm(vec![volume]), &progress, &call).await.unwrap();
    let name = backup.commit(Uuid::new_v4(), &call).await.unwrap().archive;
    disk.clear_bitmap();
    *held = Some(generation);
    guest.made.push(Made { name, disks: vec![(disk.device.clone(), reference)] });
}

#[tokio::test(flavor = "multi_thread")]
async fn backups_and_removals_at_random_never_lose_a_change() {
    for seed in [21, 22, 23] {
        let mut guest = Guest::new(seed, 0).await;
        let mut held = None;
        for number in 0..14 {
            let count = guest.made.len() as u64;
            if count > 1 && guest.random.below(5) < 2 {
                let at = guest.random.below(count) as usize;
                let gone = guest.made.remove(at);
                guest.bench.provider.remove(&gone.name, &Call::default()).await.unwrap();
            } else {
                back_up_as_qemu(&mut guest, number, &mut held).await;
            }
        }
        guest.copy().check(&format!("seed {seed}")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_read_or_built_upon_is_not_removed() {
    let guest = Guest::new(9, 2).await;
    let call = Call::default();
    let (base, top) = (&guest.made[0].name, &guest.made[1].name);
    let storage = &guest.bench.provider;
    // By another process, as it were.
    let other = provider(&guest.bench.storage());
    let restore = other.restore_vm_init(top, &call).await.unwrap();
    assert_eq!(storage.remove(base, &call).await.unwrap_err().kind, Kind::InUse);
    restore.cleanup(&call).await.unwrap();
    let backup = guest.bench.start(1).await;
    assert_eq!(storage.remove(top, &call).await.unwrap_err().kind, Kind::InUse);
    // Another guest's backup does not matter.
    let neighbour = guest.bench.start(2).await;
    backup.abort("seen", &call).await.unwrap();
    storage.remove(top, &call).await.unwrap();
    neighbour.abort("seen", &call).await.unwrap();
    assert_eq!(storage.remove(top, &call).await.unwrap_err().kind, Kind::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn protection_and_notes_stay_with_their_archive() {
    let guest = Guest::new(10, 3).await;
    let (storage, call) = (&guest.bench.provider, Call::default());
    let [base, middle, top] = [0, 1, 2].map(|at| guest.made[at].name.as_str());
    storage.set_protected(base, true, &call).await.unwrap();
    storage.set_protected(base, true, &call).await.unwrap();
    assert_eq!(storage.remove(base, &call).await.unwrap_err().kind, Kind::Protected);
    storage.set_protected(base, false, &call).await.unwrap();
    storage.set_protected(middle, true, &call).await.unwrap();
    storage.set_notes(middle, "\nbefore the update\nby night", &call).await.unwrap();
    storage.keep_log(middle, "first", &call).await.unwrap();
    storage.keep_log(middle, "INFO: one\n", &call).await.unwrap();
    storage.keep_log("none", "x", &call).await.unwrap_err();
    storage.keep_log(top, &"x".repeat(provider_api::LOG_BYTES_MAX + 1), &call).await.unwrap_err();
    assert_eq!(storage.log(top, &call).await.unwrap(), "");
    storage.set_notes(top, "x", &call).await.unwrap();
    storage.set_notes(top, "", &call).await.unwrap();
    assert!(storage.set_notes(top, "\u{7}", &call).await.is_err());
    assert!(storage.set_notes("none", "x", &call).await.is_err());
    storage.remove(base, &call).await.unwrap();
    assert_eq!(storage.notes(middle, &call).await.unwrap(), "\nbefore the update\nby night");
    assert_eq!(storage.log(middle, &call).await.unwrap(), "INFO: one\n");
    assert_eq!(storage.notes(top, &call).await.unwrap(), "");
    let mut list = storage.list(&call).await.unwrap();
    list.sort_by(|a, b| a.name.cmp(&b.name));
    let seen: Vec<_> = list.iter().map(|a| (a.protected, a.notes.as_deref())).collect();
    assert_eq!(seen, [(true, Some("before the update")), (false, None)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_archive_is_not_merged_and_a_cancelled_removal_changes_nothing() {
    let guest = Guest::new(11, 3).await;
    let case = guest.copy();
    // The last byte of a full image is data of some cluster.
    let image = case.storage.join(&case.made[0].name).join("scsi0.qcow2");
    let mut bytes = std::fs::read(&image).unwrap();
    let half = bytes.len() / 2;
    bytes[half..].iter_mut().for_each(|byte| *byte ^= 1);
    std::fs::write(&image, &bytes).unwrap();
    let storage = provider(&case.storage);
    let error = storage.remove(&case.made[0].name, &Call::default()).await.unwrap_err();
    assert_eq!(error.kind, Kind::Corrupt, "{error}");
    assert_eq!(case.list().await.len(), 3);
    assert!(case.leftovers().is_empty());

    let case = guest.copy();
    let call = Call::default();
    call.cancel.cancel();
    let error = provider(&case.storage).remove(&case.made[0].name, &call).await.unwrap_err();
    assert_eq!(error.kind, Kind::Cancelled);
    case.check("cancelled").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_file_is_not_a_missing_archive() {
    let guest = Guest::new(14, 2).await;
    let case = guest.copy();
    std::fs::remove_file(case.storage.join(&case.made[1].name).join("scsi0.qcow2")).unwrap();
    let base = &case.made[0].name;
    let error = provider(&case.storage).remove(base, &Call::default()).await.unwrap_err();
    assert_eq!(error.kind, Kind::Corrupt, "{error}");
    assert!(case.storage.join(base).exists() && case.leftovers().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_unreadable_archive_builds_upon_is_kept() {
    let guest = Guest::new(12, 2).await;
    let case = guest.copy();
    let manifest = case.storage.join(&case.made[1].name).join("manifest.json");
    std::fs::write(manifest, "{").unwrap();
    let base = &case.made[0].name;
    let error = provider(&case.storage).remove(base, &Call::default()).await.unwrap_err();
    assert_eq!(error.kind, Kind::Corrupt);
    assert!(error.message.contains(&case.made[1].name), "{error}");
    assert!(case.storage.join(base).exists());
}

/// A link stands for a file that the storage does not give at the moment.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_removed_while_nobody_knows_what_builds_upon_it() {
    let guest = Guest::new(13, 2).await;
    let base = &guest.made[0].name;
    for (manifest, image) in [(None, true), (Some("{"), true)] {
        let case = guest.copy();
        let above = case.storage.join(&case.made[1].name);
        let hide = |file: &Path| {
            std::fs::remove_file(file).unwrap();
            std::os::unix::fs::symlink("/nonexistent/file", file).unwrap();
        };
        match manifest {
            Some(text) => std::fs::write(above.join("manifest.json"), text).unwrap(),
            None => hide(&above.join("manifest.json")),
        }
        if image {
            let files = std::fs::read_dir(&above).unwrap().map(|file| file.unwrap().path());
            let images = files.filter(|file| file.extension().is_some_and(|e| e == "qcow2"));
            images.for_each(|image| hide(&image));
        }
        let error = provider(&case.storage).remove(base, &Call::default()).await.unwrap_err();
        assert!(error.message.contains(&case.made[1].name), "{error}");
        assert_eq!(error.kind, Kind::Io, "{error}");
        assert!(case.storage.join(base).exists());
    }
}

/// As with a bad sector in its manifest.
#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_that_cannot_be_read_keeps_only_what_its_images_name() {
    let guest = Guest::new(15, 3).await;
    let case = guest.copy();
    let (base, newest) = (&case.made[1].name, &case.made[2].name);
    let manifest = case.storage.join(newest).join("manifest.json");
    std::fs::remove_file(&manifest).unwrap();
    std::os::unix::fs::symlink("/nonexistent/file", &manifest).unwrap();
    let error = provider(&case.storage).remove(base, &Call::default()).await.unwrap_err();
    assert_eq!(error.kind, Kind::Io, "{error}");
    assert!(error.message.contains(&format!("{newest} builds upon it")), "{error}");
    assert!(case.storage.join(base).exists());
    // Another guest's full backup.
    let base = "vzdump-qemu-999-2026_01_02-03_04_05";
    for entry in std::fs::read_dir(case.storage.join(&case.made[0].name)).unwrap() {
        let from = entry.unwrap().path();
        let to = case.storage.join(base);
        std::fs::create_dir_all(&to).unwrap();
        std::fs::copy(&from, to.join(from.file_name().unwrap())).unwrap();
    }
    let path = case.storage.join(base).join("manifest.json");
    let text = std::fs::read_to_string(&path).unwrap().replace(&case.made[0].name, base);
    std::fs::write(&path, text).unwrap();
    provider(&case.storage).remove(base, &Call::default()).await.unwrap();
    assert!(!case.storage.join(base).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_that_cannot_be_read_is_removed_if_nothing_needs_it() {
    let guest = Guest::new(17, 3).await;
    let case = guest.copy();
    let bench = provider(&case.storage);
    let remove = async |name: &str| bench.remove(name, &Call::default()).await;
    let [base, middle, newest] = [0, 1, 2].map(|at| case.made[at].name.as_str());
    std::fs::remove_file(case.storage.join(middle).join("manifest.json")).unwrap();
    let error = remove(middle).await.unwrap_err();
    assert_eq!(
        (error.kind, &error.dependents[..]),
        (Kind::HasDependents, &[newest.to_owned()][..])
    );
    assert!(case.storage.join(middle).exists());
    // The images alone say so.
    std::fs::write(case.storage.join(newest).join("manifest.json"), "{").unwrap();
    let error = remove(middle).await.unwrap_err();
    assert!(error.message.contains(&format!("{newest} builds upon it")), "{error}");
    std::fs::write(case.storage.join(newest).join("protected"), "").unwrap();
    assert_eq!(remove(newest).await.unwrap_err().kind, Kind::Protected);
    bench.set_protected(newest, false, &Call::default()).await.unwrap();
    for name in [newest, middle] {
        remove(name).await.unwrap();
        assert!(!case.storage.join(name).exists());
    }
    case.activate().await;
    assert!(case.leftovers().is_empty() && case.storage.join(base).exists());
    // Nothing that is somebody's own, and nothing of which nobody knows whose it is.
    for (name, file) in [("vzdump-qemu-1-2026_photos", "one.png"), ("mine", "qemu-server.conf")] {
        std::fs::create_dir(case.storage.join(name)).unwrap();
        std::fs::write(case.storage.join(name).join(file), "x").unwrap();
        remove(name).await.unwrap_err();
        assert!(case.storage.join(name).join(file).exists());
    }
}

/// The archive that a removal was replacing may be among what is left.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_is_left_goes_while_a_replacement_is_unfinished() {
    let guest = Guest::new(16, 2).await;
    let base = &guest.made[0].name;
    for step in 1.. {
        let case = guest.copy();
        assert!(!removes_until(&case, base, step, false).await, "it was never between two steps");
        if case.storage.join(&case.made[1].name).exists() {
            continue;
        }
        let begins = |begin: &str| {
            let left = case.leftovers();
            left.into_iter()
                .find(|name| name.starts_with(begin))
                .map(|name| case.storage.join(name))
        };
        let merged = begins(".tmp-merge-").unwrap();
        let replaced = begins(".tmp-dead-").unwrap();
        // For a while nobody can tell what it is.
        let (manifest, elsewhere) = (merged.join("manifest.json"), case.storage.join("elsewhere"));
        std::fs::rename(&manifest, &elsewhere).unwrap();
        case.activate().await;
        assert!(replaced.exists() && merged.exists(), "{:?}", case.leftovers());
        std::fs::rename(&elsewhere, &manifest).unwrap();
        // It cannot be removed as a file.
        std::fs::create_dir(merged.join("committing")).unwrap();
        case.activate().await;
        assert!(replaced.join("manifest.json").exists(), "{:?}", case.leftovers());
        std::fs::remove_dir(case.storage.join(&case.made[1].name).join("committing")).unwrap();
        case.activate().await;
        case.check("finished").await;
        break;
    }
}

/// Of an archive that has lost its manifest, any file that is left tells what it was.
#[tokio::test(flavor = "multi_thread")]
async fn an_archive_without_its_manifest_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let bench = provider(dir.path());
    bench.activate(&Call::default()).await.unwrap();
    let mut expected = Vec::new();
    for (number, file) in
        ["tree.tar.zst", "tree.blake3", "scsi0.blake3", "lxc.conf", "qemu-server.conf"]
            .iter()
            .enumerate()
    {
        let name = format!("vzdump-lxc-{}-2026_01_02-03_04_05", number + 1);
        std::fs::create_dir(dir.path().join(&name)).unwrap();
        std::fs::write(dir.path().join(&name).join(file), "x").unwrap();
        expected.push(name);
    }
    std::fs::create_dir(dir.path().join("photos")).unwrap();
    std::fs::write(dir.path().join("photos/one.png"), "x").unwrap();
    let mut found = bench.unreadable(&Call::default()).await.unwrap();
    found.sort();
    assert_eq!(found, expected);
}

/// A file system in RAM; unmounted with the test.
struct Mounted(PathBuf);

impl Mounted {
    fn new(path: &Path, size_bytes: u64) -> Option<Self> {
        std::fs::create_dir_all(path).unwrap();
        let options = format!("size={size_bytes}");
        let mut mount = std::process::Command::new("mount");
        let status = mount.args(["-t", "tmpfs", "-o", &options, "none"]).arg(path).status();
        status.is_ok_and(|status| status.success()).then(|| Self(path.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0).status();
    }
}

/// Needs root, to mount a small file system.
#[tokio::test(flavor = "multi_thread")]
async fn a_storage_that_becomes_full_changes_nothing() {
    let guest = Guest::new(13, 3).await;
    let used_bytes = |path: &Path| {
        let output = run("du", &["-sB1", text(path)]);
        output.split('\t').next().unwrap().parse::<u64>().unwrap()
    };
    let used = used_bytes(&guest.bench.storage());
    let base = used_bytes(&guest.bench.storage().join(&guest.made[0].name));
    let (mut before_copy, mut after_copy) = (0, 0);
    // First too small for the copy of the base, then for what is written over it.
    for step in 0..32 {
        let more = (1 + step) * (base / 16);
        let path = guest.bench.path().join(format!("small-{more}"));
        let Some(_mounted) = Mounted::new(&path, used + more) else {
            eprintln!("skipped: mounting a tmpfs needs root");
            return;
        };
        let source = format!("{}/.", text(&guest.bench.storage()));
        run("cp", &["-a", &source, text(&path)]);
        let mut case = Case { storage: path, made: guest.made.clone() };
        let gone = case.made[0].name.clone();
        let removed = provider(&case.storage).remove(&gone, &Call::default()).await;
        let what = format!("{more} bytes were free: {removed:?}");
        let Err(error) = removed else {
            case.made.remove(0);
            case.check(&what).await;
            break;
        };
        assert_eq!(error.kind, Kind::NoSpace, "{error}");
        let counter =
            if error.message.contains("needs") { &mut before_copy } else { &mut after_copy };
        *counter += 1;
        if *counter == 1 {
            case.check(&what).await;
        }
    }
    assert!(before_copy > 0 && after_copy > 0, "{before_copy} and {after_copy} had too little");
}
