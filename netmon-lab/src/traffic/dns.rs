//! DNS over UDP (RFC 1035): one question, one answer.

use std::net::{Ipv4Addr, UdpSocket};
use std::process;

use anyhow::ensure;
use simple_dns::rdata::{A, RData};
use simple_dns::{CLASS, Name, Packet, PacketFlag, Question, ResourceRecord, TYPE};

use super::{Connect, Report, Serve, udp};
use crate::room;

/// Longest message without EDNS, in bytes (RFC 1035 2.3.4).
const MAX_MESSAGE: usize = 512;
const TTL: u32 = 60;

/// Answers every question with the address of the host `web`.
pub(super) fn serve(serve: &Serve, count: u32) -> anyhow::Result<Report> {
    serve.begin();
    let address: Ipv4Addr = room::WEB.parse()?;
    let socket = UdpSocket::bind(serve.listen)?;
    serve.ready()?;
    let mut buffer = [0; MAX_MESSAGE];
    let mut report = Report::default();
    for _ in 0..count {
        let (length, client) = socket.recv_from(&mut buffer)?;
        let query = Packet::parse(&buffer[..length])?;
        let mut reply = Packet::new_reply(query.id());
        for question in query.questions {
            let answer = RData::A(A::from(address));
            reply.answers.push(ResourceRecord::new(question.qname.clone(), CLASS::IN, TTL, answer));
            reply.questions.push(question);
        }
        report.received += length as u64;
        report.sent += socket.send_to(&reply.build_bytes_vec()?, client)? as u64;
    }
    Ok(report)
}

pub(super) fn query(connect: &Connect, name: &str) -> anyhow::Result<Report> {
    connect.begin();
    let id = process::id() as u16;
    let mut query = Packet::new_query(id);
    query.set_flags(PacketFlag::RECURSION_DESIRED);
    query.questions.push(Question::new(Name::new(name)?, TYPE::A.into(), CLASS::IN.into(), false));
    let socket = udp::connected(connect.to)?;
    let sent = socket.send(&query.build_bytes_vec()?)? as u64;
    let mut buffer = [0; MAX_MESSAGE];
    let received = socket.recv(&mut buffer)?;
    let reply = Packet::parse(&buffer[..received])?;
    ensure!(reply.id() == id, "the answer belongs to question {}, not {id}", reply.id());
    ensure!(reply.answers.len() == 1, "expected one answer, got {:?}", reply.answers);
    Ok(Report { sent, received: received as u64 })
}
