// SPDX-License-Identifier: MIT OR Apache-2.0
//! Events as a stream with a bounded queue per reader.

use tokio::sync::broadcast::{Receiver, error::RecvError};

use crate::Event;

/// One item of an [`EventStream`].
#[derive(Debug, Clone, PartialEq)]
pub enum EventItem {
    /// An event.
    Event(Event),
    /// The reader was too slow and this many events are lost to it: ask QEMU for the state of
    /// whatever it watches.
    Lagged(u64),
}

/// The events of a session from the moment it was made; see [`crate::Session::events`].
#[derive(Debug)]
pub struct EventStream {
    receiver: Option<Receiver<Event>>,
}

impl EventStream {
    pub(crate) fn new(receiver: Option<Receiver<Event>>) -> Self {
        Self { receiver }
    }

    /// The next event; `None` once the connection is gone and all events are read. Safe to cancel.
    pub async fn next(&mut self) -> Option<EventItem> {
        match self.receiver.as_mut()?.recv().await {
            Ok(event) => Some(EventItem::Event(event)),
            Err(RecvError::Lagged(lost)) => Some(EventItem::Lagged(lost)),
            Err(RecvError::Closed) => {
                self.receiver = None;
                None
            }
        }
    }
}
