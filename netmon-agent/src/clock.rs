//! The agent's only clock. Everything else is told the time.

use rustix::time::{ClockId, clock_gettime};

/// One reading of both clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// `CLOCK_BOOTTIME`, nanoseconds: goes on in suspend, cannot be set; the kernel programs use it too.
    pub boot_ns: u64,
    /// `CLOCK_REALTIME`, nanoseconds since 1970-01-01T00:00:00Z.
    pub wall_ns: i64,
}

impl Now {
    /// Reads the clocks.
    pub fn read() -> Self {
        let boot = clock_gettime(ClockId::Boottime);
        let wall = clock_gettime(ClockId::Realtime);
        Self {
            boot_ns: u64::try_from(boot.tv_sec).unwrap_or_default() * 1_000_000_000 + boot.tv_nsec as u64,
            wall_ns: wall.tv_sec.saturating_mul(1_000_000_000).saturating_add(wall.tv_nsec),
        }
    }

    /// The wall time at which the boot clock showed `boot_ns`, by today's offset between the two.
    pub fn wall_at(&self, boot_ns: u64) -> i64 {
        let ago = i128::from(self.boot_ns) - i128::from(boot_ns);
        i64::try_from(i128::from(self.wall_ns) - ago).unwrap_or(self.wall_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_time_becomes_the_wall_time_of_that_moment() {
        let now = Now { boot_ns: 10_000, wall_ns: 1_000_000 };
        assert_eq!(now.wall_at(7_000), 997_000);
        assert_eq!(now.wall_at(12_000), 1_002_000);
    }
}
