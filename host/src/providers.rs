// SPDX-License-Identifier: MIT OR Apache-2.0
//! The providers of `storage.cfg`: one per storage whose type is the name of one.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use provider_api::{BoxFuture, Provider};
use provider_directory::{DirectoryOptions, DirectoryProvider, ToolPaths};
use serde::Serialize;
use vzdump_core::config::storage::StorageSection;
use vzdump_core::job::Providers;
use vzdump_core::storage::StorageSet;
use vzdump_core::tools::Tools;

/// The type of storages that [`provider_directory`] serves.
const DIRECTORY_KIND: &str = "directory";

/// What a storage is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StorageUse {
    /// Holds disk images.
    Images,
    /// Holds backups.
    Backups,
    /// Of a type this program does not know; left alone.
    Unsupported,
}

/// A storage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StorageInfo {
    /// Its name.
    pub id: String,
    /// Its type.
    pub kind: String,
    /// What it is used for.
    pub used_for: StorageUse,
    /// Whether it is switched off.
    pub disabled: bool,
}

/// The providers of all storages, by the storage's name.
pub(crate) struct StorageProviders {
    infos: Vec<StorageInfo>,
    /// The provider, or why there is none.
    by_id: BTreeMap<String, Result<Arc<dyn Provider>, String>>,
}

impl StorageProviders {
    pub(crate) fn new(storages: &StorageSet, tools: &Tools) -> Self {
        let mut infos = Vec::new();
        let mut by_id = BTreeMap::new();
        for section in storages.sections() {
            let used_for = match section.kind.as_str() {
                kind if StorageSet::is_image_kind(kind) => StorageUse::Images,
                DIRECTORY_KIND => StorageUse::Backups,
                _ => StorageUse::Unsupported,
            };
            if used_for == StorageUse::Backups {
                by_id.insert(section.id.clone(), directory(section, tools));
            }
            let (id, kind) = (section.id.clone(), section.kind.clone());
            infos.push(StorageInfo { id, kind, used_for, disabled: section.is_disabled() });
        }
        Self { infos, by_id }
    }

    pub(crate) fn infos(&self) -> Vec<StorageInfo> {
        self.infos.clone()
    }

    /// Names of all storages for backups that are not switched off.
    pub(crate) fn backup_ids(&self) -> Vec<String> {
        let used = |info: &&StorageInfo| info.used_for == StorageUse::Backups && !info.disabled;
        self.infos.iter().filter(used).map(|info| info.id.clone()).collect()
    }

    pub(crate) fn get(&self, storage: &str) -> Result<Arc<dyn Provider>, String> {
        if let Some(provider) = self.by_id.get(storage) {
            return provider.clone();
        }
        Err(match self.infos.iter().find(|info| info.id == storage) {
            None => format!(
                "The storage '{storage}' is not in storage.cfg; storages for backups: {}.",
                self.names()
            ),
            Some(info) => format!(
                "The storage '{storage}' has the type '{}', which holds no backups; storages for \
                 backups: {}.",
                info.kind,
                self.names()
            ),
        })
    }

    fn names(&self) -> String {
        let ids = self.backup_ids();
        if ids.is_empty() { "none".to_owned() } else { ids.join(", ") }
    }
}

impl Providers for StorageProviders {
    fn provider<'a>(
        &'a self,
        storage: &'a str,
    ) -> BoxFuture<'a, Result<Arc<dyn Provider>, String>> {
        Box::pin(async move { self.get(storage) })
    }
}

fn directory(section: &StorageSection, tools: &Tools) -> Result<Arc<dyn Provider>, String> {
    let id = &section.id;
    if section.is_disabled() {
        return Err(format!("The storage '{id}' is disabled in storage.cfg."));
    }
    let path = section
        .get("path")
        .filter(|path| Path::new(path).is_absolute())
        .ok_or_else(|| format!("The storage '{id}' needs a 'path' that is absolute."))?;
    // Only restores need them, so a missing one must not keep `list` from working.
    let defaults = ToolPaths::default();
    let tools = ToolPaths {
        qemu_img: tools.qemu_img().unwrap_or(defaults.qemu_img),
        qemu_nbd: tools.qemu_nbd().unwrap_or(defaults.qemu_nbd),
    };
    Ok(Arc::new(DirectoryProvider::new(DirectoryOptions { path: path.into(), tools })))
}
