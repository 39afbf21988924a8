// SPDX-License-Identifier: MIT OR Apache-2.0
//! The runner with a real QEMU. Skipped where there is none.

use rustix::process::Signal;

use super::*;
use crate::config::storage::StorageConfig;
use crate::storage::ImageFormat;

struct Place {
    _dir: tempfile::TempDir,
    layout: Layout,
    storages: StorageSet,
    tools: Tools,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(Some(dir.path().into()));
        let storages = StorageSet::new(&StorageConfig::default(), &layout);
        Self { _dir: dir, layout, storages, tools: Tools::find(None, None) }
    }

    fn with_qemu() -> Option<Self> {
        let place = Self::new();
        if let Err(error) = place.tools.qemu_system() {
            eprintln!("skipped: {error}");
            return None;
        }
        Some(place)
    }

    fn configure(&self, id: u32, text: &str) {
        VmConfig::parse(text).write(&self.layout.vm_config_path(id)).unwrap();
    }

    async fn start(&self, id: u32, options: StartOptions) -> Result<Started, RunnerError> {
        start(&self.layout, &self.tools, &self.storages, id, options).await
    }
}

const PAUSED: StartOptions = StartOptions { paused: true };
const AT_ONCE: StopOptions = StopOptions { timeout: Duration::ZERO };

#[tokio::test]
async fn a_vm_that_does_not_exist_is_named() {
    let place = Place::new();
    let error = place.start(100, PAUSED).await.unwrap_err().to_string();
    assert!(error.contains("VM 100 does not exist"), "{error}");
    assert!(stop(&place.layout, 100, AT_ONCE).await.is_err());
    assert!(status(&place.layout, 100).await.is_err());
    assert!(place.start(7, PAUSED).await.is_err());
}

#[tokio::test]
async fn a_vm_that_is_off_says_so() {
    let place = Place::new();
    place.configure(101, "name: off\n");
    place.configure(100, "lock: backup\n");
    let status = status(&place.layout, 101).await.unwrap();
    assert!(!status.running && status.name.as_deref() == Some("off"));
    assert_eq!(stop(&place.layout, 101, AT_ONCE).await.unwrap(), Stopped::NotRunning);
    assert_eq!(list_ids(&place.layout).unwrap(), [100, 101]);
    assert!(matches!(place.start(100, PAUSED).await, Err(RunnerError::Locked { .. })));
}

#[tokio::test]
async fn a_missing_disk_is_named_before_anything_is_started() {
    let place = Place::new();
    place.configure(100, "virtio0: local:100/vm-100-disk-0.raw\n");
    let error = place.start(100, PAUSED).await.unwrap_err();
    let cause = std::error::Error::source(&error).and_then(|e| e.source()).unwrap().to_string();
    assert!(cause.contains("local:100/vm-100-disk-0.raw"), "{cause}");
    assert!(!place.layout.vm_run_dir(100).exists());
}

#[tokio::test]
async fn a_paused_vm_starts_answers_and_stops() {
    let Some(place) = Place::with_qemu() else { return };
    let storage = place.storages.images("local").unwrap();
    for (number, format) in [ImageFormat::Raw, ImageFormat::Qcow2].into_iter().enumerate() {
        let name = format!("vm-100-disk-{number}");
        storage.allocate(&place.tools, 100, &name, format, 1 << 20).await.unwrap();
    }
    place.configure(
        100,
        "name: test\nmemory: 64\nagent: 1\nserial0: socket\nscsihw: virtio-scsi-single\n\
         scsi0: local:100/vm-100-disk-0.raw,iothread=1,discard=on\n\
         virtio0: local:100/vm-100-disk-1.qcow2,serial=disk\nide2: none,media=cdrom\nvmgenid: 1\n",
    );
    let started = place.start(100, PAUSED).await.unwrap();
    assert_eq!(find_process(&place.layout, 100).unwrap(), Some(started.process));
    let again = place.start(100, PAUSED).await;
    assert!(matches!(again, Err(RunnerError::AlreadyRunning { .. })));
    let now = status(&place.layout, 100).await.unwrap();
    assert_eq!(now.qmp_status.as_deref(), Some("prelaunch"));
    assert_eq!(now.process, Some(started.process));
    for monitor in Monitor::ALL {
        let path = place.layout.qmp_socket(100, monitor);
        Session::connect(&path, QmpOptions::default()).await.unwrap();
    }
    assert!(place.layout.agent_socket(100).exists() && place.layout.console_log(100).exists());
    let stopped = stop(&place.layout, 100, StopOptions::default()).await.unwrap();
    assert_eq!(stopped, Stopped::Quit, "a guest that never ran cannot shut down");
    assert_eq!(find_process(&place.layout, 100).unwrap(), None);
    assert!(!place.layout.agent_socket(100).exists());
}

#[tokio::test]
async fn a_failed_start_shows_what_qemu_said_and_leaves_nothing_running() {
    let Some(place) = Place::with_qemu() else { return };
    place.configure(100, "memory: 64\nargs: -device no-such-device\n");
    let error = place.start(100, PAUSED).await.unwrap_err().to_string();
    assert!(error.contains("no-such-device"), "{error}");
    assert_eq!(find_process(&place.layout, 100).unwrap(), None);
    assert!(!place.layout.qmp_socket(100, Monitor::Runner).exists());
}

#[tokio::test]
async fn a_killed_vm_can_be_started_again() {
    let Some(place) = Place::with_qemu() else { return };
    place.configure(100, "memory: 64\n");
    let first = place.start(100, PAUSED).await.unwrap();
    let handle = first.process.open().unwrap().unwrap();
    handle.signal(Signal::KILL).unwrap();
    assert!(handle.wait(KILL_TIMEOUT).await.unwrap());
    assert!(place.layout.pid_file(100).exists(), "a killed QEMU leaves its pid file");
    assert!(!status(&place.layout, 100).await.unwrap().running);
    let second = place.start(100, PAUSED).await.unwrap();
    assert_ne!(first.process, second.process);
    stop(&place.layout, 100, AT_ONCE).await.unwrap();
}

#[tokio::test]
async fn a_dropped_start_ends_qemu() {
    let Some(place) = Place::with_qemu() else { return };
    place.configure(100, "memory: 64\n");
    let began = tokio::time::timeout(Duration::from_millis(1), place.start(100, PAUSED)).await;
    assert!(began.is_err(), "QEMU answered within a millisecond");
    // The pid file's lock goes with the process; a second start must find the way free.
    let started = place.start(100, PAUSED).await.unwrap();
    let now = find_process(&place.layout, 100).unwrap();
    assert_eq!(now, Some(started.process));
    stop(&place.layout, 100, AT_ONCE).await.unwrap();
}

async fn qmp_status(place: &Place, id: u32) -> Option<String> {
    status(&place.layout, id).await.unwrap().qmp_status
}

#[tokio::test]
async fn a_start_lets_a_guest_run_whose_qemu_waits() {
    let Some(place) = Place::with_qemu() else { return };
    place.configure(100, "memory: 64\n");
    let paused = place.start(100, PAUSED).await.unwrap();
    let started = place.start(100, StartOptions::default()).await.unwrap();
    assert_eq!(started.process, paused.process);
    assert!(started.notices[0].contains("had been started before"), "{:?}", started.notices);
    assert_eq!(qmp_status(&place, 100).await.as_deref(), Some("running"));
    let again = place.start(100, StartOptions::default()).await;
    assert!(matches!(again, Err(RunnerError::AlreadyRunning { .. })), "{again:?}");
    stop(&place.layout, 100, AT_ONCE).await.unwrap();
}

#[tokio::test]
async fn a_start_for_a_backup_is_found_by_its_mark_and_need_not_have_a_machine() {
    let Some(place) = Place::with_qemu() else { return };
    let storage = place.storages.images("local").unwrap();
    storage.allocate(&place.tools, 100, "vm-100-disk-0", ImageFormat::Raw, 1 << 20).await.unwrap();
    let disks = ["ide0".to_owned()];
    let start = async |mark: &str, is_to_run| {
        let options = BackupStart { mark, is_to_run, disks: &disks };
        start_for_backup(&place.layout, &place.tools, &place.storages, 100, options).await
    };
    for (lines, notice) in [
        ("", None),
        ("template: 1\n", None),
        ("net0: virtio\nlock: backup\n", Some("ignoring the unknown key net0")),
        (
            "machine: virt\n",
            Some("starting QEMU with nothing but the disks: The VM 100 cannot be started"),
        ),
        ("args: -device no-such\n", Some("starting QEMU with nothing but the disks: QEMU did not")),
    ] {
        place.configure(100, &format!("memory: 64\nide0: local:100/vm-100-disk-0.raw\n{lines}"));
        let mark = format!("mark-{}", uuid::Uuid::new_v4().simple());
        let started = start(&mark, false).await.unwrap();
        assert_eq!(VmProcess::of_mark(&mark).unwrap(), Some(started.process), "{lines}");
        assert_eq!(qmp_status(&place, 100).await.as_deref(), Some("prelaunch"), "{lines}");
        match notice {
            Some(notice) => assert!(started.notices[0].starts_with(notice), "{started:?}"),
            None => assert_eq!(started.notices, Vec::<String>::new(), "{lines}"),
        }
        if !lines.is_empty() {
            // No guest ever runs without what its configuration says.
            let ran = place.start(100, StartOptions::default()).await;
            let is_refused =
                matches!(ran, Err(RunnerError::OnlyDisks { .. } | RunnerError::Locked { .. }));
            assert!(is_refused, "{lines}: {ran:?}");
            let startable = check_startable(&place.layout, &place.tools, &place.storages, 100);
            // What QEMU itself refuses shows when it is tried only.
            assert_eq!(startable.is_ok(), lines.starts_with("args"), "{lines}");
        }
        stop(&place.layout, 100, AT_ONCE).await.unwrap();
        if !lines.is_empty() {
            let error = start(&mark, true).await.unwrap_err();
            let is_known = matches!(error, RunnerError::Cmdline { .. } | RunnerError::Start { .. });
            assert!(is_known, "{lines}: {error:?}");
        }
    }
}

#[tokio::test]
async fn a_guest_that_does_not_react_is_not_ended_by_a_shutdown_but_by_a_stop() {
    let Some(place) = Place::with_qemu() else { return };
    place.configure(100, "memory: 64\n");
    place.start(100, StartOptions::default()).await.unwrap();
    let brief = Duration::from_millis(300);
    assert!(!shut_down(&place.layout, 100, brief).await.unwrap());
    assert_eq!(qmp_status(&place, 100).await.as_deref(), Some("running"));
    let stopped = stop(&place.layout, 100, StopOptions { timeout: brief }).await.unwrap();
    assert_eq!(stopped, Stopped::Quit);
    assert!(shut_down(&place.layout, 100, brief).await.unwrap(), "it is off already");
}
