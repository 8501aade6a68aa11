//! Full maps, bursts and idle flows, leftovers, wrong input.

use aya::{
    maps::{HashMap, Map, MapData},
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use netmon_agent::kernel::{FlowReading, Kernel, KernelError, Sizes};
use netmon_common::abi::{
    CLASS_INTERNET, Flow4Key, FlowState, NOT_STORED_RX, NOT_STORED_TX, OPENED_HERE, SILENCE_NS, STORED, maps,
    programs,
};

use crate::{
    frames::*,
    rig::{Bench, Host, chain},
};

#[test]
fn flows_beyond_the_table_are_counted_as_refused_and_announced_as_not_stored() {
    let mut bench = Bench::with(|options| options.sizes = Sizes { flows: 8, ..Sizes::default() });
    for port in 0..12 {
        bench.send(&udp_out(1000 + port, 53, b"0123456789"));
    }
    let stats = bench.stats();
    assert_eq!((stats.seen, stats.counted, stats.table_full), (12, 8, 4));
    assert_eq!((stats.counted_bytes, stats.table_full_bytes), (8 * 38, 4 * 38));
    assert_eq!(bench.flows().len(), 8);
    let stored: Vec<_> = bench.opened().iter().map(|record| record.stored).collect();
    assert_eq!(stored, [[STORED; 8].as_slice(), &[NOT_STORED_TX; 4]].concat());

    // A flow that is in the table goes on being counted, and room that is made is used.
    bench.send(&udp_out(1000, 53, b"0123456789"));
    assert_eq!(bench.stats().counted, 9);
    bench.kernel.sweep(u64::MAX, 0, &mut Vec::new()).unwrap();
    bench.send(&udp_out(2000, 53, b"0123456789"));
    assert_eq!(bench.stats().counted, 10);
}

#[test]
fn records_beyond_the_ring_are_counted_and_their_flows_are_in_the_table() {
    let mut bench = Bench::with(|options| options.sizes = Sizes { ring_bytes: 4096, ..Sizes::default() });
    for port in 0..100 {
        bench.send(&udp_out(1000 + port, 53, b""));
    }
    assert_eq!(bench.flows().len(), 100);
    let opened = bench.opened().len() as u64;
    let stats = bench.stats();
    // 64 bytes and the ring's own 8 for each.
    assert_eq!((opened, stats.ring_full), (56, 44));
    assert_eq!(stats.counted, 100);
    bench.send(&udp_out(5000, 53, b""));
    assert_eq!(bench.opened().len(), 1, "there is room again");
}

#[test]
fn flows_outside_the_table_leave_half_of_the_ring_to_the_others() {
    let mut bench = Bench::with(|options| {
        options.sizes = Sizes { flows: 1, ring_bytes: 4096, ..Sizes::default() };
    });
    for port in 0..200 {
        bench.send(&udp_out(1000 + port, 53, b""));
    }
    let opened = bench.opened().len() as u64;
    assert!((28..=30).contains(&opened), "{opened}");
    let stats = bench.stats();
    assert_eq!((stats.table_full, stats.ring_full), (199, 0), "a frame is lost once");
}

#[test]
fn a_packet_of_a_flow_outside_the_table_is_told_with_its_direction_and_counts() {
    let mut bench = Bench::with(|options| options.sizes = Sizes { flows: 1, ..Sizes::default() });
    bench.send(&udp_out(1, 2, b""));
    bench.send(&udp_out(1000, 53, b"0123456789"));
    bench.receive(&udp_in(53, 1000, b"0123"));
    bench.receive(&tcp_in(SYN | ACK, b""));
    let records = bench.opened();
    let kinds: Vec<_> = records.iter().map(|record| record.stored).collect();
    assert_eq!(kinds, [STORED, NOT_STORED_TX, NOT_STORED_RX, NOT_STORED_RX]);
    assert_eq!(FlowReading::unstored(&records[0]), None, "it is in the table");

    let [sent, received, answer] = [1, 2, 3].map(|n| FlowReading::unstored(&records[n]).unwrap());
    assert_eq!(sent.flow, received.flow);
    assert_eq!((sent.flow.local.port(), sent.flow.remote.port()), (1000, 53));
    let counts = |state: &FlowState| {
        let tx = (state.tx_packets, state.tx_bytes, state.tx_payload);
        (tx, (state.rx_packets, state.rx_bytes, state.rx_payload))
    };
    assert_eq!(counts(&sent.state), ((1, 38, 10), (0, 0, 0)));
    assert_eq!(counts(&received.state), ((0, 0, 0), (1, 32, 4)));
    assert_eq!(counts(&answer.state), ((0, 0, 0), (1, 40, 0)));
    assert_eq!((sent.state.class, sent.state.opened), (CLASS_INTERNET, OPENED_HERE));
    assert_eq!(answer.state.opened, OPENED_HERE, "who opened the flow is not who sent the packet");
    for reading in [sent, received, answer] {
        assert!(reading.retired);
        let FlowState { first_ns, burst_ns, last_ns, .. } = reading.state;
        assert!(first_ns > 0 && first_ns == burst_ns && burst_ns == last_ns);
    }
    assert!(sent.state.first_ns < received.state.first_ns);
}

/// Makes a flow look as if its last packet had come earlier: waiting would take seconds.
fn age(bench: &Bench, by_ns: u64) {
    let pin = bench.pin(maps::FLOWS4);
    bench.host.run(move || {
        let map = Map::HashMap(MapData::from_pin(pin).unwrap());
        let mut map: HashMap<_, Flow4Key, FlowState> = HashMap::try_from(map).unwrap();
        let entries: Vec<_> = map.iter().map(Result::unwrap).collect();
        for (key, mut state) in entries {
            state.first_ns -= by_ns;
            state.burst_ns -= by_ns;
            state.last_ns -= by_ns;
            map.insert(key, state, 0).unwrap();
        }
    });
}

#[test]
fn two_seconds_of_silence_begin_a_new_burst() {
    let mut bench = Bench::new();
    bench.send(&udp_out(1, 2, b"a"));
    age(&bench, SILENCE_NS - 1_000_000_000);
    bench.send(&udp_out(1, 2, b"b"));
    let (_, state) = bench.flow();
    assert_eq!(state.burst_ns, state.first_ns, "one second is not silence");
    age(&bench, SILENCE_NS);
    bench.receive(&udp_in(2, 1, b"c"));
    let (_, state) = bench.flow();
    assert_eq!(state.burst_ns, state.last_ns);
    assert!(state.last_ns - state.first_ns > SILENCE_NS);
    assert_eq!((state.tx_packets, state.rx_packets), (2, 1));
}

#[test]
fn an_idle_flow_is_retired_with_its_last_counts_and_starts_from_zero_when_it_comes_back() {
    const MINUTE: u64 = 60_000_000_000;
    let mut bench = Bench::new();
    bench.send(&udp_out(1, 2, b"abc"));
    bench.send(&eth6(&ipv6(HERE6, THERE6, UDP, &udp(1, 2, b"abc"))));
    let last = bench.flows().values().map(|state| state.last_ns).max().unwrap();
    let sweep = |bench: &mut Bench, now| {
        let mut out = Vec::<FlowReading>::new();
        bench.kernel.sweep(now, MINUTE, &mut out).unwrap();
        out
    };
    let live = sweep(&mut bench, last + MINUTE / 2);
    assert_eq!(live.iter().map(|reading| reading.retired).collect::<Vec<_>>(), [false, false]);
    let retired = sweep(&mut bench, last + MINUTE);
    assert_eq!(
        retired.iter().map(|reading| (reading.retired, reading.state.tx_packets)).collect::<Vec<_>>(),
        [(true, 1); 2]
    );
    assert!(sweep(&mut bench, last + 2 * MINUTE).is_empty());

    bench.send(&udp_out(1, 2, b"abc"));
    let (_, state) = bench.flow();
    assert_eq!(state.tx_packets, 1);
    assert_eq!(bench.opened().len(), 3, "a flow that comes back is announced again");
}

#[test]
fn cpus_that_count_the_same_flow_at_the_same_time_lose_nothing() {
    const REPEAT: u32 = 100_000;
    let mut bench = Bench::new();
    let pins = [bench.pin(programs::TC_EGRESS), bench.pin(programs::TC_INGRESS)];
    let frames = [udp_out(1, 2, b"abc"), udp_in(2, 1, b"defgh")];
    bench.host.run(move || {
        // Twice each: two directions of one flow, and two CPUs in the same direction.
        std::thread::scope(|scope| {
            for (pin, frame) in pins.iter().zip(&frames).chain(pins.iter().zip(&frames)) {
                scope.spawn(move || {
                    let program = SchedClassifier::from_pin(pin).unwrap();
                    let data_in = Some(frame.as_slice());
                    program
                        .test_run(TestRunOptions { data_in, repeat: REPEAT, ..Default::default() })
                        .unwrap();
                });
            }
        });
    });
    let each = 2 * u64::from(REPEAT);
    let (_, state) = bench.flow();
    assert_eq!((state.tx_packets, state.tx_bytes, state.tx_payload), (each, 31 * each, 3 * each));
    assert_eq!((state.rx_packets, state.rx_bytes, state.rx_payload), (each, 33 * each, 5 * each));
    let stats = bench.stats();
    assert_eq!((stats.seen, stats.counted, stats.counted_bytes), (2 * each, 2 * each, 64 * each));
    assert_eq!(bench.opened().len(), 1, "one of them was first");
}

#[test]
fn a_full_table_is_swept_completely() {
    let mut bench = Bench::with(|options| options.sizes = Sizes { flows: 4_000, ..Sizes::default() });
    for port in 0..3_000 {
        bench.send(&udp_out(1 + port, 53, b""));
    }
    let ports: std::collections::BTreeSet<_> = bench.flows().keys().map(|flow| flow.local.port()).collect();
    assert_eq!(ports, (1..=3_000).collect());
}

#[test]
fn pins_have_the_names_of_the_abi_and_the_directory_is_for_root_alone() {
    use std::os::unix::fs::PermissionsExt as _;
    let bench = Bench::new();
    let directory = bench.host.bpffs.join("netmon");
    let (pins, mode) = bench.host.run(move || {
        let mut pins: Vec<_> = std::fs::read_dir(&directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        pins.sort();
        (pins, std::fs::metadata(&directory).unwrap().permissions().mode() & 0o777)
    });
    let mut expected = [
        maps::FLOWS4,
        maps::FLOWS6,
        maps::LAN4,
        maps::LAN6,
        maps::MUTE4,
        maps::MUTE6,
        maps::EVENTS,
        maps::STATS,
        maps::CONFIG,
        programs::TC_INGRESS,
        programs::TC_EGRESS,
        programs::TC_L3_INGRESS,
        programs::TC_L3_EGRESS,
        programs::XDP_INGRESS,
    ];
    expected.sort_unstable();
    assert_eq!(pins, expected);
    assert!(expected.iter().all(|name| name.len() <= 15), "the kernel keeps 15 characters");
    assert_eq!(mode, 0o700);
}

#[test]
fn the_pins_of_an_agent_that_died_are_replaced_and_a_clean_end_removes_them() {
    let host = Host::new();
    let directory = host.options().pin_dir;
    host.load(host.options()).die();
    let left = directory.clone();
    assert!(host.run(move || left.join(maps::FLOWS4).exists()), "as after SIGKILL, pins are left");
    let kernel = host.load(host.options());
    assert_eq!(kernel.stats().unwrap().seen, 0);
    kernel.shutdown().unwrap();
    let left = directory.clone();
    assert!(!host.run(move || left.exists()));

    // Neither does an agent that returns with an error leave anything.
    drop(host.load(host.options()));
    assert!(!host.run(move || directory.exists()));
}

#[test]
fn too_many_prefixes_are_refused_before_anything_changes() {
    let mut bench = Bench::with(|options| {
        options.sizes = Sizes { lan_prefixes: 2, muted_prefixes: 3, ..Sizes::default() };
    });
    let muted = |from: u8| (from..from + 3).map(|n| (format!("198.51.{n}.0/24").parse().unwrap(), 1));
    // Old and new lists need not fit at once.
    bench.kernel.set_prefixes(&[], muted(0)).unwrap();
    let change = bench.kernel.set_prefixes(&[], muted(100)).unwrap();
    assert_eq!((change.added, change.removed), (3, 3));
    let four = (0..4).map(|n| (format!("203.0.{n}.0/24").parse().unwrap(), 1));
    let error = bench.kernel.set_prefixes(&[], four).unwrap_err();
    assert_eq!(error.to_string(), "4 muted prefixes of one family, but at most 3 fit");
    let lan: Vec<_> = (0..3).map(|n| format!("10.{n}.0.0/16").parse().unwrap()).collect();
    let error = bench.kernel.set_prefixes(&lan, []).unwrap_err();
    assert_eq!(error.to_string(), "3 private prefixes of one family, but at most 2 fit");
    assert_eq!(bench.kernel.set_prefixes(&[], muted(100)).unwrap(), Default::default());
}

#[test]
fn an_interface_that_is_not_there_is_named_by_its_index() {
    let mut bench = Bench::new();
    let error = bench.kernel.run(|kernel| kernel.attach(4_242)).unwrap_err();
    assert!(matches!(error, KernelError::NoSuchInterface { ifindex: 4_242 }), "{}", chain(&error));
}

#[test]
fn loading_without_a_bpf_file_system_names_the_command() {
    let host = Host::new();
    let mut options = host.options();
    options.pin_dir = "/tmp/netmon-pins".into();
    let error = host.run(move || Kernel::load(options)).unwrap_err();
    assert_eq!(error.to_string(), "no BPF file system at /tmp. Run: mount -t bpf bpf /tmp");
}
