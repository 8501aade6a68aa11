//! Frame → [`Packet`], or the reason why not.

use netmon_common::abi::{IPPROTO_TCP, IPPROTO_UDP};

use crate::frame::Frame;

/// What stands in front of the IP header.
#[derive(Clone, Copy)]
pub enum Link {
    /// An Ethernet header, perhaps with VLAN tags.
    Ethernet,
    /// Nothing.
    None,
}

/// A TCP or UDP packet, or a later fragment of one.
pub struct Packet {
    /// Who speaks to whom.
    pub addresses: Addresses,
    /// 0 in a later fragment.
    pub source_port: u16,
    /// 0 in a later fragment.
    pub destination_port: u16,
    /// [`IPPROTO_TCP`] or [`IPPROTO_UDP`].
    pub protocol: u8,
    /// TCP flags; 0 for anything else.
    pub tcp_flags: u8,
    /// A fragment that is not the first one: no ports.
    pub fragment: bool,
    /// The frame is addressed to a group of link-layer stations.
    pub group_frame: bool,
    /// Bytes from the IP header on, without link-layer padding.
    pub l3_bytes: u32,
    /// Bytes behind the TCP or UDP header; in a later fragment: behind the IP header.
    pub payload: u32,
    /// Where the payload starts in the frame.
    pub payload_at: u32,
}

/// Addresses as they stand on the wire.
pub enum Addresses {
    /// IPv4.
    V4 {
        /// Sender.
        source: [u8; 4],
        /// Receiver.
        destination: [u8; 4],
    },
    /// IPv6.
    V6 {
        /// Sender.
        source: [u8; 16],
        /// Receiver.
        destination: [u8; 16],
    },
}

/// Why a frame is in no flow.
pub enum Refusal {
    /// ARP, LLDP, PPPoE, a third VLAN tag …
    NotIp,
    /// IP, but neither TCP nor UDP.
    OtherProtocol {
        /// Bytes from the IP header on.
        l3_bytes: u32,
    },
    /// Too short, or its lengths contradict each other.
    Malformed,
}

const ETHERNET_HEADER: u32 = 14;
const VLAN_TAG: u32 = 4;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
/// IEEE 802.1Q and 802.1ad.
const ETHERTYPES_VLAN: [u16; 2] = [0x8100, 0x88a8];
/// One customer and one service tag. A tag that the kernel took out of the frame is not here any more.
const MAX_VLAN_TAGS: u32 = 2;

const IPV6_HEADER: u32 = 40;
/// RFC 8200 (4.1) recommends an order in which six extension headers occur, one of them twice.
const MAX_EXTENSION_HEADERS: u32 = 7;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;
const MOBILITY: u8 = 135;
const HIP: u8 = 139;
const SHIM6: u8 = 140;

const TCP_HEADER: u32 = 20;
const UDP_HEADER: u32 = 8;

/// Reads a frame down to its TCP or UDP header.
#[inline(always)]
pub fn parse<F: Frame>(frame: &F, link: Link) -> Result<Packet, Refusal> {
    match link {
        Link::Ethernet => ethernet(frame),
        Link::None => {
            let [first] = frame.bytes::<1>(0).ok_or(Refusal::Malformed)?;
            match first >> 4 {
                4 => ipv4(frame, 0, false),
                6 => ipv6(frame, 0, false),
                _ => Err(Refusal::NotIp),
            }
        }
    }
}

#[inline(always)]
fn ethernet<F: Frame>(frame: &F) -> Result<Packet, Refusal> {
    let header: [u8; 14] = frame.bytes(0).ok_or(Refusal::Malformed)?;
    let group = header[0] & 1 != 0;
    let mut ethertype = u16::from_be_bytes([header[12], header[13]]);
    let mut at = ETHERNET_HEADER;
    for _ in 0..MAX_VLAN_TAGS {
        if ethertype != ETHERTYPES_VLAN[0] && ethertype != ETHERTYPES_VLAN[1] {
            break;
        }
        let tag: [u8; 4] = frame.bytes(at).ok_or(Refusal::Malformed)?;
        ethertype = u16::from_be_bytes([tag[2], tag[3]]);
        at += VLAN_TAG;
    }
    match ethertype {
        ETHERTYPE_IPV4 => ipv4(frame, at, group),
        ETHERTYPE_IPV6 => ipv6(frame, at, group),
        _ => Err(Refusal::NotIp),
    }
}

/// RFC 791, section 3.1.
#[inline(always)]
fn ipv4<F: Frame>(frame: &F, at: u32, group_frame: bool) -> Result<Packet, Refusal> {
    let header: [u8; 20] = frame.bytes(at).ok_or(Refusal::Malformed)?;
    let header_bytes = u32::from(header[0] & 0x0f) * 4;
    let l3_bytes = l3_bytes(frame, at, u32::from(u16::from_be_bytes([header[2], header[3]])));
    if header[0] >> 4 != 4 || header_bytes < 20 || l3_bytes < header_bytes {
        return Err(Refusal::Malformed);
    }
    let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x1fff != 0;
    let addresses = Addresses::V4 {
        source: [header[12], header[13], header[14], header[15]],
        destination: [header[16], header[17], header[18], header[19]],
    };
    transport(frame, Ip { addresses, protocol: header[9], at, header_bytes, l3_bytes, fragment, group_frame })
}

/// RFC 8200, sections 3 and 4.
#[inline(always)]
fn ipv6<F: Frame>(frame: &F, at: u32, group_frame: bool) -> Result<Packet, Refusal> {
    let header: [u8; 40] = frame.bytes(at).ok_or(Refusal::Malformed)?;
    if header[0] >> 4 != 6 {
        return Err(Refusal::Malformed);
    }
    let payload = u32::from(u16::from_be_bytes([header[4], header[5]]));
    // A jumbo payload (RFC 2675; the kernel's own big TCP packets) says 0 here.
    let l3_bytes = l3_bytes(frame, at, if payload == 0 { 0 } else { payload + IPV6_HEADER });
    let (mut source, mut destination) = ([0; 16], [0; 16]);
    source.copy_from_slice(&header[8..24]);
    destination.copy_from_slice(&header[24..40]);

    let mut protocol = header[6];
    let mut header_bytes = IPV6_HEADER;
    let mut fragment = false;
    for _ in 0..MAX_EXTENSION_HEADERS {
        let unit = match protocol {
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS | MOBILITY | HIP | SHIM6 => 8,
            // RFC 4302, section 2.2: in units of 4 bytes, minus 2.
            AUTHENTICATION => 4,
            FRAGMENT => 0,
            _ => break,
        };
        let extension: [u8; 4] = frame.bytes(at + header_bytes).ok_or(Refusal::Malformed)?;
        protocol = extension[0];
        if unit == 0 {
            header_bytes += 8;
            fragment = u16::from_be_bytes([extension[2], extension[3]]) & 0xfff8 != 0;
            if fragment {
                break;
            }
        } else {
            header_bytes += 8 + u32::from(extension[1]) * unit;
        }
    }
    let extension_left = matches!(
        protocol,
        HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS | MOBILITY | HIP | SHIM6 | AUTHENTICATION | FRAGMENT
    );
    if l3_bytes < header_bytes || (extension_left && !fragment) {
        return Err(Refusal::Malformed);
    }
    let addresses = Addresses::V6 { source, destination };
    transport(frame, Ip { addresses, protocol, at, header_bytes, l3_bytes, fragment, group_frame })
}

/// What the IP header says, or what the frame holds when that is less (or when the header says nothing: a
/// super-packet of more than 64 KiB).
#[inline(always)]
fn l3_bytes<F: Frame>(frame: &F, at: u32, said: u32) -> u32 {
    let held = frame.len() - at;
    if said != 0 && said < held { said } else { held }
}

struct Ip {
    addresses: Addresses,
    protocol: u8,
    at: u32,
    header_bytes: u32,
    l3_bytes: u32,
    fragment: bool,
    group_frame: bool,
}

#[inline(always)]
fn transport<F: Frame>(frame: &F, ip: Ip) -> Result<Packet, Refusal> {
    let Ip { addresses, protocol, at, header_bytes, l3_bytes, fragment, group_frame } = ip;
    if protocol != IPPROTO_TCP && protocol != IPPROTO_UDP {
        return Err(Refusal::OtherProtocol { l3_bytes });
    }
    let at = at + header_bytes;
    let held = l3_bytes - header_bytes;
    let (source_port, destination_port, transport_bytes, tcp_flags) = if fragment {
        (0, 0, 0, 0)
    } else if protocol == IPPROTO_TCP {
        // RFC 9293, section 3.1: the data offset counts words of four bytes.
        let header: [u8; 14] = frame.bytes(at).ok_or(Refusal::Malformed)?;
        let header_bytes = u32::from(header[12] >> 4) * 4;
        if header_bytes < TCP_HEADER {
            return Err(Refusal::Malformed);
        }
        (port(header[0], header[1]), port(header[2], header[3]), header_bytes, header[13])
    } else {
        let header: [u8; 4] = frame.bytes(at).ok_or(Refusal::Malformed)?;
        (port(header[0], header[1]), port(header[2], header[3]), UDP_HEADER, 0)
    };
    // Padding behind a short IP packet is not a transport header.
    if held < transport_bytes {
        return Err(Refusal::Malformed);
    }
    Ok(Packet {
        addresses,
        source_port,
        destination_port,
        protocol,
        tcp_flags,
        fragment,
        group_frame,
        l3_bytes,
        payload: held - transport_bytes,
        payload_at: at + transport_bytes,
    })
}

#[inline(always)]
fn port(high: u8, low: u8) -> u16 {
    u16::from_be_bytes([high, low])
}

/// Long header form and fixed bit (RFC 9000, 17.2), then version 1 or 2 (RFC 9369, 3.1).
#[inline(always)]
pub fn looks_like_quic<F: Frame>(frame: &F, packet: &Packet) -> bool {
    if packet.protocol != IPPROTO_UDP || packet.fragment || packet.payload < 5 {
        return false;
    }
    let Some(start) = frame.bytes::<5>(packet.payload_at) else {
        return false;
    };
    let version = u32::from_be_bytes([start[1], start[2], start[3], start[4]]);
    start[0] & 0xc0 == 0xc0 && (version == 1 || version == 0x6b33_43cf)
}
