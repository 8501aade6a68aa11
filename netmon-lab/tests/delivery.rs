//! Nothing missing, nothing twice, order kept: the server away, the agent killed.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as expected")]

use std::collections::BTreeSet;
use std::time::Duration;

use netmon_lab::follower::Seen;
use netmon_lab::generator::Generator;
use netmon_lab::lines::Kind;
use netmon_lab::netmon::{Agent, Server};
use netmon_lab::room::{self, Room};
use netmon_lab::wait;

const PATIENCE: Duration = Duration::from_secs(30);
/// How long the server is away in the test: longer than its agents' connections live without an answer.
const AWAY: Duration = Duration::from_secs(30);

fn texts(lines: &[Seen]) -> Vec<String> {
    lines.iter().map(|seen| seen.line.text.clone()).collect()
}

/// In lines of what the server itself noticed.
const NOTICED: &str = " SERVER ";

/// One copy of this size to the other PC, from its first packet to the end of its transfer.
fn copy(room: &Room, bytes: u64) {
    let to = format!("{}:9000", room::lan(2));
    let sink = Generator::serve(room.pc(2), &format!("tcp-serve --listen {to}")).unwrap();
    Generator::run(room.pc(1), &format!("tcp-copy --to {to} --send {bytes}B")).unwrap();
    assert_eq!(sink.report().unwrap().received, bytes);
}

/// Stops the agent, so that its log is complete, and compares it with the server's.
fn assert_delivered(mut agent: Agent<'_>, server: &Server<'_>) -> Vec<Seen> {
    let own = agent.follow();
    agent.stop().unwrap();
    let last =
        own.find(PATIENCE, "the agent's stop", |line| line.text.ends_with(" agent stopped").then_some(()));
    last.unwrap();
    // An agent that stops may leave its last lines in the spool: the next run delivers them.
    agent.start_again().unwrap();
    let at_server = server.follow("pc-1");
    let stopped = texts(&own.lines()).iter().rposition(|text| text.ends_with(" agent stopped")).unwrap();
    let expected = texts(&own.lines())[..=stopped].to_vec();
    let arrived = at_server.when(PATIENCE, "the agent's stop", |lines| {
        texts(lines).iter().rposition(|text| *text == expected[stopped]).map(|at| lines[..=at].to_vec())
    });
    let arrived = arrived.unwrap();
    // What the server itself noticed is not the PC's.
    let mut received = texts(&arrived);
    received.retain(|text| !text.contains(NOTICED));
    assert_eq!(
        received.len(),
        received.iter().collect::<BTreeSet<_>>().len(),
        "a line came twice: {received:#?}"
    );
    assert_eq!(received, expected);
    arrived
}

#[test]
fn a_server_that_was_away_for_half_a_minute_misses_nothing_and_gets_nothing_twice() {
    let room = Room::build(2).unwrap();
    let mut server = Server::start(&room).unwrap();
    let mut agent = Agent::start(&room, 1, &server).unwrap();
    let own = agent.follow();
    let mut copies = 0;
    // The next copy begins when the one before has ended: two within two seconds would be one transfer.
    let mut copy_and_wait = |bytes| {
        copies += 1;
        copy(&room, bytes);
        let ends = own.when(PATIENCE, "the end of each copy", |lines| {
            let ends = lines.iter().filter(|seen| seen.line.ended().is_some()).count();
            (ends >= copies).then_some(ends)
        });
        assert_eq!(ends.unwrap(), copies, "one transfer a copy");
    };
    copy_and_wait(1_000_000);
    server.stop().unwrap();
    let began = netmon_lab::clock::now();
    while began.elapsed() < AWAY {
        copy_and_wait(500_000);
        assert!(agent.is_running());
    }
    server.start_again().unwrap();
    // The agent tries again at the latest after a minute; delivery is what the test is about.
    let caught_up = server.follow("pc-1").when(Duration::from_secs(75), "all copies", |lines| {
        (lines.iter().filter(|seen| seen.line.ended().is_some()).count() >= copies).then_some(())
    });
    caught_up.unwrap();
    let arrived = assert_delivered(agent, &server);
    assert!(arrived.iter().any(|seen| seen.line.late), "no line is marked as late");
    let gap = arrived.iter().find(|seen| matches!(seen.line.kind, Kind::Gap(_)));
    assert!(gap.is_none(), "nothing was lost, but: {gap:?}");
    let is_told = |seen: &Seen| {
        seen.line.text.contains(NOTICED) && seen.line.text.ends_with(": this server did not run")
    };
    assert!(arrived.iter().any(is_told), "the server does not tell that it was away");
}

#[test]
fn a_killed_agent_delivers_what_it_recorded_and_a_gap() {
    let room = Room::build(2).unwrap();
    let server = Server::start(&room).unwrap();
    let mut agent = Agent::start(&room, 1, &server).unwrap();
    let to = format!("{}:9000", room::lan(2));
    let _sink = Generator::serve(room.pc(2), &format!("tcp-serve --listen {to}")).unwrap();
    let copying =
        Generator::start(room.pc(1), &format!("tcp-copy --to {to} --send 20MB --rate 2000000")).unwrap();
    let own = agent.follow();
    own.find(PATIENCE, "the transfer's start", |line| line.started().map(drop)).unwrap();
    agent.kill().unwrap();
    agent.start_again().unwrap();
    copying.report().unwrap();
    let second_run = own.when(PATIENCE, "the end of the rest of the transfer", |lines| {
        lines.iter().find_map(|seen| seen.line.ended().map(|(transfer, _)| transfer.id.clone()))
    });
    assert!(second_run.unwrap().starts_with("#2."));
    let arrived = assert_delivered(agent, &server);
    let gaps: Vec<_> = arrived.iter().filter(|seen| matches!(seen.line.kind, Kind::Gap(_))).collect();
    assert_eq!(gaps.len(), 1, "{gaps:#?}");
    assert!(gaps[0].line.text.contains("no agent ran"), "{gaps:#?}");
    // Bytes of before the kill are not told as bytes of after.
    let moved: Vec<_> = arrived.iter().filter_map(|seen| Some(seen.line.ended()?.1.sent_payload)).collect();
    assert!(moved.len() == 1 && moved[0] < 20_000_000, "{moved:?}");
}

#[test]
fn a_killed_server_has_each_acknowledged_line_once() {
    let room = Room::build(2).unwrap();
    let mut server = Server::start(&room).unwrap();
    let agent = Agent::start(&room, 1, &server).unwrap();
    for round in 1..=3 {
        copy(&room, 300_000);
        let starts = |lines: &[Seen]| lines.iter().filter(|seen| seen.line.started().is_some()).count();
        let follower = server.follow("pc-1");
        follower
            .when(Duration::from_secs(75), "the copy's start", |lines| (starts(lines) >= round).then_some(()))
            .unwrap();
        // Between a transfer's start and its end.
        server.kill().unwrap();
        server.start_again().unwrap();
        let own = agent.follow();
        own.when(PATIENCE, "its end", |lines| {
            (lines.iter().filter(|seen| seen.line.ended().is_some()).count() >= round).then_some(())
        })
        .unwrap();
    }
    let own = agent.follow();
    wait::until(Duration::from_secs(75), "the server to have it all", || {
        let log = server.log("pc-1").ok()?;
        (log.matches("transfer ended").count() == 3).then_some(())
    })
    .unwrap();
    drop(own);
    assert_delivered(agent, &server);
}
