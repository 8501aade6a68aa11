//! Kinds of interfaces under real traffic, against their own counters: tun and tap, jumbo frames, VLAN tags in the
//! frame and beside it, and virtual interfaces in stacks, where a packet must be counted once. Needs root.
//!
//! What needs drivers that stand on real network cards is tested in a virtual machine: stacks_vm.rs.

#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::UdpSocket;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::thread::{self, JoinHandle};

use netmon_agent::kernel::{Mode, TcKind};
use netmon_common::model::Hook;

#[expect(dead_code, reason = "other tests use the rest")]
#[path = "kernel/frames.rs"]
mod frames;
#[expect(dead_code, reason = "other tests use the rest")]
#[path = "kernel/rig.rs"]
mod rig;
#[expect(dead_code, reason = "other tests use the rest")]
mod stack;

use rig::{Host, Loaded, eventually, flows, stats};
use stack::{
    Before, Counters, Headers, agrees, agrees_in_packets, attach, batch, chosen, frame_by_frame, host,
    is_counted_once, talk, up,
};

const SERVERS: [&str; 2] = ["192.0.2.2:7000", "[2001:db8::2]:7000"];

fn load(host: &Host, mode: Mode, tc: TcKind) -> Loaded {
    let mut options = host.options();
    (options.mode, options.tc) = (mode, tc);
    host.load(options)
}

/// Watches the interface `v`, and nothing else.
fn watch(host: &Host, mode: Mode, tc: TcKind) -> (Loaded, Hook) {
    let mut kernel = load(host, mode, tc);
    let hooks = attach(host, &mut kernel, &["v".to_owned()]);
    (kernel, hooks[0])
}

fn addresses(host: &Host, interface: &str, number: u8) {
    host.ip(&format!("addr add 192.0.2.{number}/24 dev {interface}"));
    host.ip(&format!("addr add 2001:db8::{number}/64 dev {interface} nodad"));
}

/// Two hosts with a cable between them, `v` on both sides; without addresses, and down.
fn cable(options: &str) -> (Host, Host) {
    let (a, b) = (host(), host());
    a.ip(&format!("link add v {options} type veth peer name v {options} netns {}", b.tid));
    (a, b)
}

/// The kernel's side of a tun or tap interface `v`.
struct Tap {
    file: File,
}

impl Tap {
    /// `kind`: `IFF_TUN` or `IFF_TAP`.
    fn new(host: &Host, kind: libc::c_int) -> Self {
        let file = host.run(move || {
            let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
            // SAFETY: all zeros are a valid `ifreq`.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            request.ifr_name[0] = b'v'.cast_signed();
            request.ifr_ifru.ifru_flags = (kind | libc::IFF_NO_PI) as libc::c_short;
            // SAFETY: TUNSETIFF reads and writes one `ifreq`, which outlives the call.
            let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
            assert_eq!(result, 0, "{}", io::Error::last_os_error());
            file
        });
        // A full queue drops what the egress hook has seen.
        host.ip("link set v txqueuelen 10000");
        Self { file }
    }

    /// What leaves this one arrives at the other one, until this one has gone.
    fn relay(&self, to: &Self) -> JoinHandle<()> {
        let (mut from, mut to) = (self.file.try_clone().unwrap(), to.file.try_clone().unwrap());
        thread::spawn(move || {
            let mut frame = [0; 70_000];
            while let Ok(length) = from.read(&mut frame) {
                // Refused while the other end is down, and when it has gone.
                let _ = to.write(&frame[..length]);
            }
        })
    }
}

/// What the hooks see as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    /// Several segments of TCP, which the interface counts one by one.
    SuperPacket,
    Frame,
}

/// A cable made of two tun or tap interfaces and this process.
fn over_taps(kind: libc::c_int, unit: Unit, mode: Mode, tc: TcKind, expected: Hook) {
    let (a, b) = (host(), host());
    let (at_a, at_b) = (Tap::new(&a, kind), Tap::new(&b, kind));
    let relays = [at_a.relay(&at_b), at_b.relay(&at_a)];
    let (mut kernel, hook) = watch(&a, mode, tc);
    assert_eq!(hook, expected);
    addresses(&a, "v", 1);
    addresses(&b, "v", 2);
    if unit == Unit::Frame {
        frame_by_frame(&a, "v");
    }
    up(&[(&a, "v"), (&b, "v")]);
    talk(&a, &b, &SERVERS);
    agrees_in_packets(&a, &mut kernel, "v");
    if unit == Unit::Frame {
        let headers = if kind == libc::IFF_TUN { Headers::NONE } else { Headers::ETHERNET };
        agrees(&a, &kernel, "v", headers, Before::default());
    }
    assert_eq!(Counters::of(&a, "v").dropped, 0, "what is dropped behind the hook is not in the counters");
    is_counted_once(&mut kernel, &SERVERS);
    drop(kernel);
    for host in [&a, &b] {
        host.ip("link del v");
    }
    for relay in relays {
        relay.join().unwrap();
    }
}

#[test]
fn a_tun_interface_is_counted_exactly() {
    over_taps(libc::IFF_TUN, Unit::Frame, Mode::Tc, TcKind::Best, Hook::Tcx);
    over_taps(libc::IFF_TUN, Unit::Frame, Mode::Tc, TcKind::Clsact, Hook::Clsact);
    over_taps(libc::IFF_TUN, Unit::SuperPacket, Mode::Tc, TcKind::Best, Hook::Tcx);
    // XDP is for frames with an Ethernet header.
    over_taps(libc::IFF_TUN, Unit::Frame, Mode::Xdp, TcKind::Best, Hook::Tcx);
}

#[test]
fn a_tap_interface_is_counted_exactly() {
    over_taps(libc::IFF_TAP, Unit::Frame, Mode::Tc, TcKind::Best, Hook::Tcx);
    over_taps(libc::IFF_TAP, Unit::SuperPacket, Mode::Tc, TcKind::Best, Hook::Tcx);
    over_taps(libc::IFF_TAP, Unit::SuperPacket, Mode::Xdp, TcKind::Best, Hook::XdpTcx);
}

/// Frames of 9,000 bytes; `segments`: how many of them a super-packet may have.
fn jumbo(segments: u32, mode: Mode, expected: Hook) {
    const PAYLOAD: u64 = 9_000 - 20 - 8;
    let (a, b) = cable(&format!("mtu 9000 gso_max_segs {segments}"));
    let (mut kernel, hook) = watch(&a, mode, TcKind::Best);
    assert_eq!(hook, expected);
    addresses(&a, "v", 1);
    addresses(&b, "v", 2);
    up(&[(&a, "v"), (&b, "v")]);
    talk(&a, &b, &SERVERS);
    let sink = b.run(|| UdpSocket::bind("192.0.2.2:7001").unwrap());
    a.run(|| {
        let socket = UdpSocket::bind("192.0.2.1:0").unwrap();
        for _ in 0..100 {
            socket.send_to(&[1; PAYLOAD as usize], "192.0.2.2:7001").unwrap();
        }
    });
    agrees(&a, &kernel, "v", Headers::ETHERNET, Before::default());
    is_counted_once(&mut kernel, &SERVERS);
    let flows = flows(&mut kernel);
    let (_, full) = flows.iter().find(|(flow, _)| flow.remote.port() == 7001).unwrap();
    assert_eq!((full.tx_packets, full.tx_bytes, full.tx_payload), (100, 900_000, 100 * PAYLOAD));
    let tcp = flows.iter().find(|(flow, _)| flow.protocol == 6 && flow.remote.is_ipv4()).unwrap().1;
    assert!(tcp.tx_payload / tcp.tx_packets > 1_460, "the frames were not jumbo: {tcp:?}");
    drop(sink);
}

#[test]
fn jumbo_frames_are_counted_exactly() {
    jumbo(1, Mode::Tc, Hook::Tcx);
    jumbo(65_535, Mode::Tc, Hook::Tcx);
    // XDP sees the frames before they are put together, and the interface too.
    jumbo(1, Mode::Xdp, Hook::XdpTcx);
}

/// Puts frames on the wire as they are.
fn send_raw(host: &Host, frames: Vec<Vec<u8>>) {
    let index = host.ifindex("v");
    host.run(move || {
        // SAFETY: makes a descriptor; no memory is involved.
        let descriptor = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) };
        assert!(descriptor >= 0, "{}", io::Error::last_os_error());
        // SAFETY: it was made above, and nobody else has it.
        let socket = unsafe { OwnedFd::from_raw_fd(descriptor) };
        // SAFETY: all zeros are a valid `sockaddr_ll`.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = index.cast_signed();
        for frame in frames {
            // SAFETY: both buffers are as long as said, and outlive the call.
            let sent = unsafe {
                libc::sendto(
                    socket.as_raw_fd(),
                    frame.as_ptr().cast(),
                    frame.len(),
                    0,
                    (&raw const address).cast(),
                    size_of_val(&address) as libc::socklen_t,
                )
            };
            assert_eq!(sent, frame.len().cast_signed(), "{}", io::Error::last_os_error());
        }
    });
}

/// Frames with none to three tags: outer tags of providers, inner tags of customers.
fn tagged_frames() -> [Vec<u8>; 4] {
    let plain = frames::udp_out(1000, 2000, &[7; 100]);
    let one = frames::tagged(0x8100, &plain);
    let two = frames::tagged(0x88a8, &one);
    let three = frames::tagged(0x88a8, &two);
    [plain, one, two, three]
}

/// Sends a hundred of each of [`tagged_frames`], and returns how many kinds each end could read.
fn tags(mode: Mode) -> (u64, u64) {
    const EACH: u64 = 100;
    /// IP, UDP, payload.
    const L3: u64 = 20 + 8 + 100;
    let (a, b) = cable("");
    for host in [&a, &b] {
        // No address, no word of its own.
        host.ip("link set v addrgenmode none");
    }
    let (mut at_a, _) = watch(&a, Mode::Tc, TcKind::Best);
    let (mut at_b, _) = watch(&b, mode, TcKind::Best);
    up(&[(&a, "v"), (&b, "v")]);
    let kinds = tagged_frames();
    let bytes: u64 = kinds.iter().map(|frame| frame.len() as u64 * EACH).sum();
    send_raw(&a, kinds.into_iter().flat_map(|frame| std::iter::repeat_n(frame, EACH as usize)).collect());

    let read = |host: &Host, kernel: &mut Loaded, direction: &str| {
        let all = eventually(|| {
            let (stats, counters) = (stats(kernel), Counters::of(host, "v"));
            // With XDP, the interfaces leave out the Ethernet headers.
            let counted_bytes = bytes - if mode == Mode::Xdp { 4 * EACH * 14 } else { 0 };
            let is_all = stats.seen == 4 * EACH
                && counters.received + counters.sent == 4 * EACH
                && counters.received_bytes + counters.sent_bytes == counted_bytes;
            if is_all { Ok(stats) } else { Err(format!("{direction}: {stats:?}, {counters:?}")) }
        });
        assert_eq!(all.counted + all.not_ip, 4 * EACH, "{direction}: {all:?}");
        assert_eq!(all.counted_bytes, all.counted * L3, "{direction}: {all:?}");
        let flows = flows(kernel);
        assert_eq!(flows.len(), 1, "tags make no difference to a flow: {flows:?}");
        let state = flows.values().next().unwrap();
        assert_eq!(state.tx_packets + state.rx_packets, all.counted);
        assert_eq!(state.tx_payload + state.rx_payload, all.counted * 100);
        all.counted / EACH
    };
    (read(&a, &mut at_a, "sent"), read(&b, &mut at_b, "received"))
}

#[test]
fn vlan_tags_in_the_frame_and_beside_it_are_passed_by() {
    // What is sent has its tags in the frame: none, one and two can be read, a third is not IP. Of what arrives, the
    // kernel has taken the outer tag out of the frame before TC sees it: three tags, two in the frame, can be read.
    assert_eq!(tags(Mode::Tc), (3, 4));
    // XDP comes first: all tags are still in the frame.
    assert_eq!(tags(Mode::Xdp), (3, 3));
}

#[test]
fn a_bridge_and_what_hangs_on_it_are_counted_once_at_the_lowest_interface() {
    for mode in [Mode::Tc, Mode::Xdp] {
        // The interface is past GSO where there is none, and XDP is ahead of GRO.
        let (segments, headers) = match mode {
            Mode::Tc => (65_535, Headers::ETHERNET),
            Mode::Xdp => (1, Headers::VETH_WITH_XDP),
        };
        let (a, b) = cable(&format!("gso_max_segs {segments}"));
        let container = host();
        batch(
            &a,
            &format!(
                "link add br0 type bridge mcast_snooping 0 forward_delay 0
                 link add c0 gso_max_segs {segments} type veth peer name v gso_max_segs {segments} netns {}
                 link set v master br0
                 link set c0 master br0
                 link set br0 gso_max_segs {segments}",
                container.tid
            ),
        );
        // Nothing here has a device: it is for the user to name the interface that leads out, and that one alone.
        assert_eq!(chosen(&a, &["auto"]), [""; 0]);
        let names = chosen(&a, &["v"]);
        assert_eq!(names, ["v"]);
        let mut kernel = load(&a, mode, TcKind::Best);
        attach(&a, &mut kernel, &names);

        addresses(&a, "br0", 1);
        addresses(&b, "v", 2);
        addresses(&container, "v", 3);
        up(&[(&a, "v"), (&a, "c0"), (&a, "br0"), (&b, "v"), (&container, "v")]);
        let (of_a, of_container) = (SERVERS, ["192.0.2.2:7001", "[2001:db8::2]:7001"]);
        talk(&a, &b, &of_a);
        talk(&container, &b, &of_container);
        agrees(&a, &kernel, "v", headers, Before::default());
        is_counted_once(&mut kernel, &of_a);
        is_counted_once(&mut kernel, &of_container);
    }
}

#[test]
fn watching_a_bridge_and_its_port_counts_twice() {
    let (a, b) = cable("");
    batch(&a, "link add br0 type bridge mcast_snooping 0 forward_delay 0\nlink set v master br0");
    let mut kernel = load(&a, Mode::Tc, TcKind::Best);
    attach(&a, &mut kernel, &chosen(&a, &["*"]));
    a.ip("addr add 192.0.2.1/24 dev br0");
    b.ip("addr add 192.0.2.2/24 dev v");
    up(&[(&a, "v"), (&a, "br0"), (&b, "v")]);
    let sink = b.run(|| UdpSocket::bind("192.0.2.2:7000").unwrap());
    a.run(|| UdpSocket::bind("192.0.2.1:0").unwrap().send_to(b"once", "192.0.2.2:7000").unwrap());
    assert_eq!(sink.recv(&mut [0; 10]).unwrap(), 4);
    let flows = flows(&mut kernel);
    let (_, state) = flows.iter().find(|(flow, _)| flow.remote.port() == 7000).unwrap();
    assert_eq!(state.tx_packets, 2, "this is what the choice is there to avoid");
}

#[test]
fn a_macvlan_is_counted_once_at_the_interface_below() {
    let (a, b) = cable("");
    batch(&a, "link add m0 link v type macvlan mode bridge");
    assert_eq!(chosen(&a, &["auto"]), [""; 0]);
    let mut kernel = load(&a, Mode::Tc, TcKind::Best);
    attach(&a, &mut kernel, &chosen(&a, &["v"]));
    addresses(&a, "m0", 1);
    addresses(&b, "v", 2);
    up(&[(&a, "v"), (&a, "m0"), (&b, "v")]);
    talk(&a, &b, &SERVERS);
    agrees(&a, &kernel, "v", Headers::ETHERNET, Before::default());
    is_counted_once(&mut kernel, &SERVERS);
}
