// SPDX-License-Identifier: MIT OR Apache-2.0
//! Fuzzes a guest agent that says anything.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::qmp::agent(data));
