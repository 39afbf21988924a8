// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the files of a new container are made: its volumes, mounted for a task, and the unpacking of an
//! archive into them.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, PipeReader, Read as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use provider_api::{Call, CancellationToken, IdMapRange};
use tokio::sync::mpsc;
use vzdump_core::job::JobContext;
use vzdump_core::journal::Entry;
use vzdump_core::journal::volumes::NewVolumes;
use vzdump_core::layout::make_private_dir;
use vzdump_core::task_log::{TaskSink, size};
use vzdump_core::temp_tree;

use crate::CtError;
use crate::runner::Runner;
use crate::runtime::beside;
use crate::unpack::{Bounds, Codec, UnpackSpec, Unpacked};
use crate::view::{Origin, Part, View, ViewOptions};

/// Lines of commands that wait for the log.
const LOG_LINES: usize = 1000;
/// Reports that wait; a later one says all that an earlier one does.
const REPORTS: usize = 16;
/// Longest report.
const REPORT_BYTES_MAX: u64 = 64 << 10;
/// How often the log tells how far the unpacking is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);

/// A directory of a task in which the files of a new container are mounted.
pub(crate) struct Place {
    private: PathBuf,
}

impl Place {
    pub(crate) async fn make(ctx: &JobContext, id: u32, new: &NewVolumes) -> Result<Self, CtError> {
        let parent = ctx.layout.run().join("ct-restore");
        make_private_dir(&parent)?;
        let private = parent.join(format!("{id}-{}", uuid::Uuid::new_v4().simple()));
        new.journal.append(Entry::Directory { path: private.clone() }).await?;
        make_private_dir(&private)?;
        Ok(Self { private })
    }

    /// A directory for the provider.
    pub(crate) fn for_provider(&self) -> Result<PathBuf, CtError> {
        let dir = self.private.join("provider");
        make_private_dir(&dir)?;
        Ok(dir)
    }

    pub(crate) async fn open(
        &self,
        ctx: &JobContext,
        parts: Vec<Part>,
        ids: &[IdMapRange],
    ) -> Result<(Arc<Runner>, mpsc::Receiver<String>), CtError> {
        let dir = self.private.join("view");
        make_private_dir(&dir)?;
        let ids = ids.to_vec();
        let options = ViewOptions { writable: true, origin: Origin::Volume, is_plain: false };
        let view = beside(move || View::open(&dir, &parts, &ids, options)).await?;
        Ok(runner(ctx, view))
    }

    /// Shows a directory, read-only, to commands that see nothing else.
    pub(crate) async fn show(
        &self,
        ctx: &JobContext,
        path: PathBuf,
    ) -> Result<(Arc<Runner>, mpsc::Receiver<String>), CtError> {
        let dir = self.private.join("source");
        make_private_dir(&dir)?;
        let part =
            Part { key: "source".to_owned(), mount_point: "/".into(), path, is_image: false };
        let options = ViewOptions { writable: false, origin: Origin::Volume, is_plain: true };
        let view = beside(move || View::open(&dir, &[part], &[], options)).await?;
        Ok(runner(ctx, view))
    }

    pub(crate) async fn remove(self) -> Result<(), CtError> {
        // A provider may have left something mounted in it.
        let doing = format!("remove the directory of the task '{}'", self.private.display());
        beside(move || temp_tree::remove(&self.private).map_err(CtError::at(doing))).await
    }
}

/// A tar archive to be unpacked.
pub(crate) struct Archive<'a> {
    /// What it is, in words.
    pub(crate) what: &'a str,
    pub(crate) file: File,
    pub(crate) codec: Codec,
    /// Where the volumes are mounted.
    pub(crate) mounts: Vec<PathBuf>,
    pub(crate) bounds: Bounds,
}

/// Unpacks an archive in a sandbox that sees nothing but the new volumes: whatever is in the archive, there is
/// nothing else it could change.
pub(crate) async fn unpack(
    runner: &Arc<Runner>,
    mut lines: mpsc::Receiver<String>,
    archive: Archive<'_>,
    sink: &dyn TaskSink,
    cancel: &CancellationToken,
) -> Result<Unpacked, CtError> {
    let what = archive.what;
    let doing = || format!("unpack {what}");
    let (reader, writer) = io::pipe().map_err(CtError::at("make a pipe"))?;
    let (told, mut reports) = mpsc::channel(REPORTS);
    // Ends with the sandbox, which has the only other end.
    let listening = std::thread::spawn(move || listen(reader, &told));
    let spec = UnpackSpec {
        codec: archive.codec,
        mounts: archive.mounts,
        makes_devices: runner.view.is_privileged,
        bounds: archive.bounds,
    };
    let call = Call { cancel: cancel.child_token(), deadline: None };
    let running = runner.unpack(archive.file.into(), spec, writer.into(), &call);
    tokio::pin!(running);
    let mut last = Unpacked::default();
    let mut shown = Instant::now();
    let ended = loop {
        tokio::select! {
            ended = &mut running => break ended,
            Some(line) = lines.recv() => sink.info(&line),
            Some(report) = reports.recv() => {
                last = report;
                if shown.elapsed() >= PROGRESS_INTERVAL {
                    sink.info(&progress_of(&last));
                    shown = Instant::now();
                }
            }
        }
    };
    while let Some(report) = reports.recv().await {
        last = report;
    }
    drop(listening);
    if cancel.is_cancelled() {
        return Err(CtError::Cancelled);
    }
    let ended = ended.map_err(CtError::at(doing()))?;
    if ended.exit_code != 0 {
        return Err(CtError::at(doing())(ended.stderr_tail.trim().to_owned()));
    }
    if !last.is_complete {
        return Err(CtError::at(doing())("it did not say that it was done"));
    }
    sink.info(&progress_of(&last));
    Ok(last)
}

fn progress_of(unpacked: &Unpacked) -> String {
    format!("unpacked {} entries, {}", unpacked.entries, size(unpacked.data_bytes))
}

fn listen(pipe: PipeReader, told: &mpsc::Sender<Unpacked>) {
    let mut lines = BufReader::new(pipe);
    let mut line = Vec::new();
    loop {
        line.clear();
        match lines.by_ref().take(REPORT_BYTES_MAX).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if let Ok(report) = serde_json::from_slice(&line)
            && told.blocking_send(report).is_err()
        {
            return;
        }
    }
}

/// What runs commands beside a view, and the lines that they write.
fn runner(ctx: &JobContext, view: View) -> (Arc<Runner>, mpsc::Receiver<String>) {
    let (log, lines) = mpsc::channel(LOG_LINES);
    let program = ctx.guard.program.clone();
    (Arc::new(Runner::new(Arc::new(view), program, log)), lines)
}
