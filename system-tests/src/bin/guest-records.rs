// SPDX-License-Identifier: MIT OR Apache-2.0
//! Writes and checks numbered records on a pair of disks; runs on the host and in the guest.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    system_tests::records::program::run(&arguments)
}
