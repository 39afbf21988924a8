// SPDX-License-Identifier: MIT OR Apache-2.0
//! Backups of a real QEMU by a provider that reads files ([`provider_api::Access::File`]), that commits
//! slowly, or both: what it reads, what becomes of the guest's old data, and what a kill leaves.

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(unreachable_pub, reason = "modules of one test program")]

mod chains;
mod crash;
#[path = "../vm_storages/place.rs"]
#[allow(dead_code, reason = "shared with another test program")]
mod place;
mod provider;
mod scene;
mod slow;

/// Not a test: one backup in a process of its own, which a test kills.
#[test]
fn backup_entry() {
    if let Some(root) = std::env::var_os("VZDUMP_TEST_ROOT") {
        scene::backup_in_child(std::path::Path::new(&root));
    }
}
