//! Which PCs are heard, which are missing since when, and why, most likely, when one is heard again. No I/O, no clock.
//!
//! An agent says "still watching" every four seconds ([`HEARTBEAT_NS`](netmon_common::wire::HEARTBEAT_NS)), out of the loop
//! that watches. Whoever was not heard for [`MISSING_AFTER_NS`] is missing. How long that is tells a clock that cannot be
//! set; when it was, the wall clock.

use std::collections::BTreeMap;

use netmon_common::wire::Heartbeat;

use crate::clock::Now;
use crate::notice::{Notice, Reason};
use crate::store::AgentId;

/// Two heartbeats that did not come, and time for one to be late: seen a second later at most.
pub const MISSING_AFTER_NS: u64 = 11_000_000_000;
/// A PC's clock that moves by more than this against the server's is noticed.
pub const OFFSET_NS: u64 = 2_000_000_000;

/// And that once in this time.
const OFFSET_AGAIN_NS: u64 = 60_000_000_000;

/// One life of an agent: a process on a PC that was started once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Life {
    /// Another one after each start of the PC.
    pub boot_id: [u8; 16],
    /// Another one after each start of the agent.
    pub run: u32,
    /// The run before this one did not end in good order.
    pub previous_died: bool,
}

/// What is known of one agent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// When it was heard last, the server's wall clock; `None`: never.
    pub heard_ns: Option<i64>,
    /// Which life that was; `None`: an agent that does not tell.
    pub life: Option<Life>,
    /// Since when it is missing, the server's wall clock.
    pub missing_ns: Option<i64>,
    /// Its clock minus the server's, as last noticed.
    pub offset_ns: i64,
    /// Another one, seen once: a heartbeat may have been late.
    other_offset_ns: Option<i64>,
    /// When an offset was noticed last, boot clock.
    offset_at_ns: Option<u64>,
    /// Its newest heartbeat.
    pub heartbeat: Option<Heartbeat>,
    /// Since when the silence counts, boot clock: when it was heard, or when the server began to listen.
    silent_since: u64,
    /// Not saved yet.
    changed: bool,
}

/// All agents.
#[derive(Debug)]
pub struct Presence {
    started: Now,
    /// Until when the server ran before that, wall clock.
    ran_until_ns: Option<i64>,
    agents: BTreeMap<AgentId, Seen>,
}

impl Presence {
    /// A server that begins to listen `now`, with what it knew when it ran last, until `ran_until_ns` (wall clock).
    pub fn new(
        now: Now,
        ran_until_ns: Option<i64>,
        known: impl IntoIterator<Item = (AgentId, Seen)>,
    ) -> Self {
        let agents = known.into_iter().map(|(id, seen)| (id, Seen { silent_since: now.boot_ns, ..seen }));
        Self { started: now, ran_until_ns, agents: agents.collect() }
    }

    /// An agent has connected. What that means for its history.
    pub fn connected(&mut self, agent: AgentId, life: Option<Life>, now: &Now) -> Option<Notice> {
        let (started, ran_until_ns) = (self.started, self.ran_until_ns);
        let seen = self.agents.entry(agent).or_default();
        // Over a restart of the server there is only the wall clock.
        let is_first = seen.silent_since == started.boot_ns;
        let limit = MISSING_AFTER_NS as i64;
        let was_away = |since_ns: i64| is_first && now.wall_ns.saturating_sub(since_ns) >= limit;
        let was_silent = seen.missing_ns.is_some() || seen.was_silent(now);
        let back = seen.heard_ns.filter(|since_ns| was_silent || was_away(*since_ns)).map(|since_ns| {
            // It was heard to the end of the server's run before this one.
            let to_the_end = ran_until_ns.is_some_and(|end| since_ns.saturating_add(limit) >= end);
            Notice::Back { since_ns, reason: reason(seen.life, life, is_first && to_the_end) }
        });
        seen.life = life;
        seen.hear(now);
        back
    }

    /// An agent says that it watches.
    pub fn heartbeat(&mut self, agent: AgentId, heartbeat: Heartbeat, now: &Now) -> Vec<Notice> {
        // One that is forgotten was revoked.
        let Some(seen) = self.agents.get_mut(&agent) else { return Vec::new() };
        let mut notices = Vec::new();
        if let Some(since_ns) = seen.heard_ns.filter(|_| seen.missing_ns.is_some() || seen.was_silent(now)) {
            // On a connection that stood all the time.
            if seen.missing_ns.is_none() {
                notices.push(Notice::Missing { since_ns });
            }
            notices.push(Notice::Back { since_ns, reason: Reason::HeldUp });
        }
        let offset_ns = heartbeat.wall_ns.saturating_sub(now.wall_ns);
        let is_near = |other: i64| offset_ns.abs_diff(other) <= OFFSET_NS;
        if is_near(seen.offset_ns) {
            seen.other_offset_ns = None;
        } else if seen.other_offset_ns.is_some_and(is_near) && seen.may_notice_offset(now) {
            (seen.offset_ns, seen.other_offset_ns) = (offset_ns, None);
            seen.offset_at_ns = Some(now.boot_ns);
            notices.push(Notice::ClockOffset { offset_ns });
        } else {
            seen.other_offset_ns = Some(offset_ns);
        }
        seen.heartbeat = Some(heartbeat);
        seen.hear(now);
        notices
    }

    /// A sign of life from an agent that sends no heartbeats.
    pub fn heard(&mut self, agent: AgentId, now: &Now) {
        if let Some(seen) = self.agents.get_mut(&agent) {
            seen.hear(now);
        }
    }

    /// An agent that may not deliver any more is not waited for.
    pub fn forget(&mut self, agent: AgentId) {
        self.agents.remove(&agent);
    }

    /// Who is missing from now on.
    pub fn tick(&mut self, now: &Now) -> Vec<(AgentId, Notice)> {
        let mut missing = Vec::new();
        for (agent, seen) in &mut self.agents {
            if let (None, Some(since_ns)) = (seen.missing_ns, seen.heard_ns)
                && seen.was_silent(now)
            {
                seen.missing_ns = Some(since_ns);
                seen.changed = true;
                missing.push((*agent, Notice::Missing { since_ns }));
            }
        }
        missing
    }

    /// What is known of an agent.
    pub fn get(&self, agent: AgentId) -> Option<&Seen> {
        self.agents.get(&agent)
    }

    /// What changed since the last call.
    pub fn take_changed(&mut self) -> Vec<(AgentId, Seen)> {
        let changed = self.agents.iter_mut().filter(|(_, seen)| seen.changed);
        changed
            .map(|(agent, seen)| {
                seen.changed = false;
                (*agent, seen.clone())
            })
            .collect()
    }
}

impl Seen {
    fn hear(&mut self, now: &Now) {
        self.heard_ns = Some(now.wall_ns);
        self.silent_since = now.boot_ns;
        self.missing_ns = None;
        self.changed = true;
    }

    /// A clock that does not rest must not fill the history.
    fn may_notice_offset(&self, now: &Now) -> bool {
        self.offset_at_ns.is_none_or(|at| now.boot_ns.saturating_sub(at) >= OFFSET_AGAIN_NS)
    }

    fn was_silent(&self, now: &Now) -> bool {
        now.boot_ns.saturating_sub(self.silent_since) >= MISSING_AFTER_NS
    }
}

fn reason(before: Option<Life>, now: Option<Life>, server_was_down: bool) -> Reason {
    match (before, now) {
        (Some(before), Some(now)) if before.boot_id != now.boot_id => {
            if now.previous_died {
                Reason::PowerLost
            } else {
                Reason::Reboot
            }
        }
        (Some(before), Some(now)) if before.run != now.run => {
            if now.previous_died {
                Reason::AgentKilled
            } else {
                Reason::AgentStopped
            }
        }
        _ if server_was_down => Reason::ServerDown,
        (Some(_), Some(_)) => Reason::NetworkGone,
        _ => Reason::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PC: AgentId = AgentId(1);
    const LIFE: Life = Life { boot_id: [1; 16], run: 1, previous_died: false };

    /// Both clocks, `seconds` after the server was started.
    fn at(seconds: u64) -> Now {
        Now { boot_ns: seconds * 1_000_000_000, wall_ns: wall(seconds) }
    }

    fn wall(seconds: u64) -> i64 {
        1_795_392_000_000_000_000 + seconds as i64 * 1_000_000_000
    }

    fn beat(seconds: u64) -> Heartbeat {
        Heartbeat { wall_ns: wall(seconds), ..Heartbeat::default() }
    }

    fn connected() -> Presence {
        let mut presence = Presence::new(at(0), None, []);
        assert_eq!(presence.connected(PC, Some(LIFE), &at(10)), None);
        presence
    }

    fn back(since: u64, reason: Reason) -> Option<Notice> {
        Some(Notice::Back { since_ns: wall(since), reason })
    }

    #[test]
    fn whoever_is_not_heard_for_eleven_seconds_is_missing_once() {
        let mut presence = connected();
        assert_eq!(presence.heartbeat(PC, beat(14), &at(14)), []);
        assert_eq!(presence.tick(&at(24)), []);
        assert_eq!(presence.tick(&at(25)), [(PC, Notice::Missing { since_ns: wall(14) })]);
        assert_eq!(presence.tick(&at(26)), []);
        assert_eq!(presence.get(PC).unwrap().missing_ns, Some(wall(14)));
    }

    #[test]
    fn the_next_life_tells_why_a_pc_was_missing() {
        let lives = [
            (LIFE, Reason::NetworkGone),
            (Life { run: 2, ..LIFE }, Reason::AgentStopped),
            (Life { run: 2, previous_died: true, ..LIFE }, Reason::AgentKilled),
            (Life { run: 2, boot_id: [2; 16], ..LIFE }, Reason::Reboot),
            (Life { run: 2, boot_id: [2; 16], previous_died: true }, Reason::PowerLost),
        ];
        for (life, reason) in lives {
            let mut presence = connected();
            presence.tick(&at(30));
            assert_eq!(presence.connected(PC, Some(life), &at(60)), back(10, reason));
            assert_eq!(presence.tick(&at(61)), []);
        }
        let mut presence = connected();
        assert_eq!(presence.connected(PC, None, &at(60)), back(10, Reason::Unknown));
    }

    #[test]
    fn a_short_break_is_none() {
        let mut presence = connected();
        assert_eq!(presence.connected(PC, Some(Life { run: 2, ..LIFE }), &at(20)), None);
    }

    #[test]
    fn a_server_that_was_down_says_so_itself() {
        let known = |heard| Seen { heard_ns: Some(wall(heard)), life: Some(LIFE), ..Seen::default() };
        // Until second 50 it ran before.
        let restarted = |heard| Presence::new(at(100), Some(wall(50)), [(PC, known(heard))]);
        let mut presence = restarted(48);
        // It gets the time to come back.
        assert_eq!(presence.tick(&at(110)), []);
        assert_eq!(presence.connected(PC, Some(LIFE), &at(110)), back(48, Reason::ServerDown));
        let mut late = restarted(48);
        assert_eq!(late.tick(&at(111)), [(PC, Notice::Missing { since_ns: wall(48) })]);
        assert_eq!(late.connected(PC, Some(LIFE), &at(112)), back(48, Reason::ServerDown));
        // It was gone before the server was.
        assert_eq!(restarted(10).connected(PC, Some(LIFE), &at(103)), back(10, Reason::NetworkGone));
        let mut quick = Presence::new(at(51), Some(wall(50)), [(PC, known(49))]);
        assert_eq!(quick.connected(PC, Some(LIFE), &at(52)), None, "three seconds are a restart");
    }

    #[test]
    fn a_watch_that_stands_still_behind_a_connection_is_missing_too() {
        let mut presence = connected();
        presence.tick(&at(40));
        let held_up = Notice::Back { since_ns: wall(10), reason: Reason::HeldUp };
        let notices = presence.heartbeat(PC, beat(50), &at(50));
        assert_eq!(notices, std::slice::from_ref(&held_up));
        // Nobody looked meanwhile.
        let missing = Notice::Missing { since_ns: wall(10) };
        assert_eq!(connected().heartbeat(PC, beat(50), &at(50)), [missing, held_up]);
    }

    #[test]
    fn a_clock_that_moves_is_noticed_once_and_a_late_heartbeat_is_none() {
        let mut presence = connected();
        assert_eq!(presence.heartbeat(PC, beat(12), &at(14)), []);
        assert_eq!(presence.heartbeat(PC, beat(12), &at(18)), [], "late");
        assert_eq!(presence.heartbeat(PC, beat(19), &at(19)), []);
        let offset = Notice::ClockOffset { offset_ns: -10_000_000_000 };
        assert_eq!(presence.heartbeat(PC, beat(10), &at(20)), []);
        assert_eq!(presence.heartbeat(PC, beat(14), &at(24)), [offset]);
        assert_eq!(presence.heartbeat(PC, beat(18), &at(28)), []);
    }

    #[test]
    fn who_was_revoked_is_not_missing() {
        let mut presence = connected();
        presence.forget(PC);
        assert_eq!(presence.heartbeat(PC, beat(14), &at(14)), []);
        assert_eq!(presence.tick(&at(60)), []);
    }

    #[test]
    fn the_servers_own_clock_may_jump() {
        let mut presence = connected();
        let jumped = Now { wall_ns: i64::MAX, ..at(12) };
        assert_eq!(presence.tick(&jumped), []);
    }
}
