// SPDX-License-Identifier: MIT OR Apache-2.0
//! A picture of a guest's display, as QEMU writes it.

use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use qmp_client::{Error, Options, Session};
use serde_json::json;

use crate::blocking;
use crate::job::chain;
use crate::layout::{Layout, Monitor};

/// QEMU writes a file in a moment, unless the host is very busy.
const WITHIN: Duration = Duration::from_secs(10);
/// What every file of this format begins with.
const PNG: [u8; 8] = *b"\x89PNG\r\n\x1a\n";

/// Has a VM's QEMU write a picture of its display to a file, in the place of an older one.
///
/// # Errors
/// In words: there is no picture, and an older one stays.
pub(super) async fn take(layout: &Layout, id: u32, to: &Path) -> Result<(), String> {
    // Not at once to where it belongs: QEMU may end half way.
    let new = layout.vm_run_dir(id).join("screen.png");
    let text = new.to_str().ok_or_else(|| format!("'{}' is not text", new.display()))?;
    let options =
        Options { greeting_timeout: WITHIN, command_timeout: WITHIN, ..Options::default() };
    let ask = async {
        let session = Session::connect(layout.qmp_socket(id, Monitor::Runner), options).await?;
        let arguments = json!({ "filename": text, "format": "png" });
        session.execute_raw("screendump", arguments, None).await
    };
    ask.await.map_err(|error| match error {
        Error::Qmp { desc, .. } if desc.contains("has not been found") => {
            "this QEMU was built without what it needs for pictures (pixman, libpng)".to_owned()
        }
        error => chain(&error),
    })?;
    let to = to.to_owned();
    let taken = blocking::run(move || {
        let mut begin = [0; PNG.len()];
        std::fs::File::open(&new)?.read_exact(&mut begin)?;
        if begin != PNG {
            return Err(std::io::Error::other("QEMU wrote something else"));
        }
        if let Some(dir) = to.parent() {
            std::fs::create_dir_all(dir)?;
        }
        // Another file system is possible.
        std::fs::copy(&new, &to)?;
        std::fs::remove_file(&new)
    });
    taken.await.map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
    use tokio::net::UnixListener;

    use super::*;

    /// A monitor whose screendump writes these bytes, or is not there.
    async fn taken(picture: Option<&'static [u8]>) -> (Result<(), String>, Option<Vec<u8>>) {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(Some(dir.path().to_owned()));
        layout.make_vm_run_dir(100).unwrap();
        let socket = layout.qmp_socket(100, Monitor::Runner);
        let listener = UnixListener::bind(socket).unwrap();
        let qemu = tokio::spawn(async move {
            let (reader, mut writer) = listener.accept().await.unwrap().0.into_split();
            let version = json!({ "qemu": { "major": 10, "minor": 0, "micro": 0 }, "package": "" });
            let greeting = json!({ "QMP": { "version": version, "capabilities": [] } });
            writer.write_all(format!("{greeting}\n").as_bytes()).await.unwrap();
            let mut lines = BufReader::new(reader).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let request: Value = serde_json::from_str(&line).unwrap();
                let mut reply = json!({ "return": {}, "id": request["id"] });
                if request["execute"] == "screendump" {
                    assert_eq!(request["arguments"]["format"], "png");
                    let path = request["arguments"]["filename"].as_str().unwrap();
                    match picture {
                        Some(bytes) => std::fs::write(path, bytes).unwrap(),
                        None => {
                            let desc = "The command screendump has not been found";
                            let error = json!({ "class": "CommandNotFound", "desc": desc });
                            reply = json!({ "error": error, "id": request["id"] });
                        }
                    }
                }
                writer.write_all(format!("{reply}\n").as_bytes()).await.unwrap();
            }
        });
        let to = dir.path().join("log/picture.png");
        let result = take(&layout, 100, &to).await;
        qemu.abort();
        (result, std::fs::read(to).ok())
    }

    #[tokio::test]
    async fn a_picture_is_kept_if_it_is_one() {
        let picture = b"\x89PNG\r\n\x1a\n and so on";
        let (result, kept) = taken(Some(picture)).await;
        assert_eq!((result, kept.as_deref()), (Ok(()), Some(&picture[..])));
        let (result, kept) = taken(Some(b"P6 640 480")).await;
        assert!(result.unwrap_err().contains("something else") && kept.is_none());
        let (result, kept) = taken(None).await;
        assert!(result.unwrap_err().contains("built without") && kept.is_none());
    }
}
