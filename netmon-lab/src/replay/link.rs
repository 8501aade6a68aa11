//! What stands in front of the IP header in a capture, made into what can be sent over a cable.

use std::borrow::Cow;

/// `LINKTYPE_` numbers (<https://www.tcpdump.org/linktypes.html>).
mod linktype {
    pub const NULL: u32 = 0;
    pub const ETHERNET: u32 = 1;
    pub const RAW_OLD: u32 = 12;
    pub const RAW_OPENBSD: u32 = 14;
    pub const RAW: u32 = 101;
    pub const LOOP: u32 = 108;
    pub const LINUX_SLL: u32 = 113;
    pub const IPV4: u32 = 228;
    pub const IPV6: u32 = 229;
    pub const LINUX_SLL2: u32 = 276;
}

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
/// IEEE 802, "local experimental": not IP, whatever it is.
const ETHERTYPE_NONE: u16 = 0x88b5;
/// Locally administered addresses that nobody has.
const ADDRESSES: [u8; 12] = [2, 0, 0, 0, 0, 0xb, 2, 0, 0, 0, 0, 0xa];
/// IEEE 802.1Q and 802.1ad.
const ETHERTYPES_VLAN: [u16; 2] = [0x8100, 0x88a8];

/// Why a frame has no Ethernet frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoEthernet {
    /// Shorter than its link-layer header.
    TooShort,
    /// The link type, which nobody has written down here.
    Unknown(u32),
}

/// The frame with an Ethernet header: its own, or an invented one in the place of another. From the first VLAN tag or
/// the IP header on nothing is changed.
///
/// # Errors
/// [`NoEthernet`].
pub fn ethernet(link: u32, bytes: &[u8]) -> Result<Cow<'_, [u8]>, NoEthernet> {
    let at = |offset: usize| {
        let two = bytes.get(offset..offset + 2).ok_or(NoEthernet::TooShort)?;
        Ok(u16::from_be_bytes([two[0], two[1]]))
    };
    let (ethertype, header) = match link {
        linktype::ETHERNET if bytes.len() < 14 => return Err(NoEthernet::TooShort),
        linktype::ETHERNET => return Ok(Cow::Borrowed(bytes)),
        linktype::RAW | linktype::RAW_OLD | linktype::RAW_OPENBSD => {
            let first = bytes.first().ok_or(NoEthernet::TooShort)?;
            let ethertype = match first >> 4 {
                // tshark looks at two bytes before it believes in IP.
                4 | 6 if bytes.len() < 2 => return Err(NoEthernet::TooShort),
                4 => ETHERTYPE_IPV4,
                6 => ETHERTYPE_IPV6,
                _ => ETHERTYPE_NONE,
            };
            (ethertype, 0)
        }
        linktype::IPV4 => (ETHERTYPE_IPV4, 0),
        linktype::IPV6 => (ETHERTYPE_IPV6, 0),
        linktype::NULL | linktype::LOOP => {
            // The address family, in the byte order of whoever captured it (LOOP: of the network). No number is
            // above 255.
            let family = match bytes.get(..4) {
                Some(&[0, 0, 0, family]) => family,
                Some(&[family, 0, 0, 0]) if link == linktype::NULL => family,
                Some(_) => 0,
                None => return Err(NoEthernet::TooShort),
            };
            let ethertype = match family {
                2 => ETHERTYPE_IPV4,
                // NetBSD and OpenBSD; FreeBSD; macOS.
                24 | 28 | 30 => ETHERTYPE_IPV6,
                _ => ETHERTYPE_NONE,
            };
            (ethertype, 4)
        }
        linktype::LINUX_SLL => (at(14)?, 16),
        linktype::LINUX_SLL2 => (at(0)?, 20),
        other => return Err(NoEthernet::Unknown(other)),
    };
    let rest = bytes.get(header..).ok_or(NoEthernet::TooShort)?;
    Ok(Cow::Owned([&ADDRESSES[..], &ethertype.to_be_bytes(), rest].concat()))
}

/// The kernel takes the outer VLAN tag out of a frame that arrives. It drops a frame that ends earlier than two bytes
/// behind that tag, ahead of TC ingress (`skb_vlan_untag`).
pub fn ends_in_tag(ethernet: &[u8]) -> bool {
    const NEEDED: usize = 14 + 4 + 2;
    matches!(ethernet, [_, _, _, _, _, _, _, _, _, _, _, _, high, low, ..]
        if ETHERTYPES_VLAN.contains(&u16::from_be_bytes([*high, *low])) && ethernet.len() < NEEDED)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ethertype(link: u32, bytes: &[u8]) -> u16 {
        let frame = ethernet(link, bytes).unwrap();
        u16::from_be_bytes([frame[12], frame[13]])
    }

    #[test]
    fn an_ethernet_frame_stays_as_it_is() {
        let frame = [7; 14];
        assert!(matches!(ethernet(linktype::ETHERNET, &frame), Ok(Cow::Borrowed(same)) if same == frame));
        assert_eq!(ethernet(linktype::ETHERNET, &frame[1..]), Err(NoEthernet::TooShort));
    }

    #[test]
    fn another_header_gives_way_to_an_invented_one_and_the_rest_stays() {
        let mut cooked = vec![0; 14];
        cooked.extend([0x86, 0xdd, 1, 2, 3]);
        assert_eq!(ethertype(linktype::LINUX_SLL, &cooked), ETHERTYPE_IPV6);
        assert_eq!(ethernet(linktype::LINUX_SLL, &cooked).unwrap()[14..], [1, 2, 3]);
        let mut cooked = vec![0x81, 0];
        cooked.extend([0; 18]);
        cooked.extend([9, 8]);
        assert_eq!(ethertype(linktype::LINUX_SLL2, &cooked), 0x8100);
        assert_eq!(ethernet(linktype::LINUX_SLL2, &cooked).unwrap()[14..], [9, 8]);
        assert_eq!(ethernet(linktype::RAW, &[0x45, 1, 2]).unwrap()[14..], [0x45, 1, 2]);
    }

    #[test]
    fn a_family_is_known_in_either_byte_order() {
        for bytes in [[2, 0, 0, 0], [0, 0, 0, 2]] {
            assert_eq!(ethertype(linktype::NULL, &bytes), ETHERTYPE_IPV4, "{bytes:?}");
        }
        for bytes in [[30, 0, 0, 0], [0, 0, 0, 24], [28, 0, 0, 0]] {
            assert_eq!(ethertype(linktype::NULL, &bytes), ETHERTYPE_IPV6, "{bytes:?}");
        }
        assert_eq!(ethertype(linktype::LOOP, &[0, 0, 0, 24]), ETHERTYPE_IPV6);
        assert_eq!(ethertype(linktype::LOOP, &[24, 0, 0, 0]), ETHERTYPE_NONE);
        for bytes in [[10, 0, 0, 0], [0, 0, 0, 0], [2, 0, 0, 2], [0, 2, 0, 0], [2, 2, 0, 0]] {
            assert_eq!(ethertype(linktype::NULL, &bytes), ETHERTYPE_NONE, "{bytes:?}");
        }
    }

    #[test]
    fn what_is_too_short_or_unknown_says_so() {
        assert_eq!(ethernet(linktype::LINUX_SLL, &[0; 15]), Err(NoEthernet::TooShort));
        assert_eq!(ethernet(linktype::LINUX_SLL2, &[0; 19]), Err(NoEthernet::TooShort));
        assert_eq!(ethernet(linktype::NULL, &[2, 0, 0]), Err(NoEthernet::TooShort));
        assert_eq!(ethernet(linktype::RAW, &[]), Err(NoEthernet::TooShort));
        assert_eq!(ethernet(127, &[0; 64]), Err(NoEthernet::Unknown(127)));
    }

    #[test]
    fn a_frame_that_ends_in_its_outer_tag_is_recognised() {
        let mut frame = vec![0; 12];
        frame.extend([0x81, 0, 0, 42, 8, 0, 1]);
        assert!(ends_in_tag(&frame));
        frame.push(2);
        assert!(!ends_in_tag(&frame));
        assert!(!ends_in_tag(&[0; 14]));
    }
}
