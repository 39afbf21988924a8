// SPDX-License-Identifier: MIT OR Apache-2.0
//! QEMU's command line from a VM's configuration.
