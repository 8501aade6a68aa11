//! A server process and an agent, for tests.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use netmon_common::enroll::{self, Granted, Reply, Request, Token};
use netmon_common::model::{Event, Hook, Interface, Record};
use netmon_common::wire::{
    self, About, BatchBuilder, FRAME_HEADER, FrameHeader, Hello, MAX_FRAME, SERVER_NAME, ToAgent, ToServer,
};
use netmon_server::ca::spki_sha256_of;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{Connection, Endpoint, RecvStream, SendStream};
use rcgen::KeyPair;
use rustix::process::{Pid, Signal, kill_process};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, RootCertStore, SignatureScheme};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longer than anything here should take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub fn command(data: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_netmon-server"));
    command.arg("--data").arg(data).args(arguments).env_remove("RUST_LOG").env("TZ", "UTC");
    for name in ["NETMON_SERVER_DATA", "NETMON_SERVER_LISTEN", "NETMON_SERVER_ENROLL_LISTEN"] {
        command.env_remove(name);
    }
    command
}

pub fn run(data: &Path, arguments: &[&str]) -> Output {
    command(data, arguments).output().unwrap()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// What a command printed; it must have succeeded.
pub fn success(data: &Path, arguments: &[&str]) -> String {
    let output = run(data, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    stdout(&output)
}

/// A running server.
pub struct Server {
    child: Child,
    lines: mpsc::Receiver<String>,
    pub events: SocketAddr,
    pub enrolment: SocketAddr,
}

impl Server {
    pub fn start(data: &Path) -> Self {
        Self::start_on(data, "127.0.0.1:0")
    }

    pub fn start_on(data: &Path, listen: &str) -> Self {
        Self::start_with(data, listen, |_| {})
    }

    pub fn start_with(data: &Path, listen: &str, prepare: impl FnOnce(&mut Command)) -> Self {
        let arguments = ["run", "--listen", listen, "--enroll-listen", listen];
        Self::start_command(command(data, &arguments), prepare)
    }

    /// Where another one listened for events.
    pub fn start_again(data: &Path, events: SocketAddr) -> Self {
        let events = events.to_string();
        Self::start_command(
            command(data, &["run", "--listen", &events, "--enroll-listen", "127.0.0.1:0"]),
            |_| {},
        )
    }

    fn start_command(mut command: Command, prepare: impl FnOnce(&mut Command)) -> Self {
        prepare(&mut command);
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stderr.lines() {
                let _ = sender.send(line.unwrap());
            }
        });
        let line = wait_for(&lines, "netmon-server listening: ");
        let address = |mark: &str| {
            let (_, rest) = line.split_once(mark).unwrap();
            rest.split(',').next().unwrap().parse::<SocketAddr>().unwrap()
        };
        Self { child, events: address("events udp "), enrolment: address("enrolment udp "), lines }
    }

    /// Waits for a line of the server's own log.
    pub fn says(&self, part: &str) -> String {
        wait_for(&self.lines, part)
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM; the exit status.
    pub fn stop(mut self) -> i32 {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        self.child.wait().unwrap().code().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn wait_for(lines: &mpsc::Receiver<String>, part: &str) -> String {
    let mut seen = Vec::new();
    loop {
        match lines.recv_timeout(PATIENCE) {
            Ok(line) if line.contains(part) => return line,
            Ok(line) => seen.push(line),
            Err(_) => panic!("nothing said {part:?}; it said {seen:#?}"),
        }
    }
}

/// Waits until something that nobody tells of is so.
pub async fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let look = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, look).await.unwrap_or_else(|_| panic!("waited in vain for {what}"));
}

pub fn token(data: &Path, server: &Server, more: &[&str]) -> String {
    let address = server.enrolment.to_string();
    let mut arguments = vec!["token", "--raw", "--address", &address];
    arguments.extend(more);
    success(data, &arguments).trim().to_owned()
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Trusts the CA whose key the token names, if the server shows it.
#[derive(Debug)]
struct Pinned([u8; 32]);

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let ca = intermediates.iter().find(|ca| spki_sha256_of(ca).is_ok_and(|pin| pin == self.0));
        let ca = ca.ok_or_else(|| rustls::Error::General("the pinned CA is not shown".into()))?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(roots.into(), provider()).build().unwrap();
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        unreachable!("TLS 1.3 only")
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

async fn connect(
    config: rustls::ClientConfig,
    alpn: &[u8],
    address: SocketAddr,
) -> Result<Connection, String> {
    connect_from([127, 0, 0, 1], config, alpn, address).await
}

async fn connect_from(
    from: [u8; 4],
    mut config: rustls::ClientConfig,
    alpn: &[u8],
    address: SocketAddr,
) -> Result<Connection, String> {
    config.alpn_protocols = vec![alpn.to_vec()];
    let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(config).unwrap()));
    let endpoint = Endpoint::client((from, 0).into()).unwrap();
    let connecting = endpoint.connect_with(config, address, SERVER_NAME).unwrap();
    patience(connecting).await.map_err(|error| error.to_string())
}

pub async fn patience<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it took too long")
}

async fn send<T: Serialize>(stream: &mut SendStream, message: &T) -> Result<(), String> {
    stream.write_all(&wire::encode_frame(message).unwrap()).await.map_err(|error| error.to_string())
}

async fn receive<T: DeserializeOwned>(stream: &mut RecvStream) -> Result<T, String> {
    let receive = async {
        let mut header = [0; FRAME_HEADER];
        stream.read_exact(&mut header).await.map_err(|error| error.to_string())?;
        let header = FrameHeader::parse(header).unwrap();
        let mut payload = vec![0; header.length];
        stream.read_exact(&mut payload).await.map_err(|error| error.to_string())?;
        Ok(header.decode(&payload).unwrap())
    };
    patience(receive).await
}

pub fn signing_request(key: &KeyPair) -> Vec<u8> {
    rcgen::CertificateParams::default().serialize_request(key).unwrap().der().to_vec()
}

/// An enrolled PC.
pub struct Agent {
    pub key: KeyPair,
    pub granted: Granted,
}

impl Agent {
    pub async fn enrol(token: &str, hostname: &str) -> Result<Self, String> {
        let key = KeyPair::generate().unwrap();
        Self::enrol_key(token, hostname, key).await
    }

    pub async fn enrol_key(token: &str, hostname: &str, key: KeyPair) -> Result<Self, String> {
        match enrol_with(token, hostname, signing_request(&key)).await? {
            Reply::Granted(granted) => Ok(Self { key, granted }),
            Reply::Refused { reason } => Err(reason.escaped().to_string()),
        }
    }

    pub fn seat(&self) -> String {
        self.granted.seat.escaped().to_string()
    }

    /// The same PC with a certificate of its own making.
    pub fn with_own_certificate(mut self) -> Self {
        let params = rcgen::CertificateParams::default();
        self.granted.certificate_der = params.self_signed(&self.key).unwrap().der().to_vec();
        self
    }

    /// Gives it a certificate of its server's that was made so many days ago.
    pub fn age(&mut self, data: &Path, days: u64) {
        let ca = netmon_server::datadir::DataDir::new(data).ca().unwrap();
        let key = netmon_server::ca::AgentKey::from_request(&signing_request(&self.key)).unwrap();
        let now = Duration::from_nanos(netmon_server::clock::wall_ns() as u64);
        let then = now - Duration::from_secs(days * 24 * 60 * 60);
        self.granted.certificate_der = ca.issue_agent(&key, &self.granted.agent, then).unwrap();
    }

    /// In the version of the protocol before this one.
    pub async fn connect(&self, server: &Server) -> Result<Session, String> {
        self.connect_as(server, wire::ALPN_1).await
    }

    /// Connects and introduces itself as connection number `connect` of process `instance`.
    pub async fn introduce(&self, server: &Server, about: About) -> Session {
        let mut session = self.connect_as(server, wire::ALPN).await.unwrap();
        session.say(&ToServer::About(about)).await;
        session
    }

    async fn connect_as(&self, server: &Server, alpn: &[u8]) -> Result<Session, String> {
        let mut roots = RootCertStore::empty();
        roots.add(self.granted.ca_der.clone().into()).unwrap();
        let config = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(
                vec![self.granted.certificate_der.clone().into()],
                PrivateKeyDer::try_from(self.key.serialize_der()).unwrap(),
            )
            .unwrap();
        let connection = connect(config, alpn, server.events).await?;
        let (send, recv) = patience(connection.open_bi()).await.map_err(|error| error.to_string())?;
        Ok(Session { connection, send, recv })
    }

    /// Connects and says hello for `epoch`, with everything from record 1 on still in the spool.
    pub async fn deliver(&self, server: &Server, epoch: u64) -> (Session, u64) {
        let mut session = self.connect(server).await.unwrap();
        match session.hello(epoch, 1).await.unwrap() {
            ToAgent::Welcome { next_seq, .. } => (session, next_seq),
            other => panic!("not welcome: {other:?}"),
        }
    }
}

/// A connection to the enrolment port that says nothing.
pub async fn call_enrolment(token: &str, from: [u8; 4]) -> Result<Connection, String> {
    let token: Token = token.parse().unwrap();
    let config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned(token.ca_spki_sha256)))
        .with_no_client_auth();
    connect_from(from, config, enroll::ALPN, token.address.parse().unwrap()).await
}

pub async fn enrol_with(token: &str, hostname: &str, csr_der: Vec<u8>) -> Result<Reply, String> {
    let (_connection, mut answer) = request(token, hostname, csr_der).await?;
    receive(&mut answer).await
}

/// Asks for enrolment and does not read the reply.
pub async fn request(
    token: &str,
    hostname: &str,
    csr_der: Vec<u8>,
) -> Result<(Connection, RecvStream), String> {
    let connection = call_enrolment(token, [127, 0, 0, 1]).await?;
    let token: Token = token.parse().unwrap();
    let (mut stream, answer) = patience(connection.open_bi()).await.map_err(|error| error.to_string())?;
    let request = Request {
        token_id: token.id,
        secret: token.secret,
        csr_der,
        hostname: hostname.into(),
        seat: "".into(),
    };
    send(&mut stream, &request).await?;
    Ok((connection, answer))
}

/// An agent's connection.
pub struct Session {
    pub connection: Connection,
    pub send: SendStream,
    pub recv: RecvStream,
}

impl Session {
    pub async fn hello(&mut self, epoch: u64, oldest_seq: u64) -> Result<ToAgent, String> {
        self.hello_of_version(1, epoch, oldest_seq).await
    }

    pub async fn hello_of_version(
        &mut self,
        version: u16,
        epoch: u64,
        oldest_seq: u64,
    ) -> Result<ToAgent, String> {
        let hello = Hello { version, agent_version: "test".into(), hostname: "pc".into(), epoch, oldest_seq };
        send(&mut self.send, &ToServer::Hello(hello)).await?;
        receive(&mut self.recv).await
    }

    /// Sends records `seqs` and waits for the answer.
    pub async fn batch(
        &mut self,
        epoch: u64,
        seqs: std::ops::RangeInclusive<u64>,
    ) -> Result<ToAgent, String> {
        self.send_batch(epoch, seqs).await?;
        receive(&mut self.recv).await
    }

    pub async fn send_batch(
        &mut self,
        epoch: u64,
        seqs: std::ops::RangeInclusive<u64>,
    ) -> Result<(), String> {
        self.send_records(epoch, &seqs.map(record).collect::<Vec<_>>()).await
    }

    pub async fn send_records(&mut self, epoch: u64, records: &[Record]) -> Result<(), String> {
        let mut batch = BatchBuilder::default();
        for record in records {
            assert!(batch.push(&wire::Item::Record(record.to_bytes().unwrap())));
        }
        send(&mut self.send, &ToServer::Batch(batch.finish(epoch, records[0].seq).unwrap())).await
    }

    /// Says something.
    pub async fn say(&mut self, message: &ToServer) {
        send(&mut self.send, message).await.unwrap();
    }

    /// Says something that is answered.
    pub async fn ask(&mut self, message: &ToServer) -> ToAgent {
        self.say(message).await;
        receive(&mut self.recv).await.unwrap()
    }

    /// Sends bytes as they are.
    pub async fn raw(&mut self, bytes: &[u8]) {
        self.send.write_all(bytes).await.unwrap();
    }

    /// The reason with which the server closes the connection.
    pub async fn closed(&self) -> String {
        patience(self.connection.closed()).await.to_string()
    }
}

/// A frame that announces more than there may be.
pub fn oversized_frame() -> Vec<u8> {
    let mut frame = ((MAX_FRAME + 1) as u32).to_le_bytes().to_vec();
    frame.extend([0; 60]);
    frame
}

/// The first connection of a process.
pub fn about() -> About {
    About {
        agent_version: "test".into(),
        hostname: "pc".into(),
        boot_id: [1; 16],
        run: 1,
        previous_died: false,
        instance: 1,
        connect: 1,
        witness: None,
    }
}

/// Record number `seq`, recognisable in the log.
pub fn record(seq: u64) -> Record {
    let interface = Interface { name: "eth0".into(), index: seq as u32, hook: Hook::Tcx };
    Record {
        seq,
        run: 1,
        boot_ns: seq,
        // Long ago: the server finds every one late.
        wall_ns: 1_600_000_000_000_000_000,
        event: Event::InterfaceDetached(interface),
    }
}

/// The numbers of the records that a log shows, in its order; other lines as 0.
pub fn numbers(log: &str) -> Vec<u64> {
    let number = |line: &str| {
        let (_, rest) = line.split_once("(index ")?;
        rest.split_once(')')?.0.parse().ok()
    };
    log.lines().map(|line| number(line).unwrap_or_default()).collect()
}
