//! One frame at a time: what is counted where, and what is refused.

use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use netmon_common::abi::{
    CLASS_GROUP, CLASS_INTERNET, CLASS_LAN, CLASS_MUTED, FlowState, HINT_FRAGMENTS, HINT_QUIC, OPENED_HERE,
    OPENED_THERE, OPENED_UNKNOWN, Stats, programs,
};

use crate::{
    frames::*,
    rig::{Bench, ENTRIES},
};

/// What should become of a frame.
#[derive(Clone, Copy, Debug)]
enum Fate {
    /// In a flow: L3 bytes, payload, source and destination port.
    Counted(u64, u64, u16, u16),
    NotIp,
    /// With L3 bytes.
    OtherProtocol(u64),
    Malformed,
}

use Fate::{Counted, Malformed, NotIp, OtherProtocol};

fn corpus() -> Vec<(&'static str, Vec<u8>, Fate)> {
    let plain = udp(1000, 2000, b"payload");
    let udp4 = udp_out(1000, 2000, b"payload");
    let udp6 = eth6(&ipv6(HERE6, THERE6, UDP, &plain));
    let hop_by_hop = cat(&[&[UDP, 0, 1, 4, 0, 0, 0, 0], &plain]);
    let chain = cat(&[
        &[43, 0, 1, 4, 0, 0, 0, 0], // hop-by-hop, then routing
        &[60, 1, 0, 0, 0, 0, 0, 0], // routing of 16 bytes, then destination options
        &[0; 8],
        &[51, 0, 1, 4, 0, 0, 0, 0], // destination options, then authentication
        &[44, 4, 0, 0, 0, 0, 0, 0], // authentication of 24 bytes, then fragment
        &[0; 16],
        &[UDP, 0, 0, 1, 0, 0, 0, 9], // first fragment (offset 0, more to come)
        &plain,
    ]);
    let endless: Vec<u8> = [60, 0, 1, 4, 0, 0, 0, 0].repeat(9);
    let mut padded = udp4.clone();
    padded.resize(60, 0xee);
    let mut unsaid = udp4.clone();
    unsaid[16..18].copy_from_slice(&[0, 0]);
    let mut overstated = udp4.clone();
    overstated[16..18].copy_from_slice(&[0xff, 0xff]);
    let mut short_ihl = udp4.clone();
    short_ihl[14] = 0x44;
    let mut wrong_version = udp4.clone();
    wrong_version[14] = 0x65;
    let mut other_datagram = eth4(&ipv4(HERE4, THERE4, UDP, &[], 0x00b9, &[9; 100]));
    other_datagram[18..20].copy_from_slice(&[0, 8]);
    let mut ihl_behind_end = eth4(&ipv4(HERE4, THERE4, UDP, &[], 0, &[]));
    ihl_behind_end[14] = 0x4f;
    let mut short_offset = tcp_out(ACK, b"data");
    short_offset[14 + 20 + 12] = 0x40;
    let mut long_offset = tcp_out(ACK, b"data");
    long_offset[14 + 20 + 12] = 0xf0;
    // The datagram's header is cut off by the IP length, and only padding stands where it would be.
    let mut header_in_padding = eth4(&ipv4(HERE4, THERE4, UDP, &[], 0, &[1, 2, 3, 4]));
    header_in_padding.resize(60, 0);
    vec![
        ("udp", udp4.clone(), Counted(35, 7, 1000, 2000)),
        ("udp without payload", udp_out(1, 2, b""), Counted(28, 0, 1, 2)),
        ("tcp", tcp_out(PSH | ACK, b"data"), Counted(44, 4, 50_000, 443)),
        (
            "tcp with options",
            eth4(&ipv4(HERE4, THERE4, TCP, &[], 0, &tcp(5, 6, SYN, &[1; 20], b""))),
            Counted(60, 0, 5, 6),
        ),
        ("ipv4 options", eth4(&ipv4(HERE4, THERE4, UDP, &[1; 40], 0, &plain)), Counted(75, 7, 1000, 2000)),
        ("vlan", tagged(0x8100, &udp4), Counted(35, 7, 1000, 2000)),
        ("service vlan", tagged(0x88a8, &udp4), Counted(35, 7, 1000, 2000)),
        ("qinq", tagged(0x88a8, &tagged(0x8100, &udp4)), Counted(35, 7, 1000, 2000)),
        ("three tags", tagged(0x8100, &tagged(0x8100, &tagged(0x8100, &udp4))), NotIp),
        ("first fragment", eth4(&ipv4(HERE4, THERE4, UDP, &[], 0x2000, &plain)), Counted(35, 7, 1000, 2000)),
        (
            "later fragment",
            eth4(&ipv4(HERE4, THERE4, UDP, &[], 0x00b9, &[9; 100])),
            Counted(120, 100, 1000, 2000),
        ),
        ("later fragment without its first", other_datagram, Counted(120, 100, 0, 0)),
        ("ethernet padding", padded, Counted(35, 7, 1000, 2000)),
        ("total length 0", unsaid, Counted(35, 7, 1000, 2000)),
        ("total length too long", overstated, Counted(35, 7, 1000, 2000)),
        ("ipv6 udp", udp6.clone(), Counted(55, 7, 1000, 2000)),
        ("ipv6 in vlan", tagged(0x8100, &udp6), Counted(55, 7, 1000, 2000)),
        ("ipv6 tcp", eth6(&ipv6(HERE6, THERE6, TCP, &tcp(5, 6, ACK, &[], b"xyz"))), Counted(63, 3, 5, 6)),
        ("ipv6 hop-by-hop", eth6(&ipv6(HERE6, THERE6, 0, &hop_by_hop)), Counted(63, 7, 1000, 2000)),
        ("ipv6 extension chain", eth6(&ipv6(HERE6, THERE6, 0, &chain)), Counted(119, 7, 1000, 2000)),
        (
            "ipv6 later fragment",
            eth6(&ipv6(HERE6, THERE6, 44, &cat(&[&[UDP, 0, 5, 0xa9, 0, 0, 0, 9], &[7; 64]]))),
            Counted(112, 64, 1000, 2000),
        ),
        (
            "ipv6 later fragment without its first",
            eth6(&ipv6(HERE6, THERE6, 44, &cat(&[&[UDP, 0, 5, 0xa9, 0, 0, 0, 8], &[7; 64]]))),
            Counted(112, 64, 0, 0),
        ),
        ("ipv6 endless extensions", eth6(&ipv6(HERE6, THERE6, 60, &endless)), Malformed),
        ("ipv6 no next header", eth6(&ipv6(HERE6, THERE6, 59, b"")), OtherProtocol(40)),
        ("arp", ethernet(0x0806, &[0; 28]), NotIp),
        ("lldp", ethernet(0x88cc, &[0; 40]), NotIp),
        ("802.3", ethernet(0x0040, &[0; 64]), NotIp),
        ("icmp", eth4(&ipv4(HERE4, THERE4, ICMP, &[], 0, &[8; 16])), OtherProtocol(36)),
        ("icmpv6", eth6(&ipv6(HERE6, THERE6, ICMP6, &[128; 16])), OtherProtocol(56)),
        ("icmp fragment", eth4(&ipv4(HERE4, THERE4, ICMP, &[], 0x10, &[0; 16])), OtherProtocol(36)),
        ("ends in the tag", ethernet(0x8100, &[0, 1]), Malformed),
        ("ends in ipv4", tagged(0x8100, &udp4[..30]), Malformed),
        ("ends in udp ports", udp4[..36].to_vec(), Malformed),
        ("ends in udp header", udp4[..40].to_vec(), Malformed),
        ("ends in tcp header", tcp_out(ACK, b"")[..48].to_vec(), Malformed),
        ("ends in ipv6", tagged(0x8100, &udp6[..50]), Malformed),
        ("ends in extension", eth6(&ipv6(HERE6, THERE6, 0, &[UDP, 0])), Malformed),
        ("extension behind the end", eth6(&ipv6(HERE6, THERE6, 0, &[UDP, 9, 1, 4, 0, 0, 0, 0])), Malformed),
        ("ihl below 5", short_ihl, Malformed),
        ("ihl behind the end", ihl_behind_end, Malformed),
        ("version 6 in an ipv4 frame", wrong_version, Malformed),
        ("tcp offset below 5", short_offset, Malformed),
        ("tcp offset behind the end", long_offset, Malformed),
        ("udp header in the padding", header_in_padding, Malformed),
    ]
}

#[test]
fn every_frame_is_counted_once_and_goes_on_at_every_entry_point() {
    for (program, sent, go_on) in ENTRIES {
        let mut bench = Bench::new();
        let mut expected = Stats::default();
        for (name, frame, fate) in corpus() {
            bench.kernel.forget();
            assert_eq!(bench.run(program, &frame), go_on, "{name} at {program}");
            let (frames, sum, bytes) = match fate {
                Counted(bytes, ..) => (&mut expected.counted, &mut expected.counted_bytes, bytes),
                NotIp => (&mut expected.not_ip, &mut expected.not_ip_bytes, frame.len() as u64),
                OtherProtocol(bytes) => {
                    (&mut expected.other_protocol, &mut expected.other_protocol_bytes, bytes)
                }
                Malformed => (&mut expected.malformed, &mut expected.malformed_bytes, frame.len() as u64),
            };
            *frames += 1;
            *sum += bytes;
            expected.seen += 1;
            assert_eq!(bench.stats(), expected, "{name} at {program}");
            let Counted(bytes, payload, source, destination) = fate else {
                assert!(bench.flows().is_empty(), "{name} at {program}");
                continue;
            };
            let (flow, state) = bench.flow();
            let (local_port, remote_port) = if sent { (source, destination) } else { (destination, source) };
            assert_eq!(
                (flow.local.port(), flow.remote.port()),
                (local_port, remote_port),
                "{name} at {program}"
            );
            let here = |ip: std::net::IpAddr| [HERE4.into(), HERE6.into()].contains(&ip);
            assert_eq!((here(flow.local.ip()), here(flow.remote.ip())), (sent, !sent), "{name} at {program}");
            let (counted, silent) = sides(&state, sent);
            assert_eq!(counted, (1, bytes, payload), "{name} at {program}");
            assert_eq!(silent, (0, 0, 0), "{name} at {program}");
            // The slot of a flow that was there before keeps its hints.
            let fragments = state.hints & HINT_FRAGMENTS != 0;
            assert!(fragments || !name.contains("later fragment"), "{name} at {program}");
            assert!(state.first_ns > 0 && state.first_ns <= state.last_ns, "{name} at {program}");
        }
    }
}

/// (packets, bytes, payload) of one direction and of the other.
fn sides(state: &FlowState, sent: bool) -> ((u64, u64, u64), (u64, u64, u64)) {
    let tx = (state.tx_packets, state.tx_bytes, state.tx_payload);
    let rx = (state.rx_packets, state.rx_bytes, state.rx_payload);
    if sent { (tx, rx) } else { (rx, tx) }
}

#[test]
fn packets_without_ethernet_header_are_read_by_their_version() {
    for (program, sent) in [(programs::TC_L3_INGRESS, false), (programs::TC_L3_EGRESS, true)] {
        let mut bench = Bench::new();
        let v4 = ipv4(HERE4, THERE4, UDP, &[], 0, &udp(1, 2, b"abc"));
        let v6 = ipv6(HERE6, THERE6, TCP, &tcp(3, 4, ACK, &[], b"defg"));
        assert_eq!(bench.run(program, &v4), u32::MAX);
        assert_eq!(bench.run(program, &v6), u32::MAX);
        assert_eq!(bench.run(program, &[0; 20]), u32::MAX);
        let stats = bench.stats();
        assert_eq!((stats.counted, stats.counted_bytes, stats.not_ip), (2, 31 + 64, 1));
        let flows: Vec<_> = bench.flows().into_values().map(|state| sides(&state, sent).0).collect();
        assert_eq!(flows, [(1, 31, 3), (1, 64, 4)]);
    }
}

#[test]
fn both_directions_of_a_connection_are_one_flow() {
    let mut bench = Bench::new();
    bench.send(&tcp_out(SYN, b""));
    bench.receive(&tcp_in(SYN | ACK, b""));
    bench.send(&tcp_out(ACK, b""));
    bench.send(&tcp_out(PSH | ACK, b"request"));
    bench.receive(&tcp_in(PSH | ACK, &[0; 1000]));
    bench.receive(&tcp_in(FIN | ACK, b""));
    let (flow, state) = bench.flow();
    assert_eq!(flow.local.to_string(), "10.0.0.1:50000");
    assert_eq!(flow.remote.to_string(), "192.0.2.9:443");
    assert_eq!(sides(&state, true), ((3, 127, 7), (3, 1120, 1000)));
    assert_eq!(state.tcp_flags, SYN | ACK | PSH | FIN);
    assert_eq!(state.opened, OPENED_HERE);
    assert!(state.first_ns <= state.last_ns);

    let opened = bench.opened();
    assert_eq!(opened.len(), 1, "one record a flow");
    let record = opened[0];
    assert_eq!(netmon_agent::kernel::FlowId::of(&record), Some(flow));
    assert_eq!((record.first_ns, record.bytes, record.payload), (state.first_ns, 40, 0));
    assert_eq!((record.class, record.opened), (CLASS_INTERNET, OPENED_HERE));
}

#[test]
fn the_first_packet_tells_who_opened_the_flow() {
    let cases = [
        (true, tcp_out(SYN, b""), OPENED_HERE),
        (false, tcp_in(SYN, b""), OPENED_THERE),
        (true, tcp_out(SYN | ACK, b""), OPENED_THERE),
        (false, tcp_in(SYN | ACK, b""), OPENED_HERE),
        (true, tcp_out(PSH | ACK, b"x"), OPENED_UNKNOWN),
        (false, tcp_in(FIN | ACK, b""), OPENED_UNKNOWN),
        (true, udp_out(1, 2, b"x"), OPENED_HERE),
        (false, udp_in(1, 2, b"x"), OPENED_THERE),
        (false, eth4(&ipv4(THERE4, HERE4, UDP, &[], 5, b"fragment")), OPENED_UNKNOWN),
    ];
    for (sent, frame, opened) in cases {
        let mut bench = Bench::new();
        if sent {
            bench.send(&frame)
        } else {
            bench.receive(&frame)
        }
        assert_eq!(bench.flow().1.opened, opened, "{frame:x?}");
        assert_eq!(bench.opened()[0].opened, opened);
    }
}

#[test]
fn quic_is_known_by_its_long_header_wherever_it_runs() {
    let initial = |first: u8, version: u32| cat(&[&[first], &version.to_be_bytes(), &[8; 20]]);
    let cases = [
        (initial(0xc3, 1), true),
        (initial(0xd0, 0x6b33_43cf), true),
        (initial(0xc3, 0), false),
        (initial(0x83, 1), false),
        (initial(0x43, 1), false),
        (initial(0xc3, 2), false),
        (vec![0xc3, 0, 0, 0], false),
    ];
    for (payload, quic) in cases {
        for port in [443, 4433] {
            let mut bench = Bench::new();
            bench.send(&udp_out(50_000, port, &payload));
            assert_eq!(bench.flow().1.hints & HINT_QUIC != 0, quic, "{payload:x?}");
            assert_eq!(bench.opened()[0].hints & HINT_QUIC != 0, quic, "{payload:x?}");
        }
    }
}

#[test]
fn the_first_payload_decides_about_quic_and_later_ones_do_not() {
    let initial = [0xc3, 0, 0, 0, 1, 8, 8, 8];
    let mut bench = Bench::new();
    bench.send(&udp_out(50_000, 443, b""));
    bench.receive(&udp_in(443, 50_000, &initial));
    assert_eq!(bench.flow().1.hints, HINT_QUIC);

    let mut bench = Bench::new();
    bench.send(&udp_out(50_000, 443, b"something else"));
    bench.send(&udp_out(50_000, 443, &initial));
    assert_eq!(bench.flow().1.hints, 0);
}

fn set(bench: &mut Bench, lan: &[&str], muted: &[(&str, u16)]) -> netmon_agent::kernel::PrefixChange {
    let lan: Vec<_> = lan.iter().map(|prefix| prefix.parse().unwrap()).collect();
    let muted: Vec<_> = muted.iter().map(|(prefix, label)| (prefix.parse().unwrap(), *label)).collect();
    bench.kernel.set_prefixes(&lan, muted).unwrap()
}

#[test]
fn a_flow_has_the_class_of_its_counterpart_and_private_wins_over_muted() {
    let mut bench = Bench::new();
    set(
        &mut bench,
        &["10.0.0.0/8", "192.0.2.0/24", "2001:db8:9::/48"],
        &[("192.0.0.0/16", 3), ("198.51.100.0/24", 4), ("198.51.100.128/25", 5), ("2001:db8::/32", 6)],
    );
    let to4 = |address: [u8; 4]| eth4(&ipv4(HERE4, address, UDP, &[], 0, &udp(9, 9, b"")));
    let to6 = |address: [u8; 16]| eth6(&ipv6(HERE6, address, UDP, &udp(9, 9, b"")));
    let mut elsewhere = THERE6;
    elsewhere[5] = 8;
    let mut outside = THERE6;
    outside[0] = 0x26;
    let cases = [
        (to4([10, 9, 9, 9]), CLASS_LAN, 0),
        (to4([192, 0, 2, 9]), CLASS_LAN, 0),
        (to4([192, 0, 3, 9]), CLASS_MUTED, 3),
        (to4([198, 51, 100, 1]), CLASS_MUTED, 4),
        (to4([198, 51, 100, 200]), CLASS_MUTED, 5),
        (to4([203, 0, 113, 1]), CLASS_INTERNET, 0),
        (to4([224, 0, 0, 251]), CLASS_GROUP, 0),
        (to4([239, 255, 255, 250]), CLASS_GROUP, 0),
        (to4([255, 255, 255, 255]), CLASS_GROUP, 0),
        (broadcast_frame(&to4([10, 255, 255, 255])), CLASS_GROUP, 0),
        (to6(THERE6), CLASS_LAN, 0),
        (to6(elsewhere), CLASS_MUTED, 6),
        (to6(outside), CLASS_INTERNET, 0),
        (to6([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xfb]), CLASS_GROUP, 0),
    ];
    for (frame, class, label) in cases {
        bench.send(&frame);
        let record = bench.opened().pop().unwrap();
        assert_eq!((record.class, record.label), (class, label), "{frame:x?}");
    }
    // What arrives for a group has the group as its local address.
    bench.receive(&eth4(&ipv4([10, 0, 0, 7], [224, 0, 0, 251], UDP, &[], 0, &udp(5353, 5353, b"x"))));
    assert_eq!(bench.opened().pop().unwrap().class, CLASS_GROUP);
}

#[test]
fn a_broadcast_frame_does_not_hide_the_unicast_traffic_behind_it() {
    let mut bench = Bench::new();
    set(&mut bench, &["192.0.2.0/24"], &[]);
    bench.receive(&broadcast_frame(&udp_in(1, 2, b"x")));
    assert_eq!(bench.flow().1.class, CLASS_GROUP);
    bench.receive(&udp_in(1, 2, b"x"));
    assert_eq!(bench.flow().1.class, CLASS_LAN);
    bench.receive(&broadcast_frame(&udp_in(1, 2, b"x")));
    assert_eq!(bench.flow().1.class, CLASS_LAN);
}

#[test]
fn refilled_prefixes_classify_running_flows_again_at_their_next_packet() {
    let mut bench = Bench::new();
    let class = |bench: &mut Bench| {
        let (_, state) = bench.flow();
        (state.class, state.label)
    };
    let change = set(
        &mut bench,
        &["10.0.0.0/8"],
        &[("192.0.2.0/24", 1), ("198.51.100.0/24", 1), ("2001:db8::/32", 2)],
    );
    assert_eq!((change.added, change.relabelled, change.removed), (4, 0, 0));
    bench.send(&udp_out(1, 2, b""));
    assert_eq!(class(&mut bench), (CLASS_MUTED, 1));

    let change = set(&mut bench, &["10.0.0.0/8"], &[("192.0.2.0/24", 7), ("2001:db8::/32", 2)]);
    assert_eq!((change.added, change.relabelled, change.removed), (0, 1, 1));
    assert_eq!(class(&mut bench), (CLASS_MUTED, 1), "not before the next packet");
    bench.receive(&udp_in(2, 1, b""));
    assert_eq!(class(&mut bench), (CLASS_MUTED, 7));

    set(&mut bench, &["10.0.0.0/8"], &[]);
    bench.send(&udp_out(1, 2, b""));
    assert_eq!(class(&mut bench), (CLASS_INTERNET, 0));

    set(&mut bench, &["192.0.2.9/32"], &[]);
    bench.send(&udp_out(1, 2, b""));
    assert_eq!(class(&mut bench), (CLASS_LAN, 0));

    let change = set(&mut bench, &["192.0.2.9/32"], &[]);
    assert_eq!(change, netmon_agent::kernel::PrefixChange::default());
    assert_eq!(bench.opened().len(), 1, "a new class is not a new flow");
    assert_eq!(bench.flow().1.tx_packets, 3);
}

/// What the kernel says of a packet beside its bytes: a `struct __sk_buff` (include/uapi/linux/bpf.h) of zeros but for these.
fn context(gso_segs: u32, gso_size: u32) -> Vec<u8> {
    let mut context = vec![0; 192];
    context[164..168].copy_from_slice(&gso_segs.to_ne_bytes());
    context[176..180].copy_from_slice(&gso_size.to_ne_bytes());
    context
}

#[test]
fn a_super_packet_counts_its_segments_also_where_only_their_size_is_told() {
    for (segments, size, packets) in [(0, 0, 1), (3, 1448, 3), (0, 1448, 3), (0, 3000, 1), (0, 2999, 2)] {
        let mut bench = Bench::new();
        let pin = bench.pin(programs::TC_EGRESS);
        bench.host.run(move || {
            let (frame, context) = (tcp_out(ACK, &[7; 3000]), context(segments, size));
            let options =
                TestRunOptions { data_in: Some(&frame), ctx_in: Some(&context), ..TestRunOptions::default() };
            SchedClassifier::from_pin(pin).unwrap().test_run(options).unwrap();
        });
        let (_, state) = bench.flow();
        assert_eq!((state.tx_packets, state.tx_payload), (packets, 3000), "{segments} of {size}");
    }
}
