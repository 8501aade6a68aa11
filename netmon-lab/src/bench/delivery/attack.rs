//! What somebody may do to a server: an enrolled agent at its worst, and peers that nobody knows.
//!
//! The attackers' threads have the lowest priority: on a machine that they share with the server and the good agent,
//! what is measured is what the server does to itself on their behalf, and not who gets the CPU.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netmon_common::model::{Coverage, Event, Record};
use netmon_common::raw::{MAX_RAW, Raw};
use netmon_common::wire::{
    Batch, FRAME_HEADER, MAX_BATCH_BYTES, MAX_FRAME, SERVER_NAME, ToServer, encode_frame,
};
use quinn::{Connection, Endpoint, RecvStream, SendStream, TransportConfig, VarInt};
use tokio::net::UdpSocket;
use tokio::runtime::Runtime;
use tokio::time::{interval, sleep, timeout};

use super::agents::{Agent, heartbeat, introduction, read_answer};
use super::records::{self, EPOCH, Frame};
use crate::clock;

/// What an enrolled agent does to hurt, each with an identity and a connection of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behaviour {
    /// Batches of garbage that unpack to a mebibyte.
    Bombs,
    /// Batches of a mebibyte of records.
    Large,
    /// Usual batches as fast as they are taken.
    FullSpeed,
    /// Connects, says hello, and is gone again.
    Reconnects,
    /// Says all it can and takes no answer.
    Deaf,
    /// Announces the longest frame and sends half of it.
    HalfFrames,
    /// Long heartbeats as fast as they are taken.
    Heartbeats,
    /// A byte now and then.
    SlowLoris,
}

impl Behaviour {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Bombs,
        Self::Large,
        Self::FullSpeed,
        Self::Reconnects,
        Self::Deaf,
        Self::HalfFrames,
        Self::Heartbeats,
        Self::SlowLoris,
    ];

    /// As the tables call what is counted.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bombs => "bombs",
            Self::Large => "large batches",
            Self::FullSpeed => "usual batches",
            Self::Reconnects => "reconnects",
            Self::Deaf => "heartbeats without reading",
            Self::HalfFrames => "half frames",
            Self::Heartbeats => "heartbeats",
            Self::SlowLoris => "single bytes",
        }
    }
}

/// Initials of unknown peers that are sent again and again, per second.
pub const INITIALS: u64 = 2_000;
/// Different ones.
const RECORDED: usize = 64;
/// Addresses 127.0.0.2 and so on that they come from.
const ADDRESSES: u8 = 16;
/// Ports at each.
const PORTS: usize = 4;
/// Who was refused tries again after this time: an attacker does not wait for the agent's backoff.
const AGAIN: Duration = Duration::from_millis(5);

/// How often something was done, by its name.
#[derive(Clone, Debug, Default)]
pub struct Counts(Arc<Mutex<BTreeMap<&'static str, Arc<AtomicU64>>>>);

impl Counts {
    fn counter(&self, name: &'static str) -> Arc<AtomicU64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(name).or_default().clone()
    }

    /// So far.
    pub fn read(&self) -> BTreeMap<&'static str, u64> {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.iter().map(|(name, count)| (*name, count.load(Ordering::Relaxed))).collect()
    }
}

/// An attack; it ends when this is dropped.
pub struct Attack {
    runtime: Option<Runtime>,
    counts: Counts,
}

impl Attack {
    /// Nobody does anything yet.
    ///
    /// # Errors
    /// There are no threads.
    pub fn prepare() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("attacker")
            .on_thread_start(|| {
                // Linux: of this thread. Without it, the attack is stronger than meant.
                if let Err(error) = rustix::process::setpriority_process(None, 19) {
                    eprintln!("  the attackers keep their priority: {error}");
                }
            })
            .enable_all()
            .build()?;
        Ok(Self { runtime: Some(runtime), counts: Counts::default() })
    }

    /// Lets the agents misbehave, each in its way.
    pub fn enrolled(&self, agents: &[Agent]) {
        for (agent, behaviour) in agents.iter().cloned().zip(Behaviour::ALL) {
            let counter = self.counts.counter(behaviour.name());
            self.spawn(async move {
                loop {
                    // The server ends it sooner or later: that is what is to be seen.
                    let _ = misbehave(&agent, behaviour, &counter).await;
                    sleep(AGAIN).await;
                }
            });
        }
    }

    /// Lets unknown peers call: Initials that lead nowhere, and handshakes without a certificate. `template` knows the
    /// server's CA.
    ///
    /// # Errors
    /// TLS's.
    pub fn unknown(&self, server: SocketAddr, template: &Agent) -> Result<()> {
        let (sent, called) =
            (self.counts.counter("Initials"), self.counts.counter("calls without certificate"));
        let config = template.without_certificate()?;
        self.spawn(async move {
            if let Err(error) = initials(server, &sent).await {
                eprintln!("  no Initials: {error:#}");
            }
        });
        for last in 0..4 {
            let (config, called) = (config.clone(), called.clone());
            self.spawn(async move {
                loop {
                    let _ = strange_call(server, config.clone(), [127, 0, 0, 32 + last], &called).await;
                }
            });
        }
        Ok(())
    }

    /// What was done so far.
    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.counts.read()
    }

    fn spawn(&self, attack: impl Future<Output = ()> + Send + 'static) {
        if let Some(runtime) = &self.runtime {
            runtime.spawn(attack);
        }
    }
}

impl Drop for Attack {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
    }
}

/// A connection of somebody who keeps to no rules.
struct Line {
    _endpoint: Endpoint,
    _connection: Connection,
    send: SendStream,
    receive: RecvStream,
}

async fn line(agent: &Agent) -> Result<Line> {
    let (endpoint, connection) = agent.connect().await?;
    opened(endpoint, connection).await
}

async fn opened(endpoint: Endpoint, connection: Connection) -> Result<Line> {
    let (mut send, receive) = connection.open_bi().await?;
    send.write_all(&introduction()?).await?;
    Ok(Line { _endpoint: endpoint, _connection: connection, send, receive })
}

async fn misbehave(agent: &Agent, behaviour: Behaviour, done: &AtomicU64) -> Result<()> {
    let count = || done.fetch_add(1, Ordering::Relaxed);
    match behaviour {
        Behaviour::Bombs => {
            let mut line = line(agent).await?;
            line.send.write_all(&bomb()?).await?;
            count();
            // Until the server has had enough.
            loop {
                read_answer(&mut line.receive).await?;
            }
        }
        Behaviour::Large => {
            let mut session = agent.call().await?;
            loop {
                let frame = large_batch(session.next_seq)?;
                session.deliver(&[frame]).await?;
                count();
            }
        }
        Behaviour::FullSpeed => {
            let mut session = agent.call().await?;
            loop {
                let frames = records::frames(session.next_seq, 2_000, 500, clock::wall_ns())?;
                session.deliver(&frames).await?;
                done.fetch_add(frames.len() as u64, Ordering::Relaxed);
            }
        }
        Behaviour::Reconnects => {
            let mut line = line(agent).await?;
            read_answer(&mut line.receive).await?;
            count();
            Ok(())
        }
        Behaviour::Deaf => {
            let mut transport = TransportConfig::default();
            // Room for a few answers, which nobody takes away.
            transport.stream_receive_window(VarInt::from_u32(256)).receive_window(VarInt::from_u32(256));
            let (endpoint, connection) = agent.connect_with(transport).await?;
            let mut line = opened(endpoint, connection).await?;
            let beat = long_heartbeat()?;
            loop {
                line.send.write_all(&beat).await?;
                count();
            }
        }
        Behaviour::HalfFrames => {
            let mut line = line(agent).await?;
            let mut half = vec![0; FRAME_HEADER + MAX_FRAME / 2];
            half[..4].copy_from_slice(&(MAX_FRAME as u32).to_le_bytes());
            line.send.write_all(&half).await?;
            count();
            read_answer(&mut line.receive).await?;
            // Whatever was answered; the rest never comes.
            read_answer(&mut line.receive).await.map(drop)
        }
        Behaviour::Heartbeats => {
            let Line { _endpoint, _connection, mut send, mut receive } = line(agent).await?;
            let beat = long_heartbeat()?;
            let say = async {
                loop {
                    send.write_all(&beat).await?;
                    count();
                }
            };
            let hear = async {
                loop {
                    read_answer(&mut receive).await?;
                }
            };
            tokio::select! {
                said = say => said,
                heard = hear => heard,
            }
        }
        Behaviour::SlowLoris => {
            let (_endpoint, connection) = agent.connect().await?;
            let (mut send, _receive) = connection.open_bi().await?;
            for byte in introduction()? {
                send.write_all(&[byte]).await?;
                count();
                sleep(Duration::from_millis(20)).await;
            }
            Ok(())
        }
    }
}

/// A frame of some dozen bytes whose batch unpacks to [`MAX_BATCH_BYTES`] of nothing.
fn bomb() -> Result<Vec<u8>> {
    let records = zstd::bulk::compress(&vec![0; MAX_BATCH_BYTES], 1)?;
    Ok(encode_frame(&ToServer::Batch(Batch { epoch: EPOCH, first_seq: 1, count: 500, records }))?)
}

/// As many records of the longest kind as unpack to [`MAX_BATCH_BYTES`].
fn large_batch(first_seq: u64) -> Result<Frame> {
    let (mut plain, mut next) = (Vec::new(), first_seq);
    loop {
        let event = Event::Coverage(long_coverage());
        let bytes = Record { seq: next, run: 1, boot_ns: 0, wall_ns: clock::wall_ns(), event }.to_bytes()?;
        if plain.len() + 2 + bytes.len() > MAX_BATCH_BYTES {
            break;
        }
        plain.extend((bytes.len() as u16).to_le_bytes());
        plain.extend(bytes);
        next += 1;
    }
    let records = zstd::bulk::compress(&plain, 1)?;
    let batch = Batch { epoch: EPOCH, first_seq, count: (next - first_seq) as u32, records };
    Ok(Frame { bytes: encode_frame(&ToServer::Batch(batch))?, last_seq: next - 1 })
}

fn long_coverage() -> Coverage {
    let interfaces = vec![Raw::new([b'x'; MAX_RAW]); Coverage::MAX_INTERFACES];
    Coverage { interfaces, ..Coverage::default() }
}

fn long_heartbeat() -> Result<Vec<u8>> {
    let mut beat = heartbeat();
    beat.coverage = long_coverage();
    Ok(encode_frame(&ToServer::Heartbeat(beat))?)
}

/// A whole handshake with the server's signature, from a peer that has no certificate.
async fn strange_call(
    server: SocketAddr,
    config: quinn::ClientConfig,
    from: [u8; 4],
    done: &AtomicU64,
) -> Result<()> {
    let endpoint = Endpoint::client((from, 0).into())?;
    done.fetch_add(1, Ordering::Relaxed);
    let connecting = endpoint.connect_with(config, server, SERVER_NAME)?;
    if let Ok(connected) = timeout(Duration::from_secs(5), connecting).await {
        // The server's refusal comes behind the client's end of the handshake.
        connected?.closed().await;
    }
    Ok(())
}

/// Sends real first packets from many addresses, without end.
async fn initials(server: SocketAddr, sent: &AtomicU64) -> Result<()> {
    let packets = recorded_initials().await?;
    let mut sockets = Vec::new();
    for last in 0..ADDRESSES {
        for _ in 0..PORTS {
            sockets.push(UdpSocket::bind(SocketAddr::from(([127, 0, 0, 2 + last], 0))).await?);
        }
    }
    const PER_TICK: u64 = 10;
    let mut ticks = interval(Duration::from_millis(1_000 * PER_TICK / INITIALS));
    let mut number = 0;
    loop {
        ticks.tick().await;
        for _ in 0..PER_TICK {
            // A full buffer costs a packet and nothing else.
            let socket = &sockets[number % sockets.len()];
            if socket.send_to(&packets[number / sockets.len() % packets.len()], server).await.is_ok() {
                sent.fetch_add(1, Ordering::Relaxed);
            }
            number += 1;
        }
    }
}

/// What clients send to a server that never answers.
async fn recorded_initials() -> Result<Vec<Vec<u8>>> {
    let nobody = UdpSocket::bind("127.0.0.1:0").await?;
    let address = nobody.local_addr()?;
    let tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let config = netmon_agent::uplink::quic_config(tls)?;
    let mut packets = Vec::new();
    for _ in 0..RECORDED {
        let endpoint = Endpoint::client(([127, 0, 0, 1], 0).into())?;
        let _connecting = endpoint.connect_with(config.clone(), address, SERVER_NAME)?;
        let mut packet = vec![0; 2_048];
        let length =
            timeout(Duration::from_secs(5), nobody.recv(&mut packet)).await.context("no Initial")??;
        packet.truncate(length);
        ensure!(length >= 1_200, "an Initial of {length} bytes");
        packets.push(packet);
    }
    Ok(packets)
}
