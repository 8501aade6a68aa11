//! The agent: watches one PC.
//!
//! Pure rooms decide, told the time and doing no I/O: [`flows`], [`transfers`], [`ledger`], `usb::devices`,
//! `spool::format`. Thin shells do I/O: [`kernel`], [`links`], [`usb`], [`spool`], [`uplink`], [`journal`].
//! [`run`] moves data between them.

pub mod clock;
pub mod config;
pub mod filter;
pub mod flows;
pub mod identity;
pub mod journal;
pub mod kernel;
pub mod ledger;
pub mod links;
pub mod spool;
pub mod status;
pub mod transfers;
pub mod uplink;
pub mod usb;
