//! Who may deliver: agents (the allow-list) and enrolment tokens.

use jiff::tz::TimeZone;
use netmon_common::raw::Raw;
use netmon_common::wire::{About, Checkpoint, Heartbeat};
use rusqlite::{Connection, OptionalExtension as _, Row, named_params, params};

use super::history::add_notice;
use super::presence;
use crate::limits::LONGEST_QUARANTINE;
use crate::notice::Notice;
use crate::tokens::{self, Refusal, StoredToken};
use crate::{chain, seat};

/// An agent's number in this store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AgentId(pub i64);

/// An agent as the allow-list knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agent {
    /// Its number in this store.
    pub id: AgentId,
    /// Its number in its certificate.
    pub uuid: [u8; 16],
    /// Its label.
    pub seat: String,
    /// Since when it may not deliver any more.
    pub revoked_ns: Option<i64>,
    /// Until when it is not let in, because it broke the protocol again and again; see [`Agent::quarantine`].
    pub quarantined_ns: Option<i64>,
}

impl Agent {
    /// Until when it is not let in; `None`: it is. A quarantine that is still to last longer than any does is of a time in
    /// which the server's clock was ahead: it is over.
    pub fn quarantine(&self, now_ns: i64) -> Option<i64> {
        let latest_ns = now_ns.saturating_add(LONGEST_QUARANTINE.as_nanos() as i64);
        self.quarantined_ns.filter(|until_ns| *until_ns > now_ns && *until_ns <= latest_ns)
    }
}

/// What the `agents` command shows of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentSummary {
    /// Who.
    pub agent: Agent,
    /// The PC's host name, as it said last.
    pub hostname: Vec<u8>,
    /// Since when it is connected; only true while the server runs.
    pub connected_ns: Option<i64>,
    /// End of its last connection, its newest record or its newest sign of life, whichever is latest.
    pub seen_ns: Option<i64>,
    /// Its newest record, by the PC's clock.
    pub record_ns: Option<i64>,
    /// Records that waited in its spool at its newest heartbeat.
    pub backlog: Option<u64>,
    /// Holes in its history.
    pub gaps: u64,
    /// Records in those whose size is known; rounded above 2^53.
    pub gap_records: u64,
    /// Those of unknown size: another history began.
    pub restarts: u64,
    /// Since when nothing was heard of it, though it should have been.
    pub missing_ns: Option<i64>,
    /// Its clock minus the server's, as last noticed.
    pub offset_ns: i64,
    /// Its newest heartbeat.
    pub heartbeat: Option<Heartbeat>,
}

/// A PC that wants to be an agent.
#[derive(Clone, Debug)]
pub struct Newcomer {
    /// The token's name.
    pub token_id: [u8; 8],
    /// The token's secret.
    pub secret: [u8; 32],
    /// The number it will have.
    pub uuid: [u8; 16],
    /// Its key.
    pub spki_sha256: [u8; 32],
    /// Its host name.
    pub hostname: Vec<u8>,
    /// The label it asks for; empty: none.
    pub wanted_seat: Vec<u8>,
}

/// What enrolment came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Enrolled {
    /// It is an agent now.
    As {
        /// Its label.
        seat: String,
        /// The revoked agent that had this label before and has another one now.
        renamed: Option<AgentId>,
    },
    /// It is not; why, for people.
    Refused(String),
}

/// Checks the token, consumes one use of it and adds the agent: all inside the caller's one transaction. A key that is
/// enrolled and was never used is granted its seat again, if the newcomer carries the number that it has.
///
/// The label of a revoked agent goes to the newcomer that asks for it; the revoked one becomes `LABEL-old`.
pub fn enrol(
    conn: &Connection,
    newcomer: &Newcomer,
    now_ns: i64,
    zone: &TimeZone,
) -> rusqlite::Result<Enrolled> {
    let token = token(conn, &newcomer.token_id)?;
    let checked = tokens::check(token.as_ref(), &newcomer.token_id, &newcomer.secret, now_ns, zone);
    let known = agent_by_key(conn, &newcomer.spki_sha256)?;
    match (checked, known) {
        // The reply was lost: the same key asks again, and has a seat already. That costs the token nothing.
        (Ok(()) | Err(Refusal::Used { .. }), Some(known)) if is_unused(conn, &known)? => {
            return Ok(if known.uuid == newcomer.uuid {
                Enrolled::As { seat: known.seat, renamed: None }
            } else {
                Enrolled::Refused("this key was being enrolled at the same time; try again".into())
            });
        }
        (Err(refusal), _) => return Ok(Enrolled::Refused(refusal.to_string())),
        (Ok(()), Some(known)) => {
            return Ok(Enrolled::Refused(format!(
                "this key is enrolled already, as seat {}; enrol with a new key",
                known.seat
            )));
        }
        (Ok(()), None) => {}
    }
    conn.execute(
        "UPDATE tokens SET uses_left = uses_left - 1 WHERE id = ?1",
        [newcomer.token_id.as_slice()],
    )?;
    let wanted = seat::label(&newcomer.wanted_seat, &newcomer.hostname);
    let renamed = free_label(conn, &wanted)?;
    let seat = seat::unique(&wanted, |label| is_taken(conn, label))?;
    conn.execute(
        "INSERT INTO agents (uuid, seat, spki_sha256, hostname, enrolled_ns, head) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        params![
            newcomer.uuid,
            seat,
            newcomer.spki_sha256,
            newcomer.hostname,
            now_ns,
            chain::start(&newcomer.uuid)
        ],
    )?;
    Ok(Enrolled::As { seat, renamed })
}

/// True for an agent that may deliver and never did, nor ever connected.
fn is_unused(conn: &Connection, agent: &Agent) -> rusqlite::Result<bool> {
    conn.prepare_cached(
        "SELECT 1 FROM agents WHERE id = ?1 AND revoked_ns IS NULL AND next_n = 1
             AND connected_ns IS NULL AND seen_ns IS NULL
             AND NOT EXISTS (SELECT 1 FROM epochs WHERE agent = ?1)",
    )?
    .exists([agent.id.0])
}

/// Labels are unique whatever their case: they name directories, and people say them.
fn is_taken(conn: &Connection, label: &str) -> rusqlite::Result<bool> {
    conn.prepare_cached("SELECT 1 FROM agents WHERE seat = ?1 COLLATE NOCASE")?.exists([label])
}

/// A revoked agent gives its label to the newcomer that asks for it; which one that was.
fn free_label(conn: &Connection, label: &str) -> rusqlite::Result<Option<AgentId>> {
    let revoked = conn
        .prepare_cached(
            "SELECT id, uuid, seat, revoked_ns, quarantined_ns FROM agents
             WHERE seat = ?1 COLLATE NOCASE AND revoked_ns IS NOT NULL",
        )?
        .query_row([label], agent)
        .optional()?;
    let Some(revoked) = revoked else { return Ok(None) };
    let seat = seat::unique(&seat::old(&revoked.seat), |label| is_taken(conn, label))?;
    conn.execute("UPDATE agents SET seat = ?2 WHERE id = ?1", params![revoked.id.0, seat])?;
    Ok(Some(revoked.id))
}

/// Keeps a new token, and forgets those that expired more than 30 days ago (until then they are told from
/// unknown ones).
pub fn add_token(conn: &Connection, token: &StoredToken) -> rusqlite::Result<()> {
    const MONTH_NS: i64 = 30 * 86_400_000_000_000;
    conn.execute("DELETE FROM tokens WHERE expires_ns < ?1", [token.created_ns.saturating_sub(MONTH_NS)])?;
    conn.execute(
        "INSERT INTO tokens (id, secret_sha256, created_ns, expires_ns, uses, uses_left)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        params![
            token.id,
            token.secret_sha256,
            token.created_ns,
            token.expires_ns,
            token.uses,
            token.uses_left
        ],
    )?;
    Ok(())
}

fn token(conn: &Connection, id: &[u8; 8]) -> rusqlite::Result<Option<StoredToken>> {
    conn.prepare_cached(
        "SELECT id, secret_sha256, created_ns, expires_ns, uses, uses_left FROM tokens WHERE id = ?1",
    )?
    .query_row([id.as_slice()], stored_token)
    .optional()
}

fn stored_token(row: &Row<'_>) -> rusqlite::Result<StoredToken> {
    Ok(StoredToken {
        id: row.get(0)?,
        secret_sha256: row.get(1)?,
        created_ns: row.get(2)?,
        expires_ns: row.get(3)?,
        uses: row.get(4)?,
        uses_left: row.get(5)?,
    })
}

/// All tokens that are kept, the newest first.
pub fn tokens(conn: &Connection) -> rusqlite::Result<Vec<StoredToken>> {
    conn.prepare_cached(
        "SELECT id, secret_sha256, created_ns, expires_ns, uses, uses_left FROM tokens ORDER BY created_ns DESC, id",
    )?
    .query_map([], stored_token)?
    .collect()
}

/// A token expires now, and has no uses left, so that it does not come back with a clock that is set back; false: there is
/// none of this ID that is still valid, or will be by another clock.
pub fn withdraw_token(conn: &Connection, id: &[u8; 8], now_ns: i64) -> rusqlite::Result<bool> {
    let changed = conn.execute(
        "UPDATE tokens SET expires_ns = min(expires_ns, ?2), uses = uses - uses_left, uses_left = 0
         WHERE id = ?1 AND (expires_ns > ?2 OR uses_left > 0)",
        params![id, now_ns],
    )?;
    Ok(changed > 0)
}

fn agent(row: &Row<'_>) -> rusqlite::Result<Agent> {
    Ok(Agent {
        id: AgentId(row.get("id")?),
        uuid: row.get("uuid")?,
        seat: row.get("seat")?,
        revoked_ns: row.get("revoked_ns")?,
        quarantined_ns: row.get("quarantined_ns")?,
    })
}

/// The agent with this key, revoked ones included; the key of a renewed certificate is one, too.
pub fn agent_by_key(conn: &Connection, spki_sha256: &[u8; 32]) -> rusqlite::Result<Option<Agent>> {
    conn.prepare_cached(
        "SELECT id, uuid, seat, revoked_ns, quarantined_ns FROM agents WHERE spki_sha256 = ?1 OR next_spki_sha256 = ?1",
    )?
    .query_row([spki_sha256.as_slice()], agent)
    .optional()
}

/// An agent gets a certificate for a new key; both keys are its own until it has used the new one.
pub fn renew(conn: &Connection, id: AgentId, spki_sha256: &[u8; 32]) -> rusqlite::Result<()> {
    conn.execute("UPDATE agents SET next_spki_sha256 = ?2 WHERE id = ?1", params![id.0, spki_sha256])?;
    Ok(())
}

/// The agent whose key this was before it used the next one.
pub fn agent_by_ended_key(conn: &Connection, spki_sha256: &[u8; 32]) -> rusqlite::Result<Option<Agent>> {
    conn.prepare_cached(
        "SELECT id, uuid, seat, revoked_ns, quarantined_ns FROM agents
         WHERE id = (SELECT agent FROM ended_keys WHERE spki_sha256 = ?1)",
    )?
    .query_row([spki_sha256.as_slice()], agent)
    .optional()
}

/// An agent has connected with this key: if it is the new one, the old one is not its own any more.
pub fn used_key(conn: &Connection, id: AgentId, spki_sha256: &[u8; 32]) -> rusqlite::Result<()> {
    conn.prepare_cached(
        "INSERT OR IGNORE INTO ended_keys (spki_sha256, agent)
         SELECT spki_sha256, id FROM agents WHERE id = ?1 AND next_spki_sha256 = ?2",
    )?
    .execute(params![id.0, spki_sha256])?;
    conn.prepare_cached(
        "UPDATE agents SET spki_sha256 = ?2, next_spki_sha256 = NULL WHERE id = ?1 AND next_spki_sha256 = ?2",
    )?
    .execute(params![id.0, spki_sha256])?;
    Ok(())
}

/// An agent is not let in for a while.
pub fn quarantine(conn: &Connection, id: AgentId, until_ns: i64) -> rusqlite::Result<()> {
    conn.execute("UPDATE agents SET quarantined_ns = ?2 WHERE id = ?1", [id.0, until_ns])?;
    Ok(())
}

/// The agent with this number.
pub fn agent_by_id(conn: &Connection, id: AgentId) -> rusqlite::Result<Option<Agent>> {
    conn.prepare_cached("SELECT id, uuid, seat, revoked_ns, quarantined_ns FROM agents WHERE id = ?1")?
        .query_row([id.0], agent)
        .optional()
}

/// False for a revoked agent.
pub fn is_allowed(conn: &Connection, id: AgentId) -> rusqlite::Result<bool> {
    conn.prepare_cached("SELECT 1 FROM agents WHERE id = ?1 AND revoked_ns IS NULL")?.exists([id.0])
}

/// The agents that `name` means: the one with that label, whatever its case, else all whose UUID starts with it.
pub fn find_seat(conn: &Connection, name: &str) -> rusqlite::Result<Vec<Agent>> {
    let mut exact = conn.prepare_cached(
        "SELECT id, uuid, seat, revoked_ns, quarantined_ns FROM agents WHERE seat = ?1 COLLATE NOCASE",
    )?;
    if let Some(found) = exact.query_row([name], agent).optional()? {
        return Ok(vec![found]);
    }
    let hex: String = name.chars().filter(|c| *c != '-').map(|c| c.to_ascii_lowercase()).collect();
    if hex.len() < 4 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(Vec::new());
    }
    conn.prepare_cached(
        "SELECT id, uuid, seat, revoked_ns, quarantined_ns FROM agents
         WHERE substr(lower(hex(uuid)), 1, ?1) = ?2 ORDER BY seat",
    )?
    .query_map(params![hex.len() as i64, hex], agent)?
    .collect()
}

/// Takes an agent off the allow-list; false when it was off already.
pub fn revoke(conn: &Connection, id: AgentId, now_ns: i64) -> rusqlite::Result<bool> {
    let changed = conn
        .execute("UPDATE agents SET revoked_ns = ?2 WHERE id = ?1 AND revoked_ns IS NULL", [id.0, now_ns])?;
    if changed == 1 {
        add_notice(conn, id, &Notice::Revoked, now_ns)?;
    }
    Ok(changed == 1)
}

/// An agent has said hello on connection number `connection`; numbers start at 1 and grow.
pub fn connected(
    conn: &Connection,
    id: AgentId,
    connection: u64,
    hostname: &Raw,
    agent_version: &Raw,
    now_ns: i64,
) -> rusqlite::Result<()> {
    // The older of two connections may come second here: the newer one stays.
    conn.prepare_cached(
        "UPDATE agents SET hostname = :hostname, agent_version = :version,
             connected_ns = iif(coalesce(connection, 0) < :connection, :now, connected_ns),
             connection = max(coalesce(connection, 0), :connection)
         WHERE id = :id",
    )?
    .execute(named_params! {
        ":id": id.0, ":connection": connection as i64, ":hostname": hostname.as_bytes(),
        ":version": agent_version.as_bytes(), ":now": now_ns,
    })?;
    Ok(())
}

/// Keeps how an agent introduced itself. A checkpoint that it holds (whose signature the caller has verified) and that the
/// store does not have is noticed: the store was set back, or its end was cut off.
pub fn introduced(conn: &Connection, id: AgentId, about: &About, now_ns: i64) -> rusqlite::Result<()> {
    let bytes = postcard::to_stdvec(&About { witness: None, ..about.clone() }).unwrap_or_default();
    conn.prepare_cached("UPDATE agents SET about = ?2 WHERE id = ?1")?.execute(params![id.0, bytes])?;
    let Some(witness) = &about.witness else { return Ok(()) };
    let known: Option<[u8; 32]> = conn
        .prepare_cached("SELECT head FROM checkpoints WHERE agent = ?1 AND size = ?2")?
        .query_row([id.0, witness.size as i64], |row| row.get(0))
        .optional()?;
    if known != Some(witness.head) {
        add_set_back(conn, id, witness, now_ns)?;
    }
    Ok(())
}

/// Did the agent introduce itself before? It speaks at least version 2 of the protocol then.
pub fn was_introduced(conn: &Connection, id: AgentId) -> rusqlite::Result<bool> {
    conn.prepare_cached("SELECT about IS NOT NULL FROM agents WHERE id = ?1")?
        .query_row([id.0], |row| row.get(0))
}

/// Notices, once, that the store does not have a checkpoint that this server signed.
pub fn add_set_back(
    conn: &Connection,
    id: AgentId,
    checkpoint: &Checkpoint,
    now_ns: i64,
) -> rusqlite::Result<()> {
    let notice = Notice::StoreSetBack { size: checkpoint.size, signed_ns: checkpoint.signed_ns };
    let is_said: bool = conn
        .prepare_cached("SELECT EXISTS (SELECT 1 FROM notices WHERE agent = ?1 AND notice = ?2)")?
        .query_row(params![id.0, notice.to_bytes()], |row| row.get(0))?;
    if is_said { Ok(()) } else { add_notice(conn, id, &notice, now_ns) }
}

/// Connection number `connection` is over; nothing happens where a newer one has taken its place.
pub fn disconnected(conn: &Connection, id: AgentId, connection: u64, now_ns: i64) -> rusqlite::Result<()> {
    conn.prepare_cached(
        "UPDATE agents SET connection = NULL, connected_ns = NULL, seen_ns = ?3 WHERE id = ?1 AND connection = ?2",
    )?
    .execute([id.0, connection as i64, now_ns])?;
    Ok(())
}

/// At the server's start: connections of an earlier run that ended badly are over.
pub fn forget_connections(conn: &Connection) -> rusqlite::Result<()> {
    conn.execute("UPDATE agents SET connection = NULL, connected_ns = NULL", [])?;
    Ok(())
}

/// Revoked agents that are still connected: agent and number of the connection.
pub fn revoked_connections(conn: &Connection) -> rusqlite::Result<Vec<(AgentId, u64)>> {
    conn.prepare_cached(
        "SELECT id, connection FROM agents WHERE revoked_ns IS NOT NULL AND connection IS NOT NULL",
    )?
    .query_map([], |row| Ok((AgentId(row.get(0)?), row.get::<_, i64>(1)? as u64)))?
    .collect()
}

/// All agents that may not deliver any more.
pub fn revoked_agents(conn: &Connection) -> rusqlite::Result<Vec<AgentId>> {
    conn.prepare_cached("SELECT id FROM agents WHERE revoked_ns IS NOT NULL")?
        .query_map([], |row| Ok(AgentId(row.get(0)?)))?
        .collect()
}

/// All agents, in order of their labels.
pub fn summaries(conn: &Connection) -> rusqlite::Result<Vec<AgentSummary>> {
    conn.prepare(
        "SELECT a.*, count(g.n) AS gaps, total(g.to_seq - g.from_seq + 1) AS gap_records,
             total(g.from_seq > g.to_seq) AS restarts
         FROM agents a LEFT JOIN gaps g ON g.agent = a.id GROUP BY a.id ORDER BY a.seat",
    )?
    .query_map([], |row| {
        let (seen, received): (Option<i64>, Option<i64>) = (row.get("seen_ns")?, row.get("received_ns")?);
        let heard: Option<i64> = row.get("heard_ns")?;
        Ok(AgentSummary {
            agent: agent(row)?,
            hostname: row.get("hostname")?,
            connected_ns: row.get("connected_ns")?,
            seen_ns: seen.max(received).max(heard),
            record_ns: row.get("record_ns")?,
            backlog: row.get::<_, Option<i64>>("backlog")?.map(|backlog| backlog as u64),
            gaps: row.get::<_, i64>("gaps")? as u64,
            // A float: an agent may name holes of any size, and the sum of integers would be an error.
            gap_records: row.get::<_, f64>("gap_records")? as u64,
            restarts: row.get::<_, f64>("restarts")? as u64,
            missing_ns: row.get("missing_ns")?,
            offset_ns: row.get::<_, Option<i64>>("offset_ns")?.unwrap_or_default(),
            heartbeat: presence::decode(row.get("heartbeat")?),
        })
    })?
    .collect()
}
