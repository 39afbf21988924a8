// SPDX-License-Identifier: MIT OR Apache-2.0
//! The QEMU programs in use, and how they are found.
//!
//! An explicit directory (option, environment or setting) is the only place that is looked at,
//! because programs of two builds must not be mixed by accident. Without one, the build tree this
//! program was built in comes first, then `PATH`.

use std::env;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

/// Names the directory of the QEMU programs.
pub const QEMU_BIN_ENV: &str = "VZDUMP_QEMU_BIN";

/// A program that is not there.
#[derive(Debug, Clone, thiserror::Error)]
#[error(
    "The program '{name}' was not found in {searched}. Build the patched QEMU with `cargo xtask \
     qemu`, or name the directory of its programs by --qemu-bin, {QEMU_BIN_ENV}, or `qemu-bin: \
     DIR` in vzdump.conf."
)]
pub struct MissingTool {
    /// The program.
    pub name: &'static str,
    /// Where it was looked for.
    pub searched: String,
}

/// Where the QEMU programs are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tools {
    dirs: Vec<PathBuf>,
}

impl Tools {
    /// Programs from `explicit`, else from the environment, else from `setting` (the key
    /// `qemu-bin` of `vzdump.conf`), else from the build tree or `PATH`.
    #[must_use]
    pub fn find(explicit: Option<&Path>, setting: Option<&Path>) -> Self {
        let from_env = env::var_os(QEMU_BIN_ENV).filter(|v| !v.is_empty()).map(PathBuf::from);
        let chosen = explicit.map(Path::to_owned).or(from_env).or(setting.map(Path::to_owned));
        if let Some(dir) = chosen {
            return Self::in_dir(dir);
        }
        let mut dirs: Vec<PathBuf> =
            env::current_exe().ok().and_then(build_tree).into_iter().collect();
        if let Some(path) = env::var_os("PATH") {
            dirs.extend(env::split_paths(&path).filter(|d| d.is_absolute()));
        }
        Self { dirs }
    }

    /// Programs of this directory only.
    #[must_use]
    pub fn in_dir(dir: impl Into<PathBuf>) -> Self {
        let dir = dir.into();
        Self { dirs: vec![std::path::absolute(&dir).unwrap_or(dir)] }
    }

    /// The system emulator.
    ///
    /// # Errors
    /// [`MissingTool`].
    pub fn qemu_system(&self) -> Result<PathBuf, MissingTool> {
        self.program("qemu-system-x86_64")
    }

    /// The image tool.
    ///
    /// # Errors
    /// [`MissingTool`].
    pub fn qemu_img(&self) -> Result<PathBuf, MissingTool> {
        self.program("qemu-img")
    }

    /// The NBD server for images.
    ///
    /// # Errors
    /// [`MissingTool`].
    pub fn qemu_nbd(&self) -> Result<PathBuf, MissingTool> {
        self.program("qemu-nbd")
    }

    /// The storage daemon.
    ///
    /// # Errors
    /// [`MissingTool`].
    pub fn qemu_storage_daemon(&self) -> Result<PathBuf, MissingTool> {
        self.program("qemu-storage-daemon")
    }

    fn program(&self, name: &'static str) -> Result<PathBuf, MissingTool> {
        self.dirs.iter().map(|dir| dir.join(name)).find(|path| is_program(path)).ok_or_else(|| {
            let searched = match self.dirs.as_slice() {
                [dir] => format!("'{}'", dir.display()),
                _ => "the build tree and PATH".to_owned(),
            };
            MissingTool { name, searched }
        })
    }
}

fn is_program(path: &Path) -> bool {
    path.is_file() && access(path, Access::EXEC_OK).is_ok()
}

/// `<target>/qemu/bin` when the program runs from a cargo target directory, which its cache tag
/// tells from an installed program's directory.
fn build_tree(exe: PathBuf) -> Option<PathBuf> {
    exe.ancestors()
        .skip(1)
        .take(4)
        .find(|dir| dir.join("CACHEDIR.TAG").is_file())
        .map(|dir| dir.join("qemu").join("bin"))
        .filter(|dir| dir.is_dir())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn an_explicit_directory_is_the_only_one() {
        let dir = tempfile::tempdir().unwrap();
        let tools = Tools::find(Some(dir.path()), None);
        let error = tools.qemu_img().unwrap_err().to_string();
        assert!(error.contains("'qemu-img'") && error.contains("cargo xtask qemu"), "{error}");

        let program = dir.path().join("qemu-img");
        fs::write(&program, "").unwrap();
        assert!(tools.qemu_img().is_err(), "a file that cannot be run was taken");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(tools.qemu_img().unwrap(), program);
    }

    #[test]
    fn the_build_tree_is_found_from_a_program_in_it() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("qemu/bin")).unwrap();
        let exe = dir.path().join("debug/deps/test");
        assert_eq!(build_tree(exe.clone()), None, "not a target directory");
        fs::write(dir.path().join("CACHEDIR.TAG"), "").unwrap();
        assert_eq!(build_tree(exe), Some(dir.path().join("qemu/bin")));
    }
}
