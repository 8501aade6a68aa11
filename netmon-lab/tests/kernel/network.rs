//! Real traffic between two network namespaces, against the counters of the interfaces themselves.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
};

use aya::{
    EbpfLoader,
    maps::{Array, Map, MapData},
    programs::{
        LinkOrder, SchedClassifier, TcAttachType,
        tc::{NlOptions, TcAttachOptions},
    },
};
use netmon_agent::kernel::{Kernel, KernelError, Mode, OBJECT, TcKind};
use netmon_common::{
    abi::{CpuStats, IPPROTO_TCP, IPPROTO_UDP, OPENED_HERE, OPENED_THERE, Set4, Stats, maps, programs},
    model::Hook,
};

use crate::rig::{Host, Loaded, chain, eventually, flows, ip, sh, stats};

/// Two hosts with a cable between them: `a` 192.0.2.1 and 2001:db8::1, `b` …2. The interface is called `v`.
struct Pair {
    a: Host,
    b: Host,
}

impl Pair {
    /// `segments`: how many segments a GSO super-packet may have.
    fn new(segments: u32) -> Self {
        let pair = Self { a: Host::new(), b: Host::new() };
        pair.a.ip(&format!("link add v type veth peer name v netns {}", pair.b.tid));
        for (host, number) in [(&pair.a, 1), (&pair.b, 2)] {
            host.ip(&format!("link set v gso_max_segs {segments}"));
            host.ip(&format!("addr add 192.0.2.{number}/24 dev v"));
            host.ip(&format!("addr add 2001:db8::{number}/64 dev v nodad"));
        }
        pair
    }

    /// Returns when frames pass. Until the kernel has worked off the news of the carrier, it drops what is sent behind
    /// the egress hook, and the interface does not count it.
    fn up(&self) {
        self.a.ip("link set v up");
        self.b.ip("link set v up");
        for host in [&self.a, &self.b] {
            eventually(|| {
                let link = host.ip("link show dev v");
                if link.contains("state UP") { Ok(()) } else { Err(link) }
            });
            // The state is set first, the queue is opened next, under one lock: this waits for it.
            host.ip("link set v up");
        }
    }

    /// Loads and attaches on both sides.
    fn watch(&self, mode: Mode, tc: TcKind) -> (Loaded, Loaded, Hook) {
        let (a, hook) = watch(&self.a, mode, tc);
        let (b, _) = watch(&self.b, mode, tc);
        (a, b, hook)
    }

    /// UDP and TCP, both ways, over both families. Returns when all of it has been received.
    fn talk(&self) {
        for server in ["192.0.2.2:7000", "[2001:db8::2]:7000"] {
            let server: SocketAddr = server.parse().unwrap();
            let ready =
                self.b.run(move || (UdpSocket::bind(server).unwrap(), TcpListener::bind(server).unwrap()));
            let (udp, listener) = ready;
            let done = self.b.start(move || {
                let mut buffer = [0; 2000];
                for _ in 0..DATAGRAMS {
                    let (length, from) = udp.recv_from(&mut buffer).unwrap();
                    udp.send_to(&buffer[..length], from).unwrap();
                }
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = Vec::new();
                stream.read_to_end(&mut request).unwrap();
                stream.write_all(&vec![7; ANSWER]).unwrap();
                request.len()
            });
            self.a.run(move || {
                let from =
                    SocketAddr::new(if server.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() }, 0);
                let udp = UdpSocket::bind(from).unwrap();
                udp.connect(server).unwrap();
                for length in 1..=DATAGRAMS {
                    udp.send(&vec![1; length]).unwrap();
                    assert_eq!(udp.recv(&mut [0; 2000]).unwrap(), length);
                }
                let mut stream = TcpStream::connect(server).unwrap();
                stream.write_all(&vec![3; REQUEST]).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
                let mut answer = Vec::new();
                stream.read_to_end(&mut answer).unwrap();
                assert_eq!(answer.len(), ANSWER);
            });
            assert_eq!(done.recv().unwrap(), REQUEST);
        }
    }
}

/// No interface.
const NONE: [u32; 0] = [];
const DATAGRAMS: usize = 100;
const REQUEST: usize = 3_000_000;
const ANSWER: usize = 1_000_000;

fn watch(host: &Host, mode: Mode, tc: TcKind) -> (Loaded, Hook) {
    let mut options = host.options();
    (options.mode, options.tc) = (mode, tc);
    let mut kernel = host.load(options);
    let index = host.ifindex("v");
    let hook = kernel.run(move |kernel| {
        let hook = kernel.attach(index).unwrap_or_else(|error| panic!("{}", chain(&error)));
        // A second time changes nothing, and above all it does not count twice.
        assert_eq!(kernel.attach(index).unwrap(), hook);
        hook
    });
    (kernel, hook)
}

/// Frames and bytes that the interface itself has counted, both directions.
fn interface(host: &Host) -> (u64, u64) {
    let links: serde_json::Value = serde_json::from_str(&host.ip("-j -s link show dev v")).unwrap();
    let counter = |direction: &str, what: &str| links[0]["stats64"][direction][what].as_u64().unwrap();
    (counter("rx", "packets") + counter("tx", "packets"), counter("rx", "bytes") + counter("tx", "bytes"))
}

/// What the programs have counted, with the Ethernet headers that they leave out.
fn counted(stats: &Stats) -> (u64, u64) {
    let ip = stats.counted + stats.other_protocol;
    (stats.seen, stats.counted_bytes + stats.other_protocol_bytes + 14 * ip + stats.not_ip_bytes)
}

fn check_flows(a: &mut Loaded, b: &mut Loaded) {
    let (a, b) = (flows(a), flows(b));
    for family in [4, 6] {
        let header = if family == 4 { 20 } else { 40 };
        let of = |protocol| {
            let mut found = a.iter().filter(|(flow, _)| {
                flow.protocol == protocol
                    && flow.remote.port() == 7000
                    && flow.remote.is_ipv4() == (family == 4)
            });
            let (flow, state) = found.next().unwrap();
            assert!(found.next().is_none());
            let seen_there =
                b.iter().find(|(other, _)| other.local == flow.remote && other.remote == flow.local);
            (*state, *seen_there.unwrap_or_else(|| panic!("{flow:?} is not in {b:?}")).1)
        };
        let (udp, udp_there) = of(IPPROTO_UDP);
        let payload = (1..=DATAGRAMS as u64).sum::<u64>();
        let bytes = payload + DATAGRAMS as u64 * (8 + header);
        assert_eq!((udp.tx_packets, udp.tx_bytes, udp.tx_payload), (DATAGRAMS as u64, bytes, payload));
        assert_eq!((udp.rx_packets, udp.rx_bytes, udp.rx_payload), (DATAGRAMS as u64, bytes, payload));
        assert_eq!((udp_there.rx_bytes, udp_there.tx_bytes), (bytes, bytes));
        let (tcp, tcp_there) = of(IPPROTO_TCP);
        // A segment that was sent twice was sent twice; the ends agree on it below.
        assert!(tcp.tx_payload >= REQUEST as u64 && tcp.rx_payload >= ANSWER as u64, "{tcp:?}");
        assert_eq!((tcp.opened, tcp_there.opened), (OPENED_HERE, OPENED_THERE));
        // 1,500 bytes of MTU; a super-packet counts its segments.
        assert!(tcp.tx_packets >= (REQUEST as u64).div_ceil(1500 - 20 - header), "{tcp:?}");
        assert_eq!((tcp.tx_bytes, tcp.tx_payload), (tcp_there.rx_bytes, tcp_there.rx_payload));
        assert_eq!((tcp.rx_bytes, tcp.rx_payload), (tcp_there.tx_bytes, tcp_there.tx_payload));
        assert_eq!((tcp.tx_packets, tcp.rx_packets), (tcp_there.rx_packets, tcp_there.tx_packets));
    }
}

/// The hooks of [`TcKind::Best`] in this mode: TCX is of Linux 6.6, and the older kernels of `cargo xtask vm` do without.
fn best(mode: Mode) -> Hook {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse().ok());
    match (mode, (numbers.next(), numbers.next()) >= (Some(6_u32), Some(6_u32))) {
        (Mode::Tc, true) => Hook::Tcx,
        (Mode::Tc, false) => Hook::Clsact,
        (Mode::Xdp, true) => Hook::XdpTcx,
        (Mode::Xdp, false) => Hook::XdpClsact,
    }
}

/// Programs on the TCX hooks of interface `v`, where there are such hooks.
fn on_tcx() -> [usize; 2] {
    [TcAttachType::Ingress, TcAttachType::Egress]
        .map(|direction| SchedClassifier::query_tcx("v", direction).map_or(0, |(_, programs)| programs.len()))
}

fn bytes_equal_the_interface(tc: TcKind, expected: Hook) {
    let pair = Pair::new(65_535);
    let (mut a, mut b, hook) = pair.watch(Mode::Tc, tc);
    assert_eq!(hook, expected);
    pair.up();
    pair.talk();
    for (host, kernel) in [(&pair.a, &a), (&pair.b, &b)] {
        eventually(|| {
            let (here, there) = (counted(&stats(kernel)), interface(host));
            if here == there { Ok(()) } else { Err(format!("programs {here:?}, interface {there:?}")) }
        });
    }
    check_flows(&mut a, &mut b);
}

#[test]
fn tcx_counts_exactly_what_the_interface_counts() {
    bytes_equal_the_interface(TcKind::Best, Hook::Tcx);
}

#[test]
fn clsact_counts_exactly_what_the_interface_counts() {
    bytes_equal_the_interface(TcKind::Clsact, Hook::Clsact);
}

#[test]
fn xdp_counts_what_arrives_and_tc_what_leaves_without_counting_twice() {
    // XDP takes the super-packets apart; TC sees them whole. Without them both count the same headers.
    let pair = Pair::new(1);
    let (mut a, mut b, hook) = pair.watch(Mode::Xdp, TcKind::Best);
    assert_eq!(hook, best(Mode::Xdp));
    pair.up();
    pair.talk();
    eventually(|| {
        let (here, there) = (counted(&stats(&a)), counted(&stats(&b)));
        if here == there { Ok(()) } else { Err(format!("one end {here:?}, the other {there:?}")) }
    });
    check_flows(&mut a, &mut b);
}

/// A program of someone else on the same hook: another copy of ours, with maps of its own.
fn neighbour(options: TcAttachOptions) -> (Array<MapData, CpuStats>, aya::Ebpf) {
    let mut ebpf = EbpfLoader::new().load(OBJECT).unwrap();
    let program: &mut SchedClassifier = ebpf.program_mut(programs::TC_INGRESS).unwrap().try_into().unwrap();
    program.load().unwrap();
    program.attach_with_options("v", TcAttachType::Ingress, options).unwrap();
    let stats = Array::try_from(ebpf.take_map(maps::STATS).unwrap()).unwrap();
    (stats, ebpf)
}

fn seen(stats: &Array<MapData, CpuStats>) -> u64 {
    stats.iter().map(|cpu| cpu.unwrap().stats.seen).sum()
}

#[test]
fn programs_before_and_behind_ours_on_tcx_see_every_packet() {
    let pair = Pair::new(65_535);
    let (behind, _keep_behind) = pair.a.run(|| neighbour(TcAttachOptions::TcxOrder(LinkOrder::first())));
    // Ours goes first.
    let (kernel, _) = watch(&pair.a, Mode::Tc, TcKind::Best);
    let (before, _keep_before) = pair.a.run(|| neighbour(TcAttachOptions::TcxOrder(LinkOrder::first())));
    let order = pair.a.run(|| SchedClassifier::query_tcx("v", TcAttachType::Ingress).unwrap().1.len());
    assert_eq!(order, 3);
    pair.up();
    pair.talk();
    eventually(|| {
        // Only what arrives: the neighbours are at ingress.
        let arrived: u64 = {
            let links: serde_json::Value = serde_json::from_str(&pair.a.ip("-j -s link show dev v")).unwrap();
            links[0]["stats64"]["rx"]["packets"].as_u64().unwrap()
        };
        let all = (seen(&before), seen(&behind));
        if all == (arrived, arrived) { Ok(()) } else { Err(format!("{all:?} of {arrived}")) }
    });
    assert!(stats(&kernel).seen > seen(&behind));
}

#[test]
fn a_clsact_filter_behind_ours_sees_every_packet() {
    let pair = Pair::new(65_535);
    let (kernel, _) = watch(&pair.a, Mode::Tc, TcKind::Clsact);
    let options = TcAttachOptions::Netlink(NlOptions { priority: 2, ..NlOptions::default() });
    let (behind, _keep) = pair.a.run(move || neighbour(options));
    pair.up();
    pair.talk();
    eventually(|| {
        let links: serde_json::Value = serde_json::from_str(&pair.a.ip("-j -s link show dev v")).unwrap();
        let arrived = links[0]["stats64"]["rx"]["packets"].as_u64().unwrap();
        let behind = seen(&behind);
        if behind == arrived { Ok(()) } else { Err(format!("{behind} of {arrived}")) }
    });
    assert!(stats(&kernel).seen > seen(&behind));
}

#[test]
fn a_clean_end_leaves_the_interface_as_it_was() {
    for (mode, tc) in [(Mode::Tc, TcKind::Best), (Mode::Tc, TcKind::Clsact), (Mode::Xdp, TcKind::Clsact)] {
        let pair = Pair::new(65_535);
        let state = |host: &Host| {
            host.run(|| {
                (
                    on_tcx(),
                    sh("tc", "qdisc show dev v"),
                    sh("bpftool", "net show dev v"),
                    ip("link show dev v"),
                )
            })
        };
        let before = state(&pair.a);
        // Another test that starts a command holds copies of all descriptors for a moment, those of links among them.
        let is_as_before = |end: &str| {
            eventually(|| {
                let now = state(&pair.a);
                if now == before { Ok(()) } else { Err(format!("{end}: {now:?}, before: {before:?}")) }
            });
        };
        let (kernel, _) = watch(&pair.a, mode, tc);
        assert_ne!(state(&pair.a), before);
        kernel.shutdown().unwrap();
        is_as_before("a clean end");
        let (kernel, _) = watch(&pair.a, mode, tc);
        assert_ne!(state(&pair.a), before);
        drop(kernel);
        is_as_before("an agent that returns with an error");
    }
}

#[test]
fn a_clsact_qdisc_with_filters_of_others_stays() {
    let pair = Pair::new(65_535);
    let (kernel, _) = watch(&pair.a, Mode::Tc, TcKind::Clsact);
    let options = TcAttachOptions::Netlink(NlOptions { priority: 2, ..NlOptions::default() });
    let _keep = pair.a.run(move || neighbour(options));
    kernel.shutdown().unwrap();
    let filters = pair.a.run(|| sh("tc", "filter show dev v ingress"));
    assert!(filters.contains("pref 2 bpf") && !filters.contains("0x6e6d"), "{filters}");
}

#[test]
fn filters_of_an_agent_that_died_are_replaced_and_not_doubled() {
    let pair = Pair::new(65_535);
    let (dead, _) = watch(&pair.a, Mode::Tc, TcKind::Clsact);
    dead.die();
    let (kernel, _) = watch(&pair.a, Mode::Tc, TcKind::Clsact);
    for direction in ["ingress", "egress"] {
        let filters = pair.a.run(move || sh("tc", &format!("filter show dev v {direction}")));
        assert_eq!(filters.matches("handle 0x6e6d").count(), 1, "{filters}");
    }
    pair.up();
    pair.talk();
    eventually(|| {
        let (here, there) = (counted(&stats(&kernel)), interface(&pair.a));
        if here == there { Ok(()) } else { Err(format!("programs {here:?}, interface {there:?}")) }
    });
}

/// Takes attachments away behind the agent's back, and expects that it notices, leaves nothing behind, and watches
/// again when it is told to.
fn a_lost_attachment_is_noticed(mode: Mode, tc: TcKind, expected: Hook, take: impl Fn(&Pair)) {
    let pair = Pair::new(65_535);
    let (mut kernel, hook) = watch(&pair.a, mode, tc);
    assert_eq!(hook, expected);
    pair.up();
    let index = pair.a.ifindex("v");
    assert_eq!(kernel.run(Kernel::verify), NONE, "all is in place");
    assert_eq!(kernel.attached().count(), 1);

    take(&pair);
    assert_eq!(kernel.run(Kernel::verify), [index]);
    assert_eq!(kernel.attached().count(), 0);
    assert_eq!(kernel.run(Kernel::verify), NONE, "it is told once");
    // A link ends with its last descriptor, and other tests that start a program hold copies for a moment.
    eventually(|| {
        let left = pair.a.run(|| {
            (on_tcx(), sh("tc", "qdisc show dev v").contains("clsact"), ip("link show dev v").contains("xdp"))
        });
        if left == ([0, 0], false, false) { Ok(()) } else { Err(format!("left behind: {left:?}")) }
    });

    let again = kernel.run(move |kernel| (kernel.attach(index).unwrap(), kernel.verify()));
    assert_eq!(again, (expected, vec![]));
    let before = stats(&kernel).seen;
    pair.a.run(|| UdpSocket::bind("192.0.2.1:0").unwrap().send_to(b"x", "192.0.2.2:7000").unwrap());
    eventually(|| if stats(&kernel).seen > before { Ok(()) } else { Err("nothing was seen".into()) });
}

/// `bpftool link detach`, for the links of a program.
fn detach_links(pair: &Pair, program: &'static str) {
    let pin = pair.a.bpffs.join("netmon").join(program);
    pair.a.run(move || {
        let show = sh("bpftool", &format!("-j prog show pinned {}", pin.display()));
        let program: serde_json::Value = serde_json::from_str(&show).unwrap();
        let links: serde_json::Value = serde_json::from_str(&sh("bpftool", "-j link show")).unwrap();
        let ours: Vec<_> =
            links.as_array().unwrap().iter().filter(|link| link["prog_id"] == program["id"]).collect();
        assert!(!ours.is_empty(), "{links}");
        for link in ours {
            sh("bpftool", &format!("link detach id {}", link["id"]));
        }
    });
}

#[test]
fn a_tcx_link_that_was_detached_is_noticed() {
    for program in [programs::TC_INGRESS, programs::TC_EGRESS] {
        a_lost_attachment_is_noticed(Mode::Tc, TcKind::Best, Hook::Tcx, |pair| detach_links(pair, program));
    }
}

#[test]
fn a_clsact_qdisc_or_filter_that_was_removed_is_noticed() {
    for command in ["qdisc del dev v clsact", "filter del dev v egress", "filter del dev v ingress pref 1"] {
        a_lost_attachment_is_noticed(Mode::Tc, TcKind::Clsact, Hook::Clsact, |pair| {
            pair.a.run(move || sh("tc", command));
        });
    }
}

#[test]
fn an_xdp_link_that_was_detached_is_noticed() {
    a_lost_attachment_is_noticed(Mode::Xdp, TcKind::Best, best(Mode::Xdp), |pair| {
        detach_links(pair, programs::XDP_INGRESS);
    });
}

#[test]
fn an_interface_that_disappears_can_be_detached() {
    let pair = Pair::new(65_535);
    for tc in [TcKind::Best, TcKind::Clsact] {
        pair.a.ip("link add gone type veth peer name other");
        let index = pair.a.ifindex("gone");
        let mut options = pair.a.options();
        options.tc = tc;
        let mut kernel = pair.a.load(options);
        kernel.run(move |kernel| {
            kernel.attach(index).unwrap();
            ip("link del gone");
            assert_eq!(kernel.verify(), NONE, "the list of interfaces tells that");
            assert_eq!(kernel.attached().count(), 1);
            assert!(kernel.detach(index).unwrap());
            assert!(!kernel.detach(index).unwrap());
        });
        kernel.shutdown().unwrap();
    }
}

#[test]
fn an_interface_with_an_xdp_program_refuses_ours_with_a_word() {
    let pair = Pair::new(65_535);
    let (_first, _) = watch(&pair.a, Mode::Xdp, TcKind::Best);
    let mut options = pair.a.options();
    options.pin_dir = pair.a.bpffs.join("second");
    options.mode = Mode::Xdp;
    let mut second = pair.a.load(options);
    let index = pair.a.ifindex("v");
    let error = second.run(move |kernel| kernel.attach(index)).unwrap_err();
    assert!(matches!(error, KernelError::XdpBusy { .. }), "{}", chain(&error));
}

#[test]
fn an_interface_without_ethernet_header_is_counted_from_its_ip_header() {
    let host = Host::new();
    host.ip("tuntap add dev v mode tun");
    let (mut kernel, hook) = watch(&host, Mode::Xdp, TcKind::Best);
    assert_eq!(hook, best(Mode::Tc), "XDP is for Ethernet");
    host.ip("addr add 192.0.2.1/24 dev v");
    host.ip("link set v up");
    host.run(|| {
        let socket = UdpSocket::bind("192.0.2.1:0").unwrap();
        socket.send_to(b"into the tunnel", "192.0.2.2:7000").unwrap();
    });
    let found = flows(&mut kernel);
    let (_, state) = found.iter().find(|(flow, _)| flow.remote.port() == 7000).unwrap();
    assert_eq!((state.tx_packets, state.tx_bytes, state.tx_payload), (1, 43, 15));
    assert_eq!(stats(&kernel).malformed, 0);
}

#[test]
fn bpftool_prints_the_flow_table_with_field_names() {
    let pair = Pair::new(65_535);
    let (mut kernel, _) = watch(&pair.a, Mode::Tc, TcKind::Best);
    pair.up();
    pair.talk();
    // As the agent does it every second.
    for (flow, state) in flows(&mut kernel) {
        assert!(kernel.show(&flow, &state));
    }
    let pins = pair.a.bpffs.join("netmon");
    let show = |arguments: String| pair.a.run(move || sh("bpftool", &arguments));
    let dump = show(format!("map dump pinned {}", pins.join(maps::FLOWS4).display()));
    for field in ["\"local_addr\"", "\"remote_port\": ", "\"tx_payload\": ", "\"last_ns\": ", "\"class\": "] {
        assert!(dump.contains(field), "{field} in {dump}");
    }
    // With `--nocapture`, what docs/bpftool.md shows.
    println!("$ bpftool prog show\n{}", show("prog show".into()));
    println!("$ bpftool link show\n{}", show("link show".into()));
    println!("$ bpftool map show\n{}", show("map show".into()));
    println!("$ bpftool map dump name nm_flows4\n{dump}");
    for map in [maps::STATS, maps::LAN4] {
        println!(
            "$ bpftool map dump name {map}\n{}",
            show(format!("map dump pinned {}", pins.join(map).display()))
        );
    }
    let set = pair.a.run({
        let pin = pins.join(maps::TABLE4);
        move || {
            let map = Map::Array(MapData::from_pin(pin).unwrap());
            let table: Array<_, Set4> = Array::try_from(map).unwrap();
            let is_used = |set: Set4| set.slots.iter().any(|slot| slot.ports.protocol != 0);
            (0..table.len()).find(|index| is_used(table.get(index, 0).unwrap())).unwrap()
        }
    });
    let [a, b, c, d] = set.to_ne_bytes();
    let lookup = |map: &str| {
        let found = show(format!("map lookup pinned {} key {a} {b} {c} {d}", pins.join(map).display()));
        println!("$ bpftool map lookup name {map} key {a} {b} {c} {d}\n{found}");
        found
    };
    let (slots, lives) = (lookup(maps::TABLE4), lookup(maps::LIVES));
    for field in ["\"remote_addr\"", "\"tx_payload\": ", "\"last_tick\": "] {
        assert!(slots.contains(field), "{field} in {slots}");
    }
    assert!(lives.contains("\"incarnation\": 1"), "{lives}");
    drop(kernel);

    let (kernel, _) = watch(&pair.a, Mode::Xdp, TcKind::Clsact);
    let attached = show("net show".into());
    println!("$ bpftool net show\n{attached}");
    assert!(
        attached.contains("v(2) driver id") && attached.contains("clsact/egress nm_tc_egress id"),
        "{attached}"
    );
    drop(kernel);
}

/// The stats map can be opened by anyone who may read the pins: `bpftool` is a user interface.
#[test]
fn statistics_can_be_read_through_the_pin() {
    let pair = Pair::new(65_535);
    let (kernel, _) = watch(&pair.a, Mode::Tc, TcKind::Best);
    pair.up();
    pair.talk();
    let pin = pair.a.bpffs.join("netmon").join(maps::STATS);
    let pinned = pair.a.run(move || {
        let map = Map::Array(MapData::from_pin(pin).unwrap());
        seen(&Array::try_from(map).unwrap())
    });
    assert!(pinned > 0 && pinned <= stats(&kernel).seen);
}
