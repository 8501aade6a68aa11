//! What is read from the flow tables and the ring buffer.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::BorrowedFd,
};

use aya::{
    Pod,
    maps::{HashMap, Map},
};
use netmon_common::abi::{Flow4Key, Flow6Key, FlowOpened, FlowState, NOT_STORED_RX, NOT_STORED_TX};

use super::{KernelError, map_error, sys};

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

/// A flow's counters at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowReading {
    /// Which flow.
    pub flow: FlowId,
    /// Its entry, as the kernel keeps it. Raw numbers: whoever reads `class` and `opened` decides what an unknown
    /// one means.
    pub state: FlowState,
    /// The flow was idle and its entry has been removed: these are its last counts, and a later packet of the
    /// same five numbers starts a new entry from zero.
    pub retired: bool,
}

impl FlowReading {
    /// The one packet of a record whose flow found no room in the table, as the whole life of a flow: a later packet
    /// of the same flow comes in a record of its own, and starts from zero. Its TCP flags are not known (0), nor is
    /// the generation (0). `None`: the flow is in the table, and its packets are counted there; or the record is of
    /// an unknown kind.
    pub fn unstored(record: &FlowOpened) -> Option<Self> {
        let flow = FlowId::of(record)?;
        let (packets, bytes, payload) = (record.packets.into(), record.bytes.into(), record.payload().into());
        let mut state = FlowState {
            first_ns: record.first_ns,
            burst_ns: record.first_ns,
            last_ns: record.first_ns,
            ifindex: record.ifindex,
            label: record.label,
            class: record.class,
            opened: record.opened,
            hints: record.hints,
            ..FlowState::default()
        };
        match record.stored {
            NOT_STORED_TX => {
                (state.tx_packets, state.tx_bytes, state.tx_payload) = (packets, bytes, payload);
            }
            NOT_STORED_RX => {
                (state.rx_packets, state.rx_bytes, state.rx_payload) = (packets, bytes, payload);
            }
            _ => return None,
        }
        Some(Self { flow, state, retired: true })
    }
}

/// Reads one table, and removes what was idle for `retire_after_ns`.
///
/// What a packet may lose: on kernels since 5.14 an entry is read and removed in one step, and only a program that
/// is between its own lookup and its own addition at that very moment (some hundred nanoseconds, after a silence
/// of `retire_after_ns`) adds to an entry that is no longer there. Before 5.14 the last look and the removal are
/// two system calls, some microseconds apart. `Stats::counted_bytes` includes the packet in both cases, so the
/// loss shows as a difference to the sum over flows.
pub(super) fn sweep_table<K>(
    table: &mut Map,
    name: &'static str,
    now_boot_ns: u64,
    retire_after_ns: u64,
    out: &mut Vec<FlowReading>,
) -> Result<(), KernelError>
where
    K: Pod,
    for<'a> FlowId: From<&'a K>,
{
    let failed = |source| KernelError::Sweep { name, source };
    let idle = |state: &FlowState| now_boot_ns.saturating_sub(state.last_ns) >= retire_after_ns;
    let mut entries: Vec<(K, FlowState)> = Vec::new();
    sys::read_all(fd(table).map_err(failed)?, &mut entries).map_err(failed)?;
    out.reserve(entries.len());
    for (key, state) in entries {
        let mut reading = FlowReading { flow: FlowId::from(&key), state, retired: false };
        if idle(&state) {
            // A packet may have come since the table was read.
            let map: HashMap<_, K, FlowState> =
                HashMap::try_from(&mut *table).map_err(map_error("open", name))?;
            reading.state = map.get(&key, 0).map_err(map_error("read", name))?;
            if idle(&reading.state) {
                reading.state = remove(table, name, &key)?.unwrap_or(reading.state);
                reading.retired = true;
            }
        }
        out.push(reading);
    }
    Ok(())
}

/// `ENOTSUPP`, which the kernel uses but no libc names.
const ENOTSUPP: i32 = 524;

/// Removes an entry; returns its last state where the kernel can do both in one step.
fn remove<K: Pod>(table: &mut Map, name: &'static str, key: &K) -> Result<Option<FlowState>, KernelError> {
    let failed = |source| KernelError::Sweep { name, source };
    match sys::take(fd(table).map_err(failed)?, key) {
        Ok(state) => Ok(state),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | ENOTSUPP)) => {
            let mut map: HashMap<_, K, FlowState> =
                HashMap::try_from(table).map_err(map_error("open", name))?;
            let last = map.get(key, 0).map_err(map_error("read", name))?;
            map.remove(key).map_err(map_error("remove an entry of", name))?;
            Ok(Some(last))
        }
        Err(error) => Err(failed(error)),
    }
}

fn fd(table: &Map) -> io::Result<BorrowedFd<'_>> {
    use std::os::fd::AsFd as _;
    match table {
        Map::HashMap(data) => Ok(data.fd().as_fd()),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "not a hash map")),
    }
}

/// A record of the ring buffer, field by field. `None` unless the length is right.
pub(super) fn flow_opened(bytes: &[u8]) -> Option<FlowOpened> {
    if bytes.len() != size_of::<FlowOpened>() {
        return None;
    }
    let mut rest = bytes;
    let record = FlowOpened {
        local_addr: next(&mut rest)?,
        remote_addr: next(&mut rest)?,
        first_ns: u64::from_ne_bytes(next(&mut rest)?),
        bytes: u32::from_ne_bytes(next(&mut rest)?),
        header_bytes: u16::from_ne_bytes(next(&mut rest)?),
        packets: u16::from_ne_bytes(next(&mut rest)?),
        ifindex: u32::from_ne_bytes(next(&mut rest)?),
        local_port: u16::from_ne_bytes(next(&mut rest)?),
        remote_port: u16::from_ne_bytes(next(&mut rest)?),
        label: u16::from_ne_bytes(next(&mut rest)?),
        family: u8::from_ne_bytes(next(&mut rest)?),
        protocol: u8::from_ne_bytes(next(&mut rest)?),
        class: u8::from_ne_bytes(next(&mut rest)?),
        opened: u8::from_ne_bytes(next(&mut rest)?),
        hints: u8::from_ne_bytes(next(&mut rest)?),
        stored: u8::from_ne_bytes(next(&mut rest)?),
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
    use netmon_common::abi::STORED;

    use super::*;

    #[test]
    fn a_record_of_the_ring_is_read_by_the_layout_of_the_abi() {
        let bytes: Vec<u8> = (0..64).collect();
        let record = flow_opened(&bytes).unwrap();
        assert_eq!(record.local_addr[15], 15);
        assert_eq!(record.remote_addr[0], 16);
        assert_eq!(record.first_ns.to_ne_bytes()[0], std::mem::offset_of!(FlowOpened, first_ns) as u8);
        assert_eq!(record.bytes.to_ne_bytes()[0], std::mem::offset_of!(FlowOpened, bytes) as u8);
        assert_eq!(
            record.header_bytes.to_ne_bytes()[0],
            std::mem::offset_of!(FlowOpened, header_bytes) as u8
        );
        assert_eq!(record.packets.to_ne_bytes()[0], std::mem::offset_of!(FlowOpened, packets) as u8);
        assert_eq!(record.ifindex.to_ne_bytes()[0], std::mem::offset_of!(FlowOpened, ifindex) as u8);
        assert_eq!(record.local_port.to_ne_bytes()[0], std::mem::offset_of!(FlowOpened, local_port) as u8);
        assert_eq!(record.label.to_ne_bytes()[0], std::mem::offset_of!(FlowOpened, label) as u8);
        assert_eq!(record.family, std::mem::offset_of!(FlowOpened, family) as u8);
        assert_eq!(record.stored, std::mem::offset_of!(FlowOpened, stored) as u8);
    }

    #[test]
    fn a_record_of_another_length_is_refused() {
        for length in [0, 63, 65, 128] {
            assert_eq!(flow_opened(&vec![0; length]), None);
        }
    }

    #[test]
    fn only_a_record_without_an_entry_in_the_table_stands_for_its_packet() {
        let mut record = flow_opened(&[7; 64]).unwrap();
        record.family = 6;
        for stored in [0, STORED, 4, 255] {
            record.stored = stored;
            assert_eq!(FlowReading::unstored(&record), None);
        }
        record.stored = NOT_STORED_TX;
        let sent = FlowReading::unstored(&record).unwrap().state;
        record.stored = NOT_STORED_RX;
        let received = FlowReading::unstored(&record).unwrap().state;
        let counted = (record.packets.into(), record.bytes.into(), record.payload().into());
        assert_eq!((sent.tx_packets, sent.tx_bytes, sent.tx_payload), counted);
        assert_eq!((received.rx_packets, received.rx_bytes, received.rx_payload), counted);
        assert_eq!((sent.rx_packets, sent.rx_bytes, sent.rx_payload), (0, 0, 0));
        assert_eq!((received.tx_packets, received.tx_bytes, received.tx_payload), (0, 0, 0));
        assert_eq!(
            (sent.first_ns, sent.burst_ns, sent.last_ns),
            (record.first_ns, sent.first_ns, sent.first_ns)
        );
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
