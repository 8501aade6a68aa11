//! What the agent reads from the kernel.

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netmon_agent::flows::{Flows, Policy};
use netmon_agent::kernel::{FlowDelta, fed};
use netmon_agent::links;
use netmon_agent::transfers::Through;

use crate::input::Input;

/// 90 days after the boot.
pub(crate) const NOW_NS: u64 = 90 * 24 * 3_600_000_000_000;

/// Records of the ring, slots and lives in any order, and sweeps in between: nothing that did not move is reported, and
/// what was read is not read again.
pub fn tables(data: &[u8]) {
    let mut input = Input(data);
    let mut tables = fed::Tables::new().expect("there is memory");
    let mut flows = Flows::default();
    let (mut now_ns, mut out) = (NOW_NS, Vec::new());
    while !input.is_empty() {
        let (what, slot) = (input.byte(), usize::from(input.byte()));
        let ipv6 = what & 0x80 != 0;
        match what & 7 {
            0 => tables.write_slot(ipv6, slot, &input.words(), now_ns),
            1 => tables.write_life(ipv6, slot, &input.words()),
            2 => {
                tables.take(input.bytes(64), now_ns, &mut out);
            }
            3 => {
                tables.take(input.bytes(136), now_ns, &mut out);
            }
            4 => {
                tables.take(input.block(), now_ns, &mut out);
            }
            5 => now_ns += u64::from(input.u32()) << 8,
            6 => sweep(&mut tables, now_ns.saturating_sub(input.u64()), now_ns, &mut out),
            _ => sweep(&mut tables, 0, now_ns, &mut out),
        }
        for delta in &out {
            assert!(delta.first_ns <= delta.last_ns, "{delta:?}");
            assert_ne!(delta.moved, Default::default(), "{delta:?}");
        }
        let moved = flows.observe(&mut out, &Policy::default(), now_ns, |_| Through::default());
        assert_eq!(moved.len(), out.len());
        out.clear();
        while flows.next_moved().is_some() {}
        flows.forget(now_ns);
    }
}

fn sweep(tables: &mut fed::Tables, since_ns: u64, now_ns: u64, out: &mut Vec<FlowDelta>) {
    tables.sweep(since_ns, now_ns, out);
    let read = out.len();
    tables.sweep(since_ns, now_ns, out);
    assert_eq!(out.len(), read, "read twice: {:?}", &out[read..]);
}

/// Four bytes for an interface's index, and a datagram.
pub fn netlink(data: &[u8]) {
    let mut input = Input(data);
    let ifindex = input.u32();
    // Nothing but that it comes to an end.
    let _ = fed::netlink(input.0, ifindex);
    let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(input.0).map(|message| message.payload);
    if let Ok(NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message))) = message
        && let Some(link) = links::link(message)
    {
        assert!(link.master != Some(0) && link.lower != Some(0) && link.lower != Some(link.index));
    }
}
