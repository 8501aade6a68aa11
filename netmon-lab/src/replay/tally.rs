//! What was counted, by whomever, and where two counts differ.

use std::{collections::BTreeMap, fmt, net::SocketAddr};

use netmon_common::abi::IPPROTO_TCP;

use super::judge::Verdict;

/// One direction of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flow {
    /// `IPPROTO_TCP` or `IPPROTO_UDP` of [`netmon_common::abi`].
    pub protocol: u8,
    /// Who sends.
    pub source: SocketAddr,
    /// Who receives.
    pub destination: SocketAddr,
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = if self.protocol == IPPROTO_TCP { "tcp" } else { "udp" };
        write!(f, "{protocol} {} > {}", self.source, self.destination)
    }
}

/// What was counted of a flow, or of frames that are in none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Packets, or frames.
    pub packets: u64,
    /// From the IP header on; of frames that are not IP or malformed, from the Ethernet header on.
    pub bytes: u64,
    /// Behind the TCP or UDP header.
    pub payload: u64,
}

impl Counts {
    fn add(&mut self, bytes: u32, payload: u32) {
        self.packets += 1;
        self.bytes += u64::from(bytes);
        self.payload += u64::from(payload);
    }
}

/// A count of frames. Each is in one of these.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// In flows.
    pub flows: BTreeMap<Flow, Counts>,
    /// TCP and UDP, all flows. Its payload is not told.
    pub counted: Counts,
    /// IP, but neither TCP nor UDP.
    pub other_protocol: Counts,
    /// Not IP.
    pub not_ip: Counts,
    /// Malformed.
    pub malformed: Counts,
    /// Flows for which there was no room.
    pub table_full: Counts,
}

impl Tally {
    /// Adds a frame of this length, Ethernet header included. An unknown one is not counted.
    pub fn add(&mut self, verdict: Verdict, frame_bytes: u32) {
        match verdict {
            Verdict::NotIp => self.not_ip.add(frame_bytes, 0),
            Verdict::Malformed => self.malformed.add(frame_bytes, 0),
            Verdict::OtherProtocol { bytes } => self.other_protocol.add(bytes, 0),
            Verdict::Counted { flow, bytes, payload } => {
                self.counted.add(bytes, 0);
                self.flows.entry(flow).or_default().add(bytes, payload);
            }
            Verdict::Unknown => {}
        }
    }

    /// All frames.
    pub fn frames(&self) -> u64 {
        self.classes().iter().map(|(_, counts)| counts.packets).sum()
    }

    fn classes(&self) -> [(&'static str, Counts); 5] {
        [
            ("in flows", self.counted),
            ("other protocols", self.other_protocol),
            ("not IP", self.not_ip),
            ("malformed", self.malformed),
            ("table full", self.table_full),
        ]
    }

    /// What differs, classes first.
    pub fn differences(&self, netmon: &Self) -> Vec<Difference> {
        let classes = self.classes().into_iter().zip(netmon.classes());
        let classes = classes.map(|((class, tshark), (_, netmon))| (class.to_owned(), tshark, netmon));
        let flows: BTreeMap<_, _> =
            self.flows.iter().chain(&netmon.flows).map(|(flow, _)| (flow, ())).collect();
        let of = |tally: &Self, flow| tally.flows.get(flow).copied().unwrap_or_default();
        let flows = flows.into_keys().map(|flow| (flow.to_string(), of(self, flow), of(netmon, flow)));
        let all = classes.chain(flows);
        all.filter(|(_, tshark, netmon)| tshark != netmon)
            .map(|(what, tshark, netmon)| Difference { what, tshark, netmon })
            .collect()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} flows", self.flows.len())?;
        for (class, counts) in self.classes() {
            if counts.packets > 0 {
                write!(f, ", {} {class}", counts.packets)?;
            }
        }
        Ok(())
    }
}

/// A flow or a class of frames that two counts see differently.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The flow or the class.
    pub what: String,
    /// By tshark.
    pub tshark: Counts,
    /// By netmon.
    pub netmon: Counts,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, tshark, netmon } = self;
        write!(
            f,
            "{what}: packets {} / {}, bytes {} / {}, payload {} / {}",
            tshark.packets, netmon.packets, tshark.bytes, netmon.bytes, tshark.payload, netmon.payload
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_that_only_one_side_has_and_a_byte_too_many_are_differences() {
        let flow = |port| Flow {
            protocol: 17,
            source: ([10, 0, 0, 1], port).into(),
            destination: ([192, 0, 2, 9], 53).into(),
        };
        let counted = |port, bytes| Verdict::Counted { flow: flow(port), bytes, payload: 7 };
        let (mut tshark, mut netmon) = (Tally::default(), Tally::default());
        for tally in [&mut tshark, &mut netmon] {
            tally.add(counted(1, 35), 49);
            tally.add(Verdict::NotIp, 60);
        }
        assert_eq!(tshark.differences(&netmon), []);
        tshark.add(counted(2, 35), 49);
        netmon.add(counted(3, 36), 50);
        let differences = tshark.differences(&netmon);
        let shown: Vec<_> = differences.iter().map(Difference::to_string).collect();
        assert_eq!(
            shown,
            [
                "in flows: packets 2 / 2, bytes 70 / 71, payload 0 / 0",
                "udp 10.0.0.1:2 > 192.0.2.9:53: packets 1 / 0, bytes 35 / 0, payload 7 / 0",
                "udp 10.0.0.1:3 > 192.0.2.9:53: packets 0 / 1, bytes 0 / 36, payload 0 / 7",
            ]
        );
    }
}
