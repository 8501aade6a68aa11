//! What systemd is told (sd_notify(3)): when the agent watches, that its loop still turns, and when it ends. An agent that
//! hangs is restarted (`WatchdogSec=`).

use std::sync::mpsc::{SyncSender, sync_channel};

use sd_notify::NotifyState;

/// Whoever started the agent and wants to know. Nobody, unless `NOTIFY_SOCKET` says so.
pub struct Supervisor {
    words: Option<SyncSender<NotifyState<'static>>>,
    /// Between two signs of life; `None`: none are wanted.
    pause_ns: Option<u64>,
    next_ns: u64,
}

impl Supervisor {
    /// As the environment has it. The words go from a thread of their own: sending blocks when whoever listens does not,
    /// and that must not hold up the watch.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn from_environment() -> std::io::Result<Self> {
        if std::env::var_os("NOTIFY_SOCKET").is_none() {
            return Ok(Self { words: None, pause_ns: None, next_ns: 0 });
        }
        // What is to be said at a start and an end; more waits only where nobody listens.
        let (words, queue) = sync_channel(4);
        std::thread::Builder::new().name("supervisor".into()).spawn(move || {
            for word in queue {
                if let Err(error) = sd_notify::notify(&[word]) {
                    tracing::warn!(%error, "cannot tell systemd how the agent is");
                }
            }
        })?;
        let limit_ns = sd_notify::watchdog_enabled().map(|limit| u64::try_from(limit.as_nanos()));
        Ok(Self::new(Some(words), limit_ns.and_then(Result::ok)))
    }

    /// `limit_ns`: without a sign of life for this long, the agent is restarted.
    fn new(words: Option<SyncSender<NotifyState<'static>>>, limit_ns: Option<u64>) -> Self {
        // Half of it is what sd_watchdog_enabled(3) asks for; a third leaves room for a sweep that took long.
        Self { words, pause_ns: limit_ns.map(|limit| limit / 3), next_ns: 0 }
    }

    /// It watches.
    pub fn ready(&self) {
        self.say(NotifyState::Ready);
    }

    /// The loop has turned.
    pub fn alive(&mut self, boot_ns: u64) {
        let Some(pause_ns) = self.pause_ns else { return };
        if boot_ns >= self.next_ns {
            self.next_ns = boot_ns + pause_ns;
            self.say(NotifyState::Watchdog);
        }
    }

    /// It ends, because it was told to.
    pub fn stopping(&self) {
        self.say(NotifyState::Stopping);
    }

    fn say(&self, word: NotifyState<'static>) {
        if let Some(words) = &self.words {
            // Full where nobody has listened for a while: then nobody misses it.
            let _ = words.try_send(word);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn signs_of_life_come_three_times_as_often_as_they_must() {
        let (words, said) = sync_channel(100);
        let mut supervisor = Supervisor::new(Some(words), Some(30 * SECOND));
        supervisor.ready();
        for tenth in 0..=600 {
            supervisor.alive(7 * SECOND + tenth * SECOND / 10);
        }
        supervisor.stopping();
        let said: Vec<_> = said.try_iter().map(|word| word.to_string()).collect();
        let mut expected = vec!["READY=1"];
        expected.extend(["WATCHDOG=1"; 7]);
        expected.push("STOPPING=1");
        assert_eq!(said, expected);
    }

    #[test]
    fn nobody_who_listens_holds_nothing_up() {
        let (words, said) = sync_channel(1);
        let mut supervisor = Supervisor::new(Some(words), Some(3 * SECOND));
        (0..100).for_each(|second| supervisor.alive(second * SECOND));
        assert_eq!(said.try_iter().count(), 1);
    }
}
