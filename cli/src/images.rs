// SPDX-License-Identifier: MIT OR Apache-2.0
//! Commands about storages of images.

use std::process::ExitCode;

use serde_json::json;
use vzdump_host::{ImageUse, StorageState, StorageUse, size};

use crate::args::StorageCommand;
use crate::commands::{CommandResult, Run};
use crate::output::{self, printable, table};
use crate::task::Notices;

impl Run<'_> {
    pub(crate) async fn destroy(&self, id: u32) -> CommandResult {
        // Not cancelled: it is short, and can be done again where it stopped.
        let destroyed = self.host.vm_destroy(id, &Notices).await?;
        self.output.result(&json!(destroyed), || {
            let volumes = destroyed.volumes.iter().map(|volume| format!("  {volume}\n"));
            format!("removed VM {id}\n{}", volumes.collect::<String>())
        });
        Ok(ExitCode::SUCCESS)
    }

    pub(crate) async fn storage(&self, command: StorageCommand) -> CommandResult {
        match command {
            StorageCommand::Status => self.storage_status().await,
            StorageCommand::List { storage, unused } => self.storage_list(&storage, unused).await,
        }
    }

    async fn storage_status(&self) -> CommandResult {
        let states = self.or_cancelled(self.host.storage_states()).await?;
        let problems = states.iter().filter_map(|state| {
            let problem = state.problem.as_deref()?;
            Some(format!("{}: {}", state.info.id, printable(problem)))
        });
        problems.for_each(|problem| output::warning(&problem));
        self.output.result(&json!(states), || {
            let heads = ["STORAGE", "TYPE", "FOR", "STATUS", "TOTAL", "USED", "AVAILABLE"];
            table(&heads, states.iter().map(state_row).collect())
        });
        let is_well = states.iter().all(|state| state.problem.is_none());
        Ok(if is_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    async fn storage_list(&self, storage: &str, unused: bool) -> CommandResult {
        let mut images = self.or_cancelled(self.host.images(storage)).await??;
        images.retain(|image| !unused || image.used_as == ImageUse::Unused);
        self.output.result(&json!(images), || {
            let rows = images.iter().map(|image| {
                let used_as = match image.used_as {
                    ImageUse::Disk => "disk",
                    ImageUse::Fleecing => "fleecing",
                    ImageUse::Task => "task",
                    ImageUse::Unused => "unused",
                };
                vec![
                    image.volid.clone(),
                    image.vmid.to_string(),
                    image.format.clone(),
                    image.size_bytes.map_or_else(|| "unfinished".to_owned(), size),
                    size(image.used_bytes),
                    used_as.to_owned(),
                ]
            });
            table(&["VOLID", "VMID", "FORMAT", "SIZE", "USED", "AS"], rows.collect())
        });
        Ok(ExitCode::SUCCESS)
    }
}

fn state_row(state: &StorageState) -> Vec<String> {
    let info = &state.info;
    let used_for = match info.used_for {
        StorageUse::Images => "images",
        StorageUse::Backups => "backups",
        StorageUse::Unsupported => "-",
    };
    let status = match (info.disabled, info.used_for, &state.problem) {
        (true, ..) => "disabled",
        (_, StorageUse::Unsupported, _) => "unsupported",
        (_, _, Some(_)) => "FAULT",
        _ => "active",
    };
    let bytes = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), size);
    vec![
        info.id.clone(),
        info.kind.clone(),
        used_for.to_owned(),
        status.to_owned(),
        bytes(state.total_bytes),
        bytes(state.used_bytes),
        bytes(state.available_bytes),
    ]
}
