// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the fuzz targets do with their bytes; the programs around them are in `fuzz_targets`.
//!
//! A target panics when the code under test breaks a promise of its documentation: bounded memory,
//! no hang, answers that fit what was asked for, and what was read is written back the same.
//!
//! The tests `fuzz_seeds` of `qmp-client`, `provider-nbd` and `ct-archive` compile these files too, and run them
//! on every seed, so that a target cannot rot between two runs of the fuzzer.
#![forbid(unsafe_code)]

pub mod archive;
pub mod ends;
pub mod nbd;
pub mod qmp;
pub mod seeds;
