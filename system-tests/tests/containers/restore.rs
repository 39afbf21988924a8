// SPDX-License-Identifier: MIT OR Apache-2.0
//! Restores of containers, also from archives that mean harm.

use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::time::Instant;

use lxc_backend::restore::{CtRestoreOptions, restore_container};
use provider_api::Identity;
use tokio_util::sync::CancellationToken;
use vzdump_core::guest::BackupMode;
use vzdump_core::restore::RestoreReport;
use vzdump_core::storage::ImageFormat;

use crate::backup::{Lines, back_up, provider};
use crate::fidelity::Mounted;
use crate::provider::TarProvider;
use crate::scene::{Scene, wait_for};

pub(crate) fn restore(
    scene: &Scene,
    provider: &TarProvider,
    archive: &str,
    id: u32,
    options: &CtRestoreOptions,
) -> (RestoreReport, String) {
    scene.expect(id);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (lines, cancel) = (Lines::default(), CancellationToken::new());
    let ctx = scene.context(provider);
    let job = restore_container(&ctx, provider, archive, id, options, &lines, &cancel);
    let report = runtime.block_on(job);
    (report, lines.text())
}

#[test]
fn a_container_comes_back_and_starts() {
    let scene = Scene::new();
    scene.create(200, &["--hostname", "web", "--mount", "/srv:32M"]);
    scene.run(&["ct", "start", "200"]);
    wait_for("both volumes are written", || scene.inside(200, "/srv/b").exists());
    // For ids of the host that the container has none for.
    let mut acl = std::process::Command::new("setfacl");
    acl.args(["-m", "u:5:r,g:5:r,g:6:rw"]).arg(scene.inside(200, "/root/up"));
    assert!(acl.status().unwrap().success());
    let provider = provider(&scene, Identity::MappedRoot);
    let (report, log) = back_up(&scene, 200, BackupMode::Stop, &provider);
    let archive = report.archive.unwrap_or_else(|| panic!("{log}"));
    scene.run(&["ct", "stop", "200", "--now"]);
    let options = CtRestoreOptions { start: true, ..CtRestoreOptions::default() };
    let (report, log) = restore(&scene, &provider, &archive, 300, &options);
    assert_eq!(report.error, None, "{log}");
    assert!(log.contains("left out: lines of access control lists for ids"), "{log}");
    assert_eq!(
        scene.config(300),
        scene.config(200).replace("200", "300"),
        "the same with its own volumes"
    );
    assert_eq!(scene.state(300), "running");
    let owner = std::fs::symlink_metadata(scene.inside(300, "/bin/busybox")).unwrap().uid();
    assert_eq!(owner, 100_000);
    let proc = scene.inside(300, "").with_file_name("mounts");
    let mounts = std::fs::read_to_string(proc).unwrap();
    assert!(mounts.contains(" /srv "), "{mounts}");
    scene.run(&["ct", "stop", "300", "--now"]);
    wait_for("nothing is left", || scene.leftovers().is_empty());
}

const CONFIG: &str = "hostname: web\nrootfs: local:200/vm-200-disk-0.raw,size=64M\n";

/// A tar archive with one member, by header fields.
pub(crate) fn tar_of(scene: &Scene, name: &str, members: &[(&str, u8, &str, &[u8])]) -> PathBuf {
    let mut bytes = Vec::new();
    for (path, kind, link, data) in members {
        let mut header = [0_u8; 512];
        header[..path.len()].copy_from_slice(path.as_bytes());
        header[100..108].copy_from_slice(b"0004755\0");
        header[108..116].copy_from_slice(b"0000000\0");
        header[116..124].copy_from_slice(b"0000000\0");
        header[124..136].copy_from_slice(format!("{:011o}\0", data.len()).as_bytes());
        header[136..148].copy_from_slice(b"00000000000\0");
        header[148..156].copy_from_slice(b"        ");
        header[156] = *kind;
        header[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header[257..265].copy_from_slice(b"ustar\x0000");
        header[329..337].copy_from_slice(b"0000007\0");
        header[337..345].copy_from_slice(b"0000000\0");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        bytes.extend(header);
        bytes.extend(*data);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    bytes.resize(bytes.len() + 1024, 0);
    let path = scene.root.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// What an archive cannot do, it cannot do whatever it says. All of its files have the bit setuid.
#[test]
fn archives_that_mean_harm_72_are_refused_or_contained() {
    let scene = Scene::new();
    let provider = provider(&scene, Identity::MappedRoot);
    let unprivileged = format!("{CONFIG}unprivileged: 1\n");
    let outside = scene.root.join("outside");
    std::fs::create_dir(&outside).unwrap();
    let outside_name = outside.display().to_string();
    let through = format!("{outside_name}/file");
    let absolute = tar_of(&scene, "absolute.tar", &[(&through, b'0', "", b"harm")]);
    let link = tar_of(
        &scene,
        "link.tar",
        &[("way", b'2', &outside_name, b""), ("way/file", b'0', "", b"harm")],
    );
    let upwards = tar_of(&scene, "up.tar", &[("../../../../../tmp/vzct-harm", b'0', "", b"harm")]);
    let device = tar_of(&scene, "device.tar", &[("./disk", b'4', "", b"")]);
    let empty = tar_of(&scene, "empty.tar", &[]);
    let twice =
        tar_of(&scene, "twice.tar", &[("a", b'0', "", b"first"), ("a", b'0', "", b"second")]);
    let hard = tar_of(&scene, "hard.tar", &[("a", b'1', &through[1..], b"")]);
    let volumes = tar_of(&scene, "volumes.tar", &[("a", b'M', "", b"the rest of it")]);
    let label = tar_of(&scene, "label.tar", &[("a", b'V', "", b""), ("../b", b'0', "", b"harm")]);
    let bomb = tar_of(&scene, "bomb.tar", &[("./big", b'0', "", &vec![7; 80 << 20])]);
    // As large as the volume, whose file system takes a part of that.
    let full = tar_of(&scene, "full.tar", &[("./big", b'0', "", &vec![7; 63 << 20])]);
    let good = scene.template.clone();
    let default = CtRestoreOptions::default();
    let cases: [(&str, &str, &PathBuf, Option<&str>); 13] = [
        // Of few files, none of which is a program for the administrator: restored for what it is.
        ("absolute", &unprivileged, &absolute, None),
        ("volumes", &unprivileged, &volumes, Some("continued from another archive")),
        ("label", &unprivileged, &label, Some("leads upwards")),
        ("link", &unprivileged, &link, Some("no directory, but a link")),
        ("upwards", &unprivileged, &upwards, Some("leads upwards")),
        ("device", &unprivileged, &device, Some("must not have")),
        ("empty", &unprivileged, &empty, Some("holds no files")),
        ("twice", &unprivileged, &twice, Some("there twice")),
        ("hard", &unprivileged, &hard, Some("is not there yet")),
        ("bomb", &unprivileged, &bomb, Some("bytes of data with './big'. The volumes")),
        ("full", &unprivileged, &full, Some("on device (os error 28). The volumes")),
        ("privileged", CONFIG, &good, Some("Use --privileged")),
        ("no-size", "rootfs: local:200/a.raw\nunprivileged: 1\n", &good, Some("has no size")),
    ];
    for (name, config, tar, refused) in cases {
        provider.plant(name, config, tar);
        let (report, log) = restore(&scene, &provider, name, 300, &default);
        match (&report.error, refused) {
            (Some(error), Some(why)) => assert!(error.contains(why), "{name}: {error}"),
            (None, None) => {}
            (error, _) => panic!("{name}: {error:?}\n{log}"),
        }
        assert!(std::fs::read_dir(&outside).unwrap().next().is_none(), "{name}: outside");
        assert!(!std::path::Path::new("/tmp/vzct-harm").exists(), "{name}");
        if refused.is_none() {
            wait_for("the image is free", || scene.leftovers().is_empty());
            let image = scene.root.join("state/storage/images/300/vm-300-disk-0.raw");
            let mounted = Mounted::new(&image, &scene.root.join("look"));
            let meta = mounted.0.join(&through[1..]).symlink_metadata().unwrap();
            assert_eq!((meta.uid(), meta.mode() & 0o7777), (100_000, 0o4755), "only its own root");
        }
        if refused.is_some() {
            assert!(!scene.root.join("state/storage/images/300").exists(), "{name}: {log}");
            assert!(!scene.root.join("etc/lxc/300.conf").exists(), "{name}");
        }
        let _ = std::fs::remove_file(scene.root.join("etc/lxc/300.conf"));
        let _ = std::fs::remove_dir_all(scene.root.join("state/storage/images/300"));
        assert_eq!(scene.leftovers(), [""; 0], "{name}");
    }
    let trusted = CtRestoreOptions { privileged: true, ..CtRestoreOptions::default() };
    let (report, log) = restore(&scene, &provider, "privileged", 300, &trusted);
    assert_eq!(report.error, None, "{log}");
    scene.run(&["ct", "start", "300"]);
    wait_for("the container is up", || scene.inside(300, "/root/up").exists());
}

#[test]
fn a_format_that_a_storage_does_not_have_is_refused_and_a_rate_is_kept() {
    let scene = Scene::new();
    let provider = provider(&scene, Identity::MappedRoot);
    provider.plant("good", &format!("{CONFIG}unprivileged: 1\n"), &scene.template);
    for (format, why) in
        [(ImageFormat::Subvol, "has no subvolumes"), (ImageFormat::Qcow2, "cannot be 'qcow2'")]
    {
        let options = CtRestoreOptions { format: Some(format), ..CtRestoreOptions::default() };
        let (report, log) = restore(&scene, &provider, "good", 300, &options);
        assert!(report.error.as_ref().is_some_and(|error| error.contains(why)), "{format}: {log}");
    }
    let rate = 1 << 20;
    let options = CtRestoreOptions { limit_bytes_per_s: Some(rate), ..CtRestoreOptions::default() };
    let start = Instant::now();
    let (report, log) = restore(&scene, &provider, "good", 300, &options);
    let took_s = start.elapsed().as_secs_f64();
    assert_eq!(report.error, None, "{log}");
    let least_s = std::fs::metadata(&scene.template).unwrap().len() as f64 / rate as f64 - 0.2;
    assert!(took_s >= least_s, "{took_s} s, but {least_s} s are the least: {log}");
}
