// SPDX-License-Identifier: MIT OR Apache-2.0
//! Compiles the record program as a static program for the guest.
//!
//! Only the module `records` is compiled, with the compiler alone: it needs nothing but the
//! standard library, so it takes seconds and no second build of the dependencies.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use super::cache::Cache;
use crate::process::{Stop, run};

const COMPILE_WITHIN: Duration = Duration::from_secs(120);
const MAIN: &str = "
mod records;
fn main() -> std::process::ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    records::program::run(&arguments)
}
";
const SOURCES: [(&str, &str); 8] = [
    ("mod.rs", include_str!("../records/mod.rs")),
    ("check.rs", include_str!("../records/check.rs")),
    ("content.rs", include_str!("../records/content.rs")),
    ("disk.rs", include_str!("../records/disk.rs")),
    ("layout.rs", include_str!("../records/layout.rs")),
    ("passes.rs", include_str!("../records/passes.rs")),
    ("program.rs", include_str!("../records/program.rs")),
    ("writer.rs", include_str!("../records/writer.rs")),
];

/// The cache's entry with the program, compiled when sources or compiler are new.
pub(super) fn entry(cache: &Cache, stop: &Stop) -> Result<PathBuf> {
    let compiler = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = run(Command::new(&compiler).arg("-vV"), COMPILE_WITHIN, stop)?;
    let mut key = blake3::Hasher::new();
    key.update(version.as_bytes()).update(MAIN.as_bytes());
    for (name, source) in SOURCES {
        key.update(name.as_bytes()).update(source.as_bytes());
    }
    cache.entry("records", &key.finalize().to_hex()[..16], |to| {
        let sources = to.join("source");
        fs::create_dir_all(sources.join("records"))?;
        fs::write(sources.join("main.rs"), MAIN)?;
        for (name, source) in SOURCES {
            fs::write(sources.join("records").join(name), source)?;
        }
        let mut command = Command::new(&compiler);
        command.args([
            "--edition",
            "2024",
            "--crate-name",
            "guest_records",
            "--cap-lints",
            "allow",
        ]);
        command.args(["-C", "opt-level=3", "-C", "target-feature=+crt-static"]);
        command.args(["-C", "strip=symbols", "-C", "panic=abort", "-o"]);
        command.arg(to.join("guest-records")).arg(sources.join("main.rs"));
        run(&mut command, COMPILE_WITHIN, stop)?;
        fs::remove_dir_all(sources)?;
        Ok(())
    })
}
