// SPDX-License-Identifier: MIT OR Apache-2.0
//! Starts, stops and watches the QEMU process of a VM.
