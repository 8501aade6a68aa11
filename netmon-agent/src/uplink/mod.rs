//! Brings the spool's records to the server.
//!
//! * [`session`]: what to say next, pure
//! * [`conversation`]: saying it on a connection
//! * [`backoff`]: when to try again, pure
//! * [`run`]: the QUIC connection around them
//! * [`run_whenever_enrolled`]: the same for whatever identity this PC has at the time

pub mod backoff;
mod conversation;
pub mod session;

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use netmon_common::raw::{Escaped, Raw};
use netmon_common::wire::{self, Heartbeat, WireError};
use quinn::crypto::rustls::{HandshakeData, QuicClientConfig};
use quinn::{Endpoint, IdleTimeout, TransportConfig, VarInt};
use tokio::sync::watch;

use crate::clock::Now;
use crate::identity::{Identity, IdentityError};
use crate::spool::{SpoolError, SpoolHandle};
use crate::trust::Trust;
use conversation::Conversation;
use session::Violation;

/// Sent when nothing else is: holds NAT bindings open and notices a dead peer within [`IDLE`].
const KEEP_ALIVE: Duration = Duration::from_secs(3);
/// A peer that was silent for so long is gone. A server that was killed and started again says so itself (stateless reset);
/// one of the version before does not.
const IDLE: Duration = Duration::from_millis(10_000);
/// Longest wait for a connection to one address.
const CONNECT: Duration = Duration::from_secs(10);
/// Longest wait for a welcome or an ack. Far above a commit (0.1 s), so that only a stuck server is left.
const ANSWER: Duration = Duration::from_secs(30);
/// Longest time that a stopping agent tries to deliver what is left.
const FAREWELL: Duration = Duration::from_secs(2);
/// How often a stored identity is looked for: one that came, changed or was repaired.
const LOOK: Duration = Duration::from_secs(2);
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
    /// The handshake agreed on no version of the protocol.
    #[error("the server speaks no version of the protocol that this agent speaks; update the older one")]
    NoVersion,
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
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: [u8; 16],
    /// How often the agent had been started with its spool.
    pub run: u32,
    /// The run before this one did not end in good order.
    pub previous_died: bool,
    /// A random number of this process.
    pub instance: u64,
}

/// What the uplink is told by the rest of the agent.
#[derive(Clone)]
pub struct Sources {
    /// What is to be delivered.
    pub spool: SpoolHandle,
    /// The newest "still watching", from the loop that watches.
    pub heartbeat: watch::Receiver<Heartbeat>,
    /// How this agent presents itself.
    pub introduction: Introduction,
}

/// Delivers as whoever this PC is enrolled as at the time: `directory` holds the identity (see [`Identity::load`]) and
/// may be filled, changed or repaired meanwhile. Ends when `shutdown` becomes true (or its sender is gone), after at
/// most [`FAREWELL`] more for what the spool has synced by then. Errors never end it; they are logged and shown in
/// `status`.
pub async fn run_whenever_enrolled(
    directory: &Path,
    sources: Sources,
    mut shutdown: watch::Receiver<bool>,
    status: watch::Sender<UplinkStatus>,
) {
    let mut connects = 0;
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
                let identity = Enrolled { identity, directory };
                match run_until(replaced, &identity, &sources, &mut connects, &mut shutdown, &status).await {
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

/// An identity, and where it is stored.
struct Enrolled<'a> {
    identity: Identity,
    directory: &'a Path,
}

/// Why a delivery ended.
enum End {
    Stop,
    Replaced,
}

async fn run_until(
    replaced: impl Future<Output = ()>,
    identity: &Enrolled<'_>,
    sources: &Sources,
    connects: &mut u32,
    shutdown: &mut watch::Receiver<bool>,
    status: &watch::Sender<UplinkStatus>,
) -> End {
    let mut endpoint = None;
    let spool = &sources.spool;
    let end = {
        let deliver = deliver(identity, sources, connects, status, &mut endpoint);
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
    identity: &Enrolled<'_>,
    sources: &Sources,
    connects: &mut u32,
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
                *connects = connects.saturating_add(1);
                let remote = connection.remote_address();
                let acked_before = status.borrow().acked;
                let mut on_welcome = || {
                    tracing::info!(%remote, backlog = sources.spool.stats().backlog, "connected to the server");
                    let since_wall_ns = Now::read().wall_ns;
                    status.send_modify(|status| {
                        status.state = UplinkState::Connected { remote, local_port, since_wall_ns };
                    });
                };
                let conversation = Conversation { connection: &connection, identity, sources, status };
                let Err(error) = conversation.run(*connects, &mut on_welcome).await;
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
            UplinkError::Refused(_) | UplinkError::Identity(_) | UplinkError::NoVersion => {
                backoff::pause_after_refusal(random)
            }
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

/// For one line: whoever answers at the server's address may have had a hand in it.
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
    Escaped(text.as_bytes()).to_string()
}

async fn connect(
    enrolled: &Enrolled<'_>,
    slot: &mut Option<Endpoint>,
    status: &watch::Sender<UplinkStatus>,
) -> Result<(quinn::Connection, u16), UplinkError> {
    let Enrolled { identity, directory } = enrolled;
    let trust = Trust::load(directory, &identity.agent);
    let config = quic_config(identity.tls(trust.server_ns)?).map_err(UplinkError::Quic)?;
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

/// The version of the protocol that the handshake agreed on.
fn version(connection: &quinn::Connection) -> Option<u16> {
    let data = connection.handshake_data()?.downcast::<HandshakeData>().ok()?;
    wire::version(data.protocol.as_deref()?)
}

fn broken(error: &dyn std::error::Error) -> UplinkError {
    UplinkError::Broken(with_causes(error))
}
