//! Full maps, flows that change hands, bursts, leftovers, wrong input.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use aya::{
    maps::{Array, Map, MapData},
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use fastrand::Rng;
use netmon_agent::kernel::{Kernel, KernelError, Sizes};
use netmon_common::abi::{Counts, Lives, SILENCE_NS, Set4, TICK_NS, TICK_SHIFT, maps, programs};

use crate::{
    frames::*,
    rig::{Bench, Host, chain, flows, now},
};

/// The smallest table: 64 slots for each CPU.
const SMALLEST: u32 = 1;

#[test]
fn a_full_table_hands_over_what_it_gives_up_and_nothing_is_lost() {
    let mut bench = Bench::with(|options| options.sizes = Sizes { flows: SMALLEST, ..Sizes::default() });
    for port in 0..5_000 {
        bench.send(&udp_out(1000 + port, 53, b"0123456789"));
        bench.send(&eth6(&ipv6(HERE6, THERE6, UDP, &udp(1000 + port, 53, b"abc"))));
    }
    let stats = bench.stats();
    assert_eq!((stats.seen, stats.counted, stats.table_full), (10_000, 10_000, 0));
    let flows = bench.flows();
    assert_eq!(flows.len(), 10_000);
    for (flow, state) in flows {
        let (bytes, payload) = if flow.local.is_ipv4() { (38, 10) } else { (51, 3) };
        assert_eq!((state.tx_packets, state.tx_bytes, state.tx_payload), (1, bytes, payload), "{flow:?}");
    }
}

#[test]
fn without_room_to_hand_over_a_new_flow_is_refused_and_counted_as_such() {
    let mut bench = Bench::with(|options| {
        options.sizes = Sizes { flows: SMALLEST, ring_bytes: 4096, ..Sizes::default() };
    });
    for port in 0..1_000 {
        bench.send(&udp_out(1000 + port, 53, b"0123456789"));
    }
    let stats = bench.stats();
    assert_eq!((stats.seen, stats.counted + stats.table_full), (1_000, 1_000));
    assert!(stats.table_full > 500, "{stats:?}");
    assert_eq!(stats.table_full_bytes, 38 * stats.table_full);
    let flows = bench.flows();
    assert_eq!(flows.len() as u64, stats.counted);
    assert_eq!(flows.values().map(|state| state.tx_bytes).sum::<u64>(), stats.counted_bytes);

    // A flow with a slot goes on being counted, and what was read makes room.
    let before = bench.stats().table_full;
    for port in 0..20 {
        bench.send(&udp_out(5000 + port, 53, b"0123456789"));
    }
    assert_eq!(bench.stats().table_full, before);
}

#[test]
fn flows_that_were_read_give_up_their_slots_without_a_record() {
    // No room for any record of a flow that is handed over.
    let mut bench = Bench::with(|options| {
        options.sizes = Sizes { flows: SMALLEST, ring_bytes: 4096, ..Sizes::default() };
    });
    for port in 0..4_000 {
        bench.send(&udp_out(1000 + port, 53, b"x"));
        if port % 4 == 3 {
            assert_eq!(bench.flows().len(), usize::from(port) + 1);
        }
    }
    let stats = bench.stats();
    assert_eq!((stats.counted, stats.table_full), (4_000, 0));
}

#[test]
fn records_beyond_half_of_the_ring_are_counted_and_their_flows_are_in_the_table() {
    let mut bench = Bench::with(|options| options.sizes = Sizes { ring_bytes: 4096, ..Sizes::default() });
    for port in 0..100 {
        bench.send(&udp_out(1000 + port, 53, b""));
    }
    let opened = bench.opened().len() as u64;
    let stats = bench.stats();
    // 64 bytes and the ring's own 8 for each.
    assert_eq!((opened, stats.ring_full), (29, 71));
    assert_eq!(stats.counted, 100);
    assert_eq!(bench.flows().len(), 100);
    bench.send(&udp_out(5000, 53, b""));
    assert_eq!(bench.opened().len(), 1, "there is room again");
}

/// Makes flows look as if their last packets had come earlier: waiting would take seconds.
fn age(bench: &Bench, by_ns: u64) {
    let pins = [maps::TABLE4, maps::LIVES].map(|map| bench.pin(map));
    bench.host.run(move || {
        let [sets, lives] = pins.map(|pin| Map::Array(MapData::from_pin(pin).unwrap()));
        let mut all_sets: Array<_, Set4> = Array::try_from(sets).unwrap();
        let mut all_lives: Array<_, Lives> = Array::try_from(lives).unwrap();
        for index in 0..all_sets.len() {
            let (mut set, mut lives) = (all_sets.get(&index, 0).unwrap(), all_lives.get(&index, 0).unwrap());
            let mut used = false;
            for (slot, life) in set.slots.iter_mut().zip(&mut lives.lives) {
                if life.incarnation != 0 {
                    used = true;
                    life.first_ns -= by_ns;
                    let (ticks, counts) = ((by_ns >> TICK_SHIFT) as u32, &mut slot.counts);
                    (counts.tx_payload, counts.rx_payload) =
                        Counts::payloads(counts.tx_payload, counts.rx_payload, counts.burst_tick() - ticks);
                    counts.last_tick -= ticks;
                }
            }
            if used {
                all_sets.set(index, set, 0).unwrap();
                all_lives.set(index, lives, 0).unwrap();
            }
        }
    });
}

#[test]
fn two_seconds_of_silence_begin_a_new_burst() {
    let mut bench = Bench::new();
    let read = |bench: &mut Bench| {
        let mut deltas = Vec::new();
        bench.kernel.sweep_all(now(), &mut deltas);
        assert_eq!(deltas.len(), 1);
        deltas[0]
    };
    bench.send(&udp_out(1, 2, b"a"));
    let first = read(&mut bench);
    age(&bench, SILENCE_NS - 500_000_000);
    bench.send(&udp_out(1, 2, b"b"));
    let second = read(&mut bench);
    assert!(first.last_ns - second.first_ns < TICK_NS, "one and a half seconds are not silence");
    age(&bench, SILENCE_NS);
    bench.receive(&udp_in(2, 1, b"c"));
    let third = read(&mut bench);
    assert!(third.last_ns - third.first_ns < TICK_NS, "{third:?}");
    assert!(third.first_ns > second.last_ns);
    assert_eq!((third.moved.tx_packets, third.moved.rx_packets), (0, 1));
}

#[test]
fn counts_are_exact_while_flows_change_hands_and_are_read_at_the_same_time() {
    const FLOWS: u16 = 400;
    const PACKETS: u32 = 60_000;
    let mut bench = Bench::with(|options| {
        options.sizes = Sizes { flows: SMALLEST, ring_bytes: 1 << 24, ..Sizes::default() };
    });
    let pins = [bench.pin(programs::TC_EGRESS), bench.pin(programs::TC_INGRESS)];
    static DONE: AtomicBool = AtomicBool::new(false);
    // Two directions, each on whatever CPU its thread runs.
    let traffic = bench.host.start(move || {
        let sent: Vec<BTreeMap<u16, u64>> = std::thread::scope(|scope| {
            let threads: Vec<_> = pins
                .iter()
                .enumerate()
                .map(|(direction, pin)| {
                    scope.spawn(move || {
                        let program = SchedClassifier::from_pin(pin).unwrap();
                        let mut random = Rng::with_seed(direction as u64);
                        let mut sent = BTreeMap::new();
                        for _ in 0..PACKETS {
                            // Some flows have many packets, most have few.
                            let port = random.u16(..FLOWS).min(random.u16(..FLOWS));
                            let frame = match direction {
                                0 => udp_out(port, 53, b"abc"),
                                _ => udp_in(53, port, b"defgh"),
                            };
                            let data_in = Some(frame.as_slice());
                            program.test_run(TestRunOptions { data_in, ..Default::default() }).unwrap();
                            *sent.entry(port).or_default() += 1;
                        }
                        sent
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        DONE.store(true, Ordering::Release);
        sent
    });
    let mut reads = 0;
    while !DONE.load(Ordering::Acquire) {
        flows(&mut bench.kernel);
        reads += 1;
    }
    let sent = traffic.recv().unwrap();
    let stats = bench.stats();
    assert_eq!((stats.seen, stats.table_full), (2 * u64::from(PACKETS), 0));
    let flows = bench.flows();
    for (flow, state) in &flows {
        let port = flow.local.port();
        let [tx, rx] = [0, 1].map(|n| sent[n].get(&port).copied().unwrap_or(0));
        assert_eq!((state.tx_packets, state.tx_bytes, state.tx_payload), (tx, 31 * tx, 3 * tx), "{flow:?}");
        assert_eq!((state.rx_packets, state.rx_bytes, state.rx_payload), (rx, 33 * rx, 5 * rx), "{flow:?}");
    }
    let ports: std::collections::BTreeSet<_> = sent.iter().flat_map(BTreeMap::keys).collect();
    assert_eq!(flows.len(), ports.len());
    println!("{reads} readings during {} packets", 2 * PACKETS);
    assert!(reads > 10, "{reads}");
}

#[test]
fn a_flow_that_several_cpus_count_is_one_flow() {
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
}

#[test]
fn a_full_table_is_swept_completely() {
    let mut bench = Bench::new();
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
    let mut expected = [&maps::ALL[..], &programs::ALL[..]].concat();
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
    assert_eq!(kernel.stats().seen, 0);
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
