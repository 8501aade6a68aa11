//! Internet transfers and what is muted, from the packets to the server's log.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as expected")]

use std::time::Duration;

use netmon_lab::follower::{Follower, Seen};
use netmon_lab::generator::Generator;
use netmon_lab::lines::{Kind, Moved};
use netmon_lab::netmon::{Agent, Server};
use netmon_lab::room::{self, Room};

const PATIENCE: Duration = Duration::from_secs(20);

/// The totals of a label, of all lines so far: bytes sent, bytes received.
fn muted(lines: &[Seen], label: &str) -> (u64, u64) {
    lines.iter().fold((0, 0), |(sent, received), seen| match &seen.line.kind {
        Kind::Muted(muted) if muted.label == label => (sent + muted.sent, received + muted.received),
        _ => (sent, received),
    })
}

/// The transfer of this service with `counterpart`, when it ended.
fn fetched(follower: &Follower, counterpart: &str, service: &str) -> Moved {
    let what = format!("the end of {service} with {counterpart}");
    let found = follower.find(PATIENCE, &what, |line| {
        let (transfer, moved) = line.ended()?;
        (transfer.is("Internet", counterpart) && transfer.services == [service]).then_some(moved)
    });
    found.unwrap().0
}

#[test]
fn https_http_and_quic_are_three_transfers_beside_a_lan_copy_and_the_cloud_is_muted() {
    let room = Room::build(3).unwrap();
    let server = Server::start(&room).unwrap();
    let agents = [1, 2, 3].map(|pc| Agent::start(&room, pc, &server).unwrap());
    let (web, pc3) = (room.host("web"), room.pc(3));
    let certificate = format!("--certificate {}", room.directory().join("web.pem").display());
    let before = pc3.counters("lan0").unwrap();

    // Between the other two, all the time.
    let to = format!("{}:9000", room::lan(2));
    let sink = Generator::serve(room.pc(2), &format!("tcp-serve --listen {to}")).unwrap();
    let copy =
        Generator::start(room.pc(1), &format!("tcp-copy --to {to} --send 10MB --rate 5000000")).unwrap();

    let services = [("https", 443, "tcp/443"), ("http", 80, "tcp/80"), ("quic", 443, "quic/443")];
    for (protocol, port, _) in services {
        let identity = if protocol == "http" { "" } else { &certificate };
        let listen = format!("{protocol}-serve --listen {}:{port} --size 1000000 {identity}", room::WEB);
        let server = Generator::serve(web, &listen).unwrap();
        Generator::run(pc3, &format!("{protocol}-get --to {}:{port} {identity}", room::WEB)).unwrap();
        server.report().unwrap();
    }
    let to_cloud = format!("{}:443", room::CLOUD);
    let cloud = Generator::serve(room.host("cloud"), &format!("tcp-serve --listen {to_cloud} --reply 70000"))
        .unwrap();
    let cloud_before = pc3.counters("lan0").unwrap();
    Generator::run(pc3, &format!("tcp-copy --to {to_cloud} --send 2MB")).unwrap();
    cloud.report().unwrap();
    let cloud_counted = pc3.counters("lan0").unwrap().since(cloud_before);
    let to_dns = format!("{}:53", room::DNS);
    let dns = Generator::serve(room.host("dns"), &format!("dns-serve --listen {to_dns}")).unwrap();
    Generator::run(pc3, &format!("dns-query --to {to_dns}")).unwrap();
    dns.report().unwrap();
    copy.report().unwrap();
    sink.report().unwrap();

    for follower in [agents[2].follow(), server.follow("pc-3")] {
        for (_, _, service) in services {
            let moved = fetched(&follower, room::WEB, service);
            assert!(
                moved.received_payload >= 1_000_000 && moved.received_payload < 2_000_000,
                "{service}: {moved:?}"
            );
            assert!(moved.sent_payload > 0 && moved.sent_payload < 100_000, "{service}: {moved:?}");
        }
        // The last packets of a connection may be counted in the next period.
        let totals = follower.when(PATIENCE, "the cloud's bytes in the muted totals", |lines| {
            let totals = muted(lines, "lab-cloud");
            (totals == (cloud_counted.tx_l3(), cloud_counted.rx_l3())).then_some(totals)
        });
        assert!(totals.unwrap().0 > 2_000_000);
        follower
            .when(PATIENCE, "DNS in the muted totals", |lines| {
                let (sent, received) = muted(lines, "service:dns");
                (sent > 28 && received > 28).then_some(())
            })
            .unwrap();

        let lines = follower.lines();
        let transfers: Vec<_> = lines.iter().filter_map(|seen| seen.line.started()).collect();
        assert_eq!(transfers.len(), services.len(), "{transfers:#?}");
        assert!(transfers.iter().all(|transfer| transfer.is("Internet", room::WEB)), "{transfers:#?}");
        // Nothing is counted twice and nothing is missing: transfers and totals are what the interface counted.
        let counted = pc3.counters("lan0").unwrap().since(before);
        let sums = follower.when(PATIENCE, "the interface's bytes in transfers and totals", |lines| {
            let sums = lines.iter().fold((0, 0), |sum, seen| match (&seen.line.kind, seen.line.ended()) {
                // netmon's own connection is on mgmt0.
                (Kind::Muted(muted), _) if muted.label != "netmon" => {
                    (sum.0 + muted.sent, sum.1 + muted.received)
                }
                (_, Some((_, moved))) => (sum.0 + moved.sent, sum.1 + moved.received),
                _ => sum,
            });
            (sums == (counted.tx_l3(), counted.rx_l3())).then_some(())
        });
        sums.unwrap_or_else(|error| panic!("{counted:?}: {error}"));
    }
    for (pc, other) in [(1_u8, 2_u8), (2, 1)] {
        let follower = server.follow(&format!("pc-{pc}"));
        let found = follower.find(PATIENCE, "the end of the LAN copy", |line| {
            line.ended().filter(|(t, _)| t.is("LAN", &room::lan(other))).map(|(_, moved)| moved)
        });
        let moved = found.unwrap().0;
        let payload = moved.sent_payload.max(moved.received_payload);
        assert!((10_000_000..11_000_000).contains(&payload), "pc-{pc}: {moved:?}");
        assert_eq!(
            follower.lines().iter().filter(|seen| seen.line.started().is_some()).count(),
            1,
            "pc-{pc}"
        );
    }
}

#[test]
fn ipv6_is_watched_like_ipv4() {
    let room = Room::build(2).unwrap();
    let server = Server::start(&room).unwrap();
    let agent = Agent::start(&room, 1, &server).unwrap();
    let before = room.pc(1).counters("lan0").unwrap();
    let web =
        Generator::serve(room.host("web"), &format!("http-serve --listen [{}]:80", room::WEB6)).unwrap();
    Generator::run(room.pc(1), &format!("http-get --to [{}]:80", room::WEB6)).unwrap();
    web.report().unwrap();
    let to = format!("[{}]:9000", room::lan6(2));
    let sink = Generator::serve(room.pc(2), &format!("tcp-serve --listen {to}")).unwrap();
    Generator::run(room.pc(1), &format!("tcp-copy --to {to} --send 1MB")).unwrap();
    sink.report().unwrap();

    let follower = agent.follow();
    let internet = fetched(&follower, room::WEB6, "tcp/80");
    let lan = follower.find(PATIENCE, "the end of the LAN copy", |line| {
        line.ended().filter(|(t, _)| t.is("LAN", &room::lan6(2))).map(|(_, moved)| moved)
    });
    let lan = lan.unwrap().0;
    let counted = room.pc(1).counters("lan0").unwrap().since(before);
    assert_eq!(internet.sent + lan.sent, counted.tx_l3());
    assert_eq!(internet.received + lan.received, counted.rx_l3());
}
