//! USB devices, from udev's messages to the server's log.

use std::time::Duration;

use netmon_lab::clock;
use netmon_lab::generator::Generator;
use netmon_lab::lines::Kind;
use netmon_lab::netmon::{Agent, Server};
use netmon_lab::room::Room;

const SECOND: i64 = 1_000_000_000;

#[test]
fn plug_and_unplug_are_in_both_logs_of_the_pc_and_at_the_server_within_a_second() {
    let room = Room::build(2).unwrap();
    let server = Server::start(&room).unwrap();
    let agents = [1, 2].map(|pc| Agent::start(&room, pc, &server).unwrap());
    let followers =
        [agents[0].follow(), agents[0].follow_usb(), server.follow("pc-1"), server.follow_usb("pc-1")];

    for (inject, expected) in [("plug", "added"), ("unplug", "removed")] {
        let began_ns = clock::wall_ns();
        Generator::run(room.pc(1), &format!("inject-usb {inject} --serial 60A44C413FAE")).unwrap();
        for follower in &followers {
            let found = follower.find(Duration::from_secs(5), expected, |line| match &line.kind {
                Kind::Device(what, device) if what == expected => Some(device.clone()),
                _ => None,
            });
            let (device, seen) = found.unwrap();
            let after = seen.seen_ns - began_ns;
            assert!((0..SECOND).contains(&after), "{} ms after the plug: {seen:?}", after / 1_000_000);
            for part in ["Kingston", "DataTraveler", "60A44C413FAE", "[0951:1666]", "storage"] {
                assert!(device.contains(part), "{part} is missing: {device}");
            }
        }
    }
    // The other PC saw nothing of it.
    let others = server.follow("pc-2");
    let started = others.find(Duration::from_secs(5), "a line", |_| Some(()));
    started.unwrap();
    let foreign = others.lines().into_iter().find(|seen| seen.line.text.contains("60A44C413FAE"));
    assert!(foreign.is_none(), "{foreign:?}");
}
