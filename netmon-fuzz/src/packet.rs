//! The kernel programs' parser.

use crate::frame::{START, set_linear};
use crate::parse::{
    ETHERNET_HEADER, Link, Measure, PLAIN_BYTES, Packet, Parsed, looks_like_quic, parse, plain4, plain6,
};

/// A byte that says whether an Ethernet header comes first (lowest bit) and how much of the frame is in its linear part
/// (the others, in units of two bytes; all set: everything), and a frame. Both readers agree; nothing is counted that the
/// frame does not hold.
pub fn packet(data: &[u8]) {
    let Some((how, frame)) = data.split_first() else { return };
    let linear = match how >> 1 {
        0x7f => frame.len(),
        pairs => frame.len().min(usize::from(pairs) * 2),
    };
    let end = set_linear(&frame[..linear]);
    if how & 1 == 0 {
        read::<0>(frame, end, Link::None);
    } else {
        read::<ETHERNET_HEADER>(frame, end, Link::Ethernet);
    }
}

fn read<const AT: usize>(frame: &[u8], end: usize, link: Link) {
    let mut packet = Packet::default();
    let parsed = parse(&frame, link, &mut packet);
    let held = frame.len() as u32;
    let Measure { l3_bytes, payload, l3_at, .. } = packet.measure;
    match parsed {
        Parsed::Packet => {
            assert!(payload < l3_bytes && l3_at + l3_bytes <= held);
            assert!(matches!(packet.family, 4 | 6) && matches!(packet.measure.protocol, 6 | 17));
            assert!(!(packet.first_fragment && packet.measure.later_fragment));
            assert!(!packet.measure.later_fragment || packet.ports() == 0);
            looks_like_quic(&frame, &packet.measure);
        }
        Parsed::OtherProtocol => assert!(l3_bytes <= held),
        Parsed::NotIp | Parsed::Malformed => {}
    }

    // As in netmon-ebpf's main.rs.
    if START + AT + PLAIN_BYTES > end {
        return;
    }
    let (is_ipv4, is_ipv6, group_frame) = match link {
        Link::Ethernet => (frame[12..14] == [8, 0], frame[12..14] == [0x86, 0xdd], frame[0] & 1 != 0),
        Link::None => (frame[0] >> 4 == 4, frame[0] >> 4 == 6, false),
    };
    let agrees = |ports, plain: Measure| {
        let plain = Measure { group_frame, ..plain };
        assert!(parsed == Parsed::Packet && !packet.first_fragment && ports == packet.ports());
        assert_eq!(fields(&plain), fields(&packet.measure));
    };
    if is_ipv4 {
        if let Some(plain) = plain4::<_, AT>(&frame, START, end) {
            agrees(plain.ports, plain.measure);
            assert_eq!((packet.family, packet.addresses4()), (4, plain.addresses));
        }
    } else if is_ipv6 && let Some(plain) = plain6::<_, AT>(&frame, START, end) {
        agrees(plain.ports, plain.measure);
        assert_eq!((packet.family, packet.addresses6()), (6, plain.addresses));
    }
}

fn fields(measure: &Measure) -> (u32, u32, u32, u8, bool, bool, u8) {
    let Measure { l3_bytes, payload, l3_at, tcp_flags, later_fragment, group_frame, protocol } = *measure;
    (l3_bytes, payload, l3_at, tcp_flags, later_fragment, group_frame, protocol)
}
