// SPDX-License-Identifier: MIT OR Apache-2.0
//! The storage side: archives in a directory.

use std::fs;
use std::path::{Path, PathBuf};

use provider_api::{
    Archive, CommitOutcome, Damage, Error, GuestConfig, GuestKind, Kind, Result, Uuid, Verified,
    VerifyOptions, VerifyReport, notes_line,
};
use serde::{Deserialize, Serialize};

use super::{Fault, Setup, other};

/// What is known of an archive.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) kind: GuestKind,
    pub(crate) guest_id: u32,
    pub(crate) time_s: i64,
    /// Counts the commits of the storage.
    pub(crate) number: u64,
    pub(crate) commit_id: Option<Uuid>,
    pub(crate) disks: Vec<Disk>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Disk {
    pub(crate) device: String,
    pub(crate) size_bytes: u64,
    pub(crate) generation: Option<String>,
    pub(crate) checksum: u64,
}

/// FNV-1a, which sees each flipped bit.
pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[derive(Debug, Clone)]
pub(crate) struct Store {
    pub(crate) setup: Setup,
}

fn io(what: &str) -> impl FnOnce(std::io::Error) -> Error + '_ {
    move |error| Error::io(format!("{what} failed."), error)
}

impl Store {
    pub(crate) fn new(setup: Setup) -> Self {
        Self { setup }
    }

    pub(crate) fn archives(&self) -> PathBuf {
        self.setup.dir.join("archives")
    }

    pub(crate) fn temporary(&self, name: &str) -> PathBuf {
        let shared = self.setup.has(Fault::OneTemporaryPlace);
        self.setup.dir.join("tmp").join(if shared { "one" } else { name })
    }

    /// What dead runs left is only known not to be anybody's after a while; here it stays.
    pub(crate) fn prepare(&self) -> Result<()> {
        if self.setup.has(Fault::ActivateTakesAll) {
            let _ = fs::remove_dir_all(self.setup.dir.join("tmp"));
        }
        for part in ["archives", "tmp", "refused"] {
            fs::create_dir_all(self.setup.dir.join(part)).map_err(io("Making the storage"))?;
        }
        Ok(())
    }

    /// The path of an archive that is there.
    pub(crate) fn path(&self, archive: &str) -> Result<PathBuf> {
        let path = self.archives().join(archive);
        if path.join("manifest").is_file() {
            return Ok(path);
        }
        let kind = if self.setup.has(Fault::UnknownIsIo) { Kind::Io } else { Kind::NotFound };
        Err(Error::new(kind, format!("There is no archive {archive}.")))
    }

    pub(crate) fn manifest(path: &Path) -> Result<Manifest> {
        let text = fs::read(path.join("manifest")).map_err(io("Reading a manifest"))?;
        serde_json::from_slice(&text)
            .map_err(|error| Error::new(Kind::Corrupt, format!("A manifest is damaged: {error}.")))
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    /// All archives with their names, oldest first.
    pub(crate) fn manifests(&self) -> Result<Vec<(String, Manifest)>> {
        let mut all = Vec::new();
        for name in Self::names(&self.archives()) {
            // One that is removed meanwhile is none.
            if let Ok(manifest) = Self::manifest(&self.archives().join(&name)) {
                all.push((name, manifest));
            }
        }
        all.sort_by_key(|(_, manifest)| manifest.number);
        Ok(all)
    }

    pub(crate) fn list(&self) -> Result<Vec<Archive>> {
        let mut list: Vec<Archive> = self
            .manifests()?
            .into_iter()
            .map(|(name, manifest)| self.entry(name, &manifest))
            .collect();
        if self.setup.has(Fault::DuplicateInList) {
            list.extend(list.first().cloned());
        }
        if self.setup.has(Fault::ListedEarly) || self.setup.has(Fault::CrashLeavesArchive) {
            let tmp = self.setup.dir.join("tmp");
            let is_early = self.setup.has(Fault::ListedEarly);
            for name in Self::names(&tmp) {
                let path = tmp.join(&name);
                let is_dead = !path.join("alive").exists();
                if let Ok(manifest) = Self::manifest(&path)
                    && (is_early || is_dead)
                {
                    list.push(self.entry(name, &manifest));
                }
            }
        }
        Ok(list)
    }

    fn entry(&self, name: String, manifest: &Manifest) -> Archive {
        let wrong = |fault| self.setup.has(fault);
        let path = self.archives().join(&name);
        let text = |file: &str| fs::read_to_string(path.join(file)).unwrap_or_default();
        let verified: Option<Verified> = serde_json::from_str(&text("verified")).ok();
        Archive {
            subtype: if wrong(Fault::WrongKind) { GuestKind::Lxc } else { manifest.kind },
            guest_id: manifest.guest_id,
            time_s: if wrong(Fault::WrongTime) { 0 } else { manifest.time_s },
            size_bytes: manifest.disks.iter().map(|disk| disk.size_bytes).sum(),
            base: wrong(Fault::BaseIsUnlisted).then(|| "gone".to_owned()),
            commit_id: manifest.commit_id,
            protected: text("protected") == "1",
            notes: notes_line(&text("notes")),
            verified,
            name,
        }
    }

    pub(crate) fn text(&self, archive: &str, file: &str) -> Result<String> {
        let path = self.path(archive)?.join(file);
        Ok(fs::read_to_string(path).unwrap_or_default())
    }

    /// Replaces a small file in one step.
    pub(crate) fn set(&self, archive: &str, file: &str, content: &[u8]) -> Result<()> {
        let path = self.path(archive)?;
        let new = path.join(format!("{file}.new"));
        fs::write(&new, content).map_err(io("Writing"))?;
        fs::rename(new, path.join(file)).map_err(io("Renaming"))
    }

    pub(crate) fn guest_config(&self, archive: &str) -> Result<GuestConfig> {
        let path = self.path(archive)?;
        let mut config = fs::read(path.join("config")).map_err(io("Reading"))?;
        if self.setup.has(Fault::ConfigIsText) {
            config = String::from_utf8_lossy(&config).into_owned().into_bytes();
        }
        let firewall = fs::read(path.join("firewall")).ok();
        let is_lost = self.setup.has(Fault::FirewallLost);
        Ok(GuestConfig { config, firewall: firewall.filter(|_| !is_lost) })
    }

    /// Each archive has all of its data, so nothing needs to be merged.
    pub(crate) fn remove(&self, archive: &str) -> Result<()> {
        let restored = self.setup.lock.lock().unwrap();
        let is_restored = restored.iter().any(|name| name == archive);
        if is_restored && !self.setup.has(Fault::RemoveTakesRestored) {
            return Err(Error::new(Kind::InUse, format!("{archive} is being restored.")));
        }
        let path = self.path(archive)?;
        let is_protected = self.text(archive, "protected")? == "1";
        if is_protected && !self.setup.has(Fault::KeepsProtectedNot) {
            return Err(Error::new(Kind::Protected, format!("{archive} is protected.")));
        }
        let all = self.manifests()?;
        let at = all.iter().position(|(name, _)| name == archive).unwrap_or(0);
        let next = all[at + 1..].iter().find(|(_, next)| next.guest_id == all[at].1.guest_id);
        if let Some((next, _)) = next {
            if self.setup.has(Fault::RemoveTakesNext) {
                fs::remove_dir_all(self.archives().join(next)).map_err(io("Removing"))?;
            }
            if self.setup.has(Fault::RemoveIsRefused) {
                return Err(Error::has_dependents(archive, Vec::new()));
            }
        }
        fs::remove_dir_all(path).map_err(io("Removing"))?;
        if self.setup.has(Fault::SweepTakesUnderWay) {
            self.sweep()?;
        }
        Ok(())
    }

    /// Takes what no archive has.
    fn sweep(&self) -> Result<()> {
        let tmp = self.setup.dir.join("tmp");
        for dir in Self::names(&tmp).iter().map(|name| tmp.join(name)) {
            for file in Self::names(&dir).into_iter().filter(|name| name.ends_with(".raw")) {
                let path = dir.join(file);
                let size_bytes = fs::metadata(&path).map_err(io("Sweeping"))?.len();
                let file = fs::File::create(path).map_err(io("Sweeping"))?;
                file.set_len(size_bytes).map_err(io("Sweeping"))?;
            }
        }
        Ok(())
    }

    pub(crate) fn verify(&self, archive: &str, options: &VerifyOptions) -> Result<VerifyReport> {
        let path = self.path(archive)?;
        let mut report = VerifyReport::default();
        let is_lazy = self.setup.has(Fault::VerifiesFirstDisk);
        let disks = Self::manifest(&path)?.disks.into_iter();
        for disk in disks.take(if is_lazy { 1 } else { usize::MAX }) {
            let file = path.join(format!("{}.raw", disk.device));
            let content = fs::read(file).map_err(io("Reading a disk"))?;
            report.read_bytes += content.len() as u64;
            report.blocks += 1;
            let is_wrong = checksum(&content) != disk.checksum;
            if self.setup.has(Fault::FalseAlarm) || is_wrong && !self.setup.has(Fault::BlindVerify)
            {
                report.add(Damage {
                    archive: archive.to_owned(),
                    device: Some(disk.device),
                    area: None,
                    problem: "Its checksum is another one.".to_owned(),
                });
            }
        }
        let verified = Verified {
            time_s: 1_800_000_000,
            extent: options.extent,
            damage_count: report.damage_count,
        };
        let text = serde_json::to_vec(&verified).map_err(|error| other(error.to_string()))?;
        self.set(archive, "verified", &text)?;
        Ok(report)
    }

    fn refusal(&self, id: Uuid) -> PathBuf {
        self.setup.dir.join("refused").join(id.to_string())
    }

    pub(crate) fn outcome(&self, id: Uuid) -> Result<CommitOutcome> {
        if self.setup.has(Fault::PendingForEver) {
            return Ok(CommitOutcome::Pending);
        }
        if self.setup.has(Fault::ForgetsCommits) {
            return Ok(CommitOutcome::NotCommitted);
        }
        let _lock = self.setup.lock.lock().unwrap();
        let committed = self.manifests()?.into_iter().find(|(_, m)| m.commit_id == Some(id));
        if let Some((archive, _)) = committed {
            return Ok(CommitOutcome::Committed { archive });
        }
        // From now on it never may be.
        if !self.setup.has(Fault::NoTombstone) {
            fs::write(self.refusal(id), b"").map_err(io("Refusing a commit"))?;
        }
        Ok(CommitOutcome::NotCommitted)
    }

    /// Makes a temporary directory an archive, in one step.
    pub(crate) fn commit(&self, name: &str, mut manifest: Manifest, id: Uuid) -> Result<()> {
        let _lock = self.setup.lock.lock().unwrap();
        if self.refusal(id).exists() && !self.setup.has(Fault::CommitsAnyway) {
            return Err(other("The commit was told to be none."));
        }
        manifest.commit_id = Some(id);
        let last = self.manifests()?.last().map(|(_, manifest)| manifest.number);
        manifest.number = last.unwrap_or(0) + 1;
        let tmp = self.temporary(name);
        let text = serde_json::to_vec(&manifest).map_err(|error| other(error.to_string()))?;
        fs::write(tmp.join("manifest"), text).map_err(io("Writing a manifest"))?;
        fs::rename(tmp, self.archives().join(name)).map_err(io("Renaming"))
    }
}
