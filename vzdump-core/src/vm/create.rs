// SPDX-License-Identifier: MIT OR Apache-2.0
//! Makes a new VM: its disks first, its configuration last and in one step.

use std::fmt::Write;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::Command;

use crate::config::ConfigError;
use crate::config::guest::{VmConfig, is_disk_key};
use crate::layout::{self, Layout, LayoutError};
use crate::storage::{
    DEFAULT_STORAGE, ImageFormat, ImageStorage, StorageError, StorageSet, VolumeId, image_size,
};
use crate::task_log::size_config;
use crate::tools::{MissingTool, Tools};

/// Why a VM was not made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The number is taken.
    #[error("The VM {id} exists already ('{path}').")]
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
    /// Not a guest number.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The configuration could not be written.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A disk could not be made.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A program is missing.
    #[error(transparent)]
    Tool(#[from] MissingTool),
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

/// Makes a VM.
///
/// # Errors
/// [`CreateError`]; the disks made so far are removed then, also when the future is dropped.
pub async fn create(
    layout: &Layout,
    tools: &Tools,
    storages: &StorageSet,
    id: u32,
    options: &CreateOptions,
) -> Result<Created, CreateError> {
    layout::check_guest_id(id)?;
    let path = layout.vm_config_path(id);
    if path.exists() {
        return Err(CreateError::Exists { id, path });
    }
    let mut config = VmConfig::default();
    let mut keys: Vec<_> = options.keys.iter().collect();
    keys.sort();
    for (key, value) in keys {
        config.set(key, value)?;
    }
    let storage = storages.images(&options.storage)?;
    let mut made = Made { storage: &storage, volumes: Vec::new() };
    let mut disks = Vec::new();
    for (number, content) in options.disks.iter().enumerate() {
        let key = format!("{}{number}", options.bus);
        if !is_disk_key(&key) {
            let why = format!("There is no disk '{key}'; use another bus or fewer disks.");
            return Err(CreateError::Invalid(why));
        }
        let size_bytes = content.size_bytes()?;
        let volume = storage.allocate_disk(tools, id, options.format, size_bytes).await?;
        made.volumes.push(volume.clone());
        if let DiskContent::CopyOf(source) = content {
            copy(tools, source, &storage.volume_path(&volume)?, volume.format()).await?;
        }
        let mut value = volume.to_string();
        if let Some(more) = &options.disk_options {
            let _ = write!(value, ",{more}");
        }
        let _ = write!(value, ",size={}", size_config(size_bytes));
        config.set(&key, &value)?;
        disks.push((key, volume.to_string()));
    }
    config.disks()?;
    config.write_new(&path).map_err(|error| match error {
        ConfigError::Write { source, path }
            if source.kind() == std::io::ErrorKind::AlreadyExists =>
        {
            CreateError::Exists { id, path }
        }
        other => other.into(),
    })?;
    made.volumes.clear();
    Ok(Created { id, config: path, disks })
}

/// Volumes that are removed unless the VM comes to be.
struct Made<'a> {
    storage: &'a ImageStorage,
    volumes: Vec<VolumeId>,
}

impl Drop for Made<'_> {
    fn drop(&mut self) {
        for volume in &self.volumes {
            if let Err(error) = self.storage.free(volume) {
                tracing::warn!(%volume, %error, "a new disk could not be removed again");
            }
        }
    }
}

impl DiskContent {
    fn size_bytes(&self) -> Result<u64, CreateError> {
        match self {
            Self::Empty(size_bytes) => Ok(*size_bytes),
            Self::CopyOf(path) => {
                let size_bytes = image_size(path, detect_format(path)?)?;
                // QEMU rounds the size of a raw file up the same way.
                Ok(size_bytes.next_multiple_of(512))
            }
        }
    }
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

async fn copy(
    tools: &Tools,
    source: &Path,
    target: &Path,
    format: ImageFormat,
) -> Result<(), CreateError> {
    let fault = |message: String| CreateError::Copy { path: source.to_owned(), message };
    let source_format = detect_format(source)?;
    let source_path = std::path::absolute(source).map_err(|error| fault(error.to_string()))?;
    // No time limit: large disks take long, and dropping the future ends the copy.
    let output = Command::new(tools.qemu_img()?)
        .args(["convert", "-n", "-f", source_format.name(), "-O", format.name(), "--"])
        .arg(source_path)
        .arg(target)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|error| fault(error.to_string()))?;
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
    use super::*;
    use crate::config::storage::StorageConfig;

    fn place() -> (tempfile::TempDir, Layout, StorageSet) {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(Some(dir.path().into()));
        let storages = StorageSet::new(&StorageConfig::default(), &layout);
        (dir, layout, storages)
    }

    #[tokio::test]
    async fn a_new_vm_has_a_configuration_and_disks() {
        let (_dir, layout, storages) = place();
        let tools = Tools::in_dir("/nonexistent");
        let options = CreateOptions {
            keys: vec![("name".into(), "web".into()), ("cores".into(), "2".into())],
            disks: vec![DiskContent::Empty(1 << 30), DiskContent::Empty(1536)],
            disk_options: Some("discard=on".into()),
            ..CreateOptions::default()
        };
        let created = create(&layout, &tools, &storages, 100, &options).await.unwrap();
        let config = VmConfig::read(&created.config).unwrap().unwrap();
        assert_eq!(
            config.to_string(),
            "cores: 2\nname: web\nvirtio0: local:100/vm-100-disk-0.raw,discard=on,size=1G\n\
             virtio1: local:100/vm-100-disk-1.raw,discard=on,size=1536\n"
        );
        for (_, volume) in &created.disks {
            assert!(storages.resolve(volume).unwrap().exists());
        }
        let again = create(&layout, &tools, &storages, 100, &options).await;
        assert!(matches!(again, Err(CreateError::Exists { id: 100, .. })));
        assert_eq!(
            storages.images("local").unwrap().path().join("images/100").read_dir().unwrap().count(),
            2
        );
    }

    #[tokio::test]
    async fn a_failure_removes_the_disks_made_so_far() {
        let (_dir, layout, storages) = place();
        let tools = Tools::in_dir("/nonexistent");
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
                keys: vec![("name".into(), "a\nargs: -x".into())],
                ..CreateOptions::default()
            },
        ] {
            create(&layout, &tools, &storages, 100, &bad).await.unwrap_err();
            assert!(!layout.vm_config_path(100).exists());
            assert!(!storages.images("local").unwrap().path().join("images/100").exists());
        }
    }

    #[tokio::test]
    async fn a_file_is_copied_into_a_disk() {
        let (dir, layout, storages) = place();
        let tools = Tools::find(None, None);
        if tools.qemu_img().is_err() {
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
        let created = create(&layout, &tools, &storages, 100, &options).await.unwrap();
        let path = storages.resolve(&created.disks[0].1).unwrap();
        assert_eq!(image_size(&path, ImageFormat::Qcow2).unwrap(), 1024);
        let options =
            CreateOptions { disks: vec![DiskContent::CopyOf(path)], ..CreateOptions::default() };
        let created = create(&layout, &tools, &storages, 101, &options).await.unwrap();
        let bytes = std::fs::read(storages.resolve(&created.disks[0].1).unwrap()).unwrap();
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
