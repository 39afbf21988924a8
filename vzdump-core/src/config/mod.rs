// SPDX-License-Identifier: MIT OR Apache-2.0
//! Proxmox VE's configuration files, read and written without loss.

pub mod guest;
pub mod storage;
