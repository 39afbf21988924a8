// SPDX-License-Identifier: MIT OR Apache-2.0
//! Events of a job and their form as log lines.
