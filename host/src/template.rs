// SPDX-License-Identifier: MIT OR Apache-2.0
//! Starting points for those who write providers: the examples, as files of their own.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use provider_rpc::is_plugin_name;

use crate::HostError;

const PYTHON: &str = include_str!("../../providers/examples/python/file-store.py");
const RUST: &str = include_str!("../../providers/examples/rust/main.rs");
const RUST_MANIFEST: &str = include_str!("../../providers/examples/rust/Cargo.toml.in");

/// The language of a new provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Language {
    /// One file, with nothing but Python's standard library.
    Python,
    /// A crate of its own.
    Rust,
}

/// Writes a provider that works into a new directory, under the directory's name. Returns the files.
///
/// # Errors
/// [`HostError::Settings`] for a directory that has something in it or whose name cannot be a storage type;
/// [`HostError::Template`]. What was written stays.
pub fn new_provider(dir: &Path, language: Language) -> Result<Vec<PathBuf>, HostError> {
    let name = dir.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if !is_plugin_name(name) {
        return Err(HostError::Settings(format!(
            "The directory's name '{}' becomes a storage type: a to z, digits and '-', first a letter.",
            crate::clean(name)
        )));
    }
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| HostError::Template { path, source }
    };
    fs::create_dir_all(dir).map_err(failed(dir))?;
    if fs::read_dir(dir).map_err(failed(dir))?.next().is_some() {
        return Err(HostError::Settings(format!(
            "The directory {} is not empty; name a new one.",
            dir.display()
        )));
    }
    let mut written = Vec::new();
    for (file, mode, text) in files(name, language) {
        let path = dir.join(file);
        let parent = path.parent().unwrap_or(dir);
        fs::create_dir_all(parent).map_err(failed(parent))?;
        let mut options = fs::OpenOptions::new();
        let file = options.write(true).create_new(true).mode(mode).open(&path);
        file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(failed(&path))?;
        written.push(path);
    }
    Ok(written)
}

fn files(name: &str, language: Language) -> Vec<(String, u32, String)> {
    let readme = |program: &str| ("README.md".to_owned(), 0o644, readme(name, program));
    match language {
        Language::Python => {
            vec![(name.to_owned(), 0o755, PYTHON.to_owned()), readme(name)]
        }
        Language::Rust => vec![
            ("Cargo.toml".to_owned(), 0o644, RUST_MANIFEST.replace("@NAME@", name)),
            ("src/main.rs".to_owned(), 0o644, RUST.to_owned()),
            readme(&format!("target/release/{name}")),
        ],
    }
}

fn readme(name: &str, program: &str) -> String {
    let build = if program.starts_with("target") { "cargo build --release\n" } else { "" };
    format!(
        "# {name}\n\n\
         A backup provider for vzdump. It works as it is: try it, then replace what it does, one method after \
         the other.\n\n\
         ```\n\
         {build}mkdir -p try/etc try/lib/providers\n\
         ln -s \"$PWD/{program}\" try/lib/providers/{name}\n\
         printf '{name}: mine\\n\\tpath %s/try/data\\n' \"$PWD\" > try/etc/storage.cfg\n\
         vzdump --root try storage status\n\
         vzdump --root try provider check mine\n\
         ```\n\n\
         To install it: `install -D -m 755 {program} /usr/lib/vzdump/providers/{name}`, and a section \
         `{name}: NAME` with a `path` in `/etc/vzdump/storage.cfg`. The protocol is described in vzdump's \
         `docs/provider-protocol.md`.\n"
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_new_provider_is_written_once() {
        let dir = tempfile::tempdir().unwrap();
        let mine = dir.path().join("my-store");
        let written = new_provider(&mine, Language::Python).unwrap();
        assert_eq!(written, [mine.join("my-store"), mine.join("README.md")]);
        let mode = fs::metadata(&written[0]).unwrap().permissions().mode();
        assert_eq!(mode & 0o111, 0o111);
        // Also where no provider has been installed before.
        let readme = fs::read_to_string(&written[1]).unwrap();
        let install = "`install -D -m 755 my-store /usr/lib/vzdump/providers/my-store`";
        assert!(readme.contains(install), "{readme}");
        let error = new_provider(&mine, Language::Rust).unwrap_err().to_string();
        assert!(error.contains("is not empty"), "{error}");
        let error = new_provider(&dir.path().join("My"), Language::Rust).unwrap_err().to_string();
        assert!(error.contains("'My' becomes a storage type"), "{error}");
        let other = dir.path().join("other");
        new_provider(&other, Language::Rust).unwrap();
        let manifest = fs::read_to_string(other.join("Cargo.toml")).unwrap();
        assert!(manifest.contains("name = \"other\"") && !manifest.contains('@'), "{manifest}");
    }
}
