//! A timer on the boot clock, by which everything is dated.

use std::io;
use std::os::fd::OwnedFd;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Fires once for each moment that is waited for. The runtime's own timers wake the process two or three times for each,
/// which is what an idle agent would mostly cost.
#[derive(Debug)]
pub struct BootTimer {
    timer: AsyncFd<OwnedFd>,
    /// What it is set to; `None` when it has fired.
    set_ns: Option<u64>,
}

impl BootTimer {
    /// Must be called within a runtime.
    ///
    /// # Errors
    /// Too many open files.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Boottime, flags)?;
        // SAFETY: the `AsyncFd` owns the descriptor, so it stays open for as long as it is registered, and an `OwnedFd`
        // gives the same descriptor every time.
        let timer = unsafe { AsyncFd::register_with_interest(timer, Interest::READABLE)? };
        Ok(Self { timer, set_ns: None })
    }

    /// Waits for this boot time, in nanoseconds; may be dropped and called again, with the same or another one.
    ///
    /// # Errors
    /// The kernel refuses; none is known.
    pub async fn reached(&mut self, due_ns: u64) -> io::Result<()> {
        if self.set_ns != Some(due_ns) {
            self.set(due_ns)?;
        }
        loop {
            let mut ready = self.timer.readable().await?;
            // How often it has fired: once.
            let mut count = [0; 8];
            match ready.try_io(|timer| rustix::io::read(timer, &mut count).map_err(Into::into)) {
                Ok(read) => {
                    read?;
                    self.set_ns = None;
                    return Ok(());
                }
                Err(_would_block) => {}
            }
        }
    }

    fn set(&mut self, due_ns: u64) -> io::Result<()> {
        const SECOND_NS: u64 = 1_000_000_000;
        // 0 would be "never".
        let due_ns_or_now = due_ns.max(1);
        let due = Timespec {
            tv_sec: i64::try_from(due_ns_or_now / SECOND_NS).unwrap_or(i64::MAX),
            tv_nsec: (due_ns_or_now % SECOND_NS).cast_signed(),
        };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: due };
        timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &once)?;
        self.set_ns = Some(due_ns);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Now;

    #[tokio::test]
    async fn it_fires_at_the_moment_that_was_last_asked_for() {
        let mut timer = BootTimer::new().unwrap();
        let now = Now::read().boot_ns;
        // Asked for, given up, asked for something sooner; then in the past.
        let never = tokio::time::timeout(std::time::Duration::from_millis(5), timer.reached(u64::MAX));
        assert!(never.await.is_err());
        for due in [now + 30_000_000, now, 0] {
            timer.reached(due).await.unwrap();
            assert!(Now::read().boot_ns >= due);
        }
    }
}
