//! Brings the spool's records to the server.
//!
//! * [`session`]: what to say next, pure
//! * [`backoff`]: when to try again, pure
//! * [`run`]: the QUIC connection around them
//! * [`run_whenever_enrolled`]: the same for whatever identity this PC has at the time

pub mod backoff;
pub mod session;

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use netmon_common::raw::Raw;
use netmon_common::wire::{
    self, BatchBuilder, FRAME_HEADER, FrameHeader, Hello, Item, MAX_BATCH_RECORDS, MAX_FRAME, ToAgent,
    ToServer, WireError,
};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{Endpoint, IdleTimeout, RecvStream, SendStream, TransportConfig, VarInt};
use tokio::sync::{mpsc, watch};

use crate::clock::Now;
use crate::identity::{Identity, IdentityError};
use crate::spool::{SpoolError, SpoolHandle};
use session::{Effect, Session, Step, Violation};

/// Sent when nothing else is: holds NAT bindings open and notices a dead peer within [`IDLE`].
const KEEP_ALIVE: Duration = Duration::from_secs(3);
/// A peer that was silent for so long is gone. A server killed and started again does not know its old
/// connections, so this is how long its agents take to notice.
const IDLE: Duration = Duration::from_millis(10_000);
/// Longest wait for a connection to one address.
const CONNECT: Duration = Duration::from_secs(10);
/// Longest wait for a welcome or an ack. Far above a commit (0.1 s), so that only a stuck server is left.
const ANSWER: Duration = Duration::from_secs(30);
/// Longest time that a stopping agent tries to deliver what is left.
const FAREWELL: Duration = Duration::from_secs(2);
/// How often a stored identity is looked for: one that came, changed or was repaired.
const LOOK: Duration = Duration::from_secs(2);
/// Bytes of records for one batch: what [`BatchBuilder`] takes, with the lengths in front of them.
const BATCH_BYTES: usize = MAX_FRAME / 2 - 2 * MAX_BATCH_RECORDS as usize;

/// How the uplink stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UplinkStatus {
    /// Connected or not.
    pub state: UplinkState,
    /// The newest record that the server acknowledged in this run of the agent, as (epoch, seq).
    pub acked: Option<(u64, u64)>,
    /// The latest sockets that tried to reach or reached the server, newest last: local UDP port and the server's
    /// address. Their packets are the agent's own, before the connection stands and after it broke, too.
    pub sockets: Vec<(u16, SocketAddr)>,
}

/// Sockets that are remembered: one for each attempt while the flows of the attempts before it are still alive.
const SOCKETS: usize = 32;

impl UplinkStatus {
    fn remember(&mut self, socket: (u16, SocketAddr)) {
        if self.sockets.len() == SOCKETS {
            self.sockets.remove(0);
        }
        self.sockets.push(socket);
    }

    /// For people.
    pub fn describe(&self, now: &Now) -> String {
        let seconds = |since_wall_ns: i64| now.wall_ns.saturating_sub(since_wall_ns).max(0) / 1_000_000_000;
        match &self.state {
            UplinkState::NotEnrolled => "not enrolled: recording here only".to_owned(),
            UplinkState::Unusable { error } => format!("cannot deliver: {error}"),
            UplinkState::Connected { remote, since_wall_ns, .. } => {
                format!("connected to {remote} for {} s", seconds(*since_wall_ns))
            }
            UplinkState::Connecting { since_wall_ns, last_error } => {
                let error = last_error.as_deref().map(|error| format!(": {error}")).unwrap_or_default();
                format!("NOT CONNECTED for {} s{error}", seconds(*since_wall_ns))
            }
        }
    }
}

/// Connected or not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum UplinkState {
    /// There is no identity: nothing is sent.
    #[default]
    NotEnrolled,
    /// There is an identity, but it cannot be used: nothing is sent.
    Unusable {
        /// Why, and what to do, for people.
        error: String,
    },
    /// Trying.
    Connecting {
        /// Since when there is no connection, wall clock.
        since_wall_ns: i64,
        /// Why the last attempt failed, for people.
        last_error: Option<String>,
    },
    /// The server answers.
    Connected {
        /// The server's address: with the port below, the agent's own traffic.
        remote: SocketAddr,
        /// The agent's UDP port.
        local_port: u16,
        /// Since when, wall clock.
        since_wall_ns: i64,
    },
}

/// Why a connection could not be made or ended.
#[derive(Debug, thiserror::Error)]
pub enum UplinkError {
    /// The identity cannot be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// TLS and QUIC do not fit.
    #[error("cannot set up QUIC")]
    Quic(#[source] rustls::Error),
    /// The server's name has no address.
    #[error("cannot find the address of {address}: {source}")]
    Resolve {
        /// `host:port`.
        address: String,
        /// What the resolver says.
        source: io::Error,
    },
    /// A UDP socket cannot be opened.
    #[error("cannot open a UDP socket: {0}")]
    Socket(#[source] io::Error),
    /// Nothing answers.
    #[error("no answer from {0}: is netmon-server running there, and is its UDP port open?")]
    Unreachable(SocketAddr),
    /// The connection could not be made.
    #[error("cannot connect to {remote}: {reason}")]
    Connect {
        /// The server.
        remote: SocketAddr,
        /// Why.
        reason: String,
    },
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Broken(String),
    /// The server sent what is no frame.
    #[error("the server does not speak netmon's protocol: {0}")]
    Wire(#[from] WireError),
    /// The server broke the protocol.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// The server does not answer any more, though its machine does.
    #[error("the server did not answer within {} s", ANSWER.as_secs())]
    Stuck,
    /// The server refuses this agent.
    #[error("the server refuses this agent: {}", .0.escaped())]
    Refused(Raw),
    /// The spool cannot be read, or cannot begin a new epoch.
    #[error("the spool cannot be sent: {0}")]
    Spool(#[from] SpoolError),
}

/// How this agent presents itself.
#[derive(Clone, Debug)]
pub struct Introduction {
    /// The agent's version.
    pub agent_version: Raw,
    /// The PC's host name.
    pub hostname: Raw,
}

/// Delivers as whoever this PC is enrolled as at the time: `directory` holds the identity (see [`Identity::load`]) and
/// may be filled, changed or repaired meanwhile. Ends when `shutdown` becomes true (or its sender is gone), after at
/// most [`FAREWELL`] more for what the spool has synced by then. Errors never end it; they are logged and shown in
/// `status`.
pub async fn run_whenever_enrolled(
    directory: &Path,
    spool: SpoolHandle,
    introduction: Introduction,
    mut shutdown: watch::Receiver<bool>,
    status: watch::Sender<UplinkStatus>,
) {
    // What was said last: `None` nothing, or that it delivers.
    let mut said = None;
    loop {
        // In front of the reading, so that a change behind it is noticed.
        let name = Identity::name(directory);
        let state = match Identity::load(directory) {
            Ok(Some(identity)) => {
                said = None;
                let replaced = async {
                    while matches!(Identity::name(directory), now if now.is_none() || now == name) {
                        tokio::time::sleep(LOOK).await;
                    }
                    tracing::info!("this PC has a new identity: connecting as that one");
                };
                let (spool, introduction) = (spool.clone(), introduction.clone());
                match run_until(replaced, &identity, spool, introduction, &mut shutdown, &status).await {
                    End::Stop => return,
                    End::Replaced => continue,
                }
            }
            Ok(None) => UplinkState::NotEnrolled,
            Err(error) => UplinkState::Unusable { error: with_causes(&error) },
        };
        if said.as_ref() != Some(&state) {
            match &state {
                UplinkState::Unusable { error } => {
                    tracing::error!(
                        error,
                        "cannot deliver; recording here only until the identity is repaired"
                    );
                }
                _ => tracing::warn!("not enrolled at a server: recording here only (`netmon-agent enroll`)"),
            }
            status.send_modify(|status| status.state = state.clone());
            said = Some(state);
        }
        tokio::select! {
            _ = shutdown.wait_for(|stop| *stop) => return,
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

/// Why a delivery ended.
enum End {
    Stop,
    Replaced,
}

async fn run_until(
    replaced: impl Future<Output = ()>,
    identity: &Identity,
    spool: SpoolHandle,
    introduction: Introduction,
    shutdown: &mut watch::Receiver<bool>,
    status: &watch::Sender<UplinkStatus>,
) -> End {
    let mut endpoint = None;
    let end = {
        let deliver = deliver(identity, &spool, &introduction, status, &mut endpoint);
        let stop = async {
            // An error says that the sender is gone: as good as "stop".
            let _ = shutdown.wait_for(|stop| *stop).await;
            let mut changes = status.subscribe();
            let drained = async { while spool.stats().backlog > 0 && changes.changed().await.is_ok() {} };
            if tokio::time::timeout(FAREWELL, drained).await.is_err() {
                tracing::info!(
                    backlog = spool.stats().backlog,
                    "stopping; the next start delivers what is left in the spool"
                );
            }
        };
        tokio::select! {
            never = deliver => match never {},
            () = stop => End::Stop,
            () = replaced => End::Replaced,
        }
    };
    if let Some(endpoint) = endpoint {
        let reason: &[u8] = match end {
            End::Stop => b"agent stops",
            End::Replaced => b"agent has a new identity",
        };
        endpoint.close(VarInt::from_u32(0), reason);
        // So that the server sees the end at once; not worth more than a moment.
        let _ = tokio::time::timeout(Duration::from_millis(300), endpoint.wait_idle()).await;
    }
    end
}

/// TLS for QUIC, with netmon's timeouts and a server that may not open streams.
///
/// # Errors
/// When the configuration lacks what QUIC needs.
pub fn quic_config(tls: rustls::ClientConfig) -> Result<quinn::ClientConfig, rustls::Error> {
    let crypto =
        QuicClientConfig::try_from(tls).map_err(|error| rustls::Error::General(error.to_string()))?;
    let mut transport = TransportConfig::default();
    transport
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE.as_millis() as u32))))
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .stream_receive_window(VarInt::from_u32(512 * 1024))
        .receive_window(VarInt::from_u32(512 * 1024))
        .send_window(1024 * 1024);
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport));
    Ok(config)
}

/// A socket that can reach `remote`.
///
/// # Errors
/// What the system says.
pub fn client_endpoint(remote: SocketAddr) -> io::Result<Endpoint> {
    let any = if remote.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    Endpoint::client(SocketAddr::new(any, 0))
}

async fn deliver(
    identity: &Identity,
    spool: &SpoolHandle,
    introduction: &Introduction,
    status: &watch::Sender<UplinkStatus>,
    endpoint: &mut Option<Endpoint>,
) -> std::convert::Infallible {
    let mut outage = Now::read();
    let mut attempt = 0;
    let mut last_error = None;
    loop {
        let since_wall_ns = outage.wall_ns;
        status.send_modify(|status| {
            status.state = UplinkState::Connecting { since_wall_ns, last_error: last_error.take() };
        });
        let error = match connect(identity, endpoint, status).await {
            Err(error) => error,
            Ok((connection, local_port)) => {
                let remote = connection.remote_address();
                let acked_before = status.borrow().acked;
                let mut on_welcome = || {
                    tracing::info!(%remote, backlog = spool.stats().backlog, "connected to the server");
                    let since_wall_ns = Now::read().wall_ns;
                    status.send_modify(|status| {
                        status.state = UplinkState::Connected { remote, local_port, since_wall_ns };
                    });
                };
                let Err(error) = converse(&connection, spool, introduction, status, &mut on_welcome).await;
                connection.close(VarInt::from_u32(1), error.to_string().as_bytes());
                if matches!(status.borrow().state, UplinkState::Connected { .. }) {
                    outage = Now::read();
                }
                // A welcome alone is no progress: a server that hangs up behind it is not to be hammered.
                if status.borrow().acked != acked_before {
                    attempt = 0;
                }
                error
            }
        };
        // Without a random number the room's PCs are spread by their clocks alone.
        let random =
            getrandom::u64().unwrap_or_else(|_| Now::read().boot_ns.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let age = Duration::from_nanos(Now::read().boot_ns.saturating_sub(outage.boot_ns));
        let pause = match error {
            UplinkError::Refused(_) | UplinkError::Identity(_) => backoff::pause_after_refusal(random),
            _ => backoff::pause(attempt, age, random),
        };
        attempt = attempt.saturating_add(1);
        let error = with_causes(&error);
        tracing::warn!(error, retry_in_ms = pause.as_millis() as u64, "not connected to the server");
        let since_wall_ns = outage.wall_ns;
        last_error = Some(error);
        status.send_modify(|status| {
            status.state = UplinkState::Connecting { since_wall_ns, last_error: last_error.clone() };
        });
        tokio::time::sleep(pause).await;
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(this) = cause {
        let part = this.to_string();
        if !text.contains(&part) {
            text = format!("{text}: {part}");
        }
        cause = this.source();
    }
    text
}

async fn connect(
    identity: &Identity,
    slot: &mut Option<Endpoint>,
    status: &watch::Sender<UplinkStatus>,
) -> Result<(quinn::Connection, u16), UplinkError> {
    let config = quic_config(identity.tls()?).map_err(UplinkError::Quic)?;
    let resolve = |source| UplinkError::Resolve { address: identity.address.clone(), source };
    let addresses = tokio::time::timeout(CONNECT, tokio::net::lookup_host(&identity.address))
        .await
        .map_err(|_| resolve(io::ErrorKind::TimedOut.into()))?
        .map_err(resolve)?;
    let mut error = resolve(io::ErrorKind::NotFound.into());
    for remote in addresses {
        // A new socket each time: interfaces come and go.
        let endpoint = match client_endpoint(remote) {
            Ok(endpoint) => slot.insert(endpoint),
            Err(source) => {
                error = UplinkError::Socket(source);
                continue;
            }
        };
        let port = endpoint.local_addr().map_err(UplinkError::Socket)?.port();
        status.send_modify(|status| status.remember((port, remote)));
        let connecting = match endpoint.connect_with(config.clone(), remote, wire::SERVER_NAME) {
            Ok(connecting) => connecting,
            Err(reason) => {
                error = UplinkError::Connect { remote, reason: reason.to_string() };
                continue;
            }
        };
        error = match tokio::time::timeout(CONNECT, connecting).await {
            Ok(Ok(connection)) => return Ok((connection, port)),
            Ok(Err(quinn::ConnectionError::TimedOut)) | Err(_) => UplinkError::Unreachable(remote),
            Ok(Err(reason)) => UplinkError::Connect { remote, reason: reason.to_string() },
        };
    }
    Err(error)
}

async fn converse(
    connection: &quinn::Connection,
    spool: &SpoolHandle,
    introduction: &Introduction,
    status: &watch::Sender<UplinkStatus>,
    on_welcome: &mut (dyn FnMut() + Send),
) -> Result<std::convert::Infallible, UplinkError> {
    let opened = tokio::time::timeout(ANSWER, connection.open_bi()).await.map_err(|_| UplinkError::Stuck)?;
    let (mut send, receive) = opened.map_err(|error| broken(&error))?;
    // Reading a frame must not be interrupted half-way: it has a task of its own, which ends with the connection
    // or with the queue.
    let (queue, mut messages) = mpsc::channel(16);
    tokio::spawn(read_frames(receive, queue));
    let mut changes = spool.changes();
    let mut session = Session::default();
    let mut heard_ns = Now::read().boot_ns;
    loop {
        changes.borrow_and_update();
        if !session.expects_answer() {
            heard_ns = Now::read().boot_ns;
        }
        match session.step(&spool.epochs()) {
            Step::Hello { epoch, oldest_seq } => {
                say_hello(&mut send, introduction, epoch, oldest_seq).await?
            }
            Step::Send { epoch, seq } => {
                let chunk = spool.read(epoch, seq, MAX_BATCH_RECORDS as usize, BATCH_BYTES).await?;
                match chunk {
                    // It was cut or gave way in this moment.
                    None => {}
                    Some(chunk) if chunk.first_seq != seq => {
                        if let Step::Hello { epoch, oldest_seq } = session.skipped(chunk.first_seq) {
                            say_hello(&mut send, introduction, epoch, oldest_seq).await?;
                        }
                    }
                    Some(chunk) => {
                        let mut batch = BatchBuilder::default();
                        let taken = chunk.items.iter().take_while(|item| batch.push(item));
                        let span: u64 = taken.map(Item::span).sum();
                        write(&mut send, &ToServer::Batch(batch.finish(epoch, seq)?)).await?;
                        session.sent(seq + span - 1);
                    }
                }
            }
            Step::Wait => {
                let silent = Duration::from_nanos(Now::read().boot_ns.saturating_sub(heard_ns));
                let message = tokio::select! {
                    message = messages.recv() => message,
                    changed = changes.changed() => match changed {
                        Ok(()) => continue,
                        // The handle that we hold keeps the sender alive.
                        Err(_) => return Err(UplinkError::Broken("the spool is closed".into())),
                    },
                    () = tokio::time::sleep(ANSWER.saturating_sub(silent)), if session.expects_answer() => {
                        return Err(UplinkError::Stuck);
                    }
                };
                let message =
                    message.unwrap_or_else(|| Err(UplinkError::Broken("the stream ended".into())))?;
                heard_ns = Now::read().boot_ns;
                if matches!(message, ToAgent::Welcome { .. }) {
                    on_welcome();
                }
                match session.receive(message, &spool.epochs())? {
                    Effect::None => {}
                    Effect::Acked { epoch, seq } => {
                        spool.acked(epoch, seq).await;
                        status.send_modify(|status| status.acked = Some((epoch, seq)));
                    }
                    Effect::BeginEpoch => {
                        tracing::warn!(
                            "the server knows more of this epoch than the spool: a new one begins"
                        );
                        spool.begin_epoch().await?;
                    }
                    Effect::Refused(reason) => return Err(UplinkError::Refused(reason)),
                }
            }
        }
    }
}

async fn say_hello(
    send: &mut SendStream,
    introduction: &Introduction,
    epoch: u64,
    oldest_seq: u64,
) -> Result<(), UplinkError> {
    let Introduction { agent_version, hostname } = introduction.clone();
    write(
        send,
        &ToServer::Hello(Hello { version: wire::VERSION, agent_version, hostname, epoch, oldest_seq }),
    )
    .await
}

async fn write(send: &mut SendStream, message: &ToServer) -> Result<(), UplinkError> {
    let frame = wire::encode_frame(message)?;
    let written = tokio::time::timeout(ANSWER, send.write_all(&frame)).await;
    written.map_err(|_| UplinkError::Stuck)?.map_err(|error| broken(&error))
}

async fn read_frames(mut receive: RecvStream, queue: mpsc::Sender<Result<ToAgent, UplinkError>>) {
    loop {
        let message = read_frame(&mut receive).await;
        let is_last = message.is_err();
        if queue.send(message).await.is_err() || is_last {
            return;
        }
    }
}

async fn read_frame(receive: &mut RecvStream) -> Result<ToAgent, UplinkError> {
    let mut header = [0; FRAME_HEADER];
    receive.read_exact(&mut header).await.map_err(|error| broken(&error))?;
    let header = FrameHeader::parse(header)?;
    let mut payload = vec![0; header.length];
    receive.read_exact(&mut payload).await.map_err(|error| broken(&error))?;
    Ok(header.decode(&payload)?)
}

fn broken(error: &dyn std::error::Error) -> UplinkError {
    UplinkError::Broken(with_causes(error))
}
