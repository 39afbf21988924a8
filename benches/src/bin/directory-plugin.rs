// SPDX-License-Identifier: MIT OR Apache-2.0
//! The directory provider as a program that speaks the provider protocol; `providers-bench` starts it.
#![forbid(unsafe_code)]

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    match benches::plugin::serve(tokio::io::stdin(), tokio::io::stdout()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
