// SPDX-License-Identifier: MIT OR Apache-2.0
//! The state of a VM's TPM, which swtpm writes and QEMU knows nothing of.
//!
//! swtpm is stopped by a signal around the setup of the access, so that what is copied meanwhile is of the disks'
//! point in time. It may have been stopped while it was writing: the copy must be the same as one from
//! before, between which swtpm ran for a while, and as what is there after the setup. The copy is in RAM, and
//! is served by this process over NBD, on a socket beside QEMU's. Always all of it, because nothing tells what
//! changed. (`docs/design/0026`)

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use provider_api::{Access, BitmapMode, Volume, VolumeInfo};
use provider_nbd::server::{Export, ExportFuture, Refusal, Server};
use provider_nbd::wire::flag;
use provider_nbd::{Errno, context};

use super::{GuestError, Offered, Task, VmDriver};
use crate::blocking;
use crate::config::guest::DiskEntry;
use crate::guest::VolumeReport;
use crate::journal::{Entry, ProcessStamp};
use crate::task_log::{TaskSink, clean, size_config};
use crate::vm::process::VmProcess;
use crate::vm::tpm::{self, KEY, STATE_BYTES};
use crate::vm::tpm_guard::TpmGuard;

/// How long swtpm runs between two copies that must be the same: longer than it takes for writing its state.
const SETTLE: Duration = Duration::from_millis(20);
/// How often that is tried with a TPM that is busy.
const ATTEMPTS: u32 = 20;
/// The longest that swtpm stays stopped, whatever becomes of this process.
const HOLD: Duration = Duration::from_secs(60);
/// A storage that does not give a few KiB in this time hangs.
const READ_WITHIN: Duration = Duration::from_secs(10);
/// Beside QEMU's socket.
const SOCKET: &str = "tpm";
/// Flags of an area of zeroes, as NBD has them.
const HOLE_OF_ZEROES: u64 = 3;
/// What is known of the content is told in such pieces.
const PAGE_BYTES: usize = 4096;

/// The TPM of the VM that is backed up.
#[derive(Debug)]
pub(super) struct Tpm {
    volume: String,
    path: PathBuf,
    copy: Option<Bytes>,
    server: Option<Server>,
}

/// A swtpm that stands still around the point in time, and what its state was then.
pub(super) struct StandingStill {
    /// None if there is no swtpm.
    guard: Option<TpmGuard>,
    copy: Vec<u8>,
    since: Instant,
}

impl Tpm {
    pub(super) fn server(&self) -> Option<&Server> {
        self.server.as_ref()
    }

    pub(super) fn info(&self) -> VolumeInfo {
        VolumeInfo {
            device: KEY.to_owned(),
            size_bytes: STATE_BYTES,
            volume_id: Some(self.volume.clone()),
        }
    }

    pub(super) fn report(&self) -> VolumeReport {
        VolumeReport {
            device: KEY.to_owned(),
            size_bytes: STATE_BYTES,
            bitmap_action: "not-used".to_owned(),
            dirty_bytes: None,
        }
    }

    pub(super) fn offered(&self) -> Offered {
        Offered {
            device: KEY.to_owned(),
            export: KEY.to_owned(),
            size_bytes: STATE_BYTES,
            reused_bitmap: None,
            wanted_bytes: STATE_BYTES,
        }
    }

    /// How it is served; none before it is.
    pub(super) fn nbd_access(&self) -> Option<Access> {
        let socket = self.server.as_ref()?.socket().to_owned();
        Some(Access::Nbd { socket, export: KEY.to_owned(), bitmap: None })
    }

    pub(super) fn volume(access: Access) -> Volume {
        Volume {
            device: KEY.to_owned(),
            size_bytes: STATE_BYTES,
            access,
            bitmap_mode: BitmapMode::None,
            bitmap_action: "not-used".to_owned(),
            generation: None,
            dirty_bytes: None,
        }
    }

    /// Serves the copy on a socket in this directory.
    pub(super) fn serve(&mut self, dir: &Path) -> std::io::Result<()> {
        let copy = self.copy.clone().unwrap_or_default();
        let export: Arc<dyn Export> = Arc::new(StateExport { copy });
        self.server = Some(Server::listen(dir.join(SOCKET), [(KEY, export)])?);
        Ok(())
    }

    /// Ends what serves it.
    pub(super) fn close(&mut self) {
        self.server = None;
    }
}

impl VmDriver {
    /// Notes the TPM that is to be backed up, if it is among the chosen disks, of which it is none.
    pub(super) fn take_tpm(&mut self, sink: &dyn TaskSink) -> Result<(), GuestError> {
        let Some(at) = self.chosen.iter().position(|disk| disk.key == KEY) else { return Ok(()) };
        let DiskEntry { volume, .. } = self.chosen.remove(at);
        let shown = clean(&volume);
        if self.chosen.is_empty() {
            sink.info(&format!("exclude disk '{KEY}' '{shown}' (the VM has no disk)"));
            return Ok(());
        }
        let doing = || format!("find the state of the TPM, '{shown}'");
        let path = self.storages.resolve(&volume).map_err(GuestError::at(doing()))?;
        let metadata = std::fs::metadata(&path).map_err(GuestError::at(doing()))?;
        if metadata.len() > STATE_BYTES {
            return Err(GuestError::Refused(format!(
                "The state of the TPM, '{shown}', has {} bytes, more than {STATE_BYTES}; exclude it with \
                 backup=0.",
                metadata.len()
            )));
        }
        let bytes = size_config(STATE_BYTES);
        sink.info(&format!("include disk '{KEY}' '{shown}' {bytes}"));
        self.tpm = Some(Tpm { volume, path, copy: None, server: None });
        Ok(())
    }

    /// Starts the guard of the swtpm, before anything of the guest waits.
    pub(super) async fn guard_tpm(&self, task: Task<'_>) -> Result<Option<TpmGuard>, GuestError> {
        if self.tpm.is_none() {
            return Ok(None);
        }
        let (layout, id) = (self.layout.clone(), self.id);
        let found = blocking::run(move || tpm::find(&layout, id).map_err(std::io::Error::other));
        let found = found.await.map_err(GuestError::at("look for the VM's swtpm"))?;
        let Some(process) = found else { return Ok(None) };
        self.journal_tpm(process, task).await?;
        let guard = TpmGuard::start(&self.guard, process, HOLD).await.map_err(refused)?;
        kill_point("tpm:guarded");
        Ok(Some(guard))
    }

    async fn journal_tpm(&self, process: VmProcess, task: Task<'_>) -> Result<(), GuestError> {
        let stamp = ProcessStamp::of(process).map_err(GuestError::at("read /proc of swtpm"))?;
        Ok(task.journal.append(Entry::Tpm { process: stamp }).await?)
    }

    /// Stops the swtpm at a moment at which it does not write, and copies its state.
    pub(super) async fn stop_tpm(
        &self,
        guard: Option<TpmGuard>,
    ) -> Result<Option<StandingStill>, GuestError> {
        let Some(Tpm { path, .. }) = &self.tpm else { return Ok(None) };
        let Some(mut guard) = guard else {
            // Nobody writes it.
            let since = Instant::now();
            return Ok(Some(StandingStill { guard: None, copy: read(path).await?, since }));
        };
        let mut before = None;
        for _ in 0..ATTEMPTS {
            guard.stop().await.map_err(refused)?;
            kill_point("tpm:stopped");
            let since = Instant::now();
            let copy = read(path).await?;
            if before.as_ref() == Some(&copy) {
                kill_point("tpm:copied");
                return Ok(Some(StandingStill { guard: Some(guard), copy, since }));
            }
            before = Some(copy);
            guard.go_on().await.map_err(refused)?;
            tokio::time::sleep(SETTLE).await;
        }
        Err(refused(format!("it was written to all the time, {ATTEMPTS} times in a row")))
    }

    /// Has the swtpm go on after the point in time, and keeps the copy if nothing has changed meanwhile. What it
    /// cost, in words.
    pub(super) async fn continue_tpm(
        &mut self,
        still: Option<StandingStill>,
    ) -> Result<Option<String>, GuestError> {
        let (Some(StandingStill { guard, copy, since }), Some(tpm)) = (still, &mut self.tpm) else {
            return Ok(None);
        };
        let skew_ms = since.elapsed().as_secs_f64() * 1000.0;
        let after = read(&tpm.path).await;
        let held = match guard {
            Some(mut guard) => {
                let held = guard.go_on().await;
                kill_point("tpm:continued");
                guard.end().await;
                Some(held.map_err(refused)?)
            }
            None => None,
        };
        if after? != copy {
            return Err(refused("it has changed around the point in time".to_owned()));
        }
        let how = match held {
            Some(held) => format!("swtpm stood still for {} ms", held.as_millis()),
            None => "no swtpm was running".to_owned(),
        };
        let words = format!(
            "TPM state: {} bytes of at most {skew_ms:.1} ms before the point in time of the disks; {how}",
            copy.len()
        );
        tpm.copy = Some(copy.into());
        Ok(Some(words))
    }
}

fn refused(why: String) -> GuestError {
    GuestError::Refused(format!(
        "The state of the TPM cannot be copied: {why}. Try again, or exclude it with backup=0."
    ))
}

fn kill_point(step: &str) {
    #[cfg(debug_assertions)]
    crate::job::kill_point::at(step);
    #[cfg(not(debug_assertions))]
    let _ = step;
}

/// All of a state, without the zeroes that it ends with.
async fn read(path: &Path) -> Result<Vec<u8>, GuestError> {
    let doing = || GuestError::at("read the state of the TPM");
    let path = path.to_owned();
    let read = blocking::run(move || {
        let mut bytes = Vec::new();
        std::fs::File::open(path)?.take(STATE_BYTES + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    });
    let late = || std::io::Error::from(std::io::ErrorKind::TimedOut);
    let bytes = tokio::time::timeout(READ_WITHIN, read).await;
    let mut bytes = bytes.map_err(|_| late()).map_err(doing())?.map_err(doing())?;
    if bytes.len() as u64 > STATE_BYTES {
        return Err(refused(format!("it has more than {STATE_BYTES} bytes")));
    }
    let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    bytes.truncate(end);
    Ok(bytes)
}

/// The copy, with zeroes up to the size of the volume.
struct StateExport {
    copy: Bytes,
}

impl StateExport {
    /// Where the zeroes begin.
    fn data_end(&self) -> u64 {
        self.copy.len().next_multiple_of(PAGE_BYTES) as u64
    }
}

impl Export for StateExport {
    fn size_bytes(&self) -> u64 {
        STATE_BYTES
    }

    fn flags(&self) -> u16 {
        // What was read may be trimmed, as of a disk, which does nothing. Writes are refused.
        flag::HAS_FLAGS
            | flag::SEND_TRIM
            | flag::SEND_WRITE_ZEROES
            | flag::CAN_MULTI_CONN
            | flag::SEND_DF
    }

    fn contexts(&self) -> Vec<String> {
        vec![context::BASE_ALLOCATION.to_owned()]
    }

    fn read(&self, offset: u64, len: usize) -> ExportFuture<'_, Bytes> {
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(self.copy.len());
        let end = from.saturating_add(len).min(self.copy.len());
        let mut bytes = self.copy[from..end].to_vec();
        bytes.resize(len, 0);
        Box::pin(std::future::ready(Ok(bytes.into())))
    }

    fn block_status<'a>(
        &'a self,
        _: &'a str,
        offset: u64,
        _: u64,
    ) -> ExportFuture<'a, Vec<(u64, u64)>> {
        let end = self.data_end();
        let mut extents = Vec::new();
        if offset < end {
            extents.push((end - offset, 0));
        }
        if offset.max(end) < STATE_BYTES {
            extents.push((STATE_BYTES - offset.max(end), HOLE_OF_ZEROES));
        }
        Box::pin(std::future::ready(Ok(extents)))
    }

    fn trim(&self, _: u64, _: u64) -> ExportFuture<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn write_zeroes(&self, _: u64, _: u64, may_trim: bool) -> ExportFuture<'_, ()> {
        let result = if may_trim {
            Ok(())
        } else {
            Err(Refusal::new(Errno::EPERM, "the state of a TPM can only be read"))
        };
        Box::pin(std::future::ready(result))
    }
}

#[cfg(test)]
mod tests {
    use provider_nbd::{Client, Options};

    use super::*;

    #[tokio::test]
    async fn a_copy_is_served_as_a_volume_that_can_only_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let copy: Vec<u8> = (0..10_000_u32).map(|n| (n % 251) as u8 + 1).collect();
        let mut tpm = Tpm {
            volume: "local:100/t.raw".to_owned(),
            path: dir.path().join("t.raw"),
            copy: Some(copy.clone().into()),
            server: None,
        };
        tpm.serve(dir.path()).unwrap();
        let Some(Access::Nbd { socket, export, bitmap: None }) = tpm.nbd_access() else { panic!() };
        let contexts = vec![context::BASE_ALLOCATION.to_owned()];
        let options = Options { contexts, ..Options::default() };
        let client = Client::connect_unix(&socket, &export, options).await.unwrap();
        assert_eq!(client.size_bytes(), STATE_BYTES);
        let all = client.read(0, usize::try_from(STATE_BYTES).unwrap()).await.unwrap();
        assert!(all[..copy.len()] == copy && all[copy.len()..].iter().all(|byte| *byte == 0));
        let mut extents = client.extents(context::BASE_ALLOCATION, 0, STATE_BYTES);
        let mut found = Vec::new();
        while let Some(extent) = extents.next().await.unwrap() {
            found.push((extent.offset, extent.end(), extent.flags & context::ZERO != 0));
        }
        assert_eq!(found, [(0, 12288, false), (12288, STATE_BYTES, true)]);
        client.trim(0, STATE_BYTES).await.unwrap();
        assert!(client.read(0, 4096).await.unwrap()[..] == copy[..4096], "a trim changed it");
        tpm.close();
        assert!(!socket.exists());
    }

    #[tokio::test]
    async fn a_state_ends_with_its_last_byte() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let mut content = vec![0; 1 << 20];
        content[5] = 7;
        std::fs::write(&path, &content).unwrap();
        assert_eq!(read(&path).await.unwrap(), [0, 0, 0, 0, 0, 7]);
        std::fs::File::create(&path).unwrap().set_len(STATE_BYTES + 512).unwrap();
        assert!(read(&path).await.is_err());
    }
}
