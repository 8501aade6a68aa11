//! The agent: watches one PC.
//!
//! Pure rooms decide, told the time and doing no I/O: [`flows`], [`transfers`], [`ledger`], `usb::devices`,
//! `spool::format`. Thin shells do I/O: [`kernel`], [`links`], [`usb`], [`spool`], [`uplink`], [`journal`].
//! [`run`] moves data between them.

pub mod clock;
pub mod identity;
pub mod kernel;
pub mod spool;
pub mod uplink;
pub mod usb;
