//! `netmon-lab demo`: a room in which netmon can be watched at its work.

use std::thread;
use std::time::Duration;

use anyhow::Result;

use crate::follower::{Follower, Seen};
use crate::generator::Generator;
use crate::host::Host;
use crate::lines::Kind;
use crate::netmon::{Agent, PATIENCE, Server};
use crate::room::{self, Room};

const PCS: u8 = 3;
const SERIAL: &str = "60A44C413FAE";

/// Builds a room, runs netmon in it, makes traffic, and shows what the server recorded. `keep`: then waits for Ctrl-C.
///
/// # Errors
/// What could not be built, started or found in the server's logs.
pub fn run(keep: bool) -> Result<()> {
    say("A room: a server, three PCs, a router, and an Internet of three hosts, each in its own namespaces.");
    let room = Room::build(PCS)?;
    let server = Server::start(&room)?;
    println!("   netmon-server runs in `server`, {}", room::SERVER);
    let mut agents = Vec::new();
    let mut logs = Vec::new();
    for pc in 1..=PCS {
        let agent = Agent::start(&room, pc, &server)?;
        println!(
            "   netmon-agent runs in `pc-{pc}`: {} and {}, enrolled with a one-use token",
            room::lan(pc),
            room::lan6(pc)
        );
        logs.push(server.follow(agent.host().name()));
        agents.push(agent);
    }

    lan_copy(&room)?;
    internet(&room)?;
    muted(&room)?;
    usb(&room)?;

    say(
        "Two seconds after the last packet each transfer is over. This is what the server recorded of each PC:",
    );
    for (pc, log) in (1..=PCS).zip(&logs) {
        println!("\n   pc-{pc}   {}", server.log_file(&format!("pc-{pc}")).display());
        wait_for_the_end(pc, log)?;
        log.lines().iter().filter(|seen| is_shown(&seen.line.kind)).for_each(|seen| {
            println!("   {}", seen.line.text);
        });
    }
    println!("\n   (Left out: the coverage lines, and the sums of netmon's own connections.)");
    if keep {
        stand(&room, &server);
    }
    say("Taking the room down.");
    for agent in &mut agents {
        agent.stop()?;
    }
    drop(agents);
    Ok(())
}

fn lan_copy(room: &Room) -> Result<()> {
    say("pc-1 copies a file of 20 MB to pc-2, over TCP.");
    let to = format!("{}:9000", room::lan(2));
    let sink = Generator::serve(room.pc(2), &format!("tcp-serve --listen {to}"))?;
    let copied = Generator::run(room.pc(1), &format!("tcp-copy --to {to} --send 20MB"))?;
    println!("   pc-1 sent {} B, pc-2 received {} B", copied.sent, sink.report()?.received);
    Ok(())
}

fn internet(room: &Room) -> Result<()> {
    say("pc-3 fetches a file of 2 MB from a public host: by HTTPS, by HTTP, and by QUIC.");
    let certificate = format!("--certificate {}", room.directory().join("web.pem").display());
    for (protocol, port, identity) in
        [("https", 443, certificate.as_str()), ("http", 80, ""), ("quic", 443, &certificate)]
    {
        let to = format!("{}:{port}", room::WEB);
        let listen = format!("{protocol}-serve --listen {to} --size 2000000 {identity}");
        let web = Generator::serve(room.host("web"), &listen)?;
        let got = Generator::run(room.pc(3), &format!("{protocol}-get --to {to} {identity}"))?;
        web.report()?;
        println!("   {protocol:5} {to}: sent {} B, received {} B", got.sent, got.received);
    }
    Ok(())
}

fn muted(room: &Room) -> Result<()> {
    say(
        "pc-3 talks to a cloud that the filter list mutes, and asks a DNS server: no transfers, but their bytes are summed.",
    );
    let to = format!("{}:443", room::CLOUD);
    let cloud = Generator::serve(room.host("cloud"), &format!("tcp-serve --listen {to} --reply 100000"))?;
    let synced = Generator::run(room.pc(3), &format!("tcp-copy --to {to} --send 3MB"))?;
    cloud.report()?;
    println!("   cloud {to}: sent {} B, received {} B", synced.sent, synced.received);
    let to = format!("{}:53", room::DNS);
    let dns = Generator::serve(room.host("dns"), &format!("dns-serve --listen {to}"))?;
    let asked = Generator::run(room.pc(3), &format!("dns-query --to {to}"))?;
    dns.report()?;
    println!("   dns   {to}: sent {} B, received {} B", asked.sent, asked.received);
    Ok(())
}

fn usb(room: &Room) -> Result<()> {
    say("A USB stick is plugged into pc-1 and pulled out again (messages as udevd sends them).");
    for action in ["plug", "unplug"] {
        Generator::run(room.pc(1), &format!("inject-usb {action} --serial {SERIAL}"))?;
    }
    Ok(())
}

/// Waits until the server has what was made on this PC.
/// What repeats every second in the room is not worth a line here.
fn is_shown(kind: &Kind) -> bool {
    match kind {
        Kind::Coverage(_) => false,
        Kind::Muted(muted) => muted.label != "netmon",
        _ => true,
    }
}

fn wait_for_the_end(pc: u8, log: &Follower) -> Result<()> {
    let ends = if pc == 3 { 3 } else { 1 };
    let has =
        |lines: &[Seen], wanted: &dyn Fn(&Kind) -> bool| lines.iter().any(|seen| wanted(&seen.line.kind));
    log.when(PATIENCE, "what was made", |lines| {
        let ended = lines.iter().filter(|seen| seen.line.ended().is_some()).count() >= ends;
        let rest = match pc {
            1 => has(lines, &|kind| matches!(kind, Kind::Device(what, _) if what == "removed")),
            3 => ["lab-cloud", "service:dns"]
                .iter()
                .all(|label| has(lines, &|kind| matches!(kind, Kind::Muted(muted) if muted.label == *label))),
            _ => true,
        };
        (ended && rest).then_some(())
    })?;
    Ok(())
}

/// Leaves the room standing. SIGINT and SIGTERM take it down: [`crate::cleanup`].
fn stand(room: &Room, server: &Server<'_>) {
    say("The room stands until Ctrl-C. To go into a host, as root:");
    for host in room.hosts() {
        println!("   {:7} {}", host.name(), enter(host));
    }
    println!("   files   {}", room.directory().display());
    println!(
        "   a PC's log as it grows, in `server`: netmon-server --data {} log pc-1 --follow",
        server.data().display()
    );
    loop {
        thread::park_timeout(Duration::from_secs(3_600));
    }
}

fn enter(host: &Host) -> String {
    format!("nsenter --target {} --net --mount --uts", host.holder_pid())
}

fn say(text: &str) {
    println!("\n== {text}");
}
