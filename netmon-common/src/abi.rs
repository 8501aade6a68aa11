//! The border between the kernel programs and the agent: plain numbers with a fixed layout.
//!
//! No `bool`, `Option` or `enum` crosses it. The agent turns these numbers into types of its own and may
//! refuse what it does not know. Field names are a user interface: `bpftool map dump name nm_flows4` prints
//! them. All integers are in host byte order; addresses are in network byte order as they stand on the wire.

use core::mem::{offset_of, size_of};

/// Names of the maps as the kernel and `bpftool` know them (the kernel keeps 15 characters).
pub mod maps {
    /// Flow table, IPv4: array of [`super::Set4`], each CPU's sets one after the other.
    pub const TABLE4: &str = "nm_table4";
    /// Flow table, IPv6: array of [`super::Set6`].
    pub const TABLE6: &str = "nm_table6";
    /// Where the flows in the slots come from: array of [`super::Lives`], IPv4's sets, then IPv6's.
    pub const LIVES: &str = "nm_lives";
    /// When a region of a table was last written to: array of [`super::Touched`]; IPv4's regions, then IPv6's.
    pub const TOUCHED: &str = "nm_touched";
    /// Ports of datagrams whose first fragment was seen (LRU hash): [`super::FragmentKey`] → [`super::FragmentPorts`].
    pub const FRAGMENTS: &str = "nm_fragments";
    /// The agent's sums over all CPUs, for people, IPv4: [`super::Flow4Key`] → [`super::FlowState`]. The programs do
    /// not know this map.
    pub const FLOWS4: &str = "nm_flows4";
    /// The agent's sums over all CPUs, for people, IPv6: [`super::Flow6Key`] → [`super::FlowState`].
    pub const FLOWS6: &str = "nm_flows6";
    /// Prefixes that count as the private network, IPv4 (LPM trie) → [`super::PrefixValue`].
    pub const LAN4: &str = "nm_lan4";
    /// Prefixes that count as the private network, IPv6 (LPM trie) → [`super::PrefixValue`].
    pub const LAN6: &str = "nm_lan6";
    /// Muted prefixes of `ip.txt`, IPv4 (LPM trie) → [`super::PrefixValue`].
    pub const MUTE4: &str = "nm_mute4";
    /// Muted prefixes of `ip.txt`, IPv6 (LPM trie) → [`super::PrefixValue`].
    pub const MUTE6: &str = "nm_mute6";
    /// Ring buffer of [`super::FlowOpened`] and [`super::Evicted`], told apart by their lengths.
    pub const EVENTS: &str = "nm_events";
    /// Array with one [`super::CpuStats`] for each CPU.
    pub const STATS: &str = "nm_stats";

    /// All of them; the agent pins each under its name.
    pub const ALL: [&str; 13] =
        [TABLE4, TABLE6, LIVES, TOUCHED, FRAGMENTS, FLOWS4, FLOWS6, LAN4, LAN6, MUTE4, MUTE6, EVENTS, STATS];
}

/// Names of the programs' constants.
pub mod constants {
    /// A [`super::TableLayout`], written by the loader before the kernel sees the programs.
    pub const TABLE_LAYOUT: &str = "NM_TABLE_LAYOUT";
}

/// Names of the programs.
pub mod programs {
    /// TC ingress: counts what arrives.
    pub const TC_INGRESS: &str = "nm_tc_ingress";
    /// TC egress: counts what leaves.
    pub const TC_EGRESS: &str = "nm_tc_egress";
    /// TC ingress of interfaces without Ethernet header (tun, WireGuard, PPP, raw-IP modems).
    pub const TC_L3_INGRESS: &str = "nm_tc_l3_in";
    /// TC egress of interfaces without Ethernet header.
    pub const TC_L3_EGRESS: &str = "nm_tc_l3_out";
    /// XDP ingress: counts what arrives, instead of the TC ingress program.
    pub const XDP_INGRESS: &str = "nm_xdp_ingress";

    /// All of them; the agent pins each under its name.
    pub const ALL: [&str; 5] = [TC_INGRESS, TC_EGRESS, TC_L3_INGRESS, TC_L3_EGRESS, XDP_INGRESS];
}

/// A flow is in a new burst when its last packet is this old: the two seconds of silence that end a transfer.
pub const SILENCE_NS: u64 = 2_000_000_000;

/// Slots in each of the two flow tables, over all CPUs (4 and 6 MiB, and 2 MiB each of [`Lives`]). A PC has some hundreds
/// of flows; what finds no slot takes that of the flow that was silent for longest, whose counts are handed over.
pub const MAX_FLOWS: usize = 65_536;
/// Slots in a set. A flow may be in any slot of the one set that its hash names.
pub const WAYS: usize = 4;
/// Sets in a region, the unit in which the agent looks for changes.
pub const REGION_SETS: usize = 16;
/// Datagrams whose fragments are followed at a time.
pub const MAX_FRAGMENTS: usize = 4_096;
/// Flows that `nm_flows4` and `nm_flows6` show.
pub const MAX_SHOWN: usize = 16_384;
/// CPUs, unless the loader says how many there can be.
pub const MAX_CPUS: usize = 1_024;
/// Entries in each trie of `ip.txt` prefixes.
pub const MAX_MUTED_PREFIXES: usize = 65_536;
/// Entries in each trie of private prefixes.
pub const MAX_LAN_PREFIXES: usize = 1_024;
/// Size of the ring buffer in bytes (a power of two and a multiple of the page size): 29,000 evicted flows.
pub const RING_BYTES: usize = 1 << 22;

/// IP protocol number of TCP (RFC 9293).
pub const IPPROTO_TCP: u8 = 6;
/// IP protocol number of UDP (RFC 768).
pub const IPPROTO_UDP: u8 = 17;

/// One IPv4 flow as this PC sees it. The hook gives the direction, so both directions share one key.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Flow4Key {
    /// This PC's address.
    pub local_addr: [u8; 4],
    /// The counterpart's address.
    pub remote_addr: [u8; 4],
    /// This PC's port; 0 for a fragment that carries no ports.
    pub local_port: u16,
    /// The counterpart's port; 0 for a fragment that carries no ports.
    pub remote_port: u16,
    /// [`IPPROTO_TCP`] or [`IPPROTO_UDP`].
    pub protocol: u8,
    /// Always zero.
    pub pad: [u8; 3],
}

/// One IPv6 flow; see [`Flow4Key`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Flow6Key {
    /// This PC's address.
    pub local_addr: [u8; 16],
    /// The counterpart's address.
    pub remote_addr: [u8; 16],
    /// This PC's port; 0 for a fragment that carries no ports.
    pub local_port: u16,
    /// The counterpart's port; 0 for a fragment that carries no ports.
    pub remote_port: u16,
    /// [`IPPROTO_TCP`] or [`IPPROTO_UDP`].
    pub protocol: u8,
    /// Always zero.
    pub pad: [u8; 3],
}

/// A flow over all CPUs, as `bpftool map dump name nm_flows4` shows it. Counters only grow; `tx` leaves this PC, `rx`
/// arrives.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowState {
    /// Packets sent; a GSO super-packet counts its segments.
    pub tx_packets: u64,
    /// Bytes sent, from the IP header on, without link-layer padding. A GSO or GRO super-packet has one set of
    /// headers here, as in the interface's own counters.
    pub tx_bytes: u64,
    /// Bytes sent behind the TCP or UDP header.
    pub tx_payload: u64,
    /// Packets received; a GRO super-packet counts its segments.
    pub rx_packets: u64,
    /// Bytes received, from the IP header on, without link-layer padding.
    pub rx_bytes: u64,
    /// Bytes received behind the TCP or UDP header.
    pub rx_payload: u64,
    /// First packet, boot clock, nanoseconds.
    pub first_ns: u64,
    /// Last packet, boot clock, nanoseconds; in steps of [`TICK_NS`].
    pub last_ns: u64,
    /// Interface that saw the first packet.
    pub ifindex: u32,
    /// Label of the muted prefix (index into the agent's label list); 0 unless `class` is [`CLASS_MUTED`].
    pub label: u16,
    /// One of the `CLASS_` constants.
    pub class: u8,
    /// One of the `OPENED_` constants.
    pub opened: u8,
    /// All TCP flags seen so far, both directions (RFC 9293, section 3.1).
    pub tcp_flags: u8,
    /// `HINT_` bits.
    pub hints: u8,
    /// Always zero.
    pub pad: [u8; 6],
}

/// Unit of [`Counts::last_tick`], nanoseconds: 2^20, a good millisecond. 32 bits of it are 52 days.
pub const TICK_NS: u64 = 1 << TICK_SHIFT;
/// Nanoseconds of the boot clock, shifted right by this, are ticks.
pub const TICK_SHIFT: u32 = 20;

/// The end of a slot's key, and what was seen in the packets' headers. One word of eight bytes.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ports {
    /// This PC's port; 0 for a later fragment of a datagram whose first one was not seen.
    pub local_port: u16,
    /// The counterpart's port; 0 as above.
    pub remote_port: u16,
    /// [`IPPROTO_TCP`] or [`IPPROTO_UDP`].
    pub protocol: u8,
    /// All TCP flags seen so far, both directions (RFC 9293, section 3.1).
    pub tcp_flags: u8,
    /// `HINT_` bits.
    pub hints: u8,
    /// One of the `CLASS_` constants.
    pub class: u8,
}

/// What a slot counts.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// As in [`FlowState`].
    pub tx_bytes: u64,
    /// As in [`FlowState`].
    pub rx_bytes: u64,
    /// Lower [`PAYLOAD_BITS`]: as in [`FlowState`], modulo 2^48. Above: lower half of the burst's tick, see
    /// [`Self::burst_tick`].
    pub tx_payload: u64,
    /// As `tx_payload`, above: upper half of the burst's tick.
    pub rx_payload: u64,
    /// Last packet, boot clock, in ticks of [`TICK_NS`]; wraps.
    pub last_tick: u32,
    /// [`CpuStats::generation`] (its low half) under which `class` and `label` were looked up.
    pub generation: u16,
    /// Label of the muted prefix; 0 unless the class is [`CLASS_MUTED`].
    pub label: u16,
    /// As in [`FlowState`], but wraps: read it more often than every 4 billion packets. Written last, together with
    /// `rx_packets` one word of eight bytes: who reads this word first and the others then has at least all of these
    /// packets' bytes.
    pub tx_packets: u32,
    /// As `tx_packets`.
    pub rx_packets: u32,
}

/// Bits of [`Counts::tx_payload`] and [`Counts::rx_payload`] that count payload. What is above would be stored in a line of
/// its own otherwise, which a table of a million flows would have to fetch from memory for every burst.
pub const PAYLOAD_BITS: u32 = 48;
const PAYLOAD: u64 = (1 << PAYLOAD_BITS) - 1;

impl Counts {
    /// Both payload counters in the place of these two, in a burst that began at this tick.
    #[inline(always)]
    pub const fn payloads(tx: u64, rx: u64, burst_tick: u32) -> (u64, u64) {
        let (lower, upper) = (burst_tick as u64 & 0xffff, burst_tick as u64 >> 16);
        (tx & PAYLOAD | lower << PAYLOAD_BITS, rx & PAYLOAD | upper << PAYLOAD_BITS)
    }

    /// Did the flow carry payload (or a multiple of 2^48 bytes in both directions)?
    #[inline(always)]
    pub const fn carried_payload(&self) -> bool {
        (self.tx_payload | self.rx_payload) & PAYLOAD != 0
    }

    /// First packet after the latest silence of [`SILENCE_NS`], or of all, in ticks of [`TICK_NS`]; wraps. A payload counter
    /// that wraps shifts it, which costs no count: the reader knows when the flow was last seen.
    pub const fn burst_tick(&self) -> u32 {
        (self.tx_payload >> PAYLOAD_BITS) as u32 | ((self.rx_payload >> PAYLOAD_BITS) as u32) << 16
    }

    /// Payload bytes sent since another reading.
    pub const fn tx_payload_since(&self, before: u64) -> u64 {
        self.tx_payload.wrapping_sub(before) & PAYLOAD
    }

    /// Payload bytes received since another reading.
    pub const fn rx_payload_since(&self, before: u64) -> u64 {
        self.rx_payload.wrapping_sub(before) & PAYLOAD
    }
}

/// Where a flow in a slot comes from, and how much of it was read.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Life {
    /// Grows by one with every flow that gets this slot. 0: the slot is empty, or about to change hands.
    pub incarnation: u32,
    /// Interface that saw the first packet.
    pub ifindex: u32,
    /// First packet, boot clock, nanoseconds.
    pub first_ns: u64,
    /// One of the `OPENED_` constants.
    pub opened: u8,
    /// Always zero.
    pub pad: [u8; 3],
    /// Written by the agent: the incarnation that it has read, after `read_packets`.
    pub read_incarnation: u32,
    /// Written by the agent: [`Counts::tx_packets`] as it has read them.
    pub read_tx_packets: u32,
    /// Written by the agent: [`Counts::rx_packets`] as it has read them.
    pub read_rx_packets: u32,
}

/// One IPv4 flow in one CPU's table: only programs on this CPU write to it, one at a time. One cache line, and all that a
/// packet of a flow that has its slot writes to.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot4 {
    /// This PC's address.
    pub local_addr: [u8; 4],
    /// The counterpart's address.
    pub remote_addr: [u8; 4],
    /// The rest of the key.
    pub ports: Ports,
    /// What is counted.
    pub counts: Counts,
}

/// One IPv6 flow in one CPU's table; see [`Slot4`].
#[repr(C, align(32))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot6 {
    /// This PC's address.
    pub local_addr: [u8; 16],
    /// The counterpart's address.
    pub remote_addr: [u8; 16],
    /// The rest of the key.
    pub ports: Ports,
    /// What is counted.
    pub counts: Counts,
    /// Always zero.
    pub pad: u64,
}

/// Element of `nm_table4`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Set4 {
    /// In no order.
    pub slots: [Slot4; WAYS],
}

/// Element of `nm_table6`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Set6 {
    /// In no order.
    pub slots: [Slot6; WAYS],
}

/// Element of `nm_lives`: what belongs to a set's slots and is rarely needed. Kept apart, so that more slots fit into the
/// caches and into what the processor remembers of the page tables.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lives {
    /// In the slots' order.
    pub lives: [Life; WAYS],
}

/// Element of `nm_touched`.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// When a packet last wrote to the region, as [`stamp`]s. 0: never.
    pub stamps: [u16; STAMPS],
}

/// Regions of a [`Touched`].
pub const STAMPS: usize = 32;
/// Nanoseconds of the boot clock, shifted right by this, are stamps: 67 ms.
pub const STAMP_SHIFT: u32 = 26;

/// A boot time in nanoseconds as it is noted for a region. Comes again after 73 minutes, and is never 0.
#[inline(always)]
pub const fn stamp(boot_ns: u64) -> u16 {
    let stamp = (boot_ns >> STAMP_SHIFT) as u16;
    if stamp == 0 { 1 } else { stamp }
}

/// Words of eight bytes in a [`Slot6`], the larger one.
pub const SLOT_WORDS: usize = 12;
/// Words of eight bytes in a [`Life`].
pub const LIFE_WORDS: usize = 4;

/// Ring buffer record: a flow lost its slot to another one before the agent had read all of it. Submitted before the
/// slot changes hands.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Evicted {
    /// Number of the slot in its table: the set's number times [`WAYS`], plus its place in the set.
    pub slot: u32,
    /// 4 or 6.
    pub family: u32,
    /// The [`Slot4`] (and zeros) or [`Slot6`], with all that was counted in this incarnation.
    pub words: [u64; SLOT_WORDS],
    /// Its [`Life`].
    pub life: [u64; LIFE_WORDS],
}

/// A datagram in fragments (RFC 791, section 3.2; RFC 8200, section 4.5).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FragmentKey {
    /// Sender; IPv4 in the first four bytes, rest zero.
    pub source: [u8; 16],
    /// Receiver.
    pub destination: [u8; 16],
    /// Identification, as on the wire.
    pub id: u32,
    /// IP protocol.
    pub protocol: u8,
    /// 4 or 6.
    pub family: u8,
    /// Always zero.
    pub pad: [u8; 2],
}

/// The ports in a datagram's first fragment.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FragmentPorts {
    /// Sender's.
    pub source: u16,
    /// Receiver's.
    pub destination: u16,
}

/// The counterpart is in a private network.
pub const CLASS_LAN: u8 = 1;
/// The counterpart is on the Internet and in no muted prefix.
pub const CLASS_INTERNET: u8 = 2;
/// The counterpart is in a prefix of `ip.txt`.
pub const CLASS_MUTED: u8 = 3;
/// The counterpart is a group: multicast or broadcast.
pub const CLASS_GROUP: u8 = 4;

/// The first packet does not tell who opened the flow (mid-stream, UDP that was there before us, or UDP that took its slot
/// from a flow that was not read yet: under a flood the clock is not read for each new flow).
pub const OPENED_UNKNOWN: u8 = 0;
/// This PC opened the flow.
pub const OPENED_HERE: u8 = 1;
/// The counterpart opened the flow.
pub const OPENED_THERE: u8 = 2;

/// The first UDP payload starts like a QUIC long header with version 1 or 2 (RFC 9000 17.2, RFC 9369 3.1).
pub const HINT_QUIC: u8 = 1;
/// Later fragments are among the packets. They carry no ports: they are counted with those of their first fragment, or
/// with ports 0 when that one was not seen before them.
pub const HINT_FRAGMENTS: u8 = 2;

/// Ring buffer record: a flow got a slot. Not written when that flow's slot had to be taken from another one that was
/// not read yet, nor when the ring is half full: the flow is counted all the same, and found by the next sweep.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowOpened {
    /// Local address; IPv4 in the first four bytes, rest zero.
    pub local_addr: [u8; 16],
    /// Remote address; IPv4 in the first four bytes, rest zero.
    pub remote_addr: [u8; 16],
    /// First packet, boot clock, nanoseconds.
    pub first_ns: u64,
    /// L3 bytes of the first packet.
    pub bytes: u32,
    /// Of `bytes`, those behind the TCP or UDP header.
    pub payload: u32,
    /// Interface that saw the first packet.
    pub ifindex: u32,
    /// Local port.
    pub local_port: u16,
    /// Remote port.
    pub remote_port: u16,
    /// Muted label, as in [`FlowState::label`].
    pub label: u16,
    /// 4 or 6.
    pub family: u8,
    /// IP protocol.
    pub protocol: u8,
    /// One of the `CLASS_` constants.
    pub class: u8,
    /// One of the `OPENED_` constants.
    pub opened: u8,
    /// `HINT_` bits.
    pub hints: u8,
    /// Always zero.
    pub pad: u8,
}

/// What happened to the frames that reached the hooks. `seen` equals the sum of `counted` and all refusals
/// except `ring_full` (a flow that was not announced is counted in the table).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Frames that reached a hook.
    pub seen: u64,
    /// Frames counted in a flow.
    pub counted: u64,
    /// L3 bytes counted in a flow.
    pub counted_bytes: u64,
    /// Frames that are not IP (ARP, LLDP …), passed by.
    pub not_ip: u64,
    /// Frame bytes of `not_ip`.
    pub not_ip_bytes: u64,
    /// IP packets that are neither TCP nor UDP (ICMP, IGMP, ESP …), passed by.
    pub other_protocol: u64,
    /// L3 bytes of `other_protocol`.
    pub other_protocol_bytes: u64,
    /// Frames too short or inconsistent to parse.
    pub malformed: u64,
    /// Frame bytes of `malformed`.
    pub malformed_bytes: u64,
    /// Frames of flows that got no slot: all of their set held counts that the agent had not read, and the ring had no
    /// room to hand them over.
    pub table_full: u64,
    /// L3 bytes of `table_full`.
    pub table_full_bytes: u64,
    /// "Flow opened" records that were not written because the ring was half full. Nothing is lost but the wake-up.
    pub ring_full: u64,
}

/// One CPU's [`Stats`] and its clock.
#[repr(C, align(128))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuStats {
    /// What happened to the frames on this CPU.
    pub stats: Stats,
    /// `clock_ns` was read in this jiffy.
    pub clock_jiffies: u64,
    /// Boot clock, nanoseconds (`bpf_ktime_get_boot_ns`, kernel 5.8): read once a jiffy, when a packet comes.
    pub clock_ns: u64,
    /// When this CPU last woke the agent, boot clock, nanoseconds.
    pub woken_ns: u64,
    /// Written by the agent: another number whenever the tries were refilled. A flow of another generation is classified
    /// again.
    pub generation: u32,
    /// Lines that the programs said of themselves, whether their ring had room for them or not. Wraps.
    pub said: u32,
}

/// How the tables are laid out: a constant of the programs, another one at every start of the agent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableLayout {
    /// Sets that each CPU has in each table, a multiple of [`REGION_SETS`].
    pub sets: u32,
    /// Regions that each table has, over all CPUs.
    pub regions: u32,
    /// Random numbers that make it unknown which flows share a set.
    pub hash_keys: [u64; HASH_KEYS],
}

/// Words of four bytes in an IPv6 slot's key, the protocol being one.
pub const HASH_KEYS: usize = 10;

/// What a prefix in a trie stands for.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixValue {
    /// Index into the agent's label list.
    pub label: u16,
    /// Always zero.
    pub pad: u16,
}

const _: () = assert!(size_of::<Flow4Key>() == 16);
const _: () = assert!(size_of::<Flow6Key>() == 40);
const _: () = assert!(size_of::<FlowState>() == 80);
const _: () = assert!(size_of::<Slot4>() == 64 && size_of::<Slot6>() == SLOT_WORDS * 8);
const _: () = assert!(size_of::<Life>() == LIFE_WORDS * 8 && size_of::<Touched>() == 64);
const _: () = assert!(offset_of!(Life, read_tx_packets) % 8 == 0 && offset_of!(Counts, tx_packets) % 8 == 0);
const _: () = assert!(size_of::<Evicted>() == 136);
const _: () = assert!(size_of::<FragmentKey>() == 40);
const _: () = assert!(size_of::<FragmentPorts>() == 4);
const _: () = assert!(size_of::<FlowOpened>() == 64);
const _: () = assert!(size_of::<Stats>() == 96);
const _: () = assert!(size_of::<CpuStats>() == 128);
const _: () = assert!(size_of::<TableLayout>() == 88);
const _: () = assert!(size_of::<PrefixValue>() == 4);

#[cfg(feature = "aya")]
mod pod {
    use super::*;

    macro_rules! pod {
        ($($t:ty),*) => {$(
            // SAFETY: `repr(C)`, integers and byte arrays only, no padding (sizes are proven above), so every
            // byte pattern is a value.
            unsafe impl aya::Pod for $t {}
        )*};
    }
    pod!(
        Flow4Key,
        Flow6Key,
        FlowState,
        Slot4,
        Slot6,
        Set4,
        Set6,
        Life,
        Lives,
        CpuStats,
        TableLayout,
        PrefixValue
    );
}
