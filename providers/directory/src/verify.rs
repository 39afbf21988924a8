// SPDX-License-Identifier: MIT OR Apache-2.0
//! The verification of one archive: all files it needs are read and compared with what was written.
//!
//! ```text
//! manifest        is byte by byte what its own hash and format say; of each archive of the chains
//! configurations  by the manifest
//! images          kind of file, size, header, backing file: as before each use, see `chain`
//! checksums       by the manifest
//! tree            of a container, by the manifest; files by their list, see `container::listing`
//! disks           by the checksums, archive by archive from the bottom of the chain, see `layer`
//! ```
//!
//! The guest's lock `use` is held from beginning to end, so nothing is removed or replaced meanwhile;
//! a manifest that does not even say whose it is, is read under the storage's lock. Damage never ends
//! the verification, but what builds on it (a list of checksums, an image that cannot be opened) is
//! not looked at.

mod layer;

use std::collections::HashSet;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use provider_api::{
    Call, Damage, DamagedArea, Error, Kind, Progress, Result, Verified, VerifyExtent,
    VerifyOptions, VerifyReport,
};
use rustix::io::Errno;
use tokio::sync::mpsc;

use crate::areas::Area;
use crate::attributes;
use crate::call::{blocking, check, corrupt, invalid};
use crate::chain::Chain;
use crate::container::{self, Witness};
use crate::files;
use crate::limits::{LOCK_WAIT, MANIFEST_BYTES_MAX};
use crate::manifest::{ContainerFormat, MANIFEST_FILE, Manifest, TREE_DIRECTORY, Tree};
use crate::storage::Storage;
use crate::usage::Guest;

use layer::{Choice, Layer};

/// Reports on their way from the thread that reads; it waits when they are not taken.
const NEWS_MAX: usize = 1;

/// What the thread that reads has to say.
enum News {
    Report { device: String, done_bytes: u64, total_bytes: u64 },
    Log(String),
}

/// Verifies an archive. Cancelling the call, or dropping the future, ends it between two blocks.
pub(crate) async fn verify(
    storage: Storage,
    archive: &str,
    options: &VerifyOptions,
    progress: &dyn Progress,
    call: &Call,
) -> Result<VerifyReport> {
    if let VerifyExtent::Sample { percent, .. } = options.extent
        && !(1..=100).contains(&percent)
    {
        return Err(invalid(format!("A sample of {percent} percent is not one of 1 to 100.")));
    }
    let call = Call { cancel: call.cancel.child_token(), deadline: call.deadline };
    let _end = call.cancel.clone().drop_guard();
    let (sender, mut news) = mpsc::channel(NEWS_MAX);
    let (archive, options) = (archive.to_owned(), options.clone());
    let work = blocking(move || {
        let findings =
            Findings { storage: storage.clone(), report: VerifyReport::default(), sender };
        Verification { storage, archive, options, call, findings }.run()
    });
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            biased;
            Some(news) = news.recv() => match news {
                News::Report { device, done_bytes, total_bytes } => {
                    progress.report(&device, done_bytes, total_bytes, 0);
                }
                News::Log(line) => progress.log(&line),
            },
            result = &mut work => return result,
        }
    }
}

/// What was found so far.
struct Findings {
    storage: Storage,
    report: VerifyReport,
    sender: mpsc::Sender<News>,
}

impl Findings {
    fn tell(&self, news: News) {
        // Fails when nobody waits any more; the call is cancelled then.
        let _ = self.sender.blocking_send(news);
    }

    fn damage(
        &mut self,
        archive: &str,
        device: Option<&str>,
        area: Option<Area>,
        problem: impl Into<String>,
    ) {
        let damage = Damage {
            archive: archive.to_owned(),
            device: device.map(str::to_owned),
            area: area
                .map(|area| DamagedArea { offset: area.start, length_bytes: area.length_bytes() }),
            problem: problem.into(),
        };
        self.report.add(damage);
    }

    /// Takes an error for damage, unless it says nothing about the archive.
    fn fault(
        &mut self,
        archive: &str,
        device: Option<&str>,
        area: Option<Area>,
        error: Error,
    ) -> Result<()> {
        if !is_damage(&error) || !files::is_directory(&self.storage.commits_path()) {
            return Err(error);
        }
        let mut problem = error.message.clone();
        if let Some(source) = &error.source {
            problem.push_str(&format!(" ({source})"));
        }
        self.damage(archive, device, area, problem);
        Ok(())
    }
}

/// Whether an error means that stored data is not what it was, or cannot be read.
fn is_damage(error: &Error) -> bool {
    match error.kind {
        Kind::Corrupt | Kind::NotFound => true,
        Kind::Io => {
            let source = error.source.as_ref().and_then(|s| s.downcast_ref::<io::Error>());
            // Others, such as too many open files, are this host's. Without a number it is the
            // reader of images that speaks.
            let of_media =
                [Errno::IO, Errno::BADMSG, Errno::UCLEAN, Errno::LOOP, Errno::ISDIR, Errno::NOTDIR];
            source.is_some_and(|e| {
                e.raw_os_error()
                    .is_none_or(|code| of_media.contains(&Errno::from_raw_os_error(code)))
            })
        }
        _ => false,
    }
}

/// Looks at the files of a container.
struct Eye<'a> {
    archive: &'a str,
    call: &'a Call,
    findings: &'a mut Findings,
    done_bytes: u64,
    /// What there probably is: holes are not read, and parts of blocks are not known.
    total_bytes: u64,
}

impl Eye<'_> {
    fn report(&self, total_bytes: u64) {
        let (device, done_bytes) = (TREE_DIRECTORY.to_owned(), self.done_bytes);
        self.findings.tell(News::Report { device, done_bytes, total_bytes });
    }
}

impl Witness for Eye<'_> {
    fn read(&mut self, bytes: u64) -> Result<()> {
        check(self.call, "The verification")?;
        if bytes > 0 {
            self.findings.report.read_bytes += bytes;
            self.findings.report.blocks += 1;
            self.done_bytes += bytes;
            self.report(self.total_bytes.max(self.done_bytes));
        }
        Ok(())
    }

    fn differs(&mut self, problem: String) {
        self.findings.damage(self.archive, None, None, problem);
    }

    fn fails(&mut self, error: Error) -> Result<()> {
        self.findings.fault(self.archive, None, None, error)
    }
}

struct Verification {
    storage: Storage,
    archive: String,
    options: VerifyOptions,
    call: Call,
    findings: Findings,
}

impl Verification {
    fn run(mut self) -> Result<VerifyReport> {
        let Some(manifest) = self.read_locked()? else { return Ok(self.findings.report) };
        let guest = Guest::new(&self.storage, manifest.subtype, manifest.guest_id);
        let _use = guest.begin_use_blocking(&self.call, LOCK_WAIT)?;
        // Again: before the lock a removal may have replaced it.
        let Some(manifest) = self.read_locked()? else { return Ok(self.findings.report) };
        if let Err(error) = crate::read_config(&self.storage, &self.archive) {
            self.findings.fault(&self.archive, None, None, error)?;
        }
        self.check_manifest(&self.archive.clone())?;
        let mut checked = HashSet::from([self.archive.clone()]);
        let mut disks = Vec::new();
        for disk in &manifest.disks {
            match Chain::load(&self.storage, &manifest, &disk.device) {
                Ok(chain) => disks.push((disk.device.as_str(), chain)),
                Err(error) => {
                    let device = Some(disk.device.as_str());
                    self.findings.fault(&self.archive, device, None, error)?;
                }
            }
        }
        for link in disks.iter().flat_map(|(_, chain)| chain.links()) {
            if checked.insert(link.archive.clone()) {
                self.check_manifest(&link.archive)?;
            }
        }
        self.check_disks(&disks)?;
        if let Some(tree) = &manifest.tree {
            self.check_tree(tree)?;
        }
        self.remember();
        Ok(self.findings.report)
    }

    /// The manifest; none, and damage, if it cannot be read. Under the storage's lock, which whoever
    /// takes an archive away or replaces it holds as well.
    fn read_locked(&mut self) -> Result<Option<Manifest>> {
        let lock = self.storage.must_lock_blocking(&self.call, LOCK_WAIT)?;
        let error = match self.storage.manifest(&self.archive) {
            Ok(manifest) => return Ok(Some(manifest)),
            Err(error) => error,
        };
        if error.kind == Kind::NotFound && !self.storage.exists(&self.archive)? {
            return Err(error);
        }
        drop(lock);
        self.findings.fault(&self.archive, None, None, error)?;
        Ok(None)
    }

    /// Compares a manifest, byte by byte, with what was once written.
    fn check_manifest(&mut self, archive: &str) -> Result<()> {
        let path = self.storage.archive_path(archive).join(MANIFEST_FILE);
        let checked = files::read(&path, MANIFEST_BYTES_MAX).and_then(|text| {
            let manifest = Manifest::parse(archive, &text)?;
            if manifest.blake3.is_none() {
                self.findings.tell(News::Log(format!(
                    "the manifest of {archive} has no checksum: it is of an early version"
                )));
            }
            if manifest.is_as_written(&text)? {
                Ok(())
            } else {
                Err(corrupt(format!("Manifest of {archive} does not match its checksum.")))
            }
        });
        checked.or_else(|error| self.findings.fault(archive, None, None, error))
    }

    /// Reads the files of a container, always all of them: they have one hash, or one list.
    fn check_tree(&mut self, tree: &Tree) -> Result<()> {
        let total_bytes = tree.file_size_bytes;
        if tree.format == ContainerFormat::Tree {
            let (device, total_bytes) = (TREE_DIRECTORY.to_owned(), tree.data_bytes);
            self.findings.tell(News::Report { device, done_bytes: 0, total_bytes });
        }
        let directory = self.storage.archive_path(&self.archive);
        let path = directory.join(tree.file());
        let (mut done_bytes, mut blocks) = (0_u64, 0);
        let checked = container::check(&path, tree, |bytes| {
            check(&self.call, "The verification")?;
            done_bytes += bytes;
            blocks += 1;
            let device = tree.file().to_owned();
            self.findings.tell(News::Report { device, done_bytes, total_bytes });
            Ok(())
        });
        self.findings.report.read_bytes += done_bytes;
        self.findings.report.blocks += blocks;
        match checked {
            // What builds on a damaged list is not looked at.
            Err(error) => return self.findings.fault(&self.archive, None, None, error),
            Ok(()) if tree.format == ContainerFormat::Tar => return Ok(()),
            Ok(()) => {}
        }
        let (archive, call) = (self.archive.as_str(), &self.call);
        let findings = &mut self.findings;
        let mut eye = Eye { archive, call, findings, done_bytes: 0, total_bytes: tree.data_bytes };
        let compared = container::check_files(&directory, &mut eye);
        if compared.is_ok() {
            eye.report(eye.done_bytes);
        }
        compared.or_else(|error| self.findings.fault(&self.archive, None, None, error))
    }

    fn check_disks(&mut self, disks: &[(&str, Chain)]) -> Result<()> {
        let choice = Choice { extent: self.options.extent };
        let mut plans = Vec::new();
        for (device, chain) in disks {
            let mut layers = Vec::new();
            let mut total_bytes: u64 = 0;
            for layer in self.layers(chain, device)? {
                match layer.data_bytes(&self.storage, &choice, &self.call) {
                    Ok(bytes) => {
                        total_bytes = total_bytes.saturating_add(bytes);
                        layers.push(layer);
                    }
                    Err(error) => {
                        self.findings.fault(&layer.archive, Some(device), None, error)?;
                    }
                }
            }
            let device = (*device).to_owned();
            self.findings.tell(News::Report { device: device.clone(), done_bytes: 0, total_bytes });
            plans.push((device, layers, total_bytes));
        }
        for (device, layers, total_bytes) in plans {
            let mut done_bytes: u64 = 0;
            for layer in layers {
                layer.check(&self.storage, &choice, &self.call, &mut self.findings, |bytes| {
                    done_bytes += bytes;
                    News::Report { device: device.clone(), done_bytes, total_bytes }
                })?;
            }
        }
        Ok(())
    }

    /// What is to be read for a disk, from the bottom of its chain.
    fn layers(&self, chain: &Chain, device: &str) -> Result<Vec<Layer>> {
        let mut layers = Vec::new();
        let mut rest = Some(chain.clone());
        while let Some(chain) = rest {
            let archive = chain.top_archive().to_owned();
            rest = chain.below();
            if archive != self.archive && self.is_known_sound(&archive) {
                continue;
            }
            let manifest = self.storage.manifest(&archive)?;
            let disk = manifest
                .disk(device)
                .cloned()
                .ok_or_else(|| corrupt(format!("Archive {archive} has no disk {device}.")))?;
            layers.push(Layer { archive, chain, disk });
        }
        layers.reverse();
        Ok(layers)
    }

    /// Whether an archive need not be read. A removal may have written it anew since the caller saw
    /// it; then nothing of its verification is left.
    fn is_known_sound(&self, archive: &str) -> bool {
        let is_same = |verified: Verified| {
            verified.damage_count == 0 && verified.extent == self.options.extent
        };
        self.options.known_sound.iter().any(|known| known == archive)
            && attributes::verified(&self.storage, archive).is_some_and(is_same)
    }

    /// Remembers the verification. What it found is true without that, too.
    fn remember(&self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut verified = Verified {
            time_s: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
            extent: self.options.extent,
            damage_count: self.findings.report.damage_count,
        };
        // What a sample does not come across is damaged all the same.
        if verified.extent != VerifyExtent::All
            && let Some(known) = attributes::verified(&self.storage, &self.archive)
        {
            verified.damage_count = verified.damage_count.max(known.damage_count);
        }
        let set = self.storage.must_lock_blocking(&self.call, LOCK_WAIT).and_then(|lock| {
            attributes::set_verified(&self.storage, &self.archive, &verified, &lock)
        });
        if let Err(error) = set {
            self.findings
                .tell(News::Log(format!("the verification cannot be remembered: {error}")));
        }
    }
}
