// SPDX-License-Identifier: MIT OR Apache-2.0
//! The providers of `storage.cfg`: one per storage whose type is the name of one, built in or an executable
//! in the plugin directory. Executables are started when their storage is used first.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use provider_api::{BoxFuture, CancellationToken, Provider};
use provider_directory::{ContainerFormat, DirectoryOptions, DirectoryProvider, ToolPaths};
use provider_rpc::{RpcOptions, RpcProvider, is_plugin_name};
use serde::Serialize;
use tokio::sync::OnceCell;
use vzdump_core::config::storage::StorageSection;
use vzdump_core::job::{Providers, chain};
use vzdump_core::layout::Layout;
use vzdump_core::storage::StorageSet;
use vzdump_core::tools::Tools;

use crate::HostError;
use crate::nodes::why_off;

/// The type of storages that [`provider_directory`] serves.
const DIRECTORY_KIND: &str = "directory";

/// What every storage may have, whatever its provider. No provider gets it.
const COMMON_PROPERTIES: [&str; 5] =
    ["content", "disable", "nodes", "prune-backups", "max-protected-backups"];
/// Where a directory must be, and whether it is made.
const PLACE_PROPERTIES: [&str; 3] = ["is_mountpoint", "create-base-path", "mkdir"];
/// What directories of Proxmox VE may have besides, and what has no meaning for archives. `shared` has none either:
/// each host looks itself.
const IDLE_PROPERTIES: [&str; 5] =
    ["content-dirs", "create-subdirs", "format", "preallocation", "shared"];

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
    /// Whether it is switched off, or for other hosts.
    pub disabled: bool,
}

/// The providers of all storages, by the storage's name.
pub(crate) struct StorageProviders {
    infos: Vec<StorageInfo>,
    by_id: BTreeMap<String, Entry>,
    plugin_dir: PathBuf,
}

enum Entry {
    /// Built in: the provider, or why there is none.
    BuiltIn(Result<Arc<dyn Provider>, String>),
    /// An executable, and its process once it was used.
    Plugin(Box<RpcOptions>, OnceCell<Arc<dyn Provider>>),
}

/// Where plugins are, and what they are told.
pub(crate) struct Plugins<'a> {
    pub(crate) layout: &'a Layout,
    /// The directory of their executables.
    pub(crate) dir: PathBuf,
}

impl Plugins<'_> {
    fn program(&self, kind: &str) -> Option<PathBuf> {
        let program = self.dir.join(kind);
        (is_plugin_name(kind) && program.exists()).then_some(program)
    }

    fn entry(&self, section: &StorageSection, program: PathBuf) -> Entry {
        if section.is_disabled() {
            return Entry::BuiltIn(Err(why_off(section)));
        }
        let own = |(name, _): &&(String, String)| !COMMON_PROPERTIES.contains(&name.as_str());
        let options = RpcOptions {
            program,
            storage: section.id.clone(),
            properties: section.properties.iter().filter(own).cloned().collect(),
            secrets_path: self.layout.storage_secrets_path(&section.id),
            tap: None,
        };
        Entry::Plugin(Box::new(options), OnceCell::new())
    }
}

impl StorageProviders {
    pub(crate) fn new(storages: &StorageSet, tools: &Tools, plugins: &Plugins<'_>) -> Self {
        let mut infos = Vec::new();
        let mut by_id = BTreeMap::new();
        for section in storages.sections() {
            let entry = match section.kind.as_str() {
                kind if StorageSet::is_image_kind(kind) => Err(StorageUse::Images),
                DIRECTORY_KIND => Ok(Entry::BuiltIn(directory(section, tools))),
                kind => match plugins.program(kind) {
                    Some(program) => Ok(plugins.entry(section, program)),
                    None => Err(StorageUse::Unsupported),
                },
            };
            let used_for = match entry {
                Ok(entry) => {
                    by_id.insert(section.id.clone(), entry);
                    StorageUse::Backups
                }
                Err(other) => other,
            };
            let (id, kind) = (section.id.clone(), section.kind.clone());
            infos.push(StorageInfo { id, kind, used_for, disabled: section.is_disabled() });
        }
        Self { infos, by_id, plugin_dir: plugins.dir.clone() }
    }

    pub(crate) fn infos(&self) -> Vec<StorageInfo> {
        self.infos.clone()
    }

    /// Names of all storages for backups that are not switched off.
    pub(crate) fn backup_ids(&self) -> Vec<String> {
        let used = |info: &&StorageInfo| info.used_for == StorageUse::Backups && !info.disabled;
        self.infos.iter().filter(used).map(|info| info.id.clone()).collect()
    }

    pub(crate) async fn get(&self, storage: &str) -> Result<Arc<dyn Provider>, String> {
        match self.by_id.get(storage) {
            Some(Entry::BuiltIn(provider)) => return provider.clone(),
            Some(Entry::Plugin(options, cell)) => {
                let start = || async {
                    let provider = RpcProvider::start((**options).clone()).await?;
                    Ok::<_, provider_api::Error>(Arc::new(provider) as Arc<dyn Provider>)
                };
                let started = cell.get_or_try_init(start).await;
                return started.cloned().map_err(|error| chain(&error));
            }
            None => {}
        }
        Err(match self.infos.iter().find(|info| info.id == storage) {
            None => format!(
                "The storage '{storage}' is not in storage.cfg; storages for backups: {}.",
                self.names()
            ),
            Some(info) if info.used_for == StorageUse::Unsupported => format!(
                "The storage '{storage}' has the type '{}', which is neither built in nor the name of a \
                 program in '{}'; storages for backups: {}.",
                info.kind,
                self.plugin_dir.display(),
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

    /// The same for a task, which may be cancelled while a plugin hangs in its start.
    pub(crate) async fn get_for_task(
        &self,
        storage: &str,
        cancel: &CancellationToken,
    ) -> Result<Arc<dyn Provider>, HostError> {
        let got = cancel.run_until_cancelled(self.get(storage)).await;
        got.ok_or_else(|| interrupted(storage))?.map_err(HostError::Storage)
    }

    fn names(&self) -> String {
        let ids = self.backup_ids();
        if ids.is_empty() { "none".to_owned() } else { ids.join(", ") }
    }
}

/// The error of a task that was cancelled while its plugin hung in its start.
pub(crate) fn interrupted(storage: &str) -> HostError {
    HostError::Storage(format!(
        "Interrupted while the provider of the storage '{storage}' was started; nothing had been begun."
    ))
}

impl Providers for StorageProviders {
    fn provider<'a>(
        &'a self,
        storage: &'a str,
    ) -> BoxFuture<'a, Result<Arc<dyn Provider>, String>> {
        Box::pin(self.get(storage))
    }
}

fn directory(section: &StorageSection, tools: &Tools) -> Result<Arc<dyn Provider>, String> {
    let id = &section.id;
    if section.is_disabled() {
        return Err(why_off(section));
    }
    let path = section
        .get("path")
        .filter(|path| Path::new(path).is_absolute())
        .ok_or_else(|| format!("The storage '{id}' needs a 'path' that is absolute."))?;
    let format =
        section.get("container-format").map_or(Ok(ContainerFormat::default()), |name| {
            ContainerFormat::from_name(name)
                .map_err(|why| format!("'container-format' of the storage '{id}': {why}."))
        })?;
    let (mount_point, may_make_path) = place(section, Path::new(path))?;
    // Only restores need them, so a missing one must not keep `list` from working.
    let defaults = ToolPaths::default();
    let tools = ToolPaths {
        qemu_img: tools.qemu_img().unwrap_or(defaults.qemu_img),
        qemu_nbd: tools.qemu_nbd().unwrap_or(defaults.qemu_nbd),
    };
    let provider = DirectoryProvider::new(DirectoryOptions { path: path.into(), tools });
    let provider = provider.with_container_format(format).with_place(mount_point, may_make_path);
    check_names(section, &provider)?;
    Ok(Arc::new(provider))
}

/// A typing error must not switch off what it was meant to switch on.
fn check_names(section: &StorageSection, provider: &DirectoryProvider) -> Result<(), String> {
    let own = provider.properties();
    let own = own.iter().map(|property| property.name.as_str());
    let known: Vec<&str> = own.chain(PLACE_PROPERTIES).chain(COMMON_PROPERTIES).collect();
    let is_known = |name: &str| known.contains(&name) || IDLE_PROPERTIES.contains(&name);
    match section.properties.iter().find(|(name, _)| !is_known(name)) {
        None => Ok(()),
        Some((name, _)) => Err(format!(
            "The storage '{}' has '{name}', which its type '{DIRECTORY_KIND}' does not know; it knows: {}.",
            section.id,
            known.join(", ")
        )),
    }
}

/// Where a file system must be mounted for a storage, and whether its directory may be made.
fn place(section: &StorageSection, path: &Path) -> Result<(Option<PathBuf>, bool), String> {
    let fault = |why: String| format!("The storage '{}' {why}", section.id);
    let mut may_make_path = true;
    // The second one is the newer name.
    for name in ["mkdir", "create-base-path"] {
        may_make_path = section.switch(name).map_err(fault)?.unwrap_or(may_make_path);
    }
    Ok((section.mount_point(path).map_err(fault)?, may_make_path))
}
