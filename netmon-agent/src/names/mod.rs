//! Names of the other side, out of what flows say first.
//!
//! A [`Namer`] is given samples: the payload of a flow's first packets, in any order. It says which name the flow itself names
//! ([`tls`], `quic`, [`http`]), keeps which names addresses were asked for ([`dns`]), and what neighbours call themselves. It
//! does no I/O and has no clock. What it holds is bounded, whatever comes in.

mod bounded;
pub mod dns;
pub mod domain;
mod gquic;
pub mod host;
pub mod http;
mod neighbours;
mod quic;
mod side;
mod stream;
pub mod tls;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::net::IpAddr;

use netmon_common::abi::{IPPROTO_TCP, IPPROTO_UDP};
use netmon_common::model::{NameSource, Neighbour, Site};
use netmon_common::raw::Raw;

use self::bounded::Bounded;
use self::dns::{Answers, Message};
use self::side::{Step, Tcp, Udp};
use crate::kernel::FlowId;

/// Payload of one packet.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// Which flow.
    pub flow: FlowId,
    /// It leaves this PC.
    pub sent: bool,
    /// TCP: sequence number of the first byte. UDP: not looked at.
    pub seq: u32,
    /// When, boot clock.
    pub at_ns: u64,
    /// TCP: any piece of the payload; of one packet there may be several samples. UDP: all of a datagram, or of several that the
    /// kernel handed over as one (UDP GSO), one behind the other; the reader of the samples puts together what came in parts.
    pub bytes: &'a [u8],
}

/// What the first part of something says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Read<T> {
    /// There must be more of it; what is known so far, if that is something.
    More(Option<T>),
    /// It is whole.
    Done(T),
    /// It is nothing of the kind.
    Not,
}

/// If more of a flow is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// More samples may tell something.
    More,
    /// It has said all it will say: no more samples of it.
    Nothing,
}

/// A flow has said a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heard {
    /// Which flow.
    pub flow: FlowId,
    /// It was said by this PC, of the counterpart; else by the counterpart, of a service at this PC.
    pub sent: bool,
    /// The name; its age is 0.
    pub site: Site,
    /// When the last packet of it was seen, boot clock.
    pub at_ns: u64,
}

/// What was done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Samples.
    pub samples: u64,
    /// Flows that said a name.
    pub named: u64,
    /// Flows that said all they will say, and no name.
    pub nameless: u64,
    /// Flows that were forgotten in the midst of what they said, for others or because nothing came.
    pub unfinished: u64,
    /// Answers of the domain name system to questions that this PC was not seen asking.
    pub unasked: u64,
    /// Names and neighbours that nobody fetched in time.
    pub unfetched: u64,
}

/// Finds names in samples.
#[derive(Default)]
pub struct Namer {
    flows: Flows,
    answers: Answers,
    fronts: Fronts,
    heard: VecDeque<Heard>,
    neighbours: VecDeque<Neighbour>,
    counts: Counts,
}

impl Namer {
    /// Flows that are known: half read, or done.
    pub const MOST_FLOWS: usize = 4_096;
    /// Memory for what is half read.
    pub const MOST_HELD: usize = 8 << 20;
    /// How long a flow is known after its last sample.
    pub const FORGET_NS: u64 = 10_000_000_000;
    /// Names and neighbours that wait to be fetched.
    const MOST_WAITING: usize = 8_192;

    /// Takes a sample.
    pub fn take(&mut self, sample: &Sample<'_>) -> Want {
        self.counts.samples += 1;
        let Sample { flow, at_ns, .. } = *sample;
        match (flow.protocol, flow.local.port(), flow.remote.port()) {
            (_, _, 53) if flow.protocol == IPPROTO_UDP => {
                self.dns(sample, sample.bytes);
                return Want::More;
            }
            (IPPROTO_UDP, 5353, _) | (IPPROTO_UDP, _, 5353) => {
                if !sample.sent {
                    self.meet(neighbours::in_mdns(flow.remote, sample.bytes));
                }
                return Want::More;
            }
            (IPPROTO_UDP, 67, _) | (IPPROTO_UDP, _, 67) => {
                if !sample.sent {
                    self.meet(neighbours::in_dhcp(sample.bytes));
                }
                return Want::More;
            }
            (IPPROTO_TCP | IPPROTO_UDP, ..) => {}
            _ => return Want::Nothing,
        }
        let mut known = match self.flows.remove(&flow) {
            Some(known) if !known.is_over(sample) => known,
            _ => Flow::new(sample),
        };
        known.last_ns = at_ns;
        let side = usize::from(sample.sent);
        let step = match &mut known.said {
            Said::All(_) => Step::Known,
            Said::Tcp(sides) if flow.remote.port() == 53 => {
                for message in sides[side].messages(sample) {
                    self.dns(sample, &message);
                }
                Step::More
            }
            Said::Tcp(sides) => match sides[side].take(sample) {
                Step::Never if sides.iter().all(|side| side.is_hopeless) => Step::Nameless,
                step => step,
            },
            Said::Udp(sides) => match sides[side].take(sample) {
                Step::Never if sides.iter().all(|side| side.is_hopeless) => Step::Nameless,
                step => step,
            },
        };
        let mut want = Want::Nothing;
        match step {
            Step::Known => {}
            Step::Name { name, source, has_ech, is_whole } => {
                let is_front = self.fronts.has(&name);
                if is_front && !is_whole {
                    // Whether it is used as one will be known at the end.
                    known.so_far = Some(self.site(name, source, true));
                    want = Want::More;
                } else {
                    let site = self.site(name, source, is_front && has_ech);
                    self.hear(Heard { flow, sent: sample.sent, site, at_ns });
                    known.said = Said::All(sample.seq);
                }
            }
            Step::More | Step::Never => want = Want::More,
            Step::Nameless => {
                self.counts.nameless += 1;
                known.said = Said::All(sample.seq);
            }
        }
        if want == Want::Nothing {
            known.so_far = None;
        }
        if let Some((flow, gone)) = self.flows.insert(flow, known) {
            self.give_up(flow, gone);
        }
        while self.flows.held > Self::MOST_HELD {
            let Some((flow, gone)) = self.flows.pop_oldest() else { break };
            self.give_up(flow, gone);
        }
        want
    }

    /// Forgets flows of which nothing came for [`Self::FORGET_NS`]. What was known of a name so far is said then.
    pub fn handle_timeout(&mut self, now_ns: u64) {
        while self.flows.oldest_ns().is_some_and(|last_ns| now_ns.saturating_sub(last_ns) >= Self::FORGET_NS)
        {
            let Some((flow, gone)) = self.flows.pop_oldest() else { break };
            self.give_up(flow, gone);
        }
    }

    /// Forgets a flow: it is over, or its place is another one's. What was known of a name so far is said.
    pub fn forget(&mut self, flow: &FlowId) {
        if let Some(gone) = self.flows.remove(flow) {
            self.give_up(*flow, gone);
        }
    }

    /// The next name that a flow said.
    pub fn poll_heard(&mut self) -> Option<Heard> {
        self.heard.pop_front()
    }

    /// The next thing that a neighbour said of itself; the same again and again.
    pub fn poll_neighbour(&mut self) -> Option<Neighbour> {
        self.neighbours.pop_front()
    }

    /// The name that an address was asked for last before `at_ns`, for a flow that says none itself.
    pub fn answer(&self, address: IpAddr, at_ns: u64) -> Option<Site> {
        let answer = self.answers.name_of(address, at_ns)?;
        let age_ms = at_ns.saturating_sub(answer.heard_ns) / 1_000_000;
        let age_ms = u32::try_from(age_ms).unwrap_or(u32::MAX);
        Some(Site { name: answer.name, source: NameSource::Dns, is_front: false, age_ms })
    }

    /// Which names addresses were asked for.
    pub fn answers(&self) -> &Answers {
        &self.answers
    }

    /// What was done so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Flows that are known, and the memory that they hold.
    pub fn holds(&self) -> (usize, usize) {
        (self.flows.map.len(), self.flows.held)
    }

    fn site(&self, name: Raw, source: NameSource, is_front: bool) -> Site {
        Site { name, source, is_front, age_ms: 0 }
    }

    fn hear(&mut self, heard: Heard) {
        self.counts.named += 1;
        if self.heard.len() >= Self::MOST_WAITING {
            self.heard.pop_front();
            self.counts.unfetched += 1;
        }
        self.heard.push_back(heard);
    }

    fn meet(&mut self, neighbour: Option<Neighbour>) {
        let Some(neighbour) = neighbour else { return };
        if self.neighbours.len() >= Self::MOST_WAITING {
            self.neighbours.pop_front();
            self.counts.unfetched += 1;
        }
        self.neighbours.push_back(neighbour);
    }

    fn give_up(&mut self, flow: FlowId, gone: Flow) {
        if matches!(gone.said, Said::All(_)) {
            return;
        }
        match gone.so_far {
            Some(site) => self.hear(Heard { flow, sent: gone.sent, site, at_ns: gone.last_ns }),
            None => self.counts.unfinished += 1,
        }
    }

    fn dns(&mut self, sample: &Sample<'_>, message: &[u8]) {
        let Some(message) = Message::read(message) else { return };
        if sample.sent {
            self.answers.asked(sample.flow, &message, sample.at_ns);
        } else if self.answers.answered(sample.flow, &message, sample.at_ns) {
            message.fronts.into_iter().for_each(|name| self.fronts.add(name));
        } else if message.is_answer {
            self.counts.unasked += 1;
        }
    }
}

/// Names that stand in the outer part of encrypted client hellos.
struct Fronts(Bounded<Raw, ()>);

impl Fronts {
    /// Cloudflare's, which all its sites share, and those of sites to try it: what is known without having been asked for, since
    /// browsers that use it ask over HTTPS.
    const KNOWN: [&[u8]; 3] = [b"cloudflare-ech.com", b"public.tls-ech.dev", b"cover.defo.ie"];
    /// Names out of HTTPS records.
    const MOST: usize = 256;

    fn has(&self, name: &Raw) -> bool {
        Self::KNOWN.contains(&name.as_bytes()) || self.0.get(name).is_some()
    }

    fn add(&mut self, name: Raw) {
        self.0.insert(name, ());
    }
}

impl Default for Fronts {
    fn default() -> Self {
        Self(Bounded::new(Self::MOST))
    }
}

/// Flows by their last samples.
struct Flows {
    map: Bounded<FlowId, Flow>,
    /// Memory of what is half read.
    held: usize,
}

impl Flows {
    fn remove(&mut self, flow: &FlowId) -> Option<Flow> {
        let gone = self.map.remove(flow)?;
        self.held -= gone.held;
        Some(gone)
    }

    fn insert(&mut self, flow: FlowId, mut known: Flow) -> Option<(FlowId, Flow)> {
        known.held = known.said.held();
        self.held += known.held;
        let gone = self.map.insert(flow, known);
        self.held -= gone.as_ref().map_or(0, |(_, gone)| gone.held);
        gone
    }

    fn pop_oldest(&mut self) -> Option<(FlowId, Flow)> {
        let gone = self.map.pop_oldest()?;
        self.held -= gone.1.held;
        Some(gone)
    }

    fn oldest_ns(&self) -> Option<u64> {
        self.map.oldest().map(|(_, flow)| flow.last_ns)
    }
}

impl Default for Flows {
    fn default() -> Self {
        Self { map: Bounded::new(Namer::MOST_FLOWS), held: 0 }
    }
}

struct Flow {
    last_ns: u64,
    said: Said,
    /// What will be said if nothing more comes.
    so_far: Option<Site>,
    /// Who said it.
    sent: bool,
    /// Memory, as the map has counted it.
    held: usize,
}

/// What the sides of a flow have said: received, sent.
enum Said {
    Tcp(Box<[Tcp; 2]>),
    Udp(Box<[Udp; 2]>),
    /// All; the sequence number of the last of it.
    All(u32),
}

impl Flow {
    fn new(sample: &Sample<'_>) -> Self {
        let said = match sample.flow.protocol {
            IPPROTO_TCP => Said::Tcp(Box::default()),
            _ => Said::Udp(Box::default()),
        };
        Self { last_ns: sample.at_ns, said, so_far: None, sent: sample.sent, held: 0 }
    }

    /// Ports are used again: this sample begins another connection, or comes after one was forgotten.
    fn is_over(&self, sample: &Sample<'_>) -> bool {
        /// Farther than a connection comes before it is sampled no more.
        const FAR: u32 = 1 << 20;
        if sample.at_ns.saturating_sub(self.last_ns) >= Namer::FORGET_NS {
            return true;
        }
        let Said::All(seq) = self.said else { return false };
        let distance = sample.seq.wrapping_sub(seq);
        sample.flow.protocol == IPPROTO_TCP
            && (FAR..=u32::MAX - FAR).contains(&distance)
            && (tls::is_hello(sample.bytes) || http::is_request(sample.bytes))
    }
}

impl Said {
    fn held(&self) -> usize {
        match self {
            Self::Tcp(sides) => sides.iter().map(Tcp::held).sum(),
            Self::Udp(sides) => sides.iter().map(Udp::held).sum(),
            Self::All(_) => 0,
        }
    }
}
