// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whole jobs against a scripted QEMU, a scripted guest agent and a scripted provider: the order
//! of the steps, every failure, cancellation, and kill -9 at every step.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(unreachable_pub, reason = "modules of one test program")]

mod aftermath;
mod agent;
mod crash;
mod faults;
mod good;
mod guard;
mod hooks;
mod liars;
mod locked;
mod modes;
mod peer;
mod provider;
mod replace;
mod restore;
mod several;
mod verify;
mod world;

/// Not a test: the freeze guard, when this program is started as one.
#[test]
fn guard_entry() {
    let args: Vec<_> = std::env::args_os().collect();
    // Program, "--exact", "guard_entry", "--nocapture", and the guard's own five.
    if args.len() == 9 {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(vzdump_core::vm::freeze_guard::run_guard(&args[4..]));
        std::process::exit(0);
    }
}

/// Not a test: holds the lock of a pid file as QEMU does, until its input ends.
#[test]
fn pid_holder_entry() {
    if let Some(path) = std::env::var_os("VZDUMP_TEST_PID_FILE") {
        world::hold_pid_file(std::path::Path::new(&path));
    }
}

/// Not a test: one backup in a process of its own, which a test kills.
#[test]
fn backup_entry() {
    if let Some(root) = std::env::var_os("VZDUMP_TEST_ROOT") {
        world::backup_in_child(std::path::Path::new(&root));
    }
}

/// Not a test: one restore in a process of its own, which is killed at a step.
#[test]
fn restore_entry() {
    if let Some(root) = std::env::var_os("VZDUMP_TEST_RESTORE_ROOT") {
        replace::restore_in_child(std::path::Path::new(&root));
    }
}
