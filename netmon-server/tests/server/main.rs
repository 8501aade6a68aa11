//! The real `netmon-server` on loopback, with a small agent of the test's own.
#![expect(clippy::unwrap_used, reason = "a test whose set-up fails has failed")]

mod cli;
mod delivery;
mod enrolment;
mod harness;
mod supervisor;
mod trust;
