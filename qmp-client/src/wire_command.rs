// SPDX-License-Identifier: MIT OR Apache-2.0
//! What commands are called on the wire, and what they return.

/// Implements [`qapi_spec::Command`] for types that are a command's arguments; none of ours is ever sent out of band.
macro_rules! commands {
    ($( $name:ident = $wire:literal -> $ok:ty; )+) => {
        $(
            impl qapi_spec::Command for $name {
                type Ok = $ok;
                const NAME: &'static str = $wire;
                const ALLOW_OOB: bool = false;
            }
        )+
    };
}

pub(crate) use commands;
