// SPDX-License-Identifier: MIT OR Apache-2.0
//! QEMU's generated QMP references, made with the tree's own generator: they must build with our QAPI
//! file without an exception made for it and without a warning from it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::install::create_dir;
use crate::paths::Paths;
use crate::run::{Show, Step};

const SCHEMA: &str = "backup-access.json";
/// The references of the system emulator and of the storage daemon, in docs/interop.
const REFERENCES: &[&str] = &["qemu-qmp-ref", "qemu-storage-daemon-qmp-ref"];
/// The module alone, which takes seconds.
const ALONE: &str = "backup-access";

/// How much is generated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Our module, and what it includes.
    Module,
    /// Both references of QEMU as they are published.
    Everything,
}

/// Generates text in `reference/text` beside the programs of the QEMU in `paths`.
pub(crate) fn check(paths: &Paths, scope: Scope) -> Result<()> {
    let src = source_tree(paths)?;
    // The copy that the last build used.
    let schema = read(&src.join("qapi").join(SCHEMA))?;
    let names = definitions(&schema);
    no_exceptions(&read(&src.join("qapi/pragma.json"))?, &names)?;

    let dir = paths.qemu().join("reference");
    let _ = fs::remove_dir_all(&dir);
    let documents = write_source(&dir.join("source"), &src, scope)?;
    let (text, warnings) = (dir.join("text"), dir.join("warnings"));
    let mut command = Command::new("/usr/bin/python3");
    command.args(["-m", "sphinx", "-q", "-b", "text", "-w"]).arg(&warnings);
    command.arg("-d").arg(dir.join("doctrees")).arg(dir.join("source")).arg(&text);
    command.env("PYTHONDONTWRITEBYTECODE", "1");
    Step {
        name: "generate the QMP reference",
        log: paths.logs().join("qemu-reference.log"),
        show: Show::Progress,
        limit: Duration::from_secs(1200),
    }
    .run(command)?;

    let warnings = read(&warnings)?;
    let ours = about_ours(&warnings);
    if !ours.is_empty() {
        bail!("the QMP reference has warnings about {SCHEMA}:\n{}", ours.join("\n"));
    }
    for document in documents {
        let text = read(&text.join(format!("{document}.txt")))?;
        let missing: Vec<&String> = names.iter().filter(|name| !text.contains(*name)).collect();
        if !missing.is_empty() {
            bail!("{document} says nothing about {missing:?}");
        }
    }
    Ok(())
}

/// Writes what Sphinx reads; returns the documents that must describe our commands.
fn write_source(dir: &Path, src: &Path, scope: Scope) -> Result<Vec<&'static str>> {
    create_dir(dir)?;
    let write = |name: &str, text: &str| {
        let path = dir.join(name);
        fs::write(&path, text).with_context(|| format!("{}: cannot write", path.display()))
    };
    let documents = match scope {
        Scope::Module => {
            let qapi = src.join("qapi");
            let include =
                |name: &str| format!("{{ 'include': '{}' }}\n", qapi.join(name).display());
            let schema = format!("{}{}", include("pragma.json"), include(SCHEMA));
            write("schema.json", &schema)?;
            let reference = read(&src.join("docs/interop/qemu-qmp-ref.rst"))?;
            write(
                &format!("{ALONE}.rst"),
                &reference.replace("qapi/qapi-schema.json", "schema.json"),
            )?;
            vec![ALONE]
        }
        Scope::Everything => {
            for name in REFERENCES {
                let file = format!("{name}.rst");
                write(&file, &read(&src.join("docs/interop").join(&file))?)?;
            }
            REFERENCES.to_vec()
        }
    };
    let root = if scope == Scope::Module { dir } else { src };
    write("conf.py", &configuration(src, root))?;
    write(
        "index.rst",
        &format!("Index\n=====\n\n.. toctree::\n\n   {}\n", documents.join("\n   ")),
    )?;
    Ok(documents)
}

/// The source tree that `cargo xtask qemu` has built last.
fn source_tree(paths: &Paths) -> Result<PathBuf> {
    let text = read(&paths.qemu().join("build-env"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("QEMU_SRC="));
    line.map(PathBuf::from).context("build-env names no source tree; run `cargo xtask qemu`")
}

/// Sphinx's configuration: QEMU's own, which finds out where it is, without its HTML theme, and with
/// schemas looked for in `root`.
fn configuration(src: &Path, root: &Path) -> String {
    let docs = src.join("docs").display().to_string();
    let root = root.display().to_string();
    format!(
        "import sys, types\n\
         sys.modules.setdefault('sphinx_rtd_theme', types.ModuleType('sphinx_rtd_theme'))\n\
         qemu_docdir = {docs:?}\n\
         with open(qemu_docdir + '/conf.py') as f:\n    \
             exec(compile(f.read(), f.name, 'exec'))\n\
         html_theme = 'basic'\n\
         qapidoc_srctree = {root:?}\n"
    )
}

/// The names that a QAPI file defines.
fn definitions(schema: &str) -> BTreeSet<String> {
    let kinds = ["'command': '", "'struct': '", "'enum': '", "'union': '", "'event': '"];
    schema
        .lines()
        .filter(|line| line.starts_with('{'))
        .filter_map(|line| {
            let kind = kinds.iter().find_map(|kind| line.split_once(kind))?;
            Some(kind.1.split('\'').next()?.to_string())
        })
        .collect()
}

/// QEMU's list of definitions that may break its rules must not have ours.
fn no_exceptions(pragma: &str, names: &BTreeSet<String>) -> Result<()> {
    match names.iter().find(|name| pragma.contains(&format!("'{name}'"))) {
        None => Ok(()),
        Some(name) => bail!("qapi/pragma.json makes an exception for {name}"),
    }
}

/// Those of Sphinx's warnings that our file causes.
fn about_ours(warnings: &str) -> Vec<&str> {
    warnings.lines().filter(|line| line.contains(SCHEMA)).collect()
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("{}: cannot read", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_a_schema_defines() {
        let names = definitions(
            "##\n# { 'struct': 'NotThis' }\n{ 'enum': 'A',\n  'data': [ 'b' ] }\n\
             { 'command': 'c-d', 'data': 'E' }\n{ 'include': 'f.json' }\n",
        );
        assert_eq!(names.iter().collect::<Vec<_>>(), ["A", "c-d"]);
        assert!(no_exceptions("[ 'B', 'c_d' ]", &names).is_ok());
        assert!(no_exceptions("[ 'B', 'c-d' ]", &names).is_err());
    }

    #[test]
    fn only_warnings_about_our_file_count() {
        let warnings =
            "/q/qapi/block.json:4: WARNING: x\n/q/qapi/backup-access.json:7: WARNING: y\n";
        assert_eq!(about_ours(warnings).len(), 1);
        assert!(about_ours("").is_empty());
    }
}
