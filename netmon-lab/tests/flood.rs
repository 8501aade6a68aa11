//! What any user of a PC can do to hide something: fill the kernel's flow table.

use std::time::Duration;

use netmon_lab::generator::Generator;
use netmon_lab::lines::Kind;
use netmon_lab::netmon::{Agent, Server};
use netmon_lab::room::{self, Room};

const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn a_copy_is_counted_in_full_while_a_scan_takes_every_slot_of_the_flow_table() {
    const COPIED: u64 = 20_000_000;
    let room = Room::build(3).unwrap();
    let server = Server::start(&room).unwrap();
    let agent = Agent::start(&room, 1, &server).unwrap();
    let own = agent.follow();

    // Four times as many flows as the table has slots, while the copy goes on.
    let scan = format!("udp-scan --to {}:1000 --flows 240000 --rate 24000", room::lan(2));
    let scan = Generator::start(room.pc(1), &scan).unwrap();
    let scanned = |line: &netmon_lab::lines::Line| {
        line.started().is_some_and(|transfer| transfer.is("LAN", &room::lan(2))).then_some(())
    };
    own.find(PATIENCE, "the scan", scanned).unwrap();

    let to = format!("{}:9000", room::lan(3));
    let _sink = Generator::serve(room.pc(3), &format!("tcp-serve --listen {to}")).unwrap();
    let copy = format!("tcp-copy --to {to} --send 20MB --rate 10000000");
    assert_eq!(Generator::run(room.pc(1), &copy).unwrap().sent, COPIED);

    let (payload, _) = own
        .find(PATIENCE, "the copy's end", |line| {
            let (transfer, moved) = line.ended()?;
            transfer.is("LAN", &room::lan(3)).then_some(moved.sent_payload)
        })
        .unwrap();
    // What was lost in the crowd was sent again.
    assert!((COPIED..COPIED + 100_000).contains(&payload), "{payload}");
    scan.report().unwrap();
    let gap = own.lines().iter().find_map(|seen| match &seen.line.kind {
        Kind::Gap(text) => Some(text.clone()),
        _ => None,
    });
    assert_eq!(gap, None, "nothing was refused");
}
