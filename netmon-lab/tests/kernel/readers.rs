//! The programs have two readers: one for plain packets, straight from memory, and a general one. Both must see the same in
//! the same packet. A VLAN tag is all that it takes to send a packet to the general reader, so random frames are counted
//! with and without one.

use std::collections::BTreeSet;

use fastrand::Rng;
use netmon_agent::kernel::{FlowId, Sizes};
use netmon_common::abi::{FlowState, HINT_FRAGMENTS, HINT_QUIC, Stats, programs};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::{
    frames::*,
    rig::{Bench, ENTRIES},
};

/// Frames for each program, with and without a tag.
const FRAMES: usize = 2_000;
/// After so many, flow is compared with flow.
const BATCH: usize = 250;
/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;
/// Bytes of a VLAN tag.
const TAG: u64 = 4;

/// Another one in every run, unless it is asked for: `NETMON_SEED=… cargo test …`.
fn seed() -> u64 {
    match std::env::var("NETMON_SEED") {
        Ok(seed) => seed.parse().expect("NETMON_SEED is a number"),
        Err(_) => fastrand::u64(..),
    }
}

fn bytes(random: &mut Rng, count: usize) -> Vec<u8> {
    (0..count).map(|_| random.u8(..)).collect()
}

fn one_in(random: &mut Rng, count: usize) -> bool {
    random.usize(..count) == 0
}

fn of<T: Copy>(random: &mut Rng, choice: &[T]) -> T {
    choice[random.usize(..choice.len())]
}

/// Few enough that flows have several packets.
fn port(random: &mut Rng) -> u16 {
    of(random, &[0, 53, 443, 1000, 50_000, 65_535])
}

fn payload(random: &mut Rng) -> Vec<u8> {
    let length = of(random, &[0, 0, 1, 4, 5, 6, 20, 200]);
    let mut payload = bytes(random, length);
    if length >= 5 && one_in(random, 2) {
        // The beginning of a QUIC packet, or nearly so.
        payload[..5].copy_from_slice(&[0xc0 | random.u8(..), 0, 0, 0, of(random, &[0, 1, 2])]);
    }
    payload
}

/// What follows the IP header (and IPv6's extension headers), and its protocol number.
fn transport(random: &mut Rng) -> (u8, Vec<u8>) {
    let (source, destination, payload) = (port(random), port(random), payload(random));
    match random.usize(..8) {
        0..3 => (UDP, udp(source, destination, &payload)),
        3..7 => {
            let options = of(random, &[0, 0, 4, 12, 40]);
            let (flags, options) = (random.u8(..), bytes(random, options));
            (TCP, tcp(source, destination, flags, &options, &payload))
        }
        _ => {
            let any = random.u8(..);
            (of(random, &[ICMP, ICMP6, 47, 50, 59, 132, any]), payload)
        }
    }
}

fn packet4(random: &mut Rng) -> Vec<u8> {
    let (protocol, rest) = transport(random);
    let options = if one_in(random, 6) { of(random, &[4, 8, 40]) } else { 0 };
    let options = bytes(random, options);
    let any = random.u16(..);
    let fragment = match random.usize(..8) {
        0 => of(random, &[0x2000, 0x2001, 0x0001, 0x00b9, 0x8000, any]),
        1 => 0x4000,
        _ => 0,
    };
    let addresses = [HERE4, THERE4, [224, 0, 0, 251], [10, 0, 0, 9]];
    let mut packet =
        ipv4(of(random, &addresses), of(random, &addresses), protocol, &options, fragment, &rest);
    packet[5] = of(random, &[1, 2, 3]);
    packet
}

fn packet6(random: &mut Rng) -> Vec<u8> {
    let (mut next, mut rest) = transport(random);
    while one_in(random, 5) {
        let (header, length) = match of(random, &[0, 43, 44, 51, 60, 135]) {
            44 => {
                let offset = of(random, &[0, 1, 8, 0x05a9]);
                (44, cat(&[&[next, 0], &u16::to_be_bytes(offset), &[0, 0, 0, of(random, &[1, 2])]]))
            }
            51 => (51, cat(&[&[next, 4], &bytes(random, 22)])),
            header => (header, cat(&[&[next, 1], &bytes(random, 14)])),
        };
        (next, rest) = (header, cat(&[&length, &rest]));
    }
    let mut group = HERE6;
    group[0] = 0xff;
    let addresses = [HERE6, THERE6, group];
    ipv6(of(random, &addresses), of(random, &addresses), next, &rest)
}

/// Cuts it off, pads it, or damages it: one of its lengths, or any bytes of its headers.
fn damage(random: &mut Rng, frame: &mut Vec<u8>, is_ipv4: bool) {
    match random.usize(..8) {
        0 => frame.truncate(ETHERNET + random.usize(..frame.len() - ETHERNET)),
        1 => {
            let length = random.usize(..50);
            frame.extend(bytes(random, length));
        }
        2 => {
            let at = ETHERNET + if is_ipv4 { 2 } else { 4 };
            let any = random.u16(..);
            let length = of(random, &[0, 1, 8, 19, 20, 27, 28, 39, 40, 48, 60, 0xffff, any]);
            frame[at..at + 2].copy_from_slice(&length.to_be_bytes());
        }
        3 => {
            for _ in 0..=random.usize(..3) {
                let end = frame.len().min(ETHERNET + 80);
                let at = ETHERNET + random.usize(..end - ETHERNET);
                frame[at] = random.u8(..);
            }
        }
        4 => {
            // The TCP header's length, where there are neither options nor extension headers.
            let at = ETHERNET + if is_ipv4 { 32 } else { 52 };
            if let Some(byte) = frame.get_mut(at) {
                *byte = random.u8(..);
            }
        }
        5 => frame[ETHERNET] = of(random, &[0x40, 0x44, 0x45, 0x46, 0x4f, 0x55, 0x60, 0x65, 0]),
        _ => {}
    }
}

fn frame(random: &mut Rng) -> Vec<u8> {
    let is_ipv4 = one_in(random, 2);
    let mut frame = match (random.usize(..30), is_ipv4) {
        (0, _) => ethernet(of(random, &[0x0806, 0x88cc, 0x8864, 0x0040]), &bytes(random, 60)),
        (1, true) => ethernet(0x86dd, &packet4(random)),
        (1, false) => ethernet(0x0800, &packet6(random)),
        (_, true) => eth4(&packet4(random)),
        (_, false) => eth6(&packet6(random)),
    };
    if one_in(random, 8) {
        frame = broadcast_frame(&frame);
    }
    damage(random, &mut frame, is_ipv4);
    frame
}

/// Does `BPF_PROG_TEST_RUN` take it? Of an skb it wants the whole IP header that the type announces.
fn can_run(program: &str, frame: &[u8]) -> bool {
    let header = match frame[12..14] {
        _ if program == programs::XDP_INGRESS => 0,
        [0x08, 0x00] => 20,
        [0x86, 0xdd] => 40,
        _ => 1,
    };
    frame.len() >= ETHERNET + header
}

/// A bench whose programs run on one CPU: which one a flow's packets come on decides what its first packet was.
fn bench(cpu: usize) -> Bench {
    // Room for every flow: one that is handed over begins anew.
    let bench = Bench::with(|options| options.sizes = Sizes { flows: 1 << 18, ..Sizes::default() });
    bench.host.run(move || {
        let mut one = CpuSet::new();
        one.set(cpu);
        sched_setaffinity(None, &one).unwrap();
    });
    bench
}

/// What has come between two readings.
fn between(before: Stats, after: Stats) -> Stats {
    Stats {
        seen: after.seen - before.seen,
        counted: after.counted - before.counted,
        counted_bytes: after.counted_bytes - before.counted_bytes,
        not_ip: after.not_ip - before.not_ip,
        not_ip_bytes: after.not_ip_bytes - before.not_ip_bytes,
        other_protocol: after.other_protocol - before.other_protocol,
        other_protocol_bytes: after.other_protocol_bytes - before.other_protocol_bytes,
        malformed: after.malformed - before.malformed,
        malformed_bytes: after.malformed_bytes - before.malformed_bytes,
        table_full: after.table_full - before.table_full,
        table_full_bytes: after.table_full_bytes - before.table_full_bytes,
        ring_full: after.ring_full - before.ring_full,
    }
}

/// All that does not depend on when it was.
fn flows(bench: &mut Bench) -> Vec<(FlowId, FlowState)> {
    let flows = bench.flows().into_iter();
    flows.map(|(flow, state)| (flow, FlowState { first_ns: 0, last_ns: 0, ..state })).collect()
}

#[test]
fn both_readers_see_the_same_in_random_frames() {
    let seed = seed();
    println!("NETMON_SEED={seed}");
    let mut random = Rng::with_seed(seed);
    let cpus = sched_getaffinity(None).unwrap();
    let cpu = (0..CpuSet::MAX_CPU).find(|cpu| cpus.is_set(*cpu)).unwrap();
    let mut seen = Stats::default();
    let mut hints = 0;
    let mut protocols = BTreeSet::new();
    for (program, _, go_on) in ENTRIES {
        let (mut plain, mut general) = (bench(cpu), bench(cpu));
        let mut frames = Vec::new();
        for number in 1..=FRAMES {
            let mut frame = frame(&mut random);
            while !can_run(program, &frame) {
                frame = self::frame(&mut random);
            }
            let name = format!("NETMON_SEED={seed}: frame {number} at {program}: {frame:02x?}");
            let before = (plain.stats(), general.stats());
            assert_eq!(plain.run(program, &frame), go_on, "{name}");
            assert_eq!(general.run(program, &tagged(0x8100, &frame)), go_on, "{name}");
            let (mut expected, found) =
                (between(before.0, plain.stats()), between(before.1, general.stats()));
            assert_eq!(expected.seen, 1, "{name}");
            // These two are of whole frames.
            expected.not_ip_bytes += TAG * expected.not_ip;
            expected.malformed_bytes += TAG * expected.malformed;
            assert_eq!(found, expected, "{name}");

            frames.push(frame);
            if number % BATCH == 0 {
                let (here, there) = (flows(&mut plain), flows(&mut general));
                for (here, there) in here.iter().zip(&there) {
                    assert_eq!(here, there, "NETMON_SEED={seed}: {program}, one of the frames {frames:02x?}");
                    hints |= here.1.hints;
                    protocols.insert((here.0.local.is_ipv4(), here.0.protocol));
                }
                assert_eq!(here.len(), there.len(), "NETMON_SEED={seed}: {program}");
                frames.clear();
            }
        }
        let stats = plain.stats();
        assert_eq!((stats.table_full, stats.ring_full), (0, 0), "no flow is left out");
        seen.counted += stats.counted;
        seen.malformed += stats.malformed;
        seen.other_protocol += stats.other_protocol;
        seen.not_ip += stats.not_ip;
    }
    // It was a mixture of everything.
    let all = (3 * FRAMES) as u64;
    assert!(seen.counted > all / 4 && seen.malformed > all / 50, "{seen:?}");
    assert!(seen.other_protocol > all / 100 && seen.not_ip > all / 100, "{seen:?}");
    assert_eq!(hints, HINT_FRAGMENTS | HINT_QUIC);
    assert_eq!(protocols.len(), 4, "{protocols:?}");
    println!("{seen:?}");
}
