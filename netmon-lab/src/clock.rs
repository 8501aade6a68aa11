//! The only place of this crate that asks for the time.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Monotonic time.
pub fn now() -> Instant {
    #[expect(clippy::disallowed_methods, reason = "clock.rs is where the time is asked for")]
    Instant::now()
}

/// Wall clock, nanoseconds since 1970-01-01T00:00:00Z; the clock of the lines' times.
pub fn wall_ns() -> i64 {
    #[expect(clippy::disallowed_methods, reason = "clock.rs is where the time is asked for")]
    let wall = SystemTime::now();
    let since = wall.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}
