// SPDX-License-Identifier: MIT OR Apache-2.0
//! Patterns of what is left out, compared with a matcher that is slow and simple, and what is left of trees.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::prelude::*;
use provider_api::{Excludes, Kind, Selection};

/// Whether a pattern leaves a path out, itself or by a directory around it: by trying everything.
fn leaves_out(pattern: &str, path: &[&[u8]], is_directory: bool) -> bool {
    (1..=path.len()).any(|end| {
        let is_directory = is_directory || end < path.len();
        is_about(pattern, &path[..end], is_directory)
    })
}

fn is_about(pattern: &str, path: &[&[u8]], is_directory: bool) -> bool {
    if pattern.ends_with('/') && !is_directory {
        return false;
    }
    let parts: Vec<&str> = pattern.split('/').filter(|part| !part.is_empty()).collect();
    let begins = if pattern.starts_with('/') { 0..1 } else { 0..path.len() };
    begins.into_iter().any(|begin| parts_match(&parts, &path[begin..]))
}

fn parts_match(parts: &[&str], path: &[&[u8]]) -> bool {
    match parts {
        [] => path.is_empty(),
        ["**"] => !path.is_empty(),
        ["**", rest @ ..] => (0..=path.len()).any(|count| parts_match(rest, &path[count..])),
        [part, rest @ ..] => path.split_first().is_some_and(|(name, below)| {
            let pattern: Vec<char> = part.chars().collect();
            name_matches(&pattern, &characters(name)) && parts_match(rest, below)
        }),
    }
}

/// Bytes that are no text are none.
fn characters(name: &[u8]) -> Vec<Option<char>> {
    name.utf8_chunks()
        .flat_map(|chunk| {
            let odd = chunk.invalid().iter().map(|_| None);
            chunk.valid().chars().map(Some).chain(odd).collect::<Vec<_>>()
        })
        .collect()
}

fn name_matches(pattern: &[char], name: &[Option<char>]) -> bool {
    match pattern {
        [] => name.is_empty(),
        ['*', rest @ ..] => (0..=name.len()).any(|count| name_matches(rest, &name[count..])),
        ['?', rest @ ..] => !name.is_empty() && name_matches(rest, &name[1..]),
        ['\\', c, rest @ ..] => name.first() == Some(&Some(*c)) && name_matches(rest, &name[1..]),
        ['[', rest @ ..] => {
            let (wanted, rest) = match rest {
                ['!' | '^', rest @ ..] => (false, rest),
                rest => (true, rest),
            };
            let Some((first, others)) = name.split_first() else { return false };
            let (is_in, rest) = in_brackets(rest, *first);
            is_in == wanted && name_matches(rest, others)
        }
        [c, rest @ ..] => name.first() == Some(&Some(*c)) && name_matches(rest, &name[1..]),
    }
}

/// Whether a character is one of those up to the bracket, and what comes after it.
fn in_brackets(mut rest: &[char], c: Option<char>) -> (bool, &[char]) {
    let (mut is_in, mut is_first) = (false, true);
    let take = |rest: &mut &[char]| {
        let at = usize::from(rest[0] == '\\');
        let c = rest[at];
        *rest = &rest[at + 1..];
        c
    };
    while is_first || rest[0] != ']' {
        is_first = false;
        let low = take(&mut rest);
        let mut high = low;
        if rest[0] == '-' && rest[1] != ']' {
            rest = &rest[1..];
            high = take(&mut rest);
        }
        is_in |= c.is_some_and(|c| low <= c && c <= high);
    }
    (is_in, &rest[1..])
}

fn names() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let piece = prop_oneof![
        5 => Just(&b"a"[..]),
        5 => Just(&b"b"[..]),
        1 => Just(&b"."[..]),
        1 => Just(&b"]"[..]),
        1 => Just("\u{e9}".as_bytes()),
        // The beginning of a character, and a byte that never is part of one.
        1 => Just(&b"\xc3"[..]),
        1 => Just(&b"\xff"[..]),
    ];
    let name = prop::collection::vec(piece, 1..5).prop_map(|pieces| pieces.concat());
    let name = name.prop_filter("directories", |name| name != b"." && name != b"..");
    prop::collection::vec(name, 1..5)
}

fn patterns() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        6 => Just("a"), 4 => Just("b"), 4 => Just("/"), 3 => Just("*"), 2 => Just("?"), 1 => Just("."),
        1 => Just("\u{e9}"), 1 => Just("[!a]"), 1 => Just("[a-b]"), 1 => Just("[]a]"), 1 => Just("[^]\u{e9}]"),
        1 => Just("\\b"), 1 => Just("\\*"), 1 => Just("/**/"), 1 => Just("["), 1 => Just("]"), 1 => Just("-"),
    ];
    prop::collection::vec(piece, 1..7).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_matcher_says_what_the_simple_one_says(
        patterns in prop::collection::vec(patterns(), 1..4),
        path in names(),
        is_directory: bool,
    ) {
        let known: Vec<_> =
            patterns.into_iter().filter(|text| Excludes::parse(&[text]).is_ok()).collect();
        let path: Vec<&[u8]> = path.iter().map(Vec::as_slice).collect();
        let expected = known.iter().any(|pattern| leaves_out(pattern, &path, is_directory));
        let mut reached = Some(Excludes::parse(&known).unwrap().root());
        for (at, name) in path.iter().enumerate() {
            let is_directory = is_directory || at + 1 < path.len();
            reached = reached.and_then(|reached| reached.enter(name, is_directory));
        }
        prop_assert_eq!(reached.is_none(), expected, "{:?}", known);
    }

    #[test]
    fn no_text_makes_it_fail_but_by_an_error(text in "\\PC{0,40}", name in "\\PC{1,20}") {
        if let Ok(excludes) = Excludes::parse(&[text]) {
            let _ = excludes.root().enter(name.as_bytes(), true);
        }
    }
}

#[test]
fn patterns_mean_what_is_documented() {
    let cases: &[(&str, &[&str], &[&str])] = &[
        ("/tmp/?*", &["tmp/x", "tmp/x/y", "tmp/.x"], &["tmp", "tmp/", "a/tmp/x", "tmpx"]),
        ("/var/run/?*.pid", &["var/run/a.pid"], &["var/run/.pid", "var/run/a/b.pid"]),
        ("*.bak", &["x.bak", "a/b/.bak", "a/x.bak/in"], &["x.bakx", "x/bak"]),
        ("cache/x", &["cache/x", "a/cache/x/y"], &["acache/x", "cache/y/x"]),
        ("/a/*/c", &["a/b/c"], &["a/c", "a/b/b/c"]),
        ("/a/**/c", &["a/c", "a/b/c", "a/b/b/c"], &["b/a/c", "a/b"]),
        ("/a/**", &["a/b", "a/b/c"], &["a/", "b"]),
        ("only/", &["only/", "x/only/in"], &["only", "x/only"]),
        ("a//b", &["a/b"], &["a"]),
        ("x[0-9]", &["x1", "a/x9"], &["x", "xa", "x11"]),
        ("[!.]*", &["a", "a/.b"], &[".a"]),
        (r"\*\[", &["*["], &["a[", "*"]),
        ("**", &["a", "b/c"], &[]),
        ("a**b", &["ab", "axxb"], &["a/b"]),
    ];
    for (pattern, out, kept) in cases {
        let excludes = Excludes::parse(&[pattern]).unwrap();
        let is_out = |path: &str| {
            let (around, name) = path.trim_end_matches('/').rsplit_once('/').unwrap_or(("", path));
            let is_directory = path.ends_with('/');
            let around = excludes.directory(Path::new(around));
            let name = name.trim_end_matches('/').as_bytes();
            around.is_none_or(|around| around.enter(name, is_directory).is_none())
        };
        assert!(out.iter().all(|path| is_out(path)), "{pattern} leaves out {out:?}");
        assert!(!kept.iter().any(|path| is_out(path)), "{pattern} keeps {kept:?}");
    }
}

#[test]
fn what_means_nothing_is_refused_and_named() {
    let long = "x".repeat(5000);
    for (pattern, why) in [
        ("", "is empty"),
        ("/", "the root itself"),
        ("a\nb", "line break"),
        ("a\0", "a zero"),
        ("[a", "without a ']'"),
        ("[a/b]", "without a ']'"),
        ("[z-a]", "'z-a'"),
        ("[[:alpha:]]", "named class"),
        ("a\\", "no character after it"),
        ("../a", "'..'"),
        ("a/./b", "'.'"),
        (&long, "longer than"),
    ] {
        let error = Excludes::parse(&["fine", pattern]).unwrap_err();
        assert_eq!(error.kind, Kind::Invalid);
        let shown = &format!("{pattern:?}");
        assert!(error.message.contains(why) && error.message.contains(shown), "{error}");
    }
    assert!(Excludes::parse(&vec!["a"; 1001]).is_err());
}

fn lists(dir: &Path) -> [Vec<PathBuf>; 2] {
    ["selected", "excluded"].map(|name| {
        let text = fs::read(dir.join(name)).unwrap();
        let mut names: Vec<_> = text.split(|byte| *byte == 0).collect();
        assert_eq!(names.pop(), Some(&b""[..]), "each name has an end");
        names.into_iter().map(|name| PathBuf::from(OsStr::from_bytes(name))).collect()
    })
}

/// What `tar` stores of a tree by the lists, as the documentation says.
fn stored(tree: &Path, dir: &Path) -> Vec<Vec<u8>> {
    let mut tar = Command::new("tar");
    tar.args(["--create", "--file=-", "--one-file-system", "--directory"]).arg(tree);
    tar.args(["--null", "--no-verbatim-files-from", "--no-unquote"]);
    tar.arg(format!("--files-from={}", dir.join("selected").display()));
    let made = tar.output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    fs::write(dir.join("tar"), made.stdout).unwrap();
    let mut list = Command::new("tar");
    list.args(["--list", "--quoting-style=literal", "--file"]).arg(dir.join("tar"));
    let listed = list.output().unwrap();
    assert!(listed.status.success());
    let lines = listed.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let mut names: Vec<_> = lines.map(<[u8]>::to_vec).collect();
    names.sort();
    names
}

#[test]
fn what_is_left_of_a_tree_is_listed() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    for name in ["etc/one", "tmp/x", "tmp/d/y", "srv/a/b/c.bak", "srv/a/b/c", "srv/only/in", "z"] {
        let path = tree.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }
    fs::write(tree.join(OsStr::from_bytes(b"srv/\xff*.bak")), "").unwrap();
    fs::write(tree.join("srv/-C"), "").unwrap();
    fs::write(tree.join("srv/other"), "").unwrap();
    // To tar a name like "oA", unless it is told.
    fs::write(tree.join(r"srv/o\101"), "").unwrap();
    std::os::unix::fs::symlink("only", tree.join("srv/link")).unwrap();
    let target = dir.path().join("lists");
    let excludes = Excludes::parse(&["/tmp/?*", "*.bak", "only/", "link/"]).unwrap();
    let counted = Selection::write(&target, &tree, &[], &excludes).unwrap();
    let [selected, excluded] = lists(&target);
    let paths = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
    let (alone, with_all) = ("--no-recursion", "--recursion");
    let kept = [
        &[alone, ".", with_all, "./etc", alone, "./srv"][..],
        &[with_all, "./srv/-C", alone, "./srv/a", "./srv/a/b"],
        &[with_all, "./srv/a/b/c", "./srv/link", r"./srv/o\101", "./srv/other"],
        &[alone, "./tmp"],
        &[with_all, "./z"],
    ];
    assert_eq!(selected, paths(&kept.concat()));
    let mut expected = paths(&["./srv/a/b/c.bak", "./srv/only", "./tmp/d", "./tmp/x"]);
    expected.push(OsStr::from_bytes(b"./srv/\xff*.bak").into());
    expected.sort();
    let mut sorted = excluded;
    sorted.sort();
    assert_eq!((sorted, counted.excluded), (expected, 5));
    let mut expected: Vec<_> = [
        "./",
        "./srv/",
        "./srv/a/",
        "./srv/a/b/",
        "./srv/a/b/c",
        "./srv/-C",
        "./srv/link",
        r"./srv/o\101",
        "./srv/other",
        "./etc/",
        "./etc/one",
        "./tmp/",
        "./z",
    ]
    .map(|name| name.as_bytes().to_vec())
    .into();
    expected.sort();
    assert_eq!(stored(&tree, &target), expected);
}

/// The lists have whole paths, but they are not in memory together.
#[test]
fn a_deep_tree_is_listed_up_to_what_is_left_out_at_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let (tree, target) = (dir.path().join("tree"), dir.path().join("lists"));
    let deep = tree.join(["d"; 1000].join("/"));
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("x.bak"), "").unwrap();
    fs::write(tree.join("d/after"), "").unwrap();
    fs::create_dir_all(tree.join("d/whole/in")).unwrap();
    let excludes = Excludes::parse(&["*.bak"]).unwrap();
    assert_eq!(Selection::write(&target, &tree, &[], &excludes).unwrap().excluded, 1);
    let [selected, _] = lists(&target);
    let (first, rest) = selected.split_at(3);
    assert_eq!(first, ["--no-recursion", ".", "./d"].map(PathBuf::from));
    let (after, chain) = rest.split_at(2);
    assert_eq!(after, ["--recursion", "./d/after"].map(PathBuf::from));
    assert_eq!(chain.len(), 1 + 999 + 2, "{:?}", chain.last());
    let end = ["--recursion", "./d/whole"].map(PathBuf::from);
    assert_eq!(&chain[1000..], &end, "all of it comes right after the directory that it is in");
    assert!(
        chain[1..1000].iter().all(|path| path.components().all(|name| name.as_os_str().len() == 1))
    );
}

#[test]
fn a_walk_ends_when_it_is_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let (tree, target) = (dir.path().join("tree"), dir.path().join("lists"));
    for number in 0..100 {
        fs::create_dir_all(tree.join(format!("{number}/a"))).unwrap();
    }
    let excludes = Excludes::parse(&["*.log"]).unwrap();
    let mut seen = 0;
    let mut watch = || {
        seen += 1;
        if seen < 50 { Ok(()) } else { Err(std::io::Error::other("told to end")) }
    };
    let error = Selection::write_watched(&target, &tree, &[], &excludes, &mut watch).unwrap_err();
    assert_eq!((error.to_string().as_str(), seen), ("told to end", 50));
}

#[test]
fn a_tree_of_which_nothing_is_left_out_is_one_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (tree, target) = (dir.path().join("tree"), dir.path().join("lists"));
    fs::create_dir_all(tree.join("a/b")).unwrap();
    for patterns in [&["/tmp/?*"][..], &["*.bak"], &[]] {
        let excludes = Excludes::parse(patterns).unwrap();
        Selection::write(&target, &tree, &[], &excludes).unwrap();
        assert_eq!(lists(&target), [vec![PathBuf::from("--recursion"), ".".into()], vec![]]);
        fs::remove_dir_all(&target).unwrap();
    }
    // The root stays whatever is left out.
    let excludes = Excludes::parse(&["**"]).unwrap();
    Selection::write(&target, &tree, &[], &excludes).unwrap();
    assert_eq!(
        lists(&target),
        [vec!["--no-recursion".into(), ".".into()], vec![PathBuf::from("./a")]]
    );
}
