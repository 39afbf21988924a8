// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which of our crates may depend on which: the layers of the architecture.

use anyhow::{Context, Result};
use serde::Deserialize;

use super::Rule;

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    kind: Option<String>,
    path: Option<String>,
}

/// Code that is linked into QEMU: nothing else may use it.
const INSIDE_QEMU: &[&str] = &["qemu-ext", "qemu-ext-sys", "fleece"];
/// Programs and tests: nothing depends on them.
const TOP: &[&str] = &["vzdump", "system-tests", "benches", "xtask"];

/// What a crate may depend on.
enum Allowed {
    /// These of our crates.
    Only(&'static [&'static str]),
    /// Everything outside QEMU that is not itself at the top.
    Outside,
}

/// The table; a crate that is not in it has no place in the architecture yet.
fn allowed(name: &str) -> Option<Allowed> {
    use Allowed::{Only, Outside};
    Some(match name {
        "fleece" | "qemu-ext-sys" | "qmp-client" | "provider-api" | "provider-nbd"
        | "ct-archive" | "xtask" => Only(&[]),
        "qemu-ext" => Only(&["fleece", "qemu-ext-sys"]),
        "provider-rpc" => Only(&["provider-api"]),
        "vzdump-core" => Only(&["qmp-client", "provider-api", "provider-nbd"]),
        "lxc-backend" => Only(&["vzdump-core", "provider-api", "ct-archive"]),
        "vzdump-host" | "system-tests" | "benches" => Outside,
        "vzdump" => Only(&["vzdump-host"]),
        _ if name.starts_with("provider-") => Only(&["provider-api", "provider-nbd"]),
        _ => return None,
    })
}

fn may_use(user: &str, used: &str) -> bool {
    match allowed(user) {
        None => false,
        Some(Allowed::Only(names)) => names.contains(&used),
        Some(Allowed::Outside) => !INSIDE_QEMU.contains(&used) && !TOP.contains(&used),
    }
}

/// Checks the output of `cargo metadata --no-deps`.
pub(super) fn check(metadata: &str) -> Result<Vec<Rule>> {
    let metadata: Metadata =
        serde_json::from_str(metadata).context("cargo metadata printed something unexpected")?;
    let mut unknown = Vec::new();
    let mut layers = Vec::new();
    let mut border = Vec::new();
    for package in &metadata.packages {
        let user = &package.name;
        if allowed(user).is_none() {
            unknown.push(format!("{user}: give it a line in xtask/src/tidy/deps.rs"));
            continue;
        }
        for dependency in package.dependencies.iter().filter(|d| d.path.is_some()) {
            let used = &dependency.name;
            let inside = INSIDE_QEMU.contains(&used.as_str());
            if inside && !INSIDE_QEMU.contains(&user.as_str()) {
                border.push(format!("{user} depends on {used}, which is QEMU's side"));
            } else if dependency.kind.as_deref() != Some("dev") && !may_use(user, used) {
                // Tests may reach across layers, but never across the border above.
                layers.push(format!("{user} must not depend on {used}"));
            }
        }
    }
    Ok(vec![
        Rule { name: "every crate has a place in the architecture", broken: unknown },
        Rule { name: "crates depend only on the layers below them", broken: layers },
        Rule { name: "nothing outside QEMU depends on code inside it", broken: border },
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The broken rules for one crate that depends on another.
    fn broken(user: &str, used: &str, kind: &str) -> Vec<&'static str> {
        let kind = if kind.is_empty() { "null".into() } else { format!("{kind:?}") };
        let metadata = format!(
            r#"{{"packages": [{{"name": {user:?}, "dependencies": [
                {{"name": {used:?}, "kind": {kind}, "path": "/x"}},
                {{"name": "serde", "kind": null, "path": null}}]}}]}}"#
        );
        check(&metadata)
            .unwrap()
            .into_iter()
            .filter(|rule| !rule.broken.is_empty())
            .map(|rule| rule.name)
            .collect()
    }

    #[test]
    fn the_architecture_s_own_edges_are_allowed() {
        for (user, used) in [
            ("qemu-ext", "fleece"),
            ("provider-directory", "provider-nbd"),
            ("vzdump-core", "qmp-client"),
            ("vzdump-host", "provider-directory"),
            ("vzdump", "vzdump-host"),
            ("system-tests", "qmp-client"),
        ] {
            assert_eq!(broken(user, used, ""), [""; 0], "{user} -> {used}");
        }
    }

    #[test]
    fn edges_upwards_are_refused() {
        for (user, used) in [
            ("vzdump", "vzdump-core"),
            ("vzdump-core", "provider-directory"),
            ("provider-rpc", "provider-nbd"),
            ("provider-api", "provider-nbd"),
            ("vzdump-host", "vzdump"),
        ] {
            assert_eq!(broken(user, used, "").len(), 1, "{user} -> {used}");
            assert_eq!(broken(user, used, "build").len(), 1, "{user} -> {used}");
            assert_eq!(broken(user, used, "dev").len(), 0, "{user} -> {used}");
        }
    }

    #[test]
    fn the_border_to_qemu_holds_for_tests_too() {
        assert_eq!(
            broken("system-tests", "fleece", "dev"),
            ["nothing outside QEMU depends on code inside it"]
        );
    }

    #[test]
    fn an_unknown_crate_is_named() {
        assert_eq!(broken("surprise", "fleece", "").len(), 1);
    }
}
