//! LAN transfers, from the packets to the server's log.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as expected")]

use std::time::Duration;

use netmon_lab::clock;
use netmon_lab::follower::{Follower, Seen};
use netmon_lab::generator::Generator;
use netmon_lab::lines::{Kind, Line, Moved, Phase};
use netmon_lab::netmon::{Agent, Server};
use netmon_lab::room::{self, Room};

const SECOND: i64 = 1_000_000_000;
const PATIENCE: Duration = Duration::from_secs(20);

/// Lines of transfers with this counterpart that say the same thing about them.
fn started(seen: &[Seen], counterpart: &str) -> Vec<Seen> {
    let wanted = |seen: &&Seen| seen.line.started().is_some_and(|t| t.is("LAN", counterpart));
    seen.iter().filter(wanted).cloned().collect()
}

fn ended(seen: &[Seen], counterpart: &str) -> Vec<(String, Moved)> {
    let ended = seen.iter().filter_map(|seen| seen.line.ended());
    ended.filter(|(t, _)| t.is("LAN", counterpart)).map(|(t, moved)| (t.id.clone(), moved)).collect()
}

/// Waits for the one end of the one transfer with `counterpart`.
fn end(follower: &Follower, counterpart: &str) -> (Seen, Moved) {
    let found = follower.find(PATIENCE, &format!("the end of the transfer with {counterpart}"), |line| {
        line.ended().filter(|(t, _)| t.is("LAN", counterpart)).map(|(_, moved)| moved)
    });
    let (moved, seen) = found.unwrap();
    assert_eq!(started(&follower.lines(), counterpart).len(), 1, "one transfer with {counterpart}");
    (seen, moved)
}

fn first_ns(line: &Line) -> i64 {
    match line.started().unwrap().phase {
        Phase::Started { first_ns, .. } => first_ns,
        _ => unreachable!("a start has a first packet"),
    }
}

#[test]
fn a_copy_is_seen_within_a_second_on_both_pcs_and_at_the_server_and_counted_exactly() {
    let room = Room::build(2).unwrap();
    let server = Server::start(&room).unwrap();
    let agents = [1, 2].map(|pc| Agent::start(&room, pc, &server).unwrap());
    let own = [0, 1].map(|i: usize| agents[i].follow());
    let at_server = ["pc-1", "pc-2"].map(|seat| server.follow(seat));
    let before = [1, 2].map(|pc| room.pc(pc).counters("lan0").unwrap());

    // Two seconds of packets. Then the connection stays open and silent: no further packet ends the transfer.
    let to = format!("{}:9000", room::lan(2));
    let _sink = Generator::serve(room.pc(2), &format!("tcp-serve --listen {to}")).unwrap();
    let began_ns = clock::wall_ns();
    let copy = format!("tcp-copy --to {to} --send 20MB,100000ms --rate 10000000");
    let _copy = Generator::start(room.pc(1), &copy).unwrap();

    let counterparts = [room::lan(2), room::lan(1)];
    let mut moved = [Moved::default(); 2];
    for pc in 0..2 {
        let (own_end, own_moved) = end(&own[pc], &counterparts[pc]);
        let (server_end, _) = end(&at_server[pc], &counterparts[pc]);
        assert_eq!(own_end.line.text, server_end.line.text);
        moved[pc] = own_moved;

        let own_start = started(&own[pc].lines(), &counterparts[pc]).remove(0);
        let server_start = started(&at_server[pc].lines(), &counterparts[pc]).remove(0);
        assert_eq!(own_start.line.text, server_start.line.text);
        let first_ns = first_ns(&own_start.line);
        assert!(
            (began_ns - SECOND / 100..began_ns + 5 * SECOND).contains(&first_ns),
            "{}",
            own_start.line.text
        );
        for seen in [&own_start, &server_start] {
            let after = seen.seen_ns - first_ns;
            assert!(
                (0..SECOND).contains(&after),
                "{} ms after the first packet: {seen:?}",
                after / 1_000_000
            );
        }

        let transfer = own_end.line.transfer().unwrap();
        let Phase::Ended { last_ns, ref reason, .. } = transfer.phase else { unreachable!("it ended") };
        assert_eq!(reason, "");
        assert_eq!(transfer.services, ["tcp/9000"]);
        // 20 MB at 10 MB/s, and the last chunk is not waited for.
        assert!(last_ns - first_ns > 19 * SECOND / 10, "{}", own_end.line.text);
        let silence = own_end.line.at_ns - last_ns;
        assert!((2 * SECOND..3 * SECOND).contains(&silence), "ended {silence} ns after the last packet");
        for seen in [&own_end, &server_end] {
            let after = seen.seen_ns - last_ns;
            assert!(
                (2 * SECOND..4 * SECOND).contains(&after),
                "{} ms after the last packet",
                after / 1_000_000
            );
        }
        let opened = match own_start.line.started().unwrap().phase {
            Phase::Started { ref opened, .. } => opened.clone(),
            _ => unreachable!("it started"),
        };
        assert_eq!(opened, ["here", "there"][pc]);
    }

    let counted = [0, 1].map(|i: usize| room.pc(i as u8 + 1).counters("lan0").unwrap().since(before[i]));
    for pc in 0..2 {
        assert_eq!(
            (moved[pc].sent, moved[pc].received),
            (counted[pc].tx_l3(), counted[pc].rx_l3()),
            "pc-{}",
            pc + 1
        );
    }
    assert_eq!((moved[0].sent, moved[0].received), (moved[1].received, moved[1].sent));
    assert_eq!(
        (moved[0].sent_payload, moved[0].received_payload),
        (moved[1].received_payload, moved[1].sent_payload)
    );
    assert!((20_000_000..21_000_000).contains(&moved[0].sent_payload), "{moved:?}");
    for follower in &own {
        let lost = follower
            .lines()
            .iter()
            .filter_map(|seen| match &seen.line.kind {
                Kind::Coverage(coverage) => Some(coverage.lost),
                _ => None,
            })
            .sum::<u64>();
        assert_eq!(lost, 0);
    }
}

#[test]
fn overlapping_copies_to_two_pcs_are_two_transfers() {
    let room = Room::build(3).unwrap();
    let server = Server::start(&room).unwrap();
    let agent = Agent::start(&room, 1, &server).unwrap();
    let (own, at_server) = (agent.follow(), server.follow("pc-1"));
    let sizes = [(2, 3_000_000_u64), (3, 5_000_000)];
    let mut sinks = Vec::new();
    for (pc, _) in sizes {
        let listen = format!("tcp-serve --listen {}:9000", room::lan(pc));
        sinks.push(Generator::serve(room.pc(pc), &listen).unwrap());
    }
    let copies = sizes.map(|(pc, bytes)| {
        let copy = format!("tcp-copy --to {}:9000 --send {bytes}B --rate 2000000", room::lan(pc));
        Generator::start(room.pc(1), &copy).unwrap()
    });
    for copy in copies {
        copy.report().unwrap();
    }
    for follower in [&own, &at_server] {
        let ends = sizes.map(|(pc, bytes)| {
            let (seen, moved) = end(follower, &room::lan(pc));
            assert!((bytes..bytes + bytes / 10).contains(&moved.sent_payload), "to pc-{pc}: {moved:?}");
            seen.line.transfer().unwrap().id.clone()
        });
        assert_ne!(ends[0], ends[1]);
        // They did overlap: each began before the other ended.
        let lines = follower.lines();
        let starts: Vec<_> =
            sizes.iter().map(|(pc, _)| first_ns(&started(&lines, &room::lan(*pc))[0].line)).collect();
        assert!((starts[0] - starts[1]).abs() < SECOND, "{starts:?}");
    }
    drop(sinks);
}

#[test]
fn a_pause_of_one_and_a_half_seconds_does_not_split_and_two_and_a_half_do() {
    let room = Room::build(2).unwrap();
    let server = Server::start(&room).unwrap();
    let agent = Agent::start(&room, 1, &server).unwrap();
    let (own, at_server) = (agent.follow(), server.follow("pc-1"));
    let to = format!("{}:9000", room::lan(2));
    let _sink = Generator::serve(room.pc(2), &format!("tcp-serve --listen {to}")).unwrap();
    // One connection; it stays open and silent at the end.
    let plan = "1MB,1500ms,2MB,2500ms,4MB,100000ms";
    let _copy = Generator::start(room.pc(1), &format!("tcp-copy --to {to} --send {plan}")).unwrap();
    for follower in [&own, &at_server] {
        let ends = follower
            .when(PATIENCE, "two ends", |lines| {
                Some(ended(lines, &room::lan(2))).filter(|ends| ends.len() == 2)
            })
            .unwrap();
        assert_ne!(ends[0].0, ends[1].0);
        assert_eq!(started(&follower.lines(), &room::lan(2)).len(), 2);
        let payloads = [ends[0].1.sent_payload, ends[1].1.sent_payload];
        assert!((3_000_000..3_300_000).contains(&payloads[0]), "{payloads:?}");
        assert!((4_000_000..4_400_000).contains(&payloads[1]), "{payloads:?}");
    }
}
