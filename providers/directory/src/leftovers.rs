// SPDX-License-Identifier: MIT OR Apache-2.0
//! The removal of what dead runs left, beside everything else: it may take long or not come to an end, and
//! nothing that is asked for depends on it.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use provider_api::Call;

use crate::limits::LEFTOVERS_WAIT;
use crate::storage::Leftover;

/// Removes leftovers, one after the other.
#[derive(Debug, Clone, Default)]
pub(crate) struct Remover {
    /// Held by the thread that removes.
    one: Arc<Mutex<()>>,
}

impl Remover {
    /// Removes leftovers in a thread of its own, and waits a little for that: mostly it is soon done. What
    /// stays is found again by the next activation, also because another removal is still under way.
    pub(crate) async fn remove(&self, leftovers: Vec<Leftover>, call: &Call) {
        if leftovers.is_empty() {
            return;
        }
        let one = Arc::clone(&self.one);
        let (done, is_done) = tokio::sync::oneshot::channel::<()>();
        // No thread of the runtime, whose end would wait for it.
        let thread = std::thread::Builder::new().name("leftovers".to_owned());
        let started = thread.spawn(move || {
            let _done = done;
            let Ok(_one) = one.try_lock() else { return };
            leftovers.iter().for_each(remove);
        });
        match started {
            Ok(_) => {
                // Whoever is in a hurry gets an answer in time.
                let left = call.deadline.map(|at| at.saturating_duration_since(Instant::now()) / 2);
                let wait = left.map_or(LEFTOVERS_WAIT, |left| left.min(LEFTOVERS_WAIT));
                drop(tokio::time::timeout(wait, is_done).await);
            }
            Err(error) => tracing::warn!("Cannot remove what unfinished backups left: {error}"),
        }
    }
}

fn remove(leftover: &Leftover) {
    let path = leftover.path().display();
    tracing::info!("Removing what an unfinished backup left: {path}");
    if let Err(error) = leftover.remove() {
        tracing::warn!("What an unfinished backup left stays until the next activation: {error}");
    }
}
