//! What flows say first, out of packets that anybody may send.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use netmon_agent::kernel::FlowId;
use netmon_agent::names::dns::Message;
use netmon_agent::names::domain::{DomainList, registrable};
use netmon_agent::names::host::host;
use netmon_agent::names::{Namer, Sample};
use netmon_common::abi::{IPPROTO_TCP, IPPROTO_UDP};
use netmon_common::model::NameSource;
use netmon_common::raw::Raw;
use rustls::Side;
use rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256;
use rustls::quic::Version;

use crate::input::Input;

const REMOTE: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 9));

fn flow(protocol: u8, local: u16, remote: u16) -> FlowId {
    let here = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 17));
    FlowId { local: SocketAddr::new(here, local), remote: SocketAddr::new(REMOTE, remote), protocol }
}

/// Segments of some TCP flows: a byte that says which flow (two bits), which direction, if time passes; where in the stream it
/// is; its payload with its length in front. Names are names of hosts, in lower case; what is half read is bounded, and gone in
/// the end.
pub fn tcp(data: &[u8]) {
    heard_over_tcp(data);
}

fn heard_over_tcp(data: &[u8]) -> Vec<Raw> {
    let mut heard = Vec::new();
    let mut input = Input(data);
    let mut namer = Namer::default();
    let mut at_ns = 1;
    while !input.is_empty() {
        let how = input.byte();
        let port = [443, 80, 53, 25][usize::from(how & 3)];
        at_ns += u64::from(how >> 4) * 500_000_000;
        let seq = u32::from(input.u16()).wrapping_sub(0x100);
        let (flow, sent) = (flow(IPPROTO_TCP, 40_000, port), how & 4 != 0);
        namer.take(&Sample { flow, sent, seq, at_ns, bytes: input.block() });
        check(&mut namer, &mut heard);
    }
    end(namer, at_ns, &mut heard);
    heard
}

/// Datagrams of some UDP flows: a byte that says which flow (two bits), which direction, and if the payload is what is in an
/// Initial packet of QUIC 1 or 2, which is then protected as it should be; its payload with its length in front. As for TCP.
pub fn udp(data: &[u8]) {
    heard_over_udp(data);
}

fn heard_over_udp(data: &[u8]) -> Vec<Raw> {
    let mut heard = Vec::new();
    let mut input = Input(data);
    let mut namer = Namer::default();
    let mut number = 0;
    while !input.is_empty() {
        let how = input.byte();
        let port = [443, 53, 5353, 67][usize::from(how & 3)];
        let (flow, sent) = (flow(IPPROTO_UDP, 40_000, port), how & 4 != 0);
        let payload = input.block();
        let bytes = match how >> 4 {
            0 => payload.to_vec(),
            with => {
                number += 1;
                // Two ids of clients; whom it is sent to is another question.
                let ids: [&[u8]; 2] = [b"client's", b"retry"];
                let id = ids[usize::from(with & 1)];
                let to = if with & 4 != 0 { b"server" } else { id };
                let version = if with & 2 != 0 { Version::V2 } else { Version::V1 };
                protected(version, id, to, number, payload)
            }
        };
        namer.take(&Sample { flow, sent, seq: 0, at_ns: 1, bytes: &bytes });
        check(&mut namer, &mut heard);
    }
    end(namer, 1, &mut heard);
    heard
}

/// Questions and answers, each with its length in front, and a name of a list of domains between them. What an answer gives to
/// an address is found, under the name that was asked for.
pub fn dns(data: &[u8]) {
    let mut input = Input(data);
    let mut namer = Namer::default();
    let flow = flow(IPPROTO_UDP, 40_000, 53);
    for at_ns in (1u64..).step_by(1_000) {
        if input.is_empty() {
            break;
        }
        let (question, answer) = (input.block(), input.block());
        namer.take(&Sample { flow, sent: true, seq: 0, at_ns, bytes: question });
        namer.take(&Sample { flow, sent: false, seq: 0, at_ns: at_ns + 1, bytes: answer });
        let read = (Message::read(question), Message::read(answer));
        if let (Some(question), Some(answer)) = read {
            for name in
                answer.owners.iter().map(|(name, _)| name).chain(&answer.fronts).chain(&answer.question)
            {
                is_host(name);
            }
            let is_answered = !question.is_answer
                && answer.is_answer
                && answer.is_good
                && question.question.is_some()
                && (question.id, &question.question) == (answer.id, &answer.question);
            for (address, _) in answer.addresses.iter().take(usize::from(is_answered) * 1_024) {
                let site = namer.answer(*address, at_ns + 2).expect("an answer that was asked for");
                assert_eq!((Some(site.name), site.source), (answer.question.clone(), NameSource::Dns));
            }
        }
        assert!(namer.answers().len() <= 16_384);
        let text = String::from_utf8_lossy(input.block());
        match DomainList::parse(&text) {
            Ok(list) => {
                for line in text.lines().filter(|line| host(line.as_bytes()).is_some()) {
                    let name = line.trim_end_matches('.').to_ascii_lowercase();
                    let listed = list.find(&name);
                    assert!(
                        name.contains("xn--") || listed.is_some_and(|listed| name.ends_with(listed.domain))
                    );
                    assert!(name.ends_with(registrable(&name)));
                }
            }
            Err(error) => assert!(!error.to_string().contains(['\n', '\u{1b}'])),
        }
    }
    end(namer, 1, &mut Vec::new());
}

fn is_host(name: &Raw) {
    assert_eq!(host(name.as_bytes()).as_ref(), Some(name));
}

/// Names of flows and of neighbours, in the order in which they are heard.
fn check(namer: &mut Namer, heard: &mut Vec<Raw>) {
    while let Some(said) = namer.poll_heard() {
        is_host(&said.site.name);
        heard.push(said.site.name);
    }
    while let Some(neighbour) = namer.poll_neighbour() {
        assert!(!neighbour.name.is_empty());
        heard.push(neighbour.name);
    }
    let (flows, held) = namer.holds();
    assert!(flows <= Namer::MOST_FLOWS && held <= Namer::MOST_HELD);
}

fn end(mut namer: Namer, at_ns: u64, heard: &mut Vec<Raw>) {
    namer.handle_timeout(at_ns + Namer::FORGET_NS);
    check(&mut namer, heard);
    assert_eq!(namer.holds(), (0, 0));
}

/// An Initial packet of a client (RFC 9001, section 5; RFC 9369), protected by rustls.
pub(crate) fn protected(version: Version, id: &[u8], to: &[u8], number: u32, frames: &[u8]) -> Vec<u8> {
    let suite = TLS13_AES_128_GCM_SHA256.tls13().and_then(|suite| suite.quic_suite()).expect("rustls has it");
    let keys = suite.keys(id, Side::Client, version);
    let (first, wire) = match version {
        Version::V2 => (0xd3, 0x6b33_43cf_u32),
        _ => (0xc3, 1),
    };
    let mut payload = frames[..frames.len().min(16_000)].to_vec();
    payload.resize(payload.len().max(4), 0);
    let length = (4 + payload.len() + 16) as u16 | 0x4000;
    let front =
        [&[first], &wire.to_be_bytes()[..], &[to.len() as u8], to, &[0, 0], &length.to_be_bytes()].concat();
    let mut header = [&front[..], &number.to_be_bytes()].concat();
    let tag =
        keys.local.packet.encrypt_in_place(number.into(), &header, &mut payload).expect("an own packet");
    payload.extend(tag.as_ref());
    let (front, number) = header.split_at_mut(front.len());
    keys.local.header.encrypt_in_place(&payload[..16], &mut front[0], number).expect("an own header");
    [header, payload].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seeds;

    #[test]
    fn the_seeds_say_names() {
        let tcp: Vec<_> = seeds::names_tcp().iter().map(|seed| heard_over_tcp(seed)).collect();
        let www = || vec![Raw::from("www.example.org")];
        let expected = [www(), www(), www(), www(), www(), www(), vec!["proxied.example".into()]];
        assert_eq!(tcp[..7], expected);
        assert_eq!(tcp[7..], [vec!["cloudflare-ech.com".into()], vec![]]);
        let udp: Vec<_> = seeds::names_udp().iter().map(|seed| heard_over_udp(seed)).collect();
        let quic = || vec![Raw::from("quic.example.org")];
        assert_eq!(udp[..6], [quic(), quic(), quic(), quic(), quic(), quic()]);
        let pc = || vec![Raw::from("pc-23")];
        let expected = [www(), www(), vec!["a.org".into()], vec!["pc-23.local".into()], pc(), vec![]];
        assert_eq!(udp[6..], expected);
        for (seed, addresses) in seeds::dns().iter().zip([1, 2, 0]) {
            let mut input = Input(seed);
            let (_, answer) = (input.block(), input.block());
            let answer = Message::read(answer).expect("a message");
            assert_eq!(answer.addresses.len(), addresses, "{answer:?}");
            assert_eq!(answer.fronts.len(), addresses / 2);
        }
    }
}
