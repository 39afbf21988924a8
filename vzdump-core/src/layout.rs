// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where everything is: configuration, state and run-time files.
