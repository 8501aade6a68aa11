//! TLS and QUIC settings of both listeners. Numbers of quinn's that are not bounded by default are bounded here.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use netmon_common::raw::Escaped;
use netmon_common::{enroll, wire};
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{ConnectionId, ConnectionIdGenerator, Endpoint, EndpointConfig, TransportConfig, VarInt};
use ring::hmac;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    ConfigBuilder, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
    WantsVerifier,
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::ca;

/// Longest handshake.
pub const HANDSHAKE_TIME: Duration = Duration::from_secs(5);
/// A peer that is silent for this long is gone: an agent that lost its cable is missed after this time.
const IDLE_TIME: Duration = Duration::from_secs(10);
/// Keeps quiet connections from ending, and finds the dead ones.
const KEEP_ALIVE: Duration = Duration::from_secs(3);
/// What a peer may send on one stream before it is read: one frame of the largest kind.
const STREAM_WINDOW: u32 = wire::MAX_FRAME as u32;
/// What a peer may send in all before it is read.
const CONNECTION_WINDOW: u32 = 2 * STREAM_WINDOW;
/// Handshakes that wait for the accept loop.
const MAX_INCOMING: usize = 1024;
/// Bytes of a connection's name in its packets.
const CID_LENGTH: usize = 8;
/// Bytes that all waiting handshakes may hold.
const INCOMING_BYTES: u64 = 16 * 1024 * 1024;
/// Kernel's receive buffer of a listener: a room full of PCs that come back at once.
const SOCKET_BUFFER: usize = 4 * 1024 * 1024;

/// Why a listener cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The port is taken.
    #[error("udp port {} ({what}) on {} is in use by another program; stop it (`ss -ulpn 'sport = :{}'` shows it) or choose another port with {option}", .address.port(), .address.ip(), .address.port())]
    InUse {
        /// Which listener.
        what: &'static str,
        /// Where.
        address: SocketAddr,
        /// How to choose another one.
        option: &'static str,
        /// Cause.
        source: std::io::Error,
    },
    /// The socket cannot be bound for another reason.
    #[error("cannot listen for {what} on udp {address}; check {option}")]
    Bind {
        /// Which listener.
        what: &'static str,
        /// Where.
        address: SocketAddr,
        /// How to choose another one.
        option: &'static str,
        /// Cause.
        source: std::io::Error,
    },
    /// TLS refuses the server's key, certificate or CA.
    #[error("the server's certificate, key or CA cannot be used")]
    Tls(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// What a listener is called and where it listens.
pub struct Listener {
    /// For messages: `events`, `enrolment`.
    pub what: &'static str,
    /// For messages: the option that chooses the address.
    pub option: &'static str,
    /// Wanted address; `None`: every address of this machine.
    pub address: Option<SocketAddr>,
    /// Port when there is no wanted address.
    pub port: u16,
}

impl Listener {
    /// Binds the socket. Without a wanted address: IPv6 and IPv4 where there is IPv6, else IPv4.
    ///
    /// # Errors
    /// [`ListenError::InUse`], [`ListenError::Bind`].
    pub fn bind(&self) -> Result<UdpSocket, ListenError> {
        let wanted = self.address.unwrap_or_else(|| (Ipv6Addr::UNSPECIFIED, self.port).into());
        let result = match bind(wanted) {
            Err(error) if self.address.is_none() && error.kind() != std::io::ErrorKind::AddrInUse => {
                bind((Ipv4Addr::UNSPECIFIED, self.port).into())
            }
            result => result,
        };
        let (what, option, address) = (self.what, self.option, wanted);
        result.map_err(|source| match source.kind() {
            std::io::ErrorKind::AddrInUse => ListenError::InUse { what, option, address, source },
            _ => ListenError::Bind { what, option, address, source },
        })
    }
}

fn bind(address: SocketAddr) -> std::io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // The kernel may give less; then bursts are resent sooner, nothing else.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    socket.bind(&address.into())?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// The event listener: only keys that the CA signed get through.
pub fn event_endpoint(
    socket: UdpSocket,
    ca: &CertificateDer<'static>,
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
) -> Result<Endpoint, ListenError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone()).map_err(tls)?;
    let verifier =
        WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone()).build().map_err(tls)?;
    let mut endpoint_config = EndpointConfig::new(Arc::new(reset_key(&key)));
    // quinn's own names show whether this process made them, and packets with others are not answered at all.
    endpoint_config.cid_generator(|| Box::new(Names(0)));
    let config = builder(provider)?
        .with_client_cert_verifier(Arc::new(AtAnyTime(verifier)))
        .with_single_cert(vec![certificate, ca.clone()], key)
        .map_err(tls)?;
    endpoint(socket, endpoint_config, config, &wire::ALPNS, transport(STREAM_WINDOW, CONNECTION_WINDOW))
}

/// The same after each start: by this key a server that was killed tells agents at once that it knows their connections no
/// more (stateless reset, RFC 9000, section 10.3). Else they would find out by their idle timeout, and be missing meanwhile.
/// No other endpoint may have it: it would give away what ends a connection here (section 21.11).
fn reset_key(key: &PrivateKeyDer<'_>) -> hmac::Key {
    let own = hmac::Key::new(hmac::HMAC_SHA256, key.secret_der());
    hmac::Key::new(hmac::HMAC_SHA256, hmac::sign(&own, b"netmon: resets of the event listener").as_ref())
}

/// Names of connections: random numbers. How many were made, for the case that there is none.
struct Names(u64);

impl ConnectionIdGenerator for Names {
    fn generate_cid(&mut self) -> ConnectionId {
        self.0 += 1;
        let mut name: [u8; CID_LENGTH] = self.0.to_le_bytes();
        // Where the system has no random number, TLS has none either.
        let _ = getrandom::fill(&mut name);
        ConnectionId::new(&name)
    }

    fn cid_len(&self) -> usize {
        CID_LENGTH
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// The enrolment listener: anybody may call, with one short request.
pub fn enrolment_endpoint(
    socket: UdpSocket,
    ca: &CertificateDer<'static>,
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
) -> Result<Endpoint, ListenError> {
    // The CA comes along: the agent recognises it by the fingerprint in its token.
    let config = builder(Arc::new(rustls::crypto::ring::default_provider()))?
        .with_no_client_auth()
        .with_single_cert(vec![certificate, ca.clone()], key)
        .map_err(tls)?;
    let window = 2 * crate::enrollment::MAX_REQUEST as u32;
    endpoint(socket, EndpointConfig::default(), config, &[enroll::ALPN], transport(window, window))
}

/// Judges a certificate by who signed it, at a time within its validity. Whether it is too old is judged behind the
/// handshake ([`crate::collector`]), with room for a PC that was off for months and for a server's clock that was wrong
/// when it was issued.
#[derive(Debug)]
struct AtAnyTime(Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for AtAnyTime {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let end = ca::not_after(end_entity).ok().and_then(|end| u64::try_from(end).ok());
        // One that does not parse is refused below.
        let within = end.map_or(now, |end| UnixTime::since_unix_epoch(Duration::from_secs(end)));
        self.0.verify_client_cert(end_entity, intermediates, within)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

fn builder(provider: Arc<CryptoProvider>) -> Result<ConfigBuilder<ServerConfig, WantsVerifier>, ListenError> {
    ServerConfig::builder_with_provider(provider).with_protocol_versions(&[&TLS13]).map_err(tls)
}

fn endpoint(
    socket: UdpSocket,
    endpoint_config: EndpointConfig,
    mut config: ServerConfig,
    alpns: &[&[u8]],
    transport: TransportConfig,
) -> Result<Endpoint, ListenError> {
    config.alpn_protocols = alpns.iter().map(|alpn| alpn.to_vec()).collect();
    // No resumption, and so no 0-RTT: every connection shows its certificate anew.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    let crypto = QuicServerConfig::try_from(config).map_err(tls)?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config
        .transport_config(Arc::new(transport))
        .max_incoming(MAX_INCOMING)
        .incoming_buffer_size_total(INCOMING_BYTES);
    Endpoint::new(endpoint_config, Some(config), socket, Arc::new(quinn::TokioRuntime)).map_err(tls)
}

fn transport(stream_window: u32, connection_window: u32) -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(1_u8.into())
        .max_concurrent_uni_streams(0_u8.into())
        .stream_receive_window(stream_window.into())
        .receive_window(connection_window.into())
        .send_window(u64::from(connection_window))
        .datagram_receive_buffer_size(None)
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_idle_timeout(Some(VarInt::from_u32(IDLE_TIME.as_millis() as u32).into()));
    transport
}

fn tls(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ListenError {
    ListenError::Tls(error.into())
}

/// Text that a peer may have had a hand in (the reason of a close, for one), for one line of the server's own log.
pub fn escaped(text: impl std::fmt::Display) -> String {
    Escaped(text.to_string().as_bytes()).to_string()
}

/// An address as people know it: IPv4 callers of an IPv6 socket appear as IPv4.
pub fn shown(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
