// SPDX-License-Identifier: MIT OR Apache-2.0
//! A provider that keeps each container as a tar archive, made by a command beside the container's files.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use provider_api::{
    Archive, BitmapRequest, BoxFuture, Call, Capabilities, CommitOutcome, Committed, Compression,
    ContainerBackup, ContainerCommand, ContainerData, ContainerRestore, ContainerRunner,
    ContainerTransferred, Description, Error, GuestBackup, GuestConfig, GuestInfo, Identity, Job,
    JobInfo, Kind, Progress, Provider, Result, Status, Transferred, Uuid, VmBackup, VmRestore,
    VolumeInfo,
};

/// Where it keeps archives, as whom it reads, and whether it fails at the end of the copy.
#[derive(Clone)]
pub(crate) struct TarProvider {
    pub(crate) dir: PathBuf,
    pub(crate) identity: Identity,
    /// A shell command instead of `tar`, for a look at what commands see.
    pub(crate) script: Option<String>,
    /// Whether it takes what was written for all there is.
    pub(crate) ignores_exit_codes: bool,
    /// Whether it keeps hold of the container's files.
    pub(crate) keeps: bool,
    pub(crate) kept: Arc<Mutex<Vec<Arc<dyn ContainerRunner>>>>,
    /// What each guest's backup knew of its earlier calls when it ended.
    pub(crate) ends: Arc<Mutex<Vec<String>>>,
}

fn io(error: std::io::Error) -> Error {
    Error::new(Kind::Io, error.to_string())
}

fn ready<'a, T: Send + 'a>(value: T) -> BoxFuture<'a, T> {
    Box::pin(std::future::ready(value))
}

fn no_vms<T>() -> Result<T> {
    Err(Error::new(Kind::Invalid, "only containers"))
}

impl TarProvider {
    pub(crate) fn tar(&self, archive: &str) -> PathBuf {
        self.dir.join(format!("{archive}.tar"))
    }

    /// Where an archive that is a directory has its files.
    pub(crate) fn tree(&self, archive: &str) -> PathBuf {
        self.dir.join(format!("{archive}.tree"))
    }

    /// Puts an archive there that is a directory, still empty.
    pub(crate) fn plant_tree(&self, archive: &str, config: &str) -> PathBuf {
        std::fs::create_dir_all(self.tree(archive)).unwrap();
        std::fs::write(self.config(archive), config).unwrap();
        self.tree(archive)
    }

    /// What it was given of a firewall.
    pub(crate) fn firewall(&self, archive: &str) -> Option<Vec<u8>> {
        std::fs::read(self.config(archive).with_extension("fw")).ok()
    }

    fn config(&self, archive: &str) -> PathBuf {
        self.dir.join(format!("{archive}.conf"))
    }

    /// Puts an archive there that nobody has backed up.
    pub(crate) fn plant(&self, archive: &str, config: &str, tar: &Path) {
        std::fs::create_dir_all(&self.dir).unwrap();
        std::fs::write(self.config(archive), config).unwrap();
        std::fs::copy(tar, self.tar(archive)).unwrap();
    }
}

impl Provider for TarProvider {
    fn describe(&self) -> Description {
        let capabilities = Capabilities { container: true, ..Capabilities::default() };
        let api_version = provider_api::API_VERSION;
        Description { name: "tar".into(), api_version, capabilities }
    }

    fn activate<'a>(&'a self, _: &'a Call) -> BoxFuture<'a, Result<()>> {
        ready(std::fs::create_dir_all(&self.dir).map_err(io))
    }

    fn status<'a>(&'a self, _: &'a Call) -> BoxFuture<'a, Result<Status>> {
        ready(Ok(Status { total_bytes: 1, used_bytes: 0 }))
    }

    fn list<'a>(&'a self, _: &'a Call) -> BoxFuture<'a, Result<Vec<Archive>>> {
        ready(Ok(Vec::new()))
    }

    fn guest_config<'a>(
        &'a self,
        archive: &'a str,
        _: &'a Call,
    ) -> BoxFuture<'a, Result<GuestConfig>> {
        let config = std::fs::read(self.config(archive)).map_err(io);
        ready(config.map(|config| GuestConfig { config, firewall: None }))
    }

    fn commit_outcome<'a>(&'a self, id: Uuid, _: &'a Call) -> BoxFuture<'a, Result<CommitOutcome>> {
        ready(Ok(match std::fs::read_to_string(self.dir.join(id.to_string())) {
            Ok(archive) => CommitOutcome::Committed { archive },
            Err(_) => CommitOutcome::NotCommitted,
        }))
    }

    fn start_job<'a>(&'a self, _: JobInfo, _: &'a Call) -> BoxFuture<'a, Result<Box<dyn Job>>> {
        ready(Ok(Box::new(TarJob(self.clone())) as _))
    }

    fn restore_vm_init<'a>(
        &'a self,
        _: &'a str,
        _: &'a Call,
    ) -> BoxFuture<'a, Result<Box<dyn VmRestore>>> {
        ready(no_vms())
    }

    fn restore_container_init<'a>(
        &'a self,
        archive: &'a str,
        _: &'a Call,
    ) -> BoxFuture<'a, Result<Box<dyn ContainerRestore>>> {
        ready(Ok(Box::new(TarRestore(self.tar(archive), self.tree(archive))) as _))
    }
}

struct TarJob(TarProvider);

impl Job for TarJob {
    fn start_guest<'a>(
        &'a mut self,
        guest: GuestInfo,
        _: &'a Call,
    ) -> BoxFuture<'a, Result<Box<dyn GuestBackup>>> {
        let name = format!("vzdump-lxc-{}-{}", guest.id, Uuid::new_v4().simple());
        let calls = vec!["begun"];
        ready(Ok(Box::new(TarBackup { provider: self.0.clone(), name, calls }) as _))
    }

    fn finish<'a>(self: Box<Self>, _: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a,
    {
        ready(Ok(()))
    }
}

struct TarBackup {
    provider: TarProvider,
    name: String,
    /// Its own state, which each call adds to.
    calls: Vec<&'static str>,
}

impl TarBackup {
    fn end(mut self, how: &'static str) {
        self.calls.push(how);
        self.provider.ends.lock().unwrap().push(self.calls.join(" "));
    }
}

impl GuestBackup for TarBackup {
    fn archive_name(&self) -> &str {
        &self.name
    }

    fn plan_volumes<'a>(
        &'a mut self,
        _: &'a [VolumeInfo],
        _: &'a Call,
    ) -> BoxFuture<'a, Result<Vec<BitmapRequest>>> {
        ready(no_vms())
    }

    fn backup_vm<'a>(
        &'a mut self,
        _: VmBackup,
        _: &'a dyn Progress,
        _: &'a Call,
    ) -> BoxFuture<'a, Result<Transferred>> {
        ready(no_vms())
    }

    fn backup_container<'a>(
        &'a mut self,
        backup: ContainerBackup,
        _: &'a dyn Progress,
        call: &'a Call,
    ) -> BoxFuture<'a, Result<ContainerTransferred>> {
        self.calls.push("read");
        Box::pin(async move {
            let provider = &self.provider;
            std::fs::write(provider.config(&self.name), &backup.config).map_err(io)?;
            if let Some(firewall) = &backup.firewall {
                std::fs::write(provider.config(&self.name).with_extension("fw"), firewall)
                    .map_err(io)?;
            }
            if provider.keeps {
                provider.kept.lock().unwrap().push(Arc::clone(&backup.runner));
            }
            let path = provider.tar(&self.name);
            let tree = backup.tree.display();
            let argv: Vec<OsString> = match &provider.script {
                Some(script) => ["sh", "-c", script].map(Into::into).to_vec(),
                None => [
                    "tar",
                    "--create",
                    "--format=posix",
                    "--sparse",
                    "--numeric-owner",
                    "--xattrs",
                    "--xattrs-include=*",
                    "--acls",
                    &format!("--directory={tree}"),
                    ".",
                ]
                .map(Into::into)
                .to_vec(),
            };
            let command = ContainerCommand {
                argv,
                identity: provider.identity,
                env: Vec::new(),
                paths: Vec::new(),
                stdin: None,
                stdout: Some(File::create(&path).map_err(io)?.into()),
                stderr: None,
            };
            let end = backup.runner.command(command, call).await?;
            if end.exit_code != 0 && !provider.ignores_exit_codes {
                let text = format!("exit code {}: {}", end.exit_code, end.stderr_tail);
                return Err(Error::new(Kind::Other, text));
            }
            let written_bytes = std::fs::metadata(&path).map_err(io)?.len();
            let entries = std::fs::read_dir(&backup.host_tree).map_err(io)?.count() as u64;
            Ok(ContainerTransferred {
                entries,
                read_bytes: written_bytes,
                written_bytes,
                ..ContainerTransferred::default()
            })
        })
    }

    fn commit<'a>(self: Box<Self>, id: Uuid, _: &'a Call) -> BoxFuture<'a, Result<Committed>>
    where
        Self: 'a,
    {
        let written = std::fs::write(self.provider.dir.join(id.to_string()), &self.name);
        let committed = Committed { archive: self.name.clone(), size_bytes: 1 };
        self.end("committed");
        ready(written.map(|()| committed).map_err(io))
    }

    fn abort<'a>(self: Box<Self>, _: &'a str, _: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a,
    {
        self.end("aborted");
        ready(Ok(()))
    }
}

struct TarRestore(PathBuf, PathBuf);

impl ContainerRestore for TarRestore {
    fn data<'a>(&'a mut self, _: &'a Path, _: &'a Call) -> BoxFuture<'a, Result<ContainerData>> {
        if self.1.symlink_metadata().is_ok() {
            return ready(Ok(ContainerData::Directory(self.1.clone())));
        }
        let (path, compression) = (self.0.clone(), Compression::None);
        ready(Ok(ContainerData::Tar { path, compression }))
    }

    fn cleanup<'a>(self: Box<Self>, _: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a,
    {
        ready(Ok(()))
    }
}
