//! What goes wrong outside of netmon: a clear message, and the exit status or the record that it deserves.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as expected")]

use std::collections::HashMap;
use std::fs;
use std::process::Output;
use std::time::Duration;

use netmon_lab::clock;
use netmon_lab::follower::Seen;
use netmon_lab::generator::Generator;
use netmon_lab::lines::Kind;
use netmon_lab::netmon::{self, Agent, PORT, Server};
use netmon_lab::room::{self, Room};
use netmon_lab::wait;

const PATIENCE: Duration = Duration::from_secs(20);

/// The program ended with an error and said this.
fn assert_refused(output: &Output, parts: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "it ended with success and said: {stderr}");
    assert!(output.status.code().is_some(), "it was killed ({}) and said: {stderr}", output.status);
    for part in parts {
        assert!(stderr.contains(part), "`{part}` is missing in: {stderr}");
    }
    assert!(!stderr.contains("panicked"), "{stderr}");
}

/// `run` ends with an error and says this.
fn assert_does_not_start(agent: &Agent<'_>, parts: &[&str]) {
    let mut daemon = agent.launch().unwrap();
    let status = daemon.wait_end().unwrap();
    let said = agent.said();
    assert!(!status.success() && status.code().is_some(), "{status}: {said}");
    for part in parts {
        assert!(said.contains(part), "`{part}` is missing in: {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
}

/// One copy from pc-1 to pc-2 and the end of its transfer in the PC's own log.
fn copy_is_recorded(room: &Room, agent: &Agent<'_>, port: u16) {
    let to = format!("{}:{port}", room::lan(2));
    let sink = Generator::serve(room.pc(2), &format!("tcp-serve --listen {to}")).unwrap();
    Generator::run(room.pc(1), &format!("tcp-copy --to {to} --send 200kB")).unwrap();
    sink.report().unwrap();
    let service = format!("tcp/{port}");
    let ended = agent.follow().find(PATIENCE, &format!("the end of the copy to {to}"), |line| {
        line.ended().filter(|(transfer, _)| transfer.services.contains(&service)).map(drop)
    });
    ended.unwrap();
}

#[test]
fn without_root_the_agent_says_so_and_ends() {
    let room = Room::build(1).unwrap();
    let agent = Agent::prepare(&room, 1).unwrap();
    // Where nobody may read and write.
    let own = room.directory().join("nobody");
    fs::create_dir(&own).unwrap();
    let program = own.join("netmon-agent");
    fs::copy(netmon::program("netmon-agent").unwrap(), &program).unwrap();
    let state = own.join("state").display().to_string();
    let config = agent.config_file().display().to_string();
    room.pc(1).run(&["chown", "-R", "65534:65534", &own.display().to_string()]).unwrap();
    let mut command = room.pc(1).command("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]).arg(program);
    command.args([
        "--config",
        &config,
        "--state-dir",
        &state,
        "--log-dir",
        &state,
        "--runtime-dir",
        &state,
        "run",
    ]);
    let output = netmon::finish("netmon-agent as nobody", command, "").unwrap();
    assert_refused(&output, &["root"]);
}

#[test]
fn an_interface_that_does_not_exist_is_named() {
    let room = Room::build(1).unwrap();
    let mut agent = Agent::prepare(&room, 1).unwrap();
    agent.watch(&["lan0", "nosuch0"]);
    assert_does_not_start(&agent, &["nosuch0", "lan0"]);
}

#[test]
fn a_broken_line_of_the_settings_is_named() {
    let room = Room::build(1).unwrap();
    let agent = Agent::prepare(&room, 1).unwrap();
    fs::write(agent.config_file(), "[report]\ncoverage_s = \"soon\"\n").unwrap();
    assert_does_not_start(&agent, &["agent.toml", "line 2"]);
}

#[test]
fn a_broken_line_of_the_filter_list_is_named_at_the_first_start() {
    let room = Room::build(1).unwrap();
    let agent = Agent::prepare(&room, 1).unwrap();
    fs::write(agent.filter_file(), "[lab-cloud]\n203.0.113.0/24\n203.0.113.300\n").unwrap();
    assert_does_not_start(&agent, &["ip.txt", "line 3"]);
}

#[test]
fn a_list_that_breaks_later_is_refused_and_the_last_good_one_stays_in_force() {
    let room = Room::build(1).unwrap();
    let mut agent = Agent::prepare(&room, 1).unwrap();
    // Not enrolled: it records here only.
    agent.start_again().unwrap();
    let own = agent.follow();
    let to_cloud = || {
        let to = format!("{}:8443", room::CLOUD);
        let cloud = Generator::serve(room.host("cloud"), &format!("tcp-serve --listen {to}")).unwrap();
        Generator::run(room.pc(1), &format!("tcp-copy --to {to} --send 300kB")).unwrap();
        cloud.report().unwrap();
    };
    let muted = |times: u64| {
        own.when(PATIENCE, "muted bytes", |lines| {
            let sums = lines.iter().filter_map(|seen| match &seen.line.kind {
                Kind::Muted(muted) if muted.label == "lab-cloud" => Some(muted.sent),
                _ => None,
            });
            (sums.sum::<u64>() > times * 300_000).then_some(())
        })
        .unwrap();
    };
    to_cloud();
    muted(1);

    fs::write(agent.filter_file(), "[lab-cloud]\nnonsense\n").unwrap();
    let refused =
        own.find(PATIENCE, "the refusal", |line| line.text.contains("filter list refused").then_some(()));
    let line = refused.unwrap().1.line.text;
    assert!(line.contains("ip.txt") && line.contains("line 2") && line.contains("nonsense"), "{line}");
    to_cloud();
    muted(2);
    // Also over a restart.
    agent.stop().unwrap();
    agent.start_again().unwrap();
    to_cloud();
    muted(3);
    assert!(own.lines().iter().all(|seen| seen.line.started().is_none()));

    fs::write(agent.filter_file(), "[other]\n192.0.2.0/24\n").unwrap();
    let loaded = own.when(PATIENCE, "the new list", |lines| {
        let loads = lines.iter().filter(|seen| seen.line.text.contains("filter list loaded: 1 prefixes"));
        let refused = lines.iter().rposition(|seen| seen.line.text.contains("filter list refused"))?;
        let last =
            lines.iter().rposition(|seen| seen.line.text.contains("filter list loaded: 1 prefixes"))?;
        (last > refused && loads.count() > 0).then_some(())
    });
    loaded.unwrap();
    to_cloud();
    own.find(PATIENCE, "a transfer with the cloud", |line| {
        line.ended().filter(|(transfer, _)| transfer.is("Internet", room::CLOUD)).map(drop)
    })
    .unwrap();
}

#[test]
fn a_second_server_on_the_same_port_says_so_and_ends() {
    let room = Room::build(1).unwrap();
    let server = Server::start(&room).unwrap();
    let data = room.directory().join("second").display().to_string();
    let host = room.host("server");
    let init = netmon::chore(host, "netmon-server", &["--data", &data, "init"], "").unwrap();
    assert!(init.status.success(), "{init:?}");
    let listen = format!("{}:{PORT}", room::SERVER);
    let arguments = ["--data", &data, "run", "--listen", &listen, "--enroll-listen", "10.78.0.1:7555"];
    let output = netmon::chore(host, "netmon-server", &arguments, "").unwrap();
    assert_refused(&output, &["7443", "in use"]);
    // The same data a second time.
    let data = server.data().display().to_string();
    let arguments =
        ["--data", &data, "run", "--listen", "10.78.0.1:7666", "--enroll-listen", "10.78.0.1:7555"];
    let output = netmon::chore(host, "netmon-server", &arguments, "").unwrap();
    assert_refused(&output, &["running"]);
}

#[test]
fn used_expired_and_foreign_tokens_are_refused_each_by_its_reason() {
    let room = Room::build(3).unwrap();
    let mut server = Server::start(&room).unwrap();
    let agents = [1, 2, 3].map(|pc| Agent::prepare(&room, pc).unwrap());
    let token = server.token(&[]).unwrap();
    agents[0].enroll(&token).unwrap();
    assert_refused(&agents[1].try_enroll(&token).unwrap(), &["used"]);

    let short = server.token(&["--ttl", "1s"]).unwrap();
    let made_ns = clock::wall_ns();
    let over = || (clock::wall_ns() > made_ns + 1_100_000_000).then_some(());
    wait::until(PATIENCE, "the token's time to be over", over).unwrap();
    assert_refused(&agents[1].try_enroll(&short).unwrap(), &["expired"]);
    assert_refused(&agents[1].try_enroll("nm1.nonsense").unwrap(), &["token"]);

    // A token is not used up by a server that is not there.
    let good = server.token(&[]).unwrap();
    server.stop().unwrap();
    assert_refused(&agents[2].try_enroll(&good).unwrap(), &["10.78.0.1:7444"]);
    server.start_again().unwrap();
    agents[2].enroll(&good).unwrap();
}

#[test]
fn an_agent_starts_and_records_while_the_server_is_away() {
    let room = Room::build(2).unwrap();
    let mut server = Server::start(&room).unwrap();
    let mut agent = Agent::prepare(&room, 1).unwrap();
    agent.enroll(&server.token(&[]).unwrap()).unwrap();
    server.stop().unwrap();
    agent.start_again().unwrap();
    copy_is_recorded(&room, &agent, 9000);
    assert!(agent.is_running());
    server.start_again().unwrap();
    let arrived =
        server.follow("pc-1").find(Duration::from_secs(75), "the copy's end", |line| line.ended().map(drop));
    arrived.unwrap();
}

#[test]
fn a_full_disk_does_not_stop_the_agent_and_nothing_is_lost_without_a_gap() {
    let room = Room::build(2).unwrap();
    let server = Server::start(&room).unwrap();
    let mut agent = Agent::prepare(&room, 1).unwrap();
    room.pc(1).mount_small_disk(&agent.state(), 4_000_000).unwrap();
    agent.enroll(&server.token(&[]).unwrap()).unwrap();
    agent.start_again().unwrap();
    copy_is_recorded(&room, &agent, 9001);

    let fill = agent.state().join("fill").display().to_string();
    let full = room.pc(1).run(&["sh", "-c", &format!("head -c 100000000 /dev/zero > {fill}; true")]);
    full.unwrap();
    copy_is_recorded(&room, &agent, 9002);
    // More records than fit into the rest of the spool's last page.
    let own = agent.follow();
    for _ in 0..60 {
        for action in ["plug", "unplug"] {
            Generator::run(room.pc(1), &format!("inject-usb {action} --serial FULL")).unwrap();
        }
    }
    wait::until(PATIENCE, "the agent to say that its disk is full", || {
        said_about(&agent.said()).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error}: {}", agent.said()));
    assert!(agent.is_running());
    room.pc(1).run(&["rm", &fill]).unwrap();
    copy_is_recorded(&room, &agent, 9003);

    let at_server = server.follow("pc-1");
    at_server
        .find(PATIENCE, "the end of the last copy", |line| {
            line.ended().filter(|(transfer, _)| transfer.services == ["tcp/9003"]).map(drop)
        })
        .unwrap();
    // Everything older than the end of the last copy has arrived by now or never will. A gap's own line is left out: a
    // gap that finds no room in the spool is not lost, its count goes into the next one.
    let mut received: HashMap<String, u32> = HashMap::new();
    for seen in at_server.lines() {
        *received.entry(seen.line.text).or_default() += 1;
    }
    let own = own.lines();
    let last = |seen: &Seen| seen.line.ended().is_some_and(|(transfer, _)| transfer.services == ["tcp/9003"]);
    let mut missing = Vec::new();
    for seen in own.iter().take_while(|seen| !last(seen)) {
        match received.get_mut(&seen.line.text) {
            Some(copies @ 1..) => *copies -= 1,
            _ if matches!(seen.line.kind, Kind::Gap(_)) => {}
            _ => missing.push(&seen.line.text),
        }
    }
    // One record, one line: the gaps account for exactly the lines that did not arrive.
    let counted = || at_server.lines().iter().map(|seen| records_lost(&seen.line.kind)).sum::<usize>();
    let wait = wait::until(PATIENCE, "the gap", || (counted() >= missing.len()).then_some(()));
    assert!(wait.is_ok(), "{} lost, gaps count {}: {missing:#?}", missing.len(), counted());
    assert_eq!(counted(), missing.len(), "more in the gaps than is missing: {missing:#?}");
}

/// How many records this line says are lost.
fn records_lost(kind: &Kind) -> usize {
    let Kind::Gap(gap) = kind else { return 0 };
    let count = gap.strip_suffix(" records").and_then(|gap| gap.rsplit_once(", "));
    count.map_or(0, |(_, count)| count.parse().unwrap())
}

/// True when a message names the spool or its disk.
fn said_about(said: &str) -> bool {
    said.contains("No space left") || said.contains("spool")
}
