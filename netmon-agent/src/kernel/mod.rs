//! The kernel's border: loads the programs, attaches them, fills their tries and reads what they count.
//!
//! A thin shell: nothing is decided here but what the kernel demands. All calls are synchronous and short. Names of maps
//! and programs, and what they mean: docs/bpftool.md and [`netmon_common::abi`].
//!
//! Attachments are not pinned: they end with the process, however it ends (clsact filters of a killed agent excepted,
//! which the next start replaces). Maps and programs are pinned for
//! `bpftool` alone; the pins of an agent that died are removed at the next start. Two agents must not run at once
//! on one PC (both would count, and the second removes the pins of the first): the caller holds a lock file.

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    sync::{Arc, atomic::Ordering},
};

use aya::{
    Ebpf,
    maps::{HashMap, Map, MapData, MapError, RingBuf},
};
use ipnet::IpNet;
use netmon_common::{
    abi::{CpuStats, Evicted, Flow4Key, Flow6Key, FlowOpened, FlowState, Slot4, Slot6, Stats, maps},
    model::Hook,
};

use self::{
    flows::{Record, ShownKey},
    mapping::{Mapping, RingPositions},
    table::{Scope, Shared, Table},
};

mod attach;
mod cpus;
mod error;
#[doc(hidden)]
pub mod fed;
mod flows;
mod load;
mod mapping;
mod netlink;
mod options;
mod prefixes;
mod preflight;
mod stats;
mod sys;
mod table;
mod words;

pub use self::{
    error::KernelError,
    flows::{FlowDelta, FlowId, Moved},
    load::shares,
    options::{LoadOptions, Mode, Sizes, TcKind},
    prefixes::PrefixChange,
    preflight::{CAPABILITIES, check as preflight, prepare},
    words::{WordLevel, Words},
};

/// The kernel programs, as `cargo xtask build-ebpf` built them.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/netmon-ebpf"));

/// Where the pins go unless configured otherwise.
pub const PIN_DIRECTORY: &str = "/sys/fs/bpf/netmon";

/// How long a packet may take from the clock's reading to its counts: the time that a virtual CPU may stand still in
/// between. What takes longer is found by the next sweep of everything.
const LATE_NS: u64 = 1_000_000_000;
/// Everything is swept this often.
pub const SWEEP_ALL_NS: u64 = 10_000_000_000;

/// The loaded programs and their maps. Dropping it does what [`Kernel::shutdown`] does, and logs failures: an agent
/// whose start fails leaves nothing behind.
pub struct Kernel {
    options: LoadOptions,
    /// The pins and their directory are there.
    pinned: bool,
    attached: BTreeMap<u32, attach::Attached>,
    /// False once the kernel has said that it has no TCX.
    tcx: bool,
    ebpf: Ebpf,
    tries: Tries,
    table4: Table<Slot4>,
    table6: Table<Slot6>,
    tables: Shared,
    shown4: HashMap<MapData, Flow4Key, FlowState>,
    shown6: HashMap<MapData, Flow6Key, FlowState>,
    cpus: usize,
    stats: Arc<Mapping>,
    /// Of the prefixes in the tries.
    generation: u32,
    events: RingBuf<MapData>,
    positions: RingPositions,
    /// Most records that the ring can hold.
    ring_records: usize,
    /// Records of the ring buffer that make no sense.
    refused_records: u64,
    /// Boot times of the last sweep and of the last one of everything.
    swept_ns: u64,
    swept_all_ns: Option<u64>,
}

struct Tries {
    lan4: Map,
    lan6: Map,
    mute4: Map,
    mute6: Map,
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernel")
            .field("options", &self.options)
            .field("attached", &self.attached)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

impl Kernel {
    /// Checks kernel and privileges, clears the pin directory, loads the programs and pins them with their maps.
    /// Nothing is attached yet, and the tries are empty: [`Self::set_prefixes`] comes next, then [`Self::attach`].
    ///
    /// # Errors
    /// [`KernelError`], each variant with what to do. Nothing stays behind.
    pub fn load(options: LoadOptions) -> Result<Self, KernelError> {
        preflight::check()?;
        preflight::prepare_pin_directory(&options.pin_dir)?;
        preflight::allow_locked_memory();
        let directory = options.pin_dir.clone();
        Self::load_and_pin(options).inspect_err(|_| {
            // The first error is the one to report; what is left over goes at the next start.
            let _ = remove_directory(&directory);
        })
    }

    /// Watches an interface, both directions. An interface that is watched already stays as it is.
    ///
    /// Our TC programs come first in their chains: they let every packet go on, and a program behind them may not.
    /// Interfaces are those of the network namespace of the calling thread.
    ///
    /// # Errors
    /// [`KernelError::NoSuchInterface`], [`KernelError::UnsupportedLink`], [`KernelError::XdpBusy`],
    /// [`KernelError::Attach`], [`KernelError::StaleFilters`], [`KernelError::Netlink`]. Nothing is attached then.
    pub fn attach(&mut self, ifindex: u32) -> Result<Hook, KernelError> {
        if let Some(attached) = self.attached.get(&ifindex) {
            return Ok(attached.hook);
        }
        let attached = attach::attach(&mut self.ebpf, self.options.mode, &mut self.tcx, ifindex)?;
        let hook = attached.hook;
        self.attached.insert(ifindex, attached);
        Ok(hook)
    }

    /// Stops watching an interface. False: it was not watched. An interface that has gone is fine.
    ///
    /// # Errors
    /// [`KernelError::Netlink`] when an emptied clsact qdisc of ours could not be removed.
    pub fn detach(&mut self, ifindex: u32) -> Result<bool, KernelError> {
        match self.attached.remove(&ifindex) {
            Some(attached) => attached.detach().map(|()| true),
            None => Ok(false),
        }
    }

    /// Stops watching all interfaces. What was counted can still be read.
    ///
    /// # Errors
    /// The first failure, as of [`Self::detach`]; the rest is tried nevertheless.
    pub fn detach_all(&mut self) -> Result<(), KernelError> {
        let mut result = Ok(());
        for (_, attached) in std::mem::take(&mut self.attached) {
            result = result.and(attached.detach());
        }
        result
    }

    /// Asks the kernel whether every attachment is still there, and returns the indexes of the interfaces where one
    /// was taken away by someone else (`bpftool link detach`, `tc qdisc del`, another program in XDP's place). These
    /// are not watched any more: what was left of ours is removed, and [`Self::attach`] may be called again.
    ///
    /// An interface that has gone is not among them: the list of interfaces tells that, and it stays attached until
    /// [`Self::detach`]. Two or three questions for each interface, some ten microseconds each. A question that the
    /// kernel does not answer is logged, and its interface counts as watched.
    pub fn verify(&mut self) -> Vec<u32> {
        let mut lost = Vec::new();
        for (ifindex, attached) in &self.attached {
            match attached.is_complete() {
                Ok(true) => {}
                Ok(false) => lost.push(*ifindex),
                Err(error) => {
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "cannot tell whether an interface is still watched"
                    );
                }
            }
        }
        for ifindex in &lost {
            if let Err(error) = self.detach(*ifindex) {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "cannot remove the rest of a lost attachment"
                );
            }
        }
        lost
    }

    /// The watched interfaces by index, with their names when they were attached and their hooks.
    pub fn attached(&self) -> impl Iterator<Item = (u32, &str, Hook)> {
        self.attached.iter().map(|(ifindex, attached)| (*ifindex, attached.interface.as_str(), attached.hook))
    }

    /// Makes these the private and the muted prefixes. A private prefix wins over a muted one; a muted prefix that
    /// is listed twice has the last label. Flows that are in the tables are classified again at their next packet.
    ///
    /// A prefix that is in the old and the new list is in force all the time.
    ///
    /// # Errors
    /// [`KernelError::TooManyPrefixes`] before anything is changed; [`KernelError::Map`], after which a part of the
    /// prefixes may be in force.
    pub fn set_prefixes(
        &mut self,
        lan: &[IpNet],
        muted: impl IntoIterator<Item = (IpNet, u16)>,
    ) -> Result<PrefixChange, KernelError> {
        let (lan4, lan6) = prefixes::by_family(lan.iter().map(|prefix| (*prefix, 0)));
        let (mute4, mute6) = prefixes::by_family(muted.into_iter());
        let sizes = self.options.sizes;
        for (what, count, limit) in [
            ("private", lan4.len().max(lan6.len()), sizes.lan_prefixes as usize),
            ("muted", mute4.len().max(mute6.len()), sizes.muted_prefixes as usize),
        ] {
            if count > limit {
                return Err(KernelError::TooManyPrefixes { what, count, limit });
            }
        }
        let tries = &mut self.tries;
        let mut change = prefixes::refill(&mut tries.lan4, maps::LAN4, &lan4)?;
        change += prefixes::refill(&mut tries.lan6, maps::LAN6, &lan6)?;
        change += prefixes::refill(&mut tries.mute4, maps::MUTE4, &mute4)?;
        change += prefixes::refill(&mut tries.mute6, maps::MUTE6, &mute6)?;
        // Last: a flow that is classified again under this generation finds all of it.
        self.generation = self.generation.wrapping_add(1);
        for cpu in 0..self.cpus {
            let at = cpu * size_of::<CpuStats>() + std::mem::offset_of!(CpuStats, generation);
            self.stats.half(at / 4).store(self.generation, Ordering::Release);
        }
        Ok(change)
    }

    /// Appends what every flow has moved since it was last read, in no order; a flow may come several times (once for
    /// each CPU, and once more when it lost its slot). `now_boot_ns` is the boot time.
    ///
    /// No system call, and only the regions of the tables that were written to lately are looked at; all of them every
    /// [`SWEEP_ALL_NS`].
    pub fn sweep(&mut self, now_boot_ns: u64, out: &mut Vec<FlowDelta>) {
        let all = self.swept_all_ns.is_none_or(|at| now_boot_ns.saturating_sub(at) >= SWEEP_ALL_NS);
        if all {
            self.swept_all_ns = Some(now_boot_ns);
        }
        let since = std::mem::replace(&mut self.swept_ns, now_boot_ns).saturating_sub(LATE_NS);
        self.sweep_scope(if all { Scope::Everything } else { Scope::Since(since) }, now_boot_ns, out);
    }

    /// [`Self::sweep`] of everything, whenever it was written to.
    pub fn sweep_all(&mut self, now_boot_ns: u64, out: &mut Vec<FlowDelta>) {
        self.sweep_scope(Scope::Everything, now_boot_ns, out);
    }

    fn sweep_scope(&mut self, scope: Scope, now_ns: u64, out: &mut Vec<FlowDelta>) {
        self.table4.read(&self.tables, scope, now_ns, out);
        self.table6.read(&self.tables, scope, now_ns, out);
        // A slot that has changed hands had its record reserved before. Those that are held up come with the next sweep.
        let written = self.positions.written();
        self.take_records(now_ns, out);
        if self.positions.taken() >= written {
            self.table4.read_changed(&self.tables, now_ns, out);
            self.table6.read_changed(&self.tables, now_ns, out);
        }
    }

    /// Empties the ring buffer: appends what flows that lost their slots had moved, and returns how many flows were
    /// announced. At most as many records as the ring holds, so that a flood cannot keep the caller here.
    pub fn take_records(&mut self, now_boot_ns: u64, out: &mut Vec<FlowDelta>) -> u64 {
        let mut opened = 0;
        for _ in 0..self.ring_records {
            match self.next_record() {
                Some(Record::Opened(_)) => opened += 1,
                Some(Record::Evicted(evicted)) => self.take_evicted(&evicted, now_boot_ns, out),
                None => break,
            }
        }
        opened
    }

    /// The next "flow opened" record, or `None` when the ring is empty; what flows that lost their slots had moved is
    /// appended.
    pub fn next_opened(&mut self, now_boot_ns: u64, out: &mut Vec<FlowDelta>) -> Option<FlowOpened> {
        loop {
            match self.next_record()? {
                Record::Opened(opened) => return Some(opened),
                Record::Evicted(evicted) => self.take_evicted(&evicted, now_boot_ns, out),
            }
        }
    }

    fn next_record(&mut self) -> Option<Record> {
        loop {
            let item = self.events.next()?;
            match flows::record(&item) {
                Some(record) => return Some(record),
                None => self.refused_records += 1,
            }
        }
    }

    fn take_evicted(&mut self, evicted: &Evicted, now_ns: u64, out: &mut Vec<FlowDelta>) {
        let taken = match evicted.family {
            4 => self.table4.take_evicted(evicted, now_ns, out),
            6 => self.table6.take_evicted(evicted, now_ns, out),
            _ => false,
        };
        if !taken {
            self.refused_records += 1;
        }
    }

    /// Shows a flow in the maps for people (`nm_flows4`, `nm_flows6`). False: these are full.
    pub fn show(&mut self, flow: &FlowId, state: &FlowState) -> bool {
        match ShownKey::from(flow) {
            ShownKey::V4(key) => self.shown4.insert(key, state, 0).is_ok(),
            ShownKey::V6(key) => self.shown6.insert(key, state, 0).is_ok(),
        }
    }

    /// Shows a flow no longer.
    pub fn hide(&mut self, flow: &FlowId) {
        // It may not be there: the maps may have been full.
        let _ = match ShownKey::from(flow) {
            ShownKey::V4(key) => self.shown4.remove(&key),
            ShownKey::V6(key) => self.shown6.remove(&key),
        };
    }

    /// What became of every frame since the programs were loaded, over all CPUs. The CPUs are read one after the
    /// other while they count on, so a sum may be a frame apart from another one.
    pub fn stats(&self) -> Stats {
        stats::sum(&self.stats, self.cpus)
    }

    /// A descriptor of the ring buffer that becomes readable when records arrive (for `AsyncFd`). Readiness is
    /// told once per arrival: after it, call [`Self::take_records`].
    ///
    /// # Errors
    /// Too many open files.
    pub fn ring_fd(&self) -> io::Result<OwnedFd> {
        self.events.as_fd().try_clone_to_owned()
    }

    /// What the programs say of themselves goes to `logger` when it is read. `None` when they say nothing, by
    /// [`LoadOptions::words`], or when somebody has it already.
    ///
    /// # Errors
    /// [`KernelError::Words`].
    pub fn words<L: log::Log>(&mut self, logger: L) -> Result<Option<Words<L>>, KernelError> {
        if self.options.words == WordLevel::Off || self.ebpf.map(words::RING).is_none() {
            return Ok(None);
        }
        Words::new(&mut self.ebpf, self.stats.clone(), self.cpus, logger).map(Some)
    }

    /// Records of the ring buffer that had a wrong length. Above 0 only if agent and programs do not fit together.
    pub fn refused_records(&self) -> u64 {
        self.refused_records
    }

    /// Detaches everything, removes what attaching has added, and removes the pins and their directory. Dropping does
    /// the same, but cannot tell what failed. Both work in the namespaces of the calling thread.
    ///
    /// # Errors
    /// The first failure; the rest is tried nevertheless.
    pub fn shutdown(mut self) -> Result<(), KernelError> {
        self.leave()
    }

    /// A second call finds nothing to do.
    fn leave(&mut self) -> Result<(), KernelError> {
        let mut result = self.detach_all();
        if std::mem::take(&mut self.pinned) {
            result = result.and(remove_directory(&self.options.pin_dir));
        }
        result
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        if let Err(error) = self.leave() {
            tracing::error!(error = &error as &dyn std::error::Error, "cannot leave the kernel as it was");
        }
    }
}

fn remove_directory(directory: &Path) -> Result<(), KernelError> {
    preflight::remove_pins(directory)?;
    fs::remove_dir(directory).map_err(|source| KernelError::PinDirectory {
        action: "remove",
        path: directory.to_owned(),
        source,
    })
}

fn map_error(action: &'static str, name: &'static str) -> impl Fn(MapError) -> KernelError {
    move |source| KernelError::Map { action, name, source: Box::new(source) }
}
