// SPDX-License-Identifier: MIT OR Apache-2.0
//! The driver of one VM's backup.
