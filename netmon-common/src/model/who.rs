//! Names, programs, people: to whom what moved belongs.

use serde::{Deserialize, Serialize};

use super::{Traffic, Transfer};
use crate::raw::Raw;

/// A transfer over the network, and what is known of who had it. Recorded instead of [`super::Event::Transfer`] and
/// [`super::Event::TransferOverUsb`] for hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedTransfer {
    /// As without names.
    pub transfer: Transfer,
    /// On an interface that is a USB adapter, phone or modem.
    pub over_usb: bool,
    /// What the transfer consists of, the largest first; at most [`NamedTransfer::MAX_SHARES`].
    pub shares: Vec<Share>,
    /// What is in no share: more of them than are listed.
    pub rest: Traffic,
    /// Who was logged in at this PC, at most [`NamedTransfer::MAX_SEATED`].
    pub seated: Vec<Raw>,
}

impl NamedTransfer {
    /// Most shares that are listed.
    pub const MAX_SHARES: usize = 4;
    /// Most people that are listed.
    pub const MAX_SEATED: usize = 4;
}

/// The part of a transfer that one program had with one site.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// The counterpart's name; `None`: nobody said one.
    pub site: Option<Site>,
    /// The program at this PC; `None`: unknown.
    pub program: Option<Program>,
    /// What moved so far.
    pub traffic: Traffic,
}

/// A name of the other side, as this PC heard it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Site {
    /// Host name, in lower case, without the dot at its end; A-labels as they stood on the wire.
    pub name: Raw,
    /// Where it was heard.
    pub source: NameSource,
    /// The TLS client hello was encrypted (ECH, draft-ietf-tls-esni): the name is the front's, the true one is hidden.
    pub is_front: bool,
    /// How long before the flow's first packet it was heard, in milliseconds; 0 for what the flow itself said.
    pub age_ms: u32,
}

/// Where a name was heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum NameSource {
    /// Server name of a TLS client hello over TCP (RFC 6066, section 3).
    Tls,
    /// The same in QUIC's Initial packets (RFC 9001, section 5.2; RFC 9369).
    Quic,
    /// Host of an HTTP request (RFC 9110, section 7.2).
    Http,
    /// An answer of the domain name system that gave this address.
    Dns,
}

/// A process, as it was when it made or took a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Program {
    /// The kernel's name of it (comm of its thread group leader), 15 bytes at most.
    pub name: Raw,
    /// Path of its executable; empty: unknown.
    pub path: Raw,
    /// Its command line, arguments separated by spaces; empty: unknown, or not recorded.
    pub command: Raw,
    /// Process number (of the thread group), in the first PID namespace.
    pub pid: u32,
    /// When it was started, boot clock; 0: unknown. Together with `pid` it names one process of this boot.
    pub started_ns: u64,
    /// Effective user.
    pub uid: u32,
    /// The user's name at the PC; empty: the PC knows none.
    pub user: Raw,
    /// Number of the login session (`/proc/PID/sessionid`); `None`: none.
    pub session: Option<u32>,
    /// Last part of its control group, as `docker-….scope`; empty: unknown, or the root's.
    pub cgroup: Raw,
}

/// Somebody logged in or out at a PC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Login {
    /// What happened.
    pub phase: LoginPhase,
    /// Login name.
    pub user: Raw,
    /// User number.
    pub uid: u32,
    /// The session's name, as `2` or `c1`.
    pub session: Raw,
    /// Where: as `seat0`, `tty2`, `pts/0`; empty: nowhere that can be named.
    pub terminal: Raw,
    /// The host that it came from, of a remote one; empty otherwise.
    pub remote: Raw,
    /// Since when, wall clock.
    pub since_wall_ns: i64,
}

/// What happened to a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LoginPhase {
    /// It was there when the agent started.
    Present,
    /// It began.
    Began,
    /// It ended.
    Ended,
}

/// What of names and programs was not heard: totals of this run, recorded with each [`super::Coverage`] in which one of
/// them grew, and with the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamesCoverage {
    /// Names are looked for.
    pub names: bool,
    /// Programs are looked for.
    pub programs: bool,
    /// Who is logged in is known.
    pub logins: bool,
    /// Samples of first packets that were read.
    pub samples: u64,
    /// Samples for which there was no room.
    pub samples_lost: u64,
    /// Flows with payload whose name nobody said, when they were forgotten.
    pub unnamed: u64,
    /// Records of sockets and processes for which there was no room.
    pub sockets_lost: u64,
    /// Flows whose program was unknown when they were forgotten.
    pub unattributed: u64,
}

/// A name of a host of the private network that is not a PC of the room.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// Its address.
    pub address: std::net::IpAddr,
    /// Its link-layer address; `None`: unknown, or behind a router.
    pub mac: Option<[u8; 6]>,
    /// What it calls itself; empty: unknown.
    pub name: Raw,
    /// Where the name was heard.
    pub source: NeighbourSource,
}

/// Where a neighbour's name was heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NeighbourSource {
    /// No name; the address alone, from the kernel's neighbour table.
    Table,
    /// Multicast DNS (RFC 6762).
    Mdns,
    /// DHCP (RFC 2132, option 12).
    Dhcp,
}
