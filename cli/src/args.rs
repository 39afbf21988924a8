// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command line.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use vzdump_host::{
    BackupMode, FleecingOptions, IONICE_MAX, KeepCounts, Retention, STOP_WAIT_MAX_MINUTES,
    WAIT_MAX_MINUTES, parse_size,
};

/// Printed after the help, and a part of the manual page.
const EXIT_CODES: &str = "\
Exit codes:
  0    done; warnings may have been printed
  1    not done, the reason is printed
  2    the command line makes no sense
  3    done, but the output could not be written
  255  the backup or restore of a guest failed, or the job as a whole

Signals: SIGINT, SIGTERM, SIGHUP and SIGQUIT end a task in order; further ones change nothing. What was \
begun is undone, each step of that within three minutes; a commit under way gets a minute to end, a hook \
script a minute. After SIGKILL or a crash the next task of the guest cleans up, or `vzdump doctor --fix`.";

/// Backups of virtual machines through pluggable providers
#[derive(Debug, Parser)]
#[command(name = "vzdump", version, about, max_term_width = 100, after_help = EXIT_CODES)]
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
    /// Make, start and stop containers
    #[command(subcommand)]
    Ct(CtCommand),
    /// Show storages and the disk images on them
    #[command(subcommand)]
    Storage(StorageCommand),
    /// Back up guests
    Backup(Box<BackupArgs>),
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
    /// Restore an archive, or single disks of it
    Restore(RestoreArgs),
    /// Read archives again and compare them with what was stored
    Verify(VerifyArgs),
    /// Remove the archives that no rule keeps
    Prune(PruneArgs),
    /// Remove an archive; increments that build upon it keep what they need
    Remove {
        /// The archive, such as store:backup/vzdump-qemu-100-2026_01_02-03_04_05, or its name
        archive: String,
    },
    /// Print the log of the backup that made an archive
    ShowLog {
        /// The archive, such as store:backup/vzdump-qemu-100-2026_01_02-03_04_05, or its name
        archive: String,
    },
    /// Print the notes of an archive, or replace them
    Notes {
        /// The archive, such as store:backup/vzdump-qemu-100-2026_01_02-03_04_05, or its name
        archive: String,
        /// The new notes; empty ones remove what is there
        text: Option<String>,
    },
    /// Protect an archive from removal
    Protect {
        /// The archive, such as store:backup/vzdump-qemu-100-2026_01_02-03_04_05, or its name
        archive: String,
    },
    /// Let an archive be removed again
    Unprotect {
        /// The archive, such as store:backup/vzdump-qemu-100-2026_01_02-03_04_05, or its name
        archive: String,
    },
    /// For those who write providers
    #[command(subcommand)]
    Provider(ProviderCommand),
    /// Check programs and storages, and what dead tasks left behind
    Doctor {
        /// Clean up after dead tasks
        #[arg(long)]
        fix: bool,
    },
    /// Print what makes a shell complete this program's options
    Completion {
        /// The shell
        shell: Shell,
    },
    /// Write the manual pages
    Man {
        /// An existing directory, such as /usr/local/share/man/man1
        dir: PathBuf,
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
pub(crate) enum CtCommand {
    /// Make a container from a template
    Create(Box<CtCreateArgs>),
    /// Start a container
    Start {
        /// Number of the container
        id: u32,
    },
    /// Stop a container: ask it to shut down, then end it
    Stop {
        /// Number of the container
        id: u32,
        /// How many seconds the container may take to shut down
        #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u32).range(0..=86400))]
        timeout: u32,
        /// Do not ask the container
        #[arg(long, conflicts_with = "timeout")]
        now: bool,
    },
    /// Show what containers are doing
    Status {
        /// Number of the container; by default all are shown
        id: Option<u32>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct CtCreateArgs {
    /// Number of the new container
    pub(crate) id: u32,
    /// Tar archive of the root file system, such as debian.tar.zst; it must be trusted
    #[arg(long, value_name = "FILE")]
    pub(crate) template: PathBuf,
    /// Host name of the container
    #[arg(long)]
    pub(crate) hostname: Option<String>,
    /// The container's root is root on the host, too
    #[arg(long)]
    pub(crate) privileged: bool,
    /// Storage of the volumes
    #[arg(long, default_value = "local")]
    pub(crate) storage: String,
    /// Form of the volumes
    #[arg(long, value_enum, default_value = "raw")]
    pub(crate) format: CtFormat,
    /// Size of the root file system
    #[arg(long, value_name = "SIZE", default_value = "8G", value_parser = parse_size)]
    pub(crate) size: u64,
    /// Add a volume, such as /srv:4G, which backups include; may be repeated
    #[arg(long, value_name = "PATH:SIZE", value_parser = parse_mount)]
    pub(crate) mount: Vec<(PathBuf, u64)>,
    /// Memory in MiB; by default as much as there is
    #[arg(long, value_name = "MIB")]
    pub(crate) memory: Option<u32>,
    /// Network, such as name=eth0,bridge=vmbr0,ip=dhcp
    #[arg(long, value_name = "LIST")]
    pub(crate) net0: Option<String>,
}

/// Reads `/srv:4G`.
fn parse_mount(text: &str) -> Result<(PathBuf, u64), String> {
    let (path, size) = text
        .rsplit_once(':')
        .ok_or_else(|| format!("'{text}' is not a path and a size such as /srv:4G"))?;
    Ok((path.into(), parse_size(size)?))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CtFormat {
    /// An ext4 file system in a file
    Raw,
    /// A subvolume of a btrfs storage; the size does not count
    Subvol,
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

#[derive(Debug, Subcommand)]
pub(crate) enum ProviderCommand {
    /// Prove that the provider of a storage keeps the contract
    Check(Box<CheckArgs>),
    /// Write a provider that works, as a starting point
    New {
        /// A new directory; its name becomes the storage type
        dir: PathBuf,
        /// The language
        #[arg(long, value_enum)]
        language: NewLanguage,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum NewLanguage {
    /// One file, with nothing but the standard library
    Python,
    /// A crate
    Rust,
}

/// Guests are made up, with disks that are simulated unless --real is given; archives of others are left alone.
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The storage
    pub(crate) storage: String,
    /// Use disks of the patched QEMU's storage daemon in place of simulated ones; makes the main checks only
    #[arg(long)]
    pub(crate) real: bool,
    /// Only this check; may be repeated
    #[arg(long, value_name = "CHECK")]
    pub(crate) only: Vec<String>,
    /// Size of the larger disks, 1M to 1G [default: 4M]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) size: Option<u64>,
    /// Length of the long chain of increments [default: 30]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=1000))]
    pub(crate) chain: Option<u32>,
    /// Make the same disks as an earlier run, whose number it told
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u32>,
    /// Where the storage keeps its data, to flip a bit of the kit's own archive in it [default: the
    /// storage's path]
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
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
    /// Boot with UEFI, whose variables get a disk of their own; pre-enrolled-keys=1 for Secure Boot
    #[arg(long, value_name = "LIST", num_args = 0..=1, default_missing_value = "efitype=4m")]
    pub(crate) efidisk: Option<String>,
    /// Add a TPM of version 2.0
    #[arg(long)]
    pub(crate) tpm: bool,
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

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum RestoredFormat {
    /// A disk's bytes; of a container an ext4 file system in a file
    Raw,
    /// QEMU's own format, for disks; keeps what backups know of changes
    Qcow2,
    /// A disk's bytes, and a small qcow2 image that keeps what backups know of changes
    #[value(name = "raw+bitmaps")]
    RawBitmaps,
    /// A subvolume of a btrfs storage, for containers
    Subvol,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Bus {
    Virtio,
    Scsi,
    Sata,
    Ide,
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("guests").required(true).multiple(true)
    .args(["ids", "all", "exclude", "pool", "job"])))]
pub(crate) struct BackupArgs {
    /// Numbers of the guests
    pub(crate) ids: Vec<u32>,
    /// Back up all guests
    #[arg(long)]
    pub(crate) all: bool,
    /// Back up all guests, or those of the pool or the job, but these
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    pub(crate) exclude: Vec<u32>,
    /// Back up the guests of a pool of user.cfg
    #[arg(long)]
    pub(crate) pool: Option<String>,
    /// Do what a job of jobs.cfg says; options given here go before its own
    #[arg(long)]
    pub(crate) job: Option<String>,
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
    /// RAM for old data of all guests together, such as 1G; each of --jobs gets an equal part
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) buffer_total: Option<u64>,
    /// Granularity of new change tracking, such as 64K
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) granularity: Option<u64>,
    /// How many minutes a guest is waited for that another task is working on [default: 180]
    #[arg(long, value_name = "MINUTES", value_parser = clap::value_parser!(u32).range(0..=i64::from(WAIT_MAX_MINUTES)))]
    pub(crate) lockwait: Option<u32>,
    /// How many guests are backed up at the same time [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=vzdump_host::JOBS_MAX as i64))]
    pub(crate) jobs: Option<u8>,
    /// How much may be read from all disks together, in KiB per second; 0 is no limit [default: 0]
    #[arg(long, value_name = "KIB_PER_S")]
    pub(crate) bwlimit: Option<u64>,
    /// Priority of this program's disk access: 0 is high, 7 low, 8 what others leave [default: 7]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=i64::from(IONICE_MAX)))]
    pub(crate) ionice: Option<u8>,
    /// Leave this out of containers, such as /var/cache/?* or *.bak; may be repeated
    #[arg(long, value_name = "PATTERN")]
    pub(crate) exclude_path: Vec<String>,
    /// Whether temporary files (/tmp/?*, /var/tmp/?*, /var/run/?*.pid) are left out of containers, 0 or 1
    /// [default: 1]
    #[arg(long, value_name = "BOOL", value_parser = clap::value_parser!(u8).range(0..=1))]
    pub(crate) stdexcludes: Option<u8>,
    /// Leave files of containers that cannot be read out, and tell which, instead of failing
    #[arg(long)]
    pub(crate) skip_unreadable: bool,
    /// Where files of containers are copied to that cannot be snapshotted; must exist
    #[arg(long, value_name = "DIR")]
    pub(crate) tmpdir: Option<PathBuf>,
    /// Hook script, called as vzdump calls it
    #[arg(long, value_name = "FILE")]
    pub(crate) script: Option<PathBuf>,
    /// Print warnings and errors only
    #[arg(long)]
    pub(crate) quiet: bool,
    /// Which archives of each guest stay afterwards, such as keep-last=3,keep-daily=7; by default
    /// what storage.cfg says of the storage, else vzdump.conf, else all
    #[arg(long, value_name = "RULES")]
    pub(crate) prune_backups: Option<Retention>,
    /// Whether to remove archives by these rules: 0 or 1 [default: 1]
    #[arg(long, value_name = "0|1", value_parser = zero_or_one)]
    pub(crate) remove: Option<bool>,
    /// Notes of the archives; {{guestname}}, {{vmid}}, {{node}}, {{cluster}}, \n and \\ are replaced
    #[arg(long, value_name = "TEXT")]
    pub(crate) notes_template: Option<String>,
    /// Protect the archives from removal
    #[arg(long)]
    pub(crate) protected: bool,
    /// What happens to a running guest for the point in time: snapshot lets it run on, suspend pauses
    /// it for a moment, stop shuts it down and starts it again [default: snapshot]
    #[arg(long, value_name = "MODE", value_parser = backup_mode())]
    pub(crate) mode: Option<BackupMode>,
    /// How many minutes a guest may take to shut down in the mode stop [default: 10]
    #[arg(long, value_name = "MINUTES", value_parser = clap::value_parser!(u32).range(1..=i64::from(STOP_WAIT_MAX_MINUTES)))]
    pub(crate) stopwait: Option<u32>,
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("what").required(true).args(["archives", "storage"])))]
pub(crate) struct VerifyArgs {
    /// The archives, such as store:backup/vzdump-qemu-100-2026_01_02-03_04_05, or their names
    #[arg(value_name = "ARCHIVE")]
    pub(crate) archives: Vec<String>,
    /// Verify all archives of this storage
    #[arg(long)]
    pub(crate) storage: Option<String>,
    /// Only archives of this guest; may be repeated
    #[arg(long, value_name = "ID", conflicts_with = "archives")]
    pub(crate) guest: Vec<u32>,
    /// Read so many of a hundred blocks, chosen at random; by default all
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=100))]
    pub(crate) sample: Option<u8>,
    /// Choose the same blocks as an earlier run, whose number it told
    #[arg(long, value_name = "N", requires = "sample")]
    pub(crate) seed: Option<u32>,
    /// Leave out what was found sound within so many days, by reading at least as much as now
    #[arg(long, value_name = "DAYS")]
    pub(crate) not_since: Option<u32>,
    /// Start each archive as a throw-away VM without network, and wait for its guest's agent
    #[arg(long, requires = "archives", conflicts_with_all = ["storage", "sample", "not_since"])]
    pub(crate) boot: bool,
    /// How many seconds a guest may take
    #[arg(long, value_name = "S", requires = "boot", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86400))]
    pub(crate) boot_timeout: u64,
    /// Text on the guest's serial console (`serial0: socket`) that means it is ready, instead of its agent
    #[arg(long, value_name = "TEXT", requires = "boot", value_parser = not_blank)]
    pub(crate) boot_console: Option<String>,
    /// Keep settings of the archive that run code or open files of this host, such as `args`
    #[arg(long, requires = "boot")]
    pub(crate) allow_raw_config: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    /// Numbers of the guests; by default all of the storage
    pub(crate) ids: Vec<u32>,
    /// Storage to prune; by default `storage` of vzdump.conf, else the only one for backups
    #[arg(long)]
    pub(crate) storage: Option<String>,
    /// Only guests of this kind
    #[arg(long = "type", value_enum)]
    pub(crate) kind: Option<Kind>,
    /// Only say what would be kept and removed
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) keep: KeepArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Kind {
    /// Virtual machines
    Qemu,
    /// Containers
    Lxc,
}

/// Without any of them storage.cfg decides, else vzdump.conf.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct KeepArgs {
    /// Keep everything
    #[arg(long, conflicts_with_all = ["keep_last", "keep_hourly", "keep_daily", "keep_weekly", "keep_monthly", "keep_yearly"])]
    pub(crate) keep_all: bool,
    /// Keep the N newest archives
    #[arg(long, value_name = "N")]
    pub(crate) keep_last: Option<u32>,
    /// Keep the newest archive of each of N hours
    #[arg(long, value_name = "N")]
    pub(crate) keep_hourly: Option<u32>,
    /// Keep the newest archive of each of N days
    #[arg(long, value_name = "N")]
    pub(crate) keep_daily: Option<u32>,
    /// Keep the newest archive of each of N weeks
    #[arg(long, value_name = "N")]
    pub(crate) keep_weekly: Option<u32>,
    /// Keep the newest archive of each of N months
    #[arg(long, value_name = "N")]
    pub(crate) keep_monthly: Option<u32>,
    /// Keep the newest archive of each of N years
    #[arg(long, value_name = "N")]
    pub(crate) keep_yearly: Option<u32>,
}

impl KeepArgs {
    /// What was asked for; none if nothing was.
    pub(crate) fn retention(&self) -> Option<Retention> {
        let Self {
            keep_all,
            keep_last,
            keep_hourly,
            keep_daily,
            keep_weekly,
            keep_monthly,
            keep_yearly,
        } = *self;
        let all = [keep_last, keep_hourly, keep_daily, keep_weekly, keep_monthly, keep_yearly];
        if keep_all {
            return Some(Retention::All);
        }
        all.iter().any(Option::is_some).then(|| {
            Retention::from(KeepCounts {
                last: keep_last.unwrap_or(0),
                hourly: keep_hourly.unwrap_or(0),
                daily: keep_daily.unwrap_or(0),
                weekly: keep_weekly.unwrap_or(0),
                monthly: keep_monthly.unwrap_or(0),
                yearly: keep_yearly.unwrap_or(0),
            })
        })
    }
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// The archive, such as store:backup/vzdump-qemu-100-2026_01_02-03_04_05, or its name
    #[arg(required_unless_present_any = ["resume", "give_up"])]
    pub(crate) archive: Option<String>,
    /// Number of the guest; none if disks go to files or block devices
    #[arg(required_unless_present_any = ["disks", "resume", "give_up"])]
    pub(crate) id: Option<u32>,
    /// Start the VM at once, and fill its disks while it runs
    #[arg(long, conflicts_with_all = ["disks", "force"])]
    pub(crate) live: bool,
    /// Go on with the live restore of this VM, which was interrupted
    #[arg(long, value_name = "ID", conflicts_with_all = [
        "archive", "id", "live", "disks", "dry_run", "storage", "format", "force", "in_place", "unique",
        "privileged", "start", "parallel", "overcommit", "allow_raw_config",
    ])]
    pub(crate) resume: Option<u32>,
    /// End the live restore of this VM, which was interrupted: the VM and all that it wrote are removed
    #[arg(long, value_name = "ID", conflicts_with_all = [
        "archive", "id", "live", "resume", "disks", "dry_run", "storage", "format", "force", "in_place",
        "unique", "privileged", "start", "parallel", "overcommit", "allow_raw_config", "bwlimit",
    ])]
    pub(crate) give_up: Option<u32>,
    /// Restore this disk only: to the drive of that name, to the drive or volume TARGET of the guest, or to the
    /// file or block device TARGET (a path that begins with `/`, `./` or `../`)
    #[arg(long = "disk", value_name = "DISK[=TARGET]")]
    pub(crate) disks: Vec<String>,
    /// Say what would be done, and do nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Storage of the disks or volumes; by default where they were
    #[arg(long)]
    pub(crate) storage: Option<String>,
    /// Format of the disks or volumes; by default what they were, of a file what its ending says (.qcow2), else raw
    #[arg(long, value_enum)]
    pub(crate) format: Option<RestoredFormat>,
    /// Replace the guest of this number; with --disk, remove the volumes that are replaced, overwrite block
    /// devices
    #[arg(long)]
    pub(crate) force: bool,
    /// Remove the disks that are replaced before the new ones are made
    #[arg(long, requires = "force", conflicts_with = "disks")]
    pub(crate) in_place: bool,
    /// Give the guest new network addresses and a new UUID
    #[arg(long, conflicts_with = "disks")]
    pub(crate) unique: bool,
    /// Restore a container whose root is root on this host, too; all of the archive must be trusted
    #[arg(long)]
    pub(crate) privileged: bool,
    /// Start the guest afterwards
    #[arg(long)]
    pub(crate) start: bool,
    /// Disks that are copied at the same time [default: 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=32))]
    pub(crate) parallel: Option<u8>,
    /// Most KiB that are written per second; disks are then copied one after the other
    #[arg(long, value_name = "KIB")]
    pub(crate) bwlimit: Option<u64>,
    /// Restore even if the disks could outgrow the storage
    #[arg(long)]
    pub(crate) overcommit: bool,
    /// Keep settings of the archive that run code or open files of this host, such as `args`
    #[arg(long)]
    pub(crate) allow_raw_config: bool,
}

/// With its values, for completions.
fn backup_mode() -> impl TypedValueParser<Value = BackupMode> {
    let modes = [BackupMode::Snapshot, BackupMode::Suspend, BackupMode::Stop];
    PossibleValuesParser::new(modes.map(BackupMode::name)).try_map(|name| name.parse())
}

/// Every console has an empty text at once.
fn not_blank(text: &str) -> Result<String, String> {
    if text.trim().is_empty() {
        return Err("give a text that the guest writes only when it is ready".to_owned());
    }
    Ok(text.to_owned())
}

fn zero_or_one(text: &str) -> Result<bool, String> {
    match text {
        "0" => Ok(false),
        "1" => Ok(true),
        _ => Err("it is 0 or 1".to_owned()),
    }
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

    #[test]
    fn what_is_kept_is_read_from_the_options() {
        let keep = |options: &[&str]| {
            let words = [&["vzdump", "prune", "100"], options].concat();
            let Command::Prune(args) = Cli::try_parse_from(words)?.command else { panic!() };
            Ok::<_, clap::Error>(args.keep.retention().map(|retention| retention.to_string()))
        };
        assert_eq!(keep(&[]).unwrap(), None);
        let some = keep(&["--keep-daily", "7", "--keep-last", "3"]).unwrap();
        assert_eq!(some.as_deref(), Some("keep-last=3,keep-daily=7"));
        // Never "remove everything".
        assert_eq!(keep(&["--keep-last", "0"]).unwrap().as_deref(), Some("keep-all=1"));
        assert!(keep(&["--keep-all", "--keep-last", "1"]).is_err());
        let wrong = ["vzdump", "backup", "100", "--prune-backups", "keep-lost=1"];
        let error = Cli::try_parse_from(wrong).unwrap_err().to_string();
        assert!(error.contains("'keep-lost' is no retention rule"), "{error}");
    }

    #[test]
    fn a_test_that_any_guest_passes_or_none_is_refused() {
        let error = |option: &str, value: &str| {
            let words = ["vzdump", "verify", "a", "--boot", option, value];
            Cli::try_parse_from(words).map_err(|error| error.to_string()).err()
        };
        for blank in ["", " \n"] {
            let error = error("--boot-console", blank).unwrap();
            assert!(error.contains("writes only when it is ready"), "{error}");
        }
        assert!(error("--boot-timeout", "0").unwrap().contains("--boot-timeout"));
        assert_eq!(error("--boot-console", " login: "), None);
        assert_eq!(error("--boot-timeout", "1"), None);
    }

    #[test]
    fn a_restore_that_goes_on_or_is_given_up_takes_no_option_that_it_ignores() {
        for what in ["--resume", "--give-up"] {
            for option in [&["--parallel", "4"][..], &["--privileged"]] {
                let words = [&["vzdump", "restore", what, "100"], option].concat();
                let error = Cli::try_parse_from(words).unwrap_err();
                assert_eq!(error.kind(), clap::error::ErrorKind::ArgumentConflict, "{error}");
            }
            assert!(Cli::try_parse_from(["vzdump", "restore", what, "100"]).is_ok());
        }
    }
}
