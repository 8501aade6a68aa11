//! Samples of real hellos and requests, cut, shuffled, repeated and hidden as networks and programs do it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use rustls::crypto::ring as provider;
use rustls::pki_types::ServerName;
use rustls::quic::{Keys, Version};
use rustls::{ClientConfig, ClientConnection, RootCertStore, Side};

use super::dns::Answers;
use super::gquic::tests::chlo;
use super::stream::MOST_BYTES;
use super::*;

const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 17));
const REMOTE: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 9));
const S: u64 = 1_000_000_000;

fn flow_to(protocol: u8, port: u16) -> FlowId {
    FlowId { local: SocketAddr::new(LOCAL, 40_000), remote: SocketAddr::new(REMOTE, port), protocol }
}

fn tcp() -> FlowId {
    flow_to(IPPROTO_TCP, 4433)
}

fn udp() -> FlowId {
    flow_to(IPPROTO_UDP, 4433)
}

fn sent(flow: FlowId, seq: u32, bytes: &[u8]) -> Sample<'_> {
    Sample { flow, sent: true, seq, at_ns: S, bytes }
}

fn received(flow: FlowId, seq: u32, bytes: &[u8]) -> Sample<'_> {
    Sample { sent: false, ..sent(flow, seq, bytes) }
}

/// The one name that was heard.
fn named(namer: &mut Namer) -> Option<(String, NameSource, bool)> {
    let heard = namer.poll_heard()?;
    assert_eq!(namer.poll_heard(), None);
    let Site { name, source, is_front, age_ms } = heard.site;
    assert_eq!(age_ms, 0);
    Some((name.escaped().to_string(), source, is_front))
}

/// What samples of one flow, sent, say together.
fn said<'a>(
    flow: FlowId,
    samples: impl IntoIterator<Item = (u32, &'a [u8])>,
) -> Option<(String, NameSource, bool)> {
    let mut namer = Namer::default();
    for (seq, bytes) in samples {
        namer.take(&sent(flow, seq, bytes));
    }
    named(&mut namer)
}

fn by(name: &str, source: NameSource) -> Option<(String, NameSource, bool)> {
    Some((name.to_owned(), source, false))
}

fn config() -> Arc<ClientConfig> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Arc::new(config)
}

/// A hello of rustls, in a record.
fn rustls_hello(name: &'static str) -> Vec<u8> {
    let mut client = ClientConnection::new(config(), ServerName::try_from(name).unwrap()).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

fn vector(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u16).to_be_bytes(), bytes].concat()
}

fn server_name(name: &str) -> (u16, Vec<u8>) {
    (0, vector(&[&[0], &vector(name.as_bytes())[..]].concat()))
}

/// A hello as a handshake message, with these extensions.
fn hello(extensions: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let extensions: Vec<u8> = extensions
        .iter()
        .flat_map(|(kind, value)| [&kind.to_be_bytes(), &vector(value)[..]].concat())
        .collect();
    let body =
        [&[3, 3], &[7; 32][..], &[32], &[8; 32], &vector(&[0x13, 1]), &[1, 0], &vector(&extensions)].concat();
    [&[1, 0], &vector(&body)[..]].concat()
}

/// As Chrome sends it: a hybrid post-quantum key share of 1,216 bytes, GREASE ECH, padding, the name behind them.
fn large_hello(name: &str, more: usize) -> Vec<u8> {
    let ech = [&[0, 0, 1, 0, 1, 42], &vector(&[5; 32])[..], &vector(&[6; 144])].concat();
    let share = vector(&[&[0x11, 0xec], &vector(&[9; 1216])[..]].concat());
    let padding = (21, vec![0; more]);
    hello(&[(0x8a8a, vec![]), (0x33, share), (0xfe0d, ech), padding, server_name(name), (0x1a1a, vec![0])])
}

/// In records with so many bytes each, the last one with the rest.
fn records(message: &[u8], size: usize) -> Vec<u8> {
    message.chunks(size).flat_map(|fragment| [&[22, 3, 1], &vector(fragment)[..]].concat()).collect()
}

#[test]
fn hellos_of_programs_in_use_are_read() {
    let hellos: [(&str, &[u8], &str); 6] = [
        ("OpenSSL 3.0", include_bytes!("hellos/openssl.bin"), "www.example.org"),
        ("OpenSSL 3.0, TLS 1.0", include_bytes!("hellos/openssl-tls10.bin"), "www.example.org"),
        ("curl 7.88", include_bytes!("hellos/curl.bin"), "www.example.org"),
        ("Python 3", include_bytes!("hellos/python.bin"), "www.example.org"),
        ("GnuTLS 3.7", include_bytes!("hellos/gnutls.bin"), "localhost"),
        ("Node.js", include_bytes!("hellos/node.bin"), "www.example.org"),
    ];
    for (program, bytes, name) in hellos {
        assert_eq!(said(tcp(), [(1, bytes)]), by(name, NameSource::Tls), "{program}");
        assert!(matches!(tls::in_records(bytes), Read::Done(_)), "{program}");
    }
    let Read::Done(hello) = tls::in_records(&rustls_hello("rustls.example")) else { panic!() };
    assert_eq!(hello.name, Some("rustls.example".into()));
    assert_eq!((hello.alpn, hello.has_ech), (Some("h2".into()), false));
}

#[test]
fn a_hello_that_is_cut_anywhere_is_read() {
    for bytes in [rustls_hello("a.example.org"), records(&large_hello("a.example.org", 0), 700)] {
        for at in 1..bytes.len() {
            let (first, second) = bytes.split_at(at);
            let expected = by("a.example.org", NameSource::Tls);
            let seq = u32::MAX - 5; // Sequence numbers wrap.
            let behind = seq.wrapping_add(at as u32);
            assert_eq!(said(tcp(), [(seq, first), (behind, second)]), expected, "{at}");
            assert_eq!(said(tcp(), [(behind, second), (seq, first)]), expected, "{at}, the other way round");
            assert_eq!(
                said(tcp(), [(seq, first), (seq, first), (behind, second)]),
                expected,
                "{at}, repeated"
            );
        }
    }
}

fn permutations(count: usize) -> Vec<Vec<usize>> {
    if count == 0 {
        return vec![vec![]];
    }
    let shorter = permutations(count - 1);
    let with = |order: &Vec<usize>, at| {
        let mut order = order.clone();
        order.insert(at, count - 1);
        order
    };
    shorter.iter().flat_map(|order| (0..count).map(move |at| with(order, at))).collect()
}

#[test]
fn segments_come_in_any_order() {
    let bytes = records(&large_hello("www.example.org", 200), 16 << 10);
    let pieces: Vec<_> = bytes.chunks(bytes.len().div_ceil(3)).collect();
    for order in permutations(pieces.len()) {
        let size = pieces[0].len() as u32;
        let samples = order.iter().map(|&piece| (77 + size * piece as u32, pieces[piece]));
        assert_eq!(said(tcp(), samples), by("www.example.org", NameSource::Tls), "{order:?}");
    }
    // In order at first, with the rest mixed: as much as it likes.
    let pieces: Vec<_> = bytes.chunks(bytes.len().div_ceil(7)).collect();
    for order in permutations(6) {
        let size = pieces[0].len() as u32;
        let order = [0].into_iter().chain(order.into_iter().map(|piece| piece + 1));
        let samples = order.map(|piece| (77 + size * piece as u32, pieces[piece]));
        assert_eq!(said(tcp(), samples), by("www.example.org", NameSource::Tls));
    }
}

#[test]
fn a_hello_of_sixteen_kibibytes_in_segments_of_a_network_is_read() {
    let bytes = records(&large_hello("www.example.org", 14_800), 16 << 10);
    assert!((16_000..16_500).contains(&bytes.len()), "{}", bytes.len());
    let samples = bytes.chunks(1448).enumerate().map(|(n, piece)| (1448 * n as u32, piece));
    assert_eq!(said(tcp(), samples), by("www.example.org", NameSource::Tls));
}

#[test]
fn records_and_segments_of_a_few_bytes_hide_nothing() {
    let message = large_hello("www.example.org", 0);
    for size in [1, 2, 3, 4, 5, 6, 7, 100] {
        let bytes = records(&message, size);
        assert_eq!(
            said(tcp(), [(9, &bytes[..])]),
            by("www.example.org", NameSource::Tls),
            "records of {size}"
        );
    }
    let bytes = rustls_hello("www.example.org");
    let samples = bytes.chunks(1).enumerate().map(|(n, piece)| (n as u32, piece));
    assert_eq!(said(tcp(), samples), by("www.example.org", NameSource::Tls));
}

#[test]
fn nothing_more_is_wanted_once_the_name_is_known() {
    let mut namer = Namer::default();
    let bytes = records(&large_hello("www.example.org", 0), 16 << 10);
    assert_eq!(namer.take(&sent(tcp(), 1, &bytes[..1000])), Want::More);
    assert_eq!(namer.take(&received(tcp(), 1, b"")), Want::More);
    assert_eq!(namer.take(&sent(tcp(), 1001, &bytes[1000..])), Want::Nothing);
    assert_eq!(namer.take(&sent(tcp(), 1 + bytes.len() as u32, b"\x14\x03\x03\0\x01\x01")), Want::Nothing);
    assert_eq!(named(&mut namer), by("www.example.org", NameSource::Tls));
    // The same ports again, later, for another connection.
    let other = rustls_hello("other.example");
    assert_eq!(namer.take(&sent(tcp(), 1 << 24, &other)), Want::Nothing);
    assert_eq!(named(&mut namer), by("other.example", NameSource::Tls));
    let counts = namer.counts();
    assert_eq!((counts.named, counts.samples, counts.nameless, counts.unfinished), (2, 5, 0, 0));
}

#[test]
fn what_a_client_says_to_this_pc_is_told_apart() {
    let mut namer = Namer::default();
    namer.take(&received(tcp(), 1, &rustls_hello("pc-17.example")));
    let heard = namer.poll_heard().unwrap();
    assert!(!heard.sent);
    assert_eq!((heard.flow, heard.site.name), (tcp(), "pc-17.example".into()));
}

#[test]
fn tls_behind_words_of_another_protocol_is_read() {
    let hello = rustls_hello("mail.example.org");
    let behind = |words: &[&[u8]]| {
        let mut namer = Namer::default();
        let mut seq = 5;
        for word in words {
            namer.take(&sent(tcp(), seq, word));
            seq += word.len() as u32;
        }
        let (first, second) = hello.split_at(100);
        namer.take(&sent(tcp(), seq, first));
        namer.take(&sent(tcp(), seq + 100, second));
        named(&mut namer)
    };
    let expected = by("mail.example.org", NameSource::Tls);
    assert_eq!(behind(&[b"EHLO pc-17\r\n", b"STARTTLS\r\n"]), expected);
    assert_eq!(behind(&[b"a CAPABILITY\r\n", b"b ID NIL\r\n", b"c NOOP\r\n", b"d STARTTLS\r\n"]), expected);
    assert_eq!(behind(&[b"\0\0\0\x08\x04\xd2\x16\x2f"]), expected); // PostgreSQL.
    assert_eq!(behind(&[b"\x05\x01\0", b"\x05\x01\0\x01\xcb\0\x71\x09\x01\xbb"]), expected); // SOCKS.
    assert_eq!(behind(&[b"CONNECT 203.0.113.9:443 HTTP/1.1\r\nHost: 203.0.113.9:443\r\n\r\n"]), expected);
    let tunnel = behind(&[b"CONNECT www.example.org:443 HTTP/1.1\r\n\r\n"]);
    assert_eq!(tunnel, by("www.example.org", NameSource::Http));
}

#[test]
fn a_flow_without_a_name_is_given_up() {
    let mut namer = Namer::default();
    let mut ask = |bytes: &[u8]| {
        let want = namer.take(&sent(tcp(), 1, bytes));
        namer.forget(&tcp());
        (want, named(&mut namer))
    };
    assert_eq!(ask(&records(&hello(&[]), 999)), (Want::Nothing, None));
    assert_eq!(ask(&records(&hello(&[server_name("192.0.2.1")]), 999)), (Want::Nothing, None));
    assert_eq!(ask(&records(&hello(&[server_name("a\nb")]), 999)), (Want::Nothing, None));
    // SSL 2.0's hello.
    let ssl2 = [&[0x80, 9 + 3 + 16, 1, 3, 1, 0, 3, 0, 0, 0, 16], &[0, 0, 5][..], &[7; 16]].concat();
    assert_eq!(ask(&ssl2), (Want::Nothing, None));
    assert_eq!(ask(b"GET / HTTP/1.0\r\n\r\n"), (Want::Nothing, None));
    assert_eq!(namer.counts().nameless, 5);
    // Both sides speak of something else.
    let mut wants = Vec::new();
    for n in 0..8 {
        wants.push(namer.take(&sent(tcp(), 100 * n, &[0x55; 100])));
        wants.push(namer.take(&received(tcp(), 100 * n, &[0x55; 100])));
    }
    assert_eq!(wants.iter().position(|want| *want == Want::Nothing), Some(15));
    assert_eq!(namer.counts().nameless, 6);
}

#[test]
fn a_request_names_its_host_also_in_pieces() {
    let request =
        b"POST /upload HTTP/1.1\r\nUser-Agent: x\r\nHost: files.example.org\r\nCookie: y\r\n\r\nbody";
    for at in 1..request.len() {
        let (first, second) = request.split_at(at);
        let samples = [(1, first), (1 + at as u32, second)];
        assert_eq!(said(tcp(), samples), by("files.example.org", NameSource::Http), "{at}");
    }
    // The rest may be large, or lost.
    assert_eq!(said(tcp(), [(1, &request[..70])]), by("files.example.org", NameSource::Http));
    assert_eq!(said(tcp(), [(1, &request[..60])]), None);
}

#[test]
fn a_front_is_called_so_only_where_its_name_is_known_as_one() {
    let ech = |name: &str| records(&large_hello(name, 0), 16 << 10);
    let known = said(tcp(), [(1, &ech("cloudflare-ech.com")[..])]);
    assert_eq!(known, Some(("cloudflare-ech.com".into(), NameSource::Tls, true)));
    // GREASE looks the same and is in every hello of a browser.
    assert_eq!(said(tcp(), [(1, &ech("www.example.org")[..])]), by("www.example.org", NameSource::Tls));
    let without = records(&hello(&[server_name("cloudflare-ech.com")]), 999);
    assert_eq!(said(tcp(), [(1, &without[..])]), by("cloudflare-ech.com", NameSource::Tls));
    // The hello comes in two parts, the name first: the end decides.
    let message = hello(&[server_name("cloudflare-ech.com"), (21, vec![0; 1500]), (0xfe0d, vec![0; 100])]);
    let bytes = records(&message, 16 << 10);
    let parts = [(1, &bytes[..1000]), (1001, &bytes[1000..])];
    assert_eq!(said(tcp(), parts), Some(("cloudflare-ech.com".into(), NameSource::Tls, true)));
    // The end is lost: nobody goes to a front for its own sake.
    let mut namer = Namer::default();
    assert_eq!(namer.take(&sent(tcp(), 1, &bytes[..1000])), Want::More);
    assert_eq!(named(&mut namer), None);
    namer.handle_timeout(S + Namer::FORGET_NS);
    assert_eq!(named(&mut namer), Some(("cloudflare-ech.com".into(), NameSource::Tls, true)));
}

// QUIC.

/// A hello of rustls for QUIC, as a handshake message.
fn quic_hello(name: &'static str) -> Vec<u8> {
    let name = ServerName::try_from(name).unwrap();
    let parameters = vec![1; 60];
    let mut client = rustls::quic::ClientConnection::new(config(), Version::V1, name, parameters).unwrap();
    let mut bytes = Vec::new();
    client.write_hs(&mut bytes);
    bytes
}

fn number(value: usize) -> Vec<u8> {
    (value as u16 | 0x4000).to_be_bytes().to_vec()
}

fn crypto(message: &[u8], from: usize, to: usize) -> Vec<u8> {
    [&[6], &number(from)[..], &number(to - from), &message[from..to]].concat()
}

/// An Initial packet, protected by rustls; frames are padded until it has 1,200 bytes.
fn initial(version: Version, key_id: &[u8], to: &[u8], packet: u32, frames: &[u8]) -> Vec<u8> {
    initial_of(version, key_id, to, packet, frames, 1200)
}

fn initial_of(
    version: Version,
    key_id: &[u8],
    to: &[u8],
    packet: u32,
    frames: &[u8],
    size: usize,
) -> Vec<u8> {
    let suite = provider::cipher_suite::TLS13_AES_128_GCM_SHA256.tls13().unwrap().quic_suite().unwrap();
    let keys: Keys = suite.keys(key_id, Side::Client, version);
    let (first, wire) = match version {
        Version::V2 => (0xd3, 0x6b33_43cf_u32),
        Version::V1Draft => (0xc3, 0xff00_001d),
        _ => (0xc3, 1),
    };
    let front = [&[first], &wire.to_be_bytes()[..], &[to.len() as u8], to, &[0, 0]].concat();
    let mut payload = frames.to_vec();
    payload.resize(payload.len().max(size - front.len() - 2 - 4 - 16), 0);
    let length = number(4 + payload.len() + 16);
    let mut header = [&front[..], &length, &packet.to_be_bytes()].concat();
    let number_at = header.len() - 4;
    let tag = keys.local.packet.encrypt_in_place(packet.into(), &header, &mut payload).unwrap();
    payload.extend(tag.as_ref());
    let (front, number) = header.split_at_mut(number_at);
    keys.local.header.encrypt_in_place(&payload[..16], &mut front[0], number).unwrap();
    [header, payload].concat()
}

const ID: &[u8] = b"\x83\x94\xc8\xf0\x3e\x51\x57\x08";

fn quic<'a>(datagrams: impl IntoIterator<Item = &'a Vec<u8>>) -> Option<(String, NameSource, bool)> {
    said(udp(), datagrams.into_iter().map(|datagram| (0, &datagram[..])))
}

fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

#[test]
fn the_packets_of_the_rfcs_are_read() {
    // RFC 9001, appendix A.2; RFC 9369, appendix A.2: the same frame in both.
    let frame = hex(concat!(
        "060040f1010000ed0303ebf8fa56f12939b9584a3896472ec40bb863cfd3e868",
        "04fe3a47f06a2b69484c00000413011302010000c000000010000e00000b6578",
        "616d706c652e636f6dff01000100000a00080006001d00170018001000070005",
        "04616c706e000500050100000000003300260024001d00209370b2c9caa47fba",
        "baf4559fedba753de171fa71f50f1ce15d43e994ec74d748002b000302030400",
        "0d0010000e0403050306030203080408050806002d00020101001c0002400100",
        "3900320408ffffffffffffffff05048000ffff07048000ffff08011001048000",
        "75300901100f088394c8f03e51570806048000ffff",
    ));
    for (version, begins, ends) in [
        (
            Version::V1,
            "c000000001088394c8f03e5157080000449e7b9aec34d1b1c98dd7689fb8ec11",
            "e221af44860018ab0856972e194cd934",
        ),
        (
            Version::V2,
            "d76b3343cf088394c8f03e5157080000449ea0c95e82ffe67b6abcdb4298b485",
            "a18b2faa745b6fe189cf772a9f84cbfc",
        ),
    ] {
        let packet = initial(version, ID, ID, 2, &frame);
        assert_eq!(packet.len(), 1200);
        // With the tag at its end the same, it is the packet of the RFC in every bit.
        assert!(packet.starts_with(&hex(begins)) && packet.ends_with(&hex(ends)), "{version:?}");
        assert_eq!(quic([&packet]), by("example.com", NameSource::Quic), "{version:?}");
        for bit in (0..packet.len()).step_by(37) {
            let mut damaged = packet.clone();
            damaged[bit] ^= 1;
            assert_eq!(quic([&damaged]), None, "{version:?}, byte {bit}");
        }
    }
}

#[test]
fn a_hello_in_each_version_is_read_on_any_port() {
    let message = quic_hello("quic.example.org");
    for version in [Version::V1, Version::V1Draft, Version::V2] {
        let packet = initial(version, ID, ID, 0, &crypto(&message, 0, message.len()));
        assert_eq!(quic([&packet]), by("quic.example.org", NameSource::Quic), "{version:?}");
    }
}

#[test]
fn crypto_frames_as_chrome_mixes_them_are_put_in_order() {
    let mut random = fastrand::Rng::with_seed(11);
    let message = large_hello("www.example.org", 0);
    for _ in 0..200 {
        // Cut anywhere, shuffled, some of it twice, with pings and padding between.
        let mut cuts: Vec<_> = (0..random.usize(1..30)).map(|_| random.usize(1..message.len())).collect();
        cuts.extend([0, message.len()]);
        cuts.sort_unstable();
        cuts.dedup();
        let mut pieces: Vec<_> = cuts.windows(2).map(|pair| (pair[0], pair[1])).collect();
        random.shuffle(&mut pieces);
        let again = pieces[0];
        pieces.push(again);
        let mut datagrams = vec![Vec::new()];
        for (from, to) in pieces {
            for at in (from..to).step_by(1000) {
                let frame = crypto(&message, at, to.min(at + 1000));
                let between = random.choice([&[][..], &[1], &[0, 0, 0], &[1, 0, 1]]).unwrap();
                if datagrams.last().unwrap().len() + frame.len() + between.len() > 1100 {
                    datagrams.push(Vec::new());
                }
                datagrams.last_mut().unwrap().extend([&frame, between].concat());
            }
        }
        let mut packets: Vec<_> =
            (0..).zip(&datagrams).map(|(n, frames)| initial(Version::V1, ID, ID, n, frames)).collect();
        random.shuffle(&mut packets);
        assert_eq!(quic(&packets), by("www.example.org", NameSource::Quic));
    }
}

#[test]
fn packets_are_found_wherever_they_lie_in_a_datagram() {
    let message = quic_hello("quic.example.org");
    let half = message.len() / 2;
    let first = initial_of(Version::V1, ID, ID, 0, &crypto(&message, 0, half), 600);
    let second = initial_of(Version::V1, ID, ID, 1, &crypto(&message, half, message.len()), 600);
    let early = [&[0xd0, 0, 0, 0, 1, 8], ID, &[0], &number(100), &[0x55; 100]].concat();
    let expected = by("quic.example.org", NameSource::Quic);
    assert_eq!(quic([&[&first[..], &second].concat()]), expected);
    assert_eq!(quic([&[&first[..], &early, &second].concat()]), expected);
    assert_eq!(quic([&[&first[..], &[0; 300], &second, &[0; 40]].concat()]), expected);
    // The 0-RTT packet overtook the other ones.
    assert_eq!(quic([&early, &second, &first]), expected);
}

#[test]
fn a_client_that_goes_on_to_the_server_s_id_or_begins_anew_is_understood() {
    let message = large_hello("www.example.org", 0);
    let half = 1000;
    let first = initial(Version::V1, ID, ID, 0, &crypto(&message, 0, half));
    let expected = by("www.example.org", NameSource::Quic);
    // It has got the server's id; the keys stay (RFC 9001, section 5.2).
    let to_server = initial(Version::V1, ID, b"server", 1, &crypto(&message, half, message.len()));
    assert_eq!(quic([&first, &to_server]), expected);
    // It has got a Retry: new keys, and all again.
    let retried = initial(Version::V1, b"retry", b"retry", 1, &crypto(&message, 0, half));
    let rest = initial(Version::V1, b"retry", b"retry", 2, &crypto(&message, half, message.len()));
    assert_eq!(quic([&first, &retried, &rest]), expected);
    // The second half belongs to another hello: it makes none with the first.
    assert_eq!(quic([&first, &rest]), None);
    // It was told to go on in version 2 (RFC 9368).
    let in_v2 = initial(Version::V2, ID, b"server", 1, &crypto(&message, half, message.len()));
    assert_eq!(quic([&first, &in_v2]), expected);
    // It had an acknowledgement to send first.
    let acknowledging = [&[2, 0, 0, 0, 0][..], &crypto(&message, half, message.len())].concat();
    assert_eq!(quic([&first, &initial(Version::V1, ID, b"server", 1, &acknowledging)]), expected);
}

#[test]
fn what_the_server_or_somebody_else_says_is_no_hello() {
    let message = quic_hello("quic.example.org");
    let packet = initial(Version::V1, ID, ID, 0, &crypto(&message, 0, message.len()));
    let mut namer = Namer::default();
    for length in 0..packet.len() {
        assert_eq!(namer.take(&sent(udp(), 0, &packet[..length])), Want::More);
        namer.forget(&udp());
    }
    // Every datagram of a media stream has the highest bit set.
    for n in 0..8 {
        let rtp = [&[0x80, 96, 0, n][..], &[0x33; 160]].concat();
        assert_eq!(namer.take(&sent(udp(), 0, &rtp)), Want::More);
    }
    for n in 0..8 {
        let want = namer.take(&received(udp(), 0, &[0x40 | n; 50]));
        assert_eq!(want == Want::Nothing, n == 7);
    }
    assert_eq!(named(&mut namer), None);
    assert_eq!(namer.counts().nameless, 1);
}

#[test]
fn google_s_quic_of_before_is_read_in_the_clear() {
    let hello = chlo("www.example.org");
    let q043 = [&[0x09], ID, b"Q043", &[1], &[0x22; 12], b"\xa0\x01\x04\x00", &hello].concat();
    assert_eq!(quic([&q043]), by("www.example.org", NameSource::Quic));
}

// DTLS.

#[test]
fn a_datagram_hello_is_read_whole_and_in_fragments() {
    let with_cookie = hello(&[server_name("vpn.example.org")]);
    let body =
        [&[0xfe, 0xfd], &with_cookie[6..4 + 2 + 32 + 33], &[0], &with_cookie[4 + 2 + 32 + 33..]].concat();
    let length = body.len();
    let fragment = |from: usize, to: usize| {
        let message = [
            &[1, 0],
            &(length as u16).to_be_bytes()[..],
            &[0, 0, 0],
            &(from as u16).to_be_bytes(),
            &[0],
            &vector(&body[from..to]),
        ];
        [&[22, 0xfe, 0xff, 0, 0, 0, 0, 0, 0, 0, from as u8][..], &vector(&message.concat())].concat()
    };
    let expected = by("vpn.example.org", NameSource::Tls);
    assert_eq!(quic([&fragment(0, length)]), expected);
    assert_eq!(quic([&fragment(60, length), &fragment(0, 60)]), expected);
    assert_eq!(quic([&[fragment(0, 60), fragment(60, length)].concat()]), expected);
    assert_eq!(quic([&fragment(0, 60)]), None);
}

// Bounds.

#[test]
fn what_is_half_read_is_bounded_and_counted() {
    let mut namer = Namer::default();
    let bytes = records(&large_hello("www.example.org", 14_000), 16 << 10);
    let half = &bytes[..15_000];
    let flow = |n: u16| FlowId { local: SocketAddr::new(LOCAL, n), ..tcp() };
    for n in 0..2_000 {
        namer.take(&sent(flow(n), 0, half));
        let (flows, held) = namer.holds();
        assert!(flows <= Namer::MOST_FLOWS && held <= Namer::MOST_HELD, "{flows} flows hold {held}");
    }
    let gone = namer.counts().unfinished;
    assert!((1_000..1_600).contains(&gone), "{gone}");
    // The youngest ones are still there.
    assert_eq!(namer.take(&sent(flow(1_999), 15_000, &bytes[15_000..])), Want::Nothing);
    for n in 10_000..20_000 {
        namer.take(&sent(flow(n), 0, b"\x16\x03"));
    }
    assert_eq!(namer.holds().0, Namer::MOST_FLOWS);
    namer.handle_timeout(S + Namer::FORGET_NS);
    assert_eq!(namer.holds(), (0, 0));
    let Counts { samples, named, nameless, unfinished, .. } = namer.counts();
    assert_eq!((samples, named, nameless, unfinished), (12_001, 1, 0, 11_999));
}

#[test]
fn quic_flows_that_begin_again_and_again_are_bounded() {
    let mut namer = Namer::default();
    let message = large_hello("www.example.org", 0);
    for n in 0..1_500u16 {
        let flow = FlowId { local: SocketAddr::new(LOCAL, n / 30), ..udp() };
        let id = [&[7; 6][..], &n.to_be_bytes()].concat();
        // The end first, as far out as it goes.
        let far = [&[6], &number(MOST_BYTES / 2)[..], &number(600), &message[..600]].concat();
        namer.take(&sent(flow, 0, &initial(Version::V1, &id, &id, 0, &far)));
        let (flows, held) = namer.holds();
        // Four connections each: a stream of at most twice that, and keys.
        assert!(held <= flows * 4 * (MOST_BYTES + 4_096), "{flows} flows hold {held}");
    }
    assert_eq!(namer.holds().0, 50);
    assert!(namer.holds().1 > 50 * 4 * MOST_BYTES / 2);
}

#[test]
fn samples_at_the_edges_of_everything_are_survived() {
    let mut namer = Namer::default();
    for seq in
        [0, 1, u32::MAX, 1 << 31, (1 << 31) - 1, MOST_BYTES as u32, 0u32.wrapping_sub(MOST_BYTES as u32)]
    {
        for bytes in [&b""[..], b"\x16", b"\x16\x03\x01", &[0x16; 70_000], b"G", b"\x80", b"\xc0"] {
            for flow in [tcp(), udp(), flow_to(IPPROTO_TCP, 53), flow_to(IPPROTO_UDP, 53), flow_to(1, 0)] {
                namer.take(&sent(flow, seq, bytes));
                namer.take(&received(flow, seq, bytes));
            }
        }
    }
    assert_eq!(named(&mut namer), None);
}

// DNS.

mod dns_messages {
    use std::str::FromStr;

    use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
    use hickory_proto::rr::rdata::svcb::{EchConfigList, IpHint, SVCB, SvcParamKey, SvcParamValue};
    use hickory_proto::rr::rdata::{A, AAAA, CNAME, HTTPS};
    use hickory_proto::rr::{Name, RData, Record, RecordType};

    use super::*;

    fn name(text: &str) -> Name {
        Name::from_str(text).unwrap()
    }

    fn question(id: u16, text: &str) -> Message {
        let mut message = Message::new(id, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(name(text), RecordType::A));
        message
    }

    fn answer(id: u16, text: &str, records: impl IntoIterator<Item = Record>) -> Message {
        let mut message = Message::new(id, MessageType::Response, OpCode::Query);
        message.add_query(Query::query(name(text), RecordType::A));
        message.add_answers(records);
        message
    }

    fn a(owner: &str, last: u8, ttl: u32) -> Record {
        Record::from_rdata(name(owner), ttl, RData::A(A::new(203, 0, 113, last)))
    }

    fn cname(owner: &str, alias: &str) -> Record {
        Record::from_rdata(name(owner), 300, RData::CNAME(CNAME(name(alias))))
    }

    fn resolver() -> FlowId {
        flow_to(IPPROTO_UDP, 53)
    }

    fn host_at(last: u8) -> IpAddr {
        IpAddr::from([203, 0, 113, last])
    }

    fn ask(namer: &mut Namer, at_ns: u64, question: &Message, answer: &Message) {
        let (question, answer) = (question.to_vec().unwrap(), answer.to_vec().unwrap());
        assert_eq!(namer.take(&Sample { at_ns, ..sent(resolver(), 0, &question) }), Want::More);
        assert_eq!(namer.take(&Sample { at_ns: at_ns + 1, ..received(resolver(), 0, &answer) }), Want::More);
    }

    fn name_of(namer: &Namer, last: u8, at_ns: u64) -> Option<String> {
        let site = namer.answer(host_at(last), at_ns)?;
        assert_eq!((site.source, site.is_front), (NameSource::Dns, false));
        Some(site.name.escaped().to_string())
    }

    #[test]
    fn an_address_has_the_name_that_was_asked_for_behind_any_aliases() {
        let mut namer = Namer::default();
        let records = [
            a("c.cdn.example", 3, 60),
            cname("b.cdn.example", "c.cdn.example"),
            a("c.cdn.example", 4, 60),
            cname("www.example.org", "B.cdn.example"),
            a("stranger.example", 5, 60),
        ];
        ask(&mut namer, S, &question(7, "WWW.example.org"), &answer(7, "wWw.example.org", records));
        assert_eq!(name_of(&namer, 3, 2 * S).as_deref(), Some("www.example.org"));
        assert_eq!(name_of(&namer, 4, 2 * S).as_deref(), Some("www.example.org"));
        assert_eq!(name_of(&namer, 5, 2 * S), None);
        assert_eq!(namer.answer(host_at(3), 2 * S + 1).unwrap().age_ms, 1000);
        assert_eq!(name_of(&namer, 3, S), None, "a flow from before it was heard");
    }

    #[test]
    fn services_have_addresses_and_fronts() {
        let mut namer = Namer::default();
        let ech = {
            let public = b"front.example";
            let contents = [
                &[9, 0, 0x20],
                &vector(&[1; 32])[..],
                &vector(&[0, 1, 0, 1]),
                &[0, public.len() as u8],
                public,
                &[0, 0],
            ]
            .concat();
            let config = [&[0xfe, 0x0d], &vector(&contents)[..]].concat();
            vector(&config)
        };
        let parameters = vec![
            (SvcParamKey::Ipv4Hint, SvcParamValue::Ipv4Hint(IpHint(vec![A::new(203, 0, 113, 6)]))),
            (SvcParamKey::EchConfigList, SvcParamValue::EchConfigList(EchConfigList(ech))),
            (
                SvcParamKey::Ipv6Hint,
                SvcParamValue::Ipv6Hint(IpHint(vec![AAAA("2001:db8::6".parse().unwrap())])),
            ),
        ];
        let https = RData::HTTPS(HTTPS(SVCB::new(1, name("."), parameters)));
        let record = Record::from_rdata(name("hidden.example"), 300, https);
        ask(&mut namer, S, &question(7, "hidden.example"), &answer(7, "hidden.example", [record]));
        assert_eq!(name_of(&namer, 6, 2 * S).as_deref(), Some("hidden.example"));
        assert!(namer.answer("2001:db8::6".parse().unwrap(), 2 * S).is_some());
        namer.take(&sent(tcp(), 1, &records(&large_hello("front.example", 0), 16 << 10)));
        assert_eq!(named(&mut namer), Some(("front.example".into(), NameSource::Tls, true)));
    }

    #[test]
    fn what_was_not_asked_or_is_an_error_names_nobody() {
        let mut namer = Namer::default();
        let good = answer(7, "www.example.org", [a("www.example.org", 3, 60)]);
        namer.take(&received(resolver(), 0, &good.to_vec().unwrap()));
        assert_eq!((name_of(&namer, 3, 2 * S), namer.counts().unasked), (None, 1));
        ask(&mut namer, S, &question(8, "www.example.org"), &good);
        ask(&mut namer, S, &question(7, "other.example.org"), &good);
        assert_eq!((name_of(&namer, 3, 2 * S), namer.counts().unasked), (None, 3));
        let mut refused = answer(9, "www.example.org", [a("www.example.org", 3, 60)]);
        refused.metadata.response_code = ResponseCode::Refused;
        ask(&mut namer, S, &question(9, "www.example.org"), &refused);
        assert_eq!(name_of(&namer, 3, 2 * S), None);
        // Asked too long ago.
        let question = question(7, "www.example.org").to_vec().unwrap();
        namer.take(&Sample { at_ns: 0, ..sent(resolver(), 0, &question) });
        namer.take(&Sample { at_ns: 31 * S, ..received(resolver(), 0, &good.to_vec().unwrap()) });
        assert_eq!(name_of(&namer, 3, 40 * S), None);
        // And this is how it is right.
        ask(&mut namer, S, &super::dns_messages::question(7, "www.example.org"), &good);
        assert_eq!(name_of(&namer, 3, 2 * S).as_deref(), Some("www.example.org"));
    }

    #[test]
    fn the_newest_of_several_names_counts_and_old_ones_end() {
        let mut namer = Namer::default();
        for (n, text) in (1..).zip(["a.example", "b.example", "c.example", "a.example"]) {
            ask(&mut namer, u64::from(n) * 10 * S, &question(n, text), &answer(n, text, [a(text, 3, 60)]));
        }
        let answers: &Answers = namer.answers();
        let newest = answers.name_of(host_at(3), 50 * S).unwrap();
        assert_eq!((newest.name, newest.heard_ns, newest.others), ("a.example".into(), 40 * S + 1, 2));
        assert_eq!(name_of(&namer, 3, 35 * S).as_deref(), Some("c.example"), "before it was heard again");
        let end = 40 * S + 1 + (60 + 3600) * S;
        assert_eq!(name_of(&namer, 3, end - 1).as_deref(), Some("a.example"));
        assert_eq!(name_of(&namer, 3, end), None);
    }

    #[test]
    fn messages_over_tcp_are_taken_apart_wherever_they_are_cut() {
        let flow = flow_to(IPPROTO_TCP, 53);
        let framed = |message: Message| vector(&message.to_vec().unwrap());
        let questions = [framed(question(1, "a.example")), framed(question(2, "b.example"))].concat();
        let answers = [
            framed(answer(1, "a.example", [a("a.example", 3, 60)])),
            framed(answer(2, "b.example", [a("b.example", 4, 60)])),
        ]
        .concat();
        for at in 1..answers.len() {
            let mut namer = Namer::default();
            let cut = at.min(questions.len());
            namer.take(&sent(flow, 5, &questions[..cut]));
            namer.take(&sent(flow, 5 + cut as u32, &questions[cut..]));
            namer.take(&received(flow, 9, &answers[..at]));
            namer.take(&received(flow, 9 + at as u32, &answers[at..]));
            assert_eq!(name_of(&namer, 3, 2 * S).as_deref(), Some("a.example"), "{at}");
            assert_eq!(name_of(&namer, 4, 2 * S).as_deref(), Some("b.example"), "{at}");
        }
    }

    #[test]
    fn of_a_message_that_is_cut_the_beginning_counts() {
        let records: Vec<_> = (1..=40).map(|last| a("www.example.org", last, 60)).collect();
        let bytes = answer(7, "www.example.org", records).to_vec().unwrap();
        let half = super::dns::Message::read(&bytes[..bytes.len() / 2]).unwrap();
        assert!((15..25).contains(&half.addresses.len()), "{}", half.addresses.len());
        for end in 0..bytes.len() {
            super::dns::Message::read(&bytes[..end]);
        }
    }

    #[test]
    fn aliases_in_a_circle_end() {
        let records =
            [cname("a.example", "b.example"), cname("b.example", "a.example"), a("b.example", 3, 60)];
        let bytes = answer(7, "a.example", records).to_vec().unwrap();
        let message = super::dns::Message::read(&bytes).unwrap();
        assert_eq!(message.addresses, [(host_at(3), 60)]);
    }

    #[test]
    fn a_neighbour_is_believed_for_its_own_address_only() {
        let mut namer = Namer::default();
        let mut message = Message::new(0, MessageType::Response, OpCode::Query);
        message.add_answers([a("gateway.local", 1, 120), a("Printer.local", 9, 120)]);
        let flow = FlowId {
            local: "224.0.0.251:5353".parse().unwrap(),
            remote: SocketAddr::new(REMOTE, 5353),
            protocol: IPPROTO_UDP,
        };
        assert_eq!(namer.take(&received(flow, 0, &message.to_vec().unwrap())), Want::More);
        let neighbour = namer.poll_neighbour().unwrap();
        assert_eq!((neighbour.address, neighbour.name), (REMOTE, "printer.local".into()));
        assert_eq!(namer.poll_neighbour(), None);
    }

    #[test]
    fn a_dhcp_request_names_who_sends_it() {
        use netmon_common::model::NeighbourSource;
        let mut namer = Namer::default();
        // Operation, hardware, its length; the hardware's address; magic, request, requested address, host name.
        let mut bytes = vec![0; 236];
        bytes[..3].copy_from_slice(&[1, 1, 6]);
        bytes[28..34].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
        bytes.extend(b"\x63\x82\x53\x63\x35\x01\x03\0\x32\x04\x0a\x4d\0\x09\x0c\x10Student's Laptop\xff");
        let flow = FlowId {
            local: "255.255.255.255:67".parse().unwrap(),
            remote: "0.0.0.0:68".parse().unwrap(),
            protocol: IPPROTO_UDP,
        };
        namer.take(&received(flow, 0, &bytes));
        let expected = Neighbour {
            address: "10.77.0.9".parse().unwrap(),
            mac: Some([2, 0, 0, 0, 0, 9]),
            name: "Student's Laptop".into(),
            source: NeighbourSource::Dhcp,
        };
        assert_eq!(namer.poll_neighbour(), Some(expected));
        for end in 0..bytes.len() - 1 {
            namer.take(&received(flow, 0, &bytes[..end]));
        }
        assert_eq!(namer.poll_neighbour(), None);
        // Renewing, it says the address that it has.
        bytes[12..16].copy_from_slice(&[10, 77, 0, 8]);
        bytes[244] = 0x7f;
        namer.take(&received(flow, 0, &bytes));
        assert_eq!(namer.poll_neighbour().unwrap().address, IpAddr::from([10, 77, 0, 8]));
        // An offer is the server's word.
        bytes[242] = 2;
        namer.take(&received(flow, 0, &bytes));
        assert_eq!(namer.poll_neighbour(), None);
    }
}
