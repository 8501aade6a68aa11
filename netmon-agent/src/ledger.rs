//! The muted ledger: traffic without transfer lines, summed per label, never forgotten.

use std::collections::BTreeMap;

use netmon_common::model::{Muted, Traffic};
use netmon_common::raw::Raw;

/// Ledger label of broadcast and multicast.
pub const GROUP: &str = "group";
/// Ledger label of the agent's own connection to the server.
pub const OWN: &str = "netmon";
/// Ledger label of bursts that only acknowledged or were refused.
pub const NO_PAYLOAD: &str = "no-payload";
/// Ledger label of what was read from USB disks before anything of them was mounted.
pub const USB_PROBE: &str = "usb:probe";
/// Ledger label of what could not be followed because too many transfers went on.
pub const OVERFLOW: &str = "overflow";

/// Sums since the last [`Ledger::drain`].
#[derive(Debug, Default)]
pub struct Ledger {
    sums: BTreeMap<String, (Traffic, u64)>,
    since_wall_ns: i64,
    period: u64,
}

impl Ledger {
    /// An empty ledger whose first period begins at `since_wall_ns`.
    pub fn new(since_wall_ns: i64) -> Self {
        Self { sums: BTreeMap::new(), since_wall_ns, period: 1 }
    }

    /// Number of the period that is open now, from 1: who adds per flow can tell the flow's first time in it.
    pub fn period(&self) -> u64 {
        self.period
    }

    /// Adds what moved; `flows` of those that moved it are new in this period.
    pub fn add(&mut self, label: &str, traffic: Traffic, flows: u64) {
        // Labels are few and repeat: look before an allocation.
        if !self.sums.contains_key(label) {
            self.sums.insert(label.to_owned(), Default::default());
        }
        if let Some((sum, flow_count)) = self.sums.get_mut(label) {
            *sum += traffic;
            *flow_count += flows;
        }
    }

    /// Closes the period: one entry per label that moved something.
    pub fn drain(&mut self, now_wall_ns: i64) -> Vec<Muted> {
        self.period += 1;
        let from_wall_ns = std::mem::replace(&mut self.since_wall_ns, now_wall_ns);
        std::mem::take(&mut self.sums)
            .into_iter()
            .map(|(label, (traffic, flows))| Muted {
                label: Raw::new(label),
                from_wall_ns,
                to_wall_ns: now_wall_ns,
                traffic,
                flows,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_appears_in_exactly_one_period() {
        let mut ledger = Ledger::new(10);
        let traffic = Traffic { rx_bytes: 100, ..Traffic::default() };
        ledger.add("amazon", traffic, 1);
        ledger.add("amazon", traffic, 1);
        ledger.add(GROUP, traffic, 1);
        let first = ledger.drain(20);
        assert_eq!(first.iter().map(|m| m.traffic.rx_bytes).collect::<Vec<_>>(), [200, 100]);
        assert_eq!((first[0].from_wall_ns, first[0].to_wall_ns, first[0].flows), (10, 20, 2));
        assert!(ledger.drain(30).is_empty());
        ledger.add("amazon", traffic, 1);
        assert_eq!(ledger.drain(40)[0].from_wall_ns, 30);
    }
}
