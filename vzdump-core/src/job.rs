// SPDX-License-Identifier: MIT OR Apache-2.0
//! One backup job: plan, run, commit, clean up.
