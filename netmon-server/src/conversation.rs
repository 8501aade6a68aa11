//! What an agent's frames mean. No I/O but the store's, no clock.
//!
//! A frame becomes an [`Action`]: something to be done in the store, in a transaction of the caller's, and answered after
//! its commit; or something to be answered at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use netmon_common::enroll::MAX_DER;
use netmon_common::model::Coverage;
use netmon_common::raw::Raw;
use netmon_common::wire::{About, Batch, Heartbeat, Hello, Open, ToAgent, ToServer, VERSION, WireError};
use rusqlite::Connection;

use crate::ingest::{self, Checked, Fault};
use crate::limits::BATCH_COST;
use crate::store::{self, Agent, AgentId, BatchOutcome};

/// Hellos, or their likes of version 2, on one connection: one for each spool that an agent ever had, and no more holes than that.
const MAX_HELLOS: u32 = 256;
/// Certificates on one connection.
const MAX_RENEWALS: u32 = 2;

/// Why a conversation cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stop {
    /// The agent may not deliver, or not like this; it is told.
    #[error("{0}")]
    Refused(String),
    /// The agent broke the protocol.
    #[error("protocol error: {0}")]
    Fault(String),
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        if fault == Fault::Epochs {
            return Self::Refused(fault.to_string());
        }
        let cause = std::error::Error::source(&fault).map(|cause| format!(": {cause}")).unwrap_or_default();
        Self::Fault(format!("{fault}{cause}"))
    }
}

impl From<WireError> for Stop {
    fn from(error: WireError) -> Self {
        Self::Fault(error.to_string())
    }
}

/// What a frame leads to.
#[derive(Debug)]
pub enum Action {
    /// To be done in the store.
    Store(Work),
    /// The agent says that it watches; answered by [`ToAgent::Heard`].
    Heartbeat(Heartbeat),
    /// The agent asks for a certificate for the key of this signing request.
    Renew(Vec<u8>),
}

/// Whether the steps of a connection came to the store so far. Behind one that did not, nothing of the connection may: what
/// it says of its records rests on what it said before.
#[derive(Clone, Debug, Default)]
struct Line(Arc<AtomicBool>);

/// A step that was applied, and will be committed or not.
#[derive(Debug)]
pub struct Applied {
    result: Option<Result<Option<ToAgent>, Stop>>,
    line: Line,
}

impl Applied {
    /// It was committed. What the agent is to be told, if anything.
    ///
    /// # Errors
    /// The conversation ends, and nothing was changed.
    pub fn committed(mut self) -> Result<Option<ToAgent>, Stop> {
        self.result.take().unwrap_or(Ok(None))
    }
}

impl Drop for Applied {
    fn drop(&mut self) {
        if self.result.is_some() {
            self.line.0.store(true, Ordering::Relaxed);
        }
    }
}

/// A step in the store. One that is dropped before it was applied did not come to the store either.
#[derive(Debug)]
pub struct Work {
    line: Line,
    was_applied: AtomicBool,
    agent: AgentId,
    /// Label for messages.
    seat: String,
    connection: u64,
    what: What,
}

#[derive(Debug, PartialEq, Eq)]
enum What {
    About(About),
    Hello(Hello),
    Open(Open),
    Batch { epoch: u64, first_seq: u64, items: Vec<Checked> },
}

/// One connection's conversation.
#[derive(Debug)]
pub struct Conversation {
    line: Line,
    agent: AgentId,
    seat: String,
    connection: u64,
    version: u16,
    introduced: bool,
    /// Of the last hello.
    epoch: Option<u64>,
    hellos: u32,
    renewals: u32,
}

impl Conversation {
    /// An agent called; `version` is what the handshake agreed upon, `connection` grows with each one.
    pub fn new(agent: &Agent, connection: u64, version: u16) -> Self {
        let (agent, seat) = (agent.id, agent.seat.clone());
        // Version 1 has no introduction.
        let introduced = version == 1;
        let line = Line::default();
        Self { line, agent, seat, connection, version, introduced, epoch: None, hellos: 0, renewals: 0 }
    }

    /// Takes a frame.
    ///
    /// # Errors
    /// [`Stop`]: nothing of it is to be done.
    pub fn receive(&mut self, message: ToServer) -> Result<Action, Stop> {
        let what = match message {
            ToServer::About(about) if !self.introduced => {
                self.introduced = true;
                What::About(about)
            }
            _ if !self.introduced => return Err(Stop::Fault("the first frame is no introduction".into())),
            ToServer::About(_) => return Err(Stop::Fault("an introduction that has no place here".into())),
            ToServer::Hello(hello) if self.version == 1 => self.hello(hello)?,
            ToServer::Open(open) if self.version > 1 => {
                self.open(open.epoch)?;
                What::Open(open)
            }
            ToServer::Batch(batch) => self.batch(&batch)?,
            ToServer::Heartbeat(heartbeat) if self.version > 1 => {
                if heartbeat.coverage.interfaces.len() > Coverage::MAX_INTERFACES {
                    return Err(Stop::Fault("a heartbeat with too many interfaces".into()));
                }
                return Ok(Action::Heartbeat(heartbeat));
            }
            ToServer::Renew { csr_der } if self.version > 1 => return self.renew(csr_der),
            ToServer::Hello(_) | ToServer::Open(_) | ToServer::Heartbeat(_) | ToServer::Renew { .. } => {
                return Err(Stop::Fault("a message of another version".into()));
            }
        };
        let Self { agent, connection, .. } = *self;
        let (line, seat) = (self.line.clone(), self.seat.clone());
        let was_applied = AtomicBool::new(false);
        Ok(Action::Store(Work { line, was_applied, agent, seat, connection, what }))
    }

    fn hello(&mut self, hello: Hello) -> Result<What, Stop> {
        if hello.version != 1 {
            return Err(Stop::Refused(format!(
                "the agent speaks version {} of the protocol where the handshake agreed on 1, this server {VERSION} and \
                 the one before; install the same netmon on both",
                hello.version
            )));
        }
        self.open(hello.epoch)?;
        Ok(What::Hello(hello))
    }

    fn open(&mut self, epoch: u64) -> Result<(), Stop> {
        self.hellos += 1;
        if self.hellos > MAX_HELLOS {
            return Err(Stop::Fault(format!("more than {MAX_HELLOS} hellos on one connection")));
        }
        self.epoch = Some(epoch);
        Ok(())
    }

    fn batch(&self, batch: &Batch) -> Result<What, Stop> {
        let Batch { epoch, first_seq, .. } = *batch;
        if self.epoch != Some(epoch) {
            return Err(Stop::Fault(format!("a batch of epoch {epoch:x} without a hello for it")));
        }
        let items = batch.unpack()?;
        if self.version == 1 && items.iter().any(|item| item.is_hole()) {
            return Err(Stop::Fault("a hole in a batch of version 1".into()));
        }
        Ok(What::Batch { epoch, first_seq, items: ingest::check(first_seq, items)? })
    }

    fn renew(&mut self, csr_der: Vec<u8>) -> Result<Action, Stop> {
        self.renewals += 1;
        if self.renewals > MAX_RENEWALS || csr_der.len() > MAX_DER {
            return Err(Stop::Fault("too many or too long requests for a certificate".into()));
        }
        Ok(Action::Renew(csr_der))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if !*self.was_applied.get_mut() {
            self.line.0.store(true, Ordering::Relaxed);
        }
    }
}

impl Work {
    /// Does the step in somebody's transaction; after its commit, [`Applied::committed`] is to be called. `None`: nothing
    /// was done, because an earlier step of the connection did not come to the store.
    ///
    /// # Errors
    /// SQLite's.
    pub fn apply(&self, conn: &Connection, now_ns: i64) -> rusqlite::Result<Option<Applied>> {
        self.was_applied.store(true, Ordering::Relaxed);
        if self.line.0.load(Ordering::Relaxed) {
            return Ok(None);
        }
        // Until it is known better.
        let mut applied = Applied { result: Some(Ok(None)), line: self.line.clone() };
        let result = self.apply_alone(conn, now_ns)?;
        // It ends the connection, whose next steps may be in the same transaction.
        self.line.0.fetch_or(result.is_err(), Ordering::Relaxed);
        applied.result = Some(result);
        Ok(Some(applied))
    }

    fn apply_alone(&self, conn: &Connection, now_ns: i64) -> rusqlite::Result<Result<Option<ToAgent>, Stop>> {
        let id = self.agent;
        if !store::is_allowed(conn, id)? {
            return Ok(Err(revoked(&self.seat)));
        }
        match &self.what {
            What::About(about) => {
                store::connected(conn, id, self.connection, &about.hostname, &about.agent_version, now_ns)?;
                store::introduced(conn, id, about, now_ns)?;
                Ok(Ok(None))
            }
            What::Hello(hello) => {
                let (hostname, agent_version) = (&hello.hostname, &hello.agent_version);
                store::connected(conn, id, self.connection, hostname, agent_version, now_ns)?;
                let next_seq = store::open_epoch(conn, id, hello.epoch, hello.oldest_seq, now_ns)?;
                Ok(next_seq
                    .map(|next_seq| Some(ToAgent::Welcome { version: 1, next_seq }))
                    .map_err(Stop::from))
            }
            What::Open(Open { epoch, oldest_seq, next_seq: behind }) => {
                let next_seq = match store::open_epoch(conn, id, *epoch, *oldest_seq, now_ns)? {
                    Ok(next_seq) => next_seq,
                    Err(fault) => return Ok(Err(fault.into())),
                };
                let last = store::newest_before(conn, id, *epoch, *behind)?;
                Ok(Ok(Some(ToAgent::Expect { next_seq, last })))
            }
            What::Batch { epoch, first_seq, items } => {
                // Its hello may have been refused behind its back.
                if !store::is_open(conn, id, *epoch)? {
                    return Ok(Err(Stop::Fault(format!("a batch of epoch {epoch:x}, which was not opened"))));
                }
                Ok(match store::append(conn, id, *epoch, *first_seq, items, now_ns)? {
                    BatchOutcome::Stored { through, .. } => {
                        Ok(Some(ToAgent::Ack { epoch: *epoch, seq: through }))
                    }
                    BatchOutcome::Resume { next_seq } => Ok(Some(ToAgent::Resume { next_seq })),
                    BatchOutcome::Rewritten { seq } => Err(Stop::Fault(format!(
                        "record {seq} came before with other content: the spool was set back; it needs a new epoch"
                    ))),
                })
            }
        }
    }

    /// What it costs to store, in records of the usual size.
    pub fn cost(&self) -> u64 {
        const USUAL: u64 = 256;
        match &self.what {
            What::About(_) | What::Hello(_) | What::Open(_) => 1,
            What::Batch { items, .. } => {
                let bytes =
                    |item: &Checked| item.record.as_ref().map_or(0, |record| record.bytes.len() as u64);
                BATCH_COST + items.iter().map(|item| 1 + bytes(item) / USUAL).sum::<u64>()
            }
        }
    }

    /// The introduction, if it is one.
    pub fn about_mut(&mut self) -> Option<&mut About> {
        match &mut self.what {
            What::About(about) => Some(about),
            _ => None,
        }
    }
}

/// What an agent is told that was taken off the allow-list.
pub fn revoked(seat: &str) -> Stop {
    Stop::Refused(format!("seat {seat} was revoked at the server; enrol again to deliver"))
}

/// The frame for a [`Stop`] that the agent is told of.
pub fn refusal(reason: &str) -> ToAgent {
    ToAgent::Refused { reason: Raw::new(reason) }
}

#[cfg(test)]
mod tests {
    use netmon_common::wire::{BatchBuilder, Item};

    use super::*;
    use crate::store::tests::Fixture;

    fn batch(first_seq: u64) -> ToServer {
        let mut builder = BatchBuilder::default();
        assert!(builder.push(&Item::Hole(1)));
        ToServer::Batch(builder.finish(7, first_seq).unwrap())
    }

    fn open(oldest_seq: u64) -> ToServer {
        ToServer::Open(Open { epoch: 7, oldest_seq, next_seq: 9 })
    }

    fn about() -> About {
        About {
            agent_version: "1".into(),
            hostname: "pc".into(),
            boot_id: [1; 16],
            run: 1,
            previous_died: false,
            instance: 1,
            connect: 1,
            witness: None,
        }
    }

    #[test]
    fn nothing_comes_to_the_store_behind_a_step_that_was_not_committed() {
        let room = Fixture::new();
        let id = room.agent("pc");
        let agent = store::agent_by_id(room.conn(), id).unwrap().unwrap();
        let work = |conversation: &mut Conversation, message| match conversation.receive(message) {
            Ok(Action::Store(work)) => work,
            other => panic!("{other:?}"),
        };
        let introduced = || {
            let mut conversation = Conversation::new(&agent, 1, 2);
            let about = work(&mut conversation, ToServer::About(about()));
            about.apply(room.conn(), 0).unwrap().unwrap().committed().unwrap();
            conversation
        };
        let next = |answer| match answer {
            Some(ToAgent::Expect { next_seq, .. }) => next_seq,
            other => panic!("{other:?}"),
        };

        let mut conversation = introduced();
        let [first, lost, behind] = [open(1), batch(1), open(2)].map(|what| work(&mut conversation, what));
        let applied = first.apply(room.conn(), 0).unwrap().unwrap();
        assert_eq!(next(applied.committed().unwrap()), 1);
        // Its transaction is rolled back; the agent's next word counts on it.
        drop(lost.apply(&room.conn().unchecked_transaction().unwrap(), 0).unwrap().unwrap());
        assert!(behind.apply(room.conn(), 0).unwrap().is_none());
        let items = store::history::stored_from(room.conn(), id, 1, 9).unwrap();
        assert!(items.is_empty(), "{items:?}");

        // Its transaction could not even begin.
        let mut conversation = introduced();
        let [lost, behind] = [open(1), open(2)].map(|what| work(&mut conversation, what));
        drop(lost);
        assert!(behind.apply(room.conn(), 0).unwrap().is_none());

        // A fault ends the connection, also for what came in the same transaction.
        let mut conversation = introduced();
        let [fault, behind] = [open(0), open(2)].map(|what| work(&mut conversation, what));
        let fault = fault.apply(room.conn(), 0).unwrap().unwrap();
        assert!(behind.apply(room.conn(), 0).unwrap().is_none());
        assert!(matches!(fault.committed(), Err(Stop::Fault(_))));

        // Another connection is another matter.
        let again = work(&mut introduced(), open(2)).apply(room.conn(), 0).unwrap().unwrap();
        assert_eq!(next(again.committed().unwrap()), 2);
    }
}
