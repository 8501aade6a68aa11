//! One event → one line of text.
//!
//! ```text
//! 2026-11-23T13:42:05.120+01:00 LAN transfer started: 10.77.0.12 tcp/9000, opened here, eth0 #3.7
//! ```
//!
//! Local time with its offset, the event in words, exact numbers behind them, and at the end `#run.number` of a
//! transfer, the same in all its lines. Strings from outside are quoted and escaped ([`crate::raw::Escaped`]),
//! so a line is always one line.

mod class;
mod usb;
mod who;

use std::fmt::{self, Display, Formatter};

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::model::*;
use crate::raw::Raw;
use usb::Device;

/// The record's line, without a line end. `zone` is the reader's time zone.
pub fn line(record: &Record, zone: &TimeZone) -> String {
    format!("{} {}", time(record.wall_ns, zone), sentence(record, zone))
}

/// True for what also goes into `usb.log`.
pub fn is_usb(event: &Event) -> bool {
    match event {
        Event::DevicePresent(_) | Event::DeviceAdded(_) | Event::DeviceRemoved(_) => true,
        Event::UsbFunction(_) | Event::UsbVolume(_) | Event::UsbFile(_) | Event::UsbFilesUnseen(_) => true,
        Event::TransferOverUsb(_) => true,
        Event::NamedTransfer(named) => named.over_usb,
        Event::Transfer(transfer) => transfer.channel == Channel::Usb,
        Event::Gap(gap) => matches!(
            gap.reason,
            GapReason::AgentDown
                | GapReason::UsbMessagesLost
                | GapReason::UsbNotWatched
                | GapReason::UsbDiskNotMeasured
        ),
        _ => false,
    }
}

/// A point in time as the lines show it: RFC 3339, milliseconds, offset of `zone`.
pub fn time(wall_ns: i64, zone: &TimeZone) -> impl Display + use<> {
    let zoned = Timestamp::from_nanosecond(i128::from(wall_ns)).unwrap_or_default().to_zoned(zone.clone());
    zoned.strftime("%Y-%m-%dT%H:%M:%S.%3f%:z").to_string()
}

fn sentence(record: &Record, zone: &TimeZone) -> String {
    match &record.event {
        Event::AgentStarted(started) => started_sentence(record.run, started),
        Event::AgentStopped => "agent stopped".to_owned(),
        Event::InterfaceAttached(i) => {
            format!("watching interface {} (index {}, {})", Quoted(&i.name), i.index, hook(i.hook))
        }
        Event::InterfaceDetached(i) => {
            format!("no longer watching interface {} (index {})", Quoted(&i.name), i.index)
        }
        Event::InterfaceFailed(i) => {
            format!("CANNOT WATCH interface {} (index {}): {}", Quoted(&i.name), i.index, Quoted(&i.error))
        }
        Event::DevicePresent(device) => format!("USB device present: {}", Device(device)),
        Event::DeviceAdded(device) => format!("USB device added: {}", Device(device)),
        Event::DeviceRemoved(device) => format!("USB device removed: {}", Device(device)),
        Event::Transfer(transfer) => transfer_sentence(record.run, transfer, false, "", zone),
        Event::TransferOverUsb(transfer) => transfer_sentence(record.run, transfer, true, "", zone),
        Event::NamedTransfer(named) => {
            let shares = who::Shares(named).to_string();
            transfer_sentence(record.run, &named.transfer, named.over_usb, &shares, zone)
        }
        Event::Login(login) => who::login_sentence(login),
        Event::NamesCoverage(coverage) => who::coverage_sentence(coverage),
        Event::Neighbour(neighbour) => who::neighbour_sentence(neighbour),
        Event::UsbFunction(function) => usb::function_sentence(function),
        Event::UsbVolume(volume) => usb::volume_sentence(volume),
        Event::UsbFile(file) => usb::file_sentence(file),
        Event::UsbFilesUnseen(unseen) => usb::unseen_sentence(unseen, zone),
        Event::Muted(muted) => muted_sentence(muted),
        Event::Coverage(coverage) => coverage_sentence(coverage),
        Event::Gap(gap) => gap_sentence(gap, zone),
        Event::Filter(Filter::Loaded { prefixes, labels }) => {
            format!("filter list loaded: {prefixes} prefixes under {labels} labels")
        }
        Event::Filter(Filter::Refused { error }) => {
            format!("filter list refused, the last good one stays in force: {}", Quoted(error))
        }
    }
}

fn started_sentence(run: u32, started: &AgentStarted) -> String {
    let before = if started.previous_run_died { ", the run before did not end in good order" } else { "" };
    format!(
        "agent started: run {run}, netmon {}, host {}, kernel {}{before}",
        started.version.escaped(),
        Quoted(&started.hostname),
        started.kernel.escaped(),
    )
}

fn hook(hook: Hook) -> &'static str {
    match hook {
        Hook::Tcx => "TCX",
        Hook::Clsact => "clsact",
        Hook::XdpTcx => "XDP and TCX",
        Hook::XdpClsact => "XDP and clsact",
    }
}

/// `who_had_it` stands behind what is known without names.
fn transfer_sentence(run: u32, t: &Transfer, over_usb: bool, who_had_it: &str, zone: &TimeZone) -> String {
    let way = if over_usb { " over USB" } else { "" };
    let channel = match t.channel {
        Channel::Usb => "USB",
        Channel::Lan => "LAN",
        Channel::Internet => "Internet",
    };
    let mut who = Counter(&t.counterpart).to_string();
    for service in &t.services {
        match service {
            Service::Tcp(port) => who += &format!(" tcp/{port}"),
            Service::Udp(port) => who += &format!(" udp/{port}"),
            Service::Quic(port) => who += &format!(" quic/{port}"),
            Service::Storage => {}
        }
    }
    let id = format!("#{run}.{}", t.id);
    match t.phase {
        Phase::Started => {
            let opened = match t.opened {
                Opened::Here => ", opened here",
                Opened::There => ", opened there",
                Opened::Unknown => "",
            };
            let interface =
                if t.interface.is_empty() { String::new() } else { format!(", {}", t.interface.escaped()) };
            format!(
                "{channel} transfer started{way}: {who}{opened}{interface}, first at {}{who_had_it} {id}",
                time(t.first_wall_ns, zone)
            )
        }
        Phase::Progress => format!("{channel} transfer goes on{way}: {who}, {}{who_had_it} {id}", Moved(t)),
        Phase::Ended(reason) => {
            let reason = match reason {
                EndReason::Silence => "",
                EndReason::AgentStopped => ", cut off: the agent stopped",
                EndReason::DeviceRemoved => ", cut off: the device is gone",
            };
            format!(
                "{channel} transfer ended{way}: {who}, {}, last at {}{reason}{who_had_it} {id}",
                Moved(t),
                time(t.last_wall_ns, zone)
            )
        }
    }
}

fn muted_sentence(muted: &Muted) -> String {
    let seconds = muted.to_wall_ns.saturating_sub(muted.from_wall_ns) as f64 / 1e9;
    let t = &muted.traffic;
    format!(
        "muted {}: sent {} B in {} packets, received {} B in {} packets, {} flows, in {seconds:.1} s",
        Quoted(&muted.label),
        t.tx_bytes,
        t.tx_packets,
        t.rx_bytes,
        t.rx_packets,
        muted.flows,
    )
}

fn coverage_sentence(c: &Coverage) -> String {
    let mut line = match c.interfaces.as_slice() {
        [] => "coverage: NO INTERFACE is watched".to_owned(),
        names => {
            let names: Vec<_> = names.iter().map(|name| name.escaped().to_string()).collect();
            format!("coverage: watching {}", names.join(" "))
        }
    };
    line += if c.usb { ", USB" } else { ", USB IS NOT WATCHED" };
    line += &format!(
        "; {} frames seen, {} counted, {} not IP ({} B), {} other protocols ({} B); {} flows, {} transfers",
        c.seen,
        c.counted,
        c.not_ip,
        c.not_ip_bytes,
        c.other_protocol,
        c.other_protocol_bytes,
        c.flows,
        c.transfers
    );
    line += &format!(
        "; lost: {} malformed ({} B), {} table full, {} ring full, {} spool; backlog {}",
        c.malformed, c.malformed_bytes, c.table_full, c.ring_full, c.spool_lost, c.backlog
    );
    line
}

fn gap_sentence(gap: &Gap, zone: &TimeZone) -> String {
    let (reason, unit) = match gap.reason {
        GapReason::AgentDown => ("no agent ran", ""),
        GapReason::AgentStalled => ("the agent was held up, transfers may be merged", ""),
        GapReason::FlowTableFull => ("the kernel's flow table was full", "frames"),
        GapReason::RingFull => ("the ring buffer was full, starts may be late", "flows"),
        GapReason::TransferTableFull => {
            ("too many transfers at once, the rest is in the muted totals", "flows")
        }
        GapReason::SpoolFull => ("the spool was at its limit, records were given up", "records"),
        GapReason::SpoolUnwritable => ("the spool could not be written", "records"),
        GapReason::SpoolDamaged => ("the spool's end was damaged and cut off", "bytes"),
        GapReason::UsbMessagesLost => ("USB messages were lost, devices were listed anew", ""),
        GapReason::UsbNotWatched => ("USB events cannot be received", ""),
        GapReason::NeverReceived => ("records never came from this PC", "records"),
        GapReason::LogUnwritable => ("this PC's log could not be written", "lines"),
        GapReason::InterfaceNotWatched => ("an interface was not watched", ""),
        GapReason::TablesUnreadable => ("the kernel's tables could not be read", ""),
        GapReason::UsbDiskNotMeasured => ("a USB disk's reads and writes cannot be measured", "disks"),
        GapReason::HistoryRestarted => {
            ("another history of this PC begins, what it had not delivered before is unknown", "records")
        }
    };
    let count = match gap.count {
        Some(count) => format!(", {count} {unit}"),
        None => ", count unknown".to_owned(),
    };
    format!("GAP from {} to {}: {reason}{count}", time(gap.from_wall_ns, zone), time(gap.to_wall_ns, zone))
}

struct Quoted<'a>(&'a Raw);

impl Display for Quoted<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.escaped())
    }
}

struct Counter<'a>(&'a Counterpart);

impl Display for Counter<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self.0 {
            Counterpart::Host(address) => write!(f, "{address}"),
            Counterpart::Disk(disk) => write!(f, "{}", usb::OnDisk(disk)),
        }
    }
}

struct Moved<'a>(&'a Transfer);

impl Display for Moved<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Transfer { channel, traffic: t, .. } = self.0;
        let seconds = self.0.last_wall_ns.saturating_sub(self.0.first_wall_ns) as f64 / 1e9;
        if *channel == Channel::Usb {
            write!(f, "{}", usb::Completed(t))?;
        } else {
            write!(f, "sent {} ({} B, payload {} B)", Size(t.tx_payload), t.tx_bytes, t.tx_payload)?;
            write!(f, ", received {} ({} B, payload {} B)", Size(t.rx_payload), t.rx_bytes, t.rx_payload)?;
        }
        write!(f, " in {seconds:.1} s")
    }
}

/// A size for people: decimal units, three digits.
struct Size(u64);

impl Display for Size {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut value = self.0 as f64;
        for unit in ["B", "kB", "MB", "GB"] {
            if value < 999.5 {
                return if unit == "B" || value >= 99.95 {
                    write!(f, "{value:.0} {unit}")
                } else {
                    write!(f, "{value:.1} {unit}")
                };
            }
            value /= 1000.0;
        }
        write!(f, "{value:.1} TB")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::tz::{self, TimeZone};

    fn zone() -> TimeZone {
        TimeZone::fixed(tz::offset(1))
    }

    fn at(seconds: f64) -> i64 {
        1_795_437_725_000_000_000 + (seconds * 1e9) as i64
    }

    fn shown(event: Event) -> String {
        line(&Record { seq: 1, run: 3, boot_ns: 0, wall_ns: at(0.0), event }, &zone())
    }

    fn transfer(phase: Phase) -> Transfer {
        Transfer {
            id: 7,
            phase,
            channel: Channel::Lan,
            counterpart: Counterpart::Host("10.77.0.12".parse().unwrap()),
            services: vec![Service::Tcp(9000)],
            opened: Opened::Here,
            interface: "eth0".into(),
            first_wall_ns: at(-2.5),
            last_wall_ns: at(-2.0),
            traffic: Traffic {
                tx_bytes: 21_000_000,
                tx_payload: 20_000_000,
                tx_packets: 14_000,
                rx_bytes: 52_000,
                rx_payload: 0,
                rx_packets: 1_000,
            },
        }
    }

    #[test]
    fn a_transfer_reads_like_a_sentence_with_exact_numbers() {
        assert_eq!(
            shown(Event::Transfer(transfer(Phase::Started))),
            "2026-11-23T13:42:05.000+01:00 LAN transfer started: 10.77.0.12 tcp/9000, opened here, eth0, \
             first at 2026-11-23T13:42:02.500+01:00 #3.7"
        );
        assert_eq!(
            shown(Event::Transfer(transfer(Phase::Ended(EndReason::Silence)))),
            "2026-11-23T13:42:05.000+01:00 LAN transfer ended: 10.77.0.12 tcp/9000, sent 20.0 MB (21000000 B, \
             payload 20000000 B), received 0 B (52000 B, payload 0 B) in 0.5 s, \
             last at 2026-11-23T13:42:03.000+01:00 #3.7"
        );
    }

    #[test]
    fn a_device_with_a_hostile_name_keeps_to_its_line() {
        let device = UsbDevice {
            devpath: "/devices/usb1/1-2".into(),
            vendor_id: 0x0951,
            product_id: 0x1666,
            vendor: "Kingston".into(),
            model: Raw::new(b"Data\nTraveler"),
            serial: "60A4".into(),
            interfaces: vec![UsbInterface { class: 8, subclass: 6, protocol: 0x50 }],
            ..UsbDevice::default()
        };
        assert_eq!(
            shown(Event::DeviceAdded(device)),
            "2026-11-23T13:42:05.000+01:00 USB device added: \"Kingston Data\\u{a}Traveler\" serial \"60A4\" \
             [0951:1666] storage at /devices/usb1/1-2"
        );
    }

    #[test]
    fn sizes_are_rounded_for_people() {
        let shown: Vec<_> =
            [0, 999, 1_000, 20_971_520, 999_950, 5_000_000_000].map(|n| Size(n).to_string()).into();
        assert_eq!(shown, ["0 B", "999 B", "1.0 kB", "21.0 MB", "1.0 MB", "5.0 GB"]);
    }

    #[test]
    fn a_time_outside_the_calendar_does_not_panic() {
        assert!(time(i64::MIN, &zone()).to_string().starts_with("1677-"));
    }
}
