//! What hosts of the private network call themselves: multicast DNS (RFC 6762) and DHCP (RFC 2131, 2132).
//!
//! Nobody checks that. A host is believed for its own address only.
//!
//! DHCP's options are taken apart here: dhcproto 0.15, which would do that, has debug assertions on lengths that the sender chooses.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

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
    /// Of the fixed fields (RFC 2131, section 2).
    const CLIENT_ADDRESS_AT: usize = 12;
    const HARDWARE_AT: usize = 28;
    const MAGIC_AT: usize = 236;
    /// Options (RFC 2132, sections 3.1, 3.2, 3.14, 9.1, 9.6).
    const PAD: u8 = 0;
    const END: u8 = 255;
    const HOST_NAME: u8 = 12;
    const REQUESTED_ADDRESS: u8 = 50;
    const MESSAGE_TYPE: u8 = 53;

    // A request (BOOTREQUEST) over Ethernet.
    let [1, hardware, hardware_length, ..] = datagram else { return None };
    let mut rest = datagram.get(MAGIC_AT..)?.strip_prefix(b"\x63\x82\x53\x63")?;
    let (mut kind, mut name, mut requested) = (None, None, None);
    loop {
        match rest {
            [] | [END, ..] => break,
            [PAD, behind @ ..] => rest = behind,
            [code, length, behind @ ..] => {
                let (value, behind) = behind.split_at_checked(usize::from(*length))?;
                match *code {
                    MESSAGE_TYPE => kind = Some(value),
                    HOST_NAME => name = Some(value),
                    REQUESTED_ADDRESS => requested = value.first_chunk(),
                    _ => {}
                }
                rest = behind;
            }
            [_] => return None,
        }
    }
    // DHCPREQUEST.
    if kind != Some(&[3]) {
        return None;
    }
    let own: &[u8; 4] = datagram.get(CLIENT_ADDRESS_AT..)?.first_chunk()?;
    let address = Ipv4Addr::from(*requested.unwrap_or(own));
    let is_ethernet = (*hardware, *hardware_length) == (1, 6);
    let mac = datagram.get(HARDWARE_AT..)?.first_chunk().copied().filter(|_| is_ethernet);
    let name = name?.split(|&byte| byte == 0).next()?;
    // Windows sends what people called the PC; that is no host name always.
    let name = host(name).unwrap_or_else(|| Raw::new(name));
    let is_known = !(address == Ipv4Addr::UNSPECIFIED || address.is_broadcast() || name.is_empty());
    is_known.then_some(Neighbour { address: IpAddr::V4(address), mac, name, source: NeighbourSource::Dhcp })
}
