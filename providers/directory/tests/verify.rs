// SPDX-License-Identifier: MIT OR Apache-2.0
//! Verification: every bit that matters is found when it flips, and nothing else is called damage.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use common::{Bench, GuestDisk, LIMIT, Random, Recorder, provider, run, scribble, text};
use provider_api::{
    Archive, BitmapRequest, Call, DAMAGE_MAX, Kind, Progress, Provider, Result, Uuid, VerifyExtent,
    VerifyOptions, VerifyReport,
};

const ALL: VerifyExtent = VerifyExtent::All;

fn sample(percent: u8, seed: u32) -> VerifyExtent {
    VerifyExtent::Sample { percent, seed }
}

/// One guest with one disk, three archives deep, and what the disk was at each.
struct Chain {
    bench: Bench,
    names: Vec<String>,
    references: Vec<PathBuf>,
    random: Random,
}

impl Chain {
    async fn new(seed: u64) -> Self {
        let bench = Bench::new().await;
        let disk = GuestDisk::create(bench.path(), "scsi0", (9 << 20) + 512, 65536);
        let mut random = Random::new(seed);
        let (mut names, mut references) = (Vec::new(), Vec::new());
        for at in 0..3 {
            scribble(&disk, &mut random, if at == 0 { 40 } else { 6 }).await;
            references.push(disk.reference(&format!("at-{at}")));
            names.push(bench.back_up(1, &[&disk], &format!("g{at}")).await.unwrap().0);
        }
        Self { bench, names, references, random }
    }

    fn top(&self) -> &str {
        &self.names[2]
    }

    fn file(&self, archive: usize, file: &str) -> PathBuf {
        self.bench.storage().join(&self.names[archive]).join(file)
    }

    async fn verify(&self, archive: &str, extent: VerifyExtent) -> Result<VerifyReport> {
        verify(&self.bench.storage(), archive, extent).await
    }

    /// The top archive is found damaged.
    async fn must_be_found(&self, what: &str) -> VerifyReport {
        let report = self.verify(self.top(), ALL).await.unwrap();
        assert!(!report.is_sound(), "{what} is not found");
        assert!(!report.damage.is_empty() && report.damage.len() <= DAMAGE_MAX);
        report
    }

    async fn must_be_sound(&self) {
        let report = self.verify(self.top(), ALL).await.unwrap();
        assert!(report.is_sound(), "{:?}", report.damage);
    }

    async fn listed(&self, archive: &str) -> Archive {
        let list = self.bench.provider.list(&self.bench.call).await.unwrap();
        list.into_iter().find(|listed| listed.name == archive).unwrap()
    }

    /// Whether QEMU still reads the top archive's disk as it was.
    fn reads_right(&self) -> bool {
        let (image, reference) = (self.file(2, "scsi0.qcow2"), &self.references[2]);
        let compare = Command::new("qemu-img")
            .args(["compare", "-f", "qcow2", "-F", "raw", text(&image), text(reference)])
            .output();
        compare.unwrap().status.success()
    }

    /// Flips one bit, lets the verification judge, and flips it back. Whether it was found.
    async fn flip(&self, file: &Path, position: u64, bit: u64) -> bool {
        let handle = std::fs::OpenOptions::new().read(true).write(true).open(file).unwrap();
        let mut byte = [0];
        handle.read_exact_at(&mut byte, position).unwrap();
        handle.write_all_at(&[byte[0] ^ (1 << bit)], position).unwrap();
        let report = self.verify(self.top(), ALL).await.unwrap();
        if report.is_sound() {
            let what = format!("bit {bit} of byte {position} of {}", file.display());
            assert!(self.reads_right(), "{what} matters and is not found");
        }
        handle.write_all_at(&byte, position).unwrap();
        !report.is_sound()
    }
}

async fn verify(storage: &Path, archive: &str, extent: VerifyExtent) -> Result<VerifyReport> {
    let options = VerifyOptions { extent, known_sound: Vec::new() };
    provider(storage).verify(archive, &options, &Recorder::default(), &Call::default()).await
}

fn number(file: &Path, position: u64) -> u64 {
    let mut bytes = [0; 8];
    std::fs::File::open(file).unwrap().read_exact_at(&mut bytes, position).unwrap();
    u64::from_be_bytes(bytes)
}

/// Offsets of the L1 table and of the first L2 table.
fn tables(image: &Path) -> (u64, u64) {
    let l1 = number(image, 40);
    (l1, number(image, l1) & 0x00ff_ffff_ffff_fe00)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sound_archive_is_found_sound_and_that_is_remembered() {
    let chain = Chain::new(1).await;
    assert_eq!(chain.listed(chain.top()).await.verified, None);
    let recorder = Recorder::default();
    let options = VerifyOptions { extent: ALL, known_sound: Vec::new() };
    let (provider, call) = (&chain.bench.provider, &chain.bench.call);
    let all = provider.verify(chain.top(), &options, &recorder, call).await.unwrap();
    assert!(all.is_sound(), "{:?}", all.damage);
    assert_eq!(all.blocks, 3 * 3, "three blocks of three archives");
    let (done, total, _) = recorder.last.lock().unwrap().unwrap();
    assert!(done == total && done > 0 && all.read_bytes >= done);
    let verified = chain.listed(chain.top()).await.verified.unwrap();
    assert_eq!((verified.extent, verified.damage_count), (ALL, 0));
    assert!(verified.time_s > 1_700_000_000);
    // Another process sees it too; the archives below were read, but not asked about.
    assert_eq!(chain.listed(&chain.names[0]).await.verified, None);

    // What is known to be sound is not read once more.
    let options = VerifyOptions { known_sound: chain.names[..2].to_vec(), ..options };
    for name in &chain.names[..2] {
        assert!(chain.verify(name, ALL).await.unwrap().is_sound());
    }
    let own = provider.verify(chain.top(), &options, &recorder, call).await.unwrap();
    assert!(own.is_sound() && own.blocks == 3 && own.read_bytes < all.read_bytes);
    // Unless it was read otherwise.
    assert!(chain.verify(&chain.names[1], sample(50, 1)).await.unwrap().is_sound());
    let own = provider.verify(chain.top(), &options, &recorder, call).await.unwrap();
    assert_eq!(own.blocks, 6);

    let mut blocks = Vec::new();
    for seed in 0..20 {
        let some = chain.verify(chain.top(), sample(40, seed)).await.unwrap();
        assert!(some.is_sound(), "{:?}", some.damage);
        assert_eq!(some, chain.verify(chain.top(), sample(40, seed)).await.unwrap());
        blocks.push(some.blocks);
    }
    blocks.sort_unstable();
    blocks.dedup();
    assert!(blocks.len() > 1, "each seed chose the same number of blocks");
    let full = chain.verify(chain.top(), sample(100, 1)).await.unwrap();
    assert_eq!(full, all);
    let verified = chain.listed(chain.top()).await.verified.unwrap();
    assert_eq!(verified.extent, sample(100, 1));
    for percent in [0, 101] {
        let error = chain.verify(chain.top(), sample(percent, 1)).await.unwrap_err();
        assert_eq!(error.kind, Kind::Invalid);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_of_a_small_file_is_always_found() {
    let mut chain = Chain::new(2).await;
    for archive in 0..3 {
        for file in ["manifest.json", "scsi0.blake3", "qemu-server.conf", "qemu-server.fw"] {
            let path = chain.file(archive, file);
            // Only the archive itself needs its configurations.
            if archive != 2 && file.starts_with("qemu-server") {
                continue;
            }
            let length = std::fs::metadata(&path).unwrap().len();
            for _ in 0..40 {
                let (position, bit) = (chain.random.below(length), chain.random.below(8));
                let found = chain.flip(&path, position, bit).await;
                assert!(found, "bit {bit} of byte {position} of {}", path.display());
            }
        }
    }
    chain.must_be_sound().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_of_an_image_is_found_if_it_matters() {
    let mut chain = Chain::new(3).await;
    let mut found = [0; 3];
    for archive in 0..3 {
        let image = chain.file(archive, "scsi0.qcow2");
        let length = std::fs::metadata(&image).unwrap().len();
        let (l1, l2) = tables(&image);
        assert!(l1 > 0 && l2 > 0);
        for at in 0..80 {
            // Anywhere; in the entries of the disk's 145 clusters, and of some behind; the way there.
            let (kind, position) = match at % 4 {
                0 => (0, chain.random.below(length)),
                1 | 2 => (1, l2 + chain.random.below(160 * 8)),
                _ => (2, l1 + chain.random.below(8)),
            };
            let bit = chain.random.below(8);
            found[kind] += u32::from(chain.flip(&image, position, bit).await);
        }
    }
    assert!(found.iter().all(|count| *count > 10), "{found:?}");
    chain.must_be_sound().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_of_an_images_header_is_found_if_it_matters() {
    let chain = Chain::new(4).await;
    let image = chain.file(1, "scsi0.qcow2");
    let mut found = 0;
    for position in 0..112 {
        for bit in 0..8 {
            found += u32::from(chain.flip(&image, position, bit).await);
        }
    }
    assert!(found > 400, "{found}");
    chain.must_be_sound().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_named_and_counted() {
    let chain = Chain::new(5).await;
    let image = chain.file(0, "scsi0.qcow2");
    // Every data cluster of the full archive, by its table.
    let (_, l2) = tables(&image);
    let handle = std::fs::OpenOptions::new().read(true).write(true).open(&image).unwrap();
    for entry in 0..145 {
        let cluster = number(&image, l2 + entry * 8) & 0x00ff_ffff_ffff_fe00;
        if cluster != 0 {
            handle.write_all_at(&[0xa5; 512], cluster).unwrap();
        }
    }
    let report = chain.must_be_found("data").await;
    assert!(report.damage_count >= 2, "{:?}", report.damage);
    let first = &report.damage[0];
    assert_eq!((&first.archive, first.device.as_deref()), (&chain.names[0], Some("scsi0")));
    let area = first.area.unwrap();
    assert!(area.length_bytes > 0 && area.offset + area.length_bytes <= (9 << 20) + 512);
    assert!(first.problem.contains("checksum"), "{}", first.problem);
    let verified = chain.listed(chain.top()).await.verified.unwrap();
    assert_eq!(verified.damage_count, report.damage_count);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_built_upon_what_was_found_damaged() {
    let bench = Bench::new().await;
    let disk = GuestDisk::create(bench.path(), "scsi0", (9 << 20) + 512, 65536);
    scribble(&disk, &mut Random::new(12), 40).await;
    let (base, _) = bench.back_up(1, &[&disk], "g0").await.unwrap();
    bench.back_up(1, &[&disk], "g1").await.unwrap();
    let plan = async || {
        let mut guest = bench.start(1).await;
        let request = guest.plan_volumes(&[disk.info()], &bench.call).await.unwrap().remove(0);
        guest.abort("only planned", &bench.call).await.unwrap();
        request
    };
    let is_known = |request: &BitmapRequest| matches!(request, BitmapRequest::Use { generation, .. } if generation == "g1");
    assert!(is_known(&plan().await));
    let image = bench.storage().join(&base).join("scsi0.qcow2");
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&image).unwrap();
    let (_, l2) = tables(&image);
    let cluster = (0..145).map(|entry| number(&image, l2 + entry * 8) & 0x00ff_ffff_ffff_fe00);
    let cluster = cluster.into_iter().find(|cluster| *cluster != 0).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, cluster).unwrap();
    file.write_all_at(&[!byte[0]], cluster).unwrap();
    // Nobody knows of it yet.
    assert!(is_known(&plan().await));
    assert!(!verify(&bench.storage(), &base, ALL).await.unwrap().is_sound());
    // A sample that does not come across it does not make it sound.
    for seed in 0..4 {
        let request = plan().await;
        assert!(matches!(request, BitmapRequest::New), "{request:?}");
        verify(&bench.storage(), &base, sample(1, seed)).await.unwrap();
    }
    file.write_all_at(&byte, cluster).unwrap();
    assert!(verify(&bench.storage(), &base, ALL).await.unwrap().is_sound());
    assert!(is_known(&plan().await));
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_cut_and_foreign_files_are_damage() {
    let chain = Chain::new(6).await;
    for archive in 0..3 {
        for file in ["manifest.json", "scsi0.qcow2", "scsi0.blake3"] {
            let (path, what) = (chain.file(archive, file), format!("{file} of {archive}"));
            let aside = chain.bench.path().join("aside");
            std::fs::rename(&path, &aside).unwrap();
            chain.must_be_found(&format!("missing {what}")).await;
            std::os::unix::fs::symlink(&aside, &path).unwrap();
            chain.must_be_found(&format!("link in place of {what}")).await;
            std::fs::remove_file(&path).unwrap();
            let length = std::fs::copy(&aside, &path).unwrap();
            let handle = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            handle.set_len(length - 1).unwrap();
            chain.must_be_found(&format!("cut {what}")).await;
            handle.set_len(0).unwrap();
            chain.must_be_found(&format!("empty {what}")).await;
            std::fs::rename(&aside, &path).unwrap();
        }
    }
    chain.must_be_sound().await;

    let image = chain.file(1, "scsi0.qcow2");
    let kept = std::fs::read(&image).unwrap();
    run(
        "qemu-img",
        &["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "/etc/hostname", text(&image)],
    );
    let report = chain.must_be_found("a foreign backing file").await;
    assert!(report.damage[0].problem.contains("/etc/hostname"), "{:?}", report.damage);
    std::fs::write(&image, kept).unwrap();

    // Without its manifest an archive is not listed, but it is not forgotten.
    let (provider, call) = (&chain.bench.provider, &chain.bench.call);
    assert!(provider.unreadable(call).await.unwrap().is_empty());
    std::fs::create_dir(chain.bench.storage().join("somebodys")).unwrap();
    std::fs::remove_file(chain.file(0, "manifest.json")).unwrap();
    std::fs::write(chain.file(1, "manifest.json"), "{").unwrap();
    let mut unreadable = provider.unreadable(call).await.unwrap();
    unreadable.sort();
    assert_eq!(unreadable, chain.names[..2]);
    for name in unreadable {
        assert!(!chain.verify(&name, ALL).await.unwrap().is_sound());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_that_is_not_there_is_an_error() {
    let chain = Chain::new(7).await;
    for (name, kind) in [("vzdump-qemu-1-none", Kind::NotFound), ("a/b", Kind::Invalid)] {
        assert_eq!(chain.verify(name, ALL).await.unwrap_err().kind, kind);
    }
    // A storage whose file system is not mounted has no damaged archives.
    let empty = tempfile::tempdir().unwrap();
    assert!(verify(empty.path(), chain.top(), ALL).await.is_err());
}

/// Stops the verification at its first report until it may go on.
struct Gate {
    reached: Sender<()>,
    go_on: Mutex<Receiver<()>>,
}

impl Progress for Gate {
    fn report(&self, _device: &str, _done_bytes: u64, _total_bytes: u64, _zero_bytes: u64) {
        // Both fail when the test has gone on.
        let _ = self.reached.send(());
        let _ = self.go_on.lock().unwrap().recv_timeout(LIMIT);
    }
    fn log(&self, line: &str) {
        println!("{line}");
    }
}

/// A verification in another task, stopped in the middle, and what lets it go on.
async fn stopped(
    chain: &Chain,
    call: &Call,
) -> (tokio::task::JoinHandle<Result<VerifyReport>>, Sender<()>) {
    let (reached, is_reached) = channel();
    let (go_on, may_go_on) = channel();
    let gate = Gate { reached, go_on: Mutex::new(may_go_on) };
    let (storage, top, call) = (chain.bench.storage(), chain.top().to_owned(), call.clone());
    let task = tokio::spawn(async move {
        let options = VerifyOptions { extent: ALL, known_sound: Vec::new() };
        provider(&storage).verify(&top, &options, &gate, &call).await
    });
    tokio::task::spawn_blocking(move || is_reached.recv_timeout(LIMIT)).await.unwrap().unwrap();
    (task, go_on)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_verification_ends_and_is_not_remembered() {
    let chain = Chain::new(8).await;
    let call = Call::default();
    let (task, go_on) = stopped(&chain, &call).await;
    call.cancel.cancel();
    drop(go_on);
    let error = tokio::time::timeout(LIMIT, task).await.unwrap().unwrap().unwrap_err();
    assert_eq!(error.kind, Kind::Cancelled);
    assert_eq!(chain.listed(chain.top()).await.verified, None);

    // One that nobody waits for any more lets go of the archives.
    let (task, go_on) = stopped(&chain, &Call::default()).await;
    task.abort();
    drop(go_on);
    let until = std::time::Instant::now() + LIMIT;
    while let Err(error) = chain.bench.provider.remove(chain.top(), &Call::default()).await {
        assert!(error.kind == Kind::InUse && std::time::Instant::now() < until, "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_being_verified_is_not_removed() {
    let chain = Chain::new(9).await;
    let (task, go_on) = stopped(&chain, &Call::default()).await;
    for name in [&chain.names[0], &chain.names[2]] {
        let error = chain.bench.provider.remove(name, &Call::default()).await.unwrap_err();
        assert_eq!(error.kind, Kind::InUse, "{error}");
    }
    drop(go_on);
    assert!(task.await.unwrap().unwrap().is_sound());
    chain.bench.provider.remove(&chain.names[1], &Call::default()).await.unwrap();
    // It was written anew.
    assert_eq!(chain.listed(chain.top()).await.verified, None);
    chain.must_be_sound().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_anew_is_read_although_it_was_known() {
    let chain = Chain::new(11).await;
    for name in &chain.names {
        assert!(chain.verify(name, ALL).await.unwrap().is_sound());
    }
    let (provider, call) = (&chain.bench.provider, &chain.bench.call);
    provider.remove(&chain.names[0], call).await.unwrap();
    let options = VerifyOptions { extent: ALL, known_sound: chain.names[..2].to_vec() };
    let report = provider.verify(chain.top(), &options, &Recorder::default(), call).await.unwrap();
    assert!(report.is_sound());
    assert_eq!(report.blocks, 6, "the second archive is another one now");
}

/// Removals from all ends while everything is verified again and again.
#[tokio::test(flavor = "multi_thread")]
async fn a_removal_is_never_taken_for_damage() {
    let chain = Chain::new(10).await;
    for round in 0..4 {
        let storage = chain.bench.path().join(Uuid::new_v4().simple().to_string());
        run("cp", &["-a", text(&chain.bench.storage()), text(&storage)]);
        let mut tasks = Vec::new();
        for name in chain.names.clone() {
            let storage = storage.clone();
            tasks.push(tokio::spawn(async move {
                for extent in (0..30).map(|seed| sample(50, seed)) {
                    match verify(&storage, &name, extent).await {
                        Ok(report) => assert!(report.is_sound(), "{:?}", report.damage),
                        Err(error) => {
                            assert!([Kind::NotFound, Kind::InUse].contains(&error.kind), "{error}");
                        }
                    }
                    // Else a removal would hardly ever find the archives unused.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }));
        }
        let mut order = chain.names.clone();
        order.rotate_left(round % 3);
        for name in &order[..2] {
            let until = std::time::Instant::now() + LIMIT;
            while let Err(error) = provider(&storage).remove(name, &Call::default()).await {
                assert!(error.kind == Kind::InUse && std::time::Instant::now() < until, "{error}");
            }
        }
        for task in tasks {
            task.await.unwrap();
        }
        assert!(verify(&storage, &order[2], ALL).await.unwrap().is_sound());
    }
}
