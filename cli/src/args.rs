// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use vzdump_host::{FleecingOptions, parse_size};

/// Backups of virtual machines through pluggable providers
#[derive(Debug, Parser)]
#[command(name = "vzdump", version, about, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Use DIR/etc, DIR/state and DIR/run instead of the system's directories
    #[arg(long, value_name = "DIR", env = "VZDUMP_ROOT", global = true)]
    pub(crate) root: Option<PathBuf>,
    /// Directory of the QEMU programs [env: VZDUMP_QEMU_BIN]
    #[arg(long, value_name = "DIR", global = true)]
    pub(crate) qemu_bin: Option<PathBuf>,
    /// What to print: text for people, JSON for programs
    #[arg(long, value_enum, default_value = "text", global = true)]
    pub(crate) output: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    Text,
    /// One JSON document; tasks print one event per line and the result last
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make, start and stop virtual machines
    #[command(subcommand)]
    Vm(VmCommand),
    /// Show storages and the disk images on them
    #[command(subcommand)]
    Storage(StorageCommand),
    /// Back up guests, one after the other
    Backup(BackupArgs),
    /// List archives
    List {
        /// Only this storage
        #[arg(long)]
        storage: Option<String>,
    },
    /// Print the guest's configuration that an archive holds
    ShowConfig {
        /// The archive, such as store:backup/vzdump-qemu-100-2026_01_02-03_04_05, or its name
        archive: String,
        /// Print the firewall configuration instead
        #[arg(long)]
        firewall: bool,
    },
    /// Restore an archive as a new guest
    Restore(RestoreArgs),
    /// Check programs and storages, and what dead tasks left behind
    Doctor {
        /// Clean up after dead tasks
        #[arg(long)]
        fix: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Make a VM with its disks
    Create(Box<CreateArgs>),
    /// Start a VM
    Start {
        /// Number of the VM
        id: u32,
        /// Do not let the guest run yet
        #[arg(long)]
        paused: bool,
    },
    /// Stop a VM: ask the guest to shut down, then end QEMU
    Stop {
        /// Number of the VM
        id: u32,
        /// How many seconds the guest may take to shut down
        #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u32).range(0..=86400))]
        timeout: u32,
        /// Do not ask the guest
        #[arg(long, conflicts_with = "timeout")]
        now: bool,
    },
    /// Remove a VM that does not run, with its disks
    Destroy {
        /// Number of the VM
        id: u32,
    },
    /// Show what VMs are doing
    Status {
        /// Number of the VM; by default all are shown
        id: Option<u32>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum StorageCommand {
    /// Show all storages and their space
    Status,
    /// List the disk images of a storage
    List {
        /// The storage
        storage: String,
        /// Only images that no guest uses
        #[arg(long)]
        unused: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Number of the new VM
    pub(crate) id: u32,
    /// Name of the VM
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    pub(crate) memory: u32,
    /// Number of processor cores
    #[arg(long, default_value_t = 1)]
    pub(crate) cores: u32,
    /// Storage of the disks
    #[arg(long, default_value = "local")]
    pub(crate) storage: String,
    /// Add a disk that is a copy of a raw or qcow2 file; may be repeated, comes before --disk
    #[arg(long, value_name = "FILE")]
    pub(crate) disk_from: Vec<PathBuf>,
    /// Add an empty disk, such as 32G; may be repeated
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) disk: Vec<u64>,
    /// Format of the disks
    #[arg(long, value_enum, default_value = "raw")]
    pub(crate) format: DiskFormat,
    /// How the disks are attached
    #[arg(long, value_enum, default_value = "virtio")]
    pub(crate) bus: Bus,
    /// Options of every disk, such as discard=on,iothread=1
    #[arg(long, value_name = "LIST")]
    pub(crate) disk_options: Option<String>,
    /// The guest runs the QEMU guest agent
    #[arg(long)]
    pub(crate) agent: bool,
    /// Use hardware virtualization
    #[arg(long)]
    pub(crate) kvm: bool,
    /// Boot this Linux kernel instead of the disk
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Initial RAM disk of the kernel
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub(crate) initrd: Option<PathBuf>,
    /// Command line of the kernel
    #[arg(long, value_name = "TEXT", requires = "kernel")]
    pub(crate) append: Option<String>,
    /// More arguments for QEMU, in one word
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) args: Option<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum DiskFormat {
    /// The disk's bytes
    Raw,
    /// QEMU's own format; keeps what backups know of changes
    Qcow2,
    /// The disk's bytes, and a small qcow2 image that keeps what backups know of changes
    #[value(name = "raw+bitmaps")]
    RawBitmaps,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Bus {
    Virtio,
    Scsi,
    Sata,
    Ide,
}

#[derive(Debug, Args)]
pub(crate) struct BackupArgs {
    /// Numbers of the guests
    #[arg(required = true)]
    pub(crate) ids: Vec<u32>,
    /// Storage to back up to; by default `storage` of vzdump.conf, else the only one for backups
    #[arg(long)]
    pub(crate) storage: Option<String>,
    /// Where old data is kept during the backup, such as storage=fast,limit=20G,reflink=64K,scsi1=big;
    /// by default on the storage of each disk, without limit
    #[arg(long, value_name = "LIST")]
    pub(crate) fleecing: Option<FleecingOptions>,
    /// Do not have the guest agent freeze the file systems
    #[arg(long)]
    pub(crate) no_freeze: bool,
    /// RAM for old data of each disk, such as 64M; 0 keeps none
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) buffer_size: Option<u64>,
    /// Granularity of new change tracking, such as 64K
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) granularity: Option<u64>,
    /// How many minutes a guest is waited for that another task is working on
    #[arg(long, value_name = "MINUTES", default_value_t = 180, value_parser = clap::value_parser!(u32).range(0..=10080))]
    pub(crate) lockwait: u32,
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// The archive, such as store:backup/vzdump-qemu-100-2026_01_02-03_04_05, or its name
    pub(crate) archive: String,
    /// Number of the new guest
    pub(crate) new_id: u32,
    /// Storage of the disks; by default where they were
    #[arg(long)]
    pub(crate) storage: Option<String>,
    /// Format of the disks; by default what they were
    #[arg(long, value_enum)]
    pub(crate) format: Option<DiskFormat>,
    /// Start the guest afterwards
    #[arg(long)]
    pub(crate) start: bool,
    /// Restore even if the disks could outgrow the storage
    #[arg(long)]
    pub(crate) overcommit: bool,
    /// Keep settings of the archive that run code or open files of this host, such as `args`
    #[arg(long)]
    pub(crate) allow_raw_config: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_for_all_commands_may_come_last() {
        let cli =
            Cli::parse_from(["vzdump", "vm", "start", "100", "--root", "/r", "--output", "json"]);
        assert_eq!((cli.global.root, cli.global.output), (Some("/r".into()), Format::Json));
        assert!(Cli::try_parse_from(["vzdump", "backup"]).is_err());
        assert!(Cli::try_parse_from(["vzdump", "vm", "create", "100", "--disk", "1X"]).is_err());
    }
}
