//! Real traffic in a room, recorded by real tools in all their formats.

use netmon_lab::{
    generator::Generator,
    replay::{Replay, tally::Counts},
    room::{self, Room, WEB, WEB6},
};

use crate::{equal, making::Recorder};

/// What was recorded of a flow, by the port of either side.
fn of_port(replay: &Replay, protocol: u8, port: u16) -> Counts {
    let tally = &replay.hooks[0].netmon;
    let flows = tally.flows.iter().filter(|(flow, _)| {
        flow.protocol == protocol && (flow.source.port() == port || flow.destination.port() == port)
    });
    flows.fold(Counts::default(), |sum, (_, counts)| Counts {
        packets: sum.packets + counts.packets,
        bytes: sum.bytes + counts.bytes,
        payload: sum.payload + counts.payload,
    })
}

const TCP: u8 = 6;
const UDP: u8 = 17;
const COPY: u64 = 5_000_000;
const DATAGRAMS: u64 = 20;
const DATAGRAM: u64 = 8_000;

fn talk(room: &Room) {
    let (pc, other, web) = (room.pc(1), room.pc(2), room.host("web"));
    let certificate = format!("--certificate {}", room.directory().join("web.pem").display());
    for to in [format!("{}:9000", room::lan(2)), format!("[{}]:9000", room::lan6(2))] {
        let sink = Generator::serve(other, &format!("tcp-serve --listen {to} --reply 70000")).unwrap();
        Generator::run(pc, &format!("tcp-copy --to {to} --send {COPY}B")).unwrap();
        sink.report().unwrap();
    }
    for address in [WEB.to_owned(), format!("[{WEB6}]")] {
        for (protocol, port) in [("https", 443), ("http", 80), ("quic", 443)] {
            let identity = if protocol == "http" { "" } else { &certificate };
            let at = format!("{address}:{port} {identity}");
            let server = Generator::serve(web, &format!("{protocol}-serve --size 300000 --listen {at}"));
            Generator::run(pc, &format!("{protocol}-get --to {at}")).unwrap();
            server.unwrap().report().unwrap();
        }
    }
    let dns = format!("{}:53", room::DNS);
    let server = Generator::serve(room.host("dns"), &format!("dns-serve --listen {dns}")).unwrap();
    Generator::run(pc, &format!("dns-query --to {dns}")).unwrap();
    server.report().unwrap();
    // Fragments, in both families.
    for to in [format!("{}:9001", room::lan(2)), format!("[{}]:9001", room::lan6(2))] {
        // What is sent is what is recorded. The server is there so that no ICMP error comes back; on a busy machine its
        // socket may not hold all of it.
        let server =
            Generator::serve(other, &format!("udp-serve --listen {to} --count {DATAGRAMS}")).unwrap();
        let send = format!("udp-send --to {to} --count {DATAGRAMS} --size {DATAGRAM}");
        Generator::run(pc, &send).unwrap();
        drop(server);
    }
    // IGMP: joins a group, and leaves it.
    for action in ["add", "del"] {
        pc.run(&["ip", "address", action, "239.7.7.7/32", "dev", "lan0", "autojoin"]).unwrap();
    }
    Generator::run(pc, "udp-send --to 239.7.7.8:9002 --count 3").unwrap();
    // Nobody listens: ICMP errors come back and quote the datagram.
    for to in [room::lan(2), format!("[{}]", room::lan6(2))] {
        Generator::run(pc, &format!("udp-send --to {to}:9003 --count 1")).unwrap();
    }
}

#[test]
fn what_real_tools_record_of_real_traffic_is_counted_as_tshark_counts_it() {
    let room = Room::build(2).unwrap();
    // A buffer of 32 MiB: nothing that the assertions below ask for is dropped.
    let tcpdump = ["tcpdump", "-Z", "root", "-n", "-U", "-B", "32768", "-i"];
    // Name, what is recorded where, and whether whole frames are.
    let formats: [(&str, Vec<&str>, bool); 6] = [
        ("whole.pcap", [&tcpdump[..], &["lan0", "-s", "0"]].concat(), true),
        ("snaplen.pcap", [&tcpdump[..], &["lan0", "-s", "60"]].concat(), false),
        ("nano.pcap", [&tcpdump[..], &["lan0", "--time-stamp-precision=nano"]].concat(), true),
        ("cooked1.pcap", [&tcpdump[..], &["any", "-y", "LINUX_SLL"]].concat(), true),
        ("cooked2.pcap", [&tcpdump[..], &["any", "-y", "LINUX_SLL2"]].concat(), true),
        ("dumpcap.pcapng", vec!["dumpcap", "-q", "-i", "lan0", "-B", "32"], true),
    ];
    let recorders = formats.map(|(name, command, whole)| {
        (Recorder::start(room.pc(1), &command, room.directory().join(name)), whole)
    });
    talk(&room);
    for (recorder, whole) in recorders {
        let replay = equal(&recorder.stop());
        println!("{replay}");
        let tally = &replay.hooks[0].netmon;
        assert!(tally.other_protocol.packets >= 4, "IGMP and ICMP: {replay}");
        assert_eq!(tally.table_full, Counts::default(), "{replay}");
        // 60 bytes do not hold the ports of an IPv6 datagram, nor of its first fragment.
        let families = if whole { 2 } else { 1 };
        let datagrams = of_port(&replay, UDP, 9001);
        assert!(datagrams.packets >= families * DATAGRAMS * 6, "fragments of 1500 bytes: {replay}");
        assert_eq!(of_port(&replay, UDP, 9002).packets, 3, "multicast: {replay}");
        assert_eq!(of_port(&replay, UDP, 9003).packets, families, "quoted ones are not counted: {replay}");
        assert_eq!(of_port(&replay, UDP, 53).packets, 2, "{replay}");
        assert!(of_port(&replay, UDP, 443).packets > 4, "QUIC: {replay}");
        if whole {
            assert_eq!(tally.malformed, Counts::default(), "{replay}");
            assert_eq!(datagrams.payload, 2 * DATAGRAMS * DATAGRAM, "{replay}");
            let copied = of_port(&replay, TCP, 9000).payload;
            assert!(copied >= 2 * (COPY + 70_000), "retransmissions only add to {copied}");
            assert!(of_port(&replay, TCP, 443).payload >= 2 * 300_000, "{replay}");
        } else {
            assert!(tally.malformed.packets > 0, "TCP options were cut off: {replay}");
        }
    }
}
