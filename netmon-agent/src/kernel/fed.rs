//! The readers of the ring buffer, the flow tables and netlink, fed by whoever wants to know what they make of any bytes
//! at all. Nothing of the agent's own.

use std::{io, sync::atomic::Ordering};

use netmon_common::abi::{LIFE_WORDS, SLOT_WORDS, Slot4, Slot6, stamp};

use super::{
    flows::{self, FlowDelta, Record},
    mapping::Mapping,
    netlink,
    table::{self, Scope, Shared, Table},
};

/// Slots of each family: one region.
pub const SLOTS: usize = table::REGION_SLOTS;

/// Flow tables without a kernel, written by their owner.
pub struct Tables {
    table4: Table<Slot4>,
    table6: Table<Slot6>,
    shared: Shared,
}

impl Tables {
    /// Empty tables.
    ///
    /// # Errors
    /// No memory.
    pub fn new() -> io::Result<Self> {
        let shared = Shared {
            touched: Mapping::blank(2 * size_of::<u16>())?,
            lives: Mapping::blank(2 * SLOTS * LIFE_WORDS * 8)?,
        };
        let slots = || Mapping::blank(SLOTS * SLOT_WORDS * 8);
        Ok(Self { table4: Table::of(slots()?, 1, 0), table6: Table::of(slots()?, 1, 1), shared })
    }

    /// A slot of IPv6 (or IPv4) becomes these words, at this boot time.
    pub fn write_slot(&self, ipv6: bool, slot: usize, words: &[u64; SLOT_WORDS], now_ns: u64) {
        let (table, length) = if ipv6 {
            (self.table6.slots(), size_of::<Slot6>() / 8)
        } else {
            (self.table4.slots(), size_of::<Slot4>() / 8)
        };
        for (index, word) in words[..length].iter().enumerate() {
            table.word(slot % SLOTS * length + index).store(*word, Ordering::Relaxed);
        }
        self.shared.touched.quarter(usize::from(ipv6)).store(stamp(now_ns), Ordering::Relaxed);
    }

    /// A slot's life becomes these words.
    pub fn write_life(&self, ipv6: bool, slot: usize, words: &[u64; LIFE_WORDS]) {
        let at = (usize::from(ipv6) * SLOTS + slot % SLOTS) * LIFE_WORDS;
        for (index, word) in words.iter().enumerate() {
            self.shared.lives.word(at + index).store(*word, Ordering::Relaxed);
        }
    }

    /// Takes in a record of the ring. False: it makes no sense.
    pub fn take(&mut self, record: &[u8], now_ns: u64, out: &mut Vec<FlowDelta>) -> bool {
        match flows::record(record) {
            Some(Record::Opened(opened)) => flows::FlowId::of(&opened).is_some(),
            Some(Record::Evicted(evicted)) => match evicted.family {
                4 => self.table4.take_evicted(&evicted, now_ns, out),
                6 => self.table6.take_evicted(&evicted, now_ns, out),
                _ => false,
            },
            None => false,
        }
    }

    /// Reads what was written since that boot time.
    pub fn sweep(&mut self, since_ns: u64, now_ns: u64, out: &mut Vec<FlowDelta>) {
        self.table4.read(&self.shared, Scope::Since(since_ns), now_ns, out);
        self.table6.read(&self.shared, Scope::Since(since_ns), now_ns, out);
        self.table4.read_changed(&self.shared, now_ns, out);
        self.table6.read_changed(&self.shared, now_ns, out);
    }
}

/// The names that a datagram of netlink has for an interface and for the filters on it.
///
/// # Errors
/// It is an error of the kernel's, or none of netlink's datagrams.
pub fn netlink(datagram: &[u8], ifindex: u32) -> io::Result<(Option<String>, Vec<String>)> {
    let (link, filters) = netlink::read(datagram, ifindex)?;
    Ok((link.map(|link| link.name), filters.into_iter().map(|filter| filter.name).collect()))
}
