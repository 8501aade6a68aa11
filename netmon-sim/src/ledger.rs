//! What an agent promised: every record that it ever made, and what became of it as far as the spool's promises go.

use std::collections::{BTreeMap, BTreeSet};

use netmon_common::model::{Event, Record};

/// Why a promised record may be missing at the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Excuse {
    /// The spool was full.
    GaveWay,
    /// The spool's files were damaged.
    Damaged,
    /// The spool was deleted.
    Deleted,
    /// The spool was set back to an older state.
    SpoolSetBack,
    /// The store was set back to an older state.
    StoreSetBack,
}

/// Epoch and number.
pub type Place = (u64, u64);

/// A record that was made.
#[derive(Clone, Debug)]
pub struct Entry {
    record: Record,
    /// Where it stands and stood; the last one counts.
    pub places: Vec<Place>,
    /// It was synced.
    pub promised: bool,
    /// A start could not read it, nor everything: it is not known whether it is still there.
    is_unknown: bool,
    /// It was never synced and did not survive.
    pub gone: bool,
    /// It was promised, and is not in the spool any more though it was not acknowledged.
    pub left: bool,
    /// The agent was told that the server has it, and the store was not set back to a state before that.
    pub acked: bool,
    /// The agent was once told that the server has it.
    was_acked: bool,
    /// It may be missing.
    pub excuse: Option<Excuse>,
    /// The server may have been told that it cannot come.
    was_given_up: bool,
    /// It might have been missing at some time: a gap may name it.
    pub was_excused: bool,
    /// It stands in a file that was damaged, and no start has read that since.
    is_hit: bool,
    /// It stood in such a file once.
    pub was_hit: bool,
}

impl Entry {
    fn excuse(&mut self, excuse: Excuse) {
        self.excuse = Some(excuse);
        self.was_given_up |= excuse != Excuse::SpoolSetBack;
        self.was_excused = true;
    }

    /// It is not in the spool any more.
    fn leave(&mut self, excuse: Excuse) {
        self.excuse(excuse);
        self.left = true;
    }

    /// The server may have been told that it cannot come, if something was damaged or gave way.
    fn may_lack(&mut self, gave_way: u64) {
        let excuse = match (self.is_hit, gave_way) {
            (true, _) => Excuse::Damaged,
            (false, 1..) => Excuse::GaveWay,
            (false, 0) => return,
        };
        self.was_excused = true;
        self.excuse = self.excuse.or(Some(excuse));
    }

    fn is_live(&self) -> bool {
        !self.gone && !self.left
    }

    fn place(&self) -> Place {
        self.places.last().copied().unwrap_or_default()
    }

    /// It must be in the spool.
    fn is_kept(&self) -> bool {
        self.is_live() && self.promised && !self.acked && self.excuse.is_none() && !self.is_unknown
    }

    /// Its bytes under this number.
    pub fn bytes(&self, seq: u64) -> Vec<u8> {
        Record { seq, ..self.record.clone() }.to_bytes().unwrap_or_default()
    }

    /// What happened.
    pub fn event(&self) -> &Event {
        &self.record.event
    }
}

/// The spool's records at one moment, by their identity.
pub type Readable = BTreeMap<u64, Place>;

/// What was known of the spool's files at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Which records they hold.
    held: BTreeMap<u64, Held>,
    is_unsettled: bool,
    gave_way: u64,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    place: Place,
    is_unknown: bool,
}

/// What an agent promised. A record's identity is its boot time: in a simulation no two have the same.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    /// By identity.
    pub entries: BTreeMap<u64, Entry>,
    /// The spool's files were damaged, and no start has read them since.
    pub is_damaged: bool,
    /// So was the file in which it records.
    is_open_hit: bool,
    /// The spool's files were damaged at least once.
    pub was_damaged: bool,
    /// The spool was set back at least once: records may come twice.
    pub is_set_back: bool,
    /// The store was set back at least once.
    pub is_store_set_back: bool,
    /// The epochs, in the order in which they began.
    pub epochs: Vec<u64>,
    /// Epochs in which it is not known which numbers were given to records that were lost at once.
    pub unclear: BTreeSet<u64>,
    /// A start could not read or repair everything.
    is_unsettled: bool,
    /// Records that gave way since then and are none that are known.
    gave_way: u64,
    /// Records that gave way in the last call of a process, which did not live to tell.
    forgotten: u64,
    /// Something happened after which a history may begin anew.
    pub is_disturbed: bool,
    /// So it did once.
    pub was_disturbed: bool,
    /// Records got other numbers, because the server had others there, or had given them up.
    pub has_left: bool,
    /// It died while records got other numbers: they may have them, or not.
    pub may_have_moved: bool,
    /// Records of this run that the spool refused, and those that it reported.
    refused: u64,
    reported: u64,
}

impl Ledger {
    /// Makes the identity of the next record.
    pub fn next_id(&self) -> u64 {
        self.entries.last_key_value().map_or(1, |(newest, _)| newest + 1)
    }

    /// A record was appended.
    pub fn appended(&mut self, epoch: u64, record: Record) {
        let id = record.boot_ns;
        self.began(epoch);
        let entry = Entry {
            places: vec![(epoch, record.seq)],
            record,
            promised: false,
            is_unknown: false,
            gone: false,
            left: false,
            acked: false,
            was_acked: false,
            excuse: None,
            was_given_up: false,
            was_excused: false,
            is_hit: self.is_open_hit,
            was_hit: self.is_open_hit,
        };
        self.entries.insert(id, entry);
    }

    /// The spool is in this epoch.
    pub fn began(&mut self, epoch: u64) {
        if !self.epochs.contains(&epoch) {
            self.epochs.push(epoch);
        }
    }

    /// So many records gave way in the last call of a process, which did not live to tell.
    pub fn forgotten(&mut self, count: u64) {
        self.forgotten += count;
    }

    /// A file with these records was damaged. `is_open`: what comes next may be written behind them.
    pub fn hit(&mut self, records: &BTreeSet<u64>, is_open: bool) {
        (self.is_damaged, self.was_damaged) = (true, true);
        self.disturb();
        self.is_open_hit |= is_open;
        for (id, entry) in &mut self.entries {
            if records.contains(id) || is_open && entry.is_live() && !entry.promised {
                (entry.is_hit, entry.was_hit) = (true, true);
            }
        }
    }

    /// Does this record stand in a file that was damaged?
    pub fn is_hit(&self, id: u64) -> bool {
        self.entries.get(&id).is_some_and(|entry| entry.is_hit)
    }

    /// Something happened after which a history may begin anew.
    pub fn disturb(&mut self) {
        (self.is_disturbed, self.was_disturbed) = (true, true);
    }

    /// A start found everything in order.
    pub fn is_calm_again(&mut self) {
        self.is_disturbed = false;
    }

    /// The spool refused an event.
    pub fn refused(&mut self, count: u64) {
        self.refused += count;
    }

    /// The spool's own gap for refused events was appended.
    pub fn reported(&mut self, count: u64) {
        self.reported += count;
    }

    /// Refused events of this run, and those that the spool has told of.
    pub fn refusals(&self) -> (u64, u64) {
        (self.refused, self.reported)
    }

    /// The spool was synced up to this record.
    pub fn synced(&mut self, epoch: u64, through: u64) {
        for entry in self.entries.values_mut().rev() {
            let (at, seq) = entry.place();
            if entry.is_live() && at == epoch && seq <= through {
                entry.promised = true;
            }
        }
    }

    /// The agent was told that the server has everything up to this record; which records that is news of.
    ///
    /// # Errors
    /// One of them was never synced.
    pub fn acked(&mut self, epoch: u64, through: u64) -> Result<Vec<u64>, String> {
        let mut news = Vec::new();
        for (id, entry) in &mut self.entries {
            let (at, seq) = entry.place();
            if !entry.is_live() || entry.acked || at != epoch || seq > through {
                continue;
            }
            if !entry.promised {
                return Err(format!("record {id} at {at:x}/{seq} is acknowledged and was never synced"));
            }
            (entry.acked, entry.was_acked) = (true, true);
            if entry.is_unknown {
                // Or the server has a gap there.
                entry.may_lack(self.gave_way);
            }
            news.push(*id);
        }
        Ok(news)
    }

    /// The spool runs: nothing that it promised may have vanished, but for `dropped` records that gave way by its own
    /// count.
    ///
    /// # Errors
    /// More than that are gone.
    pub fn audit(&mut self, has: impl Fn(u64, Place) -> bool, dropped: u64) -> Result<(), String> {
        let mut vanished = Vec::new();
        for (id, entry) in &mut self.entries {
            if entry.is_kept() && !has(*id, entry.place()) {
                vanished.push((*id, entry.place()));
                entry.leave(Excuse::GaveWay);
            }
        }
        if vanished.len() as u64 > dropped {
            return Err(format!(
                "{} records vanished from the spool, which counted {dropped}: {}",
                vanished.len(),
                shown(&vanished)
            ));
        }
        self.gave_way += dropped - vanished.len() as u64;
        Ok(())
    }

    /// Damage was cut out of the spool, which can read these.
    pub fn cut(&mut self, readable: &Readable) {
        for (id, entry) in &mut self.entries {
            if entry.is_kept() && entry.is_hit && !readable.contains_key(id) {
                entry.leave(Excuse::Damaged);
            }
        }
    }

    /// A run began with a spool that can read these. Where it is not settled, [`Ledger::settled`] says what became of the
    /// others.
    ///
    /// # Errors
    /// As [`Ledger::found`] and [`Ledger::settled`].
    pub fn started(&mut self, readable: &Readable, is_settled: bool) -> Result<(), String> {
        (self.refused, self.reported) = (0, 0);
        if !std::mem::replace(&mut self.is_unsettled, true) {
            self.gave_way = 0;
        }
        self.gave_way += std::mem::take(&mut self.forgotten);
        for (id, entry) in &mut self.entries {
            entry.is_unknown = entry.is_live() && !readable.contains_key(id);
            // The server may be told that it cannot come, and a power cut may bring the file back.
            entry.was_excused |= entry.is_unknown && entry.is_hit;
        }
        if !is_settled {
            return self.found(readable, false);
        }
        self.settled(readable)?;
        // It has read everything.
        (self.is_damaged, self.is_open_hit) = (false, false);
        self.entries.values_mut().for_each(|entry| entry.is_hit = false);
        Ok(())
    }

    /// Did a spool that was set back give the number of this record to another one, too? Where the spool does not have the
    /// newest any more that the server has under these numbers, because that is damaged, or because the server was set
    /// back as well, they cannot be told apart.
    pub fn is_mistakable(&self, id: u64) -> bool {
        let mut others = self.entries.iter().filter(|(other, _)| **other != id).map(|(_, other)| other);
        let is_there = |place: &Place| self.entries[&id].places.contains(place);
        let may_be = self.is_set_back && (self.was_damaged || self.is_store_set_back);
        may_be && others.any(|other| other.places.iter().any(is_there))
    }

    /// Is it not known yet what a start found?
    pub fn is_unsettled(&self) -> bool {
        self.is_unsettled
    }

    /// The spool has read and repaired what its start could not.
    ///
    /// # Errors
    /// A promised record is not among what it can read now, or as [`Ledger::found`].
    pub fn settled(&mut self, readable: &Readable) -> Result<(), String> {
        self.found(readable, false)?;
        self.is_unsettled = false;
        let mut lost = Vec::new();
        for (id, entry) in &mut self.entries {
            if !std::mem::take(&mut entry.is_unknown) || readable.contains_key(id) {
                continue;
            }
            if !entry.promised && self.gave_way > 0 {
                // Maybe this one: then a file that could not be removed may bring it back.
                entry.leave(Excuse::GaveWay);
            } else if !entry.promised {
                entry.gone = true;
            } else if entry.acked {
                // Or it was lost before that, and the server has a gap.
                entry.may_lack(self.gave_way);
            } else if entry.is_kept() {
                if entry.is_hit {
                    entry.leave(Excuse::Damaged);
                } else if self.gave_way > 0 {
                    entry.leave(Excuse::GaveWay);
                    self.gave_way -= 1;
                } else {
                    lost.push((*id, entry.place()));
                }
            }
        }
        if lost.is_empty() {
            return Ok(());
        }
        Err(format!("promised records are not in the spool after a start: {}", shown(&lost)))
    }

    /// The spool can read these, and hands them out; with `moves` they may stand under new numbers.
    ///
    /// # Errors
    /// One that nobody made is among them, one that was lost, or one under another number.
    pub fn found(&mut self, readable: &Readable, moves: bool) -> Result<(), String> {
        for (id, place) in readable {
            self.began(place.0);
            let entry =
                self.entries.get_mut(id).ok_or_else(|| format!("nobody made record {id} at {place:?}"))?;
            // What was damaged may be whole again after a power cut.
            if entry.gone && !self.is_set_back && !entry.was_hit {
                return Err(format!("record {id} at {place:?} is back, which was lost before it was synced"));
            }
            // A file whose removal did not come to disk comes back, and so may what an older state had not synced.
            (entry.gone, entry.left, entry.promised, entry.is_unknown) = (false, false, true, false);
            if !entry.was_acked && !entry.was_given_up {
                entry.excuse = entry.excuse.filter(|excuse| *excuse != Excuse::SpoolSetBack);
            }
            if entry.place() != *place {
                let was_there = self.is_set_back && entry.places.contains(place);
                if !moves && !was_there && !self.may_have_moved {
                    return Err(format!("record {id} of {:?} stands at {place:?}", entry.place()));
                }
                entry.places.push(*place);
                if moves || self.may_have_moved {
                    // Numbers of what gave way or was damaged moved, too, and nobody knows where.
                    self.unclear.insert(place.0);
                }
            }
        }
        Ok(())
    }

    /// What a copy of the spool's files holds, as far as that is known now.
    pub fn snapshot(&self) -> Snapshot {
        let live =
            self.entries.iter().filter(|(_, entry)| entry.is_live() && entry.promised && !entry.is_hit);
        let held = |entry: &Entry| Held { place: entry.place(), is_unknown: entry.is_unknown };
        Snapshot {
            held: live.map(|(id, entry)| (*id, held(entry))).collect(),
            is_unsettled: self.is_unsettled,
            gave_way: self.gave_way,
        }
    }

    /// The store was set back to a state in which it holds these.
    pub fn store_set_back(&mut self, held: &BTreeSet<u64>) {
        self.is_store_set_back = true;
        self.disturb();
        for (id, entry) in &mut self.entries {
            if entry.acked && !held.contains(id) {
                // A spool that was set back does not know either that it was there.
                let excuse = if entry.left { Excuse::SpoolSetBack } else { Excuse::StoreSetBack };
                entry.excuse(entry.excuse.unwrap_or(excuse));
                entry.acked = false;
            }
        }
    }

    /// The spool was set back (to nothing: deleted).
    pub fn set_back(&mut self, to: &Snapshot, excuse: Excuse) {
        let is_set_back = excuse == Excuse::SpoolSetBack;
        self.is_set_back |= is_set_back;
        self.disturb();
        (self.is_unsettled, self.gave_way, self.forgotten) = (to.is_unsettled, to.gave_way, 0);
        for (id, entry) in &mut self.entries {
            match to.held.get(id) {
                Some(Held { place, is_unknown }) => {
                    (entry.gone, entry.left, entry.is_unknown) = (false, false, *is_unknown);
                    if entry.place() != *place {
                        entry.places.push(*place);
                    }
                }
                None if !entry.promised => entry.gone = true,
                None => {
                    entry.left = true;
                    // Whatever was to be told of it is not told any more, either.
                    if !entry.acked || entry.excuse.is_some() {
                        entry.excuse(excuse);
                    }
                }
            }
        }
    }
}

fn shown(records: &[(u64, Place)]) -> String {
    let mut shown: Vec<String> =
        records.iter().take(8).map(|(id, (epoch, seq))| format!("{id} at {epoch:x}/{seq}")).collect();
    if records.len() > 8 {
        shown.push("…".into());
    }
    shown.join(", ")
}
