//! Server names in TLS client hellos, over TCP and over DTLS, of SSL 3.0 to TLS 1.3.
//!
//! Encrypted client hellos (RFC 9849, once draft-ietf-tls-esni): the hello that can be read is the outer one, its server name is
//! the front's. Browsers send the extension to every site, filled with random bytes ("GREASE", section 6.2), so that nobody on
//! the way can tell one from the other; neither can we. So its presence alone makes no name a front; [`Hello::has_ech`] says
//! that it could be one, and it is one where the name is known for this use (see `Fronts`).

use netmon_common::raw::Raw;

use super::Read;
use super::host::host;
use super::stream::Stream;

/// What a client hello says that tells whom it is for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// Server name (RFC 6066, section 3), if it is a name of a host.
    pub name: Option<Raw>,
    /// The first protocol that the client would speak (RFC 7301).
    pub alpn: Option<Raw>,
    /// It has an encrypted client hello, or something that looks like one.
    pub has_ech: bool,
}

/// Content type of handshake records (RFC 8446, section 5.1).
const HANDSHAKE: u8 = 22;
/// Longest fragment of a record that anybody sends: TLSCiphertext of RFC 5246, section 6.2.3.
const MOST_FRAGMENT: usize = (16 << 10) + 2048;
const CLIENT_HELLO: u8 = 1;
const SERVER_NAME: u16 = 0;
const ALPN: u16 = 16;
/// RFC 9849, section 11.1.
const ENCRYPTED_CLIENT_HELLO: u16 = 0xfe0d;

/// True for the first bytes, six at least, of a record with a client hello, or of a hello in the shape of SSL 2.0.
pub(super) fn is_hello(bytes: &[u8]) -> bool {
    match bytes {
        [HANDSHAKE, 3, 0..=4, high, low, rest @ ..] if rest.first() == Some(&CLIENT_HELLO) => {
            let record = usize::from(u16::from_be_bytes([*high, *low]));
            let is_version = |version: Option<&u8>| version.is_none_or(|version| *version == 3);
            // Version, random, and the lengths of what may be empty are the least that a hello can be. It may be cut into
            // records of a byte each.
            (1..=MOST_FRAGMENT).contains(&record)
                && match &rest[1..record.min(rest.len())] {
                    [high, middle, low, rest @ ..] => {
                        *high == 0 && u16::from_be_bytes([*middle, *low]) >= 38 && is_version(rest.first())
                    }
                    _ => true,
                }
        }
        _ => is_ssl2(bytes),
    }
}

/// True while what there is could become a hello.
pub(super) fn may_be_hello(bytes: &[u8]) -> bool {
    matches!(bytes, [HANDSHAKE] | [HANDSHAKE, 3] | [HANDSHAKE, 3, 0..=4] | [HANDSHAKE, 3, 0..=4, _])
        || matches!(bytes, [HANDSHAKE, 3, 0..=4, _, _])
}

/// RFC 5246, appendix E.2: length with the highest bit set, client hello, version, lengths of ciphers (three bytes each), of
/// the session and of the challenge.
fn is_ssl2(bytes: &[u8]) -> bool {
    match bytes {
        [
            high,
            low,
            CLIENT_HELLO,
            3,
            0..=4,
            cipher_high,
            cipher_low,
            0,
            0 | 16,
            0,
            challenge @ 16..=32,
            ..,
        ] => {
            let ciphers = usize::from(u16::from_be_bytes([*cipher_high, *cipher_low]));
            let session = usize::from(bytes[8]);
            let length = usize::from(u16::from_be_bytes([high & 0x7f, *low]));
            high & 0x80 != 0
                && ciphers.is_multiple_of(3)
                && length == 9 + ciphers + session + usize::from(*challenge)
        }
        _ => false,
    }
}

/// A hello in records, of which there is the beginning.
pub(super) fn in_records(mut bytes: &[u8]) -> Read<Hello> {
    if is_ssl2(bytes) {
        // It has no room for extensions.
        return Read::Done(Hello::default());
    }
    let mut message = Vec::new();
    loop {
        match bytes {
            [HANDSHAKE, 3, _, high, low, rest @ ..] => {
                let length = usize::from(u16::from_be_bytes([*high, *low]));
                if length == 0 || length > MOST_FRAGMENT {
                    return Read::Not;
                }
                let (fragment, rest) = rest.split_at(length.min(rest.len()));
                message.extend_from_slice(fragment);
                let read = in_message(&message);
                if !matches!(read, Read::More(_)) || rest.is_empty() {
                    return read;
                }
                bytes = rest;
            }
            [] | [HANDSHAKE] | [HANDSHAKE, 3] | [HANDSHAKE, 3, _] | [HANDSHAKE, 3, _, _] => {
                return in_message(&message);
            }
            _ => return Read::Not,
        }
    }
}

/// A hello as a handshake message (RFC 8446, section 4), of which there is the beginning.
pub(super) fn in_message(bytes: &[u8]) -> Read<Hello> {
    let mut hello = Hello::default();
    match message(bytes, &mut hello) {
        Ok(()) => Read::Done(hello),
        Err(Short::Missing) => Read::More(hello.name.is_some().then_some(hello)),
        Err(Short::Malformed) => Read::Not,
    }
}

fn message(bytes: &[u8], hello: &mut Hello) -> Result<(), Short> {
    let mut header = Cursor { bytes, length: 4 };
    let kind = header.take(1)?[0];
    if kind != CLIENT_HELLO {
        return Err(Short::Malformed);
    }
    let length = header.take(3)?;
    let length = usize::from(length[0]) << 16 | usize::from(length[1]) << 8 | usize::from(length[2]);
    body(Cursor { bytes: &bytes[4..], length }, hello, false)
}

/// `is_dtls`: a cookie follows the session (RFC 6347, section 4.2.1).
fn body(mut rest: Cursor<'_>, hello: &mut Hello, is_dtls: bool) -> Result<(), Short> {
    let version = rest.take(2)?[0];
    if version != if is_dtls { 0xfe } else { 3 } {
        return Err(Short::Malformed);
    }
    rest.take(32)?; // Random.
    rest.short_vector()?; // Session.
    if is_dtls {
        rest.short_vector()?; // Cookie.
    }
    rest.vector()?; // Cipher suites.
    rest.short_vector()?; // Compression methods.
    if rest.length == 0 {
        return Ok(()); // No extensions, as before TLS 1.2.
    }
    let length = rest.u16()?.into();
    if length > rest.length {
        return Err(Short::Malformed);
    }
    let mut extensions = Cursor { bytes: rest.bytes, length };
    let mut has_server_name = false;
    while extensions.length > 0 {
        let kind = extensions.u16()?;
        match kind {
            SERVER_NAME if !has_server_name => {
                has_server_name = true;
                let value = extensions.vector()?;
                hello.name = server_name(value);
            }
            ALPN => {
                let value = extensions.vector()?;
                hello.alpn = first_protocol(value);
            }
            ENCRYPTED_CLIENT_HELLO => {
                hello.has_ech = true;
                extensions.vector()?;
            }
            _ => {
                extensions.vector()?;
            }
        }
    }
    Ok(())
}

/// The first name of a host in the list.
fn server_name(value: &[u8]) -> Option<Raw> {
    let mut value = Cursor { bytes: value, length: value.len() };
    let list = value.vector().ok()?;
    let mut list = Cursor { bytes: list, length: list.len() };
    loop {
        let kind = list.take(1).ok()?[0];
        let name = list.vector().ok()?;
        if kind == 0 {
            return host(name);
        }
    }
}

fn first_protocol(value: &[u8]) -> Option<Raw> {
    let mut value = Cursor { bytes: value, length: value.len() };
    let list = value.vector().ok()?;
    let mut list = Cursor { bytes: list, length: list.len() };
    list.short_vector().ok().map(Raw::new)
}

/// True for the first bytes of a DTLS record with a client hello (RFC 6347, section 4.1).
pub(super) fn is_dtls(datagram: &[u8]) -> bool {
    matches!(datagram, [HANDSHAKE, 0xfe, 0xff | 0xfd, 0, 0, _, _, _, _, _, _, _, _, CLIENT_HELLO, ..])
}

/// A datagram with DTLS records: fragments of a client hello go into `fragments`. A hello that was sent again, with the server's
/// cookie, is longer; it has a number of its own and begins anew.
pub(super) fn in_dtls(mut datagram: &[u8], fragments: &mut Dtls) -> Read<Hello> {
    while let [HANDSHAKE, 0xfe, _, 0, 0, _, _, _, _, _, _, high, low, rest @ ..] = datagram {
        let length = usize::from(u16::from_be_bytes([*high, *low])).min(rest.len());
        let (record, rest) = rest.split_at(length);
        datagram = rest;
        let [CLIENT_HELLO, l0, l1, l2, n0, n1, o0, o1, o2, f0, f1, f2, fragment @ ..] = record else {
            break;
        };
        let number = |high, middle, low| u32::from_be_bytes([0, high, middle, low]) as usize;
        let which = (u16::from_be_bytes([*n0, *n1]), number(*l0, *l1, *l2));
        if fragments.which != which {
            *fragments = Dtls { which, bytes: Stream::default() };
        }
        let fragment = &fragment[..fragment.len().min(number(*f0, *f1, *f2))];
        fragments.bytes.insert(number(*o0, *o1, *o2), fragment);
    }
    let mut hello = Hello::default();
    let (_, length) = fragments.which;
    match body(Cursor { bytes: fragments.bytes.beginning(), length }, &mut hello, true) {
        Ok(()) => Read::Done(hello),
        Err(Short::Missing) => Read::More(hello.name.is_some().then_some(hello)),
        Err(Short::Malformed) => Read::Not,
    }
}

/// A client hello over DTLS, of which not everything came yet.
#[derive(Clone, Debug, Default)]
pub(super) struct Dtls {
    /// Number and length of the message.
    which: (u16, usize),
    bytes: Stream,
}

impl Dtls {
    pub fn held(&self) -> usize {
        self.bytes.held()
    }
}

enum Short {
    /// There will be more of it.
    Missing,
    /// A length leads out of what it is in.
    Malformed,
}

/// Reads what is `length` bytes long, of which there are the first ones.
struct Cursor<'a> {
    bytes: &'a [u8],
    length: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Short> {
        self.length = self.length.checked_sub(count).ok_or(Short::Malformed)?;
        let (bytes, rest) = self.bytes.split_at_checked(count).ok_or(Short::Missing)?;
        self.bytes = rest;
        Ok(bytes)
    }

    fn u16(&mut self) -> Result<u16, Short> {
        let bytes = self.take(2)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn short_vector(&mut self) -> Result<&'a [u8], Short> {
        let length = self.take(1)?[0];
        self.take(length.into())
    }

    fn vector(&mut self) -> Result<&'a [u8], Short> {
        let length = self.u16()?;
        self.take(length.into())
    }
}
