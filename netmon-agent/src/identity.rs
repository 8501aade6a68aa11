//! Who this PC is to the server: its key, its certificate, and how it got them.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use netmon_common::enroll::{self, Granted, MAX_DER, Reply, Request, Token};
use netmon_common::raw::{Escaped, Raw};
use netmon_common::wire::{self, FRAME_HEADER, FrameHeader, WireError};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::renewal;
use crate::trust::AnyClock;

/// Longest that each step of an enrolment may take.
const STEP: Duration = Duration::from_secs(10);

/// An enrolled PC's identity.
pub struct Identity {
    /// The agent's number (RFC 9562 UUID).
    pub agent: [u8; 16],
    /// The seat's label at the server.
    pub seat: Raw,
    /// Event listener, `host:port`.
    pub address: String,
    /// The agent's certificate, DER.
    pub certificate: CertificateDer<'static>,
    /// The server's CA, DER: the only root.
    pub ca: CertificateDer<'static>,
    pub(crate) key_pkcs8: Vec<u8>,
}

/// Why a stored identity cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path} is damaged ({what}); enrol again with `netmon-agent enroll --replace`")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Key, certificate and CA do not make a TLS configuration.
    #[error("the identity cannot be used for TLS; enrol again with `netmon-agent enroll --replace`")]
    Tls(#[source] rustls::Error),
}

/// Why a PC was not enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrollError {
    /// There is an identity already.
    #[error(
        "this PC is enrolled already, as seat \"{}\" at {address}; to give it a new identity: `netmon-agent enroll --replace`",
        seat.escaped()
    )]
    Already {
        /// The seat.
        seat: Raw,
        /// The event listener.
        address: String,
    },
    /// The stored identity is damaged, and `--replace` was not given.
    #[error("there is an identity already, but it cannot be used")]
    Stored(#[source] IdentityError),
    /// The identity could not be stored; the server was not asked, the token is not spent.
    #[error("there is no place to store the identity (are you root?); the token is not used up")]
    Unwritable(#[source] IdentityError),
    /// The server's name has no address.
    #[error("cannot find the address of {address}")]
    Resolve {
        /// `host:port` of the token.
        address: String,
        /// What the resolver says.
        source: io::Error,
    },
    /// Nothing answers.
    #[error(
        "no answer from {address} within {} s: is netmon-server running there, and is its UDP port open?",
        STEP.as_secs()
    )]
    Unreachable {
        /// `host:port` of the token.
        address: String,
    },
    /// Somebody answers whose CA is another.
    #[error("{address} is not the server that made the token: its CA has another fingerprint")]
    Fingerprint {
        /// `host:port` of the token.
        address: String,
    },
    /// The connection could not be made or broke.
    #[error("the enrolment connection to {address} failed: {reason}")]
    Connection {
        /// `host:port` of the token.
        address: String,
        /// Why.
        reason: String,
    },
    /// The server does not speak the protocol.
    #[error("{address} does not speak netmon's enrolment protocol")]
    Protocol {
        /// `host:port` of the token.
        address: String,
        /// What is wrong.
        source: WireError,
    },
    /// The server says no.
    #[error("the server refuses: {}", reason.escaped())]
    Refused {
        /// Why, in its words.
        reason: Raw,
    },
    /// What the server granted cannot be used.
    #[error("{address} granted an identity that cannot be used: {what}")]
    Granted {
        /// `host:port` of the token.
        address: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The key cannot be made.
    #[error("cannot make a key and its signing request")]
    Key(#[source] rcgen::Error),
    /// A UDP socket cannot be opened.
    #[error("cannot open a UDP socket")]
    Socket(#[source] io::Error),
    /// TLS cannot be set up.
    #[error("cannot set up TLS")]
    Tls(#[source] rustls::Error),
    /// The identity cannot be stored.
    #[error("the server granted an identity, but it cannot be stored")]
    Store(#[source] IdentityError),
}

/// `server.json`.
#[derive(Serialize, Deserialize)]
struct Server {
    address: String,
    agent: String,
    /// Hex: a label may be any bytes.
    seat_hex: String,
    /// For people who read the file.
    seat: String,
}

const KEY: &str = "key.pem";
const CERTIFICATE: &str = "certificate.der";
const CA: &str = "ca.der";
const SERVER: &str = "server.json";
/// Holds the files; the name in its place changes in one step.
const CURRENT: &str = "current";

impl Identity {
    /// Reads the identity below `directory`; `None`: this PC was never enrolled.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn load(directory: &Path) -> Result<Option<Self>, IdentityError> {
        let directory = directory.join(CURRENT);
        match directory.symlink_metadata() {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(IdentityError::Read { path: directory, source }),
        }
        let read = |name: &str| {
            let path = directory.join(name);
            std::fs::read(&path).map_err(|source| IdentityError::Read { path, source })
        };
        let damaged = |name: &str, what: String| IdentityError::Damaged { path: directory.join(name), what };

        let server: Server =
            serde_json::from_slice(&read(SERVER)?).map_err(|error| damaged(SERVER, error.to_string()))?;
        let agent = enroll::unhex(&server.agent).ok_or_else(|| damaged(SERVER, "agent".into()))?;
        let seat = unhex_any(&server.seat_hex).ok_or_else(|| damaged(SERVER, "seat_hex".into()))?;
        let pem = String::from_utf8(read(KEY)?).map_err(|error| damaged(KEY, error.to_string()))?;
        let key = KeyPair::from_pem(&pem).map_err(|error| damaged(KEY, error.to_string()))?;
        let certificate = CertificateDer::from(read(CERTIFICATE)?);
        if !fits(&certificate, &key) {
            return Err(damaged(CERTIFICATE, "it is not the key's certificate".into()));
        }
        Ok(Some(Self {
            agent,
            seat: Raw::new(seat),
            address: server.address,
            certificate,
            ca: CertificateDer::from(read(CA)?),
            key_pkcs8: key.serialize_der(),
        }))
    }

    /// Names the identity that is stored below `directory`: another one has another name. `None`: none is there, or
    /// it cannot be seen.
    pub fn name(directory: &Path) -> Option<PathBuf> {
        std::fs::read_link(directory.join(CURRENT)).ok()
    }

    /// Is it time for a new certificate, by the server's clock (nanoseconds since 1970-01-01T00:00:00Z)?
    pub fn is_to_be_renewed(&self, server_ns: i64) -> bool {
        self.validity().is_some_and(|(from, to)| renewal::is_due(from, to, server_ns / 1_000_000_000))
    }

    /// Beginning and end of the certificate's validity, seconds since 1970-01-01T00:00:00Z.
    fn validity(&self) -> Option<(i64, i64)> {
        let (_, certificate) = x509_parser::parse_x509_certificate(&self.certificate).ok()?;
        let validity = certificate.validity();
        Some((validity.not_before.timestamp(), validity.not_after.timestamp()))
    }

    /// TLS 1.3 as this agent, accepting only servers of its CA. No 0-RTT. `server_ns`: the server's clock as it was heard
    /// last (nanoseconds since 1970-01-01T00:00:00Z); a PC whose clock was reset judges the server by that.
    ///
    /// # Errors
    /// [`IdentityError::Tls`].
    pub fn tls(&self, server_ns: Option<i64>) -> Result<rustls::ClientConfig, IdentityError> {
        let mut roots = RootCertStore::empty();
        roots.add(self.ca.clone()).map_err(IdentityError::Tls)?;
        let inner = WebPkiServerVerifier::builder_with_provider(roots.into(), provider())
            .build()
            .map_err(|error| IdentityError::Tls(rustls::Error::General(error.to_string())))?;
        let heard = server_ns.map(|ns| ns / 1_000_000_000);
        let made = self.validity().map(|(from, _)| from);
        let others = [heard, made].into_iter().flatten().filter_map(|time| u64::try_from(time).ok());
        let verifier = AnyClock { inner, others: others.collect() };
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key_pkcs8.clone()));
        let mut tls = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(IdentityError::Tls)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(vec![self.certificate.clone()], key)
            .map_err(IdentityError::Tls)?;
        tls.alpn_protocols = wire::ALPNS.iter().map(|alpn| alpn.to_vec()).collect();
        Ok(tls)
    }

    /// Stores everything in a new directory and then lets [`CURRENT`] name that one: a crash leaves the old
    /// identity or the new one.
    pub(crate) fn store(&self, key_pem: &str, directory: &Path) -> Result<(), IdentityError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| IdentityError::Write { path, source }
        };
        let mut builder = DirBuilder::new();
        builder.mode(0o700);
        // A certificate is made once: its fingerprint is a name that no other identity has.
        let name = enroll::Hex(&Sha256::digest(&self.certificate)[..8]).to_string();
        let new = directory.join(&name);
        builder.create(&new).map_err(failed(&new))?;
        let server = Server {
            address: self.address.clone(),
            agent: enroll::Hex(&self.agent).to_string(),
            seat_hex: enroll::Hex(self.seat.as_bytes()).to_string(),
            seat: self.seat.escaped().to_string(),
        };
        let server = serde_json::to_vec_pretty(&server).map_err(io::Error::from).map_err(failed(&new))?;
        let files: [(&str, &[u8]); 4] =
            [(KEY, key_pem.as_bytes()), (CERTIFICATE, &self.certificate), (CA, &self.ca), (SERVER, &server)];
        for (name, bytes) in files {
            let path = new.join(name);
            write_private(&path, bytes).map_err(failed(&path))?;
        }
        sync_directory(&new).map_err(failed(&new))?;

        let current = directory.join(CURRENT);
        let old = std::fs::read_link(&current).ok();
        let link = directory.join("current.new");
        if let Err(error) = std::fs::remove_file(&link)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(failed(&link)(error));
        }
        std::os::unix::fs::symlink(&name, &link).map_err(failed(&link))?;
        std::fs::rename(&link, &current).map_err(failed(&current))?;
        sync_directory(directory).map_err(failed(directory))?;
        if let Some(old) = old.filter(|old| old.as_os_str() != name.as_str()) {
            let old = directory.join(old);
            if let Err(error) = std::fs::remove_dir_all(&old) {
                tracing::warn!(path = %old.display(), %error, "cannot remove the replaced identity");
            }
        }
        Ok(())
    }
}

/// Makes a key, has it certified by the server that the token names, and stores the result in `directory`.
/// `replace`: also when this PC has an identity.
///
/// # Errors
/// [`EnrollError`]; nothing was stored then, and an identity that was there is still there.
pub async fn enroll(
    token: &Token,
    seat: Raw,
    hostname: Raw,
    directory: &Path,
    replace: bool,
) -> Result<Granted, EnrollError> {
    if !replace && let Some(identity) = Identity::load(directory).map_err(EnrollError::Stored)? {
        return Err(EnrollError::Already { seat: identity.seat, address: identity.address });
    }
    // Before the token is spent.
    prepare(directory).map_err(EnrollError::Unwritable)?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(EnrollError::Key)?;
    let csr = CertificateParams::default().serialize_request(&key).map_err(EnrollError::Key)?;
    let request =
        Request { token_id: token.id, secret: token.secret, csr_der: csr.der().to_vec(), hostname, seat };
    let granted = match ask(token, &request).await? {
        Reply::Granted(granted) => granted,
        Reply::Refused { reason } => return Err(EnrollError::Refused { reason }),
    };

    let unusable = |what| EnrollError::Granted { address: token.address.clone(), what };
    if granted.certificate_der.len() > MAX_DER || granted.ca_der.len() > MAX_DER {
        return Err(unusable("a certificate is too long"));
    }
    let ca = CertificateDer::from(granted.ca_der.clone());
    if spki_sha256(&ca) != Some(token.ca_spki_sha256) {
        return Err(unusable("its CA is not the token's"));
    }
    let certificate = CertificateDer::from(granted.certificate_der.clone());
    if !fits(&certificate, &key) {
        return Err(unusable("the certificate is for another key"));
    }
    // The address was read by the token's parser: there is a colon.
    let host = token.address.rsplit_once(':').map_or(token.address.as_str(), |(host, _)| host);
    let identity = Identity {
        agent: granted.agent,
        seat: granted.seat.clone(),
        address: format!("{host}:{}", granted.event_port),
        certificate,
        ca,
        key_pkcs8: key.serialize_der(),
    };
    identity.tls(None).map_err(|_| unusable("its certificates make no TLS configuration"))?;
    identity.store(&key.serialize_pem(), directory).map_err(EnrollError::Store)?;
    Ok(granted)
}

/// Makes the directory and shows that files can be written there.
fn prepare(directory: &Path) -> Result<(), IdentityError> {
    let failed = |path: &Path, source| IdentityError::Write { path: path.to_owned(), source };
    let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
    made.map_err(|source| failed(directory, source))?;
    let probe = directory.join("probe");
    let written = write_private(&probe, b"netmon").and_then(|()| std::fs::remove_file(&probe));
    written.map_err(|source| failed(&probe, source))
}

async fn ask(token: &Token, request: &Request) -> Result<Reply, EnrollError> {
    let address = || token.address.clone();
    let resolved = tokio::time::timeout(STEP, tokio::net::lookup_host(&token.address)).await;
    let addresses: Vec<SocketAddr> = match resolved {
        Ok(Ok(addresses)) => addresses.collect(),
        Ok(Err(source)) => return Err(EnrollError::Resolve { address: address(), source }),
        Err(_) => {
            return Err(EnrollError::Resolve { address: address(), source: io::ErrorKind::TimedOut.into() });
        }
    };
    let verifier = Arc::new(PinnedCa {
        spki_sha256: token.ca_spki_sha256,
        provider: provider(),
        saw_another_ca: AtomicBool::new(false),
    });
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(EnrollError::Tls)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::clone(&verifier) as _)
        .with_no_client_auth();
    tls.alpn_protocols = vec![enroll::ALPN.to_vec()];
    let config = crate::uplink::quic_config(tls).map_err(EnrollError::Tls)?;

    let mut error = EnrollError::Unreachable { address: address() };
    for remote in addresses {
        match ask_at(token, remote, config.clone(), request).await {
            Ok(reply) => return Ok(reply),
            Err(_) if verifier.saw_another_ca.load(Ordering::Relaxed) => {
                return Err(EnrollError::Fingerprint { address: address() });
            }
            // Another address of the same name may be the right one; a server that answered is final.
            Err(EnrollError::Unreachable { .. }) => {}
            Err(this @ (EnrollError::Connection { .. } | EnrollError::Socket(_))) => error = this,
            Err(this) => return Err(this),
        }
    }
    Err(error)
}

async fn ask_at(
    token: &Token,
    remote: SocketAddr,
    config: quinn::ClientConfig,
    request: &Request,
) -> Result<Reply, EnrollError> {
    let address = || token.address.clone();
    let unreachable = |_| EnrollError::Unreachable { address: address() };
    // A peer that is not the server yet may have had a hand in it.
    let broken = |reason: String| EnrollError::Connection {
        address: address(),
        reason: Escaped(reason.as_bytes()).to_string(),
    };
    let protocol = |source| EnrollError::Protocol { address: address(), source };
    let endpoint = crate::uplink::client_endpoint(remote).map_err(EnrollError::Socket)?;
    let connecting = endpoint
        .connect_with(config, remote, wire::SERVER_NAME)
        .map_err(|error| broken(error.to_string()))?;
    let connection = match tokio::time::timeout(STEP, connecting).await.map_err(unreachable)? {
        Ok(connection) => connection,
        Err(quinn::ConnectionError::TimedOut) => {
            return Err(EnrollError::Unreachable { address: address() });
        }
        Err(error) => return Err(broken(error.to_string())),
    };
    let conversation = async {
        let (mut send, mut receive) =
            connection.open_bi().await.map_err(|error| broken(error.to_string()))?;
        let frame = wire::encode_frame(request).map_err(protocol)?;
        send.write_all(&frame).await.map_err(|error| broken(error.to_string()))?;
        send.finish().map_err(|error| broken(error.to_string()))?;
        let mut header = [0; FRAME_HEADER];
        receive.read_exact(&mut header).await.map_err(|error| broken(error.to_string()))?;
        let header = FrameHeader::parse(header).map_err(protocol)?;
        let mut payload = vec![0; header.length];
        receive.read_exact(&mut payload).await.map_err(|error| broken(error.to_string()))?;
        header.decode::<Reply>(&payload).map_err(protocol)
    };
    let reply = tokio::time::timeout(STEP, conversation).await.map_err(unreachable)?;
    connection.close(0_u32.into(), b"");
    // The server learns of the end at once instead of by a timeout; not worth more than a moment.
    let _ = tokio::time::timeout(Duration::from_millis(500), endpoint.wait_idle()).await;
    reply
}

/// Accepts a server whose chain leads to the CA with the token's fingerprint, which the server sends along.
#[derive(Debug)]
struct PinnedCa {
    spki_sha256: [u8; 32],
    provider: Arc<CryptoProvider>,
    /// Set when it refused a server for want of that CA: the connection's error does not tell.
    saw_another_ca: AtomicBool,
}

impl ServerCertVerifier for PinnedCa {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let is_pinned = |ca: &&CertificateDer<'_>| spki_sha256(ca) == Some(self.spki_sha256);
        let Some(ca) = intermediates.iter().find(is_pinned) else {
            self.saw_another_ca.store(true, Ordering::Relaxed);
            return Err(CertificateError::UnknownIssuer.into());
        };
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(roots.into(), Arc::clone(&self.provider))
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        // The fingerprint decides; this PC's clock may never have been set. The certificate's own time will do.
        let (_, parsed) =
            x509_parser::parse_x509_certificate(end_entity).map_err(|_| CertificateError::BadEncoding)?;
        let made = u64::try_from(parsed.validity().not_before.timestamp()).unwrap_or_default();
        let verifier = AnyClock { inner: verifier, others: vec![made] };
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("QUIC has no TLS 1.2".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// RFC 7469, section 2.4.
fn spki_sha256(certificate: &CertificateDer<'_>) -> Option<[u8; 32]> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    Some(Sha256::digest(certificate.public_key().raw).into())
}

pub(crate) fn fits(certificate: &CertificateDer<'_>, key: &KeyPair) -> bool {
    x509_parser::parse_x509_certificate(certificate).is_ok_and(|(rest, certificate)| {
        rest.is_empty() && certificate.public_key().subject_public_key.data == key.public_key_raw()
    })
}

fn unhex_any(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes().chunks(2);
    digits.map(|two| enroll::unhex::<1>(std::str::from_utf8(two).ok()?).map(|[byte]| byte)).collect()
}

fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}
