// SPDX-License-Identifier: MIT OR Apache-2.0
//! Jobs and the backups of their guests: each belongs to the process that began it.

use std::sync::Arc;

use provider_api::{
    Access, BitmapMode, BitmapRequest, BoxFuture, Call, Committed, ContainerBackup,
    ContainerTransferred, Error, GuestBackup, GuestInfo, IGNORED_MAX, IgnoredEntry, Job, JobInfo,
    Kind, Progress, Readable, Result, Transferred, Uuid, VmBackup, Volume, VolumeInfo,
};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use crate::connection::Connection;
use crate::provider::{Core, start_job};
use crate::serve::Offer;
use crate::wire::{Base64, Dec, shorten};

/// A job; a new process gets a new handle for it.
pub(crate) struct RpcJob {
    pub(crate) core: Arc<Core>,
    pub(crate) info: JobInfo,
    pub(crate) connection: Arc<Connection>,
    pub(crate) handle: String,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct WireGuest {
    guest: String,
    archive_name: String,
}

impl Job for RpcJob {
    fn start_guest<'a>(
        &'a mut self,
        guest: GuestInfo,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<Box<dyn GuestBackup>>> {
        Box::pin(async move {
            // The process may have died over an earlier guest; this one need not suffer from that.
            if !self.connection.is_alive() {
                let connection = self.core.connection(call).await?;
                self.handle = start_job(&connection, self.info.start_time_s, call).await?;
                self.connection = connection;
            }
            let params = json!({
                "job": self.handle,
                "kind": guest.kind,
                "guest_id": guest.id,
                "name": guest.name,
                "start_time_s": guest.start_time_s.to_string(),
            });
            let started: WireGuest = self.connection.request("start_guest", params, call).await?;
            let connection = Arc::clone(&self.connection);
            let WireGuest { guest, archive_name } = started;
            Ok(Box::new(RpcGuest { connection, handle: guest, archive_name }) as _)
        })
    }

    fn finish<'a>(self: Box<Self>, call: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a,
    {
        Box::pin(async move {
            let params = json!({"job": self.handle});
            self.connection.request::<IgnoredAny>("finish_job", params, call).await.map(|_| ())
        })
    }
}

/// The backup of one guest.
struct RpcGuest {
    connection: Arc<Connection>,
    handle: String,
    archive_name: String,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct WirePlan {
    requests: Vec<WireBitmap>,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case", tag = "bitmap", expecting = "an object")]
enum WireBitmap {
    None,
    New,
    Use {
        generation: String,
        #[serde(default)]
        readable: Readable,
    },
}

impl From<WireBitmap> for BitmapRequest {
    fn from(wire: WireBitmap) -> Self {
        match wire {
            WireBitmap::None => Self::None,
            WireBitmap::New => Self::New,
            WireBitmap::Use { generation, readable } => Self::Use { generation, readable },
        }
    }
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct WireTransferred {
    total_bytes: Dec<u64>,
    read_bytes: Dec<u64>,
    zero_bytes: Dec<u64>,
    written_bytes: Dec<u64>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct WireContainerTransferred {
    entries: Dec<u64>,
    read_bytes: Dec<u64>,
    written_bytes: Dec<u64>,
    #[serde(default)]
    ignored: Vec<IgnoredEntry>,
    #[serde(default)]
    ignored_count: Option<Dec<u64>>,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct WireCommitted {
    archive: String,
    size_bytes: Dec<u64>,
}

fn base64(bytes: &[u8]) -> Value {
    json!(Base64(bytes.to_vec()))
}

fn text_of(path: &std::path::Path) -> Result<&str> {
    path.to_str().ok_or_else(|| {
        let why = format!("The path {} cannot be told to a provider.", path.display());
        Error::new(Kind::Invalid, why)
    })
}

fn volume(volume: &Volume, offer: &mut Offer) -> Result<Value> {
    let access = match &volume.access {
        Access::Nbd { socket, export, bitmap } => {
            json!({"kind": "nbd", "socket": text_of(socket)?, "export": export, "bitmap": bitmap})
        }
        Access::File { path, regions } => {
            let regions = offer.regions(Arc::clone(regions));
            json!({"kind": "file", "path": text_of(path)?, "regions": regions})
        }
        _ => {
            let why = format!("The disk {} is offered in an unknown way.", volume.device);
            return Err(Error::new(Kind::Invalid, why));
        }
    };
    let mode = match volume.bitmap_mode {
        BitmapMode::None => "none",
        BitmapMode::New => "new",
        BitmapMode::Reuse => "reuse",
    };
    Ok(json!({
        "device": volume.device,
        "size_bytes": volume.size_bytes.to_string(),
        "access": access,
        "bitmap_mode": mode,
        "bitmap_action": volume.bitmap_action,
        "generation": volume.generation,
        "dirty_bytes": volume.dirty_bytes.map(|bytes| bytes.to_string()),
    }))
}

fn vm_params(handle: &str, backup: &VmBackup, offer: &mut Offer) -> Result<Value> {
    let volumes: Result<Vec<_>> = backup.volumes.iter().map(|v| volume(v, offer)).collect();
    Ok(json!({
        "guest": handle,
        "config": base64(&backup.config),
        "firewall": backup.firewall.as_deref().map(base64),
        "volumes": volumes?,
    }))
}

fn container_params(handle: &str, backup: &ContainerBackup, offer: &mut Offer) -> Result<Value> {
    let mounts: Result<Vec<_>> = backup
        .mounts
        .iter()
        .map(|mount| {
            let (key, volume) = (&mount.key, &mount.volume_id);
            let point = text_of(&mount.mount_point)?;
            Ok(json!({"key": key, "mount_point": point, "volume_id": volume}))
        })
        .collect();
    Ok(json!({
        "guest": handle,
        "config": base64(&backup.config),
        "firewall": backup.firewall.as_deref().map(base64),
        "tree": text_of(&backup.tree)?,
        "host_tree": text_of(&backup.host_tree)?,
        "mounts": mounts?,
        "id_map": backup.id_map,
        "lists": text_of(&backup.lists)?,
        "host_lists": text_of(&backup.host_lists)?,
        "skip_unreadable": backup.skip_unreadable,
        "bandwidth_limit": backup.bandwidth_limit.map(|limit| limit.to_string()),
        "container": offer.runner(Arc::clone(&backup.runner)),
    }))
}

impl GuestBackup for RpcGuest {
    fn archive_name(&self) -> &str {
        &self.archive_name
    }

    fn plan_volumes<'a>(
        &'a mut self,
        volumes: &'a [VolumeInfo],
        call: &'a Call,
    ) -> BoxFuture<'a, Result<Vec<BitmapRequest>>> {
        Box::pin(async move {
            let volumes: Vec<_> = volumes
                .iter()
                .map(|volume| {
                    json!({
                        "device": volume.device,
                        "size_bytes": volume.size_bytes.to_string(),
                        "volume_id": volume.volume_id,
                    })
                })
                .collect();
            let params = json!({"guest": self.handle, "volumes": volumes});
            let plan: WirePlan = self.connection.request("plan_volumes", params, call).await?;
            Ok(plan.requests.into_iter().map(Into::into).collect())
        })
    }

    fn backup_vm<'a>(
        &'a mut self,
        backup: VmBackup,
        progress: &'a dyn Progress,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<Transferred>> {
        Box::pin(async move {
            let mut offer = self.connection.served().offer(call);
            let params = vm_params(&self.handle, &backup, &mut offer)?;
            let moved: WireTransferred =
                self.connection.request_with_progress("backup_vm", params, progress, call).await?;
            Ok(Transferred {
                total_bytes: moved.total_bytes.0,
                read_bytes: moved.read_bytes.0,
                zero_bytes: moved.zero_bytes.0,
                written_bytes: moved.written_bytes.0,
            })
        })
    }

    fn backup_container<'a>(
        &'a mut self,
        backup: ContainerBackup,
        progress: &'a dyn Progress,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<ContainerTransferred>> {
        Box::pin(async move {
            let mut offer = self.connection.served().offer(call);
            let params = container_params(&self.handle, &backup, &mut offer)?;
            let moved: WireContainerTransferred = self
                .connection
                .request_with_progress("backup_container", params, progress, call)
                .await?;
            Ok(transferred(moved))
        })
    }

    fn commit<'a>(self: Box<Self>, id: Uuid, call: &'a Call) -> BoxFuture<'a, Result<Committed>>
    where
        Self: 'a,
    {
        Box::pin(async move {
            let params = json!({"guest": self.handle, "id": id});
            let committed: WireCommitted = self.connection.request("commit", params, call).await?;
            let size_bytes = committed.size_bytes.0;
            Ok(Committed { archive: committed.archive, size_bytes })
        })
    }

    fn abort<'a>(self: Box<Self>, why: &'a str, call: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a,
    {
        Box::pin(async move {
            // What a dead process left is removed by the next activation.
            if !self.connection.is_alive() {
                return Ok(());
            }
            let params = json!({"guest": self.handle, "why": shorten(why, 2000)});
            self.connection.request::<IgnoredAny>("abort", params, call).await.map(|_| ())
        })
    }
}

fn transferred(mut wire: WireContainerTransferred) -> ContainerTransferred {
    let named = u64::try_from(wire.ignored.len()).unwrap_or(u64::MAX);
    wire.ignored.truncate(IGNORED_MAX);
    ContainerTransferred {
        entries: wire.entries.0,
        read_bytes: wire.read_bytes.0,
        written_bytes: wire.written_bytes.0,
        ignored: wire.ignored,
        ignored_count: wire.ignored_count.map_or(named, |count| count.0.max(named)),
    }
}
