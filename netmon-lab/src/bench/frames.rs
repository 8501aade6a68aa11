//! What the packets look like, and which flow a number stands for.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use netmon_agent::kernel::FlowId;
use netmon_common::abi::{CLASS_INTERNET, CLASS_LAN, CLASS_MUTED, IPPROTO_TCP, IPPROTO_UDP};

use super::shared::{ADDRESS_BITS, BASE4, address_part, source_port};

const ETHERNET_HEADER: usize = 14;
/// IEEE 802.3, without the four bytes of checksum that no software sees.
const SHORTEST_FRAME: usize = 60;
/// With 1500 bytes of IP.
const LONGEST_FRAME: usize = 1514;
/// Locally administered, and nobody's: the receiver's stack drops such a frame at once, behind the hooks that are
/// measured here.
const NOBODY: [u8; 6] = [0x02, 0x6e, 0x6d, 0, 0, 0x99];
const SENDER: [u8; 6] = [0x02, 0x6e, 0x6d, 0, 0, 0x01];
/// TEST-NET-2 (RFC 5737).
const DESTINATION4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// Documentation prefix (RFC 3849).
const DESTINATION6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
/// Prefix that is set aside for benchmarks (RFC 5180, section 8).
const SOURCES6: Ipv6Addr = Ipv6Addr::new(0x2001, 0x2, 0, 0, 0, 0, 0, 0);
const DESTINATION_PORT: u16 = 9_999;

/// IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// UDP.
    Udp,
    /// TCP: segments of an open connection (ACK).
    Tcp,
}

/// Length of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// 64 bytes on the wire (60 here), or what the headers of TCP over IPv6 need.
    Small,
    /// 1500 bytes of IP.
    Full,
}

/// What the packets of one measurement have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// IP version.
    pub family: Family,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Length.
    pub size: Size,
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let protocol = match self.protocol {
            Protocol::Udp => "UDP",
            Protocol::Tcp => "TCP",
        };
        let family = match self.family {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        };
        write!(f, "{protocol}/{family}, {} B", self.frame(0).len())
    }
}

impl Shape {
    /// Small UDP packets over IPv4: the most packets for a given load.
    pub const SMALL: Self = Self { family: Family::V4, protocol: Protocol::Udp, size: Size::Small };

    fn protocol_number(self) -> u8 {
        match self.protocol {
            Protocol::Udp => IPPROTO_UDP,
            Protocol::Tcp => IPPROTO_TCP,
        }
    }

    fn source(self, flow: u32) -> IpAddr {
        match self.family {
            Family::V4 => Ipv4Addr::from(BASE4 + address_part(flow)).into(),
            Family::V6 => Ipv6Addr::from(u128::from(SOURCES6) + u128::from(address_part(flow))).into(),
        }
    }

    /// The flow as the receiver's side sees it.
    pub fn flow(self, flow: u32) -> FlowId {
        let local: IpAddr = match self.family {
            Family::V4 => DESTINATION4.into(),
            Family::V6 => DESTINATION6.into(),
        };
        FlowId {
            local: SocketAddr::new(local, DESTINATION_PORT),
            remote: SocketAddr::new(self.source(flow), source_port(flow)),
            protocol: self.protocol_number(),
        }
    }

    /// L3 bytes of each packet, as netmon counts them.
    pub fn l3_bytes(self) -> u64 {
        (self.length() - ETHERNET_HEADER) as u64
    }

    fn headers(self) -> usize {
        let ip = match self.family {
            Family::V4 => 20,
            Family::V6 => 40,
        };
        let transport = match self.protocol {
            Protocol::Udp => 8,
            Protocol::Tcp => 20,
        };
        ETHERNET_HEADER + ip + transport
    }

    fn length(self) -> usize {
        match self.size {
            Size::Small => SHORTEST_FRAME.max(self.headers()),
            Size::Full => LONGEST_FRAME,
        }
    }

    /// A frame of this flow. The packet source overwrites what differs from flow to flow.
    ///
    /// The IPv4 header's checksum is right; those of TCP and of UDP over IPv6 are left out: nobody receives these
    /// packets, and a real network card would have checked them.
    pub fn frame(self, flow: u32) -> Vec<u8> {
        let length = self.length();
        let l3 = (length - ETHERNET_HEADER) as u16;
        let mut frame = Vec::with_capacity(length);
        frame.extend_from_slice(&NOBODY);
        frame.extend_from_slice(&SENDER);
        match self.source(flow) {
            IpAddr::V4(source) => {
                frame.extend_from_slice(&0x0800_u16.to_be_bytes());
                let header = self.ipv4_header(l3, source);
                let checksum = !fold(sum(&header));
                frame.extend_from_slice(&header[..10]);
                frame.extend_from_slice(&checksum.to_be_bytes());
                frame.extend_from_slice(&header[12..]);
            }
            IpAddr::V6(source) => {
                frame.extend_from_slice(&0x86dd_u16.to_be_bytes());
                frame.extend_from_slice(&[0x60, 0, 0, 0]);
                frame.extend_from_slice(&(l3 - 40).to_be_bytes());
                frame.extend_from_slice(&[self.protocol_number(), 64]);
                frame.extend_from_slice(&source.octets());
                frame.extend_from_slice(&DESTINATION6.octets());
            }
        }
        let rest = (length - frame.len()) as u16;
        frame.extend_from_slice(&source_port(flow).to_be_bytes());
        frame.extend_from_slice(&DESTINATION_PORT.to_be_bytes());
        match self.protocol {
            Protocol::Udp => {
                frame.extend_from_slice(&rest.to_be_bytes());
                frame.extend_from_slice(&[0, 0]);
            }
            Protocol::Tcp => {
                // Sequence and acknowledgement number, five words of header, ACK, window.
                frame.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0x10, 0, 0, 0, 0, 0]);
            }
        }
        frame.resize(length, 0);
        frame
    }

    /// Sum of the IPv4 header's words without checksum and source, which differ from flow to flow; 0 for IPv6.
    pub fn header_sum(self) -> u32 {
        match self.family {
            Family::V4 => {
                let l3 = (self.length() - ETHERNET_HEADER) as u16;
                sum(&self.ipv4_header(l3, Ipv4Addr::UNSPECIFIED))
            }
            Family::V6 => 0,
        }
    }

    /// With a checksum of 0.
    fn ipv4_header(self, l3: u16, source: Ipv4Addr) -> [u8; 20] {
        let [length_high, length_low] = l3.to_be_bytes();
        let [a, b, c, d] = source.octets();
        let [e, f, g, h] = DESTINATION4.octets();
        // Do not fragment, 64 hops.
        let protocol = self.protocol_number();
        [0x45, 0, length_high, length_low, 0, 0, 0x40, 0, 64, protocol, 0, 0, a, b, c, d, e, f, g, h]
    }
}

/// Sum of 16-bit words (RFC 1071).
fn sum(words: &[u8]) -> u32 {
    words.chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The private prefixes of the benchmark: a quarter of the flows comes from there.
pub fn private_prefixes() -> Vec<IpNet> {
    [IpNet::new(Ipv4Addr::from(BASE4).into(), 17), IpNet::new(SOURCES6.into(), 113)]
        .into_iter()
        .flatten()
        .collect()
}

/// The muted prefixes, with their labels: another quarter.
pub fn muted_prefixes() -> Vec<(IpNet, u16)> {
    let second = 1 << (ADDRESS_BITS - 2);
    let v4 = IpNet::new(Ipv4Addr::from(BASE4 + second).into(), 17);
    let v6 = IpNet::new(Ipv6Addr::from(u128::from(SOURCES6) + u128::from(second)).into(), 113);
    [v4, v6].into_iter().flatten().map(|prefix| (prefix, MUTED_LABEL)).collect()
}

/// Label of the muted prefixes.
pub const MUTED_LABEL: u16 = 7;

/// The class that a flow must have under these prefixes, with its label.
pub fn class(flow: u32) -> (u8, u16) {
    match address_part(flow) >> (ADDRESS_BITS - 2) {
        0 => (CLASS_LAN, 0),
        1 => (CLASS_MUTED, MUTED_LABEL),
        _ => (CLASS_INTERNET, 0),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::bench::shared::MAX_FLOWS;

    fn shapes() -> impl Iterator<Item = Shape> {
        [Family::V4, Family::V6].into_iter().flat_map(|family| {
            [Protocol::Udp, Protocol::Tcp].into_iter().flat_map(move |protocol| {
                [Size::Small, Size::Full].map(|size| Shape { family, protocol, size })
            })
        })
    }

    #[test]
    fn a_frame_is_as_long_as_its_headers_say() {
        let lengths: Vec<_> = shapes().map(|shape| shape.frame(5).len()).collect();
        assert_eq!(lengths, [60, 1514, 60, 1514, 62, 1514, 74, 1514]);
        for shape in shapes().filter(|shape| shape.family == Family::V4) {
            let frame = shape.frame(5);
            assert_eq!(fold(sum(&frame[14..34])), 0xffff, "a right checksum makes the sum 0xffff: {shape}");
            assert_eq!(usize::from(u16::from_be_bytes([frame[16], frame[17]])), frame.len() - 14);
        }
    }

    #[test]
    fn the_header_sum_and_the_source_make_the_checksum() {
        let shape = Shape::SMALL;
        let frame = shape.frame(70_000);
        let source = u32::from_be_bytes([frame[26], frame[27], frame[28], frame[29]]);
        let checksum = !fold(shape.header_sum() + (source >> 16) + (source & 0xffff));
        assert_eq!(frame[24..26], checksum.to_be_bytes());
    }

    #[test]
    fn every_number_is_a_flow_of_its_own() {
        let numbers = (0..MAX_FLOWS).step_by(4_099).chain([MAX_FLOWS - 1]);
        let expected = numbers.clone().count();
        for shape in [Shape::SMALL, Shape { family: Family::V6, ..Shape::SMALL }] {
            assert_eq!(numbers.clone().map(|flow| shape.flow(flow)).collect::<BTreeSet<_>>().len(), expected);
        }
    }

    #[test]
    fn the_class_of_a_flow_is_that_of_its_prefix() {
        for family in [Family::V4, Family::V6] {
            for flow in [0, 1, 32_767, 32_768, 65_535, 65_536, 131_071, 131_072, 200_000] {
                let remote = Shape { family, ..Shape::SMALL }.flow(flow).remote.ip();
                let expected = if private_prefixes().iter().any(|prefix| prefix.contains(&remote)) {
                    (CLASS_LAN, 0)
                } else if muted_prefixes().iter().any(|(prefix, _)| prefix.contains(&remote)) {
                    (CLASS_MUTED, MUTED_LABEL)
                } else {
                    (CLASS_INTERNET, 0)
                };
                assert_eq!(class(flow), expected, "{remote}");
            }
        }
    }
}
