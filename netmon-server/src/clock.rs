//! The server's only clock. Everything else is told the time.

use rustix::time::{ClockId, clock_gettime};

/// `CLOCK_REALTIME`, nanoseconds since 1970-01-01T00:00:00Z.
pub fn wall_ns() -> i64 {
    let wall = clock_gettime(ClockId::Realtime);
    wall.tv_sec.saturating_mul(1_000_000_000).saturating_add(wall.tv_nsec)
}
