// SPDX-License-Identifier: MIT OR Apache-2.0
//! Data of a disk that was written beside QEMU: the bitmaps in the image next to it do not know, and are not believed.
//!
//! QEMU stores bitmaps when it closes the image, after its last write to the data. Data that has changed later than its
//! image was therefore written, or put there, by somebody else; or QEMU did not end by itself, and has left its bitmaps
//! marked as in use, which it heeds. The format has a bit for this: a program that writes to an image and does not know
//! bitmaps clears it, and whoever opens the image next drops them all.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::image::{image_options, qemu_img};
use super::{ImageFormat, StorageError, beside};
use crate::tools::Tools;

/// Where the header of a qcow2 image has the lowest of its flags that others clear, and the one of bitmaps.
const AUTOCLEAR_AT: u64 = 95;
const HAS_BITMAPS: u8 = 1;
/// What `qemu-img info` says of a bitmap that was not stored at an end of QEMU.
const IN_USE: &str = "in-use";

/// Has QEMU drop the bitmaps of an image if its data was written by somebody else since; tells whether it will. No QEMU
/// may have the image.
///
/// # Errors
/// [`StorageError`]; nothing is known of the bitmaps then.
pub(crate) async fn distrust_bitmaps(
    tools: &Tools,
    image: PathBuf,
    data: PathBuf,
) -> Result<bool, StorageError> {
    let tools = tools.clone();
    beside(move || distrust_now(&tools, &image, &data)).await
}

/// The same. May block.
///
/// # Errors
/// As [`distrust_bitmaps`].
pub(super) fn distrust_now(tools: &Tools, image: &Path, data: &Path) -> Result<bool, StorageError> {
    let fault = |path: &Path| {
        let path = path.to_owned();
        move |source| StorageError::Io { what: "look at", path, source }
    };
    let (of_image, of_data) = match (fs::metadata(image), fs::metadata(data)) {
        (Ok(of_image), Ok(of_data)) => (of_image, of_data),
        (Err(error), _) | (_, Err(error)) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(false);
        }
        (Err(error), _) => return Err(fault(image)(error)),
        (_, Err(error)) => return Err(fault(data)(error)),
    };
    if !is_newer(&of_data, &of_image) {
        return Ok(false);
    }
    let mut flags = [0];
    File::open(image)
        .and_then(|file| file.read_exact_at(&mut flags, AUTOCLEAR_AT))
        .map_err(fault(image))?;
    if flags[0] & HAS_BITMAPS == 0 || !has_usable_bitmap(tools, image, data)? {
        return Ok(false);
    }
    let write = |file: File| {
        file.write_all_at(&[flags[0] & !HAS_BITMAPS], AUTOCLEAR_AT)?;
        file.sync_all()
    };
    OpenOptions::new().write(true).open(image).and_then(write).map_err(|source| {
        StorageError::Io { what: "drop the bitmaps of", path: image.to_owned(), source }
    })?;
    Ok(true)
}

/// Whether a file was written later than another, or took its place later.
fn is_newer(one: &Metadata, other: &Metadata) -> bool {
    let written = |meta: &Metadata| (meta.mtime(), meta.mtime_nsec());
    let changed = |meta: &Metadata| (meta.ctime(), meta.ctime_nsec());
    written(one) > written(other) || changed(one) > changed(other)
}

/// Whether QEMU would believe a bitmap of the image.
fn has_usable_bitmap(tools: &Tools, image: &Path, data: &Path) -> Result<bool, StorageError> {
    let mut command = Command::new(tools.qemu_img()?);
    command.args(["info", "--output=json", "--image-opts", "--"]);
    command.arg(image_options(ImageFormat::RawBitmaps, image, Some(data))?);
    let info: Value = qemu_img(command, "look at", image)?.parse().map_err(|error| {
        let why = format!("qemu-img tells of it what is no JSON: {error}");
        let (volume, format) = (image.display().to_string(), ImageFormat::RawBitmaps);
        StorageError::Format { volume, format, why }
    })?;
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array();
    let is_in_use = |bitmap: &Value| {
        bitmap["flags"].as_array().is_some_and(|flags| flags.iter().any(|flag| flag == IN_USE))
    };
    // None of them in an answer that should have some is no reason to believe them.
    Ok(bitmaps.is_none_or(|bitmaps| !bitmaps.iter().all(is_in_use)))
}
