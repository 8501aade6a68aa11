//! What the kernel programs say of themselves (`--kernel-log`), on standard error like everything that the agent says.
//!
//! On a thread of its own: a flood of lines holds up neither the watch nor the delivery. Of a second's lines the first
//! ones are shown; how many were not is said.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use log::{Log, Metadata, Record};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use crate::clock::Now;
use crate::kernel::Words;

/// The part of netmon that speaks, for `NETMON_LOG`.
pub const TARGET: &str = "netmon_ebpf";
/// Lines that are shown in a second: what a person can follow, and 1.7 million a day in the journal at worst.
const SHOWN: u32 = 20;
const SECOND_NS: u64 = 1_000_000_000;
/// What was held back is told this often.
const PAUSE: Duration = Duration::from_secs(1);

/// The first lines of each second.
#[derive(Debug, Default)]
struct Limit {
    /// When the second began.
    since_ns: u64,
    shown: u32,
    held_back: u64,
}

impl Limit {
    /// Is a line to be shown? With how many were held back in the second before, when a new one begins.
    fn admit(&mut self, now_ns: u64) -> (bool, u64) {
        let held_back = self.expire(now_ns);
        if self.shown == 0 {
            self.since_ns = now_ns;
        }
        let shown = self.shown < SHOWN;
        if shown {
            self.shown += 1;
        } else {
            self.held_back += 1;
        }
        (shown, held_back)
    }

    /// Ends a second that is over, and tells how many were held back in it.
    fn expire(&mut self, now_ns: u64) -> u64 {
        if now_ns.saturating_sub(self.since_ns) < SECOND_NS {
            return 0;
        }
        self.shown = 0;
        std::mem::take(&mut self.held_back)
    }
}

/// From the programs' lines to the agent's own.
#[derive(Clone, Debug, Default)]
pub struct Teller(Arc<Mutex<Limit>>);

impl Teller {
    fn limit(&self) -> MutexGuard<'_, Limit> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_held_back(lines: u64) {
        if lines > 0 {
            tracing::warn!(target: TARGET, lines, "lines of the kernel programs were not shown: there were too many");
        }
    }

    fn tell_rest(&self, now_ns: u64) {
        let held_back = self.limit().expire(now_ns);
        Self::tell_held_back(held_back);
    }
}

impl Log for Teller {
    /// The programs know what was asked for.
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let (shown, held_back) = self.limit().admit(Now::read().boot_ns);
        Self::tell_held_back(held_back);
        if !shown {
            return;
        }
        let line = record.args();
        match record.level() {
            log::Level::Error => tracing::error!(target: TARGET, "{line}"),
            log::Level::Warn => tracing::warn!(target: TARGET, "{line}"),
            log::Level::Info => tracing::info!(target: TARGET, "{line}"),
            log::Level::Debug => tracing::debug!(target: TARGET, "{line}"),
            log::Level::Trace => tracing::trace!(target: TARGET, "{line}"),
        }
    }

    fn flush(&self) {}
}

/// The thread that listens to the programs.
#[derive(Debug)]
pub struct Listener {
    stop: Arc<OwnedFd>,
    thread: JoinHandle<()>,
}

impl Listener {
    /// Listens; `teller` is the one that `words` were given.
    ///
    /// # Errors
    /// Neither a thread nor a descriptor is to be had.
    pub fn start(mut words: Words<Teller>, teller: Teller) -> io::Result<Self> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let stopped = stop.clone();
        let thread = std::thread::Builder::new().name("kernel-log".into()).spawn(move || {
            let pause = PAUSE.try_into().ok();
            loop {
                let mut waiting = [PollFd::new(&words, PollFlags::IN), PollFd::new(&*stopped, PollFlags::IN)];
                match poll(&mut waiting, pause.as_ref()) {
                    Ok(_) => {}
                    // Whether it is to stop is known the next time.
                    Err(Errno::INTR) => continue,
                    Err(error) => {
                        tracing::error!(target: TARGET, %error, "cannot wait for the kernel programs' lines");
                        return;
                    }
                }
                let stop = !waiting[1].revents().is_empty();
                let lost = words.read();
                if lost > 0 {
                    tracing::warn!(target: TARGET, lost, "lines of the kernel programs found no room in their ring");
                }
                teller.tell_rest(if stop { u64::MAX } else { Now::read().boot_ns });
                if stop {
                    return;
                }
            }
        })?;
        Ok(Self { stop, thread })
    }

    /// Shows what was said last. The programs must be detached: they must have come to an end.
    pub fn stop(self) {
        if let Err(error) = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes()) {
            tracing::error!(%error, "cannot stop listening to the kernel programs");
        } else if self.thread.join().is_err() {
            tracing::error!("listening to the kernel programs ended with a fault");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_lines_of_a_second_are_shown_and_the_others_counted() {
        let mut limit = Limit::default();
        let at = 5 * SECOND_NS;
        for _ in 0..SHOWN {
            assert_eq!(limit.admit(at), (true, 0));
        }
        for _ in 0..1_000 {
            assert_eq!(limit.admit(at + SECOND_NS - 1), (false, 0));
        }
        assert_eq!(limit.expire(at + SECOND_NS - 1), 0, "the second is not over");
        assert_eq!(limit.admit(at + SECOND_NS), (true, 1_000));
        assert_eq!(limit.admit(at + SECOND_NS), (true, 0), "told once");
    }

    #[test]
    fn what_was_held_back_is_told_when_nothing_follows() {
        let mut limit = Limit::default();
        for _ in 0..=SHOWN {
            limit.admit(0);
        }
        assert_eq!(limit.expire(SECOND_NS), 1);
        assert_eq!(limit.expire(2 * SECOND_NS), 0);
    }
}
