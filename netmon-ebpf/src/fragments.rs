//! Later fragments carry no ports: they belong to the datagram whose first fragment did (RFC 791, section 3.2; RFC 8200,
//! section 4.5).

use netmon_common::abi::{FragmentKey, FragmentPorts};

use crate::{diagnostics, maps::FRAGMENTS, parse::Packet};

/// `BPF_ANY`.
const ANY: u64 = 0;

/// Remembers the ports of a first fragment, or gives a later one those of its first; without these it keeps ports 0.
///
/// Its own subprogram: few packets are fragments, and a program has 512 bytes of stack.
#[inline(never)]
pub fn follow(packet: &mut Packet) {
    let key = FragmentKey {
        source: packet.source,
        destination: packet.destination,
        id: packet.fragment_id,
        protocol: packet.measure.protocol,
        family: packet.family,
        pad: [0; 2],
    };
    if packet.first_fragment {
        let ports = FragmentPorts { source: packet.source_port, destination: packet.destination_port };
        // A full map forgets the datagram that was not asked for longest; failing is no more than that.
        let _ = FRAGMENTS.insert(&key, &ports, ANY);
    } else if let Some(ports) = FRAGMENTS.get_ptr(&key) {
        // SAFETY: the map gave the pointer, and its entries stay readable until the program ends.
        unsafe {
            packet.source_port = (*ports).source;
            packet.destination_port = (*ports).destination;
        }
    } else {
        diagnostics::fragment_without_first(packet.fragment_id, packet.family.into());
    }
}
