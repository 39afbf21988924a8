// SPDX-License-Identifier: MIT OR Apache-2.0
//! The file `storage.cfg`.
