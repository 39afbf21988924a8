// SPDX-License-Identifier: MIT OR Apache-2.0
//! Containers of LXC through the program `vzdump`. Needs root, and Debian's packages lxc and
//! busybox-static.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

mod backup;
mod cgroups;
mod debian;
mod directories;
mod fidelity;
mod freezing;
mod power;
mod program;
mod provider;
mod read_errors;
mod replace;
mod restore;
mod scenarios;
mod scene;
mod tools;

use std::os::unix::fs::MetadataExt as _;

use scene::{Scene, wait_for};

fn host_owner(scene: &Scene, id: u32, path: &str) -> u32 {
    std::fs::symlink_metadata(scene.inside(id, path)).unwrap().uid()
}

#[test]
fn containers_are_made_started_and_stopped() {
    let scene = Scene::new();
    scene.create(200, &["--hostname", "web", "--mount", "/srv:32M"]);
    scene.create(201, &["--privileged"]);
    assert_eq!(
        scene.config(200),
        "hostname: web\nunprivileged: 1\nrootfs: local:200/vm-200-disk-0.raw,size=64M\n\
         mp0: local:200/vm-200-disk-1.raw,mp=/srv,backup=1,size=32M\n"
    );
    assert_eq!(scene.leftovers(), [""; 0]);
    for (id, root) in [("200", 100_000), ("201", 0)] {
        let number = id.parse().unwrap();
        assert_eq!(scene.state(number), "stopped");
        scene.run(&["ct", "start", id]);
        assert_eq!(scene.state(number), "running");
        wait_for("the container is up", || scene.inside(number, "/root/up").exists());
        assert_eq!(host_owner(&scene, number, "/root/up"), root);
        let refused = scene.fail(&["ct", "start", id]);
        assert!(refused.contains(&format!("container {id} runs already")), "{refused}");
    }
    wait_for("both volumes are written", || scene.inside(200, "/srv/b").exists());
    // The host's own mounts do not show them.
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains("vm-200-disk"), "{mounts}");
    for id in ["200", "201"] {
        assert_eq!(scene.run(&["ct", "stop", id, "--timeout", "10"])["ran"], true);
        assert_eq!(scene.run(&["ct", "stop", id])["ran"], false);
    }
    wait_for("everything is unmounted", || scene.leftovers().is_empty());
}

#[test]
fn what_cannot_be_made_leaves_nothing() {
    let scene = Scene::new();
    scene.create(200, &[]);
    let template = scene.template.display().to_string();
    let make = ["ct", "create", "200", "--template", &template];
    let said = scene.fail(&make);
    assert!(said.contains("guest 200 exists already"), "{said}");
    let damaged = scene.root.join("damaged.tar");
    std::fs::write(&damaged, [b'x'; 2048]).unwrap();
    let damaged = damaged.display().to_string();
    let said = scene.fail(&["ct", "create", "202", "--template", &damaged, "--size", "64M"]);
    assert!(said.contains("unpack the template"), "{said}");
    let said =
        scene.fail(&["ct", "create", "203", "--template", &template, "--mount", "/../x:32M"]);
    assert!(said.contains("'mp' must be an absolute path"), "{said}");
    for id in ["202", "203"] {
        assert!(!scene.root.join("state/storage/images").join(id).exists());
        assert!(!scene.root.join(format!("etc/lxc/{id}.conf")).exists());
    }
    assert_eq!(scene.leftovers(), [""; 0]);
}

#[test]
fn a_start_that_fails_leaves_nothing_mounted() {
    let scene = Scene::new();
    scene.create(200, &[]);
    let path = scene.root.join("etc/lxc/200.conf");
    let config = scene.config(200);
    for (line, said) in [
        ("future: 1\n", "not known: future"),
        ("mp0: local:200/missing.raw,mp=/srv\n", "does not exist"),
        ("lxc.init.cmd: /missing\n", "Cannot start the container 200"),
    ] {
        std::fs::write(&path, format!("{config}{line}")).unwrap();
        let refused = scene.fail(&["ct", "start", "200"]);
        assert!(refused.contains(said), "{refused}");
        assert_eq!(scene.state(200), "stopped");
        wait_for("everything is unmounted", || scene.leftovers().is_empty());
    }
    std::fs::write(&path, config).unwrap();
    scene.run(&["ct", "start", "200"]);
}
