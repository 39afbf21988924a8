// SPDX-License-Identifier: MIT OR Apache-2.0
//! Fuzzes the reader of containers' archives.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::archive::archive(data));
