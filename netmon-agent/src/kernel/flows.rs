//! What the flow tables and the ring buffer hold, in the agent's types.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use netmon_common::abi::{Evicted, Flow4Key, Flow6Key, FlowOpened, FlowState, LIFE_WORDS, SLOT_WORDS};

/// One flow as this PC sees it, by the addresses on the wire.
///
/// An IPv4-mapped IPv6 address (`::ffff:192.0.2.1`) is kept as such: on the wire it is an IPv6 packet that only
/// someone with raw sockets sends, and it must not add to the counters of a real IPv4 flow with the same numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowId {
    /// This PC's side.
    pub local: SocketAddr,
    /// The counterpart.
    pub remote: SocketAddr,
    /// IP protocol, `IPPROTO_TCP` or `IPPROTO_UDP` of [`netmon_common::abi`].
    pub protocol: u8,
}

impl FlowId {
    /// The flow of a ring buffer record; `None` when its family is neither 4 nor 6.
    pub fn of(record: &FlowOpened) -> Option<Self> {
        let address = |bytes: [u8; 16]| match record.family {
            4 => Some(IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]))),
            6 => Some(IpAddr::V6(Ipv6Addr::from(bytes))),
            _ => None,
        };
        Some(Self {
            local: SocketAddr::new(address(record.local_addr)?, record.local_port),
            remote: SocketAddr::new(address(record.remote_addr)?, record.remote_port),
            protocol: record.protocol,
        })
    }
}

impl From<&Flow4Key> for FlowId {
    fn from(key: &Flow4Key) -> Self {
        Self {
            local: SocketAddr::new(key.local_addr.into(), key.local_port),
            remote: SocketAddr::new(key.remote_addr.into(), key.remote_port),
            protocol: key.protocol,
        }
    }
}

impl From<&Flow6Key> for FlowId {
    fn from(key: &Flow6Key) -> Self {
        Self {
            local: SocketAddr::new(key.local_addr.into(), key.local_port),
            remote: SocketAddr::new(key.remote_addr.into(), key.remote_port),
            protocol: key.protocol,
        }
    }
}

impl From<&FlowId> for ShownKey {
    fn from(flow: &FlowId) -> Self {
        let (local_port, remote_port, protocol) = (flow.local.port(), flow.remote.port(), flow.protocol);
        match (flow.local.ip(), flow.remote.ip()) {
            (IpAddr::V4(local), IpAddr::V4(remote)) => Self::V4(Flow4Key {
                local_addr: local.octets(),
                remote_addr: remote.octets(),
                local_port,
                remote_port,
                protocol,
                pad: [0; 3],
            }),
            (local, remote) => Self::V6(Flow6Key {
                local_addr: wide(local),
                remote_addr: wide(remote),
                local_port,
                remote_port,
                protocol,
                pad: [0; 3],
            }),
        }
    }
}

/// Key of a map for people.
pub(super) enum ShownKey {
    V4(Flow4Key),
    V6(Flow6Key),
}

fn wide(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

/// What a flow has moved on one CPU since that was last read.
///
/// Numbers of the kernel are kept raw: whoever reads `class` and `opened` decides what an unknown one means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowDelta {
    /// Which flow.
    pub flow: FlowId,
    /// What was moved.
    pub moved: Moved,
    /// First packet of it, boot clock, nanoseconds; or the last one before it, when no silence of
    /// [`netmon_common::abi::SILENCE_NS`] lies between.
    pub first_ns: u64,
    /// Last packet of it, boot clock, nanoseconds, to the tick ([`netmon_common::abi::TICK_NS`]).
    pub last_ns: u64,
    /// Interface that saw the flow's first packet on this CPU.
    pub ifindex: u32,
    /// Muted label.
    pub label: u16,
    /// One of the `CLASS_` constants.
    pub class: u8,
    /// One of the `OPENED_` constants, by the first packet on this CPU.
    pub opened: u8,
    /// All TCP flags seen so far.
    pub tcp_flags: u8,
    /// `HINT_` bits.
    pub hints: u8,
}

/// Counts of both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "as in `netmon_common::abi::FlowState`")]
pub struct Moved {
    pub tx_packets: u64,
    pub rx_packets: u64,
    pub tx_bytes: u64,
    pub rx_bytes: u64,
    pub tx_payload: u64,
    pub rx_payload: u64,
}

// Saturating: counters that go backwards make no sense, and still must not end the agent.
macro_rules! add_moved {
    ($($sum:ty),*) => {$(
        impl std::ops::AddAssign<Moved> for $sum {
            fn add_assign(&mut self, moved: Moved) {
                self.tx_packets = self.tx_packets.saturating_add(moved.tx_packets);
                self.rx_packets = self.rx_packets.saturating_add(moved.rx_packets);
                self.tx_bytes = self.tx_bytes.saturating_add(moved.tx_bytes);
                self.rx_bytes = self.rx_bytes.saturating_add(moved.rx_bytes);
                self.tx_payload = self.tx_payload.saturating_add(moved.tx_payload);
                self.rx_payload = self.rx_payload.saturating_add(moved.rx_payload);
            }
        }
    )*};
}
add_moved!(Moved, FlowState);

/// A record of the ring buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Record {
    Opened(FlowOpened),
    Evicted(Evicted),
}

/// A record of the ring buffer, told by its length. `None`: no record of ours.
pub(super) fn record(bytes: &[u8]) -> Option<Record> {
    match bytes.len() {
        OPENED_BYTES => flow_opened(bytes).map(Record::Opened),
        EVICTED_BYTES => evicted(bytes).map(Record::Evicted),
        _ => None,
    }
}

const OPENED_BYTES: usize = size_of::<FlowOpened>();
const EVICTED_BYTES: usize = size_of::<Evicted>();

fn evicted(bytes: &[u8]) -> Option<Evicted> {
    let mut rest = bytes;
    let (slot, family) = (u32::from_ne_bytes(next(&mut rest)?), u32::from_ne_bytes(next(&mut rest)?));
    let (mut words, mut life) = ([0; SLOT_WORDS], [0; LIFE_WORDS]);
    for word in words.iter_mut().chain(&mut life) {
        *word = u64::from_ne_bytes(next(&mut rest)?);
    }
    rest.is_empty().then_some(Evicted { slot, family, words, life })
}

/// Field by field. `None` unless the length is right.
fn flow_opened(bytes: &[u8]) -> Option<FlowOpened> {
    if bytes.len() != size_of::<FlowOpened>() {
        return None;
    }
    let mut rest = bytes;
    let record = FlowOpened {
        local_addr: next(&mut rest)?,
        remote_addr: next(&mut rest)?,
        first_ns: u64::from_ne_bytes(next(&mut rest)?),
        bytes: u32::from_ne_bytes(next(&mut rest)?),
        payload: u32::from_ne_bytes(next(&mut rest)?),
        ifindex: u32::from_ne_bytes(next(&mut rest)?),
        local_port: u16::from_ne_bytes(next(&mut rest)?),
        remote_port: u16::from_ne_bytes(next(&mut rest)?),
        label: u16::from_ne_bytes(next(&mut rest)?),
        family: u8::from_ne_bytes(next(&mut rest)?),
        protocol: u8::from_ne_bytes(next(&mut rest)?),
        class: u8::from_ne_bytes(next(&mut rest)?),
        opened: u8::from_ne_bytes(next(&mut rest)?),
        hints: u8::from_ne_bytes(next(&mut rest)?),
        pad: u8::from_ne_bytes(next(&mut rest)?),
    };
    rest.is_empty().then_some(record)
}

fn next<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk::<N>()?;
    *rest = tail;
    Some(*head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_the_ring_is_read_by_the_layout_of_the_abi() {
        let bytes: Vec<u8> = (0..64).collect();
        let record = flow_opened(&bytes).unwrap();
        assert_eq!(record.local_addr[15], 15);
        assert_eq!(record.remote_addr[0], 16);
        assert_eq!(record.first_ns.to_ne_bytes()[0], std::mem::offset_of!(FlowOpened, first_ns) as u8);
        assert_eq!(record.bytes.to_ne_bytes()[0], std::mem::offset_of!(FlowOpened, bytes) as u8);
        assert_eq!(record.payload.to_ne_bytes()[0], std::mem::offset_of!(FlowOpened, payload) as u8);
        assert_eq!(record.ifindex.to_ne_bytes()[0], std::mem::offset_of!(FlowOpened, ifindex) as u8);
        assert_eq!(record.local_port.to_ne_bytes()[0], std::mem::offset_of!(FlowOpened, local_port) as u8);
        assert_eq!(record.label.to_ne_bytes()[0], std::mem::offset_of!(FlowOpened, label) as u8);
        assert_eq!(record.family, std::mem::offset_of!(FlowOpened, family) as u8);
        assert_eq!(record.hints, std::mem::offset_of!(FlowOpened, hints) as u8);
    }

    #[test]
    fn a_record_of_another_length_is_refused() {
        for length in [0, 63, 65, 128] {
            assert_eq!(flow_opened(&vec![0; length]), None);
        }
    }

    #[test]
    fn records_are_told_apart_by_their_lengths() {
        assert!(matches!(record(&[1; 64]), Some(Record::Opened(_))));
        let bytes: Vec<u8> = (0..136).collect();
        let Some(Record::Evicted(evicted)) = record(&bytes) else { panic!() };
        assert_eq!(evicted.slot.to_ne_bytes(), [0, 1, 2, 3]);
        assert_eq!(evicted.family.to_ne_bytes(), [4, 5, 6, 7]);
        assert_eq!(evicted.words[11].to_ne_bytes()[0], 8 + 88);
        assert_eq!(evicted.life[3].to_ne_bytes()[7], 135);
        assert_eq!(record(&[1; 72]), None);
    }

    #[test]
    fn a_record_of_an_unknown_family_names_no_flow() {
        let mut bytes = [0; 64];
        bytes[58] = 4;
        assert_eq!(FlowId::of(&flow_opened(&bytes).unwrap()).unwrap().remote.to_string(), "0.0.0.0:0");
        bytes[58] = 5;
        assert_eq!(FlowId::of(&flow_opened(&bytes).unwrap()), None);
    }

    #[test]
    fn a_mapped_address_stays_apart_from_the_ipv4_address() {
        let mut key = Flow6Key {
            local_addr: [0; 16],
            remote_addr: [0; 16],
            local_port: 1,
            remote_port: 2,
            protocol: 17,
            pad: [0; 3],
        };
        key.remote_addr[10..].copy_from_slice(&[0xff, 0xff, 192, 0, 2, 1]);
        let flow = FlowId::from(&key);
        assert!(flow.remote.is_ipv6());
    }
}
