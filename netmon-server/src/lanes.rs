//! Whose work is next in the store: no agent's makes another's wait for longer than work waits for company anyway. Pure.
//!
//! A step that is *light* (a PC's news, a few records) waits [`COMPANY_NS`] for others, so that all of a room share one
//! sync of the disk. What is *heavy* (a backlog, the readable logs) is done in that time, in parts of about
//! [`PART_NS`]: whoever is light then waits no longer than without it. Steps of one agent keep their order; heavy ones are
//! taken in turns, one agent after the other.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

/// How long a light step waits for company: a tenth of what a person notices, and enough to share one sync of the disk among
/// all PCs of a room.
pub const COMPANY_NS: u64 = 10_000_000;
/// How long heavy work goes on before light work is looked for again, unless the sync behind it takes longer.
pub const PART_NS: u64 = 4_000_000;
/// Most steps in a group of light ones.
pub const GROUP_STEPS: usize = 64;
/// The heaviest light step, in records of the usual size: 64 of them take as long as ten milliseconds.
pub const LIGHT_COST: u64 = 24;

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// A group of light steps: [`Lanes::pop_light`] until it is `None`.
    Light,
    /// A part of the heavy work, of steps ([`Lanes::pop_heavy`]) or of anything else. Where there is none, as
    /// [`Turn::Wait`] until then.
    Heavy(Option<u64>),
    /// Nothing until then.
    Wait(u64),
}

/// Steps that wait, each with its owner. `K` says whose they are.
#[derive(Debug)]
pub struct Lanes<K, T> {
    queues: HashMap<K, VecDeque<Step<T>>>,
    /// Owners whose next step is light.
    light: VecDeque<K>,
    /// Owners whose next step is heavy.
    heavy: VecDeque<K>,
    steps: usize,
    /// A group of light steps was the last that was done: heavy work is next, or it would never be.
    light_was_last: bool,
}

#[derive(Debug)]
struct Step<T> {
    came_ns: u64,
    is_light: bool,
    what: T,
}

impl<K, T> Default for Lanes<K, T> {
    fn default() -> Self {
        Self {
            queues: HashMap::new(),
            light: VecDeque::new(),
            heavy: VecDeque::new(),
            steps: 0,
            light_was_last: false,
        }
    }
}

impl<K: Clone + Eq + Hash, T> Lanes<K, T> {
    /// A step of this cost came, behind all others of its owner.
    pub fn push(&mut self, owner: K, cost: u64, came_ns: u64, what: T) {
        let is_light = cost <= LIGHT_COST;
        let queue = self.queues.entry(owner.clone()).or_default();
        if queue.is_empty() {
            let lane = if is_light { &mut self.light } else { &mut self.heavy };
            lane.push_back(owner);
        }
        queue.push_back(Step { came_ns, is_light, what });
        self.steps += 1;
    }

    /// Steps that wait.
    pub fn len(&self) -> usize {
        self.steps
    }

    /// True when none waits.
    pub fn is_empty(&self) -> bool {
        self.steps == 0
    }

    /// True when a heavy step is next of some owner.
    pub fn has_heavy(&self) -> bool {
        !self.heavy.is_empty()
    }

    /// What to do at this time; it is to be done before this is asked again.
    pub fn turn(&mut self, now_ns: u64) -> Turn {
        let oldest =
            self.light.iter().filter_map(|owner| Some(self.queues.get(owner)?.front()?.came_ns)).min();
        let due_ns = oldest.map(|came_ns| came_ns.saturating_add(COMPANY_NS));
        let is_due = due_ns.is_some_and(|due_ns| due_ns <= now_ns)
            || self.light.len() >= GROUP_STEPS
            || self.steps >= 2 * GROUP_STEPS;
        match due_ns {
            None => {
                self.light_was_last = false;
                Turn::Heavy(None)
            }
            Some(due_ns) if self.light_was_last => {
                self.light_was_last = false;
                Turn::Heavy(Some(due_ns))
            }
            Some(_) if is_due => {
                self.light_was_last = true;
                Turn::Light
            }
            Some(due_ns) => Turn::Wait(due_ns),
        }
    }

    /// The next light step.
    pub fn pop_light(&mut self) -> Option<T> {
        let owner = self.light.pop_front()?;
        self.pop(owner)
    }

    /// The next heavy step: of the owner whose last one is longest ago.
    pub fn pop_heavy(&mut self) -> Option<T> {
        let owner = self.heavy.pop_front()?;
        self.pop(owner)
    }

    fn pop(&mut self, owner: K) -> Option<T> {
        let queue = self.queues.get_mut(&owner)?;
        let step = queue.pop_front()?;
        self.steps -= 1;
        match queue.front() {
            Some(next) if next.is_light => self.light.push_back(owner),
            Some(_) => self.heavy.push_back(owner),
            None => {
                self.queues.remove(&owner);
            }
        }
        Some(step.what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAVY: u64 = LIGHT_COST + 1;

    fn all_light(lanes: &mut Lanes<u8, u32>) -> Vec<u32> {
        std::iter::from_fn(|| lanes.pop_light()).collect()
    }

    #[test]
    fn light_steps_wait_for_company_from_their_coming_on() {
        let mut lanes = Lanes::default();
        assert_eq!(lanes.turn(5), Turn::Heavy(None));
        lanes.push(1, 1, 100, 11);
        lanes.push(2, LIGHT_COST, 200, 21);
        assert_eq!(lanes.turn(200), Turn::Wait(100 + COMPANY_NS));
        assert_eq!(lanes.turn(100 + COMPANY_NS), Turn::Light);
        assert_eq!(all_light(&mut lanes), [11, 21]);
        assert!(lanes.is_empty());
    }

    #[test]
    fn a_full_group_waits_no_longer() {
        let mut lanes = Lanes::default();
        for owner in 0..GROUP_STEPS as u8 {
            assert_ne!(lanes.turn(0), Turn::Light);
            lanes.push(owner, 1, 0, 0);
        }
        assert_eq!(lanes.turn(0), Turn::Light);
    }

    #[test]
    fn heavy_work_is_done_when_nobody_light_waits_and_once_behind_each_light_group() {
        let mut lanes = Lanes::default();
        lanes.push(1, HEAVY, 0, 1);
        assert_eq!(lanes.turn(0), Turn::Heavy(None));
        lanes.push(2, 1, 0, 2);
        // It would make the light one wait for longer.
        assert_eq!(lanes.turn(COMPANY_NS - 1), Turn::Wait(COMPANY_NS));
        assert_eq!(lanes.turn(COMPANY_NS), Turn::Light);
        assert_eq!(all_light(&mut lanes), [2]);
        // The next light one has come already, and long ago.
        lanes.push(2, 1, 1, 3);
        assert_eq!(lanes.turn(9 * COMPANY_NS), Turn::Heavy(Some(COMPANY_NS + 1)));
        assert_eq!(lanes.turn(9 * COMPANY_NS), Turn::Light);
    }

    #[test]
    fn steps_of_one_owner_keep_their_order() {
        let mut lanes = Lanes::default();
        for (number, cost) in [1, HEAVY, 1, 1, HEAVY].into_iter().enumerate() {
            lanes.push(7, cost, 0, number as u32);
        }
        assert_eq!(all_light(&mut lanes), [0]);
        assert_eq!(lanes.pop_heavy(), Some(1));
        assert_eq!(all_light(&mut lanes), [2, 3]);
        assert_eq!((lanes.len(), lanes.pop_heavy(), lanes.pop_heavy()), (1, Some(4), None));
        assert!(lanes.queues.is_empty() && lanes.heavy.is_empty() && lanes.light.is_empty());
    }

    #[test]
    fn owners_of_heavy_work_take_turns() {
        let mut lanes = Lanes::default();
        for number in [10, 11, 12] {
            lanes.push(1, HEAVY, 0, number);
        }
        lanes.push(2, HEAVY, 0, 20);
        let order: Vec<_> = std::iter::from_fn(|| lanes.pop_heavy()).collect();
        assert_eq!(order, [10, 20, 11, 12]);
    }
}
