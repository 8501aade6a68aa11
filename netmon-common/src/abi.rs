//! The border between the kernel programs and the agent: plain numbers with a fixed layout.
//!
//! No `bool`, `Option` or `enum` crosses it. The agent turns these numbers into types of its own and may
//! refuse what it does not know. Field names are a user interface: `bpftool map dump name nm_flows4` prints
//! them. All integers are in host byte order; addresses are in network byte order as they stand on the wire.

use core::mem::size_of;

/// Names of the maps as the kernel and `bpftool` know them (the kernel keeps 15 characters).
pub mod maps {
    /// Flow table, IPv4: [`super::Flow4Key`] → [`super::FlowState`].
    pub const FLOWS4: &str = "nm_flows4";
    /// Flow table, IPv6: [`super::Flow6Key`] → [`super::FlowState`].
    pub const FLOWS6: &str = "nm_flows6";
    /// Prefixes that count as the private network, IPv4 (LPM trie) → [`super::PrefixValue`].
    pub const LAN4: &str = "nm_lan4";
    /// Prefixes that count as the private network, IPv6 (LPM trie) → [`super::PrefixValue`].
    pub const LAN6: &str = "nm_lan6";
    /// Muted prefixes of `ip.txt`, IPv4 (LPM trie) → [`super::PrefixValue`].
    pub const MUTE4: &str = "nm_mute4";
    /// Muted prefixes of `ip.txt`, IPv6 (LPM trie) → [`super::PrefixValue`].
    pub const MUTE6: &str = "nm_mute6";
    /// Ring buffer of [`super::FlowOpened`].
    pub const EVENTS: &str = "nm_events";
    /// Per-CPU array with one [`super::Stats`].
    pub const STATS: &str = "nm_stats";
    /// Array with one [`super::Config`].
    pub const CONFIG: &str = "nm_config";
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
}

/// A flow is in a new burst when its last packet is this old: the two seconds of silence that end a transfer.
pub const SILENCE_NS: u64 = 2_000_000_000;

/// Entries in each of the two flow tables. A PC has some hundreds of flows; 65,536 leave room for a port scan.
pub const MAX_FLOWS: usize = 65_536;
/// Entries in each trie of `ip.txt` prefixes.
pub const MAX_MUTED_PREFIXES: usize = 65_536;
/// Entries in each trie of private prefixes.
pub const MAX_LAN_PREFIXES: usize = 1_024;
/// Size of the ring buffer in bytes (a power of two and a multiple of the page size): 8,192 records.
pub const RING_BYTES: usize = 1 << 20;

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

/// What the kernel knows of one flow. Counters only grow; `tx` leaves this PC, `rx` arrives.
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
    /// First packet, boot clock, nanoseconds (`bpf_ktime_get_boot_ns`, kernel 5.8).
    pub first_ns: u64,
    /// First packet after the latest silence of [`SILENCE_NS`]; equals `first_ns` in the first burst.
    pub burst_ns: u64,
    /// Last packet, boot clock, nanoseconds.
    pub last_ns: u64,
    /// [`Config::generation`] under which `class` and `label` were looked up.
    pub generation: u32,
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
    pub pad: [u8; 2],
}

/// The counterpart is in a private network.
pub const CLASS_LAN: u8 = 1;
/// The counterpart is on the Internet and in no muted prefix.
pub const CLASS_INTERNET: u8 = 2;
/// The counterpart is in a prefix of `ip.txt`.
pub const CLASS_MUTED: u8 = 3;
/// The counterpart is a group: multicast or broadcast.
pub const CLASS_GROUP: u8 = 4;

/// The first packet does not tell who opened the flow (mid-stream, or UDP that was there before us).
pub const OPENED_UNKNOWN: u8 = 0;
/// This PC opened the flow.
pub const OPENED_HERE: u8 = 1;
/// The counterpart opened the flow.
pub const OPENED_THERE: u8 = 2;

/// The first UDP payload starts like a QUIC long header with version 1 or 2 (RFC 9000 17.2, RFC 9369 3.1).
pub const HINT_QUIC: u8 = 1;
/// Non-first fragments are among the packets (they carry no ports; their key has ports 0).
pub const HINT_FRAGMENTS: u8 = 2;

/// Ring buffer record: a flow's first packet was seen. While the flow table is full, every packet of a flow outside
/// of it is a first packet.
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
    /// Of `bytes`, those in front of the payload: IP, TCP and UDP headers of the first packet.
    pub header_bytes: u16,
    /// Packets on the wire that the first packet stands for: above 1 for a GSO or GRO super-packet.
    pub packets: u16,
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
    /// [`STORED`], [`NOT_STORED_TX`] or [`NOT_STORED_RX`].
    pub stored: u8,
}

impl FlowOpened {
    /// Bytes behind the TCP or UDP header of the first packet.
    pub fn payload(&self) -> u32 {
        self.bytes.saturating_sub(self.header_bytes.into())
    }
}

/// The flow has an entry in the flow table, and the first packet is counted there.
pub const STORED: u8 = 1;
/// The flow table had no room for a packet that leaves this PC: it is counted in [`Stats::table_full`], and this
/// record is all that is known of it.
pub const NOT_STORED_TX: u8 = 2;
/// As [`NOT_STORED_TX`], of a packet that arrived.
pub const NOT_STORED_RX: u8 = 3;

/// What happened to the frames that reached the hooks. `seen` equals the sum of `counted` and all refusals
/// except `ring_full` (a flow whose record did not fit in the ring is still counted in the table).
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
    /// Frames of flows for which the flow table had no room.
    pub table_full: u64,
    /// L3 bytes of `table_full`.
    pub table_full_bytes: u64,
    /// "Flow opened" records of flows in the table that did not fit into the ring buffer. Frames of flows outside the
    /// table are in `table_full`, whether their record did fit or not.
    pub ring_full: u64,
}

/// What the agent tells the programs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Grows whenever the tries were refilled; a flow with an older generation is classified again.
    pub generation: u32,
    /// Always zero.
    pub pad: u32,
}

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
const _: () = assert!(size_of::<FlowState>() == 88);
const _: () = assert!(size_of::<FlowOpened>() == 64);
const _: () = assert!(size_of::<Stats>() == 96);
const _: () = assert!(size_of::<Config>() == 8);
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
    pod!(Flow4Key, Flow6Key, FlowState, Stats, Config, PrefixValue);
}
