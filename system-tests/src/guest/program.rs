// SPDX-License-Identifier: MIT OR Apache-2.0
//! Compiles modules of this crate as static programs for the guest.
//!
//! Only the module is compiled, with the compiler alone: it needs nothing but the
//! standard library, so it takes seconds and no second build of the dependencies.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::cache::Cache;
use crate::process::{Stop, run};

const COMPILE_WITHIN: Duration = Duration::from_secs(120);
const RECORDS: Program = Program {
    name: "guest-records",
    module: "records",
    sources: &[
        ("mod.rs", include_str!("../records/mod.rs")),
        ("check.rs", include_str!("../records/check.rs")),
        ("content.rs", include_str!("../records/content.rs")),
        ("disk.rs", include_str!("../records/disk.rs")),
        ("layout.rs", include_str!("../records/layout.rs")),
        ("passes.rs", include_str!("../records/passes.rs")),
        ("program.rs", include_str!("../records/program.rs")),
        ("writer.rs", include_str!("../records/writer.rs")),
    ],
    call: "records::program::run(&arguments)",
};

/// A program that is one module of this crate.
pub(super) struct Program {
    /// Its name.
    pub(super) name: &'static str,
    /// The module.
    pub(super) module: &'static str,
    /// Its files, below a folder of its name, and what is in them.
    pub(super) sources: &'static [(&'static str, &'static str)],
    /// What it begins with, given its arguments.
    pub(super) call: &'static str,
}

impl Program {
    fn main(&self) -> String {
        format!(
            "mod {};\nfn main() -> std::process::ExitCode {{\n    let arguments: Vec<String> = \
             std::env::args().skip(1).collect();\n    {}\n}}\n",
            self.module, self.call
        )
    }
}

/// The cache's entry with the record program.
pub(super) fn entry(cache: &Cache, stop: &Stop) -> Result<PathBuf> {
    compile(&RECORDS, cache, stop)
}

/// The cache's entry with a program, compiled when sources or compiler are new.
pub(super) fn compile(program: &Program, cache: &Cache, stop: &Stop) -> Result<PathBuf> {
    let compiler = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = run(Command::new(&compiler).arg("-vV"), COMPILE_WITHIN, stop)?;
    let mut key = blake3::Hasher::new();
    let main = program.main();
    key.update(version.as_bytes()).update(main.as_bytes());
    for (name, source) in program.sources {
        key.update(name.as_bytes()).update(source.as_bytes());
    }
    cache.entry(program.module, &key.finalize().to_hex()[..16], |to| {
        let sources = to.join("source");
        write_sources(program, &main, &sources)?;
        let mut command = Command::new(&compiler);
        let crate_name = program.name.replace('-', "_");
        command.args(["--edition", "2024", "--crate-name", &crate_name, "--cap-lints", "allow"]);
        command.args(["-C", "opt-level=3", "-C", "target-feature=+crt-static"]);
        command.args(["-C", "strip=symbols", "-C", "panic=abort", "-o"]);
        command.arg(to.join(program.name)).arg(sources.join("main.rs"));
        run(&mut command, COMPILE_WITHIN, stop)?;
        fs::remove_dir_all(sources)?;
        Ok(())
    })
}

fn write_sources(program: &Program, main: &str, to: &Path) -> Result<()> {
    let folder = to.join(program.module);
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    fs::write(to.join("main.rs"), main)?;
    for (name, source) in program.sources {
        fs::write(folder.join(name), source)?;
    }
    Ok(())
}
