// SPDX-License-Identifier: MIT OR Apache-2.0
//! The probes on a tree made up from what they want, and on the tree that was built, if one was:
//! all hold, and each planted difference is named.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::*;
use crate::paths::Paths;

fn ext() -> PathBuf {
    Paths::find().unwrap().root.join("qemu-ext")
}

/// Names of the probes that fail on a tree.
fn failed(tree: &Path) -> Vec<String> {
    let report = check(&ext(), tree).unwrap();
    assert!(report.rows.len() > 150, "{} probes", report.rows.len());
    report.rows.into_iter().filter(|row| row.failure.is_some()).map(|row| row.name).collect()
}

/// The parameter list of a function with so many.
fn list(number: usize) -> String {
    let names: Vec<String> = (0..number).map(|index| format!("int a{index}")).collect();
    if names.is_empty() { "void".into() } else { names.join(", ") }
}

/// The text before a hunk is applied.
fn before(hunk: &str) -> String {
    let lines = hunk.lines().skip_while(|line| !line.starts_with("@@"));
    lines
        .skip(1)
        .filter_map(|line| line.strip_prefix(' '))
        .map(|line| format!("{line}\n"))
        .collect()
}

/// Files of a tree in which every probe holds.
fn satisfying() -> BTreeMap<String, String> {
    let mut files: BTreeMap<String, String> = BTreeMap::new();
    let mut structures: BTreeMap<&str, String> = BTreeMap::new();
    let mut typed: BTreeMap<String, (usize, &str)> = BTreeMap::new();
    let probes = wanted::read(&ext()).unwrap();
    for probe in &probes {
        if let Want::Parameter { callback, index, types, .. } = &probe.want {
            typed.insert((*callback).to_string(), (*index, types[0]));
        }
    }
    let mut declarations = String::new();
    for probe in &probes {
        match &probe.want {
            Want::Anchor { file, hunk } => {
                files.entry(file.clone()).or_default().insert_str(0, &before(hunk));
            }
            Want::Line { file, text } => {
                files.entry((*file).to_string()).or_default().push_str(&format!("{text}\n"));
            }
            Want::Header { names } => {
                files.insert(format!("include/{}", names[0]), String::new());
            }
            Want::Function { name, arguments } => {
                let list = list(arguments.unwrap_or(1));
                declarations.push_str(&format!("int {name}({list});\n"));
            }
            Want::Name { name } => declarations.push_str(&format!("typedef int {name};\n")),
            Want::Member { structure, name } => {
                structures.entry(structure).or_default().push_str(&format!("int {name};\n"));
            }
            Want::Callback { structure, name, parameters } => {
                let mut list: Vec<String> =
                    (0..*parameters).map(|index| format!("int a{index}")).collect();
                if let Some((index, type_)) = typed.get(name) {
                    list[*index] = format!("{type_} mode");
                }
                let member = format!("int (*{name})({});\n", list.join(", "));
                structures.entry(structure).or_default().push_str(&member);
            }
            Want::Parameter { .. } => {}
            Want::Qapi { kind, name } => {
                files
                    .entry("qapi/some.json".into())
                    .or_default()
                    .push_str(&format!("{{ '{kind}': '{name}' }}\n"));
            }
        }
    }
    for (name, body) in structures {
        declarations.push_str(&format!("struct {name} {{\n{body}}};\n"));
    }
    // Reached by an include only.
    files.insert("include/block/all.h".into(), declarations);
    files.insert("include/block/block.h".into(), "#include \"block/all.h\"\n".into());
    files
}

fn write_tree(files: &BTreeMap<String, String>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    dir
}

/// Differences between QEMU versions as they happen: file, what is replaced, by what, and the probe
/// that must say so.
const PLANTED: &[(&str, &str, &str, &str)] = &[
    ("include/block/all.h", "int bdrv_replace_node(", "int bdrv_swap_node(", "bdrv_replace_node"),
    ("include/block/all.h", "int bdrv_open(int a0, ", "int bdrv_open(", "bdrv_open"),
    ("include/block/all.h", "typedef int BDRV_REQ_FUA;", "", "BDRV_REQ_FUA"),
    ("include/block/all.h", "int frozen;", "int immobile;", "BdrvChild.frozen"),
    ("include/block/all.h", "(*bdrv_drain_begin)", "(*bdrv_drain)", "BlockDriver.bdrv_drain_begin"),
    (
        "include/block/all.h",
        "(*bdrv_co_pdiscard)(",
        "(*bdrv_co_pdiscard)(int a, ",
        "BlockDriver.bdrv_co_pdiscard",
    ),
    ("include/block/all.h", "bool mode", "Mode mode", "BlockDriver.bdrv_co_block_status #2"),
    ("qapi/some.json", "query-block-exports", "query-exports", "command query-block-exports"),
    ("qapi/meson.build", "'authz',", "'other',", "qapi/meson.build"),
    ("qapi/pragma.json", "true", "false", "qapi/pragma.json: 'doc-required': true"),
];

#[test]
fn a_tree_with_everything_passes() {
    let tree = write_tree(&satisfying());
    assert_eq!(failed(tree.path()), [""; 0]);
}

#[test]
fn each_planted_difference_is_named() {
    let files = satisfying();
    for (file, from, to, probe) in PLANTED {
        let mut changed = files.clone();
        let text = changed.get_mut(*file).unwrap();
        assert!(text.contains(from), "{file} has no {from}");
        *text = text.replace(from, to);
        assert_eq!(failed(write_tree(&changed).path()), [*probe], "{from} -> {to}");
    }
}

#[test]
fn a_missing_header_is_named_with_its_alternatives() {
    let mut files = satisfying();
    files.remove("include/system/block-backend.h").unwrap();
    let tree = write_tree(&files);
    assert_eq!(failed(tree.path()), ["system/block-backend.h or sysemu/block-backend.h"]);
    fs::create_dir(tree.path().join("include/sysemu")).unwrap();
    fs::write(tree.path().join("include/sysemu/block-backend.h"), "").unwrap();
    assert_eq!(failed(tree.path()), [""; 0]);
}

#[test]
fn only_the_whole_patch_counts_as_applied() {
    let tree = write_tree(&satisfying());
    assert!(!is_patched(&ext(), tree.path()).unwrap());
    assert!(!is_patched(&ext(), &tree.path().join("nowhere")).unwrap());
    let patch = Command::new("patch")
        .args(["-p1", "--silent", "-i"])
        .arg(ext().join("meson/qemu.patch"))
        .current_dir(tree.path())
        .status();
    assert!(patch.unwrap().success());
    assert!(is_patched(&ext(), tree.path()).unwrap());
    // What an older patch did not change, and what it had otherwise.
    for (file, from, to) in [
        ("nbd/server.c", "client->quiescing = blk_in_drain", "client->other = blk_in_drain"),
        ("meson.build", "build_always_stale: true", "build_always_stale: false"),
    ] {
        let path = tree.path().join(file);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{file}");
        fs::write(&path, text.replace(from, to)).unwrap();
        let error = format!("{:#}", is_patched(&ext(), tree.path()).unwrap_err());
        assert!(error.contains(&format!("leaves them are {file}. Start from")), "{error}");
        assert!(judge(&ext(), tree.path(), Show::Failed, true).is_err());
        fs::write(&path, text).unwrap();
    }
}

#[test]
fn an_empty_folder_fails_everything() {
    let dir = tempfile::tempdir().unwrap();
    let report = check(&ext(), dir.path()).unwrap();
    assert_eq!(report.failed(), report.rows.len());
    assert!(report.verdict(dir.path()).is_err());
    let table = report.table(Show::Failed);
    assert!(table.contains("FAILED  function") && table.contains("bdrv_open"), "{table}");
}

/// The folders with trees that `cargo xtask qemu` has built for this checkout.
fn built_trees() -> Vec<PathBuf> {
    let target = Paths::find().unwrap().root.join("target");
    let notes =
        ["qemu", "qemu-sid", "qemu-sid-10.2"].map(|name| target.join(name).join("build-env"));
    let trees = notes.iter().filter_map(|note| fs::read_to_string(note).ok()).filter_map(|text| {
        text.lines().find_map(|line| line.strip_prefix("QEMU_SRC=")).map(PathBuf::from)
    });
    trees.filter(|tree| tree.is_dir()).collect()
}

#[test]
fn real_trees_have_everything_and_show_a_difference() {
    let trees = built_trees();
    if trees.is_empty() {
        eprintln!("not run: no QEMU is built in this checkout (./x qemu)");
    }
    for tree in trees {
        assert_eq!(failed(&tree), [""; 0], "{}", tree.display());
        // A copy of what the probes read.
        let dir = tempfile::tempdir().unwrap();
        for part in ["include", "qapi", "meson.build", "storage-daemon/qapi", "nbd/server.c"] {
            let to = dir.path().join(part);
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            let copied = Command::new("cp").arg("-R").arg(tree.join(part)).arg(&to).status();
            assert!(copied.unwrap().success(), "{part}");
        }
        let header = dir.path().join("include/block/block_int-common.h");
        let text = fs::read_to_string(&header).unwrap();
        for (from, to, probe) in [
            (
                "(*bdrv_drain_begin)(",
                "(*bdrv_drain_begin)(int why, ",
                "BlockDriver.bdrv_drain_begin",
            ),
            ("stay_at_node;", "stays;", "BdrvChildClass.stay_at_node"),
        ] {
            assert!(text.contains(from), "{from}");
            fs::write(&header, text.replace(from, to)).unwrap();
            assert_eq!(failed(dir.path()), [probe], "{}", tree.display());
        }
    }
}
