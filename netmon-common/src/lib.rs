//! What both ends of every border in netmon agree on.
//!
//! * [`abi`]: kernel programs ↔ agent (`no_std`, plain numbers, layout proven at compile time)
//! * [`raw`]: strings from outside: bounded, raw in the store, escaped where they are shown
//! * [`model`]: the events that an agent records
//! * [`wire`]: agent ↔ server: frames, batches, acknowledgements
//! * [`enroll`]: the one-line token and the enrolment conversation
//! * [`prefixes`][]: `ip.txt`
//! * [`logline`]: one event → one line of text
//!
//! Nothing in here does I/O, asks for the time, or knows an async runtime.
#![cfg_attr(not(feature = "std"), no_std)]

pub mod abi;
#[cfg(feature = "std")]
pub mod enroll;
#[cfg(feature = "std")]
pub mod logline;
#[cfg(feature = "std")]
pub mod model;
#[cfg(feature = "std")]
pub mod prefixes;
#[cfg(feature = "std")]
pub mod raw;
#[cfg(feature = "std")]
pub mod wire;
