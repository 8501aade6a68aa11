//! The real agent with what it keeps of root's rights: every thread has three capabilities and no way to more, and
//! everything that the agent does while it watches works with them. Needs root.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as expected")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use netmon_common::abi::programs;
use netmon_lab::follower::Follower;
use netmon_lab::generator::Generator;
use netmon_lab::lines::Line;
use netmon_lab::netmon::Agent;
use netmon_lab::room::{self, Room};
use netmon_lab::wait;

const PATIENCE: Duration = Duration::from_secs(20);
/// CAP_NET_ADMIN (12), CAP_PERFMON (38), CAP_BPF (39) of linux/capability.h.
const THREE: u64 = 1 << 12 | 1 << 38 | 1 << 39;
const NAMES: &str = "CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF; no way to more";
/// The unit leaves CAP_SYS_ADMIN (21) to the process that marks file systems. Who starts without CAP_SETPCAP cannot take it out
/// of the bounding set; with `no_new_privs` nothing can be got from there.
const UNITS_BOUNDING: u64 = THREE | 1 << 21;
/// Of root's rights, those that the unit leaves.
const RESTRICTED: [&str; 4] =
    ["setpriv", "--bounding-set=-all,+bpf,+perfmon,+net_admin", "--inh-caps=-all", "--no-new-privs"];
const UNIT: &str = include_str!("../../deploy/netmon-agent.service");

/// What the kernel says of each thread of a process, by name of the thread.
fn threads(pid: u32) -> Vec<BTreeMap<String, String>> {
    let read = |entry: std::io::Result<fs::DirEntry>| {
        // A thread may have ended meanwhile.
        let text = fs::read_to_string(entry.unwrap().path().join("status")).ok()?;
        let lines = text.lines().filter_map(|line| line.split_once(":\t"));
        Some(lines.map(|(field, value)| (field.to_owned(), value.to_owned())).collect())
    };
    fs::read_dir(format!("/proc/{pid}/task")).unwrap().filter_map(read).collect()
}

/// Every thread of the agent has the three capabilities and no way to more; how many threads there are.
fn is_restricted(agent: &Agent<'_>) -> usize {
    is_bounded(agent, THREE)
}

fn is_bounded(agent: &Agent<'_>, bounding: u64) -> usize {
    let threads = threads(agent.pid().unwrap());
    for thread in &threads {
        let set = |field: &str| u64::from_str_radix(&thread[field], 16).unwrap();
        let name = &thread["Name"];
        for (field, expected) in [("CapPrm", THREE), ("CapEff", THREE), ("CapBnd", bounding)] {
            assert_eq!(set(field), expected, "{field} of {name}: {thread:#?}");
        }
        for field in ["CapInh", "CapAmb"] {
            assert_eq!(set(field), 0, "{field} of {name}: {thread:#?}");
        }
        assert_eq!(thread["NoNewPrivs"], "1", "{name}");
    }
    threads.len()
}

/// Sends datagrams from the PC to `to`, and waits until the log tells of the transfer.
fn is_recorded(room: &Room, log: &Follower, to: &str, port: u16) {
    let sink =
        Generator::serve(room.host("web"), &format!("udp-serve --listen {to}:{port} --count 5")).unwrap();
    Generator::run(room.pc(1), &format!("udp-send --to {to}:{port} --count 5 --size 100")).unwrap();
    sink.report().unwrap();
    let service = format!("udp/{port}");
    log.find(PATIENCE, &format!("the end of {service}"), |line| {
        line.ended()?.0.services.contains(&service).then_some(())
    })
    .unwrap();
}

/// Waits for a line that says this.
fn says(log: &Follower, sentence: &str) {
    log.find(PATIENCE, sentence, |line: &Line| line.text.contains(sentence).then_some(())).unwrap();
}

/// Detaches what the PC's agent attached last: a link of the very program that it pinned, for there may be others.
fn detach_newest(room: &Room) {
    let bpftool = |arguments: &str| -> serde_json::Value {
        let command: Vec<_> = ["bpftool", "--json"].into_iter().chain(arguments.split(' ')).collect();
        serde_json::from_str(&room.pc(1).run(&command).unwrap()).unwrap()
    };
    let program = &bpftool(&format!("prog show pinned /sys/fs/bpf/netmon/{}", programs::TC_INGRESS))["id"];
    assert!(program.is_u64());
    let links = bpftool("link show");
    let ours = links.as_array().unwrap().iter().filter(|link| link["prog_id"] == *program);
    let newest = ours.filter_map(|link| link["id"].as_u64()).max().unwrap();
    room.pc(1).run(&["bpftool", "link", "detach", "id", &newest.to_string()]).unwrap();
}

/// Everything that an agent does with its rights: it attaches to an interface that comes, counts, attaches again what
/// somebody detached, opens its log anew after it was moved, reads its filter list anew.
fn does_everything(room: &Room, agent: &Agent<'_>, bounding: u64) {
    let (pc, web) = (room.pc(1), room.host("web"));
    let log = agent.follow();
    // The runtime's workers, the USB watch, and what else there may be.
    assert!(is_bounded(agent, bounding) >= 4, "fewer threads than the agent has");

    let plug = format!("link add hot0 type veth peer name far netns {}", web.holder_pid());
    pc.run_with_input(&["ip", "-batch", "-"], &plug).unwrap();
    says(&log, "watching interface \"hot0\" ");
    for (host, interface, address) in [(pc, "hot0", "10.99.0.1/24"), (web, "far", "10.99.0.2/24")] {
        host.run(&["ip", "address", "replace", address, "dev", interface]).unwrap();
        host.run(&["ip", "link", "set", interface, "up"]).unwrap();
    }
    is_recorded(room, &log, "10.99.0.2", 9000);
    is_bounded(agent, bounding);

    detach_newest(room);
    wait::until(PATIENCE, "the agent to attach again", || {
        agent.said().contains("somebody has detached the programs").then_some(())
    })
    .unwrap();
    is_recorded(room, &log, "10.99.0.2", 9001);

    fs::rename(agent.log_file(), agent.directory().join("log/moved.txt")).unwrap();
    let log = agent.follow();
    is_recorded(room, &log, "10.99.0.2", 9002);

    fs::write(agent.filter_file(), "10.99.0.2\n").unwrap();
    says(&log, "filter list");
    pc.run(&["ip", "link", "del", "hot0"]).unwrap();
    says(&log, "no longer watching interface \"hot0\" ");
    is_bounded(agent, bounding);
}

fn prepared(room: &Room) -> Agent<'_> {
    let mut agent = Agent::prepare(room, 1).unwrap();
    agent.watch(&["lan0", "hot*"]);
    agent
}

#[test]
fn an_agent_that_root_starts_keeps_three_capabilities_in_all_threads_and_does_everything_with_them() {
    let room = Room::build(1).unwrap();
    let mut agent = prepared(&room);
    agent.start_again().unwrap();
    does_everything(&room, &agent, THREE);

    let run = |subcommand: &str| {
        let output = agent.command().unwrap().arg(subcommand).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let (status, doctor) = (run("status"), run("doctor"));
    assert!(status.contains(&format!("\nrights    {NAMES}\n")), "{status}");
    assert!(doctor.contains(&format!("ok   privileges     {NAMES}\n")), "{doctor}");
    assert!(doctor.contains(&format!("with {NAMES}")), "{doctor}");
    let priorities = |entry: std::io::Result<fs::DirEntry>| {
        let stat = fs::read_to_string(entry.unwrap().path().join("stat")).ok()?;
        // proc_pid_stat(5): the 19th field, the 17th behind the name.
        let (_, nice) = stat.split_once("(usb-files) ")?;
        nice.split(' ').nth(16)?.parse::<i32>().ok()
    };
    let tasks = fs::read_dir(format!("/proc/{}/task", agent.pid().unwrap())).unwrap();
    // Where root has no CAP_SYS_RESOURCE (containers), the limit is what it was.
    let may = rustix::thread::capabilities(None).unwrap().effective;
    let expected = if may.contains(rustix::thread::CapabilitySet::SYS_RESOURCE) { -15 } else { 0 };
    assert_eq!(tasks.filter_map(priorities).collect::<Vec<_>>(), [expected]);
    agent.stop().unwrap();
}

#[test]
fn an_agent_that_dies_is_replaced_with_the_same_rights() {
    let room = Room::build(1).unwrap();
    let mut agent = prepared(&room);
    agent.under(&RESTRICTED);
    for _ in 0..2 {
        agent.start_again().unwrap();
        is_restricted(&agent);
        agent.kill().unwrap();
    }
    agent.start_again().unwrap();
    does_everything(&room, &agent, THREE);
    agent.stop().unwrap();
}

/// The values of a setting of the unit.
fn setting(name: &str) -> Vec<&'static str> {
    let values = UNIT.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    values.flat_map(str::split_whitespace).collect()
}

/// The file system as the unit has it: read-only but for what is named, and rights as the unit leaves them. The system
/// call filter is not among it: that takes systemd.
#[test]
fn an_agent_in_the_units_file_system_with_the_units_rights_does_everything() {
    let room = Room::build(1).unwrap();
    let mut agent = prepared(&room);
    let own = agent.directory().display().to_string();
    assert_eq!(setting("ProtectSystem"), ["strict"]);
    let mut mounts = String::from("set -e\nmount --make-rprivate /\n");
    for path in setting("ReadWritePaths").into_iter().chain([own.as_str()]) {
        mounts += &format!("mount --rbind {path} {path}\n");
    }
    mounts += "mount -o remount,bind,ro /\n";
    for path in setting("ReadOnlyPaths") {
        let (path, optional) = path.strip_prefix('-').map_or((path, false), |path| (path, true));
        if optional && !fs::exists(path).unwrap() {
            continue;
        }
        mounts += &format!("mountpoint -q {path} || mount --bind {path} {path}\n");
        mounts += &format!("mount -o remount,bind,ro {path}\n");
    }
    let bounding = setting("CapabilityBoundingSet");
    let bounding: String =
        bounding.iter().map(|name| format!(",+{}", name.trim_start_matches("CAP_").to_lowercase())).collect();
    mounts += &format!("exec setpriv --bounding-set=-all{bounding} --inh-caps=-all --no-new-privs \"$@\"\n");
    agent.under(&["unshare", "--mount", "sh", "-c", &mounts, "sh"]);
    agent.start_again().unwrap();

    let inside = ["nsenter", "--mount", "--target", &agent.pid().unwrap().to_string()].map(str::to_owned);
    for path in ["/etc", "/sys/kernel", "/proc/sys/kernel", "/usr", "/var"] {
        let touch = format!("test ! -w {path}");
        let mut command = inside.each_ref().map(String::as_str).to_vec();
        command.extend(["sh", "-c", &touch]);
        room.pc(1).run(&command).unwrap_or_else(|error| panic!("{path} can be written to: {error}"));
    }
    does_everything(&room, &agent, UNITS_BOUNDING);
    agent.stop().unwrap();
}

#[test]
fn a_capability_that_is_missing_is_named_with_what_to_do() {
    let room = Room::build(1).unwrap();
    for (missing, bounding) in [
        ("CAP_PERFMON", "-all,+bpf,+net_admin"),
        ("CAP_BPF", "-all,+perfmon,+net_admin"),
        ("CAP_NET_ADMIN", "-net_admin"),
        ("CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN", "-all"),
    ] {
        let mut agent = Agent::prepare(&room, 1).unwrap();
        agent.under(&["setpriv", &format!("--bounding-set={bounding}")]);
        for subcommand in ["run", "doctor"] {
            let output = agent.command().unwrap().arg(subcommand).output().unwrap();
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said);
            assert_eq!(output.status.code(), Some(1), "{said}");
            let sentence =
                format!("missing privileges: {missing}. Run as root; where root is restricted, allow ");
            assert!(said.contains(&sentence), "{subcommand}: {said}");
        }
        fs::remove_dir_all(agent.directory()).unwrap();
    }
}

#[test]
fn a_directory_of_somebody_else_is_refused_with_the_command_that_helps() {
    let room = Room::build(1).unwrap();
    let agent = prepared(&room);
    let state = agent.state();
    fs::create_dir(&state).unwrap();
    std::os::unix::fs::chown(&state, Some(65_534), Some(65_534)).unwrap();
    let mut daemon = agent.launch().unwrap();
    assert_eq!(daemon.wait_end().unwrap().code(), Some(1));
    let wanted = format!("{} belongs to user 65534", state.display());
    assert!(daemon.said().contains(&wanted) && daemon.said().contains("chown -R 0: "), "{}", daemon.said());
}

#[test]
fn systemd_is_told_that_the_agent_watches_lives_and_ends() {
    let room = Room::build(1).unwrap();
    let mut agent = prepared(&room);
    let path = agent.directory().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let word = || {
        let mut word = [0; 100];
        let length = socket.recv(&mut word).unwrap();
        String::from_utf8(word[..length].to_vec()).unwrap().trim().to_owned()
    };
    agent.under(&["env", &format!("NOTIFY_SOCKET={}", path.display()), "WATCHDOG_USEC=900000"]);
    agent.start_again().unwrap();
    assert_eq!(word(), "READY=1");
    for _ in 0..3 {
        assert_eq!(word(), "WATCHDOG=1");
    }
    // Held up, it gives no sign of life: what was on its way is read first.
    agent.pause();
    socket.set_read_timeout(Some(Duration::from_millis(900))).unwrap();
    wait::until(PATIENCE, "silence", || socket.recv(&mut [0; 100]).is_err().then_some(())).unwrap();
    agent.resume();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(word(), "WATCHDOG=1");
    agent.stop().unwrap();
    while word() != "STOPPING=1" {}
}

#[test]
fn enrolling_takes_no_capability() {
    let room = Room::build(1).unwrap();
    let server = netmon_lab::netmon::Server::start(&room).unwrap();
    let mut agent = Agent::prepare(&room, 1).unwrap();
    agent.under(&["setpriv", "--bounding-set=-all"]);
    agent.enroll(&server.token(&[]).unwrap()).unwrap();
    agent.under(&[]);
    agent.start_again().unwrap();
    is_restricted(&agent);
    let log = server.follow(room.pc(1).name());
    let to = room::lan(1);
    log.find(PATIENCE, &format!("records of {to}"), |line| line.text.contains("watching").then_some(()))
        .unwrap();
    agent.stop().unwrap();
}
