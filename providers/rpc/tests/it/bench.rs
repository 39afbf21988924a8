// SPDX-License-Identifier: MIT OR Apache-2.0
//! A plugin in a directory of its own, and what the host would offer it.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use provider_api::{
    Access, BitmapMode, BoxFuture, Call, CancellationToken, DirtyRegions, NextRegions, Progress,
    Region, RegionPage, Result, VmBackup, Volume,
};
use provider_rpc::{Direction, RpcOptions, RpcProvider};

/// A directory with a plugin, and all messages that were exchanged with it.
pub(crate) struct Bench {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) options: RpcOptions,
    pub(crate) messages: Arc<Mutex<Vec<(Direction, String)>>>,
}

impl Bench {
    /// With a plugin of this text.
    pub(crate) fn with_script(script: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("plugin");
        // Renamed into place: a file that is still open for writing cannot be executed.
        let new = dir.path().join("plugin.new");
        std::fs::File::create(&new).unwrap().write_all(script.as_bytes()).unwrap();
        std::fs::set_permissions(&new, PermissionsExt::from_mode(0o755)).unwrap();
        std::fs::rename(&new, &program).unwrap();
        Self::with_program(dir, program)
    }

    pub(crate) fn with_program(dir: tempfile::TempDir, program: PathBuf) -> Self {
        let messages: Arc<Mutex<Vec<(Direction, String)>>> = Arc::default();
        let seen = Arc::clone(&messages);
        let options = RpcOptions {
            program,
            storage: "store".to_owned(),
            properties: Vec::new(),
            secrets_path: dir.path().join("store.pw"),
            tap: Some(Arc::new(move |direction, line| {
                seen.lock().unwrap().push((direction, line.to_owned()));
            })),
        };
        Self { dir, options, messages }
    }

    /// With the example of the name, and a directory for its archives.
    pub(crate) fn with_example(example: &str) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
        Self::with_archives(root.join(example))
    }

    /// With the example in Rust, which cargo has built beside the tests.
    pub(crate) fn in_rust() -> Self {
        let tests = std::env::current_exe().unwrap();
        Self::with_archives(tests.parent().unwrap().parent().unwrap().join("examples/full-store"))
    }

    fn with_archives(program: PathBuf) -> Self {
        let mut bench = Self::with_program(tempfile::tempdir().unwrap(), program);
        let path = bench.dir.path().join("archives");
        bench.options.properties.push(("path".to_owned(), path.to_str().unwrap().to_owned()));
        bench
    }

    pub(crate) fn archives(&self) -> PathBuf {
        self.dir.path().join("archives")
    }

    /// Checks all messages so far against the schema; the plugin must be one that keeps to it. Returns
    /// the methods that were called.
    pub(crate) fn check_messages(&self) -> std::collections::BTreeSet<String> {
        let messages = self.messages.lock().unwrap();
        let messages = messages.iter().map(|(from, line)| (Some(*from), line.as_str()));
        crate::schema::Schema::new().check(messages)
    }

    pub(crate) async fn start(&self) -> Result<RpcProvider> {
        RpcProvider::start(self.options.clone()).await
    }
}

/// A call with a deadline.
pub(crate) fn within_ms(ms: u64) -> Call {
    let deadline = Instant::now().checked_add(Duration::from_millis(ms));
    Call { cancel: CancellationToken::new(), deadline }
}

pub(crate) fn call() -> Call {
    within_ms(20_000)
}

/// Keeps what it is told.
#[derive(Default)]
pub(crate) struct Notes(pub(crate) Mutex<Vec<String>>);

impl Progress for Notes {
    fn report(&self, device: &str, done_bytes: u64, total_bytes: u64, zero_bytes: u64) {
        let line = format!("{device} {done_bytes}/{total_bytes} {zero_bytes}");
        self.0.lock().unwrap().push(line);
    }

    fn log(&self, line: &str) {
        self.0.lock().unwrap().push(line.to_owned());
    }
}

/// Regions in pages of two.
#[derive(Debug)]
pub(crate) struct Pages(pub(crate) Vec<Region>);

impl DirtyRegions for Pages {
    fn page<'a>(&'a self, offset: u64, _call: &'a Call) -> BoxFuture<'a, Result<RegionPage>> {
        let mut rest = self.0.iter().skip_while(|region| region.offset < offset);
        let regions: Vec<_> = rest.by_ref().take(2).copied().collect();
        let total_bytes = self.0.iter().map(|region| region.length_bytes).sum();
        let next = rest.next().map_or(NextRegions::End { total_bytes }, |region| {
            NextRegions::From { offset: region.offset }
        });
        Box::pin(std::future::ready(Ok(RegionPage { regions, next })))
    }
}

pub(crate) fn region(offset: u64, length_bytes: u64, zero: bool) -> Region {
    Region { offset, length_bytes, zero }
}

/// A backup of one disk that is offered as a file; an increment if a bitmap says what changed.
pub(crate) fn vm(
    path: &Path,
    regions: Vec<Region>,
    mode: BitmapMode,
    generation: &str,
) -> VmBackup {
    let dirty_bytes = regions.iter().map(|region| region.length_bytes).sum();
    let regions = Arc::new(Pages(regions));
    let volume = Volume {
        device: "scsi0".to_owned(),
        size_bytes: std::fs::metadata(path).unwrap().len(),
        access: Access::File { path: path.to_owned(), regions },
        bitmap_mode: mode,
        bitmap_action: "new".to_owned(),
        generation: Some(generation.to_owned()),
        dirty_bytes: (mode == BitmapMode::Reuse).then_some(dirty_bytes),
    };
    let config = b"name: web\nscsi0: local:100/vm-100-disk-0.raw\n".to_vec();
    VmBackup { config, firewall: Some(b"[OPTIONS]\n".to_vec()), volumes: vec![volume] }
}
