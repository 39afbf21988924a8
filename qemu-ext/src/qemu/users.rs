// SPDX-License-Identifier: GPL-2.0-or-later
//! Who works on a node or on what is above it: exports and block jobs, as errors name them.

use std::collections::HashSet;

use qemu_ext_sys as sys;

use super::graph::{Bds, GraphReader};
use super::main_loop::MainLoop;
use super::{export, glib};

/// The exports and block jobs that have this node below them, each once.
pub fn exports_and_jobs(main_loop: MainLoop, node: Bds) -> Vec<String> {
    let exports = export::all(main_loop);
    let mut found = Vec::new();
    let mut seen = HashSet::from([node]);
    let mut open = vec![node];
    let _lock = GraphReader::new();
    while let Some(node) = open.pop() {
        // SAFETY: main loop with the graph lock: the lists do not change meanwhile, a parent that
        // is a node is alive, and each description is a new string.
        unsafe {
            let mut link = sys::ba_bs_first_parent(node.as_ptr());
            while !link.is_null() {
                let (who, class) = ((*link).opaque, (*link).klass);
                if (*class).parent_is_bds {
                    // Not through a node of ours: its exports show old data, not this node.
                    let above = Bds::from_ptr(who.cast()).filter(|_| !(*class).stay_at_node);
                    open.extend(above.filter(|&above| seen.insert(above)));
                } else if let Some((_, id)) = exports.iter().find(|(export, _)| export.is(who)) {
                    found.push(format!("export '{id}'"));
                } else {
                    let description = glib::take_text(sys::ba_child_description(link));
                    found.extend(Some(description).filter(|text| text.contains(" job '")));
                }
                link = sys::ba_bs_next_parent(link);
            }
        }
    }
    found.sort();
    found.dedup();
    found
}
