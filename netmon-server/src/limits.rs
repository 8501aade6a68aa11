//! How much of the server one agent may take. Pure.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::Duration;

/// Records (of the usual size) a second that an agent may deliver: a thousand times what a PC records, and an hour's backlog
/// within seconds.
pub const RATE: u64 = 2_000;
/// Records that it may deliver at once.
pub const BURST: u64 = 4_000;
/// Records a second that it may deliver in the long run: the server's disk is everybody's. As many as let the heartbeats
/// behind four batches of 500 come in time.
pub const LONG_RATE: u64 = 250;
/// Records that it may deliver before that counts: more than a full spool holds.
pub const LONG_BURST: u64 = 4_000_000;

/// What a batch costs, whatever is in it, in records of the usual size: a step of its own in the store.
pub const BATCH_COST: u64 = 4;

/// Calls a second from one address, and at once, of peers that nobody knows yet. A handshake costs the server a signature: a
/// thousand times what its first packet costs the peer.
pub const STRANGE_CALLS: Rate = Rate { per_second: 4, burst: 32 };
/// The same from an address from which a known agent called: many PCs may stand behind one.
pub const GUEST_CALLS: Rate = Rate { per_second: 8, burst: 256 };
/// The same where PCs are enrolled: a row of them behind one address.
pub const ENROLMENT_CALLS: Rate = Rate { per_second: 32, burst: 256 };
/// Calls of all strangers together: after the server's start everybody is one.
pub const ALL_STRANGE_CALLS: Rate = Rate { per_second: 64, burst: 1_024 };
/// Calls with one certificate from one address: an agent waits longer and longer after each that fails.
pub const CALLS: Rate = Rate { per_second: 1, burst: 16 };
/// Heartbeats of one agent: it says one in four seconds.
pub const HEARTBEATS: Rate = Rate { per_second: 2, burst: 16 };

/// How often something may be, in the long run and at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// A second.
    pub per_second: u64,
    /// At once.
    pub burst: u64,
}

impl Rate {
    /// A full bucket.
    pub fn bucket(self) -> Bucket {
        Bucket::new(self.per_second, self.burst)
    }
}

/// Faults within [`STRIKES_NS`] that put an agent into quarantine.
pub const STRIKES: u32 = 3;
/// Ten minutes.
pub const STRIKES_NS: u64 = 600_000_000_000;
/// The first quarantine. Each further one is twice as long.
pub const QUARANTINE: Duration = Duration::from_secs(60);
/// The longest quarantine.
pub const LONGEST_QUARANTINE: Duration = Duration::from_secs(3600);

/// A token bucket: who has spent it waits, and is not refused.
#[derive(Clone, Debug)]
pub struct Bucket {
    rate: u64,
    burst: u64,
    /// Up to when the bucket's tokens are spent, boot clock and [`EARLIER_NS`]; below now: that many are left.
    spent_until_ns: u64,
}

/// A bucket is full from the first moment on, though the boot clock begins at 0: 146 years.
const EARLIER_NS: u64 = 1 << 62;

impl Bucket {
    /// A full bucket of `burst` tokens that gets `rate` a second.
    pub fn new(rate: u64, burst: u64) -> Self {
        Self { rate, burst, spent_until_ns: 0 }
    }

    /// Takes `cost` tokens; how long to wait before what they are for is done.
    pub fn take(&mut self, cost: u64, now_ns: u64) -> Duration {
        let now_ns = now_ns.saturating_add(EARLIER_NS);
        let time = |tokens: u64| tokens.saturating_mul(1_000_000_000) / self.rate.max(1);
        let full_ns = now_ns.saturating_sub(time(self.burst));
        self.spent_until_ns = self.spent_until_ns.max(full_ns).saturating_add(time(cost));
        Duration::from_nanos(self.spent_until_ns.saturating_sub(now_ns))
    }

    /// Takes `cost` tokens where there are as many: who has spent it is refused.
    pub fn try_take(&mut self, cost: u64, now_ns: u64) -> bool {
        let mut after = self.clone();
        let is_there = after.take(cost, now_ns).is_zero();
        if is_there {
            *self = after;
        }
        is_there
    }

    /// True when it is as a new one.
    pub fn is_full(&self, now_ns: u64) -> bool {
        let now_ns = now_ns.saturating_add(EARLIER_NS);
        let time_ns = self.burst.saturating_mul(1_000_000_000) / self.rate.max(1);
        self.spent_until_ns <= now_ns.saturating_sub(time_ns)
    }
}

/// A bucket for each of many: as many as [`Buckets::MOST`] are remembered.
#[derive(Debug)]
pub struct Buckets<K> {
    rate: Rate,
    buckets: HashMap<K, Bucket>,
}

impl<K: Hash + Eq> Buckets<K> {
    /// More than there are agents.
    pub const MOST: usize = 16_384;

    /// Nobody has taken anything.
    pub fn new(rate: Rate) -> Self {
        Self { rate, buckets: HashMap::new() }
    }

    /// Takes one token of `key`'s, where there is one. Who is not remembered for want of room is let through: whoever can
    /// bring so many keys needs another limit.
    pub fn try_take(&mut self, key: K, now_ns: u64) -> bool {
        if self.buckets.len() >= Self::MOST && !self.buckets.contains_key(&key) {
            self.buckets.retain(|_, bucket| !bucket.is_full(now_ns));
            if self.buckets.len() >= Self::MOST {
                return true;
            }
        }
        let rate = self.rate;
        self.buckets.entry(key).or_insert_with(|| rate.bucket()).try_take(1, now_ns)
    }
}

/// What one agent may take, for the moment and in the long run.
#[derive(Clone, Debug)]
pub struct Share {
    short: Bucket,
    long: Bucket,
}

impl Default for Share {
    fn default() -> Self {
        Self { short: Bucket::new(RATE, BURST), long: Bucket::new(LONG_RATE, LONG_BURST) }
    }
}

impl Share {
    /// Takes the cost of so many records; how long to wait before what they are for is done.
    pub fn take(&mut self, cost: u64, now_ns: u64) -> Duration {
        self.short.take(cost, now_ns).max(self.long.take(cost, now_ns))
    }
}

/// How often an agent broke the protocol lately.
#[derive(Clone, Debug, Default)]
pub struct Strikes {
    count: u32,
    since_ns: u64,
    quarantines: u32,
}

impl Strikes {
    /// One more fault; for how long the agent is not let in, if that is enough.
    pub fn strike(&mut self, now_ns: u64) -> Option<Duration> {
        if now_ns.saturating_sub(self.since_ns) > STRIKES_NS {
            *self = Self { since_ns: now_ns, quarantines: self.quarantines, ..Self::default() };
        }
        self.count += 1;
        if self.count < STRIKES {
            return None;
        }
        let doubled = QUARANTINE.saturating_mul(1 << self.quarantines.min(16));
        self.quarantines = self.quarantines.saturating_add(1);
        self.count = 0;
        Some(doubled.min(LONGEST_QUARANTINE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_burst_is_free_and_then_the_rate_holds() {
        let mut bucket = Bucket::new(100, 200);
        let now = 1_000 * SECOND;
        assert_eq!(bucket.take(200, now), Duration::ZERO);
        assert_eq!(bucket.take(50, now), Duration::from_millis(500));
        assert_eq!(bucket.take(50, now), Duration::from_secs(1));
        assert_eq!(bucket.take(0, now + SECOND), Duration::ZERO);
    }

    #[test]
    fn a_bucket_never_holds_more_than_a_burst() {
        let mut bucket = Bucket::new(100, 200);
        assert_eq!(bucket.take(300, 1_000_000 * SECOND), Duration::from_secs(1));
    }

    #[test]
    fn a_bucket_is_full_as_soon_as_the_machine_is_up() {
        assert!(Bucket::new(1, 4_000_000).take(4_000_000, SECOND).is_zero());
        assert!(Bucket::new(1, 4_000_000).is_full(SECOND));
    }

    #[test]
    fn what_is_refused_takes_nothing() {
        let mut bucket = Rate { per_second: 2, burst: 3 }.bucket();
        let now = 1_000 * SECOND;
        let taken = (0..10).filter(|_| bucket.try_take(1, now)).count();
        assert_eq!(taken, 3);
        assert!(!bucket.try_take(1, now + SECOND / 2 - 1));
        assert!(bucket.try_take(1, now + SECOND / 2));
        assert!(!bucket.is_full(now + 2 * SECOND - 1));
        assert!(bucket.is_full(now + 2 * SECOND));
    }

    #[test]
    fn each_has_its_own_bucket_and_they_are_bounded() {
        let mut buckets = Buckets::new(Rate { per_second: 1, burst: 1 });
        let now = 1_000 * SECOND;
        let most = Buckets::<usize>::MOST;
        assert!((0..most).all(|key| buckets.try_take(key, now)));
        assert!(!buckets.try_take(0, now));
        // No room: let through, and not remembered.
        assert!(buckets.try_take(most, now) && buckets.try_take(most, now));
        // Full ones make room.
        assert!(buckets.try_take(most, now + SECOND) && !buckets.try_take(most, now + SECOND));
        assert_eq!(buckets.buckets.len(), 1);
    }

    #[test]
    fn in_the_long_run_an_agent_gets_less_than_for_a_moment() {
        let mut share = Share::default();
        let mut now = 1_000_000 * SECOND;
        let start = now;
        let mut delivered = 0;
        while now - start < 24 * 3_600 * SECOND {
            now += share.take(1_000, now).as_nanos() as u64;
            delivered += 1_000;
        }
        let long = LONG_BURST + 24 * 3_600 * LONG_RATE;
        assert!((long - 2_000..=long + 2_000).contains(&delivered), "{delivered}");
        assert!(share.take(0, now + 24 * 3_600 * SECOND).is_zero());
    }

    #[test]
    fn a_cost_beyond_all_bounds_does_not_overflow() {
        let mut bucket = Bucket::new(1, 1);
        assert!(bucket.take(u64::MAX, 5) > Duration::from_secs(1));
        assert!(bucket.take(u64::MAX, 5) > Duration::from_secs(1));
    }

    #[test]
    fn the_third_fault_within_ten_minutes_is_a_quarantine_and_each_is_twice_as_long() {
        let mut strikes = Strikes::default();
        assert_eq!([strikes.strike(1), strikes.strike(2)], [None, None]);
        assert_eq!(strikes.strike(3), Some(QUARANTINE));
        assert_eq!([strikes.strike(4), strikes.strike(5)], [None, None]);
        assert_eq!(strikes.strike(6), Some(2 * QUARANTINE));
        for _ in 0..100 {
            strikes.strike(7);
        }
        let longest = (0..3).filter_map(|_| strikes.strike(8)).next();
        assert_eq!(longest, Some(LONGEST_QUARANTINE));
    }

    #[test]
    fn faults_far_apart_are_forgiven() {
        let mut strikes = Strikes::default();
        for n in 0..100 {
            assert_eq!(strikes.strike((n + 1) * (STRIKES_NS + 1)), None);
        }
    }
}
