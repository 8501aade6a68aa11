//! Is the store what the agents promised?

use std::collections::BTreeMap;

use netmon_common::model::{Event, Gap, GapReason, Record};
use netmon_server::chain::{self, Entry};
use netmon_server::notice::Notice;
use netmon_server::store::{AgentId, history};
use rusqlite::Connection;

use crate::ledger::{Excuse, Ledger, Place};

/// What a history came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Verdict {
    /// Records in the store.
    pub records: u64,
    /// Gaps of known size.
    pub gaps: u64,
    /// Records in those.
    pub gap_records: u64,
    /// Gaps of unknown size.
    pub restarts: u64,
    /// Histories that began anew though every promised record came.
    pub needless_restarts: u64,
    /// Records that came twice, after a spool was set back.
    pub doubles: u64,
    /// Promised records that are missing, for a reason that is known and said.
    pub missing: u64,
    /// Missing records of which the spool's own gap tells: the server had not heard of their numbers, or heard of them
    /// after later ones.
    pub told: u64,
    /// Missing records of epochs that gave way wholly before the server heard of them, and the spool's own gap with
    /// them.
    pub unheard: u64,
    /// Missing records that nothing in the store tells of: nobody but the lost disk knew them.
    pub unseen: u64,
}

/// The history of one agent, as the store has it.
#[derive(Debug, Default)]
struct History {
    /// By identity: epoch, number, bytes.
    records: BTreeMap<u64, Vec<(u64, u64, Vec<u8>)>>,
    /// Epoch, first, last.
    gaps: Vec<(u64, u64, u64)>,
    /// Epochs that began another history.
    restarts: Vec<u64>,
    /// Where each epoch stands.
    next: BTreeMap<u64, u64>,
    is_noticed: bool,
    /// Records in gaps of the spool's own: it was full.
    told: u64,
    /// A gap of the spool's own: it was damaged.
    tells_damage: bool,
}

/// Which records of an agent a store holds: identity and place.
pub fn held(conn: &Connection, agent: AgentId) -> Result<BTreeMap<u64, Vec<Place>>, String> {
    let items = history::stored_from(conn, agent, 1, usize::MAX / 2).map_err(|error| error.to_string())?;
    let mut held: BTreeMap<u64, Vec<Place>> = BTreeMap::new();
    for item in &items {
        if let Entry::Record { epoch, seq, bytes, .. } = item.entry()
            && let Ok(record) = Record::from_bytes(bytes)
        {
            held.entry(record.boot_ns).or_default().push((epoch, seq));
        }
    }
    Ok(held)
}

/// Is the whole of an agent's history in order, and everything in it that the agent promised?
///
/// # Errors
/// What is wrong.
pub fn verify(
    conn: &Connection,
    agent: AgentId,
    uuid: &[u8; 16],
    ledger: &Ledger,
) -> Result<Verdict, String> {
    let mut history = read(conn, agent, uuid)?;
    let mut verdict = Verdict { restarts: history.restarts.len() as u64, ..Verdict::default() };
    for (id, copies) in &history.records {
        verdict.records += copies.len() as u64;
        verdict.doubles += copies.len() as u64 - 1;
        let entry =
            ledger.entries.get(id).ok_or_else(|| format!("the store has record {id}, which nobody made"))?;
        if entry.gone {
            return Err(format!("the store has record {id}, which was lost before it was synced"));
        }
        // A store that is set back once more may have had it under the older number.
        let may_double = ledger.is_set_back || ledger.is_store_set_back && ledger.has_left;
        if copies.len() > 1 && !may_double {
            return Err(format!("the store has record {id} {} times", copies.len()));
        }
        for (epoch, seq, bytes) in copies {
            if !entry.places.contains(&(*epoch, *seq)) {
                return Err(format!("record {id} of {:x?} is at {epoch:x}/{seq} in the store", entry.places));
            }
            if *bytes != entry.bytes(*seq) {
                return Err(format!("record {id} at {epoch:x}/{seq} is not what was recorded"));
            }
        }
    }
    for (epoch, from, to) in &history.gaps {
        verdict.gaps += 1;
        verdict.gap_records += to - from + 1;
        for seq in *from..=*to {
            // One that was numbered anew after it had come may give way, too.
            let is_excused = ledger.entries.iter().any(|(id, entry)| {
                let may_lack = entry.was_excused || history.records.contains_key(id);
                may_lack && entry.places.contains(&(*epoch, seq))
            });
            if !is_excused && !ledger.unclear.contains(epoch) {
                return Err(format!("a gap {epoch:x}/{from}..={to} without a reason for {seq}"));
            }
        }
    }
    if !history.restarts.is_empty() && !ledger.was_disturbed {
        return Err("another history begins without a reason".into());
    }
    if history.is_noticed && !ledger.is_store_set_back {
        return Err("the store is said to be set back, and was not".into());
    }
    for (id, entry) in &ledger.entries {
        if !entry.promised || entry.gone || history.records.contains_key(id) {
            continue;
        }
        verdict.missing += 1;
        let shown = || format!("promised record {id} of {:x?} ({})", entry.places, kind(entry));
        let excuse = match entry.excuse {
            Some(excuse) => excuse,
            None if ledger.is_mistakable(*id) => {
                verdict.unseen += 1;
                continue;
            }
            None => return Err(format!("{} is missing", shown())),
        };
        let in_gap = entry.places.iter().any(|(epoch, seq)| {
            history.gaps.iter().any(|(at, from, to)| at == epoch && (from..=to).contains(&seq))
        });
        // Another history that began after the record's own.
        let index = |epoch: &u64| ledger.epochs.iter().position(|other| other == epoch);
        let newest = entry.places.iter().filter_map(|(epoch, _)| index(epoch)).max();
        let in_restart = history.restarts.iter().any(|epoch| index(epoch) > newest);
        if in_gap || in_restart {
            continue;
        }
        let known =
            entry.places.iter().any(|(epoch, _)| history.next.get(epoch).is_some_and(|next| *next > 1));
        match excuse {
            Excuse::GaveWay if history.told > 0 => {
                history.told -= 1;
                verdict.told += 1;
            }
            Excuse::Damaged if history.tells_damage => verdict.told += 1,
            // It would have come again after the store was set back, and was damaged meanwhile.
            Excuse::StoreSetBack if entry.was_hit && history.tells_damage => verdict.told += 1,
            // The record was on that disk alone, and what came before the state to which it was set back, too.
            Excuse::SpoolSetBack => verdict.unseen += 1,
            // The server had never heard of it.
            Excuse::Deleted | Excuse::Damaged if !known || ledger.is_set_back => verdict.unseen += 1,
            Excuse::StoreSetBack if history.is_noticed => {}
            Excuse::GaveWay if !known => verdict.unheard += 1,
            // Before the first checkpoint there is no witness.
            Excuse::StoreSetBack if !known => verdict.unseen += 1,
            _ if ledger.is_mistakable(*id) => verdict.unseen += 1,
            _ => {
                return Err(format!("{} is missing ({excuse:?}), and nothing in the store says so", shown()));
            }
        }
    }
    if verdict.missing == 0 {
        verdict.needless_restarts = verdict.restarts;
    }
    Ok(verdict)
}

/// A history in a few words, for people who look for a mistake.
pub fn describe(conn: &Connection, agent: AgentId) -> String {
    let items = history::stored_from(conn, agent, 1, usize::MAX / 2).unwrap_or_default();
    let shown = items.iter().map(|item| match item.entry() {
        Entry::Record { epoch, seq, bytes, .. } => {
            let id = Record::from_bytes(bytes).map_or(0, |record| record.boot_ns);
            format!("{}: record {id} at {epoch:x}/{seq}", item.n)
        }
        Entry::Gap { epoch, from, to, .. } if from > to => format!("{}: {epoch:x} begins anew", item.n),
        Entry::Gap { epoch, from, to, .. } => format!("{}: gap {epoch:x}/{from}..={to}", item.n),
        Entry::Notice { .. } => format!("{}: notice", item.n),
    });
    shown.collect::<Vec<_>>().join("; ")
}

fn kind(entry: &crate::ledger::Entry) -> String {
    let event = format!("{:?}", entry.event());
    event.chars().take(60).collect()
}

/// Reads a history and looks at what must hold of any: places without a hole, the chain, every epoch's numbers in order
/// and without an unnamed hole, the watermarks.
fn read(conn: &Connection, agent: AgentId, uuid: &[u8; 16]) -> Result<History, String> {
    let sql = |error: rusqlite::Error| error.to_string();
    let mut found = History::default();
    let mut head = chain::start(uuid);
    let items = history::stored_from(conn, agent, 1, usize::MAX / 2).map_err(sql)?;
    for (n, item) in (1..).zip(&items) {
        if item.n != n {
            return Err(format!("item {} of agent {} stands at place {n}", item.n, agent.0));
        }
        let entry = item.entry();
        head = chain::link(&head, n as u64, &entry);
        if chain::short(&head) != item.link {
            return Err(format!("the chain of agent {} is broken at place {n}", agent.0));
        }
        match entry {
            Entry::Record { epoch, seq, bytes, .. } => {
                let next = found.next.entry(epoch).or_insert(1);
                if *next != seq {
                    return Err(format!("record {epoch:x}/{seq} follows on {}", *next - 1));
                }
                *next += 1;
                let record =
                    Record::from_bytes(bytes).map_err(|error| format!("{epoch:x}/{seq}: {error}"))?;
                if record.seq != seq {
                    return Err(format!("record {} is at {epoch:x}/{seq}", record.seq));
                }
                match record.event {
                    Event::Gap(Gap { reason: GapReason::SpoolFull, count, .. }) => {
                        found.told += count.unwrap_or_default();
                    }
                    Event::Gap(Gap { reason: GapReason::SpoolDamaged, .. }) => found.tells_damage = true,
                    _ => {}
                }
                found.records.entry(record.boot_ns).or_default().push((epoch, seq, bytes.to_vec()));
            }
            Entry::Gap { epoch, from, to, .. } if from > to => {
                if found.next.insert(epoch, 1).is_some() {
                    return Err(format!("the known epoch {epoch:x} begins anew"));
                }
                found.restarts.push(epoch);
            }
            Entry::Gap { epoch, from, to, .. } => {
                let next = found.next.entry(epoch).or_insert(1);
                if *next != from {
                    return Err(format!("the gap {epoch:x}/{from}..={to} follows on {}", *next - 1));
                }
                *next = to + 1;
                found.gaps.push((epoch, from, to));
            }
            Entry::Notice { bytes, .. } => match Notice::from_bytes(bytes) {
                Some(Notice::StoreSetBack { .. }) => found.is_noticed = true,
                other => return Err(format!("a notice without a reason: {other:?}")),
            },
        }
    }
    if history::size_and_head(conn, agent).map_err(sql)? != (items.len() as u64, head) {
        return Err(format!("agent {} does not end where its history ends", agent.0));
    }
    let mut epochs = conn.prepare("SELECT epoch, next_seq FROM epochs WHERE agent = ?1").map_err(sql)?;
    let epochs =
        epochs.query_map([agent.0], |row| Ok((row.get::<_, i64>(0)? as u64, row.get::<_, i64>(1)? as u64)));
    for epoch in epochs.map_err(sql)? {
        let (epoch, next_seq) = epoch.map_err(sql)?;
        if *found.next.entry(epoch).or_insert(1) != next_seq {
            return Err(format!(
                "the watermark of {epoch:x} is {next_seq}, its records end before {:?}",
                found.next
            ));
        }
    }
    Ok(found)
}
