// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where everything is: configuration, state and run-time files.
//!
//! With a root `R` the trees are `R/etc`, `R/state`, `R/run` and `R/lib`; without one they are
//! `/etc/vzdump`, `/var/lib/vzdump`, `/run/vzdump` and `/usr/lib/vzdump`. All paths are absolute, so that a change of
//! the working directory cannot move them.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::{fs, io};

use provider_api::GuestKind;

/// Longest path of a Unix socket that Linux accepts, without the final zero byte.
pub const SOCKET_PATH_MAX_BYTES: usize = 107;

/// Smallest guest number.
pub const GUEST_ID_MIN: u32 = 100;
/// Largest guest number.
pub const GUEST_ID_MAX: u32 = 999_999_999;

/// A fault of the layout.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// A socket's path does not fit into a socket address.
    #[error(
        "The socket path '{path}' has {length_bytes} bytes, but Linux allows only \
         {SOCKET_PATH_MAX_BYTES}; use a shorter root directory."
    )]
    SocketPathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length.
        length_bytes: usize,
    },
    /// A directory could not be made.
    #[error("Cannot make the directory '{path}'.")]
    MakeDir {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not a guest number.
    #[error("{id} is not a guest number: {GUEST_ID_MIN} to {GUEST_ID_MAX} are allowed.")]
    GuestId {
        /// The number.
        id: u32,
    },
}

/// One of the QMP monitors of a VM. Each has one owner at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Monitor {
    /// For starting, stopping and asking for the status.
    Runner,
    /// For the backup of the VM.
    Backup,
    /// For an administrator or a tool beside the two.
    Spare,
}

impl Monitor {
    /// All monitors.
    pub const ALL: [Self; 3] = [Self::Runner, Self::Backup, Self::Spare];

    /// The name used for its socket and its character device.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Runner => "qmp-runner",
            Self::Backup => "qmp-backup",
            Self::Spare => "qmp-spare",
        }
    }
}

/// The directories in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    etc: PathBuf,
    state: PathBuf,
    run: PathBuf,
    lib: PathBuf,
}

impl Layout {
    /// The layout below `root`, or the system's.
    #[must_use]
    pub fn new(root: Option<PathBuf>) -> Self {
        match root {
            Some(root) => {
                // Only fails for an empty path or without a working directory; either way the
                // first access then names the path that does not exist.
                let root = std::path::absolute(&root).unwrap_or(root);
                Self {
                    etc: root.join("etc"),
                    state: root.join("state"),
                    run: root.join("run"),
                    lib: root.join("lib"),
                }
            }
            None => Self {
                etc: "/etc/vzdump".into(),
                state: "/var/lib/vzdump".into(),
                run: "/run/vzdump".into(),
                lib: "/usr/lib/vzdump".into(),
            },
        }
    }

    /// Configuration.
    #[must_use]
    pub fn etc(&self) -> &Path {
        &self.etc
    }

    /// What must survive a reboot.
    #[must_use]
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Sockets, pid files and locks.
    #[must_use]
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// The program's own settings, `key: value` lines.
    #[must_use]
    pub fn settings_path(&self) -> PathBuf {
        self.etc.join("vzdump.conf")
    }

    /// The executables of providers that are programs of their own, unless the settings name another one.
    #[must_use]
    pub fn provider_dir(&self) -> PathBuf {
        self.lib.join("providers")
    }

    /// The secrets of a storage; need not exist.
    #[must_use]
    pub fn storage_secrets_path(&self, storage: &str) -> PathBuf {
        self.etc.join("priv/storage").join(format!("{storage}.pw"))
    }

    /// The backup jobs.
    #[must_use]
    pub fn jobs_config_path(&self) -> PathBuf {
        self.etc.join("jobs.cfg")
    }

    /// The users, groups and pools; only the pools are read.
    #[must_use]
    pub fn user_config_path(&self) -> PathBuf {
        self.etc.join("user.cfg")
    }

    /// The list of storages.
    #[must_use]
    pub fn storage_config_path(&self) -> PathBuf {
        self.etc.join("storage.cfg")
    }

    /// The directory of the VMs' configurations.
    #[must_use]
    pub fn vm_config_dir(&self) -> PathBuf {
        self.etc.join("qemu-server")
    }

    /// A VM's configuration.
    #[must_use]
    pub fn vm_config_path(&self, id: u32) -> PathBuf {
        self.vm_config_dir().join(format!("{id}.conf"))
    }

    /// The directory of the containers' configurations.
    #[must_use]
    pub fn ct_config_dir(&self) -> PathBuf {
        self.etc.join("lxc")
    }

    /// A container's configuration.
    #[must_use]
    pub fn ct_config_path(&self, id: u32) -> PathBuf {
        self.ct_config_dir().join(format!("{id}.conf"))
    }

    /// The configuration of a guest of this kind.
    #[must_use]
    pub fn guest_config_path(&self, kind: GuestKind, id: u32) -> PathBuf {
        match kind {
            GuestKind::Qemu => self.vm_config_path(id),
            GuestKind::Lxc => self.ct_config_path(id),
        }
    }

    /// The configurations that there are of a guest of this number: more than one is a mistake of somebody.
    #[must_use]
    pub fn guest_configs(&self, id: u32) -> Vec<PathBuf> {
        let paths = [self.vm_config_path(id), self.ct_config_path(id)];
        paths.into_iter().filter(|path| path.exists()).collect()
    }

    /// The kind of a guest; one that is not there counts as a VM.
    #[must_use]
    pub fn guest_kind(&self, id: u32) -> GuestKind {
        if !self.vm_config_path(id).exists() && self.ct_config_path(id).exists() {
            GuestKind::Lxc
        } else {
            GuestKind::Qemu
        }
    }

    /// Where LXC keeps what belongs to containers that run: its `lxcpath`.
    #[must_use]
    pub fn lxc_path(&self) -> PathBuf {
        self.run.join("lxc")
    }

    /// Where files of containers are copied to, unless `tmpdir` says otherwise. Need not exist.
    #[must_use]
    pub fn temp_dir(&self) -> PathBuf {
        self.state.join("tmp")
    }

    /// The lock that a start and a stop of one container hold while they work.
    #[must_use]
    pub fn ct_power_lock_path(&self, id: u32) -> PathBuf {
        self.lock_dir().join(format!("power-lxc-{id}.lock"))
    }

    /// A guest's firewall configuration; it need not exist.
    #[must_use]
    pub fn firewall_path(&self, id: u32) -> PathBuf {
        self.etc.join("firewall").join(format!("{id}.fw"))
    }

    /// The private directories of all VMs.
    #[must_use]
    pub fn vm_runs_dir(&self) -> PathBuf {
        self.run.join("vm")
    }

    /// The private directory of a VM's sockets and logs.
    #[must_use]
    pub fn vm_run_dir(&self, id: u32) -> PathBuf {
        self.vm_runs_dir().join(id.to_string())
    }

    /// The socket of a VM's TPM, if it has one.
    #[must_use]
    pub fn tpm_socket(&self, id: u32) -> PathBuf {
        self.vm_run_dir(id).join("swtpm.sock")
    }

    /// What the VM's TPM said since it was started.
    #[must_use]
    pub fn tpm_log(&self, id: u32) -> PathBuf {
        self.vm_run_dir(id).join("swtpm.log")
    }

    /// The socket of one of a VM's monitors.
    #[must_use]
    pub fn qmp_socket(&self, id: u32, monitor: Monitor) -> PathBuf {
        self.vm_run_dir(id).join(format!("{}.sock", monitor.name()))
    }

    /// The socket of a VM's guest agent; exists only when the agent is enabled.
    #[must_use]
    pub fn agent_socket(&self, id: u32) -> PathBuf {
        self.vm_run_dir(id).join("agent.sock")
    }

    /// The socket of a VM's serial console; exists only when it has `serial0: socket`.
    #[must_use]
    pub fn serial_socket(&self, id: u32) -> PathBuf {
        self.vm_run_dir(id).join("serial0.sock")
    }

    /// What the VM wrote to its serial console since it was started.
    #[must_use]
    pub fn console_log(&self, id: u32) -> PathBuf {
        self.vm_run_dir(id).join("console.log")
    }

    /// What the VM's QEMU wrote to its standard error since it was started.
    #[must_use]
    pub fn qemu_log(&self, id: u32) -> PathBuf {
        self.vm_run_dir(id).join("qemu.log")
    }

    /// The pid file of a VM, written and locked by its QEMU.
    #[must_use]
    pub fn pid_file(&self, id: u32) -> PathBuf {
        self.vm_run_dir(id).join("pid")
    }

    /// The journal of jobs; survives a reboot.
    #[must_use]
    pub fn journal_dir(&self) -> PathBuf {
        self.state.join("journal")
    }

    /// Task logs.
    #[must_use]
    pub fn log_dir(&self) -> PathBuf {
        self.state.join("log")
    }

    /// Lock files.
    #[must_use]
    pub fn lock_dir(&self) -> PathBuf {
        self.run.join("lock")
    }

    /// What all tasks of the host share, see [`crate::host_budget`].
    #[must_use]
    pub fn budget_dir(&self) -> PathBuf {
        self.run.join("budget")
    }

    /// The lock that a start and a stop of one VM hold while they work.
    #[must_use]
    pub fn vm_power_lock_path(&self, id: u32) -> PathBuf {
        self.lock_dir().join(format!("power-qemu-{id}.lock"))
    }

    /// Makes a VM's private directory, or corrects its mode.
    ///
    /// # Errors
    /// [`LayoutError::MakeDir`].
    pub fn make_vm_run_dir(&self, id: u32) -> Result<PathBuf, LayoutError> {
        let path = self.vm_run_dir(id);
        make_private_dir(&path)?;
        Ok(path)
    }
}

/// Makes a directory that only its owner can enter, and its parents; corrects the mode of one
/// that exists.
///
/// # Errors
/// [`LayoutError::MakeDir`].
pub fn make_private_dir(path: &Path) -> Result<(), LayoutError> {
    let fault = |source| LayoutError::MakeDir { path: path.to_owned(), source };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(fault)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(fault(error)),
        _ => {}
    }
    // Also corrects what a umask took away.
    fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(fault)
}

/// Checks that a path fits into a Unix socket address.
///
/// # Errors
/// [`LayoutError::SocketPathTooLong`].
pub fn check_socket_path(path: &Path) -> Result<(), LayoutError> {
    let length_bytes = path.as_os_str().as_bytes().len();
    if length_bytes > SOCKET_PATH_MAX_BYTES {
        return Err(LayoutError::SocketPathTooLong { path: path.to_owned(), length_bytes });
    }
    Ok(())
}

/// Checks a guest number.
///
/// # Errors
/// [`LayoutError::GuestId`].
pub fn check_guest_id(id: u32) -> Result<(), LayoutError> {
    if (GUEST_ID_MIN..=GUEST_ID_MAX).contains(&id) {
        Ok(())
    } else {
        Err(LayoutError::GuestId { id })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_moves_all_trees() {
        let layout = Layout::new(Some("/r".into()));
        assert_eq!(layout.vm_config_path(100), Path::new("/r/etc/qemu-server/100.conf"));
        assert_eq!(layout.journal_dir(), Path::new("/r/state/journal"));
        assert_eq!(
            layout.qmp_socket(100, Monitor::Backup),
            Path::new("/r/run/vm/100/qmp-backup.sock")
        );
        assert_eq!(Layout::new(None).run(), Path::new("/run/vzdump"));
        assert_eq!(layout.provider_dir(), Path::new("/r/lib/providers"));
        let secrets = layout.storage_secrets_path("store");
        assert_eq!(secrets, Path::new("/r/etc/priv/storage/store.pw"));
    }

    #[test]
    fn a_relative_root_becomes_absolute() {
        assert!(Layout::new(Some("r".into())).etc().is_absolute());
    }

    #[test]
    fn long_socket_paths_are_refused() {
        assert!(check_socket_path(Path::new(&"x".repeat(107))).is_ok());
        let error = check_socket_path(Path::new(&"x".repeat(108))).unwrap_err();
        assert!(error.to_string().contains("108 bytes"), "{error}");
    }

    #[test]
    fn private_directories_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        make_private_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        make_private_dir(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn guest_numbers_are_checked() {
        assert!(check_guest_id(100).is_ok());
        assert!(check_guest_id(99).is_err());
        assert!(check_guest_id(1_000_000_000).is_err());
    }
}
