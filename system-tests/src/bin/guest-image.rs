// SPDX-License-Identifier: MIT OR Apache-2.0
//! Builds the guest, or finds it in the cache, and prints where its kernel and its initramfs are.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use system_tests::guest::GuestImage;
use system_tests::process::Stop;

fn main() -> ExitCode {
    match GuestImage::build(&Stop::default()) {
        Ok(image) => {
            println!("{}\n{}", image.kernel.display(), image.initrd.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
