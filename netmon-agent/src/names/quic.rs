//! Server names in QUIC's first packets: versions 1 (RFC 9000, 9001) and 2 (RFC 9369), drafts 22 and later, what Facebook and
//! Google made of them, and Google's QUIC of before.
//!
//! Initial packets are encrypted with keys that follow from the connection id that the client chose for the server (RFC 9001,
//! section 5.2). So whoever sees the first one can read them, and what can be opened was really sent by who chose that id: no
//! check of ports or lengths is as good. A client that got a Retry begins again, with keys of a new id; one that only goes on
//! (the hello did not fit in one datagram, and the server has answered already) writes to the server's id, with the old keys.

use ring::aead::quic::{AES_128, HeaderProtectionKey};
use ring::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, KeyType, Prk, Salt};

use super::Read;
use super::gquic;
use super::stream::Stream;
use super::tls::{self, Hello};

/// Longest connection id (RFC 9000, section 17.2).
const MOST_ID: usize = 20;
/// First connection ids of a flow that are remembered: one, another after a Retry, another after a version negotiation.
const MOST_CONNECTIONS: usize = 4;
/// Packets of a datagram that are looked at: Initial, 0-RTT, Handshake, and those of some datagrams that the kernel was given as one.
const MOST_PACKETS: usize = 16;

/// How a family of versions differs from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Suite {
    salt: [u8; 20],
    /// Labels and packet types of version 2 (RFC 9369, section 3.2 and 3.3).
    is_v2: bool,
    /// Frames are numbered as Google did.
    is_google: bool,
}

const fn suite(salt: [u8; 20]) -> Suite {
    Suite { salt, is_v2: false, is_google: false }
}

const fn google(salt: [u8; 20]) -> Suite {
    Suite { salt, is_v2: false, is_google: true }
}

/// RFC 9001, section 5.2.
const V1: Suite = suite(*b"\x38\x76\x2c\xf7\xf5\x59\x34\xb3\x4d\x17\x9a\xe6\xa4\xc8\x0c\xad\xcc\xbb\x7f\x0a");
/// RFC 9369, section 3.3.1.
const V2: Suite = Suite {
    salt: *b"\x0d\xed\xe3\xde\xf7\x00\xa6\xdb\x81\x93\x81\xbe\x6e\x26\x9d\xcb\xf9\xbd\x2e\xd9",
    is_v2: true,
    is_google: false,
};
/// draft-ietf-quic-v2-00 to -04, as 0x709a50c4 (or 0xff020000).
const V2_DRAFT: Suite = Suite {
    salt: *b"\xa7\x07\xc2\x03\xa5\x9b\x47\x18\x4a\x1d\x62\xca\x57\x04\x06\xea\x7a\xe3\xe5\xd3",
    is_v2: true,
    is_google: false,
};
/// draft-ietf-quic-tls-29 to -32.
const DRAFT_29: Suite =
    suite(*b"\xaf\xbf\xec\x28\x99\x93\xd2\x4c\x9e\x97\x86\xf1\x9c\x61\x11\xe0\x43\x90\xa8\x99");
/// draft-ietf-quic-tls-23 to -28.
const DRAFT_23: Suite =
    suite(*b"\xc3\xee\xf7\x12\xc7\x2e\xbb\x5a\x11\xa7\xd2\x43\x2b\xb4\x63\x65\xbe\xf9\xf5\x02");
/// draft-ietf-quic-tls-21 and -22.
const DRAFT_22: Suite =
    suite(*b"\x7f\xbc\xdb\x0e\x7c\x66\xbb\xe9\x19\x3a\x96\xcd\x21\x51\x9e\xbd\x7a\x02\x64\x4a");
/// Chromium's, as are the next two.
const Q050: Suite =
    google(*b"\x50\x45\x74\xef\xd0\x66\xfe\x2f\x9d\x94\x5c\xfc\xdb\xd3\xa7\xf0\xd3\xb5\x6b\x45");
const T050: Suite =
    google(*b"\x7f\xf5\x79\xe5\xac\xd0\x72\x91\x55\x80\x30\x4c\x43\xa2\x36\x7c\x60\x48\x83\x10");
const T051: Suite =
    google(*b"\x7a\x4e\xde\xf4\xe7\xcc\xee\x5f\xa4\x50\x6c\x19\x12\x4f\xc8\xcc\xda\x6e\x03\x3d");

/// How packets of a version may be protected. Several where it cannot be known: the right one is what opens them.
fn suites(version: u32) -> &'static [Suite] {
    match version {
        1 => &[V1],
        0x6b33_43cf => &[V2],
        0x709a_50c4 | 0xff02_0000 => &[V2_DRAFT],
        0xff00_0015 | 0xff00_0016 => &[DRAFT_22],
        0xff00_0017..=0xff00_001c => &[DRAFT_23],
        0xff00_001d..=0xff00_0020 => &[DRAFT_29],
        0xff00_0021..=0xff00_00ff => &[V1],
        0x5130_3530 => &[Q050],
        0x5430_3530 => &[T050],
        0x5430_3531 => &[T051],
        // Facebook's mvfst.
        0xface_b001 => &[DRAFT_22, DRAFT_23],
        0xface_b000..=0xface_bfff => &[DRAFT_23, DRAFT_29, V1, V2],
        // What is reserved to provoke a version negotiation (RFC 9000, section 15).
        _ if version & 0x0f0f_0f0f == 0x0a0a_0a0a => &[V1, DRAFT_29, V2, DRAFT_23],
        _ => &[],
    }
}

/// True when a datagram begins with a long header of a known version, or as Google's QUIC.
pub(super) fn is_quic(datagram: &[u8]) -> bool {
    match long_header(datagram) {
        Some(packet) => packet.id.len() <= MOST_ID,
        None => gquic::is_hello(datagram),
    }
}

/// What one side of a flow has said.
#[derive(Default)]
pub(super) struct Quic {
    connections: Vec<Connection>,
}

impl Quic {
    /// A datagram, or several that lie one behind the other. The hello, once it is whole.
    pub fn datagram(&mut self, mut datagram: &[u8]) -> Read<Hello> {
        if let Some(hello) = gquic::in_datagram(datagram) {
            return Read::Done(hello);
        }
        let mut read = Read::Not;
        for _ in 0..MOST_PACKETS {
            let Some(packet) = long_header(datagram) else { break };
            datagram = &datagram[packet.end..];
            // Some pad datagrams, not packets.
            let padding = datagram.iter().position(|&byte| byte != 0).unwrap_or(datagram.len());
            datagram = &datagram[padding..];
            if !packet.is_initial {
                continue;
            }
            match self.initial(&packet) {
                Read::Not => {}
                Read::More(so_far) => read = Read::More(so_far),
                done @ Read::Done(_) => return done,
            }
        }
        read
    }

    /// Memory that it holds.
    pub fn held(&self) -> usize {
        self.connections.iter().map(Connection::held).sum()
    }

    /// An Initial packet, of whichever connection it is.
    fn initial(&mut self, packet: &Packet<'_>) -> Read<Hello> {
        for connection in self.connections.iter_mut().rev() {
            if let Some(read) = connection.open(packet) {
                return read;
            }
        }
        if self.connections.iter().any(|connection| connection.id == packet.id) {
            return Read::Not;
        }
        // Room for one: versions change seldom.
        let keys = Vec::with_capacity(1);
        let mut connection = Connection { id: packet.id.to_vec(), keys, ..Connection::default() };
        let Some(read) = connection.open(packet) else { return Read::Not };
        if self.connections.len() >= MOST_CONNECTIONS {
            self.connections.remove(0);
        }
        self.connections.push(connection);
        read
    }
}

/// What is protected by keys of one connection id.
#[derive(Default)]
struct Connection {
    id: Vec<u8>,
    /// Keys by version: a client may be told to go on in another (RFC 9368, section 2.3).
    keys: Vec<(u32, Suite, Keys)>,
    /// Largest packet number so far.
    largest: Option<u64>,
    crypto: Stream,
}

impl Connection {
    fn held(&self) -> usize {
        size_of::<Self>() + self.keys.capacity() * size_of::<(u32, Suite, Keys)>() + self.crypto.held()
    }

    /// `None`: the packet is none of this connection.
    fn open(&mut self, packet: &Packet<'_>) -> Option<Read<Hello>> {
        let known = self.keys.iter().find(|(version, ..)| *version == packet.version);
        let (suite, (number, frames)) = match known {
            Some((_, suite, keys)) => (*suite, keys.open(packet, self.largest)?),
            None => {
                let opened = |suite: &Suite| {
                    let keys = Keys::of_client(suite, &self.id)?;
                    let opened = keys.open(packet, self.largest)?;
                    Some((*suite, keys, opened))
                };
                let (suite, keys, opened) = suites(packet.version).iter().find_map(opened)?;
                self.keys.push((packet.version, suite, keys));
                self.keys.truncate(MOST_CONNECTIONS);
                (suite, opened)
            }
        };
        self.largest = self.largest.max(Some(number));
        let read = if suite.is_google { google_frames } else { ietf_frames };
        read(&frames, &mut self.crypto);
        let beginning = self.crypto.beginning();
        Some(match suite == Q050 {
            true => gquic::in_message(beginning),
            false => tls::in_message(beginning),
        })
    }
}

/// Puts the crypto frames of a packet where they belong (RFC 9000, section 19). Stops at what has no place in an Initial packet.
fn ietf_frames(frames: &[u8], crypto: &mut Stream) {
    let mut rest = Bytes(frames);
    while let Some(kind) = rest.take(1) {
        let read = match kind[0] {
            0 | 1 => Some(()), // Padding, ping.
            2 | 3 => acknowledgement(&mut rest, kind[0] == 3),
            6 => crypto_frame(&mut rest, crypto),
            _ => None,
        };
        if read.is_none() {
            return;
        }
    }
}

fn crypto_frame(rest: &mut Bytes<'_>, crypto: &mut Stream) -> Option<()> {
    let at = rest.number()?;
    let length = rest.number()?;
    let bytes = rest.take(usize::try_from(length).ok()?)?;
    crypto.insert(usize::try_from(at).ok()?, bytes);
    Some(())
}

fn acknowledgement(rest: &mut Bytes<'_>, has_ecn: bool) -> Option<()> {
    rest.number()?; // Largest.
    rest.number()?; // Delay.
    let ranges = rest.number()?;
    rest.number()?; // First range.
    for _ in 0..ranges {
        rest.number()?;
        rest.number()?;
    }
    if has_ecn {
        for _ in 0..3 {
            rest.number()?;
        }
    }
    Some(())
}

/// Google's: padding 0, ping 7, crypto 8. Acknowledgements come first where there are any, and none are in a client's first packets.
fn google_frames(frames: &[u8], crypto: &mut Stream) {
    let mut rest = Bytes(frames);
    while let Some(kind) = rest.take(1) {
        let read = match kind[0] {
            0 | 7 => Some(()),
            8 => crypto_frame(&mut rest, crypto),
            _ => None,
        };
        if read.is_none() {
            return;
        }
    }
}

/// What protects the client's Initial packets.
struct Keys {
    packet: LessSafeKey,
    iv: [u8; 12],
    header: HeaderProtectionKey,
}

impl Keys {
    fn of_client(suite: &Suite, id: &[u8]) -> Option<Self> {
        let initial = Salt::new(HKDF_SHA256, &suite.salt).extract(id);
        let secret: [u8; 32] = expand(&initial, b"client in")?;
        let secret = Prk::new_less_safe(HKDF_SHA256, &secret);
        let [key, iv, header]: [&[u8]; 3] = match suite.is_v2 {
            false => [b"quic key", b"quic iv", b"quic hp"],
            true => [b"quicv2 key", b"quicv2 iv", b"quicv2 hp"],
        };
        let key: [u8; 16] = expand(&secret, key)?;
        let header: [u8; 16] = expand(&secret, header)?;
        Some(Self {
            packet: LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &key).ok()?),
            iv: expand(&secret, iv)?,
            header: HeaderProtectionKey::new(&AES_128, &header).ok()?,
        })
    }

    /// Packet number and frames. `None`: not protected with these keys, or damaged.
    fn open(&self, packet: &Packet<'_>, largest: Option<u64>) -> Option<(u64, Vec<u8>)> {
        let Packet { bytes, number_at, end, .. } = *packet;
        let sample = bytes.get(number_at + 4..number_at + 20)?;
        let mask = self.header.new_mask(sample).ok()?;
        let mut header = bytes.get(..number_at + 4)?.to_vec();
        header[0] ^= mask[0] & 0x0f;
        let number_bytes = usize::from(header[0] & 3) + 1;
        let body_at = number_at + number_bytes;
        header.truncate(body_at);
        let mut truncated = 0;
        for (byte, mask) in header[number_at..].iter_mut().zip(&mask[1..]) {
            *byte ^= mask;
            truncated = truncated << 8 | u64::from(*byte);
        }
        let number = packet_number(largest, truncated, 8 * number_bytes as u32);
        let mut nonce = self.iv;
        nonce[4..].iter_mut().zip(number.to_be_bytes()).for_each(|(byte, number)| *byte ^= number);
        let mut body = bytes.get(body_at..end)?.to_vec();
        let nonce = Nonce::assume_unique_for_key(nonce);
        let length = self.packet.open_in_place(nonce, Aad::from(&header), &mut body).ok()?.len();
        body.truncate(length);
        Some((number, body))
    }
}

/// HKDF-Expand-Label without context (RFC 8446, section 7.1).
fn expand<const N: usize>(secret: &Prk, label: &[u8]) -> Option<[u8; N]> {
    struct Length(usize);
    impl KeyType for Length {
        fn len(&self) -> usize {
            self.0
        }
    }
    let lengths = [0, u8::try_from(N).ok()?, u8::try_from(6 + label.len()).ok()?];
    let info = [&lengths[..], b"tls13 ", label, &[0]];
    let mut bytes = [0; N];
    secret.expand(&info, Length(N)).ok()?.fill(&mut bytes).ok()?;
    Some(bytes)
}

/// RFC 9000, appendix A.3.
fn packet_number(largest: Option<u64>, truncated: u64, bits: u32) -> u64 {
    let Some(largest) = largest else { return truncated };
    let (expected, window) = (largest + 1, 1 << bits);
    let candidate = expected & !(window - 1) | truncated;
    if candidate + window / 2 <= expected && candidate < (1 << 62) - window {
        candidate + window
    } else if candidate > expected + window / 2 && candidate >= window {
        candidate - window
    } else {
        candidate
    }
}

/// A packet with a long header of a known version (RFC 9000, section 17.2).
struct Packet<'a> {
    version: u32,
    is_initial: bool,
    /// Whom it is for.
    id: &'a [u8],
    /// From its first byte on, and what lies behind it.
    bytes: &'a [u8],
    /// Where its number is; in Initial packets only.
    number_at: usize,
    /// Where it ends.
    end: usize,
}

/// The packet at the beginning of a datagram. The fixed bit says nothing: it may be cleared (RFC 9287).
fn long_header(datagram: &[u8]) -> Option<Packet<'_>> {
    let mut rest = Bytes(datagram);
    let first = rest.take(1)?[0];
    let version = u32::from_be_bytes(rest.take(4)?.try_into().ok()?);
    if first & 0x80 == 0 || suites(version).is_empty() {
        return None;
    }
    let is_v2 = suites(version)[0].is_v2;
    let kind = (first >> 4 & 3).wrapping_sub(u8::from(is_v2)) & 3;
    let length = rest.take(1)?[0];
    let id = rest.take(length.into()).filter(|id| id.len() <= MOST_ID)?;
    let length = rest.take(1)?[0];
    rest.take(length.into()).filter(|id| id.len() <= MOST_ID)?;
    // Initial, 0-RTT, Handshake, Retry; the last has neither length nor number and is nothing of a client.
    if kind == 3 {
        return None;
    }
    if kind == 0 {
        let token = rest.number()?;
        rest.take(usize::try_from(token).ok()?)?;
    }
    let length = usize::try_from(rest.number()?).ok()?;
    let number_at = datagram.len() - rest.0.len();
    rest.take(length)?;
    let end = datagram.len() - rest.0.len();
    Some(Packet { version, is_initial: kind == 0, id, bytes: datagram, number_at, end })
}

/// Bytes from the front to the end.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(bytes)
    }

    /// RFC 9000, section 16.
    fn number(&mut self) -> Option<u64> {
        let first = *self.0.first()?;
        let bytes = self.take(1 << (first >> 6))?;
        Some(bytes[1..].iter().fold(u64::from(first & 0x3f), |number, byte| number << 8 | u64::from(*byte)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::gquic::tests::chlo;

    /// An Initial packet with these frames.
    fn sealed(version: u32, suite: &Suite, frames: &[u8]) -> Vec<u8> {
        let id = b"\x01\x02\x03\x04\x05\x06\x07\x08";
        let keys = Keys::of_client(suite, id).unwrap();
        let first = if suite.is_v2 { 0xd3 } else { 0xc3 };
        let length = (frames.len() + 4 + 16) as u16 | 0x4000;
        let front = [&[first], &version.to_be_bytes()[..], &[8], id, &[0, 0], &length.to_be_bytes()].concat();
        let mut header = [&front[..], &[0, 0, 0, 9]].concat();
        let mut nonce = keys.iv;
        nonce[11] ^= 9;
        let mut payload = frames.to_vec();
        let nonce = Nonce::assume_unique_for_key(nonce);
        keys.packet.seal_in_place_append_tag(nonce, Aad::from(&header), &mut payload).unwrap();
        let mask = keys.header.new_mask(&payload[..16]).unwrap();
        header[0] ^= mask[0] & 0x0f;
        header[front.len()..].iter_mut().zip(&mask[1..]).for_each(|(byte, mask)| *byte ^= mask);
        [header, payload].concat()
    }

    #[test]
    fn every_version_in_use_is_opened_with_its_own_keys() {
        let extensions = b"\0\0\0\x10\0\x0e\0\0\x0bexample.org";
        let body =
            [b"\x03\x03", &[7; 32][..], b"\0\0\x02\x13\x01\x01\0\0", &[extensions.len() as u8], extensions]
                .concat();
        let hello = [&[1, 0, 0, body.len() as u8][..], &body].concat();
        let frame = |kind: u8, message: &[u8]| {
            [&[kind, 0], &(message.len() as u16 | 0x4000).to_be_bytes()[..], message, &[0; 30]].concat()
        };
        for (version, suite) in [
            (1, V1),
            (0x6b33_43cf, V2),
            (0x709a_50c4, V2_DRAFT),
            (0xff00_0016, DRAFT_22),
            (0xff00_0017, DRAFT_23),
            (0xff00_001c, DRAFT_23),
            (0xff00_001d, DRAFT_29),
            (0xff00_0020, DRAFT_29),
            (0xff00_0021, V1),
            (0xface_b001, DRAFT_22),
            (0xface_b002, DRAFT_23),
            (0xface_b00e, DRAFT_29),
            (0x1a2a_3a4a, V1),
            (0x5430_3530, T050),
            (0x5430_3531, T051),
            (0x5130_3530, Q050),
        ] {
            let frames = match suite {
                Q050 => frame(8, &chlo("example.org")),
                _ => frame(if suite.is_google { 8 } else { 6 }, &hello),
            };
            let packet = sealed(version, &suite, &frames);
            assert!(is_quic(&packet));
            let Read::Done(hello) = Quic::default().datagram(&packet) else { panic!("{version:08x}") };
            assert_eq!(hello.name, Some("example.org".into()), "{version:08x}");
            let other = if suite == DRAFT_23 { DRAFT_22 } else { DRAFT_23 };
            if suites(version).len() == 1 {
                let packet = sealed(version, &Suite { is_v2: suite.is_v2, ..other }, &frames);
                assert_eq!(Quic::default().datagram(&packet).name(), None, "{version:08x}");
            }
        }
        assert!(!is_quic(&sealed(0x0000_0002, &V1, &frame(6, &hello))), "an unknown version");
    }

    impl Read<Hello> {
        fn name(self) -> Option<netmon_common::raw::Raw> {
            match self {
                Self::Done(hello) | Self::More(Some(hello)) => hello.name,
                _ => None,
            }
        }
    }

    #[test]
    fn packet_numbers_are_completed_as_the_rfc_has_it() {
        // RFC 9000, appendix A.3.
        assert_eq!(packet_number(Some(0xa82f_30ea), 0x9b32, 16), 0xa82f_9b32);
        assert_eq!(packet_number(None, 7, 8), 7);
        assert_eq!(packet_number(Some(254), 0, 8), 256);
        assert_eq!(packet_number(Some(256), 0xff, 8), 255);
        assert_eq!(packet_number(Some(u64::from(u32::MAX)), 0, 32), 1 << 32);
    }
}
