//! Mixed traffic over a cable, in both directions at once and on all CPUs, against the interfaces' own counters and
//! against what the senders know: not a packet and not a byte of difference. Needs root.
//!
//! `cargo xtask test` runs a short form. The full form, ten million packets and more at each end for each way to attach:
//!
//! ```text
//! cargo test --package netmon-lab --test exact -- --ignored --nocapture --test-threads 1
//! ```

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as expected")]

use std::collections::BTreeSet;
use std::fs;
use std::thread;
use std::time::Duration;

use netmon_agent::kernel::{FlowId, LoadOptions, Mode, Moved, Sizes, TcKind};
use netmon_lab::bench::frames::{Family, Shape};
use netmon_lab::bench::order::Order;
use netmon_lab::bench::pair::{Cable, INTERFACE, Pair, inside};
use netmon_lab::bench::source::{Source, Until, idle};
use netmon_lab::host::Host;
use netmon_lab::wait;

use traffic::{Amount, Sum, Truth, exchange};
use watcher::{Reading, Watcher};

#[path = "../kernel/frames.rs"]
#[expect(dead_code, reason = "the kernel tests need more of it")]
mod frames;
mod mix;
mod traffic;
mod watcher;

const QUIET: Duration = Duration::from_millis(300);
const PATIENCE: Duration = Duration::from_secs(20);

/// One way to watch a cable.
#[derive(Clone, Copy, Debug)]
struct Case {
    mode: Mode,
    tc: TcKind,
    sizes: Sizes,
    /// Super-packets go over the cable.
    gso: bool,
    amount: Amount,
    /// Frames of the packet source in each direction.
    source: u64,
}

impl Case {
    /// TCX, default tables, no super-packets.
    fn of(amount: (Amount, u64)) -> Self {
        Self {
            mode: Mode::Tc,
            tc: TcKind::Best,
            sizes: Sizes::default(),
            gso: false,
            amount: amount.0,
            source: amount.1,
        }
    }
}

/// For each host; both send.
const SHORT: (Amount, u64) =
    (Amount { frames: 60_000, flows: 5_000, datagrams: 4_000, connections: 40, pings: 100 }, 40_000);
const FULL: (Amount, u64) = (
    Amount { frames: 3_200_000, flows: 20_000, datagrams: 150_000, connections: 1_500, pings: 2_000 },
    2_000_000,
);

/// What an interface counted: received, sent, and what it dropped of what was to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Interface {
    rx: Sum,
    tx: Sum,
    dropped: u64,
}

impl Interface {
    fn of(host: &Host) -> Self {
        let text = fs::read_to_string(format!("/proc/{}/net/dev", host.holder_pid())).unwrap();
        let line = text.lines().find_map(|line| line.trim().strip_prefix(&format!("{INTERFACE}:"))).unwrap();
        let numbers: Vec<u64> = line.split_whitespace().map(|number| number.parse().unwrap()).collect();
        Self {
            rx: Sum { bytes: numbers[0], packets: numbers[1] },
            tx: Sum { bytes: numbers[8], packets: numbers[9] },
            dropped: numbers[11],
        }
    }

    fn since(self, before: Self) -> Self {
        let minus = |a: Sum, b: Sum| Sum { packets: a.packets - b.packets, bytes: a.bytes - b.bytes };
        Self {
            rx: minus(self.rx, before.rx),
            tx: minus(self.tx, before.tx),
            dropped: self.dropped - before.dropped,
        }
    }
}

/// Both interfaces' counters, when nothing is under way any more.
fn at_rest(pair: &Pair) -> [Interface; 2] {
    let read = || [Interface::of(pair.sender()), Interface::of(pair.receiver())];
    wait::unchanged(QUIET, PATIENCE, "silence on the cable", read).unwrap()
}

/// Runs a case: everything that sockets send, then the packet source's load.
fn exact(name: &str, case: Case) {
    let segments = if case.gso { 65_535 } else { 1 };
    let pair = Pair::with(Cable { ipv6: true, gro: false, segments }).unwrap();
    let options = LoadOptions { mode: case.mode, tc: case.tc, sizes: case.sizes, ..LoadOptions::default() };
    at_rest(&pair);
    let mut packets = 0;
    thread::scope(|scope| {
        let mut watchers =
            [pair.sender(), pair.receiver()].map(|host| Watcher::start(scope, host, options.clone()));

        let header = header_bytes(&pair, &mut watchers);
        let before = at_rest(&pair);
        let (a, b) = exchange(&pair, case.amount);
        let after = at_rest(&pair);
        for (end, (own, other)) in [(&a, &b), (&b, &a)].into_iter().enumerate() {
            let interface = after[end].since(before[end]);
            let reading = watchers[end].read();
            packets += reading.stats.seen;
            Comparison { case, interface, reading, own, other, header }.check(&format!("{name}, end {end}"));
        }

        // Frames that are redirected to the cable are only accepted where the other end has NAPI.
        for host in [pair.sender(), pair.receiver()] {
            host.run(&["ethtool", "-K", INTERFACE, "gro", "on"]).unwrap();
        }
        for host in [pair.sender(), pair.receiver()] {
            let up = || host.run(&["ip", "link", "show", "dev", INTERFACE]).unwrap().contains("state UP");
            wait::until(PATIENCE, "the carrier", || up().then_some(())).unwrap();
        }
        packets += sourced(name, &pair, case, &mut watchers);
    });
    println!("{name}: {packets} packets at both ends together, none and no byte missing");
}

/// How much of the Ethernet header the interfaces count in this mode: a veth device hands frames to a NAPI queue (as it
/// has with XDP) without their headers, and counts them there.
fn header_bytes(pair: &Pair, watchers: &mut [Watcher<'_>; 2]) -> u64 {
    let before = at_rest(pair);
    let one = Amount { frames: 0, flows: 1, datagrams: 1, connections: 1, pings: 1 };
    exchange(pair, one);
    let after = at_rest(pair);
    let readings = watchers.each_mut().map(|watcher| watcher.read());
    let interface = after[0].since(before[0]);
    let stats = readings[0].stats;
    let packets = interface.rx.packets + interface.tx.packets;
    let bytes = interface.rx.bytes + interface.tx.bytes;
    let header = (bytes - stats.counted_bytes - stats.other_protocol_bytes) / packets;
    assert!(header == 14 || header == 0, "{header} bytes of header");
    header
}

/// One end of the cable.
struct Comparison<'a> {
    case: Case,
    interface: Interface,
    reading: Reading,
    /// What this host sent, and what the other one sent.
    own: &'a Truth,
    other: &'a Truth,
    header: u64,
}

impl Comparison<'_> {
    fn check(&self, name: &str) {
        let Self { case, interface, reading: Reading { flows, stats }, own, other, header } = self;
        assert_eq!(interface.dropped, 0, "{name}: the cable dropped frames, nothing can be compared");

        // Every frame is seen once, and in one place.
        let refusals = stats.not_ip + stats.other_protocol + stats.malformed + stats.table_full;
        assert_eq!(stats.seen, stats.counted + refusals, "{name}: {stats:?}");
        assert_eq!(stats.seen, interface.rx.packets + interface.tx.packets, "{name}: {stats:?}");

        // What is in no flow, by kind, as the senders know it. The kernel takes the outer tag out of what arrives ahead of
        // TC, not ahead of XDP.
        let untagged = if case.mode == Mode::Tc { 4 } else { 0 };
        let sums = [
            (
                "not IP",
                stats.not_ip,
                stats.not_ip_bytes,
                own.not_ip + other.not_ip,
                untagged * other.not_ip_tagged,
            ),
            (
                "malformed",
                stats.malformed,
                stats.malformed_bytes,
                own.malformed + other.malformed,
                untagged * other.malformed_tagged,
            ),
            (
                "other protocol",
                stats.other_protocol,
                stats.other_protocol_bytes,
                own.other_protocol + other.other_protocol,
                0,
            ),
        ];
        for (what, packets, bytes, sent, less) in sums {
            assert_eq!((packets, bytes + less), (sent.packets, sent.bytes), "{name}: {what}");
        }

        // What is in flows is what was counted.
        let mut sum = Moved::default();
        flows.values().for_each(|moved| sum += *moved);
        assert_eq!(sum.tx_bytes + sum.rx_bytes, stats.counted_bytes, "{name}: bytes in flows");
        if !case.gso {
            assert_eq!(sum.tx_packets + sum.rx_packets, stats.counted, "{name}: packets in flows");
        }

        // Each direction, against the interface.
        let mut refused = Sum::default();
        let directions = [
            ("sent", interface.tx, own, sum.tx_packets, sum.tx_bytes),
            ("received", interface.rx, other, sum.rx_packets, sum.rx_bytes),
        ];
        for (direction, interface, truth, packets, bytes) in directions {
            let name = format!("{name}, {direction}");
            let no_flow = truth.not_ip.packets + truth.malformed.packets + truth.other_protocol.packets;
            let whole = truth.not_ip.bytes + truth.malformed.bytes;
            // From the IP header on, or behind where it should be.
            let no_flow_bytes =
                whole - 14 * (truth.not_ip.packets + truth.malformed.packets) + truth.other_protocol.bytes;
            let in_flows = Sum {
                packets: interface.packets - no_flow,
                bytes: interface.bytes - header * interface.packets - no_flow_bytes - truth.around,
            };
            assert!(in_flows.bytes >= bytes, "{name}: {bytes} bytes in flows, {in_flows:?}");
            refused.bytes += in_flows.bytes - bytes;
            if case.gso {
                assert!(packets > in_flows.packets, "{name}: there were no super-packets");
            } else {
                assert!(in_flows.packets >= packets, "{name}: {packets} packets in flows, {in_flows:?}");
                refused.packets += in_flows.packets - packets;
            }
        }
        assert_eq!(refused.bytes, stats.table_full_bytes, "{name}: bytes that are in no flow");
        if !case.gso {
            assert_eq!(refused.packets, stats.table_full, "{name}: packets that are in no flow");
        }
        if stats.table_full > 0 {
            let share = stats.table_full as f64 / stats.seen as f64 * 100.0;
            println!("{name}: {} of {} packets were refused ({share:.2} %)", stats.table_full, stats.seen);
            return;
        }

        // Flow by flow: both hosts send the same ones.
        let mirrored =
            |flow: &FlowId| FlowId { local: flow.remote, remote: flow.local, protocol: flow.protocol };
        let flows_there: BTreeSet<_> = other.flows.keys().map(mirrored).collect();
        for flow in own.flows.keys().chain(flows_there.iter()) {
            let moved = flows.get(flow).copied().unwrap_or_default();
            let sent = own.flows.get(flow).copied().unwrap_or_default();
            let received = other.flows.get(&mirrored(flow)).copied().unwrap_or_default();
            assert_eq!((moved.tx_packets, moved.tx_bytes), (sent.packets, sent.bytes), "{name}: {flow:?}");
            assert_eq!(
                (moved.rx_packets, moved.rx_bytes),
                (received.packets, received.bytes),
                "{name}: {flow:?}"
            );
        }
    }
}

/// The packet source of both hosts at once. Its frames pass no egress hook, so only what arrives is compared; what the
/// rings of the cable drop has not arrived.
fn sourced(name: &str, pair: &Pair, case: Case, watchers: &mut [Watcher<'_>; 2]) -> u64 {
    let before = at_rest(pair);
    for watcher in &mut *watchers {
        watcher.read();
    }
    let shapes = [Shape::SMALL, Shape { family: Family::V6, ..Shape::SMALL }];
    let offered = thread::scope(|scope| {
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let hosts = [pair.sender(), pair.receiver()];
        let loads = [0, 1].map(|number| {
            let (host, shape) = (hosts[number], shapes[number]);
            scope.spawn(move || {
                inside(host, || {
                    let mut source = Source::load_on(host, number % cpus)?;
                    source.prepare(shape, Order::Bursty, 100_000)?;
                    Ok(source.send(Until::Frames(case.source), None, idle)?.frames)
                })
            })
        });
        loads.map(|load| load.join().unwrap().unwrap())
    });
    let after = at_rest(pair);
    let mut arrived = 0;
    for end in [0, 1] {
        let name = format!("{name}, source, end {end}");
        // The other host's frames come in here.
        let shape = shapes[1 - end];
        let interface = after[end].since(before[end]);
        let Reading { flows, stats } = watchers[end].read();
        let offered = offered[1 - end];
        assert_eq!(interface.rx.bytes, interface.rx.packets * (shape.l3_bytes() + 14), "{name}");
        assert_eq!(stats.seen, interface.rx.packets, "{name}: {stats:?}");
        assert_eq!(stats.seen, stats.counted + stats.table_full, "{name}: {stats:?}");
        assert!(interface.rx.packets <= offered && interface.rx.packets > offered / 100, "{name}");
        let mut sum = Moved::default();
        flows.values().for_each(|moved| sum += *moved);
        assert_eq!((sum.rx_packets, sum.rx_bytes), (stats.counted, stats.counted_bytes), "{name}");
        assert_eq!((sum.tx_packets, sum.tx_bytes), (0, 0), "{name}");
        let bytes = stats.counted_bytes + stats.table_full_bytes;
        assert_eq!(bytes + 14 * stats.seen, interface.rx.bytes, "{name}");
        println!("{name}: {} of {offered} frames arrived, {} refused", stats.seen, stats.table_full);
        arrived += stats.seen;
    }
    arrived
}

fn tcx(amount: (Amount, u64)) {
    exact("tcx", Case::of(amount));
}

fn super_packets(amount: (Amount, u64)) {
    exact("tcx, super-packets", Case { gso: true, ..Case::of(amount) });
}

fn clsact(amount: (Amount, u64)) {
    exact("clsact", Case { tc: TcKind::Clsact, ..Case::of(amount) });
}

fn xdp(amount: (Amount, u64)) {
    exact("xdp", Case { mode: Mode::Xdp, ..Case::of(amount) });
}

fn smallest_table(amount: (Amount, u64)) {
    let sizes = Sizes { flows: 1, ..Sizes::default() };
    exact("tcx, smallest table", Case { sizes, ..Case::of(amount) });
}

fn smallest_table_xdp(amount: (Amount, u64)) {
    let sizes = Sizes { flows: 1, ..Sizes::default() };
    exact("xdp, smallest table", Case { sizes, mode: Mode::Xdp, ..Case::of(amount) });
}

fn smallest_table_and_ring(amount: (Amount, u64)) {
    let sizes = Sizes { flows: 1, ring_bytes: 4_096, ..Sizes::default() };
    exact("tcx, smallest table and ring", Case { sizes, ..Case::of(amount) });
}

/// A test in its short form, and in its full form.
macro_rules! forms {
    ($($name:ident => $case:ident;)*) => {$(
        #[test]
        fn $name() {
            $case(SHORT);
        }
    )*

        mod full {
            $(
                #[test]
                #[ignore = "the full form: ten million packets"]
                fn $name() {
                    super::$case(super::FULL);
                }
            )*
        }
    };
}

forms! {
    tcx_counts_every_packet_and_byte => tcx;
    tcx_counts_every_packet_and_byte_of_super_packets => super_packets;
    clsact_counts_every_packet_and_byte => clsact;
    xdp_counts_every_packet_and_byte_that_arrives_and_tc_what_leaves => xdp;
    a_full_table_counts_every_packet_and_byte => smallest_table;
    a_full_table_counts_every_packet_and_byte_with_xdp => smallest_table_xdp;
    a_full_table_and_a_full_ring_count_or_refuse_every_packet_and_byte => smallest_table_and_ring;
}
