//! What is kept of who was heard, for the commands and for the next start of the server.

use netmon_common::wire::{About, Heartbeat};
use rusqlite::{Connection, OptionalExtension as _, params};
use serde::de::DeserializeOwned;

use super::AgentId;
use crate::presence::{Life, Seen};

/// An agent as it was heard last.
pub type Known = (AgentId, Seen);

/// Postcard that this or an older server wrote; `None`: a newer one did.
pub(super) fn decode<T: DeserializeOwned>(bytes: Option<Vec<u8>>) -> Option<T> {
    postcard::from_bytes(&bytes?).ok()
}

/// All agents that may deliver, as they were heard last.
pub fn known(conn: &Connection) -> rusqlite::Result<Vec<Known>> {
    conn.prepare(
        "SELECT id, heard_ns, about, missing_ns, offset_ns, heartbeat FROM agents WHERE revoked_ns IS NULL",
    )?
    .query_map([], |row| {
        let about: Option<About> = decode(row.get(2)?);
        let mut seen = Seen::default();
        seen.heard_ns = row.get(1)?;
        seen.life = about.map(|about| Life::from(&about));
        seen.missing_ns = row.get(3)?;
        seen.offset_ns = row.get::<_, Option<i64>>(4)?.unwrap_or_default();
        seen.heartbeat = decode::<Heartbeat>(row.get(5)?);
        Ok((AgentId(row.get(0)?), seen))
    })?
    .collect()
}

impl From<&About> for Life {
    fn from(about: &About) -> Self {
        Self { boot_id: about.boot_id, run: about.run, previous_died: about.previous_died }
    }
}

/// Keeps how an agent was heard last.
pub fn save_presence(conn: &Connection, agent: AgentId, seen: &Seen) -> rusqlite::Result<()> {
    let heartbeat = seen.heartbeat.as_ref().and_then(|heartbeat| postcard::to_stdvec(heartbeat).ok());
    conn.prepare_cached(
        "UPDATE agents SET heard_ns = ?2, missing_ns = ?3, offset_ns = ?4, heartbeat = ?5 WHERE id = ?1",
    )?
    .execute(params![agent.0, seen.heard_ns, seen.missing_ns, seen.offset_ns, heartbeat])?;
    Ok(())
}

/// Until when the server surely ran; `None`: never.
pub fn alive(conn: &Connection) -> rusqlite::Result<Option<i64>> {
    conn.query_row("SELECT alive_ns FROM server", [], |row| row.get(0)).optional()
}

/// The server runs.
pub fn save_alive(conn: &Connection, now_ns: i64) -> rusqlite::Result<()> {
    conn.prepare_cached(
        "INSERT INTO server (one, alive_ns) VALUES (1, ?1) ON CONFLICT (one) DO UPDATE SET alive_ns = ?1",
    )?
    .execute([now_ns])?;
    Ok(())
}
