//! What an agent's frames mean. No I/O but the store's, no clock.
//!
//! A frame becomes an [`Action`]: something to be done in the store, in a transaction of the caller's, and answered after
//! its commit; or something to be answered at once.

use netmon_common::enroll::MAX_DER;
use netmon_common::raw::Raw;
use netmon_common::wire::{About, Batch, Heartbeat, Hello, ToAgent, ToServer, VERSION, WireError};
use rusqlite::Connection;

use crate::ingest::{self, Checked, FIRST_SEQ, Fault};
use crate::store::{self, Agent, AgentId, BatchOutcome};

/// Hellos on one connection: one for each spool that an agent ever had, and no more holes than that.
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
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// To be done in the store.
    Store(Work),
    /// The agent says that it watches; answered by [`ToAgent::Heard`].
    Heartbeat(Heartbeat),
    /// The agent asks for a certificate for the key of this signing request.
    Renew(Vec<u8>),
}

/// A step in the store.
#[derive(Debug, PartialEq, Eq)]
pub struct Work {
    agent: AgentId,
    /// Label for messages.
    seat: String,
    connection: u64,
    version: u16,
    what: What,
}

#[derive(Debug, PartialEq, Eq)]
enum What {
    About(About),
    Hello(Hello),
    Batch { epoch: u64, first_seq: u64, items: Vec<Checked> },
}

/// One connection's conversation.
#[derive(Debug)]
pub struct Conversation {
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
        Self { agent, seat, connection, version, introduced, epoch: None, hellos: 0, renewals: 0 }
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
            ToServer::Hello(hello) => self.hello(hello)?,
            ToServer::Batch(batch) => self.batch(&batch)?,
            ToServer::Heartbeat(heartbeat) if self.version > 1 => return Ok(Action::Heartbeat(heartbeat)),
            ToServer::Renew { csr_der } if self.version > 1 => return self.renew(csr_der),
            ToServer::Heartbeat(_) | ToServer::Renew { .. } => {
                return Err(Stop::Fault("a message of another version".into()));
            }
        };
        let Self { agent, connection, version, .. } = *self;
        Ok(Action::Store(Work { agent, seat: self.seat.clone(), connection, version, what }))
    }

    fn hello(&mut self, hello: Hello) -> Result<What, Stop> {
        if hello.version != self.version {
            return Err(Stop::Refused(format!(
                "the agent speaks version {} of the protocol where the handshake agreed on {}, this server {VERSION} \
                 and the one before; install the same netmon on both",
                hello.version, self.version
            )));
        }
        self.hellos += 1;
        if self.hellos > MAX_HELLOS {
            return Err(Stop::Fault(format!("more than {MAX_HELLOS} hellos on one connection")));
        }
        self.epoch = Some(hello.epoch);
        Ok(What::Hello(hello))
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

impl Work {
    /// Does the step in somebody's transaction. What the agent is to be told after the commit, if anything.
    ///
    /// # Errors
    /// SQLite's. The inner error ends the conversation, and nothing was changed.
    pub fn apply(&self, conn: &Connection, now_ns: i64) -> rusqlite::Result<Result<Option<ToAgent>, Stop>> {
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
                if self.version == 1 {
                    store::connected(
                        conn,
                        id,
                        self.connection,
                        &hello.hostname,
                        &hello.agent_version,
                        now_ns,
                    )?;
                }
                let next_seq = match store::open_epoch(conn, id, hello.epoch, hello.oldest_seq, now_ns)? {
                    Ok(next_seq) => next_seq,
                    Err(fault) => return Ok(Err(fault.into())),
                };
                if self.version == 1 {
                    return Ok(Ok(Some(ToAgent::Welcome { version: 1, next_seq })));
                }
                let last = match next_seq {
                    FIRST_SEQ => None,
                    next => store::record_fingerprint(conn, id, hello.epoch, next - 1)?,
                };
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
            What::About(_) | What::Hello(_) => 1,
            What::Batch { items, .. } => {
                let bytes =
                    |item: &Checked| item.record.as_ref().map_or(0, |record| record.bytes.len() as u64);
                items.iter().map(|item| 1 + bytes(item) / USUAL).sum()
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
