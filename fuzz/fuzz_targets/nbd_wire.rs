// SPDX-License-Identifier: MIT OR Apache-2.0
//! Fuzzes the NBD wire module: every message of the protocol.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::nbd::wire(data));
