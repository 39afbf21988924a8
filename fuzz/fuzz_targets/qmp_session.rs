// SPDX-License-Identifier: MIT OR Apache-2.0
//! Fuzzes a QMP session whose peer says anything.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::qmp::session(data));
