// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disk images on a directory storage.
//!
//! The volume `local:100/vm-100-disk-0.qcow2` is the file `<path>/images/100/vm-100-disk-0.qcow2`.
//! Names are checked strictly, because they also come from configurations and archives.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::str::FromStr;
use std::time::Duration;

use crate::blocking;
use crate::config::storage::{StorageConfig, StorageSection, is_storage_id};
use crate::layout::Layout;
use crate::tools::{MissingTool, Tools};

/// The kind of storage this module serves.
pub const DIR_KIND: &str = "dir";
/// The storage that exists without being configured.
pub const DEFAULT_STORAGE: &str = "local";
/// Disks of one guest; a bound for the search of a free name.
const DISKS_MAX: u32 = 1000;
/// Making an empty image takes milliseconds; this covers a slow network file system.
const CREATE_TIMEOUT: Duration = Duration::from_secs(60);
/// Largest image: 16 TiB beyond which some file systems refuse, rounded up generously.
const SIZE_MAX_BYTES: u64 = 1 << 50;
/// Unit of disk sizes.
const SECTOR_BYTES: u64 = 512;

/// A fault of a storage.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// A volume's name is not allowed.
    #[error("'{text}' is not a volume: {why}")]
    Name {
        /// The name.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// No such storage, or not one for images.
    #[error("The storage '{id}' {why}")]
    Storage {
        /// The storage.
        id: String,
        /// What is wrong with it.
        why: String,
    },
    /// The size is not allowed.
    #[error("{size_bytes} bytes is not a disk size: a multiple of 512 up to 1 PiB is needed.")]
    Size {
        /// The size.
        size_bytes: u64,
    },
    /// The volume exists already.
    #[error("The volume '{volume}' exists already.")]
    Exists {
        /// The volume.
        volume: String,
    },
    /// The volume does not exist.
    #[error("The volume '{volume}' does not exist ('{path}').")]
    NotFound {
        /// The volume.
        volume: String,
        /// Its file.
        path: PathBuf,
    },
    /// An image has not the format its name says.
    #[error("The volume '{volume}' is not a valid {format} image: {why}")]
    Format {
        /// The volume.
        volume: String,
        /// The expected format.
        format: ImageFormat,
        /// What is wrong with it.
        why: String,
    },
    /// The program that makes images failed.
    #[error("qemu-img could not make the image '{path}': {message}")]
    QemuImg {
        /// The image.
        path: PathBuf,
        /// What it said.
        message: String,
    },
    /// A program is missing.
    #[error(transparent)]
    Tool(#[from] MissingTool),
    /// Input or output failed.
    #[error("Cannot {what} '{path}'.")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Format of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageFormat {
    /// The disk's bytes as they are.
    Raw,
    /// QEMU's own format.
    Qcow2,
}

impl ImageFormat {
    /// Its name in QEMU and as the end of a file's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    /// The format of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Raw, Self::Qcow2].into_iter().find(|format| format.name() == name)
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The name of an image, `local:100/vm-100-disk-0.raw`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct VolumeId {
    storage: String,
    guest_id: u32,
    file: String,
    format: ImageFormat,
}

impl VolumeId {
    /// The storage.
    #[must_use]
    pub fn storage(&self) -> &str {
        &self.storage
    }

    /// The guest it belongs to.
    #[must_use]
    pub fn guest_id(&self) -> u32 {
        self.guest_id
    }

    /// The format.
    #[must_use]
    pub fn format(&self) -> ImageFormat {
        self.format
    }

    fn new(
        storage: &str,
        guest_id: u32,
        name: &str,
        format: ImageFormat,
    ) -> Result<Self, StorageError> {
        format!("{storage}:{guest_id}/{name}.{format}").parse()
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.storage, self.guest_id, self.file)
    }
}

impl FromStr for VolumeId {
    type Err = StorageError;

    fn from_str(text: &str) -> Result<Self, StorageError> {
        let fault = |why| StorageError::Name { text: text.to_owned(), why };
        let (storage, rest) =
            text.split_once(':').ok_or_else(|| fault("'<storage>:<id>/<file>' is expected."))?;
        if !is_storage_id(storage) {
            return Err(fault("the storage's name is not allowed."));
        }
        let (guest, file) = rest
            .split_once('/')
            .ok_or_else(|| fault("'<id>/<file>' is expected behind the colon."))?;
        let digits = guest.bytes().all(|b| b.is_ascii_digit()) && !guest.starts_with('0');
        let guest_id = guest.parse().ok().filter(|_| digits);
        let guest_id = guest_id.ok_or_else(|| fault("the guest's number is not a number."))?;
        let plain = file.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+".contains(&b));
        let first = file.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        if !plain || !first || file.len() > 200 || file.contains("..") {
            return Err(fault("the file's name has characters that are not allowed."));
        }
        let end = file.rsplit_once('.').filter(|(stem, _)| !stem.is_empty()).map(|(_, end)| end);
        let format = end
            .and_then(ImageFormat::from_name)
            .ok_or_else(|| fault("the file's name must end in .raw or .qcow2."))?;
        Ok(Self { storage: storage.to_owned(), guest_id, file: file.to_owned(), format })
    }
}

/// A directory that holds images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageStorage {
    id: String,
    path: PathBuf,
}

impl ImageStorage {
    /// A storage with this name at this absolute path.
    #[must_use]
    pub fn new(id: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self { id: id.into(), path: path.into() }
    }

    fn from_section(section: &StorageSection) -> Result<Self, StorageError> {
        let fault = |why: String| StorageError::Storage { id: section.id.clone(), why };
        if section.kind != DIR_KIND {
            return Err(fault(format!("has the type '{}', which holds no images.", section.kind)));
        }
        if section.is_disabled() {
            return Err(fault("is disabled in storage.cfg.".into()));
        }
        if !section.allows("images") {
            return Err(fault("does not have 'images' in its 'content'.".into()));
        }
        match section.get("path") {
            Some(path) if Path::new(path).is_absolute() => Ok(Self::new(&section.id, path)),
            _ => Err(fault("needs a 'path' that is absolute.".into())),
        }
    }

    /// Its name.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn guest_dir(&self, guest_id: u32) -> PathBuf {
        self.path.join("images").join(guest_id.to_string())
    }

    /// The file of a volume, whether it exists or not.
    ///
    /// # Errors
    /// [`StorageError::Storage`] for a volume of another storage.
    pub fn volume_path(&self, volume: &VolumeId) -> Result<PathBuf, StorageError> {
        if volume.storage != self.id {
            let why = format!("does not hold the volume '{volume}'.");
            return Err(StorageError::Storage { id: self.id.clone(), why });
        }
        Ok(self.guest_dir(volume.guest_id).join(&volume.file))
    }

    /// Whether a volume exists.
    ///
    /// # Errors
    /// [`StorageError`].
    pub fn exists(&self, volume: &VolumeId) -> Result<bool, StorageError> {
        Ok(self.volume_path(volume)?.exists())
    }

    /// Makes a volume that reads as zeroes. `name` has no ending: `vm-100-disk-0`. A raw image is
    /// sparse and has exactly the size.
    ///
    /// # Errors
    /// [`StorageError::Exists`] when there is one of that name; nothing is left behind by a failure, or
    /// when the future is dropped.
    pub async fn allocate(
        &self,
        tools: &Tools,
        guest_id: u32,
        name: &str,
        format: ImageFormat,
        size_bytes: u64,
    ) -> Result<VolumeId, StorageError> {
        if size_bytes == 0
            || size_bytes > SIZE_MAX_BYTES
            || !size_bytes.is_multiple_of(SECTOR_BYTES)
        {
            return Err(StorageError::Size { size_bytes });
        }
        let volume = VolumeId::new(&self.id, guest_id, name, format)?;
        let path = self.volume_path(&volume)?;
        let dir = self.guest_dir(guest_id);
        let fault =
            |what, path: &Path, source| StorageError::Io { what, path: path.into(), source };
        let made = blocking::run({
            let (dir, path) = (dir.clone(), path.clone());
            move || Unfinished::make(&dir, path)
        });
        let unfinished = made.await.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => StorageError::Exists { volume: volume.to_string() },
            _ => fault("make the image", &path, error),
        })?;
        let (filled, raw_size_bytes) = match format {
            ImageFormat::Raw => (Ok(()), Some(size_bytes)),
            ImageFormat::Qcow2 => (create_qcow2(tools, &path, size_bytes).await, None),
        };
        let is_filled = filled.is_ok();
        let finished = blocking::run(move || {
            let result = if is_filled { unfinished.finish(raw_size_bytes, &dir) } else { Ok(()) };
            if is_filled && result.is_ok() {
                return Ok(Some(unfinished));
            }
            unfinished.remove();
            result.map(|()| None)
        });
        let finished = finished.await;
        filled?;
        if let Some(unfinished) =
            finished.map_err(|error| fault("finish the image", &path, error))?
        {
            unfinished.keep();
        }
        Ok(volume)
    }

    /// A name `vm-<id>-disk-<n>` that no disk has, whatever its format.
    ///
    /// # Errors
    /// [`StorageError`].
    pub async fn free_name(&self, guest_id: u32) -> Result<String, StorageError> {
        let dir = self.guest_dir(guest_id);
        let fault = |source| StorageError::Io { what: "look into", path: dir.clone(), source };
        let looked = blocking::run({
            let dir = dir.clone();
            move || {
                let is_free = |name: &String| {
                    let taken = [ImageFormat::Raw, ImageFormat::Qcow2]
                        .map(|format| dir.join(format!("{name}.{format}")).exists());
                    taken == [false, false]
                };
                Ok((0..DISKS_MAX).map(|n| format!("vm-{guest_id}-disk-{n}")).find(is_free))
            }
        });
        looked.await.map_err(fault)?.ok_or_else(|| {
            let why = format!("has no free disk name for the guest {guest_id}.");
            StorageError::Storage { id: self.id.clone(), why }
        })
    }

    /// Removes a volume; tells whether it was there.
    ///
    /// # Errors
    /// [`StorageError`].
    pub async fn free(&self, volume: &VolumeId) -> Result<bool, StorageError> {
        let path = self.volume_path(volume)?;
        let dir = self.guest_dir(volume.guest_id);
        let removed = blocking::run({
            let path = path.clone();
            move || match fs::remove_file(&path) {
                Ok(()) => {
                    // Fails as long as there are other volumes, which is right.
                    let _ = fs::remove_dir(dir);
                    Ok(true)
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
                Err(error) => Err(error),
            }
        });
        removed.await.map_err(|source| StorageError::Io { what: "remove", path, source })
    }

    /// The size of the disk in a volume.
    ///
    /// # Errors
    /// [`StorageError::NotFound`], [`StorageError::Format`].
    pub fn volume_size(&self, volume: &VolumeId) -> Result<u64, StorageError> {
        let path = self.volume_path(volume)?;
        image_size(&path, volume.format).map_err(|error| match error {
            StorageError::NotFound { path, .. } => {
                StorageError::NotFound { volume: volume.to_string(), path }
            }
            other => other,
        })
    }
}

/// The size of the disk in an image file or on a block device.
///
/// # Errors
/// [`StorageError::NotFound`], [`StorageError::Format`].
pub fn image_size(path: &Path, format: ImageFormat) -> Result<u64, StorageError> {
    let name = path.display().to_string();
    let fault = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => {
            StorageError::NotFound { volume: name.clone(), path: path.to_owned() }
        }
        _ => StorageError::Io { what: "read", path: path.to_owned(), source },
    };
    let wrong = |why: &str| StorageError::Format { volume: name.clone(), format, why: why.into() };
    let mut file = File::open(path).map_err(fault)?;
    let meta = file.metadata().map_err(fault)?;
    if !meta.is_file() && !meta.file_type().is_block_device() {
        return Err(wrong("it is neither a file nor a block device."));
    }
    match format {
        ImageFormat::Raw if meta.is_file() => Ok(meta.len()),
        // The size of a block device is where its end is.
        ImageFormat::Raw => io::Seek::seek(&mut file, io::SeekFrom::End(0)).map_err(fault),
        ImageFormat::Qcow2 => {
            // Magic, version, … and at 24 the size of the disk, all big-endian.
            let mut header = [0; 32];
            file.read_exact(&mut header).map_err(|_| wrong("it is too short."))?;
            let (magic, size) = (&header[..4], &header[24..]);
            if magic != b"QFI\xfb" {
                return Err(wrong("it does not begin as one."));
            }
            let size = size.try_into().map(u64::from_be_bytes);
            Ok(size.expect("the slice has eight bytes"))
        }
    }
}

async fn create_qcow2(tools: &Tools, path: &Path, size_bytes: u64) -> Result<(), StorageError> {
    let fault = |message: String| StorageError::QemuImg { path: path.to_owned(), message };
    let child = tokio::process::Command::new(tools.qemu_img()?)
        .args(["create", "-q", "-f", "qcow2", "--"])
        .arg(path)
        .arg(size_bytes.to_string())
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    match tokio::time::timeout(CREATE_TIMEOUT, child).await {
        Err(_) => Err(fault(format!("no answer after {} s.", CREATE_TIMEOUT.as_secs()))),
        Ok(Err(error)) => Err(fault(error.to_string())),
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => Err(fault(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
    }
}

/// A file that was begun. It is removed when this is dropped, also by the thread that made it for a
/// task that did not wait.
struct Unfinished {
    path: Option<PathBuf>,
    file: File,
}

impl Unfinished {
    /// Makes an image's file, which decides who owns the name, whatever the format.
    fn make(dir: &Path, path: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        Ok(Self { path: Some(path), file })
    }

    fn finish(&self, raw_size_bytes: Option<u64>, dir: &Path) -> io::Result<()> {
        if let Some(size_bytes) = raw_size_bytes {
            self.file.set_len(size_bytes)?;
        }
        self.file.sync_all()?;
        File::open(dir)?.sync_all()
    }

    /// Removes the file before it returns.
    fn remove(mut self) {
        self.path.take().map(fs::remove_file);
    }

    fn keep(mut self) {
        self.path = None;
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        let Some(path) = self.path.take() else { return };
        let remove = move || drop(fs::remove_file(path));
        // A task must not block; that nobody waits for the end is why the names are journalled.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(remove)),
            Err(_) => remove(),
        }
    }
}

/// All storages of `storage.cfg`, and the implicit `local`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StorageSet {
    sections: Vec<StorageSection>,
}

impl StorageSet {
    /// The storages of a list. A `local` for images, in the state directory, is added when the list
    /// has none.
    #[must_use]
    pub fn new(config: &StorageConfig, layout: &Layout) -> Self {
        let mut sections = config.sections();
        if !sections.iter().any(|section| section.id == DEFAULT_STORAGE) {
            let path = layout.state().join("storage").display().to_string();
            sections.push(StorageSection {
                id: DEFAULT_STORAGE.into(),
                kind: DIR_KIND.into(),
                properties: vec![("path".into(), path), ("content".into(), "images".into())],
            });
        }
        Self { sections }
    }

    /// All storages, those for backups included.
    #[must_use]
    pub fn sections(&self) -> &[StorageSection] {
        &self.sections
    }

    /// The storage for images of this name.
    ///
    /// # Errors
    /// [`StorageError::Storage`].
    pub fn images(&self, id: &str) -> Result<ImageStorage, StorageError> {
        let section = self.sections.iter().find(|section| section.id == id).ok_or_else(|| {
            StorageError::Storage { id: id.to_owned(), why: "is not in storage.cfg.".into() }
        })?;
        ImageStorage::from_section(section)
    }

    /// The file of a volume as a configuration names it: `local:100/…` or an absolute path.
    ///
    /// # Errors
    /// [`StorageError`].
    pub fn resolve(&self, volume: &str) -> Result<PathBuf, StorageError> {
        if volume.starts_with('/') {
            return Ok(volume.into());
        }
        let volume: VolumeId = volume.parse()?;
        self.images(volume.storage())?.volume_path(&volume)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage() -> (tempfile::TempDir, ImageStorage) {
        let dir = tempfile::tempdir().unwrap();
        let storage = ImageStorage::new("local", dir.path());
        (dir, storage)
    }

    #[test]
    fn names_cannot_leave_the_directory() {
        let good: VolumeId = "local:100/vm-100-disk-0.raw".parse().unwrap();
        assert_eq!(good.to_string(), "local:100/vm-100-disk-0.raw");
        assert_eq!((good.guest_id(), good.format()), (100, ImageFormat::Raw));
        for bad in [
            "vm-100-disk-0.raw",
            "local:vm-100-disk-0.raw",
            "local:../x.raw",
            "local:100/../x.raw",
            "local:100/..raw",
            "local:100/a..raw",
            "local:100/.raw",
            "local:100/-x.raw",
            "local:100/a/b.raw",
            "local:100/a b.raw",
            "local:100/a,b.raw",
            "local:100/a.vmdk",
            "local:100/a",
            "local:0100/a.raw",
            "local:+100/a.raw",
            "local:/a.raw",
            "../x:100/a.raw",
            ":100/a.raw",
            "local:99999999999/a.raw",
        ] {
            assert!(bad.parse::<VolumeId>().is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_raw_volume_is_sparse_and_exact() {
        let (dir, storage) = storage();
        let tools = Tools::in_dir("/nonexistent");
        let size = (1 << 30) + 512;
        let volume =
            storage.allocate(&tools, 100, "vm-100-disk-0", ImageFormat::Raw, size).await.unwrap();
        assert_eq!(volume.to_string(), "local:100/vm-100-disk-0.raw");
        assert_eq!(storage.volume_size(&volume).unwrap(), size);
        let path = dir.path().join("images/100/vm-100-disk-0.raw");
        let meta = fs::metadata(&path).unwrap();
        assert!(std::os::unix::fs::MetadataExt::blocks(&meta) < 64);

        let again = storage.allocate(&tools, 100, "vm-100-disk-0", ImageFormat::Raw, size).await;
        assert!(matches!(again, Err(StorageError::Exists { .. })));
        let name = storage.free_name(100).await.unwrap();
        assert_eq!(name, "vm-100-disk-1", "a name belongs to one disk, whatever its format");
        let next = storage.allocate(&tools, 100, &name, ImageFormat::Raw, 512).await.unwrap();

        assert!(storage.free(&volume).await.unwrap() && !storage.free(&volume).await.unwrap());
        assert!(storage.free(&next).await.unwrap());
        assert!(!dir.path().join("images/100").exists(), "an empty directory stayed");
        assert!(matches!(storage.volume_size(&volume), Err(StorageError::NotFound { .. })));
    }

    #[tokio::test]
    async fn a_failed_allocation_leaves_nothing() {
        let (dir, storage) = storage();
        let tools = Tools::in_dir("/nonexistent");
        let failed = storage.allocate(&tools, 100, "vm-100-disk-0", ImageFormat::Qcow2, 1 << 20);
        assert!(matches!(failed.await, Err(StorageError::Tool(_))));
        assert_eq!(fs::read_dir(dir.path().join("images/100")).unwrap().count(), 0);
        for size in [0, 100, 1 << 60] {
            let failed = storage.allocate(&tools, 100, "x", ImageFormat::Raw, size).await;
            assert!(matches!(failed, Err(StorageError::Size { .. })), "{size}");
        }
        let bad = storage.allocate(&tools, 100, "../x", ImageFormat::Raw, 512).await;
        assert!(matches!(bad, Err(StorageError::Name { .. })));
    }

    #[tokio::test]
    async fn an_image_that_nobody_waited_for_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("images/100/x.raw");
        drop(Unfinished::make(path.parent().unwrap(), path.clone()).unwrap());
        let gone = async {
            while path.exists() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), gone).await.expect("the image stayed");
    }

    #[tokio::test]
    async fn a_qcow2_volume_tells_the_size_of_its_disk() {
        let tools = Tools::find(None, None);
        if tools.qemu_img().is_err() {
            eprintln!("skipped: qemu-img is missing");
            return;
        }
        let (_dir, storage) = storage();
        let size = 10 << 20;
        let volume =
            storage.allocate(&tools, 100, "vm-100-disk-0", ImageFormat::Qcow2, size).await.unwrap();
        assert_eq!(storage.volume_size(&volume).unwrap(), size);
        let raw: VolumeId = "local:100/x.qcow2".parse().unwrap();
        fs::write(storage.volume_path(&raw).unwrap(), [0; 64]).unwrap();
        assert!(matches!(storage.volume_size(&raw), Err(StorageError::Format { .. })));
    }

    #[test]
    fn only_storages_for_images_hold_images() {
        let text = "dir: isos\n\tpath /i\n\tcontent iso\ndirectory: backups\n\tpath /b\n\
                    dir: off\n\tpath /o\n\tdisable\ndir: rel\n\tpath x\n";
        let config = StorageConfig::parse(text).unwrap();
        let set = StorageSet::new(&config, &Layout::new(Some("/r".into())));
        for (id, fault) in [
            ("isos", "'images'"),
            ("backups", "'directory'"),
            ("off", "disabled"),
            ("rel", "absolute"),
            ("none", "not in storage.cfg"),
        ] {
            let error = set.images(id).unwrap_err().to_string();
            assert!(error.contains(fault), "{error}");
        }
        assert_eq!(
            set.resolve("local:100/a.raw").unwrap(),
            Path::new("/r/state/storage/images/100/a.raw")
        );
        assert_eq!(set.resolve("/dev/sdx").unwrap(), Path::new("/dev/sdx"));
    }
}
