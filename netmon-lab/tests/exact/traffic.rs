//! Both hosts send to each other, by sockets of all kinds, and know what they sent.
//!
//! Nobody has more under way than the shortest queue on the cable holds (256 frames with XDP): what a queue drops behind
//! the egress hook no counter of the interface has.

use std::collections::HashMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fastrand::Rng;
use netmon_agent::kernel::FlowId;
use netmon_lab::bench::pair::{Pair, RECEIVER, RECEIVER6, SENDER, SENDER6, inside};
use netmon_lab::bench::source::index_of;
use netmon_lab::host::Host;
use netmon_lab::packet::PacketSocket;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, ipproto, sockopt};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::mix::{Crafted, Fate, Side};

/// How much each host sends.
#[derive(Clone, Copy, Debug)]
pub struct Amount {
    /// Frames that are made here, byte by byte.
    pub frames: u64,
    /// Flows of these.
    pub flows: u32,
    /// UDP datagrams, many of them longer than the MTU.
    pub datagrams: u32,
    /// TCP connections, one after the other for each family.
    pub connections: u32,
    /// ICMP echo requests for each family.
    pub pings: u32,
}

/// Packets, and their bytes as netmon counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    pub packets: u64,
    pub bytes: u64,
}

impl Sum {
    fn add(&mut self, packets: u64, bytes: u64) {
        self.packets += packets;
        self.bytes += bytes;
    }
}

impl std::ops::Add for Sum {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { packets: self.packets + other.packets, bytes: self.bytes + other.bytes }
    }
}

/// What a host sent that must not be in a flow, and the flows that it knows.
#[derive(Clone, Debug, Default)]
pub struct Truth {
    pub not_ip: Sum,
    pub other_protocol: Sum,
    pub malformed: Sum,
    /// Of these, with a VLAN tag that is in `bytes`.
    pub not_ip_tagged: u64,
    pub malformed_tagged: u64,
    /// Bytes of IP packets' frames that are neither in the Ethernet header nor in the packet: tags and padding.
    pub around: u64,
    /// Crafted flows, as the sender sees them.
    pub flows: HashMap<FlowId, Sum>,
}

impl Truth {
    fn sent(&mut self, crafted: &Crafted, times: u64) {
        let sum = match crafted.fate {
            Fate::Counted => None,
            Fate::NotIp => Some(&mut self.not_ip),
            Fate::OtherProtocol => Some(&mut self.other_protocol),
            Fate::Malformed => Some(&mut self.malformed),
        };
        if let Some(sum) = sum {
            sum.add(times, times * crafted.bytes);
        }
        let tagged = if crafted.tags > 0 { times } else { 0 };
        match crafted.fate {
            Fate::NotIp => self.not_ip_tagged += tagged,
            Fate::Malformed => self.malformed_tagged += tagged,
            Fate::Counted | Fate::OtherProtocol => {
                self.around += times * (crafted.frame.len() as u64 - 14 - crafted.bytes);
            }
        }
        if let Some(flow) = crafted.flow {
            self.flows.entry(flow).or_default().add(times, times * crafted.bytes);
        }
    }
}

/// One direction.
#[derive(Clone, Copy)]
struct Way<'a> {
    from: &'a Host,
    to: &'a Host,
    own: [IpAddr; 2],
    other: [IpAddr; 2],
    side: Side,
    /// Tells the directions' random numbers and CPUs apart.
    number: usize,
}

const ECHO: u16 = 7001;
const SINK: u16 = 7002;
const STREAM: u16 = 7003;
/// Frames that a sender has under way.
const WINDOW: usize = 32;
/// Bytes that a TCP connection has under way; the kernel's own overhead is counted in.
const STREAM_WINDOW: usize = 16_384;
/// Nobody waits longer for an answer: something was lost.
const PATIENCE: Duration = Duration::from_secs(20);
/// How soon a server notices that it is not needed any more.
const LOOK: Duration = Duration::from_millis(20);

/// Sends in both directions at once; returns what the sender and the receiver of the pair have sent.
pub fn exchange(pair: &Pair, amount: Amount) -> (Truth, Truth) {
    let address = |text: &str| text.parse::<IpAddr>().unwrap();
    let (a, b) = ([address(SENDER), address(SENDER6)], [address(RECEIVER), address(RECEIVER6)]);
    let there =
        Way { from: pair.sender(), to: pair.receiver(), own: a, other: b, side: Side::new(false), number: 0 };
    let back = Way {
        from: there.to,
        to: there.from,
        own: there.other,
        other: there.own,
        side: Side::new(true),
        number: 1,
    };
    let ((mut a, echoed_by_b), (mut b, echoed_by_a)) = thread::scope(|scope| {
        let ways = [there, back].map(|way| scope.spawn(move || way.send(amount).unwrap()));
        let [a, b] = ways.map(|way| way.join().unwrap());
        (a, b)
    });
    a.other_protocol = a.other_protocol + echoed_by_a;
    b.other_protocol = b.other_protocol + echoed_by_b;
    (a, b)
}

/// The other host's end of the sockets.
struct Servers {
    echo: UdpSocket,
    streams: [TcpListener; 2],
    _sinks: [UdpSocket; 2],
}

/// Tells the servers to end, also when a sender fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Way<'_> {
    /// What was sent, and the echo requests in it.
    fn send(self, amount: Amount) -> Result<(Truth, Sum)> {
        let servers = inside(self.to, || {
            let echo = UdpSocket::bind((self.other[0], ECHO))?;
            echo.set_read_timeout(Some(LOOK))?;
            let listen = |address| -> Result<TcpListener> {
                let listener = TcpListener::bind((address, STREAM))?;
                listener.set_nonblocking(true)?;
                Ok(listener)
            };
            let [a, b] = self.other;
            // Nobody reads what these get: it has passed the hooks when it arrives.
            let _sinks = [UdpSocket::bind((a, SINK))?, UdpSocket::bind((b, SINK))?];
            Ok(Servers { echo, streams: [listen(a)?, listen(b)?], _sinks })
        })?;
        let end = AtomicBool::new(false);
        thread::scope(|scope| {
            let (end, stop) = (&end, Stop(&end));
            scope.spawn(|| echo(&servers.echo, end));
            for listener in &servers.streams {
                scope.spawn(|| serve(listener, end));
            }
            let senders = [
                scope.spawn(move || inside(self.from, || self.datagrams(amount))),
                scope.spawn(move || inside(self.from, || self.connect(amount, 0))),
                scope.spawn(move || inside(self.from, || self.connect(amount, 1))),
            ];
            let pings = scope.spawn(move || inside(self.from, || self.ping(amount)));
            let crafted = inside(self.from, || self.crafted(amount));
            for sender in senders {
                sender.join().expect("a sender panicked")?;
            }
            let pinged = pings.join().expect("the pings' sender panicked")?;
            drop(stop);
            let mut truth = crafted?;
            truth.other_protocol = truth.other_protocol + pinged;
            Ok((truth, pinged))
        })
    }

    fn fence(self) -> Result<Fence> {
        let socket = UdpSocket::bind((self.own[0], 0))?;
        socket.connect((self.other[0], ECHO))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Fence(socket))
    }

    /// Whole frames: all kinds, some flows with most of the packets and many with few, from one CPU and from another.
    fn crafted(self, amount: Amount) -> Result<Truth> {
        const BUSY: usize = 8;
        let socket = PacketSocket::open(index_of(self.from)?)?;
        let fence = self.fence()?;
        let mut random = Rng::with_seed(self.number as u64);
        let mut mix = self.side.oddities();
        let odd = mix.len();
        let lengths: Vec<_> = (0..amount.flows).map(|_| random.usize(..1401)).collect();
        mix.extend((0..).zip(lengths).map(|(flow, length)| self.side.packet(flow, length)));
        let mut times = vec![0_u64; mix.len()];
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let mut burst = Vec::with_capacity(WINDOW);
        let mut sent = 0;
        while sent < amount.frames {
            // Eight times, each direction from another CPU than the other one.
            if sent * 8 / amount.frames != (sent + WINDOW as u64) * 8 / amount.frames || sent == 0 {
                let mut here = CpuSet::new();
                here.set((self.number + (sent * 8 / amount.frames) as usize) % cpus);
                sched_setaffinity(None, &here).context("cannot change the CPU")?;
            }
            burst.clear();
            for _ in 0..WINDOW.min((amount.frames - sent) as usize) {
                let which = match random.usize(..16) {
                    0 => random.usize(..odd),
                    1..8 => odd + random.usize(..BUSY),
                    _ => odd + random.usize(..mix.len() - odd),
                };
                times[which] += 1;
                burst.push(mix[which].frame.as_slice());
            }
            socket.send_all(&burst).context("cannot send frames")?;
            sent += burst.len() as u64;
            fence.wait()?;
        }
        let mut truth = Truth::default();
        for (crafted, times) in mix.iter().zip(times).filter(|(_, times)| *times > 0) {
            truth.sent(crafted, times);
        }
        Ok(truth)
    }

    /// UDP of all sizes, over both families; what is longer than the MTU goes in fragments.
    fn datagrams(self, amount: Amount) -> Result<()> {
        const SOCKETS: usize = 64;
        let fence = self.fence()?;
        let mut random = Rng::with_seed(10 + self.number as u64);
        let sockets: Vec<_> = (0..SOCKETS)
            .map(|number| -> Result<UdpSocket> {
                let socket = UdpSocket::bind((self.own[number % 2], 0))?;
                socket.connect((self.other[number % 2], SINK))?;
                Ok(socket)
            })
            .collect::<Result<_>>()?;
        let payload = vec![5; 60_000];
        let mut under_way = 0;
        for _ in 0..amount.datagrams {
            let longest = [1_472, 9_000, 60_000][[0, 0, 0, 0, 1, 1, 1, 2][random.usize(..8)]];
            let length = random.usize(..longest + 1);
            sockets[random.usize(..SOCKETS)].send(&payload[..length])?;
            under_way += length / 1_448 + 1;
            if under_way >= WINDOW {
                fence.wait()?;
                under_way = 0;
            }
        }
        fence.wait()
    }

    /// TCP connections that carry little and much, both ways.
    fn connect(self, amount: Amount, family: usize) -> Result<()> {
        for number in 0..amount.connections {
            let length = [1, 1_000, 30_000, 300_000][number as usize % 4];
            let mut stream = TcpStream::connect((self.other[family], STREAM))?;
            narrow(&stream)?;
            stream.write_all(&vec![3; length])?;
            stream.shutdown(Shutdown::Write)?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)?;
            ensure!(answer.len() == length / 2, "{} of {length} bytes were answered", answer.len());
        }
        Ok(())
    }

    /// ICMP echo requests, some in fragments; the other host's kernel answers each with as many packets and bytes.
    fn ping(self, amount: Amount) -> Result<Sum> {
        const MTU: u64 = 1_500;
        let mut random = Rng::with_seed(20 + self.number as u64);
        let mut sum = Sum::default();
        let identity = [0x6e, self.number as u8];
        // Family, protocol, types of request and reply, header of the whole packet and of each fragment.
        let families = [
            (AddressFamily::INET, ipproto::ICMP, 8, 0, 20, 20),
            (AddressFamily::INET6, ipproto::ICMPV6, 128, 129, 40, 48),
        ];
        for (family, (domain, protocol, request, reply, header, fragment_header)) in
            families.into_iter().enumerate()
        {
            let socket = rustix::net::socket(domain, SocketType::RAW, Some(protocol))?;
            rustix::net::connect(&socket, &SocketAddr::new(self.other[family], 0))?;
            sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE))?;
            // It gets the other host's requests as well, and that one need not wait for this thread.
            sockopt::set_socket_recv_buffer_size_force(&socket, 64 << 20)?;
            for number in 0..amount.pings as u16 {
                let mut message = vec![request, 0, 0, 0, identity[0], identity[1]];
                message.extend(number.to_be_bytes());
                message.resize(8 + random.usize(..4_000), 9);
                if family == 0 {
                    let sum = !checksum(&message);
                    message[2..4].copy_from_slice(&sum.to_be_bytes());
                }
                rustix::net::send(&socket, &message, SendFlags::empty())?;
                let length = message.len() as u64;
                if length + header <= MTU {
                    sum.add(1, length + header);
                } else {
                    // All but the last are a multiple of eight bytes long.
                    let fragments = length.div_ceil((MTU - fragment_header) & !7);
                    sum.add(fragments, length + fragments * fragment_header);
                }
                let mut buffer = [0; 5_000];
                loop {
                    let (received, _) = rustix::net::recv(&socket, &mut buffer, RecvFlags::empty())
                        .with_context(|| {
                            format!("echo request {number} of {length} bytes has no answer (family {family})")
                        })?;
                    // A raw socket of IPv4 gets the IP header, one of IPv6 does not.
                    let at = if family == 0 { usize::from(buffer[0] & 15) * 4 } else { 0 };
                    let answer = &buffer[at..received];
                    if answer[0] == reply && answer[4..6] == identity && answer[6..8] == number.to_be_bytes()
                    {
                        ensure!(answer.len() == message.len(), "an answer of another length");
                        break;
                    }
                }
            }
        }
        Ok(sum)
    }
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|two| u32::from(two[0]) << 8 | u32::from(*two.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Waits until all that was sent before it on this CPU has arrived.
struct Fence(UdpSocket);

impl Fence {
    fn wait(&self) -> Result<()> {
        self.0.send(b"?")?;
        self.0.recv(&mut [0; 1]).context("no echo: frames were lost on the cable")?;
        Ok(())
    }
}

fn echo(socket: &UdpSocket, end: &AtomicBool) {
    let mut buffer = [0; 16];
    while !end.load(Ordering::Relaxed) {
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            socket.send_to(&buffer[..length], from).unwrap();
        }
    }
}

fn narrow(stream: &TcpStream) -> Result<()> {
    sockopt::set_socket_send_buffer_size(stream, STREAM_WINDOW)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(())
}

/// Reads each connection to its end and answers with half as much.
fn serve(listener: &TcpListener, end: &AtomicBool) {
    loop {
        let mut stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if end.load(Ordering::Relaxed) {
                    return;
                }
                thread::sleep(Duration::from_millis(1));
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        stream.set_nonblocking(false).unwrap();
        narrow(&stream).unwrap();
        let mut request = Vec::new();
        stream.read_to_end(&mut request).unwrap();
        stream.write_all(&request[..request.len() / 2]).unwrap();
    }
}
