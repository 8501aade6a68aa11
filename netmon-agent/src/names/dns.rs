//! Names of addresses, from answers of the domain name system (RFC 1035, 9460).
//!
//! Messages are read record by record with hickory-proto, so what stands in front of a record that cannot be read still counts;
//! simple-dns takes messages as a whole only.

use std::collections::BTreeSet;
use std::net::IpAddr;

use hickory_proto::op::{Header, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::svcb::{SVCB, SvcParamValue};
use hickory_proto::rr::{Name, RData, Record};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};
use netmon_common::raw::Raw;

use super::bounded::Bounded;
use super::host::host;

/// Most records of a message that are looked at.
const MOST_RECORDS: usize = 256;
/// Most names on the way from a question to an address.
const MOST_ALIASES: usize = 32;
/// ECHConfig's version (RFC 9849, section 4).
const ECH_CONFIG: [u8; 2] = [0xfe, 0x0d];

/// What a message says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// Its number.
    pub id: u16,
    /// An answer, not a question.
    pub is_answer: bool,
    /// Standard query, without error.
    pub is_good: bool,
    /// What is asked for, if that is one name of a host.
    pub question: Option<Raw>,
    /// Addresses of what is asked for, by whatever aliases, with the seconds for which they may be used.
    pub addresses: Vec<(IpAddr, u32)>,
    /// Names of fronts for encrypted client hellos to what is asked for.
    pub fronts: Vec<Raw>,
    /// All addresses with their owners: what multicast DNS says.
    pub owners: Vec<(Raw, IpAddr)>,
}

impl Message {
    /// Reads a message; `None`: it is none. Of what cannot be read, the readable beginning.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let mut decoder = BinDecoder::new(bytes);
        let Header { metadata, counts, .. } = Header::read(&mut decoder).ok()?;
        let mut questions = Vec::new();
        for _ in 0..counts.queries {
            questions.push(Query::read(&mut decoder).ok()?);
            if questions.len() > MOST_RECORDS {
                return None;
            }
        }
        let question = match questions.as_slice() {
            [question] => Some(question.name().to_lowercase()),
            _ => None,
        };
        let mut records = Vec::new();
        let count =
            [counts.answers, counts.authorities, counts.additionals].map(usize::from).iter().sum::<usize>();
        while records.len() < count.min(MOST_RECORDS) {
            let Ok(record) = Record::read(&mut decoder) else { break };
            records.push(record);
        }
        let mut message = Self {
            id: metadata.id,
            is_answer: metadata.message_type == MessageType::Response,
            is_good: metadata.op_code == OpCode::Query && metadata.response_code == ResponseCode::NoError,
            question: question.as_ref().and_then(raw),
            ..Self::default()
        };
        if let Some(question) = question {
            message.follow(question, &records);
        }
        for record in &records {
            if let (Some(name), Some(address)) = (raw(&record.name), address(&record.data)) {
                message.owners.push((name, address));
            }
        }
        Some(message)
    }

    /// From the question over aliases and services to addresses, in whatever order the records are.
    fn follow(&mut self, question: Name, records: &[Record]) {
        let mut names = BTreeSet::from([question]);
        loop {
            let mut more = BTreeSet::new();
            for record in records.iter().filter(|record| names.contains(&record.name.to_lowercase())) {
                let alias = match &record.data {
                    RData::CNAME(alias) => alias.0.to_lowercase(),
                    RData::HTTPS(service) if !service.0.target_name.is_root() => {
                        service.0.target_name.to_lowercase()
                    }
                    RData::SVCB(service) if !service.target_name.is_root() => {
                        service.target_name.to_lowercase()
                    }
                    _ => continue,
                };
                if !names.contains(&alias) {
                    more.insert(alias);
                }
            }
            if more.is_empty() || names.len() + more.len() > MOST_ALIASES {
                break;
            }
            names.extend(more);
        }
        for record in records.iter().filter(|record| names.contains(&record.name.to_lowercase())) {
            match &record.data {
                RData::HTTPS(service) => self.service(&service.0, record.ttl),
                RData::SVCB(service) => self.service(service, record.ttl),
                other => self.addresses.extend(address(other).map(|address| (address, record.ttl))),
            }
        }
    }

    fn service(&mut self, service: &SVCB, ttl: u32) {
        for (_, value) in &service.svc_params {
            match value {
                SvcParamValue::Ipv4Hint(hint) => {
                    self.addresses.extend(hint.0.iter().map(|address| (IpAddr::V4(address.0), ttl)));
                }
                SvcParamValue::Ipv6Hint(hint) => {
                    self.addresses.extend(hint.0.iter().map(|address| (IpAddr::V6(address.0), ttl)));
                }
                SvcParamValue::EchConfigList(configs) => self.fronts.extend(public_names(&configs.0)),
                _ => {}
            }
        }
    }
}

fn address(data: &RData) -> Option<IpAddr> {
    match data {
        RData::A(address) => Some(IpAddr::V4(address.0)),
        RData::AAAA(address) => Some(IpAddr::V6(address.0)),
        _ => None,
    }
}

/// A service's name (`_443._https.example.org`) is that of its host.
fn raw(name: &Name) -> Option<Raw> {
    let mut labels: Vec<&[u8]> = name.iter().skip_while(|label| label.starts_with(b"_")).collect();
    // A dot within a label would make another name of it.
    labels.iter().all(|label| !label.contains(&b'.')).then_some(())?;
    labels.retain(|label| !label.is_empty());
    host(&labels.join(&b'.'))
}

/// The names of the fronts in an ECHConfigList (RFC 9849, section 4).
fn public_names(list: &[u8]) -> Vec<Raw> {
    fn split(bytes: &[u8], length: usize) -> Option<(&[u8], &[u8])> {
        bytes.split_at_checked(length)
    }
    fn vector(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
        let (length, rest) = split(bytes, 2)?;
        split(rest, usize::from(u16::from_be_bytes([length[0], length[1]])))
    }
    fn public_name(contents: &[u8]) -> Option<Raw> {
        let (_, rest) = split(contents, 1 + 2)?; // Number of the configuration, KEM.
        let (_, rest) = vector(rest)?; // Public key.
        let (_, rest) = vector(rest)?; // Cipher suites.
        let (lengths, rest) = split(rest, 2)?; // Of the longest name; of this one.
        host(split(rest, lengths[1].into())?.0)
    }
    let mut names = Vec::new();
    // With or without the list's own length in front, as the decoder has it.
    let mut rest = if list.starts_with(&ECH_CONFIG) { list } else { list.get(2..).unwrap_or_default() };
    while let Some((version, behind)) = split(rest, 2) {
        let Some((contents, behind)) = vector(behind) else { break };
        if version == ECH_CONFIG {
            names.extend(public_name(contents));
        }
        rest = behind;
    }
    names
}

/// Which names addresses were given for.
///
/// Only an answer to a question that this PC was seen asking counts: what a neighbour sends unasked would let him name others'
/// traffic as he likes.
#[derive(Debug)]
pub struct Answers {
    asked: Bounded<Question, u64>,
    names: Bounded<IpAddr, Vec<Given>>,
}

/// Which flow a question went over, its number, what was asked for.
type Question = (super::FlowId, u16, Raw);

#[derive(Clone, Debug)]
struct Given {
    name: Raw,
    heard_ns: u64,
    until_ns: u64,
}

/// A name that an address was given for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What was asked for.
    pub name: Raw,
    /// When, boot clock.
    pub heard_ns: u64,
    /// How many other names the address was given for, that are still good: the newest is the likeliest, no more.
    pub others: usize,
}

impl Answers {
    /// Questions that wait for an answer.
    const MOST_ASKED: usize = 1_024;
    /// Addresses.
    const MOST_ADDRESSES: usize = 16_384;
    /// Names of one address, the newest ones.
    const MOST_NAMES: usize = 4;
    /// How long an answer may take: resolvers give up after five seconds, and ask again a few times.
    const PATIENCE_NS: u64 = 30_000_000_000;
    /// How much longer than it may an address is used: programs keep connections and what they resolved.
    const GRACE_NS: u64 = 3_600_000_000_000;
    /// However long it may be used (RFC 8767, section 4, has a week).
    const MOST_TTL_S: u32 = 86_400;

    /// A question of this PC.
    pub(super) fn asked(&mut self, flow: super::FlowId, message: &Message, at_ns: u64) {
        if let (false, Some(question)) = (message.is_answer, &message.question) {
            self.asked.insert((flow, message.id, question.clone()), at_ns);
        }
    }

    /// An answer to it. True when it is one.
    pub(super) fn answered(&mut self, flow: super::FlowId, message: &Message, at_ns: u64) -> bool {
        let (true, Some(question)) = (message.is_answer, &message.question) else { return false };
        let question = (flow, message.id, question.clone());
        let is_asked = self
            .asked
            .get(&question)
            .is_some_and(|asked_ns| at_ns.saturating_sub(*asked_ns) <= Self::PATIENCE_NS);
        if !is_asked {
            return false;
        }
        // It stays: an answer that came twice is as good as one.
        if message.is_good {
            let (_, _, name) = question;
            for &(address, ttl_s) in &message.addresses {
                self.give(address, name.clone(), at_ns, ttl_s);
            }
        }
        true
    }

    fn give(&mut self, address: IpAddr, name: Raw, heard_ns: u64, ttl_s: u32) {
        let good_ns = u64::from(ttl_s.min(Self::MOST_TTL_S)) * 1_000_000_000 + Self::GRACE_NS;
        let mut names = self.names.remove(&address).unwrap_or_default();
        names.retain(|given| given.name != name);
        if names.len() >= Self::MOST_NAMES {
            names.remove(0);
        }
        names.push(Given { name, heard_ns, until_ns: heard_ns.saturating_add(good_ns) });
        self.names.insert(address, names);
    }

    /// The name that `address` was given for last, before `at_ns`.
    pub fn name_of(&self, address: IpAddr, at_ns: u64) -> Option<Answer> {
        let good = |given: &&Given| (given.heard_ns..given.until_ns).contains(&at_ns);
        let names = self.names.get(&address)?.iter().filter(good);
        let newest = names.clone().max_by_key(|given| given.heard_ns)?;
        let Given { name, heard_ns, .. } = newest.clone();
        Some(Answer { name, heard_ns, others: names.count() - 1 })
    }

    /// Addresses that have names.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Nobody has a name.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Default for Answers {
    fn default() -> Self {
        Self { asked: Bounded::new(Self::MOST_ASKED), names: Bounded::new(Self::MOST_ADDRESSES) }
    }
}
