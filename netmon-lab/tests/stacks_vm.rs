//! Stacks on network cards with the drivers of stock kernels: with `auto`, a packet is counted once, at the card, and
//! the counts are the card's own. And a USB network adapter that is plugged in while netmon looks. `cargo xtask vm`.
//!
//! The virtual machine has two e1000e cards at one hub and two virtio cards at another; one of each pair goes to host
//! `a`, which is watched, the other to host `b`.

#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use netmon_agent::clock::Now;
use netmon_agent::kernel::{Kernel, LoadOptions, Mode};
use netmon_agent::links::{self, Choice, Verdict};
use netmon_common::model::Hook;
use netmon_lab::wait;

#[expect(dead_code, reason = "other tests use the rest")]
#[path = "kernel/rig.rs"]
mod rig;
#[expect(dead_code, reason = "other tests use the rest")]
mod stack;

use rig::{Host, Loaded, chain, flows, stats};
use stack::{
    Before, Counters, Headers, acquaint, agrees, agrees_in_frames, agrees_in_packets, attach, batch, chosen,
    frame_by_frame, host, is_counted_once, talk, up,
};

/// The machine is emulated, on a PC that may be busy; what takes so long does not come.
const PATIENCE: Duration = Duration::from_secs(60);

/// Addresses of both ends on top of whatever is stacked; `a` has .1, `b` has .2.
const ENDS: [[&str; 2]; 2] = [["192.0.2.1", "2001:db8::1"], ["192.0.2.2", "2001:db8::2"]];

/// The emulated card counts the checksum behind a frame that it receives, and not the one behind a frame that it sends.
const E1000E: Headers = Headers { received: 14 + 4, ..Headers::ETHERNET };

/// Asks the machine around this one.
fn ask(request: &str) {
    let mut line = OpenOptions::new().read(true).write(true).open("/dev/ttyS2").unwrap();
    writeln!(line, "{request}").unwrap();
    let mut answer = String::new();
    BufReader::new(line).read_line(&mut answer).unwrap();
    assert_eq!(answer.trim(), "ok", "{request}");
}

fn modprobe(module: &str) {
    assert!(Command::new("modprobe").arg(module).status().unwrap().success(), "{module}");
}

/// Name of the interface with this hardware address in the machine's own network namespace, once it is there.
fn by_address(address: &str) -> String {
    let found = wait::until(PATIENCE, format!("an interface {address}"), || {
        let interfaces = fs::read_dir("/sys/class/net").unwrap();
        interfaces.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).find(|name| {
            let file = Path::new("/sys/class/net").join(name).join("address");
            fs::read_to_string(file).is_ok_and(|found| found.trim() == address)
        })
    });
    found.unwrap()
}

/// Two hosts with a network card each, `card`, and a hub between them. The cards say nothing of their own.
struct Wire {
    a: Host,
    b: Host,
    /// Of the servers that [`Wire::talk`] uses next.
    port: u16,
}

impl Wire {
    fn new(addresses: [&str; 2]) -> Self {
        let (a, b) = (host(), host());
        for (host, address) in [&a, &b].into_iter().zip(addresses) {
            let name = by_address(address);
            rig::ip(&format!("link set {name} down"));
            rig::ip(&format!("link set {name} netns {}", host.tid));
            batch(host, &format!("link set {name} name card\nlink set card addrgenmode none"));
        }
        Self { a, b, port: 7000 }
    }

    fn e1000e() -> Self {
        modprobe("e1000e");
        let wire = Self::new(["52:54:00:00:00:01", "52:54:00:00:00:02"]);
        for host in [&wire.a, &wire.b] {
            // Where an emulated card has to segment or to sum, other bytes of the frame change, too (QEMU 7.2).
            host.run(|| rig::sh("ethtool", "-K card tso off tx off"));
        }
        wire
    }

    fn virtio() -> Self {
        modprobe("virtio_net");
        Self::new(["52:54:00:00:01:01", "52:54:00:00:01:02"])
    }

    fn watch(&self, mode: Mode) -> (Loaded, Hook) {
        let mut options = self.a.options();
        options.mode = mode;
        let mut kernel = self.a.load(options);
        assert_eq!(chosen(&self.a, &["auto"]), ["card"]);
        let hook = attach(&self.a, &mut kernel, &["card".to_owned()])[0];
        println!("attached by {hook:?}");
        (kernel, hook)
    }

    /// Gives the ends their addresses on these interfaces, which have a known neighbour each, and brings all up.
    fn join(&self, top: [&str; 2]) {
        for ((host, name), addresses) in [&self.a, &self.b].into_iter().zip(top).zip(ENDS) {
            let [ipv4, ipv6] = addresses;
            batch(host, &format!("addr add {ipv4}/24 dev {name}\naddr add {ipv6}/64 dev {name} nodad"));
        }
        up(&[(&self.a, "card"), (&self.b, "card"), (&self.a, top[0]), (&self.b, top[1])]);
        acquaint([(&self.a, top[0], &ENDS[0]), (&self.b, top[1], &ENDS[1])]);
    }

    /// Talks over what [`Wire::join`] made; returns the servers, whose ports are used once.
    fn talk(&mut self) -> [String; 2] {
        let servers = ENDS[1].map(|address| {
            let address: std::net::IpAddr = address.parse().unwrap();
            std::net::SocketAddr::new(address, self.port).to_string()
        });
        self.port += 1;
        talk(&self.a, &self.b, &servers.each_ref().map(String::as_str));
        servers
    }

    /// Everything down, and what stands on the cards away.
    fn clear(&self, stacked: [&[&str]; 2]) {
        for (host, stacked) in [&self.a, &self.b].into_iter().zip(stacked) {
            for name in stacked {
                host.ip(&format!("link del {name}"));
            }
            host.ip("link set card nomaster");
            host.ip("link set card down");
            host.ip("addr flush dev card");
        }
    }

    /// Stacks something on the cards, and checks that `auto` counts at the card alone what the card counts.
    fn stack(&mut self, kernel: &mut Loaded, headers: Headers, stack: &Stack) {
        println!("{}", stack.what);
        self.clear([&[], &[]]);
        batch(&self.a, stack.a);
        batch(&self.b, stack.b);
        assert_eq!(chosen(&self.a, &["auto"]), ["card"], "{}", stack.what);
        frame_by_frame(&self.a, "card");
        frame_by_frame(&self.a, stack.top[0]);
        let before = ["card", stack.bytes].map(|name| Before::now(&self.a, kernel, name));
        self.join(stack.top);
        let servers = self.talk();
        agrees_in_frames(&self.a, kernel, "card", before[0]);
        agrees(&self.a, kernel, stack.bytes, headers, before[1]);
        is_counted_once(kernel, &servers.each_ref().map(String::as_str));
        self.clear(stack.remove);
    }
}

/// Something that stands on both cards.
struct Stack {
    what: &'static str,
    /// Commands of `ip` that make it.
    a: &'static str,
    b: &'static str,
    /// The interfaces with the addresses.
    top: [&'static str; 2],
    /// The interface whose bytes are compared: the card itself, unless it takes tags out of the frames and puts them in.
    /// Whether it counts them then, an emulated card decides anew each time that its driver resets it.
    bytes: &'static str,
    /// What is removed in the end.
    remove: [&'static [&'static str]; 2],
}

const PLAIN: Stack =
    Stack { what: "the card itself", a: "", b: "", top: ["card", "card"], bytes: "card", remove: [&[], &[]] };

const VLAN: Stack = Stack {
    what: "a VLAN, whose tag the driver takes out of the frame",
    a: "link add link card name card.7 type vlan id 7",
    b: "link add link card name card.7 type vlan id 7",
    top: ["card.7", "card.7"],
    bytes: "card.7",
    remove: [&["card.7"], &["card.7"]],
};

const QINQ: Stack = Stack {
    what: "a customer's VLAN in a provider's",
    a: "link add link card name outer type vlan proto 802.1ad id 100
        link add link outer name inner type vlan id 7
        link set outer addrgenmode none
        link set card up
        link set outer up",
    b: "link add link card name outer type vlan proto 802.1ad id 100
        link add link outer name inner type vlan id 7
        link set outer addrgenmode none
        link set card up
        link set outer up",
    top: ["inner", "inner"],
    bytes: "card",
    remove: [&["outer"], &["outer"]],
};

const BRIDGE: Stack = Stack {
    what: "a bridge",
    a: "link add br0 type bridge mcast_snooping 0 forward_delay 0
        link set card master br0",
    b: "",
    top: ["br0", "card"],
    bytes: "card",
    remove: [&["br0"], &[]],
};

const BOND: Stack = Stack {
    what: "a bond with a VLAN on it",
    a: "link add bond0 type bond mode active-backup miimon 100
        link set bond0 addrgenmode none
        link set card master bond0
        link set bond0 up
        link add link bond0 name bond0.7 type vlan id 7",
    b: "link add link card name card.7 type vlan id 7",
    top: ["bond0.7", "card.7"],
    bytes: "bond0.7",
    remove: [&["bond0.7", "bond0"], &["card.7"]],
};

const MACVLAN: Stack = Stack {
    what: "a macvlan",
    a: "link add mac0 link card type macvlan mode bridge",
    b: "",
    top: ["mac0", "card"],
    bytes: "card",
    remove: [&["mac0"], &[]],
};

#[test]
#[ignore = "runs inside the VM: cargo xtask vm"]
fn whatever_stands_on_a_card_is_counted_once_at_the_card() {
    let mut wire = Wire::e1000e();
    let (mut kernel, _) = wire.watch(Mode::Tc);

    // First as it comes: behind the hook the kernel segments what leaves, before it it puts together what arrives.
    wire.join(["card", "card"]);
    let servers = wire.talk();
    agrees_in_packets(&wire.a, &mut kernel, "card");
    is_counted_once(&mut kernel, &servers.each_ref().map(String::as_str));

    // The driver does nothing for a provider's tag.
    let two_tags = Headers { received: E1000E.received + 8, sent: E1000E.sent + 8, ..E1000E };
    for (stack, headers) in [
        (PLAIN, E1000E),
        (VLAN, Headers::VLAN),
        (QINQ, two_tags),
        (BRIDGE, E1000E),
        (BOND, Headers::VLAN),
        (MACVLAN, E1000E),
    ] {
        wire.stack(&mut kernel, headers, &stack);
    }
    wireguard(&mut wire, &mut kernel, E1000E);
    macsec(&mut wire, &mut kernel);
}

/// A WireGuard key: the file that holds it, and its public part.
fn wireguard_key(name: &str) -> (String, String) {
    let file = format!("/tmp/{name}.key");
    fs::write(&file, rig::sh("wg", "genkey")).unwrap();
    let public = Command::new("wg").arg("pubkey").stdin(File::open(&file).unwrap()).output().unwrap();
    (file, String::from_utf8(public.stdout).unwrap().trim().to_owned())
}

/// The tunnel's own packets are a flow of the card; what is in them is not seen.
fn wireguard(wire: &mut Wire, kernel: &mut Loaded, headers: Headers) {
    println!("WireGuard");
    wire.clear([&[], &[]]);
    for host in [&wire.a, &wire.b] {
        batch(host, "link add wg0 type wireguard");
    }
    let keys = ["a", "b"].map(wireguard_key);
    let outer = [("10.9.0.1", 51_820), ("10.9.0.2", 51_821)];
    for (host, own, other) in [(&wire.a, 0, 1), (&wire.b, 1, 0)] {
        let set = format!(
            "set wg0 private-key {} listen-port {} peer {} allowed-ips 0.0.0.0/0,::/0 endpoint {}:{}",
            keys[own].0, outer[own].1, keys[other].1, outer[other].0, outer[other].1
        );
        host.run(move || rig::sh("wg", &set));
        host.ip(&format!("addr add {}/24 dev card", outer[own].0));
    }
    assert_eq!(chosen(&wire.a, &["auto"]), ["card"]);
    let before = Before::now(&wire.a, kernel, "card");
    up(&[(&wire.a, "card"), (&wire.b, "card")]);
    acquaint([(&wire.a, "card", &[outer[0].0]), (&wire.b, "card", &[outer[1].0])]);
    wire.join(["wg0", "wg0"]);
    let servers = wire.talk();
    agrees(&wire.a, kernel, "card", headers, before);
    let flows = flows(kernel);
    let inner = flows.keys().filter(|flow| servers.contains(&flow.remote.to_string()));
    assert_eq!(inner.count(), 0, "{flows:?}");
    let tunnel: Vec<_> = flows.iter().filter(|(flow, _)| flow.remote.port() == 51_821).collect();
    let [(_, tunnel)] = tunnel[..] else { panic!("{tunnel:?}") };
    // What talk sends over two families, both ways.
    assert!(tunnel.tx_payload > 6_000_000 && tunnel.rx_payload > 2_000_000, "{tunnel:?}");
    wire.clear([&["wg0"], &["wg0"]]);
}

/// On the card its frames are encrypted: `auto` watches the MACsec interface, too.
fn macsec(wire: &mut Wire, kernel: &mut Loaded) {
    println!("MACsec");
    wire.clear([&[], &[]]);
    let hosts = [&wire.a, &wire.b];
    let addresses = hosts.map(|host| host.run(|| fs::read_to_string("/sys/class/net/card/address")).unwrap());
    for (host, own, other) in [(&wire.a, 0, 1), (&wire.b, 1, 0)] {
        // One key for both directions: nobody listens here.
        let (key, there) = ("000102030405060708090a0b0c0d0e0f", addresses[other].trim());
        batch(
            host,
            &format!(
                "link add link card macsec0 type macsec encrypt on
                 macsec add macsec0 tx sa 0 pn 1 on key 0{own} {key}
                 macsec add macsec0 rx address {there} port 1
                 macsec add macsec0 rx address {there} port 1 sa 0 pn 1 on key 0{other} {key}"
            ),
        );
    }
    assert_eq!(chosen(&wire.a, &["auto"]), ["card", "macsec0"]);
    attach(&wire.a, kernel, &["macsec0".to_owned()]);
    frame_by_frame(&wire.a, "macsec0");
    let before = stats(kernel);
    let card_before = Counters::of(&wire.a, "card").frames();
    wire.join(["macsec0", "macsec0"]);
    let servers = wire.talk();
    is_counted_once(kernel, &servers.each_ref().map(String::as_str));
    // Each packet is seen twice: once as what it is, and once as a frame that cannot be read.
    rig::eventually(|| {
        let now = stats(kernel);
        let card = Counters::of(&wire.a, "card").frames() - card_before;
        let (seen, not_ip) = (now.seen - before.seen, now.not_ip - before.not_ip);
        let read = (now.counted + now.other_protocol) - (before.counted + before.other_protocol);
        let is_all =
            not_ip == card && read == Counters::of(&wire.a, "macsec0").frames() && seen == card + read;
        if is_all {
            Ok(())
        } else {
            Err(format!("card {card}, programs {seen}: {not_ip} not IP, {read} read"))
        }
    });
    let index = wire.a.ifindex("macsec0");
    kernel.run(move |kernel| kernel.detach(index)).unwrap();
    wire.clear([&["macsec0"], &["macsec0"]]);
}

#[test]
#[ignore = "runs inside the VM: cargo xtask vm"]
fn xdp_takes_the_place_of_tc_ingress_on_cards() {
    let mut e1000e = Wire::e1000e();
    let (mut kernel, hook) = e1000e.watch(Mode::Xdp);
    assert!(matches!(hook, Hook::XdpTcx | Hook::XdpClsact), "{hook:?}");
    assert!(e1000e.a.ip("link show dev card").contains(" xdpgeneric "), "the driver has no XDP of its own");
    for (stack, headers) in [(PLAIN, E1000E), (VLAN, Headers::VLAN), (BRIDGE, E1000E)] {
        e1000e.stack(&mut kernel, headers, &stack);
    }
    drop(kernel);

    let mut virtio = Wire::virtio();
    let (mut kernel, hook) = virtio.watch(Mode::Xdp);
    assert!(matches!(hook, Hook::XdpTcx | Hook::XdpClsact), "{hook:?}");
    assert!(virtio.a.ip("link show dev card").contains(" xdp "), "the driver has XDP of its own");
    for (stack, headers) in [(PLAIN, Headers::ETHERNET), (VLAN, Headers::VLAN), (BOND, Headers::VLAN)] {
        virtio.stack(&mut kernel, headers, &stack);
    }
}

#[test]
#[ignore = "runs inside the VM: cargo xtask vm"]
fn a_usb_network_adapter_is_watched_within_a_second_and_counted() {
    const ADDRESSES: [&str; 2] = ["52:54:00:00:02:01", "52:54:00:00:02:02"];
    let plug = |id: &str, address: &str| ask(&format!("plug {id} usb-net mac={address}"));
    let kernel = Kernel::load(LoadOptions::default()).unwrap_or_else(|error| panic!("{}", chain(&error)));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (watched, kernel) = runtime.block_on(async {
        let (changes, mut lists) = tokio::sync::mpsc::channel(4);
        let following = tokio::spawn(links::follow(changes));
        let auto = Choice::new(&[Choice::AUTO.to_owned()]).unwrap();
        let mut kernel = kernel;
        // As on a PC that has another interface: the kernel's modules for filters are there already.
        rig::ip("link add other type dummy");
        let other = links::list().await.unwrap().into_iter().find(|link| link.name == "other").unwrap();
        kernel.attach(other.index).unwrap_or_else(|error| panic!("{}", chain(&error)));
        let before = lists.recv().await.unwrap();
        // The adapter's driver tells when it is there; the clocks are the same.
        let there = std::thread::spawn(|| {
            let name = by_address(ADDRESSES[0]);
            (name, Now::read().boot_ns)
        });
        tokio::task::spawn_blocking(move || plug("usb1", ADDRESSES[0])).await.unwrap();
        let watched = loop {
            let list = tokio::time::timeout(PATIENCE, lists.recv()).await.unwrap().unwrap();
            let verdicts = auto.judge(&list);
            let is_new = |index| before.iter().all(|link| link.index != index);
            let new = list.iter().find(|link| verdicts[&link.index] == Verdict::Watch && is_new(link.index));
            if let Some(link) = new {
                kernel.attach(link.index).unwrap_or_else(|error| panic!("{}", chain(&error)));
                break (link.name.clone(), Now::read().boot_ns);
            }
        };
        following.abort();
        ((watched, there.join().unwrap()), kernel)
    });
    let ((_, attached_ns), (_, there_ns)) = &watched;
    let late_ms = attached_ns.saturating_sub(*there_ns) / 1_000_000;
    println!("the adapter was watched {late_ms} ms after it was there");
    assert!(late_ms < 1_000);
    drop(kernel);
    rig::ip("link del other");

    plug("usb2", ADDRESSES[1]);
    let mut wire = Wire::new(ADDRESSES);
    let (mut kernel, _) = wire.watch(Mode::Tc);
    wire.join(["card", "card"]);
    let servers = wire.talk();
    // In packets: the driver counts bytes of its own, too, which end a USB transfer.
    agrees_in_packets(&wire.a, &mut kernel, "card");
    is_counted_once(&mut kernel, &servers.each_ref().map(String::as_str));
    ask("unplug usb1");
    ask("unplug usb2");
}
