//! A million flows at once: every packet is in a flow or counted as refused, and memory has a bound. Needs root.
//!
//! `cargo xtask test` runs a short form with 131,072 flows. The full form has 1,048,576, and its times mean something in a
//! release build only:
//!
//! ```text
//! cargo test --release --package netmon-lab --test million -- --ignored --nocapture --test-threads 1
//! ```
//!
//! (The agent is that of the same build: `cargo build --release --workspace --bins` comes first.)

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as expected")]

use std::process;
use std::time::Duration;

use anyhow::Result;
use netmon_agent::clock::Now;
use netmon_agent::kernel::{Mode, Sizes};
use netmon_lab::bench::frames::{Family, Shape};
use netmon_lab::bench::monitor::Monitor;
use netmon_lab::bench::order::Order;
use netmon_lab::bench::pair::{Pair, inside};
use netmon_lab::bench::process::resident;
use netmon_lab::bench::source::{Source, Until, idle, index_of};
use netmon_lab::bench::subject::Netmon;
use netmon_lab::clock;
use netmon_lab::wait;

const IPV4: Shape = Shape::SMALL;
const IPV6: Shape = Shape { family: Family::V6, ..Shape::SMALL };
/// How many flows there are.
const SHORT: u32 = 1 << 17;
const FULL: u32 = 1 << 20;
/// Packets of each flow, one in each round.
const ROUNDS: u64 = 4;
/// Packets after which the ring is emptied: each may take its slot from a flow that was not read, and the ring holds
/// 29,000 of these.
const PORTION: u64 = 1 << 14;
/// Packets per second: slow enough for the cable, which drops what is not fetched in time.
const RATE: u64 = 200_000;
const MIB: f64 = (1 << 20) as f64;

fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB
}

/// Slots for so many flows: two for each on the one CPU that sees them all, and as many on the others.
fn sized(flows: u32) -> Sizes {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from) as u32;
    Sizes { flows: 2 * flows * cpus, ..Sizes::default() }
}

/// Sends one packet of every flow, round after round, no faster than the ring is emptied: each flow has as many packets
/// in the end as there were rounds, and nothing is refused.
fn every_flow_is_exact(name: &str, shape: Shape, flows: u32, sizes: Sizes) {
    let pair = Pair::build().unwrap();
    let ifindex = index_of(pair.receiver()).unwrap();
    let measure = || -> Result<()> {
        let mut source = Source::load(&pair)?;
        source.prepare(shape, Order::Sequential, flows)?;
        let without = resident(process::id())?.process;
        let mut netmon = Netmon::load("million", Mode::Tc, sizes, ifindex)?;
        netmon.kernel.attach(ifindex)?;
        let before = pair.arrived()?;
        let asked = clock::now();
        for round in 1..=ROUNDS {
            for _ in 0..u64::from(flows) / PORTION {
                let sent = source.send(Until::Frames(PORTION), Some(RATE), |wait| {
                    if round < ROUNDS {
                        return netmon.tend(wait);
                    }
                    // The last round's counts wait for the sweep that is measured.
                    idle(wait)
                })?;
                assert_eq!(sent.frames, PORTION);
                netmon.readings.drain(&mut netmon.kernel);
            }
        }
        let took = asked.elapsed();
        let arrived = pair.arrived()? - before;

        let mut deltas = Vec::new();
        let (moved, quiet) = (sweep(&mut netmon, &mut deltas), sweep(&mut netmon, &mut Vec::new()));
        let swept = deltas.len();
        netmon.readings.add(deltas);

        let stats = netmon.kernel.stats();
        let offered = ROUNDS * u64::from(flows);
        assert_eq!(arrived, offered, "{name}: the cable lost packets");
        assert_eq!((stats.seen, stats.counted, stats.table_full), (offered, offered, 0), "{name}");
        assert_eq!(stats.counted_bytes, offered * shape.l3_bytes());
        assert_eq!(netmon.readings.flows.len(), flows as usize, "{name}");
        for flow in 0..flows {
            let read = netmon.readings.flows.get(&shape.flow(flow)).copied().unwrap_or_default();
            let counts = (read.tx_packets, read.rx_packets, read.rx_bytes);
            assert_eq!(counts, (0, ROUNDS, ROUNDS * shape.l3_bytes()), "{name}: flow {flow}");
        }

        // What remains is what the agent has, too: the tables in its address space, and what it remembers of them.
        netmon.readings.flows = Default::default();
        let (kernel, maps) = netmon.memory()?;
        let agent = resident(process::id())?;
        let largest: Vec<_> =
            maps.iter().take(3).map(|(map, bytes)| format!("{map} {:.1}", mib(*bytes))).collect();
        println!(
            "{name}: {flows} flows, {ROUNDS} packets each, {arrived} arrived at {:.0} a second, all counted, none \
             refused; a sweep of everything with {swept} readings takes {:.1} ms, with none {:.1} ms; the maps have {:.1} \
             MiB in the kernel ({}), reading them takes {:.1} MiB more",
            arrived as f64 / took.as_secs_f64(),
            moved.as_secs_f64() * 1e3,
            quiet.as_secs_f64() * 1e3,
            mib(kernel),
            largest.join(", "),
            mib(agent.process.saturating_sub(without))
        );
        // A slot takes 96 bytes in the IPv4 table and 128 in the other; tries, ring and the maps for people have their own
        // limits.
        const OTHERS: u64 = 32 << 20;
        assert!(kernel <= (96 + 128) * u64::from(sizes.flows) + OTHERS, "{name}: {kernel} bytes");
        Ok(())
    };
    inside(pair.receiver(), measure).unwrap();
}

/// How long a sweep of everything takes.
fn sweep(netmon: &mut Netmon, deltas: &mut Vec<netmon_agent::kernel::FlowDelta>) -> Duration {
    let asked = clock::now();
    netmon.kernel.sweep_all(Now::read().boot_ns, deltas);
    asked.elapsed()
}

/// As fast as it can be sent, past tables that are far too small.
fn everything_is_counted_or_refused(flows: u32) {
    let pair = Pair::build().unwrap();
    let ifindex = index_of(pair.receiver()).unwrap();
    let measure = || -> Result<()> {
        let mut source = Source::load(&pair)?;
        source.prepare(IPV4, Order::Random, flows)?;
        let mut netmon = Netmon::load("million", Mode::Tc, Sizes::default(), ifindex)?;
        netmon.kernel.attach(ifindex)?;
        let before = pair.arrived()?;
        let until = Until::Frames(ROUNDS * u64::from(flows));
        let sent = source.send(until, None, |wait| netmon.tend(wait))?;
        let arrived = pair.arrived()? - before;
        netmon.readings.sweep_all(&mut netmon.kernel);
        let stats = netmon.kernel.stats();
        assert_eq!(stats.seen, arrived);
        assert_eq!(stats.seen, stats.counted + stats.table_full, "{stats:?}");
        let read = netmon.readings.flows.values();
        let sum = read.fold((0, 0), |sum, flow| (sum.0 + flow.rx_packets, sum.1 + flow.rx_bytes));
        assert_eq!(sum, (stats.counted, stats.counted_bytes));
        println!(
            "default tables at full speed: {} of {} packets of {flows} flows arrived at {:.0} a second, {} counted and \
             read, {} refused and counted as such",
            arrived,
            sent.frames,
            arrived as f64 / sent.took.as_secs_f64(),
            stats.counted,
            stats.table_full
        );
        Ok(())
    };
    inside(pair.receiver(), measure).unwrap();
}

/// The real agent, with nothing but defaults.
fn the_agent_stays_within_its_memory(flows: u32, rate: u64) {
    /// Flows and bursts that it remembers have limits; this is what they come to, and more.
    const BOUND: u64 = 256 << 20;
    let pair = Pair::build().unwrap();
    let mut source = Source::load(&pair).unwrap();
    source.prepare(IPV4, Order::Sequential, flows).unwrap();
    let running = Monitor::Netmon.start(&pair).unwrap();
    let pid = running.pid().unwrap();
    let before = pair.arrived().unwrap();
    let mut highest = resident(pid).unwrap();
    let idle_memory = highest;
    let until = Until::Frames(ROUNDS * u64::from(flows));
    let look = |wait| {
        let now = resident(pid)?;
        highest.process = highest.process.max(now.process);
        highest.maps = highest.maps.max(now.maps);
        idle(wait)
    };
    let sent = source.send(until, Some(rate), look).unwrap();
    let arrived = pair.arrived().unwrap() - before;
    let number = |name: &str| running.status().and_then(|status| status["coverage"][name].as_u64());
    let sums = wait::until(Duration::from_secs(60), "all packets in the agent's status", || {
        let seen = number("seen").filter(|seen| *seen == arrived)?;
        Some((seen, number("counted")?, number("table_full")?))
    });
    let (seen, counted, refused) = sums.unwrap();
    assert_eq!(running.stop().unwrap(), Some(counted));
    println!(
        "agent: {} packets of {flows} flows at {:.0} a second, {counted} counted, {refused} refused and counted as such; \
         it has {:.1} MiB before and {:.1} MiB at most, and of the maps {:.1} MiB and {:.1} MiB",
        arrived,
        arrived as f64 / sent.took.as_secs_f64(),
        mib(idle_memory.process),
        mib(highest.process),
        mib(idle_memory.maps),
        mib(highest.maps)
    );
    assert_eq!(seen, counted + refused);
    assert!(highest.process < BOUND, "{highest:?}");
}

#[test]
fn more_flows_than_the_tables_hold_have_exact_counts() {
    every_flow_is_exact("default tables", IPV4, SHORT, Sizes::default());
}

#[test]
fn as_many_flows_as_the_tables_are_sized_for_have_exact_counts() {
    every_flow_is_exact("sized tables", IPV4, SHORT, sized(SHORT));
}

#[test]
fn at_full_speed_every_packet_of_many_flows_is_counted_or_refused() {
    everything_is_counted_or_refused(SHORT);
}

#[test]
fn the_agent_that_sees_many_flows_has_a_bound_of_memory() {
    the_agent_stays_within_its_memory(SHORT, 100_000);
}

mod full {
    use super::*;

    #[test]
    #[ignore = "the full form: a million flows"]
    fn a_million_flows_past_default_tables_have_exact_counts() {
        every_flow_is_exact("default tables", IPV4, FULL, Sizes::default());
    }

    #[test]
    #[ignore = "the full form: a million flows"]
    fn a_million_flows_in_sized_tables_have_exact_counts() {
        every_flow_is_exact("sized tables", IPV4, FULL, sized(FULL));
    }

    #[test]
    #[ignore = "the full form: a million flows"]
    fn a_million_ipv6_flows_in_sized_tables_have_exact_counts() {
        every_flow_is_exact("sized tables, IPv6", IPV6, FULL, sized(FULL));
    }

    #[test]
    #[ignore = "the full form: a million flows"]
    fn at_full_speed_every_packet_of_a_million_flows_is_counted_or_refused() {
        everything_is_counted_or_refused(FULL);
    }

    #[test]
    #[ignore = "the full form: a million flows"]
    fn the_agent_that_sees_a_million_flows_has_a_bound_of_memory() {
        the_agent_stays_within_its_memory(FULL, 100_000);
    }
}
