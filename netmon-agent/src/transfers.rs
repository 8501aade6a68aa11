//! Bursts of activity become transfers: one state machine for all three channels.
//!
//! Pure: told what moved and what time it is. A transfer begins with the first packet of its burst, is announced
//! once payload moved, and is over at its last packet when [`SILENCE_NS`] have passed without another. What only
//! acknowledges is no transfer; its bytes are handed back ([`Output::Discarded`]) so that they can be summed.
//!
//! ```
//! use netmon_agent::transfers::{Activity, Key, Output, Transfers};
//! # use netmon_common::model::{Opened, Phase, Service, Traffic};
//! let mut transfers = Transfers::default();
//! transfers.activity(Activity {
//!     key: Key::Lan("10.0.0.2".parse().unwrap()),
//!     service: Service::Tcp(445),
//!     opened: Opened::Here,
//!     interface: "eth0".into(),
//!     first_ns: 5_000_000_000,
//!     last_ns: 5_100_000_000,
//!     traffic: Traffic { tx_bytes: 1_040, tx_payload: 1_000, tx_packets: 1, ..Traffic::default() },
//! });
//! assert!(matches!(transfers.poll(), Some(Output::Report(r)) if r.phase == Phase::Started));
//! transfers.handle_timeout(7_099_999_999);
//! assert_eq!(transfers.poll(), None);
//! transfers.handle_timeout(7_100_000_000);
//! assert!(matches!(transfers.poll(), Some(Output::Report(r)) if r.last_ns == 5_100_000_000));
//! ```

mod disk;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;

use netmon_common::abi;
use netmon_common::model::{
    Channel, Counterpart, Disk, EndReason, Event, Opened, Phase, Service, Traffic, Transfer,
};
use netmon_common::raw::Raw;

use crate::clock::Now;

pub use disk::{DISK_LATE_NS, MAX_MOUNT_WRITES, MAX_PROBE, WRITEBACK_SILENCE_NS};

/// Silence that ends a transfer: the pause that the lab's rules name. The kernel marks bursts by the same.
pub const SILENCE_NS: u64 = abi::SILENCE_NS;
/// A transfer that lasts is reported this often.
pub const PROGRESS_NS: u64 = 5_000_000_000;
/// Most bursts at once. A port scan of a /16 makes as many; beyond, traffic is summed and the refusals counted.
pub const MAX_BURSTS: usize = 65_536;

/// What belongs to one transfer.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// Everything exchanged with one host of the private network.
    Lan(IpAddr),
    /// One service of one host of the Internet.
    Internet(IpAddr, Service),
    /// One USB disk.
    Disk(Disk),
}

/// The interface that packets crossed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Through {
    /// Its name then; empty for disks.
    pub name: Raw,
    /// It was a USB adapter, phone or modem.
    pub usb: bool,
}

impl From<&str> for Through {
    /// One that is not USB's.
    fn from(name: &str) -> Self {
        Self { name: name.into(), usb: false }
    }
}

/// Something moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Activity {
    /// The transfer that it belongs to.
    pub key: Key,
    /// What was spoken.
    pub service: Service,
    /// Who opened the flow.
    pub opened: Opened,
    /// Interface of the flow's first packet.
    pub interface: Through,
    /// Boot time of the first packet after the flow's latest silence, or, where the flow was not silent, any
    /// time between its packet before and now.
    pub first_ns: u64,
    /// Boot time of the last packet.
    pub last_ns: u64,
    /// What moved since the flow was last looked at.
    pub traffic: Traffic,
}

/// What a transfer did, in boot time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Number within the run.
    pub id: u64,
    /// Started, goes on, ended.
    pub phase: Phase,
    /// With whom.
    pub key: Key,
    /// What was spoken, in order.
    pub services: Vec<Service>,
    /// Who opened its first flow.
    pub opened: Opened,
    /// Interface of its first packet. All of its packets crossed USB, or none.
    pub interface: Through,
    /// First packet, boot time.
    pub first_ns: u64,
    /// Last packet so far, boot time.
    pub last_ns: u64,
    /// What moved so far.
    pub traffic: Traffic,
}

/// What comes out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// To be recorded.
    Report(Report),
    /// A burst without payload is over: no transfer, but these bytes did move.
    Discarded(Traffic),
    /// A USB disk was looked at before anything of it was mounted: no transfer, but these bytes did move.
    Probed(Traffic),
    /// [`MAX_BURSTS`] are going on; this could not be followed.
    Overflow(Traffic),
}

/// The transfers of one PC.
#[derive(Debug, Default)]
pub struct Transfers {
    bursts: BTreeMap<Path, Burst>,
    reported: u64,
    /// Bytes read from disks that are plugged in, in bursts that were handed back as [`Output::Probed`].
    probed: BTreeMap<Key, u64>,
    outputs: VecDeque<Output>,
}

#[derive(Debug)]
struct Burst {
    /// Set once the transfer is announced: its number, and when it was last reported.
    announced: Option<(u64, u64)>,
    services: BTreeSet<Service>,
    opened: Opened,
    interface: Through,
    first_ns: u64,
    last_ns: u64,
    traffic: Traffic,
    /// Of a disk.
    disk: Option<disk::Use>,
}

/// A host that is reached over USB and by another way at once has a transfer on each: what leaves through a phone must not
/// be part of what began on the room's network.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Path {
    key: Key,
    over_usb: bool,
}

impl From<Key> for Path {
    fn from(key: Key) -> Self {
        Self { key, over_usb: false }
    }
}

impl Transfers {
    /// Takes in what moved. Activities of one sweep are given in the order of their `first_ns`.
    pub fn activity(&mut self, activity: Activity) {
        let Activity { key, service, opened, interface, first_ns, last_ns, traffic } = activity;
        let path = Path { key, over_usb: interface.usb };
        if self.bursts.get(&path).is_some_and(|burst| first_ns >= burst.silent_ns()) {
            self.end_burst(&path, EndReason::Silence);
        }
        if !self.bursts.contains_key(&path) && self.bursts.len() >= MAX_BURSTS {
            self.outputs.push_back(Output::Overflow(traffic));
            return;
        }
        let burst = self.bursts.entry(path.clone()).or_insert_with(|| Burst {
            announced: None,
            services: BTreeSet::new(),
            opened,
            interface,
            first_ns,
            last_ns,
            traffic: Traffic::default(),
            disk: None,
        });
        if first_ns < burst.first_ns {
            (burst.first_ns, burst.opened) = (first_ns, opened);
        }
        burst.last_ns = burst.last_ns.max(last_ns);
        burst.traffic += traffic;
        if burst.services.len() < Transfer::MAX_SERVICES {
            burst.services.insert(service);
        }
        if !burst.traffic.is_without_payload() {
            self.announce(&path);
        }
    }

    /// Unless it is announced already.
    fn announce(&mut self, path: &Path) {
        let Some(burst) = self.bursts.get_mut(path).filter(|burst| burst.announced.is_none()) else { return };
        self.reported += 1;
        burst.announced = Some((self.reported, burst.last_ns));
        self.outputs.extend(burst.report(&path.key, Phase::Started));
    }

    /// Ends what was silent for long enough at `now_ns` and reports what lasts.
    ///
    /// `now_ns` is a boot time up to which all activity was taken in: for flows, the moment before the sweep.
    pub fn handle_timeout(&mut self, now_ns: u64) {
        let over = |burst: &Burst| {
            let late = if burst.disk.is_some() { DISK_LATE_NS } else { 0 };
            now_ns >= burst.silent_ns().saturating_add(late)
        };
        let silent: Vec<_> =
            self.bursts.iter().filter(|(_, burst)| over(burst)).map(|(path, _)| path.clone()).collect();
        for path in silent {
            self.end_burst(&path, EndReason::Silence);
        }
        for (path, burst) in &mut self.bursts {
            let Some((_, reported_ns)) = &mut burst.announced else { continue };
            if now_ns >= reported_ns.saturating_add(PROGRESS_NS) && burst.last_ns > *reported_ns {
                *reported_ns = now_ns;
                self.outputs.extend(burst.report(&path.key, Phase::Progress));
            }
        }
    }

    /// Ends the transfers with one counterpart now: its device is gone.
    pub fn end(&mut self, key: &Key, reason: EndReason) {
        for over_usb in [false, true] {
            self.end_burst(&Path { key: key.clone(), over_usb }, reason);
        }
    }

    fn end_burst(&mut self, path: &Path, reason: EndReason) {
        self.end_probing(path, reason);
        let Some(burst) = self.bursts.remove(path) else { return };
        let ended = burst.report(&path.key, Phase::Ended(reason));
        self.outputs.push_back(ended.unwrap_or(Output::Discarded(burst.traffic)));
    }

    /// Ends all transfers: the agent stops.
    pub fn end_all(&mut self, reason: EndReason) {
        while let Some(path) = self.bursts.keys().next().cloned() {
            self.end_burst(&path, reason);
        }
    }

    /// Next output, oldest first.
    pub fn poll(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Announced transfers that go on.
    pub fn going_on(&self) -> usize {
        self.bursts.values().filter(|burst| burst.announced.is_some()).count()
    }
}

impl Burst {
    /// From when on it is over, unless something comes before.
    fn silent_ns(&self) -> u64 {
        match &self.disk {
            Some(disk) => disk.silent_ns(self.last_ns),
            None => self.last_ns.saturating_add(SILENCE_NS),
        }
    }

    fn report(&self, key: &Key, phase: Phase) -> Option<Output> {
        let (id, _) = self.announced?;
        Some(Output::Report(Report {
            id,
            phase,
            key: key.clone(),
            services: self.services.iter().copied().collect(),
            opened: self.opened,
            interface: self.interface.clone(),
            first_ns: self.first_ns,
            last_ns: self.last_ns,
            traffic: self.traffic,
        }))
    }
}

impl Report {
    /// The event, with the wall times that the clocks give at `now`.
    pub fn into_event(self, now: &Now) -> Event {
        let (channel, counterpart) = match self.key {
            Key::Lan(host) => (Channel::Lan, Counterpart::Host(host)),
            Key::Internet(host, _) => (Channel::Internet, Counterpart::Host(host)),
            Key::Disk(disk) => (Channel::Usb, Counterpart::Disk(disk)),
        };
        let over_usb = self.interface.usb;
        let transfer = Transfer {
            id: self.id,
            phase: self.phase,
            channel,
            counterpart,
            services: self.services,
            opened: self.opened,
            interface: self.interface.name,
            first_wall_ns: now.wall_at(self.first_ns),
            last_wall_ns: now.wall_at(self.last_ns),
            traffic: self.traffic,
        };
        if over_usb { Event::TransferOverUsb(transfer) } else { Event::Transfer(transfer) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const T0: u64 = 100_000 * MS;

    fn lan(last: u8) -> Key {
        Key::Lan(IpAddr::from([10, 0, 0, last]))
    }

    fn moved(payload: u64) -> Traffic {
        Traffic { tx_bytes: payload + 40, tx_payload: payload, tx_packets: 1, ..Traffic::default() }
    }

    /// `first` and `last` in milliseconds after T0.
    fn act(key: Key, first: u64, last: u64, traffic: Traffic) -> Activity {
        Activity {
            key,
            service: Service::Tcp(445),
            opened: Opened::Here,
            interface: "eth0".into(),
            first_ns: T0 + first * MS,
            last_ns: T0 + last * MS,
            traffic,
        }
    }

    fn drain(transfers: &mut Transfers) -> Vec<String> {
        std::iter::from_fn(|| transfers.poll())
            .map(|output| match output {
                Output::Report(r) => {
                    let (from, to) = ((r.first_ns - T0) / MS, (r.last_ns - T0) / MS);
                    format!("#{} {:?} {from}..{to} {} B", r.id, r.phase, r.traffic.tx_payload)
                }
                other => format!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn two_seconds_of_silence_end_the_transfer_at_its_last_packet() {
        let mut transfers = Transfers::default();
        transfers.activity(act(lan(2), 0, 40, moved(10)));
        assert_eq!(drain(&mut transfers), ["#1 Started 0..40 10 B"]);
        transfers.handle_timeout(T0 + 2_039 * MS);
        assert_eq!(transfers.poll(), None);
        transfers.handle_timeout(T0 + 2_040 * MS);
        assert_eq!(drain(&mut transfers), ["#1 Ended(Silence) 0..40 10 B"]);
        assert_eq!(transfers.going_on(), 0);
    }

    #[test]
    fn a_pause_splits_from_two_seconds_on_even_if_no_timeout_fell_into_it() {
        for (pause, transfers_seen) in [(1_500, 1), (1_999, 1), (2_000, 2), (2_500, 2)] {
            let mut transfers = Transfers::default();
            transfers.activity(act(lan(2), 0, 100, moved(1)));
            transfers.activity(act(lan(2), 100 + pause, 200 + pause, moved(1)));
            transfers.end_all(EndReason::AgentStopped);
            let ended = drain(&mut transfers).iter().filter(|line| line.contains("Ended")).count();
            assert_eq!(ended, transfers_seen, "pause of {pause} ms");
        }
    }

    #[test]
    fn counterparts_do_not_merge_and_flows_of_one_counterpart_do() {
        let mut transfers = Transfers::default();
        transfers.activity(act(lan(2), 0, 10, moved(1)));
        transfers.activity(act(lan(3), 5, 15, moved(2)));
        transfers.activity(act(lan(2), 20, 30, moved(4)));
        transfers.end_all(EndReason::AgentStopped);
        let expected = [
            "#1 Started 0..10 1 B",
            "#2 Started 5..15 2 B",
            "#1 Ended(AgentStopped) 0..30 5 B",
            "#2 Ended(AgentStopped) 5..15 2 B",
        ];
        assert_eq!(drain(&mut transfers), expected);
    }

    #[test]
    fn services_of_one_internet_host_are_told_apart() {
        let mut transfers = Transfers::default();
        let host = IpAddr::from([198, 51, 100, 10]);
        for service in [Service::Tcp(443), Service::Tcp(80), Service::Quic(443)] {
            transfers.activity(Activity { service, ..act(Key::Internet(host, service), 0, 1, moved(1)) });
        }
        assert_eq!(transfers.going_on(), 3);
    }

    #[test]
    fn what_only_acknowledges_is_no_transfer_but_its_bytes_come_back() {
        let mut transfers = Transfers::default();
        transfers.activity(act(lan(2), 0, 10, moved(0)));
        transfers.handle_timeout(T0 + 5_000 * MS);
        assert_eq!(transfers.poll(), Some(Output::Discarded(moved(0))));
        assert_eq!(transfers.poll(), None);
    }

    #[test]
    fn a_transfer_starts_with_the_handshake_before_its_payload() {
        let mut transfers = Transfers::default();
        transfers.activity(act(lan(2), 0, 10, moved(0)));
        assert_eq!(transfers.poll(), None);
        transfers.activity(act(lan(2), 10, 300, moved(9)));
        assert_eq!(drain(&mut transfers), ["#1 Started 0..300 9 B"]);
    }

    #[test]
    fn what_lasts_is_reported_every_five_seconds() {
        let mut transfers = Transfers::default();
        for tick in 0..=44 {
            let now = tick * 250;
            transfers.activity(act(lan(2), now, now, moved(1)));
            transfers.handle_timeout(T0 + now * MS);
        }
        let lines = drain(&mut transfers);
        assert_eq!(lines, ["#1 Started 0..0 1 B", "#1 Progress 0..5000 21 B", "#1 Progress 0..10000 41 B"]);
    }

    #[test]
    fn a_host_that_is_reached_over_usb_as_well_has_a_transfer_on_each_way() {
        let mut transfers = Transfers::default();
        let phone = Through { name: "usb0".into(), usb: true };
        for at in [0, 500] {
            transfers.activity(act(lan(2), at, at, moved(1_000)));
            transfers.activity(Activity { interface: phone.clone(), ..act(lan(2), at, at, moved(7)) });
        }
        transfers.handle_timeout(T0 + 60_000 * MS);
        let events = std::iter::from_fn(|| match transfers.poll()? {
            Output::Report(report) => Some(report.into_event(&Now::default())),
            other => panic!("{other:?}"),
        });
        let shown: Vec<_> = events
            .map(|event| {
                let over_usb = matches!(event, Event::TransferOverUsb(_));
                let transfer = event.transfer().unwrap();
                (over_usb, transfer.interface.escaped().to_string(), transfer.traffic.tx_payload)
            })
            .collect();
        let [here, there] = [(false, "eth0".to_owned()), (true, "usb0".to_owned())];
        let line = |(usb, name): &(bool, String), bytes| (*usb, name.clone(), bytes);
        assert_eq!(
            shown,
            [line(&here, 1_000), line(&there, 7), line(&here, 2_000), line(&there, 14)],
            "two starts, two ends"
        );
    }

    #[test]
    fn more_bursts_than_can_be_followed_are_handed_back() {
        let mut transfers = Transfers::default();
        for i in 0..=MAX_BURSTS as u32 {
            let key = Key::Lan(IpAddr::from((0x0a00_0000 + i).to_be_bytes()));
            transfers.activity(act(key, 0, 0, moved(0)));
        }
        assert_eq!(transfers.poll(), Some(Output::Overflow(moved(0))));
    }
}
