// SPDX-License-Identifier: MIT OR Apache-2.0
//! The files of one image, wherever a storage keeps them. All of this may block.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek as _};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::foreign::distrust_now;
use super::{ImageFormat, StorageError};
use crate::bound;
use crate::tools::Tools;

/// Making or resizing an empty image takes milliseconds; this covers a slow network file system, and a
/// busy one that has to write everything out.
const TOOL_TIMEOUT: Duration = Duration::from_secs(120);
const TOOL_POLL: Duration = Duration::from_millis(5);
/// How much of what a program says is read.
const OUTPUT_MAX_BYTES: u64 = 1 << 20;
/// Largest image: 16 TiB beyond which some file systems refuse, rounded up generously.
const SIZE_MAX_BYTES: u64 = 1 << 50;
/// Unit of disk sizes.
const SECTOR_BYTES: u64 = 512;
/// Where the header of a qcow2 image has its flags.
const INCOMPATIBLE: std::ops::Range<usize> = 72..80;
const HAS_DATA_FILE: u64 = 1 << 2;

/// The files of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ImageFiles {
    /// What QEMU opens.
    pub(super) image: PathBuf,
    /// The disk's bytes, where they are not in the image.
    pub(super) data: Option<PathBuf>,
    pub(super) format: ImageFormat,
}

impl ImageFiles {
    /// Files with this stem in a directory.
    pub(super) fn new(dir: &Path, stem: &str, format: ImageFormat) -> Self {
        let image = dir.join(format!("{stem}.{}", format.ending()));
        // An ending that no volume has, so that the data is never taken for a disk of its own.
        let data = dir.join(format!("{stem}.raw.data"));
        Self { image, data: (format == ImageFormat::RawBitmaps).then_some(data), format }
    }

    /// The image first: its name decides who owns both.
    pub(super) fn all(&self) -> impl Iterator<Item = &PathBuf> {
        [&self.image].into_iter().chain(&self.data)
    }

    /// Makes the image's file; whoever does it owns the name.
    pub(super) fn claim_image(&self) -> io::Result<()> {
        make_file(&self.image)
    }

    /// Makes the empty data file of an image that was claimed.
    pub(super) fn claim_data(&self) -> Result<(), StorageError> {
        let made = self.data.as_deref().map_or(Ok(()), make_file);
        made.map_err(|source| {
            let path = self.data.clone().unwrap_or_default();
            StorageError::Io { what: "make the data file", path, source }
        })
    }

    /// Makes an image that reads as zeroes of files that were claimed, durably.
    pub(super) fn fill(&self, tools: &Tools, size_bytes: u64) -> Result<(), StorageError> {
        let fault = |path: &Path| {
            let path = path.to_owned();
            move |source| StorageError::Io { what: "make the image", path, source }
        };
        if self.format == ImageFormat::Raw {
            let file = OpenOptions::new().write(true).open(&self.image);
            file.and_then(|file| file.set_len(size_bytes)).map_err(fault(&self.image))?;
        } else {
            self.fill_qcow2(tools, size_bytes)?;
        }
        for path in self.all() {
            File::open(path).and_then(|file| file.sync_all()).map_err(fault(path))?;
        }
        let dir = self.image.parent().unwrap_or(Path::new("/"));
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(fault(dir))
    }

    fn fill_qcow2(&self, tools: &Tools, size_bytes: u64) -> Result<(), StorageError> {
        let mut command = Command::new(tools.qemu_img()?);
        command.args(["create", "-q", "-f", "qcow2"]);
        let image = match &self.data {
            None => self.image.clone(),
            Some(data) => {
                // Without a directory: the image of a snapshot must not lead to the data of today.
                // QEMU takes such a name as one in its own directory, so whoever opens the image
                // says where the data is ([`image_options`]).
                let name = |path: &Path| path.file_name().map(PathBuf::from).unwrap_or_default();
                command.current_dir(self.image.parent().unwrap_or(Path::new("/")));
                let cluster_bytes = cluster_bytes(size_bytes);
                let name_of_data = name(data);
                let options = format!(
                    "data_file={},data_file_raw=on,cluster_size={cluster_bytes}",
                    name_of_data.display()
                );
                command.args(["-o", &options]);
                name(&self.image)
            }
        };
        command.arg("--").arg(image).arg(size_bytes.to_string());
        qemu_img(command, "make", &self.image).map(drop)
    }

    /// Makes the disk larger.
    pub(super) fn resize(
        &self,
        tools: &Tools,
        volume: &str,
        size_bytes: u64,
    ) -> Result<(), StorageError> {
        check_size(size_bytes)?;
        let now_bytes = image_size(&self.image, self.format)?;
        if size_bytes < now_bytes {
            return Err(StorageError::Shrink { volume: volume.to_owned(), now_bytes, size_bytes });
        }
        if let Some(data) = &self.data {
            // Afterwards the image is the newer one.
            distrust_now(tools, &self.image, data)?;
        }
        let mut command = Command::new(tools.qemu_img()?);
        // It takes QEMU's lock, so that the disk of a VM that runs is refused.
        command.args(["resize", "-q", "--image-opts", "--"]);
        command.arg(image_options(self.format, &self.image, self.data.as_deref())?);
        command.arg(size_bytes.to_string());
        qemu_img(command, "resize", &self.image)?;
        for path in self.all() {
            File::open(path)
                .and_then(|file| file.sync_all())
                .map_err(|source| StorageError::Io { what: "sync", path: path.clone(), source })?;
        }
        Ok(())
    }

    /// Removes the files that are there; tells whether one was. The image is last: as long as it is there
    /// nobody else gets the name.
    pub(super) fn remove(&self) -> Result<bool, StorageError> {
        let mut was_there = false;
        for path in self.data.iter().chain([&self.image]) {
            match fs::remove_file(path) {
                Ok(()) => was_there = true,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => {
                    return Err(StorageError::Io { what: "remove", path: path.clone(), source });
                }
            }
        }
        Ok(was_there)
    }

    /// What the files take on their file system.
    pub(super) fn used_bytes(&self) -> u64 {
        let blocks = self.all().filter_map(|path| fs::symlink_metadata(path).ok());
        blocks.map(|meta| meta.blocks().saturating_mul(512)).sum()
    }
}

/// The clusters of an image with its data elsewhere. QEMU writes eight bytes for each of them when the image
/// is made: 128 MiB at most up to 32 TiB.
fn cluster_bytes(size_bytes: u64) -> u64 {
    (size_bytes >> 24).clamp(64 << 10, 2 << 20).next_power_of_two()
}

fn make_file(path: &Path) -> io::Result<()> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map(drop)
}

/// Checks the size of a disk.
pub(super) fn check_size(size_bytes: u64) -> Result<(), StorageError> {
    if size_bytes == 0 || size_bytes > SIZE_MAX_BYTES || !size_bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(StorageError::Size { size_bytes });
    }
    Ok(())
}

/// What QEMU's tools take with `--image-opts` for an image in files.
///
/// # Errors
/// [`StorageError::Io`] for a path that is not text.
pub(super) fn image_options(
    format: ImageFormat,
    image: &Path,
    data: Option<&Path>,
) -> Result<String, StorageError> {
    let mut text = format!("driver={}", format.name());
    for (child, path) in [("file", Some(image)), ("data-file", data)] {
        let Some(path) = path else { continue };
        let name = path.to_str().ok_or_else(|| StorageError::Io {
            what: "use",
            path: path.to_owned(),
            source: io::Error::other("the path is not text (UTF-8)"),
        })?;
        let name = name.replace(',', ",,");
        text.push_str(&format!(",{child}.driver=file,{child}.filename={name}"));
    }
    Ok(text)
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
        // What is a file is none.
        ImageFormat::Subvol => Err(wrong("it is no directory.")),
        // The size of a block device is where its end is.
        ImageFormat::Raw => file.seek(io::SeekFrom::End(0)).map_err(fault),
        ImageFormat::Qcow2 | ImageFormat::RawBitmaps => {
            // Magic, version, … and at 24 the size of the disk, all big-endian.
            let mut header = [0; 80];
            file.read_exact(&mut header).map_err(|_| wrong("it is too short."))?;
            if &header[..4] != b"QFI\xfb" {
                return Err(wrong("it does not begin as one."));
            }
            let word = |range| {
                let bytes: &[u8] = &header[range];
                bytes.try_into().map(u64::from_be_bytes).expect("the slice has eight bytes")
            };
            let has_data_file = word(INCOMPATIBLE) & HAS_DATA_FILE != 0;
            let is_version_2 = header[4..8] == [0, 0, 0, 2];
            if format == ImageFormat::RawBitmaps && (is_version_2 || !has_data_file) {
                return Err(wrong("it has no data file."));
            }
            Ok(word(24..32))
        }
    }
}

/// Runs `qemu-img`; what it printed.
pub(super) fn qemu_img(
    command: Command,
    doing: &'static str,
    path: &Path,
) -> Result<String, StorageError> {
    run(command).map_err(|message| StorageError::QemuImg { doing, path: path.to_owned(), message })
}

/// A program that ends when we are killed: else it could make, a moment later, what a recovery has
/// already found not to be there. (The signal comes with the end of the thread that started it, and that
/// waits for it.)
fn ends_with_us(command: &Command) -> Command {
    let mut bound = bound::command(command.get_program());
    bound.args(command.get_args());
    if let Some(dir) = command.get_current_dir() {
        bound.current_dir(dir);
    }
    bound
}

/// Runs a program that ends soon; what it printed, or why it failed.
pub(super) fn run(command: Command) -> Result<String, String> {
    let mut child = ends_with_us(&command)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| bound::not_started(error).to_string())?;
    // Read beside, so that a program that says much does not wait for us.
    let listen = |pipe: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(pipe) = pipe {
                let _ = pipe.take(OUTPUT_MAX_BYTES).read_to_end(&mut bytes);
            }
            String::from_utf8_lossy(&bytes).trim().to_owned()
        })
    };
    let stdout = listen(child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let stderr = listen(child.stderr.take().map(|pipe| Box::new(pipe) as _));
    let deadline = Instant::now() + TOOL_TIMEOUT;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < deadline => std::thread::sleep(TOOL_POLL),
            Ok(None) => {
                let _ = child.kill();
                // Not waited for: it may hang in the kernel with its storage.
                return Err(format!("no answer after {} s.", TOOL_TIMEOUT.as_secs()));
            }
            Err(error) => return Err(error.to_string()),
        }
    };
    if status.success() {
        return Ok(stdout.join().unwrap_or_default());
    }
    bound::check_executed(command.get_program(), status).map_err(|error| error.to_string())?;
    let said = stderr.join().unwrap_or_default();
    Err(if said.is_empty() { status.to_string() } else { said })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_disks_have_larger_clusters() {
        let kib = |size_bytes| cluster_bytes(size_bytes) >> 10;
        assert_eq!([kib(512), kib(1 << 40), kib((1 << 40) + (1 << 24))], [64, 64, 128]);
        assert_eq!([kib(1 << 45), kib(1 << 50)], [2048, 2048]);
    }

    #[test]
    fn a_program_that_is_missing_or_fails_is_told() {
        let error = run(Command::new("/nonexistent/program")).unwrap_err();
        assert_eq!(error, "the program '/nonexistent/program' is not installed");
        let mut command = Command::new("sh");
        command.args(["-c", "echo why >&2; exit 3"]);
        assert_eq!(run(command).unwrap_err(), "why");
        assert_eq!(
            run(Command::new("pwd")).unwrap(),
            std::env::current_dir().unwrap().display().to_string()
        );
    }

    #[test]
    fn commas_do_not_end_a_path() {
        let options = image_options(ImageFormat::Raw, Path::new("/a,b"), None).unwrap();
        assert_eq!(options, "driver=raw,file.driver=file,file.filename=/a,,b");
    }
}
