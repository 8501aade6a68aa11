//! The flow table. An entry is shared by all CPUs: counters are added atomically, the rest is overwritten by
//! whoever comes last, which is as good as any order when two packets arrive at the same time.

use core::arch::asm;

use aya_ebpf::helpers::generated::{bpf_ktime_get_boot_ns, bpf_ringbuf_query};
use netmon_common::abi::{
    CLASS_GROUP, Flow4Key, Flow6Key, FlowOpened, FlowState, HINT_FRAGMENTS, HINT_QUIC, IPPROTO_UDP,
    NOT_STORED_RX, NOT_STORED_TX, OPENED_HERE, OPENED_THERE, OPENED_UNKNOWN, RING_BYTES, SILENCE_NS, STORED,
};

use crate::{
    classify::{self, Class},
    frame::Frame,
    maps::{CONFIG, EVENTS, FLOWS4, FLOWS6},
    parse::{Packet, looks_like_quic},
    stats,
};

/// The hook tells it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Leaves this PC.
    Sent,
    /// Arrives at this PC.
    Received,
}

impl Direction {
    /// (source, destination) → (local, remote).
    #[inline(always)]
    fn sides<T>(self, source: T, destination: T) -> (T, T) {
        match self {
            Self::Sent => (source, destination),
            Self::Received => (destination, source),
        }
    }

    /// Who opened a flow whose first packet was sent by the opener (or by the other side).
    #[inline(always)]
    fn opened(self, by_sender: bool) -> u8 {
        if (self == Self::Sent) == by_sender { OPENED_HERE } else { OPENED_THERE }
    }
}

/// Counts a packet in its flow. False: the table has no room for it.
#[inline(always)]
pub fn count<F: Frame>(frame: &F, packet: &Packet, direction: Direction) -> bool {
    let (local_port, remote_port) = direction.sides(packet.source_port, packet.destination_port);
    let (local, remote) = direction.sides(&packet.source, &packet.destination);
    let protocol = packet.protocol;
    if packet.family == 4 {
        let key = Flow4Key {
            local_addr: [local[0], local[1], local[2], local[3]],
            remote_addr: [remote[0], remote[1], remote[2], remote[3]],
            local_port,
            remote_port,
            protocol,
            pad: [0; 3],
        };
        count_in(frame, packet, direction, &key)
    } else {
        let key = Flow6Key {
            local_addr: *local,
            remote_addr: *remote,
            local_port,
            remote_port,
            protocol,
            pad: [0; 3],
        };
        count_in(frame, packet, direction, &key)
    }
}

#[inline(always)]
fn count_in<F: Frame, K: Key>(frame: &F, packet: &Packet, direction: Direction, key: &K) -> bool {
    let mut state = key.find();
    if state.is_none() {
        match open(frame, packet, direction, key) {
            Added::Stored => return true,
            Added::NoRoom => return false,
            Added::WasThere => state = key.find(),
        }
    }
    match state {
        Some(state) => {
            update(state, frame, packet, direction, key);
            true
        }
        // Another CPU was first with a packet of this flow, and the agent has removed the entry since.
        None => false,
    }
}

/// What became of a new entry.
#[repr(u32)]
enum Added {
    Stored,
    WasThere,
    NoRoom,
}

/// A flow's first packet. Its own subprogram: it happens once a flow and needs much stack.
#[inline(never)]
fn open<F: Frame, K: Key>(frame: &F, packet: &Packet, direction: Direction, key: &K) -> Added {
    let state = first(frame, packet, direction, key);
    match key.add(&state) {
        Ok(()) => {
            announce(frame, key, &state, packet, STORED);
            Added::Stored
        }
        Err(EEXIST) => Added::WasThere,
        Err(_) => {
            let stored = match direction {
                Direction::Sent => NOT_STORED_TX,
                Direction::Received => NOT_STORED_RX,
            };
            announce(frame, key, &state, packet, stored);
            Added::NoRoom
        }
    }
}

const EEXIST: i32 = -17;

/// The only clock of the hot path (`CLOCK_BOOTTIME`; helper since kernel 5.8).
#[inline(always)]
fn now_ns() -> u64 {
    // SAFETY: the helper takes no arguments.
    unsafe { bpf_ktime_get_boot_ns() }
}

#[inline(always)]
fn generation() -> u32 {
    CONFIG.get(0).map_or(0, |config| config.generation)
}

/// The state after a flow's first packet.
#[inline(always)]
fn first<F: Frame, K: Key>(frame: &F, packet: &Packet, direction: Direction, key: &K) -> FlowState {
    let (now, generation) = (now_ns(), generation());
    let Class { class, label } = key.classify(packet.group_frame);
    let (packets, bytes, payload) =
        (u64::from(frame.segments()), u64::from(packet.l3_bytes), u64::from(packet.payload));
    let mut state = FlowState {
        first_ns: now,
        burst_ns: now,
        last_ns: now,
        generation,
        ifindex: frame.ifindex(),
        label,
        class,
        opened: opened(packet, direction),
        tcp_flags: packet.tcp_flags,
        hints: if packet.fragment { HINT_FRAGMENTS } else { 0 },
        ..FlowState::default()
    };
    if looks_like_quic(frame, packet) {
        state.hints |= HINT_QUIC;
    }
    match direction {
        Direction::Sent => {
            state.tx_packets = packets;
            state.tx_bytes = bytes;
            state.tx_payload = payload;
        }
        Direction::Received => {
            state.rx_packets = packets;
            state.rx_bytes = bytes;
            state.rx_payload = payload;
        }
    }
    state
}

/// Adds a packet to a flow that is in the table.
#[inline(always)]
fn update<F: Frame, K: Key>(
    state: *mut FlowState,
    frame: &F,
    packet: &Packet,
    direction: Direction,
    key: &K,
) {
    let (now, generation) = (now_ns(), generation());
    // SAFETY: the map gave the pointer, and its entries stay readable and writable until the program ends, even
    // when the agent removes one meanwhile. Only raw places are read and written: other CPUs do the same.
    unsafe {
        let last = (*state).last_ns;
        // Another CPU may have stored a later time already.
        if now > last {
            if now - last >= SILENCE_NS {
                (*state).burst_ns = now;
            }
            (*state).last_ns = now;
        }

        let mut hints = (*state).hints;
        if packet.payload > 0
            && (*state).tx_payload | (*state).rx_payload == 0
            && looks_like_quic(frame, packet)
        {
            hints |= HINT_QUIC;
        }
        if packet.fragment {
            hints |= HINT_FRAGMENTS;
        }
        if hints != (*state).hints {
            (*state).hints = hints;
        }
        let flags = (*state).tcp_flags | packet.tcp_flags;
        if flags != (*state).tcp_flags {
            (*state).tcp_flags = flags;
        }

        // One frame to a link-layer group must not hide the unicast traffic that follows it.
        let was_group = (*state).class == CLASS_GROUP && !packet.group_frame;
        if (*state).generation != generation || was_group {
            let Class { class, label } = key.classify(packet.group_frame);
            (*state).class = class;
            (*state).label = label;
            (*state).generation = generation;
        }

        let (packets, bytes, payload) = match direction {
            Direction::Sent => {
                (&raw mut (*state).tx_packets, &raw mut (*state).tx_bytes, &raw mut (*state).tx_payload)
            }
            Direction::Received => {
                (&raw mut (*state).rx_packets, &raw mut (*state).rx_bytes, &raw mut (*state).rx_payload)
            }
        };
        add(packets, u64::from(frame.segments()));
        add(bytes, u64::from(packet.l3_bytes));
        if packet.payload > 0 {
            add(payload, u64::from(packet.payload));
        }
    }
}

/// Who opened the flow, by its first packet.
#[inline(always)]
fn opened(packet: &Packet, direction: Direction) -> u8 {
    const SYN: u8 = 0x02;
    const ACK: u8 = 0x10;
    if packet.fragment {
        OPENED_UNKNOWN
    } else if packet.protocol == IPPROTO_UDP {
        direction.opened(true)
    } else {
        match packet.tcp_flags & (SYN | ACK) {
            SYN => direction.opened(true),
            flags if flags == SYN | ACK => direction.opened(false),
            _ => OPENED_UNKNOWN,
        }
    }
}

/// Tells the agent about a flow's first packet. While the table is full every packet of the flows outside it is a
/// first packet, so these may only use one half of the ring. What of them finds no room is in `table_full` already.
#[inline(always)]
fn announce<F: Frame, K: Key>(frame: &F, key: &K, state: &FlowState, packet: &Packet, stored: u8) {
    /// `BPF_RB_AVAIL_DATA`: bytes that the agent has not read yet.
    const UNREAD: u64 = 0;
    /// `BPF_RB_RING_SIZE`.
    const SIZE: u64 = 1;
    if stored != STORED {
        let ring = (&raw const EVENTS).cast_mut().cast();
        // SAFETY: `ring` is the ring buffer map.
        let (unread, size) = unsafe { (bpf_ringbuf_query(ring, UNREAD), bpf_ringbuf_query(ring, SIZE)) };
        if unread > size / 2 {
            return;
        }
    }
    let Some(mut entry) = EVENTS.reserve(0) else {
        if stored == STORED {
            stats::ring_full();
        }
        return;
    };
    let (local_addr, remote_addr, local_port, remote_port, family) = key.wide();
    entry.write(FlowOpened {
        local_addr,
        remote_addr,
        first_ns: state.first_ns,
        bytes: packet.l3_bytes,
        // At most seven extension headers of 2 KiB each are followed, so this fits.
        header_bytes: (packet.l3_bytes - packet.payload) as u16,
        // The kernel keeps the number of segments in 16 bits.
        packets: frame.segments() as u16,
        ifindex: state.ifindex,
        local_port,
        remote_port,
        label: state.label,
        family,
        protocol: packet.protocol,
        class: state.class,
        opened: state.opened,
        hints: state.hints,
        stored,
    });
    entry.submit(0);
}

// The ring's size is a power of two, or the kernel refuses it.
const _: () = assert!(RING_BYTES.is_power_of_two());

/// `lock *(u64 *)target += value`, the one atomic instruction that every kernel has.
///
/// # Safety
/// `target` must point to an aligned, writable `u64` of a map value.
#[inline(always)]
unsafe fn add(target: *mut u64, value: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("lock *(u64 *)({target} + 0) += {value}", target = in(reg) target, value = in(reg) value, options(nostack));
    }
}

/// What differs between the two tables.
trait Key {
    fn find(&self) -> Option<*mut FlowState>;
    fn add(&self, state: &FlowState) -> Result<(), i32>;
    fn classify(&self, group_frame: bool) -> Class;
    /// Local and remote address, local and remote port, family.
    fn wide(&self) -> ([u8; 16], [u8; 16], u16, u16, u8);
}

/// `BPF_NOEXIST`.
const NEW_ONLY: u64 = 1;

impl Key for Flow4Key {
    #[inline(always)]
    fn find(&self) -> Option<*mut FlowState> {
        FLOWS4.get_ptr_mut(self)
    }

    #[inline(always)]
    fn add(&self, state: &FlowState) -> Result<(), i32> {
        FLOWS4.insert(self, state, NEW_ONLY)
    }

    #[inline(always)]
    fn classify(&self, group_frame: bool) -> Class {
        classify::ipv4(self, group_frame)
    }

    #[inline(always)]
    fn wide(&self) -> ([u8; 16], [u8; 16], u16, u16, u8) {
        let widen = |[a, b, c, d]: [u8; 4]| [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        (widen(self.local_addr), widen(self.remote_addr), self.local_port, self.remote_port, 4)
    }
}

impl Key for Flow6Key {
    #[inline(always)]
    fn find(&self) -> Option<*mut FlowState> {
        FLOWS6.get_ptr_mut(self)
    }

    #[inline(always)]
    fn add(&self, state: &FlowState) -> Result<(), i32> {
        FLOWS6.insert(self, state, NEW_ONLY)
    }

    #[inline(always)]
    fn classify(&self, group_frame: bool) -> Class {
        classify::ipv6(self, group_frame)
    }

    #[inline(always)]
    fn wide(&self) -> ([u8; 16], [u8; 16], u16, u16, u8) {
        (self.local_addr, self.remote_addr, self.local_port, self.remote_port, 6)
    }
}
