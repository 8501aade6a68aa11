//! The room: hosts, cables, addresses.
//!
//! ```text
//!  pc-1 … pc-N            router                web  cloud  dns          pc-1 … pc-N   server
//!    └─ lan0 ──[ lan ]── lan0 · net0 ──[ internet ]─┴──────┴─┘             └─ mgmt0 ──[ mgmt ]──┘
//! ```
//!
//! The three bridges stand in a host of their own, `switch`. What netmon's agents and server tell each other goes over
//! `mgmt`, so that the counters of `lan0` hold only what a test makes. Nothing has a route out of the room: the router
//! knows only what is connected to it, and no cable leads to the real machine.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;
use std::{env, fs, thread};

use crate::host::Host;
use crate::{cleanup, wait};

/// Address of the server, on `mgmt`.
pub const SERVER: &str = "10.78.0.1";
/// Address of the host `web`, which counts as public (RFC 5737, TEST-NET-2).
pub const WEB: &str = "198.51.100.10";
/// IPv6 address of the host `web`, which counts as public (RFC 3849).
pub const WEB6: &str = "2001:db8:51::10";
/// Address of the host `cloud`, inside the prefix that the lab's filter list mutes (RFC 5737, TEST-NET-3).
pub const CLOUD: &str = "203.0.113.20";
/// Address of the host `dns` (RFC 5737, TEST-NET-1).
pub const DNS: &str = "192.0.2.53";
/// The lab's filter list: the prefix of the host `cloud`.
pub const FILTER_LIST: &str = "[lab-cloud]\n203.0.113.0/24\n";

/// Most PCs in a room: their addresses end in 11 to 210.
pub const MAX_PCS: u8 = 200;

/// Quiet for this long: nothing is left of what interfaces say when they come up.
const QUIET: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(20);

/// Why there is no room.
#[derive(Debug, thiserror::Error)]
pub enum RoomError {
    /// Namespaces need root.
    #[error("the lab makes network namespaces and needs root: run it with sudo")]
    NotRoot,
    /// Too many PCs, or none.
    #[error("a room has 1 to {MAX_PCS} PCs, not {0}")]
    Size(u8),
    /// The directory for the room's files.
    #[error("cannot make the room's directory under {}", env::temp_dir().display())]
    Directory {
        /// Why.
        source: io::Error,
    },
    /// The process that holds a host's namespaces.
    #[error(
        "cannot make the host {host}: this needs unshare and mount (util-linux), ip (iproute2), and a kernel with \
         network namespaces and bpffs"
    )]
    Holder {
        /// The host.
        host: String,
        /// Why.
        source: io::Error,
    },
    /// A command inside a host.
    #[error("in {host}: `{command}`: {message}")]
    Command {
        /// The host.
        host: String,
        /// The command.
        command: String,
        /// What it answered.
        message: String,
    },
    /// The room did not come to rest.
    #[error("the room does not come to rest")]
    Restless {
        /// What kept changing.
        source: wait::Timeout,
    },
}

/// A room. It ends when it is dropped: processes, namespaces, files.
#[derive(Debug)]
pub struct Room {
    name: String,
    directory: PathBuf,
    hosts: BTreeMap<String, Host>,
    pcs: u8,
    keep: AtomicBool,
}

/// Address of PC number `pc` (from 1) on `lan0`.
pub fn lan(pc: u8) -> String {
    format!("10.77.0.{}", 10 + pc)
}

/// IPv6 address of PC number `pc` (from 1) on `lan0`.
pub fn lan6(pc: u8) -> String {
    format!("fd77::{}", 10 + pc)
}

/// Address of PC number `pc` (from 1) on `mgmt0`.
pub fn mgmt(pc: u8) -> String {
    format!("10.78.0.{}", 10 + pc)
}

/// MAC address on `lan` of the PC with this number; 0 is the router.
fn mac(pc: u8) -> String {
    format!("02:77:00:00:00:{pc:02x}")
}

impl Room {
    /// Builds a room with this many PCs, `pc-1` and so on. It is at rest when this returns.
    ///
    /// # Errors
    /// [`RoomError`] says which step failed.
    pub fn build(pcs: u8) -> Result<Self, RoomError> {
        static BUILT: AtomicU32 = AtomicU32::new(0);
        if !(1..=MAX_PCS).contains(&pcs) {
            return Err(RoomError::Size(pcs));
        }
        if !rustix::process::geteuid().is_root() {
            return Err(RoomError::NotRoot);
        }
        let name = format!("{}-{}", process::id(), BUILT.fetch_add(1, Ordering::Relaxed));
        let directory = cleanup::register(&name).map_err(|source| RoomError::Directory { source })?;
        let mut room = Self { name, directory, hosts: BTreeMap::new(), pcs, keep: AtomicBool::new(false) };
        // The bridges have no addresses; without IPv6 they do not speak either.
        room.add_host("switch", false)?;
        for host in ["router", "server", "web", "cloud", "dns"] {
            room.add_host(host, true)?;
        }
        for pc in 1..=pcs {
            room.add_host(&format!("pc-{pc}"), true)?;
        }
        room.plug_cables()?;
        room.give_addresses()?;
        room.come_to_rest()?;
        Ok(room)
    }

    /// The host of this name.
    ///
    /// # Panics
    /// When the room has none: the names are fixed when the room is built.
    pub fn host(&self, name: &str) -> &Host {
        self.hosts.get(name).unwrap_or_else(|| panic!("the room has no host {name}: {:?}", self.hosts.keys()))
    }

    /// The PC with this number, from 1.
    ///
    /// # Panics
    /// As [`Room::host`].
    pub fn pc(&self, number: u8) -> &Host {
        self.host(&format!("pc-{number}"))
    }

    /// All hosts, by name.
    pub fn hosts(&self) -> impl Iterator<Item = &Host> {
        self.hosts.values()
    }

    /// How many PCs there are.
    pub fn pcs(&self) -> u8 {
        self.pcs
    }

    /// The room's files. All hosts see this directory; it goes with the room.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its files are worth a look: they outlast it.
    pub fn keep_files(&self) {
        self.keep.store(true, Ordering::Relaxed);
    }

    fn add_host(&mut self, name: &str, ipv6: bool) -> Result<(), RoomError> {
        let host = Host::start(&self.name, name, ipv6)?;
        self.hosts.insert(name.to_owned(), host);
        Ok(())
    }

    /// All interfaces are made from inside the switch: the real machine's namespace never holds one.
    fn plug_cables(&self) -> Result<(), RoomError> {
        let mut batch = String::new();
        for bridge in ["lan", "mgmt", "internet"] {
            let _ = writeln!(batch, "link add name {bridge} type bridge mcast_snooping 0");
            let _ = writeln!(batch, "link set dev {bridge} up");
        }
        let mut cable = |bridge: &str, host: &str, interface: &str, mac: Option<String>| {
            let pid = self.host(host).holder_pid();
            let port = format!("{}.{host}", &bridge[..1]);
            let address = mac.map(|mac| format!("address {mac} ")).unwrap_or_default();
            let _ =
                writeln!(batch, "link add name {port} type veth peer name {interface} {address}netns {pid}");
            let _ = writeln!(batch, "link set dev {port} master {bridge} up");
        };
        cable("lan", "router", "lan0", Some(mac(0)));
        cable("mgmt", "server", "mgmt0", None);
        for host in ["router", "web", "cloud", "dns"] {
            cable("internet", host, "net0", None);
        }
        for pc in 1..=self.pcs {
            cable("lan", &format!("pc-{pc}"), "lan0", Some(mac(pc)));
            cable("mgmt", &format!("pc-{pc}"), "mgmt0", None);
        }
        self.ip("switch", &batch)
    }

    fn give_addresses(&self) -> Result<(), RoomError> {
        let up = |interface: &str, addresses: &[&str]| {
            let mut batch = format!("link set dev {interface} up\n");
            for address in addresses {
                let nodad = if address.contains(':') { " nodad" } else { "" };
                let _ = writeln!(batch, "address add {address} dev {interface}{nodad}");
            }
            batch
        };
        for pc in 1..=self.pcs {
            let (lan, lan6, mgmt) = (lan(pc) + "/24", lan6(pc) + "/64", mgmt(pc) + "/24");
            let mut batch = up("lan0", &[&lan, &lan6]) + &up("mgmt0", &[&mgmt]);
            for other in (0..=self.pcs).filter(|other| *other != pc) {
                batch += &self.neighbour(other);
            }
            batch += "route add default via 10.77.0.1\nroute add ::/0 via fd77::1\n";
            self.ip(&format!("pc-{pc}"), &batch)?;
        }
        let internet = ["198.51.100.1/24", "203.0.113.1/24", "192.0.2.1/24", "2001:db8:51::1/64"];
        let mut batch = up("lan0", &["10.77.0.1/24", "fd77::1/64"]) + &up("net0", &internet);
        for pc in 1..=self.pcs {
            batch += &self.neighbour(pc);
        }
        self.ip("router", &batch)?;
        let forward =
            "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding";
        self.host("router").run(&["sh", "-e", "-c", forward])?;
        self.ip("server", &up("mgmt0", &["10.78.0.1/24"]))?;
        let web = up("net0", &["198.51.100.10/24", "2001:db8:51::10/64"])
            + "route add default via 198.51.100.1\nroute add ::/0 via 2001:db8:51::1\n";
        self.ip("web", &web)?;
        self.ip("cloud", &(up("net0", &["203.0.113.20/24"]) + "route add default via 203.0.113.1\n"))?;
        self.ip("dns", &(up("net0", &["192.0.2.53/24"]) + "route add default via 192.0.2.1\n"))
    }

    /// A neighbour that is known for good: no ARP and no neighbour discovery on `lan0`.
    fn neighbour(&self, pc: u8) -> String {
        let (ipv4, ipv6) = if pc == 0 { ("10.77.0.1".into(), "fd77::1".into()) } else { (lan(pc), lan6(pc)) };
        let mac = mac(pc);
        format!(
            "neighbour add {ipv4} lladdr {mac} dev lan0 nud permanent\n\
             neighbour add {ipv6} lladdr {mac} dev lan0 nud permanent\n"
        )
    }

    fn ip(&self, host: &str, batch: &str) -> Result<(), RoomError> {
        self.host(host).run_with_input(&["ip", "-batch", "-"], batch).map(drop)
    }

    /// Interfaces that come up join multicast groups (RFC 9777). Waits until that is over, and the addresses are usable.
    fn come_to_rest(&self) -> Result<(), RoomError> {
        let restless = |source| RoomError::Restless { source };
        let mut failed = None;
        let mut look = || -> Vec<String> {
            let seen: Result<_, _> = (1..=self.pcs).map(|pc| self.pc(pc).run(&["sh", "-c", REST])).collect();
            seen.unwrap_or_else(|error| {
                failed = Some(error);
                Vec::new()
            })
        };
        let usable = wait::until(PATIENCE, "usable addresses", || {
            look().iter().all(|seen| !seen.contains("tentative")).then_some(())
        });
        let quiet = wait::unchanged(QUIET, PATIENCE, "silence on lan0", &mut look);
        if let Some(error) = failed {
            return Err(error);
        }
        usable.map_err(restless)?;
        quiet.map_err(restless).map(drop)
    }
}

/// Addresses that are not usable yet, and what `lan0` counted.
const REST: &str = "ip address show tentative; cat /sys/class/net/lan0/statistics/rx_packets /sys/class/net/lan0/statistics/tx_packets";

impl Drop for Room {
    fn drop(&mut self) {
        // The files of a test that failed are worth a look.
        let keep = self.keep.load(Ordering::Relaxed)
            || thread::panicking()
            || env::var_os("NETMON_LAB_KEEP").is_some();
        cleanup::unregister(&self.name, keep);
    }
}

/// Writes a file of the room.
///
/// # Errors
/// As [`fs::write`], with the path.
pub fn write(path: &Path, text: &str) -> io::Result<()> {
    fs::write(path, text)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}
