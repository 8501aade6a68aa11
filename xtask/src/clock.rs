//! The only clock of the chores.

use std::time::Instant;

/// Now.
#[expect(clippy::disallowed_methods, reason = "the one place that asks for the time")]
pub fn now() -> Instant {
    Instant::now()
}
