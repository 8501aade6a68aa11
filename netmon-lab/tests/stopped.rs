//! An agent that is held up (SIGSTOP) while packets of many flows flood its interface: every packet is counted or refused
//! and counted as that, the PC's own log has the same sums, and says that the agent was held up. Needs root.
//!
//! `cargo xtask test` runs a short form. The full form, ten seconds:
//!
//! ```text
//! cargo test --package netmon-lab --test stopped -- --ignored --nocapture --test-threads 1
//! ```

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as expected")]

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use netmon_lab::bench::pair::inside;
use netmon_lab::clock;
use netmon_lab::host::Host;
use netmon_lab::lines::{Coverage, Kind, Line};
use netmon_lab::netmon::Agent;
use netmon_lab::packet::PacketSocket;
use netmon_lab::room::Room;
use netmon_lab::wait;
use rustix::process::{Pid, Signal, kill_process};

use frames::{UDP, eth4, ipv4, udp};

#[path = "kernel/frames.rs"]
#[expect(dead_code, reason = "the kernel tests need more of it")]
mod frames;

const PATIENCE: Duration = Duration::from_secs(60);
const QUIET: Duration = Duration::from_millis(300);
/// Before the agent is held up, and after.
const AROUND: u64 = 50_000;
/// Frames of one system call.
const AT_ONCE: usize = 64;
/// Counterparts: a third each is private, muted by the filter list, and on the Internet.
const HOSTS: u32 = 48;
const PAYLOAD: usize = 18;
/// From the IP header on.
const BYTES: u64 = 20 + 8 + PAYLOAD as u64;

/// The first packet of this flow, and every other one. To a station that there is not: the bridge has it go everywhere,
/// and whoever gets it drops it behind the hooks.
fn frame(flow: u32) -> Vec<u8> {
    let number = (flow % HOSTS / 3) as u8 + 1;
    let source = match flow % 3 {
        0 => [10, 200, 0, number],
        1 => [203, 0, 113, number],
        _ => [198, 18, 0, number],
    };
    let port = 1_024 + (flow / HOSTS) as u16;
    let mut packet = ipv4(source, [10, 77, 0, 11], UDP, &[], 0, &udp(port, 9_999, &[7; PAYLOAD]));
    // A bridge whose packets netfilter sees drops what has a wrong one (RFC 1071).
    let words = packet[..20].chunks_exact(2).map(|two| u32::from(u16::from_be_bytes([two[0], two[1]])));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !((folded & 0xffff) + (folded >> 16)) as u16;
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    eth4(&packet)
}

/// Sends packets of all flows in turn until it is told to stop.
fn flood(from: &Host, flows: u32, sent: &AtomicU64, stop: &AtomicBool) {
    let index = from.run(&["cat", "/sys/class/net/lan0/ifindex"]).unwrap().trim().parse().unwrap();
    let frames: Vec<_> = (0..flows).map(frame).collect();
    let send = || {
        let socket = PacketSocket::open(index)?;
        for frames in frames.chunks(AT_ONCE).cycle() {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let frames: Vec<_> = frames.iter().map(Vec::as_slice).collect();
            match socket.send_all(&frames) {
                // A queue on the way was full: what is left of these has not arrived, which is fine.
                Err(error) if error.raw_os_error() != Some(libc::ENOBUFS) => return Err(error.into()),
                _ => {}
            }
            sent.fetch_add(frames.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    };
    inside(from, send).unwrap();
}

/// Ends the flood, also when the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Letter of a process's state (proc(5)).
fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Holds the agent up under a flood of so many flows, at least for so long, and returns the last coverage.
fn stopped(name: &str, flows: u32, length: Duration) -> Coverage {
    let room = Room::build(2).unwrap();
    let pc = room.pc(1);
    let before = pc.counters("lan0").unwrap();
    let mut agent = Agent::prepare(&room, 1).unwrap();
    agent.watch(&["lan0"]);
    agent.start_again().unwrap();
    let pid = agent.pid().unwrap();

    let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let stop = Stop(&stop);
        let (from, done) = (room.pc(2), stop.0);
        let flood = scope.spawn(|| flood(from, flows, &sent, done));
        let more = |frames: u64| {
            let until = sent.load(Ordering::Relaxed) + frames;
            let enough = || (flood.is_finished() || sent.load(Ordering::Relaxed) >= until).then_some(());
            wait::until(PATIENCE, "more packets", enough).unwrap();
        };
        more(AROUND);
        agent.pause();
        wait::until(PATIENCE, "the agent to stand still", || (state(pid) == Some('T')).then_some(()))
            .unwrap();
        let since = clock::now();
        // Every flow, and more.
        more(u64::from(flows) + AROUND);
        thread::sleep(length.saturating_sub(since.elapsed()));
        agent.resume();
        more(AROUND);
    });
    let counters = || pc.counters("lan0").unwrap();
    let after = wait::unchanged(QUIET, PATIENCE, "silence on lan0", counters).unwrap();
    agent.stop().unwrap();
    let interface = after.since(before);

    let text = fs::read_to_string(agent.log_file()).unwrap();
    let lines: Vec<_> = text.lines().map(|line| Line::parse(line).unwrap()).collect();
    let coverage = lines.iter().rev().find_map(|line| match line.kind {
        Kind::Coverage(coverage) => Some(coverage),
        _ => None,
    });
    let coverage = coverage.unwrap();
    println!(
        "{name}: {flows} flows, {} frames arrived, {} counted, {} refused and counted as such",
        interface.rx_packets, coverage.counted, coverage.table_full
    );

    // Seen is what the interface counted, and what became of it adds up.
    assert_eq!(coverage.seen, interface.rx_packets + interface.tx_packets);
    let refused = coverage.not_ip + coverage.other_protocol + coverage.malformed + coverage.table_full;
    assert_eq!(coverage.seen, coverage.counted + refused);
    assert_eq!((coverage.seen - coverage.counted, interface.tx_packets), (coverage.table_full, 0));
    assert_eq!(interface.rx_l3(), BYTES * interface.rx_packets, "only the flood was on the cable");

    // The log has every byte that was counted, once.
    let transfers = lines.iter().filter_map(|line| line.ended()).map(|(_, moved)| moved.received);
    let muted = lines.iter().filter_map(|line| match &line.kind {
        Kind::Muted(muted) => Some(muted),
        _ => None,
    });
    let (lan_and_internet, muted) = (transfers.sum::<u64>(), muted.map(|muted| muted.received).sum::<u64>());
    assert!(lan_and_internet > 0 && muted > 0, "{lan_and_internet} and {muted} bytes");
    assert_eq!(lan_and_internet + muted, BYTES * coverage.counted, "in transfers: {lan_and_internet}");

    // It says so.
    let gaps: Vec<_> = lines
        .iter()
        .filter_map(|line| match &line.kind {
            Kind::Gap(gap) => Some(gap.as_str()),
            _ => None,
        })
        .collect();
    let held_up = |gap: &&&str| gap.starts_with("the agent was held up");
    assert!(gaps.iter().any(|gap| held_up(&gap)), "{gaps:?}");
    let full = gaps.iter().filter_map(|gap| gap.strip_prefix("the kernel's flow table was full, "));
    let frames = full.map(|count| count.strip_suffix(" frames").unwrap().parse::<u64>().unwrap());
    assert_eq!(frames.sum::<u64>(), coverage.table_full, "{gaps:?}");
    coverage
}

/// More flows than the table has slots and the ring has room for.
const MANY: u32 = 240_000;
/// Few enough for the table.
const FEW: u32 = 2_000;

fn with_overflow(length: Duration) {
    let coverage = stopped("more flows than there is room for", MANY, length);
    assert!(coverage.table_full > 0, "{coverage:?}");
}

fn without_overflow(length: Duration) {
    let coverage = stopped("flows that fit", FEW, length);
    assert_eq!(coverage.table_full, 0);
}

/// The agent says that it was held up when a sweep is two seconds late.
const SHORT: Duration = Duration::from_secs(3);
const FULL: Duration = Duration::from_secs(10);

#[test]
fn a_flood_of_flows_at_an_agent_that_stands_still_is_counted_or_refused_to_the_packet() {
    with_overflow(SHORT);
}

#[test]
fn nothing_is_refused_while_the_agent_stands_still_and_the_flows_fit() {
    without_overflow(SHORT);
}

#[test]
fn an_agent_that_is_told_to_end_while_it_stands_still_says_that_it_did() {
    let room = Room::build(1).unwrap();
    let mut agent = Agent::prepare(&room, 1).unwrap();
    agent.start_again().unwrap();
    let pid = agent.pid().unwrap();
    agent.pause();
    wait::until(PATIENCE, "the agent to stand still", || (state(pid) == Some('T')).then_some(())).unwrap();
    thread::sleep(SHORT);
    // Both are waiting for the agent when it goes on: the end, and a sweep that is late.
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::TERM).unwrap();
    agent.resume();
    wait::until(PATIENCE, "the agent's end", || (!agent.is_running()).then_some(())).unwrap();
    let text = fs::read_to_string(agent.log_file()).unwrap();
    let lines: Vec<_> = text.lines().map(|line| Line::parse(line).unwrap().kind).collect();
    let held_up = |kind: &Kind| matches!(kind, Kind::Gap(gap) if gap.starts_with("the agent was held up"));
    assert!(lines.iter().any(held_up), "{text}");
}

#[test]
#[ignore = "the full form: ten seconds"]
fn ten_seconds_of_a_flood_of_flows_are_counted_or_refused_to_the_packet() {
    with_overflow(FULL);
}

#[test]
#[ignore = "the full form: ten seconds"]
fn nothing_is_refused_in_ten_seconds_when_the_flows_fit() {
    without_overflow(FULL);
}
