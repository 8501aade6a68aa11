//! Server names in Google's QUIC of before TLS: the client hello is a message of tags and values, "CHLO" (the crypto handshake
//! of Chromium's QUIC, versions Q024 to Q050). Up to Q046 it lies open in the first packet.

use super::Read;
use super::host::host;
use super::tls::Hello;

/// How far from a packet's beginning its hello is looked for: behind header, hash and the frames before it.
const WITHIN: usize = 128;
/// Most tags of a message (Chromium's kMaxEntries).
const MOST_TAGS: usize = 128;

/// True for a packet of versions Q024 to Q046, with a hello in it.
pub(super) fn is_hello(datagram: &[u8]) -> bool {
    in_datagram(datagram).is_some()
}

/// The hello of a packet of versions Q024 to Q046. They differ in where it is, so it is looked for.
pub(super) fn in_datagram(datagram: &[u8]) -> Option<Hello> {
    let version = match datagram {
        // Public flags: version, connection id of eight bytes; no reset, no number of a path.
        [flags, rest @ ..] if flags & 0xcb == 0x09 => rest.get(8..12)?,
        // Q044 and Q046: a long header.
        [flags, rest @ ..] if flags & 0x80 != 0 => rest.get(..4)?,
        _ => return None,
    };
    let [b'Q', b'0', b'2'..=b'4', b'0'..=b'9'] = version else { return None };
    let near = &datagram[..datagram.len().min(WITHIN)];
    let at = near.windows(4).position(|tag| tag == b"CHLO")?;
    match in_message(&datagram[at..]) {
        Read::Done(hello) | Read::More(Some(hello)) => Some(hello),
        Read::More(None) | Read::Not => None,
    }
}

/// A message, of which there is the beginning: tag, number of entries, padding; tag and where its value ends, for each; values.
pub(super) fn in_message(bytes: &[u8]) -> Read<Hello> {
    let Some((header, rest)) = bytes.split_at_checked(8) else { return Read::More(None) };
    let [b'C', b'H', b'L', b'O', low, high, ..] = header else { return Read::Not };
    let tags = usize::from(u16::from_le_bytes([*low, *high]));
    if tags > MOST_TAGS {
        return Read::Not;
    }
    let Some((index, values)) = rest.split_at_checked(8 * tags) else { return Read::More(None) };
    let mut start = 0;
    let mut name = None;
    for entry in index.chunks_exact(8) {
        let (tag, end) = entry.split_at(4);
        let end = u32::from_le_bytes([end[0], end[1], end[2], end[3]]) as usize;
        if end < start {
            return Read::Not;
        }
        if tag == b"SNI\0" {
            let Some(value) = values.get(start..end) else { return Read::More(None) };
            name = host(value);
        }
        start = end;
    }
    Read::Done(Hello { name, ..Hello::default() })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A client hello of padding, the name and a version.
    pub fn chlo(name: &str) -> Vec<u8> {
        let values: [(&[u8; 4], &[u8]); 3] =
            [(b"PAD\0", &[b'-'; 400]), (b"SNI\0", name.as_bytes()), (b"VER\0", b"Q046")];
        let mut message = b"CHLO\x03\0\0\0".to_vec();
        let mut end = 0;
        for (tag, value) in values {
            end += value.len() as u32;
            message.extend(tag);
            message.extend(end.to_le_bytes());
        }
        values.iter().for_each(|(_, value)| message.extend(*value));
        message
    }

    #[test]
    fn the_name_is_found_in_each_version_s_first_packet() {
        let id = [0x11; 8];
        let hash = [0x22; 12];
        let hello = chlo("www.example.org");
        let q043 = [&[0x09], &id[..], b"Q043", &[1], &hash, b"\xa0\x01\x04\x00", &hello].concat();
        let q046 =
            [&[0xc3], &b"Q046"[..], &[0x50], &id, &[0, 0, 0, 1], &hash, b"\xa0\x01\x04\x00", &hello].concat();
        for packet in [&q043, &q046] {
            assert!(is_hello(packet));
            let hello = in_datagram(packet).unwrap();
            assert_eq!(hello.name.unwrap().as_bytes(), b"www.example.org");
            for end in 0..packet.len() {
                assert!(in_datagram(&packet[..end]).is_none_or(|hello| hello.name.is_some()));
            }
        }
        let unknown = [&[0x09], &id[..], b"R043", &[1], &hash, &hello].concat();
        assert!(!is_hello(&unknown));
    }

    #[test]
    fn values_that_lead_backwards_are_none() {
        let mut message = chlo("www.example.org");
        message[8 + 8 + 4..][..4].copy_from_slice(&1u32.to_le_bytes());
        assert_eq!(in_message(&message), Read::Not);
        assert_eq!(in_message(b"REJ\0\x01\0\0\0"), Read::Not);
    }
}
