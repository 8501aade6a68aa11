//! The server's store as an auditor reads it: the file alone, read-only, without the server's code.

use std::collections::BTreeMap;
use std::path::Path;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

/// How far the history of one epoch goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// The number that is expected next: everything below is acknowledged.
    pub next_seq: u64,
    /// Records that are there.
    pub records: u64,
    /// Numbers that are named in gaps.
    pub missing: u64,
}

impl Extent {
    /// True when each number below the watermark is a record or in a gap, by their sums.
    pub fn is_whole(&self) -> bool {
        self.records + self.missing + 1 == self.next_seq
    }
}

/// What the store has in the end.
#[derive(Clone, Debug, Default)]
pub struct Audit {
    /// Records.
    pub records: u64,
    /// Epochs.
    pub epochs: usize,
    /// Records that are there twice, by `(agent, epoch, seq)`.
    pub doubled: u64,
    /// Numbers that are neither a record nor in a gap.
    pub lost: u64,
    /// Gaps of records that never came.
    pub never_received: u64,
    /// Histories that began anew.
    pub restarts: u64,
    /// What is wrong, in words.
    pub findings: Vec<String>,
    /// What the server noticed.
    pub notices: u64,
}

/// An open store.
#[derive(Debug)]
pub struct Store(Connection);

impl Store {
    /// Opens the file and what lies in its write-ahead log. The files stay as they are.
    ///
    /// # Errors
    /// SQLite's.
    pub fn open(path: &Path) -> rusqlite::Result<Self> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let store = Connection::open_with_flags(path, flags)?;
        // The server finds what it left when it was killed.
        store.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        Ok(Self(store))
    }

    /// How far each epoch goes.
    ///
    /// # Errors
    /// SQLite's.
    pub fn extents(&self) -> rusqlite::Result<BTreeMap<u64, Extent>> {
        let mut epochs = self.0.prepare(
            "SELECT epoch, next_seq,
                 (SELECT count(*) FROM events WHERE events.agent = epochs.agent AND events.epoch = epochs.epoch),
                 (SELECT coalesce(sum(max(to_seq - from_seq + 1, 0)), 0) FROM gaps
                     WHERE gaps.agent = epochs.agent AND gaps.epoch = epochs.epoch)
             FROM epochs",
        )?;
        let rows = epochs.query_map([], |row| {
            let number = |column| row.get::<_, i64>(column).map(i64::cast_unsigned);
            Ok((number(0)?, Extent { next_seq: number(1)?, records: number(2)?, missing: number(3)? }))
        })?;
        rows.collect()
    }

    /// Goes through everything. Indexes are not used: they may be what is wrong.
    ///
    /// # Errors
    /// SQLite's.
    pub fn audit(&self) -> rusqlite::Result<Audit> {
        let mut audit = Audit::default();
        let sound: String = self.0.query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
        if sound != "ok" {
            audit.findings.push(format!("the store's file is damaged: {sound}"));
        }
        let mut epochs: BTreeMap<_, Vec<(u64, u64)>> = BTreeMap::new();
        let mut places: BTreeMap<i64, Vec<u64>> = BTreeMap::new();
        let mut items = self.0.prepare(
            "SELECT agent, epoch, n, seq, seq, 1 FROM events NOT INDEXED
             UNION ALL SELECT agent, epoch, n, from_seq, to_seq, 0 FROM gaps NOT INDEXED
             UNION ALL SELECT agent, 0, n, 0, 0, 2 FROM notices NOT INDEXED",
        )?;
        let mut rows = items.query([])?;
        while let Some(row) = rows.next()? {
            let number = |column| row.get::<_, i64>(column).map(i64::cast_unsigned);
            let (agent, first, last) = (row.get(0)?, number(3)?, number(4)?);
            places.entry(agent).or_default().push(number(2)?);
            match (row.get::<_, u8>(5)?, first > last) {
                (1, _) => audit.records += 1,
                (0, false) => audit.never_received += 1,
                (0, true) => {
                    audit.restarts += 1;
                    continue;
                }
                _ => {
                    audit.notices += 1;
                    continue;
                }
            }
            epochs.entry((agent, number(1)?)).or_default().push((first, last));
        }
        audit.epochs = epochs.len();
        for (agent, places) in &mut places {
            places.sort_unstable();
            if let Some((expected, place)) = (1..).zip(&*places).find(|(expected, place)| expected != *place)
            {
                audit
                    .findings
                    .push(format!("agent {agent}: item {expected} of its history is number {place}"));
            }
        }
        let next = self.extents()?;
        for ((_, epoch), items) in &mut epochs {
            items.sort_unstable();
            let (doubled, lost, end) = walk(items);
            audit.doubled += doubled;
            audit.lost += lost;
            let next_seq = next.get(epoch).map(|extent| extent.next_seq);
            if (doubled, lost) != (0, 0) || next_seq != Some(end) {
                audit.findings.push(format!(
                    "epoch {epoch:x}: {doubled} numbers twice, {lost} missing; it ends before {end}, the watermark is {next_seq:?}"
                ));
            }
        }
        Ok(audit)
    }
}

/// Goes along runs of numbers, first and last of each, in order: how many come twice, how many are missing, which is
/// next.
fn walk(items: &[(u64, u64)]) -> (u64, u64, u64) {
    let (mut doubled, mut lost, mut expected) = (0, 0, 1_u64);
    for &(first, last) in items {
        doubled += expected.saturating_sub(first).min(last + 1 - first);
        lost += first.saturating_sub(expected);
        expected = expected.max(last + 1);
    }
    (doubled, lost, expected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_are_missing_or_there_twice_are_counted() {
        assert_eq!(walk(&[(1, 1), (2, 2), (3, 7), (8, 8)]), (0, 0, 9));
        assert_eq!(walk(&[(1, 1), (3, 3), (3, 3), (7, 7)]), (1, 4, 8));
        assert_eq!(walk(&[(1, 5), (4, 6)]), (2, 0, 7));
        assert_eq!(walk(&[(2, 2)]), (0, 1, 3));
    }

    #[test]
    fn an_extent_is_whole_when_nothing_below_the_watermark_is_unaccounted_for() {
        assert!(Extent { next_seq: 8, records: 5, missing: 2 }.is_whole());
        assert!(Extent { next_seq: 1, ..Extent::default() }.is_whole());
        assert!(!Extent { next_seq: 8, records: 5, missing: 1 }.is_whole());
        assert!(!Extent { next_seq: 8, records: 8, missing: 0 }.is_whole());
    }
}
