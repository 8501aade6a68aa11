//! Reading the flow tables without system calls and without locks, while the programs write to them.
//!
//! A slot has one writer, the CPU that it belongs to (`netmon-ebpf`, flow.rs). Nobody waits for anybody:
//!
//! * A packet adds to the other counters first and to the packets' word last. Whoever reads that word first has at least
//!   the bytes of these packets; what came later is read the next time.
//! * A slot changes hands in this order: a record of what the agent has not read goes into the ring; the incarnation becomes
//!   0; the fields are written; the incarnation becomes the next one. Whoever reads the same incarnation before and after
//!   has read one flow, and whoever sees another incarnation than the last time finds that one's record in the ring.
//! * What was read is told to the program: the packets' word, then the incarnation. If both are still the slot's, the flow
//!   may be replaced without a record.
//! * A record counts as read to the end, for the slot may still show its flow; and a slot that shows another one is not read
//!   before everything that was in the ring by then was taken, for another CPU's unfinished record may hold up the one that is
//!   missing.
//!
//! So every count arrives once: as the difference between two readings, or between the last reading and the record. All of
//! this rests on stores and loads of different CPUs being seen in program order, as on x86-64.

use std::{
    collections::BTreeSet,
    io,
    sync::atomic::{Ordering, fence},
};

use aya::maps::MapData;
use netmon_common::abi::{
    Counts, Evicted, LIFE_WORDS, Life, Ports, REGION_SETS, SLOT_WORDS, STAMP_SHIFT, Slot4, Slot6, TICK_NS,
    TICK_SHIFT, WAYS, stamp,
};

use super::{
    flows::{FlowDelta, FlowId, Moved},
    mapping::Mapping,
};

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the flow tables are read without locks in a way that is exact on x86-64 alone");

/// How a family's slots are read.
pub(super) trait Layout: Copy {
    /// Words of eight bytes in a slot.
    const WORDS: usize;
    /// Where in it the packets' word is, bytes.
    const PACKETS: usize;

    fn of(words: [u64; SLOT_WORDS]) -> Self;
    fn flow(&self) -> FlowId;
    fn parts(&self) -> (&Ports, &Counts);
}

macro_rules! layout {
    ($slot:ty, $address:ty) => {
        impl Layout for $slot {
            const WORDS: usize = size_of::<$slot>() / 8;
            const PACKETS: usize =
                std::mem::offset_of!($slot, counts) + std::mem::offset_of!(Counts, tx_packets);

            fn of(words: [u64; SLOT_WORDS]) -> Self {
                // SAFETY: not more bytes than there are (the border proves it), and every pattern is a value of a slot.
                unsafe { words.as_ptr().cast::<Self>().read_unaligned() }
            }

            fn flow(&self) -> FlowId {
                FlowId {
                    local: (<$address>::from(self.local_addr), self.ports.local_port).into(),
                    remote: (<$address>::from(self.remote_addr), self.ports.remote_port).into(),
                    protocol: self.ports.protocol,
                }
            }

            fn parts(&self) -> (&Ports, &Counts) {
                (&self.ports, &self.counts)
            }
        }
    };
}
layout!(Slot4, std::net::Ipv4Addr);
layout!(Slot6, std::net::Ipv6Addr);

fn life_of(words: [u64; LIFE_WORDS]) -> Life {
    // SAFETY: as many bytes (the border proves it), and every pattern is a value.
    unsafe { std::mem::transmute(words) }
}

/// What was read of a slot. Incarnation 0: nothing yet.
#[derive(Clone, Copy, Default)]
struct Seen {
    incarnation: u32,
    last_tick: u32,
    tx_packets: u32,
    rx_packets: u32,
    tx_bytes: u64,
    rx_bytes: u64,
    tx_payload: u64,
    rx_payload: u64,
}

/// Nothing was read of so many slots. Takes memory where flows are read, no sooner.
fn unseen(slots: usize) -> Box<[Seen]> {
    let seen = Box::new_zeroed_slice(slots);
    // SAFETY: integers only, so zeros are a value.
    unsafe { seen.assume_init() }
}

/// How much of a table to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// All of it.
    Everything,
    /// The regions that were written to at this boot time or later, nanoseconds.
    Since(u64),
}

/// A [`Scope`] in terms of the regions' [`stamp`]s.
#[derive(Clone, Copy)]
struct Stamps {
    first: u16,
    length: u16,
}

/// Packets go on writing while a sweep reads, and a process may be held up in the middle of it: 69 s.
const AHEAD: u64 = 1 << 10;

impl Stamps {
    fn of(scope: Scope, now_ns: u64) -> Self {
        let all = Self { first: 0, length: u16::MAX };
        let Scope::Since(since_ns) = scope else { return all };
        let length = (now_ns.saturating_sub(since_ns) >> STAMP_SHIFT) + AHEAD;
        u16::try_from(length).map_or(all, |length| Self { first: stamp(since_ns), length })
    }

    /// Is a region with this stamp to be read? One that was written to 73 minutes ago is read without need.
    fn include(self, at: u16) -> bool {
        at != 0 && at.wrapping_sub(self.first) <= self.length
    }
}

/// What both families' tables are read by.
pub(super) struct Shared {
    /// When each region was last written to.
    pub touched: Mapping,
    /// The lives of all slots.
    pub lives: Mapping,
}

/// One family's table.
pub(super) struct Table<L> {
    slots: Mapping,
    regions: usize,
    first_region: usize,
    seen: Box<[Seen]>,
    /// Slots that changed hands between two readings, and whose last record has perhaps not come yet.
    changed: BTreeSet<usize>,
    layout: std::marker::PhantomData<L>,
}

pub(super) const REGION_SLOTS: usize = REGION_SETS * WAYS;

impl<L: Layout> Table<L> {
    /// Of a map with this many regions; `first_region` is the number of the first one among both
    /// families'.
    pub fn new(map: &MapData, regions: usize, first_region: usize) -> io::Result<Self> {
        Ok(Self::of(Mapping::new(map)?, regions, first_region))
    }

    /// Of a map's memory; see [`Self::new`].
    pub fn of(slots: Mapping, regions: usize, first_region: usize) -> Self {
        Self {
            slots,
            regions,
            first_region,
            seen: unseen(regions * REGION_SLOTS),
            changed: BTreeSet::new(),
            layout: std::marker::PhantomData,
        }
    }

    /// The slots' memory.
    pub fn slots(&self) -> &Mapping {
        &self.slots
    }

    /// Reads what has moved. Slots that changed hands wait for [`Self::read_changed`].
    pub fn read(&mut self, shared: &Shared, scope: Scope, now_ns: u64, out: &mut Vec<FlowDelta>) {
        let stamps = Stamps::of(scope, now_ns);
        for region in 0..self.regions {
            let at = shared.touched.quarter(self.first_region + region).load(Ordering::Relaxed);
            if stamps.include(at) {
                for slot in region * REGION_SLOTS..(region + 1) * REGION_SLOTS {
                    self.read_slot(shared, slot, false, now_ns, out);
                }
            }
        }
    }

    /// Reads the slots that had changed hands. To be called when all records have been taken that were in the ring when that
    /// was noticed: they had what was missing of the flows before.
    pub fn read_changed(&mut self, shared: &Shared, now_ns: u64, out: &mut Vec<FlowDelta>) {
        for slot in std::mem::take(&mut self.changed) {
            self.read_slot(shared, slot, true, now_ns, out);
        }
    }

    /// Takes in a record of this table. False: it is of no slot.
    ///
    /// The slot may still show the flow that the record is of: the record comes first. So it counts as read, to the end.
    pub fn take_evicted(&mut self, evicted: &Evicted, now_ns: u64, out: &mut Vec<FlowDelta>) -> bool {
        let Some(seen) = self.seen.get_mut(evicted.slot as usize) else {
            return false;
        };
        let (slot, life) = (L::of(evicted.words), life_of(evicted.life));
        let ahead = life.incarnation.wrapping_sub(seen.incarnation).cast_signed();
        let before = if ahead == 0 { *seen } else { Seen::default() };
        out.extend(delta(&slot, &life, &before, now_ns));
        if seen.incarnation == 0 || ahead >= 0 {
            *seen = seen_of(&slot, &life);
        }
        true
    }

    /// `settled`: whatever flow the slot had before, all of it was taken in.
    fn read_slot(
        &mut self,
        shared: &Shared,
        slot: usize,
        settled: bool,
        now_ns: u64,
        out: &mut Vec<FlowDelta>,
    ) {
        let Some(seen) = self.seen.get_mut(slot) else {
            return;
        };
        let life_at = (self.first_region * REGION_SLOTS + slot) * LIFE_WORDS;
        let life_half = |offset: usize| shared.lives.half(life_at * 2 + offset / 4);
        let incarnation = life_half(std::mem::offset_of!(Life, incarnation));
        let slot_at = slot * L::WORDS;
        let packets = self.slots.word(slot_at + L::PACKETS / 8);

        let before = incarnation.load(Ordering::Acquire);
        if before == 0 {
            return;
        }
        if seen.incarnation != 0 && seen.incarnation != before {
            if !settled {
                self.changed.insert(slot);
                return;
            }
            *seen = Seen::default();
        }
        let counted = packets.load(Ordering::Acquire);
        if seen.incarnation == before && counted == packets_word(seen.tx_packets, seen.rx_packets) {
            return;
        }
        let (mut words, mut life) = ([0; SLOT_WORDS], [0; LIFE_WORDS]);
        for (index, word) in words[..L::WORDS].iter_mut().enumerate() {
            *word = self.slots.word(slot_at + index).load(Ordering::Relaxed);
        }
        for (index, word) in life.iter_mut().enumerate() {
            *word = shared.lives.word(life_at + index).load(Ordering::Relaxed);
        }
        fence(Ordering::Acquire);
        if incarnation.load(Ordering::Relaxed) != before {
            // It changes hands at this moment. The region is written to just now, so the next sweep comes here again.
            if seen.incarnation != 0 {
                self.changed.insert(slot);
            }
            return;
        }
        words[L::PACKETS / 8] = counted;
        let (state, life) = (L::of(words), life_of(life));
        out.extend(delta(&state, &life, seen, now_ns));
        *seen = seen_of(&state, &life);

        let read_packets = shared.lives.word(life_at + std::mem::offset_of!(Life, read_tx_packets) / 8);
        read_packets.store(counted, Ordering::Release);
        life_half(std::mem::offset_of!(Life, read_incarnation)).store(before, Ordering::Release);
    }
}

/// Two counters as they are in one word in memory.
fn packets_word(tx: u32, rx: u32) -> u64 {
    let ([a, b, c, d], [e, f, g, h]) = (tx.to_ne_bytes(), rx.to_ne_bytes());
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

fn seen_of<L: Layout>(slot: &L, life: &Life) -> Seen {
    let (_, counts) = slot.parts();
    Seen {
        incarnation: life.incarnation,
        last_tick: counts.last_tick,
        tx_packets: counts.tx_packets,
        rx_packets: counts.rx_packets,
        tx_bytes: counts.tx_bytes,
        rx_bytes: counts.rx_bytes,
        tx_payload: counts.tx_payload,
        rx_payload: counts.rx_payload,
    }
}

/// What a slot has counted beyond what was seen of it; `None` when that is nothing.
fn delta<L: Layout>(slot: &L, life: &Life, seen: &Seen, now_ns: u64) -> Option<FlowDelta> {
    let (ports, counts) = slot.parts();
    let moved = Moved {
        tx_packets: counts.tx_packets.wrapping_sub(seen.tx_packets).into(),
        rx_packets: counts.rx_packets.wrapping_sub(seen.rx_packets).into(),
        tx_bytes: counts.tx_bytes.wrapping_sub(seen.tx_bytes),
        rx_bytes: counts.rx_bytes.wrapping_sub(seen.rx_bytes),
        tx_payload: counts.tx_payload_since(seen.tx_payload),
        rx_payload: counts.rx_payload_since(seen.rx_payload),
    };
    let (first_ns, last_ns) = if seen.incarnation == 0 {
        (life.first_ns, time_of(counts.last_tick, now_ns).max(life.first_ns))
    } else {
        let (last_ns, seen_ns) = (time_of(counts.last_tick, now_ns), time_of(seen.last_tick, now_ns));
        // A burst that is longer than a tick can tell seems to be yet to come.
        let burst_ns = Some(time_of(counts.burst_tick(), now_ns)).filter(|&burst_ns| burst_ns <= last_ns);
        // The clock of the first packet is read exactly, and those that follow may be of the tick before it.
        let last_ns = last_ns.max(life.first_ns);
        (burst_ns.unwrap_or_default().max(seen_ns).max(life.first_ns).min(last_ns), last_ns)
    };
    (moved != Moved::default()).then(|| FlowDelta {
        flow: slot.flow(),
        moved,
        first_ns,
        last_ns,
        ifindex: life.ifindex,
        label: counts.label,
        class: ports.class,
        opened: life.opened,
        tcp_flags: ports.tcp_flags,
        hints: ports.hints,
    })
}

/// A tick within the last 26 days (or a little ahead) as a boot time, nanoseconds.
fn time_of(tick: u32, now_ns: u64) -> u64 {
    let now = now_ns >> TICK_SHIFT;
    let ago = i64::from((now as u32).wrapping_sub(tick).cast_signed());
    now.saturating_add_signed(-ago) * TICK_NS
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: u64 = 24 * 3600 * 1_000_000_000;
    const NOW: u64 = 90 * DAY;

    fn slot(packets: u32, last_ns: u64) -> Slot4 {
        Slot4 {
            local_addr: [10, 0, 0, 1],
            remote_addr: [10, 0, 0, 2],
            ports: Ports { local_port: 1, remote_port: 2, protocol: 17, ..Ports::default() },
            counts: Counts {
                tx_bytes: u64::from(packets) * 100,
                tx_packets: packets,
                last_tick: (last_ns >> TICK_SHIFT) as u32,
                ..Counts::default()
            },
        }
    }

    const LIFE: Life = Life {
        incarnation: 1,
        ifindex: 1,
        first_ns: 5,
        opened: 0,
        pad: [0; 3],
        read_incarnation: 0,
        read_tx_packets: 0,
        read_rx_packets: 0,
    };

    #[test]
    fn a_tick_is_a_time_near_now_also_when_the_counter_has_wrapped() {
        for ago in [0, 1_000_000_000, 20 * 24 * 3600 * 1_000_000_000] {
            let time = time_of(((NOW - ago) >> TICK_SHIFT) as u32, NOW);
            assert!(NOW - ago - time < TICK_NS, "{ago}");
        }
        // Another CPU's clock may have been read a moment after ours.
        assert_eq!(time_of((NOW >> TICK_SHIFT) as u32 + 3, NOW), (NOW / TICK_NS + 3) * TICK_NS);
    }

    #[test]
    fn a_delta_is_what_came_since_and_begins_where_the_last_one_ended() {
        let first = delta(&slot(3, NOW - 9_000_000_000), &LIFE, &Seen::default(), NOW).unwrap();
        assert_eq!((first.moved.tx_packets, first.moved.tx_bytes, first.first_ns), (3, 300, 5));
        let seen = seen_of(&slot(3, NOW - 9_000_000_000), &LIFE);
        let second = delta(&slot(5, NOW), &LIFE, &seen, NOW).unwrap();
        assert_eq!((second.moved.tx_packets, second.moved.tx_bytes), (2, 200));
        assert_eq!(second.first_ns, first.last_ns);
        assert_eq!(delta(&slot(3, NOW), &LIFE, &seen, NOW), None);
    }

    #[test]
    fn after_a_silence_a_delta_begins_with_the_burst() {
        let seen = seen_of(&slot(3, NOW - 9_000_000_000), &LIFE);
        let began = |burst_tick: u32| {
            let mut slot = slot(4, NOW);
            let counts = &mut slot.counts;
            (counts.tx_payload, counts.rx_payload) = Counts::payloads(400, 40, burst_tick);
            let delta = delta(&slot, &LIFE, &seen, NOW).unwrap();
            assert_eq!((delta.moved.tx_payload, delta.moved.rx_payload), (400, 40));
            delta.first_ns
        };
        let tick = |ago: u64| ((NOW - ago) >> TICK_SHIFT) as u32;
        assert_eq!(began(tick(1_000_000_000)), time_of(tick(1_000_000_000), NOW));
        // One that had begun before the last reading, days or months ago: this delta goes on where that one ended.
        for ago in [10_000_000_000, 20 * DAY, 30 * DAY, 50 * DAY, 60 * DAY] {
            assert_eq!(began(tick(ago)), time_of(seen.last_tick, NOW), "{ago}");
        }
    }

    #[test]
    fn payload_counters_may_wrap_beside_the_tick_that_shares_their_words() {
        let mut before = slot(3, NOW);
        (before.counts.tx_payload, before.counts.rx_payload) =
            Counts::payloads((1 << 48) - 10, 7, (NOW >> TICK_SHIFT) as u32);
        let mut after = slot(4, NOW);
        (after.counts.tx_payload, after.counts.rx_payload) =
            (before.counts.tx_payload + 25, before.counts.rx_payload + 5);
        let delta = delta(&after, &LIFE, &seen_of(&before, &LIFE), NOW).unwrap();
        assert_eq!((delta.moved.tx_payload, delta.moved.rx_payload), (25, 5));
        assert_eq!(Counts::payloads(1, 2, 0x8765_4321), (0x4321_0000_0000_0001, 0x8765_0000_0000_0002));
        let tick = Counts { tx_payload: 0x4321 << 48, rx_payload: 0x8765 << 48, ..Counts::default() };
        assert_eq!((tick.burst_tick(), tick.carried_payload()), (0x8765_4321, false));
    }

    #[test]
    fn a_region_is_looked_at_if_it_was_written_to_lately_whatever_its_stamps_have_come_to() {
        const SECOND: u64 = 1_000_000_000;
        let looks = |at_ns: u64, since_ns: u64, now_ns: u64| {
            Stamps::of(Scope::Since(since_ns), now_ns).include(stamp(at_ns))
        };
        // Over all values that a stamp can have, and where they begin again.
        for now_ns in (NOW..NOW + 5_000 * SECOND).step_by(10_000_019) {
            assert!(looks(now_ns, now_ns - SECOND, now_ns));
            // Written to while it is read.
            assert!(looks(now_ns + TICK_NS, now_ns - SECOND, now_ns));
            assert!(looks(now_ns + 60 * SECOND, now_ns - SECOND, now_ns));
            assert!(looks(now_ns - SECOND, now_ns - SECOND, now_ns));
            assert!(!looks(now_ns - 2 * SECOND, now_ns - SECOND, now_ns));
            assert!(!looks(now_ns - 3_600 * SECOND, now_ns - SECOND, now_ns));
            // Who was away for so long looks everywhere.
            assert!(looks(now_ns - 2 * SECOND, now_ns - 5_000 * SECOND, now_ns));
        }
        for at in [1, 2, 0x8000, u16::MAX] {
            assert!(Stamps::of(Scope::Everything, NOW).include(at));
        }
        // Never written to.
        assert!(!Stamps::of(Scope::Everything, NOW).include(0));
    }

    #[test]
    fn a_region_that_is_written_to_while_it_is_read_is_not_passed_by() {
        let mut hand = Hand::new();
        hand.write(1, 50);
        let read = |hand: &mut Hand, at_ns: u64| {
            hand.shared.touched.quarter(0).store(stamp(at_ns), Ordering::Relaxed);
            let mut out = Vec::new();
            hand.table.read(&hand.shared, Scope::Since(NOW - 1_000_000_000), NOW, &mut out);
            sum(&out)
        };
        assert_eq!(read(&mut hand, NOW - 9_000_000_000), 0);
        assert_eq!(read(&mut hand, NOW + 9_000_000_000), 50);
    }

    #[test]
    fn no_delta_of_a_flow_begins_before_its_first_packet() {
        let (tick, first_ns) = ((NOW >> TICK_SHIFT) as u32, NOW + TICK_NS / 2);
        let counted = |packets: u32| {
            let mut slot = slot(packets, NOW);
            (slot.counts.tx_payload, slot.counts.rx_payload) = Counts::payloads(0, 0, tick);
            slot
        };
        let life = Life { first_ns, ..LIFE };
        let first = delta(&counted(1), &life, &Seen::default(), NOW).unwrap();
        let second = delta(&counted(2), &life, &seen_of(&counted(1), &life), NOW).unwrap();
        assert_eq!((first.first_ns, first.last_ns), (first_ns, first_ns));
        assert_eq!((second.first_ns, second.last_ns), (first_ns, first_ns));
    }

    #[test]
    fn packet_counters_may_wrap() {
        let seen = Seen {
            incarnation: 1,
            tx_packets: u32::MAX,
            tx_bytes: u64::from(u32::MAX) * 100,
            ..Seen::default()
        };
        let mut wrapped = slot(4, NOW);
        wrapped.counts.tx_bytes = (u64::from(u32::MAX) + 5) * 100;
        let delta = delta(&wrapped, &LIFE, &seen, NOW).unwrap();
        assert_eq!((delta.moved.tx_packets, delta.moved.tx_bytes), (5, 500));
    }

    /// A table in memory of the test's own, and the program's hand on it.
    struct Hand {
        table: Table<Slot4>,
        shared: Shared,
    }

    /// The slot that is written to.
    const SLOT: usize = 5;

    impl Hand {
        fn new() -> Self {
            let mapping = |bytes: usize| Mapping::blank(bytes).unwrap();
            let slots = 4096 * 8;
            let table = Table::of(mapping(slots), 1, 0);
            let shared = Shared { touched: mapping(8), lives: mapping(slots) };
            shared.touched.quarter(0).store(stamp(NOW), Ordering::Relaxed);
            Self { table, shared }
        }

        /// The slot has so many packets of this incarnation.
        fn write(&self, incarnation: u32, packets: u32) {
            let record = record(incarnation, packets);
            for (index, word) in record.words[..Slot4::WORDS].iter().enumerate() {
                self.table.slots.word(SLOT * Slot4::WORDS + index).store(*word, Ordering::Relaxed);
            }
            for (index, word) in record.life.iter().enumerate() {
                self.shared.lives.word(SLOT * LIFE_WORDS + index).store(*word, Ordering::Relaxed);
            }
        }

        fn read(&mut self) -> u64 {
            let mut out = Vec::new();
            self.table.read(&self.shared, Scope::Everything, NOW, &mut out);
            sum(&out)
        }

        fn read_changed(&mut self) -> u64 {
            let mut out = Vec::new();
            self.table.read_changed(&self.shared, NOW, &mut out);
            sum(&out)
        }

        fn take(&mut self, incarnation: u32, packets: u32) -> u64 {
            let mut out = Vec::new();
            assert!(self.table.take_evicted(&record(incarnation, packets), NOW, &mut out));
            sum(&out)
        }
    }

    fn sum(deltas: &[FlowDelta]) -> u64 {
        deltas.iter().map(|delta| delta.moved.tx_packets).sum()
    }

    fn record(incarnation: u32, packets: u32) -> Evicted {
        let mut words = [0; SLOT_WORDS];
        // SAFETY: integers without padding, of this many words.
        let slot: [u64; Slot4::WORDS] = unsafe { std::mem::transmute(slot(packets, NOW)) };
        words[..Slot4::WORDS].copy_from_slice(&slot);
        // SAFETY: as above; no padding (the border proves its size).
        let life = unsafe { std::mem::transmute::<Life, [u64; LIFE_WORDS]>(Life { incarnation, ..LIFE }) };
        Evicted { slot: SLOT as u32, family: 4, words, life }
    }

    #[test]
    fn a_record_that_is_taken_while_its_slot_still_shows_the_flow_counts_once() {
        for read_before in [false, true] {
            let mut hand = Hand::new();
            hand.write(1, 50);
            let mut counted = if read_before { hand.read() } else { 0 };
            hand.write(1, 70);
            counted += hand.take(1, 70);
            counted += hand.read() + hand.read_changed();
            assert_eq!(counted, 70);
            hand.write(2, 5);
            counted += hand.read() + hand.read_changed() + hand.read();
            assert_eq!(counted, 75);
        }
    }

    #[test]
    fn a_record_that_comes_a_sweep_late_finds_what_was_read_of_its_flow() {
        let mut hand = Hand::new();
        hand.write(1, 50);
        let mut counted = hand.read();
        hand.write(2, 3);
        // The record is held up behind another CPU's: what has changed hands waits, over two sweeps.
        counted += hand.read() + hand.read();
        assert_eq!(counted, 50);
        counted += hand.take(1, 70);
        counted += hand.read_changed();
        assert_eq!(counted, 73);
        assert_eq!(hand.read() + hand.read_changed(), 0);
    }

    #[test]
    fn a_flow_that_was_never_read_comes_with_its_record_whenever_that_is() {
        let mut hand = Hand::new();
        // Incarnation 1 came and went unread; 2 is read before 1's record is taken.
        hand.write(2, 3);
        let mut counted = hand.read();
        counted += hand.take(1, 70);
        hand.write(2, 4);
        counted += hand.read() + hand.read_changed();
        assert_eq!(counted, 74);
        // Two changes of hands between two readings.
        hand.write(4, 9);
        counted += hand.read() + hand.take(2, 6) + hand.take(3, 8) + hand.read_changed();
        assert_eq!(counted, 70 + 6 + 8 + 9);
    }

    #[test]
    fn a_slot_that_was_given_away_without_a_record_is_read_on() {
        let mut hand = Hand::new();
        hand.write(1, 50);
        let mut counted = hand.read();
        hand.write(2, 3);
        counted += hand.read() + hand.read_changed();
        assert_eq!(counted, 53);
        // Incarnations wrap, and 0 is none of them.
        hand.write(0, 3);
        assert_eq!(hand.read() + hand.read_changed(), 0);
    }
}
