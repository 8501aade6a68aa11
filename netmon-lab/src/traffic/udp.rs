//! Datagrams.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::thread;
use std::time::Duration;

use super::{Connect, Report, Serve};
use crate::clock;

/// Takes datagrams; it does not answer.
pub(super) fn serve(serve: &Serve, count: u32) -> io::Result<Report> {
    serve.begin();
    let socket = UdpSocket::bind(serve.listen)?;
    serve.ready()?;
    let mut buffer = vec![0; usize::from(u16::MAX)];
    let mut report = Report::default();
    for _ in 0..count {
        report.received += socket.recv(&mut buffer)? as u64;
    }
    Ok(report)
}

pub(super) fn send(connect: &Connect, count: u32, size: u16, rate: Option<u32>) -> io::Result<Report> {
    connect.begin();
    let socket = connected(connect.to)?;
    let payload = vec![b'x'; usize::from(size)];
    let began = clock::now();
    let mut report = Report::default();
    for number in 0..count {
        if let Some(rate) = rate {
            let due = Duration::from_secs_f64(f64::from(number) / f64::from(rate.max(1)));
            thread::sleep(due.saturating_sub(began.elapsed()));
        }
        report.sent += socket.send(&payload)? as u64;
    }
    Ok(report)
}

/// Ports of the other side that one socket sends to; for more flows there are more sockets.
const PORTS: u32 = 50_000;

pub(super) fn scan(connect: &Connect, flows: u32, rate: u32) -> io::Result<Report> {
    connect.begin();
    let any: IpAddr =
        if connect.to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let sockets =
        (0..flows.div_ceil(PORTS)).map(|_| UdpSocket::bind((any, 0))).collect::<io::Result<Vec<_>>>()?;
    let began = clock::now();
    let mut report = Report::default();
    for number in 0..flows {
        // The clock is asked once in a hundred: the rate is a bound, not a promise.
        if number % 100 == 0 {
            let due = Duration::from_secs_f64(f64::from(number) / f64::from(rate.max(1)));
            thread::sleep(due.saturating_sub(began.elapsed()));
        }
        let Some(socket) = sockets.get((number / PORTS) as usize) else { break };
        let port = connect.to.port().wrapping_add((number % PORTS) as u16).max(1);
        report.sent += socket.send_to(b"x", SocketAddr::new(connect.to.ip(), port))? as u64;
    }
    Ok(report)
}

/// A socket that speaks to this address alone.
pub(super) fn connected(to: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(to)?;
    Ok(socket)
}
