//! Frames of all kinds, with what must become of each.

use std::net::SocketAddr;

use netmon_agent::kernel::FlowId;

use crate::frames::*;

/// What a frame is for netmon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// A packet of a flow.
    Counted,
    /// Not IP.
    NotIp,
    /// Neither TCP nor UDP.
    OtherProtocol,
    /// Cannot be read.
    Malformed,
}

/// A frame, and what must become of it.
#[derive(Clone, Debug)]
pub struct Crafted {
    /// From the Ethernet header on.
    pub frame: Vec<u8>,
    pub fate: Fate,
    /// As netmon counts them: from the IP header on, or of the whole frame where there is none that can be read.
    pub bytes: u64,
    /// VLAN tags.
    pub tags: u64,
    /// The flow as its sender sees it, where it is known beforehand.
    pub flow: Option<FlowId>,
}

impl Crafted {
    fn counted(packet: &[u8], flow: Option<FlowId>) -> Self {
        let is_ipv6 = packet[0] >> 4 == 6;
        let frame = if is_ipv6 { eth6(packet) } else { eth4(packet) };
        Self { frame, fate: Fate::Counted, bytes: packet.len() as u64, tags: 0, flow }
    }

    fn of(fate: Fate, frame: Vec<u8>) -> Self {
        let bytes = match fate {
            Fate::OtherProtocol => frame.len() - 14,
            _ => frame.len(),
        };
        Self { bytes: bytes as u64, frame, fate, tags: 0, flow: None }
    }

    /// With another tag in front.
    fn tagged(mut self, tag: u16) -> Self {
        self.frame = tagged(tag, &self.frame);
        self.tags += 1;
        if matches!(self.fate, Fate::NotIp | Fate::Malformed) {
            self.bytes += 4;
        }
        self
    }

    /// With other link-layer addresses.
    fn to(mut self, group: [u8; 6]) -> Self {
        self.frame[..6].copy_from_slice(&group);
        self
    }
}

/// One side of the crafted flows. The other host sends the same flows in the other direction.
#[derive(Clone, Copy)]
pub struct Side {
    ipv4: ([u8; 4], [u8; 4]),
    ipv6: ([u8; 16], [u8; 16]),
    swapped: bool,
}

impl Side {
    pub fn new(swapped: bool) -> Self {
        let (mut ipv4, mut ipv6) = ((HERE4, THERE4), (HERE6, THERE6));
        if swapped {
            ipv4 = (ipv4.1, ipv4.0);
            ipv6 = (ipv6.1, ipv6.0);
        }
        Self { ipv4, ipv6, swapped }
    }

    /// Local and remote port of a flow.
    fn ports(self, flow: u32) -> (u16, u16) {
        let (here, there) = ((flow % 60_000) as u16 + 1_000, (flow / 60_000) as u16 + 443);
        if self.swapped { (there, here) } else { (here, there) }
    }

    fn flow4(self, (local, remote): (u16, u16), protocol: u8) -> FlowId {
        let (here, there) = self.ipv4;
        FlowId { local: (here, local).into(), remote: (there, remote).into(), protocol }
    }

    fn flow6(self, (local, remote): (u16, u16), protocol: u8) -> FlowId {
        let (here, there) = self.ipv6;
        let address = |ip: [u8; 16], port| SocketAddr::from((ip, port));
        FlowId { local: address(here, local), remote: address(there, remote), protocol }
    }

    fn v4(self, protocol: u8, options: &[u8], fragment: u16, rest: &[u8]) -> Vec<u8> {
        ipv4(self.ipv4.0, self.ipv4.1, protocol, options, fragment, rest)
    }

    fn v6(self, next: u8, rest: &[u8]) -> Vec<u8> {
        ipv6(self.ipv6.0, self.ipv6.1, next, rest)
    }

    /// A plain or decorated packet of a flow, with a payload of this length.
    pub fn packet(self, flow: u32, length: usize) -> Crafted {
        let payload = vec![7; length];
        let ports = self.ports(flow);
        let (udp, tcp) = (udp(ports.0, ports.1, &payload), tcp(ports.0, ports.1, ACK, &[], &payload));
        let udp4 = Some(self.flow4(ports, UDP));
        let udp6 = Some(self.flow6(ports, UDP));
        match flow % 8 {
            0 | 1 => Crafted::counted(&self.v4(UDP, &[], 0, &udp), udp4),
            2 => Crafted::counted(&self.v4(TCP, &[], 0, &tcp), Some(self.flow4(ports, TCP))),
            3 => Crafted::counted(&self.v6(UDP, &udp), udp6),
            4 => Crafted::counted(&self.v6(TCP, &tcp), Some(self.flow6(ports, TCP))),
            5 => Crafted::counted(&self.v4(UDP, &[1; 40], 0, &udp), udp4).tagged(0x8100),
            6 => Crafted::counted(&self.v6(UDP, &udp), udp6).tagged(0x8100).tagged(0x88a8),
            // Hop-by-hop options (RFC 8200, section 4.3): PadN.
            _ => Crafted::counted(&self.v6(0, &cat(&[&[UDP, 0, 1, 4, 0, 0, 0, 0], &udp])), udp6),
        }
    }

    /// What is no plain packet of a flow: groups, fragments, other protocols, damage.
    pub fn oddities(self) -> Vec<Crafted> {
        use Fate::{Malformed, NotIp, OtherProtocol};
        const ALL: [u8; 6] = [0xff; 6];
        const MDNS4: [u8; 6] = [1, 0, 0x5e, 0, 0, 0xfb];
        const MDNS6: [u8; 6] = [0x33, 0x33, 0, 0, 0, 0xfb];
        let plain = udp(1, 2, b"payload");
        let group4 = |address| ipv4(self.ipv4.0, address, UDP, &[], 0, &udp(5353, 5353, b"query"));
        let group6 = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xfb];
        let fragment6 = |more_and_offset: [u8; 2], rest: &[u8]| {
            self.v6(44, &cat(&[&[UDP, 0], &more_and_offset, &[0, 0, 0, 9], rest]))
        };
        let padded = {
            let mut crafted = Crafted::counted(&self.v4(UDP, &[], 0, &plain), None);
            crafted.frame.resize(60, 0);
            crafted
        };
        let wrong = |at: usize, value: u8, mut packet: Vec<u8>| {
            packet[at] = value;
            let is_ipv6 = packet[0] >> 4 == 6;
            if is_ipv6 { eth6(&packet) } else { eth4(&packet) }
        };
        let udp4 = self.v4(UDP, &[], 0, &plain);
        let tcp4 = self.v4(TCP, &[], 0, &tcp(5, 6, ACK, &[], b"data"));
        let udp6 = self.v6(UDP, &plain);
        vec![
            Crafted::counted(&group4([255; 4]), None).to(ALL),
            Crafted::counted(&group4([224, 0, 0, 251]), None).to(MDNS4),
            Crafted::counted(&ipv6(self.ipv6.0, group6, UDP, &udp(5353, 5353, b"query")), None).to(MDNS6),
            Crafted::counted(&self.v4(UDP, &[], 0x2000, &udp(77, 78, &[1; 1472])), None),
            Crafted::counted(&self.v4(UDP, &[], 0x00b9, &[9; 100]), None),
            Crafted::counted(&fragment6([0, 1], &udp(77, 78, &[1; 1440])), None),
            Crafted::counted(&fragment6([5, 0xa8], &[7; 64]), None),
            padded.clone(),
            padded.tagged(0x8100),
            Crafted::of(NotIp, ethernet(0x0806, &[0; 28])).to(ALL),
            Crafted::of(NotIp, ethernet(0x0806, &[0; 46])).to(ALL).tagged(0x8100),
            Crafted::of(NotIp, ethernet(0x88cc, &[0; 40])),
            Crafted::of(OtherProtocol, eth4(&self.v4(ICMP, &[], 0, &[8; 64]))),
            Crafted::of(OtherProtocol, eth4(&self.v4(ICMP, &[], 0x10, &[0; 16]))),
            Crafted::of(OtherProtocol, eth6(&self.v6(ICMP6, &[128; 16]))).tagged(0x88a8),
            // ESP and "no next header".
            Crafted::of(OtherProtocol, eth4(&self.v4(50, &[], 0, &[3; 200]))),
            Crafted::of(OtherProtocol, eth6(&self.v6(59, &[]))),
            Crafted::of(Malformed, eth4(&udp4)[..30].to_vec()),
            Crafted::of(Malformed, eth4(&udp4)[..36].to_vec()),
            Crafted::of(Malformed, eth4(&tcp4)[..48].to_vec()),
            Crafted::of(Malformed, eth6(&udp6)[..50].to_vec()),
            Crafted::of(Malformed, eth4(&udp4)[..30].to_vec()).tagged(0x8100),
            Crafted::of(Malformed, wrong(0, 0x44, udp4)),
            Crafted::of(Malformed, wrong(32, 0x40, tcp4)),
        ]
    }
}
