// SPDX-License-Identifier: MIT OR Apache-2.0
//! The UEFI firmware of Debian's package `ovmf`, and the variables a guest keeps with it.
//!
//! The firmware expects its variables at one place in memory, right below its code, so their size is fixed by
//! the kind of the firmware and not by the volume they are kept in.

use std::path::{Path, PathBuf};

use crate::config::{OptionList, parse_bool};

/// Where the package puts its files.
const DIR: &str = "/usr/share/OVMF";
/// Options of an `efidisk0` that are understood, beside those of every disk.
pub(crate) const OPTIONS: [&str; 3] = ["efitype", "ms-cert", "pre-enrolled-keys"];

/// A firmware file that is not there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("There is no '{}': install Debian's package ovmf{}.", .path.display(), hint(*.kind))]
pub struct MissingFirmware {
    /// The file.
    pub path: PathBuf,
    /// The kind it belongs to.
    pub kind: EfiKind,
}

fn hint(kind: EfiKind) -> &'static str {
    match kind {
        EfiKind::Large => "",
        EfiKind::Small => " of a release that has firmware of 2 MiB, or use 'efitype=4m'",
    }
}

/// The kind of a firmware, by the flash it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EfiKind {
    /// `2m`, which Proxmox VE means when nothing is said.
    Small,
    /// `4m`.
    Large,
}

impl EfiKind {
    /// The size of the variables.
    pub(crate) const fn vars_bytes(self) -> u64 {
        match self {
            Self::Small => 128 << 10,
            Self::Large => 528 << 10,
        }
    }
}

/// What an `efidisk0` says of the firmware.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EfiOptions {
    /// The kind.
    pub kind: EfiKind,
    /// The keys of Secure Boot are there from the beginning, so it is on.
    pub has_keys: bool,
}

impl EfiOptions {
    /// Reads them from the options of a disk.
    ///
    /// # Errors
    /// A sentence about the option that makes no sense.
    pub fn parse(options: &OptionList) -> Result<Self, String> {
        let kind = match options.get("efitype") {
            None | Some("2m") => EfiKind::Small,
            Some("4m") => EfiKind::Large,
            Some(_) => return Err("'efitype' is not one of 2m, 4m.".to_owned()),
        };
        let has_keys = match options.get("pre-enrolled-keys").map(parse_bool) {
            None => false,
            Some(Some(value)) => value,
            Some(None) => return Err("'pre-enrolled-keys' is neither 0 nor 1.".to_owned()),
        };
        Ok(Self { kind, has_keys })
    }

    /// The firmware's code, which no guest changes. Keys of Secure Boot are worth nothing without code that
    /// protects them from the guest.
    pub(crate) fn code(self) -> Result<PathBuf, MissingFirmware> {
        self.file(match (self.kind, self.has_keys) {
            (EfiKind::Large, false) => "OVMF_CODE_4M.fd",
            (EfiKind::Large, true) => "OVMF_CODE_4M.secboot.fd",
            (EfiKind::Small, false) => "OVMF_CODE.fd",
            (EfiKind::Small, true) => "OVMF_CODE.secboot.fd",
        })
    }

    /// The variables of a new guest.
    pub(crate) fn vars(self) -> Result<PathBuf, MissingFirmware> {
        self.file(match (self.kind, self.has_keys) {
            (EfiKind::Large, false) => "OVMF_VARS_4M.fd",
            (EfiKind::Large, true) => "OVMF_VARS_4M.ms.fd",
            (EfiKind::Small, false) => "OVMF_VARS.fd",
            (EfiKind::Small, true) => "OVMF_VARS.ms.fd",
        })
    }

    fn file(self, name: &str) -> Result<PathBuf, MissingFirmware> {
        let path = Path::new(DIR).join(name);
        if path.is_file() { Ok(path) } else { Err(MissingFirmware { path, kind: self.kind }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<EfiOptions, String> {
        EfiOptions::parse(&OptionList::parse(text).unwrap())
    }

    #[test]
    fn what_is_not_said_is_as_with_proxmox_ve() {
        let small = EfiOptions { kind: EfiKind::Small, has_keys: false };
        assert_eq!(parse("local:100/a.raw,size=128K"), Ok(small));
        let large = EfiOptions { kind: EfiKind::Large, has_keys: true };
        assert_eq!(parse("x,efitype=4m,pre-enrolled-keys=1"), Ok(large));
        assert!(parse("x,efitype=8m").is_err() && parse("x,pre-enrolled-keys=x").is_err());
    }

    #[test]
    fn the_templates_of_the_package_have_the_sizes_that_are_believed() {
        for text in ["efitype=4m", "efitype=4m,pre-enrolled-keys=1"] {
            let options = parse(text).unwrap();
            let vars = options.vars().unwrap();
            assert_eq!(vars.metadata().unwrap().len(), options.kind.vars_bytes(), "{vars:?}");
            let code = options.code().unwrap().metadata().unwrap().len();
            assert_eq!(code + options.kind.vars_bytes(), 4 << 20, "{text}");
        }
    }

    #[test]
    fn a_file_that_is_missing_is_named_with_its_package() {
        let path = PathBuf::from("/usr/share/OVMF/OVMF_VARS.fd");
        let error = MissingFirmware { path, kind: EfiKind::Small }.to_string();
        assert!(error.contains("OVMF_VARS.fd") && error.contains("ovmf of a release"), "{error}");
    }
}
