//! Real traffic: programs that run inside the room's hosts, as hidden subcommands of `netmon-lab`.
//!
//! Each is bounded in bytes and in time. A server says "ready" when it is bound, serves as many connections as it was
//! told and ends. Each connection makes one line of JSON, a [`Report`] of what the program itself sent and received.

mod dns;
mod plan;
mod quic;
mod tcp;
mod tls;
mod udp;
mod web;

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use std::{io, process, thread};

use clap::{Args, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::udev_inject::{Action, Stick};

pub use plan::{Plan, PlanError, Step};

/// Most bytes that one connection carries in one direction.
pub const MAX_BYTES: u64 = 1_000_000_000;
/// Exit status of a generator that ran out of its time.
const OUT_OF_TIME: i32 = 3;

/// What one connection carried, as the program saw it: payload only, without headers and retransmissions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Bytes that the program gave to the connection.
    pub sent: u64,
    /// Bytes that the program got from it.
    pub received: u64,
}

/// A server's end.
#[derive(Args, Debug)]
pub struct Serve {
    /// Address and port to listen on
    #[arg(long)]
    listen: SocketAddr,
    /// Connections to serve before it ends
    #[arg(long, default_value_t = 1)]
    connections: u32,
    /// Longest life of the program, in seconds
    #[arg(long, default_value_t = 120)]
    seconds: u64,
}

/// A client's end.
#[derive(Args, Debug)]
pub struct Connect {
    /// Address and port of the server
    #[arg(long)]
    to: SocketAddr,
    /// Longest life of the program, in seconds
    #[arg(long, default_value_t = 120)]
    seconds: u64,
}

/// Who the server says it is.
#[derive(Args, Debug)]
pub struct Identity {
    /// The server's name: in its certificate, and what the client asks for
    #[arg(long, default_value = "files.example")]
    name: String,
    /// The certificate: written by the server, trusted by the client
    #[arg(long)]
    certificate: PathBuf,
}

/// A generator of traffic.
#[derive(Debug, Subcommand)]
pub enum Traffic {
    /// Takes TCP connections: reads each to its end and answers it
    TcpServe {
        /// Its end of the connections
        #[command(flatten)]
        serve: Serve,
        /// Bytes to send on each connection while reading
        #[arg(long, default_value_t = 0)]
        reply: u64,
    },
    /// Sends over one TCP connection, and reads what comes back to its end
    TcpCopy {
        /// Its end of the connection
        #[command(flatten)]
        connect: Connect,
        /// What to send, with pauses: "20MB" or "1MB,1500ms,1MB"
        #[arg(long)]
        send: Plan,
        /// Bytes per second
        #[arg(long)]
        rate: Option<u64>,
    },
    /// Answers HTTP/1.1 requests with a body
    HttpServe {
        /// Its end of the connections
        #[command(flatten)]
        serve: Serve,
        /// Length of the body
        #[arg(long, default_value_t = 1_000_000)]
        size: u64,
    },
    /// Fetches a body over HTTP/1.1
    HttpGet {
        /// Its end of the connection
        #[command(flatten)]
        connect: Connect,
    },
    /// Answers HTTP/1.1 requests over TLS with a body
    HttpsServe {
        /// Its end of the connections
        #[command(flatten)]
        serve: Serve,
        /// Who the server is
        #[command(flatten)]
        identity: Identity,
        /// Length of the body
        #[arg(long, default_value_t = 1_000_000)]
        size: u64,
    },
    /// Fetches a body over HTTP/1.1 and TLS
    HttpsGet {
        /// Its end of the connection
        #[command(flatten)]
        connect: Connect,
        /// Who the server is
        #[command(flatten)]
        identity: Identity,
    },
    /// Answers each QUIC connection's stream with a body
    QuicServe {
        /// Its end of the connections
        #[command(flatten)]
        serve: Serve,
        /// Who the server is
        #[command(flatten)]
        identity: Identity,
        /// Length of the body
        #[arg(long, default_value_t = 1_000_000)]
        size: u64,
    },
    /// Fetches a body over QUIC
    QuicGet {
        /// Its end of the connection
        #[command(flatten)]
        connect: Connect,
        /// Who the server is
        #[command(flatten)]
        identity: Identity,
    },
    /// Takes this many UDP datagrams
    UdpServe {
        /// Its end of the connections
        #[command(flatten)]
        serve: Serve,
        /// Datagrams to take before it ends
        #[arg(long)]
        count: u32,
    },
    /// Sends UDP datagrams
    UdpSend {
        /// Its end of the connection
        #[command(flatten)]
        connect: Connect,
        /// How many
        #[arg(long)]
        count: u32,
        /// Payload of each, in bytes
        #[arg(long, default_value_t = 1_000)]
        size: u16,
        /// Datagrams per second
        #[arg(long)]
        rate: Option<u32>,
    },
    /// Sends one UDP datagram in each of many flows, as any user can
    UdpScan {
        /// Whom: the port is where it begins
        #[command(flatten)]
        connect: Connect,
        /// How many flows
        #[arg(long)]
        flows: u32,
        /// Flows per second
        #[arg(long)]
        rate: u32,
    },
    /// Answers DNS queries for A records
    DnsServe {
        /// Its end of the connections
        #[command(flatten)]
        serve: Serve,
        /// Queries to answer before it ends
        #[arg(long, default_value_t = 1)]
        count: u32,
    },
    /// Asks for a name's A record
    DnsQuery {
        /// Its end of the connection
        #[command(flatten)]
        connect: Connect,
        /// The name
        #[arg(long, default_value = "files.example")]
        name: String,
    },
    /// Says what udevd says when a USB stick is plugged in or unplugged
    InjectUsb {
        /// What happens to the stick
        #[arg(value_enum)]
        action: UsbAction,
        /// Its serial number
        #[arg(long)]
        serial: String,
    },
}

/// What happens to a USB stick.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum UsbAction {
    /// It is plugged in.
    Plug,
    /// It is unplugged.
    Unplug,
}

impl Traffic {
    /// Makes the traffic and prints its reports.
    ///
    /// # Errors
    /// What the network, TLS or the other side refused.
    pub fn run(self) -> anyhow::Result<()> {
        match self {
            Self::TcpServe { serve, reply } => tcp::serve(&serve, reply)?,
            Self::TcpCopy { connect, send, rate } => tcp::copy(&connect, &send, rate)?.print()?,
            Self::HttpServe { serve, size } => web::serve(&serve, size)?,
            Self::HttpGet { connect } => web::get(&connect)?.print()?,
            Self::HttpsServe { serve, identity, size } => web::serve_tls(&serve, &identity, size)?,
            Self::HttpsGet { connect, identity } => web::get_tls(&connect, &identity)?.print()?,
            Self::QuicServe { serve, identity, size } => quic::serve(&serve, &identity, size)?,
            Self::QuicGet { connect, identity } => quic::get(&connect, &identity)?.print()?,
            Self::UdpServe { serve, count } => udp::serve(&serve, count)?.print()?,
            Self::UdpSend { connect, count, size, rate } => {
                udp::send(&connect, count, size, rate)?.print()?
            }
            Self::UdpScan { connect, flows, rate } => udp::scan(&connect, flows, rate)?.print()?,
            Self::DnsServe { serve, count } => dns::serve(&serve, count)?.print()?,
            Self::DnsQuery { connect, name } => dns::query(&connect, &name)?.print()?,
            Self::InjectUsb { action, serial } => inject_usb(action, serial)?.print()?,
        }
        Ok(())
    }
}

fn inject_usb(action: UsbAction, serial: String) -> io::Result<Report> {
    let stick = Stick { serial: serial.into_bytes(), ..Stick::default() };
    let action = match action {
        UsbAction::Plug => Action::Add,
        UsbAction::Unplug => Action::Remove,
    };
    stick.inject(action)?;
    let sent = stick.messages(action).iter().map(|message| message.len() as u64).sum();
    Ok(Report { sent, received: 0 })
}

impl Report {
    fn print(&self) -> io::Result<()> {
        let mut out = io::stdout().lock();
        serde_json::to_writer(&mut out, self)?;
        out.write_all(b"\n")?;
        out.flush()
    }
}

impl Serve {
    fn begin(&self) {
        end_after(self.seconds);
    }

    /// Tells who started the server that clients may come.
    fn ready(&self) -> io::Result<()> {
        let mut out = io::stdout().lock();
        writeln!(out, "ready")?;
        out.flush()
    }
}

impl Connect {
    fn begin(&self) {
        end_after(self.seconds);
    }
}

/// Ends the program when its time is over, whatever it waits for.
fn end_after(seconds: u64) {
    thread::spawn(move || {
        thread::sleep(Duration::from_secs(seconds));
        eprintln!("netmon-lab: the traffic was not done after {seconds} s");
        process::exit(OUT_OF_TIME);
    });
}
