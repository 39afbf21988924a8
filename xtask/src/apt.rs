// SPDX-License-Identifier: MIT OR Apache-2.0
//! Debian's apt: packages of this machine, and source packages of any suite through a private apt
//! state, so that the machine's own package lists stay as they are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use crate::run::{Show, Step, output};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// How many versions of a suite are tried.
const MAX_VERSIONS: usize = 4;

/// A Debian source package in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Source {
    /// Version without epoch.
    pub(crate) version: String,
    pub(crate) dsc: PathBuf,
}

/// What to get of a suite: any version of a source package, or only those of one series (`10.2`:
/// 10.2.0, 10.2.1 and so on).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted<'a> {
    pub(crate) name: &'a str,
    pub(crate) suite: &'a str,
    pub(crate) series: Option<&'a str>,
}

impl Wanted<'_> {
    /// The file that names the newest version that is there.
    fn note(&self, dir: &Path) -> PathBuf {
        match self.series {
            None => dir.join("newest"),
            Some(series) => dir.join(format!("newest-{series}")),
        }
    }

    /// Those of the versions that `showsrc` lists which are wanted, the newest first.
    fn versions(&self, showsrc: &str) -> Result<Vec<String>> {
        let mut versions: Vec<String> = Vec::new();
        let listed = showsrc.lines().filter_map(|line| line.strip_prefix("Version:"));
        for version in listed.map(str::trim) {
            if self.series.is_some_and(|series| !is_of_series(version, series)) {
                continue;
            }
            let mut at = 0;
            while at < versions.len() && !is_newer(version, &versions[at])? {
                at += 1;
            }
            if versions.get(at.wrapping_sub(1)).is_none_or(|before| before != version) {
                versions.insert(at, version.to_string());
            }
        }
        Ok(versions)
    }
}

/// Whether a version of Debian, with its epoch, is of an upstream series.
fn is_of_series(version: &str, series: &str) -> bool {
    let upstream = version.split_once(':').map_or(version, |(_, upstream)| upstream);
    upstream
        .strip_prefix(series)
        .is_some_and(|rest| rest.chars().next().is_none_or(|c| !c.is_ascii_digit()))
}

fn is_newer(version: &str, than: &str) -> Result<bool> {
    let status = Command::new("dpkg")
        .args(["--compare-versions", version, "gt", than])
        .status()
        .context("dpkg: cannot start")?;
    Ok(status.success())
}

/// The newest complete source package of that kind among those downloaded into `dir`.
pub(crate) fn downloaded(dir: &Path, wanted: Wanted<'_>) -> Option<Source> {
    let newest = fs::read_to_string(wanted.note(dir)).ok()?;
    let version = newest.trim().to_string();
    let dsc = dir.join(&version).join(format!("{}_{version}.dsc", wanted.name));
    dsc.is_file().then_some(Source { version, dsc })
}

/// Downloads a source package into a folder named by its version in `dir`.
pub(crate) fn download(dir: &Path, wanted: Wanted<'_>, log: &Path) -> Result<Source> {
    fs::create_dir_all(dir).with_context(|| format!("{}: cannot create", dir.display()))?;
    let mut error = anyhow!(
        "no mirror of Debian's main archive in /etc/apt: add one (a line \"deb MIRROR {} main\"), \
         or unpack QEMU's source yourself and give it with --source",
        wanted.suite
    );
    // One mirror may carry only its own suite.
    for mirror in own_mirrors() {
        match download_from(&mirror, dir, wanted, log) {
            Ok(source) => return Ok(source),
            Err(failed) => error = failed,
        }
    }
    Err(error)
}

fn download_from(mirror: &str, dir: &Path, wanted: Wanted<'_>, log: &Path) -> Result<Source> {
    let Wanted { name, suite, .. } = wanted;
    let state = dir.join("apt");
    let _ = fs::remove_dir_all(&state);
    for sub in ["lists/partial", "cache/archives/partial"] {
        let sub = state.join(sub);
        fs::create_dir_all(&sub).with_context(|| format!("{}: cannot create", sub.display()))?;
    }
    let list = state.join("sources.list");
    fs::write(&list, format!("deb-src [signed-by={KEYRING}] {mirror} {suite} main\n"))
        .with_context(|| format!("{}: cannot write", list.display()))?;

    let limit = Duration::from_secs(1200);
    let step = |what: &str, args: &[&str], dir: &Path| {
        let mut apt = private_apt("apt-get", &state, &list);
        apt.args(args).current_dir(dir);
        Step { name: what, log: log.to_path_buf(), show: Show::Progress, limit }.run(apt)
    };
    step(&format!("read Debian's {suite} package list from {mirror}"), &["update"], &state)?;
    let showsrc = output(private_apt("apt-cache", &state, &list).args(["showsrc", name]))?;
    let mut error = match wanted.series {
        None => anyhow!("{suite} offers no source package {name}"),
        Some(series) => anyhow!(
            "{suite} offers no {series} of {name}, only {}",
            Wanted { series: None, ..wanted }.versions(&showsrc)?.join(", ")
        ),
    };
    // A mirror may list what it does not have (yet, or any more).
    for version in wanted.versions(&showsrc)?.iter().take(MAX_VERSIONS) {
        let files = state.join("files");
        let _ = fs::remove_dir_all(&files);
        fs::create_dir(&files).with_context(|| format!("{}: cannot create", files.display()))?;
        let package = format!("{name}={version}");
        let args = ["source", "--download-only", &package];
        match step(&format!("download the source package {package}"), &args, &files) {
            Ok(()) => return keep(&files, dir, &state, wanted),
            Err(failed) => {
                eprintln!("    {mirror} lists {package} but does not have it");
                error = failed;
            }
        }
    }
    Err(error)
}

/// Moves downloaded files to where they stay, and notes their version.
fn keep(files: &Path, dir: &Path, state: &Path, wanted: Wanted<'_>) -> Result<Source> {
    let dsc = only_dsc(files, wanted.name)?;
    let version = dsc_version(&dsc, wanted.name)?;
    let target = dir.join(&version);
    let _ = fs::remove_dir_all(&target);
    fs::rename(files, &target)
        .with_context(|| format!("{}: cannot rename to it", target.display()))?;
    fs::write(wanted.note(dir), format!("{version}\n")).context("cannot note the version")?;
    let _ = fs::remove_dir_all(state);
    downloaded(dir, wanted).context("the downloaded source package vanished")
}

/// A program of apt with lists, cache and sources of its own.
fn private_apt(program: &str, state: &Path, list: &Path) -> Command {
    let mut apt = Command::new(program);
    for option in [
        format!("Dir::Etc::sourcelist={}", list.display()),
        "Dir::Etc::sourceparts=-".into(),
        format!("Dir::State::Lists={}", state.join("lists").display()),
        format!("Dir::Cache={}", state.join("cache").display()),
        "Acquire::Languages=none".into(),
        "Acquire::Retries=3".into(),
        // Root's cache is closed to apt's own user.
        "APT::Sandbox::User=root".into(),
        "APT::Update::Error-Mode=any".into(),
    ] {
        apt.args(["-o", &option]);
    }
    apt.env("LC_ALL", "C.UTF-8");
    apt
}

fn only_dsc(dir: &Path, name: &str) -> Result<PathBuf> {
    let found: Vec<PathBuf> = fs::read_dir(dir)
        .with_context(|| format!("{}: cannot read", dir.display()))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "dsc"))
        .collect();
    match found.as_slice() {
        [one] => Ok(one.clone()),
        _ => bail!("apt-get source {name} left {} .dsc files instead of one", found.len()),
    }
}

fn dsc_version(dsc: &Path, name: &str) -> Result<String> {
    dsc.file_name()
        .and_then(|file| file.to_str())
        .and_then(|file| file.strip_prefix(name)?.strip_prefix('_')?.strip_suffix(".dsc"))
        .map(str::to_string)
        .with_context(|| format!("{}: no version in its name", dsc.display()))
}

/// Unpacks a source package, Debian's patches applied, into the new folder `target`.
pub(crate) fn unpack(source: &Source, target: &Path, log: &Path) -> Result<()> {
    let mut command = Command::new("dpkg-source");
    command.args(["--no-copy", "-x"]).arg(&source.dsc).arg(target);
    Step {
        name: &format!("unpack {}", source.version),
        log: log.to_path_buf(),
        show: Show::Progress,
        limit: Duration::from_secs(1200),
    }
    .run(command)
}

/// The mirrors this machine uses for Debian's main archive, each once.
fn own_mirrors() -> Vec<String> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    files.sort();
    let found = files.iter().filter_map(|file| {
        let text = fs::read_to_string(file).ok()?;
        let deb822 = file.extension().is_some_and(|e| e == "sources");
        if deb822 { mirror_in_stanzas(&text) } else { mirror_in_lines(&text) }
    });
    let mut mirrors: Vec<String> = Vec::new();
    for mirror in found {
        if !mirrors.contains(&mirror) {
            mirrors.push(mirror);
        }
    }
    mirrors
}

/// The mirror of an entry, if it is of Debian's main archive, not of its security archive and not of
/// somebody else's.
fn main_mirror(uri: &str, suite: &str, components: &str) -> Option<String> {
    let has_main = components.split_whitespace().any(|component| component == "main");
    if suite.contains('/') || !has_main {
        return None;
    }
    addresses(uri).into_iter().find(|address| {
        let is_of_web = address.starts_with("http://") || address.starts_with("https://");
        is_of_web && address.trim_end_matches('/').ends_with("/debian")
    })
}

/// What a URI stands for: itself, or the mirrors in a file, as in Debian's cloud images: each line has an
/// address and, after it, options of apt.
fn addresses(uri: &str) -> Vec<String> {
    let Some(path) = uri.strip_prefix("mirror+file:") else { return vec![uri.to_string()] };
    // As in file:///etc, where the host between the slashes is this one.
    let path = path.strip_prefix("//").unwrap_or(path);
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.split_whitespace().next()).map(str::to_string).collect()
}

/// One-line format: `deb [options] URI SUITE COMPONENT…`.
fn mirror_in_lines(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let entry = line.trim().strip_prefix("deb").and_then(|l| {
            l.strip_prefix("-src").or(Some(l)).filter(|l| l.starts_with(char::is_whitespace))
        })?;
        let entry = entry.trim_start();
        let entry = match entry.strip_prefix('[') {
            Some(options) => options.split_once(']')?.1,
            None => entry,
        };
        let mut words = entry.split_whitespace();
        let (uri, suite) = (words.next()?, words.next()?);
        let components: Vec<&str> = words.collect();
        main_mirror(uri, suite, &components.join(" "))
    })
}

/// deb822 format: stanzas of `Field: value`, continued by indented lines, `#` comments.
fn mirror_in_stanzas(text: &str) -> Option<String> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    lines.split(|line| line.trim().is_empty()).find_map(|stanza| {
        let field = |name: &str| {
            let mut value = String::new();
            let mut inside = false;
            for line in stanza {
                if line.starts_with(char::is_whitespace) {
                    if inside {
                        value.push(' ');
                        value.push_str(line.trim());
                    }
                } else if let Some((key, rest)) = line.split_once(':') {
                    inside = key.trim().eq_ignore_ascii_case(name);
                    if inside {
                        value.push_str(rest.trim());
                    }
                }
            }
            value
        };
        if field("Enabled").eq_ignore_ascii_case("no") {
            return None;
        }
        let (suites, components) = (field("Suites"), field("Components"));
        let suite = suites.split_whitespace().next()?;
        field("URIs").split_whitespace().find_map(|uri| main_mirror(uri, suite, &components))
    })
}

/// The packages of `names` that are not installed.
pub(crate) fn missing(names: &[&str]) -> Result<Vec<String>> {
    // dpkg-query's exit code only says that some are unknown: its list is what counts.
    let listed = Command::new("dpkg-query")
        .args(["-W", "-f", "${Package} ${db:Status-Status}\n"])
        .args(names)
        .output()
        .context("dpkg-query: cannot start; only Debian and its derivatives are supported")?;
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let installed =
        |name: &str| listed.lines().any(|line| line.split_once(' ') == Some((name, "installed")));
    Ok(names.iter().filter(|name| !installed(name)).map(ToString::to_string).collect())
}

/// Installs packages of this machine's own suite; reads new package lists only if it has to.
pub(crate) fn install(names: &[String], log: &Path) -> Result<()> {
    let limit = Duration::from_secs(1800);
    let apt_get = |what: &str, args: &[&str], names: &[String]| {
        let mut command = as_root("apt-get")?;
        command.args(["-o", "Acquire::Retries=3", "-o", "DPkg::Lock::Timeout=300"]);
        command.args(args).args(names);
        Step { name: what, log: log.to_path_buf(), show: Show::Progress, limit }.run(command)
    };
    let install = ["install", "-y", "--no-install-recommends"];
    if all_available(names) && apt_get("install packages", &install, names).is_ok() {
        return Ok(());
    }
    apt_get("read new package lists", &["update"], &[])?;
    apt_get("install packages", &install, names)
}

/// Whether the package lists at hand offer all of `names`.
fn all_available(names: &[String]) -> bool {
    names.iter().all(|name| {
        output(Command::new("apt-cache").args(["--quiet", "show", name]))
            .is_ok_and(|text| text.contains("Filename:"))
    })
}

/// A program run as root, through sudo where that is needed.
fn as_root(program: &str) -> Result<Command> {
    let quiet = ("DEBIAN_FRONTEND", "noninteractive");
    if rustix::process::geteuid().is_root() {
        let mut command = Command::new(program);
        command.env(quiet.0, quiet.1).env("LC_ALL", "C.UTF-8");
        return Ok(command);
    }
    if !crate::run::in_path("sudo") {
        bail!(
            "installing packages needs root, and there is no sudo: run `cargo xtask setup` as root"
        );
    }
    let mut command = Command::new("sudo");
    command.args([&format!("{}={}", quiet.0, quiet.1), "LC_ALL=C.UTF-8", program]);
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_mirror_in_one_line_format() {
        let text = "# deb http://old/debian bookworm main\n\
            deb http://security.example.org/debian-security bookworm-security main\n\
            deb https://packages.example.org/apt stable main\n\
            deb [arch=amd64 signed-by=/k.gpg] http://ftp.example.org/pub/debian/ bookworm main contrib\n";
        assert_eq!(mirror_in_lines(text).unwrap(), "http://ftp.example.org/pub/debian/");
        assert_eq!(mirror_in_lines("debug http://a/debian x main\n"), None);
        assert_eq!(mirror_in_lines("deb http://a/debian\n"), None);
        assert_eq!(
            mirror_in_lines("deb-src http://a/debian sid main\n").unwrap(),
            "http://a/debian"
        );
    }

    #[test]
    fn finds_the_mirror_in_deb822_format() {
        let other = "Types: deb\n# comment\nURIs: http://mirror.example.org/debian-security\n\
            Suites: bookworm-security\nComponents: main\n\n";
        let main = "Types: deb\nURIs:\n file:/srv/debian\n http://mirror.example.org/debian\n\
            Suites: bookworm bookworm-updates\nComponents: contrib main\n";
        let found = mirror_in_stanzas(&format!("{other}{main}"));
        assert_eq!(found.unwrap(), "http://mirror.example.org/debian");
        assert_eq!(mirror_in_stanzas(&format!("{other}Enabled: no\n{main}")), None);
        assert_eq!(mirror_in_stanzas("URIs: http://a/debian\nSuites: ./\n"), None);
    }

    #[test]
    fn finds_the_mirror_in_the_list_that_a_source_names() {
        let dir = tempfile::tempdir().unwrap();
        let [list, security] = ["debian.list", "security.list"].map(|name| dir.path().join(name));
        fs::write(&list, "# Debian\n\nhttps://deb.debian.org/debian\tpriority:1\n").unwrap();
        fs::write(&security, "https://deb.debian.org/debian-security\n").unwrap();
        let expected = "https://deb.debian.org/debian";
        for slashes in ["", "//"] {
            let uri = |list: &Path| format!("mirror+file:{slashes}{}", list.display());
            let text =
                format!("Types: deb\nURIs: {}\nSuites: trixie\nComponents: main\n", uri(&list));
            assert_eq!(mirror_in_stanzas(&text).unwrap(), expected);
            let line = format!("deb {} trixie main\n", uri(&list));
            assert_eq!(mirror_in_lines(&line).unwrap(), expected);
            let other = text.replace("debian.list", "security.list");
            assert_eq!(mirror_in_stanzas(&other), None);
            assert_eq!(mirror_in_stanzas(&text.replace("debian.list", "none.list")), None);
        }
    }

    #[test]
    fn versions_are_ordered_and_chosen_by_series() {
        let showsrc = "Package: q\nVersion: 1:10.2.2+ds-1\n\nVersion: 1:11.1.3+ds-1\n\n\
            Version: 1:11.1.2+ds-3\n\nVersion: 1:10.20.1-1\n\nVersion: 1:10.2.2+ds-1\n";
        let versions =
            |series| Wanted { name: "q", suite: "sid", series }.versions(showsrc).unwrap();
        assert_eq!(
            versions(None),
            ["1:11.1.3+ds-1", "1:11.1.2+ds-3", "1:10.20.1-1", "1:10.2.2+ds-1"]
        );
        assert_eq!(versions(Some("10.2")), ["1:10.2.2+ds-1"]);
        assert_eq!(versions(Some("11")), ["1:11.1.3+ds-1", "1:11.1.2+ds-3"]);
        assert_eq!(versions(Some("1")), [""; 0]);
    }

    #[test]
    fn reads_the_version_from_the_name() {
        let dsc = Path::new("/x/qemu_10.0.13+ds-0+deb13u1.dsc");
        assert_eq!(dsc_version(dsc, "qemu").unwrap(), "10.0.13+ds-0+deb13u1");
        assert!(dsc_version(dsc, "other").is_err());
    }

    #[test]
    fn only_complete_downloads_count() {
        let dir = tempfile::tempdir().unwrap();
        let wanted = Wanted { name: "qemu", suite: "sid", series: None };
        assert_eq!(downloaded(dir.path(), wanted), None);
        fs::write(dir.path().join("newest"), "1.0\n").unwrap();
        assert_eq!(downloaded(dir.path(), wanted), None);
        fs::create_dir(dir.path().join("1.0")).unwrap();
        fs::write(dir.path().join("1.0/qemu_1.0.dsc"), "").unwrap();
        assert_eq!(downloaded(dir.path(), wanted).unwrap().version, "1.0");
    }
}
