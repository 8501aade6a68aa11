//! What any user of a PC can do to hide something: fill the kernel's flow table.

use std::time::Duration;

use netmon_lab::generator::Generator;
use netmon_lab::lines::Kind;
use netmon_lab::netmon::{Agent, Server};
use netmon_lab::room::{self, Room};

const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn a_copy_is_named_although_a_scan_fills_the_flow_table() {
    let room = Room::build(3).unwrap();
    let server = Server::start(&room).unwrap();
    let agent = Agent::start(&room, 1, &server).unwrap();
    let own = agent.follow();

    // Twice as many flows as the table holds, for long enough that it is full while the copy goes on.
    let scan = format!("udp-scan --to {}:1000 --flows 240000 --rate 24000", room::lan(2));
    let scan = Generator::start(room.pc(1), &scan).unwrap();
    let full = |kind: &Kind| matches!(kind, Kind::Gap(text) if text.contains("flow table was full"));
    own.find(PATIENCE, "the full table", |line| full(&line.kind).then_some(())).unwrap();

    let to = format!("{}:9000", room::lan(3));
    let _sink = Generator::serve(room.pc(3), &format!("tcp-serve --listen {to}")).unwrap();
    Generator::run(room.pc(1), &format!("tcp-copy --to {to} --send 20MB --rate 10000000")).unwrap();

    let named = own.find(PATIENCE, "the copy", |line| {
        line.started().is_some_and(|transfer| transfer.is("LAN", &room::lan(3))).then_some(())
    });
    named.unwrap();
    scan.report().unwrap();
}
