// SPDX-License-Identifier: MIT OR Apache-2.0
//! The file `storage.cfg`: one section per storage.
//!
//! ```text
//! dir: local
//!     path /var/lib/vz
//!     content images,backup
//!
//! directory: backups
//!     path /mnt/backup
//! ```

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};

use super::{ConfigError, parse_bool, raw_lines, read_text, write_atomically};

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Header {
        kind: String,
        id: String,
    },
    Property {
        name: String,
        value: String,
    },
    /// Blank lines and comments.
    Filler,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    raw: String,
    kind: Kind,
}

/// The list of storages. Sections of unknown kinds and unknown properties are kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StorageConfig {
    lines: Vec<Line>,
}

/// One storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorageSection {
    /// Its name.
    pub id: String,
    /// Its type: `dir` for images, else the name of a backup provider.
    pub kind: String,
    /// Its properties in the order of the file; one without a value has an empty one.
    pub properties: Vec<(String, String)>,
}

impl StorageSection {
    /// The value of a property; of several, the last.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.properties.iter().rev().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// Whether the storage is switched off.
    #[must_use]
    pub fn is_disabled(&self) -> bool {
        self.switch("disable") == Ok(Some(true))
    }

    /// A property that is 0 or 1; one without a value is on.
    ///
    /// # Errors
    /// It is neither; in words that follow the storage's name.
    pub fn switch(&self, name: &str) -> Result<Option<bool>, String> {
        let on = |text: &str| if text.is_empty() { Some(true) } else { parse_bool(text) };
        let Some(text) = self.get(name) else { return Ok(None) };
        let value = on(text).map(Some);
        value.ok_or_else(|| format!("has '{name} {text}', which is neither 0 nor 1."))
    }

    /// Where a file system must be mounted for the storage at `path` (`is_mountpoint`).
    ///
    /// # Errors
    /// It is neither a path nor 0 or 1; in words that follow the storage's name.
    pub fn mount_point(&self, path: &Path) -> Result<Option<PathBuf>, String> {
        match self.get("is_mountpoint") {
            Some(text) if Path::new(text).is_absolute() => Ok(Some(text.into())),
            _ => Ok(self.switch("is_mountpoint")?.unwrap_or(false).then(|| path.to_owned())),
        }
    }

    /// Whether the storage may hold this kind of content; without `content` it may hold any.
    #[must_use]
    pub fn allows(&self, content: &str) -> bool {
        self.get("content").is_none_or(|list| list.split(',').any(|c| c.trim() == content))
    }
}

/// Whether this can be a storage's name.
#[must_use]
pub fn is_storage_id(id: &str) -> bool {
    let bytes = id.as_bytes();
    bytes.len() >= 2
        && bytes.len() <= 100
        && bytes[0].is_ascii_alphabetic()
        && bytes[bytes.len() - 1].is_ascii_alphanumeric()
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b))
}

impl StorageConfig {
    /// Reads the text of a list.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] names the line.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let mut lines = Vec::new();
        let mut ids = HashSet::new();
        let mut in_section = false;
        for (index, raw) in raw_lines(text).enumerate() {
            let fault =
                |why: &str| ConfigError::Invalid(format!("storage.cfg line {}: {why}", index + 1));
            let kind = classify(raw).map_err(|why| fault(&why))?;
            match &kind {
                Kind::Header { id, .. } => {
                    in_section = true;
                    if !ids.insert(id.clone()) {
                        return Err(fault(&format!("the storage '{id}' is there twice.")));
                    }
                }
                Kind::Property { .. } if !in_section => {
                    return Err(fault("a property belongs to no storage."));
                }
                _ => {}
            }
            lines.push(Line { raw: raw.to_owned(), kind });
        }
        Ok(Self { lines })
    }

    /// Reads the file; a missing one is an empty list.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        read_text(path)?.map_or_else(|| Ok(Self::default()), |text| Self::parse(&text))
    }

    /// Replaces the file in one step.
    ///
    /// # Errors
    /// [`ConfigError::Write`].
    pub fn write(&self, path: &Path) -> Result<(), ConfigError> {
        write_atomically(path, self.to_string().as_bytes(), false)
    }

    /// All storages in the order of the file.
    #[must_use]
    pub fn sections(&self) -> Vec<StorageSection> {
        let mut sections: Vec<StorageSection> = Vec::new();
        for line in &self.lines {
            match &line.kind {
                Kind::Header { kind, id } => sections.push(StorageSection {
                    id: id.clone(),
                    kind: kind.clone(),
                    properties: Vec::new(),
                }),
                Kind::Property { name, value } => {
                    if let Some(section) = sections.last_mut() {
                        section.properties.push((name.clone(), value.clone()));
                    }
                }
                Kind::Filler => {}
            }
        }
        sections
    }

    /// One storage.
    #[must_use]
    pub fn get(&self, id: &str) -> Option<StorageSection> {
        self.sections().into_iter().find(|section| section.id == id)
    }

    /// Adds a storage at the end.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] for a name that exists or is not allowed, or a property that does
    /// not fit into a line.
    pub fn add(&mut self, section: &StorageSection) -> Result<(), ConfigError> {
        let mut text = self.to_string();
        if !text.is_empty() {
            text.push_str(if text.ends_with('\n') { "\n" } else { "\n\n" });
        }
        text.push_str(&format!("{}: {}\n", section.kind, section.id));
        for (name, value) in &section.properties {
            text.push_str(&format!("\t{name} {value}\n"));
        }
        let added = Self::parse(&text)?;
        if added.get(&section.id).as_ref() != Some(section) {
            return Err(ConfigError::Invalid(format!(
                "A property of the storage '{}' cannot be written as a line.",
                section.id
            )));
        }
        *self = added;
        Ok(())
    }
}

impl fmt::Display for StorageConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lines.iter().try_for_each(|line| f.write_str(&line.raw))
    }
}

fn classify(raw: &str) -> Result<Kind, String> {
    let text = raw.trim_end();
    if text.is_empty() || text.trim_start().starts_with('#') {
        return Ok(Kind::Filler);
    }
    if text.starts_with([' ', '\t']) {
        let text = text.trim_start();
        let (name, value) = text.split_once([' ', '\t']).unwrap_or((text, ""));
        return Ok(Kind::Property { name: name.to_owned(), value: value.trim().to_owned() });
    }
    let (kind, id) = text
        .split_once(':')
        .map(|(kind, id)| (kind.trim(), id.trim()))
        .filter(|(kind, _)| !kind.is_empty() && !kind.contains([' ', '\t']))
        .ok_or_else(|| format!("'{text}' is neither 'type: name' nor an indented property."))?;
    if !is_storage_id(id) {
        return Err(format!(
            "'{id}' is not a storage name: two or more of A-Z a-z 0-9 . _ -, first a letter, last \
             no sign."
        ));
    }
    Ok(Kind::Header { kind: kind.to_owned(), id: id.to_owned() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{ProptestConfig, prop_assert_eq, proptest};

    use super::*;

    const SAMPLE: &str = "# mine\n\
        dir: local\n\
        \tpath /var/lib/vz\n\
        \tcontent images,backup\n\
        \n\
        zfspool: tank\n    pool rpool/data\n    sparse\n\
        \n\
        directory: backups\n\
        \tpath /mnt/my backups\n\
        \tdisable";

    #[test]
    fn reading_and_writing_changes_no_byte() {
        assert_eq!(StorageConfig::parse(SAMPLE).unwrap().to_string(), SAMPLE);
    }

    #[test]
    fn sections_are_taken_apart() {
        let sections = StorageConfig::parse(SAMPLE).unwrap().sections();
        let names: Vec<_> = sections.iter().map(|s| (s.kind.as_str(), s.id.as_str())).collect();
        assert_eq!(names, [("dir", "local"), ("zfspool", "tank"), ("directory", "backups")]);
        assert!(sections[0].allows("images") && !sections[0].allows("iso"));
        assert!(sections[1].allows("images"));
        assert_eq!(sections[1].get("sparse"), Some(""));
        assert_eq!(sections[2].get("path"), Some("/mnt/my backups"));
        assert!(sections[2].is_disabled() && !sections[0].is_disabled());
    }

    #[test]
    fn a_storage_is_added_behind_the_others() {
        let mut config = StorageConfig::parse(SAMPLE).unwrap();
        let section = StorageSection {
            id: "more".into(),
            kind: "dir".into(),
            properties: vec![("path".into(), "/x".into())],
        };
        config.add(&section).unwrap();
        assert_eq!(config.to_string(), format!("{SAMPLE}\n\ndir: more\n\tpath /x\n"));
        assert!(config.add(&section).is_err(), "a second storage of that name");
        let smuggled = StorageSection {
            id: "other".into(),
            kind: "dir".into(),
            properties: vec![("path".into(), "/x\ndir: evil".into())],
        };
        assert!(config.add(&smuggled).is_err());
    }

    #[test]
    fn faults_name_the_line() {
        for (text, fault) in [
            ("\tpath /x\n", "line 1: a property belongs to no storage"),
            ("dir: aa\n\ndir: aa\n", "line 3: the storage 'aa' is there twice"),
            ("dir: ../x\n", "line 1: '../x' is not a storage name"),
            ("nonsense\n", "line 1: 'nonsense' is neither"),
        ] {
            let error = StorageConfig::parse(text).unwrap_err().to_string();
            assert!(error.contains(fault), "{error}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn any_accepted_text_survives(text in "[a-c: \\n\\t#/]{0,80}") {
            if let Ok(config) = StorageConfig::parse(&text) {
                prop_assert_eq!(config.to_string(), text);
            }
        }
    }
}
