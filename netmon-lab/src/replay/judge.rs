//! What netmon should count, by what tshark says. The independent count: it knows nothing of netmon's parser.
//!
//! netmon counts L3 bytes: from the IP header on, without padding, as many as the header says, or as the capture holds
//! when that is less or the header says nothing (0). The outermost IP header counts, and only TCP and UDP make flows.
//! Payload is what stands behind the TCP or UDP header. A later fragment belongs to the ports of the first fragment
//! with the same addresses, protocol and identification, if that one came before, else to ports 0.
//!
//! # Where netmon and tshark rightly differ
//!
//! tshark reads on where netmon stops on purpose. These are all such rules; anything else is a defect of one of them.
//!
//! 1. IP is what an EtherType calls IP, behind at most two VLAN tags, of which the kernel may take one more away. IP
//!    behind LLC/SNAP, MPLS or PPPoE, which tshark finds, is not IP for netmon.
//! 2. An EtherType or an address family also names the version: IPv6 in an IPv4 frame is malformed for netmon.
//! 3. netmon follows seven IPv6 extension headers; a packet with more is malformed.
//! 4. Of IPv6 extension headers netmon looks at length and next header alone. tshark reads nothing behind a mobility or
//!    a HIP header (which nothing should follow: RFC 6275, 6.1.1; RFC 7401, 5.1), nor behind one with options that it
//!    cannot make sense of. What tshark has not read cannot be compared: [`Verdict::Unknown`].
//!
//! Malformed is otherwise: an IP or TCP header that says it is shorter than possible, or a header that the packet or
//! the capture does not hold completely.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
};

use netmon_common::abi::{IPPROTO_TCP, IPPROTO_UDP};

use super::{
    tally::{Flow, Tally},
    tshark::{AUTHENTICATION, Dissected, Extension, FRAGMENT, Ipv4},
};

/// `WTAP_ENCAP_` numbers of Wireshark.
mod encapsulation {
    pub const ETHERNET: u16 = 1;
    pub const NULL: u16 = 15;
    pub const LINUX_SLL: u16 = 25;
    pub const IPV4: u16 = 129;
    pub const IPV6: u16 = 130;
    pub const LOOP: u16 = 174;
    pub const LINUX_SLL2: u16 = 210;
}

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
/// IEEE 802.1Q and 802.1ad.
const ETHERTYPES_VLAN: [u16; 2] = [0x8100, 0x88a8];
/// VLAN tags that netmon looks behind.
const MAX_TAGS: usize = 2;
/// IPv6 extension headers that netmon follows.
const MAX_EXTENSIONS: usize = 7;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not IP.
    NotIp,
    /// Its headers cannot be read.
    Malformed,
    /// IP, but neither TCP nor UDP.
    OtherProtocol {
        /// From the IP header on.
        bytes: u32,
    },
    /// TCP or UDP.
    Counted {
        /// With ports.
        flow: Flow,
        /// From the IP header on.
        bytes: u32,
        /// Behind the TCP or UDP header.
        payload: u32,
    },
    /// tshark does not say what netmon needs to know.
    Unknown,
}

/// Judges the frames of a capture, in their order, as one hook sees them.
#[derive(Debug, Default)]
pub struct Judge {
    /// The kernel takes the outer VLAN tag out of a frame before this hook sees it.
    untagged: bool,
    /// Ports of the latest first fragment.
    first_fragments: HashMap<FragmentKey, (u16, u16)>,
    tally: Tally,
}

/// What the fragments of a packet have in common (RFC 791, 3.2; RFC 8200, 4.5), and the protocol.
type FragmentKey = (IpAddr, IpAddr, u32, u8);

/// What an IP header says, either version.
struct Packet {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    /// From the IP header on.
    bytes: u32,
    /// IP header with extension headers.
    headers: u32,
    fragment: Fragment,
}

#[derive(Clone, Copy)]
enum Fragment {
    None,
    First(u32),
    Later(u32),
}

impl Judge {
    /// `untagged`: the kernel takes the outer VLAN tag out of a frame before this hook sees it.
    pub fn new(untagged: bool) -> Self {
        Self { untagged, ..Self::default() }
    }

    /// Counts a frame. `frame_bytes` is its length, Ethernet header included, when it is sent.
    pub fn count(&mut self, frame: &Dissected, frame_bytes: u32) {
        let (_, tags) = network_layer(frame);
        let taken_out = if self.untagged && tags > 0 { 4 } else { 0 };
        let verdict = self.verdict(frame);
        self.tally.add(verdict, frame_bytes - taken_out);
    }

    /// What was counted.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    fn verdict(&mut self, frame: &Dissected) -> Verdict {
        let (layer, tags) = network_layer(frame);
        let max_tags = MAX_TAGS + usize::from(self.untagged);
        let packet = match layer {
            _ if tags > max_tags => return Verdict::NotIp,
            Layer::Other => return Verdict::NotIp,
            Layer::Unreadable => None,
            Layer::Ipv4(at) => ipv4(&frame.ipv4, frame.captured.saturating_sub(at)),
            Layer::Ipv6(at) => match ipv6(frame, frame.captured.saturating_sub(at)) {
                Behind::Packet(packet) => Some(packet),
                Behind::Unreadable => None,
                Behind::Unknown => return Verdict::Unknown,
            },
        };
        packet.and_then(|packet| self.transport(frame, &packet)).unwrap_or(Verdict::Malformed)
    }

    /// `None`: malformed.
    fn transport(&mut self, frame: &Dissected, packet: &Packet) -> Option<Verdict> {
        let Packet { source, destination, protocol, bytes, headers, .. } = *packet;
        let held = bytes - headers;
        let ((source_port, destination_port), transport) = match (protocol, packet.fragment) {
            (IPPROTO_TCP | IPPROTO_UDP, Fragment::Later(id)) => {
                let first = self.first_fragments.get(&(source, destination, id, protocol));
                (first.copied().unwrap_or_default(), 0)
            }
            (IPPROTO_TCP, _) => (both(frame.tcp_ports)?, frame.tcp_header.filter(|length| *length >= 20)?),
            (IPPROTO_UDP, _) => (both(frame.udp_ports)?, 8),
            _ => return Some(Verdict::OtherProtocol { bytes }),
        };
        let payload = held.checked_sub(transport)?;
        if let Fragment::First(id) = packet.fragment {
            let key = (source, destination, id, protocol);
            self.first_fragments.insert(key, (source_port, destination_port));
        }
        let flow = Flow {
            protocol,
            source: SocketAddr::new(source, source_port),
            destination: SocketAddr::new(destination, destination_port),
        };
        Some(Verdict::Counted { flow, bytes, payload })
    }
}

/// True when tshark does not say what this frame is.
pub fn is_unknown(frame: &Dissected) -> bool {
    match network_layer(frame) {
        (Layer::Ipv6(at), _) => matches!(ipv6(frame, frame.captured.saturating_sub(at)), Behind::Unknown),
        _ => false,
    }
}

fn both((source, destination): (Option<u16>, Option<u16>)) -> Option<(u16, u16)> {
    Some((source?, destination?))
}

/// What stands behind the link-layer header, with its offset in the captured frame.
enum Layer {
    Ipv4(u32),
    Ipv6(u32),
    Other,
    /// The frame ends in a VLAN tag.
    Unreadable,
}

/// And the number of VLAN tags.
fn network_layer(frame: &Dissected) -> (Layer, usize) {
    let (header, mut ethertype) = match frame.encapsulation {
        encapsulation::ETHERNET => (14, frame.ethertype),
        encapsulation::LINUX_SLL => (16, frame.cooked_ethertype),
        encapsulation::LINUX_SLL2 => (20, frame.cooked_ethertype),
        encapsulation::IPV4 => return (Layer::Ipv4(0), 0),
        encapsulation::IPV6 => return (Layer::Ipv6(0), 0),
        // Link types without EtherTypes. An address family that calls the packet IPv6 makes tshark read its version,
        // whatever that is.
        other => {
            let at = if other == encapsulation::NULL || other == encapsulation::LOOP { 4 } else { 0 };
            let layer = match frame.layers.split(':').nth(1) {
                Some("ip") => Layer::Ipv4(at),
                Some("ipv6") => Layer::Ipv6(at),
                _ if frame.ipv6.version.is_some() => Layer::Ipv6(at),
                _ => Layer::Other,
            };
            return (layer, 0);
        }
    };
    let mut tags = 0;
    while ethertype.is_some_and(|ethertype| ETHERTYPES_VLAN.contains(&ethertype)) {
        ethertype = frame.tag_ethertypes.get(tags).copied();
        tags += 1;
        if ethertype.is_none() && !frame.tag_length {
            return (Layer::Unreadable, tags);
        }
    }
    let at = header + 4 * u32::try_from(tags).unwrap_or(u32::MAX / 8);
    let layer = match ethertype {
        Some(ETHERTYPE_IPV4) => Layer::Ipv4(at),
        Some(ETHERTYPE_IPV6) => Layer::Ipv6(at),
        _ => Layer::Other,
    };
    (layer, tags)
}

/// What counts: what the header says, or what there is when that is less or the header says nothing.
fn bytes(said: u32, held: u32) -> u32 {
    if said == 0 { held } else { said.min(held) }
}

/// RFC 791, 3.1.
fn ipv4(ip: &Ipv4, held: u32) -> Option<Packet> {
    let headers = ip.header.filter(|length| *length >= 20)?;
    let bytes = bytes(ip.length?, held);
    if ip.version? != 4 || bytes < headers {
        return None;
    }
    let fragment = match (ip.offset?, ip.more?) {
        (0, false) => Fragment::None,
        (0, true) => Fragment::First(ip.id?),
        _ => Fragment::Later(ip.id?),
    };
    Some(Packet {
        source: ip.source?.into(),
        destination: ip.destination?.into(),
        protocol: ip.protocol?,
        bytes,
        headers,
        fragment,
    })
}

enum Behind {
    Packet(Packet),
    Unreadable,
    Unknown,
}

/// RFC 8200, 3 and 4.
fn ipv6(frame: &Dissected, held: u32) -> Behind {
    let ip = &frame.ipv6;
    let (Some(6), Some(said), Some(next), Some(source), Some(destination)) =
        (ip.version, ip.length, ip.next, ip.source, ip.destination)
    else {
        return Behind::Unreadable;
    };
    let bytes = bytes(if said == 0 { 0 } else { said + 40 }, held);
    let (mut protocol, mut headers, mut fragment) = (next, 40, Fragment::None);
    let mut used = BTreeMap::<u8, usize>::new();
    let mut count = 0;
    loop {
        let is_fragment = protocol == FRAGMENT;
        let known = ip.extensions.get(&protocol);
        if !is_fragment && known.is_none() {
            break;
        }
        count += 1;
        // Of a kind that occurs more than once, the outer ones come first.
        let which = used.entry(protocol).or_default();
        let index = *which;
        *which += 1;
        let header = if is_fragment {
            ip.fragments.get(index).map(|header| (header.next, 8))
        } else {
            known.and_then(|headers| headers.get(index)).map(|Extension { next, length }| {
                // Units of eight bytes behind the first one; RFC 4302, 2.2: units of four behind the first two.
                (*next, if protocol == AUTHENTICATION { (length + 2) * 4 } else { (length + 1) * 8 })
            })
        };
        let Some((next, length)) = header else { return unread(bytes, headers, 8) };
        headers += length;
        protocol = next;
        match ip.fragments.get(index).filter(|_| is_fragment) {
            Some(header) if header.offset != 0 => {
                fragment = Fragment::Later(header.id);
                break;
            }
            Some(header) if header.more => fragment = Fragment::First(header.id),
            _ => {}
        }
    }
    if count > MAX_EXTENSIONS || bytes < headers {
        return Behind::Unreadable;
    }
    let transport = match protocol {
        IPPROTO_TCP => Some(("tcp", 20)),
        IPPROTO_UDP => Some(("udp", 8)),
        _ => None,
    };
    if let (Some((name, length)), Fragment::None | Fragment::First(_)) = (transport, fragment)
        && layer_behind_ipv6(&frame.layers) != Some(name)
    {
        return unread(bytes, headers, length);
    }
    let (source, destination) = (source.into(), destination.into());
    Behind::Packet(Packet { source, destination, protocol, bytes, headers, fragment })
}

/// A header of this length should follow, and tshark has not read it: because there is no room for it, or because it
/// stopped ahead of it.
fn unread(bytes: u32, headers: u32, length: u32) -> Behind {
    if bytes < headers + length { Behind::Unreadable } else { Behind::Unknown }
}

/// What tshark found behind the outermost IPv6 header and its extension headers.
fn layer_behind_ipv6(layers: &str) -> Option<&str> {
    let mut layers = layers.split(':').skip_while(|name| *name != "ipv6").skip(1);
    layers.find(|name| !name.starts_with("ipv6.") && !["ah", "mipv6", "hip", "shim6"].contains(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::tshark;

    const HERE: [u8; 4] = [10, 0, 0, 1];
    const THERE: [u8; 4] = [192, 0, 2, 9];

    /// 7 bytes over UDP, IPv4 and Ethernet.
    fn datagram() -> Dissected {
        Dissected {
            number: 1,
            encapsulation: encapsulation::ETHERNET,
            captured: 49,
            layers: "eth:ethertype:ip:udp:data".to_owned(),
            ethertype: Some(ETHERTYPE_IPV4),
            ipv4: Ipv4 {
                version: Some(4),
                header: Some(20),
                length: Some(35),
                id: Some(7),
                offset: Some(0),
                more: Some(false),
                protocol: Some(IPPROTO_UDP),
                source: Some(HERE.into()),
                destination: Some(THERE.into()),
            },
            udp_ports: (Some(1000), Some(2000)),
            ..Dissected::default()
        }
    }

    /// The same over IPv6, with extension headers that tshark has read.
    fn datagram6(next: u8, extensions: &[(u8, u8, u32)], layers: &str) -> Dissected {
        let headers: u32 = extensions.iter().map(|(_, _, length)| (length + 1) * 8).sum();
        Dissected {
            captured: 14 + 40 + headers + 15,
            layers: format!("eth:ethertype:ipv6:{layers}"),
            ethertype: Some(ETHERTYPE_IPV6),
            ipv4: Ipv4::default(),
            ipv6: tshark::Ipv6 {
                version: Some(6),
                length: Some(headers + 15),
                next: Some(next),
                source: Some("2001:db8::1".parse().unwrap()),
                destination: Some("2001:db8::2".parse().unwrap()),
                extensions: [0, 60, 139]
                    .map(|kind| {
                        let same = extensions.iter().filter(|(number, _, _)| *number == kind);
                        (kind, same.map(|&(_, next, length)| Extension { next, length }).collect())
                    })
                    .into(),
                fragments: Vec::new(),
            },
            ..datagram()
        }
    }

    fn verdict(frame: &Dissected) -> Verdict {
        Judge::default().verdict(frame)
    }

    /// Bytes, payload, and source and destination port.
    fn counted(verdict: Verdict) -> (u32, u32, u16, u16) {
        match verdict {
            Verdict::Counted { flow, bytes, payload } => {
                (bytes, payload, flow.source.port(), flow.destination.port())
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn bytes_are_what_the_header_says_or_what_was_captured_of_it() {
        let padded = Dissected { captured: 60, ..datagram() };
        assert_eq!(counted(verdict(&datagram())), (35, 7, 1000, 2000));
        assert_eq!(counted(verdict(&padded)), (35, 7, 1000, 2000));
        let truncated = Dissected { captured: 14 + 30, ..datagram() };
        assert_eq!(counted(verdict(&truncated)), (30, 2, 1000, 2000));
        let headless = Dissected { captured: 14 + 27, ..datagram() };
        assert_eq!(verdict(&headless), Verdict::Malformed);
        let mut unsaid = padded;
        unsaid.ipv4.length = Some(0);
        assert_eq!(counted(verdict(&unsaid)), (46, 18, 1000, 2000));
    }

    #[test]
    fn a_later_fragment_belongs_to_the_ports_of_a_first_one_that_came_before() {
        let mut later = datagram();
        (later.ipv4.offset, later.udp_ports) = (Some(185), (None, None));
        let mut first = datagram();
        first.ipv4.more = Some(true);
        let mut judge = Judge::default();
        assert_eq!(counted(judge.verdict(&later)), (35, 15, 0, 0));
        assert_eq!(counted(judge.verdict(&first)), (35, 7, 1000, 2000));
        assert_eq!(counted(judge.verdict(&later)), (35, 15, 1000, 2000));
        for change in [
            |ip: &mut Ipv4| ip.id = Some(8),
            |ip: &mut Ipv4| ip.source = Some(THERE.into()),
            |ip: &mut Ipv4| ip.protocol = Some(IPPROTO_TCP),
        ] {
            let mut other = later.clone();
            change(&mut other.ipv4);
            assert_eq!(counted(judge.verdict(&other)), (35, 15, 0, 0));
        }
    }

    #[test]
    fn the_kernel_takes_one_tag_away_ahead_of_tc_ingress() {
        let mut tagged = datagram();
        tagged.ethertype = Some(0x88a8);
        tagged.tag_ethertypes = vec![0x8100, 0x8100, ETHERTYPE_IPV4];
        tagged.captured += 12;
        assert_eq!(verdict(&tagged), Verdict::NotIp);
        let mut judge = Judge::new(true);
        judge.count(&tagged, 61);
        assert_eq!(judge.tally().counted.bytes, 35);
        tagged.tag_ethertypes.insert(0, 0x8100);
        judge.count(&tagged, 65);
        assert_eq!(judge.tally().not_ip.bytes, 61, "without the tag that was taken away");
        tagged.tag_ethertypes.pop();
        tagged.tag_ethertypes.truncate(1);
        assert_eq!(verdict(&tagged), Verdict::Malformed, "ends in its second tag");
    }

    #[test]
    fn extension_headers_are_followed_as_far_as_tshark_and_netmon_read() {
        let chain = [(0, 60, 0), (60, 60, 1), (60, IPPROTO_UDP, 0)];
        let frame = datagram6(0, &chain, "ipv6.hopopts:ipv6.dstopts:ipv6.dstopts:udp");
        assert_eq!(counted(verdict(&frame)), (40 + 32 + 15, 7, 1000, 2000));
        let mut seven = vec![(60, 60, 0); 6];
        seven.push((60, IPPROTO_UDP, 0));
        assert_eq!(counted(verdict(&datagram6(60, &seven, "udp"))), (40 + 56 + 15, 7, 1000, 2000));
        seven.insert(0, (60, 60, 0));
        assert_eq!(verdict(&datagram6(60, &seven, "udp")), Verdict::Malformed);
        let hip = datagram6(139, &[(139, IPPROTO_UDP, 4)], "hip");
        assert_eq!(verdict(&hip), Verdict::Unknown);
        assert!(is_unknown(&hip) && !is_unknown(&frame));
        let mut cut = hip;
        cut.captured -= 8;
        assert_eq!(verdict(&cut), Verdict::Malformed, "no room for what tshark has not read");
    }

    #[test]
    fn another_protocol_outside_hides_what_it_carries_or_quotes() {
        let mut icmp = datagram();
        icmp.ipv4.protocol = Some(1);
        assert_eq!(verdict(&icmp), Verdict::OtherProtocol { bytes: 35 });
        let mpls = Dissected { ethertype: Some(0x8847), ..datagram() };
        assert_eq!(verdict(&mpls), Verdict::NotIp);
        let mut ipv6_inside = datagram();
        ipv6_inside.ipv4.version = Some(6);
        assert_eq!(verdict(&ipv6_inside), Verdict::Malformed);
    }
}
