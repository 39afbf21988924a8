// SPDX-License-Identifier: MIT OR Apache-2.0
//! Cuts this workspace's manifests down to what is built inside QEMU. Works on lines: the manifests
//! are our own, and `cargo metadata` judges the result.

use std::collections::BTreeSet;

/// A manifest without the sections that `drop` names by their headers; comments above a section
/// belong to it.
fn without_sections(text: &str, drop: impl Fn(&str) -> bool) -> String {
    let mut kept = String::new();
    let mut comments = String::new();
    let mut dropping = false;
    for line in text.lines() {
        if line.starts_with('#') || line.trim().is_empty() {
            comments.push_str(line);
            comments.push('\n');
            continue;
        }
        if line.starts_with('[') {
            dropping = drop(line.trim());
        }
        let before = std::mem::take(&mut comments);
        if !dropping {
            kept.push_str(&before);
            kept.push_str(line);
            kept.push('\n');
        }
    }
    kept
}

/// A member's manifest without what only its tests and benchmarks need.
pub(super) fn member(text: &str) -> String {
    without_sections(text, |header| {
        header.contains("dev-dependencies")
            || header.starts_with("[[bench")
            || header.starts_with("[[test")
            || header.contains("cfg(loom)")
    })
}

/// Names that a member takes from the workspace's list of dependencies.
pub(super) fn from_workspace(member: &str) -> BTreeSet<String> {
    member
        .lines()
        .filter_map(|line| {
            let (name, value) = line.split_once('=')?;
            let dotted = name.trim().strip_suffix(".workspace");
            let table = value.contains("workspace = true").then(|| name.trim());
            dotted.or(table).map(str::to_string)
        })
        .collect()
}

/// The workspace's manifest for these members alone.
pub(super) fn workspace(text: &str, members: &[&str], used: &BTreeSet<String>) -> String {
    let text = without_sections(text, |header| header.starts_with("[profile.dev"));
    let mut out = String::new();
    let mut section = String::new();
    let mut in_list = false;
    for line in text.lines() {
        if in_list {
            in_list = !line.starts_with(']');
            continue;
        }
        if line.starts_with('[') {
            section = line.trim().to_string();
        }
        let key = line.split('=').next().unwrap_or_default().trim();
        let opens_list = line.trim_end().ends_with('[');
        if section == "[workspace]" && key == "members" {
            in_list = opens_list;
            out.push_str(&format!("members = {members:?}\n"));
            continue;
        }
        if section == "[workspace]" && key == "default-members" {
            in_list = opens_list;
            // With what the comment above says about it.
            while out.lines().next_back().is_some_and(|above| above.starts_with('#')) {
                let end = out.trim_end().rfind('\n').map_or(0, |end| end + 1);
                out.truncate(end);
            }
            continue;
        }
        let dependency = section == "[workspace.dependencies]" && line.contains('=');
        if dependency && !used.contains(key) {
            continue;
        }
        out.push_str(line);
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_keeps_what_is_built() {
        let text = "[package]\nname = \"a\"\n\n[dependencies]\nb.workspace = true\n\n# Tests.\n\
            [dev-dependencies]\nc.workspace = true\n\n[lib]\nbench = false\n\n[[bench]]\nname = \"x\"\n\
            [target.'cfg(not(loom))'.dev-dependencies]\nc = \"1\"\n\n# Models.\n\
            [target.'cfg(loom)'.dependencies]\nloom.workspace = true\n";
        let kept = member(text);
        assert_eq!(
            kept,
            "[package]\nname = \"a\"\n\n[dependencies]\nb.workspace = true\n\n[lib]\nbench = false\n"
        );
        assert_eq!(from_workspace(&kept), BTreeSet::from(["b".to_string()]));
    }

    #[test]
    fn the_workspace_keeps_its_members_and_their_dependencies() {
        let text = "# Top.\n[workspace]\nresolver = \"3\"\nmembers = [\n    \"a\", \"z\",\n]\n\
            # Why.\ndefault-members = [\n    \"z\",\n]\n\n[workspace.dependencies]\nb = \"1\"\n\
            z = { path = \"z\" }\n\n[profile.release]\npanic = \"unwind\"\n\n# Speed.\n\
            [profile.dev.package.z]\nopt-level = 3\n";
        assert_eq!(
            workspace(text, &["a"], &BTreeSet::from(["b".to_string()])),
            "# Top.\n[workspace]\nresolver = \"3\"\nmembers = [\"a\"]\n\n\
             [workspace.dependencies]\nb = \"1\"\n\n[profile.release]\npanic = \"unwind\"\n"
        );
    }
}
