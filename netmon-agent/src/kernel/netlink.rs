//! The questions to rtnetlink that attaching needs. Asked in the network namespace of the calling thread.

use std::io;

use netlink_packet_core::{
    DecodeError, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkMessage, LinkXdp},
    tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::KernelError;

/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)` of linux/pkt_sched.h.
const CLSACT_INGRESS: u32 = 0xffff_fff2;
/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_EGRESS)`.
const CLSACT_EGRESS: u32 = 0xffff_fff3;
/// `TC_H_CLSACT`, the qdisc's parent.
const CLSACT: u32 = 0xffff_fff1;
/// The qdisc's handle.
const CLSACT_HANDLE: u32 = 0xffff_0000;

/// What is known of an interface.
pub(super) struct Link {
    pub name: String,
    /// `ARPHRD_` number.
    pub link_type: u16,
    /// Kernel's numbers of the XDP programs that hang on it.
    pub xdp: Vec<u32>,
}

/// Looks an interface up by its index.
pub(super) fn link(ifindex: u32) -> Result<Link, KernelError> {
    let mut message = LinkMessage::default();
    message.header.index = ifindex;
    let answers = match ask(RouteNetlinkMessage::GetLink(message), 0) {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
            return Err(KernelError::NoSuchInterface { ifindex });
        }
        answers => {
            answers.map_err(|source| KernelError::Netlink { action: "look an interface up", source })?
        }
    };
    link_of(answers, ifindex).ok_or(KernelError::NoSuchInterface { ifindex })
}

fn link_of(answers: Vec<RouteNetlinkMessage>, ifindex: u32) -> Option<Link> {
    answers.into_iter().find_map(|answer| match answer {
        RouteNetlinkMessage::NewLink(link) if link.header.index == ifindex => {
            let (mut name, mut xdp) = (None, Vec::new());
            for attribute in link.attributes {
                match attribute {
                    LinkAttribute::IfName(found) => name = Some(found),
                    LinkAttribute::Xdp(found) => xdp.extend(found.iter().filter_map(xdp_program)),
                    _ => {}
                }
            }
            Some(Link { name: name?, link_type: link.header.link_layer_type.into(), xdp })
        }
        _ => None,
    })
}

fn xdp_program(attribute: &LinkXdp) -> Option<u32> {
    match attribute {
        LinkXdp::ProgId(id) | LinkXdp::DrvProgId(id) | LinkXdp::SkbProgId(id) | LinkXdp::HwProgId(id) => {
            Some(*id)
        }
        _ => None,
    }
}

/// A BPF filter on a clsact qdisc.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Filter {
    /// Kernel's number of its program.
    pub program: u32,
    /// Its name, which is its program's.
    pub name: String,
}

/// The BPF filters on the clsact qdisc of an interface; none when it has no such qdisc. Filters of other kinds do not
/// concern us.
pub(super) fn filters(ifindex: u32, egress: bool) -> Result<Vec<Filter>, KernelError> {
    let parent = if egress { CLSACT_EGRESS } else { CLSACT_INGRESS };
    let answers = match ask(RouteNetlinkMessage::GetTrafficFilter(tc(ifindex, parent)), NLM_F_DUMP) {
        Err(error) if gone(&error) => Vec::new(),
        answers => answers.map_err(|source| KernelError::Netlink { action: "list the filters", source })?,
    };
    Ok(filters_of(answers))
}

fn filters_of(answers: Vec<RouteNetlinkMessage>) -> Vec<Filter> {
    let mut filters = Vec::new();
    for answer in answers {
        let RouteNetlinkMessage::NewTrafficFilter(message) = answer else { continue };
        let mut filter = Filter::default();
        for attribute in message.attributes {
            let TcAttribute::Options(options) = attribute else { continue };
            for option in options {
                match option {
                    TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => filter.program = id,
                    TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => filter.name = name,
                    _ => {}
                }
            }
        }
        // Only BPF filters have a program.
        if filter.program != 0 {
            filters.push(filter);
        }
    }
    filters
}

/// The interface or its clsact qdisc is not there (any more).
fn gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENOENT | libc::EINVAL))
}

/// Removes the clsact qdisc of an interface when no filter hangs on it. An interface that has gone, or has no such
/// qdisc any more, is fine.
pub(super) fn remove_empty_clsact(ifindex: u32) -> Result<(), KernelError> {
    let failed = |source| KernelError::Netlink { action: "remove the clsact qdisc", source };
    for parent in [CLSACT_INGRESS, CLSACT_EGRESS] {
        match ask(RouteNetlinkMessage::GetTrafficFilter(tc(ifindex, parent)), NLM_F_DUMP) {
            Ok(answers) if answers.is_empty() => {}
            Ok(_) => return Ok(()),
            Err(error) if gone(&error) => return Ok(()),
            Err(error) => return Err(failed(error)),
        }
    }
    let mut message = tc(ifindex, CLSACT);
    message.header.handle = TcHandle::from(CLSACT_HANDLE);
    match ask(RouteNetlinkMessage::DelQueueDiscipline(message), NLM_F_ACK) {
        Err(error) if !gone(&error) => Err(failed(error)),
        _ => Ok(()),
    }
}

fn tc(ifindex: u32, parent: u32) -> TcMessage {
    let mut message = TcMessage::with_index(ifindex.cast_signed());
    message.header.parent = TcHandle::from(parent);
    message
}

/// Sends one request and gathers its answers.
fn ask(request: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;

    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0)?;

    let mut answers = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        if take_answers(&datagram, &mut answers)? || flags & (NLM_F_DUMP | NLM_F_ACK) == 0 {
            return Ok(answers);
        }
    }
}

/// Takes the messages of a datagram. True: the last one says that it is the last.
fn take_answers(datagram: &[u8], answers: &mut Vec<RouteNetlinkMessage>) -> io::Result<bool> {
    let mut rest = datagram;
    while rest.len() >= 16 {
        let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(invalid)?;
        // Messages start at multiples of four bytes (netlink(7), NLMSG_ALIGN).
        let length = (answer.header.length as usize).next_multiple_of(4).max(16);
        rest = rest.get(length..).unwrap_or_default();
        match answer.payload {
            NetlinkPayload::InnerMessage(inner) => answers.push(inner),
            NetlinkPayload::Error(error) => {
                return match error.code {
                    Some(_) => Err(error.to_io()),
                    None => Ok(true),
                };
            }
            NetlinkPayload::Done(_) => return Ok(true),
            _ => {}
        }
    }
    Ok(false)
}

fn invalid(error: DecodeError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// What [`link`] and [`filters`] make of a datagram, for those who try what they make of any.
pub(super) fn read(datagram: &[u8], ifindex: u32) -> io::Result<(Option<Link>, Vec<Filter>)> {
    let mut answers = Vec::new();
    take_answers(datagram, &mut answers)?;
    Ok((link_of(answers.clone(), ifindex), filters_of(answers)))
}
