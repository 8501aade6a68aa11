//! Events, watermarks and gaps.

use netmon_common::wire::{Newest, fingerprint};
use rusqlite::{Connection, OptionalExtension as _, params};

use super::history::{self, History, Stored};
use super::{AgentId, passports};
use crate::chain::Entry;
use crate::ingest::{self, Checked, EPOCHS_TIME_NS, FIRST_SEQ, Fault, Known, Place};
use crate::notice::Notice;

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
    /// What the server itself noticed.
    Notice {
        /// When, the server's clock.
        noticed_ns: i64,
        /// What; `None`: a newer server wrote it.
        notice: Option<Notice>,
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
    let mut history = History::open(conn, agent)?;
    for gap in [opening.restarts.then_some(UNKNOWN), opening.gap].into_iter().flatten() {
        history.gap(epoch, gap, now_ns)?;
    }
    history.close()?;
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
             AND EXISTS (SELECT 1 FROM epochs WHERE agent = ?1)",
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
    let mut history = History::open(conn, agent)?;
    let (mut expected, mut new, mut backlog) = (start, 0, None);
    for item in items {
        match ingest::place(expected, item) {
            Place::Known(None) => {}
            Place::Known(Some(record)) => {
                let same = record_bytes(conn, agent, epoch, item.seq, |bytes| bytes == record.bytes)?;
                // None: it lies in a gap that was named before, and stays one.
                if same == Some(false) {
                    return Ok(BatchOutcome::Rewritten { seq: item.seq });
                }
            }
            Place::Next(record) => {
                history.record(epoch, item.seq, record.wall_ns, now_ns, &record.bytes)?;
                if let Some(sighting) = &record.sighting
                    && let Some(notice) = passports::saw(conn, agent, sighting, record.wall_ns, now_ns)?
                {
                    history.notice(&notice, now_ns)?;
                }
                new += 1;
                backlog = record.backlog.or(backlog);
                expected = item.next_seq;
            }
            Place::Gap(from, to) => {
                history.gap(epoch, (from, to), now_ns)?;
                expected = item.next_seq;
            }
        }
    }
    if expected != start {
        history.close()?;
        set_watermark(conn, agent, epoch, expected)?;
        conn.prepare_cached(
            "UPDATE agents SET received_ns = iif(?2, ?3, received_ns), backlog = coalesce(?4, backlog) WHERE id = ?1",
        )?
        .execute(params![agent.0, new > 0, now_ns, backlog.map(|backlog: u64| backlog as i64)])?;
    }
    // The watermark may be further: another connection of the same agent sent more. This one is told of what it sent.
    let through = items.last().map_or(expected, |item| item.next_seq.min(expected)) - 1;
    Ok(BatchOutcome::Stored { through, new })
}

/// Did a hello open this epoch?
pub fn is_open(conn: &Connection, agent: AgentId, epoch: u64) -> rusqlite::Result<bool> {
    Ok(watermark(conn, agent, epoch)?.is_some())
}

/// What a stored record looks like to `look`; `None`: there is none.
fn record_bytes<T>(
    conn: &Connection,
    agent: AgentId,
    epoch: u64,
    seq: u64,
    look: impl FnOnce(&[u8]) -> T,
) -> rusqlite::Result<Option<T>> {
    conn.prepare_cached("SELECT record FROM events WHERE agent = ?1 AND epoch = ?2 AND seq = ?3")?
        .query_row([agent.0, epoch as i64, seq as i64], |row| Ok(look(row.get_ref(0)?.as_blob()?)))
        .optional()
}

/// What the newest record of an epoch looks like that has a number below this one.
pub fn newest_before(
    conn: &Connection,
    agent: AgentId,
    epoch: u64,
    seq: u64,
) -> rusqlite::Result<Option<Newest>> {
    // The store's numbers are signed.
    let seq = i64::try_from(seq).unwrap_or(i64::MAX);
    conn.prepare_cached(
        "SELECT seq, record FROM events WHERE agent = ?1 AND epoch = ?2 AND seq < ?3 ORDER BY seq DESC LIMIT 1",
    )?
    .query_row([agent.0, epoch as i64, seq], |row| {
        let fingerprint = fingerprint(row.get_ref(1)?.as_blob()?);
        Ok(Newest { seq: row.get::<_, i64>(0)? as u64, fingerprint })
    })
    .optional()
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
    Ok(history::stored_from(conn, agent, from, limit)?.into_iter().map(Item::from).collect())
}

impl From<Stored> for Item {
    fn from(stored: Stored) -> Self {
        Self { n: stored.n, what: stored.entry().into() }
    }
}

impl From<Entry<'_>> for What {
    fn from(entry: Entry<'_>) -> Self {
        match entry {
            Entry::Record { received_ns, bytes, .. } => Self::Record { received_ns, bytes: bytes.to_vec() },
            Entry::Gap { from, to, since_ns, noticed_ns, .. } => {
                let count = (from <= to).then(|| (to - from).saturating_add(1));
                Self::Gap { count, since_ns, noticed_ns }
            }
            Entry::Notice { noticed_ns, bytes } => {
                Self::Notice { noticed_ns, notice: Notice::from_bytes(bytes) }
            }
        }
    }
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
