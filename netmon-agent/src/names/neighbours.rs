//! What hosts of the private network call themselves: multicast DNS (RFC 6762) and DHCP (RFC 2131, 2132).
//!
//! Nobody checks that. A host is believed for its own address only.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use dhcproto::v4::{self, DhcpOption, MessageType, OptionCode};
use dhcproto::{Decodable, Decoder};
use netmon_common::model::{Neighbour, NeighbourSource};
use netmon_common::raw::Raw;

use super::dns::Message;
use super::host::host;

/// What a multicast DNS message from `sender` says of its own address.
pub(super) fn in_mdns(sender: SocketAddr, datagram: &[u8]) -> Option<Neighbour> {
    let message = Message::read(datagram)?;
    let mut own = message.owners.into_iter().filter(|(_, address)| *address == sender.ip());
    let (name, address) = own.find(|_| message.is_answer && message.is_good)?;
    Some(Neighbour { address, mac: None, name, source: NeighbourSource::Mdns })
}

/// What a DHCP request says of the host that sends it: the address that it has or asks for, its link-layer address, its name.
pub(super) fn in_dhcp(datagram: &[u8]) -> Option<Neighbour> {
    let message = v4::Message::decode(&mut Decoder::new(datagram)).ok()?;
    if message.opcode() != v4::Opcode::BootRequest || !message.opts().has_msg_type(MessageType::Request) {
        return None;
    }
    let address = match message.opts().get(OptionCode::RequestedIpAddress) {
        Some(DhcpOption::RequestedIpAddress(address)) => *address,
        _ => message.ciaddr(),
    };
    let Some(DhcpOption::Hostname(name)) = message.opts().get(OptionCode::Hostname) else { return None };
    let mac = match message.htype() {
        v4::HType::Eth => message.chaddr().try_into().ok(),
        _ => None,
    };
    // Windows sends what people called the PC; that is no host name always.
    let name = host(name.as_bytes()).unwrap_or_else(|| Raw::new(name));
    let is_known = !(address == Ipv4Addr::UNSPECIFIED || address.is_broadcast() || name.is_empty());
    is_known.then_some(Neighbour { address: IpAddr::V4(address), mac, name, source: NeighbourSource::Dhcp })
}
