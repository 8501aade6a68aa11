//! Two hosts and a cable: all that the benchmark needs of a room.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use std::{panic, process, thread};

use anyhow::{Context as _, Result};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::host::Host;
use crate::room::RoomError;
use crate::{cleanup, wait};

/// Name of the cable's end in both hosts.
pub const INTERFACE: &str = "bench0";
/// Address of the sender.
pub const SENDER: &str = "10.99.0.1";
/// Address of the receiver.
pub const RECEIVER: &str = "10.99.0.2";
/// IPv6 address of the sender, where a cable has IPv6.
pub const SENDER6: &str = "fd99::1";
/// IPv6 address of the receiver, where a cable has IPv6.
pub const RECEIVER6: &str = "fd99::2";

/// What a cable is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cable {
    /// Both ends have an IPv6 address.
    pub ipv6: bool,
    /// The receiver's end collects packets as network cards do (NAPI with GRO): frames that the packet source redirects
    /// are only accepted there.
    pub gro: bool,
    /// How many segments a super-packet may have (GSO); 1: there are none.
    pub segments: u32,
}

impl Default for Cable {
    /// The benchmark's.
    fn default() -> Self {
        Self { ipv6: false, gro: true, segments: 65_535 }
    }
}

/// Two hosts, `sender` and `receiver`, joined by a pair of veth interfaces. They end when this is dropped.
#[derive(Debug)]
pub struct Pair {
    name: String,
    directory: PathBuf,
    sender: Host,
    receiver: Host,
}

impl Pair {
    /// Builds it, with the benchmark's cable.
    ///
    /// # Errors
    /// [`RoomError`] says which step failed.
    pub fn build() -> Result<Self, RoomError> {
        Self::with(Cable::default())
    }

    /// Builds it. Neither host says anything by itself once its interface has come up, and each knows the other's
    /// link-layer address.
    ///
    /// # Errors
    /// [`RoomError`] says which step failed.
    pub fn with(cable: Cable) -> Result<Self, RoomError> {
        static BUILT: AtomicU32 = AtomicU32::new(0);
        if !rustix::process::geteuid().is_root() {
            return Err(RoomError::NotRoot);
        }
        let name = format!("bench-{}-{}", process::id(), BUILT.fetch_add(1, Ordering::Relaxed));
        let directory = cleanup::register(&name).map_err(|source| RoomError::Directory { source })?;
        let hosts = Host::start(&name, "sender", cable.ipv6)
            .and_then(|sender| Host::start(&name, "receiver", cable.ipv6).map(|receiver| (sender, receiver)));
        let (sender, receiver) = match hosts {
            Ok(hosts) => hosts,
            Err(error) => {
                cleanup::unregister(&name, false);
                return Err(error);
            }
        };
        let pair = Self { name, directory, sender, receiver };
        pair.plug(cable)?;
        Ok(pair)
    }

    fn plug(&self, cable: Cable) -> Result<(), RoomError> {
        const MAC: [&str; 2] = ["02:6e:6d:00:00:01", "02:6e:6d:00:00:02"];
        let peer = self.receiver.holder_pid();
        self.sender.run_with_input(
            &["ip", "-batch", "-"],
            &format!(
                "link add name {INTERFACE} address {} type veth peer name {INTERFACE} address {} netns {peer}\n",
                MAC[0], MAC[1]
            ),
        )?;
        // Before it is up: a card that is told later loses its carrier for a moment.
        if cable.gro {
            self.receiver.run(&["ethtool", "-K", INTERFACE, "gro", "on"])?;
        }
        let [sender, receiver] = [(SENDER, SENDER6, MAC[0]), (RECEIVER, RECEIVER6, MAC[1])];
        for (host, own, other) in [(&self.sender, sender, receiver), (&self.receiver, receiver, sender)] {
            let neighbour = |address: &str| {
                format!("neighbour replace {address} lladdr {} nud permanent dev {INTERFACE}\n", other.2)
            };
            let mut batch = format!(
                "link set dev {INTERFACE} gso_max_segs {}\nlink set dev {INTERFACE} up\n\
                 address add {}/24 dev {INTERFACE}\n{}",
                cable.segments,
                own.0,
                neighbour(other.0)
            );
            if cable.ipv6 {
                batch += &format!("address add {}/64 dev {INTERFACE} nodad\n{}", own.1, neighbour(other.1));
            }
            host.run_with_input(&["ip", "-batch", "-"], &batch)?;
        }
        Ok(())
    }

    /// Who sends.
    pub fn sender(&self) -> &Host {
        &self.sender
    }

    /// Who is watched.
    pub fn receiver(&self) -> &Host {
        &self.receiver
    }

    /// Packets that have arrived at the receiver, once those on the way are there.
    ///
    /// # Errors
    /// They do not stop coming.
    pub fn arrived(&self) -> Result<u64> {
        const QUIET: Duration = Duration::from_millis(50);
        const PATIENCE: Duration = Duration::from_secs(10);
        let count = || self.receiver.counters(INTERFACE).ok().map(|counters| counters.rx_packets);
        let last = wait::unchanged(QUIET, PATIENCE, "an end of the packets", count)?;
        last.context("the receiver does not tell what arrived")
    }

    /// Files of this run; both hosts see them, and they go with the pair.
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        cleanup::unregister(&self.name, false);
    }
}

/// Does something on a thread inside a host: in its network and mount namespace. Commands that it starts are there,
/// too.
///
/// # Errors
/// The namespaces cannot be entered, or what `work` fails with.
pub fn inside<T: Send>(host: &Host, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let answer = thread::scope(|scope| {
        let thread = scope.spawn(|| {
            enter(host).with_context(|| format!("cannot enter the host {}", host.name()))?;
            work()
        });
        thread.join()
    });
    answer.unwrap_or_else(|panic| panic::resume_unwind(panic))
}

/// Takes the calling thread into a host. There is no way back.
fn enter(host: &Host) -> io::Result<()> {
    let namespace = |kind: &str| File::open(format!("/proc/{}/ns/{kind}", host.holder_pid()));
    let (network, mount) = (namespace("net")?, namespace("mnt")?);
    // A thread that shares its working directory with others cannot change its mount namespace.
    // SAFETY: file system attributes of this thread alone; no file descriptors are unshared.
    unsafe { unshare_unsafe(UnshareFlags::FS) }?;
    move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))?;
    move_into_link_name_space(mount.as_fd(), Some(LinkNameSpaceType::Mount))?;
    Ok(())
}
