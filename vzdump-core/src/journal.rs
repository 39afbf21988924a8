// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a job has acquired, on disk, so that a crash can be cleaned up.
