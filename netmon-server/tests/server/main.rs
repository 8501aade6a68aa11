//! The real `netmon-server` on loopback, with a small agent of the test's own.

mod cli;
mod delivery;
mod enrolment;
mod harness;
