//! A cable in a network namespace of its own, with netmon's programs at both ends.
//!
//! Nothing else is on it: no addresses, no ARP, no IPv6, no route. Frames are as long as a veth device carries, which
//! is too long for native XDP there: XDP is the generic one. GRO does not run on such a cable (veth has it with native
//! XDP only, or when asked), and where frames were merged or lost nevertheless, [`Wire::settle`] notices.

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use netmon_agent::{
    clock::Now,
    kernel::{FlowId, Kernel, KernelError, LoadOptions, Mode, Moved, Sizes},
};
use netmon_common::abi::Stats;
use rustix::{
    io::Errno,
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
    net::{SendFlags, send},
    process::geteuid,
    thread::{CpuSet, UnshareFlags, sched_getaffinity, sched_setaffinity, unshare_unsafe},
};

use super::tally::{Counts, Flow, Tally};
use crate::{packet::PacketSocket, wait};

/// End of the cable where frames are sent.
const NEAR: &str = "near";
/// End of the cable where they arrive.
const FAR: &str = "far";
/// Longest packet that a veth device carries.
const MTU: &str = "65535";
/// Frames under way at most: a CPU's backlog holds 1,000 by default (net.core.netdev_max_backlog).
const WINDOW: u64 = 128;
/// Slots in each flow table: few, so that captures with many flows also show that nothing is lost when flows lose their
/// slots to others.
const SLOTS: u32 = 2_048;
/// Frames after which the counts are read: each may take a slot from a flow, and the ring holds 29,000 of these.
const READ_EVERY: u64 = 8_192;
const PATIENCE: Duration = Duration::from_secs(10);

/// Where netmon looks at a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    /// TC ingress of the far end, behind the kernel's removal of an outer VLAN tag.
    TcIngress,
    /// XDP of the far end.
    Xdp,
    /// TC egress of the near end.
    TcEgress,
}

impl Hook {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::TcIngress, Self::Xdp, Self::TcEgress];
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TcIngress => "tc ingress",
            Self::Xdp => "xdp",
            Self::TcEgress => "tc egress",
        })
    }
}

/// Why the cable cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// Namespaces and BPF need root.
    #[error("a replay makes network namespaces and loads programs into the kernel: run it as root")]
    NotRoot,
    /// The namespaces.
    #[error("cannot make a network and a mount namespace with a BPF file system")]
    Namespace {
        /// Why.
        source: io::Error,
    },
    /// A command of iproute2.
    #[error("`{command}` failed: {message}")]
    Command {
        /// The command.
        command: String,
        /// What it said.
        message: String,
    },
    /// netmon's programs.
    #[error("{hook}: {action}")]
    Kernel {
        /// Where.
        hook: Hook,
        /// What was tried.
        action: &'static str,
        /// Why.
        source: Box<KernelError>,
    },
    /// The packet socket.
    #[error("cannot send a frame over the cable")]
    Socket {
        /// Why.
        source: io::Error,
    },
    /// Frames got lost, were merged, or came from elsewhere.
    #[error("{hook} has seen {seen} frames where {sent} were sent")]
    Seen {
        /// Where.
        hook: Hook,
        /// Frames there.
        seen: u64,
        /// Frames that were sent.
        sent: u64,
    },
    /// The interface's own counters.
    #[error(
        "the far end has received {received} frames and sent {answered} where {sent} were sent to it: something else \
         is on the cable"
    )]
    Interface {
        /// Frames that arrived.
        received: u64,
        /// Frames that went back.
        answered: u64,
        /// Frames that were sent.
        sent: u64,
    },
}

/// netmon at a hook.
struct Watcher {
    hook: Hook,
    kernel: Kernel,
    /// All that was counted of each flow, as of the last reading.
    flows: BTreeMap<FlowId, Moved>,
}

/// The cable. It works on the thread that made it alone.
pub struct Wire {
    socket: PacketSocket,
    watchers: Vec<Watcher>,
    cpus: Vec<usize>,
    /// Index in `cpus`.
    cpu: usize,
    sent: u64,
}

/// Makes namespaces and a cable, and runs something with it on a thread of its own. All of it ends with that.
///
/// # Errors
/// [`WireError`].
///
/// # Panics
/// When `work` does.
pub fn with_wire<R: Send>(work: impl FnOnce(&mut Wire) -> R + Send) -> Result<R, WireError> {
    if !geteuid().is_root() {
        return Err(WireError::NotRoot);
    }
    let namespace = |source| WireError::Namespace { source };
    let directory = tempfile::tempdir().map_err(namespace)?;
    let bpffs = directory.path();
    let run = || {
        // SAFETY: file system attributes and namespaces of this thread alone; no file descriptors are unshared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS) }
            .map_err(|error| namespace(error.into()))?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
            .and_then(|()| mount("bpf", bpffs, "bpf", MountFlags::empty(), None))
            .map_err(|error| namespace(error.into()))?;
        Ok(work(&mut Wire::lay(bpffs)?))
    };
    thread::scope(|scope| match scope.spawn(run).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

impl Wire {
    fn lay(bpffs: &Path) -> Result<Self, WireError> {
        for interfaces in ["all", "default"] {
            let path = PathBuf::from(format!("/proc/sys/net/ipv6/conf/{interfaces}/disable_ipv6"));
            match fs::write(&path, "1") {
                // A kernel without IPv6 says nothing over it either.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => result.map_err(|source| WireError::Namespace { source })?,
            }
        }
        ip(&["link", "add", NEAR, "mtu", MTU, "type", "veth", "peer", "name", FAR, "mtu", MTU])?;
        for end in [NEAR, FAR] {
            ip(&["link", "set", end, "arp", "off", "multicast", "off", "up"])?;
        }
        for end in [NEAR, FAR] {
            let up = || ip(&["link", "show", "dev", end]).ok().filter(|link| link.contains("state UP"));
            wait::until(PATIENCE, "the carrier", up).map_err(|timeout| WireError::Command {
                command: format!("ip link show dev {end}"),
                message: timeout.to_string(),
            })?;
            // The state is set first, the queue is opened next, under one lock: this waits for it.
            ip(&["link", "set", end, "up"])?;
        }
        let (near, far) = (interface(NEAR)?, interface(FAR)?);
        let mut watchers = Vec::new();
        for (hook, end, mode) in [
            (Hook::TcIngress, &far, Mode::Tc),
            (Hook::Xdp, &far, Mode::Xdp),
            (Hook::TcEgress, &near, Mode::Tc),
        ] {
            let options = LoadOptions {
                pin_dir: bpffs.join(hook.to_string().replace(' ', "-")),
                mode,
                sizes: Sizes { flows: SLOTS, ..Sizes::default() },
                ..LoadOptions::default()
            };
            watchers.push(Watcher::start(hook, options, end.index)?);
        }
        let all = sched_getaffinity(None).map_err(|error| WireError::Namespace { source: error.into() })?;
        let cpus = (0..CpuSet::MAX_CPU).filter(|cpu| all.is_set(*cpu)).collect();
        let socket = PacketSocket::open(near.index).map_err(|source| WireError::Socket { source })?;
        let mut wire = Self { socket, watchers, cpus, cpu: 0, sent: 0 };
        wire.change_cpu()?;
        Ok(wire)
    }

    /// Sends a frame. False: it is longer than a veth device carries.
    ///
    /// # Errors
    /// [`WireError::Socket`]; [`WireError::Seen`] and [`WireError::Kernel`] as [`Self::settle`].
    pub fn send(&mut self, frame: &[u8]) -> Result<bool, WireError> {
        match send(self.socket.as_fd(), frame, SendFlags::empty()) {
            Ok(_) => self.sent += 1,
            Err(Errno::MSGSIZE) => return Ok(false),
            Err(error) => return Err(WireError::Socket { source: error.into() }),
        }
        if self.sent.is_multiple_of(WINDOW) {
            self.settle()?;
            self.change_cpu()?;
        }
        if self.sent.is_multiple_of(READ_EVERY) {
            self.watchers.iter_mut().for_each(Watcher::read);
        }
        Ok(true)
    }

    /// Waits until every hook has seen all that was sent.
    ///
    /// # Errors
    /// [`WireError::Seen`] when that does not happen, [`WireError::Kernel`].
    pub fn settle(&self) -> Result<(), WireError> {
        self.watchers.iter().try_for_each(|watcher| watcher.settle(self.sent))
    }

    /// Waits for the last frame, compares with the interface's own counters, and tells what each hook has counted.
    ///
    /// # Errors
    /// As [`Self::settle`], and [`WireError::Interface`].
    pub fn count(&mut self) -> Result<Vec<(Hook, Tally)>, WireError> {
        self.settle()?;
        let Interface { received, sent: answered, .. } = interface(FAR)?;
        if received != self.sent || answered != 0 {
            return Err(WireError::Interface { received, answered, sent: self.sent });
        }
        Ok(self.watchers.iter_mut().map(|watcher| (watcher.hook, watcher.tally())).collect())
    }

    /// Frames of one CPU keep their order. The next CPU comes when all of them have been seen, so that all CPUs'
    /// tables are used and the order is still that of the capture.
    fn change_cpu(&mut self) -> Result<(), WireError> {
        self.cpu = (self.cpu + 1) % self.cpus.len();
        let mut one = CpuSet::new();
        one.set(self.cpus[self.cpu]);
        sched_setaffinity(None, &one).map_err(|error| WireError::Namespace { source: error.into() })
    }
}

impl Watcher {
    fn start(hook: Hook, options: LoadOptions, ifindex: u32) -> Result<Self, WireError> {
        let failed = |action| move |source| WireError::Kernel { hook, action, source: Box::new(source) };
        let mut kernel = Kernel::load(options).map_err(failed("cannot load netmon's programs"))?;
        kernel.attach(ifindex).map_err(failed("cannot attach netmon's programs"))?;
        Ok(Self { hook, kernel, flows: BTreeMap::new() })
    }

    fn settle(&self, sent: u64) -> Result<(), WireError> {
        let seen = || self.kernel.stats().seen;
        let all = || Some(seen()).filter(|seen| *seen >= sent);
        match wait::until(PATIENCE, "the frames to arrive", all).unwrap_or_else(|_| seen()) {
            seen if seen == sent => Ok(()),
            seen => Err(WireError::Seen { hook: self.hook, seen, sent }),
        }
    }

    /// Takes what was counted since the last reading.
    fn read(&mut self) {
        let mut deltas = Vec::new();
        self.kernel.sweep_all(Now::read().boot_ns, &mut deltas);
        for delta in deltas {
            *self.flows.entry(delta.flow).or_default() += delta.moved;
        }
    }

    fn tally(&mut self) -> Tally {
        self.read();
        tally(&self.flows, &self.kernel.stats())
    }
}

/// Both directions that a flow has: a hook sees one of them, but what it counts may be in the other by mistake.
fn tally(flows: &BTreeMap<FlowId, Moved>, stats: &Stats) -> Tally {
    let mut tally = Tally::default();
    for (FlowId { local, remote, protocol }, moved) in flows {
        let sent = Counts { packets: moved.tx_packets, bytes: moved.tx_bytes, payload: moved.tx_payload };
        let received = Counts { packets: moved.rx_packets, bytes: moved.rx_bytes, payload: moved.rx_payload };
        for (source, destination, counts) in [(local, remote, sent), (remote, local, received)] {
            if counts != Counts::default() {
                let flow = Flow { protocol: *protocol, source: *source, destination: *destination };
                tally.flows.insert(flow, counts);
            }
        }
    }
    let class = |packets, bytes| Counts { packets, bytes, payload: 0 };
    tally.counted = class(stats.counted, stats.counted_bytes);
    tally.other_protocol = class(stats.other_protocol, stats.other_protocol_bytes);
    tally.not_ip = class(stats.not_ip, stats.not_ip_bytes);
    tally.malformed = class(stats.malformed, stats.malformed_bytes);
    tally.table_full = class(stats.table_full, stats.table_full_bytes);
    tally
}

/// What `ip -s link` says.
struct Interface {
    index: u32,
    received: u64,
    sent: u64,
}

fn interface(name: &str) -> Result<Interface, WireError> {
    let text = ip(&["-j", "-s", "link", "show", "dev", name])?;
    let links: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    let link = &links[0];
    let packets = |direction: &str| link["stats64"][direction]["packets"].as_u64();
    let index = link["ifindex"].as_u64().and_then(|index| u32::try_from(index).ok());
    match (index, packets("rx"), packets("tx")) {
        (Some(index), Some(received), Some(sent)) => Ok(Interface { index, received, sent }),
        _ => Err(WireError::Command {
            command: format!("ip -j -s link show dev {name}"),
            message: format!("no index and counters in {text:?}"),
        }),
    }
}

fn ip(arguments: &[&str]) -> Result<String, WireError> {
    let failed = |message| WireError::Command { command: format!("ip {}", arguments.join(" ")), message };
    let output = Command::new("ip").args(arguments).output().map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    String::from_utf8(output.stdout).map_err(|error| failed(error.to_string()))
}
