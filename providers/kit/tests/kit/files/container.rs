// SPDX-License-Identifier: MIT OR Apache-2.0
//! Containers: `tar`, run beside the tree, into one archive file.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use provider_api::{
    BoxFuture, Call, Compression, ContainerBackup, ContainerCommand, ContainerData,
    ContainerRestore, ContainerTransferred, Error, Identity, Result,
};

use rustix::fs::{CWD, FileType, Mode};

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
    if let Some(firewall) = &backup.firewall
        && !store.setup.has(Fault::ContainerFirewallLost)
    {
        fs::write(directory.join("firewall"), firewall).map_err(failed)?;
    }
    let archive = directory.join("files.tar");
    let output = File::create(&archive).map_err(failed)?;
    let list = directory.join("list");
    let mut argv = vec!["tar", "--create", "--numeric-owner", "--verbose"];
    let words: &[&str] = match store.setup.fault {
        Some(Fault::OwnersLost) => &["--owner=0", "--group=0", "--sparse", "--acls", "--xattrs"],
        Some(Fault::AclsLost) => &["--sparse", "--xattrs"],
        Some(Fault::AttributesLost) => &["--sparse", "--acls"],
        Some(Fault::HolesLost) => &["--acls", "--xattrs"],
        _ => &["--sparse", "--acls", "--xattrs"],
    };
    argv.extend(words);
    if store.setup.has(Fault::HardLinksLost) {
        argv.push("--hard-dereference");
    }
    let mut argv: Vec<std::ffi::OsString> = argv.into_iter().map(Into::into).collect();
    argv.extend(["--index-file".into(), list.clone().into(), "--directory".into()]);
    argv.push(backup.tree.clone().into());
    if store.setup.has(Fault::MountPointsAreLines) {
        let lines = backup.mounts.iter().map(|one| format!(".{}\n", one.mount_point.display()));
        let names = directory.join("names");
        fs::write(&names, lines.collect::<String>()).map_err(failed)?;
        argv.extend(["--verbatim-files-from".into(), "--files-from".into(), names.into()]);
    } else if store.setup.has(Fault::IgnoresExcludes) {
        argv.push(".".into());
    } else {
        let selected = backup.lists.join("selected");
        argv.extend(["--null", "--no-verbatim-files-from", "--no-unquote"].map(Into::into));
        argv.push(format!("--files-from={}", selected.display()).into());
    }
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
        stderr: None,
    };
    let end = backup.runner.command(command, call).await?;
    if store.setup.has(Fault::ContainerErrorsIgnored) {
        return Ok(ContainerTransferred { entries: 1, ..ContainerTransferred::default() });
    }
    let is_ignored = store.setup.has(Fault::ExitCodesIgnored)
        || store.setup.has(Fault::KilledIsNoError) && end.exit_code > 128;
    if end.exit_code != 0 && !is_ignored {
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
pub(crate) struct TarRestore {
    pub(crate) archive: PathBuf,
    pub(crate) fault: Option<Fault>,
}

impl TarRestore {
    fn offer(&self, private_dir: &Path) -> std::io::Result<ContainerData> {
        let fifo = || -> std::io::Result<PathBuf> {
            let path = private_dir.join("fifo");
            let mode = Mode::from_raw_mode(0o600);
            rustix::fs::mknodat(CWD, &path, FileType::Fifo, mode, 0)?;
            Ok(path)
        };
        let mut path = self.archive.clone();
        match self.fault {
            Some(Fault::HugeFile) => {
                File::create(private_dir.join("huge"))?.set_len(1 << 40)?;
                return Ok(ContainerData::Directory(private_dir.to_owned()));
            }
            Some(Fault::SilentTar) => path = fifo()?,
            Some(Fault::EndlessTar) => {
                path = fifo()?;
                let fifo = path.clone();
                // Ends when nobody reads any more.
                std::thread::spawn(move || {
                    let mut fifo = File::options().write(true).open(fifo)?;
                    (0_u32..).try_for_each(|n| fifo.write_all(&empty_file(n)))
                });
            }
            _ => {}
        }
        Ok(ContainerData::Tar { path, compression: Compression::None })
    }
}

/// A header of tar for an empty file.
fn empty_file(number: u32) -> [u8; 512] {
    let mut header = [0; 512];
    let mut put = |at: usize, text: &str| {
        header[at..at + text.len()].copy_from_slice(text.as_bytes());
    };
    put(0, &format!("file-{number}"));
    for (at, text) in [(100, "0000644"), (108, "0000000"), (116, "0000000")] {
        put(at, text);
    }
    for (at, text) in [(124, "00000000000"), (136, "00000000000"), (148, "        "), (156, "0")] {
        put(at, text);
    }
    put(257, "ustar\u{0}00");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

impl ContainerRestore for TarRestore {
    fn data<'a>(
        &'a mut self,
        private_dir: &'a Path,
        _call: &'a Call,
    ) -> BoxFuture<'a, Result<ContainerData>> {
        now(self.offer(private_dir).map_err(|error| Error::io("No files.", error)))
    }

    fn cleanup<'a>(self: Box<Self>, _call: &'a Call) -> BoxFuture<'a, Result<()>>
    where
        Self: 'a,
    {
        now(Ok(()))
    }
}
