// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VM's configuration file, `qemu-server/<id>.conf`.
//!
//! ```text
//! #description                 comments before and between the keys
//! name: web                    the current configuration: "key: value"
//! scsi0: local:100/…,backup=0
//!
//! [PENDING]                    sections: pending changes, [special:…], one per snapshot
//! …
//! ```

use std::fmt;
use std::path::Path;

use super::{ConfigError, OptionList, raw_lines, read_text, to_text, write_atomically};

/// Keys that say where a VM is in its life, not what it is; a backup leaves them out.
const STATE_KEYS: [&str; 2] = ["lock", "parent"];

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Pair {
        key: String,
        value: String,
    },
    Section(String),
    Blank,
    Comment,
    /// Not understood; kept.
    Other,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    /// The line with its end.
    raw: String,
    kind: Kind,
}

/// A VM's configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VmConfig {
    lines: Vec<Line>,
}

/// A disk of a VM, as its configuration describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskEntry {
    /// The key, such as `scsi0`: also the device's name in QEMU and in archives.
    pub key: String,
    /// The volume, `local:100/vm-100-disk-0.raw`, or an absolute path.
    pub volume: String,
    /// The other items.
    pub options: OptionList,
    /// Whether backups include it.
    pub backup: bool,
    /// Whether it is a CD-ROM drive, which backups never include.
    pub is_cdrom: bool,
}

impl DiskEntry {
    fn parse(key: &str, value: &str) -> Result<Self, ConfigError> {
        let fault = |why: &str| ConfigError::Invalid(format!("The disk '{key}: {value}': {why}"));
        let mut options = OptionList::parse(value).map_err(|why| fault(&why))?;
        let volume = options.first.take().or_else(|| options.get("file").map(str::to_owned));
        let volume = volume.ok_or_else(|| fault("no volume is named."))?;
        options.remove("file");
        let is_cdrom = options.get("media") == Some("cdrom");
        let backup = options.flag("backup", true);
        Ok(Self { key: key.to_owned(), volume, options, backup, is_cdrom })
    }

    /// The value of the key, as the configuration has it.
    #[must_use]
    pub fn to_value(&self) -> String {
        let mut list = self.options.clone();
        list.first = Some(self.volume.clone());
        list.to_string()
    }
}

/// Takes `scsi12` apart.
#[must_use]
pub fn split_numbered(key: &str) -> Option<(&str, u32)> {
    let digits = key.len() - key.bytes().rev().take_while(u8::is_ascii_digit).count();
    let (prefix, number) = key.split_at(digits);
    let canonical = number == "0" || !number.starts_with('0');
    (!prefix.is_empty() && canonical).then_some(())?;
    Some((prefix, number.parse().ok()?))
}

/// Whether a key names a disk.
#[must_use]
pub fn is_disk_key(key: &str) -> bool {
    match split_numbered(key) {
        Some(("ide", n)) => n < 4,
        Some(("sata", n)) => n < 6,
        Some(("scsi", n)) => n < 31,
        Some(("virtio", n)) => n < 16,
        Some(("efidisk" | "tpmstate", n)) => n == 0,
        _ => false,
    }
}

impl VmConfig {
    /// Reads the text of a configuration. Lines that are not understood are kept, and told by
    /// [`VmConfig::not_understood`].
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let lines = raw_lines(text).map(|raw| Line { raw: raw.to_owned(), kind: classify(raw) });
        Self { lines: lines.collect() }
    }

    /// Reads a configuration from an archive.
    ///
    /// # Errors
    /// [`ConfigError::NotText`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, ConfigError> {
        Ok(Self::parse(&to_text(bytes)?))
    }

    /// Reads a configuration file; a missing one is `None`.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn read(path: &Path) -> Result<Option<Self>, ConfigError> {
        Ok(read_text(path)?.map(|text| Self::parse(&text)))
    }

    /// Replaces a configuration file in one step.
    ///
    /// # Errors
    /// [`ConfigError::Write`].
    pub fn write(&self, path: &Path) -> Result<(), ConfigError> {
        write_atomically(path, self.to_string().as_bytes(), false)
    }

    /// Makes a configuration file; an existing one is an error.
    ///
    /// # Errors
    /// [`ConfigError::Write`].
    pub fn write_new(&self, path: &Path) -> Result<(), ConfigError> {
        write_atomically(path, self.to_string().as_bytes(), true)
    }

    fn main(&self) -> &[Line] {
        let end = self.lines.iter().position(|line| matches!(line.kind, Kind::Section(_)));
        &self.lines[..end.unwrap_or(self.lines.len())]
    }

    /// The keys of the current configuration in their order. A key that is there twice is given
    /// twice; the last one counts.
    pub fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.main().iter().filter_map(|line| match &line.kind {
            Kind::Pair { key, value } => Some((key.as_str(), value.as_str())),
            _ => None,
        })
    }

    /// The value of a key of the current configuration.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.pairs().filter(|(k, _)| *k == key).last().map(|(_, value)| value)
    }

    /// Sets a key of the current configuration, in place or after the last one.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] for a key or value that does not fit into a line.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), ConfigError> {
        let line = Line::pair(key, value)?;
        let main = self.main();
        let is_key = |line: &Line| matches!(&line.kind, Kind::Pair { key: k, .. } if k == key);
        if let Some(index) = main.iter().rposition(is_key) {
            self.lines[index] = line;
            return Ok(());
        }
        let is_pair = |line: &Line| matches!(line.kind, Kind::Pair { .. });
        let is_text = |line: &Line| !matches!(line.kind, Kind::Blank);
        let after = main.iter().rposition(is_pair).or_else(|| main.iter().rposition(is_text));
        let index = after.map_or(0, |index| index + 1);
        if let Some(previous) = index.checked_sub(1).and_then(|i| self.lines.get_mut(i))
            && !previous.raw.ends_with('\n')
        {
            previous.raw.push('\n');
        }
        self.lines.insert(index, line);
        Ok(())
    }

    /// Removes a key from the current configuration; tells whether it was there.
    pub fn remove(&mut self, key: &str) -> bool {
        let end = self.main().len();
        let before = self.lines.len();
        let mut index = 0;
        self.lines.retain(|line| {
            let in_main = index < end;
            index += 1;
            !(in_main && matches!(&line.kind, Kind::Pair { key: k, .. } if k == key))
        });
        self.lines.len() != before
    }

    /// Puts a comment line in front of everything.
    pub fn prepend_comment(&mut self, text: &str) {
        let raw = format!("#{}\n", text.replace(['\n', '\r'], " "));
        self.lines.insert(0, Line { raw, kind: Kind::Comment });
    }

    /// The VM's name.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.get("name")
    }

    /// Whether the guest is said to run an agent.
    #[must_use]
    pub fn agent_enabled(&self) -> bool {
        let list = self.get("agent").and_then(|text| OptionList::parse(text).ok());
        list.is_some_and(|list| match &list.first {
            Some(first) => super::parse_bool(first) == Some(true),
            None => list.flag("enabled", false),
        })
    }

    /// Whether the agent may be asked to freeze the file systems for a backup.
    #[must_use]
    pub fn freeze_enabled(&self) -> bool {
        let list = self.get("agent").and_then(|text| OptionList::parse(text).ok());
        list.is_none_or(|list| {
            list.flag("freeze-fs", true) && list.flag("freeze-fs-on-backup", true)
        })
    }

    /// Whether it is a template, of which other VMs are made and which never runs.
    #[must_use]
    pub fn is_template(&self) -> bool {
        self.get("template").is_some_and(|value| super::parse_bool(value) != Some(false))
    }

    /// The unused disks: key and volume.
    pub fn unused(&self) -> impl Iterator<Item = (&str, &str)> {
        let is_unused = |key: &str| matches!(split_numbered(key), Some(("unused", _)));
        self.pairs().filter(move |(key, _)| is_unused(key))
    }

    /// The disks in the order of the file, CD-ROM drives and disks without backup included.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] names the disk that makes no sense.
    pub fn disks(&self) -> Result<Vec<DiskEntry>, ConfigError> {
        let mut disks: Vec<DiskEntry> = Vec::new();
        for (key, value) in self.pairs().filter(|(key, _)| is_disk_key(key)) {
            let disk = DiskEntry::parse(key, value)?;
            match disks.iter_mut().find(|other| other.key == key) {
                Some(other) => *other = disk,
                None => disks.push(disk),
            }
        }
        Ok(disks)
    }

    /// Whether any line names this volume: as a disk, as an unused one, or in a snapshot or another
    /// section.
    #[must_use]
    pub fn names_volume(&self, volume: &str) -> bool {
        self.words().any(|word| word == volume)
    }

    /// The words of all values of all sections, which every volume that is named is one of.
    pub fn words(&self) -> impl Iterator<Item = &str> {
        let values = self.lines.iter().filter_map(|line| match &line.kind {
            Kind::Pair { value, .. } => Some(value.as_str()),
            _ => None,
        });
        values.flat_map(|value| value.split([',', '='])).map(str::trim)
    }

    /// The volumes of disks, unused disks and states of all sections, CD-ROMs excepted, as they are written;
    /// some may be paths.
    pub fn volumes(&self) -> impl Iterator<Item = String> {
        self.lines.iter().filter_map(|line| {
            let Kind::Pair { key, value } = &line.kind else { return None };
            let is_unused = split_numbered(key).is_some_and(|(prefix, _)| prefix == "unused");
            if !is_disk_key(key) && !is_unused && key != "vmstate" {
                return None;
            }
            let disk = DiskEntry::parse(key, value).ok()?;
            (!disk.is_cdrom).then_some(disk.volume)
        })
    }

    /// The headers of the sections after the current configuration: snapshots, `PENDING`,
    /// `special:…`.
    pub fn sections(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().filter_map(|line| match &line.kind {
            Kind::Section(name) => Some(name.as_str()),
            _ => None,
        })
    }

    /// The lines of the current configuration that are not understood.
    pub fn not_understood(&self) -> impl Iterator<Item = &str> {
        let lines = self.main().iter().filter(|line| line.kind == Kind::Other);
        lines.map(|line| line.raw.trim_end())
    }

    /// What belongs into a backup: the current configuration without snapshots, pending and
    /// special sections, unused disks, lock and parent.
    #[must_use]
    pub fn for_backup(&self) -> Self {
        let mut lines = self.main().to_vec();
        lines.retain(|line| match &line.kind {
            Kind::Pair { key, .. } => {
                !STATE_KEYS.contains(&key.as_str())
                    && split_numbered(key).is_none_or(|(prefix, _)| prefix != "unused")
            }
            _ => true,
        });
        while lines.last().is_some_and(|line| line.kind == Kind::Blank) {
            lines.pop();
        }
        Self { lines }
    }
}

impl fmt::Display for VmConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lines.iter().try_for_each(|line| f.write_str(&line.raw))
    }
}

impl Line {
    fn pair(key: &str, value: &str) -> Result<Self, ConfigError> {
        let raw = format!("{key}: {value}\n");
        let kind = Kind::Pair { key: key.to_owned(), value: value.to_owned() };
        if value.contains(['\n', '\r']) || classify(&raw) != kind {
            return Err(ConfigError::Invalid(format!(
                "'{key}: {value}' cannot be written as a line of a configuration."
            )));
        }
        Ok(Self { raw, kind })
    }
}

fn classify(raw: &str) -> Kind {
    let text = raw.trim_end();
    if text.is_empty() {
        return Kind::Blank;
    }
    if text.starts_with('#') {
        return Kind::Comment;
    }
    if let Some(name) = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        return Kind::Section(name.to_owned());
    }
    match text.split_once(':') {
        Some((key, value)) if is_key(key) => {
            Kind::Pair { key: key.to_owned(), value: value.trim().to_owned() }
        }
        _ => Kind::Other,
    }
}

fn is_key(key: &str) -> bool {
    !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{ProptestConfig, prop_assert_eq, proptest};

    use super::*;

    const SAMPLE: &str = "#a description%3A with a colon\n\
        name: web \n\
        agent: enabled=1,fstrim_cloned_disks=1\n\
        boot: order=scsi0\n\
        future-key: something,new=1\n\
        ide2: none,media=cdrom\n\
        lock: backup\n\
        parent: before\n\
        scsi0: local:100/vm-100-disk-0.raw,cache=none,size=32G\n\
        virtio1: file=local:100/vm-100-disk-1.qcow2,backup=0\n\
        scsi1:local:100/first.raw\n\
        unused0: local:100/vm-100-disk-9.raw\n\
        a line nobody understands\n\
        \n\
        [PENDING]\n\
        memory: 1\n\
        \n\
        [before]\n\
        memory: 2\n\
        name: old";

    #[test]
    fn reading_and_writing_changes_no_byte() {
        assert_eq!(VmConfig::parse(SAMPLE).to_string(), SAMPLE);
        let windows = SAMPLE.replace('\n', "\r\n");
        assert_eq!(VmConfig::parse(&windows).to_string(), windows);
        assert_eq!(VmConfig::parse(&windows).get("name"), Some("web"));
    }

    #[test]
    fn only_the_current_configuration_counts() {
        let config = VmConfig::parse(SAMPLE);
        assert_eq!(config.name(), Some("web"));
        assert_eq!(config.get("memory"), None);
        assert!(config.agent_enabled());
        assert_eq!(config.sections().collect::<Vec<_>>(), ["PENDING", "before"]);
        assert_eq!(config.not_understood().collect::<Vec<_>>(), ["a line nobody understands"]);
    }

    #[test]
    fn disks_are_taken_apart() {
        let disks = VmConfig::parse(SAMPLE).disks().unwrap();
        let keys: Vec<_> = disks.iter().map(|disk| disk.key.as_str()).collect();
        assert_eq!(keys, ["ide2", "scsi0", "virtio1", "scsi1"]);
        assert!(disks[0].is_cdrom && disks[0].volume == "none");
        assert!(disks[1].backup && disks[1].options.get("size") == Some("32G"));
        assert!(!disks[2].backup);
        assert_eq!(disks[2].volume, "local:100/vm-100-disk-1.qcow2");
        assert_eq!(disks[1].to_value(), "local:100/vm-100-disk-0.raw,cache=none,size=32G");
        assert!(VmConfig::parse("scsi0: cache=none\n").disks().is_err());
    }

    #[test]
    fn the_volumes_of_all_sections_are_told() {
        let text =
            format!("{SAMPLE}\nscsi0: local:100/vm-100-disk-5.raw\nvmstate: local:100/s.raw\n");
        let volumes: Vec<_> = VmConfig::parse(&text).volumes().collect();
        let files = ["vm-100-disk-0.raw", "vm-100-disk-1.qcow2", "first.raw", "vm-100-disk-9.raw"];
        let files = files.into_iter().chain(["vm-100-disk-5.raw", "s.raw"]);
        assert_eq!(volumes, files.map(|file| format!("local:100/{file}")).collect::<Vec<_>>());
    }

    #[test]
    fn a_backup_leaves_state_out() {
        let text = VmConfig::parse(SAMPLE).for_backup().to_string();
        assert_eq!(
            text,
            "#a description%3A with a colon\nname: web \nagent: enabled=1,fstrim_cloned_disks=1\n\
             boot: order=scsi0\nfuture-key: something,new=1\nide2: none,media=cdrom\n\
             scsi0: local:100/vm-100-disk-0.raw,cache=none,size=32G\n\
             virtio1: file=local:100/vm-100-disk-1.qcow2,backup=0\nscsi1:local:100/first.raw\n\
             a line nobody understands\n"
        );
    }

    #[test]
    fn a_change_touches_one_line() {
        let mut config = VmConfig::parse(SAMPLE);
        config.set("name", "db").unwrap();
        config.set("memory", "512").unwrap();
        assert!(config.remove("lock"));
        let expected = SAMPLE
            .replacen("name: web \n", "name: db\n", 1)
            .replacen("lock: backup\n", "", 1)
            .replacen("disk-9.raw\n", "disk-9.raw\nmemory: 512\n", 1);
        assert_eq!(config.to_string(), expected);
        assert!(config.set("a", "b\nc: d").is_err(), "a value smuggled in a line");
        assert!(config.set("a b", "c").is_err());
        assert!(config.set("[x]", "c").is_err());
    }

    #[test]
    fn a_key_can_be_added_to_any_file() {
        for (before, after) in [
            ("", "a: 1\n"),
            ("#c", "#c\na: 1\n"),
            ("b: 2", "b: 2\na: 1\n"),
            ("[s]\na: 2\n", "a: 1\n[s]\na: 2\n"),
        ] {
            let mut config = VmConfig::parse(before);
            config.set("a", "1").unwrap();
            assert_eq!(config.to_string(), after);
        }
    }

    #[test]
    fn numbered_keys_are_canonical() {
        assert_eq!(split_numbered("scsi12"), Some(("scsi", 12)));
        for bad in ["scsi", "scsi01", "12", ""] {
            assert_eq!(split_numbered(bad), None, "{bad}");
        }
        assert!(is_disk_key("virtio15") && !is_disk_key("virtio16") && !is_disk_key("net0"));
    }

    #[test]
    fn the_agent_is_off_unless_said_otherwise() {
        for (text, enabled) in
            [("", false), ("agent: 1\n", true), ("agent: 0\n", false), ("agent: type=isa\n", false)]
        {
            assert_eq!(VmConfig::parse(text).agent_enabled(), enabled, "{text}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn any_text_survives(text in "[a-z0-9:\\[\\]#, =\\r\\n\\t]{0,200}") {
            let config = VmConfig::parse(&text);
            prop_assert_eq!(config.to_string(), text);
            let _ = config.disks();
            let backup = config.for_backup();
            prop_assert_eq!(backup.for_backup(), backup);
        }

        #[test]
        fn what_is_set_is_read_back(text in "[a-c: \\n#\\[\\]]{0,60}", value in "[a-z0-9 ,=:]{0,20}") {
            let mut config = VmConfig::parse(&text);
            if config.set("key", &value).is_ok() {
                prop_assert_eq!(config.get("key"), Some(value.as_str()));
                let again = VmConfig::parse(&config.to_string());
                prop_assert_eq!(again.get("key"), Some(value.as_str()));
                config.remove("key");
                prop_assert_eq!(config.get("key"), None);
            }
        }
    }
}
