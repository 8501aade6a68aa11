//! The flow table: sets of four slots in an array that the agent maps into its memory, a part of it for each CPU.
//!
//! A slot has one writer, the CPU that its part belongs to, so nothing is locked and no counter is atomic; the agent adds
//! up what the CPUs have. Nothing is ever removed: a new flow takes the slot of the set's longest silent one. What the
//! agent has not read of that one is handed over through the ring first; without room there, the new flow's packet is
//! refused and counted as such. So every packet is in a slot, in the ring, or among the refused.
//!
//! The order of writes is what the agent's reading without locks rests on (`netmon-agent`, kernel/table.rs). It holds
//! where stores become visible in program order, as on x86-64.

use core::arch::asm;

use aya_ebpf::helpers::generated::bpf_ringbuf_query;
use netmon_common::abi::{
    CLASS_GROUP, Counts, Evicted, FlowOpened, HINT_FRAGMENTS, HINT_QUIC, IPPROTO_UDP, LIFE_WORDS, Life,
    OPENED_HERE, OPENED_THERE, OPENED_UNKNOWN, REGION_SETS, RING_BYTES, SILENCE_NS, SLOT_WORDS, STAMPS,
    TICK_NS, TICK_SHIFT, WAYS, stamp,
};

use crate::{
    classify::Class,
    cpu::Cpu,
    diagnostics,
    frame::Frame,
    key::{Key, Slot},
    maps::{EVENTS, LIVES, TOUCHED, table_layout},
    parse::{Measure, looks_like_quic},
};

/// The hook tells it.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Direction {
    /// Leaves this PC.
    Sent,
    /// Arrives at this PC.
    Received,
}

impl Direction {
    /// Who opened a flow whose first packet was sent by the opener (or by the other side).
    #[inline(always)]
    fn opened(self, by_sender: bool) -> u8 {
        if (self == Self::Sent) == by_sender { OPENED_HERE } else { OPENED_THERE }
    }
}

/// Silence in ticks, as `Counts::last_tick` is.
const SILENCE_TICKS: u32 = SILENCE_NS.div_ceil(TICK_NS) as u32;

/// Keeps the compiler from moving writes from one side of it to the other.
#[inline(always)]
fn barrier() {
    // SAFETY: no instruction.
    unsafe { asm!("", options(nostack, preserves_flags)) };
}

/// Counts a packet in its flow. False: it was refused.
#[inline(always)]
pub fn count<F: Frame, K: Key>(
    cpu: Cpu,
    frame: &F,
    key: &K,
    measure: &Measure,
    direction: Direction,
) -> bool {
    let layout = table_layout();
    // SAFETY: constants of the programs.
    let (sets, hash) = unsafe { ((*layout).sets, key.hash(&(*layout).hash_keys)) };
    let in_part = ((u64::from(hash) * u64::from(sets)) >> 32) as u32;
    let index = cpu.number * sets + in_part;
    let Some(set) = K::set(index) else {
        return false;
    };
    // A flow is where its hash says, unless another one was there before it: with many flows each slot that is looked at is
    // one more line that no cache has. The second slot is the other one of a pair of lines, which come together.
    let home = hash as usize % WAYS;
    for step in 0..WAYS {
        let way = home ^ step;
        // SAFETY: a set has this many slots.
        let slot = unsafe { set.add(way) };
        if key.is_in(slot) {
            update(cpu, slot, index, frame, key, measure, direction);
            return true;
        }
    }
    // Copies, for the subprograms to point to: the originals stay in registers.
    let (key, measure) = (*key, *measure);
    // Before the tries are asked: what they say may be old by the time it is written down.
    let generation = cpu.generation() as u8;
    let class = key.classify(measure.group_frame);
    let place = Place { index, home, direction, class, generation };
    take_slot(cpu.number, frame, &key, &measure, place.packed())
}

/// Where a flow is to be put, and what it is. A subprogram takes five arguments, and this is one of them.
struct Place {
    /// Number of the set.
    index: u32,
    /// The slot in it to begin with.
    home: usize,
    direction: Direction,
    class: Class,
    /// Lowest byte of the generation of `class`.
    generation: u8,
}

/// `CLASS_` constants fit into these bits.
const CLASSES: u8 = 0x1f;

impl Place {
    #[inline(always)]
    fn packed(self) -> u64 {
        u64::from(self.index)
            | (self.direction as u64) << 32
            | (self.home as u64) << 33
            | u64::from(self.class.class & CLASSES) << 35
            | u64::from(self.generation) << 40
            | u64::from(self.class.label) << 48
    }

    #[inline(always)]
    fn unpacked(packed: u64) -> Self {
        Self {
            index: packed as u32,
            home: (packed >> 33) as usize % WAYS,
            direction: if packed >> 32 & 1 == 0 { Direction::Sent } else { Direction::Received },
            class: Class { class: (packed >> 35) as u8 & CLASSES, label: (packed >> 48) as u16 },
            generation: (packed >> 40) as u8,
        }
    }
}

/// Tells the agent where to look. Once a tick for each flow is enough: the agent looks where something was within the last
/// second.
#[inline(always)]
fn touch<K: Key>(set: u32, now_ns: u64) {
    // SAFETY: a constant of the programs.
    let regions = unsafe { (*table_layout()).regions };
    let region = K::FIRST_REGION * regions + set / REGION_SETS as u32;
    if let Some(touched) = TOUCHED.get_ptr_mut(region / STAMPS as u32) {
        let now = stamp(now_ns);
        // SAFETY: the map gave the pointer; a region belongs to one CPU.
        unsafe {
            let stamp = touched.cast::<u16>().add(region as usize % STAMPS);
            if *stamp != now {
                *stamp = now;
            }
        }
    }
}

/// The lives of a set's slots, as a pointer to the first one.
#[inline(always)]
fn lives<K: Key>(set: u32) -> Option<*mut Life> {
    // SAFETY: a constant of the programs.
    let regions = unsafe { (*table_layout()).regions };
    LIVES.get_ptr_mut(K::FIRST_REGION * regions * REGION_SETS as u32 + set).map(|lives| lives.cast())
}

/// Adds a packet to a flow that has a slot.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "inlined: they are registers")]
fn update<F: Frame, K: Key>(
    cpu: Cpu,
    slot: *mut K::Slot,
    set: u32,
    frame: &F,
    key: &K,
    measure: &Measure,
    direction: Direction,
) {
    let now_ns = cpu.now_ns();
    let (ports, counts) = (K::Slot::ports(slot), K::Slot::counts(slot));
    // SAFETY: the map gave the pointer, and this CPU is the only writer.
    unsafe {
        let tick = (now_ns >> TICK_SHIFT) as u32;
        let silent = tick.wrapping_sub((*counts).last_tick);
        if silent != 0 {
            (*counts).last_tick = tick;
            touch::<K>(set, now_ns);
            if silent >= SILENCE_TICKS {
                ((*counts).tx_payload, (*counts).rx_payload) =
                    Counts::payloads((*counts).tx_payload, (*counts).rx_payload, tick);
            }
        }

        let mut hints = 0;
        if measure.protocol == IPPROTO_UDP
            && measure.payload > 0
            && !(*counts).carried_payload()
            && looks_like_quic(frame, measure)
        {
            hints = HINT_QUIC;
        }
        if measure.later_fragment {
            hints |= HINT_FRAGMENTS;
        }
        // The port word's upper half at once, in the order of `Ports`.
        let word = ports.cast::<u64>();
        let before = word.read();
        let news = u64::from(measure.tcp_flags) << 40 | u64::from(hints) << 48;
        if news & !before != 0 {
            word.write(before | news);
        }

        // One frame to a link-layer group must not hide the unicast traffic that follows it.
        let was_group = (before >> 56) as u8 == CLASS_GROUP && !measure.group_frame;
        let generation = cpu.generation();
        if (*counts).generation != generation || was_group {
            // A copy: see `count`.
            let key = *key;
            let Class { class, label } = key.classify(measure.group_frame);
            (*ports).class = class;
            (*counts).label = label;
            (*counts).generation = generation;
        }

        let segments = frame.segments(measure.l3_bytes, measure.payload);
        match direction {
            Direction::Sent => {
                (*counts).tx_bytes += u64::from(measure.l3_bytes);
                (*counts).tx_payload += u64::from(measure.payload);
                barrier();
                (*counts).tx_packets = (*counts).tx_packets.wrapping_add(segments);
            }
            Direction::Received => {
                (*counts).rx_bytes += u64::from(measure.l3_bytes);
                (*counts).rx_payload += u64::from(measure.payload);
                barrier();
                (*counts).rx_packets = (*counts).rx_packets.wrapping_add(segments);
            }
        }
    }
}

/// Gives a flow a slot, with its first packet. False: none could be had.
///
/// Its own subprogram: it happens once a flow, and needs much stack.
#[inline(never)]
fn take_slot<F: Frame, K: Key>(cpu: u32, frame: &F, key: &K, measure: &Measure, place: u64) -> bool {
    let Place { index, home, direction, class: Class { class, label }, generation } = Place::unpacked(place);
    let Some(cpu) = Cpu::of(cpu) else {
        return false;
    };
    let (Some(set), Some(lives)) = (K::set(index), lives::<K>(index)) else {
        return false;
    };
    let tick = (cpu.now_ns() >> TICK_SHIFT) as u32;
    let (way, free) = longest_silent::<K>(set, lives, home, tick);
    // SAFETY: the remainder is a slot's number, and shows it to the verifier.
    let (slot, life) = unsafe { (set.add(way % WAYS), lives.add(way % WAYS)) };
    let number = index * WAYS as u32 + way as u32;
    // SAFETY: the map gave the pointers, and this CPU is the only writer of these fields.
    let (incarnation, crowded) = unsafe { ((*life).incarnation, !free && !was_read::<K>(slot, life)) };
    // The first packet of all tells who opened the flow, and each CPU has another first one: for their order the clock is
    // read. Not in a crowd: reading it makes the processor wait for all that it has asked the memory for.
    let now_ns = if crowded { cpu.now_ns() } else { cpu.exact_ns() };
    if crowded {
        // SAFETY: as above.
        if unsafe { !hand_over::<K>(cpu, slot, life, number, now_ns) } {
            diagnostics::refused(frame.ifindex(), K::FAMILY, index);
            return false;
        }
        diagnostics::handed_over(number, K::FAMILY);
    }

    // Another one than the class was looked up by: the next packet looks again.
    let current = cpu.generation();
    let generation = if current as u8 == generation { current } else { current.wrapping_sub(1) };
    touch::<K>(index, now_ns);
    let opened = opened(measure, direction, !crowded);
    let mut hints = if measure.later_fragment { HINT_FRAGMENTS } else { 0 };
    if looks_like_quic(frame, measure) {
        hints |= HINT_QUIC;
    }
    let ifindex = frame.ifindex();
    let (bytes, payload, segments) = (
        u64::from(measure.l3_bytes),
        u64::from(measure.payload),
        frame.segments(measure.l3_bytes, measure.payload),
    );
    let sent = direction == Direction::Sent;
    let (tx_payload, rx_payload) = if sent { (payload, 0) } else { (0, payload) };
    let (tx_payload, rx_payload) = Counts::payloads(tx_payload, rx_payload, tick);

    // Field by field, here and below: a whole value would be put together on the stack.
    // SAFETY: as above.
    unsafe {
        let (ports, counts) = (K::Slot::ports(slot), K::Slot::counts(slot));
        (*life).incarnation = 0;
        barrier();
        key.write_to(slot);
        (*ports).tcp_flags = measure.tcp_flags;
        (*ports).hints = hints;
        (*ports).class = class;
        (*counts).tx_bytes = if sent { bytes } else { 0 };
        (*counts).rx_bytes = if sent { 0 } else { bytes };
        (*counts).tx_payload = tx_payload;
        (*counts).rx_payload = rx_payload;
        (*counts).last_tick = tick;
        (*counts).generation = generation;
        (*counts).label = label;
        (*counts).tx_packets = if sent { segments } else { 0 };
        (*counts).rx_packets = if sent { 0 } else { segments };
        (*life).ifindex = ifindex;
        (*life).first_ns = now_ns;
        (*life).opened = opened;
        barrier();
        // Never 0.
        let next = incarnation.wrapping_add(1);
        (*life).incarnation = if next == 0 { 1 } else { next };
    }
    if !crowded {
        announce(cpu, key, measure, slot, life, now_ns);
    }
    true
}

/// The slot to take: the first empty one (true), or that of the flow whose last packet is longest ago.
#[inline(always)]
fn longest_silent<K: Key>(set: *mut K::Slot, lives: *mut Life, home: usize, tick: u32) -> (usize, bool) {
    let (mut choice, mut longest) = (home, 0);
    for step in 0..WAYS {
        let way = home ^ step;
        // SAFETY: a set has this many slots, and this CPU is their only writer.
        let (incarnation, last_tick) =
            unsafe { ((*lives.add(way)).incarnation, (*K::Slot::counts(set.add(way))).last_tick) };
        if incarnation == 0 {
            return (way, true);
        }
        let silent = tick.wrapping_sub(last_tick);
        if silent > longest {
            (choice, longest) = (way, silent);
        }
    }
    (choice, false)
}

/// Has the agent read all that a slot counts?
///
/// # Safety
/// `slot` must be a slot of this CPU, `life` its life.
#[inline(always)]
unsafe fn was_read<K: Key>(slot: *mut K::Slot, life: *mut Life) -> bool {
    let counts = K::Slot::counts(slot);
    // SAFETY: the caller's promise. The agent writes its three fields at any time, the incarnation last: what is read
    // here is what it has read, or something older.
    unsafe {
        let read_incarnation = (&raw const (*life).read_incarnation).read_volatile();
        let read_tx = (&raw const (*life).read_tx_packets).read_volatile();
        let read_rx = (&raw const (*life).read_rx_packets).read_volatile();
        read_incarnation == (*life).incarnation
            && read_tx == (*counts).tx_packets
            && read_rx == (*counts).rx_packets
    }
}

/// `BPF_RB_NO_WAKEUP`, `BPF_RB_FORCE_WAKEUP`.
const NO_WAKEUP: u64 = 1;
const FORCE_WAKEUP: u64 = 2;

/// Bytes in the ring that the agent has not read yet, and its size.
#[inline(always)]
fn ring_fill() -> (u64, u64) {
    /// `BPF_RB_AVAIL_DATA`
    const UNREAD: u64 = 0;
    /// `BPF_RB_RING_SIZE`
    const SIZE: u64 = 1;
    let ring = (&raw const EVENTS).cast_mut().cast();
    // SAFETY: `ring` is the ring buffer map.
    unsafe { (bpf_ringbuf_query(ring, UNREAD), bpf_ringbuf_query(ring, SIZE)) }
}

/// Puts a slot into the ring as it is. False: no room.
///
/// # Safety
/// `slot` must be a slot of this CPU, `life` its life.
#[inline(always)]
unsafe fn hand_over<K: Key>(cpu: Cpu, slot: *mut K::Slot, life: *mut Life, number: u32, now_ns: u64) -> bool {
    let Some(mut entry) = EVENTS.reserve_untyped::<Evicted>(0) else {
        return false;
    };
    let record = entry.as_mut_ptr();
    // SAFETY: the ring gave room for one record; slots and lives are as many words.
    unsafe {
        (*record).slot = number;
        (*record).family = K::FAMILY;
        let words = (&raw mut (*record).words).cast::<u64>();
        for word in 0..SLOT_WORDS {
            words.add(word).write(if word < K::Slot::WORDS {
                slot.cast::<u64>().add(word).read()
            } else {
                0
            });
        }
        for word in 0..LIFE_WORDS {
            (&raw mut (*record).life).cast::<u64>().add(word).write(life.cast::<u64>().add(word).read());
        }
    }
    // A wake-up costs more than the record: none before there is something to do.
    let (unread, size) = ring_fill();
    let wake = unread > size / 4 && cpu.may_wake(now_ns);
    entry.submit(if wake { FORCE_WAKEUP } else { NO_WAKEUP });
    true
}

/// Who opened the flow, by its first packet. Whether a UDP packet is the first one tells only an exact clock.
#[inline(always)]
fn opened(measure: &Measure, direction: Direction, exact: bool) -> u8 {
    const SYN: u8 = 0x02;
    const ACK: u8 = 0x10;
    if measure.later_fragment {
        OPENED_UNKNOWN
    } else if measure.protocol == IPPROTO_UDP {
        if exact { direction.opened(true) } else { OPENED_UNKNOWN }
    } else {
        match measure.tcp_flags & (SYN | ACK) {
            SYN => direction.opened(true),
            flags if flags == SYN | ACK => direction.opened(false),
            _ => OPENED_UNKNOWN,
        }
    }
}

/// Tells the agent about a flow's first packet. The second half of the ring is for counts that are handed over.
#[inline(always)]
fn announce<K: Key>(cpu: Cpu, key: &K, measure: &Measure, slot: *mut K::Slot, life: *mut Life, now_ns: u64) {
    let (unread, size) = ring_fill();
    if unread > size / 2 {
        return cpu.ring_full();
    }
    let Some(mut entry) = EVENTS.reserve_untyped::<FlowOpened>(0) else {
        return cpu.ring_full();
    };
    let record: *mut FlowOpened = entry.as_mut_ptr();
    // SAFETY: the ring gave room for one record, every field of which is written; `slot` and `life` are of this CPU.
    unsafe {
        let ports = K::Slot::ports(slot);
        key.write_addresses((&raw mut (*record).local_addr).cast(), (&raw mut (*record).remote_addr).cast());
        (*record).first_ns = now_ns;
        (*record).bytes = measure.l3_bytes;
        (*record).payload = measure.payload;
        (*record).ifindex = (*life).ifindex;
        (*record).local_port = (*ports).local_port;
        (*record).remote_port = (*ports).remote_port;
        (*record).label = (*K::Slot::counts(slot)).label;
        (*record).family = K::FAMILY as u8;
        (*record).protocol = (*ports).protocol;
        (*record).class = (*ports).class;
        (*record).opened = (*life).opened;
        (*record).hints = (*ports).hints;
        (*record).pad = 0;
    }
    entry.submit(if cpu.may_wake(now_ns) { FORCE_WAKEUP } else { NO_WAKEUP });
}

// The ring's size is a power of two, or the kernel refuses it.
const _: () = assert!(RING_BYTES.is_power_of_two() && WAYS.is_power_of_two());
