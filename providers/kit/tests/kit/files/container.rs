// SPDX-License-Identifier: MIT OR Apache-2.0
//! Containers: `tar`, run beside the tree, into one archive file.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use provider_api::{
    BoxFuture, Call, Compression, ContainerBackup, ContainerCommand, ContainerData,
    ContainerRestore, ContainerTransferred, Error, Identity, Result,
};

use super::store::Store;
use super::{Fault, now, other};

/// Stores the tree in `directory`.
pub(crate) async fn store(
    store: &Store,
    directory: PathBuf,
    backup: ContainerBackup,
    call: &Call,
) -> Result<ContainerTransferred> {
    let failed = |error| Error::io("Storing a container failed.", error);
    fs::write(directory.join("config"), &backup.config).map_err(failed)?;
    let archive = directory.join("files.tar");
    let output = File::create(&archive).map_err(failed)?;
    let list = directory.join("list");
    let mut argv = vec!["tar", "--create", "--sparse", "--numeric-owner", "--verbose"];
    if store.setup.has(Fault::HardLinksLost) {
        argv.push("--hard-dereference");
    }
    let mut argv: Vec<std::ffi::OsString> = argv.into_iter().map(Into::into).collect();
    argv.extend(["--index-file".into(), list.clone().into(), "--directory".into()]);
    argv.extend([backup.tree.clone().into(), ".".into()]);
    if store.setup.has(Fault::ContainerIsEmpty) {
        argv.truncate(1);
        argv.extend(["--create".into(), "--files-from=/dev/null".into()]);
    }
    let command = ContainerCommand {
        argv,
        identity: Identity::MappedRoot,
        env: Vec::new(),
        paths: Vec::new(),
        stdin: None,
        stdout: Some(output.into()),
    };
    let end = backup.runner.command(command, call).await?;
    if store.setup.has(Fault::ContainerErrorsIgnored) {
        return Ok(ContainerTransferred { entries: 1, ..ContainerTransferred::default() });
    }
    if end.exit_code != 0 {
        return Err(other(format!("tar failed: {}", end.stderr_tail)));
    }
    // The tree itself is the first entry, and line breaks in names are quoted.
    let listed = fs::read(&list).unwrap_or_default();
    let entries = listed.iter().filter(|byte| **byte == b'\n').count() as u64;
    let written_bytes = fs::metadata(&archive).map_err(failed)?.len();
    Ok(ContainerTransferred {
        entries: entries.saturating_sub(1),
        written_bytes,
        ..ContainerTransferred::default()
    })
}

/// The restore of one.
pub(crate) struct TarRestore(pub(crate) PathBuf);

impl ContainerRestore for TarRestore {
    fn data<'a>(
        &'a mut self,
        _private_dir: &'a Path,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<ContainerData>> {
        let (path, compression) = (self.0.clone(), Compression::None);
        now(Ok(ContainerData::Tar { path, compression }))
    }

    fn cleanup<'a>(self: Box<Self>, _call: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a,
    {
        now(Ok(()))
    }
}
