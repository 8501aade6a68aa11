//! Interfaces that come and go while the real agent watches: attached within a second, counted, forgotten, and watched
//! again when they come back.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as expected")]

use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::thread;
use std::time::Duration;

use aya::programs::SchedClassifier;
use aya::programs::tc::TcAttachType;
use netmon_common::abi::programs;
use netmon_lab::clock;
use netmon_lab::follower::{Follower, Seen};
use netmon_lab::generator::Generator;
use netmon_lab::host::Host;
use netmon_lab::netmon::Agent;
use netmon_lab::room::Room;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// An interface that came is watched within this time, by the time of the log's line.
const PROMISE: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(20);
const DATAGRAMS: u64 = 50;

/// A PC with an agent that watches by a glob, and the log that it writes.
struct Watched<'a> {
    pc: &'a Host,
    room: &'a Room,
    log: Follower,
    /// Lines of the log that were looked at already.
    read: usize,
}

impl<'a> Watched<'a> {
    /// The agent has to be kept.
    fn new(room: &'a Room) -> (Self, Agent<'a>) {
        let mut agent = Agent::prepare(room, 1).unwrap();
        agent.watch(&["lan0", "hot*"]);
        agent.start_again().unwrap();
        let watched = Self { pc: room.pc(1), room, log: agent.follow(), read: 0 };
        (watched, agent)
    }

    /// Runs commands of `ip` on the PC, and expects what [`Watched::expect`] does.
    fn ip(&mut self, commands: &str, sentences: &[String]) {
        let run = |pc: &Host| pc.run_with_input(&["ip", "-batch", "-"], commands).unwrap();
        self.expect(run, sentences);
    }

    /// Does something on the PC, then waits for one line for each of these sentences; they are recorded within
    /// [`PROMISE`].
    fn expect<T>(&mut self, act: impl FnOnce(&Host) -> T, sentences: &[String]) -> T {
        let asked = clock::wall_ns();
        let result = act(self.pc);
        let done = clock::wall_ns();
        let lines = self.log.when(PATIENCE, &format!("{sentences:?}"), |lines| {
            let new = &lines[self.read..];
            let found = sentences.iter().map(|sentence| {
                new.iter().position(|seen| says(seen, sentence)).map(|at| (at, new[at].clone()))
            });
            found.collect::<Option<Vec<_>>>()
        });
        let lines = lines.unwrap();
        for (_, seen) in &lines {
            let text = &seen.line.text;
            assert!(seen.line.at_ns >= asked, "{text}: before it happened");
            let late = Duration::from_nanos((seen.line.at_ns - done).max(0).cast_unsigned());
            assert!(late < PROMISE, "{text}: {late:?} after it happened");
        }
        self.read += lines.iter().map(|(at, _)| at + 1).max().unwrap_or(0);
        result
    }

    /// Sends datagrams over the interface to `web`, which is at its other end, and expects the agent to record them to
    /// the byte.
    fn is_counted(&self, interface: &str, port: u16) {
        let web = self.room.host("web");
        for (host, interface, address) in [(self.pc, interface, "10.99.0.1/24"), (web, "far", "10.99.0.2/24")]
        {
            host.run(&["ip", "address", "replace", address, "dev", interface]).unwrap();
            host.run(&["ip", "link", "set", interface, "up"]).unwrap();
        }
        let to = format!("10.99.0.2:{port}");
        let sink = Generator::serve(web, &format!("udp-serve --listen {to} --count {DATAGRAMS}")).unwrap();
        Generator::run(self.pc, &format!("udp-send --to {to} --count {DATAGRAMS} --size 500")).unwrap();
        sink.report().unwrap();
        let service = format!("udp/{port}");
        let ended = self.log.find(PATIENCE, &format!("the end of {service}"), |line| {
            let (transfer, moved) = line.ended()?;
            (transfer.is("LAN", "10.99.0.2") && transfer.services.contains(&service)).then_some(moved)
        });
        let (moved, _) = ended.unwrap();
        assert_eq!((moved.sent, moved.received), (DATAGRAMS * (20 + 8 + 500), 0), "over {interface}");
    }
}

/// True when this is what the line says behind its time.
fn says(seen: &Seen, sentence: &str) -> bool {
    seen.line.text.split_once(' ').is_some_and(|(_, said)| said.starts_with(sentence))
}

/// The line of an interface that is watched from now on.
fn watching(name: &str) -> String {
    format!("watching interface \"{name}\" ")
}

/// The line of one that is not any more.
fn left(name: &str) -> String {
    format!("no longer watching interface \"{name}\" ")
}

/// A command that makes an interface whose other end is `far` in `web`.
fn plug(room: &Room, name: &str) -> String {
    let web = room.host("web").holder_pid();
    format!("link add {name} type veth peer name far netns {web}\n")
}

#[test]
fn an_interface_is_watched_within_a_second_whenever_it_comes() {
    let room = Room::build(1).unwrap();
    let (mut watched, mut agent) = Watched::new(&room);
    for port in [9000, 9001] {
        watched.ip(&plug(&room, "hot0"), &[watching("hot0")]);
        watched.is_counted("hot0", port);
        watched.ip("link del hot0\n", &[left("hot0")]);
    }
    agent.stop().unwrap();
}

#[test]
fn a_renamed_interface_is_watched_by_its_new_name_as_long_as_the_choice_takes_it() {
    let room = Room::build(1).unwrap();
    let (mut watched, mut agent) = Watched::new(&room);
    watched.ip(&plug(&room, "cold0"), &[]);
    watched.ip("link set cold0 name hot0\n", &[watching("hot0")]);
    watched.ip("link set hot0 name hot1\n", &[left("hot0"), watching("hot1")]);
    watched.is_counted("hot1", 9000);
    watched.ip("link set hot1 down\nlink set hot1 name cold0\n", &[left("hot1")]);
    watched.ip("link set cold0 name hot1\n", &[watching("hot1")]);
    watched.is_counted("hot1", 9001);
    agent.stop().unwrap();
}

#[test]
fn twenty_interfaces_at_once_are_watched_within_a_second_and_forgotten() {
    let room = Room::build(1).unwrap();
    let (mut watched, mut agent) = Watched::new(&room);
    for _ in 0..2 {
        let (mut plug, mut unplug) = (String::new(), String::new());
        for number in 0..20 {
            let _ = writeln!(plug, "link add hot{number} type veth peer name peer{number}");
            let _ = writeln!(unplug, "link del hot{number}");
        }
        let all = |sentence: fn(&str) -> String| -> Vec<String> {
            (0..20).map(|number| sentence(&format!("hot{number}"))).collect()
        };
        watched.ip(&plug, &all(watching));
        let status = agent.status().unwrap();
        assert_eq!(status.matches("\"name\":\"hot").count(), 20, "{status}");
        watched.ip(&unplug, &all(left));
    }
    let status = agent.status().unwrap();
    assert!(!status.contains("hot") && status.contains("\"name\":\"lan0\""), "{status}");
    agent.stop().unwrap();
}

#[test]
fn interfaces_that_come_and_go_quickly_leave_nothing_behind() {
    let room = Room::build(1).unwrap();
    let (mut watched, mut agent) = Watched::new(&room);
    let mut flutter = String::new();
    for _ in 0..20 {
        flutter += "link add hot0 type veth peer name peer0\nlink del hot0\n";
    }
    watched.pc.run_with_input(&["ip", "-batch", "-"], &flutter).unwrap();
    // Each was there for less than the agent needs to look; the one that stays is seen.
    watched.ip(&plug(&room, "hot1"), &[watching("hot1")]);
    watched.is_counted("hot1", 9000);
    let lines = watched.log.lines();
    let count = |sentence: &str| lines.iter().filter(|seen| says(seen, sentence)).count();
    assert_eq!(
        count(&watching("hot0")),
        count(&left("hot0")),
        "each one that was watched is told to have gone"
    );
    agent.stop().unwrap();
}

/// Does something in the network namespace of a host.
fn inside<T: Send + 'static>(host: &Host, job: impl FnOnce() -> T + Send + 'static) -> T {
    let namespace = File::open(format!("/proc/{}/ns/net", host.holder_pid())).unwrap();
    let enter =
        move || move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
    // A thread can be in another network namespace than its process.
    thread::spawn(move || (enter(), job()).1).join().unwrap()
}

/// Makes a tap interface; it goes with the file.
fn tap(name: &'static str) -> File {
    let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: all zeros are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    file
}

/// The program at the ingress of an interface.
fn ingress(pc: &Host, name: &'static str) -> Vec<String> {
    inside(pc, move || {
        let (_, programs) = SchedClassifier::query_tcx(name, TcAttachType::Ingress).unwrap();
        programs.iter().map(|program| program.name_as_str().unwrap().to_owned()).collect()
    })
}

#[test]
fn an_interface_whose_frames_become_others_gets_other_programs() {
    let room = Room::build(1).unwrap();
    let (mut watched, mut agent) = Watched::new(&room);
    let pc = room.pc(1);
    let file = watched.expect(|pc| inside(pc, || tap("hot0")), &[watching("hot0")]);
    assert_eq!(ingress(pc, "hot0"), [programs::TC_INGRESS]);
    // As modems do it that are switched from Ethernet to raw IP.
    let switch = |_: &Host| {
        let none = libc::c_ulong::from(libc::ARPHRD_NONE);
        // SAFETY: TUNSETLINK takes a number.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETLINK, none) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    };
    watched.expect(switch, &[left("hot0"), watching("hot0")]);
    assert_eq!(ingress(pc, "hot0"), [programs::TC_L3_INGRESS]);
    watched.expect(|_| drop(file), &[left("hot0")]);
    agent.stop().unwrap();
}
