//! What the tests of interfaces share: a choice that is made and attached to as the agent does it, traffic of known
//! size over it, and the interfaces' own counters to compare with.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::time::Duration;

use netmon_agent::kernel::Kernel;
use netmon_agent::links::{self, Choice, Link, Verdict};
use netmon_common::abi::{IPPROTO_TCP, IPPROTO_UDP, Stats};
use netmon_common::model::Hook;
use rustix::mount::{MountFlags, mount};

use crate::rig::{Host, Loaded, chain, eventually, flows, ip, sh, stats};

/// A host that sees its own interfaces under `/sys/class/net`, too.
pub fn host() -> Host {
    let host = Host::new();
    host.run(|| mount("sysfs", "/sys", "sysfs", MountFlags::empty(), None).unwrap());
    host
}

/// The interfaces of a host as the agent sees them.
pub fn links(host: &Host) -> Vec<Link> {
    host.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(links::list()).unwrap()
    })
}

/// Names of the interfaces that this choice watches.
pub fn chosen(host: &Host, patterns: &[&str]) -> Vec<String> {
    let patterns: Vec<_> = patterns.iter().map(|pattern| (*pattern).to_owned()).collect();
    let links = links(host);
    let verdicts = Choice::new(&patterns).unwrap().judge(&links);
    let watched = links.into_iter().filter(|link| verdicts[&link.index] == Verdict::Watch);
    watched.map(|link| link.name).collect()
}

/// Attaches to these interfaces.
pub fn attach(host: &Host, kernel: &mut Loaded, names: &[String]) -> Vec<Hook> {
    let attach = |name: &String| {
        let index = host.ifindex(name);
        kernel.run(move |kernel: &mut Kernel| {
            kernel.attach(index).unwrap_or_else(|error| panic!("{}", chain(&error)))
        })
    };
    names.iter().map(attach).collect()
}

/// Brings interfaces up. Returns when frames pass: until the kernel has worked off the news of the carrier, it drops
/// what is sent behind the egress hook, and the interface does not count it.
pub fn up(ends: &[(&Host, &str)]) {
    for (host, name) in ends {
        host.ip(&format!("link set {name} up"));
    }
    for (host, name) in ends {
        eventually(|| {
            let path = format!("/sys/class/net/{name}/operstate");
            let state = host.run(move || std::fs::read_to_string(path).unwrap());
            // An interface without a carrier to lose says that it does not know.
            let is_up = matches!(state.trim(), "up" | "unknown");
            if is_up { Ok(()) } else { Err(format!("{name} is {state}")) }
        });
        // The state is set first, the queue is opened next, under one lock: this waits for it.
        host.ip(&format!("link set {name} up"));
    }
}

/// What an interface counted: frames and bytes, received and sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub received: u64,
    pub received_bytes: u64,
    pub sent: u64,
    pub sent_bytes: u64,
    pub dropped: u64,
    /// Taken over from the kernel and not sent.
    pub unsent: u64,
}

impl Counters {
    pub fn of(host: &Host, name: &str) -> Self {
        let read = |what: &str| {
            let path = Path::new("/sys/class/net").join(name).join("statistics").join(what);
            host.run(move || std::fs::read_to_string(path).unwrap()).trim().parse().unwrap()
        };
        Self {
            received: read("rx_packets"),
            received_bytes: read("rx_bytes"),
            sent: read("tx_packets"),
            sent_bytes: read("tx_bytes"),
            dropped: read("rx_dropped") + read("tx_dropped"),
            unsent: read("tx_dropped") + read("tx_errors"),
        }
    }

    /// Frames of both directions.
    pub fn frames(self) -> u64 {
        self.received + self.sent
    }

    /// Frames of both directions, and their bytes without the link-layer headers.
    fn l3(self, headers: Headers) -> (u64, u64) {
        let bytes = self.received_bytes - headers.received * self.received + self.sent_bytes;
        (self.frames(), bytes - headers.sent * self.sent)
    }
}

/// Bytes of each frame that an interface counts and the programs do not, and that the programs find in front of what
/// is not IP.
#[derive(Clone, Copy, Debug)]
pub struct Headers {
    pub received: u64,
    pub sent: u64,
    pub at_the_hook: u64,
}

impl Headers {
    pub const NONE: Self = Self { received: 0, sent: 0, at_the_hook: 0 };
    pub const ETHERNET: Self = Self { received: 14, sent: 14, at_the_hook: 14 };
    /// A VLAN interface counts what it receives without its headers, and what it sends without the tag.
    pub const VLAN: Self = Self { received: 0, ..Self::ETHERNET };
    /// A veth interface counts what arrives at a native XDP program without its Ethernet header.
    pub const VETH_WITH_XDP: Self = Self { received: 0, ..Self::ETHERNET };
}

/// Frames and L3 bytes that the programs have counted.
pub fn counted(stats: &Stats, headers: Headers) -> (u64, u64) {
    let not_ip = stats.not_ip_bytes - headers.at_the_hook * stats.not_ip;
    (stats.seen, stats.counted_bytes + stats.other_protocol_bytes + not_ip)
}

/// What programs and interface had counted at some moment. The default: nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Before {
    programs: Stats,
    interface: Counters,
}

impl Before {
    /// While the interface is down.
    pub fn now(host: &Host, kernel: &Kernel, name: &str) -> Self {
        Self { programs: stats(kernel), interface: Counters::of(host, name) }
    }
}

/// Waits until the programs and the interface agree on what came since `before`, frame for frame and byte for byte.
/// GSO and GRO make fewer frames of it for the programs than for some interfaces: see [`frame_by_frame`].
pub fn agrees(host: &Host, kernel: &Kernel, name: &str, headers: Headers, before: Before) {
    let since = |(frames, bytes): (u64, u64), before: (u64, u64)| (frames - before.0, bytes - before.1);
    eventually(|| {
        let here = since(counted(&stats(kernel), headers), counted(&before.programs, headers));
        let there = since(Counters::of(host, name).l3(headers), before.interface.l3(headers));
        if here == there {
            return Ok(());
        }
        let counters = Counters::of(host, name);
        Err(format!("programs {here:?}, {name} {there:?}\n{:#?}\n{counters:?}", stats(kernel)))
    });
}

/// Waits until the programs have seen as many frames since `before` as the interface counted.
pub fn agrees_in_frames(host: &Host, kernel: &Kernel, name: &str, before: Before) {
    eventually(|| {
        let here = stats(kernel).seen - before.programs.seen;
        let there = Counters::of(host, name).frames() - before.interface.frames();
        if here == there { Ok(()) } else { Err(format!("programs {here}, {name} {there}")) }
    });
}

/// Waits until the packets in the flows, segments of super-packets one by one, are as many as the interface counted:
/// received, sent, or taken over from the kernel and then not sent (a USB adapter whose transfer fails or takes too
/// long, as on a busy machine that emulates it). The programs have seen these, too; TCP sends them again.
pub fn agrees_in_packets(host: &Host, kernel: &mut Loaded, name: &str) {
    eventually(|| {
        let flows: u64 = flows(kernel).values().map(|state| state.tx_packets + state.rx_packets).sum();
        let stats = stats(kernel);
        let here = flows + stats.other_protocol + stats.not_ip;
        let counters = Counters::of(host, name);
        let there = counters.frames() + counters.unsent;
        if here == there {
            return Ok(());
        }
        let interface = host.ip(&format!("-s -s link show {name}"));
        let queue = format!("-s qdisc show dev {name}");
        let queue = host.run(move || sh("tc", &queue));
        Err(format!("programs {here}, {name} {there}\n{stats:#?}\n{counters:?}\n{interface}{queue}"))
    });
}

/// Lets the kernel neither put packets together before the hook nor take them apart behind it. TCP makes super-packets
/// for every interface, whatever its features, unless they may have one segment only.
pub fn frame_by_frame(host: &Host, name: &str) {
    let arguments = format!("-K {name} gro off");
    host.run(move || sh("ethtool", &arguments));
    host.ip(&format!("link set {name} gso_max_segs 1"));
}

/// Datagrams that [`talk`] sends, and gets back.
pub const DATAGRAMS: u64 = 100;
/// Payload of the first one; each next one has a byte more. No frame needs padding.
pub const SHORTEST: u64 = 100;
const REQUEST: usize = 3_000_000;
const ANSWER: usize = 1_000_000;
/// Nothing takes this long, on an emulated machine either.
const PATIENCE: Duration = Duration::from_secs(60);

/// UDP and TCP, both ways, from `a` to these addresses of `b`. Returns when all of it has been received.
pub fn talk(a: &Host, b: &Host, servers: &[&str]) {
    for server in servers {
        let server: SocketAddr = server.parse().unwrap();
        let ready = b.run(move || (UdpSocket::bind(server).unwrap(), TcpListener::bind(server).unwrap()));
        let (udp, listener) = ready;
        let done = b.start(move || {
            let mut buffer = [0; 10_000];
            udp.set_read_timeout(Some(PATIENCE)).unwrap();
            for _ in 0..DATAGRAMS {
                let (length, from) = udp.recv_from(&mut buffer).unwrap();
                udp.send_to(&buffer[..length], from).unwrap();
            }
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            stream.read_to_end(&mut request).unwrap();
            stream.write_all(&vec![7; ANSWER]).unwrap();
            request.len()
        });
        a.run(move || {
            let from = SocketAddr::new(if server.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() }, 0);
            let udp = UdpSocket::bind(from).unwrap();
            udp.set_read_timeout(Some(PATIENCE)).unwrap();
            udp.connect(server).unwrap();
            for length in SHORTEST..SHORTEST + DATAGRAMS {
                udp.send(&vec![1; length as usize]).unwrap();
                assert_eq!(udp.recv(&mut [0; 10_000]).unwrap() as u64, length);
            }
            let mut stream = TcpStream::connect_timeout(&server, PATIENCE).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.write_all(&vec![3; REQUEST]).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).unwrap();
            assert_eq!(answer.len(), ANSWER);
        });
        assert_eq!(done.recv().unwrap(), REQUEST);
    }
}

/// What [`talk`] did from `a` is in the flows once: datagrams exactly, TCP with what may have been sent again.
pub fn is_counted_once(kernel: &mut Loaded, servers: &[&str]) {
    let flows = flows(kernel);
    for server in servers {
        let server: SocketAddr = server.parse().unwrap();
        let header = if server.is_ipv4() { 20 } else { 40 };
        let of = |protocol| {
            let mut found =
                flows.iter().filter(|(flow, _)| flow.protocol == protocol && flow.remote == server);
            let (_, state) = found.next().unwrap_or_else(|| panic!("no flow {protocol} {server}: {flows:?}"));
            assert!(found.next().is_none(), "two flows {protocol} {server}");
            *state
        };
        let udp = of(IPPROTO_UDP);
        let payload: u64 = (SHORTEST..SHORTEST + DATAGRAMS).sum();
        let bytes = payload + DATAGRAMS * (8 + header);
        assert_eq!((udp.tx_packets, udp.tx_bytes, udp.tx_payload), (DATAGRAMS, bytes, payload));
        assert_eq!((udp.rx_packets, udp.rx_bytes, udp.rx_payload), (DATAGRAMS, bytes, payload));
        let tcp = of(IPPROTO_TCP);
        let (request, answer) = (REQUEST as u64, ANSWER as u64);
        assert!((request..request * 3 / 2).contains(&tcp.tx_payload), "{tcp:?}");
        assert!((answer..answer * 3 / 2).contains(&tcp.rx_payload), "{tcp:?}");
    }
}

/// Tells two interfaces each other's hardware address for good: no ARP, whose frames are padded, and no neighbour
/// discovery. An interface without such an address has no neighbours to find.
pub fn acquaint(ends: [(&Host, &str, &[&str]); 2]) {
    let address = |(host, name, _): (&Host, &str, &[&str])| {
        let path = format!("/sys/class/net/{name}/address");
        host.run(move || std::fs::read_to_string(path).unwrap()).trim().to_owned()
    };
    for (here, there) in [(ends[0], ends[1]), (ends[1], ends[0])] {
        let hardware = address(there);
        if hardware.is_empty() {
            continue;
        }
        for remote in there.2 {
            here.0.ip(&format!("neigh replace {remote} lladdr {hardware} dev {} nud permanent", here.1));
        }
    }
}

/// `ip` in a host, one command a line.
pub fn batch(host: &Host, commands: &str) {
    for command in commands.lines().map(str::trim).filter(|command| !command.is_empty()) {
        let command = command.to_owned();
        host.run(move || ip(&command));
    }
}
