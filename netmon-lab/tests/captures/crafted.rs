//! Frames that this machine's own stack does not send, made into captures by text2pcap.

use std::collections::BTreeMap;

use netmon_lab::replay::{NotPlayed, tally::Tally};

use crate::{
    equal,
    frames::*,
    making::{Directory, pcap, text2pcap},
};

fn more(offset_units: u16) -> u16 {
    0x2000 | offset_units
}

/// An IPv6 fragment header (RFC 8200, 4.5) and what follows it.
fn fragment6(next: u8, offset_units: u16, more: bool, id: u32, rest: &[u8]) -> Vec<u8> {
    let offset = offset_units << 3 | u16::from(more);
    cat(&[&[next, 0], &offset.to_be_bytes(), &id.to_be_bytes(), rest])
}

/// A tunnel's IPv4 packet.
fn outer(protocol: u8, rest: &[u8]) -> Vec<u8> {
    eth4(&ipv4(HERE4, THERE4, protocol, &[], 0, rest))
}

/// Every kind of frame that has a rule, well-formed and not.
pub fn corpus() -> Vec<Vec<u8>> {
    let plain = udp(1000, 2000, b"payload");
    let inner4 = ipv4([172, 16, 0, 1], [172, 16, 0, 2], UDP, &[], 0, &udp(7, 8, b"inner"));
    let inner6 = ipv6(THERE6, HERE6, TCP, &tcp(9, 10, ACK, &[], b"inner"));
    let hop_by_hop = |rest: &[u8]| cat(&[&[UDP, 0, 1, 4, 0, 0, 0, 0], rest]);
    let (udp4, udp6) = (udp_out(1000, 2000, b"payload"), eth6(&ipv6(HERE6, THERE6, UDP, &plain)));
    let tcp6 = eth6(&ipv6(HERE6, THERE6, TCP, &tcp(5, 6, SYN, &[1; 20], b"")));
    let chain = cat(&[
        &[43, 0, 1, 4, 0, 0, 0, 0],
        &[60, 1, 0, 0, 0, 0, 0, 0],
        &[0; 8],
        &[51, 0, 1, 4, 0, 0, 0, 0],
        &[44, 4, 0, 0, 0, 0, 0, 0],
        &[0; 16],
        &fragment6(UDP, 0, true, 9, &plain),
    ]);
    let extensions = |count: usize| {
        let middle = [60, 0, 1, 4, 0, 0, 0, 0].repeat(count - 1);
        eth6(&ipv6(HERE6, THERE6, 60, &cat(&[&middle, &hop_by_hop(&plain)])))
    };
    let vxlan = cat(&[&[8, 0, 0, 0, 0, 0, 42, 0], &tagged(0x8100, &eth6(&inner6))]);
    let quoted = cat(&[&[3, 3, 0, 0, 0, 0, 0, 0], &inner4]);
    let mut frames = vec![
        udp4.clone(),
        udp_in(1000, 2000, b"payload"),
        udp_out(1, 2, b""),
        udp_out(443, 50_000, &[7; 1400]),
        tcp_out(SYN, b""),
        tcp_in(SYN | ACK, b""),
        tcp_out(PSH | ACK, b"data"),
        tcp_in(FIN | ACK, b"answer"),
        udp6.clone(),
        tcp6.clone(),
        // IPv4 options: record route.
        eth4(&ipv4(HERE4, THERE4, UDP, &[7, 39, 4], 0, b"")[..20]),
        eth4(&ipv4(HERE4, THERE4, UDP, &cat(&[&[7, 39, 4], &[0; 37]]), 0, &plain)),
        eth4(&ipv4(HERE4, THERE4, TCP, &[1; 8], 0, &tcp(5, 6, ACK, &[1; 12], b"xyz"))),
        broadcast_frame(&udp_out(68, 67, &[0; 300])),
        eth4(&ipv4(HERE4, [224, 0, 0, 251], UDP, &[], 0, &udp(5353, 5353, b"mdns"))),
        // Groups and control.
        eth4(&ipv4(HERE4, [224, 0, 0, 22], 2, &[0x94, 4, 0, 0], 0, &[0x22; 16])),
        eth4(&ipv4(HERE4, THERE4, ICMP, &[], 0, &[8; 16])),
        eth4(&ipv4(THERE4, HERE4, ICMP, &[], 0, &quoted)),
        eth6(&ipv6(THERE6, HERE6, ICMP6, &cat(&[&[1, 4, 0, 0, 0, 0, 0, 0], &inner6]))),
        eth6(&ipv6(HERE6, THERE6, 59, b"")),
        // Tunnels.
        outer(47, &cat(&[&[0, 0, 8, 0], &inner4])),
        outer(47, &cat(&[&[0, 0, 0x65, 0x58], &udp6])),
        outer(4, &inner4),
        outer(41, &inner6),
        outer(50, &[3; 40]),
        outer(51, &cat(&[&[UDP, 4, 0, 0], &[0; 20], &plain])),
        outer(132, &cat(&[&[0, 7, 0, 8], &[0; 28]])),
        outer(136, &plain),
        eth6(&ipv6(HERE6, THERE6, 4, &inner4)),
        eth6(&ipv6(HERE6, THERE6, 41, &inner6)),
        udp_out(40_000, 4789, &vxlan),
        eth4(&ipv4(
            HERE4,
            THERE4,
            UDP,
            &[],
            0,
            &udp(2152, 2152, &cat(&[&[0x30, 0xff, 0, 49], &[0; 4], &inner4])),
        )),
        // Extension headers.
        eth6(&ipv6(HERE6, THERE6, 0, &hop_by_hop(&plain))),
        eth6(&ipv6(HERE6, THERE6, 0, &chain)),
        eth6(&ipv6(HERE6, THERE6, 43, &cat(&[&[TCP, 2, 0, 1], &[0; 20], &tcp(5, 6, ACK, &[], b"x")]))),
        eth6(&ipv6(HERE6, THERE6, 135, &cat(&[&[59, 1], &[0; 14]]))),
        eth6(&ipv6(HERE6, THERE6, 140, &cat(&[&[UDP, 1, 0x80], &[0; 13], &plain]))),
        extensions(7),
        extensions(8),
        eth6(&ipv6(HERE6, THERE6, 60, &[60, 0, 1, 4, 0, 0, 0, 0].repeat(9))),
        eth6(&ipv6(HERE6, THERE6, 0, &[UDP, 9, 1, 4, 0, 0, 0, 0])),
        // Fragments: in order, without their first, of another protocol, too small for the header.
        eth4(&ipv4(HERE4, THERE4, UDP, &[], 0x00b9, &[9; 100])),
        eth4(&ipv4(HERE4, THERE4, UDP, &[], more(0), &udp(3000, 4000, &[1; 1472]))),
        eth4(&ipv4(HERE4, THERE4, UDP, &[], more(185), &[9; 1480])),
        eth4(&ipv4(HERE4, THERE4, UDP, &[], 370, &[9; 100])),
        eth4(&ipv4(THERE4, HERE4, UDP, &[], 185, &[9; 100])),
        eth4(&ipv4(HERE4, THERE4, TCP, &[], 185, &[9; 100])),
        eth4(&ipv4(HERE4, THERE4, ICMP, &[], 185, &[9; 100])),
        eth4(&ipv4(HERE4, THERE4, UDP, &[], more(0), &[0; 4])),
        eth6(&ipv6(HERE6, THERE6, 44, &fragment6(UDP, 0, true, 77, &udp(3001, 4001, &[1; 1440])))),
        eth6(&ipv6(HERE6, THERE6, 44, &fragment6(UDP, 181, false, 77, &[7; 64]))),
        eth6(&ipv6(HERE6, THERE6, 44, &fragment6(UDP, 181, false, 78, &[7; 64]))),
        eth6(&ipv6(HERE6, THERE6, 44, &fragment6(ICMP6, 181, false, 77, &[7; 64]))),
        eth6(&ipv6(HERE6, THERE6, 44, &fragment6(60, 181, false, 77, &[7; 64]))),
        eth6(&ipv6(HERE6, THERE6, 44, &fragment6(UDP, 0, false, 79, &plain))),
        // Not IP.
        ethernet(0x0806, &[0; 28]),
        ethernet(0x88cc, &[0; 40]),
        ethernet(0x0040, &cat(&[&[0xaa, 0xaa, 3, 0, 0, 0, 8, 0], &inner4])),
        ethernet(0x8864, &cat(&[&[0x11, 0, 0, 1, 0, 35, 0, 0x21], &inner4])),
        ethernet(0x8847, &cat(&[&[0, 1, 1, 64], &inner4])),
        ethernet(0x9100, &cat(&[&[0, 42, 8, 0], &inner4])),
        ethernet(0x0800, b""),
        ethernet(0x8100, &[0, 42, 0, 38, 0x42, 0x42, 3, 0, 0, 0, 0, 0, 0, 0]),
        ethernet(0x8100, &[0]),
    ];
    // Tags before anything.
    for frame in [&udp4, &udp6, &tcp6, &ethernet(0x0806, &[0; 28])] {
        frames.extend([
            tagged(0x8100, frame),
            tagged(0x88a8, frame),
            tagged(0x88a8, &tagged(0x8100, frame)),
            tagged(0x8100, &tagged(0x8100, frame)),
            tagged(0x8100, &tagged(0x88a8, &tagged(0x8100, frame))),
            tagged(0x8100, &tagged(0x8100, &tagged(0x8100, &tagged(0x8100, frame)))),
        ]);
    }
    // Lengths that are not true, headers that cannot be.
    for (frame, at, bytes) in [
        (&udp4, 16, [0, 0]),
        (&udp4, 16, [0xff, 0xff]),
        (&udp4, 16, [0, 19]),
        (&udp4, 16, [0, 22]),
        (&udp4, 16, [0, 28]),
        (&udp4, 14, [0x44, 0]),
        (&udp4, 14, [0x4f, 0]),
        (&udp4, 14, [0x55, 0]),
        (&udp4, 14, [0x65, 0]),
        (&udp4, 12, [0x86, 0xdd]),
        (&udp4, 38, [0, 0]),
        (&udp4, 38, [0, 3]),
        (&udp4, 38, [0xff, 0xff]),
        (&udp6, 18, [0, 0]),
        (&udp6, 18, [0xff, 0xff]),
        (&udp6, 18, [0, 7]),
        (&udp6, 12, [8, 0]),
        (&udp6, 14, [0x40, 0]),
        (&tcp_out(ACK, b"data"), 46, [0x40, 16]),
        (&tcp_out(ACK, b"data"), 46, [0xf0, 16]),
    ] {
        let mut wrong = frame.clone();
        wrong[at..at + 2].copy_from_slice(&bytes);
        let mut padded = wrong.clone();
        padded.resize(padded.len().max(60), 0);
        frames.extend([wrong, padded]);
    }
    frames
}

/// The same for every hook but the number of tags that it looks behind.
fn check(tally: &Tally) {
    assert!(tally.flows.len() > 15, "{tally}");
    for class in [tally.counted, tally.other_protocol, tally.not_ip, tally.malformed] {
        assert!(class.packets > 10, "{tally}");
    }
}

#[test]
fn every_kind_of_frame_is_counted_as_tshark_counts_it_in_pcap_and_pcapng() {
    let directory = Directory::new();
    for format in ["pcap", "nsecpcap", "pcapng"] {
        let path = directory.join(format);
        text2pcap(&path, format, 1, &corpus());
        let replay = equal(&path);
        println!("{replay}");
        replay.hooks.iter().for_each(|compared| check(&compared.netmon));
        // The frame whose tag is cut off.
        let reasons: Vec<_> = replay.not_played.iter().map(|(_, why)| *why).collect();
        assert_eq!(reasons, [NotPlayed::EndsInTag], "{replay}");
    }
}

#[test]
fn every_frame_that_ends_early_is_counted_as_tshark_counts_it() {
    let directory = Directory::new();
    let path = directory.join("cut.pcap");
    let frames: Vec<_> = corpus()
        .into_iter()
        .flat_map(|frame| {
            (14..=frame.len().min(140)).map(|length| frame[..length].to_vec()).collect::<Vec<_>>()
        })
        .collect();
    pcap(&path, 1, &frames);
    let replay = equal(&path);
    println!("{replay}");
    replay.hooks.iter().for_each(|compared| check(&compared.netmon));
}

#[test]
fn link_layers_without_ethernet_are_counted_as_tshark_counts_them() {
    let directory = Directory::new();
    // LINKTYPE_ number, and what stands before an IPv4 and an IPv6 packet.
    let cooked = |ethertype: [u8; 2]| cat(&[&[0, 0, 0, 1, 0, 6], &[2; 8], &ethertype]);
    let cooked2 = |ethertype: [u8; 2]| cat(&[&ethertype, &[0, 0, 0, 0, 0, 5, 0, 1, 0, 6], &[2; 8]]);
    let links = BTreeMap::from([
        (0, (vec![2, 0, 0, 0], vec![24, 0, 0, 0])),
        (101, (vec![], vec![])),
        (108, (vec![0, 0, 0, 2], vec![0, 0, 0, 30])),
        (113, (cooked([8, 0]), cooked([0x86, 0xdd]))),
        (228, (vec![], vec![])),
        (229, (vec![], vec![])),
        (276, (cooked2([8, 0]), cooked2([0x86, 0xdd]))),
    ]);
    for (link, (before4, before6)) in links {
        let frames: Vec<_> = corpus()
            .iter()
            .filter_map(|frame| match frame.get(12..14)? {
                [8, 0] if frame.len() > 14 && link != 229 => Some(cat(&[&before4, &frame[14..]])),
                [0x86, 0xdd] if link != 228 => Some(cat(&[&before6, &frame[14..]])),
                _ => None,
            })
            .collect();
        let path = directory.join(&format!("{link}.pcap"));
        text2pcap(&path, "pcap", link, &frames);
        let replay = equal(&path);
        println!("{replay}");
        assert!(replay.hooks.iter().all(|compared| compared.netmon.counted.packets > 10), "{replay}");
        assert!(replay.not_played.is_empty(), "{replay}");
    }
}
