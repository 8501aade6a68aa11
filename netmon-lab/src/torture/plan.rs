//! Whom it strikes next, how and when. Pure: the same seed gives the same strikes.

use std::time::Duration;

use fastrand::Rng;

/// Longest pause between "both are up" and a strike.
const LONGEST_PAUSE_MS: u64 = 300;
/// How long a program stands still when it is held up.
pub const HELD_UP: Duration = Duration::from_secs(1);

/// Who is struck.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Victims {
    /// The agent.
    Agent,
    /// The server.
    Server,
    /// Both at the same moment.
    Both,
}

impl Victims {
    /// The agent is among them.
    pub fn agent(self) -> bool {
        self != Self::Server
    }

    /// The server is among them.
    pub fn server(self) -> bool {
        self != Self::Agent
    }
}

/// What happens to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// SIGKILL.
    Kill,
    /// SIGTERM.
    Terminate,
    /// SIGSTOP, and SIGCONT after [`HELD_UP`].
    HoldUp,
}

/// When it happens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Moment {
    /// While what was struck before is starting, at this part of a start's usual duration.
    Starting(f64),
    /// So long after both are up.
    Running(Duration),
    /// So long after new records have come into the server's log. An agent that outlived its server needs seconds to
    /// notice that it has lost it, and has a backlog of thousands of records by then.
    Delivering(Duration),
}

/// One strike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Strike {
    /// Who.
    pub victims: Victims,
    /// What.
    pub how: How,
    /// When.
    pub moment: Moment,
    /// Where the server is struck and the agent is not: the server comes back only after the agent has said, in a new
    /// status, what was acknowledged last.
    pub ask_agent: bool,
}

/// Strikes without end.
#[derive(Debug)]
pub struct Plan {
    random: Rng,
}

impl Plan {
    /// Those of this seed.
    pub fn new(seed: u64) -> Self {
        Self { random: Rng::with_seed(seed) }
    }
}

impl Iterator for Plan {
    type Item = Strike;

    fn next(&mut self) -> Option<Strike> {
        let victims = match self.random.u8(..100) {
            ..45 => Victims::Agent,
            45..80 => Victims::Server,
            _ => Victims::Both,
        };
        let how = match self.random.u8(..100) {
            ..80 => How::Kill,
            80..90 => How::Terminate,
            _ => How::HoldUp,
        };
        let pause = Duration::from_millis(self.random.u64(..=LONGEST_PAUSE_MS));
        let moment = match self.random.u8(..30) {
            ..10 => Moment::Starting(self.random.f64()),
            10..28 => Moment::Running(pause),
            _ => Moment::Delivering(pause),
        };
        Some(Strike { victims, how, moment, ask_agent: self.random.bool() })
    }
}

#[cfg(test)]
mod tests {
    use std::mem;

    use super::*;

    const MOMENTS: [Moment; 3] =
        [Moment::Starting(0.0), Moment::Running(Duration::ZERO), Moment::Delivering(Duration::ZERO)];

    #[test]
    fn a_seed_gives_the_same_strikes_again_and_another_one_others() {
        let of = |seed| Plan::new(seed).take(50).collect::<Vec<_>>();
        assert_eq!(of(7), of(7));
        assert_ne!(of(7), of(8));
    }

    #[test]
    fn everybody_is_struck_in_every_way_at_every_moment() {
        let strikes: Vec<_> = Plan::new(1).take(2_000).collect();
        for victims in [Victims::Agent, Victims::Server, Victims::Both] {
            for how in [How::Kill, How::Terminate, How::HoldUp] {
                for moment in MOMENTS {
                    let is = |strike: &Strike| {
                        let is_then = mem::discriminant(&strike.moment) == mem::discriminant(&moment);
                        (strike.victims, strike.how, is_then) == (victims, how, true)
                    };
                    assert!(strikes.iter().any(is), "{victims:?} {how:?} {moment:?}");
                }
            }
        }
    }
}
