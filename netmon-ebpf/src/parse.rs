//! Frame → [`Packet`], or the reason why not.
//!
//! Two readers: [`plain4`] and [`plain6`] take what nearly every packet is, straight from memory, and nothing that is odd
//! in any way; [`parse`] takes everything. Where both take a packet, they must agree. netmon-fuzz builds this file for the
//! host, with another [`crate::frame`], and compares them: all that is BPF's own stays there.
//!
//! Types in the signatures of subprograms are plain: the BTF that the compiler makes of an enum with data is
//! refused by the kernel.

use netmon_common::abi::{IPPROTO_TCP, IPPROTO_UDP};

use crate::frame::{Frame, load, not_zero};

/// What stands in front of the IP header.
#[derive(Clone, Copy)]
#[repr(u32)]
pub enum Link {
    /// An Ethernet header, perhaps with VLAN tags.
    Ethernet,
    /// Nothing.
    None,
}

/// What is counted of a TCP or UDP packet, or of a later fragment of one.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct Measure {
    /// Bytes from the IP header on, without link-layer padding. Of another protocol's packet, too.
    pub l3_bytes: u32,
    /// Bytes behind the TCP or UDP header; in a later fragment: behind the IP header.
    pub payload: u32,
    /// Where the IP header starts in the frame.
    pub l3_at: u32,
    /// TCP flags; 0 for anything else.
    pub tcp_flags: u8,
    /// A fragment that is not the first one: no ports of its own.
    pub later_fragment: bool,
    /// The frame is addressed to a group of link-layer stations.
    pub group_frame: bool,
    /// [`IPPROTO_TCP`] or [`IPPROTO_UDP`].
    pub protocol: u8,
}

/// A packet as [`parse`] reads it. Aligned, so that it is cleared and filled by whole words.
#[derive(Default)]
#[repr(C, align(8))]
pub struct Packet {
    /// Sender, as on the wire; IPv4 in the first four bytes.
    pub source: [u8; 16],
    /// Receiver, as on the wire; IPv4 in the first four bytes.
    pub destination: [u8; 16],
    /// What is counted.
    pub measure: Measure,
    /// 0 in a later fragment.
    pub source_port: u16,
    /// 0 in a later fragment.
    pub destination_port: u16,
    /// Identification of a fragmented datagram, as on the wire.
    pub fragment_id: u32,
    /// 4 or 6.
    pub family: u8,
    /// More fragments follow, and this is the one with the ports.
    pub first_fragment: bool,
    /// Always zero.
    pub pad: [u8; 6],
}

impl Packet {
    /// As in [`Plain`].
    #[inline(always)]
    pub fn addresses4(&self) -> u64 {
        let word = |address: &[u8; 16]| u32::from_ne_bytes([address[0], address[1], address[2], address[3]]);
        u64::from(word(&self.source)) | u64::from(word(&self.destination)) << 32
    }

    /// As in [`Plain`].
    #[inline(always)]
    pub fn addresses6(&self) -> [u64; 4] {
        // SAFETY: a packet is aligned to eight bytes, and its addresses are its first 32.
        unsafe { (&raw const *self).cast::<[u64; 4]>().read() }
    }

    /// As in [`Plain`].
    #[inline(always)]
    pub fn ports(&self) -> u32 {
        u32::from(self.source_port) << 16 | u32::from(self.destination_port)
    }
}

/// What a frame is.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Parsed {
    /// A [`Packet`], completely filled in.
    Packet,
    /// ARP, LLDP, PPPoE, a third VLAN tag …
    NotIp,
    /// IP, but neither TCP nor UDP. Only `l3_bytes` is filled in.
    OtherProtocol,
    /// Too short, or its lengths contradict each other.
    Malformed,
}

/// Bytes.
pub const ETHERNET_HEADER: usize = 14;
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

const IPV4_HEADER: u32 = 20;
/// A frame that holds these bytes behind the link-layer header can be asked for either version.
pub const PLAIN_BYTES: usize = (IPV4_HEADER + UDP_HEADER) as usize;

/// A plain packet: the key's numbers as they stand in the packet, sender first, and what is counted.
#[derive(Clone, Copy)]
pub struct Plain<A> {
    /// Source and destination address, in words as they are in memory.
    pub addresses: A,
    /// Source port in the upper, destination port in the lower half.
    pub ports: u32,
    /// What is counted.
    pub measure: Measure,
}

/// An IPv4 packet without options that is no fragment, `AT` bytes behind the frame's start, all headers of which are in the
/// linear part. `None`: ask [`parse`]. The caller has compared [`PLAIN_BYTES`] with the end.
#[inline(always)]
pub fn plain4<F: Frame, const AT: usize>(frame: &F, start: usize, end: usize) -> Option<Plain<u64>> {
    // More fragments, or not the first one (in memory order).
    const FRAGMENT: u64 = 0xff3f;
    if load!("u8", start, AT) != 0x45 || load!("u16", start, AT + 6) & FRAGMENT != 0 {
        return None;
    }
    let said = u32::from((load!("u16", start, AT + 2) as u16).swap_bytes());
    let l3_bytes = l3_bytes(frame, AT as u32, said);
    let protocol = load!("u8", start, AT + 9) as u8;
    let (transport_bytes, tcp_flags) = match protocol {
        IPPROTO_UDP => (UDP_HEADER, 0),
        IPPROTO_TCP if start + AT + 40 <= end => {
            (tcp_header(load!("u8", start, AT + 32))?, load!("u8", start, AT + 33) as u8)
        }
        _ => return None,
    };
    let header_bytes = IPV4_HEADER + transport_bytes;
    Some(Plain {
        addresses: load!("u64", start, AT + 12),
        ports: (load!("u32", start, AT + 20) as u32).swap_bytes(),
        measure: Measure {
            l3_bytes,
            payload: l3_bytes.checked_sub(header_bytes)?,
            l3_at: AT as u32,
            tcp_flags,
            protocol,
            ..Measure::default()
        },
    })
}

/// An IPv6 packet without extension headers; see [`plain4`].
#[inline(always)]
pub fn plain6<F: Frame, const AT: usize>(frame: &F, start: usize, end: usize) -> Option<Plain<[u64; 4]>> {
    if start + AT + 48 > end || load!("u8", start, AT) >> 4 != 6 {
        return None;
    }
    let said = u32::from((load!("u16", start, AT + 4) as u16).swap_bytes());
    let l3_bytes = l3_bytes(frame, AT as u32, if said == 0 { 0 } else { said + IPV6_HEADER });
    let protocol = load!("u8", start, AT + 6) as u8;
    let (transport_bytes, tcp_flags) = match protocol {
        IPPROTO_UDP => (UDP_HEADER, 0),
        IPPROTO_TCP if start + AT + 60 <= end => {
            (tcp_header(load!("u8", start, AT + 52))?, load!("u8", start, AT + 53) as u8)
        }
        _ => return None,
    };
    let header_bytes = IPV6_HEADER + transport_bytes;
    Some(Plain {
        addresses: [
            load!("u64", start, AT + 8),
            load!("u64", start, AT + 16),
            load!("u64", start, AT + 24),
            load!("u64", start, AT + 32),
        ],
        ports: (load!("u32", start, AT + 40) as u32).swap_bytes(),
        measure: Measure {
            l3_bytes,
            payload: l3_bytes.checked_sub(header_bytes)?,
            l3_at: AT as u32,
            tcp_flags,
            protocol,
            ..Measure::default()
        },
    })
}

/// Length of a TCP header by the byte of its data offset (RFC 9293, section 3.1: words of four bytes, in the upper half).
#[inline(always)]
fn tcp_header(offset: u64) -> Option<u32> {
    let bytes = (offset >> 4) as u32 * 4;
    (bytes >= TCP_HEADER).then_some(bytes)
}

/// Reads a frame down to its TCP or UDP header.
///
/// Its own subprogram: its stack is free again when the packet is counted, and both need much of it.
#[inline(never)]
pub fn parse<F: Frame>(frame: &F, link: Link, packet: &mut Packet) -> Parsed {
    let parsed = match link {
        Link::Ethernet => ethernet(frame, packet),
        Link::None => match frame.bytes::<1>(0) {
            Some([first]) if first >> 4 == 4 => ipv4(frame, 0, packet),
            Some([first]) if first >> 4 == 6 => ipv6(frame, 0, packet),
            Some(_) => return Parsed::NotIp,
            None => None,
        },
    };
    parsed.unwrap_or(Parsed::Malformed)
}

/// `None`, here and below: malformed.
#[inline(always)]
fn ethernet<F: Frame>(frame: &F, packet: &mut Packet) -> Option<Parsed> {
    let header: [u8; 14] = frame.bytes(0)?;
    packet.measure.group_frame = header[0] & 1 != 0;
    let mut ethertype = u16::from_be_bytes([header[12], header[13]]);
    let mut at = ETHERNET_HEADER as u32;
    for _ in 0..MAX_VLAN_TAGS {
        if ethertype != ETHERTYPES_VLAN[0] && ethertype != ETHERTYPES_VLAN[1] {
            break;
        }
        let tag: [u8; 4] = frame.bytes(at)?;
        ethertype = u16::from_be_bytes([tag[2], tag[3]]);
        at += VLAN_TAG;
    }
    match ethertype {
        ETHERTYPE_IPV4 => ipv4(frame, at, packet),
        ETHERTYPE_IPV6 => ipv6(frame, at, packet),
        _ => Some(Parsed::NotIp),
    }
}

/// RFC 791, section 3.1.
#[inline(always)]
fn ipv4<F: Frame>(frame: &F, at: u32, packet: &mut Packet) -> Option<Parsed> {
    let header: [u8; 20] = frame.bytes(at)?;
    let header_bytes = u32::from(header[0] & 0x0f) * 4;
    packet.measure.l3_bytes = l3_bytes(frame, at, u32::from(u16::from_be_bytes([header[2], header[3]])));
    if header[0] >> 4 != 4 || header_bytes < 20 || packet.measure.l3_bytes < header_bytes {
        return None;
    }
    packet.family = 4;
    packet.measure.protocol = header[9];
    let fragment = u16::from_be_bytes([header[6], header[7]]);
    packet.measure.later_fragment = fragment & 0x1fff != 0;
    packet.first_fragment = fragment & 0x3fff == 0x2000;
    packet.fragment_id = u32::from(u16::from_ne_bytes([header[4], header[5]]));
    packet.source[..4].copy_from_slice(&header[12..16]);
    packet.destination[..4].copy_from_slice(&header[16..20]);
    transport(frame, at, header_bytes, packet)
}

/// RFC 8200, sections 3 and 4.
#[inline(always)]
fn ipv6<F: Frame>(frame: &F, at: u32, packet: &mut Packet) -> Option<Parsed> {
    let header: [u8; 8] = frame.bytes(at)?;
    packet.source = frame.bytes(at + 8)?;
    packet.destination = frame.bytes(at + 24)?;
    if header[0] >> 4 != 6 {
        return None;
    }
    let payload = u32::from(u16::from_be_bytes([header[4], header[5]]));
    // A jumbo payload (RFC 2675; the kernel's own big TCP packets) says 0 here.
    packet.measure.l3_bytes = l3_bytes(frame, at, if payload == 0 { 0 } else { payload + IPV6_HEADER });
    packet.family = 6;

    let mut protocol = header[6];
    let mut header_bytes = IPV6_HEADER;
    let mut fragment_at = 0;
    if protocol != IPPROTO_TCP && protocol != IPPROTO_UDP {
        for _ in 0..MAX_EXTENSION_HEADERS {
            if extension(protocol) == 0 {
                break;
            }
            let header: [u8; 4] = frame.bytes(at + header_bytes)?;
            // A fragment header has no length; the others count units of eight bytes behind the first one, but
            // authentication (RFC 4302, section 2.2) counts units of four behind the first two.
            let is_fragment = equal(protocol, FRAGMENT);
            let is_authentication = equal(protocol, AUTHENTICATION);
            let units = (u32::from(header[1]) & is_fragment.wrapping_sub(1)) + 1 + is_authentication;
            // The last one, if somebody sends two. Without a branch, as above.
            fragment_at = fragment_at * (1 - is_fragment) + (at + header_bytes) * is_fragment;
            header_bytes += (units * 8) >> is_authentication;
            protocol = header[0];
            if is_fragment & not_zero(u16::from_be_bytes([header[2], header[3]]) & 0xfff8) != 0 {
                packet.measure.later_fragment = true;
                break;
            }
        }
        if fragment_at != 0 {
            let header: [u8; 8] = frame.bytes(fragment_at)?;
            // RFC 8200, section 4.5: offset 0 and more to come.
            packet.first_fragment = header[2] == 0 && header[3] & 0xf9 == 1;
            packet.fragment_id = u32::from_ne_bytes([header[4], header[5], header[6], header[7]]);
        }
        // In a later fragment, what follows its header is data, whatever the header calls it.
        if !packet.measure.later_fragment && extension(protocol) != 0 {
            return None;
        }
    }
    if packet.measure.l3_bytes < header_bytes {
        return None;
    }
    packet.measure.protocol = protocol;
    transport(frame, at, header_bytes, packet)
}

/// 1 for the number of an extension header, else 0.
#[inline(always)]
fn extension(protocol: u8) -> u32 {
    equal(protocol, HOP_BY_HOP)
        | equal(protocol, ROUTING)
        | equal(protocol, FRAGMENT)
        | equal(protocol, AUTHENTICATION)
        | equal(protocol, DESTINATION_OPTIONS)
        | equal(protocol, MOBILITY)
        | equal(protocol, HIP)
        | equal(protocol, SHIM6)
}

/// 1 or 0, without a branch: the verifier follows every combination of branches through the loop over extension
/// headers, and there must not be thousands.
#[inline(always)]
fn equal(a: u8, b: u8) -> u32 {
    1 - not_zero(u16::from(a ^ b))
}

/// What the IP header says, or what the frame holds when that is less (or when the header says nothing: a
/// super-packet of more than 64 KiB).
#[inline(always)]
fn l3_bytes<F: Frame>(frame: &F, at: u32, said: u32) -> u32 {
    let held = frame.len() - at;
    if said != 0 && said < held { said } else { held }
}

#[inline(always)]
fn transport<F: Frame>(frame: &F, at: u32, header_bytes: u32, packet: &mut Packet) -> Option<Parsed> {
    if packet.measure.protocol != IPPROTO_TCP && packet.measure.protocol != IPPROTO_UDP {
        return Some(Parsed::OtherProtocol);
    }
    packet.measure.l3_at = at;
    let at = at + header_bytes;
    let held = packet.measure.l3_bytes - header_bytes;
    let mut transport_bytes = 0;
    if !packet.measure.later_fragment {
        // Both start with the ports.
        let ports: [u8; 4] = frame.bytes(at)?;
        packet.source_port = u16::from_be_bytes([ports[0], ports[1]]);
        packet.destination_port = u16::from_be_bytes([ports[2], ports[3]]);
        transport_bytes = UDP_HEADER;
        if packet.measure.protocol == IPPROTO_TCP {
            // RFC 9293, section 3.1: the data offset counts words of four bytes.
            let [offset, flags] = frame.bytes::<2>(at + 12)?;
            packet.measure.tcp_flags = flags;
            transport_bytes = u32::from(offset >> 4) * 4;
            if transport_bytes < TCP_HEADER {
                return None;
            }
        }
    }
    // Padding behind a short IP packet is not a transport header.
    if held < transport_bytes {
        return None;
    }
    packet.measure.payload = held - transport_bytes;
    Some(Parsed::Packet)
}

/// Long header form and fixed bit (RFC 9000, 17.2), then version 1 or 2 (RFC 9369, 3.1).
#[inline(always)]
pub fn looks_like_quic<F: Frame>(frame: &F, measure: &Measure) -> bool {
    if measure.protocol != IPPROTO_UDP || measure.later_fragment || measure.payload < 5 {
        return false;
    }
    // All that is in front of the payload is headers.
    let payload_at = measure.l3_at + (measure.l3_bytes - measure.payload);
    let Some(start) = frame.bytes::<5>(payload_at) else {
        return false;
    };
    let version = u32::from_be_bytes([start[1], start[2], start[3], start[4]]);
    start[0] & 0xc0 == 0xc0 && (version == 1 || version == 0x6b33_43cf)
}
