//! A seat's history: its items in order of arrival, and the chain over them.

use netmon_common::wire::Checkpoint;
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::AgentId;
use crate::chain::{self, Entry, Head};
use crate::notice::Notice;

/// Lengthens one history. [`History::close`] keeps what was added; without it the transaction must not be committed.
#[must_use]
pub struct History<'a> {
    conn: &'a Connection,
    agent: AgentId,
    /// Place of the next item.
    n: i64,
    head: Head,
    /// The newest record, the PC's clock.
    record_ns: Option<i64>,
}

impl<'a> History<'a> {
    /// Takes up an agent's history.
    pub fn open(conn: &'a Connection, agent: AgentId) -> rusqlite::Result<Self> {
        conn.prepare_cached("SELECT next_n, head, record_ns FROM agents WHERE id = ?1")?
            .query_row([agent.0], |row| {
                Ok(Self { conn, agent, n: row.get(0)?, head: row.get(1)?, record_ns: row.get(2)? })
            })
    }

    /// Adds a record.
    pub fn record(
        &mut self,
        epoch: u64,
        seq: u64,
        wall_ns: i64,
        received_ns: i64,
        bytes: &[u8],
    ) -> rusqlite::Result<()> {
        let (n, link) = self.push(&Entry::Record { epoch, seq, received_ns, bytes });
        self.conn
            .prepare_cached(
                "INSERT INTO events (agent, n, epoch, seq, wall_ns, received_ns, link, record)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            )?
            .execute(params![self.agent.0, n, epoch as i64, seq as i64, wall_ns, received_ns, link, bytes])?;
        self.record_ns = Some(wall_ns);
        Ok(())
    }

    /// Adds a gap; `from > to`: another history of the PC begins.
    pub fn gap(&mut self, epoch: u64, (from, to): (u64, u64), noticed_ns: i64) -> rusqlite::Result<()> {
        let since_ns = self.record_ns.unwrap_or(noticed_ns);
        let (n, link) = self.push(&Entry::Gap { epoch, from, to, since_ns, noticed_ns });
        self.conn
            .prepare_cached(
                "INSERT INTO gaps (agent, n, epoch, from_seq, to_seq, since_ns, noticed_ns, link)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            )?
            .execute(params![
                self.agent.0,
                n,
                epoch as i64,
                from as i64,
                to as i64,
                since_ns,
                noticed_ns,
                link
            ])?;
        Ok(())
    }

    /// Adds what the server noticed.
    pub fn notice(&mut self, notice: &Notice, noticed_ns: i64) -> rusqlite::Result<()> {
        let bytes = notice.to_bytes();
        let (n, link) = self.push(&Entry::Notice { noticed_ns, bytes: &bytes });
        self.conn
            .prepare_cached(
                "INSERT INTO notices (agent, n, noticed_ns, notice, link) VALUES (?1, ?2, ?3, ?4, ?5)",
            )?
            .execute(params![self.agent.0, n, noticed_ns, bytes, link])?;
        Ok(())
    }

    /// Keeps what was added.
    pub fn close(self) -> rusqlite::Result<()> {
        self.conn
            .prepare_cached("UPDATE agents SET next_n = ?2, head = ?3, record_ns = ?4 WHERE id = ?1")?
            .execute(params![self.agent.0, self.n, self.head, self.record_ns])?;
        Ok(())
    }

    fn push(&mut self, entry: &Entry<'_>) -> (i64, i64) {
        let n = self.n;
        self.head = chain::link(&self.head, n as u64, entry);
        self.n += 1;
        (n, chain::short(&self.head))
    }
}

/// Adds one notice to an agent's history.
pub fn add_notice(conn: &Connection, agent: AgentId, notice: &Notice, now_ns: i64) -> rusqlite::Result<()> {
    let mut history = History::open(conn, agent)?;
    history.notice(notice, now_ns)?;
    history.close()
}

/// An item as the chain covers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its place.
    pub n: i64,
    /// [`chain::short`] of the chain's end with it, as the store has it.
    pub link: i64,
    kind: Kind,
    epoch: u64,
    from: u64,
    to: u64,
    since_ns: i64,
    at_ns: i64,
    bytes: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Record,
    Gap,
    Notice,
}

impl Stored {
    /// What the chain is over.
    pub fn entry(&self) -> Entry<'_> {
        let Self { epoch, from, to, since_ns, at_ns, ref bytes, .. } = *self;
        match self.kind {
            Kind::Record => Entry::Record { epoch, seq: from, received_ns: at_ns, bytes },
            Kind::Gap => Entry::Gap { epoch, from, to, since_ns, noticed_ns: at_ns },
            Kind::Notice => Entry::Notice { noticed_ns: at_ns, bytes },
        }
    }
}

/// Up to `limit` items of a history from place `from` on, as the chain covers them.
pub fn stored_from(
    conn: &Connection,
    agent: AgentId,
    from: i64,
    limit: usize,
) -> rusqlite::Result<Vec<Stored>> {
    conn.prepare_cached(
        "SELECT n, link, 1, epoch, seq, 0, 0, received_ns, record FROM events WHERE agent = ?1 AND n >= ?2
         UNION ALL
         SELECT n, link, 2, epoch, from_seq, to_seq, since_ns, noticed_ns, x'' FROM gaps WHERE agent = ?1 AND n >= ?2
         UNION ALL
         SELECT n, link, 3, 0, 0, 0, 0, noticed_ns, notice FROM notices WHERE agent = ?1 AND n >= ?2
         ORDER BY n",
    )?
    .query_map(params![agent.0, from], |row| {
        let unsigned = |column| Ok::<_, rusqlite::Error>(row.get::<_, i64>(column)? as u64);
        Ok(Stored {
            n: row.get(0)?,
            link: row.get(1)?,
            kind: match row.get::<_, i64>(2)? {
                1 => Kind::Record,
                2 => Kind::Gap,
                _ => Kind::Notice,
            },
            epoch: unsigned(3)?,
            from: unsigned(4)?,
            to: unsigned(5)?,
            since_ns: row.get(6)?,
            at_ns: row.get(7)?,
            bytes: row.get(8)?,
        })
    })?
    // Rows come one by one. `LIMIT ?3` would make SQLite compile the statement anew each time: it plans by that number.
    .take(limit)
    .collect()
}

/// How long an agent's history is and where its chain ends, as the store has it.
pub fn size_and_head(conn: &Connection, agent: AgentId) -> rusqlite::Result<(u64, Head)> {
    conn.prepare_cached("SELECT next_n - 1, head FROM agents WHERE id = ?1")?
        .query_row([agent.0], |row| Ok((row.get::<_, i64>(0)? as u64, row.get(1)?)))
}

/// An agent whose history is longer than its newest checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsigned {
    /// Who.
    pub agent: AgentId,
    /// Its number in its certificate.
    pub uuid: [u8; 16],
    /// How long its history is.
    pub size: u64,
    /// Where the chain ends.
    pub head: Head,
}

/// All agents whose newest items are covered by no checkpoint.
pub fn unsigned(conn: &Connection) -> rusqlite::Result<Vec<Unsigned>> {
    conn.prepare_cached(
        "SELECT id, uuid, next_n - 1, head FROM agents
         WHERE next_n - 1 > coalesce((SELECT max(size) FROM checkpoints WHERE agent = id), 0)",
    )?
    .query_map([], |row| {
        Ok(Unsigned {
            agent: AgentId(row.get(0)?),
            uuid: row.get(1)?,
            size: row.get::<_, i64>(2)? as u64,
            head: row.get(3)?,
        })
    })?
    .collect()
}

/// Does the store have this checkpoint?
pub fn has_checkpoint(conn: &Connection, agent: AgentId, checkpoint: &Checkpoint) -> rusqlite::Result<bool> {
    conn.prepare_cached(
        "SELECT EXISTS (SELECT 1 FROM checkpoints WHERE agent = ?1 AND size = ?2 AND head = ?3)",
    )?
    .query_row(params![agent.0, checkpoint.size as i64, checkpoint.head], |row| row.get(0))
}

/// Keeps a checkpoint.
pub fn add_checkpoint(conn: &Connection, agent: AgentId, checkpoint: &Checkpoint) -> rusqlite::Result<()> {
    conn.prepare_cached(
        "INSERT INTO checkpoints (agent, size, head, signed_ns, signature) VALUES (?1, ?2, ?3, ?4, ?5)",
    )?
    .execute(params![
        agent.0,
        checkpoint.size as i64,
        checkpoint.head,
        checkpoint.signed_ns,
        checkpoint.signature.as_flattened()
    ])?;
    Ok(())
}

fn checkpoint(row: &Row<'_>) -> rusqlite::Result<Checkpoint> {
    let signature: [u8; 64] = row.get("signature")?;
    let mut halves = [[0; 32]; 2];
    halves.as_flattened_mut().copy_from_slice(&signature);
    Ok(Checkpoint {
        size: row.get::<_, i64>("size")? as u64,
        head: row.get("head")?,
        signed_ns: row.get("signed_ns")?,
        signature: halves,
    })
}

/// The newest checkpoint of a history.
pub fn newest_checkpoint(conn: &Connection, agent: AgentId) -> rusqlite::Result<Option<Checkpoint>> {
    conn.prepare_cached(
        "SELECT size, head, signed_ns, signature FROM checkpoints WHERE agent = ?1 ORDER BY size DESC LIMIT 1",
    )?
    .query_row([agent.0], checkpoint)
    .optional()
}

/// All checkpoints of a history, by size.
pub fn checkpoints(conn: &Connection, agent: AgentId) -> rusqlite::Result<Vec<Checkpoint>> {
    conn.prepare_cached(
        "SELECT size, head, signed_ns, signature FROM checkpoints WHERE agent = ?1 ORDER BY size",
    )?
    .query_map([agent.0], checkpoint)?
    .collect()
}

/// Computes the chain of every history anew: for a store that was made before there was one.
pub fn chain_all(conn: &Connection) -> rusqlite::Result<()> {
    const PAGE: usize = 1000;
    let agents: Vec<(i64, [u8; 16])> = conn
        .prepare("SELECT id, uuid FROM agents")?
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<Result<_, _>>()?;
    for (id, uuid) in agents {
        let (agent, mut head, mut next) = (AgentId(id), chain::start(&uuid), 1);
        loop {
            let items = stored_from(conn, agent, next, PAGE)?;
            let Some(last) = items.last() else { break };
            next = last.n + 1;
            for item in &items {
                head = chain::link(&head, item.n as u64, &item.entry());
                let table = match item.kind {
                    Kind::Record => "UPDATE events SET link = ?3 WHERE agent = ?1 AND n = ?2",
                    Kind::Gap => "UPDATE gaps SET link = ?3 WHERE agent = ?1 AND n = ?2",
                    Kind::Notice => "UPDATE notices SET link = ?3 WHERE agent = ?1 AND n = ?2",
                };
                conn.prepare_cached(table)?.execute([id, item.n, chain::short(&head)])?;
            }
        }
        conn.execute("UPDATE agents SET head = ?2 WHERE id = ?1", params![id, head])?;
    }
    Ok(())
}
