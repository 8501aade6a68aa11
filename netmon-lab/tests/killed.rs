//! An agent that is killed again and again under traffic, also while it starts, leaves nothing behind that its successor
//! does not clear away, and is never there twice. Needs root.
//!
//! `cargo xtask test` runs a short form. The full form, a hundred kills:
//!
//! ```text
//! cargo test --package netmon-lab --test killed -- --ignored --nocapture
//! ```

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as expected")]

use std::collections::BTreeSet;
use std::fs;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use aya::maps::MapData;
use aya::programs::tc::TcAttachType;
use aya::programs::{ProgramInfo, SchedClassifier};
use fastrand::Rng;
use netmon_common::abi::{maps, programs};
use netmon_lab::bench::pair::inside;
use netmon_lab::clock;
use netmon_lab::generator::Generator;
use netmon_lab::host::Host;
use netmon_lab::lines::Line;
use netmon_lab::netmon::Agent;
use netmon_lab::objects::{Kernel, Objects};
use netmon_lab::room::{self, Room};
use netmon_lab::wait;

const PATIENCE: Duration = Duration::from_secs(20);
/// Other tests end agents without ceremony, too, and clear away behind them.
const OTHERS: Duration = Duration::from_secs(60);
const PINS: &str = "/sys/fs/bpf/netmon";
const INTERFACES: [&str; 2] = ["lan0", "mgmt0"];

/// The programs' constants and the ring of their own words: held by the programs alone.
const UNPINNED_MAPS: usize = 2;

/// Datagrams of ever new flows, both ways, until it is told to stop.
fn traffic(from: &Host, to: &str, stop: &AtomicBool, sent: &AtomicU64) {
    let send = || {
        let mut flow = 0_u16;
        while !stop.load(Ordering::Relaxed) {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            for _ in 0..20 {
                flow = flow.wrapping_add(1);
                // Nobody listens there; who is told so goes on.
                let _ = socket.send_to(&[1; 200], (to, flow.max(1_000)));
                sent.fetch_add(1, Ordering::Relaxed);
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    };
    inside(from, send).unwrap();
}

/// The programs at an interface by their numbers, both directions, as the kernel tells.
fn attached(pc: &Host) -> Vec<(String, u64)> {
    let query = || {
        let mut found = Vec::new();
        for interface in INTERFACES {
            for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
                let (_, programs) = SchedClassifier::query_tcx(interface, direction)?;
                found.extend(programs.iter().map(|program| {
                    (program.name_as_str().unwrap_or_default().to_owned(), u64::from(program.id()))
                }));
            }
        }
        Ok(found)
    };
    inside(pc, query).unwrap()
}

/// What is pinned, by name.
fn pinned(pc: &Host) -> (BTreeSet<String>, Objects) {
    let look = || {
        let (mut names, mut objects) = (BTreeSet::new(), Objects::default());
        for entry in fs::read_dir(PINS)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if programs::ALL.contains(&name.as_str()) {
                objects.programs.insert(ProgramInfo::from_pin(&path)?.id().into());
            } else {
                objects.maps.insert(MapData::from_pin(&path)?.info()?.id().into());
            }
            names.insert(name);
        }
        Ok((names, objects))
    };
    inside(pc, look).unwrap()
}

/// Filters and qdiscs of the old kind: netmon needs none here.
fn without_filters(pc: &Host) {
    for interface in INTERFACES {
        for direction in ["ingress", "egress"] {
            let filters = pc.run(&["tc", "filter", "show", "dev", interface, direction]).unwrap();
            assert_eq!(filters, "", "{interface}");
        }
        let qdiscs = pc.run(&["tc", "qdisc", "show", "dev", interface]).unwrap();
        assert!(!qdiscs.contains("clsact"), "{interface}: {qdiscs}");
    }
}

/// Everything that was loaded by an agent of this test so far.
#[derive(Default)]
struct History {
    /// What netmon had in the kernel before, whoever loaded it.
    before: Objects,
    /// What agents had that are dead by now.
    dead: Objects,
    /// The agent that runs.
    living: Objects,
}

impl History {
    /// There is one agent, it has everything once, and there is nothing of those before it.
    fn one_agent(&mut self, pc: &Host, agent: &Agent<'_>) {
        let pid = agent.pid().unwrap();
        let kernel = Kernel::look().unwrap();
        let living = kernel.held_by(pid);
        let maps = maps::ALL.len() + UNPINNED_MAPS;
        assert_eq!((living.programs.len(), living.maps.len()), (programs::ALL.len(), maps), "{living:?}");
        self.dead.extend(std::mem::replace(&mut self.living, living));

        let (names, objects) = pinned(pc);
        let expected: BTreeSet<_> =
            programs::ALL.iter().chain(&maps::ALL).map(|name| (*name).to_owned()).collect();
        assert_eq!(names, expected);
        assert_eq!(objects, self.living.common(&kernel.netmon), "a pin of an agent that is dead");
        without_filters(pc);

        // What a dead agent had goes when the kernel has cleaned up after it.
        let in_order = || {
            let expected =
                [programs::TC_INGRESS, programs::TC_EGRESS, programs::TC_INGRESS, programs::TC_EGRESS];
            let attached = attached(pc);
            let names: Vec<_> = attached.iter().map(|(name, _)| name.as_str()).collect();
            let numbers: BTreeSet<_> = attached.iter().map(|(_, number)| *number).collect();
            if names != expected || !numbers.is_subset(&self.living.programs) {
                return Err(format!("attached: {attached:?}"));
            }
            let kernel = Kernel::look().unwrap();
            let links: Vec<_> =
                kernel.links.values().filter(|program| self.living.programs.contains(program)).collect();
            if links.len() != expected.len() {
                return Err(format!("links: {:?}", kernel.links));
            }
            self.is_alone(&kernel)
        };
        eventually(OTHERS, in_order);
    }

    /// Nothing of dead agents is there, and nothing that nobody knows.
    fn is_alone(&self, kernel: &Kernel) -> Result<(), String> {
        let left = kernel.all.common(&self.dead);
        if !left.is_empty() {
            return Err(format!("of dead agents: {left:?}"));
        }
        // Also of agents that were killed before anybody could look at them.
        let orphans = kernel.orphans().unwrap().without(&self.before);
        if orphans.is_empty() { Ok(()) } else { Err(format!("nobody's: {orphans:?}")) }
    }

    /// No agent is there, and nothing of any.
    fn no_agent(&mut self, pc: &Host) {
        self.dead.extend(std::mem::take(&mut self.living));
        pc.run(&["test", "!", "-e", PINS]).unwrap();
        without_filters(pc);
        eventually(OTHERS, || {
            let attached = attached(pc);
            if !attached.is_empty() {
                return Err(format!("attached: {attached:?}"));
            }
            self.is_alone(&Kernel::look().unwrap())
        });
    }
}

/// Asks until the answer is `Ok`; fails with the last `Err`.
fn eventually(limit: Duration, mut ask: impl FnMut() -> Result<(), String>) {
    let mut last = String::new();
    let done = wait::until(limit, "good order", || ask().map_err(|why| last = why).ok());
    assert!(done.is_ok(), "{last}");
}

/// Datagrams both ways; the agent records them to the byte, and once.
fn is_counted_once(room: &Room, agent: &Agent<'_>) {
    const DATAGRAMS: u64 = 200;
    /// Not one of the traffic.
    const PORT: u16 = 900;
    let own = agent.follow();
    let before = room.pc(1).counters("lan0").unwrap();
    for (from, to) in [(1, 2), (2, 1)] {
        let address = format!("{}:{PORT}", room::lan(to));
        let sink =
            Generator::serve(room.pc(to), &format!("udp-serve --listen {address} --count {DATAGRAMS}"));
        let send = format!("udp-send --to {address} --count {DATAGRAMS} --size 500 --rate 1000");
        Generator::run(room.pc(from), &send).unwrap();
        sink.unwrap().report().unwrap();
    }
    let service = format!("udp/{PORT}");
    let (moved, _) = own
        .find(PATIENCE, "the end of the datagrams", |line| {
            let ended = line.ended().filter(|(transfer, _)| transfer.services.contains(&service));
            ended.map(|(_, moved)| moved)
        })
        .unwrap();
    let counted = room.pc(1).counters("lan0").unwrap().since(before);
    assert_eq!((moved.sent, moved.received), (counted.tx_l3(), counted.rx_l3()));
}

fn killed(times: u32) {
    let room = Room::build(2).unwrap();
    let pc = room.pc(1);
    let mut history = History { before: Kernel::look().unwrap().netmon, ..History::default() };
    let mut agent = Agent::prepare(&room, 1).unwrap();
    let asked = clock::now();
    agent.start_again().unwrap();
    let start = asked.elapsed();
    history.one_agent(pc, &agent);
    agent.kill().unwrap();
    // Its pins keep what it had, and this test notices what nobody has any more.
    eventually(PATIENCE, || {
        let kernel = Kernel::look().unwrap();
        let missed = history.living.common(&kernel.netmon).without(&kernel.orphans().unwrap());
        if missed.is_empty() { Ok(()) } else { Err(format!("still somebody's: {missed:?}")) }
    });

    let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut random = Rng::with_seed(0x6e65_746d_6f6e);
    let (mut starting, mut watching) = (0, 1);
    thread::scope(|scope| {
        let stop = Stop(&stop);
        for (from, to) in [(1, 2), (2, 1)] {
            let (room, stop, sent) = (&room, stop.0, &sent);
            scope.spawn(move || traffic(room.pc(from), &room::lan(to), stop, sent));
        }
        for kill in 2..=times {
            if kill % 2 == 0 {
                let daemon = agent.launch().unwrap();
                thread::sleep(start.mul_f64(random.f64()));
                // A daemon that is dropped is killed.
                drop(daemon);
                starting += 1;
            } else {
                agent.start_again().unwrap();
                history.one_agent(pc, &agent);
                thread::sleep(Duration::from_millis(random.u64(..400)));
                agent.kill().unwrap();
                watching += 1;
            }
        }
        agent.start_again().unwrap();
        history.one_agent(pc, &agent);
    });
    // The first burst that an agent sees the end of: what follows is another transfer.
    let end = |line: &Line| line.ended().map(drop);
    agent.follow().find(PATIENCE, "the traffic's end", end).unwrap();
    is_counted_once(&room, &agent);
    agent.stop().unwrap();
    history.no_agent(pc);
    let sent = sent.into_inner();
    println!(
        "killed {} times, {watching} while it watched and {starting} while it started (which takes {start:?}), under \
         {sent} datagrams: nothing twice, nothing left; {} programs and {} maps were seen to come and go",
        starting + watching,
        history.dead.programs.len(),
        history.dead.maps.len()
    );
    assert!(sent > u64::from(times), "there was no traffic");
}

/// Ends the traffic, also when the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn an_agent_that_is_killed_at_any_moment_leaves_nothing_and_is_never_there_twice() {
    killed(10);
}

#[test]
#[ignore = "the full form: a hundred kills"]
fn an_agent_that_is_killed_a_hundred_times_leaves_nothing_and_is_never_there_twice() {
    killed(100);
}
