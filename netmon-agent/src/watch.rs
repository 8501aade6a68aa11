//! The running watch: what comes from the kernel, from USB and from the interfaces becomes events.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result};
use ipnet::IpNet;
use netmon_common::abi::Stats;
use netmon_common::model::{
    AgentStarted, Coverage, EndReason, Event, Filter, Gap, GapReason, Opened, Service, Traffic,
};
use netmon_common::prefixes::PrefixList;
use netmon_common::raw::Raw;
use netmon_common::wire::Heartbeat;
use tokio::sync::watch;

use crate::clock::Now;
use crate::config::Config;
use crate::filter::{AtStart, FilterFile};
use crate::flows::{Flows, Moved, Policy};
use crate::interfaces::Interfaces;
use crate::kernel::{FlowDelta, Kernel};
use crate::ledger::{self, Ledger};
use crate::links::{Choice, Link};
use crate::pace::{self, Pace};
use crate::privileges::Privileges;
use crate::recorder::Recorder;
use crate::spool::{Recovered, SpoolHandle};
use crate::status::{self, State, Status};
use crate::transfers::{Activity, Key, Output, Through, Transfers};
use crate::uplink::UplinkStatus;
use crate::usb::UsbOutput;

const SECOND_NS: u64 = 1_000_000_000;
/// Flows that are shown under `bpftool` in a second, one system call each; the others wait for the next one.
const SHOWN_AT_ONCE: usize = 1_000;
/// A sweep that comes this long after the one before may have let two bursts run into one.
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
    pub boot_id: [u8; 16],
    pub uplink: watch::Receiver<UplinkStatus>,
    pub heartbeat: watch::Sender<Heartbeat>,
    pub now: Now,
}

/// See the module.
pub struct Watch {
    kernel: Kernel,
    recorder: Recorder,
    spool: SpoolHandle,
    uplink: watch::Receiver<UplinkStatus>,
    heartbeat: watch::Sender<Heartbeat>,
    filter: FilterFile,
    list: PrefixList,
    config: Config,
    runtime: PathBuf,
    privileges: Option<Privileges>,
    /// Sockets to the server of an agent that died here.
    sockets_left: Vec<(u16, SocketAddr)>,
    run: u32,
    interfaces: Interfaces,
    lan: Vec<IpNet>,
    usb: bool,
    flows: Flows,
    policy: Policy,
    transfers: Transfers,
    ledger: Ledger,
    deltas: Vec<FlowDelta>,
    stats: Stats,
    overflowed: u64,
    timers: Timers,
}

/// Boot times, nanoseconds.
struct Timers {
    sweep: Pace,
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
            boot_id,
            uplink,
            heartbeat,
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
            heartbeat,
            filter,
            list,
            interfaces: Interfaces::new(choice, &now),
            config,
            sockets_left: status::sockets_left(&runtime),
            runtime,
            privileges: Privileges::read().ok(),
            run: recovered.run,
            lan: Vec::new(),
            usb: false,
            flows: Flows::default(),
            policy: Policy { services, ..Policy::default() },
            transfers: Transfers::default(),
            ledger: Ledger::new(now.wall_ns),
            deltas: Vec::new(),
            stats: Stats::default(),
            overflowed: 0,
            timers: Timers {
                sweep: Pace::new(now.boot_ns),
                next_second: now.boot_ns,
                next_coverage: now.boot_ns + SECOND_NS,
                next_muted: now.boot_ns,
                losses_since: now.wall_ns,
            },
        };
        watch.record_start(&now, hostname, boot_id, &recovered);
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

    fn record_start(&mut self, now: &Now, hostname: Raw, boot_id: [u8; 16], recovered: &Recovered) {
        let uname = rustix::system::uname();
        self.recorder.record(
            now,
            Event::AgentStarted(AgentStarted {
                version: env!("CARGO_PKG_VERSION").into(),
                kernel: Raw::new(uname.release().to_bytes()),
                hostname,
                boot_id,
                previous_run_died: recovered.previous_run_died,
            }),
        );
        let to_wall_ns = now.wall_ns;
        let mut gap = |reason, from_wall_ns, count| {
            self.recorder.record(now, Event::Gap(Gap { reason, from_wall_ns, to_wall_ns, count }));
        };
        if let Some(last) = recovered.last_wall_ns {
            gap(GapReason::AgentDown, last, None);
        }
        if recovered.damaged_bytes > 0 {
            let last = recovered.last_wall_ns.unwrap_or(to_wall_ns);
            gap(GapReason::SpoolDamaged, last, Some(recovered.damaged_bytes));
        }
        self.recorder.record_spool_losses(now);
    }

    /// Boot time at which [`Watch::due`] wants to be called.
    pub fn due_ns(&self) -> u64 {
        let Timers { sweep, next_second, .. } = &self.timers;
        // What is done once a second waits for the nearest sweep, unless that is far.
        if sweep.due_ns() > next_second + pace::USUAL_NS / 2 { *next_second } else { sweep.due_ns() }
    }

    /// The ring has records: new flows, whose counters are in the tables, so that these are to be swept soon; or what flows
    /// that lost their slots had moved.
    pub fn opened(&mut self, now: &Now) {
        self.kernel.take_records(now.boot_ns, &mut self.deltas);
        self.take_in_deltas();
        self.timers.sweep.hasten(now.boot_ns);
    }

    fn take_in_deltas(&mut self) {
        if self.deltas.is_empty() {
            return;
        }
        self.update_own();
        let through = |index| self.interfaces.through(index);
        let moved = self.flows.observe(&mut self.deltas, &self.policy, self.ledger.period(), through);
        self.deltas.clear();
        self.take_in(moved);
    }

    fn update_own(&mut self) {
        self.policy.own.clone_from(&self.sockets_left);
        self.policy.own.extend_from_slice(&self.uplink.borrow().sockets);
    }

    fn take_in(&mut self, moved: Vec<Moved>) {
        for moved in moved {
            match moved {
                Moved::Activity(activity) => self.transfers.activity(activity),
                Moved::Muted(label, traffic, flows) => self.ledger.add(&label, traffic, flows),
            }
        }
    }

    /// Does what is due; to be followed by [`Watch::done`].
    pub fn due(&mut self, now: &Now) {
        if now.boot_ns >= self.timers.sweep.due_ns() {
            self.sweep(now);
        }
        // With the sweep that is nearest: each wake-up costs more than what is done in it.
        if now.boot_ns + pace::USUAL_NS / 2 >= self.timers.next_second {
            self.timers.next_second = now.boot_ns + SECOND_NS;
            self.poll_filter(now);
            self.interfaces.retry(now, &mut self.kernel, &mut self.recorder);
            self.refill_if_changed();
            self.record_losses(now);
            self.show_flows(now);
            self.write_status(now);
            self.beat(now);
        }
        if now.boot_ns >= self.timers.next_muted {
            self.timers.next_muted = now.boot_ns + self.config.report.muted_s * SECOND_NS;
            self.record_muted(now);
        }
        if now.boot_ns >= self.timers.next_coverage {
            self.timers.next_coverage = now.boot_ns + self.config.report.coverage_s * SECOND_NS;
            self.interfaces.verify(now, &mut self.kernel, &mut self.recorder);
            let coverage = self.coverage();
            self.recorder.record(now, Event::Coverage(coverage));
        }
    }

    /// `now`, after [`Watch::due`], tells how long that took.
    pub fn done(&mut self, now: &Now) {
        self.timers.sweep.end(now.boot_ns);
    }

    fn sweep(&mut self, now: &Now) {
        self.record_stall(now);
        self.timers.sweep.begin(now.boot_ns);
        self.kernel.sweep(now.boot_ns, &mut self.deltas);
        self.take_in_swept(now);
    }

    /// To be called before a sweep, the last one included: nobody else knows how late it comes.
    fn record_stall(&mut self, now: &Now) {
        let last_ns = self.timers.sweep.began_ns();
        if now.boot_ns.saturating_sub(last_ns) >= STALLED_NS {
            let from_wall_ns = now.wall_at(last_ns);
            let reason = GapReason::AgentStalled;
            self.recorder
                .record(now, Event::Gap(Gap { reason, from_wall_ns, to_wall_ns: now.wall_ns, count: None }));
        }
    }

    fn take_in_swept(&mut self, now: &Now) {
        self.take_in_deltas();
        // Only now is it known what moved until `now`.
        self.transfers.handle_timeout(now.boot_ns);
        self.record_transfers(now);
    }

    fn show_flows(&mut self, now: &Now) {
        for flow in self.flows.forget(now.boot_ns) {
            self.kernel.hide(&flow);
        }
        for _ in 0..SHOWN_AT_ONCE {
            let Some((flow, state)) = self.flows.next_moved() else { break };
            self.kernel.show(&flow, &state);
        }
    }

    fn record_transfers(&mut self, now: &Now) {
        while let Some(output) = self.transfers.poll() {
            match output {
                Output::Report(report) => self.recorder.record(now, report.into_event(now)),
                // A disk that had requests in flight and moved nothing.
                Output::Discarded(traffic) if traffic == Traffic::default() => {}
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
        let stats = self.kernel.stats();
        let losses = [
            (GapReason::FlowTableFull, stats.table_full - self.stats.table_full),
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

    /// Takes in the interfaces as they are now.
    pub fn links(&mut self, now: &Now, links: Vec<Link>) {
        self.interfaces.update(now, links, &mut self.kernel, &mut self.recorder);
        self.refill_if_changed();
        self.write_status(now);
    }

    /// Built in, configured, and whatever the PC's own interfaces have on their links.
    fn private_prefixes(&self) -> Vec<IpNet> {
        let built_in = PRIVATE.iter().filter_map(|prefix| prefix.parse().ok());
        let configured = self.config.capture.lan.iter().map(IpNet::trunc);
        let mut prefixes: Vec<IpNet> = built_in.chain(configured).chain(self.interfaces.on_link()).collect();
        prefixes.sort();
        prefixes.dedup();
        prefixes
    }

    /// Fills the kernel's tries. A label keeps its number for as long as the agent runs: what was counted under the old
    /// list is summed under the old list's label.
    fn refill(&mut self) -> Result<()> {
        let mut numbers = Vec::new();
        for label in self.list.labels() {
            let known = self.policy.labels.iter().position(|known| known == label);
            let number = known.unwrap_or(self.policy.labels.len());
            if known.is_none() {
                self.policy.labels.push(label.clone());
            }
            numbers.push(u16::try_from(number).context("too many labels since the agent was started")?);
        }
        let numbered = |(prefix, label): (IpNet, u16)| Some((prefix, *numbers.get(usize::from(label))?));
        let lan = self.private_prefixes();
        self.kernel.set_prefixes(&lan, self.list.prefixes().filter_map(numbered))?;
        self.lan = lan;
        Ok(())
    }

    fn refill_if_changed(&mut self) {
        if self.lan != self.private_prefixes()
            && let Err(error) = self.refill()
        {
            tracing::error!(error = &*error, "cannot refill the kernel's prefix tables, trying again");
        }
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
                interface: Through::default(),
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
        let interfaces = self.interfaces.watched().take(Coverage::MAX_INTERFACES);
        Coverage {
            interfaces: interfaces.map(|interface| interface.name.clone()).collect(),
            usb: self.usb,
            flows: self.flows.len() as u64,
            transfers: self.transfers.going_on() as u64,
            seen: self.stats.seen,
            counted: self.stats.counted,
            not_ip: self.stats.not_ip,
            not_ip_bytes: self.stats.not_ip_bytes,
            other_protocol: self.stats.other_protocol,
            other_protocol_bytes: self.stats.other_protocol_bytes,
            malformed: self.stats.malformed,
            malformed_bytes: self.stats.malformed_bytes,
            table_full: self.stats.table_full,
            ring_full: self.stats.ring_full,
            backlog: spool.backlog,
            spool_lost: spool.dropped + spool.lost,
        }
    }

    /// Says that the watch goes on: to the server, by the uplink.
    fn beat(&self, now: &Now) {
        let spool = self.spool.stats();
        self.heartbeat.send_replace(Heartbeat {
            boot_ns: now.boot_ns,
            wall_ns: now.wall_ns,
            coverage: self.coverage(),
            spool_bytes: spool.bytes,
            oldest_wall_ns: spool.oldest_wall_ns,
        });
    }

    fn write_status(&self, now: &Now) {
        let (left_interfaces, left_unnamed) = self.interfaces.left();
        // Once: a borrow lasts to the end of its statement, and a second one waits for the uplink that waits for the first.
        let uplink = self.uplink.borrow().clone();
        let status = Status {
            state: match self.interfaces.watched().next() {
                Some(_) => State::Watching,
                None => State::NoInterface,
            },
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            run: self.run,
            updated_boot_ns: now.boot_ns,
            updated_wall_ns: now.wall_ns,
            interfaces: self.interfaces.watched().map(Into::into).collect(),
            failed_interfaces: self.interfaces.failures(),
            left_interfaces,
            left_unnamed,
            filter: format!("{}, {} prefixes", self.filter.source(), self.list.len()),
            server: uplink.describe(now),
            acked: uplink.acked,
            privileges: self.privileges.clone(),
            sockets: uplink.sockets,
            spool_bytes: self.spool.stats().bytes,
            coverage: self.coverage(),
        };
        if let Err(error) = status::write(&self.runtime, &status) {
            tracing::error!(%error, directory = %self.runtime.display(), "cannot write the status");
        }
    }

    /// Ends in good order: what goes on is ended, everything is summed and recorded, the hooks are free again.
    pub fn stop(mut self, now: &Now) {
        if let Err(error) = self.kernel.detach_all() {
            tracing::error!(error = &error as &dyn std::error::Error, "cannot detach from an interface");
        }
        self.record_stall(now);
        self.kernel.sweep_all(now.boot_ns, &mut self.deltas);
        self.take_in_swept(now);
        self.transfers.end_all(EndReason::AgentStopped);
        self.record_transfers(now);
        self.record_muted(now);
        self.interfaces.stop(now, &mut self.recorder);
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
