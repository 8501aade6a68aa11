//! Others who hang on the same interface: netmon takes nothing from them, and leaves nothing behind.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as expected")]

use std::fs::File;
use std::os::fd::AsFd as _;
use std::thread;
use std::time::Duration;

use aya::programs::SchedClassifier;
use aya::programs::tc::TcAttachType;
use netmon_common::abi::programs;
use netmon_lab::generator::Generator;
use netmon_lab::host::{Counters, Host};
use netmon_lab::netmon::{Agent, Server};
use netmon_lab::room::{self, Room};
use netmon_lab::wait;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(20);
const PINS: &str = "/sys/fs/bpf/netmon";

/// A filter of somebody else, on both directions of `lan0`: takes every packet, mirrors it to `tap`, counts it, and
/// goes on to the next filter.
struct Foreign<'a> {
    pc: &'a Host,
    preference: u64,
    before: Counters,
}

impl<'a> Foreign<'a> {
    fn attach(pc: &'a Host, classifier: &str, preference: u64) -> Self {
        for direction in ["ingress", "egress"] {
            let mirror = Self::mirror(direction);
            let filter = format!(
                "tc filter add dev lan0 {direction} protocol all pref {preference} \
                 {classifier} action mirred egress mirror dev {mirror} continue"
            );
            let words: Vec<_> = filter.split_whitespace().map(|word| word.replace('~', " ")).collect();
            pc.run(&words.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
        }
        Self { pc, preference, before: pc.counters("lan0").unwrap() }
    }

    /// Where the filter mirrors to. It tells the directions apart: tc shows u32 filters of both under each.
    fn mirror(direction: &str) -> &'static str {
        if direction == "ingress" { "tap" } else { "drain" }
    }

    /// Packets that the filter's action counted.
    fn seen(&self, direction: &str) -> u64 {
        let text = self.pc.run(&["tc", "-s", "-j", "filter", "show", "dev", "lan0", direction]).unwrap();
        let filters: Vec<Value> = serde_json::from_str(&text).unwrap();
        let own = filters.iter().filter(|filter| filter["pref"] == self.preference);
        let actions = own.map(|filter| &filter["options"]["actions"][0]);
        let counts: Vec<_> = actions
            .filter(|action| action["to_dev"] == Self::mirror(direction))
            .filter_map(|action| action["stats"]["packets"].as_u64())
            .collect();
        assert_eq!(counts.len(), 1, "{text}");
        counts[0]
    }

    /// It counted whatever the interface counted.
    fn assert_saw_everything(&self, at_least: u64) {
        let expected = || {
            let counted = self.pc.counters("lan0").unwrap().since(self.before);
            (counted.rx_packets, counted.tx_packets)
        };
        let seen = || (self.seen("ingress"), self.seen("egress"));
        // The two are not read at the same moment.
        let equal = wait::until(PATIENCE, "equal counts", || (seen() == expected()).then_some(()));
        assert!(equal.is_ok(), "filter {}: {:?}, lan0: {:?}", self.preference, seen(), expected());
        assert!(seen().1 >= at_least, "there was no traffic: {:?}", seen());
    }
}

const DATAGRAMS: u64 = 200;

/// Datagrams in both directions; they are never segmented or merged, so everybody counts the same packets. The agent
/// of pc-1 records them to the byte.
fn exchange(room: &Room, agent: &Agent<'_>, port: u16) {
    let own = agent.follow();
    let before = room.pc(1).counters("lan0").unwrap();
    for (from, to) in [(1, 2), (2, 1)] {
        let to_address = format!("{}:{port}", room::lan(to));
        let serve = format!("udp-serve --listen {to_address} --count {DATAGRAMS}");
        let sink = Generator::serve(room.pc(to), &serve).unwrap();
        let send = format!("udp-send --to {to_address} --count {DATAGRAMS} --size 500 --rate 1000");
        Generator::run(room.pc(from), &send).unwrap();
        sink.report().unwrap();
    }
    let service = format!("udp/{port}");
    let (moved, _) = own
        .find(PATIENCE, &format!("the end of {service}"), |line| {
            let ended = line.ended().filter(|(transfer, _)| transfer.services.contains(&service));
            ended.map(|(_, moved)| moved)
        })
        .unwrap();
    let counted = room.pc(1).counters("lan0").unwrap().since(before);
    assert_eq!((moved.sent, moved.received), (counted.tx_l3(), counted.rx_l3()));
}

/// The programs on both sides of `lan0`, in the order in which they run, as the kernel tells.
fn attached(pc: &Host) -> [Vec<String>; 2] {
    let namespace = File::open(format!("/proc/{}/ns/net", pc.holder_pid())).unwrap();
    // A thread can be in another network namespace than its process.
    let query = move || {
        let kind = Some(LinkNameSpaceType::Network);
        move_into_link_name_space(namespace.as_fd(), kind).unwrap();
        [TcAttachType::Ingress, TcAttachType::Egress].map(|direction| {
            let (_, programs) = SchedClassifier::query_tcx("lan0", direction).unwrap();
            programs.iter().map(|program| program.name_as_str().unwrap().to_owned()).collect()
        })
    };
    thread::spawn(query).join().unwrap()
}

#[test]
fn u32_filters_see_every_packet_and_netmon_is_there_once_or_not_at_all() {
    live_together("u32 match u32 0 0");
}

#[test]
fn bpf_filters_see_every_packet_and_netmon_is_there_once_or_not_at_all() {
    // One instruction: return all ones, which takes every packet.
    live_together("bpf bytecode 1,6~0~0~4294967295");
}

/// `classifier` takes every packet, in tc's words; a `~` is a blank inside a word.
fn live_together(classifier: &str) {
    let once = [programs::TC_INGRESS, programs::TC_EGRESS].map(|name| vec![name.to_owned()]);
    let never = [const { Vec::<String>::new() }; 2];
    let room = Room::build(2).unwrap();
    let server = Server::start(&room).unwrap();
    let pc = room.pc(1);
    for command in [
        "ip link add tap type veth peer name drain",
        "ip link set tap up",
        "ip link set drain up",
        "tc qdisc add dev lan0 clsact",
    ] {
        pc.run(&command.split_whitespace().collect::<Vec<_>>()).unwrap();
    }

    let first = Foreign::attach(pc, classifier, 10);
    assert_eq!(attached(pc), never);
    let mut agent = Agent::start(&room, 1, &server).unwrap();
    assert_eq!(attached(pc), once);
    let second = Foreign::attach(pc, classifier, 20);
    exchange(&room, &agent, 9000);
    first.assert_saw_everything(DATAGRAMS);
    second.assert_saw_everything(DATAGRAMS);

    agent.kill().unwrap();
    agent.start_again().unwrap();
    // The dead agent's links go when the kernel has cleaned up after it; the new one's are there already.
    let one = wait::until(PATIENCE, "one program a hook", || (attached(pc) == once).then_some(()));
    assert!(one.is_ok(), "{:?}", attached(pc));
    exchange(&room, &agent, 9001);
    first.assert_saw_everything(2 * DATAGRAMS);
    second.assert_saw_everything(2 * DATAGRAMS);

    pc.run(&["test", "-d", PINS]).unwrap();
    agent.stop().unwrap();
    assert_eq!(attached(pc), never);
    pc.run(&["test", "!", "-e", PINS]).unwrap();
    // The others' filters, and the qdisc that they hang on, are as they were.
    let before = first.seen("egress");
    let to = format!("{}:9002", room::lan(2));
    let sink = Generator::serve(room.pc(2), &format!("udp-serve --listen {to} --count 5")).unwrap();
    Generator::run(pc, &format!("udp-send --to {to} --count 5")).unwrap();
    sink.report().unwrap();
    first.assert_saw_everything(before + 5);
    second.assert_saw_everything(2 * DATAGRAMS + 5);
}
