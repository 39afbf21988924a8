// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disk images on a directory storage.
