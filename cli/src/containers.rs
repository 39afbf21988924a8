// SPDX-License-Identifier: MIT OR Apache-2.0
//! The commands for containers.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;
use vzdump_host::{CtCreateOptions, CtStatus, CtStopped, ImageFormat, NewMount};

use crate::args::{CtCommand, CtCreateArgs, CtFormat};
use crate::commands::{CommandResult, Run};
use crate::output::{self, printable, table};
use crate::task::Notices;

impl Run<'_> {
    pub(crate) async fn container(&self, command: CtCommand) -> CommandResult {
        match command {
            CtCommand::Create(args) => self.ct_create(*args).await,
            CtCommand::Start { id } => self.ct_start(id).await,
            CtCommand::Stop { id, timeout, now } => {
                let timeout_s = if now { 0 } else { timeout };
                self.ct_stop(id, Duration::from_secs(timeout_s.into())).await
            }
            CtCommand::Status { id } => self.ct_status(id).await,
        }
    }

    async fn ct_create(&self, args: CtCreateArgs) -> CommandResult {
        let id = args.id;
        let options = create_options(args);
        let created = self.host.ct_create(id, &options, &Notices, self.cancel).await?;
        self.output.result(&json!(created), || {
            let mut text = format!("created CT {id}: {}\n", created.config.display());
            for (key, volume) in &created.volumes {
                text.push_str(&format!("  {key}: {volume}\n"));
            }
            text
        });
        Ok(ExitCode::SUCCESS)
    }

    async fn ct_start(&self, id: u32) -> CommandResult {
        let work = self.host.ct_start(id);
        let started = self.or_left(work, "the container may be starting all the same.").await??;
        if !self.output.is_json() {
            started.notices.iter().for_each(|notice| output::warning(&printable(notice)));
        }
        let value = json!({ "id": id, "pid": started.pid, "notices": started.notices });
        self.output.result(&value, || format!("started CT {id}\n"));
        Ok(ExitCode::SUCCESS)
    }

    async fn ct_stop(&self, id: u32, timeout: Duration) -> CommandResult {
        let work = self.host.ct_stop(id, timeout);
        let how = self.or_left(work, "the container may have been told to shut down.").await??;
        let (ran, killed) = (how != CtStopped::DidNotRun, how == CtStopped::Killed);
        self.output.result(&json!({ "id": id, "ran": ran, "killed": killed }), || match how {
            CtStopped::DidNotRun => format!("CT {id} was not running\n"),
            CtStopped::ShutDown => format!("CT {id} has stopped\n"),
            CtStopped::Killed if timeout.is_zero() => format!("CT {id} was killed\n"),
            CtStopped::Killed => format!(
                "CT {id} was killed, because it did not shut down within {} seconds\n",
                timeout.as_secs()
            ),
        });
        Ok(ExitCode::SUCCESS)
    }

    async fn ct_status(&self, id: Option<u32>) -> CommandResult {
        let all = self.host.ct_status(id).await?;
        let value = match (id, all.first()) {
            (Some(_), Some(one)) => json!(one),
            _ => json!(all),
        };
        self.output.result(&value, || {
            table(&["VMID", "NAME", "STATUS", "PID"], all.iter().map(row).collect())
        });
        Ok(ExitCode::SUCCESS)
    }
}

fn row(status: &CtStatus) -> Vec<String> {
    let state = json!(status.state).as_str().unwrap_or_default().to_owned();
    let pid = status.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
    vec![status.id.to_string(), printable(status.name.as_deref().unwrap_or("-")), state, pid]
}

fn create_options(args: CtCreateArgs) -> CtCreateOptions {
    let mut keys = Vec::new();
    let mut set = |key: &str, value: Option<String>| {
        keys.extend(value.map(|value| (key.to_owned(), value)));
    };
    set("hostname", args.hostname);
    set("memory", args.memory.map(|mib| mib.to_string()));
    set("net0", args.net0);
    set("unprivileged", (!args.privileged).then(|| "1".to_owned()));
    let root = NewMount {
        key: "rootfs".into(),
        mount_point: PathBuf::from("/"),
        size_bytes: args.size,
        backup: true,
    };
    let more = args.mount.into_iter().enumerate().map(|(index, (mount_point, size_bytes))| {
        NewMount { key: format!("mp{index}"), mount_point, size_bytes, backup: true }
    });
    CtCreateOptions {
        keys,
        mounts: [root].into_iter().chain(more).collect(),
        storage: args.storage,
        format: match args.format {
            CtFormat::Raw => ImageFormat::Raw,
            CtFormat::Subvol => ImageFormat::Subvol,
        },
        template: args.template,
    }
}
