// SPDX-License-Identifier: MIT OR Apache-2.0
//! Fuzzes the NBD client with a server that says anything.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::nbd::client(data));
