// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VM's configuration file.
