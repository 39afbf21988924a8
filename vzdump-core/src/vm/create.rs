// SPDX-License-Identifier: MIT OR Apache-2.0
//! Makes a new VM: its disks first, each journalled before it is made, its configuration last and in
//! one step.

use std::fmt::Write;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use provider_api::{CancellationToken, GuestKind};

use crate::blocking;
use crate::bound;
use crate::config::guest::{DiskEntry, VmConfig, is_disk_key};
use crate::config::{ConfigError, OptionList};
use crate::job::{JobContext, backup_lock_path, chain};
use crate::journal::recover::{self, Leftover};
use crate::journal::volumes::{NewVolumeError, NewVolumes};
use crate::journal::{Begin, Entry, Journal, JournalError, TaskKind};
use crate::layout::{self, Layout, LayoutError};
use crate::lock::{FileLock, LockError};
use crate::storage::{DEFAULT_STORAGE, ImageFormat, StorageError, image_size};
use crate::task_log::{TaskSink, size_config};
use crate::tools::{MissingTool, Tools};
use crate::vm::leftovers;
use crate::vm::ovmf::{self, EfiOptions, MissingFirmware};
use crate::vm::qemu_cmdline::{self, CmdlineError, DiskFile, Input};
use crate::vm::tpm;

const EFI_KEY: &str = "efidisk0";
/// Options of a disk that follow from its volume.
const OWN_OPTIONS: [&str; 3] = ["file", "format", "size"];

/// Why a VM was not made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The number is taken.
    #[error("The guest {id} exists already ('{path}').")]
    Exists {
        /// The number.
        id: u32,
        /// Its configuration.
        path: PathBuf,
    },
    /// An option makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// A file could not be copied into a new disk.
    #[error("Cannot copy '{path}' into a new disk: {message}")]
    Copy {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        message: String,
    },
    /// It was cancelled.
    #[error("The VM was not made: it was cancelled, and what had been begun was undone.")]
    Cancelled,
    /// Another task works on a guest of this number.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// What an earlier task left behind could not be removed.
    #[error("An earlier task of this guest is not cleaned up: {0}")]
    Leftover(String),
    /// The journal could not be written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// This process could not be told from others.
    #[error("Cannot read /proc of this process.")]
    Proc(#[source] std::io::Error),
    /// Not a guest number.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The configuration could not be written.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A disk could not be made.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A VM of these options could not be started.
    #[error("The VM could not be started.")]
    Start(#[source] CmdlineError),
    /// A program is missing.
    #[error(transparent)]
    Tool(#[from] MissingTool),
    /// A firmware is missing.
    #[error(transparent)]
    Firmware(#[from] MissingFirmware),
}

impl From<NewVolumeError> for CreateError {
    fn from(error: NewVolumeError) -> Self {
        match error {
            NewVolumeError::Storage(error) => error.into(),
            NewVolumeError::Journal(error) => error.into(),
        }
    }
}

/// What a new disk contains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskContent {
    /// Zeroes, this many bytes.
    Empty(u64),
    /// A copy of a raw or qcow2 file.
    CopyOf(PathBuf),
}

/// A new VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateOptions {
    /// Keys of the configuration, such as `name` and `memory`; disks are added to them.
    pub keys: Vec<(String, String)>,
    /// The disks in their order.
    pub disks: Vec<DiskContent>,
    /// The storage for the disks.
    pub storage: String,
    /// The format of the disks.
    pub format: ImageFormat,
    /// How the disks are attached: `virtio`, `scsi`, `sata` or `ide`.
    pub bus: String,
    /// Options of every disk, `discard=on,iothread=1`.
    pub disk_options: Option<String>,
    /// Boot with UEFI, and keep its variables on a disk of their own: the options of `efidisk0`.
    pub efi: Option<String>,
    /// Add a TPM of version 2.0, and a volume for its state.
    pub tpm: bool,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            keys: Vec::new(),
            disks: Vec::new(),
            storage: DEFAULT_STORAGE.into(),
            format: ImageFormat::Raw,
            bus: "virtio".into(),
            disk_options: None,
            efi: None,
            tpm: false,
        }
    }
}

/// A VM that was made.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Created {
    /// Its number.
    pub id: u32,
    /// Its configuration.
    pub config: PathBuf,
    /// Its disks: key and volume.
    pub disks: Vec<(String, String)>,
}

/// Makes a VM. Ends in bounded time after `cancel`, and should be awaited to its end: dropping the
/// future leaves what was made to the recovery.
///
/// # Errors
/// [`CreateError`]; the disks made so far are removed then.
pub async fn create(
    ctx: &JobContext,
    id: u32,
    options: &CreateOptions,
    sink: &dyn TaskSink,
    cancel: &CancellationToken,
) -> Result<Created, CreateError> {
    let layout = &ctx.layout;
    layout::check_guest_id(id)?;
    let lock_path = backup_lock_path(layout, GuestKind::Qemu, id);
    let _lock = FileLock::try_acquire(&lock_path, &format!("VM {id}"))?;
    let left = recover::recover_guest(ctx, GuestKind::Qemu, id, sink);
    let left = cancel.run_until_cancelled(left).await.ok_or(CreateError::Cancelled)??;
    if let Some(Leftover { reason, .. }) = left.into_iter().next() {
        return Err(CreateError::Leftover(reason));
    }
    let swept = leftovers::remove_of_guest(ctx, id, sink);
    cancel.run_until_cancelled(swept).await.ok_or(CreateError::Cancelled)?;
    refuse_existing(layout, id)?;
    let mut config = VmConfig::default();
    let mut keys: Vec<_> = options.keys.iter().collect();
    keys.sort();
    for (key, value) in keys {
        config.set(key, value)?;
    }
    check_startable(layout, id, options, &config)?;
    let begin = Begin::new(TaskKind::Create, GuestKind::Qemu, id, &options.storage)
        .map_err(CreateError::Proc)?;
    let mut new = NewVolumes::new(Journal::create(layout, begin).await?);
    match make(ctx, id, options, config, &mut new, cancel).await {
        Ok(disks) => {
            if let Err(error) = new.journal.remove().await {
                sink.warn(&chain(&error));
            }
            Ok(Created { id, config: layout.vm_config_path(id), disks })
        }
        Err(error) => {
            let problems = new.free(ctx).await;
            problems.iter().for_each(|problem| sink.warn(problem));
            // What is left is the recovery's.
            if problems.is_empty()
                && let Err(error) = new.journal.remove().await
            {
                sink.warn(&chain(&error));
            }
            Err(error)
        }
    }
}

/// Refuses what `vm start` would refuse, before disks are copied for hours.
fn check_startable(
    layout: &Layout,
    id: u32,
    options: &CreateOptions,
    config: &VmConfig,
) -> Result<(), CreateError> {
    if let Some(text) = &options.disk_options {
        let list = OptionList::parse(text).map_err(CreateError::Invalid)?;
        if list.first.is_some() {
            return Err(CreateError::Invalid(format!("'{text}' names a volume; it gets its own.")));
        }
        if let Some(name) = OWN_OPTIONS.iter().find(|name| list.get(name).is_some()) {
            let why = format!("The option '{name}' of a new disk is set by its volume.");
            return Err(CreateError::Invalid(why));
        }
    }
    let mut config = config.clone();
    for number in 0..options.disks.len() {
        let key = format!("{}{number}", options.bus);
        if !is_disk_key(&key) {
            break;
        }
        let more = options.disk_options.as_ref().map(|more| format!(",{more}"));
        let value = format!("{DEFAULT_STORAGE}:{id}/disk.raw{}", more.unwrap_or_default());
        config.set(&key, &value)?;
    }
    let file = DiskFile {
        path: "/disk.raw".into(),
        data: None,
        is_device: false,
        direct: true,
        is_aligned: true,
        size_bytes: None,
    };
    let find = |_: &DiskEntry| Ok(file.clone());
    let input = Input { layout, id, find: &find, paused: false, mark: None, live: &[] };
    qemu_cmdline::build(&config, &input).map(drop).map_err(CreateError::Start)
}

/// A container has no lock in common with a VM of its number.
fn refuse_existing(layout: &Layout, id: u32) -> Result<(), CreateError> {
    let path = layout.guest_configs(id).into_iter().next();
    path.map_or(Ok(()), |path| Err(CreateError::Exists { id, path }))
}

/// The disks, and then the configuration, which makes the VM exist.
async fn make(
    ctx: &JobContext,
    id: u32,
    options: &CreateOptions,
    mut config: VmConfig,
    new: &mut NewVolumes,
    cancel: &CancellationToken,
) -> Result<Vec<(String, String)>, CreateError> {
    let disks = make_disks(ctx, id, options, &mut config, new);
    let disks = cancel.run_until_cancelled(disks).await.ok_or(CreateError::Cancelled)??;
    config.disks()?;
    refuse_existing(&ctx.layout, id)?;
    let path = ctx.layout.vm_config_path(id);
    config.write_new(&path).map_err(|error| match error {
        ConfigError::Write { source, path }
            if source.kind() == std::io::ErrorKind::AlreadyExists =>
        {
            CreateError::Exists { id, path }
        }
        other => other.into(),
    })?;
    if let Err(error) = new.journal.append(Entry::Complete).await {
        tracing::warn!(%error, "that a VM is made was not journalled");
    }
    Ok(disks)
}

async fn make_disks(
    ctx: &JobContext,
    id: u32,
    options: &CreateOptions,
    config: &mut VmConfig,
    new: &mut NewVolumes,
) -> Result<Vec<(String, String)>, CreateError> {
    let storage = ctx.storages.images(&options.storage)?;
    let mut disks = Vec::new();
    for (number, content) in options.disks.iter().enumerate() {
        let key = format!("{}{number}", options.bus);
        if !is_disk_key(&key) {
            let why = format!("There is no disk '{key}'; use another bus or fewer disks.");
            return Err(CreateError::Invalid(why));
        }
        let size_bytes = content.size_bytes().await?;
        let volume = new.allocate(ctx, storage.as_ref(), id, options.format, size_bytes).await?;
        if let DiskContent::CopyOf(source) = content {
            copy(&ctx.tools, source, &storage.image_options(&volume)?).await?;
        }
        let mut value = volume.to_string();
        if let Some(more) = &options.disk_options {
            let _ = write!(value, ",{more}");
        }
        let _ = write!(value, ",size={}", size_config(size_bytes));
        config.set(&key, &value)?;
        disks.push((key, volume.to_string()));
    }
    if let Some(text) = &options.efi {
        disks.push(make_efi_disk(ctx, id, options, text, config, new).await?);
    }
    if options.tpm {
        // Its first start makes the TPM.
        let raw = ImageFormat::Raw;
        let volume = new.allocate(ctx, storage.as_ref(), id, raw, tpm::STATE_BYTES).await?;
        let size = size_config(tpm::STATE_BYTES);
        config.set(tpm::KEY, &format!("{volume},size={size},version=v2.0"))?;
        disks.push((tpm::KEY.to_owned(), volume.to_string()));
    }
    Ok(disks)
}

/// The variables of the firmware, as a new guest has them.
async fn make_efi_disk(
    ctx: &JobContext,
    id: u32,
    options: &CreateOptions,
    text: &str,
    config: &mut VmConfig,
    new: &mut NewVolumes,
) -> Result<(String, String), CreateError> {
    let list = OptionList::parse(text).map_err(CreateError::Invalid)?;
    let known = |name: &String| ovmf::OPTIONS.contains(&name.as_str());
    if list.first.is_some() || !list.named.iter().all(|(name, _)| known(name)) {
        let known = ovmf::OPTIONS.join(", ");
        return Err(CreateError::Invalid(format!(
            "'{text}' has options that are none of {known}."
        )));
    }
    let efi = EfiOptions::parse(&list).map_err(CreateError::Invalid)?;
    // Before anything is made: without the code the guest could not be started.
    efi.code()?;
    let template = efi.vars()?;
    let size_bytes = efi.kind.vars_bytes();
    let (_, found) = inspect(&template).await?;
    if found != size_bytes {
        let message = format!("it has {found} bytes, and the firmware needs {size_bytes}");
        return Err(CreateError::Copy { path: template, message });
    }
    let storage = ctx.storages.images(&options.storage)?;
    let volume = new.allocate(ctx, storage.as_ref(), id, options.format, size_bytes).await?;
    copy(&ctx.tools, &template, &storage.image_options(&volume)?).await?;
    let mut value = volume.to_string();
    for (name, option) in &list.named {
        let _ = write!(value, ",{name}={option}");
    }
    let _ = write!(value, ",size={}", size_config(size_bytes));
    config.set("bios", "ovmf")?;
    config.set(EFI_KEY, &value)?;
    Ok((EFI_KEY.to_owned(), volume.to_string()))
}

impl DiskContent {
    async fn size_bytes(&self) -> Result<u64, CreateError> {
        match self {
            Self::Empty(size_bytes) => Ok(*size_bytes),
            Self::CopyOf(path) => {
                let (_, size_bytes) = inspect(path).await?;
                // QEMU rounds the size of a raw file up the same way.
                Ok(size_bytes.next_multiple_of(512))
            }
        }
    }
}

/// Format and size of a file that is copied.
async fn inspect(path: &Path) -> Result<(ImageFormat, u64), CreateError> {
    let file = path.to_owned();
    let looked = blocking::run(move || {
        let size = |format| Ok((format, image_size(&file, format)?));
        Ok(detect_format(&file).and_then(size))
    });
    let fault = |error: std::io::Error| CreateError::Copy {
        path: path.to_owned(),
        message: error.to_string(),
    };
    looked.await.map_err(fault)?
}

/// A file that begins as a qcow2 image is one. Only for files the administrator names, never for
/// files a guest has written.
fn detect_format(path: &Path) -> Result<ImageFormat, CreateError> {
    let fault = |error: std::io::Error| CreateError::Copy {
        path: path.to_owned(),
        message: error.to_string(),
    };
    let mut begin = Vec::new();
    File::open(path).map_err(fault)?.take(4).read_to_end(&mut begin).map_err(fault)?;
    Ok(if begin == b"QFI\xfb" { ImageFormat::Qcow2 } else { ImageFormat::Raw })
}

async fn copy(tools: &Tools, source: &Path, target_options: &str) -> Result<(), CreateError> {
    let fault = |message: String| CreateError::Copy { path: source.to_owned(), message };
    let (source_format, _) = inspect(source).await?;
    let source_path = std::path::absolute(source).map_err(|error| fault(error.to_string()))?;
    // No time limit: large disks take long, and dropping the future ends the copy.
    let mut command = bound::command(&tools.qemu_img()?);
    command
        .args(["convert", "-n", "--target-is-zero", "-f", source_format.name()])
        .args(["--target-image-opts", "--"])
        .arg(source_path)
        .arg(target_options)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let started = bound::start(command).await;
    let bound = started.map_err(|error| fault(error.to_string()))?;
    let output = bound.output().await.map_err(|error| fault(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(fault(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

/// Reads a size: `512`, `64K`, `100M`, `32G`, `2T`, in powers of 1024.
///
/// # Errors
/// A sentence that says what is expected.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KIB" => 10,
        "M" | "MIB" => 20,
        "G" | "GIB" => 30,
        "T" | "TIB" => 40,
        _ => return Err(format!("'{text}' is not a size such as 512M, 32G or 2T.")),
    };
    let number: Option<u64> = digits.parse().ok();
    number
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("'{text}' is not a size such as 512M, 32G or 2T."))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use provider_api::{BoxFuture, Provider};

    use super::*;
    use crate::config::storage::StorageConfig;
    use crate::job::Limits;
    use crate::storage::StorageSet;
    use crate::task_log::NoLog;
    use crate::vm::freeze_guard::GuardCommand;

    struct NoProviders;

    impl crate::job::Providers for NoProviders {
        fn provider<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Arc<dyn Provider>, String>> {
            Box::pin(std::future::ready(Err("there is none".to_owned())))
        }
    }

    fn place(tools: Tools) -> (tempfile::TempDir, JobContext) {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(Some(dir.path().into()));
        let ctx = JobContext {
            storages: StorageSet::new(&StorageConfig::default(), &layout),
            layout,
            tools,
            providers: Arc::new(NoProviders),
            containers: Arc::new(crate::guest::NoContainers),
            guard: GuardCommand { program: "/nonexistent".into(), args: Vec::new() },
            limits: Limits::default(),
        };
        (dir, ctx)
    }

    async fn create(
        ctx: &JobContext,
        id: u32,
        options: &CreateOptions,
    ) -> Result<Created, CreateError> {
        super::create(ctx, id, options, &NoLog, &CancellationToken::new()).await
    }

    fn images(ctx: &JobContext, id: u32) -> PathBuf {
        ctx.layout.state().join(format!("storage/images/{id}"))
    }

    fn journals(ctx: &JobContext) -> Vec<PathBuf> {
        crate::journal::list(&ctx.layout, None).unwrap()
    }

    #[tokio::test]
    async fn a_new_vm_has_a_configuration_and_disks() {
        let (_dir, ctx) = place(Tools::in_dir("/nonexistent"));
        let options = CreateOptions {
            keys: vec![("name".into(), "web".into()), ("cores".into(), "2".into())],
            disks: vec![DiskContent::Empty(1 << 30), DiskContent::Empty(1536)],
            disk_options: Some("discard=on".into()),
            ..CreateOptions::default()
        };
        let created = create(&ctx, 100, &options).await.unwrap();
        let config = VmConfig::read(&created.config).unwrap().unwrap();
        assert_eq!(
            config.to_string(),
            "cores: 2\nname: web\nvirtio0: local:100/vm-100-disk-0.raw,discard=on,size=1G\n\
             virtio1: local:100/vm-100-disk-1.raw,discard=on,size=1536\n"
        );
        for (_, volume) in &created.disks {
            assert!(ctx.storages.resolve(volume).unwrap().exists());
        }
        let again = create(&ctx, 100, &options).await;
        assert!(matches!(again, Err(CreateError::Exists { id: 100, .. })));
        assert_eq!(images(&ctx, 100).read_dir().unwrap().count(), 2);
    }

    #[tokio::test]
    async fn a_failure_removes_the_disks_made_so_far() {
        let (_dir, ctx) = place(Tools::in_dir("/nonexistent"));
        for bad in [
            CreateOptions {
                disks: vec![DiskContent::Empty(512), DiskContent::CopyOf("/nonexistent".into())],
                ..CreateOptions::default()
            },
            CreateOptions {
                disks: vec![DiskContent::Empty(512); 5],
                bus: "ide".into(),
                ..CreateOptions::default()
            },
            CreateOptions {
                disks: vec![DiskContent::Empty(512)],
                disk_options: Some("discard".into()),
                ..CreateOptions::default()
            },
            CreateOptions {
                disks: vec![DiskContent::Empty(512)],
                disk_options: Some("discard=on,size=5M".into()),
                ..CreateOptions::default()
            },
            CreateOptions {
                keys: vec![("name".into(), "a\nargs: -x".into())],
                ..CreateOptions::default()
            },
        ] {
            create(&ctx, 100, &bad).await.unwrap_err();
            assert!(!ctx.layout.vm_config_path(100).exists());
            assert!(!images(&ctx, 100).exists());
            assert!(journals(&ctx).is_empty());
        }
    }

    #[tokio::test]
    async fn what_could_not_be_started_is_not_made() {
        let (_dir, ctx) = place(Tools::in_dir("/nonexistent"));
        for (key, value, disk_options) in [
            ("cores", "0", None),
            ("memory", "0", None),
            ("name", "a", Some("foo=bar")),
            ("name", "a", Some("discard=maybe")),
        ] {
            let options = CreateOptions {
                keys: vec![(key.to_owned(), value.to_owned())],
                disks: vec![DiskContent::Empty(512)],
                disk_options: disk_options.map(str::to_owned),
                ..CreateOptions::default()
            };
            let error = create(&ctx, 100, &options).await.unwrap_err();
            assert!(matches!(error, CreateError::Start(_)), "{error}");
            assert!(!images(&ctx, 100).exists());
        }
    }

    #[tokio::test]
    async fn a_creation_that_died_is_cleaned_up_by_the_next_one() {
        let (_dir, ctx) = place(Tools::in_dir("/nonexistent"));
        let begin = Begin::new(TaskKind::Create, GuestKind::Qemu, 100, "local").unwrap();
        let mut died = NewVolumes::new(Journal::create(&ctx.layout, begin).await.unwrap());
        let storage = ctx.storages.images("local").unwrap();
        let made = died.allocate(&ctx, storage.as_ref(), 100, ImageFormat::Raw, 512).await.unwrap();
        drop(died);
        let options =
            CreateOptions { disks: vec![DiskContent::Empty(1024)], ..CreateOptions::default() };
        let created = create(&ctx, 100, &options).await.unwrap();
        // The name is free again, and the disk is the new one.
        assert_eq!(created.disks[0].1, made.to_string());
        assert_eq!(storage.volume_size(&made).unwrap(), 1024);
        assert!(journals(&ctx).is_empty());
    }

    #[tokio::test]
    async fn a_guest_that_is_being_worked_on_is_not_made() {
        let (_dir, ctx) = place(Tools::in_dir("/nonexistent"));
        let path = backup_lock_path(&ctx.layout, GuestKind::Qemu, 100);
        let _held = FileLock::try_acquire(&path, "VM 100").unwrap();
        let refused = create(&ctx, 100, &CreateOptions::default()).await;
        assert!(matches!(refused, Err(CreateError::Lock(LockError::Busy { .. }))));
    }

    #[tokio::test]
    async fn a_cancelled_creation_leaves_nothing() {
        let (_dir, ctx) = place(Tools::in_dir("/nonexistent"));
        let options =
            CreateOptions { disks: vec![DiskContent::Empty(512)], ..CreateOptions::default() };
        let cancel = CancellationToken::new();
        cancel.cancel();
        let cancelled = super::create(&ctx, 100, &options, &NoLog, &cancel).await;
        assert!(matches!(cancelled, Err(CreateError::Cancelled)));
        assert!(!ctx.layout.vm_config_path(100).exists() && journals(&ctx).is_empty());
        assert!(!images(&ctx, 100).exists());
    }

    #[tokio::test]
    async fn a_file_is_copied_into_a_disk() {
        let (dir, ctx) = place(Tools::find(None, None));
        if ctx.tools.qemu_img().is_err() {
            eprintln!("skipped: qemu-img is missing");
            return;
        }
        let source = dir.path().join("source");
        std::fs::write(&source, vec![7; 1000]).unwrap();
        let options = CreateOptions {
            disks: vec![DiskContent::CopyOf(source)],
            format: ImageFormat::Qcow2,
            ..CreateOptions::default()
        };
        let created = create(&ctx, 100, &options).await.unwrap();
        let path = ctx.storages.resolve(&created.disks[0].1).unwrap();
        assert_eq!(image_size(&path, ImageFormat::Qcow2).unwrap(), 1024);
        let options =
            CreateOptions { disks: vec![DiskContent::CopyOf(path)], ..CreateOptions::default() };
        let created = create(&ctx, 101, &options).await.unwrap();
        let bytes = std::fs::read(ctx.storages.resolve(&created.disks[0].1).unwrap()).unwrap();
        assert_eq!(bytes, [vec![7; 1000], vec![0; 24]].concat());
    }

    #[test]
    fn sizes_are_read_and_written() {
        for (text, bytes) in [("512", 512), ("4k", 4096), ("32G", 32 << 30), ("2TiB", 2 << 40)] {
            assert_eq!(parse_size(text), Ok(bytes));
        }
        for bad in ["", "G", "1.5G", "-1", "1X", "99999999999T", "1G G"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_size(&size_config(5 << 20)), Ok(5 << 20));
    }
}
