//! netmon's log lines, read back: what a test compares.
//!
//! The format is [`netmon_common::logline`]'s; the tests below read what that module writes.

use jiff::Timestamp;

/// One line of a `log.txt`, of a PC or of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// The line as the PC recorded it: without what the server adds when it arrives late.
    pub text: String,
    /// True when the server marked it as received late.
    pub late: bool,
    /// When it was recorded, wall clock, nanoseconds.
    pub at_ns: i64,
    /// What it says.
    pub kind: Kind,
}

/// What a line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A transfer started, goes on, or ended.
    Transfer(Transfer),
    /// Totals of what makes no transfer lines.
    Muted(Muted),
    /// A USB device: `present`, `added` or `removed`, and the rest of the sentence.
    Device(String, String),
    /// "Still watching."
    Coverage(Coverage),
    /// A gap: the sentence behind its times.
    Gap(String),
    /// Anything else.
    Other,
}

/// A transfer's line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// `LAN`, `Internet` or `USB`.
    pub channel: String,
    /// Which of its lines this is.
    pub phase: Phase,
    /// True when the packets left through a USB adapter, phone or modem.
    pub over_usb: bool,
    /// The other side: an address, or a disk's name.
    pub counterpart: String,
    /// What was spoken: `tcp/9000`.
    pub services: Vec<String>,
    /// `#run.number`: the same in all lines of the transfer.
    pub id: String,
}

/// Which line of a transfer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It started.
    Started {
        /// `here`, `there`, or nothing where nobody knows.
        opened: String,
        /// First packet, wall clock, nanoseconds.
        first_ns: i64,
    },
    /// It goes on.
    Progress(Moved),
    /// It is over.
    Ended {
        /// What it carried.
        moved: Moved,
        /// Last packet, wall clock, nanoseconds.
        last_ns: i64,
        /// Empty: two seconds of silence.
        reason: String,
    },
}

/// What a transfer carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Bytes that left, from the IP header on.
    pub sent: u64,
    /// Bytes that left, without headers.
    pub sent_payload: u64,
    /// Bytes that arrived, from the IP header on.
    pub received: u64,
    /// Bytes that arrived, without headers.
    pub received_payload: u64,
}

/// A line of muted totals.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Muted {
    /// Section of the filter list, or `service:dns` and the like.
    pub label: String,
    /// Bytes that left, from the IP header on.
    pub sent: u64,
    /// Bytes that arrived, from the IP header on.
    pub received: u64,
    /// Flows that moved something.
    pub flows: u64,
}

/// A line of coverage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coverage {
    /// Frames that reached a hook.
    pub seen: u64,
    /// Frames counted in a flow.
    pub counted: u64,
    /// Frames that are not IP.
    pub not_ip: u64,
    /// IP packets that are neither TCP nor UDP.
    pub other_protocol: u64,
    /// Frames that are too short or contradict themselves.
    pub malformed: u64,
    /// Frames of flows that got no slot.
    pub table_full: u64,
    /// Frames and records lost, for whatever reason.
    pub lost: u64,
}

impl Line {
    /// Reads a line without its line end.
    ///
    /// # Errors
    /// The line, when it has no time or is not what its begin says.
    pub fn parse(text: &str) -> Result<Self, String> {
        let bad = || format!("not a line of netmon's log: {text}");
        let (recorded, late) = match text.split_once(" (received late, ") {
            Some((recorded, _)) => (recorded, true),
            None => (text, false),
        };
        let (time, sentence) = recorded.split_once(' ').ok_or_else(bad)?;
        let at_ns = nanoseconds(time).ok_or_else(bad)?;
        let kind = kind(sentence).ok_or_else(bad)?;
        Ok(Self { text: recorded.to_owned(), late, at_ns, kind })
    }

    /// The transfer, when the line is one's.
    pub fn transfer(&self) -> Option<&Transfer> {
        match &self.kind {
            Kind::Transfer(transfer) => Some(transfer),
            _ => None,
        }
    }

    /// The transfer, when the line says that it started.
    pub fn started(&self) -> Option<&Transfer> {
        self.transfer().filter(|transfer| matches!(transfer.phase, Phase::Started { .. }))
    }

    /// The transfer and what it carried, when the line says that it is over.
    pub fn ended(&self) -> Option<(&Transfer, Moved)> {
        let transfer = self.transfer()?;
        match transfer.phase {
            Phase::Ended { moved, .. } => Some((transfer, moved)),
            _ => None,
        }
    }
}

impl Transfer {
    /// True when it is with `counterpart` on `channel`.
    pub fn is(&self, channel: &str, counterpart: &str) -> bool {
        self.channel == channel && self.counterpart == counterpart
    }
}

fn kind(sentence: &str) -> Option<Kind> {
    let is_transfer = ["LAN ", "Internet ", "USB "]
        .iter()
        .any(|channel| sentence.strip_prefix(channel).is_some_and(|behind| behind.starts_with("transfer ")));
    if is_transfer {
        return transfer(sentence).map(Kind::Transfer);
    }
    if let Some(behind) = sentence.strip_prefix("USB device ") {
        let (what, device) = behind.split_once(": ")?;
        return Some(Kind::Device(what.to_owned(), device.to_owned()));
    }
    if let Some(behind) = sentence.strip_prefix("muted \"") {
        return Some(Kind::Muted(Muted {
            label: behind.split_once('"')?.0.to_owned(),
            sent: number(behind, "sent ", " B")?,
            received: number(behind, "received ", " B")?,
            flows: last_number(behind, " flows")?,
        }));
    }
    if sentence.starts_with("coverage: ") {
        let losses = [" malformed", " table full", " ring full", " spool;"];
        let lost: Option<Vec<_>> = losses.iter().map(|unit| last_number(sentence, unit)).collect();
        return Some(Kind::Coverage(Coverage {
            seen: last_number(sentence, " frames seen")?,
            counted: last_number(sentence, " counted")?,
            not_ip: last_number(sentence, " not IP")?,
            other_protocol: last_number(sentence, " other protocols")?,
            malformed: last_number(sentence, " malformed")?,
            table_full: last_number(sentence, " table full")?,
            lost: lost?.iter().sum(),
        }));
    }
    if let Some(behind) = sentence.strip_prefix("GAP from ") {
        return Some(Kind::Gap(behind.split_once(": ")?.1.to_owned()));
    }
    Some(Kind::Other)
}

fn transfer(sentence: &str) -> Option<Transfer> {
    let (head, behind) = sentence.split_once(": ")?;
    let (channel, phase) = head.split_once(" transfer ")?;
    let (phase, over_usb) = match phase.strip_suffix(" over USB") {
        Some(phase) => (phase, true),
        None => (phase, false),
    };
    let (behind, id) = behind.rsplit_once(" #")?;
    let (who, behind) = split_who(behind)?;
    let is_service =
        |word: &&str| ["tcp/", "udp/", "quic/"].iter().any(|protocol| word.starts_with(protocol));
    let services: Vec<_> = who.split(' ').filter(is_service).map(str::to_owned).collect();
    let counterpart: Vec<_> = who.split(' ').filter(|word| !is_service(word)).collect();
    let phase = match phase {
        "started" => Phase::Started {
            opened: between(behind, "opened ", ",").unwrap_or_default().to_owned(),
            first_ns: nanoseconds(behind.rsplit_once("first at ")?.1)?,
        },
        "goes on" => Phase::Progress(moved(behind)?),
        "ended" => {
            let (time, reason) = match behind.rsplit_once("last at ")?.1.split_once(", ") {
                Some((time, reason)) => (time, reason),
                None => (behind.rsplit_once("last at ")?.1, ""),
            };
            Phase::Ended { moved: moved(behind)?, last_ns: nanoseconds(time)?, reason: reason.to_owned() }
        }
        _ => return None,
    };
    Some(Transfer {
        channel: channel.to_owned(),
        phase,
        over_usb,
        counterpart: counterpart.join(" "),
        services,
        id: format!("#{id}"),
    })
}

/// Splits at the first comma outside of quotes.
fn split_who(text: &str) -> Option<(&str, &str)> {
    let mut quoted = false;
    let comma = text.char_indices().find(|(_, c)| {
        quoted ^= *c == '"';
        *c == ',' && !quoted
    })?;
    Some((&text[..comma.0], text[comma.0..].strip_prefix(", ")?))
}

fn moved(text: &str) -> Option<Moved> {
    // A disk is written and read, and has no headers.
    let (sent, received) = match text.split_once(", received ") {
        Some(parts) => parts,
        None => text.split_once(", read ")?,
    };
    let bytes = |text: &str| number(text, "(", " B");
    let payload = |text: &str| number(text, "payload ", " B").or_else(|| bytes(text));
    Some(Moved {
        sent: bytes(sent)?,
        sent_payload: payload(sent)?,
        received: bytes(received)?,
        received_payload: payload(received)?,
    })
}

fn between<'a>(text: &'a str, before: &str, after: &str) -> Option<&'a str> {
    text.split_once(before)?.1.split_once(after).map(|(between, _)| between)
}

fn number(text: &str, before: &str, after: &str) -> Option<u64> {
    between(text, before, after)?.parse().ok()
}

/// The number right before `unit`.
fn last_number(text: &str, unit: &str) -> Option<u64> {
    text.split_once(unit)?.0.rsplit(' ').next()?.parse().ok()
}

fn nanoseconds(time: &str) -> Option<i64> {
    i64::try_from(time.parse::<Timestamp>().ok()?.as_nanosecond()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::tz::TimeZone;
    use netmon_common::logline;
    use netmon_common::model::{
        self, Channel, Counterpart, EndReason, Event, GapReason, Opened, Record, Service, Traffic,
    };

    const AT: i64 = 1_795_437_725_120_000_000;

    fn read(event: Event) -> Line {
        let record = Record { seq: 1, run: 3, boot_ns: 0, wall_ns: AT, event };
        let text = logline::line(&record, &TimeZone::UTC);
        let line = Line::parse(&text).unwrap();
        assert_eq!((&line.text, line.at_ns, line.late), (&text, AT, false));
        let late = Line::parse(&format!("{text} (received late, 2026-11-23T12:42:11.000+00:00)")).unwrap();
        assert_eq!(late, Line { late: true, ..line.clone() });
        line
    }

    fn transfer(phase: model::Phase, counterpart: Counterpart) -> Line {
        read(Event::Transfer(model::Transfer {
            id: 7,
            phase,
            channel: Channel::Lan,
            counterpart,
            services: vec![Service::Tcp(9000), Service::Quic(443)],
            opened: Opened::There,
            interface: "lan0".into(),
            first_wall_ns: AT - 2_000_000_000,
            last_wall_ns: AT - 1_000_000_000,
            traffic: Traffic {
                tx_bytes: 21_000,
                tx_payload: 20_000,
                tx_packets: 14,
                rx_bytes: 5_200,
                rx_payload: 4,
                rx_packets: 1_000,
            },
        }))
    }

    #[test]
    fn a_transfers_lines_are_read_as_they_were_written() {
        let host = Counterpart::Host("10.77.0.12".parse().unwrap());
        let moved = Moved { sent: 21_000, sent_payload: 20_000, received: 5_200, received_payload: 4 };
        let cases = [
            (model::Phase::Started, Phase::Started { opened: "there".into(), first_ns: AT - 2_000_000_000 }),
            (model::Phase::Progress, Phase::Progress(moved)),
            (
                model::Phase::Ended(EndReason::Silence),
                Phase::Ended { moved, last_ns: AT - 1_000_000_000, reason: String::new() },
            ),
            (
                model::Phase::Ended(EndReason::AgentStopped),
                Phase::Ended {
                    moved,
                    last_ns: AT - 1_000_000_000,
                    reason: "cut off: the agent stopped".into(),
                },
            ),
        ];
        for (written, phase) in cases {
            let expected = Transfer {
                channel: "LAN".into(),
                phase,
                counterpart: "10.77.0.12".into(),
                services: vec!["tcp/9000".into(), "quic/443".into()],
                id: "#3.7".into(),
                over_usb: false,
            };
            assert_eq!(transfer(written, host.clone()).kind, Kind::Transfer(expected));
        }
    }

    #[test]
    fn totals_gaps_and_coverage_are_read_as_they_were_written() {
        let muted = read(Event::Muted(model::Muted {
            label: "lab-cloud".into(),
            from_wall_ns: AT,
            to_wall_ns: AT,
            traffic: Traffic { tx_bytes: 1, tx_packets: 2, rx_bytes: 3, rx_packets: 4, ..Traffic::default() },
            flows: 5,
        }));
        assert_eq!(
            muted.kind,
            Kind::Muted(Muted { label: "lab-cloud".into(), sent: 1, received: 3, flows: 5 })
        );
        let coverage = read(Event::Coverage(model::Coverage {
            interfaces: vec!["lan0".into()],
            seen: 1,
            counted: 2,
            not_ip: 3,
            other_protocol: 4,
            malformed: 10,
            table_full: 20,
            ring_full: 30,
            spool_lost: 40,
            ..model::Coverage::default()
        }));
        let expected = Coverage {
            seen: 1,
            counted: 2,
            not_ip: 3,
            other_protocol: 4,
            malformed: 10,
            table_full: 20,
            lost: 100,
        };
        assert_eq!(coverage.kind, Kind::Coverage(expected));
        let reason = GapReason::AgentDown;
        let gap = read(Event::Gap(model::Gap { reason, from_wall_ns: AT, to_wall_ns: AT, count: None }));
        assert_eq!(gap.kind, Kind::Gap("no agent ran, count unknown".into()));
        let device = model::UsbDevice { vendor: "Kingston".into(), ..model::UsbDevice::default() };
        let Kind::Device(what, device) = read(Event::DeviceAdded(device)).kind else {
            panic!("not a device")
        };
        assert!(what == "added" && device.contains("Kingston"), "{what} {device}");
        assert_eq!(read(Event::AgentStopped).kind, Kind::Other);
    }

    #[test]
    fn what_is_not_a_line_is_refused() {
        for text in ["", "hello", "2026-11-23T12:42:05.000+00:00 LAN transfer started: nobody"] {
            assert!(Line::parse(text).is_err(), "{text:?}");
        }
    }
}
