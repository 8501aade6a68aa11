//! Events, watermarks and gaps.

use rusqlite::{Connection, OptionalExtension as _, params};

use super::AgentId;
use crate::ingest::{self, Checked, EPOCHS_TIME_NS, FIRST_SEQ, Fault, Known, Place};

/// One item of a seat's history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Its place: grows by 1 from 1.
    pub n: i64,
    /// What it is.
    pub what: What,
}

/// An event, or a hole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// A record, as it came.
    Record {
        /// When, the server's clock.
        received_ns: i64,
        /// Its bytes.
        bytes: Vec<u8>,
    },
    /// Records that never came.
    Gap {
        /// How many; `None`: another history begins here, and nobody knows.
        count: Option<u64>,
        /// The newest record before, the PC's clock; when there is none, the time of noticing.
        since_ns: i64,
        /// When it was noticed, the server's clock.
        noticed_ns: i64,
    },
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchOutcome {
    /// Everything up to and including this record is in the store (once the transaction is committed).
    Stored {
        /// The newest record.
        through: u64,
        /// How many of the batch were new.
        new: usize,
    },
    /// The batch starts too late; nothing was stored.
    Resume {
        /// The expected record.
        next_seq: u64,
    },
    /// A record that is in the store already came again with other content: the agent's spool was set back and
    /// numbers anew. Nothing was stored.
    Rewritten {
        /// The record.
        seq: u64,
    },
}

/// How far the readable logs of a seat are safely on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeatLog {
    /// The first item that is not in the files.
    pub next_n: i64,
    /// Length of `log.txt` up to there.
    pub log_bytes: u64,
    /// Length of `usb.log` up to there.
    pub usb_bytes: u64,
}

impl Default for SeatLog {
    fn default() -> Self {
        Self { next_n: 1, log_bytes: 0, usb_bytes: 0 }
    }
}

/// An agent opens (or takes up) an epoch and says what it still has: the watermark moves over what can never
/// come, and the hole is kept. An epoch that the server has never seen, of an agent that has a history, is a hole of
/// unknown size, once. The inner error is the agent's fault.
pub fn open_epoch(
    conn: &Connection,
    agent: AgentId,
    epoch: u64,
    oldest_seq: u64,
    now_ns: i64,
) -> rusqlite::Result<Result<u64, Fault>> {
    let known = known(conn, agent, epoch, now_ns)?;
    let opening = match ingest::open(known, oldest_seq) {
        Ok(opening) => opening,
        Err(fault) => return Ok(Err(fault)),
    };
    if opening.restarts {
        add_gap(conn, agent, epoch, UNKNOWN, now_ns)?;
    }
    if let Some(gap) = opening.gap {
        add_gap(conn, agent, epoch, gap, now_ns)?;
    }
    // Without records, too: the next hello finds the epoch known.
    if known != Known::Expecting(opening.next_seq) {
        set_watermark(conn, agent, epoch, opening.next_seq)?;
    }
    Ok(Ok(opening.next_seq))
}

fn known(conn: &Connection, agent: AgentId, epoch: u64, now_ns: i64) -> rusqlite::Result<Known> {
    if let Some(next_seq) = watermark(conn, agent, epoch)? {
        return Ok(Known::Expecting(next_seq));
    }
    let has_history = conn
        .prepare_cached(
            "SELECT 1 FROM agents WHERE id = ?1
             AND (next_n > 1 OR EXISTS (SELECT 1 FROM epochs WHERE agent = ?1))",
        )?
        .exists([agent.0])?;
    if !has_history {
        return Ok(Known::First);
    }
    let since = now_ns.saturating_sub(EPOCHS_TIME_NS);
    let begun: i64 = conn
        .prepare_cached(
            "SELECT count(*) FROM gaps WHERE agent = ?1 AND from_seq > to_seq AND noticed_ns BETWEEN ?2 AND ?3",
        )?
        .query_row([agent.0, since, now_ns], |row| row.get(0))?;
    Ok(Known::Another { begun: begun as u64 })
}

/// A gap of nobody knows how many records.
const UNKNOWN: (u64, u64) = (1, 0);

fn add_gap(
    conn: &Connection,
    agent: AgentId,
    epoch: u64,
    (from, to): (u64, u64),
    now_ns: i64,
) -> rusqlite::Result<()> {
    let (n, since_ns): (i64, Option<i64>) = conn
        .prepare_cached("SELECT next_n, record_ns FROM agents WHERE id = ?1")?
        .query_row([agent.0], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let since_ns = since_ns.unwrap_or(now_ns);
    conn.prepare_cached(
        "INSERT INTO gaps (agent, n, epoch, from_seq, to_seq, since_ns, noticed_ns)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
    )?
    .execute(params![agent.0, n, epoch as i64, from as i64, to as i64, since_ns, now_ns])?;
    set_next_n(conn, agent, n + 1)
}

/// Stores what is new of a batch and moves the watermark.
pub fn append(
    conn: &Connection,
    agent: AgentId,
    epoch: u64,
    first_seq: u64,
    items: &[Checked],
    now_ns: i64,
) -> rusqlite::Result<BatchOutcome> {
    let start = watermark(conn, agent, epoch)?.unwrap_or(FIRST_SEQ);
    if first_seq > start {
        return Ok(BatchOutcome::Resume { next_seq: start });
    }
    let mut expected = start;
    let mut new = 0;
    let mut stored =
        conn.prepare_cached("SELECT record FROM events WHERE agent = ?1 AND epoch = ?2 AND seq = ?3")?;
    let mut insert = conn.prepare_cached(
        "INSERT INTO events (agent, n, epoch, seq, wall_ns, received_ns, record)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
    )?;
    let mut n: i64 = conn
        .prepare_cached("SELECT next_n FROM agents WHERE id = ?1")?
        .query_row([agent.0], |row| row.get(0))?;
    for item in items {
        match (ingest::place(expected, item), &item.record) {
            (Place::Known, None) => {}
            (Place::Known, Some(record)) => {
                let params = params![agent.0, epoch as i64, item.seq as i64];
                let same = stored
                    .query_row(params, |row| Ok(row.get_ref(0)?.as_blob()? == record.bytes.as_slice()))
                    .optional()?;
                // None: it lies in a gap that was named before, and stays one.
                if same == Some(false) {
                    return Ok(BatchOutcome::Rewritten { seq: item.seq });
                }
            }
            (Place::Next | Place::Gap(..), Some(r)) => {
                insert.execute(params![
                    agent.0,
                    n,
                    epoch as i64,
                    item.seq as i64,
                    r.wall_ns,
                    now_ns,
                    r.bytes
                ])?;
                n += 1;
                new += 1;
                expected = item.next_seq;
            }
            (Place::Next, None) => {}
            (Place::Gap(from, to), None) => {
                set_next_n(conn, agent, n)?;
                add_gap(conn, agent, epoch, (from, to), now_ns)?;
                n += 1;
                expected = item.next_seq;
            }
        }
    }
    let records = || items.iter().filter_map(|item| item.record.as_ref());
    if expected != start {
        set_next_n(conn, agent, n)?;
        set_watermark(conn, agent, epoch, expected)?;
    }
    if new > 0 {
        let backlog = records().rev().find_map(|record| record.backlog).map(|backlog| backlog as i64);
        let newest_ns = records().next_back().map(|record| record.wall_ns);
        conn.prepare_cached(
            "UPDATE agents SET record_ns = ?2, received_ns = ?3, backlog = coalesce(?4, backlog) WHERE id = ?1",
        )?
        .execute(params![agent.0, newest_ns, now_ns, backlog])?;
    }
    Ok(BatchOutcome::Stored { through: expected - 1, new })
}

fn set_next_n(conn: &Connection, agent: AgentId, n: i64) -> rusqlite::Result<()> {
    conn.prepare_cached("UPDATE agents SET next_n = ?2 WHERE id = ?1")?.execute([agent.0, n])?;
    Ok(())
}

/// The record that is expected next; `None` for an epoch that no hello named.
fn watermark(conn: &Connection, agent: AgentId, epoch: u64) -> rusqlite::Result<Option<u64>> {
    let next_seq: Option<i64> = conn
        .prepare_cached("SELECT next_seq FROM epochs WHERE agent = ?1 AND epoch = ?2")?
        .query_row([agent.0, epoch as i64], |row| row.get(0))
        .optional()?;
    Ok(next_seq.map(|next_seq| next_seq as u64))
}

fn set_watermark(conn: &Connection, agent: AgentId, epoch: u64, next_seq: u64) -> rusqlite::Result<()> {
    conn.prepare_cached(
        "INSERT INTO epochs (agent, epoch, next_seq) VALUES (?1, ?2, ?3)
         ON CONFLICT (agent, epoch) DO UPDATE SET next_seq = excluded.next_seq",
    )?
    .execute([agent.0, epoch as i64, next_seq as i64])?;
    Ok(())
}

/// Up to `limit` items of a seat's history, from place `from` on, in order.
pub fn items_from(conn: &Connection, agent: AgentId, from: i64, limit: usize) -> rusqlite::Result<Vec<Item>> {
    conn.prepare_cached(
        "SELECT n, received_ns, record, NULL, NULL FROM events WHERE agent = ?1 AND n >= ?2
         UNION ALL
         SELECT n, noticed_ns, NULL, to_seq - from_seq + 1, since_ns FROM gaps WHERE agent = ?1 AND n >= ?2
         ORDER BY n LIMIT ?3",
    )?
    .query_map(params![agent.0, from, limit as i64], |row| {
        let what = match row.get::<_, Option<Vec<u8>>>(2)? {
            Some(bytes) => What::Record { received_ns: row.get(1)?, bytes },
            None => What::Gap {
                count: u64::try_from(row.get::<_, i64>(3)?).ok().filter(|count| *count > 0),
                since_ns: row.get(4)?,
                noticed_ns: row.get(1)?,
            },
        };
        Ok(Item { n: row.get(0)?, what })
    })?
    .collect()
}

/// The place from which on a seat's history has `count` items.
pub fn first_of_last(conn: &Connection, agent: AgentId, count: u64) -> rusqlite::Result<i64> {
    let next_n: i64 =
        conn.query_row("SELECT next_n FROM agents WHERE id = ?1", [agent.0], |row| row.get(0))?;
    Ok(next_n.saturating_sub_unsigned(count).max(1))
}

/// How far a seat's readable logs were safely on disk.
pub fn seat_log(conn: &Connection, agent: AgentId) -> rusqlite::Result<SeatLog> {
    let found = conn
        .prepare_cached("SELECT next_n, log_bytes, usb_bytes FROM seat_logs WHERE agent = ?1")?
        .query_row([agent.0], |row| {
            Ok(SeatLog {
                next_n: row.get(0)?,
                log_bytes: row.get::<_, i64>(1)? as u64,
                usb_bytes: row.get::<_, i64>(2)? as u64,
            })
        })
        .optional()?;
    Ok(found.unwrap_or_default())
}

/// Remembers how far a seat's readable logs are safely on disk.
pub fn save_seat_log(conn: &Connection, agent: AgentId, log: SeatLog) -> rusqlite::Result<()> {
    conn.prepare_cached(
        "INSERT INTO seat_logs (agent, next_n, log_bytes, usb_bytes) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (agent) DO UPDATE SET
             next_n = excluded.next_n, log_bytes = excluded.log_bytes, usb_bytes = excluded.usb_bytes",
    )?
    .execute([agent.0, log.next_n, log.log_bytes as i64, log.usb_bytes as i64])?;
    Ok(())
}
