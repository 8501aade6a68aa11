//! The running watch: what comes from the kernel, from USB and from the interfaces becomes events.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use ipnet::IpNet;
use netmon_common::abi::Stats;
use netmon_common::model::{
    AgentStarted, Coverage, EndReason, Event, Filter, Gap, GapReason, Interface, Opened, Service,
};
use netmon_common::prefixes::PrefixList;
use netmon_common::raw::Raw;
use tokio::sync::watch;

use crate::clock::Now;
use crate::config::Config;
use crate::filter::{AtStart, FilterFile};
use crate::flows::{Flows, Moved, Policy};
use crate::kernel::{FlowReading, Kernel};
use crate::ledger::{self, Ledger};
use crate::links::{Choice, Link};
use crate::recorder::Recorder;
use crate::spool::{Recovered, SpoolHandle};
use crate::status::{self, State, Status};
use crate::transfers::{Activity, Key, Output, Transfers};
use crate::uplink::UplinkStatus;
use crate::usb::UsbOutput;

const SECOND_NS: u64 = 1_000_000_000;
/// The kernel's tables are swept this often: a transfer is announced within twice this time.
const SWEEP_NS: u64 = SECOND_NS / 4;
/// A new flow brings the next sweep forward, but two sweeps keep at least this distance.
const EAGER_SWEEP_NS: u64 = SECOND_NS / 20;
/// A flow that was silent for this long leaves the kernel's table: long enough that it rarely comes back, short
/// enough that the table holds what is alive.
const RETIRE_NS: u64 = 30 * SECOND_NS;
/// A sweep that comes this late may have let two bursts run into one.
const STALLED_NS: u64 = 2 * SECOND_NS;

/// RFC 1918, RFC 3927, RFC 4193, RFC 4291 (2.5.6).
const PRIVATE: [&str; 6] =
    ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "fc00::/7", "fe80::/10"];

/// What a watch starts with.
#[expect(missing_docs, reason = "the types say it")]
pub struct Start {
    pub kernel: Kernel,
    pub recorder: Recorder,
    pub spool: SpoolHandle,
    pub recovered: Recovered,
    pub filter: FilterFile,
    pub list: AtStart,
    pub choice: Choice,
    pub config: Config,
    pub runtime: PathBuf,
    pub hostname: Raw,
    pub uplink: watch::Receiver<UplinkStatus>,
    pub now: Now,
}

/// See the module.
pub struct Watch {
    kernel: Kernel,
    recorder: Recorder,
    spool: SpoolHandle,
    uplink: watch::Receiver<UplinkStatus>,
    filter: FilterFile,
    list: PrefixList,
    choice: Choice,
    config: Config,
    runtime: PathBuf,
    run: u32,
    /// Interfaces as last listed, by index.
    links: BTreeMap<u32, Link>,
    watched: BTreeMap<u32, Interface>,
    failed: BTreeMap<u32, String>,
    lan: Vec<IpNet>,
    usb: bool,
    flows: Flows,
    policy: Policy,
    transfers: Transfers,
    ledger: Ledger,
    readings: Vec<FlowReading>,
    stats: Stats,
    overflowed: u64,
    timers: Timers,
}

/// Boot times, nanoseconds.
struct Timers {
    last_sweep: u64,
    next_sweep: u64,
    next_second: u64,
    next_coverage: u64,
    next_muted: u64,
    /// Wall time of the last report of losses.
    losses_since: i64,
}

impl Watch {
    /// Records the start and what is known of the time before.
    ///
    /// # Errors
    /// The kernel does not take the prefixes.
    pub fn start(start: Start) -> Result<Self> {
        let Start {
            kernel,
            recorder,
            spool,
            recovered,
            filter,
            list,
            choice,
            config,
            runtime,
            hostname,
            uplink,
            now,
        } = start;
        let services = config.filter.services.iter();
        let services =
            services.flat_map(|(name, ports)| ports.iter().map(|port| (port.0, name.clone()))).collect();
        let AtStart { list, refused } = list;
        let mut watch = Self {
            kernel,
            recorder,
            spool,
            uplink,
            filter,
            list,
            choice,
            config,
            runtime,
            run: recovered.run,
            links: BTreeMap::new(),
            watched: BTreeMap::new(),
            failed: BTreeMap::new(),
            lan: Vec::new(),
            usb: false,
            flows: Flows::default(),
            policy: Policy { services, ..Policy::default() },
            transfers: Transfers::default(),
            ledger: Ledger::new(now.wall_ns),
            readings: Vec::new(),
            stats: Stats::default(),
            overflowed: 0,
            timers: Timers {
                last_sweep: now.boot_ns,
                next_sweep: now.boot_ns,
                next_second: now.boot_ns,
                next_coverage: now.boot_ns + SECOND_NS,
                next_muted: now.boot_ns,
                losses_since: now.wall_ns,
            },
        };
        watch.record_start(&now, hostname, &recovered);
        watch.refill().context("cannot fill the kernel's prefix tables")?;
        watch.record_filter(&now);
        if let Some(error) = refused {
            tracing::error!(%error, "the last good filter list stays in force");
            watch
                .recorder
                .record(&now, Event::Filter(Filter::Refused { error: Raw::new(error.to_string()) }));
        }
        Ok(watch)
    }

    fn record_start(&mut self, now: &Now, hostname: Raw, recovered: &Recovered) {
        let uname = rustix::system::uname();
        self.recorder.record(
            now,
            Event::AgentStarted(AgentStarted {
                version: env!("CARGO_PKG_VERSION").into(),
                kernel: Raw::new(uname.release().to_bytes()),
                hostname,
                boot_id: boot_id(),
                previous_run_died: recovered.previous_run_died,
            }),
        );
        if let Some(from_wall_ns) = recovered.last_wall_ns {
            let gap =
                Gap { reason: GapReason::AgentDown, from_wall_ns, to_wall_ns: now.wall_ns, count: None };
            self.recorder.record(now, Event::Gap(gap));
        }
        self.recorder.record_spool_losses(now);
    }

    /// Boot time at which [`Watch::due`] wants to be called.
    pub fn due_ns(&self) -> u64 {
        self.timers.next_sweep.min(self.timers.next_second)
    }

    /// The ring has records. The tables hold the same flows with their counters: sweep them soon.
    pub fn opened(&mut self, now: &Now) {
        while self.kernel.next_opened().is_some() {}
        let eager = self.timers.last_sweep + EAGER_SWEEP_NS;
        self.timers.next_sweep = self.timers.next_sweep.min(eager.max(now.boot_ns));
    }

    /// Does what is due.
    pub fn due(&mut self, now: &Now) {
        if now.boot_ns >= self.timers.next_sweep {
            self.sweep(now);
        }
        if now.boot_ns >= self.timers.next_second {
            self.timers.next_second = now.boot_ns + SECOND_NS;
            self.poll_filter(now);
            self.record_losses(now);
            self.write_status(now);
        }
        if now.boot_ns >= self.timers.next_muted {
            self.timers.next_muted = now.boot_ns + self.config.report.muted_s * SECOND_NS;
            self.record_muted(now);
        }
        if now.boot_ns >= self.timers.next_coverage {
            self.timers.next_coverage = now.boot_ns + self.config.report.coverage_s * SECOND_NS;
            let coverage = self.coverage();
            self.recorder.record(now, Event::Coverage(coverage));
        }
    }

    fn sweep(&mut self, now: &Now) {
        let late = now.boot_ns.saturating_sub(self.timers.next_sweep);
        if late >= STALLED_NS {
            let from_wall_ns = now.wall_at(self.timers.last_sweep);
            let reason = GapReason::AgentStalled;
            self.recorder
                .record(now, Event::Gap(Gap { reason, from_wall_ns, to_wall_ns: now.wall_ns, count: None }));
        }
        self.timers.last_sweep = now.boot_ns;
        self.timers.next_sweep = now.boot_ns + SWEEP_NS;
        self.readings.clear();
        if let Err(error) = self.kernel.sweep(now.boot_ns, RETIRE_NS, &mut self.readings) {
            tracing::error!(error = &error as &dyn std::error::Error, "cannot read the kernel's flow tables");
        }
        self.policy.own.clone_from(&self.uplink.borrow().sockets);
        let links = &self.links;
        let name = |index| links.get(&index).map_or_else(Raw::default, |link| Raw::from(link.name.as_str()));
        for moved in self.flows.observe(&self.readings, &self.policy, self.ledger.period(), name) {
            match moved {
                Moved::Activity(activity) => self.transfers.activity(activity),
                Moved::Muted(label, traffic, flows) => self.ledger.add(&label, traffic, flows),
            }
        }
        self.transfers.handle_timeout(now.boot_ns);
        self.record_transfers(now);
    }

    fn record_transfers(&mut self, now: &Now) {
        while let Some(output) = self.transfers.poll() {
            match output {
                Output::Report(report) => {
                    self.recorder.record(now, Event::Transfer(report.into_transfer(now)))
                }
                Output::Discarded(traffic) => self.ledger.add(ledger::NO_PAYLOAD, traffic, 1),
                Output::Overflow(traffic) => {
                    self.overflowed += 1;
                    self.ledger.add(ledger::OVERFLOW, traffic, 1);
                }
            }
        }
    }

    fn record_muted(&mut self, now: &Now) {
        for muted in self.ledger.drain(now.wall_ns) {
            self.recorder.record(now, Event::Muted(muted));
        }
    }

    /// Every loss since the last second becomes a gap with its count.
    fn record_losses(&mut self, now: &Now) {
        let stats = match self.kernel.stats() {
            Ok(stats) => stats,
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "cannot read the kernel's counters"
                );
                return;
            }
        };
        let losses = [
            (GapReason::FlowTableFull, stats.table_full - self.stats.table_full),
            (GapReason::RingFull, stats.ring_full - self.stats.ring_full),
            (GapReason::TransferTableFull, std::mem::take(&mut self.overflowed)),
        ];
        self.stats = stats;
        let from_wall_ns = std::mem::replace(&mut self.timers.losses_since, now.wall_ns);
        for (reason, count) in losses.into_iter().filter(|(_, count)| *count > 0) {
            let gap = Gap { reason, from_wall_ns, to_wall_ns: now.wall_ns, count: Some(count) };
            self.recorder.record(now, Event::Gap(gap));
        }
        self.recorder.record_spool_losses(now);
    }

    /// Takes in the interfaces: attaches to those that came, forgets those that went.
    pub fn links(&mut self, now: &Now, links: Vec<Link>) {
        self.links = links.into_iter().map(|link| (link.index, link)).collect();
        let wanted = |link: &Link| self.choice.wants(link);
        let gone: Vec<u32> =
            self.watched.keys().copied().filter(|index| !self.links.get(index).is_some_and(wanted)).collect();
        for index in gone {
            if let Err(error) = self.kernel.detach(index) {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    index,
                    "cannot detach from an interface"
                );
            }
            if let Some(interface) = self.watched.remove(&index) {
                self.recorder.record(now, Event::InterfaceDetached(interface));
            }
        }
        self.failed.retain(|index, _| self.links.contains_key(index));
        let new: Vec<Link> = self
            .links
            .values()
            .filter(|link| wanted(link) && !self.watched.contains_key(&link.index))
            .cloned()
            .collect();
        for link in new {
            self.attach(now, &link);
        }
        if self.lan != self.private_prefixes()
            && let Err(error) = self.refill()
        {
            tracing::error!(error = &*error, "cannot refill the kernel's prefix tables");
        }
        self.write_status(now);
    }

    fn attach(&mut self, now: &Now, link: &Link) {
        let name = Raw::from(link.name.as_str());
        match self.kernel.attach(link.index) {
            Ok(hook) => {
                self.failed.remove(&link.index);
                let interface = Interface { name, index: link.index, hook };
                self.watched.insert(link.index, interface.clone());
                self.recorder.record(now, Event::InterfaceAttached(interface));
            }
            Err(error) => {
                let text = format!("{}: {}", name.escaped(), crate::chain(&error));
                // Listed anew on every change: say it once.
                if self.failed.insert(link.index, text.clone()).as_ref() != Some(&text) {
                    tracing::error!(interface = %name.escaped(), error = &error as &dyn std::error::Error, "cannot watch an interface");
                    let gap = Gap {
                        reason: GapReason::InterfaceNotWatched,
                        from_wall_ns: now.wall_ns,
                        to_wall_ns: now.wall_ns,
                        count: None,
                    };
                    self.recorder.record(now, Event::Gap(gap));
                }
            }
        }
    }

    /// Built in, configured, and whatever the PC's own interfaces have on their links.
    fn private_prefixes(&self) -> Vec<IpNet> {
        let built_in = PRIVATE.iter().filter_map(|prefix| prefix.parse().ok());
        let own = self.links.values().flat_map(|link| &link.on_link);
        let mut prefixes: Vec<IpNet> =
            built_in.chain(self.config.capture.lan.iter().map(IpNet::trunc)).chain(own.copied()).collect();
        prefixes.sort();
        prefixes.dedup();
        prefixes
    }

    fn refill(&mut self) -> Result<()> {
        let lan = self.private_prefixes();
        self.kernel.set_prefixes(&lan, self.list.prefixes())?;
        self.lan = lan;
        self.policy.labels = self.list.labels().to_vec();
        Ok(())
    }

    fn poll_filter(&mut self, now: &Now) {
        let error = match self.filter.poll() {
            None => return,
            Some(Ok(list)) => {
                // What has been counted so far belongs to the old labels.
                self.sweep(now);
                let old = std::mem::replace(&mut self.list, list);
                match self.refill() {
                    Ok(()) => return self.record_filter(now),
                    Err(error) => {
                        self.list = old;
                        format!("the kernel did not take it: {error:#}")
                    }
                }
            }
            Some(Err(error)) => crate::chain(&error),
        };
        tracing::error!(error, "filter list refused, the last good one stays in force");
        self.recorder.record(now, Event::Filter(Filter::Refused { error: Raw::new(error) }));
    }

    fn record_filter(&mut self, now: &Now) {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let (prefixes, labels) = (count(self.list.len()), count(self.list.labels().len()));
        self.recorder.record(now, Event::Filter(Filter::Loaded { prefixes, labels }));
    }

    /// Takes in what the USB watch says.
    pub fn usb(&mut self, now: &Now, output: UsbOutput) {
        match output {
            UsbOutput::Event { event, .. } => self.recorder.record(now, event),
            UsbOutput::Disk(disk) => self.transfers.activity(Activity {
                key: Key::Disk(disk.disk),
                service: Service::Storage,
                opened: Opened::Here,
                interface: Raw::default(),
                first_ns: disk.first_boot_ns,
                last_ns: disk.last_boot_ns,
                traffic: disk.traffic,
            }),
            UsbOutput::DiskGone { disk, .. } => {
                self.transfers.end(&Key::Disk(disk), EndReason::DeviceRemoved)
            }
            UsbOutput::Watching(usb) => self.usb = usb,
        }
        self.record_transfers(now);
    }

    fn coverage(&self) -> Coverage {
        let spool = self.spool.stats();
        let interfaces = self.watched.values().take(Coverage::MAX_INTERFACES);
        Coverage {
            interfaces: interfaces.map(|interface| interface.name.clone()).collect(),
            usb: self.usb,
            flows: self.flows.len() as u64,
            transfers: self.transfers.going_on() as u64,
            seen: self.stats.seen,
            counted: self.stats.counted,
            not_ip: self.stats.not_ip,
            other_protocol: self.stats.other_protocol,
            malformed: self.stats.malformed,
            table_full: self.stats.table_full,
            ring_full: self.stats.ring_full,
            backlog: spool.backlog,
            spool_lost: spool.dropped + spool.lost,
        }
    }

    fn write_status(&self, now: &Now) {
        let status = Status {
            state: if self.watched.is_empty() { State::NoInterface } else { State::Watching },
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            run: self.run,
            updated_boot_ns: now.boot_ns,
            updated_wall_ns: now.wall_ns,
            interfaces: self.watched.values().map(Into::into).collect(),
            failed_interfaces: self.failed.values().cloned().collect(),
            filter: format!("{}, {} prefixes", self.filter.source(), self.list.len()),
            server: self.uplink.borrow().describe(now),
            spool_bytes: self.spool.stats().bytes,
            counters: (&self.coverage()).into(),
        };
        if let Err(error) = status::write(&self.runtime, &status) {
            tracing::error!(%error, directory = %self.runtime.display(), "cannot write the status");
        }
    }

    /// Ends in good order: what goes on is ended, everything is summed and recorded, the hooks are free again.
    pub fn stop(mut self, now: &Now) {
        self.sweep(now);
        self.transfers.end_all(EndReason::AgentStopped);
        self.record_transfers(now);
        self.record_muted(now);
        self.record_losses(now);
        let coverage = self.coverage();
        self.recorder.record(now, Event::Coverage(coverage));
        self.recorder.record(now, Event::AgentStopped);
        status::remove(&self.runtime);
        if let Err(error) = self.kernel.shutdown() {
            tracing::error!(error = &error as &dyn std::error::Error, "cannot leave the kernel as it was");
        }
    }
}

/// `/proc/sys/kernel/random/boot_id`; zeros where it cannot be read.
fn boot_id() -> [u8; 16] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    netmon_common::enroll::unhex(&text.trim().replace('-', "")).unwrap_or_default()
}
