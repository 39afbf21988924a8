// SPDX-License-Identifier: MIT OR Apache-2.0
//! Fuzzes the QMP codec: lines, messages, ids.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::qmp::codec(data));
