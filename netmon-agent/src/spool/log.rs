//! The spool itself: numbering, writing, syncing, giving way.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use netmon_common::model::{Event, Gap, GapReason, Record, RecordError};

use super::files::{Disk, Files, write_all_at};
use super::format::{FRAME, HEADER, Header, push_frame};
use super::read::{Cursor, EpochRange};
use super::recover::{self, RunFile};

/// How much the spool may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes on disk. Beyond, the oldest segment gives way.
    pub bytes: u64,
    /// A segment that reached this size is closed; at most a quarter of `bytes` is used.
    pub segment_bytes: u64,
    /// Bytes that wait in memory for the disk. Beyond, records are lost (and counted).
    pub unsynced_bytes: usize,
}

impl Default for Limits {
    /// 256 MiB: at some 100 bytes a record and two records a second, two weeks without the server. Segments of
    /// 4 MiB: small against the whole, so that little is given up at once, large against a record.
    fn default() -> Self {
        Self { bytes: 256 << 20, segment_bytes: 4 << 20, unsynced_bytes: 1 << 20 }
    }
}

/// Where the random numbers of new epochs come from.
pub type Random = Box<dyn FnMut() -> io::Result<u64> + Send>;

/// Why something could not be spooled or read back.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The event does not make a record.
    #[error("the event cannot be recorded")]
    Record(#[source] RecordError),
    /// The disk does not take records and the memory kept for that time is full: this record is lost.
    #[error("a record is lost: the spool waits for its disk ({trouble}) and its memory is full")]
    NoRoom {
        /// What the disk said last.
        trouble: String,
    },
    /// A segment cannot be made or written. Its records wait in memory; syncing again tries again.
    #[error("cannot write spool segment {name}; its records wait in memory")]
    Write {
        /// The segment's file.
        name: String,
        /// What the system says.
        source: io::Error,
    },
    /// A segment cannot be synced. Its records go into a new one with the next sync.
    #[error("cannot sync spool segment {name}; its records go into a new one")]
    Sync {
        /// The segment's file.
        name: String,
        /// What the system says.
        source: io::Error,
    },
    /// A segment cannot be opened for reading.
    #[error("cannot open spool segment {name}")]
    Open {
        /// The segment's file.
        name: String,
        /// What the system says.
        source: io::Error,
    },
    /// The file that counts the runs cannot be written.
    #[error("cannot write the spool's {name}")]
    RunFile {
        /// The file.
        name: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// The system has no random number for a new epoch.
    #[error("cannot get a random number for a new spool epoch")]
    Random(#[source] io::Error),
}

/// How the spool stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    /// The agent's run.
    pub run: u32,
    /// The epoch that is being written.
    pub epoch: u64,
    /// The number that the next record gets.
    pub next_seq: u64,
    /// The newest synced record of the epoch; 0: none.
    pub synced_seq: u64,
    /// Records that wait for the server, synced or not.
    pub backlog: u64,
    /// Bytes on disk and waiting for it.
    pub bytes: u64,
    /// Records of this run that could not be kept (disk full, I/O error).
    pub lost: u64,
    /// Records that gave way in this run because the spool was full.
    pub dropped: u64,
    /// Bytes found damaged while reading in this run.
    pub damaged_bytes: u64,
}

/// One file of records, as far as it is synced.
#[derive(Clone, Debug)]
pub(super) struct Segment {
    pub number: u64,
    pub epoch: u64,
    pub first_seq: u64,
    pub records: u64,
    /// Length of the header and these records.
    pub bytes: u64,
    /// Everything below is acknowledged.
    pub acked_next: u64,
    /// Wall clock of the first and the newest record.
    pub walls: Option<(i64, i64)>,
}

impl Segment {
    pub fn name(&self) -> String {
        recover::segment_name(self.number)
    }

    /// Behind the last synced record.
    pub fn end(&self) -> u64 {
        self.first_seq + self.records
    }

    pub fn is_done(&self) -> bool {
        self.acked_next >= self.end()
    }
}

/// Losses that the caller has not been told of yet.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Lost {
    count: u64,
    walls: Option<(i64, i64)>,
}

impl Lost {
    pub(super) fn add(&mut self, count: u64, from: i64, to: i64) {
        self.count += count;
        self.walls = Some(self.walls.map_or((from, to), |(a, b)| (a.min(from), b.max(to))));
    }

    fn take(&mut self, reason: GapReason) -> Option<Gap> {
        let Lost { count, walls } = std::mem::take(self);
        let (from_wall_ns, to_wall_ns) = walls.unwrap_or_default();
        (count > 0).then_some(Gap { reason, from_wall_ns, to_wall_ns, count: Some(count) })
    }
}

/// What one fsync has to do; see [`Spool::begin_sync`].
pub struct SyncTicket<F: Files = Disk> {
    files: Arc<F>,
    /// The segment's number and file.
    segment: Option<(u64, F::File)>,
    directory: bool,
    directory_changes: u64,
    bytes: usize,
    next_seq: u64,
    walls: Option<(i64, i64)>,
}

impl<F: Files> SyncTicket<F> {
    /// Syncs: may take long, needs no lock. Give the result to [`Spool::finish_sync`].
    ///
    /// # Errors
    /// What the system says.
    pub fn run(&self) -> io::Result<()> {
        if let Some((_, file)) = &self.segment {
            self.files.sync(file)?;
        }
        if self.directory { self.files.sync_directory() } else { Ok(()) }
    }
}

/// Records on disk until the server has them; see the module's description.
pub struct Spool<F: Files = Disk> {
    pub(super) files: Arc<F>,
    pub(super) limits: Limits,
    pub(super) run: u32,
    pub(super) epoch: u64,
    pub(super) next_seq: u64,
    pub(super) next_number: u64,
    /// Oldest first; the last one is being written if `active` is there.
    pub(super) segments: VecDeque<Segment>,
    pub(super) active: Option<F::File>,
    /// Frames that are not known to be on disk, from record `synced_next` on.
    unsynced: Vec<u8>,
    unsynced_walls: Option<(i64, i64)>,
    pub(super) synced_next: u64,
    /// How many bytes of `unsynced` the active segment has.
    written: usize,
    /// What the disk said when it failed last; `None` when it works.
    trouble: Option<String>,
    directory_changes: u64,
    directory_synced: u64,
    pub(super) cursor: Option<Cursor<F::File>>,
    full: Lost,
    unwritable: Lost,
    pub(super) damaged: Lost,
    total_lost: u64,
    total_dropped: u64,
    pub(super) total_damaged: u64,
    random: Random,
}

impl<F: Files> Spool<F> {
    pub(super) fn new(
        files: F,
        limits: Limits,
        run: u32,
        (epoch, next_seq): (u64, u64),
        next_number: u64,
        segments: VecDeque<Segment>,
        random: Random,
    ) -> Self {
        Self {
            files: Arc::new(files),
            limits: Limits { segment_bytes: limits.segment_bytes.min(limits.bytes / 4), ..limits },
            run,
            epoch,
            next_seq,
            next_number,
            segments,
            active: None,
            unsynced: Vec::new(),
            unsynced_walls: None,
            synced_next: next_seq,
            written: 0,
            trouble: None,
            directory_changes: 0,
            directory_synced: 0,
            cursor: None,
            full: Lost::default(),
            unwritable: Lost::default(),
            damaged: Lost::default(),
            total_lost: 0,
            total_dropped: 0,
            total_damaged: 0,
            random,
        }
    }

    /// Records an event and says which number it got. It survives a kill of the agent from here on, a power cut
    /// from the next sync on. A disk that fails is waited for in memory (see [`Limits::unsynced_bytes`]).
    ///
    /// # Errors
    /// [`SpoolError::NoRoom`], [`SpoolError::Record`]: the event is lost, counted, and has no number. (A
    /// [`Gap`] from [`Spool::take_gaps`] is not lost: it is handed out again.)
    pub fn append(&mut self, boot_ns: u64, wall_ns: i64, event: Event) -> Result<u64, SpoolError> {
        let record = Record { seq: self.next_seq, run: self.run, boot_ns, wall_ns, event };
        self.append_record(&record)
    }

    fn append_record(&mut self, record: &Record) -> Result<u64, SpoolError> {
        let seq = record.seq;
        let bytes = match record.to_bytes() {
            Ok(bytes) => bytes,
            Err(error) => {
                self.lose(record);
                return Err(SpoolError::Record(error));
            }
        };
        if !self.has_room(bytes.len()) {
            self.lose(record);
            let trouble = self.trouble.clone().unwrap_or_else(|| "it is slow".into());
            return Err(SpoolError::NoRoom { trouble });
        }
        push_frame(&mut self.unsynced, seq, &bytes);
        let (first, _) = self.unsynced_walls.unwrap_or((record.wall_ns, record.wall_ns));
        self.unsynced_walls = Some((first, record.wall_ns));
        self.next_seq += 1;
        // A disk in trouble is asked again by the next sync, not by every record.
        if self.trouble.is_none() {
            // The record is kept in memory whatever the disk says; the next sync reports what it says.
            let _ = self.write_unsynced();
        }
        self.give_way();
        Ok(seq)
    }

    fn has_room(&self, record: usize) -> bool {
        self.unsynced.len() + FRAME + record <= self.limits.unsynced_bytes
    }

    fn lose(&mut self, record: &Record) {
        if let Event::Gap(gap) = &record.event {
            let lost = match gap.reason {
                GapReason::SpoolFull => Some(&mut self.full),
                GapReason::SpoolUnwritable => Some(&mut self.unwritable),
                GapReason::SpoolDamaged => Some(&mut self.damaged),
                _ => None,
            };
            if let Some(lost) = lost {
                return lost.add(gap.count.unwrap_or(1), gap.from_wall_ns, gap.to_wall_ns);
            }
        }
        self.total_lost += 1;
        self.unwritable.add(1, record.wall_ns, record.wall_ns);
    }

    /// Losses since the last call, to be appended as [`Event::Gap`]s (and written to the PC's own log). Empty
    /// while the spool could not take them.
    pub fn take_gaps(&mut self) -> Vec<Gap> {
        // A gap's record is far below 256 bytes: a few integers.
        if !self.has_room(3 * 256) {
            return Vec::new();
        }
        let full = self.full.take(GapReason::SpoolFull);
        let unwritable = self.unwritable.take(GapReason::SpoolUnwritable);
        let damaged = self.damaged.take(GapReason::SpoolDamaged);
        [full, unwritable, damaged].into_iter().flatten().collect()
    }

    /// Writes what is not written yet and says what to sync; `None`: nothing. One ticket at a time: the caller
    /// runs it and gives its result to [`Spool::finish_sync`] before it asks for the next.
    ///
    /// # Errors
    /// [`SpoolError::Write`]: the records stay in memory, and the next call tries again.
    pub fn begin_sync(&mut self) -> Result<Option<SyncTicket<F>>, SpoolError> {
        if !self.unsynced.is_empty() {
            self.write_unsynced()?;
        }
        let directory = self.directory_changes != self.directory_synced;
        if self.unsynced.is_empty() && !directory {
            return Ok(None);
        }
        Ok(Some(SyncTicket {
            files: Arc::clone(&self.files),
            segment: self.active_segment().filter(|_| !self.unsynced.is_empty()),
            directory,
            directory_changes: self.directory_changes,
            bytes: self.written,
            next_seq: self.next_seq,
            walls: self.unsynced_walls,
        }))
    }

    /// Takes note of a ticket's result. After a failure the segment is left behind, and what it did not sync
    /// goes into a new one with the next sync.
    ///
    /// # Errors
    /// [`SpoolError::Sync`] when the ticket failed.
    pub fn finish_sync(&mut self, ticket: SyncTicket<F>, result: io::Result<()>) -> Result<(), SpoolError> {
        if let Err(source) = result {
            let name = self.segments.back().map(Segment::name).unwrap_or_default();
            self.trouble = Some(source.to_string());
            self.leave_segment();
            return Err(SpoolError::Sync { name, source });
        }
        self.directory_synced = self.directory_synced.max(ticket.directory_changes);
        // A segment left behind since (damage found by a reader) has nothing of this ticket any more.
        let is_same = ticket
            .segment
            .is_some_and(|(number, _)| self.active_segment().is_some_and(|(active, _)| active == number));
        if is_same && let Some(segment) = self.segments.back_mut() {
            segment.records = ticket.next_seq - segment.first_seq;
            segment.bytes += ticket.bytes as u64;
            if let Some((first, last)) = ticket.walls {
                segment.walls = Some((segment.walls.map_or(first, |(first, _)| first), last));
                self.unsynced_walls = self.unsynced_walls.map(|(_, newest)| (last, newest));
            }
            self.unsynced.drain(..ticket.bytes);
            self.written -= ticket.bytes;
            self.synced_next = ticket.next_seq;
            if segment.bytes >= self.limits.segment_bytes {
                self.leave_segment();
            }
        }
        self.give_way();
        self.remove_done();
        Ok(())
    }

    /// [`Spool::begin_sync`], the sync, [`Spool::finish_sync`]: blocks until the disk has everything.
    ///
    /// # Errors
    /// As these.
    pub fn sync(&mut self) -> Result<(), SpoolError> {
        let Some(ticket) = self.begin_sync()? else { return Ok(()) };
        let result = ticket.run();
        self.finish_sync(ticket, result)
    }

    /// Takes note that the server has every record of `epoch` up to `seq`; segments that it has wholly are
    /// removed.
    pub fn acked(&mut self, epoch: u64, seq: u64) {
        for segment in self.segments.iter_mut().filter(|segment| segment.epoch == epoch) {
            let acked_next = seq.saturating_add(1).min(segment.end());
            segment.acked_next = segment.acked_next.max(acked_next);
        }
        self.remove_done();
    }

    /// Begins a new epoch, because the server knows other records under this one's numbers (the disk was
    /// restored from an older image). What waits in the spool is recorded again under new numbers: better twice
    /// than never.
    ///
    /// # Errors
    /// [`SpoolError`]: what could not be moved is counted as lost.
    pub fn begin_epoch(&mut self) -> Result<(), SpoolError> {
        let epoch = (self.random)().map_err(SpoolError::Random)?;
        self.sync()?;
        self.leave_segment();
        let old = self.epochs().into_iter().find(|range| range.epoch == self.epoch);
        (self.epoch, self.next_seq, self.synced_next) = (epoch, 1, 1);
        let Some(EpochRange { epoch: old, oldest, next }) = old else { return Ok(()) };
        let moved = self.move_records(old, oldest, next);
        self.acked(old, u64::MAX);
        moved
    }

    fn move_records(&mut self, old: u64, mut seq: u64, next: u64) -> Result<(), SpoolError> {
        while seq < next {
            let chunk = match self.read(old, seq, 1000, self.limits.unsynced_bytes / 4) {
                Ok(Some(chunk)) => chunk,
                Ok(None) => return Ok(()),
                Err(error) => {
                    self.total_lost += next - seq;
                    self.unwritable.add(next - seq, 0, 0);
                    return Err(error);
                }
            };
            seq = chunk.first_seq + chunk.records.len() as u64;
            for bytes in &chunk.records {
                match Record::from_bytes(bytes) {
                    Ok(mut record) => {
                        record.seq = self.next_seq;
                        // A failure is counted as lost, record by record.
                        let _ = self.append_record(&record);
                    }
                    Err(error) => {
                        tracing::error!(%error, "a spooled record does not decode");
                        self.total_lost += 1;
                        self.unwritable.add(1, 0, 0);
                    }
                }
            }
            self.sync()?;
        }
        Ok(())
    }

    /// Syncs and marks the end of the run, so that the next one knows that nothing is missing.
    ///
    /// # Errors
    /// [`SpoolError`]: the next run will say that this one died.
    pub fn close(&mut self) -> Result<(), SpoolError> {
        self.sync()?;
        let stopped = Some((self.epoch, self.next_seq));
        RunFile { run: self.run, stopped }.write(&*self.files)
    }

    /// How the spool stands.
    pub fn stats(&self) -> Stats {
        let mut backlog = self.next_seq - self.synced_next;
        let mut bytes = self.unsynced.len() as u64;
        let mut behind = (0, 0);
        for segment in &self.segments {
            let counted = if behind.0 == segment.epoch { behind.1 } else { 0 };
            backlog += segment.end().saturating_sub(segment.acked_next.max(segment.first_seq).max(counted));
            bytes += segment.bytes;
            behind = (segment.epoch, segment.end().max(counted));
        }
        Stats {
            run: self.run,
            epoch: self.epoch,
            next_seq: self.next_seq,
            synced_seq: self.synced_next - 1,
            backlog,
            bytes,
            lost: self.total_lost,
            dropped: self.total_dropped,
            damaged_bytes: self.total_damaged,
        }
    }

    /// Writes what the active segment does not have yet, behind its synced part: a write that failed half-way
    /// is written over with the same bytes.
    fn write_unsynced(&mut self) -> Result<(), SpoolError> {
        let result = self.try_write_unsynced();
        self.trouble = match &result {
            Err(SpoolError::Write { source, .. }) => Some(source.to_string()),
            _ => None,
        };
        result
    }

    fn try_write_unsynced(&mut self) -> Result<(), SpoolError> {
        let file = match &self.active {
            Some(file) => file.clone(),
            None => self.begin_segment()?,
        };
        let Some(segment) = self.segments.back() else { return Ok(()) };
        let rest = &self.unsynced[self.written..];
        write_all_at(&*self.files, &file, rest, segment.bytes + self.written as u64)
            .map_err(|source| SpoolError::Write { name: segment.name(), source })?;
        self.written = self.unsynced.len();
        Ok(())
    }

    fn active_segment(&self) -> Option<(u64, F::File)> {
        Some((self.segments.back()?.number, self.active.clone()?))
    }

    fn begin_segment(&mut self) -> Result<F::File, SpoolError> {
        let number = self.next_number;
        // Also when it fails: a name that may be on disk is not used for something else.
        self.next_number += 1;
        let header = Header { run: self.run, number, epoch: self.epoch, first_seq: self.synced_next };
        let name = recover::segment_name(number);
        let failed = |source| SpoolError::Write { name: name.clone(), source };
        let file = self.files.create(&name).map_err(failed)?;
        self.directory_changes += 1;
        if let Err(source) = write_all_at(&*self.files, &file, &header.encode(), 0) {
            // Best effort: an empty segment is removed by the next start, too.
            let _ = self.files.remove(&name);
            return Err(failed(source));
        }
        self.segments.push_back(Segment {
            number,
            epoch: self.epoch,
            first_seq: self.synced_next,
            records: 0,
            bytes: HEADER as u64,
            acked_next: self.synced_next,
            walls: None,
        });
        self.active = Some(file.clone());
        Ok(file)
    }

    /// Ends the active segment at its synced part; the rest goes into the next one.
    pub(super) fn leave_segment(&mut self) {
        if self.active.take().is_none() {
            return;
        }
        self.written = 0;
        if let Some(empty) = self.segments.pop_back_if(|segment| segment.records == 0) {
            self.remove_file(&empty);
        }
    }

    /// Removes the oldest segments while the spool is over its limit.
    fn give_way(&mut self) {
        let mut bytes =
            self.segments.iter().map(|segment| segment.bytes).sum::<u64>() + self.unsynced.len() as u64;
        while bytes > self.limits.bytes && self.may_remove(0) {
            let Some(segment) = self.segments.pop_front() else { return };
            bytes -= segment.bytes;
            let lost = segment.end() - segment.first_seq.max(segment.acked_next);
            if lost > 0 {
                self.total_dropped += lost;
                let (from, to) = segment.walls.unwrap_or_default();
                self.full.add(lost, from, to);
            }
            self.remove_file(&segment);
        }
    }

    /// A segment may go only when a later one is surely on disk: else a power cut could leave the start of an
    /// epoch as its seeming end, and numbers would be used again.
    fn may_remove(&self, index: usize) -> bool {
        self.segments.range(index + 1..).any(|later| later.records > 0)
    }

    fn remove_done(&mut self) {
        let mut index = 0;
        while index < self.segments.len() {
            let segment = &self.segments[index];
            let is_active = self.active.is_some() && index + 1 == self.segments.len();
            if segment.is_done() && !is_active && self.may_remove(index) {
                if let Some(segment) = self.segments.remove(index) {
                    self.remove_file(&segment);
                }
            } else {
                index += 1;
            }
        }
    }

    fn remove_file(&mut self, segment: &Segment) {
        self.cursor.take_if(|cursor| cursor.number == segment.number);
        self.directory_changes += 1;
        if let Err(error) = self.files.remove(&segment.name()) {
            // It stays until the next start, which finds it again; the server ignores what it has.
            tracing::warn!(segment = segment.name(), %error, "cannot remove a spool segment");
        }
    }
}
