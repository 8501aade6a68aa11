//! Who is let in to begin a conversation: a peer that is unknown so far holds few places and calls seldom, so that it cannot
//! take everybody's.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use quinn::Incoming;

use crate::clock::Now;
use crate::limits::{ALL_STRANGE_CALLS, Bucket, Buckets, Rate, STRANGE_CALLS};
use crate::tls::shown;

/// Refusals are said at most this often.
const SAY_EVERY_NS: i64 = 1_000_000_000;

/// How many there are.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    /// For one IP address.
    pub per_address: usize,
    /// In all.
    pub total: usize,
    /// Of these, places that strangers do not get: one host may have any number of IPv6 addresses.
    pub reserved: usize,
}

/// Counts those that are inside and not known yet.
#[derive(Debug)]
pub struct Gate {
    /// For messages: which listener.
    what: &'static str,
    /// Places for one IP address.
    per_address: usize,
    /// Places in all.
    total: usize,
    /// Of these, places that strangers do not get: one host may have any number of IPv6 addresses.
    reserved: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    places: HashMap<IpAddr, usize>,
    taken: usize,
    /// Of these, by strangers.
    strangers: usize,
    /// The address from which each known agent called last: one that has many brings its newest alone.
    callers: HashMap<[u8; 16], IpAddr>,
    /// These addresses, with the number of agents that called from each.
    guests: HashMap<IpAddr, usize>,
    strange_calls: Buckets<IpAddr>,
    guest_calls: Buckets<IpAddr>,
    all_strange_calls: Bucket,
    refused: u64,
    said_ns: Option<i64>,
}

impl State {
    fn vouch(&mut self, uuid: [u8; 16], address: IpAddr) {
        *self.guests.entry(address).or_default() += 1;
        let Some(before) = self.callers.insert(uuid, address) else { return };
        let left = self.guests.remove(&before).unwrap_or_default().saturating_sub(1);
        if left > 0 {
            self.guests.insert(before, left);
        }
    }

    /// Counts a call of this address, where it may call again.
    fn may_call(&mut self, address: IpAddr, is_stranger: bool, boot_ns: u64) -> bool {
        if is_stranger {
            // The address first: one that calls all the time leaves the others theirs.
            self.strange_calls.try_take(address, boot_ns) && self.all_strange_calls.try_take(1, boot_ns)
        } else {
            self.guest_calls.try_take(address, boot_ns)
        }
    }
}

/// A place; free again when this is dropped.
#[derive(Debug)]
pub struct Place {
    gate: Arc<Gate>,
    address: IpAddr,
    is_stranger: bool,
}

impl Place {
    /// Who took it turned out to be the agent with this identity: calls from this address get a place also when strangers have
    /// taken theirs.
    pub fn vouch(&self, uuid: [u8; 16]) {
        self.gate.state().vouch(uuid, self.address);
    }
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// This address has as many as it may have.
    Address,
    /// Everything is taken.
    All,
    /// There were too many calls lately, of this address or of all strangers.
    Often,
}

impl Gate {
    /// A gate with so many places; an address from which somebody known called may call so often.
    pub fn new(what: &'static str, places: Places, guest_calls: Rate) -> Arc<Self> {
        let Places { per_address, total, reserved } = places;
        let state = State {
            places: HashMap::new(),
            taken: 0,
            strangers: 0,
            callers: HashMap::new(),
            guests: HashMap::new(),
            strange_calls: Buckets::new(STRANGE_CALLS),
            guest_calls: Buckets::new(guest_calls),
            all_strange_calls: ALL_STRANGE_CALLS.bucket(),
            refused: 0,
            said_ns: None,
        };
        Arc::new(Self { what, per_address, total, reserved, state: Mutex::new(state) })
    }

    /// Takes a place for `address`.
    ///
    /// # Errors
    /// [`Full`]; it is counted.
    pub fn enter(self: &Arc<Self>, address: IpAddr, boot_ns: u64) -> Result<Place, Full> {
        let mut state = self.state();
        let held = state.places.get(&address).copied().unwrap_or_default();
        let is_stranger = !state.guests.contains_key(&address);
        let full = if held >= self.per_address {
            Full::Address
        } else if state.taken >= self.total || is_stranger && state.strangers + self.reserved >= self.total {
            Full::All
        } else if !state.may_call(address, is_stranger, boot_ns) {
            Full::Often
        } else {
            state.places.insert(address, held + 1);
            state.taken += 1;
            state.strangers += usize::from(is_stranger);
            return Ok(Place { gate: self.clone(), address, is_stranger });
        };
        state.refused += 1;
        Err(full)
    }

    /// True when refusals were counted and not said.
    pub fn has_unsaid(&self) -> bool {
        self.state().refused > 0
    }

    /// The refusals since this last gave some; `None` when there are none, or when that was less than a second ago.
    pub fn refusals(&self, now_ns: i64) -> Option<u64> {
        let mut state = self.state();
        if state.refused == 0 || state.said_ns.is_some_and(|said| now_ns.abs_diff(said) < SAY_EVERY_NS as u64)
        {
            return None;
        }
        state.said_ns = Some(now_ns);
        Some(std::mem::take(&mut state.refused))
    }

    /// Says in the server's own log how many were refused, when it is time.
    pub fn say_refusals(&self, now_ns: i64) {
        if let Some(refused) = self.refusals(now_ns) {
            tracing::warn!(
                listener = self.what,
                refused,
                "connections were not let in: too many that are not finished, or too many calls, from one address or in all"
            );
        }
    }

    /// Answers what cannot be served, and hands out what can: peers that have shown that they own their address, and
    /// for which there is a place. `has_room`: the listener can take one more at all.
    pub fn admit(
        self: &Arc<Self>,
        incoming: Incoming,
        has_room: bool,
        now: Now,
    ) -> Option<(Incoming, Place)> {
        if !incoming.remote_address_validated() {
            if incoming.may_retry() {
                // It may: that is what this branch asks.
                let _ = incoming.retry();
            } else {
                incoming.ignore();
            }
            return None;
        }
        let entered = self.enter(shown(incoming.remote_address()).ip(), now.boot_ns);
        match entered {
            Ok(place) if has_room => return Some((incoming, place)),
            // Not answered: it asks again within a second or two, when there may be a place.
            Err(Full::Address | Full::Often) => incoming.ignore(),
            Err(Full::All) => incoming.refuse(),
            Ok(_) => {
                self.state().refused += 1;
                incoming.refuse();
            }
        }
        self.say_refusals(now.wall_ns);
        None
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.gate.state();
        state.taken -= 1;
        state.strangers -= usize::from(self.is_stranger);
        let left = state.places.remove(&self.address).unwrap_or_default().saturating_sub(1);
        if left > 0 {
            state.places.insert(self.address, left);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::GUEST_CALLS;

    const SECOND: i64 = 1_000_000_000;
    /// Boot clock, when it does not matter.
    const BOOT: u64 = 1_000_000_000_000;

    fn gate(per_address: usize, total: usize, reserved: usize) -> Arc<Gate> {
        Gate::new("test", Places { per_address, total, reserved }, GUEST_CALLS)
    }

    fn address(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    #[test]
    fn one_address_cannot_take_the_places_of_the_others() {
        let gate = gate(2, 3, 0);
        let first = gate.enter(address(1), BOOT).unwrap();
        let _second = gate.enter(address(1), BOOT).unwrap();
        assert_eq!(gate.enter(address(1), BOOT).unwrap_err(), Full::Address);
        let _other = gate.enter(address(2), BOOT).unwrap();
        assert_eq!(gate.enter(address(3), BOOT).unwrap_err(), Full::All);
        drop(first);
        let _third = gate.enter(address(1), BOOT).unwrap();
        assert_eq!(gate.enter(address(1), BOOT).unwrap_err(), Full::Address);
    }

    #[test]
    fn strangers_leave_places_for_those_who_are_known() {
        let gate = gate(2, 4, 2);
        gate.enter(address(9), BOOT).unwrap().vouch([9; 16]);
        let _strangers = [gate.enter(address(1), BOOT).unwrap(), gate.enter(address(2), BOOT).unwrap()];
        assert_eq!(gate.enter(address(3), BOOT).unwrap_err(), Full::All);
        let _known = [gate.enter(address(9), BOOT).unwrap(), gate.enter(address(9), BOOT).unwrap()];
        assert_eq!(gate.enter(address(9), BOOT).unwrap_err(), Full::Address);
    }

    #[test]
    fn an_agent_with_many_addresses_makes_one_of_them_known() {
        let gate = gate(1, 10, 0);
        for last in 0..1_000_u128 {
            let address: IpAddr = std::net::Ipv6Addr::from_bits(last).into();
            gate.enter(address, BOOT + last as u64 * SECOND as u64).unwrap().vouch([7; 16]);
        }
        assert_eq!(gate.state().guests.len(), 1);
        assert_eq!(gate.state().callers.len(), 1);
        // Two behind one address; one of them moves.
        let calls = |last| gate.enter(address(last), BOOT + 2_000 * SECOND as u64).unwrap();
        calls(1).vouch([1; 16]);
        calls(1).vouch([1; 16]);
        calls(1).vouch([2; 16]);
        calls(2).vouch([1; 16]);
        assert_eq!(gate.state().guests.get(&address(1)), Some(&1));
        assert_eq!(gate.state().guests.get(&address(2)), Some(&1));
    }

    #[test]
    fn places_that_are_left_are_forgotten() {
        let gate = gate(2, 3, 0);
        drop((gate.enter(address(1), BOOT).unwrap(), gate.enter(address(1), BOOT).unwrap()));
        assert!(gate.state().places.is_empty());
        assert_eq!(gate.state().taken, 0);
    }

    #[test]
    fn refusals_are_said_once_a_second_and_none_is_forgotten() {
        let gate = gate(0, 0, 0);
        assert_eq!(gate.refusals(0), None);
        gate.enter(address(1), BOOT).unwrap_err();
        assert_eq!(gate.refusals(SECOND), Some(1));
        gate.enter(address(1), BOOT).unwrap_err();
        gate.enter(address(2), BOOT).unwrap_err();
        assert_eq!(gate.refusals(2 * SECOND - 1), None);
        assert!(gate.has_unsaid());
        assert_eq!(gate.refusals(2 * SECOND), Some(2));
        assert!(!gate.has_unsaid());
    }

    #[test]
    fn who_calls_all_the_time_is_heard_now_and_then_and_the_others_always() {
        let gate = gate(2, 4, 2);
        gate.enter(address(9), BOOT).unwrap().vouch([9; 16]);
        let calls = |last, at| (0..1_000).filter(|_| gate.enter(address(last), at).is_ok()).count() as u64;
        assert_eq!(calls(1, BOOT), STRANGE_CALLS.burst);
        assert_eq!(gate.enter(address(1), BOOT).unwrap_err(), Full::Often);
        assert_eq!(calls(1, BOOT + SECOND as u64), STRANGE_CALLS.per_second);
        assert_eq!(calls(2, BOOT), STRANGE_CALLS.burst);
        // Somebody known called from there.
        assert_eq!(calls(9, BOOT), GUEST_CALLS.burst);
    }

    #[test]
    fn strangers_with_many_addresses_share_a_limit_that_guests_do_not() {
        let gate = gate(2, 4, 2);
        gate.enter(address(9), BOOT).unwrap().vouch([9; 16]);
        let many = (0..10_000_u128).map(|n| std::net::Ipv6Addr::from_bits(n).into());
        let heard = many.filter(|address| gate.enter(*address, BOOT).is_ok()).count() as u64;
        assert_eq!(heard, ALL_STRANGE_CALLS.burst - 1);
        assert!(gate.enter(address(9), BOOT).is_ok());
    }
}
