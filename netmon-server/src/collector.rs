//! The event listener: agents say hello, send batches, get acknowledgements.
//!
//! This shell moves frames between QUIC and the [`Writer`]; what a message means is decided in [`crate::ingest`]
//! and [`crate::store`]. An agent that breaks the protocol loses its connection and is counted; the others do
//! not notice.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use netmon_common::raw::Raw;
use netmon_common::wire::{Batch, Hello, MAX_FRAME, ToAgent, ToServer, VERSION, WireError};
use quinn::{Connection, ConnectionError, Endpoint, Incoming, RecvStream, SendStream, VarInt};
use rustls::pki_types::CertificateDer;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::admission::{Gate, Place};
use crate::frames::{self, FrameError};
use crate::ingest::{self, Fault};
use crate::store::{self, Agent, AgentId, BatchOutcome};
use crate::tls::{HANDSHAKE_TIME, escaped, shown};
use crate::writer::{Unavailable, Writer};
use crate::{ca, clock};

/// Agents at once: forty rooms of a hundred PCs.
const MAX_CONNECTIONS: usize = 4096;
/// Handshakes at once, of peers that may be anybody: they take no agent's place.
const MAX_HANDSHAKES: usize = 1024;
/// Handshakes at once from one IP address: a PC has one, some more share an address.
const MAX_HANDSHAKES_PER_ADDRESS: usize = 16;
/// Refused connections that are not in the log yet are there after this time.
pub(crate) const REFUSALS_TIME: Duration = Duration::from_secs(1);
/// Hellos on one connection: one for each spool that an agent ever had, and no more holes than that.
const MAX_HELLOS: u32 = 256;
/// From the end of the handshake to the first hello.
const HELLO_TIME: Duration = Duration::from_secs(5);
/// For a last frame to reach the agent before the connection is closed.
const LAST_WORD_TIME: Duration = Duration::from_secs(1);
/// For connections to end when the server stops.
const STOP_TIME: Duration = Duration::from_secs(5);

/// Application close codes, for whoever reads a packet trace; the reason beside them is for people.
mod code {
    /// The server stops, or the conversation is over.
    pub const DONE: u32 = 0;
    /// The agent may not deliver.
    pub const REFUSED: u32 = 1;
    /// The agent broke the protocol.
    pub const FAULT: u32 = 2;
    /// The store takes nothing now.
    pub const UNAVAILABLE: u32 = 3;
    /// The same identity connected again.
    pub const REPLACED: u32 = 4;
}

/// Why a conversation ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("the agent ended the conversation")]
    Finished,
    #[error("the connection is gone")]
    Lost,
    #[error("the server is stopping")]
    Stopping,
    #[error("{0}")]
    Refused(String),
    #[error("protocol error: {0}")]
    Fault(String),
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
}

impl From<FrameError> for End {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Read(_) | FrameError::Write(_) => Self::Lost,
            FrameError::Wire(_) | FrameError::Slow => Self::Fault(error.to_string()),
        }
    }
}

impl From<WireError> for End {
    fn from(error: WireError) -> Self {
        Self::Fault(error.to_string())
    }
}

impl From<Fault> for End {
    fn from(fault: Fault) -> Self {
        if fault == Fault::Epochs {
            return Self::Refused(fault.to_string());
        }
        let cause = std::error::Error::source(&fault).map(|cause| format!(": {cause}")).unwrap_or_default();
        Self::Fault(format!("{fault}{cause}"))
    }
}

/// What all connections share.
pub struct Collector {
    writer: Writer,
    live: Mutex<HashMap<AgentId, Live>>,
    connections: AtomicU64,
    faults: AtomicU64,
}

struct Live {
    number: u64,
    connection: Connection,
}

impl Collector {
    /// A collector that stores through `writer`.
    pub fn new(writer: Writer) -> Self {
        Self { writer, live: Mutex::default(), connections: AtomicU64::new(1), faults: AtomicU64::new(0) }
    }

    /// Serves agents until `stop` becomes true, then ends their conversations after the batch at hand. Whenever
    /// `allow_list_changed` is notified, connections of revoked agents are closed.
    pub async fn run(
        self: Arc<Self>,
        endpoint: Endpoint,
        mut stop: watch::Receiver<bool>,
        allow_list_changed: Arc<Notify>,
    ) {
        let gate = Gate::new("events", MAX_HANDSHAKES_PER_ADDRESS, MAX_HANDSHAKES);
        let mut tasks = JoinSet::new();
        loop {
            let incoming = tokio::select! {
                () = stopping(&mut stop) => break,
                () = allow_list_changed.notified() => { self.close_revoked().await; continue }
                Some(_) = tasks.join_next() => continue,
                () = sleep(REFUSALS_TIME), if gate.has_unsaid() => { gate.say_refusals(clock::wall_ns()); continue }
                incoming = endpoint.accept() => incoming,
            };
            let Some(incoming) = incoming else { break };
            // Whoever is not in a handshake is an agent.
            let has_room = tasks.len() < MAX_CONNECTIONS + MAX_HANDSHAKES;
            if let Some((incoming, place)) = gate.admit(incoming, has_room, clock::wall_ns()) {
                tasks.spawn(self.clone().serve(incoming, place, stop.clone()));
            }
        }
        let ended = timeout(STOP_TIME, async { while tasks.join_next().await.is_some() {} }).await;
        if ended.is_err() {
            tracing::warn!(connections = tasks.len(), "connections did not end in time");
        }
    }

    async fn serve(self: Arc<Self>, incoming: Incoming, place: Place, stop: watch::Receiver<bool>) {
        let address = shown(incoming.remote_address());
        let Ok(connecting) = incoming.accept() else { return };
        let connection = match timeout(HANDSHAKE_TIME, connecting).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => {
                return tracing::info!(%address, error = %escaped(error), "refused in the handshake");
            }
            Err(_) => return tracing::info!(%address, "the handshake took too long"),
        };
        let agent = match self.identify(&connection).await {
            Ok(agent) => agent,
            Err(end) => {
                tracing::warn!(%address, reason = %end, "connection refused");
                return say_goodbye(&connection, None, &end).await;
            }
        };
        drop(place);
        let number = self.connections.fetch_add(1, Ordering::Relaxed);
        self.register(&agent, number, &connection);
        let mut conversation =
            Conversation { collector: &self, agent: &agent, number, epoch: None, hellos: 0, address, stop };
        let mut stream = None;
        let end = match conversation.run(&connection, &mut stream).await {
            Ok(never) => match never {},
            Err(end) => end,
        };
        let seat = &agent.seat;
        match &end {
            End::Fault(reason) => {
                let faults = self.faults.fetch_add(1, Ordering::Relaxed) + 1;
                tracing::warn!(seat, %address, reason, faults, "agent broke the protocol, connection closed");
            }
            End::Lost => {
                let reason = connection.close_reason().map_or_else(String::new, escaped);
                tracing::info!(seat, %address, %reason, "agent disconnected");
            }
            end => tracing::info!(seat, %address, reason = %end, "agent disconnected"),
        }
        say_goodbye(&connection, stream, &end).await;
        self.unregister(agent.id, number);
        let now = clock::wall_ns();
        let id = agent.id;
        // Where the store takes nothing, "last seen" is the newest record.
        let _ = self.writer.run(None, move |conn| store::disconnected(conn, id, number, now)).await;
    }

    /// The agent behind a connection: its certificate's key must be on the allow-list.
    async fn identify(&self, connection: &Connection) -> Result<Agent, End> {
        let chain = connection.peer_identity().and_then(|any| any.downcast::<Vec<CertificateDer<'_>>>().ok());
        let key = chain.as_deref().and_then(|chain| chain.first()).map(ca::spki_sha256_of);
        let Some(Ok(key)) = key else {
            return Err(End::Refused("no certificate was shown that can be read".into()));
        };
        let known = self.writer.run(None, move |conn| store::agent_by_key(conn, &key)).await?;
        match known {
            Some(agent) if agent.revoked_ns.is_none() => Ok(agent),
            Some(agent) => Err(revoked(&agent.seat)),
            None => Err(End::Refused("this server does not know this agent's key; enrol again".into())),
        }
    }

    /// The newest connection of an identity is the one that counts.
    fn register(&self, agent: &Agent, number: u64, connection: &Connection) {
        let live = Live { number, connection: connection.clone() };
        let mut all = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(older) = all.insert(agent.id, live) else { return };
        drop(all);
        tracing::warn!(
            seat = agent.seat,
            older = %shown(older.connection.remote_address()),
            newer = %shown(connection.remote_address()),
            "the same identity connected again: the older connection is closed"
        );
        older.connection.close(code::REPLACED.into(), b"the same identity connected again");
    }

    fn unregister(&self, id: AgentId, number: u64) {
        let mut all = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        if all.get(&id).is_some_and(|live| live.number == number) {
            all.remove(&id);
        }
    }

    async fn close_revoked(&self) {
        let Ok(revoked) = self.writer.run(None, store::revoked_connections).await else { return };
        let all = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        for (id, number) in revoked {
            if let Some(live) = all.get(&id).filter(|live| live.number == number) {
                live.connection.close(code::REFUSED.into(), b"this agent was revoked");
            }
        }
    }
}

/// Waits until the server stops.
pub(crate) async fn stopping(stop: &mut watch::Receiver<bool>) {
    // An error says that whoever could stop it is gone: the same.
    let _ = stop.wait_for(|stop| *stop).await;
}

fn revoked(seat: &str) -> End {
    End::Refused(format!("seat {seat} was revoked at the server; enrol again to deliver"))
}

/// Tells the agent why, then closes.
async fn say_goodbye(connection: &Connection, stream: Option<SendStream>, end: &End) {
    let (code, reason) = match end {
        End::Lost => return,
        End::Finished | End::Stopping => (code::DONE, end.to_string()),
        End::Refused(_) => (code::REFUSED, end.to_string()),
        End::Fault(_) => (code::FAULT, end.to_string()),
        End::Unavailable(_) => (code::UNAVAILABLE, end.to_string()),
    };
    if let End::Refused(reason) = end {
        // An agent that does not read it finds the reason in the close.
        let _ = timeout(LAST_WORD_TIME, refuse(connection, stream, reason)).await;
    }
    connection.close(VarInt::from_u32(code), reason.as_bytes());
}

async fn refuse(connection: &Connection, stream: Option<SendStream>, reason: &str) -> Result<(), FrameError> {
    let mut send = match stream {
        Some(send) => send,
        None => match connection.accept_bi().await {
            Ok((send, _)) => send,
            Err(_) => return Ok(()),
        },
    };
    frames::write(&mut send, &ToAgent::Refused { reason: Raw::new(reason) }).await?;
    if send.finish().is_ok() {
        // Returns when the agent has it all, or is gone.
        let _ = send.stopped().await;
    }
    Ok(())
}

/// One agent's conversation.
struct Conversation<'a> {
    collector: &'a Collector,
    agent: &'a Agent,
    number: u64,
    /// Of the last hello.
    epoch: Option<u64>,
    hellos: u32,
    address: std::net::SocketAddr,
    stop: watch::Receiver<bool>,
}

impl Conversation<'_> {
    async fn run(
        &mut self,
        connection: &Connection,
        stream: &mut Option<SendStream>,
    ) -> Result<std::convert::Infallible, End> {
        let late = |_| End::Fault(format!("no hello within {} s", HELLO_TIME.as_secs()));
        let accepted = timeout(HELLO_TIME, connection.accept_bi()).await.map_err(late)?;
        let (send, mut recv) = accepted.map_err(|_: ConnectionError| End::Lost)?;
        let send = stream.insert(send);
        let first = timeout(HELLO_TIME, self.next(&mut recv)).await.map_err(late)??;
        let mut answer = self.answer(first).await?;
        loop {
            frames::write(send, &answer).await?;
            let message = self.next(&mut recv).await?;
            answer = self.answer(message).await?;
        }
    }

    async fn next(&mut self, recv: &mut RecvStream) -> Result<ToServer, End> {
        tokio::select! {
            biased;
            () = stopping(&mut self.stop) => Err(End::Stopping),
            message = frames::read(recv, MAX_FRAME) => message?.ok_or(End::Finished),
        }
    }

    async fn answer(&mut self, message: ToServer) -> Result<ToAgent, End> {
        match message {
            ToServer::Hello(hello) => self.hello(hello).await,
            ToServer::Batch(batch) => self.batch(batch).await,
            ToServer::About(_) | ToServer::Heartbeat(_) | ToServer::Renew { .. } => {
                Err(End::Fault("a message that has no place here".into()))
            }
        }
    }

    async fn hello(&mut self, hello: Hello) -> Result<ToAgent, End> {
        if hello.version != VERSION {
            return Err(End::Refused(format!(
                "the agent speaks version {} of the protocol, this server {VERSION}; install the same netmon on both",
                hello.version
            )));
        }
        self.hellos += 1;
        if self.hellos > MAX_HELLOS {
            return Err(End::Fault(format!("more than {MAX_HELLOS} hellos on one connection")));
        }
        let (id, number, now) = (self.agent.id, self.number, clock::wall_ns());
        let Hello { epoch, oldest_seq, hostname, agent_version, .. } = hello;
        let opened = self.collector.writer.run(Some(id), move |conn| {
            if !store::is_allowed(conn, id)? {
                return Ok(None);
            }
            store::connected(conn, id, number, hostname.as_bytes(), agent_version.as_bytes(), now)?;
            store::open_epoch(conn, id, epoch, oldest_seq, now).map(Some)
        });
        let next_seq = opened.await?.ok_or_else(|| revoked(&self.agent.seat))??;
        let (seat, address) = (&self.agent.seat, self.address);
        if self.epoch.replace(epoch).is_none() {
            tracing::info!(seat, %address, epoch, oldest_seq, next_seq, "agent connected");
        } else {
            tracing::debug!(seat, %address, epoch, oldest_seq, next_seq, "agent goes on with another epoch");
        }
        Ok(ToAgent::Welcome { version: VERSION, next_seq })
    }

    async fn batch(&mut self, batch: Batch) -> Result<ToAgent, End> {
        let (id, now) = (self.agent.id, clock::wall_ns());
        let (epoch, first_seq) = (batch.epoch, batch.first_seq);
        if self.epoch != Some(epoch) {
            return Err(End::Fault(format!("a batch of epoch {epoch:x} without a hello for it")));
        }
        let records = ingest::check(first_seq, batch.unpack()?)?;
        let stored = self.collector.writer.run(Some(id), move |conn| {
            if !store::is_allowed(conn, id)? {
                return Ok(None);
            }
            store::append(conn, id, epoch, first_seq, &records, now).map(Some)
        });
        match stored.await?.ok_or_else(|| revoked(&self.agent.seat))? {
            BatchOutcome::Stored { through, new } => {
                tracing::debug!(seat = self.agent.seat, epoch, through, new, "stored");
                Ok(ToAgent::Ack { epoch, seq: through })
            }
            BatchOutcome::Resume { next_seq } => Ok(ToAgent::Resume { next_seq }),
            BatchOutcome::Rewritten { seq } => Err(End::Fault(format!(
                "record {seq} came before with other content: the spool was set back; it needs a new epoch"
            ))),
        }
    }
}
