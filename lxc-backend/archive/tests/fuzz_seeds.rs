// SPDX-License-Identifier: MIT OR Apache-2.0
//! The fuzz target of this crate on its seeds.
#![allow(unreachable_pub, reason = "the files are part of another crate, too")]

#[path = "../../../fuzz/src/archive.rs"]
mod archive;
#[path = "../../../fuzz/src/seeds.rs"]
mod seeds;

use std::path::Path;

#[test]
fn archive() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    seeds::run(&top, "ct_archive", archive::archive);
}
