// SPDX-License-Identifier: MIT OR Apache-2.0
//! What every source file must have and must not have.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::Rule;
use super::lexer::lines_with_word;

const MAX_LINES: usize = 800;
/// Lines at the top in which the licence and the purpose must stand.
const HEADER_LINES: usize = 12;
const SPDX: &str = "SPDX-License-Identifier: ";
/// The only places for `unsafe`: C's border, and the system calls of containers.
const UNSAFE_IN: &[&str] =
    &["qemu-ext/sys/", "qemu-ext/src/qemu/", "qemu-ext/src/qemu.rs", "lxc-backend/src/system.rs"];

/// Reads and checks the source files among `files`.
pub(super) fn check(root: &Path, files: &[String]) -> Result<Vec<Rule>> {
    let mut rules = [
        Rule { name: "every source file names its licence", broken: Vec::new() },
        Rule { name: "every source file says what it is for", broken: Vec::new() },
        Rule { name: "no source file is longer than 800 lines", broken: Vec::new() },
        Rule { name: "unsafe code is only where it belongs", broken: Vec::new() },
        Rule { name: "crates outside QEMU forbid unsafe code", broken: Vec::new() },
    ];
    for file in files {
        let path = root.join(file);
        let bytes = fs::read(&path).with_context(|| format!("{}: cannot read", path.display()))?;
        let Ok(text) = String::from_utf8(bytes) else { continue };
        let Some(kind) = Kind::of(file, &text) else { continue };
        let results = [
            licence(file, &text),
            purpose(&text, kind),
            length(&text),
            no_unsafe(file, &text, kind),
            forbids_unsafe(file, &text),
        ];
        for (rule, result) in rules.iter_mut().zip(results) {
            rule.broken.extend(result.err().map(|why| format!("{file}: {why}")));
        }
    }
    Ok(rules.into())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Rust,
    C,
    /// Anything with `#` comments.
    Script,
}

impl Kind {
    /// The kind of a source file; `None` for what is not source (documents, data, manifests).
    fn of(file: &str, text: &str) -> Option<Self> {
        let extension = Path::new(file).extension().and_then(|e| e.to_str());
        match extension {
            Some("rs") => Some(Self::Rust),
            Some("c" | "h") => Some(Self::C),
            Some("sh" | "py" | "mak" | "options" | "patch") => Some(Self::Script),
            Some("json") if file.contains("/qapi/") => Some(Self::Script),
            None if text.starts_with("#!") => Some(Self::Script),
            _ => None,
        }
    }
}

/// The licence a file is under, by where it is.
fn expected_licence(file: &str) -> &'static str {
    if file.starts_with("qemu-ext/qapi/") {
        "MIT OR Apache-2.0 OR GPL-2.0-or-later"
    } else if file.starts_with("qemu-ext/") {
        "GPL-2.0-or-later"
    } else {
        "MIT OR Apache-2.0"
    }
}

fn licence(file: &str, text: &str) -> Result<(), String> {
    let expected = expected_licence(file);
    let found = text.lines().take(HEADER_LINES).find_map(|line| line.split_once(SPDX));
    let found = found.map(|(_, id)| id.trim_end_matches("*/").trim());
    if found == Some(expected) {
        return Ok(());
    }
    Err(format!("\"{SPDX}{expected}\" is not in its first lines"))
}

fn purpose(text: &str, kind: Kind) -> Result<(), String> {
    let mut lines = text.lines().take(HEADER_LINES).map(str::trim).filter(|line| {
        !line.is_empty()
            && !line.contains(SPDX)
            && !line.starts_with("#!/")
            && !line.contains("-*-")
    });
    let says = |line: &str| line.chars().any(char::is_alphabetic);
    let found = match kind {
        Kind::Rust => lines.next().and_then(|line| line.strip_prefix("//!")).is_some_and(says),
        Kind::C => {
            lines.take_while(|line| line.starts_with("/*") || line.starts_with('*')).any(says)
        }
        Kind::Script => lines
            .take_while(|line| line.starts_with('#'))
            .any(|line| says(line) && !line.starts_with("# vim:")),
    };
    if found { Ok(()) } else { Err("does not begin with a comment on its purpose".into()) }
}

fn length(text: &str) -> Result<(), String> {
    let lines = text.lines().count();
    if lines <= MAX_LINES { Ok(()) } else { Err(format!("{lines} lines")) }
}

fn no_unsafe(file: &str, text: &str, kind: Kind) -> Result<(), String> {
    if kind != Kind::Rust || UNSAFE_IN.iter().any(|place| file.starts_with(place)) {
        return Ok(());
    }
    let lines = lines_with_word(text, "unsafe");
    if lines.is_empty() { Ok(()) } else { Err(format!("unsafe in line {lines:?}")) }
}

/// The root file of every crate says so itself, so that the compiler holds it.
fn forbids_unsafe(file: &str, text: &str) -> Result<(), String> {
    let parts: Vec<&str> = file.split('/').collect();
    let is_root = matches!(parts.as_slice(), [.., "src", "lib.rs" | "main.rs"])
        || matches!(parts.as_slice(), [.., "src", "bin", _]);
    let exempt = ["qemu-ext/src/", "qemu-ext/sys/", "lxc-backend/src/"];
    if !is_root || exempt.iter().any(|place| file.starts_with(place)) {
        return Ok(());
    }
    if text.contains("#![forbid(unsafe_code)]") {
        return Ok(());
    }
    Err("has no #![forbid(unsafe_code)]".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of violations of each rule for one file.
    fn broken(file: &str, text: &str) -> Vec<usize> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        check(dir.path(), &[file.to_string()]).unwrap().iter().map(|r| r.broken.len()).collect()
    }

    const GOOD: &str = "// SPDX-License-Identifier: MIT OR Apache-2.0\n//! Does a thing.\n";

    #[test]
    fn a_good_file_breaks_nothing() {
        assert_eq!(broken("a/src/b.rs", GOOD), [0; 5]);
        let script =
            "#!/bin/sh\n# SPDX-License-Identifier: MIT OR Apache-2.0\n#\n# Does a thing.\n";
        assert_eq!(broken("run", script), [0; 5]);
        assert_eq!(broken("README.md", "no header"), [0; 5]);
        let c = "/* SPDX-License-Identifier: GPL-2.0-or-later */\n/*\n * Does a thing.\n */\n";
        assert_eq!(broken("qemu-ext/sys/csrc/a.c", c), [0; 5]);
    }

    #[test]
    fn every_rule_finds_its_fault() {
        assert_eq!(broken("a/src/b.rs", "//! Does a thing.\n"), [1, 0, 0, 0, 0]);
        assert_eq!(broken("qemu-ext/src/b.rs", GOOD), [1, 0, 0, 0, 0]);
        assert_eq!(broken("a/src/b.rs", &GOOD.replace("//!", "//")), [0, 1, 0, 0, 0]);
        assert_eq!(broken("a/src/b.rs", &format!("{GOOD}{}", "\n".repeat(800))), [0, 0, 1, 0, 0]);
        assert_eq!(
            broken("a/src/b.rs", &format!("{GOOD}fn f() {{ unsafe {{}} }}")),
            [0, 0, 0, 1, 0]
        );
        assert_eq!(broken("a/src/lib.rs", GOOD), [0, 0, 0, 0, 1]);
        assert_eq!(broken("a/src/bin/tool.rs", GOOD), [0, 0, 0, 0, 1]);
    }

    #[test]
    fn unsafe_is_allowed_at_the_border() {
        let text = "// SPDX-License-Identifier: GPL-2.0-or-later\n//! Border.\nunsafe fn f() {}\n";
        assert_eq!(broken("qemu-ext/src/qemu/a.rs", text), [0; 5]);
        assert_eq!(broken("qemu-ext/src/access/a.rs", text), [0, 0, 0, 1, 0]);
    }
}
