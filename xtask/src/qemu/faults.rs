// SPDX-License-Identifier: MIT OR Apache-2.0
//! A storage daemon for the tests alone: the extension with its feature `fault-injection`, linked
//! with everything else of the daemon that ninja has just built.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::build::for_build_sh;
use super::install::{copy_stripped, create_dir, identity};
use super::tree::Tree;
use crate::paths::Paths;
use crate::run::{Show, Step, output};

/// As ninja names them.
const DAEMON: &str = "storage-daemon/qemu-storage-daemon";
const LIBRARY: &str = "libqemu_ext.a";

/// Makes target/qemu/faults/qemu-storage-daemon current.
pub(crate) fn make(paths: &Paths, tree: &Tree) -> Result<()> {
    let dir = paths.qemu().join("faults");
    create_dir(&dir)?;
    let library = dir.join(LIBRARY);
    compile(paths, tree, &library)?;
    let daemon = dir.join("qemu-storage-daemon");
    let note = dir.join("linked");
    // The ordinary daemon is linked again whenever anything of it changes.
    let made_from = identity(&tree.build().join(DAEMON), &tree.name())?
        + &identity(&library, &library.display().to_string())?;
    if daemon.is_file() && fs::read_to_string(&note).is_ok_and(|old| old == made_from) {
        return Ok(());
    }
    let linked = dir.join("unstripped");
    let mut commands = Command::new("ninja");
    commands.arg("-C").arg(tree.build()).args(["-t", "commands", "-s", DAEMON]);
    let command = link_command(&output(&mut commands)?, &library, &linked)?;
    let mut link = Command::new("sh");
    link.args(["-c", &command]).current_dir(tree.build());
    step(paths, "link the storage daemon with faults", "qemu-faults-link").run(link)?;
    copy_stripped(&linked, &daemon)?;
    fs::remove_file(&linked).with_context(|| format!("{}: cannot remove", linked.display()))?;
    fs::write(&note, made_from).with_context(|| format!("{}: cannot write", note.display()))
}

/// In the same cargo target folder as the library without faults, so that all it depends on is
/// there. The next build without them puts its own library back in place.
fn compile(paths: &Paths, tree: &Tree, library: &Path) -> Result<()> {
    let mut command = Command::new("sh");
    command.arg(paths.root.join("qemu-ext/meson/build.sh"));
    command.arg(tree.src()).arg(tree.build()).arg(library);
    for_build_sh(&mut command, paths, tree);
    command.env("QEMU_EXT_FEATURES", "fault-injection");
    step(paths, "build the extension with faults", "qemu-faults").run(command)
}

fn step<'a>(paths: &Paths, name: &'a str, log: &str) -> Step<'a> {
    Step {
        name,
        log: paths.logs().join(format!("{log}.log")),
        show: Show::Progress,
        limit: Duration::from_secs(1800),
    }
}

/// The command that links the daemon, from ninja's answer, for another library and another output.
fn link_command(commands: &str, library: &Path, output: &Path) -> Result<String> {
    let Some(link) = commands.lines().rfind(|line| !line.trim().is_empty()) else {
        bail!("ninja knows no command for {DAEMON}");
    };
    let quote = |path: &Path| format!("'{}'", path.display().to_string().replace('\'', r"'\''"));
    let (mut libraries, mut outputs) = (0, 0);
    let words = link.split(' ').map(|word| match word {
        LIBRARY => {
            libraries += 1;
            quote(library)
        }
        DAEMON => {
            outputs += 1;
            quote(output)
        }
        other => other.to_owned(),
    });
    let command: Vec<String> = words.collect();
    if libraries == 0 || outputs != 1 {
        bail!("not the command that links {DAEMON}: {link}");
    }
    Ok(command.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_link_gets_another_library_and_another_output() {
        let commands = "cc -c a.c\ncc -m64  -o storage-daemon/qemu-storage-daemon \
            storage-daemon/qemu-storage-daemon.p/a.o -Wl,--start-group libblock.a libqemu_ext.a \
            -Wl,--end-group\n";
        let link = |commands| link_command(commands, Path::new("/it's/l.a"), Path::new("/o"));
        assert_eq!(
            link(commands).unwrap(),
            "cc -m64  -o '/o' storage-daemon/qemu-storage-daemon.p/a.o -Wl,--start-group \
             libblock.a '/it'\\''s/l.a' -Wl,--end-group"
        );
        assert!(link("cc -c a.c").is_err());
        assert!(link("").is_err());
    }
}
