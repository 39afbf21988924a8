// SPDX-License-Identifier: MIT OR Apache-2.0
//! The QEMU programs in use, and how they are found.
