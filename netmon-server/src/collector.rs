//! The event listener: agents say hello, send batches, get acknowledgements.
//!
//! This shell moves frames between QUIC and the [`Writer`]; what a frame means is decided in [`crate::conversation`]. An
//! agent that breaks the protocol loses its connection, and is kept out for a while when it does so again and again; one
//! that sends more than its share is read more slowly. The others do not notice.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use netmon_common::logline;
use netmon_common::raw::Raw;
use netmon_common::wire::{self, Checkpoint, Heartbeat, MAX_FRAME, ToAgent, ToServer, WINDOW};
use quinn::crypto::rustls::HandshakeData;
use quinn::{Connection, ConnectionError, Endpoint, Incoming, RecvStream, SendStream, VarInt};
use rustls::pki_types::CertificateDer;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use crate::admission::{Gate, Place, Places};
use crate::ca::{self, AGENT_GRACE, AGENT_LIFETIME, AgentKey, Ca};
use crate::chain;
use crate::clock::{self, Now};
use crate::clones::Callers;
use crate::conversation::{Action, Applied, Conversation, Stop, Work, refusal, revoked};
use crate::frames::{self, FrameError};
use crate::lanes::LIGHT_COST;
use crate::limits::{Bucket, Buckets, CALLS, GUEST_CALLS, HEARTBEATS, Share, Strikes};
use crate::notice::Notice;
use crate::presence::{Life, Presence};
use crate::signing::LogKey;
use crate::store::history::{self, Unsigned};
use crate::store::{self, Agent, AgentId};
use crate::tls::{HANDSHAKE_TIME, escaped, shown};
use crate::writer::{Unavailable, Writer};

/// Agents at once: forty rooms of a hundred PCs.
const MAX_CONNECTIONS: usize = 4096;
/// Handshakes at once, of peers that may be anybody: they take no agent's place. Half of them are for addresses from which an
/// agent called before.
const MAX_HANDSHAKES: usize = 1024;
/// Handshakes at once from one IP address: a PC has one, some more share an address.
const MAX_HANDSHAKES_PER_ADDRESS: usize = 16;
/// Refused connections that are not in the log yet are there after this time.
pub(crate) const REFUSALS_TIME: Duration = Duration::from_secs(1);
/// From the end of the handshake to the first frame.
const HELLO_TIME: Duration = Duration::from_secs(5);
/// For a last frame to reach the agent before the connection is closed.
const LAST_WORD_TIME: Duration = Duration::from_secs(1);
/// For connections to end when the server stops.
const STOP_TIME: Duration = Duration::from_secs(5);
/// For an answer to be taken by an agent.
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// Batches of all agents together that are unpacked and wait for the store, and as many again of few records: 32 MiB at most.
const UNPACKED_BATCHES: usize = 64;
/// Who is missing is looked at this often.
const TICK: Duration = Duration::from_secs(1);
/// How who was heard is saved this often, in ticks.
const SAVE_TICKS: u64 = 5;
/// A history that grew is signed after this time, in ticks.
const SIGN_TICKS: u64 = 60;
/// Notices that wait for a store that takes nothing.
const MAX_NOTICES: usize = 10_000;
/// A request for a certificate, in records of an agent's share.
const RENEWAL_COST: u64 = 100;
/// What an agent can bring about by connecting (a clone, a strange signature) is said once in this time, boot clock.
const SAY_AGAIN_NS: u64 = 60_000_000_000;

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
    #[error(transparent)]
    Stop(#[from] Stop),
    #[error("this agent calls too often")]
    Often,
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
}

impl From<FrameError> for End {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Read(_) | FrameError::Write(_) => Self::Lost,
            FrameError::Wire(_) | FrameError::Slow => fault(error.to_string()),
        }
    }
}

fn fault(reason: impl Into<String>) -> End {
    End::Stop(Stop::Fault(reason.into()))
}

fn refused(reason: impl Into<String>) -> End {
    End::Stop(Stop::Refused(reason.into()))
}

/// What all connections share.
pub struct Collector {
    writer: Writer,
    ca: Arc<Ca>,
    log_key: LogKey,
    live: Mutex<HashMap<AgentId, Live>>,
    agents: Mutex<HashMap<AgentId, Known>>,
    presence: Mutex<Presence>,
    /// What is to be added to the histories, with the time of its noticing.
    notices: Mutex<Vec<(AgentId, Notice, i64)>>,
    noticed: Notify,
    /// By the key of a certificate (only those that this server's CA signed come so far) and the address: a copy of an
    /// identity does not keep its owner out.
    calls: Mutex<Buckets<([u8; 32], IpAddr)>>,
    /// Room for batches of many records.
    unpacked: Arc<Semaphore>,
    /// Room for batches of few records.
    unpacked_small: Arc<Semaphore>,
    connections: AtomicU64,
    faults: AtomicU64,
}

struct Live {
    number: u64,
    version: u16,
    connection: Connection,
}

/// How many heartbeats an agent may say.
struct Heartbeats(Bucket);

impl Default for Heartbeats {
    fn default() -> Self {
        Self(HEARTBEATS.bucket())
    }
}

/// What outlives an agent's connections.
#[derive(Default)]
struct Known {
    share: Share,
    heartbeats: Heartbeats,
    strikes: Strikes,
    callers: Callers,
    /// When it was said last that it was cloned, boot clock.
    cloned_ns: Option<u64>,
    /// When it was said last that it showed a signature that is not this server's, boot clock.
    strange_ns: Option<u64>,
    /// The newest one.
    checkpoint: Option<Checkpoint>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that is held under these locks is left half done by a panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Collector {
    /// A collector that stores through `writer`, renews certificates with `ca` and signs histories with `log_key`.
    pub fn new(writer: Writer, ca: Arc<Ca>, log_key: LogKey, presence: Presence) -> Self {
        Self {
            writer,
            ca,
            log_key,
            live: Mutex::default(),
            agents: Mutex::default(),
            presence: Mutex::new(presence),
            notices: Mutex::default(),
            noticed: Notify::new(),
            calls: Mutex::new(Buckets::new(CALLS)),
            unpacked: Arc::new(Semaphore::new(UNPACKED_BATCHES)),
            unpacked_small: Arc::new(Semaphore::new(UNPACKED_BATCHES)),
            connections: AtomicU64::new(1),
            faults: AtomicU64::new(0),
        }
    }

    /// Serves agents until `stop` becomes true, then ends their conversations after the batches at hand. Whenever
    /// `allow_list_changed` is notified, connections of revoked agents are closed.
    pub async fn run(
        self: Arc<Self>,
        endpoint: Endpoint,
        mut stop: watch::Receiver<bool>,
        allow_list_changed: Arc<Notify>,
    ) {
        let gate = Gate::new(
            "events",
            Places {
                per_address: MAX_HANDSHAKES_PER_ADDRESS,
                total: MAX_HANDSHAKES,
                reserved: MAX_HANDSHAKES / 2,
            },
            GUEST_CALLS,
        );
        let (ended, end) = watch::channel(false);
        let noting = tokio::spawn(self.clone().note(end.clone()));
        let keeping = tokio::spawn(self.clone().keep(end, allow_list_changed));
        let mut tasks = JoinSet::new();
        loop {
            let incoming = tokio::select! {
                () = stopping(&mut stop) => break,
                Some(_) = tasks.join_next() => continue,
                () = sleep(REFUSALS_TIME), if gate.has_unsaid() => { gate.say_refusals(clock::wall_ns()); continue }
                incoming = endpoint.accept() => incoming,
            };
            let Some(incoming) = incoming else { break };
            // Whoever is not in a handshake is an agent.
            let has_room = tasks.len() < MAX_CONNECTIONS + MAX_HANDSHAKES;
            if let Some((incoming, place)) = gate.admit(incoming, has_room, Now::read()) {
                tasks.spawn(self.clone().serve(incoming, place, stop.clone()));
            }
        }
        let all_ended = timeout(STOP_TIME, async { while tasks.join_next().await.is_some() {} }).await;
        if all_ended.is_err() {
            tracing::warn!(connections = tasks.len(), "connections did not end in time");
        }
        ended.send_replace(true);
        if noting.await.is_err() || keeping.await.is_err() {
            tracing::error!("who was heard and what is signed could not be saved");
        }
        // Behind the last notices, so that they are covered.
        self.sign().await;
    }

    /// Adds what is noticed to the histories.
    async fn note(self: Arc<Self>, mut end: watch::Receiver<bool>) {
        loop {
            tokio::select! {
                () = stopping(&mut end) => break,
                () = self.noticed.notified() => self.write_notices().await,
            }
        }
        self.write_notices().await;
        let lost = lock(&self.notices).len();
        if lost > 0 {
            tracing::error!(lost, "the store takes nothing: what was noticed is not in the histories");
        }
    }

    /// What is done beside the connections: who is missing, notices, checkpoints, revocations.
    async fn keep(self: Arc<Self>, mut end: watch::Receiver<bool>, allow_list_changed: Arc<Notify>) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut tick = 0;
        loop {
            tokio::select! {
                () = stopping(&mut end) => break,
                () = allow_list_changed.notified() => self.close_revoked().await,
                _ = ticks.tick() => {
                    tick += 1;
                    self.look_for_missing();
                    if tick % SAVE_TICKS == 0 {
                        self.save_presence().await;
                    }
                    if tick % SIGN_TICKS == 0 {
                        self.sign().await;
                    }
                }
            }
        }
        self.save_presence().await;
    }

    fn look_for_missing(&self) {
        let now = Now::read();
        let mut presence = lock(&self.presence);
        // Agents of the version before send no heartbeats: their connection is their sign of life.
        for (id, live) in lock(&self.live).iter().filter(|(_, live)| live.version == 1) {
            if live.connection.close_reason().is_none() {
                presence.heard(*id, &now);
            }
        }
        for (agent, notice) in presence.tick(&now) {
            self.notice(agent, notice, now.wall_ns);
        }
    }

    fn notice(&self, agent: AgentId, notice: Notice, now_ns: i64) {
        let mut notices = lock(&self.notices);
        if notices.len() < MAX_NOTICES {
            notices.push((agent, notice, now_ns));
            self.noticed.notify_one();
        } else {
            tracing::error!(agent = agent.0, ?notice, "the store takes nothing: this is in no history");
        }
    }

    /// Adds what was noticed so far, in one step. What the store does not take waits for the next time, in its order.
    async fn write_notices(&self) {
        let notices = std::mem::take(&mut *lock(&self.notices));
        if notices.is_empty() {
            return;
        }
        let seen: Vec<_> = {
            let presence = lock(&self.presence);
            notices.iter().filter_map(|(agent, ..)| Some((*agent, presence.get(*agent)?.clone()))).collect()
        };
        let kept = notices.clone();
        let work = move |conn: &rusqlite::Connection| {
            for (agent, notice, at_ns) in &kept {
                history::add_notice(conn, *agent, notice, *at_ns)?;
            }
            // `agents` shows it at once.
            seen.iter().try_for_each(|(agent, seen)| store::save_presence(conn, *agent, seen))
        };
        let agents: Vec<_> = notices.iter().map(|(agent, ..)| *agent).collect();
        if self.writer.run(None, work).await.is_err() {
            lock(&self.notices).splice(0..0, notices);
            return;
        }
        // Their readable logs follow.
        for agent in agents {
            let _ = self.writer.begin(Some(agent), 1, |_| Ok(())).await;
        }
    }

    async fn save_presence(&self) {
        let changed = lock(&self.presence).take_changed();
        let now_ns = clock::wall_ns();
        let work = move |conn: &rusqlite::Connection| {
            changed.iter().try_for_each(|(agent, seen)| store::save_presence(conn, *agent, seen))?;
            store::save_alive(conn, now_ns)
        };
        // Where the store takes nothing, its own log says so; what is heard next is saved then.
        let _ = self.writer.run(None, work).await;
        if !lock(&self.notices).is_empty() {
            self.noticed.notify_one();
        }
    }

    /// Signs every history that grew, but for one that lacks what was signed before: somebody else wrote to the store.
    async fn sign(&self) {
        let now_ns = clock::wall_ns();
        let signed_before: BTreeMap<_, _> = lock(&self.agents)
            .iter()
            .filter_map(|(agent, known)| Some((*agent, known.checkpoint.clone()?)))
            .collect();
        let look = move |conn: &rusqlite::Connection| {
            let (mut unsigned, mut changed) = (Vec::new(), Vec::new());
            for history in history::unsigned(conn)? {
                let before = signed_before.get(&history.agent);
                match before {
                    Some(before) if !history::has_checkpoint(conn, history.agent, before)? => {
                        store::add_set_back(conn, history.agent, before, now_ns)?;
                        changed.push(history.agent);
                    }
                    _ => unsigned.push(history),
                }
            }
            Ok((unsigned, changed))
        };
        let Ok((unsigned, changed)) = self.writer.run(None, look).await else { return };
        for agent in changed {
            tracing::error!(
                agent = agent.0,
                "this history was changed or set back behind the server's back: it is not signed any more; \
                 `netmon-server verify` says more"
            );
        }
        let mut signed = Vec::new();
        for Unsigned { agent, uuid, size, head } in unsigned {
            match self.log_key.sign(&uuid, size, head, now_ns) {
                Ok(checkpoint) => signed.push((agent, checkpoint)),
                Err(error) => return tracing::error!(%error, "histories cannot be signed"),
            }
        }
        let kept = signed.clone();
        let work = move |conn: &rusqlite::Connection| {
            kept.iter().try_for_each(|(agent, checkpoint)| history::add_checkpoint(conn, *agent, checkpoint))
        };
        if self.writer.run(None, work).await.is_ok() {
            let mut agents = lock(&self.agents);
            for (agent, checkpoint) in signed {
                agents.entry(agent).or_default().checkpoint = Some(checkpoint);
            }
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
        let number = self.connections.fetch_add(1, Ordering::Relaxed);
        let (agent, version, expires_ns) = match self.identify(&connection).await {
            Ok(identified) => identified,
            Err(end) => {
                tracing::warn!(%address, reason = %end, "connection refused");
                return say_goodbye(&connection, None, &end).await;
            }
        };
        place.vouch(agent.uuid);
        drop(place);
        if !self.register(&agent, number, version, &connection) {
            return connection.close(code::REPLACED.into(), b"the same identity connected again");
        }
        if version == 1 {
            self.has_connected(&agent, None);
        }
        let conversation = Conversation::new(&agent, number, version);
        let mut talk = Talk {
            collector: &self,
            agent: &agent,
            conversation,
            number,
            address,
            expires_ns,
            said: 0,
            pause: Duration::ZERO,
        };
        let (end, stream) = talk.run(&connection, stop).await;
        let seat = &agent.seat;
        match &end {
            End::Stop(Stop::Fault(reason)) => {
                let faults = self.faults.fetch_add(1, Ordering::Relaxed) + 1;
                tracing::warn!(seat, %address, reason, faults, "agent broke the protocol, connection closed");
                self.strike(&agent, reason).await;
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
        // Behind what its connection brought.
        let _ = self.writer.run(Some(id), move |conn| store::disconnected(conn, id, number, now)).await;
    }

    /// The agent behind a connection: its certificate's key must be on the allow-list. With it the version that the
    /// handshake agreed on, and the end of the certificate's validity.
    async fn identify(&self, connection: &Connection) -> Result<(Agent, u16, i64), End> {
        let data = connection.handshake_data().and_then(|any| any.downcast::<HandshakeData>().ok());
        let version = data.and_then(|data| wire::version(data.protocol.as_deref()?));
        let version = version.ok_or_else(|| refused("no version of the protocol was agreed on"))?;
        let chain = connection.peer_identity().and_then(|any| any.downcast::<Vec<CertificateDer<'_>>>().ok());
        let certificate = chain.as_deref().and_then(|chain| chain.first());
        let known = certificate.and_then(|certificate| {
            Some((ca::spki_sha256_of(certificate).ok()?, ca::not_after(certificate).ok()?))
        });
        let (key, not_after) = known.ok_or_else(|| refused("no certificate was shown that can be read"))?;
        let address = shown(connection.remote_address()).ip();
        // Before the store is asked: what is answered from it costs everybody.
        if !lock(&self.calls).try_take((key, address), Now::read().boot_ns) {
            // Not refused: that would keep it away for longer than it takes to be missing.
            return Err(End::Often);
        }
        let now_ns = clock::wall_ns();
        let expires_ns = not_after.saturating_mul(1_000_000_000);
        let known = self.writer.run(None, move |conn| {
            let Some(agent) = store::agent_by_key(conn, &key)? else { return Ok(None) };
            store::used_key(conn, agent.id, &key)?;
            let was_introduced = store::was_introduced(conn, agent.id)?;
            Ok(Some((history::newest_checkpoint(conn, agent.id)?, was_introduced, agent)))
        });
        let Some((checkpoint, was_introduced, agent)) = known.await? else {
            let ended = self.writer.run(None, move |conn| store::agent_by_ended_key(conn, &key)).await?;
            let ended =
                ended.ok_or_else(|| refused("this server does not know this agent's key; enrol again"))?;
            self.notice_clone(
                &ended,
                shown(connection.remote_address()),
                "with a key that a renewed one had replaced",
            );
            return Err(refused(
                "this agent's key was replaced by the one of a renewed certificate: there is a copy of its identity, or \
                 its disk was set back to an older image; enrol again",
            ));
        };
        {
            // What was signed once stays signed, whatever the store says.
            let mut agents = lock(&self.agents);
            let known = &mut agents.entry(agent.id).or_default().checkpoint;
            let signed = known.as_ref().map_or(0, |known| known.size);
            *known = checkpoint.filter(|newest| newest.size > signed).or(known.take());
        }
        let zone = jiff::tz::TimeZone::system();
        if agent.revoked_ns.is_some() {
            return Err(revoked(&agent.seat).into());
        }
        if version == 1 && was_introduced {
            // It has no introduction, which tells two machines apart, and no heartbeats.
            return Err(refused(
                "this agent spoke version 2 of the protocol before, and version 1 does not say whether it watches; \
                 install the newer netmon-agent again",
            ));
        }
        if now_ns.saturating_sub(expires_ns) > AGENT_GRACE.as_nanos() as i64 {
            let at = logline::time(expires_ns, &zone);
            return Err(refused(format!("this agent's certificate expired at {at}; enrol again")));
        }
        if let Some(until) = agent.quarantine(now_ns) {
            let until = logline::time(until, &zone);
            return Err(refused(format!("seat {} is in quarantine until {until}", agent.seat)));
        }
        Ok((agent, version, expires_ns))
    }

    /// The newest connection of an identity is the one that counts; false: this one is not.
    fn register(&self, agent: &Agent, number: u64, version: u16, connection: &Connection) -> bool {
        let live = Live { number, version, connection: connection.clone() };
        let older = {
            let mut all = lock(&self.live);
            if all.get(&agent.id).is_some_and(|other| other.number > number) {
                return false;
            }
            all.insert(agent.id, live)
        };
        let Some(older) = older else { return true };
        tracing::info!(
            seat = agent.seat,
            older = %shown(older.connection.remote_address()),
            newer = %shown(connection.remote_address()),
            "the same identity connected again: the older connection is closed"
        );
        older.connection.close(code::REPLACED.into(), b"the same identity connected again");
        true
    }

    fn unregister(&self, id: AgentId, number: u64) {
        let mut all = lock(&self.live);
        if all.get(&id).is_some_and(|live| live.number == number) {
            all.remove(&id);
        }
    }

    fn has_connected(&self, agent: &Agent, life: Option<Life>) {
        let now = Now::read();
        let back = lock(&self.presence).connected(agent.id, life, &now);
        if let Some(notice) = back {
            self.notice(agent.id, notice, now.wall_ns);
        }
    }

    fn heartbeat(&self, agent: AgentId, heartbeat: Heartbeat) -> i64 {
        let now = Now::read();
        let notices = lock(&self.presence).heartbeat(agent, heartbeat, &now);
        for notice in notices {
            self.notice(agent, notice, now.wall_ns);
        }
        now.wall_ns
    }

    /// An agent broke the protocol.
    async fn strike(&self, agent: &Agent, reason: &str) {
        let now = Now::read();
        let quarantine = lock(&self.agents).entry(agent.id).or_default().strikes.strike(now.boot_ns);
        let Some(time) = quarantine else { return };
        let until_ns = now.wall_ns.saturating_add(time.as_nanos() as i64);
        let notice = Notice::Quarantined { until_ns, reason: Raw::new(reason) };
        tracing::warn!(seat = agent.seat, seconds = time.as_secs(), reason, "agent is in quarantine");
        let id = agent.id;
        // Where the store takes nothing, it is not let in for that reason.
        let work = move |conn: &rusqlite::Connection| store::quarantine(conn, id, until_ns);
        let _ = self.writer.run(None, work).await;
        self.notice(id, notice, now.wall_ns);
    }

    /// A process introduced itself: is it the only one?
    fn look_for_clones(&self, agent: &Agent, about: &wire::About, address: std::net::SocketAddr) {
        let mut agents = lock(&self.agents);
        let known = agents.entry(agent.id).or_default();
        if !known.callers.is_clone(about.instance, about.connect) {
            return;
        }
        drop(agents);
        self.notice_clone(agent, address, &about.hostname.escaped().to_string());
    }

    /// Says, now and then, that another machine calls with an agent's identity.
    fn notice_clone(&self, agent: &Agent, address: std::net::SocketAddr, what: &str) {
        let now = Now::read();
        let is_new = is_new(&mut lock(&self.agents).entry(agent.id).or_default().cloned_ns, now.boot_ns);
        if is_new {
            tracing::error!(seat = agent.seat, %address, what, "two machines use this agent's identity");
            let newer = Raw::new(format!("{address} {what}"));
            self.notice(agent.id, Notice::Cloned { older: Raw::new(&agent.seat), newer }, now.wall_ns);
        }
    }

    async fn close_revoked(&self) {
        let all = |conn: &rusqlite::Connection| {
            Ok((store::revoked_agents(conn)?, store::revoked_connections(conn)?))
        };
        let Ok((revoked, connected)) = self.writer.run(None, all).await else { return };
        revoked.into_iter().for_each(|id| lock(&self.presence).forget(id));
        for (id, number) in connected {
            if let Some(live) = lock(&self.live).get(&id).filter(|live| live.number == number) {
                live.connection.close(code::REFUSED.into(), b"this agent was revoked");
            }
        }
    }
}

/// Is it to be said again? Then it is said now.
fn is_new(said_ns: &mut Option<u64>, boot_ns: u64) -> bool {
    let is_new = said_ns.is_none_or(|said_ns| boot_ns.saturating_sub(said_ns) > SAY_AGAIN_NS);
    if is_new {
        *said_ns = Some(boot_ns);
    }
    is_new
}

/// Waits until the server stops.
pub(crate) async fn stopping(stop: &mut watch::Receiver<bool>) {
    // An error says that whoever could stop it is gone: the same.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Tells the agent why, then closes.
async fn say_goodbye(connection: &Connection, stream: Option<SendStream>, end: &End) {
    let (code, reason) = match end {
        End::Lost => return,
        End::Finished | End::Stopping => (code::DONE, end.to_string()),
        End::Stop(Stop::Refused(_)) => (code::REFUSED, end.to_string()),
        End::Stop(Stop::Fault(_)) => (code::FAULT, end.to_string()),
        End::Often | End::Unavailable(_) => (code::UNAVAILABLE, end.to_string()),
    };
    if let End::Stop(Stop::Refused(reason)) = end {
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
    frames::write(&mut send, &refusal(reason)).await?;
    if send.finish().is_ok() {
        // Returns when the agent has it all, or is gone.
        let _ = send.stopped().await;
    }
    Ok(())
}

/// One agent's connection.
struct Talk<'a> {
    collector: &'a Collector,
    agent: &'a Agent,
    conversation: Conversation,
    number: u64,
    address: std::net::SocketAddr,
    /// End of the validity of the certificate that it showed.
    expires_ns: i64,
    /// Size of the newest checkpoint that it was given on this connection.
    said: u64,
    /// Before its next frame is read.
    pause: Duration,
}

/// An answer that may have to wait for a commit. Answers go out in the order of what they answer.
enum Answer {
    Now(ToAgent),
    Later(oneshot::Receiver<Option<Applied>>),
}

impl Talk<'_> {
    /// Why it ended, and the stream for a last word.
    async fn run(
        &mut self,
        connection: &Connection,
        stop: watch::Receiver<bool>,
    ) -> (End, Option<SendStream>) {
        // Whoever is cut off in this moment has done nothing wrong.
        let late = |_| refused(format!("no hello within {} s", HELLO_TIME.as_secs()));
        let accepted = timeout(HELLO_TIME, connection.accept_bi()).await.map_err(late);
        let accepted = accepted.and_then(|stream| stream.map_err(|_: ConnectionError| End::Lost));
        let (mut send, recv) = match accepted {
            Ok(stream) => stream,
            Err(end) => return (end, None),
        };
        let end = {
            let (answers, pending) = mpsc::channel(WINDOW);
            let mut writing = std::pin::pin!(write_answers(&mut send, pending));
            let mut reading = std::pin::pin!(self.read(recv, answers, stop));
            tokio::select! {
                // What is on its way to the store is still answered.
                end = &mut reading => match timeout(STOP_TIME, writing).await {
                    Ok(End::Finished | End::Lost) | Err(_) => end,
                    Ok(worse) => worse,
                },
                end = &mut writing => end,
            }
        };
        (end, Some(send))
    }

    async fn read(
        &mut self,
        mut recv: RecvStream,
        answers: mpsc::Sender<Answer>,
        mut stop: watch::Receiver<bool>,
    ) -> End {
        let mut is_first = true;
        loop {
            let message = tokio::select! {
                biased;
                () = stopping(&mut stop) => return End::Stopping,
                () = sleep(HELLO_TIME), if is_first => {
                    return refused(format!("no hello within {} s", HELLO_TIME.as_secs()));
                }
                message = frames::read(&mut recv, MAX_FRAME) => message,
            };
            is_first = false;
            let message = match message {
                Ok(Some(message)) => message,
                Ok(None) => return End::Finished,
                Err(error) => return error.into(),
            };
            let answer = match self.take(message).await {
                Ok(answer) => answer,
                Err(end) => return end,
            };
            // Full: the agent has as many batches on their way as it may, and is not read.
            if answers.send(answer).await.is_err() {
                return End::Lost;
            }
            // More than its share: the next frame waits, and QUIC holds the agent back.
            let pause = std::mem::take(&mut self.pause);
            if !pause.is_zero() {
                tokio::select! {
                    () = stopping(&mut stop) => return End::Stopping,
                    () = sleep(pause) => {}
                }
            }
        }
    }

    async fn take(&mut self, message: ToServer) -> Result<Answer, End> {
        let permit = match &message {
            // News do not wait for room behind backlogs.
            ToServer::Batch(batch) if u64::from(batch.count) <= LIGHT_COST => {
                self.collector.unpacked_small.clone().acquire_owned().await.ok()
            }
            ToServer::Batch(_) => self.collector.unpacked.clone().acquire_owned().await.ok(),
            _ => None,
        };
        match self.conversation.receive(message)? {
            Action::Heartbeat(heartbeat) => {
                self.charge_heartbeat();
                let server_ns = self.collector.heartbeat(self.agent.id, heartbeat);
                Ok(Answer::Now(ToAgent::Heard { server_ns, checkpoint: self.new_checkpoint() }))
            }
            Action::Renew(csr_der) => Ok(Answer::Now(self.renew(&csr_der).await?)),
            Action::Store(mut work) => {
                if let Some(about) = work.about_mut() {
                    self.introduce(about);
                }
                self.charge(work.cost());
                Ok(Answer::Later(self.store(work, permit).await?))
            }
        }
    }

    async fn store(
        &self,
        work: Work,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Result<oneshot::Receiver<Option<Applied>>, Unavailable> {
        let now_ns = clock::wall_ns();
        let cost = work.cost();
        let apply = move |conn: &rusqlite::Connection| {
            // Free when the work is done, whether or not the agent takes the answer.
            let _permit = permit;
            work.apply(conn, now_ns)
        };
        self.collector.writer.begin(Some(self.agent.id), cost, apply).await
    }

    /// Takes this much of the agent's share.
    fn charge(&mut self, cost: u64) {
        let mut agents = lock(&self.collector.agents);
        let known = agents.entry(self.agent.id).or_default();
        self.pause = known.share.take(cost, Now::read().boot_ns);
    }

    /// Takes one of the agent's heartbeats.
    fn charge_heartbeat(&mut self) {
        let mut agents = lock(&self.collector.agents);
        let known = agents.entry(self.agent.id).or_default();
        self.pause = known.heartbeats.0.take(1, Now::read().boot_ns);
    }

    fn introduce(&self, about: &mut wire::About) {
        let collector = self.collector;
        let key = collector.log_key.public_key();
        let is_strange = |witness: &mut Checkpoint| !chain::is_signed(witness, &self.agent.uuid, key);
        if let Some(witness) = about.witness.take_if(is_strange) {
            let now = Now::read();
            let is_new = is_new(
                &mut lock(&collector.agents).entry(self.agent.id).or_default().strange_ns,
                now.boot_ns,
            );
            if is_new {
                let notice = Notice::StrangeWitness { signed_ns: witness.signed_ns };
                collector.notice(self.agent.id, notice, now.wall_ns);
            }
        }
        tracing::info!(
            seat = self.agent.seat, address = %self.address, run = about.run, connection = self.number,
            "agent connected"
        );
        collector.look_for_clones(self.agent, about, self.address);
        collector.has_connected(self.agent, Some((&*about).into()));
    }

    fn new_checkpoint(&mut self) -> Option<Checkpoint> {
        let agents = lock(&self.collector.agents);
        let newest = agents.get(&self.agent.id)?.checkpoint.as_ref()?;
        if newest.size <= self.said {
            return None;
        }
        self.said = newest.size;
        Some(newest.clone())
    }

    /// A certificate for the agent's next key.
    async fn renew(&mut self, csr_der: &[u8]) -> Result<ToAgent, End> {
        let key = AgentKey::from_request(csr_der).map_err(|error| fault(error.to_string()))?;
        let Agent { id, uuid, .. } = *self.agent;
        let now_ns = clock::wall_ns();
        let now = Duration::from_nanos(u64::try_from(now_ns).unwrap_or_default());
        self.charge(RENEWAL_COST);
        // Whoever copied a key must not be able to leave its owner without one at any time.
        if self.expires_ns.saturating_sub(now_ns) > AGENT_LIFETIME.as_nanos() as i64 / 3 {
            tracing::warn!(
                seat = self.agent.seat,
                address = %self.address,
                "a new certificate is asked for though the old one is young: not now"
            );
            return Ok(ToAgent::Renewed { certificate_der: Vec::new() });
        }
        let certificate_der = match self.collector.ca.issue_agent(&key, &uuid, now) {
            Ok(der) => der,
            Err(error) => {
                tracing::error!(%error, "cannot sign an agent's certificate");
                return Ok(ToAgent::Renewed { certificate_der: Vec::new() });
            }
        };
        let spki_sha256 = key.spki_sha256();
        let not_after_ns = now_ns.saturating_add(AGENT_LIFETIME.as_nanos() as i64);
        let stored = self.collector.writer.run(Some(id), move |conn| {
            // A key is one agent's.
            if store::agent_by_key(conn, &spki_sha256)?.is_some_and(|owner| owner.id != id)
                || !store::is_allowed(conn, id)?
            {
                return Ok(false);
            }
            store::renew(conn, id, &spki_sha256)?;
            history::add_notice(conn, id, &Notice::Renewed { not_after_ns }, now_ns)?;
            Ok(true)
        });
        if !stored.await? {
            return Err(refused("this key may not be certified"));
        }
        tracing::info!(
            seat = self.agent.seat,
            expired_ns = self.expires_ns,
            "certificate renewed for a new key"
        );
        Ok(ToAgent::Renewed { certificate_der })
    }
}

/// Sends answers in their order, each when it is there.
async fn write_answers(send: &mut SendStream, mut pending: mpsc::Receiver<Answer>) -> End {
    while let Some(answer) = pending.recv().await {
        let answer = match answer {
            Answer::Now(answer) => Some(answer),
            Answer::Later(later) => match later.await {
                Ok(Some(applied)) => match applied.committed() {
                    Ok(answer) => answer,
                    Err(stop) => return stop.into(),
                },
                Ok(None) | Err(_) => return Unavailable.into(),
            },
        };
        if let Some(answer) = answer {
            // A peer that takes no answers is gone.
            match timeout(ANSWER_TIME, frames::write(send, &answer)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return error.into(),
                Err(_) => return End::Lost,
            }
        }
    }
    End::Finished
}
