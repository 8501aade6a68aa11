//! The server's only clocks. Everything else is told the time.

use rustix::time::{ClockId, clock_gettime};

/// `CLOCK_REALTIME`, nanoseconds since 1970-01-01T00:00:00Z.
pub fn wall_ns() -> i64 {
    let wall = clock_gettime(ClockId::Realtime);
    wall.tv_sec.saturating_mul(1_000_000_000).saturating_add(wall.tv_nsec)
}

/// One reading of both clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// `CLOCK_BOOTTIME`, nanoseconds: goes on in suspend, cannot be set.
    pub boot_ns: u64,
    /// [`wall_ns`].
    pub wall_ns: i64,
}

impl Now {
    /// Reads both.
    pub fn read() -> Self {
        let boot = clock_gettime(ClockId::Boottime);
        let boot_ns = (boot.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(boot.tv_nsec as u64);
        Self { boot_ns, wall_ns: wall_ns() }
    }
}
