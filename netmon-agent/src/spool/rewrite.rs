//! Segments that are written anew: without their minor records, under new numbers, or as they are; and what gives way
//! without that.

use std::io;
use std::sync::Arc;

use netmon_common::model::{Event, Phase, Record, RecordHead};

use super::files::{Disk, Files, read_at_most, replace};
use super::format::{Frame, HEADER, Header, frames, push_frame, push_hole};
use super::log::{Spool, SpoolError};
use super::segment::{Segment, Stamp};

/// Where age limits a spool, a segment takes records of no more than this time: it gives way as a whole.
const SEGMENT_AGE_NS: u64 = 24 * 3_600_000_000_000;

/// True for what is told again, or summed up, by a later record: the first to give way.
fn is_minor(event: &Event) -> bool {
    match event {
        Event::Muted(_) | Event::Coverage(_) | Event::NamesCoverage(_) => true,
        event => event.transfer().is_some_and(|transfer| transfer.phase == Phase::Progress),
    }
}

/// Why a segment is written anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// Minor records become holes.
    Thin,
    /// What waits goes into this epoch, from this number on.
    Renumber { epoch: u64, first_seq: u64 },
    /// So that the disk has what a reader sees.
    Repair,
}

/// An epoch's records that wait get numbers of another one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Renewal {
    old: u64,
    epoch: u64,
    /// The next number in it.
    next_seq: u64,
}

/// One segment to be written anew; see [`Spool::begin_rewrite`].
pub struct RewriteTicket<F: Files = Disk> {
    files: Arc<F>,
    segment: Segment,
    run: u32,
    change: Change,
}

/// A segment that was written anew; see [`Spool::finish_rewrite`].
pub struct Rewritten {
    number: u64,
    change: Change,
    outcome: Outcome,
}

enum Outcome {
    /// The file as it is now.
    Whole {
        segment: Segment,
        /// Number (as it was) and wall clock of what became a hole.
        removed: Vec<(u64, i64)>,
        /// A power cut cannot bring the old file back.
        is_durable: bool,
    },
    /// Nothing was written: nothing can be read from record `seq` on, which stands or stood at `offset`.
    Damaged { seq: u64, offset: u64 },
}

impl<F: Files> RewriteTicket<F> {
    /// Reads and writes the segment: may take long, needs no lock. A crash leaves the old file or the new one, and who
    /// has the old one open reads on in it. Give the result to [`Spool::finish_rewrite`].
    ///
    /// # Errors
    /// [`SpoolError::Rewrite`]: the file is as it was.
    pub fn run(&self) -> Result<Rewritten, SpoolError> {
        let failed = |source| SpoolError::Rewrite { name: self.segment.name(), source };
        let outcome = self.rewrite().map_err(failed)?;
        Ok(Rewritten { number: self.segment.number, change: self.change, outcome })
    }

    fn rewrite(&self) -> io::Result<Outcome> {
        let Segment { number, mut epoch, mut first_seq, bytes, acked_next, .. } = self.segment;
        let content = match self.files.open(&self.segment.name()) {
            // What cannot be read is as good as damaged, as for a reader.
            Ok(file) => {
                read_at_most(&*self.files, &file, HEADER as u64, bytes as usize - HEADER).unwrap_or_default()
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        let mut all = frames(&content, first_seq);
        let mut from = first_seq;
        if let Change::Renumber { epoch: new, first_seq: first } = self.change {
            (epoch, first_seq, from) = (new, first, acked_next);
        }
        let header = Header { run: self.run, number, epoch, first_seq };
        let mut new = header.encode().to_vec();
        let (mut next_seq, mut hole) = (first_seq, 0);
        let mut removed = Vec::new();
        for (seq, frame) in &mut all {
            // What is left of it behind what is acknowledged.
            let span = (seq + frame.span()).saturating_sub(seq.max(from));
            match frame {
                _ if span == 0 => {}
                Frame::Hole(_) => hole += span,
                Frame::Record(record) => match self.change(record, next_seq + hole) {
                    Ok(record) => {
                        if hole > 0 {
                            push_hole(&mut new, next_seq, hole);
                            next_seq += std::mem::take(&mut hole);
                        }
                        push_frame(&mut new, next_seq, &record);
                        next_seq += 1;
                    }
                    Err(wall_ns) => {
                        removed.push((seq, wall_ns));
                        hole += 1;
                    }
                },
            }
        }
        let read = (content.len() - all.rest() + HEADER) as u64;
        if read < bytes {
            return Ok(Outcome::Damaged { seq: all.seq(), offset: read });
        }
        if hole > 0 {
            push_hole(&mut new, next_seq, hole);
        }
        let is_written = self.change != Change::Thin || !removed.is_empty();
        if is_written {
            replace(&*self.files, &self.segment.name(), &new)?;
        }
        // The new file is there, whatever the sync says.
        let is_durable = !is_written || self.files.sync_directory().is_ok();
        let (segment, _) = Segment::examine(&header, &new[HEADER..]);
        Ok(Outcome::Whole { segment, removed, is_durable })
    }

    /// The record's bytes as number `seq`, or the wall clock of one that becomes a hole.
    fn change(&self, bytes: &[u8], seq: u64) -> Result<Vec<u8>, i64> {
        match (self.change, Record::from_bytes(bytes)) {
            (Change::Thin, Ok(record)) if is_minor(&record.event) => Err(record.wall_ns),
            (Change::Renumber { .. }, Ok(mut record)) => {
                record.seq = seq;
                record.to_bytes().map_err(|_| record.wall_ns)
            }
            // Of a newer agent, which ran here before: the server keeps it.
            (Change::Renumber { .. }, Err(error)) => RecordHead::renumbered(bytes, seq).ok_or_else(|| {
                tracing::error!(%error, "a spooled record does not decode");
                self.segment.walls().1
            }),
            (Change::Thin | Change::Repair, _) => Ok(bytes.to_vec()),
        }
    }
}

impl<F: Files> Spool<F> {
    /// What is to be written anew now: a segment that could not be repaired at the start; over the limit, the oldest one
    /// that may have minor records. Where none has, the oldest segment gives way. `None`: nothing is to be done.
    ///
    /// One ticket at a time: the caller runs it and gives its result to [`Spool::finish_rewrite`].
    pub fn begin_rewrite(&mut self) -> Option<RewriteTicket<F>> {
        // A repair may cut damage off: before that, the disk has to know that its epoch ends there.
        let held = self.segments.iter().find(|segment| segment.is_held && !self.run_file_due);
        if let Some(held) = held.cloned() {
            return Some(self.ticket(held, Change::Repair));
        }
        while self.bytes() > self.limits.bytes {
            let closed = self.segments.len() - usize::from(self.active.is_some());
            if let Some(segment) = self.segments.range(..closed).find(|segment| !segment.is_thinned) {
                return Some(self.ticket(segment.clone(), Change::Thin));
            }
            if !self.give_up_oldest() {
                break;
            }
        }
        None
    }

    fn ticket(&mut self, segment: Segment, change: Change) -> RewriteTicket<F> {
        self.rewriting = Some(segment.number);
        RewriteTicket { files: Arc::clone(&self.files), segment, run: self.counted_run, change }
    }

    /// Takes note of a ticket's result.
    ///
    /// # Errors
    /// [`SpoolError::Rewrite`] when the ticket failed: another one will be handed out.
    pub fn finish_rewrite(&mut self, result: Result<Rewritten, SpoolError>) -> Result<(), SpoolError> {
        self.rewriting = None;
        let Rewritten { number, change, outcome } = result?;
        let Some(index) = self.segments.iter().position(|segment| segment.number == number) else {
            // It gave way meanwhile; the name may be back.
            self.remove_name(super::recover::segment_name(number));
            return Ok(());
        };
        let old = self.segments[index].clone();
        let (segment, removed, is_durable) = match outcome {
            Outcome::Whole { segment, removed, is_durable } => (segment, removed, is_durable),
            Outcome::Damaged { seq, offset } => {
                self.cut(&old, seq, offset);
                return Ok(());
            }
        };
        self.cursor.take_if(|cursor| cursor.number == number);
        let lost = removed.iter().filter(|(seq, _)| *seq >= old.acked_next);
        let (mut count, mut walls) = (0, None::<(i64, i64)>);
        for (_, wall_ns) in lost {
            count += 1;
            walls =
                Some(walls.map_or((*wall_ns, *wall_ns), |(from, to)| (from.min(*wall_ns), to.max(*wall_ns))));
        }
        let walls = walls.unwrap_or_default();
        let new = &mut self.segments[index];
        *new = segment;
        new.version = old.version.wrapping_add(1);
        new.is_thinned = old.is_thinned || change == Change::Thin;
        match change {
            Change::Renumber { epoch, .. } => {
                self.renewal = Some(Renewal { old: old.epoch, epoch, next_seq: new.end() });
                self.total_lost += count;
                self.unwritable.add(count, walls);
            }
            Change::Thin | Change::Repair => {
                new.acked(old.acked_next.saturating_sub(1));
                self.total_dropped += count;
                self.full.add(count, walls);
            }
        }
        if !is_durable {
            self.directory_changes += 1;
            if change == Change::Repair {
                self.segments[index].is_held = true;
                let source = io::Error::other("the directory cannot be synced");
                return Err(SpoolError::Rewrite { name: old.name(), source });
            }
        }
        // The numbers that are missing say as much as a file with a hole.
        if self.segments[index].records == 0
            && change == Change::Thin
            && self.may_remove(index)
            && let Some(empty) = self.segments.remove(index)
        {
            self.remove_file(&empty);
        }
        Ok(())
    }

    /// Far over the limit, because nobody gave way in time.
    pub(super) fn give_way_at_once(&mut self) {
        while self.bytes() > self.limits.bytes + self.limits.segment_bytes && self.give_up_oldest() {}
    }

    /// False: it is still needed.
    fn give_up_oldest(&mut self) -> bool {
        if !self.may_remove(0) {
            return false;
        }
        let Some(segment) = self.segments.pop_front() else { return false };
        let lost = segment.waiting();
        self.total_dropped += lost;
        self.full.add(lost, segment.walls());
        self.remove_file(&segment);
        true
    }

    /// Gives up the oldest segment if nothing in it is younger than [`Limits::max_age`](super::Limits::max_age); false:
    /// there is none. To be called now and then, until it says false.
    ///
    /// Age is what the agent saw pass: by the boot clock while it ran, and at most three days for each time in which it
    /// did not. So a wall clock that jumps, back or forth, makes no record old.
    pub fn expire(&mut self, boot_ns: u64, wall_ns: i64) -> bool {
        let Some(max_age) = self.limits.max_age else { return false };
        let max_age_ns = u64::try_from(max_age.as_nanos()).unwrap_or(u64::MAX);
        let now = Stamp { run: self.run, boot_ns, wall_ns };
        let first = self.segments.back().and_then(|segment| segment.stamps).map(|(first, _)| first);
        if self.active.is_some() && first.is_some_and(|first| first.until(&now) >= SEGMENT_AGE_NS) {
            self.leave_segment();
        }
        let (mut later, mut age_ns, mut oldest_age_ns) = (now, 0_u64, 0);
        for (first, last) in self.segments.iter().rev().filter_map(|segment| segment.stamps) {
            age_ns = age_ns.saturating_add(last.until(&later));
            oldest_age_ns = age_ns;
            age_ns = age_ns.saturating_add(first.until(&last));
            later = first;
        }
        oldest_age_ns > max_age_ns && self.give_up_oldest()
    }

    /// Leaves the epoch `old`, because the server knows other records under its numbers (the disk was restored from an
    /// older image). What waits in it is recorded again under numbers of a new one: better twice than never. Until that is
    /// done, the current epoch goes on: a start after a crash finds it as the newest one, and the server will object to it
    /// again.
    ///
    /// # Errors
    /// [`SpoolError`]: the old epoch goes on; call again.
    pub fn begin_epoch(&mut self, old: u64) -> Result<(), SpoolError> {
        self.begin_renewal(old)?;
        loop {
            self.sync_records()?;
            match self.begin_renumbering() {
                Some(ticket) => {
                    let result = ticket.run();
                    self.finish_rewrite(result)?;
                }
                None if self.is_renewing() => {}
                None => return Ok(()),
            }
        }
    }

    /// [`Spool::begin_epoch`] in steps, so that recording goes on meanwhile: this one, and then, until there is nothing
    /// more to do, a sync, [`Spool::begin_renumbering`], its ticket, and [`Spool::finish_rewrite`].
    ///
    /// # Errors
    /// [`SpoolError::Random`].
    pub fn begin_renewal(&mut self, old: u64) -> Result<(), SpoolError> {
        // One that was broken off is finished first; the server will object to the other one again.
        if self.renewal.is_none() {
            let epoch = (self.random)().map_err(SpoolError::Random)?;
            self.renewal = Some(Renewal { old, epoch, next_seq: 1 });
        }
        Ok(())
    }

    /// The next segment that has to be renumbered. `None`: nothing waits under old numbers any more, and the new epoch
    /// has begun; or something came that has to be synced first, if [`Spool::is_renewing`].
    pub fn begin_renumbering(&mut self) -> Option<RewriteTicket<F>> {
        let Renewal { old, epoch, next_seq } = self.renewal?;
        let waits = |segment: &&Segment| segment.epoch == old && !segment.is_done();
        if let Some(segment) = self.segments.iter().find(waits).cloned() {
            if self.active_segment().is_some_and(|(active, _)| active == segment.number) {
                self.leave_segment();
                if !self.unsynced.is_empty() {
                    // Before the old segment loses it; when it fails, the next sync tries again.
                    let _ = self.write_unsynced();
                }
            }
            return Some(self.ticket(segment, Change::Renumber { epoch, first_seq: next_seq }));
        }
        if old != self.epoch {
            self.renewal = None;
        } else if self.unsynced.is_empty() {
            self.leave_segment();
            (self.epoch, self.next_seq, self.synced_next) = (epoch, next_seq, next_seq);
            (self.renewal, self.run_file_due) = (None, true);
        }
        None
    }

    /// Not all of it is renumbered yet.
    pub fn is_renewing(&self) -> bool {
        self.renewal.is_some()
    }
}
