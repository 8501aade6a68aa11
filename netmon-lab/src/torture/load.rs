//! Traffic that makes hundreds of records a second: ever new UDP transfers, and TCP transfers that come again.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::bench::pair::inside;
use crate::host::Host;
use crate::room::{self, Room};

/// Between two datagrams: some 900 transfers a second that begin, and as many that end two seconds later.
const DATAGRAM_EVERY: Duration = Duration::from_millis(1);
/// UDP ports that take turns: none comes again within the two seconds that end a transfer.
const UDP_PORTS: std::ops::Range<u16> = 10_000..60_000;
/// Each so many datagrams one goes where the filter list mutes.
const MUTED_EVERY: u64 = 50;
/// Between two TCP connections.
const CONNECT_EVERY: Duration = Duration::from_millis(50);
/// TCP ports of the Internet's host that take turns: one comes again after 3.2 s.
const TCP_PORTS: std::ops::Range<u16> = 8_000..8_064;
/// Each so many connections one goes to the other PC: every 2.5 s.
const LAN_EVERY: u64 = 50;
/// TCP port of the other PC.
const LAN_PORT: u16 = 9_000;
/// Longest wait for the other side of a connection.
const PATIENCE: Duration = Duration::from_secs(5);

/// What was sent so far, and whether that is enough.
#[derive(Debug, Default)]
pub struct Load {
    stop: AtomicBool,
    datagrams: AtomicU64,
    connections: AtomicU64,
}

impl Load {
    /// Ends the traffic.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Datagrams and TCP connections so far.
    pub fn sent(&self) -> (u64, u64) {
        (self.datagrams.load(Ordering::Relaxed), self.connections.load(Ordering::Relaxed))
    }

    /// Makes the traffic, until it is stopped.
    ///
    /// # Errors
    /// A host cannot be entered, or a port is taken.
    pub fn run(&self, room: &Room) -> Result<()> {
        let make = [
            (room.pc(1), Self::send_datagrams as fn(&Self) -> io::Result<()>),
            (room.pc(1), Self::connect),
            (room.host("web"), |load| load.serve(TCP_PORTS)),
            (room.pc(2), |load| load.serve(LAN_PORT..LAN_PORT + 1)),
        ];
        thread::scope(|scope| {
            let threads = make.map(|(host, work)| scope.spawn(move || self.inside(host, work)));
            let ends = threads.map(|thread| {
                thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread of the load died")))
            });
            ends.into_iter().collect()
        })
    }

    fn inside(&self, host: &Host, work: fn(&Self) -> io::Result<()>) -> Result<()> {
        let done = inside(host, || Ok(work(self)?));
        // Without one of its parts it is not the load that was meant.
        self.stop();
        done.with_context(|| format!("the load in {}", host.name()))
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    fn send_datagrams(&self) -> io::Result<()> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        for (number, port) in (0_u64..).zip(UDP_PORTS.cycle()) {
            if !self.goes_on() {
                break;
            }
            let to = if number % MUTED_EVERY == 0 { room::CLOUD } else { room::WEB };
            // Nobody listens there; who is told so goes on.
            let sent = socket.send_to(&[b'x'; 100], (to, port));
            self.datagrams.fetch_add(u64::from(sent.is_ok()), Ordering::Relaxed);
            thread::sleep(DATAGRAM_EVERY);
        }
        Ok(())
    }

    fn connect(&self) -> io::Result<()> {
        for (number, port) in (0_u64..).zip(TCP_PORTS.cycle()) {
            if !self.goes_on() {
                break;
            }
            let (to, bytes) = match number % LAN_EVERY {
                0 => (format!("{}:{LAN_PORT}", room::lan(2)), 100_000),
                _ => (format!("{}:{port}", room::WEB), 1_000),
            };
            let to: SocketAddr = to.parse().map_err(io::Error::other)?;
            // The servers may not be bound yet, or have ended.
            let copied = copy(to, bytes);
            self.connections.fetch_add(u64::from(copied.is_ok()), Ordering::Relaxed);
            thread::sleep(CONNECT_EVERY);
        }
        Ok(())
    }

    fn serve(&self, ports: std::ops::Range<u16>) -> io::Result<()> {
        let listeners = ports.map(|port| {
            let listener = TcpListener::bind(("0.0.0.0", port))?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        });
        let listeners = listeners.collect::<io::Result<Vec<_>>>()?;
        while self.goes_on() {
            for listener in &listeners {
                let Ok((mut stream, _)) = listener.accept() else { continue };
                // What comes is not looked at, and a connection that breaks is the other side's loss.
                let _ = stream
                    .set_nonblocking(false)
                    .and_then(|()| stream.set_read_timeout(Some(PATIENCE)))
                    .and_then(|()| io::copy(&mut stream, &mut io::sink()));
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

fn copy(to: SocketAddr, bytes: usize) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&vec![b'x'; bytes])?;
    stream.shutdown(Shutdown::Write)?;
    stream.read(&mut [0]).map(drop)
}
