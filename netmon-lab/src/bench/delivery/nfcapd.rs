//! nfcapd: NetFlow version 5 in over UDP, compressed files out. Nothing is acknowledged: the rate without loss is sought.

use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::server::{bytes_below, interrupt};
use super::throughput::Measured;
use crate::bench::process::cpu_of_group;
use crate::clock;
use crate::netmon::{Daemon, PATIENCE};
use crate::wait;

/// Flows in a packet.
const FLOWS: usize = 30;
/// Flows per second that are tried, one after the other, until some are lost.
const RATES: [u32; 9] =
    [125_000, 250_000, 500_000, 750_000, 1_000_000, 1_500_000, 2_000_000, 3_000_000, 4_000_000];
/// nfcapd's socket buffer, as its manual advises for high rates.
const BUFFER: &str = "4000000";

/// The highest rate at which nothing was lost, and what it cost.
///
/// # Errors
/// nfcapd does not start, does not say what it saw, or loses flows at the lowest rate.
pub fn measure(directory: &Path, length: Duration) -> Result<Measured> {
    let mut best = None;
    for rate in RATES {
        let (measured, seen) = try_rate(directory, rate, length)?;
        if seen < measured.events {
            break;
        }
        best = Some(measured);
    }
    best.with_context(|| format!("nfcapd loses flows at {} a second", RATES[0]))
}

fn try_rate(directory: &Path, rate: u32, length: Duration) -> Result<(Measured, u64)> {
    let files = directory.join("flows");
    fs::create_dir_all(&files)?;
    let address = UdpSocket::bind("127.0.0.1:0")?.local_addr()?;
    let mut command = Command::new("nfcapd");
    command.args(["-z", "-b", "127.0.0.1", "-B", BUFFER, "-p", &address.port().to_string(), "-w"]);
    command.arg(&files).process_group(0);
    let mut daemon = Daemon::start("nfcapd".to_owned(), command, &directory.join("output.txt"))?;
    daemon.wait_until("it to listen", || listens(address))?;

    let before = cpu_of_group(daemon.pid())?;
    let (events, took) = send(address, rate, length)?;
    let cpu = || cpu_of_group(daemon.pid()).unwrap_or_default();
    let cpu = wait::unchanged(Duration::from_millis(300), PATIENCE, "nfcapd to be done", cpu)? - before;
    interrupt(&daemon)?;
    daemon.wait_end()?;
    let said = daemon.said();
    let seen = flows(&said).with_context(|| format!("nfcapd does not say what it saw; it said:\n{said}"))?;
    let store = bytes_below(&files);
    fs::remove_dir_all(directory)?;
    let wire = Some(events / FLOWS as u64 * PACKET as u64);
    ensure!(events > 0, "no flows were sent");
    Ok((Measured { events, took, cpu, wire, store: Some(store), logs: None }, seen))
}

const PACKET: usize = 24 + FLOWS * 48;

/// Sends flows at `rate`, as evenly as the clock allows; how many, and how long it took.
fn send(address: SocketAddr, rate: u32, length: Duration) -> Result<(u64, Duration)> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.connect(address)?;
    let began = clock::now();
    let mut sent = 0_u64;
    loop {
        let elapsed = began.elapsed();
        if elapsed >= length {
            return Ok((sent, elapsed));
        }
        let due = (elapsed.as_secs_f64() * f64::from(rate)) as u64;
        while sent + FLOWS as u64 <= due {
            socket.send(&packet(sent as u32))?;
            sent += FLOWS as u64;
        }
        thread::sleep(Duration::from_micros(200));
    }
}

/// A packet of [`FLOWS`] flows behind `sequence` others: header and records as in Cisco's "NetFlow Export Datagram Format",
/// version 5.
fn packet(sequence: u32) -> [u8; PACKET] {
    let mut packet = [0; PACKET];
    let mut put = |at: usize, bytes: &[u8]| packet[at..at + bytes.len()].copy_from_slice(bytes);
    let seconds = (clock::wall_ns() / 1_000_000_000) as u32;
    put(0, &5_u16.to_be_bytes());
    put(2, &(FLOWS as u16).to_be_bytes());
    // Up for ten minutes.
    put(4, &600_000_u32.to_be_bytes());
    put(8, &seconds.to_be_bytes());
    put(16, &sequence.to_be_bytes());
    for index in 0..FLOWS {
        let (at, number) = (24 + index * 48, sequence.wrapping_add(index as u32));
        let mixed = number.wrapping_mul(2_654_435_761);
        put(at, &(0x0a4d_0000 | (number % 256)).to_be_bytes());
        put(at + 4, &(0xc633_0000 | mixed >> 16).to_be_bytes());
        put(at + 16, &(mixed % 5_000 + 1).to_be_bytes());
        put(at + 20, &(mixed % 5_000_000 + 60).to_be_bytes());
        put(at + 24, &597_000_u32.to_be_bytes());
        put(at + 28, &(598_000 + mixed % 1_000).to_be_bytes());
        put(at + 32, &((mixed >> 8) as u16 | 1024).to_be_bytes());
        put(at + 34, &443_u16.to_be_bytes());
        // TCP, flags SYN ACK PSH FIN.
        put(at + 37, &[0x1b, 6]);
    }
    packet
}

/// A UDP socket is bound to this address.
fn listens(address: SocketAddr) -> bool {
    let sockets = fs::read_to_string("/proc/net/udp").unwrap_or_default();
    let wanted = format!(":{:04X} ", address.port());
    sockets.lines().filter_map(|line| line.split_once(": ")).any(|(_, line)| {
        line.split_once(' ').is_some_and(|(local, _)| format!("{local} ").ends_with(&wanted))
    })
}

/// `Ident: 'none' Flows: 30, Packets: …`, at the end of each file.
fn flows(said: &str) -> Option<u64> {
    let counts = said.split("Flows: ").skip(1);
    let numbers = counts.filter_map(|rest| rest.split(',').next()?.trim().parse::<u64>().ok());
    numbers.reduce(|sum, number| sum + number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flows_of_all_files_are_added() {
        let said = "Ident: 'none' Flows: 30, Packets: 1, Bytes: 2\nIdent: 'none' Flows: 12, Packets: 1\n";
        assert_eq!(flows(said), Some(42));
        assert_eq!(flows("Bound to IPv4 host"), None);
    }

    #[test]
    fn a_packet_says_where_it_stands() {
        let packet = packet(60);
        assert_eq!((packet[..4].to_vec(), packet[16..20].to_vec()), (vec![0, 5, 0, 30], vec![0, 0, 0, 60]));
    }
}
