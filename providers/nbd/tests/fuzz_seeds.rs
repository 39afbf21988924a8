// SPDX-License-Identifier: MIT OR Apache-2.0
//! The fuzz targets of this crate on their seeds.
#![allow(unreachable_pub, reason = "the files are part of another crate, too")]

#[path = "../../../fuzz/src/ends.rs"]
mod ends;
#[path = "../../../fuzz/src/nbd.rs"]
mod nbd;
#[path = "../../../fuzz/src/seeds.rs"]
mod seeds;

use std::path::Path;

fn run(target: &str, body: fn(&[u8])) {
    seeds::run(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."), target, body);
}

#[test]
fn wire() {
    run("nbd_wire", nbd::wire);
}

#[test]
fn client() {
    run("nbd_client", nbd::client);
}
