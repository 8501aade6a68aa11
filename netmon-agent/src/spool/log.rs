//! The spool itself: numbering, writing, syncing.

use std::collections::{HashSet, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use netmon_common::model::{Event, Gap, GapReason, Record, RecordError};

use super::files::{Disk, Files, remove_if_there, write_all_at};
use super::format::{FRAME, HEADER, Header, push_frame};
use super::read::Cursor;
use super::recover::{self, RUN_FILE, RunFile};
use super::rewrite::Renewal;
use super::segment::{Lost, Segment, Stamp};

/// How much the spool may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes on disk. Beyond, first the minor records of the oldest segments give way, then the oldest segment.
    pub bytes: u64,
    /// A segment that reached this size is closed; at most a quarter of `bytes` is used.
    pub segment_bytes: u64,
    /// Bytes that wait in memory for the disk. Beyond, records are lost (and counted).
    pub unsynced_bytes: usize,
    /// Records that are older give way, segment by segment; see [`Spool::expire`]. `None`: however old.
    pub max_age: Option<Duration>,
}

impl Default for Limits {
    /// 256 MiB: at some 100 bytes a record and two records a second, two weeks without the server. Segments of
    /// 4 MiB: small against the whole, so that little is given up at once, large against a record.
    fn default() -> Self {
        Self { bytes: 256 << 20, segment_bytes: 4 << 20, unsynced_bytes: 1 << 20, max_age: None }
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
    /// A segment cannot be written anew.
    #[error("cannot write spool segment {name} anew; it stays as it is")]
    Rewrite {
        /// The segment's file.
        name: String,
        /// What the system says.
        source: io::Error,
    },
    /// What is in the directory is not known yet. Records wait in memory; syncing again tries again.
    #[error("cannot read {name} of the spool; records wait in memory")]
    Recover {
        /// The file, or "the directory".
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
    /// Wall clock of the oldest record that waits for the server, or of one little older; `None`: none waits.
    pub oldest_wall_ns: Option<i64>,
    /// Records of this run that could not be kept (disk full, I/O error).
    pub lost: u64,
    /// Records that gave way in this run because the spool was full or they were too old.
    pub dropped: u64,
    /// Bytes found damaged while reading in this run.
    pub damaged_bytes: u64,
}

/// What one fsync has to do; see [`Spool::begin_sync`].
pub struct SyncTicket<F: Files = Disk> {
    files: Arc<F>,
    run_file: Option<RunFile>,
    /// The segment's number and file.
    segment: Option<(u64, F::File)>,
    directory: bool,
    directory_changes: u64,
    bytes: usize,
    next_seq: u64,
    stamps: Option<(Stamp, Stamp)>,
}

impl<F: Files> SyncTicket<F> {
    /// Syncs: may take long, needs no lock. Give the result to [`Spool::finish_sync`].
    ///
    /// # Errors
    /// What the system says; [`io::ErrorKind::NotFound`] when somebody removed the segment.
    pub fn run(&self) -> io::Result<()> {
        // First: once a record of this run is handed out, no start may take the run before for the newest.
        if let Some(run_file) = &self.run_file {
            self.files.make_directory()?;
            run_file.write(&*self.files)?;
        }
        if let Some((number, file)) = &self.segment {
            self.files.sync(file)?;
            if !self.files.is_there(file, &recover::segment_name(*number))? {
                return Err(io::Error::new(io::ErrorKind::NotFound, "somebody removed it"));
            }
        }
        if self.directory { self.files.sync_directory() } else { Ok(()) }
    }
}

/// Records on disk until the server has them; see the module's description.
pub struct Spool<F: Files = Disk> {
    pub(super) files: Arc<F>,
    pub(super) limits: Limits,
    /// As the records have it.
    pub(super) run: u32,
    /// As the files have it: 0 until they could be read.
    pub(super) counted_run: u32,
    /// The file of the runs does not know of this one.
    pub(super) run_file_due: bool,
    /// What was in the directory at the start is known.
    pub(super) is_surveyed: bool,
    pub(super) epoch: u64,
    pub(super) next_seq: u64,
    pub(super) next_number: u64,
    /// Oldest first; the last one is being written if `active` is there.
    pub(super) segments: VecDeque<Segment>,
    pub(super) active: Option<F::File>,
    /// Frames that are not known to be on disk, from record `synced_next` on.
    pub(super) unsynced: Vec<u8>,
    /// The first and the newest of them.
    unsynced_stamps: Option<(Stamp, Stamp)>,
    pub(super) synced_next: u64,
    /// How many bytes of `unsynced` the active segment has.
    written: usize,
    /// What the disk said when it failed last; `None` when it works.
    pub(super) trouble: Option<String>,
    pub(super) directory_changes: u64,
    directory_synced: u64,
    /// Files that are of no use any more and could not be removed.
    pub(super) leftovers: Vec<String>,
    pub(super) cursor: Option<Cursor<F::File>>,
    /// The segment that is being written anew.
    pub(super) rewriting: Option<u64>,
    pub(super) renewal: Option<Renewal>,
    pub(super) full: Lost,
    pub(super) unwritable: Lost,
    pub(super) damaged: Lost,
    pub(super) total_lost: u64,
    pub(super) total_dropped: u64,
    pub(super) total_damaged: u64,
    pub(super) random: Random,
}

impl<F: Files> Spool<F> {
    /// One that knows nothing of its directory.
    pub(super) fn new(files: F, limits: Limits, epoch: u64, random: Random) -> Self {
        Self {
            files: Arc::new(files),
            limits: Limits { segment_bytes: limits.segment_bytes.min(limits.bytes / 4), ..limits },
            run: 0,
            counted_run: 0,
            run_file_due: true,
            is_surveyed: false,
            epoch,
            next_seq: 1,
            next_number: 1,
            segments: VecDeque::new(),
            active: None,
            unsynced: Vec::new(),
            unsynced_stamps: None,
            synced_next: 1,
            written: 0,
            trouble: None,
            directory_changes: 0,
            directory_synced: 0,
            leftovers: Vec::new(),
            cursor: None,
            rewriting: None,
            renewal: None,
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
        let bytes = match record.to_bytes() {
            Ok(bytes) => bytes,
            Err(error) => {
                self.lose(&record);
                return Err(SpoolError::Record(error));
            }
        };
        if !self.has_room(bytes.len()) {
            self.lose(&record);
            let trouble = self.trouble.clone().unwrap_or_else(|| "it is slow".into());
            return Err(SpoolError::NoRoom { trouble });
        }
        push_frame(&mut self.unsynced, record.seq, &bytes);
        let stamp = Stamp::from(&record);
        self.unsynced_stamps = Some((self.unsynced_stamps.map_or(stamp, |(first, _)| first), stamp));
        self.next_seq += 1;
        // A disk in trouble is asked again by the next sync, not by every record.
        if self.trouble.is_none() && self.is_surveyed {
            // The record is kept in memory whatever the disk says; the next sync reports what it says.
            let _ = self.write_unsynced();
        }
        self.give_way_at_once();
        Ok(record.seq)
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
                return lost.add(gap.count.unwrap_or(1), (gap.from_wall_ns, gap.to_wall_ns));
            }
        }
        self.total_lost += 1;
        self.unwritable.add(1, (record.wall_ns, record.wall_ns));
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
        if !self.is_surveyed {
            return Ok(None);
        }
        if !self.unsynced.is_empty() {
            self.write_unsynced()?;
        }
        let directory = self.directory_changes != self.directory_synced;
        if self.unsynced.is_empty() && !directory && !self.run_file_due {
            return Ok(None);
        }
        Ok(Some(SyncTicket {
            files: Arc::clone(&self.files),
            run_file: self.run_file_due.then_some(self.run_file()),
            segment: self.active_segment().filter(|_| !self.unsynced.is_empty()),
            directory,
            directory_changes: self.directory_changes,
            bytes: self.written,
            next_seq: self.next_seq,
            stamps: self.unsynced_stamps,
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
            if source.kind() == io::ErrorKind::NotFound {
                self.look_for_files();
            }
            return Err(SpoolError::Sync { name, source });
        }
        self.run_file_due &= ticket.run_file != Some(self.run_file());
        self.directory_synced = self.directory_synced.max(ticket.directory_changes);
        // A segment left behind since (damage found by a reader) has nothing of this ticket any more.
        let is_same = ticket
            .segment
            .is_some_and(|(number, _)| self.active_segment().is_some_and(|(active, _)| active == number));
        if is_same && let Some(segment) = self.segments.back_mut() {
            if let Some((first, last)) = ticket.stamps {
                segment.marks.push(self.synced_next, first.wall_ns);
                segment.stamps = Some((segment.stamps.map_or(first, |(first, _)| first), last));
                self.unsynced_stamps = self.unsynced_stamps.map(|(_, newest)| (last, newest));
            }
            // Nothing but records is appended.
            segment.span = ticket.next_seq - segment.first_seq;
            segment.records = segment.span;
            segment.bytes += ticket.bytes as u64;
            self.unsynced.drain(..ticket.bytes);
            self.written -= ticket.bytes;
            self.synced_next = ticket.next_seq;
            if self.unsynced.is_empty() {
                self.unsynced_stamps = None;
            }
            if segment.bytes >= self.limits.segment_bytes {
                self.leave_segment();
            }
        }
        self.remove_done();
        self.remove_leftovers();
        Ok(())
    }

    /// Blocks until the disk has everything and is within its limit: [`Spool::begin_recovery`], [`Spool::begin_sync`] and
    /// [`Spool::begin_rewrite`], what they want done, and what finishes it.
    ///
    /// # Errors
    /// As these.
    pub fn sync(&mut self) -> Result<(), SpoolError> {
        self.sync_records()?;
        while let Some(ticket) = self.begin_rewrite() {
            let result = ticket.run();
            self.finish_rewrite(result)?;
        }
        Ok(())
    }

    pub(super) fn sync_records(&mut self) -> Result<(), SpoolError> {
        if let Some(ticket) = self.begin_recovery() {
            let result = ticket.run();
            self.finish_recovery(result)?;
        }
        let Some(ticket) = self.begin_sync()? else { return Ok(()) };
        let result = ticket.run();
        self.finish_sync(ticket, result)
    }

    /// Takes note that the server has every record of `epoch` up to `seq`; segments that it has wholly are
    /// removed.
    pub fn acked(&mut self, epoch: u64, seq: u64) {
        for segment in self.segments.iter_mut().filter(|segment| segment.epoch == epoch) {
            segment.acked(seq);
        }
        self.remove_done();
    }

    /// Syncs and marks the end of the run, so that the next one knows that nothing is missing.
    ///
    /// # Errors
    /// [`SpoolError`]: the next run will say that this one died.
    pub fn close(&mut self) -> Result<(), SpoolError> {
        self.sync_records()?;
        let stopped = Some((self.epoch, self.next_seq));
        let written = RunFile { stopped, ..self.run_file() }.write(&*self.files);
        written.map_err(|source| SpoolError::RunFile { name: RUN_FILE, source })
    }

    /// What the directory has to know of this run while it goes on.
    pub(super) fn run_file(&self) -> RunFile {
        RunFile { run: self.counted_run, stopped: None, epoch: Some(self.epoch) }
    }

    /// False while something in the directory is not known, not repaired or not to be handed out.
    pub fn is_settled(&self) -> bool {
        self.is_surveyed && self.segments.iter().all(|segment| !segment.is_held)
    }

    /// How the spool stands.
    pub fn stats(&self) -> Stats {
        let mut backlog = self.next_seq - self.synced_next;
        let mut oldest_wall_ns = None;
        for segment in &self.segments {
            let waiting = segment.waiting();
            if waiting > 0 && oldest_wall_ns.is_none() {
                oldest_wall_ns = segment.marks.at(segment.acked_next);
            }
            backlog += waiting;
        }
        if oldest_wall_ns.is_none() && self.next_seq > self.synced_next {
            oldest_wall_ns = self.unsynced_stamps.map(|(first, _)| first.wall_ns);
        }
        Stats {
            run: self.run,
            epoch: self.epoch,
            next_seq: self.next_seq,
            synced_seq: self.synced_next - 1,
            backlog,
            bytes: self.bytes(),
            oldest_wall_ns,
            lost: self.total_lost,
            dropped: self.total_dropped,
            damaged_bytes: self.total_damaged,
        }
    }

    /// On disk and waiting for it.
    pub(super) fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.bytes).sum::<u64>() + self.unsynced.len() as u64
    }

    /// Writes what the active segment does not have yet, behind its synced part: a write that failed half-way
    /// is written over with the same bytes.
    pub(super) fn write_unsynced(&mut self) -> Result<(), SpoolError> {
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

    pub(super) fn active_segment(&self) -> Option<(u64, F::File)> {
        Some((self.segments.back()?.number, self.active.clone()?))
    }

    fn begin_segment(&mut self) -> Result<F::File, SpoolError> {
        let number = self.next_number;
        // Also when it fails: a name that may be on disk is not used for something else.
        self.next_number += 1;
        let header = Header { run: self.counted_run, number, epoch: self.epoch, first_seq: self.synced_next };
        let name = recover::segment_name(number);
        let failed = |source| SpoolError::Write { name: name.clone(), source };
        let file = match self.files.create(&name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                tracing::error!("somebody removed the spool's directory; it is made again");
                self.files.make_directory().map_err(failed)?;
                self.look_for_files();
                self.files.create(&name)
            }
            created => created,
        };
        let file = file.map_err(failed)?;
        self.directory_changes += 1;
        if let Err(source) = write_all_at(&*self.files, &file, &header.encode(), 0) {
            // Best effort: an empty segment is removed by the next start, too.
            let _ = self.files.remove(&name);
            return Err(failed(source));
        }
        self.segments.push_back(Segment::new(&header));
        self.active = Some(file.clone());
        Ok(file)
    }

    /// Ends the active segment at its synced part; the rest goes into the next one.
    pub(super) fn leave_segment(&mut self) {
        if self.active.take().is_none() {
            return;
        }
        self.written = 0;
        if let Some(empty) = self.segments.pop_back_if(|segment| segment.span == 0) {
            self.remove_file(&empty);
        }
    }

    /// Counts what somebody removed.
    fn look_for_files(&mut self) {
        let names: HashSet<String> = match self.files.list() {
            Ok(names) => names.into_iter().collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => HashSet::new(),
            // What is not there shows when it is read.
            Err(_) => return,
        };
        self.run_file_due |= !names.contains(RUN_FILE);
        let segments = std::mem::take(&mut self.segments);
        for segment in segments {
            if names.contains(&segment.name()) {
                self.segments.push_back(segment);
            } else {
                self.cursor.take_if(|cursor| cursor.number == segment.number);
                if !segment.is_done() {
                    self.count_damage(&segment, HEADER as u64);
                }
            }
        }
    }

    /// A segment's bytes from `offset` on are lost.
    pub(super) fn count_damage(&mut self, segment: &Segment, offset: u64) {
        let lost = segment.bytes - offset;
        tracing::error!(segment = segment.name(), bytes = lost, "a spool segment is damaged or gone");
        self.total_damaged += lost;
        self.damaged.add(lost, segment.walls());
    }

    /// A segment may go only when a later one is surely on disk: else a power cut could leave the start of an
    /// epoch as its seeming end, and numbers would be used again.
    pub(super) fn may_remove(&self, index: usize) -> bool {
        self.segments.iter().skip(index + 1).any(|later| later.span > 0 && !later.is_held)
    }

    pub(super) fn remove_done(&mut self) {
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

    pub(super) fn remove_file(&mut self, segment: &Segment) {
        self.cursor.take_if(|cursor| cursor.number == segment.number);
        self.remove_name(segment.name());
    }

    pub(super) fn remove_name(&mut self, name: String) {
        self.directory_changes += 1;
        if let Err(error) = remove_if_there(&*self.files, &name) {
            // A start that finds it does no harm: the server ignores what it has.
            tracing::warn!(name, %error, "cannot remove a spool file, trying again");
            self.leftovers.push(name);
        }
    }

    fn remove_leftovers(&mut self) {
        let files = Arc::clone(&self.files);
        let before = self.leftovers.len();
        self.leftovers.retain(|name| remove_if_there(&*files, name).is_err());
        if self.leftovers.len() < before {
            self.directory_changes += 1;
        }
    }
}
