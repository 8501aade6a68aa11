//! The agent: watches one PC.
//!
//! Pure rooms decide, told the time and doing no I/O: [`flows`], [`transfers`], [`ledger`], [`pace`], [`names`], `usb::devices`,
//! `spool::format`. Thin shells do I/O: [`kernel`], [`links`], [`usb`], [`spool`], [`uplink`], [`journal`].
//! [`run`] waits for them all, [`watch`] moves data between them.

pub mod clock;
pub mod config;
pub mod doctor;
pub mod filter;
pub mod flows;
pub mod identity;
pub mod interfaces;
pub mod journal;
pub mod kernel;
pub mod ledger;
pub mod links;
pub mod names;
pub mod pace;
pub mod privileges;
pub mod recorder;
pub mod renewal;
pub mod run;
pub mod spool;
pub mod status;
pub mod supervisor;
pub mod timer;
pub mod transfers;
pub mod trust;
pub mod uplink;
pub mod usb;
pub mod watch;
pub mod words;

/// An error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}
