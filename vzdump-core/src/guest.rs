// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a job needs from a kind of guest: the trait `GuestDriver`.
