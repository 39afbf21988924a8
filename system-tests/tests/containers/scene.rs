// SPDX-License-Identifier: MIT OR Apache-2.0
//! A directory for a host of its own, with containers of busybox in it.

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use provider_api::{BoxFuture, Provider};
use serde_json::Value;
use system_tests::process::Stop;
use system_tests::qemu::workspace;
use system_tests::vzdump::Vzdump;
use vzdump_core::config::storage::StorageConfig;
use vzdump_core::job::{JobContext, Limits, Providers};
use vzdump_core::layout::Layout;
use vzdump_core::storage::StorageSet;
use vzdump_core::tools::Tools;
use vzdump_core::vm::freeze_guard::GuardCommand;

use crate::provider::TarProvider;

/// For one command of the program.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);
/// For what a container does within moments.
const SOON: Duration = Duration::from_secs(30);

/// A host with containers; they are ended when it is dropped.
pub(crate) struct Scene {
    pub(crate) root: PathBuf,
    pub(crate) vzdump: Vzdump,
    pub(crate) template: PathBuf,
    /// Of tasks in this process.
    pub(crate) limits: Limits,
    ids: std::cell::RefCell<Vec<u32>>,
    _dir: tempfile::TempDir,
}

impl Scene {
    pub(crate) fn new() -> Self {
        // Not /tmp: an unprivileged container's root must get through all of the directories.
        let dir = tempfile::Builder::new().prefix("vzct").tempdir_in("/var/tmp").unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let root = dir.path().join("host");
        std::fs::create_dir(&root).unwrap();
        let template = make_template(dir.path());
        let vzdump = Vzdump::find(&root, false, &Stop::default()).unwrap();
        Self {
            root,
            vzdump,
            template,
            limits: Limits::default(),
            ids: std::cell::RefCell::default(),
            _dir: dir,
        }
    }

    /// A host with the storage `store` for backups.
    pub(crate) fn with_archives() -> Self {
        let scene = Self::new();
        let archives = scene.root.join("archives");
        std::fs::create_dir(&archives).unwrap();
        let file = scene.root.join("etc/storage.cfg");
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, format!("directory: store\n\tpath {}\n", archives.display()))
            .unwrap();
        scene
    }

    /// A storage of images beside `local`.
    pub(crate) fn add_storage(&self, kind: &str, id: &str, path: &Path) {
        let file = self.root.join("etc/storage.cfg");
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        let mut text = std::fs::read_to_string(&file).unwrap_or_default();
        text.push_str(&format!("{kind}: {id}\n\tpath {}\n\tcontent images\n", path.display()));
        std::fs::write(&file, text).unwrap();
    }

    /// Counts a container among those that are ended.
    pub(crate) fn expect(&self, id: u32) {
        self.ids.borrow_mut().push(id);
    }

    /// What the program's parts need to do a task in this process.
    pub(crate) fn context(&self, provider: &TarProvider) -> JobContext {
        let layout = Layout::new(Some(self.root.clone()));
        let storages = StorageConfig::read(&layout.storage_config_path()).unwrap();
        JobContext {
            storages: StorageSet::new(&storages, &layout),
            layout,
            tools: Tools::find(None, None),
            providers: Arc::new(One(provider.clone())),
            containers: Arc::new(lxc_backend::LxcContainers),
            guard: GuardCommand {
                program: workspace().join("target/debug/vzdump"),
                args: Vec::new(),
            },
            limits: self.limits.clone(),
        }
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Value {
        self.vzdump.run(arguments, LIMIT).unwrap()
    }

    /// What a command that fails says.
    pub(crate) fn fail(&self, arguments: &[&str]) -> String {
        let finished = self.vzdump.finish(arguments, LIMIT).unwrap();
        assert!(!finished.status.success(), "{arguments:?}: {}", finished.stdout);
        format!("{}{}", finished.stdout, finished.stderr)
    }

    /// Makes a container of busybox with small volumes.
    pub(crate) fn create(&self, id: u32, more: &[&str]) {
        self.create_from(&self.template, id, &[&["--size", "64M"], more].concat());
    }

    /// Makes one of a template.
    pub(crate) fn create_from(&self, template: &Path, id: u32, more: &[&str]) {
        let (number, template) = (id.to_string(), template.display().to_string());
        let mut arguments = vec!["ct", "create", &number, "--template", &template];
        arguments.extend(more);
        self.ids.borrow_mut().push(id);
        self.run(&arguments);
    }

    pub(crate) fn config(&self, id: u32) -> String {
        std::fs::read_to_string(self.root.join(format!("etc/lxc/{id}.conf"))).unwrap()
    }

    pub(crate) fn state(&self, id: u32) -> String {
        let status = self.run(&["ct", "status", &id.to_string()]);
        status["state"].as_str().unwrap().to_owned()
    }

    /// A path of a container that runs.
    pub(crate) fn inside(&self, id: u32, path: &str) -> PathBuf {
        let status = self.run(&["ct", "status", &id.to_string()]);
        PathBuf::from(format!("/proc/{}/root{path}", status["pid"]))
    }

    /// Loop devices and journals of this host: nothing may be left.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let loops = Command::new("losetup").args(["-n", "-O", "BACK-FILE"]).output().unwrap();
        let loops = String::from_utf8(loops.stdout).unwrap();
        let own = self.root.display().to_string();
        let mut found: Vec<String> =
            loops.lines().filter(|line| line.contains(&own)).map(str::to_owned).collect();
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        found.extend(mounts.lines().filter(|line| line.contains(&own)).map(str::to_owned));
        for dir in ["state/journal", "run/ct-restore", "run/ct-backup", "state/tmp"] {
            if let Ok(entries) = std::fs::read_dir(self.root.join(dir)) {
                found.extend(entries.map(|entry| entry.unwrap().path().display().to_string()));
            }
        }
        found
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for id in self.ids.borrow().iter() {
            let _ = self.vzdump.finish(&["ct", "stop", &id.to_string(), "--now"], LIMIT);
        }
    }
}

struct One(TarProvider);

impl Providers for One {
    fn provider<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<Arc<dyn Provider>, String>> {
        Box::pin(std::future::ready(Ok(Arc::new(self.0.clone()) as _)))
    }
}

/// Waits until something holds that a container does by itself.
pub(crate) fn wait_for(what: &str, holds: impl FnMut() -> bool) {
    wait_within(SOON, what, holds);
}

/// The same with more time.
pub(crate) fn wait_within(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Busybox as init and everything else, and a service that writes.
fn make_template(dir: &Path) -> PathBuf {
    let tree = dir.join("template");
    for name in ["bin", "sbin", "proc", "sys", "dev", "etc", "tmp", "root", "srv", "var"] {
        std::fs::create_dir_all(tree.join(name)).unwrap();
    }
    std::fs::copy("/usr/bin/busybox", tree.join("bin/busybox")).unwrap();
    for name in ["sh", "sleep", "poweroff", "mount", "cat", "echo", "sync", "mv", "expr"] {
        symlink("busybox", tree.join("bin").join(name)).unwrap();
    }
    symlink("../bin/busybox", tree.join("sbin/init")).unwrap();
    let inittab = "::sysinit:/bin/sh -c 'echo up > /root/up'\n::respawn:/bin/sh /writer\n";
    std::fs::write(tree.join("etc/inittab"), inittab).unwrap();
    std::fs::write(tree.join("writer"), WRITER).unwrap();
    let archive = dir.join("busybox.tar");
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(&tree).arg("-cf").arg(&archive).args(["--owner=0", "--group=0", "."]);
    assert!(tar.status().unwrap().success());
    archive
}

/// Writes a number to one volume and, when that is done, to the other: at any moment the first is the same or one
/// ahead.
const WRITER: &str = "n=0\n\
    while :; do\n\
    n=$(expr $n + 1)\n\
    echo $n > /root/a.new; mv /root/a.new /root/a\n\
    echo $n > /srv/b.new; mv /srv/b.new /srv/b\n\
    sleep 0.01\n\
    done\n";
