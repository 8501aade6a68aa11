//! Enrolment, and delivery to a small server that speaks the version of the protocol before this one, on loopback. The
//! lab's tests have the real server.
#![expect(clippy::unwrap_used, reason = "a test may end by a panic, in its helpers too")]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use netmon_agent::clock::Now;
use netmon_agent::identity::{EnrollError, Identity, enroll};
use netmon_agent::spool::{Limits, Spool, SpoolHandle};
use netmon_agent::trust::Trust;
use netmon_agent::uplink::{self, Introduction, Sources, UplinkState, UplinkStatus};
use netmon_common::enroll::{self as enrolment, Granted, Reply, Request, Token};
use netmon_common::model::{Event, Filter, Record};
use netmon_common::raw::Raw;
use netmon_common::wire::{self, FRAME_HEADER, FrameHeader, Heartbeat, ToAgent, ToServer};
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Connection, Endpoint, RecvStream};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, PublicKeyData, date_time_ymd,
};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use sha2::{Digest, Sha256};
use tokio::sync::watch;

/// Longest that anything awaited here may take.
const SOON: Duration = Duration::from_secs(30);

/// The server's CA, and what it makes.
struct Ca {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
    }

    fn der(&self) -> CertificateDer<'static> {
        self.issuer.der().clone()
    }

    fn fingerprint(&self) -> [u8; 32] {
        Sha256::digest(self.issuer.key().subject_public_key_info()).into()
    }

    fn server_tls(&self, asks_for_certificates: bool, alpn: &[u8]) -> quinn::ServerConfig {
        self.server_tls_in(1990..2090, asks_for_certificates, alpn)
    }

    /// With a certificate that is valid in these years.
    fn server_tls_in(
        &self,
        years: Range<i32>,
        asks_for_certificates: bool,
        alpn: &[u8],
    ) -> quinn::ServerConfig {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([wire::SERVER_NAME.to_owned()]).unwrap();
        params.not_before = date_time_ymd(years.start, 1, 1);
        params.not_after = date_time_ymd(years.end, 1, 1);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap();
        let builder = if asks_for_certificates {
            let mut roots = RootCertStore::empty();
            roots.add(self.der()).unwrap();
            let verifier =
                WebPkiClientVerifier::builder_with_provider(roots.into(), provider).build().unwrap();
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let chain = vec![certificate.der().clone(), self.der()];
        let mut tls =
            builder.with_single_cert(chain, PrivateKeyDer::try_from(key.serialize_der()).unwrap()).unwrap();
        tls.alpn_protocols = vec![alpn.to_vec()];
        quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls).unwrap()))
    }

    fn certify(&self, csr_der: Vec<u8>) -> Vec<u8> {
        let mut request = CertificateSigningRequestParams::from_der(&csr_der.into()).unwrap();
        request.params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        request.signed_by(&self.issuer).unwrap().der().to_vec()
    }
}

async fn read_frame<T: serde::de::DeserializeOwned>(receive: &mut RecvStream) -> Option<T> {
    let mut header = [0; FRAME_HEADER];
    receive.read_exact(&mut header).await.ok()?;
    let header = FrameHeader::parse(header).unwrap();
    let mut payload = vec![0; header.length];
    receive.read_exact(&mut payload).await.ok()?;
    Some(header.decode(&payload).unwrap())
}

fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// Answers each request by what `answer` makes of it; gives the listener's address.
fn enrolment_server(
    ca: &Ca,
    answer: impl Fn(Request) -> Reply + Send + Sync + 'static,
) -> (Endpoint, SocketAddr) {
    let endpoint = Endpoint::server(ca.server_tls(false, enrolment::ALPN), loopback(0)).unwrap();
    let address = endpoint.local_addr().unwrap();
    let listener = endpoint.clone();
    tokio::spawn(async move {
        while let Some(incoming) = listener.accept().await {
            let Ok(connection) = incoming.await else { continue };
            let Ok((mut send, mut receive)) = connection.accept_bi().await else { continue };
            let Some(request) = read_frame::<Request>(&mut receive).await else { continue };
            send.write_all(&wire::encode_frame(&answer(request)).unwrap()).await.unwrap();
            send.finish().unwrap();
            connection.closed().await;
        }
    });
    (endpoint, address)
}

fn token(address: SocketAddr, ca_spki_sha256: [u8; 32]) -> Token {
    Token { address: address.to_string(), ca_spki_sha256, id: [1; 8], secret: [2; 32] }
}

fn grants(ca: &Arc<Ca>, event_port: u16) -> impl Fn(Request) -> Reply + Send + Sync + 'static {
    let ca = Arc::clone(ca);
    move |request| {
        assert_eq!((request.token_id, request.secret), ([1; 8], [2; 32]));
        Reply::Granted(Granted {
            agent: [7; 16],
            certificate_der: ca.certify(request.csr_der),
            ca_der: ca.der().to_vec(),
            event_port,
            seat: request.seat,
        })
    }
}

async fn enrol_at(
    address: SocketAddr,
    ca: [u8; 32],
    directory: &Path,
    replace: bool,
) -> Result<Granted, EnrollError> {
    let token = token(address, ca);
    let work = enroll(&token, "PC-17".into(), "pc17".into(), directory, replace);
    tokio::time::timeout(SOON, work).await.unwrap()
}

#[tokio::test]
async fn a_pc_is_enrolled_once_unless_it_is_replaced() {
    use std::os::unix::fs::PermissionsExt;
    let ca = Arc::new(Ca::new());
    let (_endpoint, address) = enrolment_server(&ca, grants(&ca, 7443));
    let dir = tempfile::tempdir().unwrap();
    let directory = dir.path().join("identity");
    assert!(Identity::load(&directory).unwrap().is_none());
    enrol_at(address, ca.fingerprint(), &directory, false).await.unwrap();
    let first = Identity::load(&directory).unwrap().unwrap();
    assert_eq!((first.agent, first.seat.clone()), ([7; 16], Raw::from("PC-17")));
    assert_eq!(first.address, "127.0.0.1:7443");
    let mode = directory.join("current/key.pem").metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let error = enrol_at(address, ca.fingerprint(), &directory, false).await.unwrap_err();
    assert!(error.to_string().contains("--replace"), "{error}");
    assert_eq!(Identity::load(&directory).unwrap().unwrap().certificate, first.certificate);

    enrol_at(address, ca.fingerprint(), &directory, true).await.unwrap();
    assert_ne!(Identity::load(&directory).unwrap().unwrap().certificate, first.certificate);
    let names = std::fs::read_dir(&directory).unwrap().count();
    assert_eq!(names, 2, "the new identity and the link to it");
}

#[tokio::test]
async fn a_server_with_another_ca_is_not_told_the_secret() {
    let ca = Arc::new(Ca::new());
    let (_endpoint, address) = enrolment_server(&ca, |_| panic!("it was told"));
    let dir = tempfile::tempdir().unwrap();
    let error = enrol_at(address, [0; 32], dir.path(), false).await.unwrap_err();
    assert!(matches!(error, EnrollError::Fingerprint { .. }), "{error:?}");
    assert!(error.to_string().contains("is not the server that made the token"));
    assert!(Identity::load(dir.path()).unwrap().is_none());
}

#[tokio::test]
async fn a_ca_certificate_that_did_not_sign_the_server_is_of_no_use() {
    // The impostor sends the real CA's certificate along, but its own certificate is from another one.
    let (real, impostor) = (Ca::new(), Ca::new());
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new([wire::SERVER_NAME.to_owned()]).unwrap();
    let leaf = params.signed_by(&key, &impostor.issuer).unwrap();
    let mut tls =
        rustls::ServerConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![leaf.der().clone(), real.der()],
                PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
    tls.alpn_protocols = vec![enrolment::ALPN.to_vec()];
    let config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls).unwrap()));
    let endpoint = Endpoint::server(config, loopback(0)).unwrap();
    let address = endpoint.local_addr().unwrap();
    tokio::spawn(async move { endpoint.accept().await.unwrap().await.map(drop) });
    let dir = tempfile::tempdir().unwrap();
    let error = enrol_at(address, real.fingerprint(), dir.path(), false).await.unwrap_err();
    assert!(matches!(error, EnrollError::Connection { .. }), "{error:?}");
}

#[tokio::test]
async fn a_refusal_gives_the_servers_reason() {
    let ca = Ca::new();
    let reason: Raw = "token expired at 13:42\n".into();
    let (_endpoint, address) = enrolment_server(&ca, move |_| Reply::Refused { reason: reason.clone() });
    let dir = tempfile::tempdir().unwrap();
    let error = enrol_at(address, ca.fingerprint(), dir.path(), false).await.unwrap_err();
    assert_eq!(error.to_string(), "the server refuses: token expired at 13:42\\u{a}");
}

#[tokio::test]
async fn a_certificate_for_another_key_is_not_stored() {
    let ca = Arc::new(Ca::new());
    let issuer = Arc::clone(&ca);
    let (_endpoint, address) = enrolment_server(&ca, move |request| {
        let other = KeyPair::generate().unwrap();
        let csr = CertificateParams::default().serialize_request(&other).unwrap();
        grants(&issuer, 1)(Request { csr_der: csr.der().to_vec(), ..request })
    });
    let dir = tempfile::tempdir().unwrap();
    let error = enrol_at(address, ca.fingerprint(), dir.path(), false).await.unwrap_err();
    assert!(matches!(error, EnrollError::Granted { .. }), "{error:?}");
    assert!(Identity::load(dir.path()).unwrap().is_none());
}

#[tokio::test]
async fn a_token_is_not_spent_when_the_identity_cannot_be_stored() {
    let ca = Ca::new();
    let (_endpoint, address) = enrolment_server(&ca, |_| panic!("it was asked"));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = enrol_at(address, ca.fingerprint(), &file.join("identity"), true).await.unwrap_err();
    assert!(matches!(error, EnrollError::Unwritable(_)), "{error:?}");
}

#[tokio::test]
async fn a_server_that_does_not_answer_is_named() {
    let silent = std::net::UdpSocket::bind(loopback(0)).unwrap();
    let address = silent.local_addr().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let error = enrol_at(address, [0; 32], dir.path(), false).await.unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with(&format!("no answer from {address} within 10 s")), "{text}");
}

/// What the server has committed.
#[derive(Default)]
struct Store {
    epochs: BTreeMap<u64, Vec<Record>>,
    /// All records in the order of their arrival.
    arrived: Vec<Record>,
    hellos: Vec<(u64, u64)>,
    /// What it pretends to know of an epoch at its first hello.
    pretends: Option<u64>,
}

/// The event server, which may be stopped and started while its store lives on.
struct Server {
    ca: Arc<Ca>,
    store: Arc<Mutex<Store>>,
    arrived: Arc<watch::Sender<usize>>,
    /// Batches until a connection is killed, before the ack; 0: never.
    kill_after: usize,
    /// In which its certificate is valid.
    years: Range<i32>,
}

impl Server {
    fn new(ca: Arc<Ca>) -> Self {
        let arrived = Arc::new(watch::Sender::new(0));
        Self { ca, store: Arc::default(), arrived, kill_after: 0, years: 1990..2090 }
    }

    fn start(&self, port: u16) -> Endpoint {
        let tls = self.ca.server_tls_in(self.years.clone(), true, wire::ALPN_1);
        let endpoint = Endpoint::server(tls, loopback(port)).unwrap();
        let listener = endpoint.clone();
        let (store, arrived, kill_after) =
            (Arc::clone(&self.store), Arc::clone(&self.arrived), self.kill_after);
        tokio::spawn(async move {
            while let Some(incoming) = listener.accept().await {
                let (store, arrived) = (Arc::clone(&store), Arc::clone(&arrived));
                tokio::spawn(async move {
                    if let Ok(connection) = incoming.await {
                        let _ = serve(&connection, &store, &arrived, kill_after).await;
                        connection.close(9_u32.into(), b"killed");
                    }
                });
            }
        });
        endpoint
    }

    async fn has(&self, count: usize) {
        let mut arrived = self.arrived.subscribe();
        let waited = tokio::time::timeout(SOON, arrived.wait_for(|n| *n >= count)).await;
        assert!(waited.is_ok(), "only {} of {count} arrived", *self.arrived.borrow());
    }

    fn names(&self) -> Vec<String> {
        self.store.lock().unwrap().arrived.iter().map(name).collect()
    }
}

async fn serve(
    connection: &Connection,
    store: &Mutex<Store>,
    arrived: &watch::Sender<usize>,
    kill_after: usize,
) -> Option<()> {
    let (mut send, mut receive) = connection.accept_bi().await.ok()?;
    let mut current = None;
    let mut batches = 0;
    loop {
        let message = read_frame::<ToServer>(&mut receive).await?;
        let answer = match message {
            other @ (ToServer::About(_)
            | ToServer::Open(_)
            | ToServer::Heartbeat(_)
            | ToServer::Renew { .. }) => {
                panic!("{other:?} is not of this version")
            }
            ToServer::Hello(hello) => {
                assert_eq!(hello.hostname, Raw::from("pc17"));
                let mut store = store.lock().unwrap();
                store.hellos.push((hello.epoch, hello.oldest_seq));
                let known = store.epochs.entry(hello.epoch).or_default();
                let next = known.last().map_or(1, |last| last.seq + 1).max(hello.oldest_seq);
                current = Some((hello.epoch, next));
                let next_seq = store.pretends.take().unwrap_or(next);
                ToAgent::Welcome { version: 1, next_seq }
            }
            ToServer::Batch(batch) => {
                let (epoch, next) = current.as_mut().unwrap();
                assert_eq!(batch.epoch, *epoch);
                batches += 1;
                if batch.first_seq > *next {
                    ToAgent::Resume { next_seq: *next }
                } else {
                    let mut store = store.lock().unwrap();
                    for (seq, item) in (batch.first_seq..).zip(batch.unpack().unwrap()) {
                        let wire::Item::Record(bytes) = item else { panic!("a hole") };
                        let record = Record::from_bytes(&bytes).unwrap();
                        assert_eq!(record.seq, seq);
                        if seq == *next {
                            store.epochs.get_mut(epoch).unwrap().push(record.clone());
                            store.arrived.push(record);
                            *next += 1;
                        }
                    }
                    arrived.send_replace(store.arrived.len());
                    ToAgent::Ack { epoch: *epoch, seq: *next - 1 }
                }
            }
        };
        if kill_after > 0 && batches >= kill_after {
            return None;
        }
        send.write_all(&wire::encode_frame(&answer).unwrap()).await.ok()?;
    }
}

fn event(n: usize) -> Event {
    Event::Filter(Filter::Refused { error: format!("{n}").as_str().into() })
}

fn name(record: &Record) -> String {
    match &record.event {
        Event::Filter(Filter::Refused { error }) => error.escaped().to_string(),
        other => panic!("{other:?} was never recorded"),
    }
}

fn names(range: impl Iterator<Item = usize>) -> Vec<String> {
    range.map(|n| n.to_string()).collect()
}

/// An enrolled agent's uplink and its spool.
struct Agent {
    spool: SpoolHandle,
    stop: watch::Sender<bool>,
    status: watch::Sender<UplinkStatus>,
    task: tokio::task::JoinHandle<()>,
}

impl Agent {
    /// With the identity that is or will be in `directory`.
    fn start(directory: PathBuf, spool: SpoolHandle) -> Self {
        let (stop, stopped) = watch::channel(false);
        let status = watch::Sender::new(UplinkStatus::default());
        let introduction = Introduction {
            agent_version: "0.1.0".into(),
            hostname: "pc17".into(),
            boot_id: [1; 16],
            run: 1,
            previous_died: false,
            instance: 1,
        };
        let heartbeat = watch::Sender::new(Heartbeat { boot_ns: 1, ..Heartbeat::default() });
        let sources = Sources { spool: spool.clone(), heartbeat: heartbeat.subscribe(), introduction };
        let its_status = status.clone();
        let task = tokio::spawn(async move {
            uplink::run_whenever_enrolled(&directory, sources, stopped, its_status).await;
        });
        Self { spool, stop, status, task }
    }

    async fn says(&self, text: &str) {
        let mut status = self.status.subscribe();
        let says = |status: &UplinkStatus| status.describe(&Now { boot_ns: 0, wall_ns: 0 }).contains(text);
        let waited = tokio::time::timeout(SOON, status.wait_for(says)).await.map(drop);
        assert!(waited.is_ok(), "it never said {text}: {:?}", self.status.borrow());
    }

    fn record(&self, range: impl Iterator<Item = usize>) {
        record(&self.spool, range);
    }

    async fn acked_all(&self) {
        let mut status = self.status.subscribe();
        let drained = async {
            while self.spool.stats().backlog > 0 {
                status.changed().await.unwrap();
            }
        };
        tokio::time::timeout(SOON, drained).await.unwrap();
    }

    async fn stop(self) {
        self.stop.send_replace(true);
        tokio::time::timeout(SOON, self.task).await.unwrap().unwrap();
    }
}

fn record(spool: &SpoolHandle, range: impl Iterator<Item = usize>) {
    for n in range {
        spool.append(n as u64, n as i64, event(n)).unwrap();
    }
    spool.sync().unwrap();
}

/// Enrols; gives the directory with the identity.
async fn identity(ca: &Arc<Ca>, event_port: u16, directory: &Path) -> PathBuf {
    let (_endpoint, address) = enrolment_server(ca, grants(ca, event_port));
    enrol_at(address, ca.fingerprint(), directory, true).await.unwrap();
    directory.to_owned()
}

fn spool(directory: &Path) -> SpoolHandle {
    let limits = Limits { segment_bytes: 4000, ..Limits::default() };
    SpoolHandle::new(Spool::open(&directory.join("spool"), limits).unwrap().0)
}

fn segments(directory: &Path) -> usize {
    let names = std::fs::read_dir(directory.join("spool")).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_string_lossy().ends_with(".seg")).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn records_arrive_once_and_in_order_over_restarts_of_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::new(Arc::new(Ca::new()));
    let mut endpoint = server.start(0);
    let address = endpoint.local_addr().unwrap();
    let agent = Agent::start(identity(&server.ca, address.port(), dir.path()).await, spool(dir.path()));
    let mut n = 0;
    for _ in 0..3 {
        agent.record(n + 1..=n + 700);
        server.has(n + 1).await;
        endpoint.close(0_u32.into(), b"restart");
        endpoint.wait_idle().await;
        drop(endpoint);
        agent.record(n + 701..=n + 1000);
        n += 1000;
        endpoint = start_again(&server, address.port()).await;
    }
    server.has(3000).await;
    agent.acked_all().await;
    assert_eq!(server.names(), names(1..=3000));
    assert_eq!(segments(dir.path()), 1, "acks free segments");
    let status = agent.status.borrow().clone();
    assert!(
        matches!(status.state, UplinkState::Connected { remote, local_port: 1.., .. } if remote == address)
    );
    assert_eq!(status.acked.unwrap().1, 3000);
    agent.stop().await;
}

/// The port is free only when the old endpoint's task is gone.
async fn start_again(server: &Server, port: u16) -> Endpoint {
    let free = async {
        while std::net::UdpSocket::bind(loopback(port)).is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(SOON, free).await.unwrap();
    server.start(port)
}

#[tokio::test(flavor = "multi_thread")]
async fn records_arrive_once_and_in_order_when_connections_die_before_the_ack() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server { kill_after: 2, ..Server::new(Arc::new(Ca::new())) };
    let endpoint = server.start(0);
    let port = endpoint.local_addr().unwrap().port();
    let spool = spool(dir.path());
    record(&spool, 1..=3000);
    let agent = Agent::start(identity(&server.ca, port, dir.path()).await, spool);
    server.has(3000).await;
    assert_eq!(server.names(), names(1..=3000));
    assert!(server.store.lock().unwrap().hellos.len() >= 3);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_epoch_is_delivered_before_the_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let first = spool(dir.path());
    record(&first, 1..=300);
    let old = first.stats().epoch;
    drop(first);
    // A torn end: a new epoch begins.
    let last = std::fs::read_dir(dir.path().join("spool")).unwrap().map(|entry| entry.unwrap().path());
    let last = last.filter(|path| path.extension().is_some_and(|e| e == "seg")).max().unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&last).unwrap();
    file.set_len(last.metadata().unwrap().len() - 1).unwrap();

    let second = spool(dir.path());
    assert_ne!(second.stats().epoch, old);
    record(&second, 1000..=1100);
    let server = Server::new(Arc::new(Ca::new()));
    let endpoint = server.start(0);
    let port = endpoint.local_addr().unwrap().port();
    let agent = Agent::start(identity(&server.ca, port, dir.path()).await, second.clone());
    server.has(299 + 101).await;
    assert_eq!(server.names(), names((1..=299).chain(1000..=1100)));
    let hellos = server.store.lock().unwrap().hellos.clone();
    assert_eq!(hellos, [(old, 1), (second.stats().epoch, 1)]);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_knows_more_than_the_spool_gets_a_new_epoch() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::new(Arc::new(Ca::new()));
    server.store.lock().unwrap().pretends = Some(100);
    let endpoint = server.start(0);
    let port = endpoint.local_addr().unwrap().port();
    let spool = spool(dir.path());
    record(&spool, 1..=20);
    let old = spool.stats().epoch;
    let agent = Agent::start(identity(&server.ca, port, dir.path()).await, spool);
    server.has(20).await;
    assert_eq!(server.names(), names(1..=20));
    assert_ne!(agent.spool.stats().epoch, old);
    assert!(server.store.lock().unwrap().epochs[&old].is_empty());
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn records_that_gave_way_are_announced_as_a_hole() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { bytes: 20_000, segment_bytes: 2000, ..Limits::default() };
    let spool = SpoolHandle::new(Spool::open(&dir.path().join("spool"), limits).unwrap().0);
    for n in 1..=100 {
        record(&spool, n * 100..n * 100 + 100);
    }
    let dropped = spool.stats().dropped;
    assert!(dropped > 0);
    let server = Server::new(Arc::new(Ca::new()));
    let endpoint = server.start(0);
    let port = endpoint.local_addr().unwrap().port();
    let agent = Agent::start(identity(&server.ca, port, dir.path()).await, spool);
    agent.acked_all().await;
    let hellos = server.store.lock().unwrap().hellos.clone();
    assert_eq!(hellos, [(agent.spool.stats().epoch, dropped + 1)]);
    assert_eq!(server.names(), names(100 + dropped as usize..10_100));
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_recorded_just_before_the_stop_is_delivered() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::new(Arc::new(Ca::new()));
    let endpoint = server.start(0);
    let port = endpoint.local_addr().unwrap().port();
    let agent = Agent::start(identity(&server.ca, port, dir.path()).await, spool(dir.path()));
    agent.record(1..=10);
    agent.acked_all().await;
    let spool = agent.spool.clone();
    record(&spool, 11..=600);
    agent.stop().await;
    assert_eq!(server.names(), names(1..=600));
    assert_eq!(spool.stats().backlog, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_server_it_says_why_and_a_stop_takes_two_seconds() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Arc::new(Ca::new());
    // A server of another CA: the handshake fails at once.
    let other = Server::new(Arc::new(Ca::new()));
    let endpoint = other.start(0);
    let port = endpoint.local_addr().unwrap().port();
    let agent = Agent::start(identity(&ca, port, dir.path()).await, spool(dir.path()));
    agent.record(1..=10);
    let mut status = agent.status.subscribe();
    let failed = |status: &UplinkStatus| matches!(&status.state, UplinkState::Connecting { last_error: Some(error), .. } if error.contains("cannot connect to"));
    tokio::time::timeout(SOON, status.wait_for(failed)).await.unwrap().unwrap();
    assert_eq!(agent.spool.stats().backlog, 10);
    let stop = tokio::time::timeout(Duration::from_secs(5), agent.stop());
    stop.await.unwrap();
    assert_eq!(other.names(), names(0..0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_enrolled_while_it_runs_delivers_and_a_new_identity_takes_over() {
    let dir = tempfile::tempdir().unwrap();
    let first = Server::new(Arc::new(Ca::new()));
    let endpoint = first.start(0);
    let port = endpoint.local_addr().unwrap().port();
    let agent = Agent::start(dir.path().to_owned(), spool(dir.path()));
    agent.record(1..=10);
    agent.says("not enrolled").await;
    identity(&first.ca, port, dir.path()).await;
    first.has(10).await;
    agent.acked_all().await;

    let second = Server::new(Arc::new(Ca::new()));
    let endpoint = second.start(0);
    let address = endpoint.local_addr().unwrap();
    identity(&second.ca, address.port(), dir.path()).await;
    agent.says(&format!("connected to {address}")).await;
    agent.record(11..=20);
    second.has(10).await;
    agent.acked_all().await;
    assert_eq!((first.names(), second.names()), (names(1..=10), names(11..=20)));
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_identity_is_said_and_taken_once_it_is_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::new(Arc::new(Ca::new()));
    let endpoint = server.start(0);
    let directory = identity(&server.ca, endpoint.local_addr().unwrap().port(), dir.path()).await;
    let key = directory.join("current/key.pem");
    let good = std::fs::read(&key).unwrap();
    std::fs::write(&key, "nonsense").unwrap();
    let agent = Agent::start(directory, spool(dir.path()));
    agent.record(1..=10);
    agent.says("cannot deliver: ").await;
    assert!(!agent.task.is_finished());
    std::fs::write(&key, good).unwrap();
    server.has(10).await;
    agent.acked_all().await;
    agent.stop().await;
}

/// As if this PC's clock had been set back, or ahead, by years.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_is_judged_by_the_time_that_it_told_last_when_the_pcs_clock_is_wrong() {
    const NS_PER_YEAR: i64 = 31_557_600_000_000_000;
    for years in [2040..2050, 2000..2010] {
        let dir = tempfile::tempdir().unwrap();
        let server = Server { years: years.clone(), ..Server::new(Arc::new(Ca::new())) };
        let endpoint = server.start(0);
        let port = endpoint.local_addr().unwrap().port();
        let directory = identity(&server.ca, port, dir.path()).await;
        let agent = Agent::start(directory.clone(), spool(dir.path()));
        agent.record(1..=10);
        agent.says("cannot connect to").await;
        assert!(server.names().is_empty());

        let mut trust = Trust::default();
        trust.hear(i64::from(years.start + 5 - 1970) * NS_PER_YEAR, None);
        trust.store(&directory, &[7; 16]).unwrap();
        server.has(10).await;
        agent.acked_all().await;
        agent.stop().await;
    }
}
