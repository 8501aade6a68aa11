//! How often what happened.

use std::collections::BTreeMap;

/// Faults that are made, by chance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A connection breaks, maybe in the middle of a frame.
    Cut,
    /// Nothing gets through between a PC and the server for a while.
    Partition,
    /// The agent is stopped in good order.
    AgentStop,
    /// The agent is killed.
    AgentKill,
    /// The agent is killed, or its PC loses its power, in the middle of a call to its disk.
    AgentDiesInCall,
    /// The PC loses its power.
    PcPowerCut,
    /// A call to the spool's disk fails.
    SpoolError,
    /// The spool's disk is read-only for a while.
    SpoolReadOnly,
    /// The spool's disk is full for a while.
    SpoolDiskFull,
    /// A file of the spool is damaged.
    SpoolDamage,
    /// The spool is deleted.
    SpoolDeleted,
    /// The spool is set back to an older state.
    SpoolSetBack,
    /// The PC's clock is set.
    PcClock,
    /// The server is stopped in good order.
    ServerStop,
    /// The server is killed.
    ServerKill,
    /// The server is killed, or loses its power, in the middle of a call to its disk.
    ServerDiesInCall,
    /// The server loses its power.
    ServerPowerCut,
    /// A call to the store's disk fails.
    StoreError,
    /// Many calls to the store's disk fail for a while.
    StoreFails,
    /// The store's disk is full for a while.
    StoreDiskFull,
    /// The store is set back to an older state.
    StoreSetBack,
    /// The server's clock is set.
    ServerClock,
}

impl Fault {
    /// Does it take away what was promised?
    pub fn is_destructive(self) -> bool {
        matches!(self, Self::SpoolDamage | Self::SpoolDeleted | Self::SpoolSetBack | Self::StoreSetBack)
    }
}

/// All of them.
pub const FAULTS: [Fault; 22] = [
    Fault::Cut,
    Fault::Partition,
    Fault::AgentStop,
    Fault::AgentKill,
    Fault::AgentDiesInCall,
    Fault::PcPowerCut,
    Fault::SpoolError,
    Fault::SpoolReadOnly,
    Fault::SpoolDiskFull,
    Fault::SpoolDamage,
    Fault::SpoolDeleted,
    Fault::SpoolSetBack,
    Fault::PcClock,
    Fault::ServerStop,
    Fault::ServerKill,
    Fault::ServerDiesInCall,
    Fault::ServerPowerCut,
    Fault::StoreError,
    Fault::StoreFails,
    Fault::StoreDiskFull,
    Fault::StoreSetBack,
    Fault::ServerClock,
];

/// Counts, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Faults that were made.
    pub faults: BTreeMap<Fault, u64>,
    /// What else happened.
    pub events: BTreeMap<&'static str, u64>,
}

impl Tally {
    /// A fault was made.
    pub fn fault(&mut self, fault: Fault) {
        *self.faults.entry(fault).or_default() += 1;
    }

    /// Something happened so many times.
    pub fn event(&mut self, name: &'static str, count: u64) {
        *self.events.entry(name).or_default() += count;
    }

    /// Adds another tally.
    pub fn add(&mut self, other: &Self) {
        for (fault, count) in &other.faults {
            *self.faults.entry(*fault).or_default() += count;
        }
        for (name, count) in &other.events {
            self.event(name, *count);
        }
    }
}
