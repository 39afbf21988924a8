// SPDX-License-Identifier: MIT OR Apache-2.0
//! Debian's suites as places where QEMU's source comes from.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Result, bail};

use crate::apt;
use crate::paths::Paths;

/// QEMU's source package in a suite of Debian's main archive: the newest version that can be had
/// there (`sid`), or the newest of one series (`sid:10.2`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Suite {
    name: String,
    series: Option<String>,
}

impl Default for Suite {
    /// The suite with the QEMU series this is developed against.
    fn default() -> Self {
        Self { name: "trixie".into(), series: None }
    }
}

impl FromStr for Suite {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, series) = match text.split_once(':') {
            None => (text, None),
            Some((name, series)) => (name, Some(series)),
        };
        let of = |text: &str, more: fn(char) -> bool| text.chars().all(more);
        let in_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let in_series = |c: char| c.is_ascii_digit() || c == '.';
        let starts =
            |text: &str, first: fn(&char) -> bool| text.chars().next().is_some_and(|c| first(&c));
        if !starts(name, char::is_ascii_lowercase)
            || !of(name, in_name)
            || series.is_some_and(|s| !starts(s, char::is_ascii_digit) || !of(s, in_series))
        {
            bail!(
                "a suite of Debian is a name like sid or trixie-backports; sid:10.2 is a series in it"
            );
        }
        Ok(Self { name: name.into(), series: series.map(str::to_string) })
    }
}

/// A name that can be a part of a folder's name.
pub(super) fn folder_name(text: &str) -> Result<String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    if text.is_empty() || !text.chars().all(fits) {
        bail!("letters, digits, '-', '.' and '_' only");
    }
    Ok(text.to_string())
}

impl fmt::Display for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        self.series.as_ref().map_or(Ok(()), |series| write!(f, ":{series}"))
    }
}

impl Suite {
    /// The second QEMU that the long suites test, as long as it is offered.
    pub(crate) fn second() -> Self {
        Self { name: "sid".into(), series: Some("10.2".into()) }
    }

    /// Where its QEMU goes in the checkout: the default suite's into target/qemu, any other's into a
    /// folder beside it.
    pub(crate) fn paths(&self, paths: &Paths) -> Paths {
        if *self == Self::default() {
            return paths.clone();
        }
        paths.with_second_qemu(&self.to_string().replace(':', "-"))
    }

    /// Its source package, from the cache if it is there and `refresh` does not ask for a newer one.
    pub(crate) fn source(&self, paths: &Paths, refresh: bool) -> Result<apt::Source> {
        let dir = self.downloads(paths);
        let wanted =
            apt::Wanted { name: "qemu", suite: &self.name, series: self.series.as_deref() };
        if !refresh && let Some(source) = apt::downloaded(&dir, wanted) {
            return Ok(source);
        }
        apt::download(&dir, wanted, &paths.logs().join("qemu-fetch.log"))
    }

    fn downloads(&self, paths: &Paths) -> PathBuf {
        let all = paths.cache.join("download");
        if self.name == Self::default().name { all } else { all.join(&self.name) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_suites_are_taken() {
        for name in ["sid", "trixie-backports", "experimental", "sid:10.2", "sid:11"] {
            assert_eq!(name.parse::<Suite>().unwrap().to_string(), name);
        }
        for name in
            ["", "Sid", "../sid", "sid main", "-sid", "1sid", "sid\nx", "sid:", "sid:x", "sid:1/2"]
        {
            assert!(name.parse::<Suite>().is_err(), "{name:?}");
        }
    }

    #[test]
    fn folders_stay_in_the_target_folder() {
        assert_eq!(folder_name("11.0-rc1").unwrap(), "11.0-rc1");
        for name in ["", "a/b", "../x", "a b", "\n"] {
            assert!(folder_name(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn another_suite_goes_beside_the_default_one() {
        let paths = Paths::find().unwrap();
        let (default, second) = (Suite::default(), Suite::second());
        assert_eq!(default.paths(&paths).qemu(), paths.qemu());
        assert_eq!(second.paths(&paths).qemu(), paths.root.join("target/qemu-sid-10.2"));
        assert_eq!(second.paths(&paths).qemu_bin(), paths.root.join("target/qemu-sid-10.2/bin"));
        assert_ne!(second.downloads(&paths), default.downloads(&paths));
    }
}
