// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the extension wants of a QEMU tree: read from the extension's own files where those say it,
//! so that it cannot go out of date, and listed here where they do not.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::headers::{is_word, tokens, without_comments};
use crate::tidy::code_only;

/// One thing that a tree must have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Want {
    /// A hunk of the patch fits into this file.
    Anchor { file: String, hunk: String },
    /// A line of one of the tree's files that the build relies on.
    Line { file: &'static str, text: &'static str },
    /// One of these headers is there; the newest name first.
    Header { names: Vec<String> },
    /// A function or macro that can be called with so many arguments.
    Function { name: String, arguments: Option<usize> },
    /// A macro, enumerator, type or variable.
    Name { name: String },
    /// A callback of a structure that takes so many parameters.
    Callback { structure: &'static str, name: String, parameters: usize },
    /// A member of a structure.
    Member { structure: &'static str, name: &'static str },
    /// A parameter, counted from 0, of a callback, with the types that the extension can serve.
    Parameter {
        structure: &'static str,
        callback: &'static str,
        index: usize,
        types: &'static [&'static str],
    },
    /// A definition of the QAPI schema.
    Qapi { kind: &'static str, name: String },
}

/// A want and what it is for.
#[derive(Debug, Clone)]
pub(super) struct Probe {
    pub(super) want: Want,
    pub(super) purpose: String,
}

/// What the bindings cannot be asked for by name: members that the extension reads or sets.
const MEMBERS: &[(&str, &str, &str)] = &[
    ("BlockDriverState", "drv", "tell our nodes from others"),
    ("BlockDriverState", "opaque", "a driver's own state"),
    ("BlockDriverState", "file", "the link to the node below"),
    ("BlockDriverState", "backing", "the link to the image below"),
    ("BlockDriverState", "options", "a raw node that shows a part of its file"),
    ("BlockDriverState", "total_sectors", "size of a node"),
    ("BlockDriverState", "open_flags", "inactive and uncached nodes"),
    ("BlockDriverState", "bl", "request limits"),
    ("BlockDriverState", "filename", "the filter shows its source's file"),
    ("BlockDriverState", "exact_filename", "the filter shows its source's file"),
    ("BlockDriverState", "supported_write_flags", "FUA reaches the disk"),
    ("BlockDriverState", "supported_zero_flags", "unmapping zeroes reach the disk"),
    ("BlockDriverState", "parents", "walk the graph upwards"),
    ("BlockDriverState", "children", "walk the graph downwards"),
    ("BlockDriverState", "write_gen", "a bitmap's file is loaded before the first write only"),
    ("BlockLimits", "request_alignment", "granule of captures"),
    ("BlockLimits", "pdiscard_alignment", "releases by trim, discards of the fleecing image"),
    ("BlockLimits", "max_pdiscard", "releases of any length"),
    ("BlockLimits", "zoned", "refuse zoned disks"),
    ("BdrvChild", "bs", "the node at a link"),
    ("BdrvChild", "klass", "who holds a link"),
    ("BdrvChild", "opaque", "who holds a link"),
    ("BdrvChild", "perm", "permissions of a link"),
    ("BdrvChild", "frozen", "links that must not move"),
    ("BdrvChild", "next_parent", "walk the graph upwards"),
    ("BdrvChildClass", "stay_at_node", "the snapshot stays at its filter"),
    ("BdrvChildClass", "parent_is_bds", "tell nodes from other users of a node"),
    ("BdrvChildClass", "get_parent_desc", "name who holds a link"),
    ("BlockExport", "blk", "find the exports of a node"),
    ("BlockExport", "refcount", "wait for the end of an export"),
    ("BlockDriver", "format_name", "name of a driver"),
    ("BlockDriver", "instance_size", "a driver's own state"),
    ("BlockDriver", "is_filter", "the filter is transparent"),
    ("BlockDriver", "bdrv_snapshot_goto", "disks that can be reverted during a backup"),
];

/// Parameters whose type has changed before; `sys/build.rs` finds out which one it is.
const PARAMETERS: &[(&str, usize, &[&str], &str)] = &[(
    "bdrv_co_block_status",
    1,
    &["bool", "unsigned int", "unsigned"],
    "block status of the snapshot (BlockStatusMode of the bindings)",
)];

/// What the patch and the build take for granted besides the patch's own places.
const LINES: &[(&str, &str, &str)] = &[
    ("meson.build", "blockdev_ss", "links the library where block devices are managed"),
    (
        "qapi/meson.build",
        "qapi_files = custom_target",
        "cargo runs after the QAPI headers are made",
    ),
    ("qapi/pragma.json", "'doc-required': true", "the documentation of the commands is checked"),
];

/// What each file that the patch changes is patched for.
const ANCHORS: &[(&str, &str)] = &[
    ("meson.build", "build the library with cargo and link it"),
    ("qapi/meson.build", "generate code for the commands"),
    ("qapi/qapi-schema.json", "the commands in qemu-system-*"),
    ("storage-daemon/qapi/qapi-schema.json", "the commands in qemu-storage-daemon"),
    ("nbd/server.c", "clients that connect while everything is drained wait"),
];

/// Names in the bindings that do not come from QEMU's tree: our own QAPI file and shim, GLib, and a
/// type that our build script adds.
const NOT_QEMU: &[&str] = &[
    "BackupAccess",
    "BACKUP_ACCESS",
    "qapi_event_send_backup",
    "ba_",
    "g_",
    "G_",
    "gsize",
    "BlockStatusMode",
];

/// Types that QEMU generates from its QAPI files.
const QAPI_TYPES: &[(&str, &str)] = &[("enum", "PreallocMode")];

/// Reads what the extension in `ext` (the folder qemu-ext) wants.
pub(super) fn read(ext: &Path) -> Result<Vec<Probe>> {
    let text = |name: &str| {
        let path = ext.join(name);
        fs::read_to_string(&path).with_context(|| format!("{}: cannot read", path.display()))
    };
    let mut probes = places(ext)?;
    probes.extend(LINES.iter().map(|(file, text, purpose)| Probe {
        want: Want::Line { file, text },
        purpose: (*purpose).to_string(),
    }));
    probes.extend(headers(&text("sys/csrc/wrapper.h")?));
    probes.extend(from_rust(&ext.join("src"))?);
    probes.extend(from_shim(&text("sys/csrc/shim.c")?));
    probes.extend(MEMBERS.iter().map(|(structure, name, purpose)| Probe {
        want: Want::Member { structure, name },
        purpose: (*purpose).to_string(),
    }));
    probes.extend(PARAMETERS.iter().map(|(callback, index, types, purpose)| Probe {
        want: Want::Parameter { structure: "BlockDriver", callback, index: *index, types },
        purpose: (*purpose).to_string(),
    }));
    let mut seen = Vec::new();
    probes.retain(|probe| {
        let new = !seen.contains(&probe.want);
        seen.push(probe.want.clone());
        new
    });
    Ok(probes)
}

/// The places that the patch of the extension in `ext` changes.
pub(super) fn places(ext: &Path) -> Result<Vec<Probe>> {
    let path = ext.join("meson/qemu.patch");
    let text =
        fs::read_to_string(&path).with_context(|| format!("{}: cannot read", path.display()))?;
    Ok(anchors(&text))
}

/// One probe for each hunk of the patch.
fn anchors(patch: &str) -> Vec<Probe> {
    let mut probes = Vec::new();
    let mut header = String::new();
    let mut hunk: Option<String> = None;
    let mut file = String::new();
    let mut finish = |file: &str, header: &str, hunk: Option<String>| {
        let Some(hunk) = hunk else { return };
        let purpose = ANCHORS.iter().find(|(name, _)| *name == file).map_or("", |(_, what)| what);
        probes.push(Probe {
            want: Want::Anchor { file: file.to_string(), hunk: format!("{header}{hunk}") },
            purpose: purpose.to_string(),
        });
    };
    for line in patch.lines().filter(|line| !line.starts_with("# ") && *line != "#") {
        if line.starts_with("--- ") {
            finish(&file, &header, hunk.take());
            header = format!("{line}\n");
        } else if let Some(name) = line.strip_prefix("+++ b/") {
            header.push_str(line);
            header.push('\n');
            file = name.to_string();
        } else if line.starts_with("@@ ") {
            finish(&file, &header, hunk.replace(format!("{line}\n")));
        } else if let Some(hunk) = &mut hunk {
            hunk.push_str(line);
            hunk.push('\n');
        }
    }
    finish(&file, &header, hunk);
    probes
}

/// The headers that the bindings are made from. Each branch of an `#if __has_include` names the same
/// headers in the same order, by the names of one version.
fn headers(wrapper: &str) -> Vec<Probe> {
    let mut found: Vec<Vec<String>> = Vec::new();
    let mut branches: Vec<Vec<String>> = Vec::new();
    for line in wrapper.lines().map(str::trim) {
        let name = line.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"'));
        if line.starts_with("#if __has_include") || (line == "#else" && !branches.is_empty()) {
            branches.push(Vec::new());
        } else if line == "#endif" {
            let longest = branches.iter().map(Vec::len).max().unwrap_or(0);
            for index in 0..longest {
                found.push(
                    branches.iter().filter_map(|branch| branch.get(index).cloned()).collect(),
                );
            }
            branches.clear();
        } else if let Some(name) = name {
            match branches.last_mut() {
                Some(branch) => branch.push(name.to_string()),
                None => found.push(vec![name.to_string()]),
            }
        }
    }
    // Not those that the build makes, QEMU's or ours.
    found.retain(|names| !names.iter().any(|name| name.starts_with("qapi/qapi-")));
    let purpose = "the bindings are made from it";
    found
        .into_iter()
        .map(|names| Probe { want: Want::Header { names }, purpose: purpose.to_string() })
        .collect()
}

/// How a name of the bindings is used.
#[derive(Default)]
struct Use {
    files: BTreeSet<String>,
    arguments: Option<usize>,
    called: bool,
}

/// Everything that the Rust code takes from the bindings, and the callbacks it gives to QEMU.
fn from_rust(src: &Path) -> Result<Vec<Probe>> {
    let mut uses: BTreeMap<String, Use> = BTreeMap::new();
    let mut probes = Vec::new();
    let mut purposes = BTreeMap::new();
    for path in rust_files(src)? {
        let text = fs::read_to_string(&path)
            .with_context(|| format!("{}: cannot read", path.display()))?;
        let file = path.strip_prefix(src).unwrap_or(&path).display().to_string();
        purposes.insert(file.clone(), purpose(&text));
        // Lifetimes look like unfinished literals of C.
        let tokens = tokens(&code_only(&text).replace('\'', " "));
        for at in 0..tokens.len() {
            let is = |offset: usize, sign: &str| tokens.get(at + offset).is_some_and(|t| t == sign);
            if is(0, "sys") && is(1, ":") && is(2, ":") {
                let Some(name) = tokens.get(at + 3).filter(|name| name.starts_with(is_word)) else {
                    continue;
                };
                let entry = uses.entry(name.clone()).or_default();
                entry.files.insert(file.clone());
                if is(4, "(") {
                    entry.called = true;
                    entry.arguments = Some(arguments(&tokens[at + 4..]));
                }
            }
        }
        probes.extend(callbacks(&tokens, &format!("{file}: {}", purpose(&text))));
    }
    for (name, used) in uses {
        if NOT_QEMU.iter().any(|prefix| name.starts_with(prefix)) {
            continue;
        }
        let file = used.files.first().cloned().unwrap_or_default();
        let purpose = format!("{file}: {}", purposes.get(&file).map_or("", String::as_str));
        probes.push(Probe { want: want(name, &used), purpose });
    }
    Ok(probes)
}

/// What a used name is in QEMU's sources.
fn want(name: String, used: &Use) -> Want {
    if let Some(of) = name.strip_prefix("qapi_free_") {
        let name = of.strip_suffix("List").unwrap_or(of).to_string();
        return Want::Qapi { kind: "struct", name };
    }
    if let Some(command) = name.strip_prefix("qmp_") {
        return Want::Qapi { kind: "command", name: command.replace('_', "-") };
    }
    if let Some((kind, name)) = QAPI_TYPES.iter().find(|(_, known)| *known == name) {
        return Want::Qapi { kind, name: (*name).to_string() };
    }
    if used.called {
        Want::Function { name, arguments: used.arguments }
    } else {
        Want::Name { name }
    }
}

/// `member: Some(function)` of a driver, with the number of parameters of that function.
fn callbacks(tokens: &[String], purpose: &str) -> Vec<Probe> {
    let mut probes = Vec::new();
    for window in tokens.windows(6) {
        let [member, colon, some, open, function, close] = window else { continue };
        let signs = (colon.as_str(), some.as_str(), open.as_str(), close.as_str());
        if !member.starts_with("bdrv_") || signs != (":", "Some", "(", ")") {
            continue;
        }
        let defined = tokens
            .windows(3)
            .position(|three| three[0] == "fn" && three[1] == *function && three[2] == "(");
        let Some(defined) = defined else { continue };
        probes.push(Probe {
            want: Want::Callback {
                structure: "BlockDriver",
                name: member.clone(),
                parameters: arguments(&tokens[defined + 2..]),
            },
            purpose: purpose.to_string(),
        });
    }
    probes
}

/// What the shim calls, and the constants it names; not what it has in `#if`, which is there because
/// some versions lack it.
fn from_shim(shim: &str) -> Vec<Probe> {
    const KEYWORDS: &[&str] = &["if", "while", "for", "return", "sizeof", "switch", "bool", "NULL"];
    let mut probes = Vec::new();
    let mut depth = 0_usize;
    let code: String = without_comments(shim)
        .lines()
        .map(|line| {
            if line.starts_with("#if") {
                depth += 1;
            } else if line.starts_with("#endif") {
                depth = depth.saturating_sub(1);
            }
            if depth > 0 || line.starts_with('#') { "\n".to_string() } else { format!("{line}\n") }
        })
        .collect();
    let tokens = tokens(&code);
    let mut function = String::new();
    let mut braces = 0_usize;
    for (at, token) in tokens.iter().enumerate() {
        match token.as_str() {
            "{" => braces += 1,
            "}" => braces = braces.saturating_sub(1),
            _ => {}
        }
        let called = tokens.get(at + 1).is_some_and(|next| next == "(");
        if braces == 0 && called && token.starts_with("ba_") {
            function.clone_from(token);
        }
        let known = !token.starts_with(is_word)
            || token.starts_with(|c: char| c.is_ascii_digit())
            || NOT_QEMU.iter().any(|prefix| token.starts_with(prefix))
            || KEYWORDS.contains(&token.as_str());
        if braces == 0 || known {
            continue;
        }
        let constant = token.len() > 3 && !token.contains(|c: char| c.is_ascii_lowercase());
        let member = at > 0 && tokens[at - 1] == ">";
        let want = if called && !member && !is_local(&tokens, token) {
            Want::Function { name: token.clone(), arguments: Some(arguments(&tokens[at + 1..])) }
        } else if constant && !called {
            Want::Name { name: token.clone() }
        } else {
            continue;
        };
        probes.push(Probe { want, purpose: format!("the C shim's {function}") });
    }
    probes
}

/// Whether a name is a parameter of the shim that points to a function.
fn is_local(tokens: &[String], name: &str) -> bool {
    tokens.windows(4).any(|w| w[0] == "(" && w[1] == "*" && w[2] == name && w[3] == ")")
}

/// The number of arguments or parameters in a group of round brackets.
fn arguments(tokens: &[String]) -> usize {
    let (mut depth, mut count, mut pending) = (0_usize, 0, false);
    for token in tokens {
        match token.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.saturating_sub(1),
            "," if depth == 1 => {
                count += usize::from(pending);
                pending = false;
                continue;
            }
            _ => {}
        }
        if depth == 0 {
            break;
        }
        // Any token but the opening sign begins an argument.
        pending |= !(token == "(" && depth == 1);
    }
    count + usize::from(pending)
}

/// The first sentence of a file's own description.
fn purpose(text: &str) -> String {
    let lines = text.lines().skip_while(|line| !line.starts_with("//!"));
    let lines: Vec<&str> =
        lines.map_while(|line| line.strip_prefix("//!")).map(str::trim).collect();
    let all = lines.join(" ");
    let end = all.find([':', '.', ';', '(']).unwrap_or(all.len());
    all[..end].trim().to_string()
}

fn rust_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let entries =
            fs::read_dir(&folder).with_context(|| format!("{}: cannot read", folder.display()))?;
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paths::Paths;

    /// Members of lists that QEMU generates from QAPI types.
    const GENERATED: &[&str] = &["next", "value", "id"];

    /// `(*pointer).member` in Rust, not a method.
    fn members_read(tokens: &[String]) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut open = Vec::new();
        for (at, token) in tokens.iter().enumerate() {
            if token == "(" {
                open.push(tokens.get(at + 1).is_some_and(|next| next == "*"));
            }
            let after = |offset: usize| tokens.get(at + offset).map(String::as_str);
            if token == ")"
                && open.pop() == Some(true)
                && after(1) == Some(".")
                && after(3) != Some("(")
            {
                found.extend(after(2).map(str::to_string));
            }
        }
        found
    }

    #[test]
    fn every_member_that_the_extension_uses_is_probed() {
        let ext = Paths::find().unwrap().root.join("qemu-ext");
        let mut used = BTreeSet::new();
        for path in rust_files(&ext.join("src/qemu")).unwrap() {
            let code = code_only(&fs::read_to_string(&path).unwrap()).replace('\'', " ");
            used.extend(members_read(&tokens(&code)));
        }
        let shim =
            tokens(&without_comments(&fs::read_to_string(ext.join("sys/csrc/shim.c")).unwrap()));
        let arrows = shim.windows(3).filter(|three| three[0] == "-" && three[1] == ">");
        used.extend(arrows.map(|three| three[2].clone()));
        assert!(used.len() > 15, "{used:?}");
        used.retain(|name| {
            !MEMBERS.iter().any(|(_, member, _)| member == name)
                && !GENERATED.contains(&name.as_str())
        });
        assert!(used.is_empty(), "add them to MEMBERS in xtask/src/qemu/probe/wanted.rs: {used:?}");
    }

    #[test]
    fn members_are_told_from_methods() {
        let found = members_read(&tokens("(*a).b; (*(*c).d).e(1); (f).g; unsafe { (*h).i.j() }"));
        assert_eq!(found.into_iter().collect::<Vec<_>>(), ["b", "d", "i"]);
    }

    #[test]
    fn arguments_are_counted_at_their_own_depth() {
        for (text, number) in
            [("()", 0), ("(a)", 1), ("(a, b(c, d), [e, f])", 3), ("(a, b,)", 2), ("((a, b))", 1)]
        {
            assert_eq!(arguments(&tokens(text)), number, "{text}");
        }
    }
}
