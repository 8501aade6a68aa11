//! Many agents in one process: real identities, the real protocol, no spool. They say what they are told to.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use netmon_agent::clock::Now;
use netmon_agent::identity::{Identity, enroll};
use netmon_agent::uplink::quic_config;
use netmon_common::enroll::Token;
use netmon_common::model::Coverage;
use netmon_common::raw::Raw;
use netmon_common::wire::{
    ALPN, About, FRAME_HEADER, FrameHeader, HEARTBEAT_NS, Heartbeat, Open, SERVER_NAME, ToAgent, ToServer,
    WINDOW, encode_frame,
};
use quinn::{ClientConfig, Connection, Endpoint, RecvStream, SendStream};
use rustls::pki_types::CertificateDer;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Interval, MissedTickBehavior, interval, timeout};

use super::records::{EPOCH, Frame};

/// Handshakes at once: below what the server allows one address.
const AT_ONCE: usize = 6;
/// Nothing here should take longer, on a busy machine either.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// An enrolled PC, as it calls the server: from an address of its own, as PCs do.
#[derive(Clone)]
pub struct Agent {
    from: Ipv4Addr,
    config: ClientConfig,
    ca: CertificateDer<'static>,
    remote: SocketAddr,
}

/// Enrols `count` PCs named `prefix`-1 and so on, with addresses in 127.`network`.0.0/16. Their identities go below
/// `directory`.
///
/// # Errors
/// What the enrolment says.
pub async fn enrol(
    token: &str,
    prefix: &'static str,
    network: u8,
    count: usize,
    directory: &Path,
) -> Result<Vec<Agent>> {
    let token: Token = token.parse().context("the server's token")?;
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    let mut tasks = JoinSet::new();
    for number in 0..count {
        let (token, turns) = (token.clone(), turns.clone());
        let directory = directory.join(format!("{prefix}-{number}"));
        tasks.spawn(async move {
            let _turn = turns.acquire().await?;
            let name = Raw::new(format!("{prefix}-{}", number + 1));
            enroll(&token, name.clone(), name, &directory, false).await?;
            let identity = Identity::load(&directory)?.context("no identity was stored")?;
            let config = quic_config(identity.tls(None)?)?;
            let host = u16::try_from(number + 1)?.to_be_bytes();
            let from = Ipv4Addr::new(127, network, host[0], host[1]);
            let agent = Agent { from, config, ca: identity.ca.clone(), remote: identity.address.parse()? };
            Ok::<_, anyhow::Error>((number, agent))
        });
    }
    let mut agents: Vec<_> = tasks.join_all().await.into_iter().collect::<Result<_>>()?;
    agents.sort_unstable_by_key(|(number, _)| *number);
    Ok(agents.into_iter().map(|(_, agent)| agent).collect())
}

impl Agent {
    /// Connects, and says nothing yet.
    ///
    /// # Errors
    /// There is no connection.
    pub async fn connect(&self) -> Result<(Endpoint, Connection)> {
        let endpoint = Endpoint::client((self.from, 0).into())?;
        let connecting = endpoint.connect_with(self.config.clone(), self.remote, SERVER_NAME)?;
        let connection = timeout(PATIENCE, connecting).await.context("no connection in time")??;
        Ok((endpoint, connection))
    }

    /// Connects with other settings of the transport than an agent has.
    ///
    /// # Errors
    /// There is no connection.
    pub async fn connect_with(&self, transport: quinn::TransportConfig) -> Result<(Endpoint, Connection)> {
        let mut config = self.config.clone();
        config.transport_config(Arc::new(transport));
        Self { config, ..self.clone() }.connect().await
    }

    /// How somebody calls who knows the server's CA and has no certificate.
    ///
    /// # Errors
    /// TLS's.
    pub fn without_certificate(&self) -> Result<ClientConfig> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.ca.clone())?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = vec![ALPN.to_vec()];
        Ok(quic_config(tls)?)
    }

    /// Connects, introduces itself and says hello for [`EPOCH`].
    ///
    /// # Errors
    /// There is no connection, or the server does not answer as it should.
    pub async fn call(&self) -> Result<Session> {
        let (endpoint, connection) = self.connect().await?;
        let (send, receive) = connection.open_bi().await?;
        let (sender, answers) = mpsc::channel(64);
        tokio::spawn(read_answers(receive, sender));
        let mut beats = interval(Duration::from_nanos(HEARTBEAT_NS));
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut session =
            Session { _endpoint: endpoint, connection, send, answers, beats, next_seq: 0, awaited: 0 };
        session.send.write_all(&introduction()?).await?;
        match session.answer().await? {
            ToAgent::Expect { next_seq, .. } => session.next_seq = next_seq,
            other => bail!("the server answers a hello with {other:?}"),
        }
        Ok(session)
    }
}

/// Lets all agents call.
///
/// # Errors
/// One of them is not served.
pub async fn call_all(agents: &[Agent]) -> Result<Vec<Session>> {
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    let mut tasks = JoinSet::new();
    for agent in agents {
        let (agent, turns) = (agent.clone(), turns.clone());
        tasks.spawn(async move {
            let _turn = turns.acquire().await?;
            agent.call().await
        });
    }
    tasks.join_all().await.into_iter().collect()
}

/// The first two frames of a connection.
///
/// # Errors
/// They cannot be encoded.
pub fn introduction() -> Result<Vec<u8>> {
    let about = About {
        agent_version: "bench".into(),
        hostname: "bench".into(),
        boot_id: [1; 16],
        run: 3,
        previous_died: false,
        // Another process each time: one that was killed and started again is no clone.
        instance: Now::read().boot_ns,
        connect: 1,
        witness: None,
    };
    let open = Open { epoch: EPOCH, oldest_seq: 1, next_seq: 1 };
    Ok([encode_frame(&ToServer::About(about))?, encode_frame(&ToServer::Open(open))?].concat())
}

/// "Still watching", now.
pub fn heartbeat() -> Heartbeat {
    let now = Now::read();
    let coverage = Coverage { interfaces: vec!["enp0s31f6".into()], usb: true, ..Coverage::default() };
    Heartbeat { boot_ns: now.boot_ns, wall_ns: now.wall_ns, coverage, ..Heartbeat::default() }
}

/// A connection on which the server expects records.
pub struct Session {
    _endpoint: Endpoint,
    connection: Connection,
    send: SendStream,
    answers: mpsc::Receiver<Result<ToAgent>>,
    beats: Interval,
    /// The record that the server expects next.
    pub next_seq: u64,
    /// Heartbeats that are not answered yet.
    awaited: u64,
}

impl Session {
    /// Sends all frames, as many at once as the protocol allows, and returns when the last record is acknowledged.
    ///
    /// # Errors
    /// The server answers otherwise, or not in time.
    pub async fn deliver(&mut self, frames: &[Frame]) -> Result<()> {
        let (mut sent, mut acked) = (0, 0);
        while acked < frames.len() {
            while sent < frames.len() && sent - acked < WINDOW {
                self.send.write_all(&frames[sent].bytes).await?;
                sent += 1;
            }
            match self.answer().await? {
                ToAgent::Ack { epoch: EPOCH, seq } => {
                    acked = frames.partition_point(|frame| frame.last_seq <= seq);
                    self.next_seq = seq + 1;
                }
                other => bail!("the server answers a batch with {other:?}"),
            }
        }
        Ok(())
    }

    /// Says nothing but "still watching" until this is dropped.
    ///
    /// # Errors
    /// The connection is gone, or the server says something.
    pub async fn stay(&mut self) -> Result<()> {
        let answer = self.next(Duration::MAX).await?;
        bail!("the server says {answer:?} unasked")
    }

    /// Bytes of UDP payload that went over the wire so far, both ways.
    pub fn wire_bytes(&self) -> u64 {
        let stats = self.connection.stats();
        stats.udp_tx.bytes + stats.udp_rx.bytes
    }

    async fn answer(&mut self) -> Result<ToAgent> {
        self.next(PATIENCE).await
    }

    /// The next answer that is not about heartbeats, which are said and heard meanwhile.
    async fn next(&mut self, patience: Duration) -> Result<ToAgent> {
        loop {
            let message = tokio::select! {
                message = timeout(patience, self.answers.recv()) => message.context("no answer in time")?,
                _ = self.beats.tick() => {
                    self.send.write_all(&encode_frame(&ToServer::Heartbeat(heartbeat()))?).await?;
                    self.awaited += 1;
                    continue;
                }
            };
            match message.context("the stream ended")?? {
                ToAgent::Heard { .. } => {
                    ensure!(self.awaited > 0, "the server heard what nobody said");
                    self.awaited -= 1;
                }
                answer => return Ok(answer),
            }
        }
    }
}

async fn read_answers(mut receive: RecvStream, answers: mpsc::Sender<Result<ToAgent>>) {
    loop {
        let answer = read_answer(&mut receive).await;
        let is_last = answer.is_err();
        if answers.send(answer).await.is_err() || is_last {
            return;
        }
    }
}

/// One frame of the server's.
///
/// # Errors
/// The stream ended, or it is no frame.
pub async fn read_answer(receive: &mut RecvStream) -> Result<ToAgent> {
    let mut header = [0; FRAME_HEADER];
    receive.read_exact(&mut header).await?;
    let header = FrameHeader::parse(header)?;
    let mut payload = vec![0; header.length];
    receive.read_exact(&mut payload).await?;
    Ok(header.decode(&payload)?)
}
