//! When to try again. Pure.

use std::time::Duration;

/// An outage younger than this is likely a restart: it is watched closely.
const YOUNG: Duration = Duration::from_secs(60);
/// Longest pause while an outage is young: a server that comes back is found within seconds.
const YOUNG_CAP: Duration = Duration::from_secs(5);
/// Longest pause at all.
const CAP: Duration = Duration::from_secs(60);

/// The pause before attempt number `attempt` (0: the first after a loss) of an outage of this age. `random`
/// spreads a room's PCs over the upper half of it, so that they do not come back all at once.
pub fn pause(attempt: u32, outage: Duration, random: u64) -> Duration {
    let full = match attempt {
        0 => Duration::from_millis(500),
        n => Duration::from_secs(1 << (n - 1).min(6)).min(if outage < YOUNG { YOUNG_CAP } else { CAP }),
    };
    jitter(full, random)
}

/// The pause after the server refused this agent: only people can change that.
pub fn pause_after_refusal(random: u64) -> Duration {
    jitter(CAP, random)
}

fn jitter(full: Duration, random: u64) -> Duration {
    full / 2 + (full / 2).mul_f64(random as f64 / u64::MAX as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_to_five_seconds_and_after_a_minute_to_sixty() {
        let longest = |attempt, outage| pause(attempt, Duration::from_secs(outage), u64::MAX).as_millis();
        assert_eq!([0, 1, 2, 3, 4, 9].map(|n| longest(n, 59)), [500, 1000, 2000, 4000, 5000, 5000]);
        assert_eq!([4, 6, 7, 40].map(|n| longest(n, 60)), [8000, 32000, 60000, 60000]);
    }

    #[test]
    fn a_room_of_pcs_is_spread_over_half_the_pause() {
        assert_eq!(pause(1, Duration::ZERO, 0), Duration::from_millis(500));
        assert_eq!(pause_after_refusal(0), Duration::from_secs(30));
        assert_eq!(pause_after_refusal(u64::MAX), Duration::from_secs(60));
    }
}
